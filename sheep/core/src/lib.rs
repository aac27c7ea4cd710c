//! Floor 1: every decision of a sheep, and nothing else.
//!
//! Purity is the compiler's business: the crate is `no_std`, so files, sockets, clocks, threads and randomly ordered
//! maps are not in scope. Time and randomness come in as arguments; results go out as values.
#![no_std]

extern crate alloc;
#[cfg(test)]
extern crate std;

pub mod admission;
pub mod cluster_state;
pub mod command;
pub mod copies;
pub mod copy_policy;
pub mod disk_ring;
pub mod history;
pub mod ids;
pub mod level;
pub mod limits;
pub mod member;
pub mod node_handshake;
pub mod peer_message;
pub mod placement;
pub mod ring;
pub mod stamp;
mod state_form;
pub mod units;
pub mod vdi;
pub mod vdi_name;
mod volume_changes;
pub mod write_fate;
pub mod zeros;
