//! What voters say to each other, between the library and the bytes that a [`Carrier`] takes.
//!
//! Also keeps when each voter last followed this leader, for `Consensus::quorum_age`.
//!
//! Nothing that arrives here can panic or take more memory than [`FILE_BYTES_MAX`]; nonsense is answered as such.

use std::collections::BTreeMap;
use std::future::Future;
use std::io::Cursor;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use openraft::error::{
    Fatal, InstallSnapshotError, RPCError, RaftError, ReplicationClosed, StreamingError, Unreachable as Silent,
};
use openraft::network::{Backoff, RPCOption};
use openraft::raft::{
    AppendEntriesRequest, AppendEntriesResponse, InstallSnapshotRequest, InstallSnapshotResponse, SnapshotResponse,
    VoteRequest, VoteResponse,
};
use openraft::{AnyError, EmptyNode, LogId, OptionalSend, Raft, RaftNetwork, RaftNetworkFactory, Snapshot, Vote};
use sheep_core::member::NodeId;
use tokio::sync::Mutex as AsyncMutex;

use super::format::{
    Ballot, LogEntry, Mark, Request, Response, StoredVoters, Unintelligible, decode_request, decode_response,
    encode_request, encode_response,
};
use super::log_file::FILE_BYTES_MAX;
use super::{Carrier, Types, snapshots};
use crate::world::World;

/// Pieces that a snapshot is sent in: one of them delays a heartbeat on the same connection by some milliseconds.
const PIECE_BYTES: usize = 1 << 20;
/// For one piece; the answer to the last one comes when the snapshot is durable over there.
const PIECE_PATIENCE: Duration = Duration::from_secs(10);
/// Between two attempts at a voter that does not answer.
const RETRY_AFTER: Duration = Duration::from_millis(50);

/// When each voter last followed this node as leader: the moment the request was SENT that it answered.
///
/// This is on the safe side: the voter handled the request no earlier than that, and while it handled it, it had not yet
/// promised to follow anybody later. So at that moment no later leader could count on its vote. Requests whose answers
/// are lost or late do not count.
#[derive(Default)]
pub(super) struct Acknowledged {
    /// By voter: the term of this node, and the monotonic time.
    sent: Mutex<BTreeMap<u64, (u64, Duration)>>,
    /// The latest term and candidate or leader that this node has told anybody to follow.
    promised: Mutex<(u64, u64)>,
    /// How long this node's log was when another voter refused its vote for having more.
    outrun: Mutex<Option<u64>>,
}

impl Acknowledged {
    fn note_answer_to_candidate(&self, own: Option<Mark>, theirs: Option<Mark>) {
        if theirs > own {
            *self.outrun.lock().unwrap_or_else(PoisonError::into_inner) = Some(own.map_or(0, |own| own.index + 1));
        }
    }

    /// Whether a voter was found to have more of the log than this node, whose log ends here: it is unlikely to be elected,
    /// and each attempt begins a term that takes the one who was down.
    pub fn is_outrun(&self, last: Option<u64>) -> bool {
        *self.outrun.lock().unwrap_or_else(PoisonError::into_inner) == Some(last.map_or(0, |last| last + 1))
    }

    fn record(&self, target: u64, term: u64, sent: Duration) {
        let mut all = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let latest = all.entry(target).or_insert((term, sent));
        *latest = (*latest).max((term, sent));
    }

    /// The latest moment at which a majority of `voters` still followed this node, which led in `term`. This node itself
    /// follows until now: any promise to somebody else leaves it through [`Receiver::handle`], which takes it down first.
    pub fn quorum_at<'a>(
        &self,
        own: u64,
        term: u64,
        voters: impl ExactSizeIterator<Item = &'a u64>,
        now: Duration,
    ) -> Option<Duration> {
        // One term can have several leaders, one after the other, in the order of their ids.
        if *self.promised.lock().unwrap_or_else(PoisonError::into_inner) > (term, own) {
            return None;
        }
        let majority = voters.len() / 2 + 1;
        let all = self.sent.lock().unwrap_or_else(PoisonError::into_inner);
        let moment = |voter: &u64| match all.get(voter) {
            _ if *voter == own => Some(now),
            Some((of_term, sent)) if *of_term == term => Some(*sent),
            _ => None,
        };
        let mut moments: Vec<Duration> = voters.filter_map(moment).collect();
        moments.sort_unstable_by(|one, other| other.cmp(one));
        moments.get(majority - 1).copied()
    }
}

/// Makes the library's connections.
pub(super) struct Network {
    pub world: World,
    pub cluster: u64,
    pub carrier: Arc<dyn Carrier>,
    pub acknowledged: Arc<Acknowledged>,
}

/// To one other voter.
pub(super) struct Line {
    target: u64,
    world: World,
    cluster: u64,
    carrier: Arc<dyn Carrier>,
    acknowledged: Arc<Acknowledged>,
}

impl RaftNetworkFactory<Types> for Network {
    type Network = Line;

