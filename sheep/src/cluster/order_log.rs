//! The shared log file of the `local` driver.
//!
//! `DIRECTORY/order.N` is a sequence of records: length (u32), CRC-32C of the body (u32), body (postcard). The first record
//! of a file is a snapshot of the state; the last record of a file that has a successor is `Sealed`, and `order.N+1`
//! begins with the state at that point. Only the holder of `DIRECTORY/order.lock` appends.
//!
//! A crash in mid-append leaves a torn record at the end. Readers without the lock stop before it (it might still be
//! growing); the next appender cuts it off: its proposer never heard that it was ordered.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sheep_core::cluster_state::ClusterState;
use sheep_core::command::{Command, Outcome};

use super::driver::OrderError;
use crate::world::disk::{File, FileLock, Files, OpenMode, make_dir};

const RECORD_HEADER_BYTES: usize = 8;
/// A snapshot of 16 million VDIs would be larger; a length above this is damage.
const RECORD_BYTES_MAX: usize = 1 << 30;
/// A file longer than this is followed by the next one: reading it at the start takes some ten milliseconds.
const FILE_BYTES_MAX: u64 = 4 << 20;

#[derive(Serialize, Deserialize)]
enum Record {
    Snapshot(Box<ClusterState>),
    Command(Command),
    Sealed,
}

/// This process's reading position, and the state up to it.
pub(super) struct OrderLog {
    directory: PathBuf,
    number: u64,
    file: Option<Arc<dyn File>>,
    position: u64,
    /// What all records up to `position` made.
    pub state: ClusterState,
    /// Where this file becomes long enough for a next one.
    next_file_at: u64,
    /// Goes up with every record that was read or appended.
    pub changes: u64,
}

/// Held while appending.
pub(super) struct AppendLock {
    _lock: Box<dyn FileLock>,
}

fn failed(action: &'static str, place: &Path) -> impl FnOnce(io::Error) -> OrderError {
    let place = place.display().to_string();
    move |error| OrderError::Io { action, place, error }
}

impl OrderLog {
    /// A log that has read nothing yet. Makes the directory.
    pub fn open(files: &dyn Files, directory: &Path) -> Result<OrderLog, OrderError> {
        make_dir(files, directory).map_err(failed("make", directory))?;
        let mut log = OrderLog {
            directory: directory.to_path_buf(),
            number: 0,
            file: None,
            position: 0,
            state: ClusterState::default(),
            next_file_at: FILE_BYTES_MAX,
            changes: 0,
        };
        // A file whose predecessor is not sealed was left by a crash in the middle of beginning it: the order goes on in the
        // predecessor. So reading begins at the oldest file and goes where the seals lead.
        log.number = log.oldest(files, 0)?.unwrap_or(0);
        Ok(log)
    }

    /// Waits for the right to append.
    pub fn lock(&self, files: &dyn Files) -> Result<AppendLock, OrderError> {
        let path = self.directory.join("order.lock");
        Ok(AppendLock { _lock: files.lock(&path).map_err(failed("lock", &path))? })
    }

    /// The lowest number from `first` among the files; what a crashed snapshot left under another name does not count.
    fn oldest(&self, files: &dyn Files, first: u64) -> Result<Option<u64>, OrderError> {
        let entries = files.read_dir(&self.directory).map_err(failed("list", &self.directory))?;
        let numbers = entries.iter().filter_map(|entry| entry.name.strip_prefix("order.")?.parse().ok());
        Ok(numbers.filter(|number| *number >= first).min())
    }

    fn path(&self, number: u64) -> PathBuf {
        self.directory.join(format!("order.{number}"))
    }

    /// Applies everything that was appended since the last call; true if that was anything.
    pub fn catch_up(&mut self, files: &dyn Files) -> Result<bool, OrderError> {
        let mut moved = false;
        loop {
            let path = self.path(self.number);
            let file = match &self.file {
                Some(file) => file.clone(),
                None => match files.open(&path, OpenMode::Write) {
                    Ok(file) => self.file.insert(file).clone(),
                    Err(error) if error.kind() == io::ErrorKind::NotFound => return self.find_file(files, moved),
                    Err(error) => return Err(failed("open", &path)(error)),
                },
            };
            let length = file.len().map_err(failed("read", &path))?;
            if length <= self.position {
                return Ok(moved);
            }
            let mut bytes = vec![0; (length - self.position) as usize];
            let count = file.read_at(&mut bytes, self.position).map_err(failed("read", &path))?;
            let (consumed, sealed) = self.apply_records(&bytes[..count], &path)?;
            moved |= consumed > 0;
            if !sealed {
                return Ok(moved);
            }
        }
    }

