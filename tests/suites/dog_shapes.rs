//! What `dog` prints where `dog_golden` does not look: the rest of its tables, the shape of every `--json`, and that no command
//! or option of the old tool is missing without a word about it.
//!
//! Stored texts are in `tests/golden/`, shapes in `tests/golden/schema/`.

use std::collections::BTreeMap;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::clients::{Client, Request, opcode, padded, result};
use tests::command::{self, Finished};
use tests::golden;
use tests::schema;
use tests::spawn::{Cluster, ClusterPlan, binary};

const MIB: usize = 1 << 20;

/// Replaces what differs between runs: times, ports, and the order of holders, which follows from ids that are drawn.
fn normal(cluster: &Cluster, text: &str) -> String {
    let mut text = golden::without_times(text);
    for index in 0..cluster.node_count() {
        for before in ["127.0.0.1:", "port:"] {
            let port = cluster.node(index).port;
            text = text.replace(&format!("{before}{port}"), &format!("{before}PRT{}", index + 1));
        }
    }
    let sorted = |line: &str| match line.split_once("located at: ") {
        Some((before, nodes)) => {
            let mut nodes: Vec<&str> = nodes.split(' ').collect();
            nodes.sort_unstable();
            format!("{before}located at: {}", nodes.join(" "))
        }
        None => line.to_owned(),
    };
    let ends = if text.ends_with('\n') { "\n" } else { "" };
    text.lines().map(sorted).collect::<Vec<_>>().join("\n") + ends
}

/// Nodes in the order of their ports, which is the order of `dog`'s ids; locks are enforced.
fn cluster() -> Result<Cluster> {
    loop {
        let cluster = ClusterPlan::new(3).start()?;
        if (1..3).all(|index| cluster.node(index - 1).port < cluster.node(index).port) {
            cluster.dog(&["cluster", "format", "-c", "3", "-l"])?.ok()?;
            return Ok(cluster);
        }
        cluster.finish()?;
    }
}

/// A volume with a snapshot, a clone of that, and 12 MiB.
fn fill(cluster: &Cluster) -> Result<()> {
    cluster.dog(&["vdi", "create", "test", "40M"])?.ok()?;
    cluster.dog_through(0, &["vdi", "write", "test", "0", &(12 * MIB).to_string()], &vec![7; 12 * MIB])?.ok()?;
    cluster.dog(&["vdi", "snapshot", "-s", "snap1", "test"])?.ok()?;
    cluster.dog(&["vdi", "clone", "-s", "snap1", "test", "copy"])?.ok()?;
    Ok(())
}

fn check(cluster: &Cluster, name: &str, arguments: &[&str]) -> Result<Finished> {
    let ended = cluster.dog(arguments)?.ok()?;
    golden::check(name, &normal(cluster, &ended.out()))?;
    ensure!(ended.err().is_empty(), "{ended}");
    Ok(ended)
}

/// Opens a volume as QEMU does: it is locked while the connection stays.
fn open(cluster: &Cluster, name: &str) -> Result<Client> {
    let stays = cluster.client(0)?;
    let request = Request::new(opcode::LOCK_VDI).version(1);
    let locked = cluster.client(0)?.call(request, &padded(&[name, ""]))?;
    ensure!(locked.result() == result::SUCCESS, "{name} is free");
    Ok(stays)
}

