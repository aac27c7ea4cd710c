//! One request and its answer over anything that can be read and written. Opens nothing itself.

use std::io::{Read, Write};

use crate::flags::RequestFlags;
use crate::frame::OTHER_BYTES_MAX;
use crate::request::{HEADER_BYTES, Request};
use crate::response::Response;

/// Why there is no answer.
#[derive(Debug)]
pub enum ExchangeError {
    /// The stream failed or ended.
    Io(std::io::Error),
    /// The answer is to another request.
    Mismatch,
    /// The answer announces more bytes than were asked for.
    TooLong(u32),
}

impl core::fmt::Display for ExchangeError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            ExchangeError::Io(error) => write!(f, "{error}"),
            ExchangeError::Mismatch => f.write_str("the answer is to another request; is this a sheep?"),
            ExchangeError::TooLong(length) => write!(f, "the answer announces {length} bytes; is this a sheep?"),
        }
    }
}

impl std::error::Error for ExchangeError {}

impl From<std::io::Error> for ExchangeError {
    fn from(error: std::io::Error) -> Self {
        ExchangeError::Io(error)
    }
}

/// Sends a request and waits for its answer. With flag WRITE `data_length` must be the payload's length. Extension
/// operations that answer text of unknown length set `data_length` to the most they take.
pub fn exchange<S: Read + Write>(
    stream: &mut S,
    request: &Request,
    payload: &[u8],
) -> Result<(Response, Vec<u8>), ExchangeError> {
    let writes = request.flags.contains(RequestFlags::WRITE);
    assert!(!writes || request.data_length as usize == payload.len(), "the header announces the payload");
    let mut message = Vec::with_capacity(HEADER_BYTES + payload.len());
    message.extend_from_slice(&request.encode());
    message.extend_from_slice(payload);
    stream.write_all(&message)?;
    let mut header = [0; HEADER_BYTES];
    stream.read_exact(&mut header)?;
    let response = Response::decode(&header);
    if response.opcode != request.opcode || response.id != request.id {
        return Err(ExchangeError::Mismatch);
    }
    let allowed = if writes { OTHER_BYTES_MAX.min(payload.len()) } else { request.data_length as usize };
    if response.data_length as usize > allowed {
        return Err(ExchangeError::TooLong(response.data_length));
    }
    let mut answer = vec![0; response.data_length as usize];
    stream.read_exact(&mut answer)?;
    Ok((response, answer))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::opcode::Opcode;
    use crate::response::ResponseBody;
    use std::io::Cursor;

    struct Fake {
        sent: Vec<u8>,
        answer: Cursor<Vec<u8>>,
    }

    impl Read for Fake {
        fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
            self.answer.read(buffer)
        }
    }

    impl Write for Fake {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.sent.write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn an_answer_longer_than_asked_for_is_refused_before_it_is_read() {
        let mut request = Request::plain(Opcode::GetNodeList);
        request.data_length = 80;
        let long = Response::success(&request, 1, ResponseBody::NONE, 81);
        let mut fake = Fake { sent: Vec::new(), answer: Cursor::new(long.encode().to_vec()) };
        assert!(matches!(exchange(&mut fake, &request, &[]), Err(ExchangeError::TooLong(81))));
        let mut answer = Response::success(&request, 1, ResponseBody::NONE, 3).encode().to_vec();
        answer.extend_from_slice(b"abc");
        let mut fake = Fake { sent: Vec::new(), answer: Cursor::new(answer) };
        let (response, data) = exchange(&mut fake, &request, &[]).unwrap();
        assert_eq!((response.epoch, data.as_slice()), (1, &b"abc"[..]));
        assert_eq!(fake.sent, request.encode());
    }
}
