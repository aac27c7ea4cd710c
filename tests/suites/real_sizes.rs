//! What a volume takes, on real nodes: volumes made smaller, clones with data of their own, parts that are dropped, a node
//! that dies in the middle of it, and where the data is after the disks have become larger.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_proto::oid::{Oid, VdiId};
use serde_json::Value;
use tests::clients::{Request, Volume, opcode, padded, result};
use tests::command::{self, find_program, skipped};
use tests::loop_fs::{FsKind, LoopFs};
use tests::nbd_client::{NbdClient, Style};
use tests::sectors::fill_random;
use tests::sim::Random;
use tests::spawn::{Cluster, ClusterPlan, DOG_DEADLINE, binary};
use tests::volume_proof::{await_objects, objects_on};

const MIB: u64 = 1 << 20;
const OBJECT: u64 = 4 * MIB;

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
    dog(cluster, &["vdi", "create", name, &(objects * OBJECT).to_string()])?;
    let content = bytes(objects * OBJECT, seed);
    let mut client = nbd(cluster, 0, name)?;
    for (at, piece) in (0..).step_by(MIB as usize).zip(content.chunks(MIB as usize)) {
        client.write(at, piece, 0)?;
    }
    client.flush()?;
    Ok(content)
}

fn opened(cluster: &Cluster, name: &str) -> Result<Volume> {
    Volume::open(&mut cluster.client(0)?, name, "")
}

fn holds(cluster: &Cluster, index: usize, export: &str, wanted: &[u8]) -> Result<()> {
    let seen = nbd(cluster, index, export)?.read_all()?;
    let differs = seen.iter().zip(wanted).position(|(seen, wanted)| seen != wanted);
    ensure!(seen.len() == wanted.len(), "{export} has {} bytes instead of {}", seen.len(), wanted.len());
    ensure!(differs.is_none(), "{export} through node {index} differs at {differs:?}");
    Ok(())
}

fn parent_of(cluster: &Cluster, vdi: VdiId) -> Result<u32> {
    let header = cluster.client(0)?.read_object(Oid::inode(vdi), 564, 4)?;
    Ok(u32::from_le_bytes(header.try_into().ok().context("four bytes")?))
}

#[test]
fn what_is_beyond_a_smaller_size_is_gone_for_good() -> Result<()> {
    const SMALL: u64 = 2 * OBJECT + MIB + 3 * 512;
    let cluster = Cluster::three()?;
    let mut content = filled(&cluster, "disk", 6, 1)?;
    let before = content.clone();
    let root = opened(&cluster, "disk")?.vdi;
    dog(&cluster, &["vdi", "snapshot", "-s", "one", "disk"])?;
    // One object of its own that stays, and one that goes.
    let mut idle = nbd(&cluster, 1, "disk")?;
    for at in [0, 5 * OBJECT] {
        idle.write(at, &bytes(4096, at + 2), 0)?;
        content[at as usize..at as usize + 4096].copy_from_slice(&bytes(4096, at + 2));
    }
    let size = SMALL.to_string();
    cluster.dog(&["vdi", "resize", "disk", &size])?.exits(1)?.refused()?;
    let answered = cluster.dog_through(0, &["vdi", "resize", "disk", &size], b"yes\n")?.ok()?;
    ensure!(answered.out().contains("discards everything in disk beyond"), "{answered}");
    content.truncate(SMALL as usize);
    for index in 0..3 {
        holds(&cluster, index, "disk", &content)?;
        holds(&cluster, index, "disk@one", &before)?;
    }
    // Whoever opened it before knows another size: inside it goes on, beyond the end it is told.
    idle.write(SMALL - 512, &[7; 512], 0)?;
    content[SMALL as usize - 512..].fill(7);
    for at in [SMALL, 3 * OBJECT, 5 * OBJECT] {
        ensure!(idle.write(at, &[8; 512], 0).is_err(), "a write at {at} was taken");
    }
    let vdi = opened(&cluster, "disk")?.vdi;
    let of_snapshot = (0..6).map(|index| Oid::data(root, index));
    let wanted: BTreeSet<Oid> = of_snapshot.chain([Oid::data(vdi, 0), Oid::data(vdi, 2)]).collect();
    await_objects(&cluster, &wanted, &BTreeSet::from([root, vdi]))?;
    dog(&cluster, &["vdi", "resize", "disk", &(6 * OBJECT).to_string()])?;
    content.resize(6 * OBJECT as usize, 0);
    holds(&cluster, 2, "disk", &content)?;
    // In the middle of an object that it has for itself, and to nothing at all.
    for size in [MIB + 512, 0] {
        dog(&cluster, &["vdi", "resize", "-f", "disk", &size.to_string()])?;
        dog(&cluster, &["vdi", "resize", "disk", &OBJECT.to_string()])?;
        content.truncate(size as usize);
        content.resize(OBJECT as usize, 0);
        holds(&cluster, 0, "disk", &content)?;
    }
    holds(&cluster, 1, "disk@one", &before)?;
    cluster.finish()
}

