//! `dog vdi list`

use qemu_proto::oid::{ObjectKind, Oid, VdiId};

use super::catalog::{self, Depth};
use super::volume::{self, Volume};
use crate::args;
use crate::connect::{Sheep, Trouble};
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Target};
use crate::report::{Form, Report};
use crate::requests::{self, Header};

/// What the table begins with.
pub const HEADER: &str =
    "  Name        Id    Size    Used  Shared    Creation time   VDI id  Copies  Tag   Block Size Shift\n";

/// What a line of the list is about.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Kind {
    /// It can be written.
    Working,
    /// It can be written, and began as a copy of a snapshot.
    Clone,
    /// It can not be written.
    Snapshot,
}

/// A line of the list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Row {
    /// What it is.
    pub kind: Kind,
    /// Its name.
    pub name: Vec<u8>,
    /// Its number within the name; 0 for the working VDI.
    pub snapshot_id: u32,
    /// Bytes that a guest sees.
    pub size_bytes: u64,
    /// Bytes of the objects that it owns.
    pub used_bytes: u64,
    /// Bytes of the objects that it shares with its ancestors.
    pub shared_bytes: u64,
    /// Unix seconds.
    pub created: i64,
    /// Its id.
    pub vdi: VdiId,
    /// `3`, or `4:2`.
    pub copies: String,
    /// Its tag, if it is a snapshot that has one.
    pub tag: Vec<u8>,
    /// log2 of the object size.
    pub shift: u8,
    /// How fast clients may use it, if that is limited.
    pub limits: Option<serde_json::Value>,
}

/// The list.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VdiList(pub Vec<Row>);

/// With what could not be read.
type Listed = (VdiList, Vec<Failure>);

/// Runs the command.
pub fn run(typed: &args::List, target: Target) -> Result<Report, Failure> {
    let header = || if typed.raw || typed.json { String::new() } else { HEADER.to_owned() };
    let wanted = typed.oid.as_deref().map(data_oid).transpose();
    let wanted = wanted.map_err(|failure| Failure { out: header(), ..failure })?;
    let name = typed.vdi.as_deref().map(std::os::unix::ffi::OsStrExt::as_bytes);
    let mut sheep = Sheep::connect(target)?;
    // One of many VDIs is found by its name, and an object in a map.
    let all = if name.is_none() && wanted.is_none() { all_at_once(&mut sheep)? } else { None };
    let (mut list, failures) = match all {
        Some(all) => all,
        None => one_by_one(&mut sheep, name, wanted)?,
    };
    for failure in &failures {
        eprintln!("{failure}");
    }
    if typed.json {
        // An older sheep knows of none.
        let limits = requests::volume_limits(&mut sheep).unwrap_or_default();
        for row in list.0.iter_mut().filter(|row| row.kind != Kind::Snapshot) {
            row.limits = limits.get(&*meaning::shown(&row.name)).cloned();
        }
    }
    let exit = if failures.is_empty() { Exit::Success } else { Exit::Failure };
    Ok(Report::new(Form::of(typed.raw, typed.json), list).exits(exit))
}

fn one_by_one(sheep: &mut Sheep, name: Option<&[u8]>, wanted: Option<Oid>) -> Result<Listed, Failure> {
    let mut catalog = catalog::read(sheep, name, Depth::Maps)?;
    if let Some(oid) = wanted {
        catalog.volumes.retain(|volume| volume.object(oid.index()) == Some(oid));
    }
    Ok((VdiList(catalog.volumes.iter().map(row).collect()), catalog.failures))
}

