//! Real NBD clients on real nodes: this machine's QEMU, libnbd's tools, fio, a guest, and our own byte-level client for what
//! those cannot say. `GARBAGE_SECONDS` makes the malformed conversations go on for longer.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::command::{self, Finished, find_program, skipped};
use tests::guest::{BootedGuest, GuestParts};
use tests::nbd_client::{NbdClient, Style, command as nbd};
use tests::qemu::{Qemu, text};
use tests::sectors::{files_equal, fill_random, sparse_image};
use tests::sim::Random;
use tests::spawn::{Cluster, ClusterPlan, free_port};

const MIB: u64 = 1 << 20;
const DEADLINE: Duration = Duration::from_mins(5);

fn socket(cluster: &Cluster, index: usize) -> PathBuf {
    cluster.node(index).store.join("nbd.sock")
}

fn url(cluster: &Cluster, index: usize, export: &str) -> String {
    format!("nbd+unix:///{export}?socket={}", socket(cluster, index).display())
}

fn tool(program: &str, arguments: &[&str]) -> Result<Finished> {
    command::run(Command::new(program).args(arguments), DEADLINE)?.ok()
}

fn three_with_disk(size: &str) -> Result<Cluster> {
    let cluster = Cluster::three()?;
    cluster.dog(&["vdi", "create", "disk", size])?.ok()?;
    Ok(cluster)
}

#[test]
fn libnbd_lists_maps_and_copies() -> Result<()> {
    if find_program("nbdcopy").is_none() {
        skipped("libnbd's tools", "install the package libnbd-bin");
        return Ok(());
    }
    let cluster = three_with_disk("64M")?;
    let (image, back) = (cluster.scratch().join("image"), cluster.scratch().join("back"));
    sparse_image(&image, 64 * MIB, 11)?;
    // Eight connections at once write the same export.
    let disk = url(&cluster, 0, "disk");
    tool("nbdcopy", &["--connections=8", "--flush", text(&image), &disk])?;
    tool("nbdcopy", &["--connections=8", &url(&cluster, 2, "disk"), text(&back)])?;
    files_equal(&image, &back)?;
    cluster.dog(&["vdi", "snapshot", "-s", "first", "disk"])?.ok()?;

    let listing = tool("nbdinfo", &["--list", &url(&cluster, 1, "")])?.out();
    ensure!(listing.contains("export=\"disk\"") && listing.contains("export=\"disk@first\""), "{listing}");
    for ability in ["can_multi_conn: true", "can_fua: true", "can_df: true", "can_zero: true", "can_trim: true"] {
        ensure!(listing.contains(ability), "{ability} is missing in {listing}");
    }
    ensure!(listing.contains("is_read_only: true"), "a snapshot is read-only: {listing}");
    ensure!(listing.contains("qemu:dirty-bitmap:since-first"), "{listing}");
    let map = tool("nbdinfo", &["--map", &disk])?.out();
    ensure!(map.contains("hole,zero") && map.contains("data"), "{map}");
    cluster.finish()
}

