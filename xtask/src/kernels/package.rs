//! A kernel's package: which one, fetched by apt with Debian's signatures, unpacked beside the build and installed
//! nowhere.

use std::fs;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};

use super::{KEYRING, Kernel, Unpacked};
use crate::machine;
use crate::process::Cmd;

/// The suite that has all of [`super::KERNELS`]; its list is small.
const SUITE: &str = "http://deb.debian.org/debian-security bookworm-security main";
/// Written last: what an unpacked package is.
const STAMP: &str = "unpacked";

/// A package as the signed list describes it.
#[derive(Debug, PartialEq, Eq)]
struct Listed {
    file: String,
    sha256: String,
}

/// A kernel that was fetched before.
pub(super) fn unpacked(folder: &Path) -> Option<Unpacked> {
    let stamp = fs::read_to_string(folder.join(STAMP)).ok()?;
    let release = stamp.lines().next()?.to_owned();
    let found = Unpacked { release, root: folder.join("root") };
    (found.image().is_file() && found.modules().is_dir()).then_some(found)
}

/// Fetches kernels. apt checks the list's signature and each package's checksum; its own state stays in `folder`, so
/// that this machine's sources and lists are left alone.
pub(super) fn fetch(folder: &Path, kernels: &[Kernel]) -> Result<()> {
    let state = folder.join("apt");
    for dir in ["lists/partial", "cache/archives/partial"] {
        fs::create_dir_all(state.join(dir)).context("no room for apt's lists")?;
    }
    fs::write(state.join("sources.list"), format!("deb [arch=amd64 signed-by={KEYRING}] {SUITE}\n"))?;
    Cmd::new("apt-get").args(options(&state)).arg("update").run()?;
    for kernel in kernels {
        fetch_one(&state, *kernel).with_context(|| format!("Linux {}", kernel.series))?;
    }
    Ok(())
}

/// What makes apt look at nothing but our own sources, whatever the machine is.
fn options(state: &Path) -> Vec<String> {
    let path = |name: &str| state.join(name).display().to_string();
    [
        ("Dir::Etc::SourceList", path("sources.list")),
        ("Dir::Etc::SourceParts", "/dev/null".to_owned()),
        ("Dir::State", path("")),
        ("Dir::Cache", path("cache")),
        ("APT::Architecture", "amd64".to_owned()),
        ("APT::Architectures", "amd64".to_owned()),
        ("APT::Sandbox::User", "root".to_owned()),
        ("APT::Update::Error-Mode", "any".to_owned()),
        ("Acquire::Languages", "none".to_owned()),
        ("Acquire::IndexTargets::deb::DEP-11::DefaultEnabled", "false".to_owned()),
    ]
    .into_iter()
    .flat_map(|(name, value)| ["-o".to_owned(), format!("{name}={value}")])
    .collect()
}

fn fetch_one(state: &Path, kernel: Kernel) -> Result<()> {
    let shown = Cmd::new("apt-cache")
        .args(options(state))
        .args(["show", "--no-all-versions", kernel.meta])
        .probe()
        .with_context(|| format!("the list has no {}", kernel.meta))?;
    let (package, release) = newest(&shown, kernel.series)?;
    let listed = Cmd::new("apt-get")
        .args(options(state))
        .args(["download", "--print-uris", &package])
        .probe()
        .with_context(|| format!("the list has no {package}"))?;
    let listed = parse_uri(&listed).with_context(|| format!("apt-get describes {package} as {listed:?}"))?;
    let folder = kernel.folder();
    if folder.exists() {
        fs::remove_dir_all(&folder).with_context(|| format!("cannot remove {}", folder.display()))?;
    }
    fs::create_dir_all(&folder)?;
    Cmd::new("apt-get").args(options(state)).args(["download", "-qq", &package]).current_dir(&folder).run()?;
    let file = folder.join(&listed.file);
    verify(&file, &listed.sha256)?;
    let root = folder.join("root");
    Cmd::new("dpkg-deb").arg("-x").arg(&file).arg(&root).run()?;
    // The package's own script would do this where it is installed.
    let depmod = machine::which("depmod").context("depmod is not installed (package kmod)")?;
    Cmd::new(depmod).arg("-b").arg(&root).arg(&release).run()?;
    fs::remove_file(&file)?;
    fs::write(folder.join(STAMP), format!("{release}\n{} {}\n", listed.file, listed.sha256))?;
    unpacked(&folder).with_context(|| format!("{} holds no kernel {release}", listed.file))?;
    Ok(())
}

