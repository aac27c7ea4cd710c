//! `dog vdi backup`
//!
//! The maps of the two snapshots say which objects differ; only those are read, both sides of them, and the part from the
//! first to the last changed sector is written. Several connections fetch; this thread writes, in order.

use std::collections::BTreeSet;
use std::io::{self, IsTerminal, Write};

use qemu_proto::oid::{Oid, VdiId};
use sheep_core::zeros::is_zero;

use super::increment::{Change, Hash, Increment, Moment, Record, Writer, hash_of};
use super::pieces::{Piece, pieces};
use super::volume::{self, Volume};
use super::{lanes, read};
use crate::args;
use crate::connect::{Sheep, Trouble};
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Selector, Target, shown};
use crate::progress::Progress;
use crate::report::Report;
use crate::requests::{self, Header};

/// Changes are told apart to this many bytes.
const SECTOR_BYTES: usize = 512;

/// Runs the command.
pub fn run(typed: &args::Backup, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let from = Selector::of(typed.from.as_deref())?;
    let to = Selector::of(typed.snapshot.word.as_deref())?;
    if from.is_current() || to.is_current() {
        return Err(Failure::usage("Please specify the '-F' and the '-s' option, with two snapshots"));
    }
    let out = io::stdout();
    if out.is_terminal() {
        let text = "Standard output is a terminal: give a file with > FILE, or a pipe";
        return Err(Failure::new(Exit::Usage, text));
    }
    let mut sheep = Sheep::connect(target)?;
    let from = Volume::open(&mut sheep, name, &from)?;
    let to = Volume::open(&mut sheep, name, &to)?;
    write_changes(target, &mut sheep, &from, &to, &mut out.lock())?;
    Ok(Report::silent())
}

fn write_changes(
    target: Target,
    sheep: &mut Sheep,
    from: &Volume,
    to: &Volume,
    out: &mut impl Write,
) -> Result<(), Failure> {
    let (shift, size_bytes) = (to.header.shift, to.header.size_bytes);
    if from.header.shift != shift || from.header.size_bytes > size_bytes {
        return Err(Failure::failed(format!(
            "The later snapshot of VDI {} is smaller than the earlier one, or has objects of another size: what changed \
             between them cannot be said; write it whole, with 'dog vdi read'",
            shown(&to.header.name)
        )));
    }
    let increment = Increment {
        name: to.header.name.clone(),
        shift,
        size_bytes,
        base: fingerprint(sheep, from)?,
        from: moment(&from.header),
        to: moment(&to.header),
    };
    let changed = (0_u32..).zip(&to.map).filter(|&(index, &owner)| owner_in(from, index) != owner);
    let changed = changed.map(|(index, &owner)| (index, owner));
    let mut progress = Progress::new((changed.clone().count() as u64) << shift);
    let jobs = changed.flat_map(|(index, owner)| {
        // One record is enough to say that there is nothing.
        let count = if owner == 0 { 1 } else { usize::MAX };
        pieces(u64::from(index) << shift, 1 << shift, shift).take(count)
    });
    let compare = |sheep: &mut Sheep, piece: Piece| {
        let record = compare(sheep, from, to, piece);
        record
            .map(|record| (piece, record))
            .map_err(|(oid, trouble)| volume::not_read(oid, trouble).then("Failed to back VDI up"))
    };
    let mut writer = Writer::new(out, &increment).map_err(|error| read::not_printed(&error))?;
    lanes::in_order(target, &jobs, compare, |(piece, record)| {
        if let Some(record) = record {
            writer.put(&record).map_err(|error| read::not_printed(&error))?;
        }
        progress.advance(if to.object(piece.index).is_some() { piece.length as u64 } else { 1 << shift });
        Ok(())
    })?;
    writer.finish().map_err(|error| read::not_printed(&error))
}

fn owner_in(volume: &Volume, index: u32) -> u32 {
    volume.map.get(index as usize).copied().unwrap_or(0)
}

