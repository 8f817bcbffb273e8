//! `lint`: format, clippy, rustdoc, dependencies and the repository's own rules.

use anyhow::{Context as _, Result, bail};
use clap::Args as ClapArgs;
use proxy_ebpf_build::Options;

use crate::image::Arch;
use crate::process::Cmd;
use crate::setup::{self, Need};
use crate::{machine, tidy};

/// Checks format and style; every check runs, even after one has failed.
#[derive(ClapArgs, Clone, Copy, Debug, Default)]
pub(crate) struct Args {
    /// Format the sources instead of checking the format.
    #[arg(long)]
    fix: bool,
}

pub(crate) fn run(args: Args) -> Result<()> {
    setup::ensure(Need::Lint)?;
    setup::ensure(Need::Build)?;
    // Cheapest first; clippy before rustdoc, which uses what clippy has checked.
    let steps: [(&str, Result<()>); 7] = [
        ("tidy", tidy::run()),
        ("format", format(args.fix)),
        ("clippy", clippy()),
        ("the object's target", ebpf()),
        ("the other processor", other_processor()),
        ("rustdoc", rustdoc()),
        ("dependencies", deny()),
    ];
    let mut failed = Vec::new();
    for (name, result) in steps {
        if let Err(error) = result {
            eprintln!("lint: {name}: {error:#}");
            failed.push(name);
        }
    }
    if !failed.is_empty() {
        bail!("lint failed: {}", failed.join(", "));
    }
    println!("lint: ok");
    Ok(())
}

fn format(fix: bool) -> Result<()> {
    let cmd = Cmd::cargo("fmt").arg("--all").current_dir(&machine::root());
    if fix { cmd } else { cmd.arg("--check") }.run().context("`./x lint --fix` formats")
}

fn clippy() -> Result<()> {
    // proxy-ebpf too: on the host it is a library with unit tests.
    Cmd::cargo("clippy")
        .args(["--locked", "--workspace", "--all-targets", "--", "-D", "warnings", "-D", "clippy::too_many_lines"])
        .current_dir(&machine::root())
        .run()
}

/// What only the BPF target compiles: the programs themselves.
fn ebpf() -> Result<()> {
    for (features, which) in [(["tally"], "that counts its look-ups"), (["flat"], "for devices without Ethernet")] {
        let options = Options {
            workspace: &machine::root(),
            target_dir: &machine::target_dir().join("ebpf-check"),
            features: &features,
            opt_level: None,
            subcommand: "check",
        };
        proxy_ebpf_build::build(&options).with_context(|| format!("the object {which}"))?;
    }
    Ok(())
}

/// The agent for the processor that this machine does not have, up to the linker. Layouts of maps are proved while they
/// are compiled (`abi_struct!`), so this shows that they are the same there.
fn other_processor() -> Result<()> {
    let arch = Arch::host().other();
    // Installed for CI only: nobody else expects a compiler for another processor from a lint.
    let obstacle = if machine::is_ci() {
        setup::ensure(Need::Image(arch)).err().map(|error| format!("{error:#}"))
    } else {
        setup::lacks(Need::Image(arch))
    };
    if let Some(reason) = obstacle {
        println!("lint: the agent is not compiled for {}: {reason}", arch.name());
        return Ok(());
    }
    let cmd = Cmd::cargo("check").args(["--locked", "--package", "proxy-agent", "--bin", "fairlead"]);
    arch.foreign(cmd.args(["--target", arch.target()])).current_dir(&machine::root()).run()
}

fn rustdoc() -> Result<()> {
    Cmd::cargo("doc")
        .args(["--locked", "--workspace", "--no-deps", "--document-private-items"])
        .env("RUSTDOCFLAGS", "-D warnings")
        .current_dir(&machine::root())
        .run()
}

fn deny() -> Result<()> {
    if Cmd::cargo("deny").arg("--version").probe().is_none() {
        println!(
            "lint: cargo-deny is not installed, so licences and sources of dependencies are not checked (CONTRIBUTING.md)"
        );
        return Ok(());
    }
    Cmd::cargo("deny").args(["check", "bans", "licenses", "sources"]).current_dir(&machine::root()).run()
}
