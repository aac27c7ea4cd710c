//! VDI attributes: found, made and deleted by key (protocol.md section 4.5).

use bytes::Bytes;
use qemu_proto::attr::{ATTR_BYTES, AttrRecord};
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::vdi_name::Target;

use super::Data;
use super::client::Client;
use super::gateway::write::{Base, ObjectWrite, write};
use super::gateway::{ReadFailure, read};
use super::volumes::{Found, VolumeError, lookup};

/// What to do with an attribute.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttributeAction {
    /// Only say where it is.
    Find,
    /// Make it or overwrite it.
    Set,
    /// Make it; refuse if it exists.
    SetNew,
    /// Delete it.
    Delete,
}

/// How it went.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum AttributeResult {
    /// Here it is.
    At(Found, u32),
    /// There is none.
    Absent,
    /// There is one already.
    Exists,
}

/// Slots looked at after the one that the key hashes to: as many collisions would need millions of attributes.
const PROBES_MAX: u32 = 64;

/// Carries out an action on the attribute that a record names.
pub async fn attribute(
    data: &Data,
    mut record: AttrRecord,
    action: AttributeAction,
) -> Result<AttributeResult, VolumeError> {
    let tag_end = record.tag.iter().position(|byte| *byte == 0).unwrap_or(record.tag.len());
    let tag = record.tag[..tag_end].to_vec();
    let vdi = lookup(data, record.name(), Target::new(&tag, record.snap_id)).await?;
    record.ctime = data.view().state.vdis.get(&vdi.id.get()).map_or(0, |vdi| vdi.create_time);
    let (space, first) = record.id();
    let mut free = None;
    for attribute_id in (0..PROBES_MAX).map(|step| first.wrapping_add(step)) {
        match read_record(data, space, attribute_id).await? {
            Some(found) if found.same_key(&record) => {
                return on_existing(data, vdi, space, attribute_id, record, action).await;
            }
            // A deleted one leaves a record without a name; the search goes on behind it.
            Some(found) if found.name().is_empty() => {
                free.get_or_insert(attribute_id);
            }
            Some(_) => {}
            None => {
                free.get_or_insert(attribute_id);
                break;
            }
        }
    }
    match (action, free) {
        (AttributeAction::Set | AttributeAction::SetNew, Some(attribute_id)) => {
            put(data, space, attribute_id, &record).await?;
            Ok(AttributeResult::At(vdi, attribute_id))
        }
        _ => Ok(AttributeResult::Absent),
    }
}

async fn on_existing(
    data: &Data,
    vdi: Found,
    space: VdiId,
    attribute_id: u32,
    mut record: AttrRecord,
    action: AttributeAction,
) -> Result<AttributeResult, VolumeError> {
    match action {
        AttributeAction::Find => {}
        AttributeAction::SetNew => return Ok(AttributeResult::Exists),
        AttributeAction::Set => put(data, space, attribute_id, &record).await?,
        AttributeAction::Delete => {
            record.name[0] = 0;
            put(data, space, attribute_id, &record).await?;
        }
    }
    Ok(AttributeResult::At(vdi, attribute_id))
}

async fn read_record(data: &Data, space: VdiId, attribute_id: u32) -> Result<Option<AttrRecord>, VolumeError> {
    match read::read(data, Oid::attribute(space, attribute_id), 0, ATTR_BYTES).await {
        Ok(bytes) => Ok(AttrRecord::decode(&bytes).ok()),
        Err(ReadFailure::Missing) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

async fn put(data: &Data, space: VdiId, attribute_id: u32, record: &AttrRecord) -> Result<(), VolumeError> {
    let write_of = ObjectWrite {
        oid: Oid::attribute(space, attribute_id),
        offset: 0,
        data: Bytes::from(record.encode()),
        base: Base::Zeros,
        durable: true,
        client: Client::default(),
    };
    Ok(write(data, write_of).await?)
}
