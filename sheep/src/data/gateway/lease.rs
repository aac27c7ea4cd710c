//! The writer lease of one VDI on this gateway, and the writes under way under it.
//!
//! Always holds:
//! 1. Sequences are given out one after the other, and messages to a holder leave in their order: over one link, or,
//!    after that link broke or the epoch changed, everything unanswered first. For another epoch everything under way gets
//!    new sequences, in the same order.
//! 2. A write is done when every holder of the current epoch has answered for that epoch, and one at least has it in a
//!    copy that counts.
//! 3. `settled` is below every sequence that a write which is not done ever had.
//! 4. A write is not done before every earlier one to its object is that makes, replaces or removes the object as a whole: sent
//!    again under a new sequence, such a one would take the later one away.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::member::NodeId;
use sheep_core::peer_message::{FLAG_AGAIN, FLAG_CREATE, PeerKind, PeerRequest};
use sheep_core::stamp::{Epoch, Stamp};
use tokio::sync::{Notify, oneshot};

use super::WriteError;
use crate::data::view::Location;
use crate::store::Permit;
use crate::world::marks::{self, Mark};

/// One granted lease.
pub struct Lease {
    /// What may be written.
    pub vdi: VdiId,
    /// Of the grant.
    pub generation: u32,
    /// When this gateway got it, by its monotonic clock.
    pub since: Duration,
    /// Whether the holder of the generation before passed it on, with every write done.
    pub is_passed_on: bool,
    state: Mutex<LeaseState>,
    /// Told when a write ended.
    pub ended: Notify,
    /// Data objects known to be in the VDI's map: nobody else can change that while this lease lasts.
    mapped: Mutex<HashSet<u32>>,
}

/// What changes.
pub struct LeaseState {
    /// The last sequence given out.
    pub sequence: u64,
    /// The epoch in which everything in `under_way` was last sent.
    pub epoch: Epoch,
    /// By sequence.
    pub under_way: BTreeMap<u64, WriteUnderWay>,
    /// Which writes touch an object, in their order.
    pub by_object: HashMap<Oid, Vec<u64>>,
    /// How many of those under way touch a whole object: most of the time none.
    pub whole_count: usize,
    /// The link over which each holder was last sent to.
    pub links: HashMap<NodeId, u64>,
    /// No new write may begin: the lease is being given back, or was lost.
    pub closed: bool,
    /// No new hold may begin: the lease is about to be given back.
    pub closing: bool,
    /// Pieces of work of several writes that must be done under one generation; see [`Lease::hold`].
    pub holds: usize,
    /// The lease was lost with writes under way: nothing may be called settled any more.
    pub lost: bool,
    /// Whether somebody is about to tell the holders what is settled.
    pub mark_due: bool,
}

/// A write that not every holder has answered.
pub struct WriteUnderWay {
    /// As sent, but for the epoch.
    pub request: PeerRequest,
    /// The bytes.
    pub data: Bytes,
    /// The stamps under which it was sent before this one, ascending.
    pub earlier: Vec<Stamp>,
    /// Whether it was sent under its present stamp.
    pub is_sent: bool,
    /// It would be done, but for an earlier one (invariant 4).
    pub is_held_back: bool,
    /// Where its object lives.
    pub location: Location,
    /// Journal space for the copy on this node, until it is submitted there.
    pub permit: Option<Permit>,
    /// Whether the current epoch has as many holders as it takes to acknowledge a write.
    pub enough: bool,
    /// The last acknowledged write below it that no flush has covered, when it was last sent: every holder must have had that.
    pub over: Stamp,
    /// Holders that have not answered in the current epoch.
    pub waiting: Vec<NodeId>,
    /// Holders that have taken it in the current epoch, deferring ones not counted.
    pub taken: usize,
    /// Holders that refused it in the current epoch.
    pub refused: Vec<(NodeId, WriteError)>,
    /// Told when it is done.
    pub done: Option<Done>,
}

/// Who is told how a write ended.
pub enum Done {
    /// A task that waits for it.
    Task(oneshot::Sender<Ended>),
    /// A call, by whoever brings the last answer and under the lease's lock: it queues an answer, or starts a task.
    Call(Box<dyn FnOnce(Ended) + Send>),
}

impl Done {
    /// Tells.
    pub fn tell(self, ended: Ended) {
        match self {
            // The client may have hung up.
            Done::Task(waiting) => drop(waiting.send(ended)),
            Done::Call(call) => call(ended),
        }
    }
}

/// How a write ended.
pub struct Ended {
    /// Whether it is on all holders.
    pub result: Result<(), WriteError>,
    /// If it is done, or is to be sent again under another lease: every stamp under which it was sent, ascending.
    pub stamps: Vec<Stamp>,
}

