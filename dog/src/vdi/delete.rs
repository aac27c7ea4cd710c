//! `dog vdi delete`

use super::volume;
use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Selector, Target};
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(typed: &args::Delete, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let selector = Selector::of(typed.snapshot.word.as_deref())?;
    check_pacing(typed.nr_batched_reclamation.as_deref(), typed.reclamation_interval.as_deref())?;
    if typed.max_reclaim.is_some() {
        return Err(Failure::not_available("Deleting part of a VDI (-m)"));
    }
    let mut sheep = Sheep::connect(target)?;
    requests::delete_vdi(&mut sheep, name, &selector)
        .map_err(|trouble| trouble.or(|reason| volume::not_opened(name, &selector, reason)))?;
    Ok(Report::silent())
}

/// `-B` and `-I` have no effect, but a wrong value is still a mistake of the caller.
pub fn check_pacing(batch: Option<&str>, interval: Option<&str>) -> Result<(), Failure> {
    for (option, word) in [("-B", batch), ("-I", interval)] {
        if let Some(word) = word.filter(|word| word.parse::<u32>().is_err()) {
            return Err(Failure::failed(format!("Invalid value '{word}' of {option}: must be a number")));
        }
    }
    Ok(())
}
