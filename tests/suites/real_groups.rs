//! Groups of snapshots, other names, clones made independent, and limits, on real nodes with clients at work.

use std::collections::BTreeSet;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use qemu_proto::oid::{Oid, VdiId};
use serde_json::Value;
use tests::clients::Volume;
use tests::nbd_client::{NbdClient, Style};
use tests::sectors::fill_random;
use tests::sim::Random;
use tests::spawn::{Cluster, binary};
use tests::volume_proof::await_objects;

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

fn create(cluster: &Cluster, name: &str, objects: u64) -> Result<()> {
    dog(cluster, &["vdi", "create", name, &(objects * OBJECT).to_string()]).map(drop)
}

fn tags(cluster: &Cluster, name: &str) -> Result<Vec<String>> {
    let rows: Vec<Value> = serde_json::from_str(&dog(cluster, &["vdi", "list", "--json", name])?)?;
    Ok(rows.iter().map(|row| row["tag"].as_str().unwrap_or_default().to_owned()).collect())
}

#[test]
fn snapshots_of_a_group_are_of_one_moment() -> Result<()> {
    const ROUNDS: usize = 15;
    let cluster = Cluster::three()?;
    for name in ["a", "b", "c"] {
        create(&cluster, name, 1)?;
    }
    let (over, counted) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| -> Result<()> {
        // A number goes to one volume and, once that is acknowledged, to the next, each through another node.
        let writer = scope.spawn(|| -> Result<()> {
            let mut clients = [nbd(&cluster, 0, "a")?, nbd(&cluster, 1, "b")?, nbd(&cluster, 2, "c")?];
            for number in 1_u64.. {
                for client in &mut clients {
                    client.write(4096, &number.to_le_bytes().repeat(64), 0)?;
                }
                counted.store(number, Ordering::SeqCst);
                if over.load(Ordering::SeqCst) {
                    return Ok(());
                }
            }
            Ok(())
        });
        let taken = (0..ROUNDS).try_for_each(|round| {
            let words = ["vdi", "snapshot", "-s", &format!("g{round}"), "c", "a", "b"];
            cluster.dog_through(round % 3, &words, &[])?.ok().map(drop)
        });
        over.store(true, Ordering::SeqCst);
        writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?;
        taken
    })?;
    let mut seen = BTreeSet::new();
    for round in 0..ROUNDS {
        let number = |name: &str| -> Result<u64> {
            let read = nbd(&cluster, round % 3, &format!("{name}@g{round}"))?.read(4096, 8)?;
            Ok(u64::from_le_bytes(read.try_into().ok().context("eight bytes")?))
        };
        let (a, b, c) = (number("a")?, number("b")?, number("c")?);
        ensure!(a >= b && b >= c && a <= c + 1, "snapshot {round} has {a}, then {b}, then {c}");
        seen.insert(a);
    }
    ensure!(seen.len() > 1 && counted.load(Ordering::SeqCst) > 2, "the writer did not write: {seen:?}");
    // All of them or none.
    dog(&cluster, &["vdi", "snapshot", "-s", "alone", "b"])?;
    let before = [tags(&cluster, "a")?, tags(&cluster, "b")?];
    let refused = cluster.dog(&["vdi", "snapshot", "-s", "alone", "a", "b"])?.refused()?;
    ensure!(refused.err().contains("in use"), "{refused}");
    let refused = cluster.dog(&["vdi", "snapshot", "-s", "more", "a", "nobody", "b"])?.refused()?;
    ensure!(refused.err().contains("no such volume"), "{refused}");
    ensure!([tags(&cluster, "a")?, tags(&cluster, "b")?] == before, "a refused group left a snapshot");
    cluster.finish()
}

