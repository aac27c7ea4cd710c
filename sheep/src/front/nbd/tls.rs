//! TLS for NBD clients: the server's certificate, and a certificate of its own from every client.
//!
//! The files are those of QEMU's `tls-creds-x509` for a server (`ca-cert.pem`, `server-cert.pem`, `server-key.pem`), so that one
//! directory serves both. A client without a certificate that the CA signed is refused.

use std::io;
use std::sync::Arc;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use rustls::server::WebPkiClientVerifier;
use rustls::{RootCertStore, ServerConfig};
use tokio_rustls::TlsAcceptor;

use crate::world::net::Connection;

/// The content of the three files.
#[derive(Clone)]
pub struct TlsFiles {
    /// `ca-cert.pem`: who signs clients' certificates.
    pub authority: Vec<u8>,
    /// `server-cert.pem`, with what leads to its root.
    pub certificate: Vec<u8>,
    /// `server-key.pem`.
    pub key: Vec<u8>,
}

impl std::fmt::Debug for TlsFiles {
    /// The key must not reach a log.
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        formatter.write_str("TlsFiles")
    }
}

/// Why the files cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("{file}: {what}")]
pub struct TlsFilesError {
    /// Which of them.
    pub file: &'static str,
    /// What is wrong with it.
    pub what: String,
}

/// Accepts TLS on connections. Cloning it is cheap.
#[derive(Clone)]
pub struct Tls {
    acceptor: TlsAcceptor,
}

impl Tls {
    /// TLS 1.2 and 1.3 with these certificates.
    pub fn new(files: &TlsFiles) -> Result<Tls, TlsFilesError> {
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let mut roots = RootCertStore::empty();
        for certificate in certificates("ca-cert.pem", &files.authority)? {
            roots.add(certificate).map_err(|error| wrong("ca-cert.pem", &error))?;
        }
        let clients = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider.clone());
        let clients = clients.build().map_err(|error| wrong("ca-cert.pem", &error))?;
        let key = PrivateKeyDer::from_pem_slice(&files.key).map_err(|error| wrong("server-key.pem", &error))?;
        let config = ServerConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .map_err(|error| wrong("server-key.pem", &error))?
            .with_client_cert_verifier(clients)
            .with_single_cert(certificates("server-cert.pem", &files.certificate)?, key)
            .map_err(|error| wrong("server-cert.pem", &error))?;
        Ok(Tls { acceptor: TlsAcceptor::from(Arc::new(config)) })
    }

    /// Runs the server's side of the TLS handshake and gives the connection inside.
    pub async fn accept(&self, connection: Connection) -> io::Result<Connection> {
        let inside = self.acceptor.accept(tokio::io::join(connection.reader, connection.writer)).await?;
        let (reader, writer) = tokio::io::split(inside);
        Ok(Connection { reader: Box::new(reader), writer: Box::new(writer), peer: connection.peer })
    }
}

fn wrong(file: &'static str, error: &dyn std::fmt::Display) -> TlsFilesError {
    TlsFilesError { file, what: error.to_string() }
}

fn certificates(file: &'static str, pem: &[u8]) -> Result<Vec<CertificateDer<'static>>, TlsFilesError> {
    let found: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match found.map_err(|error| wrong(file, &error))? {
        none if none.is_empty() => Err(wrong(file, &"holds no certificate in PEM form")),
        some => Ok(some),
    }
}
