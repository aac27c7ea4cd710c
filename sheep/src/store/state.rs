//! What the parts of a store share: one short-held lock around plain data, and the rules that say which job is due.
//!
//! Always holds:
//! 1. Nothing here does I/O or waits; every method runs under the lock and returns.
//! 2. Records go through `queue` (submitted), `apply_queue` (durable), applied, checkpointed, in the order of their
//!    numbers. `overlay` has exactly those that are submitted and not applied.
//! 3. At most one job each commits, applies and checkpoints at any time.
//! 4. Nothing that is done in some order takes that order from a hash: one seed decides everything in the simulator.
//! 5. An object that was copied from changes only after a checkpoint that contains the copy (`pinned`): a replay can
//!    thus always make the copy again from the same content.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use sheep_core::member::NodeId;
use tokio::sync::{oneshot, watch};

use super::cache::Cache;
use super::entries::{Entries, Packed};
use super::epochs::Epochs;
use super::handles::Handles;
use super::index::Index;
use super::journal::{Journal, Position};
use super::layout::Layout;
use super::record::{Kind, Record};
use super::ticket::{Outcome, Waiter};
use super::{OpenReport, StoreConfig, StoreError};
use crate::world::World;
use crate::world::disk::{FileLock, Space};
use crate::world::frames::sent_together;
use crate::world::marks::{self, Mark};

/// Write-back records wait at most this long for a commit (design.md section 7).
const WRITE_BACK_DELAY: Duration = Duration::from_secs(1);

/// A record on its way.
pub struct Queued {
    /// Its place in the order of submissions.
    pub number: u64,
    /// What it does.
    pub record: Record,
    /// Journal space reserved for it.
    pub cost: u64,
    /// The object's entry afterwards.
    pub result: Option<Packed>,
}

/// A durable record that waits for the applier.
pub struct Committed {
    /// The record.
    pub queued: Queued,
    /// On the last one of a batch: the position behind it.
    pub batch_end: Option<Position>,
}

/// A submitted, unapplied change of an object, as reads see it.
pub struct Pending {
    /// Its record's number.
    pub number: u64,
    /// What it does.
    pub kind: Kind,
    /// Where its payload goes.
    pub offset: u64,
    /// Its payload.
    pub data: bytes::Bytes,
}

/// Free space as last seen, less what is on its way to the disks.
#[derive(Default)]
pub struct SpaceView {
    /// Per disk.
    pub disks: Vec<Space>,
    /// Monotonic time of the last look.
    pub seen_at: Duration,
    /// Whether a look is under way.
    pub refreshing: bool,
    /// Bytes submitted and not applied.
    pub in_flight_bytes: u64,
    /// What writes leave free on every disk.
    pub reserve_bytes: u64,
}

impl SpaceView {
    /// Of all disks.
    pub fn total_bytes(&self) -> u64 {
        self.disks.iter().map(|space| space.total_bytes).sum()
    }

    /// Of all disks.
    pub fn free_bytes(&self) -> u64 {
        self.disks.iter().map(|space| space.free_bytes).sum()
    }
}

/// What one checkpoint makes durable: everything applied before it was captured.
pub struct Checkpoint {
    /// Number of the last record it contains.
    pub number: u64,
    /// Where replay begins after it.
    pub tail: Position,
    /// As of the last applied record.
    pub epochs: Epochs,
    /// Entries that changed since the last one.
    pub changed: BTreeMap<u64, Option<Packed>>,
    /// Objects whose files must be flushed, and their disks.
    pub dirty: BTreeMap<u64, u8>,
    /// Disks whose directories must be flushed.
    pub renamed: BTreeSet<u8>,
    /// Files to unlink after it, each with the number of the record that removed the object.
    pub doomed: BTreeMap<(u64, u8), u64>,
    /// The disks' space, looked at on the way.
    pub spaces: Vec<Option<Space>>,
}

/// Room in the journal for one write. Dropping it gives the room back.
pub struct Permit {
    shared: Arc<Shared>,
    cost: u64,
    bytes: u64,
}

impl Permit {
    pub(super) fn new(shared: &Arc<Shared>, cost: u64, bytes: u64) -> Permit {
        Permit { shared: shared.clone(), cost, bytes }
    }

    /// Most payload bytes that a write with this permit may have.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Hands the reserved space over to a record.
    pub(super) fn into_cost(mut self) -> u64 {
        std::mem::take(&mut self.cost)
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        if self.cost > 0 {
            self.shared.with(|inner| inner.reserved_bytes -= self.cost);
        }
    }
}

