//! Volumes, snapshots and clones on real nodes: random operations against a model, and the ways in which the ancestor's users
//! lost data, by the number under which they reported them.
//!
//! | report | what was lost | where it is shown not to be |
//! |---|---|---|
//! | 91 | a restore broke the link to the parent | `real_backup`: `what_the_later_snapshot_had_comes_back_beside_the_volume` |
//! | 101 | the journal was replayed wrongly after a crash | `crash_images`: `case_3` to `case_11` and `random_lives_keep_every_promise` |
//! | 146 | a guest booted while nodes recovered | `a_volume_is_used_through_a_node_that_recovers` |
//! | 313 | members changed after all volumes were deleted | `members_change_after_everything_was_deleted` |
//! | 315 | an id was given out again | `ids_are_not_given_out_again` |
//! | 343 | a deleted object was recovered | `what_was_deleted_while_a_node_was_away_stays_deleted` |
//! | 347 | restart after a full power cut | `real_cluster`: `all_nodes_cut_in_mid_write_lose_nothing`; program `powercut` |
//! | 363 | recovery ran into a full disk | `recovery_into_a_full_disk_loses_nothing` |

use std::collections::BTreeSet;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use qemu_proto::inode::VM_STATE_SIZE_OFFSET;
use qemu_proto::oid::{Oid, VdiId};
use tests::clients::{Client, Request, Volume, opcode, padded, result};
use tests::command::skipped;
use tests::loop_fs::{FsKind, LoopFs};
use tests::nbd_client::{NbdClient, Style};
use tests::sectors::fill_random;
use tests::sim::Random;
use tests::spawn::{Cluster, ClusterPlan};
use tests::volume_proof::{self, Plan, await_objects, objects_on};

const MIB: u64 = 1 << 20;
const NOTHING: BTreeSet<Oid> = BTreeSet::new();

fn bytes(length: u64, seed: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    fill_random(&mut bytes, &mut Random::new(seed));
    bytes
}

fn nbd(cluster: &Cluster, index: usize, export: &str) -> Result<NbdClient> {
    NbdClient::open(&cluster.node(index).store.join("nbd.sock"), export, Style::Structured, &[])
}

fn dog(cluster: &Cluster, words: &[&str]) -> Result<String> {
    Ok(cluster.dog(words)?.ok()?.out())
}

/// A volume of whole objects, all written; gives what it holds.
fn filled(cluster: &Cluster, name: &str, objects: u64, seed: u64) -> Result<Vec<u8>> {
    let size = objects * 4 * MIB;
    dog(cluster, &["vdi", "create", name, &size.to_string()])?;
    let content = bytes(size, seed);
    let mut client = nbd(cluster, 0, name)?;
    for (index, piece) in content.chunks(MIB as usize).enumerate() {
        client.write(index as u64 * MIB, piece, 0)?;
    }
    client.flush()?;
    Ok(content)
}

fn holds(cluster: &Cluster, index: usize, export: &str, wanted: &[u8]) -> Result<()> {
    let seen = nbd(cluster, index, export)?.read_all()?;
    let differs = seen.iter().zip(wanted).position(|(seen, wanted)| seen != wanted);
    ensure!(seen.len() == wanted.len() && differs.is_none(), "{export} through node {index} differs at {differs:?}");
    Ok(())
}

fn id_of(cluster: &Cluster, name: &str, tag: &str) -> Result<VdiId> {
    cluster.client(0)?.look_up(name, tag, 0)
}

#[test]
fn random_operations_end_as_the_model_says() -> Result<()> {
    let figures =
        volume_proof::run(&Plan { operations: 600, kill_every: Duration::from_secs(3), seed: 7, is_voting: false })?;
    println!("{figures:?}");
    ensure!(figures.images > 0 && figures.objects > 0, "nothing was compared");
    Ok(())
}

