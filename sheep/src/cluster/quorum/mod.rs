//! The default driver: nodes that find each other, agree by an embedded Raft, and go on as long as a majority of the voters
//! can talk to each other.
//!
//! `mesh` connects nodes, `gossip` and broken connections raise suspicion, `consensus` keeps the order. Here is what ties them
//! together: `pulse` keeps the fence open, `steward` is what the leader does (evict, choose voters), `membership` lets nodes in,
//! `founding` makes a cluster out of acquainted nodes, `following` brings the order to nodes that do not vote, `proposals`
//! puts commands into it, `service` answers other nodes, `trust` says who they are, `evidence` proves deaths.
//!
//! Always holds:
//! 1. What is published here only goes forward: by era, then by index.
//! 2. Nothing of an order is shown to the data path before this process has joined it: an earlier process of this node may have
//!    lost what it had in memory, so its membership is not ours.
//! 3. The fence is open only while a leader that a quorum followed has counted this process as a member within `FENCE`; a
//!    leader evicts a member without proof of its death only `EVICT` after it last did so, or after it became the leader.
//!
//! A crash loses nothing that was acknowledged: votes and log are durable before they count. What is kept beside them
//! (`charter`) may be older than what this process had seen; the others know better.

pub mod charter;
mod evidence;
mod following;
mod force;
mod founding;
mod membership;
pub mod messages;
mod overview;
mod proposals;
mod pulse;
mod service;
mod steward;
pub mod token;
mod trust;
mod voters;
mod voting;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use sheep_core::admission::{ClusterKey, Fingerprint};
use sheep_core::cluster_state::{ClusterState, EpochMember, Phase};
use sheep_core::command::{Command, Outcome};
use sheep_core::member::{Member, NodeId};
use sheep_core::stamp::Epoch;
use tokio::sync::{Notify, mpsc, watch};

use super::administration::{Administration, AdministrationError, Overview};
use super::consensus::{Consensus, Machine, Timing};
use super::discovery::{Discovery, DiscoveryConfig, Seed};
use super::driver::{Driver, DriverFuture, OrderError};
use super::gossip::{self, Gossip, GossipEvent};
use super::mesh::{self, Event, GossipSecret, Mesh, MeshConfig, Peer};
use super::{Cluster, Fence};
use crate::world::World;
use crate::world::disk;
use crate::world::net::{Announcement, Connection};
use charter::{Charter, Kept};
use messages::Card;
use steward::Stewardship;
use voting::Voting;

/// A node that has not heard from the quorum for this long stops answering clients.
const FENCE: Duration = Duration::from_secs(2);
/// A member that has not been heard for this long is evicted without proof of death. The difference to [`FENCE`] is what two
/// clocks may drift apart in that time, many times over, and what a process may be held up between its look at the clock and
/// its answer.
const EVICT: Duration = Duration::from_secs(3);
const _: () = assert!(EVICT.as_millis() > FENCE.as_millis());
/// What is kept for the next start is written this long after a change at the latest.
const SAVE_INTERVAL: Duration = Duration::from_millis(500);

/// How a node takes part.
pub struct QuorumConfig {
    /// Where it keeps its identity, its key and its part of the order.
    pub directory: PathBuf,
    /// Where it listens for other nodes.
    pub listen: Vec<SocketAddr>,
    /// What the others are told of that, the preferred one first.
    pub addresses: Vec<SocketAddr>,
    /// Where to look for other nodes.
    pub seeds: Vec<Seed>,
    /// Lets this node in, once.
    pub token: Option<token::Token>,
    /// The cluster key, from a copy of its file.
    pub key: Option<ClusterKey>,
    /// How it describes itself; `boot` and `peer_endpoint` are filled in here.
    pub member: Member,
    /// Whether the store holds anything: then it must be of this driver.
    pub store_cluster: Option<u64>,
}

/// What is known of the order.
struct Position {
    charter: Option<Charter>,
    index: u64,
    machine: Machine,
    /// Whether this process was a member at some point of this life.
    joined: bool,
}

