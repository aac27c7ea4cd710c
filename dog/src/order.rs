//! What a sheep's report says about who orders things: the driver, its voters, its nodes and links.
//!
//! A report that says nothing of it, or says it in another way, is one of a sheep without all that: every field has a value
//! that means so. Nothing here asks anybody.

use std::net::SocketAddr;

use serde::Deserialize;
use serde_json::Value;

use crate::meaning::NODE_PORT_OFFSET;
use crate::requests::Node;

/// The driver in which nodes vote.
const RAFT: &str = "raft";

/// What a node is to the cluster.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum NodeState {
    /// It is in.
    Member,
    /// It wants to come in, and nobody has let it.
    Asking,
    /// There is no cluster yet.
    #[default]
    Acquainted,
}

impl NodeState {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            NodeState::Member => "member",
            NodeState::Asking => "asking",
            NodeState::Acquainted => "acquainted",
        }
    }
}

/// A node as the driver knows it.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
pub struct OrderNode {
    /// 16 hexadecimal digits.
    pub id: String,
    /// Where other nodes reach it: `HOST:PORT`, several with commas between, the preferred one first.
    #[serde(default)]
    pub address: String,
    /// See [`NodeState`].
    #[serde(default)]
    pub state: NodeState,
    /// What a person compares before letting it in; empty if it has none.
    #[serde(default)]
    pub fingerprint: String,
    /// Fault domain, if known.
    #[serde(default)]
    pub zone: Option<u32>,
    /// Whether it takes part in the votes.
    #[serde(default)]
    pub votes: bool,
    /// Whether it was heard of lately, if known.
    #[serde(default)]
    pub alive: Option<bool>,
}

impl OrderNode {
    /// Its addresses for other nodes, the preferred one first.
    pub fn sockets(&self) -> Vec<SocketAddr> {
        self.address.split(',').filter_map(|address| address.trim().parse().ok()).collect()
    }

    /// The preferred address, as it was said.
    pub fn first_address(&self) -> &str {
        self.address.split(',').next().unwrap_or_default()
    }
}

/// A link between the node that reports and another.
#[derive(Clone, PartialEq, Eq, Debug, Deserialize)]
pub struct Link {
    /// The other node.
    pub node: String,
    /// Whether it works.
    #[serde(default)]
    pub up: bool,
    /// For how long it has been so, milliseconds.
    #[serde(default)]
    pub since_ms: u64,
    /// Microseconds: least, mean, 99th percentile.
    #[serde(default)]
    pub round_trip_us: Option<[u64; 3]>,
}

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default, Deserialize)]
#[serde(default)]
pub struct Order {
    /// `local` or `raft`; empty if the sheep does not say.
    pub driver: String,
    /// Whether the node that reports hears from the quorum.
    pub has_quorum: bool,
    /// Who leads.
    pub leader: Option<String>,
    /// Who votes.
    pub voters: Vec<String>,
    /// Which of them the node that reports does not hear.
    pub missing_voters: Vec<String>,
    /// What has to happen before the cluster serves; empty if it does.
    pub needed: String,
    /// Everybody who is known.
    pub nodes: Vec<OrderNode>,
    /// Of the node that reports.
    pub links: Vec<Link>,
}

impl Order {
    /// Reads it out of a report.
    pub fn of(report: &Value) -> Order {
        report.get("order").and_then(|order| Order::deserialize(order).ok()).unwrap_or_default()
    }

    /// Whether nodes vote, are admitted and have keys.
    pub fn is_raft(&self) -> bool {
        self.driver == RAFT
    }

    /// The nodes in a state.
    pub fn in_state(&self, state: NodeState) -> impl Iterator<Item = &OrderNode> {
        self.nodes.iter().filter(move |node| node.state == state)
    }

    /// The node with an id.
    pub fn node(&self, id: &str) -> Option<&OrderNode> {
        self.nodes.iter().find(|node| node.id == id)
    }

    /// `ID (ADDRESS)`, or the id alone.
    pub fn shown(&self, id: &str) -> String {
        match self.node(id) {
            Some(node) if !node.address.is_empty() => format!("{id} ({})", node.first_address()),
            _ => id.to_owned(),
        }
    }

    /// Which of these is a row of the node list. Several nodes may share a machine: the zone and the usual distance between
    /// the two ports tell them apart; where they do not, nobody is better than the wrong one.
    pub fn behind(&self, row: &Node) -> Option<&OrderNode> {
        let ip = row.ip.to_canonical();
        let is_there = |node: &&OrderNode| {
            node.state != NodeState::Asking
                && node.zone.is_none_or(|zone| zone == row.zone)
                && node.sockets().iter().any(|socket| socket.ip().to_canonical() == ip)
        };
        let there: Vec<&OrderNode> = self.nodes.iter().filter(is_there).collect();
        if let [only] = there[..] {
            return Some(only);
        }
        let usual = row.port.checked_add(NODE_PORT_OFFSET);
        let has_usual_port = |node: &&&OrderNode| node.sockets().iter().any(|socket| Some(socket.port()) == usual);
        let mut usual_ones = there.iter().filter(has_usual_port);
        match (usual_ones.next(), usual_ones.next()) {
            (Some(one), None) => Some(one),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    fn row(ip: &str, port: u16, zone: u32) -> Node {
        Node { address: [0; 16], port, ip: ip.parse().expect("an address"), vnodes: 128, zone }
    }

    #[test]
    fn a_report_without_it_is_one_of_a_sheep_without_it() {
        for report in [Value::Null, json!({}), json!({"order": 7}), json!({"order": {"driver": 7}})] {
            assert_eq!(Order::of(&report), Order::default(), "{report}");
        }
        let order = Order::of(&json!({"order": {
            "driver": "raft", "nodes": [{"id": "a", "address": "10.0.0.1:7010,[fd00::1]:7010", "state": "asking"}],
        }}));
        assert!(order.is_raft() && order.nodes[0].state == NodeState::Asking);
        assert_eq!(order.nodes[0].sockets().len(), 2);
        assert_eq!((order.shown("a"), order.shown("b")), ("a (10.0.0.1:7010)".to_owned(), "b".to_owned()));
    }

    #[test]
    fn rows_are_told_apart_by_address_zone_and_port() {
        let node = |id: &str, address: &str, zone| OrderNode {
            id: id.to_owned(),
            address: address.to_owned(),
            state: NodeState::Member,
            zone,
            ..OrderNode::default()
        };
        let order = Order {
            nodes: vec![
                node("a", "10.0.0.1:9000", Some(1)),
                node("b", "192.168.0.2:7010,10.0.0.2:7010", Some(2)),
                node("c", "10.0.0.2:7020", Some(2)),
                node("d", "10.0.0.2:7030", Some(3)),
            ],
            ..Order::default()
        };
        let id = |row: Node| order.behind(&row).map(|node| node.id.as_str());
        assert_eq!(id(row("10.0.0.1", 7000, 1)), Some("a"));
        assert_eq!(id(row("10.0.0.2", 7000, 2)), Some("b"));
        assert_eq!(id(row("10.0.0.2", 7010, 2)), Some("c"));
        assert_eq!(id(row("10.0.0.2", 7123, 3)), Some("d"));
        assert_eq!(id(row("10.0.0.2", 7123, 2)), None);
        assert_eq!(id(row("10.0.0.9", 7000, 1)), None);
    }
}
