//! Brings one whole object here from another node.
//!
//! The object is read in pieces. A piece that comes with another stamp than the one before means that the source was
//! written to meanwhile: the fetch starts over, because a mixture of two moments is no content that ever was. The writes that
//! change the source are parked here, so a source can change only by what was under way, and the fetch ends.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::member::NodeId;
use sheep_core::peer_message::{PeerKind, PeerRequest, Verdict};
use sheep_core::stamp::{Epoch, Version};

use crate::data::Data;
use crate::data::holder::Holder;

/// Bytes per request: large enough that the round trip does not show, small enough that a guest's requests get in
/// between.
const PIECE_BYTES: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(2);
/// Starts over at most this often before the other source is tried.
const ATTEMPTS_MAX: usize = 64;

/// True when the object is here, durably, at the version of `source` in `epoch`.
pub async fn fetch(data: &Data, holder: &Arc<Holder>, oid: Oid, source: NodeId, epoch: Epoch) -> bool {
    for _ in 0..ATTEMPTS_MAX {
        match fetch_once(data, holder, oid, source, epoch).await {
            Outcome::Done => return true,
            Outcome::Changed => {}
            Outcome::Failed => return false,
        }
        if holder.epoch() != epoch {
            return false;
        }
    }
    false
}

enum Outcome {
    Done,
    Changed,
    Failed,
}

async fn fetch_once(data: &Data, holder: &Arc<Holder>, oid: Oid, source: NodeId, epoch: Epoch) -> Outcome {
    let first = match piece(data, oid, source, epoch, 0).await {
        Ok(first) => first,
        Err(outcome) => return outcome,
    };
    let (version, object_bytes) = (first.version, first.object_bytes);
    let staged = match holder.store().stage(oid, object_bytes).await {
        Ok(staged) => staged,
        Err(error) => {
            tracing::warn!("cannot make room for object {oid}: {error}");
            return Outcome::Failed;
        }
    };
    let mut offset = 0;
    let mut current = first;
    loop {
        if !current.data.is_empty()
            && let Err(error) = staged.write(offset, current.data).await
        {
            tracing::warn!("cannot write object {oid}: {error}");
            return Outcome::Failed;
        }
        offset += PIECE_BYTES;
        if offset >= object_bytes {
            break;
        }
        let next = match piece(data, oid, source, epoch, offset).await {
            Ok(next) => next,
            Err(outcome) => return outcome,
        };
        if next.version.stamp != version.stamp {
            return Outcome::Changed;
        }
        current = next;
    }
    // A copy that got writes nobody else has (its writer died) may have a higher stamp than what was served meanwhile.
    // It lost: it goes, whatever it holds.
    if holder.store().entry(oid).is_some_and(|entry| entry.version.stamp > version.stamp)
        && let Err(error) = holder.store().discard_corrupt(oid).await
    {
        tracing::warn!("cannot give up the copy of object {oid}: {error}");
        return Outcome::Failed;
    }
    match staged.install(Version { epoch, stamp: version.stamp }).await {
        Ok(()) => Outcome::Done,
        Err(error) => {
            tracing::warn!("cannot install object {oid}: {error}");
            Outcome::Failed
        }
    }
}

struct Piece {
    version: Version,
    object_bytes: u64,
    /// Nothing stands for zeros.
    data: Bytes,
}

async fn piece(data: &Data, oid: Oid, source: NodeId, epoch: Epoch, offset: u64) -> Result<Piece, Outcome> {
    let mut request = PeerRequest::new(PeerKind::Fetch, epoch, data.node());
    request.oid = oid;
    request.offset = offset;
    request.length = PIECE_BYTES as u32;
    let answer = data.links().call(source, request, Bytes::new(), PATIENCE).await;
    let Ok((answer, payload)) = answer else { return Err(Outcome::Failed) };
    match answer.verdict {
        Verdict::Ok => {}
        Verdict::Busy => return Err(Outcome::Changed),
        _ => return Err(Outcome::Failed),
    }
    let rest = answer.object_bytes.checked_sub(offset).ok_or(Outcome::Changed)?;
    if !payload.is_empty() && payload.len() as u64 != PIECE_BYTES.min(rest) {
        return Err(Outcome::Failed);
    }
    Ok(Piece { version: answer.version, object_bytes: answer.object_bytes, data: payload })
}
