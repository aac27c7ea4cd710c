//! Keeps the fence open: asks the leader every [`PULSE`] whether this process is still in, and counts from the moment of
//! asking.
//!
//! The leader answers with how long ago a quorum certainly still followed it. So this node may serve until
//! `asked - age + FENCE`: at `asked - age` nobody else can have been elected, and whoever was elected later evicts nobody
//! without proof before `EVICT` has passed since then. All four times are lengths on one clock each.

use std::collections::BTreeSet;
use std::time::Duration;

use sheep_core::admission::Fingerprint;
use sheep_core::cluster_state::{ClusterState, Phase};
use sheep_core::member::NodeId;
use sheep_core::stamp::Epoch;

use super::charter::Charter;
use super::messages::{Answer, Ping, Pong, Request};
use super::voting::Voting;
use super::{FENCE, Quorum, lock};

/// How often the leader is asked, and a new one at once: often enough that a lost packet or two (TCP sends again after some 200 ms) is made good
/// within the fence, seldom enough to cost nothing.
const PULSE: Duration = Duration::from_millis(320);
/// Without a good answer for this long, everybody is asked, and asked to ask the leader.
const WORRY: Duration = Duration::from_millis(500);
/// How long a leader's word that a node has no part in the votes counts when nobody leads any more.
const BARRED: Duration = Duration::from_secs(5);
/// An answer that comes later is of no use.
const PATIENCE: Duration = Duration::from_millis(1500);
/// Nodes that ask to come in, of which the others are told.
const ASKING_TOLD: usize = 32;
/// A link that is down for longer than this is told to the leader.
const UNREACHABLE: Duration = Duration::from_secs(1);

/// What the last answers said.
#[derive(Default)]
pub struct Known {
    /// Who leads.
    pub leader: Option<NodeId>,
    /// When the leader last answered, by this node's clock.
    pub answered: Option<Duration>,
    /// Nodes that vote.
    pub voters: BTreeSet<NodeId>,
    /// Highest term heard of.
    pub term: u64,
    /// Whether this process is a member, by the leader's word.
    pub in_cluster: bool,
    /// Whether this node has a part in the votes, by the leader's word.
    pub in_votes: bool,
    /// Until when this node does not stand for election, because the leader said that it has no part in the votes any more.
    pub barred_until: Option<Duration>,
    /// Up to where the leader had applied the order when it answered last, and the time before.
    pub indices: [u64; 2],
    /// Nodes that ask to come in, by the leader's word.
    pub asking: Vec<(NodeId, Fingerprint, String)>,
}

impl Quorum {
    pub(super) async fn keep_pulse(self) {
        loop {
            self.beat();
            tokio::select! {
                () = self.inner.pulse_wake.notified() => {}
                () = self.inner.world.clock.beat(PULSE) => {}
            }
        }
    }

    fn beat(&self) {
        let Some(charter) = self.charter() else { return };
        if let Some(consensus) = self.leading() {
            self.beat_for_oneself(&consensus);
            if consensus.quorum_age().is_some_and(|age| age < WORRY) {
                return;
            }
            // Nobody follows any more. An operator may have begun another era elsewhere, which only the others can tell.
        }
        let now = self.now();
        let voted = self.consensus().map(|consensus| (consensus.term(), consensus.leader()));
        let (leader, worried) = {
            let mut known = lock(&self.inner.pulse);
            if let Some((term, Some(leader))) = voted
                && term > known.term
            {
                known.term = term;
                known.leader = Some(leader);
            }
            (known.leader, known.answered.is_none_or(|at| now.saturating_sub(at) > WORRY))
        };
        if let Some(consensus) = self.consensus() {
            consensus.set_may_elect(self.may_stand(&consensus, now));
        }
        let asked: Vec<NodeId> = match leader.filter(|leader| *leader != self.inner.node) {
            Some(leader) if !worried => vec![leader],
            _ => self.whom_to_ask(),
        };
        for node in asked {
            let quorum = self.clone();
            tokio::spawn(async move { quorum.ask(charter, node, worried).await });
        }
    }

