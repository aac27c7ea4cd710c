//! Operations on the cluster and its nodes.

use std::os::unix::ffi::OsStringExt;
use std::sync::atomic::Ordering;

use qemu_proto::cluster_info::{CLUSTER_INFO_BYTES, ClusterInfo, EpochEntry};
use qemu_proto::node_entry::{NODE_BYTES, NODES_MAX, NodeEntry};
use qemu_proto::opcode::{ADMIN_VERSION, Opcode};
use qemu_proto::request::{Request, RequestBody};
use qemu_proto::response::ResponseBody;
use qemu_proto::stat::{Counters, DiskEntry, MD_INFO_BYTES, RecoveryStat, encode_disks};
use qemu_proto::status::Status;
use sheep_core::cluster_state::{EpochMember, Phase};
use sheep_core::command::{Command, Outcome as Ordered, Refusal};
use sheep_core::member::Member;

use super::Front;
use super::reply::{Outcome, Reply};
use super::wire_status::of_refusal;
use crate::data::Administration;
use crate::data::traffic::Side;

/// Virtual nodes shown for a member of mean capacity, as the ancestor had them: our ring has more points, in the same
/// proportion.
const VNODES_SHOWN: f64 = 128.0;

/// Carries out whatever is not about objects and VDIs.
pub async fn run(front: &Front, opcode: Opcode, request: &Request, payload: &[u8]) -> Outcome {
    if matches!(opcode, Opcode::GetNodeList | Opcode::ClusterInfo | Opcode::StatCluster | Opcode::MakeFs) {
        see_everything(front).await;
    }
    match opcode {
        Opcode::GetNodeList => Ok(node_list(front, request)),
        Opcode::ClusterInfo => cluster_info(front, request),
        Opcode::StatCluster => stat_cluster(front, request),
        Opcode::MakeFs => make_fs(front, request, payload).await,
        Opcode::Shutdown => shutdown(front).await,
        Opcode::KillNode => {
            front.stop.notify_one();
            Ok(Reply::done())
        }
        Opcode::ForceRecover => force_recover(front, request).await,
        Opcode::GetStoreList => Ok(Reply::data(front.store_name.to_string() + " ")),
        Opcode::StatSheep => Ok(stat_sheep(front).await),
        Opcode::StatRecovery => Ok(stat_recovery(front, request)),
        Opcode::Stat => Ok(stat(front)),
        Opcode::GetLoglevel => Ok(Reply::data(u32::from((front.log.level)()).to_le_bytes().to_vec())),
        Opcode::SetLoglevel => set_log_level(front, payload),
        Opcode::MdInfo => md_info(front, request).await,
        Opcode::ClusterReport => report(front, request),
        Opcode::ClusterAdmin => administer(front, request, payload).await,
        // Known, but not served by this version.
        _ => Err(Status::NoSupport),
    }
}

/// A person who started a node and asks another one about it must be told of it.
pub async fn see_everything(front: &Front) {
    match front.data.cluster().barrier().await {
        Ok(state) => front.data.await_applied(state.applied).await,
        // What is known here is still worth telling.
        Err(error) => tracing::warn!("telling what is known here only: {error}"),
    }
}

/// GET_CLUSTER_DEFAULT: never zeros, whatever the state (protocol.md section 6.4).
pub fn cluster_default(front: &Front) -> Reply {
    let settings = front.data.view().state.settings;
    Reply::body(ResponseBody::ClusterDefault {
        nr_copies: settings.copies.now(),
        copy_policy: 0,
        block_size_shift: settings.object_size_shift,
        rest: [0; 25],
    })
}

