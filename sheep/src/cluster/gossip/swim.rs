//! The gossip protocol itself, without network and clock: foca's SWIM, made to fit this cluster.
//!
//! Packets, the passing of time and the mesh's introductions go in; packets, events and the next moment to come back come
//! out. A process is `(node, boot, turn)`: one that was called dead though it lives, or whose predecessor is remembered
//! under the same node id, comes back one turn higher.
//!
//! Always holds:
//! 1. foca knows only nodes that were introduced: whatever else a packet tells of is cut out before foca sees it. So its
//!    memory is bounded by the mesh's acquaintances, and nobody is probed whom this node cannot reach.
//! 2. For each node, events alternate: `Alive` of a boot, then `Down` of the same boot.
//!
//! A lost packet costs a probe, which is repeated by other ways; a lost introduction is repeated until it is answered.

use std::collections::{BTreeMap, BTreeSet};
use std::num::{NonZeroU8, NonZeroUsize};
use std::time::Duration;

use bytes::Bytes;
use foca::{Codec, Foca, Identity, Member, Message, Notification, PeriodicParams, PostcardCodec, State, Timer};
use serde::{Deserialize, Serialize};
use sheep_core::member::NodeId;

use super::GossipEvent;
use super::envelope::OVERHEAD_BYTES;
use crate::world::rng::SmallRng;

/// The largest packet with its envelope: fits the smallest MTU of IPv6 (1,280), and tunnels.
pub const PACKET_BYTES_MAX: usize = 1200;
const BODY_BYTES_MAX: usize = PACKET_BYTES_MAX - OVERHEAD_BYTES;

/// How fast the protocol is.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    /// Every node probes one other per period.
    pub probe_period: Duration,
    /// After this long without a direct answer others are asked to try.
    pub probe_patience: Duration,
    /// How many others.
    pub helpers: usize,
    /// How long a suspected node has to object.
    pub suspicion: Duration,
    /// News are passed on this often, to `helpers` others, while there are any.
    pub news_period: Duration,
    /// How often each piece of news is passed on.
    pub news_copies: u8,
}

impl Default for Pace {
    /// Measured by `examples/gossip_scale` with 5 nodes: a death is noticed after 2.1 s (99 %: 3.0 s, at most 3.2 s, with or
    /// without loss), which backs up an eviction after 3 s; 6.7 packets/s per idle node; at 20 % loss nobody was called
    /// dead in 1,000 minutes. With 1.5 s, 3 helpers and 10 copies there were 31 false deaths in as many minutes.
    fn default() -> Pace {
        Pace {
            probe_period: Duration::from_millis(300),
            probe_patience: Duration::from_millis(150),
            helpers: 4,
            suspicion: Duration::from_millis(1650),
            news_period: Duration::from_millis(150),
            news_copies: 15,
        }
    }
}

/// Timers end at multiples of this, so that one look serves several.
const GRID: Duration = Duration::from_millis(128);

/// The next multiple of [`GRID`].
fn on_grid(at: Duration) -> Duration {
    Duration::from_nanos((at.as_nanos() as u64).next_multiple_of(GRID.as_nanos() as u64))
}

/// An introduction that is not answered is repeated after this, doubling up to the last.
const ANNOUNCE_PAUSE_FIRST: Duration = Duration::from_millis(250);
const ANNOUNCE_PAUSE_LAST: Duration = Duration::from_secs(5);
/// Introductions leave at once up to the burst, then one per interval: in a large cluster most answer themselves, because
/// the first answers name the others.
const ANNOUNCE_INTERVAL: Duration = Duration::from_millis(250);
const ANNOUNCE_BURST: u32 = 16;

const fn count(number: usize) -> NonZeroUsize {
    match NonZeroUsize::new(number) {
        Some(number) => number,
        None => NonZeroUsize::MIN,
    }
}

