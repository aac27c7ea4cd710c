//! P4. Sectors tell which write of which place they come from, and carry bytes that follow from that: whatever else is read
//! there was damaged or misplaced, and must not have been served.

use crate::oracle::Oracle;

/// Violations in what clients saw.
pub fn violations(oracle: &Oracle) -> Vec<String> {
    oracle.foreign().into_iter().map(|what| format!("nothing foreign: {what}")).collect()
}
