//! `dog vdi attach`: how QEMU, libvirt and the kernel of this machine use a VDI, through the NBD server of the sheep.
//!
//! Nothing is changed in the cluster. With `--nbd` the kernel's client is started as well; it goes on when this has ended.

use std::ffi::{OsStr, OsString};
use std::io;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::process::{Command, Stdio};

use super::volume;
use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::{self, Selector, Target};
use crate::nbd_export::{NbdExport, NbdPlace, export_name};
use crate::nbd_service::NbdService;
use crate::report::{Form, Report};

const CLIENT: &str = "nbd-client";
const CLIENT_VARIABLE: &str = "DOG_NBD_CLIENT";

/// What the tools are told.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Attachment {
    /// The name of the VDI.
    pub vdi: Vec<u8>,
    /// Whether it is a snapshot.
    pub is_read_only: bool,
    /// By the shortest way.
    pub export: NbdExport,
    /// By its port, if it has one.
    pub tcp: Option<NbdExport>,
    /// The block device that it is now.
    pub device: Option<String>,
}

/// Runs the command.
pub fn run(typed: &args::Attach, target: Target) -> Result<Report, Failure> {
    let vdi = meaning::vdi_name(&typed.vdi)?;
    let selector = Selector::of(typed.snapshot.word.as_deref())?;
    let mut sheep = Sheep::connect(target)?;
    volume::find(&mut sheep, vdi, &selector)?;
    let service = NbdService::ask(&mut sheep)?;
    let snapshot = typed.snapshot.word.as_deref().filter(|_| !selector.is_current());
    let name = export_name(vdi, snapshot.map(OsStr::as_encoded_bytes));
    let at = |place: NbdPlace| NbdExport { place, name: name.clone() };
    let mut attachment = Attachment {
        vdi: vdi.to_vec(),
        is_read_only: !selector.is_current(),
        export: at(service.place()?),
        tcp: service.tcp().map(at),
        device: None,
    };
    if let Some(device) = typed.nbd.as_deref() {
        start_client(&attachment, device)?;
        attachment.device = Some(device.to_string_lossy().into_owned());
    }
    Ok(Report::new(Form::of(false, typed.json), attachment))
}

impl Attachment {
    /// The words of `nbd-client` for one of the exports and a device.
    pub fn client_words(&self, export: &NbdExport, device: &OsStr) -> Vec<OsString> {
        use std::os::unix::ffi::OsStringExt;
        let mut words: Vec<OsString> = match &export.place {
            NbdPlace::Unix(path) => vec!["-unix".into(), path.into()],
            NbdPlace::Tcp { host, port } => vec![host.into(), port.to_string().into()],
        };
        words.extend(["-N".into(), OsString::from_vec(export.name.clone()), device.to_owned()]);
        if self.is_read_only {
            words.push("-readonly".into());
        }
        words
    }
}

fn start_client(attachment: &Attachment, device: &OsStr) -> Result<(), Failure> {
    let path = Path::new(device);
    match path.metadata() {
        Ok(metadata) if metadata.file_type().is_block_device() => {}
        Ok(_) => {
            return Err(Failure::failed(format!("{} is no block device; give one such as /dev/nbd0", path.display())));
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Err(Failure::failed(format!(
                "{} does not exist; load the kernel's NBD client with 'modprobe nbd', then give one of /dev/nbd*",
                path.display()
            )));
        }
        Err(error) => return Err(Failure::system(format!("Cannot look at {}: {error}", path.display()))),
    }
    let program = std::env::var_os(CLIENT_VARIABLE).filter(|program| !program.is_empty());
    let program = program.unwrap_or_else(|| CLIENT.into());
    let shown = program.to_string_lossy();
    let mut command = Command::new(&program);
    // What it prints is not the result.
    command.args(attachment.client_words(&attachment.export, device)).stdin(Stdio::null()).stdout(io::stderr());
    let status = command.status().map_err(|error| match error.kind() {
        io::ErrorKind::NotFound => Failure::system(format!(
            "{shown} was not found; install {CLIENT} (package {CLIENT} or nbd), or name it with {CLIENT_VARIABLE}=PATH"
        )),
        _ => Failure::system(format!("Cannot run {shown}: {error}")),
    })?;
    if status.success() {
        return Ok(());
    }
    let text = format!(
        "{shown} did not attach {}: {status}; see what it says above, and whether you are root",
        path.display()
    );
    Err(Failure::new(Exit::System, text))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_client_is_told_where_and_what() {
        let export = |place| NbdExport { place, name: b"d@t".to_vec() };
        let attachment = Attachment {
            vdi: b"d".to_vec(),
            is_read_only: true,
            export: export(NbdPlace::Unix("/s/nbd.sock".into())),
            tcp: Some(export(NbdPlace::Tcp { host: "::1".into(), port: 10809 })),
            device: None,
        };
        let device = OsStr::new("/dev/nbd0");
        let words = attachment.client_words(&attachment.export, device);
        assert_eq!(words, ["-unix", "/s/nbd.sock", "-N", "d@t", "/dev/nbd0", "-readonly"]);
        let words = attachment.client_words(attachment.tcp.as_ref().expect("a port"), device);
        assert_eq!(words, ["::1", "10809", "-N", "d@t", "/dev/nbd0", "-readonly"]);
        let failure = start_client(&attachment, OsStr::new("/dev/no-such-nbd")).expect_err("no device");
        assert!(failure.message.contains("modprobe nbd"), "{failure}");
        let failure = start_client(&attachment, OsStr::new("/dev/null")).expect_err("another device");
        assert!(failure.message.contains("is no block device"), "{failure}");
    }
}
