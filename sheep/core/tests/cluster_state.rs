//! The ordered state, driven as a cluster would drive it: what commands do, and what no sequence of them can break.

use proptest::prelude::*;
use qemu_proto::oid::VdiId;
use sheep_core::cluster_state::{ClusterState, Phase};
use sheep_core::command::{Command, NewVdi, Outcome, Refusal, VdiEdit};
use sheep_core::level::Level;
use sheep_core::member::{Member, NodeId};
use sheep_core::stamp::Epoch;
use sheep_core::vdi::Vdi;
use sheep_core::vdi_name::Target;

fn member(node: u64, zone: u32) -> Member {
    let mut address = [0; 16];
    address[15] = node as u8;
    Member {
        id: NodeId(node),
        address,
        port: 7000,
        peer_endpoint: format!("127.0.0.1:{node}"),
        boot: 1,
        zone,
        weight: 1 << 40,
        level: Level::OURS,
    }
}

fn join(node: u64) -> Command {
    Command::Join { member: member(node, node as u32), time: node }
}

fn formatted(nodes: u64) -> ClusterState {
    formatted_at(Level::OURS, nodes)
}

fn formatted_at(level: Level, nodes: u64) -> ClusterState {
    let mut state = ClusterState::default();
    for node in 1..=nodes {
        assert_eq!(state.apply(&join(node)), Outcome::Done);
    }
    let format = Command::Format { cluster_id: 9, copies: 3, object_size_shift: 22, flags: 0, time: 100 };
    assert_eq!(state.apply(&format), Outcome::Done);
    assert_eq!(state.apply(&Command::RaiseLevel { level }), Outcome::Done);
    state
}

#[test]
fn what_a_member_does_not_understand_is_not_ordered() {
    let earlier =
        |node: u64| Command::Join { member: Member { level: Level::FIRST, ..member(node, node as u32) }, time: node };
    let mut state = ClusterState::default();
    for command in [join(1), earlier(2)] {
        assert_eq!(state.apply(&command), Outcome::Done);
    }
    let format = Command::Format { cluster_id: 9, copies: 2, object_size_shift: 22, flags: 0, time: 100 };
    assert_eq!(state.apply(&format), Outcome::Done);
    let unlock = Command::UnlockVdi { name: b"a".to_vec(), token: None };
    let raise = Command::RaiseLevel { level: unlock.level() };
    assert!(unlock.level() > Level::FIRST);
    for command in [&unlock, &raise] {
        assert_eq!(state.apply(command), Outcome::Refused(Refusal::EarlierVersion));
    }
    // The later version's node alone does not make it so; the other one has to come back updated.
    assert_eq!(state.apply(&Command::Evict { nodes: vec![NodeId(2)], time: 101 }), Outcome::Done);
    assert_eq!(state.apply(&earlier(2)), Outcome::Done, "as long as nothing later was used");
    assert_eq!(state.apply(&join(2)), Outcome::Done);
    assert_eq!(state.apply(&raise), Outcome::Done);
    assert_eq!(state.apply(&raise), Outcome::Refused(Refusal::NoEffect));
    assert_ne!(state.apply(&unlock), Outcome::Refused(Refusal::EarlierVersion));
    assert_eq!(state.apply(&earlier(3)), Outcome::Refused(Refusal::EarlierVersion), "it could not follow");
    assert_eq!(state.apply(&earlier(2)), Outcome::Refused(Refusal::EarlierVersion));
    assert!(state.members.contains_key(&NodeId(2)), "refused is not evicted");

    let mut later = state.clone();
    later.level = Level(Level::OURS.0 + 1);
    let restored = ClusterState::default().apply(&Command::Restore(later.encode()));
    assert_eq!(restored, Outcome::Refused(Refusal::InvalidParameters), "a state of a later version is not misread");
}

