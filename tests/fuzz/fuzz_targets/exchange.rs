//! Exchanges with a hostile server: the answer is taken, or refused for the right reason, and nothing is read, let alone
//! allocated, beyond what was asked for.
#![no_main]

use std::io::{ErrorKind, Read, Write};

use libfuzzer_sys::fuzz_target;
use qemu_proto::exchange::{ExchangeError, exchange};
use qemu_proto::flags::RequestFlags;
use qemu_proto::frame::OTHER_BYTES_MAX;
use qemu_proto::request::{HEADER_BYTES, Request};
use qemu_proto::response::Response;

/// A server that says some bytes in pieces and then hangs up.
struct Hostile<'a> {
    answer: &'a [u8],
    piece: usize,
    sent: Vec<u8>,
    /// The largest buffer that was there to be filled: what was allocated for the answer.
    buffer_bytes_max: usize,
}

impl Read for Hostile<'_> {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.buffer_bytes_max = self.buffer_bytes_max.max(buffer.len());
        let length = self.piece.min(buffer.len()).min(self.answer.len());
        let (now, later) = self.answer.split_at(length);
        buffer[..length].copy_from_slice(now);
        self.answer = later;
        Ok(length)
    }
}

impl Write for Hostile<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let length = self.piece.min(bytes.len());
        self.sent.extend_from_slice(&bytes[..length]);
        Ok(length)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

fuzz_target!(|input: (u8, u8, u16, [u8; HEADER_BYTES], &[u8])| {
    let (piece, selector, wanted, asked, bytes) = input;
    let mut request = Request::decode(&asked);
    let mut answer = bytes.to_vec();
    // most answers are to this request, and announce a length near what is allowed
    if selector & 1 == 0 && answer.len() >= HEADER_BYTES {
        answer[1] = asked[1];
        answer[8..12].copy_from_slice(&asked[8..12]);
        if selector & 2 == 0 {
            answer[14..16].fill(0);
        }
    }
    let writes = request.flags.contains(RequestFlags::WRITE);
    let payload: &[u8] = if writes { &bytes[bytes.len() / 2..] } else { &[] };
    request.data_length = match (writes, selector & 4 == 0) {
        (true, _) => payload.len() as u32,
        (false, true) => u32::from(wanted) % 512,
        (false, false) => request.data_length % (OTHER_BYTES_MAX as u32 + 1),
    };
    let mut server = Hostile { answer: &answer, piece: usize::from(piece) + 1, sent: Vec::new(), buffer_bytes_max: 0 };
    let result = exchange(&mut server, &request, payload);
    assert_eq!(server.sent[..HEADER_BYTES], request.encode());
    assert_eq!(&server.sent[HEADER_BYTES..], payload);
    let allowed = request.data_length as usize;
    assert!(server.buffer_bytes_max <= allowed.max(HEADER_BYTES), "{} bytes allocated", server.buffer_bytes_max);
    check_result(&request, &answer, allowed, result);
    let left = server.answer.len();
    assert!(answer.len() - left <= HEADER_BYTES + allowed, "read beyond the answer");
});

fn check_result(request: &Request, answer: &[u8], allowed: usize, result: Result<(Response, Vec<u8>), ExchangeError>) {
    let Some((header, data)) = answer.split_first_chunk::<HEADER_BYTES>() else {
        assert!(matches!(result, Err(ExchangeError::Io(error)) if error.kind() == ErrorKind::UnexpectedEof));
        return;
    };
    let expected = Response::decode(header);
    let announced = expected.data_length as usize;
    match result {
        Ok((response, taken)) => {
            assert_eq!(response, expected);
            assert_eq!((response.opcode, response.id), (request.opcode, request.id));
            assert!(announced <= allowed);
            assert_eq!(taken, data[..announced]);
        }
        Err(ExchangeError::Mismatch) => assert!((expected.opcode, expected.id) != (request.opcode, request.id)),
        Err(ExchangeError::TooLong(length)) => assert!(length as usize == announced && announced > allowed),
        Err(ExchangeError::Io(error)) => {
            assert_eq!(error.kind(), ErrorKind::UnexpectedEof);
            assert!(announced > data.len() && announced <= allowed);
        }
    }
}
