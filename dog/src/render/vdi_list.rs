//! The table of `dog vdi list`.

use serde_json::{Value, json};
use sheep_core::units::HumanSize;

use super::text::{MINUTES, local_time, put, put_left, put_right};
use crate::meaning::shown;
use crate::report::{Show, Style};
use crate::vdi::list::{HEADER, Kind, Row, VdiList};

impl Show for VdiList {
    fn table(&self, style: &Style, out: &mut Vec<u8>) {
        put(out, format_args!("{HEADER}"));
        for row in &self.0 {
            let flag = match row.kind {
                Kind::Snapshot => 's',
                Kind::Clone => 'c',
                Kind::Working => ' ',
            };
            put(out, format_args!("{flag} "));
            put_left(out, &row.name, 8);
            let size = |bytes| HumanSize(bytes).to_string();
            put(
                out,
                format_args!(
                    " {:5} {:>7} {:>7} {:>7} {}  {:>7} {:>6} ",
                    row.snapshot_id,
                    size(row.size_bytes),
                    size(row.used_bytes),
                    size(row.shared_bytes),
                    local_time(row.created, MINUTES, &style.zone),
                    row.vdi.to_string(),
                    row.copies,
                ),
            );
            put_right(out, &row.tag, 13);
            put(out, format_args!(" {:3}\n", row.shift));
        }
    }

    fn raw(&self, _: &Style, out: &mut Vec<u8>) {
        for row in &self.0 {
            let flag = match row.kind {
                Kind::Snapshot => 's',
                Kind::Clone => 'c',
                Kind::Working => '=',
            };
            put(out, format_args!("{flag} "));
            for &byte in &row.name {
                if matches!(byte, b' ' | b'\\') {
                    out.push(b'\\');
                }
                out.push(byte);
            }
            put(
                out,
                format_args!(
                    " {} {} {} {} {} {} {} ",
                    row.snapshot_id, row.size_bytes, row.used_bytes, row.shared_bytes, row.created, row.vdi, row.copies
                ),
            );
            out.extend_from_slice(&row.tag);
            put(out, format_args!(" {}\n", row.shift));
        }
    }

    fn json(&self) -> Option<Value> {
        Some(Value::Array(self.0.iter().map(row_json).collect()))
    }
}

fn row_json(row: &Row) -> Value {
    let kind = match row.kind {
        Kind::Working => "working",
        Kind::Clone => "clone",
        Kind::Snapshot => "snapshot",
    };
    let mut json = json!({
        "kind": kind,
        "name": shown(&row.name),
        "snapshot_id": row.snapshot_id,
        "size_bytes": row.size_bytes,
        "used_bytes": row.used_bytes,
        "shared_bytes": row.shared_bytes,
        "created_seconds": row.created,
        "vdi_id": row.vdi.to_string(),
        "copies": row.copies,
        "tag": shown(&row.tag),
        "block_size_shift": row.shift,
    });
    if let Some(limits) = &row.limits {
        json["limits"] = limits.clone();
    }
    json
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;
    use qemu_proto::oid::VdiId;

    fn list() -> VdiList {
        let working = Row {
            kind: Kind::Working,
            name: b"test".to_vec(),
            snapshot_id: 0,
            size_bytes: 40 << 20,
            used_bytes: 0,
            shared_bytes: 12 << 20,
            created: 1_795_237_889,
            vdi: VdiId::from_low_bits(0x7c_2b26),
            copies: "3".to_owned(),
            tag: Vec::new(),
            shift: 22,
            limits: None,
        };
        let snapshot = Row {
            kind: Kind::Snapshot,
            snapshot_id: 1,
            used_bytes: 12 << 20,
            shared_bytes: 0,
            vdi: VdiId::from_low_bits(0x7c_2b25),
            tag: b"snap1".to_vec(),
            ..working.clone()
        };
        VdiList(vec![snapshot, working])
    }

    #[test]
    fn the_table_is_that_of_the_old_tool() {
        let mut out = Vec::new();
        list().table(&Style { zone: TimeZone::UTC, is_terminal: false }, &mut out);
        let expected = "  Name        Id    Size    Used  Shared    Creation time   VDI id  Copies  Tag   Block Size Shift\n\
            s test         1   40 MB   12 MB  0.0 MB 2026-11-21 05:11   7c2b25      3         snap1  22\n  \
            test         0   40 MB  0.0 MB   12 MB 2026-11-21 05:11   7c2b26      3                22\n";
        assert_eq!(String::from_utf8_lossy(&out), expected);
    }

    #[test]
    fn raw_lines_have_ten_fields_and_escaped_names() {
        let mut list = list();
        list.0[1].name = br"a b\c".to_vec();
        list.0[1].kind = Kind::Clone;
        let mut out = Vec::new();
        list.raw(&Style { zone: TimeZone::UTC, is_terminal: false }, &mut out);
        let expected = "s test 1 41943040 12582912 0 1795237889 7c2b25 3 snap1 22\n\
            c a\\ b\\\\c 0 41943040 0 12582912 1795237889 7c2b26 3  22\n";
        assert_eq!(String::from_utf8_lossy(&out), expected);
    }

    #[test]
    fn json_has_the_same_values() {
        let json = list().json().expect("lists have JSON");
        assert_eq!(json[0]["tag"], "snap1");
        assert_eq!(json[0]["used_bytes"], 12_582_912);
        assert_eq!(json[1]["kind"], "working");
        assert_eq!(json[1]["vdi_id"], "7c2b26");
    }
}
