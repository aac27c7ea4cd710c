//! A client of the native protocol inside a simulation: one request at a time over the unix socket of a machine.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use qemu_proto::cluster_info::{EpochEntry, VdiStateEntry};
use qemu_proto::inode::{self, InodeHeader};
use qemu_proto::oid::{Oid, VdiId};
use sheep::world::net::Connection;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::cluster::STORE;
use super::net::SimNet;
use crate::clients::{Answer, Request, flag, opcode, padded, result};

const HEADER_BYTES: usize = 48;
const ANSWER_BYTES_MAX: usize = 16 << 20;
/// Room for the latest epochs.
const EPOCHS_BYTES: u32 = 64 << 10;
/// Room for what CLUSTER_REPORT says.
const REPORT_BYTES: u32 = 1 << 20;

/// One connection.
pub struct SimClient {
    connection: Connection,
    next_id: u32,
}

fn refused(code: u32) -> io::Error {
    io::Error::other(format!("refused with result {code:#04x}"))
}

/// `future`, or a timeout.
pub async fn within<T>(patience: Duration, future: impl Future<Output = io::Result<T>>) -> io::Result<T> {
    tokio::time::timeout(patience, future).await.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}

impl SimClient {
    /// Connects to the node of a machine.
    pub async fn connect(net: &SimNet, host: usize) -> io::Result<SimClient> {
        let path = PathBuf::from(STORE).join("sock");
        Ok(SimClient { connection: net.connect_local(host, path).await?, next_id: 1 })
    }

    /// One request and its answer, whatever the result.
    pub async fn call(&mut self, request: Request, payload: &[u8]) -> io::Result<Answer> {
        let mut request = request.id(self.next_id);
        self.next_id += 1;
        if !payload.is_empty() {
            request.flags |= flag::WRITE;
            request.length = payload.len() as u32;
        }
        let bytes = [&request.to_bytes()[..], payload].concat();
        self.connection.writer.write_all(&bytes).await?;
        let mut header = [0; HEADER_BYTES];
        self.connection.reader.read_exact(&mut header).await?;
        let mut answer = Answer { header, data: Vec::new() };
        let length = answer.u32(12) as usize;
        if length > ANSWER_BYTES_MAX || answer.id() != request.id {
            return Err(io::Error::new(io::ErrorKind::InvalidData, format!("not an answer: {header:?}")));
        }
        answer.data.resize(length, 0);
        self.connection.reader.read_exact(&mut answer.data).await?;
        Ok(answer)
    }

    /// As `call`; another result than success is an error.
    pub async fn ask(&mut self, request: Request, payload: &[u8]) -> io::Result<Answer> {
        let answer = self.call(request, payload).await?;
        if answer.result() == result::SUCCESS { Ok(answer) } else { Err(refused(answer.result())) }
    }

    /// Makes the cluster out of the nodes that are acquainted, open to all.
    pub async fn format(&mut self, copies: u8, flags: u16) -> io::Result<()> {
        let request = Request::new(opcode::MAKE_FS).with_u64(24, 1).with_u8(32, copies);
        let request = request.with_u8(34, flags.to_le_bytes()[0]).with_u8(35, flags.to_le_bytes()[1]);
        self.ask(request.flags(flag::WRITE), b"plain\0").await.map(drop)
    }

    /// What the node says of the cluster.
    pub async fn report(&mut self) -> io::Result<serde_json::Value> {
        const CLUSTER_REPORT: u8 = 0xE1;
        let answer = self.ask(Request::new(CLUSTER_REPORT).length(REPORT_BYTES), &[]).await?;
        serde_json::from_slice(&answer.data).map_err(io::Error::other)
    }

    /// Gives up what only nodes have that are not there, as `dog cluster recover force` does.
    pub async fn recover_force(&mut self) -> io::Result<()> {
        const CLUSTER_ADMIN: u8 = 0xE2;
        /// The answer comes in the place of the payload.
        const PIGGYBACK: u16 = 0x10;
        const ANSWER_BYTES: usize = 8192;
        let mut payload = br#"{"do":"recover-force"}"#.to_vec();
        payload.resize(ANSWER_BYTES, b' ');
        let answer = self.ask(Request::new(CLUSTER_ADMIN).flags(PIGGYBACK), &payload).await?;
        let said: serde_json::Value = serde_json::from_slice(&answer.data).map_err(io::Error::other)?;
        if said["ok"].is_string() { Ok(()) } else { Err(io::Error::other(said.to_string())) }
    }

