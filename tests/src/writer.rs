//! A guest that remembers what it was promised.
//!
//! [`write_until`] keeps many 4 KiB writes in flight on one connection, the way QEMU does: a write to a hole creates
//! the object and then records it in the map, a write to a snapshot's object copies it. The [`Ledger`] holds, for each
//! sector, the oldest write that may be seen and the newest that was ever sent; [`Ledger::verify`] reads everything
//! back and compares.
//!
//! Always holds:
//! 1. A block has at most one write in flight, so a later sequence number is a later write.
//! 2. Unknown outcomes stay unknown: a write whose answer never came may be seen or not, and nothing else.
//! 3. What a reader has seen is a promise too (P2): after a check, no older content may appear.

use std::collections::{HashMap, HashSet, VecDeque};
use std::io;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use qemu_proto::oid::{Oid, VdiId};

use crate::clients::{Answer, Client, MAP_OFFSET, Request, Volume, flag, opcode, result};
use crate::sectors::{BLOCK_BYTES, SECTOR_BYTES, SECTORS_PER_BLOCK, block_content, sector_sequence};
use crate::sim::Random;

/// What one sector was promised.
#[derive(Clone, Copy, Default, Debug)]
struct Promise {
    /// The newest write that was acknowledged.
    acknowledged: u64,
    /// The newest write that was acknowledged as durable.
    durable: u64,
    /// The newest write that was sent.
    sent: u64,
}

/// Against which promise a read is checked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum After {
    /// Any number of processes up to `copies - 1` died: every acknowledged write is there.
    ProcessCrash,
    /// All nodes lost power at once: every write acknowledged as durable is there.
    PowerLoss,
}

/// Everything that was written to one volume and what came of it.
pub struct Ledger {
    salt: u64,
    promises: Vec<Promise>,
    sequence: u64,
}

/// What [`Ledger::verify`] read: the write that each sector comes from.
#[derive(PartialEq, Eq)]
pub struct Seen(Vec<u64>);

impl Ledger {
    /// For an empty volume of `size_bytes`, a multiple of 4 KiB. `salt` tells its content from that of all others.
    pub fn new(size_bytes: u64, salt: u64) -> Ledger {
        assert!(size_bytes.is_multiple_of(BLOCK_BYTES as u64), "whole blocks");
        Ledger { salt, promises: vec![Promise::default(); (size_bytes / SECTOR_BYTES as u64) as usize], sequence: 0 }
    }

    fn block_count(&self) -> u64 {
        (self.promises.len() / SECTORS_PER_BLOCK) as u64
    }

    fn sectors_of(&mut self, block: u64) -> &mut [Promise] {
        let first = block as usize * SECTORS_PER_BLOCK;
        &mut self.promises[first..first + SECTORS_PER_BLOCK]
    }

    fn send(&mut self, block: u64) -> u64 {
        self.sequence += 1;
        let sequence = self.sequence;
        for sector in self.sectors_of(block) {
            sector.sent = sequence;
        }
        sequence
    }

    fn acknowledge(&mut self, block: u64, sequence: u64, is_durable: bool) {
        for sector in self.sectors_of(block) {
            assert!(sequence <= sector.sent, "acknowledged before it was sent");
            sector.acknowledged = sector.acknowledged.max(sequence);
            if is_durable {
                sector.durable = sector.durable.max(sequence);
            }
        }
    }

    /// Reads the volume through `client` and fails, with a list, on the first broken promises.
    pub fn verify(&self, client: &mut Client, name: &str, after: After) -> Result<Seen> {
        const SHOWN_MAX: usize = 10;
        let volume = Volume::open(client, name, "")?;
        ensure!(
            volume.size_bytes == (self.promises.len() * SECTOR_BYTES) as u64,
            "{name} has {} bytes",
            volume.size_bytes
        );
        let mut seen = Vec::with_capacity(self.promises.len());
        let mut broken = Vec::new();
        volume.read_all(client, |_, bytes| {
            for sector in bytes.chunks_exact(SECTOR_BYTES) {
                let index = seen.len();
                let promise = self.promises[index];
                let oldest = if after == After::PowerLoss { promise.durable } else { promise.acknowledged };
                match sector_sequence(sector, self.salt, index as u64) {
                    Ok(sequence) if (oldest..=promise.sent).contains(&sequence) => seen.push(sequence),
                    Ok(sequence) => {
                        broken.push(format!("sector {index}: write {sequence}, promised {promise:?}"));
                        seen.push(sequence);
                    }
                    Err(error) => {
                        broken.push(format!("{error:#}"));
                        seen.push(0);
                    }
                }
            }
            Ok(())
        })?;
        let count = broken.len();
        broken.truncate(SHOWN_MAX);
        ensure!(count == 0, "{count} sectors of {name} break their promise after a {after:?}:\n{}", broken.join("\n"));
        Ok(Seen(seen))
    }

