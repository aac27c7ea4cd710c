//! The 48-byte request header, one typed body per union arm (protocol.md section 1.3).
//!
//! Decoding is total and loses nothing: any 48 bytes decode, and encode to the same bytes again. Whether a request makes
//! sense is for `frame` (lengths) and the server (meaning) to say.

use crate::bytes::{array, put, u16_at, u32_at, u64_at};
use crate::flags::RequestFlags;
use crate::oid::Oid;
use crate::opcode::{ADMIN_VERSION, Opcode};

/// Bytes of a request header, and of a response header.
pub const HEADER_BYTES: usize = 48;
const BODY: usize = 16;

/// A request header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Request {
    /// 0 (not stated), 1 or 2 below opcode 0x80; 0x0A from there.
    pub proto_ver: u8,
    /// Any byte; see [`Request::op`].
    pub opcode: u8,
    /// See [`RequestFlags`].
    pub flags: RequestFlags,
    /// 0 from clients.
    pub epoch: u32,
    /// Echoed in the answer.
    pub id: u32,
    /// Payload bytes that follow (WRITE), or bytes wanted.
    pub data_length: u32,
    /// By opcode.
    pub body: RequestBody,
}

/// The last 32 bytes of a request header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum RequestBody {
    /// Object operations.
    Object(ObjectRequest),
    /// VDI operations.
    Vdi(VdiRequest),
    /// Format, status, default copies.
    Cluster(ClusterRequest),
    /// VDI announcements and copy changes.
    VdiState(VdiStateRequest),
    /// Repair from a named node.
    Forward(ForwardRequest),
    /// Everything else.
    Raw([u8; 32]),
}

/// Body of object operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ObjectRequest {
    /// The object.
    pub oid: Oid,
    /// What to copy, with flag COW.
    pub cow_oid: Oid,
    /// 0 for "you decide".
    pub copies: u8,
    /// QEMU sends 0.
    pub copy_policy: u8,
    /// Strip number of the ancestor's erasure coding.
    pub ec_index: u8,
    /// Padding.
    pub reserved: u8,
    /// Of LOCATE_OBJECT, 0 for the current one; otherwise the ancestor's recovery only.
    pub tgt_epoch: u32,
    /// Bytes into the object.
    pub offset: u64,
}

/// Body of VDI operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VdiRequest {
    /// Bytes.
    pub vdi_size: u64,
    /// What to base on; 0 for nothing.
    pub base_vdi_id: u32,
    /// 0 for the default.
    pub copies: u8,
    /// 0 for replicas, else the erasure code.
    pub copy_policy: u8,
    /// 0 for the array map.
    pub store_policy: u8,
    /// log2 of the object size; 0 for the default.
    pub block_size_shift: u8,
    /// A snapshot's number; for NEW_VDI, whether to make a snapshot; for RESTORE_VDI, one of [`restore`].
    pub snapid: u32,
    /// 0 normal lock, 1 shared lock.
    pub lock_type: u32,
    /// Padding.
    pub reserved: u64,
}

/// What RESTORE_VDI is to do.
pub mod restore {
    /// Begin: `base_vdi_id` is the snapshot to start from; the answer names the VDI to write into.
    pub const BEGIN: u32 = 0;
    /// The VDI `base_vdi_id`, which was begun, becomes the newest snapshot.
    pub const FINISH: u32 = 1;
    /// The VDI `base_vdi_id`, which was begun, goes away.
    pub const GIVE_UP: u32 = 2;
}

/// Body of cluster operations.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct ClusterRequest {
    /// Unused by clients.
    pub oid: u64,
    /// Creation time that a format gives.
    pub ctime: u64,
    /// Default copies.
    pub copies: u8,
    /// Default policy.
    pub copy_policy: u8,
    /// Cluster flags.
    pub flags: u16,
    /// Unused.
    pub tag: u32,
    /// Nodes that the caller's buffer has room for in each epoch.
    pub nodes_nr: u32,
    /// Default object size.
    pub block_size_shift: u8,
    /// Padding.
    pub reserved: [u8; 3],
}

/// Body of VDI announcements.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct VdiStateRequest {
    /// The VDI before.
    pub old_vid: u32,
    /// The VDI.
    pub new_vid: u32,
    /// Its copies.
    pub copies: u8,
    /// Whether to mark the id as used.
    pub set_bitmap: u8,
    /// Its policy.
    pub copy_policy: u8,
    /// log2 of its object size.
    pub block_size_shift: u8,
    /// Padding.
    pub reserved: [u8; 20],
}

/// Body of REPAIR_REPLICA.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct ForwardRequest {
    /// The object.
    pub oid: Oid,
    /// Who has it.
    pub address: [u8; 16],
    /// Where.
    pub port: u16,
    /// Padding.
    pub reserved: [u8; 6],
}

