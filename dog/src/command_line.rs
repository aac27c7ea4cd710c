//! From the words of a command line to [`Typed`], or to the texts that the old tool gave for a wrong one.
//!
//! The first two words are looked at before the options, and they are never abbreviated. The old tool let no option precede them;
//! those that say whom to ask may here, because people write `dog -a HOST node list`.
//! What follows `img`, `io` and `nbd` belongs to another program and is not looked at here; `completions` and `man` have no
//! second word.

use std::ffi::OsString;
use std::fmt::Write as _;

use clap::builder::StyledStr;
use clap::error::{ContextKind, ContextValue, ErrorKind};
use clap::{CommandFactory, FromArgMatches};

use crate::args::{Command, Typed, Verbatim};
use crate::exit::Exit;

/// What the old tool had and this one has not: the command, and what to do instead.
const NOT_HERE: &[(&str, &str)] = &[
    (
        "cluster snapshot",
        "is not available in this version; 'dog vdi backup' and 'dog vdi read' save volumes one by one",
    ),
    (
        "upgrade",
        "is not needed: stores of the old sheep are not converted; copy the volumes: what its own 'dog vdi read' gives, \
         this 'dog vdi write' takes",
    ),
    ("benchmark", "is not part of this tool: use fio on an attached volume; 'dog vdi attach' shows how"),
    ("trace", "is not part of this tool: 'dog node log level set debug' and 'dog node stat -w' show what a node does"),
    (
        "nfs",
        "is not part of this tool: 'dog vdi attach' shows how to use a volume; put a file system and an NFS server on it",
    ),
];

const TRY_HELP: &str = "Try 'dog --help' for more information.\n";

/// A command line that can be run.
#[derive(Debug)]
pub struct Parsed {
    /// What was typed.
    pub typed: Typed,
    /// The usage of its subcommand, for handlers that find the arguments wrong.
    pub usage: String,
}

/// A command line that is answered without asking the cluster.
#[derive(PartialEq, Eq, Debug)]
pub struct Answered {
    /// For standard output.
    pub out: String,
    /// For standard error.
    pub err: String,
    /// The exit code.
    pub exit: Exit,
}

impl Answered {
    fn out(out: String, exit: Exit) -> Answered {
        Answered { out, err: String::new(), exit }
    }

    fn err(err: String, exit: Exit) -> Answered {
        Answered { out: String::new(), err, exit }
    }
}

/// Understands the words after the program's name.
pub fn parse(words: &[OsString]) -> Result<Parsed, Answered> {
    let mut tree = Typed::command();
    tree.build();
    let (leading, words) = words.split_at(leading_options(words));
    let first = words.first().map(|word| word.to_string_lossy().into_owned());
    let Some(first) = first.filter(|word| !matches!(word.as_str(), "help" | "--help" | "-h")) else {
        let asked = help(&mut tree, words.get(1..).unwrap_or_default()).unwrap_or_else(|| overview(&tree));
        return Err(Answered::out(asked, Exit::Success));
    };
    if let Some(command) = other_program(&first, &words[1..]) {
        let usage = usage_of(&mut tree, &[&first]).unwrap_or_default();
        // Its own words are not looked at: the options are taken from any other command that has them.
        let argv = ["dog", "node", "list"].into_iter().map(OsString::from).chain(leading.iter().cloned());
        let typed = tree.try_get_matches_from(argv).and_then(|matches| Typed::from_arg_matches(&matches));
        let typed = typed.map_err(|error| answer_to(&error, &first, &usage))?;
        return Ok(Parsed { typed: Typed { command, ..typed }, usage });
    }
    let second = words.get(1).map(|word| word.to_string_lossy().into_owned());
    let mut names = vec![first.as_str()];
    if tree.find_subcommand(&first).is_none_or(clap::Command::has_subcommands) {
        check_known(&tree, &first, second.as_deref())?;
        names.push(second.as_deref().expect("a missing second word was answered"));
    }
    let usage = usage_of(&mut tree, &names).expect("the words were found in the tree");
    let (command, rest) = words.split_at(names.len());
    let argv = std::iter::once(OsString::from("dog")).chain([command, leading, rest].concat());
    let typed = tree.try_get_matches_from(argv).and_then(|matches| Typed::from_arg_matches(&matches));
    match typed {
        Ok(typed) => Ok(Parsed { typed, usage }),
        Err(error) => Err(answer_to(&error, &names.join(" "), &usage)),
    }
}

