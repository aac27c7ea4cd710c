//! `dog vdi restore`
//!
//! The changes go into a VDI that nobody else finds, made from the snapshot that they begin at; once the end of the stream
//! has proved that all of it is right, one request makes that VDI the newest snapshot. This thread reads standard input;
//! several lanes, each with its own connection, write.
//!
//! Always holds:
//! 1. Whatever fails, and whenever this program is killed: the volume and its snapshots are what they were. What was written
//!    until then goes away with the connection.
//! 2. No byte is written before its checksum is known to be right.
//! 3. All records of one object go through the same lane, in order, so an object is created once.

use std::io::{self, IsTerminal, Read};
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;

use qemu_proto::oid::{Oid, VdiId};
use sheep_core::zeros::is_zero;

use super::increment::{Change, Hash, Increment, Reader, Record, StreamError, hash_of};
use super::lanes::LANES_MAX;
use super::volume::{self, Volume};
use super::{backup, delete};
use crate::args;
use crate::connect::{Sheep, Trouble};
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Selector, Target, shown};
use crate::progress::Progress;
use crate::report::Report;
use crate::requests;

/// Records that wait in front of each lane.
const WAITING_MAX: usize = 1;

/// Runs the command.
pub fn run(typed: &args::Restore, target: Target) -> Result<Report, Failure> {
    let name = meaning::vdi_name(&typed.vdi)?;
    let selector = Selector::of(typed.snapshot.word.as_deref())?;
    delete::check_pacing(typed.nr_batched_reclamation.as_deref(), typed.reclamation_interval.as_deref())?;
    if selector.is_current() {
        return Err(Failure::usage("Please specify the '-s' option"));
    }
    let input = io::stdin();
    if input.is_terminal() {
        return Err(Failure::new(Exit::Usage, "stdin must be pipe: give what 'dog vdi backup' wrote with < FILE"));
    }
    let mut sheep = Sheep::connect(target)?;
    let base = Volume::open(&mut sheep, name, &selector)?;
    let vdi = put_together(target, &mut sheep, &base, typed.force, input.lock())
        .map_err(|failure| failure.then(&format!("Nothing of VDI {} was changed", shown(name))))?;
    requests::finish_restore(&mut sheep, name, vdi).map_err(|trouble| {
        // Without an answer it may have been done.
        let line = format!("Nothing was lost; 'dog vdi list {}' shows whether there is another snapshot", shown(name));
        not_restored(name, trouble).then(&line)
    })?;
    let number = volume::read_header(&mut sheep, vdi)?.snapshot_id;
    Ok(Report::text(format!("VDI {}: snapshot {number} holds what was restored\n", shown(name))))
}

fn not_restored(name: &[u8], trouble: Trouble) -> Failure {
    trouble.or(|reason| Failure::failed(format!("Failed to restore VDI {}: {reason}", shown(name))))
}

/// Gives a VDI that holds what the stream leads to, all of it proved, and that nobody else finds.
fn put_together(
    target: Target,
    sheep: &mut Sheep,
    base: &Volume,
    force: bool,
    input: impl Read,
) -> Result<VdiId, Failure> {
    let reader = Reader::new(input).map_err(|error| not_understood(&error))?;
    let fingerprint = backup::fingerprint(sheep, base)?;
    check_base(reader.increment(), base, &fingerprint, force)?;
    let name = &base.header.name;
    let size_bytes = reader.increment().size_bytes;
    let begun = requests::begin_restore(sheep, name, base.header.vdi, size_bytes);
    let vdi = begun.map_err(|trouble| not_restored(name, trouble))?;
    let plan = Plan { vdi, base, checks: fingerprint != reader.increment().base };
    let applied = apply(target, &plan, reader);
    if applied.is_err() {
        // If this fails too, the end of the connection does it.
        let _ = requests::give_up_restore(sheep, name, vdi);
    }
    applied.map(|()| vdi)
}

fn not_understood(error: &StreamError) -> Failure {
    match error {
        StreamError::Io(_) => Failure::system(error.to_string()),
        _ => Failure::failed(error.to_string()),
    }
}

