//! One client read: the nearest holder whose copy is current, the others if it cannot answer.
//!
//! A read that overlaps a write under way on this gateway waits for it, so that no reader sees bytes that a crash could
//! still take back; a read through a gateway that is not the writer's, or has lost the lease with writes under way, waits at
//! the holder. The fence and the lease are looked at after the bytes were read: then nobody can have gone on without this node
//! before they were.
//!
//! This node may be some moments behind the order: a snapshot that was taken through another node, and written behind, is not
//! known here yet, or a deleted one whose map is gone already. So every read of a map says what is known here of its VDI. A
//! holder that knows more refuses; and it does know, because holders take no write under a lease that they do not know of.

use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::{ObjectKind, Oid};
use sheep_core::member::NodeId;
use sheep_core::peer_message::{FLAG_LIVE, FLAG_WAIT, FLAG_WORKING, NO_LEASE, PeerKind, PeerRequest, Verdict};

use super::ReadFailure;
use crate::data::Data;
use crate::data::peer::decode_extents;
use crate::data::view::View;
use crate::world::marks::{self, Mark};
use crate::world::planted::{self, Bug};

/// How long one holder may take to be connected before the next is tried.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long one holder may take to answer before the next is tried: longer than any flush or fetch it may wait for.
const ANSWER_PATIENCE: Duration = Duration::from_secs(5);
/// Between rounds when no holder could answer; a change of members ends the wait as well.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);
/// Rounds after which damage or device errors on every copy are told to the client instead of tried again.
const ROUNDS_MAX: u32 = 3;

fn request_for(data: &Data, view: &View, oid: Oid, offset: u64, length: usize) -> PeerRequest {
    let mut request = PeerRequest::new(PeerKind::Read, view.epoch(), data.node());
    let lease = data.leases().held(oid.vid());
    request.stamp.generation = lease.map_or(NO_LEASE, |lease| lease.generation);
    request.oid = oid;
    request.offset = offset;
    request.length = length as u32;
    request.flags = belief(view, oid);
    request
}

/// Whether the lease under which a read was sent is gone: what the holder showed to the writer alone is not under way here any more.
fn lost_its_lease(data: &Data, request: &PeerRequest) -> bool {
    let asked_under = request.stamp.generation;
    let held = || data.leases().held(request.oid.vid()).map(|lease| lease.generation);
    asked_under != NO_LEASE && held() != Some(asked_under) && !planted::is(Bug::FormerWriter)
}

/// What a reader of a map must tell the holder that it takes the VDI for: see the module.
fn belief(view: &View, oid: Oid) -> u8 {
    if oid.kind() != Some(ObjectKind::Inode) {
        return 0;
    }
    match view.state.live_vdi(oid.vid()) {
        Some(vdi) if vdi.is_snapshot() => FLAG_LIVE,
        Some(_) => FLAG_LIVE | FLAG_WORKING,
        None => 0,
    }
}

/// The bytes, if this node has a current copy in memory and nothing has to be waited for.
pub fn read_now(data: &Data, oid: Oid, offset: u64, length: usize) -> Option<Bytes> {
    let view = data.view();
    if view.epoch() < data.cluster().fence().since() {
        return None;
    }
    let holder = data.holder()?;
    let range = offset..offset.checked_add(length as u64)?;
    if let Some(lease) = data.leases().held(oid.vid())
        && lease.state().touches(oid, &range)
    {
        return None;
    }
    let location = view.locate(oid)?;
    if !view.holders(&location).contains(&data.node()) {
        return None;
    }
    let request = request_for(data, &view, oid, offset, length);
    let bytes = holder.read_now(&request)?.ok()?;
    // A write may have begun in between: what was read of it must be on all holders before it is told.
    let began = data.leases().held(oid.vid()).is_some_and(|lease| lease.state().touches(oid, &range));
    (!began && data.cluster().fence().is_open() && !lost_its_lease(data, &request)).then_some(bytes)
}