impl Request {
    /// The opcode, if it means something.
    pub const fn op(&self) -> Option<Opcode> {
        Opcode::from_code(self.opcode)
    }

    fn with(opcode: Opcode, flags: RequestFlags, body: RequestBody) -> Request {
        let proto_ver = if opcode.is_public() { 0 } else { ADMIN_VERSION };
        Request { proto_ver, opcode: opcode.code(), flags, epoch: 0, id: 0, data_length: 0, body }
    }

    /// A request with an object body.
    pub fn object(opcode: Opcode, oid: Oid, flags: RequestFlags) -> Request {
        let body = ObjectRequest {
            oid,
            cow_oid: Oid::from_raw(0),
            copies: 0,
            copy_policy: 0,
            ec_index: 0,
            reserved: 0,
            tgt_epoch: 0,
            offset: 0,
        };
        Request::with(opcode, flags, RequestBody::Object(body))
    }

    /// A request with a VDI body.
    pub fn vdi(opcode: Opcode, flags: RequestFlags, body: VdiRequest) -> Request {
        Request::with(opcode, flags, RequestBody::Vdi(body))
    }

    /// A request with a cluster body.
    pub fn cluster(opcode: Opcode, flags: RequestFlags, body: ClusterRequest) -> Request {
        Request::with(opcode, flags, RequestBody::Cluster(body))
    }

    /// A request whose body is all zeros.
    pub fn plain(opcode: Opcode) -> Request {
        let mut request = Request::with(opcode, RequestFlags::NONE, RequestBody::Raw([0; 32]));
        request.body = RequestBody::decode(opcode.code(), &[0; 32]);
        request
    }

    /// Any 48 bytes are a request.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Request {
        Request {
            proto_ver: bytes[0],
            opcode: bytes[1],
            flags: RequestFlags::from_bits(u16_at(bytes, 2)),
            epoch: u32_at(bytes, 4),
            id: u32_at(bytes, 8),
            data_length: u32_at(bytes, 12),
            body: RequestBody::decode(bytes[1], &array(bytes, BODY)),
        }
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.proto_ver;
        bytes[1] = self.opcode;
        put(&mut bytes, 2, &self.flags.bits().to_le_bytes());
        put(&mut bytes, 4, &self.epoch.to_le_bytes());
        put(&mut bytes, 8, &self.id.to_le_bytes());
        put(&mut bytes, 12, &self.data_length.to_le_bytes());
        put(&mut bytes, BODY, &self.body.encode());
        bytes
    }
}

impl RequestBody {
    fn decode(opcode: u8, bytes: &[u8; 32]) -> RequestBody {
        use Opcode as O;
        match Opcode::from_code(opcode) {
            Some(
                O::CreateAndWriteObj
                | O::ReadObj
                | O::WriteObj
                | O::RemoveObj
                | O::DiscardObj
                | O::FlushVdi
                | O::CreateAndWritePeer
                | O::ReadPeer
                | O::GetHash
                | O::Exist
                | O::CheckObject
                | O::LocateObject,
            ) => RequestBody::Object(ObjectRequest {
                oid: Oid::from_raw(u64_at(bytes, 0)),
                cow_oid: Oid::from_raw(u64_at(bytes, 8)),
                copies: bytes[16],
                copy_policy: bytes[17],
                ec_index: bytes[18],
                reserved: bytes[19],
                tgt_epoch: u32_at(bytes, 20),
                offset: u64_at(bytes, 24),
            }),
            Some(
                O::NewVdi
                | O::LockVdi
                | O::ReleaseVdi
                | O::GetVdiInfo
                | O::DelVdi
                | O::GetVdiAttr
                | O::RestoreVdi
                | O::DescribeVdis,
            ) => RequestBody::Vdi(VdiRequest {
                vdi_size: u64_at(bytes, 0),
                base_vdi_id: u32_at(bytes, 8),
                copies: bytes[12],
                copy_policy: bytes[13],
                store_policy: bytes[14],
                block_size_shift: bytes[15],
                snapid: u32_at(bytes, 16),
                lock_type: u32_at(bytes, 20),
                reserved: u64_at(bytes, 24),
            }),
            Some(O::MakeFs | O::StatCluster | O::AlterClusterCopy) => RequestBody::Cluster(ClusterRequest {
                oid: u64_at(bytes, 0),
                ctime: u64_at(bytes, 8),
                copies: bytes[16],
                copy_policy: bytes[17],
                flags: u16_at(bytes, 18),
                tag: u32_at(bytes, 20),
                nodes_nr: u32_at(bytes, 24),
                block_size_shift: bytes[28],
                reserved: array(bytes, 29),
            }),
            Some(O::NotifyVdiAdd | O::AlterVdiCopy) => RequestBody::VdiState(VdiStateRequest {
                old_vid: u32_at(bytes, 0),
                new_vid: u32_at(bytes, 4),
                copies: bytes[8],
                set_bitmap: bytes[9],
                copy_policy: bytes[10],
                block_size_shift: bytes[11],
                reserved: array(bytes, 12),
            }),
            Some(O::RepairReplica) => RequestBody::Forward(ForwardRequest {
                oid: Oid::from_raw(u64_at(bytes, 0)),
                address: array(bytes, 8),
                port: u16_at(bytes, 24),
                reserved: array(bytes, 26),
            }),
            _ => RequestBody::Raw(*bytes),
        }
    }

