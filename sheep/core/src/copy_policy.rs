//! How an object is kept redundantly: whole copies, or data strips with parity.
//!
//! Parses and prints what an operator types (`3`, `4:2`) and the pair of bytes the wire carries (`nr_copies`,
//! `copy_policy`). Whether this cluster can store a policy is not decided here.
//!
//! | written | copies | policy byte | survives the loss of |
//! |---|---|---|---|
//! | `N`, 1..=31 | N | 0 | N - 1 zones |
//! | `D:P`, D of 2 4 8 16, P 1..=15 | D + P | high half D / 2, low half P | P zones |
//!
//! Always holds:
//! 1. A `CopyPolicy` is valid; there is no way to make another.
//! 2. Printing and parsing give back the same policy, as do writing and reading the pair of bytes.

use core::error::Error;
use core::fmt;
use core::str::FromStr;
use serde::{Deserialize, Serialize};

/// Most copies, or strips, of one object: what 16 data and 15 parity strips need, and what old clients accept.
pub const COPIES_MAX: u8 = 31;
/// Most parity strips: half a byte on the wire.
pub const PARITY_MAX: u8 = 15;
/// Most data strips of one object.
pub const DATA_STRIPS_MAX: u8 = 16;
const _: () = assert!(DATA_STRIPS_MAX + PARITY_MAX == COPIES_MAX);
const _: () = assert!(PARITY_MAX == 0x0f && DATA_STRIPS_MAX / 2 <= 0x0f);

/// How an object is kept redundantly.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Serialize, Deserialize)]
#[serde(try_from = "(u8, u8)", into = "(u8, u8)")]
pub struct CopyPolicy(Kind);

/// Private, so that only the checked constructors make one.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
enum Kind {
    Replicas { copies: u8 },
    Erasure { strips: Strips },
}

/// The strips of one erasure-coded object.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct Strips {
    /// Strips that carry the content: 2, 4, 8 or 16.
    pub data: u8,
    /// Strips that can be lost: 1..=15.
    pub parity: u8,
}

/// Why something is not a copy policy. Retrying never helps; the caller must ask for another policy.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum CopyPolicyError {
    /// Neither `N` nor `D:P` in decimal digits.
    Syntax,
    /// Not 1..=31 copies.
    CopiesOutOfRange,
    /// Data strips other than 2, 4, 8 or 16.
    DataStrips,
    /// Not 1..=15 parity strips.
    ParityStrips,
}

impl fmt::Display for CopyPolicyError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Syntax => "must be a number of copies such as 3, or data and parity strips such as 4:2",
            Self::CopiesOutOfRange => "the number of copies must be 1 to 31",
            Self::DataStrips => "the number of data strips must be 2, 4, 8 or 16",
            Self::ParityStrips => "the number of parity strips must be 1 to 15",
        })
    }
}

impl Error for CopyPolicyError {}

impl CopyPolicy {
    /// Whole copies; 1..=31 of them.
    pub const fn replicas(copies: u8) -> Result<Self, CopyPolicyError> {
        if copies == 0 || copies > COPIES_MAX {
            return Err(CopyPolicyError::CopiesOutOfRange);
        }
        Ok(Self(Kind::Replicas { copies }))
    }

    /// Data strips (2, 4, 8 or 16) and parity strips (1..=15).
    pub const fn erasure(strips: Strips) -> Result<Self, CopyPolicyError> {
        if !matches!(strips.data, 2 | 4 | 8 | 16) {
            return Err(CopyPolicyError::DataStrips);
        }
        if strips.parity == 0 || strips.parity > PARITY_MAX {
            return Err(CopyPolicyError::ParityStrips);
        }
        Ok(Self(Kind::Erasure { strips }))
    }

    /// The policy of a request or an inode. `Ok(None)` is "zero copies": the client leaves the choice to the cluster.
    ///
    /// With a policy byte the number of copies follows from it; what the client says besides is ignored, as old servers
    /// do.
    pub const fn from_wire(copies: u8, policy: u8) -> Result<Option<Self>, CopyPolicyError> {
        if copies == 0 {
            return Ok(None);
        }
        let read = if policy == 0 {
            Self::replicas(copies)
        } else {
            Self::erasure(Strips { data: (policy >> 4) * 2, parity: policy & 0x0f })
        };
        match read {
            Ok(policy) => Ok(Some(policy)),
            Err(error) => Err(error),
        }
    }

    /// How many nodes hold a piece of an object: copies, or data and parity strips together. The wire's `nr_copies`.
    pub const fn holder_count(self) -> u8 {
        match self.0 {
            Kind::Replicas { copies } => copies,
            Kind::Erasure { strips } => strips.data + strips.parity,
        }
    }

    /// How many holders can be lost without losing the object.
    pub const fn losses_survived(self) -> u8 {
        match self.0 {
            Kind::Replicas { copies } => copies - 1,
            Kind::Erasure { strips } => strips.parity,
        }
    }

    /// The strips, unless objects are kept as whole copies.
    pub const fn strips(self) -> Option<Strips> {
        match self.0 {
            Kind::Replicas { .. } => None,
            Kind::Erasure { strips } => Some(strips),
        }
    }

    /// The wire's `copy_policy` byte: 0 for whole copies.
    pub const fn wire_byte(self) -> u8 {
        match self.0 {
            Kind::Replicas { .. } => 0,
            Kind::Erasure { strips } => (strips.data / 2) << 4 | strips.parity,
        }
    }
}

impl fmt::Display for CopyPolicy {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Kind::Replicas { copies } => write!(formatter, "{copies}"),
            Kind::Erasure { strips: Strips { data, parity } } => write!(formatter, "{data}:{parity}"),
        }
    }
}

