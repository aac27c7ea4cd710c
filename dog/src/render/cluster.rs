//! The text of `dog cluster info`.

use serde_json::{Value, json};

use super::text::{CTIME, SECONDS, local_time, put};
use crate::cluster::info::{EpochRow, State};
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
        let Some(formatted) = &self.formatted else { return };
        let created = local_time(formatted.created, CTIME, &style.zone);
        put(out, format_args!("Cluster created at {created}\n\nEpoch Time           Version"));
        put(out, format_args!(" [Host:Port:V-Nodes,,,]\n"));
        for (at, row) in self.epochs.iter().enumerate() {
            let began = local_time(row.began, SECONDS, &style.zone);
            put(out, format_args!("{began} {:6} [{}]\n", row.epoch, self.members(at)));
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
        Some(json!({
            "status": self.status,
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::info::Formatted;
    use jiff::tz::TimeZone;
    use std::net::Ipv4Addr;

    fn node(port: u16) -> Node {
        Node { address: [0; 16], port, ip: Ipv4Addr::LOCALHOST.into(), vnodes: 128, zone: 1 }
    }

    fn state() -> State {
        State {
            status: "running, auto-recovery enabled".to_owned(),
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
}
