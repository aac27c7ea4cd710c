//! Real `sheep` processes to which everything happens that may happen, and guests to whom nothing may.
//!
//! Nodes stand on hosts of a [`Network`], each with its store on a file system of its own whose power can be cut. Rounds of
//! trouble alternate with calm points, at which all faults are undone, all guests have stopped, and every volume is read back
//! through every node. What the guests were promised is judged by what judges the simulator: [`Oracle`], [`crate::linear`],
//! [`crate::promise`], [`crate::invariants`].
//!
//! | module | what it does |
//! |---|---|
//! | [`guests`] | reads and writes one volume through many nodes at once |
//! | [`own_guest`] | writes without waiting for the disks, discards, flushes |
//! | [`hardship`] | kills, pauses, cuts, fills, takes the power, and undoes it |
//! | [`calm`] | waits until all is well again, and compares |
//!
//! Always holds:
//! 1. The seed decides what happens and when; the machine's timing decides what it hits.
//! 2. Everything is gone at the end: processes, mounts, namespaces. After violations, and only then, the images of the stores
//!    and the logs of the nodes stay.

pub mod calm;
pub mod guests;
pub mod hardship;
pub mod own_guest;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::flock::{Driver, Flock};
use crate::loop_fs::{FsKind, LoopFs};
use crate::namespaces::Network;
use crate::oracle::Oracle;
use crate::sim::Random;
use guests::{Scene, SharedGuest, Volume};
use hardship::{Hardship, Tally};
use own_guest::OwnGuest;

/// Room for the journal, all volumes, and what is set aside while nodes come and go. Sparse; XFS wants 300 at least.
const STORE_MIB: u64 = 1024;
/// The volume that several guests share. Some objects on every node, and soon read.
const SHARED_MIB: u64 = 48;
/// The volume that a guest has to itself.
const OWN_MIB: u64 = 32;
const SHARED_GUESTS: u32 = 4;
const OWN_GUESTS: u64 = 2;
/// Between two calm points.
const ROUND: Duration = Duration::from_secs(45);
const STATUS_INTERVAL: Duration = Duration::from_secs(5);
/// How often faults are begun and undone: far below the shortest of them.
const TICK: Duration = Duration::from_millis(20);

/// What to run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// For how long. The round that has begun is finished.
    pub length: Duration,
    /// Decides what happens.
    pub seed: u64,
    /// How many.
    pub nodes: usize,
    /// Copies of every object.
    pub copies: usize,
    /// Nodes do not wait for their disks: promises are broken then, and the bench must find out.
    pub is_careless: bool,
}

/// What came of it.
#[derive(Debug, Default)]
pub struct Report {
    /// Reads, writes, discards and flushes that were answered.
    pub operations: u64,
    /// Writes and discards with unknown outcome.
    pub unknown: u64,
    /// Errors that guests were told, by number.
    pub refused: BTreeMap<u32, u64>,
    /// Calm points.
    pub calms: u64,
    /// What happened.
    pub tally: Tally,
    /// In words; empty if all is well.
    pub violations: Vec<String>,
    /// Where stores and logs are, after violations.
    pub kept: Option<PathBuf>,
}

/// The nodes, their disks, and the directory of these. Dropped in this order.
pub struct Bench {
    /// Processes and network.
    pub flock: Flock,
    /// By node.
    pub disks: Vec<LoopFs>,
    directory: tempfile::TempDir,
}

impl Bench {
    /// A cluster with empty volumes.
    fn new(plan: &Plan) -> Result<Bench> {
        let directory = tempfile::Builder::new().prefix("sheep-torture-").tempdir()?;
        let mut flock = Flock::on(Network::new(plan.nodes)?, Driver::Default)?;
        flock.quiet();
        let mut disks = Vec::new();
        for index in 0..plan.nodes {
            let kind = if index % 2 == 0 { FsKind::Xfs } else { FsKind::Ext4 };
            let disk = LoopFs::create(directory.path(), &format!("disk{index}"), kind, STORE_MIB)?;
            flock.place(index, disk.path().join("store"));
            if plan.is_careless {
                flock.set_arguments(index, &["-n"]);
            }
            disks.push(disk);
        }
        let mut bench = Bench { flock, disks, directory };
        bench.flock.start_all()?;
        bench.flock.wait_listed(plan.nodes)?;
        bench.flock.format(0, &["-c", &plan.copies.to_string()])?;
        bench.flock.wait_members(plan.nodes)?;
        Ok(bench)
    }

    fn create(&self, name: &str, size_mib: u64, salt: u64) -> Result<Volume> {
        self.flock.dog(0, &["vdi", "create", name, &format!("{size_mib}M")])?.ok()?;
        Ok(Volume::new(name, size_mib << 20, salt))
    }

