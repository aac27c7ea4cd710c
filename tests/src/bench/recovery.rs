//! How fast a node that lost everything gets its copies back.

use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde_json::{Value, json};

use super::figures::median;
use super::nbd::Nbd;
use crate::spawn::{Cluster, ClusterPlan};
use crate::volume_proof::{allocated, objects_on};

const COPIES: u8 = 3;
const OBJECT_SHIFT: u8 = 22;
const DEADLINE: Duration = Duration::from_mins(5);

/// A node is wiped and started again so many times; the others keep serving, and nobody asks them anything.
pub fn run(size_bytes: u64, runs: usize) -> Result<Value> {
    let mut cluster = ClusterPlan::new(3).start_formatted(COPIES.into())?;
    cluster.client(0)?.create_volume("disk", size_bytes, COPIES, OBJECT_SHIFT)?;
    Nbd::connect(&cluster.node(0).store.join("nbd.sock"), "disk")?.fill(size_bytes)?;
    let mut rates = Vec::new();
    for _ in 0..runs {
        rates.push(once(&mut cluster, size_bytes)?);
    }
    let rate = median(rates.iter().copied());
    println!("recovery of {} MiB onto a wiped node: {rate:.2} GiB/s (median of {runs})", size_bytes >> 20);
    cluster.finish()?;
    Ok(json!({"size_bytes": size_bytes, "gib_per_second": rate, "runs": rates}))
}

/// GiB per second, from the moment in which the node serves to that in which it has everything.
fn once(cluster: &mut Cluster, size_bytes: u64) -> Result<f64> {
    const VICTIM: usize = 2;
    cluster.kill(VICTIM)?;
    fs::remove_dir_all(&cluster.node(VICTIM).store)?;
    cluster.wait_members(2)?;
    cluster.restart(VICTIM)?;
    let began = Instant::now();
    let wanted = objects_on(&cluster.node(0).store)?.len();
    // The last object's file is there before it is complete: what is complete is in the list of recovery no more.
    cluster.wait_until("every object", DEADLINE, |cluster| {
        let all_there = objects_on(&cluster.node(VICTIM).store).is_ok_and(|found| found.len() >= wanted);
        Ok(all_there && cluster.dog(&["node", "recovery"])?.ok()?.out().lines().count() == 2)
    })?;
    let elapsed = began.elapsed();
    cluster.wait_recovered()?;
    let taken = allocated(&cluster.node(VICTIM).store);
    ensure!(taken >= size_bytes, "the node took {taken} bytes of {size_bytes}");
    Ok(size_bytes as f64 / f64::from(1 << 30) / elapsed.as_secs_f64())
}
