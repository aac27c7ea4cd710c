//! `dog vdi check -e`: says which copies are missing, and repairs nothing.
//!
//! A map that was never written has no object, and what nobody has is no object either where that may be so.

use std::fmt::Write as _;

use qemu_proto::flags::RequestFlags;
use qemu_proto::oid::Oid;
use qemu_proto::opcode::Opcode;
use qemu_proto::status::Status;

use super::volume::Volume;
use crate::connect::{Sheep, Trouble};
use crate::exit::{Exit, Failure};
use crate::meaning::{Selector, Target, shown};
use crate::progress::Progress;
use crate::reach::Reach;
use crate::report::Report;
use crate::requests::{self, CURRENT_EPOCH, Node};

/// Runs the command.
pub fn run(target: Target, name: &[u8], selector: &Selector) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let volume = Volume::open(&mut sheep, name, selector)?;
    let nodes = requests::node_list(&mut sheep)?.nodes;
    let reach = Reach::from(&mut sheep)?;
    let mut ways: Vec<(Node, Sheep)> = Vec::new();
    for node in nodes {
        ways.push((node, Sheep::connect(reach.target(&node))?));
    }
    let inode = Oid::inode(volume.header.vdi);
    let oids: Vec<Oid> = std::iter::once(inode).chain(volume.objects().map(|(_, oid)| oid)).collect();
    let mut progress = Progress::of_objects(oids.len() as u64);
    let (mut out, mut lost) = (String::new(), 0_u64);
    for oid in oids {
        let holders = requests::locate(&mut sheep, oid, CURRENT_EPOCH)?.unwrap_or_default();
        let mut missing = Vec::new();
        for (node, way) in ways.iter_mut().filter(|(node, _)| is_among(node, &holders)) {
            if !has(way, node, oid)? {
                missing.push(*node);
            }
        }
        progress.advance(1);
        if oid == inode && missing.len() == holders.len() {
            continue;
        }
        for node in &missing {
            let _ = writeln!(out, "[{node}] oid {oid} is missing.");
        }
        lost += missing.len() as u64;
    }
    let name = shown(name);
    Ok(if lost == 0 {
        Report::text(format!("{name} is fine, no object is missing.\n"))
    } else {
        let _ = writeln!(out, "{name} lost {lost} object(s).");
        Report::text(out).exits(Exit::Failure)
    })
}

fn is_among(node: &Node, holders: &[Node]) -> bool {
    holders.iter().any(|holder| (holder.address, holder.port) == (node.address, node.port))
}

fn has(sheep: &mut Sheep, node: &Node, oid: Oid) -> Result<bool, Failure> {
    let request = requests::object_request(Opcode::Exist, oid, RequestFlags::NONE, None, 0);
    match sheep.call(request, &[]) {
        Ok(_) => Ok(true),
        Err(Trouble::Refused(reason)) if reason.is(Status::NoObj) => Ok(false),
        Err(trouble) => Err(trouble.or(|reason| Failure::failed(format!("{node} does not say what it has: {reason}")))),
    }
}
