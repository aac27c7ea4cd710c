//! The requests that commands are made of, one function each. What a refusal means is for the command to say.

use std::fmt;
use std::net::{IpAddr, SocketAddr};

use qemu_proto::bitmap::{BITMAP_BYTES, ids_in};
use qemu_proto::cluster_info::VdiStateEntry;
use qemu_proto::flags::RequestFlags;
use qemu_proto::inode::{self, InodeHeader};
use qemu_proto::names::{FIELD_BYTES, name_tag_payload, padded};
use qemu_proto::node_entry::{NODE_BYTES, NODES_MAX, NodeEntry};
use qemu_proto::oid::{Oid, VdiId};
use qemu_proto::opcode::Opcode;
use qemu_proto::request::{Request, RequestBody, VdiRequest, restore};
use qemu_proto::response::{Response, ResponseBody};
use qemu_proto::status::Status;
use qemu_proto::vdi_summary::{SUMMARIES_MAX, SUMMARY_BYTES, VdiSummary};
use serde_json::Value;
use sheep_core::copy_policy::CopyPolicy;
use sheep_core::placement::HOLDERS_MAX;

use crate::connect::{Sheep, Trouble};
use crate::exit::Failure;
use crate::meaning::{Selector, Target};

/// Most of the cluster's own report that is read.
const REPORT_BYTES_MAX: u32 = 1 << 20;
/// States of VDIs that are read at once: of some forty thousand.
const VDI_STATES_BYTES_MAX: u32 = 60 << 20;
/// The state of a lock that nobody has.
const UNLOCKED: u32 = 1;
/// Bytes of a wish to the cluster driver, blanks at its end: the answer may be as long as the wish.
const WISH_BYTES: usize = 8192;

/// Data follows, and is durable when the answer comes.
fn write_flags() -> RequestFlags {
    RequestFlags::WRITE | RequestFlags::DIRECT
}

/// A member of the cluster, as lists show it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
pub struct Node {
    /// As on the wire; lists are ordered by it.
    pub address: [u8; 16],
    /// Where clients reach it.
    pub port: u16,
    /// As people write the address.
    pub ip: IpAddr,
    /// Virtual nodes; 0 is a gateway.
    pub vnodes: u16,
    /// Its fault domain.
    pub zone: u32,
}

impl Node {
    /// Where to ask it.
    pub fn target(&self) -> Target {
        Target::Tcp(SocketAddr::new(self.ip, self.port))
    }
}

impl fmt::Display for Node {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.ip, self.port)
    }
}

impl From<NodeEntry> for Node {
    fn from(entry: NodeEntry) -> Node {
        Node { address: entry.address, port: entry.port, ip: entry.ip(), vnodes: entry.nr_vnodes, zone: entry.zone }
    }
}

/// The members of the cluster.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct NodeList {
    /// The epoch they belong to; 0 before the first.
    pub epoch: u32,
    /// By address and port: positions are the ids that people use.
    pub nodes: Vec<Node>,
}

/// Asks who is in the cluster.
pub fn node_list(sheep: &mut Sheep) -> Result<NodeList, Failure> {
    let mut request = Request::plain(Opcode::GetNodeList);
    request.data_length = (NODES_MAX * NODE_BYTES) as u32;
    let answered = sheep.call(request, &[]);
    let (response, answer) = answered
        .map_err(|trouble| trouble.or(|reason| Failure::system(format!("Failed to get node list: {reason}"))))?;
    let mut nodes: Vec<Node> = NodeEntry::decode_all(&answer).map(Node::from).collect();
    if let ResponseBody::Node { nr_nodes, .. } = response.body {
        nodes.truncate(nr_nodes as usize);
    }
    nodes.sort_unstable();
    Ok(NodeList { epoch: response.epoch, nodes })
}

/// What the cluster says about itself beyond the old protocol; null where it says nothing.
pub fn cluster_report(sheep: &mut Sheep) -> Result<Value, Failure> {
    let mut request = Request::plain(Opcode::ClusterReport);
    request.data_length = REPORT_BYTES_MAX;
    match sheep.call(request, &[]) {
        Ok((_, answer)) => Ok(serde_json::from_slice(&answer).unwrap_or(Value::Null)),
        Err(Trouble::Lost(failure)) => Err(failure),
        Err(Trouble::Refused(_)) => Ok(Value::Null),
    }
}

