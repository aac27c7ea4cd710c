//! How a node comes in: it asks the leader again and again until it is in; the leader checks who it is.
//!
//! A process asks whenever the leader's answers say that it is no member: at its start, and after it was evicted. A node without
//! a cluster asks every cluster it meets.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sheep_core::admission::Fingerprint;
use sheep_core::cluster_state::{ClusterState, Phase};
use sheep_core::command::{Command, Outcome, Refusal};
use sheep_core::member::NodeId;
use tokio::sync::mpsc;

use super::messages::{Acquaintance, Answer, Card, Join, JoinAnswer, Request, decode};
use super::{Asking, Quorum, addresses_of, last_known, lock};
use crate::cluster::mesh::{ContactError, Peer, Standing};
use crate::world::marks::{self, Mark};

/// How often a member looks whether it still is one.
const IN_INTERVAL: Duration = Duration::from_millis(200);
/// Between attempts to come in.
const ASK_INTERVAL: Duration = Duration::from_millis(100);
/// Between attempts of a node that an operator has to admit.
const BEG_INTERVAL: Duration = Duration::from_millis(500);
/// Between two lines of the log that say the same refusal.
const TELL_REFUSAL_INTERVAL: Duration = Duration::from_mins(1);
/// How long the leader may take to let somebody in: an earlier process may have to be taken out first.
const PATIENCE: Duration = Duration::from_secs(5);
/// A node that has not asked for this long is not shown as asking any more.
const ASKING_FOR: Duration = Duration::from_secs(10);
/// Nodes shown as asking at once: strangers must not fill the memory.
const ASKING_MAX: usize = 256;
/// How often a node that wants in follows others to whom they take for the leader, in one attempt.
const REDIRECTS_MAX: usize = 3;
const TOKEN_REFUSED: &str = "the token was used already, or is void because the cluster key was replaced; get a new one with \
                             `dog cluster token`";
/// Strangers that a node without a cluster keeps in touch with.
const ACQUAINTANCES_MAX: usize = 1024;

impl Quorum {
    /// Goes to every address that discovery finds.
    pub(super) async fn meet(self, mut found: mpsc::Receiver<SocketAddr>) {
        while let Some(address) = found.recv().await {
            let quorum = self.clone();
            tokio::spawn(async move {
                match quorum.mesh().contact(address).await {
                    Ok(_) => quorum.mark_known(address),
                    Err(ContactError::Rejected(rejection)) => {
                        tracing::debug!("{address} does not belong here: {rejection}");
                        quorum.mark_known(address);
                    }
                    Err(error) => tracing::debug!("nobody at {address} yet: {error}"),
                }
            });
        }
    }

    fn mark_known(&self, address: SocketAddr) {
        if let Some(discovery) = self.inner.discovery.get() {
            discovery.known(address);
        }
    }

    /// Somebody connected to us, or we to them.
    pub(super) fn met(&self, peer: &Arc<Peer>) {
        if peer.node == self.inner.node {
            return;
        }
        let ours = self.charter().map(|charter| charter.cluster);
        if ours.is_some() {
            // A member that moved to other addresses is followed there, unless it still answers where it was. One that is let in
            // may be all that a node finds again whose state is older than the members it has.
            let answers = self.mesh().links().iter().any(|link| link.node == peer.node && link.up);
            let is_ours = match peer.standing {
                Standing::Stranger => false,
                Standing::Member => true,
                Standing::Keyholder => lock(&self.inner.linked).contains_key(&peer.node),
            };
            if is_ours && !answers && !peer.addresses.is_empty() {
                self.mesh().know(peer.node, peer.addresses.clone());
            }
            return;
        }
        let new = {
            let mut acquaintances = lock(&self.inner.acquaintances);
            if acquaintances.len() >= ACQUAINTANCES_MAX && !acquaintances.contains_key(&peer.node) {
                return;
            }
            let before = acquaintances.insert(peer.node, peer.clone());
            before.is_none_or(|before| before.boot != peer.boot || before.cluster != peer.cluster)
        };
        if new {
            self.mesh().know(peer.node, peer.addresses.clone());
            self.show_acquaintances();
            let quorum = self.clone();
            let node = peer.node;
            tokio::spawn(async move { quorum.ask_around(node).await });
        }
    }

