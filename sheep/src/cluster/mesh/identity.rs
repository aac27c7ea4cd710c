//! This node's certificate and private key, in one file that is made at the first start and never rewritten.
//!
//! The file is `"SHEEPIDN"`, BLAKE3 of the rest, and the postcard of `Stored`; only its owner may read it. A damaged file is
//! an error and not made anew: the cluster knows this node by the certificate.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};
use serde::{Deserialize, Serialize};
use sheep_core::admission::Fingerprint;

use crate::world::disk::{self, Files, OpenMode};
use crate::world::{Rng, World};

const MAGIC: [u8; 8] = *b"SHEEPIDN";
const HEADER_BYTES: usize = MAGIC.len() + blake3::OUT_LEN;
/// What a private Ed25519 key of 32 bytes begins with in PKCS#8 (RFC 8410, section 7).
const ED25519_PKCS8: [u8; 16] = [0x30, 0x2e, 2, 1, 0, 0x30, 5, 6, 3, 0x2b, 0x65, 0x70, 4, 0x22, 4, 0x20];
/// Certificate and key take less than one KiB together.
const FILE_BYTES_MAX: u64 = 16 << 10;

#[derive(Serialize, Deserialize)]
struct Stored {
    /// X.509, DER.
    certificate: Vec<u8>,
    /// PKCS#8, DER.
    key: Vec<u8>,
}

/// Who this node is to others. Cloning it is cheap.
#[derive(Clone)]
pub struct Identity {
    stored: Arc<Stored>,
}

impl std::fmt::Debug for Identity {
    /// The key must not reach a log.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Identity({})", self.fingerprint())
    }
}

/// BLAKE3 of a certificate in DER.
pub fn fingerprint(certificate: &[u8]) -> Fingerprint {
    Fingerprint(*blake3::hash(certificate).as_bytes())
}

impl Identity {
    /// Reads the identity from `path`, or makes one there. Its directory must exist.
    pub async fn open(world: &World, path: PathBuf) -> io::Result<Identity> {
        let rng = world.rng.clone();
        disk::run(&world.disk, move |files| {
            if files.exists(&path)? {
                read(files, &path)
            } else {
                let identity = Identity::generate(&*rng)?;
                write(files, &path, &identity)?;
                Ok(identity)
            }
        })
        .await
    }

    /// A new identity that is stored nowhere: an Ed25519 key, all of it from `rng`, and a certificate that it signed itself.
    /// Nobody checks the names or dates in it. Every such identity is of one length, and so is every handshake with it.
    pub fn generate(rng: &dyn Rng) -> io::Result<Identity> {
        let make = || {
            let mut pkcs8 = ED25519_PKCS8.to_vec();
            for _ in 0..4 {
                pkcs8.extend_from_slice(&rng.next_u64().to_le_bytes());
            }
            let pkcs8 = PrivatePkcs8KeyDer::from(pkcs8);
            let key = rcgen::KeyPair::from_pkcs8_der_and_sign_algo(&pkcs8, &rcgen::PKCS_ED25519)?;
            let certificate = rcgen::CertificateParams::new(vec!["sheep".to_owned()])?.self_signed(&key)?;
            Ok(Stored { certificate: certificate.der().to_vec(), key: key.serialize_der() })
        };
        let stored = make().map_err(|error: rcgen::Error| io::Error::other(format!("make an identity: {error}")))?;
        Ok(Identity { stored: Arc::new(stored) })
    }

    /// What others know this node by.
    pub fn fingerprint(&self) -> Fingerprint {
        fingerprint(&self.stored.certificate)
    }

    /// The certificate.
    pub(super) fn certificate(&self) -> CertificateDer<'static> {
        CertificateDer::from(self.stored.certificate.clone())
    }

    /// The private key.
    pub(super) fn key(&self) -> PrivateKeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.stored.key.clone()).into()
    }
}

fn read(files: &dyn Files, path: &Path) -> io::Result<Identity> {
    let file = files.open(path, OpenMode::Read)?;
    let mut bytes = vec![0; file.len()?.min(FILE_BYTES_MAX) as usize];
    let length = file.read_at(&mut bytes, 0)?;
    decode(&bytes[..length]).ok_or_else(|| {
        io::Error::new(
            io::ErrorKind::InvalidData,
            format!(
                "{}: the identity of this node is damaged; bring it back from a copy, or ban this node, empty its directory \
                 and let it join anew",
                path.display()
            ),
        )
    })
}

fn write(files: &dyn Files, path: &Path, identity: &Identity) -> io::Result<()> {
    // A crash leaves either no identity or a whole one.
    let temporary = path.with_extension("new");
    let file = files.open(&temporary, OpenMode::Private)?;
    file.write_at(&[io::IoSlice::new(&encode(&identity.stored))], 0)?;
    file.sync_data()?;
    files.rename(&temporary, path)?;
    path.parent().map_or(Ok(()), |directory| files.sync_dir(directory))
}

fn encode(stored: &Stored) -> Vec<u8> {
    let body = postcard::to_allocvec(stored).expect("plain data encodes");
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body.len());
    bytes.extend_from_slice(&MAGIC);
    bytes.extend_from_slice(blake3::hash(&body).as_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

fn decode(bytes: &[u8]) -> Option<Identity> {
    let (header, body) = bytes.split_at_checked(HEADER_BYTES)?;
    let (magic, hash) = header.split_at(MAGIC.len());
    if magic != MAGIC || hash != blake3::hash(body).as_bytes() {
        return None;
    }
    Some(Identity { stored: Arc::new(postcard::from_bytes(body).ok()?) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    #[tokio::test]
    async fn an_identity_is_made_once_and_only_its_owner_reads_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("identity");
        let world = World::real(1).unwrap();
        let first = Identity::open(&world, path.clone()).await.unwrap();
        let again = Identity::open(&world, path.clone()).await.unwrap();
        assert_eq!(first.fingerprint(), again.fingerprint());
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        let other = Identity::open(&world, directory.path().join("other")).await.unwrap();
        assert_ne!(first.fingerprint(), other.fingerprint());
    }

    #[tokio::test]
    async fn a_damaged_identity_is_an_error_and_stays_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("identity");
        let world = World::real(1).unwrap();
        Identity::open(&world, path.clone()).await.unwrap();
        let whole = std::fs::read(&path).unwrap();
        let mut flipped = whole.clone();
        flipped[100] ^= 1;
        for bytes in [&flipped[..], &whole[..whole.len() - 1], &whole[..5], &[]] {
            std::fs::write(&path, bytes).unwrap();
            let error = Identity::open(&world, path.clone()).await.unwrap_err();
            assert!(error.to_string().contains("damaged"), "{error}");
            assert_eq!(std::fs::read(&path).unwrap(), bytes);
        }
    }
}