impl WriteUnderWay {
    /// Whether it changes some bytes of an object and leaves the others.
    pub fn is_plain(&self) -> bool {
        self.request.kind == PeerKind::Write && !self.request.has(FLAG_CREATE)
    }

    /// Bytes of the object it touches; a creation and a removal touch all of it.
    pub fn range(&self) -> Range<u64> {
        let removal = self.request.kind == PeerKind::Remove;
        if removal || self.request.has(FLAG_CREATE) {
            0..u64::MAX
        } else {
            self.request.offset..self.request.offset + self.data.len() as u64
        }
    }
}

impl Lease {
    /// A lease that was just granted.
    pub fn new(vdi: VdiId, generation: u32, since: Duration, is_passed_on: bool) -> Arc<Lease> {
        Arc::new(Lease {
            vdi,
            generation,
            since,
            is_passed_on,
            state: Mutex::new(LeaseState {
                sequence: 0,
                epoch: Epoch(0),
                under_way: BTreeMap::new(),
                by_object: HashMap::new(),
                whole_count: 0,
                links: HashMap::new(),
                closed: false,
                closing: false,
                holds: 0,
                lost: false,
                mark_due: false,
            }),
            ended: Notify::new(),
            mapped: Mutex::default(),
        })
    }

    fn mapped(&self) -> MutexGuard<'_, HashSet<u32>> {
        self.mapped.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a data object is known to be in the map as the VDI's own.
    pub fn is_mapped(&self, index: u32) -> bool {
        self.mapped().contains(&index)
    }

    /// Notes what was found, or done, under this lease.
    pub fn note_mapped(&self, index: u32, is_mapped: bool) {
        if is_mapped {
            self.mapped().insert(index);
        } else {
            self.mapped().remove(&index);
        }
    }

    /// Held only for moments, never across a wait.
    pub fn state(&self) -> MutexGuard<'_, LeaseState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets the holds end, refuses new writes and waits until none is under way.
    pub async fn drain(&self) {
        loop {
            let ended = self.ended.notified();
            {
                let mut state = self.state();
                state.closing = true;
                state.closed |= state.holds == 0;
                if state.closed && state.under_way.is_empty() {
                    return;
                }
            }
            ended.await;
        }
    }

    /// Keeps the lease here, as long as the guard lives, for work of several writes that must be done under one generation:
    /// otherwise two gateways could take it from each other in the middle for ever. `None` if it is being given back.
    pub fn hold(self: &Arc<Lease>) -> Option<Hold> {
        let mut state = self.state();
        if state.closed || state.closing {
            return None;
        }
        state.holds += 1;
        Some(Hold { lease: self.clone() })
    }

    /// Waits until no write under way touches a range of an object.
    pub async fn await_writes(&self, oid: Oid, range: &Range<u64>) {
        loop {
            let ended = self.ended.notified();
            if !self.state().touches(oid, range) {
                return;
            }
            ended.await;
        }
    }
}

/// See [`Lease::hold`].
pub struct Hold {
    /// The lease that is kept.
    pub lease: Arc<Lease>,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.lease.state().holds -= 1;
        self.lease.ended.notify_waiters();
    }
}

impl LeaseState {
    /// Whether a write under way touches a range of an object.
    pub fn touches(&self, oid: Oid, range: &Range<u64>) -> bool {
        self.by_object.get(&oid).into_iter().flatten().any(|sequence| {
            self.under_way.get(sequence).is_some_and(|write| {
                let touched = write.range();
                touched.start < range.end && range.start < touched.end
            })
        })
    }

    /// See invariant 3.
    pub fn settled(&self) -> u64 {
        let first = self.under_way.values().next();
        first.map_or(self.sequence, |first| first.earlier.first().unwrap_or(&first.request.stamp).sequence - 1)
    }

    /// Puts a write that has the last sequence in.
    pub fn insert(&mut self, write: WriteUnderWay) {
        self.by_object.entry(write.request.oid).or_default().push(self.sequence);
        self.whole_count += usize::from(!write.is_plain());
        self.under_way.insert(self.sequence, write);
    }

    /// Takes a finished write out.
    pub fn remove(&mut self, sequence: u64) -> Option<WriteUnderWay> {
        let write = self.under_way.remove(&sequence)?;
        self.whole_count -= usize::from(!write.is_plain());
        if let Some(sequences) = self.by_object.get_mut(&write.request.oid) {
            sequences.retain(|other| *other != sequence);
            if sequences.is_empty() {
                self.by_object.remove(&write.request.oid);
            }
        }
        Some(write)
    }

