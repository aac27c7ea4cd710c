//! Random operations on volumes, snapshots and clones, beside a model in memory of what each of them must then hold.
//!
//! A [`Worker`] owns the volumes that it makes, so what they hold follows from what it did. Contents go through NBD, changes
//! of volumes through `dog`, machine state through the native protocol, each through a node drawn anew; whatever fails
//! because that node was killed meanwhile is done again through another one.
//!
//! Always holds:
//! 1. Only a failure during which the node was killed is tried again; where nodes vote, during which any node was. Any other
//!    is the cluster's, and ends the run.
//! 2. Every operation that may be done twice leaves the same behind as done once.

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use qemu_proto::inode::VM_STATE_SIZE_OFFSET;
use qemu_proto::oid::{Oid, VdiId};

use crate::clients::{Client, Refused, Request, opcode, result};
use crate::command;
use crate::nbd_client::{self, NbdClient, Style};
use crate::sectors::fill_random;
use crate::sim::Random;
use crate::spawn::DOG_DEADLINE;

/// Small objects, so that small volumes have several.
pub const OBJECT_BYTES: u64 = 1 << 20;
const OBJECT_SHIFT: &str = "20";
/// The largest volume.
const OBJECTS_MAX: u64 = 6;
/// Volumes and snapshots that one worker keeps.
const IMAGES_MAX: usize = 14;
const WORKING_MAX: usize = 4;
/// Connections that one worker keeps.
const CONNECTIONS_MAX: usize = 6;
/// How long an operation may be tried again because nodes are killed.
const PATIENCE: Duration = Duration::from_mins(2);
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// A way into the cluster.
pub struct Door {
    /// Of the native protocol, on 127.0.0.1.
    pub port: u16,
    /// The NBD socket.
    pub nbd: PathBuf,
    /// Whether it serves now.
    pub is_open: AtomicBool,
    /// Goes up before each kill.
    pub kills: AtomicU64,
}

/// All ways into the cluster.
pub struct Doors {
    /// By node.
    pub nodes: Vec<Door>,
    /// The program.
    pub dog: PathBuf,
    /// The cluster has a leader, whose death any node may notice.
    pub is_voting: bool,
}

impl Doors {
    /// The nodes whose death may be why something fails through one of them.
    fn blamed(&self, door: usize) -> &[Door] {
        if self.is_voting { &self.nodes } else { std::slice::from_ref(&self.nodes[door]) }
    }

    fn kills(&self, door: usize) -> u64 {
        self.blamed(door).iter().map(|door| door.kills.load(Ordering::SeqCst)).sum()
    }

    fn is_any_closed(&self, door: usize) -> bool {
        self.blamed(door).iter().any(|door| !door.is_open.load(Ordering::SeqCst))
    }
}

/// A volume or a snapshot, as it must be.
#[derive(Clone)]
pub struct Image {
    /// Its name.
    pub name: String,
    /// A snapshot's tag; empty for a working volume.
    pub tag: String,
    /// Its id.
    pub id: VdiId,
    /// What it was made from.
    pub parent: Option<VdiId>,
    /// Bytes.
    pub size_bytes: u64,
    /// Whose object each piece is; 0 for a hole.
    pub map: Vec<u32>,
    /// What each piece holds; nothing for zeros.
    pub content: Vec<Option<Arc<Vec<u8>>>>,
    /// Objects of machine state.
    pub vm_state: u32,
}

impl Image {
    fn new(name: String, id: VdiId, size_bytes: u64) -> Image {
        let count = size_bytes.div_ceil(OBJECT_BYTES) as usize;
        let content = vec![None; count];
        Image { name, tag: String::new(), id, parent: None, size_bytes, map: vec![0; count], content, vm_state: 0 }
    }

    /// As an NBD export.
    pub fn export(&self) -> String {
        if self.tag.is_empty() { self.name.clone() } else { format!("{}@{}", self.name, self.tag) }
    }

