//! How fast copies that nobody waits for are brought up to date: not at all while the operator holds recovery, at most so
//! many in an interval if this node was told so, else as fast as the slots of [`super::Progress`] allow.
//!
//! Objects that a request waits for never come here.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sheep_core::stamp::Epoch;

use crate::data::Data;

/// Between looks at whether recovery goes on; a change of members ends the wait as well.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// At most `objects` in each `interval`.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Throttle {
    /// At least 1.
    pub objects: u32,
    /// Not zero.
    pub interval: Duration,
}

/// See the module.
#[derive(Default)]
pub struct Pace {
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    throttle: Option<Throttle>,
    /// When the present interval began, and how many objects it has had.
    began: Duration,
    count: u32,
}

impl Pace {
    /// What this node was told, if anything.
    pub fn throttle(&self) -> Option<Throttle> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner).throttle
    }

    /// From now on, until the process ends.
    pub fn set_throttle(&self, throttle: Option<Throttle>) {
        *self.state.lock().unwrap_or_else(PoisonError::into_inner) = State { throttle, ..State::default() };
    }

    /// Takes one of the interval's objects, or says how long to wait.
    fn take(&self, now: Duration) -> Result<(), Duration> {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let Some(throttle) = state.throttle else { return Ok(()) };
        let end = state.began.saturating_add(throttle.interval);
        if state.count == 0 || now >= end {
            state.began = now;
            state.count = 0;
        } else if state.count >= throttle.objects {
            return Err(end.saturating_sub(now));
        }
        state.count += 1;
        Ok(())
    }
}

/// Waits for the turn of one object, or for the end of the epoch.
pub(super) async fn await_turn(data: &Data, epoch: Epoch) {
    loop {
        let view = data.view();
        if view.epoch() > epoch {
            return;
        }
        let patience = if view.state.recovery_held {
            LOOK_AGAIN
        } else {
            match data.progress().pace.take(data.world().clock.monotonic()) {
                Ok(()) => return,
                Err(rest) => rest.min(LOOK_AGAIN),
            }
        };
        data.wait_for_change(&view, patience).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_interval_has_so_many_objects_and_no_more() {
        let pace = Pace::default();
        let at = Duration::from_millis;
        assert!((0..1000).all(|_| pace.take(at(5)).is_ok()), "not throttled");
        pace.set_throttle(Some(Throttle { objects: 2, interval: at(100) }));
        assert_eq!([pace.take(at(7)), pace.take(at(8)), pace.take(at(50))], [Ok(()), Ok(()), Err(at(57))]);
        assert_eq!([pace.take(at(107)), pace.take(at(206)), pace.take(at(206))], [Ok(()), Ok(()), Err(at(1))]);
        pace.set_throttle(None);
        assert_eq!(pace.take(at(206)), Ok(()));
    }
}
