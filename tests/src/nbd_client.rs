//! An NBD client put together byte by byte from the NBD project's `doc/proto.md`, kept apart from the server's encoders on
//! purpose. Speaks all three reply styles (Debian's libnbd knows nothing of extended headers), pipelines, and can send
//! what no well-behaved client would.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};

/// Longer than any stall that a working cluster may cause.
const ANSWER_DEADLINE: Duration = Duration::from_mins(1);
/// No answer of these tests is longer.
const ANSWER_BYTES_MAX: u64 = 64 << 20;

/// How replies are to look.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Style {
    /// One header each.
    Simple,
    /// Chunks.
    Structured,
    /// Chunks with 64-bit lengths.
    Extended,
}

/// Request types, by their numbers in the protocol.
pub mod command {
    #![allow(missing_docs)] // the names are the protocol's own
    pub const READ: u16 = 0;
    pub const WRITE: u16 = 1;
    pub const DISCONNECT: u16 = 2;
    pub const FLUSH: u16 = 3;
    pub const TRIM: u16 = 4;
    pub const CACHE: u16 = 5;
    pub const WRITE_ZEROES: u16 = 6;
    pub const BLOCK_STATUS: u16 = 7;
}

/// Request flag: durable when answered.
pub const FLAG_FUA: u16 = 1;
/// Request flag of extended headers: the length is that of a payload.
const FLAG_PAYLOAD: u16 = 32;

/// A whole answer.
#[derive(Debug, Default)]
pub struct Answer {
    /// Of the request.
    pub cookie: u64,
    /// 0 if it went well.
    pub error: u32,
    /// What the server says about an error.
    pub text: String,
    /// What a read gave, by offset: bytes, or as many zeros.
    pub data: Vec<(u64, Vec<u8>)>,
    /// What a status gave, by context: lengths and states.
    pub extents: Vec<(u32, Vec<(u64, u64)>)>,
}

impl Answer {
    /// The bytes of a read that began at `offset`, in one piece.
    pub fn bytes(mut self, offset: u64) -> Result<Vec<u8>> {
        self.data.sort_by_key(|(at, _)| *at);
        let mut whole = Vec::new();
        for (at, bytes) in self.data {
            ensure!(at == offset + whole.len() as u64, "a read's chunks leave a gap or overlap at {at}");
            whole.extend_from_slice(&bytes);
        }
        Ok(whole)
    }
}

/// One connection.
pub struct NbdClient {
    socket: UnixStream,
    style: Style,
    next_cookie: u64,
    /// Bytes of the export.
    pub size_bytes: u64,
    /// What it can do.
    pub flags: u16,
    /// Contexts agreed on: number and name.
    pub contexts: Vec<(u32, String)>,
}

fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u32).to_be_bytes()[..], text.as_bytes()].concat()
}

impl NbdClient {
    /// Connects and says the client's flags, no option yet.
    pub fn greet(socket: &Path) -> Result<UnixStream> {
        let mut socket = UnixStream::connect(socket).with_context(|| format!("{}", socket.display()))?;
        socket.set_read_timeout(Some(ANSWER_DEADLINE))?;
        let mut greeting = [0; 18];
        socket.read_exact(&mut greeting)?;
        ensure!(&greeting[..16] == b"NBDMAGICIHAVEOPT", "not an NBD server: {greeting:?}");
        socket.write_all(&3_u32.to_be_bytes())?;
        Ok(socket)
    }

    /// Opens an export.
    pub fn open(socket: &Path, export: &str, style: Style, contexts: &[&str]) -> Result<NbdClient> {
        let socket = NbdClient::greet(socket)?;
        let mut client = NbdClient { socket, style, next_cookie: 1, size_bytes: 0, flags: 0, contexts: Vec::new() };
        match style {
            Style::Simple => {}
            Style::Structured => drop(client.option(8, &[])?),
            Style::Extended => drop(client.option(11, &[])?),
        }
        if !contexts.is_empty() {
            let mut body = string(export);
            body.extend_from_slice(&(contexts.len() as u32).to_be_bytes());
            for context in contexts {
                body.extend_from_slice(&string(context));
            }
            for (kind, data) in client.option(10, &body)? {
                ensure!(kind == 4 && data.len() >= 4, "an odd answer to the contexts: {kind}");
                let number = u32::from_be_bytes([data[0], data[1], data[2], data[3]]);
                client.contexts.push((number, String::from_utf8_lossy(&data[4..]).into_owned()));
            }
        }
        let body = [string(export), vec![0, 0]].concat();
        for (kind, data) in client.option(7, &body)? {
            if kind == 3 && data[..2] == [0, 0] {
                client.size_bytes = u64::from_be_bytes(data[2..10].try_into()?);
                client.flags = u16::from_be_bytes(data[10..12].try_into()?);
            }
        }
        Ok(client)
    }

