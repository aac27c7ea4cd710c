//! `dog vdi rename`

use serde_json::json;

use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Target, as_text};
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(typed: &args::Rename, target: Target) -> Result<Report, Failure> {
    let (name, to) = (as_text(meaning::vdi_name(&typed.vdi)?)?, as_text(meaning::vdi_name(&typed.to)?)?);
    let mut sheep = Sheep::connect(target)?;
    requests::administer(&mut sheep, &json!({"do": "rename", "name": name, "to": to}))
        .map_err(|failure| failure.about(&format!("Failed to rename VDI {name} to {to}")))?;
    Ok(Report::silent())
}
