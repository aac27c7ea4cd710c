//! Every setting of the daemon: default, unit, range, and what is refused with which words.
//!
//! The option letters and refusals are those that scripts know (cli.md section 1). A refused value is one line on standard
//! error and exit status 1.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, ToSocketAddrs};
use std::path::PathBuf;

use clap::{Arg, ArgAction, Command};
use qemu_proto::stat::LOG_LEVELS;
use sheep_core::level::Level;
use sheep_core::units::parse_size;

use crate::cluster::quorum::token::Token;
use crate::front::allowed::Allowed;
use crate::front::nbd::tls::TlsFiles;
use crate::logging::LogLevel;
use crate::store::{CacheConfig, JOURNAL_BYTES_DEFAULT};

/// The smallest journal that may be asked for: the ancestor's. Much less would be full before a flush is over.
const JOURNAL_MIB_MIN: u64 = 64;
/// The smallest cache that may be asked for: less would be gone before it is read again.
const CACHE_MIB_MIN: u64 = 64;
/// Default client port: the ancestor's.
const PORT_DEFAULT: u16 = 7000;
/// The node port is this far above the client port, unless given: `-p 7000` and 7010.
const NODE_PORT_OFFSET: u16 = 10;
/// Default store directory: the ancestor's.
const PATH_DEFAULT: &str = "/tmp";

/// How nodes find each other and agree.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum ClusterDriver {
    /// Many sheep on one machine, over a directory.
    Local(PathBuf),
    /// Nodes find each other and vote: the default.
    Raft,
}

/// Where NBD is served besides the socket in the store directory.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum NbdListen {
    /// On loopback, if the conventional port is free: of several sheep on one machine the first one has it.
    IfFree(SocketAddr),
    /// Here, or the daemon does not start.
    At(SocketAddr),
    /// Nowhere.
    Nowhere,
}

/// Where the log goes.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum LogDestination {
    /// `sheep.log` in the log directory.
    File,
    /// Standard error.
    Stderr,
}

/// What was asked for, checked.
#[derive(Clone, Debug)]
pub struct Config {
    /// Directory of the store.
    pub meta: PathBuf,
    /// Further directories that hold the objects; empty for META itself.
    pub disks: Vec<PathBuf>,
    /// Client port.
    pub port: u16,
    /// See [`NbdListen`].
    pub nbd: NbdListen,
    /// Certificates for NBD over TCP, which then wants TLS.
    pub nbd_tls: Option<TlsFiles>,
    /// Listen addresses; all interfaces, IPv4 and IPv6, if empty.
    pub bind: Option<IpAddr>,
    /// The address that the others and clients are told; the machine's first one if not given.
    pub my_address: Option<IpAddr>,
    /// Fault domain; told from the address if not given.
    pub zone: Option<u32>,
    /// Address and port for traffic between nodes, if it has a network of its own.
    pub node_address: Option<IpAddr>,
    /// The port where other nodes connect (TCP) and gossip (UDP).
    pub node_port: u16,
    /// Hosts to look for other nodes at.
    pub seeds: Vec<String>,
    /// Lets this node in, once.
    pub token: Option<Token>,
    /// A copy of the cluster key.
    pub key_file: Option<PathBuf>,
    /// Networks whose clients are served without authentication, besides this machine's own.
    pub allowed: Allowed,
    /// See [`ClusterDriver`].
    pub cluster: ClusterDriver,
    /// Stores nothing.
    pub gateway: bool,
    /// Flushes the device; `-n` trusts that power never fails.
    pub sync: bool,
    /// Stays in the foreground.
    pub foreground: bool,
    /// File that holds the process id for life.
    pub pid_file: Option<PathBuf>,
    /// Journal size, bytes.
    pub journal_bytes: u64,
    /// Journal directory if not META.
    pub journal_dir: Option<PathBuf>,
    /// A cache on a faster device than the disks.
    pub cache: Option<CacheConfig>,
    /// See [`LogDestination`].
    pub log_destination: LogDestination,
    /// Directory of `sheep.log` if not META.
    pub log_dir: Option<PathBuf>,
    /// The least important messages that are logged.
    pub log_level: LogLevel,
    /// The last one that this process understands.
    pub level: Level,
}

