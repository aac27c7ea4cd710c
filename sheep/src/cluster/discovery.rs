//! Finds ADDRESSES of other nodes' ports, nothing else: from `--join`, from the peers remembered in a file, and from the
//! local network. Who is there is found out by whoever tries them.
//!
//! The file `peers` holds one address per line, the latest known first. It is only a help: a damaged line is skipped, a
//! file that cannot be written is a warning.
//!
//! Always holds:
//! 1. An address is handed out again, with pauses that grow, until it is known; a known one never.
//! 2. What the network claims is bounded: at most [`NEIGHBOURS_MAX`] addresses, each for [`SIGHTING_LASTS`].

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;

use crate::world::World;
use crate::world::disk::{self, Files, OpenMode};
use crate::world::net::{Announcement, Neighbours};

/// A try that led to nothing is repeated after the first pause, doubling up to the last.
const PAUSE_FIRST: Duration = Duration::from_millis(500);
const PAUSE_LAST: Duration = Duration::from_secs(5);
/// Addresses in the file.
const REMEMBERED_MAX: usize = 64;
/// A longer file is not ours.
const FILE_BYTES_MAX: u64 = 64 << 10;
/// Addresses from the local network that are tried side by side.
pub const NEIGHBOURS_MAX: usize = 1024;
/// For how long an address is tried after the local network named it last.
pub const SIGHTING_LASTS: Duration = Duration::from_mins(2);
/// Names that are slow to resolve must not delay the others.
const RESOLVE_PATIENCE: Duration = Duration::from_secs(5);
/// The file is written this long after a change, so that many changes are one.
const WRITE_AFTER: Duration = Duration::from_millis(200);
/// After a failure of the file, or of multicast DNS as a whole.
const REPAIR_PAUSE: Duration = Duration::from_secs(30);
/// Addresses that wait to be tried.
const CANDIDATES_MAX: usize = 64;

/// A name or an address, and a port, as given to `--join`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Seed {
    /// A name or an address in writing.
    pub host: String,
    /// The node port.
    pub port: u16,
}

/// Where to look.
pub struct DiscoveryConfig {
    /// From `--join`.
    pub seeds: Vec<Seed>,
    /// `META/cluster`: holds the file `peers`.
    pub directory: PathBuf,
    /// What to tell the local network; `None` leaves multicast DNS out.
    pub announcement: Option<Announcement>,
}

enum Order {
    Known(SocketAddr),
    Unknown(SocketAddr),
    Ourselves(SocketAddr),
    Forget(SocketAddr),
    Resolved(Seed, Vec<SocketAddr>),
}

/// Looks for addresses as long as it lives.
pub struct Discovery {
    orders: mpsc::UnboundedSender<Order>,
}

impl Discovery {
    /// Starts looking. The receiver yields addresses to try, one after the other, again and again with growing pauses
    /// until they are [`Discovery::known`].
    pub async fn start(world: World, config: DiscoveryConfig) -> (Arc<Discovery>, mpsc::Receiver<SocketAddr>) {
        let directory = config.directory.clone();
        let remembered = disk::run(&world.disk, move |files| {
            read_peers(files, &directory.join("peers")).unwrap_or_else(|error| {
                tracing::warn!("cannot read the remembered peers in {}: {error}", directory.display());
                Vec::new()
            })
        })
        .await;
        let (candidates, receiver) = mpsc::channel(CANDIDATES_MAX);
        let (orders, orders_receiver) = mpsc::unbounded_channel();
        let search = Search {
            tries: BTreeMap::new(),
            seeds: config.seeds.into_iter().map(|seed| (seed, Answer::default())).collect(),
            known: BTreeSet::new(),
            ourselves: BTreeSet::new(),
            remembered,
            candidates,
            orders: orders.downgrade(),
            write_at: None,
            listen_at: Some(Duration::ZERO).filter(|_| config.announcement.is_some()),
            neighbours: None,
            announcement: config.announcement,
            directory: config.directory,
            world,
        };
        tokio::spawn(search.run(orders_receiver));
        (Arc::new(Discovery { orders }), receiver)
    }

    /// A node of ours is connected at this address: it need not be tried, and is remembered over a restart.
    pub fn known(&self, address: SocketAddr) {
        self.order(Order::Known(address));
    }

