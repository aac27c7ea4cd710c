//! The files of the log: how records lie in them, and what a start makes of what it finds.
//!
//! `log.N` is a sequence of records: length of the body (u32), CRC-32C of the body (u32), body (postcard). Records are
//! written in batches, and a batch is begun only when the one before it is durable; every body says at which offset its
//! batch begins. The first record of a file says how things stood when it was begun, so that older files can be removed.
//!
//! Always holds:
//! 1. Only the last batch of the last file can be torn: by a power loss in the middle of writing it. Whoever waited for it
//!    was never told that it is durable, so its bad end is cut.
//! 2. Everything else that cannot be read is damage, and refused: a bad record before one of a later batch, or in a
//!    file that has a successor; a sound record that means nothing; a gap in the entries.
//!
//! Bit rot in the very last batch looks like a torn one and is not told from it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use crc_fast::{CrcAlgorithm, checksum};
use serde::{Deserialize, Serialize};

use super::format::{Ballot, LogEntry, Mark};
use crate::cluster::driver::OrderError;
use crate::world::disk::{Files, OpenMode};

const HEADER_BYTES: usize = 8;
/// A proposal is far smaller (`ENTRY_BYTES_MAX`); a length above this is damage.
const RECORD_BYTES_MAX: usize = 16 << 20;
/// A file, or a snapshot, is read as a whole. The log goes on in the next file long before this; a snapshot has it with
/// some ten million volumes.
pub(super) const FILE_BYTES_MAX: u64 = 2 << 30;

/// One thing that was written.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the variants' docs name their fields")]
pub enum Record {
    /// The first of a file: what held when it was begun.
    Begin { cluster: u64, ballot: Option<Ballot>, purged: Option<Mark>, committed: Option<Mark> },
    /// An entry behind the last one.
    Entry(LogEntry),
    /// The promise that holds from here on.
    Vote(Ballot),
    /// The entries from this index on are gone.
    Truncate { since: u64 },
    /// The entries up to here are in a durable snapshot.
    Purge { upto: Mark },
    /// The entries up to here are ordered for good. Not always the latest word.
    Committed { upto: Mark },
}

#[derive(Serialize, Deserialize)]
struct Body {
    batch: u64,
    record: Record,
}

/// Appends the records of one batch, which begins at `offset` of its file, to `bytes`.
pub fn encode_batch(offset: u64, records: &[Record]) -> Vec<u8> {
    let mut bytes = Vec::new();
    for record in records {
        let header = bytes.len();
        bytes.extend_from_slice(&[0; HEADER_BYTES]);
        bytes = postcard::to_extend(&Body { batch: offset, record: record.clone() }, bytes)
            .expect("records have no unserialisable values");
        let body = &bytes[header + HEADER_BYTES..];
        let (length, crc) = ((body.len() as u32).to_le_bytes(), crc32c(body).to_le_bytes());
        bytes[header..header + 4].copy_from_slice(&length);
        bytes[header + 4..header + HEADER_BYTES].copy_from_slice(&crc);
    }
    bytes
}

fn crc32c(bytes: &[u8]) -> u32 {
    checksum(CrcAlgorithm::Crc32Iscsi, bytes) as u32
}

/// What a file holds.
#[derive(Debug, PartialEq, Eq)]
pub struct Contents {
    /// Its records.
    pub records: Vec<Record>,
    /// Bytes up to the end of the last one; what follows is a torn batch.
    pub sound_bytes: usize,
}

/// Something in a file that no crash leaves behind.
#[derive(Clone, PartialEq, Eq, Debug, thiserror::Error)]
#[error("{reason} at byte {offset}")]
pub struct Damage {
    /// Where.
    pub offset: usize,
    /// What.
    pub reason: String,
}