/// What the command line leads to.
pub enum Parsed {
    /// A node is to run.
    Run(Box<Config>),
    /// Something was to be printed, and was.
    Printed,
}

/// What to say about a command line that cannot be obeyed.
#[derive(Debug)]
pub struct Usage(pub String);

fn definition() -> Command {
    let value = |short: char, long: &'static str, name: &'static str, help: &'static str| {
        // The word after the option is its value, whatever it looks like: `-p -1` is a wrong port, not an option.
        let arg = Arg::new(long).short(short).long(long).value_name(name).help(help).action(ArgAction::Set);
        arg.allow_hyphen_values(true)
    };
    let flag = |short: char, long: &'static str, help: &'static str| {
        Arg::new(long).short(short).long(long).help(help).action(ArgAction::SetTrue)
    };
    Command::new("sheep")
        .about("The Sheepdog daemon: keeps replicated virtual disks together with its like on other machines")
        .override_usage("sheep [OPTION]... [PATH[,DISK]...]")
        .disable_version_flag(true)
        .disable_help_flag(true)
        .infer_long_args(true)
        .args_override_self(true)
        .arg(
            Arg::new("path")
                .value_name("PATH[,DISK]...")
                .num_args(0..)
                .help("store directory and, after commas, further directories that hold the objects [default: /tmp]"),
        )
        .arg(value('b', "bindaddr", "ADDRESS", "listen on this address only [default: all interfaces]"))
        .arg(value(
            'c',
            "cluster",
            "DRIVER",
            "how nodes find each other: raft (by themselves), local[:DIRECTORY] (nodes of one machine) [default: raft]",
        ))
        .arg(Arg::new("allow-clients").long("allow-clients").value_name("CIDR,...").action(ArgAction::Set).help(
            "serve clients of these networks too, without authentication; `all` for everybody [default: this machine]",
        ))
        .arg(Arg::new("cache").long("cache").value_name("dir=D,size=S[,mode=M]").action(ArgAction::Set).help(
            "keep what is read in a directory on a faster device than the disks; mode=writeback: writes too, by \
             putting the journal there (writethrough: reads only) [default: no cache; mode=writethrough]",
        ))
        .arg(flag('f', "foreground", "stay in the foreground"))
        .arg(flag('g', "gateway", "store nothing, only serve clients"))
        .arg(flag('h', "help", "show this text and exit"))
        .arg(value(
            'i',
            "ioaddr",
            "host=ADDRESS[,port=PORT]",
            "address and port for other nodes (TCP and UDP) [default: all interfaces, client port + 10]",
        ))
        .arg(Arg::new("join").long("join").value_name("HOST[:PORT],...|TOKEN").action(ArgAction::Set).help(
            "look for the other nodes at these hosts too (node port), or join with a token of `dog cluster token`",
        ))
        .arg(
            Arg::new("key")
                .long("key")
                .value_name("FILE")
                .action(ArgAction::Set)
                .help("copy of the cluster key (PATH/cluster/key of a member): joins without being asked for"),
        )
        .arg(value('j', "journal", "size=S[,dir=D]", "size and directory of the journal [default: size=128M]"))
        .arg(value(
            'l',
            "log",
            "dir=D,level=L,dst=T",
            "log directory, level (emerg alert crit err warning notice info debug), destination (default, stdout)",
        ))
        .arg(Arg::new("nbd").long("nbd").value_name("[ADDRESS:]PORT").action(ArgAction::Set).help(
            "serve NBD here too, without authentication; `none`: only on nbd.sock in the store directory \
                 [default: 127.0.0.1:10809 if that is free]",
        ))
        // For trying out an update: behaves as an earlier version to the others.
        .arg(Arg::new("level").long("level").value_name("LEVEL").action(ArgAction::Set).hide(true))
        .arg(
            Arg::new("nbd-tls").long("nbd-tls").value_name("DIRECTORY").action(ArgAction::Set).help(
                "NBD over TCP only with TLS and clients' certificates: ca-cert.pem, server-cert.pem, server-key.pem",
            ),
        )
        .arg(flag('n', "nosync", "do not flush the disk: power loss may cost data"))
        .arg(value('p', "port", "PORT", "client port [default: 7000]"))
        .arg(value('P', "pidfile", "FILE", "keep the process id in this file"))
        .arg(flag('v', "version", "show the version and exit"))
        .arg(
            Arg::new("witness")
                .long("witness")
                .action(ArgAction::SetTrue)
                .help("store nothing, serve no clients, only vote: the third machine of a cluster with two"),
        )
        .arg(value(
            'y',
            "myaddr",
            "ADDRESS",
            "the address that others are told [default: the first of this machine; 127.0.0.1 with -c local]",
        ))
        .arg(value(
            'z',
            "zone",
            "ZONE",
            "fault domain: no two copies of an object share one [default: from the address]",
        ))
        .after_help(
            "Examples:\n  sheep /data                                   a node, in the background\n  \
             sheep -f -l dst=stdout /data                  the same, in sight\n  \
             sheep --join TOKEN /data                      a node of a cluster that gave a token\n  \
             sheep -p 7001 -z 2 -c local:/tmp/try /data2   a second node of a try-out on one machine\n  \
             sheep -j size=8G --cache dir=/ssd/sheep,size=400G,mode=writeback /hdd1,/hdd2   slow disks behind a fast one",
        )
}

