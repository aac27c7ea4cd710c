//! Checkpoints: what is applied becomes durable in its place, so that the journal can forget it.
//!
//! In this order: write the checksums that objects' writers left in memory; flush the object files and their directories;
//! one transaction of the index with the changed entries
//! and the new journal tail; then, and only then, give the journal's space back and unlink removed objects' files.
//! Commits and the applier go on meanwhile.
//!
//! A crash between any two of these steps leaves the old tail or the new one; everything from it on is replayed.

use std::collections::BTreeSet;
use std::io;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use super::hint;
use super::index::{Changes, Index, State};
use super::state::{Checkpoint, Inner, Shared};
use super::{Store, StoreError};
use crate::world::disk::{self, Files, OpenMode};

/// Up to this many files are flushed one by one; more with one flush of their file systems, whose cost does not grow
/// with their number.
const FLUSHED_SINGLY_MAX: usize = 32;
/// How often a failure is looked for that no waiting change was refused for: soon enough beside what recovery then takes.
const LOOK_AGAIN: Duration = Duration::from_secs(1);

impl Inner {
    /// Begins a checkpoint of everything applied so far.
    pub fn capture(&mut self) -> Checkpoint {
        assert!(!self.checkpointing, "checkpoints come one after the other");
        self.checkpointing = true;
        self.pinned_running = std::mem::take(&mut self.pinned);
        Checkpoint {
            number: self.applied,
            tail: self.applied_tail,
            epochs: self.epochs_applied,
            changed: std::mem::take(&mut self.changed),
            dirty: std::mem::take(&mut self.dirty),
            renamed: std::mem::take(&mut self.renamed),
            doomed: self.doomed.clone(),
            spaces: Vec::new(),
        }
    }

    /// Asks for a checkpoint of everything submitted; gives the number of the last record of it.
    fn want_checkpoint(&mut self) -> u64 {
        self.want_durable();
        self.checkpoint_wanted = self.submitted;
        self.submitted
    }

    /// The checkpoint is durable.
    pub fn finish(&mut self, checkpoint: Checkpoint) {
        self.checkpoint_tail = checkpoint.tail;
        for (oid, packed) in &checkpoint.changed {
            if let Some(packed) = packed
                && self.entries.get(*oid).is_some_and(|now| now.disk() == packed.disk())
            {
                self.entries.set_allocated(*oid, packed.allocated_bytes());
            }
        }
        self.unlinkable.extend(checkpoint.doomed);
        self.pinned_running.clear();
        self.checkpointing = false;
        self.checkpointed = checkpoint.number;
        self.commit_blocked = false;
        self.apply_blocked = false;
        for (known, seen) in self.space.disks.iter_mut().zip(checkpoint.spaces) {
            *known = seen.unwrap_or(*known);
        }
    }
}

impl Shared {
    /// The checkpoint job.
    pub fn run_checkpoint(self: &Arc<Self>, files: &dyn Files, mut checkpoint: Checkpoint) {
        match self.perform(files, &mut checkpoint) {
            Ok(()) => self.with(|inner| inner.finish(checkpoint)),
            Err(what) => self.with(|inner| inner.fail(&what)),
        }
    }

    /// Makes a captured checkpoint durable; the error says where and how it failed.
    pub fn perform(&self, files: &dyn Files, checkpoint: &mut Checkpoint) -> Result<(), String> {
        self.write_tables(checkpoint)?;
        if self.config.sync {
            self.flush_objects(files, checkpoint)?;
        }
        self.note_allocated(files, checkpoint);
        let path = self.layout.meta_file(super::layout::INDEX);
        let state = State { tail: checkpoint.tail, epochs: checkpoint.epochs };
        let mut entries = checkpoint.changed.iter().map(|(oid, packed)| (*oid, *packed));
        let doomed: Vec<(u64, u8)> = checkpoint.doomed.keys().copied().collect();
        let changes = Changes { entries: &mut entries, doomed: &doomed, state };
        let index = self.index.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(index) = index.as_ref() else {
            return Err(format!("{}: closed", path.display()));
        };
        index.commit(changes).map_err(|error| format!("{}: write: {error}", path.display()))?;
        checkpoint.spaces = self.layout.disks.iter().map(|disk| files.space(disk).ok()).collect();
        Ok(())
    }

    /// Closed files have theirs: see `handles`, invariant 2.
    fn write_tables(&self, checkpoint: &Checkpoint) -> Result<(), String> {
        for (oid, disk) in &checkpoint.dirty {
            let open = self.lock().handles.get(*oid);
            if let Some(Err(error)) = open.map(|object| object.write_table()) {
                let path = self.layout.object(*disk, *oid);
                return Err(format!("{}: write: {error}{}", path.display(), hint(&error)));
            }
        }
        Ok(())
    }

