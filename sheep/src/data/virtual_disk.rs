//! One VDI as one disk: byte ranges to objects, with creation, copy-on-write, discard and flush. What front ends whose
//! clients know nothing of objects (NBD) stand on; QEMU's native driver does the same on its own side.
//!
//! Always holds:
//! 1. An object is durable on all holders before the map names it, so that no power loss leaves a map that names nothing.
//! 2. A snapshot taken meanwhile, by whomever, is followed: the name's next working VDI takes the writes.
//! 3. What the disk remembers of the map is only that an object is the working VDI's own. If somebody discards it, the
//!    object is gone as well, its holders say so, and the map is looked at again.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Bytes, BytesMut};
use qemu_proto::inode::{MAP_ENTRY_BYTES, map_offset};
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::vdi::Vdi;
use sheep_core::vdi_name::Target;

use super::Data;
use super::gateway::write::{Base, ObjectWrite, write};
use super::gateway::{ReadFailure, WriteError, read};
use super::inode::{self, InodeError, InodeWriter};
use super::volumes::{self, Creation, VolumeError};

/// Zeros are written in pieces of this size where they cannot be a hole.
const ZEROS: &[u8] = &[0; 1 << 20];
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
            _ => DiskError::Failed,
        }
    }
}

impl From<ReadFailure> for DiskError {
    fn from(_: ReadFailure) -> DiskError {
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

/// A part of a read.
#[derive(Clone, Debug)]
pub enum Part {
    /// As many zeros, because nothing is allocated there.
    Hole(u64),
    /// What is there.
    Data(Bytes),
}

/// Which VDI the disk is now, and which objects are known to be its own.
struct Head {
    id: VdiId,
    own: Box<[AtomicU64]>,
}

impl Head {
    fn new(vdi: &Vdi) -> Arc<Head> {
        let words = vdi.object_count().div_ceil(64) as usize;
        Arc::new(Head { id: vdi.id, own: (0..words).map(|_| AtomicU64::new(0)).collect() })
    }

    fn word(&self, index: u32) -> Option<(&AtomicU64, u64)> {
        self.own.get(index as usize / 64).map(|word| (word, 1 << (index % 64)))
    }

    fn is_own(&self, index: u32) -> bool {
        self.word(index).is_some_and(|(word, bit)| word.load(Ordering::Relaxed) & bit != 0)
    }

    fn note_own(&self, index: u32, is_own: bool) {
        match self.word(index) {
            Some((word, bit)) if is_own => word.fetch_or(bit, Ordering::Relaxed),
            Some((word, bit)) => word.fetch_and(!bit, Ordering::Relaxed),
            None => 0,
        };
    }

    fn oid(&self, index: u32) -> Oid {
        Oid::data(self.id, index)
    }
}

/// An open volume or snapshot.
pub struct VirtualDisk {
    data: Data,
    name: Vec<u8>,
    is_snapshot: bool,
    size_bytes: u64,
    object_bytes: u64,
    head: Mutex<Arc<Head>>,
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
            head: Mutex::new(Head::new(&vdi)),
        })
    }

    /// Bytes, as of the opening.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes
    }

    /// Whether it is a snapshot.
    pub fn is_snapshot(&self) -> bool {
        self.is_snapshot
    }

    /// The VDI that it is now.
    pub fn id(&self) -> Result<VdiId, DiskError> {
        Ok(self.head()?.id)
    }

    /// Invariant 2.
    fn head(&self) -> Result<Arc<Head>, DiskError> {
        let view = self.data.view();
        let mut head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        let vdi = view.state.vdis.get(&head.id.get());
        if vdi.is_some_and(|vdi| !vdi.deleted && vdi.is_snapshot() == self.is_snapshot) {
            return Ok(head.clone());
        }
        if self.is_snapshot {
            return Err(DiskError::Gone);
        }
        let next = view.state.lookup(&self.name, Target::Current).ok().and_then(|id| view.state.vdis.get(&id.get()));
        *head = Head::new(next.filter(|vdi| !vdi.is_snapshot()).ok_or(DiskError::Gone)?);
        Ok(head.clone())
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
        let head = self.head().ok()?;
        let oid = if head.is_own(piece.index) {
            head.oid(piece.index)
        } else {
            let entry = read::read_now(&self.data, Oid::inode(head.id), map_offset(piece.index), MAP_ENTRY_BYTES)?;
            let owner = inode::owner_of(&entry)?;
            if owner == head.id {
                head.note_own(piece.index, true);
            }
            Oid::data(owner, piece.index)
        };
        read::read_now(&self.data, oid, piece.offset, length)
    }

    /// Reads a range in parts, in order.
    pub async fn read(&self, offset: u64, length: u64) -> Result<Vec<Part>, DiskError> {
        let mut pieces = self.pieces(offset, length)?;
        let (Some(first), second) = (pieces.next(), pieces.next()) else { return Ok(Vec::new()) };
        let Some(second) = second else { return Ok(vec![self.read_piece(first).await?]) };
        // Two at a time: while one is sent to the client the next one is read.
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
            let head = self.head()?;
            let owner = if head.is_own(piece.index) {
                head.id
            } else {
                match inode::map_entry(&self.data, head.id, piece.index).await? {
                    None => return Ok(Part::Hole(piece.length)),
                    Some(owner) => owner,
                }
            };
            match read::read(&self.data, Oid::data(owner, piece.index), piece.offset, piece.length as usize).await {
                Ok(bytes) => {
                    if owner == head.id {
                        head.note_own(piece.index, true);
                    }
                    return Ok(Part::Data(bytes));
                }
                Err(ReadFailure::Missing) => head.note_own(piece.index, false),
                Err(error) => return Err(error.into()),
            }
        }
        tracing::error!("object {} of volume {} is in the map and nowhere else", piece.index, self.shown_name());
        Err(DiskError::Failed)
    }

    fn shown_name(&self) -> String {
        String::from_utf8_lossy(&self.name).into_owned()
    }

    /// Writes. Done, it is on all holders; durable there only if asked.
    pub async fn write(&self, offset: u64, bytes: Bytes, durable: bool) -> Result<(), DiskError> {
        if self.is_snapshot {
            return Err(DiskError::ReadOnly);
        }
        let mut at = 0;
        for piece in self.pieces(offset, bytes.len() as u64)? {
            let part = bytes.slice(at..at + piece.length as usize);
            at += piece.length as usize;
            self.write_piece(piece, part, durable).await?;
        }
        Ok(())
    }

    async fn write_piece(&self, piece: Piece, bytes: Bytes, durable: bool) -> Result<(), DiskError> {
        for _ in 0..LOOKS_MAX {
            let head = self.head()?;
            let oid = head.oid(piece.index);
            if head.is_own(piece.index) {
                let object =
                    ObjectWrite { oid, offset: piece.offset, data: bytes.clone(), base: Base::Existing, durable };
                match write(&self.data, object).await {
                    Ok(()) => return Ok(()),
                    // Discarded, or frozen by a snapshot: look again.
                    Err(WriteError::Missing) => head.note_own(piece.index, false),
                    Err(WriteError::ReadOnly) => self.data.settle_in().await,
                    Err(error) => return Err(error.into()),
                }
                continue;
            }
            let turn = self.data.inode_turns().turn(oid);
            let _one_creator = turn.lock().await;
            let owner = inode::map_entry(&self.data, head.id, piece.index).await?;
            if owner == Some(head.id) {
                head.note_own(piece.index, true);
                continue;
            }
            let source = owner.map(|owner| Oid::data(owner, piece.index));
            // Durable whatever the client asked: invariant 1.
            let creation = Creation { oid, offset: piece.offset, payload: bytes.clone(), source, durable: true };
            match volumes::create_object(&self.data, creation).await {
                Ok(()) => {}
                Err(VolumeError::Write(WriteError::ReadOnly)) => {
                    self.data.settle_in().await;
                    continue;
                }
                Err(error) => return Err(error.into()),
            }
            match self.map_to(head.id, piece.index, head.id.get(), durable).await {
                Ok(()) => {
                    head.note_own(piece.index, true);
                    return Ok(());
                }
                Err(InodeError::ReadOnly) => self.data.settle_in().await,
                Err(error) => return Err(error.into()),
            }
        }
        Err(DiskError::Failed)
    }

    async fn map_to(&self, id: VdiId, index: u32, owner: u32, durable: bool) -> Result<(), InodeError> {
        let entry = Bytes::copy_from_slice(&owner.to_le_bytes());
        let writer = InodeWriter { qemu_synchronous: false, durable };
        inode::write_inode(&self.data, id, map_offset(index), &entry, writer).await
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
        let last_bytes = self.size_bytes - u64::from(piece.index) * self.object_bytes;
        let is_whole = piece.offset == 0 && piece.length == self.object_bytes.min(last_bytes);
        for _ in 0..LOOKS_MAX {
            let head = self.head()?;
            if !head.is_own(piece.index) && inode::map_entry(&self.data, head.id, piece.index).await?.is_none() {
                return Ok(());
            }
            if !is_whole {
                break;
            }
            head.note_own(piece.index, false);
            match inode::discard(&self.data, head.oid(piece.index), durable).await {
                Ok(()) => return Ok(()),
                Err(InodeError::Write(WriteError::ReadOnly) | InodeError::ReadOnly) => self.data.settle_in().await,
                Err(error) => return Err(error.into()),
            }
        }
        let mut at = 0;
        while at < piece.length {
            let part =
                Piece { offset: piece.offset + at, length: (piece.length - at).min(ZEROS.len() as u64), ..piece };
            self.write_piece(part, Bytes::from_static(&ZEROS[..part.length as usize]), durable).await?;
            at += part.length;
        }
        Ok(())
    }

    /// Every write that was answered before is durable when this is done, whichever connection or node it came through.
    pub async fn flush(&self) -> Result<(), DiskError> {
        Ok(super::flush::flush(&self.data).await?)
    }

    /// Which parts of a range are allocated; the others read as zeros. Looks into `LOOKED_INTO_MAX` objects and stops
    /// there, perhaps before the end of the range, but not before it got somewhere.
    pub async fn allocated(&self, offset: u64, length: u64) -> Result<Vec<Extent>, DiskError> {
        let id = self.head()?.id;
        let pieces: Vec<Piece> = self.pieces(offset, length)?.collect();
        let Some(first) = pieces.first() else { return Ok(Vec::new()) };
        let map = inode::map_range(&self.data, id, first.index, pieces.len()).await?;
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
                // Discarded meanwhile; a map that is ahead of its object does not exist (invariant 1).
                Err(ReadFailure::Missing) => push(&mut extents, piece.length, false),
                // Nobody can tell just now: it may hold anything.
                Err(_) => push(&mut extents, piece.length, true),
            }
        }
        Ok(extents)
    }

    /// Which parts of a range may differ from those of a snapshot, by object.
    pub async fn changed_since(&self, snapshot: VdiId, offset: u64, length: u64) -> Result<Vec<Extent>, DiskError> {
        let id = self.head()?.id;
        self.extents(offset, length, async |first, count| {
            let now = inode::map_range(&self.data, id, first, count).await?;
            let then = inode::map_range(&self.data, snapshot, first, count).await?;
            Ok(now.into_iter().zip(then).map(|(now, then)| now != then).collect())
        })
        .await
    }

    async fn extents(
        &self,
        offset: u64,
        length: u64,
        of_objects: impl AsyncFnOnce(u32, usize) -> Result<Vec<bool>, InodeError>,
    ) -> Result<Vec<Extent>, DiskError> {
        let pieces: Vec<Piece> = self.pieces(offset, length)?.collect();
        let Some(first) = pieces.first() else { return Ok(Vec::new()) };
        let set = of_objects(first.index, pieces.len()).await?;
        let mut extents: Vec<Extent> = Vec::new();
        for (piece, is_set) in pieces.iter().zip(set) {
            push(&mut extents, piece.length, is_set);
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
