//! Rules for the names of VDIs: which id a new one gets, which one a name and tag mean, which number a snapshot gets.
//!
//! These are the ancestor's rules, because old clients compute parts of them themselves: QEMU lists snapshots by walking
//! the ids from the hash of the name upward until the first one not in use. This file holds no table; the caller passes
//! what it knows as functions and iterators.
//!
//! Always holds:
//! 1. The ids ever used for one name lie in one unbroken run of ids in use that begins at the hash of the name (ids wrap
//!    from 0xFFFFFF to 1). Other names' ids may lie between. Ids stay in use after deletion, so the run never breaks.
//! 2. A deleted VDI has an empty name, and no name that is looked up is empty; so a deleted VDI is never found.
//! 3. A lookup goes from the highest id of the run to the lowest, so of several snapshots the newest decides. The working
//!    VDI is the only one of its name that is no snapshot; a restored snapshot may be newer.

use core::error::Error;
use core::fmt;
use qemu_proto::oid::VdiId;

/// Most bytes of a VDI name; with its NUL it fills the 256-byte field of the wire and the inode.
pub const NAME_BYTES_MAX: usize = 255;
/// Most bytes of a snapshot tag, for the same reason.
pub const TAG_BYTES_MAX: usize = 255;
/// Number of VDI ids: 24 bits without 0.
pub const VDI_COUNT_MAX: u32 = 0x00ff_ffff;

/// Why bytes cannot be a name or a tag.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NameError {
    /// A name needs at least one byte; an empty one means "deleted". Tags may be empty.
    Empty,
    /// More than 255 bytes.
    TooLong,
    /// A NUL byte, which ends names on the wire.
    ContainsNul,
}

impl fmt::Display for NameError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::Empty => "a VDI name must not be empty",
            Self::TooLong => "a name or tag must not be longer than 255 bytes",
            Self::ContainsNul => "a name or tag must not contain a NUL byte",
        })
    }
}

impl Error for NameError {}

/// Whether these bytes can name a VDI: 1..=255 of them, none NUL. Any encoding will do.
pub fn check_name(name: &[u8]) -> Result<(), NameError> {
    if name.is_empty() {
        return Err(NameError::Empty);
    }
    check_tag(name)
}

/// Whether these bytes can be a snapshot tag: at most 255, none NUL. No bytes mean "no tag".
pub fn check_tag(tag: &[u8]) -> Result<(), NameError> {
    if tag.len() > TAG_BYTES_MAX {
        return Err(NameError::TooLong);
    }
    if tag.contains(&0) {
        return Err(NameError::ContainsNul);
    }
    Ok(())
}
const _: () = assert!(NAME_BYTES_MAX == TAG_BYTES_MAX);

/// The id for a new VDI or a new generation of this name: the first one not in use at or after the hash of the name, with
/// wrap. `None` when all ids are in use.
pub fn allocate(name: &[u8], in_use: impl Fn(VdiId) -> bool) -> Option<VdiId> {
    ids_from(VdiId::from_name_hash(name)).find(|&vid| !in_use(vid))
}

/// All ids once, upward from `first`, with wrap.
fn ids_from(first: VdiId) -> impl Iterator<Item = VdiId> {
    (0..VDI_COUNT_MAX).map(move |distance| id_at(first, distance))
}

/// The id this far above `first`, with wrap from 0xFFFFFF to 1.
fn id_at(first: VdiId, distance: u32) -> VdiId {
    assert!(distance < VDI_COUNT_MAX);
    let above_one = (first.get() - 1 + distance) % VDI_COUNT_MAX;
    VdiId::new(above_one + 1).expect("1..=0xFFFFFF is a VDI id")
}

/// The ids that a lookup of a name considers, from the highest of the run to the lowest.
#[derive(Clone, Debug)]
pub struct Run {
    first: VdiId,
    /// How many are left; the next one is this far above `first`, less one.
    left: u32,
}

impl Run {
    /// The run of ids in use that begins at the hash of the name; empty when that id is free.
    pub fn of(name: &[u8], in_use: impl Fn(VdiId) -> bool) -> Self {
        let first = VdiId::from_name_hash(name);
        let left = ids_from(first).take_while(|&vid| in_use(vid)).count() as u32;
        Self { first, left }
    }
}

impl Iterator for Run {
    type Item = VdiId;

    fn next(&mut self) -> Option<VdiId> {
        self.left = self.left.checked_sub(1)?;
        Some(id_at(self.first, self.left))
    }

    fn size_hint(&self) -> (usize, Option<usize>) {
        (self.left as usize, Some(self.left as usize))
    }
}

impl ExactSizeIterator for Run {}

