//! What DESCRIBE_VDIS answers for each VDI: the fields of its inode's header, and how many objects its map names.
//!
//! ```text
//! 0    the inode's header up to its unused bytes (572)
//! 572  objects of its own, u32; 0xffffffff if the map could not be read
//! 576  objects that it shares with its ancestors, u32
//! ```

use crate::bytes::{put, u32_at};
use crate::inode::{HEADER_BYTES, InodeHeader, UNUSED_OFFSET};

/// Bytes of one entry.
pub const SUMMARY_BYTES: usize = UNUSED_OFFSET + 8;
/// Entries of one answer at most: 580 KiB.
pub const SUMMARIES_MAX: usize = 1024;
const UNKNOWN: u32 = u32::MAX;

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VdiSummary {
    /// As the inode says; its unused bytes are zeros.
    pub header: InodeHeader,
    /// Objects of its own and objects that it shares; nothing if the map could not be read.
    pub objects: Option<(u32, u32)>,
}

impl VdiSummary {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; SUMMARY_BYTES] {
        let mut bytes = [0; SUMMARY_BYTES];
        bytes[..UNUSED_OFFSET].copy_from_slice(&self.header.encode()[..UNUSED_OFFSET]);
        let (own, shared) = self.objects.unwrap_or((UNKNOWN, 0));
        put(&mut bytes, UNUSED_OFFSET, &own.to_le_bytes());
        put(&mut bytes, UNUSED_OFFSET + 4, &shared.to_le_bytes());
        bytes
    }

    /// The entries of an answer; a part of one at its end is left out.
    pub fn decode_all(bytes: &[u8]) -> impl Iterator<Item = VdiSummary> + '_ {
        bytes.chunks_exact(SUMMARY_BYTES).filter_map(|entry| {
            let mut header = vec![0; HEADER_BYTES];
            header[..UNUSED_OFFSET].copy_from_slice(&entry[..UNUSED_OFFSET]);
            let own = u32_at(entry, UNUSED_OFFSET);
            let objects = (own != UNKNOWN).then(|| (own, u32_at(entry, UNUSED_OFFSET + 4)));
            Some(VdiSummary { header: InodeHeader::decode(&header).ok()?, objects })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_come_back_and_half_of_one_is_left_out() {
        let mut header = InodeHeader { vdi_id: 7, vdi_size: 1 << 40, nr_copies: 3, ..InodeHeader::default() };
        header.set_name(b"disk");
        let known = VdiSummary { header, objects: Some((5, 9)) };
        let unknown = VdiSummary { objects: None, ..known.clone() };
        let mut bytes = [known.encode(), unknown.encode()].concat();
        assert_eq!(VdiSummary::decode_all(&bytes).collect::<Vec<_>>(), [known.clone(), unknown]);
        bytes.truncate(2 * SUMMARY_BYTES - 1);
        assert_eq!(VdiSummary::decode_all(&bytes).collect::<Vec<_>>(), [known]);
    }
}