    fn flush_objects(&self, files: &dyn Files, checkpoint: &Checkpoint) -> Result<(), String> {
        let failed =
            |path: &std::path::Path, error: &io::Error| format!("{}: flush: {error}{}", path.display(), hint(error));
        if checkpoint.dirty.len() <= FLUSHED_SINGLY_MAX {
            for (oid, disk) in &checkpoint.dirty {
                let path = self.layout.object(*disk, *oid);
                self.flush_object(files, *oid, *disk).map_err(|error| failed(&path, &error))?;
            }
        } else {
            let disks: BTreeSet<u8> = checkpoint.dirty.values().copied().collect();
            for disk in disks {
                let path = self.layout.objects(disk);
                files.sync_filesystem(&path).map_err(|error| failed(&path, &error))?;
            }
        }
        for disk in &checkpoint.renamed {
            for path in [self.layout.objects(*disk), self.layout.making(*disk)] {
                files.sync_dir(&path).map_err(|error| failed(&path, &error))?;
            }
        }
        Ok(())
    }

    fn flush_object(&self, files: &dyn Files, oid: u64, disk: u8) -> io::Result<()> {
        let open = self.lock().handles.get(oid);
        if let Some(object) = open {
            return object.sync();
        }
        match files.open(&self.layout.object(disk, oid), OpenMode::Read) {
            Ok(file) => file.sync_data(),
            // Lost to damage, which the applier has reported; or its name is changing hands just now, and the
            // record that does it is replayed.
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
        }
    }

    /// Notes how much space the changed objects take now. It is only a figure: one that cannot be had stays as it was.
    fn note_allocated(&self, files: &dyn Files, checkpoint: &mut Checkpoint) {
        for (oid, disk) in &checkpoint.dirty {
            let Some(Some(packed)) = checkpoint.changed.get_mut(oid) else {
                continue;
            };
            if let Ok(bytes) = self.allocated_now(files, *oid, *disk) {
                *packed = packed.with_allocated(bytes);
            }
        }
    }

    fn allocated_now(&self, files: &dyn Files, oid: u64, disk: u8) -> io::Result<u64> {
        let open = self.lock().handles.get(oid);
        match open {
            Some(object) => object.allocated_bytes(),
            None => files.open(&self.layout.object(disk, oid), OpenMode::Read).and_then(|file| file.allocated_bytes()),
        }
    }
}

impl Store {
    /// Looks how much space the objects take that were changed since the last checkpoint: for people's questions.
    pub async fn measure(&self) {
        let shared = self.shared.clone();
        disk::run(&self.shared.world.disk, move |files| {
            let dirty = shared.lock().dirty.clone();
            for (oid, disk) in dirty {
                let Ok(bytes) = shared.allocated_now(files, oid, disk) else { continue };
                let mut inner = shared.lock();
                // A checkpoint since then has looked at least as late.
                if inner.dirty.get(&oid) == Some(&disk) {
                    inner.entries.set_allocated(oid, bytes);
                }
            }
        })
        .await;
    }

    /// Makes everything submitted durable in its place, so that the next start has nothing to replay.
    pub async fn checkpoint(&self) -> Result<(), StoreError> {
        let target = self.shared.with(Inner::want_checkpoint);
        self.shared.wait_until(|inner| inner.failed.is_some() || inner.checkpointed >= target).await;
        match &self.shared.lock().failed {
            Some(what) => Err(StoreError::Failed { what: what.clone() }),
            None => Ok(()),
        }
    }

    /// Completes when a device has failed and the store takes no changes any more, with what failed: at the latest so long
    /// after it as `LOOK_AGAIN`. Whoever has a change refused knows at once; but the one that met the failure may have been
    /// given up by then.
    pub async fn failed(&self) -> String {
        loop {
            if let Some(what) = &self.shared.lock().failed {
                return what.to_string();
            }
            self.shared.world.clock.sleep(LOOK_AGAIN).await;
        }
    }

    /// Checkpoints everything, takes no changes any more, and lets go of the directory. Reads go on being answered.
    pub async fn close(&self) -> Result<(), StoreError> {
        self.shared.with(|inner| {
            inner.closed = true;
            inner.want_checkpoint();
        });
        self.shared.wait_until(|inner| inner.failed.is_some() || inner.is_quiet()).await;
        let result = match &self.shared.lock().failed {
            Some(what) => Err(StoreError::Failed { what: what.clone() }),
            None => Ok(()),
        };
        let shared = self.shared.clone();
        disk::run(&self.shared.world.disk, move |_| {
            let index = shared.index.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(Err(error)) = index.map(Index::close) {
                tracing::warn!("the index was not closed in order: {error}");
            }
            drop(shared.lock_file.lock().unwrap_or_else(PoisonError::into_inner).take());
        })
        .await;
        result
    }
}
