//! Randomness that libraries take without asking a world: the keys of the standard library's hash maps, and what is derived
//! from them (tokio's choice between ready branches, openraft's election timeouts). In a simulator it must follow the seed.
//!
//! The standard library asks the C library's `getrandom`. A program that defines a function of this name takes its place;
//! so a thread that called [`seed`] gets bits of the seed, and all others get the kernel's, as before.

use std::cell::Cell;

thread_local! {
    static STATE: Cell<Option<u64>> = const { Cell::new(None) };
}

/// From now on what this thread asks of `getrandom` follows from `seed`. To be called before anything else of the thread:
/// hash maps take their keys once.
pub fn seed(seed: u64) {
    STATE.set(Some(seed));
}

/// See the module; the contract is that of getrandom(2).
///
/// # Safety
/// `buffer` must be valid for writing `length` bytes.
// SAFETY: no other function of this name is linked in statically, and this one keeps the contract of the C library's.
#[unsafe(no_mangle)]
#[allow(unsafe_code)]
pub unsafe extern "C" fn getrandom(buffer: *mut u8, length: usize, flags: u32) -> isize {
    // SAFETY: the caller's promise.
    let bytes = unsafe { std::slice::from_raw_parts_mut(buffer, length) };
    let Some(state) = STATE.get() else {
        let flags = rustix::rand::GetRandomFlags::from_bits_retain(flags);
        return rustix::rand::getrandom(bytes, flags).map_or(-1, |count| count as isize);
    };
    let mut random = super::Random::new(state);
    for piece in bytes.chunks_mut(8) {
        piece.copy_from_slice(&random.bits().to_le_bytes()[..piece.len()]);
    }
    STATE.set(Some(random.bits()));
    length as isize
}

#[cfg(test)]
mod tests {
    use std::hash::{BuildHasher, RandomState};

    fn choices(seed: u64) -> Vec<u64> {
        let work = move || {
            super::seed(seed);
            (0..4).map(|_| RandomState::new().hash_one(0_u64)).collect()
        };
        std::thread::spawn(work).join().expect("it does not panic")
    }

    #[test]
    fn hash_maps_follow_the_seed_of_their_thread() {
        assert_eq!(choices(1), choices(1));
        assert_ne!(choices(1), choices(2));
        let unseeded = || std::thread::spawn(|| RandomState::new().hash_one(0_u64)).join().expect("it does not panic");
        assert_ne!(unseeded(), unseeded());
    }
}
