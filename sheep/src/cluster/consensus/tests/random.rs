//! Partitions, losses and restarts by seed: no two nodes ever disagree, and nothing acknowledged is lost or done twice.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash, Hasher};
use std::sync::atomic::{AtomicBool, Ordering};

use qemu_proto::oid::VdiId;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

use super::*;
use crate::cluster::consensus::Published;

const TIMING: Timing = Timing {
    heartbeat: Duration::from_millis(25),
    election_min: Duration::from_millis(60),
    election_max: Duration::from_millis(120),
};
const PROPOSERS: u64 = 3;
const TROUBLE: Duration = Duration::from_secs(4);

/// By index, what a node published.
type Seen = Arc<Mutex<BTreeMap<u64, u64>>>;

fn digest(published: &Published) -> u64 {
    let mut hasher = DefaultHasher::new();
    postcard::to_allocvec(&(&published.state, &published.sessions)).unwrap().hash(&mut hasher);
    hasher.finish()
}

/// Watches one life of a node until it stops.
fn compare(node: &Consensus, seen: &Seen) {
    let (mut watch, seen) = (node.watch(), seen.clone());
    tokio::spawn(async move {
        let mut last = 0;
        loop {
            let published = watch.borrow_and_update().clone();
            let goes_forward = published.index >= last;
            last = published.index;
            let digest = digest(&published);
            let agreed = *seen.lock().unwrap().entry(published.index).or_insert(digest);
            // A panic here would end only this task.
            if !goes_forward || agreed != digest {
                eprintln!("went back to, or two states for, index {}", published.index);
                std::process::abort();
            }
            if watch.changed().await.is_err() {
                return;
            }
        }
    });
}

/// Takes a lease again and again, each time until it is acknowledged. Gives the generations it was told.
async fn proposer(wire: Arc<Wire>, number: u64, seed: u64, over: Arc<AtomicBool>) -> Vec<(u64, u32)> {
    let mut random = StdRng::seed_from_u64(seed);
    let mut told = Vec::new();
    let mut sequence = 0;
    while !over.load(Ordering::SeqCst) && sequence < 250 {
        let vdi = VdiId::new(number as u32).unwrap();
        let entry = entry(number, sequence, Command::AcquireLease { vdi, node: NodeId(number) });
        loop {
            let nodes = wire.all();
            if !nodes.is_empty() {
                let node = &nodes[random.random_range(0..nodes.len())];
                match node.propose(entry.clone(), Duration::from_millis(random.random_range(1..200))).await {
                    Ok(Proposed { outcome: Outcome::Lease(generation), .. }) => {
                        told.push((sequence, generation));
                        break;
                    }
                    Ok(other) => panic!("{other:?}"),
                    Err(ProposeError::Stale) => panic!("{sequence} was never answered"),
                    Err(_) => {}
                }
            }
            wire.world.clock.sleep(Duration::from_millis(random.random_range(1..10))).await;
        }
        sequence += 1;
    }
    told
}

async fn trouble(wire: &Arc<Wire>, root: &Path, random: &mut StdRng, seen: &Seen) {
    let begin = wire.world.clock.monotonic();
    while wire.since(begin) < TROUBLE {
        match random.random_range(0..10) {
            0..=2 => wire.isolate(random.random_range(1..=3)),
            3..=4 => {
                let mut pair = [random.random_range(1..=3), random.random_range(1..=3)].map(NodeId);
                pair.sort_unstable();
                wire.cut.lock().unwrap().insert((pair[0], pair[1]));
            }
            5 => *wire.lost_percent.lock().unwrap() = random.random_range(0..30),
            6 => {
                let node = random.random_range(1..=3);
                wire.kill(node).await;
                wire.world.clock.sleep(Duration::from_millis(random.random_range(0..200))).await;
                compare(&wire.start(node, root, TIMING).await, seen);
            }
            7 => {
                let node = wire.node(random.random_range(1..=3));
                tokio::spawn(async move { node.elect_now().await });
            }
            _ => {
                wire.heal();
                *wire.lost_percent.lock().unwrap() = 0;
            }
        }
        wire.world.clock.sleep(Duration::from_millis(random.random_range(20..250))).await;
    }
    wire.heal();
    *wire.lost_percent.lock().unwrap() = 0;
}

async fn run(seed: u64) {
    let root = tempfile::tempdir().unwrap();
    let wire = three(root.path(), TIMING).await;
    let leader = wire.leader().await;
    let format = Command::Format { cluster_id: 1, copies: 1, object_size_shift: 22, flags: 0, time: 0 };
    for node in 1..=PROPOSERS {
        let command = Command::Join { member: member(node), time: 0 };
        leader.propose(entry(9, node, command), Duration::from_secs(5)).await.unwrap();
    }
    leader.propose(entry(9, 10, format), Duration::from_secs(5)).await.unwrap();
    assert!(leader.watch().borrow().state.is_running());

    let seen = Seen::default();
    wire.all().iter().for_each(|node| compare(node, &seen));
    let over = Arc::new(AtomicBool::new(false));
    let proposers: Vec<_> = (1..=PROPOSERS)
        .map(|number| tokio::spawn(proposer(wire.clone(), number, seed * 10 + number, over.clone())))
        .collect();
    trouble(&wire, root.path(), &mut StdRng::seed_from_u64(seed), &seen).await;
    over.store(true, Ordering::SeqCst);
    let mut acknowledged = 0;
    for (number, proposer) in (1..).zip(proposers) {
        let told = proposer.await.unwrap();
        let leader = wire.leader().await;
        wire.agreed(&leader).await;
        let published = leader.watch().borrow().clone();
        acknowledged += told.len();
        // One generation per proposal, in order: each was applied once.
        for (sequence, generation) in &told {
            assert_eq!(u64::from(*generation), sequence + 1, "seed {seed}, proposer {number}");
        }
        assert_eq!(published.state.leases[&(number as u32)].generation as usize, told.len(), "seed {seed}");
        let session = &published.sessions[&NodeId(number)];
        assert_eq!(session.done.len(), told.len());
    }
    let leader = wire.leader().await;
    wire.agreed(&leader).await;
    let last = leader.watch().borrow().clone();
    wire.until(|wire| wire.all().iter().all(|node| *node.watch().borrow() == last).then_some(())).await;
    println!("seed {seed}: {acknowledged} acknowledged, term {}, {} states", last.term, seen.lock().unwrap().len());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nobody_disagrees_and_nothing_is_lost_or_done_twice() {
    // More of them with SHEEP_SEEDS=FIRST..LAST.
    let seeds = std::env::var("SHEEP_SEEDS").unwrap_or_else(|_| "1..4".to_owned());
    let (first, last) = seeds.split_once("..").unwrap();
    for seed in first.parse().unwrap()..last.parse().unwrap() {
        run(seed).await;
    }
}
