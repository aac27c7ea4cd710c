//! What operators ask for: admission, bans, tokens, keys, and going on without the majority.

use std::sync::atomic::Ordering;
use std::time::Duration;

use sheep_core::admission::ClusterKey;
use sheep_core::cluster_state::ClusterState;
use sheep_core::command::{Command, Outcome, Refusal};
use sheep_core::member::NodeId;

use super::charter::{Charter, Era};
use super::messages::{Answer, Newest, Request};
use super::token::{ADDRESSES_MAX, Token};
use super::{EVICT, Quorum, addresses_of, lock};
use crate::cluster::administration::{Administration, AdministrationError};

/// How long the order may take: without a quorum, people must get an answer.
const PATIENCE: Duration = Duration::from_secs(10);
/// A quorum that was heard within this may only be electing a leader, or letting this node in again.
const GIVEN_UP: Duration = EVICT;

impl Quorum {
    pub(super) async fn carry_out(&self, request: Administration) -> Result<String, AdministrationError> {
        if self.charter().is_none() {
            return Err(AdministrationError::NotNow(
                "the cluster was not formatted yet; do that first: dog cluster format".to_string(),
            ));
        }
        match request {
            Administration::Admit { node } => self.admit(&node).await,
            Administration::Ban { node } => self.ban(&node).await,
            Administration::Token => self.make_token().await,
            Administration::RotateKey => self.rotate_key().await,
            Administration::ShowKey => Ok(self.present_key()?.to_text()),
            Administration::RecoverForce => self.recover_force().await,
        }
    }

    /// As `order`, but with a deadline and only good outcomes.
    async fn decree(&self, command: Command) -> Result<(), AdministrationError> {
        let outcome = tokio::select! {
            outcome = self.order(command) => outcome?,
            () = self.inner.world.clock.sleep(PATIENCE) => {
                return Err(AdministrationError::NotNow(
                    "no quorum: the cluster cannot decide anything now; see `dog cluster info`".to_string(),
                ));
            }
        };
        match outcome {
            Outcome::Refused(Refusal::Banned) => Err(AdministrationError::NotNow(
                "this identity was banned; it needs an empty store directory".to_string(),
            )),
            Outcome::Refused(Refusal::OtherFingerprint) => Err(AdministrationError::NotNow(
                "a node of this id is known with another certificate; is its store directory a copy?".to_string(),
            )),
            Outcome::Refused(refusal) => Err(AdministrationError::NotNow(format!(
                "the cluster refused it ({refusal:?}); was it changed meanwhile?"
            ))),
            _ => Ok(()),
        }
    }

    async fn admit(&self, text: &str) -> Result<String, AdministrationError> {
        let mut asking = self.asking();
        if let Some(leader) = self.leader().filter(|leader| *leader != self.inner.node)
            && let Some(Answer::Asking(theirs)) = self.call(leader, &Request::Asking, PATIENCE / 2).await
        {
            asking.extend(theirs);
        }
        let mut fitting: Vec<_> =
            asking.into_iter().filter(|(node, _, _)| node.to_string().starts_with(text)).collect();
        fitting.sort_by_key(|(node, _, _)| *node);
        fitting.dedup_by_key(|(node, _, _)| *node);
        let (node, fingerprint, _) = only(text, fitting, "asks to come in")?;
        self.decree(Command::Admit { node, fingerprint, token: None }).await?;
        Ok(node.to_string())
    }

    async fn ban(&self, text: &str) -> Result<String, AdministrationError> {
        let state = self.state();
        let fitting: Vec<NodeId> =
            state.admission.nodes.keys().copied().filter(|node| node.to_string().starts_with(text)).collect();
        let node = only(text, fitting, "was ever let in")?;
        if node == self.inner.node {
            return Err(AdministrationError::NotNow("a node cannot ban itself; ask another one (dog -a)".to_string()));
        }
        let key = self.next_key()?;
        self.decree(Command::Ban { node, key }).await?;
        // It hears nothing good any more; the leader takes it out as soon as its last lease is over.
        self.save().await?;
        Ok(node.to_string())
    }

