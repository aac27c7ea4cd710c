//! Proof of death: a refused connection, seen on two paths.
//!
//! When a process ends, its machine's kernel resets its connections and refuses new ones: that costs milliseconds, where silence
//! costs seconds. One refusal may be a firewall's; so somebody else has to find the same before a member is evicted for it, and a
//! process that keeps or makes a connection from its side is not dead, whatever its address says. A firewall that resets *every*
//! connection of a living host, in both directions and for two others at once, cannot be told from a death.

use std::time::Duration;

use sheep_core::member::NodeId;
use tokio::sync::mpsc;

use super::messages::{Answer, Card, Found, Request, decode, encode};
use super::{Quorum, lock};
use crate::cluster::gossip::GossipEvent;
use crate::cluster::mesh::{Event, Peer, Reach};
use crate::world::marks::{self, Mark};
use std::sync::Arc;

/// How long somebody may take to find out whether an address refuses connections.
const PROBE_PATIENCE: Duration = Duration::from_millis(300);
/// How long a process whose connections were cut has to make one from its side, and the kernel of a dead one to end what it had.
const RECONNECTING: Duration = Duration::from_millis(40);
/// How many others are asked at once what they find.
const WITNESSES: usize = 3;

impl Quorum {
    pub(super) async fn follow_events(self, mut events: mpsc::Receiver<Event>) {
        while let Some(event) = events.recv().await {
            match event {
                Event::Up(peer) => self.come_up(&peer),
                Event::Met(peer) => self.met(&peer),
                Event::Down { node, refused } => {
                    // What was sent over the other connections would be sent again by TCP only seconds after the network is back.
                    self.mesh().cut_off(node);
                    self.lost_sight(node);
                    if refused {
                        tokio::spawn(self.clone().refused(node));
                    }
                }
                Event::Rejected { address, rejection } => {
                    tracing::debug!("{address} and this node do not go together: {rejection}");
                }
            }
        }
    }

    /// Gossip thinks that a process is gone: somebody should look.
    pub(super) async fn follow_rumours(self, mut rumours: mpsc::Receiver<GossipEvent>) {
        while let Some(rumour) = rumours.recv().await {
            match rumour {
                GossipEvent::Alive { node, boot } => {
                    tracing::debug!("gossip: node {node} (process {boot:016x}) is there");
                }
                GossipEvent::Down { node, boot } => {
                    tracing::debug!("gossip: node {node} (process {boot:016x}) is not there");
                    tokio::spawn(self.clone().refused(node));
                }
            }
        }
    }

    fn come_up(&self, peer: &Arc<Peer>) {
        self.met(peer);
        let Some(card) = decode::<Card>(&peer.card) else { return };
        if let Some(charter) = card.charter {
            let quorum = self.clone();
            tokio::spawn(async move { quorum.yield_to(charter).await });
        }
        if let Some(address) = peer.addresses.first() {
            self.gossip().introduce(peer.node, peer.boot, *address);
        }
        // A link that comes up with another process at its end: the earlier one is gone.
        let state = self.state();
        if let Some(member) = state.members.get(&peer.node).filter(|member| member.member.boot != peer.boot)
            && self.leading().is_some()
        {
            let (quorum, node, boot, other) = (self.clone(), peer.node, member.member.boot, peer.boot);
            tokio::spawn(async move { quorum.examine(node, boot, Some(other)).await });
        }
    }

    /// Nobody listens where a member was.
    async fn refused(self, node: NodeId) {
        let state = self.state();
        let Some(member) = state.members.get(&node) else { return };
        let boot = member.member.boot;
        if self.leading().is_some() {
            if is_gone(self.probe(node, boot).await, boot) && self.confirmed_by_another(node, boot).await {
                tracing::warn!("node {node} is dead: its address refuses connections");
                self.bury(node, boot);
            }
            return;
        }
        match self.leader().filter(|leader| *leader != self.inner.node) {
            Some(leader) if leader != node => {
                let _ = self.call(leader, &Request::Suspect { node, boot }, PROBE_PATIENCE).await;
            }
            _ => self.succeed(node, boot).await,
        }
    }

