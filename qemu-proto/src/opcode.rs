//! Every opcode of the client port, with its printable name (protocol.md section 2).
//!
//! 0x01 to 0x7F are for clients such as QEMU, 0x80 and above for the administration tool. The ancestor's opcodes between
//! its daemons have no place here: this server speaks a protocol of its own between nodes, on another port.

macro_rules! opcodes {
    ($($(#[doc = $doc:literal])* $variant:ident = $code:literal $name:literal,)*) => {
        /// What a request asks for.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u8)]
        pub enum Opcode {
            $($(#[doc = $doc])* $variant = $code,)*
        }

        impl Opcode {
            /// All of them, ascending.
            pub const ALL: &'static [Opcode] = &[$(Opcode::$variant),*];

            /// `None` for numbers that mean nothing, or something that only the ancestor's daemons said to each other.
            pub const fn from_code(code: u8) -> Option<Opcode> {
                match code {
                    $($code => Some(Opcode::$variant),)*
                    _ => None,
                }
            }

            /// The name used in documents.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Opcode::$variant => $name,)*
                }
            }
        }
    };
}

opcodes! {
    /// Create an object (zeros, or a copy of another) and write into it.
    CreateAndWriteObj = 0x01 "CREATE_AND_WRITE_OBJ",
    /// Read from an object.
    ReadObj = 0x02 "READ_OBJ",
    /// Write into an object that exists.
    WriteObj = 0x03 "WRITE_OBJ",
    /// Remove an object; refused from clients.
    RemoveObj = 0x04 "REMOVE_OBJ",
    /// Drop a data object and its map entry; tgt only.
    DiscardObj = 0x05 "DISCARD_OBJ",
    /// Make a volume, a clone or (from a working VDI) a snapshot.
    NewVdi = 0x11 "NEW_VDI",
    /// Look a VDI up in order to open it.
    LockVdi = 0x12 "LOCK_VDI",
    /// Close a VDI.
    ReleaseVdi = 0x13 "RELEASE_VDI",
    /// Look a VDI up.
    GetVdiInfo = 0x14 "GET_VDI_INFO",
    /// Bitmap of VDI ids in use.
    ReadVdis = 0x15 "READ_VDIS",
    /// Make earlier writes of a VDI durable.
    FlushVdi = 0x16 "FLUSH_VDI",
    /// Delete a working VDI or a snapshot.
    DelVdi = 0x17 "DEL_VDI",
    /// Copies and object size of volumes that do not say their own.
    GetClusterDefault = 0x18 "GET_CLUSTER_DEFAULT",
    /// The members.
    GetNodeList = 0x82 "GET_NODE_LIST",
    /// Format the cluster.
    MakeFs = 0x84 "MAKE_FS",
    /// Stop the cluster.
    Shutdown = 0x85 "SHUTDOWN",
    /// Space of one node.
    StatSheep = 0x86 "STAT_SHEEP",
    /// Status and epoch history.
    StatCluster = 0x87 "STAT_CLUSTER",
    /// Find, make or delete an attribute.
    GetVdiAttr = 0x89 "GET_VDI_ATTR",
    /// Go on without the members that are missing.
    ForceRecover = 0x8A "FORCE_RECOVER",
    /// Names of store back ends.
    GetStoreList = 0x90 "GET_STORE_LIST",
    /// Optional in the ancestor; not served.
    TraceStatus = 0x95 "TRACE_STATUS",
    /// Optional in the ancestor; not served.
    TraceReadBuf = 0x96 "TRACE_READ_BUF",
    /// Recovery progress of one node.
    StatRecovery = 0x97 "STAT_RECOVERY",
    /// Stop the daemon that is asked.
    KillNode = 0x9A "KILL_NODE",
    /// Optional in the ancestor; not served.
    TraceEnable = 0x9B "TRACE_ENABLE",
    /// Optional in the ancestor; not served.
    TraceDisable = 0x9C "TRACE_DISABLE",
    /// Strip files of erasure-coded volumes.
    CreateAndWritePeer = 0xA3 "CREATE_AND_WRITE_PEER",
    /// Strip files of erasure-coded volumes.
    ReadPeer = 0xA4 "READ_PEER",
    /// Let recovery run.
    EnableRecover = 0xA8 "ENABLE_RECOVER",
    /// Hold recovery.
    DisableRecover = 0xA9 "DISABLE_RECOVER",
    /// State of every VDI.
    GetVdiCopies = 0xAB "GET_VDI_COPIES",
    /// Announce a VDI (cluster snapshot load).
    NotifyVdiAdd = 0xAF "NOTIFY_VDI_ADD",
    /// Disks of one node.
    MdInfo = 0xB1 "MD_INFO",
    /// Add disks to a node.
    MdPlug = 0xB2 "MD_PLUG",
    /// Take disks from a node.
    MdUnplug = 0xB3 "MD_UNPLUG",
    /// SHA-1 of a copy.
    GetHash = 0xB4 "GET_HASH",
    /// Recompute the shares of all nodes.
    Reweight = 0xB5 "REWEIGHT",
    /// Request counters of one node.
    Stat = 0xB8 "STAT",
    /// Log level of one node.
    GetLoglevel = 0xB9 "GET_LOGLEVEL",
    /// Change the log level of one node.
    SetLoglevel = 0xBA "SET_LOGLEVEL",
    /// Optional in the ancestor; not served.
    NfsCreate = 0xBB "NFS_CREATE",
    /// Optional in the ancestor; not served.
    NfsDelete = 0xBC "NFS_DELETE",
    /// Whether a node has a copy of an object.
    Exist = 0xBD "EXIST",
    /// Settings, status and members.
    ClusterInfo = 0xBE "CLUSTER_INFO",
    /// Change the default number of copies.
    AlterClusterCopy = 0xBF "ALTER_CLUSTER_COPY",
    /// Change a volume's number of copies.
    AlterVdiCopy = 0xC0 "ALTER_VDI_COPY",
    /// Overwrite a copy with another node's.
    RepairReplica = 0xC5 "REPAIR_REPLICA",
    /// Which of some objects a node lacks.
    OidsExist = 0xC6 "OIDS_EXIST",
    /// Bitmap of deleted VDI ids.
    ReadDelVdis = 0xC9 "READ_DEL_VDIS",
    /// Recovery throttle of one node.
    GetRecovery = 0xCA "GET_RECOVERY",
    /// Change the recovery throttle of one node.
    SetRecovery = 0xCB "SET_RECOVERY",
    /// Change the number of virtual nodes.
    SetVnodes = 0xCC "SET_VNODES",
    /// Ours: compare all copies of an object and repair them.
    CheckObject = 0xE0 "CHECK_OBJECT",
    /// Ours: what the cluster does and waits for, as JSON text.
    ClusterReport = 0xE1 "CLUSTER_REPORT",
    /// Ours: asks the cluster driver for something, as JSON text: admissions, keys.
    ClusterAdmin = 0xE2 "CLUSTER_ADMIN",
    /// Ours: which nodes should hold an object in an epoch.
    LocateObject = 0xE3 "LOCATE_OBJECT",
    /// Ours: makes a further snapshot of a volume out of an older one, beside the working VDI.
    RestoreVdi = 0xE4 "RESTORE_VDI",
    /// Ours: header and object counts of many VDIs, from an id on.
    DescribeVdis = 0xE5 "DESCRIBE_VDIS",
}

impl Opcode {
    /// The number on the wire.
    pub const fn code(self) -> u8 {
        self as u8
    }

    /// Whether it is for clients such as QEMU; the others demand protocol version [`ADMIN_VERSION`].
    pub const fn is_public(self) -> bool {
        self.code() < 0x80
    }
}

/// The only protocol version accepted for opcodes from 0x80.
pub const ADMIN_VERSION: u8 = 0x0A;
/// The highest protocol version accepted for opcodes below 0x80. 0 means "not stated".
pub const CLIENT_VERSION_MAX: u8 = 2;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_opcodes_match_both_ways() {
        let known = (0..=u8::MAX).filter_map(|code| Opcode::from_code(code).map(|opcode| (code, opcode)));
        let mut count = 0;
        for (code, opcode) in known {
            assert_eq!(opcode.code(), code);
            assert_eq!(opcode.is_public(), code < 0x80);
            count += 1;
        }
        assert_eq!(count, Opcode::ALL.len());
    }
}
