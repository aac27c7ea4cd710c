//! Randomness. The real source is the kernel's; the simulator's comes from its one seed.

use std::hash::BuildHasher;

use rand::SeedableRng;
pub use rand::rngs::SmallRng;

/// The randomness door.
pub trait Rng: Send + Sync + 'static {
    /// 64 random bits. Real ones are fit for identities (node ids, cluster ids).
    fn next_u64(&self) -> u64;
}

/// The kernel's generator: getrandom(2).
pub struct OsRng;

impl Rng for OsRng {
    fn next_u64(&self) -> u64 {
        let mut bytes = [0_u8; 8];
        // Up to 256 bytes come whole or not at all once the pool is up; before that the call waits (getrandom(2)).
        while rustix::rand::getrandom(&mut bytes, rustix::rand::GetRandomFlags::empty()) != Ok(bytes.len()) {}
        u64::from_le_bytes(bytes)
    }
}

/// A generator of its own for libraries that want one: seeded once from `rng`, then without system calls. Anybody who
/// sees enough of its output can foretell the rest: for choices, not for secrets.
pub fn small(rng: &dyn Rng) -> SmallRng {
    SmallRng::seed_from_u64(rng.next_u64())
}

/// Bits for a library that asks for some without having been handed a world: for choices, not for secrets. They come from
/// where the standard library takes the keys of its hash maps, which the simulator seeds too.
pub fn homeless() -> u64 {
    std::hash::RandomState::new().hash_one(0_u64)
}
