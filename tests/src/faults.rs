//! What goes wrong in a simulation, and when: drawn from a seed, undone at the end.

use std::fmt;

use crate::sim::Random;
use crate::sim::cluster::Shape;
use crate::sim::net::Link;
use crate::sim::sim_disk::Operation;

/// One thing that happens. Machines are numbers; what begins here ends by another fault or at the end of all of them.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Fault {
    /// The process ends; its machine tells the others. It comes back after so many milliseconds.
    Kill(usize, u64),
    /// The machine loses power and comes back.
    PowerOff(usize, u64),
    /// All machines lose power at once and come back one by one, each within so many milliseconds.
    PowerOffAll(u64),
    /// The machine dies after so many more packets, by power or alone its process.
    DieAfterSends(usize, u64, bool),
    /// The machine dies in the middle of a disk operation, so many from now.
    DieAfterOperations(usize, u64, bool),
    /// The machine loses power in the middle of writing to its journal, so many writes from now.
    TearJournal(usize, u64),
    /// The process is paused for so many milliseconds, and does not know of it: as by SIGSTOP, or its machine's hypervisor.
    Pause(usize, u64),
    /// The operator stops the node, and starts it again after so many milliseconds.
    Stop(usize, u64),
    /// Nothing passes from one machine to another, for so many milliseconds.
    CutOneWay(usize, usize, u64),
    /// Nothing passes between two machines.
    CutBothWays(usize, usize, u64),
    /// A machine's cable is out.
    Isolate(usize, u64),
    /// Machines below this number and those from it on do not hear each other.
    Split(usize, u64),
    /// All packets of a machine are slow and many are lost.
    Slow(usize, Link, u64),
    /// All connections between two machines break.
    Reset(usize, usize),
    /// The disk takes its time.
    SlowDisk(usize, u64),
    /// Some operations of the disk fail.
    BadDisk(usize, Operation, u64),
    /// One bit of one object's file is no longer what was written.
    Rot(usize),
    /// The same in its content alone, where some other machine's disk has the same. No crash can leave the rotten disk as the
    /// only one then that ever had it. With a file's header or checksums more is lost than one block, if its copy is the only
    /// new one (README, Limits).
    RotContent(usize),
    /// The wall clock jumps, by so many seconds.
    Clock(usize, i64),
    /// So many bytes are left on the disk, for so many milliseconds.
    Full(usize, u64, u64),
    /// The disk is pulled out, and plugged in again.
    Unplug(usize, u64),
    /// The machine gets an empty disk: what comes back is a new node.
    Wipe(usize, u64),
    /// The process ends, and while it is away one bit of one of its files of the cluster's order, its own identity or its
    /// memory of the cluster changes. A node that refuses to start then gets an empty disk.
    DamageOwn(usize, u64),
    /// A machine that was never part of the cluster is started.
    Join(usize),
    /// The operator shuts the whole cluster down; every node is started again within so many milliseconds.
    ShutDown(u64),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self:?}")
    }
}

/// What changes in a cluster besides [`Kinds`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Changes {
    /// Disks fill up.
    pub full: bool,
    /// Disks are pulled out.
    pub unplugged: bool,
    /// One machine loses its disk for good. One alone: of two copies that count the other is left then. Not where all lose power:
    /// the first that is back may have been alone for an epoch, and what it took then only the operator can give up (README).
    pub wiped: bool,
    /// Or it keeps its objects, and a file of the cluster's own on it is damaged.
    pub damaged: bool,
    /// The operator shuts the cluster down.
    pub shut_down: bool,
    /// Machines from this one on come in later.
    pub joining: usize,
}

impl Changes {
    /// Each of them in some of the runs.
    pub fn draw(random: &mut Random, kinds: Kinds, shape: Shape, copies: u8) -> Changes {
        let changes = Changes {
            full: random.one_in(4),
            unplugged: random.one_in(5),
            wiped: random.one_in(4) && copies == 3 && shape.zones >= 3 && !kinds.blackouts,
            damaged: random.one_in(5) && copies == 3 && shape.zones >= 3 && !kinds.blackouts,
            shut_down: random.one_in(6),
            joining: shape.machines,
        };
        let is_one_lost = changes.wiped || changes.damaged;
        let damaged = changes.damaged && !changes.wiped;
        let changes = Changes { damaged, shut_down: changes.shut_down && !is_one_lost, ..changes };
        // A disk that is lost, or does not answer, beside one that rots is more than copies are kept for.
        let is_rotten = kinds.rot.is_some();
        Changes {
            unplugged: changes.unplugged && !is_rotten,
            wiped: changes.wiped && !is_rotten,
            damaged: changes.damaged && !is_rotten,
            ..changes
        }
    }

