//! What bad input gets: the right result code or one clear line; other clients go on, nothing dies, nothing is lost
//! (P8; protocol, sections 9.7 and 10, points 1 to 8 and 26).
//!
//! Bytes are put together by hand here: the types of `qemu-proto` cannot express most of this.

use std::fs;
use std::io::Write;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use qemu_proto::oid::{Oid, VdiId};
use tests::clients::{Answer, Client, Request, Volume, flag, opcode, padded, result};
use tests::command::{self, Finished};
use tests::loop_fs::{FsKind, LoopFs};
use tests::sectors::fill_random;
use tests::sim::Random;
use tests::spawn::{Cluster, ClusterPlan, binary, free_port};

const MIB: u64 = 1 << 20;
const BITMAP_BYTES: u32 = 2 << 20;
const NODE_LIST_BYTES: u32 = 491_520;

/// A cluster with one volume `disk` whose first object is written, and a client that must not be disturbed.
struct Ground {
    cluster: Cluster,
    bystander: Client,
    vdi: VdiId,
}

impl Ground {
    fn new() -> Result<Ground> {
        let cluster = Cluster::three()?;
        cluster.dog(&["vdi", "create", "disk", "16M"])?.ok()?;
        cluster.dog_through(0, &["vdi", "write", "disk", "0", "65536"], &vec![0x5A; 65536])?.ok()?;
        let mut bystander = cluster.client(0)?;
        let vdi = bystander.look_up("disk", "", 0)?;
        Ok(Ground { cluster, bystander, vdi })
    }

    fn data(&self) -> Oid {
        Oid::data(self.vdi, 0)
    }

    /// The other client still gets its bytes, on the connection it had before.
    fn check_bystander(&mut self, after: &str) -> Result<()> {
        let data = self.data();
        let bytes = self.bystander.read_object(data, 0, 65536).with_context(|| format!("after {after}"))?;
        ensure!(bytes.iter().all(|&byte| byte == 0x5A), "wrong bytes after {after}");
        Ok(())
    }

    /// A request gets `expected` and the connection stays usable.
    fn expect(&mut self, what: &str, request: Request, payload: &[u8], expected: u32) -> Result<Answer> {
        let mut client = self.cluster.client(0)?;
        let answer = client.call(request.id(77), payload).with_context(|| what.to_owned())?;
        ensure!(answer.result() == expected, "{what}: expected {expected:#04x}, got {:#04x}", answer.result());
        client.node_count().with_context(|| format!("{what}: the connection is not usable any more"))?;
        self.check_bystander(what)?;
        Ok(answer)
    }

    /// A request is answered with an error or the connection is closed; both are right.
    fn expect_refusal(&mut self, what: &str, bytes: &[u8]) -> Result<()> {
        let mut client = self.cluster.client(0)?;
        client.set_deadline(Duration::from_secs(10))?;
        // The server may close before it has read everything.
        let _ = client.send_bytes(bytes);
        match client.receive() {
            Ok(answer) => ensure!(answer.result() != result::SUCCESS, "{what}: answered with success"),
            Err(error) => ensure!(
                !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut),
                "{what}: neither answered nor closed"
            ),
        }
        self.check_bystander(what)
    }

    fn finish(self) -> Result<()> {
        self.cluster.finish()
    }
}

#[test]
fn protocol_versions() -> Result<()> {
    let mut ground = Ground::new()?;
    let lookup = Request::new(opcode::GET_VDI_INFO);
    for version in [0, 1, 2] {
        ground.expect("versions 0 to 2", lookup.version(version), &padded(&["disk", ""]), result::SUCCESS)?;
    }
    for version in [3, 9, 10, 255] {
        let answer =
            ground.expect("a newer version", lookup.version(version), &padded(&["disk", ""]), result::VER_MISMATCH)?;
        ensure!(answer.data.is_empty(), "an error with data");
    }
    let nodes = Request::new(opcode::GET_NODE_LIST).length(NODE_LIST_BYTES);
    ground.expect("version 10 from 0x80 on", nodes, &[], result::SUCCESS)?;
    for version in [0, 1, 2, 9, 11] {
        ground.expect("another version from 0x80 on", nodes.version(version), &[], result::VER_MISMATCH)?;
    }
    ground.finish()
}

