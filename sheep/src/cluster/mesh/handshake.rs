//! From a fresh connection to a known peer: TLS (or the plain magic of an open cluster), hello, proof, judgement.
//!
//! Always holds:
//! 1. Nothing is given out before both sides have said that they take each other.
//! 2. Exactly the handshake's bytes are taken: what follows belongs to whoever gets the connection.
//! 3. The whole ends within [`MeshTiming::handshake`](super::MeshTiming), whatever the other side sends or does not send.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use sheep_core::admission::Fingerprint;
use sheep_core::member::NodeId;
use sheep_core::node_handshake::{
    CARD_BYTES_MAX, Channel, Hello, MESH_MINOR, MESH_VERSION, Malformed, Message, OPEN_MAGIC, PREFIX_BYTES, Prefix,
    Proof, Proven, Rejection, Role, open_gossip_secret,
};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWriteExt};

use super::tls::{Session, Tls};
use super::types::{ContactError, MeshTiming, Peer, Standing, Trust};
use crate::world::World;
use crate::world::net::{Connection, Endpoint};

/// The first byte of a TLS connection: a record of the handshake type.
const TLS_FIRST_BYTE: u8 = 0x16;
/// What stands for a certificate where there is no TLS.
const NO_CERTIFICATE: Fingerprint = Fingerprint([0; 32]);

/// This node, as handshakes need it.
pub(super) struct Myself {
    pub world: World,
    pub node: NodeId,
    pub boot: u64,
    pub addresses: Vec<SocketAddr>,
    pub timing: MeshTiming,
    pub tls: Tls,
    pub trust: Arc<dyn Trust>,
    /// Whether a connection that was taken turned out to be one's own: the dialing side hears only of the rejection.
    pub met_oneself: AtomicBool,
}

/// A connection whose handshake is done. `P` is who is there: an accepted connection may be a client's, which is nobody.
pub(super) struct Established<P> {
    pub connection: Connection,
    pub channel: Channel,
    pub peer: P,
    /// Whether the dialer keeps it as its control link.
    pub kept: bool,
    /// The generation of the key that was proved to us.
    pub proved: Option<u32>,
    pub is_plain: bool,
    pub gossip_secret: [u8; 32],
}

/// Why an accepted connection came to nothing.
#[derive(Debug, thiserror::Error)]
pub(super) enum Refusal {
    /// It broke, or what came makes no sense.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The other end is this very process: it tried an address that is its own.
    #[error("this node's own address")]
    Oneself,
    /// This node said no.
    #[error("node {node}: {rejection}")]
    ByUs { node: NodeId, rejection: Rejection },
    /// The other side said no.
    #[error("node {node} does not take this node: {rejection}")]
    ByThem { node: NodeId, rejection: Rejection },
}

impl From<Malformed> for Refusal {
    fn from(error: Malformed) -> Refusal {
        Refusal::Io(invalid(error))
    }
}

/// A connection before the hello.
struct Raw {
    connection: Connection,
    /// `None` where there is no TLS.
    session: Option<Session>,
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// `future`, or an error after `patience`.
pub(super) async fn within<T>(
    world: &World,
    patience: Duration,
    future: impl Future<Output = T>,
    what: &'static str,
) -> io::Result<T> {
    tokio::select! {
        value = future => Ok(value),
        () = world.clock.sleep(patience) => Err(io::Error::new(io::ErrorKind::TimedOut, what)),
    }
}

impl Myself {
    /// Connects to an address and introduces this node.
    pub async fn dial(
        &self,
        address: SocketAddr,
        channel: Channel,
        kept: bool,
    ) -> Result<Established<Arc<Peer>>, ContactError> {
        if self.trust.is_open() {
            match self.dial_once(address, channel, kept, true).await {
                // Hung up without a word: a node that does not know yet that this cluster is open speaks only TLS.
                Err(ContactError::Io(error)) if is_end(&error) => {}
                other => return other,
            }
        }
        self.dial_once(address, channel, kept, false).await
    }

