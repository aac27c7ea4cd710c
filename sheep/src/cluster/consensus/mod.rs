//! One order of commands among the voters: the Raft library, kept behind one handle.
//!
//! Owns the log and the snapshot on disk, what voters say to each other, and when one of them is leader. Knows no
//! connections (a [`Carrier`] takes bytes to another voter) and decides nothing about who should be a voter.
//!
//! Always holds:
//! 1. The states that are published on a node only go forward, and two nodes never publish different states for one index.
//! 2. When `propose` gives an outcome, the command is durable on a quorum of the voters and applied here.
//! 3. Every call ends within its patience, whatever happens to the other voters.
//! 4. A disk that fails, or holds something else than was written, ends the process: it must not vote any more.
//!
//! A proposal that timed out may still be ordered later; proposed again under the same name, it is applied once.

pub mod format;
mod handle;
pub mod log_file;
mod log_store;
pub mod machine;
mod network;
mod runtime;
pub mod snapshots;

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io::Cursor;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheep_core::cluster_state::ClusterState;
use sheep_core::command::Outcome;
use sheep_core::member::NodeId;

pub use format::Entry;
pub use handle::Consensus;
pub use machine::{Answer, Machine, Session};

openraft::declare_raft_types!(
    /// The library's types as they are used here. Where a voter is reached is not the order's business: no node data.
    pub Types:
        D = Entry,
        R = Answer,
        NodeId = u64,
        Node = openraft::EmptyNode,
        Entry = openraft::Entry<Types>,
        SnapshotData = Cursor<Vec<u8>>,
        AsyncRuntime = runtime::Runtime,
);

/// How fast a dead leader is replaced.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Timing {
    /// Two thirds of the time between two signs of life of the leader: the library looks at its clock that seldom.
    pub heartbeat: Duration,
    /// A voter stands for election when it has not heard of a leader for `election_max` (no voter follows another one
    /// before) and a random time from `election_min` to `election_max` on top.
    pub election_min: Duration,
    /// See `election_min`.
    pub election_max: Duration,
}

impl Default for Timing {
    fn default() -> Timing {
        Timing {
            // A tick of 192: three slots of the timers' wheel.
            heartbeat: Duration::from_millis(128),
            election_min: Duration::from_millis(200),
            election_max: Duration::from_millis(350),
        }
    }
}

/// The other voter could not be asked, or did not answer in time.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("node {target} does not answer: {reason}")]
pub struct Unreachable {
    /// Who.
    pub target: NodeId,
    /// Why.
    pub reason: String,
}

/// A call to another voter.
pub type Carried = Pin<Box<dyn Future<Output = Result<Bytes, Unreachable>> + Send>>;

/// Takes messages to other voters and brings their answers.
pub trait Carrier: Send + Sync + 'static {
    /// Hands `message` to `Consensus::handle` of `target`. Ends within `patience`. May lose, delay and repeat messages.
    fn call(&self, target: NodeId, message: Vec<u8>, patience: Duration) -> Carried;
}

/// What an entry did.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Proposed {
    /// Where it stands in the order; a repeated one, where it stands now.
    pub index: u64,
    /// What it did, the first time.
    pub outcome: Outcome,
}

/// Why there is no answer.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ProposeError {
    /// Ask the leader.
    #[error("this node is not the leader of the order")]
    NotLeader {
        /// Who is, if this node knows.
        leader: Option<NodeId>,
    },
    /// The quorum did not answer in time: it may have happened, or happen yet. Ask again under the same name.
    #[error("the quorum did not answer in time")]
    TimedOut,
    /// The proposal belongs to an earlier life of its proposer, or the proposer has settled it. Nothing was done.
    #[error("the proposal was settled before")]
    Stale,
    /// The proposal is larger than an entry may be.
    #[error("a proposal of {bytes} bytes is too large")]
    TooLarge {
        /// As encoded.
        bytes: usize,
    },
    /// Cannot be done as the order stands: already begun, nobody left to vote.
    #[error("{0}")]
    Refused(String),
    /// This node is stopping.
    #[error("this node is stopping")]
    Stopped,
}

/// What the order has made so far. Cloning is cheap.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Published {
    /// The last entry that was applied; 0 before the first (whose own index is 0 too, and which changes nothing).
    pub index: u64,
    /// Its term.
    pub term: u64,
    /// The state.
    pub state: Arc<ClusterState>,
    /// What proposers were answered.
    pub sessions: Arc<BTreeMap<NodeId, Arc<Session>>>,
    /// See `Machine::entries`.
    pub entries: u64,
}

/// What a node is in the order.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// Not a voter.
    Learner,
    /// Follows a leader, or waits for one.
    Follower,
    /// Asks for votes.
    Candidate,
    /// Leads. Only `Consensus::quorum_age` tells whether anybody still follows.
    Leader,
    /// Stopped.
    Stopped,
}

/// How the order stands, as this node sees it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Status {
    /// This node's role.
    pub role: Role,
    /// The latest term it has heard of.
    pub term: u64,
    /// Whom it follows.
    pub leader: Option<NodeId>,
    /// Who votes. While the voters change, those before and those after.
    pub voters: BTreeSet<NodeId>,
    /// Whether the voters are changing: a change that was interrupted has to be made again.
    pub changing: bool,
    /// Who is sent the log without a vote.
    pub learners: BTreeSet<NodeId>,
    /// Index of the last entry of the log here.
    pub last: Option<u64>,
    /// Index of the last entry that was applied here.
    pub applied: Option<u64>,
    /// At the leader: up to where each node has the log.
    pub matched: BTreeMap<NodeId, Option<u64>>,
}

#[cfg(test)]
mod tests;
