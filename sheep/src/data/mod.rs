//! Floor 4: the data path. Carries requests to copies and keeps the copies up to date; knows no client protocol.
//!
//! `gateway` is the requesting side, `holder` and `peer` the keeping side, `recovery` what happens after a change of
//! members, `view_change` the one place that reacts to the ordered state. `volumes`, `inode`, `reclaim`, `sweep`, `check`,
//! `flatten`, `shrink`, `throttle` and `flush` are what front ends ask for.

pub mod attributes;
pub mod check;
pub mod client;
pub mod flatten;
pub mod flush;
pub mod gateway;
pub mod holder;
pub mod inode;
pub mod links;
pub mod peer;
pub mod reclaim;
pub mod recovery;
pub mod report;
pub mod shares;
pub mod shrink;
pub mod sweep;
pub mod throttle;
pub mod traffic;
pub mod unflushed;
pub mod view;
pub mod view_change;
pub mod virtual_disk;
pub mod volumes;

use std::collections::BTreeSet;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::{Oid, VdiId};
use sheep_core::member::NodeId;
use sheep_core::peer_message::{PeerKind, PeerRequest, Verdict};
use sheep_core::stamp::Epoch;
use tokio::sync::{Semaphore, SemaphorePermit, watch};

pub use crate::cluster::Administration;
use crate::cluster::Cluster;
use crate::store::Store;
use crate::world::World;
use gateway::lease_table::LeaseTable;
use holder::{Holder, Wanted};
use links::Links;
use recovery::{Progress, Turns};
use throttle::Throttles;
use traffic::Traffic;
use unflushed::Unflushed;
use view::View;

/// Memory of all objects that are copied through a gateway at once, for clones whose holders are not their parent's.
const COPY_BYTES_MAX: u64 = 256 << 20;

/// The data path of one node. Cloning it is cheap.
#[derive(Clone)]
pub struct Data {
    inner: Arc<Inner>,
}

struct Inner {
    world: World,
    cluster: Cluster,
    view: watch::Sender<Arc<View>>,
    /// Nothing on a gateway that stores nothing.
    holder: Option<Arc<Holder>>,
    links: Links,
    leases: LeaseTable,
    progress: Progress,
    traffic: Arc<Traffic>,
    throttles: Throttles,
    unflushed: Unflushed,
    turns: Turns,
    inode_turns: Turns,
    /// Memory for objects that are copied through this gateway.
    copy_room: Semaphore,
    /// See `note_released`.
    released: std::sync::Mutex<BTreeSet<Oid>>,
    /// Objects whose copies were all mended because of a read, and in which epoch: what is damaged still is damaged everywhere.
    mended: std::sync::Mutex<(Epoch, BTreeSet<Oid>)>,
    /// See `note_reclaimed`.
    reclaimed: watch::Sender<BTreeSet<VdiId>>,
    /// Number of the view whose state the store keeps.
    saved: tokio::sync::Mutex<u64>,
}

impl Data {
    /// The data path over a node's part in the order and its store, if it has one. Nothing runs yet; see
    /// [`view_change::start`].
    pub fn new(world: World, cluster: Cluster, store: Option<Store>) -> Data {
        let view = Arc::new(View::new(Arc::new(sheep_core::cluster_state::ClusterState::default()), None));
        let node = cluster.node();
        let holder = store.map(|store| Arc::new(Holder::new(node, store, view.clone())));
        let inner = Inner {
            links: Links::new(world.clone(), cluster.clone()),
            world,
            cluster,
            view: watch::channel(view).0,
            holder,
            leases: LeaseTable::default(),
            progress: Progress::default(),
            traffic: Arc::default(),
            throttles: Throttles::default(),
            unflushed: Unflushed::default(),
            turns: Turns::default(),
            inode_turns: Turns::default(),
            copy_room: Semaphore::new(COPY_BYTES_MAX as usize),
            released: std::sync::Mutex::default(),
            mended: std::sync::Mutex::default(),
            reclaimed: watch::channel(BTreeSet::new()).0,
            saved: tokio::sync::Mutex::new(0),
        };
        Data { inner: Arc::new(inner) }
    }