fn new_vdi(name: &str, base: Option<VdiId>, snapshot: bool, drained: Option<(NodeId, u32)>) -> Command {
    Command::NewVdi(NewVdi {
        name: name.into(),
        size_bytes: 64 << 20,
        base,
        snapshot,
        copies: 0,
        object_size_shift: 0,
        time: 7 << 32,
        drained,
    })
}

fn vdi_of(outcome: &Outcome) -> VdiId {
    match outcome {
        Outcome::Vdi(id) => *id,
        other => panic!("{other:?}"),
    }
}

/// Takes the lease and turns the working VDI into a snapshot.
fn snapshot(state: &mut ClusterState, name: &str) -> (VdiId, VdiId) {
    let Ok(current) = state.lookup(name.as_bytes(), Target::Current) else { panic!("no working VDI of {name}") };
    let Outcome::Lease(generation) = state.apply(&Command::AcquireLease { vdi: current, node: NodeId(1) }) else {
        panic!("the lease is free")
    };
    let made = state.apply(&new_vdi(name, Some(current), true, Some((NodeId(1), generation))));
    (current, vdi_of(&made))
}

#[test]
fn format_begins_epoch_one_clean_and_every_change_of_members_makes_the_next() {
    let mut state = formatted(3);
    assert_eq!((state.epoch, state.clean), (Epoch(1), Epoch(1)));
    state.apply(&Command::Evict { nodes: vec![NodeId(3)], time: 5 });
    assert_eq!((state.epoch, state.clean), (Epoch(2), Epoch(1)));
    for node in [1, 2] {
        state.apply(&Command::Recovered { node: NodeId(node), epoch: Epoch(2) });
    }
    assert_eq!(state.clean, Epoch(2));
    state.apply(&join(3));
    assert_eq!((state.epoch, state.clean), (Epoch(3), Epoch(2)));
}

#[test]
fn a_node_that_crashes_and_is_back_before_anybody_noticed_was_away_for_an_epoch() {
    let mut state = formatted(3);
    state.apply(&join(2));
    assert_eq!(state.epoch, Epoch(3));
    assert!(!state.epoch_record(Epoch(2)).unwrap().members.contains_key(&NodeId(2)));
    assert_eq!(state.members[&NodeId(2)].since, Epoch(3));
}

#[test]
fn the_report_of_an_older_epoch_does_not_end_the_current_one_clean() {
    let mut state = formatted(2);
    state.apply(&Command::Evict { nodes: vec![NodeId(2)], time: 5 });
    assert_eq!(
        state.apply(&Command::Recovered { node: NodeId(1), epoch: Epoch(1) }),
        Outcome::Refused(Refusal::NoEffect)
    );
    assert_eq!(state.clean, Epoch(1));
}

#[test]
fn a_snapshot_keeps_the_old_id_and_needs_drained_writes() {
    let mut state = formatted(3);
    let first = vdi_of(&state.apply(&new_vdi("test", None, false, None)));
    assert_eq!(first.get(), 0x7c_2b25);
    assert_eq!(
        state.apply(&new_vdi("test", Some(first), true, None)),
        Outcome::Refused(Refusal::LeaseLost),
        "without the lease there may be writes under way"
    );
    let (old, new) = snapshot(&mut state, "test");
    assert_eq!((old, new.get()), (first, 0x7c_2b26));
    let (old, new) = (&state.vdis[&old.get()], &state.vdis[&new.get()]);
    assert!(old.is_snapshot() && !new.is_snapshot());
    assert_eq!((new.snapshot_id, new.parent, new.chain_root), (2, Some(old.id), old.id));
    assert_eq!(state.lookup(b"test", Target::Current), Ok(new.id));
    assert_eq!(state.lookup(b"test", Target::Snapshot { tag: b"", snapid: 1 }), Ok(old.id));
    assert_eq!(state.lookup(b"test", Target::Snapshot { tag: b"x", snapid: 0 }), Err(Refusal::NoTag));
}

