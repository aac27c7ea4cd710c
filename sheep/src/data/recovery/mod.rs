//! Brings this node's copies up to date after a change of members.
//!
//! One run per epoch: suspects first (a writer died in the middle), then objects that a request is waiting for (out of turn, by
//! [`ensure_current`]), then everything else that this node must hold. Every object is compared before it is used: the
//! holders' versions are asked for, `core::history` says which content is the newest, and if that is not here it is
//! fetched whole from a node that has it.
//!
//! A crash in the middle leaves copies of mixed age, each with its version; the next run compares them again. A second
//! change of members ends the run and begins the next.

mod agreement;
pub mod fetch;
mod hearing;
pub mod pace;
pub mod piece;
pub mod salvage;
mod survey;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::command::Command;
use sheep_core::history::{Answer, Decision};
use sheep_core::member::NodeId;
use sheep_core::peer_message::{PeerAnswer, PeerKind, PeerRequest, Verdict};
use sheep_core::stamp::{Epoch, Stamp, Version};
use tokio::sync::{Mutex, Semaphore};
use tokio::task::JoinSet;

use super::Data;
use super::holder::Holder;
use super::view::{Location, View};
use crate::world::marks::{self, Mark};
use crate::world::planted::{self, Bug};
use piece::{Outcome, Source};

/// Objects fetched side by side: enough to fill a link while one object is being installed.
const PARALLEL: usize = 4;
/// Between attempts when the nodes that matter do not answer; a change of members ends the wait as well.
const RETRY_INTERVAL: Duration = Duration::from_millis(50);
/// The longest rest between two rounds of many objects.
const RETRY_MAX: Duration = Duration::from_mins(1);
/// After so many attempts for one request it is not tried with every change any more.
const EAGER_ATTEMPTS: u32 = 8;
/// Comparisons of an object in one attempt: what was brought here is compared with what the others have by then.
const COMPARISONS_MAX: u32 = 3;
/// How long one request for a version or a list may wait for a connection.
const PATIENCE: Duration = Duration::from_secs(2);
/// Objects per list answer: 128 KiB of records.
pub const LIST_BATCH: usize = 4096;

/// Figures of the current run, for people.
pub struct Progress {
    /// Whether a run is under way.
    pub running: AtomicBool,
    /// Whether the objects are known yet.
    pub listed: AtomicBool,
    /// How many objects are brought here side by side while nobody waits for them.
    pub slots: Semaphore,
    /// What holds it back.
    pub pace: pace::Pace,
    /// Objects compared.
    pub done: AtomicU64,
    /// Objects to compare.
    pub total: AtomicU64,
    /// Objects that had to be fetched since the process started.
    pub fetched: AtomicU64,
    /// What others bring up to date because a request waits for it here.
    pub asked: agreement::Asked,
    /// An object that cannot be decided, and the epoch whose holders must be heard.
    pub blocked: std::sync::Mutex<Option<(Oid, Epoch)>>,
}

impl Default for Progress {
    fn default() -> Progress {
        Progress {
            running: AtomicBool::default(),
            listed: AtomicBool::default(),
            slots: Semaphore::new(PARALLEL),
            pace: pace::Pace::default(),
            done: AtomicU64::default(),
            total: AtomicU64::default(),
            fetched: AtomicU64::default(),
            asked: agreement::Asked::default(),
            blocked: std::sync::Mutex::default(),
        }
    }
}

/// Why an object could not be brought up to date.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RecoveryEnd {
    /// Another epoch began: whoever waits asks again.
    EpochOver,
}

/// Runs the recovery of one epoch to its end, or until the epoch is over.
pub async fn run(data: Data, epoch: Epoch) {
    let Some(holder) = data.holder().cloned() else { return };
    let progress = data.progress();
    progress.running.store(true, Ordering::Relaxed);
    progress.listed.store(false, Ordering::Relaxed);
    progress.done.store(0, Ordering::Relaxed);
    progress.total.store(0, Ordering::Relaxed);
    let finished = attempt(&data, &holder, epoch).await;
    if finished.is_err() || holder.epoch() != epoch {
        return;
    }
    // What was deferred must be in its copies before this node says that it has everything.
    holder.stop_deferring(epoch);
    while holder.has_deferred(epoch) {
        wait_for_change(&data, &holder).await;
    }
    let view = holder.view();
    if view.epoch() != epoch {
        return;
    }
    if let Some(unheard) = view.history.possibly_out_of_sight(view.state.copies_min()) {
        // Every object that anybody here has is up to date, but there may be others: those stay undecided, each waits
        // for its own holders, and the epoch does not end clean.
        tracing::warn!(
            "epoch {epoch}: members of epoch {unheard} that are not here may have objects nobody else has; \
             start them again, or give them up with 'dog cluster recover force'"
        );
        progress.running.store(false, Ordering::Relaxed);
        return;
    }
    keep_what_strays_know(&data, &holder, &view).await;
    if let Err(error) = holder.store().set_clean_through(epoch).await {
        tracing::error!("cannot note that recovery of epoch {epoch} is complete: {error}");
        return;
    }
    if !holder.recovered(epoch) {
        return;
    }
    progress.running.store(false, Ordering::Relaxed);
    tracing::info!(
        "recovery of epoch {epoch} complete: {} objects fetched so far",
        progress.fetched.load(Ordering::Relaxed)
    );
    if let Err(error) = data.cluster().propose(Command::Recovered { node: data.node(), epoch }).await {
        tracing::warn!("cannot report that recovery of epoch {epoch} is complete: {error}");
    }
}

