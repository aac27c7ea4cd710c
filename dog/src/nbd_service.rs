//! Where a sheep serves NBD, by its own word.

use std::net::{SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::Value;

use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::nbd_export::NbdPlace;
use crate::requests;

/// The name of the socket, beside the one of the native protocol.
const SOCKET_NAME: &str = "nbd.sock";
/// The machine has just answered on another port; only a firewall makes this one silent.
const REACH_DEADLINE: Duration = Duration::from_secs(3);

/// See the module.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NbdService {
    /// The sheep.
    pub target: Target,
    /// Its socket, if that can be reached from here.
    pub socket: Option<PathBuf>,
    /// Its port, if it has one.
    pub port: Option<u16>,
}

impl NbdService {
    /// Asks a sheep.
    pub fn ask(sheep: &mut Sheep) -> Result<NbdService, Failure> {
        let target = sheep.target();
        let report = requests::cluster_report(sheep)?;
        let said = NbdService::said(target, &report)?;
        // A sheep beyond a tunnel, or in a container, is local by its address only. One on another machine may serve NBD on
        // its loopback, which is the default: better said here than by a tool that finds nobody.
        Ok(NbdService {
            socket: said.socket.filter(|socket| target.is_local() && socket.exists()),
            port: said.port.filter(|&port| target.is_local() || is_reached(target, port)),
            target,
        })
    }

    /// What a report says.
    fn said(target: Target, report: &Value) -> Result<NbdService, Failure> {
        let Some(nbd) = report.get("nbd").filter(|nbd| nbd.is_object()) else {
            return Err(Failure::failed(format!(
                "The sheep at {target} does not say where it serves NBD; it is too old, replace it by a current one"
            )));
        };
        let socket = nbd.get("socket").and_then(Value::as_str).map(PathBuf::from);
        let port = nbd.get("port").and_then(Value::as_u64).and_then(|port| u16::try_from(port).ok());
        Ok(NbdService { target, socket, port: port.filter(|&port| port != 0) })
    }

    /// Its TCP address; `None` without a port, or when the sheep is known by its socket only.
    pub fn tcp(&self) -> Option<NbdPlace> {
        match (self.target, self.port) {
            (Target::Tcp(address), Some(port)) => Some(NbdPlace::Tcp { host: address.ip().to_string(), port }),
            _ => None,
        }
    }

    /// The shortest way to it.
    pub fn place(&self) -> Result<NbdPlace, Failure> {
        let place = self.socket.clone().map(NbdPlace::Unix).or_else(|| self.tcp());
        place.ok_or_else(|| {
            Failure::failed(format!(
                "The sheep at {} serves NBD on no port that can be reached from here, and its socket is not on this \
                 machine; start that sheep with --nbd ADDRESS:PORT",
                self.target
            ))
        })
    }
}

fn is_reached(target: Target, port: u16) -> bool {
    match target {
        Target::Tcp(address) => {
            TcpStream::connect_timeout(&SocketAddr::new(address.ip(), port), REACH_DEADLINE).is_ok()
        }
        Target::Unix(_) | Target::Secure(_) => false,
    }
}

/// The NBD socket of the sheep behind a native one.
pub fn beside(socket: &Path) -> Result<PathBuf, Failure> {
    let nbd = socket.with_file_name(SOCKET_NAME);
    if socket.exists() && !nbd.exists() {
        return Err(Failure::failed(format!(
            "The sheep behind {} serves no NBD: {} does not exist; replace that sheep by a current one",
            socket.display(),
            nbd.display()
        )));
    }
    Ok(nbd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_way_depends_on_what_the_sheep_has() {
        let target = Target::Tcp("10.0.0.1:7000".parse().expect("an address"));
        let said = |nbd: Value| NbdService::said(target, &json!({"nbd": nbd}));
        let both = said(json!({"socket": "/s/nbd.sock", "port": 10809})).expect("said");
        assert_eq!(both.place(), Ok(NbdPlace::Unix("/s/nbd.sock".into())));
        assert_eq!(both.tcp(), Some(NbdPlace::Tcp { host: "10.0.0.1".into(), port: 10809 }));
        let far = NbdService { socket: None, port: None, target };
        assert!(far.place().expect_err("no way").message.contains("start that sheep with --nbd"));
        assert_eq!(NbdService { port: Some(1), ..far }.place(), Ok(NbdPlace::Tcp { host: "10.0.0.1".into(), port: 1 }));
        for report in [Value::Null, json!({}), json!({"nbd": null})] {
            let failure = NbdService::said(target, &report).expect_err("old");
            assert!(failure.message.contains("10.0.0.1:7000") && failure.message.contains("too old"), "{failure}");
        }
    }

    #[test]
    fn the_socket_is_beside_the_native_one() {
        assert_eq!(beside(Path::new("/nowhere/sock")), Ok("/nowhere/nbd.sock".into()));
    }
}
