//! bpf-linker: turns LLVM bitcode into the eBPF object, with BTF.

use std::path::Path;

use anyhow::{Result, bail};
use proxy_ebpf_build::LINKER;

use super::Item;
use crate::process::Cmd;

/// The last release that reads the bitcode of LLVM 22 with the LLVM that comes with rustc; later ones want an LLVM 23 of their own.
const VERSION: &str = "0.10.3";

pub(super) fn item() -> Item {
    Item { name: LINKER.into(), why: "links the eBPF object", state: probe().into(), install }
}

fn probe() -> Result<String, String> {
    let Some(file) = proxy_ebpf_build::linker() else {
        return Err("it is neither in PATH nor in cargo's bin folder".to_owned());
    };
    let found = format!("{} at {}", VERSION, file.display());
    match Cmd::new(&file).arg("--version").probe() {
        Some(said) if said.split_whitespace().last() == Some(VERSION) => Ok(found),
        Some(said) => Err(format!("{} is {}, {VERSION} is needed", file.display(), said.trim())),
        None => Err(format!("{} does not run", file.display())),
    }
}

fn install() -> Result<()> {
    println!("setup: compiling {LINKER} {VERSION} from crates.io (a minute or two)");
    let args = [LINKER, "--version", VERSION, "--locked", "--force"];
    // Outside of the repository, whose settings are not meant for it.
    Cmd::cargo("install").args(args).current_dir(Path::new("/")).run()?;
    match probe() {
        Ok(_) => Ok(()),
        Err(absence) => bail!("{LINKER} was installed, but {absence}"),
    }
}
