//! The stream of `dog vdi backup`: what changed in a volume between two of its snapshots. All numbers are little-endian.
//!
//! | header: offset | bytes | what |
//! |---|---|---|
//! | 0 | 8 | `SHEEPINC` |
//! | 8 | 4 | version, 1 |
//! | 12 | 4 | log2 of the object size |
//! | 16 | 8 | size of the volume in the later snapshot |
//! | 24 | 32 | fingerprint of what the earlier snapshot holds |
//! | 56 | 32 | the earlier snapshot: VDI id 4, number 4, creation time 8, 16 zeros |
//! | 88 | 32 | the later snapshot, likewise |
//! | 120 | 256 | name, NUL-padded |
//! | 376 | 256 | tag of the earlier snapshot |
//! | 632 | 256 | tag of the later snapshot |
//! | 888 | 104 | zeros |
//! | 992 | 32 | BLAKE3 of the 992 bytes before |
//!
//! | record: offset | bytes | what |
//! |---|---|---|
//! | 0 | 4 | 1 data, 2 zeros, 3 removed (the object is a hole now), 4 end |
//! | 4 | 4 | index of the object |
//! | 8 | 4 | offset in it |
//! | 12 | 4 | length; for data, so many bytes follow the record |
//! | 16 | 8 | number of records before this one |
//! | 24 | 8 | zeros |
//! | 32 | 32 | BLAKE3 of what the earlier snapshot has in this place; zeros for removed and end |
//! | 64 | 32 | BLAKE3 of the checksum before this one, the 64 bytes before, and the data |
//!
//! Always holds:
//! 1. A checksum covers every byte before it, so that of the end covers the stream: a record that is handed out is what was
//!    written, in its place, and `None` from [`Reader::next_record`] means that nothing is missing and nothing follows.
//! 2. Records come in the order of the volume and do not overlap; an object that was removed has no other record.
//! 3. Nothing that a stream says makes a reader allocate more than [`PIECE_BYTES_MAX`].

use std::io::{self, Read, Write};

use qemu_proto::names::padded;
use sheep_core::vdi_name;

use super::pieces::PIECE_BYTES_MAX;
use super::volume::OBJECTS_MAX;

const MAGIC: [u8; 8] = *b"SHEEPINC";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 1024;
const RECORD_BYTES: usize = 96;
const NAME_AT: usize = 120;
const FIELD_BYTES: usize = 256;
const DATA: u32 = 1;
const ZEROS: u32 = 2;
const REMOVED: u32 = 3;
const END: u32 = 4;
const _: () = assert!(NAME_AT + 3 * FIELD_BYTES <= HEADER_BYTES - HASH_BYTES);

/// Bytes of a checksum.
const HASH_BYTES: usize = 32;
/// A BLAKE3 checksum.
pub type Hash = [u8; HASH_BYTES];

/// A snapshot, as people find it again.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Moment {
    /// Its VDI id.
    pub vdi: u32,
    /// Its number within the name.
    pub snapshot_id: u32,
    /// Time on the wire.
    pub create_time: u64,
    /// May be empty.
    pub tag: Vec<u8>,
}

/// What a stream is about.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Increment {
    /// Of the volume.
    pub name: Vec<u8>,
    /// log2 of the object size.
    pub shift: u8,
    /// Of the volume in the later snapshot.
    pub size_bytes: u64,
    /// Of what the earlier snapshot holds.
    pub base: Hash,
    /// The earlier snapshot.
    pub from: Moment,
    /// The later one.
    pub to: Moment,
}

/// What is in one place now.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Change {
    /// These bytes.
    Data(Vec<u8>),
    /// So many zeros.
    Zeros(u32),
    /// Nothing: the object is a hole.
    Removed,
}

/// A place that changed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Record {
    /// Which object.
    pub index: u32,
    /// Where in the object.
    pub offset: u32,
    /// Of what was there before; zeros where that does not matter.
    pub before: Hash,
    /// What is there now.
    pub change: Change,
}

