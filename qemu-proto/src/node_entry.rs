//! A node as it travels in node lists: 80 bytes (protocol.md section 2.2).

use crate::bytes::{array, put, u16_at, u32_at, u64_at};

/// Bytes of a record.
pub const NODE_BYTES: usize = 80;
/// Records in a node list's buffer.
pub const NODES_MAX: usize = 6144;

/// A record. The ancestor's process pointers and padding are not kept: they are zero when written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NodeEntry {
    /// IPv6, or IPv4 in the last four bytes.
    pub address: [u8; 16],
    /// Client port.
    pub port: u16,
    /// Address for traffic between daemons; zeros if the same.
    pub io_address: [u8; 16],
    /// Its port.
    pub io_port: u16,
    /// Virtual nodes; 0 for a gateway.
    pub nr_vnodes: u16,
    /// Fault domain.
    pub zone: u32,
    /// Bytes of capacity.
    pub space: u64,
}

impl NodeEntry {
    /// The record in 80 bytes.
    pub fn decode(bytes: &[u8; NODE_BYTES]) -> NodeEntry {
        NodeEntry {
            address: array(bytes, 24),
            port: u16_at(bytes, 40),
            io_address: array(bytes, 42),
            io_port: u16_at(bytes, 58),
            nr_vnodes: u16_at(bytes, 64),
            zone: u32_at(bytes, 68),
            space: u64_at(bytes, 72),
        }
    }

    /// All records of a payload; a rest that is no whole record is dropped.
    pub fn decode_all(payload: &[u8]) -> impl Iterator<Item = NodeEntry> + '_ {
        payload.chunks_exact(NODE_BYTES).map(|chunk| NodeEntry::decode(&array(chunk, 0)))
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; NODE_BYTES] {
        let mut bytes = [0; NODE_BYTES];
        put(&mut bytes, 24, &self.address);
        put(&mut bytes, 40, &self.port.to_le_bytes());
        put(&mut bytes, 42, &self.io_address);
        put(&mut bytes, 58, &self.io_port.to_le_bytes());
        put(&mut bytes, 64, &self.nr_vnodes.to_le_bytes());
        put(&mut bytes, 68, &self.zone.to_le_bytes());
        put(&mut bytes, 72, &self.space.to_le_bytes());
        bytes
    }

    /// The address as people write it: IPv4 if the first twelve bytes are zero.
    pub fn ip(&self) -> core::net::IpAddr {
        if self.address[..12] == [0; 12] && self.address[12..] != [0, 0, 0, 1] && self.address[12..] != [0; 4] {
            core::net::Ipv4Addr::from(array::<4>(&self.address, 12)).into()
        } else {
            core::net::Ipv6Addr::from(self.address).into()
        }
    }

    /// The 16 bytes of an address.
    pub fn address_bytes(ip: core::net::IpAddr) -> [u8; 16] {
        match ip {
            core::net::IpAddr::V4(v4) => {
                let mut bytes = [0; 16];
                put(&mut bytes, 12, &v4.octets());
                bytes
            }
            core::net::IpAddr::V6(v6) => v6.octets(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_survives_and_addresses_read_as_written() {
        for text in ["127.0.0.1", "10.1.2.3", "::1", "fe80::1"] {
            let ip: core::net::IpAddr = text.parse().unwrap();
            let entry = NodeEntry {
                address: NodeEntry::address_bytes(ip),
                port: 7000,
                nr_vnodes: 128,
                zone: 16_777_343,
                space: 1 << 40,
                ..NodeEntry::default()
            };
            assert_eq!(NodeEntry::decode(&entry.encode()), entry);
            assert_eq!(entry.ip().to_string(), text);
        }
    }
}
