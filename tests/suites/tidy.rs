//! What drifts silently and has no good exception: floors, banned calls, leftovers, and documents that must keep up.
//!
//! Each check names the file and line and what to do instead. The two allow lists below are open and may only shrink: an entry that
//! matches nothing any more fails as well.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use tests::source_scan::{CodePath, SourceFile, all_files, paths, repository_root};

/// Which floors a floor of `sheep/src` may name by `crate::`.
const FLOORS: &[(&str, &[&str])] = &[
    ("world", &["world"]),
    ("store", &["world", "store"]),
    ("cluster", &["world", "cluster"]),
    ("data", &["world", "store", "cluster", "data"]),
    ("front", &["world", "data", "front"]),
];

/// Files of `sheep/src` that put the floors together and may name all of them.
const ASSEMBLY: &[&str] = &["main", "lib", "node", "config", "logging"];

/// What a package may depend on. `*` stands for any foreign package.
const PACKAGES: &[(&str, &[&str])] = &[
    ("qemu-proto", &[]),
    ("sheep/core", &["qemu-proto", "blake3", "postcard", "serde", "xxhash-rust"]),
    ("sheep", &["qemu-proto", "sheep-core", "*"]),
    ("dog", &["qemu-proto", "sheep-core", "*"]),
    ("sheepfs", &["qemu-proto", "sheep-core", "*"]),
];

/// Calls that only `sheep/src/world` may make, and what to use instead.
const BANNED: &[(&str, &str)] = &[
    ("std::fs", "world::disk"),
    ("std::net::TcpListener", "world::net"),
    ("std::net::TcpStream", "world::net"),
    ("std::net::UdpSocket", "world::net"),
    ("std::os::unix::net", "world::net"),
    ("std::time::Instant", "world::clock, with Duration as the type of a moment"),
    ("std::time::SystemTime", "world::clock"),
    ("std::thread::sleep", "world::clock"),
    ("Instant::now", "world::clock"),
    ("SystemTime::now", "world::clock"),
    ("tokio::net", "world::net"),
    ("tokio::fs", "world::disk"),
    ("tokio::time", "world::clock"),
    ("rand", "world::rng"),
    ("getrandom", "world::rng"),
    ("rustix::fs", "world::disk"),
    ("rustix::net", "world::net"),
    ("rustix::rand", "world::rng"),
    ("rustix::time", "world::clock"),
];

/// Where a banned call stays for now: file, call, reason.
const BANNED_ALLOWED: &[(&str, &str, &str)] = &[
    ("sheep/src/main.rs", "std::fs", "the pid file and /dev/null: of the process, before there is a world"),
    ("sheep/src/main.rs", "rustix::fs", "the lock on the pid file: of the process, before there is a world"),
    ("sheep/src/config.rs", "std::fs", "the path given to -l: of the process, before there is a world"),
    ("sheep/src/logging.rs", "std::fs", "the log tells of the world's failures too, so it must not go through it"),
];

/// It takes the place of the C library's `getrandom` in simulations, which cannot be done without.
const UNSAFE_IN_TESTS: &str = "tests/src/sim/entropy.rs";

fn rust_files() -> Vec<SourceFile> {
    let files = all_files(&repository_root()).expect("the repository can be read");
    let rust: Vec<SourceFile> = files.into_iter().filter(SourceFile::is_rust).collect();
    assert!(rust.len() > 10, "only {} source files found: the scan looks in the wrong place", rust.len());
    rust
}

fn report(complaints: &[String]) {
    assert!(complaints.is_empty(), "\n{}\n", complaints.join("\n"));
}

/// The module path of a file below `root` (a `src` directory), `mod.rs` standing for its folder.
fn module_of(path: &str, root: &str) -> Option<Vec<String>> {
    let below = path.strip_prefix(root)?.strip_prefix('/')?.strip_suffix(".rs")?;
    let mut module: Vec<String> = below.split('/').map(str::to_owned).collect();
    if matches!(module.last().map(String::as_str), Some("mod" | "lib")) {
        module.pop();
    }
    Some(module)
}

/// What a path that begins with `crate`, `super` or `self` means, seen from `module`; `None` for all other paths.
fn resolve(path: &CodePath, module: &[String]) -> Option<Vec<String>> {
    let mut base = match path.segments[0].as_str() {
        "crate" => Vec::new(),
        "self" | "super" => module.to_vec(),
        _ => return None,
    };
    let mut rest = path.segments.as_slice();
    while let Some((first, others)) = rest.split_first() {
        match first.as_str() {
            "super" => drop(base.pop()),
            "crate" | "self" => {}
            _ => break,
        }
        rest = others;
    }
    base.extend(rest.iter().cloned());
    Some(base)
}

