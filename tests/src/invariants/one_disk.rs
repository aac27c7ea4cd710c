//! P1 and P2. All writes here are write-through: acknowledged means durable, so a history that loses one is no history of one
//! disk, whatever crashed in between. A block is a register: see [`crate::linear`].

use crate::linear::check;
use crate::oracle::Oracle;

/// Violations in what clients saw.
pub fn violations(oracle: &Oracle) -> Vec<String> {
    match check(&oracle.operations()) {
        Ok(_) => Vec::new(),
        Err(violation) => vec![format!("one disk: {violation}")],
    }
}
