//! The handle: what the rest of the node asks of the order.

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use openraft::error::{ChangeMembershipError, CheckIsLeaderError, ClientWriteError, InitializeError, RaftError};
use openraft::{EmptyNode, Raft, RaftMetrics, ServerState, SnapshotPolicy};
use sheep_core::member::NodeId;
use tokio::sync::{Mutex as AsyncMutex, watch};

use super::log_store::{LogStore, give_up};
use super::machine::Answer;
use super::network::{Acknowledged, Network, Receiver};
use super::snapshots::StateStore;
use super::{Carrier, Entry, ProposeError, Proposed, Published, Role, Status, Timing, Types};
use crate::cluster::driver::OrderError;
use crate::world::World;

/// Larger entries would make a message larger than a connection takes, and the log slow to copy.
pub(super) const ENTRY_BYTES_MAX: usize = 4 << 20;
/// A snapshot is made after this many entries: a start applies that many again in some milliseconds.
const SNAPSHOT_AFTER_ENTRIES: u64 = 1000;
/// Entries kept behind a snapshot, so that a voter that was away for a moment needs no snapshot.
const ENTRIES_KEPT: u64 = 500;
/// A voter is added when it lacks no more than this: the rest takes one message.
const LAG_MAX: u64 = 100;
/// How often conditions are looked at again that nothing tells of.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
/// How soon it is noticed that the library has stopped.
const LOOK_AFTER: Duration = Duration::from_millis(640);
/// Between two candidacies of one node in `elect_now`: an election takes two disk syncs and two messages. Random up to
/// twice this, so that two candidates do not stay in step.
const CANDIDACY: Duration = Duration::from_millis(40);
/// How long a new leader must last before `elect_now` ends.
const CONFIRMATION: Duration = Duration::from_millis(200);
/// How long `elect_now` goes on.
const ELECTION_PATIENCE: Duration = Duration::from_secs(1);

/// This node's part in the order. Clones are the same part. It goes on until `shutdown`.
#[derive(Clone)]
pub struct Consensus {
    node: NodeId,
    world: World,
    raft: Raft<Types>,
    log: LogStore,
    published: watch::Receiver<Published>,
    acknowledged: Arc<Acknowledged>,
    receiver: Arc<Receiver>,
    stopping: Arc<AtomicBool>,
}

type Metrics = RaftMetrics<u64, EmptyNode>;

impl Consensus {
    /// Takes up the log and the snapshot in a directory, which is made if it is missing. `cluster` must be the one they
    /// were made for.
    pub async fn open(
        world: &World,
        node: NodeId,
        directory: PathBuf,
        cluster: u64,
        carrier: Arc<dyn Carrier>,
        timing: Timing,
    ) -> Result<Consensus, OrderError> {
        let state = StateStore::open(world, directory.clone(), cluster).await?;
        let covered = state.covered();
        let log = LogStore::open(world, directory.clone(), cluster, Some(covered.clone())).await?;
        let purged = log.purged().map(|purged| purged.index);
        if purged > *covered.borrow() {
            let reason = "it is missing, or older than what the log begins with".to_owned();
            return Err(OrderError::Damaged { place: directory.join("snapshot").display().to_string(), reason });
        }
        let published = state.watch();
        let acknowledged = Arc::new(Acknowledged::default());
        let network = Network { world: world.clone(), cluster, carrier, acknowledged: acknowledged.clone() };
        let place = directory.display().to_string();
        let config = config(timing).map_err(|reason| OrderError::Unreadable { place: place.clone(), reason })?;
        let raft = Raft::new(node.get(), Arc::new(config), network, log.clone(), state).await;
        let raft = raft.map_err(|error| OrderError::Unreadable { place, reason: error.to_string() })?;
        let receiver = Receiver {
            cluster,
            raft: raft.clone(),
            acknowledged: acknowledged.clone(),
            incoming: AsyncMutex::new(None),
        };
        let consensus = Consensus {
            node,
            world: world.clone(),
            raft,
            log,
            published,
            acknowledged,
            receiver: Arc::new(receiver),
            stopping: Arc::new(AtomicBool::new(false)),
        };
        tokio::spawn(consensus.clone().look_after());
        Ok(consensus)
    }

    /// Makes snapshots of a log that grew large, and ends the process when the library stopped by itself.
    async fn look_after(self) {
        let metrics = self.raft.metrics();
        loop {
            tokio::select! {
                () = self.log.large.notified() => {
                    // It fails only when the library has stopped.
                    let _ = self.raft.trigger().snapshot().await;
                }
                // Not at each change of them: they change with every sign of life.
                () = self.world.clock.beat(LOOK_AFTER) => {
                    let running = metrics.borrow().running_state.clone();
                    match running {
                        Ok(()) if metrics.has_changed().is_ok() => {}
                        _ if self.stopping.load(Ordering::SeqCst) => return,
                        running => {
                            let reason = running.err().map_or_else(|| "its task ended".to_owned(), |error| error.to_string());
                            let error = OrderError::Unreadable { place: "the log".to_owned(), reason };
                            match give_up(&self.world.disk, &error).await {}
                        }
                    }
                }
            }
        }
    }