    /// What happens, by time since the beginning of the load.
    pub fn schedule(self, random: &mut Random, count: usize, length_ms: u64) -> Vec<(u64, Fault)> {
        let mut schedule = Vec::new();
        let time = |random: &mut Random| {
            let most = if random.one_in(3) { 9000 } else { 2000 };
            100 + random.below(most)
        };
        for _ in 0..3 {
            let (at, host) = (random.below(length_ms), random.below(count as u64) as usize);
            let most = random.below(2 << 20);
            let (room, time) = (random.below(most + 1), time(random));
            if self.full && random.one_in(2) {
                schedule.push((at, Fault::Full(host, room, time)));
            }
        }
        for is_on in [self.unplugged, self.unplugged && random.one_in(2)] {
            let (at, host, time) = (random.below(length_ms), random.below(count as u64) as usize, time(random));
            if is_on {
                schedule.push((at, Fault::Unplug(host, time)));
            }
        }
        let (at, host, time) = (random.below(length_ms), random.below(count as u64) as usize, time(random));
        if self.wiped {
            schedule.push((at, Fault::Wipe(host, time)));
        }
        if self.damaged {
            schedule.push((at, Fault::DamageOwn(host, time)));
        }
        if self.shut_down {
            schedule.push((random.below(length_ms), Fault::ShutDown(1 + random.below(5000))));
        }
        for host in self.joining..count {
            schedule.push((random.below(length_ms), Fault::Join(host)));
        }
        schedule
    }
}

/// Pauses of processes, by time since the beginning of the load.
pub fn pauses(random: &mut Random, count: usize, length_ms: u64) -> Vec<(u64, Fault)> {
    let pauses = 1 + random.below(8);
    let mut pause = || {
        let (at, host) = (random.below(length_ms), random.below(count as u64) as usize);
        // Longer than the fence and the eviction, often.
        let most = if random.one_in(2) { 8000 } else { 1500 };
        (at, Fault::Pause(host, 1 + random.below(most)))
    };
    (0..pauses).map(|_| pause()).collect()
}

/// Deaths in turn, by time since the beginning of the load: one machine after the other ends while those before it come back
/// and are brought up to date. Some epochs have hardly a holder then that had everything.
pub fn deaths_in_turn(random: &mut Random, count: usize, length_ms: u64) -> Vec<(u64, Fault)> {
    let (mut at, mut host) = (random.below(length_ms), random.below(count as u64) as usize);
    let (gap, away) = (50 + random.below(2000), 50 + random.below(3000));
    let deaths = 3 + random.below(8);
    let mut death = || {
        at += random.below(2 * gap);
        host = (host + 1 + random.below(2) as usize) % count;
        let away = 1 + random.below(2 * away);
        (at, if random.one_in(2) { Fault::Kill(host, away) } else { Fault::PowerOff(host, away) })
    };
    (0..deaths).map(|_| death()).filter(|(at, _)| *at < length_ms).collect()
}

/// What stops the whole cluster in [`stops_in_turn`].
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Stops {
    /// The operator, each time.
    Orderly,
    /// The operator or the power, and machines die while the cluster comes back.
    Any,
}

/// Stops of the whole cluster, by time since the beginning of the load: each in the middle of writes that reach one machine
/// or all of them late, and often with a machine that does not come back with the others, who go on without it.
pub fn stops_in_turn(random: &mut Random, count: usize, length_ms: u64, stops: Stops) -> Vec<(u64, Fault)> {
    let mut schedule = Vec::new();
    let mut at = random.below(length_ms / 2);
    while at < length_ms {
        let latency_min_ms = 20 + random.below(200);
        let late = Link { latency_min_ms, latency_max_ms: 2 * latency_min_ms, ..Link::default() };
        let (slow, time) = (random.below(count as u64) as usize, 500 + random.below(3000));
        // Or all of them: then a write is on the node that it came to, alone, for a while.
        let hosts = if random.one_in(2) { 0..count } else { slow..slow + 1 };
        schedule.extend(hosts.map(|host| (at, Fault::Slow(host, late, time))));
        at += 100 + random.below(1500);
        let back = 1 + random.below(2000);
        let is_blackout = stops == Stops::Any && random.one_in(2);
        schedule.push((at, if is_blackout { Fault::PowerOffAll(back) } else { Fault::ShutDown(back) }));
        let (host, soon) = (random.below(count as u64) as usize, at + random.below(1000));
        // Longer than the others wait for it, or not.
        let away = if random.one_in(3) { 1 + random.below(4000) } else { 11_000 + random.below(5000) };
        if !random.one_in(3) {
            let death = if random.one_in(2) { Fault::Kill(host, away) } else { Fault::PowerOff(host, away) };
            schedule.push((soon, death));
        }
        // What one of them alone has comes to the others late, too, and machines die before it does.
        if stops == Stops::Any {
            schedule.extend((0..count).map(|host| (at + 1, Fault::Slow(host, late, back + 3000))));
        }
        for _ in 0..if stops == Stops::Any { random.below(6) } else { 0 } {
            let (host, soon) = (random.below(count as u64) as usize, at + random.below(back + 2000));
            let away = if random.one_in(2) { 1 + random.below(4000) } else { 11_000 + random.below(5000) };
            schedule.push((soon, Fault::PowerOff(host, away)));
        }
        at += 2000 + random.below(12_000);
    }
    schedule.retain(|(at, _)| *at < length_ms);
    schedule
}

