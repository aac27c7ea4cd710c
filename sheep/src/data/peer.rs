//! The receiving end: requests of other nodes' gateways and recoveries.
//!
//! Write path 4 of 6; next: store/submit.rs. Requests of one connection are looked at in the order they came, so the
//! writes of an object reach the store in stamp order; answers leave as they are ready.
//!
//! A gateway that has not heard yet that this node left, or was taken out, still asks it, and its own fence is open. So what is
//! shown to a gateway's clients passes this node's fence as well.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheep_core::peer_message::{
    FLAG_BRING, FLAG_SALVAGE, FLAG_WAIT, HEADER_BYTES, ListEntry, PAYLOAD_BYTES_MAX, PeerAnswer, PeerKind, PeerRequest,
    Verdict,
};
use sheep_core::stamp::Epoch;
use sheep_core::write_fate::Fate;
use sheep_core::zeros::is_zero;

use super::Data;
use super::gateway::lease_table;
use super::holder::{Damaged, Holder};
use super::links::{PEER_PROTOCOL, parse_hello};
use super::recovery::{LIST_BATCH, ensure_current, ensure_current_within};
use super::traffic::{Counted, Side, Work};
use crate::world::frames::{FrameReader, FrameSender};
use crate::world::marks::{self, Mark};
use crate::world::net::{Connection, Listener};

/// Answers that may wait for a node that does not read them before its requests are no longer looked at.
const ANSWER_BYTES_MAX: usize = 64 << 20;
/// How long the order may take to tell this node of a lease that it has granted: longer than a node stays in without it.
const LEASE_PATIENCE: Duration = Duration::from_secs(10);
/// How long a read waits here for its copy to be brought up to date: less than whoever asks waits for an answer. It asks again.
const WAIT_MAX: Duration = Duration::from_secs(4);

