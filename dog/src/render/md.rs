//! The tables of `dog node md info`.

use qemu_proto::stat::DiskEntry;
use serde_json::{Value, json};
use sheep_core::units::HumanSize;

use super::text::put;
use crate::meaning::shown;
use crate::node::md::{Disks, HEADER};
use crate::report::{Show, Style};

fn size_of(disk: &DiskEntry) -> u64 {
    disk.used.saturating_add(disk.free)
}

/// Percent used, cut to a whole number; 0 of nothing.
fn percent_of(disk: &DiskEntry) -> u64 {
    (u128::from(disk.used) * 100 / u128::from(size_of(disk)).max(1)) as u64
}

impl Show for Disks {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        put(out, format_args!("{HEADER}"));
        for node in &self.0 {
            if let Some(id) = node.id {
                put(out, format_args!("Node {id}:\n"));
            }
            for disk in &node.disks {
                let (size, used, free) = (HumanSize(size_of(disk)), HumanSize(disk.used), HumanSize(disk.free));
                let (id, percent) = (disk.index, percent_of(disk));
                put(out, format_args!("{id:2}\t{size}\t{used}\t{free}\t{percent:3}%\t{}\n", shown(&disk.path)));
            }
        }
    }

    fn raw(&self, _: &Style, out: &mut Vec<u8>) {
        for node in &self.0 {
            for disk in &node.disks {
                let (size, percent, path) = (size_of(disk), percent_of(disk), shown(&disk.path));
                let (id, used, free) = (disk.index, disk.used, disk.free);
                put(out, format_args!("{} {id} {size} {used} {free} {percent}% {path}\n", node.node));
            }
        }
    }

    fn json(&self) -> Option<Value> {
        let disk = |disk: &DiskEntry| {
            json!({
                "id": disk.index, "path": shown(&disk.path), "size_bytes": size_of(disk), "used_bytes": disk.used,
                "free_bytes": disk.free,
            })
        };
        let nodes = self.0.iter().map(|node| {
            json!({
                "position": node.id, "node": node.node, "disks": node.disks.iter().map(disk).collect::<Vec<_>>(),
            })
        });
        Some(nodes.collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::node::md::NodeDisks;
    use jiff::tz::TimeZone;

    #[test]
    fn disks_are_listed_as_the_old_tool_listed_them() {
        let disk = DiskEntry { index: 0, free: 9 << 30, used: 1 << 30, path: b"/data/obj".to_vec() };
        let node = |id| NodeDisks { id, node: "127.0.0.1:7800".to_owned(), disks: vec![disk.clone()] };
        let style = Style { zone: TimeZone::UTC, is_terminal: false };
        let shown = |disks: &Disks| {
            let (mut table, mut raw) = (Vec::new(), Vec::new());
            disks.table(&style, &mut table);
            disks.raw(&style, &mut raw);
            (String::from_utf8(table).expect("text"), String::from_utf8(raw).expect("text"))
        };
        let (table, raw) = shown(&Disks(vec![node(None)]));
        assert_eq!(table, "Id\tSize\tUsed\tAvail\tUse%\tPath\n 0\t10 GB\t1.0 GB\t9.0 GB\t 10%\t/data/obj\n");
        assert_eq!(raw, "127.0.0.1:7800 0 10737418240 1073741824 9663676416 10% /data/obj\n");
        let (table, _) = shown(&Disks(vec![node(Some(0)), node(Some(1))]));
        assert_eq!(table.matches("Node ").count(), 2, "{table}");
    }
}
