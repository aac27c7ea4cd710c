//! The first messages on a connection between nodes, or of a `dog` on another machine: how they are encoded, and how the
//! cluster key is proved without being shown.
//!
//! ```text
//! "SHEEPOPN"                    only in an open cluster, instead of TLS
//! dialer   -> listener          Hello: who I am, what the connection is for, proof
//! listener -> dialer            Welcome: the same of the listener; or Rejected: why not
//! dialer   -> listener          Accepted; or Rejected
//! ```
//!
//! Each message is a prefix of 16 bytes (`"SHEEPNOD"`, u32 version, u32 length, little-endian) and a postcard body. The
//! prefix never changes its form, so that a node of another version is told so instead of being misread.
//!
//! Always holds:
//! 1. Nothing longer than [`MESSAGE_BYTES_MAX`] is believed or allocated; what does not decode to its last byte is refused.
//! 2. A proof is bound to its TLS session by the exporter, to its side by the [`Role`], and to every byte of the hello:
//!    whoever stands between two nodes and speaks TLS with both cannot pass one on.
//!
//! This file reads no connection and knows no TLS: the exporter's bytes come in as an argument.

use alloc::vec::Vec;
use core::fmt;
use core::net::SocketAddr;

use serde::{Deserialize, Serialize};

use crate::admission::ClusterKey;
use crate::member::NodeId;

/// Version of everything that nodes say to each other on these connections; another one is refused with both named.
pub const MESH_VERSION: u32 = 1;
/// What was added since without breaking anybody.
pub const MESH_MINOR: u32 = 0;
/// How a connection of an open cluster begins, instead of TLS.
pub const OPEN_MAGIC: [u8; 8] = *b"SHEEPOPN";
/// The protocol's name within TLS (ALPN).
pub const ALPN: &[u8] = b"sheep/1";
/// Label of the TLS exporter that proofs are bound to.
pub const HELLO_LABEL: &[u8] = b"EXPORTER-sheep-hello";
/// Label of the TLS exporter that gossip packets are sealed with.
pub const GOSSIP_LABEL: &[u8] = b"EXPORTER-sheep-gossip";
/// Bytes taken from either exporter.
pub const EXPORTER_BYTES: usize = 32;
/// Bytes before every message.
pub const PREFIX_BYTES: usize = 16;
/// The largest body: a full card and all addresses take less than half of it.
pub const MESSAGE_BYTES_MAX: usize = 16 << 10;
/// The largest card of a node.
pub const CARD_BYTES_MAX: usize = 4096;
/// Addresses in a hello: more interfaces than a machine of a cluster has.
pub const ADDRESSES_MAX: usize = 16;

const PREFIX_MAGIC: [u8; 8] = *b"SHEEPNOD";

/// What a connection is for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Channel {
    /// Requests of the driver and their answers.
    Control,
    /// Objects.
    Data,
    /// A `dog` on another machine, which speaks the client protocol.
    Client,
}

/// What either side says of itself.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Hello {
    /// [`MESH_VERSION`] of the sender.
    pub version: u32,
    /// [`MESH_MINOR`] of the sender.
    pub minor: u32,
    /// Who it is; 0 for a client.
    pub node: NodeId,
    /// A random number of one life of its process.
    pub boot: u64,
    /// The cluster it belongs to; `None` before format.
    pub cluster: Option<u64>,
    /// What the connection is for; the listener echoes it.
    pub channel: Channel,
    /// Whether the dialer keeps the connection as its control link: only then do both sides take a gossip key from it.
    pub kept: bool,
    /// Random for each connection; makes the gossip keys of an open cluster, where there is no TLS to take them from.
    pub nonce: [u64; 2],
    /// Where the sender's node port is reached, preferred first. An unspecified IP address means the one that the
    /// receiver sees the connection come from.
    pub addresses: Vec<SocketAddr>,
    /// How the node describes itself; opaque here.
    pub card: Vec<u8>,
}

impl Hello {
    /// What a client says: it has no identity, only the key.
    pub fn for_client(nonce: [u64; 2]) -> Hello {
        Hello {
            version: MESH_VERSION,
            minor: MESH_MINOR,
            node: NodeId(0),
            boot: 0,
            cluster: None,
            channel: Channel::Client,
            kept: false,
            nonce,
            addresses: Vec::new(),
            card: Vec::new(),
        }
    }

    /// The bytes that travel and that the proof is made of.
    pub fn encode(&self) -> Vec<u8> {
        encode(self)
    }

