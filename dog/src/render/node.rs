//! The tables of `dog node`.

use serde_json::{Value, json};
use sheep_core::units::HumanSize;

use super::text::put;
use crate::node::info::{Space, Spaces};
use crate::node::list::Nodes;
use crate::node::recovery::Recoveries;
use crate::order::{NodeState, OrderNode};
use crate::report::{Show, Style};

impl Show for Nodes {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        put(out, format_args!("  Id   Host:Port         V-Nodes       Zone\n"));
        for (id, node) in self.rows.iter().enumerate() {
            put(out, format_args!("{id:4}   {:<20}\t{:2}{:11}\n", node.to_string(), node.vnodes, node.zone));
        }
        if self.order.is_raft() {
            self.put_others(NodeState::Acquainted, "acquainted: dog cluster format", out);
            self.put_others(NodeState::Asking, "asking: dog node admit ID", out);
        }
    }

    fn raw(&self, _: &Style, out: &mut Vec<u8>) {
        for (id, node) in self.rows.iter().enumerate() {
            put(out, format_args!("{id} {node} {} {}\n", node.vnodes, node.zone));
        }
    }

    fn json(&self) -> Option<Value> {
        let known: Vec<Option<&OrderNode>> = self.rows.iter().map(|row| self.order.behind(row)).collect();
        let is_founded = self.order.nodes.is_empty() || self.order.in_state(NodeState::Member).next().is_some();
        let usual = if is_founded { NodeState::Member } else { NodeState::Acquainted };
        let rows = self.rows.iter().zip(&known).enumerate().map(|(position, (row, known))| {
            let mut value = known.map_or_else(|| unknown_json(usual), node_json);
            value["position"] = json!(position);
            value["address"] = json!(row.ip.to_string());
            value["port"] = json!(row.port);
            value["vnodes"] = json!(row.vnodes);
            value["zone"] = json!(row.zone);
            value
        });
        let mut rows: Vec<Value> = rows.collect();
        // A row that nobody was found behind stands for one of the rest already.
        let is_complete = known.iter().all(Option::is_some);
        let is_listed = |node: &OrderNode| known.iter().flatten().any(|other| other.id == node.id);
        let others = self.order.nodes.iter().filter(|node| !is_listed(node));
        rows.extend(others.filter(|node| is_complete || node.state == NodeState::Asking).map(node_json));
        Some(rows.into())
    }
}

impl Nodes {
    /// A table of the nodes in a state, below what to do about them; nothing if there are none.
    fn put_others(&self, state: NodeState, headline: &str, out: &mut Vec<u8>) {
        let mut nodes = self.order.in_state(state).peekable();
        if nodes.peek().is_some() {
            put(out, format_args!("\n{headline}\n"));
            put_identities(nodes, out);
        }
    }
}

/// The nodes by what a person compares before letting them in.
pub fn put_identities<'a>(nodes: impl Iterator<Item = &'a OrderNode>, out: &mut Vec<u8>) {
    put(out, format_args!("  {:<16}  {:<20}  Fingerprint\n", "Id", "Host:Port"));
    for node in nodes {
        put(out, format_args!("  {:<16}  {:<20}  {}\n", node.id, node.first_address(), node.fingerprint));
    }
}

/// A node as the driver knows it. Where clients reach it is another matter.
fn node_json(node: &OrderNode) -> Value {
    let ip = node.sockets().first().map(|socket| socket.ip().to_string());
    json!({
        "id": node.id, "position": null, "state": node.state.name(), "address": ip, "port": null, "vnodes": null,
        "zone": node.zone, "node_addresses": node.sockets().iter().map(ToString::to_string).collect::<Vec<_>>(),
        "fingerprint": node.fingerprint, "votes": node.votes, "alive": node.alive,
    })
}

/// A row of which the driver says nothing.
fn unknown_json(state: NodeState) -> Value {
    json!({"id": null, "state": state.name(), "node_addresses": [], "fingerprint": "", "votes": false, "alive": null})
}

