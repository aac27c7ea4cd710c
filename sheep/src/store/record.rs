//! Journal records and batches, in memory and as bytes.
//!
//! A batch is what one device flush commits: a header, the records' heads, then their payloads packed, padded to whole
//! blocks, one checksum over everything. DISK.md has the byte tables.
//!
//! Always holds:
//! 1. A batch decodes either to exactly what was encoded or not at all; no byte of a damaged one is used.
//! 2. What a record does to the index depends on the record and the entry before it only ([`Record::outcome`]), so that
//!    replay reaches the same index as the running store did.

use bytes::Bytes;
use sheep_core::stamp::{Epoch, Stamp, Version};

use super::checksum::{BLOCK_BYTES, crc32c, round_up};
use super::entries::Packed;
use super::fields::{u32_at, u64_at};
use crate::world::planted::{self, Bug};

const MAGIC: [u8; 8] = *b"SHEEPJNL";
/// Bytes of a batch header.
pub const BATCH_HEAD_BYTES: usize = 64;
/// Bytes of a record's head.
pub const RECORD_HEAD_BYTES: usize = 64;

/// Position of the checksum in the batch header; it counts as zero while it is computed.
const CRC_AT: usize = 40;

/// What a record does.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// Lays the payload over an object.
    Overwrite,
    /// Makes an object of zeros, replacing what has its name, then lays the payload over it.
    Create,
    /// Makes an object as a copy of another, then lays the payload over it. `extra` is the source.
    Copy,
    /// Gives an object the content that recovery staged. `extra` tells the staged file.
    Install,
    /// Forgets an object.
    Remove,
    /// Sets an object's version.
    Confirm,
    /// Sets the epoch through which this store is clean; `extra` is the epoch.
    Clean,
}

impl Kind {
    const ALL: [Kind; 7] =
        [Kind::Overwrite, Kind::Create, Kind::Copy, Kind::Install, Kind::Remove, Kind::Confirm, Kind::Clean];

    fn code(self) -> u8 {
        match self {
            Kind::Overwrite => 1,
            Kind::Create => 2,
            Kind::Copy => 3,
            Kind::Install => 4,
            Kind::Remove => 5,
            Kind::Confirm => 6,
            Kind::Clean => 7,
        }
    }

    fn from_code(code: u8) -> Option<Kind> {
        Kind::ALL.into_iter().find(|kind| kind.code() == code)
    }

    /// Whether the object's file is replaced as a whole.
    pub fn replaces(self) -> bool {
        matches!(self, Kind::Create | Kind::Copy | Kind::Install)
    }

    /// Whether bytes of the object change.
    pub fn changes_content(self) -> bool {
        self.replaces() || self == Kind::Overwrite
    }
}

/// One change of the store.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// What it does.
    pub kind: Kind,
    /// Disk of the object.
    pub disk: u8,
    /// Disk of the source, for `Copy`.
    pub source_disk: u8,
    /// To which object; 0 for `Clean`.
    pub oid: u64,
    /// The object's version afterwards.
    pub version: Version,
    /// Size of the object, for the kinds that make one.
    pub size_bytes: u64,
    /// See [`Kind`].
    pub extra: u64,
    /// Where the payload goes.
    pub offset: u64,
    /// The payload.
    pub data: Bytes,
}

impl Record {
    /// Bytes it adds to a batch.
    pub fn encoded_bytes(&self) -> u64 {
        (RECORD_HEAD_BYTES + self.data.len()) as u64
    }

    /// The object's index entry after this record, given the one before it.
    pub fn outcome(&self, before: Option<Packed>) -> Option<Packed> {
        match self.kind {
            Kind::Create | Kind::Copy | Kind::Install => Some(Packed::new(self.version, self.size_bytes, self.disk)),
            Kind::Overwrite | Kind::Confirm => before.map(|entry| entry.with_version(self.version)),
            Kind::Remove => None,
            Kind::Clean => before,
        }
    }

    fn encode_head(&self, bytes: &mut [u8]) {
        assert_eq!(bytes.len(), RECORD_HEAD_BYTES, "the caller slices heads");
        bytes.fill(0);
        bytes[0] = self.kind.code();
        bytes[1] = self.disk;
        bytes[2] = self.source_disk;
        bytes[4..8].copy_from_slice(&(self.data.len() as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.oid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.version.epoch.0.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.version.stamp.generation.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.version.stamp.sequence.to_le_bytes());
        bytes[32..40].copy_from_slice(&self.size_bytes.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.extra.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.offset.to_le_bytes());
    }

    fn decode_head(bytes: &[u8]) -> Option<(Record, usize)> {
        let version = Version {
            epoch: Epoch(u32_at(bytes, 16)?),
            stamp: Stamp { generation: u32_at(bytes, 20)?, sequence: u64_at(bytes, 24)? },
        };
        let record = Record {
            kind: Kind::from_code(*bytes.first()?)?,
            disk: *bytes.get(1)?,
            source_disk: *bytes.get(2)?,
            oid: u64_at(bytes, 8)?,
            version,
            size_bytes: u64_at(bytes, 32)?,
            extra: u64_at(bytes, 40)?,
            offset: u64_at(bytes, 48)?,
            data: Bytes::new(),
        };
        Some((record, u32_at(bytes, 4)? as usize))
    }
}

/// Length on disk of a batch whose records take `records_bytes` in all.
pub fn batch_bytes(records_bytes: u64) -> u64 {
    round_up(BATCH_HEAD_BYTES as u64 + records_bytes)
}

/// Writes a batch into `out`, whose length is [`batch_bytes`] of the records.
pub fn encode_batch<'a>(out: &mut [u8], store: u64, sequence: u64, records: impl Iterator<Item = &'a Record> + Clone) {
    let count = records.clone().count();
    let mut payload_at = BATCH_HEAD_BYTES + count * RECORD_HEAD_BYTES;
    let length = out.len() as u64;
    out[..BATCH_HEAD_BYTES].fill(0);
    out[0..8].copy_from_slice(&MAGIC);
    out[8..16].copy_from_slice(&store.to_le_bytes());
    out[16..24].copy_from_slice(&sequence.to_le_bytes());
    out[24..32].copy_from_slice(&length.to_le_bytes());
    out[32..36].copy_from_slice(&(count as u32).to_le_bytes());
    for (index, record) in records.enumerate() {
        let head_at = BATCH_HEAD_BYTES + index * RECORD_HEAD_BYTES;
        record.encode_head(&mut out[head_at..head_at + RECORD_HEAD_BYTES]);
        out[payload_at..payload_at + record.data.len()].copy_from_slice(&record.data);
        payload_at += record.data.len();
    }
    out[payload_at..].fill(0);
    let crc = crc32c(out);
    out[CRC_AT..CRC_AT + 4].copy_from_slice(&crc.to_le_bytes());
}

