//! One object's file: a header block, a table of block checksums, the content.
//!
//! Always holds:
//! 1. Outside of [`ObjectFile::write`], every block agrees with its entry of the table, or is damaged. A reader that
//!    meets a difference while a write is going on looks again under the file's lock before it says so.
//! 2. Only the applier (and, before the object is visible, its maker) writes. All users of an object share one
//!    `ObjectFile`, so that a loaded piece of the table is never older than the file.
//! 3. Unwritten parts are holes, whose entries are zero.
//! 4. What a write changes of the table stays in memory until [`ObjectFile::write_table`]: before a checkpoint, before the
//!    file is copied or closed. A write to the file for the 4 bytes of each write took 4 to 8 % of all CPU time.
//!
//! A crash may leave the table as it was, and a power loss any 512-byte sector of what was written since the last sync old
//! or new, table and content independently. The journal holds every such write; its replay brings both into agreement again.

use std::io;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use sheep_core::stamp::Version;
use sheep_core::zeros::is_zero;

use super::checksum::{BLOCK_BYTES, block_tag, crc32c, round_up};
use crate::world::disk::{File, Files, OpenMode, is_unreadable};
use crate::world::planted::{self, Bug};

const MAGIC: [u8; 8] = *b"SHEEPOBJ";
const FORMAT: u32 = 1;
/// Header bytes before the header's own checksum; the rest of the block is zero.
const HEADER_BYTES: usize = 60;

/// Where the checksum table begins: after the header block.
const TABLE_OFFSET: u64 = BLOCK_BYTES as u64;

/// Largest object: 2 GiB, the most that a Sheepdog VDI may ask for.
pub const OBJECT_BYTES_MAX: u64 = 1 << 31;

/// Table entries per lazily loaded piece: one block of the table.
const PIECE_ENTRIES: usize = BLOCK_BYTES / 4;

/// Table entries that a disk loses together: those of one sector of 512 bytes.
const SECTOR_ENTRIES: usize = 512 / 4;

/// The tag of a damaged block of which nothing is known: also of one that was written in part since. A replay must not take
/// it for a torn one. One sound block in 2^32 has this tag.
const NO_CONTENT: u32 = u32::MAX;

/// Zeros of at least this many bytes are punched out instead of written: below, the call costs more than it saves.
const PUNCH_BYTES_MIN: usize = 64 << 10;

/// Where the parts of a file of a given size lie.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Geometry {
    /// Bytes of content, as clients see it.
    pub size_bytes: u64,
}

impl Geometry {
    /// Blocks of content, the last one padded.
    pub const fn block_count(self) -> u64 {
        self.size_bytes.div_ceil(BLOCK_BYTES as u64)
    }

    /// Where the content begins: after the padded table.
    pub const fn content_offset(self) -> u64 {
        TABLE_OFFSET + round_up(self.block_count() * 4)
    }

    /// Length of the file.
    pub const fn file_bytes(self) -> u64 {
        self.content_offset() + self.block_count() * BLOCK_BYTES as u64
    }
}

/// What a file says about itself when it was made. The index, not this, says which version it holds now.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// The object.
    pub oid: u64,
    /// Bytes of content.
    pub size_bytes: u64,
    /// Version at creation.
    pub version: Version,
}

impl Header {
    /// The header block.
    pub fn encode(&self) -> [u8; BLOCK_BYTES] {
        let mut block = [0; BLOCK_BYTES];
        let geometry = Geometry { size_bytes: self.size_bytes };
        block[0..8].copy_from_slice(&MAGIC);
        block[8..12].copy_from_slice(&FORMAT.to_le_bytes());
        block[12..20].copy_from_slice(&self.oid.to_le_bytes());
        block[20..28].copy_from_slice(&self.size_bytes.to_le_bytes());
        block[28..32].copy_from_slice(&self.version.epoch.0.to_le_bytes());
        block[32..36].copy_from_slice(&self.version.stamp.generation.to_le_bytes());
        block[36..44].copy_from_slice(&self.version.stamp.sequence.to_le_bytes());
        block[44..52].copy_from_slice(&TABLE_OFFSET.to_le_bytes());
        block[52..60].copy_from_slice(&geometry.content_offset().to_le_bytes());
        let crc = crc32c(&block[..HEADER_BYTES]);
        block[HEADER_BYTES..HEADER_BYTES + 4].copy_from_slice(&crc.to_le_bytes());
        block
    }

