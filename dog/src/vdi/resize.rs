//! `dog vdi resize`
//!
//! Only the eight bytes of the size are written, so that nothing else in the header can be undone by an old copy of it.

use qemu_proto::inode::VDI_SIZE_OFFSET;
use qemu_proto::oid::Oid;

use super::{create, volume};
use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Selector, Target};
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(typed: &args::Resize, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let size = typed.size.as_deref().ok_or_else(|| Failure::usage("Please specify the new size for the VDI"))?;
    let size_bytes = meaning::size(size)?;
    let mut sheep = Sheep::connect(target)?;
    let header = volume::open_header(&mut sheep, name, &Selector::CURRENT)?;
    create::check_size(size_bytes, header.shift)?;
    if size_bytes < header.size_bytes {
        return Err(Failure::new(Exit::Usage, "Shrinking VDIs is not implemented"));
    }
    let oid = Oid::inode(header.vdi);
    requests::write_object(&mut sheep, oid, VDI_SIZE_OFFSET as u64, &size_bytes.to_le_bytes())
        .map_err(|trouble| volume::not_written(oid, trouble))?;
    Ok(Report::silent())
}
