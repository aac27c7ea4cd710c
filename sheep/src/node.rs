//! One node: builds the floors from the bottom up and stops them from the top down. The only place that sees them all.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use anyhow::Context;
use qemu_proto::node_entry::NodeEntry;
use sheep_core::admission::ClusterKey;
use sheep_core::cluster_state::{ClusterState, Phase};
use sheep_core::member::{Member, NodeId};
use tokio::sync::{Notify, mpsc};

use crate::cluster::discovery::Seed;
use crate::cluster::quorum::{self, Quorum, QuorumConfig};
use crate::cluster::{Cluster, local};
use crate::config::{ClusterDriver, Config, NbdListen, default_zone, listen_addresses};
use crate::data::client::Client;
use crate::data::{Data, flush, gateway::lease_table, view_change};
use crate::front::nbd::tls::Tls;
use crate::front::nbd::{self, TlsPolicy};
use crate::front::sheepdog::{self, Front, LogControl, NbdPlaces};
use crate::logging::{self, LogLevel};
use crate::store::{Store, StoreConfig};
use crate::world::World;
use crate::world::net::{Connection, Endpoint, Listener, NetFuture};

/// Name of the store's layout, as old tools show it.
const STORE_NAME: &str = "plain";
/// The sockets in the store directory: Sheepdog's protocol and NBD.
const SOCKET: &str = "sock";
const NBD_SOCKET: &str = "nbd.sock";
/// Space that clients' writes leave free, so that recovery can bring whole objects in: a hundredth of the disk, but no more
/// than this.
const RESERVE_BYTES_MAX: u64 = 4 << 30;
/// How long a stop may take to put leases in order and flush before it is done without.
const STOP_PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// Why a node stops.
pub enum Stop {
    /// Somebody asked it to.
    Asked,
    /// The whole cluster stops.
    WithAll,
    /// Its disk failed; what the store said.
    StoreFailed(String),
    /// It may not be part of its cluster; why.
    ShutOut(String),
}

/// A node that serves.
pub struct Node {
    world: World,
    cluster: Cluster,
    data: Data,
    store: Option<Store>,
    stop: Arc<Notify>,
    /// The default driver, if it is that.
    quorum: Option<Quorum>,
    /// The sockets in the store directory, removed at the end.
    sockets: [std::path::PathBuf; 2],
}

impl Node {
    /// Opens the store: whoever opens the directory first holds it, before anything of another process can be disturbed.
    pub async fn open_store(world: &World, config: &Config) -> anyhow::Result<Store> {
        Ok(Store::open(world.clone(), store_config(world, config).await?).await?)
    }

    /// Joins the cluster and serves; returns once clients can connect.
    pub async fn start(world: World, config: &Config, store: Store) -> anyhow::Result<Node> {
        let report = store.report();
        if report.replayed_records > 0 || report.cut_tail {
            tracing::info!("replayed {} records of the journal", report.replayed_records);
        }
        if let Some(trouble) = store.cache_trouble() {
            // A node that was started again with a broken cache is worth more than none.
            tracing::error!("{trouble}; reads go on without it");
        }
        let remembered = remembered_state(&store).await?;
        let clients = listen_clients(&world, config).await?;
        let tls = config.nbd_tls.as_ref().map(Tls::new).transpose().context("--nbd-tls")?;
        let nbd_listeners = listen_nbd(&world, config).await?;
        let Joined { cluster, quorum, peers } = join(&world, config, &store, remembered).await?;
        let kept = (!config.gateway).then(|| store.clone());
        let data = Data::new(world.clone(), cluster.clone(), kept);
        view_change::start(&data, peers);
        data.settle_in().await;
        let stop = Arc::new(Notify::new());
        let front = Front {
            data: data.clone(),
            stop: stop.clone(),
            store_name: STORE_NAME,
            nbd: nbd_places(&nbd_listeners),
            log: LogControl {
                level: || logging::level().number(),
                set_level: |number| LogLevel::of_number(number).map(logging::set_level).is_some(),
            },
            trusted: true,
            restores: Arc::default(),
            locks: Arc::default(),
            connection: 0,
            client: Client::default(),
        };
        for listener in clients {
            tokio::spawn(sheepdog::listen(front.clone(), listener, config.allowed.clone()));
        }
        if let Some(quorum) = &quorum {
            tokio::spawn(serve_keyholders(front.clone(), quorum.client_connections()));
        }
        tokio::spawn(nbd::export::delete_overlays(data.clone(), nbd::export::left_overlays(&data)));
        for listener in nbd_listeners {
            let policy = match (&tls, listener.local()) {
                (None, _) => TlsPolicy::None(config.allowed.clone()),
                (Some(tls), Endpoint::Unix(_)) => TlsPolicy::Offered(tls.clone()),
                (Some(tls), Endpoint::Tcp(_)) => TlsPolicy::Required(tls.clone()),
            };
            tokio::spawn(nbd::listen(data.clone(), listener, policy));
        }
        tracing::info!("sheepdog daemon (version {}) started", env!("CARGO_PKG_VERSION"));
        let sockets = [SOCKET, NBD_SOCKET].map(|name| config.meta.join(name));
        Ok(Node { world, cluster, data, store: Some(store), stop, quorum, sockets })
    }

