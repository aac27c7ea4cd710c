//! What nodes say to each other on the data path: a fixed header of 96 bytes, then the payload.
//!
//! ```text
//! request                                      answer
//!  0  u32 magic "SHPQ"                          0  u32 magic "SHPR"
//!  4  u32 payload bytes that follow             4  u32 payload bytes that follow
//!  8  u64 request id, echoed                    8  u64 request id
//! 16  u8 kind, u8 flags, u16 zero              16  u8 verdict, u8 nearly full, u8 met nobody, u8 zero
//! 20  u32 epoch of the sender                  20  u32 epoch of the answering node
//! 24  u64 object id                            24  u64 object size (bytes), or a count
//! 32  u64 source object id (copy on write)     32  u32 version: epoch
//! 40  u32 stamp: generation                    36  u32 version: stamp generation
//! 44  u32 length wanted (bytes)                40  u64 version: stamp sequence
//! 48  u64 stamp: sequence                      48  u32 clean-through epoch
//! 56  u64 settled sequence                     52  u32 1 + met-before epoch, 0 if unknown; 40 bytes zero
//! 64  u64 offset in the object (bytes)
//! 72  u64 object size (bytes)
//! 80  u64 sending node
//! 88  8 bytes zero
//! ```
//!
//! All integers are little-endian. A reader checks the magic, the kind and the payload length before it believes or
//! allocates anything; a frame that fails the check ends the connection.

use alloc::vec::Vec;

use qemu_proto::oid::Oid;

use crate::member::NodeId;
use crate::stamp::{Epoch, Stamp, Version};

/// Bytes of every header.
pub const HEADER_BYTES: usize = 96;
/// No payload is longer: the largest single client write (one whole object of 4 MiB, QEMU never sends more than one
/// object) with room for the larger object sizes; a larger write is split by the gateway.
pub const PAYLOAD_BYTES_MAX: usize = 32 << 20;

const REQUEST_MAGIC: u32 = u32::from_le_bytes(*b"SHPQ");
const ANSWER_MAGIC: u32 = u32::from_le_bytes(*b"SHPR");

/// What is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum PeerKind {
    /// Who I am; the first message of every connection. Payload: protocol version u32, cluster id u64.
    Hello = 1,
    /// Write into an object, perhaps creating it.
    Write = 2,
    /// Read from an object.
    Read = 3,
    /// Remove an object.
    Remove = 4,
    /// Make everything written so far durable.
    Flush = 5,
    /// Every write of this VDI's lease up to the settled sequence is on all its holders.
    Settled = 6,
    /// Objects after `oid` that the sending node must hold in this epoch; payload: `ListEntry` records.
    List = 7,
    /// The version of one object.
    Query = 8,
    /// Read for recovery: also from a copy that is not confirmed in this epoch.
    Fetch = 9,
    /// Drain and give back the writer lease of the VDI in `oid`.
    YieldLease = 10,
    /// The hash of an object's content (BLAKE3, 32 bytes).
    Hash = 11,
    /// Fetch your copy anew from the others.
    Repair = 12,
    /// Space figures and recovery progress of the node; payload of the answer is text.
    Report = 13,
    /// Objects that a lost writer left half-written, as far as the asked node saw; payload: object ids of 8 bytes.
    Suspects = 14,
    /// The parts of an object that are not zeros; payload of the answer: start and end, u64 each.
    Extents = 15,
    /// What became of the write with this stamp; the answer's verdict: `Ok` applied, `Missing` not applied, `Invalid` writing it
    /// again is harmless, `Busy` unknown.
    Fate = 16,
}

impl PeerKind {
    fn from_code(code: u8) -> Option<PeerKind> {
        use PeerKind as K;
        [
            K::Hello,
            K::Write,
            K::Read,
            K::Remove,
            K::Flush,
            K::Settled,
            K::List,
            K::Query,
            K::Fetch,
            K::YieldLease,
            K::Hash,
            K::Repair,
            K::Report,
            K::Suspects,
            K::Extents,
            K::Fate,
        ]
        .into_iter()
        .find(|kind| *kind as u8 == code)
    }
}

