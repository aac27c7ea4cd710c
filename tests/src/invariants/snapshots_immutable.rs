//! P7. A snapshot holds what its volume held when it was made, and once a block of it was read, that for good; nobody can write
//! to it. The guest that made it knows what that is: see [`crate::sim::volume_memory`].

/// What is wrong with a snapshot, as a violation.
pub fn violation(why: &str) -> String {
    format!("snapshots immutable: {why}")
}
