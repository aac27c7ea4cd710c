//! A connection to the node port of a sheep on another machine: TLS, with the cluster key proved by both sides.
//!
//! Neither side has a name or certificate that the other would know. What counts is the key: its proofs are bound to this one
//! TLS session, so that nobody in between can pass them on.
//!
//! Always holds:
//! 1. Nothing is given out before the sheep has proved the key.
//! 2. Each step of connecting fails within [`CONNECT_DEADLINE`]; afterwards an answer is awaited for as long as it takes.

use std::fmt;
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, SignatureScheme, StreamOwned};
use sheep_core::admission::ClusterKey;
use sheep_core::node_handshake::{
    ALPN, EXPORTER_BYTES, HELLO_LABEL, Hello, MESH_VERSION, Malformed, Message, PREFIX_BYTES, Prefix, Proof, Proven,
    Rejection, Role,
};

use crate::exit::Failure;

/// A machine that is up answers or refuses at once; one that is down would keep the kernel trying for two minutes.
const CONNECT_DEADLINE: Duration = Duration::from_secs(10);
/// A key file holds one line of at most 89 bytes.
const KEY_FILE_BYTES_MAX: u64 = 1024;

/// A connection that the key has opened, for the requests of clients.
pub struct Secure {
    stream: StreamOwned<ClientConnection, TcpStream>,
}

impl Read for Secure {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        self.stream.read(buffer)
    }
}

impl Write for Secure {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.stream.write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.stream.flush()
    }
}

/// Why there is no connection.
#[derive(Debug)]
enum Trouble {
    Io(io::Error),
    /// Somebody said no, worded for this side.
    Rejected(Rejection),
    /// The other side does not show that it knows the key.
    Unproved,
}

impl From<io::Error> for Trouble {
    fn from(error: io::Error) -> Trouble {
        Trouble::Io(error)
    }
}

impl From<rustls::Error> for Trouble {
    fn from(error: rustls::Error) -> Trouble {
        Trouble::Io(invalid(error))
    }
}

impl From<Malformed> for Trouble {
    fn from(error: Malformed) -> Trouble {
        Trouble::Io(invalid(error))
    }
}

impl fmt::Display for Trouble {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Trouble::Io(error) => {
                // The system's text without Rust's "(os error N)", as scripts have it.
                let text = error.to_string();
                let text = text.split(" (os error").next().unwrap_or_default();
                write!(f, "{text}; name the node port of a running sheep (its client port + 10 unless set otherwise)")
            }
            // What a node would do about it is not for a client.
            Trouble::Rejected(Rejection::WrongKey) => {
                f.write_str("the key is not that of the cluster; copy the key file from a node of the cluster")
            }
            Trouble::Rejected(Rejection::OldKey { ours, theirs }) => write!(
                f,
                "the key was replaced (generation {ours} here, {theirs} there); copy the current key file from a node"
            ),
            Trouble::Rejected(Rejection::OtherVersion { ours, theirs }) => write!(
                f,
                "the sheep speaks another version ({ours} here, {theirs} there); use the dog of the same release"
            ),
            Trouble::Rejected(Rejection::NotAdmitted) => {
                f.write_str("the sheep does not know this key; it may not have been formatted, or it is behind: try another one")
            }
            Trouble::Rejected(rejection) => write!(f, "{rejection}"),
            Trouble::Unproved => f.write_str(
                "it does not prove the cluster key; check the address: somebody else may listen there, or stand in between",
            ),
        }
    }
}

fn invalid(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error)
}

/// Reads a key file. What it holds is never repeated in a message.
pub fn read_key(path: &Path) -> Result<ClusterKey, Failure> {
    let read = || {
        let mut text = String::new();
        std::fs::File::open(path)?.take(KEY_FILE_BYTES_MAX).read_to_string(&mut text)?;
        text.parse().map_err(invalid)
    };
    read().map_err(|error: io::Error| Failure::failed(format!("cannot use the key file {}: {error}", path.display())))
}

impl Secure {
    /// Connects to a node port and has the key proved on both sides.
    pub fn connect(address: SocketAddr, key: &ClusterKey) -> Result<Secure, Failure> {
        begin(address, key)
            .map_err(|trouble| Failure::system(format!("failed to connect to the sheep at {address}: {trouble}")))
    }
}

