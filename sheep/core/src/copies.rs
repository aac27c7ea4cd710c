//! How many copies are wanted of an object: now, and in the epochs before the last change.
//!
//! Always holds:
//! 1. An epoch has one number of copies from its first moment to its last: whoever agrees on the epoch agrees on the holders.
//! 2. A number is changed again only after an epoch with the present one has ended clean, so of all epochs that may have taken
//!    writes nobody else knows of, those before `since` had `before`.

use serde::{Deserialize, Serialize};

use crate::stamp::Epoch;

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Copies {
    now: u8,
    before: u8,
    since: Epoch,
}

impl Copies {
    /// Never changed.
    pub const fn always(copies: u8) -> Copies {
        Copies { now: copies, before: copies, since: Epoch(0) }
    }

    /// The number from here on.
    pub const fn now(self) -> u8 {
        self.now
    }

    /// The number in an epoch. For those before the last change but one it is only what was wanted shortly before the last.
    pub fn in_epoch(self, epoch: Epoch) -> u8 {
        if epoch < self.since { self.before } else { self.now }
    }

    /// The fewest that an object may have while only epochs before `clean` have ended clean.
    pub fn fewest(self, clean: Epoch) -> u8 {
        if clean < self.since { self.now.min(self.before) } else { self.now }
    }

    /// Whether invariant 2 allows a change.
    pub fn may_change(self, clean: Epoch) -> bool {
        clean >= self.since
    }

    /// Another number from `since` on.
    #[must_use]
    pub fn changed(self, copies: u8, since: Epoch) -> Copies {
        assert!(since > self.since, "epochs go forward");
        Copies { now: copies, before: self.now, since }
    }
}

impl From<u8> for Copies {
    fn from(copies: u8) -> Copies {
        Copies::always(copies)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_change_counts_from_its_epoch_on() {
        let copies = Copies::always(2).changed(3, Epoch(5));
        assert_eq!([4, 5, 6].map(|epoch| copies.in_epoch(Epoch(epoch))), [2, 3, 3]);
        assert_eq!((copies.now(), copies.fewest(Epoch(4)), copies.fewest(Epoch(5))), (3, 2, 3));
        assert!(!copies.may_change(Epoch(4)) && copies.may_change(Epoch(5)));
        assert_eq!(copies.changed(1, Epoch(6)).in_epoch(Epoch(5)), 3);
    }
}
