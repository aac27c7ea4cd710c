//! Whole messages over a byte stream, many per system call.
//!
//! [`FrameReader`] takes large gulps and hands out slices of them without copying. [`FrameSender`] queues messages for one
//! task that writes everything queued with one vectored call, so that under load a system call carries many small
//! messages and on an idle connection a message leaves at once. A thread that is not of the runtime writes them itself
//! ([`sent_together`]): to wake the task would cost it, and whoever waits for the answer, more.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::future::poll_fn;
use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError};
use std::task::{Context, Poll, Waker, ready};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::sync::Notify;

/// Bytes asked for at once: 64 requests of 4 KiB. Smaller gulps cost system calls under load, larger ones memory per
/// connection (the buffer is shared by the payloads cut from it and lives as long as the last of them).
const GULP_BYTES: usize = 256 << 10;
/// Most room made at once for what a header promised. Until the bytes arrive it takes addresses and no memory; a buffer that
/// grew with them copied large payloads once more.
const PROMISED_BYTES_MAX: usize = 4 << 20;
/// Slices per vectored write (IOV_MAX is 1,024): 64 messages of two slices.
const SLICES_MAX: usize = 128;

/// Cuts messages out of a byte stream.
pub struct FrameReader {
    reader: Box<dyn AsyncRead + Send + Unpin>,
    buffer: BytesMut,
}

impl FrameReader {
    /// Reads from the start of `reader`.
    pub fn new(reader: Box<dyn AsyncRead + Send + Unpin>) -> FrameReader {
        FrameReader { reader, buffer: BytesMut::new() }
    }

    /// The next `N` bytes; `None` at a clean end before any of them. An end in the middle is an error.
    pub async fn header<const N: usize>(&mut self) -> io::Result<Option<[u8; N]>> {
        if !self.fill(N).await? {
            return Ok(None);
        }
        let mut header = [0; N];
        self.buffer.copy_to_slice(&mut header);
        Ok(Some(header))
    }

    /// The next `length` bytes. The caller has checked the length against its caps.
    pub async fn payload(&mut self, length: usize) -> io::Result<Bytes> {
        if length == 0 {
            return Ok(Bytes::new());
        }
        if self.fill(length).await? {
            Ok(self.buffer.split_to(length).freeze())
        } else {
            Err(io::ErrorKind::UnexpectedEof.into())
        }
    }

    /// The byte stream, unless bytes of it were taken and not given out.
    pub fn into_inner(self) -> Option<Box<dyn AsyncRead + Send + Unpin>> {
        self.buffer.is_empty().then_some(self.reader)
    }

    /// Whether a whole header of `length` bytes is here already, so that the next one costs no waiting.
    pub fn has(&self, length: usize) -> bool {
        self.buffer.len() >= length
    }

    async fn fill(&mut self, length: usize) -> io::Result<bool> {
        while self.buffer.len() < length {
            let missing = length - self.buffer.len();
            self.buffer.reserve(missing.clamp(GULP_BYTES / 4, PROMISED_BYTES_MAX));
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                if self.buffer.is_empty() {
                    return Ok(false);
                }
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
        Ok(true)
    }
}

struct Queue {
    frames: Mutex<VecDeque<(Bytes, Bytes)>>,
    queued_bytes: AtomicUsize,
    wake: Notify,
    closed: AtomicBool,
    outgoing: Mutex<Outgoing>,
}

type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// The connection's sending side, for one thread at a time.
struct Outgoing {
    /// `None` once the task has ended.
    writer: Option<Writer>,
    /// Taken off the queue and not yet written as a whole.
    batch: VecDeque<Bytes>,
    batch_bytes: usize,
    /// The connection takes nothing now, and wakes the task when it does: another thread must not take its place there.
    is_blocked: bool,
    /// Whether the writer may hold back what it took.
    is_unflushed: bool,
}

impl Queue {
    fn frames(&self) -> MutexGuard<'_, VecDeque<(Bytes, Bytes)>> {
        self.frames.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Writes until the queue is empty. The task's own.
    fn poll_written(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        let result = self.poll_write_out(&mut outgoing, context);
        outgoing.is_blocked = result.is_pending();
        result
    }

