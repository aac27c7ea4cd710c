//! A volume as opened by a command: the header of its inode and its map.
//!
//! Always holds:
//! 1. A volume has at most 2^20 objects of 2^20 to 2^31 bytes; a header that says otherwise is an error.
//! 2. The map has exactly one entry for each object, the id of the VDI that owns it or 0 for a hole.

use qemu_proto::oid::{Oid, VdiId};

use crate::connect::{Sheep, Trouble};
use crate::exit::Failure;
use crate::meaning::{Selector, shown};
use crate::requests::{self, Header};

/// Bytes of a map entry.
const MAP_ENTRY_BYTES: u64 = 4;
/// Map bytes of one request; a full map has 4 MiB.
const MAP_READ_BYTES_MAX: u64 = 1 << 20;
/// Most objects of a volume: what the map has room for.
pub const OBJECTS_MAX: u64 = 1 << 20;

/// See the module.
#[derive(Clone, Debug)]
pub struct Volume {
    /// What the inode says.
    pub header: Header,
    /// The owner of each object; 0 is a hole.
    pub map: Vec<u32>,
}

impl Volume {
    /// Finds a VDI by name and reads header and map.
    pub fn open(sheep: &mut Sheep, name: &[u8], selector: &Selector) -> Result<Volume, Failure> {
        let header = open_header(sheep, name, selector)?;
        let map = read_map(sheep, &header)?;
        Ok(Volume { header, map })
    }

    /// The object behind an index, unless it is a hole.
    pub fn object(&self, index: u32) -> Option<Oid> {
        let owner = self.map.get(index as usize).copied().filter(|&owner| owner != 0)?;
        Some(Oid::data(VdiId::from_low_bits(owner), index))
    }

    /// Indexes that are no holes, with their objects.
    pub fn objects(&self) -> impl Iterator<Item = (u32, Oid)> + Clone + Send {
        let entries = self.map.iter().zip(0_u32..).filter(|&(&owner, _)| owner != 0);
        entries.map(|(&owner, index)| (index, Oid::data(VdiId::from_low_bits(owner), index)))
    }
}

/// Finds a VDI by name.
pub fn find(sheep: &mut Sheep, name: &[u8], selector: &Selector) -> Result<VdiId, Failure> {
    requests::look_up(sheep, name, selector).map_err(|trouble| trouble.or(|status| not_opened(name, selector, status)))
}

/// The failure of a lookup, in the words shared by all commands.
pub fn not_opened(name: &[u8], selector: &Selector, reason: impl std::fmt::Display) -> Failure {
    Failure::failed(format!(
        "Failed to open VDI {} (snapshot id: {} snapshot tag: {}): {reason}",
        shown(name),
        selector.id,
        shown(&selector.tag)
    ))
}

/// Finds a VDI by name and reads its header.
pub fn open_header(sheep: &mut Sheep, name: &[u8], selector: &Selector) -> Result<Header, Failure> {
    let vdi = find(sheep, name, selector)?;
    read_header(sheep, vdi)
}

/// Reads the header of a VDI.
pub fn read_header(sheep: &mut Sheep, vdi: VdiId) -> Result<Header, Failure> {
    match read_header_if_any(sheep, vdi)? {
        Some(header) => Ok(header),
        None => Err(Failure::failed(format!("VDI {vdi} was deleted while it was opened"))),
    }
}

/// Reads the header of a VDI; `None` for one that is deleted.
pub fn read_header_if_any(sheep: &mut Sheep, vdi: VdiId) -> Result<Option<Header>, Failure> {
    let header = requests::read_header(sheep, vdi)
        .map_err(|trouble| not_read(Oid::inode(vdi), trouble).then("Failed to read inode header"))?;
    if header.name.is_empty() {
        return Ok(None);
    }
    if header.vdi != vdi || !(20..=31).contains(&header.shift) || header.object_count() > OBJECTS_MAX {
        return Err(Failure::failed(format!(
            "The inode {} is damaged: it says id {}, {} bytes in objects of 2^{}",
            Oid::inode(vdi),
            header.vdi,
            header.size_bytes,
            header.shift
        )));
    }
    Ok(Some(header))
}

/// Reads the entries of the map that the volume has objects for.
pub fn read_map(sheep: &mut Sheep, header: &Header) -> Result<Vec<u32>, Failure> {
    let oid = Oid::inode(header.vdi);
    let total = header.object_count() * MAP_ENTRY_BYTES;
    assert!(total <= OBJECTS_MAX * MAP_ENTRY_BYTES, "a header was checked when it was read");
    let mut map = Vec::with_capacity(header.object_count() as usize);
    let mut done = 0;
    while done < total {
        let length = (total - done).min(MAP_READ_BYTES_MAX) as u32;
        let bytes = requests::read_object(sheep, oid, requests::map_offset(0) + done, length)
            .map_err(|trouble| not_read(oid, trouble).then("Failed to read inode map"))?;
        map.extend(bytes.as_chunks().0.iter().map(|entry| u32::from_le_bytes(*entry)));
        done += u64::from(length);
    }
    Ok(map)
}

/// The failure of an object read.
pub fn not_read(oid: Oid, trouble: Trouble) -> Failure {
    trouble.or(|status| Failure::failed(format!("Failed to read object {oid} {status}")))
}

/// The failure of an object write.
pub fn not_written(oid: Oid, trouble: Trouble) -> Failure {
    trouble.or(|status| Failure::failed(format!("Failed to write object {oid}: {status}")))
}
