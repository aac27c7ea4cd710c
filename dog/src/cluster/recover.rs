//! `dog cluster recover force`

use qemu_proto::node_entry::{NODE_BYTES, NODES_MAX};
use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;

use crate::args::Recover;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::question;
use crate::report::Report;

const QUESTION: &str = "Caution: the cluster goes on without the nodes that are missing.\n\
    What only they have is lost, and they must be emptied before they may come back.\n\
    Are you sure you want to continue?";

/// Runs the command.
pub fn run(typed: &Recover, target: Target) -> Result<Report, Failure> {
    match typed.nested.as_deref() {
        Some("force") => {}
        Some(word @ ("enable" | "disable")) => {
            return Err(Failure::not_available(&format!("'dog cluster recover {word}'")));
        }
        other => return Err(Failure::nested(other, "force")),
    }
    let mut sheep = Sheep::connect(target)?;
    if !typed.force && !question::confirmed(QUESTION)? {
        return Ok(Report::silent());
    }
    let mut request = Request::plain(Opcode::ForceRecover);
    request.data_length = (NODES_MAX * NODE_BYTES) as u32;
    sheep
        .call(request, &[])
        .map_err(|trouble| trouble.or(|reason| Failure::failed(format!("failed to execute request, {reason}"))))?;
    Ok(Report::silent())
}
