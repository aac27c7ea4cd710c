//! Real QEMU and a real iSCSI target, which nobody here wrote, as clients of real nodes.
//!
//! QEMU 5.2's own driver speaks the native protocol. Where those tools are missing its tests say `SKIPPED`. The iSCSI
//! target of `tgt`, reached by the `qemu-img` of this machine, is never skipped.
//!
//! `QEMU_IMAGE_MIB` and `QEMU_BENCH_WRITES` set the size of the work; the full run has 1024 and 20000.

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::command::{size_from_env, skipped};
use tests::guest::{BootedGuest, GuestParts};
use tests::qemu::{Qemu, tcp_url, text, unix_url};
use tests::sectors::{files_equal, sparse_image};
use tests::spawn::{Cluster, ClusterPlan};
use tests::tgt::Target;

const MIB: u64 = 1 << 20;
const IMAGE_MIB_DEFAULT: u64 = 128;
const BENCH_WRITES_DEFAULT: u64 = 4000;

/// The raw lines of `dog vdi list -r NAME`, in fields. A tag that is empty leaves an empty field.
fn listed(cluster: &Cluster, name: &str) -> Result<Vec<Vec<String>>> {
    let out = cluster.dog(&["vdi", "list", "-r", name])?.ok()?.out();
    Ok(out.lines().map(|line| line.split(' ').map(str::to_owned).collect()).collect())
}

fn json(text: &str) -> Result<Value> {
    serde_json::from_str(text).with_context(|| format!("not JSON: {text}"))
}

#[test]
fn qemu52_creates_every_kind_of_volume() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("creating volumes") else { return Ok(()) };
    let cluster = Cluster::three()?;
    let node = cluster.node(0);
    // name, options, size, then what the volume must be: bytes, copies, object size as a power of two
    let kinds: &[(&str, &str, &str, u64, &str, &str)] = &[
        ("plain", "", "20M", 20 * MIB, "3", "22"),
        ("empty", "", "0", 0, "3", "22"),
        ("odd", "", "1000", 1024, "3", "22"),
        ("largest", "", "4T", 4 << 40, "3", "22"),
        ("one", "redundancy=1", "20M", 20 * MIB, "1", "22"),
        ("two", "redundancy=2", "20M", 20 * MIB, "2", "22"),
        ("three", "redundancy=3", "20M", 20 * MIB, "3", "22"),
        ("small", "object_size=1M", "20M", 20 * MIB, "3", "20"),
        ("middle", "object_size=2M", "20M", 20 * MIB, "3", "21"),
        ("large", "redundancy=2,object_size=8M", "20M", 20 * MIB, "2", "23"),
    ];
    for &(name, options, size, size_bytes, copies, shift) in kinds {
        let url = tcp_url(node, name);
        let options: &[&str] = if options.is_empty() { &[] } else { &["-o", options] };
        qemu.img(&[&["create"], options, &[&url, size]].concat())?.ok()?;
        let info = json(&qemu.img(&["info", "--output=json", &unix_url(node, name)])?.ok()?.out())?;
        ensure!(info["virtual-size"] == size_bytes, "{name}: {info}");
        let rows = listed(&cluster, name)?;
        ensure!(rows.len() == 1, "{name}: {rows:?}");
        let row = &rows[0];
        ensure!(row[3] == size_bytes.to_string() && row[8] == copies && row[10] == shift, "{name}: {row:?}");
        if (20 * MIB..1 << 40).contains(&size_bytes) {
            let last = size_bytes - 65536;
            qemu.io(&url, &[], &["write -P 17 0 65536", &format!("write -P 34 {last} 65536")])?;
            qemu.expect_pattern(&tcp_url(cluster.node(1), name), 17, 0, 65536)?;
            qemu.expect_pattern(&unix_url(cluster.node(2), name), 34, last, 65536)?;
            qemu.expect_pattern(&url, 0, 65536, 65536)?;
        }
    }
    let again = qemu.img(&["create", &tcp_url(node, "plain"), "20M"])?.refused()?;
    ensure!(again.err().contains("VDI exists already"), "{again}");
    let missing = qemu.img(&["info", &tcp_url(node, "nowhere")])?.refused()?;
    ensure!(missing.err().to_lowercase().contains("no vdi found"), "{missing}");
    cluster.finish()
}

