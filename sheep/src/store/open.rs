//! Making a store in an empty directory, and opening one after whatever happened to it.
//!
//! Opening reads the superblock, the labels, the index and the journal, never every object. It replays the journal,
//! checkpoints, and removes what was left half-made; DISK.md lists every state it may meet.
//!
//! Always holds:
//! 1. A directory that is not a store, and not empty, is left exactly as it was.
//! 2. Opening is repeatable: a crash in the middle of it leaves a state that opens.
//! 3. Whatever is read and built upon is made durable first: after a kill it may be visible only.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use sheep_core::member::NodeId;
use tokio::sync::watch;

use super::cache::Cache;
use super::entries::Entries;
use super::epochs::Epochs;
use super::index::{Changes, Index, IndexError, Loaded, State};
use super::journal::{End, JOURNAL_BYTES_MAX, JOURNAL_BYTES_MIN, Journal, Opened, Position};
use super::layout::{self, Layout};
use super::object_file::{Base, OBJECT_BYTES_MAX};
use super::record::{Kind, Record};
use super::state::{Committed, Inner, Queued, Shared};
use super::submit::footprint_bytes;
use super::superblock::{self, Label, Sealed, Superblock};
use super::{OpenError, OpenReport, Store, StoreConfig, hint};
use crate::world::World;
use crate::world::disk::{self, FileLock, Files, Space};
use crate::world::marks::{self, Mark};

/// Names that an unfinished making of a store can leave in its directories, and nothing else.
const MAKING_NAMES: [&str; 9] = [
    layout::LOCK,
    layout::JOURNAL,
    layout::INDEX,
    layout::OBJECTS,
    layout::MAKING,
    layout::LABEL,
    layout::LOST_AND_FOUND,
    "journal.next",
    "disk.next",
];
/// Like them, but it would be complete under its name.
const SUPERBLOCK_NEXT: &str = "superblock.next";

/// A store has at most this many disks: entries name them in one byte.
const DISKS_MAX: usize = 255;

impl Store {
    /// Opens the store of a directory, or makes one if the directory is empty or missing.
    pub async fn open(world: World, config: StoreConfig) -> Result<Store, OpenError> {
        let runtime = tokio::runtime::Handle::current();
        let disk = world.disk.clone();
        let shared = disk::run(&disk, move |files| Opening { files, world, config, runtime }.open()).await?;
        Ok(Store { shared: Arc::new(shared) })
    }
}

struct Opening<'a> {
    files: &'a dyn Files,
    world: World,
    config: StoreConfig,
    runtime: tokio::runtime::Handle,
}

fn at<T>(path: &Path, doing: &'static str, result: io::Result<T>) -> Result<T, OpenError> {
    result.map_err(|source| OpenError::Io { path: path.to_path_buf(), doing, source })
}

fn damaged(path: &Path, what: impl Into<String>) -> OpenError {
    OpenError::Damaged { path: path.to_path_buf(), what: what.into() }
}

fn index_error(path: &Path, error: IndexError) -> OpenError {
    match error {
        IndexError::Io(source) => OpenError::Io { path: path.to_path_buf(), doing: "read or write", source },
        IndexError::Damaged(what) => damaged(path, what),
    }
}

