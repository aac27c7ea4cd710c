//! Putting commands into the order, from any node, exactly once.
//!
//! A proposal is tried until it is known to be in the order: a leader may die with the answer. Each carries this process's own
//! number, and the state machine gives a repeated one its first outcome.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use sheep_core::command::{Command, Outcome};
use tokio::sync::Semaphore;

use super::Quorum;
use super::messages::{Answer, ProposeAnswer, Request};
use crate::cluster::consensus::{Entry, ProposeError};
use crate::cluster::driver::OrderError;

/// How long one attempt may take.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between attempts.
const RETRY: Duration = Duration::from_millis(30);
/// How long a barrier may take while this node hears from the quorum, and while it does not.
const BARRIER_PATIENCE: Duration = Duration::from_secs(3);
const BARRIER_PATIENCE_ALONE: Duration = Duration::from_millis(300);

/// Proposals of one process under way at once: the state machine remembers some more outcomes than this.
const UNDER_WAY_MAX: usize = 128;

/// The proposals of this process.
pub struct Proposals {
    inner: Mutex<Numbers>,
    room: Semaphore,
}

impl Default for Proposals {
    fn default() -> Proposals {
        Proposals { inner: Mutex::default(), room: Semaphore::new(UNDER_WAY_MAX) }
    }
}

#[derive(Default)]
struct Numbers {
    last: u64,
    under_way: BTreeSet<u64>,
}

/// A number that is taken; it is over when this is dropped.
struct Number<'a> {
    proposals: &'a Proposals,
    sequence: u64,
}

impl Proposals {
    fn take(&self) -> Number<'_> {
        let mut numbers = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.last += 1;
        let sequence = numbers.last;
        numbers.under_way.insert(sequence);
        Number { proposals: self, sequence }
    }

    fn settled_below(&self) -> u64 {
        let numbers = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.under_way.first().copied().unwrap_or(numbers.last + 1)
    }
}

impl Drop for Number<'_> {
    fn drop(&mut self) {
        let mut numbers = self.proposals.inner.lock().unwrap_or_else(PoisonError::into_inner);
        numbers.under_way.remove(&self.sequence);
    }
}

impl Quorum {
    /// See `Cluster::propose`: waits as long as there is no quorum.
    pub(super) async fn order(&self, command: Command) -> Result<Outcome, OrderError> {
        self.order_at(command).await.map(|(_, outcome)| outcome)
    }

    /// As `order`, with the place in the order.
    pub(super) async fn order_at(&self, command: Command) -> Result<(u64, Outcome), OrderError> {
        // The semaphore is never closed.
        let _room = self.inner.proposals.room.acquire().await;
        let number = self.inner.proposals.take();
        let mut entry = Entry {
            proposer: self.inner.node,
            boot: self.inner.boot,
            sequence: number.sequence,
            settled_below: 0,
            command,
        };
        loop {
            entry.settled_below = self.inner.proposals.settled_below();
            let Some(charter) = self.charter() else {
                return Err(OrderError::Unavailable("this node belongs to no cluster".to_string()));
            };
            if let Some((index, outcome)) = self.try_once(&entry).await {
                self.await_index(charter, index).await;
                return Ok((index, outcome));
            }
            self.inner.world.clock.sleep(RETRY).await;
        }
    }

    /// An entry of this process outside the ordinary way.
    pub(super) fn entry_for(&self, command: Command) -> Entry {
        let number = self.inner.proposals.take();
        Entry { proposer: self.inner.node, boot: self.inner.boot, sequence: number.sequence, settled_below: 0, command }
    }

    async fn try_once(&self, entry: &Entry) -> Option<(u64, Outcome)> {
        if let Some(consensus) = self.leading() {
            return consensus
                .propose(entry.clone(), PATIENCE)
                .await
                .ok()
                .map(|proposed| (proposed.index, proposed.outcome));
        }
        let leader = self.leader().filter(|leader| *leader != self.inner.node)?;
        match self.call(leader, &Request::Propose(entry.clone()), PATIENCE + RETRY).await? {
            Answer::Propose(ProposeAnswer::Done { index, outcome }) => Some((index, outcome)),
            _ => None,
        }
    }

    /// Another node's proposal.
    pub(super) async fn answer_propose(&self, entry: Entry) -> ProposeAnswer {
        let Some(consensus) = self.leading() else { return ProposeAnswer::NotLeader(self.leader()) };
        match consensus.propose(entry, PATIENCE).await {
            Ok(proposed) => ProposeAnswer::Done { index: proposed.index, outcome: proposed.outcome },
            Err(ProposeError::NotLeader { leader }) => ProposeAnswer::NotLeader(leader),
            Err(_) => ProposeAnswer::Unknown,
        }
    }

    /// Waits until everything that was ordered before this call is known here. Ends with an error when there is no quorum:
    /// people who ask must get an answer.
    pub(super) async fn read_barrier(&self) -> Result<(), OrderError> {
        let Some(charter) = self.charter() else { return Ok(()) };
        let patience = if self.has_quorum() { BARRIER_PATIENCE } else { BARRIER_PATIENCE_ALONE };
        let caught_up = async {
            loop {
                if let Some(index) = self.ask_index().await {
                    self.await_index(charter, index).await;
                    return;
                }
                self.inner.world.clock.sleep(RETRY).await;
            }
        };
        tokio::select! {
            () = caught_up => Ok(()),
            () = self.inner.world.clock.sleep(patience) => Err(OrderError::Unavailable(
                "no quorum: what is shown is what this node knew last; see `dog cluster info`".to_string(),
            )),
        }
    }

    /// Up to where the order has come, by the leader's word.
    async fn ask_index(&self) -> Option<u64> {
        if let Some(consensus) = self.leading() {
            return consensus.read_index(PATIENCE).await.ok();
        }
        let leader = self.leader().filter(|leader| *leader != self.inner.node)?;
        match self.call(leader, &Request::ReadIndex, PATIENCE).await {
            Some(Answer::ReadIndex(index)) => index,
            _ => None,
        }
    }
}
