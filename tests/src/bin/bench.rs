//! Measures the data path beside a raw file behind `qemu-nbd`, in one run, and prints the ratio.
//!
//! `cargo run --release -p tests --bin bench -- [--nbd] [--json FILE] [--quick] [PATTERN...]` starts three sheep on loopback with a
//! volume in three copies, and `qemu-nbd --cache=none --aio=io_uring` on a raw file in the same directory, and puts the same
//! load on both in turn: one connection, so many requests under way, offsets that follow from a seed. Both volumes are
//! written in full before anything is measured. Durable means: the native client asks for write-through; the NBD client sets
//! FUA. CPU is that of all server processes together, user and system, per operation.
//!
//! The figures hold for this machine and this moment; only the ratios mean something elsewhere.

use std::collections::VecDeque;
use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use clap::Parser;
use qemu_proto::oid::{Oid, VdiId};
use tests::clients::{Client, Request, flag, opcode, result};
use tests::spawn::{Cluster, ClusterPlan};

const OBJECT_BYTES: u64 = 4 << 20;
const MAP_OFFSET: u64 = 4664;
const SEED: u64 = 0x5eed;

#[derive(Parser)]
#[command(about = "Measures a cluster on this machine beside qemu-nbd on a raw file")]
struct Arguments {
    /// Write the figures to this file as well, as JSON.
    #[arg(long)]
    json: Option<std::path::PathBuf>,
    /// A quarter of the operations.
    #[arg(long)]
    quick: bool,
    /// Reach our volume by NBD as well, with the same client as the reference, instead of the native protocol.
    #[arg(long)]
    nbd: bool,
    /// Volume size, MiB.
    #[arg(long, default_value_t = 1024)]
    size_mib: u64,
    /// Only patterns whose name contains one of these.
    patterns: Vec<String>,
}

/// One load.
struct Pattern {
    name: &'static str,
    write: bool,
    /// Durable when answered; otherwise flushed every 64 operations.
    durable: bool,
    sequential: bool,
    bytes: u32,
    depth: usize,
    operations: u64,
}

const PATTERNS: &[Pattern] = &[
    Pattern {
        name: "write 4k durable d1",
        write: true,
        durable: true,
        sequential: false,
        bytes: 4096,
        depth: 1,
        operations: 8000,
    },
    Pattern {
        name: "write 4k durable d8",
        write: true,
        durable: true,
        sequential: false,
        bytes: 4096,
        depth: 8,
        operations: 30_000,
    },
    Pattern {
        name: "write 4k durable d32",
        write: true,
        durable: true,
        sequential: false,
        bytes: 4096,
        depth: 32,
        operations: 60_000,
    },
    Pattern {
        name: "write 4k flush64 d32",
        write: true,
        durable: false,
        sequential: false,
        bytes: 4096,
        depth: 32,
        operations: 60_000,
    },
    Pattern {
        name: "read 4k d1",
        write: false,
        durable: false,
        sequential: false,
        bytes: 4096,
        depth: 1,
        operations: 40_000,
    },
    Pattern {
        name: "read 4k d32",
        write: false,
        durable: false,
        sequential: false,
        bytes: 4096,
        depth: 32,
        operations: 200_000,
    },
    Pattern {
        name: "write 1M durable d4",
        write: true,
        durable: true,
        sequential: true,
        bytes: 1 << 20,
        depth: 4,
        operations: 1000,
    },
    Pattern {
        name: "read 1M d4",
        write: false,
        durable: false,
        sequential: true,
        bytes: 1 << 20,
        depth: 4,
        operations: 2000,
    },
];

/// What a load gave.
struct Figures {
    per_second: f64,
    latency_us: [f64; 3],
    cpu_us: f64,
}

/// Something that takes block requests, pipelined over one connection.
trait Device {
    fn send(&mut self, pattern: &Pattern, offset: u64, payload: &[u8]) -> Result<()>;
    fn send_flush(&mut self) -> Result<()>;
    /// Takes any one answer.
    fn receive(&mut self, pattern: &Pattern) -> Result<()>;
}

struct Native {
    client: Client,
    vdi: VdiId,
    next: u32,
}

