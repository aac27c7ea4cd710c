//! What `dog` asks of volumes that the ancestor's protocol has no request for, as JSON in CLUSTER_ADMIN: groups of
//! snapshots, other names, independence of the parent, smaller sizes, limits.
//!
//! Names are text here: one that is not UTF-8 cannot be given in JSON, and `dog` says so.

use serde::Deserialize;
use serde_json::{Value, json};
use sheep_core::command::Refusal;
use sheep_core::level::Level;
use sheep_core::limits::Limits;
use sheep_core::vdi_name::Target;

use super::Front;
use crate::data::virtual_disk::VirtualDisk;
use crate::data::volumes::{self, VolumeError};
use crate::data::{Data, flatten, shrink};

/// Objects that one request copies at most, so that the client can tell how far it is.
const COPIED_AT_ONCE: u32 = 64;

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", tag = "do")]
enum Wish {
    /// Snapshots of one moment.
    SnapshotTogether {
        names: Vec<String>,
        tag: String,
    },
    Rename {
        name: String,
        to: String,
    },
    /// Copies shared objects from an index on; the answer is how many, up to which index, and of how many.
    CopyShared {
        name: String,
        first: u32,
    },
    /// Takes the parent away.
    Detach {
        name: String,
    },
    /// Clears what is beyond a size, from an object on; the answer is up to which object, and of how many.
    ClearBeyond {
        name: String,
        size_bytes: u64,
        first: u32,
    },
    /// Makes a volume smaller that has nothing beyond that size; the answer is `again` if it has. Only with `force` if a client
    /// has locked it.
    Shrink {
        name: String,
        size_bytes: u64,
        force: bool,
    },
    /// Zeros take limits away.
    LimitVolume {
        name: String,
        operations_per_second: u64,
        bytes_per_second: u64,
        burst_seconds: u32,
    },
    /// The answer is the limits of all volumes, by name.
    VolumeLimits,
    /// As `VolumeLimits`, with what they did at this node.
    LimitFigures,
    /// The answer is what this node's cache did; `null` if it has none.
    CacheFigures,
}

/// Carries a wish out, if it is one of these.
pub async fn run(front: &Front, payload: &[u8]) -> Option<Value> {
    let wish = serde_json::from_slice::<Wish>(payload).ok()?;
    Some(match carry_out(&front.data, wish).await {
        Ok(text) => json!({ "ok": text }),
        Err(error) => json!({ "error": error }),
    })
}

async fn carry_out(data: &Data, wish: Wish) -> Result<String, String> {
    match wish {
        Wish::SnapshotTogether { names, tag } => {
            let names: Vec<Vec<u8>> = names.into_iter().map(String::into_bytes).collect();
            let time = data.world().clock.wall().to_wire();
            let done = volumes::snapshot_together(data, &names, tag.as_bytes(), time).await;
            done.map(|()| String::new()).map_err(|error| shown(&error))
        }
        Wish::Rename { name, to } => {
            let done = volumes::rename(data, name.as_bytes(), to.as_bytes()).await;
            done.map(|()| String::new()).map_err(|error| shown(&error))
        }
        Wish::CopyShared { name, first } => copy_shared(data, name.as_bytes(), first).await,
        Wish::Detach { name } => {
            let found = volumes::lookup(data, name.as_bytes(), Target::Current).await.map_err(|error| shown(&error))?;
            match flatten::detach(data, found.id).await {
                Ok(true) => Ok(String::new()),
                Ok(false) => {
                    Err("it shares objects again, perhaps after a rollback; run the same command again".into())
                }
                Err(error) => Err(shown(&error)),
            }
        }
        Wish::ClearBeyond { name, size_bytes, first } => {
            // Before anything is lost.
            if !data.view().state.understands(Level::SHRINKING) {
                return Err(shown(&VolumeError::Refused(Refusal::EarlierVersion)));
            }
            let disk = open(data, name.as_bytes()).await?;
            let cleared = shrink::clear_beyond(data, &disk, size_bytes, first).await;
            cleared.map(|(next, count)| format!("{next} {count}")).map_err(|error| error.to_string())
        }
        Wish::Shrink { name, size_bytes, force } => {
            let found = volumes::lookup(data, name.as_bytes(), Target::Current).await.map_err(|error| shown(&error))?;
            if !force && data.view().state.locks.contains_key(name.as_bytes()) {
                return Err(
                    "a client has it open; 'dog vdi lock list' shows from where, and -f makes it smaller anyway".into(),
                );
            }
            match shrink::cut(data, found.id, size_bytes).await {
                Ok(true) => Ok(String::new()),
                Ok(false) => Ok("again".into()),
                Err(error) => Err(shown(&error)),
            }
        }
        Wish::LimitVolume { name, operations_per_second, bytes_per_second, burst_seconds } => {
            let limits = Limits { operations_per_second, bytes_per_second, burst_seconds };
            let done = volumes::limit(data, name.as_bytes(), Some(limits)).await;
            done.map(|()| String::new()).map_err(|error| shown(&error))
        }
        Wish::VolumeLimits => limits(data, |_, limits| limits).await,
        Wish::LimitFigures => {
            limits(data, |name, mut limits| {
                let delays = data.throttles().delays(name);
                limits["delayed"] = json!(delays.delayed);
                limits["waiting"] = json!(delays.waiting);
                limits
            })
            .await
        }
        Wish::CacheFigures => Ok(cache(data).to_string()),
    }
}

