//! The applier: takes durable records, in order, to the object files.
//!
//! Always holds:
//! 1. A record is applied only after its batch is durable, and after every record before it.
//! 2. Applying is repeatable: replay after a crash applies records again that were applied before, whole or in part.
//! 3. A damaged or missing object file stops nothing: reads of that object say `Corrupt` and recovery replaces it.
//!
//! A new content (create, copy) is built under another name and renamed, so that the object's name never shows half
//! of it.

use std::io;
use std::path::Path;
use std::sync::Arc;

use super::epochs::Epochs;
use super::hint;
use super::object_file::{Base, Header, ObjectFile};
use super::record::{Kind, Record};
use super::state::{Committed, Inner, Shared};
use super::submit::footprint_bytes;
use crate::world::disk::{Files, OpenMode, is_unreadable};

/// What the apply job does next.
pub enum Next {
    /// Applies a record.
    Record(Committed),
    /// Removes the file of an object that the index has forgotten: id, disk.
    Unlink(u64, u8),
    /// Ends.
    Nothing,
}

impl Inner {
    fn next_apply(&mut self) -> Next {
        if let Some((oid, disk)) = self.next_unlink() {
            return Next::Unlink(oid, disk);
        }
        let Some(next) = self.apply_queue.pop_front() else {
            self.applying = false;
            return Next::Nothing;
        };
        if self.is_pinned(&next.queued.record) {
            self.apply_queue.push_front(next);
            self.apply_blocked = true;
            self.applying = false;
            return Next::Nothing;
        }
        Next::Record(next)
    }

    /// A file that nothing needs any more, not a replay either.
    pub fn next_unlink(&mut self) -> Option<(u64, u8)> {
        while let Some((file, number)) = self.unlinkable.pop_front() {
            if self.doomed.get(&file) == Some(&number) {
                return Some(file);
            }
        }
        None
    }

    /// Whether a record has to wait for a checkpoint: see `state`, invariant 5.
    pub fn is_pinned(&self, record: &Record) -> bool {
        record.kind.changes_content()
            && (self.pinned.contains(&record.oid) || self.pinned_running.contains(&record.oid))
    }

    /// Notes that a record is applied.
    pub fn applied(&mut self, committed: Committed) {
        let Committed { queued, batch_end } = committed;
        let record = &queued.record;
        assert_eq!(queued.number, self.applied + 1, "records are applied in the order of their numbers");
        self.applied = queued.number;
        match batch_end {
            Some(end) => self.applied_tail = end,
            None => self.applied_tail.skip += 1,
        }
        self.space.in_flight_bytes -= footprint_bytes(record);
        if record.kind == Kind::Clean {
            self.epochs_applied = Epochs::from_bits(record.extra);
            return;
        }
        self.changed.insert(record.oid, queued.result);
        if record.kind.changes_content() {
            self.dirty.insert(record.oid, record.disk);
        }
        if record.kind.replaces() {
            self.renamed.insert(record.disk);
            self.doomed.remove(&(record.oid, record.disk));
        }
        if record.kind == Kind::Copy {
            self.pinned.insert(record.extra);
        }
        if record.kind == Kind::Remove {
            self.doomed.insert((record.oid, record.disk), queued.number);
            self.handles.remove(record.oid);
            self.replacements += 1;
        }
        if let Some(pending) = self.overlay.get_mut(&record.oid) {
            if pending.front().is_some_and(|front| front.number == queued.number) {
                pending.pop_front();
            }
            if pending.is_empty() {
                self.overlay.remove(&record.oid);
            }
        }
    }
}

impl Shared {
    /// The apply job: one thing after the other until there is nothing to do.
    pub fn apply_committed(self: &Arc<Self>, files: &dyn Files) {
        loop {
            match self.with(Inner::next_apply) {
                Next::Nothing => return,
                Next::Unlink(oid, disk) => self.unlink(files, oid, disk),
                Next::Record(committed) => match self.apply_record(files, &committed.queued.record, Base::Checked) {
                    Ok(()) => {
                        self.outdate_cache(&committed.queued.record);
                        self.with(|inner| inner.applied(committed));
                    }
                    Err(error) => {
                        let path = self.layout.objects(committed.queued.record.disk);
                        let what = format!("{}: write: {error}{}", path.display(), hint(&error));
                        self.with(|inner| inner.fail(&what));
                        return;
                    }
                },
            }
        }
    }