/// How many words at the beginning are options that say whom to ask, with their values.
fn leading_options(words: &[OsString]) -> usize {
    const WITH_VALUE: [&str; 5] = ["-a", "--address", "-p", "--port", "--key"];
    const JOINED: [&str; 5] = ["-a", "--address=", "-p", "--port=", "--key="];
    let mut count = 0;
    while let Some(word) = words.get(count).map(|word| word.to_string_lossy()) {
        if WITH_VALUE.contains(&&*word) && words.len() > count + 1 {
            count += 2;
        } else if JOINED.iter().any(|option| word.len() > option.len() && word.starts_with(option)) {
            count += 1;
        } else {
            break;
        }
    }
    count
}

/// Answers unless both words name something that can be run.
fn check_known(tree: &clap::Command, first: &str, second: Option<&str>) -> Result<(), Answered> {
    let Some(command) = tree.get_subcommands().find(|command| command.get_name() == first) else {
        let unknown = || Answered::err(format!("Invalid command '{first}'\n{TRY_HELP}"), Exit::Usage);
        return Err(not_here(first).unwrap_or_else(unknown));
    };
    if command.get_subcommands().any(|subcommand| Some(subcommand.get_name()) == second) {
        return Ok(());
    }
    let mut err = String::new();
    if let Some(second) = second.filter(|word| !matches!(*word, "help" | "--help" | "-h")) {
        if let Some(answered) = not_here(&format!("{first} {second}")) {
            return Err(answered);
        }
        err = format!("Invalid command '{first} {second}'\n");
    }
    let _ = writeln!(err, "Available {first} commands:");
    for subcommand in command.get_subcommands() {
        let _ = writeln!(err, "  {first} {}", subcommand.get_name());
    }
    Err(Answered::err(err, Exit::Usage))
}

fn not_here(words: &str) -> Option<Answered> {
    let (_, instead) = NOT_HERE.iter().find(|(command, _)| *command == words)?;
    Some(Answered::err(format!("'dog {words}' {instead}\n"), Exit::Failure))
}

/// The command that hands all of its words to another program.
fn other_program(first: &str, words: &[OsString]) -> Option<Command> {
    let verbatim = || Verbatim { words: words.to_vec() };
    match first {
        "img" => Some(Command::Img(verbatim())),
        "io" => Some(Command::Io(verbatim())),
        "nbd" => Some(Command::Nbd(verbatim())),
        _ => None,
    }
}

/// The usage of the command that `dog help` was asked about; `None` if there is no such command.
fn help(tree: &mut clap::Command, words: &[OsString]) -> Option<String> {
    let words: Option<Vec<&str>> = words.iter().map(|word| word.to_str()).collect();
    words.filter(|words| !words.is_empty()).and_then(|words| usage_of(tree, &words))
}

/// The usage of what the words name, unless they stop above the commands.
fn usage_of(tree: &mut clap::Command, words: &[&str]) -> Option<String> {
    let mut command = tree;
    for word in words {
        command = command.find_subcommand_mut(word)?;
    }
    (!command.has_subcommands()).then(|| command.render_help().to_string())
}

fn overview(tree: &clap::Command) -> String {
    let mut text = String::from("dog manages a sheep cluster.\n\nUsage: dog COMMAND SUBCOMMAND [OPTIONS]\n");
    let (mut others, mut own) = (Vec::new(), Vec::new());
    for command in tree.get_subcommands() {
        let about = command.get_about().map(StyledStr::to_string).unwrap_or_default();
        if !command.has_subcommands() {
            let group = if command.is_disable_help_flag_set() { &mut others } else { &mut own };
            group.push((command.get_name(), about));
            continue;
        }
        let _ = writeln!(text, "\n{about}:");
        for subcommand in command.get_subcommands() {
            let name = format!("{} {}", command.get_name(), subcommand.get_name());
            let about = subcommand.get_about().map(StyledStr::to_string).unwrap_or_default();
            let _ = writeln!(text, "  {name:<22}  {about}");
        }
    }
    text.push_str("\nOther programs, with their own arguments ('dog help img' explains):\n");
    for (name, about) in others {
        let _ = writeln!(text, "  {:<22}  {about}", format!("{name} ARGS..."));
    }
    text.push_str("\nThis tool itself:\n");
    for (name, about) in own {
        let _ = writeln!(text, "  {name:<22}  {about}");
    }
    text.push_str(
        "\nExamples:\n  dog cluster format -c 3\n  dog vdi create disk1 20G\n  dog vdi list\n\n\
         See 'dog COMMAND SUBCOMMAND --help' for the options of one, with examples.\n\
         SHEEPDOG_DOG_ADDR and SHEEPDOG_DOG_PORT name the sheep to ask; -a and -p win over them.\n\
         DOG_KEY names a copy of the cluster key, for a sheep on another machine; --key wins over it.\n\
         SHEEPDOG_DOG_LOG, when set, records every call in the system log, or in the file that\n\
         SHEEPDOG_DOG_LOG_PATH names.\n",
    );
    text
}

