//! Numbers of copies changed on real nodes while guests write and a node is killed in the middle (P1, P2).

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_proto::oid::{Oid, VdiId};
use tests::spawn::{Cluster, ClusterPlan};
use tests::writer::{After, Durability, Guest, WriterPlan, write_while};

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 64 * MIB;
const OBJECT_COUNT: u32 = 16;
const PATIENCE: Duration = Duration::from_mins(2);

fn pause(seconds: f64) {
    std::thread::sleep(Duration::from_secs_f64(seconds));
}

/// Three nodes and a volume of so many copies, all of whose objects exist.
fn begin(copies: u8, seed: u64) -> Result<(Cluster, Vec<Guest>)> {
    let cluster = ClusterPlan::new(3).start_formatted(3)?;
    if copies != 3 {
        cluster.dog(&["cluster", "alter-copy", "-f", "-c", &copies.to_string()])?.ok()?;
    }
    cluster.wait_recovered()?;
    let plan = WriterPlan { depth: 16, durability: Durability::WriteThrough, seed };
    let mut guests = vec![Guest::new(&mut cluster.client(0)?, "disk", VOLUME_BYTES, plan)?];
    write_while(&mut guests, cluster.node(0).port, || {
        pause(1.0);
        Ok(())
    })?;
    wait_counted(&cluster, usize::from(copies))?;
    Ok((cluster, guests))
}

fn vdi(cluster: &Cluster) -> Result<VdiId> {
    cluster.client(0)?.look_up("disk", "", 0)
}

/// How many nodes have a file of each data object.
fn counted(cluster: &Cluster, vdi: VdiId) -> Vec<usize> {
    let mut counts = Vec::new();
    for index in 0..OBJECT_COUNT {
        let name = format!("{:016x}", Oid::data(vdi, index).raw());
        let is_there = |node: &usize| cluster.node(*node).store.join("obj").join(&name).exists();
        counts.push((0..cluster.node_count()).filter(is_there).count());
    }
    counts
}

fn wait_counted(cluster: &Cluster, copies: usize) -> Result<()> {
    let vdi = vdi(cluster)?;
    let mut last = Vec::new();
    cluster
        .wait_until(&format!("{copies} copies of every object"), PATIENCE, |cluster| {
            last = counted(cluster, vdi);
            Ok(last.iter().all(|count| *count == copies))
        })
        .with_context(|| format!("{last:?}"))
}

fn alter(cluster: &Cluster, from: u8, to: u8) -> Result<()> {
    let changed = cluster.dog(&["vdi", "alter-copy", "-f", "-c", &to.to_string(), "disk"])?.ok()?;
    let expected = format!("disk's redundancy level is set to {to}, the old one was {from}.\n");
    ensure!(changed.err() == expected && changed.out().is_empty(), "{changed}");
    let listed = cluster.dog(&["vdi", "list", "-r", "disk"])?.ok()?.out();
    ensure!(listed.split(' ').nth(8) == Some(&to.to_string()), "{listed}");
    Ok(())
}

/// Every promise is kept through each node, the check is content, and there are exactly so many copies on the disks.
fn verify(cluster: &Cluster, guests: &mut [Guest], copies: usize) -> Result<()> {
    cluster.wait_members(3)?;
    cluster.wait_recovered()?;
    wait_counted(cluster, copies)?;
    for guest in guests {
        for index in 0..3 {
            let seen = guest.ledger.verify(&mut cluster.client(index)?, &guest.name, After::ProcessCrash);
            guest.ledger.hold_to(&seen.with_context(|| format!("as node {index} has it"))?);
        }
        cluster.dog(&["vdi", "check", &guest.name])?.ok()?;
        let exist = cluster.dog(&["vdi", "check", "-e", &guest.name])?.ok()?;
        ensure!(exist.out() == format!("{} is fine, no object is missing.\n", guest.name), "{exist}");
    }
    Ok(())
}

