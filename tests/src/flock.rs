//! Real `sheep` processes on the hosts of a [`Network`], each started with its directory only.
//!
//! Node `index` runs on host `index`. `dog` runs on the host of the node that it asks, over loopback, so it works whatever
//! the network does to that host; clients use the unix socket in the store.
//!
//! Always holds:
//! 1. Processes end with the [`Flock`], by their ids, and are waited for; paused ones too. If the test program itself is
//!    killed, the kernel ends them. Nodes must be started by the thread that lives as long as the test.
//! 2. [`Flock::finish`] fails if a process that should live has died, or if any log tells of a panic.
//!
//! A flock that is dropped without `finish` belongs to a failed test: the tails of its logs go to standard error.

use std::fs;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;
use tempfile::TempDir;

use crate::clients::{Client, Request, opcode};
use crate::command::{self, Finished};
use crate::namespaces::Network;
use crate::spawn::{DOG_DEADLINE, START_DEADLINE, binary};

/// The port for clients, of every node: each has its host to itself.
pub const CLIENT_PORT: u16 = 7000;
/// The port for other nodes, TCP and UDP.
pub const NODE_PORT: u16 = 7010;
/// A question to a node that answers at all.
const QUESTION_DEADLINE: Duration = Duration::from_secs(15);

/// How the nodes of a flock find each other.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Driver {
    /// Nothing said: the default driver.
    Default,
    /// A shared directory, which no partition touches: to try out the harness.
    Local,
}

struct Node {
    store: PathBuf,
    stderr: PathBuf,
    /// Given at every start.
    extra: Vec<String>,
    child: Option<Child>,
    is_paused: bool,
}

/// A row of `dog node list --json`.
#[derive(Clone, PartialEq, Eq, Debug, Default)]
pub struct Row {
    /// The node's id, in whatever form `dog` takes it.
    pub id: String,
    /// Where it can be reached.
    pub address: String,
    /// `member`, `asking` or `acquainted`.
    pub state: String,
    /// Of its certificate.
    pub fingerprint: String,
}

/// What `dog cluster info --json` says.
#[derive(Clone, PartialEq, Debug, Default)]
pub struct Info {
    /// `running`, `unformatted`, `waiting`, `fenced`, ...
    pub status: String,
    /// As it must be typed.
    pub cluster_id: String,
    /// The current epoch.
    pub epoch: u64,
    /// Ids.
    pub members: Vec<String>,
    /// Ids.
    pub voters: Vec<String>,
    /// Id.
    pub leader: Option<String>,
    /// Who is not there.
    pub missing: Vec<String>,
}

/// A number or a text, as text.
fn text(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        Value::Null => String::new(),
        other => other.to_string(),
    }
}

fn is_warning(line: &str) -> bool {
    line.contains(" WARN [") || line.contains(" ERROR [")
}

/// The ids of a list of ids, or of a list of objects that have one.
fn ids(value: &Value) -> Vec<String> {
    let each = |value: &Value| text(value.get("id").unwrap_or(value));
    value.as_array().map(|list| list.iter().map(each).collect()).unwrap_or_default()
}

/// A network with nodes on its hosts; see the top of this file.
pub struct Flock {
    sheep: PathBuf,
    dog: PathBuf,
    setpriv: Option<PathBuf>,
    nodes: Vec<Node>,
    driver: Driver,
    log_level: Option<&'static str>,
    finished: bool,
    scratch: TempDir,
    /// The hosts. Goes after the processes.
    pub network: Network,
}

impl Flock {
    /// A node for each host of a network; none is started yet.
    pub fn on(network: Network, driver: Driver) -> Result<Flock> {
        let scratch = tempfile::Builder::new().prefix("sheep-test-").tempdir()?;
        fs::create_dir(scratch.path().join("local"))?;
        let mut flock = Flock {
            sheep: binary("sheep")?,
            dog: binary("dog")?,
            setpriv: command::find_program("setpriv"),
            nodes: Vec::new(),
            driver,
            log_level: Some("debug"),
            finished: false,
            scratch,
            network,
        };
        for _ in 0..flock.network.host_count() {
            flock.add_node();
        }
        Ok(flock)
    }

