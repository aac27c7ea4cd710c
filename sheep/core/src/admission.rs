//! Who may be a node of this cluster: the identities that were let in, the key that proves that one belongs here, and the
//! one-time tokens that stand for it.
//!
//! Always holds:
//! 1. A node is known by one fingerprint from the moment it is let in; whoever shows the same id with another one is
//!    somebody else.
//! 2. A banned fingerprint never comes back, whatever it proves. The key that it knew is replaced in the same command.
//! 3. A token lets one node in, once.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::string::String;
use core::fmt::{self, Write as _};
use core::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::member::NodeId;

/// BLAKE3 of a node's certificate as it travels (DER): what a person compares, and what nodes pin each other by.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Fingerprint(pub [u8; 32]);

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0[..16].iter().enumerate() {
            let separator = if index > 0 && index % 4 == 0 { "-" } else { "" };
            write!(f, "{separator}{byte:02x}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// The cluster key: whoever knows it belongs here. Never printed.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ClusterKey {
    /// Goes up with every rotation; 0 while there is none.
    pub generation: u32,
    /// The secret.
    pub secret: [u8; 32],
}

impl fmt::Debug for ClusterKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ClusterKey({}, secret)", self.generation)
    }
}

/// How the line of a key file begins; generation and secret follow.
const KEY_TEXT: &str = "sheepdog-key-";

impl ClusterKey {
    /// The one line of a key file, without its end: `sheepdog-key-GENERATION-HEX`. It is the secret itself.
    pub fn to_text(&self) -> String {
        let mut text = String::with_capacity(KEY_TEXT.len() + 11 + 2 * self.secret.len());
        // Writing into a String cannot fail.
        let _ = write!(text, "{KEY_TEXT}{}-", self.generation);
        for byte in self.secret {
            let _ = write!(text, "{byte:02x}");
        }
        text
    }
}

/// The text is no cluster key. What it is, is not repeated: it might be one with a letter too many.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct NotAKey;

impl fmt::Display for NotAKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("this is no cluster key; a key file holds one line, sheepdog-key-GENERATION-64 hexadecimal digits")
    }
}

impl core::error::Error for NotAKey {}

impl FromStr for ClusterKey {
    type Err = NotAKey;

    /// Reads the line of a key file, with or without white space around it.
    fn from_str(text: &str) -> Result<ClusterKey, NotAKey> {
        let (generation, digits) =
            text.trim().strip_prefix(KEY_TEXT).and_then(|rest| rest.split_once('-')).ok_or(NotAKey)?;
        // `parse` would take a sign as well.
        if !generation.bytes().all(|byte| byte.is_ascii_digit()) || digits.len() != 64 {
            return Err(NotAKey);
        }
        let mut secret = [0; 32];
        for (byte, pair) in secret.iter_mut().zip(digits.as_bytes().chunks_exact(2)) {
            let value = |digit: u8| char::from(digit).to_digit(16).ok_or(NotAKey);
            *byte = (value(pair[0])? * 16 + value(pair[1])?) as u8;
        }
        Ok(ClusterKey { generation: generation.parse().map_err(|_| NotAKey)?, secret })
    }
}

/// What the ordered state knows about who may come in.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Admission {
    /// Any node of the network may come in, and connections are not encrypted: for laboratories.
    pub open: bool,
    /// `None` before format, with the `local` driver, and in an open cluster.
    pub key: Option<ClusterKey>,
    /// Nodes that were let in.
    pub nodes: BTreeMap<NodeId, Fingerprint>,
    /// Identities that are never let in again.
    pub banned: BTreeSet<Fingerprint>,
    /// BLAKE3 of the tokens that were given out and not used yet.
    pub tokens: BTreeSet<[u8; 32]>,
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::format;
    use alloc::string::ToString;

    #[test]
    fn a_key_comes_back_from_its_text() {
        let mut key = ClusterKey { generation: 12, secret: [0; 32] };
        key.secret[0] = 0xab;
        key.secret[31] = 0x01;
        let text = key.to_text();
        assert_eq!(text, format!("sheepdog-key-12-ab{}01", "0".repeat(60)));
        assert!(text.parse() == Ok(key.clone()) && format!(" {text}\n").parse() == Ok(key));
    }

    #[test]
    fn what_is_no_key_is_refused_and_not_repeated() {
        let digits = "5a".repeat(32);
        for text in [
            String::new(),
            digits.clone(),
            format!("sheepdog-key-{digits}"),
            format!("sheepdog-key-1-{digits}0"),
            format!("sheepdog-key-1-{}", &digits[1..]),
            format!("sheepdog-key-+1-{digits}"),
            format!("sheepdog-key--{digits}"),
            format!("sheepdog-key-4294967296-{digits}"),
            format!("sheepdog-key-1-{}g0", &digits[2..]),
            format!("sheepdog-key-1-{}\u{e9}", &digits[2..]),
        ] {
            let error = text.parse::<ClusterKey>().expect_err(&text);
            assert!(!error.to_string().contains("5a5a"));
        }
        let key = ClusterKey { generation: 1, secret: [0x5a; 32] };
        assert!(!format!("{key:?}").contains("5a") && !format!("{key:?}").contains("90"));
    }
}
