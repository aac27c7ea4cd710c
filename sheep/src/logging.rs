//! The log: one line per message, in the form that people grep (cli.md section 1.6).

use std::fmt;
use std::io;
use std::path::Path;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::filter::{LevelFilter, Targets};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

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

/// Logs to a file that is appended to, or to standard error.
pub fn start(file: Option<&Path>, level: Level) -> io::Result<()> {
    // The Raft library tells its every step below this level, and every message that did not arrive at it.
    let levels = Targets::new()
        .with_default(level)
        .with_target("openraft", Level::ERROR)
        .with_target("openraft::replication", LevelFilter::OFF);
    match file {
        Some(path) => {
            let file = std::fs::OpenOptions::new().create(true).append(true).open(path)?;
            let layer = tracing_subscriber::fmt::layer().event_format(Line).with_writer(std::sync::Mutex::new(file));
            tracing_subscriber::registry().with(layer.with_filter(levels)).init();
        }
        None => {
            let layer = tracing_subscriber::fmt::layer().event_format(Line).with_writer(io::stderr);
            tracing_subscriber::registry().with(layer.with_filter(levels)).init();
        }
    }
    Ok(())
}
