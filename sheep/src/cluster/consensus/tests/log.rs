//! The log and the snapshot on a disk that crashes.

use std::fs;

use openraft::storage::{RaftLogStorage, RaftLogStorageExt, RaftStateMachine};
use openraft::testing::{StoreBuilder, Suite};
use openraft::{CommittedLeaderId, EntryPayload, LogId, RaftSnapshotBuilder, StorageError, Vote};
use tempfile::TempDir;

use super::*;
use crate::cluster::consensus::Types;
use crate::cluster::consensus::log_store::LogStore;
use crate::cluster::consensus::snapshots::{self, StateStore};
use crate::cluster::driver::OrderError;

struct Builder;

impl StoreBuilder<Types, LogStore, StateStore, TempDir> for Builder {
    async fn build(&self) -> Result<(TempDir, LogStore, StateStore), StorageError<u64>> {
        let directory = tempfile::tempdir().unwrap();
        let world = World::real(2).unwrap();
        let log = LogStore::open(&world, directory.path().to_path_buf(), CLUSTER, None).await.unwrap();
        let state = StateStore::open(&world, directory.path().to_path_buf(), CLUSTER).await.unwrap();
        Ok((directory, log, state))
    }
}

#[test]
fn the_store_is_what_the_library_expects() {
    Suite::test_all(Builder).unwrap();
}

async fn open(directory: &Path) -> Result<LogStore, OrderError> {
    LogStore::open(&World::real(1).unwrap(), directory.to_path_buf(), CLUSTER, None).await
}

fn log_id(term: u64, index: u64) -> LogId<u64> {
    LogId::new(CommittedLeaderId::new(term, 1), index)
}

fn filler(term: u64, index: u64, bytes: usize) -> openraft::Entry<Types> {
    let command = Command::DeleteVdi { name: vec![b'x'; bytes], tag: Vec::new(), snapshot_id: 0 };
    openraft::Entry { log_id: log_id(term, index), payload: EntryPayload::Normal(entry(1, index, command)) }
}

fn indexes(log: &LogStore) -> Vec<u64> {
    log.read(.., usize::MAX).iter().map(|entry| entry.log_id.index).collect()
}

/// Two batches: entries 0 and 1, then 2 and 3, with a vote between them.
async fn two_batches(directory: &Path) -> (Vec<u8>, usize) {
    let mut log = open(directory).await.unwrap();
    log.blocking_append([filler(1, 0, 50), filler(1, 1, 50)]).await.unwrap();
    log.save_vote(&Vote::new(2, 1)).await.unwrap();
    let before = fs::metadata(directory.join("log.0")).unwrap().len() as usize;
    log.blocking_append([filler(1, 2, 50), filler(1, 3, 50)]).await.unwrap();
    (fs::read(directory.join("log.0")).unwrap(), before)
}

#[tokio::test]
async fn a_batch_torn_at_any_byte_leaves_what_was_durable() {
    let directory = tempfile::tempdir().unwrap();
    let (bytes, before) = two_batches(directory.path()).await;
    let path = directory.path().join("log.0");
    for length in before..bytes.len() {
        fs::write(&path, &bytes[..length]).unwrap();
        let mut log = open(directory.path()).await.unwrap();
        assert!(indexes(&log).starts_with(&[0, 1]) && indexes(&log).len() < 4, "cut at {length}");
        assert_eq!(log.read_vote().await.unwrap(), Some(Vote::new(2, 1)));
        // It goes on from there.
        let next = indexes(&log).len() as u64;
        log.blocking_append([filler(2, next, 10)]).await.unwrap();
        assert_eq!(indexes(&open(directory.path()).await.unwrap()).len() as u64, next + 1);
    }
}

#[tokio::test]
async fn a_batch_whose_pages_came_out_of_order_is_torn_too() {
    let directory = tempfile::tempdir().unwrap();
    let (bytes, before) = two_batches(directory.path()).await;
    let path = directory.path().join("log.0");
    for lost in before..bytes.len() {
        // From here on a page of 32 bytes is not there, though what follows is.
        let mut torn = bytes.clone();
        let end = bytes.len().min(lost + 32);
        torn[lost..end].fill(0);
        if torn == bytes {
            continue;
        }
        fs::write(&path, &torn).unwrap();
        let log = open(directory.path()).await.unwrap();
        assert!(indexes(&log).starts_with(&[0, 1]) && indexes(&log).len() < 4, "lost at {lost}");
    }
    // A file that was extended but never written.
    let mut extended = bytes.clone();
    extended.resize(bytes.len() + 5000, 0);
    fs::write(&path, &extended).unwrap();
    assert_eq!(indexes(&open(directory.path()).await.unwrap()), [0, 1, 2, 3]);
}

#[tokio::test]
async fn damage_anywhere_before_the_last_batch_is_refused_with_the_name_of_the_file() {
    let directory = tempfile::tempdir().unwrap();
    let (bytes, before) = two_batches(directory.path()).await;
    let path = directory.path().join("log.0");
    for place in 0..before {
        for flip in [0x01, 0x80] {
            let mut damaged = bytes.clone();
            damaged[place] ^= flip;
            fs::write(&path, &damaged).unwrap();
            let error = open(directory.path()).await.err().unwrap_or_else(|| panic!("byte {place} was not missed"));
            assert!(error.to_string().contains("log.0"), "{error}");
            assert_eq!(fs::read(&path).unwrap(), damaged, "what is damaged is left as it is");
        }
    }
}

