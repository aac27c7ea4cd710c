//! The text of `dog vdi track`.

use qemu_proto::oid::ObjectKind;
use serde_json::{Value, json};

use super::text::put;
use crate::report::{Show, Style};
use crate::vdi::track::Track;

/// As wide as the old tool drew it.
const LINE: &str = "---------------------------------------------------";

impl Show for Track {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        let (oid, vdi, count) = (self.oid, self.vdi, self.node_count);
        match oid.kind() {
            Some(ObjectKind::Inode) => put(out, format_args!("Tracking the inode object 0x{vdi} with {count} nodes\n")),
            _ => put(
                out,
                format_args!("Tracking the object {oid} (vid 0x{vdi} idx {}) with {count} nodes\n", oid.index()),
            ),
        }
        for (epoch, nodes) in &self.epochs {
            put(out, format_args!("\nobj {oid} locations at epoch {epoch}, copies = {}\n{LINE}\n", self.copies));
            for node in nodes {
                put(out, format_args!("{node}\n"));
            }
        }
    }

    fn json(&self) -> Option<Value> {
        let epochs = self.epochs.iter().map(|(epoch, nodes)| {
            let nodes: Vec<String> = nodes.iter().map(ToString::to_string).collect();
            json!({"epoch": epoch, "nodes": nodes})
        });
        let epochs: Vec<Value> = epochs.collect();
        Some(json!({
            "vdi_id": self.vdi.to_string(), "object_id": self.oid.to_string(), "copies": self.copies, "epochs": epochs,
        }))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::requests::Node;
    use jiff::tz::TimeZone;
    use qemu_proto::oid::{Oid, VdiId};
    use std::net::Ipv4Addr;

    fn shown(track: &Track) -> String {
        let mut out = Vec::new();
        track.table(&Style { zone: TimeZone::UTC, is_terminal: false }, &mut out);
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn epochs_with_too_few_nodes_are_shown_once() {
        let vdi = VdiId::from_low_bits(0x7c_2b25);
        let node = |port| Node { address: [0; 16], port, ip: Ipv4Addr::LOCALHOST.into(), vnodes: 0, zone: 1 };
        let epochs = vec![(2, vec![node(7801)]), (1, vec![node(7801), node(7800)])];
        let mut track = Track { vdi, oid: Oid::inode(vdi), copies: "2".to_owned(), node_count: 1, epochs };
        assert_eq!(
            shown(&track),
            format!(
                "Tracking the inode object 0x7c2b25 with 1 nodes\n\n\
                 obj 807c2b2500000000 locations at epoch 2, copies = 2\n{LINE}\n127.0.0.1:7801\n\n\
                 obj 807c2b2500000000 locations at epoch 1, copies = 2\n{LINE}\n127.0.0.1:7801\n127.0.0.1:7800\n"
            )
        );
        assert_eq!(LINE.len(), 51);
        assert_eq!(track.json().expect("JSON")["epochs"][1]["nodes"][1], "127.0.0.1:7800");
        track.oid = Oid::data(vdi, 12);
        assert!(shown(&track).starts_with("Tracking the object 007c2b250000000c (vid 0x7c2b25 idx 12) with 1 nodes\n"));
    }
}
