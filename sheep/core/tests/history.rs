//! Which copy is the newest: the stories that the rule was made for.

use qemu_proto::oid::{Oid, VdiId};
use sheep_core::cluster_state::ClusterState;
use sheep_core::command::Command;
use sheep_core::copies::Copies;
use sheep_core::history::{Answer, Decision, History};
use sheep_core::level::Level;
use sheep_core::member::{Member, NodeId};
use sheep_core::placement::{PlacementKey, placement_key};
use sheep_core::stamp::{Epoch, Stamp, Version};

const A: u64 = 1;
const B: u64 = 2;
const C: u64 = 3;
const COPIES: Copies = Copies::always(3);

struct Story {
    state: ClusterState,
}

impl Story {
    fn begin() -> Story {
        Story::begin_at(Level::OURS)
    }

    fn begin_at(level: Level) -> Story {
        let mut story = Story { state: ClusterState::default() };
        for node in [A, B, C] {
            story.joins(node);
        }
        let format = Command::Format { cluster_id: 1, copies: 3, object_size_shift: 22, flags: 0, time: 0 };
        story.state.apply(&format);
        story.state.apply(&Command::RaiseLevel { level });
        story
    }

    fn joins(&mut self, node: u64) {
        self.joins_as(node, 0);
    }

    fn joins_as(&mut self, node: u64, boot: u64) {
        self.joins_with(node, boot, 100);
    }

    fn joins_with(&mut self, node: u64, boot: u64, weight: u64) {
        let member = Member {
            id: NodeId(node),
            address: [0; 16],
            port: node as u16,
            peer_endpoint: String::new(),
            boot,
            zone: node as u32,
            weight,
            level: Level::OURS,
        };
        self.state.apply(&Command::Join { member, time: 0 });
    }

    fn dies(&mut self, node: u64) {
        self.state.apply(&Command::Evict { nodes: vec![NodeId(node)], time: 0 });
    }

    fn ends_clean(&mut self) {
        let epoch = self.state.epoch;
        for node in self.state.members.keys().copied().collect::<Vec<_>>() {
            self.state.apply(&Command::Recovered { node, epoch });
        }
        assert_eq!(self.state.clean, epoch);
    }

    fn may_defer(&self, own: &Answer) -> bool {
        self.may_defer_beside(own, 1)
    }

    fn may_defer_beside(&self, own: &Answer, min_copies: u8) -> bool {
        self.may_defer_having_heard(own, min_copies, &[A, B, C])
    }

    fn may_defer_having_heard(&self, own: &Answer, min_copies: u8, heard: &[u64]) -> bool {
        let heard = heard.iter().copied().map(NodeId).collect();
        History::of(&self.state, None).may_defer(own, key(), COPIES, min_copies, &heard)
    }

    fn has_steady_holder(&self) -> bool {
        History::of(&self.state, None).has_steady_holder(key(), COPIES)
    }

    fn keeps(&self, answer: &Answer, newest: Stamp) -> bool {
        History::of(&self.state, None).keeps(answer, newest, key(), COPIES)
    }

    fn decide(&self, answers: &[Answer]) -> Decision {
        History::of(&self.state, None).decide(key(), COPIES, answers)
    }
}

fn key() -> PlacementKey {
    let vdi = VdiId::from_low_bits(5);
    placement_key(vdi, Oid::data(vdi, 7))
}

fn stamp(generation: u32, sequence: u64) -> Stamp {
    Stamp { generation, sequence }
}

fn has(node: u64, epoch: u32, stamp: Stamp, clean_through: u32) -> Answer {
    let version = Some(Version { epoch: Epoch(epoch), stamp });
    Answer { node: NodeId(node), version, clean_through: Epoch(clean_through), met_nobody: false, met_before: None }
}

fn has_nothing(node: u64, clean_through: u32) -> Answer {
    Answer {
        node: NodeId(node),
        version: None,
        clean_through: Epoch(clean_through),
        met_nobody: false,
        met_before: None,
    }
}

fn having_met_nobody(answer: Answer, met_before: u32) -> Answer {
    Answer { met_nobody: true, met_before: Some(Epoch(met_before)), ..answer }
}

fn newest(stamp: Stamp, nodes: &[u64]) -> Decision {
    Decision::Newest { stamp, nodes: nodes.iter().copied().map(NodeId).collect() }
}

