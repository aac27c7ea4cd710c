//! What people are told of this driver.

use sheep_core::cluster_state::Phase;
use sheep_core::member::NodeId;

use super::messages::{Card, decode};
use super::{Quorum, lock};
use crate::cluster::administration::{LinkOverview, NodeOverview, Overview, members_of};

impl Quorum {
    pub(super) fn describe(&self) -> Overview {
        let state = self.state();
        let links = self.mesh().links();
        let up = |node: &NodeId| *node == self.inner.node || links.iter().any(|link| link.node == *node && link.up);
        let voters = match self.leading() {
            Some(consensus) => consensus.voters(),
            None => lock(&self.inner.pulse).voters.clone(),
        };
        let voters = if voters.is_empty() {
            self.consensus().map(|consensus| consensus.voters()).unwrap_or_default()
        } else {
            voters
        };
        let mut nodes = if self.charter().is_some() { members_of(&state) } else { Vec::new() };
        for node in &mut nodes {
            let id = u64::from_str_radix(&node.id, 16).map_or(self.inner.node, NodeId);
            node.votes = voters.contains(&id);
            node.alive = Some(up(&id));
        }
        self.add_others(&mut nodes);
        let missing: Vec<String> = voters.iter().filter(|voter| !up(voter)).map(NodeId::to_string).collect();
        let has_quorum = self.has_quorum();
        Overview {
            driver: "raft",
            has_quorum,
            leader: self.leader().map(|leader| leader.to_string()),
            needed: self.needed(&state.phase, has_quorum, &voters, &missing),
            voters: voters.iter().map(NodeId::to_string).collect(),
            missing_voters: missing,
            nodes,
            links: links
                .iter()
                .map(|link| LinkOverview {
                    node: link.node.to_string(),
                    up: link.up,
                    since_ms: self.now().saturating_sub(link.since).as_millis() as u64,
                    round_trip_us: link.rtt.map(|rtt| [rtt.min_us, rtt.mean_us, rtt.p99_us].map(u64::from)),
                })
                .collect(),
        }
    }

    fn add_others(&self, nodes: &mut Vec<NodeOverview>) {
        if self.charter().is_some() {
            for (node, fingerprint, address) in self.asking_anywhere() {
                nodes.push(NodeOverview {
                    id: node.to_string(),
                    address,
                    state: "asking",
                    fingerprint: fingerprint.to_string(),
                    zone: None,
                    votes: false,
                    alive: Some(true),
                });
            }
            return;
        }
        let own = &self.inner.member;
        nodes.push(NodeOverview {
            id: own.id.to_string(),
            address: own.peer_endpoint.clone(),
            state: "acquainted",
            fingerprint: self.inner.fingerprint.to_string(),
            zone: Some(own.zone),
            votes: false,
            alive: Some(true),
        });
        for peer in lock(&self.inner.acquaintances).values().filter(|peer| peer.cluster.is_none()) {
            let Some(card) = decode::<Card>(&peer.card) else { continue };
            nodes.push(NodeOverview {
                id: peer.node.to_string(),
                address: card.member.peer_endpoint,
                state: "acquainted",
                fingerprint: peer.fingerprint.to_string(),
                zone: Some(card.member.zone),
                votes: false,
                alive: Some(true),
            });
        }
        nodes.sort_by(|one, other| one.address.cmp(&other.address));
    }

    fn needed(
        &self,
        phase: &Phase,
        has_quorum: bool,
        voters: &std::collections::BTreeSet<NodeId>,
        missing: &[String],
    ) -> String {
        if self.charter().is_none() {
            return "format the cluster: dog cluster format".to_string();
        }
        if !has_quorum {
            let majority = voters.len() / 2 + 1;
            let here = voters.len() - missing.len();
            if voters.is_empty() {
                return "no voter of this cluster can be reached: start the other nodes".to_string();
            }
            if here < majority {
                return format!(
                    "{} of {} voters have to be there, {here} are: start {} (or `dog cluster recover force` if they are \
                     gone for good)",
                    majority,
                    voters.len(),
                    missing.join(" or ")
                );
            }
            return "the voters are agreeing on a leader".to_string();
        }
        if *phase == Phase::Running && !self.inner.fence.is_open() {
            return "the others are letting this node in again".to_string();
        }
        match phase {
            Phase::Waiting { missing, .. } => {
                let names: Vec<String> = missing.iter().map(NodeId::to_string).collect();
                format!("waiting a moment for {}", names.join(", "))
            }
            _ => String::new(),
        }
    }
}
