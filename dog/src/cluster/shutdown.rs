//! `dog cluster shutdown`

use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;

use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::order::Order;
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(target: Target) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let order = Order::of(&requests::cluster_report(&mut sheep)?);
    if order.is_raft() && !order.has_quorum && !order.needed.is_empty() {
        // The request waits as long as the quorum is away; whoever waits must know for what.
        eprintln!("Waiting for a majority of the voters: {}", order.needed);
    }
    sheep
        .call(Request::plain(Opcode::Shutdown), &[])
        .map_err(|trouble| trouble.or(|reason| Failure::failed(format!("failed to execute request, {reason}"))))?;
    Ok(Report::silent())
}
