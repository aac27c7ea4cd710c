//! The words of a command line for QEMU's tools, with every sheepdog volume replaced by its NBD export.
//!
//! Volumes are recognised by how they are written, not by where they stand: as a word, after `--option=` or an option letter,
//! as a value of an option string, in `json:`, and as a device described by options. Words without one stay as they are,
//! byte for byte. Nothing here asks anybody: where NBD serves a volume is the resolver's knowledge. No input panics.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};

use super::device::Device;
use super::option_string::{self, Part};
use super::url;
use super::value::{self, Resolver};
use crate::exit::Failure;

const FORMAT: &[u8] = b"sheepdog";
const RAW: &[u8] = b"raw";

/// All words; `None` if no volume is among them.
pub fn words(words: &[OsString], resolver: &mut Resolver<'_>) -> Result<Option<Vec<OsString>>, Failure> {
    let mut new = words.to_vec();
    let mut changed = false;
    for word in &mut new {
        if let Some(bytes) = self::word(word.as_bytes(), resolver)? {
            *word = OsString::from_vec(bytes);
            changed = true;
        }
    }
    if !changed {
        return Ok(None);
    }
    // The format of the same name was only ever used with such volumes, and meant raw.
    for at in 0..new.len() {
        let follows_format = at > 0 && is_format_option(new[at - 1].as_bytes());
        if let Some(bytes) = without_format(new[at].as_bytes(), follows_format) {
            new[at] = OsString::from_vec(bytes);
        }
    }
    Ok(Some(new))
}

/// One word; `None` if it has no volume.
pub fn word(word: &[u8], resolver: &mut Resolver<'_>) -> Result<Option<Vec<u8>>, Failure> {
    if word.starts_with(b"open ") {
        return io_command(word, resolver);
    }
    let (option, value) = option_and_value(word);
    let new = match value::rewritten(value, resolver)? {
        Some(new) => Some(new),
        None => option_string(value, resolver)?,
    };
    Ok(new.map(|new| [option, &new].concat()))
}

/// A command of `qemu-io -c`: words separated by blanks.
fn io_command(command: &[u8], resolver: &mut Resolver<'_>) -> Result<Option<Vec<u8>>, Failure> {
    let mut parts: Vec<Vec<u8>> = Vec::new();
    let mut changed = false;
    for part in command.split(|&byte| byte == b' ') {
        let new = self::word(part, resolver)?;
        changed |= new.is_some();
        parts.push(new.unwrap_or_else(|| part.to_vec()));
    }
    Ok(changed.then(|| parts.join(&b' ')))
}

/// `--name=` or `-x`, and what follows it; nothing and the whole word otherwise.
fn option_and_value(word: &[u8]) -> (&[u8], &[u8]) {
    let at = match word {
        [b'-', b'-', ..] => word.iter().position(|&byte| byte == b'=').map_or(0, |at| at + 1),
        [b'-', letter, _, ..] if letter.is_ascii_alphabetic() => 2,
        _ => 0,
    };
    word.split_at(at)
}

/// An option string with its volumes replaced; `None` if it has none.
fn option_string(text: &[u8], resolver: &mut Resolver<'_>) -> Result<Option<Vec<u8>>, Failure> {
    let mut parts = option_string::split(text);
    let mut changed = false;
    while let Some(at) = parts.iter().position(describes_volume) {
        let prefix = parts[at].key.as_deref().and_then(|key| key.strip_suffix("driver")).unwrap_or_default().to_owned();
        let mut device = Device::default();
        let mut rest = Vec::new();
        let mut place = 0;
        for (index, part) in parts.into_iter().enumerate() {
            if index == at {
                place = rest.len();
                continue;
            }
            let key = part.key.as_deref().and_then(|key| key.strip_prefix(prefix.as_str()));
            if !key.is_some_and(|key| device.take(key, &part.value)) {
                rest.push(part);
            }
        }
        let options = resolver(&device.volume()?)?.options();
        let options = options.into_iter().map(|(key, value)| Part { key: Some(format!("{prefix}{key}")), value });
        rest.splice(place..place, options);
        parts = rest;
        changed = true;
    }
    for part in &mut parts {
        if part.key.is_some()
            && let Some(new) = value::rewritten(&part.value, resolver)?
        {
            part.value = new;
            changed = true;
        }
    }
    Ok(changed.then(|| option_string::join(&parts)))
}

