//! The only answer to "which nodes hold this object".
//!
//! An object's placement key is a position on the ring; its holders are the first members met clockwise from there whose
//! zones differ. This file does not know who is alive or current, only who should have the object in the epoch the ring
//! was built for.
//!
//! Always holds:
//! 1. Holders are in distinct zones, and there are as many as asked for, or one per zone when there are fewer zones.
//! 2. The same ring, key and number of copies give the same holders in the same order, on every node.
//! 3. The holders for n copies are the first n of the holders for n + 1.
//! 4. When a member joins, a key either keeps its holders or swaps at most one of them for the newcomer. When a member
//!    leaves, only keys it held change, and each gets at most one new holder.
//! 5. All generations of a block in a snapshot chain have one key, so copy-on-write never crosses the network.
//!
//! In 4 "at most one" is exact: the newcomer displaces nobody while there were fewer zones than copies.
//!
//! A lookup walks until it has met enough zones. That is short unless copies need a zone of very little weight: one with
//! a thousandth of the ring costs about a thousand steps.
//!
//! The key is part of the stored state, like the ring's hash: golden tests freeze it.

use crate::copy_policy::COPIES_MAX;
use crate::member::NodeId;
use crate::ring::Ring;
use core::fmt;
use core::ops::Deref;
use qemu_proto::oid::{ObjectKind, Oid, VdiId};
use xxhash_rust::xxh3::xxh3_64;

/// Most holders one object can have.
pub const HOLDERS_MAX: usize = COPIES_MAX as usize;

/// First bytes under the hash: one per rule of `placement_key`.
const DOMAIN_DATA: [u8; 4] = *b"data";
const DOMAIN_INODE: [u8; 4] = *b"inod";
const DOMAIN_VMSTATE: [u8; 4] = *b"vmst";
const DOMAIN_RAW: [u8; 4] = *b"raw.";

/// Where on the ring an object lies. Objects of one key are always held together, on the same disk of each holder too.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub struct PlacementKey(u64);

impl PlacementKey {
    /// The position on the ring.
    pub const fn get(self) -> u64 {
        self.0
    }
}

/// The placement key of an object of the VDI chain that began with `chain_root`.
///
/// * data: root and index, whatever VDI of the chain owns it;
/// * inode: root alone, so one place for all inodes of a chain;
/// * saved VM state: root and index;
/// * everything else (attributes, the ancestor's internal kinds, ids without meaning) belongs to no chain: its own id.
pub fn placement_key(chain_root: VdiId, oid: Oid) -> PlacementKey {
    match oid.kind() {
        Some(ObjectKind::Data) => chain_key(DOMAIN_DATA, chain_root, oid.index()),
        Some(ObjectKind::Inode) => chain_key(DOMAIN_INODE, chain_root, 0),
        Some(ObjectKind::Vmstate) => chain_key(DOMAIN_VMSTATE, chain_root, oid.index()),
        _ => hash_key(DOMAIN_RAW, oid.raw()),
    }
}

fn chain_key(domain: [u8; 4], chain_root: VdiId, index: u32) -> PlacementKey {
    hash_key(domain, u64::from(chain_root.get()) << 32 | u64::from(index))
}

fn hash_key(domain: [u8; 4], value: u64) -> PlacementKey {
    let mut bytes = [0; 12];
    bytes[..4].copy_from_slice(&domain);
    bytes[4..].copy_from_slice(&value.to_le_bytes());
    PlacementKey(xxh3_64(&bytes))
}

/// The nodes that hold an object, in ring order; reads as a slice of ids. Lives on the stack, as every request makes one.
#[derive(Clone, Copy)]
pub struct Holders {
    ids: [NodeId; HOLDERS_MAX],
    count: u8,
}

impl Holders {
    /// Nobody.
    pub const EMPTY: Self = Self { ids: [NodeId(0); HOLDERS_MAX], count: 0 };

    fn push(&mut self, id: NodeId) {
        assert!((self.count as usize) < HOLDERS_MAX);
        self.ids[self.count as usize] = id;
        self.count += 1;
    }
}

impl Deref for Holders {
    type Target = [NodeId];

    fn deref(&self) -> &[NodeId] {
        &self.ids[..self.count as usize]
    }
}

impl PartialEq for Holders {
    fn eq(&self, other: &Self) -> bool {
        **self == **other
    }
}

impl Eq for Holders {}

impl fmt::Debug for Holders {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_list().entries(self.iter()).finish()
    }
}

