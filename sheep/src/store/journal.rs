//! The journal file: a header block, then a ring of batches.
//!
//! Always holds:
//! 1. Positions only grow; a position's place in the file is its remainder by the ring's length. A batch may go over
//!    the end of the ring and continue at its start.
//! 2. Batch n+1 is written only after batch n was flushed to the device. Behind the first batch that is not whole
//!    there can therefore be no whole one, unless a flushed batch rotted: [`Journal::scan`] tells the two apart.
//! 3. The ring is written full of zeros when it is made, so that a commit never changes the file's metadata.
//!
//! A crash leaves at most one torn batch, at the end; none of its records was acknowledged as durable.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::checksum::{BLOCK_BYTES, crc32c};
use super::fields::{u32_at, u64_at};
use super::layout;
use super::record::{self, Record, decode_batch, decode_batch_head};
use crate::world::disk::{File, Files, OpenMode, is_unreadable};
use crate::world::planted::{self, Bug};

const MAGIC: [u8; 8] = *b"SHEEPLOG";
const FORMAT: u32 = 1;
/// Where the ring begins.
const RING_OFFSET: u64 = BLOCK_BYTES as u64;
/// Bytes of the header before its checksum.
const HEADER_BYTES: usize = 28;

/// Smallest journal: a 4 MiB write must fit beside what is being freed.
pub const JOURNAL_BYTES_MIN: u64 = 8 << 20;
/// Largest journal: a replay must stay a matter of seconds.
pub const JOURNAL_BYTES_MAX: u64 = 64 << 30;

/// Zeros written at once when a journal is made.
const BUFFER_BYTES: usize = 1 << 20;
/// Memory kept for batches between commits: what a full one takes. New memory costs more than what is written to it.
const KEPT_BYTES_MAX: usize = 6 << 20;

/// A place in the order of everything ever written to the journal.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Position {
    /// Bytes of batches before it, since the store was made.
    pub offset: u64,
    /// Sequence of the batch that begins there.
    pub sequence: u64,
    /// Records of that batch that are already dealt with.
    pub skip: u32,
}

impl Position {
    /// The place behind a batch that begins here.
    pub fn after_batch(self, length_bytes: u64) -> Position {
        Position { offset: self.offset + length_bytes, sequence: self.sequence + 1, skip: 0 }
    }
}

/// What [`Journal::open`] found.
pub enum Opened {
    /// A journal of this store.
    Journal(Journal),
    /// No such file.
    Missing,
    /// Not a journal, or a damaged header.
    Damaged(&'static str),
    /// The journal of another store.
    Foreign,
}

/// How a scan ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum End {
    /// Nothing behind the last batch.
    Clean,
    /// A batch that was never completed was cut off.
    Torn,
    /// A completed batch is damaged: acknowledged writes are lost.
    Rotten {
        /// The batch's sequence.
        sequence: u64,
    },
}

/// An open journal.
pub struct Journal {
    file: Arc<dyn File>,
    store: u64,
    ring_bytes: u64,
    buffer: Vec<u8>,
    /// Whether commits flush the device.
    sync: bool,
}

impl Journal {
    /// Makes a journal full of zeros, replacing what has the name only once it is complete.
    pub fn create(files: &dyn Files, path: &Path, store: u64, journal_bytes: u64) -> io::Result<()> {
        let ring_bytes = journal_bytes / BLOCK_BYTES as u64 * BLOCK_BYTES as u64;
        let next = layout::next_of(path);
        let file = files.open(&next, OpenMode::Truncate)?;
        let mut header = vec![0; BLOCK_BYTES];
        header[0..8].copy_from_slice(&MAGIC);
        header[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        header[12..20].copy_from_slice(&store.to_le_bytes());
        header[20..28].copy_from_slice(&ring_bytes.to_le_bytes());
        let crc = crc32c(&header[..HEADER_BYTES]);
        header[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&crc.to_le_bytes());
        file.write_at(&[io::IoSlice::new(&header)], 0)?;
        let zeros = vec![0; BUFFER_BYTES];
        let mut done = 0;
        while done < ring_bytes {
            let count = (ring_bytes - done).min(zeros.len() as u64);
            file.write_at(&[io::IoSlice::new(&zeros[..count as usize])], RING_OFFSET + done)?;
            done += count;
        }
        file.sync_data()?;
        files.rename(&next, path)?;
        files.sync_dir(path.parent().unwrap_or(Path::new("/")))
    }

    /// Opens the journal of a store.
    pub fn open(files: &dyn Files, path: &Path, store: u64, sync: bool) -> io::Result<Opened> {
        if !files.exists(path)? {
            return Ok(Opened::Missing);
        }
        let file = files.open(path, OpenMode::Direct)?;
        if sync {
            // A killed process may have left a batch that is visible and not durable. Were it replayed like that, a power
            // loss could keep its traces in the objects and lose the batch.
            file.sync_data()?;
        }
        let mut journal = Journal { file, store, ring_bytes: 0, buffer: Vec::new(), sync };
        let header = journal.read_file(0, BLOCK_BYTES)?;
        let intact = header.len() == BLOCK_BYTES
            && header[..8] == MAGIC
            && u32_at(&header, HEADER_BYTES) == Some(crc32c(&header[..HEADER_BYTES]));
        if !intact {
            return Ok(Opened::Damaged("its header is damaged"));
        }
        if u32_at(&header, 8) != Some(FORMAT) {
            return Ok(Opened::Damaged("its format is not known to this version"));
        }
        if u64_at(&header, 12) != Some(store) {
            return Ok(Opened::Foreign);
        }
        journal.ring_bytes = u64_at(&header, 20).unwrap_or(0);
        let sane = (JOURNAL_BYTES_MIN / 2..=JOURNAL_BYTES_MAX).contains(&journal.ring_bytes);
        if !sane || journal.file.len()? != RING_OFFSET + journal.ring_bytes {
            return Ok(Opened::Damaged("its length is wrong"));
        }
        Ok(Opened::Journal(journal))
    }

    /// Bytes for batches.
    pub fn ring_bytes(&self) -> u64 {
        self.ring_bytes
    }

    /// Writes one batch at a position and makes it durable; returns its length.
    pub fn append<'a>(
        &mut self,
        position: Position,
        records: impl Iterator<Item = &'a Record> + Clone,
    ) -> io::Result<u64> {
        let length = record::batch_bytes(records.clone().map(Record::encoded_bytes).sum());
        assert!(length <= self.ring_bytes, "the caller leaves room");
        let mut buffer = std::mem::take(&mut self.buffer);
        let result = self.append_from(&mut buffer, position, length as usize, records);
        if buffer.len() <= KEPT_BYTES_MAX {
            self.buffer = buffer;
        }
        result.map(|()| length)
    }

