//! Versions of an object's content.
//!
//! Always holds:
//! 1. A stamp names one write for ever: the generation is that of the writer lease, the sequence counts the lease
//!    holder's writes. No two writes share a stamp.
//! 2. A stamp is sent in one epoch only. What is still under way when the members change is sent again under a new one.
//! 3. The content of an object at stamp `s` contains every write to it up to `s`, and none after it, but for what was
//!    lost with all its holders before a flush. Two copies with one stamp are nevertheless identical: both took that write
//!    in one epoch, in which both were the newest there was. A copy of an earlier epoch that has what was lost, and the
//!    write after it too, has that one under a lower stamp.

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
    /// Of the write within the lease, from 1; above [`COUNT_BITS`] the round, see [`Stamp::stint`].
    pub sequence: u64,
}

/// Bits of a sequence that count writes: enough for 89 years of 100,000 a second. The others count rounds.
pub const COUNT_BITS: u32 = 48;
const ROUND_BITS: u32 = u64::BITS - COUNT_BITS;

impl Stamp {
    /// Below every write.
    pub const ZERO: Stamp = Stamp { generation: 0, sequence: 0 };

    /// The lease generation and the round within it, as one ascending number. Each time that writes under way are sent again
    /// because the members changed, a round begins.
    pub const fn stint(self) -> u64 {
        (self.generation as u64) << ROUND_BITS | self.sequence >> COUNT_BITS
    }

    /// The last sequence of a round that begins after `sequence`, as if it had given out as many. After the last round, which a
    /// lease meets after 65,535 changes of members, it is `sequence` itself.
    pub const fn begin_round(sequence: u64) -> u64 {
        match sequence.checked_add(1 << COUNT_BITS) {
            Some(next) => next,
            None => sequence,
        }
    }
}

impl core::fmt::Display for Stamp {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        let (round, count) = (self.sequence >> COUNT_BITS, self.sequence & ((1 << COUNT_BITS) - 1));
        write!(f, "{}.{count}", self.generation)?;
        if round > 0 { write!(f, "+{round}") } else { Ok(()) }
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

#[cfg(test)]
mod tests {
    use alloc::string::ToString;

    use super::*;

    #[test]
    fn a_round_is_above_everything_before_it_and_below_the_next_generation() {
        let stamp = |generation, sequence| Stamp { generation, sequence };
        let next = stamp(2, Stamp::begin_round(16) + 1);
        assert!(stamp(2, 1 << 40) < next && next < stamp(3, 1));
        assert_eq!(next.stint(), stamp(2, 16).stint() + 1);
        assert!(next.stint() < stamp(3, 1).stint());
        assert_eq!((stamp(2, 16).to_string(), next.to_string()), ("2.16".into(), "2.17+1".into()));
        let last = (0..70_000).fold(5, |sequence, _| Stamp::begin_round(sequence));
        assert_eq!(stamp(2, last).stint(), stamp(3, 0).stint() - 1, "the last round has no end");
        assert_eq!(Stamp::begin_round(last), last);
    }
}
