//! Makes a volume smaller.
//!
//! First what is beyond the new end is cleared, while clients go on: objects are discarded, the rest of the last one is written
//! over with zeros. Then writes are stopped, and if nothing came there meanwhile, an ordered command changes the size. Whatever
//! interrupts it leaves a volume of the old size that has lost some of what was to go; done again, it goes on there.
//!
//! Always holds:
//! 1. Beyond the end of a volume that was made smaller no map names an object, and its last object has zeros there: when it
//!    grows again, it reads zeros.
//! 2. After the command no write reaches what is beyond the end (`gateway::write`): whoever writes must take the lease again,
//!    and knows the new size by then.

use bytes::Bytes;
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::command::{Command, Outcome, Refusal};
use sheep_core::vdi::Vdi;
use sheep_core::zeros;
use tokio::task::JoinSet;

use super::Data;
use super::client::Client;
use super::gateway::{lease_table, read};
use super::inode::{self, InodeError, InodeWriter};
use super::virtual_disk::{DiskError, VirtualDisk};
use super::volumes::VolumeError;

/// Map entries that are looked at in one go.
const ENTRIES_AT_ONCE: u32 = 1 << 16;
/// Objects that are discarded in one go, so that the client can tell how far it is.
const OBJECTS_AT_ONCE: usize = 128;
/// Discards side by side: enough to fill a group commit of each holder.
const DISCARDS_AT_ONCE: usize = 16;
/// Bytes of an object that are read at once.
const PIECE_BYTES: u64 = 4 << 20;

/// Clears a part of what is beyond `size_bytes`, from the object `first` on; gives the first object that was not looked at, and
/// how many the volume has.
pub async fn clear_beyond(
    data: &Data,
    disk: &VirtualDisk,
    size_bytes: u64,
    first: u32,
) -> Result<(u32, u32), DiskError> {
    let id = disk.id()?;
    let vdi = data.view().state.live_vdi(id).cloned().ok_or(DiskError::Gone)?;
    let count = u32::try_from(vdi.object_count()).unwrap_or(u32::MAX);
    let size_bytes = size_bytes.min(vdi.size_bytes);
    let end = last_object_end(&vdi, size_bytes);
    if size_bytes < end {
        disk.zero(size_bytes, end - size_bytes, true).await?;
    }
    let first = first.max(u32::try_from(size_bytes.div_ceil(vdi.object_bytes())).unwrap_or(u32::MAX));
    let map = inode::map_range(data, id, first, count.saturating_sub(first).min(ENTRIES_AT_ONCE) as usize).await?;
    let mut next = first;
    let mut discards: JoinSet<Result<(), InodeError>> = JoinSet::new();
    let mut discarded = 0;
    let ended = |result: Result<Result<(), InodeError>, tokio::task::JoinError>| {
        result.map_err(|_| DiskError::Failed).and_then(|result| result.map_err(DiskError::from))
    };
    for owner in map {
        if discarded == OBJECTS_AT_ONCE {
            break;
        }
        if owner != 0 {
            discarded += 1;
            if discards.len() >= DISCARDS_AT_ONCE
                && let Some(result) = discards.join_next().await
            {
                ended(result)?;
            }
            let (data, oid) = (data.clone(), Oid::data(id, next));
            let writer = InodeWriter::of(&Client::default(), true);
            discards.spawn(async move { inode::discard(&data, oid, writer).await });
        }
        next += 1;
    }
    while let Some(result) = discards.join_next().await {
        ended(result)?;
    }
    Ok((next, count))
}

/// Where the object ends in which the new size is, or the volume, if that is before.
fn last_object_end(vdi: &Vdi, size_bytes: u64) -> u64 {
    size_bytes.next_multiple_of(vdi.object_bytes()).min(vdi.size_bytes)
}

/// Changes the size, if nothing is beyond the new end. False if something is (again).
pub async fn cut(data: &Data, vdi: VdiId, size_bytes: u64) -> Result<bool, VolumeError> {
    let node = data.node();
    lease_table::with_writes_stopped(data, vdi, async |generation| {
        if !is_clear(data, vdi, size_bytes).await? {
            return Ok(false);
        }
        match data.cluster().propose(Command::ShrinkVdi { vdi, node, generation, size_bytes }).await {
            Ok(Outcome::Refused(refusal)) => Err(VolumeError::Refused(refusal)),
            Ok(_) => {
                data.settle_in().await;
                Ok(true)
            }
            Err(error) => {
                tracing::warn!("cannot order that VDI {vdi} becomes smaller: {error}");
                Err(VolumeError::Order)
            }
        }
    })
    .await?
}

async fn is_clear(data: &Data, id: VdiId, size_bytes: u64) -> Result<bool, VolumeError> {
    let vdi = data.view().state.live_vdi(id).cloned().ok_or(VolumeError::Refused(Refusal::NoVdi))?;
    let size_bytes = size_bytes.min(vdi.size_bytes);
    let map = inode::whole_map(data, id).await?;
    let kept = usize::try_from(size_bytes.div_ceil(vdi.object_bytes())).unwrap_or(usize::MAX);
    if map.iter().skip(kept).any(|owner| *owner != 0) {
        return Ok(false);
    }
    let (index, inside) = (size_bytes / vdi.object_bytes(), size_bytes % vdi.object_bytes());
    let owner = map.get(index as usize).copied().and_then(VdiId::new).filter(|owner| owner.get() != 0);
    let Some(owner) = owner.filter(|_| inside > 0) else { return Ok(true) };
    let end = last_object_end(&vdi, size_bytes) - index * vdi.object_bytes();
    is_zero(data, Oid::data(owner, index as u32), inside..end).await
}

/// Whether a part of an object is zeros.
async fn is_zero(data: &Data, oid: Oid, part: std::ops::Range<u64>) -> Result<bool, VolumeError> {
    for extent in read::extents(data, oid).await? {
        let end = extent.end.min(part.end);
        let mut at = extent.start.max(part.start);
        while at < end {
            let length = (end - at).min(PIECE_BYTES);
            let bytes: Bytes = read::read(data, oid, at, length as usize).await?;
            if !zeros::is_zero(&bytes) {
                return Ok(false);
            }
            at += length;
        }
    }
    Ok(true)
}