/// Fails unless the stream belongs on this snapshot.
fn check_base(increment: &Increment, base: &Volume, fingerprint: &Hash, force: bool) -> Result<(), Failure> {
    let header = &base.header;
    let wanted = format!(
        "The stream holds changes of VDI {} from snapshot {} ({}) on",
        shown(&increment.name),
        increment.from.snapshot_id,
        shown(&increment.from.tag)
    );
    if header.shift != increment.shift || header.size_bytes > increment.size_bytes {
        return Err(Failure::failed(format!(
            "{wanted}, with objects of 2^{} bytes and {} bytes in all; snapshot {} of VDI {} has 2^{} and {}",
            increment.shift,
            increment.size_bytes,
            header.snapshot_id,
            shown(&header.name),
            header.shift,
            header.size_bytes
        )));
    }
    // Everything that is empty looks alike: then the name decides.
    let is_told_apart = increment.name == header.name || base.objects().next().is_some();
    if force || (*fingerprint == increment.base && is_told_apart) {
        return Ok(());
    }
    Err(Failure::failed(format!(
        "{wanted}; snapshot {} of VDI {} is not that one, and does not share its objects\n\
         Give -f if you know that its content is the same",
        header.snapshot_id,
        shown(&header.name)
    )))
}

/// Where the records go.
struct Plan<'a> {
    /// The VDI that will be a snapshot.
    vdi: VdiId,
    /// What it was made from.
    base: &'a Volume,
    /// Whether the base may differ from the one that the stream begins at.
    checks: bool,
}

fn apply(target: Target, plan: &Plan<'_>, mut reader: Reader<impl Read>) -> Result<(), Failure> {
    let failed = Mutex::new(None);
    let read = thread::scope(|scope| {
        let mut senders: Vec<SyncSender<Record>> = Vec::with_capacity(LANES_MAX);
        for _ in 0..LANES_MAX {
            let (sender, receiver) = sync_channel(WAITING_MAX);
            let failed = &failed;
            scope.spawn(move || {
                if let Err(failure) = run_lane(target, plan, &receiver) {
                    // The first failure is the one to tell; a poisoned lock means another lane already panicked.
                    if let Ok(mut failed) = failed.lock() {
                        failed.get_or_insert(failure);
                    }
                }
            });
            senders.push(sender);
        }
        // How long the stream is, only its end tells: the bar shows how far in the volume it is.
        let total = reader.increment().size_bytes;
        let mut progress = Progress::new(total);
        let mut done = 0;
        while let Some(record) = reader.next_record().map_err(|error| not_understood(&error))? {
            let reached = (u64::from(record.index) << plan.base.header.shift) + u64::from(record.offset);
            progress.advance(reached - done);
            done = reached;
            if senders[record.index as usize % LANES_MAX].send(record).is_err() {
                break;
            }
        }
        progress.advance(total.saturating_sub(done));
        Ok(())
    });
    match failed.into_inner() {
        Ok(Some(failure)) => Err(failure.then("Failed to restore VDI")),
        Ok(None) | Err(_) => read,
    }
}

fn run_lane(target: Target, plan: &Plan<'_>, records: &Receiver<Record>) -> Result<(), Failure> {
    let mut lane: Option<Lane<'_>> = None;
    while let Ok(record) = records.recv() {
        // Few changes need one lane only: connect when there is something to do.
        let lane = match &mut lane {
            Some(lane) => lane,
            None => lane.insert(Lane { sheep: Sheep::connect(target)?, plan, made: None }),
        };
        lane.apply(record)?;
    }
    Ok(())
}

struct Lane<'a> {
    sheep: Sheep,
    plan: &'a Plan<'a>,
    /// The object that was made last: further records may be about it.
    made: Option<u32>,
}

