//! Connections between nodes: who is there, whether it may come in, requests and answers, and connections for objects.
//!
//! Bytes only: what requests mean is the [`Service`]'s business, who may come in the [`Trust`]'s. Each side dials its own
//! control connection for its own requests.
//!
//! | file | owns |
//! |---|---|
//! | `types` | what the mesh and its user say to each other |
//! | [`identity`] | this node's certificate and key |
//! | `tls`, `handshake` | from a fresh connection to a known peer |
//! | [`frame`], `control` | requests, answers and pings on a control connection |
//! | `link` | the kept link to one node, and what it tells of that node |
//! | `port` | listening |
//! | `live`, `refusals`, `shared` | what may be cut, what was logged, what all of them need |
//!
//! Always holds:
//! 1. Nothing that another side sends makes this side hold more than it has decided to: messages, handshakes, requests and
//!    strangers are counted.
//! 2. A call on a link that breaks ends at once with [`Unreachable`], which says nothing about what the other side did.
//!
//! A connection that fails is dropped; a kept link is made anew, forever.

mod control;
pub mod frame;
mod handshake;
pub mod identity;
mod link;
mod live;
mod port;
mod refusals;
mod shared;
#[cfg(test)]
mod tests;
mod tls;
mod types;

use std::io;
use std::net::SocketAddr;
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use sheep_core::member::NodeId;
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

pub use frame::BODY_BYTES_MAX;
pub use identity::Identity;
pub use sheep_core::node_handshake::{Channel, Rejection};
pub use types::{
    ContactError, Direction, Event, GossipSecret, LinkReport, MeshConfig, MeshTiming, Peer, Reach, Rtt, Service,
    Standing, Trust, Unreachable,
};

use crate::world::World;
use crate::world::net::{Connection, Endpoint};
use handshake::{Myself, within};
use link::{Slot, Slots};
use live::{Live, Shown};
use port::Port;
use refusals::Refusals;
use shared::Shared;

/// Events that wait to be taken.
const EVENTS_MAX: usize = 1024;
/// Accepted connections that wait to be taken.
const ACCEPTED_MAX: usize = 64;

/// A node's connections. They end when it is dropped, except those that were handed out.
pub struct Mesh {
    shared: Arc<Shared>,
    local: Vec<SocketAddr>,
    slots: Mutex<Slots>,
    listening: Vec<JoinHandle<()>>,
    data: Mutex<Option<mpsc::Receiver<(NodeId, Connection)>>>,
    clients: Mutex<Option<mpsc::Receiver<Connection>>>,
    secrets: Mutex<Option<mpsc::UnboundedReceiver<GossipSecret>>>,
}

impl Mesh {
    /// Listens, and gives the handle and what happens.
    pub async fn start(
        world: World,
        config: MeshConfig,
        identity: Identity,
        trust: Arc<dyn Trust>,
        service: Arc<dyn Service>,
    ) -> io::Result<(Arc<Mesh>, mpsc::Receiver<Event>)> {
        let mut listeners = Vec::with_capacity(config.listen.len());
        let mut local = Vec::with_capacity(config.listen.len());
        for address in &config.listen {
            let listener = world.net.listen(&Endpoint::Tcp(*address)).await?;
            if let Endpoint::Tcp(address) = listener.local() {
                local.push(address);
            }
            listeners.push(listener);
        }
        let (events, events_receiver) = mpsc::channel(EVENTS_MAX);
        let (secrets, secrets_receiver) = mpsc::unbounded_channel();
        let (data, data_receiver) = mpsc::channel(ACCEPTED_MAX);
        let (clients, clients_receiver) = mpsc::channel(ACCEPTED_MAX);
        let refusals = Refusals::new(world.clock.clone());
        let myself = Myself {
            addresses: announced(&config.addresses, &local),
            world,
            node: config.node,
            boot: config.boot,
            timing: config.timing,
            tls: tls::Tls::new(&identity)?,
            trust,
            met_oneself: AtomicBool::new(false),
        };
        let shared = Arc::new(Shared { myself, service, live: Arc::new(Live::default()), refusals, events, secrets });
        let port = Arc::new(Port::new(shared.clone(), data, clients));
        let listening = listeners.into_iter().map(|listener| tokio::spawn(port.clone().listen(listener))).collect();
        let mesh = Mesh {
            shared,
            local,
            slots: Mutex::default(),
            listening,
            data: Mutex::new(Some(data_receiver)),
            clients: Mutex::new(Some(clients_receiver)),
            secrets: Mutex::new(Some(secrets_receiver)),
        };
        Ok((Arc::new(mesh), events_receiver))
    }

