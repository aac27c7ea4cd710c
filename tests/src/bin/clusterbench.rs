//! Measures a cluster of five nodes with the default driver, on hosts of their own: how long guests wait when something
//! happens, how soon nodes know each other, what an idle node costs.
//!
//! `cargo run --release -p tests --bin clusterbench -- [--runs N] [--json FILE] [PATTERN...]`, as root. A guest writes 4 KiB
//! blocks durably, four at a time, through one node that nothing happens to; a stall is the longest that any one write took
//! around the event. The figures hold for this machine: five nodes share its cores and its disk.

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use tests::bench::process::{cpu_seconds, resident_mib};
use tests::flock::{Driver, Flock};
use tests::namespaces::Network;
use tests::workload::{Disk, Load, LoadPlan, Outcome, Record};

const NODES: usize = 5;
const BLOCKS: u32 = 64;
const DEPTH: usize = 4;
/// Nothing that is measured here may take as long.
const PATIENCE: Duration = Duration::from_mins(1);

#[derive(Parser)]
#[command(about = "Measures what guests notice of failures, and what an idle cluster costs")]
struct Arguments {
    /// Repetitions of each event.
    #[arg(long, default_value_t = 10)]
    runs: usize,
    /// How long to watch an idle cluster, seconds.
    #[arg(long, default_value_t = 60)]
    idle_seconds: u64,
    /// Write the figures to this file as well, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// Only cases whose name contains one of these.
    patterns: Vec<String>,
}

/// What a case gave, one value per run.
struct Figures {
    unit: &'static str,
    values: Vec<f64>,
    /// What else is worth saying.
    note: String,
}

impl Figures {
    fn milliseconds(values: &[Duration], note: String) -> Figures {
        Figures { unit: "ms", values: values.iter().map(|value| value.as_secs_f64() * 1e3).collect(), note }
    }

    /// The smallest, the middle and the largest value.
    fn spread(&self) -> [f64; 3] {
        let mut sorted = self.values.clone();
        sorted.sort_by(f64::total_cmp);
        let at = |index: usize| sorted.get(index).copied().unwrap_or(f64::NAN);
        [at(0), at(sorted.len() / 2), at(sorted.len().saturating_sub(1))]
    }
}

