//! Whether a record of reads and writes can be explained by one history: linearizability, sector by sector.
//!
//! Every write of the record puts a number of its own into a 4 KiB block, so a read tells from which write it comes. For such a
//! register the question has a quick answer (Gibbons and Korach, "Testing shared memories", 1997, section 4.1): take each
//! write with its reads as one cluster, with `first_end`, the earliest end, and `last_start`, the latest start of any of them.
//! All of a cluster must come in one piece, since afterwards another value is there. Cluster A must precede cluster B if
//! `A.first_end < B.last_start`; the record is explained exactly if no two clusters must precede each other, and no read
//! ends before its write begins. A small search over all orders agrees with this in the tests below.
//!
//! Always holds:
//! 1. A write whose outcome is unknown may have happened at any time after its beginning, or never; once. If nobody read it,
//!    it is taken as one that never happened.
//! 2. A read whose outcome is unknown says nothing.
//! 3. Times come from one clock; two operations of which one ends exactly when the other begins count as simultaneous.
//!
//! Blocks are read whole, but a disk promises its sectors of 512 bytes only: a block that any read showed torn is checked as
//! eight registers. [`Verdict::torn_count`] tells of it, and the test decides whether it may be.

use std::collections::BTreeMap;
use std::fmt;

use crate::sectors::SECTORS_PER_BLOCK;

/// The value of a block that was never written.
pub const NEVER_WRITTEN: u64 = 0;
/// The end of an operation of which nobody knows whether it ended.
const NEVER: u64 = u64::MAX;

/// What was done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Action {
    /// Wrote this number, used once for this block.
    Write(u64),
    /// Found this number.
    Read(u64),
    /// Found these numbers in the block's sectors, not all of them equal.
    ReadTorn([u64; SECTORS_PER_BLOCK]),
}

impl Action {
    /// Found these in a block's sectors.
    pub fn read(values: [u64; SECTORS_PER_BLOCK]) -> Action {
        let is_whole = values.iter().all(|&value| value == values[0]);
        if is_whole { Action::Read(values[0]) } else { Action::ReadTorn(values) }
    }
}

/// One operation on one block.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Operation {
    /// Who did it, for messages.
    pub client: u32,
    /// Which block.
    pub block: u32,
    /// When it was sent, nanoseconds of the test's clock, which begins at 1: 0 is before everything.
    pub start: u64,
    /// When its answer came; `None` for a write whose outcome is unknown.
    pub end: Option<u64>,
    /// See [`Action`].
    pub action: Action,
}

impl fmt::Display for Operation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seconds = |at: u64| at as f64 / 1e9;
        write!(f, "client {} from {:.6} s ", self.client, seconds(self.start))?;
        match self.end {
            Some(end) => write!(f, "to {:.6} s: ", seconds(end))?,
            None => write!(f, "with unknown outcome: ")?,
        }
        match self.action {
            Action::Write(value) => write!(f, "wrote {value}"),
            Action::Read(value) => write!(f, "read {value}"),
            Action::ReadTorn(values) => write!(f, "read {values:?}"),
        }
    }
}

/// A record that was explained.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Verdict {
    /// Operations that were looked at.
    pub operation_count: usize,
    /// Reads that showed sectors of different writes.
    pub torn_count: usize,
}

/// Why no history explains a record.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Violation {
    /// Which block.
    pub block: u32,
    /// What is wrong.
    pub what: String,
    /// The operations that cannot go together.
    pub evidence: Vec<Operation>,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "block {}: {}", self.block, self.what)?;
        for operation in &self.evidence {
            write!(f, "\n  {operation}")?;
        }
        Ok(())
    }
}

impl std::error::Error for Violation {}

/// A write and the reads that saw it.
struct Cluster {
    value: u64,
    first_end: u64,
    last_start: u64,
    /// The operations that `first_end` and `last_start` come from.
    first_ended: Operation,
    last_started: Operation,
}

impl Cluster {
    fn new(value: u64, operation: Operation) -> Cluster {
        Cluster {
            value,
            first_end: operation.end.unwrap_or(NEVER),
            last_start: operation.start,
            first_ended: operation,
            last_started: operation,
        }
    }

    fn add(&mut self, operation: Operation) {
        let end = operation.end.unwrap_or(NEVER);
        if end < self.first_end {
            (self.first_end, self.first_ended) = (end, operation);
        }
        if operation.start > self.last_start {
            (self.last_start, self.last_started) = (operation.start, operation);
        }
    }

