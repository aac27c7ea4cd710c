//! Meta contexts: what a client may ask about ranges besides their content.

use qemu_proto::oid::VdiId;
use sheep_core::cluster_state::ClusterState;
use sheep_core::vdi::Vdi;

use crate::data::virtual_disk::{DiskError, Extent};

use super::export::Export;

const ALLOCATION: &str = "base:allocation";
const CHANGED_SINCE: &str = "qemu:dirty-bitmap:since-";
/// Bits of base:allocation: nothing is allocated, and it reads as zeros.
const STATE_HOLE_ZERO: u64 = 3;
/// Bit of a dirty bitmap.
const STATE_DIRTY: u64 = 1;

/// One thing that can be asked.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Context {
    /// Which parts are allocated.
    Allocation,
    /// Which parts changed since a snapshot of the same chain.
    ChangedSince(VdiId, String),
}

impl Context {
    /// Its name on the wire.
    pub fn name(&self) -> String {
        match self {
            Context::Allocation => ALLOCATION.to_string(),
            Context::ChangedSince(_, tag) => format!("{CHANGED_SINCE}{tag}"),
        }
    }

    /// Lengths and state bits of a range, in order.
    pub async fn extents(&self, export: &Export, offset: u64, length: u64) -> Result<Vec<(u64, u64)>, DiskError> {
        let (extents, set, unset) = match self {
            Context::Allocation => (export.disk.allocated(offset, length).await?, 0, STATE_HOLE_ZERO),
            Context::ChangedSince(id, _) => (export.disk.changed_since(*id, offset, length).await?, STATE_DIRTY, 0),
        };
        Ok(extents.into_iter().map(|Extent { length, is_set }| (length, if is_set { set } else { unset })).collect())
    }
}

/// Every context of an export.
fn all(state: &ClusterState, export: &Export) -> Vec<Context> {
    let mut found = vec![Context::Allocation];
    let Ok(id) = export.disk.id() else { return found };
    let parent_of = |vdi: &Vdi| vdi.parent.and_then(|parent| state.vdis.get(&parent.get()));
    let mut at = state.vdis.get(&id.get()).and_then(|vdi| parent_of(vdi));
    while let Some(vdi) = at {
        if !vdi.deleted && vdi.is_snapshot() {
            let tag = String::from_utf8_lossy(&vdi.tag).into_owned();
            let label = if tag.is_empty() { vdi.snapshot_id.to_string() } else { tag };
            found.push(Context::ChangedSince(vdi.id, label));
        }
        at = parent_of(vdi);
    }
    found
}

/// The contexts that a query asks for. While listing, a query may be a namespace (`base:`, `qemu:`, `qemu:dirty-bitmap:`).
pub fn matching(state: &ClusterState, export: &Export, queries: &[String], is_listing: bool) -> Vec<Context> {
    let mut found = all(state, export);
    if !(is_listing && queries.is_empty()) {
        found.retain(|context| {
            let name = context.name();
            let wanted = |query: &String| {
                let is_namespace = is_listing && query.ends_with(':') && name.starts_with(query.as_str());
                *query == name || is_namespace
            };
            queries.iter().any(wanted)
        });
    }
    found
}
