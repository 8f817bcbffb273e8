//! `build-and-load`: the agent on devices of this machine, fed from a folder or a cluster.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use clap::Args as ClapArgs;
use proxy_common::ABI_VERSION;

use crate::process::Cmd;
use crate::setup::{self, Need};
use crate::{build, machine};

/// Manifests that are served where nothing else is named.
const EXAMPLE: &str = "deploy/examples/web";
/// The agent's default.
const PIN_PATH: &str = "/sys/fs/bpf/fairlead";

/// Maps that tell most, and what is in them.
const SHOWN: [(&str, &str); 5] = [
    ("SERVICES_V4", "addresses that are served, and their port ids"),
    ("PORTS", "each port's runs of endpoints, for the cluster and for this node"),
    ("SLOTS_V4", "the endpoints in these runs"),
    ("FLOWS_V4", "confirmed flows, each with its complete rewrite"),
    ("STATS", "packets by outcome, per CPU"),
];

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
    let agent = build::build(build::Args { release: args.release, ..build::Args::default() })?;
    println!("{}", explain(&args.pin_path, &agent));
    Err(Cmd::new(agent)
        .arg("run")
        .args(source)
        .args(["--devices", &args.devices, "--pin-path"])
        .arg(&args.pin_path)
        .args(&args.rest)
        .exec())
}

/// Where to look once the agent runs.
fn explain(pins: &Path, agent: &Path) -> String {
    let agent = agent.display();
    let maps = pins.join(format!("v{ABI_VERSION}")).join("maps");
    let dumps: String = SHOWN
        .iter()
        .map(|(map, what)| {
            format!("  bpftool -p map dump pinned {:<50} # {what}\n", maps.join(map).display().to_string())
        })
        .collect();
    format!(
        "maps, programs and links are pinned in {}; to look inside, in another terminal as root:\n{dumps}\
         \x20 bpftool net show                     # where programs are attached\n\
         \x20 {agent} services --pin-path {}   # the same maps, with names\n\
         Ctrl-C ends the agent; what it loaded stays and serves on. This takes it away:\n\
         \x20 {agent} cleanup --pin-path {}",
        pins.display(),
        pins.display(),
        pins.display()
    )
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

#[cfg(test)]
mod tests {
    use super::*;

    fn args(manifests: Option<&str>) -> Args {
        Args {
            devices: "eth0".into(),
            manifests: manifests.map(PathBuf::from),
            kubeconfig: None,
            pin_path: PIN_PATH.into(),
            release: false,
            rest: Vec::new(),
        }
    }

    #[test]
    fn the_example_is_served_where_nothing_is_named() {
        let [option, folder] = source(&args(None)).unwrap();
        assert_eq!(option, Path::new("--manifests"));
        assert!(folder.ends_with(EXAMPLE) && folder.is_dir());
    }

    #[test]
    fn a_folder_that_is_not_there_is_named() {
        let error = source(&args(Some("/no/such/folder"))).unwrap_err().to_string();
        assert_eq!(error, "--manifests /no/such/folder: there is no such folder");
    }

    #[test]
    fn the_explanation_names_pins_of_this_abi() {
        let text = explain(Path::new("/sys/fs/bpf/x"), Path::new("target/debug/fairlead"));
        assert!(text.contains(&format!("map dump pinned /sys/fs/bpf/x/v{ABI_VERSION}/maps/SERVICES_V4 ")), "{text}");
        assert!(text.contains("fairlead cleanup --pin-path /sys/fs/bpf/x"), "{text}");
    }
}
