//! One VDI as one disk: byte ranges to objects, with creation, copy-on-write, discard and flush. What front ends whose
//! clients know nothing of objects (NBD) stand on; QEMU's native driver does the same on its own side.
//!
//! Always holds:
//! 1. An object is durable on all holders before the map names it, and the map entry before the write that needed it is
//!    answered: no power loss leaves a map that names nothing, or an object with durable data that nothing names.
//! 2. A snapshot taken meanwhile, by whomever, is followed: its successor takes the writes. Nothing else is: another volume
//!    of the same name is another volume.
//! 3. An object is made, and named in the map, under one lease generation, in which the map was read before. What is
//!    remembered of the map is remembered with the lease.

use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use qemu_proto::inode::{MAP_ENTRY_BYTES, map_offset};
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::vdi::Vdi;
use sheep_core::vdi_name::Target;

use super::Data;
use super::client::Client;
use super::gateway::write::{Base, ObjectWrite, Tries, ready, send_now, write};
use super::gateway::{ReadFailure, WriteError, lease_table, read};
use super::inode::{self, InodeError, InodeWriter};
use super::throttle;
use super::traffic::Traffic;
use super::volumes::{self, Creation, VolumeError};
use crate::world::marks::{self, Mark};
use crate::world::planted::{self, Bug};

/// Zeros are written in pieces of this size where they cannot be a hole.
const ZEROS: &[u8] = &[0; 1 << 20];
/// How long a client that takes no answers is left alone.
const PAUSE: std::time::Duration = std::time::Duration::from_millis(1);
/// Objects whose inside is looked at to say which parts of a range are allocated: tens of milliseconds.
const LOOKED_INTO_MAX: usize = 256;
/// A map entry and its object are looked up again when they contradict each other: somebody discards or creates the object.
const LOOKS_MAX: u32 = 16;

/// Why a disk did not do what it was asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum DiskError {
    /// The volume was deleted.
    #[error("the volume does not exist any more")]
    Gone,
    /// It is a snapshot.
    #[error("a snapshot cannot be written to")]
    ReadOnly,
    /// Beyond the end.
    #[error("the range is not inside the volume")]
    OutOfRange,
    /// A holder's disk is full.
    #[error("a node that must keep a copy has no space left")]
    NoSpace,
    /// The cluster does not serve, or no copy can be used.
    #[error("the data cannot be reached")]
    Failed,
}

impl From<WriteError> for DiskError {
    fn from(error: WriteError) -> DiskError {
        match error {
            WriteError::NoSpace => DiskError::NoSpace,
            WriteError::ReadOnly => DiskError::ReadOnly,
            WriteError::BeyondEnd => DiskError::OutOfRange,
            WriteError::Abandoned => DiskError::Failed,
            error => {
                tracing::warn!("a guest's request fails: {error}");
                DiskError::Failed
            }
        }
    }
}

impl From<ReadFailure> for DiskError {
    fn from(error: ReadFailure) -> DiskError {
        tracing::warn!("a guest's request fails: {error}");
        DiskError::Failed
    }
}

impl From<InodeError> for DiskError {
    fn from(error: InodeError) -> DiskError {
        match error {
            InodeError::Missing => DiskError::Gone,
            InodeError::ReadOnly => DiskError::ReadOnly,
            InodeError::Write(error) => error.into(),
            InodeError::Read(error) => error.into(),
            InodeError::Invalid => DiskError::Failed,
        }
    }
}

impl From<VolumeError> for DiskError {
    fn from(error: VolumeError) -> DiskError {
        match error {
            VolumeError::Write(error) => error.into(),
            VolumeError::Read(error) => error.into(),
            VolumeError::Refused(_) => DiskError::Gone,
            VolumeError::Order => DiskError::Failed,
        }
    }
}

/// A stretch of the disk that is all the same.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Extent {
    /// Bytes.
    pub length: u64,
    /// Whether it has the property asked for.
    pub is_set: bool,
}

