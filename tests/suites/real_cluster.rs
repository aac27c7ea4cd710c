//! The default driver on hosts of their own: nodes that find each other, agree, fence and heal, under cut cables, lost
//! packets, killed and paused processes, and strangers.
//!
//! Guests write and read one volume through several nodes at once; whatever happens, one history must explain all they were
//! told ([`tests::linear`]). Times are printed, and asserted only where a stall would mean that nothing goes on at all.
//!
//! `FULL=1` runs the sizes of a release. Root, `nft` and `ip` are needed; without them each test says `SKIPPED`.

use std::fs;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tests::capture::{Capture, udp_payload_to};
use tests::clients::{HEADER_BYTES, Request, opcode, result};
use tests::command;
use tests::flock::{CLIENT_PORT, Driver, Flock, NODE_PORT};
use tests::namespaces::Network;
use tests::nbd_client::{NbdClient, Style};
use tests::sim::Random;
use tests::spawn::DOG_DEADLINE;
use tests::workload::{Disk, Load, LoadPlan, Outcome, Record};

/// No single event may keep guests waiting for as long as this, on however busy a machine.
const LIVELY: Duration = Duration::from_secs(20);
/// A node that lost its quorum is silent after 2 s; this is when the test begins to listen.
const FENCED_AFTER: Duration = Duration::from_secs(5);
/// How long somebody who must not come in gets to come in.
const REFUSED_AFTER: Duration = Duration::from_secs(4);
const BLOCKS: u32 = 64;

fn is_skipped(what: &str) -> bool {
    match Network::why_not() {
        Some(why) => {
            command::skipped(what, &why);
            true
        }
        None => false,
    }
}

/// `few`, or `many` in a run of a release.
fn rounds(few: u64, many: u64) -> u64 {
    if std::env::var_os("FULL").is_some_and(|value| !value.is_empty()) { many } else { few }
}

/// Repeats the choices of a run whose number it is given.
fn seed() -> u64 {
    let given = std::env::var("SHEEP_TEST_SEED").ok().and_then(|text| text.parse().ok());
    let seed = given.unwrap_or_else(|| u64::from(std::process::id()));
    eprintln!("SHEEP_TEST_SEED={seed}");
    seed
}

fn pause(seconds: f64) {
    std::thread::sleep(Duration::from_secs_f64(seconds));
}

fn others(count: usize, without: &[usize]) -> Vec<usize> {
    (0..count).filter(|index| !without.contains(index)).collect()
}

fn pick(rng: &mut Random, from: &[usize]) -> usize {
    from[rng.below(from.len() as u64) as usize]
}

/// A volume of its own with nothing recorded yet.
fn record(flock: &Flock) -> Result<Record> {
    let through = *flock.running().first().context("no node runs")?;
    Ok(Record::new(Disk::create(&mut flock.client(through)?, "disk", BLOCKS)?))
}

/// Guests on these nodes, once all of them have begun to get answers. Their outcomes come in the order of `nodes`.
fn load(flock: &Flock, record: &Record, nodes: &[usize], seed: u64) -> Result<Load> {
    let load = Load::start(record, &LoadPlan::new(flock.sockets(nodes.iter().copied()), seed));
    let places: Vec<usize> = (0..nodes.len()).collect();
    load.wait_progress(&places, 5, LIVELY).context("before anything happened")?;
    Ok(load)
}

/// Ends a load: no answer was an error, and one history explains everything.
fn settle(what: &str, record: &Record, load: Load) -> Result<Outcome> {
    let outcome = load.stop()?;
    eprintln!("{what}: {outcome}");
    ensure!(outcome.refused.is_empty(), "{what}: guests got errors: {:?}", outcome.refused);
    let verdict = record.check().with_context(|| what.to_owned())?;
    if verdict.torn_count > 0 {
        eprintln!("{what}: {} of {} operations saw a torn block", verdict.torn_count, verdict.operation_count);
    }
    Ok(outcome)
}

/// All nodes have the same content, and it goes with the record.
fn read_back(flock: &Flock, record: &Record, nodes: &[usize]) -> Result<()> {
    for &index in nodes {
        record.read_all(&flock.socket(index)).with_context(|| format!("through node {index}"))?;
    }
    record.check()?;
    Ok(())
}

// ---- the harness itself ----

