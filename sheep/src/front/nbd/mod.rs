//! The NBD server: volumes for today's QEMU, the Linux client, libnbd and everything built on it.
//!
//! Protocol: the NBD project's `doc/proto.md`, fixed newstyle. `handshake` settles which export and how to talk, `transmission`
//! carries out requests, `export` says which volume a name means, `contexts` what can be asked about ranges, `wire` has
//! the bytes, `tls` the only authentication that the protocol has. Without it a server listens on the unix socket and on loopback,
//! unless it was told otherwise.

pub mod contexts;
pub mod export;
pub mod handshake;
pub mod tls;
pub mod transmission;
pub mod wire;

use super::allowed::Allowed;
use crate::data::Data;
use crate::world::frames::FrameSender;
use crate::world::net::{Connection, Listener};
use tls::Tls;

/// The port that the protocol has by convention.
pub const PORT_DEFAULT: u16 = 10809;

/// Whether clients may or must use TLS on a listening socket.
#[derive(Clone)]
pub enum TlsPolicy {
    /// There are no certificates: only clients of these networks are served.
    None(Allowed),
    /// As the client likes: a unix socket is protected by its directory.
    Offered(Tls),
    /// Nothing is told to a client before TLS.
    Required(Tls),
}

/// Takes clients' connections until the process ends.
pub async fn listen(data: Data, listener: Box<dyn Listener>, policy: TlsPolicy) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                if let TlsPolicy::None(allowed) = &policy
                    && !allowed.admits(&connection.peer)
                {
                    continue;
                }
                tokio::spawn(serve(data.clone(), connection, policy.clone()));
            }
            Err(error) => {
                // Out of file descriptors, most likely: those who are connected go on.
                tracing::warn!("cannot take an NBD client's connection: {error}");
                data.world().clock.sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(data: Data, connection: Connection, policy: TlsPolicy) {
    let peer = connection.peer.clone();
    let ended = match handshake::negotiate(&data, connection, policy).await {
        Ok(Some((session, reader, writer))) => transmission::serve(session, reader, FrameSender::start(writer)).await,
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = ended {
        tracing::debug!("NBD client {peer}: {error}");
    }
}
