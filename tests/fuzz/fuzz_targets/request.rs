//! Requests: headers come back as they were, and no length makes anything larger than its cap be expected.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_proto::flags::RequestFlags;
use qemu_proto::frame::{FrameError, OTHER_BYTES_MAX, Parsed, answer_bytes_max, parse_request};
use qemu_proto::inode::INODE_BYTES;
use qemu_proto::oid::{ObjectKind, Oid, VDI_ID_BITS};
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{HEADER_BYTES, Request, RequestBody};

/// Sizes of the largest object that a server might keep.
const OBJECT_BYTES_MAX: [usize; 5] = [0, 512, 4 << 20, 32 << 20, u32::MAX as usize];

fuzz_target!(|input: (u8, &[u8])| {
    let (selector, mut rest) = input;
    let object_bytes_max = OBJECT_BYTES_MAX[usize::from(selector) % OBJECT_BYTES_MAX.len()];
    while let Some(consumed) = check_first(rest, object_bytes_max) {
        rest = &rest[consumed..];
    }
});

/// Checks the first request of a stream and gives its length if it is all there.
fn check_first(stream: &[u8], object_bytes_max: usize) -> Option<usize> {
    let cap = object_bytes_max.max(INODE_BYTES).max(OTHER_BYTES_MAX);
    let parsed = parse_request(stream, object_bytes_max);
    let Some(header) = stream.first_chunk::<HEADER_BYTES>() else {
        assert_eq!(parsed, Ok(Parsed::Incomplete { needed: HEADER_BYTES }));
        return None;
    };
    let expected = Request::decode(header);
    check_header(&expected, header);
    let writes = expected.flags.contains(RequestFlags::WRITE);
    let announced = if writes { expected.data_length as usize } else { 0 };
    let answer = answer_bytes_max(&expected, object_bytes_max);
    assert!(answer <= expected.data_length as usize && answer <= cap);
    assert!(answer == 0 || !writes || expected.flags.contains(RequestFlags::PIGGYBACK));
    match parsed {
        Ok(Parsed::Incomplete { needed }) => {
            assert_eq!(needed, HEADER_BYTES + announced);
            assert!(needed > stream.len() && needed <= HEADER_BYTES + cap);
            None
        }
        Ok(Parsed::Complete { request, payload }) => {
            assert_eq!(request, expected);
            assert_eq!(payload, HEADER_BYTES..HEADER_BYTES + announced);
            assert!(payload.end <= stream.len() && payload.len() <= cap);
            // what follows a request changes nothing, and one byte less is not enough
            let end = payload.end;
            let again = parse_request(&stream[..end], object_bytes_max);
            assert_eq!(again, Ok(Parsed::Complete { request, payload }));
            assert_eq!(parse_request(&stream[..end - 1], object_bytes_max), Ok(Parsed::Incomplete { needed: end }));
            Some(end)
        }
        Err(FrameError::TooLong { announced, allowed }) => {
            assert!(writes && announced == expected.data_length && announced as usize > allowed);
            // a refusal needs no more than the header
            assert_eq!(parse_request(header, object_bytes_max), Err(FrameError::TooLong { announced, allowed }));
            None
        }
    }
}

fn check_header(request: &Request, header: &[u8; HEADER_BYTES]) {
    assert_eq!(&request.encode(), header);
    assert_eq!(request.op().map_or(request.opcode, Opcode::code), header[1]);
    match request.body {
        RequestBody::Object(body) => {
            check_oid(body.oid);
            check_oid(body.cow_oid);
        }
        RequestBody::Forward(body) => check_oid(body.oid),
        _ => {}
    }
    if request.op().is_none() {
        assert!(matches!(request.body, RequestBody::Raw(_)), "nothing is known of opcode {:#x}", request.opcode);
    }
}

fn check_oid(oid: Oid) {
    let (vdi, index) = (oid.vid(), oid.index());
    assert!(vdi.get() >> VDI_ID_BITS == 0);
    assert_eq!(u64::from(vdi.get()) << 32 | u64::from(index), oid.raw() & 0x00ff_ffff_ffff_ffff);
    let again = match oid.kind() {
        None => return,
        Some(ObjectKind::Data) => Oid::data(vdi, index),
        // an inode has no index: other low bits are no inode's id that we would make
        Some(ObjectKind::Inode) if index != 0 => return,
        Some(ObjectKind::Inode) => Oid::inode(vdi),
        Some(ObjectKind::Vmstate) => Oid::vmstate(vdi, index),
        Some(ObjectKind::Attribute) => Oid::attribute(vdi, index),
        Some(ObjectKind::BtreeNode) => Oid::btree(vdi, index),
        Some(ObjectKind::Ledger) => Oid::ledger(Oid::data(vdi, index)),
    };
    assert_eq!(again, oid);
}
