//! Open object files: bounded, and one per object.
//!
//! Always holds:
//! 1. A file that somebody uses is never closed here: two open files of one object would not see each other's
//!    checksums (see `object_file`).
//! 2. A file whose table is not written is not closed either (`object_file`, invariant 4).
//! 3. Beyond that, at most [`HANDLES_MAX`] files and [`TABLE_BYTES_MAX`] bytes of checksum tables stay open.

use std::collections::{HashMap, VecDeque};
use std::sync::Arc;

use super::object_file::ObjectFile;

/// Open files: half of the usual limit of 1,024 descriptors, so that sockets have the other half.
const HANDLES_MAX: usize = 512;
/// Memory for checksum tables: covers 32 GiB of content.
const TABLE_BYTES_MAX: usize = 32 << 20;

/// Tables written at once to make room: one table for each file that is opened costs as much, in another order.
const WRITTEN_AT_ONCE: usize = 32;

struct Slot {
    object: Arc<ObjectFile>,
    used: bool,
}

/// The open files, evicted by the clock algorithm: used ones get a second chance.
#[derive(Default)]
pub struct Handles {
    slots: HashMap<u64, Slot>,
    order: VecDeque<u64>,
    table_bytes: usize,
}

impl Handles {
    /// An open file.
    pub fn get(&mut self, oid: u64) -> Option<Arc<ObjectFile>> {
        let slot = self.slots.get_mut(&oid)?;
        slot.used = true;
        Some(slot.object.clone())
    }

    /// Keeps a file open, instead of the one that was kept for this object.
    pub fn insert(&mut self, oid: u64, object: Arc<ObjectFile>) {
        self.table_bytes += object.table_bytes_max();
        match self.slots.insert(oid, Slot { object, used: true }) {
            Some(replaced) => self.table_bytes -= replaced.object.table_bytes_max(),
            None => self.order.push_back(oid),
        }
        self.evict();
    }

    /// Closes a file as soon as nobody uses it.
    pub fn remove(&mut self, oid: u64) {
        if let Some(slot) = self.slots.remove(&oid) {
            self.table_bytes -= slot.object.table_bytes_max();
            // Rare enough that a walk over the few hundred names costs less than an index of their places.
            self.order.retain(|other| *other != oid);
        }
    }

    fn is_crowded(&self) -> bool {
        self.slots.len() > HANDLES_MAX || self.table_bytes > TABLE_BYTES_MAX
    }

    /// Files that stay open only because their tables are not written, if there are too many: the caller writes some.
    pub fn unwritten(&self) -> Vec<Arc<ObjectFile>> {
        if !self.is_crowded() {
            return Vec::new();
        }
        let objects = self.order.iter().filter_map(|oid| self.slots.get(oid)).map(|slot| &slot.object);
        objects.filter(|object| object.is_table_unwritten()).take(WRITTEN_AT_ONCE).cloned().collect()
    }

    fn evict(&mut self) {
        // Twice round is enough to take every second chance away; what is left then is in use.
        let mut steps = 2 * self.order.len();
        while steps > 0 && self.is_crowded() {
            steps -= 1;
            let Some(oid) = self.order.pop_front() else {
                return;
            };
            let Some(slot) = self.slots.get_mut(&oid) else {
                continue;
            };
            // Only who uses it makes its table an unwritten one.
            let is_idle = Arc::get_mut(&mut slot.object).is_some_and(|object| !object.is_table_unwritten());
            if slot.used || !is_idle {
                slot.used = false;
                self.order.push_back(oid);
                continue;
            }
            self.table_bytes -= slot.object.table_bytes_max();
            self.slots.remove(&oid);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::object_file::{Base, Header};
    use crate::world::real_disk::RealFiles;
    use sheep_core::stamp::Version;

    #[test]
    fn files_in_use_stay_and_the_number_is_bounded() {
        let dir = tempfile::tempdir().unwrap();
        let open = |oid: u64| {
            let header = Header { oid, size_bytes: 4096, version: Version::default() };
            let path = dir.path().join(oid.to_string());
            Arc::new(ObjectFile::create(&RealFiles, &path, &header).unwrap())
        };
        let mut handles = Handles::default();
        let kept = open(0);
        handles.insert(0, kept.clone());
        for oid in 1..600 {
            handles.insert(oid, open(oid));
        }
        assert!(handles.slots.len() <= HANDLES_MAX);
        assert!(Arc::ptr_eq(&handles.get(0).unwrap(), &kept));
        handles.remove(0);
        assert!(handles.get(0).is_none());
        assert_eq!(handles.order.len(), handles.slots.len());
        assert!(handles.unwritten().is_empty());

        for oid in 1000..1600 {
            let object = open(oid);
            object.write(0, &[1], Base::Checked).unwrap();
            handles.insert(oid, object);
        }
        assert!((1000..1600).all(|oid| handles.get(oid).is_some()), "none is closed with an unwritten table");
        for round in 0.. {
            let unwritten = handles.unwritten();
            let Some(last) = unwritten.last() else { break };
            assert!(unwritten.len() <= WRITTEN_AT_ONCE && round < 600);
            for object in &unwritten {
                object.write_table().unwrap();
            }
            handles.insert(2000 + round, last.clone());
        }
        assert!(handles.slots.len() <= HANDLES_MAX);
    }
}
