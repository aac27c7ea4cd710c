//! What happens to nodes: drawn from a seed, undone after a while, and all undone at once before a calm point.
//!
//! Always holds:
//! 1. So many nodes at most are down or paused at once as an object can lose copies; but now and then all of them are.
//! 2. Power is lost by the machine: the process is killed, then the file system drops what was not flushed.
//! 3. A process that ends without having been told to is an error, whatever else was going on; but for one whose disk somebody
//!    else has filled to the brim, and that says so: what is in its journal has no place then.

use std::collections::BTreeSet;
use std::fmt;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::Bench;
use crate::sim::Random;

/// A clean stop waits for what is under way and for the others to learn of it. On a busy machine, with a quorum that may be away.
const LEAVE_PATIENCE: Duration = Duration::from_secs(40);
/// From the last fault until everybody is a member again and nobody recovers, on however busy a machine.
const HEAL_PATIENCE: Duration = Duration::from_mins(3);
const BALLAST: &str = "ballast";
/// Room for what is in a journal; a store refuses new content long before it has taken that.
const LEFT_BYTES: u64 = 160 << 20;

/// How often what happened.
#[derive(Clone, Copy, Debug, Default)]
pub struct Tally {
    /// Processes killed with signal 9 while their machine went on.
    pub kills: u64,
    /// Machines that lost power by themselves.
    pub power_losses: u64,
    /// Times that all machines lost power.
    pub blackouts: u64,
    /// Processes paused.
    pub pauses: u64,
    /// Clean stops.
    pub stops: u64,
    /// Links cut, both ways or one.
    pub cuts: u64,
    /// Times that packets were lost.
    pub losses: u64,
    /// Disks filled.
    pub fills: u64,
    /// Processes that ended because theirs was.
    pub ended_full: u64,
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Tally { power_losses, blackouts, pauses, stops, losses, fills, ended_full, .. } = self;
        write!(
            f,
            "{power_losses} power losses, {blackouts} blackouts, {pauses} pauses, {stops} clean stops, {losses} times packets \
             lost, {fills} full disks (of which {ended_full} ended their nodes)"
        )
    }
}

/// What ends a fault.
#[derive(Clone, Debug)]
enum Undo {
    Start(usize),
    Resume(usize),
    Mend(BTreeSet<(usize, usize)>),
    Hear,
    Empty(usize),
}

/// Brings trouble to a bench.
pub struct Hardship<'a> {
    bench: &'a mut Bench,
    tally: &'a mut Tally,
    random: Random,
    /// How many may be away at once.
    away_max: usize,
    undos: Vec<(Instant, Undo)>,
    next: Instant,
    /// Whose disks are full to the brim, or were a moment ago.
    brimful: BTreeSet<usize>,
}