fn config(pace: &Pace) -> foca::Config {
    foca::Config {
        probe_period: pace.probe_period,
        probe_rtt: pace.probe_patience,
        num_indirect_probes: count(pace.helpers),
        max_transmissions: NonZeroU8::new(pace.news_copies).unwrap_or(NonZeroU8::MIN),
        suspect_to_down_after: pace.suspicion,
        // Long enough that no packet of that process is still on its way.
        remove_down_after: Some(Duration::from_hours(1)),
        max_packet_size: count(BODY_BYTES_MAX),
        notify_down_members: true,
        periodic_announce: Some(PeriodicParams { frequency: Duration::from_secs(30), num_members: count(1) }),
        periodic_announce_to_down_members: Some(PeriodicParams {
            frequency: Duration::from_secs(10),
            num_members: count(1),
        }),
        periodic_gossip: Some(PeriodicParams { frequency: pace.news_period, num_members: count(pace.helpers) }),
    }
}

/// One process life of a node, as foca knows it.
#[derive(Clone, PartialEq, Eq, Debug, Serialize, Deserialize)]
struct Process {
    node: NodeId,
    boot: u64,
    /// Goes up each time this process finds itself called dead.
    turn: u32,
}

impl Identity for Process {
    type Addr = NodeId;

    fn renew(&self) -> Option<Process> {
        Some(Process { turn: self.turn.checked_add(1)?, ..self.clone() })
    }

    fn addr(&self) -> NodeId {
        self.node
    }

    /// Boots are random, so which of two is newer cannot be seen. The one that lives is told that it lost and comes back
    /// with a higher turn; the one that is gone cannot.
    fn win_addr_conflict(&self, adversary: &Process) -> bool {
        (self.turn, self.boot) > (adversary.turn, adversary.boot)
    }
}

/// What foca wants done.
#[derive(Default)]
struct Wishes {
    packets: Vec<(NodeId, Bytes)>,
    timers: Vec<(Duration, Timer<Process>)>,
    changed: BTreeSet<NodeId>,
    rejoined: bool,
}

impl foca::Runtime<Process> for &mut Wishes {
    fn notify(&mut self, notification: Notification<'_, Process>) {
        match notification {
            Notification::MemberUp(process) | Notification::MemberDown(process) | Notification::Rename(_, process) => {
                self.changed.insert(process.node);
            }
            Notification::Rejoin(_) => self.rejoined = true,
            _ => {}
        }
    }

    fn send_to(&mut self, to: Process, data: &[u8]) {
        self.packets.push((to.node, Bytes::copy_from_slice(data)));
    }

    fn submit_after(&mut self, event: Timer<Process>, after: Duration) {
        self.timers.push((after, event));
    }
}

/// A node that was introduced.
struct Acquaintance {
    boot: u64,
    /// When it is greeted next; `None` while it is believed alive.
    greet_at: Option<Duration>,
    pause: Duration,
}

/// A packet that is not in our form, or is not what its sender may send.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Malformed;

/// The protocol's state. Moments (`now`) are those of one monotonic clock.
pub struct Swim {
    node: NodeId,
    foca: Foca<Process, PostcardCodec, SmallRng, foca::NoCustomBroadcast>,
    wishes: Wishes,
    timers: BTreeMap<(Duration, u64), Timer<Process>>,
    timer_count: u64,
    acquaintances: BTreeMap<NodeId, Acquaintance>,
    greetings: BTreeSet<(Duration, NodeId)>,
    /// When all greetings up to now would have left at one per interval.
    greeted_until: Duration,
    alive: BTreeMap<NodeId, u64>,
    events: Vec<GossipEvent>,
}

impl Swim {
    /// A process that knows nobody.
    pub fn new(node: NodeId, boot: u64, pace: &Pace, rng: SmallRng) -> Swim {
        Swim {
            node,
            foca: Foca::new(Process { node, boot, turn: 0 }, config(pace), rng, PostcardCodec),
            wishes: Wishes::default(),
            timers: BTreeMap::new(),
            timer_count: 0,
            acquaintances: BTreeMap::new(),
            greetings: BTreeSet::new(),
            greeted_until: Duration::ZERO,
            alive: BTreeMap::new(),
            events: Vec::new(),
        }
    }

