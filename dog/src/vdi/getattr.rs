//! `dog vdi getattr`

use qemu_proto::attr::{ATTR_BYTES, AttrRecord};
use qemu_proto::flags::RequestFlags;
use qemu_proto::oid::Oid;

use super::{setattr, volume};
use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Target};
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(typed: &args::Getattr, target: Target) -> Result<Report, Failure> {
    let key = setattr::key(typed.key.as_deref())?;
    let wanted = setattr::record(meaning::vdi_name(&typed.vdi)?, key, Vec::new());
    let mut sheep = Sheep::connect(target)?;
    let attribute_id = setattr::call(&mut sheep, &wanted, RequestFlags::NONE).map_err(|trouble| {
        trouble.or(|reason| {
            setattr::not_found(key, reason)
                .unwrap_or_else(|| Failure::failed(format!("Failed to get attribute: {reason}")))
        })
    })?;
    let oid = Oid::attribute(wanted.id().0, attribute_id);
    let bytes = requests::read_object(&mut sheep, oid, 0, ATTR_BYTES as u32)
        .map_err(|trouble| volume::not_read(oid, trouble))?;
    let found = AttrRecord::decode(&bytes)
        .map_err(|error| Failure::system(format!("The attribute object {oid} has {} bytes", error.0)))?;
    Ok(Report::text(found.value()))
}