/// Asks the cluster driver for something; gives its answer. A refusal comes with the driver's reason.
pub fn administer(sheep: &mut Sheep, wish: &Value) -> Result<String, Failure> {
    let mut payload = wish.to_string().into_bytes();
    // The answer may be as long as the wish.
    payload.resize(payload.len().max(WISH_BYTES), b' ');
    let mut request = Request::plain(Opcode::ClusterAdmin);
    request.flags = RequestFlags::WRITE | RequestFlags::PIGGYBACK;
    request.data_length = payload.len() as u32;
    let target = sheep.target();
    let (_, answer) = sheep.call(request, &payload).map_err(|trouble| {
        trouble.or(|reason| Failure::failed(format!("The sheep at {target} does not do this: {reason}")))
    })?;
    let answer: Value = serde_json::from_slice(&answer).unwrap_or_default();
    let said = |name: &str| answer.get(name).and_then(Value::as_str).map(str::to_owned);
    match (said("ok"), said("error")) {
        (Some(text), _) => Ok(text),
        (None, Some(reason)) => Err(Failure::failed(reason)),
        (None, None) => Err(Failure::system(format!("The sheep at {target} gave no answer that can be read"))),
    }
}

/// How fast clients may use volumes, by their names: those that are limited.
pub fn volume_limits(sheep: &mut Sheep) -> Result<Value, Failure> {
    figures(sheep, "volume-limits")
}

/// As `volume_limits`, with what the limits did at the sheep that is asked.
pub fn limit_figures(sheep: &mut Sheep) -> Result<Value, Failure> {
    figures(sheep, "limit-figures")
}

/// What the cache did of the sheep that is asked; null if it has none.
pub fn cache_figures(sheep: &mut Sheep) -> Result<Value, Failure> {
    figures(sheep, "cache-figures")
}

fn figures(sheep: &mut Sheep, wish: &str) -> Result<Value, Failure> {
    let answer = administer(sheep, &serde_json::json!({"do": wish}))?;
    serde_json::from_str(&answer).map_err(|error| Failure::system(format!("Figures that cannot be read: {error}")))
}

/// A set of VDI ids.
pub struct VdiSet(Vec<u8>);

impl VdiSet {
    /// Whether an id is in it.
    pub fn contains(&self, vdi: VdiId) -> bool {
        self.0.get(vdi.get() as usize / 8).is_some_and(|byte| byte >> (vdi.get() % 8) & 1 == 1)
    }

    /// The ids, ascending.
    pub fn iter(&self) -> impl Iterator<Item = VdiId> + '_ {
        ids_in(&self.0)
    }
}

/// All ids that were given out, also to VDIs that are deleted.
pub fn vdis_in_use(sheep: &mut Sheep) -> Result<VdiSet, Failure> {
    vdi_set(sheep, Opcode::ReadVdis)
}

/// The ids of deleted VDIs.
pub fn vdis_deleted(sheep: &mut Sheep) -> Result<VdiSet, Failure> {
    vdi_set(sheep, Opcode::ReadDelVdis)
}

fn vdi_set(sheep: &mut Sheep, opcode: Opcode) -> Result<VdiSet, Failure> {
    let mut request = Request::plain(opcode);
    request.data_length = BITMAP_BYTES as u32;
    let (_, bitmap) = sheep.call(request, &[]).map_err(|trouble| {
        trouble.or(|reason| Failure::failed(format!("Failed to read the list of VDIs: {reason}")))
    })?;
    Ok(VdiSet(bitmap))
}

/// What an inode says about its VDI.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Header {
    /// Empty when it was deleted.
    pub name: Vec<u8>,
    /// May be empty; means something for snapshots only.
    pub tag: Vec<u8>,
    /// Time on the wire.
    pub create_time: u64,
    /// Time on the wire; 0 unless it is a snapshot.
    pub snapshot_time: u64,
    /// Bytes that a guest sees.
    pub size_bytes: u64,
    /// Bytes of saved machine state.
    pub vm_state_bytes: u64,
    /// The guest's clock when its state was saved, in nanoseconds.
    pub vm_clock_nsec: u64,
    /// Copies, or strips, of each object.
    pub copies: u8,
    /// 0 for copies.
    pub copy_policy: u8,
    /// log2 of the object size.
    pub shift: u8,
    /// Number within the name.
    pub snapshot_id: u32,
    /// Its id.
    pub vdi: VdiId,
    /// What it was made from.
    pub parent: Option<VdiId>,
}