#[test]
fn qemu52_copies_an_image_in_and_out() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("converting images") else { return Ok(()) };
    let size_bytes = size_from_env("QEMU_IMAGE_MIB", IMAGE_MIB_DEFAULT)? * MIB;
    let cluster = Cluster::three()?;
    let image = cluster.scratch().join("image.raw");
    sparse_image(&image, size_bytes, 11)?;
    let (tcp, unix) = (tcp_url(cluster.node(0), "disk"), unix_url(cluster.node(1), "disk"));
    let into = qemu.img(&["convert", "-f", "raw", "-O", "raw", text(&image), &tcp])?.ok()?;
    qemu.compare(text(&image), &tcp)?;
    qemu.compare(text(&image), &unix)?;
    let back = cluster.scratch().join("back.raw");
    let out = qemu.img(&["convert", "-f", "raw", "-O", "raw", &unix, text(&back)])?.ok()?;
    files_equal(&image, &back)?;
    eprintln!("{} MiB with holes: in {:.1?}, out {:.1?}", size_bytes / MIB, into.took, out.took);

    // The map and the reported size count the objects that exist, and the holes are holes.
    let map = json(&qemu.img(&["map", "-f", "raw", "--output=json", &tcp])?.ok()?.out())?;
    let extents = map.as_array().context("the map is a list")?;
    let mapped: u64 = extents.iter().filter(|extent| extent["data"] == true).filter_map(|e| e["length"].as_u64()).sum();
    let info = json(&qemu.img(&["info", "--output=json", "-f", "raw", &tcp])?.ok()?.out())?;
    let used: u64 = listed(&cluster, "disk")?[0][4].parse()?;
    ensure!(mapped > 0 && mapped < size_bytes, "{mapped} of {size_bytes} bytes mapped, though a part is holes");
    ensure!(used == mapped && info["actual-size"] == used, "map {mapped}, dog {used}, info {info}");
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

#[test]
fn qemu52_grows_a_volume() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("resizing") else { return Ok(()) };
    let cluster = Cluster::three()?;
    let url = tcp_url(cluster.node(0), "disk");
    qemu.img(&["create", &url, "16M"])?.ok()?;
    qemu.io(&url, &[], &["write -P 51 16773120 4096"])?;
    qemu.img(&["resize", "-f", "raw", &url, "32M"])?.ok()?;
    qemu.img(&["resize", "-f", "raw", "--shrink", &url, "16M"])?.refused()?;
    qemu.io(&url, &[], &["read -P 51 16773120 4096", "read -P 0 16777216 16777216", "write -P 52 33550336 4096"])?;
    qemu.expect_pattern(&tcp_url(cluster.node(2), "disk"), 52, 33_550_336, 4096)?;
    ensure!(listed(&cluster, "disk")?[0][3] == (32 * MIB).to_string(), "{:?}", listed(&cluster, "disk")?);
    cluster.finish()
}

#[test]
fn qemu52_snapshots_stay_as_they_were() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("snapshots") else { return Ok(()) };
    let cluster = Cluster::three()?;
    let url = tcp_url(cluster.node(0), "disk");
    let snapshot = |name: &str| tcp_url(cluster.node(1), &format!("disk#{name}"));
    qemu.img(&["create", &url, "16M"])?.ok()?;
    qemu.io(&url, &[], &["write -P 1 0 8M"])?;
    qemu.img(&["snapshot", "-c", "first", &url])?.ok()?;
    // Copy on write: a part of an object, a whole object, and an object the snapshot does not have.
    qemu.io(&url, &[], &["write -P 2 4096 4096", "write -P 2 4M 4M", "write -P 2 12M 4096"])?;
    qemu.img(&["snapshot", "-c", "second", &url])?.ok()?;
    qemu.io(&url, &[], &["write -P 3 0 4096"])?;
    let list = qemu.img(&["snapshot", "-l", &url])?.ok()?.out();
    ensure!(list.contains("first") && list.contains("second"), "{list}");

    for name in ["first", "1"] {
        qemu.expect_pattern(&snapshot(name), 1, 0, 8 * MIB)?;
        qemu.expect_pattern(&snapshot(name), 0, 8 * MIB, 8 * MIB)?;
    }
    for name in ["second", "2"] {
        qemu.io(&snapshot(name), &["-r"], &["read -P 1 0 4096", "read -P 2 4096 4096", "read -P 1 8192 4186112"])?;
        qemu.io(&snapshot(name), &["-r"], &["read -P 2 4M 4M", "read -P 2 12M 4096", "read -P 0 12587008 4096"])?;
    }
    qemu.io(&url, &["-r"], &["read -P 3 0 4096", "read -P 2 4096 4096", "read -P 1 8192 4096"])?;
    let no_tag = qemu.img(&["info", &snapshot("third")])?.refused()?;
    ensure!(!no_tag.err().is_empty(), "{no_tag}");
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

