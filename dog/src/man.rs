//! `dog man`: manual pages, one for each command, from the same tree that `--help` shows.
//!
//! Always holds: what differs from the old tool is told in two places only, the README (for the tool as a whole) and the help
//! of a command; the pages repeat both.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

use clap::CommandFactory;
use clap_mangen::Man;
use clap_mangen::roff::{Roff, bold, italic, roman};

use crate::args::{self, Typed};
use crate::exit::{Exit, Failure};
use crate::report::Report;

const README: &str = include_str!("../../README.md");
/// The part of the README that the page of the tool itself repeats.
const DIFFERENCES: &str = "\n## Differences from Sheepdog";

const EXIT_CODES: [(Exit, &str); 7] = [
    (Exit::Success, "Done; also: a question was answered with no."),
    (Exit::Failure, "The cluster refused, or a value was wrong."),
    (Exit::System, "No sheep could be asked, or this machine failed."),
    (Exit::Exists, "What should be made exists already."),
    (Exit::Missing, "What was asked for does not exist."),
    (Exit::Usage, "The command line was wrong."),
    (Exit::Refused, "A node refused: its throttle, or a number of vnodes."),
];

const VARIABLES: [(&str, &str); 9] = [
    ("SHEEPDOG_DOG_ADDR", "Address of the sheep to ask, unless -a names one."),
    ("SHEEPDOG_DOG_PORT", "Its port, unless -p names one."),
    ("DOG_KEY", "A copy of the cluster key, for a sheep on another machine, unless --key names one."),
    ("SHEEPDOG_DOG_LOG", "When set, every call is recorded in the system log."),
    ("SHEEPDOG_DOG_LOG_PATH", "Record calls in this file instead."),
    ("DOG_QEMU_IMG", "What 'dog img' runs; default qemu-img."),
    ("DOG_QEMU_IO", "What 'dog io' runs; default qemu-io."),
    ("DOG_QEMU_NBD", "What 'dog nbd' runs; default qemu-nbd."),
    ("DOG_NBD_CLIENT", "What 'dog vdi attach --nbd' runs; default nbd-client."),
];

/// One page.
struct Page {
    file_name: String,
    text: Vec<u8>,
}

/// Runs the command.
pub fn run(typed: &args::Man) -> Result<Report, Failure> {
    let directory = Path::new(&typed.directory);
    let failed =
        |path: &Path, error: &std::io::Error| Failure::system(format!("Cannot write {}: {error}", path.display()));
    fs::create_dir_all(directory).map_err(|error| failed(directory, &error))?;
    for page in pages() {
        let path = directory.join(&page.file_name);
        fs::write(&path, &page.text).map_err(|error| failed(&path, &error))?;
    }
    Ok(Report::silent())
}

fn pages() -> Vec<Page> {
    let mut tree = Typed::command();
    tree.build();
    let mut pages = Vec::new();
    let mut commands = vec![&tree];
    while let Some(command) = commands.pop() {
        let above = command.get_display_name().and_then(|name| name.rsplit_once('-')).map(|(above, _)| above);
        pages.push(page(command, above));
        commands.extend(command.get_subcommands());
    }
    pages
}

/// The page of a command; `above` is that of the command it belongs to.
fn page(command: &clap::Command, above: Option<&str>) -> Page {
    let man = Man::new(command.clone());
    let name = command.get_display_name().unwrap_or_else(|| command.get_name());
    // The library leaves the empty date out, and what follows would move into its place.
    let mut text = format!(".TH \"{name}\" \"1\" \"\" \"dog {}\" \"Sheep\"\n", env!("CARGO_PKG_VERSION")).into_bytes();
    // What hands all of its words to another program has no options of its own.
    let is_verbatim = command.is_disable_help_flag_set();
    let rendered = man.render_name_section(&mut text).and_then(|()| {
        if is_verbatim {
            return Ok(());
        }
        man.render_synopsis_section(&mut text)?;
        man.render_options_section(&mut text)
    });
    rendered.expect("memory can be written");
    let mut roff = Roff::new();
    if is_verbatim {
        let name = command.get_bin_name().unwrap_or_else(|| command.get_name());
        roff.control("SH", ["SYNOPSIS"]);
        roff.text([bold(name), roman(" "), italic("ARGS...")]);
    }
    put_subcommands(&mut roff, command);
    if let Some(help) = command.get_after_help() {
        put_help(&mut roff, &help.to_string());
    }
    match above {
        None => put_tool(&mut roff),
        Some(above) => {
            roff.control("SH", ["SEE ALSO"]);
            roff.text([bold(above), roman("(1)")]);
        }
    }
    roff.to_writer(&mut text).expect("memory can be written");
    Page { file_name: man.get_filename(), text: without_repetition(&text) }
}

/// Each section comes with the same definitions, made by `.ie` and `.el`: the first ones are enough.
fn without_repetition(text: &[u8]) -> Vec<u8> {
    let mut seen = BTreeSet::new();
    let is_definition = |line: &&[u8]| line.starts_with(b".ie ") || line.starts_with(b".el ");
    text.split_inclusive(|&byte| byte == b'\n')
        .filter(|line| !is_definition(line) || seen.insert(*line))
        .flatten()
        .copied()
        .collect()
}