impl Device for Native {
    fn send(&mut self, pattern: &Pattern, offset: u64, payload: &[u8]) -> Result<()> {
        let oid = Oid::data(self.vdi, (offset / OBJECT_BYTES) as u32);
        let within = offset % OBJECT_BYTES;
        self.next += 1;
        let durability = if pattern.durable { flag::DIRECT } else { flag::CACHE };
        if pattern.write {
            let request = Request::object(opcode::WRITE, oid, within).flags(flag::WRITE | durability).id(self.next);
            self.client.send(request.length(payload.len() as u32), payload)?;
        } else {
            let request = Request::object(opcode::READ, oid, within).flags(flag::CACHE).id(self.next);
            self.client.send(request.length(pattern.bytes), &[])?;
        }
        Ok(())
    }

    fn send_flush(&mut self) -> Result<()> {
        self.next += 1;
        let request = Request::object(opcode::FLUSH_VDI, Oid::inode(self.vdi), 0).flags(flag::CACHE).id(self.next);
        Ok(self.client.send(request, &[])?)
    }

    fn receive(&mut self, _: &Pattern) -> Result<()> {
        let answer = self.client.receive()?;
        ensure!(answer.result() == result::SUCCESS, "a request failed: {:#x}", answer.result());
        Ok(())
    }
}

/// The NBD protocol, as far as a benchmark needs it: fixed newstyle, EXPORT_NAME, simple replies (the NBD project's
/// proto.md).
struct Nbd {
    stream: UnixStream,
    buffer: Vec<u8>,
    next: u64,
    /// Bytes of the answers under way, by handle.
    under_way: VecDeque<(u64, usize)>,
}

const NBD_FUA: u16 = 1;

impl Nbd {
    fn connect(socket: &Path, export: &str) -> Result<Nbd> {
        let mut stream = UnixStream::connect(socket)?;
        let mut greeting = [0; 18];
        stream.read_exact(&mut greeting)?;
        ensure!(&greeting[..16] == b"NBDMAGICIHAVEOPT", "not an NBD server");
        // client flags: fixed newstyle, no zeroes
        stream.write_all(&3_u32.to_be_bytes())?;
        stream.write_all(b"IHAVEOPT")?;
        stream.write_all(&1_u32.to_be_bytes())?;
        stream.write_all(&(export.len() as u32).to_be_bytes())?;
        stream.write_all(export.as_bytes())?;
        let mut answer = [0; 10];
        stream.read_exact(&mut answer)?;
        Ok(Nbd { stream, buffer: vec![0; 2 << 20], next: 0, under_way: VecDeque::new() })
    }

    fn request(
        &mut self,
        kind: u16,
        flags: u16,
        offset: u64,
        length: u32,
        payload: &[u8],
        answer: usize,
    ) -> Result<()> {
        self.next += 1;
        let mut message = Vec::with_capacity(28 + payload.len());
        message.extend_from_slice(&0x2560_9513_u32.to_be_bytes());
        message.extend_from_slice(&flags.to_be_bytes());
        message.extend_from_slice(&kind.to_be_bytes());
        message.extend_from_slice(&self.next.to_be_bytes());
        message.extend_from_slice(&offset.to_be_bytes());
        message.extend_from_slice(&length.to_be_bytes());
        message.extend_from_slice(payload);
        self.stream.write_all(&message)?;
        self.under_way.push_back((self.next, answer));
        Ok(())
    }
}

impl Device for Nbd {
    fn send(&mut self, pattern: &Pattern, offset: u64, payload: &[u8]) -> Result<()> {
        if pattern.write {
            let flags = if pattern.durable { NBD_FUA } else { 0 };
            self.request(1, flags, offset, payload.len() as u32, payload, 0)
        } else {
            self.request(0, 0, offset, pattern.bytes, &[], pattern.bytes as usize)
        }
    }

    fn send_flush(&mut self) -> Result<()> {
        self.request(3, 0, 0, 0, &[], 0)
    }

    fn receive(&mut self, _: &Pattern) -> Result<()> {
        let mut header = [0; 16];
        self.stream.read_exact(&mut header)?;
        let error = u32::from_be_bytes([header[4], header[5], header[6], header[7]]);
        ensure!(error == 0, "the NBD server answered error {error}");
        let mut handle = [0; 8];
        handle.copy_from_slice(&header[8..]);
        let handle = u64::from_be_bytes(handle);
        let place = self.under_way.iter().position(|(other, _)| *other == handle).context("an unknown handle")?;
        let (_, length) = self.under_way.remove(place).context("it was just there")?;
        self.stream.read_exact(&mut self.buffer[..length])?;
        Ok(())
    }
}

