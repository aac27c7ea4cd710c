//! `dog node list`

use crate::args::Shape;
use crate::connect::Sheep;
use crate::exit::Failure;
use crate::meaning::Target;
use crate::order::Order;
use crate::report::{Form, Report};
use crate::requests::{self, Node};

/// The nodes of the cluster, and those who want to be.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Nodes {
    /// Positions are the numbers that commands take. Before format these are all that are acquainted.
    pub rows: Vec<Node>,
    /// What the driver knows of them, and of those who ask to come in.
    pub order: Order,
}

/// Runs the command.
pub fn run(typed: &Shape, target: Target) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let rows = requests::node_list(&mut sheep)?.nodes;
    let form = Form::of(typed.raw, typed.json);
    // Scripts that poll the bare list get it for one request.
    let order = if form == Form::Raw { Order::default() } else { Order::of(&requests::cluster_report(&mut sheep)?) };
    Ok(Report::new(form, Nodes { rows, order }))
}
