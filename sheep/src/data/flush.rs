//! Makes everything that was acknowledged durable on every node that keeps data.
//!
//! Acknowledged writes are in the memory of all their holders, whoever sent them; so each storing member makes what it has
//! durable. A member that dies meanwhile changes the epoch: the round is done again with those of the new one. What every
//! holder took with it when it died is no more in anybody's memory: `unflushed` knows what that may be, and it is looked for
//! before the flush is called done.
//!
//! A write of an earlier epoch may be with one holder only, because the others of its time died and those of now are still being
//! brought up to date. Where one of these had everything from the beginning of the epoch, the others do not count as witnesses of
//! the epoch before they have it, too (`history::may_have_missed`). Where none had, they do count: so such objects are brought to
//! all holders before they are made durable.

use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::history::Decision;
use sheep_core::member::NodeId;
use sheep_core::peer_message::{FLAG_BRING, FLAG_WAIT, PeerKind, PeerRequest, Verdict};
use sheep_core::stamp::Epoch;
use tokio::task::JoinSet;

use super::gateway::WriteError;
use super::unflushed::Note;
use super::view::View;
use super::{Data, recovery};

/// How long a member may take to be connected before the round is begun again.
const PATIENCE: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Objects looked for side by side.
const PARALLEL: usize = 16;

/// Everything that was acknowledged before is durable on every node that has it when this is done, and what was written through
/// this gateway to a volume (given by its working VDI or a snapshot; without one, to any) on all its holders. It fails, once, if one
/// of these writes to the volume was lost with all its holders.
pub async fn flush(data: &Data, volume: Option<VdiId>) -> Result<(), WriteError> {
    let through = data.unflushed().begin();
    let told = |vdi: VdiId| volume.is_some_and(|volume| vdi == volume || data.view().same_chain(vdi, volume));
    let of = |vdi: VdiId| volume.is_none() || told(vdi);
    let epoch = make_durable(data, |epoch| data.unflushed().acknowledged_before(epoch, through, of)).await?;
    // In a clean epoch all holders have everything, of any volume. What the order knows no more nobody misses.
    let view = data.view();
    let covered = |vdi: VdiId| of(vdi) || view.state.clean >= epoch || !view.state.vdis.contains_key(&vdi.get());
    let looked_for = side_by_side(data.unflushed().endangered(through, covered), |(oid, note)| {
        let data = data.clone();
        async move { (!is_there(&data, oid, note).await).then_some(oid) }
    });
    for oid in looked_for.await.into_iter().flatten().flatten() {
        data.unflushed().lost(oid);
    }
    if data.unflushed().end(through, epoch, covered, told) { Err(WriteError::Failed) } else { Ok(()) }
}

/// The results of all `items`, in any order, a few at a time; nothing of one that ended in a panic.
async fn side_by_side<T, F>(items: Vec<T>, work: impl Fn(T) -> F) -> Vec<Option<F::Output>>
where
    F: Future<Output: Send> + Send + 'static,
{
    let mut results = Vec::new();
    let mut tasks = JoinSet::new();
    for item in items {
        if tasks.len() >= PARALLEL
            && let Some(ended) = tasks.join_next().await
        {
            results.push(ended.ok());
        }
        tasks.spawn(work(item));
    }
    while let Some(ended) = tasks.join_next().await {
        results.push(ended.ok());
    }
    results
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
        if !is_missed(&view, oid) {
            return true;
        }
        match recovery::newest(data, &view, oid).await {
            Some(Decision::Newest { stamp, .. }) => return stamp >= note.stamp,
            // What the volume does not refer to any more of a deleted snapshot was removed, perhaps by another node.
            Some(Decision::Absent) => return note.removal || view.state.live_vdi(oid.vid()).is_none(),
            // As a read of it would, this waits for whoever must be heard.
            Some(Decision::Unheard(_)) | None => {}
        }
        data.wait_for_change(&view, RETRY_INTERVAL).await;
    }
}

/// Whether anybody can still read an object: of a volume that was deleted with all its snapshots nobody does.
fn is_missed(view: &View, oid: Oid) -> bool {
    let vdis = &view.state.vdis;
    let in_its_chain = |root| vdis.values().any(|vdi| !vdi.deleted && vdi.chain_root == root);
    vdis.get(&oid.vid().get()).is_some_and(|vdi| !vdi.deleted || in_its_chain(vdi.chain_root))
}

/// Has every current holder of an object bring its copy up to date, if nobody is sure to have it. False if the epoch is over.
async fn bring_to_all(data: &Data, view: &View, oid: Oid) -> bool {
    let Some(location) = view.locate(oid).filter(|_| is_missed(view, oid)) else { return true };
    if view.history.has_steady_holder(location.key, location.copies) {
        return true;
    }
    let mut calls = JoinSet::new();
    for node in view.holders(&location).iter().copied() {
        let (data, epoch) = (data.clone(), view.epoch());
        calls.spawn(async move {
            while data.view().epoch() == epoch && data.view().state.is_running() {
                if is_up_to_date(&data, node, oid, epoch).await {
                    return true;
                }
                data.world().clock.sleep(RETRY_INTERVAL).await;
            }
            false
        });
    }
    let mut done = true;
    while let Some(ended) = calls.join_next().await {
        done &= ended.unwrap_or(false);
    }
    done
}

/// Whether a node says in `epoch` that its copy, or that it has none, is the newest; it makes it so before it answers.
async fn is_up_to_date(data: &Data, node: NodeId, oid: Oid, epoch: Epoch) -> bool {
    if node == data.node() {
        return recovery::ensure_current(data, oid, epoch).await.is_ok();
    }
    let mut request = PeerRequest::new(PeerKind::Read, epoch, data.node());
    request.oid = oid;
    request.flags = FLAG_WAIT | FLAG_BRING;
    let answer = data.links().call(node, request, Bytes::new(), PATIENCE).await;
    let is_answer = |verdict| !matches!(verdict, Verdict::OldEpoch | Verdict::NotCurrent | Verdict::Busy);
    answer.is_ok_and(|(answer, _)| is_answer(answer.verdict))
}

/// Has all members make durable what they have, after those objects that `old` gives for the epoch were brought to all holders
/// where nobody is sure to have them. Gives the epoch in which all of it was done.
async fn make_durable(data: &Data, old: impl Fn(Epoch) -> Vec<Oid>) -> Result<Epoch, WriteError> {
    loop {
        let view = data.view();
        if !view.state.is_running() {
            return Err(WriteError::NotRunning);
        }
        // In a clean epoch all holders have everything.
        let unsure = if view.state.clean < view.epoch() { old(view.epoch()) } else { Vec::new() };
        let brought = side_by_side(unsure, |oid| {
            let (data, view) = (data.clone(), view.clone());
            async move { bring_to_all(&data, &view, oid).await }
        });
        if brought.await.iter().any(|done| *done != Some(true)) {
            data.wait_for_change(&view, RETRY_INTERVAL).await;
            continue;
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
            return Ok(view.epoch());
        }
        data.wait_for_change(&view, RETRY_INTERVAL).await;
    }
}
