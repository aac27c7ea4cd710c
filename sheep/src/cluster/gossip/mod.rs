//! Who seems to be alive: SWIM gossip over UDP, sealed with secrets that the mesh agreed on. It only proposes: nobody is
//! put out of the cluster because of gossip alone.
//!
//! | file | what |
//! |---|---|
//! | `mod.rs` | one task that owns everything: sockets, secrets, protocol |
//! | [`envelope`] | secrets, seals, replays |
//! | [`swim`] | the protocol, without network and clock |
//!
//! Always holds:
//! 1. Nothing is sent to or believed from a node that was not introduced by the mesh, nor without a secret.
//! 2. A packet that cannot be sent or is refused is counted and forgotten: the protocol lives with losses.

pub mod envelope;
pub mod swim;

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::BytesMut;
use sheep_core::member::NodeId;
use tokio::sync::{mpsc, oneshot};

use crate::world::World;
use crate::world::net::Datagram;
use crate::world::rng;
use envelope::{Keyring, Refusal, Refused};
use swim::{Pace, Swim};

/// Packets that came and wait for the task. Ten thousand packets a second fill it if the task is not run for 25 ms.
const ARRIVALS_MAX: usize = 256;
/// Packets handled before timers get their turn: a flood of packets must not stop the clock.
const PACKETS_AT_ONCE: usize = 64;
/// A timer this late tells that the whole process stood still: then what came meanwhile is still on its way from the
/// sockets, and gets this long.
const OVERSLEPT: Duration = Duration::from_millis(150);
const COME_ROUND: Duration = Duration::from_millis(20);
/// Events on their way to the driver, and behind them.
const EVENTS_MAX: usize = 256;
const EVENTS_WAITING_MAX: usize = 65_536;
/// Longer than any packet of ours; what is cut off does not open.
const ARRIVAL_BYTES: usize = 2048;
/// Refused packets are told of at most this often.
const COMPLAIN_EVERY: Duration = Duration::from_secs(10);
/// A socket that fails is tried again after this.
const SOCKET_PAUSE: Duration = Duration::from_millis(100);

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

#[derive(Default)]
struct Counters {
    packets_sent: AtomicU64,
    bytes_sent: AtomicU64,
    packets_received: AtomicU64,
    bytes_received: AtomicU64,
    refused_unknown_key: AtomicU64,
    refused_bad_seal: AtomicU64,
    refused_replayed: AtomicU64,
    refused_malformed: AtomicU64,
    unsendable: AtomicU64,
    overrun: AtomicU64,
}

fn add(counter: &AtomicU64, amount: usize) {
    counter.fetch_add(amount as u64, Ordering::Relaxed);
}

enum Order {
    Install(NodeId, Direction, Box<[u8; 32]>),
    Introduce(NodeId, u64, SocketAddr),
    Forget(NodeId),
    Leave(oneshot::Sender<()>),
}

/// This node's part in the gossip; it ends when this is dropped.
pub struct Gossip {
    orders: mpsc::UnboundedSender<Order>,
    counters: Arc<Counters>,
    addresses: Vec<SocketAddr>,
}

impl Gossip {
    /// Binds the sockets and starts. Nothing is sent before [`Gossip::introduce`].
    pub async fn start(
        world: World,
        node: NodeId,
        boot: u64,
        listen: Vec<SocketAddr>,
    ) -> io::Result<(Arc<Gossip>, mpsc::Receiver<GossipEvent>)> {
        let counters = Arc::new(Counters::default());
        let (orders, orders_receiver) = mpsc::unbounded_channel();
        let (arrivals, arrivals_receiver) = mpsc::channel(ARRIVALS_MAX);
        let (events, events_receiver) = mpsc::channel(EVENTS_MAX);
        let mut sockets: Vec<Arc<dyn Datagram>> = Vec::new();
        for address in listen {
            sockets.push(Arc::from(world.net.bind_datagram(address).await?));
        }
        let addresses = sockets.iter().map(|socket| socket.local()).collect();
        for socket in &sockets {
            tokio::spawn(listen_on(world.clone(), socket.clone(), arrivals.clone(), counters.clone()));
        }
        let task = Task {
            node,
            swim: Swim::new(node, boot, &Pace::default(), rng::small(&*world.rng)),
            world,
            keys: Keyring::default(),
            addresses: BTreeMap::new(),
            sockets,
            waiting: VecDeque::new(),
            packet: Vec::with_capacity(swim::PACKET_BYTES_MAX),
            counters: counters.clone(),
            complaint: Complaint::default(),
        };
        tokio::spawn(task.run(orders_receiver, arrivals_receiver, events));
        Ok((Arc::new(Gossip { orders, counters, addresses }), events_receiver))
    }