/// The commands right below this one.
fn put_subcommands(roff: &mut Roff, command: &clap::Command) {
    if !command.has_subcommands() {
        return;
    }
    roff.control("SH", ["COMMANDS"]);
    for subcommand in command.get_subcommands() {
        let name = subcommand.get_display_name().unwrap_or_else(|| subcommand.get_name());
        let about = subcommand.get_about().map(ToString::to_string).unwrap_or_default();
        put_item(roff, &format!("{name}(1)"), &about);
    }
}

/// What follows the options in the help of a command: examples, then remarks. A line that begins with blanks stays a line of
/// its own.
fn put_help(roff: &mut Roff, help: &str) {
    let mut in_notes = false;
    for paragraph in help.split("\n\n") {
        let lines = match paragraph.split_once('\n') {
            Some(("Example:" | "Examples:", lines)) => {
                roff.control("SH", ["EXAMPLES"]);
                in_notes = false;
                lines
            }
            _ if in_notes => {
                roff.control("PP", []);
                paragraph
            }
            _ => {
                roff.control("SH", ["NOTES"]);
                in_notes = true;
                paragraph
            }
        };
        for (at, line) in lines.lines().enumerate() {
            if at > 0 && line.starts_with("Differs from") {
                roff.control("PP", []);
            }
            roff.text([roman(line)]);
        }
    }
}

/// What only the page of the tool itself has.
fn put_tool(roff: &mut Roff) {
    roff.control("SH", ["EXIT STATUS"]);
    for (exit, meaning) in EXIT_CODES {
        put_item(roff, &(exit as u8).to_string(), meaning);
    }
    roff.control("SH", ["ENVIRONMENT"]);
    for (name, meaning) in VARIABLES {
        put_item(roff, name, meaning);
    }
    roff.control("SH", ["DIFFERENCES FROM SHEEPDOG"]);
    for difference in differences() {
        roff.control("IP", ["\\(bu", "2"]);
        roff.text([roman(difference)]);
    }
}

fn put_item(roff: &mut Roff, name: &str, meaning: &str) {
    roff.control("TP", []);
    roff.text([bold(name)]);
    roff.text([roman(meaning)]);
}

/// The items of the README's list, without its marks.
fn differences() -> Vec<String> {
    let section = README.split_once(DIFFERENCES).map_or("", |(_, section)| section);
    let section = section.split("\n## ").next().unwrap_or_default();
    let items = section.split("\n* ").skip(1);
    items.map(|item| item.split_whitespace().collect::<Vec<_>>().join(" ").replace(['`', '*'], "")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::BTreeMap;

    fn texts() -> BTreeMap<String, String> {
        pages().into_iter().map(|page| (page.file_name, String::from_utf8(page.text).expect("text"))).collect()
    }

    #[test]
    fn every_command_has_its_page() {
        let texts = texts();
        let mut tree = Typed::command();
        tree.build();
        let mut commands = vec![(&tree, "dog".to_owned())];
        let mut count = 0;
        while let Some((command, name)) = commands.pop() {
            let text = texts.get(&format!("{name}.1")).unwrap_or_else(|| panic!("no page of {name}"));
            assert!(text.starts_with(&format!(".TH \"{name}\" \"1\" \"\" \"dog ")), "{text}");
            assert!(text.matches(".ie ").count() <= 1 && text.contains(".SH SYNOPSIS\n"), "{text}");
            assert!(text.contains(&name.replace('-', "\\-")), "{text}");
            count += 1;
            commands.extend(command.get_subcommands().map(|below| (below, format!("{name}-{}", below.get_name()))));
        }
        assert_eq!(count, texts.len(), "as many pages as commands");
    }

    #[test]
    fn the_page_of_the_tool_tells_codes_variables_and_differences() {
        let texts = texts();
        let tool = &texts["dog.1"];
        for (exit, _) in EXIT_CODES {
            assert!(tool.contains(&format!("\\fB{}\\fR", exit as u8)), "{tool}");
        }
        for word in ["SHEEPDOG_DOG_ADDR", "DOG_KEY", "DIFFERENCES FROM SHEEPDOG", "dog\\-vdi(1)", "dog\\-img(1)"] {
            assert!(tool.contains(word), "{word}: {tool}");
        }
        assert!(differences().len() >= 4, "{:?}", differences());
        assert!(differences()[0].contains("dog vdi delete"), "{:?}", differences());
        assert!(differences().iter().all(|difference| !difference.contains(['\n', '`']) && difference.ends_with('.')));
    }

    #[test]
    fn examples_and_remarks_have_headings_of_their_own() {
        let texts = texts();
        let create = &texts["dog-vdi-create.1"];
        let examples = create.find(".SH EXAMPLES\n  dog vdi create disk1 20G\n").expect("examples");
        let notes = create.find(".SH NOTES\nA size is").expect("notes");
        assert!(examples < notes && create.contains("\n.PP\nDiffers from the old tool"), "{create}");
        assert!(create.contains("\\-\\-prealloc") && create.contains("dog\\-vdi\\fR(1)"), "{create}");
        let img = &texts["dog-img.1"];
        assert!(img.contains("ARGS...") && !img.contains("\\-\\-address"), "{img}");
    }
}