#[test]
fn after_a_gateway_died_in_the_middle_the_highest_stamp_wins() {
    let mut story = Story::begin();
    story.dies(A);
    assert_eq!(story.decide(&[has(B, 1, stamp(1, 9), 1), has(C, 1, stamp(1, 8), 1)]), newest(stamp(1, 9), &[B]));
}

#[test]
fn what_a_dead_node_alone_has_does_not_come_back_over_what_was_served_meanwhile() {
    let mut story = Story::begin();
    story.dies(A);
    story.joins(A);
    // A applied 1.9 and died before B and C had it; they served 1.8 in epoch 2.
    let answers = [has(A, 1, stamp(1, 9), 1), has(B, 1, stamp(1, 8), 1), has(C, 1, stamp(1, 8), 1)];
    assert_eq!(story.decide(&answers), newest(stamp(1, 8), &[B, C]));
}

#[test]
fn a_stale_copy_is_not_served_while_nobody_of_the_later_epoch_is_heard() {
    // Epoch 1 on A B C; 2 on A B; then A and B die and C returns.
    let mut story = Story::begin();
    story.dies(C);
    story.dies(A);
    story.joins(C);
    story.dies(B);
    assert_eq!(story.decide(&[has(C, 1, stamp(1, 5), 1)]), Decision::Unheard(Epoch(2)));
    let history = History::of(&story.state, None);
    // Objects made in epoch 2 are only on A and B.
    assert_eq!(history.possibly_out_of_sight(COPIES.now()), Some(Epoch(2)));
    story.joins(A);
    let answers = [has(C, 1, stamp(1, 5), 1), has(A, 2, stamp(2, 1), 1)];
    // Epoch 3 and 4 had B, who is not here: A's word about 2 is not enough.
    assert_eq!(story.decide(&answers), Decision::Unheard(Epoch(3)));
    story.joins(B);
    let answers = [answers[0], answers[1], has(B, 3, stamp(3, 1), 1)];
    assert_eq!(story.decide(&answers), newest(stamp(3, 1), &[B]));
}

#[test]
fn the_operators_word_replaces_the_missing_witnesses() {
    let mut story = Story::begin();
    story.dies(C);
    story.dies(A);
    story.dies(B);
    story.joins(C);
    assert!(matches!(story.decide(&[has(C, 1, stamp(1, 5), 1)]), Decision::Unheard(_)));
    story.state.apply(&Command::ForceRecover { time: 0 });
    assert_eq!(story.decide(&[has(C, 1, stamp(1, 5), 1)]), newest(stamp(1, 5), &[C]));
}

#[test]
fn what_another_era_wrote_is_newer_than_what_the_given_up_majority_went_on_to() {
    let mut story = Story::begin();
    story.state.begin_era(&[NodeId(A), NodeId(B)], 0);
    let era = story.state.epoch.get();
    let on_the_other_side = has(A, 3, stamp(2, 9), 1);
    // Untouched in this era, the majority's writes are the newest there are.
    let untouched = has(C, 1, stamp(1, 5), 1);
    story.joins(A);
    assert_eq!(story.decide(&[untouched, on_the_other_side]), newest(stamp(2, 9), &[A]));
    let written = has(C, era, stamp(70_000, 1), 1);
    assert_eq!(story.decide(&[written, on_the_other_side]), newest(stamp(70_000, 1), &[C]));
    // While the newcomer is being brought up to date the one that stayed does not forget that it stayed.
    story.joins(B);
    assert_eq!(story.decide(&[written, on_the_other_side]), newest(stamp(70_000, 1), &[C]));
}

#[test]
fn what_only_one_of_those_who_went_on_has_is_waited_for() {
    let mut story = Story::begin();
    let one_copy = |story: &Story, answers: &[Answer]| History::of(&story.state, None).decide(key(), 1.into(), answers);
    let owner = History::of(&story.state, None).holders(key(), 1.into())[0].get();
    let rest: Vec<u64> = [A, B, C].into_iter().filter(|node| *node != owner).collect();
    let (other, gone) = (rest[0], rest[1]);
    story.state.begin_era(&[NodeId(gone)], 0);
    // It is out of sight before it was compared with anybody: nobody gave up what it has.
    story.dies(owner);
    assert_eq!(one_copy(&story, &[has_nothing(other, 1)]), Decision::Unheard(Epoch(1)));
    assert_eq!(History::of(&story.state, None).possibly_out_of_sight(1), Some(Epoch(1)));
    story.joins(owner);
    let answers = [has_nothing(other, 1), has(owner, 1, stamp(1, 5), 1)];
    assert_eq!(one_copy(&story, &answers), newest(stamp(1, 5), &[owner]));
    assert_eq!(History::of(&story.state, None).possibly_out_of_sight(1), None);
}