/// Blackouts, by time since the beginning of the load: each while what is written is on its way to most machines. When they are
/// back their disks are slow, and one dies for long: what it had alone it has shown to somebody, perhaps, before another had it.
pub fn deaths_on_return(random: &mut Random, count: usize, length_ms: u64) -> Vec<(u64, Fault)> {
    let mut schedule = Vec::new();
    let mut at = random.below(length_ms / 4);
    while at < length_ms {
        let latency_min_ms = 20 + random.below(180);
        let late = Link { latency_min_ms, latency_max_ms: 2 * latency_min_ms, ..Link::default() };
        let (blackout, back) = (at + 200 + random.below(600), 1 + random.below(500));
        schedule.extend((0..count).map(|host| (at, Fault::Slow(host, late, blackout - at))));
        schedule.push((blackout, Fault::PowerOffAll(back)));
        let (slow, max_ms) = (blackout + back + random.below(1500), 50 + random.below(500));
        schedule.extend((0..count).map(|host| (slow, Fault::SlowDisk(host, max_ms))));
        let (host, soon) = (random.below(count as u64) as usize, blackout + back + random.below(4000));
        let away = 4000 + random.below(6000);
        schedule.push((soon, if random.one_in(4) { Fault::PowerOff(host, away) } else { Fault::Kill(host, away) }));
        schedule.extend((0..count).map(|host| (soon + 1500, Fault::SlowDisk(host, 1))));
        at = blackout + 7000 + random.below(6000);
    }
    schedule.retain(|(at, _)| *at < length_ms);
    schedule.sort_by_key(|(at, _)| *at);
    schedule
}

/// Orderly stops of all, one after the other, by time since the beginning of the load: writers lose their right in the middle of
/// writes that reach one machine late, and have it again at once.
pub fn quick_stops(random: &mut Random, count: usize, length_ms: u64) -> Vec<(u64, Fault)> {
    let mut schedule = Vec::new();
    let mut at = random.below(2000);
    while at < length_ms {
        let latency_min_ms = 5 + random.below(100);
        let late = Link { latency_min_ms, latency_max_ms: 2 * latency_min_ms, ..Link::default() };
        let (slow, back) = (random.below(count as u64) as usize, 1 + random.below(600));
        schedule.push((at, Fault::Slow(slow, late, 500 + back + random.below(3000))));
        at += 50 + random.below(400);
        schedule.push((at, Fault::ShutDown(back)));
        if random.one_in(2) {
            let (host, soon) = (random.below(count as u64) as usize, at + back + random.below(1000));
            schedule.push((soon, Fault::DieAfterSends(host, random.below(300), random.one_in(2))));
        }
        at += back + 1000 + random.below(3000);
    }
    schedule.retain(|(at, _)| *at < length_ms);
    schedule
}

/// Blackouts that tear journals, by time since the beginning of the load: what is written is on its way to most machines, and each
/// loses power in the middle of a write to its journal, or soon after the first. What is torn may be all that is left of a write.
pub fn torn_blackouts(random: &mut Random, count: usize, length_ms: u64) -> Vec<(u64, Fault)> {
    let mut schedule = Vec::new();
    let mut at = random.below(2000);
    while at < length_ms {
        let latency_min_ms = 10 + random.below(100);
        let late = Link { latency_min_ms, latency_max_ms: 2 * latency_min_ms, ..Link::default() };
        let torn = at + 100 + random.below(900);
        let back = 1 + random.below(1000);
        schedule.extend((0..count).map(|host| (at, Fault::Slow(host, late, torn - at + 200))));
        schedule.extend((0..count).map(|host| (torn, Fault::TearJournal(host, random.below(4)))));
        schedule.push((torn + 5 + random.below(150), Fault::PowerOffAll(back)));
        at = torn + back + 2500 + random.below(3000);
    }
    schedule.retain(|(at, _)| *at < length_ms);
    schedule.sort_by_key(|(at, _)| *at);
    schedule
}

