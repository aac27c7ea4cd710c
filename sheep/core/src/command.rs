//! What can be put into the cluster's order, and what comes of it.
//!
//! Commands are stored in logs and sent between nodes of different builds: variants are only ever added at the end, and
//! a field is never changed in place.

use alloc::vec::Vec;
use qemu_proto::oid::VdiId;
use serde::{Deserialize, Serialize};

use crate::admission::{ClusterKey, Fingerprint};
use crate::ids;
use crate::level::Level;
use crate::limits::Limits;
use crate::member::{Member, NodeId};
use crate::stamp::Epoch;

/// A change of the ordered state. Times are labels in the wire encoding (seconds << 32 | nanoseconds), given by the
/// proposer because `apply` reads no clock.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
#[expect(missing_docs, reason = "the variants' docs name their fields")]
pub enum Command {
    /// A process comes in. Its node may be new, known from earlier epochs, or (after a crash nobody noticed) still listed.
    Join { member: Member, time: u64 },
    /// Nodes are no longer in: they left, or they are known to be dead. All at once, in one epoch.
    Evict { nodes: Vec<NodeId>, time: u64 },
    /// The moment the cluster begins. Everything that was there is gone.
    Format { cluster_id: u64, copies: u8, object_size_shift: u8, flags: u16, time: u64 },
    /// The node has every object of this epoch that it must have, at its newest version.
    Recovered { node: NodeId, epoch: Epoch },
    /// A new volume, or a new working VDI based on `base` (see `NewVdi`).
    NewVdi(NewVdi),
    /// Deletes a working VDI or a snapshot.
    DeleteVdi { name: Vec<u8>, tag: Vec<u8>, snapshot_id: u32 },
    /// Changes the header fields that clients may change.
    EditVdi {
        #[serde(with = "ids::vdi_id")]
        vdi: VdiId,
        edit: VdiEdit,
    },
    /// The deleted VDI's objects that nothing refers to are gone from every holder.
    Reclaimed {
        #[serde(with = "ids::vdi_id")]
        vdi: VdiId,
    },
    /// Takes the writer lease, if it is free or its holder is no member.
    AcquireLease {
        #[serde(with = "ids::vdi_id")]
        vdi: VdiId,
        node: NodeId,
    },
    /// Gives a drained lease back.
    ReleaseLease {
        #[serde(with = "ids::vdi_id")]
        vdi: VdiId,
        node: NodeId,
        generation: u32,
    },
    /// Every node stops after this; the next start goes on from here.
    Shutdown,
    /// The operator says that the members that are missing will not come back, or not with anything newer.
    ForceRecover { time: u64 },
    /// An order begins with what is known from before it, a state as `ClusterState::encode` gives it; refused anywhere but at
    /// the order's beginning.
    Restore(Vec<u8>),
    /// Lets an identity in; with the BLAKE3 of a token, if that has not been used yet.
    Admit { node: NodeId, fingerprint: Fingerprint, token: Option<[u8; 32]> },
    /// Shuts an identity out for good and replaces the key that it knew.
    Ban { node: NodeId, key: ClusterKey },
    /// Replaces the cluster key by the one of the next generation.
    RotateKey { key: ClusterKey },
    /// A token that lets one node in was given out; this is its BLAKE3.
    OfferToken { hash: [u8; 32] },
    /// The nodes are back after `Shutdown`: waits for the members of the last epoch.
    Restart,
    /// Goes on with those who are back.
    StopWaiting { time: u64 },
    /// Passes a drained lease on to a node that asked for it.
    HandOverLease {
        #[serde(with = "ids::vdi_id")]
        vdi: VdiId,
        node: NodeId,
        generation: u32,
        to: NodeId,
    },
    /// A VDI that will be a snapshot of its name, beginning as a copy of the base, a snapshot of the same name. Until it is
    /// finished no name finds it. One that was begun before and never finished is given up.
    BeginRestore(NewVdi),
    /// The VDI that was begun becomes the newest snapshot; `generation` proves that its writes have been drained.
    FinishRestore {
        #[serde(with = "ids::vdi_id")]
        vdi: VdiId,
        node: NodeId,
        generation: u32,
        time: u64,
    },
    /// The VDI that was begun is deleted.
    GiveUpRestore {
        #[serde(with = "ids::vdi_id")]
        vdi: VdiId,
    },
    /// A client of this node opens the working VDI of a name and wants to be the only one; the token is a random number that
    /// tells one opening from another.
    LockVdi { name: Vec<u8>, node: NodeId, token: u64 },
    /// The client closed it or is gone; without a token, an operator says so.
    UnlockVdi { name: Vec<u8>, token: Option<u64> },
    /// From now on commands up to this level may be ordered: every member understands them.
    RaiseLevel { level: Level },
    /// The objects of a VDI and of all that share its chain have so many copies from the next epoch on, which this begins;
    /// without a VDI it is attributes and the volumes that are made later.
    AlterCopies {
        #[serde(with = "ids::vdi_id_option")]
        vdi: Option<VdiId>,
        copies: u8,
        time: u64,
    },
    /// Members have these shares of the data from the next epoch on, which this begins.
    Reweight { weights: Vec<(NodeId, u64)>, time: u64 },
    /// Nodes stop (or go on again) bringing copies up to date that nobody waits for.
    HoldRecovery { held: bool },
    /// Snapshots of several working VDIs, of one moment: all of them or none, under one tag. Each says the proof that its
    /// writes are drained.
    SnapshotTogether { members: Vec<NewVdi>, tag: Vec<u8> },
    /// Gives a volume and all its snapshots another name.
    RenameVdi { name: Vec<u8>, to: Vec<u8> },
    /// The working VDI refers to none of its ancestors' objects any more, and is nobody's child from now on.
    DetachVdi {
        #[serde(with = "ids::vdi_id")]
        vdi: VdiId,
        node: NodeId,
        generation: u32,
    },
    /// How fast clients may use a volume; `None` for as fast as it goes.
    LimitVdi { name: Vec<u8>, limits: Option<Limits> },
    /// The working VDI becomes smaller. What was beyond its new end is gone: `generation` proves that its writes have been
    /// drained, and that whoever says so has looked since.
    ShrinkVdi {
        #[serde(with = "ids::vdi_id")]
        vdi: VdiId,
        node: NodeId,
        generation: u32,
        size_bytes: u64,
    },
    /// As `Shutdown`. If all come back the epoch goes on, and it is found anew that all have everything; a process that did not
    /// stop, and so does not look again, gets an epoch of its own.
    StopAll,
}