/// Sends UDP from one host to another and counts what arrives.
/// How many of some datagrams come through, each within `patience` of the one before.
fn arrived(network: &Network, from: usize, to: usize, count: usize, patience: Duration) -> Result<usize> {
    let address = SocketAddr::from((network.address(to), 9999));
    let receiver = network.inside(to, || Ok(UdpSocket::bind(address)?))?;
    receiver.set_read_timeout(Some(patience))?;
    let sender = network.inside(from, || Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    for _ in 0..count {
        // A host without a carrier says so at once.
        let _ = sender.send_to(b"hello", address);
    }
    let mut buffer = [0; 16];
    Ok((0..count).filter(|_| receiver.recv(&mut buffer).is_ok()).count())
}

#[test]
fn the_network_of_the_tests_does_what_it_is_told() -> Result<()> {
    if is_skipped("the network of the tests") {
        return Ok(());
    }
    let mut network = Network::with_cards(3, 2)?;
    let passes = |network: &Network| -> Result<Vec<(usize, usize)>> {
        let pairs = (0..9).map(|pair| (pair / 3, pair % 3)).filter(|(from, to)| from != to);
        let mut passing = Vec::new();
        for (from, to) in pairs {
            if arrived(network, from, to, 1, Duration::from_millis(500))? == 1 {
                passing.push((from, to));
            }
        }
        Ok(passing)
    };
    ensure!(passes(&network)?.len() == 6, "all hear all: {:?}", passes(&network)?);
    network.part(&[0], &[1, 2])?;
    ensure!(passes(&network)? == [(1, 2), (2, 1)], "parted: {:?}", passes(&network)?);
    network.heal()?;
    network.cut_one_way(0, 1)?;
    ensure!(passes(&network)? == [(0, 2), (1, 0), (1, 2), (2, 0), (2, 1)], "one way: {:?}", passes(&network)?);
    network.heal()?;
    network.unplug(2, 0)?;
    ensure!(passes(&network)? == [(0, 1), (1, 0)], "unplugged: {:?}", passes(&network)?);
    network.plug(2, 0)?;
    network.interface_down(2, 0)?;
    ensure!(passes(&network)? == [(0, 1), (1, 0)], "down: {:?}", passes(&network)?);
    network.interface_up(2, 0)?;
    ensure!(passes(&network)?.len() == 6, "all hear all again");
    network.lose(50)?;
    let count = arrived(&network, 0, 1, 200, Duration::from_millis(150))?;
    ensure!((40..160).contains(&count), "of 200 packets {count} arrived at half of them lost");
    network.heal()?;
    let host = network.add_host()?;
    ensure!(arrived(&network, host, 0, 1, LIVELY)? == 1, "a host that came later");
    Ok(())
}

#[test]
fn multicast_passes_unless_told_otherwise() -> Result<()> {
    if is_skipped("multicast") {
        return Ok(());
    }
    let mut network = Network::new(2)?;
    let (group, group6) = ("224.0.0.251:5353".parse::<SocketAddr>()?, "[ff02::fb%2]:5353");
    let receiver = network.inside(1, || {
        let socket = UdpSocket::bind("0.0.0.0:5353")?;
        socket.join_multicast_v4(&"224.0.0.251".parse()?, &"0.0.0.0".parse()?)?;
        Ok(socket)
    })?;
    let receiver6 = network.inside(1, || {
        let socket = UdpSocket::bind("[::]:5354")?;
        socket.join_multicast_v6(&"ff02::fb".parse()?, 0)?;
        Ok(socket)
    })?;
    for socket in [&receiver, &receiver6] {
        socket.set_read_timeout(Some(Duration::from_millis(300)))?;
    }
    let sender = network.inside(0, || Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    let sender6 = network.inside(0, || Ok(UdpSocket::bind("[::]:0")?))?;
    let mut buffer = [0; 16];
    sender.send_to(b"who is there?", group)?;
    ensure!(receiver.recv(&mut buffer).is_ok(), "multicast over IPv4");
    // A link-local address must have passed its search for duplicates before it may be used.
    let to6: SocketAddr = group6.replace("%2", "").replace("5353", "5354").parse()?;
    let mut heard = false;
    for _ in 0..20 {
        heard = heard || (sender6.send_to(b"who is there?", to6).is_ok() && receiver6.recv(&mut buffer).is_ok());
    }
    ensure!(heard, "multicast over IPv6");
    network.drop_multicast(true)?;
    sender.send_to(b"who is there?", group)?;
    ensure!(receiver.recv(&mut buffer).is_err(), "a router does not let it pass");
    ensure!(arrived(&network, 0, 1, 1, LIVELY)? == 1, "everything else passes");
    Ok(())
}

#[test]
fn a_capture_sees_what_passes() -> Result<()> {
    if is_skipped("captures") {
        return Ok(());
    }
    let network = Network::new(2)?;
    let capture = Capture::start(&network, vec![b"hello".to_vec(), b"farewell".to_vec()], Some(9999))?;
    ensure!(arrived(&network, 0, 1, 10, LIVELY)? == 10, "all arrive");
    let captured = capture.finish()?;
    ensure!(captured.hits[0] >= 20 && captured.hits[1] == 0, "in and out of the switch: {captured:?}");
    let payload = captured.kept.first().and_then(|frame| udp_payload_to(frame, 9999));
    ensure!(payload == Some(b"hello"), "what was kept");
    Ok(())
}

/// The harness on a driver that needs no network to agree: guests through every node at once, and a node killed.
#[test]
fn one_history_with_the_local_driver() -> Result<()> {
    if is_skipped("the local driver on several hosts") {
        return Ok(());
    }
    let mut flock = Flock::on(Network::new(3)?, Driver::Local)?;
    flock.start_all()?;
    flock.wait_members(3)?;
    flock.format(0, &["-c", "3"])?;
    let record = record(&flock)?;
    let load = load(&flock, &record, &[0, 1, 2], seed())?;
    pause(1.0);
    flock.kill(&[2])?;
    load.wait_progress(&[0, 1], 50, LIVELY)?;
    flock.start(2)?;
    flock.wait_members(3)?;
    load.wait_progress(&[0, 1, 2], 50, LIVELY)?;
    // This driver evicts nobody who lives: all wait, and go on.
    flock.network.part(&[0], &[1, 2])?;
    pause(1.0);
    flock.network.heal()?;
    load.wait_progress(&[0, 1, 2], 50, LIVELY).context("parted and healed")?;
    flock.pause(1)?;
    pause(1.0);
    flock.resume(1)?;
    load.wait_progress(&[0, 1, 2], 50, LIVELY).context("paused and resumed")?;
    let outcome = settle("a node killed, parted, paused", &record, load)?;
    ensure!(outcome.cuts[..2] == [0, 0], "only the guests of the killed node were cut off: {outcome}");
    flock.wait_recovered()?;
    read_back(&flock, &record, &[0, 1, 2])?;
    flock.finish()
}

// ---- coming together ----

#[test]
fn nodes_find_each_other_and_newcomers_are_let_in() -> Result<()> {
    if is_skipped("discovery and admission") {
        return Ok(());
    }
    let mut flock = Flock::on(Network::new(5)?, Driver::Default)?;
    let started = Instant::now();
    for index in 0..5 {
        flock.launch(index)?;
    }
    flock.wait_listed(5)?;
    eprintln!("5 nodes list each other {:.2?} after the first was started", started.elapsed());
    for index in 0..5 {
        ensure!(flock.info(index)?.status == "unformatted", "node {index}: {:?}", flock.info(index)?);
        ensure!(flock.count_in(index, "member")? == 0, "nobody is a member of nothing");
    }
    flock.format(0, &["-c", "3"])?;
    flock.wait_members(5)?;
    flock.wait_status("running", &[0, 1, 2, 3, 4])?;
    let infos: Vec<_> = (0..5).map(|index| flock.info(index)).collect::<Result<_>>()?;
    ensure!(infos.iter().all(|info| info.cluster_id == infos[0].cluster_id), "one cluster: {infos:?}");
    ensure!(infos[0].voters.len() == 5, "five voters: {:?}", infos[0]);
    let record = record(&flock)?;
    let load = load(&flock, &record, &[0, 1, 2, 3, 4], 1)?;

    let sixth = flock.add()?;
    flock.start(sixth)?;
    flock.wait_until("the sixth asks", LIVELY, |flock| Ok(flock.row(0, sixth)?.state == "asking"))?;
    ensure!(flock.count_in(0, "member")? == 5, "and is no member");
    let id = flock.row(0, sixth)?.id;
    let asked = Instant::now();
    flock.dog(3, &["node", "admit", &id])?.ok()?;
    flock.wait_members(6)?;
    eprintln!("a member everywhere {:.2?} after it was admitted", asked.elapsed());

    let token = flock.dog(1, &["cluster", "token"])?.ok()?.out();
    let token = token.split_whitespace().next_back().context("a token")?.to_owned();
    let seventh = flock.add()?;
    flock.launch_with(seventh, &["--join", &token])?;
    flock.wait_members_of(&[0, seventh], 7)?;
    // Once in, it needs no token any more.
    flock.terminate(seventh)?;
    flock.start(seventh)?;
    flock.wait_members_of(&[0, seventh], 7)?;

    let eighth = flock.add()?;
    flock.launch_with(eighth, &["--join", &token])?;
    stays_out(&mut flock, eighth, 7)?;
    settle("newcomers", &record, load)?;
    let info = flock.info(0)?;
    ensure!(info.voters.len() == 5, "never more than five voters: {info:?}");
    flock.finish()
}

/// Waits, and fails if the node of `index`, just launched, is a member by then.
fn stays_out(flock: &mut Flock, index: usize, members: usize) -> Result<()> {
    std::thread::sleep(REFUSED_AFTER);
    if flock.has_ended(index)?.is_some() {
        eprintln!("node {index} gave up: {}", flock.log(index).lines().next_back().unwrap_or_default());
    } else {
        let state = flock.row(0, index).map(|row| row.state).unwrap_or_default();
        ensure!(state != "member", "node {index} came in");
        let status = flock.info(index).map(|info| info.status).unwrap_or_default();
        ensure!(status != "running", "node {index} believes to be in");
        eprintln!("node {index} is out: {state:?} as node 0 sees it, {status:?} in its own words");
        flock.kill(&[index])?;
    }
    ensure!(flock.count_in(0, "member")? == members, "{:?}", flock.rows(0)?);
    Ok(())
}

/// What any of the members wrote of the host of `stranger` as a warning.
fn is_told(flock: &Flock, members: &[usize], stranger: usize) -> Result<()> {
    let words = [flock.network.address(stranger).to_string(), flock.network.address6(stranger).to_string()];
    let words = [words[0].as_str(), words[1].as_str()];
    let told = members.iter().flat_map(|&index| flock.warnings(index, &words)).next();
    eprintln!("logged: {}", told.with_context(|| format!("no member warned of host {stranger}"))?);
    Ok(())
}

#[test]
fn two_clusters_on_one_bridge_never_mix() -> Result<()> {
    if is_skipped("two clusters on one bridge") {
        return Ok(());
    }
    let mut flock = Flock::on(Network::new(6)?, Driver::Default)?;
    let (one, other) = ([0, 1, 2], [3, 4, 5]);
    flock.network.part(&one, &other)?;
    flock.start_all()?;
    flock.wait_listed(3)?;
    flock.format(0, &["-c", "3"])?;
    flock.format(3, &["-c", "3"])?;
    flock.wait_members(3)?;
    let ids = (flock.info(0)?.cluster_id, flock.info(3)?.cluster_id);
    ensure!(ids.0 != ids.1, "each has its own id");
    let epochs = (flock.info(0)?.epoch, flock.info(3)?.epoch);
    flock.network.heal()?;
    pause(6.0);
    // The more so when they come back and look for each other.
    flock.kill(&[2, 5])?;
    flock.start_together(&[2, 5])?;
    flock.wait_members(3)?;
    pause(2.0);
    for index in 0..6 {
        let (own, epoch) = if index < 3 { (&ids.0, epochs.0) } else { (&ids.1, epochs.1) };
        let info = flock.info(index)?;
        ensure!(info.cluster_id == *own && info.status == "running", "node {index}: {info:?}");
        ensure!(info.epoch <= epoch + 2, "only the kill and the return of its own changed a membership: {info:?}");
        ensure!(flock.count_in(index, "member")? == 3, "node {index}: {:?}", flock.rows(index)?);
    }
    let told = flock.warnings(0, &[&ids.1]).into_iter().chain(flock.warnings(3, &[&ids.0])).next();
    eprintln!("logged: {}", told.context("the refusal of the other cluster is logged with its id")?);
    flock.finish()
}

#[test]
fn nodes_behind_a_router_are_told_where_the_others_are() -> Result<()> {
    if is_skipped("--join without multicast") {
        return Ok(());
    }
    let mut flock = Flock::on(Network::new(4)?, Driver::Default)?;
    flock.network.drop_multicast(true)?;
    let seeds = [
        flock.network.address(0).to_string(),
        format!("{}:{NODE_PORT}", flock.network.address(0)),
        format!("[{}]", flock.network.address6(0)),
    ];
    for (index, seed) in seeds.iter().enumerate() {
        flock.set_arguments(index + 1, &["--join", seed]);
    }
    flock.start_all()?;
    flock.wait_listed(4)?;
    flock.format(2, &["-c", "3"])?;
    flock.wait_members(4)?;
    // They remember.
    for index in 1..4 {
        flock.set_arguments(index, &[]);
    }
    flock.kill(&[0, 1, 2, 3])?;
    flock.start_all()?;
    flock.wait_members(4)?;
    flock.wait_status("running", &[0, 1, 2, 3])?;
    flock.finish()
}

// ---- failures ----

#[test]
fn a_killed_node_keeps_nobody_waiting() -> Result<()> {
    if is_skipped("kill -9 under load") {
        return Ok(());
    }
    let mut flock = Flock::formatted(5, 3)?;
    let record = record(&flock)?;
    let all = [0, 1, 2, 3, 4];
    let load = load(&flock, &record, &all, seed())?;
    let mut expected_cuts = [false; 5];
    for kind in ["a follower", "the leader", "a follower again", "the leader again"] {
        let leader = flock.leader(0)?;
        let victim = if kind.starts_with("the") { leader } else { (leader + 2) % 5 };
        let left = others(5, &[victim]);
        expected_cuts[victim] = true;
        flock.kill(&[victim])?;
        let first = load.wait_progress(&left, 20, LIVELY).with_context(|| format!("{kind} was killed"))?;
        flock.wait_members_of(&left, 4)?;
        flock.start(victim)?;
        flock.wait_members(5)?;
        let back = load.wait_progress(&all, 20, LIVELY)?;
        eprintln!(
            "{kind} (node {victim}) killed: 20 answers through each of the others within {first:.0?}, back: {back:.0?}"
        );
        flock.wait_recovered()?;
    }
    let outcome = settle("four kills", &record, load)?;
    for index in all {
        ensure!(expected_cuts[index] || outcome.cuts[index] == 0, "guests of node {index} were cut off: {outcome}");
    }
    read_back(&flock, &record, &all)?;
    flock.finish()
}

#[test]
fn partitions_leave_one_history() -> Result<()> {
    if is_skipped("partitions") {
        return Ok(());
    }
    let mut rng = Random::new(seed());
    let mut flock = Flock::formatted(5, 3)?;
    let record = record(&flock)?;
    let all = [0, 1, 2, 3, 4];
    for round in 0..rounds(3, 50) {
        let first = pick(&mut rng, &all);
        let small = [first, pick(&mut rng, &others(5, &[first]))];
        let large = others(5, &small);
        let load = load(&flock, &record, &all, rng.bits())?;
        let (cut, went_on, fenced, healed);
        flock.network.part(&small, &large)?;
        cut = record.now();
        went_on = load.wait_progress(&large, 20, LIVELY).with_context(|| format!("the side of {large:?}"))?;
        let until = cut + FENCED_AFTER.as_nanos() as u64;
        std::thread::sleep(Duration::from_nanos(until.saturating_sub(record.now())));
        fenced = record.now();
        pause(rng.below(3000) as f64 / 1000.0 + 0.5);
        healed = record.now();
        flock.network.heal()?;
        let back = load.wait_progress(&all, 20, LIVELY).context("after healing")?;
        flock.wait_members(5)?;
        let outcome = settle(&format!("round {round}: {small:?} | {large:?}"), &record, load)?;
        let late = outcome.answered_between(&small, fenced, healed);
        ensure!(late == 0, "the side of {small:?} gave {late} answers after the fence");
        let on = outcome.answered_between(&large, fenced, healed);
        let last = outcome.times.iter().filter(|(socket, _, end)| small.contains(socket) && *end < fenced);
        let last = Duration::from_nanos(last.map(|(_, _, end)| end.saturating_sub(cut)).max().unwrap_or(0));
        eprintln!(
            "  large side: 20 answers each within {went_on:.0?}, {on} after the fence; small side: last answer \
             {last:.0?} after the cut; all back within {back:.0?}"
        );
        ensure!(on > 0, "the side of {large:?} stands still");
        flock.wait_recovered()?;
        read_back(&flock, &record, &all)?;
    }
    flock.finish()
}

#[test]
fn one_way_partitions_leave_one_history() -> Result<()> {
    if is_skipped("one-way partitions") {
        return Ok(());
    }
    let seed = seed();
    let mut flock = Flock::formatted(5, 3)?;
    let record = record(&flock)?;
    let all = [0, 1, 2, 3, 4];
    for (kind, is_leader) in
        [("hears nobody", true), ("is heard by nobody", true), ("hears nobody", false), ("hears not one other", false)]
    {
        let leader = flock.leader(0)?;
        let victim = if is_leader { leader } else { (leader + 1) % 5 };
        let rest = others(5, &[victim]);
        let load = load(&flock, &record, &all, seed)?;
        match kind {
            "hears nobody" => flock.network.part_one_way(&rest, &[victim])?,
            "is heard by nobody" => flock.network.part_one_way(&[victim], &rest)?,
            // Both are heard by everybody else: whoever decides must not flap.
            _ => flock.network.cut_one_way((victim + 1) % 5, victim)?,
        }
        let what = format!("node {victim}{} {kind}", if is_leader { " (leader)" } else { "" });
        let on = load.wait_progress(&others(5, &[victim, (victim + 1) % 5]), 20, LIVELY).context(what.clone())?;
        pause(6.0);
        flock.network.heal()?;
        let back = load.wait_progress(&all, 20, LIVELY).with_context(|| format!("{what}, healed"))?;
        flock.wait_members(5)?;
        eprintln!("{what}: others go on within {on:.0?}, all back within {back:.0?}");
        settle(&what, &record, load)?;
        flock.wait_recovered()?;
    }
    read_back(&flock, &record, &all)?;
    flock.finish()
}

#[test]
fn a_paused_process_does_no_harm_when_it_goes_on() -> Result<()> {
    if is_skipped("paused processes") {
        return Ok(());
    }
    let seed = seed();
    let mut flock = Flock::formatted(5, 3)?;
    let record = record(&flock)?;
    let all = [0, 1, 2, 3, 4];
    for is_leader in [false, true] {
        let leader = flock.leader(0)?;
        let victim = if is_leader { leader } else { (leader + 3) % 5 };
        let load = load(&flock, &record, &all, seed)?;
        let removals = |flock: &Flock| flock.log(victim).matches("copies that epoch").count();
        let before = removals(&flock);
        flock.pause(victim)?;
        let rest = others(5, &[victim]);
        let on = load.wait_progress(&rest, 20, LIVELY)?;
        pause(10.0);
        flock.resume(victim)?;
        let back = load.wait_progress(&all, 20, LIVELY)?;
        flock.wait_members(5)?;
        let name = if is_leader { "the leader" } else { "a follower" };
        eprintln!("{name} paused for 10 s: others go on within {on:.0?}, all back within {back:.0?}");
        let outcome = settle(name, &record, load)?;
        ensure!(outcome.cuts.iter().all(|&cuts| cuts == 0), "nobody died: {outcome}");
        flock.wait_recovered()?;
        // It learned that the others had everything without it before it was let in again.
        ensure!(removals(&flock) == before, "{name} threw its copies away: {}", flock.log(victim));
    }
    read_back(&flock, &record, &all)?;
    flock.finish()
}

#[test]
fn of_two_nodes_and_a_witness_any_one_may_die() -> Result<()> {
    if is_skipped("two nodes and a witness") {
        return Ok(());
    }
    let mut flock = Flock::on(Network::new(3)?, Driver::Default)?;
    flock.set_arguments(2, &["--witness"]);
    flock.start_all()?;
    flock.wait_listed(3)?;
    flock.format(0, &["-c", "2"])?;
    flock.wait_members(3)?;
    let record = record(&flock)?;
    let load = load(&flock, &record, &[0, 1], seed())?;
    for victim in [0, 1, 2, 1, 0] {
        let left = others(2, &[victim]);
        flock.kill(&[victim])?;
        let on = load.wait_progress(&left, 20, LIVELY).with_context(|| format!("node {victim} was killed"))?;
        flock.start(victim)?;
        flock.wait_members(3)?;
        load.wait_progress(&[0, 1], 20, LIVELY)?;
        flock.wait_recovered()?;
        let name = if victim == 2 { "the witness".to_owned() } else { format!("node {victim}") };
        eprintln!("{name} killed: the rest goes on within {on:.0?}");
    }
    settle("each of three killed", &record, load)?;
    read_back(&flock, &record, &[0, 1])?;
    flock.finish()
}

#[test]
fn all_nodes_cut_in_mid_write_lose_nothing() -> Result<()> {
    if is_skipped("a full power cut") {
        return Ok(());
    }
    let mut rng = Random::new(seed());
    let mut flock = Flock::formatted(5, 3)?;
    let record = record(&flock)?;
    let all = [0, 1, 2, 3, 4];
    for round in 0..rounds(2, 50) {
        let load = load(&flock, &record, &all, rng.bits())?;
        pause(rng.below(1500) as f64 / 1000.0);
        flock.kill(&all)?;
        let started = Instant::now();
        let first = rng.below(5) as usize;
        for step in 0..5 {
            flock.launch((first + step) % 5)?;
            pause(rng.below(300) as f64 / 1000.0);
        }
        for index in all {
            flock.wait_serving(index)?;
        }
        load.wait_progress(&all, 20, Duration::from_mins(1)).context("after all were cut")?;
        eprintln!("round {round}: all nodes serve guests {:.1?} after the cut", started.elapsed());
        settle(&format!("round {round}"), &record, load)?;
        flock.wait_members(5)?;
        flock.wait_recovered()?;
        read_back(&flock, &record, &all)?;
    }
    flock.finish()
}

#[test]
fn every_node_restarted_in_turn_gives_no_error() -> Result<()> {
    if is_skipped("a rolling restart") {
        return Ok(());
    }
    let mut flock = Flock::formatted(5, 3)?;
    let record = record(&flock)?;
    let all = [0, 1, 2, 3, 4];
    let load = load(&flock, &record, &all, seed())?;
    for index in all {
        let code = flock.terminate(index)?;
        ensure!(code == Some(0), "node {index} left with {code:?}");
        flock.start(index)?;
        flock.wait_members(5)?;
        load.wait_progress(&all, 10, LIVELY).with_context(|| format!("node {index} was restarted"))?;
        flock.wait_recovered()?;
    }
    // Guests of the node that restarts connect again; nobody is refused anything.
    settle("a rolling restart", &record, load)?;
    read_back(&flock, &record, &all)?;
    flock.finish()
}

#[test]
fn a_lost_majority_pauses_guests_until_it_is_back() -> Result<()> {
    if is_skipped("loss of the quorum") {
        return Ok(());
    }
    let mut flock = Flock::formatted(5, 3)?;
    let record = record(&flock)?;
    let all = [0, 1, 2, 3, 4];
    let load = load(&flock, &record, &all, seed())?;
    flock.kill(&[2, 3, 4])?;
    std::thread::sleep(FENCED_AFTER);
    let fenced = record.now();
    let info = flock.info(0)?;
    ensure!(info.status != "running", "three of five are gone: {info:?}");
    eprintln!("{}", flock.dog(0, &["cluster", "info"])?.out());
    ensure!(info.missing.len() == 3, "it says who is missing: {info:?}");
    pause(2.0);
    let until = record.now();
    flock.launch(3)?;
    flock.launch(4)?;
    let back = load.wait_progress(&[0, 1, 3, 4], 20, Duration::from_mins(1)).context("four are back")?;
    eprintln!("all go on {back:.1?} after two of three were started");
    flock.start(2)?;
    load.wait_progress(&all, 20, LIVELY)?;
    let outcome = settle("a lost majority", &record, load)?;
    let late = outcome.answered_between(&[0, 1], fenced, until);
    ensure!(late == 0, "{late} answers without a quorum");
    ensure!(outcome.cuts[..2] == [0, 0], "guests of the survivors wait: {outcome}");
    flock.wait_members(5)?;
    flock.wait_recovered()?;
    read_back(&flock, &record, &all)?;
    flock.finish()
}

#[test]
fn a_majority_gone_for_good_is_given_up_by_order_only() -> Result<()> {
    if is_skipped("dog cluster recover force") {
        return Ok(());
    }
    let mut flock = Flock::formatted(3, 3)?;
    let record = record(&flock)?;
    let load = load(&flock, &record, &[0, 1, 2], seed())?;
    pause(0.5);
    let id = flock.info(0)?.cluster_id;
    flock.kill(&[1, 2])?;
    std::thread::sleep(FENCED_AFTER);
    let force = |flock: &Flock, typed: &str| {
        flock.dog_with(0, &["cluster", "recover", "force"], typed.as_bytes(), Duration::from_mins(1))
    };
    let refused = force(&flock, "yes\n")?;
    ensure!(refused.code() != Some(0), "a yes is not enough: {refused}");
    ensure!(flock.info(0)?.status != "running", "and changes nothing");
    let forced = force(&flock, &format!("{id}\n"))?.ok()?;
    eprintln!("{}", forced.out());
    let on = load.wait_progress(&[0], 20, LIVELY)?;
    eprintln!("guests go on {on:.1?} after the order");
    flock.wait_members_of(&[0], 1)?;
    // Those given up come back and cannot undo it.
    flock.launch(1)?;
    flock.launch(2)?;
    pause(5.0);
    load.wait_progress(&[0], 20, LIVELY)?;
    for index in [1, 2] {
        let state = flock.info(index).map(|info| (info.status, info.cluster_id)).ok();
        eprintln!("node {index}, given up and back: {state:?}, {:?} as node 0 sees it", flock.row(0, index).ok());
    }
    settle("a majority given up", &record, load)?;
    read_back(&flock, &record, &[0])?;
    flock.finish()
}

#[test]
fn a_minority_that_goes_on_takes_all_of_it_along() -> Result<()> {
    if is_skipped("dog cluster recover force by two of five") {
        return Ok(());
    }
    // Any two of five have every object.
    let mut flock = Flock::formatted(5, 4)?;
    let record = record(&flock)?;
    let load = load(&flock, &record, &[0, 1, 2, 3, 4], seed())?;
    let first = flock.leader(0)?;
    // The order is not in its first term any more.
    flock.kill(&[first])?;
    let rest = others(5, &[first]);
    load.wait_progress(&rest, 20, LIVELY)?;
    flock.start(first)?;
    flock.wait_members(5)?;
    flock.wait_recovered()?;
    let here = flock.leader(0)?;
    let one = pick(&mut Random::new(seed()), &others(5, &[here]));
    let dead = others(5, &[here, one]);
    let epoch = flock.info(here)?.epoch;
    let id = format!("{}\n", flock.info(one)?.cluster_id);
    let refused = flock.dog_with(one, &["cluster", "recover", "force"], id.as_bytes(), Duration::from_mins(1))?;
    ensure!(refused.code() != Some(0), "a cluster that lacks nothing has nothing to give up: {refused}");
    flock.kill(&dead)?;
    std::thread::sleep(FENCED_AFTER + Duration::from_secs(1));
    flock.dog_with(one, &["cluster", "recover", "force"], id.as_bytes(), Duration::from_mins(1))?.ok()?;
    // The other one is not restarted: it follows.
    flock.wait_members_of(&[here, one], 2)?;
    let on = load.wait_progress(&[here, one], 20, LIVELY)?;
    let after = flock.info(here)?.epoch;
    eprintln!("two of five go on {on:.1?} after the order, in epoch {after} after {epoch}");
    ensure!(after > epoch + 60_000, "an epoch that the others cannot have come to");
    let outcome = load.stop()?;
    eprintln!("two of five: {outcome}");
    // What was under way when the majority was lost may be known to nobody any more: its guest is told so.
    let honest = |refused: &String| refused.starts_with("write") && refused.ends_with("0x03");
    ensure!(outcome.refused.iter().all(honest), "guests got errors: {:?}", outcome.refused);
    record.check()?;
    read_back(&flock, &record, &[here, one])?;
    flock.finish()
}

#[test]
fn a_flapping_link_leaves_one_history() -> Result<()> {
    if is_skipped("a flapping link") {
        return Ok(());
    }
    let mut rng = Random::new(seed());
    let flock = Flock::formatted(5, 3)?;
    let record = record(&flock)?;
    let all = [0, 1, 2, 3, 4];
    let load = load(&flock, &record, &all, rng.bits())?;
    let before = flock.info(0)?.epoch;
    let count = rounds(10, 100);
    for flap in 0..count {
        // From far too short to matter to an eviction each time.
        let down = 0.05 + rng.below(4000) as f64 / 1000.0 * f64::from(u8::from(flap % 3 == 0)) + 0.2;
        if flap % 2 == 0 {
            flock.network.unplug(1, 0)?;
            pause(down);
            flock.network.plug(1, 0)?;
        } else {
            flock.network.interface_down(1, 0)?;
            pause(down);
            flock.network.interface_up(1, 0)?;
        }
        pause(rng.below(2000) as f64 / 1000.0);
    }
    load.wait_progress(&all, 20, LIVELY).context("when the link is steady again")?;
    flock.wait_members(5)?;
    eprintln!("{count} flaps made {} epochs", flock.info(0)?.epoch - before);
    let outcome = settle("a flapping link", &record, load)?;
    eprintln!("longest through the others: {:.0?}", outcome.longest_through(&[0, 2, 3, 4]));
    flock.wait_recovered()?;
    read_back(&flock, &record, &all)?;
    flock.finish()
}

#[test]
fn lost_packets_evict_nobody() -> Result<()> {
    if is_skipped("lost packets") {
        return Ok(());
    }
    let mut flock = Flock::formatted(5, 3)?;
    let record = record(&flock)?;
    let all = [0, 1, 2, 3, 4];
    let before = flock.info(0)?;
    let load = load(&flock, &record, &all, seed())?;
    flock.network.lose(20)?;
    pause(rounds(15, 120) as f64);
    flock.network.heal()?;
    load.wait_progress(&all, 20, LIVELY)?;
    settle("every fifth packet lost", &record, load)?;
    let after = flock.info(0)?;
    eprintln!("leader before {:?}, after {:?}", before.leader, after.leader);
    ensure!(after.epoch == before.epoch, "a node was evicted that was alive: {before:?} {after:?}");
    flock.finish()
}

#[test]
fn a_second_card_takes_over() -> Result<()> {
    if is_skipped("two cards") {
        return Ok(());
    }
    let mut flock = Flock::on(Network::with_cards(3, 2)?, Driver::Default)?;
    for index in 0..3 {
        let own = format!("host={},port={NODE_PORT}", flock.network.card_address(index, 1));
        flock.set_arguments(index, &["-i", &own]);
    }
    flock.start_all()?;
    flock.wait_listed(3)?;
    flock.format(0, &["-c", "3"])?;
    flock.wait_members(3)?;
    let record = record(&flock)?;
    let all = [0, 1, 2];
    let load = load(&flock, &record, &all, seed())?;
    for card in [1, 0] {
        for index in 0..3 {
            flock.network.unplug(index, card)?;
        }
        let over = load.wait_progress(&all, 20, LIVELY).with_context(|| format!("card {card} is gone"))?;
        pause(5.0);
        flock.wait_members(3)?;
        for index in 0..3 {
            flock.network.plug(index, card)?;
        }
        load.wait_progress(&all, 20, LIVELY)?;
        pause(2.0);
        eprintln!("card {card} unplugged everywhere: all go on within {over:.1?}");
    }
    settle("cards unplugged", &record, load)?;
    flock.finish()
}

#[test]
fn a_shut_down_cluster_comes_back_with_a_node_missing() -> Result<()> {
    if is_skipped("shutdown and return") {
        return Ok(());
    }
    let mut flock = Flock::formatted(5, 3)?;
    let record = record(&flock)?;
    let all = [0, 1, 2, 3, 4];
    let first = load(&flock, &record, &all, seed())?;
    pause(0.5);
    settle("before", &record, first)?;
    let epoch = flock.info(0)?.epoch;
    flock.dog(0, &["cluster", "shutdown"])?.ok()?;
    for index in all {
        let code = flock.wait_exit(index)?;
        ensure!(code == Some(0), "node {index} ended with {code:?}");
    }
    let started = Instant::now();
    flock.start_together(&[4, 1, 3, 0])?;
    // Who asks before it is decided to go on without the fifth waits, and is not told of an error.
    let (mut early, mut answers) = (Vec::new(), 0);
    while flock.info(0)?.status != "running" || early.is_empty() {
        ensure!(started.elapsed() < LIVELY, "the four do not run");
        let Ok(mut nbd) = NbdClient::open(&flock.store(0).join("nbd.sock"), "disk", Style::Structured, &[]) else {
            pause(0.05);
            continue;
        };
        early.push(std::thread::spawn(move || nbd.read(0, 4096)));
        pause(0.05);
    }
    for read in early {
        read.join().expect("it does not panic").context("a read while members were waited for")?;
        answers += 1;
    }
    eprintln!("{answers} early reads were answered");
    flock.wait_status("running", &[0, 1, 3, 4])?;
    eprintln!("four of five run again after {:.1?}", started.elapsed());
    read_back(&flock, &record, &[0, 1, 3, 4])?;
    flock.start(2)?;
    flock.wait_members(5)?;
    flock.wait_recovered()?;
    read_back(&flock, &record, &all)?;
    let after = flock.info(0)?.epoch;
    eprintln!("epoch {epoch} before, {after} after");

    flock.dog(1, &["cluster", "shutdown"])?.ok()?;
    for index in all {
        flock.wait_exit(index)?;
    }
    flock.start_all()?;
    flock.wait_members(5)?;
    flock.wait_status("running", &all)?;
    let again = flock.info(0)?.epoch;
    ensure!(again == after, "everybody came back, yet the epoch went from {after} to {again}");
    read_back(&flock, &record, &all)?;
    flock.finish()
}

// ---- who may come in ----

/// A file that only the owner may read.
fn key_file(flock: &Flock, name: &str, content: &[u8]) -> Result<PathBuf> {
    let path = flock.scratch().join(name);
    fs::write(&path, content)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600))?;
    Ok(path)
}