impl Show for Spaces {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        let put_space = |out: &mut Vec<u8>, label: &str, space: &Space| {
            let size = |bytes| HumanSize(bytes).to_string();
            put(
                out,
                format_args!(
                    "{label}\t{}\t{}\t{}\t{:3}%\n",
                    size(space.size_bytes),
                    size(space.used_bytes),
                    size(space.free_bytes()),
                    space.used_percent()
                ),
            );
        };
        put(out, format_args!("Id\tSize\tUsed\tAvail\tUse%\n"));
        for space in &self.nodes {
            put_space(out, &format!("{:2}", space.id), space);
        }
        put_space(out, "Total", &self.total());
        put(out, format_args!("\nTotal virtual image size\t{}\n", HumanSize(self.virtual_bytes)));
    }

    fn raw(&self, _: &Style, out: &mut Vec<u8>) {
        let values = |space: &Space| {
            format!("{} {} {} {}%", space.size_bytes, space.used_bytes, space.free_bytes(), space.used_percent())
        };
        for space in &self.nodes {
            put(out, format_args!("{} {}\n", space.id, values(space)));
        }
        put(out, format_args!("Total {} {}\n", values(&self.total()), self.virtual_bytes));
    }

    fn json(&self) -> Option<Value> {
        let values = |space: &Space| json!({"size_bytes": space.size_bytes, "used_bytes": space.used_bytes, "free_bytes": space.free_bytes()});
        let nodes = self.nodes.iter().map(|space| {
            let mut value = values(space);
            value["id"] = json!(space.id);
            value
        });
        let nodes: Vec<Value> = nodes.collect();
        Some(json!({"nodes": nodes, "total": values(&self.total()), "virtual_bytes": self.virtual_bytes}))
    }
}

