//! Random operations through NBD against a model in memory, over several connections, while a replica is killed and
//! restarted again and again (P1, P2, P5).
//!
//! Each connection has every fourth stripe of the volume to itself, so that what it must read follows from what it wrote;
//! stripes are smaller than objects, so that connections meet in objects. Writes, zeroes, trims, reads, flushes and statuses of
//! all sizes; after each kill a snapshot is taken, and the first ones must stay as they were. At the end everything is read
//! through every node.
//!
//! `cargo run --release -p tests --bin nbdmodel -- --operations 1000000 --kill-every 20`. Exit code 1 on a difference.

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::Parser;
use tests::nbd_client::{FLAG_FUA, NbdClient, Style, command};
use tests::sectors::fill_random;
use tests::sim::Random;
use tests::spawn::Cluster;

const CONNECTIONS: u64 = 4;
/// Of one connection; not a multiple of anything that the server has.
const STRIPE_BYTES: u64 = 192 << 10;
const VOLUME_BYTES: u64 = 48 << 20;
const OPERATION_BYTES_MAX: u64 = 64 << 10;
/// Snapshots that are kept to the end; later ones are deleted at once.
const SNAPSHOTS_MAX: usize = 4;

#[derive(Parser)]
#[command(about = "Random operations through NBD against a model")]
struct Arguments {
    /// Over all connections.
    #[arg(long, default_value_t = 20_000)]
    operations: u64,
    /// Seconds between two kills of a node that is not the gateway.
    #[arg(long, default_value_t = 5)]
    kill_every: u64,
    /// Repeats the decisions of an earlier run; drawn from the clock if absent.
    #[arg(long)]
    seed: Option<u64>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seed = arguments.seed.unwrap_or(now.as_micros() as u64 & 0xffff_ffff);
    println!("seed {seed}");
    match run(&arguments, seed) {
        Ok(kills) => {
            println!(
                "{} operations over {CONNECTIONS} connections, {kills} kills, 0 differences",
                arguments.operations
            );
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("seed {seed}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments, seed: u64) -> Result<u64> {
    let mut cluster = Cluster::three()?;
    cluster.dog(&["vdi", "create", "disk", &VOLUME_BYTES.to_string()])?.ok()?;
    let socket = cluster.node(0).store.join("nbd.sock");
    let (left, failed) = (AtomicU64::new(arguments.operations), AtomicBool::new(false));
    let mut model = vec![0; VOLUME_BYTES as usize];
    let mut kills = 0;
    let mut snapshots: Vec<(String, Vec<u8>)> = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let workers: Vec<_> = (0..CONNECTIONS)
            .map(|number| {
                let (socket, left, failed) = (&socket, &left, &failed);
                scope.spawn(move || {
                    let style = [Style::Simple, Style::Structured, Style::Extended][number as usize % 3];
                    let client = NbdClient::open(socket, "disk", style, &[])?;
                    let mut worker = Worker::new(client, number, seed ^ number << 40);
                    let result = worker.work(left, failed).with_context(|| format!("connection {number} ({style:?})"));
                    failed.fetch_or(result.is_err(), Ordering::Relaxed);
                    result.map(|()| worker.model)
                })
            })
            .collect();
        let mut random = Random::new(seed);
        let mut killed_at = Instant::now();
        let mut told_at = Instant::now();
        while left.load(Ordering::Relaxed) > 0 && !failed.load(Ordering::Relaxed) {
            std::thread::sleep(Duration::from_millis(20));
            if told_at.elapsed() > Duration::from_secs(10) {
                told_at = Instant::now();
                println!("{} operations left, {kills} kills", left.load(Ordering::Relaxed));
            }
            if killed_at.elapsed() > Duration::from_secs(arguments.kill_every) {
                killed_at = Instant::now();
                let victim = 1 + random.below(2) as usize;
                cluster.kill(victim)?;
                std::thread::sleep(Duration::from_millis(random.below(1500)));
                cluster.restart(victim)?;
                cluster.wait_recovered()?;
                kills += 1;
                let tag = format!("after-{kills}");
                cluster.dog(&["vdi", "snapshot", "-s", &tag, "disk"])?.ok()?;
                if snapshots.len() < SNAPSHOTS_MAX {
                    let content = read_all(&cluster, 0, &format!("disk@{tag}"))?;
                    snapshots.push((tag, content));
                } else {
                    cluster.dog(&["vdi", "delete", "-s", &tag, "disk"])?.ok()?;
                }
            }
        }
        for (number, worker) in workers.into_iter().enumerate() {
            let own = match worker.join() {
                Ok(result) => result?,
                Err(panic) => std::panic::resume_unwind(panic),
            };
            for stripe in (number as u64..VOLUME_BYTES / STRIPE_BYTES).step_by(CONNECTIONS as usize) {
                let range = (stripe * STRIPE_BYTES) as usize..((stripe + 1) * STRIPE_BYTES) as usize;
                model[range.clone()].copy_from_slice(&own[range]);
            }
        }
        Ok(())
    })?;
    for index in 0..3 {
        let seen = read_all(&cluster, index, "disk")?;
        let differs = seen.iter().zip(&model).position(|(seen, wanted)| seen != wanted);
        ensure!(differs.is_none(), "node {index} differs from the model at {differs:?}");
        for (tag, content) in &snapshots {
            let seen = read_all(&cluster, index, &format!("disk@{tag}"))?;
            ensure!(seen == *content, "snapshot {tag} changed, as node {index} has it");
        }
    }
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()?;
    Ok(kills)
}

fn read_all(cluster: &Cluster, index: usize, export: &str) -> Result<Vec<u8>> {
    let socket = cluster.node(index).store.join("nbd.sock");
    NbdClient::open(&socket, export, Style::Structured, &[])?.read_all()
}

struct Worker {
    client: NbdClient,
    number: u64,
    random: Random,
    /// The whole volume; only this connection's stripes count.
    model: Vec<u8>,
}

impl Worker {
    fn new(client: NbdClient, number: u64, seed: u64) -> Worker {
        Worker { client, number, random: Random::new(seed), model: vec![0; VOLUME_BYTES as usize] }
    }

