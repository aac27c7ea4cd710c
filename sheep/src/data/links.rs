//! This node's connections to the other members: one each, kept, with any number of requests under way.
//!
//! Always holds:
//! 1. A link that broke never works again; the next one to the same node has a higher number. Whoever needs an order
//!    of its messages checks the number and sends again what was not answered before it sends anything new.
//! 2. Every request's callback is called exactly once: with the answer, or with [`LinkDown`].

use std::collections::{BTreeMap, HashMap};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use sheep_core::cluster_state::Phase;
use sheep_core::member::{Member, NodeId};
use sheep_core::peer_message::{HEADER_BYTES, PeerAnswer, PeerKind, PeerRequest, Verdict};
use sheep_core::stamp::Epoch;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;

use super::view::View;
use crate::cluster::Cluster;
use crate::world::World;
use crate::world::frames::{FrameReader, FrameSender};
use crate::world::net::Connection;

/// Version of the messages between nodes; another one is refused with both named.
pub const PEER_PROTOCOL: u32 = 1;
/// Between attempts to reach a member that does not answer: long enough not to load a machine that is starting, short
/// enough not to add to the stall when it comes back.
const RECONNECT_INTERVAL: Duration = Duration::from_millis(20);

/// How long a node that took the connection may take to say hello: it needs nothing but its memory for it.
const HELLO_PATIENCE: Duration = Duration::from_secs(1);

/// The connection broke before the answer came: nothing is known about what the other side did.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LinkDown;

type Callback = Box<dyn FnOnce(Result<(PeerAnswer, Bytes), LinkDown>) + Send>;

/// One connection.
pub struct Link {
    number: u64,
    sender: FrameSender,
    next_id: AtomicU64,
    /// `None` once the link is down.
    pending: Mutex<Option<HashMap<u64, Callback>>>,
    /// What the other side last said of its space.
    nearly_full: AtomicBool,
}

impl Link {
    /// See invariant 1 of the module.
    pub fn number(&self) -> u64 {
        self.number
    }

    /// Sends a request; its id is filled in here.
    pub fn send(&self, mut request: PeerRequest, payload: Bytes, callback: Callback) {
        request.id = self.next_id.fetch_add(1, Ordering::Relaxed);
        {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            match pending.as_mut() {
                Some(pending) => pending.insert(request.id, callback),
                None => {
                    drop(pending);
                    callback(Err(LinkDown));
                    return;
                }
            };
        }
        let header = Bytes::copy_from_slice(&request.encode(payload.len()));
        // A sender that is closed means that the reading side is about to fail every pending request, this one too.
        let _ = self.sender.send(header, payload);
    }

    /// Sends a request and waits for its answer.
    pub async fn call(&self, request: PeerRequest, payload: Bytes) -> Result<(PeerAnswer, Bytes), LinkDown> {
        let (sender, receiver) = oneshot::channel();
        self.send(
            request,
            payload,
            Box::new(move |answer| {
                let _ = sender.send(answer);
            }),
        );
        receiver.await.unwrap_or(Err(LinkDown))
    }

    fn fail_pending(&self) {
        self.sender.close();
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner).take();
        for (_, callback) in pending.into_iter().flatten() {
            callback(Err(LinkDown));
        }
    }

    /// Whether the other side is about to run out of space, by its last answer.
    pub fn is_nearly_full(&self) -> bool {
        self.nearly_full.load(Ordering::Relaxed)
    }

    fn answered(&self, answer: PeerAnswer, payload: Bytes) {
        self.nearly_full.store(answer.nearly_full, Ordering::Relaxed);
        let callback = {
            let mut pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner);
            pending.as_mut().and_then(|pending| pending.remove(&answer.id))
        };
        match callback {
            Some(callback) => callback(Ok((answer, payload))),
            None => tracing::warn!("an answer to request {} that was never sent", answer.id),
        }
    }
}

struct Slot {
    endpoint: String,
    link: watch::Sender<Option<Arc<Link>>>,
    task: JoinHandle<()>,
}

/// Links to all other members.
pub struct Links {
    world: World,
    node: NodeId,
    slots: Mutex<HashMap<NodeId, Slot>>,
    numbers: Arc<AtomicU64>,
    /// Changes whenever a link came up.
    ups: watch::Sender<u64>,
    cluster_id: Arc<AtomicU64>,
    cluster: Cluster,
}

impl Links {
    /// No links yet.
    pub fn new(world: World, cluster: Cluster) -> Links {
        Links {
            world,
            node: cluster.node(),
            cluster,
            slots: Mutex::new(HashMap::new()),
            numbers: Arc::new(AtomicU64::new(1)),
            ups: watch::channel(0).0,
            cluster_id: Arc::new(AtomicU64::new(0)),
        }
    }

    /// Connects to new members, drops the links to those that are out.
    pub fn follow(&self, view: &View) {
        self.cluster_id.store(view.state.cluster_id, Ordering::Release);
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        // Before format nodes are only acquainted: there is nothing to carry.
        let unformatted = BTreeMap::new();
        let acquainted_only = view.state.needs_majority && view.state.phase == Phase::Unformatted;
        let members = if acquainted_only { &unformatted } else { &view.state.members };
        slots.retain(|node, slot| {
            let member = members.get(node);
            let keep = member.is_some_and(|member| member.member.peer_endpoint == slot.endpoint);
            if !keep {
                slot.task.abort();
                if let Some(link) = slot.link.send_replace(None) {
                    link.fail_pending();
                }
            }
            keep
        });
        for member in members.values().map(|member| &member.member) {
            if member.id != self.node && !slots.contains_key(&member.id) {
                slots.insert(member.id, self.connect(member));
            }
        }
    }

