//! `dog cluster format`

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::time::{SystemTime, UNIX_EPOCH};

use qemu_proto::flags::RequestFlags;
use qemu_proto::inode::wire_time;
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{ClusterRequest, Request};
use qemu_proto::status::Status;
use serde_json::Value;
use sheep_core::copy_policy::CopyPolicy;

use crate::args::Format;
use crate::connect::{Refusal, Sheep};
use crate::exit::Failure;
use crate::meaning::{self, Target};
use crate::order::{NodeState, Order};
use crate::question;
use crate::render::node::put_identities;
use crate::report::Report;
use crate::requests::{self, Node};

/// Longest name of a store on the wire, without its NUL.
const STORE_NAME_BYTES_MAX: usize = 15;
/// Bytes of the answer that names the known stores.
const STORE_LIST_BYTES: u32 = 512;

/// Cluster flags on the wire.
const STRICT: u16 = 0x0001;
const AUTO_VNODES: u16 = 0x0004;
const LOCKS: u16 = 0x0008;
const RECYCLE_IDS: u16 = 0x0010;
const AVOID_DISKFULL: u16 = 0x0020;

/// Ours: any node of the network may come in.
const OPEN: u16 = 0x8000;

const SURE: &str = "Are you sure you want to continue?";

/// Runs the command.
pub fn run(typed: &Format, target: Target) -> Result<Report, Failure> {
    let policy = meaning::copies(typed.copies.as_deref())?;
    let shift = meaning::shift(typed.block_size_shift.as_deref())?;
    if typed.store.len() > STORE_NAME_BYTES_MAX || typed.store.contains('\0') {
        return Err(Failure::failed(format!("Invalid store name '{}'", typed.store)));
    }
    let mut sheep = Sheep::connect(target)?;
    let nodes = requests::node_list(&mut sheep)?.nodes;
    let report = requests::cluster_report(&mut sheep)?;
    let order = Order::of(&report);
    check_open(typed, &order)?;
    let mut out = if typed.force { String::new() } else { founders(&order) };
    if !typed.force {
        let mut questions: Vec<String> = too_few_zones(policy, &nodes).into_iter().collect();
        if has_vdis(&mut sheep)? {
            questions.push(format!("Caution: all data in this cluster will be destroyed.\n{SURE}"));
        }
        for question in questions {
            // Who asks is shown what it is about first.
            if !question::confirmed(&(std::mem::take(&mut out) + &question))? {
                return Ok(Report::silent());
            }
        }
    }
    warn(typed, &order);
    let body = ClusterRequest {
        ctime: now(),
        copies: policy.map_or(0, CopyPolicy::holder_count),
        copy_policy: policy.map_or(0, CopyPolicy::wire_byte),
        flags: flags(typed),
        block_size_shift: shift.unwrap_or(0),
        ..ClusterRequest::default()
    };
    let mut store = typed.store.clone().into_bytes();
    store.push(0);
    let mut request = Request::cluster(Opcode::MakeFs, RequestFlags::WRITE, body);
    request.data_length = store.len() as u32;
    let _ = writeln!(out, "using backend {} store", typed.store);
    match sheep.call(request, &store) {
        Ok(_) => {
            if order.is_raft() {
                out.push_str(&made(&requests::cluster_report(&mut sheep)?));
            }
            Ok(Report::text(out))
        }
        Err(trouble) => {
            let stores = if trouble.is(Status::NoStore) { known_stores(&mut sheep) } else { String::new() };
            let is_order = trouble.is(Status::ClusterError);
            let failure = trouble.or(not_formatted);
            let failure = if is_order { failure.then(&why_not(&mut sheep)) } else { failure };
            Err(Failure { out: out + &stores, ..failure })
        }
    }
}

/// Whether the cluster can be what `--open` makes it.
fn check_open(typed: &Format, order: &Order) -> Result<(), Failure> {
    if !typed.open {
        return Ok(());
    }
    if !order.is_raft() {
        return Err(Failure::failed(
            "--open is for the default cluster driver; nodes of one machine (-c local) are open",
        ));
    }
    if order.in_state(NodeState::Acquainted).next().is_none() {
        return Err(Failure::failed(
            "--open counts at the first format only: this cluster has a key already; begin with empty store directories",
        ));
    }
    Ok(())
}

