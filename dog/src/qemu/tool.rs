//! QEMU's programs: which one, how it is run, and what is said when it is not there.

use std::ffi::OsString;
use std::io;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use crate::exit::{Exit, Failure};

/// A program.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Tool {
    /// Images.
    Img,
    /// Single reads and writes.
    Io,
    /// An NBD server or the kernel's client.
    Nbd,
}

impl Tool {
    /// Its usual name, and the variable that names another.
    const fn names(self) -> (&'static str, &'static str) {
        match self {
            Tool::Img => ("qemu-img", "DOG_QEMU_IMG"),
            Tool::Io => ("qemu-io", "DOG_QEMU_IO"),
            Tool::Nbd => ("qemu-nbd", "DOG_QEMU_NBD"),
        }
    }

    fn program(self) -> OsString {
        let (name, variable) = self.names();
        std::env::var_os(variable).filter(|program| !program.is_empty()).unwrap_or_else(|| name.into())
    }

    /// Replaces this process, so that signals and the exit code are the program's own; returns only when that fails.
    pub fn become_it(self, words: &[OsString]) -> Failure {
        let program = self.program();
        let error = Command::new(&program).args(words).exec();
        self.not_run(&program, &error)
    }

    /// Runs it and takes what it prints; its errors go where ours go.
    pub fn output(self, words: &[OsString]) -> Result<Vec<u8>, Failure> {
        let program = self.program();
        let output = Command::new(&program).args(words).stdin(Stdio::null()).stderr(Stdio::inherit()).output();
        let output = output.map_err(|error| self.not_run(&program, &error))?;
        if output.status.success() {
            return Ok(output.stdout);
        }
        let line = words.first().map(|word| word.to_string_lossy()).unwrap_or_default();
        Err(Failure::failed(format!("{} {line} failed ({})", program.to_string_lossy(), output.status)))
    }

    fn not_run(self, program: &OsString, error: &io::Error) -> Failure {
        let program = program.to_string_lossy();
        let (name, variable) = self.names();
        let advice = format!("install {name} (package qemu-utils or qemu-img), or name it with {variable}=PATH");
        match error.kind() {
            io::ErrorKind::NotFound => Failure::new(Exit::System, format!("{program} was not found; {advice}")),
            _ => Failure::new(Exit::System, format!("Cannot run {program}: {error}; {advice}")),
        }
    }
}