    fn append_from<'a>(
        &self,
        buffer: &mut Vec<u8>,
        position: Position,
        length: usize,
        records: impl Iterator<Item = &'a Record> + Clone,
    ) -> io::Result<()> {
        let batch = aligned(buffer, length);
        record::encode_batch(batch, self.store, position.sequence, records);
        let at = position.offset % self.ring_bytes;
        let first = (self.ring_bytes - at).min(length as u64) as usize;
        self.file.write_at(&[io::IoSlice::new(&batch[..first])], RING_OFFSET + at)?;
        if first < length {
            self.file.write_at(&[io::IoSlice::new(&batch[first..])], RING_OFFSET)?;
        }
        if self.sync && !planted::is(Bug::SkippedFlush) { self.file.sync_data() } else { Ok(()) }
    }

    /// Gives every whole batch from `tail` on to `each`, in order. Returns the position behind the last one.
    pub fn scan<E: From<io::Error>>(
        &self,
        tail: Position,
        mut each: impl FnMut(Position, Vec<Record>) -> Result<(), E>,
    ) -> Result<(Position, End), E> {
        let mut position = tail;
        let mut claimed = false;
        loop {
            let left = self.ring_bytes - (position.offset - tail.offset);
            if left < BLOCK_BYTES as u64 {
                break;
            }
            let block = self.read_ring(position.offset, BLOCK_BYTES)?;
            let Some(head) = decode_batch_head(&block, self.store).filter(|head| head.sequence == position.sequence)
            else {
                break;
            };
            claimed = true;
            if head.length_bytes > left {
                break;
            }
            let bytes = self.read_ring(position.offset, head.length_bytes as usize)?;
            let Some(records) = decode_batch(bytes, self.store) else { break };
            each(position, records)?;
            claimed = false;
            position = Position { skip: 0, ..position }.after_batch(head.length_bytes);
        }
        let end = self.judge_end(tail, position, claimed)?;
        Ok((position, end))
    }

    /// Tells a torn tail from a rotten batch: behind a torn tail there is nothing newer.
    fn judge_end(&self, tail: Position, end: Position, claimed: bool) -> io::Result<End> {
        let block_bytes = BLOCK_BYTES as u64;
        let limit = tail.offset + self.ring_bytes;
        let mut offset = end.offset + block_bytes;
        while self.sync && offset + block_bytes <= limit {
            let window = self.read_old_ring(offset, (limit - offset).min(BUFFER_BYTES as u64) as usize)?;
            for (index, block) in window.chunks_exact(BLOCK_BYTES).enumerate() {
                let at = offset + (index * BLOCK_BYTES) as u64;
                let newer = decode_batch_head(block, self.store).filter(|head| head.sequence > end.sequence);
                if let Some(head) = newer
                    && head.length_bytes <= limit - at
                    && decode_batch(self.read_old_ring(at, head.length_bytes as usize)?, self.store).is_some()
                {
                    return Ok(End::Rotten { sequence: end.sequence });
                }
            }
            offset += window.len() as u64;
        }
        Ok(if claimed { End::Torn } else { End::Clean })
    }

    /// Reads what is probably overwritten next; what the device does not give comes as zeros: no batch begins there.
    fn read_old_ring(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        match self.read_ring(offset, length) {
            Err(error) if is_unreadable(&error) && length > BLOCK_BYTES => {
                let mut bytes = Vec::with_capacity(length);
                for at in (0..length).step_by(BLOCK_BYTES) {
                    bytes.extend(self.read_old_ring(offset + at as u64, BLOCK_BYTES)?);
                }
                Ok(bytes)
            }
            Err(error) if is_unreadable(&error) => Ok(vec![0; length]),
            read => read,
        }
    }

    fn read_ring(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let at = offset % self.ring_bytes;
        let first = (self.ring_bytes - at).min(length as u64) as usize;
        let mut bytes = self.read_file(RING_OFFSET + at, first)?;
        if first < length {
            bytes.extend_from_slice(&self.read_file(RING_OFFSET, length - first)?);
        }
        Ok(bytes)
    }

    /// Reads through an aligned buffer; shorter only at the end of the file.
    fn read_file(&self, offset: u64, length: usize) -> io::Result<Vec<u8>> {
        let mut buffer = Vec::new();
        let window = aligned(&mut buffer, length);
        let count = self.file.read_at(window, offset)?;
        Ok(window[..count].to_vec())
    }
}

