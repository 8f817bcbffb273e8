//! `build`: the eBPF object and the programs that load it.

use std::path::PathBuf;

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use proxy_ebpf_build::Options;

use crate::setup::{self, Need};
use crate::{machine, workspace};

/// Builds the eBPF object and the agent.
#[derive(ClapArgs, Clone, Copy, Debug, Default)]
pub(crate) struct Args {
    /// Optimised, for measuring and for deployment.
    #[arg(long)]
    pub(crate) release: bool,
    /// Also an eBPF object that writes a line per packet to the kernel's trace buffer, for debugging.
    #[arg(long)]
    pub(crate) log: bool,
}

pub(crate) fn run(args: Args) -> Result<()> {
    let agent = build(args)?;
    println!("built {}", agent.display());
    Ok(())
}

/// Builds every program of the workspace and returns the agent.
pub(crate) fn build(args: Args) -> Result<PathBuf> {
    setup::ensure(Need::Build)?;
    // The agent's build script would build it too, into the same place; here its errors come before minutes of other crates.
    for features in [&[][..], &["flat"]] {
        object("ebpf", features)?;
    }
    if args.log {
        let object = object("ebpf-log", &["log"])?;
        println!(
            "run it with: fairlead run --ebpf-object {} …\nread it with: cat /sys/kernel/tracing/trace_pipe",
            object.display()
        );
    }
    let cmd = workspace::cargo("build").arg("--bins");
    if args.release { cmd.arg("--release") } else { cmd }.run()?;
    program("fairlead", args)
}

/// Builds the eBPF object in a place of its own and says how.
fn object(place: &str, features: &[&str]) -> Result<PathBuf> {
    let options = Options {
        workspace: &machine::root(),
        target_dir: &machine::target_dir().join(place),
        features,
        opt_level: None,
        subcommand: "build",
    };
    let built = proxy_ebpf_build::build(&options).context("the eBPF object")?;
    println!("built {} with {}", built.object.display(), built.core.describe());
    Ok(built.object)
}

/// A program that was built.
pub(crate) fn program(name: &str, args: Args) -> Result<PathBuf> {
    let file = machine::target_dir().join(if args.release { "release" } else { "debug" }).join(name);
    if !file.is_file() {
        bail!("the build succeeded, but there is no {}", file.display());
    }
    Ok(file)
}
