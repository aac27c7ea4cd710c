//! One client write: may it run, under which stamp, cut to which size. Sending is `fanout`'s.
//!
//! Write path 2 of 6; next: data/gateway/fanout.rs.

use bytes::Bytes;
use qemu_proto::oid::{ObjectKind, Oid};
use sheep_core::peer_message::{FLAG_COPY, FLAG_CREATE, FLAG_DURABLE, PAYLOAD_BYTES_MAX, PeerKind, PeerRequest};
use sheep_core::stamp::Stamp;
use tokio::sync::oneshot;

use super::lease::{Lease, WriteUnderWay};
use super::{WriteError, fanout, lease_table};
use crate::data::Data;
use crate::data::view::Location;

/// Bytes per message to a holder: fits the smallest journal several times over, and lets other writes in between.
const PIECE_BYTES_MAX: usize = 2 << 20;
const _: () = assert!(PIECE_BYTES_MAX <= PAYLOAD_BYTES_MAX);

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

/// Writes under one lease generation only: `Fenced` if this gateway does not hold it (any more). For writes that were
/// decided from what was read under that lease.
pub async fn write_under(data: &Data, write: &ObjectWrite, generation: u32) -> Result<(), WriteError> {
    attempt(data, write, Some(generation)).await
}

/// Writes to all holders. Done, it is on every one of them.
pub async fn write(data: &Data, write: ObjectWrite) -> Result<(), WriteError> {
    loop {
        match attempt(data, &write, None).await {
            // Another gateway was granted the lease meanwhile: take it back and write again, with a newer stamp.
            Err(WriteError::Fenced) => {}
            other => return other,
        }
    }
}

async fn attempt(data: &Data, write: &ObjectWrite, generation: Option<u32>) -> Result<(), WriteError> {
    let location = admit(data, write)?;
    let lease = lease_table::acquire(data, write.oid.vid()).await?;
    if generation.is_some_and(|generation| generation != lease.generation) {
        return Err(WriteError::Fenced);
    }
    if write.data.len() <= PIECE_BYTES_MAX {
        return send(data, &lease, write, location, 0..write.data.len(), write.base).await;
    }
    // The first piece makes the object, the others lie over it; all are under way together, in this order.
    let mut under_way = Vec::new();
    let mut start = 0;
    while start < write.data.len() {
        let end = (start + PIECE_BYTES_MAX).min(write.data.len());
        let base = if start == 0 { write.base } else { Base::Existing };
        under_way.push(enter(data, &lease, write, location, start..end, base).await?);
        start = end;
    }
    let mut result = Ok(());
    for done in under_way {
        // Every piece is waited for: a client that hears of a failure must not meet the rest of it later.
        result = result.and(done.await.unwrap_or(Err(WriteError::Failed)));
    }
    result
}

/// Whether the write may run at all, and where its object lives.
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
    if data.is_full(&view.holders(&location)) {
        return Err(WriteError::NoSpace);
    }
    Ok(location)
}

fn is_read_only(state: &sheep_core::cluster_state::ClusterState, oid: Oid) -> bool {
    state.vdis.get(&oid.vid().get()).is_some_and(|vdi| vdi.is_snapshot())
}

async fn send(
    data: &Data,
    lease: &std::sync::Arc<Lease>,
    write: &ObjectWrite,
    location: Location,
    piece: std::ops::Range<usize>,
    base: Base,
) -> Result<(), WriteError> {
    let done = enter(data, lease, write, location, piece, base).await?;
    done.await.unwrap_or(Err(WriteError::Failed))
}

/// Gives the piece its stamp and sends it.
async fn enter(
    data: &Data,
    lease: &std::sync::Arc<Lease>,
    write: &ObjectWrite,
    location: Location,
    piece: std::ops::Range<usize>,
    base: Base,
) -> Result<oneshot::Receiver<Result<(), WriteError>>, WriteError> {
    let keeps_a_copy = data.view().holders(&location).contains(&data.node());
    let permit = match data.holder().filter(|_| keeps_a_copy) {
        Some(holder) => Some(holder.store().admit(piece.len() as u64).await),
        None => None,
    };
    let (done, receiver) = oneshot::channel();
    let mut state = lease.state();
    if state.closed {
        return Err(WriteError::Fenced);
    }
    // Checked again under the lock: a snapshot closes the lease before it freezes the VDI.
    let removal = base == Base::Removal;
    if write.oid.kind() == Some(ObjectKind::Data) && is_read_only(&data.view().state, write.oid) && !removal {
        return Err(WriteError::ReadOnly);
    }
    state.sequence += 1;
    let sequence = state.sequence;
    let kind = if removal { PeerKind::Remove } else { PeerKind::Write };
    let mut request = PeerRequest::new(kind, state.epoch, data.node());
    request.oid = write.oid;
    request.offset = write.offset + piece.start as u64;
    request.object_bytes = location.object_bytes;
    request.stamp = Stamp { generation: lease.generation, sequence };
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
    let entered = WriteUnderWay {
        request,
        data: write.data.slice(piece),
        location,
        permit,
        waiting: Vec::new(),
        taken: 0,
        refused: Vec::new(),
        done: Some(done),
    };
    state.under_way.insert(sequence, entered);
    state.by_object.entry(write.oid).or_default().push(sequence);
    fanout::send(data, lease, &mut state, sequence);
    Ok(receiver)
}
