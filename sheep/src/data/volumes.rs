//! Volumes as clients see them: made, looked up and deleted by ordered commands; their objects written by the rules that
//! serve QEMU's driver better than its own server did (protocol.md sections 6 and 9).

use std::pin::Pin;

use bytes::{Bytes, BytesMut};
use qemu_proto::oid::{ObjectKind, Oid, VdiId};
use sheep_core::command::{Command, NewVdi, Outcome, Refusal, VdiEdit};
use sheep_core::level::Level;
use sheep_core::limits::Limits;
use sheep_core::vdi_name::Target;
use tokio::sync::SemaphorePermit;

use super::Data;
use super::client::Client;
use super::gateway::lease::Lease;
use super::gateway::write::{Base, ObjectWrite, Tries, may_begin, write, write_under};
use super::gateway::{ReadFailure, WriteError, lease_table, read};
use super::inode::{self, InodeError};

/// Bytes of an object that are read at once to copy it.
const PIECE_BYTES: u64 = 4 << 20;

/// How often a group of snapshots is tried when other nodes take its volumes in the middle.
const TOGETHER_ATTEMPTS: u32 = 8;

/// Why an operation on a volume was not done.
#[derive(Clone, Copy, PartialEq, Eq, Debug, thiserror::Error)]
pub enum VolumeError {
    /// The ordered state refused.
    #[error("refused: {0:?}")]
    Refused(Refusal),
    /// Writes could not be stopped, or a write failed.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// A read failed.
    #[error(transparent)]
    Read(#[from] ReadFailure),
    /// The cluster's order cannot be reached.
    #[error("the cluster's order cannot be reached")]
    Order,
}

impl From<InodeError> for VolumeError {
    fn from(error: InodeError) -> VolumeError {
        match error {
            InodeError::Read(error) => error.into(),
            InodeError::Write(error) => error.into(),
            InodeError::ReadOnly => VolumeError::Refused(Refusal::ReadOnly),
            InodeError::Missing | InodeError::Invalid => VolumeError::Refused(Refusal::NoVdi),
        }
    }
}

/// What a lookup found.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Found {
    /// The VDI.
    pub id: VdiId,
    /// Its copies.
    pub copies: u8,
    /// log2 of its object size.
    pub object_size_shift: u8,
}

/// Looks a VDI up as of everything that was ordered before the call.
pub async fn lookup(data: &Data, name: &[u8], target: Target<'_>) -> Result<Found, VolumeError> {
    let state = data.cluster().barrier().await.map_err(|error| {
        tracing::warn!("cannot look a VDI up: {error}");
        VolumeError::Order
    })?;
    if state.phase == sheep_core::cluster_state::Phase::Unformatted {
        return Err(VolumeError::Refused(Refusal::NotFormatted));
    }
    let id = state.lookup(name, target).map_err(VolumeError::Refused)?;
    data.await_applied(state.applied).await;
    describe(&state, id)
}

fn describe(state: &sheep_core::cluster_state::ClusterState, id: VdiId) -> Result<Found, VolumeError> {
    let vdi = state.vdis.get(&id.get()).ok_or(VolumeError::Refused(Refusal::NoVdi))?;
    Ok(Found { id, copies: vdi.copies.now(), object_size_shift: vdi.object_size_shift })
}

async fn propose(data: &Data, command: Command) -> Result<VdiId, VolumeError> {
    match data.cluster().propose(command).await {
        Ok(Outcome::Vdi(id)) => {
            data.await_applied(data.cluster().state().applied).await;
            Ok(id)
        }
        Ok(Outcome::Refused(refusal)) => Err(VolumeError::Refused(refusal)),
        Ok(Outcome::Done | Outcome::Lease(_)) => Err(VolumeError::Refused(Refusal::NoEffect)),
        Err(error) => {
            tracing::warn!("cannot order a change of volumes: {error}");
            Err(VolumeError::Order)
        }
    }
}

