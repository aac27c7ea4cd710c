//! This node's copies: which of them may be used, and in which order writes reach them.
//!
//! A copy may be used when it is *current*: known to be the newest there is in this epoch. Right after a change of members
//! only some copies are; the others are compared with the other holders', and fetched where they are older, by
//! `recovery`. Writes to a copy that is not current yet are parked and applied, in the order they came, when it is. So that
//! a guest does not wait for whole objects to travel, most of them are *deferred*: answered as soon as they are parked. The
//! gateway ends a write only when another holder has it in a copy that counts.
//!
//! Always holds:
//! 1. The writes of an object are submitted to the store in stamp order: a gateway sends them in that order over one
//!    connection, and once one is parked every later one to the same object is parked behind it.
//! 2. Nothing of an older epoch is accepted, and nothing of an older lease generation than one that has written.
//! 3. A foreign reader (not the lease holder) sees only what is on all holders, so what it saw cannot be taken back by a
//!    crash. It waits for the writer's word on that, or, when the writer's lease is over, has the copies compared.
//! 4. A map is not read for somebody who takes a deleted VDI for one that exists, or a snapshot for a working VDI. No write is
//!    taken under a lease that this node does not know of yet (`peer` waits): so what came before the lease is known with it.
//! 5. In a new epoch no write ends before all members that held its object, and do not now, are in that epoch, too: a gateway that
//!    is behind might still be shown their copies (`is_epoch_known`).
//! 6. While an object has deferred writes, nothing this node says of it, now or after a crash, counts as if its copy had
//!    taken what the current epoch wrote (`History::may_defer`): its version gets the current epoch with the last of
//!    them, not before. Deferred writes are always the first of those parked for an object.

use std::cmp::Ordering;
use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use bytes::Bytes;
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::cluster_state::ClusterState;
use sheep_core::history::Answer;
use sheep_core::member::NodeId;
use sheep_core::peer_message::{
    FLAG_AGAIN, FLAG_COPY, FLAG_CREATE, FLAG_DRAINED, FLAG_DURABLE, FLAG_LIVE, FLAG_WORKING, PeerKind, PeerRequest,
    Verdict,
};
use sheep_core::stamp::{Epoch, Stamp, Version};
use sheep_core::write_fate::{Fate, WriteFates};
use tokio::sync::{Notify, oneshot, watch};

use super::view::View;
use crate::store::{Durability, Permit, ReadError, Store, SubmitError, Ticket, Write, WriteKind};
use crate::world::marks::{self, Mark};
use crate::world::planted::{self, Bug};

/// The copies of one node. Shared by the gateway of the same node and by the connections of all others.
pub struct Holder {
    node: NodeId,
    store: Store,
    /// As the store said when this process began.
    met_before: Option<Epoch>,
    /// The last epoch for which `meet` has noted that.
    noted: tokio::sync::Mutex<Epoch>,
    state: Mutex<State>,
    /// Told whenever a copy became current, a mark moved or the epoch changed.
    changed: Notify,
    /// Why the store takes nothing any more.
    failure: Arc<watch::Sender<Option<String>>>,
}

struct State {
    view: Arc<View>,
    /// Below: what is known of this epoch. While false, every copy is current.
    recovering: bool,
    /// Whether this node had everything at the end of the epoch before and was in it all along.
    continued: bool,
    /// Objects that a writer left half-written, or whose copy here is damaged: not current until compared, whatever the
    /// fields above say.
    suspects: HashSet<Oid>,
    /// Those of `suspects` that this node knew of when the epoch began: what it tells the others when they ask.
    told: Vec<Oid>,
    /// VDIs whose writer was lost with this epoch or an earlier one, until everybody has told what it left half-written: a holder that
    /// missed the writer's last write cannot know of it by itself.
    unsure: HashSet<VdiId>,
    /// Whether others may know of half-written objects that this node has not heard of in this epoch.
    hearing: bool,
    /// False until the first epoch: a process that just started did not take part in the one before.
    entered: bool,
    /// The cluster was formatted and the old objects are not gone yet: nothing is taken.
    wiping: bool,
    /// Copies found damaged: they count as absent until they are replaced.
    damaged: HashSet<Oid>,
    /// Compared (and fetched) in this epoch.
    confirmed: HashSet<Oid>,
    /// Epochs, from the last clean one on, that ended here with everything that this node had to hold.
    completed: BTreeSet<Epoch>,
    parked: HashMap<Oid, VecDeque<Parked>>,
    /// Whether writes may be deferred in this epoch.
    deferring: bool,
    /// Members that have said in this epoch that they are there: one that was dead when it began takes no part in any write.
    heard: BTreeSet<NodeId>,
    /// Whether all that store something have.
    heard_all: bool,
    /// Those heard in this and earlier epochs, as far as a comparison may go back to them.
    met: BTreeMap<Epoch, BTreeSet<NodeId>>,
    /// Bytes of deferred writes.
    deferred_bytes: u64,
    /// Objects that lost parked writes since their comparison began: it must be done again.
    dropped: HashSet<Oid>,
    /// Per VDI, what its writer has told.
    marks: HashMap<VdiId, Marks>,
    /// For gateways that lost their lease in the middle of a write.
    fates: WriteFates,
}

/// What is known of the writes of one lease.
#[derive(Default)]
struct Marks {
    generation: u32,
    /// Who holds the lease.
    writer: Option<NodeId>,
    /// Every write up to this is on all holders.
    settled: u64,
    /// Objects whose last write here is above that, by its sequence, and the other way round: as many as there are
    /// objects, however long one write takes.
    unsettled: BTreeMap<u64, Oid>,
    last_write: HashMap<Oid, u64>,
}

impl Marks {
    fn note_write(&mut self, sequence: u64, oid: Oid) {
        // A write that arrives once more may have been settled meanwhile.
        if sequence <= self.settled || self.last_write.get(&oid).is_some_and(|last| *last >= sequence) {
            return;
        }
        if let Some(earlier) = self.last_write.insert(oid, sequence) {
            self.unsettled.remove(&earlier);
        }
        self.unsettled.insert(sequence, oid);
    }

    fn note_settled(&mut self, settled: u64) {
        self.settled = self.settled.max(settled);
        while let Some(first) = self.unsettled.first_entry() {
            if *first.key() > self.settled {
                break;
            }
            self.last_write.remove(&first.remove());
        }
    }

