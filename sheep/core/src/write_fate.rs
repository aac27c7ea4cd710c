//! What became of a write whose gateway lost its lease before every holder had answered.
//!
//! Such a write may be in the copies that count, and others may have read it and written over it since: writing it once more
//! would bring an older value back. So each holder remembers with which stamp an object ended each of the last stints (lease
//! generations, and rounds within them: `Stamp::stint`) that wrote to it. A write of a stint took part in the object's history if
//! and only if its stamp is not above that end, because the writes of an object are applied in stamp order.
//!
//! Always holds: an answer other than `Unknown` is right for the object's history: only copies that are current take writes, so
//! what a copy saw end, ended so, even if the copy has moved elsewhere since. What is not remembered any more (a restart, what
//! happened before a copy was fetched, too many objects) is `Unknown`, never guessed.

use alloc::collections::{BTreeMap, VecDeque};

use crate::stamp::Stamp;

/// Stints remembered per object: a lease that two gateways fight for changes hands some hundred times a second, and one of
/// them may be away for ten seconds.
const ENDS_PER_OBJECT: usize = 8192;
/// Ends remembered for all objects together: 4 MiB. Beyond, everything is forgotten at once.
const ENDS_MAX: usize = 1 << 18;

/// What became of a write.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fate {
    /// It was applied; the object may have been written over since.
    Applied,
    /// It was not, and the object may have been written since.
    NotApplied,
    /// Nobody has written to the object under a later generation: writing it (again) changes nothing that anybody saw.
    Harmless,
    /// This copy cannot tell.
    Unknown,
}

/// One object.
#[derive(Clone, Debug, Default)]
struct Ends {
    /// Everything above this stint is remembered that anybody may ask for: of rounds, those that had writes under way.
    from: u64,
    /// Last stamps, ascending, one per stint.
    last_stamps: VecDeque<Stamp>,
    /// Of the last removal that was seen: where the object stands while there is none.
    removed: Option<Stamp>,
}

/// The ends of stints, by object.
#[derive(Debug, Default)]
pub struct WriteFates {
    objects: BTreeMap<u64, Ends>,
    /// Of all objects.
    end_count: usize,
}

impl WriteFates {
    /// A copy that stood at `before` takes its first write of a later stint.
    pub fn stint_ends(&mut self, object: u64, before: Stamp) {
        if self.end_count >= ENDS_MAX {
            self.forget_all();
        }
        // Nothing is known of the stints before the first one that was seen to end.
        let from = before.stint().saturating_sub(1);
        let known = self.objects.entry(object).or_insert_with(|| Ends { from, ..Ends::default() });
        if known.last_stamps.back().is_some_and(|last| last.stint() >= before.stint()) {
            return;
        }
        known.last_stamps.push_back(before);
        self.end_count += 1;
        if known.last_stamps.len() > ENDS_PER_OBJECT
            && let Some(dropped) = known.last_stamps.pop_front()
        {
            known.from = known.from.max(dropped.stint());
            self.end_count -= 1;
        }
    }

    /// The object was removed by this write.
    pub fn was_removed(&mut self, object: u64, stamp: Stamp) {
        // Where nothing is remembered, a write of a later stint says nothing about those before it.
        if let Some(known) = self.objects.get_mut(&object) {
            known.removed = Some(stamp);
        }
    }

    /// The stamp of the removal that took the object away, if it is remembered.
    pub fn removal(&self, object: u64) -> Option<Stamp> {
        self.objects.get(&object)?.removed
    }

    /// Nothing is known any more of one object.
    pub fn forget(&mut self, object: u64) {
        if let Some(known) = self.objects.remove(&object) {
            self.end_count -= known.last_stamps.len();
        }
    }

    /// The copy was fetched from another node, as of `now`: stints that wrote in between were not seen here.
    pub fn was_replaced(&mut self, object: u64, now: Stamp) {
        if let Some(known) = self.objects.get_mut(&object) {
            known.from = known.from.max(now.stint());
        }
    }

    /// Nothing is known any more.
    pub fn forget_all(&mut self) {
        self.objects.clear();
        self.end_count = 0;
    }

    /// What became of the write with stamp `asked`, as far as this node saw its stint end.
    pub fn seen(&self, object: u64, asked: Stamp) -> Fate {
        let Some(known) = self.objects.get(&object) else { return Fate::Unknown };
        match known.last_stamps.binary_search_by_key(&asked.stint(), |end| end.stint()) {
            Ok(at) if known.last_stamps[at].sequence >= asked.sequence => Fate::Applied,
            Ok(_) => Fate::NotApplied,
            Err(_) => Fate::Unknown,
        }
    }