    /// Takes what was read as promised from now on; see invariant 3 at the top.
    pub fn hold_to(&mut self, seen: &Seen) {
        for (promise, &sequence) in self.promises.iter_mut().zip(&seen.0) {
            promise.acknowledged = sequence;
            promise.durable = sequence;
        }
    }

    /// How many blocks hold sectors of different writes: torn by a crash, which only unacknowledged writes may be.
    pub fn torn_count(&self, seen: &Seen) -> usize {
        let blocks = seen.0.chunks_exact(SECTORS_PER_BLOCK);
        blocks.filter(|block| block.iter().any(|sequence| *sequence != block[0])).count()
    }
}

/// What the guest asks of its writes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// Every acknowledgement means durable.
    WriteThrough,
    /// A flush, sent after this many acknowledged writes, makes them durable.
    WriteBack {
        /// Acknowledged writes between two flushes.
        flush_every: usize,
    },
}

/// How to write.
#[derive(Clone, Copy, Debug)]
pub struct WriterPlan {
    /// Writes in flight.
    pub depth: usize,
    /// See [`Durability`].
    pub durability: Durability,
    /// Decides the order of blocks.
    pub seed: u64,
}

/// What became of the writes.
#[derive(Clone, Copy, Default, Debug)]
pub struct Outcome {
    /// Writes that were acknowledged, maps and flushes not counted.
    pub acknowledged_count: u64,
    /// Flushes that were acknowledged.
    pub flush_count: u64,
    /// The longest time that any one write or flush took: what a guest sees as a stall.
    pub longest_stall: Duration,
    /// When that one was sent, counted from the beginning of the writing.
    pub stalled_at: Duration,
    /// Whether the connection ended before the writer was told to stop.
    pub is_cut: bool,
}

/// Where a write of one block stands.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Step {
    /// The data are on the way, to an object that exists and is ours.
    Overwrite,
    /// The data are on the way, with an order to create the object.
    Create,
    /// The object exists; its map entry is on the way.
    Map,
}

struct BlockWrite {
    block: u64,
    sequence: u64,
    started: Instant,
    step: Step,
    /// The id under which the data were sent; the volume may have moved on since.
    vdi: VdiId,
}

/// One volume under load: its writer's plan and its ledger.
pub struct Guest {
    /// The volume.
    pub name: String,
    /// What it was promised so far.
    pub ledger: Ledger,
    /// How it writes.
    pub plan: WriterPlan,
}

impl Guest {
    /// Creates the volume `name` through `client`; the seed also tells its content from that of other volumes.
    pub fn new(client: &mut Client, name: &str, size_bytes: u64, plan: WriterPlan) -> Result<Guest> {
        client.create_volume(name, size_bytes, 0, 22)?;
        Ok(Guest { name: name.to_owned(), ledger: Ledger::new(size_bytes, plan.seed), plan })
    }
}

/// Lets every guest write through the node at `port` while `meanwhile` runs, and until all of them have stopped.
///
/// Fails if `meanwhile` fails or any guest got an error for an answer; a cut connection is told in the outcome.
pub fn write_while(guests: &mut [Guest], port: u16, meanwhile: impl FnOnce() -> Result<()>) -> Result<Vec<Outcome>> {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let writers: Vec<_> = guests
            .iter_mut()
            .map(|guest| {
                let stop = &stop;
                scope.spawn(move || {
                    let client = Client::tcp(port)?;
                    write_until(client, &guest.name, &mut guest.ledger, guest.plan, stop)
                        .with_context(|| format!("guest of {}", guest.name))
                })
            })
            .collect();
        let result = meanwhile();
        stop.store(true, Ordering::Relaxed);
        let outcomes = writers.into_iter().map(|writer| match writer.join() {
            Ok(outcome) => outcome,
            Err(panic) => std::panic::resume_unwind(panic),
        });
        let outcomes: Result<Vec<Outcome>> = outcomes.collect();
        result.and(outcomes)
    })
}

