//! Puts a load on a disk and notes how long each request took.
//!
//! Always holds:
//! 1. So many requests as the pattern's depth are under way until the last ones are.
//! 2. The time of a request is from before it is sent until its own answer is there, whatever overtakes it. A flush counts
//!    into the time of the whole load, not into that of a request.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::patterns::{Mix, Operation, Pattern};

/// A load, ready to be put on a disk.
pub struct Load<'a> {
    /// What the requests are like.
    pub pattern: &'a Pattern,
    /// The requests, in order.
    pub operations: &'a [Operation],
    /// What each of them writes.
    pub payload: &'a [u8],
    /// No request begins after that.
    pub time_max: Duration,
}

impl Load<'_> {
    /// After how many requests to flush, if at all.
    pub fn flush_every(&self) -> Option<u64> {
        match self.pattern.mix {
            Mix::FlushEvery(count) => Some(count),
            _ => None,
        }
    }
}

/// What came of a load.
pub struct Samples {
    /// Of all of it.
    pub elapsed: Duration,
    /// Of each request, in no order.
    pub latencies: Vec<Duration>,
}

/// Something that a load can be put on.
pub trait Disk {
    /// Does all of a load.
    fn run(&mut self, load: &Load) -> Result<Samples>;
}

/// A connection that takes several requests before it answers the first.
pub trait Pipe {
    /// Sends a request; its answer names `tag`.
    fn send(&mut self, tag: u64, operation: Operation, load: &Load) -> Result<()>;
    /// Sends a flush; its answer names `tag`.
    fn send_flush(&mut self, tag: u64) -> Result<()>;
    /// Takes any one answer and gives its tag.
    fn receive(&mut self) -> Result<u64>;
}

/// A [`Pipe`] under a load.
pub struct Piped<P>(pub P);

impl<P: Pipe> Disk for Piped<P> {
    fn run(&mut self, load: &Load) -> Result<Samples> {
        let mut under_way: HashMap<u64, Instant> = HashMap::new();
        let mut latencies = Vec::with_capacity(load.operations.len());
        let began = Instant::now();
        let mut next = 0;
        let mut is_over = false;
        loop {
            // Up to the next flush, if there are any.
            let limit = match load.flush_every() {
                Some(every) => load.operations.len().min(next + every as usize),
                None => load.operations.len(),
            };
            while next < limit || !under_way.is_empty() {
                while next < limit && under_way.len() < load.pattern.depth && !is_over {
                    under_way.insert(next as u64, Instant::now());
                    self.0.send(next as u64, load.operations[next], load)?;
                    next += 1;
                    is_over = began.elapsed() > load.time_max;
                }
                if under_way.is_empty() {
                    break;
                }
                let tag = self.0.receive()?;
                latencies.push(under_way.remove(&tag).context("an answer nobody waits for")?.elapsed());
            }
            if load.flush_every().is_some() {
                self.0.send_flush(u64::MAX)?;
                if self.0.receive()? != u64::MAX {
                    bail!("an answer in the place of a flush's");
                }
            }
            if is_over || next == load.operations.len() {
                return Ok(Samples { elapsed: began.elapsed(), latencies });
            }
        }
    }
}
