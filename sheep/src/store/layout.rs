//! The names a store gives to its files; DISK.md describes what is in them.

use std::path::{Path, PathBuf};

/// Lock file of META: held while a process has the store open.
pub const LOCK: &str = "lock";
/// Identity and format of the store, in META; written last when a store is made.
pub const SUPERBLOCK: &str = "superblock";
/// The floors above keep their state here, in META.
pub const CLUSTER: &str = "state";
/// The write-ahead journal, in META or in the directory given for it.
pub const JOURNAL: &str = "journal";
/// The checkpointed index, in META.
pub const INDEX: &str = "index.redb";
/// Objects, in every disk.
pub const OBJECTS: &str = "obj";
/// Files that are being made, in every disk; emptied at every start.
pub const MAKING: &str = "tmp";
/// Label of a disk other than META.
pub const LABEL: &str = "disk";
/// Appended to the name of a small file while its next content is written.
pub const NEXT: &str = ".next";
/// Appended to an object's name in [`MAKING`] while the applier builds a new content for it.
pub const NEW: &str = ".new";
/// Appended, after a number, to an object's name in [`MAKING`] while recovery fetches it.
pub const INCOMING: &str = ".incoming";
/// Found in the root of a fresh ext file system; not ours, harmless.
pub const LOST_AND_FOUND: &str = "lost+found";

/// The daemon's log, in META unless it is sent elsewhere; may be a link that the operator made before the first start.
pub const LOG: &str = "sheep.log";

/// Where everything of one store is.
#[derive(Clone, Debug)]
pub struct Layout {
    /// The META directory.
    pub meta: PathBuf,
    /// Directory of the journal.
    pub journal_dir: PathBuf,
    /// Disks by index; `disks[0]` may be META itself.
    pub disks: Vec<PathBuf>,
}

impl Layout {
    /// A file of META.
    pub fn meta_file(&self, name: &str) -> PathBuf {
        self.meta.join(name)
    }

    /// The journal.
    pub fn journal(&self) -> PathBuf {
        self.journal_dir.join(JOURNAL)
    }

    /// Directory of a disk's objects.
    pub fn objects(&self, disk: u8) -> PathBuf {
        self.disks[usize::from(disk)].join(OBJECTS)
    }

    /// Directory of a disk's half-made files.
    pub fn making(&self, disk: u8) -> PathBuf {
        self.disks[usize::from(disk)].join(MAKING)
    }

    /// An object's file.
    pub fn object(&self, disk: u8, oid: u64) -> PathBuf {
        self.objects(disk).join(format!("{oid:016x}"))
    }

    /// The file in which the applier builds an object's next content.
    pub fn object_new(&self, disk: u8, oid: u64) -> PathBuf {
        self.making(disk).join(format!("{oid:016x}{NEW}"))
    }

    /// The file in which recovery collects an object; `staged` tells several attempts apart.
    pub fn object_incoming(&self, disk: u8, oid: u64, staged: u64) -> PathBuf {
        self.making(disk).join(format!("{oid:016x}.{staged:016x}{INCOMING}"))
    }

    /// The disk that a new object goes to. Objects that exist stay where the index says they are.
    pub fn disk_of_new(&self, oid: u64) -> u8 {
        // Fibonacci hashing spreads neighbouring ids evenly: Knuth, The Art of Computer Programming 3, 6.4.
        let spread = oid.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
        ((spread * self.disks.len() as u64) >> 32) as u8
    }
}

/// Path of a small file's next content.
pub fn next_of(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_os_string();
    name.push(NEXT);
    PathBuf::from(name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn new_objects_spread_evenly_over_the_disks() {
        let layout =
            Layout { meta: "/m".into(), journal_dir: "/m".into(), disks: vec!["/a".into(), "/b".into(), "/c".into()] };
        let mut counts = [0_u32; 3];
        for index in 0..30_000 {
            counts[usize::from(layout.disk_of_new((0x007c_2b25 << 32) | index))] += 1;
        }
        assert!(counts.iter().all(|count| (9_500..10_500).contains(count)), "{counts:?}");
    }
}
