//! What typed words mean: which sheep, which snapshot, how many copies, how many bytes.
//!
//! Each function takes a word and gives a value or the failure, text and exit code, that scripts know for a wrong one.

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::fmt;
use std::net::{IpAddr, SocketAddr, ToSocketAddrs};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use sheep_core::admission::ClusterKey;
use sheep_core::copy_policy::CopyPolicy;
use sheep_core::units::parse_size;
use sheep_core::vdi_name;

use crate::exit::{Exit, Failure};
use crate::secure::read_key;

/// Where a sheep listens unless told otherwise.
const DEFAULT_ADDRESS: &str = "127.0.0.1";
const DEFAULT_PORT: &str = "7000";
const ADDRESS_VARIABLE: &str = "SHEEPDOG_DOG_ADDR";
const PORT_VARIABLE: &str = "SHEEPDOG_DOG_PORT";
const KEY_VARIABLE: &str = "DOG_KEY";
/// How far a sheep's port for other nodes is above its port for clients, unless told otherwise.
pub const NODE_PORT_OFFSET: u16 = 10;
/// Digits of a node's id.
const NODE_ID_DIGITS: usize = 16;

/// Object sizes: 1 MiB to 2 GiB.
const SHIFT_MIN: u8 = 20;
const SHIFT_MAX: u8 = 31;

/// The sheep to ask.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Target {
    /// By its address.
    Tcp(SocketAddr),
    /// By its socket in the file system of this machine.
    Unix(&'static Path),
    /// By its port for other nodes, with the cluster key.
    Secure(&'static NodePort),
}

/// Where a sheep listens for other nodes, and for whoever has the cluster key.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodePort {
    /// The preferred one first; never empty.
    pub addresses: Vec<SocketAddr>,
    /// What it wants to see proved.
    pub key: ClusterKey,
}

impl Target {
    /// The sheep behind a node port. As for [`Target::unix`], it stays in memory until the program ends.
    pub fn secure(addresses: Vec<SocketAddr>, key: ClusterKey) -> Target {
        assert!(!addresses.is_empty(), "whoever is known is known somewhere");
        Target::Secure(Box::leak(Box::new(NodePort { addresses, key })))
    }

    /// Refuses unless an answer that is `what` cannot be read by others on its way.
    pub fn keeps_secrets(self, what: &str) -> Result<(), Failure> {
        if self.is_local() || matches!(self, Target::Secure(_)) {
            return Ok(());
        }
        Err(Failure::failed(format!(
            "The answer of {self} would cross the network as clear text, and {what} is a secret; run this command on a \
             member, or with a copy of the cluster key (--key FILE)"
        )))
    }

    /// The sheep behind a unix socket. Targets are copied freely and one command names few of them, so the path stays in
    /// memory until the program ends.
    pub fn unix(socket: &Path) -> Target {
        Target::Unix(Box::leak(socket.to_path_buf().into_boxed_path()))
    }

    /// Whether it runs on this machine for sure.
    pub fn is_local(self) -> bool {
        match self {
            Target::Tcp(socket) => socket.ip().to_canonical().is_loopback(),
            Target::Unix(_) => true,
            Target::Secure(place) => place.addresses.iter().all(|socket| socket.ip().to_canonical().is_loopback()),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // Without the brackets of IPv6, as in all lists.
        let mut put = |socket: &SocketAddr| write!(f, "{}:{}", socket.ip(), socket.port());
        match self {
            Target::Tcp(socket) => put(socket),
            Target::Unix(path) => write!(f, "{}", path.display()),
            Target::Secure(place) => place.addresses.first().map_or(Ok(()), put),
        }
    }
}

/// What was typed to say which sheep is to be asked.
#[derive(Clone, Copy, Default)]
pub struct Asked<'a> {
    /// `-a`.
    pub address: Option<&'a str>,
    /// `-p`.
    pub port: Option<&'a str>,
    /// `--key`.
    pub key_file: Option<&'a OsStr>,
}

