//! Compares what a program printed with a stored text in `tests/golden/`.
//!
//! What differs between runs is replaced first: moments of time, ports, and what the caller names. With
//! `SHEEP_GOLDEN=rewrite` the stored texts are written anew; look at the difference before keeping it.

use std::path::Path;

use anyhow::{Context, Result, ensure};

/// Replaces moments of time by their forms, of the same width where a table has them.
///
/// `2026-11-21 05:11` becomes `YYYY-MM-DD HH:MM` (likewise with seconds, and day and time alone),
/// `Sat Nov 21 05:10:53 2026` becomes `Www Mmm dd HH:MM:SS YYYY`, and a number of ten digits that is a moment of these
/// decades in seconds, as raw output has it, becomes `SECONDS`. (A size of some GiB may have ten digits as well.)
pub fn without_times(text: &str) -> String {
    const FORMS: &[(&str, &str)] = &[
        ("9999-99-99 99:99:99", "YYYY-MM-DD HH:MM:SS"),
        ("9999-99-99 99:99", "YYYY-MM-DD HH:MM"),
        ("Aaa Aaa 99 99:99:99 9999", "Www Mmm dd HH:MM:SS YYYY"),
        ("Aaa Aaa  9 99:99:99 9999", "Www Mmm dd HH:MM:SS YYYY"),
        ("9999-99-99", "YYYY-MM-DD"),
        ("99:99:99", "HH:MM:SS"),
        ("9999999999", "SECONDS"),
    ];
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let after_digit = out.ends_with(|last: char| last.is_ascii_digit());
        let form = FORMS.iter().find(|(form, _)| !after_digit && has_form(rest, form));
        let form = form.filter(|(form, name)| *name != "SECONDS" || is_recent(&rest[..form.len()]));
        if let Some((form, name)) = form {
            out.push_str(name);
            rest = &rest[form.len()..];
        } else {
            out.push(first);
            rest = &rest[first.len_utf8()..];
        }
    }
    out
}

/// Whether a number of seconds since 1970 lies between November 2023 and the end of 2033.
fn is_recent(seconds: &str) -> bool {
    seconds.parse().is_ok_and(|seconds: u64| (1_700_000_000..2_020_000_000).contains(&seconds))
}

/// Whether `text` begins with `form`: `9` stands for a digit, `A` and `a` for letters, all else for itself. A digit
/// must not follow, or a longer number would be cut.
fn has_form(text: &str, form: &str) -> bool {
    let mut characters = text.chars();
    let matches = form.chars().all(|wanted| {
        characters.next().is_some_and(|found| match wanted {
            '9' => found.is_ascii_digit(),
            'A' => found.is_ascii_uppercase(),
            'a' => found.is_ascii_lowercase(),
            other => found == other,
        })
    });
    matches && !characters.next().is_some_and(|next| next.is_ascii_digit())
}

/// Fails, with both texts, unless `text` is what `tests/golden/NAME.out` holds.
pub fn check(name: &str, text: &str) -> Result<()> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden").join(format!("{name}.out"));
    if std::env::var_os("SHEEP_GOLDEN").is_some_and(|word| word == "rewrite") {
        return std::fs::write(&path, text).with_context(|| path.display().to_string());
    }
    let expected = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    ensure!(
        text == expected,
        "{name} differs from tests/golden/{name}.out\n--- expected:\n{expected}--- found:\n{text}---\n\
         line by line, tabs and blanks shown: {:#?}",
        expected.lines().zip(text.lines()).filter(|(left, right)| left != right).collect::<Vec<_>>()
    );
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_lose_their_value_and_keep_their_width() {
        assert_eq!(without_times("a 2026-11-21 05:11   7c2b25"), "a YYYY-MM-DD HH:MM   7c2b25");
        assert_eq!(without_times("2026-11-21 05:10:53      1 ["), "YYYY-MM-DD HH:MM:SS      1 [");
        assert_eq!(without_times("at Sat Nov 21 05:10:53 2026\n"), "at Www Mmm dd HH:MM:SS YYYY\n");
        assert_eq!(without_times("at Sun Nov  1 05:10:53 2026\n"), "at Www Mmm dd HH:MM:SS YYYY\n");
        assert_eq!(without_times("Date: 2026-11-21\\nTime:   05:10:53"), "Date: YYYY-MM-DD\\nTime:   HH:MM:SS");
        assert_eq!(without_times("41943040 1795237889 12"), "41943040 SECONDS 12");
        assert_eq!(without_times("12345678901 x"), "12345678901 x");
        assert_eq!(without_times("1073741824 2147483648"), "1073741824 2147483648");
    }
}
