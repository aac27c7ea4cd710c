//! Real `sheep` processes, killed at bad moments, under guests that remember what they were promised (P1, P2, P5).
//!
//! Each test has its own cluster. Two guests write at the same time: one whose every acknowledgement means durable,
//! one with a write-back cache and flushes.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use qemu_proto::oid::Oid;
use rustix::process::{Pid, Signal};
use tests::clients::{Client, MAP_OFFSET, Request, Volume, flag, opcode};
use tests::command;
use tests::sectors::fill_random;
use tests::sim::Random;
use tests::spawn::{Cluster, ClusterPlan, DOG_DEADLINE, free_port};
use tests::writer::{After, Durability, Guest, Outcome, WriterPlan, write_while};

const MIB: u64 = 1 << 20;
const VOLUME_BYTES: u64 = 64 * MIB;

/// A stall that no single crash may cause, even on a busy machine. The promise (250 ms for a killed process) is a
/// matter of the benchmark; here the stall is printed.
const STALL_MAX: Duration = Duration::from_secs(10);

fn guests(cluster: &Cluster) -> Result<Vec<Guest>> {
    let mut client = cluster.client(0)?;
    let through = WriterPlan { depth: 16, durability: Durability::WriteThrough, seed: 101 };
    let back = WriterPlan { depth: 16, durability: Durability::WriteBack { flush_every: 100 }, seed: 102 };
    Ok(vec![
        Guest::new(&mut client, "through", VOLUME_BYTES, through)?,
        Guest::new(&mut client, "back", VOLUME_BYTES, back)?,
    ])
}

fn pause(seconds: f64) {
    std::thread::sleep(Duration::from_secs_f64(seconds));
}

fn tell(what: &str, outcomes: &[Outcome]) {
    for (outcome, kind) in outcomes.iter().zip(["write-through", "write-back"]) {
        eprintln!(
            "{what}: {kind}: {} writes and {} flushes acknowledged, longest stall {:.1?} (from {:.1?} on)",
            outcome.acknowledged_count, outcome.flush_count, outcome.longest_stall, outcome.stalled_at
        );
    }
}

/// Every promise is kept as seen through each of these nodes, all of them see the same, and `dog vdi check` is content.
fn verify(cluster: &Cluster, guests: &mut [Guest], through: &[usize], after: After) -> Result<()> {
    for guest in guests {
        let mut first = None;
        for &index in through {
            let mut client = cluster.client(index)?;
            let seen = guest
                .ledger
                .verify(&mut client, &guest.name, after)
                .with_context(|| format!("as node {index} has it"))?;
            match &first {
                None => first = Some(seen),
                Some(first) => ensure!(*first == seen, "nodes {} and {index} differ in {}", through[0], guest.name),
            }
        }
        guest.ledger.hold_to(&first.context("no node to look through")?);
        let check = cluster.dog_through(through[0], &["vdi", "check", &guest.name], &[])?.ok()?;
        let complaints = ["no node has", "no majority", "inconsistent", "failed"];
        ensure!(!complaints.iter().any(|word| check.err().contains(word)), "{check}");
    }
    Ok(())
}

fn no_guest_noticed(outcomes: &[Outcome]) -> Result<()> {
    for outcome in outcomes {
        ensure!(!outcome.is_cut, "the connection was cut: {outcome:?}");
        ensure!(outcome.acknowledged_count > 0, "nothing was written: {outcome:?}");
        ensure!(outcome.longest_stall < STALL_MAX, "stalled too long: {outcome:?}");
    }
    Ok(())
}

#[test]
fn a_killed_node_is_not_noticed_and_catches_up() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let mut guests = guests(&cluster)?;
    let port = cluster.node(0).port;
    // Two runs, so that the stall of the loss and that of the return are told apart.
    let killed = write_while(&mut guests, port, || {
        pause(1.0);
        cluster.kill(2)?;
        pause(1.5);
        Ok(())
    })?;
    tell("node 3 killed after 1 s", &killed);
    no_guest_noticed(&killed)?;
    let back = write_while(&mut guests, port, || {
        pause(0.5);
        cluster.restart(2)?;
        pause(1.5);
        Ok(())
    })?;
    tell("node 3 back after 0.5 s", &back);
    no_guest_noticed(&back)?;
    cluster.wait_members(3)?;
    cluster.wait_recovered()?;
    verify(&cluster, &mut guests, &[0, 1, 2], After::ProcessCrash)?;
    cluster.finish()
}

