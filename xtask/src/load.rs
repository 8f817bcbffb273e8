//! `build-and-load`: the agent on devices of this machine, fed from a folder or a cluster.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args as ClapArgs;

use crate::process::Cmd;
use crate::setup::{self, Need};
use crate::{build, machine};

/// Manifests that are served where nothing else is named.
const EXAMPLE: &str = "deploy/examples/web";
/// The agent's default.
const PIN_PATH: &str = "/sys/fs/bpf/fairlead";

/// Builds, loads, attaches to the devices named and serves until Ctrl-C.
#[derive(ClapArgs, Debug)]
pub(crate) struct Args {
    /// Devices to attach to, by name or pattern, separated by commas.
    #[arg(long, value_name = "PATTERN,…")]
    devices: String,
    /// A folder of YAML manifests to serve; watched for changes. Default: deploy/examples/web.
    #[arg(long, value_name = "DIR", conflicts_with = "kubeconfig")]
    manifests: Option<PathBuf>,
    /// A cluster to serve.
    #[arg(long, value_name = "FILE")]
    kubeconfig: Option<PathBuf>,
    /// Where maps and links are pinned.
    #[arg(long, value_name = "DIR", default_value = PIN_PATH)]
    pin_path: PathBuf,
    /// Build it optimised.
    #[arg(long)]
    release: bool,
    /// More options of `fairlead run`, after `--`.
    #[arg(last = true, value_name = "OPTION")]
    rest: Vec<String>,
}

pub(crate) fn run(args: &Args) -> Result<()> {
    if let Some(reason) = machine::bpf_denied() {
        bail!("cannot load programs here: {reason}");
    }
    let source = source(args)?;
    setup::ensure(Need::Run)?;
    let agent = build::build(build::Args { release: args.release })?;
    let pins = args.pin_path.display();
    println!("maps and links are pinned below {pins} once the agent runs. To look inside, in another terminal:");
    println!("  bpftool map show");
    println!("  find {pins} -type f -o -type p             # every pin");
    println!("  bpftool -p map dump name SERVICES_V4       # addresses that are served");
    println!("  bpftool -p map dump name FLOWS_V4          # established flows");
    println!("  bpftool net show                           # where the programs are attached");
    println!("  {} services                # the same with names", agent.display());
    println!("Ctrl-C ends the agent; `{} cleanup` detaches and unpins everything.", agent.display());
    Err(Cmd::new(agent)
        .arg("run")
        .args(source)
        .args(["--devices", &args.devices, "--pin-path"])
        .arg(&args.pin_path)
        .args(&args.rest)
        .exec())
}

/// The option that says where Services come from, checked before the minutes of a build.
fn source(args: &Args) -> Result<[PathBuf; 2]> {
    if let Some(file) = &args.kubeconfig {
        let file = machine::as_given(file);
        if !file.is_file() {
            bail!("--kubeconfig {}: there is no such file", file.display());
        }
        return Ok(["--kubeconfig".into(), file]);
    }
    let folder = args.manifests.as_deref().map_or_else(|| machine::root().join(Path::new(EXAMPLE)), machine::as_given);
    if !folder.is_dir() {
        bail!("--manifests {}: there is no such folder", folder.display());
    }
    Ok(["--manifests".into(), folder])
}
