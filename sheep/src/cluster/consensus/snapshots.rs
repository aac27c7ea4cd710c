//! The machine and its snapshot on disk, as the library drives them.
//!
//! `snapshot` is a magic number, the CRC-32C of the rest, and the machine as of one entry (postcard). It is written under
//! another name, made durable and renamed, so there is always a whole one; the same bytes travel to voters that are too
//! far behind for the log.
//!
//! Always holds:
//! 1. What is published only goes forward.
//! 2. What `covered` says is in the durable snapshot; that never goes back either.
//!
//! The machine itself is not durable: a start makes it from the snapshot and the log.

use std::io::{Cursor, IoSlice};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use openraft::storage::RaftStateMachine;
use openraft::{
    AnyError, EmptyNode, EntryPayload, LogId, OptionalSend, RaftSnapshotBuilder, Snapshot, SnapshotMeta, StorageError,
    StorageIOError, StoredMembership,
};
use serde::{Deserialize, Serialize};
use tokio::sync::watch;

use super::format::{Mark, StoredVoters};
use super::log_file::{failed, read_file};
use super::log_store::give_up;
use super::machine::{Answer, Machine};
use super::{Published, Types};
use crate::cluster::driver::OrderError;
use crate::world::disk::{Files, OpenMode};
use crate::world::marks;
use crate::world::{World, disk};

const MAGIC: [u8; 8] = *b"SHEEPSN1";
const HEADER_BYTES: usize = MAGIC.len() + 4;

/// The machine as of one entry.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Frozen {
    /// Whose.
    pub cluster: u64,
    /// The last entry that was applied.
    pub last: Option<Mark>,
    /// Who votes.
    pub voters: StoredVoters,
    /// The rest.
    pub machine: Machine,
}

/// A snapshot as bytes.
pub fn encode(frozen: &Frozen) -> Vec<u8> {
    let mut bytes = MAGIC.to_vec();
    bytes.extend_from_slice(&[0; 4]);
    bytes = postcard::to_extend(frozen, bytes).expect("the state's types have no unserialisable values");
    let crc = crc32c(&bytes[HEADER_BYTES..]).to_le_bytes();
    bytes[MAGIC.len()..HEADER_BYTES].copy_from_slice(&crc);
    bytes
}

fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// A snapshot from bytes; the error says what is wrong with them.
pub fn decode(bytes: &[u8]) -> Result<Frozen, String> {
    let (header, body) = bytes.split_at_checked(HEADER_BYTES).ok_or("it is too short")?;
    let (magic, crc) = header.split_at(MAGIC.len());
    if magic != MAGIC {
        return Err("it is no snapshot of a version this one can read".to_owned());
    }
    if crc32c(body).to_le_bytes() != *crc {
        return Err("its checksum is wrong".to_owned());
    }
    match postcard::take_from_bytes(body) {
        Ok((frozen, [])) => Ok(frozen),
        Ok(_) => Err("it is longer than what it says".to_owned()),
        Err(error) => Err(format!("it means nothing to this version ({error})")),
    }
}

/// The machine that the library applies entries to. Clones are the same one.
#[derive(Clone)]
pub(super) struct StateStore {
    world: World,
    directory: PathBuf,
    cluster: u64,
    current: Arc<Mutex<Current>>,
    published: Arc<watch::Sender<Published>>,
    covered: Arc<watch::Sender<Option<u64>>>,
    /// Held while the file is replaced.
    writing: Arc<Mutex<()>>,
}

#[derive(Clone, Default)]
struct Current {
    machine: Machine,
    last: Option<LogId<u64>>,
    voters: StoredMembership<u64, EmptyNode>,
}

