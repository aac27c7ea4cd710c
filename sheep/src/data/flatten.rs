//! Makes a volume independent of what it was cloned from: gives it its own copy of every object that it shares.
//!
//! Object by object, while guests go on, by the rules of copy-on-write (`virtual_disk`). Whatever interrupts it leaves a
//! volume that shares less than before; done again, it goes on there. Only when nothing is shared any more an ordered
//! command takes the parent away.

use qemu_proto::oid::VdiId;
use sheep_core::command::{Command, Outcome};

use super::Data;
use super::gateway::lease_table;
use super::inode;
use super::virtual_disk::{DiskError, VirtualDisk};
use super::volumes::VolumeError;

/// Copies of a range of a volume's objects those that are others'; gives how many that were.
pub async fn copy_shared(data: &Data, disk: &VirtualDisk, first: u32, count: u32) -> Result<u32, DiskError> {
    let id = disk.id()?;
    let map = inode::map_range(data, id, first, count as usize).await?;
    let mut copied = 0;
    for (index, owner) in (first..).zip(map) {
        if owner != 0 && owner != id.get() {
            disk.make_own(index).await?;
            copied += 1;
        }
    }
    Ok(copied)
}

/// Takes the parent of a working VDI away, if it shares nothing with it. False if it does.
pub async fn detach(data: &Data, vdi: VdiId) -> Result<bool, VolumeError> {
    inode::materialise(data, vdi).await?;
    let node = data.node();
    lease_table::with_writes_stopped(data, vdi, async |generation| {
        let map = inode::whole_map(data, vdi).await?;
        if map.iter().any(|owner| *owner != 0 && *owner != vdi.get()) {
            return Ok(false);
        }
        match data.cluster().propose(Command::DetachVdi { vdi, node, generation }).await {
            Ok(Outcome::Refused(refusal)) => Err(VolumeError::Refused(refusal)),
            Ok(_) => {
                data.settle_in().await;
                Ok(true)
            }
            Err(error) => {
                tracing::warn!("cannot order that VDI {vdi} has no parent: {error}");
                Err(VolumeError::Order)
            }
        }
    })
    .await?
}