#[test]
fn tables_are_those_of_the_old_tool() -> Result<()> {
    let cluster = cluster()?;
    fill(&cluster)?;
    check(&cluster, "vdi_tree", &["vdi", "tree"])?;
    check(&cluster, "vdi_object_map", &["vdi", "object", "map", "test"])?;
    check(&cluster, "vdi_object_location", &["vdi", "object", "location", "test"])?;
    check(&cluster, "vdi_object_location_index", &["vdi", "object", "location", "-i", "1", "test"])?;
    check(&cluster, "vdi_object_location_hole", &["vdi", "object", "location", "-i", "9", "test"])?;
    let far = cluster.dog(&["vdi", "object", "location", "-i", "10", "test"])?.exits(1)?;
    ensure!(far.out() == "The offset is too large!\n", "{far}");
    check(&cluster, "vdi_check_exist", &["vdi", "check", "-e", "test"])?;
    check(&cluster, "cluster_info_diff", &["cluster", "info", "-d"])?;
    let _client = open(&cluster, "test")?;
    check(&cluster, "vdi_lock_list", &["vdi", "lock", "list"])?;
    let unlocked = cluster.dog(&["vdi", "lock", "unlock", "copy"])?.exits(1)?;
    ensure!(
        unlocked.err().starts_with("VDI copy (vid=") && unlocked.err().ends_with(") is not locked\n"),
        "{unlocked}"
    );
    // Sizes differ between machines: the form is what counts.
    let disks = cluster.dog(&["node", "md", "info", "-A"])?.ok()?.out();
    let lines: Vec<&str> = disks.lines().collect();
    ensure!(lines[0] == "Id\tSize\tUsed\tAvail\tUse%\tPath" && lines.len() == 7, "{disks}");
    for node in 0..3 {
        ensure!(lines[1 + 2 * node] == format!("Node {node}:"), "{disks}");
        let fields: Vec<&str> = lines[2 + 2 * node].split('\t').collect();
        let path = cluster.node(node).store.join("obj");
        ensure!(fields.len() == 6 && fields[0] == " 0" && fields[5] == path.display().to_string(), "{disks}");
    }
    let raw = cluster.dog(&["node", "md", "info", "-r"])?.ok()?.out();
    ensure!(raw.starts_with(&format!("127.0.0.1:{} 0 ", cluster.node(0).port)) && raw.split(' ').count() == 7, "{raw}");
    let dump = cluster.dog(&["vdi", "object", "dump-inode", "-s", "snap1", "test"])?.ok()?.out();
    ensure!(dump.starts_with("name: test\ntag: snap1\n"), "{dump}");
    ensure!(dump.ends_with("data_vdi_id:\n00000000   7c2b25\n00000001   7c2b25\n00000002   7c2b25\n"), "{dump}");
    cluster.finish()
}

#[test]
fn every_json_has_its_shape() -> Result<()> {
    let mut cluster = cluster()?;
    fill(&cluster)?;
    let client = open(&cluster, "test")?;
    let shapes: &[(&str, &[&str])] = &[
        ("cluster_info", &["cluster", "info"]),
        ("node_list", &["node", "list"]),
        ("node_info", &["node", "info"]),
        ("node_stat", &["node", "stat"]),
        ("node_md_info", &["node", "md", "info"]),
        ("node_md_info", &["node", "md", "info", "-A"]),
        ("node_log_level_get", &["node", "log", "level", "get"]),
        ("node_log_level_list", &["node", "log", "level", "list"]),
        ("vdi_list", &["vdi", "list"]),
        ("vdi_tree", &["vdi", "tree"]),
        ("vdi_track", &["vdi", "track", "test"]),
        ("vdi_lock_list", &["vdi", "lock", "list"]),
        ("vdi_object_map", &["vdi", "object", "map", "test"]),
        ("vdi_object_location", &["vdi", "object", "location", "test"]),
        ("vdi_object_location", &["vdi", "object", "location", "-i", "1", "test"]),
        ("vdi_object_dump_inode", &["vdi", "object", "dump-inode", "test"]),
        ("vdi_attach", &["vdi", "attach", "test"]),
    ];
    for (name, arguments) in shapes {
        let value = json(&cluster, arguments)?;
        let is_empty = value.as_array().is_some_and(Vec::is_empty);
        ensure!(!is_empty, "{arguments:?}: an empty list shows no shape");
        schema::check(name, &value)?;
    }
    drop(client);
    // A node that has to wait for its copies.
    cluster.dog(&["cluster", "recover", "disable"])?.ok()?;
    cluster.kill(2)?;
    cluster.wait_members(2)?;
    cluster.dog_through(0, &["vdi", "write", "test", "0", "4096"], &[8; 4096])?.ok()?;
    cluster.restart(2)?;
    cluster.wait_members(3)?;
    cluster.wait_until("a node that recovers", Duration::from_secs(30), |cluster| {
        let value = json(cluster, &["node", "recovery"])?;
        schema::check("node_recovery", &value)?;
        Ok(value.as_array().is_some_and(|rows| !rows.is_empty()))
    })?;
    schema::check("cluster_info", &json(&cluster, &["cluster", "info", "-v"])?)?;
    cluster.dog(&["cluster", "recover", "enable"])?.ok()?;
    cluster.wait_recovered()?;
    cluster.finish()
}

