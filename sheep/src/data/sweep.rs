//! Looks through this node's copies after a change of members, once everybody has everything: removes copies that belong on
//! other nodes, and objects that nothing refers to.
//!
//! An object is made before the map names it, and goes after the map stopped naming it. A gateway that dies in between leaves
//! an object that nothing refers to; one that died while it gave space back leaves what it had not come to. A client that goes
//! away between the two (QEMU makes objects itself) leaves one too, and so does one whose volume is deleted meanwhile, because
//! what is reclaimed is what the map names: therefore a deleted VDI is looked at once more when it has been reclaimed, and all of
//! them now and then.
//!
//! Always holds:
//! 1. An object of a volume that can be written is removed only under that volume's lease, if it was written under an earlier
//!    one or has not changed for `GRACE`: what a gateway is making now is left alone.
//! 2. A client that makes objects itself (QEMU) has `GRACE` to name them; after that its map write is refused
//!    (`inode::write_map`), so that it does not take for written what is gone.
//! 3. A VDI that could not be looked at is looked at again, until it could or the epoch is over. The next one begins anew.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use qemu_proto::oid::{ObjectKind, Oid, VdiId};
use sheep_core::stamp::{Epoch, Stamp};

use super::Data;
use super::holder::Holder;
use super::inode::{self, InodeError};
use super::reclaim;
use super::view::View;
use crate::world::marks::{self, Mark};

/// See invariant 2: much longer than a client takes to connect to another node.
const GRACE: Duration = Duration::from_secs(20);
/// How often everything is looked at while the members stay the same: a map is read for each VDI.
const ALL_INTERVAL: Duration = Duration::from_hours(1);
/// Copies that are looked at in one go.
const BATCH: usize = 1024;

/// VDIs to look at once more, with objects that their maps did not name although they may be about to: by index, as of when.
#[derive(Default)]
struct Left(BTreeMap<VdiId, BTreeMap<u32, Stamp>>);

/// Does all of it for an epoch that ended clean, and stops when that is over.
pub async fn run(data: Data, epoch: Epoch) {
    let Some(holder) = data.holder() else { return };
    drop_strays(&data, epoch).await;
    let clock = data.world().clock.clone();
    clock.sleep(GRACE).await;
    let mut left = Left::default();
    let mut all_at = clock.monotonic();
    let mut left_at = all_at;
    while !is_over(&data.view(), epoch) {
        let now = clock.monotonic();
        let mut due = data.take_reclaimed();
        if now >= all_at {
            due.clear();
            look_at_all(&data, holder, epoch, &mut left).await;
            all_at = clock.monotonic() + ALL_INTERVAL;
            left_at = clock.monotonic() + GRACE;
        } else if now >= left_at {
            due.extend(left.0.keys());
            left_at = now + GRACE;
        }
        for vdi in due {
            let seen = left.0.remove(&vdi).unwrap_or_default();
            look_and_note(&data, holder, vdi, held_of(&data, holder, vdi), &seen, &mut left).await;
        }
        let next_at = if left.0.is_empty() { all_at } else { all_at.min(left_at) };
        tokio::select! {
            () = data.await_view(|view| is_over(view, epoch)) => {}
            () = data.await_reclaimed() => {}
            () = clock.sleep(next_at.saturating_sub(clock.monotonic())) => {}
        }
    }
}

fn is_over(view: &View, epoch: Epoch) -> bool {
    view.epoch() != epoch || view.state.clean != epoch || !view.state.is_running()
}

/// Removes copies that the placement of an epoch that ended clean does not put here: all who must have them do.
async fn drop_strays(data: &Data, epoch: Epoch) {
    let Some(holder) = data.holder() else { return };
    let mut after = None;
    let mut dropped = 0;
    loop {
        let entries = holder.store().entries(after, BATCH);
        let Some((end, _)) = entries.last() else { break };
        after = Some(*end);
        for (oid, _) in entries {
            if is_over(&data.view(), epoch) {
                return;
            }
            if let Some(removal) = holder.remove_stray(oid, epoch) {
                dropped += 1;
                if let Err(error) = removal.await {
                    tracing::warn!("cannot remove a copy that belongs elsewhere: {error}");
                    return;
                }
            }
        }
    }
    if dropped > 0 {
        marks::hit(Mark::StrayRemoved);
        tracing::info!("removed {dropped} copies that epoch {epoch} puts on other nodes");
    }
}

/// What one VDI has here.
#[derive(Default)]
struct Held {
    /// Indexes of data objects.
    data: BTreeSet<u32>,
    /// Machine state and the inode.
    others: Vec<Oid>,
}