/// The change under load, with a node killed some time after it and started again later.
fn altered_under_load(from: u8, to: u8, kill_after: f64, seed: u64) -> Result<(Cluster, Vec<Guest>)> {
    let (mut cluster, mut guests) = begin(from, seed)?;
    let port = cluster.node(0).port;
    let outcomes = write_while(&mut guests, port, || {
        pause(0.5);
        alter(&cluster, from, to)?;
        pause(kill_after);
        cluster.kill(2)?;
        pause(1.5);
        cluster.restart(2)?;
        pause(1.5);
        Ok(())
    })?;
    eprintln!("{from} -> {to}, killed {kill_after} s after: {outcomes:?}");
    ensure!(outcomes.iter().all(|outcome| !outcome.is_cut && outcome.acknowledged_count > 0), "{outcomes:?}");
    verify(&cluster, &mut guests, usize::from(to))?;
    Ok((cluster, guests))
}

#[test]
fn more_copies_under_load_with_a_node_killed() -> Result<()> {
    for (kill_after, seed) in [(0.0, 1), (0.3, 2)] {
        let (mut cluster, mut guests) = altered_under_load(2, 3, kill_after, seed)?;
        // Any two of the nodes may go now.
        cluster.kill(0)?;
        cluster.kill(1)?;
        cluster.wait_members(1)?;
        for guest in &mut guests {
            guest.ledger.verify(&mut cluster.client(2)?, &guest.name, After::ProcessCrash)?;
        }
        cluster.finish()?;
    }
    Ok(())
}

#[test]
fn fewer_copies_under_load_with_a_node_killed() -> Result<()> {
    for (kill_after, seed) in [(0.0, 3), (0.5, 4)] {
        let (cluster, mut guests) = altered_under_load(3, 1, kill_after, seed)?;
        // And back: nothing of what was dropped comes back with what it was then.
        let port = cluster.node(1).port;
        write_while(&mut guests, port, || {
            alter(&cluster, 1, 3)?;
            pause(1.0);
            Ok(())
        })?;
        verify(&cluster, &mut guests, 3)?;
        cluster.finish()?;
    }
    Ok(())
}

#[test]
fn a_second_copy_under_load_with_a_node_killed() -> Result<()> {
    for (kill_after, seed) in [(0.0, 5), (0.2, 6)] {
        let (cluster, _) = altered_under_load(1, 2, kill_after, seed)?;
        cluster.finish()?;
    }
    Ok(())
}

#[test]
fn a_whole_chain_is_altered_and_only_once_at_a_time() -> Result<()> {
    let (mut cluster, mut guests) = begin(2, 7)?;
    let first = vdi(&cluster)?;
    cluster.dog(&["vdi", "snapshot", "-s", "before", "disk"])?.ok()?;
    cluster.dog(&["vdi", "clone", "-s", "before", "disk", "copy"])?.ok()?;
    write_while(&mut guests, cluster.node(0).port, || {
        pause(0.5);
        Ok(())
    })?;
    let same = cluster.dog(&["vdi", "alter-copy", "-c", "2", "disk"])?.exits(1)?;
    ensure!(same.err() == "disk's redundancy level is already set to 2, nothing changed.\n", "{same}");
    // Without an answer nothing is done; a yes is one.
    let asked = cluster.dog(&["vdi", "alter-copy", "-c", "3", "disk"])?.exits(0)?;
    ensure!(asked.out().ends_with("Are you sure you want to continue? [yes/no]: "), "{asked}");
    ensure!(cluster.dog(&["vdi", "list", "-r", "disk"])?.ok()?.out().contains(" 2 "), "changed without an answer");
    // Until the further copies are there another change has to wait.
    cluster.dog(&["cluster", "recover", "disable"])?.ok()?;
    cluster.dog_through(0, &["vdi", "alter-copy", "-c", "3", "disk"], b"yes\nyes\n")?.ok()?;
    let again = cluster.dog(&["vdi", "alter-copy", "-f", "-c", "1", "disk"])?.exits(1)?;
    ensure!(again.err().contains("still being carried out"), "{again}");
    cluster.kill(2)?;
    cluster.wait_members(2)?;
    cluster.restart(2)?;
    cluster.dog(&["cluster", "recover", "enable"])?.ok()?;
    verify(&cluster, &mut guests, 3)?;
    ensure!(counted(&cluster, first).iter().all(|count| *count == 3), "the snapshot has as many");
    let clone = cluster.dog(&["vdi", "alter-copy", "-f", "-c", "1", "copy"])?.ok()?;
    ensure!(clone.err().contains("What copy shares with disk keeps 3 copies"), "{clone}");
    cluster.finish()
}

