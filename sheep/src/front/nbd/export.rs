//! Which volume an export name means: `NAME` a working VDI, `NAME@TAG` a snapshot (by tag or number), `NAME@TAG+` a
//! throw-away writable overlay of a snapshot. A working VDI whose own name has an `@` in it comes first.

use std::sync::Arc;

use sheep_core::cluster_state::ClusterState;
use sheep_core::command::NewVdi;
use sheep_core::vdi::Vdi;
use sheep_core::vdi_name::Target;

use crate::data::Data;
use crate::data::virtual_disk::VirtualDisk;
use crate::data::volumes::{self, VolumeError};

/// An open export.
pub struct Export {
    /// What it reads and writes.
    pub disk: VirtualDisk,
    /// Its name as asked for.
    pub name: Vec<u8>,
    overlay: Option<Overlay>,
}

/// A clone that goes with its connection.
struct Overlay {
    data: Data,
    name: Vec<u8>,
}

impl Drop for Overlay {
    fn drop(&mut self) {
        let (data, name) = (self.data.clone(), std::mem::take(&mut self.name));
        // At the end of the process there is nothing left to run it: the next start deletes the overlay.
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(async move { delete_overlay(&data, &name).await });
        }
    }
}

async fn delete_overlay(data: &Data, name: &[u8]) {
    if let Err(error) = volumes::delete_vdi(data, name, b"", 0).await {
        let shown = String::from_utf8_lossy(name);
        tracing::warn!("cannot delete the overlay {shown} ({error}); the next start of this node does");
    }
}

/// How this node's overlays are called: nobody else makes such names.
fn overlay_prefix(data: &Data) -> String {
    format!(".overlay-{}-", data.node())
}

/// The overlays that an earlier process of this node left behind; asked before this one makes any.
pub fn left_overlays(data: &Data) -> Vec<Vec<u8>> {
    let prefix = overlay_prefix(data);
    let view = data.view();
    let left = view.state.vdis.values().filter(|vdi| !vdi.deleted && vdi.name.starts_with(prefix.as_bytes()));
    left.map(|vdi| vdi.name.clone()).collect()
}

/// Deletes them as soon as the cluster serves.
pub async fn delete_overlays(data: Data, names: Vec<Vec<u8>>) {
    let mut states = data.cluster().watch();
    // The driver lives as long as the node.
    let _ = states.wait_for(|state| state.is_running()).await;
    for name in names {
        delete_overlay(&data, &name).await;
    }
}

/// A tag as people write it: a number means a snapshot's number if no tag is called so.
fn target_of<'a>(state: &ClusterState, name: &[u8], tag: &'a [u8]) -> Target<'a> {
    if state.lookup(name, Target::new(tag, 0)).is_ok() {
        return Target::new(tag, 0);
    }
    let number = std::str::from_utf8(tag).ok().and_then(|text| text.parse().ok()).unwrap_or(0);
    if number == 0 { Target::new(tag, 0) } else { Target::new(&[], number) }
}

/// Opens what a name means.
pub async fn open(data: &Data, name: &[u8]) -> Result<Arc<Export>, VolumeError> {
    let export = |disk, overlay| Arc::new(Export { disk, name: name.to_vec(), overlay });
    let working = VirtualDisk::open(data, name, Target::Current).await;
    let is_between = |at: &usize| (1..name.len() - 1).contains(at);
    let at = name.iter().rposition(|byte| *byte == b'@').filter(is_between);
    let (Err(VolumeError::Refused(_)), Some(at)) = (&working, at) else { return Ok(export(working?, None)) };
    let (volume, tag) = (&name[..at], &name[at + 1..]);
    let state = data.view().state.clone();
    if let Ok(disk) = VirtualDisk::open(data, volume, target_of(&state, volume, tag)).await {
        return Ok(export(disk, None));
    }
    let Some(tag) = tag.strip_suffix(b"+") else { return Ok(export(working?, None)) };
    let base = volumes::lookup(data, volume, target_of(&state, volume, tag)).await?.id;
    // Random: what an earlier process left behind has other names.
    let clone = format!("{}{:016x}", overlay_prefix(data), data.world().rng.next_u64());
    let size_bytes = data.view().state.vdis.get(&base.get()).map_or(0, |vdi| vdi.size_bytes);
    let request = NewVdi {
        name: clone.clone().into_bytes(),
        size_bytes,
        base: Some(base),
        snapshot: false,
        copies: 0,
        object_size_shift: 0,
        time: data.world().clock.wall().to_wire(),
        drained: None,
    };
    volumes::new_vdi(data, request).await?;
    let overlay = Overlay { data: data.clone(), name: clone.clone().into_bytes() };
    Ok(export(VirtualDisk::open(data, clone.as_bytes(), Target::Current).await?, Some(overlay)))
}

/// Names of all exports but the overlays.
pub fn list(state: &ClusterState) -> Vec<Vec<u8>> {
    let shown = |vdi: &&Arc<Vdi>| !vdi.deleted && !vdi.is_being_restored() && !vdi.name.starts_with(b".overlay-");
    state.vdis.values().filter(shown).map(|vdi| name_of(vdi)).collect()
}

fn name_of(vdi: &Vdi) -> Vec<u8> {
    let mut name = vdi.name.clone();
    if vdi.is_snapshot() {
        name.push(b'@');
        if vdi.tag.is_empty() {
            name.extend_from_slice(vdi.snapshot_id.to_string().as_bytes());
        } else {
            name.extend_from_slice(&vdi.tag);
        }
    }
    name
}

impl Export {
    /// Whether it is a throw-away overlay of a snapshot.
    pub fn is_overlay(&self) -> bool {
        self.overlay.is_some()
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.disk.is_snapshot()
    }

    /// A sentence for people.
    pub fn description(&self) -> &'static str {
        match (&self.overlay, self.disk.is_snapshot()) {
            (Some(_), _) => "throw-away overlay of a snapshot",
            (None, true) => "snapshot",
            (None, false) => "volume",
        }
    }
}
