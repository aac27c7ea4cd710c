//! Attributes: records come back as they were, and where one is looked for depends on its key alone.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_proto::attr::{ATTR_BYTES, AttrLength, AttrRecord, VALUE_BYTES_MAX};
use qemu_proto::oid::ObjectKind;

/// Where name, tag, times and numbers, key and value begin.
const FIELDS: [usize; 5] = [0, 256, 512, 528, 784];

fuzz_target!(|input: (u8, &[u8])| {
    let (field, bytes) = input;
    if bytes.len() != ATTR_BYTES {
        assert_eq!(AttrRecord::decode(bytes), Err(AttrLength(bytes.len())));
    }
    // the input twice: from the start, and again from one of the fields, so that short inputs reach all of them
    let mut whole = vec![0; ATTR_BYTES];
    for start in [0, FIELDS[usize::from(field) % FIELDS.len()]] {
        let length = bytes.len().min(ATTR_BYTES - start);
        whole[start..start + length].copy_from_slice(&bytes[..length]);
    }
    let record = AttrRecord::decode(&whole).expect("it has the right length");
    assert_eq!(record.encode(), whole);
    assert_eq!(record.value.len(), VALUE_BYTES_MAX);
    assert_eq!(record.value().len(), VALUE_BYTES_MAX.min(record.value_len as usize));
    assert!(!record.name().contains(&0) && record.name.starts_with(record.name()));
    let (vdi, attr_id) = record.id();
    let oid = record.oid();
    assert_eq!((oid.kind(), oid.vid(), oid.index()), (Some(ObjectKind::Attribute), vdi, attr_id));
    let mut other = record.clone();
    other.ctime = !other.ctime;
    other.value_len = !other.value_len;
    other.value.fill(field);
    assert!(record.same_key(&other) && other.same_key(&record));
    assert_eq!(other.id(), record.id());
    other.snap_id = !other.snap_id;
    assert!(!record.same_key(&other));
    // a value of any length is cut or padded, never written beyond its place
    other.value = bytes.to_vec();
    assert_eq!(other.encode().len(), ATTR_BYTES);
    other.value = vec![field; VALUE_BYTES_MAX + 1];
    assert_eq!(other.encode().len(), ATTR_BYTES);
});