/// Reads from the nearest holder that can answer.
pub async fn read(data: &Data, oid: Oid, offset: u64, length: usize) -> Result<Bytes, ReadFailure> {
    let end = offset.checked_add(length as u64).ok_or(ReadFailure::Invalid)?;
    let mut failures = 0;
    loop {
        if let Some(lease) = data.leases().held(oid.vid()) {
            lease.await_writes(oid, &(offset..end)).await;
        }
        // A node that was taken out and came in again reads in no epoch before that.
        data.await_epoch(data.cluster().fence().since()).await;
        let view = data.view();
        let location = view.locate(oid).ok_or(ReadFailure::Missing)?;
        if end > location.object_bytes {
            return Err(ReadFailure::Invalid);
        }
        let mut request = request_for(data, &view, oid, offset, length);
        match one_round(data, &view, &mut request, &nearest_first(data, &view.holders(&location))).await {
            Round::Answer(bytes) => {
                // As in `read_now`.
                if let Some(lease) = data.leases().held(oid.vid()) {
                    lease.await_writes(oid, &(offset..end)).await;
                }
                if data.cluster().fence().pass().await {
                    // What was read may be old by now.
                    continue;
                }
                if lost_its_lease(data, &request) {
                    marks::hit(Mark::LeaseLostWhileRead);
                    continue;
                }
                return Ok(bytes);
            }
            // A node that is alone knows nothing of what was made meanwhile.
            Round::Missing if data.cluster().fence().pass().await || lost_its_lease(data, &request) => continue,
            Round::Missing => return Err(ReadFailure::Missing),
            Round::Invalid => return Err(ReadFailure::Invalid),
            Round::Outdated => {
                marks::hit(Mark::ReaderBehind);
                if let Ok(state) = data.cluster().barrier().await {
                    data.await_applied(state.applied).await;
                    continue;
                }
            }
            Round::Again => {
                // Without the quorum the others have it no more than this node: asking them on and on helps nobody.
                data.cluster().fence().pass().await;
            }
            Round::Failed => {
                failures += 1;
                if failures == ROUNDS_MAX {
                    return Err(ReadFailure::Failed);
                }
                if failures == 1 && data.first_mend(oid, view.epoch()) {
                    mend(data, &view, oid, &view.holders(&location)).await;
                }
            }
            Round::Nobody => return Err(ReadFailure::NoHolders),
        }
        data.wait_for_change(&view, RETRY_INTERVAL).await;
    }
}

/// Has the copies put together again what none of them has whole.
async fn mend(data: &Data, view: &View, oid: Oid, holders: &[NodeId]) {
    let repairs = async {
        for node in holders {
            data.repair_on(*node, oid, view.epoch()).await;
        }
    };
    tokio::select! {
        () = repairs => {}
        () = data.world().clock.sleep(ANSWER_PATIENCE) => {}
    }
}

/// The parts of an object that are not zeros, as ascending byte ranges, from the nearest holder that can tell.
pub async fn extents(data: &Data, oid: Oid) -> Result<Vec<std::ops::Range<u64>>, ReadFailure> {
    let mut rounds = 0;
    while rounds < ROUNDS_MAX {
        let view = data.view();
        let location = view.locate(oid).ok_or(ReadFailure::Missing)?;
        let mut request = request_for(data, &view, oid, 0, 0);
        request.kind = PeerKind::Extents;
        for node in nearest_first(data, &view.holders(&location)) {
            let answer = match data.holder().filter(|_| node == data.node()) {
                Some(holder) => holder.extents(&request).await,
                None => match data.links().call(node, request, Bytes::new(), PATIENCE).await {
                    Ok((answer, payload)) if answer.verdict == Verdict::Ok => Ok(decode_extents(&payload)),
                    Ok((answer, _)) => Err(answer.verdict),
                    Err(_) => continue,
                },
            };
            match answer {
                Ok(_) | Err(Verdict::Missing) if data.cluster().fence().pass().await => break,
                Ok(_) | Err(Verdict::Missing) if lost_its_lease(data, &request) => break,
                Ok(extents) => return Ok(extents),
                Err(Verdict::Missing) => return Err(ReadFailure::Missing),
                Err(_) => {}
            }
        }
        // As in `read`: what nobody could say for want of the quorum they may say when it is back.
        if !data.cluster().fence().pass().await {
            rounds += 1;
        }
        data.wait_for_change(&view, RETRY_INTERVAL).await;
    }
    Err(ReadFailure::Failed)
}