impl Opening<'_> {
    fn open(self) -> Result<Shared, OpenError> {
        self.check_settings()?;
        let meta = self.config.meta.clone();
        let superblock_path = meta.join(layout::SUPERBLOCK);
        if self.read_superblock(&superblock_path)?.is_none() {
            // Looked at before the lock, so that a foreign directory gets no file of ours.
            self.check_empty(&meta)?;
        }
        self.make_dir(&meta)?;
        let lock = self.take_lock(&meta)?;
        let mut report = OpenReport::default();
        let superblock = if let Some(superblock) = self.read_superblock(&superblock_path)? {
            superblock
        } else {
            report.created = true;
            self.create(&superblock_path)?
        };
        let layout = self.layout(superblock)?;
        if self.config.sync {
            // What a killed process renamed last is visible and perhaps not durable: the saved state, for one.
            for dir in [&layout.meta, &layout.journal_dir] {
                at(dir, "flush the directory", self.files.sync_dir(dir))?;
            }
        }
        let index_path = layout.meta_file(layout::INDEX);
        let (index, loaded) = Index::open_and_load(self.files, &index_path, self.config.sync)
            .map_err(|error| index_error(&index_path, error))?;
        let journal = self.open_journal(&layout, superblock.node)?;
        let spaces = self.spaces(&layout)?;
        let reserve_bytes = self.config.reserve_bytes;
        let files = self.files;
        let mut shared = self.assemble(superblock.node, layout, index, loaded, journal, lock)?;
        {
            let mut inner = shared.lock();
            inner.space.disks = spaces;
            inner.space.reserve_bytes = reserve_bytes;
            inner.space.seen_at = shared.world.clock.monotonic();
        }
        shared.recover(files, &mut report)?;
        shared.report = report;
        if let Some(config) = &shared.config.cache {
            let made = Cache::create(files, config, shared.world.rng.next_u64());
            let dir = config.dir.display();
            shared.cache = Some(made.map_err(|error| format!("{dir}: make the cache: {error}{}", hint(&error))));
        }
        Ok(shared)
    }

    fn check_settings(&self) -> Result<(), OpenError> {
        let setting = |what: String| Err(OpenError::Setting { what });
        let bytes = self.config.journal_bytes;
        if !(JOURNAL_BYTES_MIN..=JOURNAL_BYTES_MAX).contains(&bytes) {
            return setting(format!(
                "a journal of {bytes} bytes: give between {JOURNAL_BYTES_MIN} and {JOURNAL_BYTES_MAX}"
            ));
        }
        if self.config.disks.len() >= DISKS_MAX {
            return setting(format!("{} disks: a store has at most {DISKS_MAX}", self.config.disks.len()));
        }
        for (index, disk) in self.config.disks.iter().enumerate() {
            if self.config.disks[..index].contains(disk) {
                return setting(format!("{}: given twice; give every disk once", disk.display()));
            }
        }
        Ok(())
    }

    /// Makes a directory and its missing parents, durably.
    fn make_dir(&self, dir: &Path) -> Result<(), OpenError> {
        let mut made = Vec::new();
        for ancestor in dir.ancestors() {
            if ancestor.as_os_str().is_empty() || at(ancestor, "look at", self.files.exists(ancestor))? {
                break;
            }
            made.push(ancestor);
        }
        at(dir, "make the directory", self.files.create_dir(dir))?;
        for parent in made.into_iter().filter_map(Path::parent) {
            let parent = if parent.as_os_str().is_empty() { Path::new(".") } else { parent };
            at(parent, "flush the directory", self.files.sync_dir(parent))?;
        }
        Ok(())
    }

    fn read_superblock(&self, path: &Path) -> Result<Option<Superblock>, OpenError> {
        match at(path, "read", superblock::read(self.files, path))? {
            Sealed::Nothing => Ok(None),
            Sealed::Intact(superblock) => Ok(Some(superblock)),
            Sealed::Newer(found) => Err(OpenError::Format { path: path.into(), found, known: superblock::FORMAT }),
            Sealed::Damaged(what) => Err(damaged(path, format!("the superblock is damaged ({what})"))),
        }
    }

    fn take_lock(&self, meta: &Path) -> Result<Box<dyn FileLock>, OpenError> {
        let path = meta.join(layout::LOCK);
        at(&path, "lock", self.files.try_lock(&path))?.ok_or_else(|| OpenError::InUse { path: meta.to_path_buf() })
    }

    /// Refuses a directory that holds anything but what an unfinished making of a store can have left.
    fn check_empty(&self, dir: &Path) -> Result<(), OpenError> {
        if !at(dir, "look at", self.files.exists(dir))? {
            return Ok(());
        }
        for entry in at(dir, "list", self.files.read_dir(dir))? {
            let known = MAKING_NAMES.contains(&entry.name.as_str())
                || entry.name == SUPERBLOCK_NEXT
                || entry.name == layout::LOG;
            if !known {
                return Err(OpenError::NotEmpty { path: dir.to_path_buf(), found: entry.name });
            }
            if entry.name == layout::OBJECTS {
                let objects = dir.join(layout::OBJECTS);
                if !at(&objects, "list", self.files.read_dir(&objects))?.is_empty() {
                    return Err(damaged(dir, "it holds objects, but its superblock is missing"));
                }
            }
        }
        Ok(())
    }

    fn has_meta_disk(&self) -> bool {
        self.config.disks.is_empty() || self.config.disks.contains(&self.config.meta)
    }

    fn further_disks(&self) -> Vec<PathBuf> {
        self.config.disks.iter().filter(|disk| **disk != self.config.meta).cloned().collect()
    }

    /// Makes a store; the superblock comes last.
    fn create(&self, superblock_path: &Path) -> Result<Superblock, OpenError> {
        let meta = &self.config.meta;
        let node = NodeId(self.world.rng.next_u64());
        self.check_empty(meta)?;
        let further = self.further_disks();
        let meta_is_disk = self.has_meta_disk();
        for disk in &further {
            self.check_empty(disk)?;
        }
        if meta_is_disk {
            self.make_disk(meta)?;
        }
        for (index, disk) in further.iter().enumerate() {
            self.label_disk(disk, Label { node, index: index as u32 + u32::from(meta_is_disk) })?;
        }
        let layout = self.layout_of(Vec::new());
        let journal = layout.journal();
        if self.config.journal_dir.is_some() {
            self.make_dir(&layout.journal_dir)?;
            if at(&journal, "look at", self.files.exists(&journal))? {
                return Err(OpenError::Foreign { path: journal, owner: "unknown".to_string() });
            }
        }
        at(&journal, "make the journal", Journal::create(self.files, &journal, node.0, self.config.journal_bytes))?;
        self.make_index(meta)?;
        at(meta, "flush the directory", self.files.sync_dir(meta))?;
        let superblock = Superblock { node, disk_count: further.len() as u32 + u32::from(meta_is_disk), meta_is_disk };
        at(superblock_path, "write", superblock::write(self.files, superblock_path, superblock))?;
        Ok(superblock)
    }

    fn make_index(&self, meta: &Path) -> Result<(), OpenError> {
        let path = meta.join(layout::INDEX);
        match self.files.remove_file(&path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            other => at(&path, "remove", other)?,
        }
        let index = Index::open(self.files, &path, self.config.sync).map_err(|error| index_error(&path, error))?;
        // Sequence 0 never exists, so that zeros are no batch.
        let tail = Position { offset: 0, sequence: 1, skip: 0 };
        let state = State { tail, epochs: Epochs::NONE };
        let changes = Changes { entries: &mut std::iter::empty(), doomed: &[], state };
        index.commit(changes).map_err(|error| index_error(&path, error))
    }

    fn make_disk(&self, disk: &Path) -> Result<(), OpenError> {
        for dir in [disk.join(layout::OBJECTS), disk.join(layout::MAKING)] {
            at(&dir, "make the directory", self.files.create_dir(&dir))?;
        }
        at(disk, "flush the directory", self.files.sync_dir(disk))
    }

    fn label_disk(&self, disk: &Path, label: Label) -> Result<(), OpenError> {
        self.make_dir(disk)?;
        self.make_disk(disk)?;
        let path = disk.join(layout::LABEL);
        at(&path, "write", superblock::write_label(self.files, &path, label))
    }

    fn layout_of(&self, disks: Vec<PathBuf>) -> Layout {
        let meta = self.config.meta.clone();
        Layout { journal_dir: self.config.journal_dir.clone().unwrap_or_else(|| meta.clone()), meta, disks }
    }

    /// Finds out which directory is which disk, and takes new disks in.
    fn layout(&self, superblock: Superblock) -> Result<Layout, OpenError> {
        let meta = &self.config.meta;
        let mut disks: Vec<Option<PathBuf>> = vec![None; superblock.disk_count as usize];
        if superblock.meta_is_disk && !disks.is_empty() {
            disks[0] = Some(meta.clone());
        }
        let mut fresh = Vec::new();
        for disk in self.further_disks() {
            let path = disk.join(layout::LABEL);
            match at(&path, "read", superblock::read_label(self.files, &path))? {
                Sealed::Intact(label) if label.node != superblock.node => {
                    return Err(OpenError::Foreign { path: disk, owner: label.node.to_string() });
                }
                Sealed::Intact(label) => match disks.get_mut(label.index as usize) {
                    Some(slot) => *slot = Some(disk),
                    // Labelled, then a crash before the superblock counted it.
                    None => fresh.push(disk),
                },
                Sealed::Nothing => fresh.push(disk),
                Sealed::Newer(found) => return Err(OpenError::Format { path, found, known: superblock::FORMAT }),
                Sealed::Damaged(what) => return Err(damaged(&path, format!("the label is damaged ({what})"))),
            }
        }
        let missing = disks.iter().position(Option::is_none);
        if let Some(index) = missing {
            return Err(OpenError::DiskMissing { path: meta.clone(), index: index as u32 });
        }
        let mut disks: Vec<PathBuf> = disks.into_iter().flatten().collect();
        for disk in fresh {
            self.check_empty(&disk)?;
            self.label_disk(&disk, Label { node: superblock.node, index: disks.len() as u32 })?;
            disks.push(disk);
        }
        if disks.len() > superblock.disk_count as usize {
            let path = meta.join(layout::SUPERBLOCK);
            let counted = Superblock { disk_count: disks.len() as u32, ..superblock };
            at(&path, "write", superblock::write(self.files, &path, counted))?;
        }
        Ok(self.layout_of(disks))
    }

    fn open_journal(&self, layout: &Layout, node: NodeId) -> Result<Journal, OpenError> {
        let path = layout.journal();
        match at(&path, "open", Journal::open(self.files, &path, node.0, self.config.sync))? {
            Opened::Journal(journal) => Ok(journal),
            Opened::Missing => Err(OpenError::JournalMissing { path }),
            Opened::Damaged(what) => Err(damaged(&path, what)),
            Opened::Foreign => Err(OpenError::Foreign { path, owner: "unknown".to_string() }),
        }
    }

    fn spaces(&self, layout: &Layout) -> Result<Vec<Space>, OpenError> {
        layout.disks.iter().map(|disk| at(disk, "ask for free space", self.files.space(disk))).collect()
    }

    fn assemble(
        self,
        node: NodeId,
        layout: Layout,
        index: Index,
        loaded: Loaded,
        journal: Journal,
        lock: Box<dyn FileLock>,
    ) -> Result<Shared, OpenError> {
        check_disks(&layout, &loaded.entries)?;
        let mut inner = Inner::new(loaded.entries, loaded.state.epochs, loaded.state.tail, journal.ring_bytes());
        let known = |(_, disk): &(u64, u8)| usize::from(*disk) < layout.disks.len();
        inner.doomed = loaded.doomed.into_iter().filter(known).map(|file| (file, 0)).collect();
        Ok(Shared {
            world: self.world,
            runtime: self.runtime,
            config: self.config,
            layout,
            node,
            report: OpenReport::default(),
            inner: Mutex::new(inner),
            cache: None,
            journal: Mutex::new(journal),
            index: Mutex::new(Some(index)),
            state_file: Mutex::new(()),
            progress: watch::Sender::new(()),
            lock_file: Mutex::new(Some(lock)),
        })
    }
}

