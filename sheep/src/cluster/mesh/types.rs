//! What the mesh and its user say to each other.

use std::fmt;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheep_core::admission::{ClusterKey, Fingerprint};
use sheep_core::member::NodeId;
use sheep_core::node_handshake::Rejection;

/// What a node on the other end of a connection has shown.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Standing {
    /// Its certificate is the one that the ordered state has for it.
    Member,
    /// It proved the current cluster key.
    Keyholder,
    /// Nothing but that it has the private key of its certificate. It may ask, on a control connection.
    Stranger,
}

/// The node on the other end of a connection, as it was at its handshake.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Peer {
    /// Who it is.
    pub node: NodeId,
    /// A random number of this life of its process.
    pub boot: u64,
    /// The cluster it belongs to; `None` before format.
    pub cluster: Option<u64>,
    /// Of its certificate; all zeros on the plain connections of an open cluster.
    pub fingerprint: Fingerprint,
    /// What it has shown.
    pub standing: Standing,
    /// Where its node port is reached, preferred first; no unspecified IP addresses.
    pub addresses: Vec<SocketAddr>,
    /// How it describes itself.
    pub card: Vec<u8>,
}

/// What the mesh asks about who may come in. Every connection asks anew; the answers are needed at once.
pub trait Trust: Send + Sync + 'static {
    /// Our cluster's id; `None` before format.
    fn cluster(&self) -> Option<u64>;
    /// Whether the cluster is open: no TLS is wanted, and everybody is a member.
    fn is_open(&self) -> bool;
    /// The current cluster key, if this node knows one.
    fn key(&self) -> Option<ClusterKey>;
    /// What a node is to us. `proved`: it proved the current key. Called on both sides of every connection between nodes,
    /// and again by [`super::Mesh::reconsider`].
    fn judge(
        &self,
        node: NodeId,
        fingerprint: &Fingerprint,
        cluster: Option<u64>,
        proved: bool,
    ) -> Result<Standing, Rejection>;
    /// How this node describes itself to others; at most [`sheep_core::node_handshake::CARD_BYTES_MAX`] bytes.
    fn card(&self) -> Vec<u8>;
}

/// What answers the requests of other nodes.
pub trait Service: Send + Sync + 'static {
    /// Answers one request. The future is dropped when the connection breaks. The answer has at most
    /// [`super::BODY_BYTES_MAX`] bytes.
    fn handle(&self, from: Arc<Peer>, message: Bytes) -> Pin<Box<dyn Future<Output = Vec<u8>> + Send>>;
}

/// What happened.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Event {
    /// Our control link to a node that we [`know`](super::Mesh::know) is up.
    Up(Arc<Peer>),
    /// Our control link to a node broke.
    Down {
        /// Which node.
        node: NodeId,
        /// Every address of it refused a new connection: its process is gone. Said at most once between two `Up`, perhaps
        /// after a `Down` that could not say so yet.
        refused: bool,
    },
    /// A node of any standing connected to us for control, or was contacted. Lost if nobody takes events fast enough.
    Met(Arc<Peer>),
    /// One side did not want the other. Lost if nobody takes events fast enough.
    Rejected {
        /// Of the other side.
        address: SocketAddr,
        /// Worded for this side.
        rejection: Rejection,
    },
}

/// How long things may take.
#[derive(Clone, Debug)]
pub struct MeshTiming {
    /// From the first byte to the end of the handshake.
    pub handshake: Duration,
    /// For one address to take a connection.
    pub dial: Duration,
    /// Between the first attempt after a break and the next; doubles up to `retry_max`.
    pub retry_min: Duration,
    /// Between attempts in the long run.
    pub retry_max: Duration,
    /// Between attempts after the other side, or we, said no: somebody has to do something first.
    pub retry_rejected: Duration,
    /// Between pings of a control connection that carries nothing else.
    pub ping: Duration,
    /// Without any byte from the other side, a control connection is broken off.
    pub silence: Duration,
}