impl Command {
    /// The level that every member has to understand before this is ordered.
    pub fn level(&self) -> Level {
        match self {
            Command::Join { .. }
            | Command::Evict { .. }
            | Command::Format { .. }
            | Command::Recovered { .. }
            | Command::NewVdi(_)
            | Command::DeleteVdi { .. }
            | Command::EditVdi { .. }
            | Command::Reclaimed { .. }
            | Command::AcquireLease { .. }
            | Command::ReleaseLease { .. }
            | Command::Shutdown
            | Command::ForceRecover { .. }
            | Command::Restore(_)
            | Command::Admit { .. }
            | Command::Ban { .. }
            | Command::RotateKey { .. }
            | Command::OfferToken { .. }
            | Command::Restart
            | Command::StopWaiting { .. }
            | Command::HandOverLease { .. }
            // Refused itself where a member does not understand the level that it names.
            | Command::RaiseLevel { .. } => Level::FIRST,
            Command::BeginRestore(_)
            | Command::FinishRestore { .. }
            | Command::GiveUpRestore { .. }
            | Command::LockVdi { .. }
            | Command::UnlockVdi { .. } => Level::LOCKS_AND_RESTORES,
            Command::AlterCopies { .. } | Command::Reweight { .. } | Command::HoldRecovery { .. } => Level::COPIES,
            Command::SnapshotTogether { .. }
            | Command::RenameVdi { .. }
            | Command::DetachVdi { .. }
            | Command::LimitVdi { .. } => Level::VOLUME_CHANGES,
            Command::ShrinkVdi { .. } => Level::SHRINKING,
            Command::StopAll => Level::STOPS,
        }
    }
}

/// The request behind `NEW_VDI` (protocol.md sections 6.4, 6.5, 6.12, 6.14).
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct NewVdi {
    /// 1 to 255 bytes.
    pub name: Vec<u8>,
    /// Bytes.
    pub size_bytes: u64,
    /// What to start from; nothing for an empty volume.
    #[serde(with = "ids::vdi_id_option")]
    pub base: Option<VdiId>,
    /// Whether the working VDI of this name becomes a snapshot.
    pub snapshot: bool,
    /// 0 for the cluster's default.
    pub copies: u8,
    /// 0 for the cluster's default; a base's is inherited.
    pub object_size_shift: u8,
    /// A label.
    pub time: u64,
    /// Who asks, and under which lease generation of the working VDI that becomes a snapshot: the proof that its writes
    /// have been drained.
    pub drained: Option<(NodeId, u32)>,
}

/// Fields that a client's header write may change; `None` leaves a field alone.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct VdiEdit {
    /// The tag a snapshot will carry.
    pub tag: Option<Vec<u8>>,
    /// Bytes; only ever grows.
    pub size_bytes: Option<u64>,
    /// Bytes of saved machine state.
    pub vm_state_bytes: Option<u64>,
    /// Guest clock of the saved machine state.
    pub vm_clock_ns: Option<u64>,
}

/// What a command did.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Outcome {
    /// Done, nothing to tell.
    Done,
    /// The VDI that was made or deleted.
    Vdi(#[serde(with = "ids::vdi_id")] VdiId),
    /// The generation of the lease that was granted.
    Lease(u32),
    /// Nothing was changed.
    Refused(Refusal),
}

/// Why a command changed nothing.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Refusal {
    /// The cluster was never formatted.
    NotFormatted,
    /// The cluster stands still: shut down, or waiting for members of its last epoch.
    Waiting,
    /// The joining node belongs to another cluster.
    OtherCluster,
    /// A name without bytes, a size beyond the map, an unknown redundancy...
    InvalidParameters,
    /// There is a working VDI of this name.
    VdiExists,
    /// No VDI of this name, or none matching.
    NoVdi,
    /// The name exists but not this snapshot of it.
    NoTag,
    /// The base is unknown or deleted.
    NoBaseVdi,
    /// All 2^24 - 1 ids are taken.
    VdiIdsExhausted,
    /// The VDI is a snapshot.
    ReadOnly,
    /// Another member has the lease: ask it to yield.
    LeaseHeldBy(NodeId),
    /// The proposer's lease is not (or no longer) the current one: take it again and retry.
    LeaseLost,
    /// Nothing to do: not a member, lease not held, already reported.
    NoEffect,
    /// The identity was shut out.
    Banned,
    /// The node is known by another certificate.
    OtherFingerprint,
    /// No such token: never given out, used, or void since the key was replaced.
    TokenUnknown,
    /// Another client has it open.
    Locked,
    /// A member does not understand the command, or the joining node does not understand what the cluster uses: it runs an
    /// earlier version.
    EarlierVersion,
    /// An earlier change of the same kind is still being carried out.
    Recovering,
}
