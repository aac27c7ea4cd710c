//! `dog node recovery`

use std::time::Duration;
use std::{fmt, thread};

use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;
use qemu_proto::stat::{RECOVERY_STAT_BYTES, RecoveryStat};

use super::throttle;
use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::Target;
use crate::progress::Progress;
use crate::reach::Reach;
use crate::report::{Form, Report};
use crate::requests::{self, Node};

/// Between looks at a node whose progress is drawn.
const LOOK_AGAIN: Duration = Duration::from_millis(250);

/// A node that is receiving copies.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Recovering {
    /// Its position in the node list.
    pub id: usize,
    /// Who it is.
    pub node: Node,
    /// Objects that have arrived.
    pub done: u64,
    /// Objects in all.
    pub total: u64,
}

/// The nodes that are not up to date; empty means the cluster is healed.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Recoveries(pub Vec<Recovering>);

/// Runs the command.
pub fn run(typed: &args::Recovery, target: Target) -> Result<Report, Failure> {
    match typed.nested.as_deref() {
        None | Some("info") => {}
        Some("get-throttle") => return throttle::get(target),
        Some("set-throttle") => return throttle::set(typed, target),
        other => return Err(Failure::nested(other, "info, get-throttle or set-throttle")),
    }
    if typed.progress {
        return watch(target);
    }
    let mut sheep = Sheep::connect(target)?;
    let list = requests::node_list(&mut sheep)?;
    let reach = Reach::from(&mut sheep)?;
    let mut recoveries = Recoveries(Vec::new());
    let mut exit = Exit::Success;
    for (id, &node) in list.nodes.iter().enumerate() {
        match stat(node, reach.target(&node)) {
            Ok(stat) if stat.in_recovery => {
                recoveries.0.push(Recovering { id, node, done: stat.finished, total: stat.total });
            }
            Ok(_) => {}
            Err(failure) => {
                eprintln!("{failure}");
                exit = failure.exit;
            }
        }
    }
    Ok(Report::new(Form::of(typed.shape.raw, typed.shape.json), recoveries).exits(exit))
}

/// Draws how far the node that is asked has come, until it has finished.
fn watch(target: Target) -> Result<Report, Failure> {
    let mut progress: Option<Progress> = None;
    let (mut total, mut done) = (0, 0);
    loop {
        let stat = stat(target, target)?;
        if !stat.in_recovery {
            if let Some(progress) = &mut progress {
                progress.advance(total - done);
            }
            return Ok(Report::silent());
        }
        // Another change of members begins another run.
        if progress.is_none() || stat.total != total || stat.finished < done {
            (total, done) = (stat.total, 0);
            progress = Some(Progress::of_objects(total));
        }
        if let Some(progress) = &mut progress {
            progress.advance(stat.finished.min(total) - done);
        }
        done = stat.finished.min(total);
        thread::sleep(LOOK_AGAIN);
    }
}

fn stat(node: impl fmt::Display, target: Target) -> Result<RecoveryStat, Failure> {
    let mut request = Request::plain(Opcode::StatRecovery);
    request.data_length = RECOVERY_STAT_BYTES as u32;
    let (_, answer) = Sheep::connect(target)?
        .call(request, &[])
        .map_err(|trouble| trouble.or(|reason| Failure::failed(format!("Response's result: {reason} ({node})"))))?;
    let stat = RecoveryStat::decode(&answer);
    stat.ok_or_else(|| Failure::system(format!("{node} answered {} bytes about its recovery", answer.len())))
}