/// The sheep that the options name, else the environment, else the one on this machine.
pub fn target(asked: Asked<'_>, variable: impl Fn(&str) -> Option<OsString>) -> Result<Target, Failure> {
    let text = |name: &str| variable(name).map(|value| value.to_string_lossy().into_owned());
    let port = asked.port.map(str::to_owned).or_else(|| text(PORT_VARIABLE));
    let port = self::port(port.as_deref().unwrap_or(DEFAULT_PORT))?;
    let address = asked.address.map(str::to_owned).or_else(|| text(ADDRESS_VARIABLE));
    let address = address.as_deref().unwrap_or(DEFAULT_ADDRESS);
    let key_file =
        asked.key_file.map(OsStr::to_owned).or_else(|| variable(KEY_VARIABLE).filter(|file| !file.is_empty()));
    if let Some(file) = key_file {
        let (host, port) = node_place(address, port);
        return Ok(Target::secure(resolve(host, port)?, read_key(Path::new(&file))?));
    }
    Ok(Target::Tcp(resolve(address, port)?[0]))
}

/// The addresses of a host; at least one.
fn resolve(host: &str, port: u16) -> Result<Vec<SocketAddr>, Failure> {
    let found: Vec<SocketAddr> = (host, port).to_socket_addrs().into_iter().flatten().collect();
    if host.is_empty() || found.is_empty() {
        return Err(Failure::failed(format!("Invalid ip address {host}")));
    }
    Ok(found)
}

/// `HOST`, `HOST:PORT`, `ADDRESS` or `[ADDRESS]:PORT` of a node port; by default it is above the client port.
fn node_place(word: &str, client_port: u16) -> (&str, u16) {
    let default = client_port.checked_add(NODE_PORT_OFFSET).unwrap_or(client_port - NODE_PORT_OFFSET);
    if word.parse::<IpAddr>().is_err()
        && let Some((host, port)) = word.rsplit_once(':')
        && let Ok(port) = port.parse()
    {
        return (host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host), port);
    }
    (word, default)
}

/// The id of a node, or the beginning of it: 16 hexadecimal digits at most.
pub fn node_id(word: &str) -> Result<String, Failure> {
    let is_id = (1..=NODE_ID_DIGITS).contains(&word.len()) && word.bytes().all(|byte| byte.is_ascii_hexdigit());
    if is_id {
        return Ok(word.to_ascii_lowercase());
    }
    Err(Failure::usage(format!(
        "Invalid node id '{word}': give up to {NODE_ID_DIGITS} hexadecimal digits; 'dog node list' shows the ids of nodes \
         that ask, 'dog cluster info -v' those of members"
    )))
}

/// Whether the word is the whole id of a node, and no position in a list.
pub fn is_whole_node_id(word: &str) -> bool {
    word.len() == NODE_ID_DIGITS && word.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// As the C library's `strtoll` reads it: blanks and a plus sign may precede the digits.
fn port(word: &str) -> Result<u16, Failure> {
    let digits = word.trim_start_matches(|c: char| c.is_ascii_whitespace());
    let digits = digits.strip_prefix('+').unwrap_or(digits);
    let is_number = !digits.is_empty() && digits.bytes().all(|byte| byte.is_ascii_digit());
    match digits.parse::<u16>() {
        Ok(port) if is_number && port != 0 => Ok(port),
        _ => Err(Failure::new(Exit::Usage, format!("Invalid port number '{word}'"))),
    }
}

/// A volume's name.
pub fn vdi_name(word: &OsStr) -> Result<&[u8], Failure> {
    let name = word.as_bytes();
    vdi_name::check_name(name)
        .map_err(|error| Failure::failed(format!("Invalid VDI name '{}': {error}", shown(name))))?;
    Ok(name)
}

/// A name or tag for messages: what is not UTF-8 is replaced.
pub fn shown(name: &[u8]) -> Cow<'_, str> {
    String::from_utf8_lossy(name)
}

/// A name or tag for requests that are text.
pub fn as_text(name: &[u8]) -> Result<&str, Failure> {
    std::str::from_utf8(name)
        .map_err(|_| Failure::failed(format!("'{}' is not UTF-8: this command takes names that are", shown(name))))
}

/// Which of the VDIs of a name.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Selector {
    /// Empty: not by tag.
    pub tag: Vec<u8>,
    /// 0: not by id.
    pub id: u32,
}

impl Selector {
    /// The working VDI.
    pub const CURRENT: Selector = Selector { tag: Vec::new(), id: 0 };

    /// What `-s` says; without it, the working VDI. All digits are an id, anything else a tag.
    pub fn of(word: Option<&OsStr>) -> Result<Selector, Failure> {
        let Some(word) = word else { return Ok(Selector::CURRENT) };
        if !is_number(word) {
            return Ok(Selector { tag: tag(word)?, id: 0 });
        }
        let text = word.to_string_lossy();
        match text.parse::<i128>() {
            Ok(1..) => match text.parse::<u32>() {
                Ok(id) => Ok(Selector { tag: Vec::new(), id }),
                Err(_) => Err(Failure::failed(format!("The snapshot id {text} is larger than any snapshot has"))),
            },
            _ => Err(Failure::failed("The snapshot id must be larger than zero")),
        }
    }