    /// `None` when it takes longer than `patience`.
    async fn within<T>(&self, patience: Duration, work: impl Future<Output = T>) -> Option<T> {
        tokio::select! {
            biased;
            result = work => Some(result),
            () = self.world.clock.sleep(patience) => None,
        }
    }

    /// Whether this node may stand for election: one that was replaced as a voter must not disturb the others.
    pub fn set_may_elect(&self, may: bool) {
        self.raft.runtime_config().elect(may);
    }

    /// Begins the order with these voters. Any of them may do it, and only one should.
    pub async fn initialize(&self, voters: BTreeSet<NodeId>) -> Result<(), ProposeError> {
        match self.raft.initialize(numbers(&voters)).await {
            Ok(()) => Ok(()),
            Err(RaftError::Fatal(_)) => Err(ProposeError::Stopped),
            Err(RaftError::APIError(InitializeError::NotAllowed(_))) => {
                Err(ProposeError::Refused("the order has begun already".to_owned()))
            }
            Err(RaftError::APIError(error)) => Err(ProposeError::Refused(error.to_string())),
        }
    }

    /// Puts an entry into the order, if this node leads, and gives what it did once it was applied here.
    ///
    /// A leader that has lost its quorum without knowing it ends in `TimedOut`.
    pub async fn propose(&self, entry: Entry, patience: Duration) -> Result<Proposed, ProposeError> {
        let bytes = postcard::experimental::serialized_size(&entry).unwrap_or(usize::MAX);
        if bytes > ENTRY_BYTES_MAX {
            return Err(ProposeError::TooLarge { bytes });
        }
        let written = self.within(patience, self.raft.client_write(entry)).await.ok_or(ProposeError::TimedOut)?;
        let written = written.map_err(why_not_written)?;
        let index = written.log_id.index;
        match written.data {
            Answer::Outcome(outcome) => Ok(Proposed { index, outcome }),
            Answer::Stale | Answer::Nothing => Err(ProposeError::Stale),
        }
    }

    /// Who this node is.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// Answers a message of another voter's `Carrier`.
    pub async fn handle(&self, message: Bytes) -> Vec<u8> {
        self.receiver.handle(&message).await
    }

    /// What the order has made so far, as it goes on.
    pub fn watch(&self) -> watch::Receiver<Published> {
        self.published.clone()
    }

    /// The entries that were applied after index `after`, in order, of about 4 MiB at a time: what a node needs that
    /// follows without being a voter. `None` if they are not all kept any more; it then needs the whole of `watch`.
    /// Entries without a proposal move only the index on.
    pub fn applied_after(&self, after: u64) -> Option<Vec<(u64, Option<Entry>)>> {
        let applied = self.published.borrow().index;
        if after >= applied {
            return Some(Vec::new());
        }
        let entries = self.log.read(after + 1..=applied, ENTRY_BYTES_MAX);
        if entries.first()?.log_id.index != after + 1 {
            return None;
        }
        let proposal = |entry: openraft::Entry<Types>| match entry.payload {
            openraft::EntryPayload::Normal(proposal) => (entry.log_id.index, Some(proposal)),
            _ => (entry.log_id.index, None),
        };
        Some(entries.into_iter().map(proposal).collect())
    }

    /// How the order stands.
    pub fn status(&self) -> Status {
        status_of(&self.raft.metrics().borrow())
    }

    /// Completes when `status` may have changed; at a leader also with every entry.
    pub fn changes(&self) -> StatusChanges {
        StatusChanges { metrics: self.raft.metrics() }
    }

    /// How long ago a majority of the voters (of both sets, while they change) still followed this node: at that moment
    /// nobody else could have been leader in a later term. `None` if it leads nobody. Never too short; see
    /// `network::Acknowledged` for why.
    pub fn quorum_age(&self) -> Option<Duration> {
        let metrics = self.raft.metrics();
        let metrics = metrics.borrow();
        // Read before what was acknowledged, so that what comes in between makes the age longer, not shorter.
        let now = self.world.clock.monotonic();
        if metrics.state != ServerState::Leader {
            return None;
        }
        let sets = metrics.membership_config.membership().get_joint_config();
        let own = self.node.get();
        let moments =
            sets.iter().map(|voters| self.acknowledged.quorum_at(own, metrics.current_term, voters.iter(), now));
        let oldest = moments.min()??;
        Some(now.saturating_sub(oldest))
    }

