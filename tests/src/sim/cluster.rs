//! Machines with complete nodes on them, all on one thread, moved on in steps of simulated time.
//!
//! Each node has a tokio runtime of its own, with a paused clock; the clients share another. A tick delivers what the network
//! has for now and then lets every runtime run until it has nothing more to do for one millisecond of its clock. Nothing
//! passes from one machine to another within a tick, so the order of their turns means nothing. A crash drops a runtime:
//! every task of the node ends where it waits.
//!
//! Always holds:
//! 1. A process that is over changes nothing any more: neither its machine's disk nor the network takes anything from it.
//! 2. Time is the same everywhere, to the millisecond; how long computing takes is not simulated.

use std::cell::Cell;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use sheep::config::{ClusterDriver, Config, LogDestination, NbdListen};
use sheep::front::allowed::Allowed;
use sheep::logging::LogLevel;
use sheep::node::{Node, Stop};
use sheep::store::CacheConfig;
use sheep::world::World;
use sheep_core::level::Level;
use tokio::runtime::Runtime;
use tokio::sync::Notify;
use tokio::task::JoinHandle;

use super::net::{SimNet, address};
use super::sim_disk::{Cut, SimDisk};
use super::{Random, SimClock, SimRng};

/// Where every node keeps its store, on its own disk.
pub const STORE: &str = "/sheep";
/// Where its cache is, if it has one.
const CACHE: &str = "/cache";
const CLIENT_PORT: u16 = 7000;
const NODE_PORT: u16 = 7010;
/// Small, so that it wraps around.
pub const JOURNAL_BYTES: u64 = 8 << 20;
const TICK: Duration = Duration::from_millis(1);

thread_local! {
    static SHOWN: Cell<(u64, Option<usize>)> = const { Cell::new((0, None)) };
}

/// Simulated milliseconds, and the machine whose turn it is: for log lines.
pub fn shown() -> (u64, Option<usize>) {
    SHOWN.get()
}

/// How a node ended by itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Ended {
    /// It was asked to stop, and did.
    Stopped,
    /// What it said.
    Failed(String),
    /// It could not rely on its disk and ended at once, or its machine died in the middle of something.
    Died,
}

struct Life {
    runtime: Runtime,
    main: JoinHandle<Ended>,
    terminate: Arc<Notify>,
    serves: Arc<AtomicBool>,
}

struct Machine {
    disk: SimDisk,
    wall: Arc<AtomicI64>,
    life: Option<Life>,
    is_on: bool,
    /// Until then its process is paused: since when, and until when.
    paused: Option<(u64, u64)>,
    /// What comes when `stop_after_sends` or `cut_after` comes true.
    dies_of_power: bool,
}

/// See the module.
pub struct SimCluster {
    shape: Shape,
    net: SimNet,
    machines: Vec<Machine>,
    clients: Runtime,
    now_ms: u64,
    random: Random,
}

fn runtime() -> Runtime {
    tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().expect("it opens no files")
}

/// How the machines of a cluster are made.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Shape {
    /// How many there are.
    pub machines: usize,
    /// They stand in so many zones, in turn.
    pub zones: usize,
    /// Disks of each store.
    pub disks: usize,
    /// Bytes of the cache in front of them; 0 for none.
    pub cache_bytes: u64,
}

impl Shape {
    /// The zone of a machine.
    pub fn zone(self, host: usize) -> u32 {
        (host % self.zones) as u32 + 1
    }
}

/// What every node is started with. Machines look for each other by address.
fn config(host: usize, shape: Shape) -> Config {
    let count = shape.machines;
    let several = (0..shape.disks).map(|disk| PathBuf::from(format!("{STORE}-disk{disk}")));
    Config {
        meta: PathBuf::from(STORE),
        disks: if shape.disks > 1 { several.collect() } else { Vec::new() },
        port: CLIENT_PORT,
        nbd: NbdListen::Nowhere,
        nbd_tls: None,
        bind: Some(address(host)),
        my_address: None,
        zone: Some(shape.zone(host)),
        node_address: None,
        node_port: NODE_PORT,
        seeds: (0..count).filter(|other| *other != host).map(|other| address(other).to_string()).collect(),
        token: None,
        key_file: None,
        allowed: Allowed::default(),
        cluster: ClusterDriver::Raft,
        gateway: false,
        sync: true,
        foreground: true,
        pid_file: None,
        journal_bytes: JOURNAL_BYTES,
        journal_dir: None,
        cache: (shape.cache_bytes > 0).then(|| CacheConfig { dir: CACHE.into(), size_bytes: shape.cache_bytes }),
        log_destination: LogDestination::Stderr,
        log_dir: None,
        log_level: LogLevel::INFO,
        level: Level::OURS,
    }
}

