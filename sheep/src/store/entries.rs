//! What the store knows of every object, in memory: one packed value per object in an ordered map.
//!
//! Always holds:
//! 1. The map shows every submitted change, applied or not.
//! 2. `allocated_blocks` in all is the sum over the entries.

use std::collections::BTreeMap;

use qemu_proto::oid::Oid;
use sheep_core::stamp::{Epoch, Stamp, Version};

use super::checksum::{BLOCK_BYTES, crc32c};
use super::fields::u32_at;
use super::object_file::OBJECT_BYTES_MAX;

/// Bytes of an entry in the index file.
pub const ENTRY_BYTES: usize = 32;

/// What a caller sees of an object.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Entry {
    /// Which writes the content contains.
    pub version: Version,
    /// Bytes of content.
    pub size_bytes: u64,
}

/// An entry in 28 bytes with an alignment of 4, so that a million objects stay below 100 MB (design.md section 11).
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Packed {
    epoch: u32,
    generation: u32,
    sequence: [u32; 2],
    size_bytes: u32,
    allocated_blocks: u32,
    disk: u8,
}

const _: () = assert!(size_of::<Packed>() == 28);
const _: () = assert!(OBJECT_BYTES_MAX <= u32::MAX as u64);

impl Packed {
    /// An entry of an object that takes no space yet.
    pub fn new(version: Version, size_bytes: u64, disk: u8) -> Packed {
        Packed { size_bytes: size_bytes as u32, allocated_blocks: 0, disk, ..Packed::EMPTY }.with_version(version)
    }

    const EMPTY: Packed =
        Packed { epoch: 0, generation: 0, sequence: [0; 2], size_bytes: 0, allocated_blocks: 0, disk: 0 };

    /// The same object at another version.
    pub fn with_version(self, version: Version) -> Packed {
        let sequence = version.stamp.sequence;
        Packed {
            epoch: version.epoch.0,
            generation: version.stamp.generation,
            sequence: [sequence as u32, (sequence >> 32) as u32],
            ..self
        }
    }

    /// The same object, taking this much space.
    pub fn with_allocated(self, bytes: u64) -> Packed {
        Packed { allocated_blocks: (bytes / BLOCK_BYTES as u64) as u32, ..self }
    }

    /// Which writes it contains.
    pub fn version(self) -> Version {
        let sequence = u64::from(self.sequence[0]) | u64::from(self.sequence[1]) << 32;
        Version { epoch: Epoch(self.epoch), stamp: Stamp { generation: self.generation, sequence } }
    }

    /// Bytes of content.
    pub fn size_bytes(self) -> u64 {
        u64::from(self.size_bytes)
    }

    /// Its disk.
    pub fn disk(self) -> u8 {
        self.disk
    }

    /// Bytes of disk space at the last checkpoint.
    pub fn allocated_bytes(self) -> u64 {
        u64::from(self.allocated_blocks) * BLOCK_BYTES as u64
    }

    /// What a caller sees.
    pub fn entry(self) -> Entry {
        Entry { version: self.version(), size_bytes: self.size_bytes() }
    }

    /// The bytes in the index file, with a checksum that covers the object's id too.
    pub fn encode(self, oid: u64) -> [u8; ENTRY_BYTES] {
        let mut bytes = [0; ENTRY_BYTES];
        let words =
            [self.epoch, self.generation, self.sequence[0], self.sequence[1], self.size_bytes, self.allocated_blocks];
        for (index, word) in words.into_iter().enumerate() {
            bytes[index * 4..index * 4 + 4].copy_from_slice(&word.to_le_bytes());
        }
        bytes[24] = self.disk;
        let crc = Packed::crc(&bytes, oid);
        bytes[28..32].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads what [`Packed::encode`] wrote; `None` if it is damaged.
    pub fn decode(bytes: &[u8], oid: u64) -> Option<Packed> {
        let bytes: &[u8; ENTRY_BYTES] = bytes.try_into().ok()?;
        if Packed::crc(bytes, oid) != u32_at(bytes, 28)? {
            return None;
        }
        let packed = Packed {
            epoch: u32_at(bytes, 0)?,
            generation: u32_at(bytes, 4)?,
            sequence: [u32_at(bytes, 8)?, u32_at(bytes, 12)?],
            size_bytes: u32_at(bytes, 16)?,
            allocated_blocks: u32_at(bytes, 20)?,
            disk: bytes[24],
        };
        (packed.size_bytes > 0 && packed.size_bytes() <= OBJECT_BYTES_MAX).then_some(packed)
    }

    fn crc(bytes: &[u8; ENTRY_BYTES], oid: u64) -> u32 {
        let mut covered = [0; 36];
        covered[..28].copy_from_slice(&bytes[..28]);
        covered[28..].copy_from_slice(&oid.to_le_bytes());
        crc32c(&covered)
    }
}

/// All objects.
#[derive(Default)]
pub struct Entries {
    map: BTreeMap<u64, Packed>,
    allocated_bytes: u64,
}

/// Of entries in ascending order the map's nodes are packed full; set one after the other they would stay half empty.
impl FromIterator<(u64, Packed)> for Entries {
    fn from_iter<I: IntoIterator<Item = (u64, Packed)>>(entries: I) -> Entries {
        let map = BTreeMap::from_iter(entries);
        let allocated_bytes = map.values().map(|packed| packed.allocated_bytes()).sum();
        Entries { map, allocated_bytes }
    }
}

impl Entries {
    /// One object.
    pub fn get(&self, oid: u64) -> Option<Packed> {
        self.map.get(&oid).copied()
    }

