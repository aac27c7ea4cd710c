//! The envelope of a gossip packet, and the keys that seal it.
//!
//! `[version u8][sender u64][key id 4 bytes][counter u64][sealed body][tag 16 bytes]`, integers little-endian. The seal is
//! AES-256-GCM: the nonce is the counter, the header is associated data. A key id is the start of BLAKE3 of the secret.
//!
//! Always holds:
//! 1. A secret seals in one direction only and every counter once, so that no nonce is ever used twice.
//! 2. What [`Keyring::open`] gives out was sealed by the named sender under one of its two latest secrets, and is given
//!    out once.
//! 3. A packet that is refused changes nothing.
//!
//! Packets may be lost, come twice and in any order: the window remembers which of the last 1,024 counters came.

use std::collections::BTreeMap;

use aws_lc_rs::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use sheep_core::member::NodeId;

use super::Direction;

const VERSION: u8 = 1;
const KEY_ID_BYTES: usize = 4;
const HEADER_BYTES: usize = 1 + 8 + KEY_ID_BYTES + 8;
const TAG_BYTES: usize = 16;
/// What the envelope adds to a body.
pub const OVERHEAD_BYTES: usize = HEADER_BYTES + TAG_BYTES;
/// Secrets that count per peer for packets from it. A new connection brings a new secret; packets that were sealed just
/// before it may still be on their way.
const RECEIVING_MAX: usize = 2;
/// How far a packet may lag behind the latest one. Gossip sends some ten packets a second.
const WINDOW_COUNTERS: u64 = 1024;

/// Why a packet was refused.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub enum Refusal {
    /// Too short, or of another version.
    Malformed,
    /// No such secret for the sender that it names: a stranger, or a secret that was replaced.
    UnknownKey,
    /// Not sealed with the secret that it names: damaged or forged.
    BadSeal,
    /// Came before, or lags so far behind that this cannot be told.
    Replayed,
}

/// A packet that was not opened.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Refused {
    /// Whom it names as its sender, which anybody can write.
    pub sender: Option<NodeId>,
    /// Why.
    pub why: Refusal,
}

/// The secrets of all peers.
#[derive(Default)]
pub struct Keyring {
    sending: BTreeMap<NodeId, SendingKey>,
    receiving: BTreeMap<NodeId, Vec<ReceivingKey>>,
}

struct SendingKey {
    digest: [u8; 32],
    key: LessSafeKey,
    next_counter: u64,
}

struct ReceivingKey {
    digest: [u8; 32],
    key: LessSafeKey,
    window: Window,
}

fn key_of(secret: &[u8; 32]) -> LessSafeKey {
    LessSafeKey::new(UnboundKey::new(&AES_256_GCM, secret).expect("AES-256 takes 32 bytes"))
}

fn nonce_of(counter: u64) -> Nonce {
    let mut nonce = [0; NONCE_LEN];
    nonce[..8].copy_from_slice(&counter.to_le_bytes());
    Nonce::assume_unique_for_key(nonce)
}

impl Keyring {
    /// Adds a secret. Packets to the peer are sealed with the latest, packets from it opened with the two latest. A secret
    /// that is there already is left as it is, with its counters.
    pub fn install(&mut self, peer: NodeId, direction: Direction, secret: &[u8; 32]) {
        let digest = *blake3::hash(secret).as_bytes();
        match direction {
            Direction::Sending => {
                if self.sending.get(&peer).is_none_or(|known| known.digest != digest) {
                    self.sending.insert(peer, SendingKey { digest, key: key_of(secret), next_counter: 0 });
                }
            }
            Direction::Receiving => {
                let keys = self.receiving.entry(peer).or_default();
                if keys.iter().any(|known| known.digest == digest) {
                    return;
                }
                keys.insert(0, ReceivingKey { digest, key: key_of(secret), window: Window::default() });
                keys.truncate(RECEIVING_MAX);
            }
        }
    }

    /// Drops all secrets of a peer.
    pub fn forget(&mut self, peer: NodeId) {
        self.sending.remove(&peer);
        self.receiving.remove(&peer);
    }