/// Reads a command line, program name first.
pub fn parse(arguments: &[String]) -> Result<Parsed, Usage> {
    let mut definition = definition();
    let matches = match definition.try_get_matches_from_mut(arguments) {
        Ok(matches) => matches,
        Err(error) => return Err(Usage(explain(&error))),
    };
    if matches.get_flag("help") {
        println!("{}", definition.render_long_help());
        return Ok(Parsed::Printed);
    }
    if matches.get_flag("version") {
        println!(
            "Sheepdog daemon version {}\n\nSupported features:\n\tCluster drivers: raft local\n\tMiscellaneous: none",
            env!("CARGO_PKG_VERSION")
        );
        return Ok(Parsed::Printed);
    }
    let text = |name: &str| matches.get_one::<String>(name).map(String::as_str);
    let paths = matches.get_many::<String>("path").into_iter().flatten().next().map_or(PATH_DEFAULT, String::as_str);
    let (meta, disks) = parse_paths(paths)?;
    let port = parse_port(text("port"))?;
    let node = parse_node_address(text("ioaddr"), port)?;
    let (seeds, token) = parse_join(text("join"))?;
    let witness = matches.get_flag("witness");
    let mut journal = parse_journal(text("journal"))?;
    let (cache, is_write_back) = parse_cache(text("cache"))?;
    if is_write_back && journal.dir.is_none() {
        journal.dir = cache.as_ref().map(|cache| cache.dir.clone());
    }
    let log = parse_log(text("log"))?;
    Ok(Parsed::Run(Box::new(Config {
        meta,
        disks,
        port,
        nbd: if witness { NbdListen::Nowhere } else { parse_nbd(text("nbd"))? },
        nbd_tls: text("nbd-tls").map(read_tls).transpose()?,
        bind: text("bindaddr").map(parse_bind).transpose()?,
        my_address: text("myaddr").map(parse_my_address).transpose()?,
        zone: text("zone").map(parse_zone).transpose()?,
        node_address: node.address,
        node_port: node.port,
        seeds,
        token,
        key_file: text("key").map(absolute).transpose()?,
        allowed: text("allow-clients").map_or(Ok(Allowed::default()), parse_allowed)?,
        cluster: parse_cluster(text("cluster").unwrap_or("raft"))?,
        gateway: matches.get_flag("gateway") || witness,
        sync: !matches.get_flag("nosync"),
        foreground: matches.get_flag("foreground") || log.destination == LogDestination::Stderr,
        pid_file: text("pidfile").map(absolute).transpose()?,
        journal_bytes: journal.bytes,
        journal_dir: journal.dir,
        cache,
        log_destination: log.destination,
        log_dir: log.dir,
        log_level: log.level,
        level: text("level").map_or(Ok(Level::OURS), parse_understood)?,
    })))
}

