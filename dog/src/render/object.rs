//! The texts of `dog vdi object`.

use serde_json::{Value, json};

use super::text::put;
use crate::report::{Show, Style};
use crate::requests::Node;
use crate::vdi::object::{Location, ObjectMap};

impl Show for Location {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        let count = self.node_count;
        match &self.data {
            None => put(out, format_args!("Looking for the inode object 0x{} with {count} nodes\n\n", self.vdi)),
            Some((index, copies)) => put(
                out,
                format_args!(
                    "Looking for the object {} (vid 0x{} idx {index}, {copies} copies) with {count} nodes\n\n",
                    self.oid, self.vdi
                ),
            ),
        }
        for (node, has) in &self.nodes {
            let verb = if *has { "has" } else { "doesn't have" };
            put(out, format_args!("{node} {verb} the object\n"));
        }
        put(out, format_args!("\nAccording to sheepdog algorithm, the object should be located at:"));
        for node in &self.holders {
            put(out, format_args!(" {node}"));
        }
        out.push(b'\n');
    }

    fn json(&self) -> Option<Value> {
        let names = |nodes: &[Node]| nodes.iter().map(ToString::to_string).collect::<Vec<_>>();
        let have: Vec<String> = self.nodes.iter().filter(|(_, has)| *has).map(|(node, _)| node.to_string()).collect();
        Some(json!({
            "vdi_id": self.vdi.to_string(), "object_id": self.oid.to_string(),
            "index": self.data.as_ref().map(|(index, _)| index), "node_count": self.node_count, "have_it": have,
            "should_have_it": names(&self.holders),
        }))
    }
}

impl Show for ObjectMap {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        put(out, format_args!("Index       VID\n"));
        for (index, vdi) in &self.0 {
            put(out, format_args!("{index:08} {:>8}\n", vdi.to_string()));
        }
    }

    fn json(&self) -> Option<Value> {
        Some(self.0.iter().map(|(index, vdi)| json!({"index": index, "vdi_id": vdi.to_string()})).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;
    use qemu_proto::oid::{Oid, VdiId};
    use std::net::Ipv4Addr;

    fn shown(data: &impl Show) -> String {
        let mut out = Vec::new();
        data.table(&Style { zone: TimeZone::UTC, is_terminal: false }, &mut out);
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn a_location_names_every_node() {
        let vdi = VdiId::from_low_bits(0x7c_2b25);
        let node = |port| Node { address: [0; 16], port, ip: Ipv4Addr::LOCALHOST.into(), vnodes: 1, zone: 1 };
        let nodes = vec![(node(7800), true), (node(7801), false)];
        let holders = vec![node(7801), node(7800)];
        let mut location = Location { vdi, oid: Oid::inode(vdi), data: None, node_count: 2, nodes, holders };
        assert_eq!(
            shown(&location),
            "Looking for the inode object 0x7c2b25 with 2 nodes\n\n127.0.0.1:7800 has the object\n\
             127.0.0.1:7801 doesn't have the object\n\n\
             According to sheepdog algorithm, the object should be located at: 127.0.0.1:7801 127.0.0.1:7800\n"
        );
        location.oid = Oid::data(vdi, 3);
        location.data = Some((3, "2".to_owned()));
        let first = "Looking for the object 007c2b2500000003 (vid 0x7c2b25 idx 3, 2 copies) with 2 nodes\n";
        assert!(shown(&location).starts_with(first));
    }

    #[test]
    fn a_map_lists_owners() {
        let map = ObjectMap(vec![(0, VdiId::from_low_bits(0x7c_2b25)), (12, VdiId::from_low_bits(1))]);
        assert_eq!(shown(&map), "Index       VID\n00000000   7c2b25\n00000012        1\n");
    }
}