    /// The objects that it refers to, machine state included; not its inode.
    pub fn objects(&self) -> impl Iterator<Item = Oid> + '_ {
        let data = self.map.iter().enumerate().filter_map(|(index, owner)| {
            let owner = VdiId::new(*owner).filter(|owner| owner.get() != 0)?;
            Some(Oid::data(owner, index as u32))
        });
        data.chain((0..self.vm_state).map(|index| Oid::vmstate(self.id, index)))
    }

    /// A part of the content.
    pub fn read(&self, offset: u64, length: u64) -> Vec<u8> {
        let mut bytes = vec![0; length as usize];
        for (index, inside, part) in pieces(offset, length) {
            let at = (index as u64 * OBJECT_BYTES + inside.start as u64 - offset) as usize;
            if let Some(object) = &self.content[index] {
                bytes[at..at + part].copy_from_slice(&object[inside]);
            }
        }
        bytes
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) {
        let mut rest = bytes;
        for (index, inside, part) in pieces(offset, bytes.len() as u64) {
            let object = self.content[index].get_or_insert_with(|| Arc::new(vec![0; OBJECT_BYTES as usize]));
            Arc::make_mut(object)[inside].copy_from_slice(&rest[..part]);
            rest = &rest[part..];
            self.map[index] = self.id.get();
        }
    }

    /// Zeroes as NBD's trims and zeroes do: whole objects become holes, holes stay.
    fn zero(&mut self, offset: u64, length: u64) {
        for (index, inside, _) in pieces(offset, length) {
            let left = (self.size_bytes - index as u64 * OBJECT_BYTES).min(OBJECT_BYTES) as usize;
            if self.map[index] == 0 {
                continue;
            }
            if inside.start == 0 && inside.end >= left {
                self.map[index] = 0;
                self.content[index] = None;
            } else {
                let zeros = vec![0; inside.len()];
                self.write(index as u64 * OBJECT_BYTES + inside.start as u64, &zeros);
            }
        }
    }

    /// What is beyond the new end is zeroed, which makes the last object its own, and then cut off.
    fn shrink(&mut self, size_bytes: u64) {
        let end = size_bytes.next_multiple_of(OBJECT_BYTES).min(self.size_bytes);
        if size_bytes < end {
            self.zero(size_bytes, end - size_bytes);
        }
        self.grow(size_bytes);
    }

    fn grow(&mut self, size_bytes: u64) {
        let count = size_bytes.div_ceil(OBJECT_BYTES) as usize;
        self.size_bytes = size_bytes;
        self.map.resize(count, 0);
        self.content.resize(count, None);
    }
}

/// Object index, bytes inside it, and their count.
fn pieces(offset: u64, length: u64) -> impl Iterator<Item = (usize, std::ops::Range<usize>, usize)> {
    let end = offset + length;
    let mut at = offset;
    std::iter::from_fn(move || {
        if at >= end {
            return None;
        }
        let inside = at % OBJECT_BYTES;
        let part = (OBJECT_BYTES - inside).min(end - at);
        let index = (at / OBJECT_BYTES) as usize;
        at += part;
        Some((index, inside as usize..(inside + part) as usize, part as usize))
    })
}

/// Who does the operations; see the module.
pub struct Worker<'a> {
    doors: &'a Doors,
    prefix: String,
    random: Random,
    /// Everything there must be of this worker.
    pub images: Vec<Image>,
    connections: HashMap<String, (usize, NbdClient)>,
    made: u64,
    /// What was done last, for messages.
    pub last: String,
}

