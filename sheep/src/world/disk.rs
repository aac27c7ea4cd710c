//! Files, and the threads that may block on them.
//!
//! [`Files`] and [`File`] are the blocking calls a store needs; they are called from closures given to
//! [`run`], never from an async task, with one exception that cannot block: [`File::read_cached`].
//! The simulator implements the same traits over memory, with torn, lost and rotten sectors.
//!
//! Durability is as POSIX gives it: written bytes survive a process crash at once, a power loss only after
//! [`File::sync_data`] (or [`Files::sync_filesystem`]); a created, renamed or removed name survives a power loss only
//! after [`Files::sync_dir`] of its directory.

use std::convert::Infallible;
use std::future::Future;
use std::io::{self, Write};
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;

use rustix::io::Errno;

/// How [`Files::open`] treats an existing or a missing file.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum OpenMode {
    /// Must exist; reading only.
    Read,
    /// Must exist; reading and writing.
    Write,
    /// Created if missing, kept if present; reading and writing.
    Create,
    /// Created if missing, emptied if present; reading and writing.
    Truncate,
    /// Like `Truncate`, but a file that is created can be read by its owner only (mode 0600): for secrets.
    Private,
    /// Like `Create`, with the page cache bypassed where the file system can: offsets, lengths and memory of every
    /// transfer must then be multiples of 4,096.
    Direct,
}

/// Size and free space of the file system that holds a directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    /// Bytes in all.
    pub total_bytes: u64,
    /// Bytes that this user may still take.
    pub free_bytes: u64,
}

/// One name in a directory.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DirEntry {
    /// The name, without its directory.
    pub name: String,
    /// Whether it is a directory itself.
    pub is_dir: bool,
}

/// An open file. Offsets are explicit; a handle has no position.
pub trait File: Send + Sync {
    /// Fills `buffer` from `offset`; returns fewer bytes only at the end of the file. Holes read as zeros.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize>;
    /// As `read_at`, but gives `None` instead of waiting for the device. May be called from an async task.
    fn read_cached(&self, buffer: &mut [u8], offset: u64) -> io::Result<Option<usize>>;
    /// Writes all of `buffers`, one after the other, from `offset`; the file grows as needed.
    fn write_at(&self, buffers: &[io::IoSlice<'_>], offset: u64) -> io::Result<()>;
    /// Makes everything written so far, and the length, durable: fdatasync(2).
    fn sync_data(&self) -> io::Result<()>;
    /// Cuts the file, or extends it with a hole.
    fn set_len(&self, length_bytes: u64) -> io::Result<()>;
    /// The length in bytes.
    fn len(&self) -> io::Result<u64>;
    /// Whether the file has no bytes at all.
    fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }
    /// Gives the space of a range back; it then reads as zeros.
    fn punch_hole(&self, offset: u64, length_bytes: u64) -> io::Result<()>;
    /// Bytes of disk space the file takes, holes not counted.
    fn allocated_bytes(&self) -> io::Result<u64>;
}

/// An exclusive lock on a file, held until dropped or until the process ends, however it ends: flock(2).
pub trait FileLock: Send + Sync {}

/// The directory tree.
pub trait Files: Send + Sync {
    /// Opens a file; see [`OpenMode`].
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>>;
    /// Makes a directory (mode 0750) and its missing parents; fine if it exists.
    fn create_dir(&self, path: &Path) -> io::Result<()>;
    /// Removes a file.
    fn remove_file(&self, path: &Path) -> io::Result<()>;
    /// Renames a file over whatever had the name.
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Copies a file, sharing blocks where the file system can, keeping holes; `to` is created or replaced.
    fn copy(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes created, renamed and removed names of a directory durable.
    fn sync_dir(&self, path: &Path) -> io::Result<()>;
    /// Makes everything written to the file system that holds `path` durable: syncfs(2).
    fn sync_filesystem(&self, path: &Path) -> io::Result<()>;
    /// The names in a directory, in no particular order.
    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>>;
    /// Whether something has this name.
    fn exists(&self, path: &Path) -> io::Result<bool>;
    /// Space of the file system that holds a directory.
    fn space(&self, path: &Path) -> io::Result<Space>;
    /// Takes the exclusive lock on a file (created if missing), or `None` at once if another holder has it.
    fn try_lock(&self, path: &Path) -> io::Result<Option<Box<dyn FileLock>>>;
    /// Waits for the exclusive lock. Only for locks that are held for milliseconds.
    fn lock(&self, path: &Path) -> io::Result<Box<dyn FileLock>>;
}

/// Whether a read failed because the medium does not give back what it was given, and will not: errno(3), EIO; and what ext4,
/// XFS and btrfs say of structures of their own that are damaged.
pub fn is_unreadable(error: &io::Error) -> bool {
    let code = error.raw_os_error().map(Errno::from_raw_os_error);
    matches!(code, Some(Errno::IO | Errno::BADMSG | Errno::UCLEAN | Errno::NODATA))
}

/// Makes a directory and its missing parents such that a power loss keeps them: also one that is there already, which a killed
/// process may have made just now. For directories inside of one that may be read.
pub fn make_dir(files: &dyn Files, dir: &Path) -> io::Result<()> {
    let mut parents: Vec<&Path> = dir.parent().into_iter().collect();
    while let Some(last) = parents.last().copied()
        && !last.as_os_str().is_empty()
        && !files.exists(last)?
    {
        parents.extend(last.parent());
    }
    files.create_dir(dir)?;
    let place = |parent: &Path| if parent.as_os_str().is_empty() { Path::new(".") } else { parent }.to_path_buf();
    parents.into_iter().try_for_each(|parent| files.sync_dir(&place(parent)))
}

/// A piece of blocking work.
pub type Job = Box<dyn FnOnce(&dyn Files) + Send>;

/// The disk door: where blocking work runs.
pub trait Disk: Send + Sync + 'static {
    /// Queues `job` for a thread that may block. Jobs start in the order they were queued but run side by side.
    fn spawn(&self, job: Job);
    /// The files themselves, for the few calls that cannot block and for code that already runs in a job.
    fn files(&self) -> Arc<dyn Files>;
    /// Ends this process at once, without letting anything finish: it cannot rely on its disk any more and must not answer
    /// anybody. The reason goes to standard error too: the log may lie on that disk. A simulated one only never goes on from here.
    fn end_process(&self, reason: &str) -> Pin<Box<dyn Future<Output = Infallible> + Send>> {
        // Nobody may be listening.
        let _ = writeln!(io::stderr(), "{reason}");
        std::process::exit(1)
    }
}

/// Runs `work` where it may block and gives its result back.
pub fn run<T, W>(disk: &Arc<dyn Disk>, work: W) -> Pin<Box<dyn Future<Output = T> + Send>>
where
    T: Send + 'static,
    W: FnOnce(&dyn Files) -> T + Send + 'static,
{
    let (sender, receiver) = tokio::sync::oneshot::channel();
    disk.spawn(Box::new(move |files| {
        // The receiver is gone when its task was cancelled; the work is done all the same.
        let _ = sender.send(work(files));
    }));
    Box::pin(async move {
        match receiver.await {
            Ok(value) => value,
            // A job is dropped unrun only when the process (or the simulated machine) is going down: nobody may
            // see an answer any more.
            Err(_) => std::future::pending().await,
        }
    })
}