    /// The connection at this address was lost: it is tried again.
    pub fn unknown(&self, address: SocketAddr) {
        self.order(Order::Unknown(address));
    }

    /// This address is this node itself: it is never tried.
    pub fn is_ourselves(&self, address: SocketAddr) {
        self.order(Order::Ourselves(address));
    }

    /// The node at this address is no longer one of ours: it is not remembered any more.
    pub fn forget(&self, address: SocketAddr) {
        self.order(Order::Forget(address));
    }

    fn order(&self, order: Order) {
        // Its task is gone only when the process ends.
        let _ = self.orders.send(order);
    }
}

/// How it goes with one address.
struct Try {
    next_at: Duration,
    pause: Duration,
    /// `None` for seeds and remembered ones, which are tried for ever.
    until: Option<Duration>,
}

/// What a seed's name resolved to last.
#[derive(Default)]
struct Answer {
    addresses: Vec<SocketAddr>,
    next_at: Duration,
    pause: Duration,
    is_asked: bool,
}

struct Search {
    world: World,
    directory: PathBuf,
    seeds: BTreeMap<Seed, Answer>,
    tries: BTreeMap<SocketAddr, Try>,
    known: BTreeSet<SocketAddr>,
    ourselves: BTreeSet<SocketAddr>,
    /// The latest known first.
    remembered: Vec<SocketAddr>,
    candidates: mpsc::Sender<SocketAddr>,
    orders: mpsc::WeakUnboundedSender<Order>,
    write_at: Option<Duration>,
    announcement: Option<Announcement>,
    neighbours: Option<Box<dyn Neighbours>>,
    listen_at: Option<Duration>,
}

impl Search {
    async fn run(mut self, mut orders: mpsc::UnboundedReceiver<Order>) {
        let now = self.world.clock.monotonic();
        for address in self.remembered.clone() {
            self.try_at(address, now, None);
        }
        loop {
            let now = self.world.clock.monotonic();
            self.resolve_seeds(now);
            self.hand_out(now);
            self.listen(now);
            if self.write_at.is_some_and(|at| at <= now) {
                self.write().await;
            }
            let pause = self.next_due().map_or(Duration::from_hours(1), |due| due.saturating_sub(now));
            tokio::select! {
                order = orders.recv() => match order {
                    Some(order) => self.obey(order),
                    None => break,
                },
                seen = next_of(&mut self.neighbours) => self.saw(seen),
                () = self.world.clock.sleep(pause) => {}
            }
        }
        // What was learnt last is worth a write.
        if self.write_at.is_some() {
            self.write().await;
        }
    }

    fn next_due(&self) -> Option<Duration> {
        let tries = self.tries.values().map(|one| one.next_at);
        let seeds = self.seeds.values().filter(|answer| !answer.is_asked).map(|answer| answer.next_at);
        tries.chain(seeds).chain(self.write_at).chain(self.listen_at).min()
    }

    fn obey(&mut self, order: Order) {
        let now = self.world.clock.monotonic();
        match order {
            Order::Known(address) => {
                self.tries.remove(&address);
                self.known.insert(address);
                if self.ourselves.contains(&address) || self.remembered.first() == Some(&address) {
                    return;
                }
                let was_there = self.remembered.contains(&address);
                self.remembered.retain(|other| *other != address);
                self.remembered.insert(0, address);
                self.remembered.truncate(REMEMBERED_MAX);
                if !was_there {
                    self.write_at.get_or_insert(now + WRITE_AFTER);
                }
            }
            Order::Unknown(address) => {
                if self.known.remove(&address) {
                    let is_lasting = self.remembered.contains(&address);
                    self.try_at(address, now, if is_lasting { None } else { Some(now + SIGHTING_LASTS) });
                }
            }
            Order::Ourselves(address) => {
                self.ourselves.insert(address);
                self.tries.remove(&address);
                self.drop_remembered(now, address);
            }
            Order::Forget(address) => {
                self.known.remove(&address);
                self.tries.remove(&address);
                self.drop_remembered(now, address);
            }
            Order::Resolved(seed, addresses) => {
                let Some(answer) = self.seeds.get_mut(&seed) else { return };
                answer.is_asked = false;
                answer.pause = (answer.pause * 2).clamp(PAUSE_FIRST, PAUSE_LAST);
                answer.next_at = now + answer.pause;
                answer.addresses.clone_from(&addresses);
                for address in addresses {
                    self.hand_out_one(address);
                }
            }
        }
    }

