//! Requests of one connection: side by side, answered as they end.
//!
//! Bytes under way are bounded; a client that sends faster than it is served, or does not take its answers, is no longer
//! read. Bytes that are no request end the connection and harm nobody else.

use std::io;
use std::sync::Arc;

use bytes::{BufMut, Bytes, BytesMut};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::contexts::Context;
use super::handshake::{PAYLOAD_BYTES_MAX, Session};
use super::wire::{
    ChunkKind, Command, CommandKind, EXTENDED_REQUEST_BYTES, Errno, REQUEST_BYTES, ReplyStyle, chunk, command_flag,
    done_reply, error_reply, simple_reply,
};
use crate::data::gateway::write::Tries;
use crate::data::traffic::{Counted, Side, Work};
use crate::data::virtual_disk::{DiskError, Part, Sent, joined};
use crate::world::frames::{FrameReader, FrameSender};

/// Request and answer bytes under way per connection: two of the largest requests.
const UNDER_WAY_BYTES_MAX: usize = 2 * PAYLOAD_BYTES_MAX as usize;
/// What a request costs besides its payload: its task.
const REQUEST_COST_BYTES: usize = 4096;
/// What a status request costs for each object of its range, while it is answered.
const STATUS_COST_BYTES: u64 = 64;
/// Extents per context of one BLOCK_STATUS answer.
const EXTENTS_MAX: usize = 1 << 16;

/// What went wrong, in the protocol's numbers and in words.
struct Failure(Errno, String);

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Failure {
        let errno = match error {
            DiskError::Gone | DiskError::Failed => Errno::Io,
            DiskError::ReadOnly => Errno::Perm,
            DiskError::OutOfRange => Errno::Inval,
            DiskError::NoSpace => Errno::NoSpc,
        };
        Failure(errno, error.to_string())
    }
}

/// Serves an export until the client leaves.
pub async fn serve(session: Session, mut reader: FrameReader, sender: FrameSender) -> io::Result<()> {
    let session = Arc::new(session);
    let ended = serve_commands(&session, &mut reader, &sender).await;
    if !matches!(ended, Ok(End::Disconnected)) {
        session.export.disk.client().leave();
    }
    ended.map(drop)
}

/// How a connection ended.
enum End {
    /// By the client's word: everything that it sent is to be done (NBD, "Terminating the transmission phase").
    Disconnected,
    /// In the middle.
    Broken,
}

async fn serve_commands(session: &Arc<Session>, reader: &mut FrameReader, sender: &FrameSender) -> io::Result<End> {
    let room = Arc::new(Semaphore::new(UNDER_WAY_BYTES_MAX));
    loop {
        let Some(command) = next(session, reader).await? else { return Ok(End::Broken) };
        let carries_payload = command.kind == Some(CommandKind::Write)
            || (session.style == ReplyStyle::Extended && command.has(command_flag::PAYLOAD_LEN));
        if carries_payload && command.length > u64::from(PAYLOAD_BYTES_MAX) {
            return Err(io::Error::new(io::ErrorKind::InvalidData, "a payload longer than was agreed on"));
        }
        if command.kind == Some(CommandKind::Disconnect) {
            // Everything under way is finished by its own task; answers are not waited for.
            return Ok(End::Disconnected);
        }
        let is_read = command.kind == Some(CommandKind::Read);
        let carried = match command.kind {
            _ if carries_payload || is_read => command.length.min(u64::from(PAYLOAD_BYTES_MAX)),
            Some(CommandKind::BlockStatus) => session.export.disk.object_count(command.length) * STATUS_COST_BYTES,
            _ => 0,
        };
        let cost = (carried as usize + REQUEST_COST_BYTES).min(UNDER_WAY_BYTES_MAX);
        // The semaphore is never closed.
        let Ok(room) = room.clone().acquire_many_owned(cost as u32).await else { return Ok(End::Broken) };
        let payload = if carries_payload { reader.payload(command.length as usize).await? } else { Bytes::new() };
        while sender.queued_bytes() > UNDER_WAY_BYTES_MAX {
            session.export.disk.pause().await;
            if sender.is_closed() {
                return Ok(End::Broken);
            }
        }
        if is_read
            && command.length <= u64::from(PAYLOAD_BYTES_MAX)
            && let Some(bytes) = session.export.disk.read_now(command.offset, command.length as usize)
        {
            session.export.disk.traffic().answered_at_once(Side::Clients, bytes.len());
            send_data(session, sender, &command, command.offset, bytes, true);
            continue;
        }
        let traffic = session.export.disk.traffic();
        let counted = work_of(&command).map(|work| traffic.begin(Side::Clients, work, payload.len()));
        let request = Request { session: session.clone(), sender: sender.clone(), command, counted, _room: room };
        if request.command.kind == Some(CommandKind::Write) {
            request.write(payload);
        } else {
            tokio::spawn(request.serve(payload, Tries::default()));
        }
    }
}