#[test]
fn floors_name_only_floors_below() {
    let mut complaints = Vec::new();
    for file in rust_files() {
        let Some(module) = module_of(&file.path, "sheep/src") else { continue };
        let Some(floor) = module.first() else { continue };
        if ASSEMBLY.contains(&floor.as_str()) {
            continue;
        }
        let Some((_, allowed)) = FLOORS.iter().find(|(name, _)| name == floor) else {
            complaints.push(format!("{}: `{floor}` is no floor; floors are listed at the top of tidy.rs", file.path));
            continue;
        };
        for path in paths(&file.production_code()) {
            let Some(target) = resolve(&path, &module) else { continue };
            let Some(named) = target.first() else { continue };
            if FLOORS.iter().any(|(name, _)| name == named) && !allowed.contains(&named.as_str()) {
                complaints.push(format!("{}:{}: {floor} must not know {named}", file.path, path.line));
            }
            if ASSEMBLY.contains(&named.as_str()) {
                complaints
                    .push(format!("{}:{}: {floor} must not know {named}, which assembles it", file.path, path.line));
            }
            let is_other_front = floor == "front" && named == "front" && module.len() > 1 && target.len() > 1;
            let is_front_module =
                |name: &str| Path::new(&repository_root()).join("sheep/src/front").join(name).is_dir();
            if is_other_front && target[1] != module[1] && is_front_module(&target[1]) {
                complaints.push(format!("{}:{}: front ends must not know each other", file.path, path.line));
            }
        }
    }
    report(&complaints);
}

#[test]
fn packages_depend_only_on_packages_below() {
    const OURS: &[&str] = &["qemu-proto", "sheep-core", "sheep", "dog", "sheepfs", "tests"];
    let root = repository_root();
    let mut complaints = Vec::new();
    for &(directory, allowed) in PACKAGES {
        let manifest = std::fs::read_to_string(root.join(directory).join("Cargo.toml")).expect("every package has one");
        for name in dependencies(&manifest) {
            let wanted = if OURS.contains(&name.as_str()) { name.as_str() } else { "*" };
            if !allowed.contains(&name.as_str()) && !allowed.contains(&wanted) {
                complaints.push(format!("{directory}/Cargo.toml: must not depend on {name}"));
            }
        }
    }
    let core = std::fs::read_to_string(root.join("sheep/core/src/lib.rs")).expect("the core has a lib.rs");
    if !core.contains("#![no_std]") {
        complaints.push("sheep/core/src/lib.rs: the core is `no_std`, so that it cannot reach the outside".to_owned());
    }
    report(&complaints);
}

/// The names under `[dependencies]` of a manifest.
fn dependencies(manifest: &str) -> Vec<String> {
    let section = manifest.split("\n[").find(|section| section.trim_start_matches('[').starts_with("dependencies]"));
    let lines = section.unwrap_or_default().lines().skip(1);
    let names = lines.filter_map(|line| line.split(['.', ' ', '=']).next());
    names.filter(|name| !name.is_empty() && !name.starts_with('#')).map(str::to_owned).collect()
}

#[test]
fn no_import_cycle_within_a_floor() {
    let files = rust_files();
    let mut complaints = Vec::new();
    for root in ["qemu-proto/src", "sheep/core/src", "sheep/src", "dog/src", "sheepfs/src"] {
        let modules: BTreeMap<Vec<String>, &SourceFile> =
            files.iter().filter_map(|file| Some((module_of(&file.path, root)?, file))).collect();
        let mut edges: BTreeMap<&Vec<String>, BTreeSet<&Vec<String>>> = BTreeMap::new();
        for (module, file) in &modules {
            if module.is_empty() || module == &["main"] {
                continue;
            }
            for path in paths(&file.production_code()) {
                let Some(target) = resolve(&path, module) else { continue };
                let known = (1..=target.len()).rev().find_map(|length| modules.get_key_value(&target[..length]));
                let Some((target, _)) = known else { continue };
                // A folder and its own children belong together.
                if target.starts_with(module) || module.starts_with(target) {
                    continue;
                }
                edges.entry(module).or_default().insert(target);
            }
        }
        for module in edges.keys() {
            if let Some(cycle) = way_back(module, &edges) {
                let shown: Vec<String> = cycle.iter().map(|module| module.join("::")).collect();
                complaints.push(format!("{root}: import cycle: {}", shown.join(" -> ")));
            }
        }
    }
    report(&complaints);
}

