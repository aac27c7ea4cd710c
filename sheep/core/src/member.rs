//! What identifies a node and what the cluster knows of it.

use alloc::string::String;
use serde::{Deserialize, Serialize};

use crate::level::Level;

/// A node's identity, drawn at random when its store is made and kept there: it survives restarts and address changes.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct NodeId(pub u64);

impl NodeId {
    /// The bare number, for hashing and for the wire.
    pub const fn get(self) -> u64 {
        self.0
    }
}

impl core::fmt::Display for NodeId {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

/// A node as the ordered state knows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Member {
    /// Who it is.
    pub id: NodeId,
    /// Where clients reach it: 16 address bytes as on the wire (IPv4 in the last four).
    pub address: [u8; 16],
    /// The port clients reach it at.
    pub port: u16,
    /// Where other nodes reach it, as text that the network floor understands: `HOST:PORT`, several with commas between, the
    /// preferred one first.
    pub peer_endpoint: String,
    /// Drawn at random by each process: tells a restarted node from one that went on.
    pub boot: u64,
    /// The fault domain; no two copies of an object share one.
    pub zone: u32,
    /// Share of the data, in bytes of capacity; 0 for a gateway, which stores nothing.
    pub weight: u64,
    /// The last one that its process understands.
    pub level: Level,
}

impl Member {
    /// Whether this node stores nothing.
    pub fn is_gateway(&self) -> bool {
        self.weight == 0
    }

    /// The order of nodes in lists and of their numbers in commands: by address, then port.
    pub fn list_key(&self) -> ([u8; 16], u16, NodeId) {
        (self.address, self.port, self.id)
    }
}
