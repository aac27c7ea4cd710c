//! `dog node info`

use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;
use qemu_proto::response::ResponseBody;

use crate::args::Shape;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::Target;
use crate::reach::Reach;
use crate::report::{Form, Report};
use crate::requests::{self, Node};
use crate::vdi::catalog::{self, Depth};

/// The space of one node.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Space {
    /// Its position in the node list.
    pub id: usize,
    /// Bytes it can hold.
    pub size_bytes: u64,
    /// Bytes of objects.
    pub used_bytes: u64,
}

/// The space of the cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Spaces {
    /// Of the nodes that answered.
    pub nodes: Vec<Space>,
    /// Bytes of all working VDIs, as guests see them.
    pub virtual_bytes: u64,
}

impl Spaces {
    /// All nodes together; its id means nothing.
    pub fn total(&self) -> Space {
        let sum = |field: fn(&Space) -> u64| self.nodes.iter().map(field).fold(0, u64::saturating_add);
        Space { id: 0, size_bytes: sum(|space| space.size_bytes), used_bytes: sum(|space| space.used_bytes) }
    }
}

impl Space {
    /// Bytes left.
    pub fn free_bytes(&self) -> u64 {
        self.size_bytes - self.used_bytes
    }

    /// Percent used, cut to a whole number; 0 of nothing.
    pub fn used_percent(&self) -> u64 {
        let percent = u128::from(self.used_bytes) * 100 / u128::from(self.size_bytes).max(1);
        percent as u64
    }
}

/// Runs the command.
pub fn run(typed: &Shape, target: Target) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let list = requests::node_list(&mut sheep)?;
    let reach = Reach::from(&mut sheep)?;
    let mut spaces = Spaces { nodes: Vec::new(), virtual_bytes: 0 };
    let mut exit = Exit::Success;
    for (id, node) in list.nodes.iter().enumerate() {
        match space(id, node, reach.target(node)) {
            Ok(space) => spaces.nodes.push(space),
            Err(failure) => {
                eprintln!("{failure}");
                exit = Exit::System;
            }
        }
    }
    if spaces.nodes.is_empty() {
        return Err(Failure::system("Cannot get information from any nodes"));
    }
    let catalog = catalog::read(&mut sheep, None, Depth::Headers)?;
    for failure in &catalog.failures {
        eprintln!("{failure}");
        exit = Exit::System;
    }
    let headers = catalog.volumes.iter().map(|volume| &volume.header);
    spaces.virtual_bytes =
        headers.filter(|header| !header.is_snapshot()).map(|header| header.size_bytes).fold(0, u64::saturating_add);
    Ok(Report::new(Form::of(typed.raw, typed.json), spaces).exits(exit))
}

fn space(id: usize, node: &Node, target: Target) -> Result<Space, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let (response, _) = sheep
        .call(Request::plain(Opcode::StatSheep), &[])
        .map_err(|trouble| trouble.or(|reason| Failure::system(format!("Response's result: {reason} ({node})"))))?;
    match response.body {
        ResponseBody::Node { store_size, store_free, .. } if store_free <= store_size => {
            Ok(Space { id, size_bytes: store_size, used_bytes: store_size - store_free })
        }
        _ => Err(Failure::system(format!("{node} says it has more space free than in all"))),
    }
}
