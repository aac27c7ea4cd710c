//! What the leader does for all: evicts those who are gone, ends waiting after a restart, settles broken links, chooses voters.
//!
//! A leader begins with no knowledge of its own: until it has found out about every member (alive, another process by now,
//! refused, or silent for [`EVICT`]) it evicts nobody, so that those who died together leave in one epoch.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::time::Duration;

use sheep_core::cluster_state::{ClusterState, Phase};
use sheep_core::command::{Command, Outcome};
use sheep_core::member::NodeId;

use super::messages::{Found, Ping};
use super::voting::{Reign, Voting};
use super::{EVICT, FENCE, Quorum, lock};
use crate::world::marks::{self, Mark};

/// How often the leader looks.
const TICK: Duration = Duration::from_millis(128);
/// How often the others look whether they lead; whoever begins to is woken by the first entry of its term.
const IDLE_TICK: Duration = Duration::from_millis(640);
/// A process that was heard within this is taken to be there; a restart under the same identity is looked into before.
const RECENT: Duration = Duration::from_millis(800);
/// After an orderly stop of everybody, the last epoch goes on unchanged if all are back within this; else those who are back
/// go on in a new one.
const WAIT_FOR_ALL: Duration = Duration::from_secs(10);
/// How long one change of the members may take to be ordered before the leader looks again.
const ORDER_PATIENCE: Duration = Duration::from_secs(2);
/// How far behind the leader a node may be and still serve.
const LAG_MAX: Duration = Duration::from_secs(1);
/// Two members that cannot talk to each other for this long, though both talk to the leader, cannot both stay.
const BROKEN_LINK: Duration = Duration::from_secs(3);

/// The last ping of a node.
#[derive(Clone, Debug)]
struct Heard {
    boot: u64,
    at: Duration,
    unreachable: Vec<NodeId>,
    applied: u64,
}

/// What the leader of one term knows.
#[derive(Default)]
pub struct Stewardship {
    reign: Reign,
    since: Duration,
    /// Whether everything that leaders before may have ordered is known here: an eviction among it must not meet a new lease.
    ready: bool,
    /// Whether every member has been found out about once.
    settled: bool,
    heard: BTreeMap<NodeId, Heard>,
    /// Processes whose end is proved.
    dead: BTreeSet<(NodeId, u64)>,
    /// Members that get no lease any more and are evicted when their last one is over.
    condemned: BTreeMap<NodeId, Duration>,
    /// Identities under which two processes run, and the one that came second.
    duplicates: BTreeSet<(NodeId, u64)>,
    /// Members whose eviction is being ordered: no lease for them whatever they say now.
    evicting: BTreeSet<NodeId>,
    /// Processes that ping under a member's identity and are not the member's.
    contested: BTreeMap<NodeId, u64>,
    /// Members that somebody is looking at.
    examining: BTreeSet<NodeId>,
    /// Up to where the leader had applied the order, and when: the last second of it.
    pace: VecDeque<(Duration, u64)>,
    /// Since when two members have not reached each other.
    broken: BTreeMap<(NodeId, NodeId), Duration>,
}

/// What is known of a member.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
enum Condition {
    Alive,
    Gone,
    Undecided,
}

impl Stewardship {
    fn begin_if_new(&mut self, reign: Reign, now: Duration) {
        if self.reign != reign {
            let examining = std::mem::take(&mut self.examining);
            *self = Stewardship { reign, since: now, examining, ..Stewardship::default() };
        }
    }

    /// Notes a ping; gives whether its sender may have a lease.
    pub fn heard(&mut self, reign: Reign, now: Duration, ping: &Ping, is_member: bool) -> bool {
        self.begin_if_new(reign, now);
        let counted = is_member && !self.lags(now, ping.applied) && self.counts(ping.node);
        if is_member {
            self.contested.remove(&ping.node);
        } else {
            self.contested.insert(ping.node, ping.boot);
        }
        let another_is_there = self.heard.get(&ping.node).is_some_and(|heard| heard.boot != ping.boot) && !is_member;
        if !another_is_there || self.silent_for(ping.node, now) > RECENT {
            let heard =
                Heard { boot: ping.boot, at: now, unreachable: ping.unreachable.clone(), applied: ping.applied };
            if counted || !self.condemned.contains_key(&ping.node) {
                self.heard.insert(ping.node, heard);
            }
        }
        counted
    }

