//! Leaders, quorums and their changes.

use std::fs;

use super::*;
use crate::cluster::driver::OrderError;

const PATIENCE: Duration = Duration::from_secs(10);

fn others(node: u64) -> Vec<u64> {
    (1..=3).filter(|other| *other != node).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_proposed_is_applied_everywhere_and_survives_restarts() {
    let root = tempfile::tempdir().unwrap();
    let wire = three(root.path(), Timing::default()).await;
    let leader = wire.leader().await;
    let mut took = Vec::new();
    for sequence in 0..200 {
        let begin = wire.world.clock.monotonic();
        propose(&leader, sequence).await.unwrap();
        took.push(wire.since(begin));
    }
    took.sort_unstable();
    println!("three voters, one disk: commit p50 {:?}, p99 {:?}", took[100], took[198]);
    wire.agreed(&leader).await;
    let published = leader.watch().borrow().clone();
    assert_eq!(published.state.members.len(), 200);
    assert!(wire.all().iter().all(|node| *node.watch().borrow() == published));
    // Once more: the first answer, not another change.
    assert_eq!(propose(&leader, 7).await.unwrap().outcome, Outcome::Done);
    assert_eq!(leader.watch().borrow().state.applied, 200);
    wire.agreed(&leader).await;
    let follower = wire.node(others(leader.node().get())[0]);
    assert_eq!(propose(&follower, 300).await, Err(ProposeError::NotLeader { leader: Some(leader.node()) }));
    assert!(leader.read_index(PATIENCE).await.unwrap() >= published.index);
    assert_eq!(follower.applied_after(published.index - 2).unwrap().len(), 3);

    for node in 1..=3 {
        wire.kill(node).await;
    }
    for node in 1..=3 {
        wire.start(node, root.path(), Timing::default()).await;
    }
    let leader = wire.leader().await;
    propose(&leader, 200).await.unwrap();
    wire.agreed(&leader).await;
    assert!(wire.all().iter().all(|node| node.watch().borrow().state.members.len() == 201));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_dead_leader_is_replaced() {
    for called_on in 0..3 {
        let root = tempfile::tempdir().unwrap();
        let wire = three(root.path(), Timing::default()).await;
        let leader = wire.leader().await;
        propose_all(&leader, 0..5).await;
        wire.agreed(&leader).await;
        wire.kill(leader.node().get()).await;
        let begin = wire.world.clock.monotonic();
        for other in others(leader.node().get()).into_iter().take(called_on) {
            let other = wire.node(other);
            tokio::spawn(async move { other.elect_now().await });
        }
        let next = wire.until(|wire| wire.all().into_iter().find(|node| node.status().role == Role::Leader)).await;
        let elected = wire.since(begin);
        assert_eq!(propose(&next, 5).await.unwrap().outcome, Outcome::Done);
        let served = wire.since(begin);
        println!("elect_now on {called_on} of 2: a leader after {elected:?}, a proposal after {served:?}");
        assert!(called_on == 0 || served < Duration::from_secs(1));
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_isolated_leader_acknowledges_nothing() {
    let root = tempfile::tempdir().unwrap();
    let wire = three(root.path(), Timing::default()).await;
    let old = wire.leader().await;
    propose_all(&old, 0..3).await;
    let cut = wire.world.clock.monotonic();
    wire.isolate(old.node().get());
    let short = Duration::from_millis(400);
    assert_eq!(old.propose(join(3), short).await, Err(ProposeError::TimedOut));
    assert_eq!(old.read_index(short).await, Err(ProposeError::TimedOut));
    assert_eq!(old.status().role, Role::Leader, "it does not know");
    let since = wire.since(cut);
    let age = old.quorum_age().unwrap();
    assert!(age >= since && age < since + Duration::from_millis(400), "{age:?} since {since:?}");
    let mut new = None;
    wire.until(|wire| {
        new = wire.all().into_iter().find(|node| node.node() != old.node() && node.status().role == Role::Leader);
        new.clone()
    })
    .await;
    let new = new.unwrap();
    // The same proposal, again: applied once, whatever comes of the old leader's log.
    assert_eq!(propose(&new, 3).await.unwrap().outcome, Outcome::Done);
    propose_all(&new, 4..6).await;
    wire.heal();
    wire.agreed(&new).await;
    wire.until(|_| (old.status().role != Role::Leader).then_some(())).await;
    assert_eq!(old.quorum_age(), None);
    assert_eq!(*old.watch().borrow(), *new.watch().borrow());
    assert_eq!(old.watch().borrow().state.applied, 6);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_that_comes_back_costs_an_election_at_most() {
    let root = tempfile::tempdir().unwrap();
    let wire = three(root.path(), Timing::default()).await;
    let leader = wire.leader().await;
    propose_all(&leader, 0..5).await;
    wire.agreed(&leader).await;
    wire.isolate(others(leader.node().get())[0]);
    wire.world.clock.sleep(Duration::from_millis(2500)).await;
    propose_all(&leader, 5..6).await;
    wire.heal();
    let begin = wire.world.clock.monotonic();
    let (mut longest, mut sequence) = (Duration::ZERO, 6);
    while wire.since(begin) < Duration::from_secs(2) {
        let asked = wire.world.clock.monotonic();
        let done = loop {
            let leads = wire.all().into_iter().find(|node| node.status().role == Role::Leader);
            if let Some(leader) = leads
                && leader.propose(join(sequence), Duration::from_millis(100)).await.is_ok()
            {
                break wire.world.clock.monotonic();
            }
            wire.world.clock.sleep(Duration::from_millis(2)).await;
        };
        longest = longest.max(done.saturating_sub(asked));
        sequence += 1;
        wire.world.clock.sleep(Duration::from_millis(10)).await;
    }
    println!("a voter came back after 2.5 s: the longest wait was {longest:?}");
    assert!(longest < Duration::from_secs(2));
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_is_replaced_by_one_that_needs_a_snapshot() {
    let root = tempfile::tempdir().unwrap();
    let wire = three(root.path(), Timing::default()).await;
    let leader = wire.leader().await;
    propose_all(&leader, 0..20).await;
    // Large ones, so that the log is given up in favour of a snapshot of several pieces.
    for sequence in 20..24 {
        let mut large = member(1000 + sequence);
        large.peer_endpoint = "x".repeat(3 << 20);
        let command = Command::Join { member: large, time: 0 };
        leader.propose(entry(1, sequence, command), PATIENCE).await.unwrap();
    }
    for sequence in 24..1700 {
        let command = Command::Recovered { node: NodeId(0), epoch: sheep_core::stamp::Epoch(0) };
        leader.propose(Entry { settled_below: sequence, ..entry(1, sequence, command) }, PATIENCE).await.unwrap();
    }
    wire.until(|_| leader.applied_after(0).is_none().then_some(())).await;
    let gone = others(leader.node().get())[0];
    wire.kill(gone).await;
    wire.start(4, root.path(), Timing::default()).await;
    let mut now = voters(&[1, 2, 3, 4]);
    now.remove(&NodeId(gone));
    let begin = wire.world.clock.monotonic();
    leader.change_voters(now.clone(), PATIENCE).await.unwrap();
    println!("a voter was replaced by way of a snapshot in {:?}", wire.since(begin));
    let status = leader.status();
    assert_eq!((status.voters, status.changing, status.learners.len()), (now, false, 0));
    wire.agreed(&leader).await;
    assert_eq!(*wire.node(4).watch().borrow(), *leader.watch().borrow());
    // Again is fine; and the new one is needed for the quorum now.
    leader.change_voters(leader.status().voters, PATIENCE).await.unwrap();
    let third = leader.status().voters.into_iter().find(|node| *node != leader.node() && *node != NodeId(4)).unwrap();
    wire.kill(third.get()).await;
    propose_all(&leader, 1700..1702).await;
    // What the new one got is durable.
    wire.agreed(&leader).await;
    wire.kill(4).await;
    wire.start(4, root.path(), Timing::default()).await;
    propose_all(&leader, 1702..1704).await;
    wire.agreed(&leader).await;
    assert_eq!(wire.node(4).watch().borrow().state.members.len(), 28);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_that_nobody_reaches_is_not_taken_in() {
    let root = tempfile::tempdir().unwrap();
    let wire = three(root.path(), Timing::default()).await;
    let leader = wire.leader().await;
    propose_all(&leader, 0..200).await;
    let refused = leader.change_voters(voters(&[1, 2, 3, 9]), Duration::from_millis(300)).await;
    assert_eq!(refused, Err(ProposeError::TimedOut));
    assert_eq!(leader.status().voters, voters(&[1, 2, 3]));
    leader.change_voters(voters(&[1, 2, 3]), PATIENCE).await.unwrap();
    propose_all(&leader, 200..201).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_leader_removes_itself() {
    let root = tempfile::tempdir().unwrap();
    let wire = three(root.path(), Timing::default()).await;
    let old = wire.leader().await;
    propose_all(&old, 0..3).await;
    wire.start(4, root.path(), Timing::default()).await;
    let mut now = voters(&[1, 2, 3, 4]);
    now.remove(&old.node());
    old.change_voters(now.clone(), PATIENCE).await.unwrap();
    let new = wire
        .until(|wire| {
            let is_new = |node: &Consensus| node.node() != old.node() && node.status().role == Role::Leader;
            wire.all().into_iter().find(is_new)
        })
        .await;
    wire.until(|_| (old.status().role == Role::Learner).then_some(())).await;
    assert_eq!(propose(&new, 3).await.unwrap().outcome, Outcome::Done);
    assert_eq!(new.status().voters, now);
    assert_eq!(old.quorum_age(), None);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_voter_alone_orders_alone_and_snapshots_keep_its_log_short() {
    let root = tempfile::tempdir().unwrap();
    let wire = Wire::new();
    let alone = wire.start(1, root.path(), Timing::default()).await;
    assert_eq!(propose(&alone, 0).await, Err(ProposeError::NotLeader { leader: None }));
    alone.initialize(voters(&[1])).await.unwrap();
    assert!(matches!(alone.initialize(voters(&[1])).await, Err(ProposeError::Refused(_))));
    wire.leader().await;
    for sequence in 0..2600 {
        let settled = Entry { settled_below: sequence, ..join(sequence % 50) };
        alone.propose(Entry { sequence, ..settled }, PATIENCE).await.unwrap();
    }
    wire.until(|_| alone.applied_after(1400).is_none().then_some(())).await;
    wire.kill(1).await;
    let directory = root.path().join("1");
    let snapshot = fs::read(directory.join("snapshot")).unwrap();
    let alone = wire.start(1, root.path(), Timing::default()).await;
    wire.leader().await;
    assert_eq!(alone.watch().borrow().state.applied, 2600);
    // A snapshot that was lost or replaced by an old one is missed.
    wire.kill(1).await;
    fs::remove_file(directory.join("snapshot")).unwrap();
    let mouth = || Arc::new(Mouth { from: NodeId(1), wire: wire.clone() });
    let open = || Consensus::open(&wire.world, NodeId(1), directory.clone(), CLUSTER, mouth(), Timing::default());
    assert!(matches!(open().await.err(), Some(OrderError::Damaged { .. })));
    fs::write(directory.join("snapshot"), snapshot).unwrap();
    open().await.unwrap().shutdown().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_too_large_or_foreign_is_refused() {
    let root = tempfile::tempdir().unwrap();
    let wire = three(root.path(), Timing::default()).await;
    let leader = wire.leader().await;
    let command = Command::DeleteVdi { name: vec![0; 5 << 20], tag: Vec::new(), snapshot_id: 0 };
    let large = leader.propose(entry(1, 0, command), PATIENCE).await;
    assert!(matches!(large, Err(ProposeError::TooLarge { .. })));
    use crate::cluster::consensus::format::{Ballot, Request, Response, decode_response, encode_request};
    let ballot = Ballot { term: 1000, node: 9, committed: true };
    let request = Request::Append { ballot, previous: None, committed: None, entries: Vec::new() };
    let foreign = leader.handle(encode_request(99, &request).into()).await;
    assert_eq!(decode_response(CLUSTER, &foreign), Ok(Response::OtherCluster { cluster: CLUSTER }));
    let nonsense = leader.handle(Bytes::from_static(b"nonsense nonsense")).await;
    assert_eq!(decode_response(CLUSTER, &nonsense), Ok(Response::Malformed));
    assert_eq!(leader.status().role, Role::Leader);
    propose_all(&leader, 1..2).await;
}
