//! `fairlead`: parse, validate, run.

use std::process::ExitCode;

use clap::Parser;
use proxy_agent::args::{Cli, Command};
use proxy_agent::{cli, run};

fn main() -> ExitCode {
    // Wrong usage ends here, with exit code 2.
    match Cli::parse().command {
        Command::Run(args) => run::main(*args),
        command => cli::main(command),
    }
}
