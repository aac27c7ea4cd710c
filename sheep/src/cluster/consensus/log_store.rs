//! The log: in memory for reading, in the files of [`log_file`] for good.
//!
//! Always holds:
//! 1. Whoever is told that entries, a vote or a purge are written can rely on it after a power loss.
//! 2. Reading never touches the disk. A write that fails ends the process: what the disk holds is unknown from then on,
//!    and neither a vote nor an acknowledgement may be built on it.
//! 3. Entries leave the log only when a durable snapshot has them.
//!
//! How far the order is committed is written along with the next batch and not waited for: after a crash the leader tells
//! it anew.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::fmt::Debug;
use std::io::IoSlice;
use std::ops::RangeBounds;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use openraft::storage::{LogFlushed, RaftLogStorage};
use openraft::{LogId, LogState, OptionalSend, RaftLogReader, StorageError, Vote};
use tokio::sync::{Notify, watch};

use super::Types;
use super::format::{LogEntry, Mark};
use super::log_file::{self, Found, Held, Image, Record, encode_batch, encoded_bytes, failed};
use crate::cluster::driver::OrderError;
use crate::world::disk::{File, Files, OpenMode};
use crate::world::marks;
use crate::world::planted::{self, Bug};
use crate::world::{Disk, World, disk};

/// A file longer than this is followed by the next one. Removing a file gives back what was purged.
const FILE_BYTES: u64 = 4 << 20;
/// Entries that are read for another voter at once, so that a message stays far below what a connection takes.
const READ_BYTES_MAX: usize = 4 << 20;
/// A snapshot is made when this much was appended since the last one, even if that is only a few entries.
const SNAPSHOT_AFTER_BYTES: u64 = 8 << 20;

/// Ends the process, because it cannot rely on its disk any more.
pub(super) async fn give_up(disk: &Arc<dyn Disk>, error: &OrderError) -> Infallible {
    let reason = format!("lost the cluster's order: {error}");
    tracing::error!("{reason}");
    disk.end_process(&reason).await
}

/// The log. Clones are the same log.
#[derive(Clone)]
pub(super) struct LogStore {
    disk: Arc<dyn Disk>,
    image: Arc<RwLock<Image>>,
    writer: Arc<Mutex<Writer>>,
    /// Up to which index a durable snapshot has everything; `None` in tests that purge without one.
    covered: Option<watch::Receiver<Option<u64>>>,
    /// Told when so much was appended that a snapshot is due.
    pub large: Arc<Notify>,
}

/// The end of the last file.
struct Writer {
    directory: PathBuf,
    cluster: u64,
    /// By number, with the highest index in each.
    files: BTreeMap<u64, Option<u64>>,
    number: u64,
    file: Arc<dyn File>,
    position: u64,
    /// As last written.
    committed: Option<Mark>,
    since_snapshot: u64,
}

impl LogStore {
    /// Reads the log in a directory, which is made if it is missing.
    pub async fn open(
        world: &World,
        directory: PathBuf,
        cluster: u64,
        covered: Option<watch::Receiver<Option<u64>>>,
    ) -> Result<LogStore, OrderError> {
        let opened = disk::run(&world.disk, move |files| {
            disk::make_dir(files, &directory).map_err(failed("make", &directory))?;
            let found = log_file::read_all(files, &directory, cluster)?;
            Writer::begin(files, directory, cluster, found)
        });
        let (writer, image) = opened.await?;
        Ok(LogStore {
            disk: world.disk.clone(),
            image: Arc::new(RwLock::new(image)),
            writer: Arc::new(Mutex::new(writer)),
            covered,
            large: Arc::new(Notify::new()),
        })
    }

    /// What was purged. A snapshot must have it.
    pub fn purged(&self) -> Option<Mark> {
        self.image.read().unwrap_or_else(PoisonError::into_inner).purged
    }

    /// Writes how far the order is committed, for a quick start.
    pub async fn flush(&self) {
        self.write(Vec::new()).await;
    }

    /// Makes the records durable, one batch for all.
    async fn write(&self, mut records: Vec<Record>) {
        let store = self.clone();
        let written = disk::run(&self.disk, move |files| {
            let mut writer = store.writer.lock().unwrap_or_else(PoisonError::into_inner);
            let begin = {
                let image = store.image.read().unwrap_or_else(PoisonError::into_inner);
                if let Some(upto) = image.committed.filter(|committed| Some(*committed) != writer.committed) {
                    records.insert(0, Record::Committed { upto });
                    writer.committed = Some(upto);
                }
                writer.begin_record(&image)
            };
            writer.append(files, &begin, &records)
        });
        match written.await {
            Ok(true) => self.large.notify_one(),
            Ok(false) => {}
            Err(error) => match give_up(&self.disk, &error).await {},
        }
    }

