//! Builds the eBPF object with whichever tool chain this machine has; used by xtask and by the agent's build script.
//!
//! `bpfel-unknown-none` has no `core` in a stable rustup tool chain. Two ways lead to one:
//! Debian's rustc, for which `libstd-rust-web-dev-bpf` brings a ready-made `core`, or a rustup nightly with
//! `rust-src`, which compiles `core` itself. Both are tried in this order.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The target triple of the object.
pub const TARGET: &str = "bpfel-unknown-none";
/// Debian's rustc; rustup's shims come first in `PATH`, so it is named by its path.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// Program that links the object.
const LINKER: &str = "bpf-linker";

/// Where `core` for BPF comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Core {
    /// Debian's rustc and its ready-made `core`.
    Debian,
    /// A rustup nightly that builds `core` from `rust-src`.
    Nightly,
}

impl Core {
    /// The one this machine offers, or why there is none.
    pub fn find() -> Result<Self, Error> {
        if rustlib(Command::new(DEBIAN_RUSTC)).is_some_and(|dir| dir.join(TARGET).is_dir()) {
            return Ok(Self::Debian);
        }
        let mut nightly = Command::new("rustup");
        nightly.args(["run", "nightly", "rustc"]);
        if rustlib(nightly).is_some_and(|dir| dir.join("src/rust/library/core/Cargo.toml").is_file()) {
            return Ok(Self::Nightly);
        }
        Err(Error::NoCore)
    }

    /// One line for people.
    pub const fn describe(&self) -> &'static str {
        match self {
            Self::Debian => "Debian's rustc with the core of libstd-rust-web-dev-bpf",
            Self::Nightly => "rustup's nightly with core built from rust-src",
        }
    }
}

/// `lib/rustlib` of a compiler, if it runs at all.
fn rustlib(mut rustc: Command) -> Option<PathBuf> {
    let output = rustc.args(["--print", "sysroot"]).env_remove("RUSTUP_TOOLCHAIN").output().ok()?;
    let sysroot = String::from_utf8(output.stdout).ok()?;
    output.status.success().then(|| Path::new(sysroot.trim()).join("lib/rustlib"))
}

/// Why there is no object.
#[derive(Debug)]
pub enum Error {
    /// Neither way to `core` is open.
    NoCore,
    /// The linker does not run.
    NoLinker(std::io::Error),
    /// Cargo could not be started.
    Spawn {
        /// The command line.
        command: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Cargo failed; its own messages stand above.
    Failed {
        /// The command line.
        command: String,
        /// Its exit status.
        status: std::process::ExitStatus,
    },
}

impl std::fmt::Display for Error {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::NoCore => write!(
                f,
                "no `core` for {TARGET}: neither {DEBIAN_RUSTC} has one (Debian: apt-get install rustc-web \
                 libstd-rust-web-dev-bpf) nor a rustup nightly with rust-src; `./x setup` installs what is missing"
            ),
            Self::NoLinker(source) => write!(f, "{LINKER} does not run ({source}); `./x setup` installs it"),
            Self::Spawn { command, source } => write!(f, "could not start `{command}`: {source}"),
            Self::Failed { command, status } => write!(f, "`{command}` failed: {status}"),
        }
    }
}

impl std::error::Error for Error {}

/// What to build, and where.
#[derive(Clone, Debug)]
pub struct Options<'a> {
    /// The workspace's root.
    pub workspace: &'a Path,
    /// Target directory of its own: the caller may be a build script, and cargo holds a lock on its directory.
    pub target_dir: &'a Path,
    /// Cargo features of `proxy-ebpf`.
    pub features: &'a [&'a str],
    /// Cargo subcommand: `build`, `check` or `clippy`.
    pub subcommand: &'a str,
}

/// A built object.
#[derive(Clone, Debug)]
pub struct Built {
    /// The ELF file.
    pub object: PathBuf,
    /// The way to `core` that was taken.
    pub core: Core,
}

/// Builds the object and says how.
pub fn build(options: &Options<'_>) -> Result<Built, Error> {
    let core = Core::find()?;
    Command::new(LINKER).arg("--version").output().map_err(Error::NoLinker)?;
    let mut command = cargo(&core, options);
    let line = format!("{command:?}");
    let status = command.status().map_err(|source| Error::Spawn { command: line.clone(), source })?;
    if !status.success() {
        return Err(Error::Failed { command: line, status });
    }
    let object = options.target_dir.join(TARGET).join("bpf").join("fairlead-ebpf");
    Ok(Built { object, core })
}

fn cargo(core: &Core, options: &Options<'_>) -> Command {
    let mut command = match core {
        Core::Debian => {
            let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
            command
        }
        Core::Nightly => {
            let mut command = Command::new("rustup");
            command.args(["run", "nightly", "cargo"]).env_remove("RUSTC");
            command
        }
    };
    command.current_dir(options.workspace);
    command.args([options.subcommand, "--locked", "--package", "proxy-ebpf", "--bin", "fairlead-ebpf"]);
    command.args(["--profile", "bpf", "--target", TARGET, "--target-dir"]).arg(options.target_dir);
    if *core == Core::Nightly {
        command.args(["-Z", "build-std=core"]);
    }
    if !options.features.is_empty() {
        command.arg("--features").arg(options.features.join(","));
    }
    // A build script inherits its own cargo's settings; none of them is meant for this target.
    for (name, _) in env::vars_os() {
        if leaks(&name) {
            command.env_remove(&name);
        }
    }
    let flags = ["-Clinker=bpf-linker", "-Clink-arg=--btf", "-Cdebuginfo=2", "-Ctarget-cpu=v3"];
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    command
}

fn leaks(name: &OsString) -> bool {
    let name = name.to_string_lossy();
    matches!(
        name.as_ref(),
        "RUSTFLAGS"
            | "CARGO_ENCODED_RUSTFLAGS"
            | "RUSTC_WRAPPER"
            | "RUSTC_WORKSPACE_WRAPPER"
            | "RUSTUP_TOOLCHAIN"
            | "CARGO_BUILD_TARGET"
            | "CARGO_TARGET_DIR"
            | "RUSTC_LINKER"
            | "TARGET"
            | "HOST"
            | "OUT_DIR"
            | "PROFILE"
            | "OPT_LEVEL"
            | "DEBUG"
            | "CLIPPY_ARGS"
    ) || name.starts_with("CARGO_CFG_")
        || name.starts_with("CARGO_FEATURE_")
        || name.starts_with("CARGO_PROFILE_")
        || name.starts_with("CARGO_PKG_")
        || name.starts_with("CARGO_MANIFEST_")
}