    async fn dial_once(
        &self,
        address: SocketAddr,
        channel: Channel,
        kept: bool,
        is_plain: bool,
    ) -> Result<Established<Arc<Peer>>, ContactError> {
        let endpoint = Endpoint::Tcp(address);
        let connecting = self.world.net.connect(&endpoint);
        let mut connection = within(&self.world, self.timing.dial, connecting, "the machine does not answer").await??;
        let introduction = async {
            let raw = if is_plain {
                connection.writer.write_all(&OPEN_MAGIC).await?;
                Raw { connection, session: None }
            } else {
                let (connection, session) = self.tls.dial(connection).await?;
                Raw { connection, session: Some(session) }
            };
            self.introduce(raw, address, channel, kept).await
        };
        within(&self.world, self.timing.handshake, introduction, "the handshake took too long").await?
    }

    async fn introduce(
        &self,
        mut raw: Raw,
        address: SocketAddr,
        channel: Channel,
        kept: bool,
    ) -> Result<Established<Arc<Peer>>, ContactError> {
        let ours = self.hello(channel, kept).encode();
        let proof = self.proof(raw.session.as_ref(), Role::Dialer, &ours);
        send(&mut raw.connection, &Message::Hello { hello: ours.clone(), proof }).await?;
        let (theirs, proof) = match receive(&mut raw.connection.reader).await? {
            Received::Message(Message::Welcome { hello, proof }) => (hello, proof),
            Received::Message(Message::Rejected(rejection)) => return Err(ContactError::Rejected(rejection)),
            Received::Message(_) => return Err(invalid(Malformed).into()),
            Received::OtherVersion(theirs) => {
                return Err(ContactError::Rejected(Rejection::OtherVersion { ours: MESH_VERSION, theirs }));
            }
        };
        let hello = Hello::decode(&theirs).map_err(invalid)?;
        let fingerprint = match &raw.session {
            None => NO_CERTIFICATE,
            Some(session) => session.fingerprint.ok_or_else(|| invalid("a node without a certificate"))?,
        };
        if hello.channel != channel {
            return Err(invalid(Malformed).into());
        }
        let proven = self.check(raw.session.as_ref(), Role::Listener, proof.as_ref(), &theirs);
        let standing = match self.judge(&hello, &fingerprint, &proven, channel) {
            Ok(standing) => standing,
            Err(rejection) => {
                let message = Message::Rejected(rejection.for_the_other_side());
                // It is told for its log; what counts is decided.
                let _ = send_last(&mut raw.connection, &message).await;
                return Err(ContactError::Rejected(rejection));
            }
        };
        send(&mut raw.connection, &Message::Accepted).await?;
        let gossip_secret = gossip_secret(raw.session.as_ref(), &ours, &theirs);
        Ok(Established {
            channel,
            peer: Arc::new(peer(hello, fingerprint, standing, Some(address))),
            kept,
            proved: proven.current(),
            is_plain: raw.session.is_none(),
            gossip_secret,
            connection: raw.connection,
        })
    }

    /// Takes a connection that came in.
    pub async fn accept(&self, connection: Connection) -> Result<Established<Option<Arc<Peer>>>, Refusal> {
        let handshake = async {
            let raw = self.begin(connection).await?;
            self.welcome(raw).await
        };
        within(&self.world, self.timing.handshake, handshake, "the handshake took too long").await?
    }

    /// Finds out whether TLS or the plain magic comes.
    async fn begin(&self, mut connection: Connection) -> io::Result<Raw> {
        let mut first = [0; 1];
        connection.reader.read_exact(&mut first).await?;
        if first[0] == OPEN_MAGIC[0] {
            let mut rest = [0; OPEN_MAGIC.len() - 1];
            connection.reader.read_exact(&mut rest).await?;
            if rest != OPEN_MAGIC[1..] {
                return Err(invalid(Malformed));
            }
            if !self.trust.is_open() {
                return Err(invalid("it wants to talk without encryption, as in an open cluster; this node does not"));
            }
            return Ok(Raw { connection, session: None });
        }
        if first[0] != TLS_FIRST_BYTE {
            return Err(invalid(Malformed));
        }
        let reader = Box::new(io::Cursor::new(first).chain(connection.reader));
        let (connection, session) = self.tls.accept(Connection { reader, ..connection }).await?;
        Ok(Raw { connection, session: Some(session) })
    }

