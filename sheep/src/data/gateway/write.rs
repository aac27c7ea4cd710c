//! One client write: may it run, under which stamp, cut to which size. Sending is `fanout`'s.
//!
//! Write path 2 of 6; next: data/gateway/fanout.rs.

use std::ops::Range;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::{ObjectKind, Oid};
use sheep_core::cluster_state::ClusterState;
use sheep_core::peer_message::Verdict;
use sheep_core::peer_message::{
    FLAG_COPY, FLAG_CREATE, FLAG_DRAINED, FLAG_DURABLE, PAYLOAD_BYTES_MAX, PeerKind, PeerRequest,
};
use sheep_core::stamp::Stamp;
use sheep_core::write_fate::Fate;
use tokio::sync::oneshot;

use super::lease::{Done, Ended, Lease, LeaseState, WriteUnderWay};
use super::{WriteError, fanout, lease_table};
use crate::data::Data;
use crate::data::client::Client;
use crate::data::view::Location;
use crate::store::Permit;
use crate::world::marks::{self, Mark};
use crate::world::planted::{self, Bug};

/// Bytes per message to a holder: fits the smallest journal several times over, and lets other writes in between.
const PIECE_BYTES_MAX: usize = 2 << 20;
const _: () = assert!(PIECE_BYTES_MAX <= PAYLOAD_BYTES_MAX);

/// How often the holders are asked what became of a write: they may be busy with a recovery, and the guest waits anyway.
const FATE_ROUNDS: u32 = 500;
/// Between the rounds; a change of members ends the wait as well.
const FATE_INTERVAL: Duration = Duration::from_millis(20);
/// How long one holder may take to be connected.
const FATE_PATIENCE: Duration = Duration::from_millis(500);

/// What to do with an object.
#[derive(Clone, Debug)]
pub struct ObjectWrite {
    /// Which.
    pub oid: Oid,
    /// Bytes into it.
    pub offset: u64,
    /// What to put there.
    pub data: Bytes,
    /// What it was before.
    pub base: Base,
    /// Whether it must be durable when done, or only at the next flush.
    pub durable: bool,
    /// Who asked for it.
    pub client: Client,
}

/// What the bytes are laid over.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Base {
    /// The object as it is.
    Existing,
    /// Zeros, whatever was there.
    Zeros,
    /// A copy of an object with the same holders.
    CopyOf(Oid),
    /// Nothing: the object is removed.
    Removal,
}

/// A piece of a write, and what became of it so far.
struct Piece {
    range: Range<usize>,
    base: Base,
    /// Under which it was sent, ascending; nothing is known of what those before the last did, nor of that until it is `done`.
    stamps: Vec<Stamp>,
    done: bool,
}

/// The first piece makes the object, the others lie over it.
fn pieces(write: &ObjectWrite) -> Vec<Piece> {
    let mut pieces = Vec::new();
    let mut start = 0;
    loop {
        let end = (start + PIECE_BYTES_MAX).min(write.data.len());
        let base = if start == 0 { write.base } else { Base::Existing };
        pieces.push(Piece { range: start..end, base, stamps: Vec::new(), done: false });
        start = end;
        if start == write.data.len() {
            return pieces;
        }
    }
}

/// Writes under one lease generation only: `Fenced` if this gateway does not hold it (any more), and at once, because the
/// caller may have what those wait for who give leases back. For writes that were decided from what was read under that lease.
pub async fn write_under(data: &Data, write: &ObjectWrite, generation: u32) -> Result<(), WriteError> {
    attempt_under(data, write, &mut pieces(write), generation).await
}

async fn attempt_under(
    data: &Data,
    write: &ObjectWrite,
    pieces: &mut [Piece],
    generation: u32,
) -> Result<(), WriteError> {
    let result = attempt(data, write, pieces, Some(generation)).await;
    data.cluster().fence().pass().await;
    result
}

/// One client's bytes on their way into an object that may have to be made: tried under one lease generation after the other,
/// until one lasts. What an earlier try did may be part of what others have seen and written over since; see `was_applied`.
#[derive(Default)]
pub struct Tries {
    /// Into the object as it is.
    over: Vec<Piece>,
    /// Under which stamps one was made, with the bytes in it, ascending.
    made: Vec<Stamp>,
}

impl Tries {
    /// As [`write()`].
    pub async fn write(&mut self, data: &Data, write: &ObjectWrite) -> Result<(), WriteError> {
        if self.is_done() {
            // And could not be told.
            data.cluster().fence().pass().await;
            return Ok(());
        }
        if self.over.is_empty() {
            self.over = pieces(write);
        }
        write_pieces(data, write, &mut self.over).await
    }

