//! The inode object: offsets as constants, the header as a structure, the map as arithmetic (protocol.md section 5).

use core::ops::Range;

use crate::bytes::{array, put, u32_at, u64_at};
use crate::names::padded;

/// Offset of the tag.
pub const TAG_OFFSET: usize = 256;
/// Offset of the creation time.
pub const CREATE_TIME_OFFSET: usize = 512;
/// Offset of the time at which it became a snapshot.
pub const SNAP_CTIME_OFFSET: usize = 520;
/// Offset of the saved guest clock.
pub const VM_CLOCK_OFFSET: usize = 528;
/// Offset of the size.
pub const VDI_SIZE_OFFSET: usize = 536;
/// Offset of the size of the saved machine state.
pub const VM_STATE_SIZE_OFFSET: usize = 544;
/// Offset of the four policy bytes.
pub const POLICY_OFFSET: usize = 552;
/// Offset of the snapshot id.
pub const SNAP_ID_OFFSET: usize = 556;
/// Offset of the VDI's own id.
pub const VDI_ID_OFFSET: usize = 560;
/// Offset of the parent's id.
pub const PARENT_OFFSET: usize = 564;
/// Offset of the btree counter.
pub const BTREE_COUNTER_OFFSET: usize = 568;
/// Offset of the unused area.
pub const UNUSED_OFFSET: usize = 572;
/// Bytes of the header.
pub const HEADER_BYTES: usize = 4664;
/// Offset of the map.
pub const MAP_OFFSET: usize = HEADER_BYTES;
/// Entries of the map.
pub const MAP_ENTRIES: usize = 1 << 20;
/// Bytes of one map entry.
pub const MAP_ENTRY_BYTES: usize = 4;
/// Bytes that QEMU takes for the whole inode.
pub const QEMU_INODE_BYTES: usize = 4_198_968;
/// Bytes of the whole inode: QEMU's part and the ancestor's reference counts.
pub const INODE_BYTES: usize = 12_587_576;

const _: () = assert!(MAP_OFFSET + MAP_ENTRIES * MAP_ENTRY_BYTES == QEMU_INODE_BYTES);
const _: () = assert!(QEMU_INODE_BYTES + MAP_ENTRIES * 8 == INODE_BYTES);
const _: () = assert!(UNUSED_OFFSET + 4092 == HEADER_BYTES);

/// The first 4,664 bytes of an inode.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct InodeHeader {
    /// 256 bytes, padded with NUL; empty when deleted.
    pub name: [u8; 256],
    /// 256 bytes, padded with NUL.
    pub tag: [u8; 256],
    /// Seconds << 32 | nanoseconds.
    pub create_time: u64,
    /// As `create_time`; 0 on a working VDI.
    pub snap_ctime: u64,
    /// Guest clock of the saved machine state, nanoseconds.
    pub vm_clock_nsec: u64,
    /// Bytes.
    pub vdi_size: u64,
    /// Bytes of saved machine state.
    pub vm_state_size: u64,
    /// 0 for replicas.
    pub copy_policy: u8,
    /// 0 for the array map.
    pub store_policy: u8,
    /// Copies.
    pub nr_copies: u8,
    /// log2 of the object size.
    pub block_size_shift: u8,
    /// Number within the name, from 1.
    pub snap_id: u32,
    /// Own id.
    pub vdi_id: u32,
    /// What it was made from; 0 for nothing.
    pub parent_vdi_id: u32,
    /// The ancestor's hyper volumes only.
    pub btree_counter: u32,
    /// 4,092 bytes that mean nothing and come back as they were.
    pub unused: Vec<u8>,
}

/// Fewer than 4,664 bytes are no header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct InodeTooShort(pub usize);

impl core::fmt::Display for InodeTooShort {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "an inode header takes {HEADER_BYTES} bytes, not {}", self.0)
    }
}

impl core::error::Error for InodeTooShort {}

impl Default for InodeHeader {
    fn default() -> Self {
        InodeHeader {
            name: [0; 256],
            tag: [0; 256],
            create_time: 0,
            snap_ctime: 0,
            vm_clock_nsec: 0,
            vdi_size: 0,
            vm_state_size: 0,
            copy_policy: 0,
            store_policy: 0,
            nr_copies: 0,
            block_size_shift: 0,
            snap_id: 0,
            vdi_id: 0,
            parent_vdi_id: 0,
            btree_counter: 0,
            unused: vec![0; HEADER_BYTES - UNUSED_OFFSET],
        }
    }
}

impl InodeHeader {
    /// The header at the start of `bytes`.
    pub fn decode(bytes: &[u8]) -> Result<InodeHeader, InodeTooShort> {
        if bytes.len() < HEADER_BYTES {
            return Err(InodeTooShort(bytes.len()));
        }
        Ok(InodeHeader {
            name: array(bytes, 0),
            tag: array(bytes, TAG_OFFSET),
            create_time: u64_at(bytes, CREATE_TIME_OFFSET),
            snap_ctime: u64_at(bytes, SNAP_CTIME_OFFSET),
            vm_clock_nsec: u64_at(bytes, VM_CLOCK_OFFSET),
            vdi_size: u64_at(bytes, VDI_SIZE_OFFSET),
            vm_state_size: u64_at(bytes, VM_STATE_SIZE_OFFSET),
            copy_policy: bytes[POLICY_OFFSET],
            store_policy: bytes[POLICY_OFFSET + 1],
            nr_copies: bytes[POLICY_OFFSET + 2],
            block_size_shift: bytes[POLICY_OFFSET + 3],
            snap_id: u32_at(bytes, SNAP_ID_OFFSET),
            vdi_id: u32_at(bytes, VDI_ID_OFFSET),
            parent_vdi_id: u32_at(bytes, PARENT_OFFSET),
            btree_counter: u32_at(bytes, BTREE_COUNTER_OFFSET),
            unused: bytes[UNUSED_OFFSET..HEADER_BYTES].to_vec(),
        })
    }

