//! The ways from the sheep that was asked to the others of its cluster.
//!
//! Sheep of the default driver serve the clients of their own machine only, so another node is asked over its port for other
//! nodes, with the cluster key. The key is the one that was given; on a member's own machine the sheep tells it, as it tells
//! it to everybody there.
//!
//! Always holds: nobody is asked for the key over a connection that others can read.

use serde_json::json;
use sheep_core::admission::ClusterKey;

use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::order::Order;
use crate::requests::{self, Node};

/// See the module.
pub struct Reach {
    asked: Target,
    /// The id of the sheep that was asked.
    own: String,
    order: Order,
    key: Option<ClusterKey>,
}

impl Reach {
    /// Learns the ways from the sheep that is asked.
    pub fn from(sheep: &mut Sheep) -> Result<Reach, Failure> {
        let asked = sheep.target();
        let report = requests::cluster_report(sheep)?;
        let own = report.get("node").and_then(|node| node.as_str()).unwrap_or_default().to_owned();
        let order = Order::of(&report);
        let key = match asked {
            Target::Secure(place) => Some(place.key.clone()),
            _ if order.is_raft() && asked.is_local() => {
                // An open cluster has none; then its clients are let in by address, or not at all.
                requests::administer(sheep, &json!({"do": "show-key"})).ok().and_then(|text| text.parse().ok())
            }
            _ => None,
        };
        Ok(Reach { asked, own, order, key })
    }

    /// What the sheep says about who orders things.
    pub fn order(&self) -> &Order {
        &self.order
    }

    /// How to ask a node.
    pub fn target(&self, node: &Node) -> Target {
        if !self.order.is_raft() {
            return node.target();
        }
        match (self.order.behind(node), &self.key) {
            (Some(known), _) if known.id == self.own => self.asked,
            (Some(known), Some(key)) => Target::secure(known.sockets(), key.clone()),
            _ => node.target(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::order::{NodeState, OrderNode};

    fn row(ip: &str, zone: u32) -> Node {
        Node { address: [0; 16], port: 7000, ip: ip.parse().expect("an address"), vnodes: 128, zone }
    }

    fn reach(driver: &str, key: Option<ClusterKey>) -> Reach {
        let node = |id: &str, address: &str, zone| OrderNode {
            id: id.to_owned(),
            address: address.to_owned(),
            state: NodeState::Member,
            zone: Some(zone),
            ..OrderNode::default()
        };
        let nodes = vec![node("a", "10.0.0.1:7010", 1), node("b", "10.0.0.2:7010,[fd00::2]:7010", 2)];
        let order = Order { driver: driver.to_owned(), nodes, ..Order::default() };
        let asked = Target::Tcp("127.0.0.1:7000".parse().expect("an address"));
        Reach { asked, own: "a".to_owned(), order, key }
    }

    #[test]
    fn other_nodes_are_asked_with_the_key() {
        let key = ClusterKey { generation: 1, secret: [7; 32] };
        let way = reach("raft", Some(key.clone()));
        assert_eq!(way.target(&row("10.0.0.1", 1)), way.asked, "the asked one is asked as before");
        let Target::Secure(place) = way.target(&row("10.0.0.2", 2)) else { panic!("not with the key") };
        assert_eq!((place.addresses.len(), &place.key), (2, &key));
        let unknown = row("10.0.0.3", 3);
        assert_eq!(way.target(&unknown), unknown.target());
    }

    #[test]
    fn without_a_key_or_votes_nodes_are_asked_as_ever() {
        for way in [reach("raft", None), reach("local", None), reach("", None)] {
            let other = row("10.0.0.2", 2);
            assert_eq!(way.target(&other), other.target());
        }
    }
}
