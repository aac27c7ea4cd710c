//! Stores whose files somebody or something damaged: bits turned over, ranges overwritten, blocks in the wrong place, ends cut
//! off, rubbish behind them. Whatever was done to which file, opening ends in a store or in an error that says what is wrong,
//! and no read ever returns what was not written (P4, P8).
//!
//! One seed decides everything; `SHEEP_TEST_FIRST_SEED` and `SHEEP_TEST_SEEDS` choose others than the fixed ones.

// Everything here is a test: an error that is not expected ends it.
#![allow(clippy::unwrap_used, clippy::large_futures)]

use std::fmt::Write as _;
use std::io::IoSlice;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep::store::{Durability, Store, StoreConfig, Write, WriteKind};
use sheep::world::disk::OpenMode;
use sheep_core::stamp::{Epoch, Stamp, Version};
use tests::sim::sim_disk::SimDisk;
use tests::sim::{Random, lone_world};

const OBJECTS: u64 = 5;
const OBJECT_BYTES: usize = 100_000;
const PIECE_BYTES: usize = 4096;

fn config() -> StoreConfig {
    StoreConfig { journal_bytes: 8 << 20, ..StoreConfig::new("/s") }
}

fn oid(number: u64) -> Oid {
    Oid::from_raw(0x007c_2b25_0000_0000 | number)
}

/// A store in its life before the damage, and every content that each of its objects ever had.
struct Before {
    disk: SimDisk,
    contents: Vec<Vec<Vec<u8>>>,
    /// Whether it was closed in order: then nothing but the last content may come back.
    closed: bool,
}

async fn write(store: &Store, number: u64, sequence: u64, offset: usize, data: &[u8], kind: WriteKind) {
    let write = Write {
        oid: oid(number),
        version: Version { epoch: Epoch(1), stamp: Stamp { generation: 1, sequence } },
        offset: offset as u64,
        data: Bytes::copy_from_slice(data),
        kind,
        durability: Durability::Durable,
    };
    let permit = store.admit(data.len() as u64).await;
    store.submit(permit, write).unwrap().await.unwrap();
}

async fn live(random: &mut Random) -> Before {
    let disk = SimDisk::new(random.bits());
    let store = Store::open(lone_world(disk.attach(), 7), config()).await.unwrap();
    store.save_state(vec![7; 5000]).await.unwrap();
    let mut contents: Vec<Vec<Vec<u8>>> = Vec::new();
    for number in 0..OBJECTS {
        let content: Vec<u8> = (0..OBJECT_BYTES).map(|at| (at as u64 / 512 * 31 + number * 7 + 1) as u8).collect();
        let kind = WriteKind::Create { size_bytes: OBJECT_BYTES as u64 };
        write(&store, number, 1, 0, &content, kind).await;
        contents.push(vec![content]);
    }
    for sequence in 2..2 + random.below(30) {
        let number = random.below(OBJECTS);
        let length = 1 + random.below(20_000) as usize;
        let offset = random.below((OBJECT_BYTES - length) as u64) as usize;
        let data: Vec<u8> = (0..length).map(|_| random.bits() as u8).collect();
        write(&store, number, sequence, offset, &data, WriteKind::Overwrite).await;
        let mut content = contents[number as usize].last().unwrap().clone();
        content[offset..offset + length].copy_from_slice(&data);
        contents[number as usize].push(content);
    }
    let closed = random.one_in(2);
    if closed {
        store.close().await.unwrap();
    }
    disk.kill();
    Before { disk, contents, closed }
}

