//! `dog cluster reweight`

use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;

use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::report::Report;

/// Runs the command.
pub fn run(target: Target) -> Result<Report, Failure> {
    let answered = Sheep::connect(target)?.call(Request::plain(Opcode::Reweight), &[]);
    answered.map_err(|trouble| trouble.or(|reason| Failure::failed(format!("Response's result: {reason}"))))?;
    Ok(Report::silent())
}
