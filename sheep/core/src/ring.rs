//! The hash ring of virtual nodes, built from the members of one epoch.
//!
//! Every member with a weight owns points on the circle of all `u64` values, in proportion to its weight. A key is a
//! position on the same circle; its members are found by walking clockwise from there. This file knows nothing of
//! objects or copies (`placement.rs` asks it), and decides nothing about who is a member.
//!
//! Always holds:
//! 1. The ring is a function of the set of members and the reference weight: not of their order, nor of any history.
//! 2. The points of a member depend on its own id and weight alone. A member that joins, leaves or changes its weight
//!    therefore adds or removes points of its own, and no key moves between two others.
//! 3. A member of weight 0 (a gateway) has no point; every other member has at least one.
//! 4. A walk visits every point once and ends.
//!
//! Why a stored reference weight and not the mean of the members: dividing by the mean would change the points of every
//! node whenever a node of another capacity joins, and healthy nodes would then copy data to each other for nothing. An
//! absolute unit (points per GiB) cannot serve both a 10 GiB laptop and a 200 TiB server. So the scale is chosen once,
//! when the cluster is formatted, and changes only when an operator asks to reweight.
//!
//! What it cannot do: give each node its exact share when zones are few and unequal. Copies go to distinct zones, so
//! with as many copies as zones every zone holds every object, whatever it weighs.
//!
//! The hash is part of the stored state: other bytes under it would move every object of every cluster. The golden
//! tests below fail then.

use crate::member::NodeId;
use alloc::vec::Vec;
use core::num::NonZeroU64;
use serde::{Deserialize, Serialize};
use xxhash_rust::xxh3::xxh3_64;

/// Points of a member whose weight is the reference weight.
///
/// Measured on 40 rings of 100 equal nodes in ten zones, with three copies: the fullest node is 2.6 % above the mean on
/// average and 3.6 % at worst. With 2048 points it is 3.7 % and 5.4 %, above the 5 % that are promised; 8192 would
/// double memory and build time for nothing that anyone notices.
pub const POINTS_REFERENCE: u32 = 4096;

/// Most points of one member, so that a wrong or hostile weight cannot make every other node allocate without bound.
/// A member above eight times the reference weight gets less than its share; `ReferenceWeight::fits` notices.
pub const POINTS_MAX: u32 = 8 * POINTS_REFERENCE;

/// Points per entry of the search table: an entry of 4 bytes then leads to one or two cache lines of positions.
const POINTS_PER_BUCKET: usize = 4;

/// First bytes under the hash of every point; keeps points apart from keys and from whatever else is hashed.
const DOMAIN_POINT: [u8; 4] = *b"ring";

const _: () = assert!(POINTS_REFERENCE > 0 && POINTS_MAX >= POINTS_REFERENCE);
const _: () = assert!(POINTS_PER_BUCKET.is_power_of_two());

/// A member of the cluster as the ring sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingMember {
    /// Who it is; its points follow from this.
    pub id: NodeId,
    /// What fails together with it; two copies of an object never share a zone.
    pub zone: u32,
    /// Its capacity, in the unit of the reference weight; 0 is a gateway, which holds no objects.
    pub weight: u64,
}

/// The weight that gets `POINTS_REFERENCE` points: the scale of the ring.
///
/// Chosen once for a cluster and kept with its settings, because another scale is another ring.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Serialize, Deserialize)]
pub struct ReferenceWeight(NonZeroU64);

impl ReferenceWeight {
    /// The scale given by a weight; `None` for 0, which scales nothing.
    pub const fn new(weight: u64) -> Option<Self> {
        match NonZeroU64::new(weight) {
            Some(weight) => Some(Self(weight)),
            None => None,
        }
    }

    /// The scale to choose when a cluster of these members is formatted, or reweighted on the operator's word: the mean
    /// weight of those that hold objects. `None` when there are only gateways.
    pub fn of(members: &[RingMember]) -> Option<Self> {
        let holder_count = members.iter().filter(|member| member.weight > 0).count() as u128;
        let total: u128 = members.iter().map(|member| u128::from(member.weight)).sum();
        let mean = total.checked_div(holder_count)?;
        assert!(mean <= u128::from(u64::MAX), "a mean is not above the largest weight");
        Self::new(mean as u64)
    }

