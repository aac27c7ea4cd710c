//! Names and tags: what is taken has an end and comes back as it was; what is refused is refused for the reason given.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_proto::names::{FIELD_BYTES, NameError, name_tag_payload, padded, parse_name, parse_name_tag};
use qemu_proto::oid::VdiId;

fuzz_target!(|input: (u8, &[u8])| {
    let (selector, bytes) = input;
    check(bytes);
    // payloads of the two right lengths, which inputs rarely have
    for length in [FIELD_BYTES, 2 * FIELD_BYTES] {
        let mut payload = vec![if selector & 1 == 0 { 0 } else { b'x' }; length];
        let filled = bytes.len().min(length);
        payload[..filled].copy_from_slice(&bytes[..filled]);
        check(&payload);
    }
    let (name, tag) = bytes.split_at(bytes.len() * usize::from(selector) / 256);
    check_made(name, tag);
});

/// The bytes before the first NUL, if there is one.
fn terminated(field: &[u8]) -> Option<&[u8]> {
    let end = field.iter().position(|byte| *byte == 0)?;
    Some(&field[..end])
}

fn check(payload: &[u8]) {
    let expected = match payload.len() {
        FIELD_BYTES => terminated(payload).ok_or(NameError::Unterminated),
        length => Err(NameError::Length(length)),
    };
    let expected = expected.and_then(|name| if name.is_empty() { Err(NameError::Empty) } else { Ok(name) });
    assert_eq!(parse_name(payload), expected);
    if payload.len() != 2 * FIELD_BYTES {
        assert_eq!(parse_name_tag(payload), expected.map(|name| (name, &[][..])));
    }
    let Ok((name, tag)) = parse_name_tag(payload) else { return };
    assert!(!name.is_empty() && name.len() < FIELD_BYTES && tag.len() < FIELD_BYTES);
    assert_eq!(terminated(payload), Some(name));
    if let Some(field) = payload.get(FIELD_BYTES..).filter(|field| !field.is_empty()) {
        assert_eq!(terminated(field), Some(tag));
    }
    assert_eq!(parse_name_tag(&name_tag_payload(name, tag)), Ok((name, tag)));
    assert_eq!(parse_name(&padded(name)), Ok(name));
    assert_ne!(VdiId::from_name_hash(name).get(), 0, "id 0 means no VDI");
}

fn check_made(name: &[u8], tag: &[u8]) {
    let cut = |value: &[u8]| {
        let value = &value[..value.len().min(FIELD_BYTES - 1)];
        terminated(value).unwrap_or(value).to_vec()
    };
    let payload = name_tag_payload(name, tag);
    assert_eq!((payload[FIELD_BYTES - 1], payload[2 * FIELD_BYTES - 1]), (0, 0));
    match parse_name_tag(&payload) {
        Ok((name_again, tag_again)) => assert_eq!((name_again, tag_again), (&cut(name)[..], &cut(tag)[..])),
        Err(error) => assert!(error == NameError::Empty && cut(name).is_empty(), "{error}"),
    }
}
