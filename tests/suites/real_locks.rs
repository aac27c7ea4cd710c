//! Locks on real nodes: where they are enforced one client has a volume open, and nobody who is gone keeps it from the others.

use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::clients::{Client, Request, Volume, opcode, padded, result};
use tests::qemu::{Qemu, tcp_url};
use tests::spawn::{Cluster, ClusterPlan};

/// A client that is gone is missed for 5 s, and a node for less.
const PATIENCE: Duration = Duration::from_secs(30);

fn cluster(enforces: bool) -> Result<Cluster> {
    let cluster = ClusterPlan::new(3).start()?;
    let format = ["cluster", "format", "-c", "3", "-l"];
    cluster.dog(&format[..if enforces { 5 } else { 4 }])?.ok()?;
    cluster.dog(&["vdi", "create", "disk", "16M"])?.ok()?;
    Ok(cluster)
}

/// Asks as QEMU does, on a connection of its own; gives the result code.
fn lock(cluster: &Cluster, index: usize, name: &str, tag: &str) -> Result<u32> {
    let request = Request::new(opcode::LOCK_VDI).version(1);
    Ok(cluster.client(index)?.call(request, &padded(&[name, tag]))?.result())
}

/// Opens as QEMU does; gives the connection that stays.
fn open(cluster: &Cluster, index: usize) -> Result<Client> {
    let data = cluster.client(index)?;
    ensure!(lock(cluster, index, "disk", "")? == result::SUCCESS, "the volume is free");
    Ok(data)
}

fn release(cluster: &Cluster, index: usize) -> Result<()> {
    let mut client = cluster.client(index)?;
    let vdi = client.look_up("disk", "", 0)?;
    let request = Request::new(opcode::RELEASE_VDI).with_u32(24, vdi.get());
    client.call(request, b"disk\0")?.success("release").map(drop)
}

fn owners(cluster: &Cluster) -> Result<Vec<u16>> {
    let listed = cluster.dog(&["vdi", "lock", "list", "--json"])?.ok()?.out();
    let rows: Vec<serde_json::Value> = serde_json::from_str(&listed)?;
    let port = |row: &serde_json::Value| row["owners"][0]["port"].as_u64().map(|port| port as u16);
    rows.iter().map(|row| port(row).context("an owner")).collect()
}

#[test]
fn one_client_has_a_volume_open_until_it_lets_go_or_is_gone() -> Result<()> {
    const VDI_LOCKED: u32 = 0x07;
    let mut cluster = cluster(true)?;
    ensure!(owners(&cluster)?.is_empty(), "nobody has it");
    let first = open(&cluster, 0)?;
    for index in [0, 1] {
        ensure!(lock(&cluster, index, "disk", "")? == VDI_LOCKED, "through node {index}");
    }
    ensure!(owners(&cluster)? == [cluster.node(0).port], "the node of the client");
    let table = cluster.dog(&["vdi", "lock", "list"])?.ok()?.out();
    let expected = format!("IPv4 ip:127.0.0.1 port:{}", cluster.node(0).port);
    ensure!(table.lines().count() == 2 && table.contains(&expected), "{table}");
    // A snapshot takes the lock along; whoever opens the snapshot neither needs it nor gives it back.
    cluster.dog(&["vdi", "snapshot", "-s", "one", "disk"])?.ok()?;
    ensure!(lock(&cluster, 1, "disk", "")? == VDI_LOCKED, "a snapshot was made");
    ensure!(lock(&cluster, 1, "disk", "one")? == result::SUCCESS, "a snapshot is free");
    let snapshot = cluster.client(1)?.look_up("disk", "one", 0)?;
    let close = Request::new(opcode::RELEASE_VDI).with_u32(24, snapshot.get());
    cluster.client(0)?.call(close, b"disk\0")?.success("release")?;
    ensure!(lock(&cluster, 1, "disk", "")? == VDI_LOCKED, "the snapshot was closed");
    // It closes, in order.
    release(&cluster, 0)?;
    let second = open(&cluster, 1)?;
    drop(first);
    // It crashes.
    drop(second);
    ensure!(lock(&cluster, 2, "disk", "")? == VDI_LOCKED, "it may come back");
    cluster.wait_until("the lock of a dead client", PATIENCE, |cluster| Ok(owners(cluster)?.is_empty()))?;
    // Its node crashes.
    let third = open(&cluster, 2)?;
    cluster.kill(2)?;
    cluster.wait_until("the lock of a dead node", PATIENCE, |cluster| Ok(owners(cluster)?.is_empty()))?;
    drop(third);
    // An operator knows better.
    let _fourth = open(&cluster, 0)?;
    cluster.dog_through(1, &["vdi", "lock", "unlock", "disk"], &[])?.ok()?;
    let refused = cluster.dog(&["vdi", "lock", "unlock", "disk"])?.exits(1)?.refused()?;
    ensure!(refused.err().starts_with("VDI disk (vid=") && refused.err().contains(") is not locked"), "{refused}");
    let _fifth = open(&cluster, 1)?;
    cluster.restart(2)?;
    cluster.finish()
}