/// Reads a file. `is_last` says that it has no successor, so that its end may be torn.
pub fn decode_file(bytes: &[u8], is_last: bool) -> Result<Contents, Damage> {
    let mut records = Vec::new();
    let (mut position, mut batch) = (0, 0);
    while let Some(body) = frame(&bytes[position..]) {
        let damage = |reason: String| Damage { offset: position, reason };
        let (body, length) = match postcard::take_from_bytes::<Body>(body) {
            Ok((decoded, [])) => (decoded, HEADER_BYTES + body.len()),
            Ok(_) => return Err(damage("a record is longer than what it says".to_owned())),
            Err(error) => return Err(damage(format!("a record means nothing to this version ({error})"))),
        };
        if body.batch != batch && body.batch != position as u64 {
            return Err(damage("a record is out of place".to_owned()));
        }
        batch = body.batch;
        records.push(body.record);
        position += length;
    }
    if position < bytes.len() {
        if !is_last {
            return Err(Damage { offset: position, reason: "a record is damaged".to_owned() });
        }
        if let Some(offset) = later_batch(bytes, position) {
            let reason = format!("a record is damaged, and not at the end: a sound one follows at byte {offset},");
            return Err(Damage { offset: position, reason });
        }
    }
    Ok(Contents { records, sound_bytes: position })
}

/// The body of the record that `bytes` begin with, if it is whole.
fn frame(bytes: &[u8]) -> Option<&[u8]> {
    let (header, rest) = bytes.split_at_checked(HEADER_BYTES)?;
    let length = u32::from_le_bytes(header[..4].try_into().ok()?) as usize;
    // No body is empty; a file extended by zeros reads as empty bodies with the right checksum.
    if length == 0 || length > RECORD_BYTES_MAX {
        return None;
    }
    let body = rest.get(..length)?;
    (crc32c(body).to_le_bytes() == header[4..]).then_some(body)
}

/// A record behind a bad one at `position` whose batch was begun after it: then the bad one had become durable.
fn later_batch(bytes: &[u8], position: usize) -> Option<usize> {
    (position + 1..bytes.len()).find(|offset| {
        let body = frame(&bytes[*offset..]).and_then(|body| postcard::from_bytes::<Body>(body).ok());
        body.is_some_and(|body| body.batch > position as u64 && body.batch <= *offset as u64)
    })
}

/// An entry in memory, and the bytes it takes on disk.
pub(super) struct Held {
    pub entry: openraft::Entry<super::Types>,
    pub bytes: usize,
}

/// Bytes that an entry takes in a file, without its frame.
pub(super) fn encoded_bytes(entry: &LogEntry) -> usize {
    postcard::experimental::serialized_size(entry).expect("entries have no unserialisable values")
}

/// The log as its files say.
#[derive(Default)]
pub(super) struct Image {
    pub ballot: Option<Ballot>,
    pub purged: Option<Mark>,
    pub committed: Option<Mark>,
    /// By index.
    pub entries: BTreeMap<u64, Held>,
}

impl Image {
    /// Mark of the last entry, or of the last one that is gone.
    pub fn last(&self) -> Option<Mark> {
        self.entries.last_key_value().map(|(_, held)| held.entry.log_id.into()).or(self.purged)
    }

    /// Follows one record. The error says why it cannot follow the ones before.
    fn follow(&mut self, record: Record) -> Result<(), String> {
        match record {
            Record::Begin { ballot, purged, committed, .. } => {
                self.ballot = ballot;
                self.purged = purged.max(self.purged);
                self.committed = committed;
            }
            Record::Entry(entry) => {
                let index = entry.mark.index;
                // The first entry of the oldest file may follow entries of a file that was removed.
                let last = self.entries.last_key_value().map(|(index, _)| *index);
                if last.is_some_and(|last| last.checked_add(1) != Some(index)) {
                    return Err(format!("entry {index} does not follow entry {}", last.unwrap_or_default()));
                }
                let bytes = encoded_bytes(&entry);
                self.entries.insert(index, Held { entry: entry.into(), bytes });
            }
            Record::Vote(ballot) => self.ballot = Some(ballot),
            Record::Truncate { since } => drop(self.entries.split_off(&since)),
            Record::Purge { upto } => {
                self.purged = Some(upto).max(self.purged);
                self.entries = self.entries.split_off(&(upto.index.saturating_add(1)));
            }
            Record::Committed { upto } => self.committed = Some(upto),
        }
        Ok(())
    }