#[test]
fn one_node_after_the_other_is_killed_under_load() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let mut guests = guests(&cluster)?;
    let port = cluster.node(0).port;
    let outcomes = write_while(&mut guests, port, || {
        for victim in [1, 2, 1, 2] {
            pause(0.5);
            cluster.kill(victim)?;
            pause(0.3);
            cluster.restart(victim)?;
            cluster.wait_members(3)?;
            cluster.wait_recovered()?;
        }
        Ok(())
    })?;
    tell("four kills in turn", &outcomes);
    no_guest_noticed(&outcomes)?;
    verify(&cluster, &mut guests, &[0, 1, 2], After::ProcessCrash)?;
    cluster.finish()
}

#[test]
fn the_next_client_sees_what_a_killed_gateway_acknowledged() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let mut guests = guests(&cluster)?;
    let port = cluster.node(0).port;
    let outcomes = write_while(&mut guests, port, || {
        pause(1.5);
        cluster.kill(0)?;
        // So that each guest finds the connection gone, and not only the test over.
        pause(0.2);
        Ok(())
    })?;
    tell("gateway killed", &outcomes);
    ensure!(outcomes.iter().all(|outcome| outcome.is_cut && outcome.acknowledged_count > 0), "{outcomes:?}");
    verify(&cluster, &mut guests, &[1, 2], After::ProcessCrash)?;

    // The guests go on through another node, and the one that died catches up.
    let port = cluster.node(1).port;
    let outcomes = write_while(&mut guests, port, || {
        pause(0.5);
        cluster.restart(0)?;
        pause(0.5);
        Ok(())
    })?;
    no_guest_noticed(&outcomes)?;
    cluster.wait_members(3)?;
    cluster.wait_recovered()?;
    verify(&cluster, &mut guests, &[0, 1, 2], After::ProcessCrash)?;
    cluster.finish()
}

#[test]
fn the_last_of_three_has_everything() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let mut guests = guests(&cluster)?;
    let port = cluster.node(0).port;
    let outcomes = write_while(&mut guests, port, || {
        pause(1.0);
        cluster.kill_together(&[0, 1])
    })?;
    tell("gateway and another killed at once", &outcomes);
    verify(&cluster, &mut guests, &[2], After::ProcessCrash)?;
    cluster.finish()
}

#[test]
fn a_node_that_caught_up_can_be_the_last() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let mut guests = guests(&cluster)?;
    let port = cluster.node(0).port;
    cluster.kill(2)?;
    write_while(&mut guests, port, || {
        pause(1.0);
        Ok(())
    })?;
    cluster.restart(2)?;
    cluster.wait_members(3)?;
    cluster.wait_recovered()?;
    cluster.kill_together(&[0, 1])?;
    verify(&cluster, &mut guests, &[2], After::ProcessCrash)?;
    cluster.finish()
}

#[test]
fn all_nodes_killed_at_once_lose_nothing_durable() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let mut guests = guests(&cluster)?;
    for round in 0..3 {
        let port = cluster.node(round % 3).port;
        let outcomes = write_while(&mut guests, port, || {
            pause(0.7);
            cluster.kill_together(&[0, 1, 2])
        })?;
        tell("all three killed", &outcomes);
        for index in [1, 2, 0] {
            cluster.launch(index)?;
        }
        for index in 0..3 {
            cluster.wait_serving(index)?;
        }
        cluster.wait_members(3)?;
        cluster.wait_running()?;
        verify(&cluster, &mut guests, &[0, 1, 2], After::PowerLoss)?;
    }
    cluster.finish()
}

