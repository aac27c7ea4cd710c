//! What must hold when all faults are undone and nobody writes: every volume is read back through every node.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use super::Bench;
use super::guests::{Volume, open, put_down};
use super::own_guest::OwnGuest;
use crate::invariants::{nothing_foreign, one_disk};
use crate::nbd_client::NbdClient;
use crate::oracle::Oracle;

/// What a node says of a moment ago may still be on its way.
const READ_PATIENCE: Duration = Duration::from_mins(1);

/// Gives what is wrong, in words. That something cannot be asked at all is an error.
pub fn violations(bench: &mut Bench, shared: &Volume, oracle: &Oracle, owners: &mut [OwnGuest]) -> Result<Vec<String>> {
    bench.flock.wait_recovered()?;
    let mut found = Vec::new();
    let mut first: Option<Vec<u8>> = None;
    for index in 0..bench.flock.count() {
        let start = oracle.moment(0);
        let bytes = content(bench, index, shared)?;
        put_down(oracle, shared, 0, &bytes, (1000 + index as u32, start, Some(oracle.moment(0))));
        found.extend(same_as(&mut first, bytes, index, shared));
    }
    for owner in owners.iter_mut() {
        let volume = owner.volume().clone();
        let mut first = None;
        for index in 0..bench.flock.count() {
            let bytes = content(bench, index, &volume)?;
            owner.compare(0, &bytes, &format!("when calm, through node {index}"));
            found.extend(same_as(&mut first, bytes, index, &volume));
        }
        found.extend(owner.broken().iter().cloned());
    }
    found.extend(one_disk::violations(oracle));
    found.extend(nothing_foreign::violations(oracle));
    let volumes = owners.iter().map(OwnGuest::volume).chain([shared]);
    for volume in volumes {
        found.extend(check(bench, volume)?);
    }
    bench.flock.check_health()?;
    oracle.condense();
    Ok(found)
}

fn content(bench: &Bench, index: usize, volume: &Volume) -> Result<Vec<u8>> {
    let door = bench.flock.store(index).join("nbd.sock");
    let began = Instant::now();
    loop {
        let read = open(&door, volume).and_then(|mut client: NbdClient| client.read_all());
        match read {
            Ok(bytes) => return Ok(bytes),
            Err(error) if began.elapsed() > READ_PATIENCE => {
                return Err(error).with_context(|| format!("healed when calm: {} through node {index}", volume.name));
            }
            Err(_) => std::thread::sleep(Duration::from_millis(200)),
        }
    }
}

fn same_as(first: &mut Option<Vec<u8>>, bytes: Vec<u8>, index: usize, volume: &Volume) -> Option<String> {
    let Some(first) = first else {
        *first = Some(bytes);
        return None;
    };
    let place = first.iter().zip(&bytes).position(|(one, other)| one != other)?;
    Some(format!("one disk: node {index} sees another {} than node 0, from byte {place} on", volume.name))
}

/// `dog vdi check` has nothing to repair.
fn check(bench: &Bench, volume: &Volume) -> Result<Option<String>> {
    let said = bench.flock.dog(0, &["vdi", "check", &volume.name])?;
    ensure!(said.code().is_some(), "dog was ended: {said}");
    let is_good = said.code() == Some(0) && said.err().trim().is_empty() && !said.out().contains("fixed");
    Ok((!is_good).then(|| format!("copies agree: {said}")))
}
