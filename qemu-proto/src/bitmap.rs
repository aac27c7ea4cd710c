//! The bitmaps of READ_VDIS and READ_DEL_VDIS: one bit per VDI id, the lowest bit of the first byte being id 0.

use crate::oid::{VDI_ID_BITS, VdiId};

/// Bytes of a bitmap.
pub const BITMAP_BYTES: usize = 1 << (VDI_ID_BITS - 3);

const _: () = assert!(BITMAP_BYTES == 2_097_152);

/// A bitmap of these ids.
pub fn bitmap_of(ids: impl Iterator<Item = VdiId>) -> Vec<u8> {
    let mut bytes = vec![0; BITMAP_BYTES];
    for id in ids {
        bytes[id.get() as usize / 8] |= 1 << (id.get() % 8);
    }
    bytes
}

/// The ids in a bitmap, ascending; bytes beyond its size are ignored.
pub fn ids_in(bitmap: &[u8]) -> impl Iterator<Item = VdiId> + '_ {
    let bytes = bitmap.iter().take(BITMAP_BYTES).enumerate().filter(|(_, byte)| **byte != 0);
    bytes.flat_map(|(index, byte)| {
        (0..8).filter(move |bit| byte >> bit & 1 == 1).map(move |bit| VdiId::from_low_bits(index as u32 * 8 + bit))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_survive() {
        let ids = [1, 7, 8, 0x7c_2b25, 0xff_ffff].map(VdiId::from_low_bits);
        let bitmap = bitmap_of(ids.into_iter());
        assert_eq!(bitmap[0], 0b1000_0010);
        assert_eq!(ids_in(&bitmap).collect::<Vec<_>>(), ids);
    }
}
