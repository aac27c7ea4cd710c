//! DESCRIBE_VDIS: what lists show of VDIs, many in one answer.
//!
//! Always holds: an answer has at most `SUMMARIES_MAX` entries and as many as the client has room for, one map is in memory for
//! each of `MAPS_AT_ONCE`, and an answer without entries means that there are no more.

use qemu_proto::oid::VdiId;
use qemu_proto::request::{Request, VdiRequest};
use qemu_proto::status::Status;
use qemu_proto::vdi_summary::{SUMMARIES_MAX, SUMMARY_BYTES, VdiSummary};
use sheep_core::vdi::Vdi;
use tokio::task::JoinSet;

use super::Front;
use super::reply::{Outcome, Reply};
use crate::data::inode::{self, WARM_MAPS_MAX};

/// Maps that are read side by side: those of other nodes come over the network.
const MAPS_AT_ONCE: usize = 16;

/// The VDIs from the id `base_vdi_id` on that a name finds, ascending.
pub async fn run(front: &Front, request: &Request, body: &VdiRequest) -> Outcome {
    let room = (request.data_length as usize / SUMMARY_BYTES).min(SUMMARIES_MAX);
    if room == 0 {
        return Err(Status::InvalidParms);
    }
    let view = front.data.view();
    let is_listed = |vdi: &&std::sync::Arc<Vdi>| !vdi.deleted && !vdi.is_being_restored();
    let wanted: Vec<_> =
        view.state.vdis.range(body.base_vdi_id..).map(|(_, vdi)| vdi).filter(is_listed).take(room).collect();
    let mut counts = vec![None; wanted.len()];
    let mut tasks: JoinSet<(usize, Option<(u32, u32)>)> = JoinSet::new();
    for (index, vdi) in wanted.iter().enumerate() {
        if index % WARM_MAPS_MAX == 0 {
            inode::warm_maps(&front.data, wanted[index..].iter().map(|vdi| vdi.id)).await;
        }
        if let Some(map) = inode::whole_map_now(&front.data, vdi.id) {
            counts[index] = count(&map, vdi.id);
            continue;
        }
        if tasks.len() >= MAPS_AT_ONCE
            && let Some(Ok((index, objects))) = tasks.join_next().await
        {
            counts[index] = objects;
        }
        let (data, id) = (front.data.clone(), vdi.id);
        tasks.spawn(async move { (index, inode::whole_map(&data, id).await.ok().and_then(|map| count(&map, id))) });
    }
    while let Some(Ok((index, objects))) = tasks.join_next().await {
        counts[index] = objects;
    }
    let mut payload = Vec::with_capacity(wanted.len() * SUMMARY_BYTES);
    for (vdi, objects) in wanted.into_iter().zip(counts) {
        payload.extend_from_slice(&VdiSummary { header: inode::header_of(vdi), objects }.encode());
    }
    Ok(Reply::data(payload))
}

/// How many objects a map names that are the VDI's own, and how many that are others'.
fn count(map: &[u32], id: VdiId) -> Option<(u32, u32)> {
    let own = map.iter().filter(|owner| **owner == id.get()).count();
    let named = map.iter().filter(|owner| **owner != 0).count();
    Some((u32::try_from(own).ok()?, u32::try_from(named - own).ok()?))
}
