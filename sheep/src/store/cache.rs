//! A cache of content on a faster device in front of the disks: what memory has dropped and a slow disk would be asked for again.
//!
//! One file in slots of 64 KiB; each holds one aligned part of an object, filled block by block with what reads brought from the
//! disks. It goes through the page cache, so that what is hot comes back into memory. Long reads pass it by: a backup of a volume
//! does not empty it, and disks are good at them. Which slot goes next is decided by the clock algorithm: used ones get a second
//! chance. Memory: about 60 bytes for each slot in use, a thousandth of the cache.
//!
//! Always holds:
//! 1. A block it has is what the object's file has. What a record changes leaves the cache after the file was changed and before
//!    the record leaves the overlay ([`Cache::forget`]); what was read before that is not kept after it, because a [`Fill`] begins
//!    before its reader looks at the object, and is spoiled by what is forgotten meanwhile.
//! 2. What comes from its device is checked against the object's table like what comes from a disk: damage is a miss.
//! 3. Nothing of it outlives the process: its file has no name. An error of its device ends the cache, and nothing else.
//! 4. A slot is filled by one reader at a time, and given to another part only when nobody fills it.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::checksum::BLOCK_BYTES;
use super::hint;
use crate::world::disk::{File, Files, OpenMode};
use crate::world::marks::{self, Mark};

/// Blocks of a slot: one bit each.
const SLOT_BLOCKS: u64 = u16::BITS as u64;
/// Bytes of a slot: a random read of a slow disk costs as much as one of these.
const SLOT_BYTES: u64 = SLOT_BLOCKS * BLOCK_BYTES as u64;
/// Reads of as many bytes or more are left to the disks.
const SEQUENTIAL_BYTES: usize = 256 << 10;
/// The file's name begins with this, while it has one.
const NAME: &str = "sheep-cache.";

/// Where a cache is, and how large.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CacheConfig {
    /// Directory on the faster device.
    pub dir: PathBuf,
    /// The most that it takes there.
    pub size_bytes: u64,
}

/// What a cache did since the store was opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct CacheFigures {
    /// The most it may hold, in bytes.
    pub size_bytes: u64,
    /// What it holds, in bytes.
    pub used_bytes: u64,
    /// Reads that what memory has of the objects could not answer, and the cache could.
    pub hits: u64,
    /// Reads that had to go to a disk, and were short enough to be kept.
    pub misses: u64,
    /// Its device failed: it is not used any more.
    pub failed: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Filling {
    Nobody,
    Somebody,
    /// Somebody, with what has changed since.
    Spoiled,
}

struct Slot {
    oid: u64,
    part: u32,
    /// Of the part's blocks, those that are here.
    blocks: u16,
    filling: Filling,
    is_used: bool,
    /// Grows whenever a block leaves: who read meanwhile has read nothing.
    departures: u32,
}

#[derive(Default)]
struct Inner {
    slots: Vec<Slot>,
    /// By object and part.
    places: BTreeMap<(u64, u32), u32>,
    /// Slots of no part.
    free: Vec<u32>,
    /// Where the clock stands.
    hand: usize,
    used_blocks: u64,
}

/// A cache. See the module.
pub struct Cache {
    file: Arc<dyn File>,
    path: PathBuf,
    slots_max: usize,
    inner: Mutex<Inner>,
    hits: AtomicU64,
    misses: AtomicU64,
    failed: AtomicBool,
}

/// What [`Cache::look`] found of some blocks.
pub enum Lookup<'a> {
    /// All are here, as of now.
    Here,
    /// They have to be read, and can be kept.
    Missing(Fill<'a>),
    /// They have to be read.
    Passed,
}

/// Slots that wait for what their reader brings. Dropped, they get nothing.
pub struct Fill<'a> {
    cache: &'a Cache,
    oid: u64,
    /// Parts, with the slot of each.
    slots: Vec<(u32, u32)>,
}

/// The blocks of a range that lie in one part of an object.
struct Piece {
    part: u32,
    /// First block within the part.
    first: u64,
    /// Blocks of the range before it.
    skip: u64,
    count: u64,
}