    /// Whether a header block is the intact one of this object and size.
    pub fn matches(block: &[u8], oid: u64, size_bytes: u64) -> bool {
        let Some(head) = block.first_chunk::<{ HEADER_BYTES + 4 }>() else {
            return false;
        };
        let crc = crc32c(&head[..HEADER_BYTES]).to_le_bytes();
        head[0..8] == MAGIC
            && head[8..12] == FORMAT.to_le_bytes()
            && head[HEADER_BYTES..] == crc
            && head[12..20] == oid.to_le_bytes()
            && head[20..28] == size_bytes.to_le_bytes()
    }
}

/// What is known about the blocks that a write covers in part.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Base {
    /// They must agree with the table; if one does not, it stays recognizably damaged after the write.
    Checked,
    /// Journal replay: a difference is what a power loss left and what the replay repairs. What the device does not give now
    /// was read in vain before the restart, too, and is damaged.
    Replayed,
}

/// What a block that the device does not give is taken for.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Unreadable {
    /// Perhaps it can be read later.
    IsAnError,
    /// It was tried often enough.
    IsDamaged,
}

/// Result of a verified read.
#[derive(Debug)]
pub enum ReadOutcome {
    /// The buffer is filled and every block agreed with the table.
    Verified,
    /// This block of the content did not.
    Mismatch(u64),
    /// Only for cached reads: the device would have to be asked.
    NotCached,
}

/// A loaded piece of the table.
struct Piece {
    tags: Box<[AtomicU32]>,
    /// Whether the file's piece is older.
    is_unwritten: AtomicBool,
}

/// An open object file.
pub struct ObjectFile {
    file: Arc<dyn File>,
    geometry: Geometry,
    pieces: Box<[OnceLock<Piece>]>,
    /// Odd while a write is going on; see invariant 1.
    writes: AtomicU64,
    lock: Mutex<()>,
}

impl ObjectFile {
    /// Makes a file full of zeros under `path`, replacing what was there.
    pub fn create(files: &dyn Files, path: &Path, header: &Header) -> io::Result<ObjectFile> {
        let file = files.open(path, OpenMode::Truncate)?;
        let geometry = Geometry { size_bytes: header.size_bytes };
        file.set_len(geometry.file_bytes())?;
        file.write_at(&[io::IoSlice::new(&header.encode())], 0)?;
        Ok(ObjectFile::new(file, geometry))
    }

    /// Opens a file; `None` if it is not the intact file of that object and size.
    pub fn open(files: &dyn Files, path: &Path, oid: u64, size_bytes: u64) -> io::Result<Option<ObjectFile>> {
        let file = match files.open(path, OpenMode::Write) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut block = [0; BLOCK_BYTES];
        let count = file.read_at(&mut block, 0)?;
        let geometry = Geometry { size_bytes };
        if !Header::matches(&block[..count], oid, size_bytes) || file.len()? != geometry.file_bytes() {
            return Ok(None);
        }
        Ok(Some(ObjectFile::new(file, geometry)))
    }

    /// Opens a file whose header the device does not give; `None` unless it has the length of one of that size.
    pub fn open_headless(files: &dyn Files, path: &Path, size_bytes: u64) -> io::Result<Option<ObjectFile>> {
        let file = files.open(path, OpenMode::Write)?;
        let geometry = Geometry { size_bytes };
        let is_whole = file.len()? == geometry.file_bytes();
        Ok(is_whole.then(|| ObjectFile::new(file, geometry)))
    }