    async fn welcome(&self, mut raw: Raw) -> Result<Established<Option<Arc<Peer>>>, Refusal> {
        let (theirs, proof) = match receive(&mut raw.connection.reader).await? {
            Received::Message(Message::Hello { hello, proof }) => (hello, proof),
            Received::Message(_) => return Err(Malformed.into()),
            Received::OtherVersion(theirs) => {
                let rejection = Rejection::OtherVersion { ours: MESH_VERSION, theirs };
                return Err(refuse(raw, NodeId(0), rejection).await);
            }
        };
        let hello = Hello::decode(&theirs)?;
        let (node, channel, kept) = (hello.node, hello.channel, hello.kept);
        if (node, hello.boot) == (self.node, self.boot) {
            self.met_oneself.store(true, Ordering::Release);
            // As for any other of this identity.
            let _ = refuse(raw, node, Rejection::SameNode).await;
            return Err(Refusal::Oneself);
        }
        let proven = self.check(raw.session.as_ref(), Role::Dialer, proof.as_ref(), &theirs);
        let peer = match self.judge_dialer(hello, &raw, &proven)? {
            Ok(peer) => peer,
            Err(rejection) => return Err(refuse(raw, node, rejection).await),
        };
        let ours = self.hello(channel, kept).encode();
        let proof = self.proof(raw.session.as_ref(), Role::Listener, &ours);
        send(&mut raw.connection, &Message::Welcome { hello: ours.clone(), proof }).await?;
        match receive(&mut raw.connection.reader).await? {
            Received::Message(Message::Accepted) => {}
            Received::Message(Message::Rejected(rejection)) => return Err(Refusal::ByThem { node, rejection }),
            _ => return Err(Malformed.into()),
        }
        let gossip_secret = gossip_secret(raw.session.as_ref(), &theirs, &ours);
        Ok(Established {
            channel,
            peer,
            kept,
            proved: proven.current(),
            is_plain: raw.session.is_none(),
            gossip_secret,
            connection: raw.connection,
        })
    }

    /// Who dialed, `None` for a client that may come in.
    fn judge_dialer(
        &self,
        hello: Hello,
        raw: &Raw,
        proven: &Checked,
    ) -> io::Result<Result<Option<Arc<Peer>>, Rejection>> {
        if hello.channel == Channel::Client {
            let may = self.trust.is_open() || proven.what == Proven::Current;
            return Ok(if may { Ok(None) } else { Err(proven.rejection().unwrap_or(Rejection::NotAdmitted)) });
        }
        let fingerprint = match &raw.session {
            None => NO_CERTIFICATE,
            Some(session) => session.fingerprint.ok_or_else(|| invalid("a node without a certificate"))?,
        };
        let seen = raw.connection.peer.parse().ok();
        let standing = self.judge(&hello, &fingerprint, proven, hello.channel);
        Ok(standing.map(|standing| Some(Arc::new(peer(hello, fingerprint, standing, seen)))))
    }

    fn judge(
        &self,
        hello: &Hello,
        fingerprint: &Fingerprint,
        proven: &Checked,
        channel: Channel,
    ) -> Result<Standing, Rejection> {
        if hello.version != MESH_VERSION {
            return Err(Rejection::OtherVersion { ours: MESH_VERSION, theirs: hello.version });
        }
        if hello.node == self.node {
            return Err(Rejection::SameNode);
        }
        let verdict = self.trust.judge(hello.node, fingerprint, hello.cluster, proven.what == Proven::Current);
        match verdict {
            // A member that was away while the key was replaced is known by its certificate, and hears the new one from us.
            Ok(Standing::Member) if proven.what != Proven::Wrong => Ok(Standing::Member),
            Ok(_) | Err(Rejection::NotAdmitted) if proven.rejection().is_some() => {
                Err(proven.rejection().unwrap_or(Rejection::NotAdmitted))
            }
            Ok(Standing::Stranger) if channel != Channel::Control => Err(Rejection::NotAdmitted),
            other => other,
        }
    }

