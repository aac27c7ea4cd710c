//! `dog vdi flatten`
//!
//! The parent is taken away last, by one request.

use super::copying;
use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Target, as_text};
use crate::report::Report;

/// Runs the command.
pub fn run(typed: &args::Flatten, target: Target) -> Result<Report, Failure> {
    let name = as_text(meaning::vdi_name(&typed.vdi)?)?;
    let mut sheep = Sheep::connect(target)?;
    let done = copying::copy_shared(&mut sheep, name).and_then(|()| copying::detach(&mut sheep, name));
    done.map_err(|failure| failure.about(&format!("Failed to flatten VDI {name}")))?;
    Ok(Report::silent())
}
