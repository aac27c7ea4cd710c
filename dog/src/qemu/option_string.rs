//! QEMU's option strings, `key=value,key=value`, where a comma in a value is written twice.

use crate::nbd_export::comma_doubled;

/// One part: with a key, or a bare word.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Part {
    /// What is before the first `=`, if that can be a key.
    pub key: Option<String>,
    /// The rest, commas not doubled.
    pub value: Vec<u8>,
}

/// Splits a string into its parts.
pub fn split(text: &[u8]) -> Vec<Part> {
    let mut parts = Vec::new();
    let mut current = Vec::new();
    let mut bytes = text.iter().copied().peekable();
    while let Some(byte) = bytes.next() {
        if byte != b',' {
            current.push(byte);
        } else if bytes.next_if_eq(&b',').is_some() {
            current.push(b',');
        } else {
            parts.push(part(std::mem::take(&mut current)));
        }
    }
    parts.push(part(current));
    parts
}

fn part(text: Vec<u8>) -> Part {
    let key = text.iter().position(|&byte| byte == b'=').and_then(|at| {
        let key = std::str::from_utf8(&text[..at]).ok()?;
        let is_key = !key.is_empty() && key.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte));
        is_key.then(|| key.to_owned())
    });
    match key {
        Some(key) => Part { value: text[key.len() + 1..].to_vec(), key: Some(key) },
        None => Part { key: None, value: text },
    }
}

/// The opposite of [`split`].
pub fn join(parts: &[Part]) -> Vec<u8> {
    let mut text = Vec::new();
    for (index, part) in parts.iter().enumerate() {
        if index > 0 {
            text.push(b',');
        }
        if let Some(key) = &part.key {
            text.extend_from_slice(key.as_bytes());
            text.push(b'=');
        }
        text.extend(comma_doubled(&part.value));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn commas_in_values_are_doubled() {
        let parts = split(b"file=a,,b,size=1G,,,on,./x=y");
        let shown: Vec<_> =
            parts.iter().map(|part| (part.key.as_deref(), String::from_utf8_lossy(&part.value).into_owned())).collect();
        let expected = [
            (Some("file"), "a,b".to_owned()),
            (Some("size"), "1G,".to_owned()),
            (None, "on".to_owned()),
            (None, "./x=y".to_owned()),
        ];
        assert_eq!(shown, expected);
    }

    proptest! {
        #[test]
        fn joining_undoes_splitting(text in "[a-c=,.]{0,20}") {
            prop_assert_eq!(join(&split(text.as_bytes())), text.as_bytes());
        }
    }
}
