//! Cluster status, epoch history and VDI states (protocol.md sections 2.2 and 2.5).

use crate::bytes::{array, put, u16_at, u32_at, u64_at, until_nul};
use crate::node_entry::{NODE_BYTES, NODES_MAX, NodeEntry};

/// Bytes of the answer to CLUSTER_INFO.
pub const CLUSTER_INFO_BYTES: usize = 48 + NODES_MAX * NODE_BYTES;
/// Bytes of an epoch record before its nodes.
pub const EPOCH_BYTES: usize = 48;
/// Bytes of a VDI state.
pub const VDI_STATE_BYTES: usize = 1428;

const _: () = assert!(CLUSTER_INFO_BYTES == 491_568);

/// The answer to CLUSTER_INFO.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct ClusterInfo {
    /// 0x0A.
    pub proto_ver: u8,
    /// 1 while recovery is held.
    pub disable_recovery: u8,
    /// Current epoch.
    pub epoch: u32,
    /// When it was formatted; 0 before.
    pub ctime: u64,
    /// Cluster flags.
    pub flags: u16,
    /// Default copies.
    pub nr_copies: u8,
    /// Default policy.
    pub copy_policy: u8,
    /// 1 ok, 2 waiting, 3 shut down, 4 killed.
    pub status: u8,
    /// log2 of the default object size.
    pub block_size_shift: u8,
    /// Name of the store, at most 16 bytes.
    pub default_store: [u8; 16],
    /// The members.
    pub nodes: Vec<NodeEntry>,
}

/// Too short for what it says it holds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Truncated;

impl ClusterInfo {
    /// The bytes on the wire: always the full size, whatever the number of nodes.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; CLUSTER_INFO_BYTES];
        bytes[0] = self.proto_ver;
        bytes[1] = self.disable_recovery;
        put(&mut bytes, 2, &(self.nodes.len().min(NODES_MAX) as u16).to_le_bytes());
        put(&mut bytes, 4, &self.epoch.to_le_bytes());
        put(&mut bytes, 8, &self.ctime.to_le_bytes());
        put(&mut bytes, 16, &self.flags.to_le_bytes());
        put(&mut bytes, 18, &[self.nr_copies, self.copy_policy, self.status, self.block_size_shift]);
        put(&mut bytes, 25, &self.default_store);
        for (index, node) in self.nodes.iter().take(NODES_MAX).enumerate() {
            put(&mut bytes, 48 + index * NODE_BYTES, &node.encode());
        }
        bytes
    }

    /// Reads an answer.
    pub fn decode(bytes: &[u8]) -> Result<ClusterInfo, Truncated> {
        if bytes.len() < 48 {
            return Err(Truncated);
        }
        let count = usize::from(u16_at(bytes, 2));
        if count > NODES_MAX || bytes.len() < 48 + count * NODE_BYTES {
            return Err(Truncated);
        }
        Ok(ClusterInfo {
            proto_ver: bytes[0],
            disable_recovery: bytes[1],
            epoch: u32_at(bytes, 4),
            ctime: u64_at(bytes, 8),
            flags: u16_at(bytes, 16),
            nr_copies: bytes[18],
            copy_policy: bytes[19],
            status: bytes[20],
            block_size_shift: bytes[21],
            default_store: array(bytes, 25),
            nodes: NodeEntry::decode_all(&bytes[48..48 + count * NODE_BYTES]).collect(),
        })
    }
}

/// One epoch in the answer to STAT_CLUSTER.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct EpochEntry {
    /// When the cluster was formatted; in the newest record only.
    pub ctime: u64,
    /// When the epoch began.
    pub time: u64,
    /// Its number.
    pub epoch: u32,
    /// 1 while recovery is held; in the newest record only.
    pub disable_recovery: u8,
    /// Default copies; in the newest record only.
    pub nr_copies: u8,
    /// Default policy; in the newest record only.
    pub copy_policy: u8,
    /// Cluster flags; in the newest record only.
    pub flags: u16,
    /// Name of the store; in the newest record only.
    pub driver_name: [u8; 16],
    /// The members.
    pub nodes: Vec<NodeEntry>,
}

impl EpochEntry {
    /// The bytes on the wire: the record with room for `nodes_nr` nodes. `None` if there are more.
    pub fn encode(&self, nodes_nr: usize) -> Option<Vec<u8>> {
        if self.nodes.len() > nodes_nr || nodes_nr > NODES_MAX {
            return None;
        }
        let mut bytes = vec![0; EPOCH_BYTES + nodes_nr * NODE_BYTES];
        put(&mut bytes, 0, &self.ctime.to_le_bytes());
        put(&mut bytes, 8, &self.time.to_le_bytes());
        put(&mut bytes, 16, &self.epoch.to_le_bytes());
        put(&mut bytes, 20, &(self.nodes.len() as u32).to_le_bytes());
        put(&mut bytes, 24, &[self.disable_recovery, self.nr_copies, self.copy_policy]);
        put(&mut bytes, 30, &self.flags.to_le_bytes());
        put(&mut bytes, 32, &self.driver_name);
        for (index, node) in self.nodes.iter().enumerate() {
            put(&mut bytes, EPOCH_BYTES + index * NODE_BYTES, &node.encode());
        }
        Some(bytes)
    }