    /// Whether an earlier write to the same object touches the whole of it; see invariant 4.
    pub fn is_behind_whole(&self, sequence: u64) -> bool {
        let Some(write) = self.under_way.get(&sequence).filter(|_| self.whole_count > 0) else { return false };
        let others = self.by_object.get(&write.request.oid).into_iter().flatten();
        let mut earlier = others.take_while(|other| **other < sequence);
        earlier.any(|other| self.under_way.get(other).is_some_and(|other| !other.is_plain()))
    }

    /// Gives everything under way new stamps, because the members changed. A write is laid over what the holders of its epoch have;
    /// what they all lost when they died, one that was away may still have, with this write over it. Were that the same stamp, the
    /// two copies would be taken for equal.
    pub fn begin_round(&mut self) {
        if !self.under_way.values().any(|write| write.is_sent) {
            return;
        }
        marks::hit(Mark::WriteSentAgain);
        self.sequence = Stamp::begin_round(self.sequence);
        self.by_object.clear();
        self.whole_count = 0;
        for mut write in std::mem::take(&mut self.under_way).into_values() {
            self.sequence += 1;
            if std::mem::replace(&mut write.is_sent, false) {
                write.earlier.push(write.request.stamp);
                write.request.flags |= FLAG_AGAIN;
            }
            write.request.stamp.sequence = self.sequence;
            self.insert(write);
        }
    }
}

#[cfg(test)]
mod tests {
    use sheep_core::copies::Copies;
    use sheep_core::placement::placement_key;

    use super::*;

    const OID: Oid = Oid::from_raw(7 << 32);

    fn enter(state: &mut LeaseState, flags: u8, is_sent: bool) {
        state.sequence += 1;
        let mut request = PeerRequest::new(PeerKind::Write, Epoch(1), NodeId(1));
        request.oid = OID;
        request.stamp = Stamp { generation: 2, sequence: state.sequence };
        request.flags = flags;
        state.insert(WriteUnderWay {
            request,
            data: Bytes::new(),
            earlier: Vec::new(),
            is_sent,
            is_held_back: false,
            location: Location { key: placement_key(OID.vid(), OID), copies: Copies::always(3), object_bytes: 1 << 22 },
            permit: None,
            enough: true,
            over: Stamp::ZERO,
            waiting: Vec::new(),
            taken: 0,
            refused: Vec::new(),
            done: None,
        });
    }

    fn stamps(state: &LeaseState) -> Vec<Stamp> {
        state.under_way.values().map(|write| write.request.stamp).collect()
    }

    #[test]
    fn what_is_sent_in_another_epoch_has_a_stamp_of_its_own_and_its_old_place() {
        let lease = Lease::new(OID.vid(), 2, Duration::ZERO, false);
        let mut state = lease.state();
        state.sequence = 14;
        enter(&mut state, 0, true);
        enter(&mut state, 0, true);
        enter(&mut state, 0, false);
        let before = stamps(&state);
        state.begin_round();
        let after = stamps(&state);
        assert!(after.is_sorted() && after[0] > before[2], "{after:?}");
        assert_eq!(after[0].stint(), before[0].stint() + 1);
        assert_eq!(state.settled(), 14, "the first of them is still under way");
        assert_eq!(state.by_object[&OID], after.iter().map(|stamp| stamp.sequence).collect::<Vec<_>>());
        let again: Vec<bool> = state.under_way.values().map(|write| write.request.has(FLAG_AGAIN)).collect();
        assert_eq!(again, [true, true, false], "nobody has seen the last one yet");

        let first = state.remove(after[0].sequence).unwrap();
        assert_eq!(first.earlier, [before[0]]);
        assert_eq!(state.settled(), 15);
        for sequence in [after[1].sequence, after[2].sequence] {
            state.remove(sequence).unwrap();
        }
        assert_eq!(state.settled(), after[2].sequence);
        // Nothing was sent, nobody can have it.
        enter(&mut state, 0, false);
        let fresh = stamps(&state);
        state.begin_round();
        assert_eq!(stamps(&state), fresh);
    }

    #[test]
    fn what_replaces_an_object_is_done_before_what_comes_after_it() {
        let lease = Lease::new(OID.vid(), 2, Duration::ZERO, false);
        let mut state = lease.state();
        enter(&mut state, 0, true);
        enter(&mut state, FLAG_CREATE, true);
        enter(&mut state, 0, true);
        assert_eq!([1, 2, 3].map(|sequence| state.is_behind_whole(sequence)), [false, false, true]);
        state.begin_round();
        let last = state.sequence;
        assert_eq!([2, 1, 0].map(|before| state.is_behind_whole(last - before)), [false, false, true]);
        state.remove(last - 1).unwrap();
        assert!(!state.is_behind_whole(last));
    }
}