    /// Whether this node may stand for election. Standing deposes a leader even if nobody votes for this node, because the
    /// next term begins with it: so only one may that reaches a majority and can hear of no leader from any of them (what
    /// Raft calls a pre-vote; D. Ongaro, "Consensus: Bridging Theory and Practice", 2014, section 9.6).
    fn may_stand(&self, consensus: &Voting, now: Duration) -> bool {
        let (answered, barred_until) = {
            let known = lock(&self.inner.pulse);
            (known.answered.unwrap_or(self.inner.started), known.barred_until)
        };
        if now.saturating_sub(answered) <= WORRY || barred_until.is_some_and(|until| now < until) {
            return false;
        }
        let voters = consensus.voters();
        let links = self.mesh().links();
        let here =
            |voter: &&NodeId| **voter == self.inner.node || links.iter().any(|link| link.node == **voter && link.up);
        let there = voters.iter().filter(here).count();
        voters.contains(&self.inner.node) && there > voters.len() / 2
    }

    /// The leader's own right to serve.
    fn beat_for_oneself(&self, consensus: &Voting) {
        let asked = self.now();
        let state = self.state();
        let counted = lock(&self.inner.stewardship).counts(self.inner.node);
        if let (Some(since), Some(age)) = (self.serves_since(&state), consensus.quorum_age().filter(|_| counted)) {
            self.inner.fence.came_in(since);
            self.inner.fence.extend((asked + FENCE).saturating_sub(age));
        }
        let mut known = lock(&self.inner.pulse);
        known.leader = Some(self.inner.node);
        if consensus.quorum_age().is_some_and(|age| age < FENCE) {
            known.answered = Some(asked);
        }
        known.voters = consensus.voters();
        known.term = consensus.term();
        known.in_cluster = self.is_member(&state);
    }

    /// The epoch since which this process may serve in a state, if at all. While members of an earlier life are waited for,
    /// nobody may, and the epoch that they will serve in is not known yet: the last one goes on if all come back.
    fn serves_since(&self, state: &ClusterState) -> Option<Epoch> {
        let waiting = matches!(state.phase, Phase::Waiting { .. });
        let member = state.members.get(&self.inner.node).filter(|member| member.member.boot == self.inner.boot);
        member.filter(|_| !waiting).map(|member| member.since)
    }

    fn whom_to_ask(&self) -> Vec<NodeId> {
        let voters = lock(&self.inner.pulse).voters.clone();
        let up: Vec<NodeId> = self.mesh().links().into_iter().filter(|link| link.up).map(|link| link.node).collect();
        let voting: Vec<NodeId> = up.iter().copied().filter(|node| voters.contains(node)).collect();
        if voting.is_empty() { up } else { voting }
    }

    fn ping(&self, relay: bool) -> Ping {
        let links = self.mesh().links();
        let state = self.state();
        let now = self.now();
        let unreachable =
            links.iter().filter(|link| !link.up && now.saturating_sub(link.since) > UNREACHABLE).map(|link| link.node);
        Ping {
            node: self.inner.node,
            boot: self.inner.boot,
            applied: self.index(),
            unreachable: unreachable.filter(|node| state.members.contains_key(node)).collect(),
            relay,
        }
    }

    async fn ask(&self, charter: Charter, node: NodeId, relay: bool) {
        // Before anything is sent: the lease counts from here.
        let asked = self.now();
        let Some(Answer::Pong(pong)) = self.call(node, &Request::Ping(self.ping(relay)), PATIENCE).await else {
            return;
        };
        if pong.charter.cluster != charter.cluster {
            return;
        }
        if pong.charter.era > charter.era {
            self.yield_to(pong.charter).await;
            // Its order is followed first; then its leases count.
            *lock(&self.inner.pulse) = Known { leader: pong.leader, term: pong.term, ..Known::default() };
            self.look_whether_to_follow();
            return;
        }
        if self.charter() == Some(pong.charter) {
            self.hear(asked, &pong);
        }
    }