fn key_of(flock: &Flock) -> Result<Vec<u8>> {
    let key = flock.dog(0, &["cluster", "key", "show"])?.ok()?.stdout;
    ensure!(!key.is_empty(), "the key is shown");
    Ok(key)
}

fn path_text(path: &Path) -> Result<&str> {
    path.to_str().context("a path that is text")
}

#[test]
fn who_lacks_the_key_stays_out() -> Result<()> {
    if is_skipped("keys") {
        return Ok(());
    }
    let elsewhere = Flock::formatted(1, 1)?;
    let foreign_key = key_of(&elsewhere)?;
    elsewhere.finish()?;

    let mut flock = Flock::formatted(3, 3)?;
    let record = record(&flock)?;
    let load = load(&flock, &record, &[0, 1, 2], seed())?;
    let first_key = key_of(&flock)?;
    ensure!(first_key != foreign_key, "each cluster has its own key");

    let wrong = flock.add()?;
    let file = key_file(&flock, "wrong", &foreign_key)?;
    flock.launch_with(wrong, &["--key", path_text(&file)?])?;
    stays_out(&mut flock, wrong, 3)?;
    is_told(&flock, &[0, 1, 2], wrong)?;

    let right = flock.add()?;
    let file = key_file(&flock, "right", &first_key)?;
    flock.launch_with(right, &["--key", path_text(&file)?])?;
    flock.wait_members_of(&[0, 1, 2, right], 4).context("who has the key comes in by itself")?;

    // From the host of the node that stays out: it has no key of its own.
    let address = flock.network.address(0).to_string();
    let remote = |key: &[&str]| flock.dog(wrong, &[&["-a", &address, "node", "list"], key].concat());
    let listed = remote(&["--key", path_text(&file)?])?.ok()?;
    ensure!(listed.out().matches(":7000").count() == 4, "with the key, dog asks from anywhere: {listed}");
    ensure!(remote(&[])?.code() != Some(0), "without it, not");
    let foreign = key_file(&flock, "foreign", &foreign_key)?;
    ensure!(remote(&["--key", path_text(&foreign)?])?.code() != Some(0), "nor with another cluster's");

    let rotated = Instant::now();
    flock.dog(1, &["cluster", "key", "rotate"])?.ok()?;
    let second_key = key_of(&flock)?;
    ensure!(second_key != first_key, "a new key");
    flock.wait_until("the new key everywhere", LIVELY, |flock| {
        let has = |index| fs::read(flock.store(index).join("cluster/key")).is_ok_and(|key| key == second_key);
        Ok((0..3).chain([right]).all(has))
    })?;
    load.wait_progress(&[0, 1, 2], 20, LIVELY)?;
    eprintln!("the key was replaced everywhere within {:.1?}", rotated.elapsed());
    let late = flock.add()?;
    let file = key_file(&flock, "replaced", &first_key)?;
    flock.launch_with(late, &["--key", path_text(&file)?])?;
    stays_out(&mut flock, late, 4)?;
    is_told(&flock, &[0, 1, 2, right], late)?;
    // Members need no key but their own identity, whatever they missed.
    flock.kill(&[right])?;
    flock.dog(0, &["cluster", "key", "rotate"])?.ok()?;
    flock.start(right)?;
    flock.wait_members_of(&[0, right], 4).context("a member that missed a rotation")?;

    let id = flock.row(0, right)?.id;
    // It asks, for there is no way back.
    flock.dog_with(2, &["node", "ban", &id], b"yes\n", DOG_DEADLINE)?.ok()?;
    flock.wait_members_of(&[0, 1, 2], 3)?;
    if flock.has_ended(right)?.is_none() {
        flock.kill(&[right])?;
    }
    flock.launch(right)?;
    stays_out(&mut flock, right, 3)?;
    is_told(&flock, &[0, 1, 2], right)?;
    let stolen = fs::read(flock.store(right).join("cluster/key")).unwrap_or_default();
    ensure!(key_of(&flock)? != stolen, "what the banned node knew is worth nothing");
    let admitted = flock.dog(0, &["node", "admit", &id])?;
    eprintln!("admit of a banned node: {}{}", admitted.out(), admitted.err());
    ensure!(flock.count_in(0, "member")? == 3, "banned for good");

    let outcome = settle("keys and bans", &record, load)?;
    ensure!(outcome.cuts.iter().all(|&cuts| cuts == 0), "guests notice nothing: {outcome}");
    let keys = [first_key, second_key, key_of(&flock)?];
    no_secret_is_open(&flock, &[0, 1, 2], &keys)?;
    flock.finish()
}