    /// Sends an option and gives its replies before the acknowledgement; a refusal is an error that says why.
    pub fn option(&mut self, option: u32, body: &[u8]) -> Result<Vec<(u32, Vec<u8>)>> {
        let mut bytes = b"IHAVEOPT".to_vec();
        bytes.extend_from_slice(&option.to_be_bytes());
        bytes.extend_from_slice(&(body.len() as u32).to_be_bytes());
        bytes.extend_from_slice(body);
        self.socket.write_all(&bytes)?;
        let mut replies = Vec::new();
        loop {
            let header = self.take(20)?;
            ensure!(header[..8] == 0x0003_e889_0455_65a9_u64.to_be_bytes(), "not an option's reply: {header:?}");
            ensure!(header[8..12] == option.to_be_bytes(), "a reply to another option");
            let kind = u32::from_be_bytes(header[12..16].try_into()?);
            let length = u32::from_be_bytes(header[16..20].try_into()?);
            let data = self.take(u64::from(length))?;
            match kind {
                1 => return Ok(replies),
                _ if kind >> 31 == 1 => {
                    bail!("option {option} was refused with {kind:#x}: {}", String::from_utf8_lossy(&data))
                }
                _ => replies.push((kind, data)),
            }
        }
    }

    fn take(&mut self, length: u64) -> Result<Vec<u8>> {
        ensure!(length <= ANSWER_BYTES_MAX, "an answer of {length} bytes");
        let mut bytes = vec![0; length as usize];
        self.socket.read_exact(&mut bytes)?;
        Ok(bytes)
    }

    /// Sends a request and does not wait; gives its cookie.
    pub fn send(&mut self, kind: u16, flags: u16, offset: u64, length: u64, payload: &[u8]) -> Result<u64> {
        let cookie = self.next_cookie;
        self.next_cookie += 1;
        let extended = self.style == Style::Extended;
        let magic: u32 = if extended { 0x21e4_1c71 } else { 0x2560_9513 };
        let payload_flag = if extended && kind == command::WRITE { FLAG_PAYLOAD } else { 0 };
        let mut bytes = Vec::with_capacity(32 + payload.len());
        bytes.extend_from_slice(&magic.to_be_bytes());
        bytes.extend_from_slice(&(flags | payload_flag).to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&cookie.to_be_bytes());
        bytes.extend_from_slice(&offset.to_be_bytes());
        if extended {
            bytes.extend_from_slice(&length.to_be_bytes());
        } else {
            bytes.extend_from_slice(&u32::try_from(length)?.to_be_bytes());
        }
        bytes.extend_from_slice(payload);
        self.socket.write_all(&bytes)?;
        Ok(cookie)
    }

    /// The next whole answer, of whatever request.
    pub fn receive(&mut self) -> Result<Answer> {
        let mut answer = Answer::default();
        loop {
            if self.style == Style::Simple {
                bail!("simple replies do not say how long they are: use `receive_simple`");
            }
            let header = self.take(if self.style == Style::Extended { 32 } else { 20 })?;
            let magic: u32 = if self.style == Style::Extended { 0x6e8a_278c } else { 0x668e_33ef };
            ensure!(header[..4] == magic.to_be_bytes(), "not a chunk: {header:?}");
            let is_last = header[5] & 1 != 0;
            let kind = u16::from_be_bytes(header[6..8].try_into()?);
            let cookie = u64::from_be_bytes(header[8..16].try_into()?);
            ensure!(answer.cookie == 0 || answer.cookie == cookie, "chunks of two answers are mixed");
            answer.cookie = cookie;
            let length = match self.style {
                Style::Extended => u64::from_be_bytes(header[24..32].try_into()?),
                _ => u64::from(u32::from_be_bytes(header[16..20].try_into()?)),
            };
            let body = self.take(length)?;
            let at = |from: usize| -> Result<u64> {
                Ok(u64::from_be_bytes(body.get(from..from + 8).context("a short chunk")?.try_into()?))
            };
            match kind {
                0 => ensure!(body.is_empty(), "a chunk of nothing with content"),
                1 => answer.data.push((at(0)?, body[8..].to_vec())),
                2 => {
                    let hole = u32::from_be_bytes(body[8..12].try_into()?);
                    answer.data.push((at(0)?, vec![0; hole as usize]));
                }
                5 => {
                    let word = |chunk: &[u8]| u64::from(u32::from_be_bytes([chunk[0], chunk[1], chunk[2], chunk[3]]));
                    let extents = body[4..].chunks_exact(8).map(|pair| (word(pair), word(&pair[4..]))).collect();
                    answer.extents.push((word(&body) as u32, extents));
                }
                6 => {
                    let number = u32::from_be_bytes(body[..4].try_into()?);
                    let count = u32::from_be_bytes(body[4..8].try_into()?) as usize;
                    let extents: Result<Vec<(u64, u64)>> =
                        (0..count).map(|index| Ok((at(8 + 16 * index)?, at(16 + 16 * index)?))).collect();
                    answer.extents.push((number, extents?));
                }
                _ if kind >> 15 == 1 => {
                    answer.error = u32::from_be_bytes(body.get(..4).context("a short error")?.try_into()?);
                    answer.text = String::from_utf8_lossy(body.get(6..).unwrap_or_default()).into_owned();
                }
                _ => bail!("a chunk of unknown kind {kind}"),
            }
            if is_last {
                return Ok(answer);
            }
        }
    }

