//! Builds the eBPF object with whichever tool chain this machine has; used by xtask and by the agent's build script.
//!
//! `bpfel-unknown-none` has no `core` in a stable rustup tool chain. Two ways lead to one:
//! Debian's rustc, for which `libstd-rust-web-dev-bpf` brings a ready-made `core`, or a rustup nightly with
//! `rust-src`, which compiles `core` itself. Both are tried in this order.

use std::env;
use std::ffi::OsString;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::Command;

/// The target triple of the object.
pub const TARGET: &str = "bpfel-unknown-none";
/// Debian's rustc; rustup's shims come first in `PATH`, so it is named by its path.
const DEBIAN_RUSTC: &str = "/usr/bin/rustc";
/// Program that links the object.
pub const LINKER: &str = "bpf-linker";
/// Nightlies that may build `core`, the best first. The dated one is the last seen to write the bitcode of LLVM 22,
/// which is what the linker reads; one without a date is taken as it is found.
pub const NIGHTLIES: [&str; 2] = ["nightly-2026-05-20", "nightly"];

/// Where `core` for BPF comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Core {
    /// Debian's rustc and its ready-made `core`.
    Debian,
    /// A rustup nightly that builds `core` from `rust-src`: the name of its tool chain.
    Nightly(&'static str),
}

impl Core {
    /// The one this machine offers, or why there is none.
    pub fn find() -> Result<Self, Error> {
        if rustlib(Command::new(DEBIAN_RUSTC)).is_some_and(|dir| dir.join(TARGET).is_dir()) {
            return Ok(Self::Debian);
        }
        let has_source = |name: &&str| {
            let mut nightly = Command::new("rustup");
            nightly.args(["run", name, "rustc"]);
            rustlib(nightly).is_some_and(|dir| dir.join("src/rust/library/core/Cargo.toml").is_file())
        };
        if let Some(name) = NIGHTLIES.into_iter().find(has_source) {
            return Ok(Self::Nightly(name));
        }
        Err(Error::NoCore)
    }

