//! `dog vdi clone`

use super::volume;
use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Selector, Target, shown};
use crate::report::Report;
use crate::requests::{self, NewVdi};

/// Runs the command.
pub fn run(typed: &args::Clone, target: Target) -> Result<Report, Failure> {
    let source = meaning::vdi_name(&typed.source)?;
    let destination =
        typed.target.as_deref().ok_or_else(|| Failure::usage("Destination VDI name must be specified"))?;
    let destination = meaning::vdi_name(destination)?;
    let selector = Selector::of(typed.snapshot.word.as_deref())?;
    if selector.is_current() {
        return Err(Failure::usage("Only snapshot VDIs can be cloned\nPlease specify the '-s' option"));
    }
    if typed.no_share {
        return Err(Failure::not_available("A clone with data of its own (-n)"));
    }
    if typed.prealloc {
        return Err(Failure::not_available("Preallocation of a clone (-P)"));
    }
    let mut sheep = Sheep::connect(target)?;
    let header = volume::open_header(&mut sheep, source, &selector)?;
    // Objects are shared, so their size and redundancy are those of the snapshot.
    let new = NewVdi {
        size_bytes: header.size_bytes,
        base: Some(header.vdi),
        redundancy: (header.copies, header.copy_policy),
        shift: header.shift,
        makes_snapshot: false,
    };
    let vdi = requests::new_vdi(&mut sheep, destination, &new).map_err(|trouble| {
        trouble.or(|reason| Failure::failed(format!("Failed to create VDI {}: {reason}", shown(destination))))
    })?;
    Ok(match (typed.verbose, typed.raw) {
        (true, true) => Report::text(format!("{vdi}\n")),
        (true, false) => Report::text(format!("VDI ID of newly created clone: {vdi}\n")),
        (false, _) => Report::silent(),
    })
}
