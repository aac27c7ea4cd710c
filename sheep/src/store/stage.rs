//! Whole objects from recovery: collected beside the journal, then put in place at once.
//!
//! Always holds:
//! 1. Nothing of a staged object is visible before [`Staged::install`] succeeded; then all of it is.
//! 2. The staged file is durable before the journal names it, so that a replay finds it or finds it in place.
//!
//! A crash before the install leaves a file that the next start removes.

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::stamp::Version;

use super::entries::Packed;
use super::object_file::{Header, OBJECT_BYTES_MAX, ObjectFile};
use super::record::{Kind, Record};
use super::state::Shared;
use super::submit::{SPACE_FLOOR_BYTES, small};
use super::{Store, StoreError, hint};
use crate::world::disk::{self, Files};

/// Header and checksums of the largest object, rounded up.
const FILE_BYTES_MIN: u64 = 4 << 20;

/// An object that is being collected. Dropping it without installing it removes what was collected.
pub struct Staged {
    shared: Arc<Shared>,
    object: Option<Arc<ObjectFile>>,
    path: PathBuf,
    oid: u64,
    size_bytes: u64,
    disk: u8,
    number: u64,
}

impl Store {
    /// Begins to collect an object of zeros. May use the reserve.
    pub async fn stage(&self, oid: Oid, size_bytes: u64) -> Result<Staged, StoreError> {
        if size_bytes == 0 || size_bytes > OBJECT_BYTES_MAX {
            return Err(StoreError::OutOfRange);
        }
        let oid = oid.raw();
        let disk = {
            let inner = self.shared.lock();
            if let Some(error) = inner.stopped() {
                return Err(error);
            }
            inner.entries.get(oid).map_or_else(|| self.shared.layout.disk_of_new(oid), Packed::disk)
        };
        let number = self.shared.world.rng.next_u64();
        let path = self.shared.layout.object_incoming(disk, oid, number);
        let mut staged =
            Staged { shared: self.shared.clone(), object: None, path: path.clone(), oid, size_bytes, disk, number };
        let header = Header { oid, size_bytes, version: Version::default() };
        let shared = self.shared.clone();
        let made = disk::run(&self.shared.world.disk, move |files| {
            shared.check_room_to_stage(files, disk, FILE_BYTES_MIN)?;
            ObjectFile::create(files, &path, &header).inspect_err(|_| {
                // What cannot be removed is removed by the next start.
                let _ = files.remove_file(&path);
            })
        });
        staged.object = Some(Arc::new(made.await.map_err(|error| staged.error(&error))?));
        Ok(staged)
    }
}

impl Staged {
    fn error(&self, error: &io::Error) -> StoreError {
        if error.kind() == io::ErrorKind::StorageFull {
            return StoreError::NoSpace;
        }
        StoreError::Failed { what: format!("{}: write: {error}{}", self.path.display(), hint(error)).into() }
    }

    fn object(&self) -> Arc<ObjectFile> {
        let object = self.object.clone();
        object.expect("`stage` gives out only what has its file")
    }

    /// Lays bytes at offsets, one after the other. Blocks of zeros that were not written before stay holes.
    pub async fn write(&self, parts: Vec<(u64, Bytes)>) -> Result<(), StoreError> {
        let fits = |(offset, data): &(u64, Bytes)| {
            offset.checked_add(data.len() as u64).is_some_and(|end| end <= self.size_bytes)
        };
        if !parts.iter().all(fits) {
            return Err(StoreError::OutOfRange);
        }
        let object = self.object();
        let (shared, disk) = (self.shared.clone(), self.disk);
        let written = disk::run(&self.shared.world.disk, move |files| {
            shared.check_room_to_stage(files, disk, parts.iter().map(|(_, data)| data.len() as u64).sum())?;
            parts.iter().try_for_each(|(offset, data)| object.write_sparse(*offset, data))
        });
        let written = written.await;
        written.map_err(|error| self.error(&error))
    }

    /// Has blocks (number, tag) read as damaged: what they held at this version is nowhere to be found. They heal when they
    /// are written whole, or replaced by a copy that has them.
    pub async fn set_damaged(&self, blocks: Vec<(u32, u32)>) -> Result<(), StoreError> {
        let object = self.object();
        if blocks.iter().any(|(block, _)| u64::from(*block) >= object.geometry().block_count()) {
            return Err(StoreError::OutOfRange);
        }
        let marked = disk::run(&self.shared.world.disk, move |_| {
            blocks.iter().try_for_each(|(block, tag)| object.set_damaged(u64::from(*block), *tag))
        });
        marked.await.map_err(|error| self.error(&error))
    }

    /// Puts the object in place, durably, under this version. Refused if the local copy is newer by now.
    pub async fn install(mut self, version: Version) -> Result<(), StoreError> {
        let object = self.object();
        let header = Header { oid: self.oid, size_bytes: self.size_bytes, version };
        let (shared, making) = (self.shared.clone(), self.shared.layout.making(self.disk));
        let flushed = disk::run(&self.shared.world.disk, move |files| {
            object.set_header(&header)?;
            object.write_table()?;
            let allocated = object.allocated_bytes()?;
            if !shared.config.sync {
                return Ok(allocated);
            }
            object.sync()?;
            files.sync_dir(&making)?;
            Ok(allocated)
        })
        .await;
        let allocated = flushed.map_err(|error: std::io::Error| self.error(&error))?;
        let record = Record {
            oid: self.oid,
            version,
            size_bytes: self.size_bytes,
            disk: self.disk,
            extra: self.number,
            ..small(Kind::Install)
        };
        let ticket = self.shared.with(|inner| {
            let before = inner.entries.get(self.oid);
            if before.is_some_and(|entry| entry.version().stamp > version.stamp) {
                return Err(StoreError::Superseded);
            }
            if before.is_some_and(|entry| entry.disk() != self.disk) {
                // It was removed and made again on another disk meanwhile: the same as a newer copy.
                return Err(StoreError::Superseded);
            }
            match inner.stopped() {
                Some(error) => Err(error),
                None => {
                    let ticket = inner.push_small(record);
                    // It takes no room in the journal that would bring on a checkpoint, which looks at sizes.
                    inner.entries.set_allocated(self.oid, allocated);
                    Ok(ticket)
                }
            }
        })?;
        // From here on the journal owns the file.
        self.object = None;
        ticket.await
    }
}

impl Shared {
    /// Whether a disk has room for more of a staged object beside what was promised to writes. A disk that recovery fills to
    /// the brim can neither be checkpointed nor have anything removed: the node would end, and not start again.
    fn check_room_to_stage(&self, files: &dyn Files, disk: u8, bytes: u64) -> io::Result<()> {
        let free_bytes = files.space(&self.layout.objects(disk))?.free_bytes;
        let kept_bytes = SPACE_FLOOR_BYTES + self.lock().space.in_flight_bytes;
        if free_bytes < kept_bytes + bytes { Err(io::ErrorKind::StorageFull.into()) } else { Ok(()) }
    }
}

impl Drop for Staged {
    fn drop(&mut self) {
        if self.object.take().is_none() {
            return;
        }
        let path = self.path.clone();
        self.shared.world.disk.spawn(Box::new(move |files| {
            if let Err(error) = files.remove_file(&path) {
                tracing::warn!("{}: remove: {error}; the next start removes it", path.display());
            }
        }));
    }
}
