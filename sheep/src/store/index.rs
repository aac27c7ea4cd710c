//! The checkpointed index: every object's entry, and where in the journal the changes after it begin.
//!
//! A redb database on a [`File`], so that it runs on simulated disks too. Changed by one transaction per checkpoint.
//!
//! Always holds:
//! 1. A transaction is either all there after a crash or not at all: redb's own promise, which it keeps as long as
//!    sectors are written whole and flushes are honest.
//! 2. Every value carries a checksum of ours; a damaged one makes opening fail, never a wrong entry. So do damaged pages,
//!    over some of which redb (4.4.0) panics: all of them that are in use are read at start.

use std::fmt;
use std::io;
use std::path::Path;
use std::sync::Arc;

use redb::{Database, ReadableDatabase, ReadableTable, StorageBackend, TableDefinition};
use sheep_core::stamp::Epoch;

use super::checksum::crc32c;
use super::entries::{Entries, Packed};
use super::epochs::Epochs;
use super::fields::{u32_at, u64_at};
use super::journal::Position;
use crate::world::disk::{File, Files, OpenMode};
use crate::world::panics;

const OBJECTS: TableDefinition<u64, &[u8]> = TableDefinition::new("objects");
/// Files that a checkpoint was about to unlink: object id and disk.
const DOOMED: TableDefinition<(u64, u8), ()> = TableDefinition::new("removed");
const META: TableDefinition<&str, &[u8]> = TableDefinition::new("meta");
const STATE_KEY: &str = "state";
/// Beside `STATE_KEY`, so that an earlier version, which does not know it, can go on with the index.
const EPOCHS_KEY: &str = "epochs";

/// Memory that redb may use for pages. Everything is read once, at start, and written in bulk.
const CACHE_BYTES: usize = 8 << 20;

/// What a checkpoint makes durable besides entries.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct State {
    /// The first record that the entries do not contain.
    pub tail: Position,
    /// As of that record.
    pub epochs: Epochs,
}

const STATE_BYTES: usize = 28;

impl State {
    fn encode(self) -> [u8; STATE_BYTES] {
        self.encode_with(self.epochs.clean_through)
    }

    /// The same with the other epoch instead: what belongs to another tail was written by an earlier version since.
    fn encode_epochs(self) -> [u8; STATE_BYTES] {
        self.encode_with(self.epochs.met_through.map_or(Epoch(0), |epoch| Epoch(epoch.0.saturating_add(1))))
    }

    fn encode_with(self, epoch: Epoch) -> [u8; STATE_BYTES] {
        let mut bytes = [0; STATE_BYTES];
        bytes[0..8].copy_from_slice(&self.tail.offset.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.tail.sequence.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.tail.skip.to_le_bytes());
        bytes[20..24].copy_from_slice(&epoch.0.to_le_bytes());
        let crc = crc32c(&bytes[..24]);
        bytes[24..28].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8], epochs: Option<&[u8]>) -> Option<State> {
        let (tail, clean_through) = decode_with(bytes)?;
        let mut met_through = None;
        if let Some(epochs) = epochs {
            let (as_of, met) = decode_with(epochs)?;
            met_through = met.0.checked_sub(1).map(Epoch).filter(|_| as_of == tail);
        }
        Some(State { tail, epochs: Epochs { clean_through, met_through } })
    }
}

fn decode_with(bytes: &[u8]) -> Option<(Position, Epoch)> {
    if bytes.len() != STATE_BYTES || u32_at(bytes, 24)? != crc32c(&bytes[..24]) {
        return None;
    }
    let tail = Position { offset: u64_at(bytes, 0)?, sequence: u64_at(bytes, 8)?, skip: u32_at(bytes, 16)? };
    Some((tail, Epoch(u32_at(bytes, 20)?)))
}

/// Why the index could not be used.
#[derive(Debug)]
pub enum IndexError {
    /// The disk failed.
    Io(io::Error),
    /// The content is not what was written.
    Damaged(String),
}

impl fmt::Display for IndexError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            IndexError::Io(error) => write!(f, "{error}"),
            IndexError::Damaged(what) => write!(f, "{what}"),
        }
    }
}

