//! Whether the client that asked for something is still there.
//!
//! A request may wait for long: for the cluster to serve, for a lease, for its turn under the limits. A client whose connection
//! ended meanwhile may have come again through another node, have sent the request again and have written over it. So nothing
//! of an ended connection is begun any more; what was sent to the holders goes on under the lease under which it was sent.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use tokio::sync::Notify;

/// One connection of a client; or this node itself, which does not leave.
#[derive(Clone, Debug, Default)]
pub struct Client(Arc<Presence>);

#[derive(Debug, Default)]
struct Presence {
    gone: AtomicBool,
    left: Notify,
}

impl Client {
    /// Its connection has ended.
    pub fn leave(&self) {
        self.0.gone.store(true, Ordering::Release);
        self.0.left.notify_waiters();
    }

    /// Whether its connection has ended.
    pub fn is_gone(&self) -> bool {
        self.0.gone.load(Ordering::Acquire)
    }

    /// Waits until its connection has ended.
    pub async fn gone(&self) {
        loop {
            let left = self.0.left.notified();
            tokio::pin!(left);
            left.as_mut().enable();
            if self.is_gone() {
                return;
            }
            left.await;
        }
    }
}
