//! The 48-byte response header (protocol.md section 1.6). Decoding is total and loses nothing.

use crate::bytes::{array, put, u16_at, u32_at, u64_at};
use crate::opcode::Opcode;
use crate::request::{HEADER_BYTES, Request};
use crate::status::Status;

const BODY: usize = 20;
const BODY_BYTES: usize = HEADER_BYTES - BODY;

/// A response header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Response {
    /// 0.
    pub proto_ver: u8,
    /// The request's.
    pub opcode: u8,
    /// 0.
    pub flags: u16,
    /// The cluster's epoch.
    pub epoch: u32,
    /// The request's.
    pub id: u32,
    /// Bytes that follow.
    pub data_length: u32,
    /// See [`Response::status`].
    pub result: u32,
    /// By opcode.
    pub body: ResponseBody,
}

/// The last 28 bytes of a response header.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum ResponseBody {
    /// Object operations.
    Object {
        /// Copies that took part.
        copies: u8,
        /// Padding.
        reserved: [u8; 3],
        /// 0.
        offset: u64,
        /// Padding.
        rest: [u8; 16],
    },
    /// VDI operations.
    Vdi {
        /// Padding.
        reserved: u32,
        /// The VDI.
        vdi_id: u32,
        /// The attribute.
        attr_id: u32,
        /// The VDI's copies.
        copies: u8,
        /// log2 of its object size.
        block_size_shift: u8,
        /// Padding.
        rest: [u8; 14],
    },
    /// GET_CLUSTER_DEFAULT.
    ClusterDefault {
        /// Copies.
        nr_copies: u8,
        /// Policy.
        copy_policy: u8,
        /// log2 of the object size.
        block_size_shift: u8,
        /// Padding.
        rest: [u8; 25],
    },
    /// Node list and space.
    Node {
        /// Nodes in the payload.
        nr_nodes: u32,
        /// Padding.
        reserved: [u8; 8],
        /// Bytes in all.
        store_size: u64,
        /// Bytes free.
        store_free: u64,
    },
    /// GET_HASH.
    Hash {
        /// Padding.
        reserved: u32,
        /// SHA-1.
        digest: [u8; 20],
        /// Padding.
        rest: [u8; 4],
    },
    /// CHECK_OBJECT.
    Check {
        /// Copies there should be.
        wanted: u32,
        /// Copies that are good now.
        good: u32,
        /// Copies that were replaced.
        repaired: u32,
        /// Copies that could not be.
        unrepairable: u32,
        /// Padding.
        rest: [u8; 12],
    },
    /// Everything else.
    Raw([u8; BODY_BYTES]),
}

impl ResponseBody {
    /// All zeros.
    pub const NONE: ResponseBody = ResponseBody::Raw([0; BODY_BYTES]);

    /// The body of VDI operations.
    pub const fn vdi(vdi_id: u32, attr_id: u32, copies: u8, block_size_shift: u8) -> ResponseBody {
        ResponseBody::Vdi { reserved: 0, vdi_id, attr_id, copies, block_size_shift, rest: [0; 14] }
    }

    /// The body of node operations.
    pub const fn node(nr_nodes: u32, store_size: u64, store_free: u64) -> ResponseBody {
        ResponseBody::Node { nr_nodes, reserved: [0; 8], store_size, store_free }
    }

    fn decode(opcode: u8, bytes: &[u8; BODY_BYTES]) -> ResponseBody {
        use Opcode as O;
        match Opcode::from_code(opcode) {
            Some(O::CreateAndWriteObj | O::ReadObj | O::WriteObj | O::RemoveObj | O::DiscardObj | O::FlushVdi) => {
                ResponseBody::Object {
                    copies: bytes[0],
                    reserved: array(bytes, 1),
                    offset: u64_at(bytes, 4),
                    rest: array(bytes, 12),
                }
            }
            Some(
                O::NewVdi | O::LockVdi | O::ReleaseVdi | O::GetVdiInfo | O::DelVdi | O::GetVdiAttr | O::RestoreVdi,
            ) => ResponseBody::Vdi {
                reserved: u32_at(bytes, 0),
                vdi_id: u32_at(bytes, 4),
                attr_id: u32_at(bytes, 8),
                copies: bytes[12],
                block_size_shift: bytes[13],
                rest: array(bytes, 14),
            },
            Some(O::GetClusterDefault) => ResponseBody::ClusterDefault {
                nr_copies: bytes[0],
                copy_policy: bytes[1],
                block_size_shift: bytes[2],
                rest: array(bytes, 3),
            },
            Some(O::GetNodeList | O::StatSheep) => ResponseBody::Node {
                nr_nodes: u32_at(bytes, 0),
                reserved: array(bytes, 4),
                store_size: u64_at(bytes, 12),
                store_free: u64_at(bytes, 20),
            },
            Some(O::GetHash) => {
                ResponseBody::Hash { reserved: u32_at(bytes, 0), digest: array(bytes, 4), rest: array(bytes, 24) }
            }
            Some(O::CheckObject) => ResponseBody::Check {
                wanted: u32_at(bytes, 0),
                good: u32_at(bytes, 4),
                repaired: u32_at(bytes, 8),
                unrepairable: u32_at(bytes, 12),
                rest: array(bytes, 16),
            },
            _ => ResponseBody::Raw(*bytes),
        }
    }

