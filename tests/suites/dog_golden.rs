//! What `dog` prints, byte for byte, and how it exits: scripts depend on both.
//!
//! The stored texts in `tests/golden/` follow the ancestor's formats; moments of time and ports are replaced before the
//! comparison. Where the ancestor hid an error (exit code 0, nothing said), the tests here want it told.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use tests::command::{self, Finished};
use tests::golden;
use tests::nbd_client::{NbdClient, Style};
use tests::spawn::{Cluster, ClusterPlan, binary, free_port};

const MIB: usize = 1 << 20;

/// Replaces what differs between runs: times, the ports of the nodes (all of four digits), and the weight of a node
/// where free space moved it by a little.
fn normal(cluster: &Cluster, text: &str) -> String {
    let mut text = golden::without_times(text);
    for index in 0..cluster.node_count() {
        text = text.replace(&format!("127.0.0.1:{}", cluster.node(index).port), &format!("127.0.0.1:PRT{}", index + 1));
    }
    for weight in 120..=136 {
        text = text.replace(&format!(":{weight},"), ":128,").replace(&format!(":{weight}]"), ":128]");
        text = text.replace(&format!("\t{weight} "), "\t128 ").replace(&format!(" {weight} "), " 128 ");
    }
    text
}

/// Nodes in the order of their ports, which is the order of `dog`'s ids.
fn cluster_in_port_order(formatted: bool) -> Result<Cluster> {
    loop {
        let plan = ClusterPlan::new(3);
        let cluster = if formatted { plan.start_formatted(3)? } else { plan.start()? };
        if (1..3).all(|index| cluster.node(index - 1).port < cluster.node(index).port) {
            return Ok(cluster);
        }
        cluster.finish()?;
    }
}

fn check(cluster: &Cluster, name: &str, arguments: &[&str]) -> Result<Finished> {
    let ended = cluster.dog(arguments)?.ok()?;
    golden::check(name, &normal(cluster, &ended.out()))?;
    ensure!(ended.err().is_empty(), "{ended}");
    Ok(ended)
}

#[test]
fn cluster_info_and_format() -> Result<()> {
    let cluster = cluster_in_port_order(false)?;
    check(&cluster, "cluster_info_unformatted", &["cluster", "info"])?;
    check(&cluster, "cluster_format", &["cluster", "format", "-c", "3"])?;
    check(&cluster, "cluster_info", &["cluster", "info"])?;
    let raw = normal(&cluster, &cluster.dog(&["cluster", "info", "-r"])?.ok()?.out());
    ensure!(raw.starts_with("running, auto-recovery enabled\n"), "{raw}");
    ensure!(raw.ends_with("SECONDS 1 [127.0.0.1:PRT1:128, 127.0.0.1:PRT2:128, 127.0.0.1:PRT3:128]\n"), "{raw}");
    check(&cluster, "cluster_info_verbose", &["cluster", "info", "-v"])?;
    // A second format asks first, and does nothing without an answer; -f does not ask.
    cluster.dog(&["vdi", "create", "test", "16M"])?.ok()?;
    let asked = cluster.dog(&["cluster", "format", "-c", "3"])?.exits(0)?;
    ensure!(asked.out().ends_with("Are you sure you want to continue? [yes/no]: "), "{asked}");
    ensure!(cluster.dog(&["vdi", "list", "-r"])?.ok()?.out().lines().count() == 1, "formatted without an answer");
    let answered = cluster.dog_through(0, &["cluster", "format", "-c", "3"], b"yes\n")?.ok()?;
    ensure!(answered.out().contains("using backend plain store"), "{answered}");
    ensure!(cluster.dog(&["vdi", "list", "-r"])?.ok()?.out().is_empty(), "not formatted after yes");
    cluster.dog(&["cluster", "format", "-c", "2", "-f"])?.ok()?;
    cluster.finish()
}

