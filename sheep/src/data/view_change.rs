//! Reacts to the ordered state: one place, one order of steps.
//!
//! For every new state: links follow the members; copies enter the epoch (from here on nothing older is accepted); the view
//! is published; writes under way are sent again in the new epoch; recovery begins. Whatever a step needs of an earlier
//! one is done by then.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::VdiId;
use sheep_core::admission::Admission;
use sheep_core::cluster_state::ClusterState;
use sheep_core::peer_message::{PeerKind, PeerRequest};
use sheep_core::stamp::Epoch;

use super::Data;
use super::gateway::fanout;
use super::view::View;
use super::{reclaim, recovery, sweep, throttle};
use crate::world::net::Listener;

/// Between attempts to keep the state of a cluster that this node has just come into.
const SAVE_AGAIN: Duration = Duration::from_secs(1);
/// How often full nodes are asked whether they still are, and parked writes are tried again.
const SPACE_INTERVAL: Duration = Duration::from_secs(1);

/// Starts everything that runs by itself, and takes other nodes' connections.
pub fn start(data: &Data, listener: Box<dyn Listener>) {
    tokio::spawn(super::peer::listen(data.clone(), listener));
    tokio::spawn(follow(data.clone()));
    tokio::spawn(follow_links(data.clone()));
    tokio::spawn(watch_space(data.clone()));
    tokio::spawn(keep_saved(data.clone()));
}

/// Rounds of [`SPACE_INTERVAL`] after which the space of removed objects comes back even though nothing needs it.
const CHECKPOINT_ROUNDS: u64 = 15;

async fn follow(data: Data) {
    let mut states = data.cluster().watch();
    loop {
        let state = states.borrow_and_update().clone();
        enter(&data, state).await;
        if states.changed().await.is_err() {
            return;
        }
    }
}

async fn enter(data: &Data, state: Arc<ClusterState>) {
    let previous = data.view();
    if previous.state.applied == state.applied
        && previous.state.epoch == state.epoch
        && previous.state.phase == state.phase
    {
        return;
    }
    let view = Arc::new(View::new(state, Some(&previous)));
    data.links().follow(&view);
    data.unflushed().follow(&previous.state, &view.state);
    let mut epoch_changed = previous.epoch() != view.epoch();
    if let Some(holder) = data.holder() {
        let formatted = view.state.cluster_id != previous.state.cluster_id;
        // At the first state after a start the store may be full: only a format since then empties it.
        // What is shown before this process has joined may be older than what the store has seen.
        let joined = view.state.epoch != Epoch(0);
        if formatted && joined && !belongs(data, &view.state).await {
            holder.wipe().await;
        }
        if formatted && joined {
            // Before anything is written for this cluster: objects without a state would be taken for another cluster's.
            while !save(data, &view).await {
                data.world().clock.sleep(SAVE_AGAIN).await;
            }
        }
        epoch_changed |= holder.enter(view.clone());
    }
    data.views().send_replace(view.clone());
    throttle::follow(data);
    close_lost_leases(data, &view, view.state.cluster_id != previous.state.cluster_id);
    if epoch_changed {
        for lease in data.leases().all() {
            let mut state = lease.state();
            if state.epoch < view.epoch() && !state.under_way.is_empty() {
                fanout::resend_all(data, &lease, &mut state, &view);
            }
        }
    }
    // After an orderly stop of everybody the epoch goes on: it is the start of serving then that begins the comparison.
    if view.state.is_running() && (epoch_changed || !previous.state.is_running()) {
        tokio::spawn(recovery::run(data.clone(), view.epoch()));
    }
    reclaim::start_if_due(data, &view);
    let reclaimed = previous.state.to_reclaim.difference(&view.state.to_reclaim);
    data.note_reclaimed(reclaimed.filter_map(|vdi| VdiId::new(*vdi)));
    // Once more after an orderly stop, when all have looked again.
    let is_done = |state: &ClusterState| state.is_running() && state.clean == state.epoch && state.has_recovered();
    if is_done(&view.state) && !(is_done(&previous.state) && previous.epoch() == view.epoch()) {
        tokio::spawn(sweep::run(data.clone(), view.epoch()));
    }
}

