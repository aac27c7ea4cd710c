//! The text of `dog cluster info`.

use serde_json::{Value, json};

use super::node::put_identities;
use super::text::{CTIME, SECONDS, local_time, put};
use crate::cluster::info::{Condition, EpochRow, State};
use crate::order::{Link, NodeState};
use crate::report::{Show, Style};
use crate::requests::Node;

impl Show for State {
    fn table(&self, style: &Style, out: &mut Vec<u8>) {
        put(out, format_args!("Cluster status: {}\n", self.status));
        // Before the format the status says it all, and scripts expect nothing else.
        for line in self.waiting.iter().filter(|_| self.formatted.is_some()) {
            put(out, format_args!("  {line}\n"));
        }
        self.put_strategies(out);
        self.put_history(style, out);
        if self.order.is_raft() {
            self.put_needs(out);
            if self.is_verbose {
                self.put_order(out);
            }
        }
    }

    fn raw(&self, _: &Style, out: &mut Vec<u8>) {
        put(out, format_args!("{}\n", self.status));
        let Some(formatted) = &self.formatted else { return };
        put(out, format_args!("{}\n", formatted.created));
        for (at, row) in self.epochs.iter().enumerate() {
            put(out, format_args!("{} {} [{}]\n", row.began, row.epoch, self.members(at)));
        }
    }

    fn json(&self) -> Option<Value> {
        let formatted = self.formatted.as_ref().map(|formatted| {
            json!({
                "created_seconds": formatted.created,
                "store": formatted.store,
                "copies": formatted.redundancy,
                "vnodes_strategy": if formatted.has_auto_vnodes { "auto" } else { "fixed" },
                "vnode_mode": if formatted.has_disk_vnodes { "disk" } else { "node" },
            })
        });
        let epochs: Vec<Value> = self.epochs.iter().map(epoch_json).collect();
        let members: Vec<&str> = self.order.in_state(NodeState::Member).map(|node| node.id.as_str()).collect();
        Some(json!({
            "status": self.condition.name(),
            "status_text": self.status,
            "cluster_id": self.report.get("cluster_id"),
            "epoch": self.report.get("epoch"),
            "members": members,
            "voters": self.order.voters,
            "leader": self.order.leader,
            "missing": self.order.missing_voters,
            "needed": self.order.needed,
            "formatted": formatted,
            "waiting": self.waiting,
            "epochs": epochs,
            "report": self.report,
        }))
    }
}

fn epoch_json(row: &EpochRow) -> Value {
    let nodes = row.nodes.iter().map(
        |node| json!({"address": node.ip.to_string(), "port": node.port, "vnodes": node.vnodes, "zone": node.zone}),
    );
    let nodes: Vec<Value> = nodes.collect();
    json!({"epoch": row.epoch, "began_seconds": row.began, "nodes": nodes})
}

impl State {
    /// A blank line, or what `-v` puts in its place.
    fn put_strategies(&self, out: &mut Vec<u8>) {
        if !self.is_verbose {
            put(out, format_args!("\n"));
            return;
        }
        match &self.formatted {
            None => put(out, format_args!("Cluster store: {}\nCluster vnode mode: node\n", self.status)),
            Some(formatted) => put(
                out,
                format_args!(
                    "Cluster store: {} with {} redundancy policy\nCluster vnodes strategy: {}\nCluster vnode mode: {}\n",
                    formatted.store,
                    formatted.redundancy,
                    if formatted.has_auto_vnodes { "auto" } else { "fixed" },
                    if formatted.has_disk_vnodes { "disk" } else { "node" }
                ),
            ),
        }
    }

    /// When it was made, and all epochs; nothing before format.
    fn put_history(&self, style: &Style, out: &mut Vec<u8>) {
        let Some(formatted) = &self.formatted else { return };
        let created = local_time(formatted.created, CTIME, &style.zone);
        put(out, format_args!("Cluster created at {created}\n\nEpoch Time           Version"));
        put(out, format_args!(" [Host:Port:V-Nodes,,,]\n"));
        for (at, row) in self.epochs.iter().enumerate() {
            let began = local_time(row.began, SECONDS, &style.zone);
            put(out, format_args!("{began} {:6} [{}]\n", row.epoch, self.members(at)));
        }
    }

