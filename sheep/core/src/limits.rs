//! How fast clients may use a volume: operations and bytes per second, with a burst after a pause.
//!
//! A [`Limiter`] keeps, for each of the two, the time until which what was let through so far lasts at the allowed rate. A
//! request may run when that is no further ahead of now than the burst. It is then counted whole, so a request larger
//! than the burst runs too, and those after it wait for it.
//!
//! Always holds: in any time `t` no more than `rate x (t + burst)` is let through, and one request.

use serde::{Deserialize, Serialize};

/// Without a burst of its own a volume has this: what comes in between two looks at the clock must not wait.
const BURST_LEAST_NS: u64 = 50_000_000;
const SECOND_NS: u128 = 1_000_000_000;

/// What an operator allows; 0 is no limit.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Limits {
    /// Reads, writes and discards.
    pub operations_per_second: u64,
    /// Bytes read and written.
    pub bytes_per_second: u64,
    /// Seconds' worth that may be used at once after a pause.
    pub burst_seconds: u32,
}

impl Limits {
    /// Whether nothing is limited.
    pub fn is_none(&self) -> bool {
        self.operations_per_second == 0 && self.bytes_per_second == 0
    }

    fn burst_ns(&self) -> u64 {
        (u64::from(self.burst_seconds) * SECOND_NS as u64).max(BURST_LEAST_NS)
    }
}

/// What one gateway has let through of one volume. Times are nanoseconds of any clock that only goes forward.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Limiter {
    limits: Limits,
    operations_last_until_ns: u64,
    bytes_last_until_ns: u64,
}

/// Lets `count` more through at `rate`; gives until when what was let through lasts.
fn extend(last_until_ns: u64, now_ns: u64, count: u64, rate: u64) -> u64 {
    if rate == 0 {
        return now_ns;
    }
    let takes = u128::from(count) * SECOND_NS / u128::from(rate);
    last_until_ns.max(now_ns).saturating_add(u64::try_from(takes).unwrap_or(u64::MAX))
}

impl Limiter {
    /// Nothing let through yet.
    pub fn new(limits: Limits) -> Limiter {
        Limiter { limits, operations_last_until_ns: 0, bytes_last_until_ns: 0 }
    }

    /// What is allowed.
    pub fn limits(&self) -> Limits {
        self.limits
    }

    /// Counts a request that comes now; gives for how many nanoseconds it has to wait. Requests are let through in the order
    /// in which they are counted.
    pub fn count(&mut self, now_ns: u64, bytes: u64) -> u64 {
        let ahead = self.operations_last_until_ns.max(self.bytes_last_until_ns).saturating_sub(now_ns);
        let Limits { operations_per_second, bytes_per_second, .. } = self.limits;
        self.operations_last_until_ns = extend(self.operations_last_until_ns, now_ns, 1, operations_per_second);
        self.bytes_last_until_ns = extend(self.bytes_last_until_ns, now_ns, bytes, bytes_per_second);
        ahead.saturating_sub(self.limits.burst_ns())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn limiter(operations: u64, bytes: u64, burst: u32) -> Limiter {
        let limits = Limits { operations_per_second: operations, bytes_per_second: bytes, burst_seconds: burst };
        Limiter::new(limits)
    }

    /// Requests of so many bytes, one after the other, for so long; gives how many ran.
    fn run(limiter: &mut Limiter, from: u64, for_ns: u64, bytes: u64) -> u64 {
        let mut now = from;
        let mut ran = 0;
        loop {
            now += limiter.count(now, bytes);
            if now > from + for_ns {
                return ran;
            }
            ran += 1;
        }
    }

    #[test]
    fn operations_keep_to_their_rate() {
        let mut one = limiter(100, 0, 0);
        let ran = run(&mut one, SECOND, 10 * SECOND, 1 << 20);
        assert!((1000..=1007).contains(&ran), "{ran}");
    }

    #[test]
    fn bytes_keep_to_their_rate_whatever_the_requests_are() {
        for size in [512, 4096, 1 << 20, 5 << 20] {
            let mut one = limiter(0, 1 << 20, 0);
            let bytes = size * run(&mut one, SECOND, 20 * SECOND, size);
            assert!(bytes <= (20 << 20) + (1 << 20) / 20 + size + 4096, "{bytes} in requests of {size}");
            assert!(bytes >= (19 << 20), "{bytes} in requests of {size}");
        }
    }

    #[test]
    fn the_lower_of_two_limits_counts() {
        let mut one = limiter(1000, 4096 * 10, 0);
        assert!(run(&mut one, 0, 10 * SECOND, 4096) <= 102);
        let mut one = limiter(10, 1 << 40, 0);
        assert!(run(&mut one, 0, 10 * SECOND, 4096) <= 102);
    }

    #[test]
    fn a_pause_earns_the_burst_and_no_more() {
        let mut one = limiter(100, 0, 3);
        let first = run(&mut one, SECOND, SECOND, 0);
        assert!((400..=401).contains(&first), "{first}");
        // An hour later.
        let again = run(&mut one, 3600 * SECOND, SECOND, 0);
        assert!((400..=401).contains(&again), "{again}");
    }

    #[test]
    fn nothing_waits_without_limits_and_no_number_overflows() {
        let mut free = limiter(0, 0, 0);
        assert!((0..1000).all(|_| free.count(5, u64::MAX) == 0));
        let mut tight = limiter(1, 1, u32::MAX);
        for _ in 0..10 {
            tight.count(u64::MAX - 1, u64::MAX);
        }
    }
}