    /// The mesh is connected to this process of `peer`: greet it until it answers.
    pub fn introduce(&mut self, now: Duration, peer: NodeId, boot: u64) {
        if peer == self.node {
            return;
        }
        let fresh = Acquaintance { boot, greet_at: None, pause: ANNOUNCE_PAUSE_FIRST };
        self.acquaintances.entry(peer).or_insert(fresh).boot = boot;
        self.greet_at(peer, now, ANNOUNCE_PAUSE_FIRST);
    }

    /// Ends the acquaintance.
    pub fn forget(&mut self, now: Duration, peer: NodeId) {
        let Some(acquaintance) = self.acquaintances.remove(&peer) else { return };
        if let Some(at) = acquaintance.greet_at {
            self.greetings.remove(&(at, peer));
        }
        self.alive.remove(&peer);
        // Not told to others: whether it is still theirs is not for this node to say. Should it come back, it finds itself
        // called dead and takes another turn.
        let known = self.foca.iter_members().find(|member| member.id().node == peer).map(|member| member.id().clone());
        if let Some(process) = known {
            let result = self.foca.apply_many(std::iter::once(Member::down(process)), false, &mut self.wishes);
            self.conclude(now, result);
        }
    }

    /// Takes the body of a packet that `sender` sealed.
    pub fn receive(&mut self, now: Duration, sender: NodeId, body: &[u8]) -> Result<(), Malformed> {
        let Some(body) = self.screen(sender, body)? else { return Ok(()) };
        let result = self.foca.handle_data(&body, &mut self.wishes);
        self.conclude(now, result);
        Ok(())
    }

    /// Does what is due.
    pub fn tick(&mut self, now: Duration) {
        while let Some(entry) = self.timers.first_entry() {
            if entry.key().0 > now {
                break;
            }
            let timer = entry.remove();
            if self.is_refuted(&timer) {
                continue;
            }
            let result = self.foca.handle_timer(timer, &mut self.wishes);
            self.conclude(now, result);
        }
        while let Some((at, peer)) = self.greetings.first().copied() {
            if at > now {
                break;
            }
            self.greet(now, peer);
        }
    }

    /// When [`Swim::tick`] wants to be called next.
    pub fn next_due(&self) -> Option<Duration> {
        let timer = self.timers.first_key_value().map(|((at, _), _)| *at);
        let greeting = self.greetings.first().map(|(at, _)| *at);
        timer.into_iter().chain(greeting).min()
    }

    /// Tells some of the others that this process goes. After this it takes no part any more.
    pub fn leave(&mut self, now: Duration) {
        let result = self.foca.leave_cluster(&mut self.wishes);
        self.conclude(now, result);
        self.greetings.clear();
    }

    /// What is to be sent, to whom.
    pub fn take_packets(&mut self) -> Vec<(NodeId, Bytes)> {
        std::mem::take(&mut self.wishes.packets)
    }

    /// What happened, in order.
    pub fn take_events(&mut self) -> Vec<GossipEvent> {
        std::mem::take(&mut self.events)
    }

    /// Nodes that are believed alive, this one not among them.
    pub fn alive_count(&self) -> usize {
        self.alive.len()
    }

    fn greet_at(&mut self, peer: NodeId, at: Duration, pause: Duration) {
        let Some(acquaintance) = self.acquaintances.get_mut(&peer) else { return };
        if let Some(old) = acquaintance.greet_at.replace(at) {
            self.greetings.remove(&(old, peer));
        }
        acquaintance.pause = pause;
        self.greetings.insert((at, peer));
    }

    fn greet(&mut self, now: Duration, peer: NodeId) {
        let Some(acquaintance) = self.acquaintances.get_mut(&peer) else { return };
        let (boot, pause) = (acquaintance.boot, acquaintance.pause);
        if self.alive.get(&peer) == Some(&boot) {
            if let Some(at) = acquaintance.greet_at.take() {
                self.greetings.remove(&(at, peer));
            }
            return;
        }
        let earliest = self.greeted_until.saturating_sub(ANNOUNCE_INTERVAL * ANNOUNCE_BURST);
        if earliest > now {
            self.greet_at(peer, earliest, pause);
            return;
        }
        self.greeted_until = self.greeted_until.max(now) + ANNOUNCE_INTERVAL;
        // Whichever turn it has taken by now, it answers.
        let result = self.foca.announce(Process { node: peer, boot, turn: 0 }, &mut self.wishes);
        self.conclude(now, result);
        self.greet_at(peer, now + pause, (pause * 2).min(ANNOUNCE_PAUSE_LAST));
    }

