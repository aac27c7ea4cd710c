//! Connections between nodes: who is there, whether it may come in, requests and answers, and connections for objects.
//!
//! Bytes only: what requests mean is the [`Service`]'s business, who may come in the [`Trust`]'s.

pub mod identity;
mod types;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheep_core::member::NodeId;
use tokio::sync::mpsc;

pub use identity::Identity;
pub use sheep_core::node_handshake::{Channel, Rejection};
pub use types::{
    ContactError, Direction, Event, GossipSecret, LinkReport, MeshConfig, MeshTiming, Peer, Reach, Rtt, Service,
    Standing, Trust, Unreachable,
};

use crate::world::World;
use crate::world::net::Connection;

/// The largest body of a request or an answer: a snapshot of the ordered state.
pub const BODY_BYTES_MAX: usize = 32 << 20;

/// A node's connections.
pub struct Mesh {}

impl Mesh {
    /// Listens, and gives the handle and what happens.
    pub async fn start(
        _world: World,
        _config: MeshConfig,
        _identity: Identity,
        _trust: Arc<dyn Trust>,
        _service: Arc<dyn Service>,
    ) -> io::Result<(Arc<Mesh>, mpsc::Receiver<Event>)> {
        std::future::ready(()).await;
        Ok((Arc::new(Mesh {}), mpsc::channel(1).1))
    }

    /// Where it listens.
    pub fn local(&self) -> Vec<SocketAddr> {
        Vec::new()
    }

    /// Keeps a control link to a node from now on; again with other addresses: those count from the next attempt on.
    pub fn know(&self, _node: NodeId, _addresses: Vec<SocketAddr>) {}

    /// Keeps no link to this node any more.
    pub fn forget(&self, _node: NodeId) {}

    /// Judges every connection again and cuts those whose standing is another one now.
    pub fn reconsider(&self) {}

    /// Says hello at an address once.
    pub async fn contact(&self, _address: SocketAddr) -> Result<Arc<Peer>, ContactError> {
        std::future::pending().await
    }

    /// Asks a known node.
    pub async fn call(&self, _node: NodeId, _message: Vec<u8>, _patience: Duration) -> Result<Bytes, Unreachable> {
        std::future::ready(Err(Unreachable)).await
    }

    /// Asks whoever is at an address, over a connection of its own.
    pub async fn call_at(
        &self,
        _address: SocketAddr,
        _message: Vec<u8>,
        _patience: Duration,
    ) -> Result<(Arc<Peer>, Bytes), ContactError> {
        std::future::pending().await
    }

    /// Looks with fresh connections whether a known node is there.
    pub async fn probe(&self, _node: NodeId, _patience: Duration) -> Reach {
        std::future::ready(Reach::Silent).await
    }

    /// The control links, by node.
    pub fn links(&self) -> Vec<LinkReport> {
        Vec::new()
    }

    /// A new connection for objects.
    pub async fn dial_data(&self, _node: NodeId) -> io::Result<Connection> {
        std::future::pending().await
    }

    /// Accepted connections for objects; to be taken once.
    pub fn data_connections(&self) -> mpsc::Receiver<(NodeId, Connection)> {
        mpsc::channel(1).1
    }

    /// Accepted connections of clients that proved the key; to be taken once.
    pub fn client_connections(&self) -> mpsc::Receiver<Connection> {
        mpsc::channel(1).1
    }

    /// Secrets for gossip; to be taken once.
    pub fn secrets(&self) -> mpsc::UnboundedReceiver<GossipSecret> {
        mpsc::unbounded_channel().1
    }
}
