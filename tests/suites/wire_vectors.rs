//! `qemu-proto` against real conversations: what QEMU and an original server said must decode, and encode to the same bytes.
//!
//! 1. Nothing in a capture is skipped: messages, connections and opcodes are counted against tables, so a capture that is empty, cut
//!    or replaced fails.
//! 2. Every header and every payload with a meaning of its own (names, inodes, maps, bitmaps) survives decoding and encoding.
//! 3. The caps of `frame` let through all that the clients really sent and were really answered.

use std::collections::{BTreeMap, BTreeSet};
use std::io::{Cursor, Read, Write};
use std::path::PathBuf;

use qemu_proto::bitmap::{BITMAP_BYTES, bitmap_of, ids_in};
use qemu_proto::exchange::exchange;
use qemu_proto::flags::RequestFlags;
use qemu_proto::frame::{Parsed, answer_bytes_max, parse_request, payload_bytes};
use qemu_proto::inode::{
    self, InodeHeader, MAP_ENTRY_BYTES, MAP_OFFSET, QEMU_INODE_BYTES, map_entries, map_entries_touched, map_offset,
};
use qemu_proto::names::{FIELD_BYTES, name_tag_payload, padded, parse_name, parse_name_tag};
use qemu_proto::oid::{ObjectKind, VdiId};
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{HEADER_BYTES, ObjectRequest, Request, RequestBody};
use qemu_proto::response::{Response, ResponseBody};
use qemu_proto::status::Status;

/// The captures: requests (each has an answer), and connections that said something.
const CAPTURES: &[(&str, usize, usize)] = &[
    ("create", 2, 2),
    ("create_big", 1, 1),
    ("info", 5, 5),
    ("write_fresh", 10, 4),
    ("write_nocache", 6, 4),
    ("snapshot", 14, 12),
    ("write_cow", 7, 4),
    ("read_snap", 8, 8),
    ("discard", 5, 4),
    ("map", 3, 3),
    ("resize", 8, 8),
    ("revert", 7, 7),
    ("snapdel", 15, 13),
    ("missing", 4, 4),
    ("clone", 16, 13),
    ("convert", 22, 10),
];

/// Requests of all captures together, by opcode.
const OPCODES: &[(Opcode, usize)] = &[
    (Opcode::CreateAndWriteObj, 8),
    (Opcode::ReadObj, 43),
    (Opcode::WriteObj, 16),
    (Opcode::NewVdi, 7),
    (Opcode::LockVdi, 23),
    (Opcode::ReleaseVdi, 20),
    (Opcode::GetVdiInfo, 1),
    (Opcode::ReadVdis, 4),
    (Opcode::FlushVdi, 5),
    (Opcode::DelVdi, 2),
    (Opcode::GetClusterDefault, 4),
];

/// The largest object in the captures: `beta`'s.
const OBJECT_BYTES_MAX: usize = 8 << 20;

#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Direction {
    ToServer,
    ToClient,
}

struct Record {
    direction: Direction,
    connection: u16,
    message: Vec<u8>,
}

impl Record {
    fn header(&self) -> &[u8; HEADER_BYTES] {
        self.message.first_chunk().expect("a message begins with a header")
    }

    fn payload(&self) -> &[u8] {
        &self.message[HEADER_BYTES..]
    }
}

fn capture_path(name: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join(format!("fixtures/wire-captures/{name}.rec.zst"))
}

fn records(name: &str) -> Vec<Record> {
    let packed = std::fs::read(capture_path(name)).expect("the capture is in the repository");
    let bytes = zstd::decode_all(packed.as_slice()).expect("the capture is whole");
    let mut rest = bytes.as_slice();
    let mut records = Vec::new();
    while !rest.is_empty() {
        let direction = match rest[0] {
            b'>' => Direction::ToServer,
            b'<' => Direction::ToClient,
            other => panic!("{name}: direction {other:#x} at record {}", records.len()),
        };
        let connection = u16::from_le_bytes([rest[1], rest[2]]);
        let length = u32::from_le_bytes([rest[3], rest[4], rest[5], rest[6]]) as usize;
        records.push(Record { direction, connection, message: rest[7..7 + length].to_vec() });
        rest = &rest[7 + length..];
    }
    records
}

