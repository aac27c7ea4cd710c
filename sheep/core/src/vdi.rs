//! One volume, snapshot or clone as the ordered state knows it.
//!
//! Always holds:
//! 1. A VDI id is given out once and never again; a deleted VDI keeps its entry, so that the run of ids of a name stays
//!    without holes (QEMU stops listing snapshots at the first one).
//! 2. `snapshot_time` is set once and never cleared: a snapshot stays one.
//! 3. `chain_root` is the id at which the chain of snapshots of one name began; a clone begins a chain of its own.
//!    Objects are placed by it, so every generation of a block has the same holders.
//! 4. A VDI that is being restored is neither working VDI nor snapshot: it has no number yet, and no name finds it.

use alloc::vec::Vec;
use qemu_proto::oid::VdiId;
use serde::{Deserialize, Serialize};

use crate::copies::Copies;
use crate::ids;

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Vdi {
    /// Its own id.
    #[serde(with = "ids::vdi_id")]
    pub id: VdiId,
    /// 1 to 255 bytes; kept after a delete for messages, lookups skip deleted ones.
    pub name: Vec<u8>,
    /// The snapshot's tag; may be empty.
    pub tag: Vec<u8>,
    /// 1, 2, 3... within the name, in the order in which they became findable; 0 while it is being restored.
    pub snapshot_id: u32,
    /// What it was snapshotted or cloned from.
    #[serde(with = "ids::vdi_id_option")]
    pub parent: Option<VdiId>,
    /// See invariant 3.
    #[serde(with = "ids::vdi_id")]
    pub chain_root: VdiId,
    /// Bytes.
    pub size_bytes: u64,
    /// Copies of each object, 1 to 31; the same in the whole chain.
    pub copies: Copies,
    /// log2 of the object size, 20 to 31.
    pub object_size_shift: u8,
    /// Wire encoding: seconds in the upper half, nanoseconds in the lower.
    pub create_time: u64,
    /// As `create_time`; 0 while it is not a snapshot.
    pub snapshot_time: u64,
    /// Bytes of machine state saved with the snapshot.
    pub vm_state_bytes: u64,
    /// Guest clock of the saved machine state.
    pub vm_clock_ns: u64,
    /// Whether it was deleted.
    pub deleted: bool,
}

impl Vdi {
    /// Whether its data can no longer change.
    pub fn is_snapshot(&self) -> bool {
        self.snapshot_time != 0
    }

    /// Whether its data is still being put together; then it becomes a snapshot at once, or never.
    pub fn is_being_restored(&self) -> bool {
        self.snapshot_id == 0
    }

    /// Bytes of one of its objects.
    pub fn object_bytes(&self) -> u64 {
        1 << self.object_size_shift
    }

    /// Objects that its size spans.
    pub fn object_count(&self) -> u64 {
        self.size_bytes.div_ceil(self.object_bytes())
    }
}
