//! TLS between nodes: version 1.3 only, and a self-signed certificate on both sides.
//!
//! Any certificate is taken; that its private key is there is verified by the signature of the handshake. Who the certificate
//! belongs to is decided afterwards, by its fingerprint. Only a client may come without a certificate.

use std::io;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::{CryptoProvider, WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, CommonState, ConnectionCommon, DigitallySignedStruct, DistinguishedName, ServerConfig,
    SignatureScheme,
};
use sheep_core::admission::Fingerprint;
use sheep_core::node_handshake::{ALPN, EXPORTER_BYTES, GOSSIP_LABEL, HELLO_LABEL};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::identity::{Identity, fingerprint};
use crate::world::net::Connection;

/// Both sides' configuration.
pub(super) struct Tls {
    connector: TlsConnector,
    acceptor: TlsAcceptor,
    name: ServerName<'static>,
}

/// What a TLS session gives besides bytes.
pub(super) struct Session {
    /// Of the other side's certificate; `None` if it showed none.
    pub fingerprint: Option<Fingerprint>,
    /// What proofs are bound to.
    pub hello_exporter: [u8; EXPORTER_BYTES],
    /// What gossip packets are sealed with.
    pub gossip_exporter: [u8; EXPORTER_BYTES],
}

impl Tls {
    /// With this node's certificate.
    pub fn new(identity: &Identity) -> io::Result<Tls> {
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = Arc::new(AnyCertificate { algorithms: provider.signature_verification_algorithms });
        let name = ServerName::try_from("sheep").expect("a valid name");
        Ok(Tls {
            connector: TlsConnector::from(Arc::new(
                client_config(identity, &provider, &verifier).map_err(io::Error::other)?,
            )),
            acceptor: TlsAcceptor::from(Arc::new(
                server_config(identity, &provider, &verifier).map_err(io::Error::other)?,
            )),
            name,
        })
    }

    /// A client without a certificate, as a `dog` is one.
    #[cfg(test)]
    pub fn anonymous() -> Tls {
        let mut tls =
            Tls::new(&Identity::generate(&crate::world::rng::OsRng).expect("a fresh identity")).expect("a usable one");
        let provider = Arc::new(aws_lc_rs::default_provider());
        let verifier = Arc::new(AnyCertificate { algorithms: provider.signature_verification_algorithms });
        let mut config = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .expect("TLS 1.3 is there")
            .dangerous()
            .with_custom_certificate_verifier(verifier)
            .with_no_client_auth();
        config.alpn_protocols = vec![ALPN.to_vec()];
        tls.connector = TlsConnector::from(Arc::new(config));
        tls
    }

    /// The dialer's side.
    pub async fn dial(&self, connection: Connection) -> io::Result<(Connection, Session)> {
        let joined = tokio::io::join(connection.reader, connection.writer);
        let stream = self.connector.connect(self.name.clone(), joined).await?;
        let session = session(stream.get_ref().1)?;
        Ok((split(stream, connection.peer), session))
    }

    /// The listener's side.
    pub async fn accept(&self, connection: Connection) -> io::Result<(Connection, Session)> {
        let joined = tokio::io::join(connection.reader, connection.writer);
        let stream = self.acceptor.accept(joined).await?;
        let session = session(stream.get_ref().1)?;
        Ok((split(stream, connection.peer), session))
    }
}

fn client_config(
    identity: &Identity,
    provider: &Arc<CryptoProvider>,
    verifier: &Arc<AnyCertificate>,
) -> Result<ClientConfig, rustls::Error> {
    let mut config = ClientConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .dangerous()
        .with_custom_certificate_verifier(verifier.clone())
        .with_client_auth_cert(vec![identity.certificate()], identity.key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.enable_sni = false;
    // Connections are kept, and a resumed session would save a millisecond for the price of state.
    config.resumption = rustls::client::Resumption::disabled();
    Ok(config)
}

fn server_config(
    identity: &Identity,
    provider: &Arc<CryptoProvider>,
    verifier: &Arc<AnyCertificate>,
) -> Result<ServerConfig, rustls::Error> {
    let mut config = ServerConfig::builder_with_provider(provider.clone())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_client_cert_verifier(verifier.clone())
        .with_single_cert(vec![identity.certificate()], identity.key())?;
    config.alpn_protocols = vec![ALPN.to_vec()];
    config.session_storage = Arc::new(rustls::server::NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn session<Side>(common: &ConnectionCommon<Side>) -> io::Result<Session> {
    let state: &CommonState = common;
    // Without a common protocol rustls goes on if one side offers none at all.
    if state.alpn_protocol() != Some(ALPN) {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "the other side does not speak sheep/1"));
    }
    let certificate = state.peer_certificates().and_then(<[_]>::first);
    let export = |label| common.export_keying_material([0; EXPORTER_BYTES], label, None).map_err(io::Error::other);
    Ok(Session {
        fingerprint: certificate.map(|certificate| fingerprint(certificate)),
        hello_exporter: export(HELLO_LABEL)?,
        gossip_exporter: export(GOSSIP_LABEL)?,
    })
}

fn split<S: AsyncRead + AsyncWrite + Send + 'static>(stream: S, peer: String) -> Connection {
    let (reader, writer) = tokio::io::split(stream);
    Connection { reader: Box::new(reader), writer: Box::new(writer), peer }
}

/// Takes every certificate whose private key signed the handshake.
#[derive(Debug)]
struct AnyCertificate {
    algorithms: WebPkiSupportedAlgorithms,
}

impl AnyCertificate {
    fn verify(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, certificate, signature, &self.algorithms)
    }
}

fn no_tls12() -> Result<HandshakeSignatureValid, rustls::Error> {
    Err(rustls::Error::General("TLS 1.2 is not spoken between nodes".to_owned()))
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
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

impl ClientCertVerifier for AnyCertificate {
    /// A client has none; the handshake above TLS lets nobody else go without.
    fn client_auth_mandatory(&self) -> bool {
        false
    }

    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        Ok(ClientCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _certificate: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        no_tls12()
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        certificate: &CertificateDer<'_>,
        signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.verify(message, certificate, signature)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}