    /// The file is missing: nobody has begun yet, or it was removed after its successors were made.
    fn find_file(&mut self, files: &dyn Files, moved: bool) -> Result<bool, OrderError> {
        match self.oldest(files, self.number + 1)? {
            Some(number) => {
                self.number = number;
                self.position = 0;
                self.catch_up(files)
            }
            _ => Ok(moved),
        }
    }

    fn apply_records(&mut self, mut bytes: &[u8], path: &Path) -> Result<(u64, bool), OrderError> {
        let begin = self.position;
        while let Some((record, length)) = next_record(bytes, path)? {
            bytes = &bytes[length..];
            self.position += length as u64;
            self.changes += 1;
            match record {
                // A snapshot never takes this node back: it begins a file whose predecessor this node has read, or it is
                // what a node brought that remembers more than the log did.
                Record::Snapshot(state) => self.state = *state,
                Record::Command(command) => {
                    self.state.apply(&command);
                }
                Record::Sealed => {
                    self.number += 1;
                    self.file = None;
                    self.position = 0;
                    return Ok((length as u64, true));
                }
            }
        }
        Ok((self.position - begin, false))
    }

    /// Appends a command and applies it. Everything before must have been read under the same lock.
    pub fn append(&mut self, files: &dyn Files, _lock: &AppendLock, command: Command) -> Result<Outcome, OrderError> {
        let outcome = {
            let mut next = self.state.clone();
            let outcome = next.apply(&command);
            self.write(files, &Record::Command(command))?;
            self.state = next;
            outcome
        };
        if self.position > self.next_file_at {
            // The command is in the order whatever comes of this; the next one tries again.
            if let Err(error) = self.begin_next_file(files) {
                tracing::warn!("cannot begin the next file of the order: {error}");
            }
        }
        Ok(outcome)
    }

    /// Puts a whole state into the order: what a node remembers of a cluster whose log is gone or behind.
    pub fn append_snapshot(
        &mut self,
        files: &dyn Files,
        _lock: &AppendLock,
        state: ClusterState,
    ) -> Result<(), OrderError> {
        self.write(files, &Record::Snapshot(Box::new(state.clone())))?;
        self.state = state;
        Ok(())
    }

    fn write(&mut self, files: &dyn Files, record: &Record) -> Result<(), OrderError> {
        let path = self.path(self.number);
        let file = match &self.file {
            Some(file) => file.clone(),
            None => {
                let file = files.open(&path, OpenMode::Create).map_err(failed("create", &path))?;
                files.sync_dir(&self.directory).map_err(failed("sync", &self.directory))?;
                self.file.insert(file).clone()
            }
        };
        // Whatever lies behind the last whole record is the torn end of a proposer that crashed.
        file.set_len(self.position).map_err(failed("cut", &path))?;
        let bytes = encode(record);
        file.write_at(&[io::IoSlice::new(&bytes)], self.position).map_err(failed("append to", &path))?;
        file.sync_data().map_err(failed("sync", &path))?;
        self.position += bytes.len() as u64;
        self.changes += 1;
        Ok(())
    }

    fn begin_next_file(&mut self, files: &dyn Files) -> Result<(), OrderError> {
        let temporary = self.directory.join("next-order");
        let target = self.path(self.number + 1);
        let file = files.open(&temporary, OpenMode::Truncate).map_err(failed("create", &temporary))?;
        let bytes = encode(&Record::Snapshot(Box::new(self.state.clone())));
        file.write_at(&[io::IoSlice::new(&bytes)], 0).map_err(failed("write", &temporary))?;
        file.sync_data().map_err(failed("sync", &temporary))?;
        files.rename(&temporary, &target).map_err(failed("rename", &temporary))?;
        files.sync_dir(&self.directory).map_err(failed("sync", &self.directory))?;
        self.write(files, &Record::Sealed)?;
        // From here on the order goes on in the next file.
        let sealed = self.number;
        self.number += 1;
        self.file = None;
        self.position = bytes.len() as u64;
        self.next_file_at = FILE_BYTES_MAX.max(2 * self.position);
        // Two files back nobody can still be reading: every node polls many times in the life of a file, and one that
        // slept through it starts over from the newest.
        if let Some(old) = sealed.checked_sub(1) {
            match files.remove_file(&self.path(old)) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    return Err(failed("remove", &self.path(old))(error));
                }
                _ => {}
            }
        }
        Ok(())
    }
}

