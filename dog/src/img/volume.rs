//! An image argument of `qemu-img` that is a whole VDI: which, in which cluster, and how it was typed.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::words::Words;
use crate::exit::Failure;
use crate::meaning::{Target, shown};
use crate::nbd_export::{NbdExport, NbdPlace};
use crate::qemu::url::{Place, VdiUrl};
use crate::qemu::{exports, rewrite};

/// The options that several subcommands share.
pub const FORMAT: super::words::Known = (b'f', "format", true);
/// Print nothing.
pub const QUIET: super::words::Known = (b'q', "quiet", false);
/// The image is described by options.
pub const IMAGE_OPTS: super::words::Known = (0, "image-opts", false);
/// Of no meaning for a VDI.
pub const FORCE_SHARE: super::words::Known = (b'U', "force-share", false);
/// Secrets and the like, for the program.
pub const OBJECT: super::words::Known = (0, "object", true);

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Volume {
    /// As it was typed.
    pub typed: OsString,
    /// What that means.
    pub url: VdiUrl,
    /// The sheep to ask.
    pub target: Target,
}

impl Volume {
    /// The VDI that a word names; `None` if it names none, or an image of another format inside one.
    pub fn of(word: &OsStr, default: Target) -> Result<Option<Volume>, Failure> {
        let mut found: Vec<VdiUrl> = Vec::new();
        rewrite::word(word.as_bytes(), &mut |url| {
            found.push(url.clone());
            // Only who is named counts here.
            Ok(NbdExport { place: NbdPlace::Unix("/".into()), name: url.name.clone() })
        })?;
        match (found.pop(), found.is_empty()) {
            (Some(url), true) if rewrite::is_raw(word) => {
                let target = exports::target(default, &url.place)?;
                Ok(Some(Volume { typed: word.to_owned(), url, target }))
            }
            _ => Ok(None),
        }
    }

    /// The VDI that the only operand of a subcommand names, unless another format is said to be in it.
    pub fn operand(words: &Words, default: Target) -> Result<Option<Volume>, Failure> {
        match words.operands.as_slice() {
            [word] if is_raw(words.value("format")) => Volume::of(word, default),
            _ => Ok(None),
        }
    }

    /// The VDI's name, for commands.
    pub fn name(&self) -> OsString {
        OsString::from_vec(self.url.name.clone())
    }

    /// The snapshot's tag or id, for commands.
    pub fn snapshot(&self) -> Option<OsString> {
        self.url.snapshot.clone().map(OsString::from_vec)
    }

    /// Fails if this is a snapshot.
    pub fn check_working(&self) -> Result<(), Failure> {
        match &self.url.snapshot {
            None => Ok(()),
            Some(snapshot) => Err(Failure::failed(format!(
                "'{}' is a snapshot and cannot be changed; leave out '{}'",
                self.typed.to_string_lossy(),
                shown(snapshot)
            ))),
        }
    }

    /// Whether both are in the same cluster, as far as that was typed.
    pub fn is_near(&self, other: &Volume) -> bool {
        self.target == other.target || self.url.place == Place::Default || other.url.place == Place::Default
    }
}

/// Whether a format means the VDI itself.
pub fn is_raw(format: Option<&OsStr>) -> bool {
    format.is_none_or(|format| format == "raw" || format == "sheepdog")
}

/// A failure of a command that is run inside another: the usage would be that of the wrong one.
pub fn without_usage(failure: Failure) -> Failure {
    Failure { shows_usage: false, ..failure }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_whole_vdis_are_volumes() {
        let default = Target::Tcp("127.0.0.1:7000".parse().expect("an address"));
        let of = |word: &str| Volume::of(OsStr::new(word), default).expect(word);
        for word in ["sheepdog:d:t", "driver=sheepdog,vdi=d,tag=t", r#"json:{"driver":"sheepdog","vdi":"d","tag":"t"}"#]
        {
            let volume = of(word).expect(word);
            assert_eq!((volume.name(), volume.snapshot(), volume.target), ("d".into(), Some("t".into()), default));
            assert!(volume.check_working().expect_err(word).message.contains("leave out 't'"));
        }
        assert_eq!(of("sheepdog+unix:///d?socket=/s/sock").expect("unix").target, Target::unix("/s/sock".as_ref()));
        for word in ["d", "driver=qcow2,file.driver=sheepdog,file.vdi=d", "/dev/sda"] {
            assert_eq!(of(word), None, "{word}");
        }
        assert!(Volume::of(OsStr::new("sheepdog:"), default).is_err());
    }
}
