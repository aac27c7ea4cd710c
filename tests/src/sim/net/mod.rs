//! A network in memory: streams and datagrams between the machines of a simulation, through one queue in time.
//!
//! | file | owns |
//! |---|---|
//! | this one | machines, links, the queue, and what faults do to them |
//! | `streams` | connections: their bytes, their ends, and who waits for them |
//! | `doors` | the same as a process sees it: [`sheep::world::net::Net`] |
//!
//! Always holds:
//! 1. Nothing that a machine sends arrives before the next tick, so machines may take turns within one.
//! 2. The bytes of a stream come in order and once, or the stream ends; loss only delays them. Datagrams may be lost, come
//!    twice and in any order.
//! 3. A machine that is up answers for its dead processes: it refuses new connections and resets old ones. One that is down,
//!    or cut off, is silent, and its connections hang until somebody sends on them after it is back.
//! 4. Nothing depends on anything but the seed and the order of the calls; [`SimNet::trace`] tells two histories apart.

mod doors;
mod streams;

use std::collections::{BTreeMap, VecDeque};
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::Waker;

use sheep::world::net::{Connection, Endpoint};

pub use doors::ProcessNet;
use streams::Pipe;

use super::{Random, mix};

/// Where a lost segment is sent again first, and at most, milliseconds: TCP's usual bounds, but for the last.
const RETRY_FIRST_MS: u64 = 200;
const RETRY_LAST_MS: u64 = 4000;
/// When a connection attempt without an answer is repeated, milliseconds.
const SYN_RETRY_MS: u64 = 1000;

/// One direction between two machines.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Link {
    /// Nothing passes.
    pub is_cut: bool,
    /// The fastest passage, milliseconds; 0 counts as 1.
    pub latency_min_ms: u64,
    /// The slowest.
    pub latency_max_ms: u64,
    /// Of a thousand packets, how many are lost.
    pub loss_permille: u64,
    /// Of a thousand datagrams, how many come twice.
    pub twice_permille: u64,
}

impl Default for Link {
    fn default() -> Link {
        Link { is_cut: false, latency_min_ms: 1, latency_max_ms: 2, loss_permille: 0, twice_permille: 0 }
    }
}

/// Which life of which machine's process.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
struct Process {
    host: usize,
    life: u64,
}

/// Where somebody listens on a machine.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
enum Port {
    Tcp(u16),
    Unix(PathBuf),
}

#[derive(Default)]
struct ListenerState {
    waiting: VecDeque<Connection>,
    waker: Option<Waker>,
}

#[derive(Default)]
struct SocketState {
    waiting: VecDeque<(Vec<u8>, SocketAddr)>,
    waker: Option<Waker>,
}

struct Host {
    is_up: bool,
    /// The life of the process that runs; lives below are over.
    life: u64,
    is_running: bool,
    /// Set by the machine's disk when it dies in the middle of something: nothing leaves the machine any more.
    is_dead: Option<Box<dyn Fn() -> bool + Send>>,
    /// Packets until the process dies.
    sends_left: Option<u64>,
    listeners: BTreeMap<Port, ListenerState>,
    sockets: BTreeMap<u16, SocketState>,
    next_port: u16,
}

/// An attempt to connect.
struct Attempt {
    from: Process,
    to: usize,
    port: Port,
    retry_ms: u64,
    outcome: Option<std::io::Result<Connection>>,
    waker: Option<Waker>,
}

enum Event {
    /// The head of a pipe may be due.
    Pipe(u64),
    Datagram {
        from: SocketAddr,
        to: SocketAddr,
        bytes: Vec<u8>,
    },
    /// An attempt reaches the other machine.
    Syn(u64),
    /// Its answer reaches the one that began it; `None` is a refusal.
    SynAck(u64, Option<Connection>),
    /// A reset reaches the sending end of this pipe and the receiving end of its twin.
    Reset(u64),
}

struct State {
    /// Ends of connections hold on to all of it.
    shared: Weak<Mutex<State>>,
    now: u64,
    random: Random,
    sequence: u64,
    queue: BTreeMap<(u64, u64), Event>,
    hosts: Vec<Host>,
    links: Vec<Vec<Link>>,
    pipes: BTreeMap<u64, Pipe>,
    next_pipe: u64,
    attempts: BTreeMap<u64, Attempt>,
    next_attempt: u64,
    trace: u64,
    delivered: u64,
}

/// The network of one simulation. Clones are the same one.
#[derive(Clone)]
pub struct SimNet {
    state: Arc<Mutex<State>>,
}

/// The address of a machine.
pub fn address(host: usize) -> IpAddr {
    IpAddr::V4(Ipv4Addr::new(10, 0, 0, 1 + host as u8))
}

