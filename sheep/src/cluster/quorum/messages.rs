//! What nodes say to each other over the control links of the mesh: requests, answers, and who may ask what.
//!
//! Encoded with postcard. Variants are only ever added at the end; a node that does not know one answers `Unknown`.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use sheep_core::admission::Fingerprint;
use sheep_core::command::Outcome;
use sheep_core::member::{Member, NodeId};
use sheep_core::stamp::Epoch;

use super::charter::{Charter, Era};
use crate::cluster::consensus::{Entry, Machine};

/// How a node describes itself in the hello of the mesh.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Card {
    /// As it would join.
    pub member: Member,
    /// The order it belongs to.
    pub charter: Option<Charter>,
}

/// See the module.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the variants' docs name their fields")]
pub enum Request {
    /// A Raft message, as `consensus` encodes it.
    Raft(Vec<u8>),
    /// "I am here": asks the leader for the right to go on serving.
    Ping(Ping),
    /// Puts something into the order, through the leader.
    Propose(Entry),
    /// Up to where the order had come when this was asked.
    ReadIndex,
    /// What was ordered after this point of this era; waits up to `wait_ms` for something.
    Follow { era: Era, after: u64, wait_ms: u32 },
    /// Lets this node in.
    Join(Join),
    /// A connection to this process broke and could not be made again.
    Suspect { node: NodeId, boot: u64 },
    /// Do you find this process at its node's addresses, or otherwise?
    Probe { node: NodeId, boot: u64 },
    /// "I am about to make a cluster": nobody else may for a moment.
    Prepare { founder: NodeId },
    /// The cluster was made; you are in.
    Adopt { charter: Charter, machine: Box<Machine>, index: u64 },
    /// Whom do you know?
    Acquaintances,
    /// The newest state you have, for an operator who goes on without the majority.
    Newest,
    /// Who asks to come in?
    Asking,
}

/// See `Request::Ping`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ping {
    /// Who; differs from the sender of the message when it was handed on.
    pub node: NodeId,
    /// Which process of it.
    pub boot: u64,
    /// Up to where the order was applied there.
    pub applied: u64,
    /// Members whom it could not reach for a while.
    pub unreachable: Vec<NodeId>,
    /// Whether a node that does not lead should hand it on to the leader.
    pub relay: bool,
}

/// See `Request::Join`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Join {
    /// As it wants to be known.
    pub member: Member,
    /// Proof that somebody of the cluster let it in.
    pub token: Option<[u8; 32]>,
    /// Members that it has reached.
    pub reached: BTreeSet<NodeId>,
}

/// What a leader tells a node.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Pong {
    /// Which order this is about.
    pub charter: Charter,
    /// Who leads, as far as the answering node knows.
    pub leader: Option<NodeId>,
    /// The term of that.
    pub term: u64,
    /// From the leader only: how long ago, in microseconds, a quorum certainly still followed it. The asking node may serve
    /// until its asking, less this, plus the fence's patience.
    pub lease_age_us: Option<u64>,
    /// The process of the asking node that is a member.
    pub member_boot: Option<u64>,
    /// The epoch in which that process came in.
    pub member_since: Option<Epoch>,
    /// Another process runs under the asking node's identity.
    pub duplicate: bool,
    /// Nodes with a part in the votes, voters and those who are becoming it.
    pub raft_nodes: BTreeSet<NodeId>,
    /// Nodes that vote.
    pub voters: BTreeSet<NodeId>,
    /// Up to where the answering node has applied the order.
    pub index: u64,
    /// From the leader: nodes that ask to come in.
    pub asking: Vec<(NodeId, Fingerprint, String)>,
}

/// What came of a `Join`.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum JoinAnswer {
    /// Once this index is applied there, the node is in.
    Joined {
        /// Of the order that it joined.
        charter: Charter,
        /// See the variant.
        index: u64,
    },
    /// An operator has to admit it.
    Asking,
    /// Not now: an earlier process of it is still being taken out, or there is no quorum. Ask again.
    Later,
    /// It has to reach these members first.
    Unreached(BTreeSet<NodeId>),
    /// Never, for this reason.
    Refused(String),
    /// Ask this node.
    NotLeader(Option<NodeId>),
}

/// What somebody found when it tried to connect.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Found {
    /// This process answered.
    Alive(u64),
    /// Nobody listens there.
    Refused,
    /// No answer.
    Silent,
}

/// What came of a proposal.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum ProposeAnswer {
    /// It is in the order at this index.
    Done {
        /// See the variant.
        index: u64,
        /// What it did.
        outcome: Outcome,
    },
    /// Ask this node.
    NotLeader(Option<NodeId>),
    /// Nothing is known; try again.
    Unknown,
}

/// What follows a point of the order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Updates {
    /// These, in order; an index without an entry changes nothing.
    Entries(Vec<(u64, Option<Entry>)>),
    /// Everything, as it is at this index.
    Whole {
        /// Of the order it belongs to.
        charter: Charter,
        /// See the variant.
        index: u64,
        /// The state.
        machine: Box<Machine>,
    },
}

/// Somebody a node knows.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Acquaintance {
    /// Who.
    pub node: NodeId,
    /// Where.
    pub endpoint: String,
}

/// What a node knows of the order.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Newest {
    /// Of which.
    pub charter: Charter,
    /// Up to where.
    pub index: u64,
    /// The state there.
    pub machine: Machine,
    /// Whether it has heard from a quorum just now.
    pub has_quorum: bool,
}

/// An answer; the variants are those of the requests.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the variants are answers to the requests of the same names")]
pub enum Answer {
    Raft(Vec<u8>),
    Pong(Pong),
    Propose(ProposeAnswer),
    /// `None` if this node does not lead or cannot prove it.
    ReadIndex(Option<u64>),
    /// `None`: this node has nothing to follow.
    Follow(Option<Updates>),
    Join(JoinAnswer),
    Probe(Found),
    /// Whether nobody else is making a cluster and none was made; else why not.
    Prepare(Result<(), String>),
    Acquaintances(Vec<Acquaintance>),
    Newest(Option<Box<Newest>>),
    Asking(Vec<(NodeId, Fingerprint, String)>),
    /// Taken note of.
    Noted,
    /// You may not ask this, or this version does not know it.
    Unknown,
}

/// Bytes for the mesh.
pub fn encode<T: Serialize>(message: &T) -> Vec<u8> {
    postcard::to_allocvec(message).expect("the messages' types have no unserialisable values")
}

/// `None` if the bytes make no sense to this version.
pub fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Option<T> {
    postcard::from_bytes(bytes).ok()
}
