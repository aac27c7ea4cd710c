//! What clients of a simulation, or of the torture bench, were promised: every operation with its beginning and its end, in one
//! order of time.
//!
//! Always holds:
//! 1. A write without a good answer (refused, cut off, given up) has an unknown outcome and stays so.
//! 2. Every write puts a number of its own into its block.
//! 3. Times are strictly increasing: of two events at the clients it is always known which came first.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::linear::{Action, Operation};

#[derive(Default)]
struct Memory {
    last: u64,
    next_value: u64,
    operations: Vec<Operation>,
    foreign: Vec<String>,
    broken: Vec<String>,
}

/// The record of one volume. Clones are the same one.
#[derive(Clone, Default)]
pub struct Oracle {
    memory: Arc<Mutex<Memory>>,
}

impl Oracle {
    fn lock(&self) -> MutexGuard<'_, Memory> {
        self.memory.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The next moment, at or after a millisecond of the clock: nanoseconds.
    pub fn moment(&self, now_ms: u64) -> u64 {
        let mut memory = self.lock();
        memory.last = (memory.last + 1).max(now_ms * 1_000_000);
        memory.last
    }

    /// A number for a write.
    pub fn next_value(&self) -> u64 {
        let mut memory = self.lock();
        memory.next_value += 1;
        memory.next_value
    }

    /// Adds what a client did.
    pub fn add(&self, operation: Operation) {
        self.lock().operations.push(operation);
    }

    /// A client read what nobody wrote there.
    pub fn add_foreign(&self, what: String) {
        self.lock().foreign.push(what);
    }

    /// A client saw by itself that a promise to it was broken.
    pub fn add_broken(&self, what: String) {
        tracing::debug!("violation: {what}");
        self.lock().broken.push(what);
    }

    /// Every promise that a client saw broken.
    pub fn broken(&self) -> Vec<String> {
        self.lock().broken.clone()
    }

    /// Everything that was done.
    pub fn operations(&self) -> Vec<Operation> {
        self.lock().operations.clone()
    }

    /// The operator gave up a disk that may have been the only one with writes of unknown outcome: those may be gone, though some
    /// were read. What was acknowledged may not.
    pub fn give_up_unanswered(&self) {
        let mut memory = self.lock();
        let unanswered: BTreeSet<u64> = (memory.operations.iter())
            .filter_map(|operation| match operation.action {
                Action::Write(value) if operation.end.is_none() => Some(value),
                _ => None,
            })
            .collect();
        memory.operations.retain(|operation| match operation.action {
            Action::Write(_) => true,
            Action::Read(value) => !unanswered.contains(&value),
            Action::ReadTorn(values) => !values.iter().any(|value| unanswered.contains(value)),
        });
    }

    /// Forgets what can no longer contradict anything, now that nothing is under way and the last reads of every block, which are
    /// in the record, have been checked. Kept are the value of each block, and what a write with unknown outcome may yet make of
    /// it; of a block whose sectors are of several writes, everything.
    pub fn condense(&self) {
        let now = self.moment(0);
        let mut memory = self.lock();
        let mut blocks: BTreeMap<u32, Vec<Operation>> = BTreeMap::new();
        for operation in std::mem::take(&mut memory.operations) {
            blocks.entry(operation.block).or_default().push(operation);
        }
        memory.operations = blocks.into_values().flat_map(|operations| condensed(operations, now)).collect();
    }

    /// Every read of something that nobody wrote.
    pub fn foreign(&self) -> Vec<String> {
        self.lock().foreign.clone()
    }

    /// How many writes and reads were answered, and how many writes have an unknown outcome.
    pub fn counts(&self) -> [usize; 3] {
        let memory = self.lock();
        let mut counts = [0; 3];
        for operation in &memory.operations {
            match (operation.action, operation.end) {
                (Action::Write(_), Some(_)) => counts[0] += 1,
                (Action::Write(_), None) => counts[2] += 1,
                (_, _) => counts[1] += 1,
            }
        }
        counts
    }
}