    fn encode(&self) -> [u8; 32] {
        let mut bytes = [0; 32];
        match self {
            RequestBody::Object(body) => {
                put(&mut bytes, 0, &body.oid.raw().to_le_bytes());
                put(&mut bytes, 8, &body.cow_oid.raw().to_le_bytes());
                put(&mut bytes, 16, &[body.copies, body.copy_policy, body.ec_index, body.reserved]);
                put(&mut bytes, 20, &body.tgt_epoch.to_le_bytes());
                put(&mut bytes, 24, &body.offset.to_le_bytes());
            }
            RequestBody::Vdi(body) => {
                put(&mut bytes, 0, &body.vdi_size.to_le_bytes());
                put(&mut bytes, 8, &body.base_vdi_id.to_le_bytes());
                put(&mut bytes, 12, &[body.copies, body.copy_policy, body.store_policy, body.block_size_shift]);
                put(&mut bytes, 16, &body.snapid.to_le_bytes());
                put(&mut bytes, 20, &body.lock_type.to_le_bytes());
                put(&mut bytes, 24, &body.reserved.to_le_bytes());
            }
            RequestBody::Cluster(body) => {
                put(&mut bytes, 0, &body.oid.to_le_bytes());
                put(&mut bytes, 8, &body.ctime.to_le_bytes());
                put(&mut bytes, 16, &[body.copies, body.copy_policy]);
                put(&mut bytes, 18, &body.flags.to_le_bytes());
                put(&mut bytes, 20, &body.tag.to_le_bytes());
                put(&mut bytes, 24, &body.nodes_nr.to_le_bytes());
                bytes[28] = body.block_size_shift;
                put(&mut bytes, 29, &body.reserved);
            }
            RequestBody::VdiState(body) => {
                put(&mut bytes, 0, &body.old_vid.to_le_bytes());
                put(&mut bytes, 4, &body.new_vid.to_le_bytes());
                put(&mut bytes, 8, &[body.copies, body.set_bitmap, body.copy_policy, body.block_size_shift]);
                put(&mut bytes, 12, &body.reserved);
            }
            RequestBody::Forward(body) => {
                put(&mut bytes, 0, &body.oid.raw().to_le_bytes());
                put(&mut bytes, 8, &body.address);
                put(&mut bytes, 24, &body.port.to_le_bytes());
                put(&mut bytes, 26, &body.reserved);
            }
            RequestBody::Raw(raw) => bytes = *raw,
        }
        bytes
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::test_bytes::noise;

    #[test]
    fn any_bytes_survive_decoding_and_encoding() {
        for opcode in 0..=u8::MAX {
            for seed in 0..20 {
                let mut bytes: [u8; HEADER_BYTES] = array(&noise(u64::from(opcode) * 100 + seed, HEADER_BYTES), 0);
                bytes[1] = opcode;
                assert_eq!(Request::decode(&bytes).encode(), bytes, "opcode {opcode:#x}");
            }
        }
    }

    #[test]
    fn requests_of_qemu_are_read_as_they_were_seen() {
        // protocol.md appendix A
        let mut lock = [0; HEADER_BYTES];
        lock[..16].copy_from_slice(&[1, 0x12, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0]);
        let request = Request::decode(&lock);
        assert_eq!((request.proto_ver, request.op(), request.data_length), (1, Some(Opcode::LockVdi), 512));
        assert_eq!(request.body, RequestBody::Vdi(VdiRequest::default()));
        let mut cow = Request::object(
            Opcode::CreateAndWriteObj,
            Oid::from_raw(0x0072_d498_0000_0000),
            RequestFlags::from_bits(0x0b),
        );
        cow.data_length = 4096;
        if let RequestBody::Object(body) = &mut cow.body {
            body.cow_oid = Oid::from_raw(0x0072_d497_0000_0000);
            body.offset = 4096;
        }
        let bytes = cow.encode();
        assert_eq!(bytes[..4], [0, 1, 0x0b, 0]);
        assert_eq!(bytes[16..24], [0, 0, 0, 0, 0x98, 0xd4, 0x72, 0]);
        assert_eq!(bytes[40..48], [0, 0x10, 0, 0, 0, 0, 0, 0]);
    }
}
