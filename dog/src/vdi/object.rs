//! `dog vdi object location`, `map` and `dump-inode`

use qemu_proto::flags::RequestFlags;
use qemu_proto::oid::{Oid, VdiId};
use qemu_proto::opcode::Opcode;
use qemu_proto::status::Status;

use super::dump::Dump;
use super::volume::{self, Volume};
use crate::args;
use crate::connect::{Sheep, Trouble};
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Selector, Target};
use crate::reach::Reach;
use crate::report::{Form, Report};
use crate::requests::{self, CURRENT_EPOCH, Node};

/// Which nodes have an object.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Location {
    /// The VDI that was asked about.
    pub vdi: VdiId,
    /// The object.
    pub oid: Oid,
    /// For a data object, its index and how many copies it should have.
    pub data: Option<(u32, String)>,
    /// How many nodes the cluster has.
    pub node_count: usize,
    /// The nodes that answered, and whether they have it.
    pub nodes: Vec<(Node, bool)>,
    /// The nodes that should have it, the preferred one first.
    pub holders: Vec<Node>,
}

/// Who owns each object of a volume.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ObjectMap(pub Vec<(u32, VdiId)>);

/// Runs the command.
pub fn run(typed: &args::Object, target: Target) -> Result<Report, Failure> {
    let name = |typed: &args::Object| match typed.vdi.as_deref() {
        Some(name) => meaning::vdi_name(name).map(<[u8]>::to_vec),
        None => Err(Failure::usage("Please specify the name of the VDI")),
    };
    let selector = Selector::of(typed.snapshot.word.as_deref())?;
    let form = Form::of(false, typed.json);
    match typed.nested.as_deref() {
        Some("map") => {
            let volume = Volume::open(&mut Sheep::connect(target)?, &name(typed)?, &selector)?;
            let map = volume.objects().map(|(index, oid)| (index, oid.vid())).collect();
            Ok(Report::new(form, ObjectMap(map)))
        }
        Some("location") => {
            let index = typed.index.as_deref().map(meaning::object_index).transpose()?;
            locate(target, &name(typed)?, &selector, index, form)
        }
        Some("dump-inode") => {
            let volume = Volume::open(&mut Sheep::connect(target)?, &name(typed)?, &selector)?;
            Ok(Report::new(form, Dump(volume)))
        }
        other => Err(Failure::nested(other, "location, map or dump-inode")),
    }
}

fn locate(target: Target, name: &[u8], selector: &Selector, index: Option<u32>, form: Form) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let nodes = requests::node_list(&mut sheep)?.nodes;
    let reach = Reach::from(&mut sheep)?;
    let header = volume::open_header(&mut sheep, name, selector)?;
    let vdi = header.vdi;
    let (oid, data) = match index {
        None => (Oid::inode(vdi), None),
        Some(index) => {
            if u64::from(index) >= header.object_count() {
                return Ok(Report::text("The offset is too large!\n").exits(Exit::Failure));
            }
            let map = volume::read_map(&mut sheep, &header)?;
            let data = (index, header.redundancy());
            let Some(oid) = (Volume { header, map }).object(index) else {
                return Ok(Report::text(format!("The inode object 0x{vdi} idx {index} is not allocated\n")));
            };
            (oid, Some(data))
        }
    };
    let mut exit = Exit::Success;
    let holders = requests::locate(&mut sheep, oid, CURRENT_EPOCH)?.unwrap_or_default();
    let mut location = Location { vdi, oid, data, node_count: nodes.len(), nodes: Vec::new(), holders };
    for node in nodes {
        match has_object(node, reach.target(&node), oid) {
            Ok(has) => location.nodes.push((node, has)),
            Err(failure) => {
                eprintln!("{failure}");
                exit = failure.exit;
            }
        }
    }
    Ok(Report::new(form, location).exits(exit))
}

fn has_object(node: Node, target: Target, oid: Oid) -> Result<bool, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let request = requests::object_request(Opcode::Exist, oid, RequestFlags::NONE, None, 0);
    match sheep.call(request, &[]) {
        Ok(_) => Ok(true),
        Err(Trouble::Refused(reason)) if reason.is(Status::NoObj) => Ok(false),
        Err(trouble) => Err(trouble.or(|reason| Failure::failed(format!("{node} does not say what it has: {reason}")))),
    }
}
