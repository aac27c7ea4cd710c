//! Operations on VDIs: made, looked up, deleted, listed; attributes.

use std::collections::BTreeMap;

use qemu_proto::attr::AttrRecord;
use qemu_proto::bitmap::{BITMAP_BYTES, bitmap_of};
use qemu_proto::cluster_info::VdiStateEntry;
use qemu_proto::flags::RequestFlags;
use qemu_proto::names::{parse_name, parse_name_tag};
use qemu_proto::oid::VdiId;
use qemu_proto::request::{Request, VdiRequest};
use qemu_proto::response::ResponseBody;
use qemu_proto::status::Status;
use sheep_core::command::NewVdi;
use sheep_core::member::NodeId;
use sheep_core::vdi::Vdi;
use sheep_core::vdi_name::Target;

use super::reply::{Outcome, Reply};
use super::wire_status::of_volume;
use super::{Front, locks};
use crate::data::attributes::{AttributeAction, AttributeResult, attribute as on_attribute};
use crate::data::volumes::{self, Found};

fn found_body(found: Found) -> ResponseBody {
    ResponseBody::vdi(found.id.get(), 0, found.copies, found.object_size_shift)
}

/// NEW_VDI.
pub async fn new_vdi(front: &Front, body: &VdiRequest, payload: &[u8]) -> Outcome {
    let name = parse_name(payload).map_err(|_| Status::InvalidParms)?;
    // Erasure-coded and hyper volumes are not kept by this server.
    if body.copy_policy != 0 || body.store_policy != 0 {
        return Err(Status::InvalidParms);
    }
    let base = match body.base_vdi_id {
        0 => None,
        id => Some(VdiId::new(id).ok_or(Status::NoBaseVdi)?),
    };
    let request = NewVdi {
        name: name.to_vec(),
        size_bytes: body.vdi_size,
        base,
        snapshot: body.snapid != 0,
        copies: body.copies,
        object_size_shift: body.block_size_shift,
        time: front.data.world().clock.wall().to_wire(),
        drained: None,
    };
    let found = volumes::new_vdi(&front.data, request).await.map_err(of_volume)?;
    Ok(Reply::body(found_body(found)))
}

/// LOCK_VDI: a lookup and, of a working VDI where locks are enforced, a lock.
pub async fn lock(front: &Front, body: &VdiRequest, payload: &[u8]) -> Outcome {
    let found = lookup(front, body, payload).await?;
    let (name, tag) = parse_name_tag(payload).map_err(|_| Status::InvalidParms)?;
    if Target::new(tag, body.snapid) == Target::Current {
        locks::lock(front, name).await?;
    }
    Ok(found)
}

/// RELEASE_VDI: clients send a name along, `dog vdi lock unlock` does not. There is nothing to be said against closing.
pub async fn release(front: &Front, request: &Request, body: &VdiRequest) -> Outcome {
    let is_client = request.flags.contains(RequestFlags::WRITE);
    if let Some(vdi) = VdiId::new(body.base_vdi_id).filter(|_| front.data.view().state.enforces_locks()) {
        locks::release(front, vdi, !is_client).await;
    }
    Ok(Reply::done())
}

/// GET_VDI_INFO.
pub async fn lookup(front: &Front, body: &VdiRequest, payload: &[u8]) -> Outcome {
    let (name, tag) = parse_name_tag(payload).map_err(|_| Status::InvalidParms)?;
    let found = volumes::lookup(&front.data, name, Target::new(tag, body.snapid)).await.map_err(of_volume)?;
    Ok(Reply::body(found_body(found)))
}

/// DEL_VDI.
pub async fn delete(front: &Front, body: &VdiRequest, payload: &[u8]) -> Outcome {
    let (name, tag) = parse_name_tag(payload).map_err(|_| Status::InvalidParms)?;
    let id = volumes::delete_vdi(&front.data, name, tag, body.snapid).await.map_err(of_volume)?;
    Ok(Reply::body(ResponseBody::vdi(id.get(), 0, 0, 0)))
}

/// READ_VDIS and READ_DEL_VDIS.
pub fn bitmap(front: &Front, request: &Request, which: impl Fn(&Vdi) -> bool) -> Outcome {
    if request.data_length as usize != BITMAP_BYTES {
        return Err(Status::InvalidParms);
    }
    let view = front.data.view();
    Ok(Reply::data(bitmap_of(view.state.vdis.values().filter(|vdi| which(vdi)).map(|vdi| vdi.id))))
}

/// GET_VDI_COPIES.
pub fn states(front: &Front, request: &Request) -> Outcome {
    let view = front.data.view();
    let mut payload = Vec::new();
    let locked: BTreeMap<VdiId, NodeId> = (view.state.locks.iter())
        .filter_map(|(name, lock)| Some((view.state.lookup(name, Target::Current).ok()?, lock.node)))
        .collect();
    for vdi in view.state.vdis.values() {
        let owner = locked.get(&vdi.id).and_then(|node| view.state.members.get(node));
        let entry = VdiStateEntry {
            vid: vdi.id.get(),
            nr_copies: vdi.copies.now(),
            snapshot: u8::from(vdi.is_snapshot()),
            deleted: u8::from(vdi.deleted),
            copy_policy: 0,
            block_size_shift: vdi.object_size_shift,
            parent_vid: vdi.parent.map_or(0, VdiId::get),
            lock_state: if locked.contains_key(&vdi.id) { 2 } else { 1 },
            lock_owner: owner.map_or_else(Default::default, |owner| (owner.member.address, owner.member.port)),
        };
        payload.extend_from_slice(&entry.encode());
        if payload.len() > request.data_length as usize {
            return Err(Status::BufferSmall);
        }
    }
    Ok(Reply::data(payload))
}

/// GET_VDI_ATTR.
pub async fn attribute(front: &Front, request: &Request, payload: &[u8]) -> Outcome {
    let record = AttrRecord::decode(payload).map_err(|_| Status::InvalidParms)?;
    if record.name().is_empty() || record.name().len() == record.name.len() || record.key[0] == 0 {
        return Err(Status::InvalidParms);
    }
    let flags = request.flags;
    let action = if flags.contains(RequestFlags::DEL) {
        AttributeAction::Delete
    } else if flags.contains(RequestFlags::CREAT | RequestFlags::EXCL) {
        AttributeAction::SetNew
    } else if flags.contains(RequestFlags::CREAT) {
        AttributeAction::Set
    } else {
        AttributeAction::Find
    };
    match on_attribute(&front.data, record, action).await.map_err(of_volume)? {
        AttributeResult::At(found, attribute_id) => {
            let body = ResponseBody::vdi(found.id.get(), attribute_id, found.copies, found.object_size_shift);
            Ok(Reply::body(body))
        }
        AttributeResult::Absent => Err(Status::NoObj),
        AttributeResult::Exists => Err(Status::VdiExist),
    }
}