impl<'a> IntoIterator for &'a Holders {
    type Item = &'a NodeId;
    type IntoIter = core::slice::Iter<'a, NodeId>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// The holders of the objects with this key: `copies` of them (more than `HOLDERS_MAX` counts as that many), or as many
/// as there are zones with weight. None when `copies` is 0 or the ring is empty.
pub fn holders(ring: &Ring, key: PlacementKey, copies: u8) -> Holders {
    let wanted = (copies as usize).min(HOLDERS_MAX).min(ring.zone_count());
    let mut holders = Holders::EMPTY;
    let mut zones = [0; HOLDERS_MAX];
    if wanted == 0 {
        return holders;
    }
    for member in ring.walk(key.get()) {
        let count = holders.len();
        if zones[..count].contains(&member.zone) {
            continue;
        }
        zones[count] = member.zone;
        holders.push(member.id);
        if count + 1 == wanted {
            break;
        }
    }
    assert_eq!(holders.len(), wanted, "a walk over all points meets every zone");
    holders
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ring::{ReferenceWeight, RingMember};
    use alloc::collections::{BTreeMap, BTreeSet};
    use alloc::vec::Vec;
    use proptest::prelude::*;

    const REFERENCE: u64 = 100;

    fn ring(members: &[RingMember]) -> Ring {
        Ring::new(members, ReferenceWeight::new(REFERENCE).expect("not zero"))
    }

    fn vid(number: u32) -> VdiId {
        VdiId::new(number).expect("a VDI id")
    }

    fn data_key(index: u32) -> PlacementKey {
        placement_key(vid(0x7c_2b25), Oid::data(vid(0x7c_2b25), index))
    }

    /// Weight 0 (gateways) included, few zones so that they often run out.
    fn any_members(count: usize) -> impl Strategy<Value = Vec<RingMember>> {
        let member = (0_u32..6, 0_u64..250);
        proptest::collection::btree_map(0_u64..40, member, 0..count).prop_map(|members| {
            let member = |(id, (zone, weight))| RingMember { id: NodeId(id), zone, weight };
            members.into_iter().map(member).collect()
        })
    }

    fn zones_with_weight(members: &[RingMember]) -> BTreeSet<u32> {
        members.iter().filter(|member| member.weight > 0).map(|member| member.zone).collect()
    }

    #[test]
    fn keys_and_holders_are_frozen() {
        let root = vid(0x7c_2b25);
        assert_eq!(data_key(7).get(), 0x202b_e7bd_fe8d_9fd5);
        assert_eq!(placement_key(root, Oid::inode(root)).get(), 0xfe91_a3a1_c8ae_f3cf);
        assert_eq!(placement_key(root, Oid::vmstate(root, 7)).get(), 0xb971_a89e_161a_80aa);
        assert_eq!(placement_key(root, Oid::attribute(root, 7)).get(), 0x41b0_bd61_34c9_1e51);

        let members: Vec<RingMember> =
            (1..=9).map(|id| RingMember { id: NodeId(id), zone: id as u32 % 5, weight: 100 * (1 + id % 2) }).collect();
        let ring = ring(&members);
        let ids = |index| holders(&ring, data_key(index), 3).iter().map(|id| id.get()).collect::<Vec<_>>();
        assert_eq!([ids(0), ids(1), ids(2), ids(1_000_000)].concat(), [6, 9, 2, 8, 9, 7, 6, 3, 7, 7, 5, 4]);
    }

    #[test]
    fn a_chain_keeps_its_generations_together() {
        let (root, snapshot, other) = (vid(100), vid(101), vid(102));
        assert_eq!(placement_key(root, Oid::data(root, 5)), placement_key(root, Oid::data(snapshot, 5)));
        assert_eq!(placement_key(root, Oid::inode(root)), placement_key(root, Oid::inode(snapshot)));
        assert_eq!(placement_key(root, Oid::vmstate(root, 5)), placement_key(root, Oid::vmstate(snapshot, 5)));
        assert_eq!(placement_key(root, Oid::attribute(other, 5)), placement_key(other, Oid::attribute(other, 5)));

        let distinct: BTreeSet<PlacementKey> = [
            placement_key(root, Oid::data(root, 0)),
            placement_key(root, Oid::data(root, 1)),
            placement_key(other, Oid::data(root, 0)),
            placement_key(root, Oid::inode(root)),
            placement_key(other, Oid::inode(root)),
            placement_key(root, Oid::vmstate(root, 0)),
            placement_key(root, Oid::attribute(root, 0)),
        ]
        .into();
        assert_eq!(distinct.len(), 7);
    }

    #[test]
    fn load_follows_weight() {
        // Weights 1 : 2 : 3 in each of ten equal zones.
        let members: Vec<RingMember> =
            (0..30).map(|id| RingMember { id: NodeId(id), zone: id as u32 / 3, weight: 50 * (1 + id % 3) }).collect();
        let ring = ring(&members);
        let key_count = 60_000;
        let mut loads = BTreeMap::<u64, u64>::new();
        for index in 0..key_count {
            for id in &holders(&ring, data_key(index), 3) {
                *loads.entry(id.get()).or_default() += 1;
            }
        }
        for (id, load) in loads {
            let fair = f64::from(key_count) * 3.0 / 10.0 * (1 + id % 3) as f64 / 6.0;
            let share = load as f64 / fair;
            assert!((0.88..1.12).contains(&share), "node {id} holds {share} of its share");
        }
    }

    #[test]
    fn most_copies_find_most_zones() {
        let members: Vec<RingMember> =
            (0..40).map(|id| RingMember { id: NodeId(id), zone: id as u32, weight: 10 }).collect();
        let ring = ring(&members);
        assert_eq!(holders(&ring, data_key(1), 31).len(), HOLDERS_MAX);
        assert_eq!(holders(&ring, data_key(1), 255), holders(&ring, data_key(1), 31));
        assert_eq!(holders(&ring, data_key(1), 0).len(), 0);
        assert_eq!(holders(&self::ring(&[]), data_key(1), 3).len(), 0);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(48))]