/// A shortest way from `start` along `edges` back to it.
fn way_back<'a>(
    start: &'a Vec<String>,
    edges: &BTreeMap<&'a Vec<String>, BTreeSet<&'a Vec<String>>>,
) -> Option<Vec<&'a Vec<String>>> {
    let mut ways = vec![vec![start]];
    let mut seen = BTreeSet::new();
    let mut next = 0;
    while next < ways.len() {
        let way = ways[next].clone();
        next += 1;
        for &target in edges.get(way[way.len() - 1]).into_iter().flatten() {
            let mut longer = way.clone();
            longer.push(target);
            if target == start {
                return Some(longer);
            }
            if seen.insert(target) {
                ways.push(longer);
            }
        }
    }
    None
}

#[test]
fn only_world_reaches_the_operating_system() {
    let mut complaints = Vec::new();
    let mut used = BTreeSet::new();
    for file in rust_files() {
        let roots = ["sheep/src/", "sheep/core/src/", "qemu-proto/src/"];
        let is_ours = roots.iter().any(|root| file.path.starts_with(root));
        if !is_ours || file.path.starts_with("sheep/src/world/") || is_test_code(&file.path) {
            continue;
        }
        for path in paths(&file.production_code()) {
            for &(call, instead) in BANNED.iter().filter(|(call, _)| path.starts_with(call)) {
                let allowed = BANNED_ALLOWED.iter().position(|&(name, what, _)| name == file.path && what == call);
                match allowed {
                    Some(entry) => drop(used.insert(entry)),
                    None => complaints.push(format!("{}:{}: {call}: use {instead}", file.path, path.line)),
                }
            }
        }
    }
    for (entry, (file, call, _)) in BANNED_ALLOWED.iter().enumerate() {
        if !used.contains(&entry) {
            complaints.push(format!("tidy.rs: {file} does not use {call} any more: take it off the allow list"));
        }
    }
    report(&complaints);
}

#[test]
fn unsafe_stays_in_world_with_a_reason() {
    let mut complaints = Vec::new();
    for file in rust_files() {
        let code = file.code();
        let lines: Vec<&str> = file.text.lines().collect();
        for path in paths(&code).iter().filter(|path| path.segments[0] == "unsafe") {
            if !file.path.starts_with("sheep/src/world/") && file.path != UNSAFE_IN_TESTS {
                complaints.push(format!("{}:{}: `unsafe` belongs in sheep/src/world", file.path, path.line));
                continue;
            }
            let before = &lines[path.line.saturating_sub(8)..path.line];
            if !before.iter().any(|line| line.contains("SAFETY:")) {
                complaints.push(format!("{}:{}: `unsafe` without a SAFETY reason above it", file.path, path.line));
            }
        }
    }
    report(&complaints);
}

/// Whether a whole file is test code: the proof, and the `tests/` folder of a package or of a module.
fn is_test_code(path: &str) -> bool {
    path.starts_with("tests/") || path.contains("/tests/")
}

#[test]
fn no_unwrap_outside_tests() {
    let mut complaints = Vec::new();
    for file in rust_files().iter().filter(|file| !is_test_code(&file.path)) {
        for (index, line) in file.production_code().lines().enumerate() {
            if line.contains(".unwrap()") || line.contains("clippy::unwrap_used") {
                complaints.push(format!(
                    "{}:{}: unwrap: `expect` with the invariant, or an error",
                    file.path,
                    index + 1
                ));
            }
        }
    }
    report(&complaints);
}

