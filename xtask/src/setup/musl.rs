//! What a static program needs: Rust's musl target, and a C compiler for the little C that TLS brings along.

use anyhow::{Context as _, Result, bail};

use super::{Item, State, apt};
use crate::image::Arch;
use crate::machine;
use crate::process::Cmd;

pub(super) fn items(arch: Arch) -> Vec<Item> {
    let (compiler, install): (&str, fn() -> Result<()>) = match arch {
        _ if arch == Arch::host() => ("musl-gcc", || apt::install(&["musl-tools"])),
        Arch::Arm => ("aarch64-linux-gnu-gcc", || apt::install(&["gcc-aarch64-linux-gnu", "libc6-dev-arm64-cross"])),
        Arch::X86 => ("x86_64-linux-gnu-gcc", || apt::install(&["gcc-x86-64-linux-gnu", "libc6-dev-amd64-cross"])),
    };
    let compiler_state = machine::which(compiler).map(|path| path.display().to_string());
    vec![
        Item {
            name: arch.target().into(),
            why: "the image holds one static program",
            state: target(arch),
            install: install_target(arch),
        },
        Item {
            name: compiler.into(),
            why: "compiles the C parts of the TLS library",
            state: compiler_state.ok_or_else(|| "not installed".to_owned()).into(),
            install,
        },
    ]
}

/// Does the compiler in use have the target's standard library?
fn target(arch: Arch) -> State {
    let libdir = Cmd::new("rustc").args(["--print", "target-libdir", "--target", arch.target()]).probe();
    match libdir.map(|dir| dir.trim().to_owned()).filter(|dir| std::path::Path::new(dir).is_dir()) {
        Some(dir) => State::Here(dir),
        None => State::Missing("the standard library for it".to_owned()),
    }
}

fn install_target(arch: Arch) -> fn() -> Result<()> {
    match arch {
        Arch::X86 => || add(Arch::X86),
        Arch::Arm => || add(Arch::Arm),
    }
}

fn add(arch: Arch) -> Result<()> {
    if machine::which("rustup").is_none() {
        bail!("only rustup has {}: install rustup, or build in a container with Containerfile", arch.target());
    }
    Cmd::new("rustup").args(["target", "add", arch.target()]).current_dir(&machine::root()).run().context("rustup")
}
