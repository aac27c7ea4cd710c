//! `dog`: the command-line tool that manages a sheep cluster.
//!
//! What was typed is `args.rs`, what it means `meaning.rs`, what is printed `render/`. A command is the file whose path is
//! its name; it returns data. This file puts the three together: parse, run, print, exit code.
//!
//! Standard output is written once, at the end: in captures of both streams every line about a failure precedes every
//! result, which old scripts compare.

mod args;
mod cluster;
mod command_line;
mod completions;
mod connect;
mod exit;
#[cfg(test)]
mod fake_sheep;
mod img;
mod invocation_log;
mod man;
mod meaning;
mod nbd_export;
mod nbd_service;
mod node;
mod order;
mod progress;
mod qemu;
mod question;
mod reach;
mod render;
mod report;
mod requests;
mod secure;
mod vdi;

use std::ffi::OsString;
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::Instant;

use jiff::Zoned;

use crate::args::{Command, Typed};
use crate::exit::{Exit, Failure};
use crate::meaning::Asked;
use crate::qemu::tool::Tool;
use crate::report::{Report, Style};

fn main() -> ExitCode {
    let started = Instant::now();
    let argv: Vec<OsString> = std::env::args_os().collect();
    let now = Zoned::now();
    invocation_log::record(&argv, &now);
    let words = argv.get(1..).unwrap_or_default();
    let parsed = match command_line::parse(words) {
        Ok(parsed) => parsed,
        Err(answered) => return end(&answered.err, answered.out.as_bytes(), answered.exit),
    };
    let (mut out, message, exit) = match run(&parsed.typed) {
        Ok(report) => {
            let style = Style { zone: now.time_zone().clone(), is_terminal: io::stdout().is_terminal() };
            (report.print(&style), String::new(), report.exit)
        }
        Err(failure) => {
            let mut out = failure.out.into_bytes();
            if failure.shows_usage {
                out.extend_from_slice(parsed.usage.as_bytes());
            }
            let newline = if failure.message.is_empty() { "" } else { "\n" };
            (out, failure.message + newline, failure.exit)
        }
    };
    if parsed.typed.time {
        out.extend_from_slice(format!("\nElapsed time: {:.3} seconds\n", started.elapsed().as_secs_f64()).as_bytes());
    }
    end(&message, &out, exit)
}

fn run(typed: &Typed) -> Result<Report, Failure> {
    let asked =
        Asked { address: typed.address.as_deref(), port: typed.port.as_deref(), key_file: typed.key_file.as_deref() };
    let target = || meaning::target(asked, |name| std::env::var_os(name));
    match &typed.command {
        Command::Vdi(command) => vdi::run(command, target()?),
        Command::Node(command) => node::run(command, target()?),
        Command::Cluster(command) => cluster::run(command, target()?),
        Command::Img(verbatim) => img::run(&verbatim.words, target()?),
        Command::Io(verbatim) => Err(qemu::run(Tool::Io, &verbatim.words, target()?)),
        Command::Nbd(verbatim) => Err(qemu::run(Tool::Nbd, &verbatim.words, target()?)),
        Command::Completions(typed) => completions::run(typed),
        Command::Man(typed) => man::run(typed),
    }
}

fn end(message: &str, out: &[u8], exit: Exit) -> ExitCode {
    // Nobody can be told that standard error is closed.
    let _ = io::stderr().write_all(message.as_bytes());
    let mut stdout = io::stdout().lock();
    match stdout.write_all(out).and_then(|()| stdout.flush()) {
        Ok(()) => exit.into(),
        // The reader went away with what it wanted.
        Err(error) if error.kind() == io::ErrorKind::BrokenPipe => exit.into(),
        Err(error) => {
            let _ = writeln!(io::stderr(), "Cannot write to standard output: {error}");
            Exit::System.into()
        }
    }
}