    /// How many members the node sees.
    pub async fn node_count(&mut self) -> io::Result<usize> {
        const NODE_LIST_BYTES: u32 = 491_520;
        let answer = self.ask(Request::new(opcode::GET_NODE_LIST).length(NODE_LIST_BYTES), &[]).await?;
        Ok(answer.u32(20) as usize)
    }

    /// The epochs that the node knows of, each with its members as the protocol writes them.
    pub async fn epochs(&mut self) -> io::Result<Vec<(u32, Vec<String>)>> {
        const NODES_MAX: u32 = 32;
        let request = Request::new(opcode::STAT_CLUSTER).with_u32(40, NODES_MAX).length(EPOCHS_BYTES);
        let answer = self.call(request, &[]).await?;
        let entries = EpochEntry::decode_all(&answer.data, NODES_MAX as usize)
            .map_err(|_| io::Error::new(io::ErrorKind::InvalidData, "epochs that end in the middle"))?;
        let names = |entry: &EpochEntry| entry.nodes.iter().map(|node| format!("{:?}", node.address)).collect();
        Ok(entries.iter().map(|entry| (entry.epoch, names(entry))).collect())
    }

    /// Creates a volume with the cluster's number of copies.
    pub async fn create_volume(&mut self, name: &str, size_bytes: u64, object_shift: u8) -> io::Result<VdiId> {
        let request = Request::new(opcode::NEW_VDI).with_u64(16, size_bytes).with_u8(31, object_shift);
        let answer = self.ask(request, &padded(&[name])).await?;
        vdi_of(&answer)
    }

    /// Makes a clone of `base`, or (`is_snapshot`) a snapshot out of `base`, as `dog` asks for it.
    pub async fn derive_volume(
        &mut self,
        name: &str,
        size_bytes: u64,
        base: VdiId,
        is_snapshot: bool,
    ) -> io::Result<VdiId> {
        let request = Request::new(opcode::NEW_VDI).with_u64(16, size_bytes).with_u32(24, base.get());
        let answer = self.ask(request.with_u32(32, is_snapshot.into()), &padded(&[name])).await?;
        vdi_of(&answer)
    }

    /// The id behind a name and a tag; nothing if there is no such volume or snapshot.
    pub async fn look_up(&mut self, name: &str, tag: &str) -> io::Result<Option<VdiId>> {
        let answer = self.call(Request::new(opcode::GET_VDI_INFO).version(1), &padded(&[name, tag])).await?;
        match answer.result() {
            result::SUCCESS => vdi_of(&answer).map(Some),
            result::NO_VDI | result::NO_TAG => Ok(None),
            code => Err(refused(code)),
        }
    }

    /// Deletes a volume, or a snapshot of it.
    pub async fn delete_volume(&mut self, name: &str, tag: &str) -> io::Result<()> {
        self.ask(Request::new(opcode::DEL_VDI).version(1), &padded(&[name, tag])).await.map(drop)
    }

    /// Writes into an inode.
    pub async fn write_inode(&mut self, vdi: VdiId, offset: usize, bytes: &[u8]) -> io::Result<()> {
        let request = Request::object(opcode::WRITE, Oid::inode(vdi), offset as u64).flags(flag::DIRECT);
        self.ask(request, bytes).await.map(drop)
    }

    /// Changes the number of copies of a volume and its snapshots.
    pub async fn alter_copies(&mut self, vdi: VdiId, copies: u8) -> io::Result<()> {
        let request = Request::new(ALTER_VDI_COPY).with_u32(20, vdi.get()).with_u8(24, copies);
        self.ask(request, &[]).await.map(drop)
    }

