//! P7 and P8: what a node says of its space is what its disks hold, give or take what is in its journal only: sizes are looked at
//! when the journal is checkpointed. Operators fill clusters up by these numbers.

use std::time::Duration;

use crate::sim::client::{SimClient, within};
use crate::sim::cluster::JOURNAL_BYTES;
use crate::sim::inventory::{OBJECTS, Places};
use crate::sim::net::SimNet;
use crate::sim::sim_disk::UNLIMITED_BYTES;

const PATIENCE: Duration = Duration::from_secs(10);

/// Asks every node for its space.
pub async fn violations(net: &SimNet, places: &Places) -> Vec<String> {
    let mut found = Vec::new();
    for (host, disk) in places.disks.iter().enumerate() {
        let asking = async { SimClient::connect(net, host).await?.space().await };
        let used = match within(PATIENCE, asking).await {
            // A machine's directories lie on one simulated disk, each of which the node counts as a disk of its own.
            Ok((all, free))
                if all >= free && free <= all.div_ceil(UNLIMITED_BYTES) * (disk.free_bytes() + JOURNAL_BYTES) =>
            {
                all - free
            }
            Ok((all, free)) => {
                found.push(format!("space honest: node {host} says that {free} of {all} bytes are free"));
                continue;
            }
            Err(error) => {
                found.push(format!("space honest: node {host} does not tell its space: {error}"));
                continue;
            }
        };
        let taken = disk.allocated_bytes(OBJECTS);
        if used.abs_diff(taken) > JOURNAL_BYTES {
            found.push(format!("space honest: node {host} says that objects take {used} bytes; they take {taken}"));
        }
    }
    found
}
