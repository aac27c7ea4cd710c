//! The writer lease of one VDI on this gateway, and the writes under way under it.
//!
//! Always holds:
//! 1. Sequences are given out one after the other, and messages to a holder leave in their order: over one link, or,
//!    after that link broke or the epoch changed, everything unanswered first.
//! 2. A write is done when every holder of the current epoch has answered for that epoch, and one at least has it in a
//!    copy that counts.
//! 3. `settled` is below every write that is not done.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::member::NodeId;
use sheep_core::peer_message::{FLAG_CREATE, PeerKind, PeerRequest};
use sheep_core::stamp::Epoch;
use tokio::sync::{Notify, oneshot};

use super::WriteError;
use crate::data::view::Location;
use crate::store::Permit;

/// One granted lease.
pub struct Lease {
    /// What may be written.
    pub vdi: VdiId,
    /// Of the grant.
    pub generation: u32,
    /// When this gateway got it, by its monotonic clock.
    pub since: Duration,
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
    /// Which writes touch an object.
    pub by_object: HashMap<Oid, Vec<u64>>,
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
    /// Whether the holders have yet to hear the last settled sequence.
    pub mark_due: bool,
}

/// A write that not every holder has answered.
pub struct WriteUnderWay {
    /// As sent, but for the epoch.
    pub request: PeerRequest,
    /// The bytes.
    pub data: Bytes,
    /// Where its object lives.
    pub location: Location,
    /// Journal space for the copy on this node, until it is submitted there.
    pub permit: Option<Permit>,
    /// Whether the current epoch has as many holders as it takes to acknowledge a write.
    pub enough: bool,
    /// Holders that have not answered in the current epoch.
    pub waiting: Vec<NodeId>,
    /// Holders that have taken it in the current epoch, deferring ones not counted.
    pub taken: usize,
    /// Holders that refused it in the current epoch.
    pub refused: Vec<(NodeId, WriteError)>,
    /// Told when it is done.
    pub done: Option<oneshot::Sender<Result<(), WriteError>>>,
}

impl WriteUnderWay {
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
    pub fn new(vdi: VdiId, generation: u32, since: Duration) -> Arc<Lease> {
        Arc::new(Lease {
            vdi,
            generation,
            since,
            state: Mutex::new(LeaseState {
                sequence: 0,
                epoch: Epoch(0),
                under_way: BTreeMap::new(),
                by_object: HashMap::new(),
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
        self.under_way.keys().next().map_or(self.sequence, |first| first - 1)
    }

    /// Takes a finished write out.
    pub fn remove(&mut self, sequence: u64) -> Option<WriteUnderWay> {
        let write = self.under_way.remove(&sequence)?;
        if let Some(sequences) = self.by_object.get_mut(&write.request.oid) {
            sequences.retain(|other| *other != sequence);
            if sequences.is_empty() {
                self.by_object.remove(&write.request.oid);
            }
        }
        self.mark_due = true;
        Some(write)
    }
}