#[test]
fn a_clone_begins_a_chain_of_its_own_and_only_from_a_snapshot() {
    let mut state = formatted(3);
    let base = vdi_of(&state.apply(&new_vdi("base", None, false, None)));
    assert_eq!(state.apply(&new_vdi("clone", Some(base), false, None)), Outcome::Refused(Refusal::InvalidParameters));
    snapshot(&mut state, "base");
    let clone = vdi_of(&state.apply(&new_vdi("clone", Some(base), false, None)));
    assert_eq!(state.vdis[&clone.get()].chain_root, clone);
    assert_eq!(state.vdis[&clone.get()].parent, Some(base));
}

#[test]
fn revert_deletes_the_working_vdi_and_branches_from_the_snapshot() {
    let mut state = formatted(3);
    vdi_of(&state.apply(&new_vdi("vm", None, false, None)));
    let (old, current) = snapshot(&mut state, "vm");
    let delete = Command::DeleteVdi { name: b"vm".to_vec(), tag: Vec::new(), snapshot_id: 0 };
    assert_eq!(vdi_of(&state.apply(&delete)), current);
    assert_eq!(state.apply(&delete), Outcome::Refused(Refusal::NoVdi));
    let next = vdi_of(&state.apply(&new_vdi("vm", Some(old), false, None)));
    let next = &state.vdis[&next.get()];
    assert_eq!((next.parent, next.chain_root), (Some(old), old));
    assert!(state.to_reclaim.contains(&current.get()));
    assert!(state.vdis.contains_key(&current.get()), "a deleted VDI keeps its place in the run of ids");
}

fn begin_restore(name: &str, base: VdiId) -> Command {
    let Command::NewVdi(request) = new_vdi(name, Some(base), false, None) else { unreachable!() };
    Command::BeginRestore(request)
}

#[test]
fn a_restored_snapshot_comes_at_once_and_leaves_the_working_vdi_alone() {
    let mut state = formatted(3);
    vdi_of(&state.apply(&new_vdi("vm", None, false, None)));
    let (base, working) = snapshot(&mut state, "vm");
    let before = state.vdis[&working.get()].clone();
    let unfinished = vdi_of(&state.apply(&begin_restore("vm", base)));
    let vdi = state.vdis[&unfinished.get()].clone();
    assert_eq!((vdi.parent, vdi.chain_root, vdi.is_snapshot()), (Some(base), base, false));
    for snapid in 0..4 {
        let found = state.lookup(b"vm", Target::new(b"", snapid));
        assert_ne!(found, Ok(unfinished), "what is not finished is not found");
    }
    let Outcome::Lease(generation) = state.apply(&Command::AcquireLease { vdi: unfinished, node: NodeId(2) }) else {
        panic!("the lease is free")
    };
    let finish =
        |node, generation| Command::FinishRestore { vdi: unfinished, node: NodeId(node), generation, time: 9 << 32 };
    assert_eq!(state.apply(&finish(1, generation)), Outcome::Refused(Refusal::LeaseLost));
    assert_eq!(state.apply(&finish(2, generation)), Outcome::Vdi(unfinished));
    assert_eq!(state.lookup(b"vm", Target::new(b"", 3)), Ok(unfinished));
    assert_eq!(state.lookup(b"vm", Target::Current), Ok(working));
    assert_eq!(state.vdis[&working.get()], before);
    assert_eq!(state.apply(&finish(2, generation)), Outcome::Refused(Refusal::NoVdi), "it is finished");
    let give_up = Command::GiveUpRestore { vdi: unfinished };
    assert_eq!(state.apply(&give_up), Outcome::Refused(Refusal::NoVdi), "it is a snapshot like any other");
    let (old, next) = snapshot(&mut state, "vm");
    assert_eq!((old, state.vdis[&next.get()].snapshot_id), (working, 4));
}

