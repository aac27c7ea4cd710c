//! Byte sizes as people write and read them.
//!
//! Two directions, both fixed by what scripts of the old tools rely on: `parse_size` reads a command-line argument such
//! as `1.5G`; `HumanSize` prints a number of bytes in a list.
//!
//! | argument | bytes | printed | bytes |
//! |---|---|---|---|
//! | `20G` | 20 * 2^30 | `20 GB` | 20 * 2^30 |
//! | `1.5M` | 1572864 | `1.5 MB` | 1572864 |
//! | `1e3` | 1000 | `0.0 MB` | 1000 |
//! | `0x100000` | 1048576 | `1.0 MB` | 1048576 |
//!
//! Always holds:
//! 1. All units are powers of 1024, in both directions.
//! 2. A parsed size is the number the C library would read, times the unit, cut to whole bytes; what does not fit in 64
//!    bits is an error, never a wrapped or clipped number.
//! 3. Printing never uses a unit below MB, and chooses the unit and the number of digits before it rounds: `10.0 MB`
//!    and `1024 MB` exist.
//!
//! Different from the old tools: a negative size, `inf` and `nan` are refused instead of becoming some large number.

use core::error::Error;
use core::fmt;

/// Why a text is not a size.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum SizeError {
    /// Does not begin with a finite number.
    NotANumber,
    /// Something other than one unit letter follows the number.
    UnknownSuffix,
    /// Less than zero.
    Negative,
    /// Not below 2^64 bytes.
    TooLarge,
}

impl fmt::Display for SizeError {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str(match self {
            Self::NotANumber => "a size must be a number, optionally followed by one of the letters b k m g t p",
            Self::UnknownSuffix => "only one of the letters b k m g t p may follow the number of a size",
            Self::Negative => "a size must not be negative",
            Self::TooLarge => "a size must be below 16 EiB",
        })
    }
}

impl Error for SizeError {}

/// Reads a size argument: blanks, a number as the C library's `strtod` reads it (decimal or hexadecimal, with fraction and
/// exponent), and at most one letter of `b k m g t p`, in either case. A fraction of a byte is dropped.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let text = text.trim_start_matches(|c: char| c.is_ascii_whitespace() || c == '\x0b');
    let (negative, unsigned) = match text.as_bytes().first() {
        Some(b'-') => (true, &text[1..]),
        Some(b'+') => (false, &text[1..]),
        _ => (false, text),
    };
    let (number, rest) = parse_number(unsigned).ok_or(SizeError::NotANumber)?;
    let unit_bits = unit_bits(rest)?;
    // Exact: the factor is a power of two far from the limits of a double.
    let bytes = number * (1_u64 << unit_bits) as f64;
    if negative && bytes > 0.0 {
        return Err(SizeError::Negative);
    }
    if bytes >= 2.0 * (1_u64 << 63) as f64 {
        return Err(SizeError::TooLarge);
    }
    assert!(bytes >= 0.0);
    Ok(bytes as u64)
}

/// The power of two a suffix stands for.
fn unit_bits(suffix: &str) -> Result<u32, SizeError> {
    match suffix.as_bytes() {
        [] | [b'b' | b'B'] => Ok(0),
        [b'k' | b'K'] => Ok(10),
        [b'm' | b'M'] => Ok(20),
        [b'g' | b'G'] => Ok(30),
        [b't' | b'T'] => Ok(40),
        [b'p' | b'P'] => Ok(50),
        _ => Err(SizeError::UnknownSuffix),
    }
}

/// The longest number at the start of the text and what follows it; `None` when there is none. Never negative, may be
/// infinite when the exponent is huge.
fn parse_number(text: &str) -> Option<(f64, &str)> {
    if let Some(digits) = text.strip_prefix("0x").or_else(|| text.strip_prefix("0X"))
        && let Some(found) = parse_hexadecimal(digits)
    {
        return Some(found);
    }
    let bytes = text.as_bytes();
    let integer_end = digits_end(bytes, 0, u8::is_ascii_digit);
    let mut end = integer_end;
    let mut digit_count = integer_end;
    if bytes.get(end) == Some(&b'.') {
        end = digits_end(bytes, end + 1, u8::is_ascii_digit);
        digit_count += end - integer_end - 1;
    }
    if digit_count == 0 {
        return None;
    }
    end = exponent_end(bytes, end, b'e');
    let number = text[..end].parse().ok()?;
    Some((number, &text[end..]))
}

/// A hexadecimal number after its `0x`; `None` when no digit follows, and then only the `0` was a number.
fn parse_hexadecimal(text: &str) -> Option<(f64, &str)> {
    let bytes = text.as_bytes();
    let integer_end = digits_end(bytes, 0, u8::is_ascii_hexdigit);
    let mut mantissa = Mantissa::default();
    mantissa.push_integer(&bytes[..integer_end]);
    let mut end = integer_end;
    let mut digit_count = integer_end;
    if bytes.get(end) == Some(&b'.') {
        end = digits_end(bytes, end + 1, u8::is_ascii_hexdigit);
        mantissa.push_fraction(&bytes[integer_end + 1..end]);
        digit_count += end - integer_end - 1;
    }
    if digit_count == 0 {
        return None;
    }
    let number_end = exponent_end(bytes, end, b'p');
    let exponent = if number_end > end { parse_exponent(&bytes[end + 1..number_end]) } else { 0 };
    Some((mantissa.scaled(exponent), &text[number_end..]))
}

