//! `image`: the OCI image, made without a daemon. One static program with the eBPF object inside, and nothing else.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use clap::{Args as ClapArgs, ValueEnum};

use crate::machine;
use crate::process::Cmd;
use crate::setup::{self, Need};

mod elf;

/// The most that an image may have: nodes pull it while they have no Services yet.
const LARGEST: u64 = 25_000_000;

/// Makes the OCI image as an archive that `podman load`, `ctr image import` and `skopeo copy` read.
#[derive(ClapArgs, Debug)]
pub(crate) struct Args {
    /// What it is to run on.
    #[arg(long, value_enum, default_value_t = Arch::host())]
    arch: Arch,
    /// Where to write it. Default: target/image/fairlead-ARCH.tar.
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
}

/// A processor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Arch {
    /// 64-bit x86.
    #[value(name = "x86_64")]
    X86,
    /// 64-bit Arm.
    #[value(name = "aarch64")]
    Arm,
}

impl Arch {
    pub(crate) const fn host() -> Self {
        if cfg!(target_arch = "aarch64") { Self::Arm } else { Self::X86 }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::X86 => "x86_64",
            Self::Arm => "aarch64",
        }
    }

    /// As OCI, after Go, calls it.
    const fn oci(self) -> &'static str {
        match self {
            Self::X86 => "amd64",
            Self::Arm => "arm64",
        }
    }

    /// Target of the program.
    pub(crate) const fn target(self) -> &'static str {
        match self {
            Self::X86 => "x86_64-unknown-linux-musl",
            Self::Arm => "aarch64-unknown-linux-musl",
        }
    }

    /// The one that this is not.
    pub(crate) const fn other(self) -> Self {
        match self {
            Self::X86 => Self::Arm,
            Self::Arm => Self::X86,
        }
    }

    /// Tells cargo how to compile for it on a machine with another processor.
    pub(crate) fn foreign(self, cmd: Cmd) -> Cmd {
        if self == Self::host() {
            return cmd;
        }
        // Rust's own linker and musl's objects, which come with the target; C is compiled by the distribution's compiler.
        let compiler = format!("CC_{}", self.target().replace('-', "_"));
        cmd.env(&self.variable("LINKER"), "rust-lld").env(&compiler, &format!("{}-linux-gnu-gcc", self.name()))
    }

    /// A setting of cargo's for its target.
    fn variable(self, suffix: &str) -> String {
        format!("CARGO_TARGET_{}_{suffix}", self.target().to_uppercase().replace('-', "_"))
    }
}

pub(crate) fn run(args: &Args) -> Result<()> {
    let output = args.output.as_deref().map(machine::as_given);
    let dir = machine::target_dir().join("image").join(args.arch.name());
    let output = output.unwrap_or_else(|| dir.with_file_name(format!("fairlead-{}.tar", args.arch.name())));
    let program = program(args.arch)?;
    let digest = pack(&program, args.arch, &dir, &output)?;
    let bytes = fs::metadata(&output).with_context(|| format!("no {}", output.display()))?.len();
    println!("{} ({:.1} MB): {digest}", output.display(), bytes as f64 / 1e6);
    ensure!(bytes <= LARGEST, "the image has {bytes} bytes, and {LARGEST} are the limit");
    Ok(())
}

/// The program that images hold, built and looked at.
pub(crate) fn program(arch: Arch) -> Result<PathBuf> {
    let program = build(arch)?;
    elf::check(&program, arch)?;
    try_out(&program, arch)?;
    Ok(program)
}

/// The program: static, and the same wherever it is built.
fn build(arch: Arch) -> Result<PathBuf> {
    setup::ensure(Need::Build)?;
    setup::ensure(Need::Image(arch))?;
    let target = arch.target();
    let cargo_home = std::env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".cargo"));
    let mut flags =
        vec!["-Cstrip=symbols".to_owned(), format!("--remap-path-prefix={}=/src", machine::root().display())];
    if let Some(cargo) = cargo_home.or(home) {
        flags.push(format!("--remap-path-prefix={}=/cargo", cargo.display()));
    }
    let cmd = Cmd::cargo("build")
        .args(["--locked", "--release", "--package", "proxy-agent", "--bin", "fairlead", "--target", target])
        .current_dir(&machine::root())
        .env(&arch.variable("RUSTFLAGS"), &flags.join(" "));
    arch.foreign(cmd).run()?;
    let program = machine::target_dir().join(target).join("release/fairlead");
    if !program.is_file() {
        bail!("the build succeeded, but there is no {}", program.display());
    }
    Ok(program)
}

/// Runs it, where this machine can: by itself, or by emulation (package qemu-user-static).
fn try_out(program: &Path, arch: Arch) -> Result<()> {
    let cmd = if arch == Arch::host() {
        Cmd::new(program)
    } else {
        let emulator = format!("qemu-{}-static", arch.name());
        let Some(emulator) = machine::which(&emulator) else {
            println!("image: not run, because there is no {emulator} here (package qemu-user-static)");
            return Ok(());
        };
        Cmd::new(emulator).arg(program)
    };
    let said = cmd.arg("--version").probe().unwrap_or_default();
    let expected = concat!("fairlead ", env!("CARGO_PKG_VERSION"));
    ensure!(said.starts_with(expected), "`fairlead --version` says {said:?}, not {expected:?}");
    println!("image: {}", said.trim());
    Ok(())
}

