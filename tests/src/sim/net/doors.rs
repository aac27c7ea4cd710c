//! The network as one process sees it.

use std::future::poll_fn;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use sheep::world::net::{Announcement, Connection, Datagram, Endpoint, Listener, Neighbours, Net, NetFuture};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{ListenerState, Port, Process, SocketState, State, address, host_at};

type Shared = Arc<Mutex<State>>;

fn lock(state: &Shared) -> MutexGuard<'_, State> {
    state.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The net door of one life of one process.
#[derive(Clone)]
pub struct ProcessNet {
    state: Shared,
    process: Process,
}

impl ProcessNet {
    pub(super) fn new(state: Shared, process: Process) -> ProcessNet {
        ProcessNet { state, process }
    }

    fn target(&self, endpoint: Endpoint) -> io::Result<(usize, Port)> {
        match endpoint {
            Endpoint::Unix(path) => Ok((self.process.host, Port::Unix(path))),
            Endpoint::Tcp(address) if address.ip().is_loopback() => Ok((self.process.host, Port::Tcp(address.port()))),
            Endpoint::Tcp(address) => {
                let host = host_at(address.ip()).ok_or(io::ErrorKind::NetworkUnreachable)?;
                Ok((host, Port::Tcp(address.port())))
            }
        }
    }

    pub(super) fn connect_owned(self, endpoint: Endpoint) -> NetFuture<'static, Connection> {
        Box::pin(async move {
            let (host, port) = self.target(endpoint)?;
            let id = lock(&self.state).attempt(self.process, host, port);
            Connecting { state: self.state, id }.await
        })
    }
}

struct Connecting {
    state: Shared,
    id: u64,
}

impl Future for Connecting {
    type Output = io::Result<Connection>;

    fn poll(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let mut state = lock(&self.state);
        let Some(attempt) = state.attempts.get_mut(&self.id) else {
            return Poll::Pending;
        };
        match attempt.outcome.take() {
            Some(outcome) => Poll::Ready(outcome),
            None => {
                attempt.waker = Some(context.waker().clone());
                Poll::Pending
            }
        }
    }
}

impl Drop for Connecting {
    fn drop(&mut self) {
        let attempt = lock(&self.state).attempts.remove(&self.id);
        drop(attempt);
    }
}

struct SimListener {
    state: Shared,
    process: Process,
    port: Port,
    local: Endpoint,
}

impl Listener for SimListener {
    fn accept(&self) -> NetFuture<'_, Connection> {
        Box::pin(poll_fn(|context| {
            let mut state = lock(&self.state);
            if !state.is_alive(self.process) {
                return Poll::Pending;
            }
            let Some(listener) = state.hosts[self.process.host].listeners.get_mut(&self.port) else {
                return Poll::Pending;
            };
            match listener.waiting.pop_front() {
                Some(connection) => Poll::Ready(Ok(connection)),
                None => {
                    listener.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        }))
    }

    fn local(&self) -> Endpoint {
        self.local.clone()
    }
}

impl Drop for SimListener {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        if state.is_alive(self.process) {
            let closed = state.hosts[self.process.host].listeners.remove(&self.port);
            drop(state);
            drop(closed);
        }
    }
}

struct SimDatagram {
    state: Shared,
    process: Process,
    local: SocketAddr,
}

impl Datagram for SimDatagram {
    fn send_to<'a>(&'a self, bytes: &'a [u8], to: SocketAddr) -> NetFuture<'a, ()> {
        Box::pin(async move {
            lock(&self.state).send_datagram(self.process, self.local, to, bytes);
            Ok(())
        })
    }

    fn recv_from<'a>(&'a self, buffer: &'a mut [u8]) -> NetFuture<'a, (usize, SocketAddr)> {
        Box::pin(poll_fn(move |context| {
            let mut state = lock(&self.state);
            if !state.is_alive(self.process) {
                return Poll::Pending;
            }
            let Some(socket) = state.hosts[self.process.host].sockets.get_mut(&self.local.port()) else {
                return Poll::Pending;
            };
            match socket.waiting.pop_front() {
                Some((bytes, from)) => {
                    let count = bytes.len().min(buffer.len());
                    buffer[..count].copy_from_slice(&bytes[..count]);
                    Poll::Ready(Ok((count, from)))
                }
                None => {
                    socket.waker = Some(context.waker().clone());
                    Poll::Pending
                }
            }
        }))
    }

    fn local(&self) -> SocketAddr {
        self.local
    }
}