fn json(cluster: &Cluster, arguments: &[&str]) -> Result<Value> {
    let ended = cluster.dog(&[arguments, &["--json"]].concat())?.ok()?;
    serde_json::from_str(&ended.out()).with_context(|| ended.to_string())
}

/// `(arguments, exit code, part of what is said on standard error)`.
type Refusal = (&'static [&'static str], i32, &'static str);

#[test]
fn refusals_name_a_reason_and_what_to_do() -> Result<()> {
    let cluster = cluster()?;
    cluster.dog(&["vdi", "create", "test", "16M"])?.ok()?;
    let refusals: &[Refusal] = &[
        (&["vdi", "alter-copy", "test"], 1, "test's redundancy level is already set to 3, nothing changed."),
        (&["vdi", "alter-copy", "-c", "4:2", "test"], 64, "Only the number of copies"),
        (&["vdi", "alter-copy", "-c", "32", "test"], 1, "Invalid parameter 32"),
        (&["vdi", "alter-copy", "-c", "2", "none"], 1, "No VDI found"),
        (
            &["cluster", "alter-copy", "-c", "3"],
            1,
            "The cluster's redundancy level is already set to 3, nothing changed.",
        ),
        (&["cluster", "recover"], 64, "Say what to do: force, enable or disable"),
        (&["cluster", "recover", "dance"], 1, "Invalid subcommand 'dance'"),
        (&["node", "recovery", "set-throttle", "1", "0"], 64, "Invalid interval max (1), interval (0)"),
        (&["node", "recovery", "set-throttle", "--", "-1", "0"], 64, "Invalid max (-1)"),
        (&["node", "recovery", "set-throttle", "1"], 64, "Say how fast"),
        (&["node", "recovery", "dance"], 1, "Invalid subcommand 'dance'"),
        (&["node", "md"], 64, "Say what to do: info, plug or unplug"),
        (&["node", "md", "plug", "/x"], 1, "the disks of a node are those that sheep is started with"),
        (&["node", "md", "unplug", "/x"], 1, "the disks of a node are those that sheep is started with"),
        (&["node", "vnodes", "set", "5"], 255, "dog cluster reweight"),
        (
            &["node", "vnodes", "set", "65536"],
            64,
            "Invalid number of vnodes '65536': must be an integer between 1 and 65535",
        ),
        (&["node", "format", "/nowhere", "plain"], 2, "Cannot use /nowhere"),
        (&["node", "format", "/", "bush"], 2, "Invalid store 'bush'"),
        (&["vdi", "object"], 64, "Say what to do: location, map or dump-inode"),
        (&["vdi", "object", "dance", "test"], 1, "Invalid subcommand 'dance'"),
        (&["vdi", "getattr", "test", "none"], 5, "Attribute 'none' not found"),
        (&["vdi", "getattr", "none", "key"], 5, "VDI not found"),
        (&["vdi", "setattr", "-d", "test", "none"], 5, "Attribute 'none' not found"),
        (&["vdi", "setattr", "none", "key", "value"], 5, "VDI not found"),
        (&["vdi", "setattr", "test"], 64, "Please specify the attribute key"),
        (&["vdi", "rollback", "test"], 64, "Please specify the '-s' option"),
        (&["vdi", "backup", "test"], 64, "Please specify the '-F'"),
        (&["vdi", "restore", "test"], 64, "Please specify the '-s' option"),
        (&["upgrade", "inode-convert", "a", "b"], 1, "is not needed"),
        (&["benchmark", "io", "test"], 1, "fio"),
        (&["trace", "start"], 1, "dog node stat -w"),
        (&["nfs", "create"], 1, "dog vdi attach"),
    ];
    for (arguments, code, reason) in refusals {
        let ended = cluster.dog(arguments)?.exits(*code)?;
        ensure!(ended.err().contains(reason), "the reason should contain {reason:?}: {ended}");
    }
    // Attributes: set, found as they are, not set twice when asked not to.
    cluster.dog(&["vdi", "setattr", "test", "key", "value"])?.ok()?;
    ensure!(cluster.dog(&["vdi", "getattr", "test", "key"])?.ok()?.stdout == b"value", "no newline");
    let again = cluster.dog(&["vdi", "setattr", "-x", "test", "key", "other"])?.exits(3)?;
    ensure!(again.err() == "The attribute 'key' already exists\n", "{again}");
    cluster.dog_through(0, &["vdi", "setattr", "test", "key"], b"from input")?.ok()?;
    ensure!(cluster.dog(&["vdi", "getattr", "test", "key"])?.ok()?.stdout == b"from input", "overwritten");
    cluster.dog(&["cluster", "reweight"])?.ok()?;
    ensure!(cluster.dog(&["cluster", "info", "-r"])?.ok()?.out().lines().count() == 3, "nothing to move, no epoch");
    let changed = cluster.dog(&["cluster", "alter-copy", "-f", "-c", "2"])?.ok()?;
    ensure!(changed.err() == "The cluster's redundancy level is set to 2, the old one was 3.\n", "{changed}");
    cluster.dog(&["vdi", "create", "two", "16M"])?.ok()?;
    let listed = cluster.dog(&["vdi", "list", "-r", "two"])?.ok()?.out();
    ensure!(listed.split(' ').nth(8) == Some("2"), "{listed}");
    cluster.finish()
}

