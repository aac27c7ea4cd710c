//! The bytes of the NBD protocol: numbers, requests, replies. Everything is big-endian. Names and values are those of the
//! NBD project's `doc/proto.md`.

use bytes::{BufMut, Bytes, BytesMut};

/// First thing a server says.
pub const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT": announces the newstyle handshake, and begins every option.
pub const OPTION_MAGIC: u64 = 0x4948_4156_454f_5054;
/// Begins every reply to an option.
pub const OPTION_REPLY_MAGIC: u64 = 0x0003_e889_0455_65a9;

/// Handshake flags of both sides.
pub const FLAG_FIXED_NEWSTYLE: u16 = 1;
/// Handshake flag: no 124 zero bytes after NBD_OPT_EXPORT_NAME.
pub const FLAG_NO_ZEROES: u16 = 2;

/// What a client may ask for during the handshake.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the protocol's own names")]
pub enum OptionKind {
    ExportName,
    Abort,
    List,
    StartTls,
    Info,
    Go,
    StructuredReply,
    ListMetaContext,
    SetMetaContext,
    ExtendedHeaders,
}

impl OptionKind {
    /// The option of a number.
    pub fn from_code(code: u32) -> Option<OptionKind> {
        use OptionKind as O;
        Some(match code {
            1 => O::ExportName,
            2 => O::Abort,
            3 => O::List,
            5 => O::StartTls,
            6 => O::Info,
            7 => O::Go,
            8 => O::StructuredReply,
            9 => O::ListMetaContext,
            10 => O::SetMetaContext,
            11 => O::ExtendedHeaders,
            _ => return None,
        })
    }
}

/// Replies to options.
pub mod reply {
    /// Done.
    pub const ACK: u32 = 1;
    /// An export's name.
    pub const SERVER: u32 = 2;
    /// Something about an export.
    pub const INFO: u32 = 3;
    /// A meta context and its number.
    pub const META_CONTEXT: u32 = 4;
    /// No such option here.
    pub const ERR_UNSUP: u32 = 1 << 31 | 1;
    /// Forbidden here.
    pub const ERR_POLICY: u32 = 1 << 31 | 2;
    /// The option's data make no sense.
    pub const ERR_INVALID: u32 = 1 << 31 | 3;
    /// TLS comes first.
    pub const ERR_TLS_REQD: u32 = 1 << 31 | 5;
    /// No such export.
    pub const ERR_UNKNOWN: u32 = 1 << 31 | 6;
    /// The server cannot serve now.
    pub const ERR_SHUTDOWN: u32 = 1 << 31 | 7;
    /// The option's data are too long.
    pub const ERR_TOO_BIG: u32 = 1 << 31 | 9;
}

/// Kinds of NBD_REP_INFO.
pub mod info {
    /// Size and transmission flags.
    pub const EXPORT: u16 = 0;
    /// The export's name.
    pub const NAME: u16 = 1;
    /// Text for people.
    pub const DESCRIPTION: u16 = 2;
    /// Smallest, preferred and largest request.
    pub const BLOCK_SIZE: u16 = 3;
}

/// Transmission flags: what an export can do.
pub mod export_flag {
    /// Always set.
    pub const HAS_FLAGS: u16 = 1;
    /// Cannot be written to.
    pub const READ_ONLY: u16 = 1 << 1;
    /// Knows FLUSH.
    pub const SEND_FLUSH: u16 = 1 << 2;
    /// Knows the FUA flag.
    pub const SEND_FUA: u16 = 1 << 3;
    /// Knows TRIM.
    pub const SEND_TRIM: u16 = 1 << 5;
    /// Knows WRITE_ZEROES.
    pub const SEND_WRITE_ZEROES: u16 = 1 << 6;
    /// Knows the DF flag.
    pub const SEND_DF: u16 = 1 << 7;
    /// A flush on one connection covers all.
    pub const CAN_MULTI_CONN: u16 = 1 << 8;
    /// Knows CACHE.
    pub const SEND_CACHE: u16 = 1 << 10;
    /// Knows the FAST_ZERO flag.
    pub const SEND_FAST_ZERO: u16 = 1 << 11;
}

