//! Object ids and VDI ids: newtypes and their bit layout (protocol.md section 4).
//!
//! ```text
//! bit 63     inode object          bits 32..55  VDI id, 24 bits
//! bit 62     vmstate object        bits 0..31   object index
//! bit 61     attribute object
//! bit 60     btree node            bits 56..58  reserved, zero
//! bit 59     ledger object
//! ```

use core::fmt;

/// Bits of a VDI id.
pub const VDI_ID_BITS: u32 = 24;
const VDI_ID_MASK: u32 = (1 << VDI_ID_BITS) - 1;
const INODE_BIT: u64 = 1 << 63;
const VMSTATE_BIT: u64 = 1 << 62;
const ATTRIBUTE_BIT: u64 = 1 << 61;
const BTREE_BIT: u64 = 1 << 60;
const LEDGER_BIT: u64 = 1 << 59;
const KIND_BITS: u64 = INODE_BIT | VMSTATE_BIT | ATTRIBUTE_BIT | BTREE_BIT | LEDGER_BIT;
const RESERVED_BITS: u64 = 0b111 << 56;

/// FNV-1a, 64 bits: the hash behind every VDI id.
pub const fn hash_name_64(bytes: &[u8]) -> u64 {
    let mut hash = 0xcbf2_9ce4_8422_2325_u64;
    let mut index = 0;
    while index < bytes.len() {
        hash = (hash ^ bytes[index] as u64).wrapping_mul(0x0000_0100_0000_01b3);
        index += 1;
    }
    hash
}

/// A VDI's id: 24 bits.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct VdiId(u32);

impl VdiId {
    /// `None` for numbers of more than 24 bits.
    pub const fn new(raw: u32) -> Option<VdiId> {
        if raw > VDI_ID_MASK { None } else { Some(VdiId(raw)) }
    }

    /// The low 24 bits of a number.
    pub const fn from_low_bits(raw: u32) -> VdiId {
        VdiId(raw & VDI_ID_MASK)
    }

    /// Where the search for a free id of this name begins; never 0, which means "no VDI" in maps.
    pub const fn from_name_hash(name: &[u8]) -> VdiId {
        let id = hash_name_64(name) as u32 & VDI_ID_MASK;
        VdiId(if id == 0 { 1 } else { id })
    }

    /// The bare number.
    pub const fn get(self) -> u32 {
        self.0
    }
}

impl fmt::Display for VdiId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:x}", self.0)
    }
}

impl fmt::Debug for VdiId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "VdiId({:06x})", self.0)
    }
}

/// What an object is, told from the upper bits of its id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum ObjectKind {
    /// A piece of a volume.
    Data,
    /// A volume's header and map.
    Inode,
    /// Saved machine state.
    Vmstate,
    /// A key and its value attached to a volume.
    Attribute,
    /// A map node of a hyper volume.
    BtreeNode,
    /// Reference counts of a data object, as the ancestor kept them.
    Ledger,
}

/// An object's id.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Oid(u64);

impl Oid {
    /// Any 64 bits; [`Oid::kind`] tells whether they mean something.
    pub const fn from_raw(raw: u64) -> Oid {
        Oid(raw)
    }

    /// The bare number.
    pub const fn raw(self) -> u64 {
        self.0
    }

    /// The data object at an index of a VDI's own map.
    pub const fn data(vdi: VdiId, index: u32) -> Oid {
        Oid((vdi.0 as u64) << 32 | index as u64)
    }

    /// The inode of a VDI.
    pub const fn inode(vdi: VdiId) -> Oid {
        Oid(INODE_BIT | (vdi.0 as u64) << 32)
    }

    /// A piece of a VDI's saved machine state.
    pub const fn vmstate(vdi: VdiId, index: u32) -> Oid {
        Oid(VMSTATE_BIT | (vdi.0 as u64) << 32 | index as u64)
    }

    /// An attribute; `name_hash` is the plain hash of the VDI's name, not its id.
    pub const fn attribute(name_hash: VdiId, attribute_id: u32) -> Oid {
        Oid(ATTRIBUTE_BIT | (name_hash.0 as u64) << 32 | attribute_id as u64)
    }