/// Takes connections of other nodes until the process ends.
pub async fn listen(data: Data, listener: Box<dyn Listener>) {
    loop {
        match listener.accept().await {
            Ok(connection) => {
                let data = data.clone();
                tokio::spawn(async move {
                    let peer = connection.peer.clone();
                    if let Err(error) = serve(data, connection).await {
                        tracing::debug!("the connection of node {peer} broke: {error}");
                    }
                });
            }
            Err(error) => {
                tracing::warn!("cannot take a connection from another node: {error}");
                data.world().clock.sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn serve(data: Data, connection: Connection) -> std::io::Result<()> {
    let mut reader = FrameReader::new(connection.reader);
    let sender = FrameSender::start(connection.writer);
    if !greet(&data, &mut reader, &sender).await? {
        return Ok(());
    }
    while let Some((request, payload)) = next(&mut reader).await? {
        while sender.queued_bytes() > ANSWER_BYTES_MAX && !sender.is_closed() {
            data.world().clock.sleep(Duration::from_millis(1)).await;
        }
        let counted = data.traffic().begin(Side::Peers, work_of(request.kind), payload.len());
        // Behind in epochs: what follows on this connection can only be newer still.
        data.await_epoch(request.epoch).await;
        match (request.kind, data.holder()) {
            (PeerKind::Write | PeerKind::Remove, Some(holder)) => {
                if holder.is_behind(&request) {
                    learn_lease(&data, &request).await?;
                }
                write(&data, holder, request, payload, &sender, counted).await;
            }
            (PeerKind::Settled, Some(holder)) => {
                holder.settle(request.oid.vid(), request.stamp.generation, request.settled);
                answer_from(holder, &sender, PeerAnswer::new(request.id, Verdict::Ok, holder.epoch()), Bytes::new());
            }
            (PeerKind::Read, Some(holder)) if request.length as usize <= PAYLOAD_BYTES_MAX => {
                match holder.read_now(&request) {
                    Some(Ok(bytes)) if data.cluster().fence().lets_out(request.epoch) => {
                        counted.answered(bytes.len());
                        drop(counted);
                        answer_from(holder, &sender, PeerAnswer::new(request.id, Verdict::Ok, request.epoch), bytes);
                    }
                    _ => later(&data, request, &sender, counted),
                }
            }
            _ => later(&data, request, &sender, counted),
        }
    }
    Ok(())
}

/// Waits until this node knows of the lease of a write, which was ordered before the write was sent: a round trip between
/// whoever leads and this node. What comes after it on this connection waits as well: writes keep their order.
async fn learn_lease(data: &Data, request: &PeerRequest) -> std::io::Result<()> {
    marks::hit(Mark::HolderBehind);
    let (vdi, generation) = (request.oid.vid(), request.stamp.generation);
    tokio::select! {
        () = data.await_view(|view| view.knows_lease(vdi, generation)) => Ok(()),
        // Without the order for so long, this node is out, or the lease is of another one. The sender connects again.
        () = data.world().clock.sleep(LEASE_PATIENCE) => {
            Err(std::io::Error::new(std::io::ErrorKind::TimedOut, "a write under a lease that was not heard of"))
        }
    }
}

/// What a request counts as.
fn work_of(kind: PeerKind) -> Work {
    match kind {
        PeerKind::Write => Work::Write,
        PeerKind::Read | PeerKind::Fetch => Work::Read,
        PeerKind::Remove => Work::Remove,
        PeerKind::Flush => Work::Flush,
        _ => Work::Other,
    }
}

async fn next(reader: &mut FrameReader) -> std::io::Result<Option<(PeerRequest, Bytes)>> {
    let Some(header) = reader.header::<HEADER_BYTES>().await? else { return Ok(None) };
    match PeerRequest::decode(&header) {
        Ok((request, length)) => Ok(Some((request, reader.payload(length).await?))),
        Err(error) => Err(std::io::Error::new(std::io::ErrorKind::InvalidData, format!("{error:?}"))),
    }
}

/// Takes the hello of another node; false if it is not one of ours.
async fn greet(data: &Data, reader: &mut FrameReader, sender: &FrameSender) -> std::io::Result<bool> {
    let Some((request, payload)) = next(reader).await? else { return Ok(false) };
    let ours = data.view().state.cluster_id;
    let refusal = match (request.kind, parse_hello(&payload)) {
        (PeerKind::Hello, Some((PEER_PROTOCOL, theirs))) if theirs == ours => None,
        (PeerKind::Hello, Some((PEER_PROTOCOL, theirs))) => {
            Some(format!("this is cluster {ours:016x}, not {theirs:016x}"))
        }
        (PeerKind::Hello, Some((version, _))) => {
            Some(format!("this node speaks version {PEER_PROTOCOL} of the node protocol, not {version}"))
        }
        _ => Some("the first message must be a hello".to_string()),
    };
    let verdict = if refusal.is_none() { Verdict::Ok } else { Verdict::Stranger };
    let reason = refusal.clone().unwrap_or_default();
    answer(sender, PeerAnswer::new(request.id, verdict, data.view().epoch()), reason.into());
    Ok(refusal.is_none())
}

/// Every answer about copies tells whether this node has space left.
fn answer_from(holder: &Holder, sender: &FrameSender, mut header: PeerAnswer, payload: Bytes) {
    header.nearly_full = holder.is_nearly_full();
    answer(sender, header, payload);
}

fn answer(sender: &FrameSender, header: PeerAnswer, payload: Bytes) {
    // A broken connection is noticed by its reader.
    let _ = sender.send(Bytes::copy_from_slice(&header.encode(payload.len())), payload);
}

async fn write(
    data: &Data,
    holder: &Arc<Holder>,
    request: PeerRequest,
    payload: Bytes,
    sender: &FrameSender,
    counted: Counted,
) {
    let permit = holder.store().admit(payload.len() as u64).await;
    let (pending, wanted) = holder.write(&request, payload, permit);
    data.bring_up_to_date(wanted, request.epoch);
    let (sender, answering) = (sender.clone(), holder.clone());
    let reply = move |verdict, before| {
        drop(counted);
        let mut header = PeerAnswer::new(request.id, verdict, answering.epoch());
        // What was under the write: see `unflushed`.
        header.version.stamp = before;
        answer_from(&answering, &sender, header, Bytes::new());
    };
    match pending.decided() {
        Some((verdict, before)) => reply(verdict, before),
        None => pending.then(reply),
    }
}

/// Whatever may wait runs as a task of its own.
fn later(data: &Data, request: PeerRequest, sender: &FrameSender, counted: Counted) {
    let (data, sender) = (data.clone(), sender.clone());
    tokio::spawn(async move {
        let (header, payload) = handle(&data, &request).await;
        counted.answered(payload.len());
        drop(counted);
        match data.holder() {
            Some(holder) => answer_from(holder, &sender, header, payload),
            None => answer(&sender, header, payload),
        }
    });
}

async fn handle(data: &Data, request: &PeerRequest) -> (PeerAnswer, Bytes) {
    let epoch = data.view().epoch();
    let mut header = PeerAnswer::new(request.id, Verdict::Ok, epoch);
    if request.kind == PeerKind::YieldLease {
        if !lease_table::hand_over(data, request.oid.vid(), request.sender).await {
            header.verdict = Verdict::Busy;
        }
        return (header, Bytes::new());
    }
    let Some(holder) = data.holder() else {
        header.verdict = Verdict::Invalid;
        return (header, Bytes::new());
    };
    if let Err(verdict) = meet(holder, request).await {
        header.verdict = verdict;
        return (header, Bytes::new());
    }
    if request.kind == PeerKind::Query {
        header.met_nobody = holder.met_nobody(request.oid);
        header.met_before = holder.met_before();
    }
    header.clean_through = match request.kind {
        PeerKind::Query => holder.clean_through(request.oid),
        _ => holder.store().clean_through(),
    };
    if let Some(entry) = holder.store().entry(request.oid) {
        header.version = entry.version;
        header.object_bytes = entry.size_bytes;
    }
    let is_told_to_clients = matches!(request.kind, PeerKind::Read | PeerKind::Extents | PeerKind::Fate);
    let may_be_told = || !is_told_to_clients || data.cluster().fence().lets_out(request.epoch);
    let result = match request.kind {
        _ if !may_be_told() => Err(Verdict::NotCurrent),
        PeerKind::Read => read(data, holder, request).await,
        PeerKind::Fetch => fetch(holder, request, &mut header).await,
        PeerKind::Query => query(holder, request),
        PeerKind::Fate => fate(holder, request).map(|()| Bytes::new()),
        PeerKind::Extents => holder.extents(request).await.map(|extents| encode_extents(&extents)),
        PeerKind::List => list(data, holder, request).await,
        PeerKind::Suspects => suspects(holder, request),
        PeerKind::Flush => holder.flush().await.map(|()| Bytes::new()),
        PeerKind::Hash => hash(data, holder, request, &mut header).await,
        PeerKind::Repair => {
            let is_done = data.repair_here(request.oid, request.epoch).await;
            if is_done { Ok(Bytes::new()) } else { Err(Verdict::OldEpoch) }
        }
        PeerKind::Report => Ok(data.report_here().into()),
        PeerKind::Hello | PeerKind::Write | PeerKind::Remove | PeerKind::Settled | PeerKind::YieldLease => {
            Err(Verdict::Invalid)
        }
    };
    // Looked at after the copy was as well: then nobody can have gone on without this node before.
    let result = if may_be_told() {
        result
    } else {
        marks::hit(Mark::HolderFenced);
        Err(Verdict::NotCurrent)
    };
    match result {
        Ok(payload) => (header, payload),
        Err(verdict) => {
            header.verdict = verdict;
            (header, Bytes::new())
        }
    }
}

/// Whoever compares, or makes durable, hears from a node that it has met it: see `Holder::meet`.
async fn meet(holder: &Holder, request: &PeerRequest) -> Result<(), Verdict> {
    match request.kind {
        PeerKind::Query | PeerKind::List | PeerKind::Suspects | PeerKind::Fetch => {
            holder.meet(request.sender, request.epoch).await
        }
        PeerKind::Flush => holder.await_everybody(request.epoch).await,
        _ => Ok(()),
    }
}

fn same_epoch(holder: &Holder, request: &PeerRequest) -> Result<Epoch, Verdict> {
    let epoch = holder.epoch();
    if request.epoch == epoch { Ok(epoch) } else { Err(Verdict::OldEpoch) }
}

async fn read(data: &Data, holder: &Arc<Holder>, request: &PeerRequest) -> Result<Bytes, Verdict> {
    if request.length as usize > PAYLOAD_BYTES_MAX {
        return Err(Verdict::Invalid);
    }
    if request.has(FLAG_WAIT) {
        let current = ensure_current_within(data, request.oid, request.epoch, WAIT_MAX).await;
        if !current.map_err(|_| Verdict::OldEpoch)? {
            return Err(Verdict::NotCurrent);
        }
        if request.length == 0 && request.has(FLAG_BRING) {
            return holder.check_current(request).map(|()| Bytes::new());
        }
    }
    holder.read(request).await
}

/// What became of a write: see `PeerKind::Fate`.
fn fate(holder: &Holder, request: &PeerRequest) -> Result<(), Verdict> {
    match holder.fate(request)? {
        Fate::Applied => Ok(()),
        Fate::NotApplied => Err(Verdict::Missing),
        Fate::Harmless => Err(Verdict::Invalid),
        Fate::Unknown => Err(Verdict::Busy),
    }
}

fn encode_extents(extents: &[std::ops::Range<u64>]) -> Bytes {
    extents.iter().flat_map(|range| [range.start.to_le_bytes(), range.end.to_le_bytes()]).flatten().collect()
}

/// What an answer to `Extents` says.
pub fn decode_extents(payload: &[u8]) -> Vec<std::ops::Range<u64>> {
    let (numbers, _) = payload.as_chunks::<8>();
    numbers.as_chunks::<2>().0.iter().map(|[start, end]| u64::from_le_bytes(*start)..u64::from_le_bytes(*end)).collect()
}

fn query(holder: &Holder, request: &PeerRequest) -> Result<Bytes, Verdict> {
    same_epoch(holder, request)?;
    match holder.version(request.oid) {
        Ok(Some(_)) => Ok(Bytes::new()),
        Ok(None) => Err(Verdict::Missing),
        Err(Damaged) => Err(Verdict::Corrupt),
    }
}

/// Reads a copy as it stands, with the last stamp that may be in it; zeros travel as nothing, and damage as far as the asking
/// node wants it.
async fn fetch(holder: &Holder, request: &PeerRequest, header: &mut PeerAnswer) -> Result<Bytes, Verdict> {
    same_epoch(holder, request)?;
    let store = holder.store();
    let before = store.entry(request.oid).ok_or(Verdict::Missing)?;
    let rest = before.size_bytes.checked_sub(request.offset).ok_or(Verdict::Invalid)?;
    let length = u64::from(request.length).min(rest);
    let mut read = store.read(request.oid, request.offset, length as usize).await;
    if read.is_err() && request.has(FLAG_SALVAGE) {
        let salvaged = store.salvage(request.oid, request.offset, length as usize).await;
        read = salvaged.map(|salvaged| {
            header.verdict = Verdict::Corrupt;
            salvaged.encode().into()
        });
    }
    let bytes = read.map_err(|error| {
        tracing::warn!("cannot give object {} to node {}: {error}", request.oid, request.sender);
        Verdict::Corrupt
    })?;
    let after = store.entry(request.oid).ok_or(Verdict::Missing)?;
    header.object_bytes = after.size_bytes;
    header.version = after.version;
    let zeros = header.verdict == Verdict::Ok && is_zero(&bytes);
    Ok(if zeros { Bytes::new() } else { bytes })
}

/// Objects that the asking node must hold.
async fn list(data: &Data, holder: &Holder, request: &PeerRequest) -> Result<Bytes, Verdict> {
    same_epoch(holder, request)?;
    let view = data.view();
    if view.epoch() != request.epoch {
        return Err(Verdict::OldEpoch);
    }
    let mut after = Some(request.oid);
    let mut payload = Vec::new();
    loop {
        let entries = holder.store().entries(after, LIST_BATCH);
        let Some((last, _)) = entries.last() else { break };
        after = Some(*last);
        for (oid, entry) in &entries {
            let location = view.locate(*oid);
            if location.is_some_and(|location| view.holders(&location).contains(&request.sender)) {
                let entry = ListEntry { oid: *oid, version: entry.version, object_bytes: entry.size_bytes };
                payload.extend_from_slice(&entry.encode());
            }
        }
        if !payload.is_empty() {
            break;
        }
        tokio::task::yield_now().await;
    }
    Ok(payload.into())
}

fn suspects(holder: &Holder, request: &PeerRequest) -> Result<Bytes, Verdict> {
    let told = holder.told(request.epoch).ok_or(Verdict::OldEpoch)?;
    let bytes: Vec<u8> = told.iter().flat_map(|oid| oid.raw().to_le_bytes()).collect();
    // Far beyond what can be under way on one node; a shorter list would be a wrong one.
    if bytes.len() > PAYLOAD_BYTES_MAX { Err(Verdict::Failed) } else { Ok(bytes.into()) }
}

async fn hash(
    data: &Data,
    holder: &Arc<Holder>,
    request: &PeerRequest,
    header: &mut PeerAnswer,
) -> Result<Bytes, Verdict> {
    ensure_current(data, request.oid, request.epoch).await.map_err(|_| Verdict::OldEpoch)?;
    let before = holder.store().entry(request.oid).ok_or(Verdict::Missing)?;
    match holder.store().hash(request.oid).await {
        Ok(hash) => {
            let after = holder.store().entry(request.oid).ok_or(Verdict::Missing)?;
            header.version = after.version;
            // Written to meanwhile: the hash is of neither version.
            let at_rest = before.version.stamp == after.version.stamp;
            if at_rest { Ok(Bytes::copy_from_slice(hash.as_bytes())) } else { Err(Verdict::Busy) }
        }
        Err(crate::store::ReadError::Missing) => Err(Verdict::Missing),
        Err(error) => {
            tracing::error!("the copy of object {} on this node: {error}", request.oid);
            Err(Verdict::Corrupt)
        }
    }
}
