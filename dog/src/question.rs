//! Asks before something is lost.
//!
//! A line that begins with `yes`, in any case, is a yes; anything else, or no line at all, is a no.

use std::io::{self, Write};

use crate::exit::Failure;

/// Prints `text` and ` [yes/no]: ` on standard output and reads one line.
pub fn confirmed(text: &str) -> Result<bool, Failure> {
    Ok(is_yes(&answer(&format!("{text} [yes/no]: "))?))
}

/// Prints `text` and a blank on standard output and reads one line, which must be `word`: for what a yes is too easy for.
pub fn typed(text: &str, word: &str) -> Result<bool, Failure> {
    Ok(answer(&format!("{text} "))?.trim().eq_ignore_ascii_case(word))
}

fn answer(text: &str) -> Result<String, Failure> {
    let mut out = io::stdout().lock();
    let printed = write!(out, "{text}").and_then(|()| out.flush());
    printed.map_err(|error| Failure::system(format!("Cannot ask on standard output: {error}")))?;
    let mut line = String::new();
    match io::stdin().read_line(&mut line) {
        Ok(_) => Ok(line),
        // Bytes that are not text are no answer.
        Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(String::new()),
        Err(error) => Err(Failure::system(format!("Cannot read the answer from standard input: {error}"))),
    }
}

fn is_yes(line: &str) -> bool {
    line.get(..3).is_some_and(|start| start.eq_ignore_ascii_case("yes"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_yes_is_a_yes() {
        for (line, expected) in
            [("yes\n", true), ("YEStotally\n", true), ("Yes", true), ("y\n", false), ("", false), (" yes", false)]
        {
            assert_eq!(is_yes(line), expected, "{line:?}");
        }
    }
}
