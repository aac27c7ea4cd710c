//! The `sheepdog:` names that QEMU knew up to 6.0, as QEMU 5.2 understood them.
//!
//! | form | means |
//! |---|---|
//! | `sheepdog:NAME[:TAG\|ID]` | the default sheep |
//! | `sheepdog:HOST:PORT:NAME[:TAG\|ID]` | with two colons or more, the first two words are host and port |
//! | `sheepdog://[HOST[:PORT]]/NAME[#TAG\|ID]`, `sheepdog+tcp://...` | a URL, percent-encoded |
//! | `sheepdog+unix:///NAME?socket=PATH[#TAG\|ID]` | the sheep behind a socket of this machine |
//!
//! The first two are rewritten to the third before they are understood, so `%` means the same in all. No input panics.

use std::fmt;
use std::path::PathBuf;

use sheep_core::vdi_name::{check_name, check_tag};

use crate::exit::Failure;
use crate::meaning::shown;
use crate::nbd_export::path_of;

/// Where a sheep listens unless a URL says otherwise.
pub const DEFAULT_PORT: u16 = 7000;
const SCHEMES: [&str; 3] = ["sheepdog", "sheepdog+tcp", "sheepdog+unix"];

/// The sheep to ask about a volume.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Place {
    /// The one that `dog` asks when it is not told.
    Default,
    /// By host and port.
    Inet {
        /// Name or address, without brackets.
        host: String,
        /// Of the native protocol.
        port: u16,
    },
    /// By its native socket.
    Unix(PathBuf),
}

/// A volume or a snapshot.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VdiUrl {
    /// Which cluster.
    pub place: Place,
    /// Its name.
    pub name: Vec<u8>,
    /// Tag or decimal id; `None` is the working VDI.
    pub snapshot: Option<Vec<u8>>,
}

/// What is wrong with a URL.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct UrlError {
    url: String,
    reason: String,
}

impl fmt::Display for UrlError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "Invalid volume '{}': {}; name it as sheepdog:NAME, sheepdog://HOST:PORT/NAME#TAG or \
             sheepdog+unix:///NAME?socket=PATH",
            self.url, self.reason
        )
    }
}

impl std::error::Error for UrlError {}

impl From<UrlError> for Failure {
    fn from(error: UrlError) -> Failure {
        Failure::failed(error.to_string())
    }
}

/// Whether a word is meant as a URL of this kind.
pub fn is_url(word: &[u8]) -> bool {
    scheme_of(word).is_some()
}

/// Whether a word names the driver.
pub fn is_driver(word: &[u8]) -> bool {
    SCHEMES.iter().any(|scheme| scheme.as_bytes() == word)
}

fn scheme_of(word: &[u8]) -> Option<(&'static str, &[u8])> {
    SCHEMES.iter().find_map(|scheme| Some((*scheme, word.strip_prefix(scheme.as_bytes())?.strip_prefix(b":")?)))
}

/// Understands a URL.
pub fn parse(word: &[u8]) -> Result<VdiUrl, UrlError> {
    let wrong = |reason: String| UrlError { url: shown(word).into_owned(), reason };
    let Some((scheme, rest)) = scheme_of(word) else { return Err(wrong("it does not begin with sheepdog:".into())) };
    let old = match rest.strip_prefix(b"//") {
        Some(rest) => return parse_uri(scheme, rest).map_err(wrong),
        None if scheme == "sheepdog" => rest,
        None => return Err(wrong(format!("'//' must follow {scheme}:"))),
    };
    let colons: Vec<usize> = (0..old.len()).filter(|&at| old[at] == b':').collect();
    let (authority, volume) = match colons.as_slice() {
        [_, second, ..] => (&old[..*second], &old[second + 1..]),
        _ => (&old[..0], old),
    };
    let (name, fragment) = split_at(volume, b':');
    let mut uri = [authority, b"/", name].concat();
    if let Some(fragment) = fragment {
        uri.push(b'#');
        uri.extend_from_slice(fragment);
    }
    parse_uri(scheme, &uri).map_err(wrong)
}

