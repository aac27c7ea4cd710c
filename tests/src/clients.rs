//! A client of the native protocol, kept apart from `qemu-proto`'s encoders on purpose.
//!
//! Headers are put together and taken apart byte by byte, as the protocol's tables have them. A mistake that
//! `qemu-proto` makes in both directions would go unseen by a client built from it; and malformed requests, which the
//! suites need as well, cannot be expressed with its types at all.
//!
//! Always holds:
//! 1. No answer is believed beyond its header: a length over [`ANSWER_BYTES_MAX`] is an error, not an allocation.
//! 2. An answer that says something went wrong carries no data (protocol, conformance point 4); if it does, that is an
//!    error here.

use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use qemu_proto::oid::{Oid, VdiId};

/// Bytes of a request or response header.
pub const HEADER_BYTES: usize = 48;
/// What QEMU reads of an inode when it opens a volume: header and map.
pub const QEMU_INODE_BYTES: u32 = 4_198_968;
/// Where the map begins in an inode.
pub const MAP_OFFSET: u64 = 4664;
/// The largest answer any request of these tests may get.
pub const ANSWER_BYTES_MAX: u32 = 16 << 20;
/// Longer than any stall that a working cluster may cause.
pub const ANSWER_DEADLINE: Duration = Duration::from_mins(1);

/// Request opcodes, by their numbers in the protocol.
pub mod opcode {
    #![allow(missing_docs)] // the names are the protocol's own
    pub const CREATE_AND_WRITE: u8 = 0x01;
    pub const READ: u8 = 0x02;
    pub const WRITE: u8 = 0x03;
    pub const REMOVE: u8 = 0x04;
    pub const NEW_VDI: u8 = 0x11;
    pub const LOCK_VDI: u8 = 0x12;
    pub const RELEASE_VDI: u8 = 0x13;
    pub const GET_VDI_INFO: u8 = 0x14;
    pub const READ_VDIS: u8 = 0x15;
    pub const FLUSH_VDI: u8 = 0x16;
    pub const DEL_VDI: u8 = 0x17;
    pub const GET_CLUSTER_DEFAULT: u8 = 0x18;
    pub const GET_NODE_LIST: u8 = 0x82;
    pub const MAKE_FS: u8 = 0x84;
    pub const SHUTDOWN: u8 = 0x85;
    pub const STAT_SHEEP: u8 = 0x86;
    pub const STAT_CLUSTER: u8 = 0x87;
    pub const STAT_RECOVERY: u8 = 0x97;
    pub const CLUSTER_INFO: u8 = 0xBE;
    pub const READ_DEL_VDIS: u8 = 0xC9;
}

/// Request flags.
pub mod flag {
    #![allow(missing_docs)] // the names are the protocol's own
    pub const WRITE: u16 = 0x01;
    pub const COW: u16 = 0x02;
    pub const CACHE: u16 = 0x04;
    pub const DIRECT: u16 = 0x08;
}

/// Result codes that the tests tell apart.
pub mod result {
    #![allow(missing_docs)] // the names are the protocol's own
    pub const SUCCESS: u32 = 0x00;
    pub const NO_OBJ: u32 = 0x02;
    pub const VDI_EXIST: u32 = 0x04;
    pub const INVALID_PARMS: u32 = 0x05;
    pub const NO_VDI: u32 = 0x08;
    pub const NO_TAG: u32 = 0x0E;
    pub const VER_MISMATCH: u32 = 0x14;
    pub const NO_SPACE: u32 = 0x15;
    /// The node was not let into a cluster yet.
    pub const WAIT_FOR_FORMAT: u32 = 0x16;
    pub const WAIT_FOR_JOIN: u32 = 0x17;
    pub const READONLY: u32 = 0x1A;
}

/// A request header.
#[derive(Clone, Copy, Debug, Default)]
pub struct Request {
    /// `proto_ver`: QEMU sends 0 and 1, `dog` 2, and 10 for the operations from 0x80 on.
    pub version: u8,
    /// What to do.
    pub opcode: u8,
    /// See [`flag`].
    pub flags: u16,
    /// Echoed in the answer.
    pub id: u32,
    /// Bytes that follow with [`flag::WRITE`], else bytes wanted.
    pub length: u32,
    /// The part whose layout depends on the opcode: bytes 16 to 47.
    pub body: [u8; 32],
}

