//! The table of `dog vdi lock list`.

use serde_json::{Value, json};

use super::text::{put, put_left};
use crate::meaning::shown;
use crate::report::{Show, Style};
use crate::vdi::lock::LockList;

impl Show for LockList {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        put(out, format_args!("  Name         Id  VDI id  Tag            Owner node(s)\n"));
        for locked in &self.0 {
            let header = &locked.header;
            let is_clone = header.snapshot_id == 1 && header.parent.is_some();
            put(out, format_args!("{} ", if is_clone { 'c' } else { ' ' }));
            put_left(out, &header.name, 8);
            // A snapshot is never locked: number and tag stay those of a working VDI.
            put(out, format_args!("  {:5}  {:>6}  {:<13} ", 0, header.vdi.to_string(), ""));
            let (ip, port) = locked.owner;
            let family = if ip.is_ipv4() { "IPv4" } else { "IPv6" };
            put(out, format_args!(" {family} ip:{ip} port:{port}\n"));
        }
    }

    fn json(&self) -> Option<Value> {
        let rows = self.0.iter().map(|locked| {
            let (ip, port) = locked.owner;
            json!({
                "name": shown(&locked.header.name),
                "vdi_id": locked.header.vdi.to_string(),
                "owners": [{"address": ip.to_string(), "port": port}],
            })
        });
        Some(Value::Array(rows.collect()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::requests::Header;
    use crate::vdi::lock::Locked;
    use jiff::tz::TimeZone;
    use qemu_proto::oid::VdiId;

    #[test]
    fn a_row_is_as_scripts_know_it() {
        let header = Header {
            name: b"test".to_vec(),
            vdi: VdiId::from_low_bits(0x7c_2b26),
            snapshot_id: 2,
            ..Header::default()
        };
        let owner = ("127.0.0.1".parse().expect("an address"), 7800);
        let list = LockList(vec![Locked { header, owner }]);
        let mut out = Vec::new();
        list.table(&Style { zone: TimeZone::UTC, is_terminal: false }, &mut out);
        let expected = "  Name         Id  VDI id  Tag            Owner node(s)\n  \
            test          0  7c2b26                 IPv4 ip:127.0.0.1 port:7800\n";
        assert_eq!(String::from_utf8_lossy(&out), expected);
        let json = list.json().expect("it has a form for programs");
        assert_eq!(json[0]["owners"][0]["port"], 7800);
    }
}
