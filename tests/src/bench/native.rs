//! A volume through the native protocol, as QEMU's driver uses it: the client knows objects and the map, makes an object at
//! its first write, and copies what a snapshot shares.

use anyhow::{Context, Result, ensure};
use qemu_proto::oid::Oid;

use super::load::{Load, Pipe};
use super::patterns::Operation;
use crate::clients::{Client, MAP_OFFSET, Request, Volume, flag, opcode, result};

/// See the module.
pub struct Native {
    client: Client,
    volume: Volume,
    /// Objects that were made and are not in the map yet, by the tag of the write that needs them.
    creating: Vec<(u64, u32)>,
}

/// Tags fit the ids of the protocol; only that of a flush does not.
const FLUSH_ID: u32 = u32::MAX;

impl Native {
    /// Opens a volume.
    pub fn open(mut client: Client, name: &str) -> Result<Native> {
        let volume = Volume::open(&mut client, name, "")?;
        Ok(Native { client, volume, creating: Vec::new() })
    }

    fn write(&mut self, tag: u64, operation: Operation, load: &Load) -> Result<()> {
        let index = (operation.offset / self.volume.object_bytes()) as u32;
        let own = Oid::data(self.volume.vdi, index);
        let owner = self.volume.object(index as usize);
        let kind = if owner == Some(own) { opcode::WRITE } else { opcode::CREATE_AND_WRITE };
        let mut request = Request::object(kind, own, operation.offset % self.volume.object_bytes()).id(tag as u32);
        request.flags = if load.pattern.is_durable() { flag::DIRECT } else { flag::CACHE };
        if owner != Some(own) {
            // Two writes to an object that is not there yet would have to wait for each other, as QEMU lets them.
            ensure!(load.pattern.depth == 1, "{} makes objects: one write at a time", load.pattern.name);
            self.creating.push((tag, index));
        }
        if let Some(source) = owner.filter(|source| *source != own) {
            request = request.with_u64(24, source.raw());
            request.flags |= flag::COW;
        }
        Ok(self.client.send(request, load.payload)?)
    }

    /// Names an object that was just made in the map.
    fn name(&mut self, tag: u64, index: u32) -> Result<()> {
        let vdi = self.volume.vdi;
        let entry = Request::object(opcode::WRITE, Oid::inode(vdi), MAP_OFFSET + 4 * u64::from(index));
        self.client.send(entry.flags(flag::DIRECT).id(tag as u32), &vdi.get().to_le_bytes())?;
        *self.volume.map.get_mut(index as usize).context("beyond the map")? = vdi.get();
        Ok(())
    }
}

impl Pipe for Native {
    fn send(&mut self, tag: u64, operation: Operation, load: &Load) -> Result<()> {
        if operation.is_write {
            return self.write(tag, operation, load);
        }
        let object_bytes = self.volume.object_bytes();
        let index = (operation.offset / object_bytes) as usize;
        let oid = self.volume.object(index).context("a read of what was never written")?;
        let request = Request::object(opcode::READ, oid, operation.offset % object_bytes).flags(flag::CACHE);
        Ok(self.client.send(request.id(tag as u32).length(load.pattern.bytes), &[])?)
    }

    fn send_flush(&mut self, _: u64) -> Result<()> {
        let oid = Oid::inode(self.volume.vdi);
        let request = Request::object(opcode::FLUSH_VDI, oid, 0).flags(flag::CACHE).id(FLUSH_ID);
        Ok(self.client.send(request, &[])?)
    }

    fn receive(&mut self) -> Result<u64> {
        loop {
            let answer = self.client.receive()?;
            ensure!(answer.result() == result::SUCCESS, "a request failed: {:#x}", answer.result());
            if answer.id() == FLUSH_ID {
                return Ok(u64::MAX);
            }
            let tag = u64::from(answer.id());
            match self.creating.iter().position(|(other, _)| *other == tag) {
                Some(place) => {
                    let (_, index) = self.creating.swap_remove(place);
                    self.name(tag, index)?;
                }
                None => return Ok(tag),
            }
        }
    }
}
