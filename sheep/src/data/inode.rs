//! The inode of a VDI: its header comes from the ordered state, its map from an object.
//!
//! The header is never stored: what clients read is made from the VDI table, and what they write becomes an ordered
//! command, so a stale header in a client's memory cannot undo a snapshot or a resize. The map is an object like any other,
//! made at its first write: until then a VDI has its parent's map. A snapshot or clone therefore costs one ordered
//! command, however large the volume is.
//!
//! A crash between a data object's creation and its map entry leaves an object nobody refers to; the next creation of that
//! object replaces it.

use bytes::{Bytes, BytesMut};
use qemu_proto::inode::{
    HEADER_BYTES, INODE_BYTES, InodeHeader, MAP_ENTRY_BYTES, MAP_OFFSET, QEMU_INODE_BYTES, map_entries,
    map_entries_touched, map_offset,
};
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::command::{Command, Outcome, Refusal, VdiEdit};
use sheep_core::stamp::Stamp;
use sheep_core::vdi::Vdi;
use sheep_core::zeros::is_zero;
use tokio::task::JoinSet;

use super::Data;
use super::client::Client;
use super::gateway::write::{Base, ObjectWrite, write, write_under};
use super::gateway::{ReadFailure, WriteError, lease_table, read};
use crate::world::marks::{self, Mark};
use crate::world::planted::{self, Bug};

/// Maps up to this are read many at once; that of a larger one takes longer than its way to a disk thread.
const SMALL_MAP_BYTES: usize = 64 << 10;
/// Maps that one disk thread reads in a row: a way to such a thread and back for each took longer than the reading.
const MAPS_IN_A_ROW: usize = 64;
/// Disk threads that do so at once.
const ROWS: usize = 4;
/// So many maps can be brought into memory at once; what was opened for them has to be open still when they are used (a store
/// keeps 512 files).
pub const WARM_MAPS_MAX: usize = MAPS_IN_A_ROW * ROWS;