#[test]
fn a_restore_that_is_not_finished_leaves_nothing() {
    let mut state = formatted(3);
    vdi_of(&state.apply(&new_vdi("vm", None, false, None)));
    let (base, working) = snapshot(&mut state, "vm");
    assert_eq!(state.apply(&begin_restore("vm", working)), Outcome::Refused(Refusal::InvalidParameters));
    assert_eq!(state.apply(&begin_restore("other", base)), Outcome::Refused(Refusal::InvalidParameters));
    let first = vdi_of(&state.apply(&begin_restore("vm", base)));
    assert_eq!(state.apply(&new_vdi("copy", Some(first), false, None)), Outcome::Refused(Refusal::InvalidParameters));
    let second = vdi_of(&state.apply(&begin_restore("vm", base)));
    assert!(state.vdis[&first.get()].deleted && state.to_reclaim.contains(&first.get()), "the later one counts");
    assert_eq!(state.apply(&Command::GiveUpRestore { vdi: second }), Outcome::Vdi(second));
    assert!(state.vdis[&second.get()].deleted && state.to_reclaim.contains(&second.get()));
    assert_eq!(state.apply(&Command::GiveUpRestore { vdi: working }), Outcome::Refused(Refusal::NoVdi));
    assert_eq!(state.lookup(b"vm", Target::Current), Ok(working));
    assert_eq!(state.lookup(b"vm", Target::new(b"", 1)), Ok(base));
}

#[test]
fn a_lock_excludes_others_and_outlives_snapshots_but_not_its_node() {
    let mut state = formatted(3);
    vdi_of(&state.apply(&new_vdi("vm", None, false, None)));
    let lock = |node, token| Command::LockVdi { name: b"vm".to_vec(), node: NodeId(node), token };
    let unlock = |token| Command::UnlockVdi { name: b"vm".to_vec(), token };
    assert_eq!(state.apply(&lock(1, 5)), Outcome::Refused(Refusal::NoEffect), "locks are advisory");
    let format = Command::Format { cluster_id: 10, copies: 3, object_size_shift: 22, flags: 8, time: 100 };
    assert_eq!(state.apply(&format), Outcome::Done);
    assert_eq!(state.apply(&lock(1, 5)), Outcome::Refused(Refusal::NoVdi));
    let vm = vdi_of(&state.apply(&new_vdi("vm", None, false, None)));
    assert_eq!(state.apply(&lock(1, 5)), Outcome::Vdi(vm));
    assert_eq!(state.apply(&lock(1, 5)), Outcome::Vdi(vm), "once more is once");
    assert_eq!(state.apply(&lock(2, 6)), Outcome::Refused(Refusal::Locked));
    assert_eq!(state.apply(&lock(1, 7)), Outcome::Refused(Refusal::Locked), "through the same node too");
    let (_, next) = snapshot(&mut state, "vm");
    assert_eq!(state.apply(&lock(2, 6)), Outcome::Refused(Refusal::Locked), "a snapshot strands nothing");
    assert_eq!(state.apply(&unlock(Some(6))), Outcome::Refused(Refusal::NoEffect), "not its lock");
    assert_eq!(state.apply(&unlock(Some(5))), Outcome::Done);
    assert_eq!(state.apply(&lock(2, 6)), Outcome::Vdi(next));
    state.apply(&Command::Evict { nodes: vec![NodeId(2)], time: 1 });
    assert_eq!(state.apply(&lock(3, 8)), Outcome::Vdi(next), "the dead lock nothing");
    assert_eq!(state.apply(&lock(2, 9)), Outcome::Refused(Refusal::NoEffect));
    assert_eq!(state.apply(&unlock(None)), Outcome::Done, "by force");
    assert!(state.locks.is_empty());
}

