//! The drawing of `dog vdi tree`.
//!
//! Each node is printed where its parent ends. All but the first of several children begin a line of their own, under the
//! place where the first one branched off. No recursion: a volume may have more snapshots than the stack has room for.

use std::collections::BTreeMap;

use qemu_proto::oid::VdiId;
use serde_json::{Value, json};

use super::text::{MINUTES, local_time};
use crate::meaning::shown;
use crate::report::{Show, Style};
use crate::vdi::tree::{Tree, TreeNode};

const HERE: &str = "(you are here)";

/// A node that waits to be drawn.
struct Waiting {
    node: usize,
    /// What leads to it: `---`, `-+-`, or the start of a line.
    before: Vec<u8>,
    /// What further lines of its branch begin with, up to where the node itself begins.
    margin: Vec<u8>,
}

impl Show for Tree {
    fn table(&self, style: &Style, out: &mut Vec<u8>) {
        for &root in &self.roots {
            let name = &self.nodes[root].name;
            let mut before = name.clone();
            before.extend_from_slice(b"---");
            let margin = vec![b' '; before.len()];
            let mut waiting = vec![Waiting { node: root, before, margin }];
            while let Some(next) = waiting.pop() {
                out.extend_from_slice(&next.before);
                let node = &self.nodes[next.node];
                let width = put_node(node, style, out);
                if node.children.is_empty() {
                    out.push(b'\n');
                }
                let mut margin = next.margin;
                margin.extend(std::iter::repeat_n(b' ', width));
                waiting.extend(children(&node.children, &margin));
            }
        }
    }

    fn json(&self) -> Option<Value> {
        let parents = self.nodes.iter().flat_map(|node| node.children.iter().map(|child| (*child, node.vdi)));
        let parents: BTreeMap<usize, VdiId> = parents.collect();
        let row = |(at, node): (usize, &TreeNode)| {
            json!({
                "name": shown(&node.name), "vdi_id": node.vdi.to_string(), "tag": shown(&node.tag),
                "snapshot_taken": node.snapshot_taken, "parent_vdi_id": parents.get(&at).map(ToString::to_string),
            })
        };
        Some(self.nodes.iter().enumerate().map(row).collect())
    }
}

/// Prints a node and tells how many columns it took.
fn put_node(node: &TreeNode, style: &Style, out: &mut Vec<u8>) -> usize {
    let text = match node.snapshot_taken {
        Some(moment) => format!("[{}]", local_time(moment, MINUTES, &style.zone)),
        None => HERE.to_owned(),
    };
    let is_bold = node.snapshot_taken.is_none() && style.is_terminal;
    let shown = if is_bold { format!("\x1b[1m{text}\x1b[0m") } else { text.clone() };
    out.extend_from_slice(shown.as_bytes());
    text.len()
}

/// The children, last first. `margin` reaches to the end of their parent.
fn children(children: &[usize], margin: &[u8]) -> Vec<Waiting> {
    let joined = |margin: &[u8], with: &[u8]| [margin, with].concat();
    let last = children.len().saturating_sub(1);
    let waiting = children.iter().enumerate().map(|(at, &node)| match at {
        0 if last == 0 => Waiting { node, before: b"---".to_vec(), margin: joined(margin, b"   ") },
        0 => Waiting { node, before: b"-+-".to_vec(), margin: joined(margin, b" | ") },
        _ if at == last => Waiting { node, before: joined(margin, b" `-"), margin: joined(margin, b"   ") },
        _ => Waiting { node, before: joined(margin, b" |-"), margin: joined(margin, b" | ") },
    });
    waiting.rev().collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;

    fn node(snapshot_taken: Option<i64>, children: &[usize]) -> TreeNode {
        TreeNode {
            name: b"test".to_vec(),
            vdi: VdiId::from_low_bits(1),
            tag: Vec::new(),
            snapshot_taken,
            children: children.to_vec(),
        }
    }

    fn drawn(nodes: Vec<TreeNode>, is_terminal: bool) -> String {
        let mut out = Vec::new();
        Tree { nodes, roots: vec![0] }.table(&Style { zone: TimeZone::UTC, is_terminal }, &mut out);
        String::from_utf8(out).expect("text")
    }

    const TAKEN: Option<i64> = Some(1_795_237_929);

    #[test]
    fn a_chain_is_one_line() {
        let text = drawn(vec![node(TAKEN, &[1]), node(None, &[])], false);
        assert_eq!(text, "test---[2026-11-21 05:12]---(you are here)\n");
        assert_eq!(drawn(vec![node(None, &[])], true), "test---\x1b[1m(you are here)\x1b[0m\n");
    }

    #[test]
    fn branches_are_the_old_tools() {
        let text = drawn(vec![node(TAKEN, &[1, 2]), node(TAKEN, &[]), node(None, &[])], false);
        let expected = "test---[2026-11-21 05:12]-+-[2026-11-21 05:12]\n                          `-(you are here)\n";
        assert_eq!(text, expected);
    }

    #[test]
    fn branches_within_branches_keep_their_lines() {
        let nodes = vec![
            node(TAKEN, &[1, 4, 5]),
            node(TAKEN, &[2, 3]),
            node(TAKEN, &[]),
            node(TAKEN, &[]),
            node(TAKEN, &[]),
            node(None, &[]),
        ];
        let expected = "\
test---[2026-11-21 05:12]-+-[2026-11-21 05:12]-+-[2026-11-21 05:12]
                          |                    `-[2026-11-21 05:12]
                          |-[2026-11-21 05:12]
                          `-(you are here)
";
        assert_eq!(drawn(nodes, false), expected);
    }
}
