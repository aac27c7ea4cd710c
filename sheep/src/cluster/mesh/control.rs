//! Requests and answers on one control connection: the dialer asks, the listener answers.
//!
//! Always holds:
//! 1. When the connection ends, everybody who waits for an answer hears of it at once.
//! 2. A connection without any byte from the other side for [`MeshTiming::silence`](super::MeshTiming) ends: the dialer pings
//!    when it has nothing to ask, so bytes go both ways on one that works.
//! 3. The listener holds a bounded number of requests of a connection; while they are all under way it reads no further.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use tokio::io::{AsyncRead, ReadBuf};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;

use super::frame::{BODY_BYTES_MAX, HEADER_BYTES, Header, Kind, Outgoing, write_frames};
use super::handshake::within;
use super::live::Cut;
use super::types::{MeshTiming, Peer, Rtt, Service, Standing, Unreachable};
use crate::world::World;
use crate::world::clock::Clock;
use crate::world::frames::FrameReader;
use crate::world::net::Connection;

/// Frames that wait to be written; whoever has more waits.
const QUEUE_FRAMES: usize = 64;
/// Requests of one member or keyholder that are under way here: more than a node that works ever has.
const REQUESTS_MAX: usize = 1024;
/// The same for a stranger, which only asks to be let in or hands over what format decided.
const STRANGER_REQUESTS_MAX: usize = 8;
/// The largest request of a stranger.
const STRANGER_BODY_BYTES_MAX: usize = 4 << 20;
/// Round trips that statistics are made of.
const RTT_COUNT: usize = 64;
/// Pings that wait for their pong; with one each half second none is older than the silence that ends the connection.
const PINGS_MAX: usize = 16;
/// Of a connection that carries something all the time, one ping in so many is sent.
const PINGS_SPARED: u32 = 8;

type Pending = BTreeMap<u64, oneshot::Sender<Bytes>>;

/// The dialer's end, for asking.
pub(super) struct Link {
    pub peer: Arc<Peer>,
    pub address: SocketAddr,
    pub cut: Arc<Cut>,
    outgoing: mpsc::Sender<Outgoing>,
    next_id: AtomicU64,
    /// `None` once the link is down.
    pending: Mutex<Option<Pending>>,
    pings: Mutex<Pings>,
    /// When a request was last handed to the connection, in monotonic nanoseconds.
    asked: AtomicU64,
    clock: Arc<dyn Clock>,
}

/// The dialer's end, for running the connection.
pub(super) struct LinkRunner {
    link: Arc<Link>,
    connection: Connection,
    queue: mpsc::Receiver<Outgoing>,
    world: World,
    timing: MeshTiming,
}

#[derive(Default)]
struct Pings {
    next_id: u64,
    /// Monotonic time of the last.
    last: Option<Duration>,
    /// Id and monotonic time of sending.
    under_way: VecDeque<(u64, Duration)>,
    /// The last ones, in microseconds.
    round_trips: VecDeque<u32>,
}

impl Link {
    /// Wraps a connection whose handshake is done.
    pub fn new(
        world: World,
        timing: MeshTiming,
        connection: Connection,
        cut: Arc<Cut>,
        peer: Arc<Peer>,
        address: SocketAddr,
    ) -> (Arc<Link>, LinkRunner) {
        let (outgoing, queue) = mpsc::channel(QUEUE_FRAMES);
        let link = Arc::new(Link {
            peer,
            address,
            cut,
            outgoing,
            next_id: AtomicU64::new(1),
            pending: Mutex::new(Some(BTreeMap::new())),
            pings: Mutex::new(Pings::default()),
            asked: AtomicU64::new(0),
            clock: world.clock.clone(),
        });
        (link.clone(), LinkRunner { link, connection, queue, world, timing })
    }

    /// Asks, and waits for the answer or for the end of the link.
    pub async fn call(&self, message: Vec<u8>) -> Result<Bytes, Unreachable> {
        if message.len() > BODY_BYTES_MAX {
            tracing::error!(
                "a request of {} bytes to node {} is longer than any may be",
                message.len(),
                self.peer.node
            );
            return Err(Unreachable);
        }
        let id = self.next_id.fetch_add(1, Ordering::Relaxed);
        let (sender, receiver) = oneshot::channel();
        self.lock_pending().as_mut().ok_or(Unreachable)?.insert(id, sender);
        // The caller may give up at any point.
        let _forget = ForgetOnDrop { link: self, id };
        let mut receiver = receiver;
        tokio::select! {
            sent = self.outgoing.send(Outgoing::new(Kind::Request, id, message.into())) => sent.map_err(|_| Unreachable)?,
            _ = &mut receiver => return Err(Unreachable),
        }
        self.asked.store(self.clock.monotonic().as_nanos() as u64, Ordering::Relaxed);
        receiver.await.map_err(|_| Unreachable)
    }

