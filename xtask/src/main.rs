//! Everything that is done to this repository: `./x COMMAND` or `cargo xtask COMMAND`.

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

mod bench;
mod build;
mod ci;
mod demo;
mod image;
mod kernels;
mod lint;
mod load;
mod machine;
mod process;
mod setup;
mod test;
mod tidy;
mod workspace;

/// Sets up, builds, shows, tests and checks Fairlead.
#[derive(Parser, Debug)]
#[command(name = "x", bin_name = "x")]
struct Cli {
    #[command(subcommand)]
    command: Task,
}

#[derive(Subcommand, Debug)]
enum Task {
    Setup(setup::Args),
    Build(build::Args),
    BuildAndLoad(load::Args),
    Demo(demo::Args),
    Image(image::Args),
    Test(test::Args),
    Bench(bench::Args),
    Lint(lint::Args),
    /// Checks the repository's own rules: sizes, headings, forbidden words, reachability.
    Tidy,
    /// What CI runs: lint, then every tier of tests that CI can run.
    Ci,
}

fn main() -> ExitCode {
    match run(Cli::parse().command) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("x: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(task: Task) -> Result<()> {
    match task {
        Task::Setup(args) => setup::run(&args),
        Task::Build(args) => build::run(args),
        Task::BuildAndLoad(args) => load::run(&args),
        Task::Image(args) => image::run(&args),
        Task::Demo(args) => demo::run(&args),
        Task::Test(args) => test::run(&args),
        Task::Bench(args) => bench::run(&args),
        Task::Lint(args) => lint::run(args),
        Task::Tidy => tidy::run(),
        Task::Ci => ci::run(),
    }
}