    /// Where it listens, with the ports that were really taken.
    pub fn local(&self) -> Vec<SocketAddr> {
        self.local.clone()
    }

    /// Keeps a control link to a node from now on. Called again with other addresses, those count from the next attempt on;
    /// one that waits begins at once.
    pub fn know(&self, node: NodeId, addresses: Vec<SocketAddr>) {
        if node == self.shared.myself.node {
            return;
        }
        let mut slots = self.lock_slots();
        match slots.get(&node) {
            Some(slot) => slot.set_addresses(addresses),
            None => {
                slots.insert(node, Slot::start(self.shared.clone(), node, addresses));
            }
        }
    }

    /// Keeps no link to this node any more; calls that wait for it end. No event tells of it.
    pub fn forget(&self, node: NodeId) {
        self.lock_slots().remove(&node);
    }

    /// Judges every connection again and cuts those whose standing would be another one now. To be called whenever the
    /// answers of the [`Trust`] may have changed: after format, an admission, a ban, a new key. Kept links come up again by
    /// themselves, with `Up` and, if that worked at once, without `Down`.
    pub fn reconsider(&self) {
        self.shared.live.reconsider(&*self.shared.myself.trust);
    }

    /// Cuts every connection with one node, those for objects too: they are made anew at once where that works.
    pub fn cut_off(&self, node: NodeId) {
        self.shared.live.cut_off(node);
    }

    /// Whether a connection with this very process is open, whoever made it.
    pub fn is_connected_with(&self, node: NodeId, boot: u64) -> bool {
        self.shared.live.has_one_with(node, boot)
    }

    /// Says hello at an address once. Who is there is also told as [`Event::Met`].
    pub async fn contact(&self, address: SocketAddr) -> Result<Arc<Peer>, ContactError> {
        let mut established = self.shared.dial(address, Channel::Control, false).await?;
        let peer = established.peer;
        let myself = &self.shared.myself;
        let closing = established.connection.writer.shutdown();
        // A polite end; the connection is dropped in any case.
        let _ = within(&myself.world, myself.timing.dial, closing, "").await;
        self.shared.mention(Event::Met(peer.clone()));
        Ok(peer)
    }

    /// Asks a known node and waits for its answer; waits for the link first if it is down, all within `patience`.
    pub async fn call(&self, node: NodeId, message: Vec<u8>, patience: Duration) -> Result<Bytes, Unreachable> {
        let mut state = self.lock_slots().get(&node).ok_or(Unreachable)?.watch();
        let asking = async {
            let up = state.wait_for(|state| state.link.is_some()).await;
            let link = up.map_err(|_| Unreachable)?.link.clone();
            link.ok_or(Unreachable)?.call(message).await
        };
        within(&self.shared.myself.world, patience, asking, "").await.map_err(|_| Unreachable)?
    }