/// Report 343.
#[test]
fn what_was_deleted_while_a_node_was_away_stays_deleted() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let kept = filled(&cluster, "kept", 2, 1)?;
    let disk = filled(&cluster, "disk", 4, 2)?;
    dog(&cluster, &["vdi", "snapshot", "-s", "one", "disk"])?;
    nbd(&cluster, 0, "disk")?.write(5 * MIB, &bytes(MIB, 3), 0)?;
    dog(&cluster, &["vdi", "clone", "-s", "one", "disk", "copy"])?;
    holds(&cluster, 1, "copy", &disk)?;
    // A durable object is in the journal first, and in a file of its own some moments later.
    cluster.wait_until("files of all objects on the node that goes away", Duration::from_secs(30), |cluster| {
        Ok(objects_on(&cluster.node(2).store)?.len() > 6)
    })?;
    cluster.kill(2)?;
    cluster.wait_members(2)?;
    for words in [&["vdi", "delete", "disk"][..], &["vdi", "delete", "-s", "one", "disk"], &["vdi", "delete", "copy"]] {
        dog(&cluster, words)?;
    }
    let id = id_of(&cluster, "kept", "")?;
    let wanted: BTreeSet<Oid> = (0..2).map(|index| Oid::data(id, index)).collect();
    cluster.wait_until("the space of what was deleted", Duration::from_mins(1), |cluster| {
        let data = |index: usize| -> Result<BTreeSet<Oid>> {
            let on_disk = objects_on(&cluster.node(index).store)?;
            Ok(on_disk.into_iter().filter(|oid| !is_inode(*oid)).collect())
        };
        Ok(data(0)? == wanted && data(1)? == wanted)
    })?;
    ensure!(objects_on(&cluster.node(2).store)?.len() > 6, "the node that is away no longer has them");
    cluster.restart(2)?;
    cluster.wait_members(3)?;
    cluster.wait_recovered()?;
    await_objects(&cluster, &wanted, &BTreeSet::from([id]))?;
    holds(&cluster, 2, "kept", &kept)?;
    cluster.finish()
}

fn is_inode(oid: Oid) -> bool {
    oid == Oid::inode(oid.vid())
}

/// Report 315.
#[test]
fn ids_are_not_given_out_again() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let mut seen = BTreeSet::new();
    for round in 0..3 {
        let content = filled(&cluster, "disk", 2, round)?;
        ensure!(seen.insert(id_of(&cluster, "disk", "")?), "an id came a second time");
        cluster.kill(2)?;
        dog(&cluster, &["vdi", "delete", "disk"])?;
        // With the objects of the first still on the node that is away.
        dog(&cluster, &["vdi", "create", "disk", &(8 * MIB).to_string()])?;
        ensure!(seen.insert(id_of(&cluster, "disk", "")?), "an id came a second time");
        cluster.restart(2)?;
        cluster.wait_recovered()?;
        holds(&cluster, 2, "disk", &vec![0; content.len()])?;
        dog(&cluster, &["vdi", "delete", "disk"])?;
    }
    await_objects(&cluster, &NOTHING, &BTreeSet::new())?;
    cluster.finish()
}

/// Report 313.
#[test]
fn members_change_after_everything_was_deleted() -> Result<()> {
    let mut cluster = Cluster::three()?;
    filled(&cluster, "disk", 4, 1)?;
    dog(&cluster, &["vdi", "snapshot", "-s", "one", "disk"])?;
    dog(&cluster, &["vdi", "delete", "disk"])?;
    dog(&cluster, &["vdi", "delete", "-s", "one", "disk"])?;
    for index in [1, 2] {
        cluster.terminate(index)?;
        cluster.wait_members(2)?;
        cluster.restart(index)?;
        cluster.wait_members(3)?;
        cluster.wait_recovered()?;
    }
    await_objects(&cluster, &NOTHING, &BTreeSet::new())?;
    let content = filled(&cluster, "next", 3, 2)?;
    for index in 0..3 {
        holds(&cluster, index, "next", &content)?;
    }
    cluster.finish()
}