impl Piece {
    fn mask(&self) -> u16 {
        (((1_u32 << self.count) - 1) << self.first) as u16
    }

    fn bytes_of<'b>(&self, range: &'b [u8]) -> &'b [u8] {
        &range[self.bytes()]
    }

    fn bytes(&self) -> Range<usize> {
        let at = self.skip as usize * BLOCK_BYTES;
        at..at + self.count as usize * BLOCK_BYTES
    }

    fn offset_in(&self, slot: u32) -> u64 {
        u64::from(slot) * SLOT_BYTES + self.first * BLOCK_BYTES as u64
    }
}

/// Cuts blocks of an object at the borders of its parts.
fn pieces(first_block: u64, count: u64) -> impl Iterator<Item = Piece> {
    let end = first_block + count;
    (first_block / SLOT_BLOCKS..end.div_ceil(SLOT_BLOCKS)).map(move |part| {
        let from = first_block.max(part * SLOT_BLOCKS);
        let to = end.min((part + 1) * SLOT_BLOCKS);
        Piece { part: part as u32, first: from % SLOT_BLOCKS, skip: from - first_block, count: to - from }
    })
}

impl Inner {
    fn slot_of(&mut self, oid: u64, part: u32) -> Option<(u32, &mut Slot)> {
        let number = *self.places.get(&(oid, part))?;
        Some((number, &mut self.slots[number as usize]))
    }

    /// An empty slot for a part that has none; `None` while all are being filled.
    fn assign(&mut self, oid: u64, part: u32, slots_max: usize) -> Option<u32> {
        let slot = Slot { oid, part, blocks: 0, filling: Filling::Nobody, is_used: true, departures: 0 };
        let number = if let Some(number) = self.free.pop() {
            number
        } else if self.slots.len() < slots_max {
            self.slots.push(slot);
            let number = self.slots.len() as u32 - 1;
            self.places.insert((oid, part), number);
            return Some(number);
        } else {
            self.evict()?
        };
        let departures = self.slots[number as usize].departures;
        self.slots[number as usize] = Slot { departures, ..slot };
        self.places.insert((oid, part), number);
        Some(number)
    }

    /// Takes a slot from the part that was not used for the longest time, about.
    fn evict(&mut self) -> Option<u32> {
        // Twice round is enough to take every second chance away; what is left then is being filled.
        for _ in 0..2 * self.slots.len() {
            let number = self.hand;
            self.hand = (self.hand + 1) % self.slots.len();
            let slot = &mut self.slots[number];
            if slot.filling != Filling::Nobody || std::mem::take(&mut slot.is_used) {
                continue;
            }
            marks::hit(Mark::CacheEvicted);
            let part = (slot.oid, slot.part);
            self.drop_blocks(number as u32, u16::MAX);
            self.places.remove(&part);
            return Some(number as u32);
        }
        None
    }

    fn drop_blocks(&mut self, number: u32, mask: u16) {
        let slot = &mut self.slots[number as usize];
        self.used_blocks -= u64::from((slot.blocks & mask).count_ones());
        slot.blocks &= !mask;
        slot.departures = slot.departures.wrapping_add(1);
    }

    fn forget(&mut self, number: u32, mask: u16) {
        self.drop_blocks(number, mask);
        if self.slots[number as usize].filling != Filling::Nobody {
            self.slots[number as usize].filling = Filling::Spoiled;
        }
        self.free_if_empty(number);
    }

    fn free_if_empty(&mut self, number: u32) {
        let slot = &self.slots[number as usize];
        if slot.blocks == 0 && slot.filling == Filling::Nobody {
            self.places.remove(&(slot.oid, slot.part));
            self.free.push(number);
        }
    }
}

