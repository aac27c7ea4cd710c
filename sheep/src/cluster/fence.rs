//! The fence: until when this node may answer clients.
//!
//! Whoever lost the quorum must stop answering before the others go on without it. The driver moves the deadline on as it
//! hears from the quorum; the data path asks before every answer. The deadline is a point on this node's own monotonic clock,
//! counted from a moment at which the quorum certainly still had this node: clocks of two hosts are never compared.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::time::Duration;

use sheep_core::stamp::Epoch;
use tokio::sync::Notify;

use crate::world::Clock;
use crate::world::marks::{self, Mark};
use crate::world::planted::{self, Bug};

/// How often a waiting answer looks whether it may leave by now.
const LOOK_INTERVAL: Duration = Duration::from_millis(50);

/// See the module.
pub struct Fence {
    clock: Arc<dyn Clock>,
    /// Nanoseconds of the monotonic clock.
    deadline: AtomicU64,
    /// The epoch in which this process came in last.
    since: AtomicU32,
    moved: Notify,
    /// Whether this process leaves.
    shut: AtomicBool,
}

impl Fence {
    /// A fence that never closes: whoever is ordered by one file is in as long as it can read it.
    pub fn always_open(clock: Arc<dyn Clock>) -> Fence {
        Fence::new(clock, u64::MAX)
    }

    /// A fence that is closed until the quorum was heard.
    pub fn closed(clock: Arc<dyn Clock>) -> Fence {
        Fence::new(clock, 0)
    }

    fn new(clock: Arc<dyn Clock>, deadline: u64) -> Fence {
        Fence {
            clock,
            deadline: AtomicU64::new(deadline),
            since: AtomicU32::new(0),
            moved: Notify::new(),
            shut: AtomicBool::new(false),
        }
    }

    /// Whether answers may leave now.
    pub fn is_open(&self) -> bool {
        let deadline = self.deadline.load(Ordering::Acquire);
        !self.shut.load(Ordering::Acquire)
            && (deadline == u64::MAX
                || (planted::is(Bug::OpenFence) && deadline > 0)
                || (self.clock.monotonic().as_nanos() as u64) < deadline)
    }

    /// Waits until answers may leave; gives whether it had to wait.
    pub async fn pass(&self) -> bool {
        if self.is_open() {
            return false;
        }
        marks::hit(Mark::AnswerWaitedForQuorum);
        loop {
            tokio::select! {
                () = self.moved.notified() => {}
                () = self.clock.sleep(LOOK_INTERVAL) => {}
            }
            if self.is_open() {
                return true;
            }
        }
    }

    /// The epoch in which this process came in last: what a view of an earlier one says must not be told.
    pub fn since(&self) -> Epoch {
        Epoch(self.since.load(Ordering::Acquire))
    }

    /// Whether what this node knows as of `epoch` may be told now.
    pub fn lets_out(&self, epoch: Epoch) -> bool {
        // In this order: whoever comes in again says since when before the fence opens.
        self.is_open() && epoch >= self.since()
    }

    /// This process is a member since `epoch`.
    pub fn came_in(&self, epoch: Epoch) {
        let before = self.since.fetch_max(epoch.get(), Ordering::AcqRel);
        if (1..epoch.get()).contains(&before) {
            marks::hit(Mark::EvictedCameBack);
        }
    }

    /// No answer leaves any more: this process is about to say that it goes, and the others go on at once.
    pub fn shut(&self) {
        self.shut.store(true, Ordering::Release);
    }

    /// Answers may leave until `deadline`, a time of this node's monotonic clock. It never moves back.
    pub fn extend(&self, deadline: Duration) {
        let was_open = self.is_open();
        let before = self.deadline.fetch_max(deadline.as_nanos() as u64, Ordering::AcqRel);
        if !was_open && self.is_open() {
            if before > 0 {
                marks::hit(Mark::QuorumBack);
            }
            self.moved.notify_waiters();
        }
    }
}
