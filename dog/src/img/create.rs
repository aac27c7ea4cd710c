//! `dog img create`: of a VDI, `dog vdi create` or `dog vdi clone` with the words of `qemu-img`.

use std::ffi::{OsStr, OsString};

use super::volume::{self, FORMAT, OBJECT, QUIET, Volume, without_usage};
use super::words::{Known, Words};
use crate::args;
use crate::exit::Failure;
use crate::meaning::{self, Selector, Target};
use crate::qemu::option_string;
use crate::report::Report;
use crate::vdi;

const KNOWN: &[Known] = &[
    QUIET,
    FORMAT,
    OBJECT,
    (b'b', "backing", true),
    (b'F', "backing-format", true),
    (b'o', "options", true),
    (b'u', "unsafe", false),
];
const SECTOR_BYTES: u64 = 512;

/// Does it if a VDI is to be made; `None` leaves it to the program.
pub fn run(words: &[OsString], default: Target) -> Result<Option<Report>, Failure> {
    let Ok(words) = Words::parse(words, KNOWN) else { return Ok(None) };
    let (word, size) = match words.operands.as_slice() {
        [word] => (word, None),
        [word, size] => (word, Some(size)),
        _ => return Ok(None),
    };
    let Some(volume) = Volume::of(word, default)?.filter(|_| volume::is_raw(words.value("format"))) else {
        return Ok(None);
    };
    let mut options = CreateOptions::default();
    for text in words.values("options") {
        options.take(text)?;
    }
    if let Some(backing) = words.value("backing") {
        options.backing = Some(backing.to_owned());
    }
    if let Some(size) = size {
        options.size = Some(text_of(size)?);
    }
    let size_bytes = match &options.backing {
        Some(backing) => {
            let backing = Volume::of(backing, default)?;
            clone(&volume, backing.as_ref(), &options)?
        }
        None => {
            let size = options.size.as_deref().ok_or_else(|| {
                Failure::failed("The size is missing; give it last, such as: dog img create sheepdog:disk1 20G")
            })?;
            let size_bytes = whole_sectors(meaning::size(size)?)?;
            create(&volume, size_bytes, &options)?;
            size_bytes
        }
    };
    if words.has("quiet") {
        return Ok(Some(Report::silent()));
    }
    let name = volume.typed.to_string_lossy();
    Ok(Some(Report::text(format!("Formatting '{name}', fmt=raw size={size_bytes}\n"))))
}

/// What `-o` says about a new VDI.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct CreateOptions {
    size: Option<String>,
    backing: Option<OsString>,
    copies: Option<String>,
    shift: Option<u8>,
    preallocates: bool,
}

impl CreateOptions {
    /// Takes the value of one `-o`.
    pub fn take(&mut self, text: &OsStr) -> Result<(), Failure> {
        for part in option_string::split(std::os::unix::ffi::OsStrExt::as_bytes(text)) {
            let value = meaning::shown(&part.value).into_owned();
            match part.key.as_deref() {
                Some("size") => self.size = Some(value),
                Some("redundancy") => self.copies = Some(value),
                Some("object_size") => self.shift = Some(object_shift(&value)?),
                Some("backing_file") => {
                    self.backing = Some(std::os::unix::ffi::OsStringExt::from_vec(part.value));
                }
                // The format of a backing VDI is raw by nature.
                Some("backing_fmt") => {}
                Some("preallocation") => {
                    self.preallocates = match value.as_str() {
                        "full" => true,
                        // A VDI's map is always complete.
                        "off" | "metadata" => false,
                        _ => {
                            return Err(Failure::failed(format!(
                                "Invalid preallocation '{value}': must be off, metadata or full"
                            )));
                        }
                    }
                }
                None if value.is_empty() => {}
                key => {
                    return Err(Failure::failed(format!(
                        "Unknown option '{}' of a VDI: must be size, redundancy, object_size, preallocation or \
                         backing_file",
                        key.unwrap_or(&value)
                    )));
                }
            }
        }
        Ok(())
    }

    /// Whether the new VDI shall begin as a copy of something.
    pub fn has_backing(&self) -> bool {
        self.backing.is_some()
    }
}

/// log2 of an object size in bytes.
fn object_shift(word: &str) -> Result<u8, Failure> {
    let bytes = meaning::size(word)?;
    if !bytes.is_power_of_two() {
        return Err(Failure::failed(format!("Invalid object_size '{word}': must be a power of two, such as 4M")));
    }
    let shift = bytes.trailing_zeros().to_string();
    Ok(meaning::shift(Some(&shift))?.unwrap_or_default())
}

