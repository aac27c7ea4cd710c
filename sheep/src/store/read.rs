//! Reads: newest submitted bytes, verified.
//!
//! Always holds:
//! 1. What an object's file holds and what is not applied yet are looked at under one hold of the lock; every byte of
//!    the answer is as new as that moment or newer.
//! 2. No byte leaves whose block did not match its checksum.
//! 3. An answer that is in memory (overlay, page cache) is given without leaving the caller's thread.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::peer_message::Salvaged;

use super::cache::{Cache, Lookup};
use super::checksum::BLOCK_BYTES;
use super::object_file::{ObjectFile, ReadOutcome, Unreadable};
use super::record::Kind;
use super::state::{Inner, Shared};
use super::{ReadError, Store, hint};
use crate::world::disk::{self, Files};

/// Content hashed per disk job: long enough to be worth the hop, short enough to let others in.
const HASH_BYTES: usize = 1 << 20;

/// How often a block that the device does not give is tried before what it held is given up.
const UNREADABLE_TRIES: u32 = 10;
const UNREADABLE_INTERVAL: Duration = Duration::from_millis(100);

#[derive(Clone, Copy)]
struct Range {
    oid: u64,
    offset: u64,
    length: usize,
}

impl Range {
    fn end(self) -> u64 {
        self.offset + self.length as u64
    }

    fn first_block(self) -> u64 {
        self.offset / BLOCK_BYTES as u64
    }

    /// Whole blocks around the range.
    fn aligned_bytes(self) -> usize {
        self.block_count() as usize * BLOCK_BYTES
    }

    fn block_count(self) -> u64 {
        self.end().div_ceil(BLOCK_BYTES as u64) - self.first_block()
    }
}

/// What lies under the unapplied changes.
enum Under {
    /// A created object that has no file yet.
    Zeros,
    /// Its open file.
    Open(Arc<ObjectFile>),
    /// Its file, which has to be opened: disk, size.
    Closed(u8, u64),
    /// A content that the applier has yet to make, with this record.
    Unapplied(u64),
}

struct View {
    under: Under,
    /// Unapplied payloads that touch the range, oldest first.
    patches: Vec<(u64, Bytes)>,
}

enum Attempt {
    Done(Result<Bytes, ReadError>),
    Wait(u64),
    NotCached,
}

impl Inner {
    fn view(&mut self, range: Range) -> Result<View, ReadError> {
        let entry = self.entries.get(range.oid).ok_or(ReadError::Missing)?;
        let inside = range.offset.checked_add(range.length as u64).is_some_and(|end| end <= entry.size_bytes());
        if !inside {
            return Err(ReadError::OutOfRange);
        }
        let mut patches = Vec::new();
        let mut made = None;
        for pending in self.overlay.get(&range.oid).into_iter().flatten() {
            if pending.kind.replaces() || pending.kind == Kind::Remove {
                made = Some((pending.kind, pending.number));
                patches.clear();
            }
            let end = pending.offset + pending.data.len() as u64;
            if !pending.data.is_empty() && pending.offset < range.end() && range.offset < end {
                patches.push((pending.offset, pending.data.clone()));
            }
        }
        let under = match made {
            Some((Kind::Create, _)) => Under::Zeros,
            Some((_, number)) => Under::Unapplied(number),
            None => match self.handles.get(range.oid) {
                Some(object) if object.geometry().size_bytes == entry.size_bytes() => Under::Open(object),
                Some(_) => return Err(ReadError::Corrupt { block: None }),
                None => Under::Closed(entry.disk(), entry.size_bytes()),
            },
        };
        Ok(View { under, patches })
    }
}

impl View {
    /// The answer, if one unapplied payload is all of it.
    fn answer_of_last_patch(&self, range: Range) -> Option<Bytes> {
        let (offset, data) = self.patches.last()?;
        let covers = *offset <= range.offset && offset + data.len() as u64 >= range.end();
        covers.then(|| data.slice((range.offset - offset) as usize..(range.end() - offset) as usize))
    }

