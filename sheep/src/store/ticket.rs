//! The news that a change is as durable as was asked for: one event, for one future or one callback.
//!
//! A callback runs on the thread that brings the news, without a task that would have to be woken for it. Under load that is
//! one task and one wake-up less for each copy of each write.

use std::future::Future;
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll, Waker};

use super::StoreError;

/// How a change ended.
pub type Outcome = Result<(), StoreError>;

/// Completes when a change is as durable as was asked for.
#[must_use = "a ticket that is dropped tells nobody that the write failed"]
pub struct Ticket {
    state: State,
}

enum State {
    Done(Outcome),
    Waiting(Arc<Event>),
}

/// The side that brings the news. Dropped without any, it says that the store is closed.
pub struct Waiter {
    event: Arc<Event>,
}

#[derive(Default)]
struct Event {
    slot: Mutex<Slot>,
}

/// What an event holds.
#[derive(Default)]
enum Slot {
    /// Neither news nor anybody who waits.
    #[default]
    Open,
    Future(Waker),
    Call(Box<dyn FnOnce(Outcome) + Send>),
    Done(Outcome),
}

impl Event {
    fn slot(&self) -> MutexGuard<'_, Slot> {
        self.slot.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Ticket {
    pub(super) fn done(outcome: Outcome) -> Ticket {
        Ticket { state: State::Done(outcome) }
    }

    /// The ticket of a change that the store refused.
    pub fn failed(error: StoreError) -> Ticket {
        Ticket::done(Err(error))
    }

    /// A ticket, and who completes it.
    pub(super) fn pair() -> (Ticket, Waiter) {
        let event = Arc::new(Event::default());
        (Ticket { state: State::Waiting(event.clone()) }, Waiter { event })
    }

    /// Whether waiting for it takes no time.
    pub fn is_done(&self) -> bool {
        matches!(self.state, State::Done(_))
    }

    /// Whether it is known already that all went well.
    pub fn is_success(&self) -> bool {
        matches!(self.state, State::Done(Ok(())))
    }

    /// Calls back with the outcome, from another thread or task: never before this returns on the caller's own stack, so the
    /// caller may hold what the callback needs.
    pub fn then(self, call: impl FnOnce(Outcome) + Send + 'static) {
        let outcome = match self.state {
            State::Done(outcome) => outcome,
            State::Waiting(event) => {
                let mut slot = event.slot();
                match std::mem::take(&mut *slot) {
                    Slot::Done(outcome) => outcome,
                    _ => {
                        *slot = Slot::Call(Box::new(call));
                        return;
                    }
                }
            }
        };
        tokio::spawn(async move { call(outcome) });
    }
}

impl Future for Ticket {
    type Output = Outcome;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Outcome> {
        let event = match &self.state {
            State::Done(outcome) => return Poll::Ready(outcome.clone()),
            State::Waiting(event) => event,
        };
        let mut slot = event.slot();
        if let Slot::Done(outcome) = &*slot {
            return Poll::Ready(outcome.clone());
        }
        *slot = Slot::Future(context.waker().clone());
        Poll::Pending
    }
}

impl Waiter {
    /// Brings the news.
    pub fn complete(self, outcome: Outcome) {
        self.tell(outcome);
    }

    fn tell(&self, outcome: Outcome) {
        let mut slot = self.event.slot();
        match std::mem::take(&mut *slot) {
            Slot::Open => *slot = Slot::Done(outcome),
            Slot::Future(waker) => {
                *slot = Slot::Done(outcome);
                drop(slot);
                waker.wake();
            }
            Slot::Call(call) => {
                drop(slot);
                call(outcome);
            }
            done @ Slot::Done(_) => *slot = done,
        }
    }
}

impl Drop for Waiter {
    fn drop(&mut self) {
        // Changes nothing if the news was brought.
        self.tell(Err(StoreError::Closed));
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[tokio::test]
    async fn a_future_and_a_callback_hear_the_same() {
        let (ticket, waiter) = Ticket::pair();
        let waiting = tokio::spawn(ticket);
        tokio::task::yield_now().await;
        waiter.complete(Ok(()));
        assert_eq!(waiting.await.unwrap(), Ok(()));

        let (ticket, waiter) = Ticket::pair();
        let (sender, receiver) = channel();
        ticket.then(move |outcome| sender.send(outcome).unwrap());
        assert!(receiver.try_recv().is_err(), "not before the news");
        waiter.complete(Ok(()));
        assert_eq!(receiver.try_recv(), Ok(Ok(())), "on the thread that brought it, once");
        assert!(receiver.try_recv().is_err());
    }

    #[tokio::test]
    async fn news_that_came_first_is_kept_and_told_by_another_task() {
        let (ticket, waiter) = Ticket::pair();
        waiter.complete(Ok(()));
        assert_eq!(ticket.await, Ok(()));

        let (ticket, waiter) = Ticket::pair();
        waiter.complete(Ok(()));
        let (sender, receiver) = tokio::sync::oneshot::channel();
        let held = Mutex::new(());
        let guard = held.lock().unwrap();
        ticket.then(move |outcome| sender.send(outcome).unwrap());
        drop(guard);
        assert_eq!(receiver.await, Ok(Ok(())));
    }

    #[tokio::test]
    async fn no_news_is_that_the_store_closed() {
        let (ticket, waiter) = Ticket::pair();
        drop(waiter);
        assert_eq!(ticket.await, Err(StoreError::Closed));
        let (ticket, waiter) = Ticket::pair();
        let (sender, receiver) = channel();
        ticket.then(move |outcome| sender.send(outcome).unwrap());
        drop(waiter);
        assert_eq!(receiver.try_recv(), Ok(Err(StoreError::Closed)));
    }
}