async fn live(world: World, config: Config, terminate: Arc<Notify>, serves: Arc<AtomicBool>) -> Ended {
    let started = async {
        let store = Node::open_store(&world, &config).await?;
        Node::start(world.clone(), &config, store).await
    };
    let node = match started.await {
        Ok(node) => node,
        Err(error) => return Ended::Failed(format!("{error:#}")),
    };
    serves.store(true, Ordering::Relaxed);
    let stop = tokio::select! {
        stop = node.asked_to_stop() => stop,
        () = terminate.notified() => Stop::Asked,
    };
    match stop {
        Stop::Asked | Stop::WithAll => {
            node.stop(matches!(stop, Stop::WithAll)).await;
            Ended::Stopped
        }
        Stop::ShutOut(reason) | Stop::StoreFailed(reason) => {
            node.give_up().await;
            Ended::Failed(reason)
        }
    }
}

impl SimCluster {
    /// Machines with empty disks, nothing running.
    pub fn new(shape: Shape, seed: u64) -> SimCluster {
        let count = shape.machines;
        let mut random = Random::new(seed);
        let machine = |disk: SimDisk| Machine {
            disk,
            wall: Arc::default(),
            life: None,
            is_on: true,
            paused: None,
            dies_of_power: false,
        };
        SimCluster {
            shape,
            net: SimNet::new(count, random.bits()),
            machines: (0..count).map(|_| machine(SimDisk::new(random.bits()))).collect(),
            clients: runtime(),
            now_ms: 0,
            random,
        }
    }

    /// How many machines there are.
    pub fn count(&self) -> usize {
        self.machines.len()
    }

    /// Simulated time since the beginning.
    pub fn now_ms(&self) -> u64 {
        self.now_ms
    }

    /// The network.
    pub fn net(&self) -> &SimNet {
        &self.net
    }

    /// How the machines are made.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The disks of all machines.
    pub fn disks(&self) -> Vec<SimDisk> {
        self.machines.iter().map(|machine| machine.disk.clone()).collect()
    }

    /// A machine's disk.
    pub fn disk(&self, host: usize) -> &SimDisk {
        &self.machines[host].disk
    }

    /// Where clients run.
    pub fn clients(&self) -> &Runtime {
        &self.clients
    }

    /// Sets a machine's wall clock.
    pub fn set_wall_offset(&self, host: usize, seconds: i64) {
        self.machines[host].wall.store(seconds, Ordering::Relaxed);
    }

    /// Whether a process runs there.
    pub fn is_running(&self, host: usize) -> bool {
        self.machines[host].life.is_some()
    }

    /// Whether that process takes clients.
    pub fn serves(&self, host: usize) -> bool {
        self.machines[host].life.as_ref().is_some_and(|life| life.serves.load(Ordering::Relaxed))
    }

    /// Starts a node, after its machine if that is off.
    pub fn start(&mut self, host: usize) {
        let (shape, seed) = (self.shape, self.random.bits());
        let machine = &mut self.machines[host];
        assert!(machine.life.is_none(), "node {host} runs already");
        if !machine.is_on {
            machine.is_on = true;
            self.net.power_on(host);
        }
        SHOWN.set((self.now_ms, Some(host)));
        let runtime = runtime();
        let (terminate, serves) = (Arc::new(Notify::new()), Arc::new(AtomicBool::new(false)));
        let main = {
            let _inside = runtime.enter();
            let world = World {
                clock: Arc::new(SimClock::with_wall(machine.wall.clone())),
                disk: machine.disk.attach_deferred(),
                net: Arc::new(self.net.boot(host, machine.disk.end_watch())),
                rng: Arc::new(SimRng::new(seed)),
            };
            runtime.spawn(live(world, config(host, shape), terminate.clone(), serves.clone()))
        };
        machine.life = Some(Life { runtime, main, terminate, serves });
        SHOWN.set((self.now_ms, None));
    }

    /// Asks a node to stop, as SIGTERM does.
    pub fn terminate(&self, host: usize) {
        if let Some(life) = &self.machines[host].life {
            life.terminate.notify_one();
        }
    }

    /// Pauses a node's process in the middle of whatever it does. When it goes on, its clock has gone on without it.
    pub fn pause(&mut self, host: usize, time_ms: u64) {
        let until = self.now_ms + time_ms;
        let (since, longer) = self.machines[host].paused.unwrap_or((self.now_ms, until));
        self.machines[host].paused = Some((since, longer.max(until)));
    }

