//! What a guest that writes without waiting for the disks was promised about one block.
//!
//! Which writes may be found there:
//! 1. After a flush that came back well, nothing older than the last write that was acknowledged on the same connection before
//!    the flush began. What was written over another connection is not counted: that one ended, and nobody flushed it.
//! 2. Every later write, acknowledged or not, since power may be lost at any time; and for good every write whose outcome is
//!    unknown.
//!
//! A write that was durable when it was answered leaves nothing older.

use std::fmt;

/// See the top of this file. Writes are numbers, 0 for zeros.
#[derive(Clone, Debug, Default)]
pub struct Promise {
    /// The write that was made durable last; 0 before the first.
    kept: u64,
    /// Acknowledged since, with the number of the connection, in order.
    since: Vec<(u64, u64)>,
    /// Never answered.
    unknown: Vec<u64>,
}

impl Promise {
    /// Whether this write may be what is found.
    pub fn allows(&self, value: u64) -> bool {
        value == self.kept || self.since.iter().any(|(other, _)| *other == value) || self.unknown.contains(&value)
    }

    /// A write was answered well, on this connection.
    pub fn acknowledged(&mut self, value: u64, connection: u64) {
        self.since.push((value, connection));
    }

    /// A write was answered well that is durable then.
    pub fn acknowledged_durable(&mut self, value: u64) {
        self.kept = value;
        self.since.clear();
    }

    /// A write had no good answer.
    pub fn unanswered(&mut self, value: u64) {
        if !self.unknown.contains(&value) {
            self.unknown.push(value);
        }
    }

    /// Everything acknowledged on this connection is durable.
    pub fn flushed(&mut self, connection: u64) {
        if let Some(last) = self.since.iter().rposition(|(_, on)| *on == connection) {
            self.kept = self.since[last].0;
            self.since.drain(..=last);
        }
    }
}

impl fmt::Display for Promise {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kept, since, unknown) = (self.kept, &self.since, &self.unknown);
        write!(f, "durable is {kept}, {since:?} came since, {unknown:?} were never answered")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flush_covers_its_own_connection() {
        let mut promise = Promise::default();
        promise.acknowledged(1, 1);
        promise.acknowledged(2, 2);
        promise.acknowledged(3, 1);
        promise.flushed(2);
        assert!(!promise.allows(0) && !promise.allows(1), "2 is durable, and they are older");
        assert!(promise.allows(2) && promise.allows(3));
        promise.unanswered(4);
        promise.flushed(1);
        assert!(promise.allows(3) && promise.allows(4) && !promise.allows(2));
        promise.acknowledged(5, 1);
        promise.acknowledged_durable(6);
        assert!(promise.allows(6) && promise.allows(4) && !promise.allows(5));
    }
}
