//! What operators ask of a driver, and what it tells them of itself.

use serde::{Deserialize, Serialize};
use sheep_core::admission::Fingerprint;
use sheep_core::member::NodeId;

/// A wish that is no command of the order.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
pub enum Administration {
    /// Lets a node that asks come in.
    Admit {
        /// Its id, or the beginning of it.
        node: String,
    },
    /// Shuts a node out for good and replaces the cluster key.
    Ban {
        /// Its id, or the beginning of it.
        node: String,
    },
    /// Makes a token that lets one node in; the answer is the token.
    Token,
    /// Replaces the cluster key.
    RotateKey,
    /// The answer is the cluster key, as the key file has it.
    ShowKey,
    /// The majority is gone for good: goes on with those who are here.
    RecoverForce,
}

/// Why a wish was not granted.
#[derive(Debug, thiserror::Error)]
pub enum AdministrationError {
    /// The driver has nothing of the kind.
    #[error("the cluster driver of this node has no {0}; start the nodes without -c local")]
    NotWithThisDriver(&'static str),
    /// No node, or several, fit what was given.
    #[error("{0}")]
    NoSuchNode(String),
    /// The cluster is not in a state for it.
    #[error("{0}")]
    NotNow(String),
    /// The order did not take it.
    #[error(transparent)]
    Order(#[from] super::OrderError),
}

/// One node as the driver sees it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct NodeOverview {
    /// Its id as text.
    pub id: String,
    /// Where it was seen: its node port.
    pub address: String,
    /// `member`, `asking` or `acquainted`.
    pub state: &'static str,
    /// What a person compares before letting it in.
    pub fingerprint: String,
    /// Fault domain, as far as known.
    pub zone: Option<u32>,
    /// Whether it takes part in the votes on the order.
    pub votes: bool,
    /// Whether it was heard of lately; `None` if this node cannot tell.
    pub alive: Option<bool>,
}

/// One link between this node and another.
#[derive(Clone, PartialEq, Eq, Debug, Serialize)]
pub struct LinkOverview {
    /// The other node.
    pub node: String,
    /// Whether it works.
    pub up: bool,
    /// For how long it has been so, milliseconds.
    pub since_ms: u64,
    /// Round trips of the last pings, microseconds: least, mean, 99th percentile.
    pub round_trip_us: Option<[u64; 3]>,
}

/// What a driver tells of itself.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize)]
pub struct Overview {
    /// `local` or `raft`.
    pub driver: &'static str,
    /// Whether this node hears from the quorum.
    pub has_quorum: bool,
    /// Who leads the order, if known.
    pub leader: Option<String>,
    /// Nodes that vote.
    pub voters: Vec<String>,
    /// Voters that do not answer this node.
    pub missing_voters: Vec<String>,
    /// What has to happen before the cluster serves again; empty if it serves.
    pub needed: String,
    /// Members, those that ask to come in, and those one is acquainted with.
    pub nodes: Vec<NodeOverview>,
    /// This node's links.
    pub links: Vec<LinkOverview>,
}

/// The members of a state as the driver's overview shows them.
pub fn members_of(state: &sheep_core::cluster_state::ClusterState) -> Vec<NodeOverview> {
    let fingerprint = |node: &NodeId| state.admission.nodes.get(node).map(Fingerprint::to_string).unwrap_or_default();
    let show = |(id, member): (&NodeId, &sheep_core::cluster_state::EpochMember)| NodeOverview {
        id: id.to_string(),
        address: member.member.peer_endpoint.clone(),
        state: "member",
        fingerprint: fingerprint(id),
        zone: Some(member.member.zone),
        votes: false,
        alive: None,
    };
    state.members.iter().map(show).collect()
}