#[test]
fn opcodes_that_do_not_exist() -> Result<()> {
    let mut ground = Ground::new()?;
    for code in [0x00, 0x06, 0x10, 0x1F, 0x40, 0x7F, 0x91, 0x92, 0x93, 0xA7, 0xAD, 0xAE, 0xB6, 0xB7, 0xC3, 0xC4, 0xFF] {
        ground.expect(&format!("opcode {code:02x}"), Request::new(code), &[], result::INVALID_PARMS)?;
        let with_payload = ground.expect(&format!("opcode {code:02x} with data"), Request::new(code), &[1; 512], 5)?;
        ensure!(with_payload.opcode() == code && with_payload.id() == 77, "the header is echoed");
    }
    // What no client has any business with: removing objects, and what nodes tell each other.
    for code in [opcode::REMOVE, 0x94, 0x99, 0xA1, 0xA5, 0xA6, 0xAC, 0xC1, 0xC2, 0xC8] {
        let bytes = Request::object(code, ground.data(), 0).to_bytes();
        ground.expect_refusal(&format!("internal opcode {code:02x}"), &bytes)?;
    }
    ground.finish()
}

#[test]
fn names_and_lookups() -> Result<()> {
    let mut ground = Ground::new()?;
    ground.cluster.dog(&["vdi", "snapshot", "-s", "tagged", "disk"])?.ok()?;
    ground.cluster.dog(&["vdi", "create", "gone", "16M"])?.ok()?;
    ground.cluster.dog(&["vdi", "delete", "gone"])?.ok()?;
    let snapshot = ground.vdi;
    let lookup = |number: u32| Request::new(opcode::GET_VDI_INFO).with_u32(32, number);
    let working = ground.expect("name only", lookup(0), &padded(&["disk"]), result::SUCCESS)?.u32(24);
    ensure!(working != snapshot.get(), "the working volume has a new id after a snapshot");
    for (what, number, texts) in [
        ("by tag", 0, &["disk", "tagged"][..]),
        ("by number", 1, &["disk", ""]),
        ("by number without a tag field", 1, &["disk"]),
    ] {
        let answer = ground.expect(what, lookup(number), &padded(texts), result::SUCCESS)?;
        ensure!(answer.u32(24) == snapshot.get(), "{what}: {:x}", answer.u32(24));
        ensure!(answer.header[32] == 3 && answer.header[33] == 22, "{what}: copies and object size");
    }
    ground.expect("a wrong tag", lookup(0), &padded(&["disk", "nothing"]), result::NO_TAG)?;
    ground.expect("a wrong number", lookup(9), &padded(&["disk", ""]), result::NO_TAG)?;
    ground.expect("an unknown name", lookup(0), &padded(&["nothing", ""]), result::NO_VDI)?;
    ground.expect("an unknown name with a tag", lookup(0), &padded(&["nothing", "tagged"]), result::NO_VDI)?;
    ground.expect("a deleted name", lookup(0), &padded(&["gone"]), result::NO_VDI)?;
    for length in [1, 255, 257, 511, 513, 4096] {
        let mut payload = padded(&["disk", ""]);
        payload.resize(length, 0);
        ground.expect(&format!("a name of {length} bytes"), lookup(0), &payload, result::INVALID_PARMS)?;
        let create = Request::new(opcode::NEW_VDI).with_u64(16, MIB);
        ground.expect(&format!("creating {length} bytes"), create, &payload, result::INVALID_PARMS)?;
    }
    // Without end, empty, and none at all.
    let create = Request::new(opcode::NEW_VDI).with_u64(16, MIB);
    for code in [opcode::GET_VDI_INFO, opcode::LOCK_VDI, opcode::DEL_VDI] {
        let endless = ground.cluster.client(0)?.call(Request::new(code), &[b'n'; 512])?;
        ensure!([result::INVALID_PARMS, result::NO_VDI].contains(&endless.result()), "{:#04x}", endless.result());
        let none = ground.cluster.client(0)?.call(Request::new(code).flags(0), &[])?;
        ensure!(none.result() == result::INVALID_PARMS, "a lookup without a name: {:#04x}", none.result());
    }
    ground.expect("creating a name without end", create, &[b'n'; 256], result::INVALID_PARMS)?;
    ground.expect("creating an empty name", create, &padded(&[""]), result::INVALID_PARMS)?;
    ground.expect("creating without a name", create, &[], result::INVALID_PARMS)?;
    ground.expect("creating what exists", create, &padded(&["disk"]), result::VDI_EXIST)?;
    // 255 bytes are a name.
    let longest = "ä".repeat(127) + "x";
    ground.expect("the longest name", create, &padded(&[&longest]), result::SUCCESS)?;
    ground.expect("looking it up", lookup(0), &padded(&[&longest]), result::SUCCESS)?;
    ground.finish()
}

