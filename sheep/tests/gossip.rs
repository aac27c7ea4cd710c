//! Several nodes gossiping: over a network in memory that loses, doubles, delays and cuts, in paused time; and once over
//! real UDP on loopback.

#![allow(clippy::unwrap_used)]

use std::collections::{BTreeMap, BTreeSet};
use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use sheep::cluster::gossip::{Direction, Gossip, GossipEvent};
use sheep::world::World;
use sheep::world::clock::{Clock, WallTime};
use sheep::world::disk::{Disk, Files, Job};
use sheep::world::net::{Connection, Datagram, Endpoint, Listener, Net, NetFuture};
use sheep::world::real_disk::RealFiles;
use sheep::world::real_net::RealNet;
use sheep::world::rng::Rng;
use sheep_core::member::NodeId;
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep};

struct PausedClock(Instant);

impl Clock for PausedClock {
    fn monotonic(&self) -> Duration {
        self.0.elapsed()
    }

    fn wall(&self) -> WallTime {
        WallTime { seconds: 0, nanoseconds: 0 }
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(sleep(duration))
    }
}

struct SeededRng(AtomicU64);

impl Rng for SeededRng {
    fn next_u64(&self) -> u64 {
        let mut x = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

struct NoDisk;

impl Disk for NoDisk {
    fn spawn(&self, _: Job) {
        panic!("gossip has no business with disks");
    }

    fn files(&self) -> Arc<dyn Files> {
        Arc::new(RealFiles)
    }
}

type Packet = (Vec<u8>, SocketAddr);

/// A network in memory.
struct Ether {
    rng: SeededRng,
    sockets: Mutex<BTreeMap<SocketAddr, mpsc::UnboundedSender<Packet>>>,
    /// Percent of the packets that are lost, that come twice.
    loss: AtomicU64,
    doubled: AtomicU64,
    /// The longest way, microseconds.
    delay_us: AtomicU64,
    /// Pairs of addresses between which nothing passes.
    cuts: Mutex<BTreeSet<(SocketAddr, SocketAddr)>>,
    /// The last packet that passed between two addresses.
    last: Mutex<BTreeMap<(SocketAddr, SocketAddr), Vec<u8>>>,
}

impl Ether {
    fn new(seed: u64) -> Arc<Ether> {
        Arc::new(Ether {
            rng: SeededRng(AtomicU64::new(seed)),
            sockets: Mutex::default(),
            loss: AtomicU64::new(0),
            doubled: AtomicU64::new(0),
            delay_us: AtomicU64::new(300),
            cuts: Mutex::default(),
            last: Mutex::default(),
        })
    }

    fn chance(&self, percent: &AtomicU64) -> bool {
        self.rng.next_u64() % 100 < percent.load(Ordering::Relaxed)
    }

    fn inject(&self, bytes: &[u8], from: SocketAddr, to: SocketAddr) {
        if let Some(socket) = self.sockets.lock().unwrap().get(&to) {
            let _ = socket.send((bytes.to_vec(), from));
        }
    }

    fn pass(self: &Arc<Ether>, bytes: &[u8], from: SocketAddr, to: SocketAddr) {
        if self.cuts.lock().unwrap().contains(&(from, to)) {
            return;
        }
        self.last.lock().unwrap().insert((from, to), bytes.to_vec());
        for _ in 0..=u8::from(self.chance(&self.doubled)) {
            if !self.chance(&self.loss) {
                let delay = Duration::from_micros(self.rng.next_u64() % self.delay_us.load(Ordering::Relaxed));
                let (ether, bytes) = (self.clone(), bytes.to_vec());
                tokio::spawn(async move {
                    sleep(delay).await;
                    ether.inject(&bytes, from, to);
                });
            }
        }
    }

    fn cut(&self, a: SocketAddr, b: SocketAddr) {
        self.cuts.lock().unwrap().extend([(a, b), (b, a)]);
    }
}

struct EtherNet(Arc<Ether>);

struct EtherSocket {
    ether: Arc<Ether>,
    local: SocketAddr,
    arrivals: tokio::sync::Mutex<mpsc::UnboundedReceiver<Packet>>,
}

impl Net for EtherNet {
    fn listen(&self, _: &Endpoint) -> NetFuture<'_, Box<dyn Listener>> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }

    fn connect(&self, _: &Endpoint) -> NetFuture<'_, Connection> {
        Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
    }

    fn bind_datagram(&self, local: SocketAddr) -> NetFuture<'_, Box<dyn Datagram>> {
        let (sender, arrivals) = mpsc::unbounded_channel();
        self.0.sockets.lock().unwrap().insert(local, sender);
        let socket = EtherSocket { ether: self.0.clone(), local, arrivals: tokio::sync::Mutex::new(arrivals) };
        Box::pin(async { Ok(Box::new(socket) as Box<dyn Datagram>) })
    }
}

