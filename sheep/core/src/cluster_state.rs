//! The ordered state of a cluster: who is in, the epochs, the VDI table, the writer leases.
//!
//! One pure state machine. Every node applies the same commands in the same order and therefore holds the same state;
//! only the means of ordering differs (the drivers of `cluster`).
//!
//! Always holds:
//! 1. `apply` is total and deterministic: any command in any state gives a state and an outcome, the same everywhere.
//! 2. The epoch goes up by exactly one with every change after format of who holds what (members, weights, numbers of
//!    copies), and never otherwise; but by [`ERA_STRIDE`] when an operator goes on without the majority.
//! 3. `epochs` names every epoch from `clean` to the present one; each epoch since may have taken writes.
//! 4. A VDI's lease generation only goes up; at most one node holds it.
//! 5. Every member understands the level of the state.
//! 6. A name has at most one VDI that is neither deleted nor a snapshot nor being restored, and at most one that is being
//!    restored.

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::sync::Arc;
use alloc::vec::Vec;
use qemu_proto::oid::VdiId;
use serde::{Deserialize, Serialize};

use crate::admission::{Admission, ClusterKey, Fingerprint};
use crate::command::{Command, NewVdi, Outcome, Refusal, VdiEdit};
use crate::copies::Copies;
use crate::copy_policy::COPIES_MAX;
use crate::level::{self, Level};
use crate::limits::Limits;
use crate::member::{Member, NodeId};
use crate::ring::{ReferenceWeight, RingMember};
use crate::stamp::Epoch;
use crate::vdi::Vdi;
use crate::vdi_name::{self, Candidate, LookupError, Run, Target};

/// Epochs older than the last clean one are kept only to be shown (`dog cluster info`), this many of them: a year of
/// daily restarts.
const EPOCHS_SHOWN_MAX: usize = 512;

/// Tokens that may be out at once: one for every machine that is being set up.
const TOKENS_MAX: usize = 1024;

/// What epochs and lease generations jump by when an operator goes on without the majority: if that lives after all, or had
/// ordered more than is known here, its numbers are none of those that come.
pub const ERA_STRIDE: u32 = 1 << 16;

/// Epochs that go on being shown then: the whole state has to fit into one command.
const EPOCHS_KEPT_FOR_ERA: usize = 32;

/// Copies and object size of volumes that do not say their own: the ancestor's defaults.
pub const DEFAULT_COPIES: u8 = 3;
/// log2 of 4 MiB.
pub const DEFAULT_OBJECT_SIZE_SHIFT: u8 = 22;
/// The cluster flag that `dog cluster format -l` sets (protocol.md section 2.4).
const LOCKS_ENFORCED: u16 = 0x0008;
/// The cluster flag that `dog cluster format -t` sets.
const STRICT: u16 = 0x0001;
/// The map of an inode has this many entries: the largest volume is this many objects.
pub const OBJECTS_MAX: u64 = 1 << 20;

/// What the operator chose at format.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Settings {
    /// Copies of a volume that does not say its own, and of attributes.
    pub copies: Copies,
    /// log2 of the object size of a volume that does not say its own.
    pub object_size_shift: u8,
    /// Cluster flags as on the wire (protocol.md section 2.4).
    pub flags: u16,
    /// The scale of the ring, chosen at format from the capacities of that moment and kept; `None` while no member stores
    /// anything.
    pub reference_weight: Option<ReferenceWeight>,
}

/// A member of one epoch.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EpochMember {
    /// The node.
    pub member: Member,
    /// The epoch at which this process came in: a node that crashed and came back is a new start even when nobody saw
    /// it gone.
    pub since: Epoch,
}

/// One epoch: who was in.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct EpochRecord {
    /// Its number.
    pub epoch: Epoch,
    /// A label.
    pub time: u64,
    /// By node id.
    pub members: BTreeMap<NodeId, EpochMember>,
    /// The scale of this epoch's ring.
    pub reference_weight: Option<ReferenceWeight>,
    /// Members that had everything in an earlier epoch, which is given, and stayed: of what they held ever since, they have
    /// every acknowledged write from the first moment of this epoch on.
    pub steady: BTreeMap<NodeId, Epoch>,
}

impl EpochRecord {
    /// The members as the ring sees them.
    pub fn ring_members(&self) -> Vec<RingMember> {
        ring_members(&self.members)
    }
}

fn ring_members(members: &BTreeMap<NodeId, EpochMember>) -> Vec<RingMember> {
    let members = members.values().map(|m| &m.member);
    members.map(|member| RingMember { id: member.id, zone: member.zone, weight: member.weight }).collect()
}

/// Who may write to a VDI.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lease {
    /// Nobody between a release (or a death) and the next acquisition.
    pub holder: Option<NodeId>,
    /// Of the present or the last holder.
    pub generation: u32,
}

/// A client's right to be the only one that has a volume open.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Lock {
    /// The node that the client is connected to: the lock ends when it is no member any more.
    pub node: NodeId,
    /// Tells one opening from another.
    pub token: u64,
}

