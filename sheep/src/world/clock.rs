//! Time, as everything above `world` sees it.
//!
//! Always holds:
//! 1. [`Clock::monotonic`] never goes back within one process; its zero has no meaning and is never compared between
//!    hosts.
//! 2. [`Clock::wall`] may jump in both directions; it is only ever shown to people or stored as a label.

use std::future::Future;
use std::pin::Pin;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::time::{ClockId, clock_gettime};

/// Seconds and nanoseconds since 1970-01-01 UTC, for labels such as a volume's creation time.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct WallTime {
    /// Whole seconds since the Unix epoch.
    pub seconds: u64,
    /// Nanoseconds within the second, below 10^9.
    pub nanoseconds: u32,
}

impl WallTime {
    /// The wire encoding of Sheepdog: seconds in the upper 32 bits, nanoseconds in the lower.
    pub fn to_wire(self) -> u64 {
        (self.seconds << 32) | u64::from(self.nanoseconds)
    }
}

/// The clock door.
pub trait Clock: Send + Sync + 'static {
    /// Time since an arbitrary start; see invariant 1.
    fn monotonic(&self) -> Duration;
    /// The wall clock; see invariant 2.
    fn wall(&self) -> WallTime;
    /// Completes after at least `duration`.
    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>>;
}

/// The machine's own clocks. The monotonic one goes on while the machine is suspended (CLOCK_BOOTTIME): a node that wakes up
/// must find its rights run out.
pub struct RealClock {
    start: Duration,
}

fn boot_time() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

impl RealClock {
    /// A clock whose monotonic zero is now.
    pub fn new() -> RealClock {
        RealClock { start: boot_time() }
    }
}

impl Default for RealClock {
    fn default() -> Self {
        RealClock::new()
    }
}

impl Clock for RealClock {
    fn monotonic(&self) -> Duration {
        boot_time().saturating_sub(self.start)
    }

    fn wall(&self) -> WallTime {
        // A clock set before 1970 is a label like any other: it reads as zero.
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        WallTime { seconds: since.as_secs(), nanoseconds: since.subsec_nanos() }
    }

    fn sleep(&self, duration: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        // Made when first polled, which is on a runtime; the call itself may come from a disk thread.
        Box::pin(async move { tokio::time::sleep(duration).await })
    }
}
