//! RESTORE_VDI: a further snapshot of a volume, put together by a client and shown to nobody before it is complete.
//!
//! Always holds:
//! 1. The working VDI, its parent and every snapshot stay what they are, whatever becomes of a restore.
//! 2. What a connection began and did not finish is given up when the connection ends. If this node dies at the same time
//!    it stays, found by nobody, until the next restore of that name begins.

use std::sync::{Mutex, PoisonError};

use qemu_proto::names::parse_name;
use qemu_proto::oid::VdiId;
use qemu_proto::request::{VdiRequest, restore};
use qemu_proto::response::ResponseBody;
use qemu_proto::status::Status;
use sheep_core::command::NewVdi;

use super::Front;
use super::reply::{Outcome, Reply};
use super::wire_status::of_volume;
use crate::data::volumes;

/// Of one connection; nothing may be begun once it is `None`, because the connection has ended.
pub struct Restores(Mutex<Option<Vec<VdiId>>>);

impl Default for Restores {
    fn default() -> Restores {
        Restores(Mutex::new(Some(Vec::new())))
    }
}

impl Restores {
    /// Whether there is still somebody to finish it.
    fn note(&self, vdi: VdiId) -> bool {
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        begun.as_mut().map(|begun| begun.push(vdi)).is_some()
    }

    fn forget(&self, vdi: VdiId) {
        let mut begun = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(begun) = begun.as_mut() {
            begun.retain(|other| *other != vdi);
        }
    }

    fn end(&self) -> Vec<VdiId> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take().unwrap_or_default()
    }
}

/// Carries a request out.
pub async fn run(front: &Front, body: &VdiRequest, payload: &[u8]) -> Outcome {
    let name = parse_name(payload).map_err(|_| Status::InvalidParms)?;
    let vdi = VdiId::new(body.base_vdi_id).filter(|vdi| vdi.get() != 0).ok_or(Status::NoBaseVdi)?;
    match body.snapid {
        restore::BEGIN => begin(front, name, vdi, body.vdi_size).await,
        restore::FINISH => {
            let time = front.data.world().clock.wall().to_wire();
            let found = volumes::finish_restore(&front.data, vdi, time).await.map_err(of_volume)?;
            front.restores.forget(vdi);
            Ok(Reply::body(ResponseBody::vdi(found.id.get(), 0, found.copies, found.object_size_shift)))
        }
        restore::GIVE_UP => {
            front.restores.forget(vdi);
            volumes::give_up_restore(&front.data, vdi).await.map_err(of_volume)?;
            Ok(Reply::done())
        }
        _ => Err(Status::InvalidParms),
    }
}

async fn begin(front: &Front, name: &[u8], base: VdiId, size_bytes: u64) -> Outcome {
    let request = NewVdi {
        name: name.to_vec(),
        size_bytes,
        base: Some(base),
        snapshot: false,
        copies: 0,
        object_size_shift: 0,
        time: front.data.world().clock.wall().to_wire(),
        drained: None,
    };
    let found = volumes::begin_restore(&front.data, request).await.map_err(of_volume)?;
    if !front.restores.note(found.id) {
        give_up_one(front, found.id).await;
        return Err(Status::NetworkError);
    }
    Ok(Reply::body(ResponseBody::vdi(found.id.get(), 0, found.copies, found.object_size_shift)))
}

/// The connection has ended: gives up what it began.
pub async fn give_up(front: &Front) {
    for vdi in front.restores.end() {
        give_up_one(front, vdi).await;
    }
}

async fn give_up_one(front: &Front, vdi: VdiId) {
    // A later restore of the same name has given it up already, perhaps.
    if let Err(error) = volumes::give_up_restore(&front.data, vdi).await {
        tracing::debug!("an unfinished restore, VDI {vdi}, is not given up now: {error}");
    }
}
