//! Whole messages over a byte stream, many per system call.
//!
//! [`FrameReader`] takes large gulps and hands out slices of them without copying. [`FrameSender`] queues messages for one
//! task that writes everything queued with one vectored call, so that under load a system call carries many small
//! messages and on an idle connection a message leaves at once.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::Notify;

/// Bytes asked for at once: 64 requests of 4 KiB. Smaller gulps cost system calls under load, larger ones memory per
/// connection (the buffer is shared by the payloads cut from it and lives as long as the last of them).
const GULP_BYTES: usize = 256 << 10;
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
            // Memory grows with what has arrived, not with what a header promised.
            self.buffer.reserve(missing.clamp(GULP_BYTES / 4, GULP_BYTES));
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
        let queue = Arc::new(Queue {
            frames: Mutex::new(VecDeque::new()),
            queued_bytes: AtomicUsize::new(0),
            wake: Notify::new(),
            closed: AtomicBool::new(false),
        });
        tokio::spawn(write_all(writer, queue.clone()));
        FrameSender { queue: queue.clone(), _alive: Arc::new(Alive { queue }) }
    }

    /// Queues one message: a header and, perhaps, a payload. False once the connection is broken: nothing is sent then.
    pub fn send(&self, header: Bytes, payload: Bytes) -> bool {
        if self.is_closed() {
            return false;
        }
        self.queue.queued_bytes.fetch_add(header.len() + payload.len(), Ordering::Relaxed);
        let mut frames = self.queue.frames.lock().unwrap_or_else(PoisonError::into_inner);
        frames.push_back((header, payload));
        let first = frames.len() == 1;
        drop(frames);
        if first {
            self.queue.wake.notify_one();
        }
        true
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

async fn write_all(mut writer: Box<dyn AsyncWrite + Send + Unpin>, queue: Arc<Queue>) {
    let mut batch: VecDeque<Bytes> = VecDeque::new();
    loop {
        let frames = std::mem::take(&mut *queue.frames.lock().unwrap_or_else(PoisonError::into_inner));
        if frames.is_empty() {
            if queue.closed.load(Ordering::Acquire) {
                let _ = writer.shutdown().await;
                return;
            }
            queue.wake.notified().await;
            continue;
        }
        let mut taken = 0;
        for (header, payload) in frames {
            taken += header.len() + payload.len();
            batch.push_back(header);
            if !payload.is_empty() {
                batch.push_back(payload);
            }
        }
        let result = write_batch(&mut writer, &mut batch).await;
        queue.queued_bytes.fetch_sub(taken, Ordering::Relaxed);
        if result.is_err() {
            // The reading side of the connection sees the end as well and tells whoever waits for answers.
            queue.closed.store(true, Ordering::Release);
            queue.frames.lock().unwrap_or_else(PoisonError::into_inner).clear();
            return;
        }
    }
}

async fn write_batch(writer: &mut Box<dyn AsyncWrite + Send + Unpin>, batch: &mut VecDeque<Bytes>) -> io::Result<()> {
    while !batch.is_empty() {
        let mut written = {
            let slices: Vec<io::IoSlice<'_>> = batch.iter().take(SLICES_MAX).map(|b| io::IoSlice::new(b)).collect();
            writer.write_vectored(&slices).await?
        };
        if written == 0 {
            return Err(io::ErrorKind::WriteZero.into());
        }
        while let Some(front) = batch.front_mut() {
            if front.len() > written {
                front.advance(written);
                break;
            }
            written -= front.len();
            batch.pop_front();
        }
    }
    // A writer that encrypts may have taken more than the socket did: on a connection that falls silent now, the rest of an
    // answer would never leave.
    writer.flush().await
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;
    use std::task::{Context, Poll};

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