/// Damages one file; says how.
fn damage(disk: &SimDisk, random: &mut Random) -> String {
    let list: Vec<_> = disk.list().into_iter().filter(|(_, length)| *length > 0).collect();
    // Of the many object files one stands for all: the small ones are the more interesting.
    let (path, length) = if random.one_in(4) {
        list[random.below(list.len() as u64) as usize].clone()
    } else {
        let others: Vec<_> = list.iter().filter(|(path, _)| !path.starts_with("/s/obj")).collect();
        others[random.below(others.len() as u64) as usize].clone()
    };
    let mut said = format!("{} ({length} bytes): ", path.display());
    let files = disk.files();
    let file = files.open(&path, OpenMode::Write).unwrap();
    // Most files are mostly empty behind their beginning.
    let reach = if random.one_in(2) { length } else { length.min(1 + random.below(16 << 10)) };
    match random.below(5) {
        0 => {
            for _ in 0..=random.below(8) {
                let bit = random.below(reach * 8);
                write!(said, "bit {bit} ").unwrap();
                disk.flip_bit(&path, bit);
            }
        }
        1 => {
            let offset = random.below(reach);
            let count = (1 + random.below(8192)).min(length - offset) as usize;
            let fill = random.bits() as u8;
            let is_random = random.one_in(2);
            let bytes: Vec<u8> = (0..count).map(|_| if is_random { random.bits() as u8 } else { fill }).collect();
            write!(said, "{count} bytes from {offset} on, random {is_random}").unwrap();
            file.write_at(&[IoSlice::new(&bytes)], offset).unwrap();
        }
        2 => {
            let block = 512 * (1 + random.below(8));
            let (from, to) = (random.below(reach) / block * block, random.below(reach) / block * block);
            let mut bytes = vec![0; block.min(length - from) as usize];
            let count = file.read_at(&mut bytes, from).unwrap();
            write!(said, "{count} bytes from {from} also at {to}").unwrap();
            file.write_at(&[IoSlice::new(&bytes[..count])], to).unwrap();
        }
        3 => {
            let shorter = random.below(length);
            write!(said, "cut off at {shorter}").unwrap();
            file.set_len(shorter).unwrap();
        }
        _ => {
            let bytes: Vec<u8> = (0..=random.below(10_000)).map(|_| random.bits() as u8).collect();
            write!(said, "{} bytes behind its end", bytes.len()).unwrap();
            file.write_at(&[IoSlice::new(&bytes)], length).unwrap();
        }
    }
    said
}

/// What was done, and whether the store opened after it.
async fn trial(seed: u64) -> (String, bool) {
    let mut random = Random::new(seed);
    let Before { disk, contents, closed } = live(&mut random).await;
    let said = damage(&disk, &mut random);
    let store = match Store::open(lone_world(disk.attach(), 8), config()).await {
        Ok(store) => store,
        Err(error) => {
            let text = error.to_string();
            assert!(text.contains("/s"), "seed {seed}, {said}: which file? {text}");
            return (said, false);
        }
    };
    // Anything but a panic; what it returns is checksummed.
    if let Ok(Some(state)) = store.load_state().await {
        assert_eq!(state, vec![7; 5000], "seed {seed}, {said}");
    }
    for (number, versions) in contents.iter().enumerate() {
        for offset in (0..OBJECT_BYTES).step_by(PIECE_BYTES) {
            let length = PIECE_BYTES.min(OBJECT_BYTES - offset);
            let Ok(bytes) = store.read(oid(number as u64), offset as u64, length).await else { continue };
            let may_be = if closed { &versions[versions.len() - 1..] } else { &versions[..] };
            // A damaged end of the journal looks like a torn one: then the content is an earlier one.
            let is_one = may_be.iter().any(|content| content[offset..offset + length] == bytes[..]);
            assert!(is_one, "seed {seed}, {said}: object {number} at {offset} has what nobody wrote there");
        }
    }
    let _ = store.close().await;
    (said, true)
}

#[test]
fn no_damage_makes_a_store_panic_or_lie() {
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let count = number("SHEEP_TEST_SEEDS").unwrap_or(200);
    let first = number("SHEEP_TEST_FIRST_SEED").unwrap_or(0);
    let mut opened = 0;
    for seed in first..first + count {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
        let trial = std::panic::catch_unwind(|| runtime.block_on(trial(seed)));
        let (_, is_open) = trial.unwrap_or_else(|_| panic!("seed {seed} panicked"));
        opened += u64::from(is_open);
    }
    eprintln!("{count} damaged stores: {opened} opened, the others said why not");
    assert!(opened > 0 && opened < count, "the damage was none, or total: {opened} of {count} opened");
}