/// Request flag: the object is created (with zeros, or as a copy of the source object).
pub const FLAG_CREATE: u8 = 1;
/// Request flag: `source` names the object to copy.
pub const FLAG_COPY: u8 = 2;
/// Request flag: answer only when durable.
pub const FLAG_DURABLE: u8 = 4;
/// Request flag: wait until the copy is current instead of answering `NotCurrent`.
pub const FLAG_WAIT: u8 = 8;
/// Request flag of `Fetch`: where the copy is damaged, answer `Corrupt` with a [`Salvaged`] as payload, instead of nothing.
pub const FLAG_SALVAGE: u8 = 16;
/// Request flag of writes: the generation before this one was passed on in order, so all its writes are on all their holders.
pub const FLAG_DRAINED: u8 = 32;
/// Request flag of reads of a map: the reader takes the VDI for one that exists; if it was deleted, answer `Outdated`.
pub const FLAG_LIVE: u8 = 64;
/// Request flag of reads of a map: the reader takes the VDI for a working one; if it is a snapshot, answer `Outdated`.
pub const FLAG_WORKING: u8 = 128;
/// Request flag of writes: it was sent before, in an earlier epoch under a lower stamp. Who does not know the flag may be unable
/// to say what became of that one; see `write_fate`. The same bit as `FLAG_LIVE`, which is of reads.
pub const FLAG_AGAIN: u8 = 64;

/// Request flag of reads of no bytes, with [`FLAG_WAIT`]: only that the copy is current is asked for, so that writes under way are
/// nothing to wait for. Who does not know the flag waits for them. The same bit as `FLAG_DRAINED`, which is of writes.
pub const FLAG_BRING: u8 = 32;

/// The generation in the stamp of a read whose sender does not hold the VDI's lease.
pub const NO_LEASE: u32 = u32::MAX;

/// One request's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerRequest {
    /// Echoed in the answer.
    pub id: u64,
    /// What is asked.
    pub kind: PeerKind,
    /// See the `FLAG_` constants.
    pub flags: u8,
    /// The sender's epoch.
    pub epoch: Epoch,
    /// The object.
    pub oid: Oid,
    /// What to copy.
    pub source: Oid,
    /// Which write. Of a read, the generation of the lease that the sender holds, or [`NO_LEASE`]; an earlier version says 0.
    pub stamp: Stamp,
    /// Bytes wanted.
    pub length: u32,
    /// See `Settled`.
    pub settled: u64,
    /// Bytes into the object.
    pub offset: u64,
    /// Bytes of the object, for creation.
    pub object_bytes: u64,
    /// Who asks.
    pub sender: NodeId,
}

/// How a request went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Verdict {
    /// Done.
    Ok = 0,
    /// The sender's epoch is behind: learn the newer one and send again.
    OldEpoch = 1,
    /// A newer lease generation has written: the sender is no longer the writer.
    Fenced = 2,
    /// No such object.
    Missing = 3,
    /// The copy here is not confirmed as the newest: ask another holder.
    NotCurrent = 4,
    /// The copy here is damaged: ask another holder.
    Corrupt = 5,
    /// The disk is full.
    NoSpace = 6,
    /// Beyond the object's end, or a request that makes no sense.
    Invalid = 7,
    /// The device failed.
    Failed = 8,
    /// Not of this cluster, or another version of this protocol.
    Stranger = 9,
    /// Cannot be done now: ask again.
    Busy = 10,
    /// The write is kept in memory until this node's copy, which is being brought up to date, can take it. Nothing this
    /// node says counts for the object before then, so the write is as safe as on the other holders.
    Deferred = 11,
    /// The order has gone on since what the reader knows of the VDI: learn that, and look again.
    Outdated = 12,
}

impl Verdict {
    fn from_code(code: u8) -> Option<Verdict> {
        use Verdict as V;
        [
            V::Ok,
            V::OldEpoch,
            V::Fenced,
            V::Missing,
            V::NotCurrent,
            V::Corrupt,
            V::NoSpace,
            V::Invalid,
            V::Failed,
            V::Stranger,
            V::Busy,
            V::Deferred,
            V::Outdated,
        ]
        .into_iter()
        .find(|verdict| *verdict as u8 == code)
    }
}

/// One answer's header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct PeerAnswer {
    /// Of the request.
    pub id: u64,
    /// How it went.
    pub verdict: Verdict,
    /// The answering node's epoch.
    pub epoch: Epoch,
    /// Bytes of the object.
    pub object_bytes: u64,
    /// The version of the copy there.
    pub version: Version,
    /// The last epoch for which the answering node had recovered everything.
    pub clean_through: Epoch,
    /// Whether the answering node is about to run out of space.
    pub nearly_full: bool,
    /// In the answer to `Query`: see `history::Answer`. Who does not know the field says no.
    pub met_nobody: bool,
    /// In the answer to `Query`: see `history::Answer`.
    pub met_before: Option<Epoch>,
}

