//! `dog vdi resize`
//!
//! Larger: only the eight bytes of the size are written, so that nothing else in the header can be undone by an old copy of it.
//! Smaller: the sheep clears what is beyond the new end, some objects at each request, and changes the size last, by one
//! request; an interruption before that leaves the old size.

use qemu_proto::inode::VDI_SIZE_OFFSET;
use qemu_proto::oid::Oid;
use serde_json::json;
use sheep_core::units::HumanSize;

use super::{create, volume};
use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Selector, Target, as_text};
use crate::progress::Progress;
use crate::question;
use crate::report::Report;
use crate::requests::{self, Header};

/// How often what is beyond the new end is cleared again because a client writes there.
const ATTEMPTS: u32 = 5;

/// Runs the command.
pub fn run(typed: &args::Resize, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let size = typed.size.as_deref().ok_or_else(|| Failure::usage("Please specify the new size for the VDI"))?;
    let size_bytes = meaning::size(size)?;
    let mut sheep = Sheep::connect(target)?;
    let header = volume::open_header(&mut sheep, name, &Selector::CURRENT)?;
    create::check_size(size_bytes, header.shift)?;
    if size_bytes < header.size_bytes {
        shrink(&mut sheep, as_text(name)?, &header, size_bytes, typed.force)?;
        return Ok(Report::silent());
    }
    let oid = Oid::inode(header.vdi);
    requests::write_object(&mut sheep, oid, VDI_SIZE_OFFSET as u64, &size_bytes.to_le_bytes())
        .map_err(|trouble| volume::not_written(oid, trouble))?;
    Ok(Report::silent())
}

fn shrink(sheep: &mut Sheep, name: &str, header: &Header, size_bytes: u64, force: bool) -> Result<(), Failure> {
    let failed = |failure: Failure| failure.about(&format!("Failed to make VDI {name} smaller"));
    let question = format!(
        "This operation discards everything in {name} beyond {}; it has {} now.\n\
         Whoever has it open must not need that any more. Continue?",
        HumanSize(size_bytes),
        HumanSize(header.size_bytes)
    );
    if !force {
        if requests::locks(sheep)?.iter().any(|lock| lock.vid == header.vdi.get()) {
            let text = "a client has it open; 'dog vdi lock list' shows from where, and -f makes it smaller anyway";
            return Err(failed(Failure::failed(text)));
        }
        if !question::confirmed(&question)? {
            return Err(failed(Failure::failed(
                "nothing was changed, because the answer was not 'yes'; -f does not ask",
            )));
        }
    }
    for _ in 0..ATTEMPTS {
        clear_beyond(sheep, name, header, size_bytes).map_err(failed)?;
        let wish = json!({"do": "shrink", "name": name, "size_bytes": size_bytes, "force": force});
        if requests::administer(sheep, &wish).map_err(failed)? != "again" {
            return Ok(());
        }
    }
    Err(failed(Failure::failed("a client goes on writing beyond the new end; stop it and run the same command again")))
}

fn clear_beyond(sheep: &mut Sheep, name: &str, header: &Header, size_bytes: u64) -> Result<(), Failure> {
    let kept = size_bytes.div_ceil(1 << header.shift);
    let mut bar = Progress::of_objects(header.object_count().saturating_sub(kept));
    let mut first = 0;
    loop {
        let wish = json!({"do": "clear-beyond", "name": name, "size_bytes": size_bytes, "first": first});
        let answer = requests::administer(sheep, &wish)?;
        let mut numbers = answer.split(' ').map(str::parse::<u64>);
        let (Some(Ok(next)), Some(Ok(count))) = (numbers.next(), numbers.next()) else {
            return Err(Failure::system(format!("The sheep answered '{answer}' instead of how far it is")));
        };
        bar.advance(next.saturating_sub(first.max(kept)));
        if next >= count || next <= first {
            return Ok(());
        }
        first = next;
    }
}