impl FromStr for CopyPolicy {
    type Err = CopyPolicyError;

    fn from_str(text: &str) -> Result<Self, CopyPolicyError> {
        match text.split_once(':') {
            None => Self::replicas(parse_count(text, CopyPolicyError::CopiesOutOfRange)?),
            Some((data, parity)) => {
                let data = parse_count(data, CopyPolicyError::DataStrips)?;
                let parity = parse_count(parity, CopyPolicyError::ParityStrips)?;
                Self::erasure(Strips { data, parity })
            }
        }
    }
}

/// Decimal digits only; `too_large` is the error for a number that no count can be.
fn parse_count(digits: &str, too_large: CopyPolicyError) -> Result<u8, CopyPolicyError> {
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(CopyPolicyError::Syntax);
    }
    digits.parse().map_err(|_| too_large)
}

impl From<CopyPolicy> for (u8, u8) {
    fn from(policy: CopyPolicy) -> Self {
        (policy.holder_count(), policy.wire_byte())
    }
}

impl TryFrom<(u8, u8)> for CopyPolicy {
    type Error = CopyPolicyError;

    fn try_from((copies, policy): (u8, u8)) -> Result<Self, CopyPolicyError> {
        Self::from_wire(copies, policy)?.ok_or(CopyPolicyError::CopiesOutOfRange)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec;

    fn erasure(data: u8, parity: u8) -> Result<CopyPolicy, CopyPolicyError> {
        CopyPolicy::erasure(Strips { data, parity })
    }

    #[test]
    fn wire_bytes_of_the_reference() {
        for (text, copies, byte) in
            [("3", 3, 0), ("2:1", 3, 0x11), ("4:2", 6, 0x22), ("8:3", 11, 0x43), ("16:15", 31, 0x8f)]
        {
            let policy: CopyPolicy = text.parse().expect(text);
            assert_eq!((policy.holder_count(), policy.wire_byte()), (copies, byte), "{text}");
            assert_eq!(CopyPolicy::from_wire(copies, byte), Ok(Some(policy)), "{text}");
        }
    }

    #[test]
    fn every_policy_survives_text_wire_and_storage() {
        let replicas = (1..=COPIES_MAX).map(CopyPolicy::replicas);
        let strips =
            [2, 4, 8, 16].into_iter().flat_map(|data| (1..=PARITY_MAX).map(move |parity| erasure(data, parity)));
        let mut count = 0;
        for policy in replicas.chain(strips) {
            let policy = policy.expect("in range");
            assert_eq!(policy.to_string().parse(), Ok(policy));
            assert_eq!(CopyPolicy::from_wire(policy.holder_count(), policy.wire_byte()), Ok(Some(policy)));
            let stored = postcard::to_allocvec(&policy).expect("two bytes");
            assert_eq!(stored, vec![policy.holder_count(), policy.wire_byte()]);
            assert_eq!(postcard::from_bytes(&stored), Ok(policy));
            assert!(policy.losses_survived() < policy.holder_count() && policy.holder_count() <= COPIES_MAX);
            count += 1;
        }
        assert_eq!(count, 31 + 4 * 15);
    }

    #[test]
    fn every_pair_of_wire_bytes_is_a_policy_the_default_or_an_error() {
        for (copies, byte) in (0..=255).flat_map(|copies| (0..=255).map(move |byte| (copies, byte))) {
            match CopyPolicy::from_wire(copies, byte) {
                Ok(None) => assert_eq!(copies, 0),
                Ok(Some(policy)) => {
                    assert_eq!(policy.wire_byte(), byte);
                    assert!(byte != 0 || policy.holder_count() == copies);
                }
                Err(CopyPolicyError::CopiesOutOfRange) => assert!(byte == 0 && copies > COPIES_MAX),
                Err(CopyPolicyError::DataStrips) => assert!(![0x10, 0x20, 0x40, 0x80].contains(&(byte & 0xf0))),
                Err(CopyPolicyError::ParityStrips) => assert_eq!(byte & 0x0f, 0),
                Err(CopyPolicyError::Syntax) => unreachable!("bytes have no syntax"),
            }
        }
    }

    #[test]
    fn what_is_refused_says_why() {
        use CopyPolicyError::{CopiesOutOfRange, DataStrips, ParityStrips, Syntax};
        for (text, error) in [
            ("", Syntax),
            ("x", Syntax),
            ("+3", Syntax),
            ("-1", Syntax),
            (" 3", Syntax),
            ("3 ", Syntax),
            ("3.0", Syntax),
            (":", Syntax),
            ("4:", Syntax),
            (":2", Syntax),
            ("4:2:1", Syntax),
            ("٣", Syntax),
            ("0", CopiesOutOfRange),
            ("32", CopiesOutOfRange),
            ("256", CopiesOutOfRange),
            ("99999999999999999999", CopiesOutOfRange),
            ("0:1", DataStrips),
            ("1:1", DataStrips),
            ("3:2", DataStrips),
            ("32:1", DataStrips),
            ("258:1", DataStrips),
            ("2:0", ParityStrips),
            ("2:16", ParityStrips),
            ("2:257", ParityStrips),
        ] {
            assert_eq!(text.parse::<CopyPolicy>(), Err(error), "{text:?}");
        }
        assert_eq!(postcard::from_bytes::<CopyPolicy>(&[0, 0]).ok(), None, "stored bytes are checked too");
        assert_eq!(postcard::from_bytes::<CopyPolicy>(&[200, 0]).ok(), None);
    }
}