impl Datagram for EtherSocket {
    fn send_to<'a>(&'a self, bytes: &'a [u8], to: SocketAddr) -> NetFuture<'a, ()> {
        self.ether.pass(bytes, self.local, to);
        Box::pin(async { Ok(()) })
    }

    fn recv_from<'a>(&'a self, buffer: &'a mut [u8]) -> NetFuture<'a, (usize, SocketAddr)> {
        Box::pin(async {
            let (bytes, from) = self.arrivals.lock().await.recv().await.ok_or(io::ErrorKind::BrokenPipe)?;
            buffer[..bytes.len()].copy_from_slice(&bytes);
            Ok((bytes.len(), from))
        })
    }

    fn local(&self) -> SocketAddr {
        self.local
    }
}

struct Node {
    id: NodeId,
    boot: u64,
    address: SocketAddr,
    gossip: Arc<Gossip>,
    events: mpsc::Receiver<GossipEvent>,
    /// Who is alive according to the events.
    alive: BTreeMap<NodeId, u64>,
    downs: usize,
}

impl Node {
    async fn start(net: Arc<dyn Net>, index: u64, boot: u64, address: SocketAddr, seed: u64) -> Node {
        let id = NodeId(index.wrapping_mul(0x1234_5678_9abc_def1));
        let world = World {
            clock: Arc::new(PausedClock(Instant::now())),
            disk: Arc::new(NoDisk),
            net,
            rng: Arc::new(SeededRng(AtomicU64::new(seed.wrapping_mul(31) + index.wrapping_mul(7919)))),
        };
        let (gossip, events) = Gossip::start(world, id, boot, vec![address]).await.unwrap();
        let address = gossip.addresses()[0];
        Node { id, boot, address, gossip, events, alive: BTreeMap::new(), downs: 0 }
    }

    fn read(&mut self) {
        while let Ok(event) = self.events.try_recv() {
            match event {
                GossipEvent::Alive { node, boot } => {
                    assert_eq!(self.alive.insert(node, boot), None, "Alive comes after Down");
                }
                GossipEvent::Down { node, boot } => {
                    assert_eq!(self.alive.remove(&node), Some(boot), "Down tells of what was Alive");
                    self.downs += 1;
                }
            }
        }
    }
}

/// As the mesh does it: one connection each way, with a secret of its own.
fn acquaint(a: &Node, b: &Node, salt: u8) {
    for (from, to) in [(a, b), (b, a)] {
        let text = format!("{} {} {} {} {salt}", from.id.0, from.boot, to.id.0, to.boot);
        let secret = *blake3::hash(text.as_bytes()).as_bytes();
        to.gossip.install(from.id, Direction::Receiving, secret);
        from.gossip.install(to.id, Direction::Sending, secret);
        from.gossip.introduce(to.id, to.boot, to.address);
    }
}

fn address(index: u64) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::new(10, 0, 0, index as u8), 7010))
}

/// `count` nodes that all know each other.
async fn cluster(ether: &Arc<Ether>, count: u64, seed: u64) -> Vec<Node> {
    let mut nodes: Vec<Node> = Vec::new();
    for index in 1..=count {
        let node = Node::start(Arc::new(EtherNet(ether.clone())), index, 1000 + index, address(index), seed).await;
        for other in &nodes {
            acquaint(&node, other, 0);
        }
        nodes.push(node);
    }
    nodes
}

/// Waits until `done` holds, looking every 10 ms; gives how long that took.
async fn until(nodes: &mut [Node], patience: Duration, what: &str, done: impl Fn(&[Node]) -> bool) -> Duration {
    let begin = Instant::now();
    loop {
        nodes.iter_mut().for_each(Node::read);
        if done(nodes) {
            return begin.elapsed();
        }
        assert!(begin.elapsed() < patience, "not within {patience:?}: {what}");
        sleep(Duration::from_millis(10)).await;
    }
}

fn everybody_sees(nodes: &[Node], count: usize) -> bool {
    nodes.iter().all(|node| node.alive.len() == count)
}

