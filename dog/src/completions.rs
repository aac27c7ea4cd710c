//! `dog completions`: a script that teaches a shell the words of this tool.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::{self, Typed};
use crate::exit::{Exit, Failure};
use crate::report::Report;

/// Runs the command.
pub fn run(typed: &args::Completions) -> Result<Report, Failure> {
    let shell = match typed.shell.as_str() {
        "bash" => Shell::Bash,
        "zsh" => Shell::Zsh,
        "fish" => Shell::Fish,
        other => return Err(Failure::new(Exit::Usage, format!("Invalid shell '{other}': must be bash, zsh or fish"))),
    };
    Ok(Report::text(script(shell)))
}

fn script(shell: Shell) -> Vec<u8> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Typed::command(), "dog", &mut script);
    script
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::process::Command;

    #[test]
    fn every_command_and_long_option_is_in_every_script() {
        let mut tree = Typed::command();
        tree.build();
        for shell in [Shell::Bash, Shell::Zsh, Shell::Fish] {
            let script = String::from_utf8(script(shell)).expect("text");
            let mut commands = vec![&tree];
            let mut count = 0;
            while let Some(command) = commands.pop() {
                assert!(script.contains(command.get_name()), "{shell} does not know {}", command.get_name());
                for option in command.get_arguments().filter_map(clap::Arg::get_long) {
                    assert!(script.contains(option), "{shell} does not know --{option}");
                }
                count += 1;
                commands.extend(command.get_subcommands());
            }
            assert!(count > 30, "only {count} commands were looked for");
        }
    }

    #[test]
    fn bash_completes_the_second_word() {
        let ask = "_dog dog c vdi; echo \"${COMPREPLY[@]}\"";
        let words = "COMP_WORDS=(dog vdi c); COMP_CWORD=2; COMP_LINE='dog vdi c'; COMP_POINT=9";
        let script = format!("{}\n{words}\n{ask}", String::from_utf8(script(Shell::Bash)).expect("text"));
        let ended = Command::new("bash").arg("-c").arg(script).output().expect("there is a bash");
        assert_eq!(String::from_utf8_lossy(&ended.stdout), "check create clone\n", "{ended:?}");
    }

    #[test]
    fn other_shells_are_refused_by_name() {
        let refused = run(&args::Completions { shell: "tcsh".to_owned() }).err().expect("not known");
        assert_eq!(
            (refused.exit, refused.message.as_str()),
            (Exit::Usage, "Invalid shell 'tcsh': must be bash, zsh or fish")
        );
    }
}
