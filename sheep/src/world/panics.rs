//! Panics. Ours are broken invariants and end the process (`main`): half a node is worse than none. One of a library that was
//! given damaged bytes of a file is an error of that file.

use std::cell::Cell;
use std::panic::{AssertUnwindSafe, catch_unwind};

thread_local! {
    static CONTAINED: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread's panic is about to become an error.
pub fn is_contained() -> bool {
    CONTAINED.get()
}

/// Runs what may panic over bytes of a file; its words, if it does. What it was making must not be used any more.
pub fn contain<T>(work: impl FnOnce() -> T) -> Result<T, String> {
    let before = CONTAINED.replace(true);
    let done = catch_unwind(AssertUnwindSafe(work));
    CONTAINED.set(before);
    done.map_err(|panic| {
        let text = panic.downcast_ref::<&str>().copied().or(panic.downcast_ref::<String>().map(String::as_str));
        text.unwrap_or("it makes no sense").to_owned()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_contained_panic_is_an_error_and_only_that_one() {
        assert_eq!(contain(|| 5), Ok(5));
        assert_eq!(contain(|| -> u8 { panic!("page {}", 7) }), Err("page 7".to_owned()));
        assert!(!is_contained());
        assert!(contain(is_contained) == Ok(true) && !is_contained());
    }
}