fn check_disks(layout: &Layout, entries: &Entries) -> Result<(), OpenError> {
    match entries.highest_disk() {
        Some(disk) if usize::from(disk) >= layout.disks.len() => {
            Err(damaged(&layout.meta_file(layout::INDEX), format!("it names disk {disk}, which does not exist")))
        }
        _ => Ok(()),
    }
}

/// What the journal says of staged contents.
struct Installs {
    /// For every object, the last one that was put in place before the crash: counted from the tail. What the journal says
    /// about the object before that must not touch its file again.
    in_place: BTreeMap<u64, u64>,
    /// Files that the replay puts in place.
    staged: BTreeSet<PathBuf>,
    /// How the journal ends.
    how: End,
}

/// A replay's errors; `From` is what the journal's scan asks for.
struct ReplayError(OpenError);

impl From<io::Error> for ReplayError {
    fn from(source: io::Error) -> ReplayError {
        ReplayError(OpenError::Io { path: PathBuf::from(layout::JOURNAL), doing: "read", source })
    }
}

impl Shared {
    /// Replays the journal, checkpoints, removes leftovers.
    fn recover(&self, files: &dyn Files, report: &mut OpenReport) -> Result<(), OpenError> {
        let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
        let Installs { in_place, staged, how } = self.find_installed(files, &journal)?;
        if let End::Rotten { sequence } = how {
            let what =
                format!("commit {sequence} is damaged although later ones are whole: acknowledged writes are lost");
            return Err(damaged(&self.layout.journal(), what));
        }
        // First of all: a disk that they filled has no room for a replay.
        report.removed_files += self.remove_half_made(files, &staged)?;
        let end = self.replay(files, &journal, &in_place, report)?;
        report.cut_tail = how == End::Torn;
        if report.cut_tail {
            marks::hit(Mark::JournalTailCut);
        }
        let unlinked = {
            let mut inner = self.lock();
            inner.head = end;
            inner.applied_tail = end;
            inner.applied_tail != inner.checkpoint_tail || !inner.doomed.is_empty()
        };
        if unlinked {
            self.checkpoint_now(files)?;
            loop {
                let next = self.lock().next_unlink();
                let Some((oid, disk)) = next else { break };
                self.unlink(files, oid, disk);
                report.removed_files += 1;
            }
        }
        report.removed_files += self.remove_half_made(files, &BTreeSet::new())?;
        if journal.ring_bytes() != self.config.journal_bytes / 4096 * 4096 {
            // Nothing is left to replay: an empty journal of the wanted size takes its place.
            let path = self.layout.journal();
            let made = Journal::create(files, &path, self.node.0, self.config.journal_bytes);
            at(&path, "make the journal", made)?;
            match at(&path, "open", Journal::open(files, &path, self.node.0, self.config.sync))? {
                Opened::Journal(opened) => *journal = opened,
                _ => return Err(damaged(&path, "the journal just made does not read back")),
            }
            self.lock().ring_bytes = journal.ring_bytes();
        }
        Ok(())
    }