/// Runs one load and measures it.
fn run(device: &mut dyn Device, pattern: &Pattern, size_bytes: u64, operations: u64, pids: &[u32]) -> Result<Figures> {
    let mut random = Random(SEED);
    let payload: Vec<u8> = (0..pattern.bytes).map(|index| (index as u8) ^ (random.next() as u8)).collect();
    let places = size_bytes / u64::from(pattern.bytes);
    let mut started: VecDeque<Instant> = VecDeque::new();
    let mut latencies = Vec::with_capacity(operations as usize);
    let cpu_before = cpu_seconds(pids)?;
    let begin = Instant::now();
    let mut sent = 0;
    let mut done = 0;
    while done < operations {
        while sent < operations && started.len() < pattern.depth {
            let place = if pattern.sequential { sent % places } else { random.next() % places };
            device.send(pattern, place * u64::from(pattern.bytes), if pattern.write { &payload } else { &[] })?;
            started.push_back(Instant::now());
            sent += 1;
        }
        device.receive(pattern)?;
        // Answers may overtake each other; at equal sizes the oldest start is close enough for percentiles.
        let start = started.pop_front().context("an answer nobody waits for")?;
        latencies.push(start.elapsed());
        done += 1;
        if pattern.write && !pattern.durable && done % 64 == 0 {
            while let Some(start) = started.pop_front() {
                device.receive(pattern)?;
                latencies.push(start.elapsed());
                done += 1;
            }
            device.send_flush()?;
            device.receive(pattern)?;
        }
    }
    let elapsed = begin.elapsed();
    let cpu = cpu_seconds(pids)? - cpu_before;
    latencies.sort();
    let at = |share: f64| latencies[((latencies.len() - 1) as f64 * share) as usize].as_secs_f64() * 1e6;
    Ok(Figures {
        per_second: done as f64 / elapsed.as_secs_f64(),
        latency_us: [at(0.5), at(0.99), at(0.999)],
        cpu_us: cpu * 1e6 / done as f64,
    })
}

/// xorshift64*: offsets only have to be spread and the same for both.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_F491_4F6C_DD1D)
    }
}

/// User and system time of processes, from /proc/PID/stat (proc(5): fields 14 and 15, in ticks of 10 ms).
fn cpu_seconds(pids: &[u32]) -> Result<f64> {
    let mut ticks = 0;
    for pid in pids {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let after_name = stat.rsplit(") ").next().context("no name in /proc/PID/stat")?;
        let fields: Vec<&str> = after_name.split(' ').collect();
        ticks += fields[11].parse::<u64>()? + fields[12].parse::<u64>()?;
    }
    Ok(ticks as f64 / 100.0)
}

fn resident_mib(pids: &[u32]) -> Result<u64> {
    let mut kib = 0;
    for pid in pids {
        let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).context("no VmRSS")?;
        kib += line.split_whitespace().nth(1).context("no figure")?.parse::<u64>()?;
    }
    Ok(kib / 1024)
}

/// Makes a volume and writes all of it, map included.
fn prepare_volume(cluster: &Cluster, size_bytes: u64) -> Result<Native> {
    let mut client = cluster.client(0)?;
    let vdi = client.create_volume("bench", size_bytes, 3, 22)?;
    let payload: Vec<u8> = (0..OBJECT_BYTES as usize).map(|index| (index / 7) as u8).collect();
    for index in 0..(size_bytes / OBJECT_BYTES) as u32 {
        let create =
            Request::object(opcode::CREATE_AND_WRITE, Oid::data(vdi, index), 0).flags(flag::WRITE | flag::CACHE);
        client.call(create.length(payload.len() as u32), &payload)?.success("create an object")?;
        let map = Request::object(opcode::WRITE, Oid::inode(vdi), MAP_OFFSET + 4 * u64::from(index));
        let map = map.flags(flag::WRITE | flag::CACHE).id(1).length(4);
        client.call(map, &vdi.get().to_le_bytes())?.success("write the map")?;
    }
    client.flush(vdi)?;
    Ok(Native { client, vdi, next: 0 })
}

/// qemu-nbd on a raw file, ended with this.
struct Reference {
    child: Child,
}

