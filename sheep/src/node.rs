//! One node: builds the floors from the bottom up and stops them from the top down. The only place that sees them all.

use std::net::SocketAddr;
use std::sync::Arc;

use anyhow::Context;
use qemu_proto::node_entry::NodeEntry;
use sheep_core::cluster_state::{ClusterState, Phase};
use sheep_core::member::{Member, NodeId};
use tokio::sync::Notify;

use crate::cluster::{Cluster, local};
use crate::config::{ClusterDriver, Config, NbdListen, listen_addresses};
use crate::data::{Data, flush, gateway::lease_table, view_change};
use crate::front::nbd::tls::Tls;
use crate::front::nbd::{self, TlsPolicy};
use crate::front::sheepdog::{self, Front, NbdPlaces};
use crate::store::{Store, StoreConfig};
use crate::world::World;
use crate::world::net::{Endpoint, Listener};

/// Name of the store's layout, as old tools show it.
const STORE_NAME: &str = "plain";
/// The sockets in the store directory: Sheepdog's protocol and NBD.
const SOCKET: &str = "sock";
const NBD_SOCKET: &str = "nbd.sock";
/// Space that clients' writes leave free, so that recovery can bring whole objects in: a hundredth of the disk, but no more
/// than this.
const RESERVE_BYTES_MAX: u64 = 4 << 30;
/// Weight of a member whose disk says nothing of its size: any positive value takes its share.
const WEIGHT_MIN: u64 = 1 << 20;
/// How long a stop may take to put leases in order and flush before it is done without.
const STOP_PATIENCE: std::time::Duration = std::time::Duration::from_secs(30);

/// Why a node stops.
pub enum Stop {
    /// Somebody asked it to.
    Asked,
    /// Its disk failed; what the store said.
    StoreFailed(String),
}

/// A node that serves.
pub struct Node {
    world: World,
    cluster: Cluster,
    data: Data,
    store: Option<Store>,
    stop: Arc<Notify>,
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
        let remembered = remembered_state(&store).await?;
        let clients = listen_clients(&world, config).await?;
        let tls = config.nbd_tls.as_ref().map(Tls::new).transpose().context("--nbd-tls")?;
        let nbd_listeners = listen_nbd(&world, config).await?;
        let peers = world
            .net
            .listen(&Endpoint::Tcp(SocketAddr::new(config.bind.unwrap_or(config.my_address), 0)))
            .await
            .with_context(|| format!("cannot listen for other nodes on {}", config.my_address))?;
        let member = describe(config, &store, peers.as_ref());
        tracing::info!("node {} ({}:{}) is going to join the cluster", member.id, config.my_address, config.port);
        let ClusterDriver::Local(directory) = &config.cluster;
        let cluster =
            local::join(&world, directory.clone(), member, remembered).await.context("failed to join Sheepdog")?;
        let kept = (!config.gateway).then(|| store.clone());
        let data = Data::new(world.clone(), cluster.clone(), kept);
        view_change::start(&data, peers);
        data.settle_in().await;
        let stop = Arc::new(Notify::new());
        let front =
            Front { data: data.clone(), stop: stop.clone(), store_name: STORE_NAME, nbd: nbd_places(&nbd_listeners) };
        for listener in clients {
            tokio::spawn(sheepdog::listen(front.clone(), listener));
        }
        tokio::spawn(nbd::export::delete_overlays(data.clone(), nbd::export::left_overlays(&data)));
        for listener in nbd_listeners {
            let policy = match (&tls, listener.local()) {
                (None, _) => TlsPolicy::None,
                (Some(tls), Endpoint::Unix(_)) => TlsPolicy::Offered(tls.clone()),
                (Some(tls), Endpoint::Tcp(_)) => TlsPolicy::Required(tls.clone()),
            };
            tokio::spawn(nbd::listen(data.clone(), listener, policy));
        }
        tracing::info!("sheepdog daemon (version {}) started", env!("CARGO_PKG_VERSION"));
        let sockets = [SOCKET, NBD_SOCKET].map(|name| config.meta.join(name));
        Ok(Node { world, cluster, data, store: Some(store), stop, sockets })
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
        tokio::select! {
            () = self.stop.notified() => Stop::Asked,
            () = shut_down => Stop::Asked,
            reason = failed => Stop::StoreFailed(reason),
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

    /// Leaves: writes under way end, leases go back, everything is flushed, the others are told, the store is closed.
    pub async fn stop(mut self) {
        tracing::info!("shutdown");
        let shutting_down = self.cluster.state().phase == Phase::Shutdown;
        let orderly = async {
            for lease in self.data.leases().all() {
                lease_table::give_back(&self.data, lease.vdi).await;
            }
            if !shutting_down && flush::flush(&self.data).await.is_err() {
                tracing::warn!("leaving although not everything could be flushed");
            }
        };
        tokio::select! {
            () = orderly => {}
            () = self.world.clock.sleep(STOP_PATIENCE) => tracing::warn!("leaving with requests under way"),
        }
        if !shutting_down {
            self.cluster.leave().await;
        }
        if let Some(store) = self.store.take()
            && let Err(error) = store.close().await
        {
            tracing::error!("the store was not closed in order ({error}): the next start replays its journal");
        }
        self.remove_sockets().await;
    }
}

async fn store_config(world: &World, config: &Config) -> anyhow::Result<StoreConfig> {
    let mut store = StoreConfig::new(&config.meta);
    store.disks.clone_from(&config.disks);
    store.journal_bytes = config.journal_bytes;
    store.journal_dir.clone_from(&config.journal_dir);
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

fn describe(config: &Config, store: &Store, peers: &dyn Listener) -> Member {
    let Endpoint::Tcp(peer) = peers.local() else { unreachable!("the peers' listener was opened on TCP") };
    let id: NodeId = store.node_id();
    Member {
        id,
        address: NodeEntry::address_bytes(config.my_address),
        port: config.port,
        peer_endpoint: SocketAddr::new(config.my_address, peer.port()).to_string(),
        zone: config.zone,
        weight: if config.gateway { 0 } else { store.space().total_bytes.max(WEIGHT_MIN) },
    }
}