    /// `count` nodes on one bridge, started, listing each other, not formatted.
    pub fn acquainted(count: usize) -> Result<Flock> {
        let mut flock = Flock::on(Network::new(count)?, Driver::Default)?;
        flock.start_all()?;
        flock.wait_listed(count)?;
        Ok(flock)
    }

    /// [`Flock::acquainted`], then `dog cluster format -c copies`.
    pub fn formatted(count: usize, copies: usize) -> Result<Flock> {
        let flock = Flock::acquainted(count)?;
        flock.format(0, &["-c", &copies.to_string()])?;
        flock.wait_members(count)?;
        Ok(flock)
    }

    fn add_node(&mut self) {
        let number = self.nodes.len() + 1;
        self.nodes.push(Node {
            store: self.scratch.path().join(format!("n{number}")),
            stderr: self.scratch.path().join(format!("n{number}.stderr")),
            extra: Vec::new(),
            child: None,
            is_paused: false,
        });
    }

    /// One more host with a node that is not started yet.
    pub fn add(&mut self) -> Result<usize> {
        self.network.add_host()?;
        self.add_node();
        Ok(self.nodes.len() - 1)
    }

    /// Says less in the logs: for measurements.
    pub fn quiet(&mut self) {
        self.log_level = None;
    }

    /// Where the store of node `index` lies, which was never started.
    pub fn place(&mut self, index: usize, store: PathBuf) {
        self.nodes[index].store = store;
    }

    /// What node `index` is started with besides its directory, from its next start on.
    pub fn set_arguments(&mut self, index: usize, arguments: &[&str]) {
        self.nodes[index].extra = arguments.iter().map(|&word| word.to_owned()).collect();
    }

    /// How many nodes there are, running or not.
    pub fn count(&self) -> usize {
        self.nodes.len()
    }

    /// A directory for the test's own files.
    pub fn scratch(&self) -> &Path {
        self.scratch.path()
    }

    /// The store of node `index`.
    pub fn store(&self, index: usize) -> &Path {
        &self.nodes[index].store
    }

    /// The socket for clients of node `index`.
    pub fn socket(&self, index: usize) -> PathBuf {
        self.nodes[index].store.join("sock")
    }

    /// The sockets of nodes.
    pub fn sockets(&self, nodes: impl IntoIterator<Item = usize>) -> Vec<PathBuf> {
        nodes.into_iter().map(|index| self.socket(index)).collect()
    }

    /// The process id while the node runs.
    pub fn pid(&self, index: usize) -> Option<u32> {
        self.nodes[index].child.as_ref().map(Child::id)
    }

    /// The log of node `index`, and what went to standard error.
    pub fn log(&self, index: usize) -> String {
        let read = |path: &Path| String::from_utf8_lossy(&fs::read(path).unwrap_or_default()).into_owned();
        read(&self.nodes[index].store.join("sheep.log")) + &read(&self.nodes[index].stderr)
    }

    /// What node `index` said last on its standard error: why it ended, if it did.
    pub fn last_words(&self, index: usize) -> String {
        let said = fs::read(&self.nodes[index].stderr).unwrap_or_default();
        String::from_utf8_lossy(&said).lines().last().unwrap_or_default().to_owned()
    }

    /// The warnings and errors in the log of node `index` that name any of these words.
    pub fn warnings(&self, index: usize, words: &[&str]) -> Vec<String> {
        let log = self.log(index);
        let warnings = log.lines().filter(|line| is_warning(line));
        warnings.filter(|line| words.iter().any(|word| line.contains(word))).map(str::to_owned).collect()
    }

    /// The nodes that run and are not paused.
    pub fn running(&self) -> Vec<usize> {
        let is_running = |node: &Node| node.child.is_some() && !node.is_paused;
        (0..self.nodes.len()).filter(|&index| is_running(&self.nodes[index])).collect()
    }

    /// A connection to node `index`.
    pub fn client(&self, index: usize) -> Result<Client> {
        Client::unix(&self.socket(index))
    }

