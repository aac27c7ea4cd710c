//! Floor 3, one half: objects on this node's disks.
//!
//! A [`Store`] keeps objects (up to 2 GiB, usually 4 MiB, each under a 64-bit id and a version) as files, and every
//! change of them first in a journal. Writes are ordered by the order of [`Store::submit`] calls; one device flush
//! commits all that are waiting; each is applied to its object's file only after that. Reads see every submitted
//! write and verify the checksum of every 4 KiB block they touch. DISK.md describes the bytes and every state a crash
//! can leave. The store knows nothing of epochs' meaning, placement, or clients: it keeps what it is told.
//!
//! Always holds:
//! 1. After a crash the store holds a prefix of what was submitted, in order, and that prefix contains everything
//!    whose durable [`Ticket`] or [`Store::flush`] completed.
//! 2. A read gives bytes that were written, or an error; never bytes whose checksum does not match.
//! 3. A write whose stamp is not above the object's is a repeat and changes no byte.
//! 4. No async task waits for the disk inside a poll, and no lock is held across disk I/O except between disk threads.
//! 5. A device error of journal or index stops all changes ([`StoreError::Failed`]); nothing is acknowledged after it.
//!
//! | file | holds |
//! |---|---|
//! | `open` | making and opening a store, replay |
//! | `submit`, `commit`, `apply`, `checkpoint` | the way of a write, in this order; `state` is what they share, `ticket` the news of its end |
//! | `read`, `handles`, `cache` | the way of a read |
//! | `stage` | whole objects from recovery |
//! | `journal`, `record`, `object_file`, `index`, `superblock`, `sealed`, `layout` | bytes on disk |

mod apply;
mod cache;
mod checkpoint;
mod checksum;
mod commit;
mod entries;
mod epochs;
mod fields;
mod handles;
mod index;
mod journal;
mod layout;
mod object_file;
mod open;
mod read;
mod record;
mod sealed;
mod stage;
mod state;
mod submit;
mod superblock;
mod ticket;

use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use qemu_proto::oid::Oid;
use sheep_core::member::NodeId;
use sheep_core::stamp::Epoch;

pub use cache::{CacheConfig, CacheFigures};
pub use checksum::{BLOCK_BYTES, block_tag};
pub use entries::Entry;
pub use journal::JOURNAL_BYTES_MIN;
pub use object_file::OBJECT_BYTES_MAX;
pub use stage::Staged;
pub use state::Permit;
pub use submit::{Durability, Write, WriteKind};
pub use ticket::Ticket;

use crate::world::disk;
use state::Shared;

/// Default size of the journal: absorbs bursts of some tenths of a second at the speed of a fast disk, replays in less
/// than a second.
pub const JOURNAL_BYTES_DEFAULT: u64 = 128 << 20;

/// Where a store is and how it behaves.
#[derive(Clone, Debug)]
pub struct StoreConfig {
    /// Directory of the index, the superblock and, unless given otherwise, everything else.
    pub meta: PathBuf,
    /// Directories of the objects; empty means META itself.
    pub disks: Vec<PathBuf>,
    /// Size of the journal; at least [`JOURNAL_BYTES_MIN`]. An existing journal is remade when it differs.
    pub journal_bytes: u64,
    /// Directory of the journal if not META.
    pub journal_dir: Option<PathBuf>,
    /// A cache on a faster device than the disks.
    pub cache: Option<CacheConfig>,
    /// Whether the device is flushed; false trusts that power never fails.
    pub sync: bool,
    /// Space that writes leave free, for recovery.
    pub reserve_bytes: u64,
}

impl StoreConfig {
    /// Everything in one directory, with the defaults.
    pub fn new(meta: impl Into<PathBuf>) -> StoreConfig {
        StoreConfig {
            meta: meta.into(),
            disks: Vec::new(),
            journal_bytes: JOURNAL_BYTES_DEFAULT,
            journal_dir: None,
            cache: None,
            sync: true,
            reserve_bytes: 0,
        }
    }
}

/// What opening found and did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct OpenReport {
    /// The store was made just now.
    pub created: bool,
    /// Records read from the journal and applied again.
    pub replayed_records: u64,
    /// A commit that had not completed was cut off the journal's end.
    pub cut_tail: bool,
    /// Unfinished and forgotten files that were removed.
    pub removed_files: u64,
}

/// Space of the store's disks.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct StoreSpace {
    /// Of all disks.
    pub total_bytes: u64,
    /// Of all disks, for this user, the reserve included.
    pub free_bytes: u64,
    /// Taken by objects, as of the last checkpoint.
    pub used_bytes: u64,
}