    /// One line for people.
    pub const fn describe(&self) -> &'static str {
        match self {
            Self::Debian => "Debian's rustc with the core of libstd-rust-web-dev-bpf",
            Self::Nightly(_) => "rustup's nightly with core built from rust-src",
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
    /// The linker is not installed.
    NoLinker,
    /// The linker would find no LLVM.
    NoLlvm {
        /// What was tried.
        tried: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// Cargo could not be started.
    Spawn {
        /// The command line.
        command: String,
        /// What the system said.
        source: std::io::Error,
    },
    /// The object cannot be put where it stays.
    Keep {
        /// Where.
        path: PathBuf,
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
            Self::NoLinker => {
                write!(f, "{LINKER} is neither in PATH nor in cargo's bin folder; `./x setup` installs it")
            }
            Self::NoLlvm { tried, source } => write!(f, "cannot show {LINKER} the LLVM of rustc: {tried}: {source}"),
            Self::Keep { path, source } => write!(f, "cannot keep the object as {}: {source}", path.display()),
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
    /// Another optimisation level than the profile's: other programs over the same maps, as another compiler makes them.
    pub opt_level: Option<&'a str>,
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
    let linker = linker().ok_or(Error::NoLinker)?;
    let _lock = lock(options.target_dir)?;
    let mut command = cargo(&core, options, &linker);
    if core == Core::Debian {
        command.env("LD_LIBRARY_PATH", llvm_folder(options.target_dir)?);
    }
    let line = shown(&core, &command);
    let status = command.status().map_err(|source| Error::Spawn { command: line.clone(), source })?;
    if !status.success() {
        return Err(Error::Failed { command: line, status });
    }
    let built = options.target_dir.join(TARGET).join("bpf").join("fairlead-ebpf");
    let object = if options.subcommand == "build" { keep(&built, options)? } else { built };
    Ok(Built { object, core })
}

/// One at a time in a folder: cargo's own lock ends before the object is copied.
fn lock(folder: &Path) -> Result<File, Error> {
    let path = folder.join("objects.lock");
    let lock = || {
        std::fs::create_dir_all(folder)?;
        let file = File::create(&path)?;
        file.lock()?;
        Ok(file)
    };
    lock().map_err(|source| Error::Keep { path: path.clone(), source })
}

/// Copies the object to where it stays. Cargo gives the objects of all features the same name, and they share what they
/// depend on in one folder. One that has not changed keeps its time, and a reader sees the old or the new.
fn keep(built: &Path, options: &Options<'_>) -> Result<PathBuf, Error> {
    let folder = options.target_dir.join("objects");
    let kept = folder.join(object_name(options.features));
    let keep = || {
        let object = std::fs::read(built)?;
        if std::fs::read(&kept).is_ok_and(|held| held == object) {
            return Ok(());
        }
        std::fs::create_dir_all(&folder)?;
        let new = kept.with_extension("new");
        std::fs::write(&new, object)?;
        std::fs::rename(&new, &kept)
    };
    keep().map_err(|source| Error::Keep { path: kept.clone(), source })?;
    Ok(kept)
}

/// What the object with these features is called.
pub fn object_name(features: &[&str]) -> String {
    let name = [&["fairlead-ebpf"], features].concat().join("-");
    format!("{name}.o")
}

/// Where the object for devices without Ethernet is that was built beside this one: `fairlead-ebpf-flat.o`.
pub fn flat_beside(object: &Path) -> PathBuf {
    let mut name = object.file_stem().unwrap_or_default().to_owned();
    name.push("-flat");
    if let Some(extension) = object.extension() {
        name.push(".");
        name.push(extension);
    }
    object.with_file_name(name)
}

/// The linker's file: in `PATH`, or where `cargo install` puts it, which a bare machine's `PATH` lacks.
pub fn linker() -> Option<PathBuf> {
    let cargo_home = env::var_os("CARGO_HOME")
        .map(PathBuf::from)
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cargo")));
    let path = env::var_os("PATH").unwrap_or_default();
    let folders = env::split_paths(&path).chain(cargo_home.map(|home| home.join("bin")));
    folders.map(|folder| folder.join(LINKER)).find(|file| file.is_file())
}

/// A folder with nothing but the LLVM that Debian's rustc itself runs with.
///
/// The linker opens the first file called `libLLVM*` that it meets in the folders of `LD_LIBRARY_PATH`, then beside
/// `PATH`. Debian keeps its libraries, of several LLVM versions perhaps, in a folder that is in neither.
fn llvm_folder(target_dir: &Path) -> Result<PathBuf, Error> {
    let fail = |tried: String| move |source| Error::NoLlvm { tried, source };
    let tried = || format!("ldd {DEBIAN_RUSTC}");
    let output = Command::new("ldd").arg(DEBIAN_RUSTC).output().map_err(fail(tried()))?;
    let library = llvm_of(&String::from_utf8_lossy(&output.stdout))
        .ok_or_else(|| fail(tried())(std::io::Error::other("it names no libLLVM")))?;
    // One folder for each version: build scripts of several profiles may come here at the same time.
    let name = library.file_name().unwrap_or_default();
    let folder = target_dir.join("llvm").join(name);
    let link = folder.join(name);
    std::fs::create_dir_all(&folder).map_err(fail(format!("creating {}", folder.display())))?;
    match std::os::unix::fs::symlink(&library, &link) {
        Err(error) if error.kind() != std::io::ErrorKind::AlreadyExists => {
            Err(fail(format!("linking {}", link.display()))(error))
        }
        _ => std::path::absolute(&folder).map_err(fail(folder.display().to_string())),
    }
}

/// The path in a line `libLLVM.so.22.1 => /lib/x86_64-linux-gnu/libLLVM.so.22.1 (0x00007f0000000000)`.
fn llvm_of(ldd: &str) -> Option<PathBuf> {
    let line = ldd.lines().find(|line| line.trim_start().starts_with("libLLVM"))?;
    line.split_whitespace().find(|word| word.starts_with('/')).map(PathBuf::from)
}

fn cargo(core: &Core, options: &Options<'_>, linker: &Path) -> Command {
    let mut command = match core {
        Core::Debian => {
            let mut command = Command::new(env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
            command.env("RUSTC", DEBIAN_RUSTC).env("RUSTC_BOOTSTRAP", "1");
            command
        }
        Core::Nightly(name) => {
            let mut command = Command::new("rustup");
            command.args(["run", name, "cargo"]).env_remove("RUSTC");
            command
        }
    };
    command.current_dir(options.workspace);
    command.args([options.subcommand, "--locked", "--package", "proxy-ebpf", "--bin", "fairlead-ebpf"]);
    command.args(["--profile", "bpf", "--target", TARGET, "--target-dir"]).arg(options.target_dir);
    if matches!(core, Core::Nightly(_)) {
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
    if let Some(level) = options.opt_level {
        command.env("CARGO_PROFILE_BPF_OPT_LEVEL", level);
    }
    let linker = format!("-Clinker={}", linker.display());
    let flags = [linker.as_str(), "-Clink-arg=--btf", "-Cdebuginfo=2", "-Ctarget-cpu=v3"];
    command.env("CARGO_ENCODED_RUSTFLAGS", flags.join("\u{1f}"));
    command
}

/// The command as a person would type it; the settings that are taken out of its environment would hide it.
fn shown(core: &Core, command: &Command) -> String {
    let settings =
        if *core == Core::Debian { format!("RUSTC={DEBIAN_RUSTC} RUSTC_BOOTSTRAP=1 ") } else { String::new() };
    let program = Path::new(command.get_program()).file_name().unwrap_or_default().to_string_lossy();
    let args: Vec<_> = command.get_args().map(|arg| arg.to_string_lossy()).collect();
    format!("{settings}{program} {}", args.join(" "))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_llvm_of_a_program_is_read_from_ldd() {
        let ldd = "\tlibc.so.6 => /lib/libc.so.6 (0x01)\n\tlibLLVM.so.22.1 => /lib/libLLVM.so.22.1 (0x02)\n";
        assert_eq!(llvm_of(ldd), Some(PathBuf::from("/lib/libLLVM.so.22.1")));
        assert_eq!(llvm_of("\tlibc.so.6 => /lib/libc.so.6 (0x01)\n"), None);
        assert_eq!(llvm_of("\tlibLLVM.so.22.1 => not found\n"), None);
    }

    #[test]
    fn the_other_object_is_found_beside_the_first() {
        let [object, flat] = [object_name(&[]), object_name(&["flat"])].map(|name| Path::new("objects").join(name));
        assert_eq!(flat_beside(&object), flat);
        assert_eq!(flat_beside(Path::new("x/no-object")), Path::new("x/no-object-flat"));
    }

    #[test]
    fn settings_of_the_calling_cargo_do_not_leak() {
        for name in ["RUSTFLAGS", "CARGO_FEATURE_USER", "CARGO_CFG_TARGET_OS", "CARGO_TARGET_DIR", "RUSTUP_TOOLCHAIN"] {
            assert!(leaks(&name.into()), "{name}");
        }
        for name in ["PATH", "HOME", "CARGO_HOME", "RUSTUP_HOME", "CARGO_NET_OFFLINE"] {
            assert!(!leaks(&name.into()), "{name}");
        }
    }
}
