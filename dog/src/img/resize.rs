//! `dog img resize`: of a VDI, `dog vdi resize` with the words of `qemu-img`.

use std::ffi::OsString;

use super::create::{text_of, whole_sectors};
use super::volume::{FORMAT, IMAGE_OPTS, OBJECT, QUIET, Volume, without_usage};
use super::words::{Known, Words};
use crate::args;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Selector, Target};
use crate::report::Report;
use crate::vdi;

const KNOWN: &[Known] = &[QUIET, FORMAT, OBJECT, IMAGE_OPTS, (0, "shrink", false), (0, "preallocation", true)];

/// Does it if a VDI is to be resized; `None` leaves it to the program.
pub fn run(words: &[OsString], default: Target) -> Result<Option<Report>, Failure> {
    // The size is always last, because a smaller one looks like an option.
    let Some((size, words)) = words.split_last() else { return Ok(None) };
    let Ok(words) = Words::parse(words, KNOWN) else { return Ok(None) };
    let Some(volume) = Volume::operand(&words, default)? else { return Ok(None) };
    volume.check_working()?;
    if words.value("preallocation").is_some_and(|mode| mode != "off" && mode != "metadata") {
        return Err(Failure::not_available("Allocating the objects that a VDI grows by (--preallocation)"));
    }
    let size = text_of(size)?;
    let mut sheep = Sheep::connect(volume.target)?;
    let old_bytes = vdi::volume::open_header(&mut sheep, &volume.url.name, &Selector::CURRENT)?.size_bytes;
    drop(sheep);
    let size_bytes = new_size(&size, old_bytes)?;
    let shrinks = size_bytes < old_bytes;
    if shrinks && !words.has("shrink") {
        return Err(Failure::failed(format!(
            "The VDI has {old_bytes} bytes: what is beyond {size_bytes} would be lost; use --shrink to do that"
        )));
    }
    let typed = args::Resize { force: shrinks, vdi: volume.name(), size: Some(size_bytes.to_string()) };
    vdi::resize::run(&typed, volume.target).map_err(without_usage)?;
    Ok(Some(if words.has("quiet") { Report::silent() } else { Report::text("Image resized.\n") }))
}

/// `SIZE`, or the difference after a sign.
fn new_size(word: &str, old_bytes: u64) -> Result<u64, Failure> {
    let too_far = || Failure::failed(format!("Invalid size '{word}': the VDI has {old_bytes} bytes"));
    match (word.strip_prefix('+'), word.strip_prefix('-')) {
        (Some(more), _) => old_bytes.checked_add(whole_sectors(meaning::size(more)?)?).ok_or_else(too_far),
        (_, Some(less)) => old_bytes.checked_sub(whole_sectors(meaning::size(less)?)?).ok_or_else(too_far),
        _ => whole_sectors(meaning::size(word)?),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sign_makes_it_a_difference() {
        assert_eq!(new_size("1K", 512), Ok(1024));
        assert_eq!(new_size("+1K", 512), Ok(1536));
        assert_eq!(new_size("-512", 1024), Ok(512));
        assert!(new_size("-1K", 512).is_err() && new_size("+", 512).is_err() && new_size("-f", 512).is_err());
    }
}
