//! A disk in memory that can lose power, fail, fill up and rot.
//!
//! The platter ([`SimDisk`]) outlives the processes that use it. A process gets a [`Disk`] from [`SimDisk::attach`]; when
//! it is killed, or the power is cut, everything that was attached goes dead: calls fail, jobs are dropped.
//!
//! Always holds:
//! 1. Everything written is visible at once, to whoever is attached.
//! 2. A power cut keeps everything that was synced. Of the rest, every 512-byte sector is, by the seed, as it was synced
//!    or as some later write made it; every unsynced length and name is kept or lost.
//! 3. Nothing depends on anything but the seeds and the order of the calls.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque};
use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use sheep::world::disk::{DirEntry, Disk, File, FileLock, Files, Job, OpenMode, Space};

use super::Random;

const PAGE_BYTES: usize = 4096;
const SECTOR_BYTES: usize = 512;

/// Size of a disk that nobody limited.
pub const UNLIMITED_BYTES: u64 = 1 << 40;

/// Versions of a page between two syncs that a power cut can choose from; more would only cost memory.
const VERSIONS_MAX: usize = 4;

type Page = Arc<[u8; PAGE_BYTES]>;

/// What ends the process at a chosen operation.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Cut {
    /// Only the process: what it wrote stays visible.
    Kill,
    /// The power: what was not synced is lost in part, chosen by this seed.
    Power(u64),
}

/// Which operations a fault hits.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Operation {
    /// Reading a file.
    Read,
    /// Writing, cutting, extending or punching a file.
    Write,
    /// Any sync.
    Sync,
    /// Creating, renaming or removing a name.
    Name,
}

/// An end in the middle of a changing operation.
struct PlannedCut {
    /// Only operations on paths that contain this count; of those that contain it, unless it is empty, only writes.
    path_part: &'static str,
    /// How many of them come before it.
    left: u64,
    cut: Cut,
}

impl PlannedCut {
    /// Counts an operation. True: this is the one.
    fn comes(&mut self, path: &str, operation: Operation) -> bool {
        let is_counted = self.path_part.is_empty() || (operation == Operation::Write && path.contains(self.path_part));
        let comes = is_counted && self.left == 0;
        self.left -= u64::from(is_counted && !comes);
        comes
    }
}

struct Fault {
    path_part: String,
    operation: Operation,
    error: fn() -> io::Error,
    skip: u64,
    count: u64,
}

/// The error number of a sector that cannot be read: errno(3), EIO.
const EIO: i32 = 5;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Node {
    Dir,
    File(u64),
}

#[derive(Default)]
struct Inode {
    length: u64,
    pages: HashMap<u64, Page>,
    durable_length: u64,
    durable: HashMap<u64, Page>,
    /// What unsynced pages held since the last sync, oldest first; `None` is a hole.
    unsynced: BTreeMap<u64, Vec<Option<Page>>>,
    /// Pages that cannot be read until they are written as a whole.
    unreadable: BTreeSet<u64>,
}

/// Names that changed together.
struct NameChange {
    changes: Vec<(PathBuf, Option<Node>)>,
}

struct State {
    random: Random,
    generation: u64,
    names: BTreeMap<PathBuf, Node>,
    durable_names: BTreeMap<PathBuf, Node>,
    name_changes: Vec<NameChange>,
    inodes: HashMap<u64, Inode>,
    next_inode: u64,
    locks: HashMap<PathBuf, u64>,
    next_lock: u64,
    operations: u64,
    fingerprint: u64,
    cut: Option<PlannedCut>,
    faults: Vec<Fault>,
    capacity_bytes: u64,
    is_read_only: bool,
    is_unplugged: bool,
    slowness: (u64, Duration),
    zeros: Page,
}

/// The platter. Cloning it gives another handle to the same one.
#[derive(Clone)]
pub struct SimDisk {
    state: Arc<Mutex<State>>,
}

fn off() -> io::Error {
    io::Error::other("the simulated machine is off")
}

fn unplugged() -> io::Error {
    io::Error::other("the simulated disk is not there")
}

