//! The hands that break things in a simulated cluster, and put them right again.
//!
//! Whoever ends by itself is started again, as the service manager of its machine would do it.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Random;
use super::client::{SimClient, within};
use super::cluster::{Ended, STORE, SimCluster};
use super::net::Link;
use super::sim_disk::{SimDisk, UNLIMITED_BYTES};
use crate::faults::Fault;

const PATIENCE: Duration = Duration::from_secs(5);

/// The hands that break things and put them right again.
pub struct Hands {
    /// What they work on.
    pub cluster: SimCluster,
    random: Random,
    link: Link,
    /// When machines are to be started again.
    starts: Vec<Option<u64>>,
    /// How long those stay away that are asked to stop.
    away_ms: Vec<u64>,
    /// When links are as they were, and disks.
    mends: Vec<(u64, Mend)>,
    /// Which life of its node each machine is in.
    pub lives: Arc<Mutex<Vec<u64>>>,
    /// Whose files of the cluster's own were damaged.
    damaged: Option<usize>,
    /// Processes that ended, however.
    pub ends: usize,
}

/// The files of objects on a disk, with their lengths.
fn objects_of(disk: &SimDisk) -> Vec<(PathBuf, u64)> {
    let is_object = |path: &Path| path.components().any(|part| part.as_os_str() == "obj");
    disk.list().into_iter().filter(|(path, length)| is_object(path) && *length > 0).collect()
}

/// Where content begins, as the header of an object's file says (`DISK.md`).
fn content_offset(header: &[u8]) -> u64 {
    header.get(52..60).and_then(|bytes| bytes.try_into().ok()).map_or(u64::MAX, u64::from_le_bytes)
}

#[derive(Clone, Copy)]
enum Mend {
    Link(usize, usize),
    Disk(usize),
    Space(usize),
    Plug(usize),
}

impl Hands {
    /// Everything as it is when nothing is wrong; the first `founders` machines are started.
    pub fn new(cluster: SimCluster, random: Random, link: Link, slow_job_one_in: u64, founders: usize) -> Hands {
        let count = cluster.count();
        for from in 0..count {
            for to in 0..count {
                cluster.net().set_link(from, to, link);
            }
            cluster.disk(from).set_slowness(slow_job_one_in, Duration::from_millis(5));
        }
        let lives = Arc::new(Mutex::new(vec![0; count]));
        let mut hands = Hands {
            cluster,
            random,
            link,
            starts: vec![None; count],
            away_ms: vec![0; count],
            mends: Vec::new(),
            lives,
            damaged: None,
            ends: 0,
        };
        (0..founders).for_each(|host| hands.start(host));
        hands
    }

    /// Ends one process, in a cluster where all is well, and starts it again soon.
    pub fn shake(&mut self) {
        let host = self.random.below(self.cluster.count() as u64) as usize;
        self.inflict(Fault::Kill(host, 300));
    }

    /// Ends most processes at the same moment, half of them with their machines. All but `lost` come back.
    pub fn fail_most(&mut self, lost: usize) {
        for host in 0..self.cluster.count() {
            let away_ms = 1 + self.random.below(3000);
            match self.random.below(4) {
                0 if host != lost => {}
                0 | 1 => self.inflict(Fault::Kill(host, away_ms)),
                _ => self.inflict(Fault::PowerOff(host, away_ms)),
            }
        }
        tracing::info!("machine {lost} does not come back");
        self.starts[lost] = None;
    }

    /// Starts a machine that is off.
    pub fn start(&mut self, host: usize) {
        self.starts[host] = None;
        if !self.cluster.is_running(host) {
            self.lives.lock().unwrap_or_else(PoisonError::into_inner)[host] += 1;
            self.cluster.start(host);
        }
    }