#[test]
fn ids_of_new_volumes_are_those_of_the_ancestor() -> Result<()> {
    let cluster = Cluster::three()?;
    let mut client = cluster.client(0)?;
    for (name, id) in [
        ("test", 0x7c_2b25),
        ("vm1", 0xc5_9887),
        ("alpha", 0xed_202b),
        ("Ubuntu-20.04", 0x71_24af),
        ("x", 0x02_1707),
        ("data_disk:1", 0xe1_6a86),
        ("日本", 0xd3_ce91),
        ("col34469", 0x4f_0e0b),
        ("col65874", 0x4f_0e0c),
    ] {
        let given = client.create_volume(name, 16 * MIB, 0, 22)?;
        ensure!(given.get() == id, "{name}: expected {id:06x}, got {given}");
    }
    // Deleted ids stay reserved, the colliding name is still found, and the first one moves on.
    cluster.dog(&["vdi", "delete", "col34469"])?.ok()?;
    ensure!(client.look_up("col65874", "", 0)?.get() == 0x4f_0e0c, "lost behind a deleted id");
    ensure!(client.create_volume("col34469", 16 * MIB, 0, 22)?.get() == 0x4f_0e0d, "an id was used again");
    let in_use = client.call(Request::new(opcode::READ_VDIS).length(BITMAP_BYTES), &[])?.success("bitmap")?;
    let deleted = client.call(Request::new(opcode::READ_DEL_VDIS).length(BITMAP_BYTES), &[])?.success("bitmap")?;
    let bit = |bitmap: &Answer, id: usize| bitmap.data[id / 8] >> (id % 8) & 1;
    ensure!(in_use.data.len() as u32 == BITMAP_BYTES && deleted.data.len() as u32 == BITMAP_BYTES, "whole bitmaps");
    for id in [0x7c_2b25, 0x4f_0e0b, 0x4f_0e0c, 0x4f_0e0d] {
        ensure!(bit(&in_use, id) == 1, "{id:x} is not marked");
    }
    ensure!(bit(&deleted, 0x4f_0e0b) == 1 && bit(&deleted, 0x4f_0e0c) == 0, "the deleted one, and only that");
    ensure!(in_use.data.iter().map(|byte| byte.count_ones()).sum::<u32>() == 10, "ten ids in all");
    for length in [0, 1, BITMAP_BYTES - 1, BITMAP_BYTES + 1] {
        let answer = client.call(Request::new(opcode::READ_VDIS).length(length), &[])?;
        ensure!(answer.result() == result::INVALID_PARMS, "a bitmap of {length} bytes: {:#04x}", answer.result());
    }
    cluster.finish()
}

#[test]
fn new_volumes_with_impossible_settings() -> Result<()> {
    let mut ground = Ground::new()?;
    let sized = |bytes: u64| Request::new(opcode::NEW_VDI).with_u64(16, bytes);
    for (what, request) in [
        ("200 copies", sized(MIB).with_u8(28, 200)),
        ("32 copies", sized(MIB).with_u8(28, 32)),
        ("objects of 2^40", sized(MIB).with_u8(31, 40)),
        ("objects of 2^19", sized(MIB).with_u8(31, 19)),
        ("objects of 2^32", sized(MIB).with_u8(31, 32)),
        ("more than 2^20 objects", sized((4 << 40) + 1).with_u8(31, 22)),
        ("more than anything", sized(u64::MAX)),
        ("a policy without parity", sized(MIB).with_u8(28, 3).with_u8(29, 0x10)),
        ("a volume with another map", sized(MIB).with_u8(30, 1)),
        ("an unknown map", sized(MIB).with_u8(30, 77)),
    ] {
        ground.expect(what, request, &padded(&["new"]), result::INVALID_PARMS)?;
    }
    // A base that does not exist, and one that is no snapshot.
    let clone = |base: u32| sized(MIB).with_u32(24, base);
    for base in [0x12_3456, 0xFFFF_FFFF, ground.vdi.get()] {
        let answer = ground.cluster.client(0)?.call(clone(base), &padded(&["new"]))?;
        ensure!(answer.result() != result::SUCCESS, "a clone of {base:x}");
        ensure!(answer.u32(24) == 0, "an id although it failed: {:x}", answer.u32(24));
        ground.check_bystander("a clone of nothing")?;
    }
    let lookup = Request::new(opcode::GET_VDI_INFO);
    ground.expect("nothing came of it", lookup, &padded(&["new"]), result::NO_VDI)?;
    ground.finish()
}