#[tokio::test]
async fn another_cluster_s_log_is_refused() {
    let directory = tempfile::tempdir().unwrap();
    two_batches(directory.path()).await;
    let opened = LogStore::open(&World::real(1).unwrap(), directory.path().to_path_buf(), 99, None).await;
    assert!(matches!(opened.err(), Some(OrderError::OtherCluster { ours: CLUSTER, theirs: 99 })));
}

#[tokio::test]
async fn files_follow_each_other_and_go_when_they_are_purged() {
    let directory = tempfile::tempdir().unwrap();
    let mut log = open(directory.path()).await.unwrap();
    log.save_vote(&Vote::new(3, 2)).await.unwrap();
    for index in 0..30 {
        log.blocking_append([filler(1, index, 1 << 20)]).await.unwrap();
    }
    log.truncate(log_id(1, 28)).await.unwrap();
    log.blocking_append([filler(2, 28, 10)]).await.unwrap();
    let names = || {
        let mut numbers: Vec<u64> = fs::read_dir(directory.path())
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap()[4..].parse().unwrap())
            .collect();
        numbers.sort_unstable();
        numbers
    };
    assert_eq!(names(), [0, 1, 2, 3, 4, 5, 6, 7]);
    assert_eq!(indexes(&open(directory.path()).await.unwrap()), (0..29).collect::<Vec<_>>());
    // A file in the middle whose end is missing.
    let path = directory.path().join("log.3");
    let whole = fs::read(&path).unwrap();
    fs::write(&path, &whole[..whole.len() - 1]).unwrap();
    assert!(open(directory.path()).await.err().unwrap().to_string().contains("log.3"));
    fs::remove_file(&path).unwrap();
    assert!(open(directory.path()).await.err().unwrap().to_string().contains("log.4"));
    fs::write(&path, &whole).unwrap();

    log.purge(log_id(1, 20)).await.unwrap();
    assert_eq!(names(), [5, 6, 7]);
    let mut again = open(directory.path()).await.unwrap();
    assert_eq!(indexes(&again), (21..29).collect::<Vec<_>>());
    assert_eq!(again.read_vote().await.unwrap(), Some(Vote::new(3, 2)));
    assert_eq!(again.get_log_state().await.unwrap().last_purged_log_id, Some(log_id(1, 20)));
    assert_eq!(again.get_log_state().await.unwrap().last_log_id, Some(log_id(2, 28)));

    // The oldest one lost: its entries are missed.
    fs::remove_file(directory.path().join("log.5")).unwrap();
    assert!(open(directory.path()).await.is_err());
}

#[tokio::test]
async fn a_purge_waits_for_the_snapshot_that_covers_it() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::real(2).unwrap();
    let mut state = StateStore::open(&world, directory.path().to_path_buf(), CLUSTER).await.unwrap();
    let covered = Some(state.covered());
    let mut log = LogStore::open(&world, directory.path().to_path_buf(), CLUSTER, covered).await.unwrap();
    let entries: Vec<_> = (0..5).map(|index| filler(1, index, 10)).collect();
    log.blocking_append(entries.clone()).await.unwrap();
    state.apply(entries).await.unwrap();
    let waiting = tokio::time::timeout(Duration::from_millis(50), log.purge(log_id(1, 3))).await;
    assert!(waiting.is_err(), "nothing has the entries but the log");
    assert_eq!(indexes(&open(directory.path()).await.unwrap()).len(), 5);
    state.get_snapshot_builder().await.build_snapshot().await.unwrap();
    // A crash right here leaves both.
    assert_eq!(indexes(&open(directory.path()).await.unwrap()).len(), 5);
    log.purge(log_id(1, 3)).await.unwrap();
    assert_eq!(indexes(&log), [4]);
}

#[tokio::test]
async fn a_snapshot_is_whole_or_refused() {
    let directory = tempfile::tempdir().unwrap();
    let world = World::real(2).unwrap();
    let mut state = StateStore::open(&world, directory.path().to_path_buf(), CLUSTER).await.unwrap();
    let entries: Vec<_> = (0..5).map(|index| filler(1, index, 10)).collect();
    state.apply(entries).await.unwrap();
    state.get_snapshot_builder().await.build_snapshot().await.unwrap();
    // A crash while the next one was written.
    fs::write(directory.path().join("snapshot.new"), b"half").unwrap();
    let again = StateStore::open(&world, directory.path().to_path_buf(), CLUSTER).await.unwrap();
    assert_eq!(*again.watch().borrow(), *state.watch().borrow());
    let path = directory.path().join("snapshot");
    let bytes = fs::read(&path).unwrap();
    for place in 0..bytes.len() {
        let mut damaged = bytes.clone();
        damaged[place] ^= 0x10;
        assert!(snapshots::decode(&damaged).is_err());
        assert!(snapshots::decode(&bytes[..place]).is_err());
    }
    fs::write(&path, &bytes[..bytes.len() - 1]).unwrap();
    let error = StateStore::open(&world, directory.path().to_path_buf(), CLUSTER).await.err().unwrap();
    assert!(error.to_string().contains("snapshot"), "{error}");
}
