//! A network of its own for a test: hosts as network namespaces, joined by bridges that stand in one more namespace.
//!
//! The switch is where cables are pulled and packets get lost: every cut and every loss is one rule set of its bridges,
//! replaced in one step, so that a partition begins for all hosts at the same moment. Hosts notice nothing of it but the
//! silence: ARP, IPv6 and multicast are cut with the rest. Nothing of this can reach the machine's own network.
//!
//! Always holds:
//! 1. Names carry the process id and a number: two runs never collide, and what a dead run left behind is removed at the
//!    next start.
//! 2. Everything goes when the [`Network`] is dropped. Processes inside must have ended by then: a namespace lives on as
//!    long as a process in it.
//!
//! Root is needed, and `ip`, `nft` and `nsenter`; see [`Network::why_not`].

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::command;

/// Where `ip netns` keeps its names.
const NAMES: &str = "/run/netns";
/// How all names begin; the process id follows.
const PREFIX: &str = "sheeptest-";
/// `ip`, `nft`: each is done in milliseconds.
const TOOL_DEADLINE: Duration = Duration::from_secs(20);
/// More would not fit the addresses.
const HOSTS_MAX: usize = 200;

static NEXT: AtomicU32 = AtomicU32::new(0);

/// One computer of the network.
struct Host {
    namespace: String,
}

/// Bridges, cables and hosts; see the top of this file.
pub struct Network {
    tag: String,
    subnet: u8,
    card_count: usize,
    hosts: Vec<Host>,
    /// From, to: what the switch does not let through.
    cuts: BTreeSet<(usize, usize)>,
    loss_percent: u32,
    drops_multicast: bool,
}

/// The numbers of a process and of one of its networks, in a name made by [`Network::new`].
fn owner_of(name: &str) -> Option<u32> {
    name.strip_prefix(PREFIX)?.split('-').next()?.parse().ok()
}

fn run(program: &str, arguments: &[&str], input: &str) -> Result<()> {
    let path = command::find_program(program).with_context(|| format!("{program} is not installed"))?;
    command::run_with_input(Command::new(path).args(arguments), input.as_bytes(), TOOL_DEADLINE)?.ok()?;
    Ok(())
}

/// Removes the namespaces of runs that are no more.
fn sweep() -> Result<()> {
    let Ok(names) = fs::read_dir(NAMES) else { return Ok(()) };
    for name in names {
        let name = name?.file_name().to_string_lossy().into_owned();
        if owner_of(&name).is_some_and(|pid| !Path::new("/proc").join(pid.to_string()).exists()) {
            // Another run may do the same at this moment.
            let _ = run("ip", &["netns", "delete", &name], "");
        }
    }
    Ok(())
}

impl Network {
    /// Why no network can be made here, if so.
    pub fn why_not() -> Option<String> {
        if !rustix::process::geteuid().is_root() {
            return Some("network namespaces need root".to_owned());
        }
        let missing = ["ip", "nft", "nsenter"].into_iter().find(|name| command::find_program(name).is_none())?;
        Some(format!("{missing} is not installed (packages iproute2, nftables, util-linux)"))
    }

    /// `host_count` hosts with one card each, on one bridge, all cables plugged in.
    pub fn new(host_count: usize) -> Result<Network> {
        Network::with_cards(host_count, 1)
    }

    /// Hosts with several cards: card 0 of all of them on one bridge, card 1 on another.
    pub fn with_cards(host_count: usize, card_count: usize) -> Result<Network> {
        sweep()?;
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let pid = std::process::id();
        let mut network = Network {
            tag: format!("{PREFIX}{pid}-{number}"),
            // Seen in logs and captures; nothing depends on its being unique.
            subnet: (pid.wrapping_mul(7).wrapping_add(number) % 254) as u8 + 1,
            card_count,
            hosts: Vec::new(),
            cuts: BTreeSet::new(),
            loss_percent: 0,
            drops_multicast: false,
        };
        let switch = network.switch();
        run("ip", &["netns", "add", &switch], "")?;
        let mut lines = String::new();
        for card in 0..card_count {
            // Snooping needs a querier to let multicast through; a switch of a small office has none.
            writeln!(lines, "link add name br{card} type bridge mcast_snooping 0 forward_delay 0")?;
            writeln!(lines, "link set br{card} up")?;
        }
        network.batch(&switch, &lines)?;
        for _ in 0..host_count {
            network.add_host()?;
        }
        Ok(network)
    }

    fn switch(&self) -> String {
        format!("{}-sw", self.tag)
    }

    fn batch(&self, namespace: &str, lines: &str) -> Result<()> {
        run("ip", &["-n", namespace, "-batch", "-"], lines).with_context(|| format!("{}: {lines}", self.tag))
    }

