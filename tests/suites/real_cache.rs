//! A cache in front of the disks (`--cache`), with real sheep and real files.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::fs::{Advice, fadvise};
use serde_json::Value;
use tests::nbd_client::{NbdClient, Style};
use tests::schema;
use tests::sectors::fill_random;
use tests::sim::Random;
use tests::spawn::{Cluster, ClusterPlan};

const SIZE: usize = 32 << 20;
/// What is read at once: short enough to be kept.
const PIECE: usize = 64 << 10;

fn volume(cluster: &Cluster) -> Result<NbdClient> {
    NbdClient::open(&cluster.node(0).store.join("nbd.sock"), "disk", Style::Structured, &[])
}

fn with_cache(argument: &str) -> Result<Cluster> {
    ClusterPlan::new(1).arguments(0, &["--cache", argument]).start_formatted(1)
}

fn filled(cluster: &Cluster) -> Result<Vec<u8>> {
    cluster.dog(&["vdi", "create", "disk", &SIZE.to_string()])?.ok()?;
    let mut content = vec![0; SIZE];
    fill_random(&mut content, &mut Random::new(1));
    let mut client = volume(cluster)?;
    for (index, piece) in content.chunks(1 << 20).enumerate() {
        client.write((index as u64) << 20, piece, 0)?;
    }
    client.flush()?;
    Ok(content)
}

/// Has the page cache drop the objects and what is in the cache, so that the next read of them goes to a device.
fn forget_all(cluster: &Cluster, ssd: &Path) -> Result<()> {
    let objects = std::fs::read_dir(cluster.node(0).store.join("obj"))?;
    let objects: Vec<PathBuf> = objects.map(|entry| Ok(entry?.path())).collect::<Result<_>>()?;
    for path in objects.into_iter().chain(nameless(cluster, ssd)) {
        let file = File::open(path)?;
        file.sync_all()?;
        fadvise(&file, 0, None, Advice::DontNeed)?;
    }
    Ok(())
}

/// Reads all of the volume from the disks or the cache, here and there so that the system reads little ahead; it must be
/// `content`.
fn read_back(cluster: &Cluster, ssd: &Path, content: &[u8]) -> Result<()> {
    forget_all(cluster, ssd)?;
    let mut client = volume(cluster)?;
    let mut pieces: Vec<(usize, &[u8])> = content.chunks(PIECE).enumerate().collect();
    let mut random = Random::new(3);
    for left in (1..pieces.len()).rev() {
        pieces.swap(left, random.below(left as u64 + 1) as usize);
    }
    for (index, piece) in pieces {
        let offset = index * PIECE;
        let seen = client.read(offset as u64, PIECE as u64)?;
        ensure!(seen == piece, "64 KiB at {offset} are not what was written there");
    }
    Ok(())
}

fn figure(cluster: &Cluster, name: &str) -> Result<Value> {
    let text = cluster.dog(&["node", "stat", "--json"])?.ok()?.out();
    let stat: Value = serde_json::from_str(&text)?;
    schema::check("node_stat", &stat)?;
    Ok(stat["cache"][name].clone())
}

fn count(cluster: &Cluster, name: &str) -> Result<u64> {
    figure(cluster, name)?.as_u64().with_context(|| format!("no number of {name}"))
}

/// The cache's file, which has no name any more, as its process has it open.
fn nameless(cluster: &Cluster, dir: &Path) -> Result<PathBuf> {
    let pid = cluster.node(0).pid().context("the node runs")?;
    let open = std::fs::read_dir(format!("/proc/{pid}/fd"))?.filter_map(|entry| Some(entry.ok()?.path()));
    let mut ours = open.filter(|path| std::fs::read_link(path).is_ok_and(|target| target.starts_with(dir)));
    ours.next().with_context(|| format!("process {pid} has no file of {}", dir.display()))
}

#[test]
fn reads_are_kept_until_they_are_outdated_damaged_or_the_process_ends() -> Result<()> {
    let ssd = tempfile::tempdir()?;
    let mut cluster = with_cache(&format!("dir={},size=64M", ssd.path().display()))?;
    let mut content = filled(&cluster)?;
    read_back(&cluster, ssd.path(), &content)?;
    let (hits, misses) = (count(&cluster, "hits")?, count(&cluster, "misses")?);
    // The system reads something ahead even so: that is in memory when it is asked for.
    ensure!(misses >= 200 && hits < misses / 4, "first time: {hits} hits, {misses} misses of 512 reads");
    read_back(&cluster, ssd.path(), &content)?;
    let again = (count(&cluster, "hits")? - hits, count(&cluster, "misses")? - misses);
    ensure!(again.0 >= misses * 3 / 4, "first {misses} of 512 reads missed; then {} hits, {} misses", again.0, again.1);
    ensure!(count(&cluster, "used_bytes")? >= misses * PIECE as u64 * 3 / 4);
    println!("{hits} hits and {misses} misses, then {} and {}", again.0, again.1);

    // What is overwritten is not taken from the cache.
    let mut random = Random::new(2);
    let mut client = volume(&cluster)?;
    for _ in 0..300 {
        let offset = random.below((SIZE / 512) as u64 - 16) as usize * 512;
        let length = 512 * (1 + random.below(16) as usize);
        fill_random(&mut content[offset..offset + length], &mut random);
        client.write(offset as u64, &content[offset..offset + length], 0)?;
    }
    client.flush()?;
    drop(client);
    read_back(&cluster, ssd.path(), &content)?;
    read_back(&cluster, ssd.path(), &content)?;

    // Nor is what the fast device damaged.
    let file = OpenOptions::new().write(true).open(nameless(&cluster, ssd.path())?)?;
    for slot in 0..(64 << 20) / PIECE as u64 {
        file.write_all_at(&[0xdb; 512], slot * PIECE as u64 + 512 * (slot % 128))?;
    }
    read_back(&cluster, ssd.path(), &content)?;
    ensure!(figure(&cluster, "failed")? == Value::Bool(false), "damage of some blocks is not the end of the cache");

    cluster.kill(0)?;
    ensure!(std::fs::read_dir(ssd.path())?.next().is_none(), "a killed process left something behind");
    cluster.restart(0)?;
    cluster.wait_running()?;
    read_back(&cluster, ssd.path(), &content)?;
    ensure!(count(&cluster, "hits")? < 100, "nothing of a cache outlives its process");
    cluster.finish()
}

#[test]
fn a_cache_that_takes_writes_has_the_journal_and_one_that_cannot_be_made_stops_nobody() -> Result<()> {
    let ssd = tempfile::tempdir()?;
    let argument = format!("dir={},size=64M,mode=writeback", ssd.path().display());
    let mut cluster = with_cache(&argument)?;
    let content = filled(&cluster)?;
    ensure!(ssd.path().join("journal").exists() && !cluster.node(0).store.join("journal").exists());
    cluster.kill(0)?;
    cluster.restart(0)?;
    cluster.wait_running()?;
    read_back(&cluster, ssd.path(), &content)?;
    cluster.finish()?;

    let file = ssd.path().join("file");
    std::fs::write(&file, b"in the way")?;
    let cluster = with_cache(&format!("dir={},size=64M", file.display()))?;
    let content = filled(&cluster)?;
    read_back(&cluster, ssd.path(), &content)?;
    ensure!(figure(&cluster, "failed")? == Value::Bool(true));
    let log = cluster.node(0).log();
    ensure!(log.contains("reads go on without it"), "nothing in the log: {log}");
    cluster.finish()
}