/// A request and its answer as they were recorded.
struct Pair {
    request: Record,
    answer: Record,
}

/// Pairs every answer with the oldest open request of its connection that has its id and opcode.
fn pairs(name: &str) -> Vec<Pair> {
    let mut open: BTreeMap<u16, Vec<Record>> = BTreeMap::new();
    let mut pairs = Vec::new();
    for record in records(name) {
        let waiting = open.entry(record.connection).or_default();
        if record.direction == Direction::ToServer {
            waiting.push(record);
            continue;
        }
        let response = Response::decode(record.header());
        let position = waiting.iter().position(|request| {
            let request = Request::decode(request.header());
            (request.id, request.opcode) == (response.id, response.opcode)
        });
        let position = position.unwrap_or_else(|| panic!("{name}: an answer to nothing: {response:?}"));
        pairs.push(Pair { request: waiting.remove(position), answer: record });
    }
    assert!(open.values().all(Vec::is_empty), "{name}: requests without an answer");
    pairs
}

fn all_pairs() -> impl Iterator<Item = (&'static str, Pair)> {
    CAPTURES.iter().flat_map(|(name, ..)| pairs(name).into_iter().map(move |pair| (*name, pair)))
}

#[test]
fn the_captures_are_all_there() {
    let directory = capture_path("create").parent().expect("a file is in a directory").to_owned();
    let entries = std::fs::read_dir(directory).expect("the directory is in the repository");
    let found: BTreeSet<String> = entries
        .filter_map(|entry| {
            entry.expect("it can be listed").file_name().to_str()?.strip_suffix(".rec.zst").map(str::to_owned)
        })
        .collect();
    assert_eq!(found, CAPTURES.iter().map(|(name, ..)| (*name).to_owned()).collect(), "files against the table");
    let mut by_opcode: BTreeMap<Opcode, usize> = BTreeMap::new();
    for (name, requests, connections) in CAPTURES {
        let records = records(name);
        let sent: Vec<&Record> = records.iter().filter(|record| record.direction == Direction::ToServer).collect();
        let talking: BTreeSet<u16> = records.iter().map(|record| record.connection).collect();
        assert_eq!((sent.len(), talking.len()), (*requests, *connections), "{name}");
        assert_eq!(records.len() - sent.len(), *requests, "{name}: answers");
        for record in sent {
            let opcode = Request::decode(record.header()).op().expect("QEMU sends no unknown opcode");
            *by_opcode.entry(opcode).or_default() += 1;
        }
    }
    assert_eq!(by_opcode, OPCODES.iter().copied().collect());
}

#[test]
fn every_header_encodes_to_the_bytes_it_came_from() {
    let mut messages = 0;
    for (name, ..) in CAPTURES {
        for record in records(name) {
            let again = match record.direction {
                Direction::ToServer => Request::decode(record.header()).encode(),
                Direction::ToClient => Response::decode(record.header()).encode(),
            };
            assert_eq!(&again, record.header(), "{name}, message {messages}");
            messages += 1;
        }
    }
    assert_eq!(messages, 266);
}

#[test]
fn bodies_are_of_the_kind_their_opcode_says() {
    for (name, pair) in all_pairs() {
        let request = Request::decode(pair.request.header());
        let response = Response::decode(pair.answer.header());
        use Opcode as O;
        let fits = match request.op().expect("QEMU sends no unknown opcode") {
            O::CreateAndWriteObj | O::ReadObj | O::WriteObj | O::FlushVdi => {
                matches!((request.body, response.body), (RequestBody::Object(_), ResponseBody::Object { .. }))
            }
            O::NewVdi | O::LockVdi | O::ReleaseVdi | O::GetVdiInfo | O::DelVdi => {
                matches!((request.body, response.body), (RequestBody::Vdi(_), ResponseBody::Vdi { .. }))
            }
            O::GetClusterDefault => matches!(response.body, ResponseBody::ClusterDefault { .. }),
            O::ReadVdis => response.body == ResponseBody::NONE,
            other => panic!("{name}: {} was never recorded", other.name()),
        };
        assert!(fits, "{name}: {request:?} and {response:?}");
    }
}

