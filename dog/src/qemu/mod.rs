//! QEMU's tools and this cluster: `dog io` and `dog nbd`, and what they share with `dog img`.
//!
//! QEMU spoke the cluster's protocol up to 6.0. These commands run today's tools with every `sheepdog:` volume replaced by
//! the NBD export of the same volume. `url`, `device`, `value`, `option_string` and `rewrite` only translate; `exports` asks
//! where NBD is served; `tool` runs the program.

pub mod device;
pub mod exports;
pub mod option_string;
pub mod rewrite;
pub mod tool;
pub mod url;
pub mod value;

use std::ffi::OsString;

use self::exports::Exports;
use self::tool::Tool;
use crate::exit::Failure;
use crate::meaning::Target;

/// Becomes the tool, with the volumes of its command line replaced; returns only when that fails.
pub fn run(tool: Tool, words: &[OsString], default: Target) -> Failure {
    let mut exports = Exports::new(default);
    match rewrite::words(words, &mut |url| exports.of(url)) {
        Ok(Some(new)) => tool.become_it(&new),
        Ok(None) => tool.become_it(words),
        Err(failure) => failure,
    }
}
