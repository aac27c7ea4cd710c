//! Makes everything that was acknowledged durable on every node that keeps data.
//!
//! Acknowledged writes are in the memory of all their holders, whoever sent them; so each storing member makes what it has
//! durable. A member that dies meanwhile changes the epoch: the round is done again with those of the new one. What every
//! holder took with it when it died is no more in anybody's memory: `unflushed` knows what that may be, and it is looked for
//! before the flush is called done.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::history::Decision;
use sheep_core::peer_message::{PeerKind, PeerRequest, Verdict};
use tokio::task::JoinSet;

use super::gateway::WriteError;
use super::unflushed::Note;
use super::{Data, recovery};

/// How long a member may take to be connected before the round is begun again.
const PATIENCE: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Objects looked for side by side.
const PARALLEL: usize = 16;

/// Every write that was acknowledged before is durable on all its holders when this is done. For a volume (given by its
/// working VDI or a snapshot) it fails, once, if one of its writes through this gateway was lost with all its holders.
pub async fn flush(data: &Data, volume: Option<VdiId>) -> Result<(), WriteError> {
    let through = data.unflushed().begin();
    make_durable(data).await?;
    let mut lost = Vec::new();
    let mut looked_for = JoinSet::new();
    for (oid, note) in data.unflushed().endangered(through) {
        if looked_for.len() >= PARALLEL
            && let Some(ended) = looked_for.join_next().await
        {
            lost.extend(ended.unwrap_or(None));
        }
        let data = data.clone();
        looked_for.spawn(async move { (!is_there(&data, oid, note).await).then_some(oid) });
    }
    while let Some(ended) = looked_for.join_next().await {
        lost.extend(ended.unwrap_or(None));
    }
    for oid in lost {
        data.unflushed().lost(oid);
    }
    let view = data.view();
    let told = |vdi: VdiId| volume.is_some_and(|volume| vdi == volume || view.same_chain(vdi, volume));
    if data.unflushed().end(through, told) { Err(WriteError::Failed) } else { Ok(()) }
}

/// Flushes without being asked, because so many objects have writes that no flush covers.
pub async fn flush_by_itself(data: Data) {
    if data.unflushed().flushing.swap(true, Ordering::Relaxed) {
        return;
    }
    if let Err(error) = flush(&data, None).await {
        tracing::debug!("nobody flushes for long, and it cannot be done now: {error}");
    }
    data.unflushed().flushing.store(false, Ordering::Relaxed);
}

/// Whether an acknowledged write is still part of what its object is.
async fn is_there(data: &Data, oid: Oid, note: Note) -> bool {
    loop {
        let view = data.view();
        // Nobody misses what was in a deleted volume.
        if view.state.live_vdi(oid.vid()).is_none() {
            return true;
        }
        match recovery::newest(data, &view, oid).await {
            Some(Decision::Newest { stamp, .. }) => return stamp >= note.stamp,
            Some(Decision::Absent) => return note.removal,
            // As a read of it would, this waits for whoever must be heard.
            Some(Decision::Unheard(_)) | None => {}
        }
        data.wait_for_change(&view, RETRY_INTERVAL).await;
    }
}

async fn make_durable(data: &Data) -> Result<(), WriteError> {
    loop {
        let view = data.view();
        if !view.state.is_running() {
            return Err(WriteError::NotRunning);
        }
        let mut calls = JoinSet::new();
        for member in view.state.members.values().map(|m| &m.member).filter(|member| !member.is_gateway()) {
            if member.id == data.node() {
                continue;
            }
            let request = PeerRequest::new(PeerKind::Flush, view.epoch(), data.node());
            let (data, node) = (data.clone(), member.id);
            calls.spawn(async move {
                let answer = data.links().call(node, request, Bytes::new(), PATIENCE).await;
                answer.is_ok_and(|(answer, _)| answer.verdict == Verdict::Ok)
            });
        }
        let mut done = match data.holder() {
            Some(holder) => {
                holder.flush().await.map_err(|_| WriteError::Failed)?;
                holder.await_everybody(view.epoch()).await.is_ok()
            }
            None => true,
        };
        while let Some(answered) = calls.join_next().await {
            done &= answered.unwrap_or(false);
        }
        if done && data.view().epoch() == view.epoch() {
            return Ok(());
        }
        data.wait_for_change(&view, RETRY_INTERVAL).await;
    }
}
