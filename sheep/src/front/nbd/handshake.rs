//! The fixed newstyle handshake: options and their answers, until the client chooses an export or leaves.
//!
//! Nothing a client sends here costs more than `OPTION_BYTES_MAX`, and options end after `OPTIONS_MAX`.

use std::io;
use std::sync::Arc;

use bytes::{BufMut, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};

use super::TlsPolicy;
use super::contexts::{self, Context};
use super::export::{self, Export};
use super::wire::{
    FLAG_FIXED_NEWSTYLE, FLAG_NO_ZEROES, NBD_MAGIC, OPTION_MAGIC, OptionKind, ReplyStyle, export_flag, info,
    option_reply, reply, u16_at, u32_at,
};
use crate::data::Data;
use crate::data::volumes::VolumeError;
use crate::world::frames::FrameReader;
use crate::world::net::Connection;

/// Longest option: a name and a number of context queries, each of which may have 4,096 bytes.
const OPTION_BYTES_MAX: usize = 64 << 10;
/// Options of one handshake: nobody needs more than a few.
const OPTIONS_MAX: usize = 1024;
/// Longest string of the protocol.
const STRING_BYTES_MAX: usize = 4096;
/// Largest payload of one request, and the most that QEMU sends.
pub const PAYLOAD_BYTES_MAX: u32 = 32 << 20;
/// Sizes of requests: any is taken, whole blocks are best.
const BLOCK_BYTES: (u32, u32) = (1, 4096);

/// Contexts with the numbers that replies name them by.
pub type Numbered = Vec<(u32, Context)>;

/// What a handshake came to.
pub struct Session {
    /// What is served.
    pub export: Arc<Export>,
    /// How replies look.
    pub style: ReplyStyle,
    /// Contexts that BLOCK_STATUS answers for, with their numbers.
    pub contexts: Numbered,
}

struct Handshake<'a> {
    data: &'a Data,
    /// Replies that were not written yet.
    unsent: BytesMut,
    style: ReplyStyle,
    /// The contexts, and the export for which they were set.
    contexts: Option<(Vec<u8>, Numbered)>,
    /// The export that was opened last: a client asks about it before it chooses it.
    opened: Option<Arc<Export>>,
}

fn violation(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what.to_string())
}

/// What a chosen export is served over.
pub type Chosen = (Session, FrameReader, Box<dyn AsyncWrite + Send + Unpin>);