/// What a lookup needs to know of one VDI of the run.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Candidate<'a> {
    /// Its id.
    pub vid: VdiId,
    /// Its name; empty when it is deleted.
    pub name: &'a [u8],
    /// Its snapshot tag; empty when it has none.
    pub tag: &'a [u8],
    /// Its snapshot id, from 1.
    pub snapid: u32,
    /// False for the working VDI of the name.
    pub is_snapshot: bool,
}

/// Which of the VDIs of a name is meant.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target<'a> {
    /// The working VDI.
    Current,
    /// The newest snapshot that has this tag (unless that is empty) or this id.
    Snapshot {
        /// Tag to match; empty matches none.
        tag: &'a [u8],
        /// Snapshot id to match; ids begin at 1, so 0 matches none.
        snapid: u32,
    },
}

impl<'a> Target<'a> {
    /// What the tag and snapshot id of a request mean: neither is the working VDI.
    pub const fn new(tag: &'a [u8], snapid: u32) -> Self {
        if tag.is_empty() && snapid == 0 { Self::Current } else { Self::Snapshot { tag, snapid } }
    }
}

/// Why a lookup found nothing. Both mean that the client asked for what does not exist; retrying does not help.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LookupError {
    /// No VDI of this name, or only snapshots left of it where the working VDI was asked for.
    NoVdi,
    /// There is a working VDI of this name, but no snapshot with this tag or id.
    NoTag,
}

impl fmt::Display for LookupError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NoVdi => "no VDI of this name",
            Self::NoTag => "no snapshot of this VDI has this tag or id",
        })
    }
}

impl Error for LookupError {}

/// The VDI that a name and a target mean. `candidates` are the VDIs of the name's `Run`, in its order; those of other
/// names may be left out.
pub fn lookup<'a>(
    name: &[u8],
    target: Target<'_>,
    candidates: impl Iterator<Item = Candidate<'a>>,
) -> Result<VdiId, LookupError> {
    let mut named = candidates.filter(|candidate| !name.is_empty() && candidate.name == name);
    match target {
        Target::Current => {
            named.find(|candidate| !candidate.is_snapshot).map(|working| working.vid).ok_or(LookupError::NoVdi)
        }
        Target::Snapshot { tag, snapid } => {
            let mut not_found = LookupError::NoVdi;
            for candidate in named {
                if !candidate.is_snapshot {
                    not_found = LookupError::NoTag;
                    continue;
                }
                let tag_matches = !tag.is_empty() && candidate.tag == tag;
                if tag_matches || (snapid != 0 && candidate.snapid == snapid) {
                    return Ok(candidate.vid);
                }
            }
            Err(not_found)
        }
    }
}