/// Writes are answered before a returning node's copy has them (they are deferred): whoever dies in that window, in
/// whatever company, takes nothing along.
#[test]
fn deaths_while_a_node_catches_up_lose_nothing() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let mut guests = guests(&cluster)?;
    let victims: [&[usize]; 6] = [&[2], &[1, 2], &[0, 1, 2], &[1], &[0, 1], &[0]];
    for (round, victims) in victims.into_iter().enumerate() {
        let port = cluster.node(0).port;
        let outcomes = write_while(&mut guests, port, || {
            pause(0.3);
            cluster.kill(2)?;
            pause(0.4);
            cluster.launch(2)?;
            pause(0.05 * round as f64);
            cluster.kill_together(victims)
        })?;
        tell(&format!("{victims:?} killed while node 2 caught up"), &outcomes);
        for index in victims {
            cluster.launch(*index)?;
        }
        for index in 0..3 {
            cluster.wait_serving(index)?;
        }
        cluster.wait_members(3)?;
        cluster.wait_running()?;
        // What was not flushed is in the memory of the two whose copies count.
        let both_died = victims.starts_with(&[0, 1]);
        let after = if both_died { After::PowerLoss } else { After::ProcessCrash };
        verify(&cluster, &mut guests, &[0, 1, 2], after)?;
        cluster.wait_recovered()?;
        verify(&cluster, &mut guests, &[2], After::ProcessCrash)?;
    }
    cluster.finish()
}

/// The history rule (design, section 7): a copy that missed an epoch in which others may have taken writes is not
/// served before one of those others has been heard.
#[test]
fn a_stale_copy_is_never_served() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let write = |cluster: &Cluster, content: &[u8]| {
        cluster.dog_through(0, &["vdi", "write", "disk", "0", "4096"], content)?.ok().map(drop)
    };
    let (old, new) = (vec![1; 4096], vec![2; 4096]);
    cluster.dog(&["vdi", "create", "disk", "16M"])?.ok()?;
    write(&cluster, &old)?;
    cluster.kill(2)?;
    write(&cluster, &new)?;
    cluster.kill_together(&[0, 1])?;

    cluster.launch(2)?;
    let read_alone = || -> Result<Vec<u8>> {
        let mut client = cluster.client(2)?;
        client.set_deadline(Duration::from_secs(2))?;
        let volume = Volume::open(&mut client, "disk", "")?;
        client.read_object(Oid::data(volume.vdi, 0), 0, 4096)
    };
    for _ in 0..6 {
        if let Ok(content) = read_alone() {
            ensure!(content != old, "a stale copy was served");
            ensure!(content == new, "something that was never written was served");
        }
        pause(0.3);
    }
    cluster.launch(0)?;
    cluster.wait_serving(2)?;
    cluster.wait_serving(0)?;
    cluster.restart(1)?;
    cluster.wait_members(3)?;
    cluster.wait_recovered()?;
    for index in 0..3 {
        let read = cluster.dog_through(index, &["vdi", "read", "disk", "0", "4096"], &[])?.ok()?;
        ensure!(read.stdout == new, "node {index} lost the newer write");
    }
    cluster.finish()
}

#[test]
fn snapshots_under_load_are_frozen() -> Result<()> {
    let cluster = Cluster::three()?;
    let mut guests = guests(&cluster)?;
    let port = cluster.node(0).port;
    let read = |name: &str, tag: &str| -> Result<Vec<u8>> {
        let mut client = cluster.client(1)?;
        let mut content = Vec::new();
        Volume::open(&mut client, name, tag)?.read_all(&mut client, |_, bytes| {
            content.extend_from_slice(bytes);
            Ok(())
        })?;
        Ok(content)
    };
    let mut frozen = Vec::new();
    let outcomes = write_while(&mut guests, port, || {
        for tag in ["one", "two", "three"] {
            pause(0.5);
            for name in ["through", "back"] {
                cluster.dog(&["vdi", "snapshot", "-s", tag, name])?.ok()?;
                frozen.push((name, tag, read(name, tag)?));
            }
        }
        pause(0.5);
        Ok(())
    })?;
    tell("three snapshots of each", &outcomes);
    no_guest_noticed(&outcomes)?;
    for (name, tag, before) in &frozen {
        ensure!(read(name, tag)? == *before, "snapshot {tag} of {name} changed");
    }
    verify(&cluster, &mut guests, &[0, 1, 2], After::ProcessCrash)?;
    cluster.finish()
}