impl Request {
    /// A request of an opcode, everything else 0.
    pub fn new(opcode: u8) -> Request {
        Request { version: if opcode >= 0x80 { 0x0A } else { 0 }, opcode, ..Request::default() }
    }

    /// An object request: oid at 16, source of a copy-on-write at 24, offset at 40.
    pub fn object(opcode: u8, oid: Oid, offset: u64) -> Request {
        Request::new(opcode).with_u64(16, oid.raw()).with_u64(40, offset)
    }

    /// With these flags.
    #[must_use]
    pub fn flags(mut self, flags: u16) -> Request {
        self.flags = flags;
        self
    }

    /// With this id.
    #[must_use]
    pub fn id(mut self, id: u32) -> Request {
        self.id = id;
        self
    }

    /// With this length.
    #[must_use]
    pub fn length(mut self, length: u32) -> Request {
        self.length = length;
        self
    }

    /// With this protocol version.
    #[must_use]
    pub fn version(mut self, version: u8) -> Request {
        self.version = version;
        self
    }

    /// With a number at an offset of the header, 16 or more.
    #[must_use]
    pub fn with_u64(mut self, offset: usize, value: u64) -> Request {
        self.body[offset - 16..offset - 8].copy_from_slice(&value.to_le_bytes());
        self
    }

    /// With a number at an offset of the header, 16 or more.
    #[must_use]
    pub fn with_u32(mut self, offset: usize, value: u32) -> Request {
        self.body[offset - 16..offset - 12].copy_from_slice(&value.to_le_bytes());
        self
    }

    /// With a byte at an offset of the header, 16 or more.
    #[must_use]
    pub fn with_u8(mut self, offset: usize, value: u8) -> Request {
        self.body[offset - 16] = value;
        self
    }

    /// As it travels.
    pub fn to_bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.version;
        bytes[1] = self.opcode;
        bytes[2..4].copy_from_slice(&self.flags.to_le_bytes());
        bytes[8..12].copy_from_slice(&self.id.to_le_bytes());
        bytes[12..16].copy_from_slice(&self.length.to_le_bytes());
        bytes[16..].copy_from_slice(&self.body);
        bytes
    }
}

/// A response, header and data.
#[derive(Clone, Debug)]
pub struct Answer {
    /// The header as it came.
    pub header: [u8; HEADER_BYTES],
    /// The bytes that followed.
    pub data: Vec<u8>,
}

impl Answer {
    /// A number of the header.
    pub fn u32(&self, offset: usize) -> u32 {
        u32::from_le_bytes(self.header[offset..offset + 4].try_into().expect("four bytes"))
    }

    /// The opcode it answers.
    pub fn opcode(&self) -> u8 {
        self.header[1]
    }

    /// The id it answers.
    pub fn id(&self) -> u32 {
        self.u32(8)
    }

    /// The result code.
    pub fn result(&self) -> u32 {
        self.u32(16)
    }

    /// Fails, naming `what`, unless the result is success.
    pub fn success(self, what: &str) -> Result<Answer> {
        match self.result() {
            result::SUCCESS => Ok(self),
            code => Err(anyhow::Error::new(Refused(code)).context(format!("{what} (opcode {:02x})", self.opcode()))),
        }
    }
}

/// The server's answer was this result code.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused(pub u32);

impl std::fmt::Display for Refused {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "refused with result {:#04x}", self.0)
    }
}

impl std::error::Error for Refused {}

enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Stream {
    fn reader(&mut self) -> &mut dyn Read {
        match self {
            Stream::Tcp(stream) => stream,
            Stream::Unix(stream) => stream,
        }
    }

    fn writer(&mut self) -> &mut dyn Write {
        match self {
            Stream::Tcp(stream) => stream,
            Stream::Unix(stream) => stream,
        }
    }
}

/// One connection.
pub struct Client {
    stream: Stream,
}

impl Client {
    /// To a TCP port of 127.0.0.1.
    pub fn tcp(port: u16) -> Result<Client> {
        let stream = TcpStream::connect(("127.0.0.1", port)).with_context(|| format!("port {port}"))?;
        stream.set_nodelay(true)?;
        Client::over(Stream::Tcp(stream))
    }

    /// To a unix socket.
    pub fn unix(path: &Path) -> Result<Client> {
        let stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
        Client::over(Stream::Unix(stream))
    }

    fn over(stream: Stream) -> Result<Client> {
        let mut client = Client { stream };
        client.set_deadline(ANSWER_DEADLINE)?;
        Ok(client)
    }

