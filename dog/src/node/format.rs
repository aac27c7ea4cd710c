//! `dog node format`: a look at a directory of this machine. The store is made by sheep.

use std::io;
use std::path::Path;

use crate::args::NodeFormat;
use crate::exit::Failure;
use crate::report::Report;

/// What a fresh file system may have.
const LOST_AND_FOUND: &str = "lost+found";

/// Runs the command.
pub fn run(typed: &NodeFormat) -> Result<Report, Failure> {
    let (Some(directory), Some(store)) = (typed.directory.as_deref(), typed.store.as_deref()) else {
        return Err(Failure::usage("Say where and which kind: dog node format DIR plain"));
    };
    if !matches!(store, "plain" | "tree") {
        return Err(Failure::system(format!("Invalid store '{store}': must be plain or tree")));
    }
    let directory = Path::new(directory);
    match first_entry(directory) {
        Ok(None) => Ok(Report::silent()),
        Ok(Some(name)) => Err(Failure::system(format!(
            "{} is not empty: it contains '{name}'; give an empty directory, or start sheep with this one if it is its store",
            directory.display()
        ))),
        Err(error) => Err(Failure::system(format!("Cannot use {}: {error}", directory.display()))),
    }
}

fn first_entry(directory: &Path) -> io::Result<Option<String>> {
    let metadata = std::fs::metadata(directory)?;
    if metadata.permissions().readonly() {
        return Err(io::ErrorKind::PermissionDenied.into());
    }
    for entry in std::fs::read_dir(directory)? {
        let name = entry?.file_name();
        if name != LOST_AND_FOUND {
            return Ok(Some(name.to_string_lossy().into_owned()));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;

    #[test]
    fn only_an_empty_directory_will_do() {
        let place = std::env::temp_dir().join(format!("dog-node-format-{}", std::process::id()));
        let of = |store: &str| {
            let typed = NodeFormat { directory: Some(place.clone().into()), store: Some(store.to_owned()) };
            run(&typed).map(drop).map_err(|failure| failure.exit)
        };
        assert_eq!(of("plain"), Err(Exit::System), "there is no such directory");
        std::fs::create_dir_all(place.join(LOST_AND_FOUND)).expect("a directory");
        assert_eq!([of("plain"), of("tree"), of("bush")], [Ok(()), Ok(()), Err(Exit::System)]);
        std::fs::write(place.join("superblock"), b"").expect("a file");
        assert_eq!(of("plain"), Err(Exit::System));
        std::fs::remove_dir_all(&place).expect("removed");
        let typed = NodeFormat { directory: Some(place.into()), store: None };
        assert_eq!(run(&typed).map(drop).expect_err("no store").exit, Exit::Usage);
    }
}