fn begin(address: SocketAddr, key: &ClusterKey) -> Result<Secure, Trouble> {
    let stream = TcpStream::connect_timeout(&address, CONNECT_DEADLINE)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(CONNECT_DEADLINE))?;
    stream.set_write_timeout(Some(CONNECT_DEADLINE))?;
    let session = ClientConnection::new(Arc::new(config()?), ServerName::try_from("sheep").map_err(invalid)?)?;
    let mut stream = StreamOwned::new(session, stream);
    while stream.conn.is_handshaking() {
        stream.conn.complete_io(&mut stream.sock)?;
    }
    if stream.conn.alpn_protocol() != Some(ALPN) {
        return Err(Malformed.into());
    }
    let exporter = stream.conn.export_keying_material([0; EXPORTER_BYTES], HELLO_LABEL, None)?;
    prove(&mut stream, key, &exporter)?;
    stream.sock.set_read_timeout(None)?;
    stream.sock.set_write_timeout(None)?;
    Ok(Secure { stream })
}

fn prove(stream: &mut (impl Read + Write), key: &ClusterKey, exporter: &[u8; EXPORTER_BYTES]) -> Result<(), Trouble> {
    // The nonce serves connections without TLS only.
    let hello = Hello::for_client([0, 0]).encode();
    let proof = Some(Proof::new(key, Role::Dialer, exporter, &hello));
    send(stream, &Message::Hello { hello, proof })?;
    let (hello, proof) = match receive(stream)? {
        Message::Welcome { hello, proof } => (hello, proof),
        Message::Rejected(rejection) => return Err(Trouble::Rejected(rejection)),
        Message::Hello { .. } | Message::Accepted => return Err(Malformed.into()),
    };
    Hello::decode(&hello)?;
    let rejection = match Proof::check(proof.as_ref(), Some(key), Role::Listener, exporter, &hello) {
        Proven::Current => return Ok(send(stream, &Message::Accepted)?),
        Proven::Nothing => return Err(Trouble::Unproved),
        Proven::Wrong => Rejection::WrongKey,
        // Its generation cannot be one that this side could have checked; the sheep has checked ours and said yes.
        Proven::Older(_) | Proven::Newer => return Err(Trouble::Unproved),
    };
    // It is told for its log; what counts is decided.
    let _ = send(stream, &Message::Rejected(rejection));
    Err(Trouble::Rejected(rejection))
}

fn send(stream: &mut impl Write, message: &Message) -> io::Result<()> {
    stream.write_all(&message.encode())?;
    stream.flush()
}

fn receive(stream: &mut impl Read) -> Result<Message, Trouble> {
    let mut prefix = [0; PREFIX_BYTES];
    stream.read_exact(&mut prefix)?;
    let prefix = Prefix::decode(&prefix)?;
    let mut body = vec![0; prefix.length];
    stream.read_exact(&mut body)?;
    if prefix.version != MESH_VERSION {
        return Err(Trouble::Rejected(Rejection::OtherVersion { ours: MESH_VERSION, theirs: prefix.version }));
    }
    Ok(Message::decode(&body)?)
}

fn config() -> Result<ClientConfig, rustls::Error> {
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = AnyCertificate { algorithms: provider.signature_verification_algorithms };
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier))
        .with_no_client_auth();
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

/// Takes every certificate whose private key signed the handshake; who is there is shown by the proof.
#[derive(Debug)]
struct AnyCertificate {
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for AnyCertificate {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.2 is not spoken with sheep".to_owned()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rustls::pki_types::PrivatePkcs8KeyDer;
    use rustls::{ServerConfig, ServerConnection};
    use std::net::TcpListener;
    use std::thread::JoinHandle;

    fn key(generation: u32, byte: u8) -> ClusterKey {
        ClusterKey { generation, secret: [byte; 32] }
    }

    fn accept(listener: &TcpListener) -> StreamOwned<ServerConnection, TcpStream> {
        let pair = rcgen::KeyPair::generate().unwrap();
        let certificate = rcgen::CertificateParams::new(vec!["sheep".to_owned()]).unwrap().self_signed(&pair).unwrap();
        let mut config = ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
            .with_protocol_versions(&[&rustls::version::TLS13])
            .unwrap()
            .with_no_client_auth()
            .with_single_cert(vec![certificate.der().clone()], PrivatePkcs8KeyDer::from(pair.serialize_der()).into())
            .unwrap();
        config.alpn_protocols = vec![ALPN.to_vec()];
        let (stream, _) = listener.accept().unwrap();
        let mut stream = StreamOwned::new(ServerConnection::new(Arc::new(config)).unwrap(), stream);
        while stream.conn.is_handshaking() {
            stream.conn.complete_io(&mut stream.sock).unwrap();
        }
        stream
    }

    /// A sheep with this key, or without any, that answers three bytes with themselves.
    fn sheep(known: Option<ClusterKey>) -> (SocketAddr, JoinHandle<()>) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let thread = std::thread::spawn(move || {
            let mut stream = accept(&listener);
            let exporter = stream.conn.export_keying_material([0; EXPORTER_BYTES], HELLO_LABEL, None).unwrap();
            let Message::Hello { hello, proof } = receive(&mut stream).unwrap() else { panic!() };
            let proven = Proof::check(proof.as_ref(), known.as_ref(), Role::Dialer, &exporter, &hello);
            if let Proven::Older(theirs) = proven {
                let rejection = Rejection::OldKey { ours: known.unwrap().generation, theirs };
                send(&mut stream, &Message::Rejected(rejection.for_the_other_side())).unwrap();
                return;
            }
            let proof = known.map(|key| Proof::new(&key, Role::Listener, &exporter, &hello));
            send(&mut stream, &Message::Welcome { hello, proof }).unwrap();
            let mut bytes = [0; 3];
            if let Ok(Message::Accepted) = receive(&mut stream) {
                stream.read_exact(&mut bytes).unwrap();
                stream.write_all(&bytes).unwrap();
                stream.flush().unwrap();
            }
        });
        (address, thread)
    }