    /// The weight itself, in the unit of `RingMember::weight`.
    pub const fn get(self) -> u64 {
        self.0.get()
    }

    /// Whether these members still suit the scale: no member is above what `POINTS_MAX` can express, and their mean is
    /// at least an eighth of it, below which balance gets coarse. When false, placement still works; an operator should
    /// be told that reweighting, which moves data, would spread it better.
    pub fn fits(self, members: &[RingMember]) -> bool {
        let largest = members.iter().map(|member| member.weight).max().unwrap_or(0);
        let limit = u128::from(self.get()) * u128::from(POINTS_MAX / POINTS_REFERENCE);
        let Some(mean) = Self::of(members) else { return true };
        u128::from(largest) <= limit && u128::from(mean.get()) * 8 >= u128::from(self.get())
    }

    /// How many points a weight is worth, rounded to the nearest; none only for weight 0.
    fn points(self, weight: u64) -> u32 {
        if weight == 0 {
            return 0;
        }
        let reference = u128::from(self.get());
        let exact = (u128::from(weight) * u128::from(POINTS_REFERENCE) + reference / 2) / reference;
        let points = exact.clamp(1, u128::from(POINTS_MAX)) as u32;
        assert!((1..=POINTS_MAX).contains(&points));
        points
    }
}

/// The ring of one epoch: immutable, built once per change of members.
///
/// It takes 13 bytes a point, thus about 5.3 MB at 100 nodes of the reference weight.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Ring {
    /// Those with a weight, by ascending id.
    members: Vec<RingMember>,
    /// Positions of all points, ascending.
    positions: Vec<u64>,
    /// Index into `members` of the owner of the point at the same index.
    owners: Vec<u32>,
    /// For each equal slice of the circle, the index of the first point at or after its start.
    buckets: Vec<u32>,
    /// A position shifted right by this is the index of its bucket; at most 63.
    bucket_shift: u32,
    zone_count: usize,
}

impl Ring {
    /// The ring of these members at this scale. Takes about 14 ms for 100 members of the reference weight.
    ///
    /// Ids are distinct; the caller's member list guarantees it.
    pub fn new(members: &[RingMember], reference: ReferenceWeight) -> Self {
        let mut members: Vec<RingMember> = members.iter().copied().filter(|member| member.weight > 0).collect();
        members.sort_unstable_by_key(|member| member.id);
        assert!(members.windows(2).all(|pair| pair[0].id < pair[1].id), "two members of one epoch share an id");

        let mut points = all_points(&members, reference);
        // The owner breaks a tie of positions, so the order is the same on every node.
        points.sort_unstable();
        let positions: Vec<u64> = points.iter().map(|&(position, _)| position).collect();
        let owners: Vec<u32> = points.iter().map(|&(_, owner)| owner).collect();
        let (buckets, bucket_shift) = search_table(&positions);
        let zone_count = count_zones(&members);

        assert!(zone_count <= members.len() && members.len() <= positions.len());
        Self { members, positions, owners, buckets, bucket_shift, zone_count }
    }

    /// Those that hold objects, by ascending id.
    pub fn members(&self) -> &[RingMember] {
        &self.members
    }

    /// Zones with at least one member that holds objects.
    pub fn zone_count(&self) -> usize {
        self.zone_count
    }

    /// Points of all members together.
    pub fn point_count(&self) -> usize {
        self.positions.len()
    }

    /// The owners of all points, clockwise from the first point at or after `position`; members repeat.
    pub fn walk(&self, position: u64) -> impl Iterator<Item = &RingMember> {
        let start = self.first_point_from(position);
        let (before, from) = self.owners.split_at(start);
        from.iter().chain(before).map(|&owner| &self.members[owner as usize])
    }

    /// Index of the first point at or after `position`; the number of points when there is none.
    fn first_point_from(&self, position: u64) -> usize {
        let bucket = (position >> self.bucket_shift) as usize;
        let start = self.buckets[bucket] as usize;
        let skipped = self.positions[start..].iter().take_while(|&&point| point < position).count();
        start + skipped
    }
}

