//! Which VDIs this gateway may write to: takes writer leases, keeps them, gives them back when asked.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::command::{Command, Outcome, Refusal};
use sheep_core::peer_message::{PeerKind, PeerRequest};
use tokio::sync::Mutex;

use super::WriteError;
use super::fanout;
use super::lease::{Hold, Lease};
use crate::data::Data;

/// How long a request to yield may wait for a connection.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between attempts to get a lease that another gateway does not let go of.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// Between attempts to hold a lease that is about to be given back.
const HOLD_INTERVAL: Duration = Duration::from_millis(1);

/// One entry per VDI that was ever written through this gateway; its lock is held while the lease changes hands.
type Slot = Arc<Mutex<Option<Arc<Lease>>>>;

/// See the module.
#[derive(Default)]
pub struct LeaseTable {
    slots: std::sync::Mutex<HashMap<VdiId, Slot>>,
    /// Leases by VDI for the paths that must not wait.
    held: std::sync::RwLock<HashMap<VdiId, Arc<Lease>>>,
}

impl LeaseTable {
    fn slot(&self, vdi: VdiId) -> Slot {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        slots.entry(vdi).or_default().clone()
    }

    /// The lease of a VDI, if this gateway holds it.
    pub fn held(&self, vdi: VdiId) -> Option<Arc<Lease>> {
        self.held.read().unwrap_or_else(PoisonError::into_inner).get(&vdi).cloned()
    }

    /// All leases held.
    pub fn all(&self) -> Vec<Arc<Lease>> {
        self.held.read().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    fn set_held(&self, vdi: VdiId, lease: Option<Arc<Lease>>) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        match lease {
            Some(lease) => held.insert(vdi, lease),
            None => held.remove(&vdi),
        };
    }

    /// Forgets a lease that turned out to be lost.
    pub fn forget(&self, lease: &Arc<Lease>) {
        let mut held = self.held.write().unwrap_or_else(PoisonError::into_inner);
        if held.get(&lease.vdi).is_some_and(|held| held.generation == lease.generation) {
            held.remove(&lease.vdi);
        }
    }
}

/// The lease of a VDI, taken if this gateway does not hold it.
pub async fn acquire(data: &Data, vdi: VdiId) -> Result<Arc<Lease>, WriteError> {
    if let Some(lease) = data.leases().held(vdi).filter(|lease| !lease.state().closed) {
        return Ok(lease);
    }
    let slot = data.leases().slot(vdi);
    // Whoever closed the lease to drain it holds this until it is given back.
    let mut current = slot.lock().await;
    if let Some(lease) = data.leases().held(vdi).filter(|lease| !lease.state().closed) {
        return Ok(lease);
    }
    if let Some(earlier) = current.take() {
        // Left closed by somebody who could not give it back.
        earlier.drain().await;
    }
    loop {
        let command = Command::AcquireLease { vdi, node: data.node() };
        match data.cluster().propose(command).await {
            Ok(Outcome::Lease(generation)) => {
                // Whoever decides under the lease must see what was ordered before it: the VDI may be a snapshot by now.
                data.await_applied(data.cluster().state().applied).await;
                let lease = Lease::new(vdi, generation);
                *current = Some(lease.clone());
                data.leases().set_held(vdi, Some(lease.clone()));
                return Ok(lease);
            }
            Ok(Outcome::Refused(Refusal::LeaseHeldBy(holder))) => {
                let mut request = PeerRequest::new(PeerKind::YieldLease, data.view().epoch(), data.node());
                request.oid = Oid::inode(vdi);
                let yielded = data.links().call(holder, request, Bytes::new(), PATIENCE).await;
                if yielded.is_err() {
                    // It may be dead: then its eviction frees the lease.
                    data.world().clock.sleep(RETRY_INTERVAL).await;
                }
            }
            Ok(_) => return Err(WriteError::NotRunning),
            Err(error) => {
                tracing::warn!("cannot take the writer lease of VDI {vdi}: {error}");
                return Err(WriteError::Order);
            }
        }
    }
}

/// As `acquire`, and keeps the lease here while the guard lives. For work that ends by itself: whoever else wants the lease
/// waits for it.
pub async fn hold(data: &Data, vdi: VdiId) -> Result<Hold, WriteError> {
    loop {
        if let Some(hold) = acquire(data, vdi).await?.hold() {
            return Ok(hold);
        }
        // It is being given back; `acquire` waits once that is under way.
        data.world().clock.sleep(HOLD_INTERVAL).await;
    }
}

/// Drains and gives back the lease of a VDI, because another gateway asks or this node leaves.
pub async fn give_back(data: &Data, vdi: VdiId) {
    let slot = data.leases().slot(vdi);
    let mut current = slot.lock().await;
    if let Some(lease) = current.take() {
        lease.drain().await;
        fanout::send_mark(data, &lease);
        data.leases().set_held(vdi, None);
    }
    let state = data.cluster().state();
    let Some(granted) = state.leases.get(&vdi.get()).filter(|granted| granted.holder == Some(data.node())) else {
        return;
    };
    let command = Command::ReleaseLease { vdi, node: data.node(), generation: granted.generation };
    if let Err(error) = data.cluster().propose(command).await {
        tracing::warn!("cannot give back the writer lease of VDI {vdi}: {error}");
    }
}

/// Runs `work` while no write of the VDI is under way or can begin, holding its lease. The lease is over afterwards.
pub async fn with_writes_stopped<T, F>(data: &Data, vdi: VdiId, work: F) -> Result<T, WriteError>
where
    F: AsyncFnOnce(u32) -> T,
{
    loop {
        let lease = acquire(data, vdi).await?;
        let slot = data.leases().slot(vdi);
        let mut current = slot.lock().await;
        if current.as_ref().is_none_or(|held| held.generation != lease.generation) {
            continue;
        }
        lease.drain().await;
        if lease.state().lost {
            continue;
        }
        fanout::send_mark(data, &lease);
        let result = work(lease.generation).await;
        *current = None;
        data.leases().set_held(vdi, None);
        let command = Command::ReleaseLease { vdi, node: data.node(), generation: lease.generation };
        if let Err(error) = data.cluster().propose(command).await {
            tracing::warn!("cannot give back the writer lease of VDI {vdi}: {error}");
        }
        return Ok(result);
    }
}
