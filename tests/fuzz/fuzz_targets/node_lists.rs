//! Lists and statistics: counts and sizes that do not fit are refused, and everything else survives decoding and encoding.
#![no_main]

use libfuzzer_sys::fuzz_target;
use qemu_proto::bitmap::ids_in;
use qemu_proto::cluster_info::{
    CLUSTER_INFO_BYTES, ClusterInfo, EPOCH_BYTES, EpochEntry, VDI_STATE_BYTES, VdiStateEntry,
};
use qemu_proto::node_entry::{NODE_BYTES, NODES_MAX, NodeEntry};
use qemu_proto::oid::VdiId;
use qemu_proto::stat::{
    Counters, DISKS_MAX, MD_INFO_BYTES, RECOVERY_STAT_BYTES, RecoveryStat, STAT_BYTES, THROTTLE_BYTES, Throttle,
    decode_disks, encode_disks,
};

/// Bytes of one disk's record.
const DISK_BYTES: usize = (MD_INFO_BYTES - 8) / DISKS_MAX;

fuzz_target!(|input: (u8, u32, &[u8])| {
    let (what, count, bytes) = input;
    match what % 7 {
        0 => check_nodes(bytes),
        1 => check_cluster_info(bytes),
        // counts that can fit, and counts of any size
        2 => check_epochs(bytes, count as usize % 8),
        3 => check_epochs(bytes, count as usize),
        4 => check_vdi_states(bytes),
        5 => check_statistics(bytes),
        _ => check_disks(bytes, count),
    }
});

fn check_nodes(bytes: &[u8]) {
    let nodes: Vec<NodeEntry> = NodeEntry::decode_all(bytes).collect();
    assert_eq!(nodes.len(), bytes.len() / NODE_BYTES);
    for (node, chunk) in nodes.iter().zip(bytes.chunks_exact(NODE_BYTES)) {
        let encoded = node.encode();
        assert_eq!(NodeEntry::decode(&encoded), *node);
        // all but the ancestor's pointers and padding
        for kept in [24..60, 64..66, 68..80] {
            assert_eq!(encoded[kept.clone()], chunk[kept]);
        }
        assert_eq!(NodeEntry::address_bytes(node.ip()), node.address, "an address is written as it was read");
    }
    let ids: Vec<u32> = ids_in(bytes).map(VdiId::get).collect();
    assert!(ids.is_sorted_by(|one, next| one < next));
    assert_eq!(ids.len(), bytes.iter().map(|byte| byte.count_ones() as usize).sum::<usize>());
    assert!(ids.iter().all(|id| bytes[*id as usize / 8] >> (id % 8) & 1 == 1));
}

fn check_cluster_info(bytes: &[u8]) {
    let Ok(info) = ClusterInfo::decode(bytes) else {
        let count = bytes.get(2..4).map_or(0, |count| usize::from(count[0]) | usize::from(count[1]) << 8);
        assert!(bytes.len() < 48 || count > NODES_MAX || bytes.len() < 48 + count * NODE_BYTES, "{count} nodes fit");
        return;
    };
    assert!(info.nodes.len() <= NODES_MAX && 48 + info.nodes.len() * NODE_BYTES <= bytes.len());
    let encoded = info.encode();
    assert_eq!(encoded.len(), CLUSTER_INFO_BYTES);
    assert_eq!(encoded[..22], bytes[..22]);
    assert_eq!(ClusterInfo::decode(&encoded), Ok(info));
}

