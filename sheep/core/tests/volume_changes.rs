//! Groups of snapshots, other names, independent clones and limits in the ordered state, and how they are written.

use qemu_proto::oid::VdiId;
use sheep_core::cluster_state::ClusterState;
use sheep_core::command::{Command, NewVdi, Outcome, Refusal};
use sheep_core::level::Level;
use sheep_core::limits::Limits;
use sheep_core::member::{Member, NodeId};
use sheep_core::vdi_name::Target;

const NODE: NodeId = NodeId(1);

fn formatted(level: Level) -> ClusterState {
    let mut state = ClusterState::default();
    let member = Member {
        id: NODE,
        address: [0; 16],
        port: 7000,
        peer_endpoint: "127.0.0.1:1".into(),
        boot: 1,
        zone: 1,
        weight: 1 << 40,
        level: Level::OURS,
    };
    done(&mut state, &Command::Join { member, time: 1 });
    done(&mut state, &Command::Format { cluster_id: 9, copies: 1, object_size_shift: 22, flags: 0, time: 2 });
    if level > Level::FIRST {
        done(&mut state, &Command::RaiseLevel { level });
    }
    state
}

fn done(state: &mut ClusterState, command: &Command) {
    assert_eq!(state.apply(command), Outcome::Done, "{command:?}");
}

fn request(name: &str, base: Option<VdiId>, drained: Option<(NodeId, u32)>) -> NewVdi {
    NewVdi {
        name: name.into(),
        size_bytes: 64 << 20,
        base,
        snapshot: drained.is_some(),
        copies: 0,
        object_size_shift: 0,
        time: 7 << 32,
        drained,
    }
}

fn create(state: &mut ClusterState, name: &str) -> VdiId {
    match state.apply(&Command::NewVdi(request(name, None, None))) {
        Outcome::Vdi(id) => id,
        other => panic!("{other:?}"),
    }
}

fn current(state: &ClusterState, name: &str) -> Result<VdiId, Refusal> {
    state.lookup(name.as_bytes(), Target::Current)
}

/// A member of a group, its writes drained.
fn drained(state: &mut ClusterState, name: &str) -> NewVdi {
    let Ok(id) = current(state, name) else { panic!("no {name}") };
    match state.apply(&Command::AcquireLease { vdi: id, node: NODE }) {
        Outcome::Lease(generation) => request(name, Some(id), Some((NODE, generation))),
        other => panic!("{other:?}"),
    }
}

fn rename(name: &str, to: &str) -> Command {
    Command::RenameVdi { name: name.into(), to: to.into() }
}

fn limit(name: &str, operations_per_second: u64) -> Command {
    let limits = Limits { operations_per_second, ..Limits::default() };
    Command::LimitVdi { name: name.into(), limits: Some(limits) }
}

#[test]
fn a_group_is_made_whole_or_not_at_all() {
    let mut state = formatted(Level::OURS);
    let ids = ["a", "b"].map(|name| create(&mut state, name));
    let members = ["a", "b"].map(|name| drained(&mut state, name)).to_vec();
    let group =
        |members: &[NewVdi], tag: &str| Command::SnapshotTogether { members: members.to_vec(), tag: tag.into() };
    let before = state.vdis.clone();
    let stale = NewVdi { drained: Some((NODE, 77)), ..members[1].clone() };
    let unknown = NewVdi { name: b"c".to_vec(), ..members[1].clone() };
    for (refused, why) in [
        (vec![members[0].clone(), stale], Refusal::LeaseLost),
        (vec![members[0].clone(), unknown], Refusal::NoVdi),
        (vec![members[0].clone(), members[0].clone()], Refusal::VdiExists),
        (vec![], Refusal::InvalidParameters),
    ] {
        assert_eq!(state.apply(&group(&refused, "one")), Outcome::Refused(why));
        assert_eq!(state.vdis, before, "a part of a refused group was made");
    }
    done(&mut state, &group(&members, "one"));
    for (name, id) in ["a", "b"].into_iter().zip(ids) {
        assert_eq!(state.lookup(name.as_bytes(), Target::new(b"one", 0)), Ok(id));
        assert_ne!(current(&state, name), Ok(id));
    }
    let again = ["a", "b"].map(|name| drained(&mut state, name));
    assert_eq!(state.apply(&group(&again, "one")), Outcome::Refused(Refusal::VdiExists), "the tag is in use");
}

#[test]
fn another_name_is_that_of_the_snapshots_too() {
    let mut state = formatted(Level::OURS);
    let first = create(&mut state, "old");
    create(&mut state, "taken");
    let member = drained(&mut state, "old");
    done(&mut state, &Command::SnapshotTogether { members: vec![member], tag: b"one".to_vec() });
    done(&mut state, &limit("old", 5));
    for (from, to, why) in [
        ("old", "taken", Refusal::VdiExists),
        ("old", "old", Refusal::VdiExists),
        ("nobody", "new", Refusal::NoVdi),
        ("old", "", Refusal::InvalidParameters),
    ] {
        assert_eq!(state.apply(&rename(from, to)), Outcome::Refused(why), "{from} to {to}");
    }
    let working = current(&state, "old");
    done(&mut state, &rename("old", "new"));
    assert_eq!((current(&state, "old"), current(&state, "new")), (Err(Refusal::NoVdi), working));
    assert_eq!(state.lookup(b"new", Target::new(b"one", 0)), Ok(first));
    assert_eq!(state.limits.keys().collect::<Vec<_>>(), [b"new"]);
    // Numbers go on; the new working VDI is found, and so are those that were there before.
    let member = drained(&mut state, "new");
    done(&mut state, &Command::SnapshotTogether { members: vec![member], tag: b"two".to_vec() });
    let number = |target| state.lookup(b"new", target).map(|id| state.vdis[&id.get()].snapshot_id);
    assert_eq!(number(Target::new(b"", 1)), Ok(1));
    assert_eq!((number(Target::new(b"two", 0)), number(Target::Current)), (Ok(2), Ok(3)));
    // And back, with another of the old name in the way, and then not.
    create(&mut state, "old");
    assert_eq!(state.apply(&rename("new", "old")), Outcome::Refused(Refusal::VdiExists));
    state.apply(&Command::DeleteVdi { name: b"old".to_vec(), tag: vec![], snapshot_id: 0 });
    done(&mut state, &rename("new", "old"));
    assert_eq!(state.lookup(b"old", Target::new(b"one", 0)), Ok(first));
}