    /// One more host; gives its index, counted from 0.
    pub fn add_host(&mut self) -> Result<usize> {
        let index = self.hosts.len();
        ensure!(index < HOSTS_MAX, "no more addresses");
        let namespace = format!("{}-h{index}", self.tag);
        run("ip", &["netns", "add", &namespace], "")?;
        self.hosts.push(Host { namespace: namespace.clone() });
        let mut at_switch = String::new();
        for card in 0..self.card_count {
            let port = port(index, card);
            writeln!(at_switch, "link add name {port} type veth peer name eth{card} netns {namespace}")?;
            writeln!(at_switch, "link set {port} master br{card} up")?;
        }
        self.batch(&self.switch(), &at_switch)?;
        self.batch(&namespace, "link set lo up\n")?;
        for card in 0..self.card_count {
            self.interface_up(index, card)?;
        }
        Ok(index)
    }

    /// How many hosts there are.
    pub fn host_count(&self) -> usize {
        self.hosts.len()
    }

    /// The IPv4 address of a host's card.
    pub fn card_address(&self, host: usize, card: usize) -> Ipv4Addr {
        Ipv4Addr::new(10, 77 + card as u8, self.subnet, host as u8 + 1)
    }

    /// The IPv4 address of a host's first card.
    pub fn address(&self, host: usize) -> Ipv4Addr {
        self.card_address(host, 0)
    }

    /// The IPv6 address of a host's first card.
    pub fn address6(&self, host: usize) -> Ipv6Addr {
        self.card_address6(host, 0)
    }

    fn card_address6(&self, host: usize, card: usize) -> Ipv6Addr {
        Ipv6Addr::new(0xfd77, card as u16, self.subnet.into(), 0, 0, 0, 0, host as u16 + 1)
    }

    /// Which host has this address, port or not.
    pub fn host_at(&self, address: &str) -> Option<usize> {
        let ip = address.parse().ok().or_else(|| Some(address.parse::<std::net::SocketAddr>().ok()?.ip()))?;
        let cards = 0..self.card_count;
        (0..self.hosts.len()).find(|&host| {
            cards.clone().any(|card| ip == self.card_address(host, card) || ip == self.card_address6(host, card))
        })
    }

    /// The file that stands for a host's namespace.
    pub fn namespace(&self, host: usize) -> PathBuf {
        Path::new(NAMES).join(&self.hosts[host].namespace)
    }

    fn enter(namespace: &Path) -> Command {
        // Becomes the program, so that the process id and what was asked of the kernel for it stay.
        let mut command = Command::new(command::find_program("nsenter").unwrap_or_else(|| "nsenter".into()));
        command.arg(format!("--net={}", namespace.display())).arg("--");
        command
    }

    /// Arguments that follow name a program that runs on `host`.
    pub fn on_host(&self, host: usize) -> Command {
        Network::enter(&self.namespace(host))
    }

    /// Does `work` in a thread that stands on `host`: sockets that it opens are that host's, wherever they are used.
    pub fn inside<T: Send>(&self, host: usize, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(&self.namespace(host), work)
    }

    /// As [`Network::inside`], at the switch, past which everything goes.
    pub fn inside_switch<T: Send>(&self, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        inside(&Path::new(NAMES).join(self.switch()), work)
    }

    /// Pulls the cable of a host's card: the card keeps its addresses and has no carrier.
    pub fn unplug(&self, host: usize, card: usize) -> Result<()> {
        self.batch(&self.switch(), &format!("link set {} down\n", port(host, card)))
    }

    /// Puts the cable back.
    pub fn plug(&self, host: usize, card: usize) -> Result<()> {
        self.batch(&self.switch(), &format!("link set {} up\n", port(host, card)))
    }

    /// Sets a host's card down from within: routes and IPv6 addresses go, sending fails at once.
    pub fn interface_down(&self, host: usize, card: usize) -> Result<()> {
        self.batch(&self.hosts[host].namespace, &format!("link set eth{card} down\n"))
    }

    /// Sets it up again, with the addresses it had.
    pub fn interface_up(&self, host: usize, card: usize) -> Result<()> {
        let (v4, v6) = (self.card_address(host, card), self.card_address6(host, card));
        let mut lines = format!("link set eth{card} up\n");
        writeln!(lines, "address replace {v4}/24 dev eth{card}")?;
        // Without the second that the search for a duplicate would take.
        writeln!(lines, "address replace {v6}/48 dev eth{card} nodad")?;
        if card == 0 {
            // As on a machine with a default route: where multicast goes if nobody says.
            writeln!(lines, "route replace default dev eth{card}")?;
        }
        self.batch(&self.hosts[host].namespace, &lines)
    }

