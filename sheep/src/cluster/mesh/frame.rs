//! What travels on a control connection: `[u32 length][u64 id][u8 kind][body]`, integers little-endian.

use std::io;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncWrite, AsyncWriteExt};
use tokio::sync::{OwnedSemaphorePermit, mpsc};

/// The largest body of a request or an answer: a snapshot of the ordered state.
pub const BODY_BYTES_MAX: usize = 32 << 20;
/// Bytes before a body.
pub const HEADER_BYTES: usize = 13;
/// Smaller bodies are copied together with their neighbours, so that one record or segment carries many.
const GATHER_BYTES: usize = 16 << 10;

/// What a frame is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Kind {
    /// From the dialer.
    Request = 1,
    /// To the request with the same id.
    Answer = 2,
    /// From the dialer; no body.
    Ping = 3,
    /// To the ping with the same id; no body.
    Pong = 4,
}

/// What comes before a body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Header {
    /// Bytes of the body.
    pub length: usize,
    /// Chosen by the dialer.
    pub id: u64,
    /// What it is.
    pub kind: Kind,
}

impl Header {
    /// Reads a header; `None` if it is none, or promises more than `body_bytes_max`.
    pub fn decode(bytes: &[u8; HEADER_BYTES], body_bytes_max: usize) -> Option<Header> {
        let length = u32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]]) as usize;
        let id = u64::from_le_bytes([bytes[4], bytes[5], bytes[6], bytes[7], bytes[8], bytes[9], bytes[10], bytes[11]]);
        let kind = match bytes[12] {
            1 => Kind::Request,
            2 => Kind::Answer,
            3 => Kind::Ping,
            4 => Kind::Pong,
            _ => return None,
        };
        let limit = if matches!(kind, Kind::Request | Kind::Answer) { body_bytes_max } else { 0 };
        (length <= limit).then_some(Header { length, id, kind })
    }

    /// The bytes that [`Header::decode`] reads.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[..4].copy_from_slice(&(self.length as u32).to_le_bytes());
        bytes[4..12].copy_from_slice(&self.id.to_le_bytes());
        bytes[12] = self.kind as u8;
        bytes
    }
}

/// A frame on its way out. The permit of the request that it answers is held until it has been written.
pub(super) struct Outgoing {
    header: Header,
    body: Bytes,
    permit: Option<OwnedSemaphorePermit>,
}

impl Outgoing {
    /// The caller has checked the body's length.
    pub fn new(kind: Kind, id: u64, body: Bytes) -> Outgoing {
        Outgoing { header: Header { length: body.len(), id, kind }, body, permit: None }
    }

    /// See the type.
    pub fn holding(mut self, permit: OwnedSemaphorePermit) -> Outgoing {
        self.permit = Some(permit);
        self
    }
}

/// Writes what is queued until the queue is closed or the connection breaks.
pub(super) async fn write_frames<W>(writer: &mut W, queue: &mut mpsc::Receiver<Outgoing>) -> io::Result<()>
where
    W: AsyncWrite + Unpin + ?Sized,
{
    let mut gathered = BytesMut::new();
    while let Some(mut frame) = queue.recv().await {
        // Held until everything that was gathered with them is written.
        let mut permits = Vec::new();
        loop {
            gathered.extend_from_slice(&frame.header.encode());
            permits.extend(frame.permit.take());
            if frame.body.len() > GATHER_BYTES {
                writer.write_all(&gathered).await?;
                gathered.clear();
                writer.write_all(&frame.body).await?;
            } else {
                gathered.extend_from_slice(&frame.body);
            }
            if gathered.len() > GATHER_BYTES {
                break;
            }
            match queue.try_recv() {
                Ok(next) => frame = next,
                Err(_) => break,
            }
        }
        writer.write_all(&gathered).await?;
        gathered.clear();
        writer.flush().await?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_comes_back_as_it_was_and_too_long_bodies_are_refused() {
        for kind in [Kind::Request, Kind::Answer] {
            let header = Header { length: 100, id: u64::MAX - 1, kind };
            assert_eq!(Header::decode(&header.encode(), 100), Some(header));
            assert_eq!(Header::decode(&header.encode(), 99), None);
        }
        let ping = Header { length: 0, id: 1, kind: Kind::Ping };
        assert_eq!(Header::decode(&ping.encode(), 100), Some(ping));
        assert_eq!(Header::decode(&Header { length: 1, ..ping }.encode(), 100), None);
    }

    proptest! {
        #[test]
        fn any_header_is_refused_or_comes_back(bytes in any::<[u8; HEADER_BYTES]>()) {
            if let Some(header) = Header::decode(&bytes, BODY_BYTES_MAX) {
                prop_assert!(header.length <= BODY_BYTES_MAX);
                prop_assert_eq!(header.encode(), bytes);
            }
        }
    }
}
