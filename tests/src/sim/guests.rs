//! Guests that read and write blocks of one volume, each through any node, and remember what they were promised.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use qemu_proto::oid::{Oid, VdiId};

use super::Random;
use super::client::{SimClient, within};
use super::net::SimNet;
use crate::clients::{MAP_OFFSET, Request, flag, opcode};
use crate::linear::{Action, Operation};
use crate::oracle::Oracle;
use crate::sectors::{BLOCK_BYTES, block_content, block_sequences};

const BLOCKS_PER_OBJECT: u32 = 4;
const BLOCK_STRIDE_BYTES: u64 = 64 << 10;
/// How long a guest waits for an answer before it tries another node.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
pub(super) const CONNECT_PATIENCE: Duration = Duration::from_secs(2);
const SETUP_PATIENCE: Duration = Duration::from_secs(30);

/// A volume.
#[derive(Clone, Copy, Debug)]
pub struct Disk {
    vdi: VdiId,
    block_count: u32,
}

impl Disk {
    /// Creates a volume of `block_count` blocks, all of them zeros and in place.
    pub async fn create(client: &mut SimClient, name: &str, block_count: u32) -> io::Result<Disk> {
        let object_count = block_count.div_ceil(BLOCKS_PER_OBJECT);
        let vdi = within(SETUP_PATIENCE, client.create_volume(name, u64::from(object_count) << 22, 22)).await?;
        for index in 0..object_count {
            let create = Request::object(opcode::CREATE_AND_WRITE, Oid::data(vdi, index), 0).flags(flag::DIRECT);
            within(SETUP_PATIENCE, client.ask(create, &[0; BLOCK_BYTES])).await?;
            let map = Request::object(opcode::WRITE, Oid::inode(vdi), MAP_OFFSET + 4 * u64::from(index));
            within(SETUP_PATIENCE, client.ask(map.flags(flag::DIRECT), &vdi.get().to_le_bytes())).await?;
        }
        Ok(Disk { vdi, block_count })
    }

    /// Its objects, the inode among them.
    pub fn objects(self) -> Vec<Oid> {
        let data = (0..self.block_count.div_ceil(BLOCKS_PER_OBJECT)).map(|index| Oid::data(self.vdi, index));
        [Oid::inode(self.vdi)].into_iter().chain(data).collect()
    }

    fn place(self, block: u32) -> (Oid, u64) {
        (Oid::data(self.vdi, block / BLOCKS_PER_OBJECT), u64::from(block % BLOCKS_PER_OBJECT) * BLOCK_STRIDE_BYTES)
    }

    /// In pieces of so many bytes, one after the other.
    async fn write(self, client: &mut SimClient, block: u32, value: u64, piece_bytes: usize) -> io::Result<()> {
        let (oid, mut offset) = self.place(block);
        let content = block_content(self.vdi.get().into(), block.into(), value);
        for piece in content.chunks(piece_bytes) {
            client.ask(Request::object(opcode::WRITE, oid, offset).flags(flag::DIRECT), piece).await?;
            offset += piece.len() as u64;
        }
        Ok(())
    }

    /// Writes without waiting for the disks.
    pub(super) async fn write_lazily(self, client: &mut SimClient, block: u32, value: u64) -> io::Result<()> {
        let (oid, offset) = self.place(block);
        let content = block_content(self.vdi.get().into(), block.into(), value);
        client.ask(Request::object(opcode::WRITE, oid, offset).flags(flag::CACHE), &content).await.map(drop)
    }

    /// Makes durable what was written lazily.
    pub(super) async fn flush(self, client: &mut SimClient) -> io::Result<()> {
        let request = Request::object(opcode::FLUSH_VDI, Oid::inode(self.vdi), 0).flags(flag::CACHE);
        client.ask(request, &[]).await.map(drop)
    }

    /// How many blocks it has.
    pub fn block_count(self) -> u32 {
        self.block_count
    }

    /// What a block holds, and what is in it that nobody wrote.
    pub(super) async fn read(self, client: &mut SimClient, block: u32) -> io::Result<Result<Action, String>> {
        let (oid, offset) = self.place(block);
        let bytes = client.read_object(oid, offset, BLOCK_BYTES as u32).await?;
        let values = block_sequences(&bytes, self.vdi.get().into(), block.into());
        Ok(values.map(Action::read).map_err(|error| format!("block {block}: {error:#}")))
    }
}

/// What guests share.
#[derive(Clone)]
pub struct Load {
    /// Where they work.
    pub disk: Disk,
    /// How they get there.
    pub net: SimNet,
    /// What they remember.
    pub oracle: Oracle,
    /// How many nodes there are.
    pub host_count: usize,
    /// When set, they finish what they have under way.
    pub stop: Arc<AtomicBool>,
    /// Set when everything works again and has settled.
    pub is_healed: Arc<AtomicBool>,
    /// Of a hundred operations, how many are writes.
    pub write_percent: u64,
    /// Whether some writes go in halves.
    pub halves: bool,
    /// Up to how long each rests after an operation, milliseconds.
    pub rest_ms: u64,
}