/// Why a write under a lease was not done.
enum Again {
    /// Something changed: from the beginning.
    Yes,
    /// For good.
    No(DiskError),
}

impl From<WriteError> for Again {
    fn from(error: WriteError) -> Again {
        match error {
            WriteError::Fenced | WriteError::ReadOnly | WriteError::Missing => Again::Yes,
            error => Again::No(error.into()),
        }
    }
}

impl From<DiskError> for Again {
    fn from(error: DiskError) -> Again {
        Again::No(error)
    }
}

impl From<VolumeError> for Again {
    fn from(error: VolumeError) -> Again {
        match error {
            VolumeError::Write(error) => error.into(),
            VolumeError::Read(ReadFailure::Missing) => Again::Yes,
            error => Again::No(error.into()),
        }
    }
}

impl From<InodeError> for Again {
    fn from(error: InodeError) -> Again {
        match error {
            InodeError::Write(error) => error.into(),
            // The map that was on the way up moved down meanwhile.
            InodeError::ReadOnly | InodeError::Read(ReadFailure::Missing) => Again::Yes,
            error => Again::No(error.into()),
        }
    }
}

/// A part of a read.
#[derive(Clone, Debug)]
pub enum Part {
    /// As many zeros, because nothing is allocated there.
    Hole(u64),
    /// What is there.
    Data(Bytes),
}

/// An open volume or snapshot.
pub struct VirtualDisk {
    data: Data,
    name: Vec<u8>,
    is_snapshot: bool,
    size_bytes: u64,
    object_bytes: u64,
    /// Which VDI it is now.
    head: Mutex<VdiId>,
    client: Client,
}

/// How a write that was sent without waiting ended.
pub enum Sent {
    /// It is on all holders.
    Done,
    /// [`VirtualDisk::write_on`] goes on with it.
    Undecided(Tries),
}

/// A piece of a range that lies in one object.
#[derive(Clone, Copy)]
struct Piece {
    index: u32,
    /// Bytes into the object.
    offset: u64,
    length: u64,
}

impl VirtualDisk {
    /// Opens a working VDI, or a snapshot by tag or number.
    pub async fn open(data: &Data, name: &[u8], target: Target<'_>) -> Result<VirtualDisk, VolumeError> {
        let found = volumes::lookup(data, name, target).await?;
        let vdi = data.view().state.vdis.get(&found.id.get()).cloned();
        let vdi = vdi.ok_or(VolumeError::Order)?;
        Ok(VirtualDisk {
            data: data.clone(),
            name: name.to_vec(),
            is_snapshot: vdi.is_snapshot(),
            size_bytes: vdi.size_bytes,
            object_bytes: vdi.object_bytes(),
            head: Mutex::new(vdi.id),
            client: Client::default(),
        })
    }

    /// Where requests for it are counted.
    pub fn traffic(&self) -> &Arc<Traffic> {
        self.data.traffic()
    }

    /// Bytes, as of the opening.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Bytes of one of its objects.
    pub fn object_bytes(&self) -> u64 {
        self.object_bytes
    }

    /// Whether it is a snapshot.
    pub fn is_snapshot(&self) -> bool {
        self.is_snapshot
    }

    /// The VDI that it is now: invariant 2.
    pub fn id(&self) -> Result<VdiId, DiskError> {
        let view = self.data.view();
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        let vdi = view.state.vdis.get(&head.get()).ok_or(DiskError::Gone)?;
        if !vdi.deleted && vdi.is_snapshot() == self.is_snapshot {
            return Ok(*head);
        }
        // What was the working VDI may have become a snapshot and been deleted since the last request.
        if self.is_snapshot || !vdi.is_snapshot() {
            return Err(DiskError::Gone);
        }
        // It may have been given another name since.
        let next = view.state.lookup(&vdi.name, Target::Current).ok().and_then(|id| view.state.live_vdi(id));
        let is_successor = |next: &&std::sync::Arc<Vdi>| {
            !next.is_snapshot() && next.object_bytes() == self.object_bytes && view.same_chain(next.id, *head)
        };
        marks::hit(Mark::SnapshotFollowed);
        *head = next.filter(is_successor).ok_or(DiskError::Gone)?.id;
        Ok(*head)
    }