fn explain(error: &clap::Error) -> String {
    use clap::error::{ContextKind, ContextValue, ErrorKind};
    let argument = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(argument)) => argument.clone(),
        _ => String::new(),
    };
    let what = match (error.kind(), argument.strip_prefix("--")) {
        (ErrorKind::UnknownArgument, Some(long)) => format!("sheep: unrecognized option '--{long}'"),
        (ErrorKind::UnknownArgument, None) => {
            format!("sheep: invalid option -- '{}'", argument.trim_start_matches('-'))
        }
        (ErrorKind::InvalidValue, _) => format!("sheep: option requires an argument -- {argument}"),
        _ => error.to_string().lines().next().unwrap_or_default().to_string(),
    };
    format!("{what}\nTry 'sheep --help' for more information.")
}

/// Made absolute now: a daemon changes its working directory.
fn absolute(path: &str) -> Result<PathBuf, Usage> {
    std::path::absolute(path).map_err(|error| Usage(format!("{path}: {error}")))
}

fn parse_paths(list: &str) -> Result<(PathBuf, Vec<PathBuf>), Usage> {
    let mut paths = Vec::new();
    for part in list.split(',').filter(|part| !part.is_empty()) {
        let path = absolute(part)?;
        if !paths.contains(&path) {
            paths.push(path);
        }
    }
    if paths.is_empty() {
        return Err(Usage(format!("'{list}' names no directory; give the store directory")));
    }
    let disks = paths.split_off(1);
    Ok((paths.remove(0), disks))
}

fn parse_port(text: Option<&str>) -> Result<u16, Usage> {
    let Some(text) = text else { return Ok(PORT_DEFAULT) };
    let digits = text.trim_start().strip_prefix('+').unwrap_or(text.trim_start());
    match digits.parse::<u64>() {
        Ok(port) if (1..=65535).contains(&port) => Ok(port as u16),
        _ => Err(Usage(format!("Invalid port number '{text}'"))),
    }
}

fn parse_nbd(text: Option<&str>) -> Result<NbdListen, Usage> {
    let loopback = |port| SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), port);
    match text {
        None => Ok(NbdListen::IfFree(loopback(crate::front::nbd::PORT_DEFAULT))),
        Some("none") => Ok(NbdListen::Nowhere),
        Some(text) => {
            let at = text.parse().or_else(|_| text.parse().map(loopback));
            at.map(NbdListen::At).map_err(|_| Usage(format!("--nbd '{text}': give a port, ADDRESS:PORT, or none")))
        }
    }
}

/// The files of a directory in the layout of QEMU's `tls-creds-x509`.
fn read_tls(directory: &str) -> Result<TlsFiles, Usage> {
    let read = |name: &str| {
        let path = PathBuf::from(directory).join(name);
        std::fs::read(&path).map_err(|error| Usage(format!("--nbd-tls: {}: {error}", path.display())))
    };
    Ok(TlsFiles {
        authority: read("ca-cert.pem")?,
        certificate: read("server-cert.pem")?,
        key: read("server-key.pem")?,
    })
}

fn parse_bind(text: &str) -> Result<IpAddr, Usage> {
    text.parse().map_err(|_| Usage(format!("Bad address '{text}'")))
}

struct NodeAddress {
    address: Option<IpAddr>,
    port: u16,
}

