//! `fairlead-bench`: what Fairlead costs on this machine. `docs/benchmarks.md` explains the figures.

use std::{borrow::Cow, path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::{Args, Parser, Subcommand};
use fairlead_bench::{
    exchange, masquerade, report,
    rows::{Effort, Traffic},
    scale, sender, soak,
};
use proxy_agent::dataplane::load::OBJECT;

/// Measures what Fairlead costs on this machine.
///
/// Without a command: the ratios of the same path with and without the programs, taken by turns on one core, and
/// nanoseconds and look-ups of each class of packet.
#[derive(Debug, Parser)]
#[command(name = "fairlead-bench", version)]
struct Cli {
    #[command(flatten)]
    run: RunArgs,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Args)]
struct RunArgs {
    /// Fail where a bound is missed for certain: its 95 % interval lies wholly above
    #[arg(long)]
    check: bool,
    /// Also write the results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Interleaved rounds per row
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u16).range(11..))]
    rounds: u16,
    /// Only these rows, without the classes
    #[arg(long, value_enum, value_delimiter = ',', value_name = "ROW,…")]
    only: Vec<Traffic>,
    /// Length of a slice, milliseconds
    #[arg(long, value_name = "MS", default_value_t = 200, value_parser = clap::value_parser!(u64).range(20..))]
    slice: u64,
    /// Services loaded in the larger of the two loaded states
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(3..=20_000))]
    services: u32,
    /// Measure this object in place of the agent's own programs; look-ups are those of the sources
    #[arg(long, value_name = "FILE", global = true)]
    object: Option<PathBuf>,
    /// The core that does all the work; by default the last one
    #[arg(long, value_name = "CPU", global = true)]
    core: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Only nanoseconds and look-ups of each class of packet
    Classes,
    /// Idle connections beside a flood of new flows of two packets each
    Soak {
        /// New flows
        #[arg(long, value_name = "N", default_value_t = 5_000_000)]
        flows: u32,
        /// New flows per second; 0: as many as go
        #[arg(long, value_name = "N", default_value_t = 0)]
        rate: u32,
        /// Idle connections
        #[arg(long, value_name = "N", default_value_t = 1_000)]
        idle: usize,
        /// What the flows are made of
        #[arg(long, value_enum, default_value_t = soak::Flood::Unanswered)]
        flood: soak::Flood,
    },
    /// The programs exchanged under traffic for another build and back, by restarts of the agent
    Exchange {
        /// Number of exchanges
        #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..))]
        times: u32,
    },
    /// Short connections through a masquerading NodePort to one endpoint, beside connections of the node's own
    Masquerade {
        /// Short connections
        #[arg(long, value_name = "N", default_value_t = 1_000_000)]
        connections: u64,
        /// At most so many a second; 0: as many as go
        #[arg(long, value_name = "N", default_value_t = 0)]
        rate: u64,
        /// Connections of the node's own with the endpoint
        #[arg(long, value_name = "N", default_value_t = 1_000, value_parser = clap::value_parser!(u16).range(..=10_000))]
        own: u16,
    },
    /// Thousands of Services behind a real API server: changes, starts, memory
    Scale(ScaleArgs),
}

#[derive(Debug, Args)]
struct ScaleArgs {
    /// Fail where a bound is missed
    #[arg(long)]
    check: bool,
    /// Also write the results to this file
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Services, each with ten endpoints
    #[arg(long, value_name = "N", default_value_t = 5_000, value_parser = clap::value_parser!(u32).range(100..=6_000))]
    services: u32,
    /// Rounds; in each, every proxy starts once
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..))]
    rounds: u32,
    /// Changes that Fairlead follows, in all rounds together
    #[arg(long, value_name = "N", default_value_t = 500, value_parser = clap::value_parser!(u32).range(1..))]
    changes: u32,
    /// Changes that kube-proxy follows; 0: only Fairlead is measured
    #[arg(long, value_name = "N", default_value_t = 30)]
    kube_proxy_changes: u32,
}

fn main() -> ExitCode {
    match run(&Cli::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("fairlead-bench: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(cli: &Cli) -> Result<bool> {
    match cli.command {
        Some(Command::Scale(ref args)) => measure_scale(args),
        Some(Command::Soak { flows, rate, idle, flood }) => {
            let seen = soak::run(soak::Plan { idle, flows, rate, flood })?;
            println!("{seen}");
            Ok(seen.holds())
        }
        Some(Command::Masquerade { connections, rate, own }) => {
            let seen = masquerade::run(masquerade::Plan { connections, rate, own })?;
            println!("{seen}");
            Ok(seen.holds())
        }
        Some(Command::Exchange { times }) => {
            let seen = exchange::run(times)?;
            println!("{seen}");
            Ok(seen.holds())
        }
        Some(Command::Classes) => {
            pin(&cli.run)?;
            report::classes(&object(&cli.run)?).map(|_| true)
        }
        None => {
            pin(&cli.run)?;
            let (rounds, slice) = (usize::from(cli.run.rounds), Duration::from_millis(cli.run.slice));
            let effort = Effort { rounds, slice, many: cli.run.services };
            let missed = report::all(&object(&cli.run)?, effort, &cli.run.only, cli.run.json.as_deref())?;
            Ok(missed.is_empty() || !cli.run.check)
        }
    }
}

fn measure_scale(args: &ScaleArgs) -> Result<bool> {
    let &ScaleArgs { services, rounds, changes, kube_proxy_changes: kube_proxy, .. } = args;
    let seen = scale::run(scale::Plan { services, rounds, changes, kube_proxy })?;
    println!("{seen}");
    if let Some(file) = &args.json {
        report::write_json(file, &seen)?;
    }
    let missed = seen.misses();
    missed.iter().for_each(|miss| println!("falls short: {miss}"));
    Ok(missed.is_empty() || !args.check)
}

/// Everything that is measured takes place on one core.
fn pin(args: &RunArgs) -> Result<()> {
    let core = match args.core {
        Some(core) => core,
        None => std::thread::available_parallelism().context("cannot count the cores")?.get() - 1,
    };
    sender::pin_to(core)
}

/// The programs that are measured.
fn object(args: &RunArgs) -> Result<Cow<'static, [u8]>> {
    let Some(file) = &args.object else { return Ok(Cow::Borrowed(OBJECT)) };
    std::fs::read(file).map(Cow::Owned).with_context(|| format!("cannot read --object {}", file.display()))
}