    /// Lays the unapplied payloads over whole blocks and cuts the range out.
    fn finish(&self, range: Range, mut blocks: Vec<u8>) -> Bytes {
        let start = range.first_block() * BLOCK_BYTES as u64;
        for (offset, data) in &self.patches {
            let from = (*offset).max(range.offset);
            let to = (offset + data.len() as u64).min(range.end());
            blocks[(from - start) as usize..(to - start) as usize]
                .copy_from_slice(&data[(from - offset) as usize..(to - offset) as usize]);
        }
        let skip = (range.offset - start) as usize;
        Bytes::from(blocks).slice(skip..skip + range.length)
    }
}

fn io_error(oid: u64, error: &io::Error) -> ReadError {
    ReadError::Io { what: format!("object {oid:016x}: read: {error}{}", hint(error)).into() }
}

/// What does not agree with the object's table leaves the cache: its device has damaged it.
fn read_from(cache: &Cache, range: Range, object: &ObjectFile, blocks: &mut [u8]) -> bool {
    let first_block = range.first_block();
    if !cache.read(range.oid, first_block, blocks) {
        return false;
    }
    let is_sound = object.load_tags(first_block, range.block_count()).is_ok() && object.is_sound(first_block, blocks);
    if !is_sound {
        let start = first_block * BLOCK_BYTES as u64;
        cache.forget(range.oid, Some(start..start + blocks.len() as u64));
    }
    is_sound
}

impl Shared {
    fn read_inline(&self, range: Range) -> Attempt {
        let view = match self.lock().view(range) {
            Ok(view) => view,
            Err(error) => return Attempt::Done(Err(error)),
        };
        if range.length == 0 {
            return Attempt::Done(Ok(Bytes::new()));
        }
        if let Some(bytes) = view.answer_of_last_patch(range) {
            return Attempt::Done(Ok(bytes));
        }
        match &view.under {
            Under::Zeros => Attempt::Done(Ok(view.finish(range, vec![0; range.aligned_bytes()]))),
            Under::Unapplied(number) => Attempt::Wait(*number),
            Under::Closed(..) => Attempt::NotCached,
            Under::Open(object) => {
                let mut blocks = vec![0; range.aligned_bytes()];
                match object.read_cached(range.first_block(), &mut blocks) {
                    Ok(ReadOutcome::Verified) => Attempt::Done(Ok(view.finish(range, blocks))),
                    // A mismatch may be a write that is being applied just now; a disk thread can find out.
                    _ => match self.cache() {
                        Some(cache) if cache.read_now(range.oid, range.first_block(), &mut blocks) => {
                            let is_sound = object.is_sound(range.first_block(), &blocks);
                            if is_sound { Attempt::Done(Ok(view.finish(range, blocks))) } else { Attempt::NotCached }
                        }
                        _ => Attempt::NotCached,
                    },
                }
            }
        }
    }