#[test]
fn a_removed_object_does_not_come_back_with_a_node_that_was_away() {
    let mut story = Story::begin();
    story.dies(C);
    story.joins(C);
    let answers = [has_nothing(A, 1), has_nothing(B, 1), has(C, 1, stamp(1, 5), 1)];
    assert_eq!(story.decide(&answers), Decision::Absent);
}

#[test]
fn a_wiped_node_has_nothing_to_say() {
    let mut story = Story::begin();
    story.dies(C);
    story.ends_clean();
    story.joins(C);
    let answers = [has(A, 1, stamp(1, 5), 2), has(B, 1, stamp(1, 5), 2), has_nothing(C, 0)];
    assert_eq!(story.decide(&answers), newest(stamp(1, 5), &[A, B]));
}

#[test]
fn a_copy_that_was_away_but_has_the_newest_stamp_counts_as_old_but_equal() {
    let mut story = Story::begin();
    story.dies(C);
    story.ends_clean();
    story.joins(C);
    let answers = [has(A, 1, stamp(1, 5), 2), has(B, 1, stamp(1, 5), 2), has(C, 1, stamp(1, 5), 1)];
    // Not named as a source, but its stamp says that its content is the same: nothing travels.
    assert_eq!(story.decide(&answers), newest(stamp(1, 5), &[A, B]));
}

#[test]
fn after_everybody_crashed_the_highest_stamp_of_those_who_are_back_wins() {
    let mut story = Story::begin();
    story.state = story.state.clone().restarted();
    for node in [A, B, C] {
        story.joins(node);
    }
    assert!(story.state.is_running());
    let answers = [has(A, 1, stamp(1, 7), 1), has(B, 1, stamp(1, 9), 1), has(C, 1, stamp(1, 8), 1)];
    assert_eq!(story.decide(&answers), newest(stamp(1, 9), &[B]));
}

#[test]
fn what_is_shown_where_nobody_is_steady_must_not_lose_against_who_is_away() {
    // After a blackout A and B are back.
    let mut story = Story::begin();
    story.state = story.state.clone().restarted();
    story.joins(A);
    story.joins(B);
    story.state.apply(&Command::StopWaiting { time: 0 });
    assert!(!story.has_steady_holder());
    let of_a = has(A, 1, stamp(1, 9), 1);
    assert!(story.keeps(&of_a, stamp(1, 9)), "C was in no epoch since");
    assert!(!story.keeps(&has(B, 1, stamp(1, 8), 1), stamp(1, 9)));
    assert!(!story.keeps(&has_nothing(B, 1), stamp(1, 9)));
    // Shown before B has it, it would be gone with A: B witnesses that epoch 2 promised nothing.
    story.dies(A);
    story.joins(C);
    let older = [has(B, 1, stamp(1, 8), 1), has(C, 1, stamp(1, 8), 1)];
    assert_eq!(story.decide(&older), newest(stamp(1, 8), &[B, C]));
    // 5: A without B, which was in epochs that A's copy does not show.
    story.dies(B);
    story.joins(A);
    assert!(!story.has_steady_holder());
    assert!(!story.keeps(&of_a, stamp(1, 9)), "B may have gone further");
    let epoch = story.state.epoch.get();
    assert!(story.keeps(&has(A, epoch, stamp(1, 9), 1), stamp(1, 9)));
    story.joins(B);
    assert!(story.keeps(&of_a, stamp(1, 9)), "whoever is here is asked");
}

