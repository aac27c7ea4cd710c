//! Statistics structures (protocol.md section 2.2).

use crate::bytes::{put, u32_at, u64_at, until_nul};

/// Bytes of the answer to STAT_RECOVERY.
pub const RECOVERY_STAT_BYTES: usize = 24;
/// Bytes of the answer to STAT.
pub const STAT_BYTES: usize = 120;
/// Bytes of the recovery throttle.
pub const THROTTLE_BYTES: usize = 24;
/// Disks in the answer to MD_INFO.
pub const DISKS_MAX: usize = 64;
/// Names of the log levels, by their number in GET_LOGLEVEL and SET_LOGLEVEL.
pub const LOG_LEVELS: [&str; 8] = ["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"];
const DISK_BYTES: usize = 4120;
/// Bytes of the answer to MD_INFO.
pub const MD_INFO_BYTES: usize = DISKS_MAX * DISK_BYTES + 8;

const _: () = assert!(MD_INFO_BYTES == 263_688);

/// Recovery progress of one node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct RecoveryStat {
    /// Whether it recovers.
    pub in_recovery: bool,
    /// 0 listing, 1 recovering, 2 notifying.
    pub state: u32,
    /// Objects done.
    pub finished: u64,
    /// Objects in all.
    pub total: u64,
}

impl RecoveryStat {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; RECOVERY_STAT_BYTES] {
        let mut bytes = [0; RECOVERY_STAT_BYTES];
        bytes[0] = u8::from(self.in_recovery);
        put(&mut bytes, 4, &self.state.to_le_bytes());
        put(&mut bytes, 8, &self.finished.to_le_bytes());
        put(&mut bytes, 16, &self.total.to_le_bytes());
        bytes
    }

    /// `None` if it is too short.
    pub fn decode(bytes: &[u8]) -> Option<RecoveryStat> {
        if bytes.len() < RECOVERY_STAT_BYTES {
            return None;
        }
        Some(RecoveryStat {
            in_recovery: bytes[0] != 0,
            state: u32_at(bytes, 4),
            finished: u64_at(bytes, 8),
            total: u64_at(bytes, 16),
        })
    }
}

/// Request counters of one node, in the order of the wire: gateway active, peer active, gateway total, peer total, gateway
/// rx, gateway tx, peer rx, peer tx, gateway remove, gateway read, gateway write, gateway flush, peer remove, peer read,
/// peer write.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Counters(pub [u64; 15]);

impl Counters {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; STAT_BYTES] {
        let mut bytes = [0; STAT_BYTES];
        for (index, counter) in self.0.iter().enumerate() {
            put(&mut bytes, index * 8, &counter.to_le_bytes());
        }
        bytes
    }

    /// `None` if it is too short.
    pub fn decode(bytes: &[u8]) -> Option<Counters> {
        if bytes.len() < STAT_BYTES {
            return None;
        }
        let mut counters = [0; 15];
        for (index, counter) in counters.iter_mut().enumerate() {
            *counter = u64_at(bytes, index * 8);
        }
        Some(Counters(counters))
    }
}

/// One disk in the answer to MD_INFO.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct DiskEntry {
    /// Its number.
    pub index: u32,
    /// Bytes free.
    pub free: u64,
    /// Bytes used.
    pub used: u64,
    /// Where; at most 4,095 bytes.
    pub path: Vec<u8>,
}

/// The bytes of the answer to MD_INFO.
pub fn encode_disks(disks: &[DiskEntry]) -> Vec<u8> {
    let mut bytes = vec![0; MD_INFO_BYTES];
    let disks = &disks[..disks.len().min(DISKS_MAX)];
    for (slot, disk) in disks.iter().enumerate() {
        let at = slot * DISK_BYTES;
        put(&mut bytes, at, &disk.index.to_le_bytes());
        put(&mut bytes, at + 8, &disk.free.to_le_bytes());
        put(&mut bytes, at + 16, &disk.used.to_le_bytes());
        put(&mut bytes, at + 24, &disk.path[..disk.path.len().min(4095)]);
    }
    put(&mut bytes, DISKS_MAX * DISK_BYTES, &(disks.len() as u32).to_le_bytes());
    bytes
}

/// The disks of an answer to MD_INFO; `None` if it is too short or counts more than it has room for.
pub fn decode_disks(bytes: &[u8]) -> Option<Vec<DiskEntry>> {
    if bytes.len() < MD_INFO_BYTES {
        return None;
    }
    let count = u32_at(bytes, DISKS_MAX * DISK_BYTES) as usize;
    if count > DISKS_MAX {
        return None;
    }
    let disk = |at: usize| DiskEntry {
        index: u32_at(bytes, at),
        free: u64_at(bytes, at + 8),
        used: u64_at(bytes, at + 16),
        path: until_nul(&bytes[at + 24..at + DISK_BYTES - 1]).to_vec(),
    };
    Some((0..count).map(|slot| disk(slot * DISK_BYTES)).collect())
}

/// The recovery throttle.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Throttle {
    /// Objects per interval.
    pub max: u32,
    /// Milliseconds.
    pub interval_ms: u64,
    /// Whether it is on.
    pub throttling: bool,
}

impl Throttle {
    /// The bytes on the wire.
    pub fn encode(&self) -> [u8; THROTTLE_BYTES] {
        let mut bytes = [0; THROTTLE_BYTES];
        put(&mut bytes, 0, &self.max.to_le_bytes());
        put(&mut bytes, 8, &self.interval_ms.to_le_bytes());
        bytes[16] = u8::from(self.throttling);
        bytes
    }

    /// `None` if it is too short.
    pub fn decode(bytes: &[u8]) -> Option<Throttle> {
        if bytes.len() < THROTTLE_BYTES {
            return None;
        }
        Some(Throttle { max: u32_at(bytes, 0), interval_ms: u64_at(bytes, 8), throttling: bytes[16] != 0 })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everything_survives_and_short_input_is_refused() {
        let recovery = RecoveryStat { in_recovery: true, state: 1, finished: 5, total: 9 };
        assert_eq!(RecoveryStat::decode(&recovery.encode()), Some(recovery));
        let mut counters = Counters::default();
        counters.0[14] = u64::MAX;
        assert_eq!(Counters::decode(&counters.encode()), Some(counters));
        let throttle = Throttle { max: 3, interval_ms: 1 << 40, throttling: true };
        assert_eq!(Throttle::decode(&throttle.encode()), Some(throttle));
        let disks = vec![DiskEntry { index: 1, free: 2, used: 3, path: b"/data".to_vec() }];
        let mut bytes = encode_disks(&disks);
        assert_eq!(decode_disks(&bytes), Some(disks));
        bytes[263_680] = 65;
        assert_eq!(decode_disks(&bytes), None);
        assert_eq!((RecoveryStat::decode(&[0; 23]), Counters::decode(&[0; 119])), (None, None));
    }
}