fn entries<'a>(members: impl Iterator<Item = &'a EpochMember>) -> Vec<NodeEntry> {
    let mut members: Vec<&Member> = members.map(|member| &member.member).collect();
    members.sort_by_key(|member| member.list_key());
    let storing = members.iter().filter(|member| !member.is_gateway()).count();
    let total: f64 = members.iter().map(|member| member.weight as f64).sum();
    let mean = if storing == 0 { 1.0 } else { total / storing as f64 };
    // 0 would say that the node stores nothing, however small it is beside the others.
    let least = |member: &Member| if member.is_gateway() { 0.0 } else { 1.0 };
    let entry = |member: &&Member| NodeEntry {
        address: member.address,
        port: member.port,
        nr_vnodes: (member.weight as f64 / mean * VNODES_SHOWN).round().clamp(least(member), 65535.0) as u16,
        zone: member.zone,
        space: member.weight,
        ..NodeEntry::default()
    };
    members.iter().map(entry).collect()
}

fn node_list(front: &Front, request: &Request) -> Reply {
    let view = front.data.view();
    let nodes = entries(view.state.members.values());
    let shown = nodes.len().min(request.data_length as usize / NODE_BYTES);
    let payload: Vec<u8> = nodes[..shown].iter().flat_map(NodeEntry::encode).collect();
    Reply { body: ResponseBody::node(shown as u32, 0, 0), ..Reply::data(payload) }
}

fn cluster_info(front: &Front, request: &Request) -> Outcome {
    if (request.data_length as usize) < CLUSTER_INFO_BYTES {
        return Err(Status::BufferSmall);
    }
    let view = front.data.view();
    let state = &view.state;
    let info = ClusterInfo {
        proto_ver: ADMIN_VERSION,
        disable_recovery: u8::from(state.recovery_held),
        epoch: state.epoch.get(),
        ctime: state.created,
        flags: state.settings.flags,
        nr_copies: state.settings.copies.now(),
        copy_policy: 0,
        status: match state.phase {
            Phase::Running => 1,
            Phase::Unformatted | Phase::Waiting { .. } => 2,
            Phase::Shutdown => 3,
        },
        block_size_shift: state.settings.object_size_shift,
        default_store: store_name(front),
        nodes: entries(state.members.values()),
    };
    Ok(Reply::data(info.encode()))
}

fn store_name(front: &Front) -> [u8; 16] {
    let mut name = [0; 16];
    name[..front.store_name.len()].copy_from_slice(front.store_name.as_bytes());
    name
}

/// The result of STAT_CLUSTER is the cluster's status.
fn status_of(phase: &Phase) -> Status {
    match phase {
        Phase::Running => Status::Success,
        Phase::Unformatted => Status::WaitForFormat,
        Phase::Waiting { .. } => Status::WaitForJoin,
        Phase::Shutdown => Status::Shutdown,
    }
}

fn stat_cluster(front: &Front, request: &Request) -> Outcome {
    let view = front.data.view();
    let state = &view.state;
    let nodes_nr = match &request.body {
        RequestBody::Cluster(body) => body.nodes_nr as usize,
        _ => 0,
    };
    let room = request.data_length as usize;
    let mut payload = Vec::new();
    for record in state.epochs.iter().rev() {
        let nodes = entries(record.members.values());
        // A caller that only wants the status asks for one bare record.
        let nodes = if nodes_nr == 0 { Vec::new() } else { nodes };
        if nodes.len() > nodes_nr.min(NODES_MAX) {
            return Err(Status::BufferSmall);
        }
        let mut entry = EpochEntry { time: record.time, epoch: record.epoch.get(), nodes, ..EpochEntry::default() };
        if payload.is_empty() {
            entry.ctime = state.created;
            entry.nr_copies = state.settings.copies.now();
            entry.flags = state.settings.flags;
            entry.disable_recovery = u8::from(state.recovery_held);
            entry.driver_name = store_name(front);
        }
        let bytes = entry.encode(nodes_nr).ok_or(Status::BufferSmall)?;
        if payload.len() + bytes.len() > room {
            break;
        }
        payload.extend_from_slice(&bytes);
    }
    Ok(Reply { status: status_of(&state.phase), ..Reply::data(payload) })
}