#[test]
fn who_came_back_after_an_orderly_stop_is_not_steady_though_the_epoch_goes_on() {
    let mut story = Story::begin_at(Level::SHRINKING);
    story.dies(C);
    story.joins(C);
    story.ends_clean();
    story.dies(C);
    assert!(story.has_steady_holder());
    story.joins(C);
    assert!(story.has_steady_holder() && story.may_defer(&has(C, 1, stamp(1, 5), 1)));
    let epoch = story.state.epoch;
    story.state.apply(&Command::Shutdown);
    story.state.apply(&Command::Restart);
    for node in [A, B, C] {
        story.joins_as(node, 7);
    }
    assert!(story.state.is_running());
    assert_eq!(story.state.epoch, epoch);
    assert!(!story.has_steady_holder() && !story.may_defer(&has(C, 1, stamp(1, 5), 1)));
    // Nor in the next epoch, until it has been found what everybody has.
    story.dies(C);
    assert!(!story.has_steady_holder());
    story.ends_clean();
    story.joins(C);
    assert!(story.has_steady_holder());
}

#[test]
fn what_is_shown_where_nobody_is_steady_must_not_lose_against_a_former_holder_either() {
    // 2: A and C are there, 3: after a blackout B is as well, and holds some objects instead of C.
    let copies = Copies::always(2);
    let mut story = Story::begin();
    story.dies(B);
    story.ends_clean();
    story.state = story.state.clone().restarted();
    for node in [B, A, C] {
        story.joins(node);
    }
    assert_eq!(story.state.epoch, Epoch(3));
    let history = History::of(&story.state, None);
    let held_by = |index: u32, node: u64| {
        let vdi = VdiId::from_low_bits(7);
        let key = placement_key(vdi, Oid::data(vdi, index));
        history.held(NodeId(node), Epoch(3), key, copies).then_some(key)
    };
    let moved = (0..100).find_map(|index| held_by(index, A).and(held_by(index, B))).expect("there are enough");
    let (shown, before) = (stamp(1, 9), stamp(1, 8));
    let fetched = has(B, 0, shown, 1);
    assert!(!history.keeps(&fetched, shown, moved, copies), "C's copy counts as newer than this one");
    let kept = has(B, 3, shown, 1);
    assert!(history.keeps(&kept, shown, moved, copies));
    story.dies(A);
    let history = History::of(&story.state, None);
    let of_c = has(C, 2, before, 2);
    assert_eq!(history.decide(moved, copies, &[of_c, fetched]), newest(before, &[C]));
    assert_eq!(history.decide(moved, copies, &[of_c, kept]), newest(shown, &[B]));
}

#[test]
fn who_came_back_after_an_orderly_stop_is_steady_when_all_have_looked_again() {
    let mut story = Story::begin();
    story.dies(C);
    story.joins(C);
    story.ends_clean();
    let epoch = story.state.epoch;
    for (boot, looks_again) in [(7, false), (8, true)] {
        story.state.apply(&Command::StopAll);
        story.state.apply(&Command::Restart);
        for node in [A, B, C] {
            story.joins_as(node, boot);
        }
        assert!(story.state.is_running() && story.state.epoch == epoch);
        if looks_again {
            story.ends_clean();
        }
        let mut later = Story { state: story.state.clone() };
        later.dies(C);
        later.joins(C);
        assert_eq!(later.has_steady_holder(), looks_again);
    }
}

#[test]
fn who_deferred_writes_is_no_witness_of_them() {
    // 2: C is dead, A and B have everything; 3: C is back and answers writes before its copy has them.
    let mut story = Story::begin();
    story.dies(C);
    story.ends_clean();
    story.joins(C);
    let stale = has(C, 1, stamp(1, 5), 1);
    assert!(story.may_defer(&stale) && story.may_defer_beside(&stale, 2));
    assert!(!story.may_defer(&has(A, 2, stamp(1, 8), 2)), "a steady holder has every write");
    assert!(!story.may_defer_having_heard(&stale, 1, &[]), "they may be dead");
    assert!(story.may_defer_having_heard(&stale, 1, &[B]) && !story.may_defer_having_heard(&stale, 2, &[B]));
    // 4: B dies, A takes more and C defers on; 5: A dies; 6: B is back.
    story.dies(B);
    assert!(story.may_defer(&stale));
    assert!(!story.may_defer_beside(&stale, 2), "A's would be the only copy that outlasts a crash of C");
    story.dies(A);
    assert_eq!(story.decide(&[stale]), Decision::Unheard(Epoch(2)));
    story.joins(B);
    let of_b = has(B, 3, stamp(1, 9), 2);
    assert!(!story.may_defer(&stale), "nobody is steady any more");
    // Only A knows what 4 took.
    assert_eq!(story.decide(&[stale, of_b]), Decision::Unheard(Epoch(4)));
    let caught_up = has(C, 4, stamp(2, 1), 1);
    assert_eq!(story.decide(&[caught_up, of_b]), newest(stamp(2, 1), &[C]));
    story.joins(A);
    assert_eq!(story.decide(&[stale, of_b, has(A, 4, stamp(2, 1), 2)]), newest(stamp(2, 1), &[A]));
}

