//! One write to all its holders at once, until all of them have it.
//!
//! Write path 3 of 6; next: data/peer.rs (and for the copy on this node store/submit.rs).
//!
//! Everything here runs under the lease's lock and never waits: messages are queued, answers come back as calls of
//! `answered`. After an epoch change or a broken link everything unanswered is sent again before anything new
//! (invariant 1 of `lease`); over another link under the same stamp, so that a holder which has it says so, and for another
//! epoch under a new one, so that all who hold the object then write it once more.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::member::NodeId;
use sheep_core::peer_message::{PeerKind, PeerRequest, Verdict};
use sheep_core::placement::Holders;
use sheep_core::stamp::{Epoch, Stamp};

use super::WriteError;
use super::lease::{Ended, Lease, LeaseState};
use crate::data::links::Link;
use crate::data::view::View;
use crate::data::{Data, flush};
use crate::world::frames::sent_together;
use crate::world::marks::{self, Mark};
use crate::world::planted::{self, Bug};

/// After the last write of a burst, how long until the holders hear that everything is settled: this bounds how long another
/// gateway's reader may wait. Each write tells its own holders what was settled before it.
const MARK_DELAY: Duration = Duration::from_millis(2);
/// In a burst that goes on, the others hear of it after so many delays: a message to every member for each of them would be
/// a quarter of all messages of a client with one write under way.
const MARK_DELAYS_MAX: u32 = 5;

/// Sends the write that was just entered, in the current view. Brings the lease up to that view's epoch first.
pub fn send(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState) {
    let sequence = state.sequence;
    let view = data.view();
    if state.epoch != view.epoch() {
        // The new write is among those that are sent again.
        resend_all(data, lease, state, &view);
        return;
    }
    let Some(holders) = address(data, lease, state, &view, sequence) else { return };
    let is_alone = state.under_way.len() == 1;
    // Remote copies first: their way is longer.
    let mut send_away = || {
        for node in holders.iter().filter(|node| **node != data.node()) {
            let Some(link) = data.links().get(*node) else { continue };
            if state.links.get(node) == Some(&link.number()) {
                send_to(data, lease, state, &link, *node, sequence);
            } else {
                resend_over(data, lease, state, &link, *node);
            }
        }
    };
    if is_alone {
        // On this thread: the tasks that write would run only after the commit here has begun. Of many at once, one system call
        // takes several.
        sent_together(send_away);
    } else {
        send_away();
    }
    if holders.contains(&data.node()) {
        send_here(data, lease, state, sequence);
    }
}

/// Sends everything under way in a newer epoch: to each holder once, in the order of the sequences.
pub fn resend_all(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, view: &View) {
    state.epoch = view.epoch();
    state.begin_round();
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
    // The number of copies may be another one than when the write came.
    write.location = view.locate(write.request.oid).unwrap_or(write.location);
    let holders = view.holders(&write.location);
    write.over = data.unflushed().last_before(&write.request);
    write.is_sent = true;
    write.is_held_back = false;
    write.waiting.clear();
    write.waiting.extend_from_slice(&holders);
    write.enough = holders.len() >= usize::from(view.state.min_copies(write.location.copies.now()));
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
                answered(&data, &lease, sequence, node, epoch, answer.verdict, answer.version.stamp);
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
    if let Some((verdict, before)) = pending.decided() {
        note_answer(data, lease, state, sequence, data.node(), verdict, before);
        return;
    }
    let (data, lease) = (data.clone(), lease.clone());
    pending.then(move |verdict, before| {
        answered(&data, &lease, sequence, data.node(), request.epoch, verdict, before);
    });
}

/// A holder answered; `before` is the stamp that its copy had, if it wrote.
fn answered(
    data: &Data,
    lease: &Arc<Lease>,
    sequence: u64,
    node: NodeId,
    epoch: Epoch,
    verdict: Verdict,
    before: Stamp,
) {
    let mut state = lease.state();
    if state.epoch == epoch {
        note_answer(data, lease, &mut state, sequence, node, verdict, before);
    }
}

/// The same, for an answer of the current epoch.
fn note_answer(
    data: &Data,
    lease: &Arc<Lease>,
    state: &mut LeaseState,
    sequence: u64,
    node: NodeId,
    verdict: Verdict,
    before: Stamp,
) {
    let error = match verdict {
        Verdict::Ok | Verdict::Deferred => None,
        // This node will hear of the newer epoch and send again.
        Verdict::OldEpoch => return,
        Verdict::Fenced => Some(WriteError::Fenced),
        Verdict::Missing => Some(WriteError::Missing),
        Verdict::NoSpace => Some(WriteError::NoSpace),
        Verdict::Invalid => Some(WriteError::Invalid),
        Verdict::NotCurrent
        | Verdict::Corrupt
        | Verdict::Failed
        | Verdict::Stranger
        | Verdict::Busy
        | Verdict::Outdated => Some(WriteError::Failed),
    };
    if error == Some(WriteError::Fenced) {
        marks::hit(Mark::WriteFenced);
        lose(data, lease, state);
        return;
    }
    let Some(write) = state.under_way.get_mut(&sequence).filter(|write| write.waiting.contains(&node)) else {
        // Answered before, over an earlier link.
        return;
    };
    write.waiting.retain(|waiting| *waiting != node);
    if verdict == Verdict::Ok && before != Stamp::default() && before < write.over && write.is_plain() {
        data.unflushed().lost(write.request.oid);
    }
    match error {
        None if verdict == Verdict::Deferred => {}
        None => write.taken += 1,
        Some(error) => write.refused.push((node, error)),
    }
    let is_over = write.waiting.is_empty() || (planted::is(Bug::EarlyAcknowledge) && write.taken > 0);
    if is_over {
        conclude(data, lease, state, sequence);
    }
}

