//! The `local` driver: many sheep on one machine, ordered by one log file under a file lock.
//!
//! A process proves that it lives by a lock on `DIRECTORY/alive/<node id>`, which the kernel gives back however the process
//! ends. Whoever finds the lock of a member free puts the eviction into the order; so nobody alive is ever evicted, and
//! `kill -9` is noticed within one round of `LIVENESS_INTERVAL`. There is no quorum: the survivors go on, down to one.
//!
//! A crash can leave: a torn record at the end of the log (cut by the next append); a member in the state whose lock is
//! free (evicted by the next process that looks); a directory that is gone while the stores remain (the first node
//! to start brings what it remembers, and the cluster waits for the members of the last epoch it knew of).

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sheep_core::cluster_state::{ClusterState, Phase};
use sheep_core::command::{Command, Outcome};
use sheep_core::member::{Member, NodeId};
use tokio::sync::watch;

use super::administration::{self, Administration, AdministrationError, Overview};
use super::driver::{Driver, DriverFuture, OrderError};
use super::order_log::OrderLog;
use super::{Cluster, Fence};
use crate::world::disk::{FileLock, Files};
use crate::world::net::{Connection, Endpoint};
use crate::world::{World, disk};

/// How often the log is looked at. A command of another process is seen after this at the latest; a tenth of it would
/// cost ten times the idle wake-ups (one look is some 40 us of CPU: 0.4 % of a core).
const POLL_INTERVAL: Duration = Duration::from_millis(10);
/// How often the locks of the other members are tried: the stall after `kill -9` is this plus the recovery's start.
const LIVENESS_INTERVAL: Duration = Duration::from_millis(20);
/// How long a start waits for the lock of its own identity: whoever looks whether it is free holds it for an instant.
const OWN_LOCK_PATIENCE: Duration = Duration::from_secs(2);

struct Local {
    world: World,
    directory: PathBuf,
    member: Member,
    log: Mutex<OrderLog>,
    state: watch::Sender<Arc<ClusterState>>,
    /// Held for life; dropped by `leave`.
    alive: Mutex<Option<Box<dyn FileLock>>>,
}

/// Comes into the cluster of a directory. `remembered` is the state that this node's store kept from its last life.
pub async fn join(
    world: &World,
    directory: PathBuf,
    member: Member,
    remembered: Option<ClusterState>,
) -> Result<Cluster, OrderError> {
    let alive = take_own_lock(world, &directory, member.id).await?;
    let (log, state) = {
        let (directory, member) = (directory.clone(), member.clone());
        let time = world.clock.wall().to_wire();
        disk::run(&world.disk, move |files| begin(files, &directory, &member, remembered, time)).await?
    };
    let (sender, receiver) = watch::channel(Arc::new(state));
    let node = member.id;
    let local = Arc::new(Local {
        world: world.clone(),
        directory,
        member,
        log: Mutex::new(log),
        state: sender,
        alive: Mutex::new(Some(alive)),
    });
    tokio::spawn(follow(local.clone()));
    let fence = Fence::always_open(world.clock.clone());
    Ok(Cluster::new(node, Arc::new(local), Arc::new(fence), receiver))
}

async fn take_own_lock(
    world: &World,
    directory: &std::path::Path,
    node: NodeId,
) -> Result<Box<dyn FileLock>, OrderError> {
    let deadline = world.clock.monotonic() + OWN_LOCK_PATIENCE;
    loop {
        let alive = directory.join("alive");
        let taken = disk::run(&world.disk, move |files| {
            files.create_dir(&alive)?;
            files.try_lock(&alive.join(node.to_string()))
        });
        match taken.await {
            Ok(Some(lock)) => return Ok(lock),
            Ok(None) if world.clock.monotonic() < deadline => world.clock.sleep(POLL_INTERVAL).await,
            Ok(None) => return Err(OrderError::NodeInUse { node: node.to_string() }),
            Err(error) => {
                let place = directory.display().to_string();
                return Err(OrderError::Io { action: "use the cluster directory", place, error });
            }
        }
    }
}