#[test]
fn a_node_that_came_back_at_once_may_defer_and_is_no_witness_either() {
    let mut story = Story::begin();
    story.joins(C);
    let stale = has(C, 1, stamp(1, 5), 1);
    assert!(story.may_defer(&stale));
    story.state.apply(&Command::Evict { nodes: vec![NodeId(A), NodeId(B)], time: 0 });
    assert_eq!(story.decide(&[stale]), Decision::Unheard(Epoch(2)));
}

#[test]
fn a_dead_host_that_seemed_steady_is_not_waited_for_after_an_outage() {
    // All three lose power. C is out in 2 and back in 3, B in 4 and 5, before A, who does not come back, is given up in 6.
    let mut story = Story::begin();
    story.joins(C);
    story.joins(B);
    story.dies(A);
    let silent = [has(B, 1, stamp(1, 5), 1), has(C, 1, stamp(1, 5), 1)];
    assert_eq!(story.decide(&silent), Decision::Unheard(Epoch(4)), "beside A one of them may have answered early");
    let answers = [silent[0], having_met_nobody(silent[1], 1)];
    assert_eq!(story.decide(&answers), newest(stamp(1, 5), &[B]), "A was dead when 4 began");
    // What an earlier process of C met in 4 is not known, or it did meet A.
    assert_eq!(story.decide(&[silent[0], Answer { met_before: None, ..answers[1] }]), Decision::Unheard(Epoch(4)));
    assert_eq!(story.decide(&[silent[0], having_met_nobody(silent[1], 4)]), Decision::Unheard(Epoch(4)));
    assert_eq!(story.decide(&[silent[0], having_met_nobody(silent[1], 3)]), newest(stamp(1, 5), &[B]));
    // Or this one did.
    assert_eq!(story.decide(&[silent[0], Answer { met_nobody: false, ..answers[1] }]), Decision::Unheard(Epoch(4)));
}

#[test]
fn whom_a_node_met_counts_where_it_was_steady_and_held_the_object() {
    let mut story = Story::begin();
    story.joins(C);
    story.joins(B);
    story.dies(A);
    let history = History::of(&story.state, None);
    let met = |epoch, node| {
        let met = [(Epoch(epoch), [NodeId(node)].into())].into();
        history.met_steady(&met, key(), COPIES)
    };
    assert!(met(4, A) && met(2, A) && met(2, B), "they had everything then");
    assert!(!met(4, C) && !met(5, B), "they had come back");
    assert!(!met(6, A), "the present epoch does not count");
    let elsewhere =
        (0..).map(|index| placement_key(VdiId::from_low_bits(5), Oid::data(VdiId::from_low_bits(5), index)));
    let mut elsewhere = elsewhere.filter(|key| !history.holders(*key, 1.into()).contains(&NodeId(B)));
    let key = elsewhere.next().unwrap();
    assert!(!history.met_steady(&[(Epoch(2), [NodeId(B)].into())].into(), key, 1.into()), "it does not hold that one");
}

#[test]
fn a_copy_that_would_seem_to_have_gone_on_may_not_defer() {
    // C has an object's write of epoch 3 and did not get to recover the rest before 4 began.
    let mut story = Story::begin();
    story.dies(C);
    story.ends_clean();
    story.joins(C);
    let written = has(C, 3, stamp(2, 1), 1);
    story.dies(B);
    assert!(!story.may_defer(&written));
    assert!(story.may_defer(&has(C, 1, stamp(1, 5), 1)));
}