        /// Invariants 1, 2 and 3.
        #[test]
        fn distinct_zones_and_prefixes(members in any_members(12), start: u32) {
            let ring = ring(&members);
            let again = self::ring(&members);
            let zone_of: BTreeMap<NodeId, &RingMember> = members.iter().map(|member| (member.id, member)).collect();
            for key in (0..30).map(|step| data_key(start.wrapping_add(step))) {
                let most = holders(&ring, key, 31);
                prop_assert_eq!(most, holders(&again, key, 31));
                let zones: BTreeSet<u32> = most.iter().map(|id| zone_of[id].zone).collect();
                prop_assert_eq!(&zones, &zones_with_weight(&members));
                prop_assert_eq!(zones.len(), most.len());
                prop_assert!(most.iter().all(|id| zone_of[id].weight > 0));
                for copies in 0..=8_u8 {
                    let fewer = holders(&ring, key, copies);
                    prop_assert_eq!(&*fewer, &most[..most.len().min(copies as usize)]);
                }
            }
        }

        /// Invariant 4, both ways: `with` has one member more than `without`.
        #[test]
        fn only_what_must_move_moves(members in any_members(12), joining in (0_u32..7, 0_u64..250), start: u32, copies in 1_u8..5) {
            let newcomer = RingMember { id: NodeId(1000), zone: joining.0, weight: joining.1 };
            let without = ring(&members);
            let with = ring(&[members.as_slice(), &[newcomer]].concat());
            for key in (0..60).map(|step| data_key(start.wrapping_add(step))) {
                let before = holders(&without, key, copies);
                let after = holders(&with, key, copies);
                if !after.contains(&newcomer.id) {
                    prop_assert_eq!(before, after, "a non-holder changes nothing, not even the order");
                    continue;
                }
                let displaced = before.iter().filter(|id| !after.contains(id)).count();
                let arrived = after.iter().filter(|id| !before.contains(id)).count();
                prop_assert_eq!(arrived, 1);
                prop_assert_eq!(displaced, 1 + before.len() - after.len());
            }
        }

        /// More weight only attracts, less weight only repels; nothing moves between others.
        #[test]
        fn a_change_of_weight_concerns_one_member(members in any_members(12), zone in 0_u32..7, weights in (0_u64..250, 0_u64..250), start: u32) {
            let with = |weight| ring(&[members.as_slice(), &[RingMember { id: NodeId(1000), zone, weight }]].concat());
            let (lighter, heavier) = (with(weights.0.min(weights.1)), with(weights.0.max(weights.1)));
            for key in (0..60).map(|step| data_key(start.wrapping_add(step))) {
                let (before, after) = (holders(&lighter, key, 3), holders(&heavier, key, 3));
                prop_assert!(after.iter().all(|id| before.contains(id) || id.get() == 1000));
                prop_assert!(after.contains(&NodeId(1000)) || !before.contains(&NodeId(1000)));
            }
        }
    }
}
