//! Floor 3: who is in, and in which order things happen. Knows nothing of objects or disks' contents.
//!
//! A driver puts commands into one order and applies them to its copy of the [`ClusterState`]; everybody else on this
//! node sees that copy through [`Cluster::state`]. What a driver promises is in [`driver::Driver`].

pub mod administration;
pub mod consensus;
pub mod discovery;
pub mod driver;
pub mod fence;
pub mod gossip;
pub mod local;
pub mod mesh;
mod order_log;
pub mod quorum;

use std::sync::Arc;

use sheep_core::cluster_state::ClusterState;
use sheep_core::command::{Command, Outcome, Refusal};
use sheep_core::member::{Member, NodeId};
use tokio::sync::watch;

use crate::world::net::Connection;
pub use administration::{Administration, AdministrationError, LinkOverview, NodeOverview, Overview};
pub use driver::{Driver, OrderError};
pub use fence::Fence;

/// This node's part in the order. Cloning it is cheap.
#[derive(Clone)]
pub struct Cluster {
    node: NodeId,
    driver: Arc<dyn Driver>,
    fence: Arc<Fence>,
    state: watch::Receiver<Arc<ClusterState>>,
}

impl Cluster {
    /// Wraps a driver that has joined.
    pub fn new(
        node: NodeId,
        driver: Arc<dyn Driver>,
        fence: Arc<Fence>,
        state: watch::Receiver<Arc<ClusterState>>,
    ) -> Cluster {
        Cluster { node, driver, fence, state }
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

    /// Puts a command into the order and gives what it did once it was applied here. See [`sheep_core::level`] for what
    /// happens to one that an earlier version does not know.
    pub async fn propose(&self, command: Command) -> Result<Outcome, OrderError> {
        let (level, state) = (command.level(), self.state());
        if level > state.level {
            if !state.understands(level) {
                let earlier = state.members.values().filter(|member| member.member.level < level);
                let earlier: Vec<String> = earlier.map(|member| member.member.id.to_string()).collect();
                tracing::warn!("refused what an earlier version does not know; update node {}", earlier.join(", "));
                return Ok(Outcome::Refused(Refusal::EarlierVersion));
            }
            // Whoever comes in from here on understands it too. Somebody else may have raised it meanwhile, or a node of an
            // earlier version come in: that one could not read the command, so it is not ordered.
            match self.driver.propose(Command::RaiseLevel { level }).await? {
                Outcome::Done | Outcome::Refused(Refusal::NoEffect) => {}
                refused => return Ok(refused),
            }
        }
        self.driver.propose(command).await
    }

    /// Waits until everything that was ordered before this call has been applied here.
    pub async fn barrier(&self) -> Result<Arc<ClusterState>, OrderError> {
        self.driver.barrier().await?;
        Ok(self.state())
    }

    /// Whether clients may be answered: see [`Fence`].
    pub fn fence(&self) -> &Fence {
        &self.fence
    }

    /// A connection to a member for the data path.
    pub async fn dial(&self, member: &Member) -> std::io::Result<Connection> {
        self.driver.dial(member).await
    }

    /// What only the driver knows, for people and scripts.
    pub fn overview(&self) -> Overview {
        self.driver.overview()
    }

    /// Asks the driver for something that is no command of the order.
    pub async fn administer(&self, request: Administration) -> Result<String, AdministrationError> {
        self.driver.administer(request).await
    }

    /// Says good-bye: the others go on without this node at once.
    pub async fn leave(&self) {
        self.fence.shut();
        self.driver.leave().await;
    }
}
