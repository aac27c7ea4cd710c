//! Who a store is: its superblock, and the labels of its disks.
//!
//! Always holds:
//! 1. The superblock is written after everything else of a fresh store: a directory that has one is complete.
//! 2. A disk's index never changes; entries of the index name disks by it.

use std::io;
use std::path::Path;

use sheep_core::member::NodeId;

use super::fields::{u32_at, u64_at};
use super::sealed::{self, Found};
use crate::world::disk::Files;

const SUPERBLOCK_MAGIC: [u8; 8] = *b"SHEEPSUP";
const LABEL_MAGIC: [u8; 8] = *b"SHEEPDSK";

/// Format of everything in the store's directories. A store of a later format is refused.
pub const FORMAT: u32 = 1;

/// Identity of a store.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Superblock {
    /// The node, for ever.
    pub node: NodeId,
    /// How many disks belong to it.
    pub disk_count: u32,
    /// Whether META itself is disk 0.
    pub meta_is_disk: bool,
}

/// What a name turned out to be.
#[derive(PartialEq, Eq, Debug)]
pub enum Sealed<T> {
    /// Nothing there.
    Nothing,
    /// Intact.
    Intact(T),
    /// Written by a version with this format.
    Newer(u32),
    /// Damaged, and how.
    Damaged(&'static str),
}

/// Writes the superblock.
pub fn write(files: &dyn Files, path: &Path, superblock: Superblock) -> io::Result<()> {
    let mut payload = Vec::with_capacity(16);
    payload.extend_from_slice(&superblock.node.0.to_le_bytes());
    payload.extend_from_slice(&superblock.disk_count.to_le_bytes());
    payload.extend_from_slice(&u32::from(superblock.meta_is_disk).to_le_bytes());
    sealed::write(files, path, SUPERBLOCK_MAGIC, FORMAT, &payload)
}

/// Reads the superblock.
pub fn read(files: &dyn Files, path: &Path) -> io::Result<Sealed<Superblock>> {
    Ok(open(sealed::read(files, path, SUPERBLOCK_MAGIC)?, |bytes| {
        Some(Superblock {
            node: NodeId(u64_at(bytes, 0)?),
            disk_count: u32_at(bytes, 8)?,
            meta_is_disk: u32_at(bytes, 12)? != 0,
        })
    }))
}

/// Says which disk of which node a directory is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Label {
    /// The node whose disk it is.
    pub node: NodeId,
    /// Its index.
    pub index: u32,
}

/// Writes a disk's label.
pub fn write_label(files: &dyn Files, path: &Path, label: Label) -> io::Result<()> {
    let mut payload = Vec::with_capacity(12);
    payload.extend_from_slice(&label.node.0.to_le_bytes());
    payload.extend_from_slice(&label.index.to_le_bytes());
    sealed::write(files, path, LABEL_MAGIC, FORMAT, &payload)
}

/// Reads a disk's label.
pub fn read_label(files: &dyn Files, path: &Path) -> io::Result<Sealed<Label>> {
    Ok(open(sealed::read(files, path, LABEL_MAGIC)?, |bytes| {
        Some(Label { node: NodeId(u64_at(bytes, 0)?), index: u32_at(bytes, 8)? })
    }))
}

fn open<T>(found: Found, decode: impl FnOnce(&[u8]) -> Option<T>) -> Sealed<T> {
    match found {
        Found::Nothing => Sealed::Nothing,
        Found::Damaged(what) => Sealed::Damaged(what),
        Found::Payload(format, _) if format > FORMAT => Sealed::Newer(format),
        Found::Payload(_, payload) => decode(&payload).map_or(Sealed::Damaged("it is too short"), Sealed::Intact),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::real_disk::RealFiles;

    #[test]
    fn both_read_back_and_a_later_format_is_told() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("superblock");
        assert_eq!(read(&RealFiles, &path).unwrap(), Sealed::Nothing);
        let superblock = Superblock { node: NodeId(5), disk_count: 3, meta_is_disk: true };
        write(&RealFiles, &path, superblock).unwrap();
        assert_eq!(read(&RealFiles, &path).unwrap(), Sealed::Intact(superblock));
        sealed::write(&RealFiles, &path, SUPERBLOCK_MAGIC, 2, b"whatever").unwrap();
        assert_eq!(read(&RealFiles, &path).unwrap(), Sealed::Newer(2));
        let label = Label { node: NodeId(5), index: 2 };
        write_label(&RealFiles, &path, label).unwrap();
        assert_eq!(read_label(&RealFiles, &path).unwrap(), Sealed::Intact(label));
        assert!(matches!(read(&RealFiles, &path).unwrap(), Sealed::Damaged(_)));
    }
}
