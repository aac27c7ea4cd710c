//! How many bytes may follow a header: the caps that keep a hostile length from allocating anything.

use core::ops::Range;

use crate::flags::RequestFlags;
use crate::inode::INODE_BYTES;
use crate::opcode::Opcode;
use crate::request::{HEADER_BYTES, Request};

/// No operation but those on objects carries more (protocol.md section 1.6).
pub const OTHER_BYTES_MAX: usize = 16 << 20;

/// Why a header ends its connection.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FrameError {
    /// The header announces more bytes than its operation may carry.
    TooLong {
        /// What was announced.
        announced: u32,
        /// What is allowed.
        allowed: usize,
    },
}

impl core::fmt::Display for FrameError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            FrameError::TooLong { announced, allowed } => {
                write!(f, "{announced} bytes announced where at most {allowed} are allowed")
            }
        }
    }
}

impl core::error::Error for FrameError {}

fn bytes_max(request: &Request, object_bytes_max: usize) -> usize {
    match request.op() {
        Some(Opcode::CreateAndWriteObj | Opcode::ReadObj | Opcode::WriteObj) => object_bytes_max.max(INODE_BYTES),
        Some(_) => OTHER_BYTES_MAX,
        // Nothing is known of it: read over a small payload so that the connection stays usable, and refuse more.
        None => 1 << 20,
    }
}

/// Bytes of payload that follow a request. `object_bytes_max` is the largest object the server keeps.
pub fn payload_bytes(request: &Request, object_bytes_max: usize) -> Result<usize, FrameError> {
    if !request.flags.contains(RequestFlags::WRITE) {
        return Ok(0);
    }
    let allowed = bytes_max(request, object_bytes_max);
    if request.data_length as usize > allowed {
        return Err(FrameError::TooLong { announced: request.data_length, allowed });
    }
    Ok(request.data_length as usize)
}

/// Bytes that the answer to a request may carry.
pub fn answer_bytes_max(request: &Request, object_bytes_max: usize) -> usize {
    let piggyback = request.flags.contains(RequestFlags::PIGGYBACK);
    if request.flags.contains(RequestFlags::WRITE) && !piggyback {
        return 0;
    }
    (request.data_length as usize).min(bytes_max(request, object_bytes_max))
}

/// What the beginning of a byte stream holds.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Parsed {
    /// Not a whole request yet: so many bytes are needed in all.
    Incomplete {
        /// Bytes from the start.
        needed: usize,
    },
    /// A request.
    Complete {
        /// Its header.
        request: Request,
        /// Where its payload is.
        payload: Range<usize>,
    },
}

/// Cuts the first request from a byte stream.
pub fn parse_request(bytes: &[u8], object_bytes_max: usize) -> Result<Parsed, FrameError> {
    let Some(header) = bytes.first_chunk::<HEADER_BYTES>() else {
        return Ok(Parsed::Incomplete { needed: HEADER_BYTES });
    };
    let request = Request::decode(header);
    let total = HEADER_BYTES + payload_bytes(&request, object_bytes_max)?;
    if bytes.len() < total {
        return Ok(Parsed::Incomplete { needed: total });
    }
    Ok(Parsed::Complete { request, payload: HEADER_BYTES..total })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oid::Oid;

    #[test]
    fn a_hostile_length_is_refused_before_anything_is_read() {
        let mut request = Request::object(Opcode::WriteObj, Oid::from_raw(1), RequestFlags::WRITE);
        request.data_length = u32::MAX;
        assert!(payload_bytes(&request, 4 << 20).is_err());
        assert_eq!(payload_bytes(&request, u32::MAX as usize), Ok(u32::MAX as usize));
        request.flags = RequestFlags::NONE;
        assert_eq!(payload_bytes(&request, 4 << 20), Ok(0));
        assert_eq!(answer_bytes_max(&request, 4 << 20), INODE_BYTES);
        let mut lock = Request::plain(Opcode::LockVdi);
        lock.flags = RequestFlags::WRITE;
        lock.data_length = (16 << 20) + 1;
        assert!(payload_bytes(&lock, 4 << 20).is_err());
    }

    #[test]
    fn requests_are_cut_from_a_stream() {
        let mut request = Request::object(Opcode::WriteObj, Oid::from_raw(1), RequestFlags::WRITE);
        request.data_length = 10;
        let mut stream = request.encode().to_vec();
        assert_eq!(parse_request(&stream[..47], 4096), Ok(Parsed::Incomplete { needed: 48 }));
        assert_eq!(parse_request(&stream, 4096), Ok(Parsed::Incomplete { needed: 58 }));
        stream.extend_from_slice(&[7; 12]);
        assert_eq!(parse_request(&stream, 4096), Ok(Parsed::Complete { request, payload: 48..58 }));
    }
}