    fn poll_write_out(&self, outgoing: &mut Outgoing, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        loop {
            if outgoing.batch.is_empty() {
                self.queued_bytes.fetch_sub(std::mem::take(&mut outgoing.batch_bytes), Ordering::Relaxed);
                let frames = std::mem::take(&mut *self.frames());
                outgoing.take(frames);
            }
            if outgoing.batch.is_empty() {
                break;
            }
            ready!(outgoing.poll_write_batch(context))?;
        }
        if outgoing.is_unflushed {
            // A writer that encrypts may have taken more than the socket did: on a connection that falls silent now, the rest
            // of an answer would never leave.
            ready!(open(&mut outgoing.writer)?.poll_flush(context))?;
            outgoing.is_unflushed = false;
        }
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(&self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut outgoing = self.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        open(&mut outgoing.writer)?.poll_shutdown(context)
    }

    /// Writes what is queued on the calling thread, as far as nobody else does and the connection takes it. The rest, and
    /// errors, are the task's.
    fn write_here(&self) {
        let mut outgoing = match self.outgoing.try_lock() {
            Ok(outgoing) => outgoing,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return self.wake.notify_one(),
        };
        if outgoing.is_blocked {
            // The task was promised a call and takes all of the queue then.
            return;
        }
        match self.poll_write_out(&mut outgoing, &mut Context::from_waker(Waker::noop())) {
            Poll::Ready(Ok(())) => {}
            // The task meets the same, and can wait for the end of it.
            Poll::Ready(Err(_)) | Poll::Pending => self.wake.notify_one(),
        }
    }
}

fn open(writer: &mut Option<Writer>) -> io::Result<Pin<&mut Writer>> {
    writer.as_mut().map(Pin::new).ok_or_else(|| io::ErrorKind::NotConnected.into())
}

impl Outgoing {
    fn take(&mut self, frames: VecDeque<(Bytes, Bytes)>) {
        for (header, payload) in frames {
            self.batch_bytes += header.len() + payload.len();
            self.batch.push_back(header);
            if !payload.is_empty() {
                self.batch.push_back(payload);
            }
        }
    }

    fn poll_write_batch(&mut self, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.batch.is_empty() {
            let mut slices = [io::IoSlice::new(&[]); SLICES_MAX];
            let count = self.batch.len().min(SLICES_MAX);
            for (slice, bytes) in slices.iter_mut().zip(&self.batch) {
                *slice = io::IoSlice::new(bytes);
            }
            let mut written = ready!(open(&mut self.writer)?.poll_write_vectored(context, &slices[..count]))?;
            if written == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.is_unflushed = true;
            while let Some(front) = self.batch.front_mut() {
                if front.len() > written {
                    front.advance(written);
                    break;
                }
                written -= front.len();
                self.batch.pop_front();
            }
        }
        Poll::Ready(Ok(()))
    }
}

thread_local! {
    /// Connections to write to when [`sent_together`] ends, while it runs.
    static TOGETHER: RefCell<Option<Vec<FrameSender>>> = const { RefCell::new(None) };
}

/// Runs `work`, then writes what it sent, to each connection with one call, on this thread.
pub fn sent_together<T>(work: impl FnOnce() -> T) -> T {
    if TOGETHER.with_borrow(Option::is_some) {
        // The outer call writes it.
        return work();
    }
    TOGETHER.set(Some(Vec::new()));
    let _scope = SendOnDrop;
    work()
}

struct SendOnDrop;

impl Drop for SendOnDrop {
    fn drop(&mut self) {
        for sender in TOGETHER.take().unwrap_or_default() {
            sender.queue.write_here();
        }
    }
}

/// Queues messages for one connection. Cloning it is cheap; the connection's sending side ends with the last clone or
/// with the first error.
#[derive(Clone)]
pub struct FrameSender {
    queue: Arc<Queue>,
    _alive: Arc<Alive>,
}

/// Dropped with the last sender.
struct Alive {
    queue: Arc<Queue>,
}

impl Drop for Alive {
    fn drop(&mut self) {
        self.queue.closed.store(true, Ordering::Release);
        self.queue.wake.notify_one();
    }
}

impl FrameSender {
    /// Starts the writing task.
    pub fn start(writer: Box<dyn AsyncWrite + Send + Unpin>) -> FrameSender {
        let outgoing = Outgoing {
            writer: Some(writer),
            batch: VecDeque::new(),
            batch_bytes: 0,
            is_blocked: false,
            is_unflushed: false,
        };
        let queue = Arc::new(Queue {
            frames: Mutex::new(VecDeque::new()),
            queued_bytes: AtomicUsize::new(0),
            wake: Notify::new(),
            closed: AtomicBool::new(false),
            outgoing: Mutex::new(outgoing),
        });
        tokio::spawn(write_all(queue.clone()));
        FrameSender { queue: queue.clone(), _alive: Arc::new(Alive { queue }) }
    }