/// What the first block of a batch claims; true only once [`decode_batch`] has checked all of it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct BatchHead {
    /// Its place in the order of batches.
    pub sequence: u64,
    /// Its length, whole blocks.
    pub length_bytes: u64,
}

/// Reads a batch header; `None` if this is not one of this store.
pub fn decode_batch_head(block: &[u8], store: u64) -> Option<BatchHead> {
    if block.get(..8)? != MAGIC || u64_at(block, 8)? != store {
        return None;
    }
    let head = BatchHead { sequence: u64_at(block, 16)?, length_bytes: u64_at(block, 24)? };
    let whole = head.length_bytes > 0 && head.length_bytes.is_multiple_of(BLOCK_BYTES as u64);
    whole.then_some(head)
}

/// Checks and decodes a whole batch; `None` if a byte of it is not as it was written.
pub fn decode_batch(mut bytes: Vec<u8>, store: u64) -> Option<Vec<Record>> {
    let head = decode_batch_head(&bytes, store)?;
    if head.length_bytes != bytes.len() as u64 {
        return None;
    }
    let expected = u32_at(&bytes, CRC_AT)?;
    bytes[CRC_AT..CRC_AT + 4].fill(0);
    if crc32c(&bytes) != expected && !planted::is(Bug::TornReplay) {
        return None;
    }
    let count = u32_at(&bytes, 32)? as usize;
    let bytes = Bytes::from(bytes);
    let mut payload_at = BATCH_HEAD_BYTES.checked_add(count.checked_mul(RECORD_HEAD_BYTES)?)?;
    if payload_at > bytes.len() {
        return None;
    }
    let mut records = Vec::with_capacity(count);
    for index in 0..count {
        let head_at = BATCH_HEAD_BYTES + index * RECORD_HEAD_BYTES;
        let (mut record, length) = Record::decode_head(&bytes[head_at..head_at + RECORD_HEAD_BYTES])?;
        let end = payload_at.checked_add(length).filter(|end| *end <= bytes.len())?;
        record.data = bytes.slice(payload_at..end);
        payload_at = end;
        records.push(record);
    }
    Some(records)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn records() -> Vec<Record> {
        Kind::ALL
            .into_iter()
            .enumerate()
            .map(|(index, kind)| Record {
                kind,
                disk: index as u8,
                source_disk: 2 * index as u8,
                oid: 0x807c_2b25_0000_0000 + index as u64,
                version: Version { epoch: Epoch(3), stamp: Stamp { generation: 2, sequence: 1 << 40 } },
                size_bytes: 4 << 20,
                extra: u64::MAX - 5,
                offset: 512 * index as u64,
                data: Bytes::from(vec![index as u8; index * 1000]),
            })
            .collect()
    }

    fn encoded() -> Vec<u8> {
        let records = records();
        let mut out = vec![0xff; batch_bytes(records.iter().map(Record::encoded_bytes).sum()) as usize];
        encode_batch(&mut out, 77, 5, records.iter());
        out
    }

    #[test]
    fn a_batch_comes_back_as_it_was() {
        let bytes = encoded();
        let head = decode_batch_head(&bytes, 77).unwrap();
        assert_eq!(head, BatchHead { sequence: 5, length_bytes: bytes.len() as u64 });
        assert_eq!(decode_batch(bytes.clone(), 77).unwrap(), records());
        assert_eq!(decode_batch(bytes, 78), None, "another store's batch");
    }

    #[test]
    fn no_damaged_or_shortened_batch_decodes() {
        let bytes = encoded();
        for bit in (0..bytes.len() * 8).step_by(7).chain(0..BATCH_HEAD_BYTES * 8) {
            let mut bad = bytes.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode_batch(bad, 77), None, "bit {bit}");
        }
        for length in (0..bytes.len()).step_by(509) {
            assert_eq!(decode_batch(bytes[..length].to_vec(), 77), None, "length {length}");
        }
        for sector in 0..bytes.len() / 512 {
            let mut torn = bytes.clone();
            torn[sector * 512..(sector + 1) * 512].fill(0);
            if torn != bytes {
                assert_eq!(decode_batch(torn, 77), None, "sector {sector}");
            }
        }
    }
}
