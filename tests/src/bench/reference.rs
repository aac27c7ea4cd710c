//! `qemu-nbd` on a raw file in the same directory as the stores: one copy, no network between machines.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::OBJECT_BYTES;
use super::nbd::Nbd;
use crate::command::find_program;

/// A running `qemu-nbd`, ended with this. Its file stays until another takes the name.
pub struct Reference {
    child: Child,
    socket: PathBuf,
    /// What it was started with.
    pub shown: String,
}

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Reference {
    /// On a file that was written in full, or on one that is all a hole.
    pub fn start(directory: &Path, name: &str, size_bytes: u64, is_full: bool) -> Result<Reference> {
        let image = directory.join(format!("{name}.raw"));
        let socket = directory.join(format!("{name}.sock"));
        let mut file = fs::File::create(&image)?;
        if is_full {
            let block = vec![0x5a; OBJECT_BYTES as usize];
            for _ in 0..size_bytes / OBJECT_BYTES {
                file.write_all(&block)?;
            }
        }
        file.set_len(size_bytes)?;
        file.sync_all()?;
        let start = |aio: &str| {
            // Where the machine has `setpriv`, it ends with the benchmark even if that is killed.
            let mut command = match find_program("setpriv") {
                Some(setpriv) => {
                    let mut command = Command::new(setpriv);
                    command.args(["--pdeathsig", "KILL", "--", "qemu-nbd"]);
                    command
                }
                None => Command::new("qemu-nbd"),
            };
            command
                .args(["--cache=none", "-f", "raw", "--persistent", "-k"])
                .arg(&socket)
                .arg(format!("--aio={aio}"))
                .arg(&image)
                .stdin(Stdio::null())
                .spawn()
                .context("qemu-nbd is not installed (package qemu-utils)")
        };
        for aio in ["io_uring", "native"] {
            let child = start(aio)?;
            let shown = format!("qemu-nbd --cache=none --aio={aio} on a raw file");
            let reference = Reference { child, socket: socket.clone(), shown };
            for _ in 0..100 {
                std::thread::sleep(Duration::from_millis(20));
                if reference.connect().is_ok() {
                    return Ok(reference);
                }
            }
        }
        bail!("qemu-nbd does not serve");
    }

    /// A connection to it.
    pub fn connect(&self) -> Result<Nbd> {
        Nbd::connect(&self.socket, "")
    }

    /// Its process.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }
}
