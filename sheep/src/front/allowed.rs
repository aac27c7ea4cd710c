//! From where clients that cannot authenticate are served: this machine, and the networks that the operator named.

use std::net::{IpAddr, SocketAddr};

/// Networks, besides loopback.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Allowed {
    networks: Vec<(IpAddr, u8)>,
    everybody: bool,
}

impl Allowed {
    /// Reads `CIDR,CIDR,...` or `all`; an address alone is a network of one.
    pub fn parse(text: &str) -> Option<Allowed> {
        let mut allowed = Allowed::default();
        for part in text.split(',').map(str::trim) {
            if part == "all" {
                allowed.everybody = true;
                continue;
            }
            let (address, length) = match part.split_once('/') {
                Some((address, length)) => (address, Some(length.parse::<u8>().ok()?)),
                None => (part, None),
            };
            let address: IpAddr = address.parse().ok()?;
            let most = if address.is_ipv4() { 32 } else { 128 };
            let length = length.unwrap_or(most);
            if length > most {
                return None;
            }
            allowed.networks.push((address, length));
        }
        Some(allowed)
    }

    /// Whether a connection is served, told from who is there; a refusal is logged. A unix socket's directory protects it.
    pub fn admits(&self, peer: &str) -> bool {
        let Ok(address) = peer.parse::<SocketAddr>() else { return true };
        let admitted = self.permits(address.ip());
        if !admitted {
            tracing::warn!("client {peer} refused: its network is not among those of --allow-clients");
        }
        admitted
    }

    /// Whether a client at `address` is served.
    pub fn permits(&self, address: IpAddr) -> bool {
        let address = address.to_canonical();
        self.everybody
            || address.is_loopback()
            || self.networks.iter().any(|(network, length)| contains(*network, *length, address))
    }
}

fn contains(network: IpAddr, length: u8, address: IpAddr) -> bool {
    match (network, address) {
        (IpAddr::V4(network), IpAddr::V4(address)) => {
            let mask = u32::MAX.checked_shl(32 - u32::from(length)).unwrap_or(0);
            network.to_bits() & mask == address.to_bits() & mask
        }
        (IpAddr::V6(network), IpAddr::V6(address)) => {
            let mask = u128::MAX.checked_shl(128 - u32::from(length)).unwrap_or(0);
            network.to_bits() & mask == address.to_bits() & mask
        }
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn networks_contain_what_they_should() {
        let allowed = Allowed::parse("10.1.0.0/16,192.168.1.7,fd00::/8").unwrap();
        let permits = |text: &str| allowed.permits(text.parse().unwrap());
        for inside in ["10.1.255.3", "192.168.1.7", "fd12::1", "127.0.0.1", "::1", "::ffff:10.1.2.3"] {
            assert!(permits(inside), "{inside}");
        }
        for outside in ["10.2.0.1", "192.168.1.8", "fe80::1", "::ffff:10.2.0.1"] {
            assert!(!permits(outside), "{outside}");
        }
        assert!(!Allowed::default().permits("10.0.0.1".parse().unwrap()));
        assert!(Allowed::parse("all").unwrap().permits("8.8.8.8".parse().unwrap()));
        assert!(Allowed::parse("0.0.0.0/0").unwrap().permits("8.8.8.8".parse().unwrap()));
        for bad in ["10.0.0.0/33", "x", "", "10.0.0.0/", "::/129"] {
            assert!(Allowed::parse(bad).is_none(), "{bad}");
        }
    }
}
