//! `dog cluster format`

use std::collections::BTreeSet;
use std::time::{SystemTime, UNIX_EPOCH};

use qemu_proto::flags::RequestFlags;
use qemu_proto::inode::wire_time;
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{ClusterRequest, Request};
use qemu_proto::status::Status;
use sheep_core::copy_policy::CopyPolicy;

use crate::args::Format;
use crate::connect::{Refusal, Sheep};
use crate::exit::Failure;
use crate::meaning::{self, Target};
use crate::question;
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
    if !typed.force {
        if let Some(question) = too_few_zones(policy, &nodes)
            && !question::confirmed(&question)?
        {
            return Ok(Report::silent());
        }
        if has_vdis(&mut sheep)? {
            let question = format!("Caution: all data in this cluster will be destroyed.\n{SURE}");
            if !question::confirmed(&question)? {
                return Ok(Report::silent());
            }
        }
    }
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
    let out = format!("using backend {} store\n", typed.store);
    match sheep.call(request, &store) {
        Ok(_) => Ok(Report::text(out)),
        Err(trouble) => {
            let stores = if trouble.is(Status::NoStore) { known_stores(&mut sheep) } else { String::new() };
            Err(Failure { out: out + &stores, ..trouble.or(not_formatted) })
        }
    }
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
}