#[test]
fn header_edits_take_what_clients_may_change_and_nothing_that_undoes_a_snapshot() {
    let mut state = formatted(3);
    vdi_of(&state.apply(&new_vdi("vm", None, false, None)));
    let (old, current) = snapshot(&mut state, "vm");
    let edit = |size| VdiEdit { size_bytes: Some(size), ..VdiEdit::default() };
    assert_eq!(state.apply(&Command::EditVdi { vdi: old, edit: edit(1 << 30) }), Outcome::Refused(Refusal::ReadOnly));
    state.apply(&Command::EditVdi { vdi: current, edit: edit(1 << 20) });
    assert_eq!(state.vdis[&current.get()].size_bytes, 64 << 20, "a size only grows");
    state.apply(&Command::EditVdi { vdi: current, edit: edit(1 << 30) });
    assert_eq!(state.vdis[&current.get()].size_bytes, 1 << 30);
    let tag = VdiEdit { tag: Some(b"late".to_vec()), ..VdiEdit::default() };
    state.apply(&Command::EditVdi { vdi: old, edit: tag });
    assert_eq!(state.lookup(b"vm", Target::Snapshot { tag: b"late", snapid: 0 }), Ok(old));
}

#[test]
fn a_lease_has_one_holder_and_its_generation_only_goes_up() {
    let mut state = formatted(3);
    let vdi = vdi_of(&state.apply(&new_vdi("vm", None, false, None)));
    let acquire = |node| Command::AcquireLease { vdi, node: NodeId(node) };
    assert_eq!(state.apply(&acquire(1)), Outcome::Lease(1));
    assert_eq!(state.apply(&acquire(2)), Outcome::Refused(Refusal::LeaseHeldBy(NodeId(1))));
    let release = |node, generation| Command::ReleaseLease { vdi, node: NodeId(node), generation };
    assert_eq!(state.apply(&release(2, 1)), Outcome::Refused(Refusal::NoEffect));
    assert_eq!(state.apply(&release(1, 1)), Outcome::Done);
    assert_eq!(state.apply(&acquire(2)), Outcome::Lease(2));
    state.apply(&Command::Evict { nodes: vec![NodeId(2)], time: 1 });
    assert_eq!(state.apply(&acquire(3)), Outcome::Lease(3), "the dead hold nothing");
    assert_eq!(state.apply(&acquire(2)), Outcome::Refused(Refusal::NoEffect), "nor take anything");
}

#[test]
fn a_restart_from_memory_waits_for_the_members_of_the_last_epoch() {
    let mut state = formatted(3).restarted();
    assert!(matches!(&state.phase, Phase::Waiting { missing, .. } if missing.len() == 3));
    state.apply(&join(2));
    state.apply(&join(1));
    assert_eq!(state.apply(&new_vdi("vm", None, false, None)), Outcome::Refused(Refusal::Waiting));
    state.apply(&join(3));
    assert!(state.is_running());
    let mut forced = formatted(3).restarted();
    forced.apply(&join(1));
    assert_eq!(forced.apply(&Command::ForceRecover { time: 1 }), Outcome::Done);
    assert!(forced.is_running());
}

#[test]
fn another_era_shares_no_number_with_what_the_majority_may_have_gone_on_to() {
    let mut state = formatted(5);
    let known = vdi_of(&state.apply(&new_vdi("known", None, false, None)));
    let acquire = |vdi, node| Command::AcquireLease { vdi, node: NodeId(node) };
    assert_eq!(state.apply(&acquire(known, 1)), Outcome::Lease(1));
    for _ in 0..100 {
        state.apply(&Command::Evict { nodes: vec![NodeId(5)], time: 1 });
        state.apply(&join(5));
    }
    // What the others went on to.
    let mut majority = state.clone();
    majority.apply(&Command::Evict { nodes: vec![NodeId(1), NodeId(2)], time: 1 });
    let made = vdi_of(&majority.apply(&new_vdi("made there", None, false, None)));
    assert_eq!(majority.apply(&acquire(known, 3)), Outcome::Lease(2));
    majority.apply(&acquire(made, 3));

    state.begin_era(&[NodeId(3), NodeId(4), NodeId(5)], 7);
    assert!(state.is_running());
    assert_eq!(state.members.len(), 2);
    assert_eq!(state.leases[&known.get()].holder, None);
    assert_eq!(state.forgiven.next(), majority.epoch);
    assert!(state.epoch.get() >= majority.epoch.get() + 60_000);
    let Outcome::Lease(generation) = state.apply(&acquire(known, 1)) else { panic!("no lease") };
    assert!(generation > 60_000, "{generation}");
    // Made again here, the same id comes out: its stamps must not be those of the other one.
    let again = vdi_of(&state.apply(&new_vdi("made there", None, false, None)));
    assert_eq!(again, made);
    let Outcome::Lease(generation) = state.apply(&acquire(again, 1)) else { panic!("no lease") };
    assert!(generation > 60_000, "{generation}");
    // It goes on as usual from there.
    let epoch = state.epoch;
    state.apply(&join(3));
    assert_eq!(state.epoch, epoch.next());
}