/// The data under the lock.
pub struct Inner {
    /// Every object as of the last submission.
    pub entries: Entries,
    /// As of the last submission.
    pub epochs: Epochs,
    /// Submitted and unapplied changes, by object.
    pub overlay: HashMap<u64, VecDeque<Pending>>,
    /// Open object files.
    pub handles: Handles,
    /// Counts replaced and removed files; a file opened by name is kept only if it did not change meanwhile.
    pub replacements: u64,

    /// Submitted, not durable.
    pub queue: VecDeque<Queued>,
    /// Payload bytes in `queue`.
    pub queued_bytes: u64,
    /// Number of the last submitted record.
    pub submitted: u64,
    /// Records up to this one are to be committed now.
    pub wanted: u64,
    /// Records up to this one are durable.
    pub durable: u64,
    /// Ascending by number.
    pub waiters: VecDeque<(u64, Waiter)>,
    /// A commit job runs.
    pub committing: bool,
    /// The next batch does not fit into the journal until a checkpoint has freed some of it.
    pub commit_blocked: bool,
    /// A timer for write-back records runs.
    pub timer_armed: bool,

    /// Size of the journal's ring.
    pub ring_bytes: u64,
    /// Where the next batch goes.
    pub head: Position,
    /// Space promised to permits and queued records.
    pub reserved_bytes: u64,
    /// Waiting for space in the journal, with what they will cost.
    pub admissions: VecDeque<(u64, u64, oneshot::Sender<Permit>)>,

    /// Durable, not applied.
    pub apply_queue: VecDeque<Committed>,
    /// Number of the last applied record.
    pub applied: u64,
    /// The first record that is not applied.
    pub applied_tail: Position,
    /// An apply job runs.
    pub applying: bool,
    /// The next record changes a pinned object.
    pub apply_blocked: bool,

    /// The first record that the index file does not contain.
    pub checkpoint_tail: Position,
    /// A checkpoint job runs.
    pub checkpointing: bool,
    /// Records up to this one are in the index file.
    pub checkpointed: u64,
    /// Records up to this one are to be checkpointed as soon as they are applied.
    pub checkpoint_wanted: u64,
    /// Entries that differ from the index file, as of the last applied record.
    pub changed: BTreeMap<u64, Option<Packed>>,
    /// Objects with unsynced content, and their disks.
    pub dirty: BTreeMap<u64, u8>,
    /// Disks whose directories have unsynced names.
    pub renamed: BTreeSet<u8>,
    /// As of the last applied record.
    pub epochs_applied: Epochs,
    /// Removed objects whose files are still there, and their disks; with the number of the record that removed each.
    pub doomed: BTreeMap<(u64, u8), u64>,
    /// Of those, the ones that a finished checkpoint has forgotten. One that was made and removed again since has another
    /// number: a replay still needs its file.
    pub unlinkable: VecDeque<((u64, u8), u64)>,
    /// Sources of copies that are applied and not checkpointed.
    pub pinned: BTreeSet<u64>,
    /// Sources of copies that the running checkpoint contains.
    pub pinned_running: BTreeSet<u64>,

    /// See [`SpaceView`].
    pub space: SpaceView,
    /// Set once: what failed.
    pub failed: Option<Arc<str>>,
    /// [`super::Store::close`] was called.
    pub closed: bool,

    /// To be told outside of the lock.
    pub notices: Vec<(Waiter, Outcome)>,
    /// To be admitted outside of the lock: cost, bytes, who.
    pub grants: Vec<(u64, u64, oneshot::Sender<Permit>)>,
}

/// What has to be started after the lock is released.
#[derive(Default)]
pub struct Due {
    commit: bool,
    apply: bool,
    timer: bool,
    checkpoint: Option<Box<Checkpoint>>,
    notices: Vec<(Waiter, Outcome)>,
    grants: Vec<(u64, u64, oneshot::Sender<Permit>)>,
}

impl Inner {
    /// A store whose index file ends at `tail`.
    pub fn new(entries: Entries, epochs: Epochs, tail: Position, ring_bytes: u64) -> Inner {
        Inner {
            entries,
            epochs,
            overlay: HashMap::new(),
            handles: Handles::default(),
            replacements: 0,
            queue: VecDeque::new(),
            queued_bytes: 0,
            submitted: 0,
            wanted: 0,
            durable: 0,
            waiters: VecDeque::new(),
            committing: false,
            commit_blocked: false,
            timer_armed: false,
            ring_bytes,
            head: tail,
            reserved_bytes: 0,
            admissions: VecDeque::new(),
            apply_queue: VecDeque::new(),
            applied: 0,
            applied_tail: tail,
            applying: false,
            apply_blocked: false,
            checkpoint_tail: tail,
            checkpointing: false,
            checkpointed: 0,
            checkpoint_wanted: 0,
            changed: BTreeMap::new(),
            dirty: BTreeMap::new(),
            renamed: BTreeSet::new(),
            epochs_applied: epochs,
            doomed: BTreeMap::new(),
            unlinkable: VecDeque::new(),
            pinned: BTreeSet::new(),
            pinned_running: BTreeSet::new(),
            space: SpaceView::default(),
            failed: None,
            closed: false,
            notices: Vec::new(),
            grants: Vec::new(),
        }
    }