fn moment(header: &Header) -> Moment {
    Moment {
        vdi: header.vdi.get(),
        snapshot_id: header.snapshot_id,
        create_time: header.create_time,
        tag: header.tag.clone(),
    }
}

/// What a snapshot holds, in one number: which objects, and of which VDIs. Snapshots with the same one have the same content,
/// because objects of snapshots never change; and no two clusters make VDIs of one id in the same nanosecond.
pub fn fingerprint(sheep: &mut Sheep, snapshot: &Volume) -> Result<Hash, Failure> {
    let used = snapshot.map.iter().rposition(|&owner| owner != 0).map_or(0, |last| last + 1);
    let map = &snapshot.map[..used];
    let owners: BTreeSet<u32> = map.iter().copied().filter(|&owner| owner != 0).collect();
    let mut bytes = vec![snapshot.header.shift];
    bytes.extend((map.len() as u64).to_le_bytes());
    bytes.extend(map.iter().flat_map(|owner| owner.to_le_bytes()));
    for owner in owners {
        let vdi = VdiId::from_low_bits(owner);
        // Also of a VDI that was deleted: its objects live on in the snapshot.
        let header = requests::read_header(sheep, vdi)
            .map_err(|trouble| volume::not_read(Oid::inode(vdi), trouble).then("Failed to read inode header"))?;
        bytes.extend(owner.to_le_bytes());
        bytes.extend(header.create_time.to_le_bytes());
    }
    Ok(hash_of(&bytes))
}

/// What changed in one place; `None` if nothing did.
fn compare(sheep: &mut Sheep, from: &Volume, to: &Volume, piece: Piece) -> Result<Option<Record>, (Oid, Trouble)> {
    let Some(new) = to.object(piece.index) else {
        return Ok(Some(Record { index: piece.index, offset: 0, before: Hash::default(), change: Change::Removed }));
    };
    let mut content = |oid: Oid| {
        requests::read_object(sheep, oid, piece.offset, piece.length as u32).map_err(|trouble| (oid, trouble))
    };
    let after = content(new)?;
    let before = from.object(piece.index).map_or_else(|| Ok(vec![0; piece.length]), content)?;
    Ok(difference(piece, &before, &after))
}

fn difference(piece: Piece, before: &[u8], after: &[u8]) -> Option<Record> {
    assert!(before.len() == piece.length && after.len() == piece.length, "both sides of one piece");
    let mut sectors = before.chunks(SECTOR_BYTES).zip(after.chunks(SECTOR_BYTES));
    let first = sectors.clone().position(|(before, after)| before != after)?;
    let last = sectors.rposition(|(before, after)| before != after)?;
    let range = first * SECTOR_BYTES..((last + 1) * SECTOR_BYTES).min(piece.length);
    let offset = piece.offset as u32 + range.start as u32;
    let (before, after) = (&before[range.clone()], &after[range]);
    let change = if is_zero(after) { Change::Zeros(after.len() as u32) } else { Change::Data(after.to_vec()) };
    Some(Record { index: piece.index, offset, before: hash_of(before), change })
}

#[cfg(test)]
mod tests {
    use super::super::increment::Reader;
    use super::*;
    use crate::fake_sheep::{FakeSheep, SHIFT};

    const COUNT: u64 = 6;

    fn write(fake: &FakeSheep, index: u32, data: &[u8]) {
        let mut sheep = Sheep::connect(fake.target).expect("connected");
        let vdi = VdiId::from_low_bits(fake.kept().current);
        requests::create_object(&mut sheep, Oid::data(vdi, index), None, 0, data).expect("created");
        requests::write_map_entry(&mut sheep, vdi, index).expect("entered");
    }

    fn opened(fake: &FakeSheep) -> Volume {
        let mut sheep = Sheep::connect(fake.target).expect("connected");
        Volume::open(&mut sheep, b"v", &Selector::CURRENT).expect("opened")
    }