#[test]
fn after_an_orderly_stop_the_epoch_goes_on_once_all_are_back() {
    let mut state = formatted_at(Level::SHRINKING, 3);
    state.apply(&Command::Shutdown);
    assert_eq!(state.apply(&join(1)), Outcome::Refused(Refusal::Waiting));
    let mut back = state.clone().restarted();
    for node in [3, 1] {
        back.apply(&join(node));
        assert!(!back.is_running());
    }
    // One of them dies again while the others are waited for.
    back.apply(&Command::Evict { nodes: vec![NodeId(3)], time: 1 });
    back.apply(&join(2));
    assert!(!back.is_running());
    back.apply(&join(3));
    assert!(back.is_running());
    assert_eq!((back.epoch, back.clean), (Epoch(1), Epoch(1)), "nothing moved");
    assert_eq!(back.members[&NodeId(3)].since, Epoch(1));
    // With a newcomer there is one new epoch, not one per node.
    let mut grown = state.restarted();
    for node in [1, 2, 4, 3] {
        grown.apply(&join(node));
    }
    assert_eq!((grown.epoch, grown.clean), (Epoch(2), Epoch(1)));
}

#[test]
fn a_process_that_slept_through_an_orderly_stop_gets_an_epoch() {
    for (level, boots, epoch) in
        [(Level::OURS, [7, 7, 7], 1), (Level::OURS, [7, 1, 7], 2), (Level::SHRINKING, [7, 1, 7], 1)]
    {
        let mut state = formatted_at(level, 3);
        state.apply(if level < Level::STOPS { &Command::Shutdown } else { &Command::StopAll });
        let mut state = state.restarted();
        for (node, boot) in [3, 1, 2].into_iter().zip(boots) {
            assert!(!state.is_running());
            state.apply(&Command::Join { member: Member { boot, ..member(node, node as u32) }, time: node });
        }
        assert!(state.is_running());
        assert_eq!((state.epoch, state.clean), (Epoch(epoch), Epoch(1)), "{level} {boots:?}");
    }
}

#[test]
fn copies_are_altered_for_a_chain_at_once_and_again_only_after_a_clean_epoch() {
    let mut state = formatted(3);
    vdi_of(&state.apply(&new_vdi("vm", None, false, None)));
    let (old, new) = snapshot(&mut state, "vm");
    let clone = vdi_of(&state.apply(&new_vdi("clone", Some(old), false, None)));
    let alter = |vdi, copies| Command::AlterCopies { vdi, copies, time: 4 };
    assert_eq!(state.apply(&alter(Some(new), 3)), Outcome::Refused(Refusal::NoEffect));
    for copies in [0, 32] {
        assert_eq!(state.apply(&alter(Some(new), copies)), Outcome::Refused(Refusal::InvalidParameters));
    }
    assert_eq!(state.apply(&alter(VdiId::new(99), 2)), Outcome::Refused(Refusal::NoVdi));
    assert_eq!((state.epoch, state.copies_min()), (Epoch(1), 3));
    assert_eq!(state.apply(&alter(Some(new), 1)), Outcome::Done);
    let copies = |state: &ClusterState, vdi: VdiId| state.vdis[&vdi.get()].copies;
    assert_eq!([old, new, clone].map(|vdi| copies(&state, vdi).now()), [1, 1, 3]);
    assert_eq!([1, 2, 3].map(|epoch| copies(&state, new).in_epoch(Epoch(epoch))), [3, 1, 1]);
    assert_eq!(state.epoch, Epoch(2));
    assert_eq!(state.apply(&alter(Some(old), 2)), Outcome::Refused(Refusal::Recovering));
    assert_eq!(state.apply(&alter(Some(clone), 2)), Outcome::Done, "another chain");
    assert_eq!(state.apply(&alter(None, 2)), Outcome::Done);
    let made = vdi_of(&state.apply(&new_vdi("made", None, false, None)));
    assert_eq!(copies(&state, made).now(), 2);
    for node in 1..=3 {
        state.apply(&Command::Recovered { node: NodeId(node), epoch: state.epoch });
    }
    assert_eq!(state.apply(&alter(Some(old), 2)), Outcome::Done);
    assert_eq!(state.copies_min(), 1, "not everything has two copies yet");
}