/// Writes into the versions of copies that lie on other nodes now how far they are good. Until here this followed from the last
/// clean epoch, in which this node held them; of the next one it holds others. The new holders may not have fetched them yet.
async fn keep_what_strays_know(data: &Data, holder: &Holder, view: &View) {
    let mut after = None;
    loop {
        let entries = holder.store().entries(after, LIST_BATCH);
        let Some((last, _)) = entries.last() else { return };
        after = Some(*last);
        for (oid, _) in entries.iter().filter(|(oid, _)| !holds(view, data.node(), *oid)) {
            let (Some(location), Some(own)) = (view.locate(*oid), own_answer(data, holder, *oid)) else { continue };
            if let Some(as_of) = view.history.current_as_of(&own, location.key, location.copies) {
                holder.keep_as_of(*oid, as_of, view.epoch());
            }
        }
        tokio::task::yield_now().await;
    }
}

async fn attempt(data: &Data, holder: &Arc<Holder>, epoch: Epoch) -> Result<(), RecoveryEnd> {
    let view = holder.view();
    if view.epoch() != epoch {
        return Err(RecoveryEnd::EpochOver);
    }
    let hearing = tokio::spawn(hearing::hear_all(data.clone(), holder.clone(), view.clone()));
    if holder.must_hear_suspects() {
        let told = hearing.await.map_err(|_| RecoveryEnd::EpochOver)??;
        if !told.is_empty() {
            marks::hit(Mark::HalfWrittenTold);
        }
        holder.heard_suspects(epoch, told);
    }
    // Those first that a guest's last writes were to.
    let (held, strange): (BTreeSet<Oid>, BTreeSet<Oid>) =
        holder.suspects().into_iter().partition(|oid| holds(&view, data.node(), *oid));
    for oid in strange {
        holder.confirm(oid, epoch);
    }
    let undecided = pass(data, epoch, held).await?;
    let mut work = survey::survey(data, holder, &view).await?;
    work.extend(undecided);
    data.progress().total.store(work.len() as u64, Ordering::Relaxed);
    data.progress().listed.store(true, Ordering::Relaxed);
    loop {
        // Objects that wait for a missing node are tried again after all others are safe.
        let clock = &data.world().clock;
        let began = clock.monotonic();
        work = pass(data, epoch, work).await?;
        if work.is_empty() {
            return Ok(());
        }
        wait_for_change(data, holder).await;
        // Where many wait for others, changes are frequent: half of the time is theirs.
        let took = clock.monotonic().saturating_sub(began);
        if work.len() > PARALLEL {
            clock.sleep(took.min(RETRY_MAX)).await;
        }
    }
}

/// Tries every object once, some side by side; gives those that could not be decided.
async fn pass(data: &Data, epoch: Epoch, work: BTreeSet<Oid>) -> Result<BTreeSet<Oid>, RecoveryEnd> {
    let mut tasks = JoinSet::new();
    let mut undecided = BTreeSet::new();
    let mut note = |ended: Result<(Oid, Result<bool, RecoveryEnd>), tokio::task::JoinError>| {
        let (oid, result) = ended.map_err(|_| RecoveryEnd::EpochOver)?;
        if result? {
            data.progress().done.fetch_add(1, Ordering::Relaxed);
        } else {
            undecided.insert(oid);
        }
        Ok(())
    };
    for oid in work {
        // As many tasks as slots, beside those of deferred writes.
        while tasks.len() >= PARALLEL {
            if let Some(ended) = tasks.join_next().await {
                note(ended)?;
            }
        }
        let data = data.clone();
        tasks.spawn(async move { (oid, try_in_turn(&data, oid, epoch).await) });
    }
    while let Some(ended) = tasks.join_next().await {
        note(ended)?;
    }
    Ok(undecided)
}

