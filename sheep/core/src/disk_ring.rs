//! Inside one node: which of its disks an object lies on.
//!
//! Weighted rendezvous: every disk draws a number for the key, scaled by the disk's weight, and the smallest wins. A
//! node has a handful of disks, so asking each is cheaper than a ring, needs no scale that would have to be remembered,
//! and follows the weights exactly, however different the disks are. This file does not know where objects lie now; the
//! store looks there when an object is not where this answer says.
//!
//! Always holds:
//! 1. The answer depends on the set of (id, weight) and the key, not on the order of the disks or on history.
//! 2. Removing a disk, or taking weight from it, moves only objects that were on it; adding one, or giving weight, moves
//!    objects only to it.
//! 3. A disk of weight 0 gets nothing.
//! 4. Objects of one placement key share a disk, so a copy-on-write is a copy inside one file system.
//!
//! The draw is part of the stored state; the golden test freezes it. It uses only additions, multiplications and
//! divisions of IEEE numbers, which every machine rounds alike.

use crate::placement::PlacementKey;
use alloc::vec::Vec;
use xxhash_rust::xxh3::xxh3_64;

/// First bytes under the hash of a draw: independent of the hash that chose the node.
const DOMAIN_DISK: [u8; 4] = *b"disk";

/// A disk as the choice sees it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct RingDisk {
    /// Lasting identity, chosen when the disk was added to the node; no two disks of a node share one.
    pub id: u64,
    /// Its capacity, in any unit that is the same for all disks of the node; 0 takes no objects.
    pub weight: u64,
}

/// The disks of a node, ready to be asked.
#[derive(Clone, PartialEq, Debug)]
pub struct DiskRing {
    slots: Vec<Slot>,
}

/// A disk that takes objects.
#[derive(Clone, Copy, PartialEq, Debug)]
struct Slot {
    id: u64,
    /// Above zero.
    weight: f64,
    /// Index in the list the caller gave.
    index: usize,
}

impl DiskRing {
    /// The choice among these disks. Ids are distinct; the caller's list of disks guarantees it.
    pub fn new(disks: &[RingDisk]) -> Self {
        let weighted = disks.iter().enumerate().filter(|(_, disk)| disk.weight > 0);
        let mut slots: Vec<Slot> =
            weighted.map(|(index, disk)| Slot { id: disk.id, weight: disk.weight as f64, index }).collect();
        slots.sort_unstable_by_key(|slot| slot.id);
        assert!(slots.windows(2).all(|pair| pair[0].id < pair[1].id), "two disks of a node share an id");
        Self { slots }
    }

    /// Index, in the list given to `new`, of the disk for the objects of this key; `None` when no disk has weight.
    /// Takes about 40 ns per disk of a node with a few, less with many.
    pub fn disk_index(&self, key: PlacementKey) -> Option<usize> {
        if let [only] = self.slots.as_slice() {
            return Some(only.index);
        }
        let mut chosen = None;
        let mut smallest = f64::INFINITY;
        for slot in &self.slots {
            let uniform = uniform(slot.id, key);
            // The logarithm is the dear part, and -ln(u) is at least 1 - u: most losers are known without it.
            if 1.0 - uniform >= smallest * slot.weight {
                continue;
            }
            // A sample of the exponential distribution whose rate is the weight. The smallest of several such samples is
            // disk i's with probability weight i over the sum of weights.
            let drawn = -natural_logarithm(uniform) / slot.weight;
            // Strictly smaller: on a tie the lower id stays.
            if drawn < smallest {
                smallest = drawn;
                chosen = Some(slot.index);
            }
        }
        chosen
    }
}

/// What a disk draws for a key: a number between 0 and 1, never either.
fn uniform(disk_id: u64, key: PlacementKey) -> f64 {
    let mut bytes = [0; 20];
    bytes[..4].copy_from_slice(&DOMAIN_DISK);
    bytes[4..12].copy_from_slice(&disk_id.to_le_bytes());
    bytes[12..].copy_from_slice(&key.get().to_le_bytes());
    // 52 bits and a half: a double holds them exactly.
    ((xxh3_64(&bytes) >> 12) as f64 + 0.5) * (1.0 / (1_u64 << 52) as f64)
}

/// Natural logarithm of a normal number in (0, 1), right to about 1e-15 of its value; `core` has none.
fn natural_logarithm(value: f64) -> f64 {
    const MANTISSA_BITS: u32 = f64::MANTISSA_DIGITS - 1;
    const EXPONENT_BIAS: i64 = 1023;
    /// 1/19, 1/17, ... 1/3, 1
    const SERIES: [f64; 10] =
        [1.0 / 19.0, 1.0 / 17.0, 1.0 / 15.0, 1.0 / 13.0, 1.0 / 11.0, 1.0 / 9.0, 1.0 / 7.0, 1.0 / 5.0, 1.0 / 3.0, 1.0];
    assert!((f64::MIN_POSITIVE..1.0).contains(&value));
    let bits = value.to_bits();
    let mut exponent = (bits >> MANTISSA_BITS) as i64 - EXPONENT_BIAS;
    let mantissa_bits = bits & ((1 << MANTISSA_BITS) - 1);
    let mut mantissa = f64::from_bits(mantissa_bits | (EXPONENT_BIAS as u64) << MANTISSA_BITS);
    // Centre the mantissa on 1: the series then converges fast, and a value just below 1 keeps its precision.
    if mantissa > core::f64::consts::SQRT_2 {
        mantissa *= 0.5;
        exponent += 1;
    }
    // ln(m) = 2 (s + s^3/3 + s^5/5 + ...) with s = (m - 1) / (m + 1), |s| < 0.172: what is left out is below 1e-17.
    let s = (mantissa - 1.0) / (mantissa + 1.0);
    let square = s * s;
    let sum = SERIES.iter().fold(0.0, |sum, factor| sum * square + factor);
    2.0 * s * sum + exponent as f64 * core::f64::consts::LN_2
}