#[test]
fn qemu52_goes_back_to_a_snapshot() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("going back to a snapshot") else { return Ok(()) };
    let cluster = Cluster::three()?;
    let url = tcp_url(cluster.node(0), "disk");
    qemu.img(&["create", &url, "16M"])?.ok()?;
    qemu.io(&url, &[], &["write -P 1 0 8M"])?;
    qemu.img(&["snapshot", "-c", "first", &url])?.ok()?;
    qemu.io(&url, &[], &["write -P 2 0 4M", "write -P 2 8M 4M"])?;
    let head_before = working_id(&cluster, "disk")?;
    qemu.img(&["snapshot", "-a", "first", &url])?.ok()?;
    qemu.io(&url, &["-r"], &["read -P 1 0 8M", "read -P 0 8M 8M"])?;
    let head_after = working_id(&cluster, "disk")?;
    ensure!(head_before != head_after, "still {head_after}");
    let rows = listed(&cluster, "disk")?;
    ensure!(rows.len() == 2, "the snapshot and one working volume, the old head gone: {rows:?}");
    // The volume that came of it is an ordinary one, and the snapshot is still there.
    qemu.io(&url, &[], &["write -P 4 0 4096", "read -P 1 4096 4096"])?;
    qemu.expect_pattern(&tcp_url(cluster.node(2), "disk#first"), 1, 0, 8 * MIB)?;
    qemu.img(&["snapshot", "-a", "first", &url])?.ok()?;
    qemu.io(&url, &["-r"], &["read -P 1 0 8M", "read -P 0 8M 8M"])?;
    cluster.finish()
}

/// A whole virtual machine goes back in time: memory and devices come from the snapshot's vmstate objects, the disk from its
/// data objects.
#[test]
fn qemu52_saves_and_loads_a_running_guest() -> Result<()> {
    let what = "savevm and loadvm of a running guest";
    let Some(qemu) = Qemu::with_sheepdog(what) else { return Ok(()) };
    let Some(qemu_system) = qemu.system() else {
        skipped(what, "no qemu-system-x86_64 of QEMU 5.2 (build the tools with the word `system`)");
        return Ok(());
    };
    let Some(parts) = GuestParts::find() else {
        skipped(what, "no kernel and busybox for a guest (GUEST_DIR names their directory)");
        return Ok(());
    };
    let mut cluster = Cluster::three()?;
    let url = tcp_url(cluster.node(0), "machine");
    qemu.img(&["create", &url, "64M"])?.ok()?;
    // Without a `raw` layer on top: QEMU 5.2 takes that layer off and puts it back inside a drained section when it loads
    // a snapshot, and the guest's next request then waits for ever, whoever the server is.
    let server = format!("server.type=inet,server.host=127.0.0.1,server.port={}", cluster.node(0).port);
    let drive = format!("driver=sheepdog,{server},vdi=machine,if=virtio,cache=writeback");
    let mut guest = BootedGuest::boot(&qemu_system, &parts, cluster.scratch(), &["-drive", &drive])?;

    guest.run("mke2fs /dev/vda >/dev/null && mount -t ext4 /dev/vda /mnt")?;
    guest.run("echo written before > /mnt/file; sync; memory=before; touch /tmp-before")?;
    guest.monitor_quietly("savevm before")?;
    guest.run("echo written after > /mnt/file; sync; memory=after; rm /tmp-before")?;
    guest.monitor_quietly("savevm after")?;
    let listed_by_guest = guest.monitor("info snapshots")?;
    ensure!(listed_by_guest.contains("before") && listed_by_guest.contains("after"), "{listed_by_guest}");
    ensure!(guest.run("cat /mnt/file; echo $memory")? == "written after\nafter");

    // A node dies, and the machine goes back and forth all the same.
    cluster.kill(2)?;
    for (tag, lines) in
        [("before", "written before\nbefore"), ("after", "written after\nafter"), ("before", "written before\nbefore")]
    {
        guest.monitor_quietly(&format!("loadvm {tag}"))?;
        // Not what the guest's page cache came with, but what its disk has.
        guest.run("sync; echo 3 > /proc/sys/vm/drop_caches")?;
        ensure!(guest.run("cat /mnt/file; echo $memory")? == lines, "after loadvm {tag}");
    }
    guest
        .run("ls /tmp-before && echo and goes on > /mnt/more && sync && umount /mnt && e2fsck -fn /dev/vda || true")?;
    cluster.restart(2)?;
    guest.quit()?;

    // Another process, started into the snapshot: what a user does after a host was lost.
    let later = BootedGuest::resume(&qemu_system, &parts, cluster.scratch(), &["-drive", &drive, "-loadvm", "after"]);
    let mut guest = later?;
    ensure!(guest.run("cat /mnt/file; echo $memory")? == "written after\nafter");
    guest.quit()?;
    // By `qemu-img`: the driver forgets a running guest's map when it deletes a snapshot.
    qemu.img(&["snapshot", "-d", "before", &url])?.ok()?;
    let rows = listed(&cluster, "machine")?;
    ensure!(!rows.iter().any(|row| row.contains(&"before".to_owned())), "{rows:?}");
    cluster.dog(&["vdi", "check", "machine"])?.ok()?;
    cluster.finish()
}