    fn silent_for(&self, node: NodeId, now: Duration) -> Duration {
        let last = self.heard.get(&node).map_or(self.since, |heard| heard.at.max(self.since));
        now.saturating_sub(last)
    }

    /// A node is let in: it was there to ask for it.
    pub fn let_in(&mut self, node: NodeId, boot: u64, now: Duration) {
        self.condemned.remove(&node);
        // It is no member any more, and what this leader orders comes after its eviction.
        self.evicting.remove(&node);
        // Should the proof have been wrong, it must not be held against it again.
        self.dead.retain(|(dead, _)| *dead != node);
        self.heard.insert(node, Heard { boot, at: now, unreachable: Vec::new(), applied: 0 });
    }

    /// Whether a process of this identity runs beside another one.
    pub fn is_duplicate(&self, node: NodeId, boot: u64) -> bool {
        self.duplicates.contains(&(node, boot))
    }

    /// Notes how far the order has come: whoever has not applied what the leader had a second ago gets no lease, because it might
    /// tell its clients what is long over.
    pub fn note_pace(&mut self, now: Duration, index: u64) {
        self.pace.push_back((now, index));
        while self.pace.get(1).is_some_and(|(at, _)| now.saturating_sub(*at) >= LAG_MAX) {
            self.pace.pop_front();
        }
    }

    fn lags(&self, now: Duration, applied: u64) -> bool {
        self.pace.front().is_some_and(|(at, index)| now.saturating_sub(*at) >= LAG_MAX && applied < *index)
    }

    /// Whether every member has been found out about once.
    pub fn is_settled(&self) -> bool {
        self.settled
    }

    /// Whether a member may have leases.
    pub fn counts(&self, node: NodeId) -> bool {
        self.ready && !self.condemned.contains_key(&node) && !self.evicting.contains(&node)
    }

    /// Nodes heard within the fence's patience.
    pub fn present(&self, now: Duration) -> BTreeSet<NodeId> {
        self.heard.iter().filter(|(_, heard)| now.saturating_sub(heard.at) < FENCE).map(|(node, _)| *node).collect()
    }

    /// Members under whose identity another process pings, with that process.
    fn contests(&self, state: &ClusterState) -> Vec<(NodeId, u64, u64)> {
        let contested = self.contested.iter().filter_map(|(node, other)| {
            let boot = state.members.get(node)?.member.boot;
            (boot != *other && !self.dead.contains(&(*node, boot))).then_some((*node, boot, *other))
        });
        contested.collect()
    }

    pub fn prove_dead(&mut self, node: NodeId, boot: u64) {
        self.dead.insert((node, boot));
    }

    /// False if that is known already.
    pub fn note_duplicate(&mut self, node: NodeId, boot: u64) -> bool {
        self.duplicates.insert((node, boot))
    }

    /// Takes leases away from a member that has to go.
    pub fn condemn(&mut self, node: NodeId, now: Duration) {
        self.condemned.entry(node).or_insert(now);
    }

    /// The leader itself need not go if nobody misses a link with it any more, as [`Stewardship::judge_links`] has just found: it
    /// was not evicted yet, and who leads knows that it was not.
    fn pardon(&mut self, leader: NodeId) {
        let is_whole = !self.broken.keys().any(|(one, other)| *one == leader || *other == leader);
        if is_whole && self.condemned.remove(&leader).is_some() {
            tracing::info!("this node reaches every member again: it stays");
        }
    }

    fn condition(&self, node: NodeId, boot: u64, own: (NodeId, u64), now: Duration) -> Condition {
        if self.dead.contains(&(node, boot)) {
            return Condition::Gone;
        }
        if node == own.0 && boot != own.1 {
            return Condition::Gone;
        }
        // The leader as well: it goes on leading, and comes in again when it reaches everybody.
        if let Some(since) = self.condemned.get(&node) {
            return if now.saturating_sub(*since) >= EVICT { Condition::Gone } else { Condition::Alive };
        }
        if node == own.0 {
            return Condition::Alive;
        }
        let silent = self.silent_for(node, now);
        match self.heard.get(&node) {
            _ if silent >= EVICT => Condition::Gone,
            Some(heard) if heard.boot == boot => Condition::Alive,
            _ => Condition::Undecided,
        }
    }