    /// Asks whoever is at an address, over a connection of its own.
    pub async fn call_at(
        &self,
        address: SocketAddr,
        message: Vec<u8>,
        patience: Duration,
    ) -> Result<(Arc<Peer>, Bytes), ContactError> {
        let asking = async {
            let established = self.shared.dial(address, Channel::Control, false).await?;
            let (link, runner) = self.shared.wrap(established, address);
            tokio::select! {
                biased;
                answer = link.call(message) => {
                    let answer = answer.map_err(|_| io::Error::from(io::ErrorKind::ConnectionAborted))?;
                    Ok((link.peer.clone(), answer))
                }
                ended = runner.run() => {
                    ended?;
                    Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
                }
            }
        };
        within(&self.shared.myself.world, patience, asking, "the node did not answer in time").await?
    }

    /// Looks with fresh connections, to all its addresses at the same time, whether a known node is there.
    pub async fn probe(&self, node: NodeId, patience: Duration) -> Reach {
        let Some(addresses) = self.lock_slots().get(&node).map(Slot::addresses) else { return Reach::Silent };
        let looking = self.shared.clone().probe(node, addresses);
        within(&self.shared.myself.world, patience, looking, "").await.unwrap_or(Reach::Silent)
    }

    /// The kept control links, by node.
    pub fn links(&self) -> Vec<LinkReport> {
        self.lock_slots().iter().map(|(node, slot)| slot.report(*node)).collect()
    }

    /// A new connection for objects to a known node, by the first of its addresses that works. No node takes one from a
    /// stranger.
    pub async fn dial_data(&self, node: NodeId) -> io::Result<Connection> {
        let unknown = || io::Error::new(io::ErrorKind::NotFound, "no address of this node is known");
        let addresses = self.lock_slots().get(&node).map(Slot::addresses).ok_or_else(unknown)?;
        let mut last = unknown();
        for address in addresses {
            match self.shared.dial_node(node, address, Channel::Data, false).await {
                Ok(established) => {
                    let shown = Shown {
                        peer: Some(established.peer),
                        proved: established.proved,
                        is_plain: established.is_plain,
                    };
                    return Ok(self.shared.live.add(established.connection, shown).0);
                }
                Err(ContactError::Io(error)) => last = error,
                Err(ContactError::Rejected(rejection)) => {
                    last = io::Error::new(io::ErrorKind::PermissionDenied, rejection);
                }
            }
        }
        Err(last)
    }

    /// Accepted connections for objects, each with the node that dialed it. To be taken once; later takers get nothing.
    pub fn data_connections(&self) -> mpsc::Receiver<(NodeId, Connection)> {
        take(&self.data).unwrap_or_else(|| mpsc::channel(1).1)
    }

    /// Accepted connections of clients that proved the key. To be taken once; later takers get nothing.
    pub fn client_connections(&self) -> mpsc::Receiver<Connection> {
        take(&self.clients).unwrap_or_else(|| mpsc::channel(1).1)
    }

    /// Secrets for gossip, one of each control link that came up with a member or keyholder. To be taken once; later takers
    /// get nothing.
    pub fn secrets(&self) -> mpsc::UnboundedReceiver<GossipSecret> {
        take(&self.secrets).unwrap_or_else(|| mpsc::unbounded_channel().1)
    }

    fn lock_slots(&self) -> std::sync::MutexGuard<'_, Slots> {
        self.slots.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Drop for Mesh {
    fn drop(&mut self) {
        self.listening.iter().for_each(JoinHandle::abort);
    }
}

fn take<T>(place: &Mutex<Option<T>>) -> Option<T> {
    place.lock().unwrap_or_else(PoisonError::into_inner).take()
}

/// What others are told; see [`MeshConfig::addresses`].
fn announced(configured: &[SocketAddr], local: &[SocketAddr]) -> Vec<SocketAddr> {
    let port = local.first().map_or(0, SocketAddr::port);
    let mut addresses = if configured.is_empty() { local.to_vec() } else { configured.to_vec() };
    for address in &mut addresses {
        if address.port() == 0 {
            address.set_port(port);
        }
    }
    addresses.truncate(sheep_core::node_handshake::ADDRESSES_MAX);
    addresses
}