struct Inner {
    world: World,
    node: NodeId,
    boot: u64,
    /// When this process started, by its monotonic clock.
    started: Duration,
    fingerprint: Fingerprint,
    directory: PathBuf,
    member: Member,
    token: Option<token::Token>,
    given_key: Option<ClusterKey>,
    mesh: OnceLock<Arc<Mesh>>,
    gossip: OnceLock<Arc<Gossip>>,
    discovery: OnceLock<Arc<Discovery>>,
    fence: Arc<Fence>,
    position: Mutex<Position>,
    shown: watch::Sender<Arc<ClusterState>>,
    /// Changes with the position: the index.
    moved: watch::Sender<u64>,
    /// Keeps writers of the state file apart; the value is what it holds.
    saved: tokio::sync::Mutex<Option<(Charter, u64)>>,
    consensus: Mutex<Option<Arc<Voting>>>,
    /// Keeps those apart who would open the log.
    opening: tokio::sync::Mutex<()>,
    pulse: Mutex<pulse::Known>,
    /// The leader is to be asked now.
    pulse_wake: Notify,
    /// The leader has ordered something that the votes do not bring here.
    follow_wake: Notify,
    stewardship: Mutex<Stewardship>,
    steward_wake: Notify,
    joins: tokio::sync::Mutex<()>,
    acquaintances: Mutex<BTreeMap<NodeId, Arc<Peer>>>,
    asking: Mutex<BTreeMap<NodeId, Asking>>,
    prepared: Mutex<Option<(NodeId, Duration)>>,
    /// Endpoints of the nodes that links are kept to, as the state has them.
    linked: Mutex<BTreeMap<NodeId, String>>,
    proposals: proposals::Proposals,
    /// While an order is begun here, nobody's votes on an earlier one are answered.
    beginning: AtomicBool,
    /// The latest era that this process has heard of: no part is taken in the votes of an earlier one.
    latest_era: Mutex<Option<charter::Era>>,
    /// The highest number of an era that this process tried to begin.
    era_begun: AtomicU32,
    leaving: AtomicBool,
    /// Why the cluster did not take this node when it was last told, and when that was.
    refused: Mutex<Option<(String, Duration)>>,
    /// Why this process cannot go on, if so.
    fatal: watch::Sender<Option<String>>,
}

/// A node that wants to come in.
struct Asking {
    fingerprint: Fingerprint,
    member: Member,
    /// When it asked last, by this node's monotonic clock.
    at: Duration,
}

/// The driver of one node. Cloning it is cheap.
#[derive(Clone)]
pub struct Quorum {
    inner: Arc<Inner>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Starts this node's part. It serves once it has heard from a quorum; until then it says what it waits for.
pub async fn start(world: &World, config: QuorumConfig) -> Result<(Cluster, Quorum), OrderError> {
    let place = config.directory.display().to_string();
    let io = |action: &'static str| {
        let place = place.clone();
        move |error| OrderError::Io { action, place, error }
    };
    let directory = config.directory.clone();
    disk::run(&world.disk, move |files| disk::make_dir(files, &directory)).await.map_err(io("create"))?;
    let kept = charter::load(world, &config.directory).await?;
    check_store(config.store_cluster, kept.as_ref())?;
    let identity =
        mesh::Identity::open(world, config.directory.join("identity")).await.map_err(io("use the identity in"))?;
    let fingerprint = identity.fingerprint();
    let boot = world.rng.next_u64();
    let endpoints: Vec<String> = config.addresses.iter().map(SocketAddr::to_string).collect();
    let member = Member { boot, peer_endpoint: endpoints.join(","), ..config.member };
    let quorum = Quorum::new(world, config.directory, member, fingerprint, kept, config.token, config.key);
    let (shown, node) = (quorum.inner.shown.subscribe(), quorum.inner.node);
    let own_addresses = config.addresses.clone();
    let mesh_config = MeshConfig::new(node, boot, config.listen.clone(), config.addresses);
    let (mesh, events) =
        Mesh::start(world.clone(), mesh_config, identity, Arc::new(quorum.clone()), Arc::new(quorum.clone()))
            .await
            .map_err(io("listen for other nodes with the identity in"))?;
    let (gossip, rumours) = Gossip::start(world.clone(), node, boot, config.listen.clone())
        .await
        .map_err(io("gossip with the identity in"))?;
    let secrets = mesh.secrets();
    quorum.inner.mesh.set(mesh).unwrap_or_else(|_| unreachable!("set once, here"));
    quorum.inner.gossip.set(gossip).unwrap_or_else(|_| unreachable!("set once, here"));
    quorum.open_own_log().await?;
    quorum.know_members();
    let port = config.listen.first().map_or(0, SocketAddr::port);
    let seeds = config.seeds.into_iter().chain(quorum.inner.token.iter().flat_map(token::Token::seeds)).collect();
    let discovery_config = DiscoveryConfig {
        seeds,
        directory: quorum.inner.directory.clone(),
        announcement: Some(Announcement { name: format!("sheep-{node}"), port, properties: Vec::new() }),
    };
    let (discovery, found) = Discovery::start(world.clone(), discovery_config).await;
    for address in own_addresses {
        discovery.is_ourselves(address);
    }
    quorum.inner.discovery.set(discovery).unwrap_or_else(|_| unreachable!("set once, here"));
    quorum.spawn_all(events, rumours, secrets, found);
    let fence = quorum.inner.fence.clone();
    Ok((Cluster::new(node, Arc::new(quorum.clone()), fence, shown), quorum))
}

