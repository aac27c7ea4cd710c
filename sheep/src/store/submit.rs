//! Where changes enter: checked against the entry they meet, put in order, made visible to reads.
//!
//! Write path 5 of 6; next: store/commit.rs.
//!
//! Always holds:
//! 1. The order of `submit` calls is the order of the journal and of application.
//! 2. A refused change leaves no trace.
//! 3. Everything that `submit` accepted can be applied; what the applier then meets is damage or a failing device.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use qemu_proto::oid::Oid;
use sheep_core::stamp::{Epoch, Version};

use super::commit::cost_of;
use super::entries::Packed;
use super::epochs::Epochs;
use super::layout::Layout;
use super::object_file::OBJECT_BYTES_MAX;
use super::record::{Kind, Record};
use super::state::{Inner, Pending, Permit, Queued, Shared};
use super::ticket::Ticket;
use super::{Store, StoreError, SubmitError};

/// Write-back payload that may wait for a commit: twice what one batch takes.
const WRITE_BACK_BYTES_MAX: u64 = 8 << 20;

/// Never given to writes nor to recovery, whatever the configured reserve: room for the index to grow, so that a full disk can still
/// be checkpointed and objects can still be removed.
pub const SPACE_FLOOR_BYTES: u64 = 8 << 20;

/// What the gateways' writes under way may still take when a node says that it is nearly full.
const NEARLY_FULL_BYTES: u64 = 32 << 20;

/// Free space is looked up at most this often.
const SPACE_REFRESH: Duration = Duration::from_secs(1);

/// When a write counts as done.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Durability {
    /// When a power loss cannot take it back.
    Durable,
    /// At once; durable after the next durable write or flush, or after a second.
    WriteBack,
}

/// What a write does to the object before its bytes are laid over it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum WriteKind {
    /// Nothing; the object must be here.
    Overwrite,
    /// Makes it an object of zeros; replaces the one that is here, if any, at once as a whole.
    Create {
        /// Size of the new object.
        size_bytes: u64,
    },
    /// Makes it a copy of another object of the same size.
    CopyOf {
        /// The other object. It must be here, unless the write covers everything.
        source: Oid,
        /// Size of both.
        size_bytes: u64,
    },
}

/// A change of one object's content.
#[derive(Clone, Debug)]
pub struct Write {
    /// The object.
    pub oid: Oid,
    /// Its version afterwards.
    pub version: Version,
    /// Where the bytes go.
    pub offset: u64,
    /// The bytes; may be empty.
    pub data: Bytes,
    /// See [`WriteKind`].
    pub kind: WriteKind,
    /// See [`Durability`].
    pub durability: Durability,
}

impl Store {
    /// Puts a write in order. It is visible to reads when this returns, and done when the ticket completes.
    ///
    /// A write whose stamp is not above the object's is a repeat: its bytes are ignored; if its epoch is newer the
    /// object takes that epoch over. Its ticket completes like that of the original.
    pub fn submit(&self, permit: Permit, write: Write) -> Result<Ticket, SubmitError> {
        assert!(write.data.len() as u64 <= permit.bytes(), "a write must fit into its permit");
        let cost = permit.into_cost();
        let now = self.shared.world.clock.monotonic();
        let (result, refresh) = self.shared.with(|inner| {
            let result = inner.submit(&self.shared.layout, cost, write);
            if result.is_err() {
                inner.reserved_bytes -= cost;
            }
            let stale = now.saturating_sub(inner.space.seen_at) >= SPACE_REFRESH && !inner.space.refreshing;
            inner.space.refreshing |= stale;
            (result, stale)
        });
        if refresh {
            let shared = self.shared.clone();
            self.shared.world.disk.spawn(Box::new(move |files| shared.look_at_space(files)));
        }
        result
    }

    /// Removes an object, unless it has a stamp above `version`'s. Durable when the ticket completes. Removing what is
    /// not here succeeds.
    pub fn remove(&self, oid: Oid, version: Version) -> Ticket {
        self.shared.with(|inner| match inner.entries.get(oid.raw()) {
            Some(entry) if entry.version().stamp <= version.stamp => {
                inner.push_small(Record { oid: oid.raw(), version, disk: entry.disk(), ..small(Kind::Remove) })
            }
            _ => inner.ticket(inner.submitted),
        })
    }