impl<'a> Worker<'a> {
    /// One whose volumes' names begin with `prefix`.
    pub fn new(doors: &'a Doors, prefix: String, seed: u64) -> Worker<'a> {
        let (random, images, connections) = (Random::new(seed), Vec::new(), HashMap::new());
        Worker { doors, prefix, random, images, connections, made: 0, last: String::new() }
    }

    /// One random operation.
    pub fn operate(&mut self) -> Result<()> {
        let working = self.working().len();
        match self.random.below(100) {
            _ if working == 0 => self.create(),
            0..3 if working < WORKING_MAX => self.create(),
            _ if self.images.len() > IMAGES_MAX => self.delete(),
            0..45 => self.write(),
            45..57 => self.zero(),
            57..78 => self.read(),
            78..87 => self.snapshot(),
            87..90 if working < WORKING_MAX => self.clone_one(),
            87..92 => self.roll_back(),
            92..94 => self.resize(),
            _ => self.delete(),
        }
    }

    fn working(&self) -> Vec<usize> {
        (0..self.images.len()).filter(|&index| self.images[index].tag.is_empty()).collect()
    }

    fn pick(&mut self, from: &[usize]) -> Option<usize> {
        (!from.is_empty()).then(|| from[self.random.below(from.len() as u64) as usize])
    }

    fn pick_working(&mut self) -> Result<usize> {
        let working = self.working();
        self.pick(&working).context("a working volume")
    }

    fn pick_snapshot(&mut self) -> Option<usize> {
        let snapshots: Vec<usize> =
            (0..self.images.len()).filter(|&index| !self.images[index].tag.is_empty()).collect();
        self.pick(&snapshots)
    }

    fn fresh(&mut self, what: &str) -> String {
        self.made += 1;
        format!("{what}{}", self.made)
    }

    fn some_size(&mut self, least: u64) -> u64 {
        // Not always whole objects.
        let steps = (OBJECTS_MAX * OBJECT_BYTES - least) / 4096;
        least + self.random.below(steps + 1) * 4096
    }

    fn range(&mut self, index: usize) -> (u64, u64) {
        let size = self.images[index].size_bytes;
        let length = match self.random.below(10) {
            0 => 1 + self.random.below(3 * OBJECT_BYTES / 2),
            1 => OBJECT_BYTES,
            2 => 1 + self.random.below(9000),
            _ => 4096 * (1 + self.random.below(16)),
        };
        let length = length.min(size);
        let grain = [1, 512, 4096, OBJECT_BYTES][self.random.below(4) as usize];
        let offset = self.random.below((size - length) / grain + 1) * grain;
        (offset, length)
    }

    fn create(&mut self) -> Result<()> {
        let prefix = self.prefix.clone();
        let (name, size) = (self.fresh(&prefix), self.some_size(4096));
        self.dog(&["vdi", "create", "-z", OBJECT_SHIFT, &name, &size.to_string()], (&name, "", true))?;
        let id = self.look_up(&name)?;
        self.images.push(Image::new(name, id, size));
        Ok(())
    }

    fn write(&mut self) -> Result<()> {
        let index = self.pick_working()?;
        let (offset, length) = self.range(index);
        let mut bytes = vec![0; length as usize];
        fill_random(&mut bytes, &mut self.random);
        let flags = if self.random.one_in(8) { nbd_client::FLAG_FUA } else { 0 };
        self.nbd(index, &format!("write {offset}+{length}"), |client| client.write(offset, &bytes, flags))?;
        self.images[index].write(offset, &bytes);
        Ok(())
    }

    fn zero(&mut self) -> Result<()> {
        use nbd_client::command::{TRIM, WRITE_ZEROES};
        let index = self.pick_working()?;
        let (offset, length) = self.range(index);
        let kind = if self.random.one_in(2) { TRIM } else { WRITE_ZEROES };
        self.nbd(index, &format!("zero {offset}+{length}"), |client| {
            client.must(kind, 0, offset, length, &[]).map(drop)
        })?;
        self.images[index].zero(offset, length);
        Ok(())
    }

    fn read(&mut self) -> Result<()> {
        let index = self.random.below(self.images.len() as u64) as usize;
        let (offset, length) = self.range(index);
        let seen = self.nbd(index, &format!("read {offset}+{length}"), |client| client.read(offset, length))?;
        let wanted = self.images[index].read(offset, length);
        let differs = seen.iter().zip(&wanted).position(|(seen, wanted)| seen != wanted);
        let what = self.images[index].export();
        ensure!(seen.len() == wanted.len(), "{what}: {} bytes at {offset} instead of {length}", seen.len());
        ensure!(differs.is_none(), "{what} differs from the model at byte {differs:?} of {length} at {offset}");
        Ok(())
    }

    fn snapshot(&mut self) -> Result<()> {
        let index = self.pick_working()?;
        let (tag, before) = (self.fresh("s"), self.images[index].clone());
        let vm_state = if self.random.one_in(4) { 1 + self.random.below(2) as u32 } else { 0 };
        if vm_state > 0 {
            self.save_machine(before.id, vm_state)?;
        }
        self.dog(&["vdi", "snapshot", "-s", &tag, &before.name], (&before.name, &tag, true))?;
        let id = self.look_up(&before.name)?;
        let working = &mut self.images[index];
        working.id = id;
        working.parent = Some(before.id);
        self.images.push(Image { tag, vm_state, ..before });
        Ok(())
    }

    /// Saves machine state as QEMU's `savevm` does, before the snapshot.
    fn save_machine(&mut self, vdi: VdiId, count: u32) -> Result<()> {
        self.last = format!("save {count} objects of machine state of {vdi}");
        self.native(|client| {
            for index in 0..count {
                let request = Request::object(opcode::CREATE_AND_WRITE, Oid::vmstate(vdi, index), 0);
                client.call(request, &[7; 5000])?.success("machine state")?;
            }
            let bytes = u64::from(count) * OBJECT_BYTES;
            let request = Request::object(opcode::WRITE, Oid::inode(vdi), VM_STATE_SIZE_OFFSET as u64);
            client.call(request, &bytes.to_le_bytes())?.success("size of machine state").map(drop)
        })
    }

    fn clone_one(&mut self) -> Result<()> {
        let Some(index) = self.pick_snapshot() else { return Ok(()) };
        let prefix = self.prefix.clone();
        let (name, source) = (self.fresh(&prefix), self.images[index].clone());
        self.dog(&["vdi", "clone", "-s", &source.tag, &source.name, &name], (&name, "", true))?;
        let id = self.look_up(&name)?;
        self.images.push(Image { name, tag: String::new(), id, parent: Some(source.id), vm_state: 0, ..source });
        Ok(())
    }

    fn roll_back(&mut self) -> Result<()> {
        let Some(index) = self.pick_snapshot() else { return Ok(()) };
        let source = self.images[index].clone();
        self.disconnect(&source.name);
        // Done twice it makes one more working volume and deletes the first.
        let words = ["vdi", "rollback", "-f", "-s", &source.tag, &source.name];
        self.dog_until(&words, |_| Ok(false))?;
        let id = self.look_up(&source.name)?;
        self.images.retain(|image| image.name != source.name || !image.tag.is_empty());
        self.images.push(Image { tag: String::new(), id, parent: Some(source.id), vm_state: 0, ..source });
        Ok(())
    }

    fn resize(&mut self) -> Result<()> {
        let index = self.pick_working()?;
        let shrinks = self.random.one_in(2);
        let least = if shrinks { 4096 } else { self.images[index].size_bytes };
        let (name, size) = (self.images[index].name.clone(), self.some_size(least));
        self.disconnect(&name);
        self.dog_until(&["vdi", "resize", "-f", &name, &size.to_string()], |_| Ok(false))?;
        let image = &mut self.images[index];
        if size < image.size_bytes {
            image.shrink(size);
        } else {
            image.grow(size);
        }
        Ok(())
    }

    /// Deletes a snapshot or, now and then, a working volume.
    fn delete(&mut self) -> Result<()> {
        let index = match self.pick_snapshot() {
            Some(index) if !self.random.one_in(5) => index,
            _ => self.pick_working()?,
        };
        self.delete_image(index)
    }

    /// Deletes one image.
    pub fn delete_image(&mut self, index: usize) -> Result<()> {
        let image = self.images.swap_remove(index);
        self.disconnect(&image.export());
        if image.tag.is_empty() {
            self.dog(&["vdi", "delete", &image.name], (&image.name, "", false))
        } else {
            self.dog(&["vdi", "delete", "-s", &image.tag, &image.name], (&image.name, &image.tag, false))
        }
    }

    fn disconnect(&mut self, export: &str) {
        self.connections.remove(export);
    }

    fn door(&mut self) -> Result<usize> {
        let started = Instant::now();
        loop {
            let index = self.random.below(self.doors.nodes.len() as u64) as usize;
            if self.doors.nodes[index].is_open.load(Ordering::SeqCst) {
                return Ok(index);
            }
            ensure!(started.elapsed() < PATIENCE, "no node is running");
        }
    }

    /// Does something through nodes drawn anew until it is done; see invariant 1.
    fn through<T>(&mut self, mut act: impl FnMut(&mut Self, usize) -> Result<T>) -> Result<T> {
        let started = Instant::now();
        loop {
            let door = self.door()?;
            let kills = self.doors.kills(door);
            let error = match act(self, door) {
                Ok(done) => return Ok(done),
                Err(error) => error,
            };
            let was_killed = self.doors.kills(door) != kills || self.doors.is_any_closed(door);
            if !was_killed || started.elapsed() > PATIENCE {
                return Err(error.context(format!("{} through node {door}", self.last)));
            }
            std::thread::sleep(RETRY_INTERVAL);
        }
    }

    fn nbd<T>(&mut self, index: usize, what: &str, act: impl Fn(&mut NbdClient) -> Result<T>) -> Result<T> {
        let export = self.images[index].export();
        self.last = format!("{what} of {export} ({})", self.images[index].id);
        if let Some((door, mut client)) = self.connections.remove(&export) {
            match act(&mut client) {
                Ok(done) => {
                    self.connections.insert(export, (door, client));
                    return Ok(done);
                }
                // The node was killed since, or in the middle.
                Err(error) if error.chain().any(is_broken) => {}
                Err(error) => return Err(error.context(format!("{} through node {door}", self.last))),
            }
        }
        self.through(|worker, door| {
            let style = if worker.random.one_in(2) { Style::Structured } else { Style::Extended };
            let mut client = NbdClient::open(&worker.doors.nodes[door].nbd, &export, style, &[])?;
            let done = act(&mut client)?;
            if worker.connections.len() >= CONNECTIONS_MAX {
                worker.connections.clear();
            }
            worker.connections.insert(export.clone(), (door, client));
            Ok(done)
        })
    }

    fn native<T>(&mut self, act: impl Fn(&mut Client) -> Result<T>) -> Result<T> {
        self.through(|worker, door| act(&mut Client::tcp(worker.doors.nodes[door].port)?))
    }

    fn look_up(&mut self, name: &str) -> Result<VdiId> {
        self.native(|client| client.look_up(name, "", 0))
    }

    /// Runs `dog`; what it is to bring about is that this name and tag can, or cannot, be found.
    fn dog(&mut self, words: &[&str], (name, tag, exists): (&str, &str, bool)) -> Result<()> {
        self.dog_until(words, |client| Ok(is_there(client, name, tag)? == exists))
    }

    fn dog_until(&mut self, words: &[&str], is_done: impl Fn(&mut Client) -> Result<bool>) -> Result<()> {
        self.last = format!("dog {}", words.join(" "));
        let mut is_first = true;
        self.through(|worker, door| {
            let port = worker.doors.nodes[door].port;
            if !std::mem::take(&mut is_first) && is_done(&mut Client::tcp(port)?)? {
                return Ok(());
            }
            let mut dog = Command::new(&worker.doors.dog);
            dog.args(words).env_remove("SHEEPDOG_DOG_ADDR").env("SHEEPDOG_DOG_PORT", port.to_string());
            command::run(&mut dog, DOG_DEADLINE)?.ok().map(drop)
        })
    }
}

/// Whether the connection broke, rather than that the server said no.
fn is_broken(cause: &(dyn std::error::Error + 'static)) -> bool {
    cause.is::<io::Error>()
}

fn is_there(client: &mut Client, name: &str, tag: &str) -> Result<bool> {
    match client.look_up(name, tag, 0) {
        Ok(_) => Ok(true),
        Err(error) => match error.downcast_ref::<Refused>() {
            Some(Refused(result::NO_VDI | result::NO_TAG)) => Ok(false),
            _ => Err(error),
        },
    }
}

/// The objects that these images refer to.
pub fn referenced<'a>(images: impl IntoIterator<Item = &'a Image>) -> BTreeSet<Oid> {
    images.into_iter().flat_map(Image::objects).collect()
}

/// Fails unless an image is there as the model has it: header, map and content, through one node.
pub fn check_image(door: &Door, image: &Image) -> Result<()> {
    let what = image.export();
    let mut client = Client::tcp(door.port)?;
    let seen = crate::clients::Volume::open(&mut client, &image.name, &image.tag).with_context(|| what.clone())?;
    ensure!(seen.vdi == image.id, "{what} is {} instead of {}", seen.vdi, image.id);
    ensure!(seen.size_bytes == image.size_bytes, "{what} has {} bytes", seen.size_bytes);
    ensure!(seen.map == image.map, "the map of {what} is {:x?} instead of {:x?}", seen.map, image.map);
    let header = client.read_object(Oid::inode(image.id), 0, qemu_proto::inode::HEADER_BYTES as u32)?;
    let Ok(header) = qemu_proto::inode::InodeHeader::decode(&header) else { bail!("{what} has no header") };
    let parent = image.parent.map_or(0, VdiId::get);
    ensure!(header.parent_vdi_id == parent, "{what} is a child of {:x}, not {parent:x}", header.parent_vdi_id);
    let content = NbdClient::open(&door.nbd, &what, Style::Structured, &[])?.read_all()?;
    let wanted = image.read(0, image.size_bytes);
    let differs = content.iter().zip(&wanted).position(|(seen, wanted)| seen != wanted);
    ensure!(content.len() == wanted.len() && differs.is_none(), "{what} differs from the model at byte {differs:?}");
    Ok(())
}