/// A request under way.
struct Request {
    session: Arc<Session>,
    sender: FrameSender,
    command: Command,
    counted: Option<Counted>,
    /// What it takes of the connection's bytes under way.
    _room: OwnedSemaphorePermit,
}

impl Request {
    /// Sends a write at once and has it answered by whoever brings the last holder's answer; in a task if it has to wait.
    fn write(self, payload: Bytes) {
        let session = self.session.clone();
        let (offset, fua, bytes) = (self.command.offset, self.command.has(command_flag::FUA), payload.clone());
        let told = move |sent| match sent {
            Sent::Done => self.answer(Ok(Answered::NotYet)),
            Sent::Undecided(tries) => drop(tokio::spawn(self.serve(payload, tries))),
        };
        if let Err(told) = session.export.disk.write_now(offset, &bytes, fua, told) {
            told(Sent::Undecided(Tries::default()));
        }
    }

    /// Carries it out, when the cluster serves and the limits allow it, and answers it. `tries` is what was done of a write.
    async fn serve(self, payload: Bytes, tries: Tries) {
        let disk = &self.session.export.disk;
        tokio::select! {
            biased;
            () = disk.await_service() => {}
            () = disk.client().gone() => return,
        }
        if self.counted.is_some() && self.command.kind != Some(CommandKind::Flush) {
            let moves = !payload.is_empty() || self.command.kind == Some(CommandKind::Read);
            disk.pass_limits(if moves { self.command.length as usize } else { 0 }).await;
        }
        let result = run(&self.session, &self.sender, &self.command, payload, tries).await;
        self.answer(result);
    }

    /// Tells the client, of a success only if [`run`] has not.
    fn answer(self, result: Result<Answered, Failure>) {
        let Request { session, sender, command, counted, .. } = self;
        match result {
            Ok(answered) => {
                if answered == Answered::NotYet {
                    sender.send(done_reply(session.style, &command), Bytes::new());
                }
                if let Some(counted) = counted {
                    counted.answered(command.length as usize);
                }
            }
            Err(Failure(errno, text)) => {
                sender.send(error_reply(session.style, &command, errno, &text), Bytes::new());
            }
        }
    }
}

/// Whether the client has its answer.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Answered {
    Yes,
    NotYet,
}

/// What a request counts as; only I/O does. Zeroes are a write without bytes.
fn work_of(command: &Command) -> Option<Work> {
    match command.kind? {
        CommandKind::Read => Some(Work::Read),
        CommandKind::Write | CommandKind::WriteZeroes => Some(Work::Write),
        CommandKind::Trim => Some(Work::Remove),
        CommandKind::Flush => Some(Work::Flush),
        CommandKind::BlockStatus | CommandKind::Cache | CommandKind::Disconnect => None,
    }
}

async fn next(session: &Session, reader: &mut FrameReader) -> io::Result<Option<Command>> {
    let decoded = if session.style == ReplyStyle::Extended {
        let Some(header) = reader.header::<EXTENDED_REQUEST_BYTES>().await? else { return Ok(None) };
        Command::decode(&header)
    } else {
        let Some(header) = reader.header::<REQUEST_BYTES>().await? else { return Ok(None) };
        Command::decode(&header)
    };
    decoded.map(Some).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a request"))
}

