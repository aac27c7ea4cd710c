//! `dog cluster recover force`, `enable` and `disable`

use std::fmt::Write as _;

use qemu_proto::node_entry::{NODE_BYTES, NODES_MAX};
use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;
use serde_json::{Value, json};

use crate::args::Recover;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::order::{NodeState, Order};
use crate::question;
use crate::report::Report;
use crate::requests;

const QUESTION: &str = "Caution: the cluster goes on without the nodes that are missing.\n\
    What only they have is lost, and they must be emptied before they may come back.\n\
    Are you sure you want to continue?";

/// Runs the command.
pub fn run(typed: &Recover, target: Target) -> Result<Report, Failure> {
    match typed.nested.as_deref() {
        Some("force") => {}
        Some(word @ "enable") => return hold(target, Opcode::EnableRecover, word),
        Some(word @ "disable") => return hold(target, Opcode::DisableRecover, word),
        other => return Err(Failure::nested(other, "force, enable or disable")),
    }
    let mut sheep = Sheep::connect(target)?;
    let report = requests::cluster_report(&mut sheep)?;
    let order = Order::of(&report);
    if order.is_raft() {
        return without_majority(&mut sheep, &report, &order, typed.force);
    }
    if !typed.force && !question::confirmed(QUESTION)? {
        return Ok(Report::silent());
    }
    let mut request = Request::plain(Opcode::ForceRecover);
    request.data_length = (NODES_MAX * NODE_BYTES) as u32;
    sheep
        .call(request, &[])
        .map_err(|trouble| trouble.or(|reason| Failure::failed(format!("failed to execute request, {reason}"))))?;
    Ok(Report::silent())
}

fn hold(target: Target, opcode: Opcode, word: &str) -> Result<Report, Failure> {
    let answered = Sheep::connect(target)?.call(Request::plain(opcode), &[]);
    answered.map_err(|trouble| trouble.or(|reason| Failure::failed(format!("Response's result: {reason}"))))?;
    Ok(Report::text(format!("Cluster recovery: {word}\n")))
}

/// Nodes that vote can be outvoted by those that are only out of sight: a yes is too easy for that.
fn without_majority(sheep: &mut Sheep, report: &Value, order: &Order, force: bool) -> Result<Report, Failure> {
    let id = report.get("cluster_id").and_then(Value::as_str).unwrap_or_default();
    if report.get("phase").and_then(Value::as_str) == Some("unformatted") || id.is_empty() {
        return Err(Failure::failed("The cluster is not formatted yet: there is nothing to recover"));
    }
    if !force && !question::typed(&caution(order, id), id)? {
        return Err(Failure::failed("That is not the id of the cluster: nothing was changed"));
    }
    requests::administer(sheep, &json!({"do": "recover-force"}))
        .map_err(|failure| Failure { message: format!("failed to execute request, {failure}"), ..failure })?;
    Ok(Report::text(format!(
        "cluster {id} goes on without the nodes that are missing; 'dog cluster info' shows how it is\n"
    )))
}

/// Who is missing, and what that may cost.
fn caution(order: &Order, id: &str) -> String {
    let mut text = String::from("Caution: the cluster goes on without the nodes that are missing.\n");
    let mut missing: Vec<&str> = order.missing_voters.iter().map(String::as_str).collect();
    let silent = order.in_state(NodeState::Member).filter(|node| node.alive == Some(false));
    missing
        .extend(silent.map(|node| node.id.as_str()).filter(|id| !order.missing_voters.iter().any(|voter| voter == id)));
    if missing.is_empty() {
        text.push_str("None is missing now.\n");
    }
    for node in missing {
        let votes = if order.voters.iter().any(|voter| voter == node) { ", a voter" } else { "" };
        let _ = writeln!(text, "  missing: {}{votes}", order.shown(node));
    }
    if !order.needed.is_empty() {
        let _ = writeln!(text, "Without this command: {}.", order.needed);
    }
    text.push_str(
        "Writes that only the missing nodes have are lost.\n\
         If those nodes still run somewhere, out of contact, they may go on by themselves: the cluster splits in two, and\n\
         what guests wrote to one half is lost. Make sure that they are off, or that nobody writes through them.\n",
    );
    let _ = write!(text, "Type the id of the cluster ({id}) to continue:");
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_sheep::FakeSheep;
    use crate::order::OrderNode;

    #[test]
    fn the_caution_names_who_is_missing_and_what_that_may_cost() {
        let node = |id: &str, address: &str, alive| OrderNode {
            id: id.to_owned(),
            address: address.to_owned(),
            state: NodeState::Member,
            alive: Some(alive),
            ..OrderNode::default()
        };
        let order = Order {
            driver: "raft".to_owned(),
            voters: ["a", "b", "c"].map(str::to_owned).to_vec(),
            missing_voters: ["b", "c"].map(str::to_owned).to_vec(),
            needed: "2 of 3 voters have to be there, 1 are: start b or c".to_owned(),
            nodes: vec![
                node("a", "10.0.0.1:7010", true),
                node("b", "10.0.0.2:7010", false),
                node("d", "10.0.0.4:7010", false),
            ],
            ..Order::default()
        };
        let text = caution(&order, "00000000000000ff");
        assert!(
            text.contains(
                "  missing: b (10.0.0.2:7010), a voter\n  missing: c, a voter\n  missing: d (10.0.0.4:7010)\n"
            ),
            "{text}"
        );
        assert!(text.contains("are lost.") && text.contains("the cluster splits in two"), "{text}");
        assert!(text.ends_with("Type the id of the cluster (00000000000000ff) to continue:"), "{text}");
        assert!(!text.contains("missing: a"), "{text}");
    }

    fn force(report: Value) -> (Result<(), Failure>, Vec<Value>, usize) {
        let fake = FakeSheep::in_cluster(report);
        let ended = run(&Recover { force: true, nested: Some("force".to_owned()) }, fake.target).map(drop);
        let kept = fake.kept();
        (ended, kept.wishes.clone(), kept.counts.get(&Opcode::ForceRecover.code()).copied().unwrap_or(0))
    }

    #[test]
    fn each_driver_is_asked_in_its_own_way() {
        let raft = json!({"cluster_id": "00000000000000ff", "phase": "running", "order": {"driver": "raft"}});
        assert_eq!(force(raft), (Ok(()), vec![json!({"do": "recover-force"})], 0));
        for report in [json!({"order": {"driver": "local"}}), Value::Null] {
            assert_eq!(force(report), (Ok(()), Vec::new(), 1));
        }
        let (ended, wishes, _) = force(json!({"phase": "unformatted", "order": {"driver": "raft"}}));
        assert!(ended.expect_err("nothing to recover").message.contains("not formatted") && wishes.is_empty());
    }
}
