//! Reads our own source text just well enough for the tidy suite: comments, strings and tests out, paths in.
//!
//! It is a scanner, not a parser. It understands nested block comments, raw strings, character literals against
//! lifetimes, and `use` groups; it does not expand macros.

use std::fs;
use std::path::{Path, PathBuf};

/// One text file of the repository.
pub struct SourceFile {
    /// Relative to the root of the repository, with forward slashes.
    pub path: String,
    /// The whole text.
    pub text: String,
}

impl SourceFile {
    /// Whether it is Rust source.
    pub fn is_rust(&self) -> bool {
        Path::new(&self.path).extension().is_some_and(|extension| extension == "rs")
    }

    /// The code alone: comments and the contents of literals are blanks, line breaks stay where they are.
    pub fn code(&self) -> String {
        blank_comments_and_literals(&self.text)
    }

    /// [`SourceFile::code`] with every `#[cfg(test)]` item blanked as well.
    pub fn production_code(&self) -> String {
        blank_test_items(&self.code())
    }
}

/// The root of the repository.
pub fn repository_root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("the tests package lies in the repository").to_path_buf()
}

/// Every text file under `root`, sorted by path, without what builds and fuzzers leave behind.
pub fn all_files(root: &Path) -> std::io::Result<Vec<SourceFile>> {
    let mut files = Vec::new();
    let mut pending = vec![root.to_path_buf()];
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory)? {
            let entry = entry?;
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if entry.file_type()?.is_dir() {
                if !matches!(name.as_str(), ".git" | "target" | "corpus" | "artifacts") {
                    pending.push(path);
                }
            } else if let Ok(text) = fs::read_to_string(&path) {
                let relative = path.strip_prefix(root).expect("found below the root");
                files.push(SourceFile { path: relative.to_string_lossy().replace('\\', "/"), text });
            }
        }
    }
    files.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(files)
}

/// See [`SourceFile::code`].
pub fn blank_comments_and_literals(text: &str) -> String {
    let bytes = text.as_bytes();
    let mut out = bytes.to_vec();
    let mut at = 0;
    while at < bytes.len() {
        let rest = &bytes[at..];
        let previous_is_name = at > 0 && is_name_byte(bytes[at - 1]);
        let end = if rest.starts_with(b"//") {
            at + rest.iter().position(|&byte| byte == b'\n').unwrap_or(rest.len())
        } else if rest.starts_with(b"/*") {
            at + block_comment_length(rest)
        } else if let Some(hashes) = raw_string_hashes(rest).filter(|_| !previous_is_name) {
            at + raw_string_length(rest, hashes)
        } else if rest[0] == b'"' {
            at + quoted_length(rest, b'"')
        } else if rest[0] == b'\'' && is_character_literal(rest) {
            at + quoted_length(rest, b'\'')
        } else {
            at += 1;
            continue;
        };
        for byte in &mut out[at..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        at = end;
    }
    String::from_utf8(out).expect("blanks replace whole literals and comments only")
}

fn block_comment_length(rest: &[u8]) -> usize {
    let mut depth = 0_usize;
    let mut at = 0;
    while at < rest.len() {
        if rest[at..].starts_with(b"/*") {
            depth += 1;
            at += 2;
        } else if rest[at..].starts_with(b"*/") {
            depth -= 1;
            at += 2;
            if depth == 0 {
                break;
            }
        } else {
            at += 1;
        }
    }
    at
}

/// The number of `#` of a raw string that starts here.
fn raw_string_hashes(rest: &[u8]) -> Option<usize> {
    let after = rest.strip_prefix(b"br").or_else(|| rest.strip_prefix(b"r"))?;
    let hashes = after.iter().take_while(|&&byte| byte == b'#').count();
    (after.get(hashes) == Some(&b'"')).then_some(hashes)
}

fn raw_string_length(rest: &[u8], hashes: usize) -> usize {
    let open = rest.iter().position(|&byte| byte == b'"').expect("a raw string has a quote") + 1;
    let mut close = vec![b'"'];
    close.resize(hashes + 1, b'#');
    let body = &rest[open..];
    let length = body.windows(close.len()).position(|window| window == close);
    length.map_or(rest.len(), |length| open + length + close.len())
}

fn quoted_length(rest: &[u8], quote: u8) -> usize {
    let mut at = 1;
    while at < rest.len() {
        match rest[at] {
            b'\\' => at += 2,
            byte if byte == quote => return at + 1,
            _ => at += 1,
        }
    }
    rest.len()
}

/// Whether a `'` opens a character and not a lifetime.
fn is_character_literal(rest: &[u8]) -> bool {
    match rest.get(1) {
        Some(b'\\') => true,
        Some(byte) if byte.is_ascii() => rest.get(2) == Some(&b'\''),
        Some(_) => true,
        None => false,
    }
}

fn is_name_byte(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || byte == b'_'
}

/// Blanks every item (up to its closing brace or semicolon) that follows `#[cfg(test)]`.
fn blank_test_items(code: &str) -> String {
    let mut out = code.as_bytes().to_vec();
    let mut from = 0;
    while let Some(found) = code[from..].find("#[cfg(test)]") {
        let start = from + found;
        let end = item_end(code.as_bytes(), start + "#[cfg(test)]".len());
        for byte in &mut out[start..end] {
            if *byte != b'\n' {
                *byte = b' ';
            }
        }
        from = end;
    }
    String::from_utf8(out).expect("whole items are blanked")
}

fn item_end(code: &[u8], start: usize) -> usize {
    let mut depth = 0_usize;
    for (at, byte) in code.iter().enumerate().skip(start) {
        match byte {
            b'{' => depth += 1,
            b'}' => {
                depth = depth.saturating_sub(1);
                if depth == 0 {
                    return at + 1;
                }
            }
            b';' if depth == 0 => return at + 1,
            _ => {}
        }
    }
    code.len()
}

/// A path in the code, `use` groups unfolded: `use std::{fs, time::Instant}` gives `std::fs` and `std::time::Instant`.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct CodePath {
    /// Counted from 1.
    pub line: usize,
    /// At least one; a glob ends in `*`.
    pub segments: Vec<String>,
}