    fn change<T>(&self, change: impl FnOnce(&mut Image) -> T) -> T {
        change(&mut self.image.write().unwrap_or_else(PoisonError::into_inner))
    }

    /// The entries of a range whose bytes do not exceed `bytes_max`, but at least one.
    pub fn read(&self, range: impl RangeBounds<u64>, bytes_max: usize) -> Vec<openraft::Entry<Types>> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        let mut total = 0;
        let held = image.entries.range(range).map(|(_, held)| held).take_while(|held| {
            let is_first = total == 0;
            total += held.bytes;
            is_first || total <= bytes_max
        });
        held.map(|held| held.entry.clone()).collect()
    }
}

impl Writer {
    /// Cuts what is torn and makes the end of the log ready for the next batch.
    fn begin(files: &dyn Files, directory: PathBuf, cluster: u64, found: Found) -> Result<(Writer, Image), OrderError> {
        let number = found.files.last_key_value().map_or(0, |(number, _)| *number);
        let path = log_file::path(&directory, number);
        // The log holds what the cluster keeps secret.
        let exists = files.exists(&path).map_err(failed("look for", &path))?;
        let mode = if exists { OpenMode::Write } else { OpenMode::Private };
        let file = files.open(&path, mode).map_err(failed("open", &path))?;
        let position = found.last_bytes.unwrap_or(0);
        if file.len().map_err(failed("read", &path))? > position {
            marks::hit(marks::Mark::OrderTailCut);
            tracing::warn!("cut a torn record off {} at byte {position}", path.display());
            file.set_len(position).map_err(failed("cut", &path))?;
        }
        // What the last life wrote may not be durable yet, and this one builds on it.
        file.sync_data().map_err(failed("sync", &path))?;
        files.sync_dir(&directory).map_err(failed("sync", &directory))?;
        let committed = found.image.committed;
        let mut writer =
            Writer { directory, cluster, files: found.files, number, file, position, committed, since_snapshot: 0 };
        writer.files.entry(number).or_insert(None);
        if position == 0 {
            let begin = writer.begin_record(&found.image);
            writer.put(std::slice::from_ref(&begin))?;
        }
        writer.remove_purged(files, found.image.purged)?;
        Ok((writer, found.image))
    }

    fn begin_record(&self, image: &Image) -> Record {
        let Image { ballot, purged, committed, .. } = image;
        Record::Begin { cluster: self.cluster, ballot: *ballot, purged: *purged, committed: *committed }
    }

    /// Writes a batch, in the next file if this one is long enough. True if a snapshot is due.
    fn append(&mut self, files: &dyn Files, begin: &Record, records: &[Record]) -> Result<bool, OrderError> {
        if records.is_empty() {
            return Ok(false);
        }
        if self.position >= FILE_BYTES {
            self.begin_next_file(files, begin)?;
        }
        let before = self.position;
        self.put(records)?;
        self.since_snapshot += self.position - before;
        for record in records {
            match record {
                Record::Entry(entry) => {
                    let highest = self.files.entry(self.number).or_insert(None);
                    *highest = (*highest).max(Some(entry.mark.index));
                }
                Record::Purge { upto } => self.remove_purged(files, Some(*upto))?,
                _ => {}
            }
        }
        let is_due = self.since_snapshot >= SNAPSHOT_AFTER_BYTES;
        if is_due {
            self.since_snapshot = 0;
        }
        Ok(is_due)
    }

    fn put(&mut self, records: &[Record]) -> Result<(), OrderError> {
        let bytes = encode_batch(self.position, records);
        let path = log_file::path(&self.directory, self.number);
        self.file.write_at(&[IoSlice::new(&bytes)], self.position).map_err(failed("append to", &path))?;
        self.file.sync_data().map_err(failed("sync", &path))?;
        self.position += bytes.len() as u64;
        Ok(())
    }

    fn begin_next_file(&mut self, files: &dyn Files, begin: &Record) -> Result<(), OrderError> {
        let path = log_file::path(&self.directory, self.number + 1);
        self.file = files.open(&path, OpenMode::Private).map_err(failed("create", &path))?;
        self.number += 1;
        self.position = 0;
        self.files.insert(self.number, None);
        self.put(std::slice::from_ref(begin))?;
        files.sync_dir(&self.directory).map_err(failed("sync", &self.directory))
    }

