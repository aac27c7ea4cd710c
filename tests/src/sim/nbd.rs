//! An NBD client inside a simulation: one request at a time, with simple replies, over the NBD socket of a machine.

use std::io;
use std::path::PathBuf;

use sheep::world::net::Connection;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::cluster::STORE;
use super::net::SimNet;
use crate::nbd_client::{FLAG_FUA, command};

const OPTION_GO: u32 = 7;
const REPLY_ACK: u32 = 1;
const REPLY_INFO: u32 = 3;
/// No option's reply is longer.
const REPLY_BYTES_MAX: u32 = 4096;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const REPLY_MAGIC: u32 = 0x6744_6698;

/// One connection to one export. Whatever changes something is durable when it is answered.
pub struct SimNbd {
    connection: Connection,
    next_cookie: u64,
    /// The machine whose node serves it.
    pub host: usize,
    /// Bytes of the export.
    pub size_bytes: u64,
}

fn odd(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|bytes| bytes.try_into().ok()).map_or(0, u32::from_be_bytes)
}

impl SimNbd {
    /// Opens an export of a machine's node.
    pub async fn open(net: &SimNet, host: usize, export: &str) -> io::Result<SimNbd> {
        let connection = net.connect_local(host, PathBuf::from(STORE).join("nbd.sock")).await?;
        let mut client = SimNbd { connection, next_cookie: 1, host, size_bytes: 0 };
        let greeting = client.take(18).await?;
        if &greeting[..16] != b"NBDMAGICIHAVEOPT" {
            return Err(odd(format!("not an NBD server: {greeting:?}")));
        }
        let name = [&(export.len() as u32).to_be_bytes()[..], export.as_bytes(), &[0, 0]].concat();
        let option = [&b"IHAVEOPT"[..], &OPTION_GO.to_be_bytes(), &(name.len() as u32).to_be_bytes(), &name].concat();
        let bytes = [&3_u32.to_be_bytes()[..], &option].concat();
        client.connection.writer.write_all(&bytes).await?;
        loop {
            let header = client.take(20).await?;
            let (kind, length) = (u32_at(&header, 12), u32_at(&header, 16));
            if length > REPLY_BYTES_MAX {
                return Err(odd(format!("an option's reply of {length} bytes")));
            }
            let data = client.take(length as usize).await?;
            match kind {
                REPLY_ACK => return Ok(client),
                REPLY_INFO if data.len() >= 12 && data[..2] == [0, 0] => {
                    client.size_bytes = u64::from(u32_at(&data, 2)) << 32 | u64::from(u32_at(&data, 6));
                }
                _ if kind >> 31 == 1 => return Err(io::Error::other(String::from_utf8_lossy(&data).into_owned())),
                _ => {}
            }
        }
    }

    async fn take(&mut self, length: usize) -> io::Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.connection.reader.read_exact(&mut bytes).await?;
        Ok(bytes)
    }

    async fn call(
        &mut self,
        kind: u16,
        flags: u16,
        (offset, length): (u64, u64),
        payload: &[u8],
    ) -> io::Result<Vec<u8>> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let mut bytes = Vec::with_capacity(28 + payload.len());
        bytes.extend_from_slice(&REQUEST_MAGIC.to_be_bytes());
        bytes.extend_from_slice(&flags.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        bytes.extend_from_slice(&(length as u32).to_be_bytes());
        bytes.extend_from_slice(payload);
        self.connection.writer.write_all(&bytes).await?;
        let header = self.take(16).await?;
        if u32_at(&header, 0) != REPLY_MAGIC || header[8..] != cookie.to_be_bytes() {
            return Err(odd(format!("not the reply to request {cookie}: {header:?}")));
        }
        match u32_at(&header, 4) {
            0 if kind == command::READ => self.take(length as usize).await,
            0 => Ok(Vec::new()),
            error => Err(io::Error::other(format!("NBD error {error}"))),
        }
    }

    /// Reads.
    pub async fn read(&mut self, offset: u64, length: u64) -> io::Result<Vec<u8>> {
        self.call(command::READ, 0, (offset, length), &[]).await
    }

    /// Writes.
    pub async fn write(&mut self, offset: u64, bytes: &[u8]) -> io::Result<()> {
        self.call(command::WRITE, FLAG_FUA, (offset, bytes.len() as u64), bytes).await.map(drop)
    }

    /// Makes a range read as zeros, by one request or the other.
    pub async fn zero(&mut self, offset: u64, length: u64, is_trim: bool) -> io::Result<()> {
        let kind = if is_trim { command::TRIM } else { command::WRITE_ZEROES };
        self.call(kind, FLAG_FUA, (offset, length), &[]).await.map(drop)
    }
}
