//! Readers and writers of one volume through many nodes at once, recorded for [`crate::linear`].
//!
//! Clients speak the native protocol over the unix sockets of the nodes, which are reached by path whatever becomes of the
//! network. Each has one request under way, waits long for its answer, and connects again when its node was killed. The
//! objects exist before the first of them starts, so no request depends on another.
//!
//! Always holds:
//! 1. A write that was cut off, timed out or refused has an unknown outcome: it is recorded as such and never repeated.
//! 2. Every write of one [`Record`] has a number of its own, and all times are of its one clock.
//! 3. Content that nobody wrote is an error at once, not a matter for the check.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, anyhow, bail, ensure};
use qemu_proto::oid::{Oid, VdiId};

use crate::clients::{Client, MAP_OFFSET, Refused, Request, flag, opcode, result};
use crate::linear::{Action, Operation, Verdict, check};
use crate::sectors::{BLOCK_BYTES, block_content, block_sequences};
use crate::sim::Random;

/// Blocks that share an object: enough objects then that every node holds some.
const BLOCKS_PER_OBJECT: u32 = 8;
const OBJECT_BYTES: u64 = 4 << 20;
/// Blocks lie apart, so that each has pages of its own everywhere.
const BLOCK_STRIDE_BYTES: u64 = 64 << 10;
const _: () = assert!(BLOCKS_PER_OBJECT as u64 * BLOCK_STRIDE_BYTES <= OBJECT_BYTES);

/// A volume whose blocks the clients read and write.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    vdi: VdiId,
    block_count: u32,
}

impl Disk {
    /// Creates a volume of `block_count` blocks, all of them zeros and in place, with the cluster's number of copies.
    pub fn create(client: &mut Client, name: &str, block_count: u32) -> Result<Disk> {
        let object_count = block_count.div_ceil(BLOCKS_PER_OBJECT);
        let vdi = client.create_volume(name, u64::from(object_count) * OBJECT_BYTES, 0, 22)?;
        for index in 0..object_count {
            let create = Request::object(opcode::CREATE_AND_WRITE, Oid::data(vdi, index), 0).flags(flag::DIRECT);
            client
                .call(create.flags(flag::DIRECT | flag::WRITE).length(BLOCK_BYTES as u32), &[0; BLOCK_BYTES])?
                .success("create an object")?;
            let map = Request::object(opcode::WRITE, Oid::inode(vdi), MAP_OFFSET + 4 * u64::from(index));
            client.call(map.flags(flag::DIRECT), &vdi.get().to_le_bytes())?.success("write the map")?;
        }
        Ok(Disk { vdi, block_count })
    }

    /// How many blocks it has.
    pub fn block_count(self) -> u32 {
        self.block_count
    }

    fn place(self, block: u32) -> (Oid, u64) {
        let offset = u64::from(block % BLOCKS_PER_OBJECT) * BLOCK_STRIDE_BYTES;
        (Oid::data(self.vdi, block / BLOCKS_PER_OBJECT), offset)
    }

    fn salt(self) -> u64 {
        u64::from(self.vdi.get())
    }

    /// The content that write `value` gives to a block.
    pub fn content(self, block: u32, value: u64) -> Vec<u8> {
        block_content(self.salt(), block.into(), value)
    }

    /// Writes, durably.
    pub fn write(self, client: &mut Client, block: u32, value: u64) -> Result<()> {
        self.write_bytes(client, block, &self.content(block, value))
    }

    /// Writes bytes of the caller's choice, which the record must know nothing of.
    pub fn write_bytes(self, client: &mut Client, block: u32, bytes: &[u8]) -> Result<()> {
        let (oid, offset) = self.place(block);
        let request = Request::object(opcode::WRITE, oid, offset).flags(flag::DIRECT);
        client.call(request, bytes)?.success("write").map(drop)
    }

    /// Reads and tells which writes the block comes from.
    pub fn read(self, client: &mut Client, block: u32) -> Result<Action> {
        let (oid, offset) = self.place(block);
        let bytes = client.read_object(oid, offset, BLOCK_BYTES as u32)?;
        let values = block_sequences(&bytes, self.salt(), block.into()).map_err(|error| anyhow!(Foreign(error)))?;
        Ok(Action::read(values))
    }
}

/// A block held what nobody wrote there.
#[derive(Debug)]
struct Foreign(anyhow::Error);

impl std::fmt::Display for Foreign {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:#}", self.0)
    }
}

impl std::error::Error for Foreign {}

