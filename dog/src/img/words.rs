//! The words after a subcommand of `qemu-img`, taken apart as GNU getopt takes them apart.
//!
//! Options and operands may be mixed; `--` ends the options; letters may be joined, and a long name may be cut while it
//! stays the only one. An option that is not in the table is an error, because nobody could tell whether a value follows.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use crate::exit::{Exit, Failure};

/// An option: its letter (0 for none), its long name, whether a value follows.
pub type Known = (u8, &'static str, bool);

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Words {
    /// Long names and values, in the order in which they were typed.
    pub options: Vec<(Known, Option<OsString>)>,
    /// Everything else.
    pub operands: Vec<OsString>,
}

impl Words {
    /// Takes the words apart.
    pub fn parse(words: &[OsString], known: &[Known]) -> Result<Words, Failure> {
        let mut parsed = Words::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            match word.as_bytes() {
                b"--" => parsed.operands.extend(words.by_ref().cloned()),
                [b'-', b'-', long @ ..] => {
                    let mut halves = long.splitn(2, |&byte| byte == b'=');
                    let option = find_long(halves.next().unwrap_or_default(), known).ok_or_else(|| unknown(word))?;
                    let attached = halves.next().map(owned);
                    parsed.push(option, attached, &mut words)?;
                }
                [b'-', letters @ ..] if !letters.is_empty() => {
                    for (at, letter) in letters.iter().enumerate() {
                        let option = known.iter().find(|option| option.0 == *letter).ok_or_else(|| unknown(word))?;
                        let rest = &letters[at + 1..];
                        let attached = (option.2 && !rest.is_empty()).then(|| owned(rest));
                        let took_rest = attached.is_some();
                        parsed.push(*option, attached, &mut words)?;
                        if took_rest {
                            break;
                        }
                    }
                }
                _ => parsed.operands.push(word.clone()),
            }
        }
        Ok(parsed)
    }

    fn push<'a>(
        &mut self,
        option: Known,
        attached: Option<OsString>,
        words: &mut impl Iterator<Item = &'a OsString>,
    ) -> Result<(), Failure> {
        let value = match (option.2, attached) {
            (true, None) => Some(words.next().cloned().ok_or_else(|| {
                Failure::new(Exit::Usage, format!("The value of --{} is missing; see 'dog help img'", option.1))
            })?),
            (false, Some(_)) => {
                return Err(Failure::new(Exit::Usage, format!("--{} takes no value; see 'dog help img'", option.1)));
            }
            (_, attached) => attached,
        };
        self.options.push((option, value));
        Ok(())
    }

    /// Whether an option was given.
    pub fn has(&self, long: &str) -> bool {
        self.options.iter().any(|(option, _)| option.1 == long)
    }

    /// Its last value.
    pub fn value(&self, long: &str) -> Option<&OsStr> {
        self.values(long).last()
    }

    /// All of its values.
    pub fn values(&self, long: &str) -> impl Iterator<Item = &OsStr> {
        self.options.iter().filter(move |(option, _)| option.1 == long).filter_map(|(_, value)| value.as_deref())
    }

    /// Some of the options as words again.
    pub fn typed(&self, keep: impl Fn(&str) -> bool) -> Vec<OsString> {
        let mut words = Vec::new();
        for ((letter, long, _), value) in self.options.iter().filter(|(option, _)| keep(option.1)) {
            words.push(match letter {
                0 => format!("--{long}").into(),
                letter => format!("-{}", char::from(*letter)).into(),
            });
            words.extend(value.clone());
        }
        words
    }
}

fn find_long(name: &[u8], known: &[Known]) -> Option<Known> {
    if let Some(option) = known.iter().find(|option| option.1.as_bytes() == name) {
        return Some(*option);
    }
    let mut cut = known.iter().filter(|option| option.1.as_bytes().starts_with(name));
    cut.next().filter(|_| cut.next().is_none() && !name.is_empty()).copied()
}

fn unknown(word: &OsStr) -> Failure {
    Failure::new(Exit::Usage, format!("The option '{}' is not known here; see 'dog help img'", word.to_string_lossy()))
}

fn owned(bytes: &[u8]) -> OsString {
    OsString::from_vec(bytes.to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const KNOWN: &[Known] = &[(b'q', "quiet", false), (b'f', "format", true), (0, "force-share", false)];

    fn parse(line: &str) -> Result<Words, Failure> {
        Words::parse(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>(), KNOWN)
    }

    #[test]
    fn options_may_be_joined_cut_and_mixed() {
        for line in ["-q -f raw a b", "a -qfraw b", "a b -qf raw", "--quiet --form=raw a b", "--format raw -q -- a b"] {
            let words = parse(line).expect(line);
            assert_eq!(words.operands, ["a", "b"], "{line}");
            assert!(words.has("quiet") && words.value("format") == Some(OsStr::new("raw")), "{line}");
        }
        assert_eq!(
            parse("--force-share a -q -f x").expect("typed").typed(|long| long != "quiet"),
            ["--force-share", "-f", "x"]
        );
        assert_eq!(parse("- -- -q").expect("operands").operands, ["-", "-q"]);
    }

    #[test]
    fn what_is_not_known_is_refused() {
        for line in ["-x", "--fo=raw", "--for", "-f", "--quiet=yes", "--=", "-qx"] {
            assert_eq!(parse(line).expect_err(line).exit, Exit::Usage, "{line}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(words in proptest::collection::vec(proptest::collection::vec(any::<u8>(), 0..6), 0..6)) {
            let words: Vec<OsString> = words.into_iter().map(OsString::from_vec).collect();
            let _ = Words::parse(&words, KNOWN);
        }
    }
}
