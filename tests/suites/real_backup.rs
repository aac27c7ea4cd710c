//! `dog vdi backup` and `restore` on real nodes: what comes back is what was there, and whatever goes wrong, the volume and its
//! snapshots are what they were.

use std::io::Write;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_proto::bitmap::{BITMAP_BYTES, ids_in};
use qemu_proto::oid::Oid;
use tests::clients::{Request, Volume};
use tests::command::Finished;
use tests::qemu::{Qemu, tcp_url};
use tests::sectors::fill_random;
use tests::sim::Random;
use tests::spawn::{Cluster, binary};

const MIB: usize = 1 << 20;
const SIZE: usize = 40 * MIB;
const READ_VDIS: u8 = 0x15;
const READ_DEL_VDIS: u8 = 0xC9;
const DISCARD_OBJ: u8 = 0x05;
const PATIENCE: Duration = Duration::from_secs(20);

/// Writes bytes that depend on the seed.
fn scribble(cluster: &Cluster, name: &str, offset: usize, length: usize, seed: u64) -> Result<()> {
    let mut bytes = vec![0; length];
    fill_random(&mut bytes, &mut Random::new(seed));
    let (offset, length) = (offset.to_string(), length.to_string());
    cluster.dog_through(0, &["vdi", "write", name, &offset, &length], &bytes)?.ok().map(drop)
}

fn content(cluster: &Cluster, name: &str, snapshot: Option<&str>) -> Result<Vec<u8>> {
    let selector = snapshot.map_or(vec![], |snapshot| vec!["-s", snapshot]);
    Ok(cluster.dog(&[&["vdi", "read"], &selector[..], &[name]].concat())?.ok()?.stdout)
}

/// Everything that a listing shows of all volumes.
fn listing(cluster: &Cluster) -> Result<String> {
    let list = cluster.dog(&["vdi", "list", "-r"])?.ok()?.out();
    Ok(list + &cluster.dog(&["vdi", "tree"])?.ok()?.out())
}

fn restore(cluster: &Cluster, arguments: &[&str], stream: &[u8]) -> Result<Finished> {
    cluster.dog_through(1, &[&["vdi", "restore"], arguments].concat(), stream)
}

/// The number that a successful restore tells.
fn number_of(restored: &Finished) -> Result<String> {
    let out = restored.out();
    let number = out.split("snapshot ").nth(1).and_then(|rest| rest.split(' ').next());
    Ok(number.with_context(|| restored.to_string())?.to_owned())
}

/// A volume with the snapshots `one` and `two`, between which objects were written in part and whole, made, and removed; it
/// has changed since. With the stream between the two.
fn backed_up() -> Result<(Cluster, Vec<u8>)> {
    let cluster = Cluster::three()?;
    cluster.dog(&["vdi", "create", "disk", &SIZE.to_string()])?.ok()?;
    scribble(&cluster, "disk", 0, 12 * MIB, 1)?;
    scribble(&cluster, "disk", 20 * MIB, 4 * MIB, 2)?;
    cluster.dog(&["vdi", "snapshot", "-s", "one", "disk"])?.ok()?;
    scribble(&cluster, "disk", 5 * MIB + 7, 3000, 3)?;
    scribble(&cluster, "disk", 16 * MIB - 512, 1024, 4)?;
    cluster.dog_through(0, &["vdi", "write", "disk", &(8 * MIB).to_string(), "4096"], &[0; 4096])?.ok()?;
    let mut client = cluster.client(0)?;
    let volume = Volume::open(&mut client, "disk", "")?;
    let gone = Request::object(DISCARD_OBJ, Oid::data(volume.vdi, 5), 0);
    client.call(gone, &[])?.success("discard")?;
    cluster.dog(&["vdi", "snapshot", "-s", "two", "disk"])?.ok()?;
    scribble(&cluster, "disk", 2 * MIB, 100, 5)?;
    let stream = cluster.dog(&["vdi", "backup", "-F", "one", "-s", "two", "disk"])?.ok()?;
    ensure!(stream.err().is_empty(), "{stream}");
    Ok((cluster, stream.stdout))
}