/// Reads the log, brings what the node remembers if the log knows less, and joins.
fn begin(
    files: &dyn Files,
    directory: &std::path::Path,
    member: &Member,
    remembered: Option<ClusterState>,
    time: u64,
) -> Result<(OrderLog, ClusterState), OrderError> {
    let mut log = OrderLog::open(files, directory)?;
    let lock = log.lock(files)?;
    log.catch_up(files)?;
    let ours = remembered.filter(|state| state.cluster_id != 0);
    // What belonged to a cluster that was formatted anew meanwhile is given up; so is the memory of it.
    if let Some(remembered) = ours.filter(|state| !log.state.replaced.contains(&state.cluster_id)) {
        let known = &log.state;
        if known.cluster_id != 0 && known.cluster_id != remembered.cluster_id {
            return Err(OrderError::OtherCluster { ours: remembered.cluster_id, theirs: known.cluster_id });
        }
        // Nodes that are only acquainted (an unformatted log) hold nothing; a log that is behind was begun by a node
        // that missed the cluster's last epochs.
        if known.cluster_id == 0 || known.progress() < remembered.progress() {
            log.append_snapshot(files, &lock, remembered.restarted())?;
        }
    }
    if log.state.phase == Phase::Shutdown {
        let state = log.state.clone().restarted();
        log.append_snapshot(files, &lock, state)?;
    }
    // This process has the lock of its own id: a member of that id is an earlier process.
    let earlier = log.state.members.contains_key(&member.id).then_some(member.id);
    evict_dead(files, directory, &mut log, &lock, earlier, member.id, time)?;
    log.append(files, &lock, Command::Join { member: member.clone(), time })?;
    let state = log.state.clone();
    Ok((log, state))
}

/// Puts the eviction of every member whose process is gone into the order, and of `earlier`.
fn evict_dead(
    files: &dyn Files,
    directory: &std::path::Path,
    log: &mut OrderLog,
    lock: &super::order_log::AppendLock,
    earlier: Option<NodeId>,
    own: NodeId,
    time: u64,
) -> Result<(), OrderError> {
    let mut nodes = Vec::from_iter(earlier);
    for node in log.state.members.keys().copied().filter(|node| *node != own) {
        if is_dead(files, directory, node)? {
            nodes.push(node);
        }
    }
    if !nodes.is_empty() {
        log.append(files, lock, Command::Evict { nodes, time })?;
    }
    Ok(())
}

fn is_dead(files: &dyn Files, directory: &std::path::Path, node: NodeId) -> Result<bool, OrderError> {
    let path = directory.join("alive").join(node.to_string());
    match files.try_lock(&path) {
        Ok(lock) => Ok(lock.is_some()),
        Err(error) => Err(OrderError::Io { action: "look at", place: path.display().to_string(), error }),
    }
}