/// This node first, then the others, beginning at a place that spreads the readers.
fn nearest_first(data: &Data, holders: &[NodeId]) -> Vec<NodeId> {
    let mut order = holders.to_vec();
    if !order.is_empty() {
        let start = (data.node().get() % order.len() as u64) as usize;
        order.rotate_left(start);
    }
    order.sort_by_key(|node| *node != data.node());
    order
}

enum Round {
    Answer(Bytes),
    Missing,
    Invalid,
    /// This node is behind the order.
    Outdated,
    /// Nobody could answer yet.
    Again,
    /// Everybody who answered has a damaged copy or a failing device.
    Failed,
    Nobody,
}

async fn one_round(data: &Data, view: &View, request: &mut PeerRequest, order: &[NodeId]) -> Round {
    if order.is_empty() {
        return Round::Nobody;
    }
    let mut damaged = Vec::new();
    let mut undecided = 0;
    let mut result = Round::Again;
    for node in order {
        match ask(data, *node, request).await {
            Ok(bytes) => {
                result = Round::Answer(bytes);
                break;
            }
            Err(Some(Verdict::Missing)) => {
                result = Round::Missing;
                break;
            }
            Err(Some(Verdict::Invalid)) => return Round::Invalid,
            Err(Some(Verdict::Outdated)) => return Round::Outdated,
            Err(Some(Verdict::Corrupt | Verdict::Failed)) => damaged.push(*node),
            Err(_) => undecided += 1,
        }
    }
    if matches!(result, Round::Answer(_)) {
        for node in &damaged {
            marks::hit(Mark::DamagedCopyPassedOver);
            data.ask_repair(*node, request.oid, view.epoch());
        }
    } else if matches!(result, Round::Again) && undecided == 0 && damaged.len() == order.len() {
        return Round::Failed;
    } else if matches!(result, Round::Again) && !request.has(FLAG_WAIT) && undecided > 0 {
        // Nobody is sure of its copy: let the nearest find out for this read, ahead of its turn.
        request.flags |= FLAG_WAIT;
        for node in order {
            if let Ok(bytes) = ask(data, *node, request).await {
                return Round::Answer(bytes);
            }
        }
    }
    result
}

async fn ask(data: &Data, node: NodeId, request: &PeerRequest) -> Result<Bytes, Option<Verdict>> {
    if node == data.node() {
        let Some(holder) = data.holder() else { return Err(None) };
        if request.has(FLAG_WAIT)
            && crate::data::recovery::ensure_current(data, request.oid, request.epoch).await.is_err()
        {
            return Err(None);
        }
        return holder.read(request).await.map_err(Some);
    }
    // A node that does not answer (stopped, or its disk hangs) is passed over as long as another one can.
    let answer = tokio::select! {
        answer = data.links().call(node, *request, Bytes::new(), PATIENCE) => answer,
        () = data.world().clock.sleep(ANSWER_PATIENCE) => return Err(None),
    };
    let (answer, payload) = answer.map_err(|_| None)?;
    match answer.verdict {
        Verdict::Ok if payload.len() == request.length as usize => Ok(payload),
        Verdict::Ok => Err(None),
        verdict => Err(Some(verdict)),
    }
}