#[test]
fn fewer_copies_survive_what_they_can() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let mut content = vec![0; 9 * MIB as usize];
    fill_random(&mut content, &mut Random::new(5));
    cluster.dog(&["vdi", "create", "-c", "2", "two", "16M"])?.ok()?;
    cluster.dog_through(0, &["vdi", "write", "two", "0", &content.len().to_string()], &content)?.ok()?;
    for victim in 0..3 {
        cluster.kill(victim)?;
        let other = (victim + 1) % 3;
        cluster.wait_members(2)?;
        let read = cluster.dog_through(other, &["vdi", "read", "two", "0", &content.len().to_string()], &[])?.ok()?;
        ensure!(read.stdout == content, "without node {victim}");
        cluster.wait_recovered()?;
        cluster.restart(victim)?;
        cluster.wait_members(3)?;
        cluster.wait_recovered()?;
    }
    cluster.dog(&["vdi", "check", "two"])?.ok()?;
    cluster.finish()
}

#[test]
fn dog_reads_what_dog_writes() -> Result<()> {
    let cluster = Cluster::three()?;
    let mut content = vec![0; (10 * MIB + 12_345) as usize];
    fill_random(&mut content, &mut Random::new(6));
    cluster.dog(&["vdi", "create", "disk", "32M"])?.ok()?;
    // Across object borders, at odd places.
    let offset = (3 * MIB + 777).to_string();
    let length = content.len().to_string();
    cluster.dog_through(0, &["vdi", "write", "disk", &offset, &length], &content)?.ok()?;
    for index in 0..3 {
        let read = cluster.dog_through(index, &["vdi", "read", "disk", &offset, &length], &[])?.ok()?;
        ensure!(read.stdout == content, "through node {index}");
    }
    let all = cluster.dog(&["vdi", "read", "disk"])?.ok()?.stdout;
    ensure!(all.len() as u64 == 32 * MIB, "{} bytes", all.len());
    let start = (3 * MIB + 777) as usize;
    ensure!(all[..start].iter().all(|&byte| byte == 0), "what lies before is zeros");
    ensure!(all[start + content.len()..].iter().all(|&byte| byte == 0), "what lies behind is zeros");
    // A short write changes what it covers and nothing else (the ancestor zeroed the rest of the object).
    cluster.dog_through(1, &["vdi", "write", "disk", &offset], b"hello")?.ok()?;
    let after = cluster.dog(&["vdi", "read", "disk", &offset, &length])?.ok()?.stdout;
    ensure!(&after[..5] == b"hello" && after[5..] == content[5..], "a short write changed more than it covers");
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

#[test]
fn a_shut_down_cluster_comes_back_in_the_same_epoch() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let epochs = |cluster: &Cluster| -> Result<usize> {
        let info = cluster.dog(&["cluster", "info"])?.ok()?.out();
        Ok(info.lines().skip_while(|line| !line.starts_with("Epoch")).count())
    };
    cluster.dog(&["vdi", "create", "disk", "16M"])?.ok()?;
    cluster.dog_through(0, &["vdi", "write", "disk", "0", "4096"], &[9; 4096])?.ok()?;
    let before = epochs(&cluster)?;
    cluster.dog(&["cluster", "shutdown"])?.ok()?;
    for index in 0..3 {
        let code = cluster.wait_exit(index)?;
        ensure!(code == Some(0), "node {index} ended with {code:?}");
    }
    for index in [2, 0, 1] {
        cluster.launch(index)?;
    }
    for index in 0..3 {
        cluster.wait_serving(index)?;
    }
    cluster.wait_running()?;
    ensure!(epochs(&cluster)? == before, "a new epoch although everybody came back");
    let read = cluster.dog(&["vdi", "read", "disk", "0", "4096"])?.ok()?;
    ensure!(read.stdout == [9; 4096], "the data are gone");
    cluster.finish()
}