    /// A map node of a hyper volume.
    pub const fn btree(vdi: VdiId, counter: u32) -> Oid {
        Oid(BTREE_BIT | (vdi.0 as u64) << 32 | counter as u64)
    }

    /// The ancestor's ledger of a data object.
    pub const fn ledger(data: Oid) -> Oid {
        Oid(LEDGER_BIT | data.0)
    }

    /// `None` if reserved bits are set or the kind is ambiguous.
    pub const fn kind(self) -> Option<ObjectKind> {
        if self.0 & RESERVED_BITS != 0 {
            return None;
        }
        match self.0 & KIND_BITS {
            0 => Some(ObjectKind::Data),
            INODE_BIT => Some(ObjectKind::Inode),
            VMSTATE_BIT => Some(ObjectKind::Vmstate),
            ATTRIBUTE_BIT => Some(ObjectKind::Attribute),
            BTREE_BIT => Some(ObjectKind::BtreeNode),
            LEDGER_BIT => Some(ObjectKind::Ledger),
            _ => None,
        }
    }

    /// The VDI id in the middle bits.
    pub const fn vid(self) -> VdiId {
        VdiId((self.0 >> 32) as u32 & VDI_ID_MASK)
    }

    /// The low 32 bits.
    pub const fn index(self) -> u32 {
        self.0 as u32
    }
}

impl fmt::Display for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl fmt::Debug for Oid {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Oid({:016x})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_hash_to_the_ids_the_ancestor_gives() {
        // protocol.md section 4.2, returned by the real server
        for (name, hash, id) in [
            ("test", 0xf9e6_e6ef_197c_2b25, 0x7c_2b25),
            ("vm1", 0x68f6_5f19_4ec5_9887, 0xc5_9887),
            ("alpha", 0x8ac6_25bb_85ed_202b, 0xed_202b),
            ("Ubuntu-20.04", 0x0ddd_5171_d471_24af, 0x71_24af),
            ("x", 0xaf63_f54c_8602_1707, 0x02_1707),
            ("data_disk:1", 0x4bf0_1d72_bfe1_6a86, 0xe1_6a86),
            ("日本", 0x121d_7e35_a6d3_ce91, 0xd3_ce91),
        ] {
            assert_eq!(hash_name_64(name.as_bytes()), hash, "{name}");
            assert_eq!(VdiId::from_name_hash(name.as_bytes()).get(), id, "{name}");
        }
        let collision = VdiId::from_name_hash(b"col34469");
        assert_eq!(collision, VdiId::from_name_hash(b"col65874"));
        assert_eq!(collision.get(), 0x4f_0e0b);
    }

    #[test]
    fn every_kind_is_told_from_its_bits() {
        let vdi = VdiId::from_low_bits(0xff7c_2b25);
        assert_eq!(vdi.get(), 0x7c_2b25);
        let data = Oid::data(vdi, 0xffff_ffff);
        for (oid, kind, raw) in [
            (data, ObjectKind::Data, 0x007c_2b25_ffff_ffff_u64),
            (Oid::inode(vdi), ObjectKind::Inode, 0x807c_2b25_0000_0000),
            (Oid::vmstate(vdi, 1), ObjectKind::Vmstate, 0x407c_2b25_0000_0001),
            (Oid::attribute(vdi, 2), ObjectKind::Attribute, 0x207c_2b25_0000_0002),
            (Oid::btree(vdi, 3), ObjectKind::BtreeNode, 0x107c_2b25_0000_0003),
            (Oid::ledger(data), ObjectKind::Ledger, 0x087c_2b25_ffff_ffff),
        ] {
            assert_eq!(oid.raw(), raw);
            assert_eq!(oid.kind(), Some(kind));
            assert_eq!(oid.vid(), vdi);
        }
        assert_eq!(Oid::from_raw(1 << 57).kind(), None);
        assert_eq!(Oid::from_raw(3 << 62).kind(), None);
    }
}
