//! Which copy of an object is the newest, told from the epochs since the last clean one.
//!
//! Every epoch may have taken writes that only its own holders know. A copy counts as *current as of* the last epoch up
//! to which its node was, without a gap, a holder that took every write. The newest copy is the one that is current as
//! of the latest epoch; among those, the one with the highest stamp. An absent copy counts like a present one: a node that
//! was there all along and has no object knows that it was removed.
//!
//! Always holds:
//! 1. No decision is made before at least one holder of every epoch since the clean one was heard (or the operator said
//!    that it will not be heard): an older copy is never taken for the newest. A holder that was still being brought up
//!    to date in an epoch that had steady ones may have *deferred* its writes (answered them before its copy had them), so
//!    it is no witness of that epoch unless its copy shows that it went all the way, or it met none of those: they were dead.
//! 2. What is shown to anybody must not lose against an older copy later. A steady holder answers for that: the epoch is not told
//!    without it. In an epoch that has none, each of its holders counts as a witness, whatever its copy lacks; so there nothing
//!    is shown before all of them have it (`History::keeps`).
//! 3. The decision does not depend on the order of the answers, and every node that hears the same answers decides
//!    the same.
//!
//! A copy says itself as of when it is good, an absence does not: a node that has completed an epoch in which it does not hold the
//! object cannot tell any more that it saw it removed in an earlier one. So an object that was removed while a node was away may
//! come back with that node (one that was written never goes). Nothing refers to it then, and `sweep` removes it.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;

use crate::cluster_state::{ClusterState, EpochRecord};
use crate::copies::Copies;
use crate::member::NodeId;
use crate::placement::{Holders, PlacementKey, holders};
use crate::ring::Ring;
use crate::stamp::{Epoch, Stamp, Version};

/// One epoch with its ring.
#[derive(Clone)]
struct HistoricEpoch {
    record: Arc<EpochRecord>,
    ring: Option<Arc<Ring>>,
}

/// The epochs from the last clean one to the current one.
#[derive(Clone)]
pub struct History {
    epochs: Vec<HistoricEpoch>,
    /// Of this epoch and those before it only those have to be heard who were there when the others were given up.
    forgiven: Epoch,
    /// The processes of now, by `Member::boot`.
    boots: BTreeMap<NodeId, u64>,
}

/// What one node says of its copy of one object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Answer {
    /// Who says it.
    pub node: NodeId,
    /// Its copy, if it has one.
    pub version: Option<Version>,
    /// The last epoch for which that node had recovered everything it must hold.
    pub clean_through: Epoch,
    /// Whether its process met no steady holder of the object in the epochs between the clean and the present one.
    pub met_nobody: bool,
    /// The last epoch in which its earlier processes may have met one, if that is known.
    pub met_before: Option<Epoch>,
}

/// What follows from the answers.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Decision {
    /// The object does not exist.
    Absent,
    /// These nodes have the newest content.
    Newest {
        /// Of the newest content.
        stamp: Stamp,
        /// Those whose copy has it, all equally good.
        nodes: Vec<NodeId>,
    },
    /// Nobody who held the object in this epoch was heard; only they can know what it took.
    Unheard(Epoch),
}

/// The ring of an epoch; none while nobody stores anything.
fn ring_of(record: &EpochRecord) -> Option<Ring> {
    Some(Ring::new(&record.ring_members(), record.reference_weight?))
}

/// Who held the objects of a key in an epoch, in order of preference. Builds that epoch's ring anew: for people's questions, not
/// for the data path.
pub fn holders_in(record: &EpochRecord, key: PlacementKey, copies: Copies) -> Holders {
    ring_of(record).map_or(Holders::EMPTY, |ring| holders(&ring, key, copies.in_epoch(record.epoch)))
}

impl HistoricEpoch {
    fn holders(&self, key: PlacementKey, copies: Copies) -> Holders {
        let copies = copies.in_epoch(self.record.epoch);
        self.ring.as_ref().map_or(Holders::EMPTY, |ring| holders(ring, key, copies))
    }
}

impl History {
    /// The history of a state. Rings that `previous` already has are taken from there: building one takes milliseconds.
    pub fn of(state: &ClusterState, previous: Option<&History>) -> History {
        let epochs = state.epochs.iter().filter(|record| record.epoch >= state.clean).map(|record| {
            let known = previous.and_then(|history| {
                history.epochs.iter().find(|known| Arc::ptr_eq(&known.record, record)).map(|known| known.ring.clone())
            });
            HistoricEpoch { record: record.clone(), ring: known.unwrap_or_else(|| ring_of(record).map(Arc::new)) }
        });
        let boots = state.members.iter().map(|(node, member)| (*node, member.member.boot));
        History { epochs: epochs.collect(), forgiven: state.forgiven, boots: boots.collect() }
    }

    /// The current epoch; 0 before format.
    pub fn current(&self) -> Epoch {
        self.epochs.last().map_or(Epoch(0), |last| last.record.epoch)
    }