    /// Bytes of the journal that hold records which are not checkpointed.
    pub fn journal_used_bytes(&self) -> u64 {
        self.head.offset - self.checkpoint_tail.offset
    }

    /// Why no change is taken, if so.
    pub fn stopped(&self) -> Option<StoreError> {
        if let Some(what) = &self.failed {
            return Some(StoreError::Failed { what: what.clone() });
        }
        self.closed.then_some(StoreError::Closed)
    }

    /// Whether everything submitted is in the index file and nothing runs any more.
    pub fn is_quiet(&self) -> bool {
        self.applied == self.submitted
            && self.checkpoint_tail == self.applied_tail
            && self.unlinkable.is_empty()
            && !(self.applying || self.committing || self.checkpointing)
    }

    /// Asks for the commit of everything submitted so far.
    pub fn want_durable(&mut self) {
        self.wanted = self.submitted;
    }

    /// Decides what has to be started now; the caller starts it.
    fn due(&mut self) -> Due {
        self.admit_waiting();
        let mut due = Due {
            notices: std::mem::take(&mut self.notices),
            grants: std::mem::take(&mut self.grants),
            ..Due::default()
        };
        if self.failed.is_some() {
            return due;
        }
        if self.wanted > self.durable && !self.committing && !self.commit_blocked {
            self.committing = true;
            due.commit = true;
        } else if !self.queue.is_empty() && !self.committing && !self.timer_armed {
            self.timer_armed = true;
            due.timer = true;
        }
        let is_idle = self.apply_queue.is_empty() && self.unlinkable.is_empty();
        if !(self.applying || self.apply_blocked || is_idle) {
            self.applying = true;
            due.apply = true;
        }
        if self.wants_checkpoint() {
            due.checkpoint = Some(Box::new(self.capture()));
        }
        due
    }

    fn wants_checkpoint(&self) -> bool {
        if self.checkpointing || self.applied_tail == self.checkpoint_tail {
            return false;
        }
        let asked = self.checkpoint_wanted > self.checkpointed && self.applied >= self.checkpoint_wanted;
        let pressed = asked || self.commit_blocked || self.apply_blocked || !self.admissions.is_empty();
        pressed || self.journal_used_bytes() > self.ring_bytes / 2
    }

    fn admit_waiting(&mut self) {
        while let Some((cost, _, _)) = self.admissions.front() {
            let cost = *cost;
            if self.failed.is_none() && !self.has_room(cost) {
                // Write-back records hold space too; only a commit leads to their checkpoint.
                self.want_durable();
                break;
            }
            if let Some(admission) = self.admissions.pop_front() {
                self.reserved_bytes += cost;
                self.grants.push(admission);
            }
        }
    }

    /// Whether the journal has room for a record of this cost beside everything promised.
    pub fn has_room(&self, cost: u64) -> bool {
        let taken = self.journal_used_bytes() + self.reserved_bytes;
        taken == 0 || taken + cost <= self.ring_bytes
    }

    /// Stops all changes; everybody who waits is told.
    pub fn fail(&mut self, what: &str) {
        if self.failed.is_some() {
            return;
        }
        marks::hit(Mark::StoreFailed);
        tracing::error!("{what}; this node takes no writes until it is restarted");
        let what: Arc<str> = what.into();
        let waiters = std::mem::take(&mut self.waiters);
        let error = StoreError::Failed { what: what.clone() };
        self.notices.extend(waiters.into_iter().map(|(_, waiter)| (waiter, Err(error.clone()))));
        self.failed = Some(what);
    }
}

/// A store's parts.
pub struct Shared {
    /// The doors.
    pub world: World,
    /// Where a task can be started from any thread.
    pub runtime: tokio::runtime::Handle,
    /// As given.
    pub config: StoreConfig,
    /// Where the files are.
    pub layout: Layout,
    /// Whose store it is.
    pub node: NodeId,
    /// What opening did.
    pub report: OpenReport,
    /// See [`Inner`].
    pub inner: Mutex<Inner>,
    /// In front of the disks, if there is to be one; or why there is not.
    pub cache: Option<Result<Cache, String>>,
    /// Used by the commit job only.
    pub journal: Mutex<Journal>,
    /// Used by the checkpoint job only; `None` once closed.
    pub index: Mutex<Option<Index>>,
    /// Orders the writers of the cluster file; only disk threads wait for it.
    pub state_file: Mutex<()>,
    /// Changes whenever something may have become durable, applied or checkpointed.
    pub progress: watch::Sender<()>,
    /// Held while the store is open.
    pub lock_file: Mutex<Option<Box<dyn FileLock>>>,
}

