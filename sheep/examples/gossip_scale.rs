//! What gossip costs and how soon it notices a death, in simulated time: `gossip_scale [SEEDS] [SECONDS]`.
//!
//! Drives the protocol itself, without sealing, tasks or sockets; bytes are those of the sealed packets, without IP and
//! UDP headers.

use std::cmp::Reverse;
use std::collections::{BTreeMap, BinaryHeap};
use std::time::Duration;

use bytes::Bytes;
use sheep::cluster::gossip::GossipEvent;
use sheep::cluster::gossip::envelope::OVERHEAD_BYTES;
use sheep::cluster::gossip::swim::{Pace, Swim};
use sheep::world::rng::{self, Rng};
use sheep_core::member::NodeId;

struct Seeded(std::sync::atomic::AtomicU64);

impl Rng for Seeded {
    fn next_u64(&self) -> u64 {
        let mut x = self.0.fetch_add(0x9e37_79b9_7f4a_7c15, std::sync::atomic::Ordering::Relaxed);
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
}

/// Something that happens: when, in which order among those of the same moment, what.
type Entry = Reverse<(Duration, u64, What)>;

#[derive(PartialEq, Eq, PartialOrd, Ord)]
enum What {
    Tick(usize),
    Packet { from: usize, to: usize, body: Bytes },
}

struct Simulation {
    rng: Seeded,
    now: Duration,
    count: u64,
    queue: BinaryHeap<Entry>,
    nodes: Vec<Option<Swim>>,
    ticking_at: Vec<Duration>,
    indexes: BTreeMap<NodeId, usize>,
    loss_percent: u64,
    packets: u64,
    bytes: u64,
    downs: Vec<(Duration, NodeId)>,
}

fn id(index: usize) -> NodeId {
    NodeId((index as u64 + 1).wrapping_mul(0x1234_5678_9abc_def1))
}

impl Simulation {
    fn new(size: usize, seed: u64, pace: &Pace) -> Simulation {
        let rng = Seeded(seed.wrapping_mul(0x5851_f42d_4c95_7f2d).into());
        let boot = |index: usize| (index as u64 + 77).wrapping_mul(0x9e37_79b9_7f4a_7c15);
        let nodes = (0..size).map(|index| Some(Swim::new(id(index), boot(index), pace, rng::small(&rng)))).collect();
        let mut simulation = Simulation {
            rng,
            now: Duration::ZERO,
            count: 0,
            queue: BinaryHeap::new(),
            nodes,
            ticking_at: vec![Duration::MAX; size],
            indexes: (0..size).map(|index| (id(index), index)).collect(),
            loss_percent: 0,
            packets: 0,
            bytes: 0,
            downs: Vec::new(),
        };
        // Nodes come one after the other within a second, as machines do.
        for index in 0..size {
            let at = Duration::from_secs(1) * index as u32 / size as u32;
            simulation.run_until(at);
            for other in 0..index {
                for (one, two) in [(index, other), (other, index)] {
                    if let Some(node) = &mut simulation.nodes[one] {
                        node.introduce(at, id(two), boot(two));
                    }
                    simulation.after(one);
                }
            }
        }
        simulation
    }

    fn push(&mut self, at: Duration, what: What) {
        self.count += 1;
        self.queue.push(Reverse((at, self.count, what)));
    }

    /// Passes on what a node wants.
    fn after(&mut self, index: usize) {
        let Some(node) = &mut self.nodes[index] else { return };
        let (packets, events, due) = (node.take_packets(), node.take_events(), node.next_due());
        for (to, body) in packets {
            self.packets += 1;
            self.bytes += (body.len() + OVERHEAD_BYTES) as u64;
            if self.rng.next_u64() % 100 < self.loss_percent {
                continue;
            }
            let to = self.indexes[&to];
            let delay = Duration::from_micros(50 + self.rng.next_u64() % 500);
            self.push(self.now + delay, What::Packet { from: index, to, body });
        }
        for event in events {
            if let GossipEvent::Down { node, .. } = event {
                self.downs.push((self.now, node));
            }
        }
        if let Some(due) = due.filter(|due| *due < self.ticking_at[index]) {
            self.ticking_at[index] = due;
            self.push(due, What::Tick(index));
        }
    }

    fn run_until(&mut self, end: Duration) {
        while self.queue.peek().is_some_and(|Reverse((at, ..))| *at <= end) {
            let Some(Reverse((at, _, what))) = self.queue.pop() else { return };
            self.now = self.now.max(at);
            let index = match what {
                What::Tick(index) => {
                    self.ticking_at[index] = Duration::MAX;
                    if let Some(node) = &mut self.nodes[index] {
                        node.tick(self.now);
                    }
                    index
                }
                What::Packet { from, to, body } => {
                    if let Some(node) = &mut self.nodes[to] {
                        node.receive(self.now, id(from), &body).expect("only our own packets");
                    }
                    to
                }
            };
            self.after(index);
        }
        self.now = self.now.max(end);
    }

