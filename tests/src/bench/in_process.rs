//! A node of the cluster inside the benchmark: the data path with its store and its place in the order, and no front end. A load
//! calls the volume layer as NBD does, from as many tasks as are to be under way.
//!
//! What such a node takes of the processor contains what the load itself takes; there is no client to leave out.

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use bytes::Bytes;
use qemu_proto::node_entry::NodeEntry;
use sheep::cluster::local;
use sheep::data::virtual_disk::{Part, VirtualDisk};
use sheep::data::{Data, shares, view_change};
use sheep::store::{Store, StoreConfig};
use sheep::world::World;
use sheep::world::net::Endpoint;
use sheep_core::level::Level;
use sheep_core::member::Member;
use sheep_core::vdi_name::Target;
use tokio::runtime::Runtime;

use super::load::{Disk, Load, Samples};
use super::patterns::{Operation, Pattern};
use crate::spawn::JOURNAL_BYTES;

/// As many as the daemon has.
const DISK_THREADS: usize = 8;

/// See the module.
pub struct InProcess {
    runtime: Arc<Runtime>,
    data: Data,
    store: Store,
}

impl InProcess {
    /// A node that joins the cluster of a directory of the `local` driver.
    pub fn start(store: &Path, driver: &Path, zone: u32) -> Result<InProcess> {
        let world = World::real(DISK_THREADS)?;
        let runtime = Arc::new(tokio::runtime::Builder::new_multi_thread().enable_all().build()?);
        let (data, store) = runtime.block_on(async {
            let mut config = StoreConfig::new(store);
            config.journal_bytes = JOURNAL_BYTES;
            let store = Store::open(world.clone(), config).await?;
            let own = IpAddr::V4(Ipv4Addr::LOCALHOST);
            let peers = world.net.listen(&Endpoint::Tcp(SocketAddr::new(own, 0))).await?;
            let member = Member {
                id: store.node_id(),
                address: NodeEntry::address_bytes(own),
                // No client reaches it; the others' ports are above.
                port: 1,
                peer_endpoint: peers.local().to_string(),
                boot: world.rng.next_u64(),
                zone,
                weight: shares::weight_of(&store),
                level: Level::OURS,
            };
            let cluster = local::join(&world, driver.to_path_buf(), member, None).await?;
            let data = Data::new(world.clone(), cluster, Some(store.clone()));
            view_change::start(&data, peers);
            data.settle_in().await;
            anyhow::Ok((data, store))
        })?;
        Ok(InProcess { runtime, data, store })
    }

    /// Opens a volume.
    pub fn open(&self, name: &str) -> Result<Layer> {
        let disk = self.runtime.block_on(VirtualDisk::open(&self.data, name.as_bytes(), Target::Current))?;
        Ok(Layer { runtime: self.runtime.clone(), disk: Arc::new(disk) })
    }

    /// Leaves the cluster.
    pub fn finish(self) -> Result<()> {
        self.runtime.block_on(async {
            self.data.cluster().leave().await;
            self.store.close().await
        })?;
        Ok(())
    }
}

/// A volume by direct calls.
pub struct Layer {
    runtime: Arc<Runtime>,
    disk: Arc<VirtualDisk>,
}

/// What the tasks of a load share.
struct Shared {
    disk: Arc<VirtualDisk>,
    operations: Vec<Operation>,
    bytes: usize,
    is_durable: bool,
    payload: Bytes,
    /// The next request.
    next: AtomicUsize,
    began: Instant,
    time_max: Duration,
}

impl Shared {
    async fn one(&self, operation: Operation) -> Result<()> {
        if operation.is_write {
            return Ok(self.disk.write(operation.offset, self.payload.clone(), self.is_durable).await?);
        }
        // As NBD asks: without waiting if that is possible.
        let length = match self.disk.read_now(operation.offset, self.bytes) {
            Some(bytes) => {
                // Else one task would have all the turns.
                tokio::task::yield_now().await;
                bytes.len()
            }
            None => {
                let parts = self.disk.read(operation.offset, self.bytes as u64).await?;
                let bytes = parts.iter().map(|part| match part {
                    Part::Hole(length) => *length as usize,
                    Part::Data(bytes) => bytes.len(),
                });
                bytes.sum()
            }
        };
        ensure!(length == self.bytes, "a read of {} bytes gave {length}", self.bytes);
        Ok(())
    }

    /// Does requests until number `limit`, and gives their times.
    async fn work(&self, limit: usize) -> Result<Vec<Duration>> {
        let mut latencies = Vec::new();
        loop {
            let index = self.next.fetch_add(1, Ordering::Relaxed);
            if index >= limit || self.began.elapsed() > self.time_max {
                return Ok(latencies);
            }
            let sent = Instant::now();
            self.one(self.operations[index]).await?;
            latencies.push(sent.elapsed());
        }
    }
}

/// Requests up to `limit`, so many under way as the pattern says.
async fn together(shared: &Arc<Shared>, pattern: &Pattern, limit: usize) -> Result<Vec<Duration>> {
    let task = |shared: Arc<Shared>| tokio::spawn(async move { shared.work(limit).await });
    let tasks: Vec<_> = (0..pattern.depth).map(|_| task(shared.clone())).collect();
    let mut latencies = Vec::new();
    for task in tasks {
        latencies.extend(task.await.context("a task of the load ended")??);
    }
    Ok(latencies)
}

impl Disk for Layer {
    fn run(&mut self, load: &Load) -> Result<Samples> {
        let shared = Arc::new(Shared {
            disk: self.disk.clone(),
            operations: load.operations.to_vec(),
            bytes: load.pattern.bytes as usize,
            is_durable: load.pattern.is_durable(),
            payload: Bytes::copy_from_slice(load.payload),
            next: AtomicUsize::new(0),
            began: Instant::now(),
            time_max: load.time_max,
        });
        let count = load.operations.len();
        let latencies = self.runtime.block_on(async {
            let Some(every) = load.flush_every() else { return together(&shared, load.pattern, count).await };
            let mut latencies = Vec::with_capacity(count);
            for first in (0..count).step_by(every as usize) {
                shared.next.store(first, Ordering::Relaxed);
                latencies.extend(together(&shared, load.pattern, count.min(first + every as usize)).await?);
                self.disk.flush().await?;
                if shared.began.elapsed() > load.time_max {
                    break;
                }
            }
            Ok(latencies)
        })?;
        Ok(Samples { elapsed: shared.began.elapsed(), latencies })
    }
}