#[tokio::test(start_paused = true)]
async fn nodes_meet_and_a_death_is_noticed() {
    for seed in 0..5 {
        let ether = Ether::new(seed);
        let mut nodes = cluster(&ether, 5, seed).await;
        let met = until(&mut nodes, Duration::from_secs(2), "all meet", |nodes| everybody_sees(nodes, 4)).await;
        sleep(Duration::from_secs(10)).await;
        let before: Vec<_> = nodes.iter().map(|node| node.gossip.stats()).collect();
        sleep(Duration::from_mins(1)).await;
        for (node, before) in nodes.iter_mut().zip(&before) {
            node.read();
            assert_eq!(node.downs, 0);
            let after = node.gossip.stats();
            let rate = (after.packets_sent - before.packets_sent) as f64 / 60.0;
            assert!(rate < 10.0, "an idle cluster is quiet, not {rate} packets/s per node");
        }
        drop(nodes.pop());
        let down = until(&mut nodes, Duration::from_secs(5), "death", |nodes| everybody_sees(nodes, 3)).await;
        println!("seed {seed}: met after {met:?}, death noticed by the last after {down:?}");
        assert!(down < Duration::from_millis(3500));
    }
}

#[tokio::test(start_paused = true)]
async fn whoever_leaves_is_noticed_at_once() {
    let ether = Ether::new(1);
    let mut nodes = cluster(&ether, 5, 1).await;
    until(&mut nodes, Duration::from_secs(2), "all meet", |nodes| everybody_sees(nodes, 4)).await;
    let last = nodes.pop().unwrap();
    last.gossip.leave().await;
    let took = until(&mut nodes, Duration::from_secs(1), "all know", |nodes| everybody_sees(nodes, 3)).await;
    println!("leaving noticed after {took:?}");
}