/// Package and release of the kernel that a meta-package depends on.
fn newest(shown: &str, series: &str) -> Result<(String, String)> {
    let depends = shown.lines().find_map(|line| line.strip_prefix("Depends: ")).context("it depends on nothing")?;
    let package = depends
        .split(", ")
        .filter_map(|dependency| dependency.split_whitespace().next())
        .find(|name| name.starts_with("linux-image-"))
        .with_context(|| format!("it depends on no kernel, but on {depends}"))?;
    let release = package.trim_start_matches("linux-image-");
    let rest = release.strip_prefix(series);
    ensure!(rest.is_some_and(|rest| rest.starts_with('.')), "the newest one is {release}, which is not {series}");
    Ok((package.to_owned(), release.to_owned()))
}

/// One line of `apt-get --print-uris`: 'URI' FILE SIZE SHA256:SUM.
fn parse_uri(line: &str) -> Option<Listed> {
    let mut words = line.split_whitespace().skip(1);
    let file = words.next()?.to_owned();
    let sha256 = words.find_map(|word| word.strip_prefix("SHA256:"))?.to_owned();
    (!file.contains('/')).then_some(Listed { file, sha256 })
}

fn verify(file: &Path, sha256: &str) -> Result<()> {
    let said = Cmd::new("sha256sum").arg(file).probe().with_context(|| format!("cannot read {}", file.display()))?;
    let found = said.split_whitespace().next().unwrap_or_default();
    if found != sha256 {
        bail!(
            "{} has the checksum {found}, and the signed list says {sha256}: remove it and try again",
            file.display()
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    const META: &str = "Package: linux-image-amd64\nVersion: 6.1.192-2\n\
                        Depends: linux-base (>= 4.3), linux-image-6.1.0-56-amd64 (= 6.1.192-2)\n";

    #[test]
    fn the_meta_package_names_the_newest_kernel() {
        let (package, release) = newest(META, "6.1").unwrap();
        assert_eq!((package.as_str(), release.as_str()), ("linux-image-6.1.0-56-amd64", "6.1.0-56-amd64"));
    }

    #[test]
    fn a_kernel_of_another_series_is_refused() {
        let error = newest(META, "6.12").unwrap_err().to_string();
        assert!(error.contains("6.1.0-56-amd64, which is not 6.12"), "{error}");
        let later = META.replace("6.1.0-56", "6.12.117");
        assert!(newest(&later, "6.1").is_err());
        assert!(newest("Package: linux-image-amd64\n", "6.1").is_err());
    }

    #[test]
    fn apt_names_the_file_and_its_checksum() {
        let listed = parse_uri("'http://deb.debian.org/x/linux%2bdeb12.deb' linux-image.deb 107179464 SHA256:12ab\n");
        assert_eq!(listed, Some(Listed { file: "linux-image.deb".into(), sha256: "12ab".into() }));
        assert_eq!(parse_uri("'http://deb.debian.org/x.deb' x.deb 1 MD5Sum:12ab"), None);
        assert_eq!(parse_uri("'http://deb.debian.org/x.deb' ../x.deb 1 SHA256:12ab"), None);
        assert_eq!(parse_uri(""), None);
    }

    #[test]
    fn a_file_with_another_checksum_is_refused_by_name() {
        let file = std::env::temp_dir().join(format!("fairlead-kernel-{}.deb", std::process::id()));
        fs::write(&file, "abc").unwrap();
        let right = verify(&file, "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        let wrong = verify(&file, "00");
        fs::remove_file(&file).unwrap();
        right.unwrap();
        let error = wrong.unwrap_err().to_string();
        assert!(error.contains(&file.display().to_string()) && error.contains("signed list says 00"), "{error}");
    }

    #[test]
    fn half_an_unpacked_kernel_is_none() {
        let folder = std::env::temp_dir().join(format!("fairlead-unpacked-{}", std::process::id()));
        fs::create_dir_all(folder.join("root/lib/modules")).unwrap();
        fs::write(folder.join(STAMP), "6.1.0-56-amd64\n").unwrap();
        let half = unpacked(&folder);
        fs::create_dir_all(folder.join("root/boot")).unwrap();
        fs::write(folder.join("root/boot/vmlinuz-6.1.0-56-amd64"), "").unwrap();
        let whole = unpacked(&folder);
        fs::remove_dir_all(&folder).unwrap();
        assert!(half.is_none());
        assert_eq!(whole.map(|found| found.release).as_deref(), Some("6.1.0-56-amd64"));
    }
}
