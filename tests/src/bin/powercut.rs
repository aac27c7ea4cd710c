//! All nodes lose power at once, again and again, and nothing that was promised may be missing (P1, P2, P7).
//!
//! The stores lie on loop-mounted file systems. While two guests write (one write-through, one write-back with
//! flushes), all three processes are killed with signal 9 and the file systems drop what was not flushed. After the
//! restart every durable write must be there as seen through every node, all nodes must agree, `dog vdi check` must be
//! content, and the snapshot of an earlier round must not have changed.
//!
//! `cargo run --release -p tests --bin powercut -- --rounds 100 --fs both`; needs root. The seed that is printed
//! decides which blocks are written, how long each round lasts and in which order nodes come back; the machine's
//! timing decides the rest. Exit code 1 when a promise was broken.

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use tests::clients::Volume;
use tests::loop_fs::{FsKind, LoopFs};
use tests::sim::Random;
use tests::spawn::{Cluster, ClusterPlan};
use tests::writer::{After, Durability, Guest, WriterPlan, write_while};

const NODE_COUNT: usize = 3;
const VOLUME_BYTES: u64 = 32 << 20;
/// Room for the journal, two volumes, and one snapshot of each with everything overwritten since.
const STORE_MIB: u64 = 1536;
/// Rounds between two snapshots: long enough that most objects have been copied on write in between.
const SNAPSHOT_EVERY: u32 = 8;

#[derive(Parser)]
#[command(about = "Power cuts under load, and whether promises hold")]
struct Arguments {
    /// Power cuts on each file system.
    #[arg(long, default_value_t = 10)]
    rounds: u32,
    /// What the stores lie on.
    #[arg(long, value_enum, default_value_t = Kinds::Both)]
    fs: Kinds,
    /// Repeats the decisions of an earlier run; drawn from the clock if absent.
    #[arg(long)]
    seed: Option<u64>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Kinds {
    Ext4,
    Xfs,
    Both,
}

impl Kinds {
    fn list(self) -> &'static [FsKind] {
        match self {
            Kinds::Ext4 => &[FsKind::Ext4],
            Kinds::Xfs => &[FsKind::Xfs],
            Kinds::Both => &[FsKind::Ext4, FsKind::Xfs],
        }
    }
}

#[derive(Default)]
struct Tally {
    rounds: u32,
    acknowledged: u64,
    violations: u32,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let seed = arguments.seed.unwrap_or_else(seed_from_clock);
    println!("seed {seed}");
    if let Some(reason) = LoopFs::missing() {
        eprintln!("powercut: {reason}");
        return ExitCode::FAILURE;
    }
    let mut tally = Tally::default();
    let mut is_broken = false;
    for &kind in arguments.fs.list() {
        if let Err(error) = cut_power_repeatedly(kind, arguments.rounds, seed, &mut tally) {
            eprintln!("powercut: {kind:?}: {error:#}");
            is_broken = true;
        }
    }
    println!("{} rounds, {} writes acknowledged, {} violations", tally.rounds, tally.acknowledged, tally.violations);
    if is_broken || tally.violations > 0 { ExitCode::FAILURE } else { ExitCode::SUCCESS }
}

fn seed_from_clock() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |since| since.as_nanos() as u64)
}

fn cut_power_repeatedly(kind: FsKind, rounds: u32, seed: u64, tally: &mut Tally) -> Result<()> {
    let mut rng = Random::new(seed);
    let scratch = tempfile::Builder::new().prefix("sheep-power-").tempdir()?;
    let mut disks = Vec::new();
    for index in 0..NODE_COUNT {
        disks.push(LoopFs::create(scratch.path(), &format!("disk{}", index + 1), kind, STORE_MIB)?);
    }
    let plan = disks
        .iter()
        .enumerate()
        .fold(ClusterPlan::new(NODE_COUNT), |plan, (index, disk)| plan.store(index, &disk.path().join("store")));
    let mut cluster = plan.start_formatted(NODE_COUNT as u32)?;
    let mut guests = new_guests(&cluster, &mut rng)?;
    let mut frozen: Option<Frozen> = None;
    for round in 1..=rounds {
        let started = Instant::now();
        let gateway = rng.below(NODE_COUNT as u64) as usize;
        let duration = Duration::from_millis(100 + rng.below(1200));
        let port = cluster.node(gateway).port;
        let outcomes = write_while(&mut guests, port, || {
            std::thread::sleep(duration);
            cluster.kill_together(&shuffled(&mut rng))
        })?;
        for disk in &mut disks {
            disk.cut_power()?;
        }
        for disk in &mut disks {
            disk.power_on()?;
        }
        let restarting = Instant::now();
        start_all(&mut cluster, &shuffled(&mut rng))?;
        let restart = restarting.elapsed();
        let acknowledged: u64 = outcomes.iter().map(|outcome| outcome.acknowledged_count).sum();
        tally.rounds += 1;
        tally.acknowledged += acknowledged;
        let torn = verify(&cluster, &mut guests, frozen.as_ref());
        let verdict = match &torn {
            Ok(count) => format!("kept, {count} unacknowledged writes torn"),
            Err(error) => format!("VIOLATION\n{error:#}"),
        };
        println!(
            "{kind:?} round {round}: through node {}, {:.1} s of writes, {acknowledged} acknowledged, {} flushes, \
             restart {restart:.1?}, {verdict} ({:.1?})",
            gateway + 1,
            duration.as_secs_f64(),
            outcomes.iter().map(|outcome| outcome.flush_count).sum::<u64>(),
            started.elapsed()
        );
        if torn.is_err() {
            // What follows would repeat the same complaint: the ledger and the store have parted.
            tally.violations += 1;
            return Ok(());
        }
        if round % SNAPSHOT_EVERY == 0 {
            frozen = Some(Frozen::replace(frozen.as_ref(), &cluster, round)?);
        }
    }
    cluster.finish()
}