    fn connect(&self, member: &Member) -> Slot {
        let (link, _) = watch::channel(None);
        let connector = Connector {
            world: self.world.clone(),
            from: self.node,
            to: member.clone(),
            cluster: self.cluster.clone(),
            link: link.clone(),
            numbers: self.numbers.clone(),
            ups: self.ups.clone(),
            cluster_id: self.cluster_id.clone(),
        };
        Slot { endpoint: member.peer_endpoint.clone(), link, task: tokio::spawn(connector.run()) }
    }

    /// The link to a member, if it is up.
    pub fn get(&self, node: NodeId) -> Option<Arc<Link>> {
        let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.get(&node)?.link.borrow().clone()
    }

    /// Asks a member and waits for the answer; `LinkDown` if it cannot be reached within `patience`.
    pub async fn call(
        &self,
        node: NodeId,
        request: PeerRequest,
        payload: Bytes,
        patience: Duration,
    ) -> Result<(PeerAnswer, Bytes), LinkDown> {
        let mut link = {
            let slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
            slots.get(&node).ok_or(LinkDown)?.link.subscribe()
        };
        let connected = tokio::select! {
            up = link.wait_for(Option::is_some) => up.ok().and_then(|link| link.clone()),
            () = self.world.clock.sleep(patience) => None,
        };
        connected.ok_or(LinkDown)?.call(request, payload).await
    }

    /// Changes whenever a link came up.
    pub fn ups(&self) -> watch::Receiver<u64> {
        self.ups.subscribe()
    }
}

struct Connector {
    world: World,
    from: NodeId,
    to: Member,
    cluster: Cluster,
    link: watch::Sender<Option<Arc<Link>>>,
    numbers: Arc<AtomicU64>,
    ups: watch::Sender<u64>,
    cluster_id: Arc<AtomicU64>,
}

impl Connector {
    async fn run(self) {
        loop {
            match self.cluster.dial(&self.to).await {
                Ok(connection) => self.serve(connection).await,
                Err(error) => tracing::debug!("cannot reach {} ({}): {error}", self.to.id, self.to.peer_endpoint),
            }
            self.world.clock.sleep(RECONNECT_INTERVAL).await;
        }
    }

    /// Says hello and reads answers until the connection ends.
    async fn serve(&self, connection: Connection) {
        let link = Arc::new(Link {
            number: self.numbers.fetch_add(1, Ordering::Relaxed),
            sender: FrameSender::start(connection.writer),
            next_id: AtomicU64::new(1),
            pending: Mutex::new(Some(HashMap::new())),
            nearly_full: AtomicBool::new(false),
        });
        let mut reader = FrameReader::new(connection.reader);
        // Dropped when this task is aborted as well: nobody waits for answers of a link that is gone.
        let guard = FailOnDrop { link: link.clone(), slot: self.link.clone() };
        let mut hello = PeerRequest::new(PeerKind::Hello, Epoch(0), self.from);
        hello.id = 0;
        let payload = hello_payload(self.cluster_id.load(Ordering::Acquire));
        link.sender.send(Bytes::copy_from_slice(&hello.encode(payload.len())), payload);
        let hello = tokio::select! {
            answer = read_answer(&mut reader) => answer,
            () = self.world.clock.sleep(HELLO_PATIENCE) => return,
        };
        match hello {
            Ok(Some((answer, _))) if answer.verdict == Verdict::Ok => {}
            Ok(Some((answer, reason))) => {
                let reason = String::from_utf8_lossy(&reason);
                tracing::debug!("node {} does not talk to us ({:?}): {reason}", self.to.id, answer.verdict);
                return;
            }
            Ok(None) | Err(_) => return,
        }
        self.link.send_replace(Some(link.clone()));
        self.ups.send_modify(|count| *count += 1);
        loop {
            match read_answer(&mut reader).await {
                Ok(Some((answer, payload))) => link.answered(answer, payload),
                Ok(None) => break,
                Err(error) => {
                    tracing::debug!("the connection to node {} broke: {error}", self.to.id);
                    break;
                }
            }
        }
        drop(guard);
    }
}

struct FailOnDrop {
    link: Arc<Link>,
    slot: watch::Sender<Option<Arc<Link>>>,
}

impl Drop for FailOnDrop {
    fn drop(&mut self) {
        self.slot.send_if_modified(|slot| {
            let current = slot.as_ref().is_some_and(|link| link.number == self.link.number);
            if current {
                *slot = None;
            }
            current
        });
        self.link.fail_pending();
    }
}

/// What `Hello` carries: protocol version, cluster id.
fn hello_payload(cluster_id: u64) -> Bytes {
    let mut payload = Vec::with_capacity(12);
    payload.extend_from_slice(&PEER_PROTOCOL.to_le_bytes());
    payload.extend_from_slice(&cluster_id.to_le_bytes());
    payload.into()
}

/// The protocol version and cluster id of a `Hello`.
pub fn parse_hello(payload: &[u8]) -> Option<(u32, u64)> {
    let (version, id) = payload.split_first_chunk::<4>()?;
    Some((u32::from_le_bytes(*version), u64::from_le_bytes(id.try_into().ok()?)))
}

async fn read_answer(reader: &mut FrameReader) -> std::io::Result<Option<(PeerAnswer, Bytes)>> {
    let Some(header) = reader.header::<HEADER_BYTES>().await? else { return Ok(None) };
    match PeerAnswer::decode(&header) {
        Ok((answer, length)) => Ok(Some((answer, reader.payload(length).await?))),
        Err(error) => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, format!("{error:?}"))),
    }
}
