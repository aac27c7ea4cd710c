//! Neighbours over the machine's multicast DNS: service `_sheep._tcp.local.`, on every interface that is up, also on those
//! that come up later.
//!
//! One thread per [`RealNeighbours`] (the library's) owns the sockets. Several daemons of one machine share UDP port 5353.
//! Where multicast is blocked nothing is found; that is a warning in the log and no error.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::time::{Duration, Instant};

use mdns_sd::{DaemonEvent, Receiver, ResolvedService, ServiceDaemon, ServiceEvent, ServiceInfo};

use super::net::{Announcement, Neighbours, NetFuture, is_reachable_by_itself};

const SERVICE: &str = "_sheep._tcp.local.";
/// A label of a DNS name (RFC 1035).
const LABEL_BYTES_MAX: usize = 63;
/// Who is still there is said again this often: whoever could not be reached the first time gets another chance.
const AGAIN_AFTER: Duration = Duration::from_secs(30);
/// Anybody on the network can announce anything; what would be more than any site has is not remembered.
const INSTANCES_MAX: usize = 4096;
/// One line of complaint per minute: an interface without multicast would fill the log otherwise.
const COMPLAIN_EVERY: Duration = Duration::from_mins(1);

/// This node's announcement, and what others announced.
pub(super) struct RealNeighbours {
    daemon: ServiceDaemon,
    events: Receiver<ServiceEvent>,
    troubles: Receiver<DaemonEvent>,
    present: BTreeMap<String, BTreeSet<SocketAddr>>,
    again_at: tokio::time::Instant,
    complained: Option<Instant>,
}

fn failed(error: mdns_sd::Error) -> io::Error {
    io::Error::other(error)
}

impl RealNeighbours {
    /// Announces and begins to listen.
    pub fn start(announcement: &Announcement) -> io::Result<RealNeighbours> {
        let daemon = ServiceDaemon::new().map_err(failed)?;
        let label = label(&announcement.name);
        // A host name of its own for every instance: daemons of one machine that listen on different interfaces would
        // otherwise contradict each other about the machine's addresses.
        let host = format!("{label}.local.");
        let properties = announcement.properties.as_slice();
        let info = ServiceInfo::new(SERVICE, &label, &host, (), announcement.port, properties).map_err(failed)?;
        let started = (|| {
            let troubles = daemon.monitor()?;
            daemon.register(info.enable_addr_auto())?;
            Ok((daemon.browse(SERVICE)?, troubles))
        })();
        match started {
            Ok((events, troubles)) => Ok(RealNeighbours {
                daemon,
                events,
                troubles,
                present: BTreeMap::new(),
                again_at: tokio::time::Instant::now() + AGAIN_AFTER,
                complained: None,
            }),
            Err(error) => {
                let _ = daemon.shutdown();
                Err(failed(error))
            }
        }
    }

    fn resolved(&mut self, service: &ResolvedService) -> Vec<SocketAddr> {
        let addresses = usable(service.addresses.iter().map(mdns_sd::ScopedIp::to_ip_addr), service.port);
        if self.present.len() < INSTANCES_MAX || self.present.contains_key(&service.fullname) {
            self.present.insert(service.fullname.clone(), addresses.clone());
        }
        addresses.into_iter().collect()
    }

    fn complain(&mut self, event: &DaemonEvent) {
        let DaemonEvent::Error(error) = event else { return };
        if self.complained.is_none_or(|at| at.elapsed() >= COMPLAIN_EVERY) {
            self.complained = Some(Instant::now());
            tracing::warn!("multicast DNS: {error}; neighbours on this network may have to be named by --join");
        }
    }

    async fn wait(&mut self) -> io::Result<Vec<SocketAddr>> {
        let gone = || io::Error::other("multicast DNS has ended");
        loop {
            let addresses = tokio::select! {
                event = self.events.recv_async() => match event.map_err(|_| gone())? {
                    ServiceEvent::ServiceResolved(service) => self.resolved(&service),
                    ServiceEvent::ServiceRemoved(_, name) => {
                        self.present.remove(&name);
                        Vec::new()
                    }
                    ServiceEvent::SearchStopped(_) => return Err(gone()),
                    _ => Vec::new(),
                },
                trouble = self.troubles.recv_async() => {
                    self.complain(&trouble.map_err(|_| gone())?);
                    Vec::new()
                }
                () = tokio::time::sleep_until(self.again_at) => {
                    self.again_at = tokio::time::Instant::now() + AGAIN_AFTER;
                    let all: BTreeSet<SocketAddr> = self.present.values().flatten().copied().collect();
                    all.into_iter().collect()
                }
            };
            if !addresses.is_empty() {
                return Ok(addresses);
            }
        }
    }
}

impl Neighbours for RealNeighbours {
    fn next(&mut self) -> NetFuture<'_, Vec<SocketAddr>> {
        Box::pin(self.wait())
    }
}

impl Drop for RealNeighbours {
    fn drop(&mut self) {
        // Says good-bye to the network and ends the thread. Nobody waits for it: without the good-bye the others forget
        // this node when its records expire.
        let _ = self.daemon.shutdown();
    }
}

/// A name as a label of a DNS name.
fn label(name: &str) -> String {
    let allowed = |c: char| if c.is_ascii_alphanumeric() { c } else { '-' };
    let label: String = name.chars().take(LABEL_BYTES_MAX).map(allowed).collect();
    if label.is_empty() { "sheep".to_string() } else { label }
}

/// The addresses worth a try: loopback only where there is nothing else, which is between daemons of one machine that has
/// no network.
fn usable(addresses: impl Iterator<Item = IpAddr>, port: u16) -> BTreeSet<SocketAddr> {
    let all: BTreeSet<IpAddr> = addresses.filter(is_reachable_by_itself).filter(|ip| !ip.is_unspecified()).collect();
    let is_alone = all.iter().all(IpAddr::is_loopback);
    all.into_iter().filter(|ip| is_alone || !ip.is_loopback()).map(|ip| SocketAddr::new(ip, port)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_becomes_a_label() {
        assert_eq!(label("sheep 12.a/b"), "sheep-12-a-b");
        assert_eq!(label(&"ö".repeat(100)).len(), LABEL_BYTES_MAX);
        assert_eq!(label(""), "sheep");
    }

    #[test]
    fn loopback_counts_only_where_there_is_nothing_else() {
        let parse = |texts: &[&str]| {
            let addresses: Vec<IpAddr> = texts.iter().map(|text| text.parse().unwrap()).collect();
            usable(addresses.into_iter(), 7010).iter().map(ToString::to_string).collect::<Vec<_>>()
        };
        assert_eq!(
            parse(&["127.0.0.1", "192.0.2.7", "fe80::1", "2001:db8::1"]),
            ["192.0.2.7:7010", "[2001:db8::1]:7010"]
        );
        assert_eq!(parse(&["127.0.0.1", "fe80::1"]), ["127.0.0.1:7010"]);
        assert!(parse(&["fe80::1", "0.0.0.0"]).is_empty());
    }
}