/// What has to be known before it is done, on standard error.
fn warn(typed: &Format, order: &Order) {
    if typed.open {
        eprintln!(
            "Warning: --open: any node of the network may join and read and write everything; nothing between nodes is \
             encrypted"
        );
    }
    let is_founded = order.in_state(NodeState::Acquainted).next().is_none();
    if order.is_raft() && is_founded && !order.has_quorum {
        eprintln!("Waiting for a majority of the voters: {}", order.needed);
    }
}

/// Who becomes the cluster; nothing if there is one, or if the driver asks nobody.
fn founders(order: &Order) -> String {
    let mut nodes = order.in_state(NodeState::Acquainted).peekable();
    if !order.is_raft() || nodes.peek().is_none() {
        return String::new();
    }
    let mut table = b"These nodes become the cluster:\n".to_vec();
    put_identities(nodes, &mut table);
    String::from_utf8_lossy(&table).into_owned()
}

/// What was made, and where its key is.
fn made(report: &Value) -> String {
    let id = report.get("cluster_id").and_then(Value::as_str).unwrap_or("of unknown id");
    if report.get("open").and_then(Value::as_bool) == Some(true) {
        return format!("cluster {id}: open, any node of the network may join\n");
    }
    format!("cluster {id}; every node has its key in PATH/cluster/key, PATH being the directory that sheep was given\n")
}

/// What else is known when the driver does not order a format.
fn why_not(sheep: &mut Sheep) -> String {
    // Without an answer there is still the log.
    let order = requests::cluster_report(sheep).map(|report| Order::of(&report)).unwrap_or_default();
    // Before the first format what is needed is just that.
    let is_founded = order.in_state(NodeState::Member).next().is_some();
    let needed = if is_founded && !order.needed.is_empty() { format!("; {}", order.needed) } else { String::new() };
    format!("see the log of the node at {} for the reason{needed}", sheep.target())
}

/// Which stores there are, in the words that scripts expect.
fn known_stores(sheep: &mut Sheep) -> String {
    let mut request = Request::plain(Opcode::GetStoreList);
    request.data_length = STORE_LIST_BYTES;
    // A sheep that does not tell leaves the message, which is enough.
    let Ok((_, list)) = sheep.call(request, &[]) else { return String::new() };
    let names: Vec<u8> = list.into_iter().take_while(|&byte| byte != 0).collect();
    format!("Available stores:\n{}\n{}\n", "-".repeat(39), String::from_utf8_lossy(&names))
}

fn not_formatted(reason: Refusal) -> Failure {
    Failure::system(format!("Format failed: {reason}"))
}

/// The question to ask when more copies are wanted than there are places for them.
fn too_few_zones(policy: Option<CopyPolicy>, nodes: &[Node]) -> Option<String> {
    let wanted = usize::from(policy?.holder_count());
    let storing = nodes.iter().filter(|node| node.vnodes > 0);
    let zones: BTreeSet<u32> = storing.map(|node| node.zone).collect();
    (wanted > zones.len()).then(|| {
        format!(
            "The number of copies ({wanted}) is larger than the number of zones ({}): objects will have fewer \
             copies until nodes in other zones join.\n{SURE}",
            zones.len()
        )
    })
}

fn has_vdis(sheep: &mut Sheep) -> Result<bool, Failure> {
    let deleted = requests::vdis_deleted(sheep)?;
    Ok(requests::vdis_in_use(sheep)?.iter().any(|vdi| !deleted.contains(vdi)))
}

fn flags(typed: &Format) -> u16 {
    let wanted = [
        (typed.strict, STRICT),
        (!typed.fixedvnodes, AUTO_VNODES),
        (typed.lock, LOCKS),
        (typed.recyclevid, RECYCLE_IDS),
        (typed.avoid_diskfull, AVOID_DISKFULL),
        (typed.open, OPEN),
    ];
    wanted.iter().filter(|(is_wanted, _)| *is_wanted).fold(0, |flags, (_, flag)| flags | flag)
}