    /// Reads a hello, with its limits checked.
    pub fn decode(bytes: &[u8]) -> Result<Hello, Malformed> {
        let hello: Hello = decode(bytes)?;
        if hello.addresses.len() > ADDRESSES_MAX || hello.card.len() > CARD_BYTES_MAX {
            return Err(Malformed);
        }
        Ok(hello)
    }
}

/// Which end of the connection a proof comes from: one end's proof is worth nothing at the other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Role {
    /// The end that connected.
    Dialer,
    /// The end that was connected to.
    Listener,
}

/// That the sender knows a cluster key.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Proof {
    /// The key's generation, so that a replaced key can be told from a wrong one.
    pub generation: u32,
    /// See [`Proof::new`].
    pub hash: [u8; 32],
}

/// What a proof, or its absence, shows.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Proven {
    /// Nothing was proved, or there is no key here to compare with.
    Nothing,
    /// The key that is current here.
    Current,
    /// A key that was replaced since; the generation is theirs.
    Older(u32),
    /// A later key than the one known here: this node is behind.
    Newer,
    /// Not the key of this generation.
    Wrong,
}

impl Proof {
    /// Proves `key` for one hello of one TLS session.
    pub fn new(key: &ClusterKey, role: Role, exporter: &[u8; EXPORTER_BYTES], hello: &[u8]) -> Proof {
        Proof { generation: key.generation, hash: *keyed(key, role, exporter, hello).as_bytes() }
    }

    /// What `proof` shows to somebody who knows `key`. The comparison takes the same time wherever the bytes differ.
    pub fn check(
        proof: Option<&Proof>,
        key: Option<&ClusterKey>,
        role: Role,
        exporter: &[u8; EXPORTER_BYTES],
        hello: &[u8],
    ) -> Proven {
        let (Some(proof), Some(key)) = (proof, key) else { return Proven::Nothing };
        if proof.generation < key.generation {
            return Proven::Older(proof.generation);
        }
        if proof.generation > key.generation {
            return Proven::Newer;
        }
        // blake3::Hash compares in constant time.
        if keyed(key, role, exporter, hello) == blake3::Hash::from_bytes(proof.hash) {
            Proven::Current
        } else {
            Proven::Wrong
        }
    }
}

fn keyed(key: &ClusterKey, role: Role, exporter: &[u8; EXPORTER_BYTES], hello: &[u8]) -> blake3::Hash {
    // Role and exporter have fixed lengths, so the parts cannot be moved into each other.
    let role: &[u8; 8] = match role {
        Role::Dialer => b"dialer__",
        Role::Listener => b"listener",
    };
    let mut hasher = blake3::Hasher::new_keyed(&key.secret);
    hasher.update(role).update(exporter).update(hello);
    hasher.finalize()
}

/// The gossip key of a plain connection. It keeps nothing secret; it lets packets of an open cluster look like all others.
pub fn open_gossip_secret(dialer_hello: &[u8], listener_hello: &[u8]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new_derive_key("sheep 2026 gossip of an open cluster");
    hasher.update(&(dialer_hello.len() as u64).to_le_bytes()).update(dialer_hello).update(listener_hello);
    *hasher.finalize().as_bytes()
}

/// Why one node does not talk to another. `ours` is what the node that shows the text has.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Rejection {
    /// They belong to different clusters.
    OtherCluster {
        /// The cluster of this node.
        ours: u64,
        /// The cluster of the other node.
        theirs: u64,
    },
    /// The identity was banned.
    Banned,
    /// The key that was proved is not the cluster's.
    WrongKey,
    /// The key that was proved was replaced, and nothing else lets the node in.
    OldKey {
        /// Generation of the key that this node has.
        ours: u32,
        /// Generation of the key that the other node has.
        theirs: u32,
    },
    /// The node id is known with another certificate.
    Replaced,
    /// The node id is the listener's own.
    SameNode,
    /// They do not speak the same version.
    OtherVersion {
        /// Version of this node.
        ours: u32,
        /// Version of the other node.
        theirs: u32,
    },
    /// Not let in, and nothing was proved.
    NotAdmitted,
}

