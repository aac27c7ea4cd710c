//! Result codes and the texts that people and scripts know (protocol.md section 3).

macro_rules! statuses {
    ($($(#[doc = $doc:literal])* $variant:ident = $code:literal $name:literal $text:literal,)*) => {
        /// How a request went.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug)]
        #[repr(u32)]
        pub enum Status {
            $($(#[doc = $doc])* $variant = $code,)*
        }

        impl Status {
            /// All of them, ascending.
            pub const ALL: &'static [Status] = &[$(Status::$variant),*];

            /// `None` for numbers that mean nothing.
            pub const fn from_code(code: u32) -> Option<Status> {
                match code {
                    $($code => Some(Status::$variant),)*
                    _ => None,
                }
            }

            /// The name used in documents.
            pub const fn name(self) -> &'static str {
                match self {
                    $(Status::$variant => $name,)*
                }
            }

            /// The text shown to people.
            pub const fn text(self) -> &'static str {
                match self {
                    $(Status::$variant => $text,)*
                }
            }
        }
    };
}

statuses! {
    /// Success.
    Success = 0x00 "SUCCESS" "Success",
    /// Unknown error.
    Unknown = 0x01 "UNKNOWN" "Unknown error",
    /// No object found.
    NoObj = 0x02 "NO_OBJ" "No object found",
    /// I/O error.
    Eio = 0x03 "EIO" "I/O error",
    /// VDI exists already.
    VdiExist = 0x04 "VDI_EXIST" "VDI exists already",
    /// Invalid parameters.
    InvalidParms = 0x05 "INVALID_PARMS" "Invalid parameters",
    /// System error.
    SystemError = 0x06 "SYSTEM_ERROR" "System error",
    /// VDI is already locked.
    VdiLocked = 0x07 "VDI_LOCKED" "VDI is already locked",
    /// No VDI found.
    NoVdi = 0x08 "NO_VDI" "No VDI found",
    /// No base VDI found.
    NoBaseVdi = 0x09 "NO_BASE_VDI" "No base VDI found",
    /// Failed to read from requested VDI.
    VdiRead = 0x0A "VDI_READ" "Failed to read from requested VDI",
    /// Failed to write to requested VDI.
    VdiWrite = 0x0B "VDI_WRITE" "Failed to write to requested VDI",
    /// Failed to read from base VDI.
    BaseVdiRead = 0x0C "BASE_VDI_READ" "Failed to read from base VDI",
    /// Failed to write to base VDI.
    BaseVdiWrite = 0x0D "BASE_VDI_WRITE" "Failed to write to base VDI",
    /// Failed to find requested tag.
    NoTag = 0x0E "NO_TAG" "Failed to find requested tag",
    /// System is still booting.
    Startup = 0x0F "STARTUP" "System is still booting",
    /// VDI is not locked.
    VdiNotLocked = 0x10 "VDI_NOT_LOCKED" "VDI is not locked",
    /// System is shutting down.
    Shutdown = 0x11 "SHUTDOWN" "System is shutting down",
    /// Out of memory on server.
    NoMem = 0x12 "NO_MEM" "Out of memory on server",
    /// Maximum number of VDIs reached.
    FullVdi = 0x13 "FULL_VDI" "Maximum number of VDIs reached",
    /// Protocol version mismatch.
    VerMismatch = 0x14 "VER_MISMATCH" "Protocol version mismatch",
    /// Server has no space for new objects.
    NoSpace = 0x15 "NO_SPACE" "Server has no space for new objects",
    /// Waiting for cluster to be formatted.
    WaitForFormat = 0x16 "WAIT_FOR_FORMAT" "Waiting for cluster to be formatted",
    /// Waiting for other nodes to join cluster.
    WaitForJoin = 0x17 "WAIT_FOR_JOIN" "Waiting for other nodes to join cluster",
    /// Node has failed to join cluster.
    JoinFailed = 0x18 "JOIN_FAILED" "Node has failed to join cluster",
    /// IO has halted as there are not enough living nodes.
    Halt = 0x19 "HALT" "IO has halted as there are not enough living nodes",
    /// Object is read-only.
    Readonly = 0x1A "READONLY" "Object is read-only",
    /// Inode object is invalidated.
    InodeInvalidated = 0x1D "INODE_INVALIDATED" "Inode object is invalidated",
    /// Request has an old epoch.
    OldNodeVer = 0x81 "OLD_NODE_VER" "Request has an old epoch",
    /// Request has a new epoch.
    NewNodeVer = 0x82 "NEW_NODE_VER" "Request has a new epoch",
    /// Cluster has not been formatted.
    NotFormatted = 0x83 "NOT_FORMATTED" "Cluster has not been formatted",
    /// Creation times differ.
    InvalidCtime = 0x84 "INVALID_CTIME" "Creation times differ",
    /// Invalid epoch.
    InvalidEpoch = 0x85 "INVALID_EPOCH" "Invalid epoch",
    /// Network error between sheep.
    NetworkError = 0x86 "NETWORK_ERROR" "Network error between sheep",
    /// No cache object found.
    NoCache = 0x87 "NO_CACHE" "No cache object found",
    /// The buffer is too small.
    BufferSmall = 0x88 "BUFFER_SMALL" "The buffer is too small",
    /// Cluster is running/halted and cannot be force recovered.
    ForceRecover = 0x89 "FORCE_RECOVER" "Cluster is running/halted and cannot be force recovered",
    /// Targeted backend store is not found.
    NoStore = 0x8A "NO_STORE" "Targeted backend store is not found",
    /// Operation is not supported.
    NoSupport = 0x8B "NO_SUPPORT" "Operation is not supported",
    /// Targeted node is in recovery.
    NodeInRecovery = 0x8C "NODE_IN_RECOVERY" "Targeted node is in recovery",
    /// Node is killed.
    Killed = 0x8D "KILLED" "Node is killed",
    /// Object ID exists already.
    OidExist = 0x8E "OID_EXIST" "Object ID exists already",
    /// Ask to try again.
    Again = 0x8F "AGAIN" "Ask to try again",
    /// Object may be stale.
    StaleObj = 0x90 "STALE_OBJ" "Object may be stale",
    /// Cluster driver error.
    ClusterError = 0x91 "CLUSTER_ERROR" "Cluster driver error",
    /// VDI is not empty.
    VdiNotEmpty = 0x92 "VDI_NOT_EMPTY" "VDI is not empty",
    /// No target found.
    NotFound = 0x93 "NOT_FOUND" "No target found",
    /// Object (in kv) is incomplete.
    Incomplete = 0x94 "INCOMPLETE" "Object (in kv) is incomplete",
    /// Node is still collecting cluster information.
    CollectingCinfo = 0x95 "COLLECTING_CINFO" "Node is still collecting cluster information",
    /// Targeted node is gateway mode.
    GatewayMode = 0x97 "GATEWAY_MODE" "Targeted node is gateway mode",
    /// Invalid cluster vnodes strategy.
    InvalidVnodesStrategy = 0x98 "INVALID_VNODES_STRATEGY" "Invalid cluster vnodes strategy",
    /// No checkpoint entry.
    NoCheckpointEntry = 0x99 "NO_CHECKPOINT_ENTRY" "No checkpoint entry",
}

impl Status {
    /// The number on the wire.
    pub const fn code(self) -> u32 {
        self as u32
    }
}

impl core::fmt::Display for Status {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(self.text())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_and_statuses_match_both_ways() {
        let known = (0..=0xFFFF).filter_map(Status::from_code);
        assert!(known.eq(Status::ALL.iter().copied()));
        assert!(Status::ALL.iter().all(|status| Status::from_code(status.code()) == Some(*status)));
    }
}
