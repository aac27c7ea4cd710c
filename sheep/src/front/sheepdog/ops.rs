//! The table of operations: what may run when, and who carries it out.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::flags::RequestFlags;
use qemu_proto::oid::VdiId;
use qemu_proto::opcode::{ADMIN_VERSION, CLIENT_VERSION_MAX, Opcode};
use qemu_proto::request::{Request, RequestBody};
use qemu_proto::response::{Response, ResponseBody};
use qemu_proto::status::Status;
use sheep_core::cluster_state::Phase;

use super::reply::{Answer, Outcome, Reply};
use super::{Front, admin, changes, objects, restores, summaries, vdis};
use crate::data::gateway::lease::Lease;
use crate::data::gateway::write::{ObjectWrite, Ready, Tries};

/// How long a request that is no I/O waits for the cluster to serve again.
const SERVICE_PATIENCE: Duration = Duration::from_secs(10);

/// Whether an operation is served while the cluster is not (protocol.md section 2: "force").
fn runs_always(opcode: Opcode) -> bool {
    use Opcode as O;
    matches!(
        opcode,
        O::ReadVdis
            | O::ReadDelVdis
            | O::GetClusterDefault
            | O::GetNodeList
            | O::MakeFs
            | O::Shutdown
            | O::StatCluster
            | O::ForceRecover
            | O::GetStoreList
            | O::KillNode
            | O::GetVdiCopies
            | O::NotifyVdiAdd
            | O::GetLoglevel
            | O::SetLoglevel
            | O::Exist
            | O::ClusterInfo
            | O::OidsExist
            | O::GetRecovery
            | O::SetRecovery
            | O::ClusterReport
            | O::ClusterAdmin
            | O::ReleaseVdi
    )
}

fn version_fits(request: &Request) -> bool {
    if request.opcode < 0x80 { request.proto_ver <= CLIENT_VERSION_MAX } else { request.proto_ver == ADMIN_VERSION }
}

/// Why a request cannot be served at all, in the order in which the ancestor looked.
fn refusal(front: &Front, request: &Request) -> Option<Status> {
    if !version_fits(request) {
        return Some(Status::VerMismatch);
    }
    let Some(opcode) = request.op() else { return Some(Status::InvalidParms) };
    match front.data.view().state.phase {
        Phase::Running => None,
        _ if runs_always(opcode) => None,
        Phase::Unformatted => Some(Status::WaitForFormat),
        Phase::Waiting { .. } => Some(Status::WaitForJoin),
        Phase::Shutdown => Some(Status::Shutdown),
    }
}

/// The VDI that a request of a data connection changes, or makes durable.
pub fn written_vdi(request: &Request) -> Option<VdiId> {
    use Opcode as O;
    match (request.op(), &request.body) {
        (Some(O::WriteObj | O::CreateAndWriteObj | O::DiscardObj | O::FlushVdi), RequestBody::Object(body)) => {
            Some(body.oid.vid())
        }
        _ => None,
    }
}

/// Answers a read that needs no waiting.
pub fn answer_now(front: &Front, request: &Request) -> Option<Answer> {
    if request.op() != Some(Opcode::ReadObj) || refusal(front, request).is_some() {
        return None;
    }
    let RequestBody::Object(body) = &request.body else { return None };
    let payload = objects::read_now(&front.data, body, request)?;
    let epoch = front.data.view().epoch().get();
    let response = Response::success(request, epoch, ResponseBody::NONE, payload.len() as u32);
    Some(Answer { response, payload })
}

/// What to send for a write that need not wait for anything.
pub fn write_ready(front: &Front, request: &Request, payload: &Bytes) -> Option<(ObjectWrite, Arc<Lease>, Ready)> {
    if request.op() != Some(Opcode::WriteObj) || !writes(request) || refusal(front, request).is_some() {
        return None;
    }
    let RequestBody::Object(body) = &request.body else { return None };
    objects::write_ready(front, body, request, payload)
}

/// The answer to a write that is done.
pub fn done(front: &Front, request: &Request) -> Answer {
    let epoch = front.data.view().epoch().get();
    Answer { response: Response::success(request, epoch, ResponseBody::NONE, 0), payload: Bytes::new() }
}