#[test]
fn a_locked_volume_becomes_smaller_only_by_force() -> Result<()> {
    let cluster = ClusterPlan::new(3).start()?;
    dog(&cluster, &["cluster", "format", "-c", "3", "-l"])?;
    dog(&cluster, &["vdi", "create", "disk", "16M"])?;
    let data = cluster.client(1)?;
    let locked = cluster.client(1)?.call(Request::new(opcode::LOCK_VDI).version(1), &padded(&["disk", ""]))?;
    ensure!(locked.result() == result::SUCCESS, "it is free");
    let refused = cluster.dog_through(0, &["vdi", "resize", "disk", "8M"], b"yes\n")?.exits(1)?.refused()?;
    ensure!(refused.err().contains("a client has it open"), "{refused}");
    ensure!(opened(&cluster, "disk")?.size_bytes == 16 * MIB, "it was refused");
    dog(&cluster, &["vdi", "resize", "-f", "disk", "8M"])?;
    ensure!(opened(&cluster, "disk")?.size_bytes == 8 * MIB, "it was forced");
    drop(data);
    cluster.finish()
}

/// Starts `dog` through a node, kills that or another node while it is at work, and does it again through a third.
fn killed_in_the_middle(cluster: &mut Cluster, through: usize, victim: usize, words: &[&str]) -> Result<()> {
    let mut dog = Command::new(binary("dog")?);
    dog.args(words).env("SHEEPDOG_DOG_PORT", cluster.node(through).port.to_string());
    let mut running = command::start(&mut dog, &[])?;
    std::thread::sleep(Duration::from_millis(150));
    let was_running = running.is_running()?;
    cluster.kill(victim)?;
    let ended = running.finish(DOG_DEADLINE)?;
    println!(
        "{} was {}running when node {victim} died: {}",
        words.join(" "),
        if was_running { "" } else { "not " },
        ended.status
    );
    ensure!(through == victim || ended.status.success(), "{ended}");
    cluster.dog_through(1, words, &[])?.ok()?;
    cluster.restart(victim)?;
    cluster.wait_members(3)?;
    cluster.wait_recovered()
}

#[test]
fn a_node_dies_while_a_volume_becomes_smaller() -> Result<()> {
    const SMALL: u64 = OBJECT + 12_288;
    let mut cluster = Cluster::three()?;
    for (round, victim) in [0, 2].into_iter().enumerate() {
        let name = format!("disk{round}");
        let mut content = filled(&cluster, &name, 24, round as u64)?;
        killed_in_the_middle(&mut cluster, 0, victim, &["vdi", "resize", "-f", &name, &SMALL.to_string()])?;
        let volume = opened(&cluster, &name)?;
        ensure!(volume.size_bytes == SMALL, "it has {} bytes", volume.size_bytes);
        dog(&cluster, &["vdi", "resize", &name, &(24 * OBJECT).to_string()])?;
        content[SMALL as usize..].fill(0);
        for index in 0..3 {
            holds(&cluster, index, &name, &content)?;
        }
        let wanted = (0..2).map(|index| Oid::data(volume.vdi, index)).collect();
        await_objects(&cluster, &wanted, &BTreeSet::from([volume.vdi]))?;
        dog(&cluster, &["vdi", "delete", &name])?;
    }
    cluster.finish()
}