    /// The NBD sockets, by node.
    fn doors(&self) -> Vec<PathBuf> {
        (0..self.flock.count()).map(|index| self.flock.store(index).join("nbd.sock")).collect()
    }

    /// Ends everything but leaves the images of the stores and the logs; gives where they are.
    fn keep(self) -> Result<PathBuf> {
        let logs: Vec<String> = (0..self.flock.count()).map(|index| self.flock.log(index)).collect();
        self.flock.end();
        drop(self.disks);
        let kept = self.directory.keep();
        for (index, log) in logs.into_iter().enumerate() {
            std::fs::write(kept.join(format!("node{index}.log")), log)?;
        }
        Ok(kept)
    }
}

/// Everybody who works on the volumes.
struct Guests {
    oracle: Oracle,
    shared: Volume,
    owners: Vec<OwnGuest>,
}

/// Runs a plan, until it is over or `is_interrupted`.
pub fn run(plan: &Plan, is_interrupted: &AtomicBool) -> Result<Report> {
    let mut random = Random::new(plan.seed);
    let mut bench = Bench::new(plan)?;
    let own = (0..OWN_GUESTS).map(|number| {
        let volume = bench.create(&format!("own{number}"), OWN_MIB, random.bits())?;
        Ok(OwnGuest::new(volume, random.bits()))
    });
    let owners = own.collect::<Result<Vec<OwnGuest>>>()?;
    let mut guests = Guests { oracle: Oracle::default(), shared: bench.create("shared", SHARED_MIB, 0)?, owners };
    let scene = Scene::new(bench.doors());
    let mut report = Report::default();
    let began = Instant::now();
    while began.elapsed() < plan.length && report.violations.is_empty() && !is_interrupted.load(Ordering::Relaxed) {
        let length = ROUND.min(plan.length.saturating_sub(began.elapsed()));
        let seed = random.bits();
        let started = Instant::now();
        let judged = round(&mut bench, &mut guests, &scene, &mut report.tally, plan, seed, length, is_interrupted);
        if is_interrupted.load(Ordering::Relaxed) {
            break;
        }
        report.violations.extend(judged.unwrap_or_else(|error| vec![format!("{error:#}")]));
        report.calms += 1;
        let clock = began.elapsed().as_secs();
        let calmed = started.elapsed().saturating_sub(length).as_secs();
        println!(
            "{clock} s, calm {} ({calmed} s to heal and compare): {}, {} violations",
            report.calms,
            scene.told(),
            report.violations.len()
        );
    }
    report.operations = scene.answered();
    report.unknown = scene.unknown();
    report.refused = scene.refused();
    if report.violations.is_empty() {
        bench.flock.end();
    } else {
        report.kept = Some(bench.keep().context("while stores and logs were put aside")?);
    }
    Ok(report)
}

/// Trouble for a while, then calm. Gives the violations that were found; an error is one too.
#[allow(clippy::too_many_arguments)]
fn round(
    bench: &mut Bench,
    guests: &mut Guests,
    scene: &Scene,
    tally: &mut Tally,
    plan: &Plan,
    seed: u64,
    length: Duration,
    is_interrupted: &AtomicBool,
) -> Result<Vec<String>> {
    let mut random = Random::new(seed);
    scene.open();
    let Guests { oracle, shared, owners } = guests;
    std::thread::scope(|scope| {
        for number in 0..SHARED_GUESTS {
            let guest = SharedGuest::new(number, shared.clone(), oracle.clone(), random.bits());
            scope.spawn(move || guest.run(scene));
        }
        for owner in owners.iter_mut() {
            scope.spawn(|| owner.run(scene));
        }
        let mut hardship = Hardship::new(bench, tally, random.bits(), plan.copies);
        let troubled = trouble(&mut hardship, scene, length, is_interrupted);
        let healed =
            troubled.and_then(|()| if is_interrupted.load(Ordering::Relaxed) { Ok(()) } else { hardship.heal() });
        scene.close();
        healed
    })?;
    if is_interrupted.load(Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    calm::violations(bench, shared, oracle, owners)
}

fn trouble(hardship: &mut Hardship<'_>, scene: &Scene, length: Duration, is_interrupted: &AtomicBool) -> Result<()> {
    let is_shown = std::io::stdout().is_terminal();
    let (began, mut shown_at) = (Instant::now(), Instant::now());
    while began.elapsed() < length && !is_interrupted.load(Ordering::Relaxed) {
        hardship.tick()?;
        std::thread::sleep(TICK);
        if is_shown && shown_at.elapsed() > STATUS_INTERVAL {
            shown_at = Instant::now();
            println!("  {}; {}", scene.told(), hardship.told());
        }
    }
    Ok(())
}

/// Where a node's image can be looked at afterwards.
pub fn hint(kept: &Path) -> String {
    format!("stores and logs are kept in {0}; `mount -o loop {0}/disk0.img /mnt` shows the first store", kept.display())
}
