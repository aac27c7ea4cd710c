//! `dog vdi alter-copy`, and what it shares with `dog cluster alter-copy`
//!
//! The cluster orders the change and does the rest by itself: this command asks, and says what was changed.

use std::collections::BTreeSet;

use qemu_proto::flags::RequestFlags;
use qemu_proto::oid::VdiId;
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{Request, RequestBody, VdiStateRequest};
use qemu_proto::status::Status;
use sheep_core::copy_policy::CopyPolicy;

use super::volume;
use crate::args;
use crate::connect::{Refusal, Sheep};
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Selector, Target, shown};
use crate::question;
use crate::report::Report;
use crate::requests::{self, Header};

/// Where nobody says how many.
const COPIES_DEFAULT: u8 = 3;
const SURE: &str = "Are you sure you want to continue?";

/// Runs the command.
pub fn run(typed: &args::AlterCopy, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let (copies, notice) = wanted(typed.copies.as_deref())?;
    let mut sheep = Sheep::connect(target)?;
    let header = volume::open_header(&mut sheep, name, &Selector::CURRENT)?;
    let subject = format!("{}'s", shown(name));
    check_change(&subject, header.copies, copies).map_err(|failure| Failure { out: notice.clone(), ..failure })?;
    if !typed.force {
        let caution = format!(
            "Caution: changing the copies of {} and its snapshots from {} to {copies} moves data between the nodes.\n{SURE}",
            shown(name),
            header.copies
        );
        if !confirmed(&mut sheep, copies, &(notice.clone() + &caution))? {
            return Ok(Report::silent());
        }
    }
    let body = VdiStateRequest {
        new_vid: header.vdi.get(),
        copies,
        block_size_shift: header.shift,
        ..VdiStateRequest::default()
    };
    let request = Request { body: RequestBody::VdiState(body), ..Request::plain(Opcode::AlterVdiCopy) };
    send(&mut sheep, request)?;
    tell(&subject, header.copies, copies);
    if let Some((other, other_copies)) = shares_with(&mut sheep, &header)? {
        eprintln!(
            "What {} shares with {other} keeps {other_copies} copies: alter {other} too, or write everything anew",
            shown(name)
        );
    }
    Ok(if typed.force { Report::text(notice) } else { Report::silent() })
}

/// The number of copies that was typed, and what to say if none was.
pub fn wanted(word: Option<&str>) -> Result<(u8, String), Failure> {
    let Some(word) = word else {
        return Ok((COPIES_DEFAULT, format!("The number of copies is not given (-c): {COPIES_DEFAULT}\n")));
    };
    if word.contains(':') {
        return Err(Failure::usage("Only the number of copies can be changed, not to an erasure code"));
    }
    let copies = meaning::copies(Some(word))?.map_or(COPIES_DEFAULT, CopyPolicy::holder_count);
    Ok((copies, String::new()))
}

/// Refuses a change that is none.
pub fn check_change(subject: &str, before: u8, copies: u8) -> Result<(), Failure> {
    if before == copies {
        let text = format!("{subject} redundancy level is already set to {copies}, nothing changed.");
        return Err(Failure::failed(text));
    }
    Ok(())
}

/// Asks what has to be asked.
pub fn confirmed(sheep: &mut Sheep, copies: u8, caution: &str) -> Result<bool, Failure> {
    let nodes = requests::node_list(sheep)?.nodes;
    let zones: BTreeSet<u32> = nodes.iter().filter(|node| node.vnodes > 0).map(|node| node.zone).collect();
    if usize::from(copies) > zones.len() {
        let text = format!(
            "The number of copies ({copies}) is larger than the number of zones ({}): objects will have fewer copies until \
             nodes in other zones join, and with one zone alone writes may have to wait for that.\n{SURE}",
            zones.len()
        );
        if !question::confirmed(&text)? {
            return Ok(false);
        }
    }
    question::confirmed(caution)
}

/// Has the change ordered.
pub fn send(sheep: &mut Sheep, mut request: Request) -> Result<(), Failure> {
    request.flags = RequestFlags::NONE;
    let reason = |refusal: Refusal| {
        if refusal.is(Status::NodeInRecovery) {
            return Failure::failed(
                "An earlier change of the number of copies is still being carried out: see 'dog node recovery' and 'dog \
                 cluster info', and try again when it is done",
            );
        }
        Failure::failed(format!("Failed to change the number of copies: {refusal}"))
    };
    sheep.call(request, &[]).map(drop).map_err(|trouble| trouble.or(reason))
}

/// Says what was changed, where scripts look for it.
pub fn tell(subject: &str, before: u8, copies: u8) {
    eprintln!("{subject} redundancy level is set to {copies}, the old one was {before}.");
}

/// What a clone was made from, and its number of copies.
fn shares_with(sheep: &mut Sheep, header: &Header) -> Result<Option<(String, u8)>, Failure> {
    let mut next: Option<VdiId> = header.parent;
    while let Some(parent) = next {
        let parent = requests::read_header(sheep, parent)
            .map_err(|trouble| trouble.or(|reason| Failure::new(Exit::Failure, reason.to_string())))?;
        if parent.name != header.name && !parent.name.is_empty() {
            return Ok(Some((shown(&parent.name).into_owned(), parent.copies)));
        }
        next = parent.parent;
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_another_number_of_copies_is_a_change() {
        assert_eq!(wanted(None).map(|(copies, notice)| (copies, notice.lines().count())), Ok((3, 1)));
        assert_eq!(wanted(Some("31")), Ok((31, String::new())));
        assert_eq!(wanted(Some("4:2")).expect_err("erasure code").exit, Exit::Usage);
        assert_eq!(wanted(Some("0")).expect_err("none").exit, Exit::Failure);
        let failure = check_change("disk1's", 2, 2).expect_err("no change");
        assert_eq!(failure.message, "disk1's redundancy level is already set to 2, nothing changed.");
        assert_eq!((failure.exit, check_change("disk1's", 2, 3)), (Exit::Failure, Ok(())));
    }
}
