//! `dog cluster alter-copy`

use qemu_proto::flags::RequestFlags;
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{ClusterRequest, Request};
use qemu_proto::response::ResponseBody;

use crate::args::ClusterAlterCopy;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::report::Report;
use crate::vdi::alter_copy::{check_change, confirmed, send, tell, wanted};

const SUBJECT: &str = "The cluster's";

/// Runs the command.
pub fn run(typed: &ClusterAlterCopy, target: Target) -> Result<Report, Failure> {
    let (copies, notice) = wanted(typed.copies.as_deref())?;
    let mut sheep = Sheep::connect(target)?;
    let before = present(&mut sheep)?;
    check_change(SUBJECT, before, copies).map_err(|failure| Failure { out: notice.clone(), ..failure })?;
    let caution = format!(
        "{notice}Caution: VDIs that are made from now on have {copies} copies instead of {before}.\nAre you sure you want to continue?"
    );
    if !typed.force && !confirmed(&mut sheep, copies, &caution)? {
        return Ok(Report::silent());
    }
    let body = ClusterRequest { copies, ..ClusterRequest::default() };
    send(&mut sheep, Request::cluster(Opcode::AlterClusterCopy, RequestFlags::NONE, body))?;
    tell(SUBJECT, before, copies);
    Ok(if typed.force { Report::text(notice) } else { Report::silent() })
}

fn present(sheep: &mut Sheep) -> Result<u8, Failure> {
    let answered = sheep.call(Request::plain(Opcode::GetClusterDefault), &[]);
    let (response, _) = answered.map_err(|trouble| {
        trouble.or(|reason| Failure::failed(format!("Failed to get the cluster's redundancy level: {reason}")))
    })?;
    match response.body {
        ResponseBody::ClusterDefault { nr_copies, .. } => Ok(nr_copies),
        _ => Err(Failure::system(format!("{} does not tell the cluster's redundancy level", sheep.target()))),
    }
}
