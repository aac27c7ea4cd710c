//! Runs the patterns, ours and the references in turn within each run, and shows what came of it.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};

use super::figures::Figures;
use super::load::{Disk, Load};
use super::patterns::{Order, Pattern};
use super::process::{self, SyscallCounter};
use super::rig::Rig;

/// No load may take longer.
const TIME_MAX: Duration = Duration::from_secs(30);
/// Of the requests of a pattern, this part is done once more while system calls are counted: counting slows them down.
const COUNTED_PART: usize = 8;

/// How to go about it.
#[derive(Clone, Copy, Debug)]
pub struct Plan {
    /// Repetitions of which the medians are told.
    pub runs: usize,
    /// A quarter of the requests.
    pub is_quick: bool,
}

/// What came of a pattern, medians of all runs.
pub struct Row {
    /// Which.
    pub pattern: Pattern,
    /// Our nodes.
    pub ours: Figures,
    /// qemu-nbd, if it can do this.
    pub theirs: Option<Figures>,
    /// The bare loop, if it is one of its loads.
    pub bare_loop: Option<Figures>,
}

impl Row {
    /// Requests per second beside those of qemu-nbd.
    pub fn ratio(&self) -> Option<f64> {
        Some(self.ours.per_second / self.theirs.as_ref()?.per_second)
    }

    /// How many times as long as in the bare loop a request takes.
    pub fn times_loop(&self) -> Option<f64> {
        Some(self.bare_loop.as_ref()?.per_second / self.ours.per_second)
    }

    fn json(&self) -> Value {
        json!({
            "pattern": self.pattern.name, "bytes": self.pattern.bytes, "depth": self.pattern.depth,
            "sheep": self.ours.json(),
            "qemu_nbd": self.theirs.as_ref().map(Figures::json), "ratio": self.ratio(),
            "loop": self.bare_loop.as_ref().map(Figures::json), "times_loop": self.times_loop(),
        })
    }
}

/// One load on one disk, with what processes take for it.
pub fn measure(disk: &mut dyn Disk, load: &Load, pids: &[u32]) -> Result<Figures> {
    let cpu = || pids.iter().map(|&pid| process::cpu_seconds(pid)).collect::<Result<Vec<f64>>>();
    let (cpu_before, io_before) = (cpu()?, process::io(pids)?);
    let samples = disk.run(load)?;
    let (cpu_after, io_after) = (cpu()?, process::io(pids)?);
    let count = samples.latencies.len().max(1) as f64;
    let mut figures = Figures::of(samples).with_io(io_before, io_after, count);
    figures.cpu_us = cpu_after.iter().zip(cpu_before).map(|(after, before)| (after - before) * 1e6 / count).collect();
    figures.resident_mib = pids.iter().map(|&pid| process::resident_mib(pid)).collect::<Result<_>>()?;
    Ok(figures)
}

/// System calls per request.
fn count_syscalls(rig: &Rig, disk: &mut dyn Disk, load: &Load, pids: &[u32]) -> Result<f64> {
    let mut counter = SyscallCounter::start(rig.scratch(), pids)?;
    counter.begin()?;
    let samples = disk.run(load)?;
    Ok(counter.end()? as f64 / samples.latencies.len().max(1) as f64)
}

/// One pattern, all runs.
fn compare(rig: &mut Rig, pattern: &Pattern, plan: Plan, counts: bool) -> Result<Row> {
    let requests = pattern.requests(rig.size_bytes(pattern.volume), plan.is_quick);
    let payload = pattern.payload();
    let load = Load { pattern, operations: &requests, payload: &payload, time_max: TIME_MAX };
    let (mut ours, mut theirs, mut bare_loop) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..plan.runs {
        let mut disk = rig.ours(pattern.volume)?;
        ours.push(measure(&mut *disk, &load, &rig.our_pids())?);
        if pattern.has_reference() {
            let mut disk = rig.theirs(pattern.volume)?;
            theirs.push(measure(&mut *disk, &load, &[rig.their_pid(pattern.volume)])?);
        }
        if pattern.has_loop() {
            bare_loop.push(measure(rig.bare_loop(), &load, &[])?);
        }
    }
    let median = |runs: &[Figures]| (!runs.is_empty()).then(|| Figures::medians(runs));
    let mut row = Row {
        pattern: pattern.clone(),
        ours: Figures::medians(&ours),
        theirs: median(&theirs),
        bare_loop: median(&bare_loop),
    };
    if counts {
        let part = if pattern.order == Order::EachObject { 1 } else { COUNTED_PART };
        let load = Load { operations: &requests[..requests.len() / part], ..load };
        let mut disk = rig.ours(pattern.volume)?;
        row.ours.syscalls = Some(count_syscalls(rig, &mut *disk, &load, &rig.our_pids())?);
        if let Some(theirs) = &mut row.theirs {
            let mut disk = rig.theirs(pattern.volume)?;
            theirs.syscalls = Some(count_syscalls(rig, &mut *disk, &load, &[rig.their_pid(pattern.volume)])?);
        }
    }
    Ok(row)
}