impl Rejection {
    /// The same as the other side has to word it.
    #[must_use]
    pub fn for_the_other_side(self) -> Rejection {
        match self {
            Rejection::OtherCluster { ours, theirs } => Rejection::OtherCluster { ours: theirs, theirs: ours },
            Rejection::OldKey { ours, theirs } => Rejection::OldKey { ours: theirs, theirs: ours },
            Rejection::OtherVersion { ours, theirs } => Rejection::OtherVersion { ours: theirs, theirs: ours },
            same => same,
        }
    }
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Rejection::OtherCluster { ours, theirs } => write!(
                f,
                "the nodes belong to different clusters ({ours:016x} here, {theirs:016x} there); \
                 to move a node, empty its directory and let it join anew"
            ),
            Rejection::Banned => f.write_str(
                "the identity was banned from the cluster; \
                 if the machine may come back, empty its directory and admit it as a new node",
            ),
            Rejection::WrongKey => f.write_str("the cluster keys differ; copy the key file from a node of the cluster"),
            Rejection::OldKey { ours, theirs } => write!(
                f,
                "the cluster key was replaced (generation {ours} here, {theirs} there); \
                 copy the current key file, or start the node without one and admit it"
            ),
            Rejection::Replaced => f.write_str(
                "the node id is known with another certificate; \
                 a copied directory cannot run twice: empty it, or bring its own identity file back",
            ),
            Rejection::SameNode => f.write_str(
                "both ends have the same node id; either a node was given its own address, or its directory was copied: \
                 empty the copy",
            ),
            Rejection::OtherVersion { ours, theirs } => {
                write!(f, "the nodes speak different versions ({ours} here, {theirs} there); run the same release on both")
            }
            Rejection::NotAdmitted => f.write_str(
                "the node is not let in; admit it with 'dog node admit', or start it with a token or the key file",
            ),
        }
    }
}

impl core::error::Error for Rejection {}

/// One message.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Message {
    /// The dialer's first. The hello is carried in its encoded form, which the proof is made of.
    Hello {
        /// [`Hello::encode`].
        hello: Vec<u8>,
        /// Of the dialer's key, if it knows one.
        proof: Option<Proof>,
    },
    /// The listener's answer.
    Welcome {
        /// [`Hello::encode`].
        hello: Vec<u8>,
        /// Of the listener's key, if it knows one.
        proof: Option<Proof>,
    },
    /// The end, from either side, worded for the receiver.
    Rejected(Rejection),
    /// The dialer takes the listener for what it says: what follows belongs to the channel.
    Accepted,
}

impl Message {
    /// Prefix and body.
    pub fn encode(&self) -> Vec<u8> {
        let body = encode(self);
        let mut bytes = Vec::with_capacity(PREFIX_BYTES + body.len());
        bytes.extend_from_slice(&PREFIX_MAGIC);
        bytes.extend_from_slice(&MESH_VERSION.to_le_bytes());
        bytes.extend_from_slice(&(body.len() as u32).to_le_bytes());
        bytes.extend_from_slice(&body);
        bytes
    }

    /// Reads a body.
    pub fn decode(body: &[u8]) -> Result<Message, Malformed> {
        decode(body)
    }
}

/// What comes before a body.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Prefix {
    /// [`MESH_VERSION`] of the sender.
    pub version: u32,
    /// Bytes of the body, at most [`MESSAGE_BYTES_MAX`].
    pub length: usize,
}

impl Prefix {
    /// Reads a prefix.
    pub fn decode(bytes: &[u8; PREFIX_BYTES]) -> Result<Prefix, Malformed> {
        let number = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let length = number(12) as usize;
        if bytes[..8] != PREFIX_MAGIC || length > MESSAGE_BYTES_MAX {
            return Err(Malformed);
        }
        Ok(Prefix { version: number(8), length })
    }
}

/// The bytes are no message of this protocol.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed;

impl fmt::Display for Malformed {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("what was received is no message between sheep")
    }
}

impl core::error::Error for Malformed {}

fn encode<T: Serialize>(value: &T) -> Vec<u8> {
    postcard::to_allocvec(value).expect("plain data encodes")
}