/// A piece of an object whose copy is damaged in places.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Salvaged {
    /// The damaged blocks of the object, of 4 KiB each, with the checksums that their contents should have.
    pub damaged: Vec<(u32, u32)>,
    /// The bytes; those of damaged blocks mean nothing.
    pub bytes: Vec<u8>,
}

impl Salvaged {
    /// The payload: the number of damaged blocks, each with its checksum, the bytes.
    pub fn encode(&self) -> Vec<u8> {
        let mut payload = Vec::with_capacity(4 + self.damaged.len() * 8 + self.bytes.len());
        payload.extend_from_slice(&(self.damaged.len() as u32).to_le_bytes());
        for (block, tag) in &self.damaged {
            payload.extend_from_slice(&block.to_le_bytes());
            payload.extend_from_slice(&tag.to_le_bytes());
        }
        payload.extend_from_slice(&self.bytes);
        payload
    }

    /// `None` if the payload is none of this kind.
    pub fn decode(payload: &[u8]) -> Option<Salvaged> {
        let (count, rest) = payload.split_first_chunk::<4>()?;
        let (records, bytes) = rest.split_at_checked((u32::from_le_bytes(*count) as usize).checked_mul(8)?)?;
        let number = |bytes: &[u8; 4]| u32::from_le_bytes(*bytes);
        let damaged =
            records.as_chunks::<4>().0.as_chunks::<2>().0.iter().map(|[block, tag]| (number(block), number(tag)));
        Some(Salvaged { damaged: damaged.collect(), bytes: bytes.to_vec() })
    }
}

/// Why bytes are no message.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum PeerFrameError {
    /// The first four bytes are not ours.
    Magic,
    /// No such kind or verdict.
    Kind(u8),
    /// More payload than any message has.
    PayloadTooLong(u32),
}

fn u32_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

fn u64_at(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

fn payload_bytes(bytes: &[u8; HEADER_BYTES]) -> Result<usize, PeerFrameError> {
    let length = u32_at(bytes, 4);
    if length as usize > PAYLOAD_BYTES_MAX {
        return Err(PeerFrameError::PayloadTooLong(length));
    }
    Ok(length as usize)
}

impl PeerRequest {
    /// A request about nothing in particular, to be filled in.
    pub fn new(kind: PeerKind, epoch: Epoch, sender: NodeId) -> PeerRequest {
        PeerRequest {
            id: 0,
            kind,
            flags: 0,
            epoch,
            oid: Oid::from_raw(0),
            source: Oid::from_raw(0),
            stamp: Stamp::ZERO,
            length: 0,
            settled: 0,
            offset: 0,
            object_bytes: 0,
            sender,
        }
    }

    /// Whether a flag is set.
    pub fn has(&self, flag: u8) -> bool {
        self.flags & flag != 0
    }

    /// The header's bytes.
    pub fn encode(&self, payload_bytes: usize) -> [u8; HEADER_BYTES] {
        assert!(payload_bytes <= PAYLOAD_BYTES_MAX, "the gateway splits larger payloads");
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&REQUEST_MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.id.to_le_bytes());
        bytes[16] = self.kind as u8;
        bytes[17] = self.flags;
        bytes[20..24].copy_from_slice(&self.epoch.get().to_le_bytes());
        bytes[24..32].copy_from_slice(&self.oid.raw().to_le_bytes());
        bytes[32..40].copy_from_slice(&self.source.raw().to_le_bytes());
        bytes[40..44].copy_from_slice(&self.stamp.generation.to_le_bytes());
        bytes[44..48].copy_from_slice(&self.length.to_le_bytes());
        bytes[48..56].copy_from_slice(&self.stamp.sequence.to_le_bytes());
        bytes[56..64].copy_from_slice(&self.settled.to_le_bytes());
        bytes[64..72].copy_from_slice(&self.offset.to_le_bytes());
        bytes[72..80].copy_from_slice(&self.object_bytes.to_le_bytes());
        bytes[80..88].copy_from_slice(&self.sender.get().to_le_bytes());
        bytes
    }

    /// The request and the number of payload bytes that follow.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<(PeerRequest, usize), PeerFrameError> {
        if u32_at(bytes, 0) != REQUEST_MAGIC {
            return Err(PeerFrameError::Magic);
        }
        let kind = PeerKind::from_code(bytes[16]).ok_or(PeerFrameError::Kind(bytes[16]))?;
        let request = PeerRequest {
            id: u64_at(bytes, 8),
            kind,
            flags: bytes[17],
            epoch: Epoch(u32_at(bytes, 20)),
            oid: Oid::from_raw(u64_at(bytes, 24)),
            source: Oid::from_raw(u64_at(bytes, 32)),
            stamp: Stamp { generation: u32_at(bytes, 40), sequence: u64_at(bytes, 48) },
            length: u32_at(bytes, 44),
            settled: u64_at(bytes, 56),
            offset: u64_at(bytes, 64),
            object_bytes: u64_at(bytes, 72),
            sender: NodeId(u64_at(bytes, 80)),
        };
        Ok((request, payload_bytes(bytes)?))
    }
}

