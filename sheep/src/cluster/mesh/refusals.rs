//! Log lines about connections that came to nothing: at most one each second and address, with the number of those left out.

use std::collections::BTreeMap;
use std::fmt;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::world::clock::Clock;

const INTERVAL: Duration = Duration::from_secs(1);
/// Addresses that are remembered; beyond, those that were not heard of for an interval go first, and then nothing is logged.
const ADDRESSES_MAX: usize = 1024;

/// See the module.
pub(super) struct Refusals {
    clock: Arc<dyn Clock>,
    last: Mutex<BTreeMap<IpAddr, Last>>,
}

struct Last {
    at: Duration,
    left_out: u64,
}

impl Refusals {
    /// Nothing logged yet.
    pub fn new(clock: Arc<dyn Clock>) -> Refusals {
        Refusals { clock, last: Mutex::new(BTreeMap::new()) }
    }

    /// Logs that a connection came to nothing; `ip` is the other side's address, if it has one.
    pub fn warn(&self, ip: Option<IpAddr>, text: fmt::Arguments<'_>) {
        match self.left_out(ip.unwrap_or(IpAddr::from([0, 0, 0, 0]))) {
            Some(0) => tracing::warn!("{text}"),
            Some(left_out) => tracing::warn!("{text} ({left_out} more with this address not logged)"),
            None => {}
        }
    }

    /// How many were left out since the last line; `None` if this one is to be left out too.
    fn left_out(&self, ip: IpAddr) -> Option<u64> {
        let now = self.clock.monotonic();
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(last) = last.get_mut(&ip) {
            if now.saturating_sub(last.at) < INTERVAL {
                last.left_out += 1;
                return None;
            }
            last.at = now;
            return Some(std::mem::take(&mut last.left_out));
        }
        if last.len() >= ADDRESSES_MAX {
            last.retain(|_, last| now.saturating_sub(last.at) < INTERVAL);
            if last.len() >= ADDRESSES_MAX {
                return None;
            }
        }
        last.insert(ip, Last { at: now, left_out: 0 });
        Some(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::clock::RealClock;

    #[test]
    fn one_line_a_second_and_address() {
        let refusals = Refusals::new(Arc::new(RealClock::new()));
        let (one, other) = (IpAddr::from([10, 0, 0, 1]), IpAddr::from([10, 0, 0, 2]));
        assert_eq!(refusals.left_out(one), Some(0));
        assert_eq!(refusals.left_out(one), None);
        assert_eq!(refusals.left_out(one), None);
        assert_eq!(refusals.left_out(other), Some(0));
        refusals.last.lock().unwrap().get_mut(&one).unwrap().at = Duration::ZERO;
        std::thread::sleep(INTERVAL);
        assert_eq!(refusals.left_out(one), Some(2));
        for index in 0..5000_u32 {
            refusals.left_out(IpAddr::from(index.to_be_bytes()));
        }
        assert!(refusals.last.lock().unwrap().len() <= ADDRESSES_MAX);
    }
}