    /// The current holders of an object, in order of preference; none before format.
    pub fn holders(&self, key: PlacementKey, copies: Copies) -> Holders {
        self.epochs.last().map_or(Holders::EMPTY, |last| last.holders(key, copies))
    }

    fn at(&self, epoch: Epoch) -> Option<&HistoricEpoch> {
        let index = self.epochs.binary_search_by_key(&epoch, |at| at.record.epoch).ok()?;
        self.epochs.get(index)
    }

    /// Whether `node` held the object in `epoch`.
    pub fn held(&self, node: NodeId, epoch: Epoch, key: PlacementKey, copies: Copies) -> bool {
        self.at(epoch).is_some_and(|at| at.holders(key, copies).contains(&node))
    }

    /// The last epoch before the current one up to which this node's copy (or its absence) took every write; see the
    /// module. `None` if the node's silence about an object means nothing.
    pub fn current_as_of(&self, answer: &Answer, key: PlacementKey, copies: Copies) -> Option<Epoch> {
        let whole_node = self.held(answer.node, answer.clean_through, key, copies).then_some(answer.clean_through);
        let mut as_of = match (answer.version.map(|version| version.epoch), whole_node) {
            (Some(copy), Some(node)) => copy.max(node),
            (Some(copy), None) => copy,
            (None, node) => node?,
        };
        // An epoch counts only while the same process stayed in and went on being a holder.
        while as_of.next() < self.current() {
            let next = as_of.next();
            let stayed = self.at(next).is_some_and(|at| {
                at.record.members.get(&answer.node).is_some_and(|member| member.since <= as_of)
                    && at.holders(key, copies).contains(&answer.node)
            });
            if !stayed {
                break;
            }
            as_of = next;
        }
        Some(as_of)
    }

    /// Whether a node whose copy is not current may answer a write of the current epoch before the copy has it: so many steady
    /// holders that were `heard` in it must have it as a write has to have copies, and nothing that this node says after a crash,
    /// or in a later epoch, may count as if its copy had taken what this epoch wrote.
    pub fn may_defer(
        &self,
        own: &Answer,
        key: PlacementKey,
        copies: Copies,
        min_copies: u8,
        heard: &BTreeSet<NodeId>,
    ) -> bool {
        let Some(last) = self.epochs.last() else { return false };
        let Some(member) = last.record.members.get(&own.node) else { return false };
        if self.steady_holders(last, key, copies).contains(&own.node) {
            return false;
        }
        let there = self.witnessing_holders(key, copies).filter(|node| heard.contains(node)).count();
        if there < usize::from(min_copies.max(1)) {
            return false;
        }
        let behind = |as_of: Epoch| as_of < self.current() && (as_of.next() < self.current() || member.since > as_of);
        self.current_as_of(own, key, copies).is_none_or(behind)
    }

    /// Whether the current epoch has a holder of an object that had its newest content from the first moment, and knows what was
    /// under way then. Not told of a clean one, in which all holders have it by now.
    pub fn has_steady_holder(&self, key: PlacementKey, copies: Copies) -> bool {
        self.witnessing_holders(key, copies).next().is_some()
    }

    /// The steady holders of the current epoch whose processes saw all of it, and of the epochs that they are steady since. After an
    /// orderly stop of everybody an epoch goes on with processes that know nothing of the writes that were under way.
    fn witnessing_holders(&self, key: PlacementKey, copies: Copies) -> impl Iterator<Item = NodeId> {
        let steady = self.epochs.last().map(|last| (last, self.steady_holders(last, key, copies)));
        steady.into_iter().flat_map(move |(last, steady)| {
            steady.into_iter().filter(move |node| {
                let from = last.record.steady.get(node).copied().unwrap_or(last.record.epoch);
                let is_same = |at: &HistoricEpoch| {
                    at.record.members.get(node).is_some_and(|m| Some(&m.member.boot) == self.boots.get(node))
                };
                (from.get()..=last.record.epoch.get()).all(|epoch| self.at(Epoch(epoch)).is_some_and(is_same))
            })
        })
    }

    /// Whether content that a node says it has outlasts, with that node alone, whoever else has had the object: in no epoch that
    /// its copy does not show was there a holder that is none now, whose older copy might count as newer for that. A holder of
    /// now has to have it, too.
    pub fn keeps(&self, answer: &Answer, newest: Stamp, key: PlacementKey, copies: Copies) -> bool {
        let has_it = answer.version.is_some_and(|version| version.stamp == newest);
        let Some(as_of) = self.current_as_of(answer, key, copies) else { return false };
        let before_current = &self.epochs[..self.epochs.len().saturating_sub(1)];
        let mut later = before_current.iter().filter(|at| at.record.epoch > as_of);
        let now = self.holders(key, copies);
        has_it && later.all(|at| at.holders(key, copies).iter().all(|node| now.contains(node)))
    }

    /// The holders of an object that had its newest content from the first moment of an epoch.
    fn steady_holders(&self, at: &HistoricEpoch, key: PlacementKey, copies: Copies) -> Vec<NodeId> {
        let held_since = |node: &NodeId, from: Epoch| {
            (from.get()..at.record.epoch.get()).all(|epoch| self.held(*node, Epoch(epoch), key, copies))
        };
        let is_steady = |node: &NodeId| at.record.steady.get(node).is_some_and(|from| held_since(node, *from));
        let holders = at.holders(key, copies);
        holders.iter().copied().filter(is_steady).collect()
    }

