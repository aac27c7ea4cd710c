//! `dog cluster`: one file per subcommand.

use crate::args::Cluster;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::report::Report;

mod alter_copy;
mod check;
mod format;
pub mod info;
mod key;
mod recover;
mod reweight;
mod shutdown;
mod token;

/// Runs a subcommand.
pub fn run(command: &Cluster, target: Target) -> Result<Report, Failure> {
    match command {
        Cluster::Info(typed) => info::run(typed, target),
        Cluster::Check => check::run(target),
        Cluster::Format(typed) => format::run(typed, target),
        Cluster::Shutdown => shutdown::run(target),
        Cluster::Token => token::run(target),
        Cluster::Key(typed) => key::run(typed, target),
        Cluster::Recover(typed) => recover::run(typed, target),
        Cluster::Reweight => reweight::run(target),
        Cluster::AlterCopy(typed) => alter_copy::run(typed, target),
    }
}