    fn take_unsettled(&mut self) -> impl Iterator<Item = Oid> {
        self.last_write.clear();
        std::mem::take(&mut self.unsettled).into_values()
    }
}

struct Parked {
    request: PeerRequest,
    data: Bytes,
    /// Nothing if the write was deferred: its gateway has its answer.
    answer: Option<oneshot::Sender<Pending>>,
}

/// Most bytes of deferred writes. Beyond that writes wait for their objects, so that guests get as fast as
/// recovery is.
const DEFERRED_BYTES_MAX: u64 = 64 << 20;

/// What a deferred write takes, payload and all.
fn deferred_cost(payload_bytes: usize) -> u64 {
    (payload_bytes + size_of::<Parked>()) as u64
}

/// What [`Holder::writes_between`] found.
pub enum Between {
    /// All of them: offsets and bytes.
    Writes(Vec<(u64, Bytes)>),
    /// The last ones have not come yet.
    NotAllYet,
    /// They cannot be had: one is a creation, a copy or a removal, or the lease changed hands. The object must be compared
    /// again: its source then has them from the start.
    Replaced,
}

/// What must be brought up to date because of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wanted {
    /// Nothing, or what somebody else wanted already.
    Nothing,
    /// An object, at once: the write waits for it.
    Now(Oid),
    /// An object, when its turn comes: the write is deferred.
    InTurn(Oid),
}

/// The copy cannot be read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Damaged;

/// A write on its way.
pub enum Pending {
    /// Decided already.
    Now(Verdict),
    /// In the store's journal, over what had this stamp; if that fails, the sender tells the node.
    Ticket(Ticket, Stamp, Arc<watch::Sender<Option<String>>>),
    /// Waiting for its object to become current.
    Parked(oneshot::Receiver<Pending>),
}

impl Pending {
    /// How it ended, if that is known already, and the stamp of the copy before it.
    pub fn decided(&self) -> Option<(Verdict, Stamp)> {
        match self {
            Pending::Now(verdict) => Some((*verdict, Stamp::default())),
            Pending::Ticket(ticket, before, _) => ticket.is_success().then_some((Verdict::Ok, *before)),
            Pending::Parked(_) => None,
        }
    }

    /// Calls back with the end, and with the stamp of the copy before it, if this was written; as [`Ticket::then`] not on the
    /// stack of the caller.
    pub fn then(self, call: impl FnOnce(Verdict, Stamp) + Send + 'static) {
        match self {
            Pending::Ticket(ticket, before, failure) => ticket.then(move |outcome| match outcome {
                Ok(()) => call(Verdict::Ok, before),
                // This node leaves with its store; the write is for the holders of the next epoch. Until then its gateway
                // must neither think it done nor tell its client that it failed: it hears nothing.
                Err(error) => drop(failure.send_replace(Some(error.to_string()))),
            }),
            Pending::Now(verdict) => drop(tokio::spawn(async move { call(verdict, Stamp::default()) })),
            Pending::Parked(receiver) => drop(tokio::spawn(async move {
                match receiver.await {
                    Ok(next) => next.then(call),
                    // The epoch it was sent in is over.
                    Err(_) => call(Verdict::OldEpoch, Stamp::default()),
                }
            })),
        }
    }
}

impl Holder {
    /// The copies of `store`, in the epoch of `view`.
    pub fn new(node: NodeId, store: Store, view: Arc<View>) -> Holder {
        let state = State {
            view,
            recovering: true,
            continued: false,
            suspects: HashSet::new(),
            told: Vec::new(),
            unsure: HashSet::new(),
            hearing: false,
            entered: false,
            wiping: false,
            damaged: HashSet::new(),
            confirmed: HashSet::new(),
            completed: BTreeSet::from([store.clean_through()]),
            parked: HashMap::new(),
            deferring: false,
            heard: BTreeSet::new(),
            heard_all: false,
            met: BTreeMap::new(),
            deferred_bytes: 0,
            dropped: HashSet::new(),
            marks: HashMap::new(),
            fates: WriteFates::default(),
        };
        Holder {
            node,
            met_before: store.met_through(),
            noted: tokio::sync::Mutex::new(Epoch(0)),
            store,
            state: Mutex::new(state),
            changed: Notify::new(),
            failure: Arc::new(watch::channel(None).0),
        }
    }

    /// Who this node is.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Where the copies are kept.
    pub fn store(&self) -> &Store {
        &self.store
    }