fn cache(data: &Data) -> Value {
    let figures = data.holder().and_then(|holder| holder.store().cache());
    figures.map_or(Value::Null, |figures| {
        json!({
            "size_bytes": figures.size_bytes,
            "used_bytes": figures.used_bytes,
            "hits": figures.hits,
            "misses": figures.misses,
            "failed": figures.failed,
        })
    })
}

async fn limits(data: &Data, shown: impl Fn(&[u8], Value) -> Value) -> Result<String, String> {
    let state = data.cluster().barrier().await.map_err(|error| error.to_string())?;
    let each = state.limits.iter().map(|(name, limits)| {
        let limits = json!({
            "operations_per_second": limits.operations_per_second,
            "bytes_per_second": limits.bytes_per_second,
            "burst_seconds": limits.burst_seconds,
        });
        (String::from_utf8_lossy(name).into_owned(), shown(name, limits))
    });
    Ok(Value::Object(each.collect()).to_string())
}

async fn open(data: &Data, name: &[u8]) -> Result<VirtualDisk, String> {
    VirtualDisk::open(data, name, Target::Current).await.map_err(|error| shown(&error))
}

async fn copy_shared(data: &Data, name: &[u8], first: u32) -> Result<String, String> {
    let disk = open(data, name).await?;
    let total = u32::try_from(disk.size_bytes().div_ceil(disk.object_bytes())).unwrap_or(u32::MAX);
    let count = total.saturating_sub(first).min(COPIED_AT_ONCE);
    let copied = flatten::copy_shared(data, &disk, first, count).await.map_err(|error| error.to_string())?;
    Ok(format!("{copied} {} {total}", first + count))
}

fn shown(error: &VolumeError) -> String {
    match error {
        VolumeError::Refused(Refusal::NoVdi) => "there is no such volume; 'dog vdi list' shows those there are".into(),
        VolumeError::Refused(Refusal::VdiExists) => "the name or tag is in use; 'dog vdi list' shows it".into(),
        VolumeError::Refused(Refusal::InvalidParameters) => "a name or tag has no bytes, or too many".into(),
        VolumeError::Refused(Refusal::NotFormatted) => "the cluster is not formatted".into(),
        VolumeError::Refused(Refusal::Waiting) => {
            "the cluster waits for nodes; 'dog cluster info' says for which".into()
        }
        VolumeError::Refused(Refusal::EarlierVersion) => {
            "a node runs an earlier version that does not know of this; update all nodes first".into()
        }
        VolumeError::Refused(Refusal::LeaseLost) => "other nodes changed the volumes meanwhile; try again".into(),
        other => other.to_string(),
    }
}