/// A store that was filled under another driver has a history that this one does not know.
fn check_store(store_cluster: Option<u64>, kept: Option<&Kept>) -> Result<(), OrderError> {
    match (store_cluster, kept) {
        (Some(cluster), None) if cluster != 0 => Err(OrderError::Unavailable(format!(
            "this store belongs to cluster {cluster:016x}, which was run with -c local; start it with -c local again, or \
             use an empty directory"
        ))),
        _ => Ok(()),
    }
}

impl Quorum {
    fn new(
        world: &World,
        directory: PathBuf,
        member: Member,
        fingerprint: Fingerprint,
        kept: Option<Kept>,
        token: Option<token::Token>,
        given_key: Option<ClusterKey>,
    ) -> Quorum {
        let position = match kept {
            Some(kept) => {
                Position { charter: Some(kept.charter), index: kept.index, machine: kept.machine, joined: false }
            }
            None => Position { charter: None, index: 0, machine: Machine::default(), joined: false },
        };
        let index = position.index;
        let inner = Inner {
            world: world.clone(),
            node: member.id,
            boot: member.boot,
            started: world.clock.monotonic(),
            fingerprint,
            directory,
            member,
            token,
            given_key,
            mesh: OnceLock::new(),
            gossip: OnceLock::new(),
            discovery: OnceLock::new(),
            fence: Arc::new(Fence::closed(world.clock.clone())),
            position: Mutex::new(position),
            shown: watch::channel(Arc::new(ClusterState::default())).0,
            moved: watch::channel(index).0,
            saved: tokio::sync::Mutex::new(None),
            consensus: Mutex::new(None),
            opening: tokio::sync::Mutex::new(()),
            pulse: Mutex::new(pulse::Known::default()),
            stewardship: Mutex::new(Stewardship::default()),
            pulse_wake: Notify::new(),
            follow_wake: Notify::new(),
            steward_wake: Notify::new(),
            joins: tokio::sync::Mutex::new(()),
            acquaintances: Mutex::new(BTreeMap::new()),
            asking: Mutex::new(BTreeMap::new()),
            prepared: Mutex::new(None),
            linked: Mutex::new(BTreeMap::new()),
            proposals: proposals::Proposals::default(),
            beginning: AtomicBool::new(false),
            latest_era: Mutex::new(None),
            era_begun: AtomicU32::new(0),
            leaving: AtomicBool::new(false),
            refused: Mutex::new(None),
            fatal: watch::channel(None).0,
        };
        let quorum = Quorum { inner: Arc::new(inner) };
        quorum.show(&lock(&quorum.inner.position));
        quorum
    }

    fn spawn_all(
        &self,
        events: mpsc::Receiver<Event>,
        rumours: mpsc::Receiver<GossipEvent>,
        secrets: mpsc::UnboundedReceiver<GossipSecret>,
        found: mpsc::Receiver<SocketAddr>,
    ) {
        tokio::spawn(self.clone().follow_events(events));
        tokio::spawn(self.clone().follow_rumours(rumours));
        tokio::spawn(self.clone().install_secrets(secrets));
        tokio::spawn(self.clone().meet(found));
        tokio::spawn(self.clone().keep_pulse());
        tokio::spawn(self.clone().keep_following());
        tokio::spawn(self.clone().keep_entering());
        tokio::spawn(self.clone().run_steward());
        tokio::spawn(self.clone().keep_saved());
    }

