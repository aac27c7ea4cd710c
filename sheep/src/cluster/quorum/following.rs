//! How the order reaches nodes that do not vote: they ask the leader for what comes after what they have, again and again; the
//! leader answers when there is something.

use std::sync::Arc;
use std::time::Duration;

use sheep_core::member::NodeId;

use super::charter::{Charter, Era};
use super::messages::{Answer, Request, Updates};
use super::voting::Voting;
use super::{Quorum, lock};
use crate::cluster::OrderError;

/// How long an answer may wait for something to tell.
const WAIT: Duration = Duration::from_secs(1);
/// How long the whole state may take to arrive.
const PATIENCE: Duration = Duration::from_secs(10);
/// Between attempts while nobody can be followed.
const RETRY: Duration = Duration::from_millis(50);
/// Between looks whether the votes still bring the order here, if nothing tells of it.
const LOOK_INTERVAL: Duration = Duration::from_millis(640);

/// What asking the leader came to.
enum Followed {
    /// It told what came next, or that nothing did while it was waited for.
    Learned,
    /// The order comes here in another way.
    NothingToDo,
    /// Nobody to ask, or no answer.
    InVain,
}

impl Quorum {
    pub(super) async fn keep_following(self) {
        loop {
            match self.follow_once().await {
                Followed::Learned => {}
                Followed::NothingToDo => {
                    // Told by the leader's word; but whoever gave up its era hears no leader of the next before it follows.
                    tokio::select! {
                        () = self.inner.follow_wake.notified() => {}
                        () = self.inner.world.clock.beat(LOOK_INTERVAL) => {}
                    }
                }
                Followed::InVain => self.inner.world.clock.sleep(RETRY).await,
            }
        }
    }

    async fn follow_once(&self) -> Followed {
        let Some(charter) = self.charter() else { return Followed::InVain };
        let Some(leader) = self.leader() else { return Followed::InVain };
        if leader == self.inner.node {
            return Followed::NothingToDo;
        }
        if self.is_brought() {
            return Followed::NothingToDo;
        }
        let after = self.index();
        let request = Request::Follow { era: charter.era, after, wait_ms: WAIT.as_millis() as u32 };
        match self.call(leader, &request, WAIT + PATIENCE).await {
            Some(Answer::Follow(Some(updates))) => {
                self.take_updates(charter, after, updates);
                Followed::Learned
            }
            _ => Followed::InVain,
        }
    }

    /// The votes bring the order to those who take part in them. Whether that works is seen from what the leader has: one
    /// that was replaced as a voter while it was away does not know of it.
    fn is_brought(&self) -> bool {
        let (in_votes, index) = {
            let known = lock(&self.inner.pulse);
            (known.in_votes, known.indices[1])
        };
        in_votes && self.index() >= index
    }

    /// The leader's word may have changed whether this node has to ask for the order.
    pub(super) fn look_whether_to_follow(&self) {
        if !self.is_brought() {
            self.inner.follow_wake.notify_one();
        }
    }

    fn take_updates(&self, charter: Charter, after: u64, updates: Updates) {
        match updates {
            Updates::Whole { charter, index, machine } => self.advance(charter, index, *machine),
            Updates::Entries(entries) => {
                let mut machine = {
                    let position = lock(&self.inner.position);
                    if position.charter != Some(charter) || position.index != after {
                        return;
                    }
                    position.machine.clone()
                };
                let mut index = after;
                for (at, entry) in entries {
                    if at != index + 1 {
                        return;
                    }
                    index = at;
                    if let Some(entry) = entry {
                        machine.apply(&entry);
                    }
                }
                if index > after {
                    self.advance(charter, index, machine);
                }
            }
        }
    }

    /// A newcomer's first look at the order.
    pub(super) async fn fetch_whole(&self, node: NodeId, charter: Charter) {
        let request = Request::Follow { era: Era { number: u32::MAX, founder: NodeId(0) }, after: 0, wait_ms: 0 };
        if let Some(Answer::Follow(Some(Updates::Whole { charter: theirs, index, machine }))) =
            self.call(node, &request, PATIENCE).await
            && theirs == charter
        {
            self.advance(charter, index, *machine);
            lock(&self.inner.pulse).leader = Some(node);
        }
    }

    /// Tells another node what comes after what it has.
    pub(super) async fn answer_follow(&self, era: Era, after: u64, wait: Duration) -> Answer {
        let Some(charter) = self.charter() else { return Answer::Follow(None) };
        if era == charter.era {
            self.await_index_for(charter, after + 1, wait.min(WAIT)).await;
            if after > self.index() {
                return Answer::Follow(None);
            }
            let entries = self.consensus().and_then(|consensus| consensus.applied_after(after));
            if let Some(entries) = entries {
                let known = self.index();
                let entries = entries.into_iter().filter(|(index, _)| *index <= known).collect();
                return Answer::Follow(Some(Updates::Entries(entries)));
            }
        }
        let position = lock(&self.inner.position);
        match position.charter {
            Some(charter) => Answer::Follow(Some(Updates::Whole {
                charter,
                index: position.index,
                machine: Box::new(position.machine.clone()),
            })),
            None => Answer::Follow(None),
        }
    }

    /// This node's part in the votes of the present era; begun when the leader wants it.
    pub(super) async fn open_log_of(&self, charter: Charter) -> Result<Arc<Voting>, OrderError> {
        if let Some(consensus) = self.consensus()
            && consensus.charter() == charter
        {
            return Ok(consensus);
        }
        self.open_log(charter).await
    }
}