impl Drop for SimDatagram {
    fn drop(&mut self) {
        let mut state = lock(&self.state);
        if state.is_alive(self.process) {
            state.hosts[self.process.host].sockets.remove(&self.local.port());
        }
    }
}

impl Net for ProcessNet {
    fn listen(&self, endpoint: &Endpoint) -> NetFuture<'_, Box<dyn Listener>> {
        let endpoint = endpoint.clone();
        Box::pin(async move {
            let mut state = lock(&self.state);
            if !state.is_alive(self.process) {
                return Err(io::ErrorKind::NetworkDown.into());
            }
            let host = &mut state.hosts[self.process.host];
            let (port, local) = match endpoint {
                Endpoint::Unix(path) => (Port::Unix(path.clone()), Endpoint::Unix(path)),
                Endpoint::Tcp(at) if at.is_ipv6() => return Err(io::ErrorKind::AddrNotAvailable.into()),
                Endpoint::Tcp(at) => {
                    let mut number = at.port();
                    while number == 0 || (at.port() == 0 && host.listeners.contains_key(&Port::Tcp(number))) {
                        host.next_port = host.next_port.wrapping_add(1).max(40_000);
                        number = host.next_port;
                    }
                    (Port::Tcp(number), Endpoint::Tcp(SocketAddr::new(at.ip(), number)))
                }
            };
            if matches!(port, Port::Tcp(_)) && host.listeners.contains_key(&port) {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            host.listeners.insert(port.clone(), ListenerState::default());
            let listener = SimListener { state: self.state.clone(), process: self.process, port, local };
            Ok(Box::new(listener) as Box<dyn Listener>)
        })
    }

    fn connect(&self, endpoint: &Endpoint) -> NetFuture<'_, Connection> {
        self.clone().connect_owned(endpoint.clone())
    }

    fn bind_datagram(&self, at: SocketAddr) -> NetFuture<'_, Box<dyn Datagram>> {
        Box::pin(async move {
            let mut state = lock(&self.state);
            if !state.is_alive(self.process) {
                return Err(io::ErrorKind::NetworkDown.into());
            }
            let host = &mut state.hosts[self.process.host];
            if at.is_ipv6() || host.sockets.contains_key(&at.port()) {
                return Err(io::ErrorKind::AddrInUse.into());
            }
            assert_ne!(at.port(), 0, "the simulated nodes name their gossip ports");
            host.sockets.insert(at.port(), SocketState::default());
            let local = SocketAddr::new(address(self.process.host), at.port());
            let socket = SimDatagram { state: self.state.clone(), process: self.process, local };
            Ok(Box::new(socket) as Box<dyn Datagram>)
        })
    }

    fn local_addresses(&self) -> io::Result<Vec<IpAddr>> {
        Ok(vec![address(self.process.host)])
    }

    fn resolve(&self, name: &str, port: u16) -> NetFuture<'_, Vec<SocketAddr>> {
        let address: Result<IpAddr, _> = name.parse();
        Box::pin(async move {
            let address = address.map_err(|_| io::Error::from(io::ErrorKind::NotFound))?;
            Ok(vec![SocketAddr::new(address, port)])
        })
    }

    /// A network that lets no multicast through: nodes find each other by name.
    fn neighbours(&self, _: &Announcement) -> io::Result<Box<dyn Neighbours>> {
        Ok(Box::new(NoNeighbours))
    }
}

struct NoNeighbours;

impl Neighbours for NoNeighbours {
    fn next(&mut self) -> NetFuture<'_, Vec<SocketAddr>> {
        Box::pin(std::future::pending())
    }
}

pub(super) struct PipeReader {
    state: Shared,
    id: u64,
}

impl PipeReader {
    pub(super) fn new(state: Shared, id: u64) -> PipeReader {
        PipeReader { state, id }
    }
}

impl AsyncRead for PipeReader {
    fn poll_read(self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        lock(&self.state).receive(self.id, buffer, context)
    }
}

impl Drop for PipeReader {
    fn drop(&mut self) {
        lock(&self.state).close_reader(self.id);
    }
}

pub(super) struct PipeWriter {
    state: Shared,
    id: u64,
}

impl PipeWriter {
    pub(super) fn new(state: Shared, id: u64) -> PipeWriter {
        PipeWriter { state, id }
    }
}

impl AsyncWrite for PipeWriter {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        lock(&self.state).send(self.id, bytes, context)
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        lock(&self.state).end(self.id);
        Poll::Ready(Ok(()))
    }
}

impl Drop for PipeWriter {
    fn drop(&mut self) {
        lock(&self.state).end(self.id);
    }
}
