//! Names and tags as payloads: fields of 256 bytes, padded with NUL.

use crate::bytes::{put, until_nul};

/// Bytes of one field; the last one is always NUL.
pub const FIELD_BYTES: usize = 256;

/// Why a payload names nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NameError {
    /// Neither 256 nor 512 bytes.
    Length(usize),
    /// The field has no NUL: it would have no end.
    Unterminated,
    /// No name at all.
    Empty,
}

impl core::fmt::Display for NameError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            NameError::Length(length) => write!(f, "a name takes 256 or 512 bytes, not {length}"),
            NameError::Unterminated => f.write_str("the name has no end"),
            NameError::Empty => f.write_str("the name is empty"),
        }
    }
}

impl core::error::Error for NameError {}

fn field(bytes: &[u8]) -> Result<&[u8], NameError> {
    let value = until_nul(bytes);
    if value.len() == bytes.len() { Err(NameError::Unterminated) } else { Ok(value) }
}

/// The name of a payload of exactly 256 bytes.
pub fn parse_name(payload: &[u8]) -> Result<&[u8], NameError> {
    if payload.len() != FIELD_BYTES {
        return Err(NameError::Length(payload.len()));
    }
    let name = field(payload)?;
    if name.is_empty() { Err(NameError::Empty) } else { Ok(name) }
}

/// The name and tag of a payload of 256 bytes (no tag: empty) or 512.
pub fn parse_name_tag(payload: &[u8]) -> Result<(&[u8], &[u8]), NameError> {
    match payload.len() {
        FIELD_BYTES => Ok((parse_name(payload)?, &[])),
        length if length == 2 * FIELD_BYTES => {
            let (name, tag) = payload.split_at(FIELD_BYTES);
            Ok((parse_name(name)?, field(tag)?))
        }
        length => Err(NameError::Length(length)),
    }
}

/// A field; bytes beyond 255 are cut.
pub fn padded(value: &[u8]) -> [u8; FIELD_BYTES] {
    let mut bytes = [0; FIELD_BYTES];
    put(&mut bytes, 0, &value[..value.len().min(FIELD_BYTES - 1)]);
    bytes
}

/// A payload of name and tag.
pub fn name_tag_payload(name: &[u8], tag: &[u8]) -> [u8; 2 * FIELD_BYTES] {
    let mut bytes = [0; 2 * FIELD_BYTES];
    put(&mut bytes, 0, &padded(name));
    put(&mut bytes, FIELD_BYTES, &padded(tag));
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_tags_survive() {
        let payload = name_tag_payload(b"vm1", b"");
        assert_eq!(parse_name_tag(&payload), Ok((&b"vm1"[..], &b""[..])));
        assert_eq!(parse_name_tag(&payload[..256]), Ok((&b"vm1"[..], &b""[..])));
        assert_eq!(parse_name_tag(&name_tag_payload(&[b'x'; 255], b"t")), Ok((&[b'x'; 255][..], &b"t"[..])));
    }

    #[test]
    fn bad_names_are_refused() {
        assert_eq!(parse_name_tag(&[0; 512]), Err(NameError::Empty));
        assert_eq!(parse_name_tag(&[b'x'; 512]), Err(NameError::Unterminated));
        assert_eq!(parse_name_tag(&[b'x'; 300]), Err(NameError::Length(300)));
        assert_eq!(parse_name_tag(&[]), Err(NameError::Length(0)));
        let mut tag = name_tag_payload(b"vm1", b"");
        tag[256..].fill(b't');
        assert_eq!(parse_name_tag(&tag), Err(NameError::Unterminated));
    }
}
