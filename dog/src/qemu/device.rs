//! A sheepdog block device described by single options (`driver=sheepdog,vdi=...`), however they were written.

use super::url::{self, Place, VdiUrl};
use crate::exit::Failure;
use crate::meaning::shown;
use crate::nbd_export::path_of;

/// The options that say which volume; all others are the device's own and stay.
const KEYS: [&str; 10] =
    ["vdi", "snap-id", "tag", "filename", "host", "port", "path", "server.type", "server.host", "server.port"];
const SERVER_PATH: &str = "server.path";

/// What has been said so far.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Device {
    said: Vec<(String, Vec<u8>)>,
}

impl Device {
    /// Takes an option if it says which volume; others begin with `server.` and have no meaning for NBD, or are not ours.
    pub fn take(&mut self, key: &str, value: &[u8]) -> bool {
        let is_ours = KEYS.contains(&key) || key.starts_with("server.");
        if is_ours {
            self.said.push((key.to_owned(), value.to_vec()));
        }
        is_ours
    }

    /// The volume that was described.
    pub fn volume(&self) -> Result<VdiUrl, Failure> {
        let said = |keys: [&str; 2]| {
            let found = self.said.iter().rev().find(|(key, _)| keys.contains(&key.as_str()));
            found.map(|(_, value)| value.as_slice()).filter(|value| !value.is_empty())
        };
        if let Some(filename) = said(["filename"; 2]) {
            return Ok(url::parse(filename)?);
        }
        let wrong = |reason: String| {
            Failure::failed(format!(
                "Invalid options of driver=sheepdog: {reason}; give vdi=NAME, and tag=TAG or snap-id=ID for a snapshot"
            ))
        };
        let Some(name) = said(["vdi"; 2]) else { return Err(wrong("they name no volume".into())) };
        let place = match (said([SERVER_PATH, "path"]), said(["server.host", "host"]), said(["server.port", "port"])) {
            (Some(path), _, _) => Place::Unix(path_of(path)),
            (None, None, None) => Place::Default,
            (None, host, port) => {
                let host = host.map(shown).unwrap_or_default();
                url::inet(&host, port.map(shown).as_deref()).map_err(wrong)?
            }
        };
        let snapshot = said(["tag", "snap-id"]).map(<[u8]>::to_vec);
        VdiUrl::new(place, name.to_vec(), snapshot).map_err(wrong)
    }
}