/// What follows `scheme://`.
fn parse_uri(scheme: &str, rest: &[u8]) -> Result<VdiUrl, String> {
    let (rest, fragment) = split_at(rest, b'#');
    let (rest, query) = split_at(rest, b'?');
    let (authority, path) = split_at(rest, b'/');
    let place = match (scheme, query) {
        ("sheepdog+unix", _) if !authority.is_empty() => {
            return Err("host and port have no meaning beside a socket".into());
        }
        ("sheepdog+unix", query) => {
            let socket =
                query.and_then(|query| query.strip_prefix(b"socket=")).filter(|socket| !socket.contains(&b'&'));
            let socket = socket.map(percent_decoded).filter(|socket| !socket.is_empty());
            Place::Unix(path_of(&socket.ok_or("'?socket=PATH' must follow the name")?))
        }
        (_, Some(_)) => return Err("only sheepdog+unix: has a '?'".into()),
        (_, None) => place_of(authority)?,
    };
    let snapshot = fragment.map(percent_decoded).filter(|snapshot| !snapshot.is_empty());
    VdiUrl::new(place, percent_decoded(path.unwrap_or_default()), snapshot)
}

/// `HOST`, `HOST:PORT`, `:PORT`, `[ADDRESS]:PORT` or nothing.
fn place_of(authority: &[u8]) -> Result<Place, String> {
    if authority.is_empty() {
        return Ok(Place::Default);
    }
    let decoded = percent_decoded(authority);
    let text = std::str::from_utf8(&decoded).map_err(|_| "the host is not text".to_owned())?;
    let (host, port) = match text.strip_prefix('[').and_then(|text| text.split_once(']')) {
        Some((host, "")) => (host, None),
        Some((host, rest)) => (host, Some(rest.strip_prefix(':').ok_or("':PORT' must follow the ']'")?)),
        None => match text.split_once(':') {
            Some((host, port)) => (host, Some(port)),
            None => (text, None),
        },
    };
    inet(host, port)
}

/// A place by host and port as they were written.
pub fn inet(host: &str, port: Option<&str>) -> Result<Place, String> {
    let port = match port.filter(|port| !port.is_empty()) {
        None => DEFAULT_PORT,
        Some(port) => match port.parse::<u16>() {
            Ok(number) if number != 0 && port.bytes().all(|byte| byte.is_ascii_digit()) => number,
            _ => return Err(format!("'{port}' is not a port")),
        },
    };
    let host = if host.is_empty() { "localhost" } else { host };
    Ok(Place::Inet { host: host.to_owned(), port })
}

impl VdiUrl {
    /// Checks name and snapshot.
    pub fn new(place: Place, name: Vec<u8>, snapshot: Option<Vec<u8>>) -> Result<VdiUrl, String> {
        check_name(&name).map_err(|error| error.to_string())?;
        if let Some(snapshot) = &snapshot {
            check_tag(snapshot).map_err(|error| error.to_string())?;
            let is_number = snapshot.iter().all(u8::is_ascii_digit);
            if is_number && !matches!(shown(snapshot).parse::<u32>(), Ok(1..)) {
                return Err(format!("'{}' is not a snapshot id", shown(snapshot)));
            }
        }
        Ok(VdiUrl { place, name, snapshot })
    }
}

fn split_at(bytes: &[u8], separator: u8) -> (&[u8], Option<&[u8]>) {
    match bytes.iter().position(|&byte| byte == separator) {
        Some(at) => (&bytes[..at], Some(&bytes[at + 1..])),
        None => (bytes, None),
    }
}

