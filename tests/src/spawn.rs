//! Real `sheep` processes on this machine, each cluster in a temporary directory of its own.
//!
//! Always holds:
//! 1. Two clusters never meet: ports, store directories and the directory of the `local` driver are all their own.
//! 2. Processes end with the [`Cluster`], by their ids, and are waited for. If the test program itself is killed, the
//!    kernel ends them (`setpriv --pdeathsig`).
//! 3. [`Cluster::finish`] fails if a process that should live has died, or if any log tells of a panic.
//!
//! A cluster that is dropped without `finish` belongs to a failed test: the tails of its logs go to standard error.

use std::fs;
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal};
use tempfile::TempDir;

use crate::clients::Client;
use crate::command::{self, Finished};

/// A node on two busy cores with an empty store serves well within this.
pub const START_DEADLINE: Duration = Duration::from_secs(30);
/// Of every node's journal: a fill for small volumes would take longer with the default one.
pub const JOURNAL_BYTES: u64 = 64 << 20;
/// Any single `dog` command on the small volumes of the tests.
pub const DOG_DEADLINE: Duration = Duration::from_mins(2);

/// Ports are taken below the range from which the kernel draws outgoing connections (32768 and up): a killed node's
/// port is then still free when the node comes back. Four digits, because the sheepdog backing store of `tgt` takes no
/// notice of a fifth.
const PORT_FIRST: u16 = 3000;
const PORT_COUNT: u16 = 7000;
static PORT_NEXT: AtomicU16 = AtomicU16::new(0);

/// One socket for each port that this program was given, so that no other test program is given it while its node is down.
static PORTS_HELD: Mutex<Vec<UnixListener>> = Mutex::new(Vec::new());

/// A port of 127.0.0.1 that nobody listens on, and that no other test program is given before this one ends. What is no test may
/// take it before the caller does: retry then.
pub fn free_port() -> Result<u16> {
    // Test programs that run at the same time start at different places.
    let offset = (std::process::id() as u16).wrapping_mul(97);
    for _ in 0..PORT_COUNT {
        let step = PORT_NEXT.fetch_add(1, Ordering::Relaxed);
        let port = PORT_FIRST + offset.wrapping_add(step) % PORT_COUNT;
        // A name that is gone with this process, whatever becomes of it.
        let name = SocketAddr::from_abstract_name(format!("sheep-test-port-{port}"))?;
        let Ok(held) = UnixListener::bind_addr(&name) else { continue };
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            PORTS_HELD.lock().unwrap_or_else(PoisonError::into_inner).push(held);
            return Ok(port);
        }
    }
    bail!("no free port from {PORT_FIRST} on")
}

/// The program `name` (`sheep`, `dog`) that this workspace built: in `SHEEP_BIN_DIR`, else in the target directory of
/// the running test program, the release build first.
pub fn binary(name: &str) -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("SHEEP_BIN_DIR") {
        let path = Path::new(&directory).join(name);
        ensure!(path.is_file(), "SHEEP_BIN_DIR holds no {name}: {}", path.display());
        return Ok(path);
    }
    let this = std::env::current_exe()?;
    // target/PROFILE/deps/SUITE-HASH or target/PROFILE/PROGRAM
    let profile = this.ancestors().skip(1).find(|directory| !directory.ends_with("deps"));
    let profile = profile.context("the test program is not in a target directory")?;
    let target = profile.parent().context("the test program is not in a target directory")?;
    [target.join("release"), profile.to_path_buf()]
        .into_iter()
        .map(|directory| directory.join(name))
        .find(|path| path.is_file())
        .with_context(|| format!("no {name} in {}: run `cargo build --release -p sheep -p dog`", target.display()))
}

/// What a cluster is made of; see [`ClusterPlan::start`].
pub struct ClusterPlan {
    nodes: Vec<NodePlan>,
    is_voting: bool,
}

#[derive(Clone, Default)]
struct NodePlan {
    store: Option<PathBuf>,
    extra: Vec<String>,
}

impl ClusterPlan {
    /// `count` nodes in zones 1, 2, 3, ...
    pub fn new(count: usize) -> ClusterPlan {
        ClusterPlan { nodes: vec![NodePlan::default(); count], is_voting: false }
    }

    /// With the default driver instead of `local`. Other clusters on the machine's loopback would be found: for a network
    /// namespace.
    #[must_use]
    pub fn voting(mut self) -> ClusterPlan {
        self.is_voting = true;
        self
    }

    /// Gives node `index` further arguments.
    #[must_use]
    pub fn arguments(mut self, index: usize, extra: &[&str]) -> ClusterPlan {
        self.nodes[index].extra.extend(extra.iter().map(|&word| word.to_owned()));
        self
    }