impl Default for MeshTiming {
    fn default() -> MeshTiming {
        MeshTiming {
            // A handshake takes 2 ms of computing and two round trips; the rest is for machines that are busy.
            handshake: Duration::from_secs(3),
            dial: Duration::from_secs(1),
            // Long enough not to load a machine that is starting, short enough not to add to a stall.
            retry_min: Duration::from_millis(20),
            retry_max: Duration::from_millis(500),
            retry_rejected: Duration::from_secs(5),
            ping: Duration::from_millis(640),
            // As long as the fence: by then this node has stopped serving anyway if it hears from nobody.
            silence: Duration::from_secs(2),
        }
    }
}

/// How the mesh of a node is set up.
#[derive(Clone, Debug)]
pub struct MeshConfig {
    /// Who this node is.
    pub node: NodeId,
    /// A random number of this life of the process.
    pub boot: u64,
    /// Where to listen. Port 0 takes any free port.
    pub listen: Vec<SocketAddr>,
    /// What to tell others as our addresses, preferred first; an unspecified IP means the one that they see us come from,
    /// port 0 the port that the first listener took. None at all: where it listens.
    pub addresses: Vec<SocketAddr>,
    /// How long things may take.
    pub timing: MeshTiming,
}

impl MeshConfig {
    /// The usual timing.
    pub fn new(node: NodeId, boot: u64, listen: Vec<SocketAddr>, addresses: Vec<SocketAddr>) -> MeshConfig {
        MeshConfig { node, boot, listen, addresses, timing: MeshTiming::default() }
    }
}

/// Which packets a gossip secret is for.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
pub enum Direction {
    /// Ours to the peer: we dialed the connection.
    Sending,
    /// The peer's to us: it dialed the connection.
    Receiving,
}

/// A secret shared with one peer, from a control link that came up. Only members and keyholders share any.
#[derive(Clone, PartialEq, Eq)]
pub struct GossipSecret {
    /// With whom.
    pub peer: NodeId,
    /// For which packets.
    pub direction: Direction,
    /// Different for every connection.
    pub secret: [u8; 32],
}

impl fmt::Debug for GossipSecret {
    /// The secret must not reach a log.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "GossipSecret({}, {:?})", self.peer, self.direction)
    }
}

/// Why an address was of no use.
#[derive(Debug, thiserror::Error)]
pub enum ContactError {
    /// Nobody there, or the connection broke. [`io::ErrorKind::ConnectionRefused`] means that no process listens.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// One side did not want the other.
    #[error("{0}")]
    Rejected(Rejection),
}

impl ContactError {
    /// Whether the machine said that nobody listens there.
    pub fn is_refused(&self) -> bool {
        matches!(self, ContactError::Io(error) if error.kind() == io::ErrorKind::ConnectionRefused)
    }
}

/// No answer: the link is down, broke, or was too slow. Nothing is known about what the other side did.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
#[error("the node did not answer")]
pub struct Unreachable;

/// What a probe found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Reach {
    /// The node answered.
    Alive {
        /// Of its process.
        boot: u64,
    },
    /// Every address refused the connection: no process listens.
    Refused,
    /// Anything else, which proves nothing.
    Silent,
}

/// Round trips of the last pings, in microseconds.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Rtt {
    /// The fastest.
    pub min_us: u32,
    /// The mean.
    pub mean_us: u32,
    /// All but one in a hundred were not slower (of 64 pings: the slowest).
    pub p99_us: u32,
}

/// The state of our control link to one node.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct LinkReport {
    /// To whom.
    pub node: NodeId,
    /// Whether it is up.
    pub up: bool,
    /// The monotonic time at which `up` became what it is.
    pub since: Duration,
    /// `None` until the first ping of this connection was answered.
    pub rtt: Option<Rtt>,
    /// Where it is connected to.
    pub address: Option<SocketAddr>,
}
