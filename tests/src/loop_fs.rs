//! A small file system on a loop device whose power can be cut.
//!
//! Always holds:
//! 1. [`LoopFs::cut_power`] drops everything that was not flushed to the device: the file system's shutdown operation
//!    with "no log flush" (`xfs_io -x -c shutdown`, which ext4 understands as well).
//! 2. The device and the mount go with the [`LoopFs`]; the device detaches itself on unmount.
//!
//! Needs root, `mount`, and the tools of the file system: see [`LoopFs::missing`].

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::command::{self, find_program};

const DEADLINE: Duration = Duration::from_mins(1);
const PROBE_DEADLINE: Duration = Duration::from_secs(20);

/// The file systems that stores are expected on.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum FsKind {
    /// Journalled, ordered data.
    Ext4,
    /// With reflinks.
    Xfs,
}

impl FsKind {
    fn name(self) -> &'static str {
        match self {
            FsKind::Ext4 => "ext4",
            FsKind::Xfs => "xfs",
        }
    }
}

/// One mounted image.
pub struct LoopFs {
    image: PathBuf,
    mount_point: PathBuf,
    kind: FsKind,
    is_mounted: bool,
}

impl LoopFs {
    /// Why loop-mounted file systems cannot be used here, if they cannot.
    pub fn missing() -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("not root, and only root may mount".to_owned());
        }
        let programs = ["mount", "umount", "mkfs.ext4", "mkfs.xfs", "xfs_io"];
        let missing = programs.into_iter().find(|program| find_program(program).is_none());
        if let Some(program) = missing {
            return Some(format!("no {program}"));
        }
        (!Path::new("/dev/loop-control").exists()).then(|| "no loop devices".to_owned())
    }

    /// Makes `directory/name.img` of `size_mib` (sparse; XFS wants at least 300) and mounts it at `directory/name`.
    pub fn create(directory: &Path, name: &str, kind: FsKind, size_mib: u64) -> Result<LoopFs> {
        let image = directory.join(format!("{name}.img"));
        let mount_point = directory.join(name);
        fs::create_dir_all(&mount_point)?;
        fs::File::create(&image)?.set_len(size_mib << 20)?;
        let mut mkfs = match kind {
            FsKind::Ext4 => {
                let mut mkfs = Command::new("mkfs.ext4");
                // No lazy initialisation: a kernel thread writing inode tables would keep the device busy.
                mkfs.args(["-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0"]);
                mkfs
            }
            FsKind::Xfs => {
                let mut mkfs = Command::new("mkfs.xfs");
                mkfs.arg("-q");
                mkfs
            }
        };
        command::run(mkfs.arg(&image), DEADLINE)?.ok()?;
        let mut file_system = LoopFs { image, mount_point, kind, is_mounted: false };
        file_system.mount("loop")?;
        Ok(file_system)
    }

    /// Where it is mounted.
    pub fn path(&self) -> &Path {
        &self.mount_point
    }

    /// Mounts it with `options` (at least `loop`).
    pub fn mount(&mut self, options: &str) -> Result<()> {
        ensure!(!self.is_mounted, "{} is mounted already", self.mount_point.display());
        let mut mount = Command::new("mount");
        mount.args(["-t", self.kind.name(), "-o", options]).arg(&self.image).arg(&self.mount_point);
        command::run(&mut mount, DEADLINE)?.ok()?;
        self.is_mounted = true;
        Ok(())
    }

    /// Changes the options of the mount, for example to `ro`.
    pub fn remount(&mut self, options: &str) -> Result<()> {
        let mut mount = Command::new("mount");
        mount.args(["-o", &format!("remount,{options}")]).arg(&self.mount_point);
        command::run(&mut mount, DEADLINE)?.ok().map(drop)
    }

    /// Unmounts it. A process that was just killed may hold files for a moment longer.
    pub fn unmount(&mut self) -> Result<()> {
        let started = Instant::now();
        loop {
            let ended = command::run(Command::new("umount").arg(&self.mount_point), DEADLINE)?;
            if ended.status.success() {
                break;
            }
            ensure!(started.elapsed() < Duration::from_secs(20), "{ended}");
            std::thread::sleep(Duration::from_millis(50));
        }
        self.is_mounted = false;
        Ok(())
    }

    /// Drops what was not flushed and makes every later access fail, as if the machine had lost power.
    pub fn cut_power(&mut self) -> Result<()> {
        let mut shutdown = Command::new("xfs_io");
        shutdown.args(["-x", "-c", "shutdown"]).arg(&self.mount_point);
        let ended = command::run(&mut shutdown, DEADLINE)?.ok()?;
        ensure!(ended.stderr.is_empty(), "the file system did not shut down: {ended}");
        let probe = self.mount_point.join(".power-is-off");
        ensure!(fs::write(&probe, b"x").is_err(), "{} still takes writes", self.mount_point.display());
        Ok(())
    }

    /// [`LoopFs::unmount`], then mounted again: the file system replays its own journal.
    pub fn power_on(&mut self) -> Result<()> {
        let started = Instant::now();
        let probe = self.mount_point.join(".power-is-on");
        loop {
            self.unmount()?;
            self.mount("loop").with_context(|| format!("after the power cut of {}", self.image.display()))?;
            // As long as another mount namespace holds it, what comes back is the file system that was shut down.
            match fs::write(&probe, b"x").and_then(|()| fs::remove_file(&probe)) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == std::io::ErrorKind::StorageFull => return Ok(()),
                Err(error) if started.elapsed() > PROBE_DEADLINE => {
                    return Err(error).context(format!("{} is not mounted afresh", self.mount_point.display()));
                }
                Err(_) => std::thread::sleep(Duration::from_millis(200)),
            }
        }
    }
}

impl Drop for LoopFs {
    fn drop(&mut self) {
        if self.is_mounted
            && let Err(error) = self.unmount()
        {
            eprintln!("left mounted: {}: {error:#}", self.mount_point.display());
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_power_cut_keeps_what_was_flushed_and_drops_the_rest() {
        if let Some(reason) = LoopFs::missing() {
            command::skipped("power cuts", &reason);
            return;
        }
        for kind in [FsKind::Ext4, FsKind::Xfs] {
            let scratch = tempfile::tempdir().expect("a temporary directory");
            let mut disk = LoopFs::create(scratch.path(), "disk", kind, 300).expect("a file system");
            let (flushed, unflushed) = (disk.path().join("flushed"), disk.path().join("unflushed"));
            fs::write(&flushed, b"kept").expect("room");
            fs::File::open(&flushed).and_then(|file| file.sync_all()).expect("flushed");
            fs::File::open(disk.path()).and_then(|directory| directory.sync_all()).expect("flushed");
            fs::write(&unflushed, b"dropped").expect("room");
            disk.cut_power().expect("power goes");
            assert!(fs::read(&flushed).is_err() || fs::write(&flushed, b"x").is_err(), "still alive");
            disk.power_on().expect("power comes back");
            assert_eq!(fs::read(&flushed).expect("flushed before"), b"kept");
            assert!(
                !fs::read(&unflushed).is_ok_and(|content| content == b"dropped"),
                "{kind:?} kept what was not flushed"
            );
        }
    }
}
