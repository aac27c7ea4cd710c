//! Format: how a cluster is made out of nodes that are only acquainted. It is the moment of trust.
//!
//! First every acquaintance is asked whether it is free, so that two formats at once do not both succeed; then the order
//! begins with this node as its only voter, its first command being the state in which all of them are members; then the others
//! are told, with the key, over the encrypted connections by which they were met. Whoever does not hear of it is evicted as a
//! silent member and comes in later, because its identity is known.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use sheep_core::admission::{Admission, ClusterKey};
use sheep_core::cluster_state::ClusterState;
use sheep_core::command::{Command, Outcome, Refusal};
use sheep_core::member::NodeId;

use super::charter::{Charter, Era};
use super::messages::{Answer, Card, Request, decode};
use super::{Quorum, lock};
use crate::cluster::driver::OrderError;
use crate::cluster::mesh::Peer;

/// Bit of the flags of `Format`: lets any node of the network in, without encryption.
pub const FLAG_OPEN: u16 = 0x8000;
/// How long another node may take to say that it is free, and to take the news.
const PATIENCE: Duration = Duration::from_secs(3);
/// How often the news is told.
const TELL_ATTEMPTS: u32 = 4;
/// How long a promise to a founder holds.
const PROMISE: Duration = Duration::from_secs(10);
/// How long the format waits for the cluster to have the voters it wants.
const SETTLE_PATIENCE: Duration = Duration::from_secs(5);

/// See `Command::Format`.
#[derive(Clone, Copy)]
pub struct Format {
    pub cluster_id: u64,
    pub copies: u8,
    pub object_size_shift: u8,
    pub flags: u16,
    pub time: u64,
}

impl Quorum {
    /// Makes the cluster.
    pub(super) async fn found(&self, format: Format) -> Result<Outcome, OrderError> {
        let others: Vec<Arc<Peer>> = lock(&self.inner.acquaintances).values().cloned().collect();
        if let Some(other) = others.iter().find_map(|peer| peer.cluster)
            && self.inner.token.is_some()
        {
            return Err(OrderError::Unavailable(format!("this node was started to join cluster {other:016x}")));
        }
        let free: Vec<Arc<Peer>> = others.into_iter().filter(|peer| peer.cluster.is_none()).collect();
        self.prepare(&free).await?;
        let state = self.first_state(format, &free)?;
        let state = match state {
            Ok(state) => state,
            Err(refusal) => return Ok(Outcome::Refused(refusal)),
        };
        let charter = Charter { cluster: format.cluster_id, era: Era { number: 0, founder: self.inner.node } };
        self.begin_order(charter, state).await?;
        let (index, machine) = {
            let position = lock(&self.inner.position);
            (position.index, position.machine.clone())
        };
        self.save().await?;
        let news = Request::Adopt { charter, machine: Box::new(machine), index };
        let told: Vec<_> = free
            .iter()
            .map(|peer| {
                let (quorum, news, node) = (self.clone(), news.clone(), peer.node);
                tokio::spawn(async move { (node, quorum.tell(node, &news).await) })
            })
            .collect();
        for told in told {
            match told.await {
                Ok((_, true)) => {}
                Ok((node, _)) => tracing::warn!("node {node} did not hear of the format; it comes in when it is back"),
                Err(error) => tracing::warn!("the format could not be told: {error}"),
            }
        }
        self.inner.steward_wake.notify_one();
        self.await_voters(free.len() + 1).await;
        Ok(Outcome::Done)
    }

    /// Tells the news, over another connection if the one before was cut: this node is somebody else to its peers now.
    async fn tell(&self, node: NodeId, news: &Request) -> bool {
        for _ in 0..TELL_ATTEMPTS {
            if matches!(self.call(node, news, PATIENCE).await, Some(Answer::Noted)) {
                return true;
            }
            self.inner.world.clock.sleep(Duration::from_millis(50)).await;
        }
        false
    }

    /// Whether all acquaintances are free.
    async fn prepare(&self, free: &[Arc<Peer>]) -> Result<(), OrderError> {
        let refusal = |reason: String| OrderError::Unavailable(format!("cannot format now: {reason}"));
        self.promise(self.inner.node).map_err(refusal)?;
        let asked: Vec<_> = free
            .iter()
            .map(|peer| {
                let (quorum, node) = (self.clone(), peer.node);
                let request = Request::Prepare { founder: self.inner.node };
                tokio::spawn(async move { (node, quorum.call(node, &request, PATIENCE).await) })
            })
            .collect();
        for asked in asked {
            match asked.await {
                Ok((_, Some(Answer::Prepare(Ok(()))))) => {}
                Ok((node, Some(Answer::Prepare(Err(reason))))) => {
                    return Err(refusal(format!("node {node}: {reason}")));
                }
                Ok((node, _)) => {
                    return Err(refusal(format!(
                        "node {node} is in the list but does not answer; stop it, or wait until it is gone from `dog \
                         node list`"
                    )));
                }
                Err(error) => return Err(refusal(error.to_string())),
            }
        }
        Ok(())
    }