    #[test]
    fn only_what_changed_is_read_and_written() {
        let fake = FakeSheep::start(COUNT);
        let object = |byte: u8| vec![byte; 1 << SHIFT];
        for index in 0..4 {
            write(&fake, index, &object(index as u8 + 1));
        }
        let from = opened(&fake);
        fake.kept().snapshot();
        let mut changed = object(2);
        changed[700..2000].fill(9);
        write(&fake, 1, &changed);
        write(&fake, 2, &object(0));
        write(&fake, 3, &object(4));
        write(&fake, 5, &object(0));
        let mut to = opened(&fake);
        to.map[0] = 0;
        fake.kept().counts.clear();
        let mut out = Vec::new();
        let mut sheep = Sheep::connect(fake.target).expect("connected");
        write_changes(fake.target, &mut sheep, &from, &to, &mut out).expect("written");
        let mut reader = Reader::new(&out[..]).expect("a stream");
        let increment = reader.increment().clone();
        assert_eq!((increment.name.as_slice(), increment.size_bytes), (&b"v"[..], COUNT << SHIFT));
        assert_eq!((increment.from.vdi, increment.to.vdi), (1, 2));
        assert_eq!(increment.base, fingerprint(&mut sheep, &from).expect("read"));
        let mut records = Vec::new();
        while let Some(record) = reader.next_record().expect("undamaged") {
            records.push(record);
        }
        let removed = Record { index: 0, offset: 0, before: Hash::default(), change: Change::Removed };
        let part = Record {
            index: 1,
            offset: 512,
            before: hash_of(&[2; 1536]),
            change: Change::Data(changed[512..2048].to_vec()),
        };
        let zeros = Record { index: 2, offset: 0, before: hash_of(&object(3)), change: Change::Zeros(1 << SHIFT) };
        assert_eq!(records, [removed, part, zeros], "what was written with what it held before is no change");
        let reads = fake.kept().counts[&qemu_proto::opcode::Opcode::ReadObj.code()];
        assert_eq!(reads, 2 + 7, "two headers for two fingerprints; three objects on both sides, one on one");
    }

    #[test]
    fn a_fingerprint_tells_contents_apart() {
        let fake = FakeSheep::start(COUNT);
        let mut sheep = Sheep::connect(fake.target).expect("connected");
        let empty = fingerprint(&mut sheep, &opened(&fake)).expect("read");
        write(&fake, 1, b"x");
        let volume = opened(&fake);
        let one = fingerprint(&mut sheep, &volume).expect("read");
        assert_ne!(one, empty);
        let mut grown = volume.clone();
        grown.map.push(0);
        assert_eq!(fingerprint(&mut sheep, &grown), Ok(one), "holes at the end are nothing");
        let mut moved = volume;
        moved.map.swap(1, 2);
        assert_ne!(fingerprint(&mut sheep, &moved), Ok(one));
        // The same id in another cluster.
        fake.kept().objects.get_mut(&0x8000_0001_0000_0000).expect("the inode")[512] ^= 1;
        assert_ne!(fingerprint(&mut sheep, &opened(&fake)), Ok(one));
    }

    #[test]
    fn a_difference_begins_and_ends_with_a_sector() {
        let piece = Piece { start: 0, index: 3, offset: 4 << 20, length: 2048 };
        let before = [1; 2048];
        assert_eq!(difference(piece, &before, &before), None);
        let mut after = before;
        after[2047] = 0;
        let record = difference(piece, &before, &after).expect("one byte");
        assert_eq!((record.index, record.offset), (3, (4 << 20) + 1536));
        assert_eq!(record.change, Change::Data(after[1536..].to_vec()));
        after[1536..].fill(0);
        let record = difference(piece, &before, &after).expect("a sector");
        assert_eq!((record.change, record.before), (Change::Zeros(512), hash_of(&[1; 512])));
    }
}