    /// One millisecond: what is due ends, and whoever ended by itself is started again.
    pub fn tick(&mut self, is_healing: bool) {
        let now = self.cluster.now_ms();
        for host in 0..self.starts.len() {
            if self.starts[host].is_some_and(|at| at <= now) {
                self.start(host);
            }
        }
        let (due, later): (Vec<_>, Vec<_>) =
            std::mem::take(&mut self.mends).into_iter().partition(|(at, _)| *at <= now);
        self.mends = later;
        for (_, mend) in due {
            match mend {
                Mend::Link(from, to) => self.cluster.net().set_link(from, to, self.link),
                Mend::Disk(host) => self.cluster.disk(host).heal(),
                Mend::Space(host) => self.cluster.disk(host).set_capacity(UNLIMITED_BYTES),
                Mend::Plug(host) => self.cluster.disk(host).set_unplugged(false),
            }
        }
        for (host, how) in self.cluster.tick() {
            self.ends += 1;
            tracing::info!("node {host} ended: {how:?}");
            let pause = match &how {
                _ if is_healing => 100,
                Ended::Stopped => std::mem::take(&mut self.away_ms[host]).max(1 + self.random.below(3000)),
                Ended::Died => 1 + self.random.below(3000),
                // An operator looks at it first.
                Ended::Failed(_) => 500 + self.random.below(3000),
            };
            self.cluster.disk(host).heal();
            if matches!(&how, Ended::Failed(_)) && self.damaged.take_if(|damaged| *damaged == host).is_some() {
                // What it says to do: its directory is emptied, and it joins as a new node.
                self.cluster.wipe(host);
            }
            self.starts[host] = Some(self.cluster.now_ms() + pause);
        }
    }

    fn cut(&mut self, from: usize, to: usize, link: Link, time_ms: u64) {
        self.cluster.net().set_link(from, to, link);
        self.mends.push((self.cluster.now_ms() + time_ms, Mend::Link(from, to)));
    }

    /// Does it.
    pub fn inflict(&mut self, fault: Fault) {
        tracing::info!("fault: {fault}");
        self.cluster.net().note(self.cluster.now_ms());
        let now = self.cluster.now_ms();
        let count = self.cluster.count();
        let cut = Link { is_cut: true, ..self.link };
        match fault {
            Fault::Kill(host, time) => {
                self.cluster.kill(host);
                self.ends += 1;
                self.starts[host] = Some(now + time);
            }
            Fault::PowerOff(host, time) => self.power_off(host, time),
            Fault::PowerOffAll(time) => {
                for host in 0..count {
                    let time = 1 + self.random.below(time + 1);
                    self.power_off(host, time);
                }
            }
            Fault::DieAfterSends(host, sends, of_power) => self.cluster.die_after_sends(host, sends, of_power),
            Fault::DieAfterOperations(host, operations, of_power) => {
                self.cluster.die_after_operations(host, operations, of_power);
            }
            Fault::TearJournal(host, writes) => self.cluster.tear_journal(host, writes),
            Fault::Pause(host, time) => self.cluster.pause(host, time),
            Fault::Stop(host, time) => {
                self.away_ms[host] = time;
                self.cluster.terminate(host);
            }
            Fault::CutOneWay(from, to, time) => self.cut(from, to, cut, time),
            Fault::CutBothWays(one, other, time) => {
                self.cut(one, other, cut, time);
                self.cut(other, one, cut, time);
            }
            Fault::Isolate(host, time) => {
                for other in (0..count).filter(|other| *other != host) {
                    self.cut(host, other, cut, time);
                    self.cut(other, host, cut, time);
                }
            }
            Fault::Split(at, time) => {
                for (one, other) in (0..at).flat_map(|one| (at..count).map(move |other| (one, other))) {
                    self.cut(one, other, cut, time);
                    self.cut(other, one, cut, time);
                }
            }
            Fault::Slow(host, link, time) => {
                for other in (0..count).filter(|other| *other != host) {
                    self.cut(host, other, link, time);
                    self.cut(other, host, link, time);
                }
            }
            Fault::Reset(one, other) => self.cluster.net().reset_between(one, other),
            Fault::Clock(host, seconds) => self.cluster.set_wall_offset(host, seconds),
            Fault::Join(host) => self.start(host),
            Fault::ShutDown(time) => self.shut_down(time),
            Fault::SlowDisk(..)
            | Fault::BadDisk(..)
            | Fault::Rot(_)
            | Fault::RotContent(_)
            | Fault::Full(..)
            | Fault::Unplug(..)
            | Fault::Wipe(..)
            | Fault::DamageOwn(..) => self.hit_disk(fault),
        }
    }

    fn hit_disk(&mut self, fault: Fault) {
        let now = self.cluster.now_ms();
        match fault {
            Fault::SlowDisk(host, max_ms) => {
                self.cluster.disk(host).set_slowness(2, Duration::from_millis(max_ms));
            }
            Fault::BadDisk(host, operation, times) => {
                let skip = self.random.below(20);
                self.cluster.disk(host).fail("", operation, skip, times);
                self.mends.push((now + 5000, Mend::Disk(host)));
            }
            Fault::Rot(host) => self.rot(host, false),
            Fault::RotContent(host) => self.rot(host, true),
            Fault::Full(host, room, time) => {
                let disk = self.cluster.disk(host);
                disk.set_capacity(disk.used_bytes() + room);
                self.mends.push((now + time, Mend::Space(host)));
            }
            Fault::Unplug(host, time) => {
                self.cluster.disk(host).set_unplugged(true);
                self.mends.push((now + time, Mend::Plug(host)));
            }
            Fault::Wipe(host, time) => {
                self.power_off(host, time);
                self.cluster.wipe(host);
            }
            Fault::DamageOwn(host, time) => {
                self.inflict(Fault::Kill(host, time));
                self.damage_own(host);
            }
            _ => {}
        }
    }