    /// What must hold once all files were read.
    fn check(&mut self) -> Result<(), String> {
        if let Some(purged) = self.purged {
            self.entries = self.entries.split_off(&purged.index.saturating_add(1));
        }
        let next = self.purged.map_or(0, |purged| purged.index.saturating_add(1));
        match self.entries.first_key_value() {
            Some((first, _)) if *first != next => Err(format!("entries {next} to {first} are missing")),
            _ => {
                // It is written later than what it speaks of, so more than that cannot have been ordered.
                self.committed = self.committed.filter(|committed| Some(*committed) <= self.last());
                Ok(())
            }
        }
    }
}

/// What a start finds: the log, and its files with the highest index that each one holds.
pub(super) struct Found {
    pub image: Image,
    pub files: BTreeMap<u64, Option<u64>>,
    /// Sound bytes of the last file; `None` if there is none.
    pub last_bytes: Option<u64>,
}

/// The name of a file of the log.
pub(super) fn path(directory: &Path, number: u64) -> PathBuf {
    directory.join(format!("log.{number}"))
}

pub(super) fn failed(action: &'static str, place: &Path) -> impl FnOnce(std::io::Error) -> OrderError {
    let place = place.display().to_string();
    move |error| OrderError::Io { action, place, error }
}

/// Reads all files of the log.
pub(super) fn read_all(files: &dyn Files, directory: &Path, cluster: u64) -> Result<Found, OrderError> {
    let entries = files.read_dir(directory).map_err(failed("list", directory))?;
    let mut numbers: Vec<u64> =
        entries.iter().filter_map(|entry| entry.name.strip_prefix("log.")?.parse().ok()).collect();
    numbers.sort_unstable();
    let mut found = Found { image: Image::default(), files: BTreeMap::new(), last_bytes: None };
    for (place, number) in numbers.iter().enumerate() {
        let path = path(directory, *number);
        let unreadable = |reason: String| OrderError::Damaged { place: path.display().to_string(), reason };
        if place > 0 && numbers[place - 1] + 1 != *number {
            return Err(unreadable("the file before it is missing".to_owned()));
        }
        let bytes = read_file(files, &path)?;
        let is_last = place + 1 == numbers.len();
        let contents = decode_file(&bytes, is_last).map_err(|damage| unreadable(damage.to_string()))?;
        let highest = follow_file(&mut found.image, contents.records, cluster, is_last, &unreadable)?;
        found.files.insert(*number, highest);
        found.last_bytes = Some(contents.sound_bytes as u64);
    }
    let place = directory.join("log.*").display().to_string();
    found.image.check().map_err(|reason| OrderError::Damaged { place, reason })?;
    Ok(found)
}

fn follow_file(
    image: &mut Image,
    records: Vec<Record>,
    cluster: u64,
    is_last: bool,
    unreadable: &dyn Fn(String) -> OrderError,
) -> Result<Option<u64>, OrderError> {
    match records.first() {
        Some(Record::Begin { cluster: theirs, .. }) if *theirs == cluster => {}
        Some(Record::Begin { cluster: theirs, .. }) => {
            return Err(OrderError::OtherCluster { ours: *theirs, theirs: cluster });
        }
        // A crash came while the file was begun.
        None if is_last => {}
        _ => return Err(unreadable("the file has no beginning".to_owned())),
    }
    let mut highest = None;
    for record in records {
        if let Record::Entry(entry) = &record {
            highest = highest.max(Some(entry.mark.index));
        }
        image.follow(record).map_err(unreadable)?;
    }
    Ok(highest)
}

pub(super) fn read_file(files: &dyn Files, path: &Path) -> Result<Vec<u8>, OrderError> {
    let file = files.open(path, OpenMode::Read).map_err(failed("open", path))?;
    let length = file.len().map_err(failed("read", path))?;
    if length > FILE_BYTES_MAX {
        let reason = format!("{length} bytes are more than it can have");
        return Err(OrderError::Damaged { place: path.display().to_string(), reason });
    }
    let mut bytes = vec![0; length as usize];
    let count = file.read_at(&mut bytes, 0).map_err(failed("read", path))?;
    bytes.truncate(count);
    Ok(bytes)
}