/// What has to be remembered of one block, in which nothing is under way.
fn condensed(operations: Vec<Operation>, now: u64) -> Vec<Operation> {
    let last = operations.iter().filter(|operation| operation.end.is_some()).max_by_key(|operation| operation.start);
    let Some(Action::Read(found)) = last.map(|operation| operation.action) else { return operations };
    let seen: BTreeSet<u64> = (operations.iter())
        .flat_map(|operation| match operation.action {
            Action::Read(value) => vec![value],
            Action::ReadTorn(values) => values.to_vec(),
            Action::Write(_) => Vec::new(),
        })
        .collect();
    // Seen before and gone now, such a write happened: whoever sees it again sees an old value.
    let may_come = |operation: &Operation| matches!(operation.action, Action::Write(value) if !seen.contains(&value));
    let mut kept: Vec<Operation> =
        operations.iter().filter(|operation| operation.end.is_none() && may_come(operation)).copied().collect();
    let write = operations.iter().find(|operation| operation.action == Action::Write(found));
    if let Some(write) = write {
        kept.push(Operation { start: now, end: Some(now), ..*write });
    }
    kept
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::linear::check;

    fn operation(oracle: &Oracle, action: Action, is_known: bool) -> Operation {
        let (start, end) = (oracle.moment(0), oracle.moment(0));
        Operation { client: 0, block: 0, start, end: is_known.then_some(end), action }
    }

    fn record(actions: &[(Action, bool)]) -> Oracle {
        let oracle = Oracle::default();
        for (action, is_known) in actions {
            oracle.add(operation(&oracle, *action, *is_known));
        }
        check(&oracle.operations()).expect("the example itself is right");
        oracle.condense();
        oracle
    }

    #[test]
    fn what_a_given_up_disk_alone_may_have_had_may_be_gone_and_nothing_else() {
        use Action::{Read, Write};
        let given_up = |actions: &[(Action, bool)]| {
            let oracle = Oracle::default();
            for (action, is_known) in actions {
                oracle.add(operation(&oracle, *action, *is_known));
            }
            oracle.give_up_unanswered();
            oracle
        };
        let shown = [(Write(1), true), (Write(2), false), (Read(2), true)];
        assert!(then_reads(&given_up(&shown), Read(1)));
        assert!(then_reads(&given_up(&shown), Read(2)), "it may be elsewhere");
        assert!(!then_reads(&given_up(&shown), Read(0)), "what was acknowledged is kept");
        let answered = [(Write(1), true), (Write(2), true), (Read(2), true)];
        assert!(!then_reads(&given_up(&answered), Read(1)));
    }

    fn then_reads(oracle: &Oracle, action: Action) -> bool {
        oracle.add(operation(oracle, action, true));
        check(&oracle.operations()).is_ok()
    }

    #[test]
    fn a_condensed_record_still_knows_what_may_be_read() {
        use Action::{Read, ReadTorn, Write};
        let plain = [(Write(1), true), (Write(2), true), (Read(2), true)];
        assert_eq!(record(&plain).operations().len(), 1);
        assert!(then_reads(&record(&plain), Read(2)));
        assert!(!then_reads(&record(&plain), Read(1)), "an older value");
        assert!(!then_reads(&record(&plain), Read(0)), "nothing at all");
        let open = [(Write(1), true), (Write(2), false), (Read(1), true)];
        assert!(then_reads(&record(&open), Read(1)));
        assert!(then_reads(&record(&open), Read(2)), "it may come yet");
        let seen = [(Write(1), false), (Read(1), true), (Write(2), true), (Read(2), true)];
        assert!(!then_reads(&record(&seen), Read(1)), "it had come and was overwritten");
        let torn = [(Write(1), true), (Write(2), false), (ReadTorn([1, 1, 1, 1, 2, 2, 2, 2]), true)];
        assert!(then_reads(&record(&torn), ReadTorn([1, 1, 1, 1, 2, 2, 2, 2])));
        assert!(!then_reads(&record(&torn), Read(1)), "half of it was seen");
    }
}