fn holds(view: &View, node: NodeId, oid: Oid) -> bool {
    view.locate(oid).is_some_and(|location| view.holders(&location).contains(&node))
}

/// What this node says itself; nothing if its copy is damaged.
fn own_answer(data: &Data, holder: &Holder, oid: Oid) -> Option<Answer> {
    let met_nobody = holder.met_nobody(oid);
    let clean_through = holder.clean_through(oid);
    let version = holder.version(oid).ok()?;
    let met_before = holder.met_before();
    Some(Answer { node: data.node(), version, clean_through, met_nobody, met_before })
}

async fn wait_for_change(data: &Data, holder: &Holder) {
    tokio::select! {
        () = holder.changed().notified() => {}
        () = data.world().clock.sleep(RETRY_INTERVAL) => {}
    }
}

/// Waits until this node's copy of an object is the newest there is, bringing it here if need be.
pub async fn ensure_current(data: &Data, oid: Oid, epoch: Epoch) -> Result<(), RecoveryEnd> {
    while !ensure_current_within(data, oid, epoch, Duration::MAX).await? {}
    Ok(())
}

/// The same, if it can be done in about this time. Whether it is.
pub async fn ensure_current_within(
    data: &Data,
    oid: Oid,
    epoch: Epoch,
    patience: Duration,
) -> Result<bool, RecoveryEnd> {
    let Some(holder) = data.holder() else { return Ok(true) };
    let clock = &data.world().clock;
    let began = clock.monotonic();
    let mut attempts = 0;
    while !try_current(data, oid, epoch, Haste::OutOfTurn).await? {
        if clock.monotonic().saturating_sub(began) > patience {
            return Ok(false);
        }
        attempts += 1;
        if attempts < EAGER_ATTEMPTS {
            wait_for_change(data, holder).await;
        } else {
            clock.sleep(RETRY_INTERVAL).await;
        }
    }
    Ok(true)
}

/// As `ensure_current`, but without haste: the guests' requests come first.
pub async fn bring_in_turn(data: &Data, oid: Oid, epoch: Epoch) -> Result<(), RecoveryEnd> {
    let Some(holder) = data.holder() else { return Ok(()) };
    while !try_in_turn(data, oid, epoch).await? {
        wait_for_change(data, holder).await;
    }
    Ok(())
}

async fn try_in_turn(data: &Data, oid: Oid, epoch: Epoch) -> Result<bool, RecoveryEnd> {
    pace::await_turn(data, epoch).await;
    // The semaphore is never closed. The slot comes before the object's turn, so that whoever has the turn is at work.
    let _slot = data.progress().slots.acquire().await;
    try_current(data, oid, epoch, Haste::InTurn).await
}

/// Whether a request waits for an object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Haste {
    /// None does.
    InTurn,
    /// One does: others that have to bring their copies up to date first are asked to.
    OutOfTurn,
}

/// One attempt of `ensure_current`: false if it must be tried again later.
async fn try_current(data: &Data, oid: Oid, epoch: Epoch, haste: Haste) -> Result<bool, RecoveryEnd> {
    let Some(holder) = data.holder() else { return Ok(true) };
    if holder.epoch() != epoch {
        return Err(RecoveryEnd::EpochOver);
    }
    // One at a time per object; whoever waited finds the work done.
    let turn = data.turns().turn(oid);
    let _guard = turn.lock().await;
    for source in holder.sources_needed(oid) {
        if !Box::pin(try_current(data, source, epoch, haste)).await? {
            return Ok(false);
        }
    }
    // Writes may be parked because only their source was missing.
    if holder.is_current(oid) && holder.epoch() == epoch {
        return Ok(holder.confirm(oid, epoch));
    }
    for _ in 0..COMPARISONS_MAX {
        holder.begin_comparison(oid);
        match compare(data, holder, oid, epoch, haste).await? {
            Compared::Again => return Ok(false),
            Compared::Improved => {}
            Compared::Newest => return Ok(holder.confirm(oid, epoch)),
            Compared::NewestOfOldEpoch => return Ok(holder.confirm_durably(oid, epoch)),
        }
    }
    Ok(false)
}

/// What a comparison came to.
enum Compared {
    /// It must be tried again.
    Again,
    /// The copy here is another one now: it may be right, which the next comparison shows.
    Improved,
    /// The copy here (or its absence) is the newest.
    Newest,
    /// So it is, but its version says an epoch that does not show it.
    NewestOfOldEpoch,
}

