//! What a guest that makes volumes, snapshots and clones knows of them: which there must be, and what each block may hold.
//!
//! Always holds:
//! 1. A change without a good answer may come true at any later time, in the volume it was meant for and in whatever takes that
//!    volume's place; until then its outcome is unknown.
//! 2. A sector that was read is known, until the next change. In a snapshot it is known for good.

use std::collections::{BTreeMap, BTreeSet};

use crate::sectors::{BLOCK_BYTES, SECTOR_BYTES, SECTORS_PER_BLOCK, block_content, sector_sequence};

/// log2 of the object size of these volumes.
pub const OBJECT_SHIFT: u8 = 20;
/// Its bytes.
pub const OBJECT_BYTES: u64 = 1 << OBJECT_SHIFT;
/// Blocks lie at the beginnings of the quarters of an object.
pub const BLOCKS_PER_OBJECT: u64 = 4;
/// From one to the next.
pub const STRIDE_BYTES: u64 = OBJECT_BYTES / BLOCKS_PER_OBJECT;
/// What sectors say instead of a volume's id: snapshots and clones share them.
const SALT: u64 = 0x766f_6c75;

/// What may be in one block. Writes are numbers; 0 stands for zeros.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Block {
    known: [u64; SECTORS_PER_BLOCK],
    /// Writes that were never answered.
    unknown: BTreeSet<u64>,
}

impl Block {
    /// A change was acknowledged.
    pub fn changed(&mut self, value: u64) {
        self.known = [value; SECTORS_PER_BLOCK];
    }

    /// A change was not.
    pub fn may_change(&mut self, value: u64) {
        self.unknown.insert(value);
    }

    /// Takes note of what was read; fails if it cannot be. `is_fixed`: nothing can change it any more.
    fn read(&mut self, found: [u64; SECTORS_PER_BLOCK], is_fixed: bool) -> Result<(), String> {
        for (known, found) in self.known.iter_mut().zip(found) {
            if *known != found && !self.unknown.contains(&found) {
                return Err(format!("holds write {found} instead of {known}; {:?} were never answered", self.unknown));
            }
            *known = found;
        }
        if is_fixed {
            self.unknown.clear();
        }
        Ok(())
    }
}

/// Whether something is there.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It is.
    There,
    /// Its making was never answered.
    PerhapsMade,
    /// Its deletion was never answered.
    PerhapsGone,
}

/// A volume, or a snapshot of it.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Image {
    /// The volume's name.
    pub name: String,
    /// A snapshot's tag; empty for the working volume.
    pub tag: String,
    /// See there.
    pub fate: Fate,
    /// Whether a change of the tag was never answered: it may come any time.
    pub is_tag_in_doubt: bool,
    /// What it holds, as far as it is known to reach.
    pub blocks: Vec<Block>,
    /// Larger sizes that it may have, in objects.
    pub may_have_objects: BTreeSet<u64>,
}

impl Image {
    /// A new volume of zeros.
    pub fn new(name: String, objects: u64) -> Image {
        Image {
            name,
            tag: String::new(),
            fate: Fate::There,
            is_tag_in_doubt: false,
            blocks: vec![Block::default(); (objects * BLOCKS_PER_OBJECT) as usize],
            may_have_objects: BTreeSet::new(),
        }
    }

    /// Whether it cannot be written.
    pub fn is_snapshot(&self) -> bool {
        !self.tag.is_empty()
    }

    /// Its name among the NBD exports.
    pub fn export(&self) -> String {
        if self.is_snapshot() { format!("{}@{}", self.name, self.tag) } else { self.name.clone() }
    }

    /// Objects that it is known to have.
    pub fn objects(&self) -> u64 {
        self.blocks.len() as u64 / BLOCKS_PER_OBJECT
    }

    /// Fails unless it may have so many bytes.
    pub fn check_size(&self, size_bytes: u64) -> Result<(), String> {
        let objects = size_bytes / OBJECT_BYTES;
        if size_bytes == self.objects() * OBJECT_BYTES || self.may_have_objects.contains(&objects) {
            return Ok(());
        }
        let (known, may) = (self.objects(), &self.may_have_objects);
        Err(format!("{} has {size_bytes} bytes, not {known} objects or, perhaps, {may:?}", self.export()))
    }

    /// It grew.
    pub fn grow(&mut self, objects: u64) {
        self.blocks.resize((objects * BLOCKS_PER_OBJECT) as usize, Block::default());
    }