/// Carries a request out, and answers one that is answered with data.
async fn run(
    session: &Session,
    sender: &FrameSender,
    command: &Command,
    payload: Bytes,
    tries: Tries,
) -> Result<Answered, Failure> {
    let disk = &session.export.disk;
    let fua = command.has(command_flag::FUA);
    let writes = matches!(command.kind, Some(CommandKind::Write | CommandKind::WriteZeroes | CommandKind::Trim));
    let end = command.offset.checked_add(command.length);
    if command.kind != Some(CommandKind::Flush) && end.is_none_or(|end| end > disk.size_bytes()) {
        let errno = if writes { Errno::NoSpc } else { Errno::Inval };
        return Err(Failure(errno, "beyond the end of the export".to_string()));
    }
    match command.kind {
        Some(CommandKind::Read) => return read(session, sender, command).await.map(|()| Answered::Yes),
        Some(CommandKind::BlockStatus) => return block_status(session, sender, command).await.map(|()| Answered::Yes),
        Some(CommandKind::Write) => disk.write_on(command.offset, payload, fua, tries).await?,
        Some(CommandKind::Flush) => disk.flush().await?,
        // Holes read as zeros here, and the space of whole objects comes back; NO_HOLE is a wish that thin volumes do not
        // grant. Whole objects are fast, parts of them are written.
        Some(CommandKind::WriteZeroes)
            if command.has(command_flag::FAST_ZERO) && !disk.is_whole_objects(command.offset, command.length) =>
        {
            return Err(Failure(Errno::NotSup, "zeroes may take as long as a write".to_string()));
        }
        Some(CommandKind::WriteZeroes | CommandKind::Trim) => disk.zero(command.offset, command.length, fua).await?,
        // What is read is in the page cache of its node; there is no further cache to fill.
        Some(CommandKind::Cache) => {}
        Some(CommandKind::Disconnect) | None => {
            return Err(Failure(Errno::Inval, "no such request".to_string()));
        }
    }
    Ok(Answered::NotYet)
}

fn send_data(session: &Session, sender: &FrameSender, command: &Command, offset: u64, bytes: Bytes, is_last: bool) {
    if session.style == ReplyStyle::Simple {
        sender.send(simple_reply(command.cookie, None), bytes);
        return;
    }
    let head = offset.to_be_bytes();
    let header = chunk(session.style, command, ChunkKind::OffsetData, is_last, &head, bytes.len());
    sender.send(header, bytes);
}

async fn read(session: &Session, sender: &FrameSender, command: &Command) -> Result<(), Failure> {
    if command.length > u64::from(PAYLOAD_BYTES_MAX) {
        return Err(Failure(Errno::Inval, "longer than was agreed on".to_string()));
    }
    let parts = session.export.disk.read(command.offset, command.length).await?;
    if session.style == ReplyStyle::Simple || command.has(command_flag::DF) || parts.is_empty() {
        send_data(session, sender, command, command.offset, joined(parts), true);
        return Ok(());
    }
    let (count, mut offset) = (parts.len(), command.offset);
    for (number, part) in parts.into_iter().enumerate() {
        let is_last = number + 1 == count;
        match part {
            Part::Data(bytes) => {
                let length = bytes.len() as u64;
                send_data(session, sender, command, offset, bytes, is_last);
                offset += length;
            }
            Part::Hole(length) => {
                let mut head = BytesMut::new();
                head.put_u64(offset);
                head.put_u32(length as u32);
                let header = chunk(session.style, command, ChunkKind::OffsetHole, is_last, &head, 0);
                sender.send(header, Bytes::new());
                offset += length;
            }
        }
    }
    Ok(())
}

async fn block_status(session: &Session, sender: &FrameSender, command: &Command) -> Result<(), Failure> {
    if session.contexts.is_empty() || command.length == 0 {
        return Err(Failure(Errno::Inval, "no meta context was agreed on, or nothing was asked".to_string()));
    }
    let mut answers = Vec::new();
    for (number, context) in &session.contexts {
        answers.push(status_of(session, command, *number, context).await?);
    }
    let kind = match session.style {
        ReplyStyle::Extended => ChunkKind::BlockStatusExtended,
        _ => ChunkKind::BlockStatus,
    };
    let count = answers.len();
    for (index, answer) in answers.into_iter().enumerate() {
        let header = chunk(session.style, command, kind, index + 1 == count, &answer, 0);
        sender.send(header, Bytes::new());
    }
    Ok(())
}

/// The extents of one context, as a chunk has them.
async fn status_of(session: &Session, command: &Command, number: u32, context: &Context) -> Result<BytesMut, Failure> {
    let mut extents = context.extents(&session.export, command.offset, command.length).await?;
    extents.truncate(if command.has(command_flag::REQ_ONE) { 1 } else { EXTENTS_MAX });
    let mut answer = BytesMut::new();
    answer.put_u32(number);
    if session.style == ReplyStyle::Extended {
        answer.put_u32(extents.len() as u32);
        for (length, state) in extents {
            answer.put_u64(length);
            answer.put_u64(state);
        }
    } else {
        for (length, state) in extents {
            // A request's length has 32 bits, so no extent is longer.
            answer.put_u32(length as u32);
            answer.put_u32(state as u32);
        }
    }
    Ok(answer)
}