/// Everything that was done to one volume, over any number of loads.
#[derive(Clone)]
pub struct Record(Arc<Shared>);

struct Shared {
    disk: Disk,
    began: Instant,
    next_value: AtomicU64,
    next_client: AtomicU64,
    operations: Mutex<Vec<Operation>>,
}

impl Record {
    /// An empty one, of a volume that was only just created.
    pub fn new(disk: Disk) -> Record {
        Record(Arc::new(Shared {
            disk,
            began: Instant::now(),
            next_value: AtomicU64::new(1),
            next_client: AtomicU64::new(0),
            operations: Mutex::default(),
        }))
    }

    /// The volume.
    pub fn disk(&self) -> Disk {
        self.0.disk
    }

    /// Now, by the record's clock.
    pub fn now(&self) -> u64 {
        self.0.began.elapsed().as_nanos() as u64 + 1
    }

    /// A number for a write that a test makes itself.
    pub fn next_value(&self) -> u64 {
        self.0.next_value.fetch_add(1, Ordering::Relaxed)
    }

    /// Adds an operation that a test made itself.
    pub fn add(&self, operation: Operation) {
        self.0.operations.lock().unwrap_or_else(PoisonError::into_inner).push(operation);
    }

    /// Fails unless one history explains everything so far. Loads that still run have recorded their past only in part:
    /// stop them first.
    pub fn check(&self) -> Result<Verdict> {
        let operations = self.0.operations.lock().unwrap_or_else(PoisonError::into_inner);
        Ok(check(&operations)?)
    }

    /// Reads every block once through `socket` and records it: what a guest would find there now.
    pub fn read_all(&self, socket: &Path) -> Result<()> {
        let mut client = Client::unix(socket)?;
        for block in 0..self.0.disk.block_count {
            let start = self.now();
            let action = self.0.disk.read(&mut client, block).with_context(|| format!("block {block}"))?;
            self.add(Operation { client: u32::MAX, block, start, end: Some(self.now()), action });
        }
        Ok(())
    }
}

/// What clients do.
#[derive(Clone, Debug)]
pub struct LoadPlan {
    /// The sockets of the nodes; each gets `clients_per_socket` clients.
    pub sockets: Vec<PathBuf>,
    /// See above.
    pub clients_per_socket: usize,
    /// Of a hundred operations, how many are writes.
    pub write_percent: u64,
    /// How long each client rests after an operation.
    pub rest: Duration,
    /// How long a client waits for an answer before it gives the connection up.
    pub patience: Duration,
    /// Decides blocks and kinds.
    pub seed: u64,
}

impl LoadPlan {
    /// Two clients per node, as many reads as writes, more patience than any test takes.
    pub fn new(sockets: Vec<PathBuf>, seed: u64) -> LoadPlan {
        LoadPlan {
            sockets,
            clients_per_socket: 2,
            write_percent: 50,
            rest: Duration::from_millis(1),
            patience: Duration::from_mins(3),
            seed,
        }
    }

    /// Writes only, `depth` at a time, through one node, without rest.
    pub fn writes(socket: PathBuf, depth: usize, seed: u64) -> LoadPlan {
        LoadPlan {
            clients_per_socket: depth,
            write_percent: 100,
            rest: Duration::ZERO,
            ..LoadPlan::new(vec![socket], seed)
        }
    }
}

/// What became of a load.
#[derive(Clone, Default, Debug)]
pub struct Outcome {
    /// Operations that were answered, per socket of the plan.
    pub answered: Vec<u64>,
    /// Answers that were an error, in the words of a test: none, if all goes as it should.
    pub refused: Vec<String>,
    /// How often a connection ended under an operation, per socket.
    pub cuts: Vec<u64>,
    /// How often a node that a client had only just connected to was not ready yet: it starts, and the client tries again.
    pub not_ready: u64,
    /// How often a client lost patience.
    pub timeouts: u64,
    /// The longest time that any answered operation took.
    pub longest_stall: Duration,
    /// When that one was sent, by the record's clock.
    pub stalled_at: Duration,
    /// Start and end of every answered operation with the index of its socket, by the record's clock.
    pub times: Vec<(usize, u64, u64)>,
}

impl Outcome {
    /// All answered operations.
    pub fn answered_count(&self) -> u64 {
        self.answered.iter().sum()
    }