#[test]
fn a_node_leaves_when_asked() -> Result<()> {
    let mut cluster = Cluster::three()?;
    cluster.dog(&["vdi", "create", "disk", "16M"])?.ok()?;
    ensure!(cluster.terminate(2)? == Some(0), "SIGTERM ends a node with exit code 0");
    cluster.wait_members(2)?;
    let id = cluster.dog(&["node", "list", "-r"])?.ok()?.out();
    let victim = format!("127.0.0.1:{}", cluster.node(1).port);
    let row = id.lines().find(|line| line.contains(&victim)).context("node 2 is listed")?;
    let id = row.split(' ').next().context("rows begin with the id")?;
    cluster.dog_through(0, &["node", "kill", id], &[])?.ok()?;
    ensure!(cluster.wait_exit(1)? == Some(0), "a node killed by dog ends with exit code 0");
    cluster.wait_members(1)?;
    cluster.dog_through(0, &["vdi", "write", "disk", "0", "4096"], &[3; 4096])?.ok()?;
    cluster.finish()
}

/// What `dog` says through the gateway, node 0, of who has an object of a volume, and who should hold it: by index of the node.
fn has_and_should(cluster: &Cluster, index: Option<u32>) -> Result<(Vec<usize>, Vec<usize>)> {
    let index = index.map(|index| index.to_string());
    let of_data: Vec<&str> = index.iter().flat_map(|index| ["-i", index]).collect();
    let arguments = [&["vdi", "object", "location"], of_data.as_slice(), &["disk"]].concat();
    let told = cluster.dog_through(0, &arguments, &[])?.ok()?.out();
    let (_, should) = told.trim_end().rsplit_once("located at: ").with_context(|| told.clone())?;
    let nodes = |is_one: &dyn Fn(&str) -> bool| {
        let all = 0..cluster.node_count();
        all.filter(|node| is_one(&format!("127.0.0.1:{}", cluster.node(*node).port))).collect()
    };
    let has = nodes(&|address| told.contains(&format!("{address} has the object")));
    Ok((has, nodes(&|address| should.split(' ').any(|listed| listed == address))))
}

#[test]
fn a_flush_reaches_all_holders_where_none_of_them_has_had_everything() -> Result<()> {
    const OBJECTS: u32 = 48;
    let mut plan = ClusterPlan::new(5).arguments(0, &["-g"]);
    for index in 1..5 {
        plan = plan.arguments(index, &["-j", "size=64M"]);
    }
    let mut cluster = plan.start_formatted(2)?;
    let mut client = cluster.client(0)?;
    let vdi = client.create_volume("disk", u64::from(OBJECTS) * 4 * MIB, 2, 22)?;
    let write = |client: &mut Client, index: u32, flags: u16, byte: u8| {
        let request = Request::object(opcode::WRITE, Oid::data(vdi, index), 0).flags(flags | flag::WRITE);
        client.call(request, &[byte; 4096])?.success("write")
    };
    for index in 0..OBJECTS {
        let create = Request::object(opcode::CREATE_AND_WRITE, Oid::data(vdi, index), 0);
        client.call(create.flags(flag::DIRECT | flag::WRITE), &[1; 4096])?.success("create an object")?;
        let map = Request::object(opcode::WRITE, Oid::inode(vdi), MAP_OFFSET + 4 * u64::from(index));
        client.call(map.flags(flag::DIRECT), &vdi.get().to_le_bytes())?.success("write the map")?;
    }
    cluster.wait_recovered()?;
    for node in 1..5 {
        let port = cluster.node(node).port.to_string();
        cluster.dog(&["node", "recovery", "set-throttle", "1", "2000", "-p", &port])?.ok()?;
    }
    let (_, of_inode) = has_and_should(&cluster, None)?;
    let first = (1..5).find(|node| !of_inode.contains(node)).context("a node without the inode")?;
    let mut orphans = Vec::new();
    for index in 0..OBJECTS {
        let (_, holders) = has_and_should(&cluster, Some(index))?;
        if holders.contains(&first) {
            orphans.push((index, holders.into_iter().find(|node| *node != first).context("a second holder")?));
        }
    }
    cluster.kill(first)?;
    cluster.wait_members(4)?;
    // The first object that its new holder has. It lacks others, and will for a while.
    let mut found = None;
    cluster.wait_until("an object to be brought", DOG_DEADLINE, |cluster| {
        for (index, second) in &orphans {
            let (has, should) = has_and_should(cluster, Some(*index))?;
            let third = should.into_iter().find(|node| node != second).filter(|node| has.contains(node));
            found = found.or(third.map(|third| (*index, *second, third)));
        }
        Ok(found.is_some())
    })?;
    let (index, second, third) = found.context("it was found")?;
    write(&mut client, index, flag::DIRECT, 2)?;
    // What the second one keeps of the next write, when the power goes: nothing.
    let pid = cluster.node(second).pid().and_then(|pid| Pid::from_raw(pid as i32)).context("it runs")?;
    let (store, kept) = (cluster.node(second).store.clone(), cluster.scratch().join("kept"));
    rustix::process::kill_process(pid, Signal::STOP)?;
    let copied = command::run(Command::new("cp").args(["-a", "--sparse=always"]).args([&store, &kept]), DOG_DEADLINE);
    rustix::process::kill_process(pid, Signal::CONT)?;
    copied?.ok()?;
    write(&mut client, index, flag::CACHE, 3)?;
    cluster.kill(second)?;
    std::fs::remove_dir_all(&store)?;
    std::fs::rename(&kept, &store)?;
    cluster.wait_members(3)?;
    client.flush(vdi)?;
    cluster.kill(third)?;
    cluster.wait_members(2)?;
    cluster.restart(second)?;
    cluster.wait_members(3)?;
    let read = client.read_object(Oid::data(vdi, index), 0, 4096)?;
    ensure!(read == [3; 4096], "what was flushed is gone, {} is there", read[0]);
    cluster.finish()
}