    /// Promises not to make a cluster, nor let another one be made, besides this founder's.
    pub(super) fn promise(&self, founder: NodeId) -> Result<(), String> {
        if let Some(charter) = self.charter() {
            return Err(format!("it belongs to cluster {:016x} already", charter.cluster));
        }
        let now = self.now();
        let mut prepared = lock(&self.inner.prepared);
        match *prepared {
            Some((other, at)) if other != founder && now.saturating_sub(at) < PROMISE => {
                Err(format!("node {other} is about to format; one of the two has to wait"))
            }
            _ => {
                *prepared = Some((founder, now));
                Ok(())
            }
        }
    }

    /// The state in which everybody is a member of the first epoch.
    fn first_state(&self, format: Format, free: &[Arc<Peer>]) -> Result<Result<ClusterState, Refusal>, OrderError> {
        let mut state = ClusterState { needs_majority: true, ..ClusterState::default() };
        let mut nodes = std::collections::BTreeMap::new();
        let identity = self.inner.fingerprint;
        nodes.insert(self.inner.node, identity);
        state.apply(&Command::Join { member: self.inner.member.clone(), time: format.time });
        for peer in free {
            let Some(card) = decode::<Card>(&peer.card).filter(|card| card.member.id == peer.node) else {
                return Err(OrderError::Unavailable(format!(
                    "node {} describes itself in a way that this version does not understand; run the same version on \
                     every node",
                    peer.node
                )));
            };
            nodes.insert(peer.node, peer.fingerprint);
            state.apply(&Command::Join { member: card.member, time: format.time });
        }
        let open = format.flags & FLAG_OPEN != 0;
        let key = (!open).then(|| self.inner.given_key.clone().unwrap_or_else(|| self.new_key(1)));
        state.admission = Admission { open, key, nodes, ..Admission::default() };
        let outcome = state.apply(&Command::Format {
            cluster_id: format.cluster_id,
            copies: format.copies,
            object_size_shift: format.object_size_shift,
            flags: format.flags & !FLAG_OPEN,
            time: format.time,
        });
        Ok(match outcome {
            Outcome::Refused(refusal) => Err(refusal),
            _ => Ok(state),
        })
    }

    pub(super) fn new_key(&self, generation: u32) -> ClusterKey {
        let mut secret = [0; 32];
        for piece in secret.chunks_exact_mut(8) {
            piece.copy_from_slice(&self.inner.world.rng.next_u64().to_le_bytes());
        }
        ClusterKey { generation, secret }
    }

    /// Begins an order with this node as its only voter and `state` as what it starts from.
    pub(super) async fn begin_order(&self, charter: Charter, state: ClusterState) -> Result<(), OrderError> {
        self.inner.beginning.store(true, Ordering::Release);
        *lock(&self.inner.pulse) = super::pulse::Known::default();
        let begun = self.begin(charter, &state).await;
        self.inner.beginning.store(false, Ordering::Release);
        begun
    }

    async fn begin(&self, charter: Charter, state: &ClusterState) -> Result<(), OrderError> {
        let consensus = self.open_log_of(charter).await?;
        let begun = consensus.initialize(BTreeSet::from([self.inner.node])).await;
        begun.map_err(|error| OrderError::Unavailable(format!("cannot begin the order: {error}")))?;
        let restore = self.entry_for(Command::Restore(state.encode()));
        let proposed = tokio::select! {
            proposed = consensus.propose_when_leader(&*self.inner.world.clock, restore) => proposed,
            () = self.inner.world.clock.sleep(SETTLE_PATIENCE) => None,
        };
        let Some(index) = proposed else {
            return Err(OrderError::Unavailable(
                "the order could not be begun on this node; look into its log".to_string(),
            ));
        };
        self.await_index_for(charter, index, SETTLE_PATIENCE).await;
        Ok(())
    }

    /// As many voters as the nodes allow, before anybody relies on the cluster.
    async fn await_voters(&self, nodes: usize) {
        let wanted = match nodes {
            1 | 2 => nodes,
            3 | 4 => 3,
            _ => 5,
        };
        let deadline = self.now() + SETTLE_PATIENCE;
        while self.now() < deadline {
            if self.consensus().is_some_and(|consensus| consensus.voters().len() >= wanted)
                && self.inner.fence.is_open()
            {
                return;
            }
            self.inner.world.clock.sleep(Duration::from_millis(20)).await;
        }
        tracing::warn!("formatted, but not all voters are there yet");
    }

    /// The cluster was made, and this node is in.
    pub(super) async fn adopt(
        &self,
        from: &Peer,
        charter: Charter,
        index: u64,
        machine: crate::cluster::consensus::Machine,
    ) -> Answer {
        if self.charter().is_some() {
            return Answer::Unknown;
        }
        let promised = lock(&self.inner.prepared).is_some_and(|(founder, _)| founder == from.node);
        let known = machine.state.admission.nodes.get(&from.node) == Some(&from.fingerprint);
        if !promised || !known {
            tracing::warn!("node {} tells of a cluster that this node was not asked about", from.node);
            return Answer::Unknown;
        }
        self.advance(charter, index, machine);
        if let Err(error) = self.save().await {
            tracing::error!("cannot keep what is known of the cluster: {error}");
            return Answer::Unknown;
        }
        tracing::info!("this node is in cluster {:016x}", charter.cluster);
        lock(&self.inner.pulse).leader = Some(from.node);
        Answer::Noted
    }
}
