//! `dog node ban`

use std::fmt::Write as _;

use serde_json::json;

use crate::args::Ban;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Target};
use crate::order::{NodeState, Order};
use crate::question;
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(typed: &Ban, target: Target) -> Result<Report, Failure> {
    let id = meaning::node_id(&typed.id)?;
    let mut sheep = Sheep::connect(target)?;
    if !typed.force {
        let order = Order::of(&requests::cluster_report(&mut sheep)?);
        if !question::confirmed(&question(&order, &id))? {
            return Err(Failure::failed(format!("node {id} was not banned; -f does not ask")));
        }
    }
    let node = requests::administer(&mut sheep, &json!({"do": "ban", "node": id}))?;
    Ok(Report::text(format!(
        "node {node} is banned, for good; its machine may come back with an empty store directory\n\
         the cluster key was replaced: copies of the key file, and tokens that were not used yet, are void\n"
    )))
}

/// An id may be cut short: what it stands for is shown.
fn question(order: &Order, id: &str) -> String {
    let mut text = String::from("Caution: ");
    let fitting = order.in_state(NodeState::Member).filter(|node| node.id.starts_with(id));
    let fitting: Vec<String> = fitting.map(|node| order.shown(&node.id)).collect();
    match fitting.as_slice() {
        [node] => {
            let _ = write!(text, "node {node} is a member. It is shut out");
        }
        _ => {
            let _ = write!(text, "the node {id} is shut out");
        }
    }
    text.push_str(
        " for good: its identity never comes back.\n\
         The cluster key is replaced; copies of the key file outside the members' directories are void then.\n\
         Are you sure you want to continue?",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_sheep::FakeSheep;
    use crate::order::OrderNode;
    use serde_json::Value;

    #[test]
    fn the_question_says_who_it_is() {
        let node = OrderNode {
            id: "00000000000000a1".to_owned(),
            address: "10.0.0.1:7010".to_owned(),
            state: NodeState::Member,
            ..OrderNode::default()
        };
        let order = Order { nodes: vec![node], ..Order::default() };
        let asked = question(&order, "00000000");
        assert!(asked.starts_with("Caution: node 00000000000000a1 (10.0.0.1:7010) is a member."), "{asked}");
        assert!(question(&order, "b").starts_with("Caution: the node b is shut out for good"));
    }

    #[test]
    fn force_does_not_ask() {
        let fake = FakeSheep::in_cluster(Value::Null);
        run(&Ban { force: true, id: "a1".to_owned() }, fake.target).expect("banned");
        assert_eq!(fake.kept().wishes, [json!({"do": "ban", "node": "a1"})]);
    }
}