    /// Opens a copy of another object's file (of the same size) and makes it this object's.
    pub fn adopt(files: &dyn Files, path: &Path, source: u64, header: &Header) -> io::Result<Option<ObjectFile>> {
        let Some(adopted) = ObjectFile::open(files, path, source, header.size_bytes)? else {
            return Ok(None);
        };
        adopted.file.write_at(&[io::IoSlice::new(&header.encode())], 0)?;
        Ok(Some(adopted))
    }

    fn new(file: Arc<dyn File>, geometry: Geometry) -> ObjectFile {
        assert!(geometry.size_bytes > 0 && geometry.size_bytes <= OBJECT_BYTES_MAX, "sizes are checked by the caller");
        let piece_count = (geometry.block_count() as usize).div_ceil(PIECE_ENTRIES);
        ObjectFile {
            file,
            geometry,
            pieces: (0..piece_count).map(|_| OnceLock::new()).collect(),
            writes: AtomicU64::new(0),
            lock: Mutex::new(()),
        }
    }

    /// Where its parts lie.
    pub fn geometry(&self) -> Geometry {
        self.geometry
    }

    /// Bytes of memory that the table takes when it is all loaded.
    pub fn table_bytes_max(&self) -> usize {
        self.pieces.len() * BLOCK_BYTES
    }

    /// Makes everything written durable.
    pub fn sync(&self) -> io::Result<()> {
        self.write_table()?;
        self.file.sync_data()
    }

    /// Brings what was changed of the table to the file. What is not there stays to be brought after an error.
    pub fn write_table(&self) -> io::Result<()> {
        if !self.is_table_unwritten() {
            return Ok(());
        }
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.write_table_locked()
    }

