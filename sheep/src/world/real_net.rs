//! Connections and datagrams over the machine's TCP, unix and UDP sockets.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;

use rustix::net::{AddressFamily, SocketType, ipproto, sockopt};
use tokio::net::{TcpListener, TcpStream, UdpSocket, UnixListener, UnixStream};

use super::net::{
    Announcement, Connection, Datagram, Endpoint, Listener, Neighbours, Net, NetFuture, is_reachable_by_itself,
};
use super::real_mdns::RealNeighbours;

/// Connections that wait for `accept`: as many as the kernel allows (listen(2) cuts it to net.core.somaxconn).
const BACKLOG: i32 = 4096;

/// The machine's network.
pub struct RealNet;

struct RealTcpListener {
    listener: TcpListener,
    local: SocketAddr,
}

struct RealUnixListener {
    listener: UnixListener,
    path: PathBuf,
}

struct RealDatagram {
    socket: UdpSocket,
    local: SocketAddr,
}

impl Net for RealNet {
    fn listen(&self, endpoint: &Endpoint) -> NetFuture<'_, Box<dyn Listener>> {
        let endpoint = endpoint.clone();
        Box::pin(async move {
            match endpoint {
                Endpoint::Tcp(address) => {
                    let listener = listen_tcp(address)?;
                    let local = listener.local_addr()?;
                    Ok(Box::new(RealTcpListener { listener, local }) as Box<dyn Listener>)
                }
                Endpoint::Unix(path) => {
                    // The store's lock file already says that no other sheep uses this directory: a socket that is
                    // still there belongs to a process that is gone.
                    match std::fs::remove_file(&path) {
                        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                        _ => {}
                    }
                    let listener = UnixListener::bind(&path)?;
                    Ok(Box::new(RealUnixListener { listener, path }) as Box<dyn Listener>)
                }
            }
        })
    }

    fn connect(&self, endpoint: &Endpoint) -> NetFuture<'_, Connection> {
        let endpoint = endpoint.clone();
        Box::pin(async move {
            match &endpoint {
                Endpoint::Tcp(address) => tcp_connection(TcpStream::connect(address).await?),
                Endpoint::Unix(path) => Ok(unix_connection(UnixStream::connect(path).await?)),
            }
        })
    }

    fn bind_datagram(&self, address: SocketAddr) -> NetFuture<'_, Box<dyn Datagram>> {
        Box::pin(async move {
            let socket = bind_udp(address)?;
            let local = socket.local_addr()?;
            Ok(Box::new(RealDatagram { socket, local }) as Box<dyn Datagram>)
        })
    }

    fn local_addresses(&self) -> io::Result<Vec<IpAddr>> {
        let interfaces = if_addrs::get_if_addrs()?;
        let usable = interfaces.iter().filter(|interface| interface.is_oper_up() && !interface.is_loopback());
        let mut addresses: Vec<IpAddr> = usable.map(if_addrs::Interface::ip).filter(is_reachable_by_itself).collect();
        addresses.sort_unstable();
        addresses.dedup();
        Ok(addresses)
    }

    fn resolve(&self, name: &str, port: u16) -> NetFuture<'_, Vec<SocketAddr>> {
        let name = name.to_string();
        Box::pin(async move { Ok(tokio::net::lookup_host((name, port)).await?.collect()) })
    }

    fn neighbours(&self, announcement: &Announcement) -> io::Result<Box<dyn Neighbours>> {
        Ok(Box::new(RealNeighbours::start(announcement)?))
    }
}

/// A UDP socket that, on IPv6, leaves IPv4 alone.
fn bind_udp(address: SocketAddr) -> io::Result<UdpSocket> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(
        family,
        SocketType::DGRAM,
        rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
        Some(ipproto::UDP),
    )?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    UdpSocket::from_std(std::net::UdpSocket::from(socket))
}

/// A TCP listener that restarts at once on the port it had before (SO_REUSEADDR) and, on IPv6, leaves IPv4 alone.
fn listen_tcp(address: SocketAddr) -> io::Result<TcpListener> {
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = rustix::net::socket_with(
        family,
        SocketType::STREAM,
        rustix::net::SocketFlags::CLOEXEC | rustix::net::SocketFlags::NONBLOCK,
        Some(ipproto::TCP),
    )?;
    sockopt::set_socket_reuseaddr(&socket, true)?;
    if address.is_ipv6() {
        sockopt::set_ipv6_v6only(&socket, true)?;
    }
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    TcpListener::from_std(std::net::TcpListener::from(socket))
}

fn tcp_connection(stream: TcpStream) -> io::Result<Connection> {
    // Requests and answers are whole messages: waiting for more bytes to fill a segment only adds delay.
    stream.set_nodelay(true)?;
    let peer = stream.peer_addr()?.to_string();
    let (reader, writer) = stream.into_split();
    Ok(Connection { reader: Box::new(reader), writer: Box::new(writer), peer })
}

fn unix_connection(stream: UnixStream) -> Connection {
    let (reader, writer) = stream.into_split();
    Connection { reader: Box::new(reader), writer: Box::new(writer), peer: "unix socket".to_string() }
}

impl Listener for RealTcpListener {
    fn accept(&self) -> NetFuture<'_, Connection> {
        Box::pin(async move {
            let (stream, _) = self.listener.accept().await?;
            tcp_connection(stream)
        })
    }

    fn local(&self) -> Endpoint {
        Endpoint::Tcp(self.local)
    }
}

impl Listener for RealUnixListener {
    fn accept(&self) -> NetFuture<'_, Connection> {
        Box::pin(async move {
            let (stream, _) = self.listener.accept().await?;
            Ok(unix_connection(stream))
        })
    }

    fn local(&self) -> Endpoint {
        Endpoint::Unix(self.path.clone())
    }
}

impl Datagram for RealDatagram {
    fn send_to<'a>(&'a self, bytes: &'a [u8], to: SocketAddr) -> NetFuture<'a, ()> {
        Box::pin(async move {
            self.socket.send_to(bytes, to).await?;
            Ok(())
        })
    }

    fn recv_from<'a>(&'a self, buffer: &'a mut [u8]) -> NetFuture<'a, (usize, SocketAddr)> {
        Box::pin(self.socket.recv_from(buffer))
    }

    fn local(&self) -> SocketAddr {
        self.local
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn datagrams_pass_on_loopback() {
        for text in ["127.0.0.1:0", "[::1]:0"] {
            let address: SocketAddr = text.parse().expect("an address");
            // A machine without IPv6 has nothing to test here.
            let Ok(one) = RealNet.bind_datagram(address).await else { continue };
            let two = RealNet.bind_datagram(address).await.expect("a second socket");
            one.send_to(b"hello", two.local()).await.expect("sent");
            let mut buffer = [0; 3];
            let (length, from) = two.recv_from(&mut buffer).await.expect("received");
            assert_eq!((&buffer[..length], from), (b"hel".as_slice(), one.local()), "cut off, and told from where");
        }
    }

    #[tokio::test]
    async fn addresses_are_their_own_names() {
        let found = RealNet.resolve("127.0.0.1", 7010).await.expect("no name server is asked");
        assert_eq!(found, [SocketAddr::from(([127, 0, 0, 1], 7010))]);
        for address in RealNet.local_addresses().expect("interfaces can be listed") {
            assert!(!address.is_loopback() && is_reachable_by_itself(&address));
        }
    }
}