    /// Reads the record at the start of `bytes`, which has room for `nodes_nr` nodes.
    pub fn decode(bytes: &[u8], nodes_nr: usize) -> Result<EpochEntry, Truncated> {
        if nodes_nr > NODES_MAX || bytes.len() < EPOCH_BYTES + nodes_nr * NODE_BYTES {
            return Err(Truncated);
        }
        let count = u32_at(bytes, 20) as usize;
        if count > nodes_nr {
            return Err(Truncated);
        }
        Ok(EpochEntry {
            ctime: u64_at(bytes, 0),
            time: u64_at(bytes, 8),
            epoch: u32_at(bytes, 16),
            disable_recovery: bytes[24],
            nr_copies: bytes[25],
            copy_policy: bytes[26],
            flags: u16_at(bytes, 30),
            driver_name: array(bytes, 32),
            nodes: NodeEntry::decode_all(&bytes[EPOCH_BYTES..EPOCH_BYTES + count * NODE_BYTES]).collect(),
        })
    }

    /// All records of an answer.
    pub fn decode_all(payload: &[u8], nodes_nr: usize) -> Result<Vec<EpochEntry>, Truncated> {
        if nodes_nr > NODES_MAX {
            return Err(Truncated);
        }
        let records = payload.chunks(EPOCH_BYTES + nodes_nr * NODE_BYTES);
        records.map(|record| EpochEntry::decode(record, nodes_nr)).collect()
    }

    /// The store's name without its padding.
    pub fn driver_name(&self) -> &[u8] {
        until_nul(&self.driver_name)
    }
}

/// One VDI in the answer to GET_VDI_COPIES.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct VdiStateEntry {
    /// The VDI.
    pub vid: u32,
    /// Its copies.
    pub nr_copies: u8,
    /// 1 for a snapshot.
    pub snapshot: u8,
    /// 1 when deleted.
    pub deleted: u8,
    /// Its policy.
    pub copy_policy: u8,
    /// log2 of its object size.
    pub block_size_shift: u8,
    /// What it was made from.
    pub parent_vid: u32,
    /// 1 unlocked, 2 locked, 3 shared.
    pub lock_state: u32,
    /// Who locked it, if it is locked: address and port.
    pub lock_owner: ([u8; 16], u16),
}

impl VdiStateEntry {
    /// The bytes on the wire.
    pub fn encode(&self) -> Vec<u8> {
        let mut bytes = vec![0; VDI_STATE_BYTES];
        put(&mut bytes, 0, &self.vid.to_le_bytes());
        let flags = [self.nr_copies, self.snapshot, self.deleted, self.copy_policy, self.block_size_shift];
        put(&mut bytes, 4, &flags);
        put(&mut bytes, 12, &self.parent_vid.to_le_bytes());
        put(&mut bytes, 16, &self.lock_state.to_le_bytes());
        put(&mut bytes, 20, &self.lock_owner.0);
        put(&mut bytes, 36, &self.lock_owner.1.to_le_bytes());
        bytes
    }

    /// All records of an answer; a rest that is no whole record is dropped.
    pub fn decode_all(payload: &[u8]) -> impl Iterator<Item = VdiStateEntry> + '_ {
        payload.chunks_exact(VDI_STATE_BYTES).map(|bytes| VdiStateEntry {
            vid: u32_at(bytes, 0),
            nr_copies: bytes[4],
            snapshot: bytes[5],
            deleted: bytes[6],
            copy_policy: bytes[7],
            block_size_shift: bytes[8],
            parent_vid: u32_at(bytes, 12),
            lock_state: u32_at(bytes, 16),
            lock_owner: (array(bytes, 20), u16_at(bytes, 36)),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(port: u16) -> NodeEntry {
        NodeEntry { port, zone: 3, nr_vnodes: 128, ..NodeEntry::default() }
    }

    #[test]
    fn cluster_info_survives_and_short_ones_are_refused() {
        let info =
            ClusterInfo { epoch: 4, ctime: 9, status: 1, nodes: vec![node(1), node(2)], ..ClusterInfo::default() };
        let bytes = info.encode();
        assert_eq!(bytes.len(), 491_568);
        assert_eq!(ClusterInfo::decode(&bytes), Ok(info));
        assert_eq!(ClusterInfo::decode(&bytes[..100]), Err(Truncated));
        let mut hostile = bytes;
        hostile[2..4].copy_from_slice(&u16::MAX.to_le_bytes());
        assert_eq!(ClusterInfo::decode(&hostile), Err(Truncated));
    }

    #[test]
    fn epochs_survive() {
        let entries =
            [EpochEntry { epoch: 2, nodes: vec![node(1), node(2)], ..EpochEntry::default() }, EpochEntry::default()];
        let bytes: Vec<u8> = entries.iter().flat_map(|entry| entry.encode(2).unwrap()).collect();
        assert_eq!(EpochEntry::decode_all(&bytes, 2).unwrap(), entries);
        assert_eq!(entries[0].encode(1), None);
        assert_eq!(EpochEntry::decode_all(&bytes[..100], 2), Err(Truncated));
        assert_eq!(EpochEntry::decode_all(&bytes, usize::MAX), Err(Truncated));
    }

    #[test]
    fn vdi_states_survive() {
        let entry = VdiStateEntry {
            vid: 7,
            nr_copies: 3,
            snapshot: 1,
            parent_vid: 6,
            lock_state: 2,
            lock_owner: ([9; 16], 7000),
            ..VdiStateEntry::default()
        };
        let bytes = entry.encode();
        assert_eq!(VdiStateEntry::decode_all(&bytes).collect::<Vec<_>>(), [entry]);
    }
}
