//! What `dog img info` and `dog img snapshot -l` print: the layout of `qemu-img`.

use serde_json::{Value, json};

use super::text::{SECONDS, local_time, put};
use crate::img::info::{ImageInfo, SnapshotList, SnapshotRow};
use crate::meaning::shown;
use crate::report::{Show, Style};

const NSEC_PER_SEC: u64 = 1_000_000_000;

impl Show for SnapshotList {
    fn table(&self, style: &Style, out: &mut Vec<u8>) {
        if self.0.is_empty() {
            return;
        }
        put(out, format_args!("Snapshot list:\n"));
        let heads = ["ID", "TAG", "VM SIZE", "DATE", "VM CLOCK", "ICOUNT"];
        put(
            out,
            format_args!(
                "{:<10}{:<17}{:>8}{:>20}{:>13}{:>11}\n",
                heads[0], heads[1], heads[2], heads[3], heads[4], heads[5]
            ),
        );
        for row in &self.0 {
            put(
                out,
                format_args!(
                    "{:<9} {:<16} {:>8}{:>20}{:>13}{:>11}\n",
                    row.id,
                    shown(&row.tag),
                    size(row.vm_state_bytes),
                    local_time(row.taken.0.cast_signed(), SECONDS, &style.zone),
                    clock(row.vm_clock_nsec),
                    0
                ),
            );
        }
    }

    fn json(&self) -> Option<Value> {
        Some(self.0.iter().map(row_json).collect())
    }
}

impl Show for ImageInfo {
    fn table(&self, style: &Style, out: &mut Vec<u8>) {
        put(
            out,
            format_args!(
                "image: {}\nfile format: raw\nvirtual size: {} ({} bytes)\ndisk size: {}\n",
                self.image,
                size(self.size_bytes),
                self.size_bytes,
                size(self.disk_bytes)
            ),
        );
        self.snapshots.table(style, out);
    }

    fn json(&self) -> Option<Value> {
        let mut info = json!({
            "virtual-size": self.size_bytes,
            "filename": self.image,
            "format": "raw",
            "actual-size": self.disk_bytes,
            "dirty-flag": false,
        });
        if !self.snapshots.0.is_empty() {
            info["snapshots"] = self.snapshots.0.iter().map(row_json).collect();
        }
        Some(if self.is_chain { json!([info]) } else { info })
    }
}

fn row_json(row: &SnapshotRow) -> Value {
    json!({
        "id": row.id.to_string(),
        "name": shown(&row.tag),
        "vm-state-size": row.vm_state_bytes,
        "date-sec": row.taken.0,
        "date-nsec": row.taken.1,
        "vm-clock-sec": row.vm_clock_nsec / NSEC_PER_SEC,
        "vm-clock-nsec": row.vm_clock_nsec % NSEC_PER_SEC,
        "icount": 0,
    })
}

/// Hours, minutes, seconds and milliseconds.
fn clock(nsec: u64) -> String {
    let seconds = nsec / NSEC_PER_SEC;
    let milliseconds = nsec / 1_000_000 % 1000;
    format!("{:02}:{:02}:{:02}.{milliseconds:03}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

/// Three digits and a unit; the next unit begins at 1000 of the one before.
fn size(bytes: u64) -> String {
    const UNITS: [&str; 7] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    let digits = match value {
        100.0.. => 0,
        10.0.. => 1,
        1.0.. => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    let text = if digits > 0 { text.trim_end_matches('0').trim_end_matches('.') } else { text.as_str() };
    format!("{} {}", if text.is_empty() { "0" } else { text }, UNITS[unit])
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;

    #[test]
    fn sizes_have_three_digits() {
        for (bytes, expected) in [
            (0, "0 B"),
            (512, "512 B"),
            (999, "999 B"),
            (1000, "0.977 KiB"),
            (1536, "1.5 KiB"),
            (208_896, "204 KiB"),
            (10 << 20, "10 MiB"),
            (1 << 30, "1 GiB"),
            (100 << 30, "100 GiB"),
            (1 << 40, "1 TiB"),
        ] {
            assert_eq!(size(bytes), expected);
        }
    }

    #[test]
    fn the_layout_is_that_of_qemu_img() {
        let row = SnapshotRow {
            id: 1,
            tag: b"tag1".to_vec(),
            taken: (1_795_263_648, 425_564_000),
            vm_clock_nsec: 3_723_004_000_000,
            ..SnapshotRow::default()
        };
        let info = ImageInfo {
            image: "sheepdog:d".to_owned(),
            size_bytes: 1 << 30,
            disk_bytes: 4 << 20,
            snapshots: SnapshotList(vec![row]),
            is_chain: true,
        };
        let mut out = Vec::new();
        info.table(&Style { zone: TimeZone::UTC, is_terminal: false }, &mut out);
        let expected = "image: sheepdog:d\nfile format: raw\nvirtual size: 1 GiB (1073741824 bytes)\ndisk size: 4 MiB\n\
            Snapshot list:\n\
            ID        TAG               VM SIZE                DATE     VM CLOCK     ICOUNT\n\
            1         tag1                  0 B 2026-11-21 12:20:48 01:02:03.004          0\n";
        assert_eq!(String::from_utf8_lossy(&out), expected);
        let json = info.json().expect("info has JSON");
        assert_eq!(json[0]["snapshots"][0]["vm-clock-nsec"], 4_000_000);
        assert_eq!(json[0]["snapshots"][0]["id"], "1");
        assert_eq!(json[0]["virtual-size"], 1_u64 << 30);
    }
}