#[test]
fn limits_go_with_the_last_of_a_volume() {
    let mut state = formatted(Level::OURS);
    create(&mut state, "disk");
    assert_eq!(state.apply(&limit("nobody", 1)), Outcome::Refused(Refusal::NoVdi));
    done(&mut state, &limit("disk", 5));
    let member = drained(&mut state, "disk");
    done(&mut state, &Command::SnapshotTogether { members: vec![member], tag: b"one".to_vec() });
    let delete = |tag: &[u8]| Command::DeleteVdi { name: b"disk".to_vec(), tag: tag.to_vec(), snapshot_id: 0 };
    state.apply(&delete(b""));
    assert_eq!(state.limits.len(), 1, "it can be rolled back to the snapshot");
    state.apply(&delete(b"one"));
    assert!(state.limits.is_empty());
    create(&mut state, "disk");
    done(&mut state, &limit("disk", 5));
    done(&mut state, &limit("disk", 0));
    assert!(state.limits.is_empty(), "no limit is none");
}

#[test]
fn only_a_working_vdi_without_writes_under_way_loses_its_parent() {
    let mut state = formatted(Level::OURS);
    let base = create(&mut state, "base");
    let member = drained(&mut state, "base");
    done(&mut state, &Command::SnapshotTogether { members: vec![member], tag: b"one".to_vec() });
    let Outcome::Vdi(copy) = state.apply(&Command::NewVdi(request("copy", Some(base), None))) else {
        panic!("a clone")
    };
    let detach = |vdi, generation| Command::DetachVdi { vdi, node: NODE, generation };
    assert_eq!(state.apply(&detach(base, 1)), Outcome::Refused(Refusal::ReadOnly));
    assert_eq!(state.apply(&detach(copy, 1)), Outcome::Refused(Refusal::LeaseLost));
    let Outcome::Lease(generation) = state.apply(&Command::AcquireLease { vdi: copy, node: NODE }) else {
        panic!("a lease")
    };
    done(&mut state, &detach(copy, generation));
    assert_eq!(state.vdis[&copy.get()].parent, None);
    assert_eq!(state.vdis[&copy.get()].chain_root, copy);
}

#[test]
fn only_a_working_vdi_without_writes_under_way_becomes_smaller() {
    let mut state = formatted(Level::OURS);
    let disk = create(&mut state, "disk");
    let shrink = |vdi, generation, size_bytes| Command::ShrinkVdi { vdi, node: NODE, generation, size_bytes };
    assert_eq!(state.apply(&shrink(disk, 1, 4096)), Outcome::Refused(Refusal::LeaseLost));
    let Outcome::Lease(generation) = state.apply(&Command::AcquireLease { vdi: disk, node: NODE }) else {
        panic!("a lease")
    };
    assert_eq!(state.apply(&shrink(disk, generation, 1 << 40)), Outcome::Refused(Refusal::InvalidParameters));
    done(&mut state, &shrink(disk, generation, 4096));
    assert_eq!(state.vdis[&disk.get()].size_bytes, 4096);
    let member = drained(&mut state, "disk");
    done(&mut state, &Command::SnapshotTogether { members: vec![member], tag: b"one".to_vec() });
    assert_eq!(state.apply(&shrink(disk, generation, 512)), Outcome::Refused(Refusal::ReadOnly));
    let mut earlier = formatted(Level::VOLUME_CHANGES);
    let disk = create(&mut earlier, "disk");
    assert_eq!(earlier.apply(&shrink(disk, 1, 4096)), Outcome::Refused(Refusal::EarlierVersion));
}

#[test]
fn earlier_levels_are_written_as_they_were_and_later_parts_come_back() {
    let mut state = formatted(Level::LOCKS_AND_RESTORES);
    create(&mut state, "disk");
    assert_eq!(state.apply(&limit("disk", 5)), Outcome::Refused(Refusal::EarlierVersion));
    let earlier = state.encode();
    assert_eq!(postcard::from_bytes(&earlier), Ok(state.clone()));
    done(&mut state, &Command::RaiseLevel { level: Level::OURS });
    let empty = state.encode();
    assert_eq!(empty.len(), earlier.len() + 2, "two empty tables behind the rest");
    done(&mut state, &limit("disk", 5));
    done(&mut state, &rename("disk", "other"));
    // With something behind it, as in the snapshots of the log.
    let bytes = postcard::to_allocvec(&(&state, 7_u64)).expect("it can be written");
    assert_eq!(postcard::from_bytes(&bytes), Ok((state.clone(), 7_u64)));
    for end in 0..bytes.len() {
        assert!(postcard::from_bytes::<(ClusterState, u64)>(&bytes[..end]).is_err(), "cut at {end}");
    }
}