#[test]
fn what_the_later_snapshot_had_comes_back_beside_the_volume() -> Result<()> {
    let (cluster, stream) = backed_up()?;
    ensure!(stream.len() < 20_000, "{} bytes for some 5000 changed ones", stream.len());
    let (one, two) = (content(&cluster, "disk", Some("one"))?, content(&cluster, "disk", Some("two"))?);
    let now = content(&cluster, "disk", None)?;
    ensure!(one != two && two != now && two[20 * MIB..24 * MIB].iter().all(|&byte| byte == 0), "three contents");
    let before = cluster.dog(&["vdi", "list", "-r", "disk"])?.ok()?.out();
    let restored = restore(&cluster, &["-s", "one", "disk"], &stream)?.ok()?;
    let number = number_of(&restored)?;
    ensure!(number == "4", "{restored}");
    ensure!(content(&cluster, "disk", Some(&number))? == two, "the restored snapshot is not the later one");
    ensure!(
        content(&cluster, "disk", Some("one"))? == one && content(&cluster, "disk", None)? == now,
        "something else"
    );
    // One line more, and those from before: the same ids, sizes, and what they share.
    let after = cluster.dog(&["vdi", "list", "-r", "disk"])?.ok()?.out();
    ensure!(before.lines().all(|line| after.contains(line)), "{before}\n{after}");
    ensure!(after.lines().count() == before.lines().count() + 1, "{after}");
    let mut client = cluster.client(2)?;
    let (earlier, later) = (Volume::open(&mut client, "disk", "one")?, Volume::open(&mut client, "disk", "two")?);
    let working = client.look_up("disk", "", 0)?;
    for (vdi, parent) in [(working, later.vdi), (client.look_up("disk", "", 4)?, earlier.vdi)] {
        let inode = client.read_object(Oid::inode(vdi), 0, 4664)?;
        let found = u32::from_le_bytes(inode[564..568].try_into()?);
        ensure!(found == parent.get(), "the parent of {vdi} is {found:x}, not {parent}");
    }
    cluster.dog(&["vdi", "check", "-s", &number, "disk"])?.ok()?;
    // It is a snapshot like any other.
    scribble(&cluster, "disk", 0, 512, 6)?;
    cluster.dog(&["vdi", "snapshot", "-s", "three", "disk"])?.ok()?;
    cluster.dog(&["vdi", "clone", "-s", &number, "disk", "copy"])?.ok()?;
    ensure!(content(&cluster, "copy", None)? == two, "a clone of it");
    cluster.dog(&["vdi", "rollback", "-f", "-s", &number, "disk"])?.ok()?;
    ensure!(content(&cluster, "disk", None)? == two, "a rollback to it");
    cluster.dog(&["vdi", "delete", "-s", "one", "disk"])?.ok()?;
    cluster.dog(&["vdi", "delete", "-s", "two", "disk"])?.ok()?;
    ensure!(content(&cluster, "disk", Some(&number))? == two, "it lives without those that it came from");
    cluster.finish()
}

#[test]
fn a_clone_of_the_earlier_snapshot_takes_the_stream_too() -> Result<()> {
    let (cluster, stream) = backed_up()?;
    let two = content(&cluster, "disk", Some("two"))?;
    cluster.dog(&["vdi", "clone", "-s", "one", "disk", "copy"])?.ok()?;
    cluster.dog(&["vdi", "snapshot", "-s", "base", "copy"])?.ok()?;
    let number = number_of(&restore(&cluster, &["-s", "base", "copy"], &stream)?.ok()?)?;
    ensure!(content(&cluster, "copy", Some(&number))? == two, "restored on a clone");
    ensure!(content(&cluster, "copy", None)? == content(&cluster, "disk", Some("one"))?, "the clone itself");
    // One that was written since is another content.
    scribble(&cluster, "copy", 30 * MIB, 512, 7)?;
    cluster.dog(&["vdi", "snapshot", "-s", "changed", "copy"])?.ok()?;
    let refused = restore(&cluster, &["-s", "changed", "copy"], &stream)?.exits(1)?.refused()?;
    ensure!(refused.err().contains("is not that one"), "{refused}");
    cluster.finish()
}

