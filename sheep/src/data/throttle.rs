//! Keeps clients of this gateway to the limits of their volumes.
//!
//! A request waits before it does anything, so nothing is held meanwhile. Volumes without limits cost one look at an empty
//! table. Each gateway counts for itself: a volume that is used through two at a time gets its limits at each.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use qemu_proto::oid::VdiId;
use sheep_core::limits::{Limiter, Limits};
use sheep_core::vdi::Vdi;

use super::Data;

/// What was let through, by the name of the volume.
#[derive(Default)]
pub struct Throttles(Mutex<HashMap<Vec<u8>, Throttle>>);

struct Throttle {
    limiter: Limiter,
    delayed: u64,
    waiting: u64,
}

/// What a volume's limits did at this gateway since they were set.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Delays {
    /// Requests that had to wait, or do.
    pub delayed: u64,
    /// Requests that wait now.
    pub waiting: u64,
}

/// A request that waits.
struct Waiting<'a> {
    throttles: &'a Throttles,
    name: &'a [u8],
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        if let Some(throttle) = self.throttles.lock().get_mut(self.name) {
            // Forgotten and set anew meanwhile, it counts from zero.
            throttle.waiting = throttle.waiting.saturating_sub(1);
        }
    }
}

impl Throttles {
    fn lock(&self) -> MutexGuard<'_, HashMap<Vec<u8>, Throttle>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Counts a request; gives for how many nanoseconds it waits, and what to drop when it has.
    fn count<'a>(&'a self, name: &'a [u8], limits: Limits, now_ns: u64, bytes: u64) -> Option<(u64, Waiting<'a>)> {
        let mut throttles = self.lock();
        let throttle = match throttles.get_mut(name) {
            Some(throttle) => throttle,
            None => {
                let throttle = Throttle { limiter: Limiter::new(limits), delayed: 0, waiting: 0 };
                throttles.entry(name.to_vec()).or_insert(throttle)
            }
        };
        if throttle.limiter.limits() != limits {
            throttle.limiter = Limiter::new(limits);
        }
        let wait_ns = throttle.limiter.count(now_ns, bytes);
        if wait_ns == 0 {
            return None;
        }
        throttle.delayed += 1;
        throttle.waiting += 1;
        Some((wait_ns, Waiting { throttles: self, name }))
    }

    /// What a volume's limits did.
    pub fn delays(&self, name: &[u8]) -> Delays {
        let throttles = self.lock();
        let delays = |throttle: &Throttle| Delays { delayed: throttle.delayed, waiting: throttle.waiting };
        throttles.get(name).map(delays).unwrap_or_default()
    }

    /// Forgets volumes that are not limited any more.
    fn keep(&self, is_limited: impl Fn(&[u8]) -> bool) {
        self.lock().retain(|name, _| is_limited(name));
    }
}

fn limited(data: &Data, vdi: VdiId) -> Option<(Arc<Vdi>, Limits)> {
    let view = data.view();
    if view.state.limits.is_empty() {
        return None;
    }
    let vdi = view.state.vdis.get(&vdi.get())?;
    Some((vdi.clone(), *view.state.limits.get(&vdi.name)?))
}

/// Whether requests to a VDI may have to wait.
pub fn is_limited(data: &Data, vdi: VdiId) -> bool {
    limited(data, vdi).is_some()
}

/// Counts a client's request to a VDI, and waits as long as its volume's limits ask.
pub async fn pass(data: &Data, vdi: VdiId, bytes: usize) {
    let Some((vdi, limits)) = limited(data, vdi) else { return };
    let now_ns = u64::try_from(data.world().clock.monotonic().as_nanos()).unwrap_or(u64::MAX);
    if let Some((wait_ns, _waiting)) = data.throttles().count(&vdi.name, limits, now_ns, bytes as u64) {
        data.world().clock.sleep(std::time::Duration::from_nanos(wait_ns)).await;
    }
}

/// Follows the ordered state.
pub fn follow(data: &Data) {
    let view = data.view();
    data.throttles().keep(|name| view.state.limits.contains_key(name));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_waits_is_counted_until_it_has() {
        let throttles = Throttles::default();
        let limits = Limits { operations_per_second: 1, ..Limits::default() };
        assert!(throttles.count(b"disk", limits, 0, 0).is_none());
        let waits = [throttles.count(b"disk", limits, 0, 0), throttles.count(b"disk", limits, 0, 0)];
        assert!(waits.iter().all(Option::is_some));
        assert_eq!(throttles.delays(b"disk"), Delays { delayed: 2, waiting: 2 });
        drop(waits);
        assert_eq!(throttles.delays(b"disk"), Delays { delayed: 2, waiting: 0 });
        let other = Limits { operations_per_second: 2, ..Limits::default() };
        assert!(throttles.count(b"disk", other, 0, 0).is_none(), "new limits begin anew");
        throttles.keep(|_| false);
        assert_eq!(throttles.delays(b"disk"), Delays::default());
    }
}