    async fn new_client(&mut self, target: u64, _node: &EmptyNode) -> Line {
        Line {
            target,
            world: self.world.clone(),
            cluster: self.cluster,
            carrier: self.carrier.clone(),
            acknowledged: self.acknowledged.clone(),
        }
    }
}

type Failed<E> = RPCError<u64, EmptyNode, RaftError<u64, E>>;

impl Line {
    async fn ask(&self, request: &Request, patience: Duration) -> Result<Response, Silent> {
        let message = encode_request(self.cluster, request);
        let answer = self.carrier.call(NodeId(self.target), message, patience).await;
        let answer = answer.map_err(|error| Silent::new(&error))?;
        decode_response(self.cluster, &answer).map_err(|error| Silent::new(&error))
    }
}

fn unexpected(response: &Response) -> Silent {
    let text = match response {
        Response::OtherCluster { cluster } => format!("the other node belongs to cluster {cluster:016x}"),
        Response::Malformed => "the other node does not understand the request".to_owned(),
        Response::Stopped => "the other node is stopping".to_owned(),
        _ => "the other node answered another question".to_owned(),
    };
    Silent::new(&AnyError::error(text))
}

impl RaftNetwork<Types> for Line {
    async fn append_entries(
        &mut self,
        request: AppendEntriesRequest<Types>,
        option: RPCOption,
    ) -> Result<AppendEntriesResponse<u64>, Failed<openraft::error::Infallible>> {
        let term = request.vote.leader_id.term;
        let request = Request::Append {
            ballot: request.vote.into(),
            previous: request.prev_log_id.map(Mark::from),
            committed: request.leader_commit.map(Mark::from),
            entries: request.entries.iter().map(LogEntry::from).collect(),
        };
        let sent = self.world.clock.monotonic();
        let response = self.ask(&request, option.hard_ttl()).await?;
        match response {
            Response::Appended => {
                self.acknowledged.record(self.target, term, sent);
                Ok(AppendEntriesResponse::Success)
            }
            // It follows, it only needs older entries first.
            Response::Conflict => {
                self.acknowledged.record(self.target, term, sent);
                Ok(AppendEntriesResponse::Conflict)
            }
            Response::Outvoted { ballot } => Ok(AppendEntriesResponse::HigherVote(ballot.into())),
            other => Err(unexpected(&other).into()),
        }
    }

    async fn install_snapshot(
        &mut self,
        _request: InstallSnapshotRequest<Types>,
        _option: RPCOption,
    ) -> Result<InstallSnapshotResponse<u64>, Failed<InstallSnapshotError>> {
        // `full_snapshot` below is what the library calls.
        Err(unexpected(&Response::Malformed).into())
    }

    async fn vote(
        &mut self,
        request: VoteRequest<u64>,
        option: RPCOption,
    ) -> Result<VoteResponse<u64>, Failed<openraft::error::Infallible>> {
        let own = request.last_log_id.map(Mark::from);
        let request = Request::Vote { ballot: request.vote.into(), last: own };
        match self.ask(&request, option.hard_ttl()).await? {
            Response::Voted { ballot, granted, last } => {
                self.acknowledged.note_answer_to_candidate(own, last);
                Ok(VoteResponse::new(Vote::from(ballot), last.map(LogId::from), granted))
            }
            other => Err(unexpected(&other).into()),
        }
    }

    async fn full_snapshot(
        &mut self,
        vote: Vote<u64>,
        snapshot: Snapshot<Types>,
        cancel: impl Future<Output = ReplicationClosed> + OptionalSend + 'static,
        _option: RPCOption,
    ) -> Result<SnapshotResponse<u64>, StreamingError<Types, Fatal<u64>>> {
        tokio::select! {
            closed = cancel => Err(closed.into()),
            sent = self.send_pieces(vote, snapshot) => Ok(SnapshotResponse::new(sent?)),
        }
    }

    fn backoff(&self) -> Backoff {
        Backoff::new(std::iter::repeat(RETRY_AFTER))
    }
}

impl Line {
    /// Sends a snapshot piece by piece. Gives the ballot that holds over there: `vote`, or a later one that ended it.
    async fn send_pieces(&self, vote: Vote<u64>, snapshot: Snapshot<Types>) -> Result<Vote<u64>, Silent> {
        let bytes = snapshot.snapshot.into_inner();
        let total_bytes = bytes.len() as u64;
        let mut offset = 0;
        loop {
            let end = bytes.len().min(offset + PIECE_BYTES);
            let request = Request::Snapshot {
                ballot: vote.into(),
                last: snapshot.meta.last_log_id.map(Mark::from),
                voters: StoredVoters::from(&snapshot.meta.last_membership),
                total_bytes,
                offset: offset as u64,
                data: bytes[offset..end].to_vec(),
            };
            match self.ask(&request, PIECE_PATIENCE).await? {
                Response::Received { ballot, .. } if Vote::from(ballot) > vote => return Ok(ballot.into()),
                Response::Received { ballot, received_bytes } if received_bytes == total_bytes => {
                    return Ok(ballot.into());
                }
                // Whatever it has: a piece may have come twice, or it was restarted.
                Response::Received { received_bytes, .. } if received_bytes < total_bytes => {
                    offset = received_bytes as usize;
                }
                other => return Err(unexpected(&other)),
            }
        }
    }
}

