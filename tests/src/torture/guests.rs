//! Guests that share one volume through NBD, each through any node, and put down everything they were told.
//!
//! Always holds:
//! 1. What they write is durable when it is answered (FUA): a record that loses one is no history of one disk.
//! 2. A write without a good answer has an unknown outcome. Whether its node told an error, was silent or ended makes no difference.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::linear::{Action, Operation};
use crate::nbd_client::{Answer, FLAG_FUA, NbdClient, Style, command};
use crate::oracle::Oracle;
use crate::sectors::{BLOCK_BYTES, block_content, block_sequences};
use crate::sim::Random;

/// Blocks that half of all operations go to, so that guests meet there.
const HOT_BLOCKS: u64 = 48;
/// A pause before another node is tried.
const RECONNECT_AFTER: Duration = Duration::from_millis(20);
/// Up to how long a guest rests: the machine is shared with the nodes.
const REST_MS: u64 = 10;

/// A volume that guests work on.
#[derive(Clone, Debug)]
pub struct Volume {
    /// As `dog` and NBD know it.
    pub name: String,
    /// Tells its blocks from those of others.
    pub salt: u64,
    /// Its size.
    pub blocks: u32,
}

impl Volume {
    /// An empty one.
    pub fn new(name: &str, size_bytes: u64, salt: u64) -> Volume {
        Volume { name: name.to_owned(), salt, blocks: (size_bytes / BLOCK_BYTES as u64) as u32 }
    }

    /// What write `value` makes of the blocks from `first` on.
    pub fn content(&self, first: u32, count: u32, value: u64) -> Vec<u8> {
        (first..first + count).flat_map(|block| block_content(self.salt, block.into(), value)).collect()
    }

    /// What is in a block.
    pub fn action(&self, block: u32, bytes: &[u8]) -> Result<Action> {
        Ok(Action::read(block_sequences(bytes, self.salt, block.into())?))
    }
}

/// What all guests share: the ways in, the clock, and how it goes.
pub struct Scene {
    doors: Vec<PathBuf>,
    began: Instant,
    is_open: AtomicBool,
    answered: AtomicU64,
    unknown: AtomicU64,
    broken: AtomicU64,
    refused: Mutex<BTreeMap<u32, u64>>,
}

impl Scene {
    /// Doors are NBD sockets.
    pub fn new(doors: Vec<PathBuf>) -> Scene {
        Scene {
            doors,
            began: Instant::now(),
            is_open: AtomicBool::new(false),
            answered: AtomicU64::new(0),
            unknown: AtomicU64::new(0),
            broken: AtomicU64::new(0),
            refused: Mutex::default(),
        }
    }

    /// Guests work from now on.
    pub fn open(&self) {
        self.is_open.store(true, Ordering::Relaxed);
    }

    /// Guests finish what they have under way.
    pub fn close(&self) {
        self.is_open.store(false, Ordering::Relaxed);
    }

    /// Whether guests work.
    pub fn is_open(&self) -> bool {
        self.is_open.load(Ordering::Relaxed)
    }

    /// The clock of the oracle.
    pub fn now_ms(&self) -> u64 {
        self.began.elapsed().as_millis() as u64
    }

    /// Operations that went well.
    pub fn answered(&self) -> u64 {
        self.answered.load(Ordering::Relaxed)
    }

    /// Writes of which nobody knows.
    pub fn unknown(&self) -> u64 {
        self.unknown.load(Ordering::Relaxed)
    }

