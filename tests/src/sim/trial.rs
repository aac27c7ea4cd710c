//! One run: a cluster is founded, guests work on it, things go wrong, everything is put right again, and then every invariant
//! must hold. All of it follows from one seed.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::Random;
use super::client::{SimClient, within};
use super::cluster::{Shape, SimCluster};
use super::guests::{Disk, Load};
use super::hands::Hands;
use super::inventory::Places;
use super::lazy_guest;
use super::net::{Link, SimNet};
use super::volume_guest::VolumeGuest;
use crate::faults::{
    Changes, Fault, Kinds, Stops, deaths_in_turn, deaths_on_return, pauses, quick_stops, stops_in_turn, torn_blackouts,
};
use crate::invariants::one_history::Epochs;
use crate::invariants::{
    copies_agree, flushed_kept, healed_when_calm, nothing_foreign, nothing_orphaned, one_disk, outage, space_honest,
    zones_distinct,
};
use crate::oracle::Oracle;

/// Lets any node in, without encryption.
const FORMAT_OPEN: u16 = 0x8000;
/// A run that takes longer hangs.
const RUN_MS_MAX: u64 = 900_000;
/// How often every node is asked for its epochs.
const WATCH_INTERVAL: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(5);
/// Blocks of the volume that is written lazily, at most.
const LAZY_BLOCKS: u32 = 6;
/// How long the end of one more process takes to be noticed.
const SHAKEN_FOR: Duration = Duration::from_secs(1);
/// Seeds from this one on may have an [`Emphasis`]. Those below it stay the histories that they were: tests name some.
pub const EMPHASIS_FROM: u64 = 1 << 31;
/// Seeds from this one on may have an [`Emphasis`] on machines that come back, and on orderly stops.
pub const RETURNS_FROM: u64 = 3 << 30;
/// Seeds from this one on may have any [`Emphasis`].
pub const ANY_EMPHASIS_FROM: u64 = 4 << 30;
/// Seeds from this one on may have caches in front of the disks.
pub const CACHES_FROM: u64 = 5 << 30;
/// Parts that the largest of them holds: few, so that they leave again.
const CACHE_SLOTS_MAX: u64 = 24;
const FOUNDED_WITHIN: Duration = Duration::from_mins(1);

/// What a run has more of than others, so that what is rare elsewhere is not rare in it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Emphasis {
    /// Everything alike.
    None,
    /// Many guests on few blocks, while the cluster stops again and again.
    Blocks,
    /// Volumes and snapshots, also with writes beside them.
    Volumes,
    /// Many guests on few blocks, and machines that die as soon as they are back from a blackout.
    Returns,
    /// The same, and orderly stops of all.
    Stops,
    /// The same, and blackouts in the middle of writes to journals.
    Torn,
}

/// Everything that a run is, besides its seed.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Decides everything that is not said here.
    pub seed: u64,
    /// What there is more of.
    pub emphasis: Emphasis,
    /// The machines.
    pub shape: Shape,
    /// How many of them found the cluster; the others join later.
    pub nodes: usize,
    /// What goes wrong.
    pub kinds: Kinds,
    /// Copies of each object.
    pub copies: u8,
    /// How many guests.
    pub guests: u32,
    /// Blocks that they write to.
    pub blocks: u32,
    /// Whether one more writes without waiting for the disks, and flushes.
    pub is_lazy: bool,
    /// How many more make volumes, snapshots and clones.
    pub volume_guests: u64,
    /// Whether these change numbers of copies.
    pub alters: bool,
    /// Whether these write beside what they discard or delete.
    pub writes_beside: bool,
    /// Whether the disks are compared with what is referred to at the end, after one more change of members.
    pub is_swept: bool,
    /// The machine that stays away after an outage in the end, if there is one: the others go on without it.
    pub lost_in_outage: Option<usize>,
    /// Of a hundred operations, how many are writes.
    pub write_percent: u64,
    /// Whether some writes go in halves: to a part of a block, what is there counts.
    pub halves: bool,
    /// Up to how long a guest rests between operations, milliseconds.
    pub rest_ms: u64,
    /// For how long, milliseconds.
    pub load_ms: u64,
    /// The network when nothing is wrong with it.
    pub link: Link,
    /// Of disk jobs, one in so many takes up to 5 ms; 0 for none.
    pub slow_job_one_in: u64,
    /// What happens, by time since the load began.
    pub faults: Vec<(u64, Fault)>,
}