/// First index at or after `start` that does not hold a digit.
fn digits_end(bytes: &[u8], start: usize, is_digit: impl Fn(&u8) -> bool) -> usize {
    bytes[start..].iter().position(|byte| !is_digit(byte)).map_or(bytes.len(), |length| start + length)
}

/// Where the exponent ends that begins at `start` with `letter`; `start` itself when there is no whole exponent.
fn exponent_end(bytes: &[u8], start: usize, letter: u8) -> usize {
    if !bytes.get(start).is_some_and(|byte| byte.eq_ignore_ascii_case(&letter)) {
        return start;
    }
    let sign_count = usize::from(matches!(bytes.get(start + 1), Some(b'+' | b'-')));
    let digits_start = start + 1 + sign_count;
    let end = digits_end(bytes, digits_start, u8::is_ascii_digit);
    if end > digits_start { end } else { start }
}

/// A signed decimal exponent, kept small enough to add to.
fn parse_exponent(bytes: &[u8]) -> i64 {
    const EXPONENT_LIMIT: i64 = 1 << 40;
    let (negative, digits) = match bytes {
        [b'-', digits @ ..] => (true, digits),
        [b'+', digits @ ..] | digits => (false, digits),
    };
    let add = |sum: i64, digit: &u8| (sum * 10 + i64::from(digit - b'0')).min(EXPONENT_LIMIT);
    let exponent = digits.iter().fold(0, add);
    if negative { -exponent } else { exponent }
}

/// Hexadecimal digits gathered so far: `value * 2^exponent`, the lowest bit of `value` set if non-zero digits were left
/// out. That bit is below what a double keeps, so rounding comes out right.
#[derive(Default)]
struct Mantissa {
    value: u64,
    exponent: i64,
}

impl Mantissa {
    fn push_integer(&mut self, digits: &[u8]) {
        for &digit in digits {
            if !self.push(digit) {
                self.exponent += 4;
            }
        }
    }

    fn push_fraction(&mut self, digits: &[u8]) {
        for &digit in digits {
            if self.push(digit) {
                self.exponent -= 4;
            }
        }
    }

    /// Whether the digit still had a place in `value`.
    fn push(&mut self, digit: u8) -> bool {
        let digit = char::from(digit).to_digit(16).map_or(0, u64::from);
        let has_place = self.value >> 60 == 0;
        if has_place {
            self.value = self.value << 4 | digit;
        } else {
            self.value |= u64::from(digit != 0);
        }
        has_place
    }

    /// The number times two to the given power.
    fn scaled(&self, exponent: i64) -> f64 {
        // Beyond these limits every answer is the same: infinite when multiplied, less than a byte when divided.
        let exponent = (self.exponent + exponent).clamp(-300, 960);
        let factor = f64::from_bits(((1023 + exponent) as u64) << 52);
        self.value as f64 * factor
    }
}

/// A number of bytes, printed as in the lists of the administration tool: `0.0 MB`, `12 MB`, `1.5 GB`.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct HumanSize(pub u64);

impl fmt::Display for HumanSize {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [&str; 5] = ["MB", "GB", "TB", "PB", "EB"];
        let mut value = self.0 as f64 / (1_u64 << 20) as f64;
        let mut unit_index = 0;
        while value >= 1024.0 && unit_index + 1 < UNITS.len() {
            value /= 1024.0;
            unit_index += 1;
        }
        let digits = usize::from(value < 10.0);
        // Halves go to the even digit, as in C.
        write!(formatter, "{value:.digits$} {}", UNITS[unit_index])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use proptest::prelude::*;

    const MIB: u64 = 1 << 20;

    #[test]
    fn printed_sizes() {
        let mib = |tenths: u64, divisor: u64| tenths * MIB / divisor;
        for (bytes, text) in [
            (0, "0.0 MB"),
            (1, "0.0 MB"),
            (52_428, "0.0 MB"),
            (52_429, "0.1 MB"),
            (MIB, "1.0 MB"),
            (mib(1, 4), "0.2 MB"),
            (mib(3, 4), "0.8 MB"),
            (mib(5, 4), "1.2 MB"),
            (mib(997, 100), "10.0 MB"),
            (10 * MIB, "10 MB"),
            (mib(105, 10), "10 MB"),
            (mib(115, 10), "12 MB"),
            (mib(9999, 10), "1000 MB"),
            (mib(10236, 10), "1024 MB"),
            (12 * MIB, "12 MB"),
            (40 * MIB, "40 MB"),
            (1024 * MIB - 1, "1024 MB"),
            (1024 * MIB, "1.0 GB"),
            (20 << 30, "20 GB"),
            (1 << 40, "1.0 TB"),
            (1 << 50, "1.0 PB"),
            (1 << 60, "1.0 EB"),
            (u64::MAX, "16 EB"),
        ] {
            assert_eq!(HumanSize(bytes).to_string(), text, "{bytes}");
        }
    }

