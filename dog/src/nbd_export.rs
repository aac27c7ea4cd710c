//! A volume as NBD serves it, in the forms in which tools want it named.

use std::ffi::OsStr;
use std::fmt::Write as _;
use std::os::unix::ffi::OsStrExt;
use std::path::PathBuf;

use serde_json::{Value, json};

use crate::meaning::shown;

/// Where a sheep serves NBD.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum NbdPlace {
    /// A socket in the file system of this machine.
    Unix(PathBuf),
    /// A port.
    Tcp {
        /// Name or address, without brackets.
        host: String,
        /// Port.
        port: u16,
    },
}

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdExport {
    /// Who serves it.
    pub place: NbdPlace,
    /// `NAME`, or `NAME@TAG` for a snapshot.
    pub name: Vec<u8>,
}

/// The export of a volume, or of a snapshot by tag or id.
pub fn export_name(vdi: &[u8], snapshot: Option<&[u8]>) -> Vec<u8> {
    match snapshot {
        Some(snapshot) => [vdi, b"@", snapshot].concat(),
        None => vdi.to_vec(),
    }
}

impl NbdExport {
    /// As QEMU takes it for a file name. Contains no comma, so it can stand in an option string as it is.
    pub fn url(&self) -> String {
        let name = percent_encoded(&self.name);
        match &self.place {
            NbdPlace::Unix(path) => {
                format!("nbd+unix:///{name}?socket={}", percent_encoded(path.as_os_str().as_bytes()))
            }
            NbdPlace::Tcp { host, port } if host.contains(':') => format!("nbd://[{host}]:{port}/{name}"),
            NbdPlace::Tcp { host, port } => format!("nbd://{host}:{port}/{name}"),
        }
    }

    /// As options of a block device: keys and values, commas not yet doubled.
    pub fn options(&self) -> Vec<(&'static str, Vec<u8>)> {
        let mut options = vec![("driver", b"nbd".to_vec())];
        match &self.place {
            NbdPlace::Unix(path) => {
                options.push(("server.type", b"unix".to_vec()));
                options.push(("server.path", path.as_os_str().as_bytes().to_vec()));
            }
            NbdPlace::Tcp { host, port } => {
                options.push(("server.type", b"inet".to_vec()));
                options.push(("server.host", host.clone().into_bytes()));
                options.push(("server.port", port.to_string().into_bytes()));
            }
        }
        options.push(("export", self.name.clone()));
        options
    }

    /// The `server` member of a JSON block device.
    pub fn server_json(&self) -> Value {
        match &self.place {
            NbdPlace::Unix(path) => json!({"type": "unix", "path": shown(path.as_os_str().as_bytes())}),
            NbdPlace::Tcp { host, port } => json!({"type": "inet", "host": host, "port": port.to_string()}),
        }
    }
}

/// Everything but what a URL's path and query take literally becomes `%XX`.
pub fn percent_encoded(bytes: &[u8]) -> String {
    let mut text = String::with_capacity(bytes.len());
    for &byte in bytes {
        if byte.is_ascii_alphanumeric() || b"-._~/@".contains(&byte) {
            text.push(char::from(byte));
        } else {
            write!(text, "%{byte:02X}").expect("memory can be written");
        }
    }
    text
}

/// A value for a QEMU option string: commas are doubled there.
pub fn comma_doubled(value: &[u8]) -> Vec<u8> {
    let mut doubled = Vec::with_capacity(value.len());
    for &byte in value {
        if byte == b',' {
            doubled.push(b',');
        }
        doubled.push(byte);
    }
    doubled
}

/// A path for [`NbdPlace::Unix`].
pub fn path_of(bytes: &[u8]) -> PathBuf {
    PathBuf::from(OsStr::from_bytes(bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_paths_are_encoded_where_they_must_be() {
        let unix = NbdPlace::Unix("/var/lib/my sheep/nbd.sock".into());
        let export = NbdExport { place: unix, name: export_name(b"a,b?#%", Some(b"tag 1")) };
        assert_eq!(export.url(), "nbd+unix:///a%2Cb%3F%23%25@tag%201?socket=/var/lib/my%20sheep/nbd.sock");
        assert_eq!(export.options()[3], ("export", b"a,b?#%@tag 1".to_vec()));
        let tcp = |host: &str| NbdExport {
            place: NbdPlace::Tcp { host: host.to_owned(), port: 10809 },
            name: export_name(b"d/1", None),
        };
        assert_eq!(tcp("::1").url(), "nbd://[::1]:10809/d/1");
        assert_eq!(tcp("h").url(), "nbd://h:10809/d/1");
        assert_eq!(tcp("h").server_json(), json!({"type": "inet", "host": "h", "port": "10809"}));
        assert_eq!(comma_doubled(b"a,b,,"), b"a,,b,,,,");
    }
}
