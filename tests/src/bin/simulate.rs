//! Runs simulated clusters, one for each seed, and tells which promises were broken.
//!
//! `simulate --seed N` replays one, `simulate --seeds COUNT [--from N]` runs many, each in a process of its own: nothing that
//! a library keeps for the life of a process passes from one seed to the next, and a node that panics ends one run only.

use std::fmt;
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, Result};
use clap::Parser;
use tests::sim::{cluster, entropy, trial};
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

#[derive(Parser)]
#[command(about = "Simulates clusters: faults, guests and their answers all follow from a seed")]
struct Options {
    /// Runs one seed.
    #[arg(long, conflicts_with = "seeds")]
    seed: Option<u64>,
    /// Runs so many seeds.
    #[arg(long, required_unless_present_any = ["seed", "self_test"])]
    seeds: Option<u64>,
    /// The first of them.
    #[arg(long, default_value_t = 0)]
    from: u64,
    /// Processes side by side.
    #[arg(long, default_value_t = 1)]
    jobs: u64,
    /// With --seed: what the nodes log.
    #[arg(short, long)]
    verbose: bool,
    /// Plants one bug after the other and tells how many seeds it takes to find it. Needs `--features planted-bugs`.
    #[arg(long, conflicts_with = "seed")]
    self_test: bool,
    /// With this bug planted. Needs `--features planted-bugs`.
    #[arg(long)]
    plant: Option<String>,
    /// Only seeds that have more of this than others; the others are counted all the same.
    #[arg(long, conflicts_with = "seed")]
    only: Option<trial::Emphasis>,
    /// With --seed: leaves these faults out, by their place in the schedule.
    #[arg(long, value_delimiter = ',')]
    without: Vec<usize>,
    /// With --seed: so many guests, whatever the seed says.
    #[arg(long)]
    guests: Option<u32>,
    /// Without volumes that come and go, and without changes of the machines.
    #[arg(long)]
    plain: bool,
    /// With --seed: finds fewer faults and guests that break the same promise.
    #[arg(long)]
    shrink: bool,
    /// With --seed: only the line that a run of many seeds reads.
    #[arg(long, hide = true)]
    brief: bool,
}

/// Simulated time and machine before each line.
struct Line;

impl<S, N> FormatEvent<S, N> for Line
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &tracing::Event<'_>,
    ) -> fmt::Result {
        let (now_ms, host) = cluster::shown();
        write!(writer, "{:>9.3} ", now_ms as f64 / 1e3)?;
        match host {
            Some(host) => write!(writer, "node {host} ")?,
            None => write!(writer, "       ")?,
        }
        write!(writer, "{} [{}] ", event.metadata().level(), event.metadata().target())?;
        context.field_format().format_fields(writer.by_ref(), event)?;
        writeln!(writer)
    }
}

