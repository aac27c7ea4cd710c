//! How the order looks on disk and between voters.
//!
//! Entries, votes and memberships have forms of their own here, so that neither the disk nor the wire depends on how a
//! version of the library lays out its types. Variants are only ever added at the end.
//!
//! Bytes from outside give an error, never a panic; what a list claims to hold is not believed before it was read.

use std::collections::BTreeSet;

use openraft::{CommittedLeaderId, EmptyNode, EntryPayload, LogId, Membership, StoredMembership, Vote};
use serde::{Deserialize, Serialize};
use sheep_core::command::Command;
use sheep_core::member::NodeId;

use super::Types;

/// A proposal in the order.
///
/// `(proposer, boot, sequence)` names it: however often it is put into the order, it is applied once.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Entry {
    /// The node that wants it.
    pub proposer: NodeId,
    /// Which life of that node.
    pub boot: u64,
    /// Unique within that life; ascending.
    pub sequence: u64,
    /// The proposer has its answer for everything below this, and will never ask for it again.
    pub settled_below: u64,
    /// What to do.
    pub command: Command,
}

/// Where an entry stands: who was the leader, and how far down the log.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Mark {
    /// The leader's term.
    pub term: u64,
    /// The leader.
    pub leader: u64,
    /// Consecutive, from 0.
    pub index: u64,
}

impl From<LogId<u64>> for Mark {
    fn from(id: LogId<u64>) -> Mark {
        Mark { term: id.leader_id.term, leader: id.leader_id.node_id, index: id.index }
    }
}

impl From<Mark> for LogId<u64> {
    fn from(mark: Mark) -> LogId<u64> {
        LogId::new(CommittedLeaderId::new(mark.term, mark.leader), mark.index)
    }
}

/// A promise to follow a candidate, or (once committed) a leader.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Ballot {
    /// The term.
    pub term: u64,
    /// Who is voted for.
    pub node: u64,
    /// Whether a quorum did.
    pub committed: bool,
}

impl From<Vote<u64>> for Ballot {
    fn from(vote: Vote<u64>) -> Ballot {
        Ballot { term: vote.leader_id.term, node: vote.leader_id.node_id, committed: vote.committed }
    }
}

impl From<Ballot> for Vote<u64> {
    fn from(ballot: Ballot) -> Vote<u64> {
        let mut vote = Vote::new(ballot.term, ballot.node);
        vote.committed = ballot.committed;
        vote
    }
}

/// Who votes.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Voters {
    /// One set, or two while the voters change: then both must agree.
    pub sets: Vec<BTreeSet<u64>>,
    /// Voters and learners.
    pub nodes: BTreeSet<u64>,
}

impl From<&Membership<u64, EmptyNode>> for Voters {
    fn from(membership: &Membership<u64, EmptyNode>) -> Voters {
        let nodes = membership.nodes().map(|(node, _)| *node).collect();
        Voters { sets: membership.get_joint_config().clone(), nodes }
    }
}

impl From<Voters> for Membership<u64, EmptyNode> {
    fn from(voters: Voters) -> Membership<u64, EmptyNode> {
        Membership::new(voters.sets, voters.nodes)
    }
}

/// Who votes, and since when.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct StoredVoters {
    /// The entry that said so.
    pub since: Option<Mark>,
    /// Who.
    pub voters: Voters,
}

impl From<&StoredMembership<u64, EmptyNode>> for StoredVoters {
    fn from(stored: &StoredMembership<u64, EmptyNode>) -> StoredVoters {
        StoredVoters { since: stored.log_id().map(Mark::from), voters: Voters::from(stored.membership()) }
    }
}

impl From<StoredVoters> for StoredMembership<u64, EmptyNode> {
    fn from(stored: StoredVoters) -> StoredMembership<u64, EmptyNode> {
        StoredMembership::new(stored.since.map(LogId::from), stored.voters.into())
    }
}

/// What an entry of the log does.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Payload {
    /// Nothing: a new leader begins its term with one.
    Blank,
    /// A proposal.
    Proposal(Entry),
    /// Changes who votes.
    Voters(Voters),
}

/// An entry of the log.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct LogEntry {
    /// Where it stands.
    pub mark: Mark,
    /// What it does.
    pub payload: Payload,
}

impl From<&openraft::Entry<Types>> for LogEntry {
    fn from(entry: &openraft::Entry<Types>) -> LogEntry {
        let payload = match &entry.payload {
            EntryPayload::Blank => Payload::Blank,
            EntryPayload::Normal(proposal) => Payload::Proposal(proposal.clone()),
            EntryPayload::Membership(membership) => Payload::Voters(membership.into()),
        };
        LogEntry { mark: entry.log_id.into(), payload }
    }
}

impl From<LogEntry> for openraft::Entry<Types> {
    fn from(entry: LogEntry) -> openraft::Entry<Types> {
        let payload = match entry.payload {
            Payload::Blank => EntryPayload::Blank,
            Payload::Proposal(proposal) => EntryPayload::Normal(proposal),
            Payload::Voters(voters) => EntryPayload::Membership(voters.into()),
        };
        openraft::Entry { log_id: entry.mark.into(), payload }
    }
}

