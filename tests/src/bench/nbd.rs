//! A volume through NBD, ours and the reference alike, by the same client: fixed newstyle, EXPORT_NAME, simple replies (the NBD
//! project's proto.md). Apart from [`crate::nbd_client`], which allocates for every answer.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use super::load::{Load, Pipe};
use super::patterns::Operation;

const REQUEST_MAGIC: u32 = 0x2560_9513;
const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;
const FUA: u16 = 1;
/// More than any request of a pattern.
const BUFFER_BYTES: usize = 2 << 20;

/// One connection.
pub struct Nbd {
    stream: UnixStream,
    message: Vec<u8>,
    buffer: Vec<u8>,
    /// Bytes that follow the answers under way, by tag.
    under_way: HashMap<u64, usize>,
}

impl Nbd {
    /// Connects to an export.
    pub fn connect(socket: &Path, export: &str) -> Result<Nbd> {
        let mut stream = UnixStream::connect(socket)?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        ensure!(&greeting[..16] == b"NBDMAGICIHAVEOPT", "not an NBD server");
        // client flags: fixed newstyle, no zeroes
        stream.write_all(&3_u32.to_be_bytes())?;
        stream.write_all(b"IHAVEOPT")?;
        stream.write_all(&1_u32.to_be_bytes())?;
        stream.write_all(&(export.len() as u32).to_be_bytes())?;
        stream.write_all(export.as_bytes())?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer)?;
        Ok(Nbd { stream, message: Vec::new(), buffer: vec![0; BUFFER_BYTES], under_way: HashMap::new() })
    }

    fn request(&mut self, tag: u64, kind: u16, flags: u16, offset: u64, length: u32, payload: &[u8]) -> Result<()> {
        self.message.clear();
        self.message.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        self.message.extend_from_slice(&flags.to_be_bytes());
        self.message.extend_from_slice(&kind.to_be_bytes());
        self.message.extend_from_slice(&tag.to_be_bytes());
        self.message.extend_from_slice(&offset.to_be_bytes());
        self.message.extend_from_slice(&length.to_be_bytes());
        self.message.extend_from_slice(payload);
        self.stream.write_all(&self.message)?;
        self.under_way.insert(tag, if kind == READ { length as usize } else { 0 });
        Ok(())
    }

    /// Writes all of a volume, and flushes.
    pub fn fill(&mut self, size_bytes: u64) -> Result<()> {
        const PIECE_BYTES: u64 = 1 << 20;
        /// So many under way.
        const DEPTH: u64 = 8;
        let payload: Vec<u8> = (0..PIECE_BYTES).map(|index| (index / 7) as u8).collect();
        let count = size_bytes / PIECE_BYTES;
        for tag in 0..count {
            self.request(tag, WRITE, 0, tag * PIECE_BYTES, PIECE_BYTES as u32, &payload)?;
            if tag >= DEPTH {
                self.receive()?;
            }
        }
        while !self.under_way.is_empty() {
            self.receive()?;
        }
        self.send_flush(0)?;
        self.receive().map(drop)
    }
}

impl Pipe for Nbd {
    fn send(&mut self, tag: u64, operation: Operation, load: &Load) -> Result<()> {
        if operation.is_write {
            let flags = if load.pattern.is_durable() { FUA } else { 0 };
            self.request(tag, WRITE, flags, operation.offset, load.payload.len() as u32, load.payload)
        } else {
            self.request(tag, READ, 0, operation.offset, load.pattern.bytes, &[])
        }
    }

    fn send_flush(&mut self, tag: u64) -> Result<()> {
        self.request(tag, FLUSH, 0, 0, 0, &[])
    }

    fn receive(&mut self) -> Result<u64> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        let error = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        ensure!(error == 0, "the NBD server answered error {error}");
        let mut tag = [0; 8];
        tag.copy_from_slice(&header[8..]);
        let tag = u64::from_be_bytes(tag);
        let length = self.under_way.remove(&tag).context("an answer to no request")?;
        self.stream.read_exact(&mut self.buffer[..length])?;
        Ok(tag)
    }
}
