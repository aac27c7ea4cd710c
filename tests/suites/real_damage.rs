//! Real `sheep` processes whose disks and memories lose something that nobody else has (P1, P6): whatever can be had still is, and
//! what cannot be had is an error, never something else and never silence.

use std::fs;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_proto::oid::Oid;
use tests::clients::{Request, Volume, flag, opcode};
use tests::sectors::fill_random;
use tests::sim::Random;
use tests::spawn::Cluster;

const BLOCK: usize = 4096;
/// Where the content of a 4 MiB object begins in its file: after the header and a table of 1,024 checksums.
const CONTENT_OFFSET: u64 = 8192;

/// The file of an object under a node's store.
fn file_of(directory: &Path, oid: Oid) -> Result<PathBuf> {
    let name = format!("{:016x}", oid.raw());
    let mut directories = vec![directory.to_path_buf()];
    while let Some(directory) = directories.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                directories.push(entry.path());
            } else if entry.file_name().to_string_lossy() == name {
                return Ok(entry.path());
            }
        }
    }
    anyhow::bail!("{} has no {name}", directory.display())
}

fn damage(file: &Path, block: usize) -> Result<()> {
    let mut file = fs::OpenOptions::new().write(true).open(file)?;
    file.seek(SeekFrom::Start(CONTENT_OFFSET + (block * BLOCK) as u64 + 77))?;
    Ok(file.write_all(b"what a bad sector reads as")?)
}

/// One node alone has the newest content, and that is damaged in two places: one that did not change since the others left,
/// and one that only this node ever had.
#[test]
fn the_last_copy_is_damaged_and_all_but_one_block_comes_back() -> Result<()> {
    const BLOCKS: usize = 16;
    const UNCHANGED: usize = 5;
    const CHANGED: usize = 3;
    let mut cluster = Cluster::three()?;
    let mut content = vec![0; BLOCKS * BLOCK];
    fill_random(&mut content, &mut Random::new(21));
    cluster.dog(&["vdi", "create", "disk", "16M"])?.ok()?;
    let length = content.len().to_string();
    cluster.dog_through(0, &["vdi", "write", "disk", "0", &length], &content)?.ok()?;
    cluster.kill(1)?;
    cluster.wait_members(2)?;
    cluster.kill(2)?;
    cluster.wait_members(1)?;
    let newer = vec![0xa5; BLOCK];
    let at = (CHANGED * BLOCK).to_string();
    cluster.dog_through(0, &["vdi", "write", "disk", &at, "4096"], &newer)?.ok()?;
    content[CHANGED * BLOCK..][..BLOCK].copy_from_slice(&newer);
    let oid = Volume::open(&mut cluster.client(0)?, "disk", "")?.object(0).context("the volume has no object")?;
    ensure!(cluster.terminate(0)? == Some(0), "node 0 did not leave in order\n{}", cluster.node(0).log());
    let file = file_of(&cluster.node(0).store, oid)?;
    damage(&file, UNCHANGED)?;
    damage(&file, CHANGED)?;

    for index in 0..3 {
        cluster.launch(index)?;
    }
    for index in 0..3 {
        cluster.wait_serving(index)?;
    }
    cluster.wait_members(3)?;
    cluster.wait_recovered()?;
    for index in 0..3 {
        let mut client = cluster.client(index)?;
        for block in (0..BLOCKS).filter(|block| *block != CHANGED) {
            let read = client.read_object(oid, (block * BLOCK) as u64, BLOCK as u32);
            let read = read.with_context(|| format!("block {block} through node {index}"))?;
            ensure!(read == content[block * BLOCK..][..BLOCK], "block {block} through node {index} is another one");
        }
        let lost = client.read_object(oid, (CHANGED * BLOCK) as u64, BLOCK as u32);
        ensure!(lost.is_err(), "node {index} gave something for a block that nobody has");
    }
    // Written anew it is as good as any.
    cluster.dog_through(1, &["vdi", "write", "disk", &at, "4096"], &newer)?.ok()?;
    for index in 0..3 {
        let read = cluster.dog_through(index, &["vdi", "read", "disk", "0", &length], &[])?.ok()?;
        ensure!(read.stdout == content, "node {index} has another content after all is mended");
    }
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

#[test]
fn a_check_mends_copies_that_are_damaged_in_different_places() -> Result<()> {
    damaged_in_different_places(true)
}

#[test]
fn a_read_mends_copies_that_are_damaged_in_different_places() -> Result<()> {
    damaged_in_different_places(false)
}

/// Each of three copies is damaged, in another place: together they have everything.
fn damaged_in_different_places(checked: bool) -> Result<()> {
    let mut cluster = Cluster::three()?;
    let mut content = vec![0; 64 * BLOCK];
    fill_random(&mut content, &mut Random::new(22));
    cluster.dog(&["vdi", "create", "disk", "16M"])?.ok()?;
    let length = content.len().to_string();
    cluster.dog_through(0, &["vdi", "write", "disk", "0", &length], &content)?.ok()?;
    let oid = Volume::open(&mut cluster.client(0)?, "disk", "")?.object(0).context("the volume has no object")?;
    cluster.dog(&["cluster", "shutdown"])?.ok()?;
    for index in 0..3 {
        cluster.wait_exit(index)?;
        damage(&file_of(&cluster.node(index).store, oid)?, 10 + index)?;
    }
    for index in 0..3 {
        cluster.launch(index)?;
    }
    for index in 0..3 {
        cluster.wait_serving(index)?;
    }
    cluster.wait_running()?;
    if checked {
        cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    }
    for index in 0..3 {
        let read = cluster.dog_through(index, &["vdi", "read", "disk", "0", &length], &[])?.ok()?;
        ensure!(read.stdout == content, "node {index} has another content");
    }
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

/// The only holder of a write that was acknowledged and not flushed dies: the flush says so, once.
#[test]
fn a_flush_tells_of_writes_that_died_with_their_holders() -> Result<()> {
    const TRIES: u32 = 10;
    let mut cluster = Cluster::three()?;
    let mut client = cluster.client(0)?;
    let vdi = client.create_volume("single", 64 << 20, 1, 22)?;
    let mut losses = 0;
    for attempt in 1..=TRIES {
        // One that node 2 has, which is not the gateway.
        let mut found = None;
        for index in 0..16 {
            let oid = Oid::data(vdi, index);
            let create = Request::object(opcode::CREATE_AND_WRITE, oid, 0).flags(flag::DIRECT | flag::WRITE);
            client.call(create, &[0; BLOCK])?.success("create")?;
            // Durable is in the journal; the file follows.
            std::thread::sleep(Duration::from_millis(50));
            if file_of(&cluster.node(2).store, oid).is_ok() {
                found = Some(oid);
                break;
            }
        }
        let oid = found.context("node 2 holds none of sixteen objects")?;
        let written = vec![attempt as u8; BLOCK];
        let write = Request::object(opcode::WRITE, oid, 0).flags(flag::CACHE | flag::WRITE);
        client.call(write, &written)?.success("write")?;
        cluster.kill(2)?;
        cluster.restart(2)?;
        let flushed = client.flush(vdi);
        let read = client.read_object(oid, 0, BLOCK as u32)?;
        if read == written {
            // It got to the disk in time.
            flushed?;
            continue;
        }
        losses += 1;
        ensure!(flushed.is_err(), "attempt {attempt}: the flush did not tell that an acknowledged write is gone");
        client.flush(vdi).context("it is told once")?;
    }
    eprintln!("{losses} of {TRIES} writes were lost with their only holder, and each was told");
    ensure!(losses > 0, "nothing was ever lost: this shows nothing");
    cluster.finish()
}
