//! Which cluster and which order this node belongs to, and what it keeps of it for its next start.
//!
//! A *charter* names a cluster from its first format on and the *era* of its order: an operator who goes on without the
//! majority begins a new era, and whoever still follows an earlier one gives it up when it meets the later.
//!
//! On disk: `META/cluster/state`, replaced as a whole (written beside, synced, renamed, directory synced). A crash leaves the
//! old or the new one. It may be behind what the node has seen: the others know better, and voters have the log.

use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use sheep_core::member::NodeId;

use crate::cluster::OrderError;
use crate::cluster::consensus::Machine;
use crate::world::World;
use crate::world::disk::{self, Files, OpenMode};

/// Of an order: goes up each time an operator goes on without the majority.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct Era {
    /// 0 from the first format on.
    pub number: u32,
    /// Who began it: decides if two operators did at once.
    pub founder: NodeId,
}

/// See the module.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Serialize, Deserialize)]
pub struct Charter {
    /// The cluster's id at its first format; formatting anew keeps it.
    pub cluster: u64,
    /// See [`Era`].
    pub era: Era,
}

impl Charter {
    /// The id under which this era's voters talk to each other.
    pub fn order_id(&self) -> u64 {
        let mut hasher = blake3::Hasher::new();
        hasher.update(&self.cluster.to_le_bytes());
        hasher.update(&self.era.number.to_le_bytes());
        hasher.update(&self.era.founder.get().to_le_bytes());
        let hash = hasher.finalize();
        let (first, _) = hash.as_bytes().split_first_chunk::<8>().expect("a hash has 32 bytes");
        u64::from_le_bytes(*first)
    }

    /// Directory of this era's log.
    pub fn log_directory(&self, directory: &Path) -> PathBuf {
        directory.join(format!("order-{:016x}", self.order_id()))
    }
}

/// What a node keeps.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kept {
    /// Of what.
    pub charter: Charter,
    /// Up to here.
    pub index: u64,
    /// The state at that index.
    pub machine: Machine,
}

const FILE: &str = "state";
const MAGIC: &[u8; 8] = b"SHEEPST1";

/// Reads what the last process of this node kept; `None` at the first start.
pub async fn load(world: &World, directory: &Path) -> Result<Option<Kept>, OrderError> {
    let path = directory.join(FILE);
    let shown = path.display().to_string();
    let bytes = disk::run(&world.disk, move |files| read(files, &path)).await;
    let bytes = bytes.map_err(|error| OrderError::Io { action: "read", place: shown.clone(), error })?;
    let Some(bytes) = bytes else { return Ok(None) };
    let unreadable = |reason: &str| OrderError::Unreadable { place: shown.clone(), reason: reason.to_string() };
    let (magic, rest) = bytes.split_first_chunk::<8>().ok_or_else(|| unreadable("it is cut off"))?;
    let (checksum, body) = rest.split_first_chunk::<4>().ok_or_else(|| unreadable("it is cut off"))?;
    if magic != MAGIC || u32::from_le_bytes(*checksum) != crc(body) {
        return Err(unreadable("its checksum is wrong: the disk damaged it"));
    }
    postcard::from_bytes(body).map(Some).map_err(|error| unreadable(&error.to_string()))
}

fn read(files: &dyn Files, path: &Path) -> io::Result<Option<Vec<u8>>> {
    if !files.exists(path)? {
        return Ok(None);
    }
    let file = files.open(path, OpenMode::Read)?;
    let mut bytes = vec![0; file.len()? as usize];
    let count = file.read_at(&mut bytes, 0)?;
    bytes.truncate(count);
    Ok(Some(bytes))
}

/// Replaces what is kept.
pub async fn save(world: &World, directory: &Path, kept: &Kept) -> Result<(), OrderError> {
    let body = postcard::to_allocvec(kept).expect("the state's types have no unserialisable values");
    let mut bytes = Vec::with_capacity(12 + body.len());
    bytes.extend_from_slice(MAGIC);
    bytes.extend_from_slice(&crc(&body).to_le_bytes());
    bytes.extend_from_slice(&body);
    replace(world, directory, FILE, bytes).await
}

/// Puts `bytes` under a name, whole or not at all, readable by this user only.
pub async fn replace(world: &World, directory: &Path, name: &str, bytes: Vec<u8>) -> Result<(), OrderError> {
    let (directory, name) = (directory.to_path_buf(), name.to_string());
    let shown = directory.join(&name).display().to_string();
    let written = disk::run(&world.disk, move |files| {
        let temporary = directory.join(format!("{name}.new"));
        let file = files.open(&temporary, OpenMode::Private)?;
        file.write_at(&[io::IoSlice::new(&bytes)], 0)?;
        file.sync_data()?;
        files.rename(&temporary, &directory.join(&name))?;
        files.sync_dir(&directory)
    });
    written.await.map_err(|error| OrderError::Io { action: "write", place: shown, error })
}

fn crc(body: &[u8]) -> u32 {
    crc_fast::checksum(crc_fast::CrcAlgorithm::Crc32Iscsi, body) as u32
}
