//! Time, as everything above `world` sees it.
//!
//! Always holds:
//! 1. [`Clock::monotonic`] never goes back within one process; its zero has no meaning and is never compared between
//!    hosts.
//! 2. [`Clock::wall`] may jump in both directions; it is only ever shown to people or stored as a label.

use std::future::Future;
use std::pin::Pin;
use std::sync::OnceLock;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

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

    /// Completes at the next multiple of `period` of [`Clock::monotonic`]. For what is done again and again while nothing
    /// happens: periods that divide each other end together, and an idle process wakes up once for all of them.
    fn beat(&self, period: Duration) -> Pin<Box<dyn Future<Output = ()> + Send>> {
        self.sleep(until_beat(self.monotonic(), period))
    }
}

/// From `now` to the next multiple of `period`: never nothing, and `period` at most.
fn until_beat(now: Duration, period: Duration) -> Duration {
    let past = now.as_nanos() % period.as_nanos().max(1);
    period.saturating_sub(Duration::from_nanos(past as u64))
}

/// The machine's own clocks. The monotonic one goes on while the machine is suspended (CLOCK_BOOTTIME): a node that wakes up
/// must find its rights run out.
///
/// tokio keeps timers in a wheel (G. Varghese, A. Lauck, "Hashed and Hierarchical Timing Wheels", 1987): one that is further
/// away than [`WHEEL_SLOT`] is woken for where its slot begins, put into the wheel of single milliseconds, and woken for again.
/// So this clock is made right before the runtime: its zero is less than a millisecond before that of the wheel, which rounds
/// up, and what ends at a multiple of [`WHEEL_SLOT`] costs one wake-up instead of two.
pub struct RealClock {
    start: Duration,
}

/// A slot of tokio's wheel for timers that are some way off. Periods of what is done all the time should be multiples of it.
pub const WHEEL_SLOT: Duration = Duration::from_millis(64);
/// Zero of the first real clock of this process.
static ZERO: OnceLock<Instant> = OnceLock::new();

/// The multiple of [`WHEEL_SLOT`] on the process's clock that is next to `deadline`; `deadline` itself if it is closer than one,
/// or if the process has no real clock.
pub fn on_wheel(deadline: Instant) -> Instant {
    let Some(zero) = ZERO.get().filter(|_| deadline.saturating_duration_since(Instant::now()) >= WHEEL_SLOT) else {
        return deadline;
    };
    let slots = (deadline.saturating_duration_since(*zero) + WHEEL_SLOT / 2).as_millis() / WHEEL_SLOT.as_millis();
    u32::try_from(slots).map_or(deadline, |slots| *zero + WHEEL_SLOT * slots)
}

fn boot_time() -> Duration {
    let now = clock_gettime(ClockId::Boottime);
    Duration::new(now.tv_sec as u64, now.tv_nsec as u32)
}

impl RealClock {
    /// A clock whose monotonic zero is now. To be made right before the runtime: see the type.
    pub fn new() -> RealClock {
        let start = boot_time();
        ZERO.get_or_init(Instant::now);
        RealClock { start }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_some_way_off_ends_where_a_slot_of_the_wheel_begins() {
        let _clock = RealClock::new();
        let zero = *ZERO.get().unwrap();
        let now = Instant::now();
        for ms in [150, 171, 192, 200, 5000] {
            let deadline = now + Duration::from_millis(ms);
            let aligned = on_wheel(deadline);
            assert_eq!((aligned - zero).as_nanos() % WHEEL_SLOT.as_nanos(), 0);
            assert!(aligned.max(deadline) - aligned.min(deadline) <= WHEEL_SLOT / 2 + Duration::from_millis(1));
        }
        let soon = now + Duration::from_millis(40);
        assert_eq!(on_wheel(soon), soon);
    }

    #[test]
    fn beats_of_periods_that_divide_each_other_coincide() {
        let ms = Duration::from_millis;
        assert_eq!(until_beat(ms(0), ms(250)), ms(250));
        assert_eq!(until_beat(ms(1), ms(250)), ms(249));
        for now in [ms(3), ms(499), ms(501), Duration::from_nanos(999_999_999)] {
            let slow = now + until_beat(now, ms(500));
            let mut fast = now + until_beat(now, ms(250));
            while fast < slow {
                fast += until_beat(fast, ms(250));
            }
            assert_eq!(fast, slow);
        }
    }
}