impl Lane<'_> {
    fn apply(&mut self, record: Record) -> Result<(), Failure> {
        let Plan { vdi, base, checks } = *self.plan;
        let old = base.object(record.index);
        let data = match record.change {
            Change::Removed if old.is_none() => return Ok(()),
            Change::Removed => {
                return requests::clear_map_entry(&mut self.sheep, vdi, record.index)
                    .map_err(|trouble| volume::not_written(Oid::inode(vdi), trouble));
            }
            Change::Zeros(length) => vec![0; length as usize],
            Change::Data(data) => data,
        };
        if checks {
            self.check(old, record.index, record.offset, data.len(), &record.before)?;
        }
        let (oid, offset) = (Oid::data(vdi, record.index), u64::from(record.offset));
        let not_written = |trouble| volume::not_written(oid, trouble);
        if self.made == Some(record.index) {
            return requests::write_object(&mut self.sheep, oid, offset, &data).map_err(not_written);
        }
        if old.is_none() && is_zero(&data) {
            return Ok(());
        }
        // Of an object that is replaced whole nothing is left to copy.
        let source = old.filter(|_| data.len() as u64 != 1 << base.header.shift);
        requests::create_object(&mut self.sheep, oid, source, offset, &data).map_err(not_written)?;
        requests::write_map_entry(&mut self.sheep, vdi, record.index)
            .map_err(|trouble| volume::not_written(Oid::inode(vdi), trouble))?;
        self.made = Some(record.index);
        Ok(())
    }

    /// Fails unless the base has in this place what the stream expects there.
    fn check(
        &mut self,
        old: Option<Oid>,
        index: u32,
        offset: u32,
        length: usize,
        before: &Hash,
    ) -> Result<(), Failure> {
        let content = match old {
            Some(oid) => requests::read_object(&mut self.sheep, oid, u64::from(offset), length as u32)
                .map_err(|trouble| volume::not_read(oid, trouble))?,
            None => vec![0; length],
        };
        if hash_of(&content) == *before {
            return Ok(());
        }
        let header = &self.plan.base.header;
        Err(Failure::failed(format!(
            "Object {index} of snapshot {} of VDI {} is not what the stream begins at: it belongs on another snapshot",
            header.snapshot_id,
            shown(&header.name)
        )))
    }
}

#[cfg(test)]
mod tests {
    use super::super::increment::{Moment, Writer};
    use super::*;
    use crate::fake_sheep::{FakeSheep, SHIFT};
    use crate::requests::Header;

    const COUNT: u64 = 12;

    fn increment() -> Increment {
        Increment {
            name: b"v".to_vec(),
            shift: SHIFT,
            size_bytes: COUNT << SHIFT,
            base: [1; 32],
            from: Moment { snapshot_id: 3, tag: b"monday".to_vec(), ..Moment::default() },
            to: Moment::default(),
        }
    }

    fn volume(name: &[u8], map: Vec<u32>) -> Volume {
        let header = Header { name: name.to_vec(), shift: SHIFT, size_bytes: COUNT << SHIFT, ..Header::default() };
        Volume { header, map }
    }

    #[test]
    fn a_stream_belongs_on_what_it_begins_at() {
        let good = |base: &Volume, fingerprint| check_base(&increment(), base, &fingerprint, false);
        assert_eq!(good(&volume(b"v", vec![1]), [1; 32]), Ok(()));
        assert_eq!(good(&volume(b"a clone", vec![1]), [1; 32]), Ok(()));
        assert_eq!(good(&volume(b"v", vec![0]), [1; 32]), Ok(()));
        let failure = good(&volume(b"another empty one", vec![0]), [1; 32]).expect_err("another volume");
        assert!(
            failure.message.starts_with("The stream holds changes of VDI v from snapshot 3 (monday) on"),
            "{failure}"
        );
        let failure = good(&volume(b"v", vec![1]), [2; 32]).expect_err("another snapshot");
        assert!(failure.message.contains("Give -f"), "{failure}");
        assert_eq!(check_base(&increment(), &volume(b"w", vec![1]), &[2; 32], true), Ok(()));
        let mut other = volume(b"v", vec![1]);
        other.header.shift = SHIFT + 1;
        check_base(&increment(), &other, &[1; 32], true).expect_err("objects of another size");
        let mut larger = volume(b"v", vec![1]);
        larger.header.size_bytes += 1;
        check_base(&increment(), &larger, &[1; 32], true).expect_err("more than the stream knows of");
    }

