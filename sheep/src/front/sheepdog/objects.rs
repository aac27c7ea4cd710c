//! Operations on objects.

use std::sync::Arc;

use bytes::Bytes;
use qemu_proto::flags::RequestFlags;
use qemu_proto::node_entry::NodeEntry;
use qemu_proto::oid::{ObjectKind, Oid};
use qemu_proto::request::{ObjectRequest, Request};
use qemu_proto::response::ResponseBody;
use qemu_proto::status::Status;
use sheep_core::member::Member;
use sheep_core::stamp::Epoch;

use super::Front;
use super::reply::{Outcome, Reply};
use super::wire_status::{of_inode, of_read, of_volume, of_write};
use crate::data::gateway::lease::Lease;
use crate::data::gateway::write::{Base, ObjectWrite, Ready, Tries};
use crate::data::gateway::{ReadFailure, read as read_path, write as write_path};
use crate::data::inode::{self, InodeWriter};
use crate::data::volumes::{self, Creation};
use crate::data::{Data, check as checks, flush as flushes, throttle};

/// A write is durable when answered unless the client says that it will flush (protocol.md section 6.20).
fn durable(request: &Request) -> bool {
    !request.flags.contains(RequestFlags::CACHE) || request.flags.contains(RequestFlags::DIRECT)
}

/// A VDI may have been made through another node a moment ago.
async fn hear_of(front: &Front, oid: Oid) {
    let is_known = || front.data.view().state.vdis.contains_key(&oid.vid().get());
    // Of an attribute's id only some bits are a VDI's.
    if oid.kind() != Some(ObjectKind::Attribute) && !is_known() {
        super::admin::see_everything(front).await;
    }
}

/// The limits of the volume that owns a data object. A client of a clone reads what it shares as its owner's.
async fn pass_limits(front: &Front, oid: Oid, bytes: usize) {
    if oid.kind() == Some(ObjectKind::Data) {
        throttle::pass(&front.data, oid.vid(), bytes).await;
    }
}

/// The bytes of a data object that is here and current.
pub fn read_now(data: &Data, body: &ObjectRequest, request: &Request) -> Option<Bytes> {
    if body.oid.kind()? != ObjectKind::Data || throttle::is_limited(data, body.oid.vid()) {
        return None;
    }
    read_path::read_now(data, body.oid, body.offset, request.data_length as usize)
}

/// READ_OBJ.
pub async fn read(front: &Front, body: &ObjectRequest, request: &Request) -> Outcome {
    let length = request.data_length as usize;
    if request.flags.contains(RequestFlags::WRITE) {
        return Err(Status::InvalidParms);
    }
    hear_of(front, body.oid).await;
    let bytes = match body.oid.kind() {
        Some(ObjectKind::Inode) => {
            let read = inode::read_inode(&front.data, body.oid.vid(), body.offset, length).await;
            read.map_err(|error| of_inode(&error))?
        }
        Some(ObjectKind::Data | ObjectKind::Vmstate | ObjectKind::Attribute) => {
            pass_limits(front, body.oid, length).await;
            read_path::read(&front.data, body.oid, body.offset, length).await.map_err(of_read)?
        }
        Some(ObjectKind::BtreeNode | ObjectKind::Ledger) => return Err(Status::NoObj),
        None => return Err(Status::InvalidParms),
    };
    Ok(Reply::data(bytes))
}

fn write_of(front: &Front, body: &ObjectRequest, request: &Request, payload: &Bytes) -> ObjectWrite {
    ObjectWrite {
        oid: body.oid,
        offset: body.offset,
        data: payload.clone(),
        base: Base::Existing,
        durable: durable(request),
        client: front.client.clone(),
    }
}

/// A write to a data object that need not wait for anything.
pub fn write_ready(
    front: &Front,
    body: &ObjectRequest,
    request: &Request,
    payload: &Bytes,
) -> Option<(ObjectWrite, Arc<Lease>, Ready)> {
    let vdi = body.oid.vid();
    if body.oid.kind()? != ObjectKind::Data || throttle::is_limited(&front.data, vdi) {
        return None;
    }
    let lease = front.data.leases().held(vdi)?;
    let object = write_of(front, body, request, payload);
    let ready = write_path::ready(&front.data, &object)?;
    Some((object, lease, ready))
}

/// WRITE_OBJ. `tries` is what was done of it before.
pub async fn write(
    front: &Front,
    body: &ObjectRequest,
    request: &Request,
    payload: Bytes,
    mut tries: Tries,
) -> Outcome {
    if !request.flags.contains(RequestFlags::WRITE) && request.data_length != 0 {
        return Err(Status::InvalidParms);
    }
    hear_of(front, body.oid).await;
    match body.oid.kind() {
        Some(ObjectKind::Inode) => {
            let writer = InodeWriter {
                qemu_synchronous: request.proto_ver == 0 && request.id == 0,
                durable: durable(request),
                strict: false,
                client: front.client.clone(),
            };
            let written = inode::write_inode(&front.data, body.oid.vid(), body.offset, &payload, writer).await;
            written.map_err(|error| of_inode(&error))?;
        }
        Some(ObjectKind::Data | ObjectKind::Vmstate | ObjectKind::Attribute) => {
            pass_limits(front, body.oid, payload.len()).await;
            let object = write_of(front, body, request, &payload);
            tries.write(&front.data, &object).await.map_err(of_write)?;
        }
        Some(ObjectKind::BtreeNode | ObjectKind::Ledger) | None => return Err(Status::InvalidParms),
    }
    Ok(Reply::done())
}