    /// Queues one message: a header and, perhaps, a payload. False once the connection is broken: nothing is sent then.
    pub fn send(&self, header: Bytes, payload: Bytes) -> bool {
        if self.is_closed() {
            return false;
        }
        self.queue.queued_bytes.fetch_add(header.len() + payload.len(), Ordering::Relaxed);
        let mut frames = self.queue.frames();
        frames.push_back((header, payload));
        let is_first = frames.len() == 1;
        drop(frames);
        if is_first && !self.is_left_for_later() {
            self.queue.wake.notify_one();
        }
        true
    }

    /// Whether this thread writes what it sends when it has sent all of it.
    fn is_left_for_later(&self) -> bool {
        TOGETHER.with_borrow_mut(|senders| senders.as_mut().map(|senders| senders.push(self.clone())).is_some())
    }

    /// Bytes that wait to be written: the caller slows down when the other side does.
    pub fn queued_bytes(&self) -> usize {
        self.queue.queued_bytes.load(Ordering::Relaxed)
    }

    /// Whether the connection is broken.
    pub fn is_closed(&self) -> bool {
        self.queue.closed.load(Ordering::Acquire)
    }

    /// Breaks the connection off: what is queued may or may not be sent.
    pub fn close(&self) {
        self.queue.closed.store(true, Ordering::Release);
        self.queue.wake.notify_one();
    }
}

async fn write_all(queue: Arc<Queue>) {
    let ended = EndOnDrop(queue);
    let queue = &ended.0;
    loop {
        // Before: what other threads took off the queue is written as well then.
        let is_closed = queue.closed.load(Ordering::Acquire);
        if poll_fn(|context| queue.poll_written(context)).await.is_err() {
            // The reading side of the connection sees the end as well and tells whoever waits for answers.
            return;
        }
        if is_closed {
            let _ = poll_fn(|context| queue.poll_shutdown(context)).await;
            return;
        }
        if !queue.closed.load(Ordering::Acquire) {
            queue.wake.notified().await;
        }
    }
}

/// Ends the sending side with its task, however that ends.
struct EndOnDrop(Arc<Queue>);

impl Drop for EndOnDrop {
    fn drop(&mut self) {
        self.0.closed.store(true, Ordering::Release);
        // No other thread is in the middle of a batch then, and takes its bytes off the count afterwards.
        let mut outgoing = self.0.outgoing.lock().unwrap_or_else(PoisonError::into_inner);
        outgoing.writer = None;
        outgoing.batch.clear();
        outgoing.batch_bytes = 0;
        self.0.frames().clear();
        // Nobody may wait for room in a queue that nobody empties any more.
        self.0.queued_bytes.store(0, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

    use tokio::io::AsyncWriteExt;

    use super::*;

    /// Takes everything at once and passes it on only when it is flushed.
    struct Hoarder<W> {
        inner: W,
        hoard: BytesMut,
    }

    impl<W: AsyncWrite + Unpin> AsyncWrite for Hoarder<W> {
        fn poll_write(mut self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.hoard.extend_from_slice(bytes);
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            let this = &mut *self;
            while !this.hoard.is_empty() {
                match Pin::new(&mut this.inner).poll_write(context, &this.hoard) {
                    Poll::Ready(Ok(count)) => this.hoard.advance(count),
                    Poll::Ready(Err(error)) => return Poll::Ready(Err(error)),
                    Poll::Pending => return Poll::Pending,
                }
            }
            Pin::new(&mut this.inner).poll_flush(context)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.inner).poll_shutdown(context)
        }
    }

    #[tokio::test]
    async fn nothing_stays_behind_in_a_writer_that_buffers() {
        let (near, far) = tokio::io::duplex(1000);
        let (_, writer) = tokio::io::split(near);
        let (reader, _) = tokio::io::split(far);
        let sender = FrameSender::start(Box::new(Hoarder { inner: writer, hoard: BytesMut::new() }));
        let mut reader = FrameReader::new(Box::new(reader));
        for round in 0..3 {
            assert!(sender.send(Bytes::from_static(b"head"), vec![round; 5000].into()));
            // Nothing else is sent before this arrived.
            assert_eq!(reader.header::<4>().await.unwrap(), Some(*b"head"));
            assert_eq!(reader.payload(5000).await.unwrap(), vec![round; 5000]);
        }
    }

    #[tokio::test]
    async fn many_messages_arrive_whole_and_in_order() {
        let (near, far) = tokio::io::duplex(1000);
        let (_, writer) = tokio::io::split(near);
        let (reader, _) = tokio::io::split(far);
        let sender = FrameSender::start(Box::new(writer));
        for index in 0..500_u32 {
            let payload = vec![index as u8; (index as usize * 7) % 300];
            assert!(sender.send(Bytes::copy_from_slice(&index.to_le_bytes()), payload.into()));
        }
        drop(sender);
        let mut frames = FrameReader::new(Box::new(reader));
        for index in 0..500_u32 {
            assert_eq!(frames.header::<4>().await.unwrap(), Some(index.to_le_bytes()));
            let payload = frames.payload((index as usize * 7) % 300).await.unwrap();
            assert!(payload.iter().all(|byte| *byte == index as u8));
        }
        assert_eq!(frames.header::<4>().await.unwrap(), None);
    }

    #[tokio::test]
    async fn what_other_threads_send_arrives_whole_and_in_order() {
        let (near, far) = tokio::io::duplex(300);
        let (_, writer) = tokio::io::split(near);
        let (reader, _) = tokio::io::split(far);
        let sender = FrameSender::start(Box::new(Hoarder { inner: writer, hoard: BytesMut::new() }));
        let other = std::thread::spawn(move || {
            for round in 0..200_u32 {
                // Small ones go out at once; with the large ones the connection is full now and then.
                sent_together(|| {
                    for index in 0..3 {
                        let number = round * 3 + index;
                        let payload = vec![number as u8; if round % 7 == 0 { 500 } else { 9 }];
                        sent_together(|| {
                            assert!(sender.send(Bytes::copy_from_slice(&number.to_le_bytes()), payload.into()));
                        });
                    }
                });
            }
        });
        let mut frames = FrameReader::new(Box::new(reader));
        for number in 0..600_u32 {
            assert_eq!(frames.header::<4>().await.unwrap(), Some(number.to_le_bytes()));
            let length = if number / 3 % 7 == 0 { 500 } else { 9 };
            assert!(frames.payload(length).await.unwrap().iter().all(|byte| *byte == number as u8));
        }
        other.join().unwrap();
        assert_eq!(frames.header::<4>().await.unwrap(), None);
    }

    #[tokio::test]
    async fn an_idle_connection_needs_no_task_to_be_written_to() {
        let (near, mut far) = tokio::io::duplex(100);
        let (_, writer) = tokio::io::split(near);
        let sender = FrameSender::start(Box::new(writer));
        tokio::task::yield_now().await;
        sent_together(|| sender.send(Bytes::from_static(b"head"), Bytes::from_static(b"tail")));
        let mut bytes = [0; 8];
        // Nothing was awaited in between: the runtime of this test has no other thread.
        let arrived = Pin::new(&mut far)
            .poll_read(&mut Context::from_waker(Waker::noop()), &mut tokio::io::ReadBuf::new(&mut bytes));
        assert!(arrived.is_ready());
        assert_eq!(&bytes, b"headtail");
    }

    #[tokio::test]
    async fn an_end_in_the_middle_is_an_error() {
        let (near, far) = tokio::io::duplex(100);
        let (_, mut writer) = tokio::io::split(near);
        writer.write_all(&[1, 2, 3]).await.unwrap();
        drop(writer);
        let (reader, _) = tokio::io::split(far);
        let mut frames = FrameReader::new(Box::new(reader));
        assert!(frames.header::<8>().await.is_err());
    }
}