    /// Statistics of the last pings.
    pub fn rtt(&self) -> Option<Rtt> {
        let pings = self.pings.lock().unwrap_or_else(PoisonError::into_inner);
        let mut sorted: Vec<u32> = pings.round_trips.iter().copied().collect();
        drop(pings);
        sorted.sort_unstable();
        let sum: u64 = sorted.iter().map(|us| u64::from(*us)).sum();
        Some(Rtt {
            min_us: *sorted.first()?,
            mean_us: (sum / sorted.len() as u64) as u32,
            p99_us: sorted[(sorted.len() * 99).div_ceil(100) - 1],
        })
    }

    fn lock_pending(&self) -> std::sync::MutexGuard<'_, Option<Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Pings, unless the connection shows by itself that it works: something went out and something came in within
    /// `interval`. Every so often it does all the same, for the statistics.
    fn ping(&self, heard: &Heard, interval: Duration, now: Duration) {
        let is_recent = |at: Duration| now.saturating_sub(at) < interval;
        let asked = Duration::from_nanos(self.asked.load(Ordering::Relaxed));
        let is_busy = is_recent(asked) && is_recent(heard.at());
        let mut pings = self.pings.lock().unwrap_or_else(PoisonError::into_inner);
        if is_busy && pings.last.is_some_and(|last| now.saturating_sub(last) < interval * PINGS_SPARED) {
            return;
        }
        let id = pings.next_id;
        // A full queue is full of frames that show the other side just as well that somebody is here.
        if pings.under_way.len() < PINGS_MAX
            && self.outgoing.try_send(Outgoing::new(Kind::Ping, id, Bytes::new())).is_ok()
        {
            pings.next_id += 1;
            pings.last = Some(now);
            pings.under_way.push_back((id, now));
        }
    }

    fn pong(&self, id: u64, now: Duration) {
        let mut pings = self.pings.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(at) = pings.under_way.iter().position(|(sent, _)| *sent == id) else { return };
        let Some((_, sent)) = pings.under_way.remove(at) else { return };
        if pings.round_trips.len() == RTT_COUNT {
            pings.round_trips.pop_front();
        }
        pings.round_trips.push_back(u32::try_from(now.saturating_sub(sent).as_micros()).unwrap_or(u32::MAX));
    }

    fn answered(&self, id: u64, body: Bytes) {
        // An answer that nobody waits for any more was given up.
        if let Some(sender) = self.lock_pending().as_mut().and_then(|pending| pending.remove(&id)) {
            let _ = sender.send(body);
        }
    }
}

struct ForgetOnDrop<'a> {
    link: &'a Link,
    id: u64,
}

impl Drop for ForgetOnDrop<'_> {
    fn drop(&mut self) {
        if let Some(pending) = self.link.lock_pending().as_mut() {
            pending.remove(&self.id);
        }
    }
}

impl Drop for LinkRunner {
    /// However the connection ended, whoever waits for an answer hears it now.
    fn drop(&mut self) {
        self.queue.close();
        self.link.lock_pending().take();
    }
}

impl LinkRunner {
    /// Runs the connection until it ends.
    pub async fn run(mut self) -> io::Result<()> {
        let clock = self.world.clock.clone();
        let (mut reader, heard) = watched(&mut self.connection, &clock);
        tokio::select! {
            ended = read_answers(&mut reader, &self.link, &clock) => ended,
            ended = write_frames(&mut *self.connection.writer, &mut self.queue) => ended,
            () = ping(&self.link, &heard, self.timing.ping, &clock) => Ok(()),
            () = wait_for_silence(&heard, &self.timing, &clock) => Err(silent()),
        }
    }
}

async fn read_answers(reader: &mut FrameReader, link: &Link, clock: &Arc<dyn Clock>) -> io::Result<()> {
    loop {
        let Some(header) = reader.header::<HEADER_BYTES>().await? else { return Ok(()) };
        let header = Header::decode(&header, BODY_BYTES_MAX).ok_or_else(no_frame)?;
        let body = reader.payload(header.length).await?;
        match header.kind {
            Kind::Answer => link.answered(header.id, body),
            Kind::Pong => link.pong(header.id, clock.monotonic()),
            Kind::Request | Kind::Ping => return Err(no_frame()),
        }
    }
}

async fn ping(link: &Link, heard: &Heard, interval: Duration, clock: &Arc<dyn Clock>) {
    loop {
        link.ping(heard, interval, clock.monotonic());
        clock.beat(interval).await;
    }
}

