//! The simulated world: whole clusters on one thread, all of their history from one seed.
//!
//! | module | what it gives |
//! |---|---|
//! | [`trial`] | one run: founding, load, faults, healing, judgement |
//! | [`cluster`] | machines with complete nodes on them, moved on in steps of simulated time |
//! | [`net`] | streams and datagrams, delayed, lost, cut and reset |
//! | [`sim_disk`] | disks that lose power, fail, fill up and rot |
//! | [`guests`], [`lazy_guest`], [`client`] | who reads and writes, and how |
//! | [`volume_guest`], [`volume_memory`], [`nbd`] | who makes volumes, snapshots and clones, and what they must hold |
//! | [`inventory`] | what there should be on the disks, and what there is |
//! | [`hands`] | what breaks things and puts them right again |
//! | [`entropy`] | randomness that libraries take by themselves |

pub mod client;
pub mod cluster;
pub mod entropy;
pub mod guests;
pub mod hands;
pub mod inventory;
pub mod lazy_guest;
pub mod nbd;
pub mod net;
pub mod sim_disk;
pub mod trial;
pub mod volume_guest;
pub mod volume_memory;

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use sheep::world::World;
use sheep::world::clock::{Clock, WallTime};
use sheep::world::disk::Disk;
use sheep::world::net::{Connection, Endpoint, Listener, Net, NetFuture};
use sheep::world::rng::Rng;

/// Bits that follow from a seed: SplitMix64.
#[derive(Clone, Debug)]
pub struct Random {
    state: u64,
}

impl Random {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> Random {
        Random { state: seed }
    }

    /// The next 64 bits.
    pub fn bits(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        mix(self.state)
    }

    /// A number below `limit`, which is not 0.
    pub fn below(&mut self, limit: u64) -> u64 {
        self.bits() % limit
    }

    /// True in one of `count` cases.
    pub fn one_in(&mut self, count: u64) -> bool {
        self.below(count) == 0
    }
}

fn mix(state: u64) -> u64 {
    let first = (state ^ (state >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let second = (first ^ (first >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    second ^ (second >> 31)
}

/// The runtime's clock, which a paused runtime moves on by itself whenever all tasks wait.
pub struct SimClock {
    start: tokio::time::Instant,
    wall_offset_seconds: Arc<AtomicI64>,
}

impl SimClock {
    /// A clock whose zero is now.
    pub fn new() -> SimClock {
        SimClock::with_wall(Arc::default())
    }

    /// The same, with a wall clock that somebody sets.
    pub fn with_wall(wall_offset_seconds: Arc<AtomicI64>) -> SimClock {
        SimClock { start: tokio::time::Instant::now(), wall_offset_seconds }
    }
}

impl Default for SimClock {
    fn default() -> Self {
        SimClock::new()
    }
}

impl Clock for SimClock {
    fn monotonic(&self) -> Duration {
        self.start.elapsed()
    }

    fn wall(&self) -> WallTime {
        let since = self.monotonic();
        let start = 1_700_000_000_i64.saturating_add(self.wall_offset_seconds.load(Ordering::Relaxed));
        WallTime { seconds: start.max(0) as u64 + since.as_secs(), nanoseconds: since.subsec_nanos() }
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        Box::pin(tokio::time::sleep(duration))
    }
}

/// Random bits of a seed.
pub struct SimRng {
    state: AtomicU64,
}

impl SimRng {
    /// The sequence of a seed.
    pub fn new(seed: u64) -> SimRng {
        SimRng { state: AtomicU64::new(seed) }
    }
}

impl Rng for SimRng {
    fn next_u64(&self) -> u64 {
        let step = 0x9e37_79b9_7f4a_7c15;
        mix(self.state.fetch_add(step, Ordering::Relaxed).wrapping_add(step))
    }
}

/// A machine without a network.
pub struct NoNet;

impl Net for NoNet {
    fn listen(&self, _: &Endpoint) -> NetFuture<'_, Box<dyn Listener>> {
        Box::pin(async { Err(io::ErrorKind::NetworkUnreachable.into()) })
    }

    fn connect(&self, _: &Endpoint) -> NetFuture<'_, Connection> {
        Box::pin(async { Err(io::ErrorKind::NetworkUnreachable.into()) })
    }
}

/// A world of one machine without a network. Call it inside a runtime, best a paused one.
pub fn lone_world(disk: Arc<dyn Disk>, seed: u64) -> World {
    World { clock: Arc::new(SimClock::new()), disk, net: Arc::new(NoNet), rng: Arc::new(SimRng::new(seed)) }
}
