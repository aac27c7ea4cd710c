//! Which VDIs this gateway may write to: takes writer leases, keeps them, passes them on when asked.
//!
//! A lease that another gateway holds is asked for there: the holder serves those who ask in the order they came, drains, and
//! passes it on with one command. Each holder keeps it for a moment at least, so that whoever waited gets something done.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::command::{Command, Outcome, Refusal};
use sheep_core::member::NodeId;
use sheep_core::peer_message::{PeerKind, PeerRequest};
use tokio::sync::Mutex;

use super::WriteError;
use super::fanout;
use super::lease::{Hold, Lease};
use crate::data::Data;
use crate::world::marks::{self, Mark};
use crate::world::planted::{self, Bug};

/// How long a request to yield may wait for a connection.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between attempts to get a lease that another gateway does not let go of.
const RETRY_INTERVAL: Duration = Duration::from_millis(20);

/// A lease is kept at least this long for the writes that waited for it: longer than they take to be sent, much shorter than
/// anybody who asks for it would notice.
const TENURE: Duration = Duration::from_millis(3);
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
        if let Some(holder) = holder_elsewhere(data, vdi) {
            ask_for(data, vdi, holder).await;
            if let Some(generation) = passed_on_to_here(data, vdi) {
                return Ok(begin(data, vdi, generation, true, &mut current).await);
            }
            continue;
        }
        let command = Command::AcquireLease { vdi, node: data.node() };
        match data.cluster().propose(command).await {
            Ok(Outcome::Lease(generation)) => return Ok(begin(data, vdi, generation, false, &mut current).await),
            // Somebody was faster: the state says who.
            Ok(Outcome::Refused(Refusal::LeaseHeldBy(_))) => {}
            // A node that was taken out waits until it is in again: its clients must not notice.
            Ok(Outcome::Refused(Refusal::NoEffect | Refusal::Waiting)) if data.cluster().state().needs_majority => {
                data.world().clock.sleep(RETRY_INTERVAL).await;
            }
            Ok(_) => return Err(WriteError::NotRunning),
            Err(error) => {
                tracing::warn!("cannot take the writer lease of VDI {vdi}: {error}");
                return Err(WriteError::Order);
            }
        }
    }
}

/// The lease of a VDI, if this gateway holds it in this generation and writes may begin under it.
pub fn held_as(data: &Data, vdi: VdiId, generation: u32) -> Option<Arc<Lease>> {
    data.leases().held(vdi).filter(|lease| lease.generation == generation && !lease.state().closed)
}

/// Another member that holds the lease, as far as is known here.
fn holder_elsewhere(data: &Data, vdi: VdiId) -> Option<NodeId> {
    let state = data.cluster().state();
    let holder = state.leases.get(&vdi.get())?.holder?;
    (holder != data.node() && state.members.contains_key(&holder)).then_some(holder)
}

/// The generation of a lease that its holder has passed on to this node.
fn passed_on_to_here(data: &Data, vdi: VdiId) -> Option<u32> {
    let state = data.cluster().state();
    let lease = state.leases.get(&vdi.get())?;
    (lease.holder == Some(data.node())).then_some(lease.generation)
}

/// Asks the holder to pass the lease on, and waits until it did or somebody else has it.
async fn ask_for(data: &Data, vdi: VdiId, holder: NodeId) {
    let mut request = PeerRequest::new(PeerKind::YieldLease, data.view().epoch(), data.node());
    request.oid = Oid::inode(vdi);
    let asked = async {
        if data.links().call(holder, request, Bytes::new(), PATIENCE).await.is_err() {
            tracing::debug!("node {holder}, which has the lease of VDI {vdi}, was not reached");
        }
        // The answer may be here before the state that it is about; or the holder is dead, and its eviction frees the lease.
        data.world().clock.sleep(RETRY_INTERVAL).await;
    };
    let mut states = data.cluster().watch();
    // Two gateways may each think that the other one has it; whoever is behind learns better here.
    let moved_on = states.wait_for(|state| {
        let lease = state.leases.get(&vdi.get());
        lease.is_none_or(|lease| lease.holder != Some(holder)) || !state.members.contains_key(&holder)
    });
    tokio::select! {
        () = asked => {}
        // The sender lives as long as this.
        _ = moved_on => {}
    }
}

/// The lease is this gateway's from here on.
async fn begin(
    data: &Data,
    vdi: VdiId,
    generation: u32,
    is_passed_on: bool,
    current: &mut Option<Arc<Lease>>,
) -> Arc<Lease> {
    // Whoever decides under the lease must see what was ordered before it: the VDI may be a snapshot by now.
    data.await_applied(data.cluster().state().applied).await;
    let lease = Lease::new(vdi, generation, data.world().clock.monotonic(), is_passed_on);
    *current = Some(lease.clone());
    data.leases().set_held(vdi, Some(lease.clone()));
    lease
}

/// Drains the lease of a VDI and passes it on to a gateway that asks for it. Those who ask are served in the order they
/// came. False if this node does not hold it (any more).
pub async fn hand_over(data: &Data, vdi: VdiId, to: NodeId) -> bool {
    let slot = data.leases().slot(vdi);
    let mut current = slot.lock().await;
    let state = data.cluster().state();
    let Some(granted) = state.leases.get(&vdi.get()).filter(|granted| granted.holder == Some(data.node())) else {
        return false;
    };
    if let Some(lease) = current.take() {
        let rest = (lease.since + TENURE).saturating_sub(data.world().clock.monotonic());
        if !rest.is_zero() {
            data.world().clock.sleep(rest).await;
        }
        if !planted::is(Bug::OldLease) {
            lease.drain().await;
        }
        fanout::send_mark(data, &lease);
        data.leases().set_held(vdi, None);
    }
    let command = Command::HandOverLease { vdi, node: data.node(), generation: granted.generation, to };
    match data.cluster().propose(command).await {
        Ok(Outcome::Refused(_)) => false,
        Ok(_) => {
            marks::hit(Mark::LeaseHandedOver);
            true
        }
        Err(error) => {
            tracing::warn!("cannot pass on the writer lease of VDI {vdi}: {error}");
            false
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

/// Drains and gives back the lease of a VDI, because this node leaves.
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
        if !planted::is(Bug::UndrainedSnapshot) {
            lease.drain().await;
        }
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