    /// Whether this is the working VDI.
    pub fn is_current(&self) -> bool {
        *self == Selector::CURRENT
    }
}

/// Whether the whole word is a decimal number, with or without a sign.
pub fn is_number(word: &OsStr) -> bool {
    let bytes = word.as_bytes();
    let digits = bytes.strip_prefix(b"-").or_else(|| bytes.strip_prefix(b"+")).unwrap_or(bytes);
    !digits.is_empty() && digits.iter().all(u8::is_ascii_digit)
}

/// A tag; may be empty.
pub fn tag(word: &OsStr) -> Result<Vec<u8>, Failure> {
    let tag = word.as_bytes();
    vdi_name::check_tag(tag)
        .map_err(|error| Failure::failed(format!("Invalid snapshot tag '{}': {error}", shown(tag))))?;
    Ok(tag.to_vec())
}

/// `-c`.
pub fn copies(word: Option<&str>) -> Result<Option<CopyPolicy>, Failure> {
    let Some(word) = word else { return Ok(None) };
    match word.parse::<CopyPolicy>() {
        Ok(policy) if policy.strips().is_some() => Err(Failure::not_available(&format!("Erasure coding (-c {word})"))
            .then("Give a number of copies, such as -c 3")),
        Ok(policy) => Ok(Some(policy)),
        Err(error) => Err(Failure::failed(format!("Invalid parameter {word}\nThe value of -c {error}"))),
    }
}

/// `-z`: log2 of the object size.
pub fn shift(word: Option<&str>) -> Result<Option<u8>, Failure> {
    let Some(word) = word else { return Ok(None) };
    match word.parse::<u8>() {
        Ok(shift @ SHIFT_MIN..=SHIFT_MAX) => Ok(Some(shift)),
        _ => Err(Failure::failed(format!(
            "Invalid object size shift '{word}': must be an integer between {SHIFT_MIN} and {SHIFT_MAX}, such as 22 \
             for objects of 4 MB"
        ))),
    }
}

/// A number of bytes.
pub fn size(word: &str) -> Result<u64, Failure> {
    parse_size(word)
        .map_err(|error| Failure::new(Exit::Usage, format!("Invalid size '{word}'\n{error}, such as 512M or 1.5G")))
}

/// An object's index in its volume: decimal, or hexadecimal after `0x`.
pub fn object_index(word: &str) -> Result<u32, Failure> {
    let number = match word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")) {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => word.parse(),
    };
    number.map_err(|_| Failure::failed(format!("Invalid object index '{word}': give a number or 0x...")))
}

