//! Errors of the data path as result codes: the only such mapping.

use qemu_proto::status::Status;
use sheep_core::command::Refusal;

use crate::data::gateway::{ReadFailure, WriteError};
use crate::data::inode::InodeError;
use crate::data::volumes::VolumeError;

/// How a write failed.
pub fn of_write(error: WriteError) -> Status {
    match error {
        WriteError::Missing => Status::NoObj,
        WriteError::Invalid | WriteError::BeyondEnd => Status::InvalidParms,
        WriteError::ReadOnly => Status::Readonly,
        WriteError::NoSpace => Status::NoSpace,
        WriteError::NoHolders => Status::Halt,
        // Nobody is there to be told of one that was abandoned.
        WriteError::Failed | WriteError::Fenced | WriteError::Abandoned => Status::Eio,
        WriteError::NotRunning => Status::WaitForJoin,
        WriteError::Order => Status::ClusterError,
    }
}

/// How a read failed.
pub fn of_read(error: ReadFailure) -> Status {
    match error {
        ReadFailure::Missing => Status::NoObj,
        ReadFailure::Invalid => Status::InvalidParms,
        ReadFailure::Failed => Status::Eio,
        ReadFailure::NoHolders => Status::Halt,
    }
}

/// Why the ordered state refused.
pub fn of_refusal(refusal: Refusal) -> Status {
    match refusal {
        Refusal::NotFormatted => Status::WaitForFormat,
        Refusal::Waiting => Status::WaitForJoin,
        Refusal::OtherCluster => Status::InvalidCtime,
        Refusal::InvalidParameters => Status::InvalidParms,
        Refusal::VdiExists => Status::VdiExist,
        Refusal::NoVdi => Status::NoVdi,
        Refusal::NoTag => Status::NoTag,
        Refusal::NoBaseVdi => Status::NoBaseVdi,
        Refusal::VdiIdsExhausted => Status::FullVdi,
        Refusal::ReadOnly => Status::Readonly,
        Refusal::LeaseHeldBy(_) | Refusal::LeaseLost => Status::Again,
        Refusal::Banned | Refusal::OtherFingerprint | Refusal::TokenUnknown => Status::JoinFailed,
        Refusal::Locked => Status::VdiLocked,
        Refusal::EarlierVersion => Status::NoSupport,
        Refusal::NoEffect => Status::Unknown,
        Refusal::Recovering => Status::NodeInRecovery,
    }
}

/// How an operation on a volume failed.
pub fn of_volume(error: VolumeError) -> Status {
    match error {
        VolumeError::Refused(refusal) => of_refusal(refusal),
        VolumeError::Write(error) => of_write(error),
        VolumeError::Read(error) => of_read(error),
        VolumeError::Order => Status::ClusterError,
    }
}

/// How an operation on an inode failed.
pub fn of_inode(error: &InodeError) -> Status {
    match error {
        InodeError::Missing => Status::NoObj,
        InodeError::Invalid => Status::InvalidParms,
        InodeError::ReadOnly => Status::Readonly,
        InodeError::Read(error) => of_read(*error),
        InodeError::Write(error) => of_write(*error),
    }
}