    /// Errors that guests were told, by number.
    pub fn refused(&self) -> BTreeMap<u32, u64> {
        self.refused.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// How it goes, for the status line.
    pub fn told(&self) -> String {
        let refused = self.refused();
        format!(
            "{} operations, {} writes with unknown outcome, {} connections ended, errors told {refused:?}",
            self.answered(),
            self.unknown(),
            self.broken.load(Ordering::Relaxed),
        )
    }

    /// Connects through any node; waits a moment if that one does not serve.
    pub fn connect(&self, volume: &Volume, random: &mut Random) -> Option<NbdClient> {
        let door = &self.doors[random.below(self.doors.len() as u64) as usize];
        let client = open(door, volume).ok();
        if client.is_none() {
            std::thread::sleep(RECONNECT_AFTER);
        }
        client
    }

    /// Counts what came of a request. An error number is an error, and so is a connection that ended.
    pub fn note(&self, called: Result<Answer>, is_write: bool) -> Result<Answer> {
        let told = match called {
            Ok(answer) if answer.error == 0 => {
                self.answered.fetch_add(1, Ordering::Relaxed);
                return Ok(answer);
            }
            Ok(answer) => {
                *self.refused.lock().unwrap_or_else(PoisonError::into_inner).entry(answer.error).or_default() += 1;
                Err(anyhow::anyhow!("error {}: {}", answer.error, answer.text))
            }
            Err(error) => {
                self.broken.fetch_add(1, Ordering::Relaxed);
                Err(error)
            }
        };
        self.unknown.fetch_add(u64::from(is_write), Ordering::Relaxed);
        told
    }
}

/// A connection to a volume through one node.
pub fn open(door: &Path, volume: &Volume) -> Result<NbdClient> {
    let client = NbdClient::open(door, &volume.name, Style::Structured, &[])?;
    if client.size_bytes != u64::from(volume.blocks) * BLOCK_BYTES as u64 {
        bail!("{} has {} bytes", volume.name, client.size_bytes);
    }
    Ok(client)
}

/// A few blocks; now and then as many as a large write of a file system.
pub fn span(random: &mut Random) -> u32 {
    1 + match random.below(8) {
        0 => random.below(64) as u32,
        1 | 2 => random.below(8) as u32,
        _ => 0,
    }
}

/// One guest.
pub struct SharedGuest {
    number: u32,
    volume: Volume,
    oracle: Oracle,
    random: Random,
}

impl SharedGuest {
    /// Its number is for messages.
    pub fn new(number: u32, volume: Volume, oracle: Oracle, seed: u64) -> SharedGuest {
        SharedGuest { number, volume, oracle, random: Random::new(seed) }
    }

    /// Works as long as the scene is open.
    pub fn run(mut self, scene: &Scene) {
        while scene.is_open() {
            let Some(mut client) = scene.connect(&self.volume, &mut self.random) else { continue };
            for _ in 0..=self.random.below(400) {
                if !scene.is_open() || self.step(scene, &mut client).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(self.random.below(REST_MS)));
            }
        }
    }

    fn step(&mut self, scene: &Scene, client: &mut NbdClient) -> Result<()> {
        let all = if self.random.one_in(2) { HOT_BLOCKS } else { self.volume.blocks.into() };
        let first = self.random.below(all) as u32;
        let count = span(&mut self.random).min(self.volume.blocks - first);
        if self.random.one_in(2) {
            self.write(scene, client, first, count)
        } else {
            self.read(scene, client, first, count)
        }
    }

    fn write(&mut self, scene: &Scene, client: &mut NbdClient, first: u32, count: u32) -> Result<()> {
        let value = self.oracle.next_value();
        let (bytes, offset) = (self.volume.content(first, count, value), u64::from(first) * BLOCK_BYTES as u64);
        let start = self.oracle.moment(scene.now_ms());
        let called = client.call(command::WRITE, FLAG_FUA, offset, bytes.len() as u64, &bytes);
        let noted = scene.note(called, true);
        let end = noted.is_ok().then(|| self.oracle.moment(scene.now_ms()));
        for block in first..first + count {
            self.oracle.add(Operation { client: self.number, block, start, end, action: Action::Write(value) });
        }
        noted.map(drop)
    }

    fn read(&mut self, scene: &Scene, client: &mut NbdClient, first: u32, count: u32) -> Result<()> {
        let (offset, length) = (u64::from(first) * BLOCK_BYTES as u64, u64::from(count) * BLOCK_BYTES as u64);
        let start = self.oracle.moment(scene.now_ms());
        let answer = scene.note(client.call(command::READ, 0, offset, length, &[]), false)?;
        let end = Some(self.oracle.moment(scene.now_ms()));
        let bytes = answer.bytes(offset)?;
        put_down(&self.oracle, &self.volume, first, &bytes, (self.number, start, end));
        Ok(())
    }
}

/// Records what was found in the blocks from `first` on: by whom, and from when until when.
pub fn put_down(oracle: &Oracle, volume: &Volume, first: u32, bytes: &[u8], by: (u32, u64, Option<u64>)) {
    let (client, start, end) = by;
    for (index, content) in bytes.chunks(BLOCK_BYTES).enumerate() {
        let block = first + index as u32;
        match volume.action(block, content) {
            Ok(action) => oracle.add(Operation { client, block, start, end, action }),
            Err(error) => oracle.add_foreign(format!("{}, block {block}: {error:#}", volume.name)),
        }
    }
}
