//! P1: what was acknowledged survives the loss of `copies - 1` zones. So the copies of an object stand in as many zones as it has
//! copies, when all is calm.

use std::collections::BTreeSet;

use crate::sim::inventory::{Inventory, Places};

/// Objects whose copies share a zone.
pub fn violations(inventory: &Inventory, places: &Places) -> Vec<String> {
    let mut found = Vec::new();
    for (oid, hosts) in places.holders() {
        let Some(copies) = inventory.wanted.get(&oid).or_else(|| inventory.inodes.get(&oid)) else { continue };
        let zones: BTreeSet<u32> = hosts.iter().map(|host| places.shape.zone(*host)).collect();
        if zones.len() < usize::from(*copies).min(places.shape.zones) {
            found.push(format!(
                "zones distinct: {copies} copies of object {oid} are on machines {hosts:?}, in zones {zones:?}"
            ));
        }
    }
    found
}
