//! `demo`: a small cluster in network namespaces, with real traffic through the programs.

use anyhow::{Result, bail};
use clap::Args as ClapArgs;

use crate::process::Cmd;
use crate::setup::{self, Need};
use crate::{build, machine};

/// Shows Fairlead at work on this machine, in namespaces it makes and removes.
#[derive(ClapArgs, Debug)]
pub(crate) struct Args {
    /// Options of the demo itself, such as `--keep` (leave the cluster up); `--help` lists them.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "OPTION")]
    rest: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(reason) = machine::namespaces_denied() {
        bail!("the demo cannot run here: {reason}. Run it as root, outside of a container that forbids this");
    }
    setup::ensure(Need::Run)?;
    if let Some(reason) = machine::bpf_denied() {
        bail!("the demo cannot run here: {reason}");
    }
    build::build(build::Args::default())?;
    let demo = build::program("fairlead-demo", build::Args::default())?;
    // It becomes the demo, so that Ctrl-C and the exit status are the demo's own.
    Err(Cmd::new(demo).args(&args.rest).current_dir(&machine::root()).exec())
}
