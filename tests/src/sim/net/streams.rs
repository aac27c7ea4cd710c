//! Connections: two pipes, one each way, and how they begin and end.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex};
use std::task::{Context, Poll, Waker};

use sheep::world::net::Connection;

use super::doors::{PipeReader, PipeWriter};
use super::{Event, Leftovers, Port, Process, RETRY_FIRST_MS, RETRY_LAST_MS, SYN_RETRY_MS, State, address};

/// Bytes that a sender may be ahead of its reader.
const WINDOW_BYTES: usize = 1 << 20;

enum Segment {
    Bytes(Vec<u8>),
    /// The sender will send no more.
    End,
    /// The sender's process is gone.
    Reset,
}

/// One direction of a connection. Its twin, the other one, has the number that differs in the last bit.
pub(super) struct Pipe {
    pub from: Process,
    pub to: Process,
    /// On their way, with the time of their arrival.
    flight: VecDeque<(u64, Segment)>,
    flight_bytes: usize,
    retry_ms: u64,
    /// Arrived and not read.
    arrived: VecDeque<u8>,
    has_ended: bool,
    is_broken: bool,
    reader: Option<Waker>,
    writer: Option<Waker>,
    is_reader_gone: bool,
    is_writer_gone: bool,
}

impl Pipe {
    fn new(from: Process, to: Process) -> Pipe {
        Pipe {
            from,
            to,
            flight: VecDeque::new(),
            flight_bytes: 0,
            retry_ms: RETRY_FIRST_MS,
            arrived: VecDeque::new(),
            has_ended: false,
            is_broken: false,
            reader: None,
            writer: None,
            is_reader_gone: false,
            is_writer_gone: false,
        }
    }

    fn wakers(&mut self) -> Vec<Waker> {
        self.reader.take().into_iter().chain(self.writer.take()).collect()
    }
}

impl State {
    /// Both ends of a new connection: the dialer's and the listener's.
    fn connection(
        &mut self,
        shared: &Arc<Mutex<State>>,
        from: Process,
        to: Process,
        seen: [String; 2],
    ) -> [Connection; 2] {
        let id = self.next_pipe;
        self.next_pipe += 2;
        self.pipes.insert(id, Pipe::new(from, to));
        self.pipes.insert(id + 1, Pipe::new(to, from));
        let [listener, dialer] = seen;
        let end = |reads, writes, peer| Connection {
            reader: Box::new(PipeReader::new(shared.clone(), reads)),
            writer: Box::new(PipeWriter::new(shared.clone(), writes)),
            peer,
        };
        [end(id + 1, id, listener), end(id, id + 1, dialer)]
    }

