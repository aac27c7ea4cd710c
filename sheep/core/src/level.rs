//! What a version understands of the ordered state, so that nodes of two versions work together while a cluster is updated
//! one node at a time.
//!
//! A build understands every level up to [`Level::OURS`]. The cluster runs at one level, which is part of its state: nothing of
//! a later one is ever ordered or sent. A command of a later level raises it first, once every member understands that
//! (`Cluster::propose`); from then on nodes that do not are not let in. So a version can be gone back from as long as nothing
//! that it added was used, and an update has no moment that all nodes must share.
//!
//! What is added goes behind what is there: variants at the end of their enum, with a level in
//! [`Command::level`](crate::command::Command::level); parts of the state behind the others, written only from their level on.

use core::fmt;

use serde::{Deserialize, Deserializer, Serialize};

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct Level(pub u32);

impl Level {
    /// What there was at first.
    pub const FIRST: Level = Level(1);
    /// Locks that are enforced, and restored snapshots.
    pub const LOCKS_AND_RESTORES: Level = Level(2);
    /// Numbers of copies that change, shares that are measured anew, recovery that is held.
    pub const COPIES: Level = Level(3);
    /// Groups of snapshots, other names, clones that become independent, limits.
    pub const VOLUME_CHANGES: Level = Level(4);
    /// Volumes that become smaller.
    pub const SHRINKING: Level = Level(5);
    /// Orderly stops after which it is found anew what everybody has.
    pub const STOPS: Level = Level(6);
    /// The last one that this build understands.
    pub const OURS: Level = Level::STOPS;
}

impl fmt::Display for Level {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Reads the level of a state, and refuses one that this build does not understand before anything else of it is read.
pub(crate) fn of_state<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Level, D::Error> {
    let level = Level::deserialize(deserializer)?;
    if level > Level::OURS {
        return Err(serde::de::Error::custom("a later version of this program wrote it"));
    }
    Ok(level)
}
