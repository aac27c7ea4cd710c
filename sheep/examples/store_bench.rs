//! Speed of a store on a real directory: `cargo run --release --example store_bench -p sheep -- DIRECTORY [SECONDS]`.
//!
//! The directory must be empty or missing; it is filled with a store of some gigabytes and left there.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep::store::{Durability, Store, StoreConfig, Write, WriteKind};
use sheep::world::World;
use sheep_core::stamp::{Epoch, Stamp, Version};

const OBJECT_BYTES: u64 = 4 << 20;
const OBJECTS: u64 = 256;

struct Bench {
    store: Store,
    sequence: AtomicU64,
    random: AtomicU64,
}

impl Bench {
    fn version(&self) -> Version {
        let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
        Version { epoch: Epoch(1), stamp: Stamp { generation: 1, sequence } }
    }

    fn random(&self) -> u64 {
        let mixed = self.random.fetch_add(0x9e37_79b9_7f4a_7c15, Ordering::Relaxed);
        let mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb) >> 7
    }

    async fn write(&self, object: u64, offset: u64, data: Bytes, durability: Durability) {
        let permit = self.store.admit(data.len() as u64).await;
        let kind = match self.store.entry(Oid::from_raw(object)) {
            Some(_) => WriteKind::Overwrite,
            None => WriteKind::Create { size_bytes: OBJECT_BYTES },
        };
        let write = Write { oid: Oid::from_raw(object), version: self.version(), offset, data, kind, durability };
        match self.store.submit(permit, write) {
            Ok(ticket) => ticket.await.expect("the disk works"),
            Err(error) => panic!("{error}"),
        }
    }
}

/// Runs `work` over and over in `tasks` tasks for the given time and prints what was reached.
async fn measure<W, F>(name: &str, tasks: usize, seconds: u64, bytes: u64, work: W)
where
    W: Fn() -> F + Clone + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let start = Instant::now();
    let cpu = cpu_time();
    let end = start + Duration::from_secs(seconds);
    let running: Vec<_> = (0..tasks)
        .map(|_| {
            let work = work.clone();
            tokio::spawn(async move {
                let mut count = 0_u64;
                while Instant::now() < end {
                    work().await;
                    count += 1;
                }
                count
            })
        })
        .collect();
    let mut count = 0;
    for task in running {
        count += task.await.expect("no task panics");
    }
    let rate = count as f64 / start.elapsed().as_secs_f64();
    println!(
        "{name:34} {rate:9.0}/s {:9.1} MiB/s {:8.1} us each {:6.1} us CPU each",
        rate * bytes as f64 / f64::from(1 << 20),
        1e6 * tasks as f64 / rate,
        (cpu_time() - cpu) * 1e6 / count as f64,
    );
}

/// Seconds of CPU that this process has used.
fn cpu_time() -> f64 {
    let used = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    used.tv_sec as f64 + used.tv_nsec as f64 / 1e9
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let directory = arguments.next().ok_or("usage: store_bench DIRECTORY [SECONDS]")?;
    let seconds = arguments.next().map_or(Ok(3), |text| text.parse())?;
    let store = Store::open(World::real(8)?, StoreConfig::new(directory)).await?;
    let bench = Arc::new(Bench { store, sequence: AtomicU64::new(1), random: AtomicU64::new(1) });
    let large = Bytes::from((0..1 << 20).map(|byte: u32| (byte >> 5) as u8).collect::<Vec<u8>>());
    let small = large.slice(..4096);

    let start = Instant::now();
    for piece in 0..OBJECTS * 4 {
        bench.write(piece / 4, (piece % 4) << 20, large.clone(), Durability::WriteBack).await;
    }
    bench.store.flush().await?;
    let filled = start.elapsed().as_secs_f64();
    println!("fill, 1 MiB write-back, one task   {:9.1} MiB/s", OBJECTS as f64 * 4.0 / filled);
    bench.store.checkpoint().await?;
    println!("  with the checkpoint              {:9.1} MiB/s", OBJECTS as f64 * 4.0 / start.elapsed().as_secs_f64());

    for (name, tasks, durability) in [
        ("4 KiB durable writes, 1 task", 1, Durability::Durable),
        ("4 KiB durable writes, 32 tasks", 32, Durability::Durable),
        ("4 KiB write-back, 1 task", 1, Durability::WriteBack),
        ("4 KiB write-back, 32 tasks", 32, Durability::WriteBack),
    ] {
        let (bench, small) = (bench.clone(), small.clone());
        measure(name, tasks, seconds, 4096, move || {
            let (bench, small) = (bench.clone(), small.clone());
            async move {
                let (object, block) = (bench.random() % OBJECTS, bench.random() % (OBJECT_BYTES / 4096));
                bench.write(object, block * 4096, small, durability).await;
            }
        })
        .await;
    }
    for (name, tasks, length) in
        [("4 KiB reads, 1 task", 1, 4096), ("4 KiB reads, 32 tasks", 32, 4096), ("1 MiB reads, 1 task", 1, 1 << 20)]
    {
        let bench = bench.clone();
        measure(name, tasks, seconds, length, move || {
            let bench = bench.clone();
            async move {
                let (object, piece) = (bench.random() % OBJECTS, bench.random() % (OBJECT_BYTES / length));
                let bytes = bench.store.read(Oid::from_raw(object), piece * length, length as usize).await;
                assert_eq!(bytes.expect("the object is there").len() as u64, length);
            }
        })
        .await;
    }
    for (name, tasks) in [("1 MiB durable writes, 1 task", 1), ("1 MiB durable writes, 8 tasks", 8)] {
        let (bench, large) = (bench.clone(), large.clone());
        measure(name, tasks, seconds, 1 << 20, move || {
            let (bench, large) = (bench.clone(), large.clone());
            async move { bench.write(bench.random() % OBJECTS, 0, large, Durability::Durable).await }
        })
        .await;
    }
    let start = Instant::now();
    bench.store.close().await?;
    println!("close: {:.0} ms", start.elapsed().as_secs_f64() * 1e3);
    Ok(())
}