    /// Nothing that `from` sends reaches `to` any more; the other direction stays as it is.
    pub fn cut_one_way(&mut self, from: usize, to: usize) -> Result<()> {
        self.cuts.insert((from, to));
        self.apply()
    }

    /// Nothing passes between the hosts of `left` and those of `right`, from one moment on.
    pub fn part(&mut self, left: &[usize], right: &[usize]) -> Result<()> {
        for &one in left {
            for &other in right {
                self.cuts.extend([(one, other), (other, one)]);
            }
        }
        self.apply()
    }

    /// Nothing that the hosts of `left` send reaches those of `right`; the other direction stays as it is.
    pub fn part_one_way(&mut self, left: &[usize], right: &[usize]) -> Result<()> {
        for &one in left {
            self.cuts.extend(right.iter().map(|&other| (one, other)));
        }
        self.apply()
    }

    /// Nothing passes from the first to the second host of each of these pairs; what was cut besides passes again.
    pub fn set_cuts(&mut self, cuts: BTreeSet<(usize, usize)>) -> Result<()> {
        self.cuts = cuts;
        self.apply()
    }

    /// So many of a hundred packets are lost, at random, each by itself.
    pub fn lose(&mut self, percent: u32) -> Result<()> {
        self.loss_percent = percent;
        self.apply()
    }

    /// Whether the switch swallows multicast and broadcast but what ARP and IPv6 need, as a router would.
    pub fn drop_multicast(&mut self, is_dropped: bool) -> Result<()> {
        self.drops_multicast = is_dropped;
        self.apply()
    }

    /// Ends all cuts and losses. Cables that were pulled stay so.
    pub fn heal(&mut self) -> Result<()> {
        self.cuts.clear();
        self.loss_percent = 0;
        self.apply()
    }

    fn apply(&self) -> Result<()> {
        let nft = command::find_program("nft").context("nft is not installed")?;
        let mut command = Network::enter(&Path::new(NAMES).join(self.switch()));
        let rules = self.rules();
        command::run_with_input(command.arg(nft).args(["-f", "-"]), rules.as_bytes(), TOOL_DEADLINE)?
            .ok()
            .with_context(|| rules)?;
        Ok(())
    }

    /// The whole rule set: replaced in one transaction.
    fn rules(&self) -> String {
        let pairs = |is_one_way: bool| -> Vec<String> {
            let cuts = self.cuts.iter().filter(|(from, to)| self.cuts.contains(&(*to, *from)) != is_one_way);
            let on_card = |card| cuts.clone().map(move |&(from, to)| (port(from, card), port(to, card)));
            (0..self.card_count).flat_map(on_card).map(|(from, to)| format!("\"{from}\" . \"{to}\"")).collect()
        };
        let mut rules = vec!["type filter hook forward priority 0; policy accept;".to_owned()];
        let (both_ways, one_way) = (pairs(false), pairs(true));
        if !both_ways.is_empty() {
            rules.push(format!("iifname . oifname {{ {} }} drop", both_ways.join(", ")));
        }
        if !one_way.is_empty() {
            // Addresses are still looked up: without that neither direction would last for long.
            let passing = format!("iifname . oifname {{ {} }}", one_way.join(", "));
            rules.push(format!("{passing} ether type ip drop"));
            rules.push(format!("{passing} ether type ip6 meta l4proto != ipv6-icmp drop"));
        }
        if self.drops_multicast {
            rules.push("ip daddr 224.0.0.0/4 drop".to_owned());
            rules.push("udp dport 5353 drop".to_owned());
        }
        if self.loss_percent > 0 {
            rules.push(format!("numgen random mod 100 < {} drop", self.loss_percent));
        }
        let table = "table bridge test";
        format!("add {table}\ndelete {table}\n{table} {{\nchain passing {{\n{}\n}}\n}}\n", rules.join("\n"))
    }
}

/// The switch's end of the cable of a host's card.
fn port(host: usize, card: usize) -> String {
    format!("c{card}h{host}")
}

fn inside<T: Send>(namespace: &Path, work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    let namespace = File::open(namespace).with_context(|| namespace.display().to_string())?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // Concerns this thread alone, which ends with the work.
            move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Network))?;
            work()
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

impl Drop for Network {
    fn drop(&mut self) {
        let hosts = self.hosts.iter().map(|host| host.namespace.clone());
        for name in hosts.chain([self.switch()]) {
            if let Err(error) = run("ip", &["netns", "delete", &name], "") {
                eprintln!("{name} stays behind: {error:#}");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_their_process() {
        assert_eq!(owner_of("sheeptest-123-0-h4"), Some(123));
        assert_eq!(owner_of("sheeptest-x"), None);
        assert_eq!(owner_of("somebody-else"), None);
    }
}