    /// How many operations through these sockets were answered between two moments of the record's clock.
    pub fn answered_between(&self, sockets: &[usize], from: u64, to: u64) -> usize {
        let is_in = |(socket, _, end): &&(usize, u64, u64)| sockets.contains(socket) && (from..to).contains(end);
        self.times.iter().filter(is_in).count()
    }

    /// The longest time that any operation through these sockets took.
    pub fn longest_through(&self, sockets: &[usize]) -> Duration {
        let through = self.times.iter().filter(|(socket, ..)| sockets.contains(socket));
        Duration::from_nanos(through.map(|(_, start, end)| end - start).max().unwrap_or(0))
    }

    fn merge(&mut self, other: Outcome) {
        for (mine, theirs) in self.answered.iter_mut().zip(other.answered) {
            *mine += theirs;
        }
        for (mine, theirs) in self.cuts.iter_mut().zip(other.cuts) {
            *mine += theirs;
        }
        self.refused.extend(other.refused);
        self.not_ready += other.not_ready;
        self.timeouts += other.timeouts;
        self.times.extend(other.times);
        if other.longest_stall > self.longest_stall {
            (self.longest_stall, self.stalled_at) = (other.longest_stall, other.stalled_at);
        }
    }
}

impl std::fmt::Display for Outcome {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:?} operations answered, longest {:.0?} (sent at {:.1?}), {} refused, {:?} connections cut, {} times not ready \
             yet, {} timeouts",
            self.answered,
            self.longest_stall,
            self.stalled_at,
            self.refused.len(),
            self.cuts,
            self.not_ready,
            self.timeouts
        )
    }
}

/// Clients at work. Dropped without [`Load::stop`], they are told to stop and left alone.
pub struct Load {
    stop: Arc<AtomicBool>,
    /// Operations answered so far, by socket.
    answered: Arc<Vec<AtomicU64>>,
    clients: Vec<JoinHandle<Result<Outcome>>>,
}

impl Load {
    /// Starts all clients of a plan.
    pub fn start(record: &Record, plan: &LoadPlan) -> Load {
        let stop = Arc::new(AtomicBool::new(false));
        let answered: Arc<Vec<AtomicU64>> = Arc::new(plan.sockets.iter().map(|_| AtomicU64::new(0)).collect());
        let mut clients = Vec::new();
        for (index, socket) in plan.sockets.iter().enumerate() {
            for _ in 0..plan.clients_per_socket {
                let number = record.0.next_client.fetch_add(1, Ordering::Relaxed);
                let worker = Worker {
                    record: record.clone(),
                    number: number as u32,
                    socket_index: index,
                    socket: socket.clone(),
                    plan: plan.clone(),
                    rng: Random::new(plan.seed ^ (number << 32)),
                    stop: Arc::clone(&stop),
                    progress: Arc::clone(&answered),
                    is_fresh: true,
                    done: Vec::new(),
                    outcome: Outcome {
                        answered: vec![0; plan.sockets.len()],
                        cuts: vec![0; plan.sockets.len()],
                        ..Outcome::default()
                    },
                };
                clients.push(std::thread::spawn(move || worker.run()));
            }
        }
        Load { stop, answered, clients }
    }

    /// Operations answered so far through a socket of the plan.
    pub fn answered(&self, socket: usize) -> u64 {
        self.answered[socket].load(Ordering::Relaxed)
    }

