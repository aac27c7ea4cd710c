//! `dog node`: one file per subcommand.

use crate::args::Node;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::report::Report;

mod admit;
mod ban;
mod format;
pub mod info;
mod kill;
pub mod list;
pub mod log;
pub mod md;
pub mod recovery;
pub mod stat;
mod throttle;
mod vnodes;

/// Runs a subcommand.
pub fn run(command: &Node, target: Target) -> Result<Report, Failure> {
    match command {
        Node::Kill(typed) => kill::run(typed, target),
        Node::List(typed) => list::run(typed, target),
        Node::Info(typed) => info::run(typed, target),
        Node::Recovery(typed) => recovery::run(typed, target),
        Node::Stat(typed) => stat::run(typed, target),
        Node::Log(typed) => log::run(typed, target),
        Node::Admit(typed) => admit::run(typed, target),
        Node::Ban(typed) => ban::run(typed, target),
        Node::Md(typed) => md::run(typed, target),
        Node::Vnodes(typed) => vnodes::run(typed, target),
        Node::Format(typed) => format::run(typed),
    }
}
