//! `dog vdi write`
//!
//! This thread reads standard input; several lanes, each with its own connection, write.
//!
//! Always holds:
//! 1. All pieces of one object go through the same lane, in order, so an object is created once.
//! 2. An object's data is durable before the map names it: an interruption leaves whole pieces written or not.
//! 3. Zeros for a hole are not written, and the hole stays one.
//! 4. When somebody makes a snapshot meanwhile, writing goes on in the new working VDI.

use std::io::{self, Read};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use qemu_proto::oid::{Oid, VdiId};
use qemu_proto::status::Status;
use sheep_core::zeros::is_zero;

use super::lanes::LANES_MAX;
use super::pieces::{Piece, pieces};
use super::volume::{self, Volume};
use crate::args;
use crate::connect::{Sheep, Trouble};
use crate::exit::Failure;
use crate::meaning::{self, Selector, Target, shown};
use crate::progress::Progress;
use crate::report::Report;
use crate::requests;

/// Pieces that wait in front of each lane.
const WAITING_MAX: usize = 1;

type Filled = (Piece, Vec<u8>);

/// Runs the command.
pub fn run(typed: &args::Write, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let offset = typed.offset.as_deref().map_or(Ok(0), meaning::size)?;
    let length = typed.length.as_deref().map(meaning::size).transpose()?;
    let volume = Volume::open(&mut Sheep::connect(target)?, name, &Selector::CURRENT)?;
    let size_bytes = volume.header.size_bytes;
    let room =
        size_bytes.checked_sub(offset).ok_or_else(|| Failure::failed("Write offset is beyond the end of the VDI"))?;
    let total = length.unwrap_or(room).min(room);
    let mut input = io::stdin().lock();
    copy_in(target, name, &volume, &mut input, &Range { offset, total, pads: length.is_some() })?;
    let may_be_more = length.is_none_or(|length| length > room);
    if may_be_more && read_full(&mut input, &mut [0])? > 0 {
        return Err(Failure::failed(format!(
            "The input continues beyond the end of VDI {} ({size_bytes} bytes): everything before is written; \
             enlarge it with 'dog vdi resize', or give a length",
            shown(name)
        )));
    }
    Ok(Report::silent())
}

/// What to write.
struct Range {
    offset: u64,
    total: u64,
    /// Whether missing input is written as zeros.
    pads: bool,
}

fn copy_in(target: Target, name: &[u8], volume: &Volume, input: &mut impl Read, range: &Range) -> Result<(), Failure> {
    let failed = Mutex::new(None);
    let shift = volume.header.shift;
    let wanted = pieces(range.offset, range.total, shift);
    let lane_count = wanted.clone().take(LANES_MAX).count();
    let read = thread::scope(|scope| {
        let mut senders: Vec<SyncSender<Filled>> = Vec::with_capacity(lane_count);
        for _ in 0..lane_count {
            let (sender, receiver) = sync_channel(WAITING_MAX);
            let failed = &failed;
            scope.spawn(move || {
                if let Err(failure) = run_lane(target, name, volume, &receiver) {
                    // The first failure is the one to tell; a poisoned lock means another lane already panicked.
                    if let Ok(mut failed) = failed.lock() {
                        failed.get_or_insert(failure);
                    }
                }
            });
            senders.push(sender);
        }
        let mut progress = Progress::new(range.total);
        feed(input, wanted, range.pads, |piece, data| {
            progress.advance(data.len() as u64);
            let lane = piece.index as usize % senders.len();
            senders[lane].send((piece, data)).is_ok()
        })
    });
    match failed.into_inner() {
        Ok(Some(failure)) => Err(failure.then("Failed to write VDI")),
        Ok(None) | Err(_) => read,
    }
}

/// Reads the input piece by piece until its end, or the end of the range, or `put` refuses one.
fn feed(
    input: &mut impl Read,
    pieces: impl Iterator<Item = Piece>,
    pads: bool,
    mut put: impl FnMut(Piece, Vec<u8>) -> bool,
) -> Result<(), Failure> {
    let mut is_ended = false;
    for mut piece in pieces {
        let mut data = vec![0; piece.length];
        if !is_ended {
            let count = read_full(input, &mut data)?;
            is_ended = count < piece.length;
            if is_ended && !pads {
                piece.length = count;
                data.truncate(count);
            }
        } else if !pads {
            break;
        }
        if piece.length > 0 && !put(piece, data) {
            break;
        }
    }
    Ok(())
}

