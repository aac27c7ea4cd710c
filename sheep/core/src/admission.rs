//! Who may be a node of this cluster: the identities that were let in, the key that proves that one belongs here, and the
//! one-time tokens that stand for it.
//!
//! Always holds:
//! 1. A node is known by one fingerprint from the moment it is let in; whoever shows the same id with another one is
//!    somebody else.
//! 2. A banned fingerprint never comes back, whatever it proves. The key that it knew is replaced in the same command.
//! 3. A token lets one node in, once.

use alloc::collections::{BTreeMap, BTreeSet};
use core::fmt;

use serde::{Deserialize, Serialize};

use crate::member::NodeId;

/// BLAKE3 of a node's certificate as it travels (DER): what a person compares, and what nodes pin each other by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0[..16].iter().enumerate() {
            let separator = if index > 0 && index % 4 == 0 { "-" } else { "" };
            write!(f, "{separator}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The cluster key: whoever knows it belongs here. Never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterKey {
    /// Goes up with every rotation; 0 while there is none.
    pub generation: u32,
    /// The secret.
    pub secret: [u8; 32],
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKey({}, secret)", self.generation)
    }
}

/// What the ordered state knows about who may come in.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Admission {
    /// Any node of the network may come in, and connections are not encrypted: for laboratories.
    pub open: bool,
    /// `None` before format, with the `local` driver, and in an open cluster.
    pub key: Option<ClusterKey>,
    /// Nodes that were let in.
    pub nodes: BTreeMap<NodeId, Fingerprint>,
    /// Identities that are never let in again.
    pub banned: BTreeSet<Fingerprint>,
    /// BLAKE3 of the tokens that were given out and not used yet.
    pub tokens: BTreeSet<[u8; 32]>,
}
