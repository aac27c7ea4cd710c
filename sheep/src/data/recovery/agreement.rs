//! Which holders must have the newest content of an object before anybody is shown it.
//!
//! What a writer left half-written when it was lost must be on all holders that count as having everything. In an epoch in which
//! no holder had everything from the first moment (`History::has_steady_holder`) nobody knows what was left so: every holder
//! of the epoch counts as a witness of it later, so every one must have what is shown.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::history::Answer;
use sheep_core::member::NodeId;
use sheep_core::peer_message::{FLAG_BRING, FLAG_WAIT, PeerKind, PeerRequest};
use sheep_core::stamp::{Epoch, Stamp};

use super::PATIENCE;
use crate::data::Data;
use crate::data::view::{Location, View};
use crate::world::planted::{self, Bug};

/// Whether nobody has had everything of an object since the epoch began.
pub fn is_open(view: &View, location: &Location) -> bool {
    !view.history.has_steady_holder(location.key, location.copies) && !planted::is(Bug::OpenEpoch)
}

/// The holders that lack the newest content, of those that must have it.
pub fn lacking(view: &View, location: &Location, answers: &[Answer], newest: Stamp) -> Vec<NodeId> {
    let holders = view.holders(location);
    if is_open(view, location) {
        // Who has said nothing that can be believed, too.
        let keeps = |answer: &Answer| view.history.keeps(answer, newest, location.key, location.copies);
        let has_kept = |node: &NodeId| answers.iter().any(|answer| answer.node == *node && keeps(answer));
        return holders.iter().copied().filter(|node| !has_kept(node)).collect();
    }
    let of_holders = answers.iter().filter(|answer| holders.contains(&answer.node));
    let has_it = |answer: &Answer| answer.version.is_some_and(|version| version.stamp == newest);
    let kept_up = |answer: &Answer| {
        let as_of = view.history.current_as_of(answer, location.key, location.copies);
        as_of.is_some_and(|as_of| as_of.next() >= view.epoch())
    };
    of_holders.filter(|answer| kept_up(answer) && !has_it(answer)).map(|answer| answer.node).collect()
}

/// The other holders that have a copy of an object of which `node` was told that it does not exist. Who knew that and is no holder
/// now has forgotten it after an orderly stop: where nobody is steady, two holders that ask before and after may be told
/// different things, and each would wait for the other.
pub fn having(view: &View, location: &Location, answers: &[Answer], node: NodeId) -> Vec<NodeId> {
    if !is_open(view, location) {
        return Vec::new();
    }
    let holders = view.holders(location);
    let has_one = |answer: &&Answer| answer.node != node && answer.version.is_some() && holders.contains(&answer.node);
    answers.iter().filter(has_one).map(|answer| answer.node).collect()
}

/// What other nodes were asked to bring up to date out of turn and have not answered yet.
#[derive(Default)]
pub struct Asked(Mutex<BTreeSet<(NodeId, Oid)>>);

impl Asked {
    /// Asks nodes to bring their copies up to date now, because a request waits for that here.
    pub fn ask(data: &Data, nodes: &[NodeId], oid: Oid, epoch: Epoch) {
        for node in nodes.iter().copied().filter(|node| *node != data.node()) {
            if !data.progress().asked.set().insert((node, oid)) {
                continue;
            }
            let data = data.clone();
            tokio::spawn(async move {
                let mut request = PeerRequest::new(PeerKind::Read, epoch, data.node());
                request.oid = oid;
                request.flags = FLAG_WAIT | FLAG_BRING;
                // Whatever comes of it: the comparison that asked is made again.
                drop(data.links().call(node, request, Bytes::new(), PATIENCE).await);
                data.progress().asked.set().remove(&(node, oid));
                if let Some(holder) = data.holder() {
                    holder.changed().notify_waiters();
                }
            });
        }
    }

    fn set(&self) -> std::sync::MutexGuard<'_, BTreeSet<(NodeId, Oid)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
