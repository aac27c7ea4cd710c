//! QEMU's tools as clients: those of QEMU 5.2, which speak the native protocol, and those of this machine, which reach
//! a volume through other means.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use crate::command::{self, Finished, Running, find_program};
use crate::spawn::Node;

/// Any single command on the volumes of the tests; the largest copies 1 GiB twice over.
const DEADLINE: Duration = Duration::from_mins(10);

/// One set of `qemu-img` and `qemu-io`.
pub struct Qemu {
    directory: PathBuf,
}

impl Qemu {
    /// QEMU 5.2, built with its sheepdog driver; says loudly that `what` is skipped where it is missing.
    pub fn with_sheepdog(what: &str) -> Option<Qemu> {
        let found = command::qemu52().map(Qemu::at);
        if found.is_none() {
            command::skipped(what, "no QEMU 5.2 with the sheepdog driver (QEMU52_DIR names its directory)");
        }
        found
    }

    /// The tools in a directory.
    pub fn at(directory: PathBuf) -> Qemu {
        Qemu { directory }
    }

    /// The tools installed on this machine.
    pub fn installed() -> Result<Qemu> {
        let program = find_program("qemu-img").context("no qemu-img: install the package qemu-utils")?;
        let directory = program.parent().context("qemu-img has no directory")?.to_path_buf();
        Ok(Qemu { directory })
    }

    /// The emulator, if it was built with the tools.
    pub fn system(&self) -> Option<PathBuf> {
        Some(self.directory.join("qemu-system-x86_64")).filter(|program| program.is_file())
    }

    /// Runs `qemu-img`.
    pub fn img(&self, arguments: &[&str]) -> Result<Finished> {
        command::run(Command::new(self.directory.join("qemu-img")).args(arguments), DEADLINE)
    }

    /// Starts `qemu-img` and does not wait.
    pub fn start_img(&self, arguments: &[&str]) -> Result<Running> {
        command::start(Command::new(self.directory.join("qemu-img")).args(arguments), &[])
    }

    /// Runs `qemu-io` on a raw image with `options`, then one command after the other; fails if any of them fails.
    pub fn io(&self, url: &str, options: &[&str], commands: &[&str]) -> Result<Finished> {
        let mut qemu_io = Command::new(self.directory.join("qemu-io"));
        qemu_io.args(["-f", "raw"]).args(options);
        for command in commands {
            qemu_io.args(["-c", command]);
        }
        let ended = command::run(qemu_io.arg(url), DEADLINE)?.ok()?;
        let is_wrong = ["verification failed", "error", "failed:"].iter().any(|word| ended.out().contains(word));
        ensure!(!is_wrong, "{ended}");
        Ok(ended)
    }

    /// Whether `url` reads as `pattern` throughout a range.
    pub fn expect_pattern(&self, url: &str, pattern: u8, offset: u64, length: u64) -> Result<()> {
        self.io(url, &["-r"], &[&format!("read -P {pattern} {offset} {length}")]).map(drop)
    }

    /// Fails unless two images hold the same content.
    pub fn compare(&self, left: &str, right: &str) -> Result<()> {
        let ended = self.img(&["compare", "-f", "raw", "-F", "raw", left, right])?.ok()?;
        ensure!(ended.out().contains("identical"), "{ended}");
        Ok(())
    }
}

/// A volume over TCP, as QEMU names it; `name` may end in `#TAG` or `#NUMBER`.
pub fn tcp_url(node: &Node, name: &str) -> String {
    format!("sheepdog://127.0.0.1:{}/{name}", node.port)
}

/// A volume over the unix socket of a node; `name` may end in `#TAG` or `#NUMBER`.
pub fn unix_url(node: &Node, name: &str) -> String {
    let (volume, snapshot) =
        name.split_once('#').map_or((name, String::new()), |(name, tag)| (name, format!("#{tag}")));
    format!("sheepdog+unix:///{volume}?socket={}{snapshot}", node.socket().display())
}

/// A path as an argument.
pub fn text(path: &Path) -> &str {
    path.to_str().expect("temporary directories have plain names")
}
