//! `dog vdi graph`
//!
//! Every VDI and what it was made from, clones below the snapshot they grew from.

use qemu_proto::oid::VdiId;

use super::catalog::{self, Depth};
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Target};
use crate::report::{Form, Report};
use crate::requests::Header;

/// A VDI in the graph.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct GraphNode {
    /// Its id.
    pub vdi: VdiId,
    /// What it was made from; may be deleted, and then is no node.
    pub parent: Option<VdiId>,
    /// Its name.
    pub name: Vec<u8>,
    /// Of a snapshot: its tag, or its number if it has none. Empty for the working VDI.
    pub tag: Vec<u8>,
    /// Bytes that a guest sees.
    pub size_bytes: u64,
    /// When the snapshot was taken, or the working VDI made, in Unix seconds.
    pub moment: i64,
    /// Whether it can be written.
    pub is_working: bool,
}

/// All VDIs, in the order of their ids.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Graph(pub Vec<GraphNode>);

/// Runs the command.
pub fn run(target: Target) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let catalog = catalog::read(&mut sheep, None, Depth::Headers)?;
    for failure in &catalog.failures {
        eprintln!("{failure}");
    }
    let graph = Graph(catalog.volumes.iter().map(|volume| node(&volume.header)).collect());
    let exit = if catalog.failures.is_empty() { Exit::Success } else { Exit::Failure };
    Ok(Report::new(Form::Table, graph).exits(exit))
}

fn node(header: &Header) -> GraphNode {
    let is_snapshot = header.is_snapshot();
    let tag = match (is_snapshot, header.tag.is_empty()) {
        (false, _) => Vec::new(),
        (true, false) => header.tag.clone(),
        (true, true) => header.snapshot_id.to_string().into_bytes(),
    };
    GraphNode {
        vdi: header.vdi,
        parent: header.parent,
        name: header.name.clone(),
        tag,
        size_bytes: header.size_bytes,
        moment: meaning::seconds(if is_snapshot { header.snapshot_time } else { header.create_time }),
        is_working: !is_snapshot,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_snapshots_have_tags_and_a_moment_of_their_own() {
        let working = Header { tag: b"left over".to_vec(), create_time: 5 << 32, snapshot_id: 3, ..Header::default() };
        let tagged = Header { snapshot_time: 9 << 32, ..working.clone() };
        let bare = Header { tag: Vec::new(), ..tagged.clone() };
        let seen =
            [working, tagged, bare].map(|header| node(&header)).map(|node| (node.is_working, node.moment, node.tag));
        assert_eq!(seen, [(true, 5, Vec::new()), (false, 9, b"left over".to_vec()), (false, 9, b"3".to_vec())]);
    }
}