#[test]
fn after_a_power_cut_nobody_defers_and_two_of_three_suffice() {
    let mut story = Story::begin();
    story.state.apply(&Command::Evict { nodes: vec![NodeId(A), NodeId(B), NodeId(C)], time: 0 });
    let all = [A, B, C].map(|node| has(node, 1, stamp(1, 5), 1));
    for node in [A, B] {
        story.joins(node);
        assert!(all.iter().all(|answer| !story.may_defer(answer)));
    }
    assert_eq!(story.decide(&all[..2]), newest(stamp(1, 5), &[A, B]));
}

#[test]
fn objects_with_one_copy_may_be_out_of_sight_when_any_node_is_missing() {
    let mut story = Story::begin();
    story.dies(C);
    let history = History::of(&story.state, None);
    assert_eq!(history.possibly_out_of_sight(1), Some(Epoch(1)));
    assert_eq!(history.possibly_out_of_sight(2), None);
}

#[test]
fn the_holders_of_an_epoch_are_those_of_its_number_of_copies() {
    // One copy in epoch 1, two from 2 on.
    let mut story = Story::begin();
    let copies = Copies::always(1).changed(2, Epoch(2));
    let alter = |vdi, copies, time| Command::AlterCopies { vdi, copies, time };
    story.state.apply(&alter(None, 2, 0));
    let history = History::of(&story.state, None);
    let (first, second) = (history.holders(key(), copies)[0].get(), history.holders(key(), copies)[1].get());
    let third = [A, B, C].into_iter().find(|node| ![first, second].contains(node)).unwrap();
    let decide = |story: &Story, answers: &[Answer]| History::of(&story.state, None).decide(key(), copies, answers);
    let heard = [A, B, C, 4].map(NodeId).into();
    let may_defer = |own: &Answer| History::of(&story.state, None).may_defer(own, key(), copies, 1, &heard);
    // The new holder's silence means nothing, and it may defer; the one that had it all along may not.
    let answers = [has(first, 1, stamp(1, 5), 1), has_nothing(second, 1), has_nothing(third, 1)];
    assert_eq!(decide(&story, &answers), newest(stamp(1, 5), &[first]));
    assert!(may_defer(&answers[1]) && !may_defer(&answers[0]));
    // The only one that had it in epoch 1 goes before the other was brought up to date: it is waited for.
    story.dies(first);
    assert_eq!(decide(&story, &[has_nothing(second, 1)]), Decision::Unheard(Epoch(1)));
    assert_eq!(History::of(&story.state, None).possibly_out_of_sight(copies.fewest(Epoch(1))), Some(Epoch(1)));
    // Once the epoch had ended clean, either of the two is enough.
    let mut story = Story::begin();
    story.state.apply(&alter(None, 2, 0));
    story.ends_clean();
    story.dies(first);
    assert_eq!(decide(&story, &[has(second, 1, stamp(1, 5), 2)]), newest(stamp(1, 5), &[second]));
    assert_eq!(History::of(&story.state, None).possibly_out_of_sight(copies.fewest(Epoch(2))), None);
}

#[test]
fn a_holder_too_many_says_nothing_of_the_epochs_in_which_it_was_none() {
    // Three copies in epoch 1, one in 2; the superfluous copies are still there.
    let mut story = Story::begin();
    let copies = Copies::always(3).changed(1, Epoch(2));
    story.state.apply(&Command::AlterCopies { vdi: None, copies: 1, time: 0 });
    let owner = History::of(&story.state, None).holders(key(), copies)[0].get();
    let other = [A, B, C].into_iter().find(|node| *node != owner).unwrap();
    story.dies(other);
    story.joins(other);
    let answers = [has(owner, 2, stamp(1, 9), 1), has(other, 1, stamp(1, 5), 1)];
    let history = History::of(&story.state, None);
    assert_eq!(history.decide(key(), copies, &answers), newest(stamp(1, 9), &[owner]));
    assert_eq!(history.decide(key(), copies, &answers[1..]), Decision::Unheard(Epoch(2)));
}

#[test]
fn a_holder_that_serves_as_a_gateway_now_is_asked_nothing() {
    let mut story = Story::begin();
    story.ends_clean();
    story.dies(B);
    story.joins_with(B, 1, 0);
    let witnesses = History::of(&story.state, None).witnesses(key(), COPIES);
    assert_eq!(witnesses.into_iter().collect::<Vec<_>>(), [NodeId(A), NodeId(C)]);
}
