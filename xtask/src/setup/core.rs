//! A `core` for `bpfel-unknown-none`: Debian's ready-made one, or a nightly that compiles it from `rust-src`.

use anyhow::{Result, bail};
use proxy_ebpf_build::{Core, NIGHTLIES};

use super::{Item, apt};
use crate::machine;
use crate::process::Cmd;

/// Packages that belong together: the compiler, and its `core` for BPF. `-web` is what stable releases get for their browsers.
const PAIRS: [(&str, &str); 2] = [("rustc-web", "libstd-rust-web-dev-bpf"), ("rustc", "libstd-rust-dev-bpf")];
/// The oldest rustc that compiles the workspace.
const OLDEST: (u32, u32) = (1, 95);

pub(super) fn item() -> Item {
    let found = Core::find().map(|core| core.describe().to_owned()).map_err(|error| error.to_string());
    Item {
        name: "core for BPF".into(),
        why: "the eBPF object is Rust without an operating system",
        state: found.into(),
        install,
    }
}

fn install() -> Result<()> {
    let mut tried = Vec::new();
    match apt::usable() {
        Ok(()) => match from_packages() {
            Ok(()) => return Ok(()),
            Err(error) => tried.push(format!("{error:#}")),
        },
        Err(reason) => tried.push(reason.to_owned()),
    }
    if machine::which("rustup").is_some() {
        println!("setup: taking the rustup way: a nightly that compiles core from rust-src ({})", tried.join("; "));
        let result = Cmd::new("rustup")
            .args(["toolchain", "install", NIGHTLIES[0], "--profile", "minimal", "--component", "rust-src"])
            .run();
        match result {
            Ok(()) => return Ok(()),
            Err(error) => tried.push(format!("{error:#}")),
        }
    } else {
        tried.push("there is no rustup".into());
    }
    bail!("neither way is open: {}", tried.join("; "))
}

fn from_packages() -> Result<()> {
    apt::update();
    for (compiler, library) in PAIRS {
        let (Some(version), Some(_)) = (apt::candidate(compiler), apt::candidate(library)) else { continue };
        if is_new_enough(&version) {
            println!(
                "setup: taking the Debian way: {compiler} {version} has a ready-made core, so no nightly is needed"
            );
            return apt::install(&[compiler, library]);
        }
    }
    bail!(
        "no package of this distribution has a core for BPF of rustc {}.{} or newer (Debian 12 has one in its security suite)",
        OLDEST.0,
        OLDEST.1
    )
}

fn is_new_enough(version: &str) -> bool {
    let mut numbers = version.split(['.', '+', '-', '~']).map_while(|part| part.parse().ok());
    numbers.next().zip(numbers.next()).is_some_and(|found: (u32, u32)| found >= OLDEST)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        assert!(is_new_enough("1.96.0+dfsg1-1~deb12u2"));
        assert!(is_new_enough("1.100.0"));
        assert!(is_new_enough("2.0"));
        assert!(!is_new_enough("1.85.0+dfsg3-1~deb12u3"));
        assert!(!is_new_enough("1.9"));
        assert!(!is_new_enough("unknown"));
    }
}
