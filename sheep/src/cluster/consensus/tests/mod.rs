//! Whole groups of voters in one process, and what crashes leave on a disk.

mod log;
mod random;
mod voters;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use sheep_core::command::{Command, Outcome};
use sheep_core::level::Level;
use sheep_core::member::{Member, NodeId};

use super::{Carried, Carrier, Consensus, Entry, ProposeError, Proposed, Role, Timing, Unreachable};
use crate::world::World;

const CLUSTER: u64 = 0xC1;

/// The memory between the voters.
struct Wire {
    world: World,
    nodes: Mutex<BTreeMap<NodeId, Consensus>>,
    /// From, to.
    cut: Mutex<BTreeSet<(NodeId, NodeId)>>,
    lost_percent: Mutex<u64>,
}

impl Wire {
    fn new() -> Arc<Wire> {
        Arc::new(Wire {
            world: World::real(6).unwrap(),
            nodes: Mutex::default(),
            cut: Mutex::default(),
            lost_percent: Mutex::default(),
        })
    }

    fn passes(&self, from: NodeId, to: NodeId) -> bool {
        let lost = *self.lost_percent.lock().unwrap();
        !self.cut.lock().unwrap().contains(&(from, to)) && self.world.rng.next_u64() % 100 >= lost
    }

    fn isolate(&self, node: u64) {
        let others: Vec<NodeId> = self.nodes.lock().unwrap().keys().copied().collect();
        let mut cut = self.cut.lock().unwrap();
        for other in others {
            cut.insert((NodeId(node), other));
            cut.insert((other, NodeId(node)));
        }
    }

    fn heal(&self) {
        self.cut.lock().unwrap().clear();
    }

    fn node(&self, node: u64) -> Consensus {
        self.nodes.lock().unwrap()[&NodeId(node)].clone()
    }

    fn all(&self) -> Vec<Consensus> {
        self.nodes.lock().unwrap().values().cloned().collect()
    }

    async fn start(self: &Arc<Self>, node: u64, root: &Path, timing: Timing) -> Consensus {
        let mouth = Arc::new(Mouth { from: NodeId(node), wire: self.clone() });
        let directory = root.join(node.to_string());
        let consensus = Consensus::open(&self.world, NodeId(node), directory, CLUSTER, mouth, timing).await.unwrap();
        self.nodes.lock().unwrap().insert(NodeId(node), consensus.clone());
        consensus
    }

    /// Nobody hears of it any more, at once.
    async fn kill(&self, node: u64) {
        let killed = self.nodes.lock().unwrap().remove(&NodeId(node)).unwrap();
        killed.shutdown().await;
    }

    async fn leader(&self) -> Consensus {
        self.until(|wire| {
            let nodes = wire.all();
            let leads = |node: &&Consensus| {
                node.status().role == Role::Leader
                    && node.quorum_age().is_some_and(|age| age < Duration::from_millis(300))
            };
            nodes.iter().find(leads).cloned()
        })
        .await
    }

    fn since(&self, begin: Duration) -> Duration {
        self.world.clock.monotonic().saturating_sub(begin)
    }

    async fn until<T>(&self, mut done: impl FnMut(&Wire) -> Option<T>) -> T {
        let begin = self.world.clock.monotonic();
        loop {
            if let Some(result) = done(self) {
                return result;
            }
            assert!(self.since(begin) < Duration::from_secs(20), "it never happens");
            self.world.clock.sleep(Duration::from_millis(2)).await;
        }
    }

    /// Until every node has applied what this one has.
    async fn agreed(&self, as_node: &Consensus) {
        let index = as_node.watch().borrow().index;
        self.until(|wire| wire.all().iter().all(|node| node.watch().borrow().index >= index).then_some(())).await;
    }
}

struct Mouth {
    from: NodeId,
    wire: Arc<Wire>,
}

impl Carrier for Mouth {
    fn call(&self, target: NodeId, message: Vec<u8>, patience: Duration) -> Carried {
        let (from, wire) = (self.from, self.wire.clone());
        Box::pin(async move {
            let called = async {
                let Some(node) = wire.nodes.lock().unwrap().get(&target).cloned() else {
                    return Err(Unreachable { target, reason: "nobody is there".to_owned() });
                };
                if wire.passes(from, target) {
                    let answer = node.handle(Bytes::from(message)).await;
                    if wire.passes(target, from) {
                        return Ok(Bytes::from(answer));
                    }
                }
                std::future::pending().await
            };
            tokio::select! {
                answer = called => answer,
                () = wire.world.clock.sleep(patience) => Err(Unreachable { target, reason: "silence".to_owned() }),
            }
        })
    }
}

fn voters(nodes: &[u64]) -> BTreeSet<NodeId> {
    nodes.iter().map(|node| NodeId(*node)).collect()
}

/// Starts voters 1 to 3, initialized.
async fn three(root: &Path, timing: Timing) -> Arc<Wire> {
    let wire = Wire::new();
    for node in 1..=3 {
        wire.start(node, root, timing).await;
    }
    wire.node(1).initialize(voters(&[1, 2, 3])).await.unwrap();
    wire.leader().await;
    wire
}

fn entry(proposer: u64, sequence: u64, command: Command) -> Entry {
    Entry { proposer: NodeId(proposer), boot: 7, sequence, settled_below: 0, command }
}

fn member(id: u64) -> Member {
    Member {
        id: NodeId(id),
        address: [0; 16],
        port: id as u16,
        peer_endpoint: String::new(),
        boot: 1,
        zone: 0,
        weight: 1 << 30,
        level: Level::OURS,
    }
}

/// One that makes the state larger: the address of a member that comes in.
fn join(sequence: u64) -> Entry {
    entry(1, sequence, Command::Join { member: member(100 + sequence), time: 0 })
}

async fn propose(node: &Consensus, sequence: u64) -> Result<Proposed, ProposeError> {
    node.propose(join(sequence), Duration::from_secs(2)).await
}

async fn propose_all(node: &Consensus, sequences: std::ops::Range<u64>) {
    for sequence in sequences {
        assert_eq!(propose(node, sequence).await.unwrap().outcome, Outcome::Done);
    }
}
