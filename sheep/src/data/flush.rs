//! Makes everything that was acknowledged durable on every node that keeps data.
//!
//! Acknowledged writes are in the memory of all their holders, whoever sent them; so each storing member makes what it has
//! durable. A member that dies meanwhile changes the epoch: the round is done again with those of the new one.

use std::time::Duration;

use bytes::Bytes;
use sheep_core::peer_message::{PeerKind, PeerRequest, Verdict};
use tokio::task::JoinSet;

use super::Data;
use super::gateway::WriteError;

/// How long a member may take to be connected before the round is begun again.
const PATIENCE: Duration = Duration::from_secs(1);
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Every write that was acknowledged before is durable on all its holders when this is done.
pub async fn flush(data: &Data) -> Result<(), WriteError> {
    loop {
        let view = data.view();
        if !view.state.is_running() {
            return Err(WriteError::NotRunning);
        }
        let mut calls = JoinSet::new();
        for member in view.state.members.values().map(|m| &m.member).filter(|member| !member.is_gateway()) {
            if member.id == data.node() {
                continue;
            }
            let request = PeerRequest::new(PeerKind::Flush, view.epoch(), data.node());
            let (data, node) = (data.clone(), member.id);
            calls.spawn(async move {
                let answer = data.links().call(node, request, Bytes::new(), PATIENCE).await;
                answer.is_ok_and(|(answer, _)| answer.verdict == Verdict::Ok)
            });
        }
        let mut done = match data.holder() {
            Some(holder) => holder.flush().await.map_err(|_| WriteError::Failed).map(|()| true)?,
            None => true,
        };
        while let Some(answered) = calls.join_next().await {
            done &= answered.unwrap_or(false);
        }
        if done && data.view().epoch() == view.epoch() {
            return Ok(());
        }
        data.wait_for_change(&view, RETRY_INTERVAL).await;
    }
}
