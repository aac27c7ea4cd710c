//! Runs [`crate::volume_model`] on three nodes while one of them is killed and started again, then compares everything.
//!
//! Always holds:
//! 1. A run passes only if every image holds what the model says, no volume or snapshot is there besides, and the objects on
//!    the disks of all nodes are exactly those that the images refer to.
//! 2. The same seed makes the same operations; when nodes die under them is up to the clock.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_proto::oid::{ObjectKind, Oid, VdiId};

use crate::sim::Random;
use crate::spawn::{Cluster, ClusterPlan, binary};
use crate::volume_model::{Door, Doors, Image, Worker, check_image, referenced};

/// Workers side by side, each with volumes of its own.
const WORKERS: u64 = 4;
/// A killed node stays away for at most so long.
const AWAY_MAX_MS: u64 = 3000;
/// How long after the end space may take to come back: nodes look every 15 s.
const CALM: Duration = Duration::from_mins(2);

/// What to run.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Over all workers.
    pub operations: u64,
    /// Between two kills.
    pub kill_every: Duration,
    /// Decides the operations.
    pub seed: u64,
    /// With the default driver instead of `local`, in a network namespace.
    pub is_voting: bool,
}

/// What a run came to.
#[derive(Clone, Copy, Default, Debug)]
pub struct Figures {
    /// Nodes killed.
    pub kills: u64,
    /// Volumes and snapshots at the end.
    pub images: usize,
    /// Objects that they refer to.
    pub objects: usize,
    /// Bytes on all nodes for them, as the file systems count them.
    pub bytes: u64,
    /// Of the operations.
    pub ran: Duration,
    /// From the last operation until the disks had what is referred to and nothing else.
    pub calm_after: Duration,
    /// From the deletion of everything until the disks were empty.
    pub empty_after: Duration,
}

/// One run.
pub fn run(plan: &Plan) -> Result<Figures> {
    let nodes = ClusterPlan::new(3);
    let mut cluster = if plan.is_voting { nodes.voting() } else { nodes }.start_formatted(3)?;
    let doors = doors(&cluster, plan.is_voting)?;
    let mut workers: Vec<Worker<'_>> =
        (0..WORKERS).map(|number| Worker::new(&doors, format!("w{number}-"), plan.seed ^ number << 40)).collect();
    let started = Instant::now();
    let kills = work(&mut cluster, &doors, &mut workers, plan)?;
    let mut figures = Figures { kills, ran: started.elapsed(), ..Figures::default() };
    cluster.check_health()?;
    cluster.wait_recovered()?;
    let images: Vec<Image> = workers.iter().flat_map(|worker| worker.images.iter().cloned()).collect();
    figures.images = images.len();
    for (index, image) in images.iter().enumerate() {
        check_image(&doors.nodes[index % doors.nodes.len()], image)?;
    }
    check_list(&cluster, &images)?;
    let wanted = referenced(&images);
    figures.objects = wanted.len();
    let live: BTreeSet<VdiId> = images.iter().map(|image| image.id).collect();
    figures.calm_after = await_objects(&cluster, &wanted, &live)?;
    figures.bytes = (0..cluster.node_count()).map(|index| allocated(&cluster.node(index).store)).sum();
    // Giving space back must not have touched what is left.
    for (index, image) in images.iter().enumerate() {
        check_image(&doors.nodes[(index + 1) % doors.nodes.len()], image)?;
    }
    for worker in &mut workers {
        while !worker.images.is_empty() {
            worker.delete_image(0)?;
        }
    }
    figures.empty_after = await_objects(&cluster, &BTreeSet::new(), &BTreeSet::new())?;
    drop(workers);
    cluster.finish()?;
    Ok(figures)
}

fn doors(cluster: &Cluster, is_voting: bool) -> Result<Doors> {
    let door = |index: usize| Door {
        port: cluster.node(index).port,
        nbd: cluster.node(index).store.join("nbd.sock"),
        is_open: AtomicBool::new(true),
        kills: AtomicU64::new(0),
    };
    Ok(Doors { nodes: (0..cluster.node_count()).map(door).collect(), dog: binary("dog")?, is_voting })
}