/// One directory that objects are in.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskSpace {
    /// Where.
    pub path: PathBuf,
    /// For this user, the reserve included.
    pub free_bytes: u64,
    /// Taken by objects, as of the last checkpoint.
    pub used_bytes: u64,
}

/// Why a store could not be opened. Every text says what, where, and what to do next.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process has it.
    #[error("{}: another sheep daemon is using this directory; stop it first, or give this one another directory", .path.display())]
    InUse {
        /// META.
        path: PathBuf,
    },
    /// Files of somebody else.
    #[error("{}: not a store, and not empty: it contains `{found}`; give an empty or a new directory", .path.display())]
    NotEmpty {
        /// The directory.
        path: PathBuf,
        /// One of the names in it.
        found: String,
    },
    /// Content that is not what was written.
    #[error("{}: {what}; put it back from a copy, or empty the store's directories and start again: the cluster then fills them anew", .path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// Made by a later version.
    #[error("{}: made by a later version (format {found}, this sheep knows up to {known}); use that version", .path.display())]
    Format {
        /// The file.
        path: PathBuf,
        /// Its format.
        found: u32,
        /// The newest known.
        known: u32,
    },
    /// A disk of the store is not among the directories given.
    #[error("{}: disk {index} of this store was not given; give all directories it was used with, or empty all of them and start again", .path.display())]
    DiskMissing {
        /// META.
        path: PathBuf,
        /// The disk's index.
        index: u32,
    },
    /// A disk or journal of another store.
    #[error("{}: belongs to another store (node {owner}); give the right directory, or empty it", .path.display())]
    Foreign {
        /// The directory or file.
        path: PathBuf,
        /// Whose it is; empty if unknown.
        owner: String,
    },
    /// The journal is not where it was.
    #[error("{}: the journal of this store is not there; start with the journal directory it was used with", .path.display())]
    JournalMissing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A setting that cannot work.
    #[error("{what}")]
    Setting {
        /// Which, and why.
        what: String,
    },
    /// The operating system refused.
    #[error("{}: {doing}: {source}{}", .path.display(), hint(.source))]
    Io {
        /// The file or directory.
        path: PathBuf,
        /// What was being done.
        doing: &'static str,
        /// What it said.
        source: io::Error,
    },
}

/// What an operator can do about an I/O error.
fn hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::StorageFull => "; free some space on that disk and start again",
        io::ErrorKind::ReadOnlyFilesystem => "; remount the file system writable, or replace the disk if it failed",
        io::ErrorKind::PermissionDenied => "; make the directory writable for the user that sheep runs as",
        io::ErrorKind::NotFound => "; check the path",
        _ => "",
    }
}

/// Why a submitted change, or a flush, did not become durable.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum StoreError {
    /// A device failed; the store takes no changes any more. Restart the node when the device is repaired.
    #[error("{what}")]
    Failed {
        /// Where and how.
        what: Arc<str>,
    },
    /// [`Store::close`] was called.
    #[error("the store is closed")]
    Closed,
    /// The local copy got a newer version in the meantime; ask again which is the newest.
    #[error("the local copy is newer")]
    Superseded,
    /// The object is not here.
    #[error("the object is not here")]
    Missing,
    /// The range is not inside the object, or the size is none an object can have.
    #[error("the range is not inside the object")]
    OutOfRange,
    /// The disk is full.
    #[error("no space left on the disk")]
    NoSpace,
}

/// Why a write was refused.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum SubmitError {
    /// The object, or the source of the copy, is not here.
    #[error("the object is not here")]
    Missing,
    /// The range is not inside the object, or the size is none an object can have.
    #[error("the range is not inside the object")]
    OutOfRange,
    /// The write would use up the reserve.
    #[error("no space left on the disk")]
    NoSpace,
    /// Larger than what the journal takes at once; cut it in pieces.
    #[error("larger than the journal takes at once ({bytes_max} bytes)")]
    TooLarge {
        /// The most it takes.
        bytes_max: u64,
    },
    /// The store takes no changes.
    #[error(transparent)]
    Stopped(StoreError),
}

/// Why a read gave no bytes.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadError {
    /// The object is not here.
    #[error("the object is not here")]
    Missing,
    /// The range is not inside the object.
    #[error("the range is not inside the object")]
    OutOfRange,
    /// The local copy is damaged: read another copy, then [`Store::discard_corrupt`] and recover this one.
    #[error("the local copy is damaged")]
    Corrupt {
        /// The first damaged block of the content; `None` if the file as a whole is missing or damaged.
        block: Option<u64>,
    },
    /// The device failed: read another copy.
    #[error("{what}")]
    Io {
        /// Where and how.
        what: Arc<str>,
    },
}