#[test]
fn requests_are_cut_from_the_stream_of_every_connection() {
    let (mut streams, mut requests) = (0, 0);
    for (name, ..) in CAPTURES {
        let mut sent: BTreeMap<u16, Vec<Record>> = BTreeMap::new();
        for record in records(name).into_iter().filter(|record| record.direction == Direction::ToServer) {
            sent.entry(record.connection).or_default().push(record);
        }
        for (connection, messages) in sent {
            let stream: Vec<u8> = messages.iter().flat_map(|record| record.message.iter().copied()).collect();
            let mut rest = stream.as_slice();
            for record in &messages {
                let total = record.message.len();
                let place = format!("{name}, connection {connection}");
                let expected = Request::decode(record.header());
                for (cut, needed) in [(0, HEADER_BYTES), (HEADER_BYTES - 1, HEADER_BYTES), (total - 1, total)] {
                    let parsed = parse_request(&rest[..cut], OBJECT_BYTES_MAX);
                    assert_eq!(parsed, Ok(Parsed::Incomplete { needed }), "{place}, cut at {cut}");
                }
                let whole = Parsed::Complete { request: expected, payload: HEADER_BYTES..total };
                assert_eq!(parse_request(rest, OBJECT_BYTES_MAX), Ok(whole), "{place}");
                rest = &rest[total..];
                requests += 1;
            }
            assert!(rest.is_empty(), "{name}, connection {connection}: bytes after the last request");
            streams += 1;
        }
    }
    assert_eq!((streams, requests), (102, 133));
}

#[test]
fn answers_are_as_long_as_their_headers_say_and_no_longer_than_allowed() {
    let mut data = 0;
    for (name, pair) in all_pairs() {
        let request = Request::decode(pair.request.header());
        let response = Response::decode(pair.answer.header());
        let sent = if request.flags.contains(RequestFlags::WRITE) { request.data_length as usize } else { 0 };
        assert_eq!(pair.request.payload().len(), sent, "{name}: {request:?}");
        assert_eq!(payload_bytes(&request, OBJECT_BYTES_MAX), Ok(sent), "{name}");
        assert_eq!(pair.answer.payload().len(), response.data_length as usize, "{name}: {response:?}");
        assert!(response.data_length as usize <= answer_bytes_max(&request, OBJECT_BYTES_MAX), "{name}: {response:?}");
        if matches!(request.op(), Some(Opcode::ReadObj | Opcode::ReadVdis)) {
            assert_eq!(response.data_length, request.data_length, "{name}: reads are answered in full");
            data += 1;
        } else {
            assert_eq!(response.data_length, 0, "{name}: {response:?}");
        }
        assert_eq!((response.proto_ver, response.flags), (0, 0), "{name}");
    }
    assert_eq!(data, 47);
}

#[test]
fn answers_that_are_refusals_are_the_known_ones() {
    let refusals: Vec<(&str, Opcode, Status)> = all_pairs()
        .filter_map(|(name, pair)| {
            let response = Response::decode(pair.answer.header());
            let opcode = Opcode::from_code(response.opcode).expect("paired with a request of QEMU's");
            let status =
                response.status().unwrap_or_else(|| panic!("{name}: result {:#x} means nothing", response.result));
            (status != Status::Success).then_some((name, opcode, status))
        })
        .collect();
    let of_flush = |refusal: &&(&str, Opcode, Status)| refusal.1 == Opcode::FlushVdi;
    let others: Vec<_> = refusals.iter().filter(|refusal| !of_flush(refusal)).copied().collect();
    assert_eq!(
        others,
        [
            ("revert", Opcode::NewVdi, Status::VdiExist),
            ("missing", Opcode::LockVdi, Status::NoVdi),
            ("missing", Opcode::NewVdi, Status::VdiExist),
            ("missing", Opcode::LockVdi, Status::NoTag),
        ]
    );
    // the original answers every flush so when it has no cache of its own
    let flushes: Vec<_> = refusals.iter().filter(of_flush).collect();
    assert_eq!(flushes.len(), 5);
    assert!(flushes.iter().all(|(.., status)| *status == Status::InvalidParms));
}

