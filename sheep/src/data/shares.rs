//! What share of the data each member should have: in proportion to the capacity of its disks, as of the last time an operator
//! asked. Nothing moves between healthy nodes otherwise.

use std::time::Duration;

use bytes::Bytes;
use sheep_core::member::NodeId;
use sheep_core::peer_message::{PeerKind, PeerRequest, Verdict};

use super::Data;
use crate::store::Store;

/// Weight of a member whose disk says nothing of its size: any positive value takes its share.
const WEIGHT_MIN: u64 = 1 << 20;
/// How long one member may take to be connected; one that does not answer keeps its share.
const PATIENCE: Duration = Duration::from_secs(2);
/// Before the number in a node's report.
const CAPACITY: &str = "capacity=";

/// The weight of a node that keeps this store.
pub fn weight_of(store: &Store) -> u64 {
    store.space().total_bytes.max(WEIGHT_MIN)
}

/// For a node's report.
pub fn told(store: Option<&Store>) -> String {
    format!("{CAPACITY}{}", store.map_or(0, weight_of))
}

/// What every member that answers has now.
pub async fn capacities(data: &Data) -> Vec<(NodeId, u64)> {
    let view = data.view();
    let mut found = Vec::new();
    for node in view.state.members.values().filter(|m| !m.member.is_gateway()).map(|m| m.member.id) {
        let report = if node == data.node() {
            Some(data.report_here())
        } else {
            let request = PeerRequest::new(PeerKind::Report, view.epoch(), data.node());
            match data.links().call(node, request, Bytes::new(), PATIENCE).await {
                Ok((answer, text)) if answer.verdict == Verdict::Ok => String::from_utf8(text.to_vec()).ok(),
                _ => None,
            }
        };
        match report.as_deref().and_then(capacity_in) {
            Some(capacity) => found.push((node, capacity)),
            None => tracing::warn!("node {node} does not tell its capacity; its share of the data stays as it is"),
        }
    }
    found
}

fn capacity_in(report: &str) -> Option<u64> {
    report.split_whitespace().find_map(|word| word.strip_prefix(CAPACITY))?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_report_tells_the_capacity() {
        assert_eq!(capacity_in("recovering=0 capacity=1099511627776"), Some(1 << 40));
        assert_eq!(capacity_in(&told(None)), Some(0));
        assert_eq!((capacity_in("recovering=0"), capacity_in("capacity=x")), (None, None));
    }
}
