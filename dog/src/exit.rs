//! Exit codes, and failures that end the program with one.
//!
//! Scripts tell results apart by these numbers; they never change.

use std::fmt;
use std::process::ExitCode;

/// How the program ends.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Exit {
    /// Done; also: the user answered a question with no.
    Success = 0,
    /// The cluster refused, or a value was wrong.
    Failure = 1,
    /// The cluster cannot be reached, or this machine failed.
    System = 2,
    /// What should be made exists already.
    Exists = 3,
    /// What was asked for does not exist.
    Missing = 5,
    /// The command line was wrong.
    Usage = 64,
    /// Some commands about one node were refused: the old tool's -1.
    Refused = 255,
}

impl From<Exit> for ExitCode {
    fn from(exit: Exit) -> ExitCode {
        ExitCode::from(exit as u8)
    }
}

/// Why a command ended early: what to say on standard error, and the exit code.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Failure {
    /// The exit code.
    pub exit: Exit,
    /// What is wrong, where, and what to do next; no newline at the end. Empty when nobody is left to tell.
    pub message: String,
    /// For standard output, where scripts expect more than the message.
    pub out: String,
    /// Whether the usage of the command is printed too.
    pub shows_usage: bool,
}

impl Failure {
    /// A failure with this exit code.
    pub fn new(exit: Exit, message: impl Into<String>) -> Failure {
        assert!(exit != Exit::Success, "a failure does not end with success");
        Failure { exit, message: message.into(), out: String::new(), shows_usage: false }
    }

    /// Exit 1.
    pub fn failed(message: impl Into<String>) -> Failure {
        Failure::new(Exit::Failure, message)
    }

    /// Exit 2.
    pub fn system(message: impl Into<String>) -> Failure {
        Failure::new(Exit::System, message)
    }

    /// Exit 64; the usage is printed too.
    pub fn usage(message: impl Into<String>) -> Failure {
        Failure { shows_usage: true, ..Failure::new(Exit::Usage, message) }
    }

    /// The word after the subcommand is missing (exit 64) or unknown (exit 1); the usage is printed too.
    pub fn nested(word: Option<&str>, known: &str) -> Failure {
        match word {
            None => Failure::usage(format!("Say what to do: {known}")),
            Some(word) => {
                let text = format!("Invalid subcommand '{word}': must be {known}");
                Failure { shows_usage: true, ..Failure::failed(text) }
            }
        }
    }

    /// Exit 1: known from the old tool, not made yet.
    pub fn not_available(what: &str) -> Failure {
        Failure::failed(format!("{what} is not available in this version"))
    }

    /// The same failure, after what it is about.
    #[must_use]
    pub fn about(mut self, what: &str) -> Failure {
        self.message = format!("{what}: {}", self.message);
        self
    }

    /// The same failure, its message followed by a line that says what it spoiled.
    #[must_use]
    pub fn then(mut self, line: &str) -> Failure {
        self.message.push('\n');
        self.message.push_str(line);
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_those_that_scripts_know() {
        let numbers =
            [Exit::Success, Exit::Failure, Exit::System, Exit::Exists, Exit::Missing, Exit::Usage, Exit::Refused];
        assert_eq!(numbers.map(|exit| exit as u8), [0, 1, 2, 3, 5, 64, 255]);
    }

    #[test]
    fn a_failure_can_say_what_it_spoiled() {
        let failure = Failure::failed("Failed to read object 00").then("Failed to read VDI");
        assert_eq!(failure.to_string(), "Failed to read object 00\nFailed to read VDI");
    }
}
