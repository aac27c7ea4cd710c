//! Compares all copies of an object and repairs those that are missing, damaged or different.

use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::member::NodeId;
use sheep_core::peer_message::{PeerKind, PeerRequest, Verdict};
use sheep_core::stamp::Stamp;

use super::Data;
use super::view::View;
use crate::store::ReadError;

const PATIENCE: Duration = Duration::from_secs(2);

/// What was found and done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CheckResult {
    /// Copies there should be.
    pub wanted: u32,
    /// Copies that are good now.
    pub good: u32,
    /// Copies that were replaced.
    pub repaired: u32,
    /// Copies that could not be.
    pub unrepairable: u32,
}

/// Between looks at copies that are not at rest.
const SETTLE_INTERVAL: Duration = Duration::from_millis(50);
/// Looks until the copies of an object that is written to all the time are called good or bad by what the last one saw.
const LOOKS_MAX: usize = 40;

/// What one holder says of its copy.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Copy {
    Good {
        stamp: Stamp,
        hash: Bytes,
    },
    Missing,
    Damaged,
    /// It could not be asked, or is being brought up to date.
    Unknown,
}

/// `None` if no holder has the object.
pub async fn check_object(data: &Data, oid: Oid) -> Option<CheckResult> {
    for _ in 0..LOOKS_MAX {
        let view = data.view();
        let copies = look(data, &view, oid).await?;
        // Copies at different stamps, or that cannot be asked, are on their way: nothing is wrong with them yet.
        let stamps = copies.iter().filter_map(|(_, copy)| match copy {
            Copy::Good { stamp, .. } => Some(*stamp),
            _ => None,
        });
        let one_stamp = stamps.clone().min() == stamps.max();
        let all_known = copies.iter().all(|(_, copy)| *copy != Copy::Unknown);
        if one_stamp && all_known && data.view().epoch() == view.epoch() {
            return judge(data, &view, oid, &copies).await;
        }
        data.world().clock.sleep(SETTLE_INTERVAL).await;
    }
    let view = data.view();
    let wanted = view.holders(&view.locate(oid)?).len() as u32;
    Some(CheckResult { wanted, unrepairable: wanted, ..CheckResult::default() })
}

async fn look(data: &Data, view: &View, oid: Oid) -> Option<Vec<(NodeId, Copy)>> {
    if let Some(lease) = data.leases().held(oid.vid()) {
        lease.await_writes(oid, &(0..u64::MAX)).await;
    }
    let holders = view.holders(&view.locate(oid)?);
    let mut copies = Vec::new();
    for node in &holders {
        copies.push((*node, copy_on(data, view, *node, oid).await));
    }
    Some(copies)
}

/// Compares copies of one stamp and has the bad ones replaced.
async fn judge(data: &Data, view: &View, oid: Oid, copies: &[(NodeId, Copy)]) -> Option<CheckResult> {
    let best = majority(copies);
    if best.is_none() && !copies.iter().any(|(_, copy)| *copy == Copy::Damaged) {
        return None;
    }
    // If all are damaged they are mended all the same: not in the same places, perhaps.
    let mut result = CheckResult { wanted: copies.len() as u32, ..CheckResult::default() };
    for (node, copy) in copies {
        if best.as_ref() == Some(copy) {
            result.good += 1;
            continue;
        }
        tracing::warn!("the copy of object {oid} on node {node} is bad: it is replaced");
        data.repair_on(*node, oid, view.epoch()).await;
        if matches!(copy_on(data, view, *node, oid).await, Copy::Good { .. }) {
            result.repaired += 1;
            result.good += 1;
        } else {
            result.unrepairable += 1;
        }
    }
    Some(result)
}

/// The content that most holders have; among equals that of the first holder.
fn majority(copies: &[(NodeId, Copy)]) -> Option<Copy> {
    let good = || copies.iter().map(|(_, copy)| copy).filter(|copy| matches!(copy, Copy::Good { .. }));
    let votes = |candidate: &Copy| good().filter(|copy| *copy == candidate).count();
    let most = good().map(votes).max()?;
    good().find(|copy| votes(copy) == most).cloned()
}

async fn copy_on(data: &Data, view: &View, node: NodeId, oid: Oid) -> Copy {
    if node == data.node() {
        return copy_here(data, view, oid).await;
    }
    let mut request = PeerRequest::new(PeerKind::Hash, view.epoch(), data.node());
    request.oid = oid;
    match data.links().call(node, request, Bytes::new(), PATIENCE).await {
        Ok((answer, hash)) => match answer.verdict {
            Verdict::Ok => Copy::Good { stamp: answer.version.stamp, hash },
            Verdict::Missing => Copy::Missing,
            Verdict::Corrupt => Copy::Damaged,
            _ => Copy::Unknown,
        },
        Err(_) => Copy::Unknown,
    }
}

async fn copy_here(data: &Data, view: &View, oid: Oid) -> Copy {
    let Some(holder) = data.holder() else { return Copy::Unknown };
    if super::recovery::ensure_current(data, oid, view.epoch()).await.is_err() {
        return Copy::Unknown;
    }
    let before = holder.store().entry(oid).map(|entry| entry.version.stamp);
    let hash = holder.store().hash(oid).await;
    match (hash, before, holder.store().entry(oid).map(|entry| entry.version.stamp)) {
        (Ok(hash), Some(stamp), after) if after == Some(stamp) => {
            Copy::Good { stamp, hash: Bytes::copy_from_slice(hash.as_bytes()) }
        }
        (Ok(_), _, _) => Copy::Unknown,
        (Err(ReadError::Missing), _, _) => Copy::Missing,
        (Err(ReadError::Corrupt { .. }), _, _) => Copy::Damaged,
        (Err(_), _, _) => Copy::Unknown,
    }
}