impl Default for Header {
    fn default() -> Header {
        Header::from(InodeHeader::default())
    }
}

impl From<InodeHeader> for Header {
    fn from(inode: InodeHeader) -> Header {
        Header {
            name: inode.name().to_vec(),
            tag: inode.tag().to_vec(),
            create_time: inode.create_time,
            snapshot_time: inode.snap_ctime,
            size_bytes: inode.vdi_size,
            vm_state_bytes: inode.vm_state_size,
            vm_clock_nsec: inode.vm_clock_nsec,
            copies: inode.nr_copies,
            copy_policy: inode.copy_policy,
            shift: inode.block_size_shift,
            snapshot_id: inode.snap_id,
            vdi: VdiId::from_low_bits(inode.vdi_id),
            parent: VdiId::new(inode.parent_vdi_id).filter(|parent| parent.get() != 0),
        }
    }
}

impl Header {
    /// Whether it can not be written.
    pub fn is_snapshot(&self) -> bool {
        self.snapshot_time != 0
    }

    /// Objects that the size has room for.
    pub fn object_count(&self) -> u64 {
        let shift = u32::from(self.shift).min(63);
        self.size_bytes.div_ceil(1 << shift)
    }

    /// `3`, or `4:2`.
    pub fn redundancy(&self) -> String {
        redundancy(self.copies, self.copy_policy)
    }
}

/// `3`, or `4:2`; what is neither is shown as its number of copies.
pub fn redundancy(copies: u8, copy_policy: u8) -> String {
    match CopyPolicy::from_wire(copies, copy_policy) {
        Ok(Some(policy)) => policy.to_string(),
        Ok(None) | Err(_) => copies.to_string(),
    }
}

/// Reads the header of a VDI.
pub fn read_header(sheep: &mut Sheep, vdi: VdiId) -> Result<Header, Trouble> {
    let bytes = read_object(sheep, Oid::inode(vdi), 0, inode::HEADER_BYTES as u32)?;
    let header = InodeHeader::decode(&bytes).map_err(|error| Trouble::Lost(Failure::system(error.to_string())))?;
    Ok(Header::from(header))
}

/// Where the map entry of an index is in its inode.
pub fn map_offset(index: u32) -> u64 {
    inode::map_offset(index)
}

/// The VDI of a name.
pub fn look_up(sheep: &mut Sheep, name: &[u8], selector: &Selector) -> Result<VdiId, Trouble> {
    let body = VdiRequest { snapid: selector.id, ..VdiRequest::default() };
    let (response, _) = vdi_call(sheep, Opcode::GetVdiInfo, body, &name_tag_payload(name, &selector.tag))?;
    vdi_of(sheep, &response)
}

/// A VDI to make.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct NewVdi {
    /// Bytes.
    pub size_bytes: u64,
    /// What it begins as a copy of.
    pub base: Option<VdiId>,
    /// Copies and policy byte; 0 for the cluster's defaults.
    pub redundancy: (u8, u8),
    /// log2 of the object size; 0 for the cluster's default.
    pub shift: u8,
    /// Whether the base becomes a snapshot.
    pub makes_snapshot: bool,
}

/// Makes a VDI and tells its id.
pub fn new_vdi(sheep: &mut Sheep, name: &[u8], new: &NewVdi) -> Result<VdiId, Trouble> {
    let body = VdiRequest {
        vdi_size: new.size_bytes,
        base_vdi_id: new.base.map_or(0, VdiId::get),
        copies: new.redundancy.0,
        copy_policy: new.redundancy.1,
        block_size_shift: new.shift,
        snapid: u32::from(new.makes_snapshot),
        ..VdiRequest::default()
    };
    let (response, _) = vdi_call(sheep, Opcode::NewVdi, body, &padded(name))?;
    vdi_of(sheep, &response)
}

/// Deletes a VDI.
pub fn delete_vdi(sheep: &mut Sheep, name: &[u8], selector: &Selector) -> Result<(), Trouble> {
    let body = VdiRequest { snapid: selector.id, ..VdiRequest::default() };
    let payload = name_tag_payload(name, &selector.tag);
    assert!(payload.len() == 2 * FIELD_BYTES, "name and tag");
    vdi_call(sheep, Opcode::DelVdi, body, &payload).map(drop)
}

