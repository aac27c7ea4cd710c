//! `dog img snapshot`: of a VDI, `dog vdi snapshot`, `rollback` or `delete` with the words of `qemu-img`, and its list.

use std::ffi::{OsStr, OsString};

use super::info;
use super::volume::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, QUIET, Volume, without_usage};
use super::words::{Known, Words};
use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{Selector, Target};
use crate::report::{Form, Report};
use crate::vdi;

const LIST: Known = (b'l', "list", false);
const CREATE: Known = (b'c', "create", true);
const APPLY: Known = (b'a', "apply", true);
const DELETE: Known = (b'd', "delete", true);
const KNOWN: &[Known] = &[QUIET, FORMAT, OBJECT, IMAGE_OPTS, FORCE_SHARE, LIST, CREATE, APPLY, DELETE];

/// Does it if the snapshots are a VDI's; `None` leaves it to the program.
pub fn run(words: &[OsString], default: Target) -> Result<Option<Report>, Failure> {
    let Ok(words) = Words::parse(words, KNOWN) else { return Ok(None) };
    let Some(volume) = Volume::operand(&words, default)? else { return Ok(None) };
    volume.check_working()?;
    let actions = [LIST, CREATE, APPLY, DELETE];
    let mut asked = words.options.iter().filter(|(option, _)| actions.contains(option));
    let action = asked.next();
    if asked.next().is_some() {
        return Err(Failure::failed("Say one thing to do: -l, -c TAG, -a TAG or -d TAG"));
    }
    match action {
        None | Some((LIST, _)) => {
            let mut sheep = Sheep::connect(volume.target)?;
            let snapshots = info::snapshots(&mut sheep, &volume.url.name)?;
            if snapshots.is_empty() {
                // Nothing to list is something else than nothing there.
                vdi::volume::find(&mut sheep, &volume.url.name, &Selector::CURRENT)?;
            }
            return Ok(Some(Report::new(Form::Table, info::SnapshotList(snapshots))));
        }
        Some((option, tag)) => act(*option, &volume, tag.as_deref().unwrap_or_default()).map_err(without_usage)?,
    }
    Ok(Some(Report::silent()))
}

fn act(action: Known, volume: &Volume, tag: &OsStr) -> Result<(), Failure> {
    let snapshot = args::SnapshotWord { word: Some(tag.to_owned()) };
    let vdi = volume.name();
    if tag.is_empty() {
        // An empty word would select the VDI itself.
        return Err(Failure::failed(format!("The tag after -{} must not be empty", char::from(action.0))));
    }
    match action {
        CREATE => {
            let typed = args::Snapshot {
                tag: Some(tag.to_owned()),
                reduce_identical_snapshots: false,
                raw: false,
                verbose: false,
                vdi: vec![vdi],
            };
            vdi::snapshot::run(&typed, volume.target)?;
        }
        APPLY => {
            let typed = args::Rollback {
                snapshot,
                force: true,
                nr_batched_reclamation: None,
                reclamation_interval: None,
                raw: false,
                verbose: false,
                vdi,
            };
            vdi::rollback::run(&typed, volume.target)?;
        }
        _ => {
            let typed = args::Delete {
                snapshot,
                nr_batched_reclamation: None,
                reclamation_interval: None,
                max_reclaim: None,
                vdi,
            };
            vdi::delete::run(&typed, volume.target)?;
        }
    }
    Ok(())
}