#[test]
fn nothing_is_left_for_later() {
    // Written in two halves, or this file would find itself.
    let marks = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X"), concat!("todo", "!("), "#[ignore"];
    let mut complaints = Vec::new();
    for file in all_files(&repository_root()).expect("the repository can be read") {
        if file.path == "tests/suites/tidy.rs" || file.path == "Cargo.lock" {
            continue;
        }
        for (index, line) in file.text.lines().enumerate() {
            let mark = marks.iter().find(|mark| contains_word(line, mark));
            if let Some(mark) = mark {
                complaints.push(format!("{}:{}: {mark}: finish it, or file an issue", file.path, index + 1));
            }
        }
    }
    report(&complaints);
}

fn contains_word(line: &str, word: &str) -> bool {
    line.match_indices(word).any(|(at, _)| {
        let is_letter = |character: Option<char>| character.is_some_and(char::is_alphanumeric);
        !is_letter(line[..at].chars().next_back()) && !is_letter(line[at + word.len()..].chars().next())
    })
}

#[test]
fn the_text_is_about_the_project_only() {
    let homes = [concat!("/wo", "rk/"), concat!("/ro", "ot/"), concat!("/ho", "me/")];
    let registries = ["debian", "crates.io", "pypi", "npmjs", "proxy.golang"];
    let mut complaints = Vec::new();
    for file in all_files(&repository_root()).expect("the repository can be read") {
        if file.path == "Cargo.lock" || file.path == "tests/suites/tidy.rs" {
            continue;
        }
        for (index, line) in file.text.lines().enumerate() {
            let place = format!("{}:{}", file.path, index + 1);
            for home in homes {
                let is_path = line.match_indices(home).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    !before.is_some_and(|character| character.is_alphanumeric() || "_.".contains(character))
                });
                if is_path {
                    complaints.push(format!("{place}: a path of one machine: {}", line.trim()));
                }
            }
            let is_registry = line.split("://").skip(1).any(|address| {
                let host = address.split(['/', ' ', '"']).next().unwrap_or_default();
                registries.iter().any(|registry| host.contains(registry))
            });
            if is_registry {
                complaints.push(format!("{place}: the host of a package registry: {}", line.trim()));
            }
        }
    }
    report(&complaints);
}

#[test]
fn every_source_file_is_built_and_says_what_it_is() {
    let files = rust_files();
    let text_of = |path: &str| std::fs::read_to_string(repository_root().join(path)).unwrap_or_default();
    let mut complaints = Vec::new();
    for file in &files {
        if !file.text.starts_with("//!") {
            complaints.push(format!("{}: begin with `//!` and what the file owns", file.path));
        }
        let path = Path::new(&file.path);
        let stem = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or_default();
        let folder = path.parent().and_then(Path::to_str).unwrap_or_default();
        if matches!(stem, "lib" | "main") && folder.ends_with("src") {
            continue;
        }
        let (name, home) = match stem {
            "mod" => {
                let (above, name) = folder.rsplit_once('/').unwrap_or(("", folder));
                (name, above)
            }
            _ => (stem, folder),
        };
        let named_by_mod = ["mod.rs", "lib.rs", "main.rs"].iter().any(|parent| {
            let text = text_of(&format!("{home}/{parent}"));
            text.lines().any(|line| line.trim_end().ends_with(&format!("mod {name};")))
        });
        let named_by_cargo = ["tests", "tests/fuzz", "sheep", "dog"].iter().any(|package| {
            file.path
                .strip_prefix(&format!("{package}/"))
                .is_some_and(|below| text_of(&format!("{package}/Cargo.toml")).contains(&format!("\"{below}\"")))
        });
        // What Cargo finds by itself.
        let found_by_cargo = ["tests", "examples", "benches", "src/bin"].iter().any(|place| {
            let package = folder.strip_suffix(place).filter(|package| !package.is_empty());
            package.is_some_and(|package| repository_root().join(package).join("Cargo.toml").exists())
        });
        if !named_by_mod && !named_by_cargo && !found_by_cargo {
            complaints.push(format!("{}: no `mod {name};` and no target names it: it is never built", file.path));
        }
    }
    report(&complaints);
}

#[test]
fn the_readme_lists_every_folder() {
    let readme = std::fs::read_to_string(repository_root().join("README.md")).expect("there is a README");
    let folders: BTreeSet<String> = all_files(&repository_root())
        .expect("the repository can be read")
        .iter()
        .filter_map(|file| Some(file.path.rsplit_once('/')?.0.to_owned()))
        .collect();
    let missing = folders.iter().filter(|folder| !readme.contains(&format!("`{folder}/`")));
    report(&missing.map(|folder| format!("README.md: the map lacks `{folder}/`")).collect::<Vec<_>>());
}

/// Hexadecimal literals of production code, in the two-digit form of the documents.
fn hex_literals(code: &str) -> BTreeSet<String> {
    let words = code.split(|character: char| !character.is_ascii_alphanumeric());
    let hex = words.filter_map(|word| u64::from_str_radix(word.strip_prefix("0x")?, 16).ok());
    hex.map(|number| format!("0x{number:02X}")).collect()
}

