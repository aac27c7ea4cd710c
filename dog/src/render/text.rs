//! The pieces that all tables are made of.

use std::fmt;
use std::io::Write;

use jiff::Timestamp;
use jiff::tz::TimeZone;

/// As in lists: `2026-11-21 05:11`.
pub const MINUTES: &str = "%Y-%m-%d %H:%M";
/// As in the history of epochs.
pub const SECONDS: &str = "%Y-%m-%d %H:%M:%S";
/// The day alone.
pub const DATE: &str = "%Y-%m-%d";
/// The time of the day alone.
pub const TIME: &str = "%H:%M:%S";
/// As the C library's `ctime` has it.
pub const CTIME: &str = "%a %b %e %H:%M:%S %Y";

/// Appends formatted text.
pub fn put(out: &mut Vec<u8>, text: fmt::Arguments<'_>) {
    out.write_fmt(text).expect("memory can be written");
}

/// Appends bytes, followed by blanks up to a width.
pub fn put_left(out: &mut Vec<u8>, bytes: &[u8], width: usize) {
    out.extend_from_slice(bytes);
    out.extend(std::iter::repeat_n(b' ', width.saturating_sub(bytes.len())));
}

/// Appends bytes, preceded by blanks up to a width.
pub fn put_right(out: &mut Vec<u8>, bytes: &[u8], width: usize) {
    out.extend(std::iter::repeat_n(b' ', width.saturating_sub(bytes.len())));
    out.extend_from_slice(bytes);
}

/// A moment of the local time.
pub fn local_time(unix_seconds: i64, format: &str, zone: &TimeZone) -> String {
    match Timestamp::from_second(unix_seconds) {
        Ok(moment) => moment.to_zoned(zone.clone()).strftime(format).to_string(),
        Err(_) => unix_seconds.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_have_the_forms_of_the_lists() {
        let zone = TimeZone::UTC;
        assert_eq!(local_time(1_795_237_889, MINUTES, &zone), "2026-11-21 05:11");
        assert_eq!(local_time(1_795_237_853, SECONDS, &zone), "2026-11-21 05:10:53");
        assert_eq!(local_time(1_795_237_853, CTIME, &zone), "Sat Nov 21 05:10:53 2026");
        assert_eq!(local_time(1_793_509_853, CTIME, &zone), "Sun Nov  1 05:10:53 2026");
        let zone = TimeZone::fixed(jiff::tz::offset(9));
        assert_eq!(local_time(1_795_237_889, MINUTES, &zone), "2026-11-21 14:11");
    }

    #[test]
    fn widths_are_minimal_widths() {
        let mut out = Vec::new();
        put_left(&mut out, b"ab", 4);
        put_right(&mut out, b"cd", 4);
        put_left(&mut out, b"longer", 3);
        assert_eq!(out, b"ab    cdlonger");
    }
}