#[test]
fn names_survive() {
    let (mut names, mut with_tag, mut seen) = (0, 0, BTreeSet::new());
    for (capture, pair) in all_pairs() {
        let request = Request::decode(pair.request.header());
        let payload = pair.request.payload();
        match request.op() {
            Some(Opcode::NewVdi | Opcode::LockVdi | Opcode::GetVdiInfo | Opcode::DelVdi) => {}
            // five letters and their end; the server needs only the id
            Some(Opcode::ReleaseVdi) => {
                let name = payload.strip_suffix(&[0]).expect("the name ends with NUL");
                let field = padded(name);
                assert_eq!(parse_name(&field), Ok(name), "{capture}");
                assert!(seen.contains(name), "{capture}: released without having been opened");
                continue;
            }
            _ => continue,
        }
        let (name, tag) = parse_name_tag(payload).unwrap_or_else(|error| panic!("{capture}: {error}"));
        let again = name_tag_payload(name, tag);
        assert_eq!(&again[..payload.len()], payload, "{capture}: {}", String::from_utf8_lossy(name));
        if payload.len() == FIELD_BYTES {
            assert_eq!(parse_name(payload), Ok(name), "{capture}");
        }
        names += 1;
        with_tag += usize::from(!tag.is_empty());
        seen.insert(name.to_vec());
    }
    let seen: Vec<String> = seen.into_iter().map(|name| String::from_utf8(name).expect("plain names")).collect();
    assert_eq!((names, with_tag), (33, 5), "{seen:?}");
    assert_eq!(seen, ["alpha", "beta", "delta", "gamma", "nosuch"]);
}

/// Where on an object a message reads or writes, and the bytes that travelled; `None` for all other messages.
fn object_bytes(pair: &Pair) -> Option<(ObjectRequest, &[u8])> {
    let request = Request::decode(pair.request.header());
    let RequestBody::Object(body) = request.body else { return None };
    match request.op()? {
        Opcode::ReadObj => Some((body, pair.answer.payload())),
        Opcode::WriteObj | Opcode::CreateAndWriteObj => Some((body, pair.request.payload())),
        _ => None,
    }
}

#[test]
fn object_ids_are_of_known_kinds() {
    let (mut inodes, mut pieces, mut copies) = (0, 0, 0);
    for (name, pair) in all_pairs() {
        let Some((body, bytes)) = object_bytes(&pair) else { continue };
        match body.oid.kind() {
            Some(ObjectKind::Inode) => inodes += 1,
            Some(ObjectKind::Data) => {
                assert!(body.offset as usize + bytes.len() <= OBJECT_BYTES_MAX, "{name}: {body:?}");
                pieces += 1;
            }
            other => panic!("{name}: {other:?} {}", body.oid),
        }
        let flags = Request::decode(pair.request.header()).flags;
        assert_eq!(flags.contains(RequestFlags::COW), body.cow_oid.raw() != 0, "{name}: {body:?}");
        if body.cow_oid.raw() != 0 {
            assert_eq!(body.cow_oid.kind(), Some(ObjectKind::Data), "{name}");
            assert_eq!(body.cow_oid.index(), body.oid.index(), "{name}: a copy keeps its index");
            copies += 1;
        }
    }
    assert_eq!((inodes, pieces, copies), (41, 26, 2));
}

/// Checks the header at the start of an inode's bytes.
fn check_inode_header(place: &str, body: &ObjectRequest, bytes: &[u8]) {
    let header = InodeHeader::decode(bytes).unwrap_or_else(|error| panic!("{place}: {error}"));
    assert_eq!(header.encode(), bytes[..inode::HEADER_BYTES], "{place}");
    let mut renamed = header.clone();
    renamed.set_name(header.name());
    renamed.set_tag(header.tag());
    assert_eq!(renamed, header, "{place}: name and tag are padded with NUL");
    assert_eq!(header.vdi_id, body.oid.vid().get(), "{place}: an inode knows its own id");
    assert!((20..=31).contains(&header.block_size_shift), "{place}: {}", header.block_size_shift);
}