    /// With a cache, what is there is taken from there, and what is not is kept there.
    fn read_blocking(&self, files: &dyn Files, range: Range, cache: Option<&Cache>) -> Attempt {
        let looked = cache.filter(|_| range.length > 0);
        let looked = looked.map(|cache| (cache, cache.look(range.oid, range.first_block(), range.block_count())));
        let (source, mut keeper) = match looked {
            Some((cache, Lookup::Here)) => (Some(cache), None),
            Some((_, Lookup::Missing(fill))) => (None, Some(fill)),
            Some((_, Lookup::Passed)) | None => (None, None),
        };
        loop {
            let view = match self.lock().view(range) {
                Ok(view) => view,
                Err(error) => return Attempt::Done(Err(error)),
            };
            if let Some(bytes) = view.answer_of_last_patch(range) {
                return Attempt::Done(Ok(bytes));
            }
            match &view.under {
                Under::Zeros => return Attempt::Done(Ok(view.finish(range, vec![0; range.aligned_bytes()]))),
                Under::Unapplied(number) => return Attempt::Wait(*number),
                Under::Closed(disk, size_bytes) => match self.handle(files, range.oid, *disk, *size_bytes) {
                    Ok(None) if self.is_unchanged(range, &view) => {
                        return Attempt::Done(Err(ReadError::Corrupt { block: None }));
                    }
                    // Look again: only a file that was open at the moment of the view belongs to it.
                    Ok(_) => {}
                    Err(error) => return Attempt::Done(Err(io_error(range.oid, &error))),
                },
                Under::Open(object) => {
                    let mut blocks = vec![0; range.aligned_bytes()];
                    if source.is_some_and(|cache| read_from(cache, range, object, &mut blocks)) {
                        return Attempt::Done(Ok(view.finish(range, blocks)));
                    }
                    match object.read(range.first_block(), &mut blocks) {
                        Ok(ReadOutcome::Verified) => {
                            if let Some(keeper) = keeper.take() {
                                keeper.keep(range.first_block(), &blocks);
                            }
                            return Attempt::Done(Ok(view.finish(range, blocks)));
                        }
                        Ok(ReadOutcome::Mismatch(_) | ReadOutcome::NotCached) if !self.is_unchanged(range, &view) => {}
                        Ok(ReadOutcome::Mismatch(block)) => {
                            return Attempt::Done(Err(ReadError::Corrupt { block: Some(block) }));
                        }
                        Ok(ReadOutcome::NotCached) => {}
                        Err(error) => return Attempt::Done(Err(io_error(range.oid, &error))),
                    }
                }
            }
        }
    }

    /// Whether an object is still in the file that a view saw; if not, what was found wrong with it means nothing.
    fn is_unchanged(&self, range: Range, view: &View) -> bool {
        let Ok(now) = self.lock().view(range) else {
            return false;
        };
        match (&view.under, &now.under) {
            (Under::Open(before), Under::Open(now)) => Arc::ptr_eq(before, now),
            (Under::Closed(..), Under::Closed(..)) => true,
            _ => false,
        }
    }

    async fn wait_applied(self: &Arc<Self>, number: u64) -> Result<(), ReadError> {
        self.with(Inner::want_durable);
        self.wait_until(|inner| inner.applied >= number || inner.failed.is_some()).await;
        let inner = self.lock();
        match &inner.failed {
            Some(what) if inner.applied < number => Err(ReadError::Io { what: what.clone() }),
            _ => Ok(()),
        }
    }
}

impl Store {
    /// Bytes of an object as of the last submitted write.
    pub async fn read(&self, oid: Oid, offset: u64, length: usize) -> Result<Bytes, ReadError> {
        self.read_through(Range { oid: oid.raw(), offset, length }, true).await
    }

    async fn read_through(&self, range: Range, is_cache_used: bool) -> Result<Bytes, ReadError> {
        let mut attempt = self.shared.read_inline(range);
        loop {
            match attempt {
                Attempt::Done(result) => return result,
                Attempt::Wait(number) => self.shared.wait_applied(number).await?,
                Attempt::NotCached => {}
            }
            let shared = self.shared.clone();
            attempt = disk::run(&self.shared.world.disk, move |files| {
                let cache = shared.cache().filter(|_| is_cache_used);
                shared.read_blocking(files, range, cache)
            })
            .await;
        }
    }

    /// As [`Store::read`], but only if the answer is in memory; `None` if a disk has to be asked or waited for.
    pub fn read_now(&self, oid: Oid, offset: u64, length: usize) -> Option<Result<Bytes, ReadError>> {
        match self.shared.read_inline(Range { oid: oid.raw(), offset, length }) {
            Attempt::Done(result) => Some(result),
            Attempt::Wait(_) | Attempt::NotCached => None,
        }
    }