    fn encode(&self) -> [u8; BODY_BYTES] {
        let mut bytes = [0; BODY_BYTES];
        match self {
            ResponseBody::Object { copies, reserved, offset, rest } => {
                bytes[0] = *copies;
                put(&mut bytes, 1, reserved);
                put(&mut bytes, 4, &offset.to_le_bytes());
                put(&mut bytes, 12, rest);
            }
            ResponseBody::Vdi { reserved, vdi_id, attr_id, copies, block_size_shift, rest } => {
                put(&mut bytes, 0, &reserved.to_le_bytes());
                put(&mut bytes, 4, &vdi_id.to_le_bytes());
                put(&mut bytes, 8, &attr_id.to_le_bytes());
                put(&mut bytes, 12, &[*copies, *block_size_shift]);
                put(&mut bytes, 14, rest);
            }
            ResponseBody::ClusterDefault { nr_copies, copy_policy, block_size_shift, rest } => {
                put(&mut bytes, 0, &[*nr_copies, *copy_policy, *block_size_shift]);
                put(&mut bytes, 3, rest);
            }
            ResponseBody::Node { nr_nodes, reserved, store_size, store_free } => {
                put(&mut bytes, 0, &nr_nodes.to_le_bytes());
                put(&mut bytes, 4, reserved);
                put(&mut bytes, 12, &store_size.to_le_bytes());
                put(&mut bytes, 20, &store_free.to_le_bytes());
            }
            ResponseBody::Hash { reserved, digest, rest } => {
                put(&mut bytes, 0, &reserved.to_le_bytes());
                put(&mut bytes, 4, digest);
                put(&mut bytes, 24, rest);
            }
            ResponseBody::Check { wanted, good, repaired, unrepairable, rest } => {
                put(&mut bytes, 0, &wanted.to_le_bytes());
                put(&mut bytes, 4, &good.to_le_bytes());
                put(&mut bytes, 8, &repaired.to_le_bytes());
                put(&mut bytes, 12, &unrepairable.to_le_bytes());
                put(&mut bytes, 16, rest);
            }
            ResponseBody::Raw(raw) => bytes = *raw,
        }
        bytes
    }
}

impl Response {
    /// The answer to a request that failed: no body, no payload.
    pub fn error(request: &Request, status: Status, epoch: u32) -> Response {
        Response { result: status.code(), ..Response::success(request, epoch, ResponseBody::NONE, 0) }
    }

    /// The answer to a request that was done.
    pub fn success(request: &Request, epoch: u32, body: ResponseBody, data_length: u32) -> Response {
        Response {
            proto_ver: 0,
            opcode: request.opcode,
            flags: 0,
            epoch,
            id: request.id,
            data_length,
            result: Status::Success.code(),
            body,
        }
    }

    /// The result, if it means something.
    pub const fn status(&self) -> Option<Status> {
        Status::from_code(self.result)
    }

    /// Any 48 bytes are a response.
    pub fn decode(bytes: &[u8; HEADER_BYTES]) -> Response {
        Response {
            proto_ver: bytes[0],
            opcode: bytes[1],
            flags: u16_at(bytes, 2),
            epoch: u32_at(bytes, 4),
            id: u32_at(bytes, 8),
            data_length: u32_at(bytes, 12),
            result: u32_at(bytes, 16),
            body: ResponseBody::decode(bytes[1], &array(bytes, BODY)),
        }
    }

    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0] = self.proto_ver;
        bytes[1] = self.opcode;
        put(&mut bytes, 2, &self.flags.to_le_bytes());
        put(&mut bytes, 4, &self.epoch.to_le_bytes());
        put(&mut bytes, 8, &self.id.to_le_bytes());
        put(&mut bytes, 12, &self.data_length.to_le_bytes());
        put(&mut bytes, 16, &self.result.to_le_bytes());
        put(&mut bytes, BODY, &self.body.encode());
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
                assert_eq!(Response::decode(&bytes).encode(), bytes, "opcode {opcode:#x}");
            }
        }
    }

    #[test]
    fn the_answer_to_a_lock_is_read_as_it_was_seen() {
        // protocol.md appendix A: name `test`, epoch 1
        let mut bytes = [0; HEADER_BYTES];
        bytes[1] = 0x12;
        bytes[4] = 1;
        bytes[24..28].copy_from_slice(&[0x25, 0x2b, 0x7c, 0]);
        bytes[32..34].copy_from_slice(&[2, 0x16]);
        let response = Response::decode(&bytes);
        assert_eq!(response.status(), Some(Status::Success));
        assert_eq!(response.body, ResponseBody::vdi(0x7c_2b25, 0, 2, 22));
    }
}