/// What a voter asks another.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the variants' docs name their fields")]
pub enum Request {
    /// The leader: append `entries` behind `previous`; everything up to `committed` is ordered. Without entries a
    /// heartbeat.
    Append { ballot: Ballot, previous: Option<Mark>, committed: Option<Mark>, entries: Vec<LogEntry> },
    /// A candidate whose log ends with `last`: vote for me.
    Vote { ballot: Ballot, last: Option<Mark> },
    /// The leader: a piece of the snapshot of `total_bytes` that ends with `last`.
    Snapshot {
        ballot: Ballot,
        last: Option<Mark>,
        voters: StoredVoters,
        total_bytes: u64,
        offset: u64,
        #[serde(with = "bytes")]
        data: Vec<u8>,
    },
}

/// What it says.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the variants' docs name their fields")]
pub enum Response {
    /// To `Append`: all of it is durable.
    Appended,
    /// To `Append`: the log does not hold `previous`.
    Conflict,
    /// To `Append`: there is a later leader or candidate.
    Outvoted { ballot: Ballot },
    /// To `Vote`; `ballot` is the one that holds now.
    Voted { ballot: Ballot, granted: bool, last: Option<Mark> },
    /// To `Snapshot`: `received_bytes` of it are here; all of them means that it is installed and durable.
    Received { ballot: Ballot, received_bytes: u64 },
    /// This node belongs to another cluster.
    OtherCluster { cluster: u64 },
    /// The request makes no sense here: bad bytes, or a version this node does not know.
    Malformed,
    /// This node is stopping.
    Stopped,
}

/// Goes up when an old node could misunderstand a new one.
const MESSAGE_VERSION: u8 = 1;
/// Version and cluster id.
const ENVELOPE_BYTES: usize = 9;

/// Byte strings as one piece, not as a list of numbers.
mod bytes {
    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_bytes(bytes)
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        // The slice lies in the message, so its length has been checked against it.
        <&[u8]>::deserialize(deserializer).map(<[u8]>::to_vec)
    }
}

/// Why a message means nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum Unintelligible {
    /// Too short, another version, or bytes that no message has.
    #[error("the message cannot be read")]
    Malformed,
    /// For another cluster.
    #[error("the message is for cluster {0:016x}")]
    OtherCluster(u64),
}

fn encode<T: Serialize>(cluster: u64, message: &T) -> Vec<u8> {
    let mut bytes = vec![MESSAGE_VERSION];
    bytes.extend_from_slice(&cluster.to_le_bytes());
    postcard::to_extend(message, bytes).expect("messages have no unserialisable values")
}

fn decode<'de, T: Deserialize<'de>>(cluster: u64, bytes: &'de [u8]) -> Result<T, Unintelligible> {
    let (envelope, body) = bytes.split_at_checked(ENVELOPE_BYTES).ok_or(Unintelligible::Malformed)?;
    let (version, theirs) = envelope.split_first().ok_or(Unintelligible::Malformed)?;
    let theirs = u64::from_le_bytes(theirs.try_into().map_err(|_| Unintelligible::Malformed)?);
    if *version != MESSAGE_VERSION {
        return Err(Unintelligible::Malformed);
    }
    if theirs != cluster {
        return Err(Unintelligible::OtherCluster(theirs));
    }
    match postcard::take_from_bytes(body) {
        Ok((message, [])) => Ok(message),
        _ => Err(Unintelligible::Malformed),
    }
}

/// A request as bytes.
pub fn encode_request(cluster: u64, request: &Request) -> Vec<u8> {
    encode(cluster, request)
}

/// A request from bytes of another node. What it returns is consistent in itself: entries follow each other.
pub fn decode_request(cluster: u64, bytes: &[u8]) -> Result<Request, Unintelligible> {
    let request = decode(cluster, bytes)?;
    let consistent = match &request {
        Request::Append { ballot, previous, entries, .. } => ballot.committed && is_chain(*previous, entries),
        Request::Vote { ballot, .. } => !ballot.committed,
        Request::Snapshot { ballot, total_bytes, offset, data, .. } => {
            ballot.committed && offset.checked_add(data.len() as u64).is_some_and(|end| end <= *total_bytes)
        }
    };
    if consistent { Ok(request) } else { Err(Unintelligible::Malformed) }
}

/// Whether the entries follow each other and `previous` without a gap, in terms that never go down.
fn is_chain(previous: Option<Mark>, entries: &[LogEntry]) -> bool {
    let mut last = previous;
    entries.iter().all(|entry| {
        let follows = match last {
            None => entry.mark.index == 0,
            Some(last) => last.index.checked_add(1) == Some(entry.mark.index) && entry.mark.term >= last.term,
        };
        last = Some(entry.mark);
        follows
    })
}

/// A response as bytes.
pub fn encode_response(cluster: u64, response: &Response) -> Vec<u8> {
    encode(cluster, response)
}

/// A response from bytes of another node.
pub fn decode_response(cluster: u64, bytes: &[u8]) -> Result<Response, Unintelligible> {
    decode(cluster, bytes)
}