/// Where the point with this number of this member lies.
fn point_position(id: NodeId, point_index: u32) -> u64 {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&DOMAIN_POINT);
    bytes[4..12].copy_from_slice(&id.get().to_le_bytes());
    bytes[12..].copy_from_slice(&point_index.to_le_bytes());
    xxh3_64(&bytes)
}

/// Position and owner index of every point, unordered.
fn all_points(members: &[RingMember], reference: ReferenceWeight) -> Vec<(u64, u32)> {
    let point_count: usize = members.iter().map(|member| reference.points(member.weight) as usize).sum();
    assert!(u32::try_from(point_count).is_ok(), "the search table holds 32-bit point indexes");
    let mut points = Vec::with_capacity(point_count);
    for (owner, member) in members.iter().enumerate() {
        let member_points = 0..reference.points(member.weight);
        points.extend(member_points.map(|index| (point_position(member.id, index), owner as u32)));
    }
    points
}

/// The first point of each equal slice of the circle, and the shift that turns a position into its slice.
fn search_table(positions: &[u64]) -> (Vec<u32>, u32) {
    // Two buckets at least: a shift by all 64 bits is not defined.
    let bucket_count = (positions.len() / POINTS_PER_BUCKET).next_power_of_two().max(2);
    let shift = u64::BITS - bucket_count.trailing_zeros();
    let mut buckets = Vec::with_capacity(bucket_count);
    let mut point = 0;
    for bucket in 0..bucket_count as u64 {
        let slice_start = bucket << shift;
        while point < positions.len() && positions[point] < slice_start {
            point += 1;
        }
        buckets.push(point as u32);
    }
    assert!(shift < u64::BITS && buckets.len() == bucket_count);
    (buckets, shift)
}

