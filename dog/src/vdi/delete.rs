//! `dog vdi delete`

use qemu_proto::oid::Oid;

use super::lanes;
use super::volume::{self, Volume};
use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Selector, Target};
use crate::progress::Progress;
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(typed: &args::Delete, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let selector = Selector::of(typed.snapshot.word.as_deref())?;
    check_pacing(typed.nr_batched_reclamation.as_deref(), typed.reclamation_interval.as_deref())?;
    let most = typed.max_reclaim.as_deref().map(|word| number("-m", word)).transpose()?;
    let mut sheep = Sheep::connect(target)?;
    if let Some(most) = most {
        drop_some(&mut sheep, target, name, &selector, most)?;
        return Ok(Report::silent());
    }
    requests::delete_vdi(&mut sheep, name, &selector)
        .map_err(|trouble| trouble.or(|reason| volume::not_opened(name, &selector, reason)))?;
    Ok(Report::silent())
}

/// Makes holes of the first objects, and keeps the VDI.
fn drop_some(sheep: &mut Sheep, target: Target, name: &[u8], selector: &Selector, most: u32) -> Result<(), Failure> {
    if !selector.is_current() {
        return Err(Failure::failed("A snapshot cannot lose a part of its objects (-m): delete it as a whole"));
    }
    let volume = Volume::open(sheep, name, selector)?;
    let indexes = volume.objects().map(|(index, _)| index).take(most as usize);
    let mut progress = Progress::of_objects(indexes.clone().count() as u64);
    let vdi = volume.header.vdi;
    let drop_one = |sheep: &mut Sheep, index: u32| {
        let oid = Oid::data(vdi, index);
        requests::discard_object(sheep, oid).map_err(|trouble| volume::not_written(oid, trouble))
    };
    lanes::in_order(target, &indexes, drop_one, |()| {
        progress.advance(1);
        Ok(())
    })
}

/// `-B` and `-I` have no effect, but a wrong value is still a mistake of the caller.
pub fn check_pacing(batch: Option<&str>, interval: Option<&str>) -> Result<(), Failure> {
    for (option, word) in [("-B", batch), ("-I", interval)] {
        word.map(|word| number(option, word)).transpose()?;
    }
    Ok(())
}

fn number(option: &str, word: &str) -> Result<u32, Failure> {
    word.parse().map_err(|_| Failure::failed(format!("Invalid value '{word}' of {option}: must be a number")))
}
