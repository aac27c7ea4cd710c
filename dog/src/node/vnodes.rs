//! `dog node vnodes set`: shares follow capacities, so it is refused in the way of the old tool.

use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::Target;
use crate::report::Report;

/// Runs the command.
pub fn run(typed: &args::Vnodes, target: Target) -> Result<Report, Failure> {
    match typed.nested.as_deref() {
        Some("set") => {}
        other => return Err(Failure::nested(other, "set")),
    }
    let Some(count) = typed.count.as_deref() else { return Err(Failure::usage("Say how many: dog node vnodes set N")) };
    if !count.parse::<u16>().is_ok_and(|count| count > 0) {
        let text = format!("Invalid number of vnodes '{count}': must be an integer between 1 and 65535");
        return Err(Failure::new(Exit::Usage, text));
    }
    Sheep::connect(target)?;
    Err(Failure::new(
        Exit::Refused,
        "Failed to execute request: shares of the data follow the capacities of the nodes' disks; after a change of those, \
         'dog cluster reweight' looks at them again",
    ))
}