/// The long words of key files: what must be seen nowhere.
fn secrets(keys: &[Vec<u8>]) -> Vec<String> {
    let words = keys.iter().flat_map(|key| {
        let text = String::from_utf8_lossy(key).into_owned();
        let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        words
    });
    words.filter(|word| word.len() >= 32).collect()
}

fn no_secret_is_open(flock: &Flock, nodes: &[usize], keys: &[Vec<u8>]) -> Result<()> {
    let secrets = secrets(keys);
    ensure!(!secrets.is_empty(), "a key file of text holds a long word");
    for &index in nodes {
        let log = flock.log(index);
        let pid = flock.pid(index).context("the node runs")?;
        let arguments = fs::read_to_string(format!("/proc/{pid}/cmdline"))?;
        for secret in &secrets {
            ensure!(!log.contains(secret.as_str()), "the log of node {index} holds a key");
            ensure!(!arguments.contains(secret.as_str()), "the arguments of node {index} hold a key");
        }
        let directory = flock.store(index).join("cluster");
        let is_open = |path: &Path| -> Result<bool> { Ok(fs::metadata(path)?.permissions().mode() & 0o077 != 0) };
        let mut left = vec![directory.clone()];
        while let Some(path) = left.pop() {
            if path.is_dir() {
                // What lies in a closed directory is closed.
                if is_open(&path)? {
                    for entry in fs::read_dir(&path)? {
                        left.push(entry?.path());
                    }
                }
            } else {
                let content = fs::read(&path)?;
                let has_secret = secrets
                    .iter()
                    .any(|secret| content.windows(secret.len()).any(|window| window == secret.as_bytes()));
                let is_named = path.ends_with("cluster/key") || path.ends_with("cluster/identity");
                ensure!(!((has_secret || is_named) && is_open(&path)?), "others may read {}", path.display());
            }
        }
    }
    Ok(())
}