    fn hello(&self, channel: Channel, kept: bool) -> Hello {
        let mut card = self.trust.card();
        if card.len() > CARD_BYTES_MAX {
            tracing::error!("this node's card has {} bytes and is cut to {CARD_BYTES_MAX}", card.len());
            card.truncate(CARD_BYTES_MAX);
        }
        Hello {
            version: MESH_VERSION,
            minor: MESH_MINOR,
            node: self.node,
            boot: self.boot,
            cluster: self.trust.cluster(),
            channel,
            kept,
            nonce: [self.world.rng.next_u64(), self.world.rng.next_u64()],
            addresses: self.addresses.clone(),
            card,
        }
    }

    fn proof(&self, session: Option<&Session>, role: Role, hello: &[u8]) -> Option<Proof> {
        Some(Proof::new(&self.trust.key()?, role, &session?.hello_exporter, hello))
    }

    fn check(&self, session: Option<&Session>, role: Role, proof: Option<&Proof>, hello: &[u8]) -> Checked {
        let key = self.trust.key();
        let what = match session {
            Some(session) => Proof::check(proof, key.as_ref(), role, &session.hello_exporter, hello),
            None => Proven::Nothing,
        };
        Checked { what, generation: key.map_or(0, |key| key.generation) }
    }
}

/// What a proof showed, and the generation of the key that it was compared with.
struct Checked {
    what: Proven,
    generation: u32,
}

impl Checked {
    fn current(&self) -> Option<u32> {
        (self.what == Proven::Current).then_some(self.generation)
    }

    fn rejection(&self) -> Option<Rejection> {
        match self.what {
            Proven::Wrong => Some(Rejection::WrongKey),
            Proven::Older(theirs) => Some(Rejection::OldKey { ours: self.generation, theirs }),
            Proven::Nothing | Proven::Current | Proven::Newer => None,
        }
    }
}

async fn refuse(mut raw: Raw, node: NodeId, rejection: Rejection) -> Refusal {
    let message = Message::Rejected(rejection.for_the_other_side());
    // It is told so that it can say why; whether it listens changes nothing.
    let _ = send_last(&mut raw.connection, &message).await;
    Refusal::ByUs { node, rejection }
}

fn gossip_secret(session: Option<&Session>, dialer: &[u8], listener: &[u8]) -> [u8; 32] {
    session.map_or_else(|| open_gossip_secret(dialer, listener), |session| session.gossip_exporter)
}

fn peer(hello: Hello, fingerprint: Fingerprint, standing: Standing, seen: Option<SocketAddr>) -> Peer {
    let mut addresses = Vec::with_capacity(hello.addresses.len());
    for address in hello.addresses {
        let ip = if address.ip().is_unspecified() { seen.map(|seen| seen.ip()) } else { Some(address.ip()) };
        if let Some(ip) = ip {
            let address = SocketAddr::new(ip, address.port());
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    Peer {
        node: hello.node,
        boot: hello.boot,
        cluster: hello.cluster,
        fingerprint,
        standing,
        addresses,
        card: hello.card,
    }
}

/// Whether the other side ended the connection.
fn is_end(error: &io::Error) -> bool {
    use io::ErrorKind::{BrokenPipe, ConnectionAborted, ConnectionReset, UnexpectedEof};
    matches!(error.kind(), BrokenPipe | ConnectionAborted | ConnectionReset | UnexpectedEof)
}

async fn send(connection: &mut Connection, message: &Message) -> io::Result<()> {
    connection.writer.write_all(&message.encode()).await?;
    connection.writer.flush().await
}

async fn send_last(connection: &mut Connection, message: &Message) -> io::Result<()> {
    send(connection, message).await?;
    connection.writer.shutdown().await
}

enum Received {
    Message(Message),
    OtherVersion(u32),
}

/// Reads one message and not a byte more.
async fn receive(reader: &mut (dyn AsyncRead + Send + Unpin)) -> io::Result<Received> {
    let mut prefix = [0; PREFIX_BYTES];
    reader.read_exact(&mut prefix).await?;
    let prefix = Prefix::decode(&prefix).map_err(invalid)?;
    let mut body = vec![0; prefix.length];
    reader.read_exact(&mut body).await?;
    if prefix.version != MESH_VERSION {
        return Ok(Received::OtherVersion(prefix.version));
    }
    Message::decode(&body).map(Received::Message).map_err(invalid)
}