/// Number of distinct zones.
fn count_zones(members: &[RingMember]) -> usize {
    let mut zones: Vec<u32> = members.iter().map(|member| member.zone).collect();
    zones.sort_unstable();
    zones.dedup();
    zones.len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::vec;
    use proptest::prelude::*;

    fn member(id: u64, zone: u32, weight: u64) -> RingMember {
        RingMember { id: NodeId(id), zone, weight }
    }

    fn reference(weight: u64) -> ReferenceWeight {
        ReferenceWeight::new(weight).expect("not zero")
    }

    #[test]
    fn hash_of_a_point_is_frozen() {
        assert_eq!(point_position(NodeId(1), 0), 0x8211_b4d4_393b_88b6);
        assert_eq!(point_position(NodeId(1), 1), 0x13f9_cfd4_3ef9_9ab1);
        assert_eq!(point_position(NodeId(0x0123_4567_89ab_cdef), 2047), 0x2e15_fee0_809d_eca7);
    }

    #[test]
    fn points_follow_the_weight() {
        let scale = reference(1000);
        assert_eq!(scale.points(0), 0);
        assert_eq!(scale.points(1), 4);
        assert_eq!(scale.points(500), POINTS_REFERENCE / 2);
        assert_eq!(scale.points(1000), POINTS_REFERENCE);
        assert_eq!(scale.points(3000), 3 * POINTS_REFERENCE);
        assert_eq!(scale.points(u64::MAX), POINTS_MAX);
        assert_eq!(reference(u64::MAX).points(1), 1, "every member with a weight is on the ring");
        assert_eq!(reference(u64::MAX).points(u64::MAX), POINTS_REFERENCE);
        assert_eq!(reference(1).points(1), POINTS_REFERENCE);
    }

    #[test]
    fn the_scale_of_a_new_cluster_is_the_mean_of_those_that_hold_objects() {
        let members = [member(1, 1, 100), member(2, 2, 0), member(3, 3, 301)];
        assert_eq!(ReferenceWeight::of(&members), ReferenceWeight::new(200));
        assert_eq!(ReferenceWeight::of(&[member(2, 2, 0)]), None);
        assert_eq!(ReferenceWeight::of(&[]), None);
        assert_eq!(ReferenceWeight::of(&[member(1, 1, u64::MAX); 3]), ReferenceWeight::new(u64::MAX));
        assert_eq!(ReferenceWeight::new(0), None);
    }

    #[test]
    fn a_scale_far_from_the_members_is_noticed() {
        let scale = reference(800);
        assert!(scale.fits(&[member(1, 1, 100), member(2, 2, 6400)]));
        assert!(!scale.fits(&[member(1, 1, 800), member(2, 2, 6401)]), "one above what points can express");
        assert!(!scale.fits(&[member(1, 1, 99), member(2, 2, 99)]), "all far below");
        assert!(scale.fits(&[member(1, 1, 0)]), "gateways need no scale");
    }

    #[test]
    fn an_empty_ring_walks_nowhere() {
        for members in [vec![], vec![member(7, 1, 0)]] {
            let ring = Ring::new(&members, reference(1));
            assert_eq!((ring.zone_count(), ring.point_count(), ring.members().len()), (0, 0, 0));
            assert_eq!(ring.walk(0).count() + ring.walk(u64::MAX).count(), 0);
        }
    }

    #[test]
    fn a_walk_past_the_last_point_starts_again_at_the_first() {
        let ring = Ring::new(&[member(1, 1, 1), member(2, 1, 1)], reference(u64::MAX));
        assert_eq!(ring.point_count(), 2);
        let from_zero: Vec<NodeId> = ring.walk(0).map(|member| member.id).collect();
        let from_end: Vec<NodeId> = ring.walk(u64::MAX).map(|member| member.id).collect();
        assert_eq!(from_zero, from_end);
        assert_eq!(from_zero.len(), 2);
        let at_first: Vec<NodeId> = ring.walk(ring.positions[0]).map(|member| member.id).collect();
        let after_first: Vec<NodeId> = ring.walk(ring.positions[0] + 1).map(|member| member.id).collect();
        assert_eq!(at_first, from_zero, "a key on a point belongs to it");
        assert_eq!(after_first, [from_zero[1], from_zero[0]]);
    }

    #[test]
    #[should_panic(expected = "share an id")]
    fn two_members_of_one_id_are_a_broken_invariant() {
        Ring::new(&[member(1, 1, 1), member(1, 2, 1)], reference(1));
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        /// Invariant 1: the order in which members are listed does not matter.
        #[test]
        fn order_of_members_does_not_matter(ids in proptest::collection::btree_set(0u64..500, 0..9), turn in 0usize..9) {
            let mut members: Vec<RingMember> =
                ids.iter().map(|&id| member(id, id as u32 % 4, 1 + id % 5)).collect();
            let ring = Ring::new(&members, reference(100));
            if !members.is_empty() {
                let turn = turn % members.len();
                members.rotate_left(turn);
            }
            members.push(member(1000, 9, 0));
            prop_assert_eq!(ring, Ring::new(&members, reference(100)));
        }

        /// The search table finds what a plain search over all points finds, on and around every kind of position.
        #[test]
        fn search_agrees_with_binary_search(member_count in 0u64..6, weight in 1u64..200, random: u64, pick: prop::sample::Index) {
            let members: Vec<RingMember> = (0..member_count).map(|id| member(id, 0, weight)).collect();
            let ring = Ring::new(&members, reference(100));
            let mut probes = vec![random, 0, u64::MAX];
            if ring.point_count() > 0 {
                let point = ring.positions[pick.index(ring.point_count())];
                probes.extend([point.wrapping_sub(1), point, point.wrapping_add(1)]);
            }
            for probe in probes {
                prop_assert_eq!(ring.first_point_from(probe), ring.positions.partition_point(|&point| point < probe));
            }
        }

        /// Invariant 2: what one member does never moves the points of another.
        #[test]
        fn points_of_others_stay(before in 0u64..400, after in 0u64..400) {
            let others = [member(1, 1, 70), member(2, 2, 250)];
            let points_of_others = |weight| {
                let ring = Ring::new(&[others[0], others[1], member(9, 3, weight)], reference(100));
                let owned = ring.positions.iter().zip(&ring.owners).filter(|&(_, &owner)| owner < 2);
                owned.map(|(&position, &owner)| (position, owner)).collect::<Vec<_>>()
            };
            prop_assert_eq!(points_of_others(before), points_of_others(after));
        }
    }
}