#[test]
fn held_recovery_leaves_copies_until_it_is_let_go() -> Result<()> {
    let (mut cluster, mut guests) = begin(3, 8)?;
    let held = cluster.dog(&["cluster", "recover", "disable"])?.ok()?;
    ensure!(held.out() == "Cluster recovery: disable\n", "{held}");
    let info = || -> Result<String> { Ok(cluster.dog(&["cluster", "info"])?.ok()?.out()) };
    ensure!(info()?.starts_with("Cluster status: running, auto-recovery disabled\n"), "{}", info()?);
    let port = cluster.node(0).port;
    cluster.kill(2)?;
    cluster.wait_members(2)?;
    write_while(&mut guests, port, || {
        pause(0.5);
        Ok(())
    })?;
    cluster.restart(2)?;
    cluster.wait_members(3)?;
    pause(2.0);
    let recovering = cluster.dog(&["node", "recovery", "-r"])?.ok()?.out();
    ensure!(recovering.lines().count() == 1, "node 3 waits: {recovering}");
    // What a guest reads through it is brought at once.
    for guest in &mut guests {
        guest.ledger.verify(&mut cluster.client(2)?, &guest.name, After::ProcessCrash)?;
    }
    // A throttle of its own holds it back too.
    let port = cluster.node(2).port.to_string();
    cluster.dog(&["node", "recovery", "set-throttle", "1", "200", "-p", &port])?.ok()?;
    let told = cluster.dog(&["node", "recovery", "get-throttle", "-p", &port])?.ok()?;
    ensure!(told.err() == "max (1), interval (200)\n" && told.out().is_empty(), "{told}");
    let enabled = cluster.dog(&["cluster", "recover", "enable"])?.ok()?;
    ensure!(enabled.out() == "Cluster recovery: enable\n", "{enabled}");
    verify(&cluster, &mut guests, 3)?;
    cluster.finish()
}

#[test]
fn a_strict_cluster_refuses_writes_that_cannot_have_all_copies() -> Result<()> {
    let mut cluster = ClusterPlan::new(3).start()?;
    cluster.dog(&["cluster", "format", "-c", "3", "-t"])?.ok()?;
    cluster.dog(&["vdi", "create", "disk", "16M"])?.ok()?;
    cluster.dog(&["vdi", "create", "-c", "2", "two", "16M"])?.ok()?;
    let write = |cluster: &Cluster, name: &str| cluster.dog_through(0, &["vdi", "write", name, "0", "5"], b"hello");
    write(&cluster, "disk")?.ok()?;
    cluster.kill(2)?;
    cluster.wait_members(2)?;
    let refused = write(&cluster, "disk")?.exits(1)?;
    ensure!(refused.err().contains("IO has halted as there are not enough living nodes"), "{refused}");
    write(&cluster, "two")?.ok()?;
    ensure!(cluster.dog(&["vdi", "read", "disk", "0", "5"])?.ok()?.stdout == b"hello", "reads go on");
    cluster.restart(2)?;
    cluster.wait_members(3)?;
    write(&cluster, "disk")?.ok()?;
    cluster.finish()
}