/// Begins a snapshot beside the working VDI: gives a VDI to write into, at first with what `base` holds, that nobody else
/// finds. It goes away with the connection unless it is finished on it.
pub fn begin_restore(sheep: &mut Sheep, name: &[u8], base: VdiId, size_bytes: u64) -> Result<VdiId, Trouble> {
    let body =
        VdiRequest { snapid: restore::BEGIN, base_vdi_id: base.get(), vdi_size: size_bytes, ..VdiRequest::default() };
    let (response, _) = vdi_call(sheep, Opcode::RestoreVdi, body, &padded(name))?;
    vdi_of(sheep, &response)
}

/// Makes what was begun the newest snapshot of its name.
pub fn finish_restore(sheep: &mut Sheep, name: &[u8], vdi: VdiId) -> Result<(), Trouble> {
    let body = VdiRequest { snapid: restore::FINISH, base_vdi_id: vdi.get(), ..VdiRequest::default() };
    vdi_call(sheep, Opcode::RestoreVdi, body, &padded(name)).map(drop)
}

/// Deletes what was begun.
pub fn give_up_restore(sheep: &mut Sheep, name: &[u8], vdi: VdiId) -> Result<(), Trouble> {
    let body = VdiRequest { snapid: restore::GIVE_UP, base_vdi_id: vdi.get(), ..VdiRequest::default() };
    vdi_call(sheep, Opcode::RestoreVdi, body, &padded(name)).map(drop)
}

fn vdi_call(
    sheep: &mut Sheep,
    opcode: Opcode,
    body: VdiRequest,
    payload: &[u8],
) -> Result<(Response, Vec<u8>), Trouble> {
    let mut request = Request::vdi(opcode, RequestFlags::WRITE, body);
    request.data_length = payload.len() as u32;
    sheep.call(request, payload)
}

fn vdi_of(sheep: &Sheep, response: &Response) -> Result<VdiId, Trouble> {
    match response.body {
        ResponseBody::Vdi { vdi_id, .. } if vdi_id != 0 => VdiId::new(vdi_id),
        _ => None,
    }
    .ok_or_else(|| Trouble::Lost(Failure::system(format!("{} answered without a VDI id", sheep.target()))))
}

/// Reads part of an object.
pub fn read_object(sheep: &mut Sheep, oid: Oid, offset: u64, length: u32) -> Result<Vec<u8>, Trouble> {
    let mut request = object_request(Opcode::ReadObj, oid, RequestFlags::NONE, None, offset);
    request.data_length = length;
    let (_, bytes) = sheep.call(request, &[])?;
    if bytes.len() == length as usize {
        return Ok(bytes);
    }
    let text = format!("{} answered {} of {length} bytes of object {oid}", sheep.target(), bytes.len());
    Err(Trouble::Lost(Failure::system(text)))
}

/// Writes into an object that exists.
pub fn write_object(sheep: &mut Sheep, oid: Oid, offset: u64, data: &[u8]) -> Result<(), Trouble> {
    let flags = write_flags();
    let mut request = object_request(Opcode::WriteObj, oid, flags, None, offset);
    request.data_length = data.len() as u32;
    sheep.call(request, data).map(drop)
}

/// Creates an object, of zeros or as a copy of another, with data written into it.
pub fn create_object(
    sheep: &mut Sheep,
    oid: Oid,
    source: Option<Oid>,
    offset: u64,
    data: &[u8],
) -> Result<(), Trouble> {
    let copy = if source.is_some() { RequestFlags::COW } else { RequestFlags::NONE };
    let flags = write_flags() | copy;
    let mut request = object_request(Opcode::CreateAndWriteObj, oid, flags, source, offset);
    request.data_length = data.len() as u32;
    sheep.call(request, data).map(drop)
}

/// Makes a hole of an object of a working VDI.
pub fn discard_object(sheep: &mut Sheep, oid: Oid) -> Result<(), Trouble> {
    sheep.call(object_request(Opcode::DiscardObj, oid, RequestFlags::DIRECT, None, 0), &[]).map(drop)
}

/// What a list shows of VDIs from an id on, as many as the sheep tells at once; nothing after the last.
pub fn describe_vdis(sheep: &mut Sheep, first: u32) -> Result<Vec<VdiSummary>, Trouble> {
    let body = VdiRequest { base_vdi_id: first, ..VdiRequest::default() };
    let mut request = Request::vdi(Opcode::DescribeVdis, RequestFlags::NONE, body);
    request.data_length = (SUMMARIES_MAX * SUMMARY_BYTES) as u32;
    let (_, answer) = sheep.call(request, &[])?;
    Ok(VdiSummary::decode_all(&answer).collect())
}