    /// Members that are gone, once all have been found out about.
    fn gone(&mut self, state: &ClusterState, own: (NodeId, u64), now: Duration) -> Vec<NodeId> {
        let conditions: Vec<(NodeId, Condition)> = state
            .members
            .iter()
            .map(|(node, member)| (*node, self.condition(*node, member.member.boot, own, now)))
            .collect();
        if !self.settled {
            if conditions.iter().any(|(_, condition)| *condition == Condition::Undecided) {
                return Vec::new();
            }
            self.settled = true;
        }
        conditions.into_iter().filter(|(_, condition)| *condition == Condition::Gone).map(|(node, _)| node).collect()
    }

    /// Notes which members do not reach each other; gives one that has to go because of it.
    fn judge_links(
        &mut self,
        state: &ClusterState,
        leader: NodeId,
        own_down: &[NodeId],
        now: Duration,
    ) -> Option<NodeId> {
        let mut broken = BTreeSet::new();
        let is_heard = |node: &NodeId| *node == leader || self.silent_for(*node, now) < FENCE;
        let mut note = |one: NodeId, others: &[NodeId]| {
            for other in others.iter().filter(|other| state.members.contains_key(other) && is_heard(other)) {
                broken.insert((one.min(*other), one.max(*other)));
            }
        };
        for (node, heard) in self.heard.iter().filter(|(node, _)| state.members.contains_key(node) && is_heard(node)) {
            note(*node, &heard.unreachable);
        }
        note(leader, own_down);
        let previous = std::mem::take(&mut self.broken);
        self.broken = broken.iter().map(|pair| (*pair, previous.get(pair).copied().unwrap_or(now))).collect();
        // A link of one that goes anyway, or that is out, is nobody else's fault.
        let stays = |node: NodeId| state.members.contains_key(&node) && !self.condemned.contains_key(&node);
        let lasting: Vec<(NodeId, NodeId)> = self
            .broken
            .iter()
            .filter(|((one, other), since)| now.saturating_sub(**since) > BROKEN_LINK && stays(*one) && stays(*other))
            .map(|(pair, _)| *pair)
            .collect();
        let (one, other) = *lasting.first()?;
        let degree = |node: NodeId| lasting.iter().filter(|(a, b)| *a == node || *b == node).count();
        // Whoever misses more of the others goes; the leader only if it alone is the trouble, a gateway before a holder.
        let rank = |node: NodeId| {
            let gateway = state.members.get(&node).is_some_and(|member| member.member.is_gateway());
            (degree(node), node != leader, gateway, node)
        };
        Some(if rank(one) > rank(other) { one } else { other })
    }

    /// Whether a member has applied the order up to an index, as far as its last ping tells.
    pub fn has_applied(&self, node: NodeId, index: u64) -> bool {
        self.heard.get(&node).is_some_and(|heard| heard.applied >= index)
    }
}

impl Quorum {
    pub(super) async fn run_steward(self) {
        loop {
            let pause = if self.leading().is_some() { TICK } else { IDLE_TICK };
            tokio::select! {
                () = self.inner.steward_wake.notified() => {}
                () = self.inner.world.clock.beat(pause) => {}
            }
            let Some(consensus) = self.leading() else { continue };
            {
                let mut stewardship = lock(&self.inner.stewardship);
                stewardship.begin_if_new(consensus.reign(), self.now());
                stewardship.note_pace(self.now(), self.index());
            }
            // A leader that nobody follows any more would only wait for its own proposals.
            if consensus.quorum_age().is_none_or(|age| age > FENCE) || !self.is_ready(&consensus).await {
                continue;
            }
            self.look_into_restarts();
            self.take_care().await;
            self.choose_voters(&consensus).await;
        }
    }