impl PeerAnswer {
    /// An answer without a version.
    pub fn new(id: u64, verdict: Verdict, epoch: Epoch) -> PeerAnswer {
        PeerAnswer {
            id,
            verdict,
            epoch,
            object_bytes: 0,
            version: Version::default(),
            clean_through: Epoch(0),
            nearly_full: false,
            met_nobody: false,
            met_before: None,
        }
    }

    /// The header's bytes.
    pub fn encode(&self, payload_bytes: usize) -> [u8; HEADER_BYTES] {
        assert!(payload_bytes <= PAYLOAD_BYTES_MAX, "no answer is longer than the longest read");
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..4].copy_from_slice(&ANSWER_MAGIC.to_le_bytes());
        bytes[4..8].copy_from_slice(&(payload_bytes as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.id.to_le_bytes());
        bytes[16] = self.verdict as u8;
        bytes[17] = u8::from(self.nearly_full);
        bytes[18] = u8::from(self.met_nobody);
        bytes[20..24].copy_from_slice(&self.epoch.get().to_le_bytes());
        bytes[24..32].copy_from_slice(&self.object_bytes.to_le_bytes());
        bytes[32..36].copy_from_slice(&self.version.epoch.get().to_le_bytes());
        bytes[36..40].copy_from_slice(&self.version.stamp.generation.to_le_bytes());
        bytes[40..48].copy_from_slice(&self.version.stamp.sequence.to_le_bytes());
        bytes[48..52].copy_from_slice(&self.clean_through.get().to_le_bytes());
        let met_before = self.met_before.map_or(0, |epoch| epoch.get().saturating_add(1));
        bytes[52..56].copy_from_slice(&met_before.to_le_bytes());
        bytes
    }

    /// The answer and the number of payload bytes that follow.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<(PeerAnswer, usize), PeerFrameError> {
        if u32_at(bytes, 0) != ANSWER_MAGIC {
            return Err(PeerFrameError::Magic);
        }
        let verdict = Verdict::from_code(bytes[16]).ok_or(PeerFrameError::Kind(bytes[16]))?;
        let answer = PeerAnswer {
            id: u64_at(bytes, 8),
            verdict,
            epoch: Epoch(u32_at(bytes, 20)),
            object_bytes: u64_at(bytes, 24),
            version: Version {
                epoch: Epoch(u32_at(bytes, 32)),
                stamp: Stamp { generation: u32_at(bytes, 36), sequence: u64_at(bytes, 40) },
            },
            clean_through: Epoch(u32_at(bytes, 48)),
            nearly_full: bytes[17] != 0,
            met_nobody: bytes[18] == 1,
            met_before: u32_at(bytes, 52).checked_sub(1).map(Epoch),
        };
        Ok((answer, payload_bytes(bytes)?))
    }
}

/// One object in the answer to `List`: 32 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ListEntry {
    /// The object.
    pub oid: Oid,
    /// Its version there.
    pub version: Version,
    /// Its size.
    pub object_bytes: u64,
}

/// Bytes of one [`ListEntry`].
pub const LIST_ENTRY_BYTES: usize = 32;

