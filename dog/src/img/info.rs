//! `dog img info`: of a VDI, what the old driver told about it.

use std::ffi::OsString;

use qemu_proto::inode::split_wire_time;

use super::volume::{FORCE_SHARE, FORMAT, IMAGE_OPTS, OBJECT, Volume};
use super::words::{Known, Words};
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{Selector, Target};
use crate::report::{Form, Report};
use crate::requests::Header;
use crate::vdi::catalog::{self, Depth};
use crate::vdi::volume;

const KNOWN: &[Known] = &[
    FORMAT,
    OBJECT,
    IMAGE_OPTS,
    FORCE_SHARE,
    (0, "output", true),
    (0, "backing-chain", false),
    (b't', "cache", true),
    (0, "limits", false),
];

/// A snapshot as QEMU lists it.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct SnapshotRow {
    /// Its number within the name.
    pub id: u32,
    /// May be empty.
    pub tag: Vec<u8>,
    /// Bytes of saved machine state.
    pub vm_state_bytes: u64,
    /// When it was taken: Unix seconds and nanoseconds.
    pub taken: (u64, u32),
    /// The guest's clock.
    pub vm_clock_nsec: u64,
}

/// What `snapshot -l` prints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct SnapshotList(pub Vec<SnapshotRow>);

/// What `info` prints.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct ImageInfo {
    /// As it was typed.
    pub image: String,
    /// Bytes that a guest sees.
    pub size_bytes: u64,
    /// Bytes of the objects that it has or shares.
    pub disk_bytes: u64,
    /// By id.
    pub snapshots: SnapshotList,
    /// Whether the JSON form is a list of one.
    pub is_chain: bool,
}

/// Does it if the image is a VDI; `None` leaves it to the program.
pub fn run(words: &[OsString], default: Target) -> Result<Option<Report>, Failure> {
    let Ok(words) = Words::parse(words, KNOWN) else { return Ok(None) };
    let Some(wanted) = Volume::operand(&words, default)? else { return Ok(None) };
    let form = match words.value("output").and_then(std::ffi::OsStr::to_str) {
        None if !words.has("output") => Form::Table,
        Some("human") => Form::Table,
        Some("json") => Form::Json,
        _ => return Err(Failure::failed("--output must be followed by human or json")),
    };
    let mut sheep = Sheep::connect(wanted.target)?;
    let selector = Selector::of(wanted.snapshot().as_deref())?;
    let opened = volume::Volume::open(&mut sheep, &wanted.url.name, &selector)?;
    let info = ImageInfo {
        image: wanted.typed.to_string_lossy().into_owned(),
        size_bytes: opened.header.size_bytes,
        disk_bytes: (opened.objects().count() as u64) << opened.header.shift,
        snapshots: SnapshotList(snapshots(&mut sheep, &wanted.url.name)?),
        is_chain: words.has("backing-chain"),
    };
    Ok(Some(Report::new(form, info)))
}

/// The snapshots of a VDI. What cannot be read is an error: a list that misses one would be believed.
pub fn snapshots(sheep: &mut Sheep, name: &[u8]) -> Result<Vec<SnapshotRow>, Failure> {
    let catalog = catalog::read(sheep, Some(name), Depth::Headers)?;
    if let Some(failure) = catalog.failures.into_iter().next() {
        return Err(failure);
    }
    let headers = catalog.volumes.into_iter().map(|volume| volume.header).filter(Header::is_snapshot);
    let mut rows: Vec<SnapshotRow> = headers
        .map(|header| SnapshotRow {
            id: header.snapshot_id,
            tag: header.tag,
            vm_state_bytes: header.vm_state_bytes,
            taken: split_wire_time(header.snapshot_time),
            vm_clock_nsec: header.vm_clock_nsec,
        })
        .collect();
    rows.sort_by_key(|row| row.id);
    Ok(rows)
}
