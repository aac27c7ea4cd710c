//! The first word of every other member in an epoch: that it is there, and what lost writers left half-written.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::member::NodeId;
use sheep_core::peer_message::{PeerKind, PeerRequest, Verdict};
use tokio::task::JoinSet;

use super::{PATIENCE, RecoveryEnd, wait_for_change};
use crate::data::Data;
use crate::data::holder::Holder;
use crate::data::view::View;

/// What all members that store something know of objects that lost writers left half-written. The holder is told of each as it
/// answers.
pub async fn hear_all(data: Data, holder: Arc<Holder>, view: Arc<View>) -> Result<BTreeSet<Oid>, RecoveryEnd> {
    let mut asked = JoinSet::new();
    for member in view.state.members.values().filter(|m| !m.member.is_gateway() && m.member.id != data.node()) {
        asked.spawn(hear(data.clone(), holder.clone(), view.clone(), member.member.id));
    }
    let mut suspects = BTreeSet::new();
    while let Some(told) = asked.join_next().await {
        suspects.extend(told.map_err(|_| RecoveryEnd::EpochOver)??);
    }
    Ok(suspects)
}

/// Asks until there is an answer, or the epoch is over.
async fn hear(data: Data, holder: Arc<Holder>, view: Arc<View>, node: NodeId) -> Result<Vec<Oid>, RecoveryEnd> {
    let epoch = view.epoch();
    loop {
        let request = PeerRequest::new(PeerKind::Suspects, epoch, data.node());
        let answer = data.links().call(node, request, Bytes::new(), PATIENCE).await;
        if holder.epoch() != epoch {
            return Err(RecoveryEnd::EpochOver);
        }
        match answer {
            Ok((answer, payload)) if answer.verdict == Verdict::Ok => {
                holder.meet(node, epoch).await.map_err(|_| RecoveryEnd::EpochOver)?;
                return Ok(payload
                    .as_chunks::<8>()
                    .0
                    .iter()
                    .map(|raw| Oid::from_raw(u64::from_le_bytes(*raw)))
                    .collect());
            }
            Ok(_) | Err(_) => wait_for_change(&data, &holder).await,
        }
    }
}