    /// Waits until a client, or the operator through the order, asks this node to stop, or its store fails.
    pub async fn asked_to_stop(&self) -> Stop {
        let mut states = self.cluster.watch();
        let shut_down = async {
            // The driver lives as long as this node.
            let _ = states.wait_for(|state| state.phase == Phase::Shutdown).await;
        };
        let failed = async {
            match self.data.holder() {
                Some(holder) => holder.failed().await,
                None => std::future::pending().await,
            }
        };
        let shut_out = async {
            match &self.quorum {
                Some(quorum) => quorum.failed().await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            () = self.stop.notified() => Stop::Asked,
            () = shut_down => Stop::WithAll,
            reason = failed => Stop::StoreFailed(reason),
            reason = shut_out => Stop::ShutOut(reason),
        }
    }

    /// Leaves at once because the store failed: the others go on with their copies.
    pub async fn give_up(self) {
        self.cluster.leave().await;
        self.remove_sockets().await;
    }

    /// What is left of it after a crash, the next start replaces.
    async fn remove_sockets(&self) {
        for socket in &self.sockets {
            let path = socket.clone();
            let removed = crate::world::disk::run(&self.world.disk, move |files| files.remove_file(&path));
            if let Err(error) = removed.await {
                tracing::warn!("cannot remove the socket {}: {error}", socket.display());
            }
        }
    }

    /// Leaves: writes under way end, leases go back, everything is flushed, the others are told, the store is closed. `with_all`
    /// tells that it was the stop of the whole cluster that it heard of: the others may be back by now.
    pub async fn stop(mut self, with_all: bool) {
        tracing::info!("shutdown");
        let shutting_down = with_all || self.cluster.state().phase == Phase::Shutdown;
        let orderly = async {
            for lease in self.data.leases().all() {
                lease_table::give_back(&self.data, lease.vdi).await;
            }
            if !shutting_down && flush::flush(&self.data, None).await.is_err() {
                tracing::warn!("leaving although not everything could be flushed");
            }
        };
        // Whoever stays behind when all stop, until the others come back, is not to come in with them: it is about to end.
        let mut states = self.cluster.watch();
        let left_behind = async {
            if !shutting_down || states.wait_for(|state| state.phase != Phase::Shutdown).await.is_err() {
                std::future::pending::<()>().await;
            }
        };
        tokio::select! {
            () = orderly => {}
            () = left_behind => tracing::warn!("leaving with requests under way: the others are back"),
            () = self.world.clock.sleep(STOP_PATIENCE) => tracing::warn!("leaving with requests under way"),
        }
        self.cluster.leave().await;
        if let Some(store) = self.store.take()
            && let Err(error) = store.close().await
        {
            tracing::error!("the store was not closed in order ({error}): the next start replays its journal");
        }
        self.remove_sockets().await;
    }
}

/// A node that is on its way into the order.
struct Joined {
    cluster: Cluster,
    quorum: Option<Quorum>,
    peers: Box<dyn Listener>,
}

async fn join(
    world: &World,
    config: &Config,
    store: &Store,
    remembered: Option<ClusterState>,
) -> anyhow::Result<Joined> {
    match &config.cluster {
        ClusterDriver::Local(directory) => {
            let own = config.my_address.unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
            let place = Endpoint::Tcp(SocketAddr::new(config.bind.unwrap_or(own), 0));
            let peers = world.net.listen(&place).await;
            let peers = peers.with_context(|| format!("cannot listen for other nodes on {own}"))?;
            let Endpoint::Tcp(listening) = peers.local() else { unreachable!("it was opened on TCP") };
            let endpoint = SocketAddr::new(own, listening.port()).to_string();
            let member = Member { peer_endpoint: endpoint, ..describe(world, config, store, own) };
            tracing::info!("node {} ({own}:{}) is going to join the cluster", member.id, config.port);
            let joined = local::join(world, directory.clone(), member, remembered).await;
            Ok(Joined { cluster: joined.context("failed to join Sheepdog")?, quorum: None, peers })
        }
        ClusterDriver::Raft => {
            let quorum_config = quorum_config(world, config, store, remembered.as_ref()).await?;
            tracing::info!("node {} is looking for its cluster", quorum_config.member.id);
            let (cluster, quorum) = quorum::start(world, quorum_config).await?;
            let peers = Box::new(FromMesh { connections: tokio::sync::Mutex::new(quorum.data_connections()) });
            Ok(Joined { cluster, quorum: Some(quorum), peers })
        }
    }
}

async fn quorum_config(
    world: &World,
    config: &Config,
    store: &Store,
    remembered: Option<&ClusterState>,
) -> anyhow::Result<QuorumConfig> {
    let local = world.net.local_addresses().context("cannot list this machine's addresses")?;
    let own = config.my_address.or(config.bind).or(local.first().copied()).unwrap_or(IpAddr::V4(Ipv4Addr::LOCALHOST));
    let others = if config.bind.is_some() { Vec::new() } else { local };
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in config.node_address.into_iter().chain([own]).chain(others) {
        let address = SocketAddr::new(address, config.node_port);
        if !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    let mut listen = Vec::new();
    for address in listen_addresses(config) {
        let place = SocketAddr::new(address, config.node_port);
        match world.net.listen(&Endpoint::Tcp(place)).await {
            Ok(_) => listen.push(place),
            Err(error) if address == IpAddr::V6(Ipv6Addr::UNSPECIFIED) && !listen.is_empty() => {
                tracing::info!("no IPv6 between nodes: {error}");
            }
            Err(error) => {
                let hint = "is another sheep using it? Choose another one with -i port=PORT";
                return Err(anyhow::anyhow!("cannot listen for other nodes on {place}: {error}; {hint}"));
            }
        }
    }
    let key = match &config.key_file {
        Some(path) => Some(read_key(world, path).await?),
        None => None,
    };
    Ok(QuorumConfig {
        directory: config.meta.join("cluster"),
        listen,
        addresses,
        seeds: config.seeds.iter().map(|text| seed(text, config.node_port)).collect(),
        token: config.token.clone(),
        key,
        member: describe(world, config, store, own),
        store_cluster: remembered.map(|state| state.cluster_id),
    })
}

/// `HOST`, `HOST:PORT`, `ADDRESS` or `[ADDRESS]:PORT`.
fn seed(text: &str, default_port: u16) -> Seed {
    if let Ok(address) = text.parse::<SocketAddr>() {
        return Seed { host: address.ip().to_string(), port: address.port() };
    }
    if text.parse::<IpAddr>().is_err()
        && !text.ends_with(']')
        && let Some((host, port)) = text.rsplit_once(':')
        && let Ok(port) = port.parse()
    {
        return Seed { host: host.to_string(), port };
    }
    let host = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    Seed { host: host.to_string(), port: default_port }
}

async fn read_key(world: &World, path: &std::path::Path) -> anyhow::Result<ClusterKey> {
    let shown = path.display().to_string();
    let path = path.to_path_buf();
    let bytes = crate::world::disk::run(&world.disk, move |files| {
        let file = files.open(&path, crate::world::disk::OpenMode::Read)?;
        // A key is one line.
        let mut bytes = vec![0; 1024];
        let count = file.read_at(&mut bytes, 0)?;
        bytes.truncate(count);
        Ok::<_, std::io::Error>(bytes)
    });
    let bytes = bytes.await.with_context(|| format!("cannot read the key file {shown}"))?;
    let text = String::from_utf8_lossy(&bytes);
    text.trim().parse().map_err(|_| anyhow::anyhow!("{shown} is not a cluster key; copy PATH/cluster/key of a member"))
}

/// Other nodes' connections for objects, which the mesh has let in.
struct FromMesh {
    connections: tokio::sync::Mutex<mpsc::Receiver<(NodeId, Connection)>>,
}

impl Listener for FromMesh {
    fn accept(&self) -> NetFuture<'_, Connection> {
        Box::pin(async move {
            match self.connections.lock().await.recv().await {
                Some((_, connection)) => Ok(connection),
                // The mesh ends with the process.
                None => std::future::pending().await,
            }
        })
    }

    fn local(&self) -> Endpoint {
        Endpoint::Tcp(SocketAddr::new(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 0))
    }
}

/// `dog` on other machines, with the cluster key.
async fn serve_keyholders(front: Front, mut connections: mpsc::Receiver<Connection>) {
    while let Some(connection) = connections.recv().await {
        tokio::spawn(sheepdog::conn::serve(front.clone(), connection));
    }
}

async fn store_config(world: &World, config: &Config) -> anyhow::Result<StoreConfig> {
    let mut store = StoreConfig::new(&config.meta);
    store.disks.clone_from(&config.disks);
    store.journal_bytes = config.journal_bytes;
    store.journal_dir.clone_from(&config.journal_dir);
    store.cache.clone_from(&config.cache);
    store.sync = config.sync;
    let first = config.disks.first().unwrap_or(&config.meta).clone();
    let parent = first.parent().map_or_else(|| first.clone(), std::path::Path::to_path_buf);
    let space = crate::world::disk::run(&world.disk, move |files| {
        files.space(&first).or_else(|_| files.space(&parent)).map_err(|error| (first, error))
    });
    let space = space.await.map_err(|(path, error)| {
        anyhow::anyhow!("cannot create the directory {}: {error}; make its parent first", path.display())
    })?;
    store.reserve_bytes = (space.total_bytes / 100).min(RESERVE_BYTES_MAX);
    Ok(store)
}

async fn remembered_state(store: &Store) -> anyhow::Result<Option<ClusterState>> {
    let Some(bytes) = store.load_state().await? else { return Ok(None) };
    let state = postcard::from_bytes(&bytes)
        .context("the store's copy of the cluster's state is of another version; use the version that wrote it")?;
    Ok(Some(state))
}

async fn listen_clients(world: &World, config: &Config) -> anyhow::Result<Vec<Box<dyn Listener>>> {
    let mut listeners = Vec::new();
    for address in listen_addresses(config) {
        let endpoint = Endpoint::Tcp(SocketAddr::new(address, config.port));
        match world.net.listen(&endpoint).await {
            Ok(listener) => listeners.push(listener),
            // A machine without IPv6 is served on IPv4 alone.
            Err(error) if address.is_ipv6() && config.bind.is_none() && !listeners.is_empty() => {
                tracing::info!("not listening on {endpoint}: {error}");
            }
            Err(error) => {
                let hint = "is another sheep using this port? Choose another one with -p";
                return Err(anyhow::anyhow!("cannot listen on {endpoint}: {error}; {hint}"));
            }
        }
    }
    let socket = Endpoint::Unix(config.meta.join(SOCKET));
    listeners.push(world.net.listen(&socket).await.with_context(|| format!("cannot listen on {socket}"))?);
    Ok(listeners)
}

async fn listen_nbd(world: &World, config: &Config) -> anyhow::Result<Vec<Box<dyn Listener>>> {
    let socket = Endpoint::Unix(config.meta.join(NBD_SOCKET));
    let mut listeners = vec![world.net.listen(&socket).await.with_context(|| format!("cannot listen on {socket}"))?];
    let (NbdListen::IfFree(address) | NbdListen::At(address)) = config.nbd else { return Ok(listeners) };
    match world.net.listen(&Endpoint::Tcp(address)).await {
        Ok(listener) => {
            if !address.ip().is_loopback() && config.nbd_tls.is_none() {
                tracing::warn!("NBD on {address} lets whoever reaches it read and write every volume: see --nbd-tls");
            }
            listeners.push(listener);
        }
        Err(error) if matches!(config.nbd, NbdListen::At(_)) => {
            return Err(anyhow::anyhow!("cannot serve NBD on {address}: {error}; choose another place with --nbd"));
        }
        Err(error) => tracing::info!("NBD is served on {socket} only: {address}: {error}"),
    }
    Ok(listeners)
}

fn nbd_places(listeners: &[Box<dyn Listener>]) -> NbdPlaces {
    let mut places = NbdPlaces::default();
    for listener in listeners {
        match listener.local() {
            Endpoint::Unix(path) => places.socket = Some(path),
            Endpoint::Tcp(address) => places.port = Some(address.port()),
        }
    }
    places
}

fn describe(world: &World, config: &Config, store: &Store, own: IpAddr) -> Member {
    Member {
        id: store.node_id(),
        address: NodeEntry::address_bytes(own),
        port: config.port,
        peer_endpoint: String::new(),
        boot: world.rng.next_u64(),
        zone: config.zone.unwrap_or_else(|| default_zone(own)),
        weight: if config.gateway { 0 } else { crate::data::shares::weight_of(store) },
        level: config.level,
    }
}