#[test]
fn wire_md_names_every_opcode_and_status() {
    let root = repository_root();
    let read = |path: &str| std::fs::read_to_string(root.join(path)).unwrap_or_else(|error| panic!("{path}: {error}"));
    let wire = read("qemu-proto/WIRE.md").to_uppercase();
    let mut complaints = Vec::new();
    for path in ["qemu-proto/src/opcode.rs", "qemu-proto/src/status.rs"] {
        let file = SourceFile { path: path.to_owned(), text: read(path) };
        let numbers = hex_literals(&file.production_code());
        assert!(numbers.len() >= 20, "{path}: only {} numbers found", numbers.len());
        let missing = numbers.iter().filter(|number| !wire.contains(&number.to_uppercase()));
        complaints.extend(missing.map(|number| format!("qemu-proto/WIRE.md: lacks {number} of {path}")));
    }
    report(&complaints);
}

/// String literals that production code gives to `.join(`, or to a constant: names and parts of names.
fn file_names(file: &SourceFile) -> BTreeSet<String> {
    let code = file.production_code();
    let mut names = BTreeSet::new();
    for (line, shown) in code.lines().zip(file.text.lines()) {
        let declares = line.contains("const ") && line.contains(": &str =");
        if declares || line.contains(".join(") {
            names.extend(shown.split('"').skip(1).step_by(2).map(str::to_owned));
        }
    }
    names.retain(|name| !name.is_empty() && !name.contains(['{', ' ']));
    names
}

#[test]
fn disk_md_names_every_file_of_the_store() {
    let disk = std::fs::read_to_string(repository_root().join("sheep/DISK.md")).expect("the store has its DISK.md");
    let mut found_count = 0;
    let mut complaints = Vec::new();
    for file in rust_files().iter().filter(|file| file.path.starts_with("sheep/src/store/")) {
        for name in file_names(file) {
            found_count += 1;
            if !disk.contains(&name) {
                complaints.push(format!("sheep/DISK.md: lacks `{name}` of {}", file.path));
            }
        }
    }
    assert!(found_count >= 3, "only {found_count} file names found in the store: the scan looks for the wrong form");
    report(&complaints);
}

/// `n of m; next: FILE` of a header line about the write path.
fn write_path_step(text: &str) -> Option<(usize, usize, String)> {
    let line = text.lines().take_while(|line| line.starts_with("//!")).find(|line| line.contains("rite path "))?;
    let words: Vec<&str> =
        line.split(|character: char| character.is_whitespace() || ",;`:".contains(character)).collect();
    let words: Vec<&str> = words.into_iter().filter(|word| !word.is_empty()).collect();
    let at = words.iter().position(|word| *word == "path")?;
    let step = words.get(at + 1)?.parse().ok()?;
    let count = words.get(at + 3)?.trim_end_matches('.').parse().ok()?;
    let next = words.iter().position(|word| *word == "next").and_then(|at| words.get(at + 1)).copied();
    Some((step, count, next.unwrap_or_default().trim_end_matches('.').to_owned()))
}

#[test]
fn the_write_path_is_one_unbroken_chain() {
    let mut steps = BTreeMap::new();
    for file in rust_files().iter().filter(|file| file.path.starts_with("sheep/src/")) {
        if let Some((step, count, next)) = write_path_step(&file.text) {
            assert!(steps.insert(step, (count, next, file.path.clone())).is_none(), "{}: step {step} twice", file.path);
        }
    }
    let count = steps.len();
    assert!(count >= 4, "the files of the write path say `Write path n of m; next: FILE` in their headers");
    for (step, (stated_count, next, path)) in &steps {
        assert_eq!(*stated_count, count, "{path}: there are {count} steps");
        if let Some((_, _, following)) = steps.get(&(step + 1)) {
            assert!(following.ends_with(next.as_str()) && !next.is_empty(), "{path}: next is {following}, not {next}");
        } else {
            assert_eq!(*step, count, "{path}: step {} is missing", step + 1);
        }
    }
}

#[test]
fn every_invariant_is_used_by_the_simulator() {
    let files = rust_files();
    let simulator: String = files
        .iter()
        .filter(|file| file.path.starts_with("tests/") && !file.path.starts_with("tests/src/invariants/"))
        .map(SourceFile::code)
        .collect();
    let unused = files.iter().filter_map(|file| {
        let name = file.path.strip_prefix("tests/src/invariants/")?.strip_suffix(".rs")?;
        (name != "mod" && !simulator.contains(&format!("{name}::"))).then(|| format!("{}: nobody checks it", file.path))
    });
    report(&unused.collect::<Vec<_>>());
}
