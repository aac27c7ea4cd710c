//! This node's part in the votes of one era, and the questions that the driver asks about it.

use std::collections::BTreeSet;
use std::ops::Deref;
use std::time::Duration;

use sheep_core::member::NodeId;

use super::charter::Charter;
use crate::cluster::consensus::{Consensus, Entry, Machine, ProposeError, Published, Role};

/// Between attempts of a node that is about to lead.
const LEAD_INTERVAL: Duration = Duration::from_millis(20);

/// One term of one order: each era of the order counts its terms from the beginning.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Reign {
    /// Of the order.
    pub order: u64,
    /// Of its leader.
    pub term: u64,
}

/// See the module.
pub struct Voting {
    charter: Charter,
    consensus: Consensus,
}

impl Deref for Voting {
    type Target = Consensus;

    fn deref(&self) -> &Consensus {
        &self.consensus
    }
}

impl Voting {
    pub fn new(charter: Charter, consensus: Consensus) -> Voting {
        Voting { charter, consensus }
    }

    /// Of which order.
    pub fn charter(&self) -> Charter {
        self.charter
    }

    pub fn is_leader(&self) -> bool {
        self.consensus.status().role == Role::Leader
    }

    pub fn leader(&self) -> Option<NodeId> {
        self.consensus.status().leader
    }

    pub fn term(&self) -> u64 {
        self.consensus.status().term
    }

    /// The present term of this order.
    pub fn reign(&self) -> Reign {
        Reign { order: self.charter.order_id(), term: self.term() }
    }

    pub fn voters(&self) -> BTreeSet<NodeId> {
        self.consensus.status().voters
    }

    /// Voters, and those who are sent the log to become one.
    pub fn nodes(&self) -> BTreeSet<NodeId> {
        let status = self.consensus.status();
        status.voters.union(&status.learners).copied().collect()
    }

    /// Proposes as soon as this node leads.
    pub async fn propose_when_leader(&self, clock: &dyn crate::world::Clock, entry: Entry) -> Option<u64> {
        loop {
            match self.consensus.propose(entry.clone(), Duration::from_secs(2)).await {
                Ok(proposed) => return Some(proposed.index),
                Err(ProposeError::NotLeader { .. } | ProposeError::TimedOut) => clock.sleep(LEAD_INTERVAL).await,
                Err(error) => {
                    tracing::error!("cannot begin the order: {error}");
                    return None;
                }
            }
        }
    }
}

/// The state machine as it was published.
pub fn machine_of(published: &Published) -> Machine {
    Machine { state: published.state.clone(), sessions: published.sessions.clone(), entries: published.entries }
}