    /// As `seen`, by a copy that is current and stands at `now` (`None`: there is no such object).
    pub fn fate(&self, object: u64, now: Option<Stamp>, asked: Stamp) -> Fate {
        if now.is_some_and(|now| now.generation <= asked.generation) {
            return Fate::Harmless;
        }
        match self.seen(object, asked) {
            // It would have been seen, had that stint written anything.
            Fate::Unknown if self.objects.get(&object).is_some_and(|known| known.from < asked.stint()) => {
                Fate::NotApplied
            }
            seen => seen,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(generation: u32, sequence: u64) -> Stamp {
        Stamp { generation, sequence }
    }

    #[test]
    fn a_write_is_told_from_the_end_of_its_generation() {
        let mut fates = WriteFates::default();
        fates.stint_ends(1, stamp(4, 10));
        fates.stint_ends(1, stamp(6, 3));
        let now = Some(stamp(9, 1));
        assert_eq!(fates.fate(1, now, stamp(4, 10)), Fate::Applied);
        assert_eq!(fates.fate(1, now, stamp(4, 11)), Fate::NotApplied);
        assert_eq!(fates.fate(1, now, stamp(5, 1)), Fate::NotApplied, "generation 5 wrote nothing here");
        assert_eq!(fates.fate(1, now, stamp(6, 3)), Fate::Applied);
        assert_eq!(fates.fate(1, now, stamp(3, 1)), Fate::Unknown, "before anything that was seen");
        assert_eq!(fates.fate(1, now, stamp(9, 5)), Fate::Harmless);
        assert_eq!(fates.fate(1, None, stamp(4, 10)), Fate::Applied);
    }

    #[test]
    fn a_removal_ends_a_generation_like_any_write() {
        let mut fates = WriteFates::default();
        fates.stint_ends(1, stamp(5, 10));
        // Generation 7 removes it, generation 8 makes it anew.
        fates.was_removed(1, stamp(7, 4));
        let before = fates.removal(1).unwrap();
        fates.stint_ends(1, before);
        let now = Some(stamp(8, 2));
        assert_eq!(fates.fate(1, now, stamp(7, 4)), Fate::Applied);
        assert_eq!(fates.fate(1, now, stamp(7, 5)), Fate::NotApplied);
        fates.was_removed(2, stamp(7, 4));
        assert_eq!(fates.removal(2), None, "nothing before it is known either");
        fates.forget(1);
        assert_eq!(fates.fate(1, now, stamp(7, 5)), Fate::Unknown);
        assert_eq!(fates.end_count, 0);
    }

    #[test]
    fn a_write_that_was_sent_again_is_told_from_the_end_of_each_round() {
        // Sent as 10 after 9, then both again; the lease is lost when the first of them came.
        let again = |count| stamp(4, Stamp::begin_round(count));
        let mut kept_it = WriteFates::default();
        kept_it.stint_ends(1, stamp(4, 10));
        kept_it.stint_ends(1, again(11));
        let mut lost_it = WriteFates::default();
        lost_it.stint_ends(1, stamp(4, 8));
        lost_it.stint_ends(1, again(11));
        let now = Some(stamp(5, 1));
        for fates in [&kept_it, &lost_it] {
            assert_eq!(fates.fate(1, now, again(11)), Fate::Applied);
            assert_eq!(fates.fate(1, now, again(12)), Fate::NotApplied);
        }
        assert_eq!(kept_it.fate(1, now, stamp(4, 10)), Fate::Applied);
        assert_eq!(lost_it.fate(1, now, stamp(4, 10)), Fate::NotApplied, "what came later hides it not");
    }

    #[test]
    fn what_was_not_seen_is_unknown() {
        let mut fates = WriteFates::default();
        assert_eq!(fates.fate(1, Some(stamp(9, 1)), stamp(4, 10)), Fate::Unknown);
        fates.stint_ends(1, stamp(4, 10));
        fates.was_replaced(1, stamp(7, 3));
        let now = Some(stamp(9, 1));
        assert_eq!(fates.fate(1, now, stamp(4, 10)), Fate::Applied, "that was seen");
        assert_eq!(fates.fate(1, now, stamp(6, 1)), Fate::Unknown, "that was not");
        assert_eq!(fates.fate(1, now, stamp(8, 1)), Fate::NotApplied, "nor was it there");
        assert_eq!(fates.seen(1, stamp(8, 1)), Fate::Unknown);
        for generation in 1..=10_000 {
            fates.stint_ends(2, stamp(generation, 1));
        }
        assert_eq!(fates.fate(2, Some(stamp(20_000, 1)), stamp(20, 1)), Fate::Unknown, "too long ago");
        assert_eq!(fates.fate(2, Some(stamp(20_000, 1)), stamp(9000, 1)), Fate::Applied);
        for object in 10..1_000_000 {
            fates.stint_ends(object, stamp(1, 1));
            assert!(fates.end_count <= ENDS_MAX);
        }
    }
}
