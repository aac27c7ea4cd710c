//! A sheep for tests: one volume in memory, on a loopback port of its own, and whatever a test wants its cluster to say.
//!
//! It knows the object operations and the lookup of the working VDI, and is as strict as the protocol: objects are created
//! before they are written, reads stay inside, and a map entry names an object that exists.

use std::collections::BTreeMap;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpListener, TcpStream};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use qemu_proto::flags::RequestFlags;
use qemu_proto::inode::{self, InodeHeader, QEMU_INODE_BYTES};
use qemu_proto::oid::{ObjectKind, Oid, VdiId};
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{HEADER_BYTES, ObjectRequest, Request, RequestBody};
use qemu_proto::response::{Response, ResponseBody};
use qemu_proto::stat::Counters;
use qemu_proto::status::Status;
use serde_json::Value;

use crate::meaning::Target;

/// Object size: the smallest there is.
pub const SHIFT: u8 = 20;

/// What the sheep keeps.
#[derive(Default)]
pub struct Kept {
    /// Every object.
    pub objects: BTreeMap<u64, Vec<u8>>,
    /// What the name leads to.
    pub current: u32,
    /// Requests so far, by opcode.
    pub counts: BTreeMap<u8, usize>,
    /// After so many writes of data objects the volume becomes a snapshot.
    pub snapshot_after: Option<usize>,
    /// What the cluster reports of itself; null for a sheep that knows no reports.
    pub report: Value,
    /// What it answers to a wish for the cluster driver.
    pub granted: Value,
    /// Wishes so far.
    pub wishes: Vec<Value>,
    /// What it says that it was asked.
    pub counters: Counters,
    /// How much it logs.
    pub log_level: u32,
    /// Flags of the formats so far.
    pub formats: Vec<u16>,
    /// How it answers a format.
    pub refuses_format: Option<Status>,
}

/// A running fake.
pub struct FakeSheep {
    /// Where it listens.
    pub target: Target,
    kept: Arc<Mutex<Kept>>,
}

impl FakeSheep {
    /// One volume with id 1 and `object_count` holes.
    pub fn start(object_count: u64) -> FakeSheep {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("a free port");
        let target = Target::Tcp(listener.local_addr().expect("its address"));
        let kept = Arc::new(Mutex::new(Kept { current: 1, ..Kept::default() }));
        kept.lock().expect("new").add_inode(1, 0, object_count << SHIFT);
        let shared = Arc::clone(&kept);
        // Ends with the test program.
        thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let kept = Arc::clone(&shared);
                thread::spawn(move || serve(stream, &kept));
            }
        });
        FakeSheep { target, kept }
    }

    /// One of a cluster that reports this of itself, and grants every wish with a word.
    pub fn in_cluster(report: Value) -> FakeSheep {
        let sheep = FakeSheep::start(1);
        sheep.kept().report = report;
        sheep.kept().granted = serde_json::json!({"ok": "granted"});
        sheep
    }

    /// What it keeps.
    pub fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().expect("no test panicked inside")
    }
}

impl Kept {
    fn add_inode(&mut self, vdi: u32, parent: u32, size_bytes: u64) {
        let mut header = InodeHeader {
            vdi_size: size_bytes,
            block_size_shift: SHIFT,
            nr_copies: 1,
            vdi_id: vdi,
            parent_vdi_id: parent,
            snap_id: vdi,
            ..InodeHeader::default()
        };
        header.set_name(b"v");
        let mut inode = header.encode();
        inode.resize(QEMU_INODE_BYTES, 0);
        if let Some(base) = self.objects.get(&Oid::inode(VdiId::from_low_bits(parent)).raw()) {
            inode[inode::MAP_OFFSET..].copy_from_slice(&base[inode::MAP_OFFSET..]);
        }
        self.objects.insert(Oid::inode(VdiId::from_low_bits(vdi)).raw(), inode);
    }

    /// The map entries of the working VDI.
    pub fn map(&self, object_count: usize) -> Vec<u32> {
        let inode = &self.objects[&Oid::inode(VdiId::from_low_bits(self.current)).raw()];
        inode::map_entries(&inode[inode::MAP_OFFSET..]).take(object_count).collect()
    }

    /// Everything the current working VDI holds, as a guest sees it.
    pub fn content(&self, object_count: usize) -> Vec<u8> {
        let mut content = Vec::new();
        for (index, owner) in (0..).zip(self.map(object_count)) {
            match owner {
                0 => content.resize(content.len() + (1 << SHIFT), 0),
                owner => content.extend(&self.objects[&Oid::data(VdiId::from_low_bits(owner), index).raw()]),
            }
        }
        content
    }

    /// Makes the working VDI a snapshot and goes on under the next id.
    pub fn snapshot(&mut self) {
        let old = self.current;
        let inode = &self.objects[&Oid::inode(VdiId::from_low_bits(old)).raw()];
        let size_bytes = InodeHeader::decode(inode).expect("a whole inode").vdi_size;
        self.current = old + 1;
        self.add_inode(old + 1, old, size_bytes);
    }

