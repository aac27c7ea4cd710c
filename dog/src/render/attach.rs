//! What `dog vdi attach` prints: the words for QEMU, libvirt and `nbd-client`, each as its tool wants it quoted.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt;

use serde_json::{Value, json};

use super::text::put;
use crate::meaning::shown;
use crate::nbd_export::{NbdExport, NbdPlace, comma_doubled};
use crate::report::{Show, Style};
use crate::vdi::attach::Attachment;

/// Seconds for which a guest waits for a sheep that went away: a restart takes less, and a guest's own timeout is longer.
const RECONNECT_DELAY_SECONDS: u32 = 30;
/// QEMU takes no longer names of nodes.
const NODE_NAME_BYTES_MAX: usize = 31;

impl Show for Attachment {
    fn table(&self, _: &Style, out: &mut Vec<u8>) {
        if let Some(device) = &self.device {
            put(out, format_args!("{} is {device} now; 'nbd-client -d {device}' detaches it\n", shown(&self.vdi)));
            return;
        }
        put(
            out,
            format_args!("QEMU:\n  -blockdev {} \\\n  -device {}\n", quoted(&self.blockdev()), self.qemu_device()),
        );
        put(out, format_args!("\nlibvirt:\n"));
        for line in self.libvirt().lines() {
            put(out, format_args!("  {line}\n"));
        }
        put(out, format_args!("\nKernel:\n  {}\n", client(self, &self.export)));
        if let Some(tcp) = self.other_way() {
            put(out, format_args!("  {}\n", client(self, tcp)));
        }
    }

    fn json(&self) -> Option<Value> {
        let socket = match &self.export.place {
            NbdPlace::Unix(path) => Some(shown(path.as_os_str().as_bytes())),
            NbdPlace::Tcp { .. } => None,
        };
        let tcp = self.tcp.as_ref().map(|tcp| match &tcp.place {
            NbdPlace::Tcp { host, port } => json!({"host": host, "port": port}),
            NbdPlace::Unix(_) => Value::Null,
        });
        Some(json!({
            "vdi": shown(&self.vdi),
            "export": shown(&self.export.name),
            "read_only": self.is_read_only,
            "socket": socket,
            "tcp": tcp,
            "url": self.export.url(),
            "qemu_blockdev": shown(&self.blockdev()),
            "qemu_device": self.qemu_device(),
            "libvirt_disk": self.libvirt(),
            "nbd_client": client(self, &self.export),
            "nbd_client_tcp": self.tcp.as_ref().map(|tcp| client(self, tcp)),
            "device": self.device,
        }))
    }
}

impl Attachment {
    /// The port, if the socket is the shorter way.
    fn other_way(&self) -> Option<&NbdExport> {
        self.tcp.as_ref().filter(|tcp| **tcp != self.export)
    }

    /// Letters, digits and `._-` behind a letter, as QEMU wants names of nodes.
    fn node_name(&self) -> String {
        let letters = shown(&self.vdi)
            .chars()
            .map(|letter| if letter.is_ascii_alphanumeric() || "._-".contains(letter) { letter } else { '_' })
            .collect::<String>();
        let mut name = format!("sd-{letters}");
        name.truncate(NODE_NAME_BYTES_MAX);
        name
    }

    fn blockdev(&self) -> Vec<u8> {
        let mut text = Vec::new();
        for (index, (key, value)) in self.export.options().into_iter().enumerate() {
            put(&mut text, format_args!("{}{key}=", if index > 0 { "," } else { "" }));
            text.extend(comma_doubled(&value));
        }
        put(&mut text, format_args!(",node-name={},reconnect-delay={RECONNECT_DELAY_SECONDS}", self.node_name()));
        put(&mut text, format_args!(",cache.direct=on{}", if self.is_read_only { ",read-only=on" } else { "" }));
        text
    }

    fn qemu_device(&self) -> String {
        format!("virtio-blk-pci,drive={}", self.node_name())
    }

    fn libvirt(&self) -> String {
        let host = match &self.export.place {
            NbdPlace::Unix(path) => {
                format!("<host transport='unix' socket='{}'/>", in_xml(&shown(path.as_os_str().as_bytes())))
            }
            NbdPlace::Tcp { host, port } => format!("<host name='{}' port='{port}'/>", in_xml(host)),
        };
        format!(
            "<disk type='network' device='disk'>\n  <driver name='qemu' type='raw' cache='none'/>\n  \
             <source protocol='nbd' name='{}'>\n    {host}\n    <reconnect delay='{RECONNECT_DELAY_SECONDS}'/>\n  \
             </source>\n  <target dev='vda' bus='virtio'/>\n{}</disk>\n",
            in_xml(&shown(&self.export.name)),
            if self.is_read_only { "  <readonly/>\n" } else { "" }
        )
    }
}

