//! What every means of ordering must provide.

use std::future::Future;
use std::pin::Pin;

use sheep_core::command::{Command, Outcome};
use sheep_core::member::Member;

use super::administration::{Administration, AdministrationError, Overview};
use crate::world::net::Connection;

/// Why something could not be ordered, or a node could not come in.
#[derive(Debug, thiserror::Error)]
pub enum OrderError {
    /// The place where the order is kept failed.
    #[error("cannot {action} {place}: {error}; check the disk and its permissions")]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        place: String,
        /// How it failed.
        error: std::io::Error,
    },
    /// Somebody else runs under this node's identity.
    #[error(
        "node {node} is already running: two stores have one identity; was a store directory copied? \
         Remove the copy and start with an empty directory"
    )]
    NodeInUse {
        /// The identity.
        node: String,
    },
    /// The store and the cluster that was found have different histories.
    #[error(
        "this store belongs to cluster {ours:016x}, but the cluster here is {theirs:016x}; \
         use the right cluster, or an empty store directory to join this one"
    )]
    OtherCluster {
        /// The store's cluster.
        ours: u64,
        /// The one that was found.
        theirs: u64,
    },
    /// The place where the order is kept holds something else than was written there.
    #[error(
        "{place} is damaged: {reason}; this node must not go on with it. If the cluster has other voters, start this one \
         with an empty store directory"
    )]
    Damaged {
        /// Where.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
    /// Nobody orders anything now.
    #[error("{0}")]
    Unavailable(String),
    /// The order holds something that this version does not understand.
    #[error("{place} holds a record this version cannot read: {reason}; run the same version on every node")]
    Unreadable {
        /// Where.
        place: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A future of a driver.
pub type DriverFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One way of ordering.
///
/// Always holds:
/// 1. Every node applies the same commands in the same order; the state that is published on a node only goes forward.
/// 2. When `propose` gives an outcome, the command is durable in the order and applied here.
/// 3. A node that is evicted because it seemed dead has stopped serving before the eviction is applied anywhere.
pub trait Driver: Send + Sync + 'static {
    /// See `Cluster::propose`.
    fn propose(&self, command: Command) -> DriverFuture<'_, Result<Outcome, OrderError>>;
    /// See `Cluster::barrier`.
    fn barrier(&self) -> DriverFuture<'_, Result<(), OrderError>>;
    /// See `Cluster::leave`. After a shutdown, only makes sure that the others know of it.
    fn leave(&self) -> DriverFuture<'_, ()>;
    /// See `Cluster::dial`.
    fn dial(&self, member: &Member) -> DriverFuture<'_, std::io::Result<Connection>>;
    /// See `Cluster::overview`.
    fn overview(&self) -> Overview;
    /// See `Cluster::administer`.
    fn administer(&self, request: Administration) -> DriverFuture<'_, Result<String, AdministrationError>>;
}