fn check_epochs(bytes: &[u8], nodes_nr: usize) {
    let Ok(entries) = EpochEntry::decode_all(bytes, nodes_nr) else {
        let is_whole = nodes_nr <= NODES_MAX && bytes.len().is_multiple_of(EPOCH_BYTES + nodes_nr * NODE_BYTES);
        let counts_fit =
            |record: &[u8]| u32::from_le_bytes([record[20], record[21], record[22], record[23]]) as usize <= nodes_nr;
        let is_good = is_whole && bytes.chunks(EPOCH_BYTES + nodes_nr * NODE_BYTES).all(counts_fit);
        assert!(!is_good, "refused without a reason");
        return;
    };
    assert!(nodes_nr <= NODES_MAX);
    assert_eq!(entries.len() * (EPOCH_BYTES + nodes_nr * NODE_BYTES), bytes.len());
    let mut encoded = Vec::new();
    for entry in &entries {
        assert!(entry.nodes.len() <= nodes_nr && !entry.driver_name().contains(&0));
        assert_eq!(entry.encode(NODES_MAX + 1), None);
        if let Some(fewer) = entry.nodes.len().checked_sub(1) {
            assert_eq!(entry.encode(fewer), None);
        }
        encoded.extend(entry.encode(nodes_nr).expect("it has room for its nodes"));
    }
    assert_eq!(encoded.len(), bytes.len());
    assert_eq!(EpochEntry::decode_all(&encoded, nodes_nr), Ok(entries));
}

fn check_vdi_states(bytes: &[u8]) {
    let entries: Vec<VdiStateEntry> = VdiStateEntry::decode_all(bytes).collect();
    assert_eq!(entries.len(), bytes.len() / VDI_STATE_BYTES);
    for (entry, chunk) in entries.iter().zip(bytes.chunks_exact(VDI_STATE_BYTES)) {
        let encoded = entry.encode();
        assert_eq!(encoded.len(), VDI_STATE_BYTES);
        assert_eq!((&encoded[..9], &encoded[12..20]), (&chunk[..9], &chunk[12..20]));
        assert!(VdiStateEntry::decode_all(&encoded).eq([entry.clone()]));
    }
}

fn check_statistics(bytes: &[u8]) {
    assert_eq!(RecoveryStat::decode(bytes).is_none(), bytes.len() < RECOVERY_STAT_BYTES);
    if let Some(recovery) = RecoveryStat::decode(bytes) {
        assert_eq!(RecoveryStat::decode(&recovery.encode()), Some(recovery));
        assert_eq!(recovery.encode()[4..], bytes[4..RECOVERY_STAT_BYTES]);
    }
    assert_eq!(Counters::decode(bytes).is_none(), bytes.len() < STAT_BYTES);
    if let Some(counters) = Counters::decode(bytes) {
        assert_eq!(counters.encode(), bytes[..STAT_BYTES]);
    }
    assert_eq!(Throttle::decode(bytes).is_none(), bytes.len() < THROTTLE_BYTES);
    if let Some(throttle) = Throttle::decode(bytes) {
        assert_eq!(Throttle::decode(&throttle.encode()), Some(throttle));
    }
}

fn check_disks(bytes: &[u8], count: u32) {
    assert_eq!(decode_disks(bytes), None, "no input is as long as an answer");
    // the answer's size is fixed: fill the first record with the input, and others with parts of it
    let mut answer = vec![0; MD_INFO_BYTES];
    for (slot, part) in bytes.chunks(DISK_BYTES / 3).take(DISKS_MAX).enumerate() {
        answer[slot * DISK_BYTES..][..part.len()].copy_from_slice(part);
    }
    if let Some(last) = bytes.last() {
        let filled = bytes.len().min(DISK_BYTES);
        answer[..filled].copy_from_slice(&bytes[..filled]);
        answer[filled..DISK_BYTES].fill(*last);
    }
    answer[DISKS_MAX * DISK_BYTES..][..4].copy_from_slice(&count.to_le_bytes());
    check_disks_of(&answer, count as usize);
    answer[DISKS_MAX * DISK_BYTES..][..4].copy_from_slice(&(count % 65).to_le_bytes());
    check_disks_of(&answer, count as usize % 65);
}

fn check_disks_of(answer: &[u8], count: usize) {
    let Some(disks) = decode_disks(answer) else {
        assert!(count > DISKS_MAX, "{count} disks fit");
        return;
    };
    assert_eq!(disks.len(), count);
    assert!(disks.iter().all(|disk| disk.path.len() < 4096 && !disk.path.contains(&0)));
    let encoded = encode_disks(&disks);
    assert_eq!(encoded.len(), MD_INFO_BYTES);
    assert_eq!(decode_disks(&encoded), Some(disks));
}
