//! Finds ADDRESSES of other nodes' ports, nothing else: from `--join`, from the peers remembered in a file, and from the
//! local network. Who is there is found out by whoever tries them.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;

use tokio::sync::mpsc;

use crate::world::World;
use crate::world::net::Announcement;

/// A name or an address, and a port, as given to `--join`.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Seed {
    /// A name or an address in writing.
    pub host: String,
    /// The node port.
    pub port: u16,
}

/// Where to look.
pub struct DiscoveryConfig {
    /// From `--join`.
    pub seeds: Vec<Seed>,
    /// `META/cluster`: holds the file `peers`.
    pub directory: PathBuf,
    /// What to tell the local network; `None` leaves multicast DNS out.
    pub announcement: Option<Announcement>,
}

/// Looks for addresses as long as it lives.
pub struct Discovery {}

impl Discovery {
    /// Starts looking. The receiver yields addresses to try, one after the other, again and again with growing pauses
    /// until they are [`Discovery::known`].
    pub async fn start(_world: World, _config: DiscoveryConfig) -> (Arc<Discovery>, mpsc::Receiver<SocketAddr>) {
        let (_, receiver) = mpsc::channel(1);
        (Arc::new(Discovery {}), receiver)
    }

    /// A node of ours is connected at this address: it need not be tried, and is remembered over a restart.
    pub fn known(&self, _address: SocketAddr) {}

    /// The connection at this address was lost: it is tried again.
    pub fn unknown(&self, _address: SocketAddr) {}

    /// This address is this node itself: it is never tried.
    pub fn is_ourselves(&self, _address: SocketAddr) {}

    /// The node at this address is no longer one of ours: it is not remembered any more.
    pub fn forget(&self, _address: SocketAddr) {}
}
