//! Floor 2: the four doors to the outside: clock, disk, net and rng.
//!
//! Everything above this floor reaches the operating system only through a [`World`], so that the same code runs on
//! real machines and inside the simulator. This floor knows nothing of objects, epochs or VDIs. It is the only place
//! where operating-system calls, and any `unsafe`, may appear.

pub mod clock;
pub mod disk;
pub mod frames;
pub mod marks;
pub mod net;
pub mod panics;
pub mod planted;
pub mod real_disk;
mod real_mdns;
pub mod real_net;
pub mod rng;

use std::sync::Arc;

pub use clock::Clock;
pub use disk::Disk;
pub use net::Net;
pub use rng::Rng;

/// The bundle that every floor above is handed. Cloning it is cheap.
#[derive(Clone)]
pub struct World {
    /// Time: monotonic, wall, sleep.
    pub clock: Arc<dyn Clock>,
    /// Files and the threads that may block on them.
    pub disk: Arc<dyn Disk>,
    /// Listening and connecting.
    pub net: Arc<dyn Net>,
    /// Randomness.
    pub rng: Arc<dyn Rng>,
}

impl World {
    /// The real world of this process. `disk_threads` is the number of threads that may block on files at once.
    pub fn real(disk_threads: usize) -> std::io::Result<World> {
        Ok(World {
            disk: Arc::new(real_disk::RealDisk::start(disk_threads)?),
            net: Arc::new(real_net::RealNet),
            rng: Arc::new(rng::OsRng),
            // Last: see `RealClock`.
            clock: Arc::new(clock::RealClock::new()),
        })
    }
}