/// Report 146.
#[test]
fn a_volume_is_used_through_a_node_that_recovers() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let mut content = filled(&cluster, "disk", 16, 1)?;
    cluster.kill(2)?;
    cluster.wait_members(2)?;
    // What it has of every object is old.
    let mut client = nbd(&cluster, 0, "disk")?;
    for index in 0..16 {
        let new = bytes(64 << 10, 100 + index);
        let at = index * 4 * MIB + 123 * 512;
        client.write(at, &new, 0)?;
        content[at as usize..at as usize + new.len()].copy_from_slice(&new);
    }
    drop(client);
    cluster.restart(2)?;
    // At once, like a guest that boots: the last objects first, so that it is ahead of the recovery.
    let mut client = nbd(&cluster, 2, "disk")?;
    for index in (0..16_u64).rev() {
        let at = (index * 4 * MIB) as usize;
        let seen = client.read(at as u64, 4 * MIB)?;
        ensure!(seen == content[at..at + 4 * MIB as usize], "object {index} is an old one");
        let new = bytes(4096, 200 + index);
        client.write(at as u64 + 4096, &new, 0)?;
        content[at + 4096..at + 8192].copy_from_slice(&new);
    }
    cluster.wait_recovered()?;
    for index in 0..3 {
        holds(&cluster, index, "disk", &content)?;
    }
    dog(&cluster, &["vdi", "check", "disk"])?;
    cluster.finish()
}

fn with_loop_fs(what: &str, test: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if let Some(why) = LoopFs::missing() {
        skipped(what, &why);
        return Ok(());
    }
    test(tempfile::tempdir()?.path())
}

/// Report 363.
#[test]
fn recovery_into_a_full_disk_loses_nothing() -> Result<()> {
    with_loop_fs("recovery into a full disk", |scratch| {
        let disk = LoopFs::create(scratch, "disk", FsKind::Ext4, 400)?;
        let plan = ClusterPlan::new(3).store(2, &disk.path().join("store"));
        let mut cluster = plan.start_formatted(3)?;
        let small = filled(&cluster, "small", 2, 1)?;
        cluster.kill(2)?;
        cluster.wait_members(2)?;
        let large = filled(&cluster, "large", 90, 2)?;
        cluster.restart(2)?;
        cluster.wait_members(3)?;
        // It takes what fits; whatever it does not get stays where it is.
        std::thread::sleep(Duration::from_secs(8));
        cluster.check_health()?;
        for index in 0..3 {
            holds(&cluster, index, "small", &small)?;
            holds(&cluster, index, "large", &large)?;
        }
        // Even without one of those that have everything.
        cluster.kill(1)?;
        cluster.wait_members(2)?;
        holds(&cluster, 0, "large", &large)?;
        cluster.restart(1)?;
        cluster.wait_members(3)?;
        // Room makes it whole.
        dog(&cluster, &["vdi", "delete", "large"])?;
        cluster.wait_recovered()?;
        let id = id_of(&cluster, "small", "")?;
        await_objects(&cluster, &(0..2).map(|index| Oid::data(id, index)).collect(), &BTreeSet::from([id]))?;
        holds(&cluster, 2, "small", &small)?;
        cluster.finish()
    })
}

#[test]
fn machine_state_goes_with_its_snapshot() -> Result<()> {
    let cluster = Cluster::three()?;
    filled(&cluster, "disk", 1, 1)?;
    let id = id_of(&cluster, "disk", "")?;
    let mut client = cluster.client(0)?;
    for index in 0..3 {
        let request = Request::object(opcode::CREATE_AND_WRITE, Oid::vmstate(id, index), 0);
        client.call(request, &bytes(10_000, 5))?.success("machine state")?;
    }
    set_vm_state_size(&mut client, id, 9 * MIB)?;
    dog(&cluster, &["vdi", "snapshot", "-s", "one", "disk"])?;
    nbd(&cluster, 1, "disk")?.write(0, &bytes(4096, 6), 0)?;
    let working = id_of(&cluster, "disk", "")?;
    let has = |wanted: &[Oid], live: &[VdiId]| {
        await_objects(&cluster, &wanted.iter().copied().collect(), &live.iter().copied().collect()).map(drop)
    };
    let (old, new) = (Oid::data(id, 0), Oid::data(working, 0));
    let [a, b, c] = [0, 1, 2].map(|index| Oid::vmstate(id, index));
    has(&[old, new, a, b, c], &[id, working])?;
    dog(&cluster, &["vdi", "delete", "-s", "one", "disk"])?;
    has(&[new], &[working])?;
    cluster.finish()
}