/// Runs the handshake. `None` if the client left, or was told why it must.
pub async fn negotiate(data: &Data, connection: Connection, policy: TlsPolicy) -> io::Result<Option<Chosen>> {
    let peer = connection.peer.clone();
    let mut reader = FrameReader::new(connection.reader);
    let mut writer = connection.writer;
    let mut policy = policy;
    let mut handshake =
        Handshake { data, unsent: BytesMut::new(), style: ReplyStyle::Simple, contexts: None, opened: None };
    handshake.unsent.put_u64(NBD_MAGIC);
    handshake.unsent.put_u64(OPTION_MAGIC);
    handshake.unsent.put_u16(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES);
    handshake.send(&mut writer).await?;
    let Some(flags) = reader.header::<4>().await? else { return Ok(None) };
    let flags = u32::from_be_bytes(flags);
    if flags & !u32::from(FLAG_FIXED_NEWSTYLE | FLAG_NO_ZEROES) != 0 || flags & u32::from(FLAG_FIXED_NEWSTYLE) == 0 {
        return Err(violation("the client does not speak the fixed newstyle handshake"));
    }
    let wants_zeroes = flags & u32::from(FLAG_NO_ZEROES) == 0;
    for _ in 0..OPTIONS_MAX {
        let Some(header) = reader.header::<16>().await? else { return Ok(None) };
        if header[..8] != OPTION_MAGIC.to_be_bytes() {
            return Err(violation("not an option"));
        }
        let (code, length) = (u32_at(&header, 8).unwrap_or(0), u32_at(&header, 12).unwrap_or(0) as usize);
        if length > OPTION_BYTES_MAX {
            handshake.reply(code, reply::ERR_TOO_BIG, b"");
            handshake.send(&mut writer).await?;
            return Err(violation("an option that is too long"));
        }
        let body = reader.payload(length).await?;
        let kind = OptionKind::from_code(code);
        if kind == Some(OptionKind::StartTls) {
            let (TlsPolicy::Offered(tls) | TlsPolicy::Required(tls)) = &policy else {
                handshake.reply(code, reply::ERR_POLICY, b"this server was started without --nbd-tls");
                handshake.send(&mut writer).await?;
                continue;
            };
            if !body.is_empty() {
                handshake.reply(code, reply::ERR_INVALID, b"");
                handshake.send(&mut writer).await?;
                continue;
            }
            handshake.reply(code, reply::ACK, b"");
            handshake.send(&mut writer).await?;
            // Bytes that came before TLS could have been put there by anybody.
            let plain = reader.into_inner().ok_or_else(|| violation("bytes between STARTTLS and TLS"))?;
            let inside = tls.accept(Connection { reader: plain, writer, peer: peer.clone() }).await?;
            (reader, writer) = (FrameReader::new(inside.reader), inside.writer);
            // Whatever was agreed on before is forgotten.
            handshake = Handshake { style: ReplyStyle::Simple, contexts: None, opened: None, ..handshake };
            policy = TlsPolicy::None(crate::front::allowed::Allowed::default());
            continue;
        }
        if matches!(policy, TlsPolicy::Required(_)) && kind != Some(OptionKind::Abort) {
            if kind == Some(OptionKind::ExportName) {
                return Err(violation("an export was asked for without TLS"));
            }
            handshake.reply(code, reply::ERR_TLS_REQD, b"this server wants TLS first");
            handshake.send(&mut writer).await?;
            continue;
        }
        let session = match kind {
            Some(OptionKind::ExportName) => Some(handshake.export_name(&body, wants_zeroes).await?),
            Some(OptionKind::Go) => handshake.info(code, &body, true).await,
            Some(OptionKind::Abort) => {
                handshake.reply(code, reply::ACK, b"");
                handshake.send(&mut writer).await?;
                return Ok(None);
            }
            _ => {
                handshake.answer(kind, code, &body).await;
                None
            }
        };
        handshake.send(&mut writer).await?;
        if let Some(session) = session {
            return Ok(Some((session, reader, writer)));
        }
    }
    Err(violation("options without end"))
}

/// A length-prefixed string and what follows it.
fn string(bytes: &[u8]) -> Option<(&[u8], &[u8])> {
    let length = u32_at(bytes, 0)? as usize;
    if length > STRING_BYTES_MAX {
        return None;
    }
    bytes.get(4..)?.split_at_checked(length)
}

/// Name and queries of a meta context option.
pub fn meta_query(body: &[u8]) -> Option<(&[u8], Vec<String>)> {
    let (name, rest) = string(body)?;
    let count = u32_at(rest, 0)?;
    let mut rest = rest.get(4..)?;
    let mut queries = Vec::new();
    for _ in 0..count {
        let (query, after) = string(rest)?;
        queries.push(String::from_utf8_lossy(query).into_owned());
        rest = after;
    }
    rest.is_empty().then_some((name, queries))
}

/// Name and kinds of an NBD_OPT_INFO or NBD_OPT_GO.
pub fn info_query(body: &[u8]) -> Option<(&[u8], Vec<u16>)> {
    let (name, rest) = string(body)?;
    let count = usize::from(u16_at(rest, 0)?);
    let kinds: Option<Vec<u16>> = (0..count).map(|index| u16_at(rest, 2 + 2 * index)).collect();
    (rest.len() == 2 + 2 * count).then_some((name, kinds?))
}