#[test]
fn weights_change_with_an_epoch_and_only_those_of_stores() {
    let mut state = formatted(3);
    let mut gateway = member(4, 4);
    gateway.weight = 0;
    state.apply(&Command::Join { member: gateway, time: 1 });
    let reweight = |weights: &[(u64, u64)]| Command::Reweight {
        weights: weights.iter().map(|(node, weight)| (NodeId(*node), *weight)).collect(),
        time: 2,
    };
    let epoch = state.epoch;
    assert_eq!(
        state.apply(&reweight(&[(1, 1 << 40), (2, 0), (4, 1 << 40), (9, 5)])),
        Outcome::Refused(Refusal::NoEffect)
    );
    let scale = state.settings.reference_weight;
    assert_eq!(state.apply(&reweight(&[(1, 2 << 40)])), Outcome::Done);
    assert_eq!((state.epoch, state.settings.reference_weight), (epoch.next(), scale));
    assert_eq!(state.members[&NodeId(1)].member.weight, 2 << 40);
    assert!(state.members[&NodeId(4)].member.is_gateway());
    // Sixteen times as large, one of them does not fit the scale any more.
    assert_eq!(state.apply(&reweight(&[(1, 16 << 40)])), Outcome::Done);
    assert_ne!(state.settings.reference_weight, scale);
}

#[test]
fn parameters_that_make_no_sense_are_refused() {
    let mut state = formatted(3);
    let with = |change: fn(&mut NewVdi)| {
        let Command::NewVdi(mut request) = new_vdi("vm", None, false, None) else { unreachable!() };
        change(&mut request);
        Command::NewVdi(request)
    };
    for bad in [
        with(|r| r.name.clear()),
        with(|r| r.name = vec![b'x'; 256]),
        with(|r| r.copies = 32),
        with(|r| r.object_size_shift = 19),
        with(|r| r.object_size_shift = 32),
        with(|r| r.size_bytes = (4 << 40) + 1),
        with(|r| r.size_bytes = u64::MAX),
    ] {
        assert_eq!(state.apply(&bad), Outcome::Refused(Refusal::InvalidParameters), "{bad:?}");
    }
    assert_eq!(state.apply(&with(|r| r.base = VdiId::new(77))), Outcome::Refused(Refusal::NoBaseVdi));
}

