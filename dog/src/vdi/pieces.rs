//! A byte range of a volume, cut into requests.
//!
//! Always holds: the pieces of a range are in order, without gap or overlap, none crosses an object, and none is longer than
//! [`PIECE_BYTES_MAX`].

/// Longest single read or write. Objects may have 2 GiB; a few pieces of each lane are in memory at a time.
pub const PIECE_BYTES_MAX: u64 = 4 << 20;

/// Part of one object of a volume.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Piece {
    /// Where it begins in the volume.
    pub start: u64,
    /// Which object.
    pub index: u32,
    /// Where it begins in the object.
    pub offset: u64,
    /// Its length in bytes.
    pub length: usize,
}

/// Cuts the `length` bytes from `start` on. The range must be inside a volume of at most 2^32 objects.
pub fn pieces(start: u64, length: u64, shift: u8) -> impl Iterator<Item = Piece> + Clone + Send {
    let end = start.checked_add(length).expect("the range is inside a volume");
    let object_bytes = 1_u64 << shift;
    let first = (start < end).then(|| cut(start, end, object_bytes));
    std::iter::successors(first, move |piece| {
        let next = piece.start + piece.length as u64;
        (next < end).then(|| cut(next, end, object_bytes))
    })
}

fn cut(start: u64, end: u64, object_bytes: u64) -> Piece {
    let offset = start % object_bytes;
    let length = (end - start).min(object_bytes - offset).min(PIECE_BYTES_MAX);
    let index = u32::try_from(start / object_bytes).expect("a volume has at most 2^32 objects");
    assert!(length > 0, "a piece is never empty");
    Piece { start, index, offset, length: length as usize }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_range_is_cut_at_objects() {
        let cut: Vec<_> = pieces((1 << 20) - 1, (1 << 20) + 2, 20).collect();
        assert_eq!(
            cut,
            [
                Piece { start: (1 << 20) - 1, index: 0, offset: (1 << 20) - 1, length: 1 },
                Piece { start: 1 << 20, index: 1, offset: 0, length: 1 << 20 },
                Piece { start: 2 << 20, index: 2, offset: 0, length: 1 },
            ]
        );
        assert_eq!(pieces(5, 0, 20).count(), 0);
        assert_eq!(pieces(0, 1 << 31, 31).count(), 512);
    }

    proptest! {
        #[test]
        fn pieces_cover_the_range(start in 0_u64..1 << 40, length in 0_u64..1 << 30, shift in 20_u8..=31) {
            let mut next = start;
            for piece in pieces(start, length, shift) {
                prop_assert_eq!(piece.start, next);
                prop_assert_eq!((u64::from(piece.index) << shift) + piece.offset, next);
                prop_assert!(piece.offset + piece.length as u64 <= 1 << shift);
                next += piece.length as u64;
            }
            prop_assert_eq!(next, start + length);
        }
    }
}