#[test]
fn a_volume_keeps_everything_under_another_name() -> Result<()> {
    let mut cluster = Cluster::three()?;
    create(&cluster, "old", 2)?;
    create(&cluster, "other", 1)?;
    let mut content = bytes(2 * OBJECT, 1);
    let mut client = nbd(&cluster, 1, "old")?;
    client.write(0, &content[..OBJECT as usize], 0)?;
    client.write(OBJECT, &content[OBJECT as usize..], 0)?;
    dog(&cluster, &["vdi", "snapshot", "-s", "one", "old"])?;
    let then = content.clone();
    dog(&cluster, &["vdi", "qos", "old", "--iops", "100000"])?;
    let refused = cluster.dog(&["vdi", "rename", "old", "other"])?.refused()?;
    ensure!(refused.err().contains("in use"), "{refused}");
    dog(&cluster, &["vdi", "rename", "old", "new"])?;
    // Who had it open goes on, also through a snapshot.
    for round in 0..2 {
        let part = bytes(4096, 10 + round);
        client.write(round * 8192, &part, 0)?;
        content[(round * 8192) as usize..][..4096].copy_from_slice(&part);
        dog(&cluster, &["vdi", "snapshot", "-s", &format!("later{round}"), "new"])?;
    }
    cluster.dog(&["vdi", "snapshot", "-s", "x", "old"])?.refused()?;
    let mut listed = tags(&cluster, "new")?;
    listed.sort();
    ensure!(listed == ["", "later0", "later1", "one"], "{listed:?}");
    ensure!(dog(&cluster, &["vdi", "qos", "new"])?.contains("100000"), "the limits went with the name");
    // Another one of the old name is another volume.
    create(&cluster, "old", 1)?;
    ensure!(tags(&cluster, "old")? == [""], "{:?}", tags(&cluster, "old")?);
    for index in 0..3 {
        cluster.kill(index)?;
        cluster.restart(index)?;
        cluster.wait_members(3)?;
        cluster.wait_recovered()?;
        ensure!(nbd(&cluster, index, "new")?.read_all()? == content, "the volume through node {index}");
        ensure!(nbd(&cluster, index, "new@one")?.read_all()? == then, "the snapshot through node {index}");
        ensure!(nbd(&cluster, index, "old")?.read_all()? == vec![0; OBJECT as usize], "the new one of the old name");
    }
    dog(&cluster, &["vdi", "delete", "-s", "one", "new"])?;
    dog(&cluster, &["vdi", "rollback", "-f", "-s", "later0", "new"])?;
    content[8192..12288].copy_from_slice(&then[8192..12288]);
    ensure!(nbd(&cluster, 0, "new")?.read_all()? == content, "rolled back");
    cluster.finish()
}

#[test]
fn a_clone_becomes_independent_while_it_is_written() -> Result<()> {
    const OBJECTS: u64 = 24;
    let cluster = Cluster::three()?;
    create(&cluster, "base", OBJECTS)?;
    let mut content = vec![0; (OBJECTS * OBJECT) as usize];
    let mut client = nbd(&cluster, 0, "base")?;
    // Some objects are holes.
    for index in (0..OBJECTS).filter(|index| index % 4 != 3) {
        let part = bytes(64 << 10, index);
        client.write(index * OBJECT + MIB, &part, 0)?;
        content[(index * OBJECT + MIB) as usize..][..part.len()].copy_from_slice(&part);
    }
    dog(&cluster, &["vdi", "snapshot", "-s", "one", "base"])?;
    dog(&cluster, &["vdi", "clone", "-s", "one", "base", "copy"])?;
    let over = AtomicBool::new(false);
    let rounds = std::thread::scope(|scope| -> Result<u64> {
        let writer = scope.spawn(|| -> Result<Vec<(usize, Vec<u8>)>> {
            let (mut client, mut random, mut wrote) = (nbd(&cluster, 1, "copy")?, Random::new(5), Vec::new());
            while !over.load(Ordering::SeqCst) {
                let at = random.below(OBJECTS * OBJECT / 4096) * 4096;
                let part = bytes(4096, random.bits());
                client.write(at, &part, 0)?;
                wrote.push((at as usize, part));
            }
            Ok(wrote)
        });
        let flattened = flatten_with_interruptions(&cluster, "copy");
        over.store(true, Ordering::SeqCst);
        for (at, part) in writer.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))? {
            content[at..at + part.len()].copy_from_slice(&part);
        }
        flattened
    })?;
    println!("flattened after {rounds} interruptions");
    let copy = Volume::open(&mut cluster.client(2)?, "copy", "")?;
    ensure!(copy.map.iter().all(|owner| [0, copy.vdi.get()].contains(owner)), "{:x?}", copy.map);
    // Nothing of what it came from is needed any more.
    dog(&cluster, &["vdi", "delete", "base"])?;
    dog(&cluster, &["vdi", "delete", "-s", "one", "base"])?;
    let own: BTreeSet<Oid> = (0..copy.map.len())
        .filter(|index| copy.map[*index] != 0)
        .map(|index| Oid::data(copy.vdi, index as u32))
        .collect();
    await_objects(&cluster, &own, &BTreeSet::from([copy.vdi]))?;
    ensure!(nbd(&cluster, 2, "copy")?.read_all()? == content, "the copy changed");
    let parent = parent_of(&cluster, copy.vdi)?;
    ensure!(parent == 0, "it is still a child of {parent:x}");
    let tree = dog(&cluster, &["vdi", "tree"])?;
    ensure!(tree.contains("copy") && !tree.contains("base"), "{tree}");
    cluster.dog(&["vdi", "flatten", "nobody"])?.refused()?;
    cluster.finish()
}

fn parent_of(cluster: &Cluster, vdi: VdiId) -> Result<u32> {
    let header = cluster.client(0)?.read_object(Oid::inode(vdi), 564, 4)?;
    Ok(u32::from_le_bytes(header.try_into().ok().context("four bytes")?))
}