/// Each command of the old tool with the options that it took beside `-a -p -h -T`.
const OLD_COMMANDS: &[(&str, &str)] = &[
    ("vdi check", "s e"),
    ("vdi create", "P y c z r v"),
    ("vdi snapshot", "s R r v"),
    ("vdi clone", "s P n r v"),
    ("vdi delete", "s B I m"),
    ("vdi rollback", "s f B I r v"),
    ("vdi list", "o r"),
    ("vdi tree", ""),
    ("vdi graph", ""),
    ("vdi object", "i s"),
    ("vdi track", "i s o"),
    ("vdi setattr", "d x"),
    ("vdi getattr", ""),
    ("vdi resize", ""),
    ("vdi read", "s"),
    ("vdi write", "w"),
    ("vdi backup", "s F"),
    ("vdi restore", "s B I"),
    ("vdi alter-copy", "c f"),
    ("vdi lock", "s"),
    ("node kill", "l r"),
    ("node list", "r"),
    ("node info", "r"),
    ("node recovery", "P r"),
    ("node md", "A f r"),
    ("node stat", "w r"),
    ("node log", ""),
    ("node vnodes", ""),
    ("node format", ""),
    ("cluster info", "d r v"),
    ("cluster format", "b c l t z V R f F"),
    ("cluster shutdown", ""),
    ("cluster reweight", ""),
    ("cluster check", ""),
    ("cluster recover", "f"),
    ("cluster alter-copy", "c f"),
];

/// The long form of an option of the old tool; a few letters mean different things to different commands.
fn long_form(command: &str, letter: &str) -> &'static str {
    match (letter, command) {
        ("d", "cluster info") => "diff",
        ("F", "cluster format") => "avoid-diskfull",
        ("l", "node kill") => "local",
        ("P", "node recovery") => "progress",
        ("R", "cluster format") => "recyclevid",
        ("w", "node stat") => "watch",
        ("a", _) => "address",
        ("A", _) => "all",
        ("b", _) => "store",
        ("B", _) => "nr-batched-reclamation",
        ("c", _) => "copies",
        ("d", _) => "delete",
        ("e", _) => "exist",
        ("f", _) => "force",
        ("F", _) => "from",
        ("h", _) => "help",
        ("i", _) => "index",
        ("I", _) => "reclamation-interval",
        ("l", _) => "lock",
        ("m", _) => "max-reclaim",
        ("n", _) => "no-share",
        ("o", _) => "oid",
        ("p", _) => "port",
        ("P", _) => "prealloc",
        ("r", _) => "raw",
        ("R", _) => "reduce-identical-snapshots",
        ("s", _) => "snapshot",
        ("t", _) => "strict",
        ("T", _) => "time",
        ("v", _) => "verbose",
        ("V", _) => "fixedvnodes",
        ("w", _) => "writeback",
        ("x", _) => "exclusive",
        ("y", _) => "hyper",
        ("z", _) => "block_size_shift",
        _ => panic!("no option of the old tool: -{letter}"),
    }
}

