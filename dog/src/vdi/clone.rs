//! `dog vdi clone`
//!
//! With data of its own it is made like any other, then given that; an interruption leaves a clone that shares some of it.

use super::{copying, create, volume};
use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Selector, Target, as_text, shown};
use crate::report::Report;
use crate::requests::{self, Header, NewVdi};

fn own_data(sheep: &mut Sheep, name: &str, detaches: bool) -> Result<(), Failure> {
    copying::copy_shared(sheep, name)?;
    if detaches { copying::detach(sheep, name) } else { Ok(()) }
}

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
    let copies = typed.no_share || typed.prealloc;
    // What it takes is asked for in JSON.
    let destination_text = if copies { as_text(destination)? } else { "" };
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
    if copies {
        let unfinished = |failure: Failure| {
            failure.then(&format!(
                "VDI {destination_text} was created, but has not all of its data yet for itself; delete it, or let 'dog vdi \
                 flatten {destination_text}' go on"
            ))
        };
        own_data(&mut sheep, destination_text, typed.no_share).map_err(unfinished)?;
        if typed.prealloc {
            let made = volume::Volume { map: volume::read_map(&mut sheep, &Header { vdi, ..header.clone() })?, header };
            let holes = (0_u32..).zip(&made.map).filter(|(_, owner)| **owner == 0).map(|(index, _)| index);
            create::preallocate(target, vdi, &holes, made.header.shift)?;
        }
    }
    Ok(match (typed.verbose, typed.raw) {
        (true, true) => Report::text(format!("{vdi}\n")),
        (true, false) => Report::text(format!("VDI ID of newly created clone: {vdi}\n")),
        (false, _) => Report::silent(),
    })
}