    fn answer(&mut self, request: &Request, payload: &[u8]) -> Result<(ResponseBody, Vec<u8>), Status> {
        *self.counts.entry(request.opcode).or_default() += 1;
        match (request.op(), &request.body) {
            (Some(Opcode::GetVdiInfo), _) if payload[..2] == *b"v\0" => {
                Ok((ResponseBody::vdi(self.current, 0, 1, SHIFT), Vec::new()))
            }
            (Some(Opcode::GetVdiInfo), _) => Err(Status::NoVdi),
            (Some(Opcode::ReadObj), RequestBody::Object(body)) => {
                let object = self.objects.get(&body.oid.raw()).ok_or(Status::NoObj)?;
                let end = body.offset + u64::from(request.data_length);
                let data = object.get(body.offset as usize..end as usize).ok_or(Status::InvalidParms)?;
                Ok((ResponseBody::NONE, data.to_vec()))
            }
            (Some(opcode @ (Opcode::CreateAndWriteObj | Opcode::WriteObj)), RequestBody::Object(body)) => {
                assert!(request.flags.contains(RequestFlags::WRITE | RequestFlags::DIRECT), "writes are durable");
                self.write(opcode, body, request.flags.contains(RequestFlags::COW), payload)?;
                Ok((ResponseBody::NONE, Vec::new()))
            }
            (Some(Opcode::GetNodeList), _) => Ok((ResponseBody::node(0, 0, 0), Vec::new())),
            (Some(Opcode::GetLoglevel), _) => Ok((ResponseBody::NONE, self.log_level.to_le_bytes().to_vec())),
            (Some(Opcode::SetLoglevel), _) => {
                self.log_level = u32::from_le_bytes(*payload.first_chunk().expect("four bytes"));
                Ok((ResponseBody::NONE, Vec::new()))
            }
            (Some(Opcode::Stat), _) => Ok((ResponseBody::NONE, self.counters.encode().to_vec())),
            (Some(Opcode::ReadVdis | Opcode::ReadDelVdis), _) => {
                Ok((ResponseBody::NONE, vec![0; request.data_length as usize]))
            }
            (Some(Opcode::ClusterReport), _) if !self.report.is_null() => {
                Ok((ResponseBody::NONE, self.report.to_string().into_bytes()))
            }
            (Some(Opcode::ClusterAdmin), _) if !self.granted.is_null() => {
                assert!(request.flags.contains(RequestFlags::WRITE | RequestFlags::PIGGYBACK), "it has an answer");
                self.wishes.push(serde_json::from_slice(payload).expect("a wish is JSON"));
                let answer = self.granted.to_string().into_bytes();
                assert!(answer.len() <= payload.len(), "the answer has room");
                Ok((ResponseBody::NONE, answer))
            }
            (Some(Opcode::MakeFs), RequestBody::Cluster(body)) => {
                self.formats.push(body.flags);
                self.refuses_format.map_or(Ok((ResponseBody::NONE, Vec::new())), Err)
            }
            (Some(Opcode::Shutdown | Opcode::KillNode | Opcode::ForceRecover), _) => {
                Ok((ResponseBody::NONE, Vec::new()))
            }
            _ => Err(Status::NoSupport),
        }
    }

    fn write(&mut self, opcode: Opcode, body: &ObjectRequest, copies: bool, payload: &[u8]) -> Result<(), Status> {
        let is_data = body.oid.kind() == Some(ObjectKind::Data);
        if is_data {
            if self.snapshot_after == Some(0) {
                self.snapshot_after = None;
                self.snapshot();
            }
            self.snapshot_after = self.snapshot_after.map(|left| left - 1);
        }
        if body.oid.vid().get() != self.current {
            return Err(Status::Readonly);
        }
        if opcode == Opcode::CreateAndWriteObj {
            let source =
                if copies { self.objects.get(&body.cow_oid.raw()).cloned() } else { Some(vec![0; 1 << SHIFT]) };
            self.objects.insert(body.oid.raw(), source.ok_or(Status::NoObj)?);
        }
        let object = self.objects.get_mut(&body.oid.raw()).ok_or(Status::NoObj)?;
        let start = body.offset as usize;
        let target = object.get_mut(start..start + payload.len()).ok_or(Status::InvalidParms)?;
        target.copy_from_slice(payload);
        if !is_data {
            let touched = inode::map_entries_touched(body.offset, payload.len() as u64);
            for (index, owner) in touched.zip(inode::map_entries(payload)) {
                let data = Oid::data(VdiId::from_low_bits(self.current), index);
                let exists = self.objects.contains_key(&data.raw());
                assert!(owner == 0 || exists, "the map names an object that exists");
            }
        }
        Ok(())
    }
}

fn serve(mut stream: TcpStream, kept: &Mutex<Kept>) {
    let mut header = [0; HEADER_BYTES];
    while stream.read_exact(&mut header).is_ok() {
        let request = Request::decode(&header);
        let length = if request.flags.contains(RequestFlags::WRITE) { request.data_length } else { 0 };
        let mut payload = vec![0; length as usize];
        stream.read_exact(&mut payload).expect("the payload follows");
        let answered = kept.lock().expect("no other connection panicked").answer(&request, &payload);
        let (response, data) = match answered {
            Ok((body, data)) => (Response::success(&request, 1, body, data.len() as u32), data),
            Err(status) => (Response::error(&request, status, 1), Vec::new()),
        };
        stream.write_all(&response.encode()).and_then(|()| stream.write_all(&data)).expect("the client waits");
    }
}
