//! `dog vdi snapshot`
//!
//! With a tag it is one request to the cluster's order, which gives the tag as well: of two at once both are made, one after the
//! other. Without, the request is that of the protocol, and refused if somebody else was faster.

use qemu_proto::inode::TAG_OFFSET;
use qemu_proto::names::padded;
use qemu_proto::oid::{Oid, VdiId};
use qemu_proto::status::Status;

use super::volume::{self, Volume};
use crate::args;
use crate::connect::{Sheep, Trouble};
use crate::exit::Failure;
use crate::meaning::{self, Selector, Target, shown};
use crate::report::Report;
use crate::requests::{self, Header, NewVdi};

/// Runs the command.
pub fn run(typed: &args::Snapshot, target: Target) -> Result<Report, Failure> {
    let names = typed.vdi.iter().map(|word| meaning::vdi_name(word)).collect::<Result<Vec<_>, _>>()?;
    let tag = match typed.tag.as_deref() {
        Some(word) if meaning::is_number(word) => {
            return Err(Failure::usage("Please specify a non-integer value for a snapshot tag name"));
        }
        Some(word) => meaning::tag(word)?,
        None => Vec::new(),
    };
    let mut sheep = Sheep::connect(target)?;
    let [name] = names[..] else { return together(&mut sheep, typed, &names, &tag) };
    let not_made = |reason: &dyn std::fmt::Display| {
        Failure::failed(format!("Failed to create snapshot for {}: {reason}", shown(name)))
    };
    if !tag.is_empty() {
        check_free(&mut sheep, name, &tag)?;
    }
    let current = requests::look_up(&mut sheep, name, &Selector::CURRENT)
        .map_err(|trouble| trouble.or(|reason| not_made(&reason)))?;
    let header = volume::read_header(&mut sheep, current)?;
    if typed.reduce_identical_snapshots {
        let map = volume::read_map(&mut sheep, &header)?;
        let volume = Volume { header: header.clone(), map };
        if !volume.map.contains(&current.get()) {
            if typed.verbose {
                eprintln!("VDI {} has not changed since its last snapshot, skipping creation of snapshot", shown(name));
            }
            return Ok(Report::silent());
        }
    }
    let (working, current) = if tag.is_empty() {
        snapshot_untagged(&mut sheep, name, current, &header)
            .map_err(|trouble| trouble.or(|reason| not_made(&reason)))?
    } else {
        order(&mut sheep, &[name], &tag)
            .map_err(|failure| failure.about(&format!("Failed to create snapshot for {}", shown(name))))?;
        let mut look_up = |selector: &Selector| {
            requests::look_up(&mut sheep, name, selector).map_err(|trouble| trouble.or(|reason| not_made(&reason)))
        };
        if typed.verbose {
            (look_up(&Selector::CURRENT)?, look_up(&Selector { tag: tag.clone(), id: 0 })?)
        } else {
            return Ok(Report::silent());
        }
    };
    Ok(match (typed.verbose, typed.raw) {
        (true, true) => Report::text(format!("{working} {current}\n")),
        (true, false) => {
            Report::text(format!("new VID of original VDI: {working}, VDI ID of newly created snapshot: {current}\n"))
        }
        (false, _) => Report::silent(),
    })
}

/// A snapshot without a tag: gives the new working VDI, and the snapshot.
fn snapshot_untagged(
    sheep: &mut Sheep,
    name: &[u8],
    current: VdiId,
    header: &Header,
) -> Result<(VdiId, VdiId), Trouble> {
    if !header.tag.is_empty() {
        // Left by a client that was interrupted.
        requests::write_object(sheep, Oid::inode(current), TAG_OFFSET as u64, &padded(&[]))?;
    }
    let new = NewVdi {
        size_bytes: header.size_bytes,
        base: Some(current),
        redundancy: (header.copies, header.copy_policy),
        shift: header.shift,
        makes_snapshot: true,
    };
    Ok((requests::new_vdi(sheep, name, &new)?, current))
}

/// Has the cluster make snapshots with a tag, of one moment.
fn order(sheep: &mut Sheep, names: &[&[u8]], tag: &[u8]) -> Result<(), Failure> {
    let names = names.iter().map(|name| meaning::as_text(name)).collect::<Result<Vec<_>, _>>()?;
    let wish = serde_json::json!({"do": "snapshot-together", "names": names, "tag": meaning::as_text(tag)?});
    requests::administer(sheep, &wish).map(drop)
}

/// Snapshots of several volumes, of one moment.
fn together(sheep: &mut Sheep, typed: &args::Snapshot, names: &[&[u8]], tag: &[u8]) -> Result<Report, Failure> {
    if typed.reduce_identical_snapshots {
        return Err(Failure::usage("-R works with one VDI only: the snapshots of a group belong together"));
    }
    let all = names.iter().map(|name| shown(name).to_string()).collect::<Vec<_>>().join(", ");
    order(sheep, names, tag).map_err(|failure| failure.about(&format!("Failed to create snapshots for {all}")))?;
    Ok(Report::silent())
}

/// Fails if the name has a snapshot with this tag.
fn check_free(sheep: &mut Sheep, name: &[u8], tag: &[u8]) -> Result<(), Failure> {
    match requests::look_up(sheep, name, &Selector { tag: tag.to_vec(), id: 0 }) {
        Ok(_) => Err(Failure::failed(format!(
            "Failed to create snapshot for {name}, maybe snapshot id (0) or tag ({tag}) is existed; \
             'dog vdi list {name}' shows the tags in use",
            name = shown(name),
            tag = shown(tag)
        ))),
        Err(trouble) if trouble.is(Status::NoTag) || trouble.is(Status::NoVdi) => Ok(()),
        Err(trouble) => {
            Err(trouble
                .or(|reason| Failure::failed(format!("Failed to create snapshot for {}: {reason}", shown(name)))))
        }
    }
}