/// The command line of `nbd-client`.
fn client(attachment: &Attachment, export: &NbdExport) -> String {
    let device = attachment.device.as_deref().unwrap_or("/dev/nbd0");
    let words = attachment.client_words(export, OsStr::new(device));
    let words: Vec<String> = words.iter().map(OsString::as_os_str).map(|word| quoted(word.as_bytes())).collect();
    format!("nbd-client {}", words.join(" "))
}

/// For a shell.
fn quoted(word: &[u8]) -> String {
    let text = shown(word);
    let is_plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-._/,=@:+%".contains(&byte);
    if !text.is_empty() && text.bytes().all(is_plain) {
        text.into_owned()
    } else {
        format!("'{}'", text.replace('\'', r"'\''"))
    }
}

/// For an attribute between single quotes.
fn in_xml(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('\'', "&apos;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;
    use jiff::tz::TimeZone;

    fn attachment(name: &str) -> Attachment {
        let export = |place| NbdExport { place, name: name.as_bytes().to_vec() };
        Attachment {
            vdi: b"d".to_vec(),
            is_read_only: false,
            export: export(NbdPlace::Unix("/s/nbd.sock".into())),
            tcp: Some(export(NbdPlace::Tcp { host: "127.0.0.1".into(), port: 10809 })),
            device: None,
        }
    }

    fn table(attachment: &Attachment) -> String {
        let mut out = Vec::new();
        attachment.table(&Style { zone: TimeZone::UTC, is_terminal: false }, &mut out);
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn every_tool_has_its_heading() {
        let expected = "QEMU:\n  \
            -blockdev driver=nbd,server.type=unix,server.path=/s/nbd.sock,export=d,node-name=sd-d,reconnect-delay=30,\
            cache.direct=on \\\n  -device virtio-blk-pci,drive=sd-d\n\n\
            libvirt:\n  <disk type='network' device='disk'>\n    <driver name='qemu' type='raw' cache='none'/>\n    \
            <source protocol='nbd' name='d'>\n      <host transport='unix' socket='/s/nbd.sock'/>\n      \
            <reconnect delay='30'/>\n    </source>\n    <target dev='vda' bus='virtio'/>\n  </disk>\n\n\
            Kernel:\n  nbd-client -unix /s/nbd.sock -N d /dev/nbd0\n  nbd-client 127.0.0.1 10809 -N d /dev/nbd0\n";
        assert_eq!(table(&attachment("d")), expected);
    }

    #[test]
    fn names_are_quoted_as_each_tool_wants() {
        let mut attached = attachment("a,'<b@t");
        attached.vdi = "a,'<b \u{e4}".repeat(9).into_bytes();
        attached.is_read_only = true;
        let text = table(&attached);
        assert!(text.contains(r"export=a,,'\''<b@t,node-name=sd-a__"), "{text}");
        assert!(text.contains("name='a,&apos;&lt;b@t'") && text.contains("<readonly/>"), "{text}");
        assert!(text.contains(r"-N 'a,'\''<b@t' /dev/nbd0 -readonly"), "{text}");
        assert!(attached.node_name().len() == NODE_NAME_BYTES_MAX);
    }

    #[test]
    fn json_has_the_pieces() {
        let mut attached = attachment("d");
        attached.device = Some("/dev/nbd3".to_owned());
        let json = attached.json().expect("attach has JSON");
        assert_eq!(json["socket"], "/s/nbd.sock");
        assert_eq!(json["tcp"]["port"], 10809);
        assert_eq!(json["nbd_client"], "nbd-client -unix /s/nbd.sock -N d /dev/nbd3");
        assert_eq!(table(&attached), "d is /dev/nbd3 now; 'nbd-client -d /dev/nbd3' detaches it\n");
        attached.export = attached.tcp.clone().expect("a port");
        attached.device = None;
        assert_eq!(attached.json().expect("JSON")["socket"], Value::Null);
        assert!(table(&attached).ends_with("Kernel:\n  nbd-client 127.0.0.1 10809 -N d /dev/nbd0\n"));
    }
}