fn parse_node_address(text: Option<&str>, client_port: u16) -> Result<NodeAddress, Usage> {
    let default = client_port.checked_add(NODE_PORT_OFFSET).unwrap_or(client_port - NODE_PORT_OFFSET);
    let mut node = NodeAddress { address: None, port: default };
    let Some(text) = text else { return Ok(node) };
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("host", host)) => {
                node.address = Some(host.parse().map_err(|_| Usage(format!("Bad addr: '{host}'")))?);
            }
            Some(("port", port)) => match port.parse() {
                Ok(port) if port > 0 => node.port = port,
                _ => return Err(Usage(format!("Bad port '{port}'"))),
            },
            _ => return Err(Usage(format!("invalid option {part}"))),
        }
    }
    if node.address.is_none() && !text.contains("port=") {
        return Err(Usage("Bad addr: '(null)'".to_string()));
    }
    Ok(node)
}

fn parse_join(text: Option<&str>) -> Result<(Vec<String>, Option<Token>), Usage> {
    let Some(text) = text else { return Ok((Vec::new(), None)) };
    if Token::looks_like(text) {
        let token = Token::parse(text)
            .ok_or_else(|| Usage("--join: the token is damaged; copy the whole of it".to_string()))?;
        return Ok((Vec::new(), Some(token)));
    }
    let seeds: Vec<String> = text.split(',').map(str::trim).filter(|seed| !seed.is_empty()).map(String::from).collect();
    if seeds.is_empty() {
        return Err(Usage(format!("--join '{text}': give HOST[:PORT],... or a token of `dog cluster token`")));
    }
    Ok((seeds, None))
}

fn parse_allowed(text: &str) -> Result<Allowed, Usage> {
    Allowed::parse(text).ok_or_else(|| {
        Usage(format!("--allow-clients '{text}': give networks such as 192.168.1.0/24,fd00::/8, or all"))
    })
}

fn parse_my_address(text: &str) -> Result<IpAddr, Usage> {
    let invalid = || Usage(format!("Invalid address: '{text}'"));
    if let Ok(address) = text.parse() {
        return Ok(address);
    }
    let mut found = (text, 0).to_socket_addrs().map_err(|_| invalid())?;
    found.next().map(|address| address.ip()).ok_or_else(invalid)
}

fn parse_zone(text: &str) -> Result<u32, Usage> {
    text.parse().map_err(|_| Usage(format!("Invalid zone id '{text}': must be an integer between 0 and {}", u32::MAX)))
}

fn parse_understood(text: &str) -> Result<Level, Usage> {
    let levels = Level::FIRST..=Level::OURS;
    text.parse().ok().map(Level).filter(|level| levels.contains(level)).ok_or_else(|| {
        Usage(format!("--level '{text}': this version knows levels {} to {}", Level::FIRST, Level::OURS))
    })
}

/// The last four bytes of the address, as the ancestor took them.
pub fn default_zone(address: IpAddr) -> u32 {
    let last = match address {
        IpAddr::V4(v4) => v4.octets(),
        IpAddr::V6(v6) => {
            let octets = v6.octets();
            [octets[12], octets[13], octets[14], octets[15]]
        }
    };
    u32::from_le_bytes(last)
}

fn parse_cluster(text: &str) -> Result<ClusterDriver, Usage> {
    match text.split_once(':') {
        None if text == "raft" => Ok(ClusterDriver::Raft),
        None if text == "local" => Ok(ClusterDriver::Local(default_local_directory())),
        Some(("local", "")) => Ok(ClusterDriver::Local(default_local_directory())),
        Some(("local", directory)) => Ok(ClusterDriver::Local(absolute(directory)?)),
        _ => Err(Usage(format!(
            "Invalid cluster driver '{text}'\n\nSupported features:\n\tCluster drivers: raft (the default) \
             and local (-c local[:DIRECTORY])"
        ))),
    }
}

/// One per user, so that nobody's try-out meets another's.
fn default_local_directory() -> PathBuf {
    std::env::temp_dir().join(format!("sheepdog-local-{}", rustix::process::getuid().as_raw()))
}

struct Journal {
    bytes: u64,
    dir: Option<PathBuf>,
}

