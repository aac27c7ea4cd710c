//! Our kept control link to one node: connects, stays connected, connects again, and says what it sees.
//!
//! Always holds:
//! 1. Every `Up` but the first comes after a `Down`, unless this node cut the link itself to have it judged anew.
//! 2. `Down` with `refused` is said only if every address refused a connection after the link had been up, and once until
//!    it is up again.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use sheep_core::member::NodeId;
use sheep_core::node_handshake::Channel;
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

use super::control::{Link, LinkRunner};
use super::handshake::Established;
use super::live::Shown;
use super::shared::Shared;
use super::types::{ContactError, Direction, Event, LinkReport, Peer, Reach};

/// An attempt after a break that takes longer than this is waited for, but no longer in silence.
const ATTEMPT_PATIENCE: Duration = Duration::from_millis(250);

/// One kept link.
pub(super) struct Slot {
    addresses: watch::Sender<Vec<SocketAddr>>,
    state: watch::Sender<SlotState>,
    task: JoinHandle<()>,
}

/// What is known of a kept link.
#[derive(Clone)]
pub(super) struct SlotState {
    /// `None` while it is down.
    pub link: Option<Arc<Link>>,
    /// The monotonic time at which it came up or went down.
    since: Duration,
    /// Where it was connected last.
    last_address: Option<SocketAddr>,
}

/// What one round over the addresses came to.
enum Attempt {
    Linked(Arc<Link>, Box<LinkRunner>),
    /// Every address refused the connection.
    Refused,
    /// Somebody said no.
    Rejected,
    Failed,
}

impl Slot {
    /// Starts connecting.
    pub fn start(shared: Arc<Shared>, node: NodeId, addresses: Vec<SocketAddr>) -> Slot {
        let addresses = watch::channel(addresses).0;
        let since = shared.myself.world.clock.monotonic();
        let state = watch::channel(SlotState { link: None, since, last_address: None }).0;
        let connector = Connector { shared, node, addresses: addresses.subscribe(), state: state.clone() };
        Slot { addresses, state, task: tokio::spawn(connector.run()) }
    }

    /// From the next attempt on; one that is waiting begins at once.
    pub fn set_addresses(&self, addresses: Vec<SocketAddr>) {
        self.addresses.send_if_modified(|current| {
            let changes = *current != addresses;
            *current = addresses;
            changes
        });
    }

    /// The addresses, the one that worked last first.
    pub fn addresses(&self) -> Vec<SocketAddr> {
        let last = self.state.borrow().last_address;
        in_order(&self.addresses.borrow(), last)
    }

    /// For waiting until it is up.
    pub fn watch(&self) -> watch::Receiver<SlotState> {
        self.state.subscribe()
    }

    /// For people.
    pub fn report(&self, node: NodeId) -> LinkReport {
        let state = self.state.borrow().clone();
        LinkReport {
            node,
            up: state.link.is_some(),
            since: state.since,
            rtt: state.link.as_ref().and_then(|link| link.rtt()),
            address: state.link.map(|link| link.address),
        }
    }
}

impl Drop for Slot {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn in_order(addresses: &[SocketAddr], first: Option<SocketAddr>) -> Vec<SocketAddr> {
    let mut ordered = addresses.to_vec();
    ordered.sort_by_key(|address| Some(*address) != first);
    ordered
}

struct Connector {
    shared: Arc<Shared>,
    node: NodeId,
    addresses: watch::Receiver<Vec<SocketAddr>>,
    state: watch::Sender<SlotState>,
}

/// What has not been said yet of a link that ended.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Owed {
    Nothing,
    /// It broke: `Down`, whatever comes next.
    Break,
    /// This node cut it: `Down`, unless it is up again at once.
    Cut,
}

impl Connector {
    async fn run(mut self) {
        let timing = self.shared.myself.timing.clone();
        let clock = self.shared.myself.world.clock.clone();
        let mut pause = timing.retry_min;
        let mut owed = Owed::Nothing;
        let mut may_say_refused = false;
        loop {
            let last = self.state.borrow().last_address;
            let addresses = in_order(&self.addresses.borrow_and_update(), last);
            match self.attempt_and_tell(addresses, &mut owed).await {
                Attempt::Linked(link, runner) => {
                    if owed == Owed::Break {
                        self.say_down(false).await;
                    }
                    let begin = clock.monotonic();
                    let ended = self.keep(&link, *runner).await;
                    may_say_refused = true;
                    owed = if link.cut.is_cut() { Owed::Cut } else { Owed::Break };
                    let is_silent = matches!(ended, Err(error) if error.kind() == io::ErrorKind::TimedOut);
                    // One that lived is tried again at once. One that broke right away would be tried without end.
                    let lived = clock.monotonic().saturating_sub(begin) >= timing.retry_max;
                    if owed == Owed::Break && (is_silent || !lived) {
                        owed = Owed::Nothing;
                        self.say_down(false).await;
                    }
                    if lived {
                        pause = timing.retry_min;
                        continue;
                    }
                }
                Attempt::Refused => {
                    if may_say_refused {
                        self.say_down(true).await;
                    }
                    may_say_refused = false;
                    owed = Owed::Nothing;
                }
                attempt => {
                    if owed != Owed::Nothing {
                        self.say_down(false).await;
                    }
                    owed = Owed::Nothing;
                    if matches!(attempt, Attempt::Rejected) {
                        pause = timing.retry_rejected;
                    }
                }
            }
            tokio::select! {
                () = clock.sleep(pause) => {}
                changed = self.addresses.changed() => if changed.is_err() { return },
            }
            pause = (pause * 2).min(timing.retry_max);
        }
    }