    /// Whether one is on all holders.
    pub fn is_done(&self) -> bool {
        !self.over.is_empty() && self.over.iter().all(|piece| piece.done)
    }

    /// Writes into an object that the map names; `write` is the same each time.
    pub async fn write_over(&mut self, data: &Data, write: &ObjectWrite, lease: &Lease) -> Result<(), WriteError> {
        // The map names none that no try made completely, or not before somebody made it anew.
        if was_applied(data, write.oid, &self.made, lease).await? {
            return Ok(());
        }
        if self.over.is_empty() {
            self.over = pieces(write);
        }
        attempt_under(data, write, &mut self.over, lease.generation).await
    }

    /// Makes an object that no map names yet: nobody has seen what earlier tries made.
    pub async fn make(&mut self, data: &Data, write: &ObjectWrite, lease: &Lease) -> Result<(), WriteError> {
        let mut pieces = pieces(write);
        let result = attempt_under(data, write, &mut pieces, lease.generation).await;
        // The last one is applied after all others.
        self.made.extend(pieces.last().into_iter().flat_map(|last| &last.stamps));
        result
    }
}

/// Writes to all holders. Done, it is on every one of them.
pub async fn write(data: &Data, write: ObjectWrite) -> Result<(), WriteError> {
    write_pieces(data, &write, &mut pieces(&write)).await
}

async fn write_pieces(data: &Data, write: &ObjectWrite, pieces: &mut [Piece]) -> Result<(), WriteError> {
    loop {
        match attempt(data, write, pieces, None).await {
            // Another gateway was granted the lease meanwhile: take it back and write again, with a newer stamp.
            Err(WriteError::Fenced) => {}
            other => {
                // A node that lost the quorum says nothing until it has it again; what all holders took stays written.
                data.cluster().fence().pass().await;
                return other;
            }
        }
    }
}

/// What a write takes that need not wait for anything before it is sent.
pub struct Ready {
    location: Location,
    permit: Option<Permit>,
}

/// Whether a write into an object that is there could be sent now, as far as can be said without its lease's lock.
pub fn ready(data: &Data, write: &ObjectWrite) -> Option<Ready> {
    if write.data.len() > PIECE_BYTES_MAX || !is_inside(&data.view().state, write) {
        return None;
    }
    let location = admit(data, write).ok()?;
    let keeps_a_copy = data.view().holders(&location).contains(&data.node());
    let permit = match data.holder().filter(|_| keeps_a_copy) {
        Some(holder) => Some(holder.store().try_admit(write.data.len() as u64)?),
        None => None,
    };
    Some(Ready { location, permit })
}

/// Sends a write that is ready. `told` is called when it has ended, perhaps before this returns, with what is to be tried on if
/// it has not ended well: by whoever brings the last answer and under the lease's lock, so that it must not wait.
pub fn send_now<F>(data: &Data, write: &ObjectWrite, lease: &Arc<Lease>, ready: Ready, told: F)
where
    F: FnOnce(Result<(), WriteError>, Tries) + Send + 'static,
{
    let length = write.data.len();
    let mut state = lease.state();
    if let Err(error) = may_enter(data, &state, write, write.base) {
        drop(state);
        return told(Err(error), Tries::default());
    }
    let call = move |Ended { result, stamps }: Ended| {
        let piece = Piece { range: 0..length, base: Base::Existing, stamps, done: result.is_ok() };
        told(result, Tries { over: vec![piece], made: Vec::new() });
    };
    let Ready { location, permit } = ready;
    let entering = Entering { location, piece: 0..length, base: write.base, permit, done: Done::Call(Box::new(call)) };
    put_under_way(data, lease, &mut state, write, entering);
}

async fn attempt(
    data: &Data,
    write: &ObjectWrite,
    pieces: &mut [Piece],
    generation: Option<u32>,
) -> Result<(), WriteError> {
    let location = may_begin(data, write).await?;
    let lease = match generation {
        None => lease_table::acquire(data, write.oid.vid()).await?,
        Some(generation) => lease_table::held_as(data, write.oid.vid(), generation).ok_or(WriteError::Fenced)?,
    };
    for piece in pieces.iter_mut().filter(|piece| !piece.done) {
        piece.done = was_applied(data, write.oid, &piece.stamps, &lease).await?;
    }
    // All are under way together, in this order.
    let mut under_way = Vec::new();
    let mut result = Ok(());
    for (index, piece) in pieces.iter_mut().enumerate().filter(|(_, piece)| !piece.done) {
        match enter(data, &lease, write, location, piece.range.clone(), piece.base).await {
            Ok(ended) => under_way.push((index, ended)),
            Err(error) => {
                result = Err(error);
                break;
            }
        }
    }
    for (index, ended) in under_way {
        // Every piece is waited for: a client that hears of a failure must not meet the rest of it later.
        let ended = ended.await.unwrap_or(Ended { result: Err(WriteError::Failed), stamps: Vec::new() });
        pieces[index].stamps.extend(ended.stamps);
        pieces[index].done = ended.result.is_ok();
        result = result.and(ended.result);
    }
    result
}