    /// Removes the files from the oldest on that hold nothing but what was purged. The purge itself is durable, in a later
    /// file.
    fn remove_purged(&mut self, files: &dyn Files, purged: Option<Mark>) -> Result<(), OrderError> {
        while let Some((number, highest)) = self.files.first_key_value() {
            if *number == self.number || *highest > purged.map(|purged| purged.index) {
                break;
            }
            let path = log_file::path(&self.directory, *number);
            files.remove_file(&path).map_err(failed("remove", &path))?;
            // One after the other, so that a power loss leaves no gap between the files.
            files.sync_dir(&self.directory).map_err(failed("sync", &self.directory))?;
            self.files.pop_first();
        }
        Ok(())
    }
}

impl RaftLogReader<Types> for LogStore {
    async fn try_get_log_entries<RB: RangeBounds<u64> + Clone + Debug + OptionalSend>(
        &mut self,
        range: RB,
    ) -> Result<Vec<openraft::Entry<Types>>, StorageError<u64>> {
        Ok(self.read(range, usize::MAX))
    }

    async fn limited_get_log_entries(
        &mut self,
        start: u64,
        end: u64,
    ) -> Result<Vec<openraft::Entry<Types>>, StorageError<u64>> {
        Ok(self.read(start..end, READ_BYTES_MAX))
    }
}

impl RaftLogStorage<Types> for LogStore {
    type LogReader = LogStore;

    async fn get_log_state(&mut self) -> Result<LogState<Types>, StorageError<u64>> {
        let image = self.image.read().unwrap_or_else(PoisonError::into_inner);
        Ok(LogState { last_purged_log_id: image.purged.map(LogId::from), last_log_id: image.last().map(LogId::from) })
    }

    async fn get_log_reader(&mut self) -> LogStore {
        self.clone()
    }

    async fn save_vote(&mut self, vote: &Vote<u64>) -> Result<(), StorageError<u64>> {
        let ballot = (*vote).into();
        if !planted::is(Bug::ForgottenVote) {
            self.write(vec![Record::Vote(ballot)]).await;
        }
        self.change(|image| image.ballot = Some(ballot));
        Ok(())
    }

    async fn read_vote(&mut self) -> Result<Option<Vote<u64>>, StorageError<u64>> {
        Ok(self.image.read().unwrap_or_else(PoisonError::into_inner).ballot.map(Vote::from))
    }

    async fn save_committed(&mut self, committed: Option<LogId<u64>>) -> Result<(), StorageError<u64>> {
        self.change(|image| image.committed = committed.map(Mark::from));
        Ok(())
    }

    async fn read_committed(&mut self) -> Result<Option<LogId<u64>>, StorageError<u64>> {
        Ok(self.image.read().unwrap_or_else(PoisonError::into_inner).committed.map(LogId::from))
    }

    async fn append<I>(&mut self, entries: I, callback: LogFlushed<Types>) -> Result<(), StorageError<u64>>
    where
        I: IntoIterator<Item = openraft::Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let entries: Vec<_> = entries.into_iter().collect();
        let records: Vec<LogEntry> = entries.iter().map(LogEntry::from).collect();
        let sizes: Vec<usize> = records.iter().map(encoded_bytes).collect();
        self.write(records.into_iter().map(Record::Entry).collect()).await;
        self.change(|image| {
            for (entry, bytes) in entries.into_iter().zip(sizes) {
                image.entries.insert(entry.log_id.index, Held { entry, bytes });
            }
        });
        callback.log_io_completed(Ok(()));
        Ok(())
    }

    async fn truncate(&mut self, log_id: LogId<u64>) -> Result<(), StorageError<u64>> {
        self.write(vec![Record::Truncate { since: log_id.index }]).await;
        self.change(|image| drop(image.entries.split_off(&log_id.index)));
        Ok(())
    }

    async fn purge(&mut self, log_id: LogId<u64>) -> Result<(), StorageError<u64>> {
        // The library purges what a snapshot from the leader covers while that is still being installed. Were the purge
        // durable first, a crash in between would leave a log whose beginning is nowhere.
        if let Some(mut covered) = self.covered.clone() {
            let is_covered = covered.wait_for(|covered| *covered >= Some(log_id.index)).await.is_ok();
            if !is_covered {
                // The state machine is gone: this node is stopping, and the next start purges again.
                return Ok(());
            }
        }
        let upto = Mark::from(log_id);
        self.write(vec![Record::Purge { upto }]).await;
        self.change(|image| {
            image.purged = Some(upto).max(image.purged);
            image.entries = image.entries.split_off(&(upto.index + 1));
        });
        Ok(())
    }
}