    fn mesh(&self) -> &Arc<Mesh> {
        self.inner.mesh.get().expect("the mesh is set before anything runs")
    }

    fn gossip(&self) -> &Arc<Gossip> {
        self.inner.gossip.get().expect("gossip is set before anything runs")
    }

    fn now(&self) -> Duration {
        self.inner.world.clock.monotonic()
    }

    fn label(&self) -> u64 {
        self.inner.world.clock.wall().to_wire()
    }

    fn charter(&self) -> Option<Charter> {
        lock(&self.inner.position).charter
    }

    /// The newest state of the order that is known here, whether or not this process is in.
    fn state(&self) -> Arc<ClusterState> {
        lock(&self.inner.position).machine.state.clone()
    }

    fn index(&self) -> u64 {
        lock(&self.inner.position).index
    }

    fn consensus(&self) -> Option<Arc<Voting>> {
        lock(&self.inner.consensus).clone()
    }

    /// This node's part in the votes, if it leads.
    fn leading(&self) -> Option<Arc<Voting>> {
        self.consensus().filter(|consensus| consensus.is_leader())
    }

    /// Whether a leader that a quorum follows was heard just now, whether or not it counts this process in.
    fn has_quorum(&self) -> bool {
        let answered = lock(&self.inner.pulse).answered;
        self.inner.fence.is_open() || answered.is_some_and(|at| self.now().saturating_sub(at) < FENCE)
    }

    fn is_member(&self, state: &ClusterState) -> bool {
        state.members.get(&self.inner.node).is_some_and(|member| member.member.boot == self.inner.boot)
    }

    /// Takes note of a newer state; see invariant 1.
    fn advance(&self, charter: Charter, index: u64, machine: Machine) {
        let mut position = lock(&self.inner.position);
        let newer = match position.charter {
            Some(ours) if ours.cluster != charter.cluster => false,
            Some(ours) => (charter.era, index) > (ours.era, position.index),
            None => true,
        };
        if !newer {
            return;
        }
        position.joined |= self.is_member(&machine.state);
        let admission_changed = position.machine.state.admission != machine.state.admission;
        position.charter = Some(charter);
        position.index = index;
        position.machine = machine;
        self.show(&position);
        self.inner.moved.send_replace(index);
        drop(position);
        if admission_changed {
            self.mesh().reconsider();
        }
        self.know_members();
        self.inner.steward_wake.notify_one();
    }

    /// Publishes what the data path may see; see invariant 2.
    fn show(&self, position: &Position) {
        let state = match position.charter {
            None => self.acquainted_state(),
            Some(_) if position.joined => position.machine.state.clone(),
            Some(_) => {
                let known = &position.machine.state;
                Arc::new(ClusterState {
                    cluster_id: known.cluster_id,
                    created: known.created,
                    settings: known.settings,
                    phase: Phase::Waiting { missing: known.members.keys().copied().collect(), orderly: false },
                    needs_majority: true,
                    ..ClusterState::default()
                })
            }
        };
        self.inner.shown.send_replace(state);
    }

    /// Before format: this node and those it is acquainted with.
    fn acquainted_state(&self) -> Arc<ClusterState> {
        let mut members = BTreeMap::new();
        let mut add = |member: Member| members.insert(member.id, EpochMember { member, since: Epoch(0) });
        add(self.inner.member.clone());
        for peer in lock(&self.inner.acquaintances).values().filter(|peer| peer.cluster.is_none()) {
            if let Some(card) = messages::decode::<Card>(&peer.card) {
                add(card.member);
            }
        }
        // Not a count of commands, but different for every change.
        let applied = self.inner.shown.borrow().applied + 1;
        Arc::new(ClusterState { applied, members, needs_majority: true, ..ClusterState::default() })
    }

    fn show_acquaintances(&self) {
        let position = lock(&self.inner.position);
        if position.charter.is_none() {
            self.show(&position);
        }
    }

