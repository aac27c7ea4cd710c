//! `dog node stat`
//!
//! Watched, it prints as it goes and ends with whoever reads.

use std::io::{self, Write};
use std::thread;
use std::time::Duration;

use qemu_proto::opcode::Opcode;
use qemu_proto::request::Request;
use qemu_proto::stat::{Counters, STAT_BYTES};
use serde_json::Value;

use crate::args;
use crate::connect::Sheep;
use crate::exit::{Exit, Failure};
use crate::meaning::Target;
use crate::report::{Form, Report, Show, Style};
use crate::requests;

/// What the table begins with; the rates of `-w` follow it.
pub const HEADER: &str = "Request\tActive\tTotal\tWrite\tRead\tRemove\tFlush\tAll WR\tAll RD";
/// Between two looks of `-w`.
const INTERVAL: Duration = Duration::from_secs(1);

/// What one side asked of a node.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Figures {
    /// Requests under way.
    pub active: u64,
    /// Requests in all, since the sheep was started.
    pub total: u64,
    /// Requests to write.
    pub writes: u64,
    /// Requests to read.
    pub reads: u64,
    /// Requests to remove.
    pub removes: u64,
    /// Requests to flush; not counted for other nodes.
    pub flushes: u64,
    /// Bytes to be written.
    pub written_bytes: u64,
    /// Bytes read.
    pub read_bytes: u64,
}

/// What changed within [`INTERVAL`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Rates {
    /// Bytes to be written, a second.
    pub written_bytes: u64,
    /// Bytes read, a second.
    pub read_bytes: u64,
    /// Requests a second.
    pub requests: u64,
}

/// One side, with its rates where they are known.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Row {
    /// Since the sheep was started.
    pub figures: Figures,
    /// `None` unless watched.
    pub rates: Option<Rates>,
}

/// What a volume's limits did at a node since they were set.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Limited {
    /// The volume.
    pub name: String,
    /// 0 for no limit.
    pub operations_per_second: u64,
    /// 0 for no limit.
    pub bytes_per_second: u64,
    /// Seconds' worth that may be used at once.
    pub burst_seconds: u64,
    /// Requests that had to wait, or do.
    pub delayed: u64,
    /// Requests that wait now.
    pub waiting: u64,
}

/// What a node's cache did since the sheep was started.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
pub struct Cached {
    /// The most it holds, in bytes.
    pub size_bytes: u64,
    /// What it holds, in bytes.
    pub used_bytes: u64,
    /// Reads that the disks were spared.
    pub hits: u64,
    /// Reads that the disks were not spared, and that it keeps.
    pub misses: u64,
    /// Its device failed, and it is not used any more.
    pub failed: bool,
}

impl Cached {
    /// Hits of a hundred reads; `None` before the first.
    pub fn hit_percent(&self) -> Option<f64> {
        let reads = self.hits + self.misses;
        (reads > 0).then(|| 100.0 * self.hits as f64 / reads as f64)
    }
}

/// What a node was asked.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Stat {
    /// By clients.
    pub client: Row,
    /// By other nodes.
    pub peer: Row,
    /// Volumes with limits, by name.
    pub limits: Vec<Limited>,
    /// `None` if it has no cache.
    pub cache: Option<Cached>,
}

/// Runs the command.
pub fn run(typed: &args::Stat, target: Target) -> Result<Report, Failure> {
    let mut sheep = Sheep::connect(target)?;
    let form = Form::of(typed.shape.raw, typed.shape.json);
    if typed.watch {
        watch(&mut sheep, form, &mut io::stdout().lock(), || thread::sleep(INTERVAL))?;
        return Ok(Report::silent());
    }
    let header = if form == Form::Table { format!("{HEADER}\n") } else { String::new() };
    Ok(Report::new(form, look(&mut sheep).map_err(|failure| Failure { out: header, ..failure })?))
}

/// Prints until nobody reads any more.
fn watch(sheep: &mut Sheep, form: Form, out: &mut impl Write, pause: impl Fn()) -> Result<(), Failure> {
    let style = Style { zone: jiff::tz::TimeZone::UTC, is_terminal: false };
    let mut before = look(sheep)?;
    loop {
        pause();
        let now = look(sheep)?;
        let mut text = Vec::new();
        let shown = now.since(&before);
        match form {
            Form::Table => shown.table(&style, &mut text),
            Form::Raw => shown.raw(&style, &mut text),
            // A value on each line: programs read them as they come.
            Form::Json => text = format!("{}\n", shown.json().unwrap_or_default()).into_bytes(),
        }
        match out.write_all(&text).and_then(|()| out.flush()) {
            Ok(()) => before = now,
            Err(error) if error.kind() == io::ErrorKind::BrokenPipe => return Ok(()),
            Err(error) => return Err(Failure::system(format!("Cannot write to standard output: {error}"))),
        }
    }
}

