//! VDI attributes: a key and a value attached to a volume (protocol.md section 4.5).

use crate::bytes::{array, put, u32_at, u64_at, until_nul};
use crate::oid::{Oid, VdiId, hash_name_64};

/// Bytes of a record, and of an attribute object.
pub const ATTR_BYTES: usize = 66_320;
/// Longest value, bytes.
pub const VALUE_BYTES_MAX: usize = 65_536;
const TAG: usize = 256;
const CTIME: usize = 512;
const SNAP_ID: usize = 520;
const VALUE_LEN: usize = 524;
const KEY: usize = 528;
const VALUE: usize = 784;

const _: () = assert!(VALUE + VALUE_BYTES_MAX == ATTR_BYTES);

/// A record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct AttrRecord {
    /// The volume's name; its first byte is 0 when the attribute was deleted.
    pub name: [u8; 256],
    /// The snapshot's tag.
    pub tag: [u8; 256],
    /// The volume's creation time.
    pub ctime: u64,
    /// The snapshot's number.
    pub snap_id: u32,
    /// Bytes of the value, as the record says.
    pub value_len: u32,
    /// The key.
    pub key: [u8; 256],
    /// 65,536 bytes.
    pub value: Vec<u8>,
}

/// Not 66,320 bytes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct AttrLength(pub usize);

impl AttrRecord {
    /// The record of a payload.
    pub fn decode(bytes: &[u8]) -> Result<AttrRecord, AttrLength> {
        if bytes.len() != ATTR_BYTES {
            return Err(AttrLength(bytes.len()));
        }
        Ok(AttrRecord {
            name: array(bytes, 0),
            tag: array(bytes, TAG),
            ctime: u64_at(bytes, CTIME),
            snap_id: u32_at(bytes, SNAP_ID),
            value_len: u32_at(bytes, VALUE_LEN),
            key: array(bytes, KEY),
            value: bytes[VALUE..].to_vec(),
        })
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; ATTR_BYTES];
        put(&mut bytes, 0, &self.name);
        put(&mut bytes, TAG, &self.tag);
        put(&mut bytes, CTIME, &self.ctime.to_le_bytes());
        put(&mut bytes, SNAP_ID, &self.snap_id.to_le_bytes());
        put(&mut bytes, VALUE_LEN, &self.value_len.to_le_bytes());
        put(&mut bytes, KEY, &self.key);
        put(&mut bytes, VALUE, &self.value[..self.value.len().min(VALUE_BYTES_MAX)]);
        bytes
    }

    /// The value as long as the record says, and as there are bytes.
    pub fn value(&self) -> &[u8] {
        &self.value[..self.value.len().min(self.value_len as usize)]
    }

    /// The volume's name without its padding.
    pub fn name(&self) -> &[u8] {
        until_nul(&self.name)
    }

    /// Whether both records are of the same attribute.
    pub fn same_key(&self, other: &AttrRecord) -> bool {
        self.name == other.name && self.tag == other.tag && self.snap_id == other.snap_id && self.key == other.key
    }

    /// Where the search for the attribute begins: its id, and the VDI part of its object id.
    pub fn id(&self) -> (VdiId, u32) {
        let mut hashed = Vec::with_capacity(772);
        hashed.extend_from_slice(&self.name);
        hashed.extend_from_slice(&self.tag);
        hashed.extend_from_slice(&self.snap_id.to_le_bytes());
        hashed.extend_from_slice(&self.key);
        let vdi = VdiId::from_low_bits(hash_name_64(self.name()) as u32);
        (vdi, hash_name_64(&hashed) as u32)
    }

    /// The object at which the search begins.
    pub fn oid(&self) -> Oid {
        let (vdi, attr_id) = self.id();
        Oid::attribute(vdi, attr_id)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::names::padded;
    use crate::test_bytes::noise;

    #[test]
    fn any_record_survives() {
        let bytes = noise(1, ATTR_BYTES);
        assert_eq!(AttrRecord::decode(&bytes).unwrap().encode(), bytes);
        assert_eq!(AttrRecord::decode(&bytes[1..]), Err(AttrLength(ATTR_BYTES - 1)));
    }

    #[test]
    fn the_id_is_the_ancestors() {
        // protocol.md section 4.5: name `dg1`, no tag, key `k1`
        let record = AttrRecord {
            name: padded(b"dg1"),
            tag: padded(b""),
            ctime: 0,
            snap_id: 0,
            value_len: 0,
            key: padded(b"k1"),
            value: Vec::new(),
        };
        assert_eq!(record.id().1, 0xa934_b6e9);
        assert_eq!(record.oid().raw(), 0x205c_6e57_a934_b6e9);
    }
}