/// The side that is asked.
pub(super) struct Receiver {
    pub cluster: u64,
    pub raft: Raft<Types>,
    pub acknowledged: Arc<Acknowledged>,
    /// One at a time: a voter has one leader.
    pub incoming: AsyncMutex<Option<Incoming>>,
}

/// A snapshot that is not whole yet.
pub(super) struct Incoming {
    ballot: Ballot,
    last: Option<Mark>,
    total_bytes: u64,
    bytes: Vec<u8>,
}

impl Receiver {
    /// Answers another voter.
    pub async fn handle(&self, message: &[u8]) -> Vec<u8> {
        let response = match decode_request(self.cluster, message) {
            Ok(request) => self.answer(request).await.unwrap_or(Response::Stopped),
            Err(Unintelligible::OtherCluster(_)) => Response::OtherCluster { cluster: self.cluster },
            Err(Unintelligible::Malformed) => Response::Malformed,
        };
        encode_response(self.cluster, &response)
    }

    /// `None` when the library has stopped.
    async fn answer(&self, request: Request) -> Option<Response> {
        match request {
            Request::Append { ballot, previous, committed, entries } => {
                let request = AppendEntriesRequest {
                    vote: ballot.into(),
                    prev_log_id: previous.map(LogId::from),
                    entries: entries.into_iter().map(openraft::Entry::from).collect(),
                    leader_commit: committed.map(LogId::from),
                };
                Some(match self.raft.append_entries(request).await.ok()? {
                    AppendEntriesResponse::Success => {
                        self.promise(ballot);
                        Response::Appended
                    }
                    AppendEntriesResponse::Conflict => {
                        self.promise(ballot);
                        Response::Conflict
                    }
                    AppendEntriesResponse::HigherVote(vote) => Response::Outvoted { ballot: vote.into() },
                    AppendEntriesResponse::PartialSuccess(_) => return None,
                })
            }
            Request::Vote { ballot, last } => {
                let request = VoteRequest::new(ballot.into(), last.map(LogId::from));
                let answer = self.raft.vote(request).await.ok()?;
                let ballot = Ballot::from(answer.vote);
                self.promise(ballot);
                Some(Response::Voted { ballot, granted: answer.vote_granted, last: answer.last_log_id.map(Mark::from) })
            }
            Request::Snapshot { ballot, last, voters, total_bytes, offset, data } => {
                self.receive_piece(Incoming { ballot, last, total_bytes, bytes: data }, voters, offset).await
            }
        }
    }

    fn promise(&self, ballot: Ballot) {
        let mut promised = self.acknowledged.promised.lock().unwrap_or_else(PoisonError::into_inner);
        *promised = (*promised).max((ballot.term, ballot.node));
    }

    async fn receive_piece(&self, piece: Incoming, voters: StoredVoters, offset: u64) -> Option<Response> {
        if piece.total_bytes > FILE_BYTES_MAX {
            return Some(Response::Malformed);
        }
        let mut incoming = self.incoming.lock().await;
        let ballot = self.raft.with_raft_state(|state| *state.vote_ref()).await.ok()?;
        // A leader of the past must not replace what the present one has begun.
        if ballot > Vote::from(piece.ballot) {
            return Some(Response::Received { ballot: ballot.into(), received_bytes: 0 });
        }
        let Incoming { ballot, last, total_bytes, bytes } = piece;
        let present = incoming
            .take()
            .filter(|present| present.ballot == ballot && present.last == last && present.total_bytes == total_bytes);
        let mut present = present.unwrap_or(Incoming { ballot, last, total_bytes, bytes: Vec::new() });
        if offset == present.bytes.len() as u64 {
            present.bytes.extend_from_slice(&bytes);
        }
        let received_bytes = present.bytes.len() as u64;
        if received_bytes < total_bytes {
            *incoming = Some(present);
            return Some(Response::Received { ballot, received_bytes });
        }
        // The library takes a snapshot that cannot be read for a failure of this node's disk.
        match snapshots::decode(&present.bytes) {
            Ok(frozen) if frozen.cluster == self.cluster && frozen.last == last && frozen.voters == voters => {}
            _ => return Some(Response::Malformed),
        }
        let snapshot = Snapshot {
            meta: snapshots::meta_of(last.map(LogId::from), voters.into()),
            snapshot: Box::new(Cursor::new(present.bytes)),
        };
        let answer = self.raft.install_full_snapshot(ballot.into(), snapshot).await.ok()?;
        self.promise(answer.vote.into());
        Some(Response::Received { ballot: answer.vote.into(), received_bytes })
    }
}
