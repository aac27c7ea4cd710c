//! Everything that passes a switch, looked through for texts that must not be seen there.
//!
//! Always holds:
//! 1. Every packet is looked at as it was sent, headers and all; it passes the switch at least twice (in and out) and is
//!    counted as often. A text must lie within one packet to be found: search for short ones that repeat.
//! 2. A socket of the kernel that drops packets for want of room would make the proof worthless: its room is far more than
//!    these tests send, and a capture that saw nothing is an error of the test, which [`Captured::packet_count`] shows.

use std::io::ErrorKind;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::net::sockopt::{Timeout, set_socket_recv_buffer_size_force, set_socket_timeout};
use rustix::net::{AddressFamily, Protocol, RecvFlags, SocketType};

use crate::namespaces::Network;

/// `ETH_P_ALL` (linux/if_ether.h): packets of every protocol.
const EVERY_PROTOCOL: u16 = 3;
/// The kernel hands over up to 64 KiB at once, before it cuts them up for the cable.
const PACKET_BYTES_MAX: usize = 128 << 10;
const KERNEL_BUFFER_BYTES: usize = 256 << 20;
/// How long to go on after the end was asked for.
const DRAIN_TIME: Duration = Duration::from_secs(1);
/// UDP packets kept for those who want to send them again.
const KEPT_MAX: usize = 4096;

/// What passed.
#[derive(Default, Debug)]
pub struct Captured {
    /// How many packets.
    pub packet_count: u64,
    /// How many bytes, headers included.
    pub byte_count: u64,
    /// For each text looked for: in how many packets it was.
    pub hits: Vec<u64>,
    /// The first IPv4 UDP packets to the port asked for, whole frames.
    pub kept: Vec<Vec<u8>>,
}

/// A capture under way.
pub struct Capture {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Captured>>,
}

impl Capture {
    /// Looks for `texts` in everything that passes from now on, and keeps UDP packets to port `keep`.
    pub fn start(network: &Network, texts: Vec<Vec<u8>>, keep: Option<u16>) -> Result<Capture> {
        let socket = network.inside_switch(open)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || look(&socket, &texts, keep, &stopped));
        Ok(Capture { stop, thread })
    }

    /// Ends the capture and tells what it saw.
    pub fn finish(self) -> Result<Captured> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn open() -> Result<OwnedFd> {
    let protocol = u32::from(EVERY_PROTOCOL.to_be());
    let protocol = Protocol::from_raw(protocol.try_into()?);
    let socket = rustix::net::socket(AddressFamily::PACKET, SocketType::RAW, Some(protocol)).context("AF_PACKET")?;
    set_socket_recv_buffer_size_force(&socket, KERNEL_BUFFER_BYTES)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(Duration::from_millis(50)))?;
    Ok(socket)
}

fn look(socket: &OwnedFd, texts: &[Vec<u8>], keep: Option<u16>, stop: &AtomicBool) -> Result<Captured> {
    let mut captured = Captured { hits: vec![0; texts.len()], ..Captured::default() };
    let mut buffer = vec![0; PACKET_BYTES_MAX];
    let mut stopped_at = None;
    loop {
        // What had passed by then lies in the socket; a network under load never falls silent.
        let is_stopped = stop.load(Ordering::Relaxed);
        if is_stopped && stopped_at.get_or_insert_with(Instant::now).elapsed() > DRAIN_TIME {
            return Ok(captured);
        }
        let length = match rustix::net::recv(socket, &mut buffer[..], RecvFlags::empty()) {
            Ok((_, length)) => length.min(PACKET_BYTES_MAX),
            Err(error) => match std::io::Error::from(error).kind() {
                ErrorKind::WouldBlock | ErrorKind::TimedOut if is_stopped => return Ok(captured),
                ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted => continue,
                _ => return Err(error.into()),
            },
        };
        let packet = &buffer[..length];
        captured.packet_count += 1;
        captured.byte_count += length as u64;
        for (text, hits) in texts.iter().zip(&mut captured.hits) {
            *hits += u64::from(contains(packet, text));
        }
        if captured.kept.len() < KEPT_MAX && keep.is_some_and(|port| udp_payload_to(packet, port).is_some()) {
            captured.kept.push(packet.to_vec());
        }
    }
}

fn contains(packet: &[u8], text: &[u8]) -> bool {
    let Some((&first, rest)) = text.split_first() else { return false };
    let mut from = 0;
    while let Some(at) = packet[from..].iter().position(|&byte| byte == first) {
        from += at + 1;
        if packet[from..].starts_with(rest) {
            return true;
        }
    }
    false
}

/// The content of an Ethernet frame that is a UDP packet over IPv4 to this port.
pub fn udp_payload_to(frame: &[u8], port: u16) -> Option<&[u8]> {
    const ETHERNET_BYTES: usize = 14;
    const UDP: u8 = 17;
    let ip = frame.get(ETHERNET_BYTES..)?;
    if frame[12..ETHERNET_BYTES] != [8, 0] || *ip.get(9)? != UDP {
        return None;
    }
    let udp = ip.get(usize::from(ip[0] & 15) * 4..)?;
    if udp.get(2..4)? != port.to_be_bytes() {
        return None;
    }
    let length = usize::from(u16::from_be_bytes([*udp.get(4)?, *udp.get(5)?]));
    udp.get(8..length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_text_is_found_wherever_it_lies() {
        assert!(contains(b"..secret..", b"secret"));
        assert!(contains(b"secret", b"secret"));
        assert!(contains(b"sssecret", b"secret"));
        assert!(!contains(b"secre", b"secret"));
        assert!(!contains(b"", b"secret"));
    }

    #[test]
    fn the_content_of_a_udp_packet() {
        let mut frame = vec![0; 14 + 20 + 8];
        frame[12] = 8;
        frame[14] = 0x45;
        frame[14 + 9] = 17;
        frame[14 + 20 + 2..14 + 20 + 4].copy_from_slice(&7010_u16.to_be_bytes());
        frame[14 + 20 + 5] = 8 + 3;
        frame.extend_from_slice(b"abc");
        assert_eq!(udp_payload_to(&frame, 7010), Some(&b"abc"[..]));
        assert_eq!(udp_payload_to(&frame, 7011), None);
        assert_eq!(udp_payload_to(&frame[..20], 7010), None);
    }
}
