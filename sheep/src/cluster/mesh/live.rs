//! The connections that are open, so that they can be cut when somebody's standing changes.
//!
//! Always holds:
//! 1. A connection that was cut gives nothing but errors on both halves, whoever has them by then.
//! 2. An entry is gone when both halves are.

use std::collections::BTreeMap;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::task::{Context, Poll, Waker};

use sheep_core::member::NodeId;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::types::{Peer, Trust};
use crate::world::net::Connection;

/// What was shown on a connection.
#[derive(Clone, Debug)]
pub(super) struct Shown {
    /// `None` for a client.
    pub peer: Option<Arc<Peer>>,
    /// The generation of the key that was proved.
    pub proved: Option<u32>,
    /// Whether it goes without TLS.
    pub is_plain: bool,
}

/// All of them.
#[derive(Default)]
pub(super) struct Live {
    entries: Mutex<Entries>,
}

#[derive(Default)]
struct Entries {
    next: u64,
    open: BTreeMap<u64, (Weak<Cut>, Shown)>,
}

impl Live {
    /// Adds a connection and gives it back in a form that can be cut.
    pub fn add(self: &Arc<Self>, connection: Connection, shown: Shown) -> (Connection, Arc<Cut>) {
        let mut entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let number = entries.next;
        entries.next += 1;
        let cut = Arc::new(Cut {
            live: Arc::downgrade(self),
            number,
            ended: AtomicBool::new(false),
            wakers: Mutex::new([None, None]),
        });
        entries.open.insert(number, (Arc::downgrade(&cut), shown));
        drop(entries);
        let connection = Connection {
            reader: Box::new(Cuttable { inner: connection.reader, cut: cut.clone() }),
            writer: Box::new(Cuttable { inner: connection.writer, cut: cut.clone() }),
            peer: connection.peer,
        };
        (connection, cut)
    }

    /// Cuts every connection with one node.
    pub fn cut_off(&self, node: NodeId) {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        let of_node =
            entries.open.values().filter(|(_, shown)| shown.peer.as_ref().is_some_and(|peer| peer.node == node));
        let cuts: Vec<Arc<Cut>> = of_node.filter_map(|(cut, _)| cut.upgrade()).collect();
        drop(entries);
        for cut in cuts {
            cut.cut();
        }
    }

    /// Whether a connection with this very process is open.
    pub fn has_one_with(&self, node: NodeId, boot: u64) -> bool {
        let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
        entries.open.values().any(|(cut, shown)| {
            shown.peer.as_ref().is_some_and(|peer| peer.node == node && peer.boot == boot)
                && cut.upgrade().is_some_and(|cut| !cut.is_cut())
        })
    }

    /// Cuts every connection that would not come about again in the same way.
    pub fn reconsider(&self, trust: &dyn Trust) {
        let open: Vec<(Weak<Cut>, Shown)> = {
            let entries = self.entries.lock().unwrap_or_else(PoisonError::into_inner);
            entries.open.values().cloned().collect()
        };
        let generation = trust.key().map(|key| key.generation);
        for (cut, shown) in open {
            let proved = shown.proved.is_some() && shown.proved == generation;
            let stays = match &shown.peer {
                _ if shown.is_plain && !trust.is_open() => false,
                None => proved || trust.is_open(),
                Some(peer) => trust.judge(peer.node, &peer.fingerprint, peer.cluster, proved) == Ok(peer.standing),
            };
            if !stays && let Some(cut) = cut.upgrade() {
                cut.cut();
            }
        }
    }
}

/// Ends one connection from outside.
pub(super) struct Cut {
    live: Weak<Live>,
    number: u64,
    ended: AtomicBool,
    /// Of whoever waits for the reading and for the writing half.
    wakers: Mutex<[Option<Waker>; 2]>,
}

impl Cut {
    /// Ends it.
    pub fn cut(&self) {
        self.ended.store(true, Ordering::SeqCst);
        let mut wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
        wakers.iter_mut().filter_map(Option::take).for_each(Waker::wake);
    }

    /// Whether it was ended.
    pub fn is_cut(&self) -> bool {
        self.ended.load(Ordering::SeqCst)
    }

    fn check(&self) -> io::Result<()> {
        if self.is_cut() {
            Err(io::Error::new(io::ErrorKind::ConnectionAborted, "what the other side may do has changed"))
        } else {
            Ok(())
        }
    }

    /// The result of a half, or the cut's error if that came first.
    fn watch<T>(&self, side: usize, context: &Context<'_>, result: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if result.is_pending() {
            let mut wakers = self.wakers.lock().unwrap_or_else(PoisonError::into_inner);
            match &mut wakers[side] {
                Some(waker) if waker.will_wake(context.waker()) => {}
                slot => *slot = Some(context.waker().clone()),
            }
            drop(wakers);
            // It may have been cut before the waker was there.
            self.check()?;
        }
        result
    }
}

impl Drop for Cut {
    fn drop(&mut self) {
        if let Some(live) = self.live.upgrade() {
            live.entries.lock().unwrap_or_else(PoisonError::into_inner).open.remove(&self.number);
        }
    }
}

const READING: usize = 0;
const WRITING: usize = 1;

struct Cuttable<T> {
    inner: T,
    cut: Arc<Cut>,
}

impl<T: AsyncRead + Unpin> AsyncRead for Cuttable<T> {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.cut.check()?;
        let result = Pin::new(&mut this.inner).poll_read(context, buffer);
        this.cut.watch(READING, context, result)
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Cuttable<T> {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.cut.check()?;
        let result = Pin::new(&mut this.inner).poll_write(context, bytes);
        this.cut.watch(WRITING, context, result)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        slices: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.cut.check()?;
        let result = Pin::new(&mut this.inner).poll_write_vectored(context, slices);
        this.cut.watch(WRITING, context, result)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.cut.check()?;
        let result = Pin::new(&mut this.inner).poll_flush(context);
        this.cut.watch(WRITING, context, result)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        this.cut.check()?;
        let result = Pin::new(&mut this.inner).poll_shutdown(context);
        this.cut.watch(WRITING, context, result)
    }
}