    /// An index such that whoever has applied it has everything that was ordered before this call. Only at the leader.
    pub async fn read_index(&self, patience: Duration) -> Result<u64, ProposeError> {
        let deadline = self.world.clock.monotonic() + patience;
        loop {
            let left = deadline.saturating_sub(self.world.clock.monotonic());
            let asked = self.within(left, self.raft.get_read_log_id()).await.ok_or(ProposeError::TimedOut)?;
            match asked {
                Ok((read, _)) => return Ok(read.map_or(0, |read| read.index)),
                Err(RaftError::Fatal(_)) => return Err(ProposeError::Stopped),
                Err(RaftError::APIError(CheckIsLeaderError::ForwardToLeader(forward))) => {
                    return Err(ProposeError::NotLeader { leader: forward.leader_id.map(NodeId) });
                }
                // The library asks each voter once, for one heartbeat's time.
                Err(RaftError::APIError(CheckIsLeaderError::QuorumNotEnough(_))) => {
                    self.world.clock.sleep(LOOK_AGAIN.min(left)).await;
                }
            }
        }
    }

    /// Begins to send the log to a node, without a vote. Only at the leader; does not wait until the node has it.
    pub async fn add_learner(&self, node: NodeId, patience: Duration) -> Result<(), ProposeError> {
        let deadline = self.world.clock.monotonic() + patience;
        self.change(deadline, || self.raft.add_learner(node.get(), EmptyNode::new(), false)).await
    }

    /// Makes these nodes the voters, and nobody else. Only at the leader. New ones are sent the log first; when they
    /// do not have it in time nothing has changed, except that they go on being sent it. Ends in `TimedOut` or
    /// `NotLeader` with the change half made (`Status::changing`) at worst: then the next leader has to call it again.
    pub async fn change_voters(&self, voters: BTreeSet<NodeId>, patience: Duration) -> Result<(), ProposeError> {
        let deadline = self.world.clock.monotonic() + patience;
        let voters = numbers(&voters);
        loop {
            let status = self.require_leader()?;
            let known = |node: &u64| {
                let node = NodeId(*node);
                status.voters.contains(&node) || status.learners.contains(&node)
            };
            let Some(unknown) = voters.iter().copied().find(|node| !known(node)) else { break };
            self.change(deadline, || self.raft.add_learner(unknown, EmptyNode::new(), false)).await?;
        }
        loop {
            let status = self.require_leader()?;
            let needed = status.last.unwrap_or(0).saturating_sub(LAG_MAX);
            let has_it = |node: &u64| {
                *node == self.node.get() || status.matched.get(&NodeId(*node)).is_some_and(|at| *at >= Some(needed))
            };
            if voters.iter().all(has_it) {
                break;
            }
            if self.world.clock.monotonic() >= deadline {
                return Err(ProposeError::TimedOut);
            }
            self.world.clock.sleep(LOOK_AGAIN).await;
        }
        self.change(deadline, || self.raft.change_membership(voters.clone(), false)).await
    }

    fn require_leader(&self) -> Result<Status, ProposeError> {
        let status = self.status();
        match status.role {
            Role::Leader => Ok(status),
            Role::Stopped => Err(ProposeError::Stopped),
            _ => Err(ProposeError::NotLeader { leader: status.leader }),
        }
    }

    /// Makes a change of the members, after others that are under way.
    async fn change<T, F>(&self, deadline: Duration, attempt: impl Fn() -> F) -> Result<(), ProposeError>
    where
        F: Future<Output = Result<T, RaftError<u64, ClientWriteError<u64, EmptyNode>>>>,
    {
        loop {
            let left = deadline.saturating_sub(self.world.clock.monotonic());
            match self.within(left, attempt()).await.ok_or(ProposeError::TimedOut)? {
                Ok(_) => return Ok(()),
                Err(RaftError::APIError(ClientWriteError::ChangeMembershipError(
                    ChangeMembershipError::InProgress(_),
                ))) => self.world.clock.sleep(LOOK_AGAIN.min(left)).await,
                Err(error) => return Err(why_not_written(error)),
            }
        }
    }