    /// Lets a moment pass, for whoever cannot be served faster.
    pub async fn pause(&self) {
        self.data.world().clock.sleep(PAUSE).await;
    }

    /// Whether this gateway knows an object to be the working VDI's own.
    fn is_own(&self, id: VdiId, index: u32) -> bool {
        self.data.leases().held(id).is_some_and(|lease| lease.is_mapped(index))
    }

    fn pieces(&self, offset: u64, length: u64) -> Result<impl Iterator<Item = Piece> + use<>, DiskError> {
        let end = offset.checked_add(length).filter(|end| *end <= self.size_bytes).ok_or(DiskError::OutOfRange)?;
        let object_bytes = self.object_bytes;
        let mut at = offset;
        Ok(std::iter::from_fn(move || {
            if at >= end {
                return None;
            }
            let inside = at % object_bytes;
            let piece = Piece {
                index: (at / object_bytes) as u32,
                offset: inside,
                length: (object_bytes - inside).min(end - at),
            };
            at += piece.length;
            Some(piece)
        }))
    }

    /// Reads, if that is within one object of which this node has a current copy, and nothing has to be waited for.
    pub fn read_now(&self, offset: u64, length: usize) -> Option<Bytes> {
        let piece = self.pieces(offset, length as u64).ok()?.next().filter(|piece| piece.length == length as u64)?;
        let id = self.id().ok()?;
        if throttle::is_limited(&self.data, id) {
            return None;
        }
        let owner = if self.is_own(id, piece.index) {
            id
        } else {
            let entry = read::read_now(&self.data, Oid::inode(id), map_offset(piece.index), MAP_ENTRY_BYTES)?;
            inode::owner_of(&entry)?
        };
        read::read_now(&self.data, Oid::data(owner, piece.index), piece.offset, length)
    }

    /// Reads a range in parts, in order.
    pub async fn read(&self, offset: u64, length: u64) -> Result<Vec<Part>, DiskError> {
        let mut pieces = self.pieces(offset, length)?;
        let (Some(first), second) = (pieces.next(), pieces.next()) else { return Ok(Vec::new()) };
        let Some(second) = second else { return Ok(vec![self.read_piece(first).await?]) };
        // Two at a time, so that the ways to two objects' holders overlap.
        let mut parts = Vec::new();
        let mut pair = (Some(first), Some(second));
        while let (Some(one), other) = pair {
            match other {
                Some(other) => {
                    let (one, other) = tokio::join!(self.read_piece(one), self.read_piece(other));
                    parts.extend([one?, other?]);
                }
                None => parts.push(self.read_piece(one).await?),
            }
            pair = (pieces.next(), pieces.next());
        }
        Ok(parts)
    }

    async fn read_piece(&self, piece: Piece) -> Result<Part, DiskError> {
        for _ in 0..LOOKS_MAX {
            let id = self.id()?;
            let is_own = self.is_own(id, piece.index);
            let owner = if is_own {
                id
            } else {
                let entry = inode::map_entry(&self.data, id, piece.index).await?;
                // A map of what is a snapshot by now, or of what is deleted, says nothing of this disk.
                if self.id()? != id {
                    continue;
                }
                match entry {
                    None => return Ok(Part::Hole(piece.length)),
                    Some(owner) => owner,
                }
            };
            match read::read(&self.data, Oid::data(owner, piece.index), piece.offset, piece.length as usize).await {
                // What was known with a lease that was lost before this began, unheard, must not be told: the read has waited for
                // the quorum, so that this node knows of it now.
                Ok(_) if is_own && (self.id()? != id || !self.is_own(id, piece.index)) => {
                    marks::hit(Mark::ReadLookedAgain);
                }
                Ok(bytes) => return Ok(Part::Data(bytes)),
                // Discarded, or copied by somebody whose source then went: look again.
                Err(ReadFailure::Missing) => {
                    marks::hit(Mark::ReadLookedAgain);
                    self.forget_own(id, piece.index);
                }
                Err(error) => return Err(error.into()),
            }
        }
        tracing::error!("object {} of volume {} is in the map and nowhere else", piece.index, self.shown_name());
        Err(DiskError::Failed)
    }

