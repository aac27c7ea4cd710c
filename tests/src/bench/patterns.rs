//! What is asked of a disk: loads by name, and the requests that each of them consists of.
//!
//! The requests of a pattern follow from a constant seed, so that ours and the references get the same.

use super::OBJECT_BYTES;

const SEED: u64 = 0x5eed;

/// Which volume a load works on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Volume {
    /// One that was written in full before.
    Full,
    /// A new one of [`FIRST_WRITES`] objects, nothing of which is allocated.
    Thin,
    /// One of as many objects, written in full, of which a snapshot was taken since.
    Shared,
}

/// Objects of the volumes on which each is written for the first time, once: enough for a median, few enough to be made anew
/// for each run.
pub const FIRST_WRITES: u64 = 128;

/// What a load consists of.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Mix {
    /// Writes only; each is durable when answered.
    Durable,
    /// Writes only, of which as many are followed by a flush when all of them were answered.
    FlushEvery(u64),
    /// Reads only.
    Reads,
    /// So many of a hundred are reads, the others durable writes.
    ReadsOfHundred(u64),
}

/// Where requests go.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Order {
    /// Anywhere.
    Random,
    /// One after the other.
    Sequential,
    /// Into each object once.
    EachObject,
}

/// One load.
#[derive(Clone, Debug)]
pub struct Pattern {
    /// What it is chosen and shown by.
    pub name: &'static str,
    /// See [`Mix`].
    pub mix: Mix,
    /// See [`Order`].
    pub order: Order,
    /// See [`Volume`].
    pub volume: Volume,
    /// Bytes of each request.
    pub bytes: u32,
    /// Requests under way.
    pub depth: usize,
    /// How many there are.
    pub operations: u64,
}

/// One request.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operation {
    /// Into the volume.
    pub offset: u64,
    /// Else it is a read.
    pub is_write: bool,
}

impl Pattern {
    const fn new(name: &'static str, mix: Mix, bytes: u32, depth: usize, operations: u64) -> Pattern {
        Pattern { name, mix, order: Order::Random, volume: Volume::Full, bytes, depth, operations }
    }

    const fn sequential(mut self) -> Pattern {
        self.order = Order::Sequential;
        self
    }

    const fn first(name: &'static str, volume: Volume) -> Pattern {
        let operations = FIRST_WRITES;
        Pattern { name, mix: Mix::Durable, order: Order::EachObject, volume, bytes: 4096, depth: 1, operations }
    }

    /// A load of the plot.
    pub fn of_depth(mix: Mix, depth: usize, operations: u64) -> Pattern {
        Pattern::new("", mix, 4096, depth, operations)
    }

    /// Whether every write is durable when it is answered.
    pub fn is_durable(&self) -> bool {
        !matches!(self.mix, Mix::FlushEvery(_))
    }

    /// Whether the bare loop does what this load asks for.
    pub fn has_loop(&self) -> bool {
        self.mix == Mix::Durable && self.volume == Volume::Full
    }

    /// Whether a raw file can do it at all: it has no snapshots.
    pub fn has_reference(&self) -> bool {
        self.volume != Volume::Shared
    }

    /// The requests. A quick run has a quarter of them, unless each object gets one.
    pub fn requests(&self, size_bytes: u64, is_quick: bool) -> Vec<Operation> {
        let mut random = Random(SEED);
        let bytes = u64::from(self.bytes);
        let places = size_bytes / bytes;
        let count = if is_quick && self.order != Order::EachObject { self.operations / 4 } else { self.operations };
        let request = |index: u64| {
            let place = match self.order {
                Order::Random => random.next() % places,
                Order::Sequential => index % places,
                Order::EachObject => (index * OBJECT_BYTES + 2 * bytes) / bytes,
            };
            let is_write = match self.mix {
                Mix::Durable | Mix::FlushEvery(_) => true,
                Mix::Reads => false,
                Mix::ReadsOfHundred(reads) => random.next() % 100 >= reads,
            };
            Operation { offset: place * bytes, is_write }
        };
        (0..count).map(request).collect()
    }

    /// Bytes to write.
    pub fn payload(&self) -> Vec<u8> {
        let mut random = Random(SEED);
        (0..self.bytes).map(|index| (index as u8) ^ (random.next() as u8)).collect()
    }
}

/// All of them.
pub const PATTERNS: &[Pattern] = &[
    Pattern::new("write 4k durable d1", Mix::Durable, 4096, 1, 8000),
    Pattern::new("write 4k durable d8", Mix::Durable, 4096, 8, 30_000),
    Pattern::new("write 4k durable d32", Mix::Durable, 4096, 32, 60_000),
    Pattern::new("write 4k flush64 d32", Mix::FlushEvery(64), 4096, 32, 60_000),
    Pattern::new("read 4k d1", Mix::Reads, 4096, 1, 40_000),
    Pattern::new("read 4k d8", Mix::Reads, 4096, 8, 100_000),
    Pattern::new("read 4k d32", Mix::Reads, 4096, 32, 200_000),
    Pattern::new("mix 70/30 4k d32", Mix::ReadsOfHundred(70), 4096, 32, 80_000),
    Pattern::new("write 64k durable d8", Mix::Durable, 64 << 10, 8, 6000),
    Pattern::new("read 64k d8", Mix::Reads, 64 << 10, 8, 30_000),
    Pattern::new("write 1M durable d4", Mix::Durable, 1 << 20, 4, 1000).sequential(),
    Pattern::new("read 1M d4", Mix::Reads, 1 << 20, 4, 2000).sequential(),
    Pattern::first("first write, thin d1", Volume::Thin),
    Pattern::first("first write, snap d1", Volume::Shared),
];

/// xorshift64*: offsets only have to be spread and the same for all.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_request_lies_inside_its_volume_and_first_writes_meet_each_object_once() {
        let size_bytes = FIRST_WRITES * OBJECT_BYTES;
        for pattern in PATTERNS {
            let requests = pattern.requests(size_bytes, true);
            assert!(requests.iter().all(|request| request.offset + u64::from(pattern.bytes) <= size_bytes));
            assert_eq!(requests, pattern.requests(size_bytes, true), "{}", pattern.name);
            if pattern.order == Order::EachObject {
                let objects: Vec<u64> = requests.iter().map(|request| request.offset / OBJECT_BYTES).collect();
                assert_eq!(objects, (0..FIRST_WRITES).collect::<Vec<u64>>());
            }
        }
    }

    #[test]
    fn a_mix_has_the_share_of_reads_that_it_says() {
        let mix = Pattern::of_depth(Mix::ReadsOfHundred(70), 1, 10_000);
        let reads = mix.requests(1 << 30, false).iter().filter(|request| !request.is_write).count();
        assert!((6800..7200).contains(&reads), "{reads} of 10000");
    }
}