impl Cache {
    /// An empty cache. The directory is made if it is missing; its file system must have room for all of it.
    pub fn create(files: &dyn Files, config: &CacheConfig, unique: u64) -> io::Result<Cache> {
        files.create_dir(&config.dir)?;
        // What a process left that was killed before it took the name away.
        for left in files.read_dir(&config.dir)?.into_iter().filter(|entry| entry.name.starts_with(NAME)) {
            remove_if_there(files, &config.dir.join(left.name))?;
        }
        let free_bytes = files.space(&config.dir)?.free_bytes;
        if free_bytes < config.size_bytes {
            let what = format!("{free_bytes} bytes are free there, fewer than its size of {}", config.size_bytes);
            return Err(io::Error::new(io::ErrorKind::StorageFull, what));
        }
        let path = config.dir.join(format!("{NAME}{unique:016x}"));
        let file = files.open(&path, OpenMode::Truncate)?;
        remove_if_there(files, &path)?;
        Ok(Cache {
            file,
            path,
            slots_max: (config.size_bytes / SLOT_BYTES).clamp(1, u64::from(u32::MAX)) as usize,
            inner: Mutex::default(),
            hits: AtomicU64::new(0),
            misses: AtomicU64::new(0),
            failed: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What it did.
    pub fn figures(&self) -> CacheFigures {
        CacheFigures {
            size_bytes: self.slots_max as u64 * SLOT_BYTES,
            used_bytes: self.lock().used_blocks * BLOCK_BYTES as u64,
            hits: self.hits.load(Ordering::Relaxed),
            misses: self.misses.load(Ordering::Relaxed),
            failed: self.failed.load(Ordering::Relaxed),
        }
    }

    /// Looks whether whole blocks of an object are here; takes slots for them if they are not. Before the caller looks at the
    /// object (invariant 1).
    pub fn look(&self, oid: u64, first_block: u64, count: u64) -> Lookup<'_> {
        let is_short = count * (BLOCK_BYTES as u64) < SEQUENTIAL_BYTES as u64;
        if count == 0 || !is_short || self.failed.load(Ordering::Relaxed) {
            return Lookup::Passed;
        }
        let mut inner = self.lock();
        let has = |inner: &mut Inner, piece: &Piece| {
            let slot = inner.slot_of(oid, piece.part);
            slot.is_some_and(|(_, slot)| slot.blocks & piece.mask() == piece.mask())
        };
        if pieces(first_block, count).all(|piece| has(&mut inner, &piece)) {
            return Lookup::Here;
        }
        self.misses.fetch_add(1, Ordering::Relaxed);
        let mut slots = Vec::new();
        for piece in pieces(first_block, count) {
            let known = inner.slot_of(oid, piece.part).map(|(number, _)| number);
            let Some(number) = known.or_else(|| inner.assign(oid, piece.part, self.slots_max)) else { continue };
            let slot = &mut inner.slots[number as usize];
            if slot.filling == Filling::Nobody {
                slot.filling = Filling::Somebody;
                slot.is_used = true;
                slots.push((piece.part, number));
            }
        }
        Lookup::Missing(Fill { cache: self, oid, slots })
    }

    /// Fills `buffer` (whole blocks), if all of it is here. It still has to be checked.
    pub fn read(&self, oid: u64, first_block: u64, buffer: &mut [u8]) -> bool {
        self.read_by(oid, first_block, buffer, |part, offset| {
            self.file.read_at(part, offset).map(|count| count == part.len())
        })
    }

    /// The same without waiting for a device.
    pub fn read_now(&self, oid: u64, first_block: u64, buffer: &mut [u8]) -> bool {
        self.read_by(oid, first_block, buffer, |part, offset| {
            self.file.read_cached(part, offset).map(|count| count == Some(part.len()))
        })
    }

    fn read_by(
        &self,
        oid: u64,
        first_block: u64,
        buffer: &mut [u8],
        read: impl Fn(&mut [u8], u64) -> io::Result<bool>,
    ) -> bool {
        if self.failed.load(Ordering::Relaxed) {
            return false;
        }
        let count = (buffer.len() / BLOCK_BYTES) as u64;
        let is_read = pieces(first_block, count).all(|piece| {
            let state = |inner: &mut Inner| {
                let (number, slot) = inner.slot_of(oid, piece.part)?;
                slot.is_used = true;
                (slot.blocks & piece.mask() == piece.mask()).then_some((number, slot.departures))
            };
            let Some((number, departures)) = state(&mut self.lock()) else { return false };
            match read(&mut buffer[piece.bytes()], piece.offset_in(number)) {
                Ok(is_whole) => is_whole && state(&mut self.lock()) == Some((number, departures)),
                Err(error) => {
                    self.fail("read", &error);
                    false
                }
            }
        });
        self.hits.fetch_add(u64::from(is_read), Ordering::Relaxed);
        is_read
    }

    /// Drops what a record has changed of an object: some bytes, or all (`None`).
    pub fn forget(&self, oid: u64, bytes: Option<Range<u64>>) {
        let mut inner = self.lock();
        let Some(bytes) = bytes else {
            let all: Vec<u32> = inner.places.range((oid, 0)..=(oid, u32::MAX)).map(|(_, number)| *number).collect();
            for number in all {
                inner.forget(number, u16::MAX);
            }
            return;
        };
        let first_block = bytes.start / BLOCK_BYTES as u64;
        let count = bytes.end.div_ceil(BLOCK_BYTES as u64) - first_block;
        for piece in pieces(first_block, count) {
            if let Some((number, _)) = inner.slot_of(oid, piece.part) {
                inner.forget(number, piece.mask());
            }
        }
    }

    fn fail(&self, doing: &str, error: &io::Error) {
        if !self.failed.swap(true, Ordering::Relaxed) {
            marks::hit(Mark::CacheFailed);
            let path = self.path.display();
            tracing::error!("{path}: {doing}: {error}{}; reads go on without the cache until a restart", hint(error));
            let mut inner = self.lock();
            // Those who fill their slots still name them.
            for slot in &mut inner.slots {
                slot.blocks = 0;
                slot.departures = slot.departures.wrapping_add(1);
            }
            inner.used_blocks = 0;
        }
    }
}

impl Fill<'_> {
    /// Keeps what was read from a disk, and agreed with its checksums: the blocks that were looked for, from `first_block` on.
    pub fn keep(mut self, first_block: u64, blocks: &[u8]) {
        let slots = std::mem::take(&mut self.slots);
        for piece in pieces(first_block, (blocks.len() / BLOCK_BYTES) as u64) {
            let Some((_, number)) = slots.iter().find(|(part, _)| *part == piece.part) else { continue };
            let bytes = io::IoSlice::new(piece.bytes_of(blocks));
            let written = self.cache.file.write_at(&[bytes], piece.offset_in(*number));
            let mut inner = self.cache.lock();
            let slot = &mut inner.slots[*number as usize];
            if written.is_ok() && slot.filling == Filling::Somebody {
                let new = piece.mask() & !slot.blocks;
                slot.blocks |= new;
                inner.used_blocks += u64::from(new.count_ones());
            }
            inner.slots[*number as usize].filling = Filling::Nobody;
            inner.free_if_empty(*number);
            drop(inner);
            if let Err(error) = written {
                self.cache.fail("write", &error);
            }
        }
    }
}

impl Drop for Fill<'_> {
    fn drop(&mut self) {
        if self.slots.is_empty() {
            return;
        }
        let mut inner = self.cache.lock();
        for (part, number) in self.slots.drain(..) {
            let slot = &mut inner.slots[number as usize];
            assert_eq!((slot.oid, slot.part), (self.oid, part), "a slot that is being filled keeps its part");
            slot.filling = Filling::Nobody;
            inner.free_if_empty(number);
        }
    }
}