impl<E: Into<redb::Error>> From<E> for IndexError {
    fn from(error: E) -> IndexError {
        match error.into() {
            // That is how redb says that a file is not its own, or was cut short.
            redb::Error::Io(error)
                if matches!(error.kind(), io::ErrorKind::InvalidData | io::ErrorKind::UnexpectedEof) =>
            {
                IndexError::Damaged(error.to_string())
            }
            redb::Error::Io(error) => IndexError::Io(error),
            other => IndexError::Damaged(other.to_string()),
        }
    }
}

/// Everything read at start.
pub struct Loaded {
    /// All objects.
    pub entries: Entries,
    /// Files that may still have to be unlinked, with their disks.
    pub doomed: Vec<(u64, u8)>,
    /// Where the journal goes on.
    pub state: State,
}

/// One checkpoint's changes.
pub struct Changes<'a> {
    /// Entries set and removed.
    pub entries: &'a mut dyn Iterator<Item = (u64, Option<Packed>)>,
    /// All files that are to be unlinked after this checkpoint.
    pub doomed: &'a [(u64, u8)],
    /// The rest.
    pub state: State,
}

/// An open index.
pub struct Index {
    database: Database,
    /// Whether commits flush the device.
    sync: bool,
}

impl Index {
    /// Opens an index that was made before, and reads all of it.
    pub fn open_and_load(files: &dyn Files, path: &Path, sync: bool) -> Result<(Index, Loaded), IndexError> {
        contained(|| {
            let index = Index::open(files, path, sync)?;
            let loaded = index.load()?.ok_or_else(|| IndexError::Damaged("it holds no index".to_string()))?;
            Ok((index, loaded))
        })
    }

    /// Opens the index, making an empty one if there is none.
    pub fn open(files: &dyn Files, path: &Path, sync: bool) -> Result<Index, IndexError> {
        let file = files.open(path, OpenMode::Create).map_err(IndexError::Io)?;
        if sync {
            // A killed process may have left a commit that is visible and not durable. Nothing may be built on it yet.
            file.sync_data().map_err(IndexError::Io)?;
        }
        let backend = Backend { file, sync };
        let database = Database::builder().set_cache_size(CACHE_BYTES).create_with_backend(backend)?;
        Ok(Index { database, sync })
    }

    /// Reads all of it; `None` if no checkpoint was ever made.
    fn load(&self) -> Result<Option<Loaded>, IndexError> {
        let transaction = self.database.begin_read()?;
        let meta = match transaction.open_table(META) {
            Ok(meta) => meta,
            Err(redb::TableError::TableDoesNotExist(_)) => return Ok(None),
            Err(error) => return Err(error.into()),
        };
        let Some(state) = meta.get(STATE_KEY)? else {
            return Ok(None);
        };
        let damaged = |what: &str| IndexError::Damaged(what.to_string());
        let epochs = meta.get(EPOCHS_KEY)?;
        let state = State::decode(state.value(), epochs.as_ref().map(redb::AccessGuard::value));
        let state = state.ok_or_else(|| damaged("the journal position is damaged"))?;
        let entry = |row: Result<(redb::AccessGuard<'_, u64>, redb::AccessGuard<'_, &[u8]>), redb::StorageError>| {
            let (oid, value) = row?;
            let packed = Packed::decode(value.value(), oid.value());
            let packed =
                packed.ok_or_else(|| damaged(&format!("the entry of object {:016x} is damaged", oid.value())))?;
            Ok::<_, IndexError>((oid.value(), packed))
        };
        let entries = transaction.open_table(OBJECTS)?.iter()?.map(entry).collect::<Result<Entries, IndexError>>()?;
        let mut loaded = Loaded { entries, state, doomed: Vec::new() };
        match transaction.open_table(DOOMED) {
            Ok(doomed) => {
                for row in doomed.iter()? {
                    loaded.doomed.push(row?.0.value());
                }
            }
            // Of an earlier form, that knew one disk for each object.
            Err(redb::TableError::TableDoesNotExist(_)) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(Some(loaded))
    }

    /// Makes a checkpoint's changes durable, all or none. After an error there must be no other.
    pub fn commit(&self, changes: Changes<'_>) -> Result<(), IndexError> {
        contained(|| self.commit_all(changes))
    }

    /// Closes the file; what redb writes then is for a faster start, which an error leaves to the next one.
    pub fn close(self) -> Result<(), IndexError> {
        contained(|| {
            drop(self);
            Ok(())
        })
    }

    fn commit_all(&self, changes: Changes<'_>) -> Result<(), IndexError> {
        let mut transaction = self.database.begin_write()?;
        // Opening after a crash then reads a little more at commit time instead of the whole file at start.
        transaction.set_quick_repair(self.sync);
        {
            let mut objects = transaction.open_table(OBJECTS)?;
            for (oid, packed) in changes.entries {
                match packed {
                    Some(packed) => objects.insert(oid, &packed.encode(oid)[..])?,
                    None => objects.remove(oid)?,
                };
            }
            let mut doomed = transaction.open_table(DOOMED)?;
            doomed.retain(|_, ()| false)?;
            for removed in changes.doomed {
                doomed.insert(removed, ())?;
            }
            let mut meta = transaction.open_table(META)?;
            meta.insert(STATE_KEY, &changes.state.encode()[..])?;
            meta.insert(EPOCHS_KEY, &changes.state.encode_epochs()[..])?;
        }
        transaction.commit()?;
        Ok(())
    }
}

/// Runs what reads pages that may be damaged: redb panics over some.
fn contained<T>(work: impl FnOnce() -> Result<T, IndexError>) -> Result<T, IndexError> {
    let done = panics::contain(work);
    done.unwrap_or_else(|panic| Err(IndexError::Damaged(format!("its pages make no sense ({panic})"))))
}

/// redb's storage on a file of the world.
struct Backend {
    file: Arc<dyn File>,
    sync: bool,
}

impl fmt::Debug for Backend {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "index file")
    }
}