#[test]
fn object_requests_that_do_not_fit() -> Result<()> {
    let mut ground = Ground::new()?;
    let (data, inode) = (ground.data(), Oid::inode(ground.vdi));
    let absent = Oid::data(ground.vdi, 3);
    let foreign = Oid::data(VdiId::from_low_bits(0x12_3456), 0);
    let object_bytes = 4 * MIB;
    for (what, request, payload, expected) in [
        ("reading what is not there", Request::object(opcode::READ, absent, 0).length(512), 0, result::NO_OBJ),
        ("reading of no volume", Request::object(opcode::READ, foreign, 0).length(512), 0, result::NO_OBJ),
        ("writing what is not there", Request::object(opcode::WRITE, absent, 0), 512, result::NO_OBJ),
        ("reading past the end", Request::object(opcode::READ, data, object_bytes - 256).length(512), 0, 5),
        ("reading far past the end", Request::object(opcode::READ, data, u64::MAX - 100).length(512), 0, 5),
        ("writing past the end", Request::object(opcode::WRITE, data, object_bytes - 256), 512, 5),
        ("an offset of 64 bits", Request::object(opcode::WRITE, data, 1 << 32), 512, 5),
        ("creating past the end", Request::object(opcode::CREATE_AND_WRITE, absent, object_bytes), 512, 5),
        ("an inode past its end", Request::object(opcode::READ, inode, 12_587_576).length(512), 0, 5),
    ] {
        ground.expect(what, request, &vec![0x77; payload], expected)?;
    }
    for (what, raw) in [("no kind", 3 << 62), ("reserved bits", 1 << 57), ("every bit", u64::MAX), ("volume 0", 0)] {
        for code in [opcode::READ, opcode::WRITE, opcode::CREATE_AND_WRITE] {
            let payload = if code == opcode::READ { 0 } else { 512 };
            let mut client = ground.cluster.client(0)?;
            let request = Request::object(code, Oid::from_raw(raw), 0).length(512);
            let answer = client.call(request, &vec![0x77; payload])?;
            ensure!(answer.result() != result::SUCCESS, "{what}: opcode {code:02x} succeeded");
            ground.check_bystander(what)?;
        }
    }
    // The source of a copy-on-write is not there.
    let request = Request::object(opcode::CREATE_AND_WRITE, absent, 0).with_u64(24, Oid::data(ground.vdi, 2).raw());
    ground.expect("copy of nothing", request.flags(flag::COW), &[1; 512], result::NO_OBJ)?;
    // Nothing of nothing is legal.
    ground.expect("an empty read", Request::object(opcode::READ, data, 0), &[], result::SUCCESS)?;
    ground.expect(
        "an empty write",
        Request::object(opcode::WRITE, data, 0).flags(flag::WRITE),
        &[],
        result::SUCCESS,
    )?;
    ground.expect("an empty write to an inode", Request::object(opcode::WRITE, inode, 0).flags(flag::WRITE), &[], 0)?;
    ground.finish()
}

#[test]
fn lengths_that_lie() -> Result<()> {
    const LARGEST: u32 = 64 << 20;
    let mut ground = Ground::new()?;
    let data = ground.data();
    for length in [u32::MAX, 0x8000_0001, 0x4000_0000, LARGEST + 1] {
        let writing = Request::object(opcode::WRITE, data, 0).flags(flag::WRITE).length(length);
        ground.expect_refusal(&format!("a write of {length} bytes"), &writing.to_bytes())?;
        let reading = Request::object(opcode::READ, data, 0).length(length);
        ground.expect_refusal(&format!("a read of {length} bytes"), &reading.to_bytes())?;
        let naming = Request::new(opcode::GET_VDI_INFO).flags(flag::WRITE).length(length);
        ground.expect_refusal(&format!("a name of {length} bytes"), &naming.to_bytes())?;
        let unknown = Request::new(0x6F).flags(flag::WRITE).length(length);
        ground.expect_refusal(&format!("{length} bytes for no operation"), &unknown.to_bytes())?;
    }
    // The largest length that is believed: what it announces is waited for, and then it does not fit the object.
    let reading = Request::object(opcode::READ, data, 0).length(LARGEST);
    ground.expect("a read of many objects", reading, &[], result::INVALID_PARMS)?;
    let writing = Request::object(opcode::WRITE, data, 0).flags(flag::DIRECT);
    ground.expect("a write of many objects", writing, &vec![0x77; LARGEST as usize], result::INVALID_PARMS)?;
    // Buffers too small or too large for what dog asks.
    for code in [opcode::GET_NODE_LIST, opcode::CLUSTER_INFO, opcode::STAT_CLUSTER] {
        for length in [0, 1, 47, 80, 100, u32::MAX] {
            let mut client = ground.cluster.client(0)?;
            client.set_deadline(Duration::from_secs(10))?;
            client.send(Request::new(code).length(length), &[])?;
            if let Ok(answer) = client.receive() {
                let fits = answer.data.len() <= length as usize;
                ensure!(fits, "opcode {code:02x}: asked {length} bytes, got {}", answer.data.len());
            }
            ground.check_bystander("a buffer of another size")?;
        }
    }
    ground.finish()
}