/// The id of the working volume of a name.
fn working_id(cluster: &Cluster, name: &str) -> Result<String> {
    let rows = listed(cluster, name)?;
    let working: Vec<&Vec<String>> = rows.iter().filter(|row| row[2] == "0").collect();
    ensure!(working.len() == 1, "one working volume: {rows:?}");
    Ok(working[0][7].clone())
}

#[test]
fn qemu52_deletes_a_snapshot_and_not_the_volume() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("deleting snapshots") else { return Ok(()) };
    let cluster = Cluster::three()?;
    let url = tcp_url(cluster.node(0), "disk");
    qemu.img(&["create", &url, "32M"])?.ok()?;
    qemu.io(&url, &[], &["write -P 1 0 16M"])?;
    qemu.img(&["snapshot", "-c", "first", &url])?.ok()?;
    qemu.io(&url, &[], &["write -P 2 0 4M", "write -P 3 16M 4M"])?;
    qemu.img(&["snapshot", "-d", "first", &url])?.ok()?;
    // QEMU 5.2 zeroes the map of the volume that is open, which the server must not let happen.
    qemu.io(&url, &["-r"], &["read -P 2 0 4M", "read -P 1 4M 12M", "read -P 3 16M 4M", "read -P 0 20M 12M"])?;
    let list = qemu.img(&["snapshot", "-l", &url])?.ok()?.out();
    ensure!(!list.contains("first"), "{list}");
    qemu.img(&["info", &tcp_url(cluster.node(0), "disk#first")])?.refused()?;
    let rows = listed(&cluster, "disk")?;
    ensure!(rows.len() == 1, "{rows:?}");
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

#[test]
fn qemu52_discards_whole_objects() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("discarding") else { return Ok(()) };
    let cluster = Cluster::three()?;
    let url = tcp_url(cluster.node(0), "disk");
    qemu.img(&["create", &url, "16M"])?.ok()?;
    qemu.io(&url, &["-d", "unmap"], &["write -P 7 0 16M", "discard 4M 4M", "read -P 0 4M 4M", "read -P 7 0 4M"])?;
    qemu.expect_pattern(&tcp_url(cluster.node(1), "disk"), 0, 4 * MIB, 4 * MIB)?;
    let used: u64 = listed(&cluster, "disk")?[0][4].parse()?;
    ensure!(used == 12 * MIB, "{used} bytes used after a discard of 4 of 16 MiB");
    // Discarded and written again at once, many times: the new content must never go with the old.
    let mut commands = Vec::new();
    for round in 0..100 {
        let pattern = round % 200 + 20;
        commands.push("discard 0 4M".to_owned());
        commands.push(format!("write -P {pattern} 8192 4096"));
        commands.push(format!("read -P {pattern} 8192 4096"));
        commands.push("read -P 0 12288 4096".to_owned());
    }
    let commands: Vec<&str> = commands.iter().map(String::as_str).collect();
    qemu.io(&url, &["-d", "unmap"], &commands)?;
    qemu.expect_pattern(&tcp_url(cluster.node(2), "disk"), 119, 8192, 4096)?;
    cluster.finish()
}