    #[test]
    fn a_sheep_with_the_same_key_is_talked_to() {
        let (address, thread) = sheep(Some(key(1, 7)));
        let mut secure = Secure::connect(address, &key(1, 7)).map_err(|failure| failure.message).unwrap();
        secure.write_all(b"ask").unwrap();
        secure.flush().unwrap();
        let mut bytes = [0; 3];
        secure.read_exact(&mut bytes).unwrap();
        assert_eq!(&bytes, b"ask");
        thread.join().unwrap();
    }

    #[test]
    fn who_does_not_prove_the_key_gets_nothing() {
        for (known, expected) in [
            (None, "does not prove the cluster key"),
            (Some(key(1, 8)), "not that of the cluster"),
            (Some(key(0, 7)), "does not prove"),
            (Some(key(2, 7)), "was replaced (generation 1 here, 2 there)"),
        ] {
            let (address, thread) = sheep(known);
            let failure = Secure::connect(address, &key(1, 7)).err().expect("no connection");
            assert!(failure.message.contains(expected), "{failure}");
            thread.join().unwrap();
        }
    }

    /// Speaks TLS with both sides and passes the handshake's messages on.
    #[test]
    fn a_man_in_the_middle_cannot_pass_the_proofs_on() {
        let (target, thread) = sheep(Some(key(1, 7)));
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let middle = std::thread::spawn(move || {
            let mut near = accept(&listener);
            let session =
                ClientConnection::new(Arc::new(config().unwrap()), ServerName::try_from("sheep").unwrap()).unwrap();
            let mut far = StreamOwned::new(session, TcpStream::connect(target).unwrap());
            send(&mut far, &receive(&mut near).unwrap()).unwrap();
            send(&mut near, &receive(&mut far).unwrap()).unwrap();
            let _ = receive(&mut near);
        });
        let failure = Secure::connect(address, &key(1, 7)).err().expect("no connection");
        assert!(failure.message.contains("not that of the cluster"), "{failure}");
        middle.join().unwrap();
        thread.join().unwrap();
    }

    #[test]
    fn nobody_there_says_what_to_do() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        drop(listener);
        let failure = Secure::connect(address, &key(1, 7)).err().expect("nobody listens");
        assert!(failure.message.contains("Connection refused; name the node port"), "{failure}");
    }

    #[test]
    fn a_key_file_is_read_and_a_bad_one_not_repeated() {
        let path = std::env::temp_dir().join(format!("dog-key-{}", std::process::id()));
        std::fs::write(&path, format!("{}\n", key(4, 0x5a).to_text())).unwrap();
        assert!(read_key(&path).map_err(|failure| failure.message).unwrap() == key(4, 0x5a));
        std::fs::write(&path, &key(4, 0x5a).to_text()[..50]).unwrap();
        let failure = read_key(&path).expect_err("no key");
        assert!(failure.message.contains("no cluster key") && !failure.message.contains("5a5a"), "{failure}");
        std::fs::write(&path, [0xff; 5000]).unwrap();
        assert!(read_key(&path).is_err());
        std::fs::remove_file(&path).unwrap();
        assert!(read_key(&path).is_err());
    }
}