/// `%XX` becomes a byte; a `%` without two digits stays.
fn percent_decoded(bytes: &[u8]) -> Vec<u8> {
    let digit = |at: usize| bytes.get(at).and_then(|&byte| char::from(byte).to_digit(16));
    let mut decoded = Vec::with_capacity(bytes.len());
    let mut at = 0;
    while at < bytes.len() {
        match (bytes[at], digit(at + 1), digit(at + 2)) {
            (b'%', Some(high), Some(low)) => {
                decoded.push((high * 16 + low) as u8);
                at += 3;
            }
            (byte, ..) => {
                decoded.push(byte);
                at += 1;
            }
        }
    }
    decoded
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn volume(place: Place, name: &str, snapshot: &str) -> VdiUrl {
        VdiUrl {
            place,
            name: name.into(),
            snapshot: Some(snapshot).filter(|word| !word.is_empty()).map(|word| word.as_bytes().to_vec()),
        }
    }

    fn at(host: &str, port: u16) -> Place {
        Place::Inet { host: host.to_owned(), port }
    }

    #[test]
    fn every_form_is_understood() {
        let socket = || Place::Unix("/s/sock".into());
        for (url, expected) in [
            ("sheepdog:disk", volume(Place::Default, "disk", "")),
            ("sheepdog:disk:before", volume(Place::Default, "disk", "before")),
            ("sheepdog:disk:12", volume(Place::Default, "disk", "12")),
            ("sheepdog:disk:", volume(Place::Default, "disk", "")),
            ("sheepdog:node1:7001:disk", volume(at("node1", 7001), "disk", "")),
            ("sheepdog:node1:7001:disk:before", volume(at("node1", 7001), "disk", "before")),
            ("sheepdog:10.0.0.1:7000:disk:3", volume(at("10.0.0.1", 7000), "disk", "3")),
            ("sheepdog:node1:7001:disk:a:b", volume(at("node1", 7001), "disk", "a:b")),
            ("sheepdog::7001:disk", volume(at("localhost", 7001), "disk", "")),
            ("sheepdog:a%20b", volume(Place::Default, "a b", "")),
            ("sheepdog:///disk", volume(Place::Default, "disk", "")),
            ("sheepdog:///disk#before", volume(Place::Default, "disk", "before")),
            ("sheepdog:///disk#", volume(Place::Default, "disk", "")),
            ("sheepdog://node1/disk", volume(at("node1", 7000), "disk", "")),
            ("sheepdog://node1:/disk", volume(at("node1", 7000), "disk", "")),
            ("sheepdog://node1:7001/disk#7", volume(at("node1", 7001), "disk", "7")),
            ("sheepdog://[::1]:7001/disk", volume(at("::1", 7001), "disk", "")),
            ("sheepdog://[fe80::1]/disk", volume(at("fe80::1", 7000), "disk", "")),
            ("sheepdog+tcp://node1:7001/disk", volume(at("node1", 7001), "disk", "")),
            ("sheepdog:///dir/disk:1%2c2%23%3f#t%3ag", volume(Place::Default, "dir/disk:1,2#?", "t:g")),
            ("sheepdog:///100%", volume(Place::Default, "100%", "")),
            ("sheepdog+unix:///disk?socket=/s/sock", volume(socket(), "disk", "")),
            ("sheepdog+unix:///disk?socket=%2Fs%2Fsock#before", volume(socket(), "disk", "before")),
        ] {
            assert_eq!(parse(url.as_bytes()), Ok(expected), "{url}");
            assert!(is_url(url.as_bytes()), "{url}");
        }
        assert_eq!(parse(b"sheepdog:%ff%zz").expect("bytes").name, b"\xff%zz");
    }

    #[test]
    fn what_names_no_volume_is_refused_with_the_way_out() {
        let long = format!("sheepdog:{}", "n".repeat(256));
        for (url, reason) in [
            ("sheepdog:", "must not be empty"),
            ("sheepdog://", "must not be empty"),
            ("sheepdog://node1", "must not be empty"),
            ("sheepdog:///", "must not be empty"),
            (long.as_str(), "longer than 255"),
            ("sheepdog:///a%00", "NUL"),
            ("sheepdog:///disk#0", "'0' is not a snapshot id"),
            ("sheepdog:disk:4294967296", "'4294967296' is not a snapshot id"),
            ("sheepdog:node1:x:disk", "'x' is not a port"),
            ("sheepdog:node1:+7:disk", "'+7' is not a port"),
            ("sheepdog://node1:0/disk", "'0' is not a port"),
            ("sheepdog://node1:65536/disk", "'65536' is not a port"),
            ("sheepdog://[::1]7000/disk", "must follow the ']'"),
            ("sheepdog:///disk?socket=/s", "only sheepdog+unix:"),
            ("sheepdog+tcp:disk", "'//' must follow"),
            ("sheepdog+unix:///disk", "'?socket=PATH' must follow"),
            ("sheepdog+unix:///disk?socket=", "'?socket=PATH' must follow"),
            ("sheepdog+unix:///disk?socket=/a&b=c", "'?socket=PATH' must follow"),
            ("sheepdog+unix://host/disk?socket=/a", "host and port have no meaning"),
        ] {
            let error = parse(url.as_bytes()).expect_err(url).to_string();
            assert!(error.contains(reason) && error.contains("name it as sheepdog:NAME"), "{url}: {error}");
        }
        for word in ["disk", "sheepdog", "nbd://x", "sheepdogx:y", "./sheepdog:x", ""] {
            assert!(!is_url(word.as_bytes()) && parse(word.as_bytes()).is_err(), "{word}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(start in 0_usize..4, rest in proptest::collection::vec(any::<u8>(), 0..40)) {
            let start = ["sheepdog:", "sheepdog://", "sheepdog+unix:///", ""][start];
            let _ = parse(&[start.as_bytes(), &rest].concat());
        }

        #[test]
        fn punctuation_never_panics(rest in "[a:/#?%\\[\\]=&,0-9]{0,20}") {
            let _ = parse(format!("sheepdog:{rest}").as_bytes());
            let _ = parse(format!("sheepdog+unix:{rest}").as_bytes());
        }
    }
}