    /// Whether an epoch may have promised what a holder does not know of: beside a steady holder it may have deferred writes, and
    /// have taken part in a flush of what its copy lacked already. Beside a dead one, which only was not given up yet, it did not.
    /// Where there was no steady holder, a flush brought what its own gateway had written to all holders (`flush.rs` in `data`).
    fn may_have_missed(&self, answer: &Answer, at: &HistoricEpoch, key: PlacementKey, copies: Copies) -> bool {
        let steady = self.steady_holders(at, key, copies);
        if steady.is_empty() || steady.contains(&answer.node) {
            return false;
        }
        if answer.met_nobody && answer.met_before.is_some_and(|last| last < at.record.epoch) {
            return false;
        }
        let went_all_the_way = self.current_as_of(answer, key, copies) >= Some(at.record.epoch);
        !went_all_the_way
    }

    /// Whether a node that met others, by epoch, met a steady holder of the object before the present epoch.
    pub fn met_steady(&self, met: &BTreeMap<Epoch, BTreeSet<NodeId>>, key: PlacementKey, copies: Copies) -> bool {
        let mut before = met.iter().filter(|(epoch, _)| **epoch < self.current());
        before.any(|(epoch, nodes)| {
            // Whoever asks may look further back.
            let Some(at) = self.at(*epoch) else { return true };
            self.steady_holders(at, key, copies).iter().any(|node| nodes.contains(node))
        })
    }

    /// Whether a node was there when the operator gave up what others might know.
    fn survived(&self, node: NodeId) -> bool {
        let first = self.epochs.iter().find(|at| at.record.epoch > self.forgiven);
        first.is_some_and(|at| at.record.members.contains_key(&node))
    }

    /// Current members that held the object in any epoch since the clean one: whoever may have something to say. Who serves as
    /// a gateway now looks at none of its copies.
    pub fn witnesses(&self, key: PlacementKey, copies: Copies) -> BTreeSet<NodeId> {
        let Some(last) = self.epochs.last() else { return BTreeSet::new() };
        let everyone = self.epochs.iter().flat_map(|at| at.holders(key, copies).to_vec());
        let has_a_store = |node: &NodeId| last.record.members.get(node).is_some_and(|m| !m.member.is_gateway());
        everyone.filter(has_a_store).collect()
    }

    /// The earliest epoch in which an object with at least `copies_min` copies may have been only on nodes that are not here
    /// now: then nobody can say that an object nobody mentioned does not exist. `None` if there is no such epoch.
    pub fn possibly_out_of_sight(&self, copies_min: u8) -> Option<Epoch> {
        let last = self.epochs.last()?;
        self.epochs.iter().map(|at| &at.record).find_map(|record| {
            let storing = record.members.values().map(|m| &m.member).filter(|member| !member.is_gateway());
            let zones: BTreeSet<u32> = storing.clone().map(|member| member.zone).collect();
            let absent = storing.filter(|member| !last.record.members.contains_key(&member.id));
            let counts = record.epoch > self.forgiven || absent.clone().any(|member| self.survived(member.id));
            let zones_absent: BTreeSet<u32> = absent.map(|member| member.zone).collect();
            let enough = zones.len().min(usize::from(copies_min)).max(1);
            (counts && zones_absent.len() >= enough).then_some(record.epoch)
        })
    }

    /// Decides which content is the newest from everybody who could be asked.
    pub fn decide(&self, key: PlacementKey, copies: Copies, answers: &[Answer]) -> Decision {
        let rank = |answer: &Answer| {
            let as_of = self.current_as_of(answer, key, copies)?;
            Some((as_of, answer.version.map(|version| version.stamp)))
        };
        let best = answers.iter().filter_map(rank).max();
        // A copy that is current as of an epoch contains every write of the epochs up to it: those need no other witness.
        let told = best.map_or(Epoch(0), |(as_of, _)| as_of);
        let before_current = self.epochs.len().saturating_sub(1);
        for at in self.epochs[..before_current].iter().filter(|at| at.record.epoch > told) {
            let held = at.holders(key, copies);
            let is_forgiven = at.record.epoch <= self.forgiven;
            let heard = |answer: &Answer| {
                held.contains(&answer.node) && (is_forgiven || !self.may_have_missed(answer, at, key, copies))
            };
            let somebody_knows = held.iter().any(|node| !is_forgiven || self.survived(*node));
            if somebody_knows && !answers.iter().any(heard) {
                return Decision::Unheard(at.record.epoch);
            }
        }
        let Some(best) = best else { return Decision::Absent };
        match best.1 {
            None => Decision::Absent,
            Some(stamp) => Decision::Newest {
                stamp,
                nodes: answers.iter().filter(|answer| rank(answer) == Some(best)).map(|answer| answer.node).collect(),
            },
        }
    }
}