    async fn make_token(&self) -> Result<String, AdministrationError> {
        let state = self.state();
        self.present_key()?;
        let charter = self.charter().ok_or_else(|| AdministrationError::NotNow("not formatted".to_string()))?;
        let secret = self.new_key(0).secret;
        self.decree(Command::OfferToken { hash: *blake3::hash(&secret).as_bytes() }).await?;
        let own = state.members.get(&self.inner.node).into_iter();
        let members = own.chain(state.members.values().filter(|member| member.member.id != self.inner.node));
        let addresses = members.filter_map(|member| addresses_of(&member.member).first().copied());
        let token = Token { cluster: charter.cluster, secret, addresses: addresses.take(ADDRESSES_MAX).collect() };
        Ok(token.to_text())
    }

    async fn rotate_key(&self) -> Result<String, AdministrationError> {
        let key = self.next_key()?;
        let generation = key.generation;
        self.decree(Command::RotateKey { key }).await?;
        self.save().await?;
        Ok(generation.to_string())
    }

    fn present_key(&self) -> Result<ClusterKey, AdministrationError> {
        self.state().admission.key.clone().ok_or_else(|| {
            AdministrationError::NotNow("an open cluster has no key: any node of the network may come in".to_string())
        })
    }

    fn next_key(&self) -> Result<ClusterKey, AdministrationError> {
        Ok(self.new_key(self.present_key()?.generation + 1))
    }

    /// Begins a new era of the order from the newest state that anybody here has.
    async fn recover_force(&self) -> Result<String, AdministrationError> {
        if self.has_quorum() {
            // With a quorum, only what the missing members may know of the data is given up.
            self.decree(Command::ForceRecover { time: self.label() }).await?;
            return Ok("forced".to_string());
        }
        let heard = lock(&self.inner.pulse).answered.unwrap_or(self.inner.started);
        if self.now().saturating_sub(heard) < GIVEN_UP {
            return Err(AdministrationError::NotNow(
                "a quorum was heard a moment ago, or this node has only just started: wait some seconds and look again with `dog \
                 cluster info`"
                    .to_string(),
            ));
        }
        let ours = self.charter().ok_or_else(|| AdministrationError::NotNow("not formatted".to_string()))?;
        let mut newest = {
            let position = lock(&self.inner.position);
            Newest { charter: ours, index: position.index, machine: position.machine.clone(), has_quorum: false }
        };
        for link in self.mesh().links().into_iter().filter(|link| link.up) {
            let answer = self.call(link.node, &Request::Newest, PATIENCE / 5).await;
            let Some(Answer::Newest(Some(theirs))) = answer else { continue };
            if theirs.charter.cluster != ours.cluster {
                continue;
            }
            if theirs.has_quorum {
                return Err(AdministrationError::NotNow(format!(
                    "node {} can be reached and has a quorum: nothing has to be given up; see what keeps this node out with                      `dog cluster info`",
                    link.node
                )));
            }
            if (theirs.charter.era, theirs.index) > (newest.charter.era, newest.index) {
                newest = *theirs;
            }
        }
        // An attempt that came to nothing may have left something behind.
        let number = newest.charter.era.number.max(self.inner.era_begun.load(Ordering::Acquire)) + 1;
        self.inner.era_begun.store(number, Ordering::Release);
        let era = Era { number, founder: self.inner.node };
        let charter = Charter { cluster: ours.cluster, era };
        tracing::warn!("an operator goes on without the majority: era {}, from index {}", era.number, newest.index);
        let mut state = ClusterState::clone(&newest.machine.state);
        let links = self.mesh().links();
        let here = |node: &NodeId| *node == self.inner.node || links.iter().any(|link| link.node == *node && link.up);
        let gone: Vec<NodeId> = state.members.keys().copied().filter(|node| !here(node)).collect();
        state.begin_era(&gone, self.label());
        self.begin_order(charter, state).await.map_err(AdministrationError::Order)?;
        self.save().await?;
        Ok("forced".to_string())
    }
}

/// The one that fits.
fn only<T>(text: &str, mut fitting: Vec<T>, what: &str) -> Result<T, AdministrationError> {
    match (fitting.pop(), fitting.len()) {
        (Some(one), 0) => Ok(one),
        (None, _) => Err(AdministrationError::NoSuchNode(format!(
            "no node whose id begins with '{text}' {what}; see `dog node list`"
        ))),
        _ => Err(AdministrationError::NoSuchNode(format!("several nodes' ids begin with '{text}'; give more of it"))),
    }
}
