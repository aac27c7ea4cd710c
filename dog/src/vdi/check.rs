//! `dog vdi check`
//!
//! The cluster compares and repairs; this command walks the objects and tells what it found.

use std::fmt::Write;

use qemu_proto::flags::RequestFlags;
use qemu_proto::oid::Oid;
use qemu_proto::opcode::Opcode;
use qemu_proto::response::ResponseBody;
use qemu_proto::status::Status;

use super::volume::Volume;
use super::{exist, lanes};
use crate::args;
use crate::connect::{Sheep, Trouble};
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Selector, Target, shown};
use crate::progress::Progress;
use crate::report::Report;
use crate::requests;

/// What the cluster found out about one object.
#[derive(Clone, PartialEq, Eq, Debug)]
enum Finding {
    Good,
    Repaired,
    /// What is wrong and stays so.
    Bad(String),
}

/// Runs the command.
pub fn run(typed: &args::Check, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let selector = Selector::of(typed.snapshot.word.as_deref())?;
    if typed.exist {
        return exist::run(target, name, &selector);
    }
    let volume = Volume::open(&mut Sheep::connect(target)?, name, &selector)?;
    let mut out = String::new();
    let exit = check(target, &volume, |_| true, &mut out)?;
    Ok(Report::text(out).exits(exit))
}

/// Checks the objects of a volume that are `wanted`, and adds what was found to `out`.
pub fn check(
    target: Target,
    volume: &Volume,
    wanted: impl Fn(Oid) -> bool + Clone + Send,
    out: &mut String,
) -> Result<Exit, Failure> {
    let header = &volume.header;
    let vmstate_count = u32::try_from(header.vm_state_bytes.div_ceil(1 << header.shift))
        .map_err(|_| Failure::failed(format!("The inode {} is damaged: its machine state has no end", header.vdi)))?;
    let oids = std::iter::once(Oid::inode(header.vdi))
        .chain(volume.objects().map(|(_, oid)| oid))
        .chain((0..vmstate_count).map(|index| Oid::vmstate(header.vdi, index)))
        .filter(move |oid| wanted(*oid));
    let mut progress = Progress::of_objects(oids.clone().count() as u64);
    let mut exit = Exit::Success;
    lanes::in_order(target, &oids, check_one, |(oid, finding)| {
        progress.advance(1);
        match finding {
            Finding::Good => {}
            Finding::Repaired => {
                let _ = writeln!(out, "fixed replica {oid}");
            }
            Finding::Bad(text) => {
                eprintln!("{text}");
                exit = Exit::Failure;
            }
        }
        Ok(())
    })?;
    let _ = writeln!(out, "finish check&repair {}", shown(&header.name));
    Ok(exit)
}

fn check_one(sheep: &mut Sheep, oid: Oid) -> Result<(Oid, Finding), Failure> {
    let request = requests::object_request(Opcode::CheckObject, oid, RequestFlags::NONE, None, 0);
    let answered = sheep.call(request, &[]).map(|(response, _)| response.body);
    finding(oid, answered).map(|finding| (oid, finding))
}

fn finding(oid: Oid, answered: Result<ResponseBody, Trouble>) -> Result<Finding, Failure> {
    Ok(match answered {
        Err(Trouble::Lost(failure)) => return Err(failure),
        Err(Trouble::Refused(reason)) if reason.is(Status::NoObj) => Finding::Bad(format!("no node has {oid}")),
        Err(Trouble::Refused(reason)) => Finding::Bad(format!("failed to check object {oid}: {reason}")),
        Ok(ResponseBody::Check { wanted, unrepairable, .. }) if unrepairable > 0 => {
            Finding::Bad(format!("object {oid} is inconsistent: {unrepairable} of {wanted} copies were not repaired"))
        }
        Ok(ResponseBody::Check { wanted, good, .. }) if good < wanted => Finding::Bad(format!(
            "object {oid} has {good} of {wanted} copies; see 'dog node recovery' and 'dog node list'"
        )),
        Ok(ResponseBody::Check { repaired, .. }) if repaired > 0 => Finding::Repaired,
        Ok(_) => Finding::Good,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::connect::Refusal;

    #[test]
    fn a_finding_says_what_stays_wrong() {
        let oid = Oid::from_raw(0x007c_2b25_0000_0001);
        let found = |wanted, good, repaired, unrepairable| {
            let body = ResponseBody::Check { wanted, good, repaired, unrepairable, rest: [0; 12] };
            finding(oid, Ok(body)).expect("an answer")
        };
        assert_eq!(found(3, 3, 0, 0), Finding::Good);
        assert_eq!(found(3, 3, 1, 0), Finding::Repaired);
        assert!(
            matches!(found(3, 2, 0, 1), Finding::Bad(text) if text.starts_with("object 007c2b2500000001 is inconsistent"))
        );
        assert!(matches!(found(3, 2, 0, 0), Finding::Bad(text) if text.contains("has 2 of 3 copies")));
        let missing = finding(oid, Err(Trouble::Refused(Refusal(2)))).expect("an answer");
        assert_eq!(missing, Finding::Bad("no node has 007c2b2500000001".to_owned()));
    }
}
