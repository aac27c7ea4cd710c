//! Gives back the space of deleted VDIs, and of copies that a change of members left on the wrong node.
//!
//! No reference counts: the maps of a VDI's family (everything connected to it by parents) say what is still referred to. Of
//! a deleted VDI's map, the objects that belong to a deleted VDI and that no remaining map names are removed, then its
//! machine state and its inode. Doing it twice does no harm, so a node that dies in the middle is simply followed by
//! another one, from the beginning.

use std::collections::{BTreeMap, BTreeSet};

use qemu_proto::oid::{Oid, VdiId};
use sheep_core::command::Command;
use sheep_core::stamp::{Epoch, Stamp, Version};

use super::Data;
use super::inode::{self, InodeError};
use super::view::View;

/// Starts the work if there is some and this node is the one to do it: the first member, so that exactly one does.
pub fn start_if_due(data: &Data, view: &View) {
    let first = view.state.members.keys().next();
    if view.state.to_reclaim.is_empty() || first != Some(&data.node()) || !view.state.is_running() {
        return;
    }
    let data = data.clone();
    tokio::spawn(async move {
        let turn = data.inode_turns().turn(Oid::from_raw(0));
        // One run at a time; a run takes everything that is due when it begins.
        let Ok(_running) = turn.try_lock() else { return };
        while let Some(next) = data.view().state.to_reclaim.first().copied() {
            let Some(vdi) = VdiId::new(next) else { return };
            if let Err(error) = reclaim(&data, vdi).await {
                // The next change of the state tries again.
                tracing::warn!("cannot give back the space of VDI {vdi} yet: {error}");
                return;
            }
            match data.cluster().propose(Command::Reclaimed { vdi }).await {
                Ok(_) => data.await_applied(data.cluster().state().applied).await,
                Err(error) => {
                    tracing::warn!("cannot note that VDI {vdi} is reclaimed: {error}");
                    return;
                }
            }
        }
    });
}

/// Everything connected to a VDI by parents, deleted or not.
fn family(view: &View, vdi: VdiId) -> BTreeSet<VdiId> {
    let mut neighbours: BTreeMap<VdiId, Vec<VdiId>> = BTreeMap::new();
    for member in view.state.vdis.values() {
        if let Some(parent) = member.parent {
            neighbours.entry(parent).or_default().push(member.id);
            neighbours.entry(member.id).or_default().push(parent);
        }
    }
    let mut found = BTreeSet::from([vdi]);
    let mut todo = vec![vdi];
    while let Some(next) = todo.pop() {
        for neighbour in neighbours.get(&next).into_iter().flatten() {
            if found.insert(*neighbour) {
                todo.push(*neighbour);
            }
        }
    }
    found
}

async fn reclaim(data: &Data, vdi: VdiId) -> Result<(), InodeError> {
    let view = data.view();
    let deleted = |id: u32| view.state.vdis.get(&id).is_some_and(|vdi| vdi.deleted);
    let map = inode::whole_map(data, vdi).await?;
    let owned = map.iter().enumerate().filter(|(_, owner)| deleted(**owner));
    let mut garbage: BTreeSet<Oid> =
        owned.filter_map(|(index, owner)| Some(Oid::data(VdiId::new(*owner)?, index as u32))).collect();
    for member in family(&view, vdi).into_iter().filter(|member| !deleted(member.get())) {
        // Its map may still be an ancestor's that is about to go.
        inode::materialise(data, member).await?;
        if garbage.is_empty() {
            continue;
        }
        for (index, owner) in inode::whole_map(data, member).await?.into_iter().enumerate() {
            if let Some(owner) = VdiId::new(owner) {
                garbage.remove(&Oid::data(owner, index as u32));
            }
        }
    }
    for oid in garbage {
        inode::drop_object(data, oid).await?;
    }
    if let Some(entry) = view.state.vdis.get(&vdi.get()) {
        for index in 0..entry.vm_state_bytes.div_ceil(entry.object_bytes()) {
            inode::drop_object(data, Oid::vmstate(vdi, index as u32)).await?;
        }
    }
    inode::drop_object(data, Oid::inode(vdi)).await?;
    Ok(())
}

/// Removes copies that the placement of an epoch that ended clean does not put here: all who must have them do.
pub async fn drop_strays(data: Data, epoch: Epoch) {
    let Some(holder) = data.holder() else { return };
    let last = Version { epoch, stamp: Stamp { generation: u32::MAX, sequence: u64::MAX } };
    let mut after = None;
    let mut dropped = 0;
    loop {
        let entries = holder.store().entries(after, 1024);
        let Some((end, _)) = entries.last() else { break };
        after = Some(*end);
        for (oid, _) in entries {
            let view = data.view();
            if view.epoch() != epoch || view.state.clean != epoch {
                return;
            }
            let stray = view.locate(oid).is_some_and(|at| !view.holders(&at).contains(&data.node()));
            if stray {
                dropped += 1;
                if let Err(error) = holder.store().remove(oid, last).await {
                    tracing::warn!("cannot remove a copy that belongs elsewhere: {error}");
                    return;
                }
            }
        }
    }
    if dropped > 0 {
        tracing::info!("removed {dropped} copies that epoch {epoch} puts on other nodes");
    }
}