impl Handshake<'_> {
    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) {
        self.unsent.extend_from_slice(&option_reply(option, kind, data));
    }

    async fn send(&mut self, writer: &mut (dyn AsyncWrite + Send + Unpin)) -> io::Result<()> {
        writer.write_all(&self.unsent).await?;
        self.unsent.clear();
        writer.flush().await
    }

    /// Options that do not end the handshake.
    async fn answer(&mut self, kind: Option<OptionKind>, code: u32, body: &[u8]) {
        match kind {
            Some(OptionKind::Info) => {
                self.info(code, body, false).await;
            }
            Some(OptionKind::List) => self.list(code, body).await,
            Some(OptionKind::StructuredReply) => self.choose_style(code, body, ReplyStyle::Structured),
            Some(OptionKind::ExtendedHeaders) => self.choose_style(code, body, ReplyStyle::Extended),
            Some(OptionKind::ListMetaContext) => self.meta_contexts(code, body, true).await,
            Some(OptionKind::SetMetaContext) => self.meta_contexts(code, body, false).await,
            _ => self.reply(code, reply::ERR_UNSUP, b""),
        }
    }

    /// What an export can do, as flags.
    fn flags(&self, export: &Export) -> u16 {
        use export_flag as f;
        let mut flags = f::HAS_FLAGS | f::SEND_FLUSH | f::SEND_FUA | f::SEND_CACHE;
        // Every connection to a throw-away overlay has one of its own.
        if !export.is_overlay() {
            flags |= f::CAN_MULTI_CONN;
        }
        if export.is_read_only() {
            flags |= f::READ_ONLY;
        } else {
            flags |= f::SEND_TRIM | f::SEND_WRITE_ZEROES | f::SEND_FAST_ZERO;
        }
        if self.style != ReplyStyle::Simple {
            flags |= f::SEND_DF;
        }
        flags
    }

    async fn open(&mut self, name: &[u8]) -> Result<Arc<Export>, VolumeError> {
        if let Some(export) = self.opened.as_ref().filter(|export| export.name == name) {
            return Ok(export.clone());
        }
        let export = export::open(self.data, name).await?;
        self.opened = Some(export.clone());
        Ok(export)
    }

    /// The export, or the refusal is sent.
    async fn open_for(&mut self, option: u32, name: &[u8]) -> Option<Arc<Export>> {
        match self.open(name).await {
            Ok(export) => Some(export),
            Err(error) => {
                let shown = String::from_utf8_lossy(name).into_owned();
                let (kind, text) = match error {
                    VolumeError::Refused(_) => (reply::ERR_UNKNOWN, format!("no volume `{shown}`: see `dog vdi list`")),
                    other => (reply::ERR_SHUTDOWN, format!("`{shown}` cannot be served now: {other}")),
                };
                self.reply(option, kind, text.as_bytes());
                None
            }
        }
    }

    fn session(&mut self, export: Arc<Export>) -> Session {
        let contexts = self.contexts.take().filter(|(name, _)| *name == export.name);
        Session { export, style: self.style, contexts: contexts.map(|(_, contexts)| contexts).unwrap_or_default() }
    }

    /// NBD_OPT_EXPORT_NAME has no way to refuse but to hang up.
    async fn export_name(&mut self, name: &[u8], wants_zeroes: bool) -> io::Result<Session> {
        let export = self.open(name).await.map_err(|error| violation(&error.to_string()))?;
        let mut answer = BytesMut::new();
        answer.put_u64(export.disk.size_bytes());
        answer.put_u16(self.flags(&export));
        if wants_zeroes {
            answer.put_bytes(0, 124);
        }
        self.unsent.extend_from_slice(&answer);
        Ok(self.session(export))
    }

    async fn info(&mut self, option: u32, body: &[u8], is_go: bool) -> Option<Session> {
        let Some((name, kinds)) = info_query(body) else {
            self.reply(option, reply::ERR_INVALID, b"");
            return None;
        };
        let export = self.open_for(option, name).await?;
        let mut size = BytesMut::new();
        size.put_u16(info::EXPORT);
        size.put_u64(export.disk.size_bytes());
        size.put_u16(self.flags(&export));
        self.reply(option, reply::INFO, &size);
        if kinds.contains(&info::NAME) {
            self.reply(option, reply::INFO, &[&info::NAME.to_be_bytes(), name].concat());
        }
        if kinds.contains(&info::DESCRIPTION) {
            let text = export.description().as_bytes();
            self.reply(option, reply::INFO, &[&info::DESCRIPTION.to_be_bytes(), text].concat());
        }
        let mut blocks = BytesMut::new();
        blocks.put_u16(info::BLOCK_SIZE);
        blocks.put_u32(BLOCK_BYTES.0);
        blocks.put_u32(BLOCK_BYTES.1);
        blocks.put_u32(PAYLOAD_BYTES_MAX);
        self.reply(option, reply::INFO, &blocks);
        self.reply(option, reply::ACK, b"");
        is_go.then(|| self.session(export))
    }

    async fn list(&mut self, option: u32, body: &[u8]) {
        if !body.is_empty() {
            self.reply(option, reply::ERR_INVALID, b"");
            return;
        }
        // What was made before the question is in the answer, whichever node it was made through.
        let Ok(state) = self.data.cluster().barrier().await else {
            self.reply(option, reply::ERR_SHUTDOWN, b"the cluster's order cannot be reached");
            return;
        };
        for name in export::list(&state) {
            let length = (name.len() as u32).to_be_bytes();
            self.reply(option, reply::SERVER, &[&length[..], &name].concat());
        }
        self.reply(option, reply::ACK, b"");
    }

    fn choose_style(&mut self, option: u32, body: &[u8], style: ReplyStyle) {
        // Extended headers include structured replies; the way back does not exist.
        if !body.is_empty() || (style == ReplyStyle::Structured && self.style == ReplyStyle::Extended) {
            self.reply(option, reply::ERR_INVALID, b"");
            return;
        }
        self.style = style;
        self.reply(option, reply::ACK, b"");
    }

    async fn meta_contexts(&mut self, option: u32, body: &[u8], is_listing: bool) {
        if !is_listing {
            self.contexts = None;
        }
        let query = meta_query(body).filter(|_| is_listing || self.style != ReplyStyle::Simple);
        let Some((name, queries)) = query else {
            self.reply(option, reply::ERR_INVALID, b"");
            return;
        };
        let Some(export) = self.open_for(option, name).await else { return };
        let found = contexts::matching(&self.data.view().state, &export, &queries, is_listing);
        let numbered: Numbered = (1..).zip(found).collect();
        for (number, context) in &numbered {
            let number = if is_listing { 0 } else { *number };
            let answer = [&number.to_be_bytes()[..], context.name().as_bytes()].concat();
            self.reply(option, reply::META_CONTEXT, &answer);
        }
        self.reply(option, reply::ACK, b"");
        if !is_listing {
            self.contexts = Some((name.to_vec(), numbered));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn with_length(text: &[u8]) -> Vec<u8> {
        [&(text.len() as u32).to_be_bytes()[..], text].concat()
    }

    #[test]
    fn queries_are_cut_at_their_lengths() {
        let body =
            [with_length(b"disk"), 2_u32.to_be_bytes().to_vec(), with_length(b"base:"), with_length(b"")].concat();
        assert_eq!(meta_query(&body), Some((&b"disk"[..], vec!["base:".to_string(), String::new()])));
        for length in 0..body.len() {
            assert_eq!(meta_query(&body[..length]), None, "cut at {length}");
        }
        let endless = [with_length(b"disk"), u32::MAX.to_be_bytes().to_vec()].concat();
        assert_eq!(meta_query(&endless), None);
        let info = [with_length(b"disk"), vec![0, 1, 0, 3]].concat();
        assert_eq!(info_query(&info), Some((&b"disk"[..], vec![3])));
        assert_eq!(info_query(&info[..info.len() - 1]), None);
    }
}