fn parse_journal(text: Option<&str>) -> Result<Journal, Usage> {
    let mut journal = Journal { bytes: JOURNAL_BYTES_DEFAULT, dir: None };
    for part in text.into_iter().flat_map(|text| text.split(',')) {
        match part.split_once('=') {
            Some(("size", size)) => {
                journal.bytes = parse_size(size).map_err(|_| Usage(format!("invalid size {size}")))?;
                if journal.bytes < JOURNAL_MIB_MIN << 20 {
                    return Err(Usage(format!("invalid size {size}, must be at least {JOURNAL_MIB_MIN}(M)")));
                }
            }
            Some(("dir", dir)) => journal.dir = Some(absolute(dir)?),
            _ => return Err(Usage(format!("invalid option {part}"))),
        }
    }
    Ok(journal)
}

/// The cache, and whether writes are to go there as well.
fn parse_cache(text: Option<&str>) -> Result<(Option<CacheConfig>, bool), Usage> {
    let Some(text) = text else { return Ok((None, false)) };
    let (mut dir, mut bytes, mut is_write_back) = (None, None, false);
    for part in text.split(',') {
        match part.split_once('=') {
            Some(("dir", given)) => dir = Some(absolute(given)?),
            Some(("size", size)) => {
                let given = parse_size(size).map_err(|_| Usage(format!("--cache: invalid size {size}")))?;
                if given < CACHE_MIB_MIN << 20 {
                    return Err(Usage(format!("--cache: invalid size {size}, must be at least {CACHE_MIB_MIN}(M)")));
                }
                bytes = Some(given);
            }
            Some(("mode", "writethrough")) => is_write_back = false,
            Some(("mode", "writeback")) => is_write_back = true,
            Some(("mode", mode)) => {
                return Err(Usage(format!("--cache: invalid mode {mode} (writethrough or writeback)")));
            }
            _ => return Err(Usage(format!("--cache: invalid option {part}"))),
        }
    }
    match (dir, bytes) {
        (Some(dir), Some(size_bytes)) => Ok((Some(CacheConfig { dir, size_bytes }), is_write_back)),
        _ => Err(Usage(format!("--cache '{text}': give dir=DIRECTORY and size=SIZE"))),
    }
}

struct Log {
    destination: LogDestination,
    dir: Option<PathBuf>,
    level: LogLevel,
}

fn parse_log(text: Option<&str>) -> Result<Log, Usage> {
    let mut log = Log { destination: LogDestination::File, dir: None, level: LogLevel::INFO };
    for part in text.into_iter().flat_map(|text| text.split(',')) {
        match part.split_once('=') {
            Some(("dir", dir)) => {
                log.dir = Some(std::fs::canonicalize(dir).map_err(|error| Usage(format!("{dir}: {error}")))?);
            }
            Some(("level", level)) => log.level = parse_level(level)?,
            Some(("dst", "default")) => log.destination = LogDestination::File,
            Some(("dst", "stdout")) => log.destination = LogDestination::Stderr,
            Some(("dst", other)) => {
                return Err(Usage(format!("invalid type of log destination: {other} (default or stdout)")));
            }
            Some(("format", "server" | "default")) => {}
            Some(("format", other)) => return Err(Usage(format!("invalid log format: {other} (server)"))),
            _ => return Err(Usage(format!("invalid option {part}"))),
        }
    }
    Ok(log)
}

fn parse_level(text: &str) -> Result<LogLevel, Usage> {
    LogLevel::of_name(text)
        .ok_or_else(|| Usage(format!("Invalid log level '{text}'\nAvailable log levels: {}", LOG_LEVELS.join(" "))))
}