fn decode<'a, T: Deserialize<'a>>(bytes: &'a [u8]) -> Result<T, Malformed> {
    match postcard::take_from_bytes(bytes) {
        Ok((value, [])) if bytes.len() <= MESSAGE_BYTES_MAX => Ok(value),
        _ => Err(Malformed),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use alloc::string::ToString;
    use alloc::vec;
    use proptest::prelude::*;

    fn hello() -> Hello {
        let mut hello = Hello::for_client([1, 2]);
        hello.node = NodeId(7);
        hello.cluster = Some(9);
        hello.addresses = vec!["10.0.0.1:7010".parse().unwrap(), "[::]:7010".parse().unwrap()];
        hello.card = vec![1, 2, 3];
        hello
    }

    fn key(generation: u32, byte: u8) -> ClusterKey {
        ClusterKey { generation, secret: [byte; 32] }
    }

    #[test]
    fn a_message_comes_back_as_it_was() {
        let bytes = hello().encode();
        let proof = Proof::new(&key(1, 1), Role::Dialer, &[5; 32], &bytes);
        for message in [
            Message::Hello { hello: bytes.clone(), proof: None },
            Message::Welcome { hello: bytes, proof: Some(proof) },
            Message::Rejected(Rejection::OtherCluster { ours: 1, theirs: u64::MAX }),
            Message::Accepted,
        ] {
            let bytes = message.encode();
            let (prefix, body) = bytes.split_first_chunk().unwrap();
            assert_eq!(Prefix::decode(prefix), Ok(Prefix { version: MESH_VERSION, length: body.len() }));
            assert_eq!(Message::decode(body), Ok(message));
        }
        assert_eq!(Hello::decode(&hello().encode()), Ok(hello()));
    }

    #[test]
    fn the_largest_hello_fits_and_a_larger_one_is_refused() {
        let mut hello = hello();
        hello.card = vec![0xff; CARD_BYTES_MAX];
        hello.addresses = vec!["[ffff:ffff::1]:65535".parse().unwrap(); ADDRESSES_MAX];
        let bytes = hello.encode();
        assert_eq!(Hello::decode(&bytes), Ok(hello.clone()));
        let message = Message::Hello { hello: bytes, proof: Some(Proof { generation: u32::MAX, hash: [0xff; 32] }) };
        assert!(message.encode().len() <= MESSAGE_BYTES_MAX + PREFIX_BYTES);
        let mut longer = hello.clone();
        longer.card.push(0);
        assert_eq!(Hello::decode(&longer.encode()), Err(Malformed));
        hello.addresses.push("10.0.0.1:1".parse().unwrap());
        assert_eq!(Hello::decode(&hello.encode()), Err(Malformed));
    }

    #[test]
    fn a_proof_holds_for_its_key_its_session_its_side_and_its_hello_only() {
        let (key, exporter, hello) = (key(3, 1), [5; 32], hello().encode());
        let proof = Proof::new(&key, Role::Dialer, &exporter, &hello);
        let check = |proof: Option<&Proof>, key: Option<&ClusterKey>, role, exporter: &[u8; 32], hello: &[u8]| {
            Proof::check(proof, key, role, exporter, hello)
        };
        assert_eq!(check(Some(&proof), Some(&key), Role::Dialer, &exporter, &hello), Proven::Current);
        assert_eq!(check(Some(&proof), Some(&key), Role::Listener, &exporter, &hello), Proven::Wrong);
        assert_eq!(check(Some(&proof), Some(&key), Role::Dialer, &[6; 32], &hello), Proven::Wrong);
        assert_eq!(check(Some(&proof), Some(&key), Role::Dialer, &exporter, &hello[1..]), Proven::Wrong);
        let other = ClusterKey { generation: 3, secret: [2; 32] };
        assert_eq!(check(Some(&proof), Some(&other), Role::Dialer, &exporter, &hello), Proven::Wrong);
        let later = ClusterKey { generation: 4, secret: [2; 32] };
        assert_eq!(check(Some(&proof), Some(&later), Role::Dialer, &exporter, &hello), Proven::Older(3));
        let earlier = ClusterKey { generation: 2, secret: [2; 32] };
        assert_eq!(check(Some(&proof), Some(&earlier), Role::Dialer, &exporter, &hello), Proven::Newer);
        assert_eq!(check(None, Some(&key), Role::Dialer, &exporter, &hello), Proven::Nothing);
        assert_eq!(check(Some(&proof), None, Role::Dialer, &exporter, &hello), Proven::Nothing);
    }

    #[test]
    fn the_other_side_reads_the_numbers_the_other_way_round() {
        let rejection = Rejection::OtherCluster { ours: 1, theirs: 2 };
        assert_eq!(rejection.for_the_other_side(), Rejection::OtherCluster { ours: 2, theirs: 1 });
        assert!(rejection.to_string().contains("0000000000000001 here"));
        assert_eq!(Rejection::Banned.for_the_other_side(), Rejection::Banned);
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_decoded(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
            let _ = Message::decode(&bytes);
            let _ = Hello::decode(&bytes);
            if let Some((prefix, _)) = bytes.split_first_chunk() {
                let _ = Prefix::decode(prefix);
            }
        }
    }
}
