//! `dog vdi track`

use qemu_proto::oid::{ObjectKind, Oid, VdiId};

use super::volume::{self, Volume};
use crate::args;
use crate::cluster::info;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Selector, Target};
use crate::report::{Form, Report};
use crate::requests::{self, Header, Node};

/// Where an object should have been.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Track {
    /// Its VDI.
    pub vdi: VdiId,
    /// The object.
    pub oid: Oid,
    /// Copies it should have: a number, or `4:2`.
    pub copies: String,
    /// How many nodes the cluster has now.
    pub node_count: usize,
    /// Newest first: the number of an epoch and who should have held the object then, the preferred one first.
    pub epochs: Vec<(u32, Vec<Node>)>,
}

/// Runs the command.
pub fn run(typed: &args::Track, target: Target) -> Result<Report, Failure> {
    let index = typed.index.as_deref().map(meaning::object_index).transpose()?;
    let oid = typed.oid.as_deref().map(object_id).transpose()?;
    let selector = Selector::of(typed.snapshot.word.as_deref())?;
    let name = typed.vdi.as_deref().map(meaning::vdi_name).transpose()?;
    let mut sheep = Sheep::connect(target)?;
    let list = requests::node_list(&mut sheep)?;
    let (header, oid) = match (oid, name) {
        (Some(oid), _) => (volume::read_header(&mut sheep, oid.vid())?, oid),
        (None, Some(name)) => {
            let header = volume::open_header(&mut sheep, name, &selector)?;
            match object(&mut sheep, &header, index)? {
                Ok(oid) => (header, oid),
                Err(instead) => return Ok(instead),
            }
        }
        (None, None) => return Err(Failure::usage("Please specify the name of the VDI")),
    };
    let mut track =
        Track { vdi: header.vdi, oid, copies: header.redundancy(), node_count: list.nodes.len(), epochs: Vec::new() };
    let (_, mut entries) = info::epochs(&mut sheep, list.epoch as usize, list.nodes.len())?;
    entries.sort_by_key(|entry| std::cmp::Reverse(entry.epoch));
    for entry in entries {
        // What is too old to be known is also the last.
        let Some(nodes) = requests::locate(&mut sheep, oid, entry.epoch)? else { break };
        track.epochs.push((entry.epoch, nodes));
    }
    Ok(Report::new(Form::of(false, typed.json), track))
}

/// The object behind an index, or the inode; what to say instead if there is none.
fn object(sheep: &mut Sheep, header: &Header, index: Option<u32>) -> Result<Result<Oid, Report>, Failure> {
    let Some(index) = index else { return Ok(Ok(Oid::inode(header.vdi))) };
    if u64::from(index) >= header.object_count() {
        return Ok(Err(Report::text("The offset is too large!\n").exits(Exit::Failure)));
    }
    let map = volume::read_map(sheep, header)?;
    let vdi = header.vdi;
    let found = Volume { header: header.clone(), map }.object(index);
    Ok(found.ok_or_else(|| Report::text(format!("The inode object 0x{vdi} idx {index} is not allocated\n"))))
}

/// The id of an object of a VDI.
fn object_id(word: &str) -> Result<Oid, Failure> {
    let digits = word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")).unwrap_or(word);
    let oid = u64::from_str_radix(digits, 16).map(Oid::from_raw);
    match oid {
        Ok(oid) if matches!(oid.kind(), Some(ObjectKind::Data | ObjectKind::Inode | ObjectKind::Vmstate)) => Ok(oid),
        _ => Err(Failure::failed(format!(
            "'{word}' is not the id of an object of a VDI; give up to 16 hexadecimal digits"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attributes_are_no_objects_of_a_vdi() {
        assert_eq!(object_id("0x807c2b2500000000"), Ok(Oid::inode(VdiId::from_low_bits(0x7c_2b25))));
        assert_eq!(object_id("7c2b250000000c"), Ok(Oid::data(VdiId::from_low_bits(0x7c_2b25), 12)));
        let attribute = Oid::attribute(VdiId::from_low_bits(1), 7).to_string();
        for word in [attribute.as_str(), "x", "", "10000000000000000"] {
            assert_eq!(object_id(word).expect_err(word).exit, Exit::Failure);
        }
    }
}