impl Plan {
    /// What a seed means.
    pub fn draw(seed: u64) -> Plan {
        let mut plan = Plan::plain(seed);
        let mut random = Random::new(seed ^ 0x6d6f_7265);
        let joining = if random.one_in(4) { 1 + random.below(2) as usize } else { 0 };
        let least = usize::from(plan.copies).max(2);
        let zones = least + random.below((plan.nodes - least + 1) as u64) as usize;
        let kinds = plan.kinds;
        plan.shape = Shape {
            machines: plan.nodes + joining,
            zones: if random.one_in(3) { zones } else { plan.nodes + joining },
            disks: if random.one_in(4) { 2 } else { 1 },
            cache_bytes: 0,
        };
        let changes = Changes::draw(&mut random, kinds, plan.shape, plan.copies);
        let changes = Changes { joining: plan.nodes, ..changes };
        let machines = plan.shape.machines;
        plan.faults.extend(changes.schedule(&mut random, machines, plan.load_ms));
        // With numbers of their own, so that those who have none are as they were.
        let mut other = Random::new(seed ^ 0x7061_7573);
        if kinds.crashes && other.one_in(2) {
            plan.faults.extend(pauses(&mut other, machines, plan.load_ms));
        }
        plan.halves = other.one_in(2);
        let mut turns = Random::new(seed ^ 0x7475_726e);
        // One that is alone for an epoch must not lose its disk, nor rot.
        let keeps_disks = kinds.rot.is_none() && !changes.wiped && !changes.damaged;
        if kinds.crashes && keeps_disks && turns.one_in(4) {
            plan.faults.extend(deaths_in_turn(&mut turns, machines, plan.load_ms));
        }
        let mut stops = Random::new(seed ^ 0x7374_6f70);
        if keeps_disks && stops.one_in(8) {
            plan.faults.extend(stops_in_turn(&mut stops, machines, plan.load_ms, Stops::Orderly));
        }
        plan.faults.sort_by_key(|(at, _)| *at);
        plan.volume_guests = random.below(3);
        plan.writes_beside = Random::new(seed ^ 0x6265_7369).one_in(2);
        plan.alters = random.one_in(3) && !changes.wiped && !changes.damaged && kinds.rot.is_none();
        plan.is_swept = random.one_in(2);
        if seed >= EMPHASIS_FROM {
            plan.emphasize(keeps_disks);
        }
        let mut caches = Random::new(seed ^ 0x6361_6368);
        if seed >= CACHES_FROM && caches.one_in(2) {
            plan.shape.cache_bytes = (1 + caches.below(CACHE_SLOTS_MAX)) << 16;
        }
        plan.lost_in_outage = plan.draw_outage();
        plan
    }

    /// With a half of the seeds.
    fn emphasize(&mut self, keeps_disks: bool) {
        let mut random = Random::new(self.seed ^ 0x656d_7068);
        let machines = self.shape.machines;
        let kinds = match self.seed {
            ..RETURNS_FROM => 4,
            RETURNS_FROM..ANY_EMPHASIS_FROM => 6,
            ANY_EMPHASIS_FROM.. => 7,
        };
        match random.below(kinds) {
            0 if keeps_disks => {
                self.emphasis = Emphasis::Blocks;
                self.crowd(&mut random);
                self.faults.extend(stops_in_turn(&mut random, machines, self.load_ms, Stops::Any));
                if random.one_in(2) {
                    self.faults.extend(deaths_in_turn(&mut random, machines, self.load_ms));
                }
                // Only a disk that is writing leaves half of it.
                for _ in 0..random.below(10) {
                    let (at, host) = (random.below(self.load_ms), random.below(machines as u64) as usize);
                    self.faults.push((at, Fault::DieAfterOperations(host, random.below(60), true)));
                }
            }
            1 => {
                self.emphasis = Emphasis::Volumes;
                self.guests = 1;
                self.volume_guests = 2 + random.below(3);
                self.rest_ms = random.below(8);
                self.writes_beside = true;
            }
            4 if keeps_disks => {
                self.emphasis = Emphasis::Returns;
                self.crowd(&mut random);
                // What else goes wrong keeps the others from what these are for.
                self.faults = deaths_on_return(&mut random, machines, self.load_ms);
            }
            5 if keeps_disks => {
                self.emphasis = Emphasis::Stops;
                self.crowd(&mut random);
                self.faults = quick_stops(&mut random, machines, self.load_ms);
            }
            6 if keeps_disks => {
                self.emphasis = Emphasis::Torn;
                self.crowd(&mut random);
                self.faults = torn_blackouts(&mut random, machines, self.load_ms);
            }
            _ => {}
        }
        self.faults.sort_by_key(|(at, _)| *at);
    }

