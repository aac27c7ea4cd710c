//! P1 for guests that write lazily: what was acknowledged before a flush that came back well is found again, or something later,
//! whatever loses power. The guest itself knows what it was promised: see [`crate::promise`].

use crate::oracle::Oracle;

/// Violations that the guest saw.
pub fn violations(oracle: &Oracle) -> Vec<String> {
    oracle.broken()
}
