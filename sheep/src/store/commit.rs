//! Group commit: admission to the journal, batches, and the news that something is durable.
//!
//! Write path 6 of 6.
//!
//! Always holds:
//! 1. A batch goes to the journal only if it fits beside everything that is not checkpointed.
//! 2. While one batch is being flushed, new records gather for the next; an idle journal never waits for company.
//! 3. A ticket completes with success only after the flush of a batch that contains its record.

use std::sync::{Arc, PoisonError};

use tokio::sync::oneshot;

use super::checksum::BLOCK_BYTES;
use super::journal::Position;
use super::record::{self, BATCH_HEAD_BYTES, RECORD_HEAD_BYTES, Record};
use super::state::{Committed, Inner, Permit, Queued, Shared};
use super::ticket::Ticket;
use super::{Store, StoreError, hint};
use crate::world::disk::Files;

/// Most bytes of records in one batch, unless a single one is larger: a flush of more gains nothing, and the buffer
/// stays small.
const BATCH_BYTES_MAX: u64 = 4 << 20;

/// Journal space that a record may take at worst: alone in a batch.
pub fn cost_of(data_bytes: u64) -> u64 {
    (BATCH_HEAD_BYTES + RECORD_HEAD_BYTES + BLOCK_BYTES) as u64 + data_bytes
}

impl Store {
    /// Waits for room for a write of at most `bytes`. Rooms are given in the order of the calls.
    pub async fn admit(&self, bytes: u64) -> Permit {
        let cost = cost_of(bytes);
        let receiver = {
            let mut inner = self.shared.lock();
            // What can never fit is refused by `submit`, which can say so.
            if inner.failed.is_some() || bytes > inner.write_bytes_max() {
                return Permit::new(&self.shared, 0, bytes);
            }
            if inner.admissions.is_empty() && inner.has_room(cost) {
                inner.reserved_bytes += cost;
                return Permit::new(&self.shared, cost, bytes);
            }
            let (sender, receiver) = oneshot::channel();
            inner.admissions.push_back((cost, bytes, sender));
            receiver
        };
        self.shared.with(|_| ());
        match receiver.await {
            Ok(permit) => permit,
            Err(_) => Permit::new(&self.shared, 0, bytes),
        }
    }

    /// As [`Store::admit`], if there is room now and nobody waits for some.
    pub fn try_admit(&self, bytes: u64) -> Option<Permit> {
        let cost = cost_of(bytes);
        let mut inner = self.shared.lock();
        let may = inner.failed.is_none() && bytes <= inner.write_bytes_max();
        if !may || !inner.admissions.is_empty() || !inner.has_room(cost) {
            return None;
        }
        inner.reserved_bytes += cost;
        Some(Permit::new(&self.shared, cost, bytes))
    }

    /// A permit that takes its room whether or not there is any: for the few writes whose order leaves no time to wait
    /// (those sent again after a change of members). They wait in memory until the journal has room.
    pub fn admit_now(&self, bytes: u64) -> Permit {
        let cost = cost_of(bytes);
        let mut inner = self.shared.lock();
        if inner.failed.is_some() || bytes > inner.write_bytes_max() {
            return Permit::new(&self.shared, 0, bytes);
        }
        inner.reserved_bytes += cost;
        Permit::new(&self.shared, cost, bytes)
    }

    /// Completes when everything submitted before is durable.
    pub async fn flush(&self) -> Result<(), StoreError> {
        let ticket = self.shared.with(|inner| {
            let last = inner.submitted;
            inner.ticket(last)
        });
        ticket.await
    }
}

impl Inner {
    /// Most payload bytes of one write: the journal must be able to free as much while something else is in it.
    pub fn write_bytes_max(&self) -> u64 {
        self.ring_bytes / 8 * 5 - cost_of(0)
    }

    /// A ticket for a record's durability; asks for its commit.
    pub fn ticket(&mut self, number: u64) -> Ticket {
        if self.durable >= number {
            return Ticket::done(Ok(()));
        }
        if let Some(what) = &self.failed {
            return Ticket::done(Err(StoreError::Failed { what: what.clone() }));
        }
        let (ticket, waiter) = Ticket::pair();
        self.wanted = self.wanted.max(number);
        let at = self.waiters.partition_point(|(other, _)| *other <= number);
        self.waiters.insert(at, (number, waiter));
        ticket
    }

    /// Takes the records of the next batch off the queue, or ends the commit job.
    fn next_batch(&mut self) -> Option<(Position, Vec<Queued>)> {
        if self.failed.is_some() || self.durable >= self.wanted || self.queue.is_empty() {
            self.committing = false;
            return None;
        }
        let room = self.ring_bytes - self.journal_used_bytes();
        let mut bytes = 0;
        let mut count = 0;
        for queued in &self.queue {
            let next = bytes + queued.record.encoded_bytes();
            if record::batch_bytes(next) > room || (count > 0 && next > BATCH_BYTES_MAX) {
                break;
            }
            bytes = next;
            count += 1;
        }
        if count == 0 {
            self.committing = false;
            self.commit_blocked = true;
            return None;
        }
        let batch: Vec<Queued> = self.queue.drain(..count).collect();
        self.queued_bytes -= batch.iter().map(|queued| queued.record.data.len() as u64).sum::<u64>();
        Some((self.head, batch))
    }

    /// A batch is durable.
    fn committed(&mut self, length_bytes: u64, batch: Vec<Queued>) {
        self.head = self.head.after_batch(length_bytes);
        let count = batch.len();
        for (index, queued) in batch.into_iter().enumerate() {
            assert_eq!(queued.number, self.durable + 1, "records become durable in the order of their numbers");
            self.durable = queued.number;
            self.reserved_bytes -= queued.cost;
            let batch_end = (index + 1 == count).then_some(self.head);
            self.apply_queue.push_back(Committed { queued, batch_end });
        }
        while self.waiters.front().is_some_and(|(number, _)| *number <= self.durable) {
            if let Some((_, waiter)) = self.waiters.pop_front() {
                self.notices.push((waiter, Ok(())));
            }
        }
    }
}

impl Shared {
    /// The commit job: batch after batch until nothing is wanted any more. Then it applies them, if nobody else does: for a
    /// client with one write under way that is one thread less to wake for each.
    pub fn commit_queued(self: &Arc<Self>, files: &dyn Files) {
        let mut next = self.with(Inner::next_batch);
        while let Some((position, batch)) = next {
            let result = {
                let mut journal = self.journal.lock().unwrap_or_else(PoisonError::into_inner);
                journal.append(position, batch.iter().map(|queued| &queued.record as &Record))
            };
            let length_bytes = match result {
                Ok(length_bytes) => length_bytes,
                Err(error) => {
                    let what = format!("{}: write: {error}{}", self.layout.journal().display(), hint(&error));
                    self.with(|inner| inner.fail(&what));
                    return;
                }
            };
            let (after, apply_is_left) = self.with_apply_left(|inner| {
                inner.committed(length_bytes, batch);
                let after = inner.next_batch();
                let is_free = after.is_none();
                (after, is_free)
            });
            if apply_is_left {
                self.apply_committed(files);
            }
            next = after;
        }
    }
}