impl SimDisk {
    /// An empty disk with a root directory.
    pub fn new(seed: u64) -> SimDisk {
        let names = BTreeMap::from([(PathBuf::from("/"), Node::Dir)]);
        SimDisk {
            state: Arc::new(Mutex::new(State {
                random: Random::new(seed),
                generation: 0,
                durable_names: names.clone(),
                names,
                name_changes: Vec::new(),
                inodes: HashMap::new(),
                next_inode: 1,
                locks: HashMap::new(),
                next_lock: 1,
                operations: 0,
                fingerprint: 0,
                cut: None,
                faults: Vec::new(),
                capacity_bytes: UNLIMITED_BYTES,
                is_read_only: false,
                is_unplugged: false,
                slowness: (0, Duration::ZERO),
                zeros: Arc::new([0; PAGE_BYTES]),
            })),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sim_files(&self) -> SimFiles {
        SimFiles { state: self.state.clone(), generation: self.lock().generation }
    }

    /// The door for a process that starts now; jobs run inside `spawn`.
    pub fn attach(&self) -> Arc<dyn Disk> {
        Arc::new(Attached { files: Arc::new(self.sim_files()), queue: None })
    }

    /// As `attach`, but jobs run later, one after the other, in a task of the current runtime, so that other tasks get
    /// between them; see `set_slowness`.
    pub fn attach_deferred(&self) -> Arc<dyn Disk> {
        let queue = Arc::new(Mutex::new(Queue { jobs: VecDeque::new(), running: false }));
        Arc::new(Attached { files: Arc::new(self.sim_files()), queue: Some(queue) })
    }

    /// Of deferred jobs, one in `one_in` takes up to `max` before it runs, the others no time; 0: none of them.
    pub fn set_slowness(&self, one_in: u64, max: Duration) {
        self.lock().slowness = (one_in, max);
    }

    /// Tells whether what is attached now has been ended since.
    pub fn end_watch(&self) -> Box<dyn Fn() -> bool + Send> {
        let files = self.sim_files();
        Box::new(move || files.lock().generation != files.generation)
    }

    /// The files, for a test that looks at them or damages them.
    pub fn files(&self) -> Arc<dyn Files> {
        Arc::new(self.sim_files())
    }

    /// Ends whatever is attached; nothing that was written is lost.
    pub fn kill(&self) {
        self.lock().end(Cut::Kill);
    }

    /// Cuts the power; see invariant 2.
    pub fn power_cut(&self, seed: u64) {
        self.lock().end(Cut::Power(seed));
    }

    /// Changing operations so far.
    pub fn operations(&self) -> u64 {
        self.lock().operations
    }

    /// Differs, as good as surely, when two lives of a disk differ: the kinds, places and sizes of all changing operations.
    pub fn fingerprint(&self) -> u64 {
        self.lock().fingerprint
    }

    /// Ends whatever is attached in the middle of the changing operation `after` operations from now.
    pub fn cut_after(&self, after: u64, cut: Cut) {
        self.lock().cut = Some(PlannedCut { path_part: "", left: after, cut });
    }

    /// The same in the middle of a write to a path that contains `path_part`, after so many of them.
    pub fn cut_in_write(&self, path_part: &'static str, after: u64, cut: Cut) {
        self.lock().cut = Some(PlannedCut { path_part, left: after, cut });
    }

    /// Takes back `cut_after`. True if it had not happened.
    pub fn cancel_cut(&self) -> bool {
        self.lock().cut.take().is_some()
    }

    /// Makes operations on paths that contain `path_part` fail: after `skip` more of them, `count` times.
    pub fn fail(&self, path_part: &str, operation: Operation, skip: u64, count: u64) {
        let error = || io::ErrorKind::Other.into();
        self.lock().faults.push(Fault { path_part: path_part.to_string(), operation, error, skip, count });
    }

    /// Makes reads of paths that contain `path_part` meet a bad sector: after `skip` more of them, `count` times.
    pub fn fail_medium(&self, path_part: &str, skip: u64, count: u64) {
        let error = || io::Error::from_raw_os_error(EIO);
        let fault = Fault { path_part: path_part.to_string(), operation: Operation::Read, error, skip, count };
        self.lock().faults.push(fault);
    }

    /// Makes the page of a file that a byte lies in unreadable until it is written as a whole, as a device replaces a bad sector.
    pub fn lose_page(&self, path: &Path, byte: u64) {
        let mut state = self.lock();
        let inode = state.inode_of(path).expect("the test damages a file that is there");
        let inode = state.inodes.get_mut(&inode).expect("named inodes exist");
        inode.unreadable.insert(byte / PAGE_BYTES as u64);
    }

    /// Takes back all of `fail` and `fail_medium`.
    pub fn heal(&self) {
        self.lock().faults.clear();
    }

    /// Limits the disk's size.
    pub fn set_capacity(&self, bytes: u64) {
        self.lock().capacity_bytes = bytes;
    }

    /// As after an error of the file system below.
    pub fn set_read_only(&self, is_read_only: bool) {
        self.lock().is_read_only = is_read_only;
    }

    /// Pulls the disk out, or plugs it in again: until then nothing on it can be reached.
    pub fn set_unplugged(&self, is_unplugged: bool) {
        self.lock().is_unplugged = is_unplugged;
    }

    /// Bytes that are not taken.
    pub fn free_bytes(&self) -> u64 {
        let state = self.lock();
        state.capacity_bytes.saturating_sub(state.used_bytes())
    }

    /// Bytes that are taken.
    pub fn used_bytes(&self) -> u64 {
        self.lock().used_bytes()
    }

    /// Everything on it is gone, as if it were another disk; whatever is attached ends.
    pub fn erase(&self) {
        let mut state = self.lock();
        state.end(Cut::Kill);
        state.names = BTreeMap::from([(PathBuf::from("/"), Node::Dir)]);
        state.durable_names = state.names.clone();
        state.name_changes.clear();
        state.inodes.clear();
    }

    /// Bytes that files take whose paths have a part of this name.
    pub fn allocated_bytes(&self, part: &str) -> u64 {
        let state = self.lock();
        let size = |(path, node): (&PathBuf, &Node)| match node {
            Node::File(inode) if path.components().any(|other| other.as_os_str() == part) => {
                state.inodes[inode].pages.len() as u64 * PAGE_BYTES as u64
            }
            _ => 0,
        };
        state.names.iter().map(size).sum()
    }

    /// Flips one bit of a file, synced or not. Gives whether there was one: a hole has no bits on the medium.
    pub fn flip_bit(&self, path: &Path, bit: u64) -> bool {
        let mut state = self.lock();
        let inode = state.inode_of(path).expect("the test damages a file that is there");
        let inode = state.inodes.get_mut(&inode).expect("named inodes exist");
        let (page, byte) = (bit / 8 / PAGE_BYTES as u64, (bit / 8) as usize % PAGE_BYTES);
        let mut is_flipped = false;
        for pages in [&mut inode.pages, &mut inode.durable] {
            let Some(content) = pages.get_mut(&page) else { continue };
            Arc::make_mut(content)[byte] ^= 1 << (bit % 8);
            is_flipped = true;
        }
        is_flipped
    }

    /// The page of a file that a byte lies in, as whoever reads it now would find it; nothing if the file is not there.
    pub fn page_at(&self, path: &Path, byte: u64) -> Option<Vec<u8>> {
        let state = self.lock();
        let inode = &state.inodes[&state.inode_of(path).ok()?];
        Some(inode.pages.get(&(byte / PAGE_BYTES as u64)).unwrap_or(&state.zeros).to_vec())
    }

    /// All files, with their visible lengths, in the order of their paths.
    pub fn list(&self) -> Vec<(PathBuf, u64)> {
        let state = self.lock();
        let file = |(path, node): (&PathBuf, &Node)| match node {
            Node::File(inode) => Some((path.clone(), state.inodes[inode].length)),
            Node::Dir => None,
        };
        state.names.iter().filter_map(file).collect()
    }
}

impl State {
    fn inode_of(&self, path: &Path) -> io::Result<u64> {
        match self.names.get(path) {
            Some(Node::File(inode)) => Ok(*inode),
            Some(Node::Dir) => Err(io::ErrorKind::IsADirectory.into()),
            None => Err(io::ErrorKind::NotFound.into()),
        }
    }

    fn path_of(&self, inode: u64) -> String {
        let found = self.names.iter().find(|(_, node)| **node == Node::File(inode));
        found.map(|(path, _)| path.display().to_string()).unwrap_or_default()
    }

    fn check_fault(&mut self, path: &str, operation: Operation) -> io::Result<()> {
        for fault in &mut self.faults {
            if fault.operation != operation || !path.contains(&fault.path_part) {
                continue;
            }
            if fault.skip > 0 {
                fault.skip -= 1;
            } else if fault.count > 0 {
                fault.count -= 1;
                return Err((fault.error)());
            }
        }
        Ok(())
    }

    /// Begins a changing operation. True: the machine goes off in the middle of it.
    fn begin(&mut self, generation: u64, path: &str, operation: Operation) -> io::Result<bool> {
        if self.generation != generation {
            return Err(off());
        }
        if self.is_unplugged {
            return Err(unplugged());
        }
        if self.is_read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if !self.faults.is_empty() {
            self.check_fault(path, operation)?;
        }
        self.operations += 1;
        self.fingerprint = super::mix(self.fingerprint ^ (operation as u64));
        Ok(self.cut.as_mut().is_some_and(|planned| planned.comes(path, operation)))
    }

    fn note(&mut self, offset: u64, length: u64) {
        self.fingerprint = super::mix(self.fingerprint ^ offset.wrapping_mul(31) ^ (length << 40));
    }

    /// Ends a changing operation.
    fn complete(&mut self, cut_now: bool) -> io::Result<()> {
        if !cut_now {
            return Ok(());
        }
        if let Some(planned) = self.cut.take() {
            self.end(planned.cut);
        }
        Err(off())
    }

    fn end(&mut self, cut: Cut) {
        self.generation += 1;
        self.locks.clear();
        self.cut = None;
        if let Cut::Power(seed) = cut {
            self.lose_unsynced(Random::new(seed));
        }
    }

    fn lose_unsynced(&mut self, mut random: Random) {
        let changes = std::mem::take(&mut self.name_changes);
        // Journaling file systems lose the newest names; others may lose any.
        let in_order = random.one_in(2);
        let kept = random.below(changes.len() as u64 + 1) as usize;
        for (index, change) in changes.into_iter().enumerate() {
            let keep = if in_order { index < kept } else { random.one_in(2) };
            if keep {
                apply_names(&mut self.durable_names, change.changes);
            }
        }
        let orphans: Vec<PathBuf> = self
            .durable_names
            .keys()
            .filter(|path| path.parent().is_some_and(|parent| !self.durable_names.contains_key(parent)))
            .cloned()
            .collect();
        for path in orphans {
            self.durable_names.remove(&path);
        }
        self.names = self.durable_names.clone();
        let mut live: Vec<u64> = self
            .names
            .values()
            .filter_map(|node| match node {
                Node::File(inode) => Some(*inode),
                Node::Dir => None,
            })
            .collect();
        live.sort_unstable();
        self.inodes.retain(|inode, _| live.binary_search(inode).is_ok());
        let zeros = self.zeros.clone();
        for inode in live {
            if let Some(inode) = self.inodes.get_mut(&inode) {
                inode.lose_unsynced(&mut random, &zeros);
            }
        }
    }

    fn change_names(&mut self, changes: Vec<(PathBuf, Option<Node>)>) {
        apply_names(&mut self.names, changes.clone());
        self.name_changes.push(NameChange { changes });
    }

    fn sync_names(&mut self, dir: Option<&Path>) {
        let changes = std::mem::take(&mut self.name_changes);
        // A rename between two directories drags along what happened to its names before, or an old removal could
        // come true after it.
        let mut dragged: BTreeSet<PathBuf> = BTreeSet::new();
        let mut is_synced = vec![false; changes.len()];
        for (change, is_synced) in changes.iter().zip(&mut is_synced).rev() {
            let mut paths = change.changes.iter().map(|(path, _)| path);
            if paths.any(|path| dir.is_none() || path.parent() == dir || dragged.contains(path)) {
                dragged.extend(change.changes.iter().map(|(path, _)| path.clone()));
                *is_synced = true;
            }
        }
        for (change, is_synced) in changes.into_iter().zip(is_synced) {
            if is_synced {
                apply_names(&mut self.durable_names, change.changes);
            } else {
                self.name_changes.push(change);
            }
        }
    }

    /// How often a job steps back for others, and how long it takes.
    fn pause(&mut self) -> (u64, Option<Duration>) {
        let (one_in, max) = self.slowness;
        let is_slow = one_in > 0 && self.random.one_in(one_in);
        let wait = is_slow.then(|| Duration::from_millis(self.random.below(max.as_millis() as u64) + 1));
        (self.random.below(3), wait)
    }

    /// Of files that have a name, or would have it again after a power loss.
    fn used_bytes(&self) -> u64 {
        let file = |node: &Node| match node {
            Node::File(inode) => Some(*inode),
            Node::Dir => None,
        };
        let named: HashSet<u64> = self.names.values().chain(self.durable_names.values()).filter_map(file).collect();
        let of = |inode: &u64| self.inodes.get(inode).map_or(0, |inode| inode.pages.len() as u64);
        named.iter().map(of).sum::<u64>() * PAGE_BYTES as u64
    }

    fn check_room(&self, more_bytes: u64) -> io::Result<()> {
        if more_bytes > 0
            && self.capacity_bytes < UNLIMITED_BYTES
            && self.used_bytes() + more_bytes > self.capacity_bytes
        {
            return Err(io::ErrorKind::StorageFull.into());
        }
        Ok(())
    }
}

fn apply_names(names: &mut BTreeMap<PathBuf, Node>, changes: Vec<(PathBuf, Option<Node>)>) {
    for (path, node) in changes {
        match node {
            Some(node) => names.insert(path, node),
            None => names.remove(&path),
        };
    }
}

impl Inode {
    fn meets_bad_sector(&self, offset: u64, length: u64) -> bool {
        let page = PAGE_BYTES as u64;
        self.unreadable.range(offset / page..(offset + length).div_ceil(page)).next().is_some()
    }

    fn read(&self, buffer: &mut [u8], offset: u64) -> usize {
        let count = self.length.saturating_sub(offset).min(buffer.len() as u64) as usize;
        let mut done = 0;
        while done < count {
            let at = offset + done as u64;
            let inside = (at % PAGE_BYTES as u64) as usize;
            let step = (PAGE_BYTES - inside).min(count - done);
            match self.pages.get(&(at / PAGE_BYTES as u64)) {
                Some(page) => buffer[done..done + step].copy_from_slice(&page[inside..inside + step]),
                None => buffer[done..done + step].fill(0),
            }
            done += step;
        }
        count
    }

    fn set_page(&mut self, index: u64, page: Option<Page>) {
        let versions = self.unsynced.entry(index).or_default();
        if versions.len() == VERSIONS_MAX {
            versions.remove(0);
        }
        versions.push(page.clone());
        match page {
            Some(page) => self.pages.insert(index, page),
            None => self.pages.remove(&index),
        };
    }

    fn write(&mut self, bytes: &[u8], offset: u64, zeros: &Page) {
        let mut done = 0;
        while done < bytes.len() {
            let at = offset + done as u64;
            let index = at / PAGE_BYTES as u64;
            let inside = (at % PAGE_BYTES as u64) as usize;
            let step = (PAGE_BYTES - inside).min(bytes.len() - done);
            let part = &bytes[done..done + step];
            if step == PAGE_BYTES {
                self.unreadable.remove(&index);
            }
            let page = if step == PAGE_BYTES && part == &zeros[..] {
                zeros.clone()
            } else {
                let mut page = **self.pages.get(&index).unwrap_or(zeros);
                page[inside..inside + step].copy_from_slice(part);
                Arc::new(page)
            };
            self.set_page(index, Some(page));
            done += step;
        }
        self.length = self.length.max(offset + bytes.len() as u64);
    }

    /// Zeros a range; whole pages become holes.
    fn punch(&mut self, offset: u64, length: u64) {
        let end = offset + length;
        let touched: Vec<u64> = self
            .pages
            .keys()
            .copied()
            .filter(|page| page * (PAGE_BYTES as u64) < end && (page + 1) * (PAGE_BYTES as u64) > offset)
            .collect();
        for index in touched {
            let start = index * PAGE_BYTES as u64;
            let from = offset.max(start) - start;
            let to = end.min(start + PAGE_BYTES as u64) - start;
            if to - from == PAGE_BYTES as u64 {
                self.set_page(index, None);
            } else {
                let mut page = *self.pages[&index];
                page[from as usize..to as usize].fill(0);
                self.set_page(index, Some(Arc::new(page)));
            }
        }
    }

    fn set_length(&mut self, length: u64) {
        if length < self.length {
            self.punch(length, self.length - length);
        }
        self.length = length;
    }

    fn sync(&mut self) {
        for (index, _) in std::mem::take(&mut self.unsynced) {
            match self.pages.get(&index) {
                Some(page) => self.durable.insert(index, page.clone()),
                None => self.durable.remove(&index),
            };
        }
        self.durable_length = self.length;
    }

    fn lose_unsynced(&mut self, random: &mut Random, zeros: &Page) {
        for (index, versions) in std::mem::take(&mut self.unsynced) {
            let mut page = **self.durable.get(&index).unwrap_or(zeros);
            // Often a page goes as a whole; sometimes it is torn.
            let whole = random.one_in(2).then(|| random.below(versions.len() as u64 + 1) as usize);
            for sector in 0..PAGE_BYTES / SECTOR_BYTES {
                let version = whole.unwrap_or_else(|| random.below(versions.len() as u64 + 1) as usize);
                if version < versions.len() {
                    let source = versions[version].as_ref().unwrap_or(zeros);
                    let range = sector * SECTOR_BYTES..(sector + 1) * SECTOR_BYTES;
                    page[range.clone()].copy_from_slice(&source[range]);
                }
            }
            self.durable.insert(index, Arc::new(page));
        }
        if random.one_in(2) {
            self.durable_length = self.length;
        }
        let length = self.durable_length;
        self.durable.retain(|index, _| index * (PAGE_BYTES as u64) < length);
        self.pages = self.durable.clone();
        // Beyond its end a file reads as zeros when it grows again.
        self.length = length.next_multiple_of(PAGE_BYTES as u64);
        self.set_length(length);
        self.sync();
    }
}

struct SimFiles {
    state: Arc<Mutex<State>>,
    generation: u64,
}

impl SimFiles {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn looking(&self, path: &Path) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        if state.generation != self.generation {
            return Err(off());
        }
        if state.is_unplugged {
            return Err(unplugged());
        }
        if !state.faults.is_empty() {
            state.check_fault(&path.display().to_string(), Operation::Read)?;
        }
        Ok(state)
    }

    fn naming(&self, path: &Path) -> io::Result<(MutexGuard<'_, State>, bool)> {
        let mut state = self.lock();
        let cut_now = state.begin(self.generation, &path.display().to_string(), Operation::Name)?;
        Ok((state, cut_now))
    }
}

impl Files for SimFiles {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let mut state = self.looking(path)?;
        let creates = !matches!(mode, OpenMode::Read | OpenMode::Write);
        let inode = match state.inode_of(path) {
            Ok(inode) => inode,
            Err(error) if error.kind() == io::ErrorKind::NotFound && creates => {
                let parent = path.parent().unwrap_or(Path::new("/"));
                if state.names.get(parent) != Some(&Node::Dir) {
                    return Err(error);
                }
                let cut_now = state.begin(self.generation, &path.display().to_string(), Operation::Name)?;
                let inode = state.next_inode;
                state.next_inode += 1;
                state.inodes.insert(inode, Inode::default());
                state.change_names(vec![(path.to_path_buf(), Some(Node::File(inode)))]);
                state.complete(cut_now)?;
                inode
            }
            Err(error) => return Err(error),
        };
        if mode != OpenMode::Read && state.is_read_only {
            return Err(io::ErrorKind::ReadOnlyFilesystem.into());
        }
        if matches!(mode, OpenMode::Truncate | OpenMode::Private) && state.inodes[&inode].length > 0 {
            let cut_now = state.begin(self.generation, &path.display().to_string(), Operation::Write)?;
            if let Some(inode) = state.inodes.get_mut(&inode) {
                inode.set_length(0);
            }
            state.complete(cut_now)?;
        }
        drop(state);
        Ok(Arc::new(SimFile {
            state: self.state.clone(),
            generation: self.generation,
            inode,
            is_direct: mode == OpenMode::Direct,
            is_writable: mode != OpenMode::Read,
        }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        let missing: Vec<PathBuf> = {
            let state = self.looking(path)?;
            path.ancestors().filter(|dir| !state.names.contains_key(*dir)).map(Path::to_path_buf).collect()
        };
        for dir in missing.into_iter().rev() {
            let (mut state, cut_now) = self.naming(&dir)?;
            state.change_names(vec![(dir, Some(Node::Dir))]);
            state.complete(cut_now)?;
        }
        Ok(())
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        self.looking(path)?.inode_of(path)?;
        let (mut state, cut_now) = self.naming(path)?;
        state.change_names(vec![(path.to_path_buf(), None)]);
        state.complete(cut_now)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.looking(from)?.inode_of(from)?;
        let (mut state, cut_now) = self.naming(to)?;
        let inode = state.inode_of(from)?;
        state.change_names(vec![(from.to_path_buf(), None), (to.to_path_buf(), Some(Node::File(inode)))]);
        state.complete(cut_now)
    }

    fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        let source = self.looking(from)?.inode_of(from)?;
        self.open(to, OpenMode::Truncate)?;
        let mut state = self.lock();
        let cut_now = state.begin(self.generation, &to.display().to_string(), Operation::Write)?;
        let (length, pages) = {
            let inode = &state.inodes[&source];
            (inode.length, inode.pages.clone())
        };
        state.check_room(pages.len() as u64 * PAGE_BYTES as u64)?;
        let target = state.inode_of(to)?;
        if let Some(target) = state.inodes.get_mut(&target) {
            let mut pages: Vec<(u64, Page)> = pages.into_iter().collect();
            pages.sort_unstable_by_key(|(index, _)| *index);
            for (index, page) in pages {
                target.set_page(index, Some(page));
            }
            target.length = length;
        }
        state.complete(cut_now)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        let cut_now = state.begin(self.generation, &path.display().to_string(), Operation::Sync)?;
        if !cut_now {
            state.sync_names(Some(path));
        }
        state.complete(cut_now)
    }

