//! Marks on branches that are taken rarely, so that the simulator can show that it takes them. Without the feature
//! `coverage-marks`, which no released program has, [`hit`] does nothing and nothing of it is left.

macro_rules! marks {
    ($($(#[doc = $doc:literal])* $mark:ident,)*) => {
        /// A branch.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Debug)]
        #[repr(u8)]
        pub enum Mark {
            $($(#[doc = $doc])* $mark,)*
        }

        /// All of them.
        pub const ALL: &[Mark] = &[$(Mark::$mark),*];
    };
}

marks! {
    /// A write was refused because the lease is somebody else's by now.
    WriteFenced,
    /// A node that is out, or leaves, was asked for its copy by one that had not heard of that.
    HolderFenced,
    /// A write waits because a member that held its object before may not have heard of the epoch.
    WriteWaitsForEpoch,
    /// A write that lost its lease had been done.
    LostWriteWasDone,
    /// A write that lost its lease had not been done, and was sent again.
    LostWriteWasNot,
    /// A client's connection ended before its write was sent.
    RequestAbandoned,
    /// Writes were under way when the members changed, and were sent again under new stamps.
    WriteSentAgain,
    /// A write that all current holders have waits for more holders.
    WriteWaitsForCopies,
    /// A node that is out asked others where the leader is.
    LeaderLookedFor,
    /// A gateway lost its lease while it read under it.
    LeaseLostWhileRead,
    /// A write waits because a holder's disk is full.
    WriteWaitsForSpace,
    /// A write waits for its object to be brought here.
    WriteParked,
    /// A write was answered before its object was here.
    WriteDeferred,
    /// The holder of a lease passed it on.
    LeaseHandedOver,
    /// A writer went while objects may have been half-written.
    WriterLost,
    /// Somebody tells of objects that a lost writer left half-written.
    HalfWrittenTold,
    /// An object that was left half-written is not the same on all holders yet.
    HalfWrittenSettles,
    /// Nobody had everything when the epoch began, and an object is not the same on all holders yet.
    OpenEpochSettles,
    /// An object waits for a node that took part in its last writes.
    HoldersUnheard,
    /// An old copy was replaced by a newer one.
    OldCopyReplaced,
    /// A copy with writes that nobody else has was given up.
    LosingCopyGivenUp,
    /// An object was written to while it was fetched.
    FetchCaughtUp,
    /// An object was replaced while it was fetched, or became current in another way.
    FetchOvertaken,
    /// A copy came back of an object that was removed meanwhile.
    RemovedStaysRemoved,
    /// A damaged copy was passed over by a read.
    DamagedCopyPassedOver,
    /// The journal ended in a record that was not written to its end.
    JournalTailCut,
    /// So did the log of the order.
    OrderTailCut,
    /// A node took the whole state of the order from another one.
    OrderSnapshotTaken,
    /// An answer waited because the quorum was not heard.
    AnswerWaitedForQuorum,
    /// A node that had lost the quorum has it again.
    QuorumBack,
    /// A process that was a member came in anew.
    EvictedCameBack,
    /// Members were evicted.
    MemberEvicted,
    /// The leader is dead: its address refuses connections.
    LeaderDied,
    /// The voters were changed.
    VotersChanged,
    /// A store takes nothing any more because its disk failed.
    StoreFailed,
    /// A copy that belongs on other nodes now keeps how far it is good.
    StrayKept,
    /// Copies were removed that belong on other nodes.
    StrayRemoved,
    /// An object was removed that a crash had left without a map that names it.
    OrphanRemoved,
    /// An object was copied before it was written to.
    CopiedOnWrite,
    /// A snapshot was made under an open disk, which follows.
    SnapshotFollowed,
    /// A read of a map found that this node was behind the order.
    ReaderBehind,
    /// A write came before its lease was known.
    HolderBehind,
    /// A map was made below the one that was found for its VDI.
    MapMadeMeanwhile,
    /// A write to a volume found that something had changed meanwhile.
    WriteLookedAgain,
    /// A read of a volume found the object gone that the map had named.
    ReadLookedAgain,
    /// The space of a deleted VDI came back.
    Reclaimed,
    /// A part of an object left the cache for another one.
    CacheEvicted,
    /// The device of the cache failed.
    CacheFailed,
}

#[cfg(feature = "coverage-marks")]
static HITS: [std::sync::atomic::AtomicU64; ALL.len()] = [const { std::sync::atomic::AtomicU64::new(0) }; ALL.len()];

/// The branch is taken.
#[cfg(feature = "coverage-marks")]
pub fn hit(mark: Mark) {
    HITS[mark as usize].fetch_add(1, std::sync::atomic::Ordering::Relaxed);
}

/// Nobody counts.
#[cfg(not(feature = "coverage-marks"))]
pub const fn hit(_: Mark) {}

/// How often each branch was taken in this process; nothing if nobody counts.
pub fn hits() -> Vec<(Mark, u64)> {
    #[cfg(feature = "coverage-marks")]
    return ALL.iter().map(|mark| (*mark, HITS[*mark as usize].load(std::sync::atomic::Ordering::Relaxed))).collect();
    #[cfg(not(feature = "coverage-marks"))]
    Vec::new()
}