    fn drop_remembered(&mut self, now: Duration, address: SocketAddr) {
        let before = self.remembered.len();
        self.remembered.retain(|other| *other != address);
        if self.remembered.len() != before {
            self.write_at.get_or_insert(now + WRITE_AFTER);
        }
    }

    fn try_at(&mut self, address: SocketAddr, at: Duration, until: Option<Duration>) {
        if !self.known.contains(&address) && !self.ourselves.contains(&address) {
            self.tries.insert(address, Try { next_at: at, pause: PAUSE_FIRST, until });
        }
    }

    /// Asks for the addresses of every seed of which none is known: a name may mean another machine by now.
    fn resolve_seeds(&mut self, now: Duration) {
        for (seed, answer) in &mut self.seeds {
            if answer.is_asked || answer.next_at > now {
                continue;
            }
            if answer.addresses.iter().any(|address| self.known.contains(address)) {
                answer.pause = Duration::ZERO;
                answer.next_at = now + PAUSE_LAST;
                continue;
            }
            answer.is_asked = true;
            let (world, seed, orders) = (self.world.clone(), seed.clone(), self.orders.clone());
            tokio::spawn(async move {
                let resolved = tokio::select! {
                    resolved = world.net.resolve(&seed.host, seed.port) => resolved,
                    () = world.clock.sleep(RESOLVE_PATIENCE) => Err(io::ErrorKind::TimedOut.into()),
                };
                let addresses = resolved.unwrap_or_else(|error| {
                    tracing::debug!("cannot resolve {}: {error}", seed.host);
                    Vec::new()
                });
                if let Some(orders) = orders.upgrade() {
                    let _ = orders.send(Order::Resolved(seed, addresses));
                }
            });
        }
    }

    fn hand_out(&mut self, now: Duration) {
        self.tries.retain(|_, one| one.until.is_none_or(|until| until > now));
        let due: Vec<SocketAddr> =
            self.tries.iter().filter(|(_, one)| one.next_at <= now).map(|(address, _)| *address).collect();
        for address in due {
            self.hand_out_one(address);
            if let Some(one) = self.tries.get_mut(&address) {
                one.next_at = now + one.pause;
                one.pause = (one.pause * 2).min(PAUSE_LAST);
            }
        }
    }

    fn hand_out_one(&self, address: SocketAddr) {
        if !self.known.contains(&address) && !self.ourselves.contains(&address) {
            // When so many wait to be tried, this one's turn comes with its next pause.
            let _ = self.candidates.try_send(address);
        }
    }

    fn listen(&mut self, now: Duration) {
        let Some(announcement) = self.announcement.as_ref().filter(|_| self.listen_at.is_some_and(|at| at <= now))
        else {
            return;
        };
        match self.world.net.neighbours(announcement) {
            Ok(neighbours) => {
                self.neighbours = Some(neighbours);
                self.listen_at = None;
            }
            Err(error) => {
                tracing::warn!("cannot look for nodes on the local network: {error}; name them by --join");
                self.listen_at = Some(now + REPAIR_PAUSE);
            }
        }
    }

    fn saw(&mut self, seen: io::Result<Vec<SocketAddr>>) {
        let now = self.world.clock.monotonic();
        let addresses = seen.unwrap_or_else(|error| {
            tracing::warn!("the search on the local network has ended: {error}; it begins again soon");
            self.neighbours = None;
            self.listen_at = Some(now + REPAIR_PAUSE);
            Vec::new()
        });
        for address in addresses {
            let until = Some(now + SIGHTING_LASTS);
            let has_room = self.tries.len() < NEIGHBOURS_MAX;
            match self.tries.get_mut(&address) {
                Some(one) if one.until.is_some() => one.until = until,
                Some(_) => {}
                None if has_room => self.try_at(address, now, until),
                None => {}
            }
        }
    }