    fn sync_filesystem(&self, path: &Path) -> io::Result<()> {
        let mut state = self.lock();
        let cut_now = state.begin(self.generation, &path.display().to_string(), Operation::Sync)?;
        if !cut_now {
            state.sync_names(None);
            state.inodes.values_mut().for_each(Inode::sync);
        }
        state.complete(cut_now)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let state = self.looking(path)?;
        if state.names.get(path) != Some(&Node::Dir) {
            return Err(io::ErrorKind::NotFound.into());
        }
        let child = |(name, node): (&PathBuf, &Node)| {
            let is_child = name.parent() == Some(path);
            let name = name.file_name()?.to_string_lossy().into_owned();
            is_child.then_some(DirEntry { name, is_dir: *node == Node::Dir })
        };
        Ok(state.names.iter().filter_map(child).collect())
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        Ok(self.looking(path)?.names.contains_key(path))
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        let state = self.looking(path)?;
        let total_bytes = state.capacity_bytes;
        Ok(Space { total_bytes, free_bytes: total_bytes.saturating_sub(state.used_bytes()) })
    }

    fn try_lock(&self, path: &Path) -> io::Result<Option<Box<dyn FileLock>>> {
        self.open(path, OpenMode::Create)?;
        let mut state = self.lock();
        if state.locks.contains_key(path) {
            return Ok(None);
        }
        let token = state.next_lock;
        state.next_lock += 1;
        state.locks.insert(path.to_path_buf(), token);
        Ok(Some(Box::new(SimLock { state: self.state.clone(), path: path.to_path_buf(), token })))
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn FileLock>> {
        // Jobs run on one thread: whoever holds the lock could not go on while this one waits.
        self.try_lock(path)?.ok_or_else(|| io::ErrorKind::WouldBlock.into())
    }
}

struct SimLock {
    state: Arc<Mutex<State>>,
    path: PathBuf,
    token: u64,
}

impl FileLock for SimLock {}

impl Drop for SimLock {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.locks.get(&self.path) == Some(&self.token) {
            state.locks.remove(&self.path);
        }
    }
}

struct SimFile {
    state: Arc<Mutex<State>>,
    generation: u64,
    inode: u64,
    is_direct: bool,
    is_writable: bool,
}

impl SimFile {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn check_aligned(&self, memory: &[u8], offset: u64) -> io::Result<()> {
        let page = PAGE_BYTES as u64;
        let aligned = (memory.as_ptr() as usize).is_multiple_of(PAGE_BYTES)
            && offset.is_multiple_of(page)
            && (memory.len() as u64).is_multiple_of(page);
        if self.is_direct && !aligned { Err(io::ErrorKind::InvalidInput.into()) } else { Ok(()) }
    }

