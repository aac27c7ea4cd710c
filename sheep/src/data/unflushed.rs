//! Writes of this gateway that were acknowledged before they were durable, until a flush covers them.
//!
//! Such a write is in the memory of all its holders. If every one of them dies before it wrote it to its journal, it is
//! gone, and the next flush must say so. Always holds:
//! 1. For every object with an acknowledged write that no flush has covered, the stamp of the last one is noted here.
//! 2. A flush succeeds only if each of those stamps is still in a copy that counts, or cannot have been lost because fewer
//!    storing processes ended meanwhile than had the write.
//! 3. A later write hides what was lost under it, so its holders say what stamp it was laid over: none below that of a noted
//!    write before it. (Across generations of the lease this says nothing.)
//! 4. What is lost is told to one flush of its volume, as `fsync(2)` does.
//! 5. A note keeps the epoch in which its last write was acknowledged: in a later one that has nobody who had everything from its
//!    beginning, some holders may not have the write yet, and a flush waits until they do (`flush.rs`).
//!
//! Writes that came through another gateway are that one's to note.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

use qemu_proto::oid::{Oid, VdiId};
use sheep_core::cluster_state::ClusterState;
use sheep_core::peer_message::{FLAG_DURABLE, PeerKind, PeerRequest};
use sheep_core::stamp::{Epoch, Stamp};

/// Objects noted, of all volumes, before the gateway flushes by itself: some 4 MiB of notes.
const OBJECTS_MAX: usize = 65_536;

/// The notes of one gateway.
#[derive(Default)]
pub struct Unflushed {
    table: Mutex<Table>,
    /// Storing processes that were seen to end, or to be taken for ended, since this one began.
    ended: AtomicU64,
    /// Whether the gateway flushes by itself just now.
    pub flushing: AtomicBool,
}

#[derive(Default)]
struct Table {
    /// Of the last note.
    number: u64,
    objects: usize,
    volumes: HashMap<VdiId, Notes>,
}

#[derive(Default)]
struct Notes {
    objects: HashMap<Oid, Note>,
    /// Fewest holders that any of them had.
    fewest: usize,
    /// `Unflushed::ended` when the first of them was noted.
    ended_before: u64,
    /// None of them is of an earlier epoch.
    first_epoch: Epoch,
    /// A write is gone, and no flush has told.
    lost: bool,
}

/// The last acknowledged write to an object that is not known to be durable.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Note {
    /// Its place in the order of all.
    pub stamp: Stamp,
    /// Whether it removed the object.
    pub removal: bool,
    /// In which it was acknowledged.
    epoch: Epoch,
    /// Its place in the order of acknowledgements.
    number: u64,
    /// That of the first write to the object that no flush has covered: a flush that began before `number` may have to cover it.
    first: u64,
}

/// Up to which note a flush covers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Through(u64);