    fn must_precede(&self, other: &Cluster) -> bool {
        self.first_end < other.last_start
    }

    /// Whether any other cluster that lies between its first end and its last start would cut it in two.
    fn is_stretched(&self) -> bool {
        self.first_end < self.last_start
    }
}

/// Fails with the first thing that no history explains. Blocks hold [`NEVER_WRITTEN`] at first.
pub fn check(operations: &[Operation]) -> Result<Verdict, Violation> {
    let mut blocks: BTreeMap<u32, Vec<Operation>> = BTreeMap::new();
    for operation in operations {
        blocks.entry(operation.block).or_default().push(*operation);
    }
    let mut verdict = Verdict { operation_count: operations.len(), torn_count: 0 };
    for (block, operations) in blocks {
        let torn = operations.iter().filter(|operation| matches!(operation.action, Action::ReadTorn(_))).count();
        verdict.torn_count += torn;
        let sectors = if torn == 0 { 1 } else { SECTORS_PER_BLOCK };
        for sector in 0..sectors {
            let seen = operations.iter().map(|operation| match operation.action {
                Action::ReadTorn(values) => Operation { action: Action::Read(values[sector]), ..*operation },
                _ => *operation,
            });
            check_register(seen).map_err(|(what, evidence)| Violation { block, what, evidence })?;
        }
    }
    Ok(verdict)
}

fn check_register(operations: impl Iterator<Item = Operation>) -> Result<(), (String, Vec<Operation>)> {
    let mut writes: BTreeMap<u64, Operation> = BTreeMap::new();
    let mut reads: Vec<(u64, Operation)> = Vec::new();
    for operation in operations {
        assert_ne!(operation.start, 0, "nothing happens before the clock begins");
        match operation.action {
            Action::Write(value) => {
                assert_ne!(value, NEVER_WRITTEN, "a write of what stands for no write");
                let earlier = writes.insert(value, operation);
                assert!(earlier.is_none(), "{value} was written twice: the record cannot be checked");
            }
            Action::Read(value) if operation.end.is_some() => reads.push((value, operation)),
            Action::Read(_) | Action::ReadTorn(_) => {}
        }
    }
    let mut clusters: BTreeMap<u64, Cluster> = BTreeMap::new();
    for (value, read) in reads {
        if value == NEVER_WRITTEN {
            // As if written before all time.
            let start = Operation { client: 0, block: read.block, start: 0, end: Some(0), action: Action::Write(0) };
            clusters.entry(value).or_insert_with(|| Cluster::new(value, start)).add(read);
            continue;
        }
        let Some(write) = writes.get(&value) else {
            return Err((format!("{value} was read and never written"), vec![read]));
        };
        if read.end.unwrap_or(NEVER) < write.start {
            return Err((format!("{value} was read before it was written"), vec![read, *write]));
        }
        clusters.entry(value).or_insert_with(|| Cluster::new(value, *write)).add(read);
    }
    for (value, write) in writes {
        if write.end.is_some() {
            clusters.entry(value).or_insert_with(|| Cluster::new(value, write));
        }
    }
    conflicts(clusters.into_values().collect())
}

/// Two clusters that must precede each other: two stretched ones that overlap, or one that lies within a stretched one.
fn conflicts(mut clusters: Vec<Cluster>) -> Result<(), (String, Vec<Operation>)> {
    clusters.sort_by_key(|cluster| (cluster.first_end, cluster.last_start));
    let (stretched, others): (Vec<Cluster>, Vec<Cluster>) = clusters.into_iter().partition(Cluster::is_stretched);
    for pair in stretched.windows(2) {
        compare(&pair[0], &pair[1])?;
    }
    // Now the stretched ones follow each other without overlap.
    for other in &others {
        // Of those whose first end lies before this one's last start, only the latest can reach beyond its first end.
        let index = stretched.partition_point(|cluster| cluster.first_end < other.last_start);
        if let Some(before) = index.checked_sub(1) {
            compare(&stretched[before], other)?;
        }
    }
    Ok(())
}