/// Makes a volume, a clone, or (with `snapshot`) turns the working VDI into a snapshot and gives its successor. A client that
/// takes another VDI than that for the working one is behind, and told to look again: a successor of what it names would take
/// back what was written since.
pub async fn new_vdi(data: &Data, mut request: NewVdi) -> Result<Found, VolumeError> {
    let id = if request.snapshot {
        let current = lookup(data, &request.name, Target::Current).await?.id;
        if request.base.is_some_and(|base| base != current) {
            return Err(VolumeError::Refused(Refusal::LeaseLost));
        }
        let node = data.node();
        lease_table::with_writes_stopped(data, current, async |generation| {
            request.drained = Some((node, generation));
            // It may have grown since the client looked.
            let size_bytes = data.view().state.live_vdi(current).map_or(0, |vdi| vdi.size_bytes);
            request.size_bytes = request.size_bytes.max(size_bytes);
            propose(data, Command::NewVdi(request)).await
        })
        .await??
    } else {
        refuse_smaller(data, &request).await?;
        propose(data, Command::NewVdi(request)).await?
    };
    describe(&data.cluster().state(), id)
}

/// A clone begins with the map of its base: grown later, one that was smaller would show what the base had there.
async fn refuse_smaller(data: &Data, request: &NewVdi) -> Result<(), VolumeError> {
    let Some(base) = request.base else { return Ok(()) };
    let state = data.cluster().barrier().await.map_err(|_| VolumeError::Order)?;
    match state.live_vdi(base) {
        Some(base) if request.size_bytes < base.size_bytes => {
            tracing::info!(
                "a clone of {} bytes was asked for, of a snapshot of {}",
                request.size_bytes,
                base.size_bytes
            );
            Err(VolumeError::Refused(Refusal::InvalidParameters))
        }
        _ => Ok(()),
    }
}

/// Makes snapshots of several working VDIs, of one moment: no write to any of them is under way when they are made.
pub async fn snapshot_together(data: &Data, names: &[Vec<u8>], tag: &[u8], time: u64) -> Result<(), VolumeError> {
    for _ in 0..TOGETHER_ATTEMPTS {
        let mut members = Vec::new();
        for name in names {
            members.push((lookup(data, name, Target::Current).await?.id, name.clone()));
        }
        // Two groups that share volumes stop them in the same order.
        members.sort();
        members.dedup();
        match stop_and_snapshot(data, &members, Vec::new(), tag, time).await {
            // Another node took one of them meanwhile, or made a snapshot of it.
            Err(VolumeError::Refused(Refusal::LeaseLost)) => {}
            other => return other,
        }
    }
    Err(VolumeError::Refused(Refusal::LeaseLost))
}

/// Stops one after the other, with those before it stopped already; then orders it.
fn stop_and_snapshot<'a>(
    data: &'a Data,
    members: &'a [(VdiId, Vec<u8>)],
    stopped: Vec<NewVdi>,
    tag: &'a [u8],
    time: u64,
) -> Pin<Box<dyn Future<Output = Result<(), VolumeError>> + Send + 'a>> {
    Box::pin(async move {
        let Some(((vdi, name), rest)) = members.split_first() else {
            if let [one] = &stopped[..]
                && data.cluster().state().level < Level::VOLUME_CHANGES
            {
                return snapshot_with_tag(data, one, tag).await;
            }
            let command = Command::SnapshotTogether { members: stopped, tag: tag.to_vec() };
            return order(data, command).await;
        };
        let node = data.node();
        lease_table::with_writes_stopped(data, *vdi, async move |generation| {
            let size_bytes = data.view().state.live_vdi(*vdi).ok_or(VolumeError::Refused(Refusal::NoVdi))?.size_bytes;
            let mut stopped = stopped.clone();
            stopped.push(NewVdi {
                name: name.clone(),
                size_bytes,
                base: Some(*vdi),
                snapshot: true,
                copies: 0,
                object_size_shift: 0,
                time,
                drained: Some((node, generation)),
            });
            stop_and_snapshot(data, rest, stopped, tag, time).await
        })
        .await?
    })
}

/// One snapshot in two steps that nodes of every level understand. A daily snapshot must neither fail while nodes are updated
/// nor keep them from going back. The lease keeps other snapshots from giving another tag in between.
async fn snapshot_with_tag(data: &Data, stopped: &NewVdi, tag: &[u8]) -> Result<(), VolumeError> {
    let state = data.cluster().barrier().await.map_err(|_| VolumeError::Order)?;
    if !tag.is_empty() && state.lookup(&stopped.name, Target::new(tag, 0)).is_ok() {
        return Err(VolumeError::Refused(Refusal::VdiExists));
    }
    let vdi = stopped.base.ok_or(VolumeError::Refused(Refusal::NoVdi))?;
    if state.lookup(&stopped.name, Target::Current) != Ok(vdi) {
        // Somebody was faster: it is a snapshot with a tag of its own.
        return Err(VolumeError::Refused(Refusal::LeaseLost));
    }
    let edit = VdiEdit { tag: Some(tag.to_vec()), ..VdiEdit::default() };
    propose(data, Command::EditVdi { vdi, edit }).await?;
    propose(data, Command::NewVdi(stopped.clone())).await.map(drop)
}