    /// Brings parts of objects (id, offset, length) into memory, as far as that can be, so that [`Store::read_now`] finds them:
    /// cheaper than to ask a disk thread for each.
    pub async fn warm(&self, parts: Vec<(Oid, u64, usize)>) {
        let shared = self.shared.clone();
        disk::run(&self.shared.world.disk, move |files| {
            for (oid, offset, length) in parts {
                // Whatever is wrong is told to whoever reads.
                drop(shared.read_blocking(files, Range { oid: oid.raw(), offset, length }, None));
            }
        })
        .await;
    }

    /// As [`Store::read`] of whole blocks, leaving out what is damaged: the bytes as of some moment since the call (zeros where
    /// they cannot be had), and the damaged blocks with the checksums that their contents should have.
    pub async fn salvage(&self, oid: Oid, offset: u64, length: usize) -> Result<Salvaged, ReadError> {
        let range = Range { oid: oid.raw(), offset, length };
        let (entry, pending) = {
            let mut inner = self.shared.lock();
            inner.view(range)?;
            let pending = inner.overlay.get(&range.oid).and_then(|pending| pending.back()).map(|last| last.number);
            (inner.entries.get(range.oid).ok_or(ReadError::Missing)?, pending)
        };
        if !offset.is_multiple_of(BLOCK_BYTES as u64) {
            return Err(ReadError::OutOfRange);
        }
        if let Some(number) = pending {
            self.shared.wait_applied(number).await?;
        }
        let attempt = |unreadable| {
            let shared = self.shared.clone();
            disk::run(&self.shared.world.disk, move |files| {
                let object = shared.handle(files, range.oid, entry.disk(), entry.size_bytes());
                let object = object.map_err(|error| io_error(range.oid, &error))?;
                let object = object.ok_or(ReadError::Corrupt { block: None })?;
                let mut bytes = vec![0; range.aligned_bytes()];
                let damaged = object.salvage(range.first_block(), &mut bytes, unreadable);
                let damaged = damaged.map_err(|error| io_error(range.oid, &error))?;
                bytes.truncate(range.length);
                let damaged = damaged.into_iter().map(|(block, tag)| (block as u32, tag)).collect();
                Ok(Salvaged { damaged, bytes })
            })
        };
        for _ in 0..UNREADABLE_TRIES {
            match attempt(Unreadable::IsAnError).await {
                Err(ReadError::Io { .. }) => self.shared.world.clock.sleep(UNREADABLE_INTERVAL).await,
                read => return read,
            }
        }
        attempt(Unreadable::IsDamaged).await
    }

    /// BLAKE3 over a whole object. Meaningful only if nobody writes to it meanwhile: compare its version before and
    /// after.
    pub async fn hash(&self, oid: Oid) -> Result<blake3::Hash, ReadError> {
        let size_bytes = self.entry(oid).ok_or(ReadError::Missing)?.size_bytes;
        let mut hasher = blake3::Hasher::new();
        let mut offset = 0;
        while offset < size_bytes {
            let length = (size_bytes - offset).min(HASH_BYTES as u64) as usize;
            // From the disk: a copy is not good because the cache has it.
            let bytes = self.read_through(Range { oid: oid.raw(), offset, length }, false).await?;
            hasher = disk::run(&self.shared.world.disk, move |_| {
                hasher.update(&bytes);
                hasher
            })
            .await;
            offset += length as u64;
        }
        Ok(hasher.finalize())
    }

