//! A private iSCSI target: `tgtd` with its sheepdog backing store, reached by the `iscsi:` driver of `qemu-img`.
//!
//! It has its own management socket and its own port on 127.0.0.1, so it neither disturbs nor meets another `tgtd`.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::command::{self, Finished};
use crate::spawn::free_port;

const DEADLINE: Duration = Duration::from_secs(30);
const TARGET: &str = "iqn.2026-01.org.example:volume";

/// A running target with one logical unit.
pub struct Target {
    child: Child,
    port: u16,
    management_socket: PathBuf,
    log: PathBuf,
}

impl Target {
    /// Exports `backing_store` (`unix:SOCKET:VOLUME` or `tcp:HOST:PORT:VOLUME`); keeps its files in `directory`.
    pub fn export(directory: &Path, backing_store: &str) -> Result<Target> {
        let port = free_port()?;
        let management_socket = directory.join(format!("tgt-{port}"));
        let log = directory.join(format!("tgtd-{port}.log"));
        let tgtd = command::find_program("tgtd").context("no tgtd: install the package tgt")?;
        let output = File::create(&log)?;
        let child = Command::new(tgtd)
            .args(["-f", "-C", &port.to_string(), "--iscsi", &format!("portal=127.0.0.1:{port}")])
            .env("TGT_IPC_SOCKET", &management_socket)
            .stdin(Stdio::null())
            .stdout(output.try_clone()?)
            .stderr(output)
            .spawn()?;
        let target = Target { child, port, management_socket, log };
        target.wait_ready()?;
        target.admin(&["--mode", "target", "--op", "new", "--tid", "1", "-T", TARGET])?.ok()?;
        let unit = ["--mode", "logicalunit", "--op", "new", "--tid", "1", "--lun", "1"];
        let store = ["--bstype", "sheepdog", "--backing-store", backing_store];
        target.admin(&[&unit[..], &store[..]].concat())?.ok().with_context(|| target.log_text())?;
        target.admin(&["--mode", "target", "--op", "bind", "--tid", "1", "-I", "ALL"])?.ok()?;
        Ok(target)
    }

    /// What `qemu-img` calls the logical unit.
    pub fn url(&self) -> String {
        format!("iscsi://127.0.0.1:{}/{TARGET}/1", self.port)
    }

    /// What the target said so far.
    pub fn log_text(&self) -> String {
        String::from_utf8_lossy(&std::fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    fn admin(&self, arguments: &[&str]) -> Result<Finished> {
        let tgtadm = command::find_program("tgtadm").context("no tgtadm: install the package tgt")?;
        let mut command = Command::new(tgtadm);
        command.args(["-C", &self.port.to_string(), "--lld", "iscsi"]).args(arguments);
        command::run(command.env("TGT_IPC_SOCKET", &self.management_socket), DEADLINE)
    }

    fn wait_ready(&self) -> Result<()> {
        let started = Instant::now();
        loop {
            let answer = self.admin(&["--mode", "system", "--op", "show"])?;
            if answer.status.success() {
                return Ok(());
            }
            if started.elapsed() > DEADLINE {
                bail!("tgtd does not come up: {answer}\n{}", self.log_text());
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// Closes the logical unit (the backing store then releases its volume) and ends the target.
    pub fn close(self) -> Result<()> {
        let ended = self.admin(&["--mode", "target", "--op", "delete", "--force", "--tid", "1"])?;
        ensure!(ended.status.success(), "{ended}\n{}", self.log_text());
        Ok(())
    }
}

impl Drop for Target {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
