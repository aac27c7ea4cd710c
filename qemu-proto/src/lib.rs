//! The Sheepdog client protocol: bytes on the wire, bit for bit what QEMU and the old tools speak.
//!
//! Floor 0: no dependency, no sockets, no time, no decisions. Bytes from the wire never panic here and never make anything
//! be allocated before their lengths were checked.
#![doc = include_str!("../WIRE.md")]

pub mod attr;
pub mod bitmap;
mod bytes;
pub mod cluster_info;
pub mod exchange;
pub mod flags;
pub mod frame;
pub mod inode;
pub mod names;
pub mod node_entry;
pub mod oid;
pub mod opcode;
pub mod request;
pub mod response;
pub mod stat;
pub mod status;
#[cfg(test)]
mod test_bytes;
pub mod vdi_summary;