    /// Looks through the journal for staged contents.
    fn find_installed(&self, files: &dyn Files, journal: &Journal) -> Result<Installs, OpenError> {
        let tail = self.lock().checkpoint_tail;
        let mut in_place = BTreeMap::new();
        let mut waiting = BTreeSet::new();
        let mut count = 0;
        let scanned = journal.scan::<ReplayError>(tail, |position, records| {
            for record in records.iter().skip(position.skip as usize) {
                if record.kind == Kind::Install && usize::from(record.disk) < self.layout.disks.len() {
                    let staged = self.layout.object_incoming(record.disk, record.oid, record.extra);
                    if files.exists(&staged)? {
                        waiting.insert(staged);
                    } else {
                        in_place.insert(record.oid, count);
                    }
                }
                count += 1;
            }
            Ok(())
        });
        let (_, how) = scanned.map_err(|error| error.0)?;
        Ok(Installs { in_place, staged: waiting, how })
    }

    fn replay(
        &self,
        files: &dyn Files,
        journal: &Journal,
        installed: &BTreeMap<u64, u64>,
        report: &mut OpenReport,
    ) -> Result<Position, OpenError> {
        let tail = self.lock().checkpoint_tail;
        let mut count = 0;
        let scanned = journal.scan::<ReplayError>(tail, |position, records| {
            self.lock().applied_tail = position;
            for record in records.into_iter().skip(position.skip as usize) {
                let in_place = installed.get(&record.oid).is_some_and(|last| count <= *last);
                self.replay_record(files, record, in_place).map_err(ReplayError)?;
                count += 1;
            }
            Ok(())
        });
        report.replayed_records = count;
        scanned.map(|(end, _)| end).map_err(|error| error.0)
    }