impl Shared {
    /// The cache, if there is one.
    pub fn cache(&self) -> Option<&Cache> {
        self.cache.as_ref()?.as_ref().ok()
    }

    /// The data. A thread that panicked while holding it stops the process anyway.
    pub fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Changes the data, then starts whatever became due.
    pub fn with<T>(self: &Arc<Self>, change: impl FnOnce(&mut Inner) -> T) -> T {
        let mut inner = self.lock();
        let value = change(&mut inner);
        let due = inner.due();
        drop(inner);
        self.start(due);
        value
    }

    /// As `with`, for a disk thread that is free to do the apply job itself if that became due: true if it must.
    pub fn with_apply_left<T>(self: &Arc<Self>, change: impl FnOnce(&mut Inner) -> (T, bool)) -> (T, bool) {
        let mut inner = self.lock();
        let (value, is_free) = change(&mut inner);
        let mut due = inner.due();
        drop(inner);
        let left = is_free && std::mem::take(&mut due.apply);
        self.start(due);
        (value, left)
    }

    fn start(self: &Arc<Self>, due: Due) {
        if !due.notices.is_empty() {
            // Callbacks may start tasks, and this may be a thread of the disk's.
            let _runtime = self.runtime.enter();
            sent_together(|| due.notices.into_iter().for_each(|(waiter, outcome)| waiter.complete(outcome)));
        }
        for (cost, bytes, waiter) in due.grants {
            // A permit that nobody takes gives its space back when it is dropped here.
            let _ = waiter.send(Permit::new(self, cost, bytes));
        }
        if due.commit {
            let shared = self.clone();
            self.world.disk.spawn(Box::new(move |files| shared.commit_queued(files)));
        }
        if due.apply {
            let shared = self.clone();
            self.world.disk.spawn(Box::new(move |files| shared.apply_committed(files)));
        }
        if let Some(checkpoint) = due.checkpoint {
            let shared = self.clone();
            self.world.disk.spawn(Box::new(move |files| shared.run_checkpoint(files, *checkpoint)));
        }
        if due.timer {
            self.runtime.spawn(commit_later(Arc::downgrade(self), self.world.clock.sleep(WRITE_BACK_DELAY)));
        }
        if self.progress.receiver_count() > 0 {
            self.progress.send_replace(());
        }
    }

    /// Waits until `done` holds for the data.
    pub async fn wait_until(&self, mut done: impl FnMut(&Inner) -> bool) {
        let mut progress = self.progress.subscribe();
        loop {
            progress.mark_unchanged();
            if done(&self.lock()) {
                return;
            }
            if progress.changed().await.is_err() {
                return;
            }
        }
    }
}

/// Commits write-back records that nothing else made durable in the meantime.
async fn commit_later(shared: Weak<Shared>, delay: impl Future<Output = ()>) {
    delay.await;
    if let Some(shared) = shared.upgrade() {
        shared.with(|inner| {
            inner.timer_armed = false;
            inner.want_durable();
        });
    }
}

#[cfg(test)]
mod tests {
    use super::super::submit::small;
    use super::*;

    #[test]
    fn a_file_goes_with_the_checkpoint_of_its_own_removal() {
        let start = Position { offset: 0, sequence: 1, skip: 0 };
        let mut inner = Inner::new(Entries::default(), Epochs::NONE, start, 1 << 20);
        let apply = |inner: &mut Inner, number: u64, kind: Kind| {
            let record = Record { oid: 7, size_bytes: 4096, ..small(kind) };
            let result = record.outcome(None);
            inner.applied(Committed { queued: Queued { number, record, cost: 0, result }, batch_end: None });
        };
        apply(&mut inner, 1, Kind::Remove);
        let first = inner.capture();
        apply(&mut inner, 2, Kind::Install);
        apply(&mut inner, 3, Kind::Remove);
        inner.finish(first);
        assert_eq!(inner.next_unlink(), None, "what was installed since cannot be made again by a replay");
        let second = inner.capture();
        inner.finish(second);
        assert_eq!((inner.next_unlink(), inner.next_unlink()), (Some((7, 0)), None));
    }
}
