//! `fairlead-bench`: what Fairlead costs on this machine. `docs/benchmarks.md` explains the figures.

use std::{path::PathBuf, process::ExitCode, time::Duration};

use anyhow::{Context as _, Result};
use clap::Parser;
use fairlead_bench::{
    rows::{Bench, Effort, Row, Traffic},
    sender,
};

/// Measures what Fairlead costs on this machine.
///
/// Ratios are those of the same path with and without the programs, taken by turns on one core.
#[derive(Debug, Parser)]
#[command(name = "fairlead-bench", version)]
struct Args {
    /// Fail where a bound is missed for certain: its 95 % interval lies wholly above.
    #[arg(long)]
    check: bool,
    /// Also write the results to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Interleaved rounds per row.
    #[arg(long, value_name = "N", default_value_t = 15, value_parser = clap::value_parser!(u16).range(11..))]
    rounds: u16,
    /// Length of a slice, milliseconds.
    #[arg(long, value_name = "MS", default_value_t = 200, value_parser = clap::value_parser!(u64).range(20..))]
    slice: u64,
    /// Services loaded in the larger of the two loaded states.
    #[arg(long, value_name = "N", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(3..=20_000))]
    services: u32,
    /// The core that does all the work; by default the last one.
    #[arg(long, value_name = "CPU")]
    core: Option<usize>,
}

fn main() -> ExitCode {
    match run(&Args::parse()) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::from(1),
        Err(error) => {
            eprintln!("fairlead-bench: {error:#}");
            ExitCode::from(1)
        }
    }
}

fn run(args: &Args) -> Result<bool> {
    let effort =
        Effort { rounds: usize::from(args.rounds), slice: Duration::from_millis(args.slice), many: args.services };
    let mut bench = Bench::new(effort)?;
    let cores = std::thread::available_parallelism().context("number of cores")?.get();
    sender::pin_to(args.core.unwrap_or(cores - 1))?;
    println!(
        "{:<32} {:>6} {:>6} {:>6}  {:<20}  {:<20}  {:<20}",
        "ns per packet, one core", "none", "few", "many", "few ÷ none", "many ÷ none", "many ÷ few"
    );
    let mut rows: Vec<Row> = Vec::new();
    for traffic in Traffic::ALL {
        for v6 in [false, true] {
            let row = bench.row(traffic, v6)?;
            println!("{row}");
            rows.push(row);
        }
    }
    if let Some(file) = &args.json {
        let text = serde_json::to_string_pretty(&rows).context("writing JSON")?;
        std::fs::write(file, text + "\n").with_context(|| format!("cannot write {}", file.display()))?;
    }
    let missed: Vec<_> = rows.iter().flat_map(Row::misses).collect();
    for miss in &missed {
        println!("falls short: {miss}");
    }
    Ok(missed.is_empty() || !args.check)
}
