//! What a node knows of the cluster at one moment, ready for the data path: the ordered state and its rings.

use std::sync::Arc;

use qemu_proto::inode::QEMU_INODE_BYTES;
use qemu_proto::oid::{ObjectKind, Oid, VdiId};
use sheep_core::cluster_state::ClusterState;
use sheep_core::copies::Copies;
use sheep_core::history::History;
use sheep_core::member::Member;
use sheep_core::placement::{Holders, PlacementKey, placement_key};
use sheep_core::stamp::Epoch;

/// Bytes of an attribute object (protocol.md section 4.5).
pub const ATTRIBUTE_BYTES: u64 = qemu_proto::attr::ATTR_BYTES as u64;

/// Immutable; requests carry one through.
pub struct View {
    /// Goes up with every view of this process.
    pub number: u64,
    /// The ordered state.
    pub state: Arc<ClusterState>,
    /// The epochs since the last clean one, with their rings.
    pub history: History,
}

/// Where an object lives and how large it is.
#[derive(Clone, Copy, Debug)]
pub struct Location {
    /// Its place on the ring.
    pub key: PlacementKey,
    /// Copies wanted.
    pub copies: Copies,
    /// Bytes.
    pub object_bytes: u64,
}

impl View {
    /// The view of a state; rings are taken over from `previous` where they are the same.
    pub fn new(state: Arc<ClusterState>, previous: Option<&View>) -> View {
        let history = History::of(&state, previous.map(|view| &view.history));
        View { number: previous.map_or(0, |view| view.number + 1), state, history }
    }

    /// The current epoch.
    pub fn epoch(&self) -> Epoch {
        self.state.epoch
    }

    /// Where an object lives. `None` if its id means nothing, or belongs to a VDI that never was.
    pub fn locate(&self, oid: Oid) -> Option<Location> {
        let kind = oid.kind()?;
        if kind == ObjectKind::Attribute {
            let key = placement_key(oid.vid(), oid);
            return Some(Location { key, copies: self.state.settings.copies, object_bytes: ATTRIBUTE_BYTES });
        }
        let vdi = self.state.vdis.get(&oid.vid().get())?;
        let object_bytes = match kind {
            ObjectKind::Inode => (QEMU_INODE_BYTES as u64).next_multiple_of(4096),
            ObjectKind::Data | ObjectKind::Vmstate => vdi.object_bytes(),
            ObjectKind::Attribute | ObjectKind::BtreeNode | ObjectKind::Ledger => return None,
        };
        Some(Location { key: placement_key(vdi.chain_root, oid), copies: vdi.copies, object_bytes })
    }

    /// Who should have held a located object in an epoch, in order of preference; `None` for an epoch that is not known (any
    /// more). Takes as long as building a ring.
    pub fn holders_in(&self, epoch: Epoch, location: &Location) -> Option<Vec<&Member>> {
        let record = self.state.epoch_record(epoch)?;
        let holders = sheep_core::history::holders_in(record, location.key, location.copies);
        let member = |id| record.members.get(id).map(|member| &member.member);
        Some(holders.iter().filter_map(member).collect())
    }

    /// The current holders of a located object.
    pub fn holders(&self, location: &Location) -> Holders {
        self.history.holders(location.key, location.copies)
    }

    /// Whether a lease generation of a VDI, or a later one, was granted as of this view.
    pub fn knows_lease(&self, vdi: VdiId, generation: u32) -> bool {
        self.state.leases.get(&vdi.get()).map_or(0, |lease| lease.generation) >= generation
    }

    /// Whether two VDIs share a chain, so that their objects share holders.
    pub fn same_chain(&self, one: VdiId, other: VdiId) -> bool {
        let root = |id: VdiId| self.state.vdis.get(&id.get()).map(|vdi| vdi.chain_root);
        root(one).is_some() && root(one) == root(other)
    }
}