    /// The doors to the outside.
    pub fn world(&self) -> &World {
        &self.inner.world
    }

    /// The order.
    pub fn cluster(&self) -> &Cluster {
        &self.inner.cluster
    }

    /// Who this node is.
    pub fn node(&self) -> NodeId {
        self.inner.cluster.node()
    }

    /// What is known of the cluster now.
    pub fn view(&self) -> Arc<View> {
        self.inner.view.borrow().clone()
    }

    pub(crate) fn views(&self) -> &watch::Sender<Arc<View>> {
        &self.inner.view
    }

    /// This node's copies; nothing on a gateway that stores nothing.
    pub fn holder(&self) -> Option<&Arc<Holder>> {
        self.inner.holder.as_ref()
    }

    pub(crate) fn links(&self) -> &Links {
        &self.inner.links
    }

    /// The writer leases of this gateway.
    pub fn leases(&self) -> &LeaseTable {
        &self.inner.leases
    }

    /// Figures of recovery on this node.
    pub fn progress(&self) -> &Progress {
        &self.inner.progress
    }

    /// What this node was asked.
    pub fn traffic(&self) -> &Arc<Traffic> {
        &self.inner.traffic
    }

    /// What limits of volumes did here.
    pub fn throttles(&self) -> &Throttles {
        &self.inner.throttles
    }

    pub(crate) fn unflushed(&self) -> &Unflushed {
        &self.inner.unflushed
    }

    pub(crate) fn turns(&self) -> &Turns {
        &self.inner.turns
    }