    /// Puts the store of node `index` in `directory` instead of the temporary one.
    #[must_use]
    pub fn store(mut self, index: usize, directory: &Path) -> ClusterPlan {
        self.nodes[index].store = Some(directory.to_path_buf());
        self
    }

    /// Starts every node and waits until all of them serve and know each other. Not formatted yet.
    pub fn start(self) -> Result<Cluster> {
        let scratch = tempfile::Builder::new().prefix("sheep-test-").tempdir()?;
        let driver = scratch.path().join("local");
        fs::create_dir(&driver)?;
        let mut cluster = Cluster {
            sheep: binary("sheep")?,
            dog: binary("dog")?,
            setpriv: command::find_program("setpriv"),
            nodes: Vec::new(),
            is_voting: self.is_voting,
            driver,
            scratch,
            finished: false,
        };
        for (index, plan) in self.nodes.into_iter().enumerate() {
            let store = plan.store.unwrap_or_else(|| cluster.scratch.path().join(format!("n{}", index + 1)));
            cluster.nodes.push(Node {
                stderr: cluster.scratch.path().join(format!("n{}.stderr", index + 1)),
                store,
                port: free_port()?,
                peer_port: free_port()?,
                zone: index as u32 + 1,
                extra: plan.extra,
                child: None,
            });
            cluster.start_new(index)?;
        }
        if self.is_voting {
            cluster.wait_acquainted()?;
        } else {
            cluster.wait_members(cluster.nodes.len())?;
        }
        Ok(cluster)
    }

    /// [`ClusterPlan::start`], then `dog cluster format -c copies`.
    pub fn start_formatted(self, copies: u32) -> Result<Cluster> {
        let cluster = self.start()?;
        cluster.dog(&["cluster", "format", "-c", &copies.to_string()])?.ok()?;
        cluster.wait_members(cluster.nodes.len())?;
        Ok(cluster)
    }
}

/// One node of a [`Cluster`], running or not.
pub struct Node {
    /// The store directory.
    pub store: PathBuf,
    /// The TCP port on 127.0.0.1.
    pub port: u16,
    /// That for other nodes, with the default driver.
    peer_port: u16,
    /// The failure zone.
    pub zone: u32,
    extra: Vec<String>,
    stderr: PathBuf,
    child: Option<Child>,
}

impl Node {
    /// The unix socket of the client protocol.
    pub fn socket(&self) -> PathBuf {
        self.store.join("sock")
    }

    /// The log, and what went to standard error, for messages.
    pub fn log(&self) -> String {
        let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        read(&self.store.join("sheep.log")) + &read(&self.stderr)
    }

    /// The process id while the node runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }
}

/// A running cluster; see the top of this file.
pub struct Cluster {
    sheep: PathBuf,
    dog: PathBuf,
    setpriv: Option<PathBuf>,
    nodes: Vec<Node>,
    is_voting: bool,
    driver: PathBuf,
    scratch: TempDir,
    finished: bool,
}

impl Cluster {
    /// Three nodes, formatted with three copies: what most tests want.
    pub fn three() -> Result<Cluster> {
        ClusterPlan::new(3).start_formatted(3)
    }

    /// Node `index`, counted from 0.
    pub fn node(&self, index: usize) -> &Node {
        &self.nodes[index]
    }

    /// How many nodes there are, running or not.
    pub fn node_count(&self) -> usize {
        self.nodes.len()
    }

    /// A directory for the test's own files; it goes with the cluster.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The directory of the `local` driver.
    pub fn driver(&self) -> &Path {
        &self.driver
    }

    /// `-c local:DIRECTORY`, for a sheep that a test starts by hand.
    pub fn driver_argument(&self) -> String {
        format!("local:{}", self.driver.display())
    }

    /// A native-protocol connection over TCP to node `index`.
    pub fn client(&self, index: usize) -> Result<Client> {
        Client::tcp(self.nodes[index].port)
    }

    /// Runs `dog` through the first running node.
    pub fn dog(&self, arguments: &[&str]) -> Result<Finished> {
        let index = self.nodes.iter().position(|node| node.child.is_some()).context("no node is running")?;
        self.dog_through(index, arguments, &[])
    }

    /// Runs `dog` through node `index` with `input` on its standard input.
    pub fn dog_through(&self, index: usize, arguments: &[&str], input: &[u8]) -> Result<Finished> {
        let mut dog = Command::new(&self.dog);
        dog.args(arguments)
            .env_remove("SHEEPDOG_DOG_ADDR")
            .env("SHEEPDOG_DOG_PORT", self.nodes[index].port.to_string())
            .env("TZ", "UTC");
        command::run_with_input(&mut dog, input, DOG_DEADLINE)
    }

