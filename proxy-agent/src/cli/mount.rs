//! `fairlead mount`: what only a privileged container may do for the host, from an init container.

use std::process::ExitCode;

use anyhow::Context as _;

use crate::args::MountArgs;
use crate::dataplane::pin::PinRoot;
use crate::sysctl::Sysctls;

pub(super) fn main(args: MountArgs) -> anyhow::Result<ExitCode> {
    let pins = PinRoot::new(args.pins.pin_path)?;
    let mounted = pins.mount()?;
    super::print(if mounted { "mounted the BPF file system\n" } else { "a BPF file system is mounted\n" })?;
    if args.sysctls {
        let set = Sysctls::of(&pins).and_then(|sysctls| sysctls.prepare());
        for set in set.context("cannot set what the agent needs below /proc/sys")? {
            super::print(&format!("{}: {}\n", set.name(), set.change()))?;
        }
    }
    Ok(ExitCode::SUCCESS)
}
