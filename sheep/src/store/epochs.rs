//! What a store remembers of epochs, beside what the versions of its objects say.

use sheep_core::stamp::Epoch;

/// See the fields.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Epochs {
    /// The last epoch through which everything here was known to be the newest; 0 at first.
    pub clean_through: Epoch,
    /// The last epoch in which this node, while it was being brought up to date, met one that had everything: see
    /// `history::Answer`. Not known if an earlier version, which did not note it, may have been the last.
    pub met_through: Option<Epoch>,
}

impl Epochs {
    /// Those of a store that was just made.
    pub const NONE: Epochs = Epochs { clean_through: Epoch(0), met_through: Some(Epoch(0)) };

    /// As it stands in a record of the journal: see `DISK.md`.
    pub fn to_bits(self) -> u64 {
        let met = self.met_through.map_or(0, |epoch| epoch.0.saturating_add(1));
        u64::from(met) << 32 | u64::from(self.clean_through.0)
    }

    /// The other way round. Earlier versions wrote zeros in the upper half.
    pub fn from_bits(bits: u64) -> Epochs {
        let met_through = ((bits >> 32) as u32).checked_sub(1).map(Epoch);
        Epochs { clean_through: Epoch(bits as u32), met_through }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bits_read_back_and_those_of_an_earlier_version_are_understood() {
        let told = Epochs { clean_through: Epoch(7), met_through: Some(Epoch(0)) };
        assert_eq!(Epochs::from_bits(told.to_bits()), told);
        assert_eq!(Epochs::from_bits(Epochs::NONE.to_bits()), Epochs::NONE);
        assert_eq!(Epochs::from_bits(9), Epochs { clean_through: Epoch(9), met_through: None });
    }
}