    /// Snapshots of several volumes, of one moment.
    pub async fn snapshot_together(&mut self, names: &[&str], tag: &str) -> io::Result<()> {
        let wish = serde_json::json!({"do": "snapshot-together", "names": names, "tag": tag});
        let mut payload = wish.to_string().into_bytes();
        // The answer may be as long as the wish.
        payload.resize(payload.len().max(WISH_BYTES), b' ');
        let answer = self.ask(Request::new(CLUSTER_ADMIN), &payload).await?;
        let said: serde_json::Value = serde_json::from_slice(&answer.data).map_err(io::Error::other)?;
        match said.get("error") {
            None => Ok(()),
            Some(error) => Err(io::Error::other(error.to_string())),
        }
    }

    /// Every VDI that the cluster remembers.
    pub async fn vdi_states(&mut self) -> io::Result<Vec<VdiStateEntry>> {
        let answer = self.ask(Request::new(GET_VDI_COPIES).length(STATES_BYTES), &[]).await?;
        Ok(VdiStateEntry::decode_all(&answer.data).collect())
    }

    async fn header_of(&mut self, vdi: VdiId) -> io::Result<InodeHeader> {
        let header = self.read_object(Oid::inode(vdi), 0, inode::HEADER_BYTES as u32).await?;
        InodeHeader::decode(&header).map_err(|error| io::Error::other(error.to_string()))
    }

    /// Bytes of a VDI.
    pub async fn size_of(&mut self, vdi: VdiId) -> io::Result<u64> {
        Ok(self.header_of(vdi).await?.vdi_size)
    }

    /// Whose object each piece of a VDI is; 0 for a hole.
    pub async fn map_of(&mut self, vdi: VdiId) -> io::Result<Vec<u32>> {
        let header = self.header_of(vdi).await?;
        let count = header.vdi_size.div_ceil(1 << header.block_size_shift.min(63)) as u32;
        if count == 0 {
            return Ok(Vec::new());
        }
        let bytes = self.read_object(Oid::inode(vdi), inode::MAP_OFFSET as u64, 4 * count).await?;
        Ok(inode::map_entries(&bytes).collect())
    }

    /// What the node says of its store: bytes in all, bytes free.
    pub async fn space(&mut self) -> io::Result<(u64, u64)> {
        let answer = self.ask(Request::new(opcode::STAT_SHEEP), &[]).await?;
        let u64_at = |at| u64::from(answer.u32(at)) | u64::from(answer.u32(at + 4)) << 32;
        Ok((u64_at(32), u64_at(40)))
    }

    /// Shuts the cluster down.
    pub async fn shut_down(&mut self) -> io::Result<()> {
        self.ask(Request::new(opcode::SHUTDOWN), &[]).await.map(drop)
    }

    /// Reads part of an object.
    pub async fn read_object(&mut self, oid: Oid, offset: u64, length: u32) -> io::Result<Vec<u8>> {
        let request = Request::object(opcode::READ, oid, offset).flags(flag::DIRECT).length(length);
        let answer = self.ask(request, &[]).await?;
        if answer.data.len() == length as usize {
            Ok(answer.data)
        } else {
            Err(io::Error::other(format!("asked {length} bytes, got {}", answer.data.len())))
        }
    }

    /// Has the copies of an object compared: those there should be, those that are good, those that had to be replaced and
    /// those that could not be.
    pub async fn check_object(&mut self, oid: Oid) -> io::Result<[u32; 4]> {
        let answer = self.ask(Request::object(CHECK_OBJECT, oid, 0), &[]).await?;
        Ok([20, 24, 28, 32].map(|at| answer.u32(at)))
    }
}

fn vdi_of(answer: &Answer) -> io::Result<VdiId> {
    VdiId::new(answer.u32(24)).filter(|id| id.get() != 0).ok_or_else(|| io::Error::other("no VDI id"))
}

const GET_VDI_COPIES: u8 = 0xAB;
const ALTER_VDI_COPY: u8 = 0xC0;
const CHECK_OBJECT: u8 = 0xE0;
const CLUSTER_ADMIN: u8 = 0xE2;
/// As long as `dog` makes its wishes at least.
const WISH_BYTES: usize = 8192;
/// Room for the states of VDIs.
const STATES_BYTES: u32 = 1 << 20;