    /// Where it listens, with the ports that were really taken.
    pub fn addresses(&self) -> &[SocketAddr] {
        &self.addresses
    }

    /// Takes a secret that the mesh agreed on with a peer. Packets to it are sealed with the latest; those from it open
    /// with the two latest. One secret must serve one direction only.
    pub fn install(&self, peer: NodeId, direction: Direction, secret: [u8; 32]) {
        self.order(Order::Install(peer, direction, Box::new(secret)));
    }

    /// Makes the peer's acquaintance, and again after every new connection to it. Gossip about nodes that were never
    /// introduced is not believed.
    pub fn introduce(&self, peer: NodeId, boot: u64, address: SocketAddr) {
        self.order(Order::Introduce(peer, boot, address));
    }

    /// Ends the acquaintance: its secrets and its state go; no event tells of it.
    pub fn forget(&self, peer: NodeId) {
        self.order(Order::Forget(peer));
    }

    /// Tells the others that this process goes, and stops. They may miss it: then they find out by themselves.
    pub async fn leave(&self) {
        let (done, left) = oneshot::channel();
        self.order(Order::Leave(done));
        // An error means that it had stopped before.
        let _ = left.await;
    }

    /// The counters.
    pub fn stats(&self) -> GossipStats {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let counters = &self.counters;
        GossipStats {
            packets_sent: read(&counters.packets_sent),
            bytes_sent: read(&counters.bytes_sent),
            packets_received: read(&counters.packets_received),
            bytes_received: read(&counters.bytes_received),
            refused_unknown_key: read(&counters.refused_unknown_key),
            refused_bad_seal: read(&counters.refused_bad_seal),
            refused_replayed: read(&counters.refused_replayed),
            refused_malformed: read(&counters.refused_malformed),
            unsendable: read(&counters.unsendable),
            overrun: read(&counters.overrun),
        }
    }

    fn order(&self, order: Order) {
        // After `leave` nobody takes orders any more, and none is missed.
        let _ = self.orders.send(order);
    }
}

struct Arrival {
    packet: BytesMut,
    from: SocketAddr,
}

/// Hands over what comes until the task is gone.
async fn listen_on(world: World, socket: Arc<dyn Datagram>, arrivals: mpsc::Sender<Arrival>, counters: Arc<Counters>) {
    let mut buffer = [0; ARRIVAL_BYTES];
    loop {
        let received = tokio::select! {
            received = socket.recv_from(&mut buffer) => received,
            () = arrivals.closed() => return,
        };
        match received {
            Ok((length, from)) => {
                if arrivals.try_send(Arrival { packet: BytesMut::from(&buffer[..length]), from }).is_err() {
                    add(&counters.overrun, 1);
                }
            }
            Err(error) => {
                tracing::debug!("gossip on {}: {error}", socket.local());
                world.clock.sleep(SOCKET_PAUSE).await;
            }
        }
    }
}

/// When the log was last told of refused packets, and how many were not told of since.
#[derive(Default)]
struct Complaint {
    next_at: Duration,
    untold: u64,
}

struct Task {
    node: NodeId,
    world: World,
    swim: Swim,
    keys: Keyring,
    addresses: BTreeMap<NodeId, SocketAddr>,
    sockets: Vec<Arc<dyn Datagram>>,
    waiting: VecDeque<GossipEvent>,
    packet: Vec<u8>,
    counters: Arc<Counters>,
    complaint: Complaint,
}

impl Task {
    async fn run(
        mut self,
        mut orders: mpsc::UnboundedReceiver<Order>,
        mut arrivals: mpsc::Receiver<Arrival>,
        events: mpsc::Sender<GossipEvent>,
    ) {
        loop {
            // Packets first: after a pause of the whole process the answers that came meanwhile must count before the
            // timers that wait for them.
            let mut now = self.world.clock.monotonic();
            if self.swim.next_due().is_some_and(|due| now.saturating_sub(due) > OVERSLEPT) {
                self.world.clock.sleep(COME_ROUND).await;
                now = self.world.clock.monotonic();
            }
            for _ in 0..PACKETS_AT_ONCE {
                let Ok(arrival) = arrivals.try_recv() else { break };
                self.open(arrival);
            }
            self.swim.tick(now);
            self.finish().await;
            let pause = self.swim.next_due().map_or(Duration::from_hours(1), |due| due.saturating_sub(now));
            tokio::select! {
                arrival = arrivals.recv() => match arrival {
                    Some(arrival) => self.open(arrival),
                    // All sockets are gone, which only happens when the runtime ends.
                    None => return,
                },
                order = orders.recv() => match order {
                    Some(Order::Leave(done)) => {
                        self.swim.leave(self.world.clock.monotonic());
                        self.finish().await;
                        let _ = done.send(());
                        return;
                    }
                    Some(order) => self.obey(order),
                    None => return,
                },
                permit = events.reserve(), if !self.waiting.is_empty() => match permit {
                    Ok(permit) => {
                        if let Some(event) = self.waiting.pop_front() {
                            permit.send(event);
                        }
                    }
                    // Nobody listens any more; the others still want to know that this node lives.
                    Err(_) => self.waiting.clear(),
                },
                () = self.world.clock.sleep(pause) => {}
            }
        }
    }

