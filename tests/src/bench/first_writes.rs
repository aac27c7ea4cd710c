//! Snapshots and the first write to each object that one shares: how long both take, what the write moves between nodes, and what
//! it copies on the disks; on the file system of the temporary directory, and on one that can share blocks.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Value, json};

use super::OBJECT_BYTES;
use super::figures::median;
use super::rig::snapshot;
use crate::loop_fs::{FsKind, LoopFs};
use crate::nbd_client::{FLAG_FUA, NbdClient, Style};
use crate::spawn::{Cluster, ClusterPlan};
use crate::volume_proof::allocated;

const OBJECTS: u64 = 64;
/// Longer than the copies of three nodes take.
const PAUSE: Duration = Duration::from_millis(50);
/// Until what was written is in its files.
const SETTLED: Duration = Duration::from_secs(2);
/// Of which the median is told.
const SNAPSHOTS: u64 = 21;

/// What came of it on one file system; medians, in microseconds.
struct FirstWrites {
    snapshot_us: f64,
    in_a_row_us: f64,
    alone_us: f64,
    plain_us: f64,
    peer_reads: u64,
    copy_bytes: u64,
}

/// Measures and prints both.
pub fn run() -> Result<Value> {
    let cluster = Cluster::three()?;
    // Other programs use that file system too: what the files take is counted.
    let space = |cluster: &Cluster| Ok((0..3).map(|index| allocated(&cluster.node(index).store)).sum());
    let here = on("the temporary directory", &cluster, space)?;
    cluster.finish()?;
    let mut report = json!({"temporary_directory": here.json()});
    if let Some(why) = LoopFs::missing() {
        println!("SKIPPED: first writes on a reflinking file system: {why}");
        return Ok(report);
    }
    let scratch = tempfile::tempdir()?;
    let disks: Result<Vec<LoopFs>> =
        (0..3).map(|n| LoopFs::create(scratch.path(), &format!("disk{n}"), FsKind::Xfs, 800)).collect();
    let disks = disks?;
    let plan = disks
        .iter()
        .enumerate()
        .fold(ClusterPlan::new(3), |plan, (index, disk)| plan.store(index, &disk.path().join("store")));
    let cluster = plan.start_formatted(3)?;
    // What files share is counted once.
    let reflinking = on("XFS", &cluster, |cluster| {
        rustix::fs::sync();
        let used_on = |store: &Path| Ok(rustix::fs::statvfs(store).map(|fs| (fs.f_blocks - fs.f_bfree) * fs.f_frsize)?);
        (0..3).map(|index| used_on(&cluster.node(index).store)).sum()
    })?;
    cluster.finish()?;
    report["xfs"] = reflinking.json();
    Ok(report)
}

/// Reads that nodes were asked for by other nodes.
fn peer_reads(cluster: &Cluster) -> Result<u64> {
    let read = |index: usize| -> Result<u64> {
        let said = cluster.dog_through(index, &["node", "stat", "--json"], &[])?.ok()?;
        let json: Value = serde_json::from_slice(&said.stdout)?;
        let row = json.get(0).unwrap_or(&json);
        let count = row.pointer("/peers/read").or(row.pointer("/peer/read")).and_then(Value::as_u64);
        count.with_context(|| format!("no count of reads in {json}"))
    };
    (0..cluster.node_count()).map(read).sum()
}

/// One durable write of 4 KiB, in microseconds.
fn write(client: &mut NbdClient, object: u64, offset: u64) -> Result<f64> {
    let started = Instant::now();
    client.write(object * OBJECT_BYTES + offset, &[2; 4096], FLAG_FUA)?;
    Ok(started.elapsed().as_secs_f64() * 1e6)
}

fn on(what: &str, cluster: &Cluster, used: impl Fn(&Cluster) -> Result<u64>) -> Result<FirstWrites> {
    let size_bytes = OBJECTS * OBJECT_BYTES;
    let mut native = cluster.client(0)?;
    native.create_volume("disk", size_bytes, 3, 22)?;
    let mut client = NbdClient::open(&cluster.node(0).store.join("nbd.sock"), "disk", Style::Structured, &[])?;
    let piece = vec![1; 1 << 20];
    for at in (0..size_bytes).step_by(piece.len()) {
        client.write(at, &piece, 0)?;
    }
    client.flush()?;
    snapshot(&mut native, "disk", size_bytes)?;
    // The map is made with the first.
    write(&mut client, 0, 0)?;
    std::thread::sleep(SETTLED);
    let (reads, before) = (peer_reads(cluster)?, used(cluster)?);
    let (mut in_a_row, mut alone, mut plain) = (Vec::new(), Vec::new(), Vec::new());
    for object in 1..OBJECTS {
        if object > OBJECTS / 2 {
            std::thread::sleep(PAUSE);
        }
        let took = write(&mut client, object, 8192)?;
        if object > OBJECTS / 2 { &mut alone } else { &mut in_a_row }.push(took);
    }
    std::thread::sleep(SETTLED);
    let (reads, taken) = (peer_reads(cluster)? - reads, used(cluster)?.saturating_sub(before));
    for object in 1..OBJECTS {
        plain.push(write(&mut client, object, 16384)?);
    }
    let mut snapshots = Vec::new();
    for _ in 0..SNAPSHOTS {
        let started = Instant::now();
        snapshot(&mut native, "disk", size_bytes)?;
        snapshots.push(started.elapsed().as_secs_f64() * 1e6);
        // So that each has something to keep.
        write(&mut client, 0, 0)?;
    }
    let found = FirstWrites {
        snapshot_us: median(snapshots),
        in_a_row_us: median(in_a_row),
        alone_us: median(alone),
        plain_us: median(plain),
        peer_reads: reads,
        copy_bytes: taken / 3 / (OBJECTS - 1),
    };
    found.print(what);
    Ok(found)
}

impl FirstWrites {
    fn print(&self, what: &str) {
        println!(
            "first write to a shared 4 MiB object on {what}: {:.2} ms in a row (median of {}), {:.2} ms alone ({}), {:.2} ms the \
             next one, {} reads between nodes, {} KiB of disk for each copy of each; a snapshot takes {:.2} ms (median of \
             {SNAPSHOTS})",
            self.in_a_row_us / 1e3,
            OBJECTS / 2,
            self.alone_us / 1e3,
            OBJECTS / 2 - 1,
            self.plain_us / 1e3,
            self.peer_reads,
            self.copy_bytes / 1024,
            self.snapshot_us / 1e3,
        );
    }

    fn json(&self) -> Value {
        json!({
            "snapshot_us": self.snapshot_us, "first_write_us": self.in_a_row_us, "first_write_alone_us": self.alone_us,
            "next_write_us": self.plain_us, "times_next_write": self.in_a_row_us / self.plain_us,
            "reads_between_nodes": self.peer_reads, "disk_bytes_per_copy": self.copy_bytes,
        })
    }
}