    /// Whether a timer would call a node dead that has objected meanwhile. foca (2.0.0) leaves such a node alive, but tells
    /// it that it was called dead, whereupon it takes another turn, which looks like a death to all others.
    fn is_refuted(&self, timer: &Timer<Process>) -> bool {
        let Timer::ChangeSuspectToDown { member_id, incarnation, .. } = timer else { return false };
        let is_suspect = |member: &Member<Process>| {
            member.id() == member_id && member.incarnation() == *incarnation && member.state() == State::Suspect
        };
        !self.foca.iter_members().any(is_suspect)
    }

    /// Files foca's wishes and makes events of what changed.
    fn conclude(&mut self, now: Duration, result: Result<(), foca::Error>) {
        if let Err(error) = result {
            // Late timers and packets out of their time are of every day; foca goes on after all of them.
            tracing::debug!("gossip: {error}");
        }
        for (after, timer) in self.wishes.timers.drain(..) {
            self.timer_count += 1;
            self.timers.insert((on_grid(now + after), self.timer_count), timer);
        }
        for node in std::mem::take(&mut self.wishes.changed) {
            if !self.acquaintances.contains_key(&node) {
                continue;
            }
            let member = self.foca.iter_members().find(|member| member.id().node == node);
            let boot = member.map(|member| member.id().boot);
            let before = self.alive.get(&node).copied();
            if before == boot {
                continue;
            }
            if let Some(boot) = before {
                self.alive.remove(&node);
                self.events.push(GossipEvent::Down { node, boot });
            }
            if let Some(boot) = boot {
                self.alive.insert(node, boot);
                self.events.push(GossipEvent::Alive { node, boot });
            } else {
                self.greet_at(node, now + ANNOUNCE_PAUSE_LAST, ANNOUNCE_PAUSE_LAST);
            }
        }
        if std::mem::take(&mut self.wishes.rejoined) {
            // Whoever called this process dead has not heard of its new turn unless it was alive here.
            let absent = |(node, _): &(&NodeId, &Acquaintance)| !self.alive.contains_key(node);
            let absent: Vec<NodeId> = self.acquaintances.iter().filter(absent).map(|(node, _)| *node).collect();
            for node in absent {
                self.greet_at(node, now, ANNOUNCE_PAUSE_FIRST);
            }
        }
    }

