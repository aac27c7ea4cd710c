//! `dog cluster check`
//!
//! Always holds: an object that several VDIs share is looked at once, with the VDI that owns it if that is there.

use std::fmt::Write;

use qemu_proto::oid::Oid;

use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::{Target, shown};
use crate::report::Report;
use crate::requests::Header;
use crate::vdi::catalog::{self, Depth};
use crate::vdi::check::check;
use crate::vdi::volume::{Volume, read_header_if_any, read_map};

/// Runs the command.
pub fn run(target: Target) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let catalog = catalog::read(&mut sheep, None, Depth::Maps)?;
    for failure in &catalog.failures {
        eprintln!("{failure}");
    }
    let mut exit = if catalog.failures.is_empty() { Exit::Success } else { Exit::Failure };
    let mut out = String::new();
    for listed in &catalog.volumes {
        match check_one(&mut sheep, listed, &catalog.volumes, &mut out) {
            Ok(Exit::Success) => {}
            Ok(other) => exit = other,
            // What was found until then is worth as much as before.
            Err(failure) if failure.exit == Exit::System => return Err(Failure { out, ..failure }),
            Err(failure) => {
                eprintln!("{failure}");
                exit = failure.exit;
            }
        }
    }
    Ok(Report::text(out).exits(exit))
}

/// Checks a VDI as it is now: the ones before it took their time.
fn check_one(sheep: &mut Sheep, listed: &Volume, all: &[Volume], out: &mut String) -> Result<Exit, Failure> {
    let Some(header) = read_header_if_any(sheep, listed.header.vdi)? else { return Ok(Exit::Success) };
    let map = read_map(sheep, &header)?;
    let volume = Volume { header, map };
    let _ = writeln!(out, "{}", title(&volume.header));
    check(sheep.target(), &volume, |oid| !is_elsewhere(oid, &volume, all), out)
}

fn title(header: &Header) -> String {
    let name = shown(&header.name);
    if header.is_snapshot() {
        format!("fix snapshot {name} (id: {}, tag: \"{}\")", header.snapshot_id, shown(&header.tag))
    } else {
        format!("fix vdi {name}")
    }
}

/// Whether an object is looked at with another VDI, which owns it. `all` is ordered by id.
fn is_elsewhere(oid: Oid, volume: &Volume, all: &[Volume]) -> bool {
    if oid.vid() == volume.header.vdi {
        return false;
    }
    let owner = all.binary_search_by_key(&oid.vid(), |other| other.header.vdi).ok().map(|at| &all[at]);
    owner.is_some_and(|owner| owner.object(oid.index()) == Some(oid))
}

#[cfg(test)]
mod tests {
    use super::*;
    use qemu_proto::oid::VdiId;

    fn volume(vdi: u32, map: &[u32]) -> Volume {
        let header = Header { name: b"v".to_vec(), vdi: VdiId::from_low_bits(vdi), ..Header::default() };
        Volume { header, map: map.to_vec() }
    }

    #[test]
    fn shared_objects_are_left_to_their_owner() {
        // 4 grew from 3, and 3 from 2, which is deleted.
        let all = [volume(3, &[2, 3, 0]), volume(4, &[2, 3, 4])];
        let looked_at = |volume: &Volume| -> Vec<u32> {
            volume.objects().filter(|&(_, oid)| !is_elsewhere(oid, volume, &all)).map(|(index, _)| index).collect()
        };
        assert_eq!((looked_at(&all[0]), looked_at(&all[1])), (vec![0, 1], vec![0, 2]));
    }

    #[test]
    fn an_owner_that_does_not_have_it_is_not_relied_on() {
        let all = [volume(3, &[0]), volume(4, &[3])];
        assert!(!is_elsewhere(Oid::data(VdiId::from_low_bits(3), 0), &all[1], &all));
    }

    #[test]
    fn snapshots_are_named_by_number_and_tag() {
        let header = Header { name: b"v".to_vec(), tag: b"t".to_vec(), snapshot_id: 2, ..Header::default() };
        assert_eq!(title(&header), "fix vdi v");
        assert_eq!(title(&Header { snapshot_time: 1, ..header }), "fix snapshot v (id: 2, tag: \"t\")");
    }
}
