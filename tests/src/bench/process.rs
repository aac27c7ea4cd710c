//! What a process takes, as the kernel counts it.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, FileType, Mode};
use rustix::process::{Pid, Signal};

use crate::command::find_program;

/// User and system time of a process, from /proc/PID/stat (proc(5): fields 14 and 15, in ticks of 10 ms).
pub fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit(") ").next().context("no name in /proc/PID/stat")?;
    let fields: Vec<&str> = after_name.split(' ').collect();
    let field = |index: usize| -> Result<u64> { Ok(fields.get(index).context("a short /proc/PID/stat")?.parse()?) };
    Ok((field(11)? + field(12)?) as f64 / 100.0)
}

/// A number of /proc/PID/FILE, by its name.
fn number(pid: u32, file: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let number = line.and_then(|line| line.split_whitespace().next());
    Ok(number.with_context(|| format!("no {name} in /proc/PID/{file}"))?.parse()?)
}

/// Resident memory.
pub fn resident_mib(pid: u32) -> Result<f64> {
    Ok(number(pid, "status", "VmRSS")? as f64 / 1024.0)
}

/// Of that, what belongs to no file: memory that was asked for, and not the program's text.
pub fn anonymous_bytes(pid: u32) -> Result<u64> {
    Ok(number(pid, "status", "RssAnon")? << 10)
}

/// Most resident memory so far.
pub fn peak_mib(pid: u32) -> Result<f64> {
    Ok(number(pid, "status", "VmHWM")? as f64 / 1024.0)
}

/// /proc/PID/io of a process, in bytes. The first two count what passes through `read` and `write` and their relatives, of files
/// and of sockets alike; what goes by `recv`, `send` and io_uring is in none of them.
#[derive(Clone, Copy, Default, Debug)]
pub struct Io {
    /// Copied in by such calls, from the page cache or a device.
    pub read: u64,
    /// Copied out by such calls.
    pub written: u64,
    /// Handed to the page cache to be written back, or past it to a device.
    pub stored: u64,
}

/// What processes moved together so far.
pub fn io(pids: &[u32]) -> Result<Io> {
    let mut sum = Io::default();
    for &pid in pids {
        sum.read += number(pid, "io", "rchar")?;
        sum.written += number(pid, "io", "wchar")?;
        sum.stored += number(pid, "io", "write_bytes")?;
    }
    Ok(sum)
}

/// Counts the system calls of processes by `perf`, while it is told to.
pub struct SyscallCounter {
    perf: Child,
    control: fs::File,
    acknowledged: BufReader<fs::File>,
    output: PathBuf,
}

impl SyscallCounter {
    /// Starts `perf` on processes, not counting yet. `directory` is for its pipes.
    pub fn start(directory: &std::path::Path, pids: &[u32]) -> Result<SyscallCounter> {
        let program = find_program("perf").context("perf is not installed")?;
        let pipe = |name: &str| -> Result<PathBuf> {
            let path = directory.join(name);
            let _ = fs::remove_file(&path);
            rustix::fs::mknodat(CWD, &path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0)?;
            Ok(path)
        };
        let (control, acknowledged) = (pipe("perf.control")?, pipe("perf.acknowledged")?);
        let output = directory.join("perf.count");
        let pids: Vec<String> = pids.iter().map(u32::to_string).collect();
        let mut perf = Command::new(program)
            .args(["stat", "-x", ",", "-e", "raw_syscalls:sys_enter", "-D", "-1", "-p", &pids.join(","), "--control"])
            .arg(format!("fifo:{},{}", control.display(), acknowledged.display()))
            .arg("-o")
            .arg(&output)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        // Both ends, so that opening waits for nobody, even if perf ends at once.
        let open = |path: &PathBuf| fs::OpenOptions::new().read(true).write(true).open(path);
        let (control, acknowledged) = (open(&control)?, open(&acknowledged)?);
        std::thread::sleep(std::time::Duration::from_millis(300));
        ensure!(perf.try_wait()?.is_none(), "perf may not count system calls here");
        Ok(SyscallCounter { perf, control, acknowledged: BufReader::new(acknowledged), output })
    }

    fn tell(&mut self, word: &str) -> Result<()> {
        writeln!(self.control, "{word}")?;
        let mut line = Vec::new();
        self.acknowledged.read_until(b'\n', &mut line)?;
        // It sends the zero behind its string too, which then comes before the next answer.
        let text = line.strip_prefix(b"\0").unwrap_or(&line);
        ensure!(text == b"ack\n", "perf answered {line:?}");
        Ok(())
    }

    /// Begins to count.
    pub fn begin(&mut self) -> Result<()> {
        self.tell("enable")
    }

    /// Stops and gives the count.
    pub fn end(mut self) -> Result<u64> {
        self.tell("disable")?;
        let pid = Pid::from_raw(self.perf.id() as i32).context("process id 0")?;
        rustix::process::kill_process(pid, Signal::INT)?;
        self.perf.wait()?;
        let text = fs::read_to_string(&self.output)?;
        let line = text.lines().find(|line| line.contains("raw_syscalls")).context("perf did not count")?;
        line.split(',').next().context("no count")?.parse().context("perf counted nothing")
    }
}

impl Drop for SyscallCounter {
    fn drop(&mut self) {
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}
