//! Connections. Real ones are TCP and unix sockets; simulated ones lose, delay and cut.
//!
//! A connection is a pair of byte streams in order. Nothing is known about what the other side received until it
//! answers; a connection that fails is dropped, never repaired.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
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

/// The net door.
pub trait Net: Send + Sync + 'static {
    /// Starts listening. Port 0 takes any free port; an existing dead unix socket is replaced.
    fn listen(&self, endpoint: &Endpoint) -> NetFuture<'_, Box<dyn Listener>>;
    /// Connects, without a deadline of its own.
    fn connect(&self, endpoint: &Endpoint) -> NetFuture<'_, Connection>;
}
