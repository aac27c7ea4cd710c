//! A guest that has its volume to itself: it writes without waiting for the disks, as most do, discards, and flushes. Of each
//! block it remembers a [`Promise`].

use std::time::Duration;

use anyhow::Result;

use super::guests::{Scene, Volume, span};
use crate::nbd_client::{FLAG_FUA, NbdClient, command};
use crate::promise::Promise;
use crate::sectors::{BLOCK_BYTES, block_sequences};
use crate::sim::Random;

/// Blocks of an object of 4 MiB.
const OBJECT_BLOCKS: u32 = 1024;
const REST_MS: u64 = 10;

/// Lives as long as its volume.
pub struct OwnGuest {
    volume: Volume,
    /// By block.
    promises: Vec<Promise>,
    connection: u64,
    last_value: u64,
    random: Random,
    broken: Vec<String>,
}

impl OwnGuest {
    /// Of a volume that was only just created.
    pub fn new(volume: Volume, seed: u64) -> OwnGuest {
        let promises = vec![Promise::default(); volume.blocks as usize];
        OwnGuest { volume, promises, connection: 0, last_value: 0, random: Random::new(seed), broken: Vec::new() }
    }

    /// Where it works.
    pub fn volume(&self) -> &Volume {
        &self.volume
    }

    /// Works as long as the scene is open.
    pub fn run(&mut self, scene: &Scene) {
        while scene.is_open() {
            let Some(mut client) = scene.connect(&self.volume, &mut self.random) else { continue };
            self.connection += 1;
            for _ in 0..10 + self.random.below(800) {
                if !scene.is_open() || self.step(scene, &mut client).is_err() {
                    break;
                }
                std::thread::sleep(Duration::from_millis(self.random.below(REST_MS)));
            }
        }
    }

    fn step(&mut self, scene: &Scene, client: &mut NbdClient) -> Result<()> {
        let first = self.random.below(self.volume.blocks.into()) as u32;
        let count = span(&mut self.random).min(self.volume.blocks - first);
        match self.random.below(32) {
            0..16 => self.write(scene, client, first, count),
            16..26 => self.read(scene, client, first, count),
            26..29 => self.zero(scene, client, first, count),
            // The space of a whole object comes back.
            29 if self.random.one_in(3) => {
                self.zero(scene, client, first / OBJECT_BLOCKS * OBJECT_BLOCKS, OBJECT_BLOCKS)
            }
            _ => {
                scene.note(client.call(command::FLUSH, 0, 0, 0, &[]), false)?;
                for promise in &mut self.promises {
                    promise.flushed(self.connection);
                }
                Ok(())
            }
        }
    }

    fn write(&mut self, scene: &Scene, client: &mut NbdClient, first: u32, count: u32) -> Result<()> {
        self.last_value += 1;
        let value = self.last_value;
        let bytes = self.volume.content(first, count, value);
        let flags = if self.random.one_in(8) { FLAG_FUA } else { 0 };
        let called = client.call(command::WRITE, flags, place(first), bytes.len() as u64, &bytes);
        let noted = scene.note(called, true).map(drop);
        self.remember(first, count, value, flags, &noted);
        noted
    }

    fn zero(&mut self, scene: &Scene, client: &mut NbdClient, first: u32, count: u32) -> Result<()> {
        let kind = if self.random.one_in(2) { command::TRIM } else { command::WRITE_ZEROES };
        let flags = if self.random.one_in(8) { FLAG_FUA } else { 0 };
        let noted = scene.note(client.call(kind, flags, place(first), place(count), &[]), true).map(drop);
        self.remember(first, count, 0, flags, &noted);
        noted
    }

    fn remember(&mut self, first: u32, count: u32, value: u64, flags: u16, noted: &Result<()>) {
        for promise in &mut self.promises[first as usize..(first + count) as usize] {
            match noted {
                Ok(()) if flags == FLAG_FUA => promise.acknowledged_durable(value),
                Ok(()) => promise.acknowledged(value, self.connection),
                Err(_) => promise.unanswered(value),
            }
        }
    }

    fn read(&mut self, scene: &Scene, client: &mut NbdClient, first: u32, count: u32) -> Result<()> {
        let answer = scene.note(client.call(command::READ, 0, place(first), place(count), &[]), false)?;
        let bytes = answer.bytes(place(first))?;
        self.compare(first, &bytes, "under way");
        Ok(())
    }

    /// Compares the blocks from `first` on with what was promised; `when` is for messages.
    pub fn compare(&mut self, first: u32, bytes: &[u8], when: &str) {
        for (index, content) in bytes.chunks(BLOCK_BYTES).enumerate() {
            let block = first as usize + index;
            let promise = &self.promises[block];
            let wrong = match block_sequences(content, self.volume.salt, block as u64) {
                Ok(values) => match values.iter().find(|value| !promise.allows(**value)) {
                    Some(lost) => format!("flushed is kept: it holds write {lost} of {values:?}; {promise}"),
                    None => continue,
                },
                Err(error) => format!("nothing foreign: {error:#}"),
            };
            self.broken.push(format!("{}, block {block}, {when}: {wrong}", self.volume.name));
        }
    }

    /// Every promise that was broken.
    pub fn broken(&self) -> &[String] {
        &self.broken
    }
}

fn place(block: u32) -> u64 {
    u64::from(block) * BLOCK_BYTES as u64
}