/// What QEMU calls a size is a whole number of sectors.
pub fn whole_sectors(size_bytes: u64) -> Result<u64, Failure> {
    size_bytes
        .checked_next_multiple_of(SECTOR_BYTES)
        .ok_or_else(|| Failure::failed(format!("The size {size_bytes} is larger than any VDI can be")))
}

/// Makes an empty VDI.
pub fn create(volume: &Volume, size_bytes: u64, options: &CreateOptions) -> Result<(), Failure> {
    volume.check_working()?;
    let typed = args::Create {
        prealloc: options.preallocates,
        hyper: false,
        copies: options.copies.clone(),
        block_size_shift: options.shift.map(|shift| shift.to_string()),
        raw: false,
        verbose: false,
        vdi: volume.name(),
        size: Some(size_bytes.to_string()),
    };
    vdi::create::run(&typed, volume.target).map(drop).map_err(without_usage)
}

/// Makes a VDI that begins as a copy of a snapshot, and tells its size.
fn clone(volume: &Volume, backing: Option<&Volume>, options: &CreateOptions) -> Result<u64, Failure> {
    volume.check_working()?;
    let source = backing.filter(|backing| backing.url.snapshot.is_some()).ok_or_else(|| {
        Failure::failed(
            "A VDI can begin only as a copy of a snapshot of a VDI; take one with 'dog img snapshot -c TAG', then give \
             -b sheepdog:NAME:TAG",
        )
    })?;
    if !volume.is_near(source) {
        return Err(Failure::failed(format!(
            "'{}' and '{}' name different sheep; name the same for both",
            volume.typed.to_string_lossy(),
            source.typed.to_string_lossy()
        )));
    }
    if options.copies.is_some() || options.shift.is_some() {
        return Err(Failure::failed(
            "A clone shares the objects of its snapshot, so redundancy and object_size are the snapshot's; leave them out",
        ));
    }
    let snapshot = source.snapshot();
    let selector = Selector::of(snapshot.as_deref())?;
    let mut sheep = crate::connect::Sheep::connect(volume.target)?;
    let base_bytes = vdi::volume::open_header(&mut sheep, &source.url.name, &selector)?.size_bytes;
    drop(sheep);
    let size_bytes = match options.size.as_deref() {
        Some(size) => whole_sectors(meaning::size(size)?)?,
        None => base_bytes,
    };
    if size_bytes < base_bytes {
        return Err(Failure::failed(format!(
            "A clone cannot be smaller than its snapshot, which has {base_bytes} bytes; leave out the size"
        )));
    }
    let typed = args::Clone {
        snapshot: args::SnapshotWord { word: snapshot },
        prealloc: options.preallocates,
        no_share: false,
        raw: false,
        verbose: false,
        source: source.name(),
        target: Some(volume.name()),
    };
    vdi::clone::run(&typed, volume.target).map_err(without_usage)?;
    if size_bytes > base_bytes {
        let typed = args::Resize { force: false, vdi: volume.name(), size: Some(size_bytes.to_string()) };
        vdi::resize::run(&typed, volume.target)
            .map_err(|failure| without_usage(failure).then("The clone was made, but has the size of its snapshot"))?;
    }
    Ok(size_bytes)
}

/// A word that can only be text.
pub fn text_of(word: &OsStr) -> Result<String, Failure> {
    let text = word.to_str().ok_or_else(|| Failure::failed(format!("'{}' is not text", word.to_string_lossy())))?;
    Ok(text.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn options_are_those_of_the_old_driver() {
        let mut options = CreateOptions::default();
        options
            .take(OsStr::new("redundancy=2,object_size=8M,preallocation=full,size=1G,backing_file=sheepdog:a,,b:t"))
            .expect("all known");
        let expected = CreateOptions {
            size: Some("1G".to_owned()),
            backing: Some("sheepdog:a,b:t".into()),
            copies: Some("2".to_owned()),
            shift: Some(23),
            preallocates: true,
        };
        assert_eq!(options, expected);
        for (text, reason) in [
            ("cluster_size=64k", "Unknown option 'cluster_size'"),
            ("redundancy", "Unknown option 'redundancy'"),
            ("object_size=3M", "power of two"),
            ("object_size=4k", "between 20 and 31"),
            ("preallocation=falloc", "must be off, metadata or full"),
        ] {
            let failure = options.take(OsStr::new(text)).expect_err(text);
            assert!(failure.message.contains(reason), "{text}: {failure}");
        }
        assert_eq!((whole_sectors(1), whole_sectors(1024)), (Ok(512), Ok(1024)));
        assert!(whole_sectors(u64::MAX).is_err());
    }
}