#[test]
fn a_copied_store_is_refused_and_a_wiped_one_is_new() -> Result<()> {
    if is_skipped("copied and wiped stores") {
        return Ok(());
    }
    let mut flock = Flock::formatted(3, 3)?;
    let record = record(&flock)?;
    let load = load(&flock, &record, &[0, 1, 2], seed())?;
    flock.kill(&[2])?;
    let copy = flock.add()?;
    let copied = command::run(
        std::process::Command::new("cp").arg("-a").arg(flock.store(2)).arg(flock.store(copy)),
        Duration::from_mins(1),
    )?;
    copied.ok()?;
    flock.start(2)?;
    flock.wait_members_of(&[0, 1, 2], 3)?;
    flock.launch(copy)?;
    std::thread::sleep(REFUSED_AFTER);
    match flock.has_ended(copy)? {
        Some(code) => eprintln!("the copy gave up with {code:?}"),
        None => {
            let status = flock.info(copy).map(|info| info.status).unwrap_or_default();
            ensure!(status != "running", "a node runs twice");
            eprintln!("the copy says {status:?}");
            flock.kill(&[copy])?;
        }
    }
    eprintln!("its last words: {}", flock.log(copy).lines().next_back().unwrap_or_default());
    ensure!(flock.count_in(0, "member")? == 3, "{:?}", flock.rows(0)?);
    load.wait_progress(&[0, 1, 2], 20, LIVELY).context("the first of the two goes on")?;

    let before = flock.row(0, 2)?.id;
    flock.wait_recovered()?;
    flock.kill(&[2])?;
    flock.wipe(2)?;
    flock.start(2)?;
    flock.wait_until("the wiped node asks", LIVELY, |flock| {
        Ok(flock.rows(0)?.iter().any(|row| row.state == "asking" && row.id != before))
    })?;
    let asking = flock.rows(0)?.into_iter().find(|row| row.state == "asking").context("it asks")?;
    flock.dog(0, &["node", "admit", &asking.id])?.ok()?;
    flock.wait_members(3)?;
    flock.wait_recovered()?;
    load.wait_progress(&[0, 1, 2], 20, LIVELY)?;
    settle("copied and wiped", &record, load)?;
    read_back(&flock, &record, &[0, 1, 2])?;
    flock.finish()
}

