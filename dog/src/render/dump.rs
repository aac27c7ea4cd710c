//! The text of `dog vdi object dump-inode`: one `key: value` on each line, then the owner of each object that is there.

use serde_json::{Value, json};

use super::text::put;
use crate::meaning::shown;
use crate::report::{Show, Style};
use crate::vdi::dump::Dump;

impl Dump {
    /// The fields in the order of the inode.
    fn fields(&self) -> Vec<(&'static str, Value)> {
        let header = &self.0.header;
        vec![
            ("name", json!(shown(&header.name))),
            ("tag", json!(shown(&header.tag))),
            ("create_time", json!(header.create_time)),
            ("snap_ctime", json!(header.snapshot_time)),
            ("vm_clock_nsec", json!(header.vm_clock_nsec)),
            ("vdi_size", json!(header.size_bytes)),
            ("vm_state_size", json!(header.vm_state_bytes)),
            ("copy_policy", json!(header.copy_policy)),
            ("nr_copies", json!(header.copies)),
            ("block_size_shift", json!(header.shift)),
            ("snap_id", json!(header.snapshot_id)),
            ("vdi_id", json!(header.vdi.to_string())),
            ("parent_vdi_id", json!(header.parent.map(|parent| parent.to_string()))),
        ]
    }
}

impl Show for Dump {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        for (name, value) in self.fields() {
            match value {
                Value::String(text) => put(out, format_args!("{name}: {text}\n")),
                Value::Null => put(out, format_args!("{name}: 0\n")),
                other => put(out, format_args!("{name}: {other}\n")),
            }
        }
        put(out, format_args!("data_vdi_id:\n"));
        for (index, oid) in self.0.objects() {
            put(out, format_args!("{index:08} {:>8}\n", oid.vid().to_string()));
        }
    }

    fn json(&self) -> Option<Value> {
        let mut fields: serde_json::Map<String, Value> =
            self.fields().into_iter().map(|(name, value)| (name.to_owned(), value)).collect();
        let objects = self.0.objects().map(|(index, oid)| json!({"index": index, "vdi_id": oid.vid().to_string()}));
        fields.insert("objects".to_owned(), objects.collect());
        Some(fields.into())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::requests::Header;
    use crate::vdi::volume::Volume;
    use jiff::tz::TimeZone;
    use qemu_proto::oid::VdiId;

    #[test]
    fn an_inode_is_told_field_by_field() {
        let vdi = VdiId::from_low_bits(0x7c_2b26);
        let header = Header { name: b"test".to_vec(), vdi, copies: 3, shift: 22, ..Header::default() };
        let dump = Dump(Volume { header, map: vec![0, 0x7c_2b25] });
        let mut text = Vec::new();
        dump.table(&Style { zone: TimeZone::UTC, is_terminal: false }, &mut text);
        let text = String::from_utf8(text).expect("text");
        assert!(
            text.starts_with("name: test\ntag: \n") && text.contains("\nvdi_id: 7c2b26\nparent_vdi_id: 0\n"),
            "{text}"
        );
        assert!(text.ends_with("data_vdi_id:\n00000001   7c2b25\n"), "{text}");
        let json = dump.json().expect("JSON");
        assert_eq!((&json["parent_vdi_id"], &json["objects"][0]["index"]), (&Value::Null, &json!(1)));
    }
}
