//! Bugs on purpose, so that the simulator can show that it finds bugs. Without the feature `planted-bugs`, which no released
//! program has, [`is`] is false when the program is compiled and nothing of them is left.

/// What can be wrong.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
#[repr(u8)]
pub enum Bug {
    /// A write is acknowledged when the first holder has it.
    EarlyAcknowledge = 1,
    /// A node that lost the quorum goes on answering.
    OpenFence,
    /// The journal is written and not flushed.
    SkippedFlush,
    /// Whatever copy a node has is taken for the newest.
    TrustedCopy,
    /// A holder takes writes of an epoch that is over.
    OldEpoch,
    /// A lease is passed on with writes under way, and holders take those although it is somebody else's by now.
    OldLease,
    /// What a dead writer left half-written is not compared.
    ForgottenSuspects,
    /// Readers are shown what is not on all holders yet.
    UnsettledReads,
    /// A vote is given and not written down.
    ForgottenVote,
    /// An object is served although the last to write it were not heard.
    UnheardHolders,
    /// A block is served whatever its checksum says.
    IgnoredChecksum,
    /// A copy of an object that was removed meanwhile is kept.
    ForgottenRemoval,
    /// What a dead writer left half-written is taken as it is here, older or not.
    LowerStamp,
    /// Replay of the journal takes a batch that was not written to its end.
    TornReplay,
    /// A write goes into the snapshot's object instead of a copy of it.
    SharedWrites,
    /// A snapshot is made while writes are under way.
    UndrainedSnapshot,
    /// The objects of a deleted volume stay.
    KeptGarbage,
    /// A reader that is behind the order is shown the map of what it takes for the working VDI.
    ReaderBehind,
    /// What is found on the way up to a volume's map is believed although a map was made below it meanwhile.
    PassedMap,
    /// A node that was being brought up to date beside others that had everything says that it met none of them.
    HiddenMeeting,
    /// A gateway that has lost its lease is shown what it wrote and nobody else has, perhaps.
    FormerWriter,
    /// In an epoch of which nobody had everything from the first moment, what one holder has is shown before the others have it.
    OpenEpoch,
}

/// All of them.
pub const ALL: [Bug; 22] = [
    Bug::EarlyAcknowledge,
    Bug::OpenFence,
    Bug::SkippedFlush,
    Bug::TrustedCopy,
    Bug::OldEpoch,
    Bug::OldLease,
    Bug::ForgottenSuspects,
    Bug::UnsettledReads,
    Bug::ForgottenVote,
    Bug::UnheardHolders,
    Bug::IgnoredChecksum,
    Bug::ForgottenRemoval,
    Bug::LowerStamp,
    Bug::TornReplay,
    Bug::SharedWrites,
    Bug::UndrainedSnapshot,
    Bug::KeptGarbage,
    Bug::ReaderBehind,
    Bug::PassedMap,
    Bug::HiddenMeeting,
    Bug::FormerWriter,
    Bug::OpenEpoch,
];

#[cfg(feature = "planted-bugs")]
static PLANTED: std::sync::atomic::AtomicU8 = std::sync::atomic::AtomicU8::new(0);

/// From now on this one is there, in every node of the process.
#[cfg(feature = "planted-bugs")]
pub fn plant(bug: Bug) {
    PLANTED.store(bug as u8, std::sync::atomic::Ordering::Relaxed);
}

/// Whether it is there.
#[cfg(feature = "planted-bugs")]
pub fn is(bug: Bug) -> bool {
    PLANTED.load(std::sync::atomic::Ordering::Relaxed) == bug as u8
}

/// It is not.
#[cfg(not(feature = "planted-bugs"))]
pub const fn is(_: Bug) -> bool {
    false
}
