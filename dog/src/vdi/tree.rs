//! `dog vdi tree`
//!
//! A VDI is below the one it was made from if that has the same name; everything else begins a tree of its own.
//! Always holds: nobody is below two.

use std::collections::BTreeMap;

use qemu_proto::oid::VdiId;

use super::catalog::{self, Depth};
use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Target};
use crate::report::{Form, Report};
use crate::requests::Header;

/// A VDI in its tree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct TreeNode {
    /// Shown at the root only.
    pub name: Vec<u8>,
    /// Its id.
    pub vdi: VdiId,
    /// Its tag.
    pub tag: Vec<u8>,
    /// When the snapshot was taken, in Unix seconds; `None` for the working VDI.
    pub snapshot_taken: Option<i64>,
    /// Positions in [`Tree::nodes`].
    pub children: Vec<usize>,
}

/// All trees.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Tree {
    /// Every VDI.
    pub nodes: Vec<TreeNode>,
    /// Positions of those that are below nobody.
    pub roots: Vec<usize>,
}

/// Runs the command.
pub fn run(typed: &args::Tree, target: Target) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let catalog = catalog::read(&mut sheep, None, Depth::Headers)?;
    for failure in &catalog.failures {
        eprintln!("{failure}");
    }
    let headers: Vec<&Header> = catalog.volumes.iter().map(|volume| &volume.header).collect();
    let exit = if catalog.failures.is_empty() { Exit::Success } else { Exit::Failure };
    Ok(Report::new(Form::of(false, typed.json), tree(&headers)).exits(exit))
}

fn tree(headers: &[&Header]) -> Tree {
    let positions: BTreeMap<_, _> = headers.iter().zip(0..).map(|(header, at)| (header.vdi, at)).collect();
    let mut tree = Tree::default();
    for header in headers {
        let snapshot_taken = header.is_snapshot().then(|| meaning::seconds(header.snapshot_time));
        tree.nodes.push(TreeNode {
            name: header.name.clone(),
            vdi: header.vdi,
            tag: header.tag.clone(),
            snapshot_taken,
            children: Vec::new(),
        });
    }
    for (at, header) in headers.iter().enumerate() {
        let parent = header.parent.and_then(|parent| positions.get(&parent).copied());
        match parent.filter(|&parent: &usize| headers[parent].name == header.name && parent != at) {
            Some(parent) => tree.nodes[parent].children.push(at),
            None => tree.roots.push(at),
        }
    }
    tree
}

#[cfg(test)]
mod tests {
    use super::*;
    use qemu_proto::oid::VdiId;

    #[test]
    fn a_clone_begins_its_own_tree() {
        let header = |vdi: u32, parent: u32, name: &str, snapshot_time: u64| Header {
            vdi: VdiId::from_low_bits(vdi),
            parent: VdiId::new(parent).filter(|parent| parent.get() != 0),
            name: name.into(),
            snapshot_time: snapshot_time << 32,
            ..Header::default()
        };
        let headers = [header(1, 0, "a", 9), header(2, 1, "a", 0), header(3, 1, "b", 0), header(4, 99, "c", 0)];
        let tree = tree(&headers.iter().collect::<Vec<_>>());
        assert_eq!(tree.roots, [0, 2, 3]);
        assert_eq!(tree.nodes[0].children, [1]);
        assert_eq!((tree.nodes[0].snapshot_taken, tree.nodes[1].snapshot_taken), (Some(9), None));
    }
}