    /// Starts node `index` again on its port and store, and waits until it serves.
    pub fn restart(&mut self, index: usize) -> Result<()> {
        self.launch(index)?;
        self.wait_serving(index)
    }

    /// Starts node `index` again and does not wait: nodes of a cluster may need one another to come up.
    pub fn launch(&mut self, index: usize) -> Result<()> {
        ensure!(self.nodes[index].child.is_none(), "node {index} is running already");
        let node = &self.nodes[index];
        // Foreground, so that the id of the child is the id of the daemon.
        let mut words = vec!["-f".to_owned(), "-p".to_owned(), node.port.to_string()];
        words.extend(["-b", "127.0.0.1", "-y", "127.0.0.1", "-z"].map(str::to_owned));
        words.push(node.zone.to_string());
        words.extend(["-j".to_owned(), format!("size={}M", JOURNAL_BYTES >> 20)]);
        if self.is_voting {
            words.extend(["-i".to_owned(), format!("host=127.0.0.1,port={}", node.peer_port)]);
            words.extend(["--join".to_owned(), format!("127.0.0.1:{}", self.nodes[0].peer_port)]);
        } else {
            words.extend(["-c".to_owned(), self.driver_argument()]);
        }
        // The conventional port is the machine's, not a test's.
        words.extend(["--nbd", "none"].map(str::to_owned));
        words.extend(node.extra.iter().cloned());
        words.push(node.store.display().to_string());
        let mut command = self.sheep_command();
        let stderr = fs::OpenOptions::new().create(true).append(true).open(&node.stderr)?;
        command.args(words).stdin(Stdio::null()).stdout(stderr.try_clone()?).stderr(stderr);
        let child = command.spawn().with_context(|| format!("cannot start {}", self.sheep.display()))?;
        self.nodes[index].child = Some(child);
        Ok(())
    }