    fn hear(&self, asked: Duration, pong: &Pong) {
        if pong.duplicate {
            let reason = format!(
                "node {} is already running: two stores have one identity; was a store directory copied? Remove the copy \
                 and start with an empty directory",
                self.inner.node
            );
            self.inner.fatal.send_replace(Some(reason));
            return;
        }
        let counted = pong.member_boot == Some(self.inner.boot);
        {
            let mut known = lock(&self.inner.pulse);
            if pong.term < known.term {
                return;
            }
            known.term = pong.term;
            if pong.leader.is_some() && known.leader != pong.leader {
                tracing::debug!("node {:?} leads in term {}", pong.leader, pong.term);
                known.leader = pong.leader;
            }
            if !pong.voters.is_empty() {
                known.voters.clone_from(&pong.voters);
            }
            if let Some(age) = pong.lease_age_us {
                // A leader that nobody follows any more does not speak for a quorum.
                if Duration::from_micros(age) < FENCE {
                    known.answered = known.answered.max(Some(asked));
                }
                known.in_cluster = counted;
            }
            // Only who leads names them. Who lags gets no lease, and has to hear all the same that it must ask for the order.
            if !pong.raft_nodes.is_empty() {
                known.in_votes = pong.raft_nodes.contains(&self.inner.node);
                known.barred_until = (!known.in_votes).then_some(asked.saturating_add(BARRED));
                known.indices = [pong.index, known.indices[0]];
                known.asking.clone_from(&pong.asking);
            }
        }
        self.look_whether_to_follow();
        // What is known here may still be from before this process was taken out and came in again.
        if let (Some(since), Some(age)) = (pong.member_since, pong.lease_age_us.filter(|_| counted))
            && self.serves_since(&self.state()) == Some(since)
        {
            self.inner.fence.came_in(since);
            self.inner.fence.extend((asked + FENCE).saturating_sub(Duration::from_micros(age)));
        }
    }

    /// Another leader was voted for: its word on this node's rights is wanted now, not at the next beat.
    pub(super) fn heed_new_leader(&self, consensus: &Voting) {
        let Some(leader) = consensus.leader().filter(|leader| *leader != self.inner.node) else { return };
        if lock(&self.inner.pulse).leader != Some(leader) {
            self.inner.pulse_wake.notify_one();
        }
    }

    /// Who leads, as far as known.
    pub(super) fn leader(&self) -> Option<NodeId> {
        if self.leading().is_some() {
            return Some(self.inner.node);
        }
        let voted = self.consensus().and_then(|consensus| consensus.leader());
        lock(&self.inner.pulse).leader.filter(|leader| *leader != self.inner.node).or(voted)
    }

    /// Answers another node's ping.
    pub(super) async fn answer_ping(&self, ping: Ping, admitted: bool) -> Answer {
        let Some(charter) = self.charter() else { return Answer::Unknown };
        if self.leading().is_none() && ping.relay && admitted {
            let leader = self.leader().filter(|leader| *leader != self.inner.node && *leader != ping.node);
            if let Some(leader) = leader {
                let handed_on = Request::Ping(Ping { relay: false, ..ping.clone() });
                if let Some(answer @ Answer::Pong(_)) = self.call(leader, &handed_on, PATIENCE / 3).await {
                    return answer;
                }
            }
        }
        let state = self.state();
        let leader = self.leader();
        let (term, voters) = {
            let known = lock(&self.inner.pulse);
            (known.term, known.voters.clone())
        };
        let mut pong = Pong {
            charter,
            leader,
            term,
            lease_age_us: None,
            member_boot: state.members.get(&ping.node).map(|member| member.member.boot),
            member_since: state.members.get(&ping.node).map(|member| member.since),
            duplicate: false,
            raft_nodes: BTreeSet::new(),
            voters,
            index: self.index(),
            asking: Vec::new(),
        };
        if let Some(consensus) = self.leading() {
            pong.asking = self.asking();
            pong.asking.truncate(ASKING_TOLD);
            pong.term = consensus.term();
            pong.voters = consensus.voters();
            pong.raft_nodes = consensus.nodes();
            let now = self.now();
            let is_member = pong.member_boot == Some(ping.boot);
            let mut stewardship = lock(&self.inner.stewardship);
            pong.duplicate = stewardship.is_duplicate(ping.node, ping.boot);
            // Noted before the lease is given: an eviction counts from here at the earliest.
            let counted = stewardship.heard(consensus.reign(), now, &ping, is_member);
            pong.lease_age_us =
                consensus.quorum_age().filter(|_| counted || !is_member).map(|age| age.as_micros() as u64);
        }
        Answer::Pong(pong)
    }
}