#[test]
fn qemu52_clones_a_snapshot() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("cloning") else { return Ok(()) };
    let cluster = Cluster::three()?;
    let (base, clone) = (tcp_url(cluster.node(0), "base"), tcp_url(cluster.node(1), "clone"));
    // An object size that is not the default of the cluster: the clone must take it over.
    qemu.img(&["create", "-o", "object_size=2M", &base, "16M"])?.ok()?;
    qemu.io(&base, &[], &["write -P 1 0 8M"])?;
    qemu.img(&["snapshot", "-c", "golden", &base])?.ok()?;
    let snapshot = tcp_url(cluster.node(0), "base#golden");
    // -u: without it this qemu-img frees its memory twice after the clone was made.
    qemu.img(&["create", "-u", "-b", &snapshot, "-F", "sheepdog", &clone, "16M"])?.ok()?;
    ensure!(listed(&cluster, "clone")?[0][10] == "21", "{:?}", listed(&cluster, "clone")?);
    qemu.io(&clone, &[], &["read -P 1 0 8M", "write -P 5 4096 4096", "write -P 5 12M 2M"])?;
    qemu.io(&clone, &["-r"], &["read -P 1 0 4096", "read -P 5 4096 4096", "read -P 1 8192 4096", "read -P 5 12M 2M"])?;
    qemu.io(&base, &["-r"], &["read -P 1 0 8M", "read -P 0 8M 8M"])?;
    qemu.expect_pattern(&snapshot, 1, 0, 8 * MIB)?;
    // The base may go; what the clone shares with it stays.
    cluster.dog(&["vdi", "delete", "base"])?.ok()?;
    cluster.dog(&["vdi", "delete", "-s", "golden", "base"])?.ok()?;
    qemu.img(&["info", &base])?.refused()?;
    qemu.io(&clone, &["-r"], &["read -P 1 0 4096", "read -P 5 4096 4096", "read -P 1 8192 8380416"])?;
    cluster.dog(&["vdi", "check", "clone"])?.ok()?;
    cluster.finish()
}

#[test]
fn qemu52_runs_its_own_benchmark() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("qemu-img bench") else { return Ok(()) };
    let cluster = Cluster::three()?;
    let count = size_from_env("QEMU_BENCH_WRITES", BENCH_WRITES_DEFAULT)?.to_string();
    let url = tcp_url(cluster.node(0), "disk");
    qemu.img(&["create", &url, "256M"])?.ok()?;
    for cache in ["none", "writeback"] {
        for direction in [&["-w"][..], &[]] {
            let fixed = ["bench", "-f", "raw", "-c", &count, "-d", "32", "-s", "4096", "-t", cache];
            let ended = qemu.img(&[&fixed, direction, &[&url]].concat())?.ok()?;
            let what = if direction.is_empty() { "reads" } else { "writes" };
            eprintln!("{count} {what} of 4 KiB at depth 32, cache {cache}: {:.1?}", ended.took);
        }
    }
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

#[test]
fn qemu52_does_not_notice_a_killed_node() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("a killed node under qemu-img bench") else { return Ok(()) };
    let mut cluster = Cluster::three()?;
    let count = (size_from_env("QEMU_BENCH_WRITES", BENCH_WRITES_DEFAULT)? * 2).to_string();
    let url = tcp_url(cluster.node(0), "disk");
    qemu.img(&["create", &url, "256M"])?.ok()?;
    let fixed = ["bench", "-f", "raw", "-w", "-c", &count, "-d", "32", "-s", "4096", "-t", "none", "--pattern=90"];
    let mut bench = qemu.start_img(&[&fixed[..], &[&url]].concat())?;
    std::thread::sleep(std::time::Duration::from_millis(400));
    ensure!(bench.is_running()?, "the benchmark was over before the node could be killed");
    cluster.kill(2)?;
    let ended = bench.finish(std::time::Duration::from_mins(5))?.ok()?;
    eprintln!("{count} writes with a node killed among them: {:.1?}, no error", ended.took);
    let bytes = (count.parse::<u64>()? * 4096).min(256 * MIB);
    qemu.expect_pattern(&tcp_url(cluster.node(1), "disk"), 90, 0, bytes)?;
    cluster.restart(2)?;
    cluster.wait_members(3)?;
    cluster.wait_recovered()?;
    qemu.expect_pattern(&tcp_url(cluster.node(2), "disk"), 90, 0, bytes)?;
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