#[test]
fn node_list_info_and_recovery() -> Result<()> {
    let cluster = cluster_in_port_order(true)?;
    check(&cluster, "node_list", &["node", "list"])?;
    check(&cluster, "node_list_raw", &["node", "list", "-r"])?;
    check(&cluster, "node_recovery_idle", &["node", "recovery"])?;
    ensure!(cluster.dog(&["node", "recovery", "-r"])?.ok()?.out().is_empty(), "idle, so no rows");
    // Sizes differ between machines: the form is what counts.
    let info = cluster.dog(&["node", "info"])?.ok()?.out();
    let lines: Vec<&str> = info.lines().collect();
    ensure!(lines[0] == "Id\tSize\tUsed\tAvail\tUse%", "{info}");
    for (id, line) in lines[1..4].iter().enumerate() {
        let fields: Vec<&str> = line.split('\t').collect();
        ensure!(fields.len() == 5 && fields[0] == format!("{id:2}"), "{info}");
        ensure!(fields[1..4].iter().all(|field| is_size(field)), "{info}");
        ensure!(fields[4].len() == 4 && fields[4].ends_with('%'), "{info}");
    }
    ensure!(lines[4].starts_with("Total\t") && lines[5].is_empty(), "{info}");
    ensure!(lines[6] == "Total virtual image size\t0.0 MB", "{info}");
    let raw = cluster.dog(&["node", "info", "-r"])?.ok()?.out();
    let rows: Vec<Vec<&str>> = raw.lines().map(|line| line.split(' ').collect()).collect();
    ensure!(rows.len() == 4 && rows[..3].iter().all(|row| row.len() == 5), "{raw}");
    ensure!(rows[3][0] == "Total" && rows[3].len() == 6 && rows[3][5] == "0", "{raw}");
    for row in &rows {
        let number = |index: usize| row[index].parse::<u64>().with_context(|| raw.clone());
        // What is used and what is free are sampled one after the other.
        ensure!(number(1)?.abs_diff(number(2)? + number(3)?) < 1 << 30, "size is used and available: {raw}");
    }
    // Long before the journal is half full and everything in it is brought to its place for good.
    cluster.dog(&["vdi", "create", "test", "16M"])?.ok()?;
    cluster.dog_through(0, &["vdi", "write", "test", "0", &(12 * MIB).to_string()], &vec![7; 12 * MIB])?.ok()?;
    cluster.wait_until("what is used", Duration::from_secs(20), |cluster| {
        let raw = cluster.dog(&["node", "info", "-r"])?.ok()?.out();
        let used = raw.lines().take(3).map(|row| row.split(' ').nth(2).and_then(|used| used.parse::<usize>().ok()));
        Ok(used.flatten().filter(|used| (12 * MIB..14 * MIB).contains(used)).count() == 3)
    })?;
    let disk = cluster.dog(&["node", "md", "info"])?.ok()?.out();
    ensure!(disk.contains("\t12 MB\t"), "{disk}");
    cluster.finish()
}

#[test]
fn what_a_node_was_asked() -> Result<()> {
    let cluster = cluster_in_port_order(true)?;
    let stat = |index: usize, side: &str, name: &str| -> Result<u64> {
        let port = cluster.node(index).port.to_string();
        let text = cluster.dog(&["node", "stat", "--json", "-p", &port])?.ok()?.out();
        let value: serde_json::Value = serde_json::from_str(&text)?;
        value[side][name].as_u64().with_context(|| text)
    };
    cluster.dog(&["vdi", "create", "test", "16M"])?.ok()?;
    let size = 8 * MIB as u64;
    let about_size = |from: u64, to: u64| (size..size + MIB as u64).contains(&(to - from));
    let (written, read) = (stat(0, "client", "written_bytes")?, stat(0, "client", "read_bytes")?);
    let (forwarded, writes) = (stat(1, "peer", "written_bytes")?, stat(1, "peer", "write")?);
    cluster.dog_through(0, &["vdi", "write", "test", "0", &size.to_string()], &vec![7; 8 * MIB])?.ok()?;
    ensure!(about_size(written, stat(0, "client", "written_bytes")?), "8 MiB were written");
    ensure!(about_size(forwarded, stat(1, "peer", "written_bytes")?), "8 MiB went to the other nodes");
    ensure!(stat(1, "peer", "write")? >= writes + 2, "two objects at least");
    cluster.dog(&["vdi", "read", "test", "0", &size.to_string()])?.ok()?;
    ensure!(about_size(read, stat(0, "client", "read_bytes")?), "8 MiB were read");
    for (index, side) in [(0, "client"), (0, "peer"), (1, "client"), (1, "peer")] {
        ensure!(stat(index, side, "active")? == 0, "nothing is under way at node {index} for {side}");
    }
    let read = stat(2, "client", "read_bytes")?;
    let mut nbd = NbdClient::open(&cluster.node(2).store.join("nbd.sock"), "test", Style::Structured, &[])?;
    ensure!(nbd.read(0, size)? == vec![7; 8 * MIB], "as it was written");
    ensure!(about_size(read, stat(2, "client", "read_bytes")?), "clients of NBD are clients");
    let table = cluster.dog(&["node", "stat"])?.ok()?.out();
    let lines: Vec<&str> = table.lines().collect();
    ensure!(lines[0] == "Request\tActive\tTotal\tWrite\tRead\tRemove\tFlush\tAll WR\tAll RD", "{table}");
    ensure!(lines.len() == 3 && lines[1].starts_with("Client\t0\t") && lines[2].starts_with("Peer\t0\t"), "{table}");
    let raw = cluster.dog(&["node", "stat", "-r"])?.ok()?.out();
    ensure!(raw.lines().count() == 2 && raw.lines().all(|line| line.split('\t').count() == 8), "{raw}");
    cluster.finish()
}