/// Lets the workers work while nodes are killed; gives how many were.
fn work(cluster: &mut Cluster, doors: &Doors, workers: &mut [Worker<'_>], plan: &Plan) -> Result<u64> {
    let (left, failed) = (AtomicU64::new(plan.operations), AtomicBool::new(false));
    std::thread::scope(|scope| {
        let threads: Vec<_> = (workers.iter_mut())
            .map(|worker| {
                let (left, failed) = (&left, &failed);
                scope.spawn(move || {
                    let take = |count: u64| count.checked_sub(1);
                    let is_left = || left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok();
                    while !failed.load(Ordering::Relaxed) && is_left() {
                        let done = worker.operate().with_context(|| worker.last.clone());
                        failed.fetch_or(done.is_err(), Ordering::Relaxed);
                        done?;
                    }
                    anyhow::Ok(())
                })
            })
            .collect();
        let is_working = || left.load(Ordering::Relaxed) > 0 && !failed.load(Ordering::Relaxed);
        let killed = kill_now_and_then(cluster, doors, plan, is_working);
        for thread in threads {
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        killed
    })
}

fn kill_now_and_then(cluster: &mut Cluster, doors: &Doors, plan: &Plan, is_working: impl Fn() -> bool) -> Result<u64> {
    let mut random = Random::new(plan.seed);
    let mut kills = 0;
    let mut killed_at = Instant::now();
    while is_working() {
        std::thread::sleep(Duration::from_millis(20));
        if killed_at.elapsed() < plan.kill_every {
            continue;
        }
        killed_at = Instant::now();
        let victim = random.below(doors.nodes.len() as u64) as usize;
        let door = &doors.nodes[victim];
        door.is_open.store(false, Ordering::SeqCst);
        door.kills.fetch_add(1, Ordering::SeqCst);
        cluster.kill(victim)?;
        std::thread::sleep(Duration::from_millis(random.below(AWAY_MAX_MS)));
        cluster.restart(victim)?;
        door.is_open.store(true, Ordering::SeqCst);
        // One at a time: with two of three copies behind there would be one node to answer for everything.
        cluster.wait_recovered()?;
        kills += 1;
    }
    Ok(kills)
}

/// Fails unless `dog vdi list` shows these volumes and snapshots, and no others.
fn check_list(cluster: &Cluster, images: &[Image]) -> Result<()> {
    let listed = cluster.dog(&["vdi", "list", "--json"])?.ok()?;
    let rows: Vec<serde_json::Value> = serde_json::from_slice(&listed.stdout)?;
    let text = |row: &serde_json::Value, field: &str| row[field].as_str().unwrap_or_default().to_owned();
    let seen: BTreeSet<_> = (rows.iter())
        .map(|row| (text(row, "name"), text(row, "tag"), row["size_bytes"].as_u64(), row["used_bytes"].as_u64()))
        .collect();
    let wanted: BTreeSet<_> = (images.iter())
        .map(|image| {
            let own = image.map.iter().filter(|owner| **owner == image.id.get()).count() as u64;
            let used = own * crate::volume_model::OBJECT_BYTES;
            (image.name.clone(), image.tag.clone(), Some(image.size_bytes), Some(used))
        })
        .collect();
    ensure!(seen == wanted, "the list has {:?} instead of {:?}", &seen - &wanted, &wanted - &seen);
    Ok(())
}

/// Waits until every node has these objects and inodes of these VDIs only.
pub fn await_objects(cluster: &Cluster, wanted: &BTreeSet<Oid>, live: &BTreeSet<VdiId>) -> Result<Duration> {
    let started = Instant::now();
    loop {
        let mut told = Vec::new();
        for index in 0..cluster.node_count() {
            let on_disk = objects_on(&cluster.node(index).store)?;
            let (inodes, others): (BTreeSet<Oid>, BTreeSet<Oid>) =
                on_disk.into_iter().partition(|oid| oid.kind() == Some(ObjectKind::Inode));
            let more: Vec<&Oid> = others.difference(wanted).collect();
            let fewer: Vec<&Oid> = wanted.difference(&others).collect();
            let dead: Vec<&Oid> = inodes.iter().filter(|oid| !live.contains(&oid.vid())).collect();
            if !(more.is_empty() && fewer.is_empty() && dead.is_empty()) {
                told.push(format!(
                    "node {index}: objects that nothing refers to {more:?}, objects that are missing {fewer:?}, \
                     inodes of what was deleted {dead:?}"
                ));
            }
        }
        if told.is_empty() {
            return Ok(started.elapsed());
        }
        ensure!(started.elapsed() < CALM, "the disks do not hold what is referred to\n{}", told.join("\n"));
        std::thread::sleep(Duration::from_millis(200));
    }
}

/// The objects that a store has files of.
pub fn objects_on(store: &Path) -> Result<BTreeSet<Oid>> {
    let mut found = BTreeSet::new();
    for entry in std::fs::read_dir(store.join("obj"))? {
        let name = entry?.file_name();
        let raw = name.to_str().and_then(|name| u64::from_str_radix(name, 16).ok());
        found.insert(Oid::from_raw(raw.with_context(|| format!("{} among the objects", name.display()))?));
    }
    Ok(found)
}

/// Bytes that a store's objects take.
pub fn allocated(store: &Path) -> u64 {
    use std::os::unix::fs::MetadataExt;
    let entries = std::fs::read_dir(store.join("obj")).into_iter().flatten().flatten();
    entries.filter_map(|entry| entry.metadata().ok()).map(|metadata| metadata.blocks() * 512).sum()
}
