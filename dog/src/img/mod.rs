//! `dog img`: `qemu-img` for `sheepdog:` volumes. One file per subcommand that does something to a VDI itself.
//!
//! Making, resizing, describing a VDI and handling its snapshots has no form in NBD, so these are done here, by the commands
//! of `dog vdi`. All others become the program. A command line without a volume reaches it as it was typed, and so does one
//! with options that are not known here: the program may be newer, or says what is wrong with them.

pub mod info;

mod convert;
mod create;
mod resize;
mod snapshot;
mod volume;
mod words;

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt;

use crate::exit::Failure;
use crate::meaning::Target;
use crate::qemu;
use crate::qemu::tool::Tool;
use crate::report::Report;

/// Runs the command.
pub fn run(typed: &[OsString], default: Target) -> Result<Report, Failure> {
    let words = after_subcommand(typed).filter(|_| typed.iter().any(|word| may_have_volume(word.as_bytes())));
    let done = match words {
        Some(("create", words)) => create::run(words, default)?,
        Some(("info", words)) => info::run(words, default)?,
        Some(("resize", words)) => resize::run(words, default)?,
        Some(("snapshot", words)) => snapshot::run(words, default)?,
        Some(("convert", words)) => match convert::run(words, default)? {
            Some(failure) => return Err(failure),
            None => None,
        },
        _ => None,
    };
    match done {
        Some(report) => Ok(report),
        None => Err(qemu::run(Tool::Img, typed, default)),
    }
}

/// The subcommand and the words after it. Before it stand the program's own options, of which only -T has a value.
fn after_subcommand(typed: &[OsString]) -> Option<(&str, &[OsString])> {
    let mut at = 0;
    while let Some(word) = typed.get(at).filter(|word| word.as_bytes().starts_with(b"-")) {
        at += if word == "-T" || word == "--trace" { 2 } else { 1 };
    }
    Some((typed.get(at)?.to_str()?, &typed[at + 1..]))
}

/// Whether a closer look is worth it: volumes are not named without this.
fn may_have_volume(word: &[u8]) -> bool {
    let name = b"sheepdog";
    word.windows(name.len()).any(|part| part == name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_subcommand_follows_the_options_of_the_program() {
        let after = |line: &str| {
            let typed: Vec<OsString> = line.split_whitespace().map(OsString::from).collect();
            after_subcommand(&typed).map(|(name, words)| (name.to_owned(), words.len()))
        };
        assert_eq!(after("info x"), Some(("info".to_owned(), 1)));
        assert_eq!(after("-T trace=x --y info a b"), Some(("info".to_owned(), 2)));
        assert_eq!((after("--help"), after(""), after("-T")), (None, None, None));
    }
}