/// Whether a client on `host` gets its question answered at `address`.
fn is_served(network: &Network, host: usize, address: SocketAddr) -> Result<bool> {
    network.inside(host, || {
        let patience = Duration::from_secs(2);
        let Ok(mut stream) = TcpStream::connect_timeout(&address, patience) else { return Ok(false) };
        stream.set_read_timeout(Some(patience))?;
        let question = Request::new(opcode::GET_NODE_LIST).length(491_520).to_bytes();
        let mut header = [0; HEADER_BYTES];
        if stream.write_all(&question).is_err() || stream.read_exact(&mut header).is_err() {
            return Ok(false);
        }
        Ok(header[16..20] == result::SUCCESS.to_le_bytes())
    })
}

#[test]
fn strangers_on_the_network_get_nothing() -> Result<()> {
    if is_skipped("strangers") {
        return Ok(());
    }
    let mut flock = Flock::formatted(3, 3)?;
    // A host whose node is not started.
    let stranger = flock.add()?;
    let record = record(&flock)?;
    let load = load(&flock, &record, &[0, 1, 2], seed())?;
    let at = |flock: &Flock, index: usize, port: u16| SocketAddr::from((flock.network.address(index), port));
    let at6 = SocketAddr::from((flock.network.address6(1), CLIENT_PORT));

    ensure!(is_served(&flock.network, 1, SocketAddr::from(([127, 0, 0, 1], CLIENT_PORT)))?, "loopback is served");
    ensure!(!is_served(&flock.network, stranger, at(&flock, 1, CLIENT_PORT))?, "a foreign address is not");
    ensure!(!is_served(&flock.network, stranger, at6)?, "nor over IPv6");
    is_told(&flock, &[1], stranger)?;
    flock.terminate(1)?;
    flock.set_arguments(1, &["--allow-clients", &format!("{}/32", flock.network.address(stranger))]);
    flock.start(1)?;
    flock.wait_members_of(&[0, 1, 2], 3)?;
    ensure!(is_served(&flock.network, stranger, at(&flock, 1, CLIENT_PORT))?, "unless it is allowed");
    ensure!(!is_served(&flock.network, 0, at(&flock, 1, CLIENT_PORT))?, "which goes for that address alone");

    let before = flock.info(0)?;
    let capture = Capture::start(&flock.network, Vec::new(), Some(NODE_PORT))?;
    pause(3.0);
    let gossip = capture.finish()?.kept;
    ensure!(!gossip.is_empty(), "nodes gossip");
    let sent = molest(&flock, stranger, &gossip)?;
    pause(2.0);
    load.wait_progress(&[0, 1, 2], 20, LIVELY)?;
    let after = flock.info(0)?;
    ensure!(after.epoch == before.epoch && after.status == "running", "{before:?} {after:?}");
    ensure!(flock.rows(0)?.len() == 3, "nobody new: {:?}", flock.rows(0)?);
    flock.check_health()?;
    is_told(&flock, &[0], stranger)?;
    eprintln!("{sent} packets and connections of a stranger did nothing");
    // Still open for those who may.
    flock.start(stranger)?;
    flock.wait_until("an honest node asks", LIVELY, |flock| Ok(flock.row(0, stranger)?.state == "asking"))?;
    settle("strangers", &record, load)?;
    flock.finish()
}

