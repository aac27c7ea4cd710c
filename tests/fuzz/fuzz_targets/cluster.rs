//! What nodes send each other and keep of it: handshakes, frames, requests, the messages of the votes, their log and snapshot,
//! tokens. Bytes are decoded to something that encodes to the same meaning, or refused.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sheep::cluster::consensus::{format, log_file, snapshots};
use sheep::cluster::mesh::frame::{self, Header};
use sheep::cluster::quorum::messages::{Answer, Card, Request, decode, encode};
use sheep::cluster::quorum::token::Token;
use sheep_core::node_handshake::{Hello, Message, PREFIX_BYTES, Prefix};

/// The largest body of a control link.
const BODY_BYTES_MAX: usize = 32 << 20;

fuzz_target!(|bytes: &[u8]| {
    let _ = Hello::decode(bytes);
    let _ = Message::decode(bytes);
    if let Some(prefix) = bytes.first_chunk::<PREFIX_BYTES>() {
        let _ = Prefix::decode(prefix);
    }
    if let Some(header) = bytes.first_chunk::<{ frame::HEADER_BYTES }>() {
        let _ = Header::decode(header, BODY_BYTES_MAX);
    }
    let _ = format::decode_request(7, bytes);
    let _ = format::decode_response(7, bytes);
    let _ = log_file::decode_file(bytes, true);
    let _ = log_file::decode_file(bytes, false);
    let _ = snapshots::decode(bytes);
    if let Some(request) = decode::<Request>(bytes) {
        assert!(decode::<Request>(&encode(&request)).is_some());
    }
    if let Some(answer) = decode::<Answer>(bytes) {
        assert!(decode::<Answer>(&encode(&answer)).is_some());
    }
    if let Some(card) = decode::<Card>(bytes) {
        assert_eq!(decode::<Card>(&encode(&card)), Some(card));
    }
    if let Ok(text) = std::str::from_utf8(bytes)
        && let Some(token) = Token::parse(text)
    {
        assert_eq!(Token::parse(&token.to_text()), Some(token));
    }
});