/// Gives a volume and its snapshots another name.
pub async fn rename(data: &Data, name: &[u8], to: &[u8]) -> Result<(), VolumeError> {
    order(data, Command::RenameVdi { name: name.to_vec(), to: to.to_vec() }).await
}

/// Changes how fast clients may use a volume.
pub async fn limit(data: &Data, name: &[u8], limits: Option<Limits>) -> Result<(), VolumeError> {
    order(data, Command::LimitVdi { name: name.to_vec(), limits }).await
}

/// Orders what has no VDI to tell.
async fn order(data: &Data, command: Command) -> Result<(), VolumeError> {
    match data.cluster().propose(command).await {
        Ok(Outcome::Refused(refusal)) => Err(VolumeError::Refused(refusal)),
        Ok(_) => {
            data.settle_in().await;
            Ok(())
        }
        Err(error) => {
            tracing::warn!("cannot order a change of volumes: {error}");
            Err(VolumeError::Order)
        }
    }
}

/// Deletes a working VDI or a snapshot; its space comes back in the background.
pub async fn delete_vdi(data: &Data, name: &[u8], tag: &[u8], snapshot_id: u32) -> Result<VdiId, VolumeError> {
    propose(data, Command::DeleteVdi { name: name.to_vec(), tag: tag.to_vec(), snapshot_id }).await
}

/// Makes a VDI that no name finds, a copy of `request.base`: what is written into it becomes a snapshot at once, with
/// [`finish_restore`], or goes away.
pub async fn begin_restore(data: &Data, request: NewVdi) -> Result<Found, VolumeError> {
    let id = propose(data, Command::BeginRestore(request)).await?;
    describe(&data.cluster().state(), id)
}

/// Makes what was begun the newest snapshot of its name.
pub async fn finish_restore(data: &Data, vdi: VdiId, time: u64) -> Result<Found, VolumeError> {
    if data.view().state.live_vdi(vdi).is_none_or(|vdi| !vdi.is_being_restored()) {
        return Err(VolumeError::Refused(Refusal::NoVdi));
    }
    let node = data.node();
    let id = lease_table::with_writes_stopped(data, vdi, async |generation| {
        propose(data, Command::FinishRestore { vdi, node, generation, time }).await
    })
    .await??;
    describe(&data.cluster().state(), id)
}

/// Deletes what was begun; its space comes back in the background.
pub async fn give_up_restore(data: &Data, vdi: VdiId) -> Result<VdiId, VolumeError> {
    propose(data, Command::GiveUpRestore { vdi }).await
}

/// A client's creation of an object with some bytes in it.
#[derive(Clone, Debug)]
pub struct Creation {
    /// Which.
    pub oid: Oid,
    /// Bytes into it.
    pub offset: u64,
    /// What to put there.
    pub payload: Bytes,
    /// What the rest is a copy of; zeros if nothing.
    pub source: Option<Oid>,
    /// Whether it must be durable when done.
    pub durable: bool,
    /// Whether an object that has to be made must be durable then, whatever the bytes must be.
    pub durably_made: bool,
    /// Who asked for it.
    pub client: Client,
}

impl Creation {
    /// The bytes alone, into an object that is there.
    pub fn over(&self) -> ObjectWrite {
        ObjectWrite {
            oid: self.oid,
            offset: self.offset,
            data: self.payload.clone(),
            base: Base::Existing,
            durable: self.durable,
            client: self.client.clone(),
        }
    }
}

/// Creates an object, unless the map says that it is there already: then the client's map is stale (a migrated guest) or the
/// request came twice, and only its bytes are written (protocol.md section 9.2, bug 2).
pub async fn create_object(data: &Data, creation: Creation) -> Result<(), VolumeError> {
    let oid = creation.oid;
    if oid.kind() != Some(ObjectKind::Data) {
        return create_unmapped(data, creation).await;
    }
    if !data.view().state.vdis.contains_key(&oid.vid().get()) {
        return Err(VolumeError::Refused(Refusal::NoVdi));
    }
    may_begin(data, &creation.over()).await?;
    let mut tries = Tries::default();
    loop {
        // Whoever has room for a copy does not wait for a lease: whose drain waits for one that waits for room.
        let hold = lease_table::hold(data, oid.vid()).await?;
        // Under the lease, each time: another gateway may have made and named it, and have written to it.
        let is_mapped = inode::map_entry(data, oid.vid(), oid.index()).await? == Some(oid.vid());
        match put_under(data, &creation, is_mapped, &hold.lease, &mut tries).await {
            Err(VolumeError::Write(WriteError::Fenced)) => {}
            other => return other.map(drop),
        }
    }
}

