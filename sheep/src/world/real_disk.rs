//! The machine's files and a fixed set of threads that block on them.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::unix::fs::{DirBuilderExt, FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::Thread;

use rustix::fs::{FallocateFlags, FlockOperation};
use rustix::io::{Errno, ReadWriteFlags};

use super::disk::{DirEntry, Disk, File, FileLock, Files, Job, OpenMode, Space};

/// Files of a store are for its owner and group only (cli.md: directories 0750, files 0640).
const FILE_MODE: u32 = 0o640;
/// Of files that hold secrets.
const PRIVATE_FILE_MODE: u32 = 0o600;
const DIR_MODE: u32 = 0o750;

/// Bytes moved per copy_file_range(2) call or buffer: large enough that the call does not show, small enough that a
/// copy can be interrupted.
const COPY_BYTES: usize = 1 << 20;

/// Most bytes of one write through the page cache. The kernel keeps what one call writes in folios up to that size, and on
/// ext4 (since Linux 6.16) every later write into a folio walks the list of all its blocks: after writes of 4 MiB a third of all
/// CPU time went into that.
const FOLIO_BYTES_MAX: usize = 32 << 10;

/// Threads and their queue. The thread that fell idle last is the first to be woken: its stack and the code are still in the
/// caches, and threads that are not needed sleep on.
pub struct RealDisk {
    queue: Arc<Mutex<Queue>>,
    files: Arc<RealFiles>,
}

#[derive(Default)]
struct Queue {
    jobs: VecDeque<Job>,
    /// Threads without a job, the last to fall idle at the end.
    idle: Vec<Thread>,
}

fn locked(queue: &Mutex<Queue>) -> MutexGuard<'_, Queue> {
    queue.lock().unwrap_or_else(PoisonError::into_inner)
}

impl RealDisk {
    /// Starts the threads. They end with the process.
    pub fn start(threads: usize) -> io::Result<RealDisk> {
        assert!(threads > 0, "at least one thread must serve the disk");
        let queue = Arc::new(Mutex::new(Queue::default()));
        let files = Arc::new(RealFiles);
        for index in 0..threads {
            let queue = queue.clone();
            let files = files.clone();
            std::thread::Builder::new().name(format!("disk-{index}")).spawn(move || serve(&queue, &files))?;
        }
        Ok(RealDisk { queue, files })
    }
}

fn serve(queue: &Mutex<Queue>, files: &RealFiles) {
    let this = std::thread::current();
    loop {
        let mut locked = locked(queue);
        // Still there if parking ended for no reason.
        locked.idle.retain(|thread| thread.id() != this.id());
        let Some(job) = locked.jobs.pop_front() else {
            locked.idle.push(this.clone());
            drop(locked);
            std::thread::park();
            continue;
        };
        drop(locked);
        job(files);
    }
}

impl Disk for RealDisk {
    fn spawn(&self, job: Job) {
        let mut locked = locked(&self.queue);
        locked.jobs.push_back(job);
        let idle = locked.idle.pop();
        drop(locked);
        if let Some(idle) = idle {
            idle.unpark();
        }
    }

    fn files(&self) -> Arc<dyn Files> {
        self.files.clone()
    }
}

/// The machine's directory tree.
pub struct RealFiles;

struct RealFile {
    file: fs::File,
    /// Most bytes per call that writes.
    write_bytes_max: usize,
}

struct RealLock {
    _file: fs::File,
}

impl FileLock for RealLock {}

impl Files for RealFiles {
    fn open(&self, path: &Path, mode: OpenMode) -> io::Result<Arc<dyn File>> {
        let mut options = fs::OpenOptions::new();
        options.read(true).mode(FILE_MODE).write(mode != OpenMode::Read);
        match mode {
            OpenMode::Read | OpenMode::Write => {}
            OpenMode::Create | OpenMode::Direct => {
                options.create(true);
            }
            OpenMode::Truncate => {
                options.create(true).truncate(true);
            }
            OpenMode::Private => {
                options.create(true).truncate(true).mode(PRIVATE_FILE_MODE);
            }
        }
        if mode == OpenMode::Direct {
            let direct = options.clone().custom_flags(rustix::fs::OFlags::DIRECT.bits() as i32).open(path);
            match direct {
                // A file system without O_DIRECT (tmpfs of older kernels) says EINVAL: the page cache serves as well.
                Err(error) if error.raw_os_error() == Some(Errno::INVAL.raw_os_error()) => {}
                other => return Ok(Arc::new(RealFile { file: other?, write_bytes_max: usize::MAX })),
            }
        }
        Ok(Arc::new(RealFile { file: options.open(path)?, write_bytes_max: FOLIO_BYTES_MAX }))
    }

    fn create_dir(&self, path: &Path) -> io::Result<()> {
        fs::DirBuilder::new().recursive(true).mode(DIR_MODE).create(path)
    }

    fn remove_file(&self, path: &Path) -> io::Result<()> {
        fs::remove_file(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        fs::rename(from, to)
    }

    fn copy(&self, from: &Path, to: &Path) -> io::Result<()> {
        copy_file(from, to)
    }

    fn sync_dir(&self, path: &Path) -> io::Result<()> {
        fs::File::open(path)?.sync_all()
    }

    fn sync_filesystem(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::syncfs(fs::File::open(path)?)?)
    }

    fn read_dir(&self, path: &Path) -> io::Result<Vec<DirEntry>> {
        let mut entries = Vec::new();
        for entry in fs::read_dir(path)? {
            let entry = entry?;
            // A name that is not text was not made by us.
            if let Ok(name) = entry.file_name().into_string() {
                entries.push(DirEntry { name, is_dir: entry.file_type()?.is_dir() });
            }
        }
        Ok(entries)
    }