    /// The number of nodes that see all others alive.
    fn complete(&self) -> usize {
        let live = self.nodes.iter().flatten().count();
        self.nodes.iter().flatten().filter(|node| node.alive_count() == live - 1).count()
    }
}

fn scale(size: usize, seed: u64, pace: &Pace) {
    let mut simulation = Simulation::new(size, seed, pace);
    while simulation.complete() < size {
        let next = simulation.now + Duration::from_millis(100);
        simulation.run_until(next);
        assert!(simulation.now < Duration::from_mins(2), "not all met");
    }
    let (met, met_packets) = (simulation.now, simulation.packets);
    let calm = simulation.now + Duration::from_secs(20);
    simulation.run_until(calm);
    let (packets, bytes) = (simulation.packets, simulation.bytes);
    let seconds = 30;
    simulation.run_until(calm + Duration::from_secs(seconds));
    let per = (size as u64 * seconds) as f64;
    let (packets, bytes) = ((simulation.packets - packets) as f64 / per, (simulation.bytes - bytes) as f64 / per);
    assert!(simulation.downs.is_empty(), "nobody died yet");
    let death = simulation.now;
    simulation.nodes[size / 2] = None;
    let before = (simulation.packets, simulation.bytes);
    simulation.run_until(death + Duration::from_secs(15));
    let mut took: Vec<Duration> = simulation.downs.iter().map(|(at, _)| at.saturating_sub(death)).collect();
    took.sort_unstable();
    let busy = ((size - 1) * 15) as f64;
    println!(
        "{size:5} nodes: met after {:.1} s ({:.0} packets each); idle {packets:.1} packets/s, {bytes:.0} B/s per node; death \
         noticed by {} of {}: first {:.2} s, median {:.2} s, last {:.2} s ({:.1} packets/s, {:.0} B/s per node in those 15 s)",
        met.as_secs_f64(),
        met_packets as f64 / size as f64,
        took.len(),
        size - 1,
        took[0].as_secs_f64(),
        took[took.len() / 2].as_secs_f64(),
        took[took.len() - 1].as_secs_f64(),
        (simulation.packets - before.0) as f64 / busy,
        (simulation.bytes - before.1) as f64 / busy,
    );
}

fn loss(size: usize, percent: u64, seeds: u64, seconds: u64, pace: &Pace) {
    let (mut downs, mut runs_with_downs, mut packets) = (0, 0, 0);
    let mut took = Vec::new();
    for seed in 0..seeds {
        let mut simulation = Simulation::new(size, seed, pace);
        let begin = Duration::from_secs(5);
        simulation.run_until(begin);
        assert_eq!(simulation.complete(), size);
        simulation.loss_percent = percent;
        let before = simulation.packets;
        simulation.run_until(begin + Duration::from_secs(seconds) + Duration::from_micros(seed * 7919));
        packets += simulation.packets - before;
        downs += simulation.downs.len();
        runs_with_downs += usize::from(!simulation.downs.is_empty());
        if !simulation.downs.is_empty() {
            continue;
        }
        let death = simulation.now;
        simulation.nodes[0] = None;
        simulation.run_until(death + Duration::from_secs(20));
        let of_the_dead = simulation.downs.iter().filter(|(_, node)| *node == id(0));
        took.extend(of_the_dead.map(|(at, _)| at.saturating_sub(death)));
    }
    took.sort_unstable();
    let at = |part: f64| took.get(((took.len() as f64 * part) as usize).min(took.len().saturating_sub(1)));
    let show = |part| at(part).map_or(0.0, Duration::as_secs_f64);
    println!(
        "{size} nodes, {percent} % loss, {seeds} x {seconds} s: {downs} false downs in {runs_with_downs} runs, {:.1} packets/s per \
         node; a death is noticed: median {:.2} s, 99 % {:.2} s, last {:.2} s",
        packets as f64 / (seeds * seconds * size as u64) as f64,
        show(0.5),
        show(0.99),
        show(1.0)
    );
}

fn main() {
    let mut arguments = std::env::args().skip(1).map(|text| text.parse::<u64>().expect("a number"));
    let seeds = arguments.next().unwrap_or(100);
    let seconds = arguments.next().unwrap_or(60);
    let mut pace = Pace::default();
    let milliseconds = |text: Option<u64>, default: Duration| text.map_or(default, Duration::from_millis);
    pace.probe_period = milliseconds(arguments.next(), pace.probe_period);
    pace.probe_patience = milliseconds(arguments.next(), pace.probe_patience);
    pace.suspicion = milliseconds(arguments.next(), pace.suspicion);
    pace.news_period = milliseconds(arguments.next(), pace.news_period);
    pace.news_copies = arguments.next().map_or(pace.news_copies, |number| number as u8);
    pace.helpers = arguments.next().map_or(pace.helpers, |number| number as usize);
    println!("{pace:?}");
    for percent in [0, 5, 20] {
        loss(5, percent, seeds, seconds, &pace);
    }
    let sizes = arguments.next().unwrap_or(1000) as usize;
    for size in [5, 20, 100, 300, 1000].into_iter().filter(|size| *size <= sizes) {
        scale(size, 1, &pace);
    }
}
