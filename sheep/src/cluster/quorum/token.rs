//! One-time tokens: `sheep /data --join TOKEN` is all that a new machine needs.
//!
//! A token names the cluster, where to find it, and a secret of which the cluster keeps only the hash.

use std::fmt::Write;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::cluster::discovery::Seed;

const PREFIX: &str = "sheep-token-";
/// Addresses in a token: enough that one of them is up.
pub const ADDRESSES_MAX: usize = 3;

/// See the module.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Token {
    /// The cluster it belongs to.
    pub cluster: u64,
    /// What is shown to be let in.
    pub secret: [u8; 32],
    /// Node ports of members.
    pub addresses: Vec<SocketAddr>,
}

impl std::fmt::Debug for Token {
    /// The secret must not reach a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Token({:016x})", self.cluster)
    }
}

impl Token {
    /// Whether a word of the command line is meant as a token.
    pub fn looks_like(text: &str) -> bool {
        text.starts_with(PREFIX)
    }

    /// Reads a token; `None` if it is damaged.
    pub fn parse(text: &str) -> Option<Token> {
        let hex = text.strip_prefix(PREFIX)?;
        if hex.len() % 2 != 0 || hex.len() > 2048 || !hex.is_ascii() {
            return None;
        }
        let bytes: Option<Vec<u8>> =
            (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).ok()).collect();
        let bytes = bytes?;
        let (checksum, body) = bytes.split_first_chunk::<4>()?;
        if blake3::hash(body).as_bytes()[..4] != checksum[..] {
            return None;
        }
        postcard::from_bytes(body).ok()
    }

    /// As it is given to a person.
    pub fn to_text(&self) -> String {
        let body = postcard::to_allocvec(self).expect("a token has no unserialisable values");
        let mut text = PREFIX.to_string();
        for byte in blake3::hash(&body).as_bytes()[..4].iter().chain(&body) {
            // Writing to a string does not fail.
            let _ = write!(text, "{byte:02x}");
        }
        text
    }

    /// Where to look for the cluster.
    pub fn seeds(&self) -> Vec<Seed> {
        self.addresses.iter().map(|address| Seed { host: address.ip().to_string(), port: address.port() }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_being_written_down_and_a_damaged_one_is_noticed() {
        let token = Token { cluster: 7, secret: [9; 32], addresses: vec!["10.0.0.1:7010".parse().unwrap()] };
        let text = token.to_text();
        assert!(Token::looks_like(&text) && Token::parse(&text) == Some(token));
        let mut damaged = text.clone().into_bytes();
        *damaged.last_mut().unwrap() ^= 1;
        assert!(Token::parse(std::str::from_utf8(&damaged).unwrap()).is_none());
        assert!(Token::parse("sheep-token-zz").is_none() && Token::parse("sheep-token-é").is_none());
    }
}
