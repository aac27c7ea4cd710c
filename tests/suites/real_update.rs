//! A cluster that is updated one node at a time while a guest writes: nodes of an earlier version take part in everything but
//! what they do not know, and nothing that they do not know is ordered before the last of them is gone.
//!
//! The earlier version is this one, told to understand no more than the first level ([`sheep_core::level`]). Root, `nft` and
//! `ip` are needed; without them the test says `SKIPPED`.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::command;
use tests::flock::Flock;
use tests::namespaces::Network;
use tests::spawn::DOG_DEADLINE;
use tests::workload::{Disk, Load, LoadPlan, Record};

const NODES: usize = 3;
const EARLIER: &[&str] = &["--level", "1"];
/// No step of an update may keep the guest waiting for as long as this, on however busy a machine.
const LIVELY: Duration = Duration::from_secs(20);

/// A snapshot of another volume from the stream of its backup: what the first version did not know.
fn restore(flock: &Flock, through: usize, stream: &[u8]) -> Result<command::Finished> {
    flock.dog_with(through, &["vdi", "restore", "-s", "one", "other"], stream, DOG_DEADLINE)
}

#[test]
fn a_cluster_is_updated_one_node_at_a_time() -> Result<()> {
    if let Some(why) = Network::why_not() {
        command::skipped("update", &why);
        return Ok(());
    }
    let mut flock = Flock::on(Network::new(NODES)?, tests::flock::Driver::Default)?;
    for index in 0..NODES {
        flock.set_arguments(index, EARLIER);
    }
    flock.start_all()?;
    flock.wait_listed(NODES)?;
    flock.format(0, &["-c", "3"])?;
    flock.wait_members(NODES)?;
    flock.dog(0, &["vdi", "create", "other", "8M"])?.ok()?;
    for tag in ["one", "two"] {
        flock.dog_with(0, &["vdi", "write", "other", "0", "3"], tag.as_bytes(), DOG_DEADLINE)?.ok()?;
        flock.dog(0, &["vdi", "snapshot", "-s", tag, "other"])?.ok()?;
    }
    let stream = flock.dog(0, &["vdi", "backup", "-F", "one", "-s", "two", "other"])?.ok()?.stdout;
    let record = Record::new(Disk::create(&mut flock.client(0)?, "disk", 64)?);
    let load = Load::start(&record, &LoadPlan::new(flock.sockets([0]), 1));
    load.wait_progress(&[0], 50, LIVELY)?;

    for index in [2, 1, 0] {
        let refused = restore(&flock, 1, &stream)?.exits(1)?.refused()?;
        ensure!(refused.err().contains("earlier version"), "node {index} is still of the first version: {refused}");
        flock.terminate(index)?;
        flock.set_arguments(index, &[]);
        flock.start(index)?;
        flock.wait_members(NODES)?;
        load.wait_progress(&[0], 50, LIVELY).with_context(|| format!("with node {index} updated"))?;
        flock.wait_recovered()?;
    }
    // As long as nothing new was used, a node may go back. A snapshot is nothing new.
    flock.dog(0, &["vdi", "snapshot", "-s", "three", "other"])?.ok()?;
    flock.terminate(2)?;
    flock.launch_with(2, EARLIER)?;
    flock.wait_serving(2)?;
    flock.wait_members(NODES)?;
    restore(&flock, 1, &stream)?.exits(1)?.refused()?;
    flock.terminate(2)?;
    flock.start(2)?;
    flock.wait_members(NODES)?;
    flock.wait_recovered()?;

    restore(&flock, 1, &stream)?.ok()?;
    // Now it is too late for that, and the node says so; the others go on.
    flock.terminate(2)?;
    flock.launch_with(2, EARLIER)?;
    let told = "install the version that the other nodes run";
    let asked = Instant::now();
    while !flock.log(2).contains(told) {
        ensure!(asked.elapsed() < LIVELY, "the node of the first version was not refused\n{}", flock.log(2));
        std::thread::sleep(Duration::from_millis(50));
    }
    flock.wait_members_of(&[0, 1], NODES - 1)?;
    load.wait_progress(&[0], 50, LIVELY)?;
    flock.kill(&[2])?;
    flock.start(2)?;
    flock.wait_members(NODES)?;
    load.wait_progress(&[0], 50, LIVELY)?;

    let outcome = load.stop()?;
    eprintln!("an update: {outcome}");
    ensure!(outcome.refused.is_empty(), "the guest saw {:?}", outcome.refused);
    record.read_all(&flock.socket(2))?;
    record.check()?;
    flock.finish()
}