/// A store. Cloning it is cheap; all clones are one store.
#[derive(Clone)]
pub struct Store {
    shared: Arc<Shared>,
}

impl Store {
    /// The node's identity, drawn when the store was made.
    pub fn node_id(&self) -> NodeId {
        self.shared.node
    }

    /// What opening found and did.
    pub fn report(&self) -> OpenReport {
        self.shared.report
    }

    /// An object as of the last submitted change.
    pub fn entry(&self, oid: Oid) -> Option<Entry> {
        self.shared.lock().entries.get(oid.raw()).map(entries::Packed::entry)
    }

    /// At most `max` objects in ascending order of id, after a given one.
    pub fn entries(&self, after: Option<Oid>, max: usize) -> Vec<(Oid, Entry)> {
        self.shared.lock().entries.page(after, max)
    }

    /// How many objects there are.
    pub fn object_count(&self) -> usize {
        self.shared.lock().entries.count()
    }

    /// Disk space that objects take, in bytes, as of the last checkpoint or [`Store::measure`].
    pub fn used_bytes(&self) -> u64 {
        self.shared.lock().entries.allocated_bytes()
    }

    /// Space of the disks; refreshed by writes about once a second, and at checkpoints.
    pub fn space(&self) -> StoreSpace {
        let inner = self.shared.lock();
        StoreSpace {
            total_bytes: inner.space.total_bytes(),
            free_bytes: inner.space.free_bytes(),
            used_bytes: inner.entries.allocated_bytes(),
        }
    }

    /// Space of each disk. Looks at every object: for people's questions.
    pub fn disks(&self) -> Vec<DiskSpace> {
        let layout = &self.shared.layout;
        let inner = self.shared.lock();
        let used = inner.entries.allocated_by_disk(layout.disks.len());
        let disks = layout.disks.iter().zip(&inner.space.disks).zip(used).zip(0..);
        let is_meta = |disk: &PathBuf| *disk == layout.meta;
        disks
            .map(|(((disk, space), used_bytes), index)| DiskSpace {
                path: if is_meta(disk) { layout.objects(index) } else { disk.clone() },
                free_bytes: space.free_bytes,
                used_bytes,
            })
            .collect()
    }

    /// What the cache did; `None` if there is none.
    pub fn cache(&self) -> Option<CacheFigures> {
        let config = self.shared.config.cache.as_ref()?;
        let none = CacheFigures { size_bytes: config.size_bytes, failed: true, ..CacheFigures::default() };
        Some(self.shared.cache().map_or(none, cache::Cache::figures))
    }

    /// Why there is no cache although there was to be one.
    pub fn cache_trouble(&self) -> Option<&str> {
        self.shared.cache.as_ref()?.as_ref().err().map(String::as_str)
    }

    /// The last epoch that [`Store::set_clean_through`] set; 0 at first.
    pub fn clean_through(&self) -> Epoch {
        self.shared.lock().epochs.clean_through
    }

    /// The last epoch that [`Store::note_meeting`] was given; none if an earlier version, which did not say, may have had a later
    /// one.
    pub fn met_through(&self) -> Option<Epoch> {
        self.shared.lock().epochs.met_through
    }

    /// The state that the floors above saved, or `None` if they never did.
    pub async fn load_state(&self) -> Result<Option<Vec<u8>>, OpenError> {
        let path = self.shared.layout.meta_file(layout::CLUSTER);
        disk::run(&self.shared.world.disk, move |files| {
            let found = sealed::read(files, &path, CLUSTER_MAGIC).map_err(|source| OpenError::Io {
                path: path.clone(),
                doing: "read",
                source,
            })?;
            match found {
                sealed::Found::Nothing => Ok(None),
                sealed::Found::Payload(_, payload) => Ok(Some(payload)),
                sealed::Found::Damaged(what) => Err(OpenError::Damaged { path, what: what.to_string() }),
            }
        })
        .await
    }

    /// Replaces the state of the floors above; durable when it returns. A crash leaves the old one or the new one.
    pub async fn save_state(&self, state: Vec<u8>) -> Result<(), StoreError> {
        let shared = self.shared.clone();
        disk::run(&self.shared.world.disk, move |files| {
            let _one_at_a_time = shared.state_file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            let path = shared.layout.meta_file(layout::CLUSTER);
            sealed::write(files, &path, CLUSTER_MAGIC, superblock::FORMAT, &state).map_err(|error| {
                let what = format!("{}: write: {error}{}", path.display(), hint(&error));
                StoreError::Failed { what: what.into() }
            })
        })
        .await
    }
}

const CLUSTER_MAGIC: [u8; 8] = *b"SHEEPCLU";