/// CREATE_AND_WRITE_OBJ.
pub async fn create(front: &Front, body: &ObjectRequest, request: &Request, payload: Bytes) -> Outcome {
    if !request.flags.contains(RequestFlags::WRITE) && request.data_length != 0 {
        return Err(Status::InvalidParms);
    }
    let source = request.flags.contains(RequestFlags::COW).then_some(body.cow_oid);
    match body.oid.kind() {
        Some(ObjectKind::Data | ObjectKind::Vmstate | ObjectKind::Attribute) => {}
        // A whole inode comes only with the ancestor's cluster snapshots, which this server does not load.
        _ => return Err(Status::InvalidParms),
    }
    if source.is_some_and(|source| source.kind() != body.oid.kind()) {
        return Err(Status::InvalidParms);
    }
    hear_of(front, body.oid).await;
    let creation = Creation {
        oid: body.oid,
        offset: body.offset,
        payload,
        source: source.filter(|source| *source != body.oid),
        durable: durable(request),
        durably_made: false,
        client: front.client.clone(),
    };
    pass_limits(front, body.oid, creation.payload.len()).await;
    volumes::create_object(&front.data, creation).await.map_err(of_volume)?;
    Ok(Reply::done())
}

/// DISCARD_OBJ.
pub async fn discard(front: &Front, body: &ObjectRequest, request: &Request) -> Outcome {
    if body.oid.kind() != Some(ObjectKind::Data) {
        return Err(Status::InvalidParms);
    }
    hear_of(front, body.oid).await;
    pass_limits(front, body.oid, 0).await;
    let client = front.client.clone();
    let writer = InodeWriter { qemu_synchronous: false, durable: durable(request), strict: false, client };
    inode::discard(&front.data, body.oid, writer).await.map_err(|error| of_inode(&error))?;
    Ok(Reply::done())
}

/// FLUSH_VDI.
pub async fn flush(front: &Front, oid: Oid) -> Outcome {
    flushes::flush(&front.data, Some(oid.vid())).await.map_err(of_write)?;
    Ok(Reply::done())
}

/// EXIST: whether this node has a copy.
pub fn exist(front: &Front, body: &ObjectRequest) -> Outcome {
    let has = front.data.holder().is_some_and(|holder| holder.store().entry(body.oid).is_some());
    // An inode without a map of its own exists all the same: its header is in the ordered state of every node.
    let known = body.oid.kind() == Some(ObjectKind::Inode)
        && front.data.view().state.vdis.contains_key(&body.oid.vid().get())
        && is_holder(&front.data, body.oid);
    if has || known { Ok(Reply::done()) } else { Err(Status::NoObj) }
}

fn is_holder(data: &Data, oid: Oid) -> bool {
    let view = data.view();
    view.locate(oid).is_some_and(|location| view.holders(&location).contains(&data.node()))
}

/// LOCATE_OBJECT.
pub fn locate(front: &Front, body: &ObjectRequest, request: &Request) -> Outcome {
    let view = front.data.view();
    let epoch = if body.tgt_epoch == 0 { view.epoch() } else { Epoch(body.tgt_epoch) };
    let location = view.locate(body.oid).ok_or(Status::NoObj)?;
    let holders = view.holders_in(epoch, &location).ok_or(Status::InvalidEpoch)?;
    let entry = |member: &&Member| NodeEntry {
        address: member.address,
        port: member.port,
        zone: member.zone,
        space: member.weight,
        ..NodeEntry::default()
    };
    let payload: Vec<u8> = holders.iter().map(entry).flat_map(|entry| entry.encode()).collect();
    if payload.len() > request.data_length as usize {
        return Err(Status::BufferSmall);
    }
    Ok(Reply::data(payload))
}

/// CHECK_OBJECT.
pub async fn check(front: &Front, body: &ObjectRequest) -> Outcome {
    let Some(result) = checks::check_object(&front.data, body.oid).await else {
        // A VDI whose map was never written has no inode object, and needs none.
        let unwritten = body.oid.kind() == Some(ObjectKind::Inode)
            && matches!(read_path::read(&front.data, body.oid, 0, 0).await, Err(ReadFailure::Missing))
            && front.data.view().state.vdis.contains_key(&body.oid.vid().get());
        if unwritten {
            return Ok(Reply::body(ResponseBody::Check {
                wanted: 0,
                good: 0,
                repaired: 0,
                unrepairable: 0,
                rest: [0; 12],
            }));
        }
        return Err(Status::NoObj);
    };
    Ok(Reply::body(ResponseBody::Check {
        wanted: result.wanted,
        good: result.good,
        repaired: result.repaired,
        unrepairable: result.unrepairable,
        rest: [0; 12],
    }))
}
