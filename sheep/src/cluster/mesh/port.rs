//! The node port: takes connections, shakes hands, and hands each to where it belongs.
//!
//! Always holds:
//! 1. At most [`UNFINISHED_MAX`] handshakes are under way, [`UNFINISHED_EACH_MAX`] with one address, and
//!    [`STRANGERS_MAX`] connections of strangers are open; what comes beyond is hung up on.
//! 2. When the accepting task ends, every control connection that it took ends with it.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sheep_core::member::NodeId;
use sheep_core::node_handshake::Channel;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

use super::control::serve;
use super::handshake::{Established, Refusal};
use super::live::Shown;
use super::shared::Shared;
use super::types::{Direction, Event, Peer, Standing};
use crate::world::net::{Connection, Listener};

/// Handshakes under way.
const UNFINISHED_MAX: usize = 256;
/// Of them with one address: many sheep may run on one machine, but one that only opens connections leaves room.
const UNFINISHED_EACH_MAX: usize = 64;
/// Control connections of nodes that have shown nothing.
const STRANGERS_MAX: usize = 64;
/// After an error of accepting (no descriptors left), before the next attempt.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// What the listening sockets share.
pub(super) struct Port {
    pub shared: Arc<Shared>,
    pub data: mpsc::Sender<(NodeId, Connection)>,
    pub clients: mpsc::Sender<Connection>,
    unfinished: Mutex<Unfinished>,
    strangers: Semaphore,
}

#[derive(Default)]
struct Unfinished {
    count: usize,
    by_address: BTreeMap<Option<IpAddr>, usize>,
}

/// Counts one handshake until dropped.
struct Slot<'a> {
    port: &'a Port,
    ip: Option<IpAddr>,
}

impl Port {
    /// Nothing taken yet.
    pub fn new(
        shared: Arc<Shared>,
        data: mpsc::Sender<(NodeId, Connection)>,
        clients: mpsc::Sender<Connection>,
    ) -> Port {
        Port { shared, data, clients, unfinished: Mutex::default(), strangers: Semaphore::new(STRANGERS_MAX) }
    }

    /// Takes connections without end.
    pub async fn listen(self: Arc<Self>, listener: Box<dyn Listener>) {
        let mut connections = JoinSet::new();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                Some(_) = connections.join_next() => continue,
            };
            match accepted {
                Ok(connection) => {
                    connections.spawn(self.clone().take(connection));
                }
                Err(error) => {
                    self.shared.refusals.warn(None, format_args!("cannot take a connection of a node: {error}"));
                    self.shared.myself.world.clock.sleep(ACCEPT_PAUSE).await;
                }
            }
        }
    }

    async fn take(self: Arc<Self>, connection: Connection) {
        let place = connection.peer.clone();
        let address: Option<SocketAddr> = place.parse().ok();
        let ip = address.map(|address| address.ip());
        let Some(slot) = self.begin(ip) else {
            let text = format_args!("hung up on {place}: too many handshakes are under way");
            self.shared.refusals.warn(ip, text);
            return;
        };
        let result = self.shared.myself.accept(connection).await;
        drop(slot);
        match result {
            Ok(established) => self.dispatch(established, &place, ip).await,
            Err(Refusal::Oneself) => tracing::debug!("the connection from {place} is this node's own"),
            // Somebody only looked whether anybody listens.
            Err(Refusal::Io(error)) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                tracing::debug!("the connection from {place} ended before anything was said: {error}");
            }
            Err(refusal) => {
                self.shared.refusals.warn(ip, format_args!("refused the connection from {place}: {refusal}"));
                if let (Some(address), Refusal::ByUs { rejection, .. } | Refusal::ByThem { rejection, .. }) =
                    (address, refusal)
                {
                    self.shared.mention(Event::Rejected { address, rejection });
                }
            }
        }
    }

    async fn dispatch(&self, established: Established<Option<Arc<Peer>>>, place: &str, ip: Option<IpAddr>) {
        let shown =
            Shown { peer: established.peer.clone(), proved: established.proved, is_plain: established.is_plain };
        let (connection, _) = self.shared.live.add(established.connection, shown);
        let delivered = match (established.channel, established.peer) {
            (Channel::Client, _) => self.clients.try_send(connection).is_ok(),
            (Channel::Data, Some(peer)) => self.data.try_send((peer.node, connection)).is_ok(),
            (Channel::Control, Some(peer)) => {
                let secret = established.kept.then_some(established.gossip_secret);
                self.control(connection, peer, secret, place, ip).await;
                true
            }
            // A handshake without a peer is a client's.
            (Channel::Data | Channel::Control, None) => false,
        };
        if !delivered {
            let text = format_args!("hung up on {place}: too many of its connections wait to be served");
            self.shared.refusals.warn(ip, text);
        }
    }

    async fn control(
        &self,
        connection: Connection,
        peer: Arc<Peer>,
        secret: Option<[u8; 32]>,
        place: &str,
        ip: Option<IpAddr>,
    ) {
        let mut _stranger = None;
        if peer.standing == Standing::Stranger {
            let Ok(permit) = self.strangers.try_acquire() else {
                let text = format_args!("hung up on {place}: too many nodes that were not let in are connected");
                self.shared.refusals.warn(ip, text);
                return;
            };
            _stranger = Some(permit);
        }
        if let Some(secret) = secret {
            self.shared.share_secret(&peer, Direction::Receiving, secret);
        }
        self.shared.mention(Event::Met(peer.clone()));
        let myself = &self.shared.myself;
        let (world, timing) = (myself.world.clone(), myself.timing.clone());
        let node = peer.node;
        if let Err(error) = serve(world, timing, connection, peer, self.shared.service.clone()).await {
            tracing::debug!("the control connection of node {node} from {place} broke: {error}");
        }
    }

    fn begin(&self, ip: Option<IpAddr>) -> Option<Slot<'_>> {
        let mut unfinished = self.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        let here = unfinished.by_address.get(&ip).copied().unwrap_or(0);
        if unfinished.count >= UNFINISHED_MAX || here >= UNFINISHED_EACH_MAX {
            return None;
        }
        unfinished.count += 1;
        unfinished.by_address.insert(ip, here + 1);
        Some(Slot { port: self, ip })
    }
}

impl Drop for Slot<'_> {
    fn drop(&mut self) {
        let mut unfinished = self.port.unfinished.lock().unwrap_or_else(PoisonError::into_inner);
        unfinished.count -= 1;
        match unfinished.by_address.get_mut(&self.ip) {
            Some(here) if *here > 1 => *here -= 1,
            _ => {
                unfinished.by_address.remove(&self.ip);
            }
        }
    }
}