/// Bytes of a request's header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a request's header once NBD_OPT_EXTENDED_HEADERS was agreed on.
pub const EXTENDED_REQUEST_BYTES: usize = 32;
const REQUEST_MAGIC: u32 = 0x2560_9513;
const EXTENDED_REQUEST_MAGIC: u32 = 0x21e4_1c71;
const SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_CHUNK_MAGIC: u32 = 0x6e8a_278c;

/// Request types.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[expect(missing_docs, reason = "the protocol's own names")]
pub enum CommandKind {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
}

/// Request flags.
pub mod command_flag {
    /// Durable when answered.
    pub const FUA: u16 = 1;
    /// WRITE_ZEROES should leave no hole.
    pub const NO_HOLE: u16 = 2;
    /// The answer to READ must be one chunk.
    pub const DF: u16 = 4;
    /// BLOCK_STATUS: one extent.
    pub const REQ_ONE: u16 = 8;
    /// WRITE_ZEROES must fail if it is not faster than a write.
    pub const FAST_ZERO: u16 = 16;
    /// The length is that of a payload (extended headers).
    pub const PAYLOAD_LEN: u16 = 32;
}

/// A request without its payload.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Command {
    /// `None` for a type that nobody knows.
    pub kind: Option<CommandKind>,
    /// See [`command_flag`].
    pub flags: u16,
    /// Echoed.
    pub cookie: u64,
    /// Bytes into the export.
    pub offset: u64,
    /// Bytes.
    pub length: u64,
}

impl Command {
    /// Whether a flag is set.
    pub fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// A header of either kind; `None` if it does not begin as one.
    pub fn decode(header: &[u8]) -> Option<Command> {
        let magic = u32_at(header, 0)?;
        let length = match magic {
            REQUEST_MAGIC if header.len() == REQUEST_BYTES => u64::from(u32_at(header, 24)?),
            EXTENDED_REQUEST_MAGIC if header.len() == EXTENDED_REQUEST_BYTES => u64_at(header, 24)?,
            _ => return None,
        };
        use CommandKind as C;
        let kinds = [C::Read, C::Write, C::Disconnect, C::Flush, C::Trim, C::Cache, C::WriteZeroes, C::BlockStatus];
        Some(Command {
            kind: kinds.get(usize::from(u16_at(header, 6)?)).copied(),
            flags: u16_at(header, 4)?,
            cookie: u64_at(header, 8)?,
            offset: u64_at(header, 16)?,
            length,
        })
    }
}

/// Bytes as a number, if there are enough of them.
pub fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|chunk| u16::from_be_bytes(*chunk))
}

/// As `u16_at`.
pub fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|chunk| u32::from_be_bytes(*chunk))
}

/// As `u16_at`.
pub fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|chunk| u64::from_be_bytes(*chunk))
}

/// Error numbers of replies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u32)]
pub enum Errno {
    /// Not permitted: the export is read-only.
    Perm = 1,
    /// The data cannot be reached.
    Io = 5,
    /// The request makes no sense.
    Inval = 22,
    /// No space, or beyond the end.
    NoSpc = 28,
    /// Longer than one reply can be.
    Overflow = 75,
    /// Not supported, or not fast.
    NotSup = 95,
}

/// How replies look on a connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ReplyStyle {
    /// One header, then the data of a read.
    Simple,
    /// Chunks.
    Structured,
    /// Chunks with 64-bit lengths.
    Extended,
}

/// Kinds of chunks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u16)]
#[expect(missing_docs, reason = "the protocol's own names")]
pub enum ChunkKind {
    None = 0,
    OffsetData = 1,
    OffsetHole = 2,
    BlockStatus = 5,
    BlockStatusExtended = 6,
    Error = 1 << 15 | 1,
}

/// A simple reply's header.
pub fn simple_reply(cookie: u64, error: Option<Errno>) -> Bytes {
    let mut bytes = BytesMut::with_capacity(16);
    bytes.put_u32(SIMPLE_REPLY_MAGIC);
    bytes.put_u32(error.map_or(0, |error| error as u32));
    bytes.put_u64(cookie);
    bytes.freeze()
}

