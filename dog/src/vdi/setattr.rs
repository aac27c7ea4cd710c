//! `dog vdi setattr`

use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;

use qemu_proto::attr::{AttrRecord, VALUE_BYTES_MAX};
use qemu_proto::flags::RequestFlags;
use qemu_proto::names::{FIELD_BYTES, padded};
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{Request, VdiRequest};
use qemu_proto::response::ResponseBody;
use qemu_proto::status::Status;

use crate::args;
use crate::connect::{Sheep, Trouble};
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Target, shown};
use crate::report::Report;

/// Runs the command.
pub fn run(typed: &args::Setattr, target: Target) -> Result<Report, Failure> {
    let key = key(typed.key.as_deref())?;
    let value = match typed.value.as_deref() {
        _ if typed.delete => Vec::new(),
        Some(value) => value.as_bytes().to_vec(),
        None => read_value()?,
    };
    let value = until_nul(value);
    if value.len() > VALUE_BYTES_MAX {
        return Err(Failure::failed(format!("The value of '{}' is longer than {VALUE_BYTES_MAX} bytes", shown(key))));
    }
    let flags = match (typed.delete, typed.exclusive) {
        (true, _) => RequestFlags::DEL,
        (false, true) => RequestFlags::CREAT | RequestFlags::EXCL,
        (false, false) => RequestFlags::CREAT,
    };
    let record = record(meaning::vdi_name(&typed.vdi)?, key, value);
    let mut sheep = Sheep::connect(target)?;
    call(&mut sheep, &record, flags).map_err(|trouble| {
        trouble.or(|reason| {
            if reason.is(Status::VdiExist) {
                return Failure::new(Exit::Exists, format!("The attribute '{}' already exists", shown(key)));
            }
            not_found(key, reason).unwrap_or_else(|| Failure::failed(format!("Failed to set attribute: {reason}")))
        })
    })?;
    Ok(Report::silent())
}

/// The record that names an attribute of a working VDI.
pub fn record(name: &[u8], key: &[u8], value: Vec<u8>) -> AttrRecord {
    AttrRecord {
        name: padded(name),
        tag: [0; FIELD_BYTES],
        ctime: 0,
        snap_id: 0,
        value_len: value.len() as u32,
        key: padded(key),
        value,
    }
}

/// A key: 1 to 255 bytes.
pub fn key(word: Option<&OsStr>) -> Result<&[u8], Failure> {
    let key = word.ok_or_else(|| Failure::usage("Please specify the attribute key"))?.as_bytes();
    if key.is_empty() || key.len() >= FIELD_BYTES {
        return Err(Failure::failed(format!("Invalid attribute key '{}': must have 1 to 255 bytes", shown(key))));
    }
    Ok(key)
}

/// Looks an attribute up, or changes it, by flags; tells its number.
pub fn call(sheep: &mut Sheep, record: &AttrRecord, flags: RequestFlags) -> Result<u32, Trouble> {
    let payload = record.encode();
    let mut request = Request::vdi(Opcode::GetVdiAttr, RequestFlags::WRITE | flags, VdiRequest::default());
    request.data_length = payload.len() as u32;
    let (response, _) = sheep.call(request, &payload)?;
    match response.body {
        ResponseBody::Vdi { attr_id, .. } => Ok(attr_id),
        _ => Err(Trouble::Lost(Failure::system(format!("{} answered without an attribute id", sheep.target())))),
    }
}

/// The failure when attribute or VDI are missing.
pub fn not_found(key: &[u8], reason: crate::connect::Refusal) -> Option<Failure> {
    if reason.is(Status::NoObj) {
        return Some(Failure::new(Exit::Missing, format!("Attribute '{}' not found", shown(key))));
    }
    reason.is(Status::NoVdi).then(|| Failure::new(Exit::Missing, "VDI not found"))
}

fn read_value() -> Result<Vec<u8>, Failure> {
    let mut value = Vec::new();
    // One byte more than fits, to notice values that are too long without reading all of them.
    let read = io::stdin().lock().take(VALUE_BYTES_MAX as u64 + 1).read_to_end(&mut value);
    read.map_err(|error| Failure::system(format!("Cannot read the value from standard input: {error}")))?;
    Ok(value)
}

fn until_nul(mut value: Vec<u8>) -> Vec<u8> {
    if let Some(end) = value.iter().position(|&byte| byte == 0) {
        value.truncate(end);
    }
    value
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_ends_at_its_first_nul() {
        assert_eq!(until_nul(b"ab\0cd".to_vec()), b"ab");
        assert_eq!(until_nul(b"ab".to_vec()), b"ab");
    }

    #[test]
    fn the_record_has_the_number_of_the_old_tool() {
        let record = record(b"dg1", b"k1", b"v".to_vec());
        assert_eq!(record.oid().raw(), 0x205c_6e57_a934_b6e9);
        assert_eq!(record.value(), b"v");
    }
}