    /// Sets or removes one object.
    pub fn set(&mut self, oid: u64, entry: Option<Packed>) {
        let before = match entry {
            Some(entry) => {
                self.allocated_bytes += entry.allocated_bytes();
                self.map.insert(oid, entry)
            }
            None => self.map.remove(&oid),
        };
        self.allocated_bytes -= before.map_or(0, Packed::allocated_bytes);
    }

    /// Notes how much space an object takes.
    pub fn set_allocated(&mut self, oid: u64, bytes: u64) {
        if let Some(entry) = self.get(oid) {
            self.set(oid, Some(entry.with_allocated(bytes)));
        }
    }

    /// How many there are.
    pub fn count(&self) -> usize {
        self.map.len()
    }

    /// Disk space they take together.
    pub fn allocated_bytes(&self) -> u64 {
        self.allocated_bytes
    }

    /// Disk space they take on each of `disk_count` disks.
    pub fn allocated_by_disk(&self, disk_count: usize) -> Vec<u64> {
        let mut bytes = vec![0; disk_count];
        for packed in self.map.values() {
            if let Some(bytes) = bytes.get_mut(usize::from(packed.disk())) {
                *bytes += packed.allocated_bytes();
            }
        }
        bytes
    }

    /// The highest disk that an entry names.
    pub fn highest_disk(&self) -> Option<u8> {
        self.map.values().map(|packed| packed.disk()).max()
    }

    /// At most `max` of them in ascending order, after a given one.
    pub fn page(&self, after: Option<Oid>, max: usize) -> Vec<(Oid, Entry)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let start = after.map_or(Unbounded, |oid| Excluded(oid.raw()));
        let range = self.map.range((start, Unbounded));
        range.take(max).map(|(oid, packed)| (Oid::from_raw(*oid), packed.entry())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_survives_its_bytes_and_damage_is_found() {
        let version = Version { epoch: Epoch(9), stamp: Stamp { generation: 4, sequence: (7 << 33) + 1 } };
        let packed = Packed::new(version, OBJECT_BYTES_MAX, 3).with_allocated(12_288);
        let bytes = packed.encode(42);
        assert_eq!(Packed::decode(&bytes, 42), Some(packed));
        assert_eq!(packed.version(), version);
        assert_eq!(packed.size_bytes(), OBJECT_BYTES_MAX);
        assert_eq!(Packed::decode(&bytes, 43), None);
        for bit in 0..bytes.len() * 8 {
            let mut bad = bytes;
            bad[bit / 8] ^= 1 << (bit % 8);
            // Bytes 25 to 27 are covered as well, so that they are free for later formats.
            assert_eq!(Packed::decode(&bad, 42), None, "bit {bit}");
        }
    }

    #[test]
    fn pages_are_ascending_and_space_adds_up() {
        let mut entries = Entries::default();
        for oid in (0..10).rev() {
            entries.set(oid, Some(Packed::new(Version::default(), 4096, 0)));
            entries.set_allocated(oid, 8192);
        }
        entries.set(3, None);
        assert_eq!((entries.count(), entries.allocated_bytes()), (9, 9 * 8192));
        assert_eq!(entries.allocated_by_disk(2).iter().sum::<u64>(), 9 * 8192);
        let packed = (0..10).filter_map(|oid| Some((oid, entries.get(oid)?))).collect::<Entries>();
        assert_eq!((packed.count(), packed.allocated_bytes()), (9, 9 * 8192));
        let first = entries.page(None, 4);
        let ids: Vec<u64> = first.iter().map(|(oid, _)| oid.raw()).collect();
        assert_eq!(ids, [0, 1, 2, 4]);
        assert_eq!(entries.page(Some(first[3].0), 100).len(), 5);
    }
}