fn main() -> ExitCode {
    let options = Options::parse();
    if options.verbose {
        let filter = std::env::var("SIMULATE_LOG").unwrap_or_else(|_| "info,openraft=error".to_owned());
        tracing_subscriber::fmt()
            .event_format(Line)
            .with_env_filter(tracing_subscriber::EnvFilter::new(filter))
            .with_writer(std::io::stderr)
            .init();
    }
    if let Some(name) = &options.plant
        && let Err(error) = plant(name)
    {
        eprintln!("{error:#}");
        return ExitCode::FAILURE;
    }
    let result = match (options.seed, options.seeds) {
        (Some(seed), _) if options.shrink => shrink(seed, &options),
        (Some(seed), _) => Ok(one(seed, &options)),
        (None, _) if options.self_test => self_test(&options),
        (None, _) => many(&options),
    };
    match result {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("{error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs one seed in this process. Gives the number of violations.
fn one(seed: u64, options: &Options) -> usize {
    let (is_brief, is_plain) = (options.brief, options.plain);
    let (without, guests) = (options.without.clone(), options.guests);
    // A node that panics is a violation, whichever of its tasks it was: no runtime may hide it.
    let show = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        if sheep::world::panics::is_contained() {
            return;
        }
        let (now_ms, host) = cluster::shown();
        eprintln!("at {now_ms} ms, node {host:?}:");
        show(panic);
        std::process::abort();
    }));
    let work = move || {
        entropy::seed(seed);
        let mut plan = if is_plain { trial::Plan::plain(seed) } else { trial::Plan::draw(seed) };
        plan.guests = guests.unwrap_or(plan.guests);
        let faults = plan.faults.into_iter().enumerate();
        plan.faults = faults.filter(|(index, _)| !without.contains(index)).map(|(_, fault)| fault).collect();
        if !is_brief {
            println!("{plan:#?}");
        }
        trial::run(&plan)
    };
    // A thread that has asked for no randomness yet, with no more stack than a node's threads have, unless nothing is optimized.
    let stack_bytes = if cfg!(debug_assertions) { 16 << 20 } else { 2 << 20 };
    let thread = std::thread::Builder::new().stack_size(stack_bytes).spawn(work);
    let began = Instant::now();
    let report = match thread.map(std::thread::JoinHandle::join) {
        Ok(Ok(report)) => report,
        Ok(Err(_)) => return 1,
        Err(error) => {
            eprintln!("cannot start a thread: {error}");
            return 1;
        }
    };
    for violation in &report.violations {
        println!("violation: {violation}");
    }
    let [writes, reads, unknown] = report.operations;
    if !is_brief {
        let real = began.elapsed().as_secs_f64();
        println!(
            "{writes} writes, {reads} reads, {unknown} writes with unknown outcome, {} epochs, {} processes ended, {} \
             deliveries; {:.1} simulated seconds in {real:.1} s",
            report.epochs,
            report.ends,
            report.deliveries,
            report.simulated_ms as f64 / 1e3
        );
    }
    let hits = sheep::world::marks::hits();
    if !hits.is_empty() {
        let all: Vec<String> = hits.iter().map(|(mark, count)| format!("{mark:?}={count}")).collect();
        println!("marks {}", all.join(" "));
    }
    println!(
        "seed {seed}: trace {:016x} simulated_ms {} operations {} violations {}",
        report.trace,
        report.simulated_ms,
        writes + reads + unknown,
        report.violations.len()
    );
    report.violations.len()
}

/// Runs many seeds, each in a process of its own. Gives the number of seeds that broke something.
fn many(options: &Options) -> Result<usize> {
    let (from, count, jobs) = (options.from, options.seeds.unwrap_or(1), options.jobs.max(1));
    let began = Instant::now();
    let program = std::env::current_exe().context("where this program is")?;
    let mut running = std::collections::VecDeque::new();
    let (mut next, mut done, mut bad, mut simulated_ms) = (from, 0_u64, 0_usize, 0_u64);
    let mut marks = Marks::default();
    while done < count {
        while next < from + count && (running.len() as u64) < jobs {
            if !is_wanted(next, options) {
                next += 1;
                done += 1;
                continue;
            }
            let child = Command::new(&program)
                .args(["--seed", &next.to_string(), "--brief"])
                .args(options.plain.then_some("--plain"))
                .args(options.plant.iter().flat_map(|bug| ["--plant", bug]))
                .stdin(Stdio::null())
                .stdout(Stdio::piped())
                .stderr(Stdio::piped())
                .spawn()
                .context("cannot start a run")?;
            running.push_back((next, child));
            next += 1;
        }
        let Some((seed, child)) = running.pop_front() else { break };
        let output = child.wait_with_output().context("a run was lost")?;
        done += 1;
        let text = String::from_utf8_lossy(&output.stdout);
        if let Some(ms) = field(&text, "simulated_ms") {
            simulated_ms += ms;
        }
        marks.add(&text);
        if !output.status.success() {
            bad += 1;
            print!(
                "{}",
                text.lines()
                    .filter(|line| line.starts_with("violation"))
                    .fold(String::new(), |all, line| all + line + "\n")
            );
            if field(&text, "violations").is_none() {
                let said = String::from_utf8_lossy(&output.stderr);
                println!(
                    "violation: the simulation ended with {}: {}",
                    output.status,
                    said.lines().take(6).collect::<Vec<_>>().join(" | ")
                );
            }
            println!("replay: cargo run --release -p tests --bin simulate -- --seed {seed}");
        }
        if done.is_multiple_of(25) {
            println!("{done} of {count} seeds, {bad} violations, {:.0} s", began.elapsed().as_secs_f64());
        }
    }
    marks.show(done);
    let real = began.elapsed().as_secs_f64();
    println!(
        "{:.1} simulated seconds per real second, {:.1} seeds per minute",
        simulated_ms as f64 / 1e3 / real,
        done as f64 / real * 60.0
    );
    println!("{done} seeds, {bad} violations");
    Ok(bad)
}

