//! The gateway: carries client requests to the holders of their objects.
//!
//! Write path: `write.rs` (may it run, under which stamp) and `fanout.rs` (to all holders at once, until all have it).
//! Read path: `read.rs` (nearest current holder first). A VDI is written through one gateway at a time, the holder of its
//! writer lease (`lease.rs`, `lease_table.rs`).

pub mod fanout;
pub mod lease;
pub mod lease_table;
pub mod read;
pub mod write;

/// Why a write did not take effect (or may not have).
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum WriteError {
    /// The object, or the source of its copy, does not exist.
    #[error("the object does not exist")]
    Missing,
    /// Beyond the object's end, or a request that makes no sense.
    #[error("the request does not fit the object")]
    Invalid,
    /// Beyond the end of the volume, which was made smaller.
    #[error("the write is beyond the end of the volume")]
    BeyondEnd,
    /// The VDI is a snapshot.
    #[error("the VDI is a snapshot")]
    ReadOnly,
    /// A holder's disk is full.
    #[error("a node that must keep a copy has no space left")]
    NoSpace,
    /// Nobody can keep a copy, or too few where the cluster was formatted to be strict about it.
    #[error("too few nodes store data now")]
    NoHolders,
    /// A holder's disk failed in a way it could not work around.
    #[error("a node that must keep a copy failed to write it")]
    Failed,
    /// The lease was lost before all holders had the write: it may or may not take effect. Retried by the gateway.
    #[error("another gateway took over writing")]
    Fenced,
    /// Its client's connection ended before it was sent.
    #[error("the client that asked for it has left")]
    Abandoned,
    /// The cluster is not serving.
    #[error("the cluster does not serve now")]
    NotRunning,
    /// The order of the cluster cannot be reached.
    #[error("the cluster's order cannot be reached")]
    Order,
}

/// Why a read gave nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum ReadFailure {
    /// The object does not exist.
    #[error("the object does not exist")]
    Missing,
    /// Beyond the object's end.
    #[error("the request does not fit the object")]
    Invalid,
    /// No copy could be read.
    #[error("no copy of the object can be read")]
    Failed,
    /// Nobody has copies.
    #[error("no node stores data now")]
    NoHolders,
}
