//! What the volumes of a simulated cluster refer to, and what its disks hold.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use qemu_proto::oid::{Oid, VdiId};

use super::client::SimClient;
use super::cluster::Shape;
use super::sim_disk::SimDisk;

/// The directory of objects in a store.
pub const OBJECTS: &str = "obj";

/// Where copies are.
#[derive(Clone)]
pub struct Places {
    /// The machines.
    pub shape: Shape,
    /// Their disks.
    pub disks: Vec<SimDisk>,
}

impl Places {
    /// Which machines have a file of each object.
    pub fn holders(&self) -> BTreeMap<Oid, BTreeSet<usize>> {
        let mut holders: BTreeMap<Oid, BTreeSet<usize>> = BTreeMap::new();
        for (host, disk) in self.disks.iter().enumerate() {
            for (path, _) in disk.list() {
                let is_object = path.parent().and_then(|dir| dir.file_name()).is_some_and(|name| name == OBJECTS);
                let raw = path.file_name().and_then(|name| u64::from_str_radix(name.to_str()?, 16).ok());
                if let Some(raw) = raw.filter(|_| is_object) {
                    holders.entry(Oid::from_raw(raw)).or_default().insert(host);
                }
            }
        }
        holders
    }
}

/// What is referred to, as one node tells it.
#[derive(Clone, Default, Debug)]
pub struct Inventory {
    /// Objects that maps name, each with the number of copies it should have.
    pub wanted: BTreeMap<Oid, u8>,
    /// Inodes of VDIs that are not deleted: made with the first write.
    pub inodes: BTreeMap<Oid, u8>,
}

impl Inventory {
    /// Asks for the maps of everything that is not deleted.
    pub async fn ask(client: &mut SimClient) -> io::Result<Inventory> {
        let states = client.vdi_states().await?;
        let copies: BTreeMap<u32, u8> = states.iter().map(|state| (state.vid, state.nr_copies)).collect();
        let mut inventory = Inventory::default();
        for state in states.iter().filter(|state| state.deleted == 0) {
            let Some(vdi) = VdiId::new(state.vid) else { continue };
            inventory.inodes.insert(Oid::inode(vdi), state.nr_copies);
            for (index, owner) in client.map_of(vdi).await?.into_iter().enumerate() {
                if let Some(owner) = VdiId::new(owner).filter(|owner| owner.get() != 0) {
                    let copies = copies.get(&owner.get()).copied().unwrap_or(0);
                    inventory.wanted.insert(Oid::data(owner, index as u32), copies);
                }
            }
        }
        Ok(inventory)
    }
}