#[test]
fn how_much_a_node_logs() -> Result<()> {
    // Before there is a cluster too: that is when people look into logs.
    let cluster = ClusterPlan::new(1).start()?;
    let get = || -> Result<String> { Ok(cluster.dog(&["node", "log", "level", "get"])?.ok()?.out()) };
    let debug_lines = || cluster.node(0).log().lines().filter(|line| line.contains(" DEBUG [")).count();
    ensure!(get()? == "info (6)\n" && debug_lines() == 0, "as sheep begins: {}", get()?);
    let silent = cluster.dog(&["node", "log", "level", "set", "debug"])?.ok()?;
    ensure!(silent.out().is_empty() && silent.err().is_empty(), "{silent}");
    ensure!(get()? == "debug (7)\n", "{}", get()?);
    ensure!(cluster.node(0).log().contains("the log level is debug from now on; it was info"), "it is in the log");
    // A connection that ends in the middle of a request is worth a line at this level.
    let mut stream = std::net::TcpStream::connect(("127.0.0.1", cluster.node(0).port))?;
    std::io::Write::write_all(&mut stream, &[0; 10])?;
    drop(stream);
    cluster.wait_until("a line of level debug", Duration::from_secs(20), |_| Ok(debug_lines() > 0))?;
    let unknown = cluster.dog(&["node", "log", "level", "set", "loud"])?.exits(64)?.refused()?;
    ensure!(unknown.err().starts_with("invalid loglevel: loud\navailable loglevels: emerg "), "{unknown}");
    let list = cluster.dog(&["node", "log", "level", "list"])?.ok()?.out();
    ensure!(list.lines().count() == 8 && list.ends_with("info\t(6)\ndebug\t(7)\n"), "{list}");
    cluster.finish()
}

/// Whether a text is a size as `dog` prints them: `12 MB`, `0.0 MB`, `1.5 TB`.
fn is_size(text: &str) -> bool {
    text.split_once(' ')
        .is_some_and(|(number, unit)| number.parse::<f64>().is_ok() && ["MB", "GB", "TB", "PB", "EB"].contains(&unit))
}