    /// Forgets a damaged local copy, so that recovery fetches the object again. Durable when the ticket completes.
    pub fn discard_corrupt(&self, oid: Oid) -> Ticket {
        self.shared.with(|inner| match inner.entries.get(oid.raw()) {
            Some(entry) => inner.push_small(Record {
                oid: oid.raw(),
                version: entry.version(),
                disk: entry.disk(),
                ..small(Kind::Remove)
            }),
            None => inner.ticket(inner.submitted),
        })
    }

    /// Sets an object's version and leaves its content alone. Durable when the ticket completes.
    pub fn confirm(&self, oid: Oid, version: Version) -> Ticket {
        self.shared.with(|inner| match inner.entries.get(oid.raw()) {
            Some(entry) => {
                inner.push_small(Record { oid: oid.raw(), version, disk: entry.disk(), ..small(Kind::Confirm) })
            }
            None => Ticket::done(Err(StoreError::Missing)),
        })
    }

    /// Remembers the epoch through which everything here is known to be the newest. Durable when the ticket completes.
    pub fn set_clean_through(&self, epoch: Epoch) -> Ticket {
        self.shared.with(|inner| inner.push_epochs(Epochs { clean_through: epoch, ..inner.epochs }))
    }

    /// Remembers an epoch for [`Store::met_through`]. Durable when the ticket completes.
    pub fn note_meeting(&self, epoch: Epoch) -> Ticket {
        self.shared.with(|inner| {
            // What is not known is of earlier epochs.
            let met_through = inner.epochs.met_through.max(Some(epoch));
            inner.push_epochs(Epochs { met_through, ..inner.epochs })
        })
    }
}

/// A record without payload.
pub fn small(kind: Kind) -> Record {
    Record {
        kind,
        disk: 0,
        source_disk: 0,
        oid: 0,
        version: Version::default(),
        size_bytes: 0,
        extra: 0,
        offset: 0,
        data: Bytes::new(),
    }
}

/// Space that a record may take on its disk.
pub fn footprint_bytes(record: &Record) -> u64 {
    let copied = if record.kind == Kind::Copy { record.size_bytes } else { 0 };
    record.data.len() as u64 + copied
}

impl Inner {
    fn submit(&mut self, layout: &Layout, cost: u64, write: Write) -> Result<Ticket, SubmitError> {
        if let Some(error) = self.stopped() {
            return Err(SubmitError::Stopped(error));
        }
        let bytes_max = self.write_bytes_max();
        if write.data.len() as u64 > bytes_max {
            return Err(SubmitError::TooLarge { bytes_max });
        }
        let before = self.entries.get(write.oid.raw());
        if let Some(entry) = before
            && write.version.stamp <= entry.version().stamp
        {
            self.reserved_bytes -= cost;
            return Ok(self.repeat(&write, entry));
        }
        let durability = write.durability;
        let record = self.record_of(layout, write, before)?;
        self.check_space(&record)?;
        Ok(self.push(record, cost, durability))
    }

    /// Checks a write and says it in a record.
    fn record_of(&self, layout: &Layout, write: Write, before: Option<Packed>) -> Result<Record, SubmitError> {
        let oid = write.oid.raw();
        let end = write.offset.checked_add(write.data.len() as u64).ok_or(SubmitError::OutOfRange)?;
        let new_disk = before.map_or_else(|| layout.disk_of_new(oid), Packed::disk);
        let mut record =
            Record { oid, version: write.version, offset: write.offset, disk: new_disk, ..small(Kind::Create) };
        match write.kind {
            WriteKind::Overwrite => {
                let entry = before.ok_or(SubmitError::Missing)?;
                record.kind = Kind::Overwrite;
                record.size_bytes = entry.size_bytes();
            }
            WriteKind::Create { size_bytes } => record.size_bytes = size_bytes,
            WriteKind::CopyOf { source, size_bytes } => {
                record.size_bytes = size_bytes;
                if write.data.len() as u64 != size_bytes {
                    let entry = self.entries.get(source.raw()).ok_or(SubmitError::Missing)?;
                    if entry.size_bytes() != size_bytes || source == write.oid {
                        return Err(SubmitError::OutOfRange);
                    }
                    record.kind = Kind::Copy;
                    record.extra = source.raw();
                    record.source_disk = entry.disk();
                    // Beside its source the copy can share blocks with it; a file that is replaced stays where it is.
                    record.disk = before.map_or(entry.disk(), Packed::disk);
                }
            }
        }
        if record.size_bytes == 0 || record.size_bytes > OBJECT_BYTES_MAX || end > record.size_bytes {
            return Err(SubmitError::OutOfRange);
        }
        record.data = write.data;
        Ok(record)
    }