    /// Told whenever a copy became current, a mark moved or the epoch changed.
    pub fn changed(&self) -> &Notify {
        &self.changed
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The epoch in which this node takes requests.
    pub fn epoch(&self) -> Epoch {
        self.state().view.epoch()
    }

    /// The view in which this node takes requests.
    pub fn view(&self) -> Arc<View> {
        self.state().view.clone()
    }

    /// A newer view. True if the epoch changed, so that recovery must begin.
    pub fn enter(&self, view: Arc<View>) -> bool {
        let mut state = self.state();
        let before = state.view.epoch();
        if view.epoch() == before {
            state.view = view;
            // Nobody is waiting for an epoch, but somebody may wait for the cluster to run.
            self.changed.notify_waiters();
            return false;
        }
        assert!(
            view.epoch() > before || view.state.cluster_id != state.view.state.cluster_id,
            "epochs only go forward"
        );
        let previous = Epoch(view.epoch().get().saturating_sub(1));
        let in_since = view.state.members.get(&self.node).map(|member| member.since);
        let took_part = std::mem::replace(&mut state.entered, true);
        // After an orderly stop of everybody a process goes on in an epoch that an earlier one found clean, and looks again.
        state.continued = took_part
            && !state.recovering
            && in_since.is_some_and(|since| since <= previous)
            && self.store.clean_through() == previous;
        if view.state.cluster_id != state.view.state.cluster_id {
            state.suspects.clear();
            state.unsure.clear();
            state.completed = BTreeSet::from([self.store.clean_through()]);
        }
        if in_since.is_none_or(|since| since > previous) {
            // What others wrote and removed while this process was out, it has not seen.
            state.fates.forget_all();
        }
        // A process that just started knows of no writer; the others tell it of those that were lost.
        let lost = if took_part { lost_writers(&state.view.state, &view.state) } else { HashSet::new() };
        if !lost.is_empty() {
            marks::hit(Mark::WriterLost);
        }
        // What a lost writer left on some holders is in doubt until all have it, however many epochs that takes: one that lacks it
        // and stayed in is taken for current (`History::current_as_of`), and nobody may have been shown what it does not have.
        let mut told: Vec<Oid> = state.suspects.iter().copied().collect();
        told.sort_unstable();
        for (vdi, marks) in &mut state.marks {
            let held = view.state.leases.get(&vdi.get()).is_some_and(|lease| {
                // A writer that is still there sends again what was under way.
                lease.generation == marks.generation && lease.holder.is_some()
            });
            if !held || lost.contains(vdi) {
                told.extend(marks.take_unsettled());
            }
        }
        if planted::is(Bug::ForgottenSuspects) {
            told.clear();
            state.suspects.clear();
        }
        state.suspects.extend(told.iter().copied());
        state.told = told;
        state.unsure.extend(lost);
        state.hearing = !state.continued || !state.unsure.is_empty();
        state.wiping = false;
        state.recovering = true;
        state.confirmed.clear();
        // Dropping the parked writes answers `OldEpoch`: their gateway sends them again in this epoch.
        state.parked.clear();
        // A node that has just come in knows of no lost writer yet.
        state.deferring = state.continued;
        state.heard.clear();
        state.dropped.clear();
        state.deferred_bytes = 0;
        // Everybody in the new epoch begins with that clean one, or a later one.
        let clean = view.state.clean;
        state.met.retain(|epoch, _| *epoch > clean);
        state.completed.retain(|epoch| *epoch >= clean);
        state.view = view;
        // Whoever is alone has nobody to hear.
        state.heard_all = has_heard_all(&state, self.node);
        self.changed.notify_waiters();
        true
    }

    /// A member said, by a question or an answer, that it is in `epoch`. To be called before anything of that epoch is said to it:
    /// if it has everything, and this node has not, that they met is durably noted first.
    pub async fn meet(&self, node: NodeId, epoch: Epoch) -> Result<(), Verdict> {
        let has_everything = {
            let state = self.state();
            if state.view.epoch() != epoch {
                return Err(Verdict::OldEpoch);
            }
            if !state.recovering || state.heard.contains(&node) {
                return Ok(());
            }
            state.view.state.epoch_record(epoch).is_some_and(|record| record.steady.contains_key(&node))
        };
        if has_everything {
            let mut noted = self.noted.lock().await;
            if *noted < epoch {
                self.store.note_meeting(epoch).await.map_err(|_| Verdict::Failed)?;
                *noted = epoch;
            }
        }
        let mut state = self.state();
        if state.view.epoch() != epoch {
            return Err(Verdict::OldEpoch);
        }
        state.heard.insert(node);
        state.heard_all = has_heard_all(&state, self.node);
        state.met.entry(epoch).or_default().insert(node);
        if state.deferring {
            self.defer_parked(&mut state);
        }
        drop(state);
        self.changed.notify_waiters();
        Ok(())
    }

    /// Waits until this node has everything, or has met all that store something: what a flush makes durable may be what this
    /// node lacks, and then it must not say later that it met nobody who had it.
    pub async fn await_everybody(&self, epoch: Epoch) -> Result<(), Verdict> {
        loop {
            let changed = self.changed.notified();
            {
                let state = self.state();
                if state.view.epoch() != epoch {
                    return Err(Verdict::OldEpoch);
                }
                if !state.recovering || has_heard_all(&state, self.node) {
                    return Ok(());
                }
            }
            changed.await;
        }
    }

    /// Objects that must be compared before anything else is: a writer left them half-written.
    pub fn suspects(&self) -> Vec<Oid> {
        self.state().suspects.iter().copied().collect()
    }

    /// What this node tells the others about half-written objects of `epoch`.
    pub fn told(&self, epoch: Epoch) -> Option<Vec<Oid>> {
        let state = self.state();
        (state.view.epoch() == epoch).then(|| state.told.clone())
    }

    /// Whether a writer was, or may have been, lost with this epoch, so that the others must be asked.
    pub fn must_hear_suspects(&self) -> bool {
        self.state().hearing
    }

    /// Everybody has told what lost writers left half-written.
    pub fn heard_suspects(&self, epoch: Epoch, suspects: impl IntoIterator<Item = Oid>) {
        let mut state = self.state();
        if state.view.epoch() != epoch {
            return;
        }
        let state = &mut *state;
        // What was compared in this epoch already was compared with everybody.
        state.suspects.extend(suspects.into_iter().filter(|oid| !state.confirmed.contains(oid)));
        state.unsure.clear();
        state.hearing = false;
        state.deferring = true;
        self.defer_parked(state);
        self.changed.notify_waiters();
    }

    /// Answers the writes that came before this node could defer any.
    fn defer_parked(&self, state: &mut State) {
        for oid in state.parked.keys().copied().collect::<Vec<_>>() {
            let Some(mut parked) = state.parked.remove(&oid) else { continue };
            let mut last_was_deferred = None;
            for write in &mut parked {
                let cost = deferred_cost(write.data.len());
                if write.answer.is_some() && self.may_defer(state, &write.request, cost, last_was_deferred) {
                    note_write(state, &write.request);
                    state.deferred_bytes += cost;
                    write.data = Bytes::copy_from_slice(&write.data);
                    if let Some(answer) = write.answer.take() {
                        // The connection may be gone.
                        drop(answer.send(Pending::Now(Verdict::Deferred)));
                    }
                }
                last_was_deferred = Some(write.answer.is_none());
            }
            state.parked.insert(oid, parked);
        }
    }

    /// Whether this node's copy of an object (or its absence) is the newest there is.
    pub fn is_current(&self, oid: Oid) -> bool {
        is_current(&self.state(), self.node, oid)
    }

    /// Whether anything may not be current.
    pub fn is_recovering(&self) -> bool {
        self.state().recovering
    }

    /// The comparison of an object begins.
    pub fn begin_comparison(&self, oid: Oid) {
        self.state().dropped.remove(&oid);
    }

    /// A copy was compared, and fetched if need be, in `epoch`: parked writes go on. False if it must be compared again.
    pub fn confirm(&self, oid: Oid, epoch: Epoch) -> bool {
        self.confirm_as(oid, epoch, false)
    }

    /// As `confirm`, for a copy whose version does not show yet that it is the newest of this epoch.
    pub fn confirm_durably(&self, oid: Oid, epoch: Epoch) -> bool {
        self.confirm_as(oid, epoch, true)
    }

    /// Notes that a copy which `epoch` puts on other nodes has everything that was written up to `as_of`. Durable before
    /// what is submitted later.
    pub fn keep_as_of(&self, oid: Oid, as_of: Epoch, epoch: Epoch) {
        let state = self.state();
        if state.view.epoch() == epoch
            && let Some(entry) = self.store.entry(oid)
            && entry.version.epoch < as_of
        {
            marks::hit(Mark::StrayKept);
            drop(self.store.confirm(oid, Version { epoch: as_of, stamp: entry.version.stamp }));
        }
    }

    fn confirm_as(&self, oid: Oid, epoch: Epoch, durably: bool) -> bool {
        let mut state = self.state();
        if state.view.epoch() != epoch {
            return true;
        }
        let is_waited_for = state.parked.contains_key(&oid) && !is_epoch_known(&state, self.node, oid);
        if is_waited_for || state.dropped.contains(&oid) || !self.submit_deferred(&mut state, oid) {
            return false;
        }
        if durably
            && let Some(entry) = self.store.entry(oid)
            && entry.version.epoch < epoch
        {
            // Nobody waits for it: the order of the journal is what matters.
            drop(self.store.confirm(oid, Version { epoch, stamp: entry.version.stamp }));
        }
        state.suspects.remove(&oid);
        state.confirmed.insert(oid);
        self.unpark(&mut state, oid);
        let copies_of_it = |parked: &VecDeque<Parked>| {
            parked.front().is_some_and(|first| first.request.has(FLAG_COPY) && first.request.source == oid)
        };
        let waiting: Vec<Oid> =
            state.parked.iter().filter(|(_, parked)| copies_of_it(parked)).map(|(target, _)| *target).collect();
        for target in waiting {
            self.unpark(&mut state, target);
        }
        drop(state);
        self.changed.notify_waiters();
        true
    }

    /// Submits the deferred writes of an object. Only the last of them carries the current epoch into the object's
    /// version (invariant 6). False if there is no space.
    fn submit_deferred(&self, state: &mut State, oid: Oid) -> bool {
        let Some(mut parked) = state.parked.remove(&oid) else { return true };
        let mut left = parked.iter().take_while(|parked| parked.answer.is_none()).count();
        while left > 0
            && let Some(first) = parked.front()
        {
            let mut request = first.request;
            if left > 1 {
                request.epoch = self.store.entry(oid).map_or(Epoch(0), |entry| entry.version.epoch);
            }
            let permit = self.store.admit_now(first.data.len() as u64);
            match self.submit(state, &request, first.data.clone(), permit) {
                Pending::Now(Verdict::NoSpace) => {
                    state.parked.insert(oid, parked);
                    return false;
                }
                Pending::Now(verdict) => {
                    // The other holders said the same to the gateway.
                    tracing::warn!("a deferred write to object {oid} was dropped: {verdict:?}");
                }
                pending => {
                    // Nobody waits for it, but a device that fails must be told.
                    pending.then(|_, _| ());
                }
            }
            left -= 1;
            if let Some(done) = parked.pop_front() {
                state.deferred_bytes -= deferred_cost(done.data.len());
            }
        }
        if !parked.is_empty() {
            state.parked.insert(oid, parked);
        }
        true
    }

    /// No write of `epoch` is deferred from now on.
    pub fn stop_deferring(&self, epoch: Epoch) {
        let mut state = self.state();
        if state.view.epoch() == epoch {
            state.deferring = false;
        }
    }

    /// See `history::Answer`.
    pub fn met_before(&self) -> Option<Epoch> {
        if planted::is(Bug::HiddenMeeting) {
            return Some(Epoch::default());
        }
        self.met_before
    }

    /// See `history::Answer`.
    pub fn met_nobody(&self, oid: Oid) -> bool {
        if planted::is(Bug::HiddenMeeting) {
            return true;
        }
        let (view, met) = {
            let state = self.state();
            (state.view.clone(), state.met.clone())
        };
        view.locate(oid).is_some_and(|at| !view.history.met_steady(&met, at.key, at.copies))
    }

    /// The last epoch for which this node had everything that it must hold. That it has no copy of an object says something only
    /// if it held it then, and must not be forgotten in the middle of an epoch: others would be told different things. So of an
    /// object that is not here it is the last such epoch in which this node held it, if there is one.
    pub fn clean_through(&self, oid: Oid) -> Epoch {
        let through = self.store.clean_through();
        if self.store.entry(oid).is_some() {
            return through;
        }
        let state = self.state();
        let Some(at) = state.view.locate(oid) else { return through };
        let held = |epoch: &&Epoch| state.view.history.held(self.node, **epoch, at.key, at.copies);
        state.completed.iter().rev().find(held).copied().unwrap_or(through)
    }

    /// Whether deferred writes of `epoch` are not in their copies yet.
    pub fn has_deferred(&self, epoch: Epoch) -> bool {
        let state = self.state();
        let is_deferred = |parked: &VecDeque<Parked>| parked.front().is_some_and(|first| first.answer.is_none());
        state.view.epoch() == epoch && state.parked.values().any(is_deferred)
    }

    /// The writes that take an object from the content at stamp `after` to that at `through`, in order, as far as they were
    /// sent to this node.
    pub fn writes_between(&self, oid: Oid, after: Stamp, through: Stamp) -> Between {
        if through <= after {
            return Between::Writes(Vec::new());
        }
        let state = self.state();
        // Writes of an earlier lease generation were dropped here, or refused, that the source may have in part.
        let generation = state.marks.get(&oid.vid()).map_or(0, |marks| marks.generation);
        if state.dropped.contains(&oid) || through.generation < generation {
            return Between::Replaced;
        }
        let parked = state.parked.get(&oid).into_iter().flatten();
        let newer = parked.filter(|parked| parked.request.stamp > after);
        let mut writes = Vec::new();
        let mut last = after;
        for parked in newer {
            let request = &parked.request;
            // One that was sent once more is there twice.
            if request.stamp <= last {
                continue;
            }
            last = request.stamp;
            if last > through {
                break;
            }
            if !is_plain(request) {
                return Between::Replaced;
            }
            writes.push((request.offset, parked.data.clone()));
        }
        if last < through { Between::NotAllYet } else { Between::Writes(writes) }
    }
    /// Submits the parked writes of an object, in order, as far as there is space.
    fn unpark(&self, state: &mut State, oid: Oid) {
        let mut parked = state.parked.remove(&oid).unwrap_or_default();
        while let Some(first) = parked.pop_front() {
            if self.waits_for(state, &first.request).is_some() {
                parked.push_front(first);
                state.parked.insert(oid, parked);
                return;
            }
            let permit = self.store.admit_now(first.data.len() as u64);
            match self.submit(state, &first.request, first.data.clone(), permit) {
                Pending::Now(Verdict::NoSpace) => {
                    parked.push_front(first);
                    state.parked.insert(oid, parked);
                    return;
                }
                pending => {
                    if let Some(answer) = first.answer {
                        let _ = answer.send(pending);
                    }
                }
            }
        }
    }

    /// Tries the writes again that found no space.
    pub fn retry_parked(&self) {
        let mut state = self.state();
        let ready: Vec<Oid> = state.parked.keys().copied().filter(|oid| is_current(&state, self.node, *oid)).collect();
        for oid in ready {
            self.unpark(&mut state, oid);
        }
    }

    /// The copy of an object is damaged: it counts as absent, and must be compared before it is used again.
    pub fn distrust(&self, oid: Oid) {
        let mut state = self.state();
        state.suspects.insert(oid);
        state.damaged.insert(oid);
    }

    /// The copy was replaced.
    pub fn trust_again(&self, oid: Oid) {
        self.state().damaged.remove(&oid);
    }

    /// The version of the copy here. `Err` if it is damaged: then this node knows nothing of the object, not even that it
    /// does not exist.
    pub fn version(&self, oid: Oid) -> Result<Option<Version>, Damaged> {
        if self.state().damaged.contains(&oid) {
            return Err(Damaged);
        }
        Ok(self.store.entry(oid).map(|entry| entry.version))
    }

    /// Whether a writer may have left the object half-written, so that all its holders must have the same before it is
    /// used.
    pub fn is_doubtful(&self, oid: Oid) -> bool {
        let state = self.state();
        state.hearing || state.suspects.contains(&oid)
    }

    /// Whether a removal waits for the object to become current.
    pub fn is_being_removed(&self, oid: Oid) -> bool {
        let state = self.state();
        state.parked.get(&oid).is_some_and(|parked| parked.iter().any(|parked| parked.request.kind == PeerKind::Remove))
    }

    /// Whether this node is about to run out of space: gateways stop sending writes before one has to be refused.
    pub fn is_nearly_full(&self) -> bool {
        self.store.is_nearly_full()
    }

    /// Forgets everything: the cluster was formatted anew.
    pub async fn wipe(&self) {
        {
            let mut state = self.state();
            state.marks.clear();
            state.parked.clear();
            state.deferred_bytes = 0;
            state.suspects.clear();
            state.damaged.clear();
            state.fates.forget_all();
            state.wiping = true;
        }
        let last = Version { epoch: Epoch(u32::MAX), stamp: Stamp { generation: u32::MAX, sequence: u64::MAX } };
        loop {
            let entries = self.store.entries(None, 4096);
            let tickets: Vec<Ticket> = entries.iter().map(|(oid, _)| self.store.remove(*oid, last)).collect();
            if tickets.is_empty() {
                break;
            }
            for ticket in tickets {
                if let Err(error) = ticket.await {
                    tracing::error!("cannot remove what was there before the format: {error}");
                    return;
                }
            }
        }
        if let Err(error) = self.store.set_clean_through(Epoch(0)).await {
            tracing::error!("cannot note the format: {error}");
        }
    }

    /// Every copy was compared in `epoch`. False if that epoch is over.
    pub fn recovered(&self, epoch: Epoch) -> bool {
        let mut state = self.state();
        if state.view.epoch() != epoch {
            return false;
        }
        state.recovering = false;
        let clean = state.view.state.clean;
        state.completed.retain(|epoch| *epoch >= clean);
        state.completed.insert(epoch);
        // With its room: it had every object here, and may not be wanted again for months.
        state.confirmed = HashSet::new();
        drop(state);
        self.changed.notify_waiters();
        true
    }

    /// Checks and submits a write; the order of calls is the order in which an object's writes are applied. `Err` gives the
    /// object that must be brought up to date first (the write is parked behind it).
    pub fn write(&self, request: &PeerRequest, data: Bytes, permit: Permit) -> (Pending, Wanted) {
        let mut state = self.state();
        if let Some(verdict) = Self::refuse(&mut state, request) {
            return (Pending::Now(verdict), Wanted::Nothing);
        }
        let waits_for = self.waits_for(&state, request);
        if waits_for.is_some() || state.parked.contains_key(&request.oid) {
            // A parked write may wait for other nodes; journal space must not (it may be what they wait for).
            drop(permit);
            return self.park(&mut state, request, data);
        }
        match self.submit(&mut state, request, data.clone(), permit) {
            // Refusing it here while other holders take it would leave the copies different: it waits for space.
            Pending::Now(Verdict::NoSpace) => {
                tracing::error!("no space for a write to object {}: it waits; free space or add a disk", request.oid);
                marks::hit(Mark::WriteWaitsForSpace);
                let (answer, receiver) = oneshot::channel();
                let parked = Parked { request: *request, data, answer: Some(answer) };
                state.parked.entry(request.oid).or_default().push_back(parked);
                (Pending::Parked(receiver), Wanted::Nothing)
            }
            pending => (pending, Wanted::Nothing),
        }
    }

    /// Keeps a write until its object is current.
    fn park(&self, state: &mut State, request: &PeerRequest, data: Bytes) -> (Pending, Wanted) {
        let oid = request.oid;
        let last_was_deferred = state.parked.get(&oid).and_then(VecDeque::back).map(|last| last.answer.is_none());
        if self.may_defer(state, request, deferred_cost(data.len()), last_was_deferred) {
            note_write(state, request);
            state.deferred_bytes += deferred_cost(data.len());
            // A copy: the payload is a slice of a receive buffer that is many times as large.
            let data = Bytes::copy_from_slice(&data);
            state.parked.entry(oid).or_default().push_back(Parked { request: *request, data, answer: None });
            marks::hit(Mark::WriteDeferred);
            let wanted = if last_was_deferred.is_none() { Wanted::InTurn(oid) } else { Wanted::Nothing };
            return (Pending::Now(Verdict::Deferred), wanted);
        }
        let (answer, receiver) = oneshot::channel();
        state.parked.entry(oid).or_default().push_back(Parked { request: *request, data, answer: Some(answer) });
        marks::hit(Mark::WriteParked);
        // Whoever was the first to wait has had it wanted; a copy wants its source as well.
        let first_to_wait = last_was_deferred != Some(false);
        let wanted = if first_to_wait || request.has(FLAG_COPY) { Wanted::Now(oid) } else { Wanted::Nothing };
        (Pending::Parked(receiver), wanted)
    }

    /// Whether a write to an object that is not current may be answered now. `last_was_deferred` tells of the last one that
    /// is parked for the same object, if any.
    fn may_defer(&self, state: &State, request: &PeerRequest, bytes: u64, last_was_deferred: Option<bool>) -> bool {
        let oid = request.oid;
        let doubtful = state.suspects.contains(&oid) || state.unsure.contains(&oid.vid());
        if !state.recovering || !state.deferring || doubtful || !is_plain(request) {
            return false;
        }
        if !is_epoch_known(state, self.node, oid) {
            return false;
        }
        if state.deferred_bytes + bytes > DEFERRED_BYTES_MAX {
            return false;
        }
        if let Some(deferred) = last_was_deferred {
            return deferred;
        }
        let Some(at) = state.view.locate(oid) else { return false };
        let version = self.store.entry(oid).map(|entry| entry.version);
        let clean_through = self.store.clean_through();
        let own = Answer { node: self.node, version, clean_through, met_nobody: false, met_before: None };
        // What is in the memory of this node is no copy that outlasts it.
        let min_copies = state.view.state.min_copies(at.copies.now());
        !is_current(state, self.node, oid)
            && state.view.history.may_defer(&own, at.key, at.copies, min_copies, &state.heard)
    }

    fn waits_for(&self, state: &State, request: &PeerRequest) -> Option<Oid> {
        if !is_current(state, self.node, request.oid) || !is_epoch_known(state, self.node, request.oid) {
            return Some(request.oid);
        }
        let copies = request.has(FLAG_COPY) && !is_current(state, self.node, request.source);
        copies.then_some(request.source)
    }

    /// What other objects the parked writes of `oid` need: the sources of their copies.
    pub fn sources_needed(&self, oid: Oid) -> Vec<Oid> {
        let state = self.state();
        let parked = state.parked.get(&oid).into_iter().flatten();
        let sources = parked.filter(|parked| parked.request.has(FLAG_COPY)).map(|parked| parked.request.source);
        sources.filter(|source| !is_current(&state, self.node, *source)).collect()
    }

    fn refuse(state: &mut State, request: &PeerRequest) -> Option<Verdict> {
        if (request.epoch != state.view.epoch() && !planted::is(Bug::OldEpoch)) || state.wiping {
            return Some(Verdict::OldEpoch);
        }
        let vdi = request.oid.vid();
        let known = state.view.state.leases.get(&vdi.get()).map_or(0, |lease| lease.generation);
        let marks = state.marks.entry(vdi).or_default();
        if request.stamp.generation < known.max(marks.generation) && !planted::is(Bug::OldLease) {
            return Some(Verdict::Fenced);
        }
        if request.stamp.generation > marks.generation {
            // The lease changed hands after the last holder's writes were drained (or compared, if it died). Its last mark may
            // come later than the first write of the next one, who then says so. Should any be left otherwise, they are
            // compared like those of a dead one.
            let drained = request.has(FLAG_DRAINED) && request.stamp.generation == marks.generation + 1;
            let left: Vec<Oid> = marks.take_unsettled().filter(|_| !drained).collect();
            let generation = request.stamp.generation;
            *marks = Marks {
                generation: request.stamp.generation,
                writer: Some(request.sender),
                settled: request.settled,
                ..Marks::default()
            };
            state.suspects.extend(left);
            drop_parked(state, vdi, generation);
            return None;
        }
        marks.note_settled(request.settled);
        None
    }

    fn submit(&self, state: &mut State, request: &PeerRequest, data: Bytes, permit: Permit) -> Pending {
        let version = Version { epoch: request.epoch, stamp: request.stamp };
        let here = self.store.entry(request.oid).map(|entry| entry.version.stamp);
        let before = here.or_else(|| state.fates.removal(request.oid.raw()));
        let here = here.unwrap_or_default();
        if let Some(before) = before.filter(|before| ends_stint(*before, request)) {
            state.fates.stint_ends(request.oid.raw(), before);
        }
        if request.kind == PeerKind::Remove || request.has(FLAG_CREATE) {
            // Whatever was damaged is replaced.
            state.damaged.remove(&request.oid);
        }
        if request.kind == PeerKind::Remove {
            note_write(state, request);
            state.fates.was_removed(request.oid.raw(), request.stamp);
            return Pending::Ticket(self.store.remove(request.oid, version), here, self.failure.clone());
        }
        let kind = if request.has(FLAG_COPY) {
            WriteKind::CopyOf { source: request.source, size_bytes: request.object_bytes }
        } else if request.has(FLAG_CREATE) {
            WriteKind::Create { size_bytes: request.object_bytes }
        } else {
            WriteKind::Overwrite
        };
        let durability = if request.has(FLAG_DURABLE) { Durability::Durable } else { Durability::WriteBack };
        let write = Write { oid: request.oid, version, offset: request.offset, data, kind, durability };
        match self.store.submit(permit, write) {
            Ok(ticket) => {
                note_write(state, request);
                Pending::Ticket(ticket, here, self.failure.clone())
            }
            Err(SubmitError::Stopped(error)) => Pending::Ticket(Ticket::failed(error), here, self.failure.clone()),
            Err(error) => Pending::Now(verdict_of(&error)),
        }
    }

    /// What became of a write, as this node's copy tells.
    pub fn fate(&self, request: &PeerRequest) -> Result<Fate, Verdict> {
        let current = self.check_current(request);
        if current == Err(Verdict::OldEpoch) {
            return Err(Verdict::OldEpoch);
        }
        let state = self.state();
        if current.is_err() || !holds_now(&state, self.node, request.oid) {
            return Ok(state.fates.seen(request.oid.raw(), request.stamp));
        }
        let now = self.store.entry(request.oid).map(|entry| entry.version.stamp);
        Ok(state.fates.fate(request.oid.raw(), now, request.stamp))
    }

    /// This node's copy of an object was removed because others no longer had one.
    pub fn was_found_absent(&self, oid: Oid) {
        self.state().fates.forget(oid.raw());
    }

    /// This node's copy of an object was replaced by another node's.
    pub fn was_replaced(&self, oid: Oid, now: Stamp) {
        self.state().fates.was_replaced(oid.raw(), now);
    }

    /// Removes a copy that belongs elsewhere, if `epoch` is the present one and ended clean: in the next one it may belong here
    /// again, and then it must not go after it was compared. A node that is no member keeps everything: it was taken out because
    /// it was silent, it will be back, and those who are left may be fewer than the copies that an object is to have.
    pub fn remove_stray(&self, oid: Oid, epoch: Epoch) -> Option<Ticket> {
        let state = self.state();
        let is_over = state.view.epoch() != epoch || state.view.state.clean != epoch;
        let is_member = state.view.state.members.contains_key(&self.node);
        if is_over || !is_member || state.view.locate(oid).is_none() || holds_now(&state, self.node, oid) {
            return None;
        }
        let last = Version { epoch, stamp: Stamp { generation: u32::MAX, sequence: u64::MAX } };
        Some(self.store.remove(oid, last))
    }

    /// This node's part ends: see [`Holder::failed`].
    pub fn fail(&self, reason: String) {
        self.failure.send_replace(Some(reason));
    }

    /// Makes everything written so far durable. A failure is the end of this node's part; see [`Holder::failed`].
    pub async fn flush(&self) -> Result<(), Verdict> {
        self.store.flush().await.map_err(|error| {
            self.fail(error.to_string());
            Verdict::Failed
        })
    }

    /// Completes when the store takes nothing any more, with the reason.
    pub async fn failed(&self) -> String {
        let mut failures = self.failure.subscribe();
        let refused = async {
            match failures.wait_for(Option::is_some).await.map(|reason| reason.clone()) {
                Ok(Some(reason)) => reason,
                // The sender lives as long as this.
                _ => std::future::pending().await,
            }
        };
        tokio::select! {
            reason = refused => reason,
            reason = self.store.failed() => reason,
        }
    }

    /// The writer says that everything up to a sequence is on all holders.
    pub fn settle(&self, vdi: VdiId, generation: u32, settled: u64) {
        let mut state = self.state();
        if let Some(marks) = state.marks.get_mut(&vdi)
            && marks.generation == generation
        {
            marks.note_settled(settled);
            drop(state);
            self.changed.notify_waiters();
        }
    }

    /// Whether a write is under a lease that was ordered, and that this node does not know of yet.
    pub fn is_behind(&self, request: &PeerRequest) -> bool {
        !self.state().view.knows_lease(request.oid.vid(), request.stamp.generation) && !planted::is(Bug::ReaderBehind)
    }

    /// Reads if this node's copy is current; `NotCurrent` otherwise.
    pub async fn read(&self, request: &PeerRequest) -> Result<Bytes, Verdict> {
        self.await_settled(request).await?;
        self.check_current(request)?;
        let read = self.store.read(request.oid, request.offset, request.length as usize).await;
        // A write may have come in between: what was read of it must be on all holders before it is told.
        self.await_settled(request).await?;
        if is_outdated(&self.state(), request) {
            return Err(Verdict::Outdated);
        }
        read.map_err(|error| Self::read_failed(request.oid, &error))
    }

    /// The parts of an object that are not zeros, as ascending byte ranges, if this node's copy is current.
    pub async fn extents(&self, request: &PeerRequest) -> Result<Vec<std::ops::Range<u64>>, Verdict> {
        self.check_current(request)?;
        let extents = self.store.content_extents(request.oid).await;
        // A change of members in between may have replaced the copy.
        self.check_current(request)?;
        extents.map_err(|error| Self::read_failed(request.oid, &error))
    }

    /// As `read`, if that needs no waiting at all.
    pub fn read_now(&self, request: &PeerRequest) -> Option<Result<Bytes, Verdict>> {
        let fit = || {
            let state = self.state();
            state.view.epoch() == request.epoch
                && is_current(&state, self.node, request.oid)
                && !unsettled(&state, request)
                && !is_outdated(&state, request)
        };
        if !fit() {
            return None;
        }
        let read = self.store.read_now(request.oid, request.offset, request.length as usize)?;
        // A write may have come in between; see `read`.
        fit().then(|| read.map_err(|error| Self::read_failed(request.oid, &error)))
    }

    /// Refuses unless this node's copy, or that it has none, is the newest in the epoch of the request.
    pub fn check_current(&self, request: &PeerRequest) -> Result<(), Verdict> {
        let state = self.state();
        if state.view.epoch() != request.epoch {
            return Err(Verdict::OldEpoch);
        }
        if is_current(&state, self.node, request.oid) { Ok(()) } else { Err(Verdict::NotCurrent) }
    }

    /// Invariant 3 of the module.
    async fn await_settled(&self, request: &PeerRequest) -> Result<(), Verdict> {
        loop {
            let changed = self.changed.notified();
            {
                let mut state = self.state();
                if state.view.epoch() != request.epoch {
                    return Err(Verdict::OldEpoch);
                }
                if !unsettled(&state, request) {
                    return Ok(());
                }
                if doubt_if_over(&mut state, request.oid) {
                    return Err(Verdict::NotCurrent);
                }
            }
            changed.await;
        }
    }

    fn read_failed(oid: Oid, error: &ReadError) -> Verdict {
        match error {
            ReadError::Missing => Verdict::Missing,
            ReadError::OutOfRange => Verdict::Invalid,
            ReadError::Corrupt { .. } => {
                tracing::error!("the copy of object {oid} on this node is damaged ({error}); reading another copy");
                Verdict::Corrupt
            }
            ReadError::Io { .. } => {
                tracing::error!("cannot read object {oid}: {error}");
                Verdict::Failed
            }
        }
    }
}

fn verdict_of(error: &SubmitError) -> Verdict {
    match error {
        SubmitError::Missing => Verdict::Missing,
        SubmitError::OutOfRange => Verdict::Invalid,
        SubmitError::NoSpace => Verdict::NoSpace,
        SubmitError::TooLarge { .. } => Verdict::Invalid,
        SubmitError::Stopped(_) => Verdict::Failed,
    }
}

fn is_current(state: &State, node: NodeId, oid: Oid) -> bool {
    if state.suspects.contains(&oid) {
        return false;
    }
    if state.unsure.contains(&oid.vid()) && !state.confirmed.contains(&oid) {
        return false;
    }
    if !state.recovering || state.confirmed.contains(&oid) {
        return true;
    }
    if !state.continued {
        return false;
    }
    let previous = Epoch(state.view.epoch().get() - 1);
    state.view.locate(oid).is_some_and(|at| state.view.history.held(node, previous, at.key, at.copies))
}

/// Whether all who held an object before this epoch, and do not hold it now, know of it, so that nobody is shown their copies
/// any more: before that no write may end that they do not take part in. Who is no member any more has a closed fence (`peer`).
fn is_epoch_known(state: &State, node: NodeId, oid: Oid) -> bool {
    if !state.recovering || state.heard_all {
        return true;
    }
    let Some(at) = state.view.locate(oid) else { return true };
    let holders = state.view.holders(&at);
    let knows = |former: &NodeId| *former == node || holders.contains(former) || state.heard.contains(former);
    let is_known = state.view.history.witnesses(at.key, at.copies).iter().all(knows);
    if !is_known {
        marks::hit(Mark::WriteWaitsForEpoch);
    }
    is_known
}

/// Whether all other members that store something have said that they are in this epoch.
fn has_heard_all(state: &State, node: NodeId) -> bool {
    // Of the epoch: after an orderly stop the members come back one by one.
    let Some(record) = state.view.state.epoch_record(state.view.epoch()) else { return false };
    let storing = record.members.values().map(|m| &m.member).filter(|m| !m.is_gateway());
    storing.filter(|member| member.id != node).all(|member| state.heard.contains(&member.id))
}

/// Whether the reader of a map takes its VDI for what it is no longer.
fn is_outdated(state: &State, request: &PeerRequest) -> bool {
    if !request.has(FLAG_LIVE) || planted::is(Bug::ReaderBehind) {
        return false;
    }
    let vdi = state.view.state.vdis.get(&request.oid.vid().get());
    vdi.is_some_and(|vdi| vdi.deleted || (request.has(FLAG_WORKING) && vdi.is_snapshot()))
}

/// Whether the reader is not the writer and the object has a write that may not be on all holders.
fn unsettled(state: &State, request: &PeerRequest) -> bool {
    if planted::is(Bug::UnsettledReads) {
        return false;
    }
    let Some(marks) = state.marks.get(&request.oid.vid()) else { return false };
    // A former writer does not wait for its writes any more. An earlier version does not say.
    let is_former = ![0, marks.generation].contains(&request.stamp.generation) && !planted::is(Bug::FormerWriter);
    (is_former || marks.writer != Some(request.sender)) && marks.last_write.contains_key(&request.oid)
}

/// If the lease of an unsettled write is over, as that of a volume that was deleted or frozen under its writer, nobody may ever
/// say that the write is on all holders: then the object is compared with theirs.
fn doubt_if_over(state: &mut State, oid: Oid) -> bool {
    let granted = state.view.state.leases.get(&oid.vid().get()).copied();
    let Some(marks) = state.marks.get_mut(&oid.vid()) else { return false };
    let goes_on = granted.is_some_and(|lease| match lease.generation.cmp(&marks.generation) {
        Ordering::Less => true,
        Ordering::Equal => lease.holder.is_some(),
        Ordering::Greater => false,
    });
    if goes_on {
        return false;
    }
    if let Some(sequence) = marks.last_write.remove(&oid) {
        marks.unsettled.remove(&sequence);
    }
    state.suspects.insert(oid);
    true
}

fn note_write(state: &mut State, request: &PeerRequest) {
    if let Some(marks) = state.marks.get_mut(&request.oid.vid())
        && marks.generation == request.stamp.generation
    {
        marks.note_write(request.stamp.sequence, request.oid);
    }
}

/// Whether somebody may ask later for the writes up to the stamp at which a copy takes a write: the gateway of that write had others
/// under way then, or may have been another one. After most rounds nothing was, and there is nothing to remember.
fn ends_stint(before: Stamp, request: &PeerRequest) -> bool {
    before.stint() < request.stamp.stint() && (before.generation < request.stamp.generation || request.has(FLAG_AGAIN))
}

/// Whether a write changes some bytes of an object and leaves the others.
fn is_plain(request: &PeerRequest) -> bool {
    request.kind == PeerKind::Write && !request.has(FLAG_CREATE)
}

/// Whether this node must keep a copy in the present epoch.
fn holds_now(state: &State, node: NodeId, oid: Oid) -> bool {
    let location = state.view.locate(oid);
    location.is_some_and(|location| state.view.holders(&location).contains(&node))
}

/// Drops what is parked of earlier lease generations: what was done is in the copies that count, the rest is refused.
fn drop_parked(state: &mut State, vdi: VdiId, generation: u32) {
    for (oid, parked) in state.parked.iter_mut().filter(|(oid, _)| oid.vid() == vdi) {
        let (older, kept) =
            std::mem::take(parked).into_iter().partition::<VecDeque<_>, _>(|p| p.request.stamp.generation < generation);
        *parked = kept;
        for old in older {
            state.dropped.insert(*oid);
            match old.answer {
                None => state.deferred_bytes -= deferred_cost(old.data.len()),
                Some(answer) => drop(answer.send(Pending::Now(Verdict::Fenced))),
            }
        }
    }
    state.parked.retain(|_, parked| !parked.is_empty());
}

/// VDIs whose writer is not the same any more: whoever held the lease may have died in the middle of a write, also if it
/// came and went between the two states.
fn lost_writers(before: &ClusterState, now: &ClusterState) -> HashSet<VdiId> {
    let changed = now.leases.iter().filter(|(vdi, lease)| {
        let earlier = before.leases.get(vdi);
        earlier != Some(lease) || lease.holder.is_some_and(|holder| !now.members.contains_key(&holder))
    });
    changed.filter_map(|(vdi, _)| VdiId::new(*vdi)).collect()
}