/// Everything, in as few questions as it takes; `None` from a sheep that does not answer them.
fn all_at_once(sheep: &mut Sheep) -> Result<Option<Listed>, Failure> {
    let (mut rows, mut failures) = (Vec::new(), Vec::new());
    let mut first = 0;
    loop {
        let some = match requests::describe_vdis(sheep, first) {
            Ok(some) => some,
            Err(Trouble::Refused(_)) => return Ok(None),
            Err(Trouble::Lost(failure)) => return Err(failure),
        };
        let Some(last) = some.last() else { return Ok(Some((VdiList(rows), failures))) };
        // Not again what was told, whatever the sheep says.
        first = last.header.vdi_id.saturating_add(1).max(first + 1);
        for summary in some {
            let header = Header::from(summary.header);
            if !(20..=31).contains(&header.shift) {
                failures
                    .push(Failure::failed(format!("VDI {} is listed with objects of 2^{}", header.vdi, header.shift)));
                continue;
            }
            match summary.objects {
                Some((own, shared)) => rows.push(counted(&header, u64::from(own), u64::from(shared))),
                // Asked for alone it is read, or says why not.
                None => match volume::read_map(sheep, &header) {
                    Ok(map) => rows.push(row(&Volume { header, map })),
                    Err(failure) if failure.exit == Exit::System => return Err(failure),
                    Err(failure) => failures.push(failure),
                },
            }
        }
    }
}

fn data_oid(word: &str) -> Result<Oid, Failure> {
    let digits = word.strip_prefix("0x").or_else(|| word.strip_prefix("0X")).unwrap_or(word);
    let oid = u64::from_str_radix(digits, 16).map(Oid::from_raw);
    match oid {
        Ok(oid) if oid.kind() == Some(ObjectKind::Data) => Ok(oid),
        _ => Err(Failure::failed(format!("'{word}' is not the id of a data object; give up to 16 hexadecimal digits"))),
    }
}

fn row(volume: &Volume) -> Row {
    let allocated = volume.objects().count() as u64;
    let own = volume.map.iter().filter(|&&owner| owner == volume.header.vdi.get()).count() as u64;
    counted(&volume.header, own, allocated - own)
}

fn counted(header: &Header, own: u64, shared: u64) -> Row {
    let kind = if header.is_snapshot() {
        Kind::Snapshot
    } else if header.snapshot_id == 1 && header.parent.is_some() {
        Kind::Clone
    } else {
        Kind::Working
    };
    Row {
        kind,
        name: header.name.clone(),
        snapshot_id: if kind == Kind::Snapshot { header.snapshot_id } else { 0 },
        size_bytes: header.size_bytes,
        used_bytes: own << header.shift,
        shared_bytes: shared << header.shift,
        created: meaning::seconds(header.create_time),
        vdi: header.vdi,
        copies: header.redundancy(),
        tag: if kind == Kind::Snapshot { header.tag.clone() } else { Vec::new() },
        shift: header.shift,
        limits: None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn objects_count_as_used_by_their_owner_only() {
        let header = Header {
            name: b"test".to_vec(),
            tag: b"left over".to_vec(),
            create_time: 5 << 32 | 7,
            size_bytes: 40 << 20,
            copies: 6,
            copy_policy: 0x22,
            shift: 22,
            snapshot_id: 1,
            vdi: VdiId::from_low_bits(8),
            parent: Some(VdiId::from_low_bits(7)),
            ..Header::default()
        };
        let volume = Volume { header, map: vec![8, 7, 0, 7, 7, 0, 0, 0, 0, 0] };
        let row = row(&volume);
        assert_eq!((row.used_bytes, row.shared_bytes), (4 << 20, 12 << 20));
        assert_eq!((row.kind, row.snapshot_id, row.created), (Kind::Clone, 0, 5));
        assert_eq!((row.copies.as_str(), row.tag.as_slice()), ("4:2", &b""[..]));
    }

    #[test]
    fn only_data_objects_can_be_searched_for() {
        assert_eq!(data_oid("7c2b2500000001"), Ok(Oid::from_raw(0x007c_2b25_0000_0001)));
        for word in ["807c2b2500000000", "x", ""] {
            assert_eq!(data_oid(word).expect_err(word).exit, Exit::Failure);
        }
    }
}