/// Why an inode could not be read or written.
#[derive(Debug, thiserror::Error)]
pub enum InodeError {
    /// There is no such VDI.
    #[error("no such VDI")]
    Missing,
    /// Beyond the inode, or an entry that names no VDI.
    #[error("the request does not fit the inode")]
    Invalid,
    /// The VDI is a snapshot.
    #[error("the VDI is a snapshot")]
    ReadOnly,
    /// The map could not be read.
    #[error(transparent)]
    Read(#[from] ReadFailure),
    /// The map could not be written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

/// How a client writes inodes, as far as it matters here.
#[derive(Clone, Debug)]
pub struct InodeWriter {
    /// A request of QEMU's driver on a connection of its own, not one of its data connection.
    pub qemu_synchronous: bool,
    /// Whether the write must be durable when done.
    pub durable: bool,
    /// Whether a clearing of a snapshot's map is refused. Clients with a stale idea of which VDI is the working one are told
    /// that it is done; whoever can follow the snapshot has to know.
    pub strict: bool,
    /// Who asked for it.
    pub client: Client,
}

impl InodeWriter {
    /// Of a client that can follow snapshots.
    pub fn of(client: &Client, durable: bool) -> InodeWriter {
        InodeWriter { qemu_synchronous: false, durable, strict: true, client: client.clone() }
    }
}

/// The header that clients see.
pub fn header_of(vdi: &Vdi) -> InodeHeader {
    let mut header = InodeHeader {
        create_time: vdi.create_time,
        snap_ctime: vdi.snapshot_time,
        vm_clock_nsec: vdi.vm_clock_ns,
        vdi_size: if vdi.deleted { 0 } else { vdi.size_bytes },
        vm_state_size: vdi.vm_state_bytes,
        nr_copies: vdi.copies.now(),
        block_size_shift: vdi.object_size_shift,
        snap_id: vdi.snapshot_id,
        vdi_id: vdi.id.get(),
        parent_vdi_id: vdi.parent.map_or(0, VdiId::get),
        ..InodeHeader::default()
    };
    // By its name a client would take it for one that exists.
    if !vdi.deleted && !vdi.is_being_restored() {
        header.set_name(&vdi.name);
    }
    header.set_tag(&vdi.tag);
    header
}

fn find(data: &Data, id: VdiId) -> Result<std::sync::Arc<Vdi>, InodeError> {
    data.view().state.vdis.get(&id.get()).cloned().ok_or(InodeError::Missing)
}

/// Reads any part of an inode; what lies beyond the map is zeros.
pub async fn read_inode(data: &Data, id: VdiId, offset: u64, length: usize) -> Result<Bytes, InodeError> {
    let vdi = find(data, id)?;
    let end = offset.checked_add(length as u64).ok_or(InodeError::Invalid)?;
    if end > INODE_BYTES as u64 {
        return Err(InodeError::Invalid);
    }
    let mut bytes = BytesMut::zeroed(length);
    if offset < HEADER_BYTES as u64 {
        let header = header_of(&vdi).encode();
        let part = &header[offset as usize..(end as usize).min(HEADER_BYTES)];
        bytes[..part.len()].copy_from_slice(part);
    }
    // Entries beyond the size are zero: the map of a small volume is not read to its end.
    let map_end = end.min(map_offset(0) + vdi.object_count() * MAP_ENTRY_BYTES as u64);
    let map_start = offset.max(MAP_OFFSET as u64);
    if map_start < map_end && !vdi.deleted {
        let map = read_map(data, id, map_start, (map_end - map_start) as usize).await?;
        let at = (map_start - offset) as usize;
        bytes[at..at + map.len()].copy_from_slice(&map);
    }
    Ok(bytes.freeze())
}

/// Reads a part of the map: of the VDI itself or, if it has none yet, of the nearest ancestor that has.
async fn read_map(data: &Data, id: VdiId, offset: u64, length: usize) -> Result<Bytes, ReadFailure> {
    loop {
        let mut passed = Vec::new();
        let mut at = Some(id);
        let bytes = loop {
            let Some(next) = at else { break BytesMut::zeroed(length).freeze() };
            // As of before the map is missed: a VDI loses its parent once it has a map of its own.
            let parent = parent_of(data, next);
            if let Some(bytes) = read::read_now(data, Oid::inode(next), offset, length) {
                break bytes;
            }
            match read::read(data, Oid::inode(next), offset, length).await {
                Err(ReadFailure::Missing) => {
                    passed.push(next);
                    at = parent;
                }
                other => break other?,
            }
        };
        // This VDI and its parent's map: snapshots' maps do not change, and the parent's goes only when this one has its own.
        if passed.len() < 2 || none_has_a_map(data, &passed).await? {
            return Ok(bytes);
        }
    }
}

/// Whether the VDIs that were passed on a way up, because they had no map of their own, still have none. One may have been
/// given one meanwhile, and the map of one above it, which was deleted, may have gone before the walk came there: then what was
/// found above that is older than what they share. From the top: whose map has come and gone as well had one below it made first.
async fn none_has_a_map(data: &Data, passed: &[VdiId]) -> Result<bool, ReadFailure> {
    for id in passed.iter().rev() {
        if is_made(data, *id).await? {
            marks::hit(Mark::MapMadeMeanwhile);
            return Ok(planted::is(Bug::PassedMap));
        }
    }
    Ok(true)
}

fn parent_of(data: &Data, id: VdiId) -> Option<VdiId> {
    data.view().state.vdis.get(&id.get()).and_then(|vdi| vdi.parent)
}

/// Whether a VDI has a map of its own.
pub async fn is_made(data: &Data, id: VdiId) -> Result<bool, ReadFailure> {
    Ok(!is_gone(data, Oid::inode(id)).await?)
}

/// One entry of the map: the VDI that owns the object at an index, if there is one.
pub async fn map_entry(data: &Data, id: VdiId, index: u32) -> Result<Option<VdiId>, ReadFailure> {
    let bytes = read_map(data, id, map_offset(index), MAP_ENTRY_BYTES).await?;
    Ok(owner_of(&bytes))
}

/// What one map entry says: the VDI that owns the object, if there is one.
pub fn owner_of(entry: &[u8]) -> Option<VdiId> {
    map_entries(entry).next().and_then(VdiId::new).filter(|id| id.get() != 0)
}

/// Entries of the map; those beyond its end are 0.
pub async fn map_range(data: &Data, id: VdiId, first: u32, count: usize) -> Result<Vec<u32>, InodeError> {
    let bytes = read_inode(data, id, map_offset(first), count * MAP_ENTRY_BYTES).await?;
    Ok(map_entries(&bytes).collect())
}

/// The whole map, as far as the volume's size goes.
pub async fn whole_map(data: &Data, id: VdiId) -> Result<Vec<u32>, InodeError> {
    let vdi = find(data, id)?;
    let length = vdi.object_count() as usize * MAP_ENTRY_BYTES;
    let bytes = read_map(data, id, map_offset(0), length).await?;
    Ok(map_entries(&bytes).collect())
}

/// As [`whole_map`], if this node has it in memory, it is not large, and nothing has to be waited for.
pub fn whole_map_now(data: &Data, id: VdiId) -> Option<Vec<u32>> {
    let length = small_map_bytes(data, id)?;
    let bytes = read::read_now(data, Oid::inode(id), map_offset(0), length)?;
    Some(map_entries(&bytes).collect())
}

fn small_map_bytes(data: &Data, id: VdiId) -> Option<usize> {
    let length = find(data, id).ok()?.object_count() as usize * MAP_ENTRY_BYTES;
    (1..=SMALL_MAP_BYTES).contains(&length).then_some(length)
}

/// Brings the maps of up to [`WARM_MAPS_MAX`] VDIs into memory, as far as they are on this node and not large: for
/// [`whole_map_now`].
pub async fn warm_maps(data: &Data, ids: impl Iterator<Item = VdiId>) {
    let Some(holder) = data.holder() else { return };
    let part = |id: VdiId| Some((Oid::inode(id), map_offset(0), small_map_bytes(data, id)?));
    let parts: Vec<_> = ids.take(WARM_MAPS_MAX).filter_map(part).collect();
    let mut rows = JoinSet::new();
    for row in parts.chunks(MAPS_IN_A_ROW) {
        let (holder, row) = (holder.clone(), row.to_vec());
        rows.spawn(async move { holder.store().warm(row).await });
    }
    rows.join_all().await;
}

/// Writes any part of an inode, by the rules that keep clients with stale copies from doing harm.
pub async fn write_inode(
    data: &Data,
    id: VdiId,
    offset: u64,
    payload: &Bytes,
    writer: InodeWriter,
) -> Result<(), InodeError> {
    let end = offset.checked_add(payload.len() as u64).ok_or(InodeError::Invalid)?;
    if end > INODE_BYTES as u64 {
        return Err(InodeError::Invalid);
    }
    if payload.is_empty() {
        // QEMU sends a flush that its connection lost once more in this form.
        super::flush::flush(data, Some(id)).await?;
        return Ok(());
    }
    if offset < HEADER_BYTES as u64 {
        write_header(data, id, offset, &payload[..payload.len().min((HEADER_BYTES as u64 - offset) as usize)]).await?;
    }
    let map_start = offset.max(MAP_OFFSET as u64);
    let map_end = end.min(QEMU_INODE_BYTES as u64);
    if map_start < map_end {
        let part = payload.slice((map_start - offset) as usize..(map_end - offset) as usize);
        write_map(data, id, map_start, part, writer).await?;
    }
    Ok(())
}

/// Takes over what a header write may change: the tag, a larger size, the figures of saved machine state. The rest of a
/// client's header may be days old and is ignored (protocol.md section 9.5).
async fn write_header(data: &Data, id: VdiId, offset: u64, part: &[u8]) -> Result<(), InodeError> {
    let vdi = data.view().state.live_vdi(id).cloned().ok_or(InodeError::Missing)?;
    let before = header_of(&vdi);
    let mut bytes = before.encode();
    bytes[offset as usize..offset as usize + part.len()].copy_from_slice(part);
    let Ok(after) = InodeHeader::decode(&bytes) else { return Err(InodeError::Invalid) };
    let changed = |old: u64, new: u64| (old != new).then_some(new);
    let edit = VdiEdit {
        tag: (after.tag != before.tag).then(|| after.tag().to_vec()),
        size_bytes: changed(before.vdi_size, after.vdi_size).filter(|size| *size > before.vdi_size),
        vm_state_bytes: changed(before.vm_state_size, after.vm_state_size),
        vm_clock_ns: changed(before.vm_clock_nsec, after.vm_clock_nsec),
    };
    if edit == VdiEdit::default() {
        return Ok(());
    }
    match data.cluster().propose(Command::EditVdi { vdi: id, edit }).await {
        Ok(Outcome::Refused(Refusal::ReadOnly)) => Err(InodeError::ReadOnly),
        Ok(Outcome::Refused(Refusal::NoVdi)) => Err(InodeError::Missing),
        Ok(Outcome::Refused(Refusal::InvalidParameters)) => Err(InodeError::Invalid),
        Ok(Outcome::Refused(_)) => Err(WriteError::NotRunning.into()),
        Ok(_) => Ok(()),
        Err(error) => {
            tracing::warn!("cannot change the header of VDI {id}: {error}");
            Err(WriteError::Order.into())
        }
    }
}

async fn write_map(data: &Data, id: VdiId, offset: u64, payload: Bytes, writer: InodeWriter) -> Result<(), InodeError> {
    let clears = is_zero(&payload);
    if clears && writer.qemu_synchronous && payload.len() > MAP_ENTRY_BYTES && find(data, id).is_ok() {
        // QEMU clears the working VDI's map when it means to delete a snapshot (protocol.md section 9.2, bug 1).
        return Ok(());
    }
    let touched = map_entries_touched(offset, payload.len() as u64);
    let start = map_offset(touched.start);
    loop {
        refuse_snapshot(data, id, clears && !writer.strict)?;
        // What is read here must still hold when it is written: both under one lease.
        let hold = lease_table::hold(data, id).await?;
        let lease = &hold.lease;
        // After the lease, as creators of objects do: whoever has the turn is not waiting for a lease that somebody keeps here.
        let turn = data.inode_turns().turn(Oid::inode(id));
        let _one_at_a_time = turn.lock().await;
        // A snapshot may have been made while the lease was waited for.
        let vdi = refuse_snapshot(data, id, clears && !writer.strict)?;
        if vdi.is_snapshot() {
            // A discard by a client that opened the snapshot would destroy it: acknowledged and ignored.
            return Ok(());
        }
        let old = read_map(data, id, start, touched.len() * MAP_ENTRY_BYTES).await?;
        let mut new = BytesMut::from(&old[..]);
        let at = (offset - start) as usize;
        new[at..at + payload.len()].copy_from_slice(&payload);
        let known = |entry: u32| entry == 0 || data.view().state.vdis.contains_key(&entry);
        if !map_entries(&new).all(known) {
            return Err(InodeError::Invalid);
        }
        let new = new.freeze();
        let mut dropped = Vec::new();
        let mut released = Vec::new();
        for (index, (before, after)) in touched.clone().zip(map_entries(&old).zip(map_entries(&new))) {
            match VdiId::new(before).filter(|before| before.get() != 0 && before.get() != after) {
                // Nobody else refers to an object of a working VDI.
                Some(before) if before == id => dropped.push(index),
                Some(before) => released.push(Oid::data(before, index)),
                None => {}
            }
            // A client that was away for long may name what was taken for the remains of a crash (`sweep`).
            if after == id.get() && before != after && is_gone(data, Oid::data(id, index)).await? {
                return Err(WriteError::Missing.into());
            }
        }
        for index in &dropped {
            lease.note_mapped(*index, false);
        }
        // A map that names what is gone would be an error for ever: the map first, and durably.
        let durable = writer.durable || !dropped.is_empty();
        let entries = MapEntries { offset: start, bytes: new, durable, client: writer.client.clone() };
        match put_map(data, id, entries, lease.generation).await {
            Err(InodeError::Write(WriteError::Fenced)) => continue,
            other => other?,
        }
        for index in dropped {
            // Gone before the answer, so that a later creation of the same object cannot be hit by it.
            drop_unmapped(data, id, index, lease.generation).await?;
        }
        for oid in released {
            data.note_released(oid);
        }
        return Ok(());
    }
}

async fn is_gone(data: &Data, oid: Oid) -> Result<bool, ReadFailure> {
    match read::read(data, oid, 0, 0).await {
        Ok(_) => Ok(false),
        Err(ReadFailure::Missing) => Ok(true),
        Err(error) => Err(error),
    }
}

/// The VDI, if its map may change; a snapshot is an error unless that is to be passed over.
fn refuse_snapshot(data: &Data, id: VdiId, passed_over: bool) -> Result<std::sync::Arc<Vdi>, InodeError> {
    let vdi = data.view().state.live_vdi(id).cloned().ok_or(InodeError::Missing)?;
    if vdi.is_snapshot() && !passed_over { Err(InodeError::ReadOnly) } else { Ok(vdi) }
}

/// Removes an object that the map stopped naming under a lease generation, unless it was made anew under a later one.
async fn drop_unmapped(data: &Data, id: VdiId, index: u32, generation: u32) -> Result<(), InodeError> {
    let removal = removal_of(Oid::data(id, index));
    let mut generation = generation;
    loop {
        match write_under(data, &removal, generation).await {
            Err(WriteError::Fenced) => {
                generation = lease_table::acquire(data, id).await?.generation;
                if map_entry(data, id, index).await? == Some(id) {
                    return Ok(());
                }
            }
            other => return Ok(other?),
        }
    }
}

/// Names an object in its VDI's map, durably, under the lease generation under which the object was made.
pub async fn map_own(data: &Data, oid: Oid, generation: u32, client: &Client) -> Result<(), InodeError> {
    let id = oid.vid();
    let turn = data.inode_turns().turn(Oid::inode(id));
    let _one_at_a_time = turn.lock().await;
    refuse_snapshot(data, id, false)?;
    let entry = Bytes::copy_from_slice(&id.get().to_le_bytes());
    let entries = MapEntries { offset: map_offset(oid.index()), bytes: entry, durable: true, client: client.clone() };
    put_map(data, id, entries, generation).await
}

/// Entries of a map to be written.
struct MapEntries {
    /// Bytes into the inode.
    offset: u64,
    bytes: Bytes,
    durable: bool,
    client: Client,
}

/// Writes map bytes; makes the inode object if the VDI still has its parent's map. `Fenced` if the lease under which that
/// was found out is over: then the object may have been made elsewhere, and must not be made again over it.
async fn put_map(data: &Data, id: VdiId, entries: MapEntries, generation: u32) -> Result<(), InodeError> {
    let MapEntries { offset, bytes, durable, client } = entries;
    let oid = Oid::inode(id);
    let object = ObjectWrite { oid, offset, data: bytes, base: Base::Existing, durable, client };
    if is_made(data, id).await? {
        return Ok(write_under(data, &object, generation).await?);
    }
    let object = match nearest_map(data, id).await? {
        None => ObjectWrite { base: Base::Zeros, ..object },
        Some(source) if data.view().same_chain(source, id) => {
            ObjectWrite { base: Base::CopyOf(Oid::inode(source)), ..object }
        }
        Some(source) => {
            // The ancestor's inode is on other nodes: its map comes through here.
            let whole = QEMU_INODE_BYTES - MAP_OFFSET;
            let mut map = BytesMut::from(&read::read(data, Oid::inode(source), MAP_OFFSET as u64, whole).await?[..]);
            let at = (object.offset - MAP_OFFSET as u64) as usize;
            map[at..at + object.data.len()].copy_from_slice(&object.data);
            ObjectWrite { offset: MAP_OFFSET as u64, data: map.freeze(), base: Base::Zeros, ..object }
        }
    };
    Ok(write_under(data, &object, generation).await?)
}

/// Makes sure that a VDI has a map of its own, so that its ancestors' may go.
pub async fn materialise(data: &Data, id: VdiId) -> Result<(), InodeError> {
    // Without the lease first: somebody may be writing under it.
    if is_made(data, id).await? {
        return Ok(());
    }
    let turn = data.inode_turns().turn(Oid::inode(id));
    let _one_at_a_time = turn.lock().await;
    loop {
        let generation = lease_table::acquire(data, id).await?.generation;
        if is_made(data, id).await? {
            return Ok(());
        }
        let entry = read_map(data, id, map_offset(0), MAP_ENTRY_BYTES).await?;
        let entries = MapEntries { offset: map_offset(0), bytes: entry, durable: true, client: Client::default() };
        match put_map(data, id, entries, generation).await {
            Err(InodeError::Write(WriteError::Fenced)) => {}
            other => return other,
        }
    }
}

/// The nearest ancestor that has a map of its own. The VDI has none, and the caller keeps others from making it.
async fn nearest_map(data: &Data, id: VdiId) -> Result<Option<VdiId>, ReadFailure> {
    loop {
        let mut passed = Vec::new();
        let mut at = parent_of(data, id);
        while let Some(next) = at
            && !is_made(data, next).await?
        {
            passed.push(next);
            at = parent_of(data, next);
        }
        if passed.is_empty() || none_has_a_map(data, &passed).await? {
            return Ok(at);
        }
    }
}

/// Clears one map entry and removes its object, as DISCARD_OBJ asks. See [`InodeWriter`] for `strict`.
pub async fn discard(data: &Data, oid: Oid, writer: InodeWriter) -> Result<(), InodeError> {
    // Creators of the same object in this process wait until it is gone.
    let turn = data.inode_turns().turn(oid);
    let _no_creator = turn.lock().await;
    let entry = map_entry(data, oid.vid(), oid.index()).await?;
    if entry.is_none() {
        return Ok(());
    }
    write_map(data, oid.vid(), map_offset(oid.index()), Bytes::from_static(&[0; MAP_ENTRY_BYTES]), writer).await
}

/// Whether an object of a volume that was written under a lease generation, and that the map does not name, may be about to be
/// named: whoever made it may still be there.
pub fn may_be_named(data: &Data, id: VdiId, generation: u32) -> bool {
    let granted = data.view().state.leases.get(&id.get()).copied();
    granted.is_some_and(|granted| granted.holder.is_some() && granted.generation <= generation)
}

/// Removes an object of a volume, unless the map names it or it is not as it was `seen` any more; tells whether it was removed.
/// Creators that name what they make under the lease are waited for; others must have had their time.
pub async fn drop_orphan(data: &Data, oid: Oid, seen: Stamp) -> Result<bool, InodeError> {
    let id = oid.vid();
    // As in `discard`.
    let turn = data.inode_turns().turn(oid);
    let _no_creator = turn.lock().await;
    let hold = lease_table::hold(data, id).await?;
    let now = data.holder().and_then(|holder| holder.store().entry(oid));
    if now.is_none_or(|now| now.version.stamp != seen) || map_entry(data, id, oid.index()).await? == Some(id) {
        return Ok(false);
    }
    let removal = removal_of(oid);
    Ok(write_under(data, &removal, hold.lease.generation).await.map(|()| true)?)
}

/// Begun, it is ended whoever asked for it.
fn removal_of(oid: Oid) -> ObjectWrite {
    ObjectWrite { oid, offset: 0, data: Bytes::new(), base: Base::Removal, durable: true, client: Client::default() }
}

/// Removes an object from all its holders.
pub async fn drop_object(data: &Data, oid: Oid) -> Result<(), WriteError> {
    write(data, removal_of(oid)).await
}
