//! How the ids of `qemu-proto`, which knows nothing of serde, are stored: as the bare number.

/// For `#[serde(with = "ids::vdi_id")]`.
pub mod vdi_id {
    use qemu_proto::oid::VdiId;
    use serde::{Deserialize, Deserializer, Serializer};

    /// The 24-bit number.
    pub fn serialize<S: Serializer>(id: &VdiId, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_u32(id.get())
    }

    /// Refuses numbers of more than 24 bits.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<VdiId, D::Error> {
        VdiId::new(u32::deserialize(deserializer)?).ok_or_else(|| serde::de::Error::custom("VDI id above 24 bits"))
    }
}

/// For `#[serde(with = "ids::vdi_id_option")]`.
pub mod vdi_id_option {
    use qemu_proto::oid::VdiId;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// The number, or nothing.
    pub fn serialize<S: Serializer>(id: &Option<VdiId>, serializer: S) -> Result<S::Ok, S::Error> {
        id.map(VdiId::get).serialize(serializer)
    }

    /// Refuses numbers of more than 24 bits.
    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Option<VdiId>, D::Error> {
        match Option::<u32>::deserialize(deserializer)? {
            None => Ok(None),
            Some(raw) => VdiId::new(raw).map(Some).ok_or_else(|| serde::de::Error::custom("VDI id above 24 bits")),
        }
    }
}
