//! Answers what other nodes ask over the mesh, by what they may ask.

use std::future::Future;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use sheep_core::member::NodeId;

use super::messages::{Answer, Newest, Request, decode, encode};
use super::{Quorum, lock};
use crate::cluster::consensus::{Carrier, Unreachable};
use crate::cluster::mesh::{Peer, Service, Standing};

impl Service for Quorum {
    fn handle(&self, from: Arc<Peer>, message: Bytes) -> Pin<Box<dyn Future<Output = Vec<u8>> + Send>> {
        let quorum = self.clone();
        Box::pin(async move {
            let answer = match decode::<Request>(&message) {
                Some(request) => quorum.answer(&from, request).await,
                None => Answer::Unknown,
            };
            encode(&answer)
        })
    }
}

impl Quorum {
    async fn answer(&self, from: &Peer, request: Request) -> Answer {
        let Some(standing) = self.standing_now(from) else { return Answer::Unknown };
        let admitted = standing != Standing::Stranger;
        match request {
            // What somebody who is not in, or not yet, may say.
            Request::Join(join) => Answer::Join(self.answer_join(from, join).await),
            Request::Acquaintances => Answer::Acquaintances(self.known_nodes()),
            Request::Prepare { founder } if founder == from.node => Answer::Prepare(self.promise(founder)),
            Request::Adopt { charter, machine, index } => self.adopt(from, charter, index, *machine).await,
            _ if !admitted => Answer::Unknown,
            Request::Raft(message) => Answer::Raft(self.answer_raft(message).await),
            Request::Ping(ping) => self.answer_ping(ping, admitted).await,
            Request::Propose(entry) => Answer::Propose(self.answer_propose(entry).await),
            Request::ReadIndex => Answer::ReadIndex(match self.leading() {
                Some(consensus) => consensus.read_index(Duration::from_secs(1)).await.ok(),
                None => None,
            }),
            Request::Follow { era, after, wait_ms } => {
                self.answer_follow(era, after, Duration::from_millis(wait_ms.into())).await
            }
            Request::Suspect { node, boot } => {
                self.suspect(node, boot).await;
                Answer::Noted
            }
            Request::Probe { node, boot } => Answer::Probe(self.probe(node, boot).await),
            Request::Newest => {
                let has_quorum = self.has_quorum();
                let position = lock(&self.inner.position);
                let newest =
                    |charter| Newest { charter, index: position.index, machine: position.machine.clone(), has_quorum };
                Answer::Newest(position.charter.map(newest).map(Box::new))
            }
            Request::Asking => Answer::Asking(self.asking()),
            Request::Prepare { .. } => Answer::Unknown,
        }
    }

    async fn answer_raft(&self, message: Vec<u8>) -> Vec<u8> {
        if self.inner.beginning.load(Ordering::Acquire) {
            return Vec::new();
        }
        let Some(charter) = self.charter().filter(|charter| !self.is_over(*charter)) else { return Vec::new() };
        match self.open_log_of(charter).await {
            Ok(consensus) => {
                let answer = consensus.handle(message.into()).await;
                self.heed_new_leader(&consensus);
                answer
            }
            Err(error) => {
                tracing::error!("cannot take part in the votes: {error}");
                Vec::new()
            }
        }
    }
}

/// Carries the messages of the votes over the mesh.
pub struct OverMesh(pub Quorum);

impl Carrier for OverMesh {
    fn call(
        &self,
        target: NodeId,
        message: Vec<u8>,
        patience: Duration,
    ) -> Pin<Box<dyn Future<Output = Result<Bytes, Unreachable>> + Send>> {
        let quorum = self.0.clone();
        Box::pin(async move {
            quorum.meet_member(target);
            match quorum.call(target, &Request::Raft(message), patience).await {
                Some(Answer::Raft(answer)) if !answer.is_empty() => Ok(answer.into()),
                _ => Err(Unreachable { target, reason: "no answer over the mesh".to_string() }),
            }
        })
    }
}