/// Why a stream cannot be used.
#[derive(Debug)]
pub enum StreamError {
    /// It cannot be read.
    Io(io::Error),
    /// Something else.
    NotAStream,
    /// Of a version that this program does not know.
    Version(u32),
    /// It ends before its end.
    Truncated,
    /// A checksum is wrong, or what it says makes no sense; so many records were good.
    Damaged(u64),
    /// Bytes after its end.
    Continues,
}

impl std::fmt::Display for StreamError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            StreamError::Io(error) => write!(f, "Cannot read standard input: {error}"),
            StreamError::NotAStream => f.write_str(
                "Standard input is no stream of 'dog vdi backup' (those of the old tool are not understood)",
            ),
            StreamError::Version(version) => {
                write!(f, "The stream has version {version}, which a later dog wrote; this one knows version {VERSION}")
            }
            StreamError::Truncated => f.write_str("The stream is not complete: its end is missing"),
            StreamError::Damaged(count) => write!(f, "The stream is damaged after {count} good records"),
            StreamError::Continues => f.write_str("The stream goes on after its end"),
        }
    }
}

/// The checksum of some bytes.
pub fn hash_of(bytes: &[u8]) -> Hash {
    blake3::hash(bytes).into()
}

fn chained(last: &Hash, head: &[u8], data: &[u8]) -> Hash {
    let mut hasher = blake3::Hasher::new();
    hasher.update(last).update(head).update(data);
    hasher.finalize().into()
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"))
}

fn hash_at(bytes: &[u8], at: usize) -> Hash {
    bytes[at..at + HASH_BYTES].try_into().expect("as many bytes as a checksum has")
}

impl Moment {
    fn encode(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        bytes[..4].copy_from_slice(&self.vdi.to_le_bytes());
        bytes[4..8].copy_from_slice(&self.snapshot_id.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.create_time.to_le_bytes());
        bytes
    }

    fn decode(bytes: &[u8], tag: Vec<u8>) -> Moment {
        let (vdi, snapshot_id) = (u32_at(bytes, 0), u32_at(bytes, 4));
        Moment { vdi, snapshot_id, create_time: u64_at(bytes, 8), tag }
    }
}

impl Increment {
    /// Objects that the size has room for.
    pub fn object_count(&self) -> u64 {
        self.size_bytes.div_ceil(1 << self.shift)
    }

    fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut put = |at: usize, part: &[u8]| bytes[at..at + part.len()].copy_from_slice(part);
        put(0, &MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(12, &u32::from(self.shift).to_le_bytes());
        put(16, &self.size_bytes.to_le_bytes());
        put(24, &self.base);
        put(56, &self.from.encode());
        put(88, &self.to.encode());
        for (field, text) in [&self.name, &self.from.tag, &self.to.tag].into_iter().enumerate() {
            put(NAME_AT + field * FIELD_BYTES, &padded(text));
        }
        let hash = hash_of(&bytes[..HEADER_BYTES - HASH_BYTES]);
        bytes[HEADER_BYTES - HASH_BYTES..].copy_from_slice(&hash);
        bytes
    }

    fn decode(bytes: &[u8; HEADER_BYTES]) -> Result<Increment, StreamError> {
        if bytes[..8] != MAGIC {
            return Err(StreamError::NotAStream);
        }
        if u32_at(bytes, 8) != VERSION {
            return Err(StreamError::Version(u32_at(bytes, 8)));
        }
        if hash_of(&bytes[..HEADER_BYTES - HASH_BYTES]) != hash_at(bytes, HEADER_BYTES - HASH_BYTES) {
            return Err(StreamError::Damaged(0));
        }
        let field = |field: usize| {
            let text = &bytes[NAME_AT + field * FIELD_BYTES..][..FIELD_BYTES];
            text[..text.iter().position(|&byte| byte == 0).unwrap_or(FIELD_BYTES)].to_vec()
        };
        let shift = u8::try_from(u32_at(bytes, 12)).ok().filter(|shift| (20..=31).contains(shift));
        let increment = Increment {
            name: field(0),
            shift: shift.ok_or(StreamError::Damaged(0))?,
            size_bytes: u64_at(bytes, 16),
            base: hash_at(bytes, 24),
            from: Moment::decode(&bytes[56..88], field(1)),
            to: Moment::decode(&bytes[88..120], field(2)),
        };
        let is_possible = vdi_name::check_name(&increment.name).is_ok() && increment.object_count() <= OBJECTS_MAX;
        if is_possible { Ok(increment) } else { Err(StreamError::Damaged(0)) }
    }
}