    fn repeat(&mut self, write: &Write, entry: Packed) -> Ticket {
        let known = entry.version();
        if write.version.epoch > known.epoch {
            let version = Version { epoch: write.version.epoch, stamp: known.stamp };
            let record = Record { oid: write.oid.raw(), version, disk: entry.disk(), ..small(Kind::Confirm) };
            self.reserved_bytes += cost_of(0);
            return self.push(record, cost_of(0), write.durability);
        }
        match write.durability {
            Durability::Durable => self.ticket(self.submitted),
            Durability::WriteBack => Ticket::done(Ok(())),
        }
    }

    fn check_space(&self, record: &Record) -> Result<(), SubmitError> {
        let free = self.space.disks.get(usize::from(record.disk)).map_or(0, |space| space.free_bytes);
        let kept = self.space.reserve_bytes + SPACE_FLOOR_BYTES + self.space.in_flight_bytes;
        if free < kept + footprint_bytes(record) { Err(SubmitError::NoSpace) } else { Ok(()) }
    }

    /// Submits a durable record that needs no permit: it has no payload, and the commit waits for room by itself.
    pub fn push_small(&mut self, record: Record) -> Ticket {
        if let Some(error) = self.stopped() {
            return Ticket::done(Err(error));
        }
        let cost = cost_of(0);
        self.reserved_bytes += cost;
        self.push(record, cost, Durability::Durable)
    }

    fn push_epochs(&mut self, epochs: Epochs) -> Ticket {
        self.push_small(Record { extra: epochs.to_bits(), ..small(Kind::Clean) })
    }

    fn push(&mut self, record: Record, cost: u64, durability: Durability) -> Ticket {
        self.submitted += 1;
        let number = self.submitted;
        let mut result = None;
        if record.kind == Kind::Clean {
            self.epochs = Epochs::from_bits(record.extra);
        } else {
            result = record.outcome(self.entries.get(record.oid));
            self.entries.set(record.oid, result);
        }
        if record.kind.changes_content() || record.kind == Kind::Remove {
            let pending = Pending { number, kind: record.kind, offset: record.offset, data: record.data.clone() };
            self.overlay.entry(record.oid).or_default().push_back(pending);
        }
        self.space.in_flight_bytes += footprint_bytes(&record);
        self.queued_bytes += record.data.len() as u64;
        self.queue.push_back(Queued { number, record, cost, result });
        match durability {
            Durability::Durable => self.ticket(number),
            Durability::WriteBack => {
                if self.queued_bytes > WRITE_BACK_BYTES_MAX {
                    self.want_durable();
                }
                Ticket::done(Ok(()))
            }
        }
    }
}

impl Store {
    /// Whether space is so low that gateways should stop sending writes here: `NEARLY_FULL_BYTES` before one has to be
    /// refused, which would leave the copies of an object different. From the last look at the disks.
    pub fn is_nearly_full(&self) -> bool {
        let inner = self.shared.lock();
        let kept = inner.space.reserve_bytes + SPACE_FLOOR_BYTES + NEARLY_FULL_BYTES + inner.space.in_flight_bytes;
        inner.space.disks.iter().any(|disk| disk.free_bytes < kept)
    }

    /// Whether files of removed objects are still there: their space comes back with the next checkpoint.
    pub fn has_removals(&self) -> bool {
        !self.shared.lock().doomed.is_empty()
    }

    /// Looks at the disks' free space.
    pub async fn refresh_space(&self) {
        let shared = self.shared.clone();
        crate::world::disk::run(&self.shared.world.disk, move |files| shared.look_at_space(files)).await;
    }
}

impl Shared {
    /// Looks up the free space of every disk. A disk that cannot say keeps its last figure.
    pub fn look_at_space(self: &Arc<Self>, files: &dyn crate::world::disk::Files) {
        let spaces: Vec<_> = self.layout.disks.iter().map(|disk| files.space(disk).ok()).collect();
        let now = self.world.clock.monotonic();
        self.with(|inner| {
            for (known, seen) in inner.space.disks.iter_mut().zip(spaces) {
                *known = seen.unwrap_or(*known);
            }
            inner.space.seen_at = now;
            inner.space.refreshing = false;
        });
    }
}
