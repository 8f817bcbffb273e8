//! `fairlead mount`: the BPF file system of the host, from an init container.

use std::process::ExitCode;

use crate::args::PinArgs;
use crate::dataplane::pin::PinRoot;

pub(super) fn main(args: PinArgs) -> anyhow::Result<ExitCode> {
    let mounted = PinRoot::new(args.pin_path)?.mount()?;
    super::print(if mounted { "mounted the BPF file system\n" } else { "a BPF file system is mounted\n" })?;
    Ok(ExitCode::SUCCESS)
}