    /// Lets a paused process go on.
    pub fn resume(&mut self, host: usize) {
        if let Some((since, _)) = self.machines[host].paused.take()
            && let Some(life) = &self.machines[host].life
        {
            SHOWN.set((self.now_ms, Some(host)));
            // All its timers that ran out meanwhile do so now.
            let missed = Duration::from_millis(self.now_ms.saturating_sub(since));
            life.runtime.block_on(tokio::time::advance(missed));
            SHOWN.set((self.now_ms, None));
        }
    }

    /// Ends a node's process at once.
    pub fn kill(&mut self, host: usize) {
        self.end(host, None);
    }

    /// Cuts a machine's power: `seed` decides what its disk keeps of what was not flushed.
    pub fn power_off(&mut self, host: usize, seed: u64) {
        self.end(host, Some(Cut::Power(seed)));
    }

    /// Lets a machine die in the middle of what it is doing: after so many packets.
    pub fn die_after_sends(&mut self, host: usize, count: u64, of_power: bool) {
        self.machines[host].dies_of_power = of_power;
        self.net.stop_after_sends(host, count);
    }

    /// As `die_after_sends`: in the middle of a changing disk operation.
    pub fn die_after_operations(&mut self, host: usize, count: u64, of_power: bool) {
        self.machines[host].dies_of_power = of_power;
        let cut = if of_power { Cut::Power(self.random.bits()) } else { Cut::Kill };
        self.machines[host].disk.cut_after(count, cut);
    }

    /// Cuts a machine's power in the middle of a write to its journal, after so many.
    pub fn tear_journal(&mut self, host: usize, count: u64) {
        self.machines[host].dies_of_power = true;
        let cut = Cut::Power(self.random.bits());
        self.machines[host].disk.cut_in_write("/journal", count, cut);
    }

    /// An empty disk in the place of the old one. The node must not run.
    pub fn wipe(&mut self, host: usize) {
        assert!(self.machines[host].life.is_none(), "the node runs");
        self.machines[host].disk.erase();
    }

    fn end(&mut self, host: usize, power: Option<Cut>) {
        let machine = &mut self.machines[host];
        machine.paused = None;
        let Some(life) = machine.life.take() else {
            if power.is_some() && machine.is_on {
                machine.is_on = false;
                self.net.power_off(host);
            }
            return;
        };
        SHOWN.set((self.now_ms, Some(host)));
        machine.disk.cancel_cut();
        match power {
            Some(Cut::Power(seed)) => {
                machine.disk.power_cut(seed);
                machine.is_on = false;
                self.net.power_off(host);
            }
            Some(Cut::Kill) | None => {
                machine.disk.kill();
                self.net.kill(host);
            }
        }
        drop(life);
        SHOWN.set((self.now_ms, None));
    }

    /// One tick. Tells which nodes ended by themselves, and how.
    pub fn tick(&mut self) -> Vec<(usize, Ended)> {
        self.now_ms += 1;
        SHOWN.set((self.now_ms, None));
        self.net.advance(self.now_ms);
        let mut ended = Vec::new();
        for host in 0..self.machines.len() {
            match self.machines[host].paused {
                Some((_, until)) if until > self.now_ms => continue,
                Some(_) => self.resume(host),
                None => {}
            }
            let Some(life) = &mut self.machines[host].life else { continue };
            SHOWN.set((self.now_ms, Some(host)));
            life.runtime.block_on(async { tokio::time::sleep(TICK).await });
            if self.net.has_stopped(host) {
                let seed = self.random.bits();
                let power = self.machines[host].dies_of_power.then_some(Cut::Power(seed));
                self.end(host, power);
                ended.push((host, Ended::Died));
            } else if life.main.is_finished() {
                let how = life.runtime.block_on(&mut life.main).unwrap_or(Ended::Died);
                self.end(host, None);
                ended.push((host, how));
            }
        }
        SHOWN.set((self.now_ms, None));
        self.clients.block_on(async { tokio::time::sleep(TICK).await });
        ended
    }

    /// A number that differs, as good as surely, when two simulations differ: of all deliveries, notes and disk operations.
    pub fn trace(&self) -> u64 {
        let disks = self.machines.iter().map(|machine| machine.disk.fingerprint());
        disks.fold(self.net.trace(), |trace, disk| super::mix(trace ^ disk))
    }
}

impl Drop for SimCluster {
    fn drop(&mut self) {
        for host in 0..self.machines.len() {
            self.end(host, None);
        }
    }
}