    /// Many guests on few blocks.
    fn crowd(&mut self, random: &mut Random) {
        self.guests = 4 + random.below(5) as u32;
        self.blocks = 1 + random.below(3) as u32;
        self.write_percent = 30 + random.below(40);
        self.rest_ms = random.below(8);
    }

    /// Only where the design promises that the others can go on: every object has one copy elsewhere, of three one more, and a
    /// copy that is damaged there has a sound one. Zones are machines: while of several zones one is left that has several
    /// machines, each of these may take writes alone, and the one that is lost may have.
    fn draw_outage(&self) -> Option<usize> {
        let goes_on = self.copies > 1 && self.shape.zones == self.shape.machines;
        let is_whole = self.kinds.rot.is_none() && !self.loses_a_disk();
        let mut random = Random::new(self.seed ^ 0x6f75_7461);
        (random.one_in(3) && goes_on && is_whole).then(|| random.below(self.shape.machines as u64) as usize)
    }

    /// Whether one machine comes back with an empty disk.
    fn loses_a_disk(&self) -> bool {
        self.faults.iter().any(|(_, fault)| matches!(fault, Fault::Wipe(..) | Fault::DamageOwn(..)))
    }

    /// The same without volumes that come and go, and without changes of the machines.
    pub fn plain(seed: u64) -> Plan {
        let mut random = Random::new(seed ^ 0x5eed);
        let nodes = 3 + random.below(3) as usize;
        let copies = 1 + random.below(3) as u8;
        let load_ms = 5000 + random.below(25_000);
        let copies = if random.one_in(2) { 3 } else { copies };
        let kinds = Kinds::draw(&mut random, nodes, copies);
        Plan {
            seed,
            emphasis: Emphasis::None,
            shape: Shape { machines: nodes, zones: nodes, disks: 1, cache_bytes: 0 },
            nodes,
            kinds,
            copies,
            guests: 1 + random.below(6) as u32,
            blocks: 1 + random.below(16) as u32,
            is_lazy: random.one_in(2),
            volume_guests: 0,
            alters: false,
            writes_beside: false,
            is_swept: false,
            lost_in_outage: None,
            write_percent: 30 + random.below(60),
            halves: false,
            rest_ms: random.below(40),
            load_ms,
            link: Link {
                latency_max_ms: 1 + random.below(5),
                loss_permille: if random.one_in(3) { random.below(20) } else { 0 },
                twice_permille: if random.one_in(3) { random.below(20) } else { 0 },
                ..Link::default()
            },
            slow_job_one_in: random.below(4),
            faults: kinds.schedule(&mut random, nodes, load_ms),
        }
    }
}

/// What came of a run.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In words; empty if all is well.
    pub violations: Vec<String>,
    /// See [`SimCluster::trace`].
    pub trace: u64,
    /// Simulated time.
    pub simulated_ms: u64,
    /// Writes answered, reads answered, writes with unknown outcome.
    pub operations: [usize; 3],
    /// Deliveries of the network.
    pub deliveries: u64,
    /// Epochs that were heard of.
    pub epochs: usize,
    /// Processes that ended, however.
    pub ends: usize,
}

/// Where a run is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Stage {
    Founding,
    Loaded,
    Healing,
    /// One process ends once more, and comes back.
    Shaken,
    /// Most machines fail at once, and one of them does not come back.
    Outage(usize),
    /// It does, after all.
    Whole(usize),
}

#[derive(Clone)]
struct Shared {
    stage: Arc<Mutex<Stage>>,
    stop: Arc<AtomicBool>,
    oracle: Oracle,
    epochs: Arc<Mutex<Epochs>>,
    lives: Arc<Mutex<Vec<u64>>>,
}