/// The time on the wire; a clock before 1970 counts as 1970.
fn now() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    wire_time(since.as_secs(), since.subsec_nanos())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_sheep::FakeSheep;
    use serde_json::json;
    use std::net::Ipv4Addr;

    #[test]
    fn the_question_comes_only_when_zones_are_too_few() {
        let node = |zone, vnodes| Node { address: [0; 16], port: 1, ip: Ipv4Addr::LOCALHOST.into(), vnodes, zone };
        let nodes = [node(1, 128), node(1, 128), node(2, 128), node(3, 0)];
        let policy = |copies| Some(CopyPolicy::replicas(copies).expect("a policy"));
        assert_eq!(too_few_zones(None, &nodes), None);
        assert_eq!(too_few_zones(policy(2), &nodes), None);
        let question = too_few_zones(policy(3), &nodes).expect("a question");
        assert!(question.contains("copies (3) is larger than the number of zones (2)"), "{question}");
    }

    fn typed(line: &str) -> Format {
        let words: Vec<std::ffi::OsString> =
            ["cluster", "format"].into_iter().chain(line.split_whitespace()).map(Into::into).collect();
        let parsed = crate::command_line::parse(&words).expect("a format").typed.command;
        let crate::args::Command::Cluster(crate::args::Cluster::Format(typed)) = parsed else { panic!("{line}") };
        typed
    }

    fn printed(fake: &FakeSheep, line: &str) -> Result<String, Failure> {
        let style = crate::report::Style { zone: jiff::tz::TimeZone::UTC, is_terminal: false };
        let report = run(&typed(line), fake.target)?;
        Ok(String::from_utf8(report.print(&style)).expect("text"))
    }

    fn acquainted() -> Value {
        json!({
            "cluster_id": "00000000000000ff", "open": false,
            "order": {"driver": "raft", "needed": "format the cluster", "nodes": [
                {"id": "00000000000000a1", "address": "10.0.0.1:7010", "state": "acquainted", "fingerprint": "0102-03"},
            ]},
        })
    }

    #[test]
    fn the_founders_are_shown_and_where_the_key_is() {
        let fake = FakeSheep::in_cluster(acquainted());
        let made = "using backend plain store\ncluster 00000000000000ff; every node has its key in PATH/cluster/key, \
            PATH being the directory that sheep was given\n";
        assert_eq!(
            printed(&fake, ""),
            Ok(format!(
                "These nodes become the cluster:\n  Id                Host:Port             Fingerprint\n  \
                 00000000000000a1  10.0.0.1:7010         0102-03\n{made}"
            ))
        );
        assert_eq!(printed(&fake, "-f"), Ok(made.to_owned()));
        fake.kept().report = json!({"order": {"driver": "local", "nodes": [{"id": "a", "state": "member"}]}});
        assert_eq!(printed(&fake, ""), Ok("using backend plain store\n".to_owned()));
        assert_eq!(fake.kept().formats, [AUTO_VNODES; 3]);
    }

    #[test]
    fn a_cluster_is_opened_at_its_first_format_only() {
        let fake = FakeSheep::in_cluster(acquainted());
        printed(&fake, "--open").expect("formatted");
        assert_eq!(fake.kept().formats, [AUTO_VNODES | OPEN]);
        for report in [
            json!({"order": {"driver": "raft", "nodes": [{"id": "a", "state": "member"}]}}),
            json!({"order": {"driver": "local"}}),
            Value::Null,
        ] {
            fake.kept().report = report;
            assert!(printed(&fake, "--open").expect_err("not now").message.starts_with("--open "));
        }
        assert_eq!(fake.kept().formats.len(), 1);
    }

    #[test]
    fn a_driver_that_does_not_format_says_what_it_needs() {
        let fake = FakeSheep::in_cluster(acquainted());
        fake.kept().refuses_format = Some(Status::ClusterError);
        let failure = printed(&fake, "-f").expect_err("refused");
        let expected =
            format!("Format failed: Cluster driver error\nsee the log of the node at {} for the reason", fake.target);
        assert_eq!(failure.message, expected);
        fake.kept().report["order"]["nodes"][0]["state"] = json!("member");
        fake.kept().report["order"]["needed"] = json!("start b");
        assert_eq!(printed(&fake, "-f").expect_err("refused").message, expected + "; start b");
    }
}