/// Whether a write that was under way when its lease was lost is part of what others have read and written over since: then
/// writing it again would bring an older value back.
async fn was_applied(data: &Data, oid: Oid, stamps: &[Stamp], lease: &Lease) -> Result<bool, WriteError> {
    let Some(last) = stamps.last() else { return Ok(false) };
    // The first generation after the lost one: nobody else had the lease in between.
    if lease.generation <= last.generation + 1 {
        return Ok(false);
    }
    let mut result = Ok(false);
    for stamp in stamps.iter().rev() {
        match was_applied_as(data, oid, *stamp).await {
            Ok(true) => return Ok(true),
            other => result = result.and(other),
        }
    }
    result
}

/// The same, for one of the stamps under which it was sent.
async fn was_applied_as(data: &Data, oid: Oid, stamp: Stamp) -> Result<bool, WriteError> {
    let mut rounds = 0;
    while rounds < FATE_ROUNDS {
        let view = data.view();
        if view.locate(oid).is_none() {
            return Ok(false);
        }
        let mut request = PeerRequest::new(PeerKind::Fate, view.epoch(), data.node());
        request.oid = oid;
        request.stamp = stamp;
        let mut fates = Vec::new();
        // Those who kept a copy then may not keep one now.
        let storing = view.state.members.values().map(|member| &member.member).filter(|member| !member.is_gateway());
        for node in storing.map(|member| member.id) {
            let fate = match data.holder().filter(|_| node == data.node()) {
                Some(holder) => holder.fate(&request),
                None => match data.links().call(node, request, Bytes::new(), FATE_PATIENCE).await {
                    Ok((answer, _)) => fate_of(answer.verdict),
                    Err(_) => Err(Verdict::Failed),
                },
            };
            fates.push(fate);
        }
        if fates.contains(&Ok(Fate::Applied)) {
            marks::hit(Mark::LostWriteWasDone);
            return Ok(true);
        }
        if fates.iter().any(|fate| matches!(fate, Ok(Fate::NotApplied | Fate::Harmless))) {
            marks::hit(Mark::LostWriteWasNot);
            return Ok(false);
        }
        if fates.iter().all(|fate| *fate == Ok(Fate::Unknown)) {
            break;
        }
        // Some are still being brought up to date, or have lost the quorum, and this node with them.
        if !data.cluster().fence().pass().await {
            rounds += 1;
        }
        data.wait_for_change(&view, FATE_INTERVAL).await;
    }
    tracing::error!("nobody knows any more whether a write to object {oid} was done before its lease was lost");
    Err(WriteError::Failed)
}

fn fate_of(verdict: Verdict) -> Result<Fate, Verdict> {
    match verdict {
        Verdict::Ok => Ok(Fate::Applied),
        Verdict::Missing => Ok(Fate::NotApplied),
        Verdict::Invalid => Ok(Fate::Harmless),
        Verdict::Busy => Ok(Fate::Unknown),
        other => Err(other),
    }
}

/// Whether a write may run, as far as can be said without its lease, and where its object lives.
pub async fn may_begin(data: &Data, write: &ObjectWrite) -> Result<Location, WriteError> {
    if !is_inside(&data.view().state, write) {
        // The volume may have grown through another gateway a moment ago.
        catch_up(data).await?;
    }
    admit(data, write)
}

fn admit(data: &Data, write: &ObjectWrite) -> Result<Location, WriteError> {
    let view = data.view();
    if !view.state.is_running() {
        return Err(WriteError::NotRunning);
    }
    let location = view.locate(write.oid).ok_or(WriteError::Invalid)?;
    let end = write.offset.checked_add(write.data.len() as u64).ok_or(WriteError::Invalid)?;
    if end > location.object_bytes {
        return Err(WriteError::Invalid);
    }
    let removal = write.base == Base::Removal;
    if write.oid.kind() == Some(ObjectKind::Data) && is_read_only(&view.state, write.oid) && !removal {
        return Err(WriteError::ReadOnly);
    }
    if removal {
        return Ok(location);
    }
    // A deleted VDI's attributes are not its own: their ids only resemble it.
    let deleted = view.state.vdis.get(&write.oid.vid().get()).is_some_and(|vdi| vdi.deleted);
    if deleted && write.oid.kind() != Some(ObjectKind::Attribute) {
        return Err(WriteError::Missing);
    }
    if view.state.is_strict() && view.holders(&location).len() < usize::from(location.copies.now()) {
        return Err(WriteError::NoHolders);
    }
    if data.is_full(&view.holders(&location)) {
        return Err(WriteError::NoSpace);
    }
    Ok(location)
}