fn answer_to(error: &clap::Error, command: &str, usage: &str) -> Answered {
    let argument = match error.get(ContextKind::InvalidArg) {
        Some(ContextValue::String(argument)) => argument.clone(),
        Some(ContextValue::Strings(arguments)) => arguments.join(" "),
        _ => String::new(),
    };
    match error.kind() {
        ErrorKind::DisplayHelp => Answered::out(usage.to_owned(), Exit::Success),
        ErrorKind::MissingRequiredArgument => Answered {
            out: usage.to_owned(),
            err: format!("dog {command}: {argument} is missing\n"),
            exit: Exit::Usage,
        },
        ErrorKind::UnknownArgument => {
            let reason = if argument.starts_with("--") {
                format!("unrecognized option '{argument}'")
            } else if let Some(letter) = argument.strip_prefix('-') {
                format!("invalid option -- '{letter}'")
            } else {
                format!("unexpected argument '{argument}'")
            };
            Answered::err(format!("dog {command}: {reason}\n{TRY_HELP}"), Exit::Usage)
        }
        _ => {
            let text = error.render().to_string();
            let reason = text.lines().next().unwrap_or_default();
            let reason = reason.strip_prefix("error: ").unwrap_or(reason);
            Answered::err(format!("dog {command}: {reason}\n{TRY_HELP}"), Exit::Usage)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Cluster, Command, Node, Vdi};

    fn parse_text(line: &str) -> Result<Parsed, Answered> {
        parse(&line.split_whitespace().map(OsString::from).collect::<Vec<_>>())
    }

    fn refused(line: &str) -> Answered {
        parse_text(line).expect_err(line)
    }

    #[test]
    fn the_tree_is_sound() {
        Typed::command().debug_assert();
    }

    #[test]
    fn options_cluster_and_may_be_cut_and_mixed() {
        for line in ["vdi list -rp7800 name", "vdi list name --ra --po=7800", "vdi list --raw -p 7800 -- name"] {
            let typed = parse_text(line).expect(line).typed;
            assert_eq!(typed.port.as_deref(), Some("7800"), "{line}");
            let Command::Vdi(Vdi::List(list)) = typed.command else { panic!("{line}") };
            assert!(list.raw && list.vdi.is_some_and(|name| name == "name"), "{line}");
        }
        let Command::Vdi(Vdi::Create(create)) = parse_text("vdi create -c2 -Pv d 1G").expect("create").typed.command
        else {
            panic!("not a create")
        };
        assert!(create.prealloc && create.verbose && create.copies.as_deref() == Some("2"));
        let recover = parse_text("cluster recover -f force").expect("recover").typed.command;
        assert!(matches!(recover, Command::Cluster(Cluster::Recover(recover)) if recover.force));
    }

    #[test]
    fn the_last_of_repeated_options_counts() {
        let typed = parse_text("node list -p 1 -p 2 -r -r").expect("repeated").typed;
        assert_eq!(typed.port.as_deref(), Some("2"));
        assert!(matches!(typed.command, Command::Node(Node::List(shape)) if shape.raw));
    }

    #[test]
    fn whom_to_ask_may_come_first() {
        for line in ["-a h --key f node list -r", "-ah --key=f node list -r", "--address h node list --key f -r"] {
            let typed = parse_text(line).expect(line).typed;
            assert_eq!(typed.address.as_deref(), Some("h"), "{line}");
            assert_eq!(typed.key_file.as_deref(), Some("f".as_ref()), "{line}");
            assert!(matches!(typed.command, Command::Node(Node::List(shape)) if shape.raw), "{line}");
        }
        let typed = parse_text("-p 7001 img convert -p x y").expect("img").typed;
        assert_eq!(typed.port.as_deref(), Some("7001"));
        assert!(matches!(typed.command, Command::Img(verbatim) if verbatim.words.len() == 4));
        assert_eq!(refused("-a").err, "Invalid command '-a'\nTry 'dog --help' for more information.\n");
        assert_eq!(refused("-a h").out, refused("help").out);
    }

    #[test]
    fn wrong_words_get_the_texts_of_the_old_tool() {
        let answered = refused("-v");
        assert_eq!(answered.err, "Invalid command '-v'\nTry 'dog --help' for more information.\n");
        assert_eq!(answered.exit, Exit::Usage);
        let answered = refused("node frobnicate");
        assert_eq!(
            answered.err,
            "Invalid command 'node frobnicate'\nAvailable node commands:\n  node kill\n  node list\n  node info\n  \
             node recovery\n  node stat\n  node log\n  node admit\n  node ban\n  node md\n  node vnodes\n  \
             node format\n"
        );
        assert_eq!(answered.exit, Exit::Usage);
        for line in ["vdi", "vdi help", "vdi --help"] {
            let answered = refused(line);
            assert!(answered.err.starts_with("Available vdi commands:\n  vdi check\n"), "{}", answered.err);
            assert_eq!(answered.exit, Exit::Usage);
        }
        let answered = refused("vdi list -q");
        assert!(answered.err.contains("invalid option -- 'q'\nTry 'dog --help'"), "{}", answered.err);
        assert_eq!(answered.exit, Exit::Usage);
        let answered = refused("vdi list --frob");
        assert!(answered.err.contains("unrecognized option '--frob'"), "{}", answered.err);
        let answered = refused("vdi delete a b");
        assert!(answered.err.contains("unexpected argument 'b'"), "{}", answered.err);
        assert_eq!(answered.exit, Exit::Usage);
    }

    #[test]
    fn help_is_on_standard_output_and_succeeds() {
        for line in ["", "help", "--help", "-h"] {
            let answered = refused(line);
            assert_eq!((answered.exit, answered.err.as_str()), (Exit::Success, ""), "{line}");
            assert!(answered.out.contains("vdi create"), "{line}");
        }
        let answered = refused("vdi create -h");
        assert_eq!((answered.exit, answered.err.as_str()), (Exit::Success, ""));
        assert!(answered.out.contains("Usage: dog vdi create"), "{}", answered.out);
        assert!(answered.out.contains("\n  -P, --prealloc"), "{}", answered.out);
        assert!(answered.out.contains("Examples:"), "{}", answered.out);
    }

    #[test]
    fn the_words_of_other_programs_are_not_looked_at() {
        for words in [&["--help"][..], &["-T", "x", "--", "-a", "snapshot", "-h"], &[]] {
            for first in ["img", "io", "nbd"] {
                let line: Vec<OsString> = std::iter::once(&first).chain(words).map(OsString::from).collect();
                let typed = parse(&line).expect("all words are taken").typed;
                assert!(typed.address.is_none() && !typed.time, "{line:?}");
                let (Command::Img(verbatim) | Command::Io(verbatim) | Command::Nbd(verbatim)) = typed.command else {
                    panic!("{line:?}")
                };
                assert_eq!(verbatim.words, words, "{line:?}");
            }
        }
    }

    #[test]
    fn help_knows_every_command() {
        for (line, text) in [
            ("help img", "dog img convert -O raw system.qcow2 sheepdog:disk1"),
            ("help io", "Usage: dog io ARGS..."),
            ("help nbd", "DOG_QEMU_NBD"),
            ("help vdi attach", "dog vdi attach disk1 --nbd /dev/nbd0"),
            ("help vdi", "img ARGS..."),
            ("help dance", "img ARGS..."),
        ] {
            let answered = refused(line);
            assert!(answered.exit == Exit::Success && answered.out.contains(text), "{line}: {}", answered.out);
        }
        assert!(!refused("help img").out.contains("--address"));
    }

    #[test]
    fn some_commands_are_one_word() {
        let typed = parse_text("completions bash").expect("completions").typed;
        assert!(matches!(typed.command, Command::Completions(typed) if typed.shell == "bash"));
        let typed = parse_text("man -T /tmp/pages").expect("man").typed;
        assert!(typed.time && matches!(typed.command, Command::Man(typed) if typed.directory == "/tmp/pages"));
        let answered = refused("man");
        assert_eq!((answered.exit, answered.err.as_str()), (Exit::Usage, "dog man: <DIRECTORY> is missing\n"));
        assert!(answered.out.contains("Usage: dog man"), "{}", answered.out);
        assert!(refused("completions -h").out.contains("dog completions zsh"));
        assert!(refused("help").out.contains("This tool itself:\n  completions  "));
    }

    #[test]
    fn a_missing_argument_shows_the_usage() {
        let answered = refused("vdi delete");
        assert_eq!(answered.exit, Exit::Usage);
        assert!(answered.out.contains("Usage: dog vdi delete"), "{}", answered.out);
        assert_eq!(answered.err, "dog vdi delete: <VDI> is missing\n");
    }

    #[test]
    fn what_only_the_old_tool_had_names_something_else() {
        for line in ["cluster snapshot save", "upgrade inode-convert a b", "benchmark io v", "trace", "nfs"] {
            let answered = refused(line);
            let is_told =
                answered.err.contains(" is not ") && (answered.err.contains("dog ") || answered.err.contains("fio"));
            assert!(is_told, "{line}: {}", answered.err);
            assert_eq!(answered.exit, Exit::Failure, "{line}");
        }
    }
}