/// Fills the buffer unless the input ends before; tells how much there was.
fn read_full(input: &mut impl Read, buffer: &mut [u8]) -> Result<usize, Failure> {
    let mut count = 0;
    while count < buffer.len() {
        match input.read(&mut buffer[count..]) {
            Ok(0) => break,
            Ok(more) => count += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Failure::system(format!("Cannot read standard input: {error}"))),
        }
    }
    Ok(count)
}

fn run_lane(target: Target, name: &[u8], volume: &Volume, pieces: &Receiver<Filled>) -> Result<(), Failure> {
    let mut lane: Option<Lane<'_>> = None;
    while let Ok((piece, data)) = pieces.recv() {
        // Small inputs need one lane only: connect when there is something to do.
        let lane = match &mut lane {
            Some(lane) => lane,
            None => lane.insert(Lane { sheep: Sheep::connect(target)?, name, volume: volume.clone() }),
        };
        lane.write(piece, &data)?;
    }
    Ok(())
}

struct Lane<'a> {
    sheep: Sheep,
    name: &'a [u8],
    /// As this lane knows it: its own creations are entered.
    volume: Volume,
}

impl Lane<'_> {
    fn write(&mut self, piece: Piece, data: &[u8]) -> Result<(), Failure> {
        assert!(data.len() == piece.length, "a piece is filled");
        match self.try_write(piece, data) {
            Err((_, trouble)) if trouble.is(Status::Readonly) => {}
            outcome => return outcome.map_err(|(oid, trouble)| volume::not_written(oid, trouble)),
        }
        // It has become a snapshot: the name now leads to the VDI that goes on from it.
        let before = self.volume.header.vdi;
        self.volume = Volume::open(&mut self.sheep, self.name, &Selector::CURRENT)?;
        if self.volume.header.vdi == before {
            let text = format!("VDI {} ({before}) cannot be written: it is read-only", shown(self.name));
            return Err(Failure::failed(text));
        }
        self.try_write(piece, data).map_err(|(oid, trouble)| volume::not_written(oid, trouble))
    }

    fn try_write(&mut self, piece: Piece, data: &[u8]) -> Result<(), (Oid, Trouble)> {
        let vdi = self.volume.header.vdi;
        let oid = Oid::data(vdi, piece.index);
        let object_bytes = 1_u64 << self.volume.header.shift;
        let done = match step(vdi, self.volume.object(piece.index), piece, object_bytes, data) {
            Step::Nothing => return Ok(()),
            Step::Write => {
                return requests::write_object(&mut self.sheep, oid, piece.offset, data)
                    .map_err(|trouble| (oid, trouble));
            }
            Step::Create(source) => requests::create_object(&mut self.sheep, oid, source, piece.offset, data),
        };
        done.map_err(|trouble| (oid, trouble))?;
        requests::write_map_entry(&mut self.sheep, vdi, piece.index).map_err(|trouble| (Oid::inode(vdi), trouble))?;
        let entry = self.volume.map.get_mut(piece.index as usize);
        *entry.expect("pieces are inside the volume") = vdi.get();
        Ok(())
    }
}

/// What a piece needs.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Step {
    /// Zeros in a hole.
    Nothing,
    /// The object is the volume's own.
    Write,
    /// The object is made, from zeros or from a copy, and entered into the map.
    Create(Option<Oid>),
}

