//! `bench`: what the programs cost, as ratios measured within one run.

use anyhow::{Result, bail};
use clap::Args as ClapArgs;

use crate::image::{self, Arch};
use crate::process::Cmd;
use crate::setup::{self, Need};
use crate::{build, machine};

/// Names the agent that is measured.
const AGENT: &str = "FAIRLEAD_BIN";

/// Measures; with `--check`, fails where a bound is not met.
#[derive(ClapArgs, Debug)]
pub(crate) struct Args {
    /// Options of the bench itself, such as `--check`; `--help` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
    rest: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(reason) = machine::namespaces_denied() {
        bail!("nothing can be measured here: {reason}");
    }
    setup::ensure(Need::Run)?;
    if let Some(reason) = machine::bpf_denied() {
        bail!("nothing can be measured here: {reason}");
    }
    let release = build::Args { release: true, ..build::Args::default() };
    build::build(release)?;
    let bench = build::program("fairlead-bench", release)?;
    let mut cmd = Cmd::new(bench).args(&args.rest).current_dir(&machine::root());
    if args.rest.iter().any(|arg| arg == "scale") && std::env::var_os(AGENT).is_none() {
        // Memory is a matter of the C library too: what nodes run is measured.
        match setup::ensure(Need::Image(Arch::host())) {
            Ok(()) => cmd = cmd.env(AGENT, &image::program(Arch::host())?.to_string_lossy()),
            Err(error) => {
                println!("bench: the image's program cannot be made here, another build is measured: {error:#}");
            }
        }
    }
    Err(cmd.exec())
}