    /// Meets those whom a new acquaintance knows.
    async fn ask_around(&self, node: NodeId) {
        let Some(Answer::Acquaintances(known)) = self.call(node, &Request::Acquaintances, PATIENCE).await else {
            return;
        };
        for other in known.into_iter().filter(|other| other.node != self.inner.node) {
            if !lock(&self.inner.acquaintances).contains_key(&other.node) {
                self.greet(&other).await;
            }
        }
    }

    /// Goes to where a node is said to be. Whether it is there.
    async fn greet(&self, other: &Acquaintance) -> bool {
        for address in other.endpoint.split(',').filter_map(|address| address.parse().ok()) {
            if self.mesh().contact(address).await.is_ok() {
                return true;
            }
        }
        false
    }

    /// Finds a leader that is no member as far as this node knows, so that it keeps no link to it: others know where it is.
    async fn look_for(&self, leader: NodeId) {
        for node in self.up() {
            let Some(Answer::Acquaintances(known)) = self.call(node, &Request::Acquaintances, PATIENCE).await else {
                continue;
            };
            if let Some(found) = known.iter().find(|known| known.node == leader)
                && self.greet(found).await
            {
                marks::hit(Mark::LeaderLookedFor);
                return;
            }
        }
    }

    /// Asks to be let in whenever this process is out.
    pub(super) async fn keep_entering(self) {
        loop {
            let pause = self.enter_if_out().await;
            self.inner.world.clock.sleep(pause).await;
        }
    }

    async fn enter_if_out(&self) -> Duration {
        if self.inner.leaving.load(std::sync::atomic::Ordering::Acquire) {
            return BEG_INTERVAL;
        }
        match self.charter() {
            None => self.beg().await,
            Some(_) => {
                let state = self.state();
                if self.is_member(&state) || state.phase == Phase::Shutdown {
                    return IN_INTERVAL;
                }
                let Some(leader) = self.leader() else { return ASK_INTERVAL };
                let join = self.join_request(&state);
                if leader == self.inner.node {
                    // An open cluster notes no certificates of those who joined it later.
                    let own = state.admission.open.then_some(self.inner.fingerprint);
                    let fingerprint = state.admission.nodes.get(&leader).copied().or(own);
                    let Some(fingerprint) = fingerprint else { return BEG_INTERVAL };
                    self.let_in(&join, fingerprint, true).await;
                } else if !self.ask_to_join(leader, join).await && !self.up().contains(&leader) {
                    self.look_for(leader).await;
                }
                ASK_INTERVAL
            }
        }
    }

    fn join_request(&self, state: &ClusterState) -> Join {
        let links = self.mesh().links();
        let up = links.iter().filter(|link| link.up).map(|link| link.node);
        Join {
            member: self.inner.member.clone(),
            token: self.inner.token.as_ref().map(|token| token.secret),
            reached: up.filter(|node| state.members.contains_key(node) || state.members.is_empty()).collect(),
        }
    }

    /// A node without a cluster asks those it has met.
    async fn beg(&self) -> Duration {
        let formatted: Vec<Arc<Peer>> =
            lock(&self.inner.acquaintances).values().filter(|peer| peer.cluster.is_some()).cloned().collect();
        let mut pause = ASK_INTERVAL;
        for peer in formatted {
            if let Some(token) = &self.inner.token
                && peer.cluster != Some(token.cluster)
            {
                continue;
            }
            pause = BEG_INTERVAL;
            let join = Join { reached: self.up(), ..self.join_request(&ClusterState::default()) };
            if self.ask_to_join(peer.node, join).await {
                return ASK_INTERVAL;
            }
        }
        pause
    }