    /// What is not as it should be, one line each, and what to do about it; nothing if all is well.
    fn put_needs(&self, out: &mut Vec<u8>) {
        let order = &self.order;
        if self.condition == Condition::Unformatted {
            let count = order.in_state(NodeState::Acquainted).count();
            let nodes = if count == 1 { "node is" } else { "nodes are" };
            put(out, format_args!("{count} {nodes} acquainted; to make the cluster: dog cluster format\n"));
            return;
        }
        if self.condition == Condition::NoQuorum {
            put(out, format_args!("\nNo quorum: {}\n", order.needed));
        } else if !order.needed.is_empty() {
            put(out, format_args!("\nNot complete: {}\n", order.needed));
        } else if !order.missing_voters.is_empty() {
            put(out, format_args!("\n"));
        }
        if !order.missing_voters.is_empty() {
            put(out, format_args!("Voters missing: {}\n", self.named(&order.missing_voters)));
        }
    }

    /// How the nodes agree, as the one that was asked sees it.
    fn put_order(&self, out: &mut Vec<u8>) {
        let order = &self.order;
        put(out, format_args!("\n"));
        if self.condition != Condition::Unformatted {
            let id = self.report.get("cluster_id").and_then(Value::as_str).unwrap_or("unknown");
            let leader = order.leader.as_ref().map_or_else(|| "none".to_owned(), |leader| order.shown(leader));
            put(out, format_args!("Cluster id: {id}\nLeader: {leader}\nVoters: {}\n", self.named(&order.voters)));
            let generation = self.report.get("key_generation").and_then(Value::as_u64);
            match generation {
                Some(generation) => put(out, format_args!("Cluster key: generation {generation}\n")),
                None => put(out, format_args!("Cluster key: none, the cluster is open\n")),
            }
        }
        put(out, format_args!("Nodes:\n"));
        put_identities(order.nodes.iter(), out);
        if !order.links.is_empty() {
            put(out, format_args!("Links of the node that was asked:\n"));
        }
        for link in &order.links {
            put(out, format_args!("  {}: {}\n", order.shown(&link.node), link_text(link)));
        }
    }

    fn named(&self, ids: &[String]) -> String {
        ids.iter().map(|id| self.order.shown(id)).collect::<Vec<_>>().join(", ")
    }

    /// The members of an epoch, or how they differ from those of the epoch before.
    fn members(&self, at: usize) -> String {
        let row = &self.epochs[at];
        if !self.shows_changes {
            let shown: Vec<String> = row.nodes.iter().map(|node| format!("{node}:{}", node.vnodes)).collect();
            return shown.join(", ");
        }
        let Some(before) = self.epochs.get(at + 1) else { return "formated".to_owned() };
        let is_in = |node: &&Node, nodes: &[Node]| {
            nodes.iter().any(|other| (other.address, other.port) == (node.address, node.port))
        };
        let joined = row.nodes.iter().filter(|node| !is_in(node, &before.nodes)).map(|node| format!("+{node}"));
        let left = before.nodes.iter().filter(|node| !is_in(node, &row.nodes)).map(|node| format!("-{node}"));
        joined.chain(left).collect::<Vec<_>>().join(", ")
    }
}