enum InFlight {
    Write(BlockWrite),
    Flush { covered: Vec<(u64, u64)>, started: Instant },
}

struct Writer<'a> {
    client: Client,
    volume: Volume,
    ledger: &'a mut Ledger,
    plan: WriterPlan,
    rng: Random,
    next_id: u32,
    in_flight: HashMap<u32, InFlight>,
    busy_blocks: HashSet<u64>,
    creating: HashSet<usize>,
    /// Rejected because the volume has moved on to a new id; sent again as soon as their object is free.
    again: VecDeque<BlockWrite>,
    unflushed: Vec<(u64, u64)>,
    began: Instant,
    outcome: Outcome,
}

/// Writes random blocks of `name` through `client` until `stop` is set, then waits for what is in flight.
///
/// Fails on any answer that is an error. A connection that ends is not a failure but is told in the outcome: the test
/// knows whether it killed the node.
pub fn write_until(
    mut client: Client,
    name: &str,
    ledger: &mut Ledger,
    plan: WriterPlan,
    stop: &AtomicBool,
) -> Result<Outcome> {
    let volume = Volume::open(&mut client, name, "")?;
    let mut writer = Writer {
        client,
        volume,
        ledger,
        plan,
        rng: Random::new(plan.seed),
        next_id: 0,
        in_flight: HashMap::new(),
        busy_blocks: HashSet::new(),
        creating: HashSet::new(),
        again: VecDeque::new(),
        unflushed: Vec::new(),
        began: Instant::now(),
        outcome: Outcome::default(),
    };
    match writer.run(stop) {
        Ok(()) => Ok(writer.outcome),
        Err(error) => match error.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => Err(error.context("no answer in time")),
            Some(io::ErrorKind::InvalidData) | None => Err(error),
            Some(_) => Ok(Outcome { is_cut: true, ..writer.outcome }),
        },
    }
}

