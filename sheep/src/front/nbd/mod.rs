//! The NBD server: volumes for today's QEMU, the Linux client, libnbd and everything built on it.
//!
//! Protocol: the NBD project's `doc/proto.md`, fixed newstyle. `handshake` settles which export and how to talk, `transmission`
//! carries out requests, `export` says which volume a name means, `contexts` what can be asked about ranges, `wire` has
//! the bytes. The protocol has no authentication without TLS, so a server listens on the unix socket and on loopback only.

pub mod contexts;
pub mod export;
pub mod handshake;
pub mod transmission;
pub mod wire;

use crate::data::Data;
use crate::world::frames::{FrameReader, FrameSender};
use crate::world::net::{Connection, Listener};

/// The port that the protocol has by convention.
pub const PORT_DEFAULT: u16 = 10809;

/// Takes clients' connections until the process ends.
pub async fn listen(data: Data, listener: Box<dyn Listener>) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                tokio::spawn(serve(data.clone(), connection));
            }
            Err(error) => {
                // Out of file descriptors, most likely: those who are connected go on.
                tracing::warn!("cannot take an NBD client's connection: {error}");
                data.world().clock.sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(data: Data, connection: Connection) {
    let peer = connection.peer;
    let mut reader = FrameReader::new(connection.reader);
    let sender = FrameSender::start(connection.writer);
    let ended = match handshake::negotiate(&data, &mut reader, &sender).await {
        Ok(Some(session)) => transmission::serve(session, reader, sender).await,
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = ended {
        tracing::debug!("NBD client {peer}: {error}");
    }
}