/// Old packets once more, from elsewhere, whole and damaged; noise over UDP and TCP; connections that say nothing.
fn molest(flock: &Flock, stranger: usize, gossip: &[Vec<u8>]) -> Result<usize> {
    const SILENT_CONNECTIONS: usize = 400;
    let mut rng = Random::new(3);
    let target = SocketAddr::from((flock.network.address(0), NODE_PORT));
    let mut sent = 0;
    let udp = flock.network.inside(stranger, || Ok(UdpSocket::bind("0.0.0.0:0")?))?;
    for frame in gossip {
        let Some(payload) = udp_payload_to(frame, NODE_PORT) else { continue };
        let mut damaged = payload.to_vec();
        if !damaged.is_empty() {
            let at = rng.below(damaged.len() as u64) as usize;
            damaged[at] ^= 1 << rng.below(8);
        }
        udp.send_to(payload, target)?;
        udp.send_to(&damaged, target)?;
        udp.send_to(&payload[..rng.below(payload.len() as u64 + 1) as usize], target)?;
        sent += 3;
    }
    for _ in 0..500 {
        let noise: Vec<u8> = (0..rng.below(1400)).map(|_| rng.bits() as u8).collect();
        udp.send_to(&noise, target)?;
        sent += 1;
    }
    let connections = flock.network.inside(stranger, || {
        let mut open = Vec::new();
        for index in 0..SILENT_CONNECTIONS {
            let Ok(mut stream) = TcpStream::connect_timeout(&target, Duration::from_secs(1)) else { continue };
            if index % 2 == 0 {
                // The beginning of a TLS record, the magic of an open cluster, or anything.
                let heads: [&[u8]; 3] = [&[22, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3], b"SHEEPOPN", &[0xff; 8]];
                let mut bytes = heads[index / 2 % 3].to_vec();
                bytes.extend((0..rng.below(600)).map(|_| rng.bits() as u8));
                // Whoever is refused finds the connection closed.
                let _ = stream.write_all(&bytes);
            }
            open.push(stream);
        }
        Ok(open)
    })?;
    pause(1.0);
    Ok(sent + connections.len())
}

