//! The text of `dog vdi graph`, for Graphviz.
//!
//! Always holds: names and tags, whatever bytes they have, stay inside their quotation marks.

use sheep_core::units::HumanSize;

use super::text::{DATE, TIME, local_time, put};
use crate::meaning::shown;
use crate::report::{Show, Style};
use crate::vdi::graph::{Graph, GraphNode};

impl Show for Graph {
    fn table(&self, style: &Style, out: &mut Vec<u8>) {
        // A fixed width keeps the values of the labels below each other.
        put(out, format_args!("digraph vdis {{\n  node [shape = \"box\", fontname = \"Courier\"];\n\n"));
        for node in &self.0 {
            put_node(node, style, out);
        }
        put(out, format_args!("}}\n"));
    }
}

fn put_node(node: &GraphNode, style: &Style, out: &mut Vec<u8>) {
    let vdi = node.vdi;
    if let Some(parent) = node.parent {
        put(out, format_args!("  \"{parent}\" -> \"{vdi}\";\n"));
    }
    let name = quoted(&shown(&node.name));
    let size = HumanSize(node.size_bytes).to_string();
    let moment = |format| local_time(node.moment, format, &style.zone);
    put(
        out,
        format_args!(
            "  \"{vdi}\" [\n    group = \"{name}\",\n    label = \"Name: {name:>10}\\nTag:  {:>10}\\nSize: {size:>10}\\n\
             Date: {:>10}\\nTime: {:>10}\"",
            quoted(&shown(&node.tag)),
            moment(DATE),
            moment(TIME)
        ),
    );
    let color = if node.is_working { ",\n    color=\"red\"" } else { "" };
    put(out, format_args!("{color}\n  ];\n\n"));
}

/// A text between quotation marks: of what Graphviz reads there, marks and backslashes mean something; a control character
/// would break the line.
fn quoted(text: &str) -> String {
    let mut quoted = String::with_capacity(text.len());
    for character in text.chars() {
        match character {
            '"' | '\\' => quoted.extend(['\\', character]),
            control if control.is_control() => quoted.push('?'),
            other => quoted.push(other),
        }
    }
    quoted
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;
    use qemu_proto::oid::VdiId;

    fn drawn(nodes: Vec<GraphNode>) -> String {
        let mut out = Vec::new();
        Graph(nodes).table(&Style { zone: TimeZone::UTC, is_terminal: false }, &mut out);
        String::from_utf8(out).expect("text")
    }

    fn node(vdi: u32, parent: Option<u32>, name: &str, tag: &str) -> GraphNode {
        GraphNode {
            vdi: VdiId::from_low_bits(vdi),
            parent: parent.map(VdiId::from_low_bits),
            name: name.into(),
            tag: tag.into(),
            size_bytes: 40 << 20,
            moment: 1_795_237_889,
            is_working: tag.is_empty(),
        }
    }

    #[test]
    fn a_snapshot_leads_to_what_grew_from_it() {
        let text = drawn(vec![node(0x7c_2b25, None, "test", "snap1"), node(0x7c_2b26, Some(0x7c_2b25), "test", "")]);
        let expected = r#"digraph vdis {
  node [shape = "box", fontname = "Courier"];

  "7c2b25" [
    group = "test",
    label = "Name:       test\nTag:       snap1\nSize:      40 MB\nDate: 2026-11-21\nTime:   05:11:29"
  ];

  "7c2b25" -> "7c2b26";
  "7c2b26" [
    group = "test",
    label = "Name:       test\nTag:            \nSize:      40 MB\nDate: 2026-11-21\nTime:   05:11:29",
    color="red"
  ];

}
"#;
        assert_eq!(text, expected);
        assert_eq!(drawn(Vec::new()).lines().count(), 4);
    }

    #[test]
    fn no_name_ends_its_quotation() {
        let text = drawn(vec![node(1, None, "a\" \\n\n\x1b", "")]);
        assert!(text.contains(r#"group = "a\" \\n??","#), "{text}");
        assert!(text.contains(r#"Name:  a\" \\n??\nTag"#), "{text}");
    }
}
