//! `dog node kill`

use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;

use crate::args::Kill;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::{Target, is_whole_node_id};
use crate::reach::Reach;
use crate::report::Report;
use crate::requests;

/// Runs the command.
pub fn run(typed: &Kill, target: Target) -> Result<Report, Failure> {
    let victim = match (typed.local, typed.id.as_deref()) {
        (true, None) => target,
        (false, Some(word)) => {
            let position = if is_whole_node_id(word) { None } else { Some(parse_id(word)?) };
            let mut sheep = Sheep::connect(target)?;
            let nodes = requests::node_list(&mut sheep)?.nodes;
            let reach = Reach::from(&mut sheep)?;
            let found = match position {
                Some(position) => nodes.get(position),
                None => nodes.iter().find(|row| reach.order().behind(row).is_some_and(|node| node.id == word)),
            };
            let node = found.ok_or_else(|| {
                Failure::new(Exit::Usage, format!("Invalid node id '{word}'; 'dog node list' shows the ids"))
            })?;
            reach.target(node)
        }
        (true, Some(_)) => return Err(Failure::usage("please specify either -l option or node id, not both")),
        (false, None) => return Err(Failure::usage("please specify -l option or node id")),
    };
    Sheep::connect(victim)?
        .call(Request::plain(Opcode::KillNode), &[])
        .map_err(|trouble| trouble.or(|reason| Failure::failed(format!("Failed to stop {victim}: {reason}"))))?;
    Ok(Report::silent())
}

fn parse_id(word: &str) -> Result<usize, Failure> {
    let is_number = !word.is_empty() && word.bytes().all(|byte| byte.is_ascii_digit());
    match word.parse() {
        Ok(id) if is_number => Ok(id),
        _ => {
            let text = format!("Invalid node id '{word}', please specify a numeric value");
            Err(Failure::usage(text))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_is_digits() {
        assert_eq!(parse_id("12"), Ok(12));
        for word in ["", "x", "+1", "-1", "1x"] {
            let failure = parse_id(word).expect_err(word);
            assert_eq!(failure.message, format!("Invalid node id '{word}', please specify a numeric value"));
            assert_eq!(failure.exit, Exit::Usage);
        }
    }
}
