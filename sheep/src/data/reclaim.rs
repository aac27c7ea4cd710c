//! Gives back the space of deleted VDIs.
//!
//! No reference counts: maps say what is referred to. A VDI begins with its parent's map, and an entry of it only ever becomes
//! its own object or a hole; so an object can be named by its owner and by what descends from it, and where one of those does
//! not name it, nothing that descends from there does. Whether an object of a deleted VDI is still needed is therefore known
//! from the first VDIs that are not deleted on every way down from it, its referrers.
//!
//! What may have become free is looked at when a VDI is deleted (everything that its map names), when an entry of a map
//! stops naming another VDI's object (`Data::note_released`), and, for what a crash left in between, by `sweep`. Doing it twice does no harm, so a node that dies in the middle is simply followed by another one.
//!
//! Always holds:
//! 1. A map is only believed if its VDI was not deleted by the time it had been read: those of deleted VDIs go away.
//! 2. A deleted VDI's own map goes last, and not before its referrers have maps of their own.

use std::collections::{BTreeMap, BTreeSet};

use qemu_proto::oid::{Oid, VdiId};
use sheep_core::command::Command;
use sheep_core::vdi::Vdi;
use tokio::task::JoinSet;

use super::Data;
use super::gateway::{WriteError, lease_table};
use super::inode::{self, InodeError};
use super::view::View;
use crate::world::marks::{self, Mark};
use crate::world::planted::{self, Bug};

/// Removals under way at once: enough to fill a group commit of each holder, few enough to leave guests their turn.
const REMOVALS_AT_ONCE: usize = 16;

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
        let mut after = 0;
        // One that fails does not keep the others from their turn; `watch_space` begins with it again.
        while let Some(next) = data.view().state.to_reclaim.range(after..).next().copied() {
            let Some(vdi) = VdiId::new(next) else { return };
            after = next + 1;
            if let Err(error) = reclaim(&data, vdi).await {
                tracing::warn!("cannot give back the space of VDI {vdi} yet: {error}");
                continue;
            }
            match data.cluster().propose(Command::Reclaimed { vdi }).await {
                Ok(_) => data.settle_in().await,
                Err(error) => tracing::warn!("cannot note that VDI {vdi} is reclaimed: {error}"),
            }
        }
    });
}

/// Looks at what was noted: objects of VDIs that are deleted may be free now. Those of others are looked at when they are.
pub async fn release_noted(data: &Data) {
    let noted = data.take_released();
    if noted.is_empty() {
        return;
    }
    // Whose owner is deleted after this is looked at when that is reclaimed, by whoever reads the map that was written before
    // the note; so none must be dropped here that was deleted before.
    if settle(data).await.is_err() {
        for oid in noted {
            data.note_released(oid);
        }
        return;
    }
    let view = data.view();
    let mut by_owner: BTreeMap<VdiId, BTreeSet<u32>> = BTreeMap::new();
    for oid in noted.into_iter().filter(|oid| is_deleted(&view, oid.vid())) {
        by_owner.entry(oid.vid()).or_default().insert(oid.index());
    }
    if by_owner.is_empty() {
        return;
    }
    if let Err(error) = drop_unreferenced(data, by_owner.clone()).await {
        tracing::warn!("cannot give back overwritten objects of deleted VDIs yet: {error}");
        for (owner, indexes) in by_owner {
            for index in indexes {
                data.note_released(Oid::data(owner, index));
            }
        }
    }
}

fn is_deleted(view: &View, vdi: VdiId) -> bool {
    view.state.vdis.get(&vdi.get()).is_some_and(|vdi| vdi.deleted)
}

/// The children of every VDI, deleted or not.
struct Children(BTreeMap<VdiId, Vec<VdiId>>);

impl Children {
    fn of(view: &View) -> Children {
        let mut children: BTreeMap<VdiId, Vec<VdiId>> = BTreeMap::new();
        let has_parent = |vdi: &std::sync::Arc<Vdi>| Some((vdi.parent?, vdi.id));
        for (parent, child) in view.state.vdis.values().filter_map(has_parent) {
            children.entry(parent).or_default().push(child);
        }
        Children(children)
    }