/// Puts bytes into an object under one lease generation: into the one that is there if the map names it, else into a new one.
/// Gives whether it made one. `tries` has what was done for the same bytes under earlier leases.
pub async fn put_under(
    data: &Data,
    creation: &Creation,
    is_mapped: bool,
    lease: &Lease,
    tries: &mut Tries,
) -> Result<bool, VolumeError> {
    if is_mapped {
        match tries.write_over(data, &creation.over(), lease).await {
            // Mapped but gone: nothing to preserve.
            Err(WriteError::Missing) => {}
            other => return Ok(other.map(|()| false)?),
        }
    }
    let (object, _room) = whole_write(data, creation.clone()).await?;
    tries.make(data, &object, lease).await?;
    Ok(true)
}

/// Creates an object that no map names.
async fn create_unmapped(data: &Data, creation: Creation) -> Result<(), VolumeError> {
    // As in `create_object`.
    while is_copied_here(data, &creation)? {
        let hold = lease_table::hold(data, creation.oid.vid()).await?;
        let (object, _room) = whole_write(data, creation.clone()).await?;
        match write_under(data, &object, hold.lease.generation).await {
            Err(WriteError::Fenced) => {}
            other => return Ok(other?),
        }
    }
    let (object, _room) = whole_write(data, creation).await?;
    Ok(write(data, object).await?)
}

/// Whether the object has to be put together in this node's memory: its source has other holders.
fn is_copied_here(data: &Data, creation: &Creation) -> Result<bool, VolumeError> {
    let view = data.view();
    let object_bytes = view.locate(creation.oid).ok_or(WriteError::Invalid)?.object_bytes;
    let covers_all = creation.offset == 0 && creation.payload.len() as u64 == object_bytes;
    let is_strange = |source: Oid| !view.same_chain(source.vid(), creation.oid.vid());
    Ok(!covers_all && creation.source.is_some_and(is_strange))
}

/// The write that makes an object, and the room that it takes in memory until it is done.
async fn whole_write(
    data: &Data,
    creation: Creation,
) -> Result<(ObjectWrite, Option<SemaphorePermit<'_>>), VolumeError> {
    let oid = creation.oid;
    let mut object = creation.over();
    object.durable |= creation.durably_made;
    let view = data.view();
    let object_bytes = view.locate(oid).ok_or(WriteError::Invalid)?.object_bytes;
    let covers_all = object.offset == 0 && object.data.len() as u64 == object_bytes;
    let mut room = None;
    object.base = match creation.source {
        Some(source) if !covers_all && view.same_chain(source.vid(), oid.vid()) => Base::CopyOf(source),
        Some(source) if !covers_all => {
            let end = object.offset.checked_add(object.data.len() as u64).filter(|end| *end <= object_bytes);
            let end = end.ok_or(WriteError::Invalid)?;
            room = data.copy_room(object_bytes).await;
            let whole = read_whole(data, source, object_bytes).await?;
            let mut bytes = BytesMut::from(&whole[..]);
            bytes[object.offset as usize..end as usize].copy_from_slice(&object.data);
            object.offset = 0;
            object.data = bytes.freeze();
            Base::Zeros
        }
        _ => Base::Zeros,
    };
    Ok((object, room))
}

async fn read_whole(data: &Data, oid: Oid, object_bytes: u64) -> Result<Bytes, VolumeError> {
    let source_bytes = data.view().locate(oid).ok_or(WriteError::Missing)?.object_bytes;
    if source_bytes != object_bytes {
        return Err(WriteError::Invalid.into());
    }
    // No message between nodes is as long as the largest objects.
    let mut whole = BytesMut::with_capacity(object_bytes as usize);
    while (whole.len() as u64) < object_bytes {
        let length = (object_bytes - whole.len() as u64).min(PIECE_BYTES);
        whole.extend_from_slice(&read::read(data, oid, whole.len() as u64, length as usize).await?);
    }
    Ok(whole.freeze())
}