/// Everybody answered.
fn conclude(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, sequence: u64) {
    let epoch = state.epoch;
    let is_held_back = state.is_behind_whole(sequence);
    let Some(write) = state.under_way.get_mut(&sequence) else { return };
    write.is_held_back = is_held_back;
    if is_held_back {
        return;
    }
    match (write.taken, write.refused.first().copied()) {
        // Nobody defers without a steady holder, and those have taken it or refused it.
        (0, None) => finish(data, lease, state, sequence, Err(WriteError::Failed)),
        // Too few copies: the write waits for an epoch with more holders, and is sent again then.
        (_, None) if !write.enough => marks::hit(Mark::WriteWaitsForCopies),
        (_, None) => finish(data, lease, state, sequence, Ok(())),
        (0, Some((_, error))) => finish(data, lease, state, sequence, Err(error)),
        // Some have it and some do not: those that do not get the others' copy before the write is over, and until then
        // nobody reads it or calls it settled. A full disk makes writes wait and a failing one says nothing, so that this is for
        // a copy that its node has lost without noticing.
        (_, Some(_)) => {
            let (oid, refused) = (write.request.oid, std::mem::take(&mut write.refused));
            let (data, lease) = (data.clone(), lease.clone());
            tokio::spawn(async move {
                let mut result = Ok(());
                for (node, error) in refused {
                    let is_made_good = data.repair_on(node, oid, epoch).await;
                    result = result.and(match error {
                        // It has the object now as the others have it, with this write. `Missing` would be taken for an object
                        // that is nowhere, and may be made anew.
                        WriteError::Missing if is_made_good => Ok(()),
                        WriteError::Missing => Err(WriteError::Failed),
                        error => Err(error),
                    });
                }
                let mut state = lease.state();
                if state.epoch == epoch {
                    finish(&data, &lease, &mut state, sequence, result);
                }
            });
        }
    }
}

/// The lease is somebody else's, or nobody's: every write under way starts over under the next one. Holders that took it
/// already get it once more, with a newer stamp.
pub fn lose(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState) {
    if !state.lost {
        // What is done stays done: whoever reads it must not wait for a mark that was about to be sent.
        tell_settled(data, lease, state.settled());
    }
    state.closed = true;
    state.lost = true;
    data.leases().forget(lease);
    let sequences: Vec<u64> = state.under_way.keys().copied().collect();
    for sequence in sequences {
        finish(data, lease, state, sequence, Err(WriteError::Fenced));
    }
}

fn finish(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, sequence: u64, result: Result<(), WriteError>) {
    if let Some(mut write) = state.remove(sequence) {
        write.request.epoch = state.epoch;
        if result.is_ok() && data.unflushed().acknowledged(&write.request, write.taken) {
            tokio::spawn(flush::flush_by_itself(data.clone()));
        }
        if let Some(done) = write.done.take() {
            let mut stamps = Vec::new();
            if matches!(result, Ok(()) | Err(WriteError::Fenced)) {
                stamps.append(&mut write.earlier);
                stamps.push(write.request.stamp);
            }
            done.tell(Ended { result, stamps });
        }
        if !write.is_plain() && !state.lost {
            let held_back = |other: &u64| state.under_way.get(other).is_some_and(|other| other.is_held_back);
            let later = state.by_object.get(&write.request.oid).into_iter().flatten().copied();
            for later in later.filter(held_back).collect::<Vec<_>>() {
                conclude(data, lease, state, later);
            }
        }
    }
    lease.ended.notify_waiters();
    if !std::mem::replace(&mut state.mark_due, true) {
        tokio::spawn(mark_later(data.clone(), lease.clone()));
    }
}

/// Tells the holders what is settled once the burst is over, or has gone on for long.
async fn mark_later(data: Data, lease: Arc<Lease>) {
    for _ in 0..MARK_DELAYS_MAX {
        data.world().clock.sleep(MARK_DELAY).await;
        if lease.state().under_way.is_empty() {
            break;
        }
    }
    send_mark(&data, &lease);
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
    tell_settled(data, lease, settled);
}

fn tell_settled(data: &Data, lease: &Lease, settled: u64) {
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
