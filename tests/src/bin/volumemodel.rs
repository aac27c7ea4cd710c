//! Random operations on volumes, snapshots and clones against a model, while a node is killed and started again (P1, P2, P7).
//!
//! Writes, zeroes, reads, snapshots with and without machine state, clones, rollbacks, changes of size and deletions, through NBD, `dog`
//! and the native protocol. At the end contents, maps, parents and lists are compared, and the objects on the disks of all
//! nodes with what is referred to; then everything is deleted, and the disks must be empty.
//!
//! `cargo run --release -p tests --bin volumemodel -- --operations 10000 --seeds 20 --kill-every 30`. Exit code 1 on a difference.

use std::os::unix::process::CommandExt;
use std::process::ExitCode;
use std::time::Duration;

use clap::Parser;
use tests::volume_proof::{Plan, run};

#[derive(Parser)]
#[command(about = "Random operations on volumes against a model")]
struct Arguments {
    /// Per seed.
    #[arg(long, default_value_t = 2_000)]
    operations: u64,
    /// How many runs, with one seed after the other.
    #[arg(long, default_value_t = 1)]
    seeds: u64,
    /// The first seed; drawn from the clock if absent.
    #[arg(long)]
    seed: Option<u64>,
    /// Seconds between two kills of a node.
    #[arg(long, default_value_t = 5)]
    kill_every: u64,
    /// With the default driver instead of `local`, in a network namespace of their own: needs root, `unshare` and `ip`.
    #[arg(long)]
    voting: bool,
}

/// Set where the namespace has been entered.
const INSIDE: &str = "VOLUMEMODEL_INSIDE";

/// This program again, in a network namespace with a loopback that nobody else is on; comes back only with an error.
fn enter_namespace() -> anyhow::Error {
    let again = || -> anyhow::Result<std::io::Error> {
        let mut command = std::process::Command::new("unshare");
        command.args(["--net", "sh", "-c", "ip link set lo up && exec \"$0\" \"$@\""]);
        command.arg(std::env::current_exe()?).args(std::env::args_os().skip(1)).env(INSIDE, "1");
        Ok(command.exec())
    };
    match again() {
        Ok(error) => anyhow::Error::new(error).context("cannot run unshare"),
        Err(error) => error,
    }
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    if arguments.voting && std::env::var_os(INSIDE).is_none() {
        eprintln!("{:#}", enter_namespace());
        return ExitCode::FAILURE;
    }
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    let first = arguments.seed.unwrap_or(now.as_micros() as u64 & 0xffff_ffff);
    let mut kills = 0;
    for seed in first..first + arguments.seeds {
        let kill_every = Duration::from_secs(arguments.kill_every);
        match run(&Plan { operations: arguments.operations, kill_every, seed, is_voting: arguments.voting }) {
            Ok(figures) => {
                kills += figures.kills;
                println!(
                    "seed {seed}: {:.0?}, {} kills, {} images with {} objects and {} MiB on the disks, exact after {:.1?}, \
                     empty {:.1?} after all were deleted",
                    figures.ran,
                    figures.kills,
                    figures.images,
                    figures.objects,
                    figures.bytes >> 20,
                    figures.calm_after,
                    figures.empty_after
                );
            }
            Err(error) => {
                eprintln!("seed {seed}: {error:#}");
                return ExitCode::FAILURE;
            }
        }
    }
    println!("{} seeds of {} operations, {kills} kills, 0 differences", arguments.seeds, arguments.operations);
    ExitCode::SUCCESS
}
