//! Inodes: headers come back as they were, and map arithmetic agrees with the layout byte by byte.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_proto::inode::{
    HEADER_BYTES, InodeHeader, InodeTooShort, MAP_ENTRIES, MAP_ENTRY_BYTES, MAP_OFFSET, QEMU_INODE_BYTES, map_entries,
    map_entries_touched, map_offset, split_wire_time, wire_time,
};

fuzz_target!(|input: (u64, u64, bool, &[u8])| {
    let (offset, length, near, bytes) = input;
    check_header(bytes);
    let entries: Vec<u8> = map_entries(bytes).flat_map(u32::to_le_bytes).collect();
    assert_eq!(entries, bytes[..bytes.len() - bytes.len() % MAP_ENTRY_BYTES]);
    // most 64-bit numbers are far beyond the map: bring half of them close
    let beyond = QEMU_INODE_BYTES as u64 + 64;
    if near {
        check_range(offset % beyond, length % beyond)
    } else {
        check_range(offset, length)
    }
    let (seconds, nanoseconds) = split_wire_time(offset);
    assert_eq!(wire_time(seconds, nanoseconds), offset);
});

fn check_header(bytes: &[u8]) {
    if bytes.len() < HEADER_BYTES {
        assert_eq!(InodeHeader::decode(bytes), Err(InodeTooShort(bytes.len())));
    }
    // as many bytes as a header takes, so that short inputs reach every field
    let whole: Vec<u8> = bytes.iter().copied().cycle().take(if bytes.is_empty() { 0 } else { HEADER_BYTES }).collect();
    let whole = if whole.is_empty() { vec![0; HEADER_BYTES] } else { whole };
    let header = InodeHeader::decode(&whole).expect("it is long enough");
    assert_eq!(header.encode(), whole);
    let mut longer = whole;
    longer.push(1);
    assert_eq!(InodeHeader::decode(&longer).as_ref(), Ok(&header), "what follows a header is not the header's");
    assert!(!header.name().contains(&0) && header.name.starts_with(header.name()));
    assert!(!header.tag().contains(&0) && header.tag.starts_with(header.tag()));
    let mut named = header.clone();
    named.set_name(bytes);
    named.set_tag(header.name());
    let until_nul = bytes.split(|byte| *byte == 0).next().unwrap_or_default();
    assert_eq!(named.name(), &until_nul[..until_nul.len().min(255)]);
    assert_eq!(named.tag(), &header.name()[..header.name().len().min(255)]);
    assert_eq!(named.name[255], 0);
    assert_eq!(InodeHeader::decode(&named.encode()), Ok(named));
}

/// Whether a range of bytes touches a map entry.
fn touches(offset: u64, length: u64, index: u32) -> bool {
    let start = u128::from(map_offset(index));
    let (from, to) = (u128::from(offset), u128::from(offset) + u128::from(length));
    from < to && from < start + MAP_ENTRY_BYTES as u128 && start < to
}

fn check_range(offset: u64, length: u64) {
    let touched = map_entries_touched(offset, length);
    assert!(touched.start <= touched.end && touched.end as usize <= MAP_ENTRIES);
    if touched.is_empty() {
        let end = u128::from(offset) + u128::from(length);
        let outside = offset >= QEMU_INODE_BYTES as u64 || end <= MAP_OFFSET as u128;
        assert!(length == 0 || outside, "{offset}+{length} touches the map");
        return;
    }
    let (first, last) = (touched.start, touched.end - 1);
    assert!(touches(offset, length, first) && touches(offset, length, last), "{offset}+{length}: {touched:?}");
    assert!(first == 0 || !touches(offset, length, first - 1), "{offset}+{length}: {touched:?}");
    let beyond = touched.end as usize == MAP_ENTRIES || !touches(offset, length, touched.end);
    assert!(beyond, "{offset}+{length}: {touched:?}");
}
