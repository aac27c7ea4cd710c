//! P1 and P2 for volumes that are made, grown, discarded, cloned and rolled back: each is there until it is deleted, and holds
//! what its only guest made of it: see [`crate::sim::volume_memory`].

/// What is wrong with a volume, as a violation.
pub fn violation(why: &str) -> String {
    format!("volumes as written: {why}")
}

/// It is not there.
pub fn missing(export: &str) -> String {
    violation(&format!("{export} was made and is not there"))
}