    /// Changes `length` bytes from `offset` on; pages that are not there yet need room.
    fn change(
        &self,
        operation: Operation,
        (offset, length): (u64, u64),
        change: impl FnOnce(&mut Inode, &Page),
    ) -> io::Result<()> {
        let mut state = self.lock();
        if !self.is_writable && operation == Operation::Write {
            return Err(io::ErrorKind::PermissionDenied.into());
        }
        let is_path_wanted =
            !state.faults.is_empty() || state.cut.as_ref().is_some_and(|cut| !cut.path_part.is_empty());
        let path = if is_path_wanted { state.path_of(self.inode) } else { String::new() };
        let cut_now = state.begin(self.generation, &path, operation)?;
        if state.capacity_bytes < UNLIMITED_BYTES
            && length > 0
            && let Some(inode) = state.inodes.get(&self.inode)
        {
            let pages = offset / PAGE_BYTES as u64..=(offset + length - 1) / PAGE_BYTES as u64;
            let new = pages.filter(|page| !inode.pages.contains_key(page)).count();
            state.check_room(new as u64 * PAGE_BYTES as u64)?;
        }
        let zeros = state.zeros.clone();
        if let Some(inode) = state.inodes.get_mut(&self.inode)
            && !(cut_now && operation == Operation::Sync)
        {
            change(inode, &zeros);
        }
        state.complete(cut_now)
    }

