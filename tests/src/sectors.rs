//! What the tests write to disks: sectors that say which write they come from, and images with holes.
//!
//! Always holds:
//! 1. A sector names its volume, its place and the sequence number of the write, and every further byte follows from
//!    these three: a misplaced, mixed or decayed sector is never taken for a good one.
//! 2. The same seed gives the same image and the same numbers.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, bail, ensure};

use crate::sim::Random;

/// The unit in which a disk may tear a write.
pub const SECTOR_BYTES: usize = 512;
/// The unit of the writers: what databases and file systems write.
pub const BLOCK_BYTES: usize = 4096;
/// Sectors in a block.
pub const SECTORS_PER_BLOCK: usize = BLOCK_BYTES / SECTOR_BYTES;

/// Fills one sector: volume, place, sequence number, then bytes that follow from them.
fn fill_sector(sector: &mut [u8], volume: u64, sector_index: u64, sequence: u64) {
    assert_eq!(sector.len(), SECTOR_BYTES);
    let mut rng = Random::new(volume ^ sector_index.rotate_left(24) ^ sequence.rotate_left(48));
    let (head, body) = sector.split_at_mut(24);
    head[..8].copy_from_slice(&volume.to_le_bytes());
    head[8..16].copy_from_slice(&sector_index.to_le_bytes());
    head[16..].copy_from_slice(&sequence.to_le_bytes());
    for chunk in body.chunks_exact_mut(8) {
        chunk.copy_from_slice(&rng.bits().to_le_bytes());
    }
}

/// The content that write `sequence` gives to block `block_index` of `volume`.
pub fn block_content(volume: u64, block_index: u64, sequence: u64) -> Vec<u8> {
    assert_ne!(sequence, 0, "0 stands for a sector that was never written");
    let mut block = vec![0; BLOCK_BYTES];
    for (index, sector) in block.chunks_exact_mut(SECTOR_BYTES).enumerate() {
        fill_sector(sector, volume, block_index * SECTORS_PER_BLOCK as u64 + index as u64, sequence);
    }
    block
}

/// Which write a sector comes from: 0 for all zeros; an error for anything that no write produced.
pub fn sector_sequence(sector: &[u8], volume: u64, sector_index: u64) -> Result<u64> {
    ensure!(sector.len() == SECTOR_BYTES, "not a sector: {} bytes", sector.len());
    if sector.iter().all(|&byte| byte == 0) {
        return Ok(0);
    }
    let word = |at: usize| u64::from_le_bytes(sector[at..at + 8].try_into().expect("eight bytes"));
    let sequence = word(16);
    let mut expected = [0; SECTOR_BYTES];
    fill_sector(&mut expected, volume, sector_index, sequence);
    if sector != expected {
        bail!(
            "sector {sector_index} of volume {volume:x} holds nothing that was written there: \
             it claims volume {:x}, sector {}, write {sequence}",
            word(0),
            word(8)
        );
    }
    Ok(sequence)
}

/// Which writes the sectors of a block come from; an error for anything that no write produced.
pub fn block_sequences(block: &[u8], volume: u64, block_index: u64) -> Result<[u64; SECTORS_PER_BLOCK]> {
    ensure!(block.len() == BLOCK_BYTES, "not a block: {} bytes", block.len());
    let mut sequences = [0; SECTORS_PER_BLOCK];
    for (index, sector) in block.chunks_exact(SECTOR_BYTES).enumerate() {
        sequences[index] = sector_sequence(sector, volume, block_index * SECTORS_PER_BLOCK as u64 + index as u64)?;
    }
    Ok(sequences)
}

/// Makes an image of `size_bytes` (a multiple of 1 MiB) at `path`: about a third data, the rest holes of many lengths.
pub fn sparse_image(path: &Path, size_bytes: u64, seed: u64) -> Result<()> {
    const STEP_BYTES: u64 = 1 << 20;
    ensure!(size_bytes.is_multiple_of(STEP_BYTES) && size_bytes > 0, "not a multiple of 1 MiB: {size_bytes}");
    let file = File::create(path)?;
    file.set_len(size_bytes)?;
    let mut rng = Random::new(seed);
    let mut data = vec![0; STEP_BYTES as usize];
    for step in 0..size_bytes / STEP_BYTES {
        let start = step * STEP_BYTES;
        match rng.below(6) {
            // A full step.
            0 => fill_random(&mut data, &mut rng),
            // One run of sectors somewhere in the step.
            1 | 2 => {
                let length = (rng.below(256) + 1) * SECTOR_BYTES as u64;
                let offset = rng.below((STEP_BYTES - length) / SECTOR_BYTES as u64 + 1) * SECTOR_BYTES as u64;
                fill_random(&mut data[..length as usize], &mut rng);
                file.write_all_at(&data[..length as usize], start + offset)?;
                continue;
            }
            _ => continue,
        }
        file.write_all_at(&data, start)?;
    }
    // The last sector is data, so that the end of the image counts.
    fill_random(&mut data[..SECTOR_BYTES], &mut rng);
    file.write_all_at(&data[..SECTOR_BYTES], size_bytes - SECTOR_BYTES as u64)?;
    Ok(())
}

/// Fills `bytes` with numbers of `rng`.
pub fn fill_random(bytes: &mut [u8], rng: &mut Random) {
    for chunk in bytes.chunks_mut(8) {
        let word = rng.bits().to_le_bytes();
        chunk.copy_from_slice(&word[..chunk.len()]);
    }
}

/// Fails, with the first place, unless two files hold the same bytes.
pub fn files_equal(a: &Path, b: &Path) -> Result<()> {
    const CHUNK_BYTES: usize = 1 << 20;
    let (left, right) = (File::open(a)?, File::open(b)?);
    let length = left.metadata()?.len();
    ensure!(length == right.metadata()?.len(), "{} and {} differ in length", a.display(), b.display());
    let (mut left_bytes, mut right_bytes) = (vec![0; CHUNK_BYTES], vec![0; CHUNK_BYTES]);
    let mut at = 0;
    while at < length {
        let count = CHUNK_BYTES.min((length - at) as usize);
        left.read_exact_at(&mut left_bytes[..count], at)?;
        right.read_exact_at(&mut right_bytes[..count], at)?;
        let difference = left_bytes[..count].iter().zip(&right_bytes[..count]).position(|(l, r)| l != r);
        if let Some(place) = difference {
            bail!("{} and {} differ at byte {}", a.display(), b.display(), at + place as u64);
        }
        at += count as u64;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sector_tells_its_write() {
        let block = block_content(7, 3, 12);
        for (index, sector) in block.chunks(SECTOR_BYTES).enumerate() {
            assert_eq!(sector_sequence(sector, 7, 24 + index as u64).expect("as written"), 12);
        }
        assert_eq!(sector_sequence(&[0; SECTOR_BYTES], 7, 24).expect("never written"), 0);
    }

    #[test]
    fn a_wrong_sector_is_found_out() {
        let block = block_content(7, 3, 12);
        assert!(sector_sequence(&block[..SECTOR_BYTES], 8, 24).is_err(), "of another volume");
        assert!(sector_sequence(&block[..SECTOR_BYTES], 7, 25).is_err(), "of another place");
        let mut decayed = block.clone();
        decayed[500] ^= 1;
        assert!(sector_sequence(&decayed[..SECTOR_BYTES], 7, 24).is_err(), "one bit changed");
        let mixed = [&block_content(7, 3, 11)[..256], &block[256..SECTOR_BYTES]].concat();
        assert!(sector_sequence(&mixed, 7, 24).is_err(), "half of one write, half of another");
    }
}