    fn up(&self) -> BTreeSet<NodeId> {
        self.mesh().links().into_iter().filter(|link| link.up).map(|link| link.node).collect()
    }

    /// Asks a node, and whom it takes for the leader: after an outage they may take each other for it. Whether this one got on.
    async fn ask_to_join(&self, node: NodeId, join: Join) -> bool {
        let mut asked = node;
        for _ in 0..=REDIRECTS_MAX {
            let Some(Answer::Join(answer)) = self.call(asked, &Request::Join(join.clone()), PATIENCE).await else {
                return false;
            };
            match answer {
                JoinAnswer::NotLeader(Some(leader)) if leader != asked && leader != self.inner.node => {
                    if !self.up().contains(&leader) {
                        self.ask_around(asked).await;
                    }
                    asked = leader;
                }
                answer => return self.heed_join_answer(asked, answer).await,
            }
        }
        false
    }

    /// Does what an answer asks for. Whether this node is in.
    async fn heed_join_answer(&self, node: NodeId, answer: JoinAnswer) -> bool {
        match answer {
            JoinAnswer::Joined { charter, index } => {
                if self.charter().is_none() {
                    // The first thing a newcomer hears of the order: it adopts the cluster that let it in.
                    self.fetch_whole(node, charter).await;
                }
                self.await_index_for(charter, index, PATIENCE).await;
                if let Err(error) = self.save().await {
                    tracing::error!("cannot keep what is known of the cluster: {error}");
                }
                tracing::info!("joined cluster {:016x}", charter.cluster);
                true
            }
            JoinAnswer::Unreached(members) => {
                self.ask_around(node).await;
                let names: Vec<String> = members.iter().map(NodeId::to_string).collect();
                tracing::debug!("coming in needs connections to {} first", names.join(", "));
                false
            }
            JoinAnswer::Refused(reason) => {
                self.tell_refusal(&reason);
                if self.inner.token.is_some() && self.charter().is_none() {
                    self.inner.fatal.send_replace(Some(format!("the cluster does not take this node: {reason}")));
                }
                false
            }
            JoinAnswer::Asking => {
                tracing::debug!("asked to be admitted; on a member: dog node admit {}", self.inner.node);
                false
            }
            JoinAnswer::Later | JoinAnswer::NotLeader(_) => false,
        }
    }

    /// It goes on asking, and says why in vain now and then.
    fn tell_refusal(&self, reason: &str) {
        let now = self.inner.world.clock.monotonic();
        let mut told = lock(&self.inner.refused);
        let is_old =
            told.as_ref().is_none_or(|(last, at)| last != reason || now.saturating_sub(*at) > TELL_REFUSAL_INTERVAL);
        if is_old {
            tracing::warn!("the cluster does not take this node: {reason}");
            *told = Some((reason.to_string(), now));
        }
    }

    pub(super) async fn await_index_for(&self, charter: super::Charter, index: u64, patience: Duration) {
        tokio::select! {
            () = self.await_index(charter, index) => {}
            () = self.inner.world.clock.sleep(patience) => {}
        }
    }

    /// Somebody asks to come in.
    pub(super) async fn answer_join(&self, from: &Peer, join: Join) -> JoinAnswer {
        if join.member.id != from.node || join.member.boot != from.boot {
            return JoinAnswer::Refused("a node can only ask for itself".to_string());
        }
        if self.charter().is_none() {
            return JoinAnswer::Later;
        }
        if self.leading().is_none() {
            return JoinAnswer::NotLeader(self.leader());
        }
        self.let_in(&join, from.fingerprint, from.standing != Standing::Stranger).await
    }