    #[test]
    fn size_arguments() {
        for (text, bytes) in [
            ("1.5M", 3 << 19),
            ("1e3", 1000),
            ("0x100000", MIB),
            (".5G", 1 << 29),
            ("0", 0),
            ("1", 1),
            ("1b", 1),
            ("1B", 1),
            ("1k", 1 << 10),
            ("1K", 1 << 10),
            ("1m", MIB),
            ("1g", 1 << 30),
            ("20G", 20 << 30),
            ("1t", 1 << 40),
            ("1T", 1 << 40),
            ("2p", 2 << 50),
            ("2P", 2 << 50),
            ("+5", 5),
            (" \t\n\u{b}\u{c}\r7", 7),
            ("-0", 0),
            ("5.", 5),
            ("5.M", 5 << 20),
            ("1.9", 1),
            ("0.9999b", 0),
            ("1e3k", 1000 << 10),
            ("1E+3", 1000),
            ("1000e-3G", 1 << 30),
            ("0e999999999999", 0),
            ("1e-999999", 0),
            ("007", 7),
            ("0xFF", 255),
            ("0Xffk", 255 << 10),
            ("0x10b", 0x10b),
            ("0x1p4", 16),
            ("0x1P+4k", 16 << 10),
            ("0x10p", 16 << 50),
            ("0x1.8", 1),
            ("0x1.8k", 1536),
            ("0x.8g", 1 << 29),
            ("0x8.", 8),
            ("0x8000000000000000", 1 << 63),
            ("0x0.00000000000000000001p80", 1),
            ("0x1p-99999999999999999999", 0),
            ("0x0p99999999999999999999", 0),
            ("18446744073709549568", 18_446_744_073_709_549_568),
            ("16383.99999P", 18_446_744_062_450_552_832),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text:?}");
        }
    }

    #[test]
    fn what_is_not_a_size() {
        use SizeError::{Negative, NotANumber, TooLarge, UnknownSuffix};
        for (text, error) in [
            ("10MB", UnknownSuffix),
            ("10Q", UnknownSuffix),
            ("abc", NotANumber),
            ("", NotANumber),
            (" ", NotANumber),
            ("M", NotANumber),
            (".", NotANumber),
            (".G", NotANumber),
            ("+", NotANumber),
            ("--5", NotANumber),
            ("inf", NotANumber),
            ("nan", NotANumber),
            ("٣", NotANumber),
            ("1٣", UnknownSuffix),
            ("1 k", UnknownSuffix),
            ("1k ", UnknownSuffix),
            ("1kk", UnknownSuffix),
            ("1e", UnknownSuffix),
            ("1e+", UnknownSuffix),
            ("1.2.3", UnknownSuffix),
            ("0x", UnknownSuffix),
            ("0xg", UnknownSuffix),
            ("0x.p1", UnknownSuffix),
            ("0x1p4p4", UnknownSuffix),
            ("1E", UnknownSuffix),
            ("-5", Negative),
            ("-1.5M", Negative),
            ("18446744073709551616", TooLarge),
            ("18446744073709551615", TooLarge),
            ("16384p", TooLarge),
            ("1e400", TooLarge),
            ("0x10000000000000000", TooLarge),
            ("0x1p99999999999999999999", TooLarge),
        ] {
            assert_eq!(parse_size(text), Err(error), "{text:?}");
        }
    }

    proptest! {
        /// No text panics, and a sign of life: whole numbers that a double holds exactly come back.
        #[test]
        fn any_text_is_a_size_or_an_error(text in "[ +-]?(0x)?[0-9a-fA-F.]{0,30}[eEpPkKmMgG+-]{0,3}[0-9]{0,30}\\PC?") {
            let _ = parse_size(&text);
        }

        #[test]
        fn whole_numbers_come_back(number in 0_u64..1 << 53) {
            prop_assert_eq!(parse_size(&number.to_string()), Ok(number));
            prop_assert_eq!(parse_size(&alloc::format!("{number:#x}")), Ok(number));
        }

        /// Hexadecimal digits beyond what a double holds round as a conversion from an integer does.
        #[test]
        fn long_hexadecimal_rounds_to_even(number: u64) {
            let expected = number as f64;
            prop_assume!(expected < 2.0 * (1_u64 << 63) as f64);
            prop_assert_eq!(parse_size(&alloc::format!("{number:#x}")), Ok(expected as u64));
            prop_assert_eq!(parse_size(&alloc::format!("0x0000000000000000000{number:x}000p-12")), Ok(expected as u64));
        }
    }
}