/// Stands for the present epoch in [`locate`].
pub const CURRENT_EPOCH: u32 = 0;

/// The nodes that should have held an object in an epoch, the preferred one first; `None` if nobody knows that epoch any more.
pub fn locate(sheep: &mut Sheep, oid: Oid, epoch: u32) -> Result<Option<Vec<Node>>, Failure> {
    let mut request = object_request(Opcode::LocateObject, oid, RequestFlags::NONE, None, 0);
    if let RequestBody::Object(body) = &mut request.body {
        body.tgt_epoch = epoch;
    }
    request.data_length = (HOLDERS_MAX * NODE_BYTES) as u32;
    match sheep.call(request, &[]) {
        Ok((_, answer)) => Ok(Some(NodeEntry::decode_all(&answer).map(Node::from).collect())),
        Err(trouble) if trouble.is(Status::InvalidEpoch) => Ok(None),
        Err(trouble) => {
            let text = |reason| format!("{} does not tell where object {oid} was: {reason}", sheep.target());
            Err(trouble.or(|reason| Failure::failed(text(reason))))
        }
    }
}

/// A request about one object.
pub fn object_request(opcode: Opcode, oid: Oid, flags: RequestFlags, source: Option<Oid>, offset: u64) -> Request {
    let mut request = Request::object(opcode, oid, flags);
    if let RequestBody::Object(body) = &mut request.body {
        body.offset = offset;
        body.cow_oid = source.unwrap_or(Oid::from_raw(0));
    }
    request
}

/// Enters the owner of an object into its VDI's map.
pub fn write_map_entry(sheep: &mut Sheep, vdi: VdiId, index: u32) -> Result<(), Trouble> {
    write_object(sheep, Oid::inode(vdi), map_offset(index), &vdi.get().to_le_bytes())
}

/// The VDIs that are locked.
pub fn locks(sheep: &mut Sheep) -> Result<Vec<VdiStateEntry>, Failure> {
    let mut request = Request::plain(Opcode::GetVdiCopies);
    request.data_length = VDI_STATES_BYTES_MAX;
    let (_, answer) = sheep.call(request, &[]).map_err(|trouble| {
        trouble.or(|reason| Failure::failed(format!("Failed to get the list of locks: {reason}")))
    })?;
    Ok(VdiStateEntry::decode_all(&answer).filter(|entry| entry.lock_state != UNLOCKED).collect())
}

/// Takes the lock of a VDI away from whoever has it.
pub fn unlock(sheep: &mut Sheep, vdi: VdiId) -> Result<(), Trouble> {
    let body = VdiRequest { base_vdi_id: vdi.get(), ..VdiRequest::default() };
    sheep.call(Request::vdi(Opcode::ReleaseVdi, RequestFlags::NONE, body), &[]).map(drop)
}

/// Makes an index of a VDI a hole.
pub fn clear_map_entry(sheep: &mut Sheep, vdi: VdiId, index: u32) -> Result<(), Trouble> {
    write_object(sheep, Oid::inode(vdi), map_offset(index), &[0; 4])
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::exit::Exit;
    use crate::fake_sheep::FakeSheep;
    use serde_json::json;

    #[test]
    fn a_wish_is_granted_or_refused_with_a_reason() {
        let fake = FakeSheep::in_cluster(Value::Null);
        let wish = json!({"do": "admit", "node": "3f"});
        let ask = || administer(&mut Sheep::connect(fake.target).expect("connected"), &wish);
        assert_eq!(ask(), Ok("granted".to_owned()));
        assert_eq!(fake.kept().wishes, std::slice::from_ref(&wish));
        fake.kept().granted = json!({"error": "no node whose id begins with '3f' asks"});
        assert_eq!(ask(), Err(Failure::failed("no node whose id begins with '3f' asks")));
        fake.kept().granted = json!({"neither": 1});
        assert_eq!(ask().expect_err("no answer").exit, Exit::System);
        fake.kept().granted = Value::Null;
        let failure = ask().expect_err("an older sheep");
        assert!(failure.exit == Exit::Failure && failure.message.contains("does not do this"), "{failure}");
    }
}