    /// `sheep` without arguments, tied to the life of this thread where the machine has `setpriv`.
    pub fn sheep_command(&self) -> Command {
        match &self.setpriv {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                command.args(["--pdeathsig", "KILL", "--"]).arg(&self.sheep);
                command
            }
            None => Command::new(&self.sheep),
        }
    }

    fn start_new(&mut self, index: usize) -> Result<()> {
        const ATTEMPTS_MAX: usize = 5;
        for attempt in 1.. {
            self.launch(index)?;
            match self.wait_serving(index) {
                Ok(()) => break,
                // Somebody may have taken the port since it was found free: only then is another try worth it.
                Err(_) if attempt < ATTEMPTS_MAX && self.lost_its_port(index) => {
                    self.nodes[index].port = free_port()?;
                }
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }

    fn lost_its_port(&self, index: usize) -> bool {
        let log = self.nodes[index].log();
        self.nodes[index].child.is_none() && (log.contains("in use") || log.contains("already listens"))
    }

    /// Waits until node `index` answers; fails at once, with its log, when the process ends instead.
    pub fn wait_serving(&mut self, index: usize) -> Result<()> {
        let started = Instant::now();
        loop {
            let node = &mut self.nodes[index];
            let child = node.child.as_mut().context("the node was not started")?;
            if let Some(status) = child.try_wait()? {
                node.child = None;
                bail!("node {index} ended with {status} instead of serving\n{}", node.log());
            }
            if Client::tcp(node.port).and_then(|mut client| client.node_count()).is_ok() {
                return Ok(());
            }
            ensure!(started.elapsed() < START_DEADLINE, "node {index} does not serve\n{}", node.log());
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Waits until every node lists all of them, which are not in a cluster yet.
    fn wait_acquainted(&self) -> Result<()> {
        let count = self.nodes.len();
        self.wait_until(&format!("{count} nodes listed everywhere"), START_DEADLINE, |cluster| {
            let lists = |index: usize| -> Result<bool> {
                let said = cluster.dog_through(index, &["node", "list", "--json"], &[])?.ok()?;
                let listed: serde_json::Value = serde_json::from_slice(&said.stdout)?;
                Ok(listed.get("nodes").unwrap_or(&listed).as_array().is_some_and(|nodes| nodes.len() == count))
            };
            (0..count).try_fold(true, |all, index| Ok(all && lists(index)?))
        })
    }

    /// Waits until every running node sees exactly `count` members.
    pub fn wait_members(&self, count: usize) -> Result<()> {
        self.wait_until(&format!("{count} members everywhere"), START_DEADLINE, |cluster| {
            for node in cluster.nodes.iter().filter(|node| node.child.is_some()) {
                if Client::tcp(node.port).and_then(|mut client| client.node_count()).ok() != Some(count) {
                    return Ok(false);
                }
            }
            Ok(true)
        })
    }

    /// Waits until the cluster runs: formatted, and the members it needs are back.
    pub fn wait_running(&self) -> Result<()> {
        self.wait_until("a running cluster", START_DEADLINE, |cluster| {
            Ok(cluster.dog(&["cluster", "info"])?.out().contains("running"))
        })
    }

    /// Waits until no node recovers, seen several times in a row: between two steps of a recovery there may be a gap.
    pub fn wait_recovered(&self) -> Result<()> {
        let mut idle_count = 0;
        self.wait_until("the end of recovery", Duration::from_mins(3), |cluster| {
            let listed = cluster.dog(&["node", "recovery"])?.ok()?;
            idle_count = if listed.out().lines().count() == 2 { idle_count + 1 } else { 0 };
            Ok(idle_count >= 3)
        })
    }

    /// Polls `condition` until it holds; `what` names it when `deadline` passes first.
    pub fn wait_until(
        &self,
        what: &str,
        deadline: Duration,
        mut condition: impl FnMut(&Cluster) -> Result<bool>,
    ) -> Result<()> {
        let started = Instant::now();
        while !condition(self)? {
            ensure!(started.elapsed() < deadline, "waited {deadline:.0?} for {what}, in vain");
            std::thread::sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Kills node `index` with signal 9 and waits for its end.
    pub fn kill(&mut self, index: usize) -> Result<()> {
        self.kill_together(&[index])
    }

    /// Kills several nodes with signal 9, all before waiting for any.
    pub fn kill_together(&mut self, indexes: &[usize]) -> Result<()> {
        for &index in indexes {
            self.nodes[index].child.as_mut().with_context(|| format!("node {index} is not running"))?.kill()?;
        }
        for &index in indexes {
            if let Some(mut child) = self.nodes[index].child.take() {
                child.wait()?;
            }
        }
        Ok(())
    }

    /// Asks node `index` to leave (SIGTERM) and gives its exit code.
    pub fn terminate(&mut self, index: usize) -> Result<Option<i32>> {
        let pid = self.nodes[index].pid().with_context(|| format!("node {index} is not running"))?;
        let pid = Pid::from_raw(pid as i32).context("process id 0")?;
        rustix::process::kill_process(pid, Signal::TERM)?;
        self.wait_exit(index)
    }

    /// Waits until node `index` has ended by itself and gives its exit code.
    pub fn wait_exit(&mut self, index: usize) -> Result<Option<i32>> {
        let started = Instant::now();
        let node = &mut self.nodes[index];
        let child = node.child.as_mut().context("the node is not running")?;
        loop {
            if let Some(status) = child.try_wait()? {
                node.child = None;
                return Ok(status.code());
            }
            if started.elapsed() > START_DEADLINE {
                bail!("node {index} does not end\n{}", node.log());
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Fails unless every node that was not stopped by the test still runs, and no log tells of a panic.
    pub fn check_health(&mut self) -> Result<()> {
        for (index, node) in self.nodes.iter_mut().enumerate() {
            if let Some(child) = node.child.as_mut()
                && let Some(status) = child.try_wait()?
            {
                bail!("node {index} died on the way: {status}\n{}", node.log());
            }
            let log = node.log();
            if let Some(line) = log.lines().find(|line| line.contains("panicked")) {
                bail!("node {index} panicked: {line}");
            }
        }
        Ok(())
    }

    /// The end of a test that passed: checks the health of all nodes, then ends them.
    pub fn finish(mut self) -> Result<()> {
        self.check_health()?;
        self.finished = true;
        Ok(())
    }

    fn show_logs(&self) {
        const TAIL_LINES: usize = 40;
        for (index, node) in self.nodes.iter().enumerate() {
            let log = node.log();
            let lines: Vec<&str> = log.lines().collect();
            let tail = &lines[lines.len().saturating_sub(TAIL_LINES)..];
            eprintln!("--- last lines of node {index} ({}):\n{}", node.store.display(), tail.join("\n"));
        }
    }
}

impl Drop for Cluster {
    fn drop(&mut self) {
        if !self.finished {
            self.show_logs();
        }
        // All first, then wait: nodes that see each other die one by one would start to recover.
        for node in &mut self.nodes {
            if let Some(child) = node.child.as_mut() {
                let _ = child.kill();
            }
        }
        for node in &mut self.nodes {
            if let Some(mut child) = node.child.take() {
                let _ = child.wait();
            }
        }
    }
}