impl<'a> Hardship<'a> {
    /// Nothing has happened yet.
    pub fn new(bench: &'a mut Bench, tally: &'a mut Tally, seed: u64, copies: usize) -> Hardship<'a> {
        let away_max = copies.saturating_sub(1).min(bench.flock.count().saturating_sub(1)).max(1);
        Hardship {
            bench,
            tally,
            random: Random::new(seed),
            away_max,
            undos: Vec::new(),
            next: Instant::now(),
            brimful: BTreeSet::new(),
        }
    }

    /// What goes on, for the status line.
    pub fn told(&self) -> String {
        let undos: Vec<String> = self.undos.iter().map(|(_, undo)| format!("{undo:?}")).collect();
        format!("to come: {}", if undos.is_empty() { "nothing".to_owned() } else { undos.join(", ") })
    }

    /// Ends what is over and begins what is due.
    pub fn tick(&mut self) -> Result<()> {
        self.check_alive()?;
        let now = Instant::now();
        let (due, later) = std::mem::take(&mut self.undos).into_iter().partition(|(at, _)| *at <= now);
        self.undos = later;
        let due: Vec<(Instant, Undo)> = due;
        for (_, undo) in due {
            self.undo(&undo)?;
        }
        if now >= self.next {
            self.next = now + Duration::from_millis(200 + self.random.below(4000));
            self.happen()?;
        }
        Ok(())
    }

    /// Whoever was not ended must run.
    fn check_alive(&mut self) -> Result<()> {
        for index in self.running() {
            let Some(code) = self.bench.flock.has_ended(index)? else { continue };
            let said = self.bench.flock.last_words(index);
            if self.brimful.contains(&index) && code == Some(1) && said.contains("No space left on device") {
                self.tally.ended_full += 1;
                self.later(Undo::Start(index));
                continue;
            }
            bail!("node {index} ended by itself, with {code:?}: {said}");
        }
        Ok(())
    }

    fn running(&self) -> Vec<usize> {
        self.bench.flock.running()
    }

    /// Some time: mostly short, now and then longer than any timeout.
    fn a_while(&mut self) -> Duration {
        let most = if self.random.one_in(3) { 12_000 } else { 2500 };
        Duration::from_millis(50 + self.random.below(most))
    }

    fn later(&mut self, undo: Undo) {
        let at = Instant::now() + self.a_while();
        self.undos.push((at, undo));
    }

    /// One of those who run, if one more may be away.
    fn victim(&mut self) -> Option<usize> {
        let running = self.running();
        let away = self.bench.flock.count() - running.len();
        (away < self.away_max).then(|| running[self.random.below(running.len() as u64) as usize])
    }

    fn happen(&mut self) -> Result<()> {
        match self.random.below(20) {
            0..5 => self.kill(),
            5..7 => self.pause(),
            7..10 => self.cut_power(),
            10 => self.blackout(),
            11..13 => self.stop(),
            13..17 => self.cut(),
            17 => self.lose(),
            _ => self.fill(),
        }
    }

    fn kill(&mut self) -> Result<()> {
        let Some(victim) = self.victim() else { return Ok(()) };
        self.bench.flock.kill(&[victim])?;
        self.tally.kills += 1;
        self.later(Undo::Start(victim));
        Ok(())
    }

    fn pause(&mut self) -> Result<()> {
        let Some(victim) = self.victim() else { return Ok(()) };
        self.bench.flock.pause(victim)?;
        self.tally.pauses += 1;
        self.later(Undo::Resume(victim));
        Ok(())
    }

    fn cut_power(&mut self) -> Result<()> {
        let Some(victim) = self.victim() else { return Ok(()) };
        self.power_cycle(&[victim])?;
        self.tally.power_losses += 1;
        self.later(Undo::Start(victim));
        Ok(())
    }

    /// Everybody at once. Those that are down already lose what they had not flushed when they were killed.
    fn blackout(&mut self) -> Result<()> {
        let all: Vec<usize> = (0..self.bench.flock.count()).collect();
        self.power_cycle(&all)?;
        self.tally.blackouts += 1;
        self.undos.retain(|(_, undo)| !matches!(undo, Undo::Start(_) | Undo::Resume(_)));
        for index in all {
            self.later(Undo::Start(index));
        }
        Ok(())
    }

    fn power_cycle(&mut self, victims: &[usize]) -> Result<()> {
        let Bench { flock, disks, .. } = &mut *self.bench;
        let alive: Vec<usize> = victims.iter().copied().filter(|index| flock.pid(*index).is_some()).collect();
        flock.kill(&alive)?;
        for &victim in victims {
            disks[victim].cut_power()?;
        }
        for &victim in victims {
            disks[victim].power_on()?;
        }
        Ok(())
    }

    fn stop(&mut self) -> Result<()> {
        let Some(victim) = self.victim() else { return Ok(()) };
        // One that is only just starting ends at once, with the signal.
        if self.bench.flock.client(victim).and_then(|mut client| client.node_count()).is_err() {
            return Ok(());
        }
        self.bench.flock.ask_to_leave(victim)?;
        self.tally.stops += 1;
        let asked = Instant::now();
        let code = loop {
            if let Some(code) = self.bench.flock.has_ended(victim)? {
                break code;
            }
            ensure!(asked.elapsed() < LEAVE_PATIENCE, "node {victim} was asked to leave and does not end");
            std::thread::sleep(Duration::from_millis(10));
        };
        ensure!(code == Some(0), "node {victim} was asked to leave and ended with {code:?}");
        self.later(Undo::Start(victim));
        Ok(())
    }

    fn cut(&mut self) -> Result<()> {
        let count = self.bench.flock.count();
        let one = self.random.below(count as u64) as usize;
        let other = (one + 1 + self.random.below(count as u64 - 1) as usize) % count;
        let others = (0..count).filter(|index| *index != one);
        let pairs: BTreeSet<(usize, usize)> = match self.random.below(5) {
            0 => [(one, other)].into(),
            1 => [(one, other), (other, one)].into(),
            // Nobody hears it, or it hears nobody.
            2 => others.map(|other| (one, other)).collect(),
            3 => others.flat_map(|other| [(one, other), (other, one)]).collect(),
            _ => {
                let parts = |from: usize, to: usize| (from < one) != (to < one);
                let all = (0..count).flat_map(|from| (0..count).map(move |to| (from, to)));
                all.filter(|(from, to)| parts(*from, *to)).collect()
            }
        };
        self.tally.cuts += u64::from(!pairs.is_empty());
        self.later(Undo::Mend(pairs));
        self.apply_cuts()
    }

    /// What is cut follows from what is still to be mended.
    fn apply_cuts(&mut self) -> Result<()> {
        let cut =
            self.undos.iter().filter_map(|(_, undo)| if let Undo::Mend(pairs) = undo { Some(pairs) } else { None });
        let cuts = cut.flatten().copied().collect();
        self.bench.flock.network.set_cuts(cuts)
    }

    fn lose(&mut self) -> Result<()> {
        let percent = 1 + self.random.below(20) as u32;
        self.bench.flock.network.lose(percent)?;
        self.tally.losses += 1;
        self.later(Undo::Hear);
        Ok(())
    }

    /// Takes most of the room on a disk, or all of it, as some other program would.
    fn fill(&mut self) -> Result<()> {
        let running = self.running();
        if running.is_empty() {
            return Ok(());
        }
        let victim = running[self.random.below(running.len() as u64) as usize];
        let is_brimful = self.random.one_in(3);
        let left = if is_brimful { self.random.below(4 << 20) } else { LEFT_BYTES + self.random.below(LEFT_BYTES) };
        if is_brimful {
            self.brimful.insert(victim);
        }
        let disk = self.bench.disks[victim].path();
        let space = rustix::fs::statvfs(disk)?;
        let size = (space.f_bfree * space.f_frsize).saturating_sub(left);
        let ballast = std::fs::File::create(disk.join(BALLAST))?;
        // Others take room meanwhile: as much as there is, then.
        let mut wanted = size;
        while wanted > 1 << 20
            && rustix::fs::fallocate(&ballast, rustix::fs::FallocateFlags::empty(), 0, wanted).is_err()
        {
            wanted -= 1 << 20;
        }
        self.tally.fills += 1;
        self.later(Undo::Empty(victim));
        Ok(())
    }

    fn empty(&self, index: usize) -> Result<()> {
        match std::fs::remove_file(self.bench.disks[index].path().join(BALLAST)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error).context("cannot make room again"),
            _ => Ok(()),
        }
    }

    fn undo(&mut self, undo: &Undo) -> Result<()> {
        match *undo {
            Undo::Start(index) => {
                // Whether a node starts on a full disk is another matter than this bench's.
                self.empty(index)?;
                self.brimful.remove(&index);
                self.bench.flock.launch(index)
            }
            Undo::Resume(index) => self.bench.flock.resume(index),
            Undo::Mend(_) => self.apply_cuts(),
            Undo::Hear => self.bench.flock.network.lose(0),
            Undo::Empty(index) => self.empty(index),
        }
    }

    /// Undoes everything and waits until all nodes are members that have nothing left to fetch.
    pub fn heal(&mut self) -> Result<()> {
        for (_, undo) in std::mem::take(&mut self.undos) {
            self.undo(&undo)?;
        }
        let count = self.bench.flock.count();
        let deadline = Instant::now() + HEAL_PATIENCE;
        loop {
            self.check_alive()?;
            match self.bench.flock.is_whole() {
                Ok(true) => return Ok(()),
                _ if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(200)),
                other => {
                    let views = self.bench.flock.views().join("\n");
                    bail!(
                        "healed when calm: {HEAL_PATIENCE:.0?} after the last fault not all {count} nodes are members: {other:?}\n{views}"
                    );
                }
            }
        }
    }
}