#[tokio::test(start_paused = true)]
async fn a_restarted_node_is_a_new_process() {
    // Boots are random: the new one may be lower or higher than the old one.
    for (seed, boot) in [(0, 1), (1, u64::MAX), (2, 7), (3, 1 << 60)] {
        for pause in [Duration::ZERO, Duration::from_secs(1), Duration::from_secs(20)] {
            let ether = Ether::new(seed);
            let mut nodes = cluster(&ether, 5, seed).await;
            until(&mut nodes, Duration::from_secs(2), "all meet", |nodes| everybody_sees(nodes, 4)).await;
            let old = nodes.pop().unwrap();
            let id = old.id;
            drop(old);
            sleep(pause).await;
            let new = Node::start(Arc::new(EtherNet(ether.clone())), 5, boot, address(5), seed).await;
            assert_eq!(new.id, id);
            for node in &nodes {
                acquaint(&new, node, 1);
            }
            nodes.push(new);
            let took = until(&mut nodes, Duration::from_secs(1), "the new process is seen", |nodes| {
                everybody_sees(nodes, 4) && nodes[..4].iter().all(|node| node.alive.get(&id) == Some(&boot))
            })
            .await;
            println!("seed {seed}, back after {pause:?}: seen as new after {took:?}");
            assert!(nodes[..4].iter().all(|node| node.downs == 1), "the old process was called down once");
            sleep(Duration::from_secs(30)).await;
            nodes.iter_mut().for_each(Node::read);
            assert!(everybody_sees(&nodes, 4) && nodes[..4].iter().all(|node| node.downs == 1), "and that is all");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_healed_partition_heals() {
    for seed in 0..5 {
        // Three and two; and one alone, which loses everybody.
        for group in [1_usize, 2] {
            let ether = Ether::new(seed);
            let mut nodes = cluster(&ether, 5, seed).await;
            until(&mut nodes, Duration::from_secs(2), "all meet", |nodes| everybody_sees(nodes, 4)).await;
            for few in &nodes[..group] {
                nodes[group..].iter().for_each(|many| ether.cut(few.address, many.address));
            }
            until(&mut nodes, Duration::from_secs(20), "both sides notice", |nodes| {
                nodes[..group].iter().all(|node| node.alive.len() == group - 1)
                    && nodes[group..].iter().all(|node| node.alive.len() == 4 - group)
            })
            .await;
            sleep(Duration::from_mins(5)).await;
            ether.cuts.lock().unwrap().clear();
            let took =
                until(&mut nodes, Duration::from_secs(20), "one cluster again", |nodes| everybody_sees(nodes, 4)).await;
            println!("seed {seed}, {group} cut off: healed after {took:?}");
        }
    }
}

#[tokio::test(start_paused = true)]
async fn heavy_loss_kills_nobody() {
    for seed in 0..10 {
        let ether = Ether::new(seed);
        let mut nodes = cluster(&ether, 5, seed).await;
        until(&mut nodes, Duration::from_secs(2), "all meet", |nodes| everybody_sees(nodes, 4)).await;
        ether.loss.store(20, Ordering::Relaxed);
        ether.doubled.store(5, Ordering::Relaxed);
        ether.delay_us.store(40_000, Ordering::Relaxed);
        for _ in 0..60 {
            sleep(Duration::from_secs(1)).await;
            nodes.iter_mut().for_each(Node::read);
        }
        assert!(nodes.iter().all(|node| node.downs == 0), "seed {seed}: somebody was called down");
        drop(nodes.pop());
        let down = until(&mut nodes, Duration::from_secs(5), "death", |nodes| everybody_sees(nodes, 3)).await;
        println!("seed {seed}: nobody down in 60 s; a real death noticed after {down:?}");
    }
}

#[tokio::test(start_paused = true)]
async fn foreign_packets_are_refused_and_counted() {
    let ether = Ether::new(3);
    let mut nodes = cluster(&ether, 2, 3).await;
    until(&mut nodes, Duration::from_secs(2), "both meet", |nodes| everybody_sees(nodes, 1)).await;
    let (a, b) = (nodes[0].address, nodes[1].address);
    let good = ether.last.lock().unwrap().get(&(a, b)).unwrap().clone();
    let settle = || sleep(Duration::from_millis(1));
    // Nothing of the cluster's own comes between: one step takes a millisecond, a probe period 300.
    let inject = |bytes: Vec<u8>| {
        ether.inject(&bytes, a, b);
        settle()
    };
    let base = nodes[1].gossip.stats();
    inject(b"hello".to_vec()).await;
    inject(vec![0; 1500]).await;
    assert_eq!(nodes[1].gossip.stats().refused_malformed, base.refused_malformed + 2);
    let mut stranger = good.clone();
    stranger[1] ^= 1;
    inject(stranger).await;
    assert_eq!(nodes[1].gossip.stats().refused_unknown_key, base.refused_unknown_key + 1);
    inject(good.clone()).await;
    assert_eq!(nodes[1].gossip.stats().refused_replayed, base.refused_replayed + 1);
    let mut tampered = good.clone();
    // The counter, so that it is not taken for a replay; it is part of what is sealed.
    tampered[15] ^= 0x80;
    inject(tampered).await;
    assert_eq!(nodes[1].gossip.stats().refused_bad_seal, base.refused_bad_seal + 1);
    // Two connections later the first secret is no longer good.
    acquaint(&nodes[0], &nodes[1], 1);
    acquaint(&nodes[0], &nodes[1], 2);
    settle().await;
    inject(good.clone()).await;
    assert_eq!(nodes[1].gossip.stats().refused_unknown_key, base.refused_unknown_key + 2);
    nodes[1].gossip.forget(nodes[0].id);
    settle().await;
    let last = ether.last.lock().unwrap().get(&(a, b)).unwrap().clone();
    inject(last).await;
    assert_eq!(nodes[1].gossip.stats().refused_unknown_key, base.refused_unknown_key + 3);
    nodes.iter_mut().for_each(Node::read);
    assert_eq!((nodes[1].downs, nodes[1].alive.len()), (0, 1), "forgetting is told by no event");
    // The forgotten one finds nobody; a new acquaintance brings both together again.
    sleep(Duration::from_secs(10)).await;
    nodes[1].alive.clear();
    acquaint(&nodes[0], &nodes[1], 3);
    until(&mut nodes, Duration::from_secs(2), "both meet again", |nodes| everybody_sees(nodes, 1)).await;
}

#[tokio::test(start_paused = true)]
async fn acquaintances_of_acquaintances_stay_strangers() {
    let ether = Ether::new(4);
    let mut nodes = cluster(&ether, 3, 4).await;
    let strange = Node::start(Arc::new(EtherNet(ether.clone())), 9, 1009, address(9), 4).await;
    acquaint(&nodes[0], &strange, 0);
    nodes.push(strange);
    sleep(Duration::from_secs(30)).await;
    nodes.iter_mut().for_each(Node::read);
    let seen: Vec<usize> = nodes.iter().map(|node| node.alive.len()).collect();
    assert_eq!(seen, [3, 2, 2, 1], "gossip about whom the mesh did not introduce is not believed");
    assert!(nodes.iter().all(|node| node.downs == 0));
}

#[tokio::test]
async fn real_udp_on_loopback() {
    let mut nodes: Vec<Node> = Vec::new();
    for index in 1..=3 {
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let node = Node::start(Arc::new(RealNet), index, 1000 + index, any, index).await;
        for other in &nodes {
            acquaint(&node, other, 0);
        }
        nodes.push(node);
    }
    let met = until(&mut nodes, Duration::from_secs(5), "all meet", |nodes| everybody_sees(nodes, 2)).await;
    drop(nodes.pop());
    let down = until(&mut nodes, Duration::from_secs(10), "death", |nodes| everybody_sees(nodes, 1)).await;
    println!("real UDP: met after {met:?}, death noticed after {down:?}");
}
