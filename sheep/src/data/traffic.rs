//! Counts what this node is asked, by clients and by other nodes: figures for people, which decide nothing.
//!
//! Always holds: a request counts as active from its beginning until its [`Counted`] is dropped, however it ends. Between nodes
//! and in the native protocol that is before its answer leaves: who has all answers finds nobody active.
//!
//! Counters are moved without any order between them: read together, they may be a request apart.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Who asks.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Side {
    /// Clients, whatever protocol they speak.
    Clients,
    /// Other nodes.
    Peers,
}

/// What is asked.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Work {
    /// To read.
    Read,
    /// To write, or to create.
    Write,
    /// To remove.
    Remove,
    /// To make durable.
    Flush,
    /// Anything else: counted in the total only.
    Other,
}

/// The figures of one side. The alignment keeps clients and nodes, whose requests are carried out by different threads, from
/// sharing a cache line.
#[derive(Default)]
#[repr(align(128))]
struct Counts {
    active: AtomicU64,
    total: AtomicU64,
    reads: AtomicU64,
    writes: AtomicU64,
    removes: AtomicU64,
    flushes: AtomicU64,
    read_bytes: AtomicU64,
    written_bytes: AtomicU64,
}

/// The figures of one side at one moment, since the process began.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Figures {
    /// Requests under way.
    pub active: u64,
    /// Requests in all.
    pub total: u64,
    /// Requests to read.
    pub reads: u64,
    /// Requests to write.
    pub writes: u64,
    /// Requests to remove.
    pub removes: u64,
    /// Requests to make durable.
    pub flushes: u64,
    /// Bytes that were read.
    pub read_bytes: u64,
    /// Bytes that were to be written.
    pub written_bytes: u64,
}

/// See the module.
#[derive(Default)]
pub struct Traffic {
    clients: Counts,
    peers: Counts,
}

/// A request under way.
pub struct Counted {
    traffic: Arc<Traffic>,
    side: Side,
    work: Work,
}

impl Traffic {
    fn of(&self, side: Side) -> &Counts {
        match side {
            Side::Clients => &self.clients,
            Side::Peers => &self.peers,
        }
    }

    /// A request begins that carries so many bytes.
    pub fn begin(self: &Arc<Traffic>, side: Side, work: Work, bytes: usize) -> Counted {
        let counts = self.of(side);
        counts.active.fetch_add(1, Ordering::Relaxed);
        counts.count(work, bytes);
        Counted { traffic: self.clone(), side, work }
    }

    /// A request to read was answered on the spot, with so many bytes.
    pub fn answered_at_once(&self, side: Side, bytes: usize) {
        let counts = self.of(side);
        counts.count(Work::Read, 0);
        counts.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// The figures of one side.
    pub fn figures(&self, side: Side) -> Figures {
        let counts = self.of(side);
        let value = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Figures {
            active: value(&counts.active),
            total: value(&counts.total),
            reads: value(&counts.reads),
            writes: value(&counts.writes),
            removes: value(&counts.removes),
            flushes: value(&counts.flushes),
            read_bytes: value(&counts.read_bytes),
            written_bytes: value(&counts.written_bytes),
        }
    }
}

impl Counts {
    fn count(&self, work: Work, bytes: usize) {
        self.total.fetch_add(1, Ordering::Relaxed);
        let counter = match work {
            Work::Read => &self.reads,
            Work::Write => {
                self.written_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
                &self.writes
            }
            Work::Remove => &self.removes,
            Work::Flush => &self.flushes,
            Work::Other => return,
        };
        counter.fetch_add(1, Ordering::Relaxed);
    }
}

impl Counted {
    /// The answer carries so many bytes.
    pub fn answered(&self, bytes: usize) {
        if self.work == Work::Read {
            self.traffic.of(self.side).read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
        }
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.traffic.of(self.side).active.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_active_until_it_is_dropped() {
        let traffic = Arc::new(Traffic::default());
        let read = traffic.begin(Side::Clients, Work::Read, 0);
        let write = traffic.begin(Side::Clients, Work::Write, 4096);
        assert_eq!(traffic.figures(Side::Clients).active, 2);
        read.answered(512);
        write.answered(7);
        drop((read, write));
        traffic.answered_at_once(Side::Clients, 100);
        let expected =
            Figures { total: 3, reads: 2, writes: 1, read_bytes: 612, written_bytes: 4096, ..Figures::default() };
        assert_eq!(traffic.figures(Side::Clients), expected);
        assert_eq!(traffic.figures(Side::Peers), Figures::default());
    }

    #[test]
    fn what_is_neither_counts_in_the_total() {
        let traffic = Arc::new(Traffic::default());
        for work in [Work::Remove, Work::Flush, Work::Other] {
            drop(traffic.begin(Side::Peers, work, 10));
        }
        let expected = Figures { total: 3, removes: 1, flushes: 1, ..Figures::default() };
        assert_eq!(traffic.figures(Side::Peers), expected);
    }
}