fn describes_volume(part: &Part) -> bool {
    let is_driver = part.key.as_deref().is_some_and(|key| key == "driver" || key.ends_with(".driver"));
    is_driver && url::is_driver(&part.value)
}

/// Whether the next word is a format.
fn is_format_option(word: &[u8]) -> bool {
    matches!(word, b"-f" | b"-F" | b"-O") || word.starts_with(b"--") && is_format_key(word)
}

fn is_format_key(key: &[u8]) -> bool {
    key.ends_with(b"format") || key.ends_with(b"fmt")
}

/// The word with the format `sheepdog` replaced; `None` if it is not in it.
fn without_format(word: &[u8], follows_format: bool) -> Option<Vec<u8>> {
    if follows_format && word == FORMAT {
        return Some(RAW.to_vec());
    }
    let (option, value) = option_and_value(word);
    if value == FORMAT
        && (matches!(option, b"-f" | b"-F" | b"-O") || option.strip_suffix(b"=").is_some_and(is_format_key))
    {
        return Some([option, RAW].concat());
    }
    let mut parts = option_string::split(value);
    let mut changed = false;
    for part in &mut parts {
        if part.value == FORMAT && part.key.as_deref().is_some_and(|key| is_format_key(key.as_bytes())) {
            part.value = RAW.to_vec();
            changed = true;
        }
    }
    changed.then(|| [option, &option_string::join(&parts)].concat())
}

/// Whether a word names its volume as a whole: no other format (qcow2, luks, ...) is described on top of it.
pub fn is_raw(word: &OsStr) -> bool {
    let text = word.as_bytes();
    let json = text.strip_prefix(b"json:").unwrap_or(text);
    if let Ok(json @ serde_json::Value::Object(_)) = serde_json::from_slice(json) {
        return json_is_raw(&json);
    }
    let is_raw = |part: &Part| {
        let is_driver = part.key.as_deref().is_some_and(|key| key == "driver" || key.ends_with(".driver"));
        !is_driver || part.value == RAW || url::is_driver(&part.value)
    };
    url::is_url(text) || option_string::split(text).iter().all(is_raw)
}