/// The listener's end: answers until the connection ends.
pub(super) async fn serve(
    world: World,
    timing: MeshTiming,
    mut connection: Connection,
    peer: Arc<Peer>,
    service: Arc<dyn Service>,
) -> io::Result<()> {
    let clock = world.clock.clone();
    let (mut reader, heard) = watched(&mut connection, &clock);
    let (outgoing, mut queue) = mpsc::channel(QUEUE_FRAMES);
    let writer = &mut *connection.writer;
    let ended = tokio::select! {
        ended = answer(&mut reader, &outgoing, &peer, service) => ended,
        ended = write_frames(writer, &mut queue) => ended,
        () = wait_for_silence(&heard, &timing, &clock) => Err(silent()),
    };
    if ended.is_ok() {
        let closing = tokio::io::AsyncWriteExt::shutdown(writer);
        let _ = within(&world, timing.handshake, closing, "").await;
    }
    ended
}

async fn answer(
    reader: &mut FrameReader,
    outgoing: &mpsc::Sender<Outgoing>,
    peer: &Arc<Peer>,
    service: Arc<dyn Service>,
) -> io::Result<()> {
    let (requests_max, body_bytes_max) = match peer.standing {
        Standing::Member | Standing::Keyholder => (REQUESTS_MAX, BODY_BYTES_MAX),
        Standing::Stranger => (STRANGER_REQUESTS_MAX, STRANGER_BODY_BYTES_MAX),
    };
    let permits = Arc::new(Semaphore::new(requests_max));
    // Dropped with the connection, and the answers under way with it: nobody would hear them.
    let mut under_way = JoinSet::new();
    loop {
        let Some(header) = reader.header::<HEADER_BYTES>().await? else { return Ok(()) };
        let header = Header::decode(&header, body_bytes_max).ok_or_else(no_frame)?;
        match header.kind {
            Kind::Request => {}
            Kind::Ping => {
                let pong = Outgoing::new(Kind::Pong, header.id, Bytes::new());
                outgoing.send(pong).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
                continue;
            }
            Kind::Answer | Kind::Pong => return Err(no_frame()),
        }
        let permit = permits.clone().acquire_owned().await.map_err(io::Error::other)?;
        let message = reader.payload(header.length).await?;
        while under_way.try_join_next().is_some() {}
        let answering = service.handle(peer.clone(), message);
        let outgoing = outgoing.clone();
        let node = peer.node;
        under_way.spawn(async move {
            let body = answering.await;
            if body.len() > BODY_BYTES_MAX {
                tracing::error!("an answer of {} bytes to node {node} is longer than any may be", body.len());
                return;
            }
            // If the connection is gone, so is whoever asked.
            let _ = outgoing.send(Outgoing::new(Kind::Answer, header.id, body.into()).holding(permit)).await;
        });
    }
}

fn no_frame() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "what was received is no frame of a control connection")
}

fn silent() -> io::Error {
    io::Error::new(io::ErrorKind::TimedOut, "nothing was heard for too long")
}

/// When the other side was heard last, in monotonic nanoseconds.
struct Heard(AtomicU64);

impl Heard {
    fn at(&self) -> Duration {
        Duration::from_nanos(self.0.load(Ordering::Relaxed))
    }
}

struct Watched {
    inner: Box<dyn AsyncRead + Send + Unpin>,
    heard: Arc<Heard>,
    clock: Arc<dyn Clock>,
}

/// Takes the reading half and notes every arrival, also in the middle of a long body.
fn watched(connection: &mut Connection, clock: &Arc<dyn Clock>) -> (FrameReader, Arc<Heard>) {
    let heard = Arc::new(Heard(AtomicU64::new(clock.monotonic().as_nanos() as u64)));
    let inner = std::mem::replace(&mut connection.reader, Box::new(tokio::io::empty()));
    (FrameReader::new(Box::new(Watched { inner, heard: heard.clone(), clock: clock.clone() })), heard)
}

impl AsyncRead for Watched {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let result = Pin::new(&mut this.inner).poll_read(context, buffer);
        if result.is_ready() {
            this.heard.0.store(this.clock.monotonic().as_nanos() as u64, Ordering::Relaxed);
        }
        result
    }
}

/// Completes once nothing was heard for the time that [`MeshTiming::silence`](super::MeshTiming) says.
async fn wait_for_silence(heard: &Heard, timing: &MeshTiming, clock: &Arc<dyn Clock>) {
    let (silence, interval) = (timing.silence, timing.ping);
    loop {
        let since = clock.monotonic().saturating_sub(heard.at());
        let Some(rest) = silence.checked_sub(since).filter(|rest| !rest.is_zero()) else { return };
        if rest > interval {
            // Together with all that this process does again and again.
            clock.beat(interval).await;
        } else {
            clock.sleep(rest).await;
        }
    }
}