/// Whether a write stays within its volume. Objects are whole, so that one that is copied whole may end beyond.
fn is_inside(state: &ClusterState, write: &ObjectWrite) -> bool {
    let oid = write.oid;
    let Some(vdi) = state.vdis.get(&oid.vid().get()) else { return true };
    if oid.kind() != Some(ObjectKind::Data) || write.base == Base::Removal {
        return true;
    }
    let start = u64::from(oid.index()) * vdi.object_bytes();
    let length = write.data.len() as u64;
    let is_whole = write.offset == 0 && length == vdi.object_bytes();
    let end = start.saturating_add(write.offset).saturating_add(length);
    start < vdi.size_bytes && (is_whole || end <= vdi.size_bytes)
}

/// Comes to everything that was ordered before.
async fn catch_up(data: &Data) -> Result<(), WriteError> {
    let state = data.cluster().barrier().await.map_err(|error| {
        tracing::debug!("cannot learn what was ordered: {error}");
        WriteError::Order
    })?;
    data.await_applied(state.applied).await;
    Ok(())
}

fn is_read_only(state: &ClusterState, oid: Oid) -> bool {
    if planted::is(Bug::SharedWrites) {
        return false;
    }
    state.vdis.get(&oid.vid().get()).is_some_and(|vdi| vdi.is_snapshot())
}

/// Gives the piece its stamp and sends it.
async fn enter(
    data: &Data,
    lease: &Arc<Lease>,
    write: &ObjectWrite,
    location: Location,
    piece: Range<usize>,
    base: Base,
) -> Result<oneshot::Receiver<Ended>, WriteError> {
    let keeps_a_copy = data.view().holders(&location).contains(&data.node());
    let permit = match data.holder().filter(|_| keeps_a_copy) {
        Some(holder) => Some(holder.store().admit(piece.len() as u64).await),
        None => None,
    };
    let (done, receiver) = oneshot::channel();
    let mut state = lease.state();
    may_enter(data, &state, write, base)?;
    let entering = Entering { location, piece, base, permit, done: Done::Task(done) };
    put_under_way(data, lease, &mut state, write, entering);
    Ok(receiver)
}

/// Whether a piece may be sent under a lease now.
fn may_enter(data: &Data, state: &LeaseState, write: &ObjectWrite, base: Base) -> Result<(), WriteError> {
    if state.closed {
        return Err(WriteError::Fenced);
    }
    if write.client.is_gone() {
        marks::hit(Mark::RequestAbandoned);
        return Err(WriteError::Abandoned);
    }
    // Checked again under the lock: a snapshot closes the lease before it freezes the VDI.
    let removal = base == Base::Removal;
    if write.oid.kind() == Some(ObjectKind::Data) && is_read_only(&data.view().state, write.oid) && !removal {
        return Err(WriteError::ReadOnly);
    }
    // So does what makes a volume smaller (`shrink`).
    if !is_inside(&data.view().state, write) {
        return Err(WriteError::BeyondEnd);
    }
    Ok(())
}

/// A piece that is about to be sent.
struct Entering {
    location: Location,
    piece: Range<usize>,
    base: Base,
    permit: Option<Permit>,
    done: Done,
}

fn put_under_way(data: &Data, lease: &Arc<Lease>, state: &mut LeaseState, write: &ObjectWrite, entering: Entering) {
    let Entering { location, piece, base, permit, done } = entering;
    state.sequence += 1;
    let kind = if base == Base::Removal { PeerKind::Remove } else { PeerKind::Write };
    let mut request = PeerRequest::new(kind, state.epoch, data.node());
    request.oid = write.oid;
    request.offset = write.offset + piece.start as u64;
    request.object_bytes = location.object_bytes;
    request.stamp = Stamp { generation: lease.generation, sequence: state.sequence };
    request.flags = match base {
        Base::Existing | Base::Removal => 0,
        Base::Zeros => FLAG_CREATE,
        Base::CopyOf(source) => {
            request.source = source;
            FLAG_CREATE | FLAG_COPY
        }
    };
    if write.durable {
        request.flags |= FLAG_DURABLE;
    }
    if lease.is_passed_on {
        request.flags |= FLAG_DRAINED;
    }
    state.insert(WriteUnderWay {
        request,
        data: write.data.slice(piece),
        earlier: Vec::new(),
        is_sent: false,
        is_held_back: false,
        location,
        permit,
        waiting: Vec::new(),
        enough: true,
        over: Stamp::default(),
        taken: 0,
        refused: Vec::new(),
        done: Some(done),
    });
    fanout::send(data, lease, state);
}