    fn forget_own(&self, id: VdiId, index: u32) {
        if let Some(lease) = self.data.leases().held(id) {
            lease.note_mapped(index, false);
        }
    }

    fn shown_name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Writes. Done, it is on all holders; durable there only if asked.
    pub async fn write(&self, offset: u64, bytes: Bytes, durable: bool) -> Result<(), DiskError> {
        self.write_on(offset, bytes, durable, Tries::default()).await
    }

    /// As [`VirtualDisk::write`]; goes on with what [`VirtualDisk::write_now`] has not ended.
    pub async fn write_on(&self, offset: u64, bytes: Bytes, durable: bool, tries: Tries) -> Result<(), DiskError> {
        if self.is_snapshot {
            return Err(DiskError::ReadOnly);
        }
        if tries.is_done() {
            self.data.cluster().fence().pass().await;
            return Ok(());
        }
        // What was tried was within one object.
        let mut tries = Some(tries);
        let mut at = 0;
        for piece in self.pieces(offset, bytes.len() as u64)? {
            let part = bytes.slice(at..at + piece.length as usize);
            at += piece.length as usize;
            self.write_piece(piece, part, durable, tries.take().unwrap_or_default()).await?;
        }
        Ok(())
    }

    /// Sends a write that is within one object which is the volume's own, if nothing has to be waited for; gives `told` back if
    /// not. It is called when the write has ended, by whoever brings the last answer.
    pub fn write_now<F>(&self, offset: u64, bytes: &Bytes, durable: bool, told: F) -> Result<(), F>
    where
        F: FnOnce(Sent) + Send + 'static,
    {
        let length = bytes.len() as u64;
        let piece = self.pieces(offset, length).ok().and_then(|mut pieces| pieces.next());
        let (Some(piece), Ok(id)) = (piece.filter(|piece| piece.length == length), self.id()) else { return Err(told) };
        let lease = self.data.leases().held(id).filter(|lease| lease.is_mapped(piece.index));
        let Some(lease) = lease.filter(|_| !throttle::is_limited(&self.data, id)) else { return Err(told) };
        let object = self.write_of(Oid::data(id, piece.index), piece, bytes, durable);
        let Some(ready) = ready(&self.data, &object) else { return Err(told) };
        let data = self.data.clone();
        send_now(&self.data, &object, &lease, ready, move |result, tries| {
            let may_be_told = result.is_ok() && data.cluster().fence().is_open();
            told(if may_be_told { Sent::Done } else { Sent::Undecided(tries) });
        });
        Ok(())
    }

    fn write_of(&self, oid: Oid, piece: Piece, bytes: &Bytes, durable: bool) -> ObjectWrite {
        let (data, client) = (bytes.clone(), self.client.clone());
        ObjectWrite { oid, offset: piece.offset, data, base: Base::Existing, durable, client }
    }

    /// Gives the volume a copy of its own of an object that it shares.
    pub async fn make_own(&self, index: u32) -> Result<(), DiskError> {
        if self.is_snapshot {
            return Err(DiskError::ReadOnly);
        }
        // A write of nothing.
        self.write_piece(Piece { index, offset: 0, length: 0 }, Bytes::new(), true, Tries::default()).await
    }

    /// Who uses it. When that has left, no write is begun any more.
    pub fn client(&self) -> &Client {
        &self.client
    }