#[test]
fn qemu52_reaches_a_gateway_that_was_there_at_format() -> Result<()> {
    let Some(qemu) = Qemu::with_sheepdog("a gateway") else { return Ok(()) };
    let cluster = ClusterPlan::new(4).arguments(3, &["-g"]).start_formatted(3)?;
    let url = tcp_url(cluster.node(3), "disk");
    qemu.img(&["create", &url, "16M"])?.ok()?;
    qemu.io(&url, &[], &["write -P 8 0 16M"])?;
    qemu.expect_pattern(&url, 8, 0, 16 * MIB)?;
    qemu.expect_pattern(&tcp_url(cluster.node(0), "disk"), 8, 0, 16 * MIB)?;
    let nodes = cluster.dog(&["node", "list", "-r"])?.ok()?.out();
    let gateway = format!("127.0.0.1:{}", cluster.node(3).port);
    let row = nodes.lines().find(|line| line.contains(&gateway)).context("the gateway is listed")?;
    ensure!(row.split(' ').nth(2) == Some("0"), "a gateway has no virtual nodes: {row}");
    cluster.finish()
}

/// Copies an image in through the target, compares it, and compares it again without the target.
fn through_target(backing_store: impl Fn(&Cluster) -> String) -> Result<()> {
    let size_bytes = size_from_env("QEMU_IMAGE_MIB", IMAGE_MIB_DEFAULT)? * MIB;
    let cluster = Cluster::three()?;
    let qemu = Qemu::installed()?;
    let image = cluster.scratch().join("image.raw");
    sparse_image(&image, size_bytes, 12)?;
    cluster.dog(&["vdi", "create", "disk", &format!("{}M", size_bytes / MIB)])?.ok()?;
    let target = Target::export(cluster.scratch(), &backing_store(&cluster))?;
    let url = target.url();
    let into = qemu.img(&["convert", "-n", "-f", "raw", "-O", "raw", text(&image), &url])?.ok()?;
    qemu.compare(text(&image), &url)?;
    eprintln!("{} MiB with holes over iSCSI: in {:.1?}", size_bytes / MIB, into.took);
    target.close()?;
    // A second target is a second opener: it sees what the first one wrote.
    let target = Target::export(cluster.scratch(), &format!("tcp:127.0.0.1:{}:disk", cluster.node(2).port))?;
    qemu.compare(text(&image), &target.url())?;
    target.close()?;
    let read = cluster.dog_through(1, &["vdi", "read", "disk", "0", "1048576"], &[])?.ok()?;
    let expected = std::fs::read(&image)?;
    ensure!(read.stdout == expected[..1 << 20], "dog reads something else");
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

#[test]
fn tgt_over_the_unix_socket() -> Result<()> {
    through_target(|cluster| format!("unix:{}:disk", cluster.node(0).socket().display()))
}

#[test]
fn tgt_over_tcp() -> Result<()> {
    through_target(|cluster| format!("tcp:127.0.0.1:{}:disk", cluster.node(0).port))
}

#[test]
fn tgt_does_not_notice_a_killed_node() -> Result<()> {
    let mut cluster = Cluster::three()?;
    let qemu = Qemu::installed()?;
    let image = cluster.scratch().join("image.raw");
    sparse_image(&image, 256 * MIB, 13)?;
    cluster.dog(&["vdi", "create", "disk", "256M"])?.ok()?;
    let target = Target::export(cluster.scratch(), &format!("unix:{}:disk", cluster.node(0).socket().display()))?;
    let url = target.url();
    let mut convert = qemu.start_img(&["convert", "-n", "-f", "raw", "-O", "raw", text(&image), &url])?;
    std::thread::sleep(std::time::Duration::from_millis(300));
    let was_running = convert.is_running()?;
    cluster.kill(2)?;
    convert.finish(std::time::Duration::from_mins(5))?.ok()?;
    ensure!(was_running, "the copy was over before the node could be killed: make the image larger");
    qemu.compare(text(&image), &url)?;
    target.close()?;
    cluster.restart(2)?;
    cluster.wait_members(3)?;
    cluster.wait_recovered()?;
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}