fn encode(record: &Record) -> Vec<u8> {
    let body = postcard::to_allocvec(record).expect("the state's types have no unserialisable values");
    let mut bytes = Vec::with_capacity(RECORD_HEADER_BYTES + body.len());
    bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&checksum(&body).to_le_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

fn checksum(body: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, body) as u32
}

/// The next whole record and its length; `None` at a torn or unfinished end.
fn next_record(bytes: &[u8], path: &Path) -> Result<Option<(Record, usize)>, OrderError> {
    let Some((header, rest)) = bytes.split_first_chunk::<RECORD_HEADER_BYTES>() else { return Ok(None) };
    let length = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
    let expected = u32::from_le_bytes([header[4], header[5], header[6], header[7]]);
    if length > RECORD_BYTES_MAX || length > rest.len() || checksum(&rest[..length]) != expected {
        return Ok(None);
    }
    match postcard::from_bytes(&rest[..length]) {
        Ok(record) => Ok(Some((record, RECORD_HEADER_BYTES + length))),
        Err(error) => Err(OrderError::Unreadable { place: path.display().to_string(), reason: error.to_string() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::real_disk::RealFiles;

    fn shutdown_count(log: &OrderLog) -> u64 {
        log.state.applied
    }

    #[test]
    fn two_readers_see_the_same_order_across_files() {
        let directory = tempfile::tempdir().unwrap();
        let files = RealFiles;
        let mut one = OrderLog::open(&files, directory.path()).unwrap();
        let mut two = OrderLog::open(&files, directory.path()).unwrap();
        for round in 0..200_u64 {
            let log = if round % 3 == 0 { &mut two } else { &mut one };
            let lock = log.lock(&files).unwrap();
            log.catch_up(&files).unwrap();
            // A long name makes the file grow beyond its limit.
            let command = Command::DeleteVdi { name: vec![b'x'; 60_000], tag: Vec::new(), snapshot_id: 0 };
            log.append(&files, &lock, command).unwrap();
        }
        one.catch_up(&files).unwrap();
        two.catch_up(&files).unwrap();
        assert!(one.number > 0, "the log went on in a second file");
        assert_eq!(shutdown_count(&one), 200);
        assert_eq!(one.state, two.state);
        let mut late = OrderLog::open(&files, directory.path()).unwrap();
        late.catch_up(&files).unwrap();
        assert_eq!(late.state, one.state);
    }

    #[test]
    fn a_torn_end_is_cut_by_the_next_append() {
        let directory = tempfile::tempdir().unwrap();
        let files = RealFiles;
        let mut log = OrderLog::open(&files, directory.path()).unwrap();
        let lock = log.lock(&files).unwrap();
        log.append(&files, &lock, Command::Shutdown).unwrap();
        drop(lock);
        let path = directory.path().join("order.0");
        let mut bytes = std::fs::read(&path).unwrap();
        let whole = bytes.len();
        bytes.extend_from_slice(&[9, 0, 0, 0, 1, 2, 3, 4, 5]);
        std::fs::write(&path, &bytes).unwrap();
        let mut other = OrderLog::open(&files, directory.path()).unwrap();
        other.catch_up(&files).unwrap();
        assert_eq!(shutdown_count(&other), 1);
        let lock = other.lock(&files).unwrap();
        other.append(&files, &lock, Command::Shutdown).unwrap();
        log.catch_up(&files).unwrap();
        assert_eq!(shutdown_count(&log), 2);
        assert_eq!(std::fs::read(&path).unwrap().len(), 2 * whole);
    }
}