/// Whether the cluster serves.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Phase {
    /// Before format.
    Unformatted,
    /// Serving.
    Running,
    /// Restarted after everybody stopped. Not serving, and no new epoch, until these members of the last epoch are back.
    Waiting {
        /// Who has to come back.
        missing: BTreeSet<NodeId>,
        /// Whether they were shut down together: then the last epoch simply goes on once all are back.
        orderly: bool,
    },
    /// Stopped by the operator.
    Shutdown,
}

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[serde(remote = "Self")]
pub struct ClusterState {
    /// What may be ordered; first, so that a version that does not understand the rest reads no further.
    #[serde(deserialize_with = "level::of_state")]
    pub level: Level,
    /// Commands applied since the beginning.
    pub applied: u64,
    /// Random, made at format; 0 before.
    pub cluster_id: u64,
    /// When it was formatted: a label, and the identity that old clients compare.
    pub created: u64,
    /// What was chosen at format.
    pub settings: Settings,
    /// Whether it serves.
    pub phase: Phase,
    /// The current members.
    pub members: BTreeMap<NodeId, EpochMember>,
    /// The current epoch; 0 before format.
    pub epoch: Epoch,
    /// Ascending; the last is the current one.
    pub epochs: Vec<Arc<EpochRecord>>,
    /// The last epoch that ended with every object at its newest version on every node that must hold it.
    pub clean: Epoch,
    /// The operator gave up what nodes that are missing may know of this epoch and those before it.
    pub forgiven: Epoch,
    /// Commands applied while the cluster ran: with the epoch, tells which of two memories is the later one.
    pub served: u64,
    /// Ids of the clusters that a format replaced: a store that remembers one of them starts over.
    pub replaced: BTreeSet<u64>,
    /// Members that have reported this for the current epoch.
    pub recovered: BTreeSet<NodeId>,
    /// Every VDI ever made, by id.
    pub vdis: BTreeMap<u32, Arc<Vdi>>,
    /// Deleted VDIs whose objects have not been reclaimed yet.
    pub to_reclaim: BTreeSet<u32>,
    /// By VDI id. Attribute objects have leases too, under the id in their object id.
    pub leases: BTreeMap<u32, Lease>,
    /// Generations up to this were, or may have been, given out for VDIs that `leases` does not name.
    pub generation_floor: u32,
    /// Who may come in.
    pub admission: Admission,
    /// Whether the order needs a majority (the default driver): then no write is acknowledged on one copy alone where there
    /// should be three.
    pub needs_majority: bool,
    /// The operator went on with one zone: then one copy has to do until there are two again.
    pub one_copy_will_do: bool,
    /// By name, because a snapshot or a rollback changes the id of a volume but not who has it open. Empty unless the cluster
    /// was formatted to enforce locks.
    pub locks: BTreeMap<Vec<u8>, Lock>,
    /// The operator wants copies left as they are for the time being, but for those that somebody waits for.
    pub recovery_held: bool,
    /// By name: VDIs that were given it later, and are therefore not where their name says. From `Level::VOLUME_CHANGES` on; see
    /// `state_form`.
    #[serde(skip)]
    pub renamed: BTreeMap<Vec<u8>, BTreeSet<u32>>,
    /// By name: how fast clients may use a volume. As `renamed`.
    #[serde(skip)]
    pub limits: BTreeMap<Vec<u8>, Limits>,
}

impl Default for ClusterState {
    fn default() -> Self {
        ClusterState {
            level: Level::FIRST,
            applied: 0,
            cluster_id: 0,
            created: 0,
            settings: Settings {
                copies: Copies::always(DEFAULT_COPIES),
                object_size_shift: DEFAULT_OBJECT_SIZE_SHIFT,
                flags: 0,
                reference_weight: None,
            },
            phase: Phase::Unformatted,
            members: BTreeMap::new(),
            epoch: Epoch(0),
            epochs: Vec::new(),
            clean: Epoch(0),
            forgiven: Epoch(0),
            served: 0,
            replaced: BTreeSet::new(),
            recovered: BTreeSet::new(),
            vdis: BTreeMap::new(),
            to_reclaim: BTreeSet::new(),
            leases: BTreeMap::new(),
            generation_floor: 0,
            admission: Admission::default(),
            needs_majority: false,
            one_copy_will_do: false,
            locks: BTreeMap::new(),
            recovery_held: false,
            renamed: BTreeMap::new(),
            limits: BTreeMap::new(),
        }
    }
}