fn set_vm_state_size(client: &mut Client, id: VdiId, size: u64) -> Result<()> {
    let request = Request::object(opcode::WRITE, Oid::inode(id), VM_STATE_SIZE_OFFSET as u64);
    client.call(request, &size.to_le_bytes())?.success("size of machine state").map(drop)
}

#[test]
fn an_idle_connection_follows_a_snapshot_that_was_deleted_meanwhile() -> Result<()> {
    let cluster = Cluster::three()?;
    let mut content = filled(&cluster, "disk", 2, 1)?;
    let mut idle = nbd(&cluster, 1, "disk")?;
    for round in 0..2 {
        dog(&cluster, &["vdi", "snapshot", "-s", &format!("s{round}"), "disk"])?;
    }
    for round in 0..2 {
        dog(&cluster, &["vdi", "delete", "-s", &format!("s{round}"), "disk"])?;
    }
    ensure!(idle.read_all()? == content, "what it reads");
    idle.write(0, &bytes(512, 2), 0)?;
    content[..512].copy_from_slice(&bytes(512, 2));
    holds(&cluster, 0, "disk", &content)?;
    // Not so what takes its place.
    dog(&cluster, &["vdi", "snapshot", "-s", "last", "disk"])?;
    ensure!(idle.read(0, 512)? == content[..512], "what it reads of the volume behind its snapshot");
    dog(&cluster, &["vdi", "delete", "disk"])?;
    dog(&cluster, &["vdi", "create", "disk", &(8 * MIB).to_string()])?;
    // This node may hear of it some moments later than the one that was asked.
    let deadline = Instant::now() + Duration::from_secs(10);
    let refused = loop {
        match idle.read(0, 512) {
            Ok(read) => ensure!(read == content[..512], "another volume of the same name was read"),
            Err(refused) => break refused,
        }
        ensure!(Instant::now() < deadline, "a deleted volume is read on and on");
    };
    ensure!(refused.to_string().contains("does not exist any more"), "{refused:#}");
    cluster.finish()
}

/// As QEMU's driver asks for a snapshot of what it takes for the working VDI.
fn snapshot_request(size_bytes: u64, base: VdiId) -> Request {
    clone_request(size_bytes, base).with_u32(32, 1)
}

fn clone_request(size_bytes: u64, base: VdiId) -> Request {
    Request::new(opcode::NEW_VDI).with_u64(16, size_bytes).with_u32(24, base.get())
}

#[test]
fn a_clone_is_at_least_as_large_as_its_base() -> Result<()> {
    let cluster = Cluster::three()?;
    filled(&cluster, "disk", 2, 1)?;
    dog(&cluster, &["vdi", "snapshot", "-s", "one", "disk"])?;
    let mut client = cluster.client(0)?;
    let base = client.look_up("disk", "one", 0)?;
    // Grown later, it would show what the base has beyond its end.
    let answer = client.call(clone_request(4 * MIB, base), &padded(&["small"]))?;
    ensure!(answer.result() != result::SUCCESS, "a smaller clone");
    client.call(clone_request(12 * MIB, base), &padded(&["large"]))?.success("a larger clone")?;
    let content = nbd(&cluster, 1, "disk")?.read_all()?;
    holds(&cluster, 1, "large", &[content, vec![0; 4 * MIB as usize]].concat())?;
    cluster.finish()
}

