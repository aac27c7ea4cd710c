//! One value that may name a volume: a URL, or a `json:` description of a block device with volumes anywhere inside.
//!
//! Always holds: a value without a volume is left alone, byte for byte; JSON is written anew only when something in it changed.

use serde_json::{Map, Value};

use super::device::Device;
use super::url::{self, VdiUrl};
use crate::exit::Failure;
use crate::meaning::shown;
use crate::nbd_export::NbdExport;

/// Finds out where NBD serves a volume.
pub type Resolver<'a> = dyn FnMut(&VdiUrl) -> Result<NbdExport, Failure> + 'a;

/// Members of JSON objects whose texts are names of their own and never a file's.
const NOT_FILES: [&str; 5] = ["vdi", "tag", "snap-id", "node-name", "id"];

/// The value with all volumes replaced; `None` if it has none.
pub fn rewritten(value: &[u8], resolver: &mut Resolver<'_>) -> Result<Option<Vec<u8>>, Failure> {
    if url::is_url(value) {
        let export = resolver(&url::parse(value)?)?;
        return Ok(Some(export.url().into_bytes()));
    }
    let (prefix, text) = match value.strip_prefix(b"json:") {
        Some(text) => ("json:", text),
        None if value.first() == Some(&b'{') => ("", value),
        None => return Ok(None),
    };
    // What is no JSON is for QEMU to refuse.
    let Ok(mut json) = serde_json::from_slice::<Value>(text) else { return Ok(None) };
    if !rewrite_json(&mut json, resolver)? {
        return Ok(None);
    }
    Ok(Some(format!("{prefix}{json}").into_bytes()))
}

/// Whether something changed.
fn rewrite_json(json: &mut Value, resolver: &mut Resolver<'_>) -> Result<bool, Failure> {
    match json {
        Value::String(text) => match rewritten(text.as_bytes(), resolver)? {
            Some(new) => {
                *text = shown(&new).into_owned();
                Ok(true)
            }
            None => Ok(false),
        },
        Value::Array(items) => {
            let mut changed = false;
            for item in items {
                changed |= rewrite_json(item, resolver)?;
            }
            Ok(changed)
        }
        Value::Object(members) => {
            let mut changed = rewrite_devices(members, resolver)?;
            for (key, member) in members.iter_mut() {
                if !NOT_FILES.contains(&key.as_str()) {
                    changed |= rewrite_json(member, resolver)?;
                }
            }
            Ok(changed)
        }
        Value::Null | Value::Bool(_) | Value::Number(_) => Ok(false),
    }
}

/// Replaces devices of the driver among the members: the object itself, and those that `file.driver` and the like describe.
fn rewrite_devices(members: &mut Map<String, Value>, resolver: &mut Resolver<'_>) -> Result<bool, Failure> {
    let drivers = members.iter().filter(|(key, driver)| {
        (*key == "driver" || key.ends_with(".driver"))
            && driver.as_str().is_some_and(|word| url::is_driver(word.as_bytes()))
    });
    let prefixes: Vec<String> =
        drivers.map(|(key, _)| key.strip_suffix("driver").unwrap_or_default().to_owned()).collect();
    for prefix in &prefixes {
        let mut device = Device::default();
        let below: Vec<String> = members.keys().filter(|key| key.starts_with(prefix.as_str())).cloned().collect();
        for key in below {
            let name = &key[prefix.len()..];
            let taken = match &members[&key] {
                Value::Object(server) if name == "server" => {
                    for (part, value) in server {
                        device.take(&format!("server.{part}"), &plain(value));
                    }
                    true
                }
                value => device.take(name, &plain(value)),
            };
            if taken {
                members.remove(&key);
            }
        }
        let export = resolver(&device.volume()?)?;
        if prefix.is_empty() {
            members.insert("driver".into(), "nbd".into());
            members.insert("server".into(), export.server_json());
            members.insert("export".into(), shown(&export.name).into());
        } else {
            for (key, value) in export.options() {
                members.insert(format!("{prefix}{key}"), shown(&value).into());
            }
        }
    }
    Ok(!prefixes.is_empty())
}

/// A text without its quotes, a number as it is written.
fn plain(value: &Value) -> Vec<u8> {
    match value {
        Value::String(text) => text.clone().into_bytes(),
        other => other.to_string().into_bytes(),
    }
}