/// A chunk's header followed by `head`; `data_bytes` more bytes of it follow.
pub fn chunk(
    style: ReplyStyle,
    command: &Command,
    kind: ChunkKind,
    is_last: bool,
    head: &[u8],
    data_bytes: usize,
) -> Bytes {
    let mut bytes = BytesMut::with_capacity(32 + head.len());
    let length = head.len() + data_bytes;
    bytes.put_u32(if style == ReplyStyle::Extended { EXTENDED_CHUNK_MAGIC } else { CHUNK_MAGIC });
    bytes.put_u16(u16::from(is_last));
    bytes.put_u16(kind as u16);
    bytes.put_u64(command.cookie);
    if style == ReplyStyle::Extended {
        bytes.put_u64(command.offset);
        bytes.put_u64(length as u64);
    } else {
        bytes.put_u32(length as u32);
    }
    bytes.extend_from_slice(head);
    bytes.freeze()
}

/// The reply to a request that failed.
pub fn error_reply(style: ReplyStyle, command: &Command, error: Errno, text: &str) -> Bytes {
    if style == ReplyStyle::Simple {
        return simple_reply(command.cookie, Some(error));
    }
    let mut head = BytesMut::with_capacity(6 + text.len());
    head.put_u32(error as u32);
    head.put_u16(text.len() as u16);
    head.extend_from_slice(text.as_bytes());
    chunk(style, command, ChunkKind::Error, true, &head, 0)
}

/// The reply to a request that has nothing to tell but that it is done.
pub fn done_reply(style: ReplyStyle, command: &Command) -> Bytes {
    match style {
        ReplyStyle::Simple => simple_reply(command.cookie, None),
        _ => chunk(style, command, ChunkKind::None, true, &[], 0),
    }
}

/// A reply to an option.
pub fn option_reply(option: u32, kind: u32, data: &[u8]) -> Bytes {
    let mut bytes = BytesMut::with_capacity(20 + data.len());
    bytes.put_u64(OPTION_REPLY_MAGIC);
    bytes.put_u32(option);
    bytes.put_u32(kind);
    bytes.put_u32(data.len() as u32);
    bytes.extend_from_slice(data);
    bytes.freeze()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(magic: u32, kind: u16, length: &[u8]) -> Vec<u8> {
        let mut bytes = magic.to_be_bytes().to_vec();
        bytes.extend_from_slice(&command_flag::FUA.to_be_bytes());
        bytes.extend_from_slice(&kind.to_be_bytes());
        bytes.extend_from_slice(&7_u64.to_be_bytes());
        bytes.extend_from_slice(&4096_u64.to_be_bytes());
        bytes.extend_from_slice(length);
        bytes
    }

    #[test]
    fn requests_of_both_kinds() {
        let plain = Command::decode(&request(REQUEST_MAGIC, 1, &512_u32.to_be_bytes())).unwrap();
        let long = Command::decode(&request(EXTENDED_REQUEST_MAGIC, 4, &(1_u64 << 40).to_be_bytes())).unwrap();
        assert_eq!((plain.kind, plain.length, plain.cookie), (Some(CommandKind::Write), 512, 7));
        assert!(plain.has(command_flag::FUA) && !plain.has(command_flag::DF));
        assert_eq!((long.kind, long.length, long.offset), (Some(CommandKind::Trim), 1 << 40, 4096));
        assert_eq!(Command::decode(&request(REQUEST_MAGIC, 99, &[0; 4])).unwrap().kind, None);
    }

    #[test]
    fn what_is_no_request_is_not_decoded() {
        assert_eq!(Command::decode(&request(SIMPLE_REPLY_MAGIC, 1, &[0; 4])), None);
        assert_eq!(Command::decode(&request(REQUEST_MAGIC, 1, &[0; 8])), None, "the lengths must fit the magic");
        for length in 0..REQUEST_BYTES {
            assert_eq!(Command::decode(&[0x25; REQUEST_BYTES][..length]), None);
        }
    }

    #[test]
    fn replies_have_the_lengths_they_announce() {
        let command = Command { kind: None, flags: 0, cookie: 9, offset: 0, length: 0 };
        for (style, header) in [(ReplyStyle::Structured, 20), (ReplyStyle::Extended, 32)] {
            assert_eq!(done_reply(style, &command).len(), header);
            assert_eq!(error_reply(style, &command, Errno::Io, "text").len(), header + 6 + 4);
        }
        assert_eq!(error_reply(ReplyStyle::Simple, &command, Errno::Io, "text").len(), 16);
        assert_eq!(option_reply(7, reply::ACK, b"abc").len(), 23);
    }
}