    /// While the overlay still covers the record: see `cache`, invariant 1.
    fn outdate_cache(&self, record: &Record) {
        let Some(cache) = self.cache() else { return };
        match record.kind {
            Kind::Overwrite => cache.forget(record.oid, Some(record.offset..record.offset + record.data.len() as u64)),
            Kind::Create | Kind::Copy | Kind::Install | Kind::Remove => cache.forget(record.oid, None),
            Kind::Confirm | Kind::Clean => {}
        }
    }

    /// Removes a forgotten object's file. On an error the next checkpoint has it tried again.
    pub fn unlink(&self, files: &dyn Files, oid: u64, disk: u8) {
        let path = self.layout.object(disk, oid);
        match files.remove_file(&path) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!("{}: remove: {error}; it is tried again later", path.display());
                return;
            }
        }
        let mut inner = self.lock();
        inner.doomed.remove(&(oid, disk));
        // The index file goes on naming it until the removal is durable.
        inner.renamed.insert(disk);
    }

    /// Brings one record to its object's file.
    pub fn apply_record(&self, files: &dyn Files, record: &Record, base: Base) -> io::Result<()> {
        match record.kind {
            Kind::Overwrite => self.apply_overwrite(files, record, base),
            Kind::Create => {
                let making = self.layout.object_new(record.disk, record.oid);
                let object = ObjectFile::create(files, &making, &header_of(record))?;
                object.write(record.offset, &record.data, Base::Checked)?;
                self.put_in_place(files, record, &making, object)
            }
            Kind::Copy => self.apply_copy(files, record, base),
            Kind::Install => {
                let staged = self.layout.object_incoming(record.disk, record.oid, record.extra);
                match files.rename(&staged, &self.layout.object(record.disk, record.oid)) {
                    Err(error) if error.kind() == io::ErrorKind::NotFound => {
                        self.lose(files, record, "its staged file")?;
                    }
                    other => other?,
                }
                self.forget_handle(record.oid);
                Ok(())
            }
            Kind::Remove | Kind::Confirm | Kind::Clean => Ok(()),
        }
    }

    fn apply_overwrite(&self, files: &dyn Files, record: &Record, base: Base) -> io::Result<()> {
        let object = match self.handle(files, record.oid, record.disk, record.size_bytes) {
            Err(error) if base == Base::Replayed && is_unreadable(&error) => {
                return self.overwrite_headless(files, record);
            }
            other => other?,
        };
        let Some(object) = object else {
            tracing::error!("object {:016x}: its file is missing or damaged; recovery will replace it", record.oid);
            return Ok(());
        };
        if !object.write(record.offset, &record.data, base)? {
            tracing::error!("object {:016x}: a damaged block was written in part and stays damaged", record.oid);
        }
        Ok(())
    }

    /// Writes to a file whose header cannot be read now. If it can be later, this write must be there; if it never can, the
    /// next write to the object would end the node, so it is written anew.
    fn overwrite_headless(&self, files: &dyn Files, record: &Record) -> io::Result<()> {
        let path = self.layout.object(record.disk, record.oid);
        let written = ObjectFile::open_headless(files, &path, record.size_bytes).and_then(|object| {
            let Some(object) = object else { return Ok(false) };
            object.set_header(&header_of(record))?;
            object.write(record.offset, &record.data, Base::Replayed)?;
            object.sync().map(|()| true)
        });
        match written {
            Ok(true) => {
                tracing::error!("object {:016x}: the header of its file could not be read: written anew", record.oid);
                Ok(())
            }
            Err(error) if !is_unreadable(&error) => Err(error),
            Ok(false) | Err(_) => self.lose(files, record, "its file"),
        }
    }

    /// Looks whether a file that was put in place before a crash can be opened: every checkpoint would fail at it.
    pub fn check_installed(&self, files: &dyn Files, record: &Record) -> io::Result<()> {
        match files.open(&self.layout.object(record.disk, record.oid), OpenMode::Write) {
            Err(error) if is_unreadable(&error) => self.lose(files, record, "its file"),
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            Ok(_) | Err(_) => Ok(()),
        }
    }

    fn apply_copy(&self, files: &dyn Files, record: &Record, base: Base) -> io::Result<()> {
        let source = self.layout.object(record.source_disk, record.extra);
        let making = self.layout.object_new(record.disk, record.oid);
        let open = self.lock().handles.get(record.extra);
        if let Some(open) = open {
            open.write_table()?;
        }
        match files.copy(&source, &making) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                return self.lose(files, record, "the object it is copied from");
            }
            Err(error) if base == Base::Replayed && is_unreadable(&error) => {
                return self.lose(files, record, "the object it is copied from");
            }
            other => other?,
        }
        // A copy that shares its blocks with the source meets its bad sectors only here. Damage that was copied along stays
        // recognizable: its checksums came along too.
        let adopted = ObjectFile::adopt(files, &making, record.extra, &header_of(record)).and_then(|adopted| {
            let Some(object) = adopted else { return Ok(None) };
            object.write(record.offset, &record.data, Base::Checked).map(|_| Some(object))
        });
        match adopted {
            Ok(Some(object)) => self.put_in_place(files, record, &making, object),
            Err(error) if base == Base::Checked || !is_unreadable(&error) => Err(error),
            Ok(None) | Err(_) => self.lose(files, record, "the object it is copied from"),
        }
    }

    /// The content of this version cannot be had: nothing older may be served in its place.
    fn lose(&self, files: &dyn Files, record: &Record, what: &str) -> io::Result<()> {
        tracing::error!("object {:016x}: {what} is missing or damaged; recovery will replace it", record.oid);
        self.forget_handle(record.oid);
        match files.remove_file(&self.layout.object(record.disk, record.oid)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => other?,
        }
        // The next checkpoint makes the removal durable: until then the record is replayed.
        self.lock().renamed.insert(record.disk);
        Ok(())
    }

    fn put_in_place(&self, files: &dyn Files, record: &Record, making: &Path, object: ObjectFile) -> io::Result<()> {
        files.rename(making, &self.layout.object(record.disk, record.oid))?;
        let unwritten = {
            let mut inner = self.lock();
            inner.replacements += 1;
            inner.handles.insert(record.oid, Arc::new(object));
            inner.handles.unwritten()
        };
        write_tables(&unwritten);
        Ok(())
    }

    fn forget_handle(&self, oid: u64) {
        let mut inner = self.lock();
        inner.replacements += 1;
        inner.handles.remove(oid);
    }

    /// The open file of an object; `None` if it is missing or not the file of that object and size.
    pub fn handle(
        &self,
        files: &dyn Files,
        oid: u64,
        disk: u8,
        size_bytes: u64,
    ) -> io::Result<Option<Arc<ObjectFile>>> {
        loop {
            let replacements = {
                let mut inner = self.lock();
                if let Some(object) = inner.handles.get(oid) {
                    return Ok((object.geometry().size_bytes == size_bytes).then_some(object));
                }
                inner.replacements
            };
            let Some(object) = ObjectFile::open(files, &self.layout.object(disk, oid), oid, size_bytes)? else {
                return Ok(None);
            };
            let mut inner = self.lock();
            if let Some(object) = inner.handles.get(oid) {
                return Ok((object.geometry().size_bytes == size_bytes).then_some(object));
            }
            if inner.replacements == replacements {
                let object = Arc::new(object);
                inner.handles.insert(oid, object.clone());
                let unwritten = inner.handles.unwritten();
                drop(inner);
                write_tables(&unwritten);
                return Ok(Some(object));
            }
        }
    }
}

/// Makes files such that they may be closed.
fn write_tables(objects: &[Arc<ObjectFile>]) {
    for object in objects {
        if let Err(error) = object.write_table() {
            // The next checkpoint meets it again, and says which file it is.
            tracing::warn!("cannot write an object's checksums: {error}; the next checkpoint tries again");
        }
    }
}

fn header_of(record: &Record) -> Header {
    Header { oid: record.oid, size_bytes: record.size_bytes, version: record.version }
}
