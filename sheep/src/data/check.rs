//! Compares all copies of an object and repairs those that are missing, damaged or different.

use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::member::NodeId;
use sheep_core::peer_message::{PeerKind, PeerRequest, Verdict};

use super::Data;
use super::view::View;

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

/// `None` if no holder has the object.
pub async fn check_object(data: &Data, oid: Oid) -> Option<CheckResult> {
    // Nothing may be half-way to its holders while they are compared.
    if let Some(lease) = data.leases().held(oid.vid()) {
        lease.await_writes(oid, &(0..u64::MAX)).await;
    }
    let view = data.view();
    let location = view.locate(oid)?;
    let holders = view.holders(&location);
    let mut found = Vec::new();
    for node in &holders {
        found.push((*node, hash_on(data, &view, *node, oid).await));
    }
    let best = majority(&found)?;
    let mut result = CheckResult { wanted: holders.len() as u32, ..CheckResult::default() };
    for (node, hash) in &found {
        if hash.as_ref() == Ok(&best) {
            result.good += 1;
            continue;
        }
        data.repair_on(*node, oid, view.epoch()).await;
        if hash_on(data, &view, *node, oid).await.as_ref() == Ok(&best) {
            result.repaired += 1;
            result.good += 1;
        } else {
            result.unrepairable += 1;
        }
    }
    Some(result)
}

/// The content that most holders have; among equals that of the first holder.
fn majority(found: &[(NodeId, Result<Bytes, Verdict>)]) -> Option<Bytes> {
    let mut votes: BTreeMap<&Bytes, usize> = BTreeMap::new();
    for hash in found.iter().filter_map(|(_, hash)| hash.as_ref().ok()) {
        *votes.entry(hash).or_default() += 1;
    }
    let most = *votes.values().max()?;
    found.iter().filter_map(|(_, hash)| hash.as_ref().ok()).find(|hash| votes[hash] == most).cloned()
}

async fn hash_on(data: &Data, view: &View, node: NodeId, oid: Oid) -> Result<Bytes, Verdict> {
    if node == data.node() {
        let Some(holder) = data.holder() else { return Err(Verdict::Missing) };
        super::recovery::ensure_current(data, oid, view.epoch()).await.map_err(|_| Verdict::OldEpoch)?;
        return match holder.store().hash(oid).await {
            Ok(hash) => Ok(Bytes::copy_from_slice(hash.as_bytes())),
            Err(crate::store::ReadError::Missing) => Err(Verdict::Missing),
            Err(_) => Err(Verdict::Corrupt),
        };
    }
    let mut request = PeerRequest::new(PeerKind::Hash, view.epoch(), data.node());
    request.oid = oid;
    match data.links().call(node, request, Bytes::new(), PATIENCE).await {
        Ok((answer, hash)) if answer.verdict == Verdict::Ok => Ok(hash),
        Ok((answer, _)) => Err(answer.verdict),
        Err(_) => Err(Verdict::Busy),
    }
}