/// A process of its own session, known by its pid file; killed if a failed test leaves it behind.
struct Daemon(std::path::PathBuf);

impl Drop for Daemon {
    fn drop(&mut self) {
        let pid = std::fs::read_to_string(&self.0).ok().and_then(|text| text.trim().parse().ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            // It may have ended since.
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
    }
}

#[test]
fn a_daemon_serves_when_its_parent_returns() -> Result<()> {
    let cluster = ClusterPlan::new(1).start_formatted(1)?;
    let store = cluster.scratch().join("daemon");
    let pid_file = cluster.scratch().join("daemon.pid");
    let port = free_port()?;
    let start = |port: u16| {
        let mut sheep = Command::new(tests::spawn::binary("sheep")?);
        sheep.args(["-b", "127.0.0.1", "-y", "127.0.0.1", "-z", "9", "-j", "size=64M"]);
        sheep.args(["-p", &port.to_string(), "-c", &cluster.driver_argument()]);
        sheep.arg("-P").arg(&pid_file).arg(&store);
        command::run(&mut sheep, DOG_DEADLINE)
    };
    start(port)?.ok()?;
    let _ends_with_the_test = Daemon(pid_file.clone());
    // No waiting: the parent has returned, so the node serves.
    ensure!(Client::tcp(port)?.node_count()? == 2, "the daemon is a member when its parent returns");
    ensure!(Client::unix(&store.join("sock"))?.node_count()? == 2, "and serves the unix socket");
    let pid = std::fs::read_to_string(&pid_file)?;
    let pid: i32 = pid.strip_suffix('\n').context("the pid file ends in a line break")?.parse()?;
    // The same directory twice: refused, and the first daemon lives on.
    let second = start(free_port()?)?.exits(1)?.refused()?;
    ensure!(second.err().contains("another sheep daemon is using"), "{second}");
    ensure!(Client::tcp(port)?.node_count()? == 2, "the first daemon lives on");
    let pid = rustix::process::Pid::from_raw(pid).context("process id 0")?;
    rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
    cluster.wait_members(1)?;
    cluster.wait_until("the pid file to go", DOG_DEADLINE, |_| Ok(!pid_file.exists()))?;
    cluster.finish()
}
