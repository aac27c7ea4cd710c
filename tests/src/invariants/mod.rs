//! What must hold, one promise of the design in each file. Each check gives the violations it found, in words.
//!
//! | file | promise |
//! |---|---|
//! | [`one_disk`] | P1, P2: a sector holds the last acknowledged write or a later one, whoever reads it |
//! | [`flushed_kept`] | P1: what was flushed is kept |
//! | [`nothing_foreign`] | P4: a read never gives what nobody wrote |
//! | [`one_history`] | P3: one membership per epoch, epochs only grow |
//! | [`volumes_as_written`] | P1, P2: volumes, clones and what was discarded hold what their guest made of them |
//! | [`snapshots_immutable`] | P7: a snapshot holds what it held, for good |
//! | [`zones_distinct`] | P1: the copies of an object stand in zones of their own |
//! | [`nothing_orphaned`] | P7: when all is calm, disks hold what is referred to and nothing else |
//! | [`space_honest`] | P8: nodes tell the space that their objects take |
//! | [`copies_agree`] | P2, P4: when all is calm every object has all its copies, and they are the same |
//! | [`healed_when_calm`] | P5: when the faults are over everything is served again, by itself |
//! | [`outage`] | P5: after an outage that one machine does not outlive, the others go on by themselves |

pub mod copies_agree;
pub mod flushed_kept;
pub mod healed_when_calm;
pub mod nothing_foreign;
pub mod nothing_orphaned;
pub mod one_disk;
pub mod one_history;
pub mod outage;
pub mod snapshots_immutable;
pub mod space_honest;
pub mod volumes_as_written;
pub mod zones_distinct;