#[test]
fn a_node_dies_while_a_clone_is_flattened() -> Result<()> {
    let mut cluster = Cluster::three()?;
    for (round, victim) in [0, 2].into_iter().enumerate() {
        let (base, copy) = (format!("base{round}"), format!("copy{round}"));
        let content = filled(&cluster, &base, 32, round as u64)?;
        dog(&cluster, &["vdi", "snapshot", "-s", "one", &base])?;
        dog(&cluster, &["vdi", "clone", "-s", "one", &base, &copy])?;
        killed_in_the_middle(&mut cluster, 0, victim, &["vdi", "flatten", &copy])?;
        let volume = opened(&cluster, &copy)?;
        ensure!(volume.map.iter().all(|owner| *owner == volume.vdi.get()), "it shares objects: {:x?}", volume.map);
        ensure!(parent_of(&cluster, volume.vdi)? == 0, "it has a parent");
        dog(&cluster, &["vdi", "delete", &base])?;
        dog(&cluster, &["vdi", "delete", "-s", "one", &base])?;
        let wanted = (0..32).map(|index| Oid::data(volume.vdi, index)).collect();
        await_objects(&cluster, &wanted, &BTreeSet::from([volume.vdi]))?;
        for index in 0..3 {
            holds(&cluster, index, &copy, &content)?;
        }
        dog(&cluster, &["vdi", "delete", &copy])?;
    }
    cluster.finish()
}

#[test]
fn clones_get_data_of_their_own_when_asked() -> Result<()> {
    let cluster = Cluster::three()?;
    let mut content = filled(&cluster, "base", 3, 1)?;
    dog(&cluster, &["vdi", "resize", "base", &(5 * OBJECT).to_string()])?;
    content.resize(5 * OBJECT as usize, 0);
    dog(&cluster, &["vdi", "snapshot", "-s", "one", "base"])?;
    let base = Volume::open(&mut cluster.client(0)?, "base", "one")?;
    for (option, name, objects) in [("-n", "independent", 3), ("-P", "prepared", 5)] {
        let said = dog(&cluster, &["vdi", "clone", "-v", option, "-s", "one", "base", name])?;
        let clone = opened(&cluster, name)?;
        ensure!(said == format!("VDI ID of newly created clone: {}\n", clone.vdi), "{said}");
        let own = clone.map.iter().filter(|owner| **owner == clone.vdi.get()).count();
        ensure!(own == objects && clone.map[..3].iter().all(|owner| *owner != base.vdi.get()), "{:x?}", clone.map);
        let is_child = parent_of(&cluster, clone.vdi)? == base.vdi.get();
        ensure!(is_child == (option == "-P"), "{name} is {}a child", if is_child { "" } else { "not " });
        holds(&cluster, 1, name, &content)?;
    }
    let listed = dog(&cluster, &["vdi", "list", "-r"])?;
    let flag = |name: &str| listed.lines().find(|line| line.contains(name)).and_then(|line| line.chars().next());
    ensure!((flag("independent"), flag("prepared")) == (Some('='), Some('c')), "{listed}");
    dog(&cluster, &["vdi", "delete", "base"])?;
    dog(&cluster, &["vdi", "delete", "-s", "one", "base"])?;
    for name in ["independent", "prepared"] {
        holds(&cluster, 2, name, &content)?;
    }
    cluster.finish()
}

#[test]
fn a_part_of_a_volume_is_dropped() -> Result<()> {
    let cluster = Cluster::three()?;
    let mut content = filled(&cluster, "disk", 4, 1)?;
    dog(&cluster, &["vdi", "delete", "-m", "2", "disk"])?;
    content[..2 * OBJECT as usize].fill(0);
    let vdi = opened(&cluster, "disk")?.vdi;
    await_objects(&cluster, &(2..4).map(|index| Oid::data(vdi, index)).collect(), &BTreeSet::from([vdi]))?;
    holds(&cluster, 1, "disk", &content)?;
    cluster.dog(&["vdi", "delete", "-m", "some", "disk"])?.exits(1)?.refused()?;
    dog(&cluster, &["vdi", "snapshot", "-s", "one", "disk"])?;
    cluster.dog(&["vdi", "delete", "-m", "1", "-s", "one", "disk"])?.exits(1)?.refused()?;
    dog(&cluster, &["vdi", "delete", "-m", "100", "disk"])?;
    holds(&cluster, 2, "disk", &vec![0; content.len()])?;
    holds(&cluster, 2, "disk@one", &content)?;
    cluster.finish()
}