#[test]
fn todays_qemu_copies_compares_discards_and_zeroes() -> Result<()> {
    let cluster = three_with_disk("96M")?;
    let qemu = Qemu::installed()?;
    let image = cluster.scratch().join("image");
    sparse_image(&image, 96 * MIB, 12)?;
    let disk = url(&cluster, 0, "disk");
    qemu.img(&["convert", "-n", "-f", "raw", "-O", "raw", text(&image), &disk])?.ok()?;
    qemu.compare(text(&image), &url(&cluster, 1, "disk"))?;
    qemu.io(
        &disk,
        &["-d", "unmap"],
        &[
            "write -P 9 0 12M",
            "discard 4M 4M",
            "write -z -u 8M 1M",
            "write -z 9000k 10k",
            "read -P 9 0 4M",
            "read -P 0 4M 4M",
            "read -P 0 8M 1M",
            "read -P 0 9000k 10k",
            "read -P 9 10M 2M",
            "flush",
        ],
    )?;
    qemu.expect_pattern(&url(&cluster, 2, "disk"), 0, 4 * MIB, 5 * MIB)?;
    let map = qemu.img(&["map", "-f", "raw", "--output=json", &disk])?.ok()?.out();
    ensure!(map.contains("\"data\": false"), "{map}");
    // A request beyond the end fails and harms nothing.
    ensure!(qemu.io(&disk, &[], &["write 96M 4k"]).is_err());
    qemu.expect_pattern(&disk, 9, 0, 4 * MIB)?;
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

#[test]
fn fio_and_the_storage_daemon_run_on_it() -> Result<()> {
    let cluster = three_with_disk("64M")?;
    if find_program("fio").is_some() {
        let uri = format!("--uri={}", url(&cluster, 0, "disk"));
        let job = ["--name=verify", "--ioengine=nbd", &uri, "--rw=randwrite", "--bs=4k", "--size=16M", "--iodepth=16"];
        tool(
            "fio",
            &[&job[..], &["--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--verify_state_save=0"]].concat(),
        )?;
    } else {
        skipped("fio's nbd engine", "install the package fio");
    }
    if find_program("qemu-storage-daemon").is_none() {
        skipped("qemu-storage-daemon", "install the package qemu-system-common");
        return cluster.finish();
    }
    // Passes the volume on under another name: the daemon is client here and server there.
    let passed_on = cluster.scratch().join("passed-on.sock");
    let mut daemon = Command::new("qemu-storage-daemon");
    let server = socket(&cluster, 1);
    daemon.args(["--blockdev", &format!("nbd,node-name=n,server.type=unix,server.path={},export=disk", text(&server))]);
    daemon.args(["--nbd-server", &format!("addr.type=unix,addr.path={}", text(&passed_on))]);
    daemon.args(["--export", "nbd,id=e,node-name=n,name=again,writable=on"]);
    let daemon = command::start(&mut daemon, &[])?;
    let started = Instant::now();
    while !passed_on.exists() && started.elapsed() < DEADLINE {
        std::thread::sleep(Duration::from_millis(20));
    }
    let qemu = Qemu::installed()?;
    qemu.io(&format!("nbd+unix:///again?socket={}", text(&passed_on)), &[], &["write -P 5 32M 1M", "flush"])?;
    drop(daemon);
    qemu.expect_pattern(&url(&cluster, 2, "disk"), 5, 32 * MIB, MIB)?;
    cluster.finish()
}

#[test]
fn every_reply_style_says_the_same() -> Result<()> {
    let cluster = three_with_disk("17M")?;
    let mut random = Random::new(77);
    let mut model = vec![0; 17 << 20];
    for style in [Style::Simple, Style::Structured, Style::Extended] {
        let mut client = NbdClient::open(&socket(&cluster, 0), "disk", style, &[])?;
        ensure!(client.size_bytes == 17 << 20);
        let mut bytes = vec![0; 300_000];
        fill_random(&mut bytes, &mut random);
        // Over the border of two objects.
        let at = (4 << 20) - 100_001;
        client.write(at as u64, &bytes, 1)?;
        model[at..at + bytes.len()].copy_from_slice(&bytes);
        ensure!(client.read_all()? == model, "{style:?}");
        for (kind, offset, length, error) in [
            (nbd::READ, 17 << 20, 1, 22),
            (nbd::READ, u64::MAX, 1, 22),
            (nbd::WRITE_ZEROES, 17 << 20, 1, 28),
            (nbd::TRIM, 1, 17 << 20, 28),
            (99, 0, 0, 22),
        ] {
            let answer = client.call(kind, 0, offset, length, &[])?;
            ensure!(answer.error == error, "{style:?}: request {kind} gave error {}", answer.error);
        }
        client.flush()?;
    }
    // Lengths beyond 32 bits.
    cluster.dog(&["vdi", "create", "large", "1T"])?.ok()?;
    let contexts = ["base:allocation"];
    let mut client = NbdClient::open(&socket(&cluster, 0), "large", Style::Extended, &contexts)?;
    client.write(600 << 30, &[1; 4096], 0)?;
    let extents = client.status("base:allocation", 0, 1 << 40)?;
    ensure!(extents == [(600 << 30, 3), (4096, 0), ((424 << 30) - 4096, 3)], "{extents:?}");
    // Through a node that has to ask the same question of the object's holders, too.
    let mut other = NbdClient::open(&socket(&cluster, 1), "large", Style::Structured, &contexts)?;
    other.write((600 << 30) + 65536, &vec![1; 65536], 0)?;
    other.must(nbd::WRITE_ZEROES, 0, (600 << 30) + 65536, 32768, &[])?;
    let extents = other.status("base:allocation", 600 << 30, 4 << 20)?;
    ensure!(extents == [(4096, 0), (92 * 1024, 3), (32768, 0), ((4 << 20) - (128 << 10), 3)], "{extents:?}");
    client.must(nbd::TRIM, 0, 0, 1 << 40, &[])?;
    ensure!(client.status("base:allocation", 0, 1 << 40)? == [(1 << 40, 3)]);
    cluster.finish()
}

#[test]
fn snapshots_are_exports_and_overlays_vanish() -> Result<()> {
    let cluster = three_with_disk("16M")?;
    let mut head = NbdClient::open(&socket(&cluster, 0), "disk", Style::Structured, &[])?;
    head.write(0, &[1; 8192], 0)?;
    cluster.dog(&["vdi", "snapshot", "-s", "first", "disk"])?.ok()?;
    // The open export follows the snapshot to the next working volume.
    head.write(4096, &[2; 8192], 0)?;
    let mut snapshot = NbdClient::open(&socket(&cluster, 1), "disk@first", Style::Structured, &[])?;
    ensure!(snapshot.read(0, 16384)? == [[1; 8192], [0; 8192]].concat());
    ensure!(snapshot.call(nbd::WRITE, 0, 0, 1, &[0])?.error == 1, "a snapshot was written to");
    let mut by_number = NbdClient::open(&socket(&cluster, 1), "disk@1", Style::Simple, &[])?;
    ensure!(by_number.read(0, 4096)? == [1; 4096]);

    let mut overlay = NbdClient::open(&socket(&cluster, 2), "disk@first+", Style::Structured, &[])?;
    overlay.write(4096, &[9; 4096], 1)?;
    ensure!(overlay.read(0, 16384)? == [[1; 4096], [9; 4096], [0; 4096], [0; 4096]].concat());
    ensure!(snapshot.read(4096, 4096)? == [1; 4096] && head.read(4096, 4096)? == [2; 4096]);
    let overlays =
        || -> Result<usize> { Ok(cluster.dog(&["vdi", "list", "-r"])?.ok()?.out().matches(".overlay").count()) };
    ensure!(overlays()? == 1, "an overlay is a volume while it lives");
    drop(overlay);
    cluster.wait_until("the overlay to be gone", DEADLINE, |_| Ok(overlays()? == 0))?;
    for missing in ["nothing", "disk@second", "disk@second+", "disk@", "@first", ""] {
        ensure!(
            NbdClient::open(&socket(&cluster, 0), missing, Style::Structured, &[]).is_err(),
            "`{missing}` was opened"
        );
    }
    cluster.finish()
}

/// First writes to the same objects from two connections through two sheep, each to sectors of its own, while snapshots are
/// taken and a third connection trims other objects: creation, copy-on-write and the map must not lose any of it.
#[test]
fn first_writes_through_two_sheep_do_not_wipe_each_other() -> Result<()> {
    const OBJECTS: u64 = 24;
    const OBJECT_BYTES: u64 = 4 << 20;
    let cluster = three_with_disk("160M")?;
    for round in 0..3_u8 {
        std::thread::scope(|scope| -> Result<()> {
            let writers: Vec<_> = [0, 1]
                .map(|index| {
                    let socket = socket(&cluster, index);
                    scope.spawn(move || -> Result<()> {
                        let mut client = NbdClient::open(&socket, "disk", Style::Structured, &[])?;
                        for object in 0..OBJECTS {
                            let at = object * OBJECT_BYTES + u64::from(round) * 65536 + index as u64 * 4096;
                            client.write(at, &[1 + round * 2 + index as u8; 4096], 0)?;
                        }
                        Ok(())
                    })
                })
                .into_iter()
                .collect();
            let trimmer = scope.spawn(|| -> Result<()> {
                let mut client = NbdClient::open(&socket(&cluster, 0), "disk", Style::Structured, &[])?;
                for object in OBJECTS..OBJECTS + 8 {
                    // A trim and a write to the same object under way together: either may win, the object must live on.
                    client.send(nbd::TRIM, 0, object * OBJECT_BYTES, OBJECT_BYTES, &[])?;
                    client.send(nbd::WRITE, 0, object * OBJECT_BYTES, 4096, &[9; 4096])?;
                    ensure!(client.receive()?.error == 0 && client.receive()?.error == 0);
                    client.write(object * OBJECT_BYTES + 8192, &[7; 4096], 0)?;
                    ensure!(client.read(object * OBJECT_BYTES + 8192, 4096)? == [7; 4096]);
                }
                Ok(())
            });
            for number in 0..3 {
                cluster.dog(&["vdi", "snapshot", "-s", &format!("s{round}-{number}"), "disk"])?.ok()?;
            }
            for thread in writers.into_iter().chain([trimmer]) {
                match thread.join() {
                    Ok(result) => result?,
                    Err(panic) => std::panic::resume_unwind(panic),
                }
            }
            Ok(())
        })?;
        let mut reader = NbdClient::open(&socket(&cluster, 2), "disk", Style::Structured, &[])?;
        for object in 0..OBJECTS {
            for (earlier, index) in (0..=round).flat_map(|earlier| [(earlier, 0), (earlier, 1)]) {
                let at = object * OBJECT_BYTES + u64::from(earlier) * 65536 + u64::from(index) * 4096;
                let seen = reader.read(at, 4096)?;
                ensure!(
                    seen == [1 + earlier * 2 + index; 4096],
                    "round {round}: object {object} lost a write of {earlier}/{index}"
                );
            }
        }
    }
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

#[test]
fn an_old_connection_does_no_harm() -> Result<()> {
    let cluster = three_with_disk("6M")?;
    let mut old = NbdClient::open(&socket(&cluster, 0), "disk", Style::Structured, &[])?;
    old.write(4 << 20, &[1; 4096], 0)?;
    cluster.dog(&["vdi", "resize", "disk", "8M"])?.ok()?;
    let mut new = NbdClient::open(&socket(&cluster, 1), "disk", Style::Structured, &[])?;
    new.write(7 << 20, &[2; 4096], 1)?;
    // All that the old connection knows of the last object.
    old.must(nbd::TRIM, 0, 4 << 20, 2 << 20, &[])?;
    ensure!(new.read(4 << 20, 4096)? == [0; 4096] && new.read(7 << 20, 4096)? == [2; 4096]);
    // Another volume of the same name is not its business.
    cluster.dog(&["vdi", "delete", "disk"])?.ok()?;
    cluster.dog(&["vdi", "create", "disk", "8M"])?.ok()?;
    ensure!(old.call(nbd::WRITE, 0, 0, 4096, &[3; 4096])?.error == 5, "wrote to a volume that it never opened");
    ensure!(NbdClient::open(&socket(&cluster, 0), "disk", Style::Structured, &[])?.read(0, 4096)? == [0; 4096]);
    cluster.finish()
}

/// What still waits of a client that is gone must not come on top of what it wrote through another connection.
#[test]
fn what_waits_for_its_turn_goes_with_its_connection() -> Result<()> {
    const BLOCKS: u64 = 12;
    let cluster = three_with_disk("4M")?;
    let mut first = NbdClient::open(&socket(&cluster, 0), "disk", Style::Structured, &[])?;
    for block in 0..BLOCKS {
        first.write(block * 4096, &[1; 4096], 1)?;
    }
    // Some wait for three seconds.
    cluster.dog(&["vdi", "qos", "disk", "--iops", "4"])?.ok()?;
    for block in 0..BLOCKS {
        first.send(nbd::WRITE, 1, block * 4096, 4096, &[2; 4096])?;
    }
    std::thread::sleep(Duration::from_millis(300));
    drop(first);
    cluster.dog(&["vdi", "qos", "disk", "--iops", "0"])?.ok()?;
    let mut second = NbdClient::open(&socket(&cluster, 1), "disk", Style::Structured, &[])?;
    for block in 0..BLOCKS {
        second.write(block * 4096, &[3; 4096], 1)?;
    }
    std::thread::sleep(Duration::from_secs(4));
    let whole = second.read(0, BLOCKS * 4096)?;
    ensure!(whole.iter().all(|byte| *byte == 3), "an old request was carried out late");
    cluster.finish()
}

/// Backup tools ask what changed since the snapshot of the last backup and copy only that.
#[test]
fn incremental_backups_reproduce_the_volume() -> Result<()> {
    const ROUNDS: usize = 20;
    const DISK_BYTES: u64 = 96 * MIB;
    let cluster = three_with_disk("96M")?;
    let mut random = Random::new(4);
    let mut backup = vec![0; DISK_BYTES as usize];
    let mut copied_bytes = 0;
    for round in 0..ROUNDS {
        let mut client = NbdClient::open(&socket(&cluster, round % 3), "disk", Style::Structured, &[])?;
        for _ in 0..6 {
            let mut bytes = vec![0; 1 + random.below(200_000) as usize];
            fill_random(&mut bytes, &mut random);
            let offset = random.below(DISK_BYTES - bytes.len() as u64);
            match random.below(4) {
                0 => drop(client.must(nbd::TRIM, 0, offset, bytes.len() as u64 * 40 % (DISK_BYTES - offset), &[])?),
                _ => client.write(offset, &bytes, 0)?,
            }
        }
        let tag = format!("backup-{round}");
        cluster.dog(&["vdi", "snapshot", "-s", &tag, "disk"])?.ok()?;
        // The new snapshot is pulled, by what changed since the one before.
        let since = (round > 0).then(|| format!("qemu:dirty-bitmap:since-backup-{}", round - 1));
        let contexts: Vec<&str> = since.iter().map(String::as_str).collect();
        let export = format!("disk@{tag}");
        let mut source = NbdClient::open(&socket(&cluster, (round + 1) % 3), &export, Style::Extended, &contexts)?;
        let extents = match &since {
            Some(context) => source.status(context, 0, DISK_BYTES)?,
            None => vec![(DISK_BYTES, 1)],
        };
        let mut offset = 0;
        for (length, state) in extents {
            let mut at = offset;
            offset += length;
            while state == 1 && at < offset {
                let piece = (offset - at).min(16 * MIB);
                backup[at as usize..(at + piece) as usize].copy_from_slice(&source.read(at, piece)?);
                copied_bytes += piece;
                at += piece;
            }
        }
        ensure!(offset == DISK_BYTES, "the extents cover {offset} bytes");
        ensure!(source.read_all()? == backup, "the backup of round {round} differs from the snapshot");
    }
    let all = ROUNDS as u64 * DISK_BYTES;
    eprintln!("{ROUNDS} incremental backups copied {} of {} MiB", copied_bytes / MIB, all / MIB);
    ensure!(copied_bytes < all / 2, "as much was copied as by full backups");
    cluster.finish()
}

/// QEMU waits for its server to come back and sends again what had no answer.
#[test]
fn qemu_does_not_notice_its_sheep_restarted() -> Result<()> {
    let mut cluster = three_with_disk("64M")?;
    let qemu = Qemu::installed()?;
    let options = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},file.export=disk,file.reconnect-delay=60",
        text(&socket(&cluster, 0))
    );
    let bench =
        ["bench", "-w", "-c", "30000", "-d", "16", "-s", "4096", "-S", "36864", "-t", "none", "--image-opts", &options];
    let mut running = qemu.start_img(&bench)?;
    let mut restarts = 0;
    while running.is_running()? && restarts < 3 {
        std::thread::sleep(Duration::from_millis(400));
        cluster.kill(0)?;
        cluster.restart(0)?;
        restarts += 1;
    }
    let ended = running.finish(DEADLINE)?.ok()?;
    ensure!(restarts > 0, "nothing was restarted");
    eprintln!("{restarts} restarts of the gateway under load: {}", ended.out().lines().last().unwrap_or_default());
    cluster.wait_recovered()?;
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

/// The command lines of users of QEMU's old driver, word for word, through `dog img` and today's tools.
#[test]
fn dog_img_stands_in_for_the_old_driver() -> Result<()> {
    let cluster = Cluster::three()?;
    let qemu = Qemu::installed()?;
    let port = cluster.node(0).port;
    let (plain, long) = (format!("sheepdog:127.0.0.1:{port}:disk"), format!("sheepdog://127.0.0.1:{port}/disk"));
    let unix = format!("sheepdog+unix:///disk?socket={}", text(&cluster.node(1).socket()));
    let dog = |arguments: &[&str]| cluster.dog(arguments)?.ok();
    let image = cluster.scratch().join("image");
    sparse_image(&image, 32 * MIB, 21)?;

    // Into a volume that does not exist yet, as the old driver made it.
    dog(&["img", "convert", "-f", "raw", text(&image), &plain])?;
    dog(&["img", "compare", "-f", "raw", "-F", "raw", text(&image), &unix])?;
    let info = dog(&["img", "info", &long])?.out();
    ensure!(info.contains("virtual size: 32 MiB") && info.contains("file format: raw"), "{info}");
    dog(&["img", "snapshot", "-c", "first", &plain])?;
    dog(&["io", "-f", "raw", "-c", "write -P 7 0 8M", "-c", "read -P 7 0 8M", &plain])?;
    let snapshots = dog(&["img", "snapshot", "-l", &unix])?.out();
    ensure!(snapshots.contains("first"), "{snapshots}");
    let frozen = format!("{long}#first");
    dog(&["img", "compare", "-f", "raw", "-F", "raw", text(&image), &frozen])?;
    dog(&["img", "create", "-b", &frozen, "-F", "raw", &format!("sheepdog:127.0.0.1:{port}:clone")])?;
    dog(&[
        "img",
        "compare",
        "--image-opts",
        &format!("driver=raw,file.driver=file,file.filename={}", text(&image)),
        &format!(
            "driver=raw,file.driver=sheepdog,file.server.type=inet,file.server.host=127.0.0.1,file.server.port={port},file.vdi=clone"
        ),
    ])?;
    dog(&["img", "resize", "-f", "raw", &plain, "+16M"])?;
    dog(&["img", "create", "-o", "redundancy=2,object_size=1M", &format!("sheepdog:127.0.0.1:{port}:two"), "20M"])?;
    let listed = dog(&["vdi", "list", "-r", "two"])?.out();
    let row: Vec<&str> = listed.split(' ').collect();
    ensure!(row.get(8) == Some(&"2") && row.get(10).is_some_and(|shift| shift.trim() == "20"), "{listed}");
    dog(&["img", "snapshot", "-a", "first", &plain])?;
    let out = cluster.scratch().join("out.qcow2");
    dog(&["img", "convert", "-O", "qcow2", &plain, text(&out)])?;
    qemu.img(&["compare", "-f", "raw", "-F", "qcow2", text(&image), text(&out)])?.ok()?;
    dog(&["img", "snapshot", "-d", "first", &plain])?;
    // Without such a URL nothing is different from the tool itself, exit codes included.
    let direct = qemu.img(&["info", "/does/not/exist"])?;
    let through = cluster.dog(&["img", "info", "/does/not/exist"])?;
    ensure!(direct.code() == through.code() && direct.err() == through.err(), "{direct}\n{through}");
    let missing = cluster.dog(&["img", "info", &format!("sheepdog:127.0.0.1:{port}:nothing")])?.refused()?;
    ensure!(missing.err().contains("nothing"), "{missing}");

    let attach = dog(&["vdi", "attach", "disk"])?.out();
    let nbd = socket(&cluster, 0);
    ensure!(attach.contains(text(&nbd)) && attach.contains("-blockdev") && attach.contains("<disk"), "{attach}");
    cluster.finish()
}

fn guest_tools(what: &str) -> Option<(PathBuf, GuestParts)> {
    let Some(program) = find_program("qemu-system-x86_64") else {
        skipped(what, "no qemu-system-x86_64: install the package qemu-system-x86");
        return None;
    };
    let Some(parts) = GuestParts::find() else {
        skipped(what, "no kernel and busybox for a guest (GUEST_DIR names their directory)");
        return None;
    };
    Some((program, parts))
}

fn guest_drive(socket: &Path) -> String {
    let server = format!("server.type=unix,server.path={},export=disk,reconnect-delay=30", text(socket));
    format!("driver=nbd,{server},if=virtio,cache=none,id=d")
}

#[test]
fn a_guest_boots_partitions_writes_and_reboots() -> Result<()> {
    let Some((program, parts)) = guest_tools("a guest on a volume over NBD") else { return Ok(()) };
    let mut cluster = three_with_disk("64M")?;
    let drive = guest_drive(&socket(&cluster, 0));
    let mut guest = BootedGuest::boot(&program, &parts, cluster.scratch(), &["-drive", &drive])?;
    guest.run("printf 'n\\np\\n1\\n\\n\\nw\\n' | fdisk /dev/vda >/dev/null 2>&1; mdev -s; ls /dev/vda1")?;
    guest.run("mke2fs /dev/vda1 >/dev/null && mount -t ext4 /dev/vda1 /mnt && mkdir /mnt/d")?;
    guest.run("for i in $(seq 200); do dd if=/dev/urandom of=/mnt/d/$i bs=16k count=1 2>/dev/null; done; sync")?;
    let sums = guest.run("cat /mnt/d/* | md5sum")?;
    cluster.kill(1)?;
    guest.run("for i in $(seq 50); do dd if=/dev/zero of=/mnt/z$i bs=64k count=1 2>/dev/null; done; sync")?;
    guest.run("umount /mnt")?;
    guest.quit()?;
    cluster.restart(1)?;
    let drive = guest_drive(&socket(&cluster, 2));
    let mut guest = BootedGuest::boot(&program, &parts, cluster.scratch(), &["-drive", &drive])?;
    guest.run("mount -t ext4 /dev/vda1 /mnt")?;
    ensure!(guest.run("cat /mnt/d/* | md5sum")? == sums, "the files changed over a reboot through another node");
    guest.run("umount /mnt")?;
    guest.quit()?;
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

/// The guest goes on writing while it moves from a QEMU on one sheep to a QEMU on another.
#[test]
fn a_guest_migrates_between_two_sheep_while_it_writes() -> Result<()> {
    let Some((program, parts)) = guest_tools("live migration") else { return Ok(()) };
    let cluster = three_with_disk("64M")?;
    let directory = |name: &str| -> Result<PathBuf> {
        let directory = cluster.scratch().join(name);
        std::fs::create_dir(&directory)?;
        Ok(directory)
    };
    let (from, to) = (directory("from")?, directory("to")?);
    let drive = guest_drive(&socket(&cluster, 0));
    let mut source = BootedGuest::boot(&program, &parts, &from, &["-drive", &drive])?;
    source.run("mke2fs /dev/vda >/dev/null && mount -t ext4 /dev/vda /mnt")?;
    source
        .run("(i=0; while [ ! -e /stop ]; do i=$((i+1)); echo $i >> /mnt/log; sync; done; echo $i > /last) & true")?;
    let moving = cluster.scratch().join("migration.sock");
    let incoming = format!("unix:{}", text(&moving));
    let drive = guest_drive(&socket(&cluster, 1));
    let mut target = BootedGuest::resume(&program, &parts, &to, &["-drive", &drive, "-incoming", &incoming])?;
    let begun = Instant::now();
    source.monitor_quietly(&format!("migrate -d {incoming}"))?;
    let status = loop {
        let status = source.monitor("info migrate")?;
        ensure!(!status.contains("failed") && begun.elapsed() < DEADLINE, "{status}");
        if status.contains("Migration status: completed") {
            break status;
        }
        std::thread::sleep(Duration::from_millis(50));
    };
    let figures = status.lines().filter(|line| line.contains("time:")).map(str::trim).collect::<Vec<_>>();
    eprintln!("migrated while writing: {}", figures.join(", "));
    target.run("sleep 1; touch /stop; while [ ! -e /last ]; do sleep 0.1; done; sync")?;
    let last: u64 = target.run("cat /last")?.parse()?;
    ensure!(last > 20, "hardly anything was written: {last}");
    source.quit()?;
    target.run("umount /mnt && echo 3 > /proc/sys/vm/drop_caches && mount -t ext4 /dev/vda /mnt")?;
    ensure!(target.run("seq $(cat /last) | cmp - /mnt/log && wc -l < /mnt/log")?.trim() == last.to_string());
    target.run("umount /mnt")?;
    target.quit()?;
    cluster.dog(&["vdi", "check", "disk"])?.ok()?;
    cluster.finish()
}

#[test]
fn garbage_ends_its_own_connection_only() -> Result<()> {
    let cluster = three_with_disk("16M")?;
    let mut bystander = NbdClient::open(&socket(&cluster, 0), "disk", Style::Extended, &[])?;
    bystander.write(0, &[3; 4096], 0)?;
    let resident_before = resident_kib(&cluster)?;
    let seconds = std::env::var("GARBAGE_SECONDS").ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    let until = Instant::now() + Duration::from_secs(seconds);
    let mut random = Random::new(99);
    let mut conversations = 0_u64;
    while conversations < 400 || Instant::now() < until {
        let round = conversations;
        conversations += 1;
        let mut stream = NbdClient::greet(&socket(&cluster, 0))?;
        let mut bytes = Vec::new();
        match round % 4 {
            0 => bytes.resize(1 + random.below(4000) as usize, 0),
            1 => {
                // An option with a length of its own choice.
                bytes.extend_from_slice(b"IHAVEOPT");
                bytes.extend_from_slice(&(random.below(14) as u32).to_be_bytes());
                bytes.extend_from_slice(&(random.bits() as u32).to_be_bytes());
                bytes.resize(bytes.len() + random.below(2000) as usize, 0x55);
            }
            2 => {
                // A well-formed header around a body of noise.
                let length = random.below(300) as u32;
                bytes.extend_from_slice(b"IHAVEOPT");
                bytes.extend_from_slice(&[0, 0, 0, [3, 6, 7, 9, 10][random.below(5) as usize]]);
                bytes.extend_from_slice(&length.to_be_bytes());
                let mut body = vec![0; length as usize];
                fill_random(&mut body, &mut random);
                bytes.extend_from_slice(&body);
            }
            _ => {
                // Straight to the export, then noise for requests.
                bytes.extend_from_slice(b"IHAVEOPT\0\0\0\x01\0\0\0\x04disk");
                let mut noise = vec![0; random.below(3000) as usize];
                fill_random(&mut noise, &mut random);
                if random.one_in(2) {
                    bytes.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
                }
                bytes.extend_from_slice(&noise);
            }
        }
        if round.is_multiple_of(4) {
            fill_random(&mut bytes, &mut random);
        }
        // The server may have hung up in the middle, as it should.
        let _ = stream.write_all(&bytes);
    }
    ensure!(bystander.read(0, 4096)? == [3; 4096], "another client was harmed");
    let grown = resident_kib(&cluster)?.saturating_sub(resident_before);
    eprintln!("{conversations} malformed conversations: {grown} KiB more resident");
    ensure!(grown < 32 << 10, "memory grew by {grown} KiB");
    ensure!(!cluster.node(0).log().contains("panicked"), "{}", cluster.node(0).log());
    cluster.finish()
}

fn resident_kib(cluster: &Cluster) -> Result<u64> {
    let pid = cluster.node(0).pid().context("node 0 runs")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find(|line| line.starts_with("VmRSS")).context("no VmRSS")?;
    Ok(line.split_whitespace().nth(1).context("no figure")?.parse()?)
}

#[test]
fn a_thousand_idle_connections_cost_little() -> Result<()> {
    const CONNECTIONS: usize = 1000;
    let cluster = three_with_disk("16M")?;
    let open = || NbdClient::open(&socket(&cluster, 0), "disk", Style::Structured, &[]);
    let mut first = open()?;
    first.write(0, &[1; 4096], 0)?;
    let before = resident_kib(&cluster)?;
    let mut idle: Vec<NbdClient> = (0..CONNECTIONS).map(|_| open()).collect::<Result<_>>()?;
    let grown = resident_kib(&cluster)?.saturating_sub(before);
    eprintln!("{CONNECTIONS} idle connections: {grown} KiB more resident");
    ensure!(grown < 32 << 10, "{grown} KiB");
    for client in idle.iter_mut().step_by(100) {
        ensure!(client.read(0, 4096)? == [1; 4096]);
    }
    cluster.finish()
}

/// A CA with a certificate for `localhost` (`server-*.pem`) and one for a client, as QEMU's and libnbd's tools expect them.
fn certificates(directory: &Path) -> Result<()> {
    std::fs::create_dir(directory)?;
    let openssl = |arguments: &str| {
        let words = arguments.split_whitespace().collect::<Vec<_>>();
        command::run(Command::new("openssl").args(words).current_dir(directory), DEADLINE)?.ok().map(drop)
    };
    openssl("req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=ca -keyout ca-key.pem -out ca-cert.pem")?;
    for (who, extension) in [("server", "subjectAltName=DNS:localhost"), ("client", "extendedKeyUsage=clientAuth")] {
        openssl(&format!("req -newkey rsa:2048 -nodes -subj /CN={who} -keyout {who}-key.pem -out {who}.csr"))?;
        std::fs::write(directory.join("extension"), extension)?;
        openssl(&format!(
            "x509 -req -days 2 -in {who}.csr -CA ca-cert.pem -CAkey ca-key.pem -CAcreateserial -out {who}-cert.pem \
             -extfile extension"
        ))?;
    }
    Ok(())
}

#[test]
fn tls_lets_in_whom_the_authority_signed() -> Result<()> {
    for program in ["openssl", "nbdinfo"] {
        if find_program(program).is_none() {
            skipped("TLS", "install the packages openssl and libnbd-bin");
            return Ok(());
        }
    }
    let scratch = tempfile::tempdir()?;
    let (ours, theirs) = (scratch.path().join("ours"), scratch.path().join("theirs"));
    certificates(&ours)?;
    certificates(&theirs)?;
    let port = free_port()?;
    let nbd = ["--nbd".to_owned(), port.to_string(), "--nbd-tls".to_owned(), text(&ours).to_owned()];
    let nbd: Vec<&str> = nbd.iter().map(String::as_str).collect();
    let cluster = ClusterPlan::new(1).arguments(0, &nbd).start_formatted(1)?;
    cluster.dog(&["vdi", "create", "disk", "16M"])?.ok()?;

    let with = |directory: &Path| format!("nbds://localhost:{port}/disk?tls-certificates={}", text(directory));
    let info = tool("nbdinfo", &[&with(&ours)])?.out();
    ensure!(info.contains("with TLS") && info.contains("export-size: 16777216"), "{info}");
    let qemu = Qemu::installed()?;
    let creds = format!("tls-creds-x509,id=t,endpoint=client,dir={},verify-peer=on", text(&ours));
    let target = format!(
        "driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=localhost,file.server.port={port},\
         file.export=disk,file.tls-creds=t"
    );
    let written = Command::new(find_program("qemu-io").context("no qemu-io")?)
        .args(["--object", &creds, "--image-opts", &target, "-c", "write -P 6 0 1M", "-c", "read -P 6 0 1M"])
        .output()?;
    ensure!(written.status.success(), "{}", String::from_utf8_lossy(&written.stderr));
    // The unix socket is protected by its directory, and sees the same disk.
    qemu.expect_pattern(&url(&cluster, 0, "disk"), 6, 0, MIB)?;

    // Without TLS, without a certificate, with somebody else's.
    let plain = command::run(Command::new("nbdinfo").arg(format!("nbd://localhost:{port}/disk")), DEADLINE)?;
    plain.refused()?;
    let nobody = scratch.path().join("nobody");
    std::fs::create_dir(&nobody)?;
    std::fs::copy(ours.join("ca-cert.pem"), nobody.join("ca-cert.pem"))?;
    let foreign = scratch.path().join("foreign");
    std::fs::create_dir(&foreign)?;
    std::fs::copy(ours.join("ca-cert.pem"), foreign.join("ca-cert.pem"))?;
    for file in ["client-cert.pem", "client-key.pem"] {
        std::fs::copy(theirs.join(file), foreign.join(file))?;
    }
    for stranger in [&nobody, &foreign, &theirs] {
        command::run(Command::new("nbdinfo").arg(with(stranger)), DEADLINE)?.refused()?;
    }
    ensure!(!cluster.node(0).log().contains("PRIVATE"), "a key is in the log");
    cluster.finish()
}

#[test]
fn unusable_certificates_are_a_clear_refusal() -> Result<()> {
    let scratch = tempfile::tempdir()?;
    let start = || {
        let started = ClusterPlan::new(1).arguments(0, &["--nbd-tls", text(scratch.path())]).start();
        Ok::<String, anyhow::Error>(format!("{:#}", started.err().context("it started")?))
    };
    ensure!(start()?.contains("ca-cert.pem"));
    for file in ["ca-cert.pem", "server-cert.pem", "server-key.pem"] {
        std::fs::write(scratch.path().join(file), "-----BEGIN NOTHING-----")?;
    }
    ensure!(start()?.contains("ca-cert.pem: "));
    Ok(())
}

#[test]
fn a_port_in_use_is_a_clear_refusal() -> Result<()> {
    let taken = std::net::TcpListener::bind("127.0.0.1:0")?;
    let port = taken.local_addr()?.port().to_string();
    let refused = ClusterPlan::new(1).arguments(0, &["--nbd", &port]).start();
    let error = refused.err().context("a port that is taken was no obstacle")?;
    ensure!(format!("{error:#}").contains("cannot serve NBD on 127.0.0.1"), "{error:#}");
    Ok(())
}