    fn replay_record(&self, files: &dyn Files, record: Record, in_place: bool) -> Result<(), OpenError> {
        if !self.is_sane(&record) {
            return Err(damaged(&self.layout.journal(), "a record makes no sense, although its checksum matches"));
        }
        if self.lock().is_pinned(&record) {
            self.checkpoint_now(files)?;
        }
        let (before, number) = {
            let inner = self.lock();
            (inner.entries.get(record.oid), inner.submitted + 1)
        };
        let known = record.kind != Kind::Overwrite || before.is_some();
        let path = self.layout.object(record.disk, record.oid);
        if known && !in_place {
            at(&path, "replay the journal", self.apply_record(files, &record, Base::Replayed))?;
        } else if in_place && record.kind == Kind::Install {
            at(&path, "replay the journal", self.check_installed(files, &record))?;
        }
        let mut inner = self.lock();
        let result = record.outcome(before);
        if record.kind == Kind::Clean {
            inner.epochs = Epochs::from_bits(record.extra);
        } else {
            inner.entries.set(record.oid, result);
        }
        inner.submitted = number;
        inner.wanted = number;
        inner.durable = number;
        inner.space.in_flight_bytes += footprint_bytes(&record);
        let queued = Queued { number, record, cost: 0, result };
        inner.applied(Committed { queued, batch_end: None });
        Ok(())
    }