    fn receive_simple(&mut self, data_bytes: u64) -> Result<Answer> {
        let header = self.take(16)?;
        ensure!(header[..4] == 0x6744_6698_u32.to_be_bytes(), "not a simple reply: {header:?}");
        let error = u32::from_be_bytes(header[4..8].try_into()?);
        let cookie = u64::from_be_bytes(header[8..16].try_into()?);
        let data = if error == 0 { self.take(data_bytes)? } else { Vec::new() };
        Ok(Answer { cookie, error, data: vec![(0, data)], ..Answer::default() })
    }

    /// One request and its answer, with nothing else under way. The error number, if it failed, is in the answer.
    pub fn call(&mut self, kind: u16, flags: u16, offset: u64, length: u64, payload: &[u8]) -> Result<Answer> {
        let cookie = self.send(kind, flags, offset, length, payload)?;
        let answer = match self.style {
            Style::Simple => {
                let mut answer = self.receive_simple(if kind == command::READ { length } else { 0 })?;
                for (at, _) in &mut answer.data {
                    *at = offset;
                }
                answer
            }
            _ => self.receive()?,
        };
        ensure!(answer.cookie == cookie, "an answer to another request");
        Ok(answer)
    }

    /// As `call`; fails if the request did.
    pub fn must(&mut self, kind: u16, flags: u16, offset: u64, length: u64, payload: &[u8]) -> Result<Answer> {
        let answer = self.call(kind, flags, offset, length, payload)?;
        let (error, text) = (answer.error, &answer.text);
        ensure!(error == 0, "request {kind} at {offset}+{length} failed with error {error}: {text}");
        Ok(answer)
    }

    /// Reads.
    pub fn read(&mut self, offset: u64, length: u64) -> Result<Vec<u8>> {
        self.must(command::READ, 0, offset, length, &[])?.bytes(offset)
    }

    /// The whole export.
    pub fn read_all(&mut self) -> Result<Vec<u8>> {
        const PIECE_BYTES: u64 = 16 << 20;
        let mut whole = Vec::with_capacity(self.size_bytes as usize);
        while (whole.len() as u64) < self.size_bytes {
            let length = PIECE_BYTES.min(self.size_bytes - whole.len() as u64);
            whole.extend(self.read(whole.len() as u64, length)?);
        }
        Ok(whole)
    }

    /// Writes.
    pub fn write(&mut self, offset: u64, bytes: &[u8], flags: u16) -> Result<()> {
        self.must(command::WRITE, flags, offset, bytes.len() as u64, bytes).map(drop)
    }

    /// Makes everything durable.
    pub fn flush(&mut self) -> Result<()> {
        self.must(command::FLUSH, 0, 0, 0, &[]).map(drop)
    }

    /// Lengths and states of a range in a context agreed on.
    pub fn status(&mut self, context: &str, offset: u64, length: u64) -> Result<Vec<(u64, u64)>> {
        let found = self.contexts.iter().find(|(_, name)| name == context);
        let number = found.with_context(|| format!("{context} was not agreed on"))?.0;
        let answer = self.must(command::BLOCK_STATUS, 0, offset, length, &[])?;
        let extents = answer.extents.into_iter().find(|(other, _)| *other == number);
        Ok(extents.context("no answer for the context")?.1)
    }
}