    /// Waits until the cluster serves; see [`Data::await_service`].
    pub async fn await_service(&self) {
        self.data.await_service().await;
    }

    /// Waits as long as the volume's limits ask before a request that moves so many bytes.
    pub async fn pass_limits(&self, bytes: usize) {
        let vdi = *self.head.lock().unwrap_or_else(PoisonError::into_inner);
        throttle::pass(&self.data, vdi, bytes).await;
    }

    async fn write_piece(&self, piece: Piece, bytes: Bytes, durable: bool, mut tries: Tries) -> Result<(), DiskError> {
        let mut tried = None;
        for _ in 0..LOOKS_MAX {
            let id = self.id()?;
            if tried.replace(id).is_some_and(|tried| tried != id) {
                // Into a successor: another object.
                tries = Tries::default();
            }
            let oid = Oid::data(id, piece.index);
            if self.is_own(id, piece.index) {
                match tries.write(&self.data, &self.write_of(oid, piece, &bytes, durable)).await {
                    Ok(()) => return Ok(()),
                    // Discarded, or frozen by a snapshot: look again.
                    Err(WriteError::Missing) => self.forget_own(id, piece.index),
                    Err(WriteError::ReadOnly) => self.data.settle_in().await,
                    Err(error) => return Err(error.into()),
                }
                continue;
            }
            let turn = self.data.inode_turns().turn(oid);
            let _one_creator = turn.lock().await;
            match self.write_under_lease(id, piece, &bytes, durable, &mut tries).await {
                Ok(()) => return Ok(()),
                // The lease went elsewhere, a snapshot froze the VDI, the source of a copy was given back: look again.
                Err(Again::Yes) => {
                    marks::hit(Mark::WriteLookedAgain);
                    self.data.settle_in().await;
                }
                Err(Again::No(error)) => return Err(error),
            }
        }
        let name = self.shown_name();
        tracing::warn!(
            "gave up a write to object {} of volume {name}: it changed {LOOKS_MAX} times meanwhile",
            piece.index
        );
        Err(DiskError::Failed)
    }

    /// Writes into an object, making it and naming it in the map if need be: invariants 1 and 3.
    async fn write_under_lease(
        &self,
        id: VdiId,
        piece: Piece,
        bytes: &Bytes,
        durable: bool,
        tries: &mut Tries,
    ) -> Result<(), Again> {
        let hold = lease_table::hold(&self.data, id).await?;
        let lease = &hold.lease;
        if self.id()? != id {
            return Err(Again::Yes);
        }
        let owner = inode::map_entry(&self.data, id, piece.index).await.map_err(DiskError::from)?;
        let source = owner.filter(|owner| *owner != id).map(|owner| Oid::data(owner, piece.index));
        if source.is_some() {
            marks::hit(Mark::CopiedOnWrite);
        }
        let oid = Oid::data(id, piece.index);
        let mut creation = Creation {
            oid,
            offset: piece.offset,
            payload: bytes.clone(),
            source,
            durable,
            durably_made: true,
            client: self.client.clone(),
        };
        if planted::is(Bug::SharedWrites)
            && let Some(source) = source
        {
            creation.oid = source;
            return Ok(write(&self.data, creation.over()).await?);
        }
        if volumes::put_under(&self.data, &creation, owner == Some(id), lease, tries).await? {
            inode::map_own(&self.data, oid, lease.generation, &self.client).await?;
        }
        lease.note_mapped(piece.index, true);
        if let Some(source) = source {
            self.data.note_released(source);
        }
        Ok(())
    }

    /// Makes a range read as zeros, giving back the space of whole objects and, within objects, that of large runs.
    pub async fn zero(&self, offset: u64, length: u64, durable: bool) -> Result<(), DiskError> {
        if self.is_snapshot {
            return Err(DiskError::ReadOnly);
        }
        for piece in self.pieces(offset, length)? {
            self.zero_piece(piece, durable).await?;
        }
        Ok(())
    }

