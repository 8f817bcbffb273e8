//! `test`: the tiers, each run where it can run and accounted for where it cannot.

use std::io::{BufRead as _, BufReader, Write as _};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use clap::{Args as ClapArgs, ValueEnum};

use crate::machine;
use crate::process::Cmd;

mod kernels;
mod libtest;
mod ran;
mod report;
mod tier;

use libtest::Counts;
use report::{Row, Status};
pub(crate) use tier::TARGETS;
use tier::Tier;

/// Runs the tiers of tests that can run here, and says of each other one why it cannot.
#[derive(ClapArgs, Debug, Default)]
pub(crate) struct Args {
    /// Which tiers; where none is named, all but the matrix, the mutants and the kernels, which take minutes.
    #[arg(value_enum)]
    tiers: Vec<Tier>,
    /// Tiers that must run: one that cannot run here fails.
    #[arg(long, value_enum, value_delimiter = ',', value_name = "TIER,…")]
    require: Vec<Tier>,
    /// Other kernels run every test also where they have to be emulated, for hours.
    #[arg(long)]
    all: bool,
    /// Who serves the cells of the matrix in the agents' place; of no other tier.
    #[arg(long, value_enum, value_name = "PROXY")]
    with: Option<Proxy>,
    /// Names of tests, or other options of the test programs, after `--`.
    #[arg(last = true, value_name = "FILTER")]
    filter: Vec<String>,
}

/// Another proxy than ours, for the tier that can run one.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Proxy {
    /// kube-proxy in nftables mode, against a control plane of its own: both are built with Go.
    KubeProxy,
}

/// Names it to the tests.
const WITH: &str = "FAIRLEAD_MATRIX_WITH";

impl Args {
    /// Every tier, all required: CI is root on a kernel that allows everything, with a network.
    pub(crate) fn for_ci() -> Self {
        Self { require: Tier::ALL.to_vec(), ..Self::default() }
    }

    fn selected(&self) -> Vec<Tier> {
        let default = |tier: Tier| self.tiers.is_empty() && (tier.by_default() || machine::is_ci());
        let named = |tier: Tier| self.tiers.contains(&tier) || self.require.contains(&tier);
        Tier::ALL.into_iter().filter(|&tier| default(tier) || named(tier)).collect()
    }

    fn requires(&self, tier: Tier) -> bool {
        self.require.contains(&tier) || machine::is_ci()
    }

    /// Then a case that this kernel lacks something for has to pass on another one.
    fn runs_on_every_kernel(&self) -> bool {
        self.filter.is_empty()
            && Tier::ALL.into_iter().all(|tier| self.requires(tier) && self.selected().contains(&tier))
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let selected = args.selected();
    if let Some(other) = selected.iter().find(|tier| args.with.is_some() && **tier != Tier::Matrix) {
        bail!(
            "--with is for the matrix tier alone, and {} would run: `./x test matrix --with kube-proxy`",
            other.name()
        );
    }
    let setup = tier::prepare(&selected);
    if let Some(error) = &setup {
        println!("test: {error:#}\ntest: going on with the tiers that can do without");
    }
    ran::forget().context("the results of an earlier run")?;
    let mut rows: Vec<Row> = selected
        .iter()
        .map(|&tier| match tier.obstacle() {
            Some(reason) => Row::not_run(tier, reason, args.requires(tier)),
            None if tier == Tier::Kernels => {
                println!("\n=== {} ===", tier.name());
                kernels::run(&args.filter, args.all)
            }
            None => run_tier(tier, &args.filter, args.with),
        })
        .collect();
    if args.runs_on_every_kernel() {
        report::nobody_ran(&mut rows);
    }
    report::print(&rows);
    let failed: Vec<&str> = rows.iter().filter(|row| row.failed()).map(|row| row.tier.name()).collect();
    if !failed.is_empty() {
        bail!("failed: {}", failed.join(", "));
    }
    Ok(())
}

fn run_tier(tier: Tier, filter: &[String], with: Option<Proxy>) -> Row {
    println!("\n=== {} ===", tier.name());
    let start = Instant::now();
    let mut counts = Counts::default();
    let mut problems = Vec::new();
    // One program that fails does not keep the others of its tier from running.
    for (cmd, program) in tier.commands(filter) {
        counts.program = program;
        let cmd = match with.filter(|_| tier == Tier::Matrix) {
            Some(Proxy::KubeProxy) => cmd.env(WITH, "kube-proxy"),
            None => cmd,
        };
        let line = cmd.to_string();
        let failed_before = counts.failed;
        match stream(cmd, tier.limit(), &mut counts) {
            Ok(()) => {}
            Err(error) => {
                if counts.failed == failed_before {
                    // It did not get so far as to count: a compile error, a crash, a time-out.
                    counts.failed += 1;
                }
                problems.push(format!("`{line}`: {error:#}"));
            }
        }
    }
    if problems.is_empty() && counts.passed == 0 && filter.is_empty() {
        counts.failed += 1;
        problems.push("no test ran".to_owned());
    }
    // What a filter leaves out has not failed, and nothing can be said of it.
    if filter.is_empty()
        && let Err(error) = ran::note(tier, &counts.names())
    {
        problems.push(format!("its results cannot be noted: {error}"));
    }
    let status = if counts.failed == 0 { Status::Passed } else { Status::Failed };
    Row { tier, status, counts, elapsed: start.elapsed(), notes: problems }
}

/// Runs a command, shows what it prints as it comes, and counts the tests in it.
fn stream(cmd: Cmd, limit: Duration, counts: &mut Counts) -> Result<()> {
    println!("+ {cmd}");
    let mut child = limited(cmd.into_inner(), limit).stdout(Stdio::piped()).spawn().context("could not start it")?;
    let stdout = child.stdout.take().context("its output was not piped")?;
    let mut screen = std::io::stdout().lock();
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("its output could not be read")?;
        let line = String::from_utf8_lossy(&line);
        counts.read(&line);
        writeln!(screen, "{line}").context("our own output is closed")?;
    }
    drop(screen);
    let status = child.wait().context("waiting for it")?;
    match status.code() {
        Some(0) => Ok(()),
        Some(TIMED_OUT) if machine::is_ci() => bail!("ended after {} s: it takes too long or hangs", limit.as_secs()),
        _ => bail!("{status}; its own messages stand above"),
    }
}

