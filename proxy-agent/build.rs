//! Builds the eBPF objects, so that `cargo build -p proxy-agent` alone yields a working agent: one for devices with an
//! Ethernet header, one for those without.
//!
//! `FAIRLEAD_PREBUILT_EBPF=FILE` takes objects that were built elsewhere, for machines without the BPF tool chain: `cargo xtask
//! build` makes `fairlead-ebpf.o` and, beside it, `fairlead-ebpf-flat.o`. FILE names the first, and the other one is found by it.

use std::env;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

const PREBUILT: &str = "FAIRLEAD_PREBUILT_EBPF";

fn main() -> ExitCode {
    println!("cargo::rerun-if-env-changed={PREBUILT}");
    let objects = match env::var_os(PREBUILT).map(PathBuf::from) {
        Some(file) => prebuilt(file),
        None => build(&[]).and_then(|object| Ok([object, build(&["flat"])?])),
    };
    match objects {
        Ok([object, flat]) => {
            // rustc notices by itself when a file that it includes changes.
            println!("cargo::rustc-env=FAIRLEAD_EBPF_OBJECT={}", object.display());
            println!("cargo::rustc-env=FAIRLEAD_EBPF_OBJECT_FLAT={}", flat.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("the eBPF objects cannot be built: {error}");
            ExitCode::FAILURE
        }
    }
}

fn prebuilt(file: PathBuf) -> Result<[PathBuf; 2], String> {
    let flat = proxy_ebpf_build::flat_beside(&file);
    let files = [file, flat];
    match files.iter().find(|file| !file.is_file()) {
        Some(file) => Err(format!("{PREBUILT}: there is no file {}", file.display())),
        None => Ok(files),
    }
}

fn build(kind: &[&str]) -> Result<PathBuf, String> {
    let variable = |name| env::var_os(name).map(PathBuf::from).ok_or(format!("cargo did not set {name}"));
    let manifest = variable("CARGO_MANIFEST_DIR")?;
    let workspace = manifest.parent().ok_or("proxy-agent lies in no workspace")?;
    for input in ["proxy-ebpf", "proxy-common/src", "proxy-common/Cargo.toml", "Cargo.lock"] {
        println!("cargo::rerun-if-changed={}", workspace.join(input).display());
    }
    let out = variable("OUT_DIR")?;
    // <target>/<profile>/build/<crate>/out: beside the profiles, so that they share one object.
    let target = out.ancestors().nth(4).unwrap_or(Path::new(&out)).join("ebpf");
    // Faults of the programs come with those of the agent, from a folder of their own.
    let mutants = env::var_os("CARGO_FEATURE_MUTANTS").is_some();
    let target = if mutants { target.join("mutants") } else { target };
    let faults: &[&str] = if mutants { &["mutants"] } else { &[] };
    let features = [faults, kind].concat();
    let options = proxy_ebpf_build::Options {
        workspace,
        target_dir: &target,
        features: &features,
        opt_level: None,
        subcommand: "build",
    };
    let built = proxy_ebpf_build::build(&options).map_err(|e| e.to_string())?;
    Ok(built.object)
}