/// A window of `length` bytes into `buffer` whose address is a multiple of a block, as direct I/O demands.
fn aligned(buffer: &mut Vec<u8>, length: usize) -> &mut [u8] {
    if buffer.len() < length + BLOCK_BYTES {
        // Fresh zeroed memory costs less than zeroing the grown part of the old one.
        *buffer = vec![0; length.max(BUFFER_BYTES.min(length * 2)) + BLOCK_BYTES];
    }
    let skip = buffer.as_ptr().align_offset(BLOCK_BYTES);
    assert!(skip < BLOCK_BYTES, "byte pointers can always be aligned");
    &mut buffer[skip..skip + length]
}

#[cfg(test)]
mod tests {
    use super::super::record::Kind;
    use super::*;
    use crate::world::real_disk::RealFiles;
    use bytes::Bytes;
    use sheep_core::stamp::Version;

    fn record(oid: u64, length: usize) -> Record {
        Record {
            kind: Kind::Overwrite,
            disk: 0,
            source_disk: 0,
            oid,
            version: Version::default(),
            size_bytes: 0,
            extra: 0,
            offset: 0,
            data: Bytes::from(vec![oid as u8; length]),
        }
    }

    fn open(path: &Path) -> Journal {
        match Journal::open(&RealFiles, path, 9, true).unwrap() {
            Opened::Journal(journal) => journal,
            _ => panic!("a journal was made"),
        }
    }

    fn replayed(journal: &Journal, tail: Position) -> (Vec<u64>, Position, End) {
        let mut oids = Vec::new();
        let (end, how) = journal
            .scan::<io::Error>(tail, |_, records| {
                oids.extend(records.iter().map(|record| record.oid));
                Ok(())
            })
            .unwrap();
        (oids, end, how)
    }

    #[test]
    fn batches_go_round_the_ring_and_come_back_in_order() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        Journal::create(&RealFiles, &path, 9, JOURNAL_BYTES_MIN).unwrap();
        let mut journal = open(&path);
        let mut head = Position { offset: 0, sequence: 1, skip: 0 };
        let mut tail = head;
        for round in 0..40_u64 {
            let before = head;
            let batch = [record(round, 700_000), record(1000 + round, 10)];
            head = head.after_batch(journal.append(head, batch.iter()).unwrap());
            let (oids, end, how) = replayed(&journal, before);
            assert_eq!((oids, end, how), (vec![round, 1000 + round], head, End::Clean));
            if round % 5 == 4 {
                let (oids, end, _) = replayed(&journal, tail);
                assert_eq!(oids.len(), 10);
                assert_eq!(end, head);
                tail = head;
            }
        }
        assert!(matches!(Journal::open(&RealFiles, &path, 8, true).unwrap(), Opened::Foreign));
    }

    #[test]
    fn a_torn_tail_is_cut_and_a_rotten_batch_is_told_from_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("journal");
        Journal::create(&RealFiles, &path, 9, JOURNAL_BYTES_MIN).unwrap();
        let mut journal = open(&path);
        let start = Position { offset: 0, sequence: 1, skip: 0 };
        let second = start.after_batch(journal.append(start, [record(1, 9000)].iter()).unwrap());
        journal.append(second, [record(2, 9000)].iter()).unwrap();
        let damage = |offset: u64| {
            let file = RealFiles.open(&path, OpenMode::Write).unwrap();
            let mut byte = [0];
            file.read_at(&mut byte, offset).unwrap();
            file.write_at(&[io::IoSlice::new(&[!byte[0]])], offset).unwrap();
        };
        damage(RING_OFFSET + second.offset + 5000);
        assert_eq!(replayed(&journal, start), (vec![1], second, End::Torn));
        damage(RING_OFFSET + second.offset + 5000);
        damage(RING_OFFSET + 5000);
        assert_eq!(replayed(&journal, start), (vec![], start, End::Rotten { sequence: 1 }));
        damage(RING_OFFSET + 5000);
        damage(RING_OFFSET + 3);
        assert_eq!(replayed(&journal, start), (vec![], start, End::Rotten { sequence: 1 }));
    }
}
