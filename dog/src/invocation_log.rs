//! Records each call of the tool, for sites that want to know who did what.
//!
//! `SHEEPDOG_DOG_LOG` set: one line to the system log, or appended to the file that `SHEEPDOG_DOG_LOG_PATH` names. A record
//! that cannot be made is reported and does not stop the command.

use std::ffi::OsString;
use std::fs::OpenOptions;
use std::io::Write;
use std::os::unix::net::UnixDatagram;

use jiff::Zoned;

const SWITCH_VARIABLE: &str = "SHEEPDOG_DOG_LOG";
const PATH_VARIABLE: &str = "SHEEPDOG_DOG_LOG_PATH";
const SYSTEM_LOG_SOCKET: &str = "/dev/log";
/// Facility "user", severity "info".
const SYSTEM_LOG_PRIORITY: u8 = 14;

/// Records the words of the command line if the environment asks for it.
pub fn record(argv: &[OsString], now: &Zoned) {
    if std::env::var_os(SWITCH_VARIABLE).is_none() {
        return;
    }
    let words: Vec<_> = argv.iter().map(|word| word.to_string_lossy()).collect();
    let command_line = words.join(" ");
    let (place, written) = if let Some(path) = std::env::var_os(PATH_VARIABLE) {
        let file = OpenOptions::new().append(true).create(true).open(&path);
        let written = file.and_then(|mut file| file.write_all(file_line(now, &command_line).as_bytes()));
        (path.to_string_lossy().into_owned(), written)
    } else {
        let line = system_log_line(now, &command_line);
        let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to(line.as_bytes(), SYSTEM_LOG_SOCKET));
        (SYSTEM_LOG_SOCKET.to_owned(), sent.map(drop))
    };
    if let Err(error) = written {
        eprintln!("cannot record this call in {place}: {error}; unset {SWITCH_VARIABLE} to stop recording");
    }
}

fn file_line(now: &Zoned, command_line: &str) -> String {
    format!("{} :  {command_line}\n", now.strftime("%Y %b %d %H:%M:%S"))
}

fn system_log_line(now: &Zoned, command_line: &str) -> String {
    let time = now.strftime("%b %e %H:%M:%S");
    format!("<{SYSTEM_LOG_PRIORITY}>{time} sheepdog admin operation: {command_line}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_have_the_form_that_is_searched_for() {
        let now: Zoned = "2026-11-01T05:10:53[UTC]".parse().expect("a moment");
        assert_eq!(file_line(&now, "dog vdi list"), "2026 Nov 01 05:10:53 :  dog vdi list\n");
        assert_eq!(system_log_line(&now, "dog vdi list"), "<14>Nov  1 05:10:53 sheepdog admin operation: dog vdi list");
    }
}