    async fn take_care(&self) {
        let state = self.state();
        let now = self.now();
        let own = (self.inner.node, self.inner.boot);
        if state.phase == Phase::Shutdown {
            // Who goes first is not gone: all of them are stopping. A process that was in has heard so too, even if it had to
            // leave meanwhile; one that never was comes after the stop.
            if !lock(&self.inner.position).joined {
                self.steward(Command::Restart).await;
            }
            return;
        }
        self.condemn_banned(&state, now);
        let since = lock(&self.inner.stewardship).since;
        if matches!(state.phase, Phase::Waiting { .. }) && now.saturating_sub(since) > WAIT_FOR_ALL {
            self.steward(Command::StopWaiting { time: self.label() }).await;
            return;
        }
        let gone = lock(&self.inner.stewardship).gone(&state, own, now);
        if !gone.is_empty() {
            let names: Vec<String> = gone.iter().map(NodeId::to_string).collect();
            marks::hit(Mark::MemberEvicted);
            tracing::warn!("evicting {}", names.join(", "));
            lock(&self.inner.stewardship).evicting = gone.iter().copied().collect();
            let evicted = self.steward(Command::Evict { nodes: gone.clone(), time: self.label() }).await;
            let mut stewardship = lock(&self.inner.stewardship);
            // If nobody knows what came of it, they get no lease before somebody does: it is ordered again.
            if evicted {
                stewardship.evicting.clear();
                stewardship.condemned.retain(|node, _| !gone.contains(node));
            }
            return;
        }
        let down: Vec<NodeId> = self.mesh().links().iter().filter(|link| !link.up).map(|link| link.node).collect();
        let mut stewardship = lock(&self.inner.stewardship);
        let loser = stewardship.judge_links(&state, own.0, &down, now);
        if !is_banned(&state, own.0) {
            stewardship.pardon(own.0);
        }
        if let Some(node) = loser
            && stewardship.counts(node)
        {
            tracing::warn!("node {node} does not reach every member: it has to leave until it does");
            stewardship.condemn(node, now);
        }
    }

    /// Whoever was banned has to go, once its last lease is over.
    fn condemn_banned(&self, state: &ClusterState, now: Duration) {
        let banned = state.members.keys().filter(|node| is_banned(state, **node));
        let mut stewardship = lock(&self.inner.stewardship);
        for node in banned {
            stewardship.condemn(*node, now);
        }
    }

    /// Whether this leader knows everything that was ordered before its term.
    async fn is_ready(&self, consensus: &Voting) -> bool {
        if lock(&self.inner.stewardship).ready {
            return true;
        }
        let (Some(charter), reign) = (self.charter(), consensus.reign()) else { return false };
        let Ok(index) = consensus.read_index(ORDER_PATIENCE).await else { return false };
        self.await_index_for(charter, index, ORDER_PATIENCE).await;
        let mut stewardship = lock(&self.inner.stewardship);
        stewardship.ready = stewardship.reign == reign && consensus.reign() == reign && self.index() >= index;
        stewardship.ready
    }

    /// Orders something as the leader, once: a leader that was replaced must not go on ordering what it knew then. Gives whether
    /// it is in the order.
    async fn steward(&self, command: Command) -> bool {
        let (Some(consensus), Some(charter)) = (self.leading(), self.charter()) else { return false };
        let entry = self.entry_for(command);
        match consensus.propose(entry, ORDER_PATIENCE).await {
            Ok(proposed) => {
                if let Outcome::Refused(refusal) = proposed.outcome {
                    tracing::debug!("the order refused a change: {refusal:?}");
                }
                self.await_index_for(charter, proposed.index, ORDER_PATIENCE).await;
                true
            }
            Err(error) => {
                tracing::warn!("cannot order a change of the members: {error}");
                false
            }
        }
    }

    /// Another process of a member's identity pings: is the member's own process gone, or does it run twice?
    fn look_into_restarts(&self) {
        let state = self.state();
        let now = self.now();
        let contests = lock(&self.inner.stewardship).contests(&state);
        for (node, boot, other) in contests {
            let quorum = self.clone();
            tokio::spawn(async move { quorum.examine(node, boot, Some(other)).await });
        }
        let silent: Vec<(NodeId, u64)> = {
            let stewardship = lock(&self.inner.stewardship);
            let members = state.members.iter().map(|(node, member)| (*node, member.member.boot));
            let silent = members.filter(|(node, boot)| {
                *node != self.inner.node
                    && stewardship.heard.get(node).is_none_or(|heard| heard.boot != *boot)
                    && !stewardship.dead.contains(&(*node, *boot))
                    && stewardship.silent_for(*node, now) < EVICT
            });
            silent.collect()
        };
        for (node, boot) in silent {
            let quorum = self.clone();
            tokio::spawn(async move { quorum.examine(node, boot, None).await });
        }
    }

    /// Connects to a member to see which process is there, unless that is being done. `other` pings under its identity.
    pub(super) async fn examine(&self, node: NodeId, boot: u64, other: Option<u64>) {
        if !lock(&self.inner.stewardship).examining.insert(node) {
            return;
        }
        self.look_at(node, boot, other).await;
        lock(&self.inner.stewardship).examining.remove(&node);
    }