impl Drop for Reference {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn start_reference(directory: &Path, size_bytes: u64) -> Result<(Reference, Nbd)> {
    let image = directory.join("reference.raw");
    let socket = directory.join("reference.sock");
    let mut file = fs::File::create(&image)?;
    let block = vec![0x5a; OBJECT_BYTES as usize];
    for _ in 0..size_bytes / OBJECT_BYTES {
        file.write_all(&block)?;
    }
    file.sync_all()?;
    let start = |aio: &str| {
        Command::new("qemu-nbd")
            .args(["--cache=none", "-f", "raw", "--persistent", "-k"])
            .arg(&socket)
            .arg(format!("--aio={aio}"))
            .arg(&image)
            .spawn()
            .context("qemu-nbd is not installed (package qemu-utils)")
    };
    for aio in ["io_uring", "native"] {
        let reference = Reference { child: start(aio)? };
        for _ in 0..100 {
            std::thread::sleep(Duration::from_millis(20));
            if let Ok(nbd) = Nbd::connect(&socket, "") {
                println!("reference: qemu-nbd --cache=none --aio={aio} on a raw file");
                return Ok((reference, nbd));
            }
        }
    }
    bail!("qemu-nbd does not serve");
}

fn main() -> Result<()> {
    let arguments = Arguments::parse();
    let size_bytes = arguments.size_mib << 20;
    ensure!(
        size_bytes >= OBJECT_BYTES && size_bytes.is_multiple_of(OBJECT_BYTES),
        "the size must be a multiple of 4 MiB"
    );
    let cluster = ClusterPlan::new(3).start_formatted(3)?;
    let pids: Vec<u32> = (0..3).filter_map(|index| cluster.node(index).pid()).collect();
    let mut native = prepare_volume(&cluster, size_bytes)?;
    let mut ours_by_nbd = Nbd::connect(&cluster.node(0).store.join("nbd.sock"), "bench")?;
    let (reference, mut nbd) = start_reference(cluster.scratch(), size_bytes)?;
    let reference_pids = [reference.child.id()];
    let protocol = if arguments.nbd { "NBD" } else { "the native protocol" };
    println!(
        "three sheep on loopback, one volume of {} MiB in three copies, one disk for all, through {protocol}",
        arguments.size_mib
    );
    println!(
        "{:<22} {:>10} {:>9} {:>9} {:>9} {:>8} | {:>10} {:>9} {:>8} | {:>6}",
        "pattern", "sheep/s", "p50 us", "p99 us", "p99.9", "cpu us", "nbd/s", "p50 us", "cpu us", "ratio"
    );
    let mut report = Vec::new();
    for pattern in PATTERNS {
        let chosen = |word: &String| pattern.name.contains(word.as_str());
        if !arguments.patterns.is_empty() && !arguments.patterns.iter().any(chosen) {
            continue;
        }
        let operations = if arguments.quick { pattern.operations / 4 } else { pattern.operations };
        let device: &mut dyn Device = if arguments.nbd { &mut ours_by_nbd } else { &mut native };
        let ours = run(device, pattern, size_bytes, operations, &pids)?;
        let theirs = run(&mut nbd, pattern, size_bytes, operations, &reference_pids)?;
        println!(
            "{:<22} {:>10.0} {:>9.0} {:>9.0} {:>9.0} {:>8.1} | {:>10.0} {:>9.0} {:>8.1} | {:>6.2}",
            pattern.name,
            ours.per_second,
            ours.latency_us[0],
            ours.latency_us[1],
            ours.latency_us[2],
            ours.cpu_us,
            theirs.per_second,
            theirs.latency_us[0],
            theirs.cpu_us,
            ours.per_second / theirs.per_second
        );
        report.push(serde_json::json!({
            "pattern": pattern.name, "bytes": pattern.bytes, "depth": pattern.depth,
            "sheep": { "per_second": ours.per_second, "latency_us": ours.latency_us, "cpu_us": ours.cpu_us },
            "qemu_nbd": { "per_second": theirs.per_second, "latency_us": theirs.latency_us, "cpu_us": theirs.cpu_us },
            "ratio": ours.per_second / theirs.per_second,
        }));
    }
    println!("memory of the three sheep: {} MiB", resident_mib(&pids)?);
    if let Some(path) = &arguments.json {
        fs::write(path, serde_json::to_string_pretty(&report)?)?;
    }
    cluster.finish()
}