/// The addresses to listen on.
pub fn listen_addresses(config: &Config) -> Vec<IpAddr> {
    match config.bind {
        Some(address) => vec![address],
        None => vec![Ipv4Addr::UNSPECIFIED.into(), Ipv6Addr::UNSPECIFIED.into()],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Config, String> {
        let words: Vec<String> = ["sheep"].into_iter().chain(line.split_whitespace()).map(String::from).collect();
        match parse(&words) {
            Ok(Parsed::Run(config)) => Ok(*config),
            Ok(Parsed::Printed) => Err("printed".into()),
            Err(Usage(text)) => Err(text),
        }
    }

    #[test]
    fn what_scripts_write_is_understood() {
        let config = parsed("-fp7801 -z 2 /data,/d1,,/d2 --pid /run/x -nc local:/tmp/x").unwrap();
        assert_eq!((config.port, config.zone, config.foreground, config.sync), (7801, Some(2), true, false));
        assert_eq!(config.node_port, 7811);
        assert_eq!(config.meta, PathBuf::from("/data"));
        assert_eq!(config.disks, [PathBuf::from("/d1"), PathBuf::from("/d2")]);
        assert_eq!(config.cluster, ClusterDriver::Local("/tmp/x".into()));
        assert_eq!(parsed("/data").unwrap().cluster, ClusterDriver::Raft);
        let zone = |line: &str| parsed(line).unwrap().my_address.map(default_zone);
        assert_eq!(zone("-y 127.0.0.1 /data"), Some(16_777_343));
        assert_eq!(zone("-y 127.0.0.2 /data"), Some(33_554_559));
        assert_eq!(zone("-y ::1 /data"), Some(16_777_216));
        let config = parsed("-i host=10.1.0.1,port=9000 --join a,b:7011 --allow-clients 10.0.0.0/8 /data").unwrap();
        assert_eq!((config.node_address, config.node_port), (Some("10.1.0.1".parse().unwrap()), 9000));
        assert_eq!(config.seeds, ["a", "b:7011"]);
    }

    #[test]
    fn a_cache_that_takes_writes_has_the_journal_with_it() {
        let places = |line: &str| {
            let config = parsed(line).unwrap();
            (config.cache.map(|cache| (cache.dir, cache.size_bytes)), config.journal_dir)
        };
        let cache = Some((PathBuf::from("/c"), 1 << 30));
        assert_eq!(places("/d"), (None, None));
        assert_eq!(places("--cache dir=/c,size=1G /d"), (cache.clone(), None));
        assert_eq!(places("--cache size=1G,mode=writeback,dir=/c /d"), (cache.clone(), Some("/c".into())));
        assert_eq!(places("-j dir=/j --cache size=1G,mode=writeback,dir=/c /d"), (cache, Some("/j".into())));
    }

    #[test]
    fn bad_values_are_refused_in_the_known_words() {
        for (line, text) in [
            ("-p 0 /d", "Invalid port number '0'"),
            ("-p 42a /d", "Invalid port number '42a'"),
            ("-p 65536 /d", "Invalid port number '65536'"),
            ("-p -1 /d", "Invalid port number '-1'"),
            ("-b nonsense /d", "Bad address 'nonsense'"),
            ("-z x /d", "Invalid zone id 'x': must be an integer between 0 and 4294967295"),
            ("-l level=loud /d", "Invalid log level 'loud'"),
            ("-l dst=moon /d", "invalid type of log destination: moon"),
            ("-j size=1M /d", "invalid size 1M, must be at least 64(M)"),
            ("--cache dir=/c,size=1M /d", "--cache: invalid size 1M, must be at least 64(M)"),
            ("--cache dir=/c,size=1G,mode=fast /d", "--cache: invalid mode fast (writethrough or writeback)"),
            ("--cache dir=/c /d", "--cache 'dir=/c': give dir=DIRECTORY and size=SIZE"),
            ("--cache /c /d", "--cache: invalid option /c"),
            ("-c corosync /d", "Invalid cluster driver 'corosync'"),
            ("-q /d", "sheep: invalid option -- 'q'"),
            ("-i port=0,host=::1 /d", "Bad port '0'"),
            ("-i host=x /d", "Bad addr: 'x'"),
            ("--join sheep-token-00 /d", "--join: the token is damaged"),
            ("--allow-clients 10.0.0.0/33 /d", "--allow-clients '10.0.0.0/33'"),
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.starts_with(text), "{line}: {error}");
        }
    }
}
