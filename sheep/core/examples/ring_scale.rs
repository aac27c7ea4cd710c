//! How evenly many nodes share objects, what a join moves, and what an epoch costs each of them: `ring_scale [OBJECTS]`.
//!
//! All nodes are alike, ten in a zone from a hundred on; three copies; one node
//! joins, from a hundred on in a zone that exists.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use qemu_proto::oid::{Oid, VdiId};
use sheep_core::cluster_state::ClusterState;
use sheep_core::command::Command;
use sheep_core::level::Level;
use sheep_core::member::{Member, NodeId};
use sheep_core::placement::{Holders, PlacementKey, holders, placement_key};
use sheep_core::ring::Ring;

const COPIES: u8 = 3;
const OBJECTS: u32 = 4_000_000;
/// Objects of one volume: 4 TiB of 4 MiB each.
const OBJECTS_PER_VOLUME: u32 = 1 << 20;

fn member(number: u64, nodes: u64) -> Member {
    let zone = if nodes < 100 { number } else { number / 10 };
    let mut address = [0; 16];
    address[8..].copy_from_slice(&number.to_be_bytes());
    // Any numbers far apart.
    let id = NodeId((number + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
    let peer_endpoint = format!("10.0.{}.{}:7010,[fd00::{number:x}]:7010", number / 250, number % 250 + 1);
    Member { id, address, port: 7000, peer_endpoint, boot: 1, zone: zone as u32, weight: 4 << 40, level: Level::OURS }
}

fn key(object: u32) -> PlacementKey {
    let vdi = VdiId::from_low_bits(object / OBJECTS_PER_VOLUME + 1);
    placement_key(vdi, Oid::data(vdi, object % OBJECTS_PER_VOLUME))
}

fn timed<T>(work: impl FnOnce() -> T) -> (T, Duration) {
    let started = Instant::now();
    let value = work();
    (value, started.elapsed())
}

fn ring_of(state: &ClusterState) -> Ring {
    let last = state.epochs.last().expect("formatted");
    Ring::new(&last.ring_members(), last.reference_weight.expect("nodes that store"))
}

/// Copies that are new in `after`, and those of them that a node other than `newcomer` got.
fn moved(before: &Holders, after: &Holders, newcomer: NodeId) -> (u64, u64) {
    let new = after.iter().filter(|node| !before.contains(node));
    new.fold((0, 0), |(all, stray), node| (all + 1, stray + u64::from(*node != newcomer)))
}

fn measure(nodes: u64, objects: u32) {
    let mut state = ClusterState::default();
    for number in 0..nodes {
        state.apply(&Command::Join { member: member(number, nodes), time: 0 });
    }
    let format = Command::Format { cluster_id: 1, copies: COPIES, object_size_shift: 22, flags: 0, time: 0 };
    state.apply(&format);
    let (ring, building) = timed(|| ring_of(&state));
    let (before, locating) =
        timed(|| (0..objects).map(|object| holders(&ring, key(object), COPIES)).collect::<Vec<_>>());
    let mut counts: BTreeMap<NodeId, u64> = BTreeMap::new();
    for holder in before.iter().flat_map(|holders| holders.iter()) {
        *counts.entry(*holder).or_default() += 1;
    }
    let mean = f64::from(objects) * f64::from(COPIES) / nodes as f64;
    let fullest = counts.values().max().copied().unwrap_or(0) as f64 / mean;
    let emptiest = counts.values().min().copied().unwrap_or(0) as f64 / mean;

    let mut newcomer = member(nodes, nodes);
    // A zone of its own would get more than one node's share.
    newcomer.zone = if nodes < 100 { newcomer.zone } else { 0 };
    let id = newcomer.id;
    let (_, applying) = timed(|| state.apply(&Command::Join { member: newcomer, time: 1 }));
    let after = ring_of(&state);
    let (all, stray) = before.iter().enumerate().fold((0, 0), |(all, stray), (object, before)| {
        let (one, other) = moved(before, &holders(&after, key(object as u32), COPIES), id);
        (all + one, stray + other)
    });
    let fair = f64::from(objects) * f64::from(COPIES) / (nodes + 1) as f64;
    println!(
        "| {nodes} | {fullest:.3} | {emptiest:.3} | {:.3} | {stray} | {:.0} ms | {:.0} ns | {:.1} ms | {} KiB |",
        all as f64 / fair,
        building.as_secs_f64() * 1e3,
        locating.as_secs_f64() * 1e9 / f64::from(objects),
        applying.as_secs_f64() * 1e3,
        state.encode().len() / 1024
    );
}

fn main() {
    let objects = std::env::args().nth(1).map_or(OBJECTS, |text| text.parse().expect("a number of objects"));
    println!(
        "| nodes | fullest / mean | emptiest / mean | moved by a join / fair share | between others | ring built in | \
         holders found in | join applied in | state |"
    );
    println!("|---|---|---|---|---|---|---|---|---|");
    for nodes in [5, 30, 100, 300, 1000] {
        measure(nodes, objects);
    }
}