/// Puts a stream out.
pub struct Writer<W> {
    out: W,
    last: Hash,
    count: u64,
}

impl<W: Write> Writer<W> {
    /// Begins with the header.
    pub fn new(mut out: W, increment: &Increment) -> io::Result<Writer<W>> {
        let header = increment.encode();
        out.write_all(&header)?;
        Ok(Writer { out, last: hash_at(&header, HEADER_BYTES - HASH_BYTES), count: 0 })
    }

    /// One more record.
    pub fn put(&mut self, record: &Record) -> io::Result<()> {
        let (kind, length, data): (u32, u32, &[u8]) = match &record.change {
            Change::Data(data) => (DATA, data.len() as u32, data),
            Change::Zeros(length) => (ZEROS, *length, &[]),
            Change::Removed => (REMOVED, 0, &[]),
        };
        assert!(u64::from(length) <= PIECE_BYTES_MAX, "a record is at most one piece");
        self.write(kind, record.index, record.offset, length, &record.before, data)
    }

    /// The end, without which the stream is worth nothing.
    pub fn finish(mut self) -> io::Result<()> {
        self.write(END, 0, 0, 0, &[0; HASH_BYTES], &[])?;
        self.out.flush()
    }

    fn write(&mut self, kind: u32, index: u32, offset: u32, length: u32, before: &Hash, data: &[u8]) -> io::Result<()> {
        let mut head = [0; RECORD_BYTES];
        for (field, number) in [kind, index, offset, length].into_iter().enumerate() {
            head[field * 4..][..4].copy_from_slice(&number.to_le_bytes());
        }
        head[16..24].copy_from_slice(&self.count.to_le_bytes());
        head[32..64].copy_from_slice(before);
        self.last = chained(&self.last, &head[..64], data);
        head[64..].copy_from_slice(&self.last);
        self.count += 1;
        self.out.write_all(&head)?;
        self.out.write_all(data)
    }
}

/// Takes a stream in.
pub struct Reader<R> {
    input: R,
    increment: Increment,
    last: Hash,
    count: u64,
    /// First place in the volume that the next record may be about.
    next: u64,
}

impl<R: Read> Reader<R> {
    /// Reads the header.
    pub fn new(mut input: R) -> Result<Reader<R>, StreamError> {
        let mut header = [0; HEADER_BYTES];
        // What is no stream is called so even if it is shorter than a header.
        fill(&mut input, &mut header[..MAGIC.len()]).map_err(|error| match error {
            StreamError::Truncated => StreamError::NotAStream,
            other => other,
        })?;
        if header[..MAGIC.len()] != MAGIC {
            return Err(StreamError::NotAStream);
        }
        fill(&mut input, &mut header[MAGIC.len()..])?;
        let increment = Increment::decode(&header)?;
        Ok(Reader { input, increment, last: hash_at(&header, HEADER_BYTES - HASH_BYTES), count: 0, next: 0 })
    }

    /// What it is about.
    pub fn increment(&self) -> &Increment {
        &self.increment
    }

