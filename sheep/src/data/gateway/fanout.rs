//! One write to all its holders at once, until all of them have it.
//!
//! Write path 3 of 6; next: data/peer.rs (and for the copy on this node store/submit.rs).
//!
//! Everything here runs under the lease's lock and never waits: messages are queued, answers come back as calls of
//! [`answered`]. After an epoch change or a broken link everything unanswered is sent again before anything new
//! (invariant 1 of `lease`); holders that have a write already say so, because its stamp is not above the object's.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::member::NodeId;
use sheep_core::peer_message::{PeerKind, PeerRequest, Verdict};
use sheep_core::placement::Holders;
use sheep_core::stamp::Epoch;

use super::WriteError;
use super::lease::{Lease, LeaseState};
use crate::data::Data;
use crate::data::links::Link;
use crate::data::view::View;

/// After the last write of a burst, how long until the holders hear that everything is settled. Each later write tells
/// them anyway; this only bounds how long another gateway's reader may wait.
const MARK_DELAY: Duration = Duration::from_millis(2);

/// Sends a write that was just entered, in the current view. Brings the lease up to that view's epoch first.
pub fn send(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, sequence: u64) {
    let view = data.view();
    if state.epoch != view.epoch() {
        // The new write is among those that are sent again.
        resend_all(data, lease, state, &view);
        return;
    }
    let Some(holders) = address(data, lease, state, &view, sequence) else { return };
    // Remote copies first: their way is longer.
    for node in holders.iter().filter(|node| **node != data.node()) {
        let Some(link) = data.links().get(*node) else { continue };
        if state.links.get(node) == Some(&link.number()) {
            send_to(data, lease, state, &link, *node, sequence);
        } else {
            resend_over(data, lease, state, &link, *node);
        }
    }
    if holders.contains(&data.node()) {
        send_here(data, lease, state, sequence);
    }
}

/// Sends everything under way in a newer epoch: to each holder once, in the order of the sequences.
pub fn resend_all(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, view: &View) {
    state.epoch = view.epoch();
    let sequences: Vec<u64> = state.under_way.keys().copied().collect();
    let mut remote = BTreeSet::new();
    let mut here = Vec::new();
    for sequence in sequences {
        let Some(holders) = address(data, lease, state, view, sequence) else { continue };
        remote.extend(holders.iter().copied().filter(|node| *node != data.node()));
        if holders.contains(&data.node()) {
            here.push(sequence);
        }
    }
    for node in remote {
        if let Some(link) = data.links().get(node) {
            resend_over(data, lease, state, &link, node);
        }
    }
    for sequence in here {
        send_here(data, lease, state, sequence);
    }
}

/// Sends again what a holder has not answered, if its link is another one than before.
pub fn resend_over_new_link(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, node: NodeId) {
    let Some(link) = data.links().get(node) else { return };
    if state.links.get(&node) != Some(&link.number()) {
        resend_over(data, lease, state, &link, node);
    }
}

/// Sends everything that a holder has not answered over one link, which is the one for what comes next.
fn resend_over(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, link: &Arc<Link>, node: NodeId) {
    state.links.insert(node, link.number());
    let waiting = state.under_way.iter().filter(|(_, write)| write.waiting.contains(&node));
    let sequences: Vec<u64> = waiting.map(|(sequence, _)| *sequence).collect();
    for sequence in sequences {
        send_to(data, lease, state, link, node, sequence);
    }
}

/// Notes whose answers a write waits for in the current epoch. `None` if that is nobody's, and the write is over.
fn address(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, view: &View, sequence: u64) -> Option<Holders> {
    let write = state.under_way.get_mut(&sequence)?;
    let holders = view.holders(&write.location);
    write.waiting.clear();
    write.waiting.extend_from_slice(&holders);
    write.enough = holders.len() >= usize::from(view.state.min_copies(write.location.copies));
    write.taken = 0;
    write.refused.clear();
    if !holders.contains(&data.node()) {
        // Journal space is for copies that this node keeps.
        write.permit = None;
    }
    if holders.is_empty() {
        finish(data, lease, state, sequence, Err(WriteError::NoHolders));
        return None;
    }
    Some(holders)
}

fn request_of(state: &LeaseState, sequence: u64) -> Option<(PeerRequest, Bytes)> {
    let write = state.under_way.get(&sequence)?;
    let mut request = write.request;
    request.epoch = state.epoch;
    request.settled = state.settled();
    Some((request, write.data.clone()))
}

fn send_to(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, link: &Arc<Link>, node: NodeId, sequence: u64) {
    let Some((request, payload)) = request_of(state, sequence) else { return };
    let (data, lease) = (data.clone(), lease.clone());
    let epoch = request.epoch;
    link.send(
        request,
        payload,
        Box::new(move |answer| {
            // Without an answer the next link to this node, or the epoch without it, sends it again.
            if let Ok((answer, _)) = answer {
                answered(&data, &lease, sequence, node, epoch, answer.verdict);
            }
        }),
    );
}

