//! Real nodes on hosts of their own to which everything happens that may happen, for hours, while guests read, write, flush and
//! discard; and whether every promise was kept.
//!
//! `cargo run --release -p tests --bin torture -- --minutes 60`, as root. The last line tells operations, kills, cuts and
//! violations; the exit code is 1 if there were any, and then stores and logs stay where the line before says.

use std::process::ExitCode;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::Parser;
use tests::loop_fs::LoopFs;
use tests::namespaces::Network;
use tests::torture::{Plan, hint, run};

const EXAMPLES: &str = "Examples:
  torture --minutes 10                 ten minutes with five nodes
  torture --minutes 60 --nodes 7       an hour with seven
  torture --minutes 5 --seed 42        the same kills and cuts as another run with seed 42

Needs root, the packages iproute2, nftables, util-linux, e2fsprogs and xfsprogs, loop devices, and `sheep` and `dog` of the same
build: cargo build --release -p sheep -p dog. Ctrl-C ends it after a moment, with nothing left behind.";

#[derive(Parser)]
#[command(about = "Kills, cuts, fills and unplugs real nodes under load, and compares with what guests were promised")]
#[command(after_help = EXAMPLES)]
struct Arguments {
    /// For how long.
    #[arg(long, default_value_t = 10)]
    minutes: u64,
    /// Decides what happens and when; drawn from the clock if absent.
    #[arg(long)]
    seed: Option<u64>,
    /// How many.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(3..=20))]
    nodes: u64,
    /// Starts nodes with --nosync, so that power losses lose what was acknowledged: shows that this bench finds it.
    #[arg(long)]
    careless: bool,
}

fn main() -> ExitCode {
    match torture(&Arguments::parse()) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("torture: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Gives the number of violations.
fn torture(arguments: &Arguments) -> Result<usize> {
    if let Some(reason) = LoopFs::missing().or_else(Network::why_not) {
        anyhow::bail!("{reason}");
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let seed = arguments.seed.unwrap_or(now.as_micros() as u64 & 0xffff_ffff);
    println!("seed {seed}");
    let is_interrupted = watch_signals()?;
    let length = Duration::from_secs(60 * arguments.minutes);
    let plan = Plan { length, seed, nodes: arguments.nodes as usize, copies: 3, is_careless: arguments.careless };
    let report = run(&plan, &is_interrupted)?;
    for violation in &report.violations {
        println!("violation: {violation}");
    }
    if let Some(kept) = &report.kept {
        println!("{}", hint(kept));
    }
    let (tally, count) = (report.tally, report.violations.len());
    println!(
        "{tally}; {} calm points, {} writes with unknown outcome, errors told {:?}",
        report.calms, report.unknown, report.refused
    );
    println!("{} operations, {} kills, {} cuts, {count} violations", report.operations, tally.kills, tally.cuts);
    Ok(count)
}

/// Set by the first Ctrl-C or SIGTERM.
fn watch_signals() -> Result<Arc<AtomicBool>> {
    use tokio::signal::unix::{SignalKind, signal};
    let is_interrupted = Arc::new(AtomicBool::new(false));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let watched = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?)
    };
    let told = Arc::clone(&is_interrupted);
    std::thread::Builder::new()
        .spawn(move || {
            let (mut interrupt, mut terminate) = watched;
            runtime.block_on(async {
                tokio::select! { _ = interrupt.recv() => {}, _ = terminate.recv() => {} }
            });
            println!("ending");
            told.store(true, Ordering::Relaxed);
        })
        .context("cannot start a thread")?;
    Ok(is_interrupted)
}