    fn damage_own(&mut self, host: usize) {
        let is_own = |path: &Path| {
            let in_store = path.strip_prefix(STORE);
            in_store.is_ok_and(|path| path.starts_with("cluster") || path == Path::new("state"))
        };
        let files = self.cluster.disk(host).list();
        let files: Vec<_> = files.into_iter().filter(|(path, length)| is_own(path) && *length > 0).collect();
        if let Some((path, length)) = files.get(self.random.below(files.len().max(1) as u64) as usize) {
            let bit = self.random.below(*length * 8);
            tracing::info!("bit {bit} of {} on machine {host} changes", path.display());
            self.cluster.disk(host).flip_bit(path, bit);
            self.damaged = Some(host);
        }
    }

    fn shut_down(&mut self, time: u64) {
        for host in 0..self.cluster.count() {
            self.away_ms[host] = 1 + self.random.below(time);
        }
        let (net, host) = (self.cluster.net().clone(), self.random.below(self.cluster.count() as u64) as usize);
        self.cluster.clients().spawn(async move {
            let asking = async { SimClient::connect(&net, host).await?.shut_down().await };
            // Not in the line below: its arguments are looked at only if somebody reads it.
            let answer = within(PATIENCE, asking).await;
            tracing::info!("the cluster is shut down: {answer:?}");
        });
    }

    fn rot(&mut self, host: usize, of_content: bool) {
        /// How often a place is drawn that must not rot, before it is left at that.
        const DRAWS_MAX: usize = 20;
        let objects = objects_of(self.cluster.disk(host));
        for _ in 0..DRAWS_MAX {
            let Some((path, length)) = objects.get(self.random.below(objects.len().max(1) as u64) as usize) else {
                return;
            };
            // Where the guests write, most of the time.
            let bytes = if self.random.one_in(4) { *length } else { (*length).min(256 << 10) };
            let bit = self.random.below(bytes * 8);
            if (!of_content || self.is_elsewhere(host, path, bit / 8)) && self.cluster.disk(host).flip_bit(path, bit) {
                tracing::info!("bit {bit} of {} on machine {host} changes", path.display());
                return;
            }
        }
    }

    /// Whether a byte is of an object's content, no hole, and another machine has the same around it.
    fn is_elsewhere(&self, host: usize, path: &Path, byte: u64) -> bool {
        let (header, here) = (self.cluster.disk(host).page_at(path, 0), self.cluster.disk(host).page_at(path, byte));
        let is_hole = here.iter().flatten().all(|byte| *byte == 0);
        if is_hole || header.is_none_or(|header| byte < content_offset(&header)) {
            return false;
        }
        (0..self.cluster.count()).filter(|other| *other != host).any(|other| {
            let disk = self.cluster.disk(other);
            let twins = objects_of(disk).into_iter().filter(|(twin, _)| twin.file_name() == path.file_name());
            twins.into_iter().any(|(twin, length)| byte < length && disk.page_at(&twin, byte) == here)
        })
    }

    fn power_off(&mut self, host: usize, time_ms: u64) {
        let seed = self.random.bits();
        self.ends += usize::from(self.cluster.is_running(host));
        self.cluster.power_off(host, seed);
        self.starts[host] = Some(self.cluster.now_ms() + time_ms);
    }

    /// Everything works again, and everybody is started.
    pub fn heal(&mut self) {
        tracing::info!("healing");
        self.mends.clear();
        for host in 0..self.cluster.count() {
            self.cluster.resume(host);
            for other in 0..self.cluster.count() {
                self.cluster.net().set_link(host, other, self.link);
            }
            self.cluster.disk(host).heal();
            self.cluster.disk(host).set_capacity(UNLIMITED_BYTES);
            self.cluster.disk(host).set_unplugged(false);
            self.cluster.disk(host).cancel_cut();
            self.cluster.net().go_on_sending(host);
            self.cluster.disk(host).set_slowness(0, Duration::ZERO);
            self.start(host);
        }
    }
}
