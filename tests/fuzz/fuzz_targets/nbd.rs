//! NBD: whatever a client sends, a request is decoded to what its bytes say or not at all, and the strings of options stay
//! inside them.
#![no_main]

use libfuzzer_sys::fuzz_target;
use sheep::front::nbd::handshake::{info_query, meta_query};
use sheep::front::nbd::wire::{Command, EXTENDED_REQUEST_BYTES, REQUEST_BYTES, u64_at};

fuzz_target!(|bytes: &[u8]| {
    for length in [REQUEST_BYTES, EXTENDED_REQUEST_BYTES, bytes.len()] {
        let Some(header) = bytes.get(..length) else { continue };
        let Some(command) = Command::decode(header) else { continue };
        assert!(length == REQUEST_BYTES || length == EXTENDED_REQUEST_BYTES);
        assert_eq!(Some(command.cookie), u64_at(header, 8));
        assert_eq!(Some(command.offset), u64_at(header, 16));
        assert!(length == EXTENDED_REQUEST_BYTES || command.length <= u64::from(u32::MAX));
    }
    if let Some((name, queries)) = meta_query(bytes) {
        let texts: usize = queries.iter().map(|query| query.len().min(4096) + 4).sum();
        // A byte that is no UTF-8 becomes three.
        assert!(name.len() + texts <= 3 * bytes.len());
    }
    if let Some((name, kinds)) = info_query(bytes) {
        assert_eq!(4 + name.len() + 2 + 2 * kinds.len(), bytes.len());
    }
});
