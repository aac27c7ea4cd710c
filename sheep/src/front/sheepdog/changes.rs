//! What an operator changes while the cluster serves: numbers of copies, shares of the data, how fast copies are brought.

use std::time::Duration;

use qemu_proto::oid::VdiId;
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{ClusterRequest, Request, RequestBody, VdiStateRequest};
use qemu_proto::stat::Throttle;
use qemu_proto::status::Status;
use sheep_core::command::{Command, Outcome as Ordered, Refusal};

use super::Front;
use super::admin::propose;
use super::reply::{Outcome, Reply};
use crate::data::recovery::pace;
use crate::data::shares;

/// Carries one of them out.
pub async fn run(front: &Front, opcode: Opcode, request: &Request, payload: &[u8]) -> Outcome {
    match (opcode, &request.body) {
        (Opcode::AlterVdiCopy, RequestBody::VdiState(body)) => alter_vdi(front, body).await,
        (Opcode::AlterClusterCopy, RequestBody::Cluster(body)) => alter_cluster(front, body).await,
        (Opcode::Reweight, _) => reweight(front).await,
        (Opcode::EnableRecover, _) => propose(front, Command::HoldRecovery { held: false }).await,
        (Opcode::DisableRecover, _) => propose(front, Command::HoldRecovery { held: true }).await,
        (Opcode::GetRecovery, _) => Ok(Reply::data(throttle(front).encode().to_vec())),
        (Opcode::SetRecovery, _) => set_throttle(front, payload),
        _ => Err(Status::NoSupport),
    }
}

fn now(front: &Front) -> u64 {
    front.data.world().clock.wall().to_wire()
}

async fn alter_vdi(front: &Front, body: &VdiStateRequest) -> Outcome {
    let vdi = VdiId::new(body.new_vid).filter(|_| body.copy_policy == 0).ok_or(Status::InvalidParms)?;
    propose(front, Command::AlterCopies { vdi: Some(vdi), copies: body.copies, time: now(front) }).await
}

async fn alter_cluster(front: &Front, body: &ClusterRequest) -> Outcome {
    if body.copy_policy != 0 {
        return Err(Status::InvalidParms);
    }
    propose(front, Command::AlterCopies { vdi: None, copies: body.copies, time: now(front) }).await
}

async fn reweight(front: &Front) -> Outcome {
    let weights = shares::capacities(&front.data).await;
    match front.data.cluster().propose(Command::Reweight { weights, time: now(front) }).await {
        // They are what they should be.
        Ok(Ordered::Refused(Refusal::NoEffect)) => Ok(Reply::done()),
        Ok(Ordered::Refused(refusal)) => Err(super::wire_status::of_refusal(refusal)),
        Ok(_) => {
            front.data.settle_in().await;
            Ok(Reply::done())
        }
        Err(error) => {
            tracing::warn!("cannot order other shares of the data: {error}");
            Err(Status::ClusterError)
        }
    }
}

fn throttle(front: &Front) -> Throttle {
    front.data.progress().pace.throttle().map_or_else(Throttle::default, |throttle| Throttle {
        max: throttle.objects,
        interval_ms: u64::try_from(throttle.interval.as_millis()).unwrap_or(u64::MAX),
        throttling: true,
    })
}

fn set_throttle(front: &Front, payload: &[u8]) -> Outcome {
    let wanted = Throttle::decode(payload).ok_or(Status::InvalidParms)?;
    let throttle = match (wanted.max, wanted.interval_ms) {
        (0, 0) => None,
        (0, _) | (_, 0) => return Err(Status::InvalidParms),
        (objects, milliseconds) => Some(pace::Throttle { objects, interval: Duration::from_millis(milliseconds) }),
    };
    front.data.progress().pace.set_throttle(throttle);
    match throttle {
        Some(pace::Throttle { objects, interval }) => {
            tracing::info!("recovery brings at most {objects} objects in {interval:?} from now on");
        }
        None => tracing::info!("recovery is not throttled any more"),
    }
    Ok(Reply::done())
}