    /// Starts node `index` and does not wait.
    pub fn launch(&mut self, index: usize) -> Result<()> {
        let arguments = self.nodes[index].extra.clone();
        let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
        self.launch_with(index, &arguments)
    }

    /// Starts node `index` with arguments for this time only, and does not wait.
    pub fn launch_with(&mut self, index: usize, arguments: &[&str]) -> Result<()> {
        let node = &self.nodes[index];
        ensure!(node.child.is_none(), "node {index} is running already");
        let stderr = fs::OpenOptions::new().create(true).append(true).open(&node.stderr)?;
        // Each becomes the next, so that the id of the child is the id of the daemon.
        let mut command = match &self.setpriv {
            Some(setpriv) => {
                let mut command = Command::new(setpriv);
                let enter = self.network.on_host(index);
                command.args(["--pdeathsig", "KILL", "--"]).arg(enter.get_program()).args(enter.get_args());
                command
            }
            None => self.network.on_host(index),
        };
        command.arg(&self.sheep).arg("-f");
        if let Some(level) = self.log_level {
            command.args(["-l", &format!("level={level}")]);
        }
        if self.driver == Driver::Local {
            let directory = self.scratch.path().join("local");
            command.args(["-c", &format!("local:{}", directory.display())]);
            command.args(["-y", &self.network.address(index).to_string(), "-z", &(index + 1).to_string()]);
        }
        command.args(arguments).arg(&node.store);
        command.stdin(Stdio::null()).stdout(stderr.try_clone()?).stderr(stderr);
        // What is typed at the terminal concerns the test, which ends its nodes itself.
        command.process_group(0);
        let child = command.spawn().with_context(|| format!("cannot start {}", self.sheep.display()))?;
        self.nodes[index].child = Some(child);
        Ok(())
    }

    /// Starts node `index` and waits until it answers.
    pub fn start(&mut self, index: usize) -> Result<()> {
        self.launch(index)?;
        self.wait_serving(index)
    }

    /// Starts these nodes at once and waits until all of them answer.
    pub fn start_together(&mut self, indexes: &[usize]) -> Result<()> {
        for &index in indexes {
            self.launch(index)?;
        }
        for &index in indexes {
            self.wait_serving(index)?;
        }
        Ok(())
    }

    /// Starts all nodes at once and waits until all of them answer.
    pub fn start_all(&mut self) -> Result<()> {
        let all: Vec<usize> = (0..self.nodes.len()).collect();
        self.start_together(&all)
    }