fn link_text(link: &Link) -> String {
    let since = link.since_ms / 1000;
    let ms = |us: u64| us as f64 / 1000.0;
    match (link.up, link.round_trip_us) {
        (false, _) => format!("down for {since} s"),
        (true, None) => format!("up for {since} s"),
        (true, Some([least, mean, high])) => format!(
            "up for {since} s, round trip {:.2} ms (mean; least {:.2}, 99 of 100 below {:.2})",
            ms(mean),
            ms(least),
            ms(high)
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::info::Formatted;
    use crate::order::{Order, OrderNode};
    use jiff::tz::TimeZone;
    use std::net::Ipv4Addr;

    fn node(port: u16) -> Node {
        Node { address: [0; 16], port, ip: Ipv4Addr::LOCALHOST.into(), vnodes: 128, zone: 1 }
    }

    fn state() -> State {
        State {
            status: "running, auto-recovery enabled".to_owned(),
            condition: Condition::Running,
            order: Order::default(),
            formatted: Some(Formatted {
                created: 1_795_237_853,
                store: "plain".to_owned(),
                redundancy: "3".to_owned(),
                has_auto_vnodes: true,
                has_disk_vnodes: false,
            }),
            epochs: vec![EpochRow { epoch: 1, began: 1_795_237_853, nodes: vec![node(7800), node(7801)] }],
            waiting: Vec::new(),
            report: Value::Null,
            is_verbose: false,
            shows_changes: false,
        }
    }

    fn both(state: &State) -> (String, String) {
        let style = Style { zone: TimeZone::UTC, is_terminal: false };
        let (mut table, mut raw) = (Vec::new(), Vec::new());
        state.table(&style, &mut table);
        state.raw(&style, &mut raw);
        (String::from_utf8(table).expect("text"), String::from_utf8(raw).expect("text"))
    }

    #[test]
    fn a_running_cluster_is_shown_as_ever() {
        let (table, raw) = both(&state());
        assert_eq!(
            table,
            "Cluster status: running, auto-recovery enabled\n\nCluster created at Sat Nov 21 05:10:53 2026\n\n\
             Epoch Time           Version [Host:Port:V-Nodes,,,]\n\
             2026-11-21 05:10:53      1 [127.0.0.1:7800:128, 127.0.0.1:7801:128]\n"
        );
        assert_eq!(
            raw,
            "running, auto-recovery enabled\n1795237853\n1795237853 1 [127.0.0.1:7800:128, 127.0.0.1:7801:128]\n"
        );
    }

    #[test]
    fn verbose_lines_take_the_place_of_the_blank_one() {
        let (table, _) = both(&State { is_verbose: true, ..state() });
        let expected = "Cluster status: running, auto-recovery enabled\nCluster store: plain with 3 redundancy policy\n\
            Cluster vnodes strategy: auto\nCluster vnode mode: node\nCluster created at ";
        assert!(table.starts_with(expected), "{table}");
    }

    #[test]
    fn changes_are_shown_by_sign() {
        let mut state = State { shows_changes: true, ..state() };
        state.epochs.insert(0, EpochRow { epoch: 2, began: 1_795_237_854, nodes: vec![node(7800), node(7802)] });
        let (_, raw) = both(&state);
        assert!(raw.ends_with("1795237854 2 [+127.0.0.1:7802, -127.0.0.1:7801]\n1795237853 1 [formated]\n"), "{raw}");
    }

    #[test]
    fn an_unformatted_cluster_has_a_status_only() {
        let status = "Waiting for cluster to be formatted".to_owned();
        let mut state = State { status, formatted: None, epochs: Vec::new(), ..state() };
        assert_eq!(both(&state).0, "Cluster status: Waiting for cluster to be formatted\n\n");
        state.waiting = vec!["for 'dog cluster format'".to_owned()];
        assert_eq!(both(&state).0, "Cluster status: Waiting for cluster to be formatted\n\n");
        assert_eq!(state.json().expect("JSON")["waiting"][0], "for 'dog cluster format'");
    }

    fn raft() -> Order {
        let node = |id: &str, address: &str| OrderNode {
            id: id.to_owned(),
            address: address.to_owned(),
            state: NodeState::Member,
            fingerprint: "f".to_owned(),
            ..OrderNode::default()
        };
        Order {
            driver: "raft".to_owned(),
            has_quorum: true,
            leader: Some("a1".to_owned()),
            voters: ["a1", "a2", "a3"].map(str::to_owned).to_vec(),
            nodes: vec![node("a1", "10.0.0.1:7010"), node("a2", "10.0.0.2:7010,192.168.0.2:7010")],
            links: vec![
                Link { node: "a2".to_owned(), up: true, since_ms: 65_432, round_trip_us: Some([110, 204, 1900]) },
                Link { node: "a3".to_owned(), up: false, since_ms: 4000, round_trip_us: None },
            ],
            ..Order::default()
        }
    }

    #[test]
    fn a_cluster_that_votes_says_nothing_more_while_all_is_well() {
        let plain = both(&state());
        assert_eq!(both(&State { order: raft(), ..state() }), plain);
    }

    #[test]
    fn what_is_missing_comes_last_with_what_to_do() {
        let well = both(&state()).0;
        let missing = Order { missing_voters: vec!["a2".to_owned(), "a3".to_owned()], ..raft() };
        let (table, _) = both(&State { order: missing.clone(), ..state() });
        assert_eq!(table, format!("{well}\nVoters missing: a2 (10.0.0.2:7010), a3\n"));
        let order = Order { needed: "start a2 or a3".to_owned(), has_quorum: false, ..missing };
        let lost = State { condition: Condition::NoQuorum, status: "Waiting".to_owned(), order, ..state() };
        let (table, raw) = both(&lost);
        assert!(table.starts_with("Cluster status: Waiting\n"), "{table}");
        assert!(table.ends_with("\nNo quorum: start a2 or a3\nVoters missing: a2 (10.0.0.2:7010), a3\n"), "{table}");
        assert!(raw.starts_with("Waiting\n") && !raw.contains("missing"), "{raw}");
        // A node that has not come in again knows no epochs.
        let (table, _) = both(&State { formatted: None, epochs: Vec::new(), ..lost });
        assert!(table.contains("\nNo quorum: start a2 or a3\n"), "{table}");
    }

    #[test]
    fn before_format_the_command_is_named() {
        let mut order = raft();
        for node in &mut order.nodes {
            node.state = NodeState::Acquainted;
        }
        let fresh = State {
            condition: Condition::Unformatted,
            status: "Waiting for cluster to be formatted".to_owned(),
            formatted: None,
            epochs: Vec::new(),
            order,
            ..state()
        };
        assert_eq!(
            both(&fresh).0,
            "Cluster status: Waiting for cluster to be formatted\n\n\
             2 nodes are acquainted; to make the cluster: dog cluster format\n"
        );
        assert_eq!(fresh.json().expect("JSON")["status"], "unformatted");
    }

    #[test]
    fn verbose_tells_how_the_nodes_agree() {
        let report = json!({"cluster_id": "00000000000000ff", "epoch": 7, "key_generation": 2});
        let verbose = State { is_verbose: true, order: raft(), report, ..state() };
        let (table, _) = both(&verbose);
        let expected = "\n\nCluster id: 00000000000000ff\nLeader: a1 (10.0.0.1:7010)\n\
            Voters: a1 (10.0.0.1:7010), a2 (10.0.0.2:7010), a3\nCluster key: generation 2\nNodes:\n  \
            Id                Host:Port             Fingerprint\n  \
            a1                10.0.0.1:7010         f\n  a2                10.0.0.2:7010         f\n\
            Links of the node that was asked:\n  \
            a2 (10.0.0.2:7010): up for 65 s, round trip 0.20 ms (mean; least 0.11, 99 of 100 below 1.90)\n  \
            a3: down for 4 s\n";
        assert!(table.ends_with(expected), "{table}");
        let json = verbose.json().expect("JSON");
        assert_eq!((&json["status"], &json["epoch"]), (&json!("running"), &json!(7)));
        assert_eq!(json["cluster_id"], "00000000000000ff");
        assert_eq!((&json["members"], &json["leader"]), (&json!(["a1", "a2"]), &json!("a1")));
        assert_eq!((&json["voters"], &json["missing"]), (&json!(["a1", "a2", "a3"]), &json!([])));
    }
}
