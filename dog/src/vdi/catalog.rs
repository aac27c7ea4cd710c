//! Every VDI of the cluster, or every VDI of one name, with what its inode says.

use qemu_proto::oid::VdiId;
use sheep_core::vdi_name::Run;

use super::volume::{Volume, read_header_if_any, read_map};
use crate::connect::{Sheep, Trouble};
use crate::exit::{Exit, Failure};
use crate::meaning::Selector;
use crate::requests::{self, VdiSet};

/// What could be read, and what could not.
#[derive(Debug, Default)]
pub struct Catalog {
    /// In the order of their ids.
    pub volumes: Vec<Volume>,
    /// One for each inode that could not be read.
    pub failures: Vec<Failure>,
}

/// How much of each VDI to read.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Depth {
    /// The maps of the volumes stay empty.
    Headers,
    /// Everything.
    Maps,
}

/// Reads the VDIs that are not deleted; with a name, only those of that name.
pub fn read(sheep: &mut Sheep, name: Option<&[u8]>, depth: Depth) -> Result<Catalog, Failure> {
    let in_use = requests::vdis_in_use(sheep)?;
    let deleted = requests::vdis_deleted(sheep)?;
    let mut vdis: Vec<VdiId> = match name {
        // All VDIs of a name are in the run of ids that begins at its hash, unless it was given to them later.
        Some(name) if !is_elsewhere(sheep, name, &in_use)? => Run::of(name, |vdi| in_use.contains(vdi)).collect(),
        Some(_) | None => in_use.iter().collect(),
    };
    vdis.retain(|&vdi| !deleted.contains(vdi));
    vdis.sort_unstable();
    let mut catalog = Catalog::default();
    for vdi in vdis {
        match read_one(sheep, vdi, name, depth) {
            Ok(Some(volume)) => catalog.volumes.push(volume),
            Ok(None) => {}
            Err(failure) if failure.exit == Exit::System => return Err(failure),
            Err(failure) => catalog.failures.push(failure),
        }
    }
    Ok(catalog)
}

/// Whether a VDI of this name is not where the name says, because it was renamed: it or its first snapshot would be there.
fn is_elsewhere(sheep: &mut Sheep, name: &[u8], in_use: &VdiSet) -> Result<bool, Failure> {
    for selector in [Selector::CURRENT, Selector { tag: Vec::new(), id: 1 }] {
        match requests::look_up(sheep, name, &selector) {
            Ok(found) if !Run::of(name, |vdi| in_use.contains(vdi)).any(|vdi| vdi == found) => return Ok(true),
            Ok(_) | Err(Trouble::Refused(_)) => {}
            Err(Trouble::Lost(failure)) => return Err(failure),
        }
    }
    Ok(false)
}

/// `None` for a VDI that was deleted meanwhile, or has another name.
fn read_one(sheep: &mut Sheep, vdi: VdiId, name: Option<&[u8]>, depth: Depth) -> Result<Option<Volume>, Failure> {
    let Some(header) = read_header_if_any(sheep, vdi)? else { return Ok(None) };
    if name.is_some_and(|name| name != header.name) {
        return Ok(None);
    }
    let map = match depth {
        Depth::Headers => Vec::new(),
        Depth::Maps => read_map(sheep, &header)?,
    };
    Ok(Some(Volume { header, map }))
}
