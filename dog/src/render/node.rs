//! The tables of `dog node`.

use serde_json::{Value, json};
use sheep_core::units::HumanSize;

use super::text::put;
use crate::node::info::{Space, Spaces};
use crate::node::list::Members;
use crate::node::recovery::Recoveries;
use crate::report::{Show, Style};

impl Show for Members {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        put(out, format_args!("  Id   Host:Port         V-Nodes       Zone\n"));
        for (id, node) in self.0.iter().enumerate() {
            put(out, format_args!("{id:4}   {:<20}\t{:2}{:11}\n", node.to_string(), node.vnodes, node.zone));
        }
    }

    fn raw(&self, _: &Style, out: &mut Vec<u8>) {
        for (id, node) in self.0.iter().enumerate() {
            put(out, format_args!("{id} {node} {} {}\n", node.vnodes, node.zone));
        }
    }

    fn json(&self) -> Option<Value> {
        let nodes = self.0.iter().enumerate();
        let rows = nodes.map(|(id, node)| {
            json!({"id": id, "address": node.ip.to_string(), "port": node.port, "vnodes": node.vnodes, "zone": node.zone})
        });
        Some(rows.collect())
    }
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

    #[test]
    fn node_lists_are_those_of_the_old_tool() {
        let (table, raw) = both(&Members(vec![node("127.0.0.1", 7800), node("::1", 7803)]));
        assert_eq!(
            table,
            "  Id   Host:Port         V-Nodes       Zone\n   0   127.0.0.1:7800      \t128   16777343\n   1   ::1:7803            \t128   16777343\n"
        );
        assert_eq!(raw, "0 127.0.0.1:7800 128 16777343\n1 ::1:7803 128 16777343\n");
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
