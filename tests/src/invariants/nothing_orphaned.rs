//! P7: space that nothing refers to comes back. When all is calm, the disks hold every object that a map names, as often as it is
//! to be kept, and nothing else: nothing of deleted volumes, nothing that a crash left, no copy where none belongs.

use std::time::Duration;

use qemu_proto::oid::{ObjectKind, Oid};

use crate::sim::client::{SimClient, within};
use crate::sim::inventory::{Inventory, Places};
use crate::sim::net::SimNet;

/// Nodes look 20 s after a change of members, and every 15 s for what deletions left.
const CALM_WITHIN: Duration = Duration::from_mins(2);
const LOOK_AGAIN: Duration = Duration::from_secs(2);
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until there are none; else tells what there is. Gives what is referred to as well. Where the operator `gave_up` a disk
/// nobody knows whether a volume that has no map lost it, so its objects stay.
pub async fn violations(net: &SimNet, places: &Places, gave_up: bool) -> (Vec<String>, Inventory) {
    let deadline = tokio::time::Instant::now() + CALM_WITHIN;
    loop {
        let asking = async { Inventory::ask(&mut SimClient::connect(net, 0).await?).await };
        let inventory = match within(PATIENCE, asking).await {
            Ok(inventory) => inventory,
            Err(error) => {
                return (vec![format!("nothing orphaned: the maps cannot be read: {error}")], Inventory::default());
            }
        };
        let found = compare(&inventory, places, gave_up);
        if found.is_empty() || tokio::time::Instant::now() > deadline {
            return (found, inventory);
        }
        tokio::time::sleep(LOOK_AGAIN).await;
    }
}

fn compare(inventory: &Inventory, places: &Places, gave_up: bool) -> Vec<String> {
    let mut found = Vec::new();
    let holders = places.holders();
    let has_no_map = |oid: &Oid| {
        let inode = Oid::inode(oid.vid());
        inventory.inodes.contains_key(&inode) && !holders.contains_key(&inode)
    };
    let expected = |copies: u8| usize::from(copies).min(places.shape.zones);
    for (oid, hosts) in &holders {
        match inventory.wanted.get(oid).or_else(|| inventory.inodes.get(oid)) {
            Some(copies) if hosts.len() == expected(*copies) => {}
            Some(copies) => {
                let count = expected(*copies);
                found.push(format!("nothing orphaned: object {oid} is on machines {hosts:?} instead of {count}"));
            }
            None if oid.kind() == Some(ObjectKind::Attribute) => {}
            None if gave_up && has_no_map(oid) => {}
            None => found.push(format!("nothing orphaned: nothing refers to object {oid} on machines {hosts:?}")),
        }
    }
    for oid in inventory.wanted.keys().filter(|oid| !holders.contains_key(oid)) {
        found.push(format!("nothing orphaned: object {oid} is in a map and on no disk"));
    }
    found
}
