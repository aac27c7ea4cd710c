//! `dog cluster info`

use qemu_proto::cluster_info::{EPOCH_BYTES, EpochEntry};
use qemu_proto::flags::RequestFlags;
use qemu_proto::frame::OTHER_BYTES_MAX;
use qemu_proto::node_entry::{NODE_BYTES, NODES_MAX};
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{ClusterRequest, Request};
use qemu_proto::status::Status;
use serde_json::Value;

use crate::args;
use crate::connect::{Refusal, Sheep};
use crate::exit::Failure;
use crate::meaning::{self, Target, shown};
use crate::order::Order;
use crate::report::{Form, Report};
use crate::requests::{self, Node};

/// Epochs that may begin between two requests.
const EPOCHS_SPARE: usize = 8;
/// The status of a node that cannot know what the others do.
const NO_QUORUM: &str = "Waiting for a majority of the voters";
const DISK_MODE: u16 = 0x0002;
const AUTO_VNODES: u16 = 0x0004;

/// The members of one epoch.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct EpochRow {
    /// Its number.
    pub epoch: u32,
    /// When it began, in Unix seconds.
    pub began: i64,
    /// By address and port.
    pub nodes: Vec<Node>,
}

/// What is known only of a formatted cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Formatted {
    /// When, in Unix seconds.
    pub created: i64,
    /// The name of its store.
    pub store: String,
    /// `3`, or `4:2`.
    pub redundancy: String,
    /// Whether vnodes follow from space.
    pub has_auto_vnodes: bool,
    /// Whether each disk has vnodes of its own.
    pub has_disk_vnodes: bool,
}

/// What the cluster does, in one word.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Condition {
    /// It serves.
    Running,
    /// There is no cluster yet.
    Unformatted,
    /// It serves when certain nodes are back.
    Waiting,
    /// The node that was asked hears from no majority of those who vote.
    NoQuorum,
    /// It was shut down.
    Shutdown,
}

impl Condition {
    /// As in JSON.
    pub fn name(self) -> &'static str {
        match self {
            Condition::Running => "running",
            Condition::Unformatted => "unformatted",
            Condition::Waiting => "waiting",
            Condition::NoQuorum => "no-quorum",
            Condition::Shutdown => "shutdown",
        }
    }

    /// By the status of the old protocol and by what the driver says.
    fn of(result: u32, order: &Order) -> Condition {
        let is = |status: Status| result == status.code();
        if is(Status::WaitForFormat) {
            Condition::Unformatted
        } else if is(Status::Shutdown) {
            Condition::Shutdown
        } else if order.is_raft() && !order.has_quorum {
            Condition::NoQuorum
        } else if is(Status::Success) {
            Condition::Running
        } else {
            Condition::Waiting
        }
    }
}

/// The state of the cluster.
#[derive(Clone, PartialEq, Debug)]
pub struct State {
    /// `running, auto-recovery enabled`, or what it waits for.
    pub status: String,
    /// The same for programs.
    pub condition: Condition,
    /// Who orders things.
    pub order: Order,
    /// `None` before it is formatted.
    pub formatted: Option<Formatted>,
    /// Newest first.
    pub epochs: Vec<EpochRow>,
    /// What the cluster waits for, one line each.
    pub waiting: Vec<String>,
    /// All that the cluster reports about itself.
    pub report: Value,
    /// Whether redundancy and strategies are shown.
    pub is_verbose: bool,
    /// Whether changes of members are shown instead of members.
    pub shows_changes: bool,
}

/// Runs the command.
pub fn run(typed: &args::Info, target: Target) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let list = requests::node_list(&mut sheep)?;
    let (result, entries) = epochs(&mut sheep, list.epoch as usize, list.nodes.len())?;
    let report = requests::cluster_report(&mut sheep)?;
    let mut state = state(result, &entries, report);
    state.is_verbose = typed.verbose;
    state.shows_changes = typed.diff;
    Ok(Report::new(Form::of(typed.shape.raw, typed.shape.json), state))
}

/// Asks for all epochs, with room for as many nodes as the largest had; comes with the status of the cluster.
pub fn epochs(sheep: &mut Sheep, epoch_count: usize, node_count: usize) -> Result<(u32, Vec<EpochEntry>), Failure> {
    let mut nodes_nr = node_count.clamp(16, NODES_MAX);
    loop {
        let body = ClusterRequest { nodes_nr: nodes_nr as u32, ..ClusterRequest::default() };
        let mut request = Request::cluster(Opcode::StatCluster, RequestFlags::NONE, body);
        let wanted = (epoch_count + EPOCHS_SPARE).saturating_mul(EPOCH_BYTES + nodes_nr * NODE_BYTES);
        request.data_length = wanted.min(OTHER_BYTES_MAX) as u32;
        let (response, answer) = sheep.ask(request, &[]).map_err(|trouble| trouble.or(cannot_tell))?;
        if response.result == Status::BufferSmall.code() && nodes_nr < NODES_MAX {
            nodes_nr = (nodes_nr * 2).min(NODES_MAX);
            continue;
        }
        let whole = answer.len() - answer.len() % (EPOCH_BYTES + nodes_nr * NODE_BYTES);
        let entries = EpochEntry::decode_all(&answer[..whole], nodes_nr)
            .map_err(|_| Failure::system(format!("{} sent a history of epochs that is cut short", sheep.target())))?;
        return Ok((response.result, entries));
    }
}

