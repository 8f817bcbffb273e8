//! bpf-linker: turns LLVM bitcode into the eBPF object, with BTF.

use anyhow::{Context as _, Result};

use super::Item;
use crate::machine;
use crate::process::Cmd;

const PROGRAM: &str = "bpf-linker";
/// The last release that reads the bitcode of LLVM 22 with the LLVM that comes with rustc; later ones want an LLVM 23 of their own.
const VERSION: &str = "0.10.3";

pub(super) fn item() -> Item {
    let found = match Cmd::new(PROGRAM).arg("--version").probe() {
        Some(said) if said.split_whitespace().last() == Some(VERSION) => Ok(format!("{PROGRAM} {VERSION}")),
        Some(said) => Err(format!("there is {}, which reads another LLVM than rustc writes", said.trim())),
        None => Err(format!("{PROGRAM} {VERSION} is not in PATH")),
    };
    Item { name: PROGRAM.into(), why: "links the eBPF object", state: found.into(), install }
}

fn install() -> Result<()> {
    println!("setup: compiling {PROGRAM} {VERSION} from crates.io (about a minute)");
    let mut cmd = Cmd::cargo("install").args([PROGRAM, "--version", VERSION, "--locked", "--force"]);
    // rustup has put cargo's own folder into PATH. Without it, /usr/local is where root's programs are found by everyone.
    let rustup = std::env::var_os("RUSTUP_TOOLCHAIN").is_some();
    if !rustup && machine::is_root() {
        cmd = cmd.args(["--root", "/usr/local"]);
    }
    cmd.current_dir(std::path::Path::new("/")).run()?;
    Cmd::new(PROGRAM).arg("--version").probe().map(drop).with_context(|| {
        format!("{PROGRAM} is installed, but not in PATH: add cargo's bin folder (~/.cargo/bin) to PATH")
    })
}