async fn make_fs(front: &Front, request: &Request, payload: &[u8]) -> Outcome {
    let RequestBody::Cluster(body) = &request.body else { return Err(Status::InvalidParms) };
    let store: &[u8] = payload.split(|byte| *byte == 0).next().unwrap_or(&[]);
    // The ancestor had two layouts on disk; ours is one, and takes over for both names.
    if !matches!(store, b"" | b"plain" | b"tree") {
        return Err(Status::NoStore);
    }
    if body.copy_policy != 0 {
        return Err(Status::NoSupport);
    }
    let default = |value: u8, default: u8| if value == 0 { default } else { value };
    let command = Command::Format {
        cluster_id: front.data.world().rng.next_u64().max(1),
        copies: default(body.copies, default_copies(front)),
        object_size_shift: default(body.block_size_shift, sheep_core::cluster_state::DEFAULT_OBJECT_SIZE_SHIFT),
        flags: body.flags,
        time: front.data.world().clock.wall().to_wire(),
    };
    propose(front, command).await
}

/// Three copies, or as many as there are zones: a cluster that needs a majority does not acknowledge what it cannot keep.
fn default_copies(front: &Front) -> u8 {
    let state = &front.data.view().state;
    let zones = state.zone_count().clamp(1, usize::from(sheep_core::cluster_state::DEFAULT_COPIES)) as u8;
    if state.needs_majority { zones } else { sheep_core::cluster_state::DEFAULT_COPIES }
}

/// Has the cluster order it, and waits until it counts here.
pub async fn propose(front: &Front, command: Command) -> Outcome {
    match front.data.cluster().propose(command).await {
        Ok(Ordered::Refused(refusal)) => Err(of_refusal(refusal)),
        Ok(_) => {
            front.data.settle_in().await;
            Ok(Reply::done())
        }
        Err(error) => {
            tracing::warn!("cannot order a change of the cluster: {error}");
            Err(Status::ClusterError)
        }
    }
}

async fn shutdown(front: &Front) -> Outcome {
    // What was acknowledged without being durable becomes so before anybody stops.
    if front.data.view().state.is_running() && crate::data::flush::flush(&front.data, None).await.is_err() {
        tracing::warn!("shutting down although not everything could be flushed");
    }
    match propose(front, Command::StopAll).await {
        // Nodes of an earlier version are in: theirs is the stop after which the epoch goes on.
        Err(Status::NoSupport) => propose(front, Command::Shutdown).await,
        ordered => ordered,
    }
}

async fn force_recover(front: &Front, request: &Request) -> Outcome {
    let command = Command::ForceRecover { time: front.data.world().clock.wall().to_wire() };
    match front.data.cluster().propose(command).await {
        Ok(Ordered::Refused(Refusal::NoEffect)) => Err(Status::ForceRecover),
        Ok(Ordered::Refused(refusal)) => Err(of_refusal(refusal)),
        Ok(_) => Ok(node_list(front, request)),
        Err(error) => {
            tracing::warn!("cannot order a forced recovery: {error}");
            Err(Status::ClusterError)
        }
    }
}

async fn stat_sheep(front: &Front) -> Reply {
    let Some(holder) = front.data.holder() else { return Reply::body(ResponseBody::node(0, 0, 0)) };
    holder.store().measure().await;
    let space = holder.store().space();
    // As the ancestor counted: what objects take plus what is free.
    let size = space.used_bytes + space.free_bytes;
    Reply::body(ResponseBody::node(0, size, space.free_bytes))
}

fn stat(front: &Front) -> Reply {
    let traffic = front.data.traffic();
    let (clients, peers) = (traffic.figures(Side::Clients), traffic.figures(Side::Peers));
    // The order of the wire, which has no flushes of nodes.
    let counters = Counters([
        clients.active,
        peers.active,
        clients.total,
        peers.total,
        clients.written_bytes,
        clients.read_bytes,
        peers.written_bytes,
        peers.read_bytes,
        clients.removes,
        clients.reads,
        clients.writes,
        clients.flushes,
        peers.removes,
        peers.reads,
        peers.writes,
    ]);
    Reply::data(counters.encode().to_vec())
}

