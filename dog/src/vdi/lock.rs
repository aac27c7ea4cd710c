//! `dog vdi lock list` and `dog vdi lock unlock`
//!
//! Locks exist in clusters that were formatted with `-l`. They end by themselves with their client or its node; unlocking is
//! for a client that is connected and will not let go.

use std::net::IpAddr;

use qemu_proto::node_entry::NodeEntry;
use qemu_proto::oid::VdiId;

use super::volume;
use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Selector, Target, shown};
use crate::report::{Form, Report};
use crate::requests::{self, Header};

/// A VDI that somebody has open.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Locked {
    /// The VDI.
    pub header: Header,
    /// The node that its client is connected to.
    pub owner: (IpAddr, u16),
}

/// All of them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LockList(pub Vec<Locked>);

/// Runs the command.
pub fn run(typed: &args::Lock, target: Target) -> Result<Report, Failure> {
    match typed.nested.as_deref() {
        Some("list") => list(target, Form::of(false, typed.json)),
        Some("unlock") => {
            let Some(vdi) = typed.vdi.as_deref() else {
                return Err(Failure::usage("Please specify the name of the VDI"));
            };
            unlock(target, meaning::vdi_name(vdi)?, &Selector::of(typed.snapshot.word.as_deref())?)
        }
        other => Err(Failure::nested(other, "list or unlock")),
    }
}

fn list(target: Target, form: Form) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let mut locked = Vec::new();
    let mut exit = Exit::Success;
    for entry in requests::locks(&mut sheep)? {
        let (address, port) = entry.lock_owner;
        match volume::read_header_if_any(&mut sheep, VdiId::from_low_bits(entry.vid)) {
            Ok(Some(header)) => {
                let owner = (NodeEntry { address, ..NodeEntry::default() }.ip(), port);
                locked.push(Locked { header, owner });
            }
            // Deleted meanwhile.
            Ok(None) => {}
            Err(failure) => {
                eprintln!("{failure}");
                exit = Exit::Failure;
            }
        }
    }
    Ok(Report::new(form, LockList(locked)).exits(exit))
}

fn unlock(target: Target, name: &[u8], selector: &Selector) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let vdi = volume::find(&mut sheep, name, selector)?;
    if !requests::locks(&mut sheep)?.iter().any(|locked| locked.vid == vdi.get()) {
        return Err(Failure::failed(format!("VDI {} ({}) is not locked", shown(name), described(selector, vdi))));
    }
    requests::unlock(&mut sheep, vdi).map_err(|trouble| {
        trouble.or(|reason| Failure::failed(format!("Failed to unlock {}: {reason}", shown(name))))
    })?;
    Ok(Report::silent())
}

fn described(selector: &Selector, vdi: VdiId) -> String {
    match selector {
        Selector { id, .. } if *id != 0 => format!("snapid={id}, vid={vdi}"),
        Selector { tag, .. } if !tag.is_empty() => format!("tag={}, vid={vdi}", shown(tag)),
        _ => format!("vid={vdi}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_vdi_is_described_as_it_was_named() {
        let vdi = VdiId::from_low_bits(0x7c_2b25);
        let of = |tag: &[u8], id| described(&Selector { tag: tag.to_vec(), id }, vdi);
        assert_eq!(of(b"", 0), "vid=7c2b25");
        assert_eq!(of(b"", 3), "snapid=3, vid=7c2b25");
        assert_eq!(of(b"t", 0), "tag=t, vid=7c2b25");
    }
}
