//! A guest that makes volumes, grows them, takes snapshots and makes clones of them, goes back to snapshots, deletes and changes
//! numbers of copies, as `dog` asks for it, and reads, writes, discards and zeroes through NBD.
//!
//! It does one thing at a time and has its volumes to itself, so what they hold follows from what it did: see
//! [`super::volume_memory`]. What has an unknown outcome is left alone until all is well again, and looked at then.

use std::collections::BTreeSet;
use std::io;
use std::sync::atomic::Ordering;
use std::time::Duration;

use qemu_proto::inode::{TAG_OFFSET, VDI_SIZE_OFFSET};
use qemu_proto::oid::VdiId;

use super::Random;
use super::client::{SimClient, within};
use super::guests::{CONNECT_PATIENCE, Load, PATIENCE};
use super::nbd::SimNbd;
use super::trial::{Emphasis, Plan};
use super::volume_memory::{BLOCKS_PER_OBJECT, Fate, Image, Memory, OBJECT_BYTES, OBJECT_SHIFT, STRIDE_BYTES, content};
use crate::clients::padded;
use crate::invariants::{snapshots_immutable, volumes_as_written};
use crate::sectors::BLOCK_BYTES;

/// Images at once.
const IMAGES_MAX: usize = 10;
const WORKING_MAX: usize = 3;
/// Objects of a volume at most.
const OBJECTS_MAX: u64 = 4;
/// How long the last look at everything may take.
const END_PATIENCE: Duration = Duration::from_mins(1);

/// One such guest.
pub struct VolumeGuest {
    load: Load,
    random: Random,
    memory: Memory,
    number: u64,
    made: u64,
    /// Whether it may change numbers of copies.
    alters: bool,
    /// And to how many at least.
    copies_min: u8,
    /// Says when something is written beside what is discarded or deleted; nothing if it never is.
    beside: Option<Random>,
    /// Whether something is written beside snapshots as well.
    snapshots_beside: bool,
    /// A connection that is left open for later, with its export: what happens to the volume meanwhile must reach it.
    kept: Option<(String, SimNbd)>,
}

impl VolumeGuest {
    /// Of the guests' load only the way to the nodes and what is remembered count here.
    pub fn new(load: Load, number: u64, seed: u64, plan: &Plan) -> VolumeGuest {
        // With numbers of its own, so that who never does it is as before.
        let beside = plan.writes_beside.then(|| Random::new(seed ^ 0x6265_7369));
        let random = Random::new(seed);
        // A machine that is lost may have had the only copy.
        let copies_min = if plan.lost_in_outage.is_some() { 2 } else { 1 };
        let (alters, memory) = (plan.alters, Memory::default());
        let snapshots_beside = plan.emphasis == Emphasis::Volumes;
        VolumeGuest { load, random, memory, number, made: 0, alters, copies_min, beside, snapshots_beside, kept: None }
    }

    fn is_beside(&mut self, count: u64) -> bool {
        self.beside.as_mut().is_some_and(|random| random.one_in(count))
    }

