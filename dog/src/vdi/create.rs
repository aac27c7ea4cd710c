//! `dog vdi create`

use qemu_proto::oid::{Oid, VdiId};
use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;
use qemu_proto::response::ResponseBody;
use sheep_core::units::HumanSize;

use super::lanes;
use super::volume::{self, OBJECTS_MAX};
use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Target, shown};
use crate::progress::Progress;
use crate::report::Report;
use crate::requests::{self, NewVdi};

/// Objects of 4 MiB, where the cluster does not say.
const DEFAULT_SHIFT: u8 = 22;

/// Runs the command.
pub fn run(typed: &args::Create, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let size = typed.size.as_deref().ok_or_else(|| Failure::usage("Please specify the VDI size"))?;
    let size_bytes = meaning::size(size)?;
    let shift = meaning::shift(typed.block_size_shift.as_deref())?;
    let copies = meaning::copies(typed.copies.as_deref())?;
    if typed.hyper {
        return Err(Failure::not_available("A volume of more than 2^20 objects (-y)"));
    }
    let mut sheep = Sheep::connect(target)?;
    let shift = match shift {
        Some(shift) => shift,
        None => default_shift(&mut sheep)?,
    };
    check_size(size_bytes, shift)?;
    let redundancy = copies.map_or((0, 0), |policy| (policy.holder_count(), policy.wire_byte()));
    let new = NewVdi { size_bytes, redundancy, shift, ..NewVdi::default() };
    let vdi = requests::new_vdi(&mut sheep, name, &new).map_err(|trouble| {
        trouble.or(|reason| Failure::failed(format!("Failed to create VDI {}: {reason}", shown(name))))
    })?;
    if typed.prealloc {
        let count = u32::try_from(size_bytes.div_ceil(1 << shift)).expect("the size was checked");
        preallocate(target, vdi, &(0..count), shift)?;
    }
    Ok(match (typed.verbose, typed.raw) {
        (true, true) => Report::text(format!("{vdi}\n")),
        (true, false) => Report::text(format!("VDI ID of newly created VDI: {vdi}\n")),
        (false, _) => Report::silent(),
    })
}

/// The object size that the cluster gives to new volumes.
fn default_shift(sheep: &mut Sheep) -> Result<u8, Failure> {
    let (response, _) = sheep.call(Request::plain(Opcode::GetClusterDefault), &[]).map_err(|trouble| {
        trouble.or(|reason| Failure::failed(format!("Failed to get the cluster's object size: {reason}")))
    })?;
    match response.body {
        ResponseBody::ClusterDefault { block_size_shift: shift @ 20..=31, .. } => Ok(shift),
        _ => Ok(DEFAULT_SHIFT),
    }
}

/// The map of a volume has room for so many objects and no more.
pub fn check_size(size_bytes: u64, shift: u8) -> Result<(), Failure> {
    let limit = OBJECTS_MAX << shift;
    if size_bytes <= limit {
        return Ok(());
    }
    let text = format!(
        "VDI size is too large: {} asked for, at most {} fit in objects of {}; use larger objects (-z), up to -z 31",
        HumanSize(size_bytes),
        HumanSize(limit),
        HumanSize(1 << shift)
    );
    Err(Failure::new(Exit::Usage, text))
}

/// Makes objects that are holes, filled with zeros.
pub fn preallocate(
    target: Target,
    vdi: VdiId,
    indexes: &(impl Iterator<Item = u32> + Clone + Send),
    shift: u8,
) -> Result<(), Failure> {
    let mut progress = Progress::new((indexes.clone().count() as u64) << shift);
    let allocate = |sheep: &mut Sheep, index: u32| {
        let oid = Oid::data(vdi, index);
        requests::create_object(sheep, oid, None, 0, &[]).map_err(|trouble| volume::not_written(oid, trouble))?;
        let entered = requests::write_map_entry(sheep, vdi, index);
        entered.map_err(|trouble| volume::not_written(Oid::inode(vdi), trouble))
    };
    let done = lanes::in_order(target, indexes, allocate, |()| {
        progress.advance(1 << shift);
        Ok(())
    });
    done.map_err(|failure| failure.then("The VDI was created, but not all of its objects are allocated"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_map_limits_the_size() {
        assert_eq!(check_size(4 << 40, 22), Ok(()));
        let failure = check_size((4 << 40) + 1, 22).expect_err("too large");
        assert_eq!(failure.exit, Exit::Usage);
        assert!(failure.message.starts_with("VDI size is too large: 4.0 TB asked for, at most 4.0 TB"), "{failure}");
        assert_eq!(check_size(2 << 50, 31), Ok(()));
    }
}