    /// The leader seems dead. If another node finds so too, its voters elect the next one at once.
    async fn succeed(&self, node: NodeId, boot: u64) {
        let Some(consensus) = self.consensus() else { return };
        let voters = consensus.voters();
        if !voters.contains(&self.inner.node) || !is_gone(self.probe(node, boot).await, boot) {
            return;
        }
        if voters.len() > 2 && !self.confirmed_by_another(node, boot).await {
            return;
        }
        marks::hit(Mark::LeaderDied);
        tracing::warn!("node {node}, which led the order, is dead: electing another leader");
        // Every voter that finds so stands: one that stands itself does not hold the others' votes up, as one that still
        // believes in the dead leader would.
        consensus.elect_now().await;
    }

    /// Somebody else told that a member's process is gone; only the leader cares.
    pub(super) async fn suspect(&self, node: NodeId, boot: u64) {
        let state = self.state();
        let same = state.members.get(&node).is_some_and(|member| member.member.boot == boot);
        // The one who told it is the second path.
        if same && self.leading().is_some() && is_gone(self.probe(node, boot).await, boot) {
            tracing::warn!("node {node} is dead: two nodes find that its address refuses connections");
            self.bury(node, boot);
        }
    }

    /// Looks whether a process is there.
    pub(super) async fn probe(&self, node: NodeId, boot: u64) -> Found {
        match self.mesh().probe(node, PROBE_PATIENCE).await {
            Reach::Silent => Found::Silent,
            Reach::Alive { boot: there } if there == boot => Found::Alive(boot),
            found => {
                self.inner.world.clock.sleep(RECONNECTING).await;
                match found {
                    _ if self.mesh().is_connected_with(node, boot) => Found::Alive(boot),
                    Reach::Alive { boot: there } => Found::Alive(there),
                    _ => Found::Refused,
                }
            }
        }
    }

    /// Whether another member finds the process gone. With nobody else to ask, one's own word has to do.
    pub(super) async fn confirmed_by_another(&self, node: NodeId, boot: u64) -> bool {
        let state = self.state();
        let links = self.mesh().links();
        let up = |other: &&NodeId| links.iter().any(|link| link.node == **other && link.up);
        let others: Vec<NodeId> = state
            .members
            .keys()
            .filter(|other| **other != node && **other != self.inner.node)
            .filter(up)
            .copied()
            .collect();
        if others.is_empty() {
            return state.members.len() <= 2 && is_gone(self.probe(node, boot).await, boot);
        }
        let (sender, mut answers) = mpsc::channel(WITNESSES);
        for other in others.into_iter().take(WITNESSES) {
            let (quorum, sender) = (self.clone(), sender.clone());
            tokio::spawn(async move {
                let answer = quorum.call(other, &Request::Probe { node, boot }, PROBE_PATIENCE * 2).await;
                let gone = matches!(answer, Some(Answer::Probe(found)) if is_gone(found, boot));
                // Whoever asked may have heard enough.
                let _ = sender.send(gone).await;
            });
        }
        drop(sender);
        while let Some(gone) = answers.recv().await {
            if gone {
                return true;
            }
        }
        false
    }

    /// Asks another node; `None` if it cannot be reached in time or does not make sense.
    pub(super) async fn call(&self, node: NodeId, request: &Request, patience: Duration) -> Option<Answer> {
        let answer = self.mesh().call(node, encode(request), patience).await.ok()?;
        decode(&answer)
    }

    fn lost_sight(&self, node: NodeId) {
        let removed = lock(&self.inner.acquaintances).remove(&node);
        if removed.is_some_and(|peer| peer.cluster.is_none()) {
            self.show_acquaintances();
        }
    }
}

fn is_gone(found: Found, boot: u64) -> bool {
    match found {
        Found::Refused => true,
        Found::Alive(there) => there != boot,
        Found::Silent => false,
    }
}
