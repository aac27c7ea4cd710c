//! One client connection: decode, look at the fast cases, run the others side by side, answer as they end.
//!
//! Write path 1 of 6; next: data/gateway/write.rs. A client that sends faster than it is served is no longer read once
//! `UNDER_WAY_BYTES_MAX` are under way; bytes that are no request end the connection and harm nobody else.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::frame::payload_bytes;
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{HEADER_BYTES, Request};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use super::reply::Answer;
use super::{Front, locks, ops, restores};
use crate::data::client::Client;
use crate::data::gateway::write::{self, Tries};
use crate::data::traffic::{Counted, Side, Work};
use crate::world::frames::{FrameReader, FrameSender};
use crate::world::net::Connection;

/// Request and answer bytes under way per connection: sixteen requests of one 4 MiB object, as QEMU never has more.
const UNDER_WAY_BYTES_MAX: usize = 64 << 20;
/// How long to wait before looking again whether a client has read its answers.
const QUEUE_PAUSE: Duration = Duration::from_millis(1);
/// What a request costs besides its payload: its task.
const REQUEST_COST_BYTES: usize = 4096;
/// The largest object that the server keeps for clients; larger requests end the connection.
const OBJECT_BYTES_MAX: usize = 64 << 20;

/// Serves a connection to its end.
pub async fn serve(front: Front, connection: Connection) {
    let connection_number = front.locks.arrived(&connection.peer);
    let client = Client::default();
    let front = Front { restores: Arc::default(), connection: connection_number, client, ..front };
    serve_requests(&front, connection).await;
    front.client.leave();
    locks::left(&front);
    restores::give_up(&front).await;
}

async fn serve_requests(front: &Front, connection: Connection) {
    let peer = connection.peer;
    let mut reader = FrameReader::new(connection.reader);
    let sender = FrameSender::start(connection.writer);
    let room = Arc::new(Semaphore::new(UNDER_WAY_BYTES_MAX));
    let (mut is_silent, mut wrote_to) = (true, None);
    loop {
        let header = match reader.header::<HEADER_BYTES>().await {
            Ok(Some(header)) => header,
            Ok(None) => return,
            Err(error) => {
                tracing::debug!("the connection of client {peer} broke: {error}");
                return;
            }
        };
        let request = Request::decode(&header);
        let length = match payload_bytes(&request, OBJECT_BYTES_MAX) {
            Ok(length) => length,
            Err(error) => {
                tracing::warn!("client {peer} sent what is no request of this protocol ({error}): disconnected");
                return;
            }
        };
        let answer_bytes = qemu_proto::frame::answer_bytes_max(&request, OBJECT_BYTES_MAX);
        let cost = (length + answer_bytes + REQUEST_COST_BYTES).min(UNDER_WAY_BYTES_MAX);
        // The semaphore is never closed.
        let Ok(permit) = room.clone().acquire_many_owned(cost as u32).await else { return };
        let payload = match reader.payload(length).await {
            Ok(payload) => payload,
            Err(error) => {
                tracing::debug!("the connection of client {peer} broke in the middle of a request: {error}");
                return;
            }
        };
        // One that does not read its answers is not read either.
        while sender.queued_bytes() > UNDER_WAY_BYTES_MAX {
            front.data.world().clock.sleep(QUEUE_PAUSE).await;
            if sender.is_closed() {
                return;
            }
        }
        let writes_to = ops::written_vdi(&request);
        if is_silent || (writes_to.is_some() && writes_to != wrote_to) {
            locks::note(front, front.connection, writes_to);
            is_silent = false;
            wrote_to = writes_to.or(wrote_to);
        }
        if let Some(answer) = ops::answer_now(front, &request) {
            front.data.traffic().answered_at_once(Side::Clients, answer.payload.len());
            send(&sender, answer);
            continue;
        }
        let counted = work_of(&request).map(|work| front.data.traffic().begin(Side::Clients, work, length));
        let under_way = UnderWay { front: front.clone(), sender: sender.clone(), request, counted, _room: permit };
        under_way.begin(payload);
    }
}

/// A request under way.
struct UnderWay {
    front: Front,
    sender: FrameSender,
    request: Request,
    counted: Option<Counted>,
    /// What it takes of the connection's bytes under way.
    _room: OwnedSemaphorePermit,
}

impl UnderWay {
    /// Sends a write that need not wait and has it answered by whoever brings the last holder's answer; the rest is a task's.
    fn begin(self, payload: Bytes) {
        let Some((object, lease, ready)) = ops::write_ready(&self.front, &self.request, &payload) else {
            tokio::spawn(self.run(payload, Tries::default()));
            return;
        };
        let data = self.front.data.clone();
        write::send_now(&data, &object, &lease, ready, move |result, tries| {
            if result.is_ok() && self.front.data.cluster().fence().is_open() {
                let answer = ops::done(&self.front, &self.request);
                self.answer(answer);
            } else {
                tokio::spawn(self.run(payload, tries));
            }
        });
    }

    /// Carries it out and answers it. `tries` is what was done of a write.
    async fn run(self, payload: Bytes, tries: Tries) {
        let answer = ops::run(&self.front, &self.request, payload, tries).await;
        self.answer(answer);
    }

    fn answer(self, answer: Answer) {
        if let Some(counted) = &self.counted {
            counted.answered(answer.payload.len());
        }
        send(&self.sender, answer);
    }
}

/// What a request counts as; only I/O does.
fn work_of(request: &Request) -> Option<Work> {
    match request.op()? {
        Opcode::ReadObj => Some(Work::Read),
        Opcode::WriteObj | Opcode::CreateAndWriteObj => Some(Work::Write),
        Opcode::DiscardObj => Some(Work::Remove),
        Opcode::FlushVdi => Some(Work::Flush),
        _ => None,
    }
}

fn send(sender: &FrameSender, answer: Answer) {
    assert_eq!(answer.response.data_length as usize, answer.payload.len(), "the header announces the payload");
    // A broken connection is noticed by its reader.
    let _ = sender.send(Bytes::copy_from_slice(&answer.response.encode()), answer.payload);
}