    fn write_table_locked(&self) -> io::Result<()> {
        for (index, piece) in self.pieces.iter().enumerate() {
            let Some(piece) = piece.get().filter(|piece| piece.is_unwritten.load(Ordering::Relaxed)) else { continue };
            let bytes: Vec<u8> = piece.tags.iter().flat_map(|tag| tag.load(Ordering::Relaxed).to_le_bytes()).collect();
            self.file.write_at(&[io::IoSlice::new(&bytes)], TABLE_OFFSET + (index * BLOCK_BYTES) as u64)?;
            piece.is_unwritten.store(false, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Whether the file's table is older than what is known here: closed now, the file would be a damaged one.
    pub fn is_table_unwritten(&self) -> bool {
        self.pieces.iter().filter_map(OnceLock::get).any(|piece| piece.is_unwritten.load(Ordering::Relaxed))
    }

    /// Bytes of disk space taken.
    pub fn allocated_bytes(&self) -> io::Result<u64> {
        self.file.allocated_bytes()
    }

    /// Fills `buffer` (whole blocks) from `first_block` out of the page cache only.
    pub fn read_cached(&self, first_block: u64, buffer: &mut [u8]) -> io::Result<ReadOutcome> {
        let last_block = first_block + (buffer.len() / BLOCK_BYTES) as u64 - 1;
        for piece in first_block as usize / PIECE_ENTRIES..=last_block as usize / PIECE_ENTRIES {
            if self.pieces[piece].get().is_none() {
                return Ok(ReadOutcome::NotCached);
            }
        }
        let offset = self.geometry.content_offset() + first_block * BLOCK_BYTES as u64;
        match self.file.read_cached(buffer, offset)? {
            Some(count) if count == buffer.len() => Ok(self.verify(first_block, buffer)),
            _ => Ok(ReadOutcome::NotCached),
        }
    }

    /// Fills `buffer` (whole blocks) from `first_block`. May block. A mismatch is final: no write was in its way.
    pub fn read(&self, first_block: u64, buffer: &mut [u8]) -> io::Result<ReadOutcome> {
        self.load_tags(first_block, (buffer.len() / BLOCK_BYTES) as u64)?;
        let writes = self.writes.load(Ordering::Acquire);
        let outcome = self.read_once(first_block, buffer)?;
        if matches!(outcome, ReadOutcome::Verified) {
            return Ok(outcome);
        }
        if writes & 1 == 0 && self.writes.load(Ordering::Acquire) == writes {
            return Ok(outcome);
        }
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.read_once(first_block, buffer)
    }

    fn read_once(&self, first_block: u64, buffer: &mut [u8]) -> io::Result<ReadOutcome> {
        let offset = self.geometry.content_offset() + first_block * BLOCK_BYTES as u64;
        let count = self.file.read_at(buffer, offset)?;
        if count < buffer.len() {
            return Ok(ReadOutcome::Mismatch(first_block + (count / BLOCK_BYTES) as u64));
        }
        Ok(self.verify(first_block, buffer))
    }

    /// Fills `buffer` (whole blocks) from `first_block` as far as it is not damaged, and gives the damaged blocks, each with the
    /// tag that its content should have. A block that cannot be read is an error, or damaged too. May block.
    pub fn salvage(&self, first_block: u64, buffer: &mut [u8], unreadable: Unreadable) -> io::Result<Vec<(u64, u32)>> {
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let mut damaged = Vec::new();
        for (index, block) in buffer.chunks_exact_mut(BLOCK_BYTES).enumerate() {
            let number = first_block + index as u64;
            let piece = self.load_piece(number as usize / PIECE_ENTRIES)?;
            let place = number as usize % PIECE_ENTRIES;
            let tag = piece.tags[place].load(Ordering::Relaxed);
            let offset = self.geometry.content_offset() + number * BLOCK_BYTES as u64;
            let count = match self.file.read_at(block, offset) {
                Err(error) if unreadable == Unreadable::IsAnError => return Err(error),
                read => read.unwrap_or(0),
            };
            if count < BLOCK_BYTES || block_tag(block) != tag {
                block.fill(0);
                // A tag of zeros is what a sector of the table that was lost reads as, too: alone it proves nothing.
                let start = place / SECTOR_ENTRIES * SECTOR_ENTRIES;
                let is_lost =
                    || piece.tags[start..][..SECTOR_ENTRIES].iter().all(|tag| tag.load(Ordering::Relaxed) == 0);
                damaged.push((number, if tag == 0 && is_lost() { NO_CONTENT } else { tag }));
            }
        }
        Ok(damaged)
    }

    /// Makes a block of a file that is being made one that is known to be damaged: its tag is that of a content that nobody
    /// has.
    pub fn set_damaged(&self, block: u64, tag: u32) -> io::Result<()> {
        assert!(block < self.geometry.block_count(), "blocks are checked by the caller");
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.load_piece(block as usize / PIECE_ENTRIES)?;
        // The block is a hole: the tag of zeros would make it a good one.
        self.set_tags(block, &[if tag == 0 { NO_CONTENT } else { tag }])
    }

    /// Brings the checksums of blocks into memory. May block.
    pub fn load_tags(&self, first_block: u64, count: u64) -> io::Result<()> {
        let last_block = first_block + count - 1;
        for piece in first_block as usize / PIECE_ENTRIES..=last_block as usize / PIECE_ENTRIES {
            if self.pieces[piece].get().is_none() {
                let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
                self.load_piece(piece)?;
            }
        }
        Ok(())
    }

    /// Whether whole blocks from elsewhere are what this file has from `first_block` on. Not if their checksums are not in memory.
    pub fn is_sound(&self, first_block: u64, blocks: &[u8]) -> bool {
        matches!(self.verify(first_block, blocks), ReadOutcome::Verified)
    }

    fn verify(&self, first_block: u64, buffer: &[u8]) -> ReadOutcome {
        for (index, block) in buffer.chunks_exact(BLOCK_BYTES).enumerate() {
            let block_index = first_block + index as u64;
            if self.entry(block_index) != Some(block_tag(block)) && !planted::is(Bug::IgnoredChecksum) {
                return ReadOutcome::Mismatch(block_index);
            }
        }
        ReadOutcome::Verified
    }

    fn entry(&self, block: u64) -> Option<u32> {
        let piece = self.pieces[block as usize / PIECE_ENTRIES].get()?;
        Some(piece.tags[block as usize % PIECE_ENTRIES].load(Ordering::Relaxed))
    }

    /// Loads a piece of the table; the caller holds the lock.
    fn load_piece(&self, index: usize) -> io::Result<&Piece> {
        if let Some(piece) = self.pieces[index].get() {
            return Ok(piece);
        }
        let mut bytes = [0; BLOCK_BYTES];
        let count = self.file.read_at(&mut bytes, TABLE_OFFSET + (index * BLOCK_BYTES) as u64)?;
        if count < bytes.len() {
            // A file cut short: its header was checked, so this is damage. Entries that match nothing say so.
            bytes[count..].fill(0xa5);
        }
        let tags = bytes
            .chunks_exact(4)
            .map(|entry| AtomicU32::new(u32::from_le_bytes([entry[0], entry[1], entry[2], entry[3]])))
            .collect();
        Ok(self.pieces[index].get_or_init(|| Piece { tags, is_unwritten: AtomicBool::new(false) }))
    }

    /// As `load_piece`, but entries that the device does not give are those of damaged blocks.
    fn load_or_lose_piece(&self, index: usize) -> io::Result<()> {
        match self.load_piece(index) {
            Err(error) if is_unreadable(&error) => {
                let tags = (0..PIECE_ENTRIES).map(|_| AtomicU32::new(NO_CONTENT)).collect();
                self.pieces[index].get_or_init(|| Piece { tags, is_unwritten: AtomicBool::new(true) });
                Ok(())
            }
            loaded => loaded.map(drop),
        }
    }

    /// Writes `data` at `offset` of the content and the checksums with it. `Ok(false)`: a block that was covered only
    /// in part was damaged, and still is.
    pub fn write(&self, offset: u64, data: &[u8], base: Base) -> io::Result<bool> {
        assert!(offset + data.len() as u64 <= self.geometry.size_bytes, "ranges are checked when a write is submitted");
        if data.is_empty() {
            return Ok(true);
        }
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        self.writes.fetch_add(1, Ordering::AcqRel);
        let result = self.write_locked(offset, data, base);
        self.writes.fetch_add(1, Ordering::AcqRel);
        result
    }

    /// As `write`, for a file that is being made: whole blocks of zeros over unwritten ones stay holes.
    pub fn write_sparse(&self, offset: u64, data: &[u8]) -> io::Result<()> {
        assert!(offset + data.len() as u64 <= self.geometry.size_bytes, "ranges are checked by the caller");
        let mut at = 0;
        while at < data.len() {
            let block_end = |at: usize| {
                let inside = (offset + at as u64) % BLOCK_BYTES as u64;
                (at + BLOCK_BYTES - inside as usize).min(data.len())
            };
            let mut end = block_end(at);
            if self.may_stay_hole(offset + at as u64, &data[at..end])? {
                at = end;
                continue;
            }
            while end < data.len() && !self.may_stay_hole(offset + end as u64, &data[end..block_end(end)])? {
                end = block_end(end);
            }
            self.write(offset + at as u64, &data[at..end], Base::Checked)?;
            at = end;
        }
        Ok(())
    }

    fn may_stay_hole(&self, offset: u64, part: &[u8]) -> io::Result<bool> {
        if part.len() < BLOCK_BYTES || !is_zero(part) {
            return Ok(false);
        }
        let block = (offset / BLOCK_BYTES as u64) as usize;
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let piece = self.load_piece(block / PIECE_ENTRIES)?;
        Ok(piece.tags[block % PIECE_ENTRIES].load(Ordering::Relaxed) == 0)
    }

    /// Replaces the header of a file that is being made, or has lost it.
    pub fn set_header(&self, header: &Header) -> io::Result<()> {
        assert_eq!(header.size_bytes, self.geometry.size_bytes, "a header describes its file");
        self.file.write_at(&[io::IoSlice::new(&header.encode())], 0)
    }

    fn write_locked(&self, offset: u64, data: &[u8], base: Base) -> io::Result<bool> {
        let block_bytes = BLOCK_BYTES as u64;
        let first = offset / block_bytes;
        let skip = (offset % block_bytes) as usize;
        if base == Base::Replayed {
            let last = (offset + data.len() as u64 - 1) / block_bytes;
            for piece in first as usize / PIECE_ENTRIES..=last as usize / PIECE_ENTRIES {
                self.load_or_lose_piece(piece)?;
            }
        }
        let mut sound = true;
        let mut tags = Vec::with_capacity(data.len() / BLOCK_BYTES + 2);
        let mut head = None;
        let mut rest = data;
        if skip > 0 || data.len() < BLOCK_BYTES {
            let (part, after) = data.split_at(data.len().min(BLOCK_BYTES - skip));
            head = Some(self.merge(first, skip, part, base, &mut tags, &mut sound)?);
            rest = after;
        }
        let (whole, part) = rest.split_at(rest.len() / BLOCK_BYTES * BLOCK_BYTES);
        let whole_first = first + u64::from(head.is_some());
        tags.extend(whole.chunks_exact(BLOCK_BYTES).map(block_tag));
        let mut tail = None;
        if !part.is_empty() {
            let last = whole_first + (whole.len() / BLOCK_BYTES) as u64;
            tail = Some(self.merge(last, 0, part, base, &mut tags, &mut sound)?);
        }
        if !sound {
            // Before the content: a replay that finds it changed knows from this that it was damaged before.
            self.set_tags(first, &tags)?;
            self.write_table_locked()?;
            self.file.sync_data()?;
        }
        let content = self.geometry.content_offset() + first * block_bytes;
        if whole.len() >= PUNCH_BYTES_MIN && is_zero(whole) {
            if let Some(head) = &head {
                self.file.write_at(&[io::IoSlice::new(&head[..])], content)?;
            }
            let whole_offset = self.geometry.content_offset() + whole_first * block_bytes;
            self.file.punch_hole(whole_offset, whole.len() as u64)?;
            if let Some(tail) = &tail {
                self.file.write_at(&[io::IoSlice::new(&tail[..])], whole_offset + whole.len() as u64)?;
            }
        } else {
            let parts = [
                io::IoSlice::new(head.as_ref().map_or(&[], |block| &block[..])),
                io::IoSlice::new(whole),
                io::IoSlice::new(tail.as_ref().map_or(&[], |block| &block[..])),
            ];
            self.file.write_at(&parts, content)?;
        }
        self.set_tags(first, &tags)?;
        Ok(sound)
    }

    /// A block's content with `part` laid over it at `skip`; its new tag goes to `tags`.
    fn merge(
        &self,
        block: u64,
        skip: usize,
        part: &[u8],
        base: Base,
        tags: &mut Vec<u32>,
        sound: &mut bool,
    ) -> io::Result<Box<[u8; BLOCK_BYTES]>> {
        let mut bytes = Box::new([0; BLOCK_BYTES]);
        let read = self.file.read_at(&mut bytes[..], self.geometry.content_offset() + block * BLOCK_BYTES as u64);
        let piece = self.load_piece(block as usize / PIECE_ENTRIES)?;
        let expected = piece.tags[block as usize % PIECE_ENTRIES].load(Ordering::Relaxed);
        let intact = match read {
            Ok(_) => expected == block_tag(&bytes[..]) || (base == Base::Replayed && expected != NO_CONTENT),
            Err(error) if base == Base::Replayed && is_unreadable(&error) => {
                bytes.fill(0);
                false
            }
            Err(error) => return Err(error),
        };
        bytes[skip..skip + part.len()].copy_from_slice(part);
        // A damaged block must not be blessed with a fresh checksum.
        tags.push(if intact { block_tag(&bytes[..]) } else { NO_CONTENT });
        *sound &= intact;
        Ok(bytes)
    }

    /// Notes the tags of what was written; the caller holds the lock.
    fn set_tags(&self, first: u64, tags: &[u32]) -> io::Result<()> {
        let (mut block, mut rest) = (first as usize, tags);
        while !rest.is_empty() {
            let piece = self.load_piece(block / PIECE_ENTRIES)?;
            let start = block % PIECE_ENTRIES;
            let (now, later) = rest.split_at(rest.len().min(PIECE_ENTRIES - start));
            for (entry, tag) in piece.tags[start..].iter().zip(now) {
                entry.store(*tag, Ordering::Relaxed);
            }
            piece.is_unwritten.store(true, Ordering::Relaxed);
            block += now.len();
            rest = later;
        }
        Ok(())
    }

    /// Runs of blocks that are not zeros, as byte ranges of the content.
    pub fn extents(&self) -> io::Result<Vec<std::ops::Range<u64>>> {
        let _guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        let mut extents: Vec<std::ops::Range<u64>> = Vec::new();
        let mut content = [0; BLOCK_BYTES];
        for block in 0..self.geometry.block_count() {
            let piece = self.load_piece(block as usize / PIECE_ENTRIES)?;
            if piece.tags[block as usize % PIECE_ENTRIES].load(Ordering::Relaxed) == 0 {
                // One block in 2^32 that is not zeros has their checksum: what is called zeros is never read again.
                let at = self.geometry.content_offset() + block * BLOCK_BYTES as u64;
                let count = self.file.read_at(&mut content, at)?;
                if is_zero(&content[..count]) {
                    continue;
                }
            }
            let start = block * BLOCK_BYTES as u64;
            let end = (start + BLOCK_BYTES as u64).min(self.geometry.size_bytes);
            match extents.last_mut() {
                Some(last) if last.end == start => last.end = end,
                _ => extents.push(start..end),
            }
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::real_disk::RealFiles;

    fn header(size_bytes: u64) -> Header {
        Header { oid: 7, size_bytes, version: Version::default() }
    }

    #[test]
    fn odd_ranges_read_back_and_verify() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("object");
        let size = 300_001_u64;
        let object = ObjectFile::create(&RealFiles, &path, &header(size)).unwrap();
        let mut model = vec![0_u8; size as usize];
        let ranges =
            [(0, 1), (4095, 2), (5, 8192), (300_000, 1), (12_288, 4096), (100_001, 150_000), (0, 300_001), (77, 0)];
        for (index, (offset, length)) in ranges.into_iter().enumerate() {
            let data: Vec<u8> = (0..length).map(|byte| (byte as u8).wrapping_mul(31) ^ index as u8).collect();
            assert!(object.write(offset as u64, &data, Base::Checked).unwrap());
            model[offset..offset + length].copy_from_slice(&data);
            object.write_table().unwrap();
            for object in [&object, &ObjectFile::open(&RealFiles, &path, 7, size).unwrap().unwrap()] {
                let mut bytes = vec![0; round_up(size) as usize];
                assert!(matches!(object.read(0, &mut bytes).unwrap(), ReadOutcome::Verified));
                assert_eq!(bytes[..size as usize], model[..]);
            }
        }
        let zeros = vec![0; 200_000];
        assert!(object.write(50_000, &zeros, Base::Checked).unwrap());
        let holes = object.extents().unwrap();
        assert_eq!(holes, vec![0..53_248, 249_856..300_001]);
    }

    #[test]
    fn a_damaged_block_stays_damaged_when_written_in_part_and_heals_when_written_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("object");
        let object = ObjectFile::create(&RealFiles, &path, &header(1 << 20)).unwrap();
        object.write(8192, &[1; 4096], Base::Checked).unwrap();
        let offset = object.geometry().content_offset() + 8192 + 100;
        object.file.write_at(&[io::IoSlice::new(&[9])], offset).unwrap();
        let mut block = vec![0; BLOCK_BYTES];
        assert!(matches!(object.read(2, &mut block).unwrap(), ReadOutcome::Mismatch(2)));
        assert!(!object.write(8192, &[5; 10], Base::Checked).unwrap());
        assert!(matches!(object.read(2, &mut block).unwrap(), ReadOutcome::Mismatch(2)));
        assert!(object.write(8192, &[5; 4096], Base::Checked).unwrap());
        assert!(matches!(object.read(2, &mut block).unwrap(), ReadOutcome::Verified));
    }

    #[test]
    fn a_lost_sector_of_the_table_makes_no_zeros_of_the_content() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("object");
        let object = ObjectFile::create(&RealFiles, &path, &header(1 << 20)).unwrap();
        object.write(8192, &[1; 4096], Base::Checked).unwrap();
        object.write_table().unwrap();
        object.file.write_at(&[io::IoSlice::new(&[0; 512])], TABLE_OFFSET).unwrap();
        let object = ObjectFile::open(&RealFiles, &path, 7, 1 << 20).unwrap().unwrap();
        let mut blocks = vec![0; 4 * BLOCK_BYTES];
        let damaged = object.salvage(0, &mut blocks, Unreadable::IsAnError).unwrap();
        assert_eq!(damaged, [(2, NO_CONTENT)], "holes are good, what was written is not");
        for tag in [0, damaged[0].1] {
            let path = dir.path().join("other");
            let other = ObjectFile::create(&RealFiles, &path, &header(1 << 20)).unwrap();
            other.set_damaged(2, tag).unwrap();
            let mut block = vec![0; BLOCK_BYTES];
            assert!(matches!(other.read(2, &mut block).unwrap(), ReadOutcome::Mismatch(2)));
        }
    }

    #[test]
    fn rotten_zeros_are_known_to_be_zeros_beside_other_tags() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("object");
        let object = ObjectFile::create(&RealFiles, &path, &header(4 << 20)).unwrap();
        object.write(8192, &[1; 4096], Base::Checked).unwrap();
        for block in [5, 500] {
            let at = object.geometry.content_offset() + block * BLOCK_BYTES as u64;
            object.file.write_at(&[io::IoSlice::new(&[0, 4, 0])], at).unwrap();
        }
        let mut blocks = vec![0; 512 * BLOCK_BYTES];
        let damaged = object.salvage(0, &mut blocks, Unreadable::IsAnError).unwrap();
        assert_eq!(damaged, [(5, 0), (500, NO_CONTENT)]);
    }

    #[test]
    fn the_table_reaches_the_file_when_it_is_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("object");
        // Two pieces of the table.
        let size = (PIECE_ENTRIES * BLOCK_BYTES + (1 << 20)) as u64;
        let object = ObjectFile::create(&RealFiles, &path, &header(size)).unwrap();
        let border = (PIECE_ENTRIES * BLOCK_BYTES) as u64;
        object.write(border - 4096, &[3; 8192], Base::Checked).unwrap();
        assert!(object.is_table_unwritten());
        let first = PIECE_ENTRIES as u64 - 1;
        let damaged = |object: &ObjectFile| {
            let mut blocks = vec![0; 2 * BLOCK_BYTES];
            object.salvage(first, &mut blocks, Unreadable::IsAnError).unwrap().len()
        };
        let reopened = || ObjectFile::open(&RealFiles, &path, 7, size).unwrap().unwrap();
        assert_eq!((damaged(&object), damaged(&reopened())), (0, 2), "what a crash leaves, and the journal repairs");
        object.write_table().unwrap();
        assert!(!object.is_table_unwritten());
        assert_eq!(damaged(&reopened()), 0);
    }

    #[test]
    fn a_foreign_or_damaged_header_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("object");
        ObjectFile::create(&RealFiles, &path, &header(8192)).unwrap();
        assert!(ObjectFile::open(&RealFiles, &path, 7, 8192).unwrap().is_some());
        assert!(ObjectFile::open(&RealFiles, &path, 8, 8192).unwrap().is_none());
        assert!(ObjectFile::open(&RealFiles, &path, 7, 4096).unwrap().is_none());
        assert!(ObjectFile::open(&RealFiles, &dir.path().join("none"), 7, 8192).unwrap().is_none());
        let good = header(8192).encode();
        for bit in 0..(HEADER_BYTES + 4) * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(!Header::matches(&bad, 7, 8192), "bit {bit}");
        }
    }
}