/// Whether a seed is to be run.
fn is_wanted(seed: u64, options: &Options) -> bool {
    options.only.is_none_or(|only| trial::Plan::draw(seed).emphasis == only)
}

/// How often rare branches were taken, over all seeds: how often in all, and in how many seeds.
#[derive(Default)]
struct Marks {
    counts: std::collections::BTreeMap<String, (u64, u64)>,
}

impl Marks {
    fn add(&mut self, text: &str) {
        let Some(line) = text.lines().find_map(|line| line.strip_prefix("marks ")) else { return };
        for (name, count) in line.split_whitespace().filter_map(|word| word.split_once('=')) {
            let count: u64 = count.parse().unwrap_or(0);
            let sum = self.counts.entry(name.to_owned()).or_default();
            *sum = (sum.0 + count, sum.1 + u64::from(count > 0));
        }
    }

    fn show(&self, seeds: u64) {
        if self.counts.is_empty() {
            return;
        }
        println!("rare branches: name, how often, in how many of {seeds} seeds");
        for (name, (count, hit_by)) in &self.counts {
            println!("  {name} {count} {hit_by}");
        }
        let never: Vec<&str> = self.counts.iter().filter(|(_, sum)| sum.0 == 0).map(|(name, _)| &name[..]).collect();
        println!("never taken: {}", if never.is_empty() { "none".to_owned() } else { never.join(", ") });
    }
}

/// The arguments of one run of this program, and whether it broke a promise: which, in a word or two.
fn broken(arguments: &[String]) -> Result<Option<String>> {
    let program = std::env::current_exe().context("where this program is")?;
    let output = Command::new(&program).args(arguments).arg("--brief").stdin(Stdio::null()).output();
    let output = output.context("cannot start a run")?;
    if output.status.success() {
        return Ok(None);
    }
    let text = String::from_utf8_lossy(&output.stdout);
    let violation = text.lines().find_map(|line| line.strip_prefix("violation: "));
    let kind = violation.and_then(|violation| violation.split(':').next()).unwrap_or("the simulation ended");
    Ok(Some(kind.to_owned()))
}

/// Leaves faults and guests out of a seed as long as the same promise is broken. Gives how many promises that are.
fn shrink(seed: u64, options: &Options) -> Result<usize> {
    let arguments = |without: &[usize], guests: Option<u32>| {
        let mut arguments = vec!["--seed".to_owned(), seed.to_string()];
        if !without.is_empty() {
            let list: Vec<String> = without.iter().map(usize::to_string).collect();
            arguments.extend(["--without".to_owned(), list.join(",")]);
        }
        arguments.extend(guests.iter().flat_map(|guests| ["--guests".to_owned(), guests.to_string()]));
        arguments.extend(options.plain.then(|| "--plain".to_owned()));
        arguments.extend(options.plant.iter().flat_map(|bug| ["--plant".to_owned(), bug.clone()]));
        arguments
    };
    let plan = if options.plain { trial::Plan::plain(seed) } else { trial::Plan::draw(seed) };
    let (mut without, mut guests) = (options.without.clone(), options.guests);
    let Some(kind) = broken(&arguments(&without, guests))? else {
        println!("seed {seed} breaks no promise");
        return Ok(0);
    };
    for fewer in 1..guests.unwrap_or(plan.guests) {
        if broken(&arguments(&without, Some(fewer)))?.as_deref() == Some(&kind) {
            guests = Some(fewer);
            break;
        }
    }
    // Large pieces first, then smaller ones.
    let mut size = plan.faults.len().next_power_of_two();
    while size > 0 {
        for start in (0..plan.faults.len()).step_by(size) {
            let mut tried = without.clone();
            tried.extend((start..(start + size).min(plan.faults.len())).filter(|index| !without.contains(index)));
            if tried.len() > without.len() && broken(&arguments(&tried, guests))?.as_deref() == Some(&kind) {
                without = tried;
            }
        }
        size /= 2;
    }
    without.sort_unstable();
    let left = plan.faults.len() - without.len();
    println!("{kind}: {left} of {} faults, {} guests", plan.faults.len(), guests.unwrap_or(plan.guests));
    println!("replay: cargo run --release -p tests --bin simulate -- {}", arguments(&without, guests).join(" "));
    Ok(1)
}