fn data_objects(cluster: &Cluster, index: usize) -> Result<usize> {
    let objects = objects_on(&cluster.node(index).store)?;
    Ok(objects.into_iter().filter(|oid| *oid != Oid::inode(oid.vid())).count())
}

/// Objects are of one size here, so their numbers are the bytes.
#[test]
fn data_moves_to_where_disks_have_become_larger() -> Result<()> {
    const OBJECTS: u64 = 120;
    let missing = LoopFs::missing().or_else(|| {
        ["xfs_growfs", "losetup"].into_iter().find(|name| find_program(name).is_none()).map(|name| format!("no {name}"))
    });
    if let Some(why) = missing {
        skipped("reweight", &why);
        return Ok(());
    }
    let scratch = tempfile::tempdir()?;
    let disks: Result<Vec<LoopFs>> =
        (0..3).map(|n| LoopFs::create(scratch.path(), &format!("disk{n}"), FsKind::Xfs, 1024)).collect();
    let disks = disks?;
    let plan = (disks.iter().enumerate())
        .fold(ClusterPlan::new(3), |plan, (index, disk)| plan.store(index, &disk.path().join("store")));
    let cluster = plan.start_formatted(1)?;
    dog(&cluster, &["vdi", "create", "disk", &(OBJECTS * OBJECT).to_string()])?;
    let mut client = nbd(&cluster, 0, "disk")?;
    for index in 0..OBJECTS {
        client.write(index * OBJECT, &bytes(4096, index), 0)?;
    }
    client.flush()?;
    let counts = || (0..3).map(|index| data_objects(&cluster, index)).collect::<Result<Vec<usize>>>();
    // A durable object is in the journal first, and in a file of its own some moments later.
    cluster.wait_until("files of all objects", Duration::from_secs(30), |_| {
        Ok(counts()?.iter().sum::<usize>() == OBJECTS as usize)
    })?;
    let before = counts()?;
    // Nodes' places on the ring are drawn anew in every run, so the counts scatter: by 6 in 40, and by 7 in 80. The bounds
    // are five times that away.
    ensure!(before.iter().all(|count| (10..=70).contains(count)), "not a third each: {before:?}");
    grow(scratch.path(), "disk2", 4096)?;
    // Nodes look at their disks once a second.
    cluster.wait_until("the new size", Duration::from_secs(30), |cluster| {
        let info: Value = serde_json::from_str(&dog(cluster, &["node", "info", "--json"])?)?;
        Ok(info["total"]["size_bytes"].as_u64().is_some_and(|size| size > 5 << 30))
    })?;
    dog(&cluster, &["cluster", "reweight"])?;
    cluster.wait_recovered()?;
    // Copies that belong elsewhere go when everybody has everything.
    cluster.wait_until("objects on one node each", Duration::from_mins(1), |_| {
        let counts = counts()?;
        Ok(counts != before && counts.iter().sum::<usize>() == OBJECTS as usize)
    })?;
    let after = counts()?;
    println!("objects on each node before {before:?}, with a third disk of four times the size {after:?}");
    // Shares of 1, 1 and 4: about 40 objects go to the third disk.
    ensure!(after[2] >= before[2] + 12 && (48..=112).contains(&after[2]), "before {before:?}, after {after:?}");
    for through in 0..3 {
        let mut client = nbd(&cluster, through, "disk")?;
        for index in 0..OBJECTS {
            let wanted = [bytes(4096, index), vec![0; 4096]].concat();
            ensure!(client.read(index * OBJECT, 8192)? == wanted, "object {index} through node {through}");
        }
    }
    cluster.finish()
}

/// Makes a mounted file system larger.
fn grow(scratch: &Path, name: &str, size_mib: u64) -> Result<()> {
    let image = scratch.join(format!("{name}.img"));
    std::fs::OpenOptions::new().write(true).open(&image)?.set_len(size_mib * MIB)?;
    // `/dev/loop0: [2049]:12 (IMAGE)`
    let listed = command::run(Command::new("losetup").arg("-j").arg(&image), DOG_DEADLINE)?.ok()?.out();
    let (device, _) = listed.split_once(':').with_context(|| format!("no loop device: {listed}"))?;
    command::run(Command::new("losetup").args(["-c", device]), DOG_DEADLINE)?.ok()?;
    command::run(Command::new("xfs_growfs").arg(scratch.join(name)), DOG_DEADLINE)?.ok().map(drop)
}
