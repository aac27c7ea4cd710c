//! Small files that are replaced as a whole: a magic, a version, the payload and a checksum over all of it.
//!
//! Always holds:
//! 1. At any moment the name shows either the whole old content or the whole new one; after [`write`] returned, a power
//!    loss cannot bring the old one back.
//! 2. Damage is found by [`read`], never handed out.

use std::io;
use std::path::Path;

use super::checksum::crc32c;
use super::layout;
use crate::world::disk::{Files, OpenMode};

/// Magic (8), version (4), payload length (4), then the payload, then the checksum (4).
const HEAD_BYTES: usize = 16;
const CRC_BYTES: usize = 4;

/// Largest payload read back: a bound for a damaged length, far above any real content.
const PAYLOAD_MAX: u64 = 256 << 20;

/// What [`read`] found.
#[derive(PartialEq, Eq, Debug)]
pub enum Found {
    /// No such file.
    Nothing,
    /// Format version and payload.
    Payload(u32, Vec<u8>),
    /// Bytes that are not what was written.
    Damaged(&'static str),
}

/// Replaces the content of `path`.
pub fn write(files: &dyn Files, path: &Path, magic: [u8; 8], version: u32, payload: &[u8]) -> io::Result<()> {
    assert!(payload.len() as u64 <= PAYLOAD_MAX, "a sealed file is small");
    let mut bytes = Vec::with_capacity(HEAD_BYTES + payload.len() + CRC_BYTES);
    bytes.extend_from_slice(&magic);
    bytes.extend_from_slice(&version.to_le_bytes());
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes.extend_from_slice(&crc32c(&bytes).to_le_bytes());
    let next = layout::next_of(path);
    let file = files.open(&next, OpenMode::Truncate)?;
    file.write_at(&[io::IoSlice::new(&bytes)], 0)?;
    file.sync_data()?;
    files.rename(&next, path)?;
    files.sync_dir(path.parent().unwrap_or(Path::new("/")))
}

/// Reads and checks the content of `path`.
pub fn read(files: &dyn Files, path: &Path, magic: [u8; 8]) -> io::Result<Found> {
    let file = match files.open(path, OpenMode::Read) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Found::Nothing),
        Err(error) => return Err(error),
    };
    let length = file.len()?;
    if length < (HEAD_BYTES + CRC_BYTES) as u64 || length > PAYLOAD_MAX + (HEAD_BYTES + CRC_BYTES) as u64 {
        return Ok(Found::Damaged("its length is wrong"));
    }
    let mut bytes = vec![0; length as usize];
    let count = file.read_at(&mut bytes, 0)?;
    Ok(parse(&bytes[..count], magic))
}

fn parse(bytes: &[u8], magic: [u8; 8]) -> Found {
    let Some((head, rest)) = bytes.split_first_chunk::<HEAD_BYTES>() else {
        return Found::Damaged("it is too short");
    };
    if head[..8] != magic {
        return Found::Damaged("it does not begin as it should");
    }
    let version = u32::from_le_bytes([head[8], head[9], head[10], head[11]]);
    let length = u32::from_le_bytes([head[12], head[13], head[14], head[15]]) as usize;
    let Some((payload, crc)) = rest.split_last_chunk::<CRC_BYTES>() else {
        return Found::Damaged("it is too short");
    };
    if payload.len() != length {
        return Found::Damaged("its length is wrong");
    }
    if crc32c(&bytes[..HEAD_BYTES + length]) != u32::from_le_bytes(*crc) {
        return Found::Damaged("its checksum does not match");
    }
    Found::Payload(version, payload.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::real_disk::RealFiles;

    #[test]
    fn every_flipped_bit_is_found() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("small");
        assert_eq!(read(&RealFiles, &path, *b"ABCDEFGH").unwrap(), Found::Nothing);
        write(&RealFiles, &path, *b"ABCDEFGH", 3, b"payload").unwrap();
        assert_eq!(read(&RealFiles, &path, *b"ABCDEFGH").unwrap(), Found::Payload(3, b"payload".to_vec()));
        let good = std::fs::read(&path).unwrap();
        for bit in 0..good.len() * 8 {
            let mut bad = good.clone();
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(parse(&bad, *b"ABCDEFGH"), Found::Damaged(_)), "bit {bit}");
        }
        for length in 0..good.len() {
            assert!(matches!(parse(&good[..length], *b"ABCDEFGH"), Found::Damaged(_)), "length {length}");
        }
    }
}