/// Which faults a run may have.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Kinds {
    /// Processes and machines end.
    pub crashes: bool,
    /// All machines lose power at once.
    pub blackouts: bool,
    /// Links are cut.
    pub cuts: bool,
    /// Links and disks are slow, packets are lost.
    pub slowness: bool,
    /// Disks fail.
    pub bad_disks: bool,
    /// This machine's disk rots. No other's: then enough good copies are left.
    pub rot: Option<usize>,
}

impl Kinds {
    /// Each of them in some of the runs; all runs have some.
    pub fn draw(random: &mut Random, count: usize, copies: u8) -> Kinds {
        let kinds = Kinds {
            crashes: random.below(10) < 7,
            blackouts: random.one_in(3),
            cuts: random.one_in(2),
            slowness: random.one_in(2),
            bad_disks: random.one_in(4),
            // With fewer copies the one that rots may be all there is of a write: two have to have it before it counts.
            rot: (random.one_in(4) && copies == 3).then(|| random.below(count as u64) as usize),
        };
        if kinds.rot.is_some() && random.one_in(3) {
            return Kinds { rot: kinds.rot, ..Kinds::default() };
        }
        // As in `Changes::draw`.
        let kinds = Kinds { bad_disks: kinds.bad_disks && kinds.rot.is_none(), ..kinds };
        if kinds == Kinds::default() { Kinds { crashes: true, ..kinds } } else { kinds }
    }

    fn any_of(self, random: &mut Random, count: usize) -> Option<Fault> {
        let host = random.below(count as u64) as usize;
        let other = (host + 1 + random.below(count as u64 - 1) as usize) % count;
        let short = 1 + random.below(3000);
        let time = if random.one_in(3) { 3000 + random.below(9000) } else { short };
        let of_power = random.one_in(2);
        let fault = match random.below(16) {
            0 if self.crashes => Fault::Kill(host, time),
            1 if self.crashes => Fault::PowerOff(host, time),
            2 if self.crashes => Fault::DieAfterSends(host, random.below(200), of_power),
            3 if self.crashes => Fault::DieAfterOperations(host, random.below(200), of_power),
            4 if self.crashes => Fault::Stop(host, time),
            5 if self.blackouts => Fault::PowerOffAll(time),
            6 if self.cuts => Fault::CutOneWay(host, other, time),
            7 if self.cuts => Fault::CutBothWays(host, other, time),
            8 if self.cuts => Fault::Isolate(host, time),
            9 if self.cuts => Fault::Split(1 + random.below(count as u64 - 1) as usize, time),
            10 if self.cuts => Fault::Reset(host, other),
            11 if self.slowness => {
                let latency_min_ms = 1 + random.below(20);
                let link = Link {
                    is_cut: false,
                    latency_min_ms,
                    latency_max_ms: latency_min_ms + random.below(200),
                    loss_permille: random.below(300),
                    twice_permille: random.below(200),
                };
                Fault::Slow(host, link, time)
            }
            12 if self.slowness => Fault::SlowDisk(host, 1 + random.below(300)),
            13 if self.bad_disks => {
                let operations = [Operation::Read, Operation::Write, Operation::Sync, Operation::Name];
                Fault::BadDisk(host, operations[random.below(4) as usize], 1 + random.below(3))
            }
            14 if self == Kinds { rot: self.rot, ..Kinds::default() } => Fault::Rot(self.rot.unwrap_or(host)),
            14 if self.rot.is_some() => Fault::RotContent(self.rot.unwrap_or(host)),
            15 => Fault::Clock(host, random.below(20_000_000) as i64 - 10_000_000),
            _ => return None,
        };
        Some(fault)
    }

    /// A schedule: times in milliseconds from the beginning of the load, rising, and what happens then.
    pub fn schedule(self, random: &mut Random, count: usize, length_ms: u64) -> Vec<(u64, Fault)> {
        let mut schedule = Vec::new();
        let pause = 200 + random.below(4000);
        let mut at = random.below(pause);
        while at < length_ms {
            if let Some(fault) = self.any_of(random, count) {
                schedule.push((at, fault));
                at += random.below(2 * pause);
            }
        }
        schedule
    }
}