    /// Keeps links to all members, and to voters that are out: they have to be reached to come back.
    fn know_members(&self) {
        if self.charter().is_none() {
            return;
        }
        // Before the state is read: whoever comes second must not act on an older one.
        let mut linked = lock(&self.inner.linked);
        let state = self.state();
        let voting = self.consensus().map(|consensus| consensus.nodes()).unwrap_or_default();
        let mut wanted: BTreeMap<NodeId, Member> = BTreeMap::new();
        for node in state.members.keys().chain(&voting).filter(|node| **node != self.inner.node) {
            if let Some(member) = last_known(&state, *node) {
                wanted.insert(*node, member.clone());
            }
        }
        for node in linked.keys().filter(|node| !wanted.contains_key(node)) {
            self.mesh().forget(*node);
            self.mesh().cut_off(*node);
            self.gossip().forget(*node);
        }
        linked.retain(|node, _| wanted.contains_key(node));
        for (node, member) in wanted {
            if linked.get(&node) == Some(&member.peer_endpoint) {
                continue;
            }
            let addresses = addresses_of(&member);
            if let Some(first) = addresses.first() {
                self.gossip().introduce(node, member.boot, *first);
            }
            self.mesh().know(node, addresses);
            linked.insert(node, member.peer_endpoint);
        }
    }

    /// Waits until what is known here has come to an index of an era, or a later era.
    async fn await_index(&self, charter: Charter, index: u64) {
        let mut moved = self.inner.moved.subscribe();
        loop {
            {
                let position = lock(&self.inner.position);
                let here = position.charter.map(|ours| (ours.era, position.index));
                if here >= Some((charter.era, index)) {
                    return;
                }
            }
            if moved.changed().await.is_err() {
                return;
            }
        }
    }

    /// Opens the log of the votes if an earlier process had one for this era.
    async fn open_own_log(&self) -> Result<(), OrderError> {
        let Some(charter) = self.charter() else { return Ok(()) };
        let directory = charter.log_directory(&self.inner.directory);
        let exists = disk::run(&self.inner.world.disk, move |files| files.exists(&directory)).await;
        if exists.unwrap_or(true) {
            self.open_log(charter).await?;
        }
        Ok(())
    }

    /// This node's part in the votes of an era; begins one if there is none.
    async fn open_log(&self, charter: Charter) -> Result<Arc<Voting>, OrderError> {
        let _turn = self.inner.opening.lock().await;
        if self.is_over(charter) {
            return Err(OrderError::Unavailable("an operator went on without the majority: following".to_string()));
        }
        if let Some(consensus) = self.consensus() {
            if consensus.charter() == charter {
                return Ok(consensus);
            }
            consensus.shutdown().await;
        }
        let directory = charter.log_directory(&self.inner.directory);
        let carrier = Arc::new(service::OverMesh(self.clone()));
        let opened = Consensus::open(
            &self.inner.world,
            self.inner.node,
            directory,
            charter.order_id(),
            carrier,
            Timing::default(),
        );
        let consensus = Arc::new(Voting::new(charter, opened.await?));
        *lock(&self.inner.consensus) = Some(consensus.clone());
        tokio::spawn(self.clone().follow_log(charter, consensus.clone()));
        Ok(consensus)
    }

    /// What this node votes on reaches it through the votes.
    async fn follow_log(self, charter: Charter, consensus: Arc<Voting>) {
        let mut published = consensus.watch();
        loop {
            let now = published.borrow_and_update().clone();
            // The first entries of an order have no command.
            if now.state.applied > 0 {
                self.advance(charter, now.index, voting::machine_of(&now));
            }
            if published.changed().await.is_err() {
                return;
            }
        }
    }

    /// Whether a later era was begun, as far as this process has heard.
    fn is_over(&self, charter: Charter) -> bool {
        *lock(&self.inner.latest_era) > Some(charter.era)
    }

    /// A later era was begun: this node's part in the earlier one is over.
    async fn yield_to(&self, charter: Charter) {
        let Some(ours) = self.charter() else { return };
        if charter.cluster != ours.cluster || charter.era <= ours.era {
            return;
        }
        {
            let mut latest = lock(&self.inner.latest_era);
            *latest = (*latest).max(Some(charter.era));
        }
        // Whoever opens it at this moment is done, or comes too late.
        let _turn = self.inner.opening.lock().await;
        let earlier = lock(&self.inner.consensus).take_if(|consensus| consensus.charter() == ours);
        if let Some(earlier) = earlier {
            tracing::warn!("an operator went on without the majority (era {}): following", charter.era.number);
            earlier.shutdown().await;
        }
    }