    /// Seals `body` from `sender` for `peer` into `packet`, which is emptied first. False without a secret for it.
    pub fn seal(&mut self, sender: NodeId, peer: NodeId, body: &[u8], packet: &mut Vec<u8>) -> bool {
        packet.clear();
        let Some(key) = self.sending.get_mut(&peer) else { return false };
        let counter = key.next_counter;
        // The last counter is never sent, so that a window's end can be told. Nobody gets there.
        if counter == u64::MAX {
            return false;
        }
        key.next_counter += 1;
        packet.push(VERSION);
        packet.extend_from_slice(&sender.0.to_le_bytes());
        packet.extend_from_slice(&key.digest[..KEY_ID_BYTES]);
        packet.extend_from_slice(&counter.to_le_bytes());
        packet.extend_from_slice(body);
        let (header, body) = packet.split_at_mut(HEADER_BYTES);
        let sealed = key.key.seal_in_place_separate_tag(nonce_of(counter), Aad::from(&*header), body);
        let Ok(tag) = sealed else { return false };
        packet.extend_from_slice(tag.as_ref());
        true
    }

    /// Opens a packet in place: who sealed it, and the body.
    pub fn open<'a>(&mut self, packet: &'a mut [u8]) -> Result<(NodeId, &'a [u8]), Refused> {
        let Some((header, sealed)) = packet.split_first_chunk_mut::<HEADER_BYTES>() else {
            return Err(refused(None, Refusal::Malformed));
        };
        if header[0] != VERSION || sealed.len() < TAG_BYTES {
            return Err(refused(None, Refusal::Malformed));
        }
        let sender = NodeId(read_u64(header, 1));
        let id = &header[9..9 + KEY_ID_BYTES];
        let counter = read_u64(header, 9 + KEY_ID_BYTES);
        let keys = self.receiving.get_mut(&sender).into_iter().flatten();
        let Some(key) = keys.into_iter().find(|key| key.digest[..KEY_ID_BYTES] == *id) else {
            return Err(refused(Some(sender), Refusal::UnknownKey));
        };
        if !key.window.is_new(counter) {
            return Err(refused(Some(sender), Refusal::Replayed));
        }
        match key.key.open_in_place(nonce_of(counter), Aad::from(&*header), sealed) {
            Ok(body) => {
                key.window.mark(counter);
                Ok((sender, body))
            }
            Err(_) => Err(refused(Some(sender), Refusal::BadSeal)),
        }
    }
}

fn refused(sender: Option<NodeId>, why: Refusal) -> Refused {
    Refused { sender, why }
}

fn read_u64(bytes: &[u8; HEADER_BYTES], at: usize) -> u64 {
    let mut value = [0; 8];
    value.copy_from_slice(&bytes[at..at + 8]);
    u64::from_le_bytes(value)
}

/// Which counters came: all bits of `seen` belong to the [`WINDOW_COUNTERS`] below `next`.
#[derive(Default)]
struct Window {
    /// One above the highest counter that came.
    next: u64,
    seen: [u64; (WINDOW_COUNTERS / 64) as usize],
}

impl Window {
    fn place(counter: u64) -> (usize, u64) {
        ((counter % WINDOW_COUNTERS / 64) as usize, 1 << (counter % 64))
    }

    fn is_new(&self, counter: u64) -> bool {
        let (word, bit) = Window::place(counter);
        if counter >= self.next {
            counter != u64::MAX
        } else {
            self.next - counter <= WINDOW_COUNTERS && self.seen[word] & bit == 0
        }
    }

