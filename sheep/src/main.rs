//! Flags to configuration to node; waits for a signal; exit status.
//!
//! Unless told to stay in the foreground, the process starts itself once more in the background and waits until that one
//! serves or has said why not: status 0 means that clients can connect.

use std::io::{Read, Write};
use std::process::{Command, ExitCode, Stdio};

use sheep::config::{self, Config, LogDestination, Parsed, Usage};
use sheep::node::{Node, Stop};
use sheep::world::{World, panics};

/// Set for the process in the background.
const CHILD_MARK: &str = "SHEEP_IN_BACKGROUND";
/// What the process in the background writes to standard output when it serves.
const READY: &[u8] = b"ready\n";
/// Threads that may block on files: enough for reads beside a flush and a checkpoint; more do not make one disk faster.
const DISK_THREADS: usize = 8;

fn main() -> ExitCode {
    // A broken invariant stops the process: half a node is worse than none.
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        if panics::is_contained() {
            tracing::debug!("a library gave up over damaged bytes: {info}");
            return;
        }
        tracing::error!("a broken invariant stops this process: {info}");
        report(info);
        std::process::abort();
    }));
    let arguments: Vec<String> = std::env::args_os().map(|word| word.to_string_lossy().into_owned()).collect();
    let in_background = std::env::var_os(CHILD_MARK).is_some();
    let parsed = config::parse(&if in_background { rejoin_paths(&arguments) } else { arguments.clone() });
    match parsed {
        Ok(Parsed::Printed) => ExitCode::SUCCESS,
        Err(Usage(text)) => {
            eprintln!("{text}");
            ExitCode::FAILURE
        }
        Ok(Parsed::Run(config)) if config.foreground || in_background => run(&config, in_background),
        Ok(Parsed::Run(config)) => start_in_background(&config, &arguments),
    }
}

/// The process in the background shows its directories as two words, META and DISK,DISK: scripts look for it by
/// `pgrep -f "sheep META "`. They come first on its command line.
fn rejoin_paths(arguments: &[String]) -> Vec<String> {
    match arguments {
        [program, meta, disks, rest @ ..] => {
            let paths = if disks == "-" { meta.clone() } else { format!("{meta},{disks}") };
            [program.clone(), paths].into_iter().chain(rest.iter().cloned()).collect()
        }
        _ => arguments.to_vec(),
    }
}

fn start_in_background(config: &Config, arguments: &[String]) -> ExitCode {
    let started = (|| -> std::io::Result<bool> {
        let disks: Vec<String> = config.disks.iter().map(|disk| disk.to_string_lossy().into_owned()).collect();
        let mut child = Command::new(std::env::current_exe()?)
            .arg(&config.meta)
            .arg(if disks.is_empty() { "-".to_string() } else { disks.join(",") })
            .args(&arguments[1..])
            .env(CHILD_MARK, "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut said = Vec::new();
        if let Some(output) = &mut child.stdout {
            output.read_to_end(&mut said)?;
        }
        Ok(said == READY)
    })();
    match started {
        Ok(true) => ExitCode::SUCCESS,
        // The process in the background has said why on standard error, which it shares until it serves.
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("cannot start in the background: {error}; try -f");
            ExitCode::FAILURE
        }
    }
}

fn run(config: &Config, in_background: bool) -> ExitCode {
    sheep::logging::start(config.log_level);
    if in_background {
        // A session of its own: the terminal's signals are not for us. It fails only for a process that leads one already.
        let _ = rustix::process::setsid();
        // Nor is the directory it was started from held; every path is absolute by now.
        let _ = std::env::set_current_dir("/");
    }
    match serve(config, in_background) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!("{error:#}");
            if config.log_destination != LogDestination::Stderr {
                eprintln!("{error:#}");
            }
            ExitCode::FAILURE
        }
    }
}

fn serve(config: &Config, in_background: bool) -> anyhow::Result<()> {
    if config.log_destination == LogDestination::Stderr {
        sheep::logging::to_stderr()?;
    }
    // Right before the runtime, for its clock.
    let world = World::real(DISK_THREADS)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    runtime.block_on(async {
        let store = Node::open_store(&world, config).await?;
        // After the store: whoever starts a node twice is told that, and not of the pid file.
        let pid_file = config.pid_file.as_deref().map(PidFile::take).transpose()?;
        place_log(config)?;
        let node = Node::start(world, config, store).await?;
        if in_background {
            say_ready()?;
        }
        let mut terminate = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate())?;
        let mut interrupt = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::interrupt())?;
        let stop = tokio::select! {
            stop = node.asked_to_stop() => stop,
            _ = terminate.recv() => Stop::Asked,
            _ = interrupt.recv() => Stop::Asked,
        };
        let result = match stop {
            Stop::Asked | Stop::WithAll => {
                node.stop(matches!(stop, Stop::WithAll)).await;
                Ok(())
            }
            Stop::ShutOut(reason) => {
                node.give_up().await;
                Err(anyhow::anyhow!("{reason}"))
            }
            Stop::StoreFailed(reason) => {
                node.give_up().await;
                Err(anyhow::anyhow!("the store failed ({reason}): this node left the cluster, the others go on"))
            }
        };
        drop(pid_file);
        result
    })
}

/// The log is in the store directory unless told otherwise; that is ours once the store is open.
fn place_log(config: &Config) -> anyhow::Result<()> {
    if config.log_destination == LogDestination::Stderr {
        return Ok(());
    }
    let path = config.log_dir.as_ref().unwrap_or(&config.meta).join("sheep.log");
    sheep::logging::to_file(&path).map_err(|error| anyhow::anyhow!("cannot write the log {}: {error}", path.display()))
}

/// Tells the waiting process that clients can connect, and lets go of its terminal.
fn say_ready() -> anyhow::Result<()> {
    let null = std::fs::OpenOptions::new().read(true).write(true).open("/dev/null")?;
    let mut output = std::io::stdout();
    output.write_all(READY)?;
    output.flush()?;
    rustix::stdio::dup2_stdout(&null)?;
    rustix::stdio::dup2_stderr(&null)?;
    Ok(())
}

/// A file with the process id, locked for life and removed at a clean end.
struct PidFile {
    path: std::path::PathBuf,
    _file: std::fs::File,
}

impl PidFile {
    fn take(path: &std::path::Path) -> anyhow::Result<PidFile> {
        use std::os::unix::fs::OpenOptionsExt;
        let shown = path.display();
        let mut file = std::fs::OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            .open(path)
            .map_err(|error| anyhow::anyhow!("cannot write the pid file {shown}: {error}"))?;
        rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).map_err(|_| {
            anyhow::anyhow!("the pid file {shown} belongs to a sheep that runs; stop it, or choose another")
        })?;
        file.set_len(0)?;
        writeln!(file, "{}", std::process::id())?;
        Ok(PidFile { path: path.to_path_buf(), _file: file })
    }
}

impl Drop for PidFile {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}
