//! From a volume's URL to its NBD export. Each sheep is asked once.

use std::collections::BTreeMap;
use std::path::Path;

use super::url::{Place, VdiUrl};
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::{self, Asked, Target};
use crate::nbd_export::{NbdExport, NbdPlace, export_name};
use crate::nbd_service::{self, NbdService};

/// See the module.
pub struct Exports {
    default: Target,
    known: BTreeMap<Place, NbdPlace>,
}

impl Exports {
    /// Nothing was asked yet. `default` is the sheep of URLs without a host.
    pub fn new(default: Target) -> Exports {
        Exports { default, known: BTreeMap::new() }
    }

    /// The export of a volume.
    pub fn of(&mut self, url: &VdiUrl) -> Result<NbdExport, Failure> {
        let place = match self.known.get(&url.place) {
            Some(place) => place.clone(),
            None => {
                let place = match &url.place {
                    Place::Unix(socket) => NbdPlace::Unix(nbd_service::beside(&absolute(socket)?)?),
                    other => ask(self.default, other)?,
                };
                self.known.insert(url.place.clone(), place.clone());
                place
            }
        };
        Ok(NbdExport { place, name: export_name(&url.name, url.snapshot.as_deref()) })
    }
}

/// A relative path has no place in a URL's query that a tool may resolve elsewhere.
fn absolute(path: &Path) -> Result<std::path::PathBuf, Failure> {
    std::path::absolute(path)
        .map_err(|error| Failure::system(format!("Cannot find the directory of {}: {error}", path.display())))
}

fn ask(default: Target, place: &Place) -> Result<NbdPlace, Failure> {
    let target = target(default, place)?;
    let service = NbdService::ask(&mut Sheep::connect(target)?)?;
    Ok(match (service.place()?, place) {
        // The name that was typed says more than its address.
        (NbdPlace::Tcp { port, .. }, Place::Inet { host, .. }) => NbdPlace::Tcp { host: host.clone(), port },
        (place, _) => place,
    })
}

/// The sheep to ask about a volume.
pub fn target(default: Target, place: &Place) -> Result<Target, Failure> {
    match place {
        Place::Default => Ok(default),
        Place::Inet { host, port } => {
            let asked = Asked { address: Some(host), port: Some(&port.to_string()), key_file: None };
            meaning::target(asked, |_| None)
        }
        Place::Unix(socket) => Ok(Target::unix(socket)),
    }
}