/// Compares one object with the other holders' and brings the newest content here.
async fn compare(
    data: &Data,
    holder: &Arc<Holder>,
    oid: Oid,
    epoch: Epoch,
    haste: Haste,
) -> Result<Compared, RecoveryEnd> {
    let view = holder.view();
    let Some(location) = view.locate(oid) else {
        // An object of a VDI that this node has not heard of: nothing refers to it.
        return Ok(Compared::Newest);
    };
    let Some(answers) = ask_everybody(data, &view, oid, &location).await else {
        tracing::debug!("object {oid}: not everybody who may have it answered");
        return Ok(Compared::Again);
    };
    if holder.epoch() != epoch {
        return Err(RecoveryEnd::EpochOver);
    }
    let decision = answers.decide(&view, &location);
    tracing::debug!("object {oid} in epoch {epoch}: {decision:?} from {answers:?}");
    let is_open = agreement::is_open(&view, &location);
    match decision {
        _ if planted::is(Bug::TrustedCopy) && holder.store().entry(oid).is_some() => Ok(Compared::NewestOfOldEpoch),
        Decision::Unheard(_) if planted::is(Bug::UnheardHolders) && holder.store().entry(oid).is_some() => {
            Ok(Compared::NewestOfOldEpoch)
        }
        Decision::Unheard(unheard) => {
            marks::hit(Mark::HoldersUnheard);
            *data.progress().blocked.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some((oid, unheard));
            Ok(Compared::Again)
        }
        Decision::Absent => {
            let having = agreement::having(&view, &location, &answers.sound, data.node());
            if let Some(entry) = holder.store().entry(oid) {
                marks::hit(Mark::RemovedStaysRemoved);
                if planted::is(Bug::ForgottenRemoval) {
                    return Ok(Compared::NewestOfOldEpoch);
                }
                let ticket = holder.store().remove(oid, entry.version);
                holder.was_found_absent(oid);
                holder.trust_again(oid);
                if ticket.await.is_err() {
                    return Ok(Compared::Again);
                }
            }
            if having.is_empty() {
                return Ok(Compared::Newest);
            }
            tracing::debug!("object {oid}: {having:?} have one still");
            if haste == Haste::OutOfTurn {
                agreement::Asked::ask(data, &having, oid, epoch);
            }
            Ok(Compared::Again)
        }
        Decision::Newest { .. }
            if planted::is(Bug::LowerStamp) && holder.is_doubtful(oid) && holder.store().entry(oid).is_some() =>
        {
            Ok(Compared::NewestOfOldEpoch)
        }
        Decision::Newest { stamp, nodes } => {
            if holder.version(oid).is_ok_and(|version| version.is_some_and(|version| version.stamp == stamp)) {
                // What is about to be removed nobody reads, and a holder that was faster with that will not have it again.
                let matters = (is_open || holder.is_doubtful(oid)) && !holder.is_being_removed(oid);
                let lacking = || agreement::lacking(&view, &location, &answers.sound, stamp);
                let lacking = if matters { lacking() } else { Vec::new() };
                if !lacking.is_empty() {
                    marks::hit(if is_open { Mark::OpenEpochSettles } else { Mark::HalfWrittenSettles });
                    tracing::debug!("object {oid}: {lacking:?} do not have {stamp} yet");
                    if haste == Haste::OutOfTurn {
                        agreement::Asked::ask(data, &lacking, oid, epoch);
                    }
                    let is_kept = is_open && lacking.contains(&data.node());
                    if is_kept {
                        holder.keep_as_of(oid, epoch, epoch);
                    }
                    return Ok(if is_kept { Compared::Improved } else { Compared::Again });
                }
                // If not among them it has the same writes: only the time of its last confirmation is older.
                let confirmed = nodes.contains(&data.node());
                return Ok(if confirmed { Compared::Newest } else { Compared::NewestOfOldEpoch });
            }
            if holder.store().entry(oid).is_some() {
                marks::hit(Mark::OldCopyReplaced);
            }
            if bring(data, holder, oid, epoch, stamp, &nodes).await {
                holder.trust_again(oid);
                data.progress().fetched.fetch_add(1, Ordering::Relaxed);
                // A doubtful one is compared once more, until all holders have the same.
                let is_settled = !is_open && !holder.is_doubtful(oid);
                return Ok(if is_settled { Compared::NewestOfOldEpoch } else { Compared::Improved });
            }
            Ok(Compared::Again)
        }
    }
}

