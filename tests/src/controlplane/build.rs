//! Builds the Go programs of the tests, once per state of their sources.

use std::{
    fs::{self, File},
    hash::{DefaultHasher, Hasher as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    time::Instant,
};

use anyhow::{Context as _, Result, bail};

/// A Go module of the tests.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Module {
    /// Its name.
    name: &'static str,
    sources: &'static str,
    /// Its programs as packages: one in its root, which carries its name, and one in each folder below; or the tools of
    /// other modules that it names.
    packages: &'static str,
    /// The binaries: under `target`, where `cargo clean` finds them, yet shared by all of cargo's target folders.
    cache: &'static str,
}

/// The API server, kube-controller-manager and kube-proxy. A first build downloads Kubernetes' modules and takes minutes.
pub(super) const CONTROL_PLANE: Module = Module {
    name: "controlplane",
    sources: concat!(env!("CARGO_MANIFEST_DIR"), "/controlplane"),
    packages: "./...",
    cache: concat!(env!("CARGO_MANIFEST_DIR"), "/../target/controlplane"),
};

/// What renders `deploy`.
pub(crate) const KUSTOMIZE: Module = Module {
    name: "kustomize",
    sources: concat!(env!("CARGO_MANIFEST_DIR"), "/kustomize"),
    packages: "./...",
    cache: concat!(env!("CARGO_MANIFEST_DIR"), "/../target/kustomize"),
};

/// Plugins of the Container Network Interface.
pub(crate) const CNI: Module = Module {
    name: "cni",
    sources: concat!(env!("CARGO_MANIFEST_DIR"), "/cni"),
    packages: "tool",
    cache: concat!(env!("CARGO_MANIFEST_DIR"), "/../target/cni"),
};

impl Module {
    /// The program in the module's root, built if need be.
    pub(crate) fn program(self) -> Result<PathBuf> {
        programs(self).map(|folder| folder.join(self.name))
    }
}

/// The folder with the programs of a module, built if need be.
pub(crate) fn programs(module: Module) -> Result<PathBuf> {
    let cache = Path::new(module.cache);
    let folder = cache.join(format!("{:016x}", fingerprint(Path::new(module.sources))?));
    if folder.exists() {
        return Ok(folder);
    }
    go_version()?;
    fs::create_dir_all(cache).with_context(|| format!("cannot make {}", cache.display()))?;
    // One build at a time, also between processes; who waited finds the programs there.
    let lock_path = cache.join("lock");
    let lock = File::create(&lock_path).with_context(|| format!("cannot open {}", lock_path.display()))?;
    lock.lock().with_context(|| format!("cannot lock {}", lock_path.display()))?;
    if !folder.exists() {
        build(module, &folder)?;
        forget_others(module, &folder);
    }
    Ok(folder)
}

/// A number that changes with the sources. A different compiler's number only costs a rebuild.
fn fingerprint(sources: &Path) -> Result<u64> {
    let mut files = Vec::new();
    list(sources, &mut files)?;
    files.sort();
    let mut hasher = DefaultHasher::new();
    for path in files {
        let text = fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?;
        hasher.write(path.strip_prefix(sources).unwrap_or(&path).as_os_str().as_encoded_bytes());
        hasher.write_usize(text.len());
        hasher.write(&text);
    }
    Ok(hasher.finish())
}

/// The files of a module that a build reads.
fn list(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let reading = || format!("cannot read the sources in {}", folder.display());
    for entry in fs::read_dir(folder).with_context(reading)? {
        let path = entry.with_context(reading)?.path();
        let extension = path.extension().unwrap_or_default();
        if path.is_dir() {
            list(&path, files)?;
        } else if ["go", "mod", "sum"].iter().any(|known| extension == *known) {
            files.push(path);
        }
    }
    Ok(())
}

fn go_version() -> Result<String> {
    let output = Command::new("go").arg("version").stdin(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned()),
        _ => bail!(
            "Go is missing (`go version` does not run): install Go 1.26 or newer, or set KUBEBUILDER_ASSETS to a folder with {}",
            super::programs::NAMES.join(", ")
        ),
    }
}

fn build(module: Module, folder: &Path) -> Result<()> {
    let began = Instant::now();
    let unfinished = folder.with_extension("unfinished");
    fs::create_dir_all(&unfinished).with_context(|| format!("cannot make {}", unfinished.display()))?;
    let mut command = Command::new("go");
    command
        .current_dir(module.sources)
        // No debug information: a third of the size and of the linker's time.
        .args(["build", "-buildvcs=false", "-mod=readonly", "-ldflags=-s -w", "-o"])
        .arg(&unfinished)
        .arg(module.packages)
        // A lazier garbage collector saves a quarter of the compiler's time.
        .env("GOGC", "400")
        .stdin(Stdio::null());
    let output = command.output().with_context(|| format!("cannot run {command:?}"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        let lines: Vec<_> = complaint.lines().collect();
        let tail = lines[lines.len().saturating_sub(10)..].join("\n");
        bail!("{command:?} in {} failed ({}) with {}:\n{tail}", module.sources, output.status, go_version()?);
    }
    fs::rename(&unfinished, folder)
        .with_context(|| format!("cannot rename {} to {}", unfinished.display(), folder.display()))?;
    eprintln!("built {} in {:.0?}: {}", module.name, began.elapsed(), folder.display());
    Ok(())
}

/// Removes the programs of earlier states of the sources: they have hundreds of megabytes.
fn forget_others(module: Module, kept: &Path) {
    for entry in fs::read_dir(module.cache).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() && path != kept {
            // One that is in use stays readable for who has it open; one that cannot be removed costs only space.
            fs::remove_dir_all(path).ok();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fingerprint_follows_the_content_and_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("main.go"), "package main").unwrap();
        let first = fingerprint(dir.path()).unwrap();
        fs::write(dir.path().join("notes.txt"), "not a source").unwrap();
        assert_eq!(fingerprint(dir.path()).unwrap(), first);
        fs::write(dir.path().join("main.go"), "package main // changed").unwrap();
        let second = fingerprint(dir.path()).unwrap();
        assert_ne!(second, first);
        fs::create_dir(dir.path().join("another")).unwrap();
        fs::write(dir.path().join("another/main.go"), "package main").unwrap();
        assert_ne!(fingerprint(dir.path()).unwrap(), second, "a program in a folder below counts, too");
    }

    #[test]
    fn a_folder_that_is_missing_is_named() {
        let error = fingerprint(Path::new("/nonexistent/sources")).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent/sources"), "{error:#}");
    }
}