#[cfg(feature = "planted-bugs")]
fn plant(name: &str) -> Result<()> {
    use sheep::world::planted;
    let bug = planted::ALL.into_iter().find(|bug| format!("{bug:?}") == name);
    let names = format!("{:?}", planted::ALL);
    planted::plant(bug.with_context(|| format!("there is no bug {name}: there are {names}"))?);
    Ok(())
}

#[cfg(not(feature = "planted-bugs"))]
fn plant(_: &str) -> Result<()> {
    anyhow::bail!("no bug can be planted in this program: build it with --features planted-bugs")
}

/// Looks for every planted bug from several starting points, each time at most `count` seeds. Gives how many were not found.
fn self_test(options: &Options) -> Result<usize> {
    const TRIALS: u64 = 5;
    let count = options.seeds.unwrap_or(1000);
    let mut missed = 0;
    for bug in sheep::world::planted::ALL {
        let name = format!("{bug:?}");
        if options.plant.as_ref().is_some_and(|only| *only != name) {
            continue;
        }
        plant(&name)?;
        let mut taken = Vec::new();
        let mut kinds = std::collections::BTreeSet::new();
        for trial in 0..TRIALS {
            let first = options.from + trial * count;
            if let Some((seeds, kind)) = first_to_find(&name, first, count, options)? {
                println!("{name}: seed {}, after {seeds}: {kind}", first + seeds - 1);
                taken.push(seeds);
                kinds.insert(kind);
            }
        }
        taken.sort_unstable();
        let median = taken.get(TRIALS as usize / 2).map_or_else(|| "not found".to_owned(), u64::to_string);
        println!("{name}: median {median} seeds, {taken:?} ({})", kinds.into_iter().collect::<Vec<_>>().join(", "));
        missed += usize::from(taken.len() < TRIALS as usize);
    }
    println!("{missed} planted bugs not found within {count} seeds each time");
    Ok(missed)
}

/// How many seeds from `first` on it takes to find a planted bug, and by what; nothing if it takes more than `count`.
fn first_to_find(bug: &str, first: u64, count: u64, options: &Options) -> Result<Option<(u64, String)>> {
    let wanted: Vec<u64> = (first..first + count).filter(|seed| is_wanted(*seed, options)).collect();
    for seeds in wanted.chunks(options.jobs.max(1) as usize) {
        let found: Vec<Result<Option<String>>> = std::thread::scope(|scope| {
            let run = |seed: &u64| ["--seed".to_owned(), seed.to_string(), "--plant".to_owned(), bug.to_owned()];
            let threads: Vec<_> = seeds.iter().map(|seed| scope.spawn(move || broken(&run(seed)))).collect();
            let lost = |_| Err(anyhow::anyhow!("a run was lost"));
            threads.into_iter().map(|thread| thread.join().unwrap_or_else(lost)).collect()
        });
        for (seed, kind) in seeds.iter().zip(found) {
            if let Some(kind) = kind? {
                return Ok(Some((seed - first + 1, kind)));
            }
        }
    }
    Ok(None)
}

/// The number after a word of the last line.
fn field(text: &str, name: &str) -> Option<u64> {
    let mut words = text.lines().last()?.split_whitespace();
    words.find(|word| *word == name)?;
    words.next()?.parse().ok()
}
