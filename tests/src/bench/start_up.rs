//! How long a node with very many objects takes to serve, and what each of them costs in memory.
//!
//! The node is a cluster by itself, with volumes whose maps name all the objects: otherwise it would begin to remove them. The
//! objects are made by the store layer alone, in this process, while the node is down, and named after its next start, before
//! it looks for what nothing refers to; they are zeros.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use qemu_proto::oid::{Oid, VdiId};
use serde_json::{Value, json};
use sheep::store::{Durability, Store, StoreConfig, Write, WriteKind};
use sheep::world::World;
use sheep_core::stamp::{Epoch, Stamp, Version};

use super::OBJECT_BYTES;
use super::process;
use crate::clients::{MAP_OFFSET, Request, flag, opcode};
use crate::spawn::{Cluster, ClusterPlan, JOURNAL_BYTES};

/// The most that a map names.
const OBJECTS_OF_VOLUME: u64 = 1 << 20;
/// Of a map that is written at once.
const MAP_PIECE: u64 = 1 << 18;
/// Memory is read when nothing has happened for so long.
const SETTLED: Duration = Duration::from_secs(5);

/// One start.
struct Start {
    serves_after: Duration,
    runs_after: Duration,
    resident_mib: f64,
    peak_mib: f64,
    anonymous_bytes: u64,
}

impl Start {
    fn json(&self) -> Value {
        json!({
            "serves_after_s": self.serves_after.as_secs_f64(), "runs_after_s": self.runs_after.as_secs_f64(),
            "resident_mib": self.resident_mib, "peak_mib": self.peak_mib, "anonymous_bytes": self.anonymous_bytes,
        })
    }

    fn print(&self, what: &str) {
        println!(
            "start {what}: serves after {:.2} s, the cluster runs after {:.2} s, {:.0} MiB resident ({:.0} at most)",
            self.serves_after.as_secs_f64(),
            self.runs_after.as_secs_f64(),
            self.resident_mib,
            self.peak_mib
        );
    }
}

/// Starts the node, which is down.
fn start(cluster: &mut Cluster) -> Result<Start> {
    let began = Instant::now();
    cluster.restart(0)?;
    let serves_after = began.elapsed();
    cluster.wait_running()?;
    let runs_after = began.elapsed();
    std::thread::sleep(SETTLED);
    let pid = cluster.node(0).pid().context("the node runs")?;
    Ok(Start {
        serves_after,
        runs_after,
        resident_mib: process::resident_mib(pid)?,
        peak_mib: process::peak_mib(pid)?,
        anonymous_bytes: process::anonymous_bytes(pid)?,
    })
}

/// Volumes that have room for so many objects, and how many each.
fn create_volumes(cluster: &Cluster, objects: u64) -> Result<Vec<(VdiId, u64)>> {
    let mut client = cluster.client(0)?;
    let create = |first: u64| -> Result<(VdiId, u64)> {
        let count = (objects - first).min(OBJECTS_OF_VOLUME);
        Ok((client.create_volume(&format!("disk{first}"), count * OBJECT_BYTES, 1, 22)?, count))
    };
    (0..objects).step_by(OBJECTS_OF_VOLUME as usize).map(create).collect()
}

/// Puts all the objects into their maps, which takes only what is there.
fn name_all(cluster: &Cluster, volumes: &[(VdiId, u64)]) -> Result<()> {
    let mut client = cluster.client(0)?;
    for (vdi, count) in volumes {
        for index in (0..*count).step_by(MAP_PIECE as usize) {
            let entries = vec![vdi.get().to_le_bytes(); (count - index).min(MAP_PIECE) as usize].concat();
            let request = Request::object(opcode::WRITE, Oid::inode(*vdi), MAP_OFFSET + 4 * index).flags(flag::CACHE);
            client.call(request, &entries)?.success("write a map")?;
        }
        client.flush(*vdi)?;
    }
    Ok(())
}

/// Puts the objects into the store of the node, which is down.
fn make(store: &Path, volumes: &[(VdiId, u64)]) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let mut config = StoreConfig::new(store);
        config.journal_bytes = JOURNAL_BYTES;
        // Nothing is lost if the power goes meanwhile but the benchmark, and each object would be flushed by itself.
        config.sync = false;
        let store = Store::open(World::real(8)?, config).await?;
        let mut sequence = 0;
        for (vdi, count) in volumes {
            for index in 0..*count {
                sequence += 1;
                let version = Version { epoch: Epoch(1), stamp: Stamp { generation: 1, sequence } };
                let write = Write {
                    oid: Oid::data(*vdi, index as u32),
                    version,
                    offset: 0,
                    data: Bytes::new(),
                    kind: WriteKind::Create { size_bytes: OBJECT_BYTES },
                    durability: Durability::WriteBack,
                };
                let permit = store.admit(0).await;
                store.submit(permit, write)?.await?;
                // Those that wait are kept in memory.
                if sequence % 4096 == 0 {
                    store.flush().await?;
                }
            }
        }
        Ok(store.close().await?)
    })
}

/// What was just made would be written back while the start is measured.
fn settle() {
    rustix::fs::sync();
}

/// Makes the objects, then starts a node on them after a clean stop, and after a kill.
pub fn run(objects: u64) -> Result<Value> {
    let mut cluster = ClusterPlan::new(1).start_formatted(1)?;
    let volumes = create_volumes(&cluster, objects)?;
    ensure!(cluster.terminate(0)? == Some(0), "the node did not stop in order");
    let empty = start(&mut cluster)?;
    empty.print("with no object");
    ensure!(cluster.terminate(0)? == Some(0), "the node did not stop in order");
    let began = Instant::now();
    make(&cluster.node(0).store, &volumes)?;
    settle();
    println!("{objects} objects made by the store in {:.1} s", began.elapsed().as_secs_f64());
    let began = Instant::now();
    cluster.restart(0)?;
    name_all(&cluster, &volumes)?;
    println!("their maps written in {:.1} s", began.elapsed().as_secs_f64());
    ensure!(cluster.terminate(0)? == Some(0), "the node did not stop in order");
    settle();
    let clean = start(&mut cluster)?;
    clean.print(&format!("with {objects} objects"));
    cluster.kill(0)?;
    let killed = start(&mut cluster)?;
    killed.print("after a kill");
    let bytes_each = clean.anonymous_bytes.saturating_sub(empty.anonymous_bytes) as f64 / objects as f64;
    println!("memory for each object: {bytes_each:.0} bytes");
    cluster.finish()?;
    Ok(json!({
        "objects": objects, "empty": empty.json(), "clean": clean.json(), "after_a_kill": killed.json(),
        "memory_bytes_per_object": bytes_each,
    }))
}