    fn record(index: u32, offset: u32, before: &[u8], change: Change) -> Record {
        Record { index, offset, before: hash_of(before), change }
    }

    fn stream(records: &[Record]) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut writer = Writer::new(&mut bytes, &increment()).expect("memory");
        for record in records {
            writer.put(record).expect("memory");
        }
        writer.finish().expect("memory");
        bytes
    }

    /// A volume with four full objects that became a snapshot, and the VDI that goes on from it, which stands for the one
    /// that is restored into.
    fn begun() -> (FakeSheep, Volume) {
        let fake = FakeSheep::start(COUNT);
        let mut sheep = Sheep::connect(fake.target).expect("connected");
        let first = VdiId::from_low_bits(1);
        for index in 0..4 {
            let data = vec![index as u8 + 1; 1 << SHIFT];
            requests::create_object(&mut sheep, Oid::data(first, index), None, 0, &data).expect("created");
            requests::write_map_entry(&mut sheep, first, index).expect("entered");
        }
        let base = Volume::open(&mut sheep, b"v", &Selector::CURRENT).expect("opened");
        fake.kept().snapshot();
        (fake, base)
    }

    fn applied(fake: &FakeSheep, base: &Volume, checks: bool, bytes: &[u8]) -> Result<(), Failure> {
        let plan = Plan { vdi: VdiId::from_low_bits(2), base, checks };
        apply(fake.target, &plan, Reader::new(bytes).expect("a header"))
    }

    #[test]
    fn what_the_stream_says_is_there_afterwards() {
        let whole = 1 << SHIFT;
        let records = [
            record(0, 512, &[1; 512], Change::Data(vec![9; 512])),
            record(0, 4096, &[1; 512], Change::Zeros(512)),
            record(1, 0, &[], Change::Removed),
            record(2, 0, &vec![3; whole], Change::Data(vec![8; whole])),
            record(5, 0, &vec![0; whole], Change::Zeros(whole as u32)),
            record(6, 1024, &[0; 512], Change::Data(vec![7; 512])),
            record(7, 0, &[], Change::Removed),
        ];
        for checks in [false, true] {
            let (fake, base) = begun();
            let mut expected = fake.kept().content(COUNT as usize);
            applied(&fake, &base, checks, &stream(&records)).expect("applied");
            expected[512..1024].fill(9);
            expected[4096..4608].fill(0);
            expected[whole..2 * whole].fill(0);
            expected[2 * whole..3 * whole].fill(8);
            expected[6 * whole + 1024..6 * whole + 1536].fill(7);
            let kept = fake.kept();
            assert!(kept.content(COUNT as usize) == expected, "checks: {checks}");
            assert_eq!(kept.map(8), [2, 0, 2, 1, 0, 0, 2, 0], "what did not change is shared");
        }
    }

    #[test]
    fn a_base_with_another_content_is_refused_when_it_is_looked_at() {
        let (fake, base) = begun();
        let bytes = stream(&[record(3, 512, &[5; 512], Change::Data(vec![9; 512]))]);
        let failure = applied(&fake, &base, true, &bytes).expect_err("other content");
        assert!(failure.message.starts_with("Object 3 of snapshot"), "{failure}");
        assert_eq!(fake.kept().map(4), [1; 4]);
    }

    #[test]
    fn a_stream_without_its_end_is_not_applied() {
        let (fake, base) = begun();
        let bytes = stream(&[record(3, 512, &[4; 512], Change::Data(vec![9; 512]))]);
        let failure = applied(&fake, &base, false, &bytes[..bytes.len() - 1]).expect_err("no end");
        assert_eq!(failure, Failure::failed("The stream is not complete: its end is missing"));
    }
}