fn new_guests(cluster: &Cluster, rng: &mut Random) -> Result<Vec<Guest>> {
    let mut client = cluster.client(0)?;
    let through = WriterPlan { depth: 16, durability: Durability::WriteThrough, seed: rng.bits() };
    let back = WriterPlan { depth: 16, durability: Durability::WriteBack { flush_every: 50 }, seed: rng.bits() };
    Ok(vec![
        Guest::new(&mut client, "through", VOLUME_BYTES, through)?,
        Guest::new(&mut client, "back", VOLUME_BYTES, back)?,
    ])
}

/// The indexes of all nodes, in an order that the seed decides.
fn shuffled(rng: &mut Random) -> Vec<usize> {
    let mut order: Vec<usize> = (0..NODE_COUNT).collect();
    for last in (1..NODE_COUNT).rev() {
        order.swap(last, rng.below(last as u64 + 1) as usize);
    }
    order
}

fn start_all(cluster: &mut Cluster, order: &[usize]) -> Result<()> {
    for &index in order {
        cluster.launch(index)?;
    }
    for &index in order {
        cluster.wait_serving(index)?;
    }
    cluster.wait_members(NODE_COUNT)?;
    cluster.wait_running()
}

/// Compares every node with the promises and the nodes with each other; gives the number of torn blocks.
fn verify(cluster: &Cluster, guests: &mut [Guest], frozen: Option<&Frozen>) -> Result<usize> {
    let mut torn_count = 0;
    for guest in guests.iter_mut() {
        let mut first = None;
        for index in 0..NODE_COUNT {
            let mut client = cluster.client(index)?;
            let seen = guest
                .ledger
                .verify(&mut client, &guest.name, After::PowerLoss)
                .with_context(|| format!("as node {} has it", index + 1))?;
            match &first {
                None => first = Some(seen),
                Some(first) => ensure!(*first == seen, "node {} sees another {} than node 1", index + 1, guest.name),
            }
        }
        let seen = first.context("there are nodes")?;
        torn_count += guest.ledger.torn_count(&seen);
        guest.ledger.hold_to(&seen);
        // Another order of blocks in the next round.
        guest.plan.seed = guest.plan.seed.wrapping_add(1);
        let check = cluster.dog(&["vdi", "check", &guest.name])?.ok()?;
        ensure!(check.err().trim().is_empty() && !check.out().contains("fixed"), "copies differed: {check}");
    }
    if let Some(frozen) = frozen {
        frozen.compare(cluster)?;
    }
    Ok(torn_count)
}

/// A snapshot of every volume, and what it held when it was taken.
struct Frozen {
    tag: String,
    contents: Vec<(&'static str, Vec<u8>)>,
}

impl Frozen {
    /// Deletes the older snapshot and takes a new one.
    fn replace(older: Option<&Frozen>, cluster: &Cluster, round: u32) -> Result<Frozen> {
        let tag = format!("round{round}");
        let mut contents = Vec::new();
        for name in ["through", "back"] {
            if let Some(older) = older {
                cluster.dog(&["vdi", "delete", "-s", &older.tag, name])?.ok()?;
            }
            cluster.dog(&["vdi", "snapshot", "-s", &tag, name])?.ok()?;
            contents.push((name, read_snapshot(cluster, name, &tag)?));
        }
        Ok(Frozen { tag, contents })
    }

    fn compare(&self, cluster: &Cluster) -> Result<()> {
        for (name, content) in &self.contents {
            ensure!(read_snapshot(cluster, name, &self.tag)? == *content, "snapshot {} of {name} changed", self.tag);
        }
        Ok(())
    }
}

fn read_snapshot(cluster: &Cluster, name: &str, tag: &str) -> Result<Vec<u8>> {
    let mut client = cluster.client(1)?;
    let mut content = Vec::new();
    Volume::open(&mut client, name, tag)?.read_all(&mut client, |_, bytes| {
        content.extend_from_slice(bytes);
        Ok(())
    })?;
    Ok(content)
}