impl Show for Recoveries {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        put(out, format_args!("Nodes In Recovery:\n  Id   Host:Port         V-Nodes       Zone       Progress\n"));
        for row in &self.0 {
            let percent = if row.total == 0 { 0.0 } else { row.done as f64 / row.total as f64 * 100.0 };
            put(
                out,
                format_args!(
                    "{:4}   {:<20}{:5}{:11}{percent:11.1}%\n",
                    row.id,
                    row.node.to_string(),
                    row.node.vnodes,
                    row.node.zone
                ),
            );
        }
    }

    fn raw(&self, _: &Style, out: &mut Vec<u8>) {
        for row in &self.0 {
            let node = &row.node;
            put(out, format_args!("{} {node} {} {} {} {}\n", row.id, node.vnodes, node.zone, row.done, row.total));
        }
    }

    fn json(&self) -> Option<Value> {
        let rows = self.0.iter().map(|row| {
            let node = &row.node;
            json!({
                "id": row.id, "address": node.ip.to_string(), "port": node.port, "vnodes": node.vnodes,
                "zone": node.zone, "done_objects": row.done, "total_objects": row.total,
            })
        });
        Some(rows.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::recovery::Recovering;
    use crate::order::Order;
    use crate::requests::Node;
    use jiff::tz::TimeZone;
    use std::net::IpAddr;

    fn node(ip: &str, port: u16) -> Node {
        let ip: IpAddr = ip.parse().expect("an address");
        Node { address: [0; 16], port, ip, vnodes: 128, zone: 16_777_343 }
    }

    fn both(data: &impl Show) -> (String, String) {
        let style = Style { zone: TimeZone::UTC, is_terminal: false };
        let (mut table, mut raw) = (Vec::new(), Vec::new());
        data.table(&style, &mut table);
        data.raw(&style, &mut raw);
        (String::from_utf8(table).expect("text"), String::from_utf8(raw).expect("text"))
    }

    fn known(id: &str, address: &str, state: NodeState, zone: Option<u32>) -> OrderNode {
        OrderNode {
            id: id.to_owned(),
            address: address.to_owned(),
            state,
            fingerprint: "01020304-05060708-090a0b0c-0d0e0f10".to_owned(),
            zone,
            votes: state == NodeState::Member,
            alive: Some(true),
        }
    }

    fn raft(nodes: Vec<OrderNode>) -> Order {
        Order { driver: "raft".to_owned(), nodes, ..Order::default() }
    }

    const TABLE: &str = "  Id   Host:Port         V-Nodes       Zone\n   0   127.0.0.1:7800      \t128   16777343\n   \
        1   ::1:7803            \t128   16777343\n";

    #[test]
    fn node_lists_are_those_of_the_old_tool() {
        let rows = || vec![node("127.0.0.1", 7800), node("::1", 7803)];
        let (table, raw) = both(&Nodes { rows: rows(), order: Order::default() });
        assert_eq!(table, TABLE);
        assert_eq!(raw, "0 127.0.0.1:7800 128 16777343\n1 ::1:7803 128 16777343\n");
        let members = vec![known("00000000000000a1", "127.0.0.1:7810", NodeState::Member, None)];
        assert_eq!(both(&Nodes { rows: rows(), order: raft(members) }).0, TABLE);
    }

    #[test]
    fn those_who_ask_are_listed_below_with_what_to_do() {
        let rows = vec![node("127.0.0.1", 7800), node("::1", 7803)];
        let asking = known("00000000000000b2", "10.0.0.4:7010,[fd00::4]:7010", NodeState::Asking, None);
        let (table, raw) = both(&Nodes { rows, order: raft(vec![asking]) });
        let below = "\nasking: dog node admit ID\n  Id                Host:Port             Fingerprint\n  \
            00000000000000b2  10.0.0.4:7010         01020304-05060708-090a0b0c-0d0e0f10\n";
        assert_eq!(table, format!("{TABLE}{below}"));
        assert_eq!(raw.lines().count(), 2, "scripts see the members only");
        let acquainted = known("00000000000000c3", "10.0.0.5:7010", NodeState::Acquainted, Some(1));
        let (table, _) = both(&Nodes { rows: Vec::new(), order: raft(vec![acquainted]) });
        assert!(table.contains("\n\nacquainted: dog cluster format\n  Id  "), "{table}");
    }

    #[test]
    fn json_joins_what_the_driver_knows_to_the_rows() {
        let rows = vec![node("127.0.0.1", 7800), node("127.0.0.1", 7803)];
        let order = raft(vec![
            known("00000000000000a1", "127.0.0.1:7810", NodeState::Member, Some(16_777_343)),
            known("00000000000000a2", "127.0.0.1:7813", NodeState::Member, Some(16_777_343)),
            known("00000000000000b2", "10.0.0.4:7010", NodeState::Asking, None),
        ]);
        let json = Nodes { rows, order }.json().expect("JSON");
        assert_eq!(
            json[1],
            json!({
                "id": "00000000000000a2", "position": 1, "state": "member", "address": "127.0.0.1", "port": 7803,
                "vnodes": 128, "zone": 16_777_343, "node_addresses": ["127.0.0.1:7813"],
                "fingerprint": "01020304-05060708-090a0b0c-0d0e0f10", "votes": true, "alive": true,
            })
        );
        assert_eq!((&json[2]["state"], &json[2]["address"]), (&json!("asking"), &json!("10.0.0.4")));
        assert_eq!((&json[2]["position"], &json[2]["port"]), (&Value::Null, &Value::Null));
        assert_eq!(json.as_array().map(Vec::len), Some(3));
        let unknown = Nodes { rows: vec![node("10.0.0.9", 7000)], order: Order::default() }.json().expect("JSON");
        assert_eq!((&unknown[0]["id"], &unknown[0]["state"]), (&Value::Null, &json!("member")));
    }

    #[test]
    fn space_is_added_up() {
        let space = |id, size_bytes, used_bytes| Space { id, size_bytes, used_bytes };
        let spaces = Spaces { nodes: vec![space(0, 10 << 30, 1 << 30), space(2, 0, 0)], virtual_bytes: 20 << 30 };
        let (table, raw) = both(&spaces);
        assert_eq!(
            table,
            "Id\tSize\tUsed\tAvail\tUse%\n 0\t10 GB\t1.0 GB\t9.0 GB\t 10%\n 2\t0.0 MB\t0.0 MB\t0.0 MB\t  0%\n\
             Total\t10 GB\t1.0 GB\t9.0 GB\t 10%\n\nTotal virtual image size\t20 GB\n"
        );
        assert_eq!(
            raw,
            "0 10737418240 1073741824 9663676416 10%\n2 0 0 0 0%\n\
             Total 10737418240 1073741824 9663676416 10% 21474836480\n"
        );
    }

    #[test]
    fn an_idle_cluster_has_two_header_lines() {
        let (table, raw) = both(&Recoveries(Vec::new()));
        let header = "Nodes In Recovery:\n  Id   Host:Port         V-Nodes       Zone       Progress\n";
        assert_eq!((table.as_str(), raw.as_str()), (header, ""));
        let busy = Recovering { id: 1, node: node("127.0.0.1", 7801), done: 1, total: 8 };
        let (table, raw) = both(&Recoveries(vec![busy]));
        assert_eq!(table, format!("{header}   1   127.0.0.1:7801        128   16777343       12.5%\n"));
        assert_eq!(raw, "1 127.0.0.1:7801 128 16777343 1 8\n");
    }
}