impl Shared {
    fn stage(&self) -> Stage {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn set_stage(&self, stage: Stage) {
        *self.stage.lock().unwrap_or_else(PoisonError::into_inner) = stage;
    }
}

/// What the clients do, from the first to the last moment. Gives the violations they found.
async fn script(plan: Plan, net: SimNet, places: Places, shared: Shared) -> Vec<String> {
    let (disk, lazy_disk) = match found(&plan, &net).await {
        Ok(disks) => disks,
        Err(error) => return vec![format!("healed when calm: no cluster could be founded: {error}")],
    };
    let load = Load {
        disk,
        net: net.clone(),
        oracle: shared.oracle.clone(),
        host_count: plan.shape.machines,
        stop: shared.stop.clone(),
        is_healed: Arc::default(),
        write_percent: plan.write_percent,
        halves: plan.halves,
        rest_ms: plan.rest_ms,
    };
    let mut random = Random::new(plan.seed ^ 0x6e57);
    shared.set_stage(Stage::Loaded);
    let guests: Vec<_> = (0..plan.guests).map(|number| tokio::spawn(load.clone().run(number, random.bits()))).collect();
    // Its values need not be told from the others': it has another volume.
    let lazy = Load { disk: lazy_disk, ..load.clone() };
    let lazy = plan.is_lazy.then(|| tokio::spawn(lazy_guest::run(lazy, random.bits())));
    let others: Vec<_> = (0..plan.volume_guests)
        .map(|number| tokio::spawn(VolumeGuest::new(load.clone(), number, random.bits(), &plan).run()))
        .collect();
    for guest in guests {
        // A guest does not panic: that would end the simulation.
        let _ = guest.await;
    }
    while shared.stage() != Stage::Healing {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut violations = healed_when_calm::violations(&net, plan.shape.machines).await;
    // Copies are removed only when it is certain that no node that is away had others.
    if plan.loses_a_disk() && (plan.is_swept || !violations.is_empty()) {
        violations = give_up_lost(&plan, &net, &shared.oracle).await;
    }
    if violations.is_empty() && plan.is_swept {
        shared.set_stage(Stage::Shaken);
        tokio::time::sleep(SHAKEN_FOR).await;
        violations.extend(healed_when_calm::violations(&net, plan.shape.machines).await);
    }
    if violations.is_empty()
        && let Some(lost) = plan.lost_in_outage
    {
        shared.set_stage(Stage::Outage(lost));
        tokio::time::sleep(SHAKEN_FOR).await;
        violations.extend(outage::violations(&load, lost).await);
        shared.set_stage(Stage::Whole(lost));
        violations.extend(healed_when_calm::violations(&net, plan.shape.machines).await);
    }
    if violations.is_empty() {
        load.is_healed.store(true, Ordering::Relaxed);
        for guest in lazy.into_iter().chain(others) {
            let _ = guest.await;
        }
        violations.extend(load.read_everything().await);
        violations.extend(look_at_disks(&plan, &net, &places, &[disk, lazy_disk]).await);
    }
    violations
}

/// What the lost disk may have had, beside nodes that were not up to date yet, all others wait for: only the operator can say that
/// it does not come back (README, Limits). Whatever was acknowledged must be there all the same.
async fn give_up_lost(plan: &Plan, net: &SimNet, oracle: &Oracle) -> Vec<String> {
    let giving_up = async { SimClient::connect(net, 0).await?.recover_force().await };
    match within(PATIENCE, giving_up).await {
        Ok(()) => {
            oracle.give_up_unanswered();
            tracing::info!("the operator gave the lost disk up");
        }
        Err(error) if error.to_string().contains("NoEffect") => tracing::info!("nothing waits for the lost disk"),
        Err(error) => return vec![format!("healed when calm: the lost disk cannot be given up: {error}")],
    }
    healed_when_calm::violations(net, plan.shape.machines).await
}

/// What the disks hold in the end.
async fn look_at_disks(plan: &Plan, net: &SimNet, places: &Places, disks: &[Disk]) -> Vec<String> {
    let copies = u32::from(plan.copies);
    let is_rotten = plan.kinds.rot.is_some();
    let objects: Vec<_> = disks.iter().flat_map(|disk| disk.objects()).collect();
    let mut violations = copies_agree::violations(net, 0, &objects, copies, is_rotten).await;
    if plan.is_swept {
        let (orphans, inventory) = nothing_orphaned::violations(net, places, plan.loses_a_disk()).await;
        violations.extend(orphans);
        violations.extend(zones_distinct::violations(&inventory, places));
        violations.extend(space_honest::violations(net, places).await);
        for (oid, copies) in inventory.wanted {
            let copies = u32::from(copies).min(places.shape.zones as u32);
            violations.extend(copies_agree::violations(net, 0, &[oid], copies, is_rotten).await);
        }
    }
    violations
}

/// Waits until the nodes are acquainted, makes a cluster of them and two volumes in it.
async fn found(plan: &Plan, net: &SimNet) -> std::io::Result<(Disk, Disk)> {
    let deadline = tokio::time::Instant::now() + FOUNDED_WITHIN;
    let mut client = loop {
        tokio::time::sleep(Duration::from_millis(100)).await;
        let ready = async {
            let mut client = SimClient::connect(net, 0).await?;
            let report = client.report().await?;
            let known = report["order"]["nodes"].as_array().map_or(0, Vec::len);
            Ok((known == plan.nodes).then_some(client))
        };
        match within(PATIENCE, ready).await {
            Ok(Some(client)) => break client,
            Ok(None) | Err(_) if tokio::time::Instant::now() < deadline => {}
            Ok(None) => return Err(std::io::Error::other("the nodes do not find each other")),
            Err(error) => return Err(error),
        }
    };
    within(FOUNDED_WITHIN, client.format(plan.copies, FORMAT_OPEN)).await?;
    let disk = Disk::create(&mut client, "disk", plan.blocks).await?;
    Ok((disk, Disk::create(&mut client, "lazy", plan.blocks.min(LAZY_BLOCKS)).await?))
}

/// Asks every node again and again for its epochs.
async fn watch(net: SimNet, host: usize, shared: Shared) {
    let life = |shared: &Shared| shared.lives.lock().unwrap_or_else(PoisonError::into_inner)[host];
    loop {
        tokio::time::sleep(WATCH_INTERVAL).await;
        let before = life(&shared);
        let asking = async { SimClient::connect(&net, host).await?.epochs().await };
        if let Ok(epochs) = within(PATIENCE, asking).await
            && life(&shared) == before
        {
            shared.epochs.lock().unwrap_or_else(PoisonError::into_inner).heard(host, before, epochs);
        }
    }
}

/// Runs a plan.
pub fn run(plan: &Plan) -> Report {
    let mut random = Random::new(plan.seed);
    let cluster = SimCluster::new(plan.shape, random.bits());
    let mut hands = Hands::new(cluster, random, plan.link, plan.slow_job_one_in, plan.nodes);
    let shared = Shared {
        stage: Arc::new(Mutex::new(Stage::Founding)),
        stop: Arc::default(),
        oracle: Oracle::default(),
        epochs: Arc::default(),
        lives: hands.lives.clone(),
    };
    let mut violations = play(&mut hands, plan, &shared);
    violations.extend(one_disk::violations(&shared.oracle));
    violations.extend(flushed_kept::violations(&shared.oracle));
    violations.extend(nothing_foreign::violations(&shared.oracle));
    let epochs = shared.epochs.lock().unwrap_or_else(PoisonError::into_inner);
    violations.extend(epochs.violations());
    Report {
        violations,
        trace: hands.cluster.trace(),
        simulated_ms: hands.cluster.now_ms(),
        operations: shared.oracle.counts(),
        deliveries: hands.cluster.net().delivered(),
        epochs: epochs.count(),
        ends: hands.ends,
    }
}

fn play(hands: &mut Hands, plan: &Plan, shared: &Shared) -> Vec<String> {
    let net = hands.cluster.net().clone();
    for host in 0..plan.shape.machines {
        hands.cluster.clients().spawn(watch(net.clone(), host, shared.clone()));
    }
    let places = Places { shape: plan.shape, disks: hands.cluster.disks() };
    let script = hands.cluster.clients().spawn(script(plan.clone(), net, places, shared.clone()));
    let mut faults = plan.faults.iter().peekable();
    let (mut loaded_at, mut acted_in) = (None, Stage::Founding);
    while !script.is_finished() {
        if hands.cluster.now_ms() > RUN_MS_MAX {
            return vec!["healed when calm: the run does not come to an end".to_owned()];
        }
        let stage = shared.stage();
        hands.tick(stage == Stage::Healing);
        let now = hands.cluster.now_ms();
        if std::mem::replace(&mut acted_in, stage) != stage {
            match stage {
                Stage::Shaken => hands.shake(),
                Stage::Outage(lost) => hands.fail_most(lost),
                Stage::Whole(lost) => hands.start(lost),
                Stage::Founding | Stage::Loaded | Stage::Healing => {}
            }
        }
        if stage != Stage::Loaded {
            continue;
        }
        let began = *loaded_at.get_or_insert(now);
        while let Some((_, fault)) = faults.next_if(|(at, _)| began + at <= now) {
            hands.inflict(*fault);
        }
        if now >= began + plan.load_ms {
            hands.heal();
            shared.set_stage(Stage::Healing);
            shared.stop.store(true, Ordering::Relaxed);
        }
    }
    let finished = hands.cluster.clients().block_on(script);
    finished.unwrap_or_else(|error| vec![format!("the clients failed: {error}")])
}
