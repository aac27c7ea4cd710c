//! Measures the data path beside a raw file behind `qemu-nbd` and a bare loop, in one run, and prints ratios.
//!
//! `cargo run --release -p tests --bin bench -- [--through native|nbd|layer] [--runs N] [--json FILE] [--plot FILE.svg] [--quick]
//! [PATTERN...]` starts three sheep on loopback with a volume in three copies, `qemu-nbd --cache=none --aio=io_uring` on a raw file
//! in the same directory, and three threads that append and flush as a replicated write must, and puts the same load on all of
//! them in turn: one connection, so many requests under way, offsets that follow from a seed. Volumes are written in full before
//! anything is measured, unless the first write is what is measured. Durable means: the native client asks for write-through; the
//! NBD client sets FUA. CPU is that of all server processes together, user and system, per operation.
//!
//! What is no load runs when it is named: `start-up` (with `--objects N`), `recovery`, `snapshot`. `--plot` draws latency over load of
//! ours and of `qemu-nbd`; with `--plot` and no pattern, nothing else is measured.
//!
//! The figures hold for this machine and this moment; only the ratios mean something elsewhere.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::Parser;
use serde_json::{Map, Value};
use tests::bench::comparison::{self, Plan};
use tests::bench::patterns::{PATTERNS, Pattern};
use tests::bench::rig::{Rig, Through};
use tests::bench::{OBJECT_BYTES, first_writes, plot, recovery, start_up, sweep};

#[derive(Parser)]
#[command(about = "Measures a cluster on this machine beside qemu-nbd on a raw file and a bare loop of appends")]
struct Arguments {
    /// Write everything that was measured to this file as well, as JSON.
    #[arg(long)]
    json: Option<PathBuf>,
    /// A quarter of the operations.
    #[arg(long)]
    quick: bool,
    /// How our volume is reached.
    #[arg(long, value_enum, default_value = "native")]
    through: Through,
    /// Repetitions, ours and the references in turn; the medians are told.
    #[arg(long, default_value_t = 1)]
    runs: usize,
    /// Volume size, MiB.
    #[arg(long, default_value_t = 1024)]
    size_mib: u64,
    /// Draw latency over load at depths from 1 to 64 into this file, as SVG.
    #[arg(long)]
    plot: Option<PathBuf>,
    /// Objects of the store that `start-up` makes.
    #[arg(long, default_value_t = 1_000_000)]
    objects: u64,
    /// Only patterns whose name contains one of these; `start-up`, `recovery` and `snapshot` by their whole names.
    patterns: Vec<String>,
}

type Extra = (&'static str, fn(&Arguments) -> Result<Value>);

/// What is no load.
const EXTRAS: &[Extra] = &[
    ("start-up", |arguments| start_up::run(arguments.objects)),
    ("recovery", |arguments| recovery::run(arguments.size_mib << 20, arguments.runs)),
    ("snapshot", |_| first_writes::run()),
];

/// The patterns that the words choose: all without words, none if every word names something else.
fn chosen(arguments: &Arguments) -> Result<Vec<Pattern>> {
    let is_extra = |word: &str| EXTRAS.iter().any(|(name, _)| *name == word);
    let words: Vec<&String> = arguments.patterns.iter().filter(|word| !is_extra(word)).collect();
    let all = arguments.patterns.is_empty() && arguments.plot.is_none();
    let named = |pattern: &&Pattern| all || words.iter().any(|word| pattern.name.contains(word.as_str()));
    let chosen: Vec<Pattern> = PATTERNS.iter().filter(named).cloned().collect();
    let names = || PATTERNS.iter().map(|pattern| pattern.name).collect::<Vec<&str>>().join(", ");
    ensure!(!chosen.is_empty() || words.is_empty(), "no pattern has such a name; there are: {}", names());
    Ok(chosen)
}

fn loads(arguments: &Arguments, patterns: &[Pattern], report: &mut Map<String, Value>) -> Result<()> {
    let mut rig = Rig::start(arguments.through, arguments.size_mib << 20)?;
    println!("reference: {}", rig.reference_shown());
    println!(
        "three sheep on loopback, one volume of {} MiB in three copies, one disk for all, through {}",
        arguments.size_mib,
        arguments.through.shown()
    );
    report.insert("through".to_owned(), arguments.through.shown().into());
    if !patterns.is_empty() {
        let plan = Plan { runs: arguments.runs, is_quick: arguments.quick };
        let rows = comparison::run(&mut rig, patterns, plan)?;
        comparison::print_costs(&rows);
        report.insert("patterns".to_owned(), comparison::json(&rows));
    }
    if let Some(path) = &arguments.plot {
        let points = sweep::run(&mut rig, arguments.quick)?;
        fs::write(path, plot::svg(&points))?;
        report.insert("latency_over_load".to_owned(), sweep::json(&points));
    }
    rig.finish()
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let size_bytes = arguments.size_mib << 20;
    ensure!(
        size_bytes >= OBJECT_BYTES && size_bytes.is_multiple_of(OBJECT_BYTES),
        "the size must be a multiple of 4 MiB"
    );
    ensure!(arguments.runs > 0, "at least one run");
    let patterns = chosen(&arguments)?;
    let mut report = Map::new();
    if !patterns.is_empty() || arguments.plot.is_some() {
        loads(&arguments, &patterns, &mut report)?;
    }
    for (name, measure) in EXTRAS {
        if arguments.patterns.iter().any(|word| word == name) {
            report.insert((*name).to_owned(), measure(&arguments)?);
        }
    }
    if let Some(path) = &arguments.json {
        fs::write(path, serde_json::to_string_pretty(&Value::Object(report))?)?;
    }
    Ok(())
}
