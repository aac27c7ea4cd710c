//! The least that a replicated durable write can do, and nothing else: three threads with a file each, preallocated, of which two
//! are reached over loopback sockets. A round appends what is under way to all three files in parallel, one write and one
//! `fdatasync` each (O_DIRECT where the file system has it, as the journal of the store does), and ends when all have answered.
//!
//! With more than one request under way a round takes all of them together: group commit as good as it can be. An append has one
//! block more than its payload, where a journal keeps what the bytes are and their checksums.

use std::fs::File;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::thread::JoinHandle;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::fs::{Mode, OFlags};

use super::load::{Disk, Load, Samples};

const BLOCK_BYTES: usize = 4096;
/// As the journal of the nodes beside it.
const FILE_BYTES: u64 = crate::spawn::JOURNAL_BYTES;
/// What is sent before the bytes: how many they are.
const HEADER_BYTES: usize = 8;

/// A file that is written from its beginning to its end, again and again.
struct Ring {
    file: File,
    at: u64,
    memory: Vec<u8>,
}

impl Ring {
    fn create(path: &Path) -> Result<Ring> {
        let flags = OFlags::CREATE | OFlags::RDWR | OFlags::CLOEXEC;
        let mode = Mode::RUSR | Mode::WUSR;
        let opened =
            rustix::fs::open(path, flags | OFlags::DIRECT, mode).or_else(|_| rustix::fs::open(path, flags, mode));
        let mut ring = Ring { file: File::from(opened?), at: 0, memory: Vec::new() };
        let (range, zeros) = (aligned(&mut ring.memory, 1 << 20), 0..FILE_BYTES >> 20);
        for piece in zeros {
            ring.file.write_all_at(&ring.memory[range.clone()], piece << 20)?;
        }
        ring.file.sync_all()?;
        Ok(ring)
    }

    /// Where the payload of an append of so many bytes goes, in `memory`.
    fn place(&mut self, bytes: usize) -> std::ops::Range<usize> {
        let whole = aligned(&mut self.memory, BLOCK_BYTES + bytes);
        whole.start + BLOCK_BYTES..whole.end
    }

    /// Appends what was put into a place, and a block before it.
    fn append(&mut self, place: &std::ops::Range<usize>) -> Result<()> {
        let batch = &self.memory[place.start - BLOCK_BYTES..place.end];
        if self.at + batch.len() as u64 > FILE_BYTES {
            self.at = 0;
        }
        self.file.write_all_at(batch, self.at)?;
        rustix::fs::fdatasync(&self.file)?;
        self.at += batch.len() as u64;
        Ok(())
    }
}

/// A range of so many bytes in `memory`, whole blocks at a block's boundary.
fn aligned(memory: &mut Vec<u8>, bytes: usize) -> std::ops::Range<usize> {
    let bytes = bytes.next_multiple_of(BLOCK_BYTES);
    if memory.len() < bytes + BLOCK_BYTES {
        memory.resize(bytes + BLOCK_BYTES, 0);
    }
    let start = memory.as_ptr().align_offset(BLOCK_BYTES);
    start..start + bytes
}

/// Appends whatever comes over a connection, and answers each with one byte, until it ends.
fn serve(mut connection: TcpStream, mut ring: Ring) -> Result<()> {
    let mut header = [0; HEADER_BYTES];
    while connection.read_exact(&mut header).is_ok() {
        let place = ring.place(u64::from_le_bytes(header) as usize);
        connection.read_exact(&mut ring.memory[place.clone()])?;
        ring.append(&place)?;
        connection.write_all(&[1])?;
    }
    Ok(())
}

/// See the module.
pub struct LoopReference {
    own: Ring,
    others: Vec<TcpStream>,
    threads: Vec<JoinHandle<Result<()>>>,
}

impl LoopReference {
    /// Makes its files in a directory.
    pub fn start(directory: &Path) -> Result<LoopReference> {
        let (mut others, mut threads) = (Vec::new(), Vec::new());
        for number in 1..3 {
            let listener = TcpListener::bind(("127.0.0.1", 0))?;
            let near = TcpStream::connect(listener.local_addr()?)?;
            let (far, _) = listener.accept()?;
            near.set_nodelay(true)?;
            far.set_nodelay(true)?;
            let ring = Ring::create(&directory.join(format!("loop{number}")))?;
            threads.push(std::thread::spawn(move || serve(far, ring)));
            others.push(near);
        }
        Ok(LoopReference { own: Ring::create(&directory.join("loop0"))?, others, threads })
    }

    fn round(&mut self, message: &[u8]) -> Result<()> {
        for other in &mut self.others {
            other.write_all(message)?;
        }
        let place = self.own.place(message.len() - HEADER_BYTES);
        self.own.memory[place.start..place.start + message.len() - HEADER_BYTES]
            .copy_from_slice(&message[HEADER_BYTES..]);
        self.own.append(&place)?;
        for other in &mut self.others {
            other.read_exact(&mut [0]).context("a thread of the bare loop ended")?;
        }
        Ok(())
    }
}

impl Disk for LoopReference {
    fn run(&mut self, load: &Load) -> Result<Samples> {
        let bytes = load.payload.len() * load.pattern.depth;
        let mut message = (bytes as u64).to_le_bytes().to_vec();
        message.extend(load.payload.iter().copied().cycle().take(bytes));
        let mut latencies = Vec::with_capacity(load.operations.len());
        let began = Instant::now();
        while latencies.len() < load.operations.len() && began.elapsed() < load.time_max {
            let sent = Instant::now();
            self.round(&message)?;
            latencies.extend(std::iter::repeat_n(sent.elapsed(), load.pattern.depth));
        }
        Ok(Samples { elapsed: began.elapsed(), latencies })
    }
}

impl Drop for LoopReference {
    fn drop(&mut self) {
        self.others.clear();
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}