    /// How many objects a range of so many bytes touches, at most.
    pub fn object_count(&self, length: u64) -> u64 {
        length.min(self.size_bytes) / self.object_bytes + 2
    }

    /// Whether a range consists of whole objects.
    pub fn is_whole_objects(&self, offset: u64, length: u64) -> bool {
        let end = offset + length;
        offset.is_multiple_of(self.object_bytes) && (end.is_multiple_of(self.object_bytes) || end == self.size_bytes)
    }

    async fn zero_piece(&self, piece: Piece, durable: bool) -> Result<(), DiskError> {
        for _ in 0..LOOKS_MAX {
            let id = self.id()?;
            let is_own = self.is_own(id, piece.index);
            if !is_own {
                let entry = inode::map_entry(&self.data, id, piece.index).await?;
                if self.id()? != id {
                    continue;
                }
                if entry.is_none() {
                    return Ok(());
                }
            }
            // The volume may have grown since it was opened: then its last object is another's too.
            let size_bytes = self.data.view().state.live_vdi(id).ok_or(DiskError::Gone)?.size_bytes;
            let left = size_bytes.saturating_sub(u64::from(piece.index) * self.object_bytes);
            if piece.offset > 0 || piece.length < self.object_bytes.min(left) {
                return self.write_zeros(piece, durable).await;
            }
            match inode::discard(&self.data, Oid::data(id, piece.index), InodeWriter::of(&self.client, durable)).await {
                Ok(()) => return Ok(()),
                Err(InodeError::Write(WriteError::ReadOnly) | InodeError::ReadOnly) => self.data.settle_in().await,
                Err(error) => return Err(error.into()),
            }
        }
        Err(DiskError::Failed)
    }

    async fn write_zeros(&self, piece: Piece, durable: bool) -> Result<(), DiskError> {
        let mut at = 0;
        while at < piece.length {
            let length = (piece.length - at).min(ZEROS.len() as u64);
            let part = Piece { offset: piece.offset + at, length, ..piece };
            let zeros = Bytes::from_static(&ZEROS[..length as usize]);
            self.write_piece(part, zeros, durable, Tries::default()).await?;
            at += length;
        }
        Ok(())
    }

    /// Every write that was answered before is durable on all its holders when this is done: see `flush.rs` for those that came
    /// through another node.
    pub async fn flush(&self) -> Result<(), DiskError> {
        Ok(super::flush::flush(&self.data, self.id().ok()).await?)
    }

    /// Which parts of a range are allocated; the others read as zeros. Looks into `LOOKED_INTO_MAX` objects and stops
    /// there, perhaps before the end of the range, but not before it got somewhere.
    pub async fn allocated(&self, offset: u64, length: u64) -> Result<Vec<Extent>, DiskError> {
        let pieces: Vec<Piece> = self.pieces(offset, length)?.collect();
        let Some(first) = pieces.first() else { return Ok(Vec::new()) };
        let map = self.map_of_now(first.index, pieces.len()).await?.1;
        let mut extents = Vec::new();
        let mut looked_into = 0;
        for (piece, owner) in pieces.iter().zip(map) {
            let Some(owner) = VdiId::new(owner).filter(|owner| owner.get() != 0) else {
                push(&mut extents, piece.length, false);
                continue;
            };
            looked_into += 1;
            if looked_into > LOOKED_INTO_MAX {
                break;
            }
            match read::extents(&self.data, Oid::data(owner, piece.index)).await {
                Ok(content) => piece.cut(&content, &mut extents),
                // Nobody can tell just now, or the map has changed meanwhile: it may hold anything.
                Err(_) => push(&mut extents, piece.length, true),
            }
        }
        self.id()?;
        Ok(extents)
    }