impl ClusterState {
    /// Applies one command; see invariant 1.
    pub fn apply(&mut self, command: &Command) -> Outcome {
        self.applied += 1;
        self.served += u64::from(self.phase == Phase::Running);
        let outcome = match command {
            _ if command.level() > self.level => Outcome::Refused(Refusal::EarlierVersion),
            Command::RaiseLevel { level } => self.raise_level(*level),
            Command::Join { member, time } => self.join(member, *time),
            Command::Evict { nodes, time } => self.evict(nodes, *time),
            Command::Format { cluster_id, copies, object_size_shift, flags, time } => {
                let settings = Settings {
                    copies: Copies::always(*copies),
                    object_size_shift: *object_size_shift,
                    flags: *flags,
                    reference_weight: None,
                };
                self.format(*cluster_id, settings, *time)
            }
            Command::Recovered { node, epoch } => self.recovered(*node, *epoch),
            Command::NewVdi(request) => self.new_vdi(request).map_or_else(Outcome::Refused, Outcome::Vdi),
            Command::DeleteVdi { name, tag, snapshot_id } => {
                self.delete_vdi(name, Target::new(tag, *snapshot_id)).map_or_else(Outcome::Refused, Outcome::Vdi)
            }
            Command::EditVdi { vdi, edit } => self.edit_vdi(*vdi, edit).map_or_else(Outcome::Refused, Outcome::Vdi),
            // The lease stays: objects of this VDI that others still refer to may have to be removed later, under stamps
            // above those they have.
            Command::Reclaimed { vdi } if self.to_reclaim.remove(&vdi.get()) => Outcome::Done,
            Command::Reclaimed { .. } => Outcome::Refused(Refusal::NoEffect),
            Command::AcquireLease { vdi, node } => self.acquire_lease(*vdi, *node),
            Command::ReleaseLease { vdi, node, generation } => self.release_lease(*vdi, *node, *generation),
            Command::Shutdown | Command::StopAll => self.shutdown(),
            Command::ForceRecover { time } => self.force_recover(*time),
            Command::Restore(state) => self.restore(state),
            Command::Admit { node, fingerprint, token } => self.admit(*node, *fingerprint, token.as_ref()),
            Command::Ban { node, key } => self.ban(*node, key),
            Command::RotateKey { key } => self.rotate_key(key),
            Command::OfferToken { hash } => self.offer_token(*hash),
            Command::Restart => self.restart(),
            Command::StopWaiting { time } => self.stop_waiting(*time),
            Command::HandOverLease { vdi, node, generation, to } => self.hand_over_lease(*vdi, *node, *generation, *to),
            Command::BeginRestore(request) => self.begin_restore(request).map_or_else(Outcome::Refused, Outcome::Vdi),
            Command::FinishRestore { vdi, node, generation, time } => {
                self.finish_restore(*vdi, (*node, *generation), *time).map_or_else(Outcome::Refused, Outcome::Vdi)
            }
            Command::LockVdi { name, node, token } => {
                self.lock(name, *node, *token).map_or_else(Outcome::Refused, Outcome::Vdi)
            }
            Command::UnlockVdi { name, token } => self.unlock(name, *token),
            Command::SnapshotTogether { members, tag } => self.snapshot_together(members, tag),
            Command::RenameVdi { name, to } => self.rename_vdi(name, to),
            Command::DetachVdi { vdi, node, generation } => self.detach_vdi(*vdi, (*node, *generation)),
            Command::LimitVdi { name, limits } => self.limit_vdi(name, *limits),
            Command::ShrinkVdi { vdi, node, generation, size_bytes } => {
                self.shrink_vdi(*vdi, (*node, *generation), *size_bytes)
            }
            Command::GiveUpRestore { vdi } => self.give_up_restore(*vdi).map_or_else(Outcome::Refused, Outcome::Vdi),
            Command::AlterCopies { vdi, copies, time } => {
                self.alter_copies(*vdi, *copies, *time).map_or_else(Outcome::Refused, |()| Outcome::Done)
            }
            Command::Reweight { weights, time } => {
                self.reweight(weights, *time).map_or_else(Outcome::Refused, |()| Outcome::Done)
            }
            Command::HoldRecovery { held } => self.hold_recovery(*held),
        };
        self.check();
        outcome
    }

    /// For `Command::Restore`.
    pub fn encode(&self) -> Vec<u8> {
        postcard::to_allocvec(self).expect("the state's types have no unserialisable values")
    }

    /// How far the cluster had come, for comparing what two nodes remember of it.
    pub fn progress(&self) -> (Epoch, u64) {
        (self.epoch, self.served)
    }

    /// Whether client requests may be served at all.
    pub fn is_running(&self) -> bool {
        self.phase == Phase::Running
    }

    /// The record of an epoch, if it is still known.
    pub fn epoch_record(&self, epoch: Epoch) -> Option<&Arc<EpochRecord>> {
        self.epochs.iter().rev().find(|record| record.epoch == epoch)
    }

    /// Whether only one client may have a volume open.
    pub fn enforces_locks(&self) -> bool {
        self.settings.flags & LOCKS_ENFORCED != 0
    }

    /// Whether a write that cannot have all its copies is refused.
    pub fn is_strict(&self) -> bool {
        self.settings.flags & STRICT != 0
    }

    /// A VDI that was not deleted.
    pub fn live_vdi(&self, id: VdiId) -> Option<&Arc<Vdi>> {
        self.vdis.get(&id.get()).filter(|vdi| !vdi.deleted)
    }

    /// Distinct zones of members that store something.
    pub fn zone_count(&self) -> usize {
        let zones: BTreeSet<u32> =
            self.members.values().filter(|m| !m.member.is_gateway()).map(|m| m.member.zone).collect();
        zones.len()
    }

    /// Finds a VDI by name, as LOCK_VDI, GET_VDI_INFO and DEL_VDI do.
    pub fn lookup(&self, name: &[u8], target: Target<'_>) -> Result<VdiId, Refusal> {
        vdi_name::lookup(name, target, self.candidates(name)).map_err(|error| match error {
            LookupError::NoVdi => Refusal::NoVdi,
            LookupError::NoTag => Refusal::NoTag,
        })
    }