    /// The next record; `None` at the end of a stream that is complete.
    pub fn next_record(&mut self) -> Result<Option<Record>, StreamError> {
        let mut head = [0; RECORD_BYTES];
        fill(&mut self.input, &mut head)?;
        let damaged = StreamError::Damaged(self.count);
        let [kind, index, offset, length] = [0, 4, 8, 12].map(|at| u32_at(&head, at));
        // Before the checksum is known to be right: this decides how much is read.
        if u64::from(length) > PIECE_BYTES_MAX {
            return Err(damaged);
        }
        let mut data = vec![0; if kind == DATA { length as usize } else { 0 }];
        fill(&mut self.input, &mut data)?;
        self.last = chained(&self.last, &head[..64], &data);
        if self.last != hash_at(&head, 64) || u64_at(&head, 16) != self.count {
            return Err(damaged);
        }
        let change = match kind {
            END => return self.end().map(|()| None),
            DATA => Change::Data(data),
            ZEROS => Change::Zeros(length),
            REMOVED => Change::Removed,
            _ => return Err(damaged),
        };
        let object_bytes = 1_u64 << self.increment.shift;
        let (span, is_empty) =
            if kind == REMOVED { (object_bytes, length != 0) } else { (u64::from(length), length == 0) };
        let start = u64::from(index) * object_bytes + u64::from(offset);
        let is_inside = u64::from(offset) + span <= object_bytes && u64::from(index) < self.increment.object_count();
        if is_empty || !is_inside || start < self.next {
            return Err(damaged);
        }
        self.next = start + span;
        self.count += 1;
        Ok(Some(Record { index, offset, before: hash_at(&head, 32), change }))
    }

    fn end(&mut self) -> Result<(), StreamError> {
        match fill(&mut self.input, &mut [0]) {
            Err(StreamError::Truncated) => Ok(()),
            Ok(()) => Err(StreamError::Continues),
            Err(error) => Err(error),
        }
    }
}