/// Writes the archive, and says the digest of its manifest. The same program gives the same archive.
fn pack(program: &Path, arch: Arch, dir: &Path, output: &Path) -> Result<String> {
    let making = || format!("cannot write below {}", dir.display());
    if dir.exists() {
        fs::remove_dir_all(dir).with_context(making)?;
    }
    let (root, layout) = (dir.join("root"), dir.join("layout"));
    let blobs = layout.join("blobs/sha256");
    fs::create_dir_all(&root).and_then(|()| fs::create_dir_all(&blobs)).with_context(making)?;
    fs::copy(program, root.join("fairlead")).with_context(making)?;
    let layer_file = dir.join("layer.tar");
    tar(&root, &["fairlead"], &layer_file)?;
    let layer = blob(&blobs, &layer_file)?;
    // Not compressed: what is pushed is compressed by whoever pushes it, and the layer's digest is that of its content.
    let config = format!(
        r#"{{"architecture":"{}","os":"linux","config":{{"Entrypoint":["/fairlead"]}},"rootfs":{{"type":"layers","diff_ids":["sha256:{}"]}}}}"#,
        arch.oci(),
        layer.digest
    );
    let config = text_blob(dir, &blobs, &config)?;
    let manifest = format!(
        r#"{{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{},"layers":[{}]}}"#,
        config.descriptor("application/vnd.oci.image.config.v1+json", ""),
        layer.descriptor("application/vnd.oci.image.layer.v1.tar", "")
    );
    let manifest = text_blob(dir, &blobs, &manifest)?;
    let more = format!(
        r#","platform":{{"architecture":"{}","os":"linux"}},"annotations":{{"org.opencontainers.image.ref.name":"{}"}}"#,
        arch.oci(),
        env!("CARGO_PKG_VERSION")
    );
    let index = manifest.descriptor("application/vnd.oci.image.manifest.v1+json", &more);
    let index = format!(r#"{{"schemaVersion":2,"manifests":[{index}]}}"#);
    fs::write(layout.join("index.json"), index).with_context(making)?;
    fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).with_context(making)?;
    tar(&layout, &["oci-layout", "index.json", "blobs"], output)?;
    Ok(format!("sha256:{}", manifest.digest))
}

/// A file of the layout, by its content.
struct Blob {
    digest: String,
    size: u64,
}

impl Blob {
    fn descriptor(&self, media_type: &str, more: &str) -> String {
        format!(r#"{{"mediaType":"{media_type}","digest":"sha256:{}","size":{}{more}}}"#, self.digest, self.size)
    }
}

fn text_blob(dir: &Path, blobs: &Path, text: &str) -> Result<Blob> {
    let file = dir.join("blob.json");
    fs::write(&file, text).with_context(|| format!("cannot write {}", file.display()))?;
    blob(blobs, &file)
}

/// Moves a file to where its digest says.
fn blob(blobs: &Path, file: &Path) -> Result<Blob> {
    let said = Cmd::new("sha256sum").arg(file).probe().context("sha256sum does not run")?;
    let digest = said.split(' ').next().unwrap_or_default().trim_start_matches('\\').to_owned();
    ensure!(digest.len() == 64, "sha256sum said {said:?}");
    let size = fs::metadata(file).with_context(|| format!("no {}", file.display()))?.len();
    fs::rename(file, blobs.join(&digest)).with_context(|| format!("cannot move {}", file.display()))?;
    Ok(Blob { digest, size })
}

/// An archive without anything of the machine that wrote it: no times, no owners, one order.
fn tar(dir: &Path, names: &[&str], output: &Path) -> Result<()> {
    Cmd::new("tar")
        .args(["--format=ustar", "--sort=name", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner"])
        .arg("--mode=u=rwX,go=rX")
        .arg("-cf")
        .arg(output)
        .arg("-C")
        .arg(dir)
        .args(names)
        .run()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_program_gives_the_same_image() {
        let dir = std::env::temp_dir().join(format!("xtask-image-{}", std::process::id()));
        fs::create_dir_all(&dir).unwrap();
        let program = dir.join("program");
        fs::write(&program, "program").unwrap();
        let made = |name: &str| {
            let output = dir.join(format!("{name}.tar"));
            let digest = pack(&program, Arch::X86, &dir.join(name), &output).unwrap();
            (digest, fs::read(output).unwrap())
        };
        let first = made("first");
        std::thread::sleep(std::time::Duration::from_millis(1_100));
        assert!(first == made("second"), "a later second, another folder");
        fs::write(&program, "another").unwrap();
        assert_ne!(first.0, made("third").0);

        // What the archive names is there.
        let index = fs::read_to_string(dir.join("first/layout/index.json")).unwrap();
        let digest = first.0.strip_prefix("sha256:").unwrap();
        assert!(index.contains(&first.0), "{index}");
        let manifest = fs::read_to_string(dir.join("first/layout/blobs/sha256").join(digest)).unwrap();
        let layer = manifest.rsplit("sha256:").next().unwrap().split('"').next().unwrap();
        let listed = Cmd::new("tar").arg("-tf").arg(dir.join("first/layout/blobs/sha256").join(layer)).probe();
        assert_eq!(listed.as_deref(), Some("fairlead\n"), "one program and nothing else");
        fs::remove_dir_all(&dir).unwrap();
    }
}