    fn looking(&self) -> io::Result<MutexGuard<'_, State>> {
        let mut state = self.lock();
        if state.generation != self.generation {
            return Err(off());
        }
        if state.is_unplugged {
            return Err(unplugged());
        }
        if !state.faults.is_empty() {
            let path = state.path_of(self.inode);
            state.check_fault(&path, Operation::Read)?;
        }
        Ok(state)
    }
}

impl File for SimFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        self.check_aligned(buffer, offset)?;
        let state = self.looking()?;
        let Some(inode) = state.inodes.get(&self.inode) else { return Ok(0) };
        if inode.meets_bad_sector(offset, buffer.len() as u64) {
            return Err(io::Error::from_raw_os_error(EIO));
        }
        Ok(inode.read(buffer, offset))
    }

    fn read_cached(&self, buffer: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        if self.lock().random.one_in(3) {
            return Ok(None);
        }
        let count = self.read_at(buffer, offset)?;
        Ok((count == buffer.len()).then_some(count))
    }

    fn write_at(&self, buffers: &[io::IoSlice<'_>], offset: u64) -> io::Result<()> {
        let mut at = offset;
        for buffer in buffers {
            self.check_aligned(buffer, at)?;
            at += buffer.len() as u64;
        }
        let bytes = buffers.iter().map(|buffer| &**buffer).collect::<Vec<&[u8]>>().concat();
        self.lock().note(offset, bytes.len() as u64);
        self.change(Operation::Write, (offset, bytes.len() as u64), |inode, zeros| inode.write(&bytes, offset, zeros))
    }

    fn sync_data(&self) -> io::Result<()> {
        self.change(Operation::Sync, (0, 0), |inode, _| inode.sync())
    }

    fn set_len(&self, length_bytes: u64) -> io::Result<()> {
        self.change(Operation::Write, (0, 0), |inode, _| inode.set_length(length_bytes))
    }

    fn len(&self) -> io::Result<u64> {
        let state = self.looking()?;
        Ok(state.inodes.get(&self.inode).map_or(0, |inode| inode.length))
    }

    fn punch_hole(&self, offset: u64, length_bytes: u64) -> io::Result<()> {
        self.change(Operation::Write, (0, 0), |inode, _| inode.punch(offset, length_bytes))
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        let state = self.looking()?;
        Ok(state.inodes.get(&self.inode).map_or(0, |inode| inode.pages.len() as u64 * PAGE_BYTES as u64))
    }
}