/// Runs patterns and prints a line for each as it comes.
pub fn run(rig: &mut Rig, patterns: &[Pattern], plan: Plan) -> Result<Vec<Row>> {
    let counting = SyscallCounter::start(rig.scratch(), &rig.our_pids());
    if let Err(why) = &counting {
        println!("system calls are not counted: {why:#}");
    }
    let counts = counting.is_ok();
    drop(counting);
    println!(
        "{:<20} {:>8} {:>8} {:>8} {:>8} {:>8} {:>7} | {:>8} {:>8} {:>8} {:>7} {:>6} | {:>8} {:>8} {:>6}",
        "",
        "sheep/s",
        "p50 us",
        "p95",
        "p99",
        "p99.9",
        "cpu us",
        "nbd/s",
        "p50 us",
        "p99",
        "cpu us",
        "ratio",
        "loop/s",
        "p50 us",
        "times"
    );
    let mut rows = Vec::new();
    for pattern in patterns {
        let row = compare(rig, pattern, plan, counts)?;
        print_speed(&row);
        rows.push(row);
    }
    Ok(rows)
}

/// A number, or that there is none.
fn or_dash(value: Option<f64>, digits: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.digits$}"))
}

fn print_speed(row: &Row) {
    let [p50, p95, p99, p999] = row.ours.latency_us;
    let theirs = |value: fn(&Figures) -> f64, digits| or_dash(row.theirs.as_ref().map(value), digits);
    let bare_loop = |value: fn(&Figures) -> f64| or_dash(row.bare_loop.as_ref().map(value), 0);
    println!(
        "{:<20} {:>8.0} {p50:>8.0} {p95:>8.0} {p99:>8.0} {p999:>8.0} {:>7.1} | {:>8} {:>8} {:>8} {:>7} {:>6} | {:>8} {:>8} {:>6}",
        row.pattern.name,
        row.ours.per_second,
        row.ours.cpu_us_together(),
        theirs(|figures| figures.per_second, 0),
        theirs(|figures| figures.latency_us[0], 0),
        theirs(|figures| figures.latency_us[2], 0),
        theirs(Figures::cpu_us_together, 1),
        or_dash(row.ratio(), 2),
        bare_loop(|figures| figures.per_second),
        bare_loop(|figures| figures.latency_us[0]),
        or_dash(row.times_loop(), 2),
    );
}

/// What each request cost, as a second table. The first column of CPU is the node that the load goes to.
pub fn print_costs(rows: &[Row]) {
    println!(
        "\n{:<20} {:>24} {:>9} {:>8} {:>8} {:>8} {:>15} | {:>9}",
        "per request", "cpu us by process", "syscalls", "rchar", "wchar", "stored", "resident MiB", "nbd sysc."
    );
    for row in rows {
        let list = |values: &[f64], digits: usize| {
            values.iter().map(|value| format!("{value:.digits$}")).collect::<Vec<String>>().join(" ")
        };
        println!(
            "{:<20} {:>24} {:>9} {:>8.0} {:>8.0} {:>8.0} {:>15} | {:>9}",
            row.pattern.name,
            list(&row.ours.cpu_us, 1),
            or_dash(row.ours.syscalls, 1),
            row.ours.read,
            row.ours.written,
            row.ours.stored,
            list(&row.ours.resident_mib, 0),
            or_dash(row.theirs.as_ref().and_then(|theirs| theirs.syscalls), 1),
        );
    }
    println!(
        "rchar, wchar: bytes that the nodes together copied by read, write and their relatives; stored: bytes to disk or page \
         cache (/proc/PID/io). What goes by send, recv and io_uring is in none of them, so that the reference has no such figures."
    );
}

/// For a file.
pub fn json(rows: &[Row]) -> Value {
    rows.iter().map(Row::json).collect()
}
