//! A real guest: Debian's kernel with a busybox shell in its initramfs, under QEMU without KVM, steered over its serial line.
//!
//! `GUEST_DIR` (or `~/.cache/sheep-guest`) holds `vmlinuz`, `busybox` and the kernel modules; `.ci/test-all` puts them there.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::command::{self, Running};

/// From power-on to the shell: seconds when the machine is quiet.
const BOOT_DEADLINE: Duration = Duration::from_mins(2);
/// One line typed into the guest, or one command of QEMU's monitor.
const LINE_DEADLINE: Duration = Duration::from_mins(1);
/// In the order they depend on each other.
const MODULES: [&str; 6] =
    ["virtio_ring", "virtio", "virtio_pci_modern_dev", "virtio_pci_legacy_dev", "virtio_pci", "virtio_blk"];

const INIT: &str = r#"#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /mnt
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t sysfs sysfs /sys
/bin/busybox mount -t devtmpfs devtmpfs /dev
/bin/busybox --install -s /bin
for module in /modules/*; do insmod $module; done
exec 0</dev/ttyS0 1>/dev/ttyS0 2>&1
stty -echo
echo guest-is-up
while read -r line; do eval "$line"; echo "ended:$?"; done
"#;

/// What a guest is made of.
pub struct GuestParts {
    directory: PathBuf,
}

impl GuestParts {
    /// The parts, if this machine has them.
    pub fn find() -> Option<GuestParts> {
        let directory = std::env::var_os("GUEST_DIR").map(PathBuf::from).or_else(|| {
            let home = std::env::var_os("HOME")?;
            Some(Path::new(&home).join(".cache/sheep-guest"))
        })?;
        directory.join("vmlinuz").is_file().then_some(GuestParts { directory })
    }

    /// Writes the initramfs: a cpio archive in the "newc" format (Linux, Documentation/driver-api/early-userspace).
    fn write_initramfs(&self, path: &Path) -> Result<()> {
        let mut archive = Vec::new();
        for directory in ["bin", "modules"] {
            append_entry(&mut archive, directory, 0o040_755, &[]);
        }
        append_entry(&mut archive, "init", 0o100_755, INIT.as_bytes());
        append_entry(&mut archive, "bin/busybox", 0o100_755, &self.part("busybox")?);
        for (order, module) in MODULES.iter().enumerate() {
            let content = self.part(&format!("{module}.ko"))?;
            append_entry(&mut archive, &format!("modules/{order}-{module}.ko"), 0o100_644, &content);
        }
        append_entry(&mut archive, "TRAILER!!!", 0, &[]);
        std::fs::write(path, archive)?;
        Ok(())
    }

    fn part(&self, name: &str) -> Result<Vec<u8>> {
        let path = self.directory.join(name);
        std::fs::read(&path).with_context(|| format!("{}", path.display()))
    }
}

fn append_entry(archive: &mut Vec<u8>, name: &str, mode: u32, content: &[u8]) {
    // inode, mode, uid, gid, links, mtime, size, device major and minor (twice), length of the name, checksum
    let inode = archive.len() as u32 + 1;
    let fields = [inode, mode, 0, 0, 1, 0, content.len() as u32, 0, 0, 0, 0, name.len() as u32 + 1, 0];
    archive.extend_from_slice(b"070701");
    for field in fields {
        archive.extend_from_slice(format!("{field:08x}").as_bytes());
    }
    archive.extend_from_slice(name.as_bytes());
    archive.push(0);
    archive.resize(archive.len().next_multiple_of(4), 0);
    archive.extend_from_slice(content);
    archive.resize(archive.len().next_multiple_of(4), 0);
}

/// A running guest. Dropping it ends its QEMU.
pub struct BootedGuest {
    qemu: Running,
    serial: Line,
    monitor: Line,
}

impl BootedGuest {
    /// Boots a guest with `arguments` for its disks; its sockets and initramfs go to `scratch`.
    pub fn boot(qemu_system: &Path, parts: &GuestParts, scratch: &Path, arguments: &[&str]) -> Result<BootedGuest> {
        let mut guest = BootedGuest::resume(qemu_system, parts, scratch, arguments)?;
        guest.serial.read_until("guest-is-up", BOOT_DEADLINE)?;
        Ok(guest)
    }

    /// As `boot`, with arguments that load the state of a guest that was booted before.
    pub fn resume(qemu_system: &Path, parts: &GuestParts, scratch: &Path, arguments: &[&str]) -> Result<BootedGuest> {
        let initramfs = scratch.join("initramfs");
        let (serial, monitor) = (scratch.join("serial"), scratch.join("monitor"));
        for socket in [&serial, &monitor] {
            let _ = std::fs::remove_file(socket);
        }
        parts.write_initramfs(&initramfs)?;
        let mut qemu = Command::new(qemu_system);
        qemu.args([
            "-L",
            "/usr/share/seabios",
            "-L",
            "/usr/share/qemu",
            "-accel",
            "tcg",
            "-cpu",
            "qemu64",
            "-m",
            "256",
        ]);
        qemu.args(["-nodefaults", "-no-user-config", "-display", "none", "-nic", "none"]);
        qemu.arg("-kernel").arg(parts.directory.join("vmlinuz")).arg("-initrd").arg(&initramfs);
        qemu.args(["-append", "console=ttyS0 quiet panic=-1"]);
        qemu.arg("-serial").arg(format!("unix:{},server=on,wait=off", serial.display()));
        qemu.arg("-monitor").arg(format!("unix:{},server=on,wait=off", monitor.display()));
        qemu.args(arguments);
        let mut qemu = command::start(&mut qemu, &[])?;
        let opened = Line::open(&monitor, &mut qemu).and_then(|monitor| Ok((Line::open(&serial, &mut qemu)?, monitor)));
        let (serial, monitor) = match opened {
            Ok(lines) => lines,
            Err(error) => {
                return Err(
                    error.context(qemu.finish(Duration::ZERO).map_or_else(|e| e.to_string(), |f| f.to_string()))
                );
            }
        };
        let mut guest = BootedGuest { qemu, serial, monitor };
        guest.monitor.read_until("(qemu) ", LINE_DEADLINE)?;
        Ok(guest)
    }

    /// Types a line into the guest's shell and gives what it printed; fails if the line did.
    pub fn run(&mut self, line: &str) -> Result<String> {
        self.serial.write(line)?;
        let said = self.serial.read_until("ended:", LINE_DEADLINE).with_context(|| format!("the guest's `{line}`"))?;
        let code = self.serial.read_until("\n", LINE_DEADLINE)?;
        ensure!(code.trim() == "0", "the guest's `{line}` ended with {code}: {said}");
        Ok(said.trim().replace('\r', ""))
    }

    /// Gives QEMU's monitor a command that must have nothing to say.
    pub fn monitor_quietly(&mut self, line: &str) -> Result<()> {
        let said = self.monitor(line)?;
        ensure!(said.is_empty(), "QEMU's answer to `{line}`: {said}");
        Ok(())
    }

    /// Gives QEMU's monitor a command, and gives its answer.
    pub fn monitor(&mut self, line: &str) -> Result<String> {
        self.monitor.write(line)?;
        // The monitor is a line editor: it repeats what is typed, with control sequences, on the first line.
        let said = self.monitor.read_until("\n(qemu) ", LINE_DEADLINE)?;
        Ok(said.split_once('\n').map_or("", |(_, answer)| answer).trim().to_owned())
    }

    /// Ends QEMU in an orderly way.
    pub fn quit(mut self) -> Result<()> {
        self.monitor.write("quit")?;
        self.qemu.finish(LINE_DEADLINE)?.ok().map(drop)
    }
}

/// A line-based conversation.
struct Line {
    socket: UnixStream,
    unread: Vec<u8>,
}

impl Line {
    fn open(path: &Path, qemu: &mut Running) -> Result<Line> {
        let deadline = Instant::now() + LINE_DEADLINE;
        loop {
            match UnixStream::connect(path) {
                Ok(socket) => {
                    socket.set_read_timeout(Some(Duration::from_millis(100)))?;
                    return Ok(Line { socket, unread: Vec::new() });
                }
                Err(error) if !qemu.is_running()? || Instant::now() > deadline => {
                    return Err(error).with_context(|| format!("{}", path.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(20)),
            }
        }
    }

    fn write(&mut self, line: &str) -> Result<()> {
        self.socket.write_all(format!("{line}\n").as_bytes())?;
        Ok(())
    }

    /// Everything up to the end of `mark`.
    fn read_until(&mut self, mark: &str, patience: Duration) -> Result<String> {
        let deadline = Instant::now() + patience;
        let mut buffer = [0; 4096];
        loop {
            if let Some(at) = self.unread.windows(mark.len()).position(|window| window == mark.as_bytes()) {
                let rest = self.unread.split_off(at + mark.len());
                let mut said = std::mem::replace(&mut self.unread, rest);
                said.truncate(at);
                return Ok(String::from_utf8_lossy(&said).into_owned());
            }
            match self.socket.read(&mut buffer) {
                Ok(0) => bail!("QEMU ended; last: {}", String::from_utf8_lossy(&self.unread)),
                Ok(count) => self.unread.extend_from_slice(&buffer[..count]),
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    let so_far = String::from_utf8_lossy(&self.unread);
                    ensure!(Instant::now() < deadline, "no `{mark}` within {patience:.0?}; last: {so_far}");
                }
                Err(error) => return Err(error.into()),
            }
        }
    }
}
