//! Sheepdog's client protocol: listening sockets and connections.
//!
//! `conn` reads requests and answers them in the order of completion; `ops` is the table of operations, `reply` what they give; `objects`, `vdis`,
//! `locks`, `restores`, `changes` and `admin` carry them out; `wire_status` turns errors into result codes.

pub mod admin;
pub mod changes;
pub mod conn;
pub mod locks;
pub mod objects;
pub mod ops;
pub mod reply;
pub mod restores;
mod summaries;
pub mod vdis;
mod volume_wishes;
pub mod wire_status;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::Notify;

use self::locks::Locks;
use self::restores::Restores;
use super::allowed::Allowed;
use crate::data::Data;
use crate::data::client::Client;
use crate::world::net::Listener;

/// What the protocol needs of its node.
#[derive(Clone)]
pub struct Front {
    /// The data path.
    pub data: Data,
    /// Told when a client asks this daemon to stop.
    pub stop: Arc<Notify>,
    /// What this node is called in lists.
    pub store_name: &'static str,
    /// Where the same volumes are served by NBD.
    pub nbd: NbdPlaces,
    /// The log of this process.
    pub log: LogControl,
    /// Whether the client is on this machine or proved the cluster key: only such a one may ask for secrets or decide who comes
    /// in.
    pub trusted: bool,
    /// What this connection began and has not finished.
    pub restores: Arc<Restores>,
    /// Which volumes the clients of this node have locked.
    pub locks: Arc<Locks>,
    /// The number of this connection among those of the node.
    pub connection: u64,
    /// Whether it has ended.
    pub client: Client,
}

/// What clients may do with the log, which this floor does not know.
#[derive(Clone, Copy)]
pub struct LogControl {
    /// Its level, as syslog numbers it.
    pub level: fn() -> u8,
    /// Changes it; false if there is no such level.
    pub set_level: fn(u32) -> bool,
}

/// Where a node serves NBD, for clients that ask.
#[derive(Clone, Default)]
pub struct NbdPlaces {
    /// Path of the unix socket.
    pub socket: Option<PathBuf>,
    /// TCP port.
    pub port: Option<u16>,
}

/// Whether a connection comes from this machine: over loopback or a unix socket.
fn is_here(peer: &str) -> bool {
    peer.parse::<SocketAddr>().map_or(true, |address| address.ip().to_canonical().is_loopback())
}

/// Takes clients' connections until the process ends.
pub async fn listen(front: Front, listener: Box<dyn Listener>, allowed: Allowed) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                if !allowed.admits(&connection.peer) {
                    continue;
                }
                let front = Front { trusted: is_here(&connection.peer), ..front.clone() };
                tokio::spawn(conn::serve(front, connection));
            }
            Err(error) => {
                // Out of file descriptors, most likely: those who are connected go on.
                tracing::warn!("cannot take a client's connection: {error}");
                front.data.world().clock.sleep(std::time::Duration::from_millis(100)).await;
            }
        }
    }
}
