//! Request flag bits (protocol.md section 1.4).

use core::ops::BitOr;

/// The `flags` field of a request.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug, Default)]
pub struct RequestFlags(u16);

impl RequestFlags {
    /// None.
    pub const NONE: RequestFlags = RequestFlags(0);
    /// Payload follows the header.
    pub const WRITE: RequestFlags = RequestFlags(0x0001);
    /// Create as a copy of `cow_oid`.
    pub const COW: RequestFlags = RequestFlags(0x0002);
    /// The client flushes when it needs durability.
    pub const CACHE: RequestFlags = RequestFlags(0x0004);
    /// Durable when answered.
    pub const DIRECT: RequestFlags = RequestFlags(0x0008);
    /// With WRITE: the answer carries data too.
    pub const PIGGYBACK: RequestFlags = RequestFlags(0x0010);
    /// From the iSCSI target.
    pub const TGT: RequestFlags = RequestFlags(0x0020);
    /// The ancestor's: a request issued again inside the server.
    pub const FWD: RequestFlags = RequestFlags(0x0040);
    /// The ancestor's: a request of recovery.
    pub const RECOVERY: RequestFlags = RequestFlags(0x0080);
    /// Attribute: make it.
    pub const CREAT: RequestFlags = RequestFlags(0x0100);
    /// Attribute: refuse if it exists.
    pub const EXCL: RequestFlags = RequestFlags(0x0200);
    /// Attribute: delete it.
    pub const DEL: RequestFlags = RequestFlags(0x0400);

    /// Any 16 bits.
    pub const fn from_bits(bits: u16) -> RequestFlags {
        RequestFlags(bits)
    }

    /// The bits on the wire.
    pub const fn bits(self) -> u16 {
        self.0
    }

    /// Whether all bits of `other` are set.
    pub const fn contains(self, other: RequestFlags) -> bool {
        self.0 & other.0 == other.0
    }
}

impl BitOr for RequestFlags {
    type Output = RequestFlags;

    fn bitor(self, other: RequestFlags) -> RequestFlags {
        RequestFlags(self.0 | other.0)
    }
}