    /// Checks a body's form and cuts out what tells of nodes that were not introduced; `None` if nothing is left to do.
    fn screen(&self, sender: NodeId, body: &[u8]) -> Result<Option<Vec<u8>>, Malformed> {
        let mut codec = PostcardCodec;
        let mut rest = body;
        let header: foca::Header<Process> = codec.decode_header(&mut rest).map_err(|_| Malformed)?;
        if body.len() > BODY_BYTES_MAX || header.src.node != sender || header.dst.node != self.node {
            return Err(Malformed);
        }
        let is_known = |process: &Process| self.acquaintances.contains_key(&process.node);
        let third = match &header.message {
            Message::PingReq { target, .. } | Message::IndirectAck { target, .. } => Some(target),
            Message::IndirectPing { origin, .. } | Message::ForwardedAck { origin, .. } => Some(origin),
            Message::Broadcast => return Err(Malformed),
            _ => None,
        };
        if !is_known(&header.src) || third.is_some_and(|process| !is_known(process)) {
            return Ok(None);
        }
        let header_bytes = body.len() - rest.len();
        let mut screened = Vec::with_capacity(body.len());
        screened.extend_from_slice(&body[..header_bytes]);
        if rest.is_empty() {
            return Ok(Some(screened));
        }
        if matches!(header.message, Message::Announce | Message::TurnUndead) {
            return Err(Malformed);
        }
        let (claimed, mut rest) = rest.split_first_chunk::<2>().ok_or(Malformed)?;
        screened.extend_from_slice(&[0, 0]);
        let mut kept = 0_u16;
        for _ in 0..u16::from_be_bytes(*claimed) {
            let before = rest;
            let member: Member<Process> = codec.decode_member(&mut rest).map_err(|_| Malformed)?;
            if is_known(member.id()) || member.id().node == self.node {
                screened.extend_from_slice(&before[..before.len() - rest.len()]);
                kept += 1;
            }
        }
        if !rest.is_empty() {
            return Err(Malformed);
        }
        screened[header_bytes..header_bytes + 2].copy_from_slice(&kept.to_be_bytes());
        Ok(Some(screened))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::world::rng::{OsRng, small};

    fn process(node: u64) -> Swim {
        Swim::new(NodeId(node), node + 10, &Pace::default(), small(&OsRng))
    }

    /// Passes all packets on until none is left, and keeps a copy of each.
    fn settle(now: Duration, nodes: &mut [Swim], seen: &mut Vec<(NodeId, usize, Bytes)>) {
        loop {
            let mut packets = Vec::new();
            for node in nodes.iter_mut() {
                node.tick(now);
                packets.extend(node.take_packets().into_iter().map(|(to, body)| (node.node, to, body)));
            }
            if packets.is_empty() {
                return;
            }
            for (from, to, body) in packets {
                let Some(index) = nodes.iter().position(|node| node.node == to) else { continue };
                assert_eq!(nodes[index].receive(now, from, &body), Ok(()));
                seen.push((from, index, body));
            }
        }
    }

    fn three(seen: &mut Vec<(NodeId, usize, Bytes)>) -> Vec<Swim> {
        let mut nodes = vec![process(1), process(2), process(3)];
        for node in &mut nodes {
            for other in 1..=3 {
                // An introduction to oneself is none.
                node.introduce(Duration::ZERO, NodeId(other), other + 10);
            }
        }
        for step in 0..100 {
            settle(Duration::from_millis(step * 20), &mut nodes, seen);
        }
        assert!(nodes.iter().all(|node| node.alive_count() == 2));
        nodes
    }

    #[test]
    fn a_packet_counts_only_from_whom_it_says() {
        let mut seen = Vec::new();
        let mut nodes = three(&mut seen);
        let now = Duration::from_secs(2);
        for (from, index, body) in seen {
            let other = NodeId((1..=3).find(|id| *id != from.0 && *id != nodes[index].node.0).unwrap());
            assert_eq!(nodes[index].receive(now, other, &body), Err(Malformed));
            assert_eq!(nodes[index].receive(now, NodeId(77), &body), Err(Malformed));
        }
    }

    #[test]
    fn damaged_packets_never_panic() {
        let mut seen = Vec::new();
        let mut nodes = three(&mut seen);
        let mut random = 7_u64;
        let mut next = |below: usize| {
            random = random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (random >> 33) as usize % below
        };
        for round in 0..200_000_u64 {
            let (from, index, body) = &seen[next(seen.len())];
            let mut body = body.to_vec();
            for _ in 0..=next(3) {
                match next(3) {
                    0 => body.truncate(next(body.len() + 1)),
                    1 if !body.is_empty() => {
                        let at = next(body.len());
                        body[at] = next(256) as u8;
                    }
                    _ => body.insert(next(body.len() + 1), next(256) as u8),
                }
            }
            let now = Duration::from_secs(3) + Duration::from_millis(round / 100);
            let _ = nodes[*index].receive(now, *from, &body);
            for node in &mut nodes {
                node.tick(now);
                node.take_packets();
                node.take_events();
            }
        }
        assert!(nodes.iter().all(|node| node.foca.iter_membership_state().len() <= 3), "bounded by who was introduced");
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(body in proptest::collection::vec(proptest::num::u8::ANY, 0..1500)) {
            let mut node = process(1);
            node.introduce(Duration::ZERO, NodeId(0), 10);
            let _ = node.receive(Duration::ZERO, NodeId(0), &body);
        }
    }
}
