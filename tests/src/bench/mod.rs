//! Measures volumes beside references, in one run on one machine; see `bin/bench.rs`.
//!
//! | file | what it gives |
//! |---|---|
//! | `patterns` | loads by name |
//! | `load` | a load put on a disk, and the times it took |
//! | `native`, `nbd`, `in_process` | our volumes, three ways |
//! | `reference`, `loop_reference` | what they are compared with |
//! | `rig` | all of these beside each other |
//! | `process` | what processes take, as the kernel counts it |
//! | `figures`, `comparison` | what came of it, in tables and JSON |
//! | `sweep`, `plot` | latency over load |
//! | `first_writes`, `recovery`, `start_up` | what is no load |

pub mod comparison;
pub mod figures;
pub mod first_writes;
pub mod in_process;
pub mod load;
pub mod loop_reference;
pub mod native;
pub mod nbd;
pub mod patterns;
pub mod plot;
pub mod process;
pub mod recovery;
pub mod reference;
pub mod rig;
pub mod start_up;
pub mod sweep;

/// Of all volumes here.
pub const OBJECT_BYTES: u64 = 4 << 20;