impl StateStore {
    /// Takes up the snapshot in a directory, if there is one. Makes the directory.
    pub async fn open(world: &World, directory: PathBuf, cluster: u64) -> Result<StateStore, OrderError> {
        let place = directory.clone();
        let found = disk::run(&world.disk, move |files| {
            disk::make_dir(files, &place).map_err(failed("make", &place))?;
            let path = place.join("snapshot");
            if !files.exists(&path).map_err(failed("look for", &path))? {
                return Ok(None);
            }
            let bytes = read_file(files, &path)?;
            let place = path.display().to_string();
            let frozen = decode(&bytes).map_err(|reason| OrderError::Damaged { place, reason })?;
            // A crash may have come between the rename and this.
            files.sync_dir(path.parent().unwrap_or(&path)).map_err(failed("sync", &path))?;
            Ok(Some(frozen))
        });
        let current = match found.await? {
            Some(frozen) if frozen.cluster != cluster => {
                return Err(OrderError::OtherCluster { ours: frozen.cluster, theirs: cluster });
            }
            Some(Frozen { last, voters, machine, .. }) => {
                Current { machine, last: last.map(LogId::from), voters: voters.into() }
            }
            None => Current::default(),
        };
        let covered = current.last.map(|last| last.index);
        let published = current.published();
        Ok(StateStore {
            world: world.clone(),
            directory,
            cluster,
            current: Arc::new(Mutex::new(current)),
            published: Arc::new(watch::Sender::new(published)),
            covered: Arc::new(watch::Sender::new(covered)),
            writing: Arc::new(Mutex::new(())),
        })
    }

    /// What was applied so far.
    pub fn watch(&self) -> watch::Receiver<Published> {
        self.published.subscribe()
    }

    /// Up to which index the durable snapshot has everything.
    pub fn covered(&self) -> watch::Receiver<Option<u64>> {
        self.covered.subscribe()
    }

    fn publish(&self, current: &Current) {
        let next = current.published();
        self.published.send_if_modified(|published| {
            let goes_forward = next.index >= published.index;
            if goes_forward {
                *published = next;
            }
            goes_forward
        });
    }

    /// Makes a snapshot durable, unless a later one is.
    async fn save(&self, last: Option<LogId<u64>>, bytes: impl FnOnce() -> Vec<u8> + Send + 'static) -> Vec<u8> {
        let store = self.clone();
        let saved = disk::run(&self.world.disk, move |files| {
            let bytes = bytes();
            let _writing = store.writing.lock().unwrap_or_else(PoisonError::into_inner);
            let index = last.map(|last| last.index);
            if index > *store.covered.borrow() || store.covered.borrow().is_none() {
                replace(files, &store.directory, &bytes)?;
                store.covered.send_replace(index);
            }
            Ok(bytes)
        });
        match saved.await {
            Ok(bytes) => bytes,
            Err(error) => match give_up(&self.world.disk, &error).await {},
        }
    }
}

impl Current {
    fn published(&self) -> Published {
        Published {
            index: self.last.map_or(0, |last| last.index),
            term: self.last.map_or(0, |last| last.leader_id.term),
            state: self.machine.state.clone(),
            sessions: self.machine.sessions.clone(),
            entries: self.machine.entries,
        }
    }

    fn meta(&self) -> SnapshotMeta<u64, EmptyNode> {
        meta_of(self.last, self.voters.clone())
    }
}

/// What the library wants to know about a snapshot.
pub(super) fn meta_of(
    last: Option<LogId<u64>>,
    voters: StoredMembership<u64, EmptyNode>,
) -> SnapshotMeta<u64, EmptyNode> {
    let snapshot_id = last.map_or_else(String::new, |last| format!("{}-{}", last.leader_id, last.index));
    SnapshotMeta { last_log_id: last, last_membership: voters, snapshot_id }
}

fn replace(files: &dyn Files, directory: &Path, bytes: &[u8]) -> Result<(), OrderError> {
    let (temporary, path) = (directory.join("snapshot.new"), directory.join("snapshot"));
    let file = files.open(&temporary, OpenMode::Private).map_err(failed("create", &temporary))?;
    file.write_at(&[IoSlice::new(bytes)], 0).map_err(failed("write", &temporary))?;
    file.sync_data().map_err(failed("sync", &temporary))?;
    files.rename(&temporary, &path).map_err(failed("rename", &temporary))?;
    files.sync_dir(directory).map_err(failed("sync", directory))
}