    fn is_sane(&self, record: &Record) -> bool {
        let disks = self.layout.disks.len();
        if usize::from(record.disk) >= disks || usize::from(record.source_disk) >= disks {
            return false;
        }
        let size_known = record.size_bytes > 0 && record.size_bytes <= OBJECT_BYTES_MAX;
        let end = record.offset.checked_add(record.data.len() as u64);
        !record.kind.changes_content() || (size_known && end.is_some_and(|end| end <= record.size_bytes))
    }

    /// A checkpoint while nothing else runs.
    fn checkpoint_now(&self, files: &dyn Files) -> Result<(), OpenError> {
        let mut checkpoint = self.lock().capture();
        let performed = self.perform(files, &mut checkpoint);
        performed.map_err(|what| OpenError::Io {
            path: self.layout.meta.clone(),
            doing: "checkpoint",
            source: io::Error::other(what),
        })?;
        self.lock().finish(checkpoint);
        Ok(())
    }

    /// Empties the directories of half-made files but for what a replay needs.
    fn remove_half_made(&self, files: &dyn Files, needed: &BTreeSet<PathBuf>) -> Result<u64, OpenError> {
        let mut count = 0;
        for disk in 0..self.layout.disks.len() {
            let dir = self.layout.making(disk as u8);
            let before = count;
            for entry in at(&dir, "list", files.read_dir(&dir))? {
                let path = dir.join(&entry.name);
                if !entry.is_dir && !needed.contains(&path) {
                    at(&path, "remove", files.remove_file(&path))?;
                    count += 1;
                }
            }
            if self.config.sync && count > before {
                // Some file systems give the space back only then.
                at(&dir, "flush the directory", files.sync_dir(&dir))?;
            }
        }
        let small = [layout::SUPERBLOCK, layout::CLUSTER].map(|name| self.layout.meta_file(name));
        for path in small.into_iter().chain([self.layout.journal()]) {
            let next = layout::next_of(&path);
            if at(&next, "look at", files.exists(&next))? {
                at(&next, "remove", files.remove_file(&next))?;
                count += 1;
            }
        }
        Ok(count)
    }
}
