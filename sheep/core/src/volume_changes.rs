//! Changes of volumes that are more than making and deleting: groups of snapshots, other names, independence of the parent,
//! smaller sizes, limits.
//!
//! Always holds:
//! 1. A group of snapshots is made whole or not at all.
//! 2. A name means one volume: its working VDI and its snapshots change their name together, and only to one that is free.

use alloc::sync::Arc;
use alloc::vec::Vec;
use qemu_proto::oid::VdiId;

use crate::cluster_state::ClusterState;
use crate::command::{NewVdi, Outcome, Refusal};
use crate::limits::Limits;
use crate::member::NodeId;
use crate::vdi::Vdi;
use crate::vdi_name::{self, Target};

/// Volumes of one group: all of their writers stand still while it is made.
pub const GROUP_MAX: usize = 64;

fn outcome(result: Result<(), Refusal>) -> Outcome {
    result.map_or_else(Outcome::Refused, |()| Outcome::Done)
}

impl ClusterState {
    pub(crate) fn snapshot_together(&mut self, members: &[NewVdi], tag: &[u8]) -> Outcome {
        // The copy shares every VDI; what is refused in the middle leaves no trace.
        let mut next = self.clone();
        let result = next.snapshot_each(members, tag);
        if result.is_ok() {
            *self = next;
        }
        outcome(result)
    }

    fn snapshot_each(&mut self, members: &[NewVdi], tag: &[u8]) -> Result<(), Refusal> {
        if members.is_empty() || members.len() > GROUP_MAX || vdi_name::check_tag(tag).is_err() {
            return Err(Refusal::InvalidParameters);
        }
        for member in members {
            let current = self.lookup(&member.name, Target::Current)?;
            if !tag.is_empty() && self.lookup(&member.name, Target::new(tag, 0)).is_ok() {
                return Err(Refusal::VdiExists);
            }
            if member.base != Some(current) || !member.snapshot {
                // Somebody was faster: there is another working VDI now.
                return Err(Refusal::LeaseLost);
            }
            self.new_vdi(member)?;
            if let Some(vdi) = self.vdis.get_mut(&current.get()) {
                Arc::make_mut(vdi).tag = tag.to_vec();
            }
        }
        Ok(())
    }

    pub(crate) fn rename_vdi(&mut self, name: &[u8], to: &[u8]) -> Outcome {
        outcome(self.try_rename(name, to))
    }

    fn try_rename(&mut self, name: &[u8], to: &[u8]) -> Result<(), Refusal> {
        self.require_running()?;
        vdi_name::check_name(to).map_err(|_| Refusal::InvalidParameters)?;
        let live = |name: &[u8]| -> Vec<u32> {
            let named = self.vdis.values().filter(|vdi| !vdi.deleted && vdi.name == name);
            named.map(|vdi| vdi.id.get()).collect()
        };
        let ids = live(name);
        if ids.is_empty() {
            return Err(Refusal::NoVdi);
        }
        if name == to || !live(to).is_empty() {
            return Err(Refusal::VdiExists);
        }
        // Deleted ones too: a connection that was idle since finds the volume by them.
        for vdi in self.vdis.values_mut().filter(|vdi| vdi.name == name) {
            Arc::make_mut(vdi).name = to.to_vec();
        }
        self.renamed.remove(name);
        self.renamed.insert(to.to_vec(), ids.into_iter().collect());
        if let Some(lock) = self.locks.remove(name) {
            self.locks.insert(to.to_vec(), lock);
        }
        if let Some(limits) = self.limits.remove(name) {
            self.limits.insert(to.to_vec(), limits);
        }
        Ok(())
    }

    /// VDIs that were given a name later, the newest first.
    pub(crate) fn given_name(&self, name: &[u8]) -> impl Iterator<Item = &Arc<Vdi>> + use<'_> {
        let ids = self.renamed.get(name).into_iter().flatten();
        let mut vdis: Vec<&Arc<Vdi>> = ids.filter_map(|id| self.vdis.get(id)).collect();
        vdis.sort_by_key(|vdi| core::cmp::Reverse(vdi.snapshot_id));
        vdis.into_iter()
    }

    pub(crate) fn detach_vdi(&mut self, id: VdiId, drained: (NodeId, u32)) -> Outcome {
        outcome(self.try_detach(id, drained))
    }

    fn try_detach(&mut self, id: VdiId, drained: (NodeId, u32)) -> Result<(), Refusal> {
        self.require_running()?;
        let vdi = self.live_vdi(id).ok_or(Refusal::NoVdi)?;
        if vdi.is_snapshot() || vdi.is_being_restored() {
            return Err(Refusal::ReadOnly);
        }
        self.require_drained(id, Some(drained))?;
        if let Some(vdi) = self.vdis.get_mut(&id.get()) {
            Arc::make_mut(vdi).parent = None;
        }
        Ok(())
    }

    pub(crate) fn shrink_vdi(&mut self, id: VdiId, drained: (NodeId, u32), size_bytes: u64) -> Outcome {
        outcome(self.try_shrink(id, drained, size_bytes))
    }

    fn try_shrink(&mut self, id: VdiId, drained: (NodeId, u32), size_bytes: u64) -> Result<(), Refusal> {
        self.require_running()?;
        let vdi = self.live_vdi(id).ok_or(Refusal::NoVdi)?;
        if vdi.is_snapshot() || vdi.is_being_restored() {
            return Err(Refusal::ReadOnly);
        }
        if size_bytes > vdi.size_bytes {
            return Err(Refusal::InvalidParameters);
        }
        self.require_drained(id, Some(drained))?;
        if let Some(vdi) = self.vdis.get_mut(&id.get()) {
            Arc::make_mut(vdi).size_bytes = size_bytes;
        }
        Ok(())
    }

    pub(crate) fn limit_vdi(&mut self, name: &[u8], limits: Option<Limits>) -> Outcome {
        outcome(self.try_limit(name, limits))
    }

    fn try_limit(&mut self, name: &[u8], limits: Option<Limits>) -> Result<(), Refusal> {
        self.require_running()?;
        self.lookup(name, Target::Current)?;
        match limits.filter(|limits| !limits.is_none()) {
            Some(limits) => drop(self.limits.insert(name.to_vec(), limits)),
            None => drop(self.limits.remove(name)),
        }
        Ok(())
    }

    /// Of a volume of which nothing is left: another one of its name begins without. A rollback, which deletes the working
    /// VDI, leaves the snapshot.
    pub(crate) fn forget_limits(&mut self, name: &[u8]) {
        if self.limits.contains_key(name) && !self.vdis.values().any(|vdi| !vdi.deleted && vdi.name == name) {
            self.limits.remove(name);
        }
    }
}