    /// Waits for the memory that a copy of an object takes on its way through this gateway: what was read and what is written.
    pub(crate) async fn copy_room(&self, object_bytes: u64) -> Option<SemaphorePermit<'_>> {
        let cost = (2 * object_bytes).min(COPY_BYTES_MAX);
        // The semaphore is never closed.
        self.inner.copy_room.acquire_many(cost as u32).await.ok()
    }

    pub(crate) fn saved(&self) -> &tokio::sync::Mutex<u64> {
        &self.inner.saved
    }

    /// Notes that a map stopped naming an object that is not its VDI's own; see `reclaim`.
    pub(crate) fn note_released(&self, oid: Oid) {
        self.inner.released.lock().unwrap_or_else(PoisonError::into_inner).insert(oid);
    }

    /// What was noted since the last call.
    pub(crate) fn take_released(&self) -> BTreeSet<Oid> {
        std::mem::take(&mut *self.inner.released.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Whether a read is the first in an epoch to find all copies of an object damaged.
    pub(crate) fn first_mend(&self, oid: Oid, epoch: Epoch) -> bool {
        let mut mended = self.inner.mended.lock().unwrap_or_else(PoisonError::into_inner);
        if mended.0 != epoch {
            *mended = (epoch, BTreeSet::new());
        }
        mended.1.insert(oid)
    }

    /// Notes that VDIs were reclaimed; see `sweep`.
    pub(crate) fn note_reclaimed(&self, vdis: impl IntoIterator<Item = VdiId>) {
        let mut vdis = vdis.into_iter().peekable();
        if vdis.peek().is_some() {
            self.inner.reclaimed.send_modify(|noted| noted.extend(vdis));
        }
    }

    /// What was noted since the last call.
    pub(crate) fn take_reclaimed(&self) -> BTreeSet<VdiId> {
        let mut taken = BTreeSet::new();
        self.inner.reclaimed.send_if_modified(|noted| {
            taken = std::mem::take(noted);
            false
        });
        taken
    }

    /// Waits until something is noted.
    pub(crate) async fn await_reclaimed(&self) {
        // The sender lives as long as this.
        let _ = self.inner.reclaimed.subscribe().wait_for(|noted| !noted.is_empty()).await;
    }

    pub(crate) fn inode_turns(&self) -> &Turns {
        &self.inner.inode_turns
    }

    /// Waits until the view is another than `seen`, at most `patience`.
    pub(crate) async fn wait_for_change(&self, seen: &View, patience: Duration) {
        let mut views = self.inner.view.subscribe();
        tokio::select! {
            _ = views.wait_for(|view| view.epoch() != seen.epoch()) => {}
            () = self.inner.world.clock.sleep(patience) => {}
        }
    }

    /// Waits until this node has come to an epoch. Nodes learn of an epoch within milliseconds of each other.
    pub(crate) async fn await_epoch(&self, epoch: Epoch) {
        if self.view().epoch() >= epoch {
            return;
        }
        let mut views = self.inner.view.subscribe();
        // The sender lives as long as this.
        let _ = views.wait_for(|view| view.epoch() >= epoch).await;
    }

    /// Waits until the data path has come to everything that the order has here.
    pub async fn settle_in(&self) {
        self.await_applied(self.cluster().state().applied).await;
    }

    /// Waits until the view is as wanted.
    pub async fn await_view(&self, wanted: impl Fn(&View) -> bool) {
        let mut views = self.inner.view.subscribe();
        // The sender lives as long as this.
        let _ = views.wait_for(|view| wanted(view)).await;
    }

    /// Waits as long as the cluster waits for its members after a shutdown, or for a majority: guests notice a pause and no
    /// error.
    pub async fn await_service(&self) {
        self.await_view(|view| !view.state.is_waiting_for_members()).await;
    }

    /// Waits until the view has come to a command that the order has.
    pub(crate) async fn await_applied(&self, applied: u64) {
        let mut views = self.inner.view.subscribe();
        // The sender lives as long as this.
        let _ = views.wait_for(|view| view.state.applied >= applied).await;
    }

    /// Has an object compared and fetched because of a write to it: ahead of its turn if the write waits.
    pub(crate) fn bring_up_to_date(&self, wanted: Wanted, epoch: Epoch) {
        let data = self.clone();
        // Either way: the end of the epoch answers the write.
        match wanted {
            Wanted::Nothing => {}
            Wanted::Now(oid) => drop(tokio::spawn(async move {
                let _ = recovery::ensure_current(&data, oid, epoch).await;
            })),
            Wanted::InTurn(oid) => drop(tokio::spawn(async move {
                let _ = recovery::bring_in_turn(&data, oid, epoch).await;
            })),
        }
    }

    /// Whether a holder is about to run out of space.
    pub(crate) fn is_full(&self, holders: &[NodeId]) -> bool {
        holders.iter().any(|node| {
            if *node == self.node() {
                self.holder().is_some_and(|holder| holder.is_nearly_full())
            } else {
                self.links().get(*node).is_some_and(|link| link.is_nearly_full())
            }
        })
    }

    /// Replaces this node's damaged copy by another node's.
    pub(crate) async fn repair_here(&self, oid: Oid, epoch: Epoch) -> bool {
        let Some(holder) = self.holder() else { return false };
        holder.distrust(oid);
        // The end of the epoch leaves the object suspect: the next run compares it.
        recovery::ensure_current(self, oid, epoch).await.is_ok()
    }

    /// Has a node replace its damaged copy, and waits for it; tells whether it was done.
    pub(crate) async fn repair_on(&self, node: NodeId, oid: Oid, epoch: Epoch) -> bool {
        if node == self.node() {
            return self.repair_here(oid, epoch).await;
        }
        let mut request = PeerRequest::new(PeerKind::Repair, epoch, self.node());
        request.oid = oid;
        // A node that cannot be reached leaves the epoch, and is compared when it comes back.
        let answer = self.links().call(node, request, Bytes::new(), Duration::from_secs(2)).await;
        answer.is_ok_and(|(answer, _)| answer.verdict == Verdict::Ok)
    }

    /// Has a node replace its damaged copy, without waiting for it.
    pub(crate) fn ask_repair(&self, node: NodeId, oid: Oid, epoch: Epoch) {
        if node == self.node() {
            let data = self.clone();
            tokio::spawn(async move { data.repair_here(oid, epoch).await });
        } else if let Some(link) = self.links().get(node) {
            let mut request = PeerRequest::new(PeerKind::Repair, epoch, self.node());
            request.oid = oid;
            link.send(request, Bytes::new(), Box::new(|_| {}));
        }
    }
}