    /// Another connection to the same node.
    pub fn again(&self) -> Result<Client> {
        match &self.stream {
            Stream::Tcp(stream) => Client::tcp(stream.peer_addr()?.port()),
            Stream::Unix(stream) => {
                let address = stream.peer_addr()?;
                Client::unix(address.as_pathname().context("a unix socket without a path")?)
            }
        }
    }

    /// How long to wait for any single answer.
    pub fn set_deadline(&mut self, deadline: Duration) -> Result<()> {
        match &self.stream {
            Stream::Tcp(stream) => stream.set_read_timeout(Some(deadline))?,
            Stream::Unix(stream) => stream.set_read_timeout(Some(deadline))?,
        }
        Ok(())
    }

    /// Sends bytes as they are.
    pub fn send_bytes(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.writer().write_all(bytes)
    }

    /// Sends a request; its length is that of `payload` if there is one.
    pub fn send(&mut self, mut request: Request, payload: &[u8]) -> io::Result<()> {
        if !payload.is_empty() {
            request.flags |= flag::WRITE;
            request.length = payload.len() as u32;
        }
        let mut bytes = Vec::with_capacity(HEADER_BYTES + payload.len());
        bytes.extend_from_slice(&request.to_bytes());
        bytes.extend_from_slice(payload);
        self.send_bytes(&bytes)
    }

