//! The log: one line per message, in the form that people grep (cli.md section 1.6). How much of it can be changed while it runs.
//!
//! It begins with the process; what is said before it is known where the log may be is held back until then.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use qemu_proto::stat::LOG_LEVELS;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, reload};

/// Most bytes that are held back: a replay says little, and what more there is repeats itself.
const HELD_BYTES_MAX: usize = 1 << 20;

/// Where the log goes.
enum Sink {
    /// Nobody has said so yet.
    Held(Vec<u8>),
    File(File),
    Stderr,
}

static SINK: Mutex<Sink> = Mutex::new(Sink::Held(Vec::new()));

fn sink() -> MutexGuard<'static, Sink> {
    SINK.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Writes to wherever the log goes at that moment.
struct ToSink;

impl Write for ToSink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &mut *sink() {
            Sink::Held(held) => {
                if held.len() + bytes.len() <= HELD_BYTES_MAX {
                    held.extend_from_slice(bytes);
                }
                Ok(bytes.len())
            }
            Sink::File(file) => file.write(bytes),
            Sink::Stderr => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The log goes to a file from now on, which is appended to.
pub fn to_file(path: &Path) -> io::Result<()> {
    let mut file = File::options().create(true).append(true).open(path)?;
    let mut sink = sink();
    if let Sink::Held(held) = &*sink {
        file.write_all(held)?;
    }
    *sink = Sink::File(file);
    Ok(())
}

/// The log goes to standard error from now on.
pub fn to_stderr() -> io::Result<()> {
    let mut sink = sink();
    if let Sink::Held(held) = &*sink {
        io::stderr().write_all(held)?;
    }
    *sink = Sink::Stderr;
    Ok(())
}

struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let level = match *event.metadata().level() {
            Level::ERROR => "ERROR",
            Level::WARN => "WARN",
            Level::INFO => "INFO",
            Level::DEBUG | Level::TRACE => "DEBUG",
        };
        let time = jiff::Zoned::now().strftime("%b %d %H:%M:%S");
        let module = event.metadata().module_path().unwrap_or("sheep").trim_start_matches("sheep::");
        write!(writer, "{time} {level:>6} [{module}] ")?;
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

/// How much is logged, as syslog and the ancestor number it.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct LogLevel(u8);

impl LogLevel {
    /// What is logged unless told otherwise.
    pub const INFO: LogLevel = LogLevel(6);

    /// The level of a name.
    pub fn of_name(name: &str) -> Option<LogLevel> {
        LOG_LEVELS.iter().position(|known| *known == name).map(|number| LogLevel(number as u8))
    }

    /// The level of a number.
    pub fn of_number(number: u32) -> Option<LogLevel> {
        ((number as usize) < LOG_LEVELS.len()).then_some(LogLevel(number as u8))
    }

    /// 0 to 7, more is more.
    pub fn number(self) -> u8 {
        self.0
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        LOG_LEVELS[usize::from(self.0)]
    }

    /// What it lets through: messages here have four levels.
    fn filter(self) -> Targets {
        let level = match self.0 {
            0..=3 => Level::ERROR,
            4 => Level::WARN,
            5 | 6 => Level::INFO,
            _ => Level::DEBUG,
        };
        // The Raft library tells its every step below this level, and every message that did not arrive at it.
        Targets::new()
            .with_default(level)
            .with_target("openraft", Level::ERROR)
            .with_target("openraft::replication", LevelFilter::OFF)
    }
}

/// The level of this process's log, once it is started.
struct Current {
    number: AtomicU8,
    filter: reload::Handle<Targets, Registry>,
}

static CURRENT: OnceLock<Current> = OnceLock::new();

/// The level of the log.
pub fn level() -> LogLevel {
    CURRENT.get().map_or(LogLevel::INFO, |current| LogLevel(current.number.load(Ordering::Relaxed)))
}

/// Logs more or less from now on; nothing happens before [`start`].
pub fn set_level(level: LogLevel) {
    let Some(current) = CURRENT.get() else { return };
    // It fails only when the log itself is gone.
    if current.filter.reload(level.filter()).is_ok() {
        let before = LogLevel(current.number.swap(level.number(), Ordering::Relaxed));
        tracing::info!("the log level is {} from now on; it was {}", level.name(), before.name());
    }
}

/// Begins the log, once in a process.
pub fn start(level: LogLevel) {
    let (filter, handle) = reload::Layer::new(level.filter());
    let layer = tracing_subscriber::fmt::layer().event_format(Line).with_writer(|| ToSink);
    tracing_subscriber::registry().with(layer.with_filter(filter)).init();
    // A second start would have failed above.
    let _ = CURRENT.set(Current { number: AtomicU8::new(level.number()), filter: handle });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_held_back_comes_first_in_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "before\n").unwrap();
        ToSink.write_all(b"early\n").unwrap();
        // A line is held as a whole or not at all.
        ToSink.write_all(&vec![b'x'; HELD_BYTES_MAX]).unwrap();
        to_file(&path).unwrap();
        ToSink.write_all(b"late\n").unwrap();
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "before\nearly\nlate\n");
        *sink() = Sink::Held(Vec::new());
    }

    #[test]
    fn names_and_numbers_are_those_of_syslog() {
        for (name, number) in [("emerg", 0), ("err", 3), ("warning", 4), ("info", 6), ("debug", 7)] {
            let level = LogLevel::of_name(name).expect(name);
            assert_eq!((level.number(), LogLevel::of_number(number.into())), (number, Some(level)));
            assert_eq!(level.name(), name);
        }
        assert_eq!(
            (LogLevel::of_name("loud"), LogLevel::of_number(8), LogLevel::of_number(u32::MAX)),
            (None, None, None)
        );
        assert_eq!(LogLevel::INFO.name(), "info");
    }

    #[test]
    fn the_library_below_stays_quiet_at_every_level() {
        for number in 0..8 {
            let filter = LogLevel::of_number(number).expect("a level").filter();
            assert!(!filter.would_enable("openraft::core", &Level::WARN), "{number}");
            assert_eq!(filter.would_enable("sheep::data", &Level::DEBUG), number == 7);
            assert_eq!(filter.would_enable("sheep::data", &Level::WARN), number >= 4);
            assert!(filter.would_enable("sheep::data", &Level::ERROR), "{number}");
        }
    }
}