#[test]
fn another_volume_with_the_same_content_takes_it_by_force_only() -> Result<()> {
    let (cluster, stream) = backed_up()?;
    let (one, two) = (content(&cluster, "disk", Some("one"))?, content(&cluster, "disk", Some("two"))?);
    cluster.dog(&["vdi", "create", "other", &SIZE.to_string()])?.ok()?;
    cluster.dog_through(0, &["vdi", "write", "other"], &one)?.ok()?;
    cluster.dog(&["vdi", "snapshot", "-s", "base", "other"])?.ok()?;
    restore(&cluster, &["-s", "base", "other"], &stream)?.exits(1)?.refused()?;
    let number = number_of(&restore(&cluster, &["-f", "-s", "base", "other"], &stream)?.ok()?)?;
    ensure!(content(&cluster, "other", Some(&number))? == two, "by force");
    let before = listing(&cluster)?;
    // On what it leads to, it would find its own changes.
    let refused = restore(&cluster, &["-f", "-s", &number, "other"], &stream)?.exits(1)?.refused()?;
    ensure!(refused.err().contains("it belongs on another snapshot"), "{refused}");
    ensure!(listing(&cluster)? == before, "{}", listing(&cluster)?);
    cluster.finish()
}

#[test]
fn what_is_refused_changes_nothing() -> Result<()> {
    let (cluster, stream) = backed_up()?;
    let contents = |cluster: &Cluster| -> Result<Vec<Vec<u8>>> {
        [None, Some("one"), Some("two")].into_iter().map(|which| content(cluster, "disk", which)).collect()
    };
    let (before, content_before) = (listing(&cluster)?, contents(&cluster)?);
    let mut bad: Vec<(String, Vec<u8>)> = Vec::new();
    let mut random = Random::new(11);
    for at in [0, 8, 100, 1020, 1024, 1040, 1100]
        .into_iter()
        .chain((0..12).map(|_| random.below(stream.len() as u64) as usize))
    {
        let mut flipped = stream.clone();
        flipped[at] ^= 1;
        bad.push((format!("a flipped bit in byte {at}"), flipped));
    }
    for length in [1, 1023, 1024, 1500, stream.len() - 96, stream.len() - 1] {
        bad.push((format!("only {length} bytes"), stream[..length].to_vec()));
    }
    bad.push(("a byte more".to_owned(), [&stream[..], &[0]].concat()));
    bad.push(("text".to_owned(), b"not what a backup wrote\n".to_vec()));
    for (what, bytes) in bad {
        let refused = restore(&cluster, &["-s", "one", "disk"], &bytes)?.exits(1)?.refused()?;
        ensure!(refused.err().contains("Nothing of VDI disk was changed"), "{what}: {refused}");
    }
    for arguments in [&["-s", "two", "disk"][..], &["-s", "three", "disk"], &["-s", "one", "none"]] {
        restore(&cluster, arguments, &stream)?.exits(1)?.refused()?;
    }
    restore(&cluster, &["disk"], &stream)?.exits(64)?.refused()?;
    for arguments in [&["-F", "one", "disk"][..], &["-s", "two", "disk"]] {
        cluster.dog(&[&["vdi", "backup"], arguments].concat())?.exits(64)?.refused()?;
    }
    cluster.dog(&["vdi", "backup", "-F", "one", "-s", "three", "disk"])?.exits(1)?.refused()?;
    ensure!(listing(&cluster)? == before && contents(&cluster)? == content_before, "{}", listing(&cluster)?);
    cluster.dog(&["vdi", "create", "other", &SIZE.to_string()])?.ok()?;
    cluster.dog(&["vdi", "snapshot", "-s", "one", "other"])?.ok()?;
    restore(&cluster, &["-s", "one", "other"], &stream)?.exits(1)?.refused()?;
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

/// How many VDIs there are that were not deleted.
fn living(cluster: &Cluster) -> Result<usize> {
    let mut client = cluster.client(0)?;
    let mut count = |opcode| -> Result<usize> {
        let answer = client.call(Request::new(opcode).length(BITMAP_BYTES as u32), &[])?.success("bitmap")?;
        Ok(ids_in(&answer.data).count())
    };
    Ok(count(READ_VDIS)? - count(READ_DEL_VDIS)?)
}

/// A restore through node 1 whose input stops one byte before its end.
fn waiting_restore(cluster: &Cluster, stream: &[u8], count_before: usize) -> Result<(Child, ChildStdin)> {
    let mut dog = Command::new(binary("dog")?);
    dog.args(["vdi", "restore", "-s", "one", "disk", "-p", &cluster.node(1).port.to_string()])
        .env_remove("SHEEPDOG_DOG_ADDR")
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null());
    let mut child = dog.spawn()?;
    let mut input = child.stdin.take().context("a pipe")?;
    input.write_all(&stream[..stream.len() - 1])?;
    cluster.wait_until("the restore to begin", PATIENCE, |cluster| Ok(living(cluster)? == count_before + 1))?;
    Ok((child, input))
}