#[test]
fn vdi_commands() -> Result<()> {
    let cluster = cluster_in_port_order(true)?;
    let created = cluster.dog(&["vdi", "create", "-v", "test", "40M"])?.ok()?;
    ensure!(created.out() == "VDI ID of newly created VDI: 7c2b25\n", "{created}");
    cluster.dog_through(0, &["vdi", "write", "test", "0", &(12 * MIB).to_string()], &vec![7; 12 * MIB])?.ok()?;
    let silent = cluster.dog(&["vdi", "snapshot", "-s", "snap1", "test"])?.ok()?;
    ensure!(silent.out().is_empty() && silent.err().is_empty(), "{silent}");
    check(&cluster, "vdi_list", &["vdi", "list"])?;
    check(&cluster, "vdi_list_raw", &["vdi", "list", "-r"])?;
    check(&cluster, "vdi_graph", &["vdi", "graph"])?;
    let clone = cluster.dog(&["vdi", "clone", "-v", "-s", "snap1", "test", "a copy"])?.ok()?;
    ensure!(clone.out().starts_with("VDI ID of newly created clone: "), "{clone}");
    let create_raw = cluster.dog(&["vdi", "create", "-rv", "x", "1G"])?.ok()?;
    ensure!(create_raw.out() == "021707\n" || create_raw.out() == "21707\n", "{create_raw}");
    cluster.dog(&["vdi", "create", "-c", "2", "alpha", "1.5G"])?.ok()?;
    cluster.dog(&["vdi", "create", "-z", "20", "vm1", "0"])?.ok()?;
    check(&cluster, "vdi_list_several", &["vdi", "list"])?;
    check(&cluster, "vdi_list_several_raw", &["vdi", "list", "-r"])?;
    check(&cluster, "vdi_list_unknown", &["vdi", "list", "nothing"])?;
    check(&cluster, "vdi_check", &["vdi", "check", "test"])?;
    check(&cluster, "cluster_check", &["cluster", "check"])?;
    let numbers = cluster.dog(&["vdi", "snapshot", "-v", "-s", "snap2", "alpha"])?.ok()?;
    ensure!(numbers.out().starts_with("new VID of original VDI: "), "{numbers}");
    cluster.dog(&["vdi", "delete", "-s", "snap1", "test"])?.ok()?;
    cluster.dog(&["vdi", "delete", "vm1"])?.ok()?;
    let rest = cluster.dog(&["vdi", "list", "-r"])?.ok()?.out();
    ensure!(!rest.contains("snap1") && !rest.contains(" vm1 "), "{rest}");
    let again = cluster.dog(&["vdi", "read", "test", "0", "4096"])?.ok()?;
    ensure!(again.stdout == [7; 4096], "deleting a snapshot took data of the volume");
    cluster.finish()
}

#[test]
fn where_an_object_was() -> Result<()> {
    let mut cluster = cluster_in_port_order(true)?;
    for (name, copies) in [("test", "3"), ("single", "1")] {
        cluster.dog(&["vdi", "create", "-c", copies, name, "40M"])?.ok()?;
        cluster.dog_through(0, &["vdi", "write", name, "0", "4096"], &[7; 4096])?.ok()?;
    }
    let json = cluster.dog(&["vdi", "track", "-i", "0", "--json", "single"])?.ok()?.out();
    let json: serde_json::Value = serde_json::from_str(&json)?;
    let should = json["epochs"][0]["nodes"][0].as_str().context("a node")?;
    let location = cluster.dog(&["vdi", "object", "location", "-i", "0", "single"])?.ok()?.out();
    ensure!(location.contains(&format!("{should} has the object")), "{json}\n{location}");
    ensure!(location.ends_with(&format!("the object should be located at: {should}\n")), "{json}\n{location}");
    cluster.kill(2)?;
    cluster.wait_members(2)?;
    let text = normal(&cluster, &cluster.dog(&["vdi", "track", "-i", "0", "test"])?.ok()?.out());
    // Which holder is preferred follows from the ids of the nodes, and those are drawn.
    let mut lines: Vec<&str> = text.lines().collect();
    for block in lines.chunk_by_mut(|line, next| line.starts_with("127.") && next.starts_with("127.")) {
        block.sort_unstable();
    }
    golden::check("vdi_track", &(lines.join("\n") + "\n"))?;
    let hole = cluster.dog(&["vdi", "track", "-i", "5", "test"])?.ok()?.out();
    ensure!(hole == "The inode object 0x7c2b25 idx 5 is not allocated\n", "{hole}");
    let by_id = cluster.dog(&["vdi", "track", "-o", "807c2b2500000000"])?.ok()?;
    ensure!(by_id.out().starts_with("Tracking the inode object 0x7c2b25 with 2 nodes\n"), "{by_id}");
    cluster.finish()
}