    /// Stands for election until there is a new leader, for a second at most. For a voter that has proof that the leader
    /// it follows is dead: against one that lives it only makes trouble.
    ///
    /// Other voters that still follow the dead leader refuse until they have not heard from it for `election_max`, unless
    /// they stand for election themselves. So this should be called on all voters that are left: then one of them is leader
    /// as fast as disks and connections allow. Each candidacy begins a term, and whoever was elected in an earlier one
    /// is taken down by it. So a voter that gave its vote away lets that one try, and one whose log is behind that of another
    /// does not stand again.
    pub async fn elect_now(&self) {
        let mut metrics = self.raft.metrics();
        let dead = {
            let metrics = metrics.borrow();
            (metrics.current_leader, metrics.vote.leader_id)
        };
        let deadline = self.world.clock.monotonic() + ELECTION_PATIENCE;
        let is_voter =
            |metrics: &Metrics| metrics.membership_config.membership().voter_ids().any(|voter| voter == metrics.id);
        let is_replaced = |metrics: &Metrics| {
            metrics.current_leader.is_some() && (metrics.current_leader, metrics.vote.leader_id) != dead
        };
        while self.world.clock.monotonic() < deadline {
            let (replaced, gave_away, last) = {
                let metrics = metrics.borrow_and_update();
                if !is_voter(&metrics) || metrics.running_state.is_err() {
                    return;
                }
                let vote = metrics.vote.leader_id;
                (is_replaced(&metrics), vote != dead.1 && vote.node_id != metrics.id, metrics.last_log_index)
            };
            let spread = self.world.rng.next_u64() % CANDIDACY.as_micros() as u64;
            let wait = CANDIDACY + Duration::from_micros(spread);
            if replaced {
                // A candidate that began a later term before it heard of this leader may still take it down.
                if self.within(CONFIRMATION, metrics.wait_for(|metrics| !is_replaced(metrics))).await.is_none() {
                    return;
                }
            } else if self.acknowledged.is_outrun(last) {
                self.within(CONFIRMATION, metrics.wait_for(is_replaced)).await;
            } else if gave_away && self.within(2 * wait, metrics.wait_for(is_replaced)).await.is_some() {
                // The next round sees whether that one stays.
            } else {
                if self.raft.trigger().elect().await.is_err() {
                    return;
                }
                self.within(wait, metrics.wait_for(is_replaced)).await;
            }
        }
    }

    /// Stops taking part. The log stays as it is.
    pub async fn shutdown(&self) {
        self.stopping.store(true, Ordering::SeqCst);
        // The library's task ends at its next step; it fails only by having panicked.
        let _ = self.raft.shutdown().await;
        self.log.flush().await;
    }
}

/// See `Consensus::changes`.
pub struct StatusChanges {
    metrics: watch::Receiver<Metrics>,
}

impl StatusChanges {
    /// The status as it is at the next change; `None` when the node has stopped.
    pub async fn next(&mut self) -> Option<Status> {
        self.metrics.changed().await.ok()?;
        Some(status_of(&self.metrics.borrow_and_update()))
    }
}

fn status_of(metrics: &Metrics) -> Status {
    let role = match metrics.state {
        _ if metrics.running_state.is_err() => Role::Stopped,
        ServerState::Learner => Role::Learner,
        ServerState::Follower => Role::Follower,
        ServerState::Candidate => Role::Candidate,
        ServerState::Leader => Role::Leader,
        ServerState::Shutdown => Role::Stopped,
    };
    let membership = metrics.membership_config.membership();
    let replication = metrics.replication.iter().flatten();
    let matched: BTreeMap<NodeId, Option<u64>> =
        replication.map(|(node, matched)| (NodeId(*node), matched.map(|matched| matched.index))).collect();
    Status {
        role,
        term: metrics.current_term,
        leader: metrics.current_leader.map(NodeId),
        voters: membership.voter_ids().map(NodeId).collect(),
        changing: membership.get_joint_config().len() > 1,
        learners: membership.learner_ids().map(NodeId).collect(),
        last: metrics.last_log_index,
        applied: metrics.last_applied.map(|applied| applied.index),
        matched,
    }
}

fn numbers(nodes: &BTreeSet<NodeId>) -> BTreeSet<u64> {
    nodes.iter().map(|node| node.get()).collect()
}

fn why_not_written(error: RaftError<u64, ClientWriteError<u64, EmptyNode>>) -> ProposeError {
    match error {
        RaftError::Fatal(_) => ProposeError::Stopped,
        RaftError::APIError(ClientWriteError::ForwardToLeader(forward)) => {
            ProposeError::NotLeader { leader: forward.leader_id.map(NodeId) }
        }
        RaftError::APIError(ClientWriteError::ChangeMembershipError(error)) => ProposeError::Refused(error.to_string()),
    }
}

fn config(timing: Timing) -> Result<openraft::Config, String> {
    let config = openraft::Config {
        cluster_name: "sheep".to_owned(),
        heartbeat_interval: timing.heartbeat.as_millis() as u64,
        election_timeout_min: timing.election_min.as_millis() as u64,
        election_timeout_max: timing.election_max.as_millis() as u64,
        snapshot_policy: SnapshotPolicy::LogsSinceLast(SNAPSHOT_AFTER_ENTRIES),
        max_in_snapshot_log_to_keep: ENTRIES_KEPT,
        // Must be more than a snapshot leaves behind.
        replication_lag_threshold: 2 * SNAPSHOT_AFTER_ENTRIES,
        purge_batch_size: 1,
        ..openraft::Config::default()
    };
    config.validate().map_err(|error| error.to_string())
}