fn step(vdi: VdiId, object: Option<Oid>, piece: Piece, object_bytes: u64, data: &[u8]) -> Step {
    match object {
        None if is_zero(data) => Step::Nothing,
        None => Step::Create(None),
        Some(oid) if oid.vid() == vdi => Step::Write,
        // Nothing of the shared object would be left.
        Some(_) if piece.length as u64 == object_bytes => Step::Create(None),
        Some(oid) => Step::Create(Some(oid)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_sheep::{FakeSheep, SHIFT};

    fn fed(input: &[u8], offset: u64, total: u64, pads: bool) -> Vec<(u32, u64, Vec<u8>)> {
        let mut put = Vec::new();
        feed(&mut &*input, pieces(offset, total, 20), pads, |piece, data| {
            put.push((piece.index, piece.offset, data));
            true
        })
        .expect("reading memory");
        put
    }

    #[test]
    fn without_a_length_only_the_input_is_written() {
        assert_eq!(fed(b"hi\n", 0, 4 << 20, false), [(0, 0, b"hi\n".to_vec())]);
        assert_eq!(fed(b"", 0, 4 << 20, false), []);
        let whole = fed(&vec![1; 1 << 20], 0, 4 << 20, false);
        assert_eq!(whole, [(0, 0, vec![1; 1 << 20])], "input that ends with an object touches no other");
    }

    #[test]
    fn with_a_length_missing_input_is_zeros() {
        assert_eq!(fed(b"hi", 5, 4, true), [(0, 5, b"hi\0\0".to_vec())]);
        let padded = fed(b"hi", (1 << 20) - 4, 6, true);
        assert_eq!(padded, [(0, (1 << 20) - 4, b"hi\0\0".to_vec()), (1, 0, b"\0\0".to_vec())]);
    }

    #[test]
    fn input_stops_at_the_end_of_the_range() {
        assert_eq!(fed(b"hello", 0, 3, true), [(0, 0, b"hel".to_vec())]);
    }

    #[test]
    fn every_kind_of_object_has_its_step() {
        let vdi = VdiId::from_low_bits(9);
        let own = Oid::data(vdi, 3);
        let shared = Oid::data(VdiId::from_low_bits(8), 3);
        let part = Piece { start: 3 << 20, index: 3, offset: 0, length: 512 };
        let whole = Piece { length: 1 << 20, ..part };
        let object_bytes = 1 << 20;
        assert_eq!(step(vdi, None, part, object_bytes, &[0; 512]), Step::Nothing);
        assert_eq!(step(vdi, None, part, object_bytes, &[1; 512]), Step::Create(None));
        assert_eq!(step(vdi, Some(own), part, object_bytes, &[0; 512]), Step::Write);
        assert_eq!(step(vdi, Some(shared), part, object_bytes, &[0; 512]), Step::Create(Some(shared)));
        assert_eq!(step(vdi, Some(shared), whole, object_bytes, &vec![0; 1 << 20]), Step::Create(None));
    }

    const COUNT: u64 = 20;

    fn written(fake: &FakeSheep, input: &[u8], offset: u64, total: u64, pads: bool) -> Result<(), Failure> {
        let volume = Volume::open(&mut Sheep::connect(fake.target)?, b"v", &Selector::CURRENT)?;
        copy_in(fake.target, b"v", &volume, &mut &*input, &Range { offset, total, pads })
    }

    fn pattern(length: usize) -> Vec<u8> {
        (0..length).map(|at| (at % 251) as u8 + 1).collect()
    }

    #[test]
    fn what_is_written_is_there_and_zeros_take_no_space() {
        let fake = FakeSheep::start(COUNT);
        let mut input = pattern(12 << SHIFT);
        input[3 << SHIFT..5 << SHIFT].fill(0);
        written(&fake, &input, 1 << SHIFT, 19 << SHIFT, false).expect("written");
        let kept = fake.kept();
        assert_eq!(kept.map(COUNT as usize)[..16], [0, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]);
        let content = kept.content(COUNT as usize);
        assert!(content[1 << SHIFT..13 << SHIFT] == input[..], "the input is where it belongs");
        assert!(content[13 << SHIFT..].iter().all(|&byte| byte == 0), "nothing follows it");
    }

    #[test]
    fn a_write_changes_only_its_own_bytes() {
        let fake = FakeSheep::start(COUNT);
        written(&fake, &pattern(2 << SHIFT), 0, COUNT << SHIFT, false).expect("written");
        let mut expected = fake.kept().content(2);
        fake.kept().snapshot();
        let at = (1 << SHIFT) - 2;
        written(&fake, b"abcd", at as u64, 4, true).expect("written");
        expected[at..at + 4].copy_from_slice(b"abcd");
        let kept = fake.kept();
        assert_eq!(kept.map(3), [2, 2, 0], "both objects were copied");
        assert!(kept.content(2) == expected, "all other bytes came from the snapshot");
    }

    #[test]
    fn writing_goes_on_when_a_snapshot_is_made() {
        let fake = FakeSheep::start(COUNT);
        fake.kept().snapshot_after = Some(5);
        let input = pattern((COUNT << SHIFT) as usize);
        written(&fake, &input, 0, COUNT << SHIFT, false).expect("written");
        let kept = fake.kept();
        assert_eq!(kept.current, 2, "the snapshot was made in the middle");
        assert!(kept.content(COUNT as usize) == input, "nothing is lost");
    }

    #[test]
    fn a_failed_write_names_the_object() {
        let fake = FakeSheep::start(COUNT);
        let volume = Volume::open(&mut Sheep::connect(fake.target).expect("connected"), b"v", &Selector::CURRENT);
        let mut volume = volume.expect("opened");
        volume.map[3] = 1;
        let range = Range { offset: 3 << SHIFT, total: 4, pads: true };
        let failure = copy_in(fake.target, b"v", &volume, &mut &b"abcd"[..], &range).expect_err("no such object");
        let expected = "Failed to write object 0000000100000003: No object found\nFailed to write VDI";
        assert_eq!(failure, Failure::failed(expected));
    }
}