    async fn look_at(&self, node: NodeId, boot: u64, other: Option<u64>) {
        match self.probe(node, boot).await {
            Found::Alive(there) if there != boot => self.bury(node, boot),
            // Nobody at its address: the second path is the ping of its successor, or another member's word.
            Found::Refused if other.is_some() || self.confirmed_by_another(node, boot).await => {
                self.bury(node, boot);
            }
            Found::Alive(_) => {
                if let Some(other) = other
                    && lock(&self.inner.stewardship).note_duplicate(node, other)
                {
                    tracing::error!("node {node} runs twice: its store directory was copied");
                }
            }
            Found::Refused | Found::Silent => {}
        }
    }

    /// A process is gone, unless it turns out to be connected with this one.
    pub(super) fn bury(&self, node: NodeId, boot: u64) {
        if self.mesh().is_connected_with(node, boot) {
            tracing::debug!("node {node} (process {boot:016x}) lives, although its address does not answer for it");
            return;
        }
        lock(&self.inner.stewardship).prove_dead(node, boot);
        self.inner.steward_wake.notify_one();
    }
}

/// Whether a member is not admitted any more.
fn is_banned(state: &ClusterState, node: NodeId) -> bool {
    state.admission.key.is_some() && !state.admission.nodes.contains_key(&node)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use sheep_core::cluster_state::EpochMember;
    use sheep_core::level::Level;
    use sheep_core::member::Member;
    use sheep_core::stamp::Epoch;

    use super::*;

    const OWN: (NodeId, u64) = (NodeId(1), 11);

    fn at(milliseconds: u64) -> Duration {
        Duration::from_millis(milliseconds)
    }

    /// Members 1 to `count`, whose processes are 11, 12, ...
    fn state(count: u64) -> ClusterState {
        let members: BTreeMap<NodeId, EpochMember> = (1..=count)
            .map(|id| {
                let member = Member {
                    id: NodeId(id),
                    address: [0; 16],
                    port: 7000,
                    peer_endpoint: String::new(),
                    boot: id + 10,
                    zone: id as u32,
                    weight: 1,
                    level: Level::OURS,
                };
                (NodeId(id), EpochMember { member, since: Epoch(1) })
            })
            .collect();
        ClusterState { members, phase: Phase::Running, ..ClusterState::default() }
    }

    fn ping(node: u64, boot: u64, unreachable: &[u64]) -> Ping {
        let unreachable = unreachable.iter().map(|node| NodeId(*node)).collect();
        Ping { node: NodeId(node), boot, applied: 0, unreachable, relay: false }
    }

    fn reign(term: u64) -> Reign {
        Reign { order: 7, term }
    }

    fn leader(term: u64, now: u64) -> Stewardship {
        let mut stewardship = Stewardship::default();
        stewardship.begin_if_new(reign(term), at(now));
        stewardship.ready = true;
        stewardship
    }

    fn hear(stewardship: &mut Stewardship, now: u64, node: u64) {
        assert!(stewardship.heard(reign(1), at(now), &ping(node, node + 10, &[]), true));
    }

    #[test]
    fn silence_evicts_only_after_the_last_lease_is_long_over() {
        let state = state(3);
        let mut stewardship = leader(1, 0);
        for node in [2, 3] {
            hear(&mut stewardship, 100, node);
        }
        assert!(stewardship.gone(&state, OWN, at(200)).is_empty());
        for now in (300..3000).step_by(100) {
            hear(&mut stewardship, now, 3);
            assert!(stewardship.gone(&state, OWN, at(now)).is_empty(), "at {now}");
        }
        hear(&mut stewardship, 3100, 3);
        assert_eq!(stewardship.gone(&state, OWN, at(3100)), [NodeId(2)]);
    }

    #[test]
    fn a_new_leader_finds_out_about_all_before_it_evicts_any() {
        let state = state(4);
        let mut stewardship = leader(1, 0);
        stewardship.prove_dead(NodeId(2), 12);
        hear(&mut stewardship, 100, 3);
        // 4 is undecided: it may have died with 2.
        assert!(stewardship.gone(&state, OWN, at(200)).is_empty());
        stewardship.prove_dead(NodeId(4), 14);
        assert_eq!(stewardship.gone(&state, OWN, at(300)), [NodeId(2), NodeId(4)]);
        // From then on the death of one is acted upon at once.
        let mut settled = Stewardship { settled: true, ..stewardship };
        settled.dead.clear();
        settled.prove_dead(NodeId(3), 13);
        hear(&mut settled, 350, 4);
        assert_eq!(settled.gone(&state, OWN, at(400)), [NodeId(3)]);
    }

    #[test]
    fn another_term_starts_all_over() {
        let state = state(2);
        let mut stewardship = leader(1, 0);
        assert_eq!(stewardship.gone(&state, OWN, at(3000)), [NodeId(2)]);
        // The leader before may have answered until a moment ago.
        stewardship.begin_if_new(reign(2), at(3000));
        assert!(stewardship.gone(&state, OWN, at(5900)).is_empty());
        assert_eq!(stewardship.gone(&state, OWN, at(6000)), [NodeId(2)]);
        // Nor does a term of another era's order go on where one of the same number ended.
        stewardship.begin_if_new(Reign { order: 8, term: 2 }, at(6000));
        assert!(stewardship.gone(&state, OWN, at(8900)).is_empty());
    }

    #[test]
    fn the_leaders_own_earlier_process_is_gone() {
        let state = state(1);
        let mut stewardship = leader(1, 0);
        assert_eq!(stewardship.gone(&state, (NodeId(1), 99), at(1)), [NodeId(1)]);
    }

    #[test]
    fn a_condemned_member_gets_no_lease_and_goes_when_its_last_one_is_over() {
        let state = state(2);
        let mut stewardship = leader(1, 0);
        hear(&mut stewardship, 0, 2);
        stewardship.condemn(NodeId(2), at(100));
        assert!(!stewardship.heard(reign(1), at(200), &ping(2, 12, &[]), true));
        assert!(stewardship.gone(&state, OWN, at(3000)).is_empty());
        assert_eq!(stewardship.gone(&state, OWN, at(3100)), [NodeId(2)]);
    }

    #[test]
    fn a_leader_that_does_not_reach_the_others_goes_unless_it_does_in_time() {
        let state = state(3);
        let mut stewardship = leader(1, 0);
        for time in [0, 3000] {
            hear(&mut stewardship, time, 2);
            hear(&mut stewardship, time, 3);
        }
        let down = [NodeId(2), NodeId(3)];
        assert_eq!(stewardship.judge_links(&state, OWN.0, &down, at(0)), None);
        assert_eq!(stewardship.judge_links(&state, OWN.0, &down, at(3100)), Some(OWN.0), "it alone is the trouble");
        stewardship.condemn(OWN.0, at(3100));
        assert!(!stewardship.counts(OWN.0), "it serves nobody meanwhile");
        let mut healed = leader(1, 0);
        healed.condemn(OWN.0, at(3100));
        for time in [0, 3000] {
            hear(&mut healed, time, 2);
            hear(&mut healed, time, 3);
        }
        assert_eq!(healed.judge_links(&state, OWN.0, &[NodeId(3)], at(3100)), None);
        hear(&mut healed, 6000, 3);
        let down = [NodeId(3)];
        assert_eq!(healed.judge_links(&state, OWN.0, &down, at(6300)), None, "nobody else has to go for its links");
        healed.pardon(OWN.0);
        assert!(!healed.counts(OWN.0), "one is missing still");
        assert_eq!(healed.judge_links(&state, OWN.0, &[], at(6400)), None);
        healed.pardon(OWN.0);
        for (stewardship, expected) in [(&mut stewardship, vec![OWN.0]), (&mut healed, Vec::new())] {
            hear(stewardship, 6000, 2);
            hear(stewardship, 6000, 3);
            assert_eq!(stewardship.gone(&state, OWN, at(6100)), expected);
        }
    }

    #[test]
    fn a_leader_is_not_pardoned_while_others_do_not_reach_it() {
        let state = state(3);
        let mut stewardship = leader(1, 0);
        stewardship.condemn(OWN.0, at(0));
        stewardship.heard(reign(1), at(100), &ping(2, 12, &[1]), true);
        hear(&mut stewardship, 100, 3);
        // Its own links are all up; condemned again by what 2 says, it would never go, nor serve.
        assert_eq!(stewardship.judge_links(&state, OWN.0, &[], at(200)), None);
        stewardship.pardon(OWN.0);
        assert!(!stewardship.counts(OWN.0));
        assert_eq!(stewardship.gone(&state, OWN, at(3000)), [OWN.0]);
    }

    #[test]
    fn the_links_of_a_leader_that_is_out_are_nobodys_fault() {
        let mut state = state(3);
        state.members.remove(&OWN.0);
        let mut stewardship = leader(1, 0);
        for time in [0, 3100] {
            hear(&mut stewardship, time, 2);
            hear(&mut stewardship, time, 3);
            // Links heal one by one.
            assert_eq!(stewardship.judge_links(&state, OWN.0, &[NodeId(3)], at(time)), None);
        }
    }

    #[test]
    fn whoever_lags_behind_the_order_gets_no_lease_but_is_not_evicted_for_it() {
        let state = state(2);
        let mut stewardship = leader(1, 0);
        stewardship.note_pace(at(0), 50);
        assert!(stewardship.heard(reign(1), at(500), &ping(2, 12, &[]), true), "not a second yet");
        stewardship.note_pace(at(1000), 60);
        assert!(!stewardship.heard(reign(1), at(1000), &ping(2, 12, &[]), true));
        assert!(stewardship.heard(reign(1), at(1100), &Ping { applied: 50, ..ping(2, 12, &[]) }, true));
        stewardship.note_pace(at(2000), 60);
        assert!(!stewardship.heard(reign(1), at(2000), &Ping { applied: 59, ..ping(2, 12, &[]) }, true));
        assert!(stewardship.gone(&state, OWN, at(4900)).is_empty());
    }

    #[test]
    fn no_lease_before_the_leader_knows_all_and_none_for_those_being_evicted() {
        let mut stewardship = Stewardship::default();
        stewardship.begin_if_new(reign(1), at(0));
        assert!(!stewardship.heard(reign(1), at(100), &ping(2, 12, &[]), true), "an eviction may be on its way");
        stewardship.ready = true;
        hear(&mut stewardship, 200, 2);
        stewardship.evicting.insert(NodeId(2));
        assert!(!stewardship.heard(reign(1), at(300), &ping(2, 12, &[]), true));
        // It turned out that the eviction was ordered, although the leader had given it up.
        stewardship.let_in(NodeId(2), 13, at(400));
        assert!(stewardship.heard(reign(1), at(500), &ping(2, 13, &[]), true));
    }

    #[test]
    fn of_two_that_do_not_reach_each_other_the_one_that_misses_more_goes() {
        let state = state(4);
        let mut stewardship = leader(1, 0);
        let judge = |stewardship: &mut Stewardship, now: u64| {
            for (node, unreachable) in [(2, &[3, 4][..]), (3, &[2]), (4, &[2])] {
                stewardship.heard(reign(1), at(now), &ping(node, node + 10, unreachable), true);
            }
            stewardship.judge_links(&state, NodeId(1), &[], at(now))
        };
        assert_eq!(judge(&mut stewardship, 0), None);
        assert_eq!(judge(&mut stewardship, 2900), None);
        assert_eq!(judge(&mut stewardship, 3100), Some(NodeId(2)));
        // A link that came back is forgotten.
        for node in [2, 3, 4] {
            hear(&mut stewardship, 3200, node);
        }
        assert_eq!(stewardship.judge_links(&state, NodeId(1), &[], at(3200)), None);
        assert_eq!(judge(&mut stewardship, 3300), None);
    }

    #[test]
    fn another_process_of_a_member_is_looked_into_and_does_not_speak_for_it() {
        let state = state(2);
        let mut stewardship = leader(1, 0);
        hear(&mut stewardship, 0, 2);
        assert!(!stewardship.heard(reign(1), at(100), &ping(2, 77, &[]), false));
        assert_eq!(stewardship.contests(&state), [(NodeId(2), 12, 77)]);
        stewardship.note_duplicate(NodeId(2), 77);
        assert!(stewardship.is_duplicate(NodeId(2), 77) && !stewardship.is_duplicate(NodeId(2), 12));
        assert!(stewardship.gone(&state, OWN, at(200)).is_empty(), "the member still runs");
        stewardship.prove_dead(NodeId(2), 12);
        assert!(stewardship.contests(&state).is_empty());
        assert_eq!(stewardship.gone(&state, OWN, at(300)), [NodeId(2)]);
    }
}