fn any_command() -> impl Strategy<Value = Command> {
    let node = (1_u64..6).prop_map(NodeId);
    let reweighted = node.clone();
    let name = prop::sample::select(vec!["a", "b", "col34469", "col65874"]);
    let vdi =
        prop::sample::select(vec![0x4f_0e0b_u32, 0x4f_0e0c, 0x4f_0e0d, 0x65_02b4, 1, 2]).prop_map(VdiId::from_low_bits);
    let alterable = vdi.clone();
    prop_oneof![
        (1_u64..6).prop_map(join),
        node.clone().prop_map(|node| Command::Evict { nodes: vec![node], time: 1 }),
        (node.clone(), 0_u32..40).prop_map(|(node, epoch)| Command::Recovered { node, epoch: Epoch(epoch) }),
        (name.clone(), prop::option::of(vdi.clone()), any::<bool>(), prop::option::of((node.clone(), 1_u32..4)))
            .prop_map(|(name, base, snapshot, drained)| new_vdi(name, base, snapshot, drained)),
        (name, 0_u32..3).prop_map(|(name, snapshot_id)| Command::DeleteVdi {
            name: name.into(),
            tag: Vec::new(),
            snapshot_id
        }),
        (vdi.clone(), node.clone()).prop_map(|(vdi, node)| Command::AcquireLease { vdi, node }),
        (prop::sample::select(vec!["a", "col34469"]), vdi.clone()).prop_map(|(name, base)| begin_restore(name, base)),
        (vdi.clone(), node.clone(), 1_u32..4).prop_map(|(vdi, node, generation)| Command::FinishRestore {
            vdi,
            node,
            generation,
            time: 4
        }),
        vdi.clone().prop_map(|vdi| Command::GiveUpRestore { vdi }),
        (vdi, node, 1_u32..4).prop_map(|(vdi, node, generation)| Command::ReleaseLease { vdi, node, generation }),
        Just(Command::ForceRecover { time: 3 }),
        (prop::option::of(alterable), 0_u8..33).prop_map(|(vdi, copies)| Command::AlterCopies { vdi, copies, time: 5 }),
        (reweighted, 1_u64..3)
            .prop_map(|(node, weight)| Command::Reweight { weights: vec![(node, weight << 40)], time: 6 }),
    ]
}

proptest! {
    #[test]
    fn no_sequence_of_commands_breaks_the_invariants(commands in prop::collection::vec(any_command(), 1..120)) {
        let mut state = formatted(3);
        let mut other = formatted(3);
        for command in &commands {
            let before = state.clone();
            let outcome = state.apply(command);
            prop_assert_eq!(&outcome, &other.apply(command), "the same everywhere");
            // Invariant 2: one epoch per change of who holds what (a silent restart is two), none otherwise.
            let steps = state.epoch.get() - before.epoch.get();
            let moved = state.members != before.members
                || matches!(command, Command::ForceRecover { .. } | Command::AlterCopies { .. });
            prop_assert!(steps <= 2 && (steps > 0) == (moved && outcome == Outcome::Done), "{:?}", command);
            prop_assert!(state.clean <= state.epoch && state.clean >= before.clean);
            prop_assert!(state.epoch_record(state.clean).is_some(), "history reaches back to the clean epoch");
            for (vdi, lease) in &state.leases {
                let earlier = before.leases.get(vdi).map_or(0, |lease| lease.generation);
                prop_assert!(lease.generation >= earlier);
                prop_assert!(lease.holder.is_none_or(|holder| state.members.contains_key(&holder)));
            }
            for vdi in before.vdis.values() {
                let now = &state.vdis[&vdi.id.get()];
                prop_assert!(!vdi.is_snapshot() || now.snapshot_time == vdi.snapshot_time, "a snapshot stays one");
                prop_assert!(!vdi.deleted || now.deleted, "what is deleted stays deleted");
            }
            for vdi in state.vdis.values() {
                let root = state.vdis.get(&vdi.chain_root.get()).map(|root| root.copies.now());
                prop_assert_eq!(Some(vdi.copies.now()), root, "one chain, one number of copies");
            }
            for vdi in state.vdis.values().filter(|vdi| !vdi.deleted && !vdi.is_snapshot()) {
                let same = state.vdis.values().filter(|other| other.name == vdi.name && !other.deleted);
                let alike = |other: &&_| {
                    let other: &std::sync::Arc<Vdi> = other;
                    !other.is_snapshot() && other.is_being_restored() == vdi.is_being_restored()
                };
                prop_assert_eq!(same.filter(alike).count(), 1, "one working VDI per name, and one that is being restored");
            }
        }
        prop_assert_eq!(&state, &other);
        let stored = postcard::to_allocvec(&state).unwrap();
        prop_assert_eq!(postcard::from_bytes::<ClusterState>(&stored).unwrap(), state);
    }
}