/// Unix seconds of a time on the wire: seconds in the upper half, nanoseconds in the lower.
pub fn seconds(wire_time: u64) -> i64 {
    i64::from((wire_time >> 32) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nothing(_: &str) -> Option<OsString> {
        None
    }

    fn asked<'a>(address: impl Into<Option<&'a str>>, port: impl Into<Option<&'a str>>) -> Asked<'a> {
        Asked { address: address.into(), port: port.into(), key_file: None }
    }

    #[test]
    fn options_win_over_the_environment() {
        let environment = |name: &str| match name {
            PORT_VARIABLE => Some("7801".into()),
            ADDRESS_VARIABLE => Some("::1".into()),
            _ => None,
        };
        assert_eq!(target(asked(None, None), nothing).expect("default").to_string(), "127.0.0.1:7000");
        assert_eq!(target(asked(None, None), environment).expect("environment").to_string(), "::1:7801");
        assert_eq!(target(asked("127.0.0.2", "1"), environment).expect("options").to_string(), "127.0.0.2:1");
    }

    #[test]
    fn a_key_leads_to_the_port_for_nodes() {
        for (word, port, place) in [
            ("10.0.0.1", 7000, ("10.0.0.1", 7010)),
            ("10.0.0.1:9000", 7000, ("10.0.0.1", 9000)),
            ("fd00::1", 7001, ("fd00::1", 7011)),
            ("[fd00::1]:9000", 7000, ("fd00::1", 9000)),
            ("host", 65535, ("host", 65525)),
        ] {
            assert_eq!(node_place(word, port), place, "{word}");
        }
        let failure = target(Asked { key_file: Some(OsStr::new("/nowhere/key")), ..Asked::default() }, nothing);
        let failure = failure.expect_err("there is no such file");
        assert!(failure.message.starts_with("cannot use the key file /nowhere/key: "), "{failure}");
        let by_environment = |name: &str| (name == KEY_VARIABLE).then(|| "/dev/null".into());
        let failure = target(Asked::default(), by_environment).expect_err("an empty file is no key");
        assert!(failure.message.contains("/dev/null: this is no cluster key"), "{failure}");
    }

    #[test]
    fn secrets_are_not_asked_for_over_the_network() {
        let key = ClusterKey { generation: 1, secret: [1; 32] };
        let tcp = |text: &str| Target::Tcp(text.parse().expect("an address"));
        let secure = Target::secure(vec!["10.0.0.1:7010".parse().expect("an address")], key);
        for target in [tcp("127.0.0.1:7000"), tcp("[::1]:7000"), Target::unix("/s/sock".as_ref()), secure] {
            assert_eq!(target.keeps_secrets("a token"), Ok(()), "{target}");
        }
        let failure = tcp("10.0.0.1:7000").keeps_secrets("a token").expect_err("clear text");
        assert!(failure.message.contains("10.0.0.1:7000") && failure.message.contains("--key FILE"), "{failure}");
    }

    #[test]
    fn node_ids_are_hexadecimal() {
        assert_eq!(node_id("3F9c"), Ok("3f9c".to_owned()));
        for word in ["", "x", "-1", "0123456789abcdef0", "12 "] {
            assert_eq!(node_id(word).expect_err(word).exit, Exit::Usage, "{word}");
        }
        assert!(is_whole_node_id("0123456789abcdef") && !is_whole_node_id("12"));
    }

    #[test]
    fn ports_are_read_as_the_old_tool_read_them() {
        for (word, number) in [("7800", 7800), (" 7801", 7801), ("+7801", 7801), ("0007", 7), ("65535", 65535)] {
            assert_eq!(port(word), Ok(number), "{word}");
        }
        for word in ["42a", "-1", "", "-", "+", "0", "65536", "4294967297", "++1"] {
            assert_eq!(port(word), Err(Failure::new(Exit::Usage, format!("Invalid port number '{word}'"))), "{word}");
        }
        for word in ["", "not an address"] {
            let failure = target(asked(word, None), nothing).expect_err(word);
            assert_eq!(failure, Failure::failed(format!("Invalid ip address {word}")));
        }
    }

    #[test]
    fn digits_select_by_id_and_anything_else_by_tag() {
        let select = |word: &str| Selector::of(Some(&OsString::from(word)));
        assert_eq!(Selector::of(None), Ok(Selector::CURRENT));
        assert_eq!(select("5"), Ok(Selector { tag: Vec::new(), id: 5 }));
        assert_eq!(select("1abc"), Ok(Selector { tag: b"1abc".to_vec(), id: 0 }));
        assert_eq!(select(""), Ok(Selector::CURRENT));
        for word in ["0", "-3"] {
            assert_eq!(select(word), Err(Failure::failed("The snapshot id must be larger than zero")), "{word}");
        }
        assert!(select("99999999999999999999999999999999999999999999").is_err());
        assert!(select("4294967296").is_err());
        assert!(select(&"t".repeat(256)).is_err());
    }

    #[test]
    fn wrong_values_keep_their_exit_codes() {
        assert_eq!(copies(Some("0")).expect_err("0").exit, Exit::Failure);
        assert!(copies(Some("x")).expect_err("x").message.starts_with("Invalid parameter x\n"));
        assert_eq!(copies(Some("4")).expect("4").map(CopyPolicy::holder_count), Some(4));
        assert!(copies(Some("4:2")).expect_err("4:2").message.contains("not available in this version"));
        assert_eq!(shift(Some("20")), Ok(Some(20)));
        assert_eq!(shift(Some("32")).expect_err("32").exit, Exit::Failure);
        assert_eq!(size("1.5M"), Ok(1_572_864));
        let failure = size("10MB").expect_err("10MB");
        assert!(failure.message.starts_with("Invalid size '10MB'\n"), "{failure}");
        assert_eq!(failure.exit, Exit::Usage);
        assert_eq!(object_index("0x10"), Ok(16));
        assert!(object_index("ten").is_err());
        assert!(vdi_name(OsStr::new("")).is_err());
    }
}