    /// Takes note of the bytes of one block; gives the writes they come from, or why they cannot be there.
    pub fn read(&mut self, block: u64, bytes: &[u8]) -> Result<[u64; SECTORS_PER_BLOCK], String> {
        let mut found = [0; SECTORS_PER_BLOCK];
        if bytes.len() != BLOCK_BYTES {
            return Err(format!("{} bytes instead of a block", bytes.len()));
        }
        for (index, sector) in bytes.chunks_exact(SECTOR_BYTES).enumerate() {
            let place = block * SECTORS_PER_BLOCK as u64 + index as u64;
            found[index] = sector_sequence(sector, SALT, place).map_err(|error| format!("{error:#}"))?;
        }
        let (is_snapshot, what) = (self.is_snapshot(), self.export());
        let mut beyond = Block::default();
        let known = self.blocks.get_mut(block as usize).unwrap_or(&mut beyond);
        known.read(found, is_snapshot).map_err(|why| format!("block {block} of {what} {why}"))?;
        Ok(found)
    }
}

/// The bytes that a write gives to a block.
pub fn content(block: u64, value: u64) -> Vec<u8> {
    block_content(SALT, block, value)
}

/// Everything that one guest made.
#[derive(Default)]
pub struct Memory {
    /// What there is, or may be.
    pub images: Vec<Image>,
    /// Deleted for good: names and tags.
    pub gone: BTreeSet<(String, String)>,
    /// Numbers of copies that volumes may have, by name; none: the cluster's.
    pub copies: BTreeMap<String, BTreeSet<u8>>,
}

impl Memory {
    /// Images that are there for sure, of which this is true.
    pub fn those(&self, wanted: impl Fn(&Image) -> bool) -> Vec<usize> {
        let fits = |index: &usize| self.images[*index].fate == Fate::There && wanted(&self.images[*index]);
        (0..self.images.len()).filter(fits).collect()
    }

    /// The working volumes.
    pub fn working(&self) -> Vec<usize> {
        self.those(|image| !image.is_snapshot())
    }

    /// Whether something is unknown about the working volume of a name.
    pub fn is_in_doubt(&self, name: &str) -> bool {
        self.images.iter().any(|image| image.name == name && !image.is_snapshot() && image.fate != Fate::There)
    }

    /// A block of a working volume was changed, or perhaps.
    pub fn change(&mut self, index: usize, block: u64, value: u64, is_sure: bool) {
        let name = self.images[index].name.clone();
        for (other, image) in self.images.iter_mut().enumerate() {
            // A snapshot that was never acknowledged may yet be made, of what is there then.
            let may_be_later = image.name == name && image.is_snapshot() && image.fate == Fate::PerhapsMade;
            let Some(block) = image.blocks.get_mut(block as usize) else { continue };
            if other == index && is_sure {
                block.changed(value);
            } else if other == index || may_be_later {
                block.may_change(value);
            }
        }
    }

    /// What was tried with the working volume of one image may yet happen to another one that takes its place.
    pub fn inherit_doubts(&mut self, heir: &mut Image, from: usize) {
        for (block, old) in heir.blocks.iter_mut().zip(&self.images[from].blocks) {
            block.unknown.extend(&old.unknown);
        }
        heir.may_have_objects.extend(&self.images[from].may_have_objects);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn image() -> Image {
        let mut image = Image::new("v".to_owned(), 1);
        image.blocks[1].changed(5);
        image
    }

    #[test]
    fn a_block_holds_the_last_change_or_one_without_an_answer() {
        let mut volume = image();
        volume.blocks[1].may_change(6);
        assert_eq!(volume.read(1, &content(1, 5)), Ok([5; 8]));
        assert_eq!(volume.read(1, &content(1, 6)), Ok([6; 8]));
        volume.read(1, &content(1, 5)).expect_err("overwritten: it was seen");
        volume.read(1, &content(2, 6)).expect_err("of another place");
        volume.read(0, &content(0, 5)).expect_err("never written");
    }

    #[test]
    fn a_snapshot_does_not_change_once_it_was_read() {
        let mut snapshot = Image { tag: "t".to_owned(), ..image() };
        snapshot.blocks[1].may_change(6);
        assert_eq!(snapshot.read(1, &content(1, 5)), Ok([5; 8]));
        snapshot.read(1, &content(1, 6)).expect_err("it changed");
    }

    #[test]
    fn a_snapshot_in_doubt_may_be_of_any_later_moment() {
        let mut memory = Memory::default();
        memory.images.push(image());
        memory.images.push(Image { tag: "t".to_owned(), fate: Fate::PerhapsMade, ..image() });
        memory.change(0, 1, 7, true);
        assert_eq!(memory.images[0].clone().read(1, &content(1, 7)), Ok([7; 8]));
        for value in [5, 7] {
            assert_eq!(memory.images[1].clone().read(1, &content(1, value)), Ok([value; 8]));
        }
    }
}