fn set_log_level(front: &Front, payload: &[u8]) -> Outcome {
    let level = payload.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    match level {
        Some(level) if (front.log.set_level)(level) => Ok(Reply::done()),
        _ => Err(Status::InvalidParms),
    }
}

fn stat_recovery(front: &Front, request: &Request) -> Reply {
    let progress = front.data.progress();
    let stat = RecoveryStat {
        in_recovery: progress.running.load(Ordering::Relaxed),
        state: u32::from(progress.listed.load(Ordering::Relaxed)),
        finished: progress.done.load(Ordering::Relaxed),
        total: progress.total.load(Ordering::Relaxed),
    };
    let bytes = stat.encode();
    Reply::data(bytes[..bytes.len().min(request.data_length as usize)].to_vec())
}

async fn md_info(front: &Front, request: &Request) -> Outcome {
    if (request.data_length as usize) < MD_INFO_BYTES {
        return Err(Status::BufferSmall);
    }
    let disks: Vec<DiskEntry> = match front.data.holder() {
        None => Vec::new(),
        Some(holder) => {
            holder.store().measure().await;
            let disks = holder.store().disks().into_iter().zip(0..);
            disks
                .map(|(disk, index)| DiskEntry {
                    index,
                    free: disk.free_bytes,
                    used: disk.used_bytes,
                    path: disk.path.into_os_string().into_vec(),
                })
                .collect()
        }
    };
    Ok(Reply::data(encode_disks(&disks)))
}

fn phase_name(phase: &Phase) -> &'static str {
    match phase {
        Phase::Unformatted => "unformatted",
        Phase::Running => "running",
        Phase::Waiting { .. } => "waiting",
        Phase::Shutdown => "shutdown",
    }
}

/// Admissions, keys and the like; the answer is always JSON text, so that the reason of a refusal reaches the operator.
async fn administer(front: &Front, request: &Request, payload: &[u8]) -> Outcome {
    let answer = if let Some(answer) = super::volume_wishes::run(front, payload).await {
        answer
    } else if front.trusted {
        let Ok(wish) = serde_json::from_slice::<Administration>(payload) else { return Err(Status::InvalidParms) };
        match front.data.cluster().administer(wish).await {
            Ok(text) => serde_json::json!({ "ok": text }),
            Err(error) => serde_json::json!({ "error": error.to_string() }),
        }
    } else {
        let reason = "this is for clients on the node's own host, or with the cluster key: dog -a HOST --key FILE";
        serde_json::json!({ "error": reason })
    };
    let text = answer.to_string();
    if text.len() > request.data_length as usize {
        return Err(Status::BufferSmall);
    }
    Ok(Reply::data(text))
}

fn report(front: &Front, request: &Request) -> Outcome {
    let view = front.data.view();
    let recovering = front.data.progress().running.load(Ordering::Relaxed);
    let text = serde_json::json!({
        "cluster_id": format!("{:016x}", view.state.cluster_id),
        "epoch": view.epoch().get(),
        "clean_epoch": view.state.clean.get(),
        "recovering": recovering,
        "waiting": front.data.waiting_for(),
        "node": front.data.node().to_string(),
        "node_report": front.data.report_here(),
        "nbd": { "socket": front.nbd.socket, "port": front.nbd.port },
        "phase": phase_name(&view.state.phase),
        "open": view.state.admission.open,
        "key_generation": view.state.admission.key.as_ref().map(|key| key.generation),
        "order": front.data.cluster().overview(),
    });
    let text = text.to_string();
    if text.len() > request.data_length as usize {
        return Err(Status::BufferSmall);
    }
    Ok(Reply::data(text))
}