/// Another sheep that begins here may have taken the name away.
fn remove_if_there(files: &dyn Files, path: &Path) -> io::Result<()> {
    match files.remove_file(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        removed => removed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::real_disk::RealFiles;
    use std::sync::atomic::AtomicU32;

    const BLOCK: usize = BLOCK_BYTES;

    fn cache(slots: u64) -> (Cache, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let config = CacheConfig { dir: dir.path().join("cache"), size_bytes: slots * SLOT_BYTES };
        (Cache::create(&RealFiles, &config, 7).unwrap(), dir)
    }

    fn fill(cache: &Cache, oid: u64, first_block: u64, blocks: &[u8]) {
        match cache.look(oid, first_block, (blocks.len() / BLOCK) as u64) {
            Lookup::Missing(fill) => fill.keep(first_block, blocks),
            Lookup::Here | Lookup::Passed => panic!("nobody has brought it"),
        }
    }

    fn read(cache: &Cache, oid: u64, first_block: u64, count: usize) -> Option<Vec<u8>> {
        let mut blocks = vec![0; count * BLOCK];
        cache.read(oid, first_block, &mut blocks).then_some(blocks)
    }

    #[test]
    fn what_was_kept_is_read_over_the_borders_of_parts_until_it_is_forgotten() {
        let (cache, _dir) = cache(8);
        let blocks: Vec<u8> = (0..20 * BLOCK).map(|at| (at / 100) as u8).collect();
        fill(&cache, 1, 10, &blocks);
        assert_eq!(read(&cache, 1, 10, 20).as_deref(), Some(&*blocks));
        assert_eq!(read(&cache, 1, 15, 3).as_deref(), Some(&blocks[5 * BLOCK..8 * BLOCK]));
        assert_eq!((read(&cache, 1, 9, 2), read(&cache, 2, 10, 1)), (None, None));
        assert_eq!(cache.figures().used_bytes, 20 * BLOCK as u64);

        cache.forget(1, Some(16 * BLOCK as u64 + 1..17 * BLOCK as u64));
        assert_eq!((read(&cache, 1, 16, 1), read(&cache, 1, 10, 6).is_some()), (None, true));
        assert!(read(&cache, 1, 17, 13).is_some());
        cache.forget(1, None);
        assert_eq!((read(&cache, 1, 10, 1), cache.figures().used_bytes), (None, 0));
        assert_eq!(cache.lock().places.len(), 0, "forgotten slots are free");
    }

    #[test]
    fn what_is_not_used_goes_first_and_long_reads_pass() {
        let (cache, _dir) = cache(4);
        for oid in 0..4 {
            fill(&cache, oid, 0, &[oid as u8; BLOCK]);
        }
        // The fifth takes away every second chance, and the first slot; then 1 is used.
        fill(&cache, 4, 0, &[4; BLOCK]);
        assert!(read(&cache, 1, 0, 1).is_some());
        fill(&cache, 5, 0, &[5; BLOCK]);
        let held: Vec<u64> = (0..6).filter(|oid| read(&cache, *oid, 0, 1) == Some(vec![*oid as u8; BLOCK])).collect();
        assert_eq!(held, [1, 3, 4, 5]);
        assert!(matches!(cache.look(9, 0, (SEQUENTIAL_BYTES / BLOCK) as u64), Lookup::Passed));
        let figures = cache.figures();
        assert_eq!((figures.used_bytes, figures.hits, figures.misses), (4 * BLOCK as u64, 5, 6));
    }

    #[test]
    fn what_changes_while_it_is_read_is_not_kept() {
        let (cache, _dir) = cache(1);
        let Lookup::Missing(going) = cache.look(1, 0, 2) else { panic!("it is empty") };
        let Lookup::Missing(second) = cache.look(1, 1, 1) else { panic!("it is empty") };
        let Lookup::Missing(homeless) = cache.look(2, 0, 1) else { panic!("it is empty") };
        assert_eq!((second.slots.len(), homeless.slots.len()), (0, 0), "one fills a slot at a time");
        cache.forget(1, Some(0..1));
        going.keep(0, &[1; 2 * BLOCK]);
        homeless.keep(0, &[2; BLOCK]);
        assert_eq!((read(&cache, 1, 0, 1), read(&cache, 1, 1, 1), cache.figures().used_bytes), (None, None, 0));
        drop(cache.look(1, 0, 2));
        fill(&cache, 1, 0, &[3; BLOCK]);
        assert_eq!(read(&cache, 1, 0, 1), Some(vec![3; BLOCK]), "who gave up holds nobody up");
    }

    #[test]
    fn its_file_has_no_name_and_what_was_left_goes() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("sheep-cache.0123"), b"left").unwrap();
        std::fs::write(dir.path().join("other"), b"kept").unwrap();
        let config = CacheConfig { dir: dir.path().into(), size_bytes: 1 << 20 };
        let cache = Cache::create(&RealFiles, &config, 7).unwrap();
        let names: Vec<_> = std::fs::read_dir(dir.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        assert_eq!(names, ["other"]);
        fill(&cache, 1, 0, &[1; BLOCK]);
        assert!(read(&cache, 1, 0, 1).is_some());
        let huge = CacheConfig { size_bytes: 1 << 60, ..config };
        assert_eq!(Cache::create(&RealFiles, &huge, 8).err().unwrap().kind(), io::ErrorKind::StorageFull);
    }

    #[test]
    fn an_error_of_its_device_ends_it() {
        let (mut cache, dir) = cache(4);
        fill(&cache, 1, 0, &[1; BLOCK]);
        let path = dir.path().join("read-only");
        std::fs::write(&path, b"").unwrap();
        cache.file = RealFiles.open(&path, OpenMode::Read).unwrap();
        fill(&cache, 2, 0, &[2; BLOCK]);
        assert_eq!((read(&cache, 1, 0, 1), read(&cache, 2, 0, 1)), (None, None));
        assert!(cache.figures().failed && matches!(cache.look(3, 0, 1), Lookup::Passed));
    }

    /// A model of objects whose blocks hold how often they were changed, a writer as the applier is, and readers.
    #[test]
    fn readers_beside_the_applier_never_meet_what_is_older_than_the_overlay() {
        const OBJECTS: u64 = 3;
        const BLOCKS: u64 = 40;
        let (cache, _dir) = cache(5);
        let table = || (0..OBJECTS * BLOCKS).map(|_| AtomicU32::new(0)).collect::<Vec<_>>();
        let (file, applied) = (table(), table());
        let is_over = AtomicBool::new(false);
        let mut random = 1_u64;
        let mut next = |below: u64| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) % below
        };
        let read_all = |mut seed: u64| {
            let mut hits = 0_u64;
            while !is_over.load(Ordering::Relaxed) {
                seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
                let (oid, first) = ((seed >> 40) % OBJECTS, (seed >> 33) % (BLOCKS - 3));
                let places = (oid * BLOCKS + first) as usize..(oid * BLOCKS + first + 3) as usize;
                let looked = cache.look(oid, first, 3);
                let least: Vec<u32> = applied[places.clone()].iter().map(|n| n.load(Ordering::SeqCst)).collect();
                let mut blocks = vec![0; 3 * BLOCK];
                let is_hit = matches!(looked, Lookup::Here) && cache.read(oid, first, &mut blocks);
                if !is_hit {
                    for (place, block) in places.zip(blocks.chunks_exact_mut(BLOCK)) {
                        block[..4].copy_from_slice(&file[place].load(Ordering::SeqCst).to_le_bytes());
                    }
                    std::thread::yield_now();
                    if let Lookup::Missing(fill) = looked {
                        fill.keep(first, &blocks);
                    }
                }
                hits += u64::from(is_hit);
                for (least, block) in least.iter().zip(blocks.chunks_exact(BLOCK)) {
                    let got = u32::from_le_bytes([block[0], block[1], block[2], block[3]]);
                    assert!(got >= *least, "{got} is older than {least}");
                }
            }
            hits
        };
        let read_all = &read_all;
        std::thread::scope(|scope| {
            let readers: Vec<_> = (0..4).map(|seed| scope.spawn(move || read_all(seed))).collect();
            for round in 0..30_000 {
                let (oid, first) = (next(OBJECTS), next(BLOCKS));
                let count = if round % 100 == 0 { BLOCKS } else { 1 + next((BLOCKS - first).min(4)) };
                let first = if count == BLOCKS { 0 } else { first };
                let places = (oid * BLOCKS + first) as usize..(oid * BLOCKS + first + count) as usize;
                for place in places.clone() {
                    file[place].fetch_add(1, Ordering::SeqCst);
                }
                let bytes = first * BLOCK as u64..(first + count) * BLOCK as u64;
                cache.forget(oid, (count < BLOCKS).then_some(bytes));
                for place in places {
                    applied[place].fetch_add(1, Ordering::SeqCst);
                }
                if round % 4 == 0 {
                    std::thread::yield_now();
                }
            }
            is_over.store(true, Ordering::Relaxed);
            let hits: u64 = readers.into_iter().map(|reader| reader.join().unwrap()).sum();
            assert!(hits > 100, "{hits} hits prove nothing");
        });
    }
}