    async fn say_down(&self, refused: bool) {
        self.shared.say(Event::Down { node: self.node, refused }).await;
    }

    /// An attempt that takes long does not keep a break secret.
    async fn attempt_and_tell(&self, addresses: Vec<SocketAddr>, owed: &mut Owed) -> Attempt {
        let attempt = self.attempt(addresses);
        if *owed == Owed::Nothing {
            return attempt.await;
        }
        let mut attempt = std::pin::pin!(attempt);
        tokio::select! {
            attempt = &mut attempt => return attempt,
            () = self.shared.myself.world.clock.sleep(ATTEMPT_PATIENCE) => {}
        }
        *owed = Owed::Nothing;
        self.say_down(false).await;
        attempt.await
    }

    async fn attempt(&self, addresses: Vec<SocketAddr>) -> Attempt {
        let mut all_refused = !addresses.is_empty();
        let mut was_rejected = false;
        for address in addresses {
            match self.shared.dial_node(self.node, address, Channel::Control, true).await {
                Ok(established) => {
                    let (link, runner) = self.shared.wrap(established, address);
                    return Attempt::Linked(link, Box::new(runner));
                }
                Err(error) => {
                    tracing::debug!("cannot reach node {} at {address}: {error}", self.node);
                    all_refused &= error.is_refused();
                    was_rejected |= matches!(error, ContactError::Rejected(_));
                }
            }
        }
        match (all_refused, was_rejected) {
            (true, _) => Attempt::Refused,
            (false, true) => Attempt::Rejected,
            (false, false) => Attempt::Failed,
        }
    }

    /// Shows the link until it breaks.
    async fn keep(&self, link: &Arc<Link>, runner: LinkRunner) -> io::Result<()> {
        self.show(Some(link.clone()));
        // Says that it is down as well if this task is aborted.
        let guard = DownOnDrop { state: self.state.clone(), shared: self.shared.clone() };
        // The connection runs while the event waits to be taken: the other side wants pings.
        let running = async {
            let ended = runner.run().await;
            drop(guard);
            ended
        };
        let (ended, ()) = tokio::join!(running, self.shared.say(Event::Up(link.peer.clone())));
        match &ended {
            Ok(()) => tracing::debug!("node {} ended the control link", self.node),
            Err(error) => tracing::debug!("the control link to node {} broke: {error}", self.node),
        }
        ended
    }

    fn show(&self, link: Option<Arc<Link>>) {
        let since = self.shared.myself.world.clock.monotonic();
        self.state.send_modify(|state| {
            if let Some(link) = &link {
                state.last_address = Some(link.address);
            }
            state.link = link;
            state.since = since;
        });
    }
}

struct DownOnDrop {
    state: watch::Sender<SlotState>,
    shared: Arc<Shared>,
}

impl Drop for DownOnDrop {
    fn drop(&mut self) {
        let since = self.shared.myself.world.clock.monotonic();
        self.state.send_modify(|state| {
            state.link = None;
            state.since = since;
        });
    }
}

impl Shared {
    /// As [`super::handshake::Myself::dial`], but whoever answers must be `node`.
    pub(super) async fn dial_node(
        &self,
        node: NodeId,
        address: SocketAddr,
        channel: Channel,
        kept: bool,
    ) -> Result<Established<Arc<Peer>>, ContactError> {
        let established = self.dial(address, channel, kept).await?;
        if established.peer.node != node {
            return Err(io::Error::other("another node answers at this address").into());
        }
        Ok(established)
    }

    /// Makes the asking end of a control connection.
    pub(super) fn wrap(&self, established: Established<Arc<Peer>>, address: SocketAddr) -> (Arc<Link>, LinkRunner) {
        let peer = established.peer;
        if established.kept {
            self.share_secret(&peer, Direction::Sending, established.gossip_secret);
        }
        let shown = Shown { peer: Some(peer.clone()), proved: established.proved, is_plain: established.is_plain };
        let (connection, cut) = self.live.add(established.connection, shown);
        let world = self.myself.world.clone();
        Link::new(world, self.myself.timing.clone(), connection, cut, peer, address)
    }

    /// Looks at all addresses at the same time.
    pub(super) async fn probe(self: Arc<Self>, node: NodeId, addresses: Vec<SocketAddr>) -> Reach {
        let mut attempts = JoinSet::new();
        let count = addresses.len();
        for address in addresses {
            let shared = self.clone();
            attempts.spawn(async move { shared.dial_node(node, address, Channel::Control, false).await });
        }
        let mut refused = 0;
        while let Some(attempt) = attempts.join_next().await {
            match attempt {
                Ok(Ok(established)) => return Reach::Alive { boot: established.peer.boot },
                Ok(Err(error)) => refused += usize::from(error.is_refused()),
                Err(_) => {}
            }
        }
        if count > 0 && refused == count { Reach::Refused } else { Reach::Silent }
    }
}

/// Kept links by node.
pub(super) type Slots = BTreeMap<NodeId, Slot>;