#[test]
fn every_command_and_option_of_the_old_tool_is_known() -> Result<()> {
    let dog = binary("dog")?;
    for (name, letters) in OLD_COMMANDS {
        let help = command::run(Command::new(&dog).args(name.split(' ')).arg("-h"), Duration::from_mins(1))?.ok()?;
        let out = help.out();
        let options = out.lines().filter_map(|line| line.trim_start().strip_prefix('-')?.split_once(", --"));
        let long: BTreeMap<&str, &str> =
            options.map(|(letter, rest)| (letter, rest.split(' ').next().unwrap_or(rest))).collect();
        for letter in letters.split_whitespace().chain(["a", "p", "h", "T"]) {
            let expected = long_form(name, letter);
            ensure!(long.get(letter) == Some(&expected), "-{letter} of dog {name} should be --{expected}:\n{out}");
        }
    }
    // What this tool does not do says so, and what to do instead.
    for words in ["cluster snapshot", "upgrade", "benchmark", "trace", "nfs"] {
        let ended = command::run(Command::new(&dog).args(words.split(' ')), Duration::from_mins(1))?.exits(1)?;
        let said = ended.err();
        ensure!(said.starts_with(&format!("'dog {words}' is not ")), "{ended}");
        ensure!(said.matches("'dog ").count() > 1, "the command that helps instead: {ended}");
    }
    Ok(())
}

/// `(arguments, exit code, part of standard output, part of what is said on standard error)`.
type Answer = (&'static [&'static str], i32, &'static str, &'static str);

#[test]
fn a_cluster_that_is_not_formatted_answers_as_the_old_one_did() -> Result<()> {
    const WAITING: &str = "Waiting for cluster to be formatted";
    const RESULT: &str = "Response's result: Waiting for cluster to be formatted";
    let cluster = ClusterPlan::new(1).start()?;
    let answers: &[Answer] = &[
        (&["cluster", "info"], 0, "Cluster status: Waiting for cluster to be formatted\n\n", ""),
        (&["node", "list"], 0, "  Id   Host:Port         V-Nodes       Zone\n   0 ", ""),
        (&["vdi", "list"], 0, "  Name        Id    Size    Used  Shared", ""),
        (&["vdi", "list", "-o", "807c2b2500000000"], 1, "  Name        Id    Size    Used  Shared", "of a data object"),
        (&["vdi", "tree"], 0, "", ""),
        (&["vdi", "graph"], 0, "digraph vdis {\n", ""),
        (&["vdi", "lock", "list"], 0, "  Name         Id  VDI id  Tag            Owner node(s)\n", ""),
        (&["vdi", "create", "test", "16M"], 1, "", "Failed to create VDI test: Waiting for"),
        (&["vdi", "read", "test"], 1, "", WAITING),
        (&["vdi", "snapshot", "test"], 1, "", "Failed to create snapshot for test: Waiting for"),
        (&["vdi", "clone", "-s", "tag", "test", "copy"], 1, "", WAITING),
        (&["node", "info"], 2, "", "Cannot get information from any nodes"),
        (
            &["node", "recovery"],
            1,
            "Nodes In Recovery:\n  Id   Host:Port         V-Nodes       Zone       Progress\n",
            RESULT,
        ),
        (&["node", "stat"], 1, "Request\tActive\tTotal\tWrite\tRead\tRemove\tFlush\tAll WR\tAll RD\n", RESULT),
        (&["node", "stat", "-r"], 1, "", RESULT),
        (&["node", "md", "info"], 1, "Id\tSize\tUsed\tAvail\tUse%\tPath\n", RESULT),
        (&["cluster", "reweight"], 1, "", RESULT),
        (&["cluster", "recover", "enable"], 1, "", RESULT),
        (&["cluster", "recover", "disable"], 1, "", RESULT),
    ];
    for (arguments, code, out, reason) in answers {
        let ended = cluster.dog(arguments)?.exits(*code)?;
        ensure!(ended.out().starts_with(out) && ended.err().contains(reason), "{ended}");
        ensure!(ended.out().is_empty() == out.is_empty() || *code == 0, "nothing else is printed: {ended}");
        ensure!(ended.err().is_empty() == reason.is_empty(), "{ended}");
    }
    cluster.finish()
}