#[test]
fn sizes_as_people_write_them() -> Result<()> {
    let cluster = Cluster::three()?;
    for (text, bytes) in [
        ("1.5M", 1_572_864_u64),
        ("1e3", 1000),
        ("0x100000", 1 << 20),
        (".5G", 1 << 29),
        ("20m", 20 << 20),
        ("1t", 1 << 40),
        ("512k", 512 << 10),
        ("777b", 777),
    ] {
        cluster.dog(&["vdi", "create", "disk", text])?.ok()?;
        let listed = cluster.dog(&["vdi", "list", "-r", "disk"])?.ok()?.out();
        let size: u64 = listed.split(' ').nth(3).context("a row")?.parse()?;
        ensure!(size == bytes, "{text}: {size}");
        cluster.dog(&["vdi", "delete", "disk"])?.ok()?;
    }
    for text in ["10MB", "10Q", "abc", ""] {
        let ended = cluster.dog(&["vdi", "create", "disk", text])?.exits(64)?.refused()?;
        ensure!(ended.err().contains(&format!("Invalid size '{text}'")), "{ended}");
    }
    cluster.finish()
}

#[test]
fn vdi_read_and_write() -> Result<()> {
    let cluster = Cluster::three()?;
    cluster.dog(&["vdi", "create", "test", "8M"])?.ok()?;
    cluster.dog_through(0, &["vdi", "write", "test", "4096", "5"], b"hello")?.ok()?;
    let read = cluster.dog(&["vdi", "read", "test", "4094", "9"])?.ok()?;
    ensure!(read.stdout == b"\0\0hello\0\0", "{read}");
    let whole = cluster.dog(&["vdi", "read", "test"])?.ok()?;
    ensure!(whole.stdout.len() == 8 * MIB, "{} bytes", whole.stdout.len());
    let end = cluster.dog(&["vdi", "read", "test", "8M"])?.ok()?;
    ensure!(end.stdout.is_empty(), "reading from the end gives nothing");
    let clipped = cluster.dog(&["vdi", "read", "test", "8388600", "100"])?.ok()?;
    ensure!(clipped.stdout == [0; 8], "a range is cut at the size");
    let beyond = cluster.dog(&["vdi", "read", "test", "9M"])?.exits(1)?.refused()?;
    ensure!(beyond.err().contains("Read offset is beyond the end of the VDI"), "{beyond}");
    let beyond = cluster.dog_through(0, &["vdi", "write", "test", "9M", "5"], b"hello")?.exits(1)?.refused()?;
    ensure!(beyond.err().contains("Write offset is beyond the end of the VDI"), "{beyond}");
    // A snapshot is read by tag and by number, and never written.
    cluster.dog(&["vdi", "snapshot", "-s", "one", "test"])?.ok()?;
    cluster.dog_through(0, &["vdi", "write", "test", "4096", "5"], b"later")?.ok()?;
    for name in ["one", "1"] {
        let read = cluster.dog(&["vdi", "read", "-s", name, "test", "4096", "5"])?.ok()?;
        ensure!(read.stdout == b"hello", "{read}");
    }
    ensure!(cluster.dog(&["vdi", "read", "test", "4096", "5"])?.ok()?.stdout == b"later", "the volume itself");
    cluster.finish()
}

/// `(arguments, exit code, part of what is said on standard error)`.
type Refusal = (&'static [&'static str], i32, &'static str);