#[test]
fn a_restore_that_is_killed_leaves_nothing() -> Result<()> {
    let (cluster, stream) = backed_up()?;
    let (before, count, now) = (listing(&cluster)?, living(&cluster)?, content(&cluster, "disk", None)?);
    let (mut child, _input) = waiting_restore(&cluster, &stream, count)?;
    ensure!(listing(&cluster)? == before, "it is shown while it is not complete");
    child.kill()?;
    child.wait()?;
    cluster.wait_until("it to be given up", PATIENCE, |cluster| Ok(living(cluster)? == count))?;
    ensure!(listing(&cluster)? == before && content(&cluster, "disk", None)? == now, "it left something");
    restore(&cluster, &["-s", "one", "disk"], &stream)?.ok()?;
    cluster.finish()
}

#[test]
fn a_node_that_dies_under_a_restore_leaves_nothing_that_anybody_sees() -> Result<()> {
    let (mut cluster, stream) = backed_up()?;
    let (before, count, two) = (listing(&cluster)?, living(&cluster)?, content(&cluster, "disk", Some("two"))?);
    let (mut child, mut input) = waiting_restore(&cluster, &stream, count)?;
    cluster.kill(1)?;
    // It may have noticed already.
    let _ = input.write_all(&stream[stream.len() - 1..]);
    drop(input);
    ensure!(child.wait()?.code() == Some(2), "it cannot have succeeded");
    ensure!(listing(&cluster)? == before, "{}", listing(&cluster)?);
    let restored = cluster.dog_through(2, &["vdi", "restore", "-s", "one", "disk"], &stream)?.ok()?;
    ensure!(content(&cluster, "disk", Some(&number_of(&restored)?))? == two, "the next one");
    ensure!(living(&cluster)? == count + 1, "what was left is gone");
    cluster.restart(1)?;
    cluster.wait_recovered()?;
    cluster.finish()
}

#[test]
fn the_old_driver_sees_it_beside_the_volume() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("a restored snapshot in QEMU 5.2") else { return Ok(()) };
    let (cluster, stream) = backed_up()?;
    let (disk, two) = (tcp_url(cluster.node(0), "disk"), tcp_url(cluster.node(0), "disk#two"));
    let number = number_of(&restore(&cluster, &["-s", "one", "disk"], &stream)?.ok()?)?;
    let restored = tcp_url(cluster.node(2), &format!("disk#{number}"));
    qemu.compare(&restored, &two)?;
    let list = qemu.img(&["snapshot", "-l", &disk])?.ok()?.out();
    ensure!(list.lines().any(|line| line.starts_with(&number)), "{list}");
    // The volume, whose id is the lower one, is opened and goes on.
    qemu.io(&disk, &[], &["write -P 9 0 1M", "read -P 9 0 1M"])?;
    qemu.img(&["snapshot", "-c", "later", &disk])?.ok()?;
    qemu.img(&["snapshot", "-a", &number, &disk])?.ok()?;
    qemu.compare(&disk, &two)?;
    cluster.finish()
}