    async fn write(&mut self) {
        let (directory, addresses) = (self.directory.clone(), self.remembered.clone());
        let written = disk::run(&self.world.disk, move |files| write_peers(files, &directory, &addresses)).await;
        self.write_at = match written {
            Ok(()) => None,
            Err(error) => {
                tracing::warn!("cannot remember the peers in {}: {error}", self.directory.display());
                Some(self.world.clock.monotonic() + REPAIR_PAUSE)
            }
        };
    }
}

async fn next_of(neighbours: &mut Option<Box<dyn Neighbours>>) -> io::Result<Vec<SocketAddr>> {
    match neighbours {
        Some(neighbours) => neighbours.next().await,
        None => std::future::pending().await,
    }
}

fn read_peers(files: &dyn Files, path: &Path) -> io::Result<Vec<SocketAddr>> {
    let file = match files.open(path, OpenMode::Read) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        other => other?,
    };
    let mut bytes = vec![0; file.len()?.min(FILE_BYTES_MAX) as usize];
    let count = file.read_at(&mut bytes, 0)?;
    let text = String::from_utf8_lossy(&bytes[..count]);
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for address in text.lines().filter_map(|line| line.trim().parse().ok()) {
        if addresses.len() < REMEMBERED_MAX && !addresses.contains(&address) {
            addresses.push(address);
        }
    }
    Ok(addresses)
}