impl ListEntry {
    /// Its bytes: oid, version epoch, stamp generation, stamp sequence, size.
    pub fn encode(&self) -> [u8; LIST_ENTRY_BYTES] {
        let mut bytes = [0; LIST_ENTRY_BYTES];
        bytes[0..8].copy_from_slice(&self.oid.raw().to_le_bytes());
        bytes[8..12].copy_from_slice(&self.version.epoch.get().to_le_bytes());
        bytes[12..16].copy_from_slice(&self.version.stamp.generation.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.version.stamp.sequence.to_le_bytes());
        bytes[24..32].copy_from_slice(&self.object_bytes.to_le_bytes());
        bytes
    }

    /// All entries of a payload; a rest that is no whole entry is dropped.
    pub fn decode_all(payload: &[u8]) -> impl Iterator<Item = ListEntry> + '_ {
        payload.chunks_exact(LIST_ENTRY_BYTES).map(|chunk| {
            let mut padded = [0; HEADER_BYTES];
            padded[..LIST_ENTRY_BYTES].copy_from_slice(chunk);
            ListEntry {
                oid: Oid::from_raw(u64_at(&padded, 0)),
                version: Version {
                    epoch: Epoch(u32_at(&padded, 8)),
                    stamp: Stamp { generation: u32_at(&padded, 12), sequence: u64_at(&padded, 16) },
                },
                object_bytes: u64_at(&padded, 24),
            }
        })
    }
}

#[cfg(test)]
mod tests {
    use alloc::vec;

    use super::*;

    #[test]
    fn a_request_and_an_answer_survive_the_wire() {
        let mut request = PeerRequest::new(PeerKind::Write, Epoch(7), NodeId(0x0123_4567_89ab_cdef));
        request.id = 0xfedc_ba98_7654_3210;
        request.flags = FLAG_CREATE | FLAG_DURABLE;
        request.oid = Oid::from_raw(0x007c_2b25_0000_0003);
        request.source = Oid::from_raw(0x007c_2b24_0000_0003);
        request.stamp = Stamp { generation: 9, sequence: 1 << 40 };
        request.length = 12;
        request.settled = (1 << 40) - 3;
        request.offset = 4 << 20;
        request.object_bytes = 8 << 20;
        assert_eq!(PeerRequest::decode(&request.encode(4096)), Ok((request, 4096)));
        let mut answer = PeerAnswer::new(5, Verdict::NotCurrent, Epoch(8));
        answer.version = Version { epoch: Epoch(6), stamp: Stamp { generation: 1, sequence: 2 } };
        answer.object_bytes = 77;
        answer.clean_through = Epoch(5);
        answer.nearly_full = true;
        assert_eq!(PeerAnswer::decode(&answer.encode(0)), Ok((answer, 0)));
    }

    #[test]
    fn foreign_bytes_are_refused() {
        let mut bytes = PeerRequest::new(PeerKind::Read, Epoch(1), NodeId(1)).encode(0);
        assert_eq!(PeerAnswer::decode(&bytes), Err(PeerFrameError::Magic));
        bytes[16] = 200;
        assert_eq!(PeerRequest::decode(&bytes), Err(PeerFrameError::Kind(200)));
        bytes[16] = 3;
        bytes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(PeerRequest::decode(&bytes), Err(PeerFrameError::PayloadTooLong(u32::MAX)));
    }

    #[test]
    fn list_entries_survive_the_wire() {
        let entry = ListEntry {
            oid: Oid::from_raw(0x807c_2b25_0000_0000),
            version: Version { epoch: Epoch(3), stamp: Stamp { generation: 4, sequence: 5 } },
            object_bytes: 4 << 20,
        };
        let mut payload = alloc::vec::Vec::new();
        payload.extend_from_slice(&entry.encode());
        payload.extend_from_slice(&entry.encode());
        payload.push(1);
        assert_eq!(ListEntry::decode_all(&payload).collect::<alloc::vec::Vec<_>>(), [entry, entry]);
    }

    #[test]
    fn what_was_salvaged_comes_back_and_nonsense_does_not() {
        let salvaged = Salvaged { damaged: vec![(3, 0xdead_beef), (1023, 1)], bytes: vec![7; 5000] };
        let payload = salvaged.encode();
        assert_eq!(Salvaged::decode(&payload), Some(salvaged));
        assert_eq!(Salvaged::decode(&payload[..19]), None);
        assert_eq!(Salvaged::decode(&[255, 255, 255, 255, 0]), None);
        assert_eq!(Salvaged::decode(&[]), None);
    }
}