/// Checks a piece of an inode's map that begins at an entry.
fn check_map(place: &str, offset: usize, bytes: &[u8]) -> usize {
    let entries: Vec<u32> = map_entries(bytes).collect();
    let again: Vec<u8> = entries.iter().flat_map(|entry| entry.to_le_bytes()).collect();
    assert_eq!(again, bytes, "{place}");
    let touched = map_entries_touched(offset as u64, bytes.len() as u64);
    assert_eq!(touched.len(), entries.len(), "{place}");
    assert_eq!(map_offset(touched.start), offset as u64, "{place}");
    assert!(entries.iter().all(|entry| VdiId::new(*entry).is_some()), "{place}: entries are VDI ids");
    entries.iter().filter(|entry| **entry != 0).count()
}

#[test]
fn inodes_and_their_maps_survive() {
    let (mut headers, mut maps, mut entries_used) = (0, 0, 0);
    for (name, pair) in all_pairs() {
        let Some((body, bytes)) = object_bytes(&pair) else { continue };
        if body.oid.kind() != Some(ObjectKind::Inode) {
            continue;
        }
        let place = format!("{name}: {} at {}", body.oid, body.offset);
        let offset = body.offset as usize;
        assert!(offset == 0 || offset >= MAP_OFFSET, "{place}: QEMU moves whole headers and map entries");
        assert!(offset + bytes.len() <= QEMU_INODE_BYTES, "{place}");
        if offset == 0 {
            check_inode_header(&place, &body, bytes);
            headers += 1;
        }
        let map = &bytes[MAP_OFFSET.saturating_sub(offset).min(bytes.len())..];
        if !map.is_empty() {
            assert_eq!(map.len() % MAP_ENTRY_BYTES, 0, "{place}");
            entries_used += check_map(&place, offset.max(MAP_OFFSET), map);
            maps += 1;
        }
    }
    assert_eq!((headers, maps, entries_used), (31, 30, 50));
}

#[test]
fn bitmaps_survive() {
    let mut bitmaps = 0;
    for (name, pair) in all_pairs() {
        if Request::decode(pair.request.header()).op() != Some(Opcode::ReadVdis) {
            continue;
        }
        let payload = pair.answer.payload();
        assert_eq!(payload.len(), BITMAP_BYTES, "{name}");
        let ids: Vec<VdiId> = ids_in(payload).collect();
        assert!(ids.contains(&VdiId::from_name_hash(b"alpha")), "{name}: {ids:?}");
        assert!(bitmap_of(ids.iter().copied()) == payload, "{name}: {ids:?}");
        bitmaps += 1;
    }
    assert_eq!(bitmaps, 4);
}

/// A server that has its answer ready and keeps what it is sent.
struct Replay {
    sent: Vec<u8>,
    answer: Cursor<Vec<u8>>,
}

impl Read for Replay {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        self.answer.read(buffer)
    }
}

impl Write for Replay {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.sent.write(bytes)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

#[test]
fn our_client_would_have_sent_and_received_the_same() {
    let mut exchanges = 0;
    for (name, pair) in all_pairs() {
        let request = Request::decode(pair.request.header());
        let mut replay = Replay { sent: Vec::new(), answer: Cursor::new(pair.answer.message.clone()) };
        let (response, data) = exchange(&mut replay, &request, pair.request.payload())
            .unwrap_or_else(|error| panic!("{name}: {request:?}: {error}"));
        assert!(replay.sent == pair.request.message, "{name}: {request:?}");
        assert_eq!(&response.encode(), pair.answer.header(), "{name}");
        assert!(data == pair.answer.payload(), "{name}: {request:?}");
        assert_eq!(replay.answer.position(), pair.answer.message.len() as u64, "{name}: read to the end, not beyond");
        exchanges += 1;
    }
    assert_eq!(exchanges, 133);
}
