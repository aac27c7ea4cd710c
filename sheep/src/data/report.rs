//! What this node and the cluster do and wait for, for people.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use sheep_core::cluster_state::Phase;

use super::Data;

impl Data {
    /// Sentences that say what is waited for and what to do; empty when nothing is.
    pub fn waiting_for(&self) -> Vec<String> {
        let view = self.view();
        let mut sentences = Vec::new();
        match &view.state.phase {
            Phase::Unformatted => sentences.push("format the cluster: dog cluster format".to_string()),
            Phase::Waiting { missing, .. } => {
                for node in missing {
                    sentences.push(format!(
                        "start node {node}, a member of the last epoch, or go on without it: dog cluster recover force"
                    ));
                }
            }
            Phase::Running | Phase::Shutdown => {}
        }
        let (zones, copies) = (view.state.zone_count(), view.state.settings.copies.now());
        if view.state.is_running() && zones < usize::from(copies) {
            sentences.push(format!(
                "{zones} zones store data, fewer than the {copies} copies wanted: objects have {zones} copies until nodes in \
                 other zones (-z) join"
            ));
        }
        if view.state.is_running() && zones < usize::from(view.state.min_copies(copies)) {
            sentences.push(format!(
                "writes to volumes of {copies} copies wait: one copy alone is not enough; start a node of another zone (or go on \
                 without: dog cluster recover force)"
            ));
        }
        let blocked = *self.progress().blocked.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((oid, epoch)) = blocked
            && self.holder().is_some_and(|holder| !holder.is_current(oid))
        {
            sentences.push(format!(
                "object {oid} waits for a node that held it in epoch {epoch}: start it, or give it up with dog cluster \
                 recover force"
            ));
        }
        if self.holder().is_some_and(|holder| holder.is_nearly_full()) {
            sentences.push("this node's disk is full: writes are refused until there is space".to_string());
        }
        sentences
    }

    /// The figures of this node.
    pub fn report_here(&self) -> String {
        let progress = self.progress();
        let store = self.holder().map(|holder| holder.store());
        format!(
            "recovering={} done={} total={} fetched={} objects={} {}",
            u8::from(progress.running.load(Ordering::Relaxed)),
            progress.done.load(Ordering::Relaxed),
            progress.total.load(Ordering::Relaxed),
            progress.fetched.load(Ordering::Relaxed),
            store.map_or(0, crate::store::Store::object_count),
            super::shares::told(store),
        )
    }
}
