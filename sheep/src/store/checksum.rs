//! Checksums of blocks and of small structures: CRC-32C (Castagnoli), hardware-speed on every supported machine.
//!
//! Always holds:
//! 1. The tag of a block of zeros is 0, so that a hole in an object file is its own valid checksum table.
//! 2. Tags cover whole blocks of [`BLOCK_BYTES`]; the content's last block is padded with zeros on disk.

/// Unit of checksums, and of direct I/O.
pub const BLOCK_BYTES: usize = 4096;

/// CRC-32C of [`BLOCK_BYTES`] zeros.
const ZERO_BLOCK_CRC: u32 = 0x98f9_4189;

/// CRC-32C of some bytes.
pub fn crc32c(bytes: &[u8]) -> u32 {
    crc_fast::crc32_iscsi(bytes)
}

/// What the checksum table stores for a block; see invariant 1.
pub fn block_tag(block: &[u8]) -> u32 {
    debug_assert_eq!(block.len(), BLOCK_BYTES, "tags cover whole blocks");
    crc32c(block) ^ ZERO_BLOCK_CRC
}

/// The next multiple of [`BLOCK_BYTES`].
pub const fn round_up(bytes: u64) -> u64 {
    bytes.next_multiple_of(BLOCK_BYTES as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_of_zeros_has_the_tag_zero() {
        assert_eq!(block_tag(&[0; BLOCK_BYTES]), 0);
        let mut block = [0; BLOCK_BYTES];
        block[4095] = 1;
        assert_ne!(block_tag(&block), 0);
    }

    #[test]
    fn it_is_the_castagnoli_polynomial() {
        // RFC 3720 B.4
        assert_eq!(crc32c(&[0; 32]), 0x8a91_36aa);
        assert_eq!(crc32c(b"123456789"), 0xe306_9283);
    }
}
