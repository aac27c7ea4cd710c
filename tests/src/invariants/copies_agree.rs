//! P2 and P4. Asked when nothing happens any more: every object has as many copies as the cluster keeps, all of them with the
//! same content, and none had to be repaired for it.

use std::time::Duration;

use qemu_proto::oid::Oid;

use crate::sim::client::{SimClient, within};
use crate::sim::net::SimNet;

const PATIENCE: Duration = Duration::from_secs(30);

/// Violations among the copies of these objects, as the node of `host` finds them. Where a disk was rotten, copies may have to
/// be repaired.
pub async fn violations(net: &SimNet, host: usize, objects: &[Oid], copies: u32, is_rotten: bool) -> Vec<String> {
    let mut found = Vec::new();
    let mut client = match within(PATIENCE, SimClient::connect(net, host)).await {
        Ok(client) => client,
        Err(error) => return vec![format!("copies agree: node {host} cannot be asked: {error}")],
    };
    for oid in objects {
        match within(PATIENCE, client.check_object(*oid)).await {
            Ok([wanted, good, repaired, 0]) if wanted == copies && good == copies && (repaired == 0 || is_rotten) => {}
            Ok([wanted, good, repaired, unrepairable]) => found.push(format!(
                "copies agree: object {oid} has {good} good copies of {wanted}, {repaired} had to be repaired and \
                 {unrepairable} could not be; the cluster keeps {copies}"
            )),
            Err(error) => {
                found.push(format!("copies agree: object {oid} cannot be checked: {error}"));
                break;
            }
        }
    }
    found
}