    /// The parts of an object that are not known to be zeros, as ascending byte ranges.
    pub async fn content_extents(&self, oid: Oid) -> Result<Vec<std::ops::Range<u64>>, ReadError> {
        let last =
            |inner: &Inner| inner.overlay.get(&oid.raw()).and_then(|pending| pending.back()).map(|last| last.number);
        // Once: what is written after that counts as content, so that a busy object does not keep anybody waiting.
        let pending = last(&self.shared.lock());
        if let Some(number) = pending {
            self.shared.wait_applied(number).await?;
        }
        let (entry, ranges) = {
            let inner = self.shared.lock();
            let entry = inner.entries.get(oid.raw()).ok_or(ReadError::Missing)?;
            let pending = inner.overlay.get(&oid.raw()).into_iter().flatten();
            let is_whole = |kind: Kind| kind.replaces() || kind == Kind::Remove;
            let ranges: Vec<_> = pending
                .map(|pending| {
                    let end = pending.offset + pending.data.len() as u64;
                    if is_whole(pending.kind) { 0..entry.size_bytes() } else { pending.offset..end }
                })
                .collect();
            (entry, ranges)
        };
        let shared = self.shared.clone();
        let (raw, disk, size) = (oid.raw(), entry.disk(), entry.size_bytes());
        let found = disk::run(&self.shared.world.disk, move |files| {
            let object = shared.handle(files, raw, disk, size).map_err(|error| io_error(raw, &error))?;
            let object = object.ok_or(ReadError::Corrupt { block: None })?;
            object.extents().map_err(|error| io_error(raw, &error))
        });
        let mut extents: Vec<std::ops::Range<u64>> = Vec::new();
        // What is pending as a whole may have no file yet.
        let mut found = if ranges.contains(&(0..size)) { Vec::new() } else { found.await? };
        found.extend(ranges);
        found.sort_by_key(|range| range.start);
        for range in found {
            match extents.last_mut().filter(|last| range.start <= last.end) {
                Some(last) => last.end = last.end.max(range.end),
                None => extents.push(range),
            }
        }
        Ok(extents)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::{Durability, StoreConfig, Write, WriteKind};
    use crate::world::World;
    use sheep_core::stamp::{Epoch, Stamp, Version};

    const SIZE: u64 = 300_000;
    const OBJECTS: u64 = 3;

    async fn write_many(store: Store, object: u64, writes: u64) {
        for sequence in 1..writes {
            let length = 1 + sequence * 7919 % 20_000;
            let write = Write {
                oid: Oid::from_raw(object),
                version: Version { epoch: Epoch(1), stamp: Stamp { generation: 1, sequence } },
                offset: sequence * 104_729 % (SIZE - length),
                data: Bytes::from(vec![object as u8 + 1; length as usize]),
                kind: if sequence % 100 == 1 { WriteKind::Create { size_bytes: SIZE } } else { WriteKind::Overwrite },
                durability: if sequence % 3 == 0 { Durability::Durable } else { Durability::WriteBack },
            };
            let permit = store.admit(length).await;
            store.submit(permit, write).unwrap().await.unwrap();
        }
    }

    async fn read_many(store: Store, reads: u64) {
        for count in 0..reads {
            let object = count % OBJECTS;
            let offset = count * 15_485_863 % (SIZE - 50_000);
            match store.read(Oid::from_raw(object), offset, (count * 31 % 50_000) as usize).await {
                Ok(bytes) => assert!(bytes.iter().all(|byte| *byte == 0 || *byte == object as u8 + 1)),
                Err(error) => assert_eq!(error, ReadError::Missing),
            }
            tokio::task::yield_now().await;
        }
    }

    #[test]
    fn reads_beside_the_applier_never_take_a_write_for_damage() {
        let dir = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(3).enable_all().build().unwrap();
        runtime.block_on(async {
            let config = StoreConfig { journal_bytes: 8 << 20, ..StoreConfig::new(dir.path().join("store")) };
            let store = Store::open(World::real(4).unwrap(), config).await.unwrap();
            let mut tasks: Vec<_> =
                (0..OBJECTS).map(|object| tokio::spawn(write_many(store.clone(), object, 1000))).collect();
            tasks.extend((0..4).map(|_| tokio::spawn(read_many(store.clone(), 3000))));
            for task in tasks {
                task.await.unwrap();
            }
            store.close().await.unwrap();
        });
    }
}