#[test]
fn refusals_of_a_running_cluster() -> Result<()> {
    let cluster = Cluster::three()?;
    cluster.dog(&["vdi", "create", "test", "16M"])?.ok()?;
    cluster.dog(&["vdi", "snapshot", "-s", "tag", "test"])?.ok()?;
    let refusals: &[Refusal] = &[
        (&["vdi", "create", "test", "16M"], 1, "Failed to create VDI test: VDI exists already"),
        (&["vdi", "create", "new"], 64, "Please specify the VDI size"),
        (&["vdi", "create", "new", "5T"], 64, ""),
        (&["vdi", "create", "-c", "32", "new", "16M"], 1, "32"),
        (&["vdi", "create", "-c", "0", "new", "16M"], 1, "0"),
        (&["vdi", "snapshot", "-s", "7", "test"], 64, "Please specify a non-integer value for a snapshot tag name"),
        (&["vdi", "snapshot", "-s", "tag", "test"], 1, "tag (tag) is existed"),
        (&["vdi", "snapshot", "-s", "new", "none"], 1, "Failed to create snapshot for none: No VDI found"),
        (&["vdi", "clone", "test", "new"], 64, "Please specify the '-s' option"),
        (&["vdi", "clone", "-s", "tag", "test"], 64, "Destination VDI name must be specified"),
        (&["vdi", "clone", "-s", "none", "test", "new"], 1, "Failed to find requested tag"),
        (&["vdi", "clone", "-s", "tag", "test", "test"], 1, "VDI exists already"),
        (&["vdi", "resize", "test", "8M"], 1, "nothing was changed, because the answer was not 'yes'"),
        (&["vdi", "resize", "none", "8M"], 1, "No VDI found"),
        (&["vdi", "read", "none"], 1, "Failed to open VDI none (snapshot id: 0 snapshot tag: ): No VDI found"),
        (&["vdi", "read", "-s", "none", "test"], 1, "Failed to find requested tag"),
        (&["vdi", "read", "-s", "0", "test"], 1, "The snapshot id must be larger than zero"),
        (&["vdi", "check", "none"], 1, "No VDI found"),
        // The ancestor said this and exited 0.
        (&["vdi", "delete", "none"], 1, "No VDI found"),
        (&["vdi", "delete", "-s", "none", "test"], 1, "Failed to find requested tag"),
        (&["node", "kill", "x"], 64, "Invalid node id 'x', please specify a numeric value"),
        (&["node", "kill", "7"], 64, "Invalid node id '7'"),
    ];
    for (arguments, code, reason) in refusals {
        let ended = cluster.dog(arguments)?.exits(*code)?.refused()?;
        ensure!(ended.err().contains(reason), "the reason should contain {reason:?}: {ended}");
    }
    ensure!(cluster.dog(&["vdi", "list", "-r"])?.ok()?.out().lines().count() == 2, "a refusal changed something");
    cluster.finish()
}

#[test]
fn the_command_line_itself() -> Result<()> {
    let dog = |arguments: &[&str]| -> Result<Finished> {
        let mut command = Command::new(binary("dog")?);
        command.env_remove("SHEEPDOG_DOG_ADDR").env_remove("SHEEPDOG_DOG_PORT");
        command::run(command.args(arguments), Duration::from_mins(1))
    };
    for arguments in [
        &[][..],
        &["help"],
        &["--help"],
        &["-h"],
        &["help", "img"],
        &["vdi", "create", "-h"],
        &["vdi", "attach", "-h"],
        &["node", "list", "--help"],
    ] {
        let ended = dog(arguments)?.ok()?;
        ensure!(ended.out().to_lowercase().contains("usage") && ended.err().is_empty(), "{ended}");
    }
    let unknown = dog(&["dance"])?.exits(64)?.refused()?;
    ensure!(unknown.err().contains("Invalid command 'dance'"), "{unknown}");
    ensure!(unknown.err().contains("Try 'dog --help' for more information."), "{unknown}");
    let unknown = dog(&["vdi", "dance"])?.exits(64)?.refused()?;
    ensure!(unknown.err().contains("Invalid command 'vdi dance'"), "{unknown}");
    ensure!(unknown.err().contains("Available vdi commands:") && unknown.err().contains("  vdi check"), "{unknown}");
    ensure!(dog(&["vdi"])?.exits(64)?.err().contains("Available vdi commands:"), "dog vdi");
    ensure!(dog(&["vdi", "list", "--dance"])?.exits(64)?.err().contains("Try"), "an unknown option");
    let bad_port = dog(&["vdi", "list", "-p", "x"])?.exits(64)?.refused()?;
    ensure!(bad_port.err().contains("Invalid port number 'x'"), "{bad_port}");
    let bad_address = dog(&["vdi", "list", "-a", "300.1.1.1"])?.exits(1)?.refused()?;
    ensure!(bad_address.err().contains("Invalid ip address 300.1.1.1"), "{bad_address}");

    let port = free_port()?.to_string();
    let refusal = format!("failed to connect to 127.0.0.1:{port}: Connection refused");
    // The ancestor exited with 0, 1, 2, 5 or 255, depending on the command. Here it is always 2: nobody could be asked.
    for arguments in [
        &["cluster", "info"][..],
        &["cluster", "format", "-c", "1"],
        &["cluster", "shutdown"],
        &["node", "list"],
        &["node", "info"],
        &["node", "recovery"],
        &["node", "stat"],
        &["node", "log", "level", "get"],
        &["node", "kill", "0"],
        &["cluster", "check"],
        &["vdi", "list"],
        &["vdi", "graph"],
        &["vdi", "track", "disk"],
        &["vdi", "create", "disk", "1G"],
        &["vdi", "check", "disk"],
        &["vdi", "read", "disk"],
        &["vdi", "snapshot", "-s", "tag", "disk"],
        &["vdi", "clone", "-s", "tag", "disk", "new"],
        &["vdi", "resize", "disk", "2G"],
        &["vdi", "delete", "disk"],
        &["vdi", "attach", "disk"],
        &["vdi", "backup", "-F", "1", "-s", "2", "disk"],
        &["vdi", "restore", "-s", "1", "disk"],
    ] {
        let ended = dog(&[arguments, &["-p", &port]].concat())?.exits(2)?;
        ensure!(ended.err().contains(&refusal), "{ended}");
    }
    // What is missing on the command line is said before anybody is asked.
    dog(&["vdi", "create", "-p", &port])?.exits(64)?.refused()?;
    Ok(())
}