fn send_here(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, sequence: u64) {
    let (Some((request, payload)), Some(holder)) = (request_of(state, sequence), data.holder()) else { return };
    let permit = state.under_way.get_mut(&sequence).and_then(|write| write.permit.take());
    let permit = permit.unwrap_or_else(|| holder.store().admit_now(payload.len() as u64));
    let (pending, wanted) = holder.write(&request, payload, permit);
    data.bring_up_to_date(wanted, request.epoch);
    let (data, lease) = (data.clone(), lease.clone());
    tokio::spawn(async move {
        let verdict = pending.finish().await;
        answered(&data, &lease, sequence, data.node(), request.epoch, verdict);
    });
}

/// A holder answered.
pub fn answered(data: &Data, lease: &Arc<Lease>, sequence: u64, node: NodeId, epoch: Epoch, verdict: Verdict) {
    let mut state = lease.state();
    if state.epoch != epoch {
        return;
    }
    let error = match verdict {
        Verdict::Ok | Verdict::Deferred => None,
        // This node will hear of the newer epoch and send again.
        Verdict::OldEpoch => return,
        Verdict::Fenced => Some(WriteError::Fenced),
        Verdict::Missing => Some(WriteError::Missing),
        Verdict::NoSpace => Some(WriteError::NoSpace),
        Verdict::Invalid => Some(WriteError::Invalid),
        Verdict::NotCurrent | Verdict::Corrupt | Verdict::Failed | Verdict::Stranger | Verdict::Busy => {
            Some(WriteError::Failed)
        }
    };
    if error == Some(WriteError::Fenced) {
        lose(data, lease, &mut state);
        return;
    }
    let Some(write) = state.under_way.get_mut(&sequence).filter(|write| write.waiting.contains(&node)) else {
        // Answered before, over an earlier link.
        return;
    };
    write.waiting.retain(|waiting| *waiting != node);
    match error {
        None if verdict == Verdict::Deferred => {}
        None => write.taken += 1,
        Some(error) => write.refused.push((node, error)),
    }
    if !write.waiting.is_empty() {
        return;
    }
    match (write.taken, write.refused.first().copied()) {
        // Nobody defers without a steady holder, and those have taken it or refused it.
        (0, None) => finish(data, lease, &mut state, sequence, Err(WriteError::Failed)),
        // Too few copies: the write waits for an epoch with more holders, and is sent again then.
        (_, None) if !write.enough => {}
        (_, None) => finish(data, lease, &mut state, sequence, Ok(())),
        (0, Some((_, error))) => finish(data, lease, &mut state, sequence, Err(error)),
        // Some have it and some do not: those that do not get the others' copy before the write is over, and until then
        // nobody reads it or calls it settled.
        (_, Some((_, error))) => {
            let (oid, refused) = (write.request.oid, std::mem::take(&mut write.refused));
            let (data, lease) = (data.clone(), lease.clone());
            tokio::spawn(async move {
                for (node, _) in refused {
                    data.repair_on(node, oid, epoch).await;
                }
                let mut state = lease.state();
                if state.epoch == epoch {
                    finish(&data, &lease, &mut state, sequence, Err(error));
                }
            });
        }
    }
}

/// The lease is somebody else's, or nobody's: every write under way starts over under the next one. Holders that took it
/// already get it once more, with a newer stamp.
pub fn lose(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState) {
    state.closed = true;
    state.lost = true;
    data.leases().forget(lease);
    let sequences: Vec<u64> = state.under_way.keys().copied().collect();
    for sequence in sequences {
        finish(data, lease, state, sequence, Err(WriteError::Fenced));
    }
}

fn finish(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, sequence: u64, result: Result<(), WriteError>) {
    let mark_was_due = state.mark_due;
    if let Some(write) = state.remove(sequence)
        && let Some(done) = write.done
    {
        // The client may have hung up.
        let _ = done.send(result);
    }
    lease.ended.notify_waiters();
    if state.under_way.is_empty() && !mark_was_due {
        let (data, lease) = (data.clone(), lease.clone());
        tokio::spawn(async move {
            data.world().clock.sleep(MARK_DELAY).await;
            send_mark(&data, &lease);
        });
    } else if !state.under_way.is_empty() {
        state.mark_due = false;
    }
}

/// Tells all holders what is settled.
pub fn send_mark(data: &Data, lease: &Arc<Lease>) {
    let settled = {
        let mut state = lease.state();
        state.mark_due = false;
        if state.lost {
            return;
        }
        state.settled()
    };
    let view = data.view();
    if let Some(holder) = data.holder() {
        holder.settle(lease.vdi, lease.generation, settled);
    }
    for node in view.state.members.keys().filter(|node| **node != data.node()) {
        let Some(link) = data.links().get(*node) else { continue };
        let mut request = PeerRequest::new(PeerKind::Settled, view.epoch(), data.node());
        request.oid = Oid::inode(lease.vdi);
        request.stamp.generation = lease.generation;
        request.settled = settled;
        link.send(request, Bytes::new(), Box::new(|_| {}));
    }
}