impl StorageBackend for Backend {
    fn len(&self) -> Result<u64, io::Error> {
        self.file.len()
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), io::Error> {
        let count = self.file.read_at(out, offset)?;
        if count == out.len() { Ok(()) } else { Err(io::ErrorKind::UnexpectedEof.into()) }
    }

    fn set_len(&self, len: u64) -> Result<(), io::Error> {
        self.file.set_len(len)
    }

    fn sync_data(&self) -> Result<(), io::Error> {
        if self.sync { self.file.sync_data() } else { Ok(()) }
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), io::Error> {
        self.file.write_at(&[io::IoSlice::new(data)], offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::real_disk::RealFiles;
    use sheep_core::stamp::Version;

    #[test]
    fn a_checkpoint_reads_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("index.redb");
        let index = Index::open(&RealFiles, &path, true).unwrap();
        assert!(index.load().unwrap().is_none());
        let packed = Packed::new(Version::default(), 4096, 1);
        let epochs = Epochs { clean_through: Epoch(4), met_through: Some(Epoch(3)) };
        let state = State { tail: Position { offset: 8192, sequence: 3, skip: 1 }, epochs };
        let mut rows = (0..1000).map(|oid| (oid, Some(packed)));
        index.commit(Changes { entries: &mut rows, doomed: &[(5000, 1)], state }).unwrap();
        let mut rows = (0..10).map(|oid| (oid, None));
        index.commit(Changes { entries: &mut rows, doomed: &[(5001, 0), (5001, 1)], state }).unwrap();
        drop(index);
        let loaded = Index::open(&RealFiles, &path, true).unwrap().load().unwrap().unwrap();
        assert_eq!(loaded.entries.count(), 990);
        assert_eq!(loaded.entries.get(10), Some(packed));
        // Removed from one disk, made again on another one and removed there, all since the last checkpoint.
        assert_eq!(loaded.doomed, [(5001, 0), (5001, 1)]);
        assert_eq!(loaded.state, state);
    }

    #[test]
    fn what_an_earlier_version_did_meanwhile_is_not_known() {
        let epochs = Epochs { clean_through: Epoch(4), met_through: Some(Epoch(3)) };
        let ours = State { tail: Position { offset: 8192, sequence: 3, skip: 1 }, epochs };
        let later = State { tail: Position { offset: 12288, ..ours.tail }, ..ours };
        let decoded = |state: State, epochs: State| State::decode(&state.encode(), Some(&epochs.encode_epochs()));
        assert_eq!(decoded(ours, ours), Some(ours));
        let unknown = Epochs { met_through: None, ..epochs };
        assert_eq!(decoded(later, ours), Some(State { epochs: unknown, ..later }));
        assert_eq!(State::decode(&ours.encode(), None), Some(State { epochs: unknown, ..ours }));
        assert_eq!(State::decode(&ours.encode(), Some(&[0; STATE_BYTES])), None);
    }
}
