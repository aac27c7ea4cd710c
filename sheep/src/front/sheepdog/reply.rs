//! What operations give, and what leaves for the client.

use bytes::Bytes;
use qemu_proto::response::{Response, ResponseBody};
use qemu_proto::status::Status;

/// An answer: its header and payload.
pub struct Answer {
    /// See [`Response`].
    pub response: Response,
    /// `response.data_length` bytes.
    pub payload: Bytes,
}

/// What an operation gives when it is done.
pub struct Reply {
    /// The header's body.
    pub body: ResponseBody,
    /// What follows the header.
    pub payload: Bytes,
    /// The result; `Success` but for operations whose answer is a status.
    pub status: Status,
}

impl Reply {
    /// Done, nothing to tell.
    pub fn done() -> Reply {
        Reply { body: ResponseBody::NONE, payload: Bytes::new(), status: Status::Success }
    }

    /// Done, with a header body.
    pub fn body(body: ResponseBody) -> Reply {
        Reply { body, ..Reply::done() }
    }

    /// Done, with data.
    pub fn data(payload: impl Into<Bytes>) -> Reply {
        Reply { payload: payload.into(), ..Reply::done() }
    }
}

/// How an operation ends.
pub type Outcome = Result<Reply, Status>;