fn cannot_tell(reason: Refusal) -> Failure {
    Failure::system(format!("Failed to get the state of the cluster: {reason}"))
}

fn state(result: u32, entries: &[EpochEntry], report: Value) -> State {
    let newest = entries.first();
    let order = Order::of(&report);
    let condition = Condition::of(result, &order);
    let status = if condition == Condition::NoQuorum {
        NO_QUORUM.to_owned()
    } else if result == Status::Success.code() {
        let is_held = newest.is_some_and(|entry| entry.disable_recovery != 0);
        format!("running, auto-recovery {}", if is_held { "disabled" } else { "enabled" })
    } else {
        Refusal(result).to_string()
    };
    let is_formatted = result != Status::WaitForFormat.code();
    let formatted = newest.filter(|entry| is_formatted && entry.ctime != 0).map(|entry| Formatted {
        created: meaning::seconds(entry.ctime),
        store: shown(entry.driver_name()).into_owned(),
        redundancy: requests::redundancy(entry.nr_copies, entry.copy_policy),
        has_auto_vnodes: entry.flags & AUTO_VNODES != 0,
        has_disk_vnodes: entry.flags & DISK_MODE != 0,
    });
    let waiting = report.get("waiting").and_then(Value::as_array).map(Vec::as_slice).unwrap_or_default();
    let waiting = waiting.iter().filter_map(Value::as_str).map(str::to_owned).collect();
    let mut epochs: Vec<EpochRow> = entries.iter().map(epoch_row).collect();
    epochs.sort_by_key(|row| std::cmp::Reverse(row.epoch));
    State { status, condition, order, formatted, epochs, waiting, report, is_verbose: false, shows_changes: false }
}

fn epoch_row(entry: &EpochEntry) -> EpochRow {
    let mut nodes: Vec<Node> = entry.nodes.iter().copied().map(Node::from).collect();
    nodes.sort_unstable();
    EpochRow { epoch: entry.epoch, began: meaning::seconds(entry.time), nodes }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_status_is_a_text_and_the_report_tells_what_is_waited_for() {
        let entry = EpochEntry {
            ctime: 7 << 32,
            time: 8 << 32,
            epoch: 1,
            nr_copies: 3,
            flags: AUTO_VNODES,
            ..EpochEntry::default()
        };
        let waits = state(0x17, std::slice::from_ref(&entry), json!({"waiting": ["for two nodes"]}));
        assert_eq!(waits.status, "Waiting for other nodes to join cluster");
        assert_eq!(waits.waiting, ["for two nodes"]);
        let formatted = waits.formatted.expect("it was formatted");
        assert_eq!((formatted.created, formatted.redundancy.as_str()), (7, "3"));
        assert!(formatted.has_auto_vnodes && !formatted.has_disk_vnodes);
        let held = state(0, &[EpochEntry { disable_recovery: 1, ..entry }], Value::Null);
        assert_eq!(held.status, "running, auto-recovery disabled");
        let fresh = state(0x16, &[], Value::Null);
        assert_eq!((fresh.status.as_str(), fresh.formatted), ("Waiting for cluster to be formatted", None));
    }

    #[test]
    fn a_node_without_a_quorum_does_not_say_that_the_cluster_runs() {
        let raft = |has_quorum| json!({"order": {"driver": "raft", "has_quorum": has_quorum}});
        for (result, report, condition) in [
            (Status::Success, raft(true), Condition::Running),
            (Status::Success, raft(false), Condition::NoQuorum),
            (Status::WaitForJoin, raft(false), Condition::NoQuorum),
            (Status::WaitForJoin, raft(true), Condition::Waiting),
            (Status::WaitForFormat, raft(false), Condition::Unformatted),
            (Status::Shutdown, raft(false), Condition::Shutdown),
            (Status::Success, json!({"order": {"driver": "local"}}), Condition::Running),
            (Status::Success, Value::Null, Condition::Running),
            (Status::WaitForJoin, Value::Null, Condition::Waiting),
        ] {
            let shown = state(result.code(), &[], report.clone());
            assert_eq!(shown.condition, condition, "{result:?} {report}");
            assert_eq!(shown.status == NO_QUORUM, condition == Condition::NoQuorum, "{result:?} {report}");
        }
    }
}