/// The machine of one moment, about to be written.
pub(super) struct Builder {
    store: StateStore,
    current: Current,
}

impl RaftSnapshotBuilder<Types> for Builder {
    async fn build_snapshot(&mut self) -> Result<Snapshot<Types>, StorageError<u64>> {
        let Current { machine, last, voters } = self.current.clone();
        let frozen = Frozen {
            cluster: self.store.cluster,
            last: last.map(Mark::from),
            voters: StoredVoters::from(&voters),
            machine,
        };
        let bytes = self.store.save(last, move || encode(&frozen)).await;
        Ok(Snapshot { meta: self.current.meta(), snapshot: Box::new(Cursor::new(bytes)) })
    }
}

impl RaftStateMachine<Types> for StateStore {
    type SnapshotBuilder = Builder;

    async fn applied_state(
        &mut self,
    ) -> Result<(Option<LogId<u64>>, StoredMembership<u64, EmptyNode>), StorageError<u64>> {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        Ok((current.last, current.voters.clone()))
    }

    async fn apply<I>(&mut self, entries: I) -> Result<Vec<Answer>, StorageError<u64>>
    where
        I: IntoIterator<Item = openraft::Entry<Types>> + OptionalSend,
        I::IntoIter: OptionalSend,
    {
        let mut answers = Vec::new();
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        for entry in entries {
            current.last = Some(entry.log_id);
            answers.push(match entry.payload {
                EntryPayload::Blank => Answer::Nothing,
                EntryPayload::Normal(proposal) => current.machine.apply(&proposal),
                EntryPayload::Membership(membership) => {
                    current.voters = StoredMembership::new(Some(entry.log_id), membership);
                    Answer::Nothing
                }
            });
        }
        self.publish(&current);
        Ok(answers)
    }

    async fn get_snapshot_builder(&mut self) -> Builder {
        let current = self.current.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Builder { store: self.clone(), current }
    }

    async fn begin_receiving_snapshot(&mut self) -> Result<Box<Cursor<Vec<u8>>>, StorageError<u64>> {
        Ok(Box::default())
    }

    async fn install_snapshot(
        &mut self,
        meta: &SnapshotMeta<u64, EmptyNode>,
        snapshot: Box<Cursor<Vec<u8>>>,
    ) -> Result<(), StorageError<u64>> {
        marks::hit(marks::Mark::OrderSnapshotTaken);
        let bytes = snapshot.into_inner();
        // What arrives over the network was decoded before the library saw it (`network`).
        let frozen = decode(&bytes)
            .map_err(|reason| StorageIOError::read_snapshot(Some(meta.signature()), AnyError::error(reason)))?;
        self.save(meta.last_log_id, move || bytes).await;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        *current = Current { machine: frozen.machine, last: meta.last_log_id, voters: meta.last_membership.clone() };
        self.publish(&current);
        Ok(())
    }

    async fn get_current_snapshot(&mut self) -> Result<Option<Snapshot<Types>>, StorageError<u64>> {
        let path = self.directory.join("snapshot");
        let read = disk::run(&self.world.disk, move |files| {
            if !files.exists(&path).map_err(failed("look for", &path))? {
                return Ok(None);
            }
            let bytes = read_file(files, &path)?;
            let place = path.display().to_string();
            let frozen = decode(&bytes).map_err(|reason| OrderError::Damaged { place, reason })?;
            Ok(Some((frozen, bytes)))
        });
        Ok(match read.await {
            Ok(None) => None,
            Ok(Some((frozen, bytes))) => {
                let meta = meta_of(frozen.last.map(LogId::from), frozen.voters.into());
                Some(Snapshot { meta, snapshot: Box::new(Cursor::new(bytes)) })
            }
            Err(error) => match give_up(&self.world.disk, &error).await {},
        })
    }
}
