//! What every connection of this node's mesh needs.

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use sheep_core::node_handshake::{Channel, Rejection};
use tokio::sync::mpsc;

use super::handshake::{Established, Myself};
use super::live::Live;
use super::refusals::Refusals;
use super::types::{ContactError, Direction, Event, GossipSecret, Peer, Service, Standing};

/// See the module.
pub(super) struct Shared {
    pub myself: Myself,
    pub service: Arc<dyn Service>,
    pub live: Arc<Live>,
    pub refusals: Refusals,
    pub events: mpsc::Sender<Event>,
    pub secrets: mpsc::UnboundedSender<GossipSecret>,
}

impl Shared {
    /// Says something that must not be lost; waits until it is taken. Nobody listens any more when the node stops.
    pub async fn say(&self, event: Event) {
        let _ = self.events.send(event).await;
    }

    /// Says something that others can make happen at will: it is left out when nobody takes events fast enough.
    pub fn mention(&self, event: Event) {
        let _ = self.events.try_send(event);
    }

    /// Connects; a rejection is logged and mentioned here, once.
    pub async fn dial(
        &self,
        address: SocketAddr,
        channel: Channel,
        kept: bool,
    ) -> Result<Established<Arc<Peer>>, ContactError> {
        let result = self.myself.dial(address, channel, kept).await;
        if let Err(ContactError::Rejected(rejection)) = &result {
            if *rejection == Rejection::SameNode && self.myself.met_oneself.swap(false, Ordering::AcqRel) {
                tracing::debug!("{address} is this node's own address");
            } else {
                let text = format_args!("no connection to the node at {address}: {rejection}");
                self.refusals.warn(Some(address.ip()), text);
            }
            self.mention(Event::Rejected { address, rejection: *rejection });
        }
        result
    }

    /// A stranger gets no secret: its packets would count as those of a node of the cluster.
    pub fn share_secret(&self, peer: &Peer, direction: Direction, secret: [u8; 32]) {
        if peer.standing != Standing::Stranger {
            let _ = self.secrets.send(GossipSecret { peer: peer.node, direction, secret });
        }
    }
}