    /// Works until told to stop; when all is well again, looks at everything.
    pub async fn run(mut self) {
        while !self.load.stop.load(Ordering::Relaxed) {
            let before = tokio::time::Instant::now();
            if let Err(error) = self.step().await {
                tracing::info!("volumes: {error}");
                tokio::time::sleep(Duration::from_millis(1 + self.random.below(200))).await;
            }
            tokio::time::sleep(Duration::from_millis(self.random.below(self.load.rest_ms + 1))).await;
            if tokio::time::Instant::now() == before {
                // There was nothing that it could do, and it did not rest: time would stand still.
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
        }
        while !self.load.is_healed.load(Ordering::Relaxed) {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for host in 0..self.load.host_count {
            if let Err(error) = within(END_PATIENCE, self.look_at_everything(host)).await {
                let text = format!("healed when calm: the volumes cannot all be read through node {host}: {error}");
                self.load.oracle.add_broken(text);
                return;
            }
        }
    }

    async fn step(&mut self) -> io::Result<()> {
        let (working, count) = (self.memory.working().len(), self.memory.images.len());
        match self.random.below(100) {
            _ if working == 0 && count < IMAGES_MAX => self.create().await,
            0..4 if working < WORKING_MAX && count < IMAGES_MAX => self.create().await,
            4..16 if count < IMAGES_MAX => self.snapshot().await,
            16..21 if working < WORKING_MAX && count < IMAGES_MAX => self.clone_one().await,
            21..24 => self.roll_back().await,
            24..28 => self.grow().await,
            28..31 if self.alters => self.alter_copies().await,
            31..41 => self.delete().await,
            _ if count > 0 => self.use_one().await,
            _ => Ok(()),
        }
    }

    fn host(&mut self) -> usize {
        self.random.below(self.load.host_count as u64) as usize
    }

    async fn client(&mut self) -> io::Result<SimClient> {
        let host = self.host();
        within(CONNECT_PATIENCE, SimClient::connect(&self.load.net, host)).await
    }

    fn fresh(&mut self, what: &str) -> String {
        self.made += 1;
        format!("{what}{}-{}", self.number, self.made)
    }

    fn pick(&mut self, from: &[usize]) -> Option<usize> {
        (!from.is_empty()).then(|| from[self.random.below(from.len() as u64) as usize])
    }

    fn note(&self, what: &str, result: &io::Result<()>) {
        tracing::debug!("volumes: {what}: {result:?}");
        let letters = what.bytes().fold(7, |sum: u64, byte| sum.wrapping_mul(31) + u64::from(byte));
        self.load.net.note(letters ^ u64::from(result.is_ok()));
    }

    /// Adds what was made, or perhaps.
    fn add(&mut self, image: Image, what: &str, result: io::Result<()>) -> io::Result<()> {
        self.note(what, &result);
        let fate = if result.is_ok() { Fate::There } else { Fate::PerhapsMade };
        self.memory.images.push(Image { fate, ..image });
        result
    }

    async fn create(&mut self) -> io::Result<()> {
        let (name, objects) = (self.fresh("v"), 1 + self.random.below(OBJECTS_MAX));
        let mut client = self.client().await?;
        let made = within(PATIENCE, client.create_volume(&name, objects * OBJECT_BYTES, OBJECT_SHIFT)).await;
        self.add(Image::new(name.clone(), objects), &format!("create {name}"), made.map(drop))
    }

    /// Of one volume as `dog vdi snapshot` does it, or of all at once.
    async fn snapshot(&mut self) -> io::Result<()> {
        let working = self.memory.working();
        let Some(index) = self.pick(&working) else { return Ok(()) };
        let tag = self.fresh("t");
        let mut client = self.client().await?;
        let is_group = self.memory.images[index].is_tag_in_doubt || self.random.one_in(3);
        let indexes = if is_group && self.random.one_in(2) { working } else { vec![index] };
        let names: Vec<String> = indexes.iter().map(|index| self.memory.images[*index].name.clone()).collect();
        let making = async {
            if is_group {
                let names: Vec<&str> = names.iter().map(String::as_str).collect();
                within(PATIENCE, client.snapshot_together(&names, &tag)).await
            } else {
                within(PATIENCE, snapshot_one(&mut client, &names[0], &tag)).await
            }
        };
        let mut seen = None;
        let made = if self.snapshots_beside && self.is_beside(2) {
            let (made, looked) = self.make_beside_writes(index, &tag, making).await;
            seen = looked;
            made
        } else {
            making.await
        };
        self.memory.images[index].is_tag_in_doubt |= !is_group && made.is_err();
        self.note(&format!("snapshot {tag} of {names:?}"), &made);
        for index in indexes {
            let image = Image { tag: tag.clone(), ..self.memory.images[index].clone() };
            let fate = if made.is_ok() { Fate::There } else { Fate::PerhapsMade };
            self.memory.images.push(Image { fate, ..image });
        }
        made?;
        if let Some((mut disk, block, bytes)) = seen {
            let name = self.memory.images[index].name.clone();
            let Some(index) = self.memory.those(|image| image.tag == tag && image.name == name).pop() else {
                return Ok(());
            };
            self.judge(index, block, &bytes);
            self.read(&mut disk, index, block).await?;
        }
        // Whoever has it open still may hear of the snapshot last.
        let left_open = self.kept.as_ref().and_then(|(export, _)| {
            self.memory.working().into_iter().find(|at| self.memory.images[*at].export() == *export)
        });
        if let Some(index) = left_open {
            let (export, host) = (self.memory.images[index].export(), self.host());
            let mut writer = within(PATIENCE, SimNbd::open(&self.load.net, host, &export)).await?;
            let block = self.random.below(self.memory.images[index].blocks.len() as u64);
            self.write(&mut writer, index, block).await?;
        }
        Ok(())
    }

    /// Makes a snapshot of an image while others write to one block of it, and looks at the block in it as soon as it is there:
    /// gives the connection, the block and what it held.
    async fn make_beside_writes(
        &mut self,
        index: usize,
        tag: &str,
        making: impl Future<Output = io::Result<()>>,
    ) -> (io::Result<()>, Option<(SimNbd, u64, Vec<u8>)>) {
        let block = self.random.below(self.memory.images[index].blocks.len() as u64);
        let hosts = [self.host(), self.host(), self.host()];
        let [one, two, three] = hosts.map(|host| self.write_beside_through(index, host, block));
        let (export, host) = (format!("{}@{tag}", self.memory.images[index].name), self.host());
        let net = self.load.net.clone();
        let looking = async {
            making.await?;
            let look = async {
                let mut disk = SimNbd::open(&net, host, &export).await?;
                let bytes = disk.read(block * STRIDE_BYTES, BLOCK_BYTES as u64).await?;
                Ok::<_, io::Error>((disk, block, bytes))
            };
            Ok(within(PATIENCE, look).await.ok())
        };
        let looked = tokio::join!(looking, one, two, three).0;
        match looked {
            Ok(seen) => (Ok(()), seen),
            Err(error) => (Err(error), None),
        }
    }

    async fn clone_one(&mut self) -> io::Result<()> {
        let snapshots = self.memory.those(Image::is_snapshot);
        let Some(index) = self.pick(&snapshots) else { return Ok(()) };
        let name = self.fresh("v");
        self.derive(index, name).await
    }

    /// Makes a volume out of a snapshot, under a name.
    async fn derive(&mut self, index: usize, name: String) -> io::Result<()> {
        let source = self.memory.images[index].clone();
        let mut client = self.client().await?;
        let found = within(PATIENCE, client.look_up(&source.name, &source.tag)).await?;
        let Some(base) = found else {
            self.missing(&source);
            return Ok(());
        };
        let size_bytes = within(PATIENCE, client.size_of(base)).await?;
        let made = within(PATIENCE, client.derive_volume(&name, size_bytes, base, false)).await;
        let what = format!("{name} out of {}", source.export());
        let mut image = Image { name: name.clone(), tag: String::new(), is_tag_in_doubt: false, ..source };
        // What was tried with the volume that had the name before may come true in this one.
        for older in 0..self.memory.images.len() {
            if self.memory.images[older].name == name {
                self.memory.inherit_doubts(&mut image, older);
            }
        }
        self.add(image, &what, made.map(drop))
    }

    fn missing(&mut self, image: &Image) {
        self.load.oracle.add_broken(volumes_as_written::missing(&image.export()));
    }

    /// As `dog vdi rollback`: the working volume goes, and another one of its name is made out of the snapshot.
    async fn roll_back(&mut self) -> io::Result<()> {
        let snapshots = self.memory.those(Image::is_snapshot);
        let Some(index) = self.pick(&snapshots) else { return Ok(()) };
        let mut source = self.memory.images[index].clone();
        if self.memory.is_in_doubt(&source.name) {
            return Ok(());
        }
        let name = source.name.clone();
        if let Some(current) = self.memory.those(|image| image.name == name && !image.is_snapshot()).first().copied() {
            let old = self.memory.images[current].clone();
            self.delete_image(current).await?;
            // Whoever wrote to the old one and got no answer may reach the new one.
            self.memory.images.push(old);
            let last = self.memory.images.len() - 1;
            self.memory.inherit_doubts(&mut source, last);
            self.memory.images.pop();
        }
        let position = |image: &Image| image.name == source.name && image.tag == source.tag;
        let Some(index) = self.memory.images.iter().position(position) else { return Ok(()) };
        let snapshot = std::mem::replace(&mut self.memory.images[index], source);
        let derived = self.derive(index, name).await;
        self.memory.images[index] = snapshot;
        derived
    }

    async fn grow(&mut self) -> io::Result<()> {
        let working = self.memory.working();
        let Some(index) = self.pick(&working) else { return Ok(()) };
        let (name, before) = (self.memory.images[index].name.clone(), self.memory.images[index].objects());
        let objects = before + 1 + self.random.below(2);
        if objects > 2 * OBJECTS_MAX || !self.memory.images[index].may_have_objects.is_empty() {
            return Ok(());
        }
        let mut client = self.client().await?;
        let Some(vdi) = within(PATIENCE, client.look_up(&name, "")).await? else {
            let image = self.memory.images[index].clone();
            self.missing(&image);
            return Ok(());
        };
        let bytes = (objects * OBJECT_BYTES).to_le_bytes();
        let grown = within(PATIENCE, client.write_inode(vdi, VDI_SIZE_OFFSET, &bytes)).await;
        self.note(&format!("grow {name} to {objects}"), &grown);
        match &grown {
            Ok(()) => self.memory.images[index].grow(objects),
            Err(_) => {
                let of_name = self.memory.images.iter_mut().filter(|image| image.name == name);
                // A snapshot that is made later has the size of then.
                for image in of_name.filter(|image| !image.is_snapshot() || image.fate == Fate::PerhapsMade) {
                    image.may_have_objects.insert(objects);
                }
            }
        }
        grown
    }

    async fn alter_copies(&mut self) -> io::Result<()> {
        let working = self.memory.working();
        let Some(index) = self.pick(&working) else { return Ok(()) };
        let (name, copies) = (
            self.memory.images[index].name.clone(),
            self.copies_min + self.random.below(u64::from(4 - self.copies_min)) as u8,
        );
        let mut client = self.client().await?;
        let Some(vdi) = within(PATIENCE, client.look_up(&name, "")).await? else {
            let image = self.memory.images[index].clone();
            self.missing(&image);
            return Ok(());
        };
        let altered = within(PATIENCE, client.alter_copies(vdi, copies)).await;
        self.note(&format!("{copies} copies of {name}"), &altered);
        altered
    }

    async fn delete(&mut self) -> io::Result<()> {
        let snapshots = self.memory.those(Image::is_snapshot);
        let working = self.memory.working();
        let from = if snapshots.is_empty() || self.random.one_in(4) || self.is_beside(3) { working } else { snapshots };
        let Some(index) = self.pick(&from) else { return Ok(()) };
        self.delete_image(index).await
    }

    async fn delete_image(&mut self, index: usize) -> io::Result<()> {
        let (name, tag) = (self.memory.images[index].name.clone(), self.memory.images[index].tag.clone());
        // What has this name next is another volume.
        self.kept = self.kept.take().filter(|(export, _)| *export != self.memory.images[index].export());
        let mut client = self.client().await?;
        let deleting = within(PATIENCE, client.delete_volume(&name, &tag));
        let deleted = if tag.is_empty() && self.is_beside(2) {
            // The volume goes while others write to it.
            let (one, two, three) = (
                self.write_beside_anywhere(index),
                self.write_beside_anywhere(index),
                self.write_beside_anywhere(index),
            );
            tokio::join!(deleting, one, two, three).0
        } else {
            deleting.await
        };
        self.note(&format!("delete {}", self.memory.images[index].export()), &deleted);
        match &deleted {
            Ok(()) => {
                self.memory.images.remove(index);
                self.memory.gone.insert((name, tag));
            }
            Err(_) => self.memory.images[index].fate = Fate::PerhapsGone,
        }
        deleted
    }

    /// Some requests to one image, over a connection of its own.
    async fn use_one(&mut self) -> io::Result<()> {
        if self.random.one_in(2)
            && let Some((export, client)) = self.kept.take()
            && let Some(index) = self.memory.working().into_iter().find(|at| self.memory.images[*at].export() == export)
        {
            return self.use_over(index, client).await;
        }
        let all = if self.random.below(10) < 7 { self.memory.working() } else { self.memory.those(|_| true) };
        let Some(index) = self.pick(&all) else { return Ok(()) };
        let (export, host) = (self.memory.images[index].export(), self.host());
        let opened = within(PATIENCE, SimNbd::open(&self.load.net, host, &export)).await?;
        if let Err(why) = self.memory.images[index].check_size(opened.size_bytes) {
            self.load.oracle.add_broken(volumes_as_written::violation(&why));
        }
        self.use_over(index, opened).await
    }

    async fn use_over(&mut self, index: usize, mut client: SimNbd) -> io::Result<()> {
        let export = self.memory.images[index].export();
        for _ in 0..=self.random.below(8) {
            if self.load.stop.load(Ordering::Relaxed) {
                break;
            }
            let block = self.random.below(self.memory.images[index].blocks.len() as u64);
            if self.memory.images[index].is_snapshot() {
                if self.random.one_in(6) {
                    self.try_to_write(&mut client, &export).await;
                    continue;
                }
                self.read(&mut client, index, block).await?;
                continue;
            }
            match self.random.below(100) {
                0..50 => self.write(&mut client, index, block).await?,
                50..65 => self.zero(&mut client, index, block).await?,
                _ => self.read(&mut client, index, block).await?,
            }
            tokio::time::sleep(Duration::from_millis(self.random.below(self.load.rest_ms + 1))).await;
        }
        if !self.memory.images[index].is_snapshot() && self.random.one_in(if self.kept.is_some() { 4 } else { 2 }) {
            self.kept = Some((export, client));
        }
        Ok(())
    }

    /// Writes a block, and reads it over the connection that was left open: perhaps since before a snapshot, and through a node
    /// that has not heard of it yet.
    async fn write(&mut self, client: &mut SimNbd, index: usize, block: u64) -> io::Result<()> {
        let (export, value) = (self.memory.images[index].export(), self.load.oracle.next_value());
        let written = within(PATIENCE, client.write(block * STRIDE_BYTES, &content(block, value))).await;
        self.note(&format!("write {value} to block {block} of {export}"), &written);
        self.memory.change(index, block, value, written.is_ok());
        written?;
        let Some((_, mut client)) = self.kept.take_if(|(kept, _)| *kept == export) else { return Ok(()) };
        self.read(&mut client, index, block).await?;
        self.kept = Some((export, client));
        Ok(())
    }

    /// Writes to one block of an image over a connection of its own, beside what else is done: it may come before that, after it
    /// or not at all.
    fn write_beside(&mut self, index: usize, host: usize, block: u64, value: u64) -> impl Future<Output = ()> + use<> {
        let (net, export) = (self.load.net.clone(), self.memory.images[index].export());
        let pause = Duration::from_millis(self.random.below(12));
        async move {
            let writing = async {
                let mut writer = SimNbd::open(&net, host, &export).await?;
                tokio::time::sleep(pause).await;
                writer.write(block * STRIDE_BYTES, &content(block, value)).await
            };
            let written = within(PATIENCE, writing).await;
            tracing::debug!("volumes: write {value} beside, to block {block} of {export}: {written:?}");
        }
    }

    /// The same, wherever.
    fn write_beside_anywhere(&mut self, index: usize) -> impl Future<Output = ()> + use<> {
        let host = self.host();
        let block = self.random.below(self.memory.images[index].blocks.len() as u64);
        self.write_beside_through(index, host, block)
    }

    /// The same, of what is remembered as perhaps written.
    fn write_beside_through(&mut self, index: usize, host: usize, block: u64) -> impl Future<Output = ()> + use<> {
        let value = self.load.oracle.next_value();
        self.memory.change(index, block, value, false);
        self.write_beside(index, host, block, value)
    }

    /// One block, half an object, or whole objects become zeros.
    async fn zero(&mut self, client: &mut SimNbd, index: usize, block: u64) -> io::Result<()> {
        let first = block - block % BLOCKS_PER_OBJECT;
        let (blocks, offset, length) = match self.random.below(4) {
            0 => (block..block + 1, block * STRIDE_BYTES, BLOCK_BYTES as u64),
            1 => (first..first + 2, first * STRIDE_BYTES, 2 * STRIDE_BYTES),
            _ => (first..first + BLOCKS_PER_OBJECT, first * STRIDE_BYTES, OBJECT_BYTES),
        };
        let is_trim = self.random.one_in(2);
        let (host, is_whole) = (client.host, length == OBJECT_BYTES);
        let zeroing = within(PATIENCE, client.zero(offset, length, is_trim));
        let mut beside = None;
        let zeroed = if is_whole && self.is_beside(3) {
            let block = first + self.random.below(BLOCKS_PER_OBJECT);
            let value = self.load.oracle.next_value();
            beside = Some((block, value));
            tokio::join!(zeroing, self.write_beside(index, host, block, value)).0
        } else if is_whole && self.random.one_in(2) {
            // Somebody else reads meanwhile: it may find what was there or zeros, and no error.
            let (net, host) = (self.load.net.clone(), self.random.below(self.load.host_count as u64) as usize);
            let (export, pause) = (self.memory.images[index].export(), Duration::from_millis(self.random.below(4)));
            let reading = async {
                let mut reader = SimNbd::open(&net, host, &export).await?;
                tokio::time::sleep(pause).await;
                for _ in 0..8 {
                    reader.read(offset, BLOCK_BYTES as u64).await?;
                }
                Ok::<_, io::Error>(())
            };
            tokio::join!(zeroing, within(PATIENCE, reading)).0
        } else {
            zeroing.await
        };
        self.note(&format!("zero blocks {blocks:?} of {}", self.memory.images[index].export()), &zeroed);
        for block in blocks {
            self.memory.change(index, block, 0, zeroed.is_ok());
        }
        if let Some((block, value)) = beside {
            self.memory.change(index, block, value, false);
        }
        zeroed
    }

    async fn read(&mut self, client: &mut SimNbd, index: usize, block: u64) -> io::Result<()> {
        let bytes = within(PATIENCE, client.read(block * STRIDE_BYTES, BLOCK_BYTES as u64)).await?;
        self.judge(index, block, &bytes);
        Ok(())
    }

    /// Compares what was read with what may be there.
    fn judge(&mut self, index: usize, block: u64, bytes: &[u8]) {
        let image = &mut self.memory.images[index];
        match image.read(block, bytes) {
            Ok(found) => self.load.net.note(found.iter().fold(block, |sum, value| sum.wrapping_mul(31) + value)),
            Err(why) if image.is_snapshot() => self.load.oracle.add_broken(snapshots_immutable::violation(&why)),
            Err(why) => self.load.oracle.add_broken(volumes_as_written::violation(&why)),
        }
    }

    async fn try_to_write(&mut self, client: &mut SimNbd, export: &str) {
        let value = self.load.oracle.next_value();
        if within(PATIENCE, client.write(0, &content(0, value))).await.is_ok() {
            let why = format!("{export} took write {value}");
            self.load.oracle.add_broken(snapshots_immutable::violation(&why));
        }
    }

    /// All images, and the absence of those that were deleted, through one node.
    async fn look_at_everything(&mut self, host: usize) -> io::Result<()> {
        let mut client = SimClient::connect(&self.load.net, host).await?;
        let gone: BTreeSet<(String, String)> = self.memory.gone.clone();
        for (name, tag) in gone {
            let is_again = |image: &Image| image.name == name && image.tag == tag;
            if !self.memory.images.iter().any(is_again) && client.look_up(&name, &tag).await?.is_some() {
                let why = format!("{name} {tag} was deleted and is there");
                self.load.oracle.add_broken(volumes_as_written::violation(&why));
            }
        }
        for index in 0..self.memory.images.len() {
            let image = self.memory.images[index].clone();
            if client.look_up(&image.name, &image.tag).await?.is_none() {
                if image.fate == Fate::There {
                    self.missing(&image);
                }
                continue;
            }
            let mut disk = SimNbd::open(&self.load.net, host, &image.export()).await?;
            if let Err(why) = image.check_size(disk.size_bytes) {
                self.load.oracle.add_broken(volumes_as_written::violation(&why));
            }
            for block in 0..disk.size_bytes / STRIDE_BYTES {
                self.read(&mut disk, index, block).await?;
            }
        }
        Ok(())
    }
}

/// The tag first, then the snapshot.
async fn snapshot_one(client: &mut SimClient, name: &str, tag: &str) -> io::Result<()> {
    let vdi: Option<VdiId> = client.look_up(name, "").await?;
    let vdi = vdi.ok_or_else(|| io::Error::other("the volume is not there"))?;
    let size_bytes = client.size_of(vdi).await?;
    client.write_inode(vdi, TAG_OFFSET, &padded(&[tag])).await?;
    client.derive_volume(name, size_bytes, vdi, true).await.map(drop)
}