const SECRET_TEXT: &[u8] = b"plainly visible words of a guest";

/// Writes known words through a cluster and looks for them on its network.
fn captured(format: &[&str]) -> Result<tests::capture::Captured> {
    const NAME: &str = "a-name-that-only-members-know";
    let flock = Flock::acquainted(3)?;
    flock.format(0, format)?;
    flock.wait_members(3)?;
    let mut texts = vec![SECRET_TEXT.to_vec(), NAME.as_bytes().to_vec()];
    if !format.contains(&"--open") {
        texts.extend(secrets(&[key_of(&flock)?]).into_iter().map(String::into_bytes));
    }
    let capture = Capture::start(&flock.network, texts, None)?;
    let mut client = flock.client(0)?;
    let disk = Disk::create(&mut client, NAME, BLOCKS)?;
    let content: Vec<u8> = SECRET_TEXT.iter().copied().cycle().take(4096).collect();
    for block in 0..BLOCKS {
        disk.write_bytes(&mut client, block, &content)?;
    }
    // Through another node, so that reads travel too.
    let mut client = flock.client(1)?;
    for block in 0..BLOCKS {
        ensure!(disk.read(&mut client, block).is_err(), "these blocks hold words, not numbers");
    }
    pause(1.0);
    let captured = capture.finish()?;
    flock.finish()?;
    Ok(captured)
}

#[test]
fn nothing_is_readable_on_the_wire() -> Result<()> {
    if is_skipped("captures of a cluster") {
        return Ok(());
    }
    let closed = captured(&["-c", "3"])?;
    eprintln!("closed: {} packets, {} bytes, hits {:?}", closed.packet_count, closed.byte_count, closed.hits);
    ensure!(closed.byte_count > 2 * u64::from(BLOCKS) * 4096, "the blocks went over the network");
    ensure!(closed.hits.iter().all(|&hits| hits == 0), "readable: {:?}", closed.hits);
    // The same where nothing is hidden: so the capture can tell.
    let open = captured(&["-c", "3", "--open"])?;
    eprintln!("open: {} packets, {} bytes, hits {:?}", open.packet_count, open.byte_count, open.hits);
    if open.hits[0] == 0 {
        bail!("an open cluster shows nothing either: the capture is blind");
    }
    Ok(())
}