    /// The bytes on the wire. An `unused` area of another length is cut or padded.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; HEADER_BYTES];
        put(&mut bytes, 0, &self.name);
        put(&mut bytes, TAG_OFFSET, &self.tag);
        put(&mut bytes, CREATE_TIME_OFFSET, &self.create_time.to_le_bytes());
        put(&mut bytes, SNAP_CTIME_OFFSET, &self.snap_ctime.to_le_bytes());
        put(&mut bytes, VM_CLOCK_OFFSET, &self.vm_clock_nsec.to_le_bytes());
        put(&mut bytes, VDI_SIZE_OFFSET, &self.vdi_size.to_le_bytes());
        put(&mut bytes, VM_STATE_SIZE_OFFSET, &self.vm_state_size.to_le_bytes());
        let policy = [self.copy_policy, self.store_policy, self.nr_copies, self.block_size_shift];
        put(&mut bytes, POLICY_OFFSET, &policy);
        put(&mut bytes, SNAP_ID_OFFSET, &self.snap_id.to_le_bytes());
        put(&mut bytes, VDI_ID_OFFSET, &self.vdi_id.to_le_bytes());
        put(&mut bytes, PARENT_OFFSET, &self.parent_vdi_id.to_le_bytes());
        put(&mut bytes, BTREE_COUNTER_OFFSET, &self.btree_counter.to_le_bytes());
        put(&mut bytes, UNUSED_OFFSET, &self.unused[..self.unused.len().min(HEADER_BYTES - UNUSED_OFFSET)]);
        bytes
    }

    /// The name without its padding.
    pub fn name(&self) -> &[u8] {
        crate::bytes::until_nul(&self.name)
    }

    /// The tag without its padding.
    pub fn tag(&self) -> &[u8] {
        crate::bytes::until_nul(&self.tag)
    }

    /// Sets the name; bytes beyond 255 are cut.
    pub fn set_name(&mut self, name: &[u8]) {
        self.name = padded(name);
    }

    /// Sets the tag; bytes beyond 255 are cut.
    pub fn set_tag(&mut self, tag: &[u8]) {
        self.tag = padded(tag);
    }
}

/// Where the map entry of an object index is.
pub const fn map_offset(index: u32) -> u64 {
    MAP_OFFSET as u64 + index as u64 * MAP_ENTRY_BYTES as u64
}

/// The map entries that a range of inode bytes touches, even in part.
pub fn map_entries_touched(offset: u64, length: u64) -> Range<u32> {
    let map_start = MAP_OFFSET as u64;
    let map_end = QEMU_INODE_BYTES as u64;
    let start = offset.clamp(map_start, map_end) - map_start;
    let end = offset.saturating_add(length).clamp(map_start, map_end) - map_start;
    if start >= end {
        return 0..0;
    }
    (start / MAP_ENTRY_BYTES as u64) as u32..end.div_ceil(MAP_ENTRY_BYTES as u64) as u32
}

/// The map entries in a piece of an inode that begins at a map entry.
pub fn map_entries(piece: &[u8]) -> impl Iterator<Item = u32> + '_ {
    piece.chunks_exact(MAP_ENTRY_BYTES).map(|entry| u32_at(entry, 0))
}

/// The wire encoding of a time.
pub const fn wire_time(seconds: u64, nanoseconds: u32) -> u64 {
    seconds << 32 | nanoseconds as u64
}

/// Seconds and nanoseconds of a time on the wire.
pub const fn split_wire_time(time: u64) -> (u64, u32) {
    (time >> 32, time as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_bytes::noise;

    #[test]
    fn any_header_survives_decoding_and_encoding() {
        for seed in 0..50 {
            let bytes = noise(seed, HEADER_BYTES);
            assert_eq!(InodeHeader::decode(&bytes).unwrap().encode(), bytes);
        }
        assert_eq!(InodeHeader::decode(&[0; 100]), Err(InodeTooShort(100)));
    }

    #[test]
    fn map_arithmetic_fits_the_layout() {
        assert_eq!(map_offset(0), 4664);
        assert_eq!(map_offset(1), 4668);
        assert_eq!(map_entries_touched(4664, 4), 0..1);
        assert_eq!(map_entries_touched(4665, 4), 0..2);
        assert_eq!(map_entries_touched(0, 4664), 0..0);
        assert_eq!(map_entries_touched(0, QEMU_INODE_BYTES as u64), 0..1 << 20);
        assert_eq!(map_entries_touched(QEMU_INODE_BYTES as u64, 100), 0..0);
        assert_eq!(map_entries_touched(u64::MAX - 3, 100), 0..0);
    }
}