/// Carries a request out. `tries` is what was done of a write.
pub async fn run(front: &Front, request: &Request, payload: Bytes, tries: Tries) -> Answer {
    if !front.data.view().state.is_running() {
        // Formatted or complete a moment ago, perhaps, through another node.
        admin::see_everything(front).await;
        await_service(front, request).await;
    }
    let outcome = match (refusal(front, request), request.op()) {
        (Some(status), _) => Err(status),
        (None, None) => Err(Status::InvalidParms),
        (None, Some(Opcode::WriteObj)) => write(front, request, payload, tries).await,
        (None, Some(opcode)) => dispatch(front, opcode, request, payload).await,
    };
    let epoch = front.data.view().epoch().get();
    match outcome {
        Ok(reply) => {
            let mut response = Response::success(request, epoch, reply.body, reply.payload.len() as u32);
            response.result = reply.status.code();
            Answer { response, payload: reply.payload }
        }
        Err(status) => Answer { response: Response::error(request, status, epoch), payload: Bytes::new() },
    }
}

/// A node that is coming back, or has lost the quorum, makes clients wait instead of failing their requests: I/O as long as
/// it takes, the rest for a while.
async fn await_service(front: &Front, request: &Request) {
    use Opcode as O;
    let Some(opcode) = request.op() else { return };
    if runs_always(opcode) || !version_fits(request) || !front.data.view().state.is_waiting_for_members() {
        return;
    }
    let patient = matches!(opcode, O::ReadObj | O::WriteObj | O::CreateAndWriteObj | O::DiscardObj | O::FlushVdi);
    let served = front.data.await_service();
    if patient {
        served.await;
    } else {
        tokio::select! {
            () = served => {}
            () = front.data.world().clock.sleep(SERVICE_PATIENCE) => {}
        }
    }
}

async fn write(front: &Front, request: &Request, payload: Bytes, tries: Tries) -> Outcome {
    match &request.body {
        RequestBody::Object(body) => objects::write(front, body, request, payload, tries).await,
        _ => Err(Status::InvalidParms),
    }
}

async fn dispatch(front: &Front, opcode: Opcode, request: &Request, payload: Bytes) -> Outcome {
    use Opcode as O;
    if matches!(opcode, O::ReadVdis | O::ReadDelVdis | O::GetVdiCopies | O::DescribeVdis) {
        // What was made through another node is listed here at once.
        admin::see_everything(front).await;
    }
    match (opcode, &request.body) {
        (O::ReadObj, RequestBody::Object(body)) => objects::read(front, body, request).await,
        (O::CreateAndWriteObj, RequestBody::Object(body)) => objects::create(front, body, request, payload).await,
        (O::DiscardObj, RequestBody::Object(body)) => objects::discard(front, body, request).await,
        (O::FlushVdi, RequestBody::Object(body)) => objects::flush(front, body.oid).await,
        (O::Exist, RequestBody::Object(body)) => objects::exist(front, body),
        (O::CheckObject, RequestBody::Object(body)) => objects::check(front, body).await,
        (O::LocateObject, RequestBody::Object(body)) => objects::locate(front, body, request),
        (O::NewVdi, RequestBody::Vdi(body)) if writes(request) => vdis::new_vdi(front, body, &payload).await,
        (O::LockVdi, RequestBody::Vdi(body)) if writes(request) => vdis::lock(front, body, &payload).await,
        (O::GetVdiInfo, RequestBody::Vdi(body)) if writes(request) => vdis::lookup(front, body, &payload).await,
        (O::DelVdi, RequestBody::Vdi(body)) if writes(request) => vdis::delete(front, body, &payload).await,
        (O::GetVdiAttr, RequestBody::Vdi(_)) if writes(request) => vdis::attribute(front, request, &payload).await,
        (O::RestoreVdi, RequestBody::Vdi(body)) if writes(request) => restores::run(front, body, &payload).await,
        // Without the flag no name came along.
        (O::NewVdi | O::LockVdi | O::GetVdiInfo | O::DelVdi | O::GetVdiAttr | O::RestoreVdi, _) => {
            Err(Status::InvalidParms)
        }
        (O::DescribeVdis, RequestBody::Vdi(body)) => summaries::run(front, request, body).await,
        (O::ReleaseVdi, RequestBody::Vdi(body)) => vdis::release(front, request, body).await,
        (O::ReleaseVdi, _) => Ok(Reply::done()),
        (O::ReadVdis, _) => vdis::bitmap(front, request, |_| true),
        (O::ReadDelVdis, _) => vdis::bitmap(front, request, |vdi| vdi.deleted),
        (O::GetVdiCopies, _) => vdis::states(front, request),
        (O::GetClusterDefault, _) => Ok(admin::cluster_default(front)),
        (
            O::AlterVdiCopy
            | O::AlterClusterCopy
            | O::Reweight
            | O::EnableRecover
            | O::DisableRecover
            | O::GetRecovery
            | O::SetRecovery,
            _,
        ) => changes::run(front, opcode, request, &payload).await,
        (_, _) => admin::run(front, opcode, request, &payload).await,
    }
}

fn writes(request: &Request) -> bool {
    request.flags.contains(RequestFlags::WRITE)
}