    fn obey(&mut self, order: Order) {
        let now = self.world.clock.monotonic();
        match order {
            Order::Install(peer, direction, secret) => self.keys.install(peer, direction, &secret),
            Order::Introduce(peer, boot, address) => {
                self.addresses.insert(peer, address);
                self.swim.introduce(now, peer, boot);
            }
            Order::Forget(peer) => {
                self.keys.forget(peer);
                self.addresses.remove(&peer);
                self.swim.forget(now, peer);
            }
            Order::Leave(_) => {}
        }
    }

    fn open(&mut self, mut arrival: Arrival) {
        let length = arrival.packet.len();
        let now = self.world.clock.monotonic();
        let refused = match self.keys.open(&mut arrival.packet) {
            Ok((sender, body)) => match self.swim.receive(now, sender, body) {
                Ok(()) => {
                    add(&self.counters.packets_received, 1);
                    add(&self.counters.bytes_received, length);
                    return;
                }
                Err(swim::Malformed) => Refused { sender: Some(sender), why: Refusal::Malformed },
            },
            Err(refused) => refused,
        };
        self.complain(now, arrival.from, refused);
    }

    fn complain(&mut self, now: Duration, from: SocketAddr, refused: Refused) {
        let (counter, reason) = match refused.why {
            Refusal::Malformed => (&self.counters.refused_malformed, "it is not in our form"),
            Refusal::UnknownKey => (&self.counters.refused_unknown_key, "no connection agreed on the secret it names"),
            Refusal::BadSeal => (&self.counters.refused_bad_seal, "its seal is broken"),
            Refusal::Replayed => (&self.counters.refused_replayed, "it came before, or much too late"),
        };
        add(counter, 1);
        let of_a_peer = self.addresses.values().any(|address| address.ip() == from.ip());
        if refused.why == Refusal::UnknownKey && of_a_peer {
            // It was restarted, or we were, and our connection with it is being made.
            tracing::debug!("gossip packet from {from} refused: {reason}");
            return;
        }
        if now < self.complaint.next_at {
            self.complaint.untold += 1;
            return;
        }
        let sender =
            refused.sender.map_or_else(|| "nobody we know".to_string(), |node| format!("node {:016x}", node.0));
        let untold = std::mem::take(&mut self.complaint.untold);
        self.complaint.next_at = now + COMPLAIN_EVERY;
        tracing::warn!(
            "gossip packet from {from} ({sender}) refused: {reason} (and {untold} more since the last such line)"
        );
    }

    /// Sends what the protocol wants sent and queues its events.
    async fn finish(&mut self) {
        for (node, body) in self.swim.take_packets() {
            let Some(address) = self.addresses.get(&node).copied() else {
                add(&self.counters.unsendable, 1);
                continue;
            };
            let socket = self.sockets.iter().find(|socket| reaches(socket.local().ip(), address.ip())).cloned();
            let Some(socket) = socket.filter(|_| self.keys.seal(self.node, node, &body, &mut self.packet)) else {
                add(&self.counters.unsendable, 1);
                continue;
            };
            match socket.send_to(&self.packet, address).await {
                Ok(()) => {
                    add(&self.counters.packets_sent, 1);
                    add(&self.counters.bytes_sent, self.packet.len());
                }
                Err(error) => {
                    add(&self.counters.unsendable, 1);
                    tracing::debug!("gossip to {address}: {error}");
                }
            }
        }
        self.waiting.extend(self.swim.take_events());
        while self.waiting.len() > EVENTS_WAITING_MAX {
            self.waiting.pop_front();
        }
    }
}

/// Whether a socket bound to `local` can send to `target`.
fn reaches(local: IpAddr, target: IpAddr) -> bool {
    local.is_ipv4() == target.is_ipv4() && (local.is_unspecified() || local.is_loopback() == target.is_loopback())
}