    fn mark(&mut self, counter: u64) {
        if counter >= self.next {
            for skipped in self.next.max(counter.saturating_sub(WINDOW_COUNTERS - 1))..counter {
                let (word, bit) = Window::place(skipped);
                self.seen[word] &= !bit;
            }
            self.next = counter + 1;
        }
        let (word, bit) = Window::place(counter);
        self.seen[word] |= bit;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const A: NodeId = NodeId(0xaaaa);
    const B: NodeId = NodeId(0xbbbb);

    fn pair() -> (Keyring, Keyring) {
        let (mut a, mut b) = (Keyring::default(), Keyring::default());
        a.install(B, Direction::Sending, &[7; 32]);
        b.install(A, Direction::Receiving, &[7; 32]);
        (a, b)
    }

    fn sealed(ring: &mut Keyring, body: &[u8]) -> Vec<u8> {
        let mut packet = Vec::new();
        assert!(ring.seal(A, B, body, &mut packet));
        packet
    }

    #[test]
    fn a_packet_opens_once() {
        let (mut a, mut b) = pair();
        let packet = sealed(&mut a, b"hello");
        assert_eq!(packet.len(), 5 + OVERHEAD_BYTES);
        assert_eq!(b.open(&mut packet.clone()), Ok((A, b"hello".as_slice())));
        assert_eq!(b.open(&mut packet.clone()), Err(refused(Some(A), Refusal::Replayed)));
    }

    #[test]
    fn every_changed_bit_is_noticed_and_changes_nothing() {
        let (mut a, mut b) = pair();
        let packet = sealed(&mut a, b"hello");
        for index in 0..packet.len() * 8 {
            let mut tampered = packet.clone();
            tampered[index / 8] ^= 1 << (index % 8);
            b.open(&mut tampered).unwrap_err();
        }
        assert!(b.open(&mut packet.clone()).is_ok());
    }

    #[test]
    fn short_and_foreign_packets_are_malformed() {
        let (mut a, mut b) = pair();
        let packet = sealed(&mut a, b"");
        for length in 0..packet.len() {
            assert_eq!(b.open(&mut packet[..length].to_vec()), Err(refused(None, Refusal::Malformed)));
        }
        let mut other = packet.clone();
        other[0] = 2;
        assert_eq!(b.open(&mut other), Err(refused(None, Refusal::Malformed)));
    }

    #[test]
    fn a_stranger_and_a_reflection_have_no_key() {
        let (mut a, mut b) = pair();
        let packet = sealed(&mut a, b"hello");
        assert_eq!(a.open(&mut packet.clone()), Err(refused(Some(A), Refusal::UnknownKey)));
        b.forget(A);
        assert_eq!(b.open(&mut packet.clone()), Err(refused(Some(A), Refusal::UnknownKey)));
    }

    #[test]
    fn the_two_latest_secrets_open() {
        let (mut a, mut b) = pair();
        let first = sealed(&mut a, b"1");
        let mut packets = vec![first];
        for secret in [8, 9] {
            a.install(B, Direction::Sending, &[secret; 32]);
            b.install(A, Direction::Receiving, &[secret; 32]);
            // The same once more takes nothing back.
            b.install(A, Direction::Receiving, &[secret; 32]);
            packets.push(sealed(&mut a, b"n"));
        }
        assert_eq!(b.open(&mut packets[0]), Err(refused(Some(A), Refusal::UnknownKey)));
        assert!(b.open(&mut packets[1]).is_ok());
        assert!(b.open(&mut packets[2].clone()).is_ok());
        b.install(A, Direction::Receiving, &[9; 32]);
        assert_eq!(b.open(&mut packets[2]), Err(refused(Some(A), Refusal::Replayed)));
    }

    #[test]
    fn the_window_agrees_with_a_set() {
        use std::collections::BTreeSet;
        let mut window = Window::default();
        let mut came = BTreeSet::new();
        let mut state = 1_u64;
        let mut base = 0_u64;
        for _ in 0..200_000 {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
            let random = state >> 33;
            base += random % 3;
            if random.is_multiple_of(10_007) {
                base += 5_000;
            }
            let counter = (base + 1500).saturating_sub(random % 3_000);
            let highest = came.last().copied();
            let is_late = highest.is_some_and(|highest: u64| highest + 1 > counter + WINDOW_COUNTERS);
            let expected = !is_late && !came.contains(&counter);
            assert_eq!(window.is_new(counter), expected, "counter {counter}, highest {highest:?}");
            if expected {
                window.mark(counter);
                came.insert(counter);
            }
        }
        assert!(!window.is_new(u64::MAX));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(mut bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let (_, mut b) = pair();
            let _ = b.open(&mut bytes);
        }
    }
}