fn fill(input: &mut impl Read, bytes: &mut [u8]) -> Result<(), StreamError> {
    input.read_exact(bytes).map_err(|error| match error.kind() {
        io::ErrorKind::UnexpectedEof => StreamError::Truncated,
        _ => StreamError::Io(error),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn increment() -> Increment {
        Increment {
            name: b"disk1".to_vec(),
            shift: 20,
            size_bytes: (40 << 20) - 5,
            base: [7; HASH_BYTES],
            from: Moment { vdi: 0x7c_2b25, snapshot_id: 1, create_time: 5 << 32 | 9, tag: b"monday".to_vec() },
            to: Moment { vdi: 0x7c_2b26, snapshot_id: 2, create_time: 6 << 32, tag: Vec::new() },
        }
    }

    fn record(index: u32, offset: u32, change: Change) -> Record {
        Record { index, offset, before: hash_of(&index.to_le_bytes()), change }
    }

    fn records() -> Vec<Record> {
        vec![
            record(0, 512, Change::Data(vec![1; 1024])),
            record(0, 4096, Change::Zeros(512)),
            record(7, 0, Change::Removed),
            record(39, (1 << 20) - 512, Change::Data(vec![2; 512])),
        ]
    }

    fn stream(records: &[Record]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &increment()).expect("memory");
        for record in records {
            writer.put(record).expect("memory");
        }
        writer.finish().expect("memory");
        bytes
    }

    fn read(bytes: &[u8]) -> Result<(Increment, Vec<Record>), StreamError> {
        let mut reader = Reader::new(bytes)?;
        let mut records = Vec::new();
        while let Some(record) = reader.next_record()? {
            records.push(record);
        }
        Ok((reader.increment().clone(), records))
    }

    #[test]
    fn what_is_put_out_comes_in_again() {
        for count in 0..=records().len() {
            let written = &records()[..count];
            assert_eq!(read(&stream(written)).expect("good"), (increment(), written.to_vec()));
        }
    }

    #[test]
    fn every_flipped_bit_is_noticed() {
        let good = stream(&records());
        for at in 0..good.len() {
            for bit in 0..8 {
                let mut bad = good.clone();
                bad[at] ^= 1 << bit;
                let error = read(&bad).expect_err("a flipped bit");
                // A longer length reaches beyond the end; everything else is seen for what it is.
                let is_known = !matches!(error, StreamError::Io(_) | StreamError::Continues);
                assert!(is_known, "byte {at} bit {bit}: {error}");
            }
        }
    }

    #[test]
    fn every_truncation_is_noticed() {
        let good = stream(&records());
        for length in 0..good.len() {
            let error = read(&good[..length]).expect_err("a part of it");
            let expected = length < MAGIC.len() && matches!(error, StreamError::NotAStream);
            assert!(expected || matches!(error, StreamError::Truncated), "{length}: {error}");
        }
        let longer = [&good[..], &[0]].concat();
        assert!(matches!(read(&longer), Err(StreamError::Continues)));
    }

    #[test]
    fn records_of_two_streams_do_not_mix() {
        let one = stream(&records());
        let mut other = Vec::new();
        let later = Increment { from: increment().to, ..increment() };
        Writer::new(&mut other, &later).and_then(Writer::finish).expect("memory");
        let mixed = [&other[..HEADER_BYTES], &one[HEADER_BYTES..]].concat();
        assert!(matches!(read(&mixed), Err(StreamError::Damaged(0))));
        let end = one.len() - RECORD_BYTES;
        let without_last = [&one[..end - RECORD_BYTES - 512], &one[end..]].concat();
        assert!(matches!(read(&without_last), Err(StreamError::Damaged(3))));
    }

    #[test]
    fn what_makes_no_sense_is_refused_however_right_its_checksum() {
        let zeros = |index, offset, length| record(index, offset, Change::Zeros(length));
        for bad in [
            vec![zeros(40, 0, 512)],
            vec![zeros(0, (1 << 20) - 511, 512)],
            vec![zeros(0, 0, 0)],
            vec![zeros(1, 0, 512), zeros(0, 0, 512)],
            vec![zeros(1, 0, 512), zeros(1, 511, 512)],
            vec![zeros(1, 0, 512), record(1, 0, Change::Removed)],
            vec![record(1, 0, Change::Removed), zeros(1, 512, 512)],
            vec![record(1, 512, Change::Removed)],
        ] {
            let good = bad.len() as u64 - 1;
            let error = read(&stream(&bad)).expect_err("no backup has this");
            assert!(matches!(error, StreamError::Damaged(count) if count == good), "{bad:?}: {error}");
        }
        for bad in [
            Increment { shift: 19, ..increment() },
            Increment { shift: 32, ..increment() },
            Increment { size_bytes: (1 << 40) + 1, ..increment() },
            Increment { size_bytes: u64::MAX, ..increment() },
            Increment { name: Vec::new(), ..increment() },
        ] {
            assert!(matches!(Reader::new(&bad.encode()[..]).err(), Some(StreamError::Damaged(0))), "{bad:?}");
        }
        let mut later = increment().encode();
        later[8] = 2;
        assert!(matches!(Reader::new(&later[..]).err(), Some(StreamError::Version(2))));
    }

    /// Gives a header and a record that claims a length, then counts what is asked for.
    struct Claims {
        bytes: Vec<u8>,
        longest: usize,
    }

    impl Read for Claims {
        fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
            self.longest = self.longest.max(buffer.len());
            let count = buffer.len().min(self.bytes.len());
            buffer[..count].copy_from_slice(&self.bytes[..count]);
            self.bytes.drain(..count);
            Ok(count)
        }
    }

    #[test]
    fn a_claimed_length_allocates_no_more_than_a_piece() {
        for (length, allowed) in
            [(PIECE_BYTES_MAX as u32, true), (PIECE_BYTES_MAX as u32 + 1, false), (u32::MAX, false)]
        {
            let mut bytes = increment().encode().to_vec();
            let mut head = [0; RECORD_BYTES];
            head[0] = DATA as u8;
            head[12..16].copy_from_slice(&length.to_le_bytes());
            bytes.extend(head);
            let mut reader = Reader::new(Claims { bytes, longest: 0 }).expect("a header");
            let error = reader.next_record().expect_err("nothing follows");
            assert_eq!(matches!(error, StreamError::Truncated), allowed, "{length}: {error}");
            assert!(reader.input.longest <= PIECE_BYTES_MAX as usize, "{}", reader.input.longest);
        }
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_without_harm(
            mut bytes in proptest::collection::vec(any::<u8>(), 0..4096),
            keeps in any::<bool>(),
        ) {
            if keeps {
                bytes.splice(0..0, increment().encode());
            }
            prop_assert!(read(&bytes).is_err());
        }
    }
}