#[test]
fn options_in_every_form() -> Result<()> {
    let cluster = Cluster::three()?;
    cluster.dog(&["vdi", "create", "test", "16M"])?.ok()?;
    let expected = cluster.dog(&["vdi", "list", "-r"])?.ok()?.out();
    let port = cluster.node(1).port.to_string();
    let (cluster_form, long_form) = (format!("-rp{port}"), format!("--port={port}"));
    for arguments in [
        &["vdi", "list", &cluster_form][..],
        &["vdi", "list", "--ra", "-p", &port],
        &["vdi", "list", "-r", "-p", &port, "-a", "127.0.0.1"],
        &["vdi", "list", "--raw", &long_form, "test"],
        &["vdi", "list", "test", "-r", "--address", "localhost", "--port", &port],
    ] {
        let mut dog = Command::new(binary("dog")?);
        dog.env_remove("SHEEPDOG_DOG_ADDR").env_remove("SHEEPDOG_DOG_PORT").args(arguments);
        let ended = command::run(&mut dog, Duration::from_mins(1))?.ok()?;
        ensure!(ended.out() == expected, "{ended}");
    }
    let mut dog = Command::new(binary("dog")?);
    dog.env("SHEEPDOG_DOG_ADDR", "127.0.0.1").env("SHEEPDOG_DOG_PORT", &port).args(["vdi", "list", "-r"]);
    ensure!(command::run(&mut dog, Duration::from_mins(1))?.ok()?.out() == expected, "by environment");
    cluster.dog(&["vdi", "create", "-c2", "short", "16M"])?.ok()?;
    let copies = cluster.dog(&["vdi", "list", "-r", "short"])?.ok()?.out();
    ensure!(copies.split(' ').nth(8) == Some("2"), "{copies}");
    cluster.finish()
}

#[test]
fn json_for_programs() -> Result<()> {
    let cluster = Cluster::three()?;
    cluster.dog(&["vdi", "create", "test", "16M"])?.ok()?;
    for arguments in [
        &["cluster", "info", "--json"][..],
        &["node", "list", "--json"],
        &["node", "info", "--json"],
        &["node", "recovery", "--json"],
        &["node", "stat", "--json"],
        &["node", "log", "level", "get", "--json"],
        &["vdi", "list", "--json"],
        &["vdi", "track", "--json", "test"],
    ] {
        let ended = cluster.dog(arguments)?.ok()?;
        let value: serde_json::Value = serde_json::from_str(&ended.out()).with_context(|| ended.to_string())?;
        ensure!(value.is_array() || value.is_object(), "{ended}");
    }
    let nodes: serde_json::Value = serde_json::from_str(&cluster.dog(&["node", "list", "--json"])?.ok()?.out())?;
    let text = nodes.to_string();
    ensure!((0..3).all(|index| text.contains(&cluster.node(index).port.to_string())), "{text}");
    let volumes = cluster.dog(&["vdi", "list", "--json"])?.ok()?.out();
    ensure!(volumes.contains("\"test\"") && volumes.contains("16777216"), "{volumes}");
    cluster.finish()
}
