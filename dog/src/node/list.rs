//! `dog node list`

use crate::args::Shape;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::report::{Form, Report};
use crate::requests::{self, Node};

/// The members; positions are their ids.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Members(pub Vec<Node>);

/// Runs the command.
pub fn run(typed: &Shape, target: Target) -> Result<Report, Failure> {
    let list = requests::node_list(&mut Sheep::connect(target)?)?;
    Ok(Report::new(Form::of(typed.raw, typed.json), Members(list.nodes)))
}
