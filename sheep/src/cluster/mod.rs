//! Floor 3: who is in, and in which order things happen. Knows nothing of objects or disks' contents.
//!
//! A driver puts commands into one order and applies them to its copy of the [`ClusterState`]; everybody else on this
//! node sees that copy through [`Cluster::state`]. What a driver promises is in [`driver::Driver`].

pub mod consensus;
pub mod discovery;
pub mod driver;
pub mod gossip;
pub mod local;
pub mod mesh;
mod order_log;

use std::sync::Arc;

use sheep_core::cluster_state::ClusterState;
use sheep_core::command::{Command, Outcome};
use sheep_core::member::NodeId;
use tokio::sync::watch;

pub use driver::{Driver, OrderError};

/// This node's part in the order. Cloning it is cheap.
#[derive(Clone)]
pub struct Cluster {
    node: NodeId,
    driver: Arc<dyn Driver>,
    state: watch::Receiver<Arc<ClusterState>>,
}

impl Cluster {
    /// Wraps a driver that has joined.
    pub fn new(node: NodeId, driver: Arc<dyn Driver>, state: watch::Receiver<Arc<ClusterState>>) -> Cluster {
        Cluster { node, driver, state }
    }

    /// Who this node is.
    pub fn node(&self) -> NodeId {
        self.node
    }

    /// The state as far as it was applied here.
    pub fn state(&self) -> Arc<ClusterState> {
        self.state.borrow().clone()
    }

    /// For waiting until something changes.
    pub fn watch(&self) -> watch::Receiver<Arc<ClusterState>> {
        self.state.clone()
    }

    /// Puts a command into the order and gives what it did once it was applied here.
    pub async fn propose(&self, command: Command) -> Result<Outcome, OrderError> {
        self.driver.propose(command).await
    }

    /// Waits until everything that was ordered before this call has been applied here.
    pub async fn barrier(&self) -> Result<Arc<ClusterState>, OrderError> {
        self.driver.barrier().await?;
        Ok(self.state())
    }

    /// Says good-bye: the others go on without this node at once.
    pub async fn leave(&self) {
        self.driver.leave().await;
    }
}