#[test]
fn connections_cut_anywhere() -> Result<()> {
    let mut ground = Ground::new()?;
    let data = ground.data();
    let mut whole =
        Request::object(opcode::WRITE, data, 65536).flags(flag::WRITE | flag::DIRECT).length(65536).to_bytes().to_vec();
    whole.resize(whole.len() + 65536, 0x33);
    for length in [0, 1, 16, 47, 48, 49, 4096, whole.len() - 1] {
        let mut client = ground.cluster.client(0)?;
        client.send_bytes(&whole[..length])?;
        drop(client);
        ground.check_bystander(&format!("a connection cut after {length} bytes"))?;
    }
    // A write that never came whole must not have been begun.
    let bytes = ground.bystander.read_object(data, 65536, 65536)?;
    ensure!(bytes.iter().all(|&byte| byte == 0), "half a write was applied");
    // Requests whose answers nobody waits for.
    for _ in 0..50 {
        let mut client = ground.cluster.client(0)?;
        for id in 0..8 {
            client.send(Request::object(opcode::READ, data, 0).length(1 << 20).id(id), &[])?;
        }
    }
    ground.check_bystander("clients that left before their answers")?;
    ground.finish()
}

#[test]
fn garbage_on_the_port() -> Result<()> {
    let mut ground = Ground::new()?;
    let mut rng = Random::new(99);
    let texts: [&[u8]; 3] = [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", &[0xFF; 4096], &[0; 4096]];
    for text in texts {
        let mut client = ground.cluster.client(0)?;
        let _ = client.send_bytes(text);
        drop(client);
        ground.check_bystander("garbage")?;
    }
    for _ in 0..200 {
        let mut noise = vec![0; 48 + rng.below(2000) as usize];
        fill_random(&mut noise, &mut rng);
        let mut client = ground.cluster.client(0)?;
        let _ = client.send_bytes(&noise);
    }
    // Valid opcodes with everything else random: nearer to the handlers. Those that end a cluster are left out.
    let ending = [opcode::MAKE_FS, 0x85, 0x9A, 0x8A, 0xBF, 0xC0, 0xAF];
    for _ in 0..500 {
        let mut noise = [0; 48];
        fill_random(&mut noise, &mut rng);
        noise[1] = rng.below(256) as u8;
        if ending.contains(&noise[1]) || noise[1] == opcode::DEL_VDI {
            continue;
        }
        noise[0] = if noise[1] >= 0x80 { 0x0A } else { 2 };
        noise[12..16].copy_from_slice(&(rng.below(2048) as u32).to_le_bytes());
        let mut client = ground.cluster.client(0)?;
        let _ = client.send_bytes(&noise);
        let _ = client.send_bytes(&vec![0x41; 2048]);
    }
    ground.check_bystander("noise")?;
    ground.finish()
}

#[test]
fn a_slow_client_holds_nobody_up() -> Result<()> {
    let mut ground = Ground::new()?;
    let data = ground.data();
    let mut slow = TcpStream::connect(("127.0.0.1", ground.cluster.node(0).port))?;
    let header = Request::object(opcode::WRITE, data, 65536).flags(flag::WRITE).length(65536).to_bytes();
    slow.write_all(&header)?;
    // One that asks for far more than it takes in, and than the node has memory for.
    let mut greedy = ground.cluster.client(0)?;
    greedy.set_deadline(Duration::from_secs(2))?;
    for id in 0..10_000 {
        if greedy.send(Request::object(opcode::READ, data, 0).length(4 << 20).id(id), &[]).is_err() {
            break;
        }
    }
    for byte in [0x33; 60] {
        slow.write_all(&[byte])?;
        ground.check_bystander("a slow client")?;
        std::thread::sleep(Duration::from_millis(20));
    }
    let pid = ground.cluster.node(0).pid().context("node 0 runs")?;
    let status = std::fs::read_to_string(format!("/proc/{pid}/status"))?;
    let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    let peak_kib: u64 = peak.split_whitespace().next().context("no figure")?.parse()?;
    ensure!(peak_kib < 400 << 10, "{peak_kib} KiB for answers that nobody takes");
    ground.finish()
}

#[test]
fn sixty_four_reads_in_one_go() -> Result<()> {
    let ground = Ground::new()?;
    let mut content = vec![0; 4 << 20];
    fill_random(&mut content, &mut Random::new(3));
    ground.cluster.dog_through(1, &["vdi", "write", "disk", "0", "4194304"], &content)?.ok()?;
    for over_unix in [false, true] {
        let node = ground.cluster.node(0);
        let mut client = if over_unix { Client::unix(&node.socket())? } else { Client::tcp(node.port)? };
        let mut rng = Random::new(4);
        let mut wanted = Vec::new();
        for id in 0..64 {
            let length = (rng.below(128) + 1) * 512;
            let offset = rng.below((4 << 20) / 512 - 128) * 512;
            wanted.push((offset as usize, length as usize));
            let request = Request::object(opcode::READ, ground.data(), offset).length(length as u32);
            client.send(request.id(1000 + id), &[])?;
        }
        let mut open: Vec<bool> = vec![true; 64];
        for _ in 0..64 {
            let answer = client.receive()?.success("a pipelined read")?;
            let index = answer.id().checked_sub(1000).context("an id that was not asked")? as usize;
            ensure!(std::mem::replace(&mut open[index], false), "answered twice: {index}");
            let (offset, length) = wanted[index];
            ensure!(answer.data == content[offset..offset + length], "wrong bytes for read {index}");
            ensure!(answer.opcode() == opcode::READ, "the opcode is echoed");
        }
    }
    ground.finish()
}

#[test]
fn an_unformatted_cluster_says_so() -> Result<()> {
    let cluster = ClusterPlan::new(1).start()?;
    const WAIT_FOR_FORMAT: u32 = 0x16;
    let mut client = cluster.client(0)?;
    for (request, payload) in [
        (Request::new(opcode::GET_VDI_INFO), padded(&["disk", ""])),
        (Request::new(opcode::NEW_VDI).with_u64(16, MIB), padded(&["disk"])),
        (Request::object(opcode::READ, Oid::data(VdiId::from_low_bits(5), 0), 0).length(512), Vec::new()),
    ] {
        let answer = client.call(request, &payload)?;
        ensure!(answer.result() == WAIT_FOR_FORMAT, "opcode {:02x}: {:#04x}", request.opcode, answer.result());
    }
    // An object size of 0 would make QEMU refuse every volume.
    let default = client.call(Request::new(opcode::GET_CLUSTER_DEFAULT).version(1), &[])?.success("default")?;
    ensure!((20..=31).contains(&default.header[22]), "object size 2^{}", default.header[22]);
    let create = cluster.dog(&["vdi", "create", "disk", "16M"])?.exits(1)?.refused()?;
    ensure!(create.err().contains("Waiting for cluster to be formatted"), "{create}");
    cluster.finish()
}

/// Runs `sheep` to its end with further arguments; it must not come to serve.
fn sheep(arguments: &[&str]) -> Result<Finished> {
    command::run(Command::new(binary("sheep")?).args(arguments), Duration::from_mins(1))
}

/// A scratch directory with arguments that would make a node of its own.
struct Alone {
    directory: tempfile::TempDir,
    driver: String,
    port: String,
}

impl Alone {
    fn new() -> Result<Alone> {
        let directory = tempfile::Builder::new().prefix("sheep-alone-").tempdir()?;
        let driver = format!("local:{}", directory.path().join("local").display());
        fs::create_dir(directory.path().join("local"))?;
        Ok(Alone { directory, driver, port: free_port()?.to_string() })
    }

    fn run(&self, further: &[&str], store: &Path) -> Result<Finished> {
        let store = store.to_str().context("a plain path")?;
        let fixed = ["-b", "127.0.0.1", "-y", "127.0.0.1", "-p", &self.port, "-c", &self.driver, "-j", "size=64M"];
        sheep(&[&fixed[..], further, &[store]].concat())
    }
}

/// Exit code 1, one reason that contains `expected`, and no daemon left behind.
fn refuses(ended: Finished, expected: &str) -> Result<()> {
    let ended = ended.exits(1)?.refused()?;
    ensure!(ended.err().contains(expected), "the reason should contain {expected:?}: {ended}");
    Ok(())
}

#[test]
fn sheep_refuses_bad_options() -> Result<()> {
    let alone = Alone::new()?;
    let store = alone.directory.path().join("store");
    let bad = |option: &str, value: &str, expected: String| -> Result<()> {
        refuses(alone.run(&[option, value], &store)?, &expected).with_context(|| format!("{option} {value:?}"))
    };
    for value in ["42a", "-1", "", "-", "+", "0", "65536", "4294967297", "abc"] {
        bad("-p", value, format!("Invalid port number '{value}'"))?;
    }
    for value in ["-1", "4294967296", "x", ""] {
        bad("-z", value, format!("Invalid zone id '{value}': must be an integer between 0 and 4294967295"))?;
    }
    for value in ["no.such.host.invalid", "300.1.1.1"] {
        bad("-y", value, format!("Invalid address: '{value}'"))?;
    }
    for value in ["localhost", "300.1.1.1", "x"] {
        bad("-b", value, format!("Bad address '{value}'"))?;
    }
    bad("-c", "nothing", "Invalid cluster driver 'nothing'".to_owned())?;
    bad("-j", "size=1M", "invalid size 1M, must be at least 64(M)".to_owned())?;
    // The ancestor's way to start without its journal: ours is where acknowledged writes are.
    bad("-j", "skip", "invalid option skip".to_owned())?;
    bad("-l", "level=loud", "Invalid log level 'loud'".to_owned())?;
    bad("-l", "dst=printer", "invalid type of log destination: printer".to_owned())?;
    bad("-l", "dir=/no/such/directory", "No such file or directory".to_owned())?;
    refuses(alone.run(&["--no-such-option"], &store)?, "Try 'sheep --help' for more information.")?;
    refuses(alone.run(&["-q"], &store)?, "Try 'sheep --help' for more information.")?;
    ensure!(!store.exists(), "a refused start must not make a store");
    let version = sheep(&["-v"])?.ok()?;
    ensure!(version.out().starts_with("Sheepdog daemon version "), "{version}");
    let help = sheep(&["-h"])?.ok()?;
    ensure!(help.out().contains("  -p, --port") && help.err().is_empty(), "{help}");
    Ok(())
}

#[test]
fn sheep_refuses_a_place_it_cannot_use() -> Result<()> {
    let alone = Alone::new()?;
    let root = alone.directory.path();
    fs::write(root.join("file"), b"not a directory")?;
    refuses(alone.run(&[], &root.join("file"))?, "file")?;
    refuses(alone.run(&[], &root.join("no/such/parent"))?, "parent")?;
    // A store of the ancestor, and one whose own description is damaged.
    let foreign = root.join("foreign");
    fs::create_dir_all(foreign.join("obj"))?;
    fs::create_dir_all(foreign.join("epoch"))?;
    fs::write(foreign.join("config"), [7; 40])?;
    let before = listing(&foreign)?;
    refuses(alone.run(&[], &foreign)?, "foreign")?;
    ensure!(fs::read(foreign.join("config"))? == [7; 40], "the foreign store was changed");
    let lost: Vec<String> = before.into_iter().filter(|path| !foreign.join(path).exists()).collect();
    ensure!(lost.is_empty(), "gone from the foreign store: {lost:?}");
    Ok(())
}

fn listing(directory: &Path) -> Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.push(entry?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

#[test]
fn sheep_refuses_a_port_in_use() -> Result<()> {
    let mut alone = Alone::new()?;
    let holder = TcpListener::bind(("127.0.0.1", 0))?;
    alone.port = holder.local_addr()?.port().to_string();
    let ended = alone.run(&[], &alone.directory.path().join("store"))?;
    let port = alone.port.clone();
    refuses(ended, &port)?;
    let again = alone.run(&["-f"], &alone.directory.path().join("store"))?.exits(1)?;
    ensure!(again.err().contains("in use"), "{again}");
    Ok(())
}

#[test]
fn sheep_refuses_a_directory_that_another_uses() -> Result<()> {
    let cluster = ClusterPlan::new(1).start_formatted(1)?;
    let alone = Alone::new()?;
    for mode in [&[][..], &["-f"], &["-f", "-l", "dst=stdout"]] {
        let ended = alone.run(mode, &cluster.node(0).store)?;
        refuses(ended, "another sheep daemon is using")?;
    }
    cluster.dog(&["vdi", "create", "disk", "16M"])?.ok()?;
    cluster.finish()
}

#[test]
fn sheep_refuses_a_store_of_another_cluster() -> Result<()> {
    let one = ClusterPlan::new(1).start_formatted(1)?;
    let mut other = ClusterPlan::new(2).start_formatted(1)?;
    // Through the node that is going to move, so that it has heard of the format and is not merely a blank one.
    other.dog_through(1, &["vdi", "create", "disk", "16M"], &[])?.ok()?;
    other.kill(1)?;
    // The store of one cluster, started into the other.
    let alone = Alone { driver: one.driver_argument(), ..Alone::new()? };
    let ended = alone.run(&["-f", "-z", "9"], &other.node(1).store)?.exits(1)?.refused()?;
    ensure!(ended.err().contains("cluster"), "{ended}");
    ensure!(one.client(0)?.node_count()? == 1, "the stranger became a member");
    one.dog(&["vdi", "create", "disk", "16M"])?.ok()?;
    other.restart(1)?;
    other.wait_members(2)?;
    other.finish()?;
    one.finish()
}

#[test]
fn more_copies_than_zones_are_never_silent() -> Result<()> {
    let cluster = ClusterPlan::new(3).start()?;
    // Nobody answers the question: nothing may happen. Asking is the ancestor's way, refusing would be right as well.
    let ended = cluster.dog(&["cluster", "format", "-c", "4"])?;
    let said = ended.out() + &ended.err();
    ensure!(said.contains("[yes/no]") || ended.code() != Some(0), "neither asked nor refused: {ended}");
    ensure!(said.contains("zone") || said.contains("node"), "the reason is not named: {ended}");
    let info = cluster.dog(&["cluster", "info"])?.ok()?;
    ensure!(info.out().contains("Waiting for cluster to be formatted"), "formatted all the same: {info}");
    for value in ["0", "32", "x", "-1", "3:1"] {
        let ended = cluster.dog(&["cluster", "format", "-c", value])?.refused()?;
        ensure!(ended.err().contains(value), "{ended}");
    }
    cluster.dog(&["cluster", "format", "-c", "3"])?.ok()?;
    cluster.finish()
}

fn with_loop_fs(what: &str, test: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    if let Some(reason) = LoopFs::missing() {
        command::skipped(what, &reason);
        return Ok(());
    }
    let scratch = tempfile::Builder::new().prefix("sheep-disk-").tempdir()?;
    test(scratch.path())
}

#[test]
fn sheep_refuses_a_read_only_disk() -> Result<()> {
    with_loop_fs("a read-only disk", |scratch| {
        let mut disk = LoopFs::create(scratch, "disk", FsKind::Ext4, 300)?;
        let store = disk.path().join("store");
        fs::create_dir(&store)?;
        disk.remount("ro")?;
        let alone = Alone::new()?;
        refuses(alone.run(&["-f"], &store)?, "Read-only file system")?;
        refuses(alone.run(&[], &store)?, "Read-only file system")?;
        Ok(())
    })
}

#[test]
fn sheep_refuses_a_disk_without_room_for_its_journal() -> Result<()> {
    with_loop_fs("a disk that is too small", |scratch| {
        let disk = LoopFs::create(scratch, "disk", FsKind::Ext4, 40)?;
        let alone = Alone::new()?;
        let ended = alone.run(&[], &disk.path().join("store"))?.exits(1)?.refused()?;
        ensure!(ended.err().contains("space"), "{ended}");
        Ok(())
    })
}

#[test]
fn a_full_disk_ends_in_no_space_and_nothing_is_lost() -> Result<()> {
    with_loop_fs("a full disk", |scratch| {
        let disk = LoopFs::create(scratch, "disk", FsKind::Ext4, 400)?;
        let mut cluster = ClusterPlan::new(1).store(0, &disk.path().join("store")).start_formatted(1)?;
        let mut client = cluster.client(0)?;
        let vdi = client.create_volume("disk", 1 << 30, 1, 22)?;
        let content = |index: u32| {
            let mut bytes = vec![0; 4 << 20];
            fill_random(&mut bytes, &mut Random::new(u64::from(index)));
            bytes
        };
        let mut kept = Vec::new();
        let refusal = 'fill: {
            for index in 0..256 {
                let request = Request::object(opcode::CREATE_AND_WRITE, Oid::data(vdi, index), 0).flags(flag::DIRECT);
                let answer = client.call(request, &content(index))?;
                if answer.result() != result::SUCCESS {
                    break 'fill answer.result();
                }
                // A guest's write is both: it failed, with the same reason, if only its map entry was refused.
                let map = Request::object(opcode::WRITE, Oid::inode(vdi), 4664 + 4 * u64::from(index));
                let answer = client.call(map.flags(flag::DIRECT), &vdi.get().to_le_bytes())?;
                if answer.result() != result::SUCCESS {
                    break 'fill answer.result();
                }
                kept.push(index);
            }
            bail!("1 GiB went into 400 MiB");
        };
        ensure!(refusal == result::NO_SPACE, "a full disk is answered {refusal:#04x}");
        ensure!(kept.len() > 20, "full after {} objects", kept.len());
        // Reads go on, overwriting goes on or is refused, and a restart finds everything.
        for round in 0..2 {
            let volume = Volume::open(&mut cluster.client(0)?, "disk", "")?;
            for &index in &kept {
                let bytes = cluster.client(0)?.read_object(Oid::data(volume.vdi, index), 0, 4 << 20)?;
                ensure!(bytes == content(index), "object {index} changed on a full disk");
            }
            if round == 0 {
                cluster.check_health()?;
                cluster.kill(0)?;
                cluster.restart(0)?;
                cluster.wait_running()?;
            }
        }
        // Deleting makes room again.
        cluster.dog(&["vdi", "delete", "disk"])?.ok()?;
        cluster.wait_until("room for a new volume", Duration::from_secs(30), |cluster| {
            let mut client = cluster.client(0)?;
            let vdi = match client.look_up("next", "", 0) {
                Ok(vdi) => vdi,
                Err(_) => match client.create_volume("next", 16 * MIB, 1, 22) {
                    Ok(vdi) => vdi,
                    Err(_) => return Ok(false),
                },
            };
            let request = Request::object(opcode::CREATE_AND_WRITE, Oid::data(vdi, 0), 0).flags(flag::DIRECT);
            Ok(client.call(request, &content(1))?.result() == result::SUCCESS)
        })?;
        cluster.finish()
    })
}