fn write_peers(files: &dyn Files, directory: &Path, addresses: &[SocketAddr]) -> io::Result<()> {
    files.create_dir(directory)?;
    let temporary = directory.join("next-peers");
    let mut text = addresses.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join("\n");
    if !text.is_empty() {
        text.push('\n');
    }
    let file = files.open(&temporary, OpenMode::Truncate)?;
    file.write_at(&[io::IoSlice::new(text.as_bytes())], 0)?;
    file.sync_data()?;
    files.rename(&temporary, &directory.join("peers"))?;
    files.sync_dir(directory)
}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;
    use crate::world::net::{Connection, Endpoint, Listener, Net, NetFuture};

    /// Names and neighbours in memory.
    #[derive(Default)]
    struct FakeNet {
        names: Mutex<BTreeMap<String, Vec<SocketAddr>>>,
        neighbours: Mutex<Option<mpsc::UnboundedReceiver<Vec<SocketAddr>>>>,
    }

    struct FakeNeighbours(mpsc::UnboundedReceiver<Vec<SocketAddr>>);

    impl Neighbours for FakeNeighbours {
        fn next(&mut self) -> NetFuture<'_, Vec<SocketAddr>> {
            Box::pin(async { self.0.recv().await.ok_or(io::ErrorKind::BrokenPipe.into()) })
        }
    }

    impl Net for FakeNet {
        fn listen(&self, _: &Endpoint) -> NetFuture<'_, Box<dyn Listener>> {
            Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
        }

        fn connect(&self, _: &Endpoint) -> NetFuture<'_, Connection> {
            Box::pin(async { Err(io::ErrorKind::Unsupported.into()) })
        }

        fn resolve(&self, name: &str, port: u16) -> NetFuture<'_, Vec<SocketAddr>> {
            let found = self.names.lock().unwrap().get(name).cloned().unwrap_or_default();
            Box::pin(async move { Ok(found.iter().map(|found| SocketAddr::new(found.ip(), port)).collect()) })
        }

        fn neighbours(&self, _: &Announcement) -> io::Result<Box<dyn Neighbours>> {
            let neighbours = self.neighbours.lock().unwrap().take().ok_or(io::ErrorKind::AddrInUse)?;
            Ok(Box::new(FakeNeighbours(neighbours)))
        }
    }

    fn address(last: u8) -> SocketAddr {
        SocketAddr::from(([10, 0, 0, last], 7010))
    }

    fn world(net: &Arc<FakeNet>) -> World {
        World { net: net.clone(), ..World::real(1).unwrap() }
    }

    fn config(directory: &Path, seeds: &[&str]) -> DiscoveryConfig {
        let seeds = seeds.iter().map(|host| Seed { host: (*host).to_string(), port: 7010 }).collect();
        let announcement = Announcement { name: "one".into(), port: 7010, properties: Vec::new() };
        DiscoveryConfig { seeds, directory: directory.to_path_buf(), announcement: Some(announcement) }
    }

    async fn next(receiver: &mut mpsc::Receiver<SocketAddr>) -> SocketAddr {
        tokio::time::timeout(Duration::from_secs(20), receiver.recv()).await.expect("an address in time").unwrap()
    }

    async fn quiet(receiver: &mut mpsc::Receiver<SocketAddr>) {
        let more = tokio::time::timeout(Duration::from_millis(1200), receiver.recv()).await;
        assert!(more.is_err(), "nothing to try, but got {more:?}");
    }

    #[tokio::test]
    async fn seeds_are_tried_until_known_and_remembered() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("cluster");
        let net = Arc::new(FakeNet::default());
        net.names.lock().unwrap().insert("alpha".into(), vec![address(1)]);
        let (discovery, mut receiver) = Discovery::start(world(&net), config(&place, &["alpha", "nowhere"])).await;
        assert_eq!(next(&mut receiver).await, address(1));
        assert_eq!(next(&mut receiver).await, address(1), "tried again");
        // The name means another machine now.
        net.names.lock().unwrap().insert("alpha".into(), vec![address(2)]);
        assert_eq!(next(&mut receiver).await, address(2));
        discovery.known(address(2));
        discovery.known(address(3));
        quiet(&mut receiver).await;
        let text = std::fs::read_to_string(place.join("peers")).unwrap();
        assert_eq!(text, "10.0.0.3:7010\n10.0.0.2:7010\n");
        discovery.unknown(address(3));
        assert_eq!(next(&mut receiver).await, address(3), "a lost one is tried again");
        discovery.forget(address(3));
        discovery.is_ourselves(address(2));
        quiet(&mut receiver).await;
        assert_eq!(std::fs::read_to_string(place.join("peers")).unwrap(), "");
    }

    #[tokio::test]
    async fn remembered_peers_come_back_and_damage_is_skipped() {
        let directory = tempfile::tempdir().unwrap();
        let damaged = b"10.0.0.4:7010\nnonsense\n\xff\xfe\n10.0.0.4:7010\n[fd00::1]:7010\n";
        std::fs::write(directory.path().join("peers"), damaged).unwrap();
        let net = Arc::new(FakeNet::default());
        let (discovery, mut receiver) = Discovery::start(world(&net), config(directory.path(), &[])).await;
        let found = BTreeSet::from([next(&mut receiver).await, next(&mut receiver).await]);
        assert_eq!(found, BTreeSet::from([address(4), "[fd00::1]:7010".parse().unwrap()]));
        for index in 0..100 {
            discovery.known(SocketAddr::from(([10, 0, 1, index], 7010)));
        }
        drop(discovery);
        drop(receiver);
        let path = directory.path().join("peers");
        let mut lines = 0;
        for _ in 0..100 {
            lines = std::fs::read(&path).unwrap().split(|byte| *byte == b'\n').count() - 1;
            if lines == REMEMBERED_MAX {
                break;
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        assert_eq!(lines, REMEMBERED_MAX, "written at the end, and bounded");
    }

    #[tokio::test]
    async fn neighbours_are_tried_when_seen() {
        let directory = tempfile::tempdir().unwrap();
        let (network, neighbours) = mpsc::unbounded_channel();
        let net = Arc::new(FakeNet { neighbours: Mutex::new(Some(neighbours)), ..FakeNet::default() });
        let (discovery, mut receiver) = Discovery::start(world(&net), config(directory.path(), &[])).await;
        discovery.is_ourselves(address(9));
        tokio::time::sleep(Duration::from_millis(10)).await;
        network.send(vec![address(9), address(5)]).unwrap();
        assert_eq!(next(&mut receiver).await, address(5));
        assert_eq!(next(&mut receiver).await, address(5));
        discovery.known(address(5));
        network.send(vec![address(5)]).unwrap();
        quiet(&mut receiver).await;
        // A network that floods is bounded.
        for index in 0..20_000_u32 {
            network.send(vec![SocketAddr::from((index.to_be_bytes(), 7010))]).unwrap();
        }
        next(&mut receiver).await;
        drop(network);
        next(&mut receiver).await;
    }
}