fn compare(one: &Cluster, other: &Cluster) -> Result<(), (String, Vec<Operation>)> {
    if !(one.must_precede(other) && other.must_precede(one)) {
        return Ok(());
    }
    let what = format!("{} and {} were each there before the other", one.value, other.value);
    Err((what, vec![one.first_ended, other.last_started, other.first_ended, one.last_started]))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sim::Random;

    fn operation(client: u32, start: u64, end: u64, action: Action) -> Operation {
        // The examples count from 0.
        Operation { client, block: 0, start: start + 1, end: (end != NEVER).then_some(end.wrapping_add(1)), action }
    }

    fn write(start: u64, end: u64, value: u64) -> Operation {
        operation(1, start, end, Action::Write(value))
    }

    fn read(start: u64, end: u64, value: u64) -> Operation {
        operation(2, start, end, Action::Read(value))
    }

    /// Searches all orders (Wing and Gong), for records of a few operations.
    fn is_explained(operations: &[Operation]) -> bool {
        fn search(left: &[Operation], value: u64) -> bool {
            if left.iter().all(|operation| operation.end.is_none()) {
                return true;
            }
            let first_end = left.iter().map(|operation| operation.end.unwrap_or(NEVER)).min().unwrap_or(NEVER);
            (0..left.len()).any(|index| {
                let next = left[index];
                let after = match next.action {
                    Action::Write(written) => written,
                    Action::Read(found) if found == value => value,
                    _ => return false,
                };
                let mut rest = left.to_vec();
                rest.remove(index);
                next.start <= first_end && search(&rest, after)
            })
        }
        let known: Vec<Operation> = operations
            .iter()
            .filter(|operation| operation.end.is_some() || matches!(operation.action, Action::Write(_)))
            .copied()
            .collect();
        search(&known, NEVER_WRITTEN)
    }

    fn good(operations: &[Operation]) {
        assert!(is_explained(operations), "the example itself is wrong: {operations:?}");
        if let Err(violation) = check(operations) {
            panic!("{violation}");
        }
    }

    fn bad(operations: &[Operation]) {
        assert!(!is_explained(operations), "the example itself is wrong: {operations:?}");
        check(operations).expect_err("no history explains this");
    }

    #[test]
    fn what_one_history_explains() {
        good(&[]);
        good(&[read(0, 1, 0)]);
        good(&[write(0, 1, 1), read(2, 3, 1)]);
        // While a write runs, its value and the one before may be read, the new one once seen for good.
        good(&[write(0, 1, 1), write(2, 9, 2), read(3, 4, 1), read(5, 6, 2)]);
        good(&[write(0, 9, 1), read(1, 2, 0), read(3, 4, 1)]);
        // Two writes at once: either order.
        good(&[write(0, 9, 1), write(0, 9, 2), read(10, 11, 1)]);
        good(&[write(0, 9, 1), write(0, 9, 2), read(10, 11, 2)]);
    }

    #[test]
    fn what_no_history_explains() {
        // Lost, though acknowledged.
        bad(&[write(0, 1, 1), read(2, 3, 0)]);
        bad(&[write(0, 1, 1), write(2, 3, 2), read(4, 5, 1)]);
        // Seen, and then not.
        bad(&[write(0, 9, 1), read(1, 2, 1), read(3, 4, 0)]);
        // Two readers that disagree on the order.
        bad(&[write(0, 1, 1), write(0, 1, 2), read(2, 3, 1), read(4, 5, 2)]);
        bad(&[write(0, 9, 1), write(0, 9, 2), read(1, 2, 1), read(3, 4, 2), read(5, 6, 1)]);
        // From nowhere, or from the future.
        bad(&[read(0, 1, 7)]);
        bad(&[read(0, 1, 7), write(2, 3, 7)]);
    }

    #[test]
    fn unknown_outcomes_stay_unknown() {
        good(&[write(0, NEVER, 1), read(2, 3, 0)]);
        good(&[write(0, NEVER, 1), read(2, 3, 1)]);
        // Much later, and for good.
        good(&[write(0, NEVER, 1), write(2, 3, 2), read(4, 5, 2), read(6, 7, 1)]);
        bad(&[write(0, NEVER, 1), write(2, 3, 2), read(4, 5, 1), read(6, 7, 2)]);
        // Not twice.
        bad(&[write(0, NEVER, 1), read(1, 2, 1), write(3, 4, 2), read(5, 6, 2), read(7, 8, 1)]);
        // Not before it began.
        bad(&[read(0, 1, 1), write(2, NEVER, 1)]);
        // A read without an answer says nothing.
        good(&[write(0, 1, 1), read(2, NEVER, 0)]);
    }

    #[test]
    fn blocks_are_apart_and_torn_ones_are_checked_by_sector() {
        let elsewhere = Operation { block: 1, ..read(2, 3, 0) };
        check(&[write(0, 1, 1), elsewhere]).expect("another block");
        let torn = |start, end, values| operation(3, start, end, Action::ReadTorn(values));
        let while_written = torn(2, 3, [2, 2, 1, 1, 1, 1, 1, 1]);
        let verdict = check(&[write(0, 1, 1), write(2, NEVER, 2), while_written]).expect("may be torn");
        assert_eq!(verdict, Verdict { operation_count: 3, torn_count: 1 });
        // Once acknowledged, all of it is there.
        check(&[write(0, 1, 1), write(2, 3, 2), torn(4, 5, [2, 2, 1, 1, 1, 1, 1, 1])]).expect_err("half is lost");
        // What a sector showed stays.
        let back = torn(6, 7, [1, 2, 2, 2, 2, 2, 2, 2]);
        check(&[write(0, 1, 1), write(2, NEVER, 2), while_written, back]).expect_err("the first sector went back");
    }

    /// Small records with random values and times: the quick check and the search over all orders must agree.
    #[test]
    fn the_quick_check_agrees_with_the_search_over_all_orders() {
        let mut explained = 0;
        const CASES: u64 = 40_000;
        for seed in 0..CASES {
            let mut rng = Random::new(seed);
            let count = 2 + rng.below(6);
            let span = 4 + rng.below(12);
            let mut written = 0;
            let operations: Vec<Operation> = (0..count)
                .map(|_| {
                    let start = rng.below(span);
                    let end = if rng.one_in(6) { NEVER } else { start + rng.below(5) };
                    if rng.one_in(2) {
                        written += 1;
                        write(start, end, written)
                    } else {
                        read(start, end, rng.below(written + 1))
                    }
                })
                .collect();
            let expected = is_explained(&operations);
            explained += u64::from(expected);
            assert_eq!(check(&operations).is_ok(), expected, "seed {seed}: {operations:?}");
        }
        assert!((CASES / 10..CASES * 9 / 10).contains(&explained), "{explained} of {CASES}: the cases say little");
    }

    /// A register that takes each operation at a random moment between its start and its end.
    fn real_record(operation_count: u64, block_count: u64, seed: u64) -> Vec<Operation> {
        let mut rng = Random::new(seed);
        let mut plan: Vec<(u64, Operation)> = (0..operation_count)
            .map(|index| {
                let start = 1 + index * 100 + rng.below(3000);
                let end = start + 1 + rng.below(10_000);
                let moment = start + rng.below(end - start + 1);
                let action = if rng.one_in(2) { Action::Write(index + 1) } else { Action::Read(0) };
                let end = (!rng.one_in(50)).then_some(end);
                let block = rng.below(block_count) as u32;
                (moment, Operation { client: (index % 16) as u32, block, start, end, action })
            })
            .collect();
        plan.sort_by_key(|&(moment, _)| moment);
        let mut values: BTreeMap<u32, u64> = BTreeMap::new();
        for (_, operation) in &mut plan {
            match &mut operation.action {
                // Of the unknown ones every other one happens.
                Action::Write(value) if operation.end.is_some() || value.is_multiple_of(2) => {
                    values.insert(operation.block, *value);
                }
                Action::Read(found) => *found = values.get(&operation.block).copied().unwrap_or(0),
                _ => {}
            }
        }
        plan.into_iter().map(|(_, operation)| operation).collect()
    }

    #[test]
    fn a_real_register_passes_and_a_lossy_one_does_not() {
        for seed in 0..20 {
            let record = real_record(5000, 8, seed);
            check(&record).unwrap_or_else(|violation| panic!("seed {seed}: {violation}"));
            // One read, late in the record, shows what was overwritten long before.
            let mut lossy = record.clone();
            let read = lossy.iter().rposition(|operation| matches!(operation.action, Action::Read(_)));
            let read = read.expect("there are reads");
            let block = lossy[read].block;
            let old = record.iter().find_map(|operation| match operation.action {
                Action::Write(value) if operation.block == block && operation.end.is_some() => Some(value),
                _ => None,
            });
            lossy[read].action = Action::Read(old.expect("there are writes"));
            lossy[read].end = lossy[read].end.or(Some(NEVER - 1));
            check(&lossy).expect_err("an old value");
        }
    }

    #[test]
    fn a_long_record_is_checked_quickly() {
        let record = real_record(200_000, 64, 77);
        let started = std::time::Instant::now();
        let verdict = check(&record).unwrap_or_else(|violation| panic!("{violation}"));
        eprintln!("{} operations on 64 blocks checked in {:.0?}", verdict.operation_count, started.elapsed());
        assert!(started.elapsed() < std::time::Duration::from_secs(20), "too slow to be of use");
    }
}
