//! `dog vdi`: one file per subcommand.

use crate::args::Vdi;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::report::Report;

pub mod alter_copy;
pub mod attach;
mod backup;
pub mod catalog;
pub mod check;
pub mod clone;
mod copying;
pub mod create;
pub mod delete;
pub mod dump;
mod exist;
mod flatten;
mod getattr;
pub mod graph;
mod increment;
mod lanes;
pub mod list;
pub mod lock;
pub mod object;
mod pieces;
mod qos;
mod read;
mod rename;
pub mod resize;
mod restore;
pub mod rollback;
mod setattr;
pub mod snapshot;
pub mod track;
pub mod tree;
pub mod volume;
mod write;

/// Runs a subcommand.
pub fn run(command: &Vdi, target: Target) -> Result<Report, Failure> {
    match command {
        Vdi::Check(typed) => check::run(typed, target),
        Vdi::Create(typed) => create::run(typed, target),
        Vdi::Snapshot(typed) => snapshot::run(typed, target),
        Vdi::Clone(typed) => clone::run(typed, target),
        Vdi::Delete(typed) => delete::run(typed, target),
        Vdi::Rollback(typed) => rollback::run(typed, target),
        Vdi::List(typed) => list::run(typed, target),
        Vdi::Tree(typed) => tree::run(typed, target),
        Vdi::Graph => graph::run(target),
        Vdi::Object(typed) => object::run(typed, target),
        Vdi::Track(typed) => track::run(typed, target),
        Vdi::Setattr(typed) => setattr::run(typed, target),
        Vdi::Getattr(typed) => getattr::run(typed, target),
        Vdi::Resize(typed) => resize::run(typed, target),
        Vdi::Read(typed) => read::run(typed, target),
        Vdi::Write(typed) => write::run(typed, target),
        Vdi::Lock(typed) => lock::run(typed, target),
        Vdi::Backup(typed) => backup::run(typed, target),
        Vdi::Restore(typed) => restore::run(typed, target),
        Vdi::Attach(typed) => attach::run(typed, target),
        Vdi::AlterCopy(typed) => alter_copy::run(typed, target),
        Vdi::Rename(typed) => rename::run(typed, target),
        Vdi::Flatten(typed) => flatten::run(typed, target),
        Vdi::Qos(typed) => qos::run(typed, target),
    }
}