fn host_at(address: IpAddr) -> Option<usize> {
    match address {
        IpAddr::V4(address) => match address.octets() {
            [10, 0, 0, last] if last > 0 => Some(usize::from(last) - 1),
            _ => None,
        },
        IpAddr::V6(_) => None,
    }
}

impl SimNet {
    /// `count` machines, all up, nothing running on them.
    pub fn new(count: usize, seed: u64) -> SimNet {
        let host = || Host {
            is_up: true,
            life: 0,
            is_running: false,
            is_dead: None,
            sends_left: None,
            listeners: BTreeMap::new(),
            sockets: BTreeMap::new(),
            next_port: 40_000,
        };
        SimNet {
            state: Arc::new_cyclic(|shared| {
                Mutex::new(State {
                    shared: shared.clone(),
                    now: 0,
                    random: Random::new(seed),
                    sequence: 0,
                    queue: BTreeMap::new(),
                    hosts: (0..count).map(|_| host()).collect(),
                    links: vec![vec![Link::default(); count]; count],
                    pipes: BTreeMap::new(),
                    next_pipe: 0,
                    attempts: BTreeMap::new(),
                    next_attempt: 0,
                    trace: 0,
                    delivered: 0,
                })
            }),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A new process on a machine, which must be up; the one before is over. `is_dead` tells when the machine stopped in the
    /// middle of something.
    pub fn boot(&self, host: usize, is_dead: Box<dyn Fn() -> bool + Send>) -> ProcessNet {
        let mut state = self.lock();
        let machine = &mut state.hosts[host];
        assert!(machine.is_up && !machine.is_running, "machine {host} cannot start a process now");
        machine.life += 1;
        machine.is_running = true;
        machine.is_dead = Some(is_dead);
        machine.sends_left = None;
        let process = Process { host, life: machine.life };
        drop(state);
        ProcessNet::new(self.state.clone(), process)
    }

    /// Ends a machine's process; the machine tells whoever is connected.
    pub fn kill(&self, host: usize) {
        let mut state = self.lock();
        let process = state.end_process(host);
        state.reset_all_of(process);
        let rubbish = state.forget_listening(process);
        drop(state);
        drop(rubbish);
    }

    /// Cuts a machine's power: silence. Only connections from the machine itself end.
    pub fn power_off(&self, host: usize) {
        let mut state = self.lock();
        let process = state.end_process(host);
        let mut wakers = state.forget_all_of(process);
        let rubbish = state.forget_listening(process);
        state.hosts[host].is_up = false;
        drop(state);
        wakers.drain(..).for_each(Waker::wake);
        drop(rubbish);
    }

    /// The machine is up again, with nothing running on it.
    pub fn power_on(&self, host: usize) {
        self.lock().hosts[host].is_up = true;
    }

    /// The machine stops being heard after so many more packets, until it is killed or cut off for good.
    pub fn stop_after_sends(&self, host: usize, count: u64) {
        self.lock().hosts[host].sends_left = Some(count);
    }

    /// Takes back `stop_after_sends`, if it has not come true.
    pub fn go_on_sending(&self, host: usize) {
        let left = &mut self.lock().hosts[host].sends_left;
        if *left != Some(0) {
            *left = None;
        }
    }

    /// Simulated time, milliseconds.
    pub fn now_ms(&self) -> u64 {
        self.lock().now
    }

    /// Whether `stop_after_sends` has come true, or the disk says that the machine is dead.
    pub fn has_stopped(&self, host: usize) -> bool {
        let state = self.lock();
        state.hosts[host].is_running && !state.hosts[host].can_send()
    }

    /// Changes one direction between two machines.
    pub fn set_link(&self, from: usize, to: usize, link: Link) {
        self.lock().links[from][to] = link;
    }

    /// As it is now.
    pub fn link(&self, from: usize, to: usize) -> Link {
        self.lock().links[from][to]
    }

    /// Breaks all connections between two machines.
    pub fn reset_between(&self, one: usize, other: usize) {
        let mut state = self.lock();
        let hit = |pipe: &Pipe| [(one, other), (other, one)].contains(&(pipe.from.host, pipe.to.host));
        let broken: Vec<u64> = state.pipes.iter().filter(|(_, pipe)| hit(pipe)).map(|(id, _)| *id).collect();
        let wakers: Vec<Waker> = broken.into_iter().flat_map(|id| state.break_pipe(id)).collect();
        drop(state);
        wakers.into_iter().for_each(Waker::wake);
    }

    /// Moves time on and delivers what is due.
    pub fn advance(&self, now_ms: u64) {
        self.lock().now = now_ms;
        loop {
            let mut state = self.lock();
            let Some(entry) = state.queue.first_entry() else { return };
            if entry.key().0 > now_ms {
                return;
            }
            let event = entry.remove();
            // What is dropped or woken may call in here again.
            let (wakers, rubbish) = state.deliver(event);
            drop(state);
            wakers.into_iter().for_each(Waker::wake);
            drop(rubbish);
        }
    }

    /// A number that differs, as good as surely, when two histories differ.
    pub fn trace(&self) -> u64 {
        self.lock().trace
    }

    /// Adds something from outside to the trace.
    pub fn note(&self, what: u64) {
        self.lock().note(what);
    }

    /// Events so far.
    pub fn delivered(&self) -> u64 {
        self.lock().delivered
    }

    /// A client's connection to the unix socket of a machine, as a process on that machine makes it: links do not matter.
    pub fn connect_local(&self, host: usize, path: PathBuf) -> sheep::world::net::NetFuture<'static, Connection> {
        let process = Process { host, life: 0 };
        ProcessNet::new(self.state.clone(), process).connect_owned(Endpoint::Unix(path))
    }
}

impl Host {
    fn can_send(&self) -> bool {
        self.sends_left != Some(0) && !self.is_dead.as_ref().is_some_and(|is_dead| is_dead())
    }
}

/// What a delivery leaves to be done outside of the lock.
type Leftovers = (Vec<Waker>, Vec<Connection>);

impl State {
    fn note(&mut self, what: u64) {
        self.trace = mix(self.trace ^ what.wrapping_mul(0x9e37_79b9_7f4a_7c15));
    }

