//! Who somebody is, for the mesh: told from the ordered state.

use sheep_core::admission::{ClusterKey, Fingerprint};
use sheep_core::member::NodeId;

use super::Quorum;
use super::messages::{Card, encode};
use crate::cluster::mesh::{Peer, Rejection, Standing, Trust};

impl Trust for Quorum {
    fn cluster(&self) -> Option<u64> {
        self.charter().map(|charter| charter.cluster)
    }

    fn is_open(&self) -> bool {
        self.state().admission.open
    }

    fn key(&self) -> Option<ClusterKey> {
        self.state().admission.key.clone().or_else(|| self.inner.given_key.clone())
    }

    fn judge(
        &self,
        node: NodeId,
        fingerprint: &Fingerprint,
        cluster: Option<u64>,
        proved: bool,
    ) -> Result<Standing, Rejection> {
        if node == self.inner.node {
            return Err(Rejection::SameNode);
        }
        let ours = self.charter().map(|charter| charter.cluster);
        if let (Some(ours), Some(theirs)) = (ours, cluster)
            && ours != theirs
        {
            return Err(Rejection::OtherCluster { ours, theirs });
        }
        let state = self.state();
        if state.admission.banned.contains(fingerprint) {
            return Err(Rejection::Banned);
        }
        match state.admission.nodes.get(&node) {
            Some(known) if known == fingerprint => Ok(Standing::Member),
            Some(_) if !state.admission.open => Err(Rejection::Replaced),
            _ if state.admission.open => Ok(Standing::Member),
            _ if proved => Ok(Standing::Keyholder),
            _ => Ok(Standing::Stranger),
        }
    }

    fn card(&self) -> Vec<u8> {
        encode(&Card { member: self.inner.member.clone(), charter: self.charter() })
    }
}

impl Quorum {
    /// What somebody may do now: the state may know more, or less, of them than when they connected.
    pub(super) fn standing_now(&self, peer: &Peer) -> Option<Standing> {
        let judged = self.judge(peer.node, &peer.fingerprint, peer.cluster, peer.standing == Standing::Keyholder);
        judged.ok()
    }
}