impl CodePath {
    /// Whether the path begins with `prefix`, written with `::`.
    pub fn starts_with(&self, prefix: &str) -> bool {
        let mut segments = self.segments.iter();
        prefix.split("::").all(|wanted| segments.next().is_some_and(|segment| segment == wanted))
    }
}

/// Every path of `code` (already blanked), in order of appearance.
pub fn paths(code: &str) -> Vec<CodePath> {
    let bytes = code.as_bytes();
    let mut found = Vec::new();
    let mut at = 0;
    let mut line = 1;
    while at < bytes.len() {
        if bytes[at] == b'\n' {
            line += 1;
        }
        let starts_name = is_name_byte(bytes[at]) && !bytes[at].is_ascii_digit();
        let inside = at > 0 && (is_name_byte(bytes[at - 1]) || bytes[at - 1] == b'.');
        if starts_name && !inside {
            let end = read_path(bytes, at, &mut Vec::new(), line, &mut found);
            line += code[at..end].matches('\n').count();
            at = end;
        } else {
            at += 1;
        }
    }
    found
}

/// Reads one path (or one branch of a group) at `at`, adds every full path to `found`, returns where it ends.
fn read_path(bytes: &[u8], mut at: usize, prefix: &mut Vec<String>, line: usize, found: &mut Vec<CodePath>) -> usize {
    let depth = prefix.len();
    loop {
        let start = at;
        while at < bytes.len() && (is_name_byte(bytes[at]) || bytes[at] == b'*') {
            at += 1;
        }
        if at > start {
            prefix.push(String::from_utf8_lossy(&bytes[start..at]).into_owned());
        }
        if !bytes[at..].starts_with(b"::") {
            break;
        }
        let next = bytes.get(at + 2).copied().unwrap_or(b' ');
        if next == b'{' {
            at = read_group(bytes, at + 3, prefix, line, found);
            prefix.truncate(depth);
            return at;
        }
        if !is_name_byte(next) && next != b'*' {
            break;
        }
        at += 2;
    }
    if prefix.len() > depth {
        found.push(CodePath { line, segments: prefix.clone() });
    }
    prefix.truncate(depth);
    at
}

fn read_group(bytes: &[u8], mut at: usize, prefix: &mut Vec<String>, line: usize, found: &mut Vec<CodePath>) -> usize {
    while at < bytes.len() {
        match bytes[at] {
            b'}' => return at + 1,
            b'a' if bytes[at..].starts_with(b"as ") => {
                // The local name of an import is no path.
                at += 3;
                at += bytes[at..].iter().take_while(|&&byte| is_name_byte(byte)).count();
            }
            byte if is_name_byte(byte) || byte == b'*' => at = read_path(bytes, at, prefix, line, found),
            _ => at += 1,
        }
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(code: &str) -> Vec<String> {
        paths(code).into_iter().map(|path| path.segments.join("::")).collect()
    }

    #[test]
    fn literals_and_comments_go_and_lines_stay() {
        let code = blank_comments_and_literals("a /* b /* c */\n d */ e \"f\\\"g\" 'h' '\\'' 'i r#\"j\"k\"# l // m\nn");
        assert_eq!(code.split_whitespace().collect::<Vec<_>>(), ["a", "e", "'i", "l", "n"]);
        assert_eq!(code.lines().count(), 3);
    }

    #[test]
    fn test_items_go() {
        let file = SourceFile {
            path: String::new(),
            text: "fn a() { b() }\n#[cfg(test)]\nmod tests { fn c() { { } } }\nfn d() {}\n#[cfg(test)]\nuse e;\nf"
                .into(),
        };
        let code = file.production_code();
        assert_eq!(code.split_whitespace().collect::<String>(), "fna(){b()}fnd(){}f");
    }

    #[test]
    fn groups_unfold() {
        assert_eq!(
            found("use std::{fs, time::{Duration, Instant as I}, io::*};"),
            ["use", "std::fs", "std::time::Duration", "std::time::Instant", "std::io::*"]
        );
        assert_eq!(found("crate::store::object::read(x.fs())"), ["crate::store::object::read", "x"]);
    }
}
