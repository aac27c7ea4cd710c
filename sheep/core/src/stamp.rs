//! Versions of an object's content.
//!
//! Always holds:
//! 1. A stamp names one write for ever: the generation is that of the writer lease, the sequence counts the lease
//!    holder's writes. No two writes share a stamp.
//! 2. The content of an object at stamp `s` contains every write to it up to `s`, and none after it. Two copies with one
//!    stamp are therefore identical.

use serde::{Deserialize, Serialize};

/// A membership epoch: every change of members makes the next one. 0 is before format.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Epoch(pub u32);

impl Epoch {
    /// The epoch that the next change of members makes.
    #[must_use]
    pub const fn next(self) -> Epoch {
        Epoch(self.0 + 1)
    }

    /// The bare number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl core::fmt::Display for Epoch {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}", self.0)
    }
}

/// Names one write; ordered as the writes of an object are.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Stamp {
    /// Of the writer lease under which the write was made.
    pub generation: u32,
    /// Of the write within the lease, from 1.
    pub sequence: u64,
}

impl Stamp {
    /// Below every write.
    pub const ZERO: Stamp = Stamp { generation: 0, sequence: 0 };
}

impl core::fmt::Display for Stamp {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        write!(f, "{}.{}", self.generation, self.sequence)
    }
}

/// What a copy of an object holds, and when that was last known to be the newest there is.
///
/// `epoch` is the last epoch in which this copy took a write, was fetched, or was confirmed; whether the copy was kept up to date in
/// later epochs follows from the epoch history (see `history`), not from this value.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default, Serialize, Deserialize)]
pub struct Version {
    /// See above.
    pub epoch: Epoch,
    /// The last write the content contains.
    pub stamp: Stamp,
}