/// Brings the newest content here from one of the nodes that have it; if it is damaged on all of them, what is left of it.
async fn bring(data: &Data, holder: &Arc<Holder>, oid: Oid, epoch: Epoch, stamp: Stamp, nodes: &[NodeId]) -> bool {
    let mut damaged = Vec::new();
    for node in nodes.iter().copied() {
        let source = Source { oid, node, epoch, stamp, twins: None };
        // If this node were sound it would have nothing to bring.
        let outcome = if node == data.node() { Outcome::Damaged } else { fetch::fetch(data, holder, &source).await };
        match outcome {
            Outcome::Done => return true,
            Outcome::Damaged => damaged.push(node),
            Outcome::Changed => {
                marks::hit(Mark::FetchOvertaken);
                tracing::debug!("object {oid} was replaced while it was fetched");
            }
            Outcome::Failed => {}
        }
    }
    if damaged.len() < nodes.len() {
        // One of the others may be whole.
        return false;
    }
    for node in damaged {
        let twins = nodes.iter().copied().filter(|twin| *twin != node).collect();
        let source = Source { oid, node, epoch, stamp, twins: Some(twins) };
        if fetch::fetch(data, holder, &source).await == Outcome::Done {
            return true;
        }
    }
    false
}

/// What the members say of an object.
#[derive(Debug)]
struct Answers {
    /// Those that can be believed.
    sound: Vec<Answer>,
    /// Those of damaged copies: what they should hold.
    damaged: Vec<Answer>,
}

impl Answers {
    /// Damaged copies count only where nothing can be said without them. That there is no object is not said by nobody.
    fn decide(&self, view: &View, location: &Location) -> Decision {
        match view.history.decide(location.key, location.copies, &self.sound) {
            Decision::Unheard(_) | Decision::Absent if !self.damaged.is_empty() => {
                let all: Vec<Answer> = self.sound.iter().chain(&self.damaged).copied().collect();
                view.history.decide(location.key, location.copies, &all)
            }
            decision => decision,
        }
    }
}

/// Which content of an object is the newest. `None` if it has no place, or not everybody who may know answered.
pub async fn newest(data: &Data, view: &View, oid: Oid) -> Option<Decision> {
    let location = view.locate(oid)?;
    Some(ask_everybody(data, view, oid, &location).await?.decide(view, &location))
}

/// What every member that may know something says. `None` if one of them did not answer.
async fn ask_everybody(data: &Data, view: &View, oid: Oid, location: &Location) -> Option<Answers> {
    let mut answers = Answers { sound: Vec::new(), damaged: Vec::new() };
    if let Some(holder) = data.holder() {
        match own_answer(data, holder, oid) {
            Some(own) => answers.sound.push(own),
            None => {
                let met_nobody = holder.met_nobody(oid);
                let version = holder.store().entry(oid).map(|entry| entry.version);
                let (clean_through, met_before) = (holder.store().clean_through(), holder.met_before());
                let own = Answer { node: data.node(), version, clean_through, met_nobody, met_before };
                // A damaged copy that is gone says nothing, not even that there is no object.
                answers.damaged.extend(version.is_some().then_some(own));
            }
        }
    }
    let mut calls = JoinSet::new();
    for node in view.history.witnesses(location.key, location.copies) {
        if node == data.node() {
            continue;
        }
        let mut request = PeerRequest::new(PeerKind::Query, view.epoch(), data.node());
        request.oid = oid;
        let data = data.clone();
        calls.spawn(async move { (node, data.links().call(node, request, Bytes::new(), PATIENCE).await) });
    }
    while let Some(ended) = calls.join_next().await {
        let (node, answer) = ended.ok()?;
        let (answer, _) = answer.ok()?;
        let PeerAnswer { clean_through, met_nobody, met_before, .. } = answer;
        let said = |version| Answer { node, version, clean_through, met_nobody, met_before };
        match answer.verdict {
            Verdict::Ok => answers.sound.push(said(Some(answer.version))),
            Verdict::Missing => answers.sound.push(said(None)),
            // An empty version is that of a copy whose node knows nothing of it.
            Verdict::Corrupt if answer.version == Version::default() => {}
            Verdict::Corrupt => answers.damaged.push(said(Some(answer.version))),
            _ => return None,
        }
    }
    Some(answers)
}

/// One lock per object that is being brought up to date.
#[derive(Default)]
pub struct Turns {
    turns: std::sync::Mutex<BTreeMap<Oid, Arc<Mutex<()>>>>,
}

impl Turns {
    /// The lock of an object.
    pub fn turn(&self, oid: Oid) -> Arc<Mutex<()>> {
        let mut turns = self.turns.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        turns.retain(|_, turn| Arc::strong_count(turn) > 1);
        turns.entry(oid).or_default().clone()
    }
}
