//! Bytes of an object as one node has them, in whatever state its copy is.

use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::member::NodeId;
use sheep_core::peer_message::{FLAG_SALVAGE, PeerKind, PeerRequest, Salvaged, Verdict};
use sheep_core::stamp::{Epoch, Stamp};

use crate::data::Data;
use crate::data::holder::Holder;
use crate::store::ReadError;

/// How long a node may take to be connected.
const PATIENCE: Duration = Duration::from_secs(2);

/// What to bring here.
pub struct Source {
    /// The object.
    pub oid: Oid,
    /// Who has it.
    pub node: NodeId,
    /// In which epoch.
    pub epoch: Epoch,
    /// The content it had when it was asked.
    pub stamp: Stamp,
    /// Nothing unless damaged parts are to be passed over: others who have the same content.
    pub twins: Option<Vec<NodeId>>,
}

/// How an attempt to bring an object here ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// It is here, durably, with the content that the source named or a newer one. Its version says an earlier epoch until
    /// `Holder::confirm_durably`.
    Done,
    /// It was replaced meanwhile: the holders must be asked again.
    Changed,
    /// The copy there is damaged.
    Damaged,
    /// It could not be had now.
    Failed,
}

/// Bytes of an object as one node has them.
pub struct Piece {
    /// The last stamp that may be in it.
    pub stamp: Stamp,
    /// Bytes of the whole object.
    pub object_bytes: u64,
    /// Nothing stands for zeros.
    pub data: Bytes,
    /// Blocks of the object that are not in `data`, with the checksums that their contents should have.
    pub damaged: Vec<(u32, u32)>,
}

/// Bytes of an object from any node, this one included, in whatever state its copy is.
pub async fn ask(
    data: &Data,
    holder: &Holder,
    source: &Source,
    node: NodeId,
    offset: u64,
    length: u64,
) -> Result<Piece, Outcome> {
    if node == data.node() {
        return ask_here(holder, source, offset, length).await;
    }
    let mut request = PeerRequest::new(PeerKind::Fetch, source.epoch, data.node());
    request.oid = source.oid;
    request.offset = offset;
    request.length = length as u32;
    if source.twins.is_some() {
        request.flags |= FLAG_SALVAGE;
    }
    let answer = data.links().call(node, request, Bytes::new(), PATIENCE).await;
    let Ok((answer, payload)) = answer else { return Err(Outcome::Failed) };
    let (stamp, object_bytes) = (answer.version.stamp, answer.object_bytes);
    match answer.verdict {
        Verdict::Ok => Ok(Piece { stamp, object_bytes, data: payload, damaged: Vec::new() }),
        Verdict::Corrupt => match Salvaged::decode(&payload) {
            Some(Salvaged { damaged, bytes }) => Ok(Piece { stamp, object_bytes, data: bytes.into(), damaged }),
            None => Err(Outcome::Damaged),
        },
        _ => Err(Outcome::Failed),
    }
}

async fn ask_here(holder: &Holder, source: &Source, offset: u64, length: u64) -> Result<Piece, Outcome> {
    let store = holder.store();
    let size = store.entry(source.oid).ok_or(Outcome::Failed)?.size_bytes;
    let length = length.min(size.checked_sub(offset).ok_or(Outcome::Changed)?) as usize;
    let read = store.salvage(source.oid, offset, length).await;
    let Salvaged { damaged, bytes } = read.map_err(|error| match error {
        ReadError::Corrupt { .. } => Outcome::Damaged,
        _ => Outcome::Failed,
    })?;
    let entry = store.entry(source.oid).ok_or(Outcome::Changed)?;
    Ok(Piece { stamp: entry.version.stamp, object_bytes: entry.size_bytes, data: bytes.into(), damaged })
}
