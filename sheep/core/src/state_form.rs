//! How the ordered state is written: the parts that every version has, then, from their level on, those that came later.
//!
//! A state of an earlier level is the same bytes as the version of that level writes and reads, because a later part is empty
//! until something of its level was ordered, and is left out.

use core::fmt;

use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use serde::de::{Error, SeqAccess, Visitor};
use serde::ser::SerializeTuple;
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use crate::cluster_state::ClusterState;
use crate::level::Level;
use crate::limits::Limits;

/// Of [`Level::VOLUME_CHANGES`]: `renamed` and `limits`.
type VolumeChanges<L, R> = (R, L);

/// The parts that every version has.
struct Common(ClusterState);

struct CommonOf<'a>(&'a ClusterState);

impl Serialize for CommonOf<'_> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        // The derived function, not the one of the trait.
        ClusterState::serialize(self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Common {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Common, D::Error> {
        ClusterState::deserialize(deserializer).map(Common)
    }
}

impl Serialize for ClusterState {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let has_changes = self.level >= Level::VOLUME_CHANGES;
        let mut parts = serializer.serialize_tuple(1 + usize::from(has_changes))?;
        parts.serialize_element(&CommonOf(self))?;
        if has_changes {
            let changes: VolumeChanges<_, _> = (&self.renamed, &self.limits);
            parts.serialize_element(&changes)?;
        }
        parts.end()
    }
}

impl<'de> Deserialize<'de> for ClusterState {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<ClusterState, D::Error> {
        deserializer.deserialize_tuple(2, Parts)
    }
}

struct Parts;

impl<'de> Visitor<'de> for Parts {
    type Value = ClusterState;

    fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("the state of a cluster")
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut parts: A) -> Result<ClusterState, A::Error> {
        let cut = || A::Error::custom("the state of a cluster is cut short");
        let Common(mut state) = parts.next_element()?.ok_or_else(cut)?;
        if state.level >= Level::VOLUME_CHANGES {
            type Renamed = BTreeMap<Vec<u8>, BTreeSet<u32>>;
            let changes: VolumeChanges<BTreeMap<Vec<u8>, Limits>, Renamed> = parts.next_element()?.ok_or_else(cut)?;
            (state.renamed, state.limits) = changes;
        }
        Ok(state)
    }
}
