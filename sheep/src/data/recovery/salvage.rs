//! Damaged blocks of the newest content, from wherever the same bytes can still be found.
//!
//! When every node that has the newest content of an object has it damaged somewhere, the other blocks are still good. A
//! damaged block may be whole on another of those nodes; or it did not change since an older copy was left behind, which
//! the checksum that is kept beside the damaged block tells. What is nowhere reads as an error, and nothing else of the
//! object does.

use bytes::Bytes;
use sheep_core::member::NodeId;

use super::piece::{self, Piece, Source};
use crate::data::Data;
use crate::data::holder::Holder;
use crate::store::{BLOCK_BYTES, block_tag};

/// Puts what can be found into a piece that begins at `offset`; gives the blocks that nobody has.
pub async fn heal(data: &Data, holder: &Holder, source: &Source, offset: u64, piece: &mut Piece) -> Vec<(u32, u32)> {
    let twins = source.twins.clone().unwrap_or_default();
    let strangers = strangers(data, source, &twins);
    let mut bytes = piece.data.to_vec();
    let mut lost = Vec::new();
    for (block, tag) in std::mem::take(&mut piece.damaged) {
        let start = u64::from(block) * BLOCK_BYTES as u64;
        let Some(place) = place_of(start, offset, bytes.len()) else {
            // What another node says need not make sense; a block outside the piece is in one that has its own answer.
            continue;
        };
        let length = (place.end - place.start) as u64;
        let mut found = None;
        for node in &twins {
            if let Some(twin) = sound(data, holder, source, *node, start, length).await
                && twin.stamp >= source.stamp
                && twin.object_bytes == piece.object_bytes
            {
                // As the rest of the piece, it has everything up to the source's stamp and perhaps more.
                piece.stamp = piece.stamp.max(twin.stamp);
                found = Some(twin.data);
                break;
            }
        }
        for node in &strangers {
            if found.is_some() {
                break;
            }
            let older = sound(data, holder, source, *node, start, length).await;
            found = older.map(|older| older.data).filter(|content| tag_of(content) == tag);
        }
        match found {
            Some(content) => bytes[place].copy_from_slice(&content),
            None => lost.push((block, tag)),
        }
    }
    piece.data = bytes.into();
    lost
}

/// Members that may have an older copy, this node first.
fn strangers(data: &Data, source: &Source, twins: &[NodeId]) -> Vec<NodeId> {
    let view = data.view();
    let Some(location) = view.locate(source.oid) else { return Vec::new() };
    let mut nodes: Vec<NodeId> = view.history.witnesses(location.key, location.copies).into_iter().collect();
    if !nodes.contains(&data.node()) {
        nodes.push(data.node());
    }
    nodes.retain(|node| *node != source.node && !twins.contains(node));
    nodes.sort_by_key(|node| *node != data.node());
    nodes
}

/// A block as one node has it, if it is whole there.
async fn sound(data: &Data, holder: &Holder, source: &Source, node: NodeId, start: u64, length: u64) -> Option<Piece> {
    let mut piece = piece::ask(data, holder, source, node, start, length).await.ok()?;
    if piece.data.is_empty() {
        piece.data = Bytes::from(vec![0; length as usize]);
    }
    (piece.damaged.is_empty() && piece.data.len() as u64 == length).then_some(piece)
}

/// Where a block that starts at `start` of the object lies in a piece of `length` bytes from `offset`.
fn place_of(start: u64, offset: u64, length: usize) -> Option<std::ops::Range<usize>> {
    let at = usize::try_from(start.checked_sub(offset)?).ok()?;
    (at < length).then(|| at..(at + BLOCK_BYTES).min(length))
}

/// The checksum of a block, the last of an object padded as on the disk.
fn tag_of(content: &[u8]) -> u32 {
    let mut block = [0; BLOCK_BYTES];
    block[..content.len()].copy_from_slice(content);
    block_tag(&block)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_is_placed_only_inside_its_piece() {
        assert_eq!(place_of(8192, 4096, 1 << 20), Some(4096..8192));
        assert_eq!(place_of(8192, 8192, 100), Some(0..100));
        assert_eq!(place_of(0, 4096, 1 << 20), None);
        assert_eq!(place_of(1 << 20, 0, 1 << 20), None);
        assert_eq!(place_of(u64::from(u32::MAX) * 4096, 0, 1 << 20), None);
    }

    #[test]
    fn the_last_block_is_padded() {
        let mut block = [0; BLOCK_BYTES];
        block[..3].copy_from_slice(b"end");
        assert_eq!(tag_of(b"end"), block_tag(&block));
    }
}