    async fn keep_saved(self) {
        let mut moved = self.inner.moved.subscribe();
        while moved.changed().await.is_ok() {
            self.inner.world.clock.sleep(SAVE_INTERVAL).await;
            moved.borrow_and_update();
            if let Err(error) = self.save().await {
                tracing::error!("cannot keep what is known of the cluster: {error}");
            }
        }
    }

    /// Keeps what is known now for the next start.
    async fn save(&self) -> Result<(), OrderError> {
        let mut saved = self.inner.saved.lock().await;
        let kept = {
            let position = lock(&self.inner.position);
            let Some(charter) = position.charter else { return Ok(()) };
            Kept { charter, index: position.index, machine: position.machine.clone() }
        };
        if *saved == Some((kept.charter, kept.index)) {
            return Ok(());
        }
        charter::save(&self.inner.world, &self.inner.directory, &kept).await?;
        if let Some(key) = &kept.machine.state.admission.key {
            let text = format!("{}\n", key.to_text());
            charter::replace(&self.inner.world, &self.inner.directory, "key", text.into_bytes()).await?;
        }
        *saved = Some((kept.charter, kept.index));
        Ok(())
    }

    async fn install_secrets(self, mut secrets: mpsc::UnboundedReceiver<GossipSecret>) {
        while let Some(secret) = secrets.recv().await {
            let direction = match secret.direction {
                mesh::Direction::Sending => gossip::Direction::Sending,
                mesh::Direction::Receiving => gossip::Direction::Receiving,
            };
            self.gossip().install(secret.peer, direction, secret.secret);
        }
    }

    /// Why this process cannot go on: resolves when that turns out.
    pub async fn failed(&self) -> String {
        let mut fatal = self.inner.fatal.subscribe();
        let reason = fatal.wait_for(Option::is_some).await.ok().and_then(|reason| reason.clone());
        match reason {
            Some(reason) => reason,
            None => std::future::pending().await,
        }
    }

    /// Other nodes' data connections; taken once.
    pub fn data_connections(&self) -> mpsc::Receiver<(NodeId, Connection)> {
        self.mesh().data_connections()
    }

    /// Connections of `dog` from other machines that proved the key; taken once.
    pub fn client_connections(&self) -> mpsc::Receiver<Connection> {
        self.mesh().client_connections()
    }
}

/// A node as it was when it was a member last.
fn last_known(state: &ClusterState, node: NodeId) -> Option<&Member> {
    let now = state.members.get(&node);
    let before = || state.epochs.iter().rev().find_map(|record| record.members.get(&node));
    now.or_else(before).map(|member| &member.member)
}

/// The node port addresses of a member, the preferred one first.
fn addresses_of(member: &Member) -> Vec<SocketAddr> {
    member.peer_endpoint.split(',').filter_map(|address| address.parse().ok()).collect()
}

impl Driver for Quorum {
    fn propose(&self, command: Command) -> DriverFuture<'_, Result<Outcome, OrderError>> {
        Box::pin(async move {
            match (command, self.charter()) {
                (Command::Format { cluster_id, copies, object_size_shift, flags, time }, None) => {
                    let format = founding::Format { cluster_id, copies, object_size_shift, flags, time };
                    self.found(format).await
                }
                (_, None) => Ok(Outcome::Refused(sheep_core::command::Refusal::NotFormatted)),
                (command, Some(_)) => self.order(command).await,
            }
        })
    }

    fn barrier(&self) -> DriverFuture<'_, Result<(), OrderError>> {
        Box::pin(self.read_barrier())
    }

    fn leave(&self) -> DriverFuture<'_, ()> {
        Box::pin(async move {
            self.inner.leaving.store(true, Ordering::Release);
            self.say_goodbye().await;
        })
    }

    fn dial(&self, member: &Member) -> DriverFuture<'_, std::io::Result<Connection>> {
        let node = member.id;
        Box::pin(async move { self.mesh().dial_data(node).await })
    }

    fn overview(&self) -> Overview {
        self.describe()
    }

    fn administer(&self, request: Administration) -> DriverFuture<'_, Result<String, AdministrationError>> {
        Box::pin(self.carry_out(request))
    }
}
