//! P3. Every node knows the epochs with their members; two nodes never disagree about one, at any time, and no node forgets the
//! latest within one life.

use std::collections::BTreeMap;

/// What was heard so far.
#[derive(Default)]
pub struct Epochs {
    members: BTreeMap<u32, (usize, Vec<String>)>,
    last: BTreeMap<(usize, u64), u32>,
    violations: Vec<String>,
}

impl Epochs {
    /// What the node of a machine, in its `life`, knows.
    pub fn heard(&mut self, host: usize, life: u64, epochs: Vec<(u32, Vec<String>)>) {
        let newest = epochs.iter().map(|(epoch, _)| *epoch).max().unwrap_or(0);
        let last = self.last.entry((host, life)).or_insert(newest);
        if newest < *last {
            self.violations.push(format!("one history: node {host} went back from epoch {last} to {newest}"));
        }
        *last = newest;
        for (epoch, mut members) in epochs {
            members.sort();
            let (first, known) = self.members.entry(epoch).or_insert_with(|| (host, members.clone()));
            if *known != members {
                self.violations.push(format!(
                    "one history: epoch {epoch} has members {known:?} at node {first} and {members:?} at node {host}"
                ));
            }
        }
    }

    /// How many epochs were heard of.
    pub fn count(&self) -> usize {
        self.members.len()
    }

    /// What was contradictory.
    pub fn violations(&self) -> Vec<String> {
        self.violations.clone()
    }
}