#[cfg(test)]
mod tests {
    extern crate std;
    use super::*;
    use crate::placement::placement_key;
    use alloc::vec;
    use proptest::prelude::*;
    use qemu_proto::oid::{Oid, VdiId};

    fn key(index: u32) -> PlacementKey {
        let root = VdiId::new(0x7c_2b25).expect("a VDI id");
        placement_key(root, Oid::data(root, index))
    }

    fn disk(id: u64, weight: u64) -> RingDisk {
        RingDisk { id, weight }
    }

    /// Id of the disk, whatever its place in the list.
    fn chosen(disks: &[RingDisk], index: u32) -> Option<u64> {
        DiskRing::new(disks).disk_index(key(index)).map(|index| disks[index].id)
    }

    #[test]
    fn choices_are_frozen() {
        let disks = [disk(11, 4000), disk(22, 4000), disk(33, 8000), disk(44, 500)];
        let ring = DiskRing::new(&disks);
        let choices: Vec<usize> = (0..16).filter_map(|index| ring.disk_index(key(index))).collect();
        assert_eq!(choices, [1, 1, 1, 0, 1, 2, 2, 1, 2, 0, 2, 1, 0, 3, 0, 2]);
    }

    #[test]
    fn logarithm_agrees_with_the_library() {
        let mut worst: f64 = 0.0;
        let halves = (1..=53).map(|exponent| 1.0 / (1_u64 << exponent) as f64);
        let just_below_one = (1..=52).map(|exponent| 1.0 - 1.0 / (1_u64 << exponent) as f64);
        let spread = (1..100_000).map(|step| f64::from(step) / 100_000.0);
        for value in halves.chain(just_below_one).chain(spread) {
            let exact = f64::ln(value);
            worst = worst.max(((natural_logarithm(value) - exact) / exact).abs());
        }
        assert!(worst < 2e-15, "{worst}");
    }

    #[test]
    fn without_a_disk_there_is_no_answer() {
        assert_eq!(chosen(&[], 1), None);
        assert_eq!(chosen(&[disk(1, 0)], 1), None);
        assert_eq!(chosen(&[disk(1, 0), disk(2, 7)], 1), Some(2));
    }

    #[test]
    fn load_follows_weight() {
        let disks = [disk(1, 1), disk(2, 2), disk(3, 5), disk(4, 0)];
        let ring = DiskRing::new(&disks);
        let key_count = 40_000;
        let mut loads = vec![0_u32; disks.len()];
        for index in 0..key_count {
            loads[ring.disk_index(key(index)).expect("disks with weight")] += 1;
        }
        for (disk, load) in disks.iter().zip(loads) {
            let fair = f64::from(key_count) * disk.weight as f64 / 8.0;
            // Four standard deviations at the smallest share.
            assert!((f64::from(load) - fair).abs() <= fair * 0.06, "disk {} holds {load} of {fair}", disk.id);
        }
    }

    #[test]
    #[should_panic(expected = "share an id")]
    fn two_disks_of_one_id_are_a_broken_invariant() {
        DiskRing::new(&[disk(1, 1), disk(1, 2)]);
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(128))]

        /// Invariants 1 to 3.
        #[test]
        fn only_what_must_move_moves(
            disks in proptest::collection::btree_map(0_u64..1000, prop_oneof![Just(0), 1_u64..9, Just(u64::MAX)], 0..8),
            weights in (0_u64..20, 0_u64..20),
            start in 0_u32..1 << 30,
            turn in 0_usize..8,
        ) {
            let others: Vec<RingDisk> = disks.into_iter().map(|(id, weight)| disk(id, weight)).collect();
            let with = |weight| {
                let mut disks = others.clone();
                disks.push(disk(5000, weight));
                let turn = turn % disks.len();
                disks.rotate_left(turn);
                disks
            };
            let (lighter, heavier) = (with(weights.0.min(weights.1)), with(weights.0.max(weights.1)));
            for index in start..start + 60 {
                let (without, before, after) = (chosen(&others, index), chosen(&lighter, index), chosen(&heavier, index));
                prop_assert!(after == before || after == Some(5000));
                prop_assert!(before == without || before == Some(5000));
                prop_assert!(lighter.iter().all(|disk| disk.weight > 0 || before != Some(disk.id)));
            }
        }
    }
}
