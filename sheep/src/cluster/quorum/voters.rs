//! Who votes: at most five nodes, over as many zones as possible, replaced as nodes come and go.
//!
//! One, two, three or five vote. Four would bear no more deaths than three, and need one more to agree.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use sheep_core::cluster_state::{ClusterState, Phase};
use sheep_core::member::{Member, NodeId};

use super::voting::Voting;
use super::{Quorum, lock};
use crate::world::marks::{self, Mark};

/// How long a new voter may take to catch up before the change is tried again.
const PATIENCE: Duration = Duration::from_secs(5);

/// The voters that `state` should have, given those it has and those who are present. The same set if no change helps.
pub fn choose(state: &ClusterState, voters: &BTreeSet<NodeId>, present: &BTreeSet<NodeId>) -> BTreeSet<NodeId> {
    // A voter that is silent keeps its vote until it is evicted, and one that was evicted keeps it while it is there: it is
    // about to come in again, and may be the one that leads.
    let stays = |node: &NodeId| state.members.contains_key(node) || (present.contains(node) && voters.contains(node));
    let able: BTreeSet<NodeId> = present.union(voters).copied().filter(stays).collect();
    let living = voters.intersection(&able).count();
    let size = match able.len() {
        0 => return voters.clone(),
        1 | 2 => able.len(),
        3 | 4 => 3,
        _ => 5,
    };
    // Fewer voters bear fewer deaths: a dead one is only let go of for a living one, or when three living ones are left of five.
    let shrinks = size < voters.len();
    if shrinks && !(voters.len() == 5 && living <= 3 && able.len() >= 3) {
        let replaced = fill(state, voters, &able, voters.len());
        return if replaced.len() == voters.len() { replaced } else { voters.clone() };
    }
    fill(state, voters, &able, size)
}

/// `size` of the able ones: those who vote already first, then those in zones that have no voter, holders before gateways.
fn fill(state: &ClusterState, voters: &BTreeSet<NodeId>, able: &BTreeSet<NodeId>, size: usize) -> BTreeSet<NodeId> {
    let mut chosen: BTreeSet<NodeId> = BTreeSet::new();
    let mut per_zone: BTreeMap<u32, usize> = BTreeMap::new();
    while chosen.len() < size {
        let rank = |node: &NodeId| {
            let member = state.members.get(node).map(|member| &member.member);
            let crowd = member.and_then(|member| per_zone.get(&member.zone).copied()).unwrap_or(0);
            (crowd, !voters.contains(node), member.is_none_or(Member::is_gateway), *node)
        };
        let Some(next) = able.iter().filter(|node| !chosen.contains(node)).min_by_key(|node| rank(node)).copied()
        else {
            break;
        };
        let zone = state.members.get(&next).map_or(0, |member| member.member.zone);
        *per_zone.entry(zone).or_default() += 1;
        chosen.insert(next);
    }
    chosen
}

impl Quorum {
    /// Changes the voters if that makes the cluster bear more.
    pub(super) async fn choose_voters(&self, consensus: &Voting) {
        let state = self.state();
        // While those of an earlier life are waited for, it is too early to tell who is there.
        if state.phase != Phase::Running {
            return;
        }
        let now = self.now();
        if !lock(&self.inner.stewardship).is_settled() {
            return;
        }
        let mut present = lock(&self.inner.stewardship).present(now);
        present.insert(self.inner.node);
        let voters = consensus.voters();
        let wanted = choose(&state, &voters, &present);
        if wanted == voters {
            return;
        }
        let names = |nodes: &BTreeSet<NodeId>| nodes.iter().map(NodeId::to_string).collect::<Vec<_>>().join(", ");
        marks::hit(Mark::VotersChanged);
        tracing::info!("voters change from [{}] to [{}]", names(&voters), names(&wanted));
        if let Err(error) = consensus.change_voters(wanted, PATIENCE).await {
            tracing::warn!("cannot change the voters yet: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use sheep_core::cluster_state::EpochMember;
    use sheep_core::level::Level;
    use sheep_core::stamp::Epoch;

    use super::*;

    fn state(zones: &[u32]) -> ClusterState {
        let mut state = ClusterState::default();
        for (index, zone) in zones.iter().enumerate() {
            let id = NodeId(index as u64 + 1);
            let member = Member {
                id,
                address: [0; 16],
                port: 7000,
                peer_endpoint: String::new(),
                boot: 1,
                zone: *zone,
                weight: 1,
                level: Level::OURS,
            };
            state.members.insert(id, EpochMember { member, since: Epoch(0) });
        }
        state
    }

    fn set(nodes: &[u64]) -> BTreeSet<NodeId> {
        nodes.iter().map(|node| NodeId(*node)).collect()
    }

    #[test]
    fn a_growing_cluster_gets_one_two_three_five_voters() {
        let state = state(&[1, 2, 3, 4, 5, 6, 7]);
        let mut voters = set(&[1]);
        for (present, expected) in [(1, 1), (2, 2), (3, 3), (4, 3), (5, 5), (7, 5)] {
            let nodes: Vec<u64> = (1..=present).collect();
            voters = choose(&state, &voters, &set(&nodes));
            assert_eq!(voters.len(), expected, "{present} nodes");
        }
    }

    #[test]
    fn a_dead_voter_is_replaced_and_not_merely_dropped() {
        let state4 = state(&[1, 2, 3, 4]);
        assert_eq!(choose(&state4, &set(&[1, 2, 3]), &set(&[1, 2, 4])), set(&[1, 2, 3]), "not evicted yet");
        let mut state4 = state4;
        state4.members.remove(&NodeId(3));
        assert_eq!(choose(&state4, &set(&[1, 2, 3]), &set(&[1, 2, 4])), set(&[1, 2, 4]));
        state4.members.remove(&NodeId(4));
        assert_eq!(choose(&state4, &set(&[1, 2, 3]), &set(&[1, 2])), set(&[1, 2, 3]), "nobody to replace it with");
        let mut state5 = state(&[1, 2, 3, 4, 5]);
        state5.members.remove(&NodeId(5));
        assert_eq!(choose(&state5, &set(&[1, 2, 3, 4, 5]), &set(&[1, 2, 3, 4])), set(&[1, 2, 3, 4, 5]));
        state5.members.remove(&NodeId(4));
        assert_eq!(choose(&state5, &set(&[1, 2, 3, 4, 5]), &set(&[1, 2, 3])), set(&[1, 2, 3]));
    }

    #[test]
    fn a_voter_that_is_about_to_come_in_again_stays_one() {
        let mut state = state(&[1, 2, 3, 4, 5]);
        let all = set(&[1, 2, 3, 4, 5]);
        for node in [1, 4] {
            state.members.remove(&NodeId(node));
        }
        assert_eq!(choose(&state, &all, &all), all);
        assert_eq!(choose(&state, &all, &set(&[1, 2, 3, 5])), all, "three would bear as many deaths as four");
        assert_eq!(choose(&state, &all, &set(&[2, 3, 5])), set(&[2, 3, 5]));
    }

    #[test]
    fn zones_are_spread_and_voters_stay() {
        let state = state(&[1, 1, 1, 2, 3]);
        let voters = choose(&state, &set(&[1]), &set(&[1, 2, 4, 5]));
        assert_eq!(voters, set(&[1, 4, 5]));
        assert_eq!(choose(&state, &voters, &set(&[1, 2, 4, 5])), voters);
    }
}