impl Load {
    fn now(&self) -> u64 {
        self.oracle.moment(self.net.now_ms())
    }

    fn note(&self, operation: Operation) {
        let value = match operation.action {
            Action::Write(value) | Action::Read(value) => value,
            Action::ReadTorn(values) => values.iter().fold(0, |sum, value| sum * 31 + value),
        };
        self.net.note(operation.start ^ operation.end.unwrap_or(0).rotate_left(32) ^ value.rotate_left(48));
        self.oracle.add(operation);
    }

    /// One guest, until told to stop.
    pub async fn run(self, number: u32, seed: u64) {
        let mut random = Random::new(seed);
        // A guest whose node is cut off hangs at its first write: only one that reads can see what such a node still tells.
        let write_percent = if random.one_in(3) { 0 } else { self.write_percent };
        while !self.stop.load(Ordering::Relaxed) {
            let host = random.below(self.host_count as u64) as usize;
            let Ok(mut client) = within(CONNECT_PATIENCE, SimClient::connect(&self.net, host)).await else {
                tokio::time::sleep(Duration::from_millis(1 + random.below(50))).await;
                continue;
            };
            let stay = if random.one_in(4) { 1 + random.below(10) } else { 20 + random.below(400) };
            for _ in 0..stay {
                if self.stop.load(Ordering::Relaxed)
                    || self.step(&mut client, number, write_percent, &mut random).await.is_err()
                {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(random.below(self.rest_ms + 1))).await;
            }
        }
    }

    async fn step(
        &self,
        client: &mut SimClient,
        number: u32,
        write_percent: u64,
        random: &mut Random,
    ) -> io::Result<()> {
        let block = random.below(self.disk.block_count.into()) as u32;
        if random.below(100) < write_percent {
            let piece_bytes = if self.halves && random.one_in(4) { BLOCK_BYTES / 2 } else { BLOCK_BYTES };
            return self.write(client, number, block, piece_bytes).await;
        }
        self.read(client, number, block, PATIENCE).await
    }

    async fn write(&self, client: &mut SimClient, number: u32, block: u32, piece_bytes: usize) -> io::Result<()> {
        let value = self.oracle.next_value();
        let start = self.now();
        let written = within(PATIENCE, self.disk.write(client, block, value, piece_bytes)).await;
        let end = written.is_ok().then(|| self.now());
        self.note(Operation { client: number, block, start, end, action: Action::Write(value) });
        tracing::debug!("guest {number}: block {block} write {value} {written:?}");
        if let Err(error) = &written {
            tracing::info!("guest {number}: a write to block {block} has an unknown outcome: {error}");
        }
        written
    }

    /// Writes every block anew, each through another node than `lost`, and reads it through one more.
    pub async fn work_without(&self, lost: usize) -> io::Result<()> {
        const NUMBER: u32 = 2000;
        let hosts: Vec<usize> = (0..self.host_count).filter(|host| *host != lost).collect();
        for block in 0..self.disk.block_count {
            let through = |index: u32| hosts[(block + index) as usize % hosts.len()];
            let mut client = within(CONNECT_PATIENCE, SimClient::connect(&self.net, through(0))).await?;
            self.write(&mut client, NUMBER, block, BLOCK_BYTES).await?;
            let mut client = within(CONNECT_PATIENCE, SimClient::connect(&self.net, through(1))).await?;
            self.read(&mut client, NUMBER, block, PATIENCE).await?;
        }
        Ok(())
    }

    async fn read(&self, client: &mut SimClient, number: u32, block: u32, patience: Duration) -> io::Result<()> {
        let start = self.now();
        match within(patience, self.disk.read(client, block)).await? {
            Ok(action) => {
                tracing::debug!("guest {number}: block {block} read {action:?}");
                self.note(Operation { client: number, block, start, end: Some(self.now()), action });
            }
            Err(what) => self.oracle.add_foreign(what),
        }
        Ok(())
    }

    /// Reads every block through every node. Gives what could not be read.
    pub async fn read_everything(&self) -> Vec<String> {
        let mut failed = Vec::new();
        for host in 0..self.host_count {
            let reading = async {
                let mut client = within(SETUP_PATIENCE, SimClient::connect(&self.net, host)).await?;
                for block in 0..self.disk.block_count {
                    self.read(&mut client, 1000 + host as u32, block, SETUP_PATIENCE).await?;
                }
                Ok::<_, io::Error>(())
            };
            if let Err(error) = reading.await {
                failed.push(format!("healed when calm: not everything can be read through node {host}: {error}"));
            }
        }
        failed
    }
}