type Case = (&'static str, fn(&Arguments) -> Result<Vec<Figures>>);

const CASES: &[Case] = &[
    ("five nodes list each other", list),
    ("kill -9 of a follower", |arguments| stalls(arguments, false, Event::Kill)),
    ("kill -9 of the leader", |arguments| stalls(arguments, true, Event::Kill)),
    ("link of a follower down", |arguments| stalls(arguments, false, Event::Unplug)),
    ("link of the leader down", |arguments| stalls(arguments, true, Event::Unplug)),
    ("rolling restart", rolling),
    ("lease hand-over", hand_over),
    ("idle", idle),
];

#[derive(Clone, Copy, PartialEq, Eq)]
enum Event {
    Kill,
    Unplug,
}

fn flock() -> Result<Flock> {
    let mut flock = Flock::on(Network::new(NODES)?, Driver::Default)?;
    flock.quiet();
    flock.start_all()?;
    flock.wait_listed(NODES)?;
    flock.format(0, &["-c", "3"])?;
    flock.wait_members(NODES)?;
    Ok(flock)
}

fn list(arguments: &Arguments) -> Result<Vec<Figures>> {
    let mut times = Vec::new();
    for _ in 0..arguments.runs {
        let mut flock = Flock::on(Network::new(NODES)?, Driver::Default)?;
        flock.quiet();
        let started = Instant::now();
        for index in 0..NODES {
            flock.launch(index)?;
        }
        flock.wait_listed(NODES)?;
        times.push(started.elapsed());
        flock.finish()?;
    }
    Ok(vec![Figures::milliseconds(&times, "from the start of the first to the last list, polled".to_owned())])
}

/// Ends a load; no write may have failed and one history must explain all.
fn settle(record: &Record, load: Load) -> Result<Outcome> {
    let outcome = load.stop()?;
    ensure!(outcome.refused.is_empty(), "guests got errors: {:?}", outcome.refused);
    record.check()?;
    Ok(outcome)
}

fn stalls(arguments: &Arguments, of_leader: bool, event: Event) -> Result<Vec<Figures>> {
    let mut flock = flock()?;
    let record = Record::new(Disk::create(&mut flock.client(0)?, "disk", BLOCKS)?);
    let (mut stalls, mut ordinary, mut rates) = (Vec::new(), Vec::new(), Vec::new());
    for run in 0..arguments.runs {
        let leader = flock.leader(0)?;
        let victim = if of_leader { leader } else { (leader + 1 + run % (NODES - 1)) % NODES };
        let gateway = (0..NODES).find(|index| *index != victim && *index != leader).context("five nodes")?;
        let load = Load::start(&record, &LoadPlan::writes(flock.socket(gateway), DEPTH, run as u64));
        load.wait_progress(&[0], 100, PATIENCE)?;
        let begin = record.now();
        std::thread::sleep(Duration::from_secs(2));
        let happened = record.now();
        match event {
            Event::Kill => flock.kill(&[victim])?,
            Event::Unplug => flock.network.unplug(victim, 0)?,
        }
        std::thread::sleep(Duration::from_secs(if event == Event::Kill { 3 } else { 7 }));
        load.wait_progress(&[0], 100, PATIENCE)?;
        let outcome = settle(&record, load)?;
        let longest = |from: u64, to: u64| {
            let within = outcome.times.iter().filter(|(_, start, end)| *end >= from && *start < to);
            Duration::from_nanos(within.map(|(_, start, end)| end - start).max().unwrap_or(0))
        };
        stalls.push(longest(happened, u64::MAX));
        ordinary.push(longest(begin, happened));
        rates.push(outcome.answered_between(&[0], begin, happened) as f64 / 2.0);
        match event {
            Event::Kill => flock.start(victim)?,
            Event::Unplug => flock.network.plug(victim, 0)?,
        }
        flock.wait_members(NODES)?;
        flock.wait_recovered()?;
    }
    flock.finish()?;
    let before = Figures::milliseconds(&ordinary, String::new()).spread();
    let rate = Figures { unit: "", values: rates, note: String::new() }.spread()[1];
    let note = format!("longest in the 2 s before: median {:.1}, max {:.1}; {rate:.0} writes/s", before[1], before[2]);
    Ok(vec![Figures::milliseconds(&stalls, note)])
}

fn rolling(arguments: &Arguments) -> Result<Vec<Figures>> {
    let mut flock = flock()?;
    let record = Record::new(Disk::create(&mut flock.client(0)?, "disk", BLOCKS)?);
    let (mut stalls, mut absences, mut cuts) = (Vec::new(), Vec::new(), 0);
    for run in 0..arguments.runs {
        let gateway = run % NODES;
        let load = Load::start(&record, &LoadPlan::writes(flock.socket(gateway), DEPTH, run as u64));
        load.wait_progress(&[0], 100, PATIENCE)?;
        for index in (0..NODES).map(|step| (gateway + 1 + step) % NODES) {
            let left = Instant::now();
            let code = flock.terminate(index)?;
            ensure!(code == Some(0), "node {index} left with {code:?}");
            flock.start(index)?;
            if index == gateway {
                // The guest connects again; this is how long it had nobody to ask.
                load.wait_progress(&[0], 1, PATIENCE)?;
                absences.push(left.elapsed());
            }
            flock.wait_members(NODES)?;
            load.wait_progress(&[0], 100, PATIENCE)?;
            flock.wait_recovered()?;
        }
        let outcome = settle(&record, load)?;
        cuts += outcome.cuts[0];
        stalls.push(outcome.longest_stall);
    }
    flock.finish()?;
    Ok(vec![
        Figures::milliseconds(&stalls, format!("no error; {cuts} writes cut off by the restart of their own node")),
        Figures::milliseconds(&absences, "the gateway itself, from its signal to the first answer after".to_owned()),
    ])
}

/// Four writers that all change to the other of two gateways at the same moment, again and again.
fn hand_over(arguments: &Arguments) -> Result<Vec<Figures>> {
    const TERM: Duration = Duration::from_millis(250);
    const HAND_OVERS_PER_RUN: usize = 10;
    let flock = flock()?;
    let disk = Disk::create(&mut flock.client(0)?, "disk", BLOCKS)?;
    let gateways = [1, 2];
    let current = AtomicUsize::new(0);
    let stop = AtomicBool::new(false);
    let value = AtomicU64::new(1);
    // Gateway, moment of the answer, how long it took.
    let answers: Mutex<Vec<(usize, Instant, Duration)>> = Mutex::default();
    let mut flips: Vec<(usize, Instant)> = Vec::new();
    std::thread::scope(|scope| -> Result<()> {
        let write = |worker: u32| -> Result<()> {
            let mut clients = [flock.client(gateways[0])?, flock.client(gateways[1])?];
            let mut mine = Vec::new();
            let mut block = worker;
            while !stop.load(Ordering::Relaxed) {
                let gateway = current.load(Ordering::SeqCst);
                let sent = Instant::now();
                disk.write(&mut clients[gateway], block % BLOCKS, value.fetch_add(1, Ordering::Relaxed))?;
                let answered = Instant::now();
                mine.push((gateway, answered, answered - sent));
                block += DEPTH as u32;
            }
            answers.lock().unwrap_or_else(PoisonError::into_inner).append(&mut mine);
            Ok(())
        };
        let writers: Vec<_> = (0..DEPTH as u32).map(|worker| scope.spawn(move || write(worker))).collect();
        for _ in 0..arguments.runs * HAND_OVERS_PER_RUN {
            std::thread::sleep(TERM);
            let next = 1 - current.load(Ordering::SeqCst);
            flips.push((next, Instant::now()));
            current.store(next, Ordering::SeqCst);
        }
        std::thread::sleep(TERM);
        stop.store(true, Ordering::Relaxed);
        for writer in writers {
            writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        }
        Ok(())
    })?;
    let answers = answers.into_inner().unwrap_or_else(PoisonError::into_inner);
    let mut pauses = Vec::new();
    for &(gateway, flipped) in &flips {
        let after = answers.iter().filter(|(through, at, _)| *through == gateway && *at > flipped);
        let first = after.map(|(_, at, _)| *at).min().context("no answer through the new gateway")?;
        pauses.push(first - flipped);
    }
    let mut took: Vec<Duration> = answers.iter().map(|(_, _, took)| *took).collect();
    took.sort();
    flock.finish()?;
    let (count, median) = (took.len(), took.get(took.len() / 2).copied().unwrap_or_default());
    let note = format!("from the change to the first answer through the other; {count} writes, median {median:.1?}");
    Ok(vec![Figures::milliseconds(&pauses, note)])
}

/// One value per node.
fn idle(arguments: &Arguments) -> Result<Vec<Figures>> {
    let flock = flock()?;
    let pids: Vec<u32> = (0..NODES).filter_map(|index| flock.pid(index)).collect();
    std::thread::sleep(Duration::from_secs(5));
    let leader = flock.leader(0)?;
    let usage = || pids.iter().map(|&pid| cpu_seconds(pid)).collect::<Result<Vec<f64>>>();
    let before = usage()?;
    let began = Instant::now();
    std::thread::sleep(Duration::from_secs(arguments.idle_seconds));
    let elapsed = began.elapsed().as_secs_f64();
    let cpu: Vec<f64> =
        usage()?.iter().zip(&before).map(|(after, before)| (after - before) / elapsed * 100.0).collect();
    let memory = pids.iter().map(|&pid| resident_mib(pid)).collect::<Result<Vec<f64>>>()?;
    flock.finish()?;
    let note = format!("of a core, per node, over {elapsed:.0} s; the leader {:.2}", cpu[leader]);
    Ok(vec![
        Figures { unit: "%", values: cpu, note },
        Figures { unit: "MiB", values: memory, note: "resident, per node".to_owned() },
    ])
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    if let Some(why) = Network::why_not() {
        bail!("{why}");
    }
    println!("{:<28} {:>9} {:>9} {:>9} {:<4} {:>4}  note", "case", "min", "median", "max", "", "runs");
    let mut report = Vec::new();
    for (name, measure) in CASES {
        if !arguments.patterns.is_empty() && !arguments.patterns.iter().any(|word| name.contains(word.as_str())) {
            continue;
        }
        for figures in measure(&arguments).with_context(|| (*name).to_owned())? {
            let [min, median, max] = figures.spread();
            println!(
                "{name:<28} {min:>9.2} {median:>9.2} {max:>9.2} {:<4} {:>4}  {}",
                figures.unit,
                figures.values.len(),
                figures.note
            );
            report.push(serde_json::json!({
                "case": name, "unit": figures.unit, "min": min, "median": median, "max": max,
                "runs": figures.values, "note": figures.note,
            }));
        }
    }
    if let Some(path) = &arguments.json {
        fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    Ok(())
}