    async fn let_in(&self, join: &Join, fingerprint: Fingerprint, trusted: bool) -> JoinAnswer {
        let _turn = self.inner.joins.lock().await;
        let Some(charter) = self.charter() else { return JoinAnswer::Later };
        let member = &join.member;
        let known = self.state().admission.nodes.get(&member.id).copied();
        match self.admit_joining(join, fingerprint, trusted, known).await {
            Ok(()) => {}
            Err(answer) => return answer,
        }
        let state = self.state();
        if let Some(there) = state.members.get(&member.id) {
            if there.member.boot == member.boot {
                return JoinAnswer::Joined { charter, index: self.index() };
            }
            // The steward takes the earlier process out, or finds that it still runs.
            return JoinAnswer::Later;
        }
        if matches!(state.phase, Phase::Shutdown) {
            return JoinAnswer::Later;
        }
        let unreached = self.unreached(&state, join);
        if !unreached.is_empty() {
            return JoinAnswer::Unreached(unreached);
        }
        tracing::info!("node {} ({}) comes in", member.id, member.peer_endpoint);
        lock(&self.inner.stewardship).let_in(member.id, member.boot, self.now());
        match self.order_at(Command::Join { member: member.clone(), time: self.label() }).await {
            Ok((index, Outcome::Done)) => JoinAnswer::Joined { charter, index },
            Ok((_, Outcome::Refused(Refusal::Waiting))) => JoinAnswer::Later,
            Ok((_, Outcome::Refused(Refusal::EarlierVersion))) => JoinAnswer::Refused(format!(
                "its version understands level {}, and the cluster uses level {}: install the version that the other nodes run",
                member.level,
                self.state().level
            )),
            Ok(outcome) => JoinAnswer::Refused(format!("the order answered {outcome:?}")),
            Err(_) => JoinAnswer::Later,
        }
    }

    /// Members that can be heard here and that the newcomer has not reached.
    fn unreached(&self, state: &ClusterState, join: &Join) -> BTreeSet<NodeId> {
        let present = lock(&self.inner.stewardship).present(self.now());
        let needed = state.members.keys().filter(|node| present.contains(node) && **node != join.member.id);
        needed.filter(|node| !join.reached.contains(node)).copied().collect()
    }

    /// Makes sure that the identity is one of ours, by whatever it has to show.
    async fn admit_joining(
        &self,
        join: &Join,
        fingerprint: Fingerprint,
        trusted: bool,
        known: Option<Fingerprint>,
    ) -> Result<(), JoinAnswer> {
        if known == Some(fingerprint) || self.state().admission.open {
            return Ok(());
        }
        let token = join.token.map(|secret| *blake3::hash(&secret).as_bytes());
        if !trusted && token.is_none() {
            self.note_asking(join, fingerprint);
            return Err(JoinAnswer::Asking);
        }
        let token = if trusted { None } else { token };
        // Nothing a stranger says is ordered unless it can be true.
        if token.is_some_and(|token| !self.state().admission.tokens.contains(&token)) {
            return Err(JoinAnswer::Refused(TOKEN_REFUSED.to_string()));
        }
        let command = Command::Admit { node: join.member.id, fingerprint, token };
        match self.order(command).await {
            Ok(Outcome::Done) => Ok(()),
            Ok(Outcome::Refused(Refusal::TokenUnknown)) => Err(JoinAnswer::Refused(TOKEN_REFUSED.to_string())),
            Ok(Outcome::Refused(Refusal::Banned)) => Err(JoinAnswer::Refused(
                "it was banned; a machine that is to come back needs an empty store directory".to_string(),
            )),
            Ok(Outcome::Refused(Refusal::OtherFingerprint)) => Err(JoinAnswer::Refused(
                "its id is known with another certificate; is the store directory a copy?".to_string(),
            )),
            Ok(_) | Err(_) => Err(JoinAnswer::Later),
        }
    }

