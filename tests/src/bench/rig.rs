//! Everything that is measured, started beside each other in one directory: three nodes with volumes in three copies, and the
//! references.

use std::path::Path;

use anyhow::{Context, Result};

use super::OBJECT_BYTES;
use super::in_process::InProcess;
use super::load::{Disk, Piped};
use super::loop_reference::LoopReference;
use super::native::Native;
use super::nbd::Nbd;
use super::patterns::{FIRST_WRITES, Volume};
use super::reference::Reference;
use crate::clients::{Client, Request, opcode, padded};
use crate::spawn::{Cluster, ClusterPlan};

const COPIES: u8 = 3;
const OBJECT_SHIFT: u8 = 22;

/// How our volume is reached.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Through {
    /// Sheepdog's own protocol.
    Native,
    /// NBD, with the same client as the reference.
    Nbd,
    /// Calls of the volume layer of a node that runs inside the benchmark.
    Layer,
}

impl Through {
    /// For people.
    pub fn shown(self) -> &'static str {
        match self {
            Through::Native => "the native protocol",
            Through::Nbd => "NBD",
            Through::Layer => "the volume layer of a node inside the benchmark",
        }
    }
}

/// See the module.
pub struct Rig {
    cluster: Cluster,
    /// One of the three nodes, if it is to be inside.
    inside: Option<InProcess>,
    through: Through,
    size_bytes: u64,
    reference: Reference,
    thin_reference: Option<Reference>,
    bare_loop: LoopReference,
    /// Volumes made so far: each has a name of its own.
    made: u32,
}

const FULL: &str = "bench";

impl Rig {
    /// Starts everything and writes the full volumes.
    pub fn start(through: Through, size_bytes: u64) -> Result<Rig> {
        let (cluster, inside) = if through == Through::Layer {
            let cluster = ClusterPlan::new(2).start()?;
            let store = cluster.scratch().join("inside");
            let inside = InProcess::start(&store, cluster.driver(), 3)?;
            cluster.wait_members(3)?;
            cluster.dog(&["cluster", "format", "-c", &COPIES.to_string()])?.ok()?;
            cluster.wait_members(3)?;
            (cluster, Some(inside))
        } else {
            (ClusterPlan::new(3).start_formatted(COPIES.into())?, None)
        };
        let reference = Reference::start(cluster.scratch(), "reference", size_bytes, true)?;
        let bare_loop = LoopReference::start(cluster.scratch())?;
        let rig = Rig { cluster, inside, through, size_bytes, reference, thin_reference: None, bare_loop, made: 0 };
        rig.create(FULL, size_bytes)?;
        rig.fill(FULL, size_bytes)?;
        Ok(rig)
    }

    fn create(&self, name: &str, size_bytes: u64) -> Result<()> {
        self.cluster.client(0)?.create_volume(name, size_bytes, COPIES, OBJECT_SHIFT)?;
        Ok(())
    }

    fn nbd(&self, name: &str) -> Result<Nbd> {
        Nbd::connect(&self.cluster.node(0).store.join("nbd.sock"), name)
    }

    fn fill(&self, name: &str, size_bytes: u64) -> Result<()> {
        self.nbd(name)?.fill(size_bytes)
    }

    /// Bytes of a volume.
    pub fn size_bytes(&self, volume: Volume) -> u64 {
        match volume {
            Volume::Full => self.size_bytes,
            Volume::Thin | Volume::Shared => FIRST_WRITES * OBJECT_BYTES,
        }
    }

    /// Our volume of a kind, ready to be loaded; those for first writes are new each time.
    pub fn ours(&mut self, volume: Volume) -> Result<Box<dyn Disk>> {
        let size_bytes = self.size_bytes(volume);
        let name = match volume {
            Volume::Full => FULL.to_owned(),
            Volume::Thin | Volume::Shared => {
                self.made += 1;
                let name = format!("{FULL}{}", self.made);
                self.create(&name, size_bytes)?;
                name
            }
        };
        if volume == Volume::Shared {
            self.fill(&name, size_bytes)?;
            snapshot(&mut self.cluster.client(0)?, &name, size_bytes)?;
        }
        Ok(match (self.through, &self.inside) {
            (Through::Native, _) => Box::new(Piped(Native::open(self.cluster.client(0)?, &name)?)),
            (Through::Nbd, _) => Box::new(Piped(self.nbd(&name)?)),
            (Through::Layer, inside) => {
                Box::new(inside.as_ref().context("the node inside was not started")?.open(&name)?)
            }
        })
    }

    /// The same of qemu-nbd.
    pub fn theirs(&mut self, volume: Volume) -> Result<Box<dyn Disk>> {
        if volume == Volume::Full {
            return Ok(Box::new(Piped(self.reference.connect()?)));
        }
        // The old one ends first: they share the place.
        self.thin_reference = None;
        let thin = Reference::start(self.cluster.scratch(), "thin", self.size_bytes(volume), false)?;
        let connection = thin.connect()?;
        self.thin_reference = Some(thin);
        Ok(Box::new(Piped(connection)))
    }

    /// The bare loop.
    pub fn bare_loop(&mut self) -> &mut LoopReference {
        &mut self.bare_loop
    }

    /// Our processes. The first is the one that the load goes to.
    pub fn our_pids(&self) -> Vec<u32> {
        let inside = self.inside.iter().map(|_| std::process::id());
        inside.chain((0..self.cluster.node_count()).filter_map(|index| self.cluster.node(index).pid())).collect()
    }

    /// That of the reference for a kind of volume.
    pub fn their_pid(&self, volume: Volume) -> u32 {
        let thin = self.thin_reference.as_ref().filter(|_| volume != Volume::Full);
        thin.unwrap_or(&self.reference).pid()
    }

    /// What the reference is.
    pub fn reference_shown(&self) -> &str {
        &self.reference.shown
    }

    /// A directory for files beside the stores.
    pub fn scratch(&self) -> &Path {
        self.cluster.scratch()
    }

    /// Ends everything; fails if a node did not live until here.
    pub fn finish(self) -> Result<()> {
        if let Some(inside) = self.inside {
            inside.finish()?;
        }
        self.cluster.finish()
    }
}

/// Turns a working VDI into a snapshot, as QEMU does: its id, then NEW_VDI with it as the base.
pub fn snapshot(client: &mut Client, name: &str, size_bytes: u64) -> Result<()> {
    let base = client.look_up(name, "", 0)?.get();
    let request = Request::new(opcode::NEW_VDI).with_u64(16, size_bytes).with_u32(24, base);
    let request = request.with_u8(28, COPIES).with_u8(31, OBJECT_SHIFT).with_u32(32, 1);
    client.call(request, &padded(&[name]))?.success("snapshot").map(drop)
}