/// Ends `dog` a few times before it is done; gives how often.
fn flatten_with_interruptions(cluster: &Cluster, name: &str) -> Result<u64> {
    for round in 0..3 {
        let mut dog = Command::new(binary("dog")?);
        dog.args(["vdi", "flatten", name]).env("SHEEPDOG_DOG_PORT", cluster.node(2).port.to_string());
        let mut child = dog.stdout(Stdio::null()).spawn()?;
        std::thread::sleep(Duration::from_millis(20 + 40 * round));
        child.kill()?;
        child.wait()?;
    }
    cluster.dog_through(0, &["vdi", "flatten", name], &[])?.ok()?;
    Ok(3)
}

/// Writes one after the other for so long; gives how many.
fn writes_for(cluster: &Cluster, name: &str, time: Duration) -> Result<u64> {
    let mut client = nbd(cluster, 1, name)?;
    let (started, mut count) = (Instant::now(), 0);
    while started.elapsed() < time {
        client.write((count % 256) * 4096, &[1; 4096], 0)?;
        count += 1;
    }
    Ok(count)
}

#[test]
fn limits_hold_for_their_volume_only() -> Result<()> {
    const OPERATIONS: u64 = 40;
    const TIME: Duration = Duration::from_secs(4);
    let cluster = Cluster::three()?;
    for name in ["slow", "free"] {
        create(&cluster, name, 1)?;
        nbd(&cluster, 0, name)?.write(0, &[1; 4096], 0)?;
    }
    dog(&cluster, &["vdi", "qos", "slow", "--iops", &OPERATIONS.to_string()])?;
    let (slow, twin, free) = std::thread::scope(|scope| {
        let run = |name: &'static str| scope.spawn(|| writes_for(&cluster, name, TIME));
        let runs = [run("slow"), run("slow"), run("free")];
        let mut counts =
            runs.into_iter().map(|run| run.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
        let mut next = || counts.next().context("a run")?;
        anyhow::Ok((next()?, next()?, next()?))
    })?;
    // Fewer are the machine's business, more are a fault. Those that wait when the time is over are done as well.
    let most = OPERATIONS * TIME.as_secs() * 11 / 10 + 4;
    ensure!(slow + twin <= most, "{slow} and {twin} writes in {TIME:?}, of {OPERATIONS} per second");
    ensure!(slow + twin < free, "the other volume had {free} only");
    println!("{slow} and {twin} of at most {most}; without a limit {free}");
    let said = cluster.dog_through(1, &["node", "stat", "--json"], &[])?.ok()?.out();
    let stat: Value = serde_json::from_str(&said)?;
    let figures = stat["limits"].as_array().context("limits")?;
    ensure!(figures.len() == 1 && figures[0]["name"] == "slow", "{said}");
    ensure!(figures[0]["operations_per_second"] == OPERATIONS && figures[0]["waiting"] == 0, "{said}");
    // All but those of the first moment had to wait.
    let delayed = figures[0]["delayed"].as_u64().context("a number")?;
    ensure!(delayed <= slow + twin && delayed * 10 >= (slow + twin) * 8, "{delayed} of {slow} and {twin} waited");
    let table = cluster.dog_through(1, &["node", "stat"], &[])?.ok()?.out();
    ensure!(table.contains(&format!("\nslow\t{OPERATIONS}\t-\t0 s\t{delayed}\t0\n")), "{table}");
    let rows: Vec<Value> = serde_json::from_str(&dog(&cluster, &["vdi", "list", "--json"])?)?;
    let row = |name: &str| rows.iter().find(|row| row["name"] == name).cloned().unwrap_or_default();
    ensure!(row("slow")["limits"]["operations_per_second"] == OPERATIONS, "{rows:?}");
    ensure!(row("free")["limits"].is_null(), "{rows:?}");
    // Bytes: a megabyte per second, in requests of 64 KiB.
    dog(&cluster, &["vdi", "qos", "slow", "--iops", "0", "--bps", "1M"])?;
    let (mut client, started, mut moved) = (nbd(&cluster, 2, "slow")?, Instant::now(), 0);
    while started.elapsed() < TIME {
        moved += client.read(0, 64 << 10)?.len() as u64;
    }
    ensure!(moved <= MIB * TIME.as_secs() * 11 / 10 + (128 << 10), "{moved} bytes in {TIME:?}");
    dog(&cluster, &["vdi", "qos", "slow", "--bps", "0"])?;
    ensure!(dog(&cluster, &["vdi", "qos", "slow"])?.matches("no limit").count() == 2, "no limits any more");
    ensure!(writes_for(&cluster, "slow", TIME / 4)? > most / 4, "it is still slow");
    cluster.dog(&["vdi", "qos", "nobody", "--iops", "1"])?.refused()?;
    cluster.finish()
}