impl Local {
    /// Runs `work` on the log where it may block, and publishes the state it leaves.
    async fn with_log<T: Send + 'static>(
        self: &Arc<Self>,
        work: impl FnOnce(&dyn Files, &Local, &mut OrderLog) -> Result<T, OrderError> + Send + 'static,
    ) -> Result<T, OrderError> {
        let local = self.clone();
        disk::run(&self.world.disk, move |files| {
            let mut log = local.log.lock().unwrap_or_else(PoisonError::into_inner);
            let before = log.changes;
            let result = work(files, &local, &mut log);
            // Published under the log's lock, so the states that others see only go forward.
            if log.changes != before {
                local.state.send_replace(Arc::new(log.state.clone()));
            }
            result
        })
        .await
    }

    async fn look_for_dead(self: &Arc<Self>) -> Result<(), OrderError> {
        let time = self.world.clock.wall().to_wire();
        self.with_log(move |files, local, log| {
            let others = log.state.members.keys().copied().filter(|node| *node != local.member.id);
            let mut dead = false;
            for node in others.collect::<Vec<_>>() {
                dead |= is_dead(files, &local.directory, node)?;
            }
            if dead {
                let lock = log.lock(files)?;
                log.catch_up(files)?;
                evict_dead(files, &local.directory, log, &lock, None, local.member.id, time)?;
            }
            Ok(())
        })
        .await
    }

    /// A state that another node brought does not know this node yet.
    async fn rejoin_if_forgotten(self: &Arc<Self>) -> Result<(), OrderError> {
        let forgotten = {
            let state = self.state.borrow();
            !state.members.contains_key(&self.member.id) && state.phase != Phase::Shutdown
        };
        let alive = self.alive.lock().unwrap_or_else(PoisonError::into_inner).is_some();
        if forgotten && alive {
            let time = self.world.clock.wall().to_wire();
            self.order(Command::Join { member: self.member.clone(), time }).await?;
        }
        Ok(())
    }

    async fn order(self: &Arc<Self>, command: Command) -> Result<Outcome, OrderError> {
        self.with_log(move |files, _, log| {
            let lock = log.lock(files)?;
            log.catch_up(files)?;
            log.append(files, &lock, command)
        })
        .await
    }
}

/// Follows the log and the other processes' locks until this node leaves.
async fn follow(local: Arc<Local>) {
    let mut since_liveness = Duration::ZERO;
    loop {
        local.world.clock.sleep(POLL_INTERVAL).await;
        if local.alive.lock().unwrap_or_else(PoisonError::into_inner).is_none() {
            return;
        }
        since_liveness += POLL_INTERVAL;
        let mut result = local.with_log(|files, _, log| log.catch_up(files)).await.map(|_| ());
        if result.is_ok() {
            result = local.rejoin_if_forgotten().await;
        }
        if result.is_ok() && since_liveness >= LIVENESS_INTERVAL {
            since_liveness = Duration::ZERO;
            result = local.look_for_dead().await;
        }
        if let Err(error) = result {
            // Without the order this node must not go on: others may have changed it. Its process ends, its lock goes
            // back, and the survivors take over.
            let reason = format!("lost the cluster's order: {error}");
            tracing::error!("{reason}");
            match local.world.disk.end_process(&reason).await {}
        }
    }
}

impl Driver for Arc<Local> {
    fn propose(&self, command: Command) -> DriverFuture<'_, Result<Outcome, OrderError>> {
        Box::pin(self.order(command))
    }

    fn barrier(&self) -> DriverFuture<'_, Result<(), OrderError>> {
        Box::pin(async move { self.with_log(|files, _, log| log.catch_up(files).map(|_| ())).await })
    }

    fn leave(&self) -> DriverFuture<'_, ()> {
        Box::pin(async move {
            let command = Command::Evict { nodes: vec![self.member.id], time: self.world.clock.wall().to_wire() };
            let departing = self.alive.lock().unwrap_or_else(PoisonError::into_inner).take();
            if self.state.borrow().phase == Phase::Shutdown {
                // The members of the last epoch are those who are waited for.
                return;
            }
            if let Err(error) = self.order(command).await {
                tracing::warn!("left without saying so: {error}");
            }
            drop(departing);
        })
    }

    fn dial(&self, member: &Member) -> DriverFuture<'_, std::io::Result<Connection>> {
        let address = member.peer_endpoint.parse();
        Box::pin(async move {
            let address = address.map_err(|error| std::io::Error::new(std::io::ErrorKind::InvalidInput, error))?;
            self.world.net.connect(&Endpoint::Tcp(address)).await
        })
    }

    fn overview(&self) -> Overview {
        let nodes = administration::members_of(&self.state.borrow());
        Overview { driver: "local", has_quorum: true, nodes, ..Overview::default() }
    }

    fn administer(&self, _request: Administration) -> DriverFuture<'_, Result<String, AdministrationError>> {
        Box::pin(async { Err(AdministrationError::NotWithThisDriver("admission or key")) })
    }
}