    fn schedule(&mut self, at: u64, event: Event) {
        self.sequence += 1;
        self.queue.insert((at, self.sequence), event);
    }

    /// Life 0 is whoever else is on the machine: a local client.
    fn is_alive(&self, process: Process) -> bool {
        let host = &self.hosts[process.host];
        process.life == 0 || (host.is_running && host.life == process.life)
    }

    /// Whether a process may send now; counts it.
    fn may_send(&mut self, process: Process) -> bool {
        if process.life == 0 {
            return true;
        }
        if !self.is_alive(process) || !self.hosts[process.host].can_send() {
            return false;
        }
        if let Some(left) = &mut self.hosts[process.host].sends_left {
            *left -= 1;
        }
        true
    }

    fn is_open(&self, from: usize, to: usize) -> bool {
        self.hosts[from].is_up && self.hosts[to].is_up && (from == to || !self.links[from][to].is_cut)
    }

    /// How long a packet takes.
    fn latency(&mut self, from: usize, to: usize) -> u64 {
        if from == to {
            return 0;
        }
        let link = self.links[from][to];
        let min = link.latency_min_ms.max(1);
        min + self.random.below(link.latency_max_ms.saturating_sub(min) + 1)
    }

    fn is_lost(&mut self, from: usize, to: usize) -> bool {
        from != to && self.random.below(1000) < self.links[from][to].loss_permille
    }

    fn end_process(&mut self, host: usize) -> Process {
        let machine = &mut self.hosts[host];
        let process = Process { host, life: machine.life };
        machine.is_running = false;
        machine.is_dead = None;
        machine.sends_left = None;
        process
    }

    fn deliver(&mut self, event: Event) -> Leftovers {
        self.delivered += 1;
        self.note(self.now);
        match event {
            Event::Pipe(id) => self.deliver_stream(id),
            Event::Reset(id) => self.deliver_reset(id),
            Event::Syn(id) => self.deliver_syn(id),
            Event::SynAck(id, connection) => self.deliver_syn_ack(id, connection),
            Event::Datagram { from, to, bytes } => (self.deliver_datagram(from, to, bytes), Vec::new()),
        }
    }

    fn send_datagram(&mut self, process: Process, from: SocketAddr, to: SocketAddr, bytes: &[u8]) {
        let (Some(target), true) = (host_at(to.ip()), self.may_send(process)) else { return };
        if target >= self.hosts.len() || self.is_lost(process.host, target) {
            return;
        }
        let twice = self.random.below(1000) < self.links[process.host][target].twice_permille;
        for _ in 0..=u64::from(twice) {
            let due = self.now + self.latency(process.host, target);
            self.schedule(due, Event::Datagram { from, to, bytes: bytes.to_vec() });
        }
    }

    fn deliver_datagram(&mut self, from: SocketAddr, to: SocketAddr, bytes: Vec<u8>) -> Vec<Waker> {
        const WAITING_MAX: usize = 512;
        let (Some(source), Some(target)) = (host_at(from.ip()), host_at(to.ip())) else { return Vec::new() };
        self.note((to.port() as u64) << 32 | (source as u64) << 24 | (target as u64) << 16 | bytes.len() as u64);
        if !self.is_open(source, target) || !self.hosts[target].is_running {
            return Vec::new();
        }
        let Some(socket) = self.hosts[target].sockets.get_mut(&to.port()) else { return Vec::new() };
        if socket.waiting.len() < WAITING_MAX {
            socket.waiting.push_back((bytes, from));
        }
        socket.waker.take().into_iter().collect()
    }
}