    /// The run of ids that may carry `name`, from high to low.
    fn candidates<'a>(&'a self, name: &[u8]) -> impl Iterator<Item = Candidate<'a>> {
        let run = Run::of(name, |id| self.vdis.contains_key(&id.get()));
        let run = run.filter_map(move |id| self.vdis.get(&id.get()));
        run.chain(self.given_name(name)).map(|vdi| Candidate {
            vid: vdi.id,
            name: if vdi.deleted || vdi.is_being_restored() { &[] } else { &vdi.name },
            tag: &vdi.tag,
            snapid: vdi.snapshot_id,
            is_snapshot: vdi.is_snapshot(),
        })
    }

    /// Whether the members of a cluster with a quorum are waited for: after a shutdown, or because too many are gone.
    pub fn is_waiting_for_members(&self) -> bool {
        self.needs_majority && matches!(self.phase, Phase::Waiting { .. })
    }

    /// Whether every member understands a level.
    pub fn understands(&self, level: Level) -> bool {
        self.members.values().all(|member| member.member.level >= level)
    }

    fn raise_level(&mut self, level: Level) -> Outcome {
        if level <= self.level {
            return Outcome::Refused(Refusal::NoEffect);
        }
        if !self.understands(level) {
            return Outcome::Refused(Refusal::EarlierVersion);
        }
        self.level = level;
        Outcome::Done
    }

    fn join(&mut self, member: &Member, time: u64) -> Outcome {
        if member.level < self.level {
            return Outcome::Refused(Refusal::EarlierVersion);
        }
        if self.phase == Phase::Shutdown {
            return Outcome::Refused(Refusal::Waiting);
        }
        // A process that crashed and came back before anybody noticed must not count as having been there all along:
        // its leave gets an epoch of its own, in which the others were ahead of it.
        self.evict(&[member.id], time);
        let since = if self.phase == Phase::Unformatted { Epoch(0) } else { self.epoch.next() };
        self.members.insert(member.id, EpochMember { member: member.clone(), since });
        if let Phase::Waiting { missing, .. } = &mut self.phase {
            missing.remove(&member.id);
            if missing.is_empty() {
                self.resume(time);
            }
        } else {
            self.members_changed(time);
        }
        Outcome::Done
    }

    /// Everybody who was waited for is back.
    fn resume(&mut self, time: u64) {
        let orderly = matches!(self.phase, Phase::Waiting { orderly: true, .. });
        self.phase = Phase::Running;
        let slept = |(node, before): (&NodeId, &EpochMember)| {
            self.members.get(node).is_some_and(|member| member.member.boot == before.member.boot)
        };
        let looks_again = |last: &EpochRecord| self.level < Level::STOPS || !last.members.iter().any(slept);
        let same = |last: &EpochRecord| last.ring_members() == ring_members(&self.members);
        let Some(last) = self.epochs.last().filter(|last| orderly && same(last) && looks_again(last)) else {
            self.members_changed(time);
            return;
        };
        // The same members after an orderly stop: nothing moved and nothing was missed, the epoch goes on.
        for (node, before) in &last.members {
            if let Some(member) = self.members.get_mut(node) {
                member.since = before.since;
            }
        }
        if self.level >= Level::STOPS {
            self.recovered.clear();
        }
    }

    /// All at once: those who died together leave no epoch in which some of them seem to have gone on.
    fn evict(&mut self, nodes: &[NodeId], time: u64) -> Outcome {
        let mut gone = nodes.to_vec();
        gone.retain(|node| self.members.remove(node).is_some());
        if gone.is_empty() {
            return Outcome::Refused(Refusal::NoEffect);
        }
        for node in &gone {
            self.drop_rights_of(*node);
        }
        if let Phase::Waiting { missing, .. } = &mut self.phase {
            let last = self.epochs.last();
            let is_needed =
                |node: &NodeId| last.and_then(|last| last.members.get(node)).is_some_and(|m| !m.member.is_gateway());
            missing.extend(gone.into_iter().filter(is_needed));
        } else {
            self.members_changed(time);
        }
        Outcome::Done
    }

    fn drop_rights_of(&mut self, node: NodeId) {
        self.locks.retain(|_, lock| lock.node != node);
        for lease in self.leases.values_mut() {
            if lease.holder == Some(node) {
                lease.holder = None;
            }
        }
    }

    /// Makes the next epoch, once there are epochs at all.
    fn members_changed(&mut self, time: u64) {
        self.one_copy_will_do &= self.zone_count() < 2;
        if self.phase == Phase::Unformatted || self.phase == Phase::Shutdown {
            return;
        }
        self.begin_epoch(self.epoch.next(), time);
    }

    fn begin_epoch(&mut self, epoch: Epoch, time: u64) {
        let (previous, recovered) = (self.epoch, core::mem::take(&mut self.recovered));
        let before = self.epochs.last().map(|last| &last.steady);
        let steady_from = |node: &NodeId| {
            if self.clean == previous || recovered.contains(node) {
                return Some(previous);
            }
            before.and_then(|steady| steady.get(node).copied())
        };
        let stayed = self.members.iter().filter(|(_, member)| member.since <= previous).map(|(node, _)| node);
        let steady = stayed.filter_map(|node| Some((*node, steady_from(node)?))).collect();
        self.epoch = epoch;
        if self.settings.reference_weight.is_none() {
            self.settings.reference_weight = ReferenceWeight::of(&ring_members(&self.members));
        }
        let reference_weight = self.settings.reference_weight;
        let members = self.members.clone();
        self.epochs.push(Arc::new(EpochRecord { epoch, time, members, reference_weight, steady }));
        let clean = self.clean;
        let shown_only = self.epochs.iter().filter(|record| record.epoch < clean).count();
        self.epochs.drain(..shown_only.saturating_sub(EPOCHS_SHOWN_MAX));
    }

    fn format(&mut self, cluster_id: u64, settings: Settings, time: u64) -> Outcome {
        let shift_ok = (20..=31).contains(&settings.object_size_shift);
        if cluster_id == 0 || !(1..=COPIES_MAX).contains(&settings.copies.now()) || !shift_ok {
            return Outcome::Refused(Refusal::InvalidParameters);
        }
        if self.phase == Phase::Shutdown {
            return Outcome::Refused(Refusal::Waiting);
        }
        let mut members = core::mem::take(&mut self.members);
        // The numbers go on: what is still under way for the cluster before is of an older epoch, and refused.
        let epoch = self.epoch.next();
        for member in members.values_mut() {
            member.since = epoch;
        }
        let mut replaced = core::mem::take(&mut self.replaced);
        if self.cluster_id != 0 {
            replaced.insert(self.cluster_id);
        }
        let (applied, served) = (self.applied, self.served);
        let kept = ClusterState {
            admission: core::mem::take(&mut self.admission),
            needs_majority: self.needs_majority,
            level: self.level,
            ..ClusterState::default()
        };
        *self = ClusterState { applied, served, cluster_id, created: time, settings, members, replaced, ..kept };
        self.phase = Phase::Running;
        self.begin_epoch(epoch, time);
        // Nothing exists yet, so everybody has everything.
        self.clean = epoch;
        Outcome::Done
    }

    fn recovered(&mut self, node: NodeId, epoch: Epoch) -> Outcome {
        if epoch != self.epoch || !self.members.contains_key(&node) || !self.recovered.insert(node) {
            return Outcome::Refused(Refusal::NoEffect);
        }
        if self.has_recovered() {
            self.clean = epoch;
            self.note_processes();
        }
        Outcome::Done
    }

    /// Whether all members that store something have said in this epoch that they have everything.
    pub fn has_recovered(&self) -> bool {
        let mut storing = self.members.values().filter(|m| !m.member.is_gateway()).peekable();
        storing.peek().is_some() && storing.all(|m| self.recovered.contains(&m.member.id))
    }

    /// The processes of now have everything of this epoch, whichever it began with: it counts as theirs from here on.
    fn note_processes(&mut self) {
        let boots = |members: &BTreeMap<NodeId, EpochMember>| -> Vec<u64> {
            members.values().map(|member| member.member.boot).collect()
        };
        if let Some(last) = self.epochs.last_mut()
            && self.level >= Level::STOPS
            && boots(&last.members) != boots(&self.members)
        {
            Arc::make_mut(last).members.clone_from(&self.members);
        }
    }

    fn shutdown(&mut self) -> Outcome {
        if self.phase == Phase::Unformatted {
            return Outcome::Refused(Refusal::NotFormatted);
        }
        for lease in self.leases.values_mut() {
            lease.holder = None;
        }
        self.locks.clear();
        self.phase = Phase::Shutdown;
        Outcome::Done
    }

    /// The state that a node puts into an order that has nothing yet: what it remembered, waiting for the members of the
    /// last epoch that it knows of, because they may have gone on without it.
    #[must_use]
    pub fn restarted(mut self) -> ClusterState {
        if self.phase == Phase::Unformatted {
            self.members.clear();
            return self;
        }
        // Still waiting since the last start: whoever came back in between has to come back again.
        let orderly = matches!(self.phase, Phase::Shutdown | Phase::Waiting { orderly: true, .. });
        let last = self.epochs.last().map(|last| &last.members);
        let storing = last.into_iter().flat_map(|members| members.values()).filter(|m| !m.member.is_gateway());
        let missing: BTreeSet<NodeId> = storing.map(|m| m.member.id).collect();
        self.members.clear();
        for lease in self.leases.values_mut() {
            lease.holder = None;
        }
        self.locks.clear();
        self.phase = if missing.is_empty() { Phase::Running } else { Phase::Waiting { missing, orderly } };
        self
    }

    fn force_recover(&mut self, time: u64) -> Outcome {
        let alone = self.needs_majority && self.zone_count() < 2;
        match self.phase {
            Phase::Waiting { .. } => {}
            Phase::Running if self.clean < self.epoch || (alone && !self.one_copy_will_do) => {}
            _ => return Outcome::Refused(Refusal::NoEffect),
        }
        self.forgive();
        self.members_changed(time);
        Outcome::Done
    }

    /// Makes this, which a minority remembers, the beginning of another era, without the nodes that are `gone`. Of an
    /// unformatted cluster there is nothing to go on with.
    pub fn begin_era(&mut self, gone: &[NodeId], time: u64) {
        if self.phase == Phase::Unformatted {
            return;
        }
        for node in gone {
            self.members.remove(node);
            self.locks.retain(|_, lock| lock.node != *node);
        }
        let shown_only = self.epochs.iter().filter(|record| record.epoch < self.clean).count();
        self.epochs.drain(..shown_only.saturating_sub(EPOCHS_KEPT_FOR_ERA));
        for lease in self.leases.values_mut() {
            *lease = Lease { holder: None, generation: lease.generation + ERA_STRIDE };
        }
        self.generation_floor += ERA_STRIDE;
        self.forgive();
        self.one_copy_will_do = self.zone_count() < 2;
        self.begin_epoch(Epoch(self.epoch.get() + ERA_STRIDE), time);
    }

    fn forgive(&mut self) {
        self.phase = Phase::Running;
        // The operator's word replaces what the missing members would have told about the epochs since the clean one. What
        // those who are here know of them still counts.
        self.forgiven = self.epoch;
        self.one_copy_will_do = true;
    }

    /// The first command of an order that goes on from an earlier one, or from nothing.
    fn restore(&mut self, bytes: &[u8]) -> Outcome {
        if self.applied > 1 {
            return Outcome::Refused(Refusal::NoEffect);
        }
        let Ok(state) = postcard::from_bytes(bytes) else {
            return Outcome::Refused(Refusal::InvalidParameters);
        };
        *self = state;
        self.applied += 1;
        Outcome::Done
    }

    fn admit(&mut self, node: NodeId, fingerprint: Fingerprint, token: Option<&[u8; 32]>) -> Outcome {
        let admission = &mut self.admission;
        if admission.banned.contains(&fingerprint) {
            return Outcome::Refused(Refusal::Banned);
        }
        match admission.nodes.get(&node) {
            Some(known) if *known == fingerprint => return Outcome::Done,
            Some(_) => return Outcome::Refused(Refusal::OtherFingerprint),
            None => {}
        }
        if token.is_some_and(|token| !admission.tokens.remove(token)) {
            return Outcome::Refused(Refusal::TokenUnknown);
        }
        admission.nodes.insert(node, fingerprint);
        Outcome::Done
    }

    /// The node's eviction is a command of its own: it has to have stopped serving before.
    fn ban(&mut self, node: NodeId, key: &ClusterKey) -> Outcome {
        let Some(fingerprint) = self.admission.nodes.get(&node).copied() else {
            return Outcome::Refused(Refusal::NoEffect);
        };
        match self.rotate_key(key) {
            Outcome::Done => {}
            refused => return refused,
        }
        self.admission.nodes.remove(&node);
        self.admission.banned.insert(fingerprint);
        Outcome::Done
    }

    /// Tokens given out under the key before are worth nothing any more.
    fn rotate_key(&mut self, key: &ClusterKey) -> Outcome {
        match &self.admission.key {
            Some(old) if key.generation == old.generation + 1 => {}
            _ => return Outcome::Refused(Refusal::NoEffect),
        }
        self.admission.key = Some(key.clone());
        self.admission.tokens.clear();
        Outcome::Done
    }

    fn offer_token(&mut self, hash: [u8; 32]) -> Outcome {
        if self.admission.key.is_none() || self.admission.tokens.len() >= TOKENS_MAX {
            return Outcome::Refused(Refusal::NoEffect);
        }
        self.admission.tokens.insert(hash);
        Outcome::Done
    }

    fn restart(&mut self) -> Outcome {
        if self.phase != Phase::Shutdown {
            return Outcome::Refused(Refusal::NoEffect);
        }
        *self = core::mem::take(self).restarted();
        Outcome::Done
    }

    fn stop_waiting(&mut self, time: u64) -> Outcome {
        if !matches!(self.phase, Phase::Waiting { .. }) {
            return Outcome::Refused(Refusal::NoEffect);
        }
        self.phase = Phase::Running;
        self.members_changed(time);
        Outcome::Done
    }

    /// Holders that an object with `copies` copies needs before a write to it is acknowledged (design: min-copies); all of
    /// them, if the operator chose so at format.
    pub fn min_copies(&self, copies: u8) -> u8 {
        if self.is_strict() {
            return copies;
        }
        if self.needs_majority && copies > 2 && !self.one_copy_will_do { 2 } else { 1 }
    }

    /// The fewest copies that any object may have.
    pub fn copies_min(&self) -> u8 {
        let volumes = self.vdis.values().filter(|vdi| !vdi.deleted).map(|vdi| vdi.copies);
        volumes.chain([self.settings.copies]).map(|copies| copies.fewest(self.clean)).min().unwrap_or(1)
    }

    /// Changes the copies of a volume's chain, or of what does not say its own. Beginning an epoch with it makes gateways and
    /// holders agree, and recovery bring what is missing and drop what is too much.
    fn alter_copies(&mut self, id: Option<VdiId>, copies: u8, time: u64) -> Result<(), Refusal> {
        self.require_running()?;
        let root = match id {
            Some(id) => Some(self.live_vdi(id).ok_or(Refusal::NoVdi)?.chain_root),
            None => None,
        };
        let before = match id {
            Some(id) => self.vdis[&id.get()].copies,
            None => self.settings.copies,
        };
        if !(1..=COPIES_MAX).contains(&copies) {
            return Err(Refusal::InvalidParameters);
        }
        if before.now() == copies {
            return Err(Refusal::NoEffect);
        }
        if !before.may_change(self.clean) {
            return Err(Refusal::Recovering);
        }
        let (epoch, after) = (self.epoch.next(), before.changed(copies, self.epoch.next()));
        if root.is_none() {
            self.settings.copies = after;
        }
        // One chain has one set of holders, and of a deleted VDI others may still use objects.
        for vdi in self.vdis.values_mut().filter(|vdi| Some(vdi.chain_root) == root) {
            Arc::make_mut(vdi).copies = after;
        }
        self.begin_epoch(epoch, time);
        Ok(())
    }

    /// Gateways stay gateways, and stores stores. The scale of the ring stays too while it suits: a new one moves far more.
    fn reweight(&mut self, weights: &[(NodeId, u64)], time: u64) -> Result<(), Refusal> {
        self.require_running()?;
        let mut changed = false;
        for (node, weight) in weights.iter().filter(|(_, weight)| *weight > 0) {
            if let Some(entry) = self.members.get_mut(node).filter(|entry| !entry.member.is_gateway()) {
                changed |= entry.member.weight != *weight;
                entry.member.weight = *weight;
            }
        }
        let members = ring_members(&self.members);
        if self.settings.reference_weight.is_some_and(|reference| !reference.fits(&members)) {
            self.settings.reference_weight = ReferenceWeight::of(&members);
            changed = true;
        }
        if !changed {
            return Err(Refusal::NoEffect);
        }
        self.begin_epoch(self.epoch.next(), time);
        Ok(())
    }

    fn hold_recovery(&mut self, held: bool) -> Outcome {
        if let Err(refusal) = self.require_running() {
            return Outcome::Refused(refusal);
        }
        self.recovery_held = held;
        Outcome::Done
    }

    pub(crate) fn require_running(&self) -> Result<(), Refusal> {
        match self.phase {
            Phase::Running => Ok(()),
            Phase::Unformatted => Err(Refusal::NotFormatted),
            Phase::Waiting { .. } | Phase::Shutdown => Err(Refusal::Waiting),
        }
    }

    pub(crate) fn new_vdi(&mut self, request: &NewVdi) -> Result<VdiId, Refusal> {
        self.require_running()?;
        vdi_name::check_name(&request.name).map_err(|_| Refusal::InvalidParameters)?;
        let base = match request.base {
            Some(id) => Some(self.live_vdi(id).cloned().ok_or(Refusal::NoBaseVdi)?),
            None => None,
        };
        let current = self.lookup(&request.name, Target::Current).ok();
        match (current, request.snapshot, &base) {
            (Some(_), false, _) => return Err(Refusal::VdiExists),
            (None, true, _) => return Err(Refusal::NoVdi),
            // Cloning something that still changes would freeze it unasked (protocol.md section 6.5).
            (None, false, Some(base)) if !base.is_snapshot() => return Err(Refusal::InvalidParameters),
            (Some(_), true, None) => return Err(Refusal::InvalidParameters),
            (Some(current), true, Some(base)) if base.id != current && !base.is_snapshot() => {
                return Err(Refusal::InvalidParameters);
            }
            (Some(current), true, Some(_)) => self.require_drained(current, request.drained)?,
            (None, false, _) => {}
        }
        let new = self.describe_new(request, base.as_deref())?;
        if let Some(current) = current {
            self.freeze(current, request.time);
        }
        let id = new.id;
        self.vdis.insert(id.get(), Arc::new(new));
        Ok(id)
    }

    /// A VDI may become a snapshot only while the asking node holds its lease, with every write drained.
    pub(crate) fn require_drained(&self, vdi: VdiId, drained: Option<(NodeId, u32)>) -> Result<(), Refusal> {
        let lease = self.leases.get(&vdi.get());
        match (lease, drained) {
            (Some(lease), Some((node, generation))) if lease.holder == Some(node) && lease.generation == generation => {
                Ok(())
            }
            _ => Err(Refusal::LeaseLost),
        }
    }

    fn freeze(&mut self, id: VdiId, time: u64) {
        if let Some(vdi) = self.vdis.get_mut(&id.get()) {
            // A clock before 1970 must not leave the snapshot looking like a working VDI (invariant 2 of `vdi`).
            Arc::make_mut(vdi).snapshot_time = time.max(1);
        }
        if let Some(lease) = self.leases.get_mut(&id.get()) {
            lease.holder = None;
        }
    }

    fn describe_new(&self, request: &NewVdi, base: Option<&Vdi>) -> Result<Vdi, Refusal> {
        let copies = match (request.copies, base) {
            // One chain has one set of holders.
            (_, Some(base)) if base.name == request.name => base.copies,
            (0, Some(base)) => Copies::always(base.copies.now()),
            (0, None) => Copies::always(self.settings.copies.now()),
            (copies, _) => Copies::always(copies),
        };
        let object_size_shift = match (base, request.object_size_shift) {
            // QEMU sends the cluster's default even when the base has objects of another size.
            (Some(base), _) => base.object_size_shift,
            (None, 0) => self.settings.object_size_shift,
            (None, shift) => shift,
        };
        if copies.now() > COPIES_MAX || !(20..=31).contains(&object_size_shift) {
            return Err(Refusal::InvalidParameters);
        }
        if request.size_bytes > OBJECTS_MAX << object_size_shift {
            return Err(Refusal::InvalidParameters);
        }
        let id = vdi_name::allocate(&request.name, |id| self.vdis.contains_key(&id.get()))
            .ok_or(Refusal::VdiIdsExhausted)?;
        let snapshot_id =
            vdi_name::next_snapid(&request.name, self.candidates(&request.name)).ok_or(Refusal::VdiIdsExhausted)?;
        let chain_root = match base {
            Some(base) if base.name == request.name => base.chain_root,
            _ => id,
        };
        Ok(Vdi {
            id,
            name: request.name.clone(),
            tag: Vec::new(),
            snapshot_id,
            parent: base.map(|base| base.id),
            chain_root,
            size_bytes: request.size_bytes,
            copies,
            object_size_shift,
            create_time: request.time,
            snapshot_time: 0,
            vm_state_bytes: 0,
            vm_clock_ns: 0,
            deleted: false,
        })
    }

    fn delete_vdi(&mut self, name: &[u8], target: Target<'_>) -> Result<VdiId, Refusal> {
        self.require_running()?;
        let id = self.lookup(name, target)?;
        self.remove_vdi(id);
        self.forget_limits(name);
        Ok(id)
    }

    fn remove_vdi(&mut self, id: VdiId) {
        if let Some(vdi) = self.vdis.get_mut(&id.get()) {
            Arc::make_mut(vdi).deleted = true;
        }
        if let Some(lease) = self.leases.get_mut(&id.get()) {
            // A writer that still holds it learns from the next grant, or from the missing VDI, that it is over.
            lease.holder = None;
        }
        self.to_reclaim.insert(id.get());
    }

    fn begin_restore(&mut self, request: &NewVdi) -> Result<VdiId, Refusal> {
        self.require_running()?;
        vdi_name::check_name(&request.name).map_err(|_| Refusal::InvalidParameters)?;
        let base = request.base.and_then(|id| self.live_vdi(id).cloned()).ok_or(Refusal::NoBaseVdi)?;
        if base.name != request.name || !base.is_snapshot() || request.size_bytes < base.size_bytes {
            return Err(Refusal::InvalidParameters);
        }
        let new = Vdi { snapshot_id: 0, ..self.describe_new(request, Some(&base))? };
        // Whoever began it went away, or is to: there would be no telling which of two is the one meant.
        let run = Run::of(&request.name, |id| self.vdis.contains_key(&id.get()));
        let left: Vec<VdiId> = run
            .filter(|id| self.live_vdi(*id).is_some_and(|vdi| vdi.is_being_restored() && vdi.name == request.name))
            .collect();
        for id in left {
            self.remove_vdi(id);
        }
        let id = new.id;
        self.vdis.insert(id.get(), Arc::new(new));
        Ok(id)
    }

    fn lock(&mut self, name: &[u8], node: NodeId, token: u64) -> Result<VdiId, Refusal> {
        self.require_running()?;
        let id = self.lookup(name, Target::Current)?;
        if !self.enforces_locks() || !self.members.contains_key(&node) {
            return Err(Refusal::NoEffect);
        }
        match self.locks.get(name) {
            Some(lock) if lock.token != token => Err(Refusal::Locked),
            _ => {
                self.locks.insert(name.to_vec(), Lock { node, token });
                Ok(id)
            }
        }
    }

    fn unlock(&mut self, name: &[u8], token: Option<u64>) -> Outcome {
        if self.locks.get(name).is_none_or(|lock| token.is_some_and(|token| token != lock.token)) {
            return Outcome::Refused(Refusal::NoEffect);
        }
        self.locks.remove(name);
        Outcome::Done
    }

    fn finish_restore(&mut self, id: VdiId, drained: (NodeId, u32), time: u64) -> Result<VdiId, Refusal> {
        self.require_running()?;
        let vdi = self.live_vdi(id).filter(|vdi| vdi.is_being_restored()).cloned().ok_or(Refusal::NoVdi)?;
        self.require_drained(id, Some(drained))?;
        let snapshot_id =
            vdi_name::next_snapid(&vdi.name, self.candidates(&vdi.name)).ok_or(Refusal::VdiIdsExhausted)?;
        if let Some(entry) = self.vdis.get_mut(&id.get()) {
            Arc::make_mut(entry).snapshot_id = snapshot_id;
        }
        self.freeze(id, time);
        Ok(id)
    }

    fn give_up_restore(&mut self, id: VdiId) -> Result<VdiId, Refusal> {
        self.require_running()?;
        if self.live_vdi(id).is_none_or(|vdi| !vdi.is_being_restored()) {
            return Err(Refusal::NoVdi);
        }
        self.remove_vdi(id);
        Ok(id)
    }

    fn edit_vdi(&mut self, id: VdiId, edit: &VdiEdit) -> Result<VdiId, Refusal> {
        self.require_running()?;
        let vdi = self.live_vdi(id).ok_or(Refusal::NoVdi)?;
        let size_changes = edit.size_bytes.is_some_and(|size| size > vdi.size_bytes);
        let vm_changes = edit.vm_state_bytes.is_some_and(|bytes| bytes != vdi.vm_state_bytes)
            || edit.vm_clock_ns.is_some_and(|clock| clock != vdi.vm_clock_ns);
        if vdi.is_snapshot() && (size_changes || vm_changes) {
            return Err(Refusal::ReadOnly);
        }
        if edit.size_bytes.is_some_and(|size| size > OBJECTS_MAX << vdi.object_size_shift) {
            return Err(Refusal::InvalidParameters);
        }
        if let Some(tag) = &edit.tag {
            vdi_name::check_tag(tag).map_err(|_| Refusal::InvalidParameters)?;
        }
        if let Some(entry) = self.vdis.get_mut(&id.get()) {
            let vdi = Arc::make_mut(entry);
            if let (Some(size), true) = (edit.size_bytes, size_changes) {
                vdi.size_bytes = size;
            }
            if let Some(tag) = &edit.tag {
                vdi.tag.clone_from(tag);
            }
            vdi.vm_state_bytes = edit.vm_state_bytes.unwrap_or(vdi.vm_state_bytes);
            vdi.vm_clock_ns = edit.vm_clock_ns.unwrap_or(vdi.vm_clock_ns);
        }
        Ok(id)
    }

    fn acquire_lease(&mut self, vdi: VdiId, node: NodeId) -> Outcome {
        if let Err(refusal) = self.require_running() {
            return Outcome::Refused(refusal);
        }
        if !self.members.contains_key(&node) {
            return Outcome::Refused(Refusal::NoEffect);
        }
        let floor = self.generation_floor;
        let lease = self.leases.entry(vdi.get()).or_insert(Lease { holder: None, generation: floor });
        match lease.holder {
            Some(holder) if holder != node => Outcome::Refused(Refusal::LeaseHeldBy(holder)),
            _ => {
                lease.holder = Some(node);
                lease.generation += 1;
                Outcome::Lease(lease.generation)
            }
        }
    }

    fn hand_over_lease(&mut self, vdi: VdiId, node: NodeId, generation: u32, to: NodeId) -> Outcome {
        if let Err(refusal) = self.require_running() {
            return Outcome::Refused(refusal);
        }
        if !self.members.contains_key(&to) {
            return self.release_lease(vdi, node, generation);
        }
        match self.leases.get_mut(&vdi.get()) {
            Some(lease) if lease.holder == Some(node) && lease.generation == generation => {
                lease.holder = Some(to);
                lease.generation += 1;
                Outcome::Lease(lease.generation)
            }
            _ => Outcome::Refused(Refusal::LeaseLost),
        }
    }

    fn release_lease(&mut self, vdi: VdiId, node: NodeId, generation: u32) -> Outcome {
        match self.leases.get_mut(&vdi.get()) {
            Some(lease) if lease.holder == Some(node) && lease.generation == generation => {
                lease.holder = None;
                Outcome::Done
            }
            _ => Outcome::Refused(Refusal::NoEffect),
        }
    }

    /// The invariants that a bug could break; cheap enough to stay on.
    fn check(&self) {
        if let Some(last) = self.epochs.last() {
            assert_eq!(last.epoch, self.epoch, "the last record is the current epoch");
            assert!(self.clean <= self.epoch, "an epoch cannot end clean before it began");
        }
        for pair in self.epochs.windows(2) {
            let next = pair[0].epoch.next() == pair[1].epoch || pair[0].epoch.get() + ERA_STRIDE == pair[1].epoch.get();
            assert!(next, "epochs follow each other without a gap");
        }
    }
}