    /// Waits until, from now on, `count` operations were answered through each of these sockets.
    pub fn wait_progress(&self, sockets: &[usize], count: u64, deadline: Duration) -> Result<Duration> {
        let started = Instant::now();
        let counts = || -> Vec<u64> { (0..self.answered.len()).map(|socket| self.answered(socket)).collect() };
        let before = counts();
        loop {
            let since: Vec<u64> = counts().iter().zip(&before).map(|(now, before)| now - before).collect();
            if sockets.iter().all(|&socket| since[socket] >= count) {
                return Ok(started.elapsed());
            }
            ensure!(
                started.elapsed() < deadline,
                "nodes {sockets:?} were to give {count} answers each within {deadline:.0?}; since then {since:?}, before \
                 {before:?}"
            );
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Ends the load: clients finish what they have under way. Fails if one of them read what nobody wrote.
    pub fn stop(mut self) -> Result<Outcome> {
        self.stop.store(true, Ordering::Relaxed);
        let sockets = self.answered.len();
        let mut whole = Outcome { answered: vec![0; sockets], cuts: vec![0; sockets], ..Outcome::default() };
        for client in std::mem::take(&mut self.clients) {
            whole.merge(client.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))?);
        }
        Ok(whole)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

struct Worker {
    record: Record,
    number: u32,
    socket_index: usize,
    socket: PathBuf,
    plan: LoadPlan,
    rng: Random,
    stop: Arc<AtomicBool>,
    progress: Arc<Vec<AtomicU64>>,
    /// Whether this connection has had no answer yet.
    is_fresh: bool,
    done: Vec<Operation>,
    outcome: Outcome,
}

impl Worker {
    fn run(mut self) -> Result<Outcome> {
        const RECONNECT_AFTER: Duration = Duration::from_millis(20);
        let mut client = None;
        let mut result = Ok(());
        while !self.stop.load(Ordering::Relaxed) && result.is_ok() {
            match &mut client {
                None => {
                    client = self.connect();
                    self.is_fresh = true;
                    if client.is_none() {
                        std::thread::sleep(RECONNECT_AFTER);
                    }
                }
                Some(connected) => {
                    match self.step(connected) {
                        Ok(true) => {}
                        Ok(false) => {
                            client = None;
                            std::thread::sleep(RECONNECT_AFTER);
                        }
                        Err(error) => result = Err(error),
                    }
                    if !self.plan.rest.is_zero() {
                        std::thread::sleep(self.plan.rest);
                    }
                }
            }
        }
        let shared = &self.record.0;
        shared.operations.lock().unwrap_or_else(PoisonError::into_inner).append(&mut self.done);
        result.map(|()| self.outcome)
    }

    fn connect(&self) -> Option<Client> {
        let mut client = Client::unix(&self.socket).ok()?;
        client.set_deadline(self.plan.patience).ok()?;
        Some(client)
    }

    /// One operation; false if the connection is of no more use.
    fn step(&mut self, client: &mut Client) -> Result<bool> {
        let disk = self.record.disk();
        let block = self.rng.below(disk.block_count.into()) as u32;
        let is_write = self.rng.below(100) < self.plan.write_percent;
        let value = if is_write { self.record.next_value() } else { 0 };
        let start = self.record.now();
        let ended = if is_write {
            disk.write(client, block, value).map(|()| Action::Write(value))
        } else {
            disk.read(client, block)
        };
        let end = self.record.now();
        let operation = |end, action| Operation { client: self.number, block, start, end, action };
        match ended {
            Ok(action) => {
                self.done.push(operation(Some(end), action));
                self.note_answer(start, end);
                Ok(true)
            }
            Err(error) if error.is::<Foreign>() => Err(error.context(format!("client {} block {block}", self.number))),
            Err(error) => {
                if is_write {
                    self.done.push(operation(None, Action::Write(value)));
                }
                self.note_failure(&error, is_write, start)
            }
        }
    }

    fn note_answer(&mut self, start: u64, end: u64) {
        self.is_fresh = false;
        self.outcome.answered[self.socket_index] += 1;
        self.progress[self.socket_index].fetch_add(1, Ordering::Relaxed);
        self.outcome.times.push((self.socket_index, start, end));
        let took = Duration::from_nanos(end - start);
        if took > self.outcome.longest_stall {
            (self.outcome.longest_stall, self.outcome.stalled_at) = (took, Duration::from_nanos(start));
        }
    }

    /// Whether the connection can go on.
    fn note_failure(&mut self, error: &anyhow::Error, is_write: bool, start: u64) -> Result<bool> {
        const REFUSED_SHOWN_MAX: usize = 100;
        if let Some(Refused(code)) = error.downcast_ref::<Refused>() {
            if matches!(*code, result::WAIT_FOR_JOIN | result::WAIT_FOR_FORMAT) && self.is_fresh {
                self.outcome.not_ready += 1;
                return Ok(false);
            }
            let what = if is_write { "write" } else { "read" };
            let at = Duration::from_nanos(start);
            ensure!(
                self.outcome.refused.len() < REFUSED_SHOWN_MAX,
                "{what}s are refused with {code:#04x} all the time"
            );
            self.outcome.refused.push(format!("{what} through node {} at {at:.3?}: {code:#04x}", self.socket_index));
            ensure!(*code != result::SUCCESS, "a refusal that says success");
            return Ok(true);
        }
        match error.downcast_ref::<io::Error>().map(io::Error::kind) {
            Some(io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut) => self.outcome.timeouts += 1,
            Some(io::ErrorKind::InvalidData) | None => bail!("a wrong answer: {error:#}"),
            Some(_) => self.outcome.cuts[self.socket_index] += 1,
        }
        Ok(false)
    }
}
