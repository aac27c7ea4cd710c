//! `dog img convert` into a VDI: the VDI is made first, with the size of the source, then `qemu-img` fills it through NBD.
//!
//! NBD cannot make volumes, so the program is told not to (`-n`) and that everything reads as zeros so far. If it fails
//! after that, the new VDI stays, as it did with the old driver.

use std::ffi::OsString;

use serde_json::Value;

use super::create::{self, CreateOptions};
use super::volume::{self, FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, QUIET, Volume};
use super::words::{Known, Words};
use crate::exit::Failure;
use crate::meaning::Target;
use crate::qemu::exports::Exports;
use crate::qemu::rewrite;
use crate::qemu::tool::Tool;

const KNOWN: &[Known] = &[
    QUIET,
    FORMAT,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    (b'O', "target-format", true),
    (b'B', "backing", true),
    (b'F', "backing-format", true),
    (b'o', "options", true),
    (b'l', "snapshot", true),
    (b'S', "sparse-size", true),
    (b't', "target-cache", true),
    (b'T', "source-cache", true),
    (b'm', "parallel", true),
    (b'r', "rate-limit", true),
    (b'n', "no-create", false),
    (b'c', "compress", false),
    (b'p', "progress", false),
    (b'C', "copy-range-offloading", false),
    (b'W', "oob", false),
    (0, "target-image-opts", false),
    (0, "target-is-zero", false),
    (0, "salvage", false),
    (0, "bitmaps", false),
    (0, "skip-broken-bitmaps", false),
];

/// Does it if a VDI is to be made and filled: returns only what went wrong, or `None` to leave it to the program.
pub fn run(words: &[OsString], default: Target) -> Result<Option<Failure>, Failure> {
    let Ok(words) = Words::parse(words, KNOWN) else { return Ok(None) };
    let Some((target, sources)) = words.operands.split_last().filter(|(_, sources)| !sources.is_empty()) else {
        return Ok(None);
    };
    let is_made = words.has("no-create") || words.has("target-image-opts");
    if is_made || !volume::is_raw(words.value("target-format")) {
        return Ok(None);
    }
    let Some(volume) = Volume::of(target, default)? else { return Ok(None) };
    let mut options = CreateOptions::default();
    for text in words.values("options") {
        options.take(text)?;
    }
    if words.has("backing") || options.has_backing() {
        return Err(Failure::failed(
            "Converting to a VDI with a backing file is not available in this version; create it with 'dog img create \
             -b', then convert with -n",
        ));
    }
    let mut exports = Exports::new(default);
    let new = rewrite::words(&filling(&words, sources, target), &mut |url| exports.of(url))?.unwrap_or_default();
    let mut size_bytes = 0_u64;
    for source in sources {
        let asked = asking(&words, source);
        let replaced = rewrite::words(&asked, &mut |url| exports.of(url))?.unwrap_or(asked);
        let size = virtual_size(&Tool::Img.output(&replaced)?, source)?;
        size_bytes = size_bytes.saturating_add(size);
    }
    create::create(&volume, create::whole_sectors(size_bytes)?, &options)?;
    Ok(Some(Tool::Img.become_it(&new)))
}

/// The command that fills a VDI that exists and has only zeros.
fn filling(words: &Words, sources: &[OsString], target: &OsString) -> Vec<OsString> {
    let mut new: Vec<OsString> = ["convert", "-n", "--target-is-zero", "-O", "raw"].map(OsString::from).to_vec();
    new.extend(words.typed(|long| !matches!(long, "options" | "target-format" | "backing-format" | "target-is-zero")));
    new.push("--".into());
    new.extend_from_slice(sources);
    new.push(target.clone());
    new
}

/// The command that tells the size of a source.
fn asking(words: &Words, source: &OsString) -> Vec<OsString> {
    let mut asked: Vec<OsString> = ["info", "--output=json"].map(OsString::from).to_vec();
    asked.extend(words.typed(|long| matches!(long, "format" | "object" | "image-opts" | "force-share")));
    asked.push("--".into());
    asked.push(source.clone());
    asked
}

fn virtual_size(answer: &[u8], source: &OsString) -> Result<u64, Failure> {
    let json = serde_json::from_slice::<Value>(answer).unwrap_or_default();
    json.get("virtual-size").and_then(Value::as_u64).ok_or_else(|| {
        Failure::failed(format!(
            "'qemu-img info' did not tell the size of '{}'; create the VDI with 'dog img create', then convert with -n",
            source.to_string_lossy()
        ))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_fills_what_was_made_here() {
        let typed: Vec<OsString> =
            "-p -f qcow2 -O sheepdog -o redundancy=2 -t none a b sheepdog:d".split(' ').map(OsString::from).collect();
        let words = Words::parse(&typed, KNOWN).expect("known");
        let (target, sources) = words.operands.split_last().expect("operands");
        let text = |words: Vec<OsString>| words.join(std::ffi::OsStr::new(" ")).into_string().expect("text");
        assert_eq!(
            text(filling(&words, sources, target)),
            "convert -n --target-is-zero -O raw -p -f qcow2 -t none -- a b sheepdog:d"
        );
        assert_eq!(text(asking(&words, &sources[0])), "info --output=json -f qcow2 -- a");
        assert_eq!(virtual_size(br#"{"virtual-size": 1025}"#, target), Ok(1025));
        assert!(virtual_size(b"?", target).is_err());
    }
}
