//! `dog vdi read`
//!
//! Several connections fetch; this thread writes what they bring, in order, and zeros for the holes between.

use std::io::{self, IsTerminal, Write};

use super::lanes;
use super::pieces::{Piece, pieces};
use super::volume::{self, Volume};
use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Selector, Target};
use crate::progress::Progress;
use crate::report::Report;
use crate::requests;

/// Zeros are written in portions of this size.
static ZEROS: [u8; 64 << 10] = [0; 64 << 10];

/// Runs the command.
pub fn run(typed: &args::Read, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let selector = Selector::of(typed.snapshot.word.as_deref())?;
    let offset = typed.offset.as_deref().map_or(Ok(0), meaning::size)?;
    let length = typed.length.as_deref().map_or(Ok(u64::MAX), meaning::size)?;
    let volume = Volume::open(&mut Sheep::connect(target)?, name, &selector)?;
    let room = volume
        .header
        .size_bytes
        .checked_sub(offset)
        .ok_or_else(|| Failure::failed("Read offset is beyond the end of the VDI"))?;
    let out = io::stdout();
    let length = length.min(room);
    let mut progress = if out.is_terminal() { Progress::hidden() } else { Progress::new(length) };
    copy_out(target, &volume, offset, length, &mut out.lock(), &mut progress)?;
    Ok(Report::silent())
}

fn copy_out(
    target: Target,
    volume: &Volume,
    offset: u64,
    length: u64,
    out: &mut impl Write,
    progress: &mut Progress,
) -> Result<(), Failure> {
    let allocated = pieces(offset, length, volume.header.shift)
        .filter_map(|piece| volume.object(piece.index).map(|oid| (piece, oid)));
    let fetch = |sheep: &mut Sheep, (piece, oid): (Piece, _)| {
        let data = requests::read_object(sheep, oid, piece.offset, piece.length as u32);
        data.map(|data| (piece, data)).map_err(|trouble| volume::not_read(oid, trouble).then("Failed to read VDI"))
    };
    let mut written = offset;
    lanes::in_order(target, &allocated, fetch, |(piece, data)| {
        write_zeros(out, piece.start - written, progress)?;
        out.write_all(&data).map_err(|error| not_printed(&error))?;
        progress.advance(data.len() as u64);
        written = piece.start + data.len() as u64;
        Ok(())
    })?;
    write_zeros(out, offset + length - written, progress)?;
    out.flush().map_err(|error| not_printed(&error))
}

fn write_zeros(out: &mut impl Write, mut count: u64, progress: &mut Progress) -> Result<(), Failure> {
    while count > 0 {
        let portion = count.min(ZEROS.len() as u64);
        out.write_all(&ZEROS[..portion as usize]).map_err(|error| not_printed(&error))?;
        progress.advance(portion);
        count -= portion;
    }
    Ok(())
}

/// A reader that went away has what it wanted; everything else is worth a word.
pub fn not_printed(error: &io::Error) -> Failure {
    match error.kind() {
        io::ErrorKind::BrokenPipe => Failure::new(Exit::System, ""),
        _ => Failure::system(format!("Cannot write to standard output: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_sheep::{FakeSheep, SHIFT};
    use qemu_proto::opcode::Opcode;

    const COUNT: usize = 30;

    /// A volume whose every third object is a hole.
    fn filled() -> FakeSheep {
        let fake = FakeSheep::start(COUNT as u64);
        let mut sheep = Sheep::connect(fake.target).expect("connected");
        let vdi = volume::find(&mut sheep, b"v", &Selector::CURRENT).expect("found");
        for index in (0..COUNT as u32).filter(|index| index % 3 != 2) {
            let data = vec![index as u8 + 1; 1 << SHIFT];
            let oid = qemu_proto::oid::Oid::data(vdi, index);
            requests::create_object(&mut sheep, oid, None, 0, &data).expect("created");
            requests::write_map_entry(&mut sheep, vdi, index).expect("entered");
        }
        fake.kept().counts.clear();
        fake
    }

    fn read(fake: &FakeSheep, offset: u64, length: u64) -> Result<Vec<u8>, Failure> {
        let volume = Volume::open(&mut Sheep::connect(fake.target)?, b"v", &Selector::CURRENT)?;
        let mut out = Vec::new();
        copy_out(fake.target, &volume, offset, length, &mut out, &mut Progress::hidden())?;
        Ok(out)
    }

    #[test]
    fn pieces_come_out_in_order_and_holes_are_not_asked_for() {
        let fake = filled();
        let out = read(&fake, 0, (COUNT as u64) << SHIFT).expect("read");
        let kept = fake.kept();
        assert!(out == kept.content(COUNT), "the content of the volume");
        // Header and map, and the twenty objects that exist.
        assert_eq!(kept.counts[&Opcode::ReadObj.code()], 22);
    }

    #[test]
    fn a_range_is_cut_out() {
        let fake = filled();
        let (offset, length) = ((1 << SHIFT) + 5, (3 << SHIFT) + 7);
        let out = read(&fake, offset as u64, length as u64).expect("read");
        assert!(out == fake.kept().content(COUNT)[offset..offset + length], "exactly the range");
        assert_eq!(read(&fake, 7, 0).expect("nothing to read"), b"");
    }

    #[test]
    fn a_lost_object_is_named() {
        let fake = filled();
        fake.kept().objects.remove(&0x0000_0001_0000_0004);
        let failure = read(&fake, 0, (COUNT as u64) << SHIFT).expect_err("an object is gone");
        let expected = "Failed to read object 0000000100000004 No object found\nFailed to read VDI";
        assert_eq!(failure, Failure::failed(expected));
    }

    #[test]
    fn an_unknown_name_gets_the_shared_text() {
        let fake = FakeSheep::start(1);
        let mut sheep = Sheep::connect(fake.target).expect("connected");
        let selector = Selector { tag: b"t".to_vec(), id: 0 };
        let failure = Volume::open(&mut sheep, b"w", &selector).expect_err("no such volume");
        let expected = "Failed to open VDI w (snapshot id: 0 snapshot tag: t): No VDI found";
        assert_eq!(failure, Failure::failed(expected));
    }

    #[test]
    fn a_damaged_header_is_an_error() {
        let fake = FakeSheep::start(1);
        fake.kept().objects.get_mut(&0x8000_0001_0000_0000).expect("the inode")[555] = 0;
        let failure = read(&fake, 0, 1).expect_err("objects of one byte");
        assert!(failure.message.starts_with("The inode 8000000100000000 is damaged"), "{failure}");
    }
}