    fn work(&mut self, left: &AtomicU64, failed: &AtomicBool) -> Result<()> {
        let take = |count: u64| count.checked_sub(1);
        while !failed.load(Ordering::Relaxed) && left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok() {
            self.operate()?;
        }
        self.client.flush()
    }

    /// A range inside one of this connection's stripes.
    fn range(&mut self) -> (u64, u64) {
        let stripes = VOLUME_BYTES / STRIPE_BYTES / CONNECTIONS;
        let start = (self.random.below(stripes) * CONNECTIONS + self.number) * STRIPE_BYTES;
        // Mostly whole blocks, as guests write; sometimes any bytes.
        let grain = if self.random.one_in(4) { 1 } else { 4096 };
        let length = (1 + self.random.below(OPERATION_BYTES_MAX / 4096)) * grain;
        let inside = self.random.below((STRIPE_BYTES - length) / grain + 1) * grain;
        (start + inside, length)
    }

    fn operate(&mut self) -> Result<()> {
        let (offset, length) = self.range();
        let own = offset as usize..(offset + length) as usize;
        let fua = if self.random.one_in(4) { FLAG_FUA } else { 0 };
        match self.random.below(100) {
            0..45 => {
                let mut bytes = vec![0; length as usize];
                fill_random(&mut bytes, &mut self.random);
                self.client.write(offset, &bytes, fua)?;
                self.model[own].copy_from_slice(&bytes);
            }
            45..55 => {
                self.client.must(command::WRITE_ZEROES, fua, offset, length, &[])?;
                self.model[own].fill(0);
            }
            55..62 => {
                self.client.must(command::TRIM, fua, offset, length, &[])?;
                self.model[own].fill(0);
            }
            62..64 => self.client.flush()?,
            64..65 => drop(self.client.must(command::CACHE, 0, offset, length, &[])?),
            _ => {
                let seen = self.client.read(offset, length)?;
                let differs = seen.iter().zip(&self.model[own]).position(|(seen, wanted)| seen != wanted);
                ensure!(
                    seen.len() as u64 == length && differs.is_none(),
                    "reading {length} bytes at {offset} differs from the model at {differs:?}"
                );
            }
        }
        Ok(())
    }
}