    pub(super) fn send(&mut self, id: u64, bytes: &[u8], context: &Context<'_>) -> Poll<io::Result<usize>> {
        let Some(pipe) = self.pipes.get_mut(&id) else { return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())) };
        if pipe.is_broken {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        let room = WINDOW_BYTES.saturating_sub(pipe.flight_bytes + pipe.arrived.len());
        if room == 0 {
            pipe.writer = Some(context.waker().clone());
            return Poll::Pending;
        }
        let count = room.min(bytes.len());
        self.put(id, Segment::Bytes(bytes[..count].to_vec()));
        Poll::Ready(Ok(count))
    }

    pub(super) fn end(&mut self, id: u64) {
        if self.pipes.get(&id).is_some_and(|pipe| !pipe.is_writer_gone) {
            self.put(id, Segment::End);
            if let Some(pipe) = self.pipes.get_mut(&id) {
                pipe.is_writer_gone = true;
            }
        }
    }

    fn put(&mut self, id: u64, segment: Segment) {
        let (from, to) = match self.pipes.get(&id) {
            Some(pipe) => (pipe.from, pipe.to),
            None => return,
        };
        if !self.may_send(from) {
            return;
        }
        let mut due = self.now + self.latency(from.host, to.host);
        if self.is_lost(from.host, to.host) {
            due += RETRY_FIRST_MS;
        }
        let Some(pipe) = self.pipes.get_mut(&id) else { return };
        due = pipe.flight.back().map_or(due, |(last, _)| due.max(*last));
        if let Segment::Bytes(bytes) = &segment {
            pipe.flight_bytes += bytes.len();
        }
        pipe.flight.push_back((due, segment));
        self.schedule(due, Event::Pipe(id));
    }

    pub(super) fn receive(
        &mut self,
        id: u64,
        buffer: &mut tokio::io::ReadBuf<'_>,
        context: &Context<'_>,
    ) -> Poll<io::Result<()>> {
        let Some(pipe) = self.pipes.get_mut(&id) else { return Poll::Ready(Ok(())) };
        if !pipe.arrived.is_empty() {
            let count = pipe.arrived.len().min(buffer.remaining());
            let (front, back) = pipe.arrived.as_slices();
            let first = count.min(front.len());
            buffer.put_slice(&front[..first]);
            buffer.put_slice(&back[..count - first]);
            pipe.arrived.drain(..count);
            if let Some(writer) = pipe.writer.take() {
                writer.wake();
            }
            return Poll::Ready(Ok(()));
        }
        if pipe.is_broken {
            return Poll::Ready(Err(io::ErrorKind::ConnectionReset.into()));
        }
        if pipe.has_ended {
            return Poll::Ready(Ok(()));
        }
        pipe.reader = Some(context.waker().clone());
        Poll::Pending
    }

    /// The reading end is closed: what still comes is answered by a reset.
    pub(super) fn close_reader(&mut self, id: u64) {
        let Some(pipe) = self.pipes.get_mut(&id) else { return };
        pipe.is_reader_gone = true;
        pipe.arrived.clear();
        self.forget_finished(id);
    }

    /// A connection of which neither end can learn anything more.
    fn forget_finished(&mut self, id: u64) {
        let is_over =
            |pipe: &Pipe| pipe.is_reader_gone && pipe.is_writer_gone && (pipe.is_broken || pipe.flight.is_empty());
        let (one, other) = (id & !1, id | 1);
        if self.pipes.get(&one).is_none_or(is_over) && self.pipes.get(&other).is_none_or(is_over) {
            self.pipes.remove(&one);
            self.pipes.remove(&other);
        }
    }

    pub(super) fn deliver_stream(&mut self, id: u64) -> Leftovers {
        let mut wakers = Vec::new();
        while let Some(pipe) = self.pipes.get(&id) {
            let (from, to) = (pipe.from, pipe.to);
            if pipe.flight.front().is_none_or(|(due, _)| *due > self.now) {
                break;
            }
            if !self.is_open(from.host, to.host) {
                self.retry(id);
                break;
            }
            let is_heard = self.is_alive(to) && !pipe.is_reader_gone;
            let Some(pipe) = self.pipes.get_mut(&id) else { break };
            pipe.retry_ms = RETRY_FIRST_MS;
            let Some((_, segment)) = pipe.flight.pop_front() else { break };
            match segment {
                Segment::Bytes(bytes) if is_heard => {
                    pipe.flight_bytes -= bytes.len();
                    pipe.arrived.extend(&bytes);
                    let hash = bytes.len() as u64;
                    self.note(id << 24 | hash);
                }
                Segment::Bytes(_) => {
                    // Whoever sends to nobody is told.
                    let due = self.now + self.latency(to.host, from.host);
                    self.schedule(due, Event::Reset(id));
                    break;
                }
                Segment::End => pipe.has_ended = true,
                Segment::Reset => {
                    wakers.extend(self.break_pipe(id));
                    break;
                }
            }
            if let Some(pipe) = self.pipes.get_mut(&id) {
                wakers.extend(pipe.reader.take());
            }
        }
        self.forget_finished(id);
        (wakers, Vec::new())
    }

    /// Nothing passes: the head of the pipe is tried again later, and everything behind it.
    fn retry(&mut self, id: u64) {
        let now = self.now;
        let Some(pipe) = self.pipes.get_mut(&id) else { return };
        let at = now + pipe.retry_ms;
        pipe.retry_ms = (pipe.retry_ms * 2).min(RETRY_LAST_MS);
        for (due, _) in &mut pipe.flight {
            *due = (*due).max(at);
        }
        self.schedule(at, Event::Pipe(id));
    }

    pub(super) fn deliver_reset(&mut self, id: u64) -> Leftovers {
        let Some(pipe) = self.pipes.get(&id) else { return Default::default() };
        if !self.is_open(pipe.to.host, pipe.from.host) {
            // It is told again when it sends again.
            let at = self.now + RETRY_LAST_MS;
            self.schedule(at, Event::Reset(id));
            return Default::default();
        }
        (self.break_pipe(id), Vec::new())
    }

    /// Both directions end with an error, at both ends.
    pub(super) fn break_pipe(&mut self, id: u64) -> Vec<Waker> {
        let mut wakers = Vec::new();
        for id in [id & !1, id | 1] {
            if let Some(pipe) = self.pipes.get_mut(&id) {
                pipe.is_broken = true;
                pipe.flight.clear();
                pipe.flight_bytes = 0;
                wakers.extend(pipe.wakers());
            }
        }
        self.note(id);
        self.forget_finished(id);
        wakers
    }

    /// The machine ends the connections of a process that is gone.
    pub(super) fn reset_all_of(&mut self, process: Process) {
        let sending: Vec<u64> = self.pipes.iter().filter(|(_, pipe)| pipe.from == process).map(|(id, _)| *id).collect();
        for id in sending {
            let Some(pipe) = self.pipes.get(&id) else { continue };
            let (from, to) = (pipe.from.host, pipe.to.host);
            let due = self.now + self.latency(from, to);
            let Some(pipe) = self.pipes.get_mut(&id) else { continue };
            let due = pipe.flight.back().map_or(due, |(last, _)| due.max(*last));
            pipe.flight.push_back((due, Segment::Reset));
            self.schedule(due, Event::Pipe(id));
        }
    }

    /// The machine is off: what was in its buffers is gone, and nobody is told but its own clients.
    pub(super) fn forget_all_of(&mut self, process: Process) -> Vec<Waker> {
        let mut wakers = Vec::new();
        let sending: Vec<u64> = self.pipes.iter().filter(|(_, pipe)| pipe.from == process).map(|(id, _)| *id).collect();
        for id in sending {
            let Some(pipe) = self.pipes.get_mut(&id) else { continue };
            pipe.flight.clear();
            pipe.flight_bytes = 0;
            if pipe.to.host == process.host {
                wakers.extend(self.break_pipe(id));
            }
        }
        wakers
    }

    /// Nobody listens and nobody asks any more. Gives what must not be dropped in here.
    pub(super) fn forget_listening(&mut self, process: Process) -> impl Sized + use<> {
        let host = &mut self.hosts[process.host];
        host.sockets.clear();
        let listeners = std::mem::take(&mut host.listeners);
        let (ended, kept): (BTreeMap<_, _>, BTreeMap<_, _>) =
            std::mem::take(&mut self.attempts).into_iter().partition(|(_, attempt)| attempt.from == process);
        self.attempts = kept;
        (listeners, ended)
    }

    pub(super) fn attempt(&mut self, from: Process, to: usize, port: Port) -> u64 {
        let id = self.next_attempt;
        self.next_attempt += 1;
        let attempt = super::Attempt { from, to, port, retry_ms: SYN_RETRY_MS, outcome: None, waker: None };
        self.attempts.insert(id, attempt);
        if self.may_send(from) {
            // Nobody answers at an address that no host has: a rotten list of peers may name one.
            let latency = if to < self.hosts.len() { self.latency(from.host, to) } else { SYN_RETRY_MS };
            self.schedule(self.now + latency, Event::Syn(id));
        }
        id
    }

    fn retry_attempt(&mut self, id: u64) {
        let now = self.now;
        let Some(attempt) = self.attempts.get_mut(&id) else { return };
        let at = now + attempt.retry_ms;
        attempt.retry_ms *= 2;
        self.schedule(at, Event::Syn(id));
    }

    pub(super) fn deliver_syn(&mut self, id: u64) -> Leftovers {
        let Some(attempt) = self.attempts.get(&id) else { return Default::default() };
        let (from, to, port) = (attempt.from, attempt.to, attempt.port.clone());
        if to == from.host && !self.hosts[to].is_up {
            self.schedule(self.now, Event::SynAck(id, None));
            return Default::default();
        }
        if to >= self.hosts.len() || !self.is_open(from.host, to) || !self.is_open(to, from.host) {
            self.retry_attempt(id);
            return Default::default();
        }
        if self.is_lost(from.host, to) {
            self.retry_attempt(id);
            return Default::default();
        }
        self.note(id << 8 | to as u64);
        let due = self.now + self.latency(to, from.host);
        let host = &mut self.hosts[to];
        if !host.is_running || !host.listeners.contains_key(&port) {
            self.schedule(due, Event::SynAck(id, None));
            return Default::default();
        }
        let listening = Process { host: to, life: host.life };
        host.next_port = host.next_port.wrapping_add(1).max(40_000);
        let source = host.next_port;
        let seen = match &port {
            Port::Tcp(port) => [
                SocketAddr::new(address(to), *port).to_string(),
                SocketAddr::new(address(from.host), source).to_string(),
            ],
            Port::Unix(_) => ["unix socket".to_owned(), "unix socket".to_owned()],
        };
        let Some(shared) = self.shared.upgrade() else { return Default::default() };
        let [dialer, listener] = self.connection(&shared, from, listening, seen);
        self.schedule(due, Event::SynAck(id, Some(dialer)));
        let Some(state) = self.hosts[to].listeners.get_mut(&port) else { return (Vec::new(), vec![listener]) };
        state.waiting.push_back(listener);
        (state.waker.take().into_iter().collect(), Vec::new())
    }

    pub(super) fn deliver_syn_ack(&mut self, id: u64, connection: Option<Connection>) -> Leftovers {
        let Some(attempt) = self.attempts.get_mut(&id) else {
            return (Vec::new(), connection.into_iter().collect());
        };
        attempt.outcome = Some(connection.ok_or_else(|| io::ErrorKind::ConnectionRefused.into()));
        (attempt.waker.take().into_iter().collect(), Vec::new())
    }
}
