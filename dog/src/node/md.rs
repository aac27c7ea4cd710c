//! `dog node md`

use std::fmt;

use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;
use qemu_proto::stat::{DiskEntry, MD_INFO_BYTES, decode_disks};

use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::Target;
use crate::reach::Reach;
use crate::report::{Form, Report};
use crate::requests::{self, Node};

/// What the table begins with.
pub const HEADER: &str = "Id\tSize\tUsed\tAvail\tUse%\tPath\n";

/// The disks of one node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeDisks {
    /// Its position in the node list, if all nodes were asked.
    pub id: Option<usize>,
    /// Who it is.
    pub node: String,
    /// In the order of their numbers.
    pub disks: Vec<DiskEntry>,
}

/// Those of the nodes that answered.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Disks(pub Vec<NodeDisks>);

/// Runs the command.
pub fn run(typed: &args::Md, target: Target) -> Result<Report, Failure> {
    match typed.nested.as_deref() {
        Some("info") => {}
        Some("plug" | "unplug") if typed.disks.is_none() => return Err(Failure::usage("Say which directories")),
        Some(word @ ("plug" | "unplug")) => {
            return Err(Failure::failed(format!(
                "Cannot {word}: the disks of a node are those that sheep is started with (sheep META,DISK1,DISK2); to \
                 change them, stop the node, start it with an empty META and the new disks, and the others fill it"
            )));
        }
        other => return Err(Failure::nested(other, "info, plug or unplug")),
    }
    let form = Form::of(typed.shape.raw, typed.shape.json);
    if !typed.all {
        let disks = disks_of(target, target).map_err(|failure| Failure { out: header(form), ..failure })?;
        return Ok(Report::new(form, Disks(vec![NodeDisks { id: None, node: target.to_string(), disks }])));
    }
    let mut sheep = Sheep::connect(target)?;
    let nodes: Vec<Node> = requests::node_list(&mut sheep)?.nodes;
    let reach = Reach::from(&mut sheep)?;
    let (mut found, mut exit) = (Disks(Vec::new()), Exit::Success);
    for (id, node) in nodes.into_iter().enumerate() {
        match disks_of(node, reach.target(&node)) {
            Ok(disks) => found.0.push(NodeDisks { id: Some(id), node: node.to_string(), disks }),
            Err(failure) => {
                eprintln!("{failure}");
                exit = failure.exit;
            }
        }
    }
    Ok(Report::new(form, found).exits(exit))
}

/// What precedes an error.
fn header(form: Form) -> String {
    if form == Form::Table { HEADER.to_owned() } else { String::new() }
}

fn disks_of(node: impl fmt::Display, target: Target) -> Result<Vec<DiskEntry>, Failure> {
    let mut request = Request::plain(Opcode::MdInfo);
    request.data_length = MD_INFO_BYTES as u32;
    let (_, answer) = Sheep::connect(target)?
        .call(request, &[])
        .map_err(|trouble| trouble.or(|reason| Failure::failed(format!("Response's result: {reason} ({node})"))))?;
    decode_disks(&answer)
        .ok_or_else(|| Failure::system(format!("{node} answered {} bytes about its disks", answer.len())))
}