fn look(sheep: &mut Sheep) -> Result<Stat, Failure> {
    let mut request = Request::plain(Opcode::Stat);
    request.data_length = STAT_BYTES as u32;
    let (_, answer) = sheep
        .call(request, &[])
        .map_err(|trouble| trouble.or(|reason| Failure::failed(format!("Response's result: {reason}"))))?;
    let text = || format!("{} answered {} bytes about what it was asked", sheep.target(), answer.len());
    let stat = Stat::from(Counters::decode(&answer).ok_or_else(|| Failure::new(Exit::System, text()))?);
    // An older sheep knows of none, and one that is not formatted has none.
    let limits = requests::limit_figures(sheep).unwrap_or_default();
    let cache = requests::cache_figures(sheep).unwrap_or_default();
    Ok(Stat { limits: limited(&limits), cache: cached(&cache), ..stat })
}

fn cached(figures: &Value) -> Option<Cached> {
    let number = |field: &str| figures.get(field).and_then(Value::as_u64);
    Some(Cached {
        size_bytes: number("size_bytes")?,
        used_bytes: number("used_bytes")?,
        hits: number("hits")?,
        misses: number("misses")?,
        failed: figures.get("failed").and_then(Value::as_bool)?,
    })
}

fn limited(limits: &Value) -> Vec<Limited> {
    let each = limits.as_object().into_iter().flatten().map(|(name, limits)| {
        let number = |field: &str| limits.get(field).and_then(Value::as_u64).unwrap_or(0);
        Limited {
            name: name.clone(),
            operations_per_second: number("operations_per_second"),
            bytes_per_second: number("bytes_per_second"),
            burst_seconds: number("burst_seconds"),
            delayed: number("delayed"),
            waiting: number("waiting"),
        }
    });
    each.collect()
}

impl From<Counters> for Stat {
    fn from(counters: Counters) -> Stat {
        let wire = counters.0;
        let client = Figures {
            active: wire[0],
            total: wire[2],
            written_bytes: wire[4],
            read_bytes: wire[5],
            removes: wire[8],
            reads: wire[9],
            writes: wire[10],
            flushes: wire[11],
        };
        let peer = Figures {
            active: wire[1],
            total: wire[3],
            written_bytes: wire[6],
            read_bytes: wire[7],
            removes: wire[12],
            reads: wire[13],
            writes: wire[14],
            flushes: 0,
        };
        let row = |figures| Row { figures, rates: None };
        Stat { client: row(client), peer: row(peer), limits: Vec::new(), cache: None }
    }
}

impl Stat {
    /// The same, with what changed since an earlier look. A sheep that was started anew begins at zero.
    fn since(&self, before: &Stat) -> Stat {
        let row = |now: &Row, before: &Row| {
            let (now, before) = (now.figures, before.figures);
            let rates = Rates {
                written_bytes: now.written_bytes.saturating_sub(before.written_bytes),
                read_bytes: now.read_bytes.saturating_sub(before.read_bytes),
                requests: now.total.saturating_sub(before.total),
            };
            Row { figures: now, rates: Some(rates) }
        };
        let (client, peer) = (row(&self.client, &before.client), row(&self.peer, &before.peer));
        Stat { client, peer, limits: self.limits.clone(), cache: self.cache }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fake_sheep::FakeSheep;

    #[test]
    fn every_counter_has_its_place() {
        let mut wire = [0; 15];
        for (index, counter) in wire.iter_mut().enumerate() {
            *counter = index as u64;
        }
        let stat = Stat::from(Counters(wire));
        let client = stat.client.figures;
        assert_eq!((client.active, client.total, client.written_bytes, client.read_bytes), (0, 2, 4, 5));
        assert_eq!((client.removes, client.reads, client.writes, client.flushes), (8, 9, 10, 11));
        let peer = stat.peer.figures;
        assert_eq!((peer.active, peer.total, peer.written_bytes, peer.read_bytes), (1, 3, 6, 7));
        assert_eq!((peer.removes, peer.reads, peer.writes, peer.flushes), (12, 13, 14, 0));
    }

    /// A reader that goes away after some lines.
    struct Reader {
        text: Vec<u8>,
        lines_left: usize,
    }

    impl Write for Reader {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            if self.lines_left == 0 {
                return Err(io::ErrorKind::BrokenPipe.into());
            }
            self.lines_left = self.lines_left.saturating_sub(String::from_utf8_lossy(bytes).lines().count());
            self.text.extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn watching_shows_what_changed_and_ends_with_the_reader() {
        let fake = FakeSheep::start(1);
        let mut sheep = Sheep::connect(fake.target).expect("connected");
        let mut reader = Reader { text: Vec::new(), lines_left: 4 };
        let more = || {
            let mut kept = fake.kept();
            kept.counters.0[2] += 7;
            kept.counters.0[4] += 4096;
        };
        watch(&mut sheep, Form::Raw, &mut reader, more).expect("the reader went away");
        let text = String::from_utf8(reader.text).expect("text");
        let idle = "0\t0\t0\t0\t0\t0\t0\t0\t0\t0\t0\n";
        assert_eq!(
            text,
            format!("0\t7\t0\t0\t0\t0\t4096\t0\t4096\t0\t7\n{idle}0\t14\t0\t0\t0\t0\t8192\t0\t4096\t0\t7\n{idle}")
        );
    }
}