    /// The first VDIs that are not deleted on every way down from a deleted one.
    fn referrers(&self, view: &View, deleted: VdiId) -> Vec<VdiId> {
        let mut found = Vec::new();
        let mut todo = vec![deleted];
        while let Some(next) = todo.pop() {
            for child in self.0.get(&next).into_iter().flatten() {
                if is_deleted(view, *child) {
                    todo.push(*child);
                } else {
                    found.push(*child);
                }
            }
        }
        found
    }
}

async fn reclaim(data: &Data, vdi: VdiId) -> Result<(), InodeError> {
    // Whoever was about to name an object that it made has done so when the lease is here, and nobody can any more: taking it
    // comes to everything that was ordered before.
    lease_table::acquire(data, vdi).await?;
    settle(data).await?;
    let view = data.view();
    for referrer in Children::of(&view).referrers(&view, vdi) {
        match inode::materialise(data, referrer).await {
            // Deleted meanwhile; what comes below it is found when that is reclaimed.
            Err(_) if is_deleted(&data.view(), referrer) => return Box::pin(reclaim(data, vdi)).await,
            other => other?,
        }
    }
    let mut by_owner: BTreeMap<VdiId, BTreeSet<u32>> = BTreeMap::new();
    for (index, owner) in inode::whole_map(data, vdi).await?.into_iter().enumerate() {
        if let Some(owner) = VdiId::new(owner).filter(|owner| is_deleted(&view, *owner)) {
            by_owner.entry(owner).or_default().insert(index as u32);
        }
    }
    drop_unreferenced(data, by_owner).await?;
    if let Some(entry) = view.state.vdis.get(&vdi.get()) {
        let count = entry.vm_state_bytes.div_ceil(entry.object_bytes());
        drop_all(data, (0..count).map(|index| Oid::vmstate(vdi, index as u32))).await?;
    }
    inode::drop_object(data, Oid::inode(vdi)).await?;
    marks::hit(Mark::Reclaimed);
    Ok(())
}

/// Comes to everything that was ordered before.
async fn settle(data: &Data) -> Result<(), InodeError> {
    match data.cluster().barrier().await {
        Ok(state) => {
            data.await_applied(state.applied).await;
            Ok(())
        }
        Err(error) => {
            tracing::debug!("cannot learn what was ordered: {error}");
            Err(WriteError::Order.into())
        }
    }
}

/// Removes those of these objects of deleted VDIs that nothing refers to any more.
pub async fn drop_unreferenced(data: &Data, mut by_owner: BTreeMap<VdiId, BTreeSet<u32>>) -> Result<(), InodeError> {
    loop {
        settle(data).await?;
        let view = data.view();
        let children = Children::of(&view);
        let mut maps: BTreeMap<VdiId, Vec<u32>> = BTreeMap::new();
        for (owner, indexes) in &mut by_owner {
            for referrer in children.referrers(&view, *owner) {
                if let std::collections::btree_map::Entry::Vacant(place) = maps.entry(referrer) {
                    place.insert(inode::whole_map(data, referrer).await?);
                }
                let map = &maps[&referrer];
                indexes.retain(|index| map.get(*index as usize) != Some(&owner.get()));
            }
        }
        by_owner.retain(|_, indexes| !indexes.is_empty());
        settle(data).await?;
        // Invariant 1.
        let now = data.view();
        if !maps.keys().any(|referrer| is_deleted(&now, *referrer)) {
            break;
        }
    }
    let garbage =
        by_owner.into_iter().flat_map(|(owner, indexes)| indexes.into_iter().map(move |index| Oid::data(owner, index)));
    drop_all(data, garbage).await
}

/// Removes objects, some side by side.
async fn drop_all(data: &Data, oids: impl IntoIterator<Item = Oid>) -> Result<(), InodeError> {
    if planted::is(Bug::KeptGarbage) {
        return Ok(());
    }
    let mut removals = JoinSet::new();
    let ended = |result: Result<Result<(), WriteError>, tokio::task::JoinError>| {
        result.map_err(|_| WriteError::Failed).and_then(|result| result)
    };
    for oid in oids {
        while removals.len() >= REMOVALS_AT_ONCE {
            if let Some(result) = removals.join_next().await {
                ended(result)?;
            }
        }
        let data = data.clone();
        removals.spawn(async move { inode::drop_object(&data, oid).await });
    }
    while let Some(result) = removals.join_next().await {
        ended(result)?;
    }
    Ok(())
}