    fn exists(&self, path: &Path) -> io::Result<bool> {
        path.try_exists()
    }

    fn space(&self, path: &Path) -> io::Result<Space> {
        let stat = rustix::fs::statvfs(path)?;
        Ok(Space { total_bytes: stat.f_blocks * stat.f_frsize, free_bytes: stat.f_bavail * stat.f_frsize })
    }

    fn try_lock(&self, path: &Path) -> io::Result<Option<Box<dyn FileLock>>> {
        let file = open_lock(path)?;
        match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => Ok(Some(Box::new(RealLock { _file: file }))),
            Err(Errno::WOULDBLOCK) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn lock(&self, path: &Path) -> io::Result<Box<dyn FileLock>> {
        let file = open_lock(path)?;
        rustix::io::retry_on_intr(|| rustix::fs::flock(&file, FlockOperation::LockExclusive))?;
        Ok(Box::new(RealLock { _file: file }))
    }
}

fn open_lock(path: &Path) -> io::Result<fs::File> {
    fs::OpenOptions::new().read(true).write(true).create(true).truncate(false).mode(FILE_MODE).open(path)
}

/// Copies data extents only, so that holes stay holes: lseek(2) SEEK_DATA and SEEK_HOLE, copy_file_range(2), which
/// shares blocks on file systems that can.
fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let source = fs::File::open(from)?;
    let target = fs::OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(FILE_MODE).open(to)?;
    let length = source.metadata()?.len();
    target.set_len(length)?;
    let mut position = 0;
    while position < length {
        let start = match rustix::fs::seek(&source, rustix::fs::SeekFrom::Data(position)) {
            Ok(start) => start,
            // No data after this position: the rest is a hole.
            Err(Errno::NXIO) => break,
            Err(error) => return Err(error.into()),
        };
        let end = rustix::fs::seek(&source, rustix::fs::SeekFrom::Hole(start))?.min(length);
        copy_extent(&source, &target, start, end)?;
        position = end;
    }
    Ok(())
}

fn copy_extent(source: &fs::File, target: &fs::File, start: u64, end: u64) -> io::Result<()> {
    let (mut read_offset, mut write_offset) = (start, start);
    while read_offset < end {
        let want = ((end - read_offset) as usize).min(COPY_BYTES);
        match rustix::fs::copy_file_range(source, Some(&mut read_offset), target, Some(&mut write_offset), want) {
            Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok(_) => {}
            Err(Errno::INTR) => {}
            Err(Errno::XDEV | Errno::NOSYS | Errno::OPNOTSUPP | Errno::INVAL) => {
                let mut buffer = vec![0; want];
                source.read_exact_at(&mut buffer, read_offset)?;
                target.write_all_at(&buffer, write_offset)?;
                read_offset += want as u64;
                write_offset += want as u64;
            }
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

impl File for RealFile {
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut done = 0;
        while done < buffer.len() {
            match self.file.read_at(&mut buffer[done..], offset + done as u64) {
                Ok(0) => break,
                Ok(count) => done += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(done)
    }

    fn read_cached(&self, buffer: &mut [u8], offset: u64) -> io::Result<Option<usize>> {
        let length = buffer.len();
        let mut slices = [io::IoSliceMut::new(buffer)];
        match rustix::io::preadv2(&self.file, &mut slices, offset, ReadWriteFlags::NOWAIT) {
            Ok(count) if count == length => Ok(Some(count)),
            // A short count is either the end of the file or the start of something not cached: let a thread find out.
            Ok(_) | Err(Errno::AGAIN | Errno::OPNOTSUPP | Errno::INTR) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    fn write_at(&self, buffers: &[io::IoSlice<'_>], offset: u64) -> io::Result<()> {
        let total: usize = buffers.iter().map(|buffer| buffer.len()).sum();
        let mut done = 0;
        while done < total {
            let at = offset + done as u64;
            let to_boundary = self.write_bytes_max - (at % self.write_bytes_max as u64) as usize;
            let rest = within(buffers, done, to_boundary);
            match rustix::io::pwritev(&self.file, &rest, at) {
                Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn sync_data(&self) -> io::Result<()> {
        self.file.sync_data()
    }

    fn set_len(&self, length_bytes: u64) -> io::Result<()> {
        self.file.set_len(length_bytes)
    }

    fn len(&self) -> io::Result<u64> {
        Ok(self.file.metadata()?.len())
    }

    fn punch_hole(&self, offset: u64, length_bytes: u64) -> io::Result<()> {
        Ok(rustix::fs::fallocate(
            &self.file,
            FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE,
            offset,
            length_bytes,
        )?)
    }

    fn allocated_bytes(&self) -> io::Result<u64> {
        // st_blocks counts 512-byte units whatever the block size is: stat(2).
        Ok(self.file.metadata()?.blocks() * 512)
    }
}

/// The slices of at most `bytes_max` bytes after `done` bytes, and at most as many as pwritev(2) takes in one call (IOV_MAX).
fn within<'a>(buffers: &'a [io::IoSlice<'a>], done: usize, bytes_max: usize) -> Vec<io::IoSlice<'a>> {
    let (mut skip, mut left) = (done, bytes_max);
    let mut rest = Vec::with_capacity(buffers.len().min(1024));
    for buffer in buffers {
        if skip >= buffer.len() {
            skip -= buffer.len();
            continue;
        }
        let length = (buffer.len() - skip).min(left);
        rest.push(io::IoSlice::new(&buffer[skip..skip + length]));
        skip = 0;
        left -= length;
        if left == 0 || rest.len() == 1024 {
            break;
        }
    }
    rest
}