    /// Waits until node `index` answers; fails at once, with its log, when the process ends instead.
    pub fn wait_serving(&mut self, index: usize) -> Result<()> {
        let started = Instant::now();
        loop {
            let status = self.nodes[index].child.as_mut().context("the node was not started")?.try_wait()?;
            if let Some(status) = status {
                self.nodes[index].child = None;
                bail!("node {index} ended with {status} instead of serving\n{}", self.log(index));
            }
            if self.client(index).and_then(|mut client| client.node_count()).is_ok() {
                return Ok(());
            }
            ensure!(started.elapsed() < START_DEADLINE, "node {index} does not serve\n{}", self.log(index));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Runs `dog` on the host of node `index`.
    pub fn dog(&self, index: usize, arguments: &[&str]) -> Result<Finished> {
        self.dog_with(index, arguments, &[], DOG_DEADLINE)
    }

    /// Runs `dog` on the host of node `index` with something on its standard input.
    pub fn dog_with(&self, index: usize, arguments: &[&str], input: &[u8], deadline: Duration) -> Result<Finished> {
        let mut command = self.network.on_host(index);
        command.arg(&self.dog).args(arguments);
        command.env_remove("SHEEPDOG_DOG_ADDR").env_remove("SHEEPDOG_DOG_PORT").env("TZ", "UTC");
        command::run_with_input(&mut command, input, deadline)
    }

    fn dog_json(&self, index: usize, arguments: &[&str]) -> Result<Value> {
        let answered = self.dog_with(index, arguments, &[], QUESTION_DEADLINE)?.ok()?;
        serde_json::from_slice(&answered.stdout).with_context(|| format!("no JSON: {answered}"))
    }

    /// `dog cluster format` through node `index`, with these arguments.
    pub fn format(&self, index: usize, arguments: &[&str]) -> Result<()> {
        self.dog(index, &[&["cluster", "format"], arguments].concat())?.ok()?;
        self.wait_status("running", &[index])
    }

    /// The nodes as node `index` lists them.
    pub fn rows(&self, index: usize) -> Result<Vec<Row>> {
        let listed = self.dog_json(index, &["node", "list", "--json"])?;
        let rows = listed.get("nodes").unwrap_or(&listed).as_array().context("no list of nodes")?;
        let field = |row: &Value, name: &str| row.get(name).map(text).unwrap_or_default();
        let read = |row: &Value| Row {
            id: field(row, "id"),
            address: field(row, "address"),
            state: field(row, "state"),
            fingerprint: field(row, "fingerprint"),
        };
        Ok(rows.iter().map(read).collect())
    }

    /// The row of node `of` as node `index` lists it, found by its address.
    pub fn row(&self, index: usize, of: usize) -> Result<Row> {
        let rows = self.rows(index)?;
        let found = rows.iter().find(|row| self.network.host_at(&row.address) == Some(of));
        found.cloned().with_context(|| format!("node {index} does not list node {of}: {rows:?}"))
    }

    /// How many nodes in each state node `index` lists.
    pub fn count_in(&self, index: usize, state: &str) -> Result<usize> {
        Ok(self.rows(index)?.iter().filter(|row| row.state == state).count())
    }

    /// The state of the cluster as node `index` has it.
    pub fn info(&self, index: usize) -> Result<Info> {
        let said = self.dog_json(index, &["cluster", "info", "--json"])?;
        let field = |name: &str| said.get(name).cloned().unwrap_or(Value::Null);
        let leader = field("leader");
        Ok(Info {
            status: text(&field("status")),
            cluster_id: text(&field("cluster_id")),
            epoch: field("epoch").as_u64().unwrap_or(0),
            members: ids(&field("members")),
            voters: ids(&field("voters")),
            leader: (!leader.is_null()).then(|| text(leader.get("id").unwrap_or(&leader))),
            missing: ids(&field("missing")),
        })
    }

    /// The node that leads the log, as node `index` has it; waits until there is one.
    pub fn leader(&self, index: usize) -> Result<usize> {
        let mut found = None;
        self.wait_until("a leader", START_DEADLINE, |flock| {
            let Some(leader) = flock.info(index)?.leader else { return Ok(false) };
            let rows = flock.rows(index)?;
            let row = rows.iter().find(|row| row.id == leader);
            found = row.and_then(|row| flock.network.host_at(&row.address));
            Ok(found.is_some())
        })?;
        found.context("a leader that no host is")
    }

    /// Waits until every running node lists exactly `count` nodes, in whatever state.
    pub fn wait_listed(&self, count: usize) -> Result<()> {
        self.wait_until(&format!("{count} nodes listed everywhere"), START_DEADLINE, |flock| {
            let lists = |index: &usize| flock.rows(*index).is_ok_and(|rows| rows.len() == count);
            Ok(flock.running().iter().all(lists))
        })
    }

    /// Waits until every running node sees exactly `count` members.
    pub fn wait_members(&self, count: usize) -> Result<()> {
        self.wait_members_of(&self.running(), count)
    }

    /// Waits until each of these nodes sees exactly `count` members.
    pub fn wait_members_of(&self, nodes: &[usize], count: usize) -> Result<()> {
        self.wait_until(&format!("{count} members as nodes {nodes:?} see it"), START_DEADLINE, |flock| {
            let sees = |index: &usize| {
                let mut client = flock.client(*index).ok()?;
                client.set_deadline(QUESTION_DEADLINE).ok()?;
                client.node_count().ok()
            };
            Ok(nodes.iter().all(|index| sees(index) == Some(count)))
        })
    }

    /// Waits until `dog cluster info` on each of these nodes has this status.
    pub fn wait_status(&self, status: &str, nodes: &[usize]) -> Result<()> {
        self.wait_until(&format!("{status} as nodes {nodes:?} see it"), START_DEADLINE, |flock| {
            let has = |index: &usize| match flock.driver {
                Driver::Default => flock.info(*index).is_ok_and(|info| info.status == status),
                Driver::Local => {
                    flock.dog(*index, &["cluster", "info"]).is_ok_and(|answer| answer.out().contains(status))
                }
            };
            Ok(nodes.iter().all(has))
        })
    }

    /// Whether node `index` still fetches copies, asked over its own socket: `dog node recovery` goes to every node.
    fn is_recovering(&self, index: usize) -> Result<bool> {
        const RECOVERY_STAT_BYTES: u32 = 24;
        let mut client = self.client(index)?;
        client.set_deadline(QUESTION_DEADLINE)?;
        let answer = client.call(Request::new(opcode::STAT_RECOVERY).length(RECOVERY_STAT_BYTES), &[])?;
        Ok(answer.success("state of the recovery")?.data.first() != Some(&0))
    }

    /// Whether every node answers, sees all of them as members, and fetches nothing.
    pub fn is_whole(&self) -> Result<bool> {
        for index in 0..self.count() {
            let mut client = self.client(index)?;
            client.set_deadline(QUESTION_DEADLINE)?;
            if client.node_count()? != self.count() || self.is_recovering(index)? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Waits until no running node recovers, seen several times in a row: between two steps of a recovery there may be a
    /// gap.
    pub fn wait_recovered(&self) -> Result<()> {
        let mut idle_count = 0;
        self.wait_until("the end of recovery", Duration::from_mins(3), |flock| {
            for index in flock.running() {
                if flock.is_recovering(index)? {
                    idle_count = 0;
                    return Ok(false);
                }
            }
            idle_count += 1;
            Ok(idle_count >= 3)
        })
    }

    /// Polls `condition` until it holds; an error of it counts as not yet, and is told when `deadline` has passed.
    pub fn wait_until(
        &self,
        what: &str,
        deadline: Duration,
        mut condition: impl FnMut(&Flock) -> Result<bool>,
    ) -> Result<()> {
        let started = Instant::now();
        loop {
            let found = condition(self);
            if matches!(found, Ok(true)) {
                return Ok(());
            }
            if started.elapsed() > deadline {
                let error = found.err().map(|error| format!("; last: {error:#}")).unwrap_or_default();
                bail!("waited {deadline:.0?} for {what}, in vain{error}\n{}", self.views().join("\n"));
            }
            std::thread::sleep(Duration::from_millis(50));
        }
    }

    /// What every running node thinks of the cluster, for messages.
    pub fn views(&self) -> Vec<String> {
        self.running().iter().map(|index| format!("node {index}: {}", self.view(*index))).collect()
    }

    /// What a node thinks of the cluster, for messages.
    fn view(&self, index: usize) -> String {
        let ask = |words: &[&str]| match self.dog_with(index, words, &[], QUESTION_DEADLINE) {
            Ok(answer) => answer.out() + &answer.err(),
            Err(error) => format!("{error:#}"),
        };
        ask(&["cluster", "info"]) + &ask(&["node", "list"])
    }

    /// Kills nodes with signal 9, all before waiting for any.
    pub fn kill(&mut self, indexes: &[usize]) -> Result<()> {
        for &index in indexes {
            self.nodes[index].child.as_mut().with_context(|| format!("node {index} is not running"))?.kill()?;
        }
        for &index in indexes {
            self.nodes[index].is_paused = false;
            if let Some(mut child) = self.nodes[index].child.take() {
                child.wait()?;
            }
        }
        Ok(())
    }

    fn signal(&self, index: usize, signal: Signal) -> Result<()> {
        let pid = self.pid(index).with_context(|| format!("node {index} is not running"))?;
        Ok(kill_process(Pid::from_raw(pid as i32).context("process id 0")?, signal)?)
    }

    /// Pauses the process of node `index`, in the middle of whatever it does.
    pub fn pause(&mut self, index: usize) -> Result<()> {
        self.signal(index, Signal::STOP)?;
        self.nodes[index].is_paused = true;
        Ok(())
    }

    /// Lets it go on.
    pub fn resume(&mut self, index: usize) -> Result<()> {
        self.signal(index, Signal::CONT)?;
        self.nodes[index].is_paused = false;
        Ok(())
    }

    /// Asks node `index` to leave (SIGTERM) and gives its exit code.
    pub fn terminate(&mut self, index: usize) -> Result<Option<i32>> {
        self.signal(index, Signal::TERM)?;
        self.wait_exit(index)
    }

    /// Asks node `index` to leave and does not wait.
    pub fn ask_to_leave(&self, index: usize) -> Result<()> {
        self.signal(index, Signal::TERM)
    }

    /// Waits until node `index` has ended by itself and gives its exit code.
    pub fn wait_exit(&mut self, index: usize) -> Result<Option<i32>> {
        let started = Instant::now();
        loop {
            if let Some(code) = self.has_ended(index)? {
                return Ok(code);
            }
            ensure!(started.elapsed() < START_DEADLINE, "node {index} does not end\n{}", self.log(index));
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// The exit code of node `index` if it has ended by itself; `None` while it runs.
    pub fn has_ended(&mut self, index: usize) -> Result<Option<Option<i32>>> {
        let child = self.nodes[index].child.as_mut().context("the node is not running")?;
        let status = child.try_wait()?;
        if status.is_some() {
            self.nodes[index].child = None;
        }
        Ok(status.map(|status| status.code()))
    }

    /// Takes the whole store of a node that does not run away.
    pub fn wipe(&mut self, index: usize) -> Result<()> {
        ensure!(self.nodes[index].child.is_none(), "node {index} is running");
        Ok(fs::remove_dir_all(&self.nodes[index].store)?)
    }

    /// Fails unless every node that was not stopped by the test still runs, and no log tells of a panic.
    pub fn check_health(&mut self) -> Result<()> {
        for index in 0..self.nodes.len() {
            if self.nodes[index].child.is_some()
                && let Some(code) = self.has_ended(index)?
            {
                bail!("node {index} died on the way: {code:?}\n{}", self.log(index));
            }
            if let Some(line) = self.log(index).lines().find(|line| line.contains("panicked")) {
                bail!("node {index} panicked: {line}");
            }
        }
        Ok(())
    }

    /// The end of a test whose failures are told in another way: ends all nodes, paused ones too.
    pub fn end(mut self) {
        self.finished = true;
    }

    /// The end of a test that passed: checks the health of all nodes, then ends them.
    pub fn finish(mut self) -> Result<()> {
        self.check_health()?;
        self.finished = true;
        Ok(())
    }

    fn show_logs(&self) {
        const TAIL_LINES: usize = 60;
        for (index, node) in self.nodes.iter().enumerate() {
            let log = self.log(index);
            // Everything important, and the end.
            let lines: Vec<&str> = log.lines().collect();
            let (before, tail) = lines.split_at(lines.len().saturating_sub(TAIL_LINES));
            let notable: Vec<&str> = before.iter().copied().filter(|line| is_warning(line)).collect();
            let notable = &notable[notable.len().saturating_sub(TAIL_LINES)..];
            eprintln!(
                "--- node {index} ({}), warnings before the end:\n{}\n--- its last lines:\n{}",
                node.store.display(),
                notable.join("\n"),
                tail.join("\n")
            );
        }
    }
}

impl Drop for Flock {
    fn drop(&mut self) {
        if !self.finished {
            self.show_logs();
            if std::env::var_os("SHEEP_TEST_KEEP").is_some() {
                eprintln!("--- the stores stay in {}", self.scratch.path().display());
                self.scratch.disable_cleanup(true);
            }
        }
        // All first, then wait: nodes that see each other die one by one would start to recover. Signal 9 ends paused
        // ones too.
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