impl Held {
    fn add(&mut self, oid: Oid) {
        match oid.kind() {
            Some(ObjectKind::Data) => drop(self.data.insert(oid.index())),
            Some(ObjectKind::Vmstate | ObjectKind::Inode) => self.others.push(oid),
            _ => {}
        }
    }
}

/// Every holder looks at what it has. One alone would not see what only another has: an object that was removed while a node was
/// away can come back there alone, when those who know of the removal hold it no longer.
fn is_held(data: &Data, view: &View, oid: Oid) -> bool {
    view.locate(oid).is_some_and(|at| view.holders(&at).contains(&data.node()))
}

fn held_of(data: &Data, holder: &Holder, vdi: VdiId) -> Held {
    let view = data.view();
    let mut held = Held::default();
    for (first, last) in [Oid::data(vdi, 0), Oid::vmstate(vdi, 0), Oid::inode(vdi)]
        .map(|oid| (oid.raw(), oid.raw() | u64::from(u32::MAX)))
    {
        let mut after = Some(Oid::from_raw(first - 1));
        'kind: loop {
            let entries = holder.store().entries(after, BATCH);
            let Some((end, _)) = entries.last() else { break };
            after = Some(*end);
            for (oid, _) in entries {
                if oid.raw() > last {
                    break 'kind;
                }
                if is_held(data, &view, oid) {
                    held.add(oid);
                }
            }
        }
    }
    held
}

async fn look_at_all(data: &Data, holder: &Holder, epoch: Epoch, left: &mut Left) {
    let mut after = None;
    loop {
        let entries = holder.store().entries(after, BATCH);
        let Some((end, _)) = entries.last() else { return };
        after = Some(*end);
        let view = data.view();
        let mut held: BTreeMap<VdiId, Held> = BTreeMap::new();
        for (oid, _) in entries.into_iter().filter(|(oid, _)| is_held(data, &view, *oid)) {
            held.entry(oid.vid()).or_default().add(oid);
        }
        for (vdi, held) in held {
            if is_over(&data.view(), epoch) {
                return;
            }
            look_and_note(data, holder, vdi, held, &BTreeMap::new(), left).await;
        }
    }
}

/// Invariant 3.
async fn look_and_note(
    data: &Data,
    holder: &Holder,
    vdi: VdiId,
    held: Held,
    seen: &BTreeMap<u32, Stamp>,
    left: &mut Left,
) {
    match look_at(data, holder, vdi, held, seen).await {
        Ok(young) if young.is_empty() => {}
        Ok(young) => left.0.entry(vdi).or_default().extend(young),
        Err(error) => {
            tracing::debug!("cannot look for objects of VDI {vdi} that nothing refers to, yet: {error}");
            left.0.entry(vdi).or_default().extend(seen);
        }
    }
}

/// Removes what nothing refers to of what one VDI has here. Gives objects that may be about to be named, with their stamps;
/// those that were `seen` before with the same are not.
async fn look_at(
    data: &Data,
    holder: &Holder,
    id: VdiId,
    held: Held,
    seen: &BTreeMap<u32, Stamp>,
) -> Result<BTreeMap<u32, Stamp>, InodeError> {
    let view = data.view();
    let mut young = BTreeMap::new();
    let Some(vdi) = view.state.vdis.get(&id.get()) else { return Ok(young) };
    if vdi.deleted {
        // What is to be reclaimed still needs its map; it is looked at when it has been.
        if !view.state.to_reclaim.contains(&id.get()) {
            if !held.data.is_empty() {
                reclaim::drop_unreferenced(data, BTreeMap::from([(id, held.data)])).await?;
            }
            for oid in held.others {
                inode::drop_object(data, oid).await?;
            }
        }
        return Ok(young);
    }
    if held.data.is_empty() {
        return Ok(young);
    }
    // Only what was given up can have taken a map with it: what it named is all there is left of the volume then.
    if view.state.forgiven > Epoch(0) && !inode::is_made(data, id).await? {
        tracing::warn!("VDI {id} has objects and no map: they are kept");
        return Ok(young);
    }
    let map = inode::whole_map(data, id).await?;
    for index in held.data {
        if map.get(index as usize) == Some(&id.get()) {
            continue;
        }
        let oid = Oid::data(id, index);
        let Some(entry) = holder.store().entry(oid) else { continue };
        let stamp = entry.version.stamp;
        let is_old = seen.get(&index) == Some(&stamp) || !inode::may_be_named(data, id, stamp.generation);
        if is_old && inode::drop_orphan(data, oid, stamp).await? {
            marks::hit(Mark::OrphanRemoved);
            tracing::info!("removed object {oid}, which nothing refers to");
        } else {
            young.insert(index, stamp);
        }
    }
    Ok(young)
}