    /// Entries of the map, and of which VDI that is.
    async fn map_of_now(&self, first: u32, count: usize) -> Result<(VdiId, Vec<u32>), DiskError> {
        for _ in 0..LOOKS_MAX {
            let id = self.id()?;
            let map = inode::map_range(&self.data, id, first, count).await?;
            // As in `read_piece`.
            if self.id()? == id {
                return Ok((id, map));
            }
        }
        Err(DiskError::Failed)
    }

    /// Which parts of a range may differ from those of a snapshot, by object.
    pub async fn changed_since(&self, snapshot: VdiId, offset: u64, length: u64) -> Result<Vec<Extent>, DiskError> {
        let pieces: Vec<Piece> = self.pieces(offset, length)?.collect();
        let Some(first) = pieces.first() else { return Ok(Vec::new()) };
        let (id, now) = self.map_of_now(first.index, pieces.len()).await?;
        let then = inode::map_range(&self.data, snapshot, first.index, pieces.len()).await?;
        // Of a deleted VDI the map reads as empty.
        let view = self.data.view();
        if view.state.live_vdi(id).is_none() || view.state.live_vdi(snapshot).is_none() {
            return Err(DiskError::Gone);
        }
        let mut extents: Vec<Extent> = Vec::new();
        for (piece, (now, then)) in pieces.iter().zip(now.into_iter().zip(then)) {
            push(&mut extents, piece.length, now != then);
        }
        Ok(extents)
    }
}

/// Appends a stretch, to the last one if they are the same.
fn push(extents: &mut Vec<Extent>, length: u64, is_set: bool) {
    match extents.last_mut().filter(|last| last.is_set == is_set) {
        Some(last) => last.length += length,
        None if length > 0 => extents.push(Extent { length, is_set }),
        None => {}
    }
}

impl Piece {
    /// Appends what an object's content, given as ascending ranges, means for this piece of it.
    fn cut(&self, content: &[std::ops::Range<u64>], extents: &mut Vec<Extent>) {
        let end = self.offset + self.length;
        let mut at = self.offset;
        for range in content {
            let from = range.start.clamp(at, end);
            let to = range.end.clamp(from, end);
            push(extents, from - at, false);
            push(extents, to - from, true);
            at = to;
        }
        push(extents, end - at, false);
    }
}

/// The parts as one.
pub fn joined(parts: Vec<Part>) -> Bytes {
    if let [Part::Data(bytes)] = &parts[..] {
        return bytes.clone();
    }
    let length = parts.iter().map(|part| match part {
        Part::Hole(length) => *length as usize,
        Part::Data(bytes) => bytes.len(),
    });
    let mut whole = BytesMut::with_capacity(length.sum());
    for part in parts {
        match part {
            Part::Hole(length) => whole.resize(whole.len() + length as usize, 0),
            Part::Data(bytes) => whole.extend_from_slice(&bytes),
        }
    }
    whole.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(piece: Piece, content: &[(u64, u64)]) -> Vec<(u64, bool)> {
        let content: Vec<_> = content.iter().map(|(start, end)| *start..*end).collect();
        let mut extents = Vec::new();
        piece.cut(&content, &mut extents);
        extents.into_iter().map(|extent| (extent.length, extent.is_set)).collect()
    }

    #[test]
    fn a_piece_is_cut_at_the_content_of_its_object() {
        let piece = Piece { index: 0, offset: 100, length: 50 };
        assert_eq!(cut(piece, &[]), [(50, false)]);
        assert_eq!(cut(piece, &[(0, 400)]), [(50, true)]);
        let wanted = [(10, true), (10, false), (10, true), (19, false), (1, true)];
        assert_eq!(cut(piece, &[(0, 10), (90, 110), (120, 130), (149, 200), (300, 400)]), wanted);
        // What another node says need not make sense.
        let odd = cut(piece, &[(140, 120), (5, 3), (0, u64::MAX)]);
        assert_eq!(odd.iter().map(|(length, _)| length).sum::<u64>(), 50);
    }
}