fn json_is_raw(json: &serde_json::Value) -> bool {
    let Some(members) = json.as_object() else { return true };
    members.iter().all(|(key, value)| match value.as_str() {
        Some(driver) if key == "driver" || key.ends_with(".driver") => {
            driver.as_bytes() == RAW || url::is_driver(driver.as_bytes())
        }
        _ => json_is_raw(value),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::nbd_export::{NbdExport, NbdPlace, export_name};
    use crate::qemu::url::{Place, VdiUrl};
    use proptest::prelude::*;

    /// The default sheep has a socket with a comma in its path; hosts have a port; a native socket has a neighbour.
    #[allow(clippy::unnecessary_wraps)] // the type of a resolver
    fn resolver(url: &VdiUrl) -> Result<NbdExport, Failure> {
        let place = match &url.place {
            Place::Default => NbdPlace::Unix("/a,b/nbd.sock".into()),
            Place::Inet { host, .. } => NbdPlace::Tcp { host: host.clone(), port: 10809 },
            Place::Unix(path) => NbdPlace::Unix(path.with_file_name("nbd.sock")),
        };
        Ok(NbdExport { place, name: export_name(&url.name, url.snapshot.as_deref()) })
    }

    fn line(typed: &str) -> Option<String> {
        let typed: Vec<OsString> = typed.split(' ').map(OsString::from).collect();
        let new = words(&typed, &mut resolver).expect("well formed")?;
        Some(new.join(OsStr::new(" ")).into_string().expect("text"))
    }

    #[test]
    fn volumes_are_found_wherever_they_stand() {
        const D: &str = "nbd+unix:///d?socket=/a%2Cb/nbd.sock";
        const DEVICE: &str = "driver=nbd,server.type=unix,server.path=/a,,b/nbd.sock,export=d";
        for (typed, expected) in [
            ("info sheepdog:d", format!("info {D}")),
            ("info sheepdog:h:7000:d:t", "info nbd://h:10809/d@t".to_owned()),
            ("info sheepdog://h/d#3", "info nbd://h:10809/d@3".to_owned()),
            ("info sheepdog+unix:///d?socket=/s/sock", "info nbd+unix:///d?socket=/s/nbd.sock".to_owned()),
            ("convert -f sheepdog -O qcow2 sheepdog:d o", format!("convert -f raw -O qcow2 {D} o")),
            ("convert -fsheepdog --x-format=sheepdog sheepdog:d", format!("convert -fraw --x-format=raw {D}")),
            ("compare -f raw -F sheepdog a sheepdog:d", format!("compare -f raw -F raw a {D}")),
            ("compare sheepdog:d sheepdog:d", format!("compare {D} {D}")),
            ("create -f qcow2 -b sheepdog:d -F sheepdog o", format!("create -f qcow2 -b {D} -F raw o")),
            ("create -bsheepdog:d o", format!("create -b{D} o")),
            ("create --backing=sheepdog:d o", format!("create --backing={D} o")),
            (
                "create -o backing_file=sheepdog:d,backing_fmt=sheepdog,size=1G o",
                format!("create -o backing_file={D},backing_fmt=raw,size=1G o"),
            ),
            ("create -obacking_file=sheepdog:d o", format!("create -obacking_file={D} o")),
            ("x -o file=sheepdog:a,,b", "x -o file=nbd+unix:///a%2Cb?socket=/a%2Cb/nbd.sock".to_owned()),
            (
                "info --image-opts driver=raw,file.filename=sheepdog:d",
                format!("info --image-opts driver=raw,file.filename={D}"),
            ),
            ("info --image-opts driver=sheepdog,vdi=d", format!("info --image-opts {DEVICE}")),
            (
                "info --image-opts node-name=n,driver=sheepdog,vdi=a,,b,tag=t,read-only=on",
                "info --image-opts node-name=n,driver=nbd,server.type=unix,server.path=/a,,b/nbd.sock,export=a,,b@t,\
                 read-only=on"
                    .to_owned(),
            ),
            (
                "info --image-opts driver=raw,file.vdi=d,file.snap-id=4,file.driver=sheepdog,file.server.type=inet,\
                 file.server.host=h,file.server.port=7001,offset=512",
                "info --image-opts driver=raw,file.driver=nbd,file.server.type=inet,file.server.host=h,\
                 file.server.port=10809,file.export=d@4,offset=512"
                    .to_owned(),
            ),
            (
                "info --image-opts driver=sheepdog,vdi=d,server.type=unix,server.path=/s/sock",
                "info --image-opts driver=nbd,server.type=unix,server.path=/s/nbd.sock,export=d".to_owned(),
            ),
            (
                "info --image-opts driver=sheepdog,vdi=d,host=h,port=7001",
                "info --image-opts driver=nbd,server.type=inet,server.host=h,server.port=10809,export=d".to_owned(),
            ),
            ("info --image-opts driver=sheepdog,filename=sheepdog:d", format!("info --image-opts {DEVICE}")),
            ("-c read -c open sheepdog:d", format!("-c read -c open {D}")),
        ] {
            assert_eq!(line(typed).as_deref(), Some(expected.as_str()), "{typed}");
        }
        let command = [OsString::from("-c"), OsString::from("open -o driver=raw,file=sheepdog:d  sheepdog:d")];
        let new = words(&command, &mut resolver).expect("well formed").expect("volumes");
        assert_eq!(new[1], OsString::from(format!("open -o driver=raw,file={D}  {D}")));
    }

    #[test]
    fn volumes_are_found_in_json() {
        let unix = r#""server":{"path":"/a,b/nbd.sock","type":"unix"}"#;
        for (typed, expected) in [
            (r#"json:{"driver":"sheepdog","vdi":"d"}"#, format!(r#"json:{{"driver":"nbd","export":"d",{unix}}}"#)),
            (
                r#"json:{"driver":"raw","file":{"driver":"sheepdog","vdi":"d","snap-id":3,"read-only":true}}"#,
                format!(
                    r#"json:{{"driver":"raw","file":{{"driver":"nbd","export":"d@3","read-only":true,{unix}}}}}"#
                ),
            ),
            (
                r#"json:{"driver":"sheepdog","vdi":"d","server":{"type":"inet","host":"h","port":7001}}"#,
                r#"json:{"driver":"nbd","export":"d","server":{"host":"h","port":"10809","type":"inet"}}"#.to_owned(),
            ),
            (
                r#"json:{"file.driver":"sheepdog","file.vdi":"d","file.server.type":"unix","file.server.path":"/s/sock"}"#,
                r#"json:{"file.driver":"nbd","file.export":"d","file.server.path":"/s/nbd.sock","file.server.type":"unix"}"#
                    .to_owned(),
            ),
            (
                r#"json:{"driver":"quorum","children":[{"file":"sheepdog:h:7000:d"},"sheepdog://h/e"]}"#,
                r#"json:{"children":[{"file":"nbd://h:10809/d"},"nbd://h:10809/e"],"driver":"quorum"}"#.to_owned(),
            ),
            (
                r#"--blockdev={"driver":"sheepdog","vdi":"d","node-name":"sheepdog:x"}"#,
                format!(r#"--blockdev={{"driver":"nbd","export":"d","node-name":"sheepdog:x",{unix}}}"#),
            ),
            (
                r#"file=json:{"driver":"sheepdog",,"vdi":"d"},size=1"#,
                format!(r#"file=json:{{"driver":"nbd","export":"d",{unix}}},size=1"#).replace(",\"", ",,\"").replace("a,b", "a,,b"),
            ),
        ] {
            assert_eq!(line(typed).as_deref(), Some(expected.as_str()), "{typed}");
        }
    }

    #[test]
    fn what_has_no_volume_is_left_alone() {
        for typed in [
            "",
            "--help",
            "info disk.qcow2",
            "convert -f raw -O qcow2 -o size=1G,x=a,,b in out",
            "snapshot -c sheepdog d",
            "info -f sheepdog d",
            "info ./sheepdog:d",
            "info dir/a=sheepdog:d",
            r#"json:{"driver": "raw", "file": {"driver": "file", "filename": "x"}}"#,
            "json:{sheepdog",
            "nbd:localhost:10809",
        ] {
            assert_eq!(line(typed), None, "{typed}");
        }
    }

    #[test]
    fn a_wrong_volume_is_an_error_that_says_so() {
        for (typed, reason) in [
            ("sheepdog:", "Invalid volume 'sheepdog:'"),
            ("file=sheepdog://h:x/d", "'x' is not a port"),
            ("driver=sheepdog,tag=t", "they name no volume"),
            (r#"json:{"driver":"sheepdog"}"#, "they name no volume"),
            (r#"json:{"driver":"sheepdog","vdi":"d","snap-id":0}"#, "'0' is not a snapshot id"),
        ] {
            let failure = word(typed.as_bytes(), &mut resolver).expect_err(typed);
            assert!(failure.message.contains(reason), "{typed}: {failure}");
        }
    }

    #[test]
    fn only_bare_volumes_are_raw() {
        for (word, expected) in [
            ("sheepdog:d", true),
            ("driver=raw,file.driver=sheepdog,file.vdi=d", true),
            ("driver=qcow2,file.driver=sheepdog,file.vdi=d", false),
            (r#"json:{"driver":"sheepdog","vdi":"d"}"#, true),
            (r#"json:{"driver":"qcow2","file":{"driver":"sheepdog","vdi":"d"}}"#, false),
        ] {
            assert_eq!(is_raw(OsStr::new(word)), expected, "{word}");
        }
    }

    proptest! {
        #[test]
        fn garbage_never_panics(word in proptest::collection::vec(any::<u8>(), 0..60)) {
            let _ = self::word(&word, &mut resolver);
            let _ = is_raw(OsStr::from_bytes(&word));
        }

        #[test]
        fn near_misses_never_panic(parts in proptest::collection::vec(0_usize..24, 0..12)) {
            const PIECES: [&str; 24] = [
                "sheepdog", ":", "/", "//", "#", "?socket=", "=", ",", ",,", "driver=", "file.", "vdi=", "json:", "{", "}",
                "\"driver\":", "\"sheepdog\"", "\"vdi\":\"d\"", "-b", "--", "%", "[", "\u{e4}", "open ",
            ];
            let word: String = parts.iter().map(|&part| PIECES[part]).collect();
            let _ = words(&[OsString::from(&word), OsString::from("-f"), OsString::from(word.clone())], &mut resolver);
            let _ = is_raw(OsStr::new(&word));
        }
    }
}