    fn note_asking(&self, join: &Join, fingerprint: Fingerprint) {
        let now = self.now();
        let mut asking = lock(&self.inner.asking);
        asking.retain(|_, one| now.saturating_sub(one.at) < ASKING_FOR);
        if asking.len() < ASKING_MAX || asking.contains_key(&join.member.id) {
            let new = asking.insert(join.member.id, Asking { fingerprint, member: join.member.clone(), at: now });
            if new.is_none() {
                tracing::info!("node {} asks to come in, fingerprint {fingerprint}", join.member.id);
            }
        }
    }

    /// Those who ask now.
    pub(super) fn asking(&self) -> Vec<(NodeId, Fingerprint, String)> {
        let now = self.now();
        let asking = lock(&self.inner.asking);
        let recent = asking.iter().filter(|(_, one)| now.saturating_sub(one.at) < ASKING_FOR);
        recent.map(|(node, one)| (*node, one.fingerprint, one.member.peer_endpoint.clone())).collect()
    }

    /// Those who ask now, as far as this node knows.
    pub(super) fn asking_anywhere(&self) -> Vec<(NodeId, Fingerprint, String)> {
        if self.leading().is_some() { self.asking() } else { lock(&self.inner.pulse).asking.clone() }
    }

    /// Whom this node knows, for somebody who is new.
    pub(super) fn known_nodes(&self) -> Vec<Acquaintance> {
        let state = self.state();
        let members = state.members.values().map(|member| (member.member.id, member.member.peer_endpoint.clone()));
        let mut known: Vec<_> = members.collect();
        if self.charter().is_none() {
            for (node, peer) in lock(&self.inner.acquaintances).iter() {
                if let Some(card) = decode::<Card>(&peer.card) {
                    known.push((*node, card.member.peer_endpoint));
                }
            }
        }
        known.into_iter().map(|(node, endpoint)| Acquaintance { node, endpoint }).collect()
    }

    /// Tells the others that this node leaves, and hands its duties on.
    pub(super) async fn say_goodbye(&self) {
        let state = self.state();
        if state.phase == Phase::Shutdown {
            self.linger(&state).await;
            return;
        }
        if !self.is_member(&state) {
            return;
        }
        let command = Command::Evict { nodes: vec![self.inner.node], time: self.label() };
        tokio::select! {
            left = self.order(command) => if let Err(error) = left {
                tracing::warn!("left without saying so: {error}");
            },
            () = self.inner.world.clock.sleep(PATIENCE) => tracing::warn!("left without saying so: no quorum"),
        }
        if let Err(error) = self.save().await {
            tracing::warn!("cannot keep what is known of the cluster: {error}");
        }
        if let Some(consensus) = self.consensus() {
            consensus.shutdown().await;
        }
    }

    /// After a shutdown the leader stays until the others have heard of it: nobody else could tell them.
    async fn linger(&self, state: &ClusterState) {
        let deadline = self.now() + PATIENCE;
        let index = self.index();
        while self.leading().is_some() && self.now() < deadline {
            let links = self.mesh().links();
            let up = |node: &NodeId| links.iter().any(|link| link.node == *node && link.up);
            let waits = state.members.keys().filter(|node| **node != self.inner.node && up(node));
            let told = {
                let stewardship = lock(&self.inner.stewardship);
                waits.into_iter().all(|node| stewardship.has_applied(*node, index))
            };
            if told {
                break;
            }
            self.inner.world.clock.sleep(ASK_INTERVAL).await;
        }
        if let Err(error) = self.save().await {
            tracing::warn!("cannot keep what is known of the cluster: {error}");
        }
        if let Some(consensus) = self.consensus() {
            consensus.shutdown().await;
        }
    }

    /// Where a member can be met.
    pub(super) fn meet_member(&self, node: NodeId) {
        if lock(&self.inner.linked).contains_key(&node) {
            return;
        }
        if let Some(member) = last_known(&self.state(), node) {
            self.mesh().know(node, addresses_of(member));
        }
    }
}