#[test]
fn a_client_that_is_behind_takes_nothing_back() -> Result<()> {
    let cluster = Cluster::three()?;
    dog(&cluster, &["vdi", "create", "disk", "8M"])?;
    // It is about to make a snapshot of what is the working VDI now; somebody else is faster.
    let mut late = cluster.client(1)?;
    let base = late.look_up("disk", "", 0)?;
    dog(&cluster, &["vdi", "snapshot", "-s", "first", "disk"])?;
    let content = bytes(8 << 20, 71);
    let mut guest = nbd(&cluster, 0, "disk")?;
    guest.write(0, &content, 0)?;
    guest.flush()?;
    let answer = late.call(snapshot_request(8 << 20, base), &padded(&["disk"]))?;
    ensure!(answer.result() != result::SUCCESS, "a successor of what is not the working VDI any more");
    holds(&cluster, 0, "disk", &content)?;
    holds(&cluster, 2, "disk", &content)?;
    // Its size is the volume's, whatever a client remembers.
    dog(&cluster, &["vdi", "resize", "disk", "16M"])?;
    let base = late.look_up("disk", "", 0)?;
    late.call(snapshot_request(8 << 20, base), &padded(&["disk"]))?.success("a snapshot")?;
    let grown = [content, vec![0; 8 << 20]].concat();
    holds(&cluster, 0, "disk", &grown)?;
    // Two at once are one after the other.
    std::thread::scope(|scope| {
        let make = |tag: &'static str| scope.spawn(|| dog(&cluster, &["vdi", "snapshot", "-s", tag, "disk"]));
        let made = ["left", "right"].map(make);
        made.into_iter().try_for_each(|one| one.join().expect("it does not panic").map(drop))
    })?;
    let list = dog(&cluster, &["vdi", "list", "-r", "disk"])?;
    ensure!(list.contains(" left ") && list.contains(" right ") && list.contains(" first "), "{list}");
    holds(&cluster, 1, "disk", &grown)?;
    cluster.finish()
}

#[test]
fn a_heir_gives_back_what_it_overwrites_of_a_deleted_snapshot() -> Result<()> {
    let cluster = Cluster::three()?;
    filled(&cluster, "disk", 3, 1)?;
    let root = id_of(&cluster, "disk", "")?;
    dog(&cluster, &["vdi", "snapshot", "-s", "one", "disk"])?;
    dog(&cluster, &["vdi", "clone", "-s", "one", "disk", "copy"])?;
    let (disk, copy) = (id_of(&cluster, "disk", "")?, id_of(&cluster, "copy", "")?);
    dog(&cluster, &["vdi", "delete", "-s", "one", "disk"])?;
    let live = BTreeSet::from([disk, copy]);
    let has = |wanted: &[(VdiId, u32)]| {
        let wanted = wanted.iter().map(|(vdi, index)| Oid::data(*vdi, *index)).collect();
        await_objects(&cluster, &wanted, &live).map(drop)
    };
    has(&[(root, 0), (root, 1), (root, 2)])?;
    // Overwritten in both, in one, discarded in one.
    nbd(&cluster, 0, "disk")?.write(0, &[1; 4096], 0)?;
    nbd(&cluster, 1, "copy")?.write(0, &[2; 4096], 0)?;
    nbd(&cluster, 1, "copy")?.write(4 * MIB, &[3; 4096], 0)?;
    has(&[(disk, 0), (copy, 0), (copy, 1), (root, 1), (root, 2)])?;
    use tests::nbd_client::command::TRIM;
    nbd(&cluster, 2, "disk")?.must(TRIM, 0, 4 * MIB, 4 * MIB, &[])?;
    has(&[(disk, 0), (copy, 0), (copy, 1), (root, 2)])?;
    let map = Volume::open(&mut cluster.client(1)?, "disk", "")?.map;
    ensure!(map == [disk.get(), 0, root.get()], "{map:x?}");
    cluster.finish()
}