struct Queue {
    jobs: VecDeque<Job>,
    running: bool,
}

struct Attached {
    files: Arc<SimFiles>,
    queue: Option<Arc<Mutex<Queue>>>,
}

impl Attached {
    fn is_dead(&self) -> bool {
        self.files.lock().generation != self.files.generation
    }
}

impl Disk for Attached {
    fn spawn(&self, job: Job) {
        if self.is_dead() {
            return;
        }
        let Some(queue) = &self.queue else {
            return job(&*self.files);
        };
        let start = {
            let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
            queue.jobs.push_back(job);
            !std::mem::replace(&mut queue.running, true)
        };
        if start {
            tokio::spawn(run_jobs(queue.clone(), self.files.clone()));
        }
    }

    fn files(&self) -> Arc<dyn Files> {
        self.files.clone()
    }

    fn end_process(&self, _: &str) -> Pin<Box<dyn Future<Output = Infallible> + Send>> {
        if !self.is_dead() {
            self.files.lock().end(Cut::Kill);
        }
        Box::pin(std::future::pending())
    }
}

async fn run_jobs(queue: Arc<Mutex<Queue>>, files: Arc<SimFiles>) {
    loop {
        let (pauses, wait) = files.lock().pause();
        for _ in 0..=pauses {
            tokio::task::yield_now().await;
        }
        if let Some(wait) = wait {
            tokio::time::sleep(wait).await;
        }
        let job = {
            let mut queue = queue.lock().unwrap_or_else(PoisonError::into_inner);
            let Some(job) = queue.jobs.pop_front() else {
                queue.running = false;
                return;
            };
            job
        };
        if files.lock().generation != files.generation {
            return;
        }
        job(&*files);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(file: &Arc<dyn File>, bytes: &[u8], offset: u64) {
        file.write_at(&[io::IoSlice::new(bytes)], offset).unwrap();
    }

    #[test]
    fn synced_bytes_and_names_survive_and_unsynced_ones_are_old_or_new_by_sector() {
        let mut kept_names = 0;
        let mut torn = 0;
        for seed in 0..200 {
            let disk = SimDisk::new(seed);
            let files = disk.files();
            files.create_dir(Path::new("/d")).unwrap();
            let file = files.open(Path::new("/d/a"), OpenMode::Create).unwrap();
            write(&file, &[1; 10_000], 0);
            file.sync_data().unwrap();
            files.sync_dir(Path::new("/")).unwrap();
            files.sync_dir(Path::new("/d")).unwrap();
            write(&file, &[2; 8192], 1000);
            files.open(Path::new("/d/b"), OpenMode::Create).unwrap();
            disk.power_cut(seed);
            assert!(file.read_at(&mut [0], 0).is_err(), "old handles are dead");
            let files = disk.files();
            let file = files.open(Path::new("/d/a"), OpenMode::Read).unwrap();
            let mut bytes = [0; 10_000];
            assert_eq!(file.read_at(&mut bytes, 0).unwrap(), 10_000);
            assert!(bytes[..1000].iter().chain(&bytes[9192..]).all(|byte| *byte == 1));
            assert!(bytes.iter().all(|byte| [1, 2].contains(byte)));
            for sector in bytes[1024..8704].chunks(512) {
                assert!(sector.iter().all(|byte| *byte == sector[0]), "sectors are whole");
            }
            torn += u32::from(bytes[1024..9192].contains(&1) && bytes[1024..9192].contains(&2));
            kept_names += u32::from(files.exists(Path::new("/d/b")).unwrap());
        }
        assert!((20..180).contains(&kept_names), "{kept_names}");
        assert!(torn > 50, "{torn}");
    }

    #[test]
    fn a_kill_keeps_everything_written_and_frees_locks() {
        let disk = SimDisk::new(1);
        let files = disk.files();
        let file = files.open(Path::new("/a"), OpenMode::Create).unwrap();
        write(&file, b"hello", 0);
        let held = files.try_lock(Path::new("/l")).unwrap();
        assert!(held.is_some());
        assert!(files.try_lock(Path::new("/l")).unwrap().is_none());
        disk.cut_after(0, Cut::Kill);
        assert!(file.sync_data().is_err());
        let files = disk.files();
        assert!(files.try_lock(Path::new("/l")).unwrap().is_some());
        let mut bytes = [0; 5];
        files.open(Path::new("/a"), OpenMode::Read).unwrap().read_at(&mut bytes, 0).unwrap();
        assert_eq!(&bytes, b"hello");
    }
}