/// What timeout(1) exits with when it had to end its command.
const TIMED_OUT: i32 = 124;

/// In CI a test that hangs must not cost the report of all others. At a terminal Ctrl-C serves, which timeout(1) would catch.
fn limited(command: Command, limit: Duration) -> Command {
    if !machine::is_ci() {
        return command;
    }
    let mut wrapped = Command::new("timeout");
    wrapped.arg("--kill-after=20").arg(limit.as_secs().to_string());
    wrapped.arg(command.get_program()).args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => wrapped.env(name, value),
            None => wrapped.env_remove(name),
        };
    }
    if let Some(dir) = command.get_current_dir() {
        wrapped.current_dir(dir);
    }
    wrapped
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn without_a_name_every_tier_but_the_slowest_is_selected() {
        let selected = Args::default().selected();
        let slow = [Tier::Matrix, Tier::Mutants, Tier::Kernels];
        assert!(Tier::ALL.into_iter().filter(|tier| !slow.contains(tier)).all(|tier| selected.contains(&tier)));
        assert!(slow.into_iter().all(|tier| selected.contains(&tier) == machine::is_ci()));
    }

    #[test]
    fn a_required_tier_is_selected_with_those_named() {
        let args = Args { tiers: vec![Tier::Packet], require: vec![Tier::Unit], ..Args::default() };
        assert_eq!(args.selected(), [Tier::Unit, Tier::Packet]);
        assert!(args.requires(Tier::Unit) && !args.runs_on_every_kernel());
    }

    #[test]
    fn ci_requires_every_tier() {
        let args = Args::for_ci();
        assert_eq!(args.selected(), Tier::ALL);
        assert!(Tier::ALL.into_iter().all(|tier| args.requires(tier)) && args.runs_on_every_kernel());
    }

    #[test]
    fn another_proxy_is_for_the_matrix_alone() {
        let args = Args { tiers: vec![Tier::Matrix, Tier::Unit], with: Some(Proxy::KubeProxy), ..Args::default() };
        let error = run(&args).unwrap_err().to_string();
        assert!(error.starts_with("--with is for the matrix tier alone, and unit would run"), "{error}");
    }

    #[test]
    fn a_command_that_fails_without_counting_is_an_error() {
        let mut counts = Counts::default();
        let error = stream(Cmd::new("false"), Duration::from_secs(5), &mut counts).unwrap_err();
        assert!(error.to_string().contains("exit status: 1"), "{error}");
        assert_eq!(counts, Counts::default());
    }

    #[test]
    fn what_a_command_prints_is_counted() {
        let mut counts = Counts::default();
        let summary = "test result: ok. 3 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out; finished in 0.00s";
        stream(Cmd::new("echo").arg(summary), Duration::from_secs(5), &mut counts).unwrap();
        assert_eq!(counts.passed, 3);
    }
}