    /// The next answer.
    pub fn receive(&mut self) -> io::Result<Answer> {
        let mut header = [0; HEADER_BYTES];
        self.stream.reader().read_exact(&mut header)?;
        let mut answer = Answer { header, data: Vec::new() };
        let length = answer.u32(12);
        if length > ANSWER_BYTES_MAX || (length > 0 && answer.result() != result::SUCCESS) {
            let text = format!("an answer of {length} bytes with result {:#04x}", answer.result());
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        answer.data.resize(length as usize, 0);
        self.stream.reader().read_exact(&mut answer.data)?;
        Ok(answer)
    }

    /// Whether the server closed the connection (instead of answering).
    pub fn is_closed(&mut self) -> bool {
        let mut byte = [0];
        match self.stream.reader().read(&mut byte) {
            Ok(count) => count == 0,
            Err(error) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
        }
    }

    /// One request and its answer, whatever the result.
    pub fn call(&mut self, request: Request, payload: &[u8]) -> Result<Answer> {
        self.send(request, payload)?;
        let answer = self.receive().with_context(|| format!("no answer to opcode {:02x}", request.opcode))?;
        ensure!(
            answer.opcode() == request.opcode && answer.id() == request.id,
            "asked opcode {:02x} id {}, answered opcode {:02x} id {}",
            request.opcode,
            request.id,
            answer.opcode(),
            answer.id()
        );
        Ok(answer)
    }

    /// How many members the node sees.
    pub fn node_count(&mut self) -> Result<usize> {
        const NODE_LIST_BYTES: u32 = 491_520;
        let answer = self.call(Request::new(opcode::GET_NODE_LIST).length(NODE_LIST_BYTES), &[])?;
        let count = answer.success("node list")?.u32(20);
        Ok(count as usize)
    }

    /// Creates a volume; `copies` 0 leaves the choice to the cluster.
    pub fn create_volume(&mut self, name: &str, size_bytes: u64, copies: u8, shift: u8) -> Result<VdiId> {
        let request = Request::new(opcode::NEW_VDI).with_u64(16, size_bytes).with_u8(28, copies).with_u8(31, shift);
        let answer = self.call(request, &padded(&[name]))?.success("create")?;
        vdi_id(answer.u32(24))
    }

    /// The id of a volume, or of its snapshot with a tag or number; see [`Refused`].
    pub fn look_up(&mut self, name: &str, tag: &str, snapshot_number: u32) -> Result<VdiId> {
        let request = Request::new(opcode::GET_VDI_INFO).version(1).with_u32(32, snapshot_number);
        let answer = self.call(request, &padded(&[name, tag]))?.success("look up")?;
        vdi_id(answer.u32(24))
    }

    /// Reads part of an object.
    pub fn read_object(&mut self, oid: Oid, offset: u64, length: u32) -> Result<Vec<u8>> {
        let request = Request::object(opcode::READ, oid, offset).flags(flag::DIRECT).length(length);
        let answer = self.call(request, &[])?.success(&format!("read of {oid}"))?;
        ensure!(answer.data.len() == length as usize, "asked {length} bytes of {oid}, got {}", answer.data.len());
        Ok(answer.data)
    }

    /// Makes everything written to a volume durable.
    pub fn flush(&mut self, vdi: VdiId) -> Result<()> {
        let request = Request::object(opcode::FLUSH_VDI, Oid::inode(vdi), 0).flags(flag::CACHE);
        self.call(request, &[])?.success("flush").map(drop)
    }
}

fn vdi_id(raw: u32) -> Result<VdiId> {
    VdiId::new(raw).filter(|id| id.get() != 0).with_context(|| format!("{raw:x} is no VDI id"))
}

/// Texts in fields of 256 bytes, as names and tags travel.
pub fn padded(texts: &[&str]) -> Vec<u8> {
    const FIELD_BYTES: usize = 256;
    let mut fields = vec![0; FIELD_BYTES * texts.len()];
    for (text, field) in texts.iter().zip(fields.chunks_exact_mut(FIELD_BYTES)) {
        assert!(text.len() < FIELD_BYTES, "{text:?} does not fit its field");
        field[..text.len()].copy_from_slice(text.as_bytes());
    }
    fields
}

/// A volume as a client that has opened it sees it: identity and map, read once.
#[derive(Clone, Debug)]
pub struct Volume {
    /// The name it was opened by.
    pub name: String,
    /// The id under which new objects are created.
    pub vdi: VdiId,
    /// The size of the disk.
    pub size_bytes: u64,
    /// Copies of every object.
    pub copies: u8,
    /// The object size as a power of two.
    pub block_size_shift: u8,
    /// Whose object holds each piece; 0 for a hole.
    pub map: Vec<u32>,
}

impl Volume {
    /// Opens a volume by name, or its snapshot by tag.
    pub fn open(client: &mut Client, name: &str, tag: &str) -> Result<Volume> {
        let vdi = client.look_up(name, tag, 0)?;
        let inode = client.read_object(Oid::inode(vdi), 0, QEMU_INODE_BYTES)?;
        let u64_at = |at: usize| u64::from_le_bytes(inode[at..at + 8].try_into().expect("eight bytes"));
        let u32_at = |at: usize| u32::from_le_bytes(inode[at..at + 4].try_into().expect("four bytes"));
        let stored_name = inode[..256].split(|&byte| byte == 0).next().unwrap_or_default();
        ensure!(stored_name == name.as_bytes(), "asked for {name}, got {:?}", String::from_utf8_lossy(stored_name));
        ensure!(u32_at(560) == vdi.get(), "the inode of {vdi} says it is that of {:x}", u32_at(560));
        let block_size_shift = inode[555];
        if !(20..=31).contains(&block_size_shift) {
            bail!("{name} has objects of 2^{block_size_shift} bytes");
        }
        let size_bytes = u64_at(536);
        let object_count = size_bytes.div_ceil(1 << block_size_shift) as usize;
        ensure!(object_count <= 1 << 20, "{name} has {object_count} objects");
        let map = (0..object_count).map(|index| u32_at(MAP_OFFSET as usize + 4 * index)).collect();
        Ok(Volume { name: name.to_owned(), vdi, size_bytes, copies: inode[554], block_size_shift, map })
    }

    /// Object size.
    pub fn object_bytes(&self) -> u64 {
        1 << self.block_size_shift
    }

    /// The object behind an index, unless it is a hole.
    pub fn object(&self, index: usize) -> Option<Oid> {
        let owner = VdiId::new(self.map[index]).filter(|owner| owner.get() != 0)?;
        Some(Oid::data(owner, index as u32))
    }

    /// Reads the whole volume, holes as zeros, giving each object's bytes to `each`.
    pub fn read_all(&self, client: &mut Client, mut each: impl FnMut(usize, &[u8]) -> Result<()>) -> Result<()> {
        let zeros = vec![0; self.object_bytes() as usize];
        for index in 0..self.map.len() {
            let start = index as u64 * self.object_bytes();
            let length = self.object_bytes().min(self.size_bytes - start) as usize;
            match self.object(index) {
                None => each(index, &zeros[..length])?,
                Some(oid) => {
                    let bytes = client.read_object(oid, 0, length as u32)?;
                    each(index, &bytes)?;
                }
            }
        }
        Ok(())
    }
}
