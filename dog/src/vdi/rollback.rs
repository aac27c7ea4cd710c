//! `dog vdi rollback`
//!
//! Two requests: the working VDI is deleted, and a new one is made from the snapshot. An interruption between the two
//! leaves the snapshot as it was and no working VDI; the same command again then does the rest.

use qemu_proto::status::Status;

use super::{delete, volume};
use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Selector, Target, shown};
use crate::question;
use crate::report::Report;
use crate::requests::{self, NewVdi};

/// Runs the command.
pub fn run(typed: &args::Rollback, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let selector = Selector::of(typed.snapshot.word.as_deref())?;
    delete::check_pacing(typed.nr_batched_reclamation.as_deref(), typed.reclamation_interval.as_deref())?;
    if selector.is_current() {
        return Err(Failure::usage("Please specify the '-s' option"));
    }
    let mut sheep = Sheep::connect(target)?;
    let header = volume::open_header(&mut sheep, name, &selector)?;
    let question = format!(
        "This operation discards everything written to {}\nsince the snapshot was taken. Continue?",
        shown(name)
    );
    if !typed.force && !question::confirmed(&question)? {
        return Ok(Report::silent());
    }
    let not_rolled_back =
        |reason: &dyn std::fmt::Display| Failure::failed(format!("Failed to roll back VDI {}: {reason}", shown(name)));
    match requests::delete_vdi(&mut sheep, name, &Selector::CURRENT) {
        Err(trouble) if !trouble.is(Status::NoVdi) => return Err(trouble.or(|reason| not_rolled_back(&reason))),
        Ok(()) | Err(_) => {}
    }
    let new = NewVdi {
        size_bytes: header.size_bytes,
        base: Some(header.vdi),
        redundancy: (header.copies, header.copy_policy),
        shift: header.shift,
        makes_snapshot: false,
    };
    let vdi = requests::new_vdi(&mut sheep, name, &new).map_err(|trouble| {
        trouble.or(|reason| not_rolled_back(&reason)).then("The snapshot is intact; run the same command again")
    })?;
    Ok(match (typed.verbose, typed.raw) {
        (true, true) => Report::text(format!("{vdi}\n")),
        (true, false) => Report::text(format!("New VDI ID of rollbacked VDI: {vdi}\n")),
        (false, _) => Report::silent(),
    })
}
