//! Connections, datagrams and neighbours. Real ones are TCP, unix and UDP sockets and multicast DNS; simulated ones lose,
//! delay and cut.
//!
//! A connection is a pair of byte streams in order. Nothing is known about what the other side received until it
//! answers; a connection that fails is dropped, never repaired. A datagram comes whole or not at all, perhaps twice,
//! perhaps late, from whoever says so.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;

use tokio::io::{AsyncRead, AsyncWrite};

/// Where to listen or connect.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub enum Endpoint {
    /// An IPv4 or IPv6 address and port.
    Tcp(SocketAddr),
    /// A unix socket's path.
    Unix(PathBuf),
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Endpoint::Tcp(address) => write!(f, "{address}"),
            Endpoint::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Both directions of one connection.
pub struct Connection {
    /// Bytes from the other side.
    pub reader: Box<dyn AsyncRead + Send + Unpin>,
    /// Bytes to the other side.
    pub writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// Who is there, for messages to people.
    pub peer: String,
}

/// A future of the net door.
pub type NetFuture<'a, T> = Pin<Box<dyn Future<Output = io::Result<T>> + Send + 'a>>;

/// An open listening socket.
pub trait Listener: Send + Sync {
    /// The next connection.
    fn accept(&self) -> NetFuture<'_, Connection>;
    /// Where it listens, with the port that was really taken.
    fn local(&self) -> Endpoint;
}

/// An open datagram socket.
pub trait Datagram: Send + Sync {
    /// Hands one datagram to the network. An error tells of this machine (no route, interface down), never of the other.
    fn send_to<'a>(&'a self, bytes: &'a [u8], to: SocketAddr) -> NetFuture<'a, ()>;
    /// The next datagram: its length in `buffer` and where it says it is from. What does not fit is cut off.
    fn recv_from<'a>(&'a self, buffer: &'a mut [u8]) -> NetFuture<'a, (usize, SocketAddr)>;
    /// Where it listens, with the port that was really taken.
    fn local(&self) -> SocketAddr;
}

/// What this node tells the local network about itself.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Announcement {
    /// The instance: unique in the network. Characters other than ASCII letters, digits and `-` are replaced by `-`, and
    /// everything after 63 characters is cut off.
    pub name: String,
    /// The port that neighbours may connect to, on every address of this machine.
    pub port: u16,
    /// Small texts for people who browse the network; keys and values together below 255 bytes each.
    pub properties: Vec<(String, String)>,
}

/// Other nodes of the local network, as they come. Dropping it takes the announcement back.
pub trait Neighbours: Send {
    /// Waits for news: addresses that were seen for the first time or again, this node's own among them. Never an empty
    /// list. After an error nothing more comes.
    fn next(&mut self) -> NetFuture<'_, Vec<SocketAddr>>;
}

/// Whether an address says where to go without an interface's name beside it.
pub(super) fn is_reachable_by_itself(address: &IpAddr) -> bool {
    match address {
        IpAddr::V4(_) => true,
        IpAddr::V6(address) => !address.is_unicast_link_local(),
    }
}

fn no_such_door<'a, T>(what: &'static str) -> NetFuture<'a, T> {
    Box::pin(async move { Err(io::Error::new(io::ErrorKind::Unsupported, what)) })
}

/// The net door. A world need not have all of it: what is missing says [`io::ErrorKind::Unsupported`].
pub trait Net: Send + Sync + 'static {
    /// Starts listening. Port 0 takes any free port; an existing dead unix socket is replaced.
    fn listen(&self, endpoint: &Endpoint) -> NetFuture<'_, Box<dyn Listener>>;
    /// Connects, without a deadline of its own.
    fn connect(&self, endpoint: &Endpoint) -> NetFuture<'_, Connection>;

    /// Opens a datagram socket. Port 0 takes any free port; an IPv6 socket leaves IPv4 alone.
    fn bind_datagram(&self, _address: SocketAddr) -> NetFuture<'_, Box<dyn Datagram>> {
        no_such_door("this world has no datagrams")
    }

    /// The addresses that other machines might reach this one by: of interfaces that are up, without loopback and without
    /// IPv6 addresses that need an interface's name beside them (link-local). IPv4 first.
    fn local_addresses(&self) -> io::Result<Vec<IpAddr>> {
        Ok(Vec::new())
    }

    /// The addresses of a name (or of an address in writing), without a deadline of its own.
    fn resolve(&self, _name: &str, _port: u16) -> NetFuture<'_, Vec<SocketAddr>> {
        no_such_door("this world has no names")
    }

    /// Announces this node to the local network and listens for others. A network that lets nothing through is no error.
    fn neighbours(&self, _announcement: &Announcement) -> io::Result<Box<dyn Neighbours>> {
        Err(io::Error::new(io::ErrorKind::Unsupported, "this world has no neighbours"))
    }
}