impl Unflushed {
    fn table(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A write is about to be acknowledged, with so many holders that have it in a copy that counts. True if so many objects
    /// are noted that it is time to flush.
    pub fn acknowledged(&self, request: &PeerRequest, holders: usize) -> bool {
        let mut table = self.table();
        let table = &mut *table;
        let (oid, vdi) = (request.oid, request.oid.vid());
        if request.has(FLAG_DURABLE) {
            // In every holder's journal it comes after all earlier ones to the same object. A later one may have been quicker.
            if let Some(notes) = table.volumes.get_mut(&vdi)
                && notes.objects.get(&oid).is_some_and(|note| note.stamp < request.stamp)
            {
                notes.objects.remove(&oid);
                table.objects -= 1;
            }
            return false;
        }
        table.number += 1;
        let notes = table.volumes.entry(vdi).or_default();
        if notes.objects.is_empty() {
            (notes.fewest, notes.ended_before) = (holders, self.ended.load(Ordering::Relaxed));
            notes.first_epoch = request.epoch;
        }
        notes.fewest = notes.fewest.min(holders);
        notes.first_epoch = notes.first_epoch.min(request.epoch);
        let removal = request.kind == PeerKind::Remove;
        let (epoch, number) = (request.epoch, table.number);
        let note = Note { stamp: request.stamp, removal, epoch, number, first: number };
        match notes.objects.entry(oid) {
            std::collections::hash_map::Entry::Occupied(mut known) => {
                // Acknowledgements of writes to different parts need not come in the order of the stamps.
                let last = known.get_mut();
                let newest = if last.stamp > note.stamp { *last } else { note };
                *last = Note { epoch: last.epoch.max(epoch), number, first: last.first, ..newest };
            }
            std::collections::hash_map::Entry::Vacant(new) => {
                new.insert(note);
                table.objects += 1;
            }
        }
        table.objects > OBJECTS_MAX
    }

    /// The stamp of the last noted write that a write to the same object comes after.
    pub fn last_before(&self, request: &PeerRequest) -> Stamp {
        let table = self.table();
        let noted = table.volumes.get(&request.oid.vid()).and_then(|notes| notes.objects.get(&request.oid));
        noted.map(|note| note.stamp).filter(|stamp| *stamp < request.stamp).unwrap_or_default()
    }

    /// A holder wrote to an object without having had a noted write to it.
    pub fn lost(&self, oid: Oid) {
        tracing::error!("acknowledged writes to object {oid} are lost: all its holders died before a flush");
        self.table().volumes.entry(oid.vid()).or_default().lost = true;
    }

    /// The members changed.
    pub fn follow(&self, before: &ClusterState, now: &ClusterState) {
        if before.cluster_id != now.cluster_id {
            *self.table() = Table::default();
            return;
        }
        let storing = before.members.iter().filter(|(_, member)| !member.member.is_gateway());
        let ended = storing
            .filter(|(id, member)| now.members.get(id).is_none_or(|same| same.member.boot != member.member.boot));
        self.ended.fetch_add(ended.count() as u64, Ordering::Relaxed);
    }

    /// A flush begins.
    pub fn begin(&self) -> Through {
        Through(self.table().number)
    }

    /// Objects of the volumes that `of` picks that may have been lost with their holders, of all that a flush covers.
    pub fn endangered(&self, through: Through, of: impl Fn(VdiId) -> bool) -> Vec<(Oid, Note)> {
        let table = self.table();
        let ended = self.ended.load(Ordering::Relaxed);
        let in_danger = |notes: &Notes| ended - notes.ended_before >= notes.fewest.max(1) as u64;
        let volumes = table.volumes.iter().filter(|(vdi, notes)| in_danger(notes) && of(**vdi));
        let objects = volumes.flat_map(|(_, notes)| notes.objects.iter());
        objects.filter(|(_, note)| note.first <= through.0).map(|(oid, note)| (*oid, *note)).collect()
    }

    /// Objects of the volumes that `of` picks whose last write was acknowledged before `epoch`, of all that a flush covers.
    pub fn acknowledged_before(&self, epoch: Epoch, through: Through, of: impl Fn(VdiId) -> bool) -> Vec<Oid> {
        let table = self.table();
        let old = table.volumes.iter().filter(|(vdi, notes)| notes.first_epoch < epoch && of(**vdi));
        let objects = old.flat_map(|(_, notes)| notes.objects.iter());
        objects.filter(|(_, note)| note.first <= through.0 && note.epoch < epoch).map(|(oid, _)| *oid).collect()
    }

    /// What volumes that `of` picks wrote up to `through`, and what others wrote from `epoch` on, is durable on all holders, or
    /// known to be lost. Gives whether anything was lost of the volumes that `told` picks, which then has been told.
    pub fn end(
        &self,
        through: Through,
        epoch: Epoch,
        of: impl Fn(VdiId) -> bool,
        told: impl Fn(VdiId) -> bool,
    ) -> bool {
        let mut table = self.table();
        let mut told_any = false;
        table.volumes.retain(|vdi, notes| {
            let is_of = of(*vdi);
            notes.objects.retain(|_, note| note.number > through.0 || (note.epoch < epoch && !is_of));
            notes.first_epoch = notes.objects.values().map(|note| note.epoch).min().unwrap_or(epoch);
            if notes.lost && told(*vdi) {
                notes.lost = false;
                told_any = true;
            }
            notes.lost || !notes.objects.is_empty()
        });
        table.objects = table.volumes.values().map(|notes| notes.objects.len()).sum();
        told_any
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheep_core::command::Command;
    use sheep_core::level::Level;
    use sheep_core::member::{Member, NodeId};

    fn vdi(id: u32) -> VdiId {
        VdiId::new(id).unwrap()
    }

    fn write(vdi_id: u32, index: u32, sequence: u64, flags: u8) -> PeerRequest {
        let mut request = PeerRequest::new(PeerKind::Write, Epoch(1), NodeId(1));
        request.oid = Oid::data(vdi(vdi_id), index);
        request.stamp = Stamp { generation: 1, sequence };
        request.flags = flags;
        request
    }

    fn ended(unflushed: &Unflushed, count: u64) {
        unflushed.ended.fetch_add(count, Ordering::Relaxed);
    }

    #[test]
    fn only_as_many_ends_as_holders_endanger_a_write() {
        let unflushed = Unflushed::default();
        ended(&unflushed, 5);
        unflushed.acknowledged(&write(1, 0, 1, 0), 2);
        ended(&unflushed, 1);
        assert!(unflushed.endangered(unflushed.begin(), |_| true).is_empty());
        ended(&unflushed, 1);
        let through = unflushed.begin();
        unflushed.acknowledged(&write(1, 1, 2, 0), 2);
        assert!(unflushed.endangered(through, |id| id == vdi(2)).is_empty(), "another volume's");
        let endangered = unflushed.endangered(through, |_| true);
        assert_eq!(endangered.len(), 1, "what came after the flush began is the next one's");
        assert_eq!(endangered[0].1.stamp.sequence, 1);
        assert!(!unflushed.end(through, Epoch(1), |_| true, |_| true));
        assert_eq!(unflushed.endangered(unflushed.begin(), |_| true).len(), 1);
    }

    #[test]
    fn a_later_write_does_not_hide_an_earlier_one_from_its_flush() {
        let unflushed = Unflushed::default();
        unflushed.acknowledged(&write(1, 0, 1, 0), 1);
        let through = unflushed.begin();
        unflushed.acknowledged(&write(1, 0, 2, 0), 1);
        ended(&unflushed, 1);
        assert_eq!(unflushed.endangered(through, |_| true).len(), 1);
        assert_eq!(unflushed.acknowledged_before(Epoch(2), through, |_| true).len(), 1);
        unflushed.end(through, Epoch(2), |_| true, |_| true);
        assert_eq!(unflushed.endangered(unflushed.begin(), |_| true).len(), 1, "the later one is the next one's");
    }

    #[test]
    fn a_durable_write_covers_what_came_before_it() {
        let unflushed = Unflushed::default();
        unflushed.acknowledged(&write(1, 0, 1, 0), 1);
        unflushed.acknowledged(&write(1, 0, 2, FLAG_DURABLE), 1);
        ended(&unflushed, 3);
        assert!(unflushed.endangered(unflushed.begin(), |_| true).is_empty());
        unflushed.acknowledged(&write(1, 0, 4, 0), 1);
        unflushed.acknowledged(&write(1, 0, 3, FLAG_DURABLE), 1);
        ended(&unflushed, 1);
        assert_eq!(unflushed.endangered(unflushed.begin(), |_| true).len(), 1, "nor what comes after it");
    }

    #[test]
    fn the_highest_stamp_is_kept_whatever_the_order_of_answers() {
        let unflushed = Unflushed::default();
        unflushed.acknowledged(&write(1, 0, 7, 0), 3);
        unflushed.acknowledged(&write(1, 0, 5, 0), 1);
        ended(&unflushed, 1);
        let endangered = unflushed.endangered(unflushed.begin(), |_| true);
        assert_eq!(endangered[0].1.stamp.sequence, 7);
    }

    #[test]
    fn a_loss_is_told_once_and_to_its_own_volume() {
        let unflushed = Unflushed::default();
        unflushed.acknowledged(&write(1, 0, 1, 0), 1);
        unflushed.acknowledged(&write(2, 0, 1, 0), 1);
        ended(&unflushed, 1);
        let through = unflushed.begin();
        unflushed.lost(write(1, 0, 1, 0).oid);
        assert!(!unflushed.end(through, Epoch(1), |_| true, |id| id == vdi(2)));
        assert!(unflushed.end(through, Epoch(1), |_| true, |id| id == vdi(1)));
        assert!(!unflushed.end(through, Epoch(1), |_| true, |id| id == vdi(1)));
    }

    #[test]
    fn a_write_comes_after_those_noted_below_it() {
        let unflushed = Unflushed::default();
        assert_eq!(unflushed.last_before(&write(1, 0, 9, 0)), Stamp::default());
        unflushed.acknowledged(&write(1, 0, 5, 0), 3);
        assert_eq!(unflushed.last_before(&write(1, 0, 9, 0)).sequence, 5);
        assert_eq!(unflushed.last_before(&write(1, 0, 4, 0)), Stamp::default());
        assert_eq!(unflushed.last_before(&write(1, 1, 9, 0)), Stamp::default());
    }

    #[test]
    fn the_notes_are_bounded() {
        let unflushed = Unflushed::default();
        for index in 0..OBJECTS_MAX as u32 {
            assert!(!unflushed.acknowledged(&write(1, index, u64::from(index) + 1, 0), 1));
        }
        assert!(unflushed.acknowledged(&write(1, OBJECTS_MAX as u32, u64::MAX, 0), 1));
    }

    #[test]
    fn what_earlier_epochs_acknowledged_is_kept_until_its_own_volume_is_flushed() {
        let unflushed = Unflushed::default();
        let in_epoch = |epoch, vdi_id, index, sequence| {
            let request = PeerRequest { epoch: Epoch(epoch), ..write(vdi_id, index, sequence, 0) };
            unflushed.acknowledged(&request, 2);
        };
        let before = |epoch, vdi_id| {
            unflushed.acknowledged_before(Epoch(epoch), unflushed.begin(), |id| id == vdi(vdi_id)).len()
        };
        in_epoch(1, 1, 0, 1);
        in_epoch(1, 1, 1, 2);
        in_epoch(1, 2, 0, 1);
        assert_eq!((before(1, 1), before(2, 1)), (0, 2));
        // All holders of 2 have the object since then.
        in_epoch(2, 1, 0, 4);
        assert_eq!((before(2, 1), before(3, 1)), (1, 2));
        in_epoch(1, 1, 0, 3);
        assert_eq!(before(2, 1), 1, "an answer that came later says nothing of the time");
        let through = unflushed.begin();
        in_epoch(2, 1, 2, 5);
        assert_eq!(unflushed.acknowledged_before(Epoch(3), through, |_| true).len(), 3, "nor what came after it began");
        unflushed.end(through, Epoch(2), |id| id == vdi(1), |_| true);
        assert_eq!((before(3, 1), before(2, 2)), (1, 1));
        unflushed.end(unflushed.begin(), Epoch(2), |_| true, |_| true);
        assert_eq!((before(3, 1), before(3, 2)), (0, 0));
    }

    #[test]
    fn who_left_and_who_came_back_as_another_process_has_ended() {
        let member = |id: u64, boot: u64, weight: u64| Member {
            id: NodeId(id),
            address: [0; 16],
            port: 7000,
            peer_endpoint: String::new(),
            boot,
            zone: id as u32,
            weight,
            level: Level::OURS,
        };
        let state = |members: &[Member]| {
            let mut state = ClusterState::default();
            for member in members {
                state.apply(&Command::Join { member: member.clone(), time: 1 });
            }
            state
        };
        let before = state(&[member(1, 1, 1), member(2, 1, 1), member(3, 1, 1), member(4, 1, 0)]);
        let now = state(&[member(1, 1, 1), member(2, 2, 1)]);
        let unflushed = Unflushed::default();
        unflushed.follow(&before, &before);
        assert_eq!(unflushed.ended.load(Ordering::Relaxed), 0);
        unflushed.follow(&before, &now);
        assert_eq!(unflushed.ended.load(Ordering::Relaxed), 2, "a gateway keeps nothing that could be lost");
    }
}
