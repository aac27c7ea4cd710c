//! Messages between nodes: headers that are taken come back as they were, and announce no more than the longest payload.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sheep_core::peer_message::{
    HEADER_BYTES, LIST_ENTRY_BYTES, ListEntry, PAYLOAD_BYTES_MAX, PeerAnswer, PeerFrameError, PeerRequest,
};

const REQUEST_MAGIC: &[u8] = b"SHPQ";
const ANSWER_MAGIC: &[u8] = b"SHPR";

fuzz_target!(|input: (u8, [u8; HEADER_BYTES], &[u8])| {
    let (selector, mut header, payload) = input;
    check(&header);
    // past the magic, the kind and the length, which arbitrary bytes seldom pass
    header[..4].copy_from_slice(if selector & 1 == 0 { REQUEST_MAGIC } else { ANSWER_MAGIC });
    check(&header);
    header[16] %= 16;
    check(&header);
    header[7] = 0;
    check(&header);
    let entries: Vec<ListEntry> = ListEntry::decode_all(payload).collect();
    let encoded: Vec<u8> = entries.iter().flat_map(ListEntry::encode).collect();
    assert_eq!(encoded, payload[..payload.len() - payload.len() % LIST_ENTRY_BYTES]);
});

fn announced(header: &[u8; HEADER_BYTES]) -> usize {
    u32::from_le_bytes([header[4], header[5], header[6], header[7]]) as usize
}

fn check(header: &[u8; HEADER_BYTES]) {
    match PeerRequest::decode(header) {
        Ok((request, payload_bytes)) => {
            assert_eq!(&header[..4], REQUEST_MAGIC);
            assert_eq!(payload_bytes, announced(header));
            assert!(payload_bytes <= PAYLOAD_BYTES_MAX);
            let encoded = request.encode(payload_bytes);
            assert_eq!(without(&encoded, &[18..20, 88..96]), without(header, &[18..20, 88..96]));
            assert_eq!(PeerRequest::decode(&encoded), Ok((request, payload_bytes)));
            assert_eq!(PeerAnswer::decode(header), Err(PeerFrameError::Magic), "no request is an answer");
        }
        Err(error) => check_refusal(header, REQUEST_MAGIC, error),
    }
    match PeerAnswer::decode(header) {
        Ok((answer, payload_bytes)) => {
            assert_eq!(&header[..4], ANSWER_MAGIC);
            assert_eq!(payload_bytes, announced(header));
            assert!(payload_bytes <= PAYLOAD_BYTES_MAX);
            let encoded = answer.encode(payload_bytes);
            assert_eq!(without(&encoded, &[17..20, 52..96]), without(header, &[17..20, 52..96]));
            assert_eq!(PeerAnswer::decode(&encoded), Ok((answer, payload_bytes)));
        }
        Err(error) => check_refusal(header, ANSWER_MAGIC, error),
    }
}

/// A header with the fields blanked that mean nothing.
fn without(header: &[u8; HEADER_BYTES], unused: &[core::ops::Range<usize>]) -> [u8; HEADER_BYTES] {
    let mut kept = *header;
    for range in unused {
        kept[range.clone()].fill(0);
    }
    kept
}

fn check_refusal(header: &[u8; HEADER_BYTES], magic: &[u8], error: PeerFrameError) {
    match error {
        PeerFrameError::Magic => assert_ne!(&header[..4], magic),
        PeerFrameError::Kind(code) => {
            assert_eq!(code, header[16]);
            // kinds run from 1 to 13, verdicts from 0 to 10
            let known = if magic == REQUEST_MAGIC { 1..=13 } else { 0..=10 };
            assert!(!known.contains(&code), "{code} means something");
        }
        PeerFrameError::PayloadTooLong(length) => {
            assert!(length as usize == announced(header) && length as usize > PAYLOAD_BYTES_MAX);
        }
    }
}