/// The snapshot id for a new VDI of this name: one more than the highest that exists, else 1. `None` when they are used
/// up. `candidates` as for `lookup`, in any order.
pub fn next_snapid<'a>(name: &[u8], candidates: impl Iterator<Item = Candidate<'a>>) -> Option<u32> {
    let named = candidates.filter(|candidate| candidate.name == name);
    named.map(|candidate| candidate.snapid).max().unwrap_or(0).checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::collections::BTreeMap;
    use alloc::vec::Vec;
    use proptest::prelude::*;

    #[derive(Clone, Debug)]
    struct Vdi {
        name: Vec<u8>,
        tag: Vec<u8>,
        snapid: u32,
        is_snapshot: bool,
    }

    /// The VDI table of a cluster, as small as these rules need it.
    #[derive(Default)]
    struct Table(BTreeMap<u32, Vdi>);

    impl Table {
        fn in_use(&self, vid: VdiId) -> bool {
            self.0.contains_key(&vid.get())
        }

        fn candidates<'a>(&'a self, name: &[u8]) -> impl Iterator<Item = Candidate<'a>> {
            Run::of(name, |vid| self.in_use(vid)).map(|vid| {
                let vdi = &self.0[&vid.get()];
                Candidate { vid, name: &vdi.name, tag: &vdi.tag, snapid: vdi.snapid, is_snapshot: vdi.is_snapshot }
            })
        }

        fn find(&self, name: &str, tag: &str, snapid: u32) -> Result<u32, LookupError> {
            let target = Target::new(tag.as_bytes(), snapid);
            lookup(name.as_bytes(), target, self.candidates(name.as_bytes())).map(VdiId::get)
        }

        /// Id and snapshot id of the new VDI.
        fn create(&mut self, name: &str) -> (u32, u32) {
            let name = name.as_bytes();
            let snapid = next_snapid(name, self.candidates(name)).expect("few");
            let vid = allocate(name, |vid| self.in_use(vid)).expect("room").get();
            self.0.insert(vid, Vdi { name: name.to_vec(), tag: Vec::new(), snapid, is_snapshot: false });
            (vid, snapid)
        }

        /// Turns the working VDI into a snapshot with this tag; the new working VDI is returned.
        fn snapshot(&mut self, name: &str, tag: &str) -> (u32, u32) {
            let current = self.find(name, "", 0).expect("a working VDI");
            let vdi = self.0.get_mut(&current).expect("found");
            vdi.is_snapshot = true;
            vdi.tag = tag.as_bytes().to_vec();
            self.create(name)
        }

        fn delete(&mut self, vid: u32) {
            self.0.get_mut(&vid).expect("in use").name.clear();
        }
    }

    #[test]
    fn ids_of_the_reference_vectors() {
        for (name, vid) in [
            ("test", 0x7c_2b25),
            ("vm1", 0xc5_9887),
            ("alpha", 0xed_202b),
            ("Ubuntu-20.04", 0x71_24af),
            ("x", 0x02_1707),
            ("data_disk:1", 0xe1_6a86),
            ("日本", 0xd3_ce91),
        ] {
            assert_eq!(Table::default().create(name), (vid, 1), "{name}");
        }
    }

    #[test]
    fn names_that_collide_share_a_run() {
        let mut table = Table::default();
        assert_eq!(table.create("col34469"), (0x4f_0e0b, 1));
        assert_eq!(table.create("col65874"), (0x4f_0e0c, 1));
        assert_eq!(table.find("col34469", "", 0), Ok(0x4f_0e0b));
        assert_eq!(table.find("col65874", "", 0), Ok(0x4f_0e0c));

        table.delete(0x4f_0e0b);
        assert_eq!(table.find("col34469", "", 0), Err(LookupError::NoVdi));
        assert_eq!(table.find("col65874", "", 0), Ok(0x4f_0e0c), "still found past the deleted one");
        assert_eq!(table.create("col34469"), (0x4f_0e0d, 1));
        assert_eq!(table.find("col34469", "", 0), Ok(0x4f_0e0d));
        assert_eq!(table.find("col65874", "", 0), Ok(0x4f_0e0c));
    }

    #[test]
    fn snapshots_take_the_next_id_and_are_found_by_tag_or_number() {
        let mut table = Table::default();
        table.create("test");
        assert_eq!(table.snapshot("test", "one"), (0x7c_2b26, 2));
        assert_eq!(table.snapshot("test", ""), (0x7c_2b27, 3));
        assert_eq!(table.snapshot("test", "one"), (0x7c_2b28, 4));

        assert_eq!(table.find("test", "", 0), Ok(0x7c_2b28));
        assert_eq!(table.find("test", "one", 0), Ok(0x7c_2b27), "of two with one tag the newest");
        assert_eq!(table.find("test", "", 1), Ok(0x7c_2b25));
        assert_eq!(table.find("test", "", 2), Ok(0x7c_2b26));
        assert_eq!(table.find("test", "no such", 2), Ok(0x7c_2b26), "the number alone is enough");
        assert_eq!(table.find("test", "one", 1), Ok(0x7c_2b27), "either matches; the newest wins");
        assert_eq!(table.find("test", "no such", 0), Err(LookupError::NoTag));
        assert_eq!(table.find("test", "", 4), Err(LookupError::NoTag), "the working VDI is not a snapshot");
        assert_eq!(table.find("tes", "one", 0), Err(LookupError::NoVdi));
    }

    #[test]
    fn with_the_working_vdi_deleted_only_its_snapshots_are_found() {
        let mut table = Table::default();
        table.create("test");
        let (current, _) = table.snapshot("test", "one");
        table.delete(current);
        assert_eq!(table.find("test", "", 0), Err(LookupError::NoVdi));
        assert_eq!(table.find("test", "one", 0), Ok(0x7c_2b25));
        assert_eq!(table.find("test", "two", 0), Err(LookupError::NoVdi), "no working VDI, so not NoTag");
        assert_eq!(table.create("test"), (0x7c_2b27, 2), "numbering goes on after the newest snapshot");
        table.delete(0x7c_2b25);
        assert_eq!(table.find("test", "one", 0), Err(LookupError::NoTag));
    }

    #[test]
    fn a_snapshot_may_be_newer_than_the_working_vdi() {
        let mut table = Table::default();
        let (working, _) = table.create("test");
        let restored = Vdi { name: b"test".to_vec(), tag: Vec::new(), snapid: 2, is_snapshot: true };
        table.0.insert(working + 1, restored);
        assert_eq!(table.find("test", "", 0), Ok(working));
        assert_eq!(table.find("test", "", 2), Ok(working + 1));
        assert_eq!(table.snapshot("test", "one"), (working + 2, 3));
    }

    #[test]
    fn a_free_id_ends_the_run() {
        let mut table = Table::default();
        table.create("test");
        table.snapshot("test", "one");
        table.snapshot("test", "two");
        table.0.remove(&0x7c_2b26);
        assert_eq!(table.find("test", "", 0), Err(LookupError::NoVdi), "the one above the gap is not reached");
        assert_eq!(table.find("test", "one", 0), Ok(0x7c_2b25));
        table.0.remove(&0x7c_2b25);
        assert_eq!(Run::of(b"test", |vid| table.in_use(vid)).len(), 0);
        assert_eq!(table.find("test", "one", 0), Err(LookupError::NoVdi));
    }

    #[test]
    fn ids_wrap_past_zero_and_may_run_out() {
        let first = VdiId::from_name_hash(b"test").get();
        let wrapping = |vid: VdiId| vid.get() >= first;
        assert_eq!(allocate(b"test", wrapping).map(VdiId::get), Some(1));
        assert_eq!(Run::of(b"test", wrapping).next().map(VdiId::get), Some(VDI_COUNT_MAX));
        let wrapped = |vid: VdiId| vid.get() >= first || vid.get() <= 2;
        let top: Vec<u32> = Run::of(b"test", wrapped).take(3).map(VdiId::get).collect();
        assert_eq!(top, [2, 1, VDI_COUNT_MAX]);
        assert_eq!(Run::of(b"test", wrapped).last().map(VdiId::get), Some(first));

        assert_eq!(allocate(b"test", |_| true), None);
        assert_eq!(allocate(b"test", |vid| vid.get() != first - 1).map(VdiId::get), Some(first - 1));
        assert_eq!(Run::of(b"test", |_| true).len(), VDI_COUNT_MAX as usize);
    }

    #[test]
    fn snapshot_ids_may_run_out() {
        let vid = VdiId::from_name_hash(b"x");
        let candidate = |snapid| Candidate { vid, name: b"x", tag: b"", snapid, is_snapshot: true };
        assert_eq!(next_snapid(b"x", [candidate(7), candidate(9), candidate(2)].into_iter()), Some(10));
        assert_eq!(next_snapid(b"y", [candidate(7)].into_iter()), Some(1));
        assert_eq!(next_snapid(b"x", [candidate(u32::MAX)].into_iter()), None);
    }

    #[test]
    fn an_empty_name_finds_no_deleted_vdi() {
        let mut table = Table::default();
        let (vid, _) = table.create("test");
        table.delete(vid);
        let deleted = || table.candidates(b"test");
        assert_eq!(deleted().count(), 1);
        assert_eq!(lookup(b"", Target::Current, deleted()), Err(LookupError::NoVdi));
        assert_eq!(lookup(b"", Target::new(b"", 1), deleted()), Err(LookupError::NoVdi));
    }

    #[test]
    fn names_and_tags_are_checked() {
        assert_eq!(check_name(b""), Err(NameError::Empty));
        assert_eq!(check_tag(b""), Ok(()));
        for check in [check_name, check_tag] {
            assert_eq!(check(&[b'x'; 255]), Ok(()));
            assert_eq!(check(&[b'x'; 256]), Err(NameError::TooLong));
            assert_eq!(check(b"a\0"), Err(NameError::ContainsNul));
            assert_eq!(check("日本 \u{7f}\n".as_bytes()), Ok(()));
            assert_eq!(check(&[0xff, 0xfe]), Ok(()), "any encoding");
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Whatever happens to colliding names, each working VDI and each snapshot is found, and nothing else.
        #[test]
        fn every_living_vdi_is_found(steps in proptest::collection::vec((0_usize..2, 0_u8..4), 0..40)) {
            let names = ["col34469", "col65874"];
            let mut table = Table::default();
            let mut working: [Option<u32>; 2] = [None, None];
            let mut snapshots: [BTreeMap<u32, u32>; 2] = Default::default();
            for (who, action) in steps {
                let name = names[who];
                match (action, working[who]) {
                    (0 | 1, None) => {
                        let (vid, snapid) = table.create(name);
                        prop_assert!(snapshots[who].keys().all(|&older| older < snapid));
                        working[who] = Some(vid);
                    }
                    (1, Some(vid)) => {
                        let snapid = table.0[&vid].snapid;
                        working[who] = Some(table.snapshot(name, &alloc::format!("tag{snapid}")).0);
                        snapshots[who].insert(snapid, vid);
                    }
                    (2, Some(vid)) => {
                        table.delete(vid);
                        working[who] = None;
                    }
                    (3, _) => if let Some((_, vid)) = snapshots[who].pop_first() { table.delete(vid) },
                    _ => {}
                }
                for who in 0..2 {
                    prop_assert_eq!(table.find(names[who], "", 0).ok(), working[who]);
                    let missing = if working[who].is_some() { LookupError::NoTag } else { LookupError::NoVdi };
                    for snapid in 1..42 {
                        let expected = snapshots[who].get(&snapid).copied().ok_or(missing);
                        prop_assert_eq!(table.find(names[who], "", snapid), expected);
                        prop_assert_eq!(table.find(names[who], &alloc::format!("tag{snapid}"), 0), expected);
                    }
                }
            }
        }
    }
}
