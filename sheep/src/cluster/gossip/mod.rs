//! Who seems to be alive: SWIM gossip over UDP, sealed with keys that the mesh agreed on.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use sheep_core::member::NodeId;
use tokio::sync::mpsc;

use crate::world::World;

/// What gossip believes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum GossipEvent {
    /// This process of the node answers.
    Alive {
        /// The node.
        node: NodeId,
        /// The process life.
        boot: u64,
    },
    /// This process of the node does not answer any more, or says that it goes.
    Down {
        /// The node.
        node: NodeId,
        /// The process life.
        boot: u64,
    },
}

/// What a secret is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Direction {
    /// For packets to the peer.
    Sending,
    /// For packets from the peer.
    Receiving,
}

/// Counters since the start.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct GossipStats {
    /// Packets handed to the network.
    pub packets_sent: u64,
    /// Their bytes, without IP and UDP headers.
    pub bytes_sent: u64,
    /// Packets that came and were accepted.
    pub packets_received: u64,
    /// Their bytes.
    pub bytes_received: u64,
    /// Refused: no key for this sender and key id (a stranger, or an old key).
    pub refused_unknown_key: u64,
    /// Refused: not sealed with the key it names (tampered).
    pub refused_bad_seal: u64,
    /// Refused: came before, or too old to tell.
    pub refused_replayed: u64,
    /// Refused: not in our form.
    pub refused_malformed: u64,
    /// Not sent: no key or no socket for the peer.
    pub unsendable: u64,
    /// Not read: came faster than they could be handled.
    pub overrun: u64,
}

/// This node's part in the gossip.
pub struct Gossip {}

impl Gossip {
    /// Binds the sockets and starts. Nothing is sent before [`Gossip::introduce`].
    pub async fn start(
        _world: World,
        _node: NodeId,
        _boot: u64,
        _listen: Vec<SocketAddr>,
    ) -> io::Result<(Arc<Gossip>, mpsc::Receiver<GossipEvent>)> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Where it listens, with the ports that were really taken.
    pub fn addresses(&self) -> &[SocketAddr] {
        &[]
    }

    /// Takes a secret that the mesh agreed on with a peer; the two latest per direction count. One secret must serve
    /// one direction only.
    pub fn install(&self, _peer: NodeId, _direction: Direction, _secret: [u8; 32]) {}

    /// Makes the peer's acquaintance, and again after every new connection to it. Gossip about nodes that were never
    /// introduced is not believed.
    pub fn introduce(&self, _peer: NodeId, _boot: u64, _address: SocketAddr) {}

    /// Ends the acquaintance: its keys and its state go; no event tells of it.
    pub fn forget(&self, _peer: NodeId) {}

    /// Tells the others that this process goes, and stops.
    pub async fn leave(&self) {}

    /// The counters.
    pub fn stats(&self) -> GossipStats {
        GossipStats::default()
    }
}
