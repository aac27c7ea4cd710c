//! Brings one whole object here from another node, while it goes on being written to.
//!
//! The object is read in pieces, each with the last stamp that may be in it, so what is collected is a mixture of moments.
//! All writes of this epoch are sent to this node too and are parked here, because the copy is not current; those between
//! the stamp the source had before the first piece and the highest stamp of any piece are laid over the mixture, in
//! order. Then every byte has the last write at or below that highest stamp, which is the content at that stamp.
//!
//! Where every newest copy is damaged, what is left of one is taken, and `salvage` looks for the damaged blocks elsewhere.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use sheep_core::stamp::{Epoch, Stamp, Version};

use super::piece::{Outcome, Piece, Source, ask};
use super::salvage;
use crate::data::Data;
use crate::data::holder::{Between, Holder};
use crate::world::marks::{self, Mark};

/// Bytes per request: large enough that the round trip does not show, small enough that a guest's requests get in
/// between.
const PIECE_BYTES: u64 = 1 << 20;
const PATIENCE: Duration = Duration::from_secs(2);
/// How often the writes that came meanwhile are looked for while they are on their way here.
const LOOK_AGAIN: Duration = Duration::from_millis(1);

/// One attempt.
pub async fn fetch(data: &Data, holder: &Arc<Holder>, source: &Source) -> Outcome {
    let (oid, epoch) = (source.oid, source.epoch);
    let entry = holder.store().entry(oid);
    if entry.is_some_and(|entry| entry.version.epoch == epoch && entry.version.stamp > source.stamp) {
        // This (damaged) copy took writes of this epoch that the source has yet to take, and they are not parked.
        return Outcome::Changed;
    }
    let first = match piece(data, holder, source, 0).await {
        Ok(first) => first,
        Err(outcome) => return outcome,
    };
    let object_bytes = first.object_bytes;
    let staged = match holder.store().stage(oid, object_bytes).await {
        Ok(staged) => staged,
        Err(error) => {
            tracing::warn!("cannot make room for object {oid}: {error}");
            return Outcome::Failed;
        }
    };
    let mut offset = 0;
    let mut current = first;
    let mut through = source.stamp;
    let mut lost = Vec::new();
    loop {
        if !current.damaged.is_empty() {
            lost.extend(salvage::heal(data, holder, source, offset, &mut current).await);
        }
        through = through.max(current.stamp);
        if !current.data.is_empty()
            && let Err(error) = staged.write(vec![(offset, current.data)]).await
        {
            tracing::warn!("cannot write object {oid}: {error}");
            return Outcome::Failed;
        }
        offset += PIECE_BYTES;
        if offset >= object_bytes {
            break;
        }
        current = match piece(data, holder, source, offset).await {
            Ok(next) if next.object_bytes == object_bytes => next,
            Ok(_) => return Outcome::Changed,
            Err(outcome) => return outcome,
        };
    }
    if !lost.is_empty() {
        tracing::error!(
            "object {oid}: {} blocks of 4 KiB are damaged in every copy there is; reading them fails until they are written",
            lost.len()
        );
        if let Err(error) = staged.set_damaged(lost).await {
            tracing::warn!("cannot write object {oid}: {error}");
            return Outcome::Failed;
        }
    }
    let writes = match writes_between(data, holder, source, through).await {
        Ok(writes) => writes,
        Err(outcome) => return outcome,
    };
    if !writes.is_empty() {
        marks::hit(Mark::FetchCaughtUp);
    }
    if !writes.is_empty()
        && let Err(error) = staged.write(writes).await
    {
        tracing::warn!("cannot write object {oid}: {error}");
        return Outcome::Failed;
    }
    if holder.epoch() != epoch {
        return Outcome::Failed;
    }
    if holder.is_current(oid) {
        // The copy here turned out to be current in another way and has taken writes since, perhaps: it stays.
        return Outcome::Changed;
    }
    // A copy that got writes nobody else has (its writer died) may have a higher stamp than what was served meanwhile.
    // It lost: it goes, whatever it holds.
    if holder.store().entry(oid).is_some_and(|entry| entry.version.stamp > through) {
        marks::hit(Mark::LosingCopyGivenUp);
        if let Err(error) = holder.store().discard_corrupt(oid).await {
            tracing::warn!("cannot give up the copy of object {oid}: {error}");
            return Outcome::Failed;
        }
    }
    holder.was_replaced(oid, through);
    let shown = holder.store().entry(oid).map_or(Epoch(0), |entry| entry.version.epoch);
    match staged.install(Version { epoch: shown, stamp: through }).await {
        Ok(()) => Outcome::Done,
        Err(error) => {
            tracing::warn!("cannot install object {oid}: {error}");
            Outcome::Failed
        }
    }
}

/// The writes that came while the pieces were read, from those parked here.
async fn writes_between(
    data: &Data,
    holder: &Arc<Holder>,
    source: &Source,
    through: Stamp,
) -> Result<Vec<(u64, Bytes)>, Outcome> {
    let deadline = data.world().clock.monotonic() + PATIENCE;
    loop {
        if holder.epoch() != source.epoch {
            return Err(Outcome::Failed);
        }
        match holder.writes_between(source.oid, source.stamp, through) {
            Between::Writes(writes) => return Ok(writes),
            Between::Replaced => return Err(Outcome::Changed),
            Between::NotAllYet if data.world().clock.monotonic() > deadline => return Err(Outcome::Changed),
            // They are on their way from the gateway.
            Between::NotAllYet => data.world().clock.sleep(LOOK_AGAIN).await,
        }
    }
}

async fn piece(data: &Data, holder: &Holder, source: &Source, offset: u64) -> Result<Piece, Outcome> {
    let piece = ask(data, holder, source, source.node, offset, PIECE_BYTES).await?;
    let rest = piece.object_bytes.checked_sub(offset).ok_or(Outcome::Changed)?;
    let is_whole = piece.data.len() as u64 == PIECE_BYTES.min(rest);
    if is_whole || (piece.data.is_empty() && piece.damaged.is_empty()) { Ok(piece) } else { Err(Outcome::Failed) }
}