#[test]
fn a_client_that_connects_again_keeps_its_lock() -> Result<()> {
    let cluster = cluster(true)?;
    let first = open(&cluster, 0)?;
    drop(first);
    let mut again = cluster.client(0)?;
    let volume = Volume::open(&mut cluster.client(1)?, "disk", "")?;
    again.flush(volume.vdi)?;
    std::thread::sleep(Duration::from_secs(7));
    ensure!(owners(&cluster)? == [cluster.node(0).port], "it is there, and writes");
    drop(again);
    cluster.wait_until("the lock of a dead client", PATIENCE, |cluster| Ok(owners(cluster)?.is_empty()))?;
    cluster.finish()
}

#[test]
fn locks_are_advisory_by_default() -> Result<()> {
    let cluster = cluster(false)?;
    let (_first, _second) = (open(&cluster, 0)?, open(&cluster, 1)?);
    ensure!(owners(&cluster)?.is_empty(), "nobody has it for himself");
    cluster.dog(&["vdi", "lock", "unlock", "disk"])?.exits(1)?.refused()?;
    cluster.dog(&["vdi", "lock"])?.exits(64)?.refused()?;
    cluster.dog(&["vdi", "lock", "unlock"])?.exits(64)?.refused()?;
    cluster.finish()
}

#[test]
fn the_old_driver_is_kept_out_and_let_in() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("locks with QEMU 5.2") else { return Ok(()) };
    let cluster = cluster(true)?;
    let (here, there) = (tcp_url(cluster.node(0), "disk"), tcp_url(cluster.node(1), "disk"));
    // Opened and closed, several times, by one after the other.
    qemu.io(&here, &[], &["write -P 1 0 1M"])?;
    qemu.io(&there, &[], &["read -P 1 0 1M"])?;
    qemu.img(&["snapshot", "-c", "one", &here])?.ok()?;
    ensure!(owners(&cluster)?.is_empty(), "all have closed it");
    let program = command_of()?;
    let mut holder = Command::new(&program);
    holder
        .args(["-f", "raw", &here, "-c", "read 0 512", "-c", "sleep 60000"])
        .stdin(Stdio::null())
        .stdout(Stdio::null());
    let mut holder = holder.spawn()?;
    cluster.wait_until("QEMU to open it", PATIENCE, |cluster| Ok(owners(cluster)?.len() == 1))?;
    std::thread::sleep(Duration::from_secs(7));
    let refused = qemu.img(&["snapshot", "-l", &there])?.refused()?;
    ensure!(refused.err().contains("busy") || refused.err().contains("locked"), "{refused}");
    holder.kill()?;
    holder.wait()?;
    cluster.wait_until("the lock of a killed QEMU", PATIENCE, |cluster| Ok(owners(cluster)?.is_empty()))?;
    qemu.io(&there, &[], &["read -P 1 0 1M"])?;
    cluster.finish()
}

fn command_of() -> Result<std::path::PathBuf> {
    Ok(tests::command::qemu52().context("found a moment ago")?.join("qemu-io"))
}