impl Writer<'_> {
    fn run(&mut self, stop: &AtomicBool) -> Result<()> {
        loop {
            if !stop.load(Ordering::Relaxed) {
                self.fill()?;
            } else if let Some(write) = self.again.pop_front() {
                self.start(write)?;
            } else if !self.unflushed.is_empty() && matches!(self.plan.durability, Durability::WriteBack { .. }) {
                self.flush()?;
            }
            if self.in_flight.is_empty() {
                ensure!(stop.load(Ordering::Relaxed), "nothing in flight and nothing to write");
                if self.again.is_empty() && self.unflushed.is_empty() {
                    return Ok(());
                }
                continue;
            }
            let answer = self.client.receive()?;
            self.apply(&answer)?;
        }
    }

    fn fill(&mut self) -> Result<()> {
        for _ in 0..self.again.len() {
            if let Some(write) = self.again.pop_front() {
                self.start(write)?;
            }
        }
        // Blocks that cannot be written now are passed over; after a few tries an answer is worth waiting for.
        let mut attempts = 4 * self.plan.depth;
        while self.in_flight.len() < self.plan.depth && attempts > 0 {
            attempts -= 1;
            let block = self.rng.below(self.ledger.block_count());
            if self.busy_blocks.contains(&block) || self.creating.contains(&self.index_of(block)) {
                continue;
            }
            let sequence = self.ledger.send(block);
            self.busy_blocks.insert(block);
            let vdi = self.volume.vdi;
            self.start(BlockWrite { block, sequence, started: Instant::now(), step: Step::Overwrite, vdi })?;
        }
        Ok(())
    }

    fn index_of(&self, block: u64) -> usize {
        (block * BLOCK_BYTES as u64 / self.volume.object_bytes()) as usize
    }

    fn cache_flag(&self) -> u16 {
        match self.plan.durability {
            Durability::WriteThrough => flag::DIRECT,
            Durability::WriteBack { .. } => flag::CACHE,
        }
    }

    fn take_id(&mut self, what: InFlight) -> u32 {
        let id = self.next_id;
        self.next_id = self.next_id.wrapping_add(1);
        self.in_flight.insert(id, what);
        id
    }

    /// Sends the data of a write, or puts it aside while its object is being created.
    fn start(&mut self, mut write: BlockWrite) -> Result<()> {
        let index = self.index_of(write.block);
        if self.creating.contains(&index) {
            self.again.push_back(write);
            return Ok(());
        }
        let offset = write.block * BLOCK_BYTES as u64 % self.volume.object_bytes();
        let data = block_content(self.ledger.salt, write.block, write.sequence);
        write.vdi = self.volume.vdi;
        let own = Oid::data(write.vdi, index as u32);
        let source = self.volume.object(index);
        write.step = if source == Some(own) { Step::Overwrite } else { Step::Create };
        let mut request = match write.step {
            Step::Overwrite => Request::object(opcode::WRITE, own, offset),
            _ => Request::object(opcode::CREATE_AND_WRITE, own, offset),
        };
        request.flags = self.cache_flag();
        if write.step == Step::Create {
            self.creating.insert(index);
            if let Some(source) = source {
                request = request.with_u64(24, source.raw());
                request.flags |= flag::COW;
            }
        }
        let request = request.id(self.take_id(InFlight::Write(write)));
        Ok(self.client.send(request, &data)?)
    }

    fn flush(&mut self) -> Result<()> {
        let covered = std::mem::take(&mut self.unflushed);
        let id = self.take_id(InFlight::Flush { covered, started: Instant::now() });
        let request = Request::object(opcode::FLUSH_VDI, Oid::inode(self.volume.vdi), 0).flags(flag::CACHE).id(id);
        Ok(self.client.send(request, &[])?)
    }

    fn apply(&mut self, answer: &Answer) -> Result<()> {
        let what = self.in_flight.remove(&answer.id()).with_context(|| format!("answer to no request: {answer:?}"))?;
        match what {
            InFlight::Flush { covered, started } => {
                ensure!(answer.result() == result::SUCCESS, "flush refused: {:#04x}", answer.result());
                for (block, sequence) in covered {
                    self.ledger.acknowledge(block, sequence, true);
                }
                self.outcome.flush_count += 1;
                self.note_duration(started);
                Ok(())
            }
            InFlight::Write(write) => match answer.result() {
                result::SUCCESS => self.advance(write),
                result::READONLY => self.move_on(write),
                code => bail!("write to block {} refused with result {code:#04x}", write.block),
            },
        }
    }

    /// The next step of a write whose last request succeeded.
    fn advance(&mut self, mut write: BlockWrite) -> Result<()> {
        let index = self.index_of(write.block);
        if write.step == Step::Create {
            write.step = Step::Map;
            let vdi = write.vdi;
            let request = Request::object(opcode::WRITE, Oid::inode(vdi), MAP_OFFSET + 4 * index as u64);
            let flags = self.cache_flag();
            let request = request.flags(flags).id(self.take_id(InFlight::Write(write)));
            return Ok(self.client.send(request, &vdi.get().to_le_bytes())?);
        }
        if write.step == Step::Map {
            self.volume.map[index] = write.vdi.get();
            self.creating.remove(&index);
        }
        let is_durable = self.plan.durability == Durability::WriteThrough;
        self.ledger.acknowledge(write.block, write.sequence, is_durable);
        self.busy_blocks.remove(&write.block);
        self.outcome.acknowledged_count += 1;
        self.note_duration(write.started);
        if let Durability::WriteBack { flush_every } = self.plan.durability {
            self.unflushed.push((write.block, write.sequence));
            if self.unflushed.len() >= flush_every {
                self.flush()?;
            }
        }
        Ok(())
    }

    /// Somebody took a snapshot: the name belongs to a new id now, and the write goes there.
    fn move_on(&mut self, write: BlockWrite) -> Result<()> {
        let index = self.index_of(write.block);
        if write.step != Step::Overwrite {
            self.creating.remove(&index);
        }
        // On a connection of its own, as QEMU does: this one has answers under way.
        let mut control = self.client.again()?;
        let vdi = control.look_up(&self.volume.name, "", 0)?;
        ensure!(vdi != write.vdi, "{vdi} is read-only, yet still the working volume");
        // The objects of the old id belong to the snapshot from now on; the map entries say so by themselves.
        self.volume.vdi = vdi;
        self.again.push_back(write);
        Ok(())
    }

    fn note_duration(&mut self, started: Instant) {
        let took = started.elapsed();
        if took > self.outcome.longest_stall {
            self.outcome.longest_stall = took;
            self.outcome.stalled_at = started.duration_since(self.began);
        }
    }
}