/// Whether what the store holds, if anything, is of this cluster: only what a format has replaced is given up.
async fn belongs(data: &Data, now: &ClusterState) -> bool {
    let Some(holder) = data.holder() else { return false };
    let kept = holder.store().load_state().await;
    match kept.map(|kept| kept.map(|bytes| postcard::from_bytes::<ClusterState>(&bytes))) {
        Ok(Some(Ok(kept))) => kept.cluster_id != 0 && !now.replaced.contains(&kept.cluster_id),
        // Objects come only after the state was saved.
        Ok(None) => holder.store().object_count() == 0,
        // It could be read when the node started. Emptying the store because of it is the last thing to do.
        Ok(Some(Err(error))) => {
            holder.fail(format!("the store's copy of the cluster's state is damaged: {error}"));
            true
        }
        Err(error) => {
            holder.fail(format!("the store's copy of the cluster's state cannot be read: {error}"));
            true
        }
    }
}

/// Keeps the newest state in the store; a burst of changes is saved once.
async fn keep_saved(data: Data) {
    let mut views = data.views().subscribe();
    while views.changed().await.is_ok() {
        let view = views.borrow_and_update().clone();
        save(&data, &view).await;
    }
}

/// Keeps the state for the next start; gives whether it, or a newer one, is kept. A crash before leaves an older one, which the
/// others' newer one replaces.
async fn save(data: &Data, view: &View) -> bool {
    let Some(holder) = data.holder() else { return true };
    if view.state.epoch == Epoch(0) {
        return true;
    }
    let mut saved = data.saved().lock().await;
    // Whoever comes late must not put an older state over a newer one.
    if *saved > view.number {
        return true;
    }
    // The driver keeps the cluster key, where only its owner can read it.
    let kept = ClusterState { admission: Admission::default(), ..ClusterState::clone(&view.state) };
    let bytes = postcard::to_allocvec(&kept).expect("the state's types have no unserialisable values");
    match holder.store().save_state(bytes).await {
        Ok(()) => *saved = view.number,
        Err(error) => tracing::error!("cannot keep the cluster's state in the store: {error}"),
    }
    *saved == view.number
}

/// A lease that the state gives to somebody else, or to nobody, is over; so are all those of a cluster that was formatted
/// anew.
fn close_lost_leases(data: &Data, view: &View, formatted: bool) {
    for lease in data.leases().all() {
        let granted = view.state.leases.get(&lease.vdi.get());
        let ours = granted.is_some_and(|g| g.generation <= lease.generation && g.holder == Some(data.node()));
        let not_seen_yet = granted.is_none_or(|granted| granted.generation < lease.generation);
        if formatted || (!ours && !not_seen_yet) {
            fanout::lose(data, &lease, &mut lease.state());
        }
    }
}

/// Sends again over links that came up what the ones before did not answer.
async fn follow_links(data: Data) {
    let mut ups = data.links().ups();
    while ups.changed().await.is_ok() {
        let nodes: Vec<_> = data.view().state.members.keys().copied().collect();
        for lease in data.leases().all() {
            let mut state = lease.state();
            for node in nodes.iter().filter(|node| **node != data.node()) {
                if state.under_way.values().any(|write| write.waiting.contains(node)) {
                    fanout::resend_over_new_link(&data, &lease, &mut state, *node);
                }
            }
            drop(state);
            // The last mark may have been lost with the link before.
            fanout::send_mark(&data, &lease);
        }
    }
}

async fn watch_space(data: Data) {
    for round in 1_u64.. {
        data.world().clock.sleep(SPACE_INTERVAL).await;
        if let Some(holder) = data.holder() {
            if holder.store().has_removals() && (holder.is_nearly_full() || round % CHECKPOINT_ROUNDS == 0) {
                // What was removed takes space until then.
                if let Err(error) = holder.store().checkpoint().await {
                    tracing::warn!("cannot give space back yet: {error}");
                }
            }
            holder.store().refresh_space().await;
            holder.retry_parked();
        }
        let view = data.view();
        // A run that failed, or met the end of the one before, is begun again.
        reclaim::start_if_due(&data, &view);
        let releasing = data.clone();
        tokio::spawn(async move { reclaim::release_noted(&releasing).await });
        for node in view.state.members.keys() {
            if let Some(link) = data.links().get(*node).filter(|link| link.is_nearly_full()) {
                link.send(
                    PeerRequest::new(PeerKind::Report, view.epoch(), data.node()),
                    Bytes::new(),
                    Box::new(|_| {}),
                );
            }
        }
    }
}
