//! What volumes cost as they become many and large: snapshots of a long chain, lists, clones, first writes.
//!
//! `cargo run --release -p tests --bin volumebench`. Prints figures; passes no judgement. The part with a reflinking file system
//! needs root.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use clap::Parser;
use tests::bench::{OBJECT_BYTES as OBJECT, first_writes};
use tests::clients::{Client, Request, opcode, padded};
use tests::nbd_client::{NbdClient, Style};
use tests::spawn::Cluster;
use tests::volume_proof::{allocated, objects_on};

#[derive(Parser)]
#[command(about = "What volumes cost as they become many and large")]
struct Arguments {
    /// Snapshots of one volume.
    #[arg(long, default_value_t = 1000)]
    snapshots: u64,
    /// Volumes in the list.
    #[arg(long, default_value_t = 10_000)]
    volumes: u64,
    /// Only these parts.
    #[arg(long, value_delimiter = ',', default_value = "first-writes,clones,snapshots,list")]
    only: Vec<Part>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Part {
    FirstWrites,
    Clones,
    Snapshots,
    List,
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    for part in &arguments.only {
        match part {
            Part::FirstWrites => drop(first_writes::run()?),
            Part::Clones => large_clones()?,
            Part::Snapshots => snapshots(arguments.snapshots)?,
            Part::List => list(arguments.volumes)?,
        }
    }
    Ok(())
}

fn nbd(cluster: &Cluster, index: usize, export: &str) -> Result<NbdClient> {
    NbdClient::open(&cluster.node(index).store.join("nbd.sock"), export, Style::Structured, &[])
}

fn dog(cluster: &Cluster, words: &[&str]) -> Result<Duration> {
    Ok(cluster.dog(words)?.ok()?.took)
}

fn space(cluster: &Cluster) -> u64 {
    (0..cluster.node_count()).map(|index| allocated(&cluster.node(index).store)).sum()
}

fn median(times: &mut [Duration]) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// A chain of snapshots with a write between each.
fn snapshots(count: u64) -> Result<()> {
    const GROUP: u64 = 50;
    let cluster = Cluster::three()?;
    dog(&cluster, &["vdi", "create", "disk", "1G"])?;
    let mut client = nbd(&cluster, 0, "disk")?;
    client.write(0, &[1; 4096], 1)?;
    let (mut took, mut writes) = (Vec::new(), Vec::new());
    let mut before = space(&cluster);
    for number in 1..=count {
        let took_one = dog(&cluster, &["vdi", "snapshot", "-s", &format!("s{number}"), "disk"])?;
        took.push(took_one);
        let started = Instant::now();
        client.write((number % 256) * OBJECT, &[number as u8; 4096], 1)?;
        writes.push(started.elapsed());
        if number % GROUP == 0 && (number == GROUP || number + GROUP > count || number % (4 * GROUP) == 0) {
            let now = settled_space(&cluster, before);
            println!(
                "snapshots {:4} to {number:4}: {:.1?} each with dog, first write {:.1?}",
                number + 1 - GROUP,
                median(&mut took),
                median(&mut writes)
            );
            println!("  space on 3 nodes now {} MiB", now >> 20);
            before = now;
        }
        if number % GROUP == 0 {
            took.clear();
            writes.clear();
        }
    }
    let started = Instant::now();
    for number in 1..=count {
        dog(&cluster, &["vdi", "delete", "-s", &format!("s{number}"), "disk"])?;
    }
    let asked = started.elapsed();
    dog(&cluster, &["vdi", "delete", "disk"])?;
    cluster.wait_until("the space", Duration::from_mins(10), |cluster| {
        Ok((0..3).all(|index| objects_on(&cluster.node(index).store).is_ok_and(|left| left.is_empty())))
    })?;
    println!("{count} snapshots deleted: asked in {asked:.1?}, the disks empty after {:.1?}", started.elapsed());
    cluster.finish()
}

/// Waits a little until what was written is in its files.
fn settled_space(cluster: &Cluster, before: u64) -> u64 {
    let mut last = before;
    for _ in 0..10 {
        std::thread::sleep(Duration::from_millis(300));
        let now = space(cluster);
        if now == last {
            break;
        }
        last = now;
    }
    last
}

fn list(count: u64) -> Result<()> {
    let cluster = Cluster::three()?;
    let mut client = cluster.client(0)?;
    let started = Instant::now();
    for number in 0..count {
        client.create_volume(&format!("volume-{number}"), 16 * OBJECT, 3, 22)?;
    }
    println!("{count} volumes made in {:.1?}", started.elapsed());
    let shown = |what: &str| -> Result<()> {
        let listed = cluster.dog(&["vdi", "list", "-r"])?.ok()?;
        ensure!(listed.out().lines().count() as u64 == count, "{} lines", listed.out().lines().count());
        println!("dog vdi list of {count} volumes{what}: {:.2?}", listed.took);
        Ok(())
    };
    shown(", none of them written")?;
    shown(" again")?;
    let few = count.div_ceil(5);
    for number in 0..count {
        nbd(&cluster, 0, &format!("volume-{number}"))?.write(0, &[1; 4096], 0)?;
        if number + 1 == few {
            shown(&format!(", {few} of them written"))?;
        }
    }
    shown(", all of them written")?;
    shown(" again")?;
    println!("dog vdi list of one name: {:.2?}", dog(&cluster, &["vdi", "list", "volume-77"])?);
    let started = Instant::now();
    client.look_up(&format!("volume-{}", count - 1), "", 0)?;
    println!("look-up of one name: {:.2?}", started.elapsed());
    cluster.finish()
}

fn clone(client: &mut Client, base: u32, size: u64, name: &str) -> Result<Duration> {
    let request = Request::new(opcode::NEW_VDI).with_u64(16, size).with_u32(24, base);
    let started = Instant::now();
    client.call(request, &padded(&[name]))?.success("clone")?;
    Ok(started.elapsed())
}

fn large_clones() -> Result<()> {
    const SIZE: u64 = 1 << 40;
    let cluster = Cluster::three()?;
    dog(&cluster, &["vdi", "create", "large", "1T"])?;
    let mut client = nbd(&cluster, 0, "large")?;
    for index in 0..64 {
        client.write(index * (SIZE / 64), &[1; 4096], 0)?;
    }
    dog(&cluster, &["vdi", "snapshot", "-s", "one", "large"])?;
    let base = cluster.client(0)?.look_up("large", "one", 0)?.get();
    let mut native = cluster.client(0)?;
    let times: Result<Vec<Duration>> = (0..21).map(|n| clone(&mut native, base, SIZE, &format!("n{n}"))).collect();
    println!("clone of 1 TiB: {:.1?} for the request (median of 21)", median(&mut times?));
    let times: Result<Vec<Duration>> =
        (0..21).map(|n| dog(&cluster, &["vdi", "clone", "-s", "one", "large", &format!("d{n}")])).collect();
    println!("clone of 1 TiB: {:.1?} with dog", median(&mut times?));
    let started = Instant::now();
    nbd(&cluster, 0, "n0")?.write(0, &[2; 4096], 0)?;
    println!("first write to such a clone, with its map: {:.1?}", started.elapsed());
    cluster.finish()
}
