//! What the order makes: the cluster's state, and what every proposer has been answered.
//!
//! Always holds:
//! 1. The same entries in the same order make the same machine, on every node.
//! 2. An entry named `(proposer, boot, sequence)` changes the state at most once. Put into the order again, it gives the
//!    first answer again as long as that is remembered, and [`Answer::Stale`] afterwards.
//! 3. What is remembered is bounded: `ANSWERS_MAX` per proposer, `STRANGERS_MAX` proposers that are no members.

use std::collections::{BTreeMap, VecDeque};
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use sheep_core::cluster_state::ClusterState;
use sheep_core::command::Outcome;
use sheep_core::member::NodeId;

use super::format::Entry;

/// Answers that are remembered per proposer. It has far fewer under way at a time; one that never settles anything loses
/// its oldest.
const ANSWERS_MAX: usize = 256;
/// Proposers that are no members are nodes about to join and nodes just evicted, which may still repeat themselves.
const STRANGERS_MAX: usize = 64;
/// Earlier lives that are told from a new one, per proposer: what they sent may still arrive.
const BOOTS_MAX: usize = 8;

/// What came of an entry.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub enum Answer {
    /// It was none of a proposer's.
    Nothing,
    /// It was applied, now or the first time.
    Outcome(Outcome),
    /// It came from an earlier life of its proposer, or the proposer has settled it: nothing was done.
    Stale,
}

/// What one proposer has been answered.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Session {
    /// Its present life.
    pub boot: u64,
    /// Its earlier ones, the latest last.
    pub earlier: VecDeque<u64>,
    /// By sequence.
    pub done: BTreeMap<u64, Outcome>,
    /// Nothing below is remembered, or will be applied.
    pub settled_below: u64,
    /// Entries of all proposers, when this one last had one.
    pub used: u64,
}

/// See the module. Cloning is cheap; a clone does not see later entries.
#[derive(Clone, PartialEq, Eq, Debug, Default, Serialize, Deserialize)]
pub struct Machine {
    /// The state.
    pub state: Arc<ClusterState>,
    /// By proposer.
    pub sessions: Arc<BTreeMap<NodeId, Arc<Session>>>,
    /// Entries seen, repeated ones included.
    pub entries: u64,
}

impl Machine {
    /// Applies one entry.
    pub fn apply(&mut self, entry: &Entry) -> Answer {
        self.entries += 1;
        let sessions = Arc::make_mut(&mut self.sessions);
        let session = Arc::make_mut(sessions.entry(entry.proposer).or_default());
        let answer = session.recall(entry);
        session.used = self.entries;
        if let Some(answer) = answer {
            return answer;
        }
        let outcome = Arc::make_mut(&mut self.state).apply(&entry.command);
        session.done.insert(entry.sequence, outcome.clone());
        session.shrink(entry.settled_below);
        self.drop_strangers();
        Answer::Outcome(outcome)
    }

    /// What a proposal was answered, if that is remembered.
    pub fn answered(&self, proposer: NodeId, boot: u64, sequence: u64) -> Option<&Outcome> {
        self.sessions.get(&proposer).filter(|session| session.boot == boot)?.done.get(&sequence)
    }

    fn drop_strangers(&mut self) {
        let members = &self.state.members;
        let strangers = self.sessions.iter().filter(|(node, _)| !members.contains_key(node));
        let mut strangers: Vec<(u64, NodeId)> = strangers.map(|(node, session)| (session.used, *node)).collect();
        if strangers.len() > STRANGERS_MAX {
            strangers.sort_unstable();
            let sessions = Arc::make_mut(&mut self.sessions);
            for (_, node) in &strangers[..strangers.len() - STRANGERS_MAX] {
                sessions.remove(node);
            }
        }
    }
}

impl Session {
    /// The answer, unless the entry is new.
    fn recall(&mut self, entry: &Entry) -> Option<Answer> {
        if self.earlier.contains(&entry.boot) {
            return Some(Answer::Stale);
        }
        // A proposer's first entry begins its first life, whatever its number.
        if self.boot != entry.boot {
            if self.used > 0 {
                self.earlier.push_back(self.boot);
            }
            while self.earlier.len() > BOOTS_MAX {
                self.earlier.pop_front();
            }
            self.boot = entry.boot;
            self.done.clear();
            self.settled_below = 0;
        }
        if let Some(outcome) = self.done.get(&entry.sequence) {
            return Some(Answer::Outcome(outcome.clone()));
        }
        (entry.sequence < self.settled_below).then_some(Answer::Stale)
    }

    fn shrink(&mut self, settled_below: u64) {
        self.settled_below = self.settled_below.max(settled_below);
        self.done = self.done.split_off(&self.settled_below);
        while self.done.len() > ANSWERS_MAX {
            if let Some((sequence, _)) = self.done.pop_first() {
                self.settled_below = sequence.saturating_add(1);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use sheep_core::command::{Command, Refusal};

    fn entry(proposer: u64, boot: u64, sequence: u64) -> Entry {
        Entry { proposer: NodeId(proposer), boot, sequence, settled_below: 0, command: Command::Shutdown }
    }

    #[test]
    fn an_entry_is_applied_once_however_often_it_comes() {
        let mut machine = Machine::default();
        let first = machine.apply(&entry(1, 7, 0));
        assert_eq!(machine.apply(&entry(1, 7, 0)), first);
        assert_eq!(machine.state.applied, 1);
        machine.apply(&entry(2, 7, 0));
        machine.apply(&entry(1, 7, 1));
        assert_eq!(machine.state.applied, 3);
        assert_eq!(machine.answered(NodeId(1), 7, 1), Some(&Outcome::Refused(Refusal::NotFormatted)));
    }

    #[test]
    fn what_is_settled_is_forgotten_but_never_applied_again() {
        let mut machine = Machine::default();
        machine.apply(&entry(1, 7, 0));
        machine.apply(&Entry { settled_below: 2, ..entry(1, 7, 2) });
        assert_eq!(machine.apply(&entry(1, 7, 0)), Answer::Stale);
        assert_eq!(machine.apply(&entry(1, 7, 1)), Answer::Stale);
        assert_eq!(machine.state.applied, 2);
        assert_eq!(machine.sessions[&NodeId(1)].done.len(), 1);
    }

    #[test]
    fn an_earlier_life_is_not_heard_any_more() {
        let mut machine = Machine::default();
        machine.apply(&entry(1, 7, 5));
        machine.apply(&entry(1, 8, 0));
        assert_eq!(machine.apply(&entry(1, 7, 6)), Answer::Stale);
        assert_eq!(machine.apply(&entry(1, 7, 5)), Answer::Stale);
        assert_eq!(machine.state.applied, 2);
    }

    #[test]
    fn memory_is_bounded() {
        let mut machine = Machine::default();
        for sequence in 0..1000 {
            machine.apply(&entry(1, 7, sequence));
        }
        assert_eq!(machine.sessions[&NodeId(1)].done.len(), ANSWERS_MAX);
        assert_eq!(machine.apply(&entry(1, 7, 0)), Answer::Stale);
        for proposer in 0..1000 {
            machine.apply(&entry(proposer, 7, 0));
        }
        assert_eq!(machine.sessions.len(), STRANGERS_MAX);
        assert!(machine.sessions.contains_key(&NodeId(999)), "the latest are kept");
    }
}
