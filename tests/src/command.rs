//! Runs other people's programs: with a deadline, with their output kept, and never silently left out.
//!
//! Always holds:
//! 1. A program that does not end in time is killed and reported with what it had printed.
//! 2. Output goes to unnamed files, so that a child which keeps a descriptor open cannot make the caller wait.
//! 3. A test that cannot run for want of a program says `SKIPPED` on standard error, with the reason.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    /// The command as it was given, for messages.
    pub shown: String,
    /// How it ended.
    pub status: ExitStatus,
    /// Everything it wrote to standard output.
    pub stdout: Vec<u8>,
    /// Everything it wrote to standard error.
    pub stderr: Vec<u8>,
    /// From its start to its end.
    pub took: Duration,
}

impl Finished {
    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }

    /// The exit code; a program ended by a signal has none.
    pub fn code(&self) -> Option<i32> {
        self.status.code()
    }

    /// Fails, with all output, unless the program exited 0.
    pub fn ok(self) -> Result<Finished> {
        self.exits(0)
    }

    /// Fails, with all output, unless the program exited with `code`.
    pub fn exits(self, code: i32) -> Result<Finished> {
        ensure!(self.code() == Some(code), "expected exit code {code}: {self}");
        Ok(self)
    }

    /// Fails unless the program refused: a non-zero exit code of its own (no signal) and at least one line of reason.
    pub fn refused(self) -> Result<Finished> {
        ensure!(matches!(self.code(), Some(1..)), "expected a refusal with a non-zero exit code: {self}");
        ensure!(!self.err().trim().is_empty(), "refused without a reason on standard error: {self}");
        ensure!(!self.err().contains("panicked"), "refused by panicking: {self}");
        Ok(self)
    }
}

impl std::fmt::Display for Finished {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "`{}` ended with {} after {:.1?}", self.shown, self.status, self.took)?;
        write!(f, "\n--- its output:\n{}--- its errors:\n{}---", self.out(), self.err())
    }
}

/// The command line as a person would type it, without quoting.
pub fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    words.extend(command.get_args().map(|argument| argument.to_string_lossy().into_owned()));
    words.join(" ")
}

/// A program under way, started by [`start`].
pub struct Running {
    shown: String,
    child: Child,
    stdout: File,
    stderr: File,
    started: Instant,
}

/// Starts `command` with `input` on its standard input.
pub fn start(command: &mut Command, input: &[u8]) -> Result<Running> {
    let shown = shown(command);
    let stdout = tempfile::tempfile()?;
    let stderr = tempfile::tempfile()?;
    let stdin = if input.is_empty() {
        Stdio::null()
    } else {
        let mut file = tempfile::tempfile()?;
        file.write_all(input)?;
        file.seek(SeekFrom::Start(0))?;
        Stdio::from(file)
    };
    let child = command
        .stdin(stdin)
        .stdout(stdout.try_clone()?)
        .stderr(stderr.try_clone()?)
        .spawn()
        .with_context(|| format!("cannot start `{shown}`"))?;
    Ok(Running { shown, child, stdout, stderr, started: Instant::now() })
}

impl Running {
    /// Whether the program is still running.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for the end; kills the program and fails when `deadline` has passed since its start.
    pub fn finish(mut self, deadline: Duration) -> Result<Finished> {
        let mut pause = Duration::from_millis(1);
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if self.started.elapsed() > deadline {
                self.child.kill()?;
                self.child.wait()?;
                let (out, err) = (read_back(&mut self.stdout)?, read_back(&mut self.stderr)?);
                bail!(
                    "`{}` did not end within {deadline:.0?}\n--- its output:\n{}--- its errors:\n{}---",
                    self.shown,
                    String::from_utf8_lossy(&out),
                    String::from_utf8_lossy(&err)
                );
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(20));
        };
        let took = self.started.elapsed();
        let stdout = read_back(&mut self.stdout)?;
        let stderr = read_back(&mut self.stderr)?;
        Ok(Finished { shown: std::mem::take(&mut self.shown), status, stdout, stderr, took })
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Already reaped programs answer with an error that means just that.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn read_back(file: &mut File) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.seek(SeekFrom::Start(0))?;
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// Runs `command` to its end; see [`Running::finish`].
pub fn run(command: &mut Command, deadline: Duration) -> Result<Finished> {
    start(command, &[])?.finish(deadline)
}

/// Runs `command` with `input` on its standard input; see [`Running::finish`].
pub fn run_with_input(command: &mut Command, input: &[u8], deadline: Duration) -> Result<Finished> {
    start(command, input)?.finish(deadline)
}

/// Where `name` is, if it is a program that PATH (or the directories of a system administrator) can reach.
pub fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let mut directories: Vec<PathBuf> = std::env::split_paths(&path).collect();
    directories.extend(["/usr/sbin", "/sbin"].map(PathBuf::from));
    directories.into_iter().map(|directory| directory.join(name)).find(|candidate| candidate.is_file())
}

/// The directory of QEMU 5.2's tools with the sheepdog driver: `QEMU52_DIR`, else where the build script keeps them.
pub fn qemu52() -> Option<PathBuf> {
    let cache = std::env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .or_else(|| std::env::var_os("HOME").map(|home| Path::new(&home).join(".cache")));
    let given = std::env::var_os("QEMU52_DIR").filter(|directory| !directory.is_empty()).map(PathBuf::from);
    let directory = given.or_else(|| cache.map(|cache| cache.join("qemu-5.2-sheepdog/bin")))?;
    directory.join("qemu-img").is_file().then_some(directory)
}

/// Says loudly that `what` was not tested, and why.
pub fn skipped(what: &str, why: &str) {
    eprintln!("\n==== SKIPPED: {what}: {why} ====\n");
}

/// `VAR` as a number of MiB, or `default_mib`.
pub fn size_from_env(variable: &str, default_mib: u64) -> Result<u64> {
    match std::env::var(variable) {
        Ok(text) => text.parse().with_context(|| format!("{variable} is not a number of MiB: {text:?}")),
        Err(_) => Ok(default_mib),
    }
}
