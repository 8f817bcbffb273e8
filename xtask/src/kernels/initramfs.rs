//! What a kernel starts with: busybox, the modules that lead to this machine's files, and what is to be run there.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

use super::Unpacked;
use crate::machine;
use crate::process::Cmd;

/// Drivers of qemu's devices, and the file systems that the root is made of.
const MODULES: [&str; 5] = ["virtio_pci", "virtio_console", "9pnet_virtio", "9p", "overlay"];

const INIT: &str = include_str!("init.sh");
const GUEST: &str = include_str!("guest.sh");

/// Makes the archive in `folder`. `script` follows the words of `guest.sh`.
pub(super) fn make(kernel: &Unpacked, folder: &Path, script: &str) -> Result<PathBuf> {
    let tree = folder.join("initramfs");
    if tree.exists() {
        fs::remove_dir_all(&tree)?;
    }
    for dir in ["proc", "sys", "dev", "host", "writes", "root", "modules"] {
        fs::create_dir_all(tree.join(dir))?;
    }
    let busybox = machine::which("busybox").context("busybox is not installed")?;
    fs::copy(&busybox, tree.join("busybox"))?;
    fs::write(tree.join("init"), INIT)?;
    Cmd::new("chmod")
        .arg("755")
        .arg(tree.join("init"))
        .arg(tree.join("busybox"))
        .try_quietly()
        .map_err(anyhow::Error::msg)?;
    fs::write(tree.join("run.sh"), format!("{GUEST}{script}echo o >/proc/sysrq-trigger\nsleep 60\n"))?;
    let mut order = String::new();
    for module in modules(kernel)? {
        let name = install(&module, &tree.join("modules"))?;
        order.push_str(&format!("{name}\n"));
    }
    fs::write(tree.join("modules/order"), order)?;
    pack(&busybox, &tree, &folder.join("initramfs.cpio"))
}

/// Files of [`MODULES`] and of what they need, in the order in which they are loaded.
fn modules(kernel: &Unpacked) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for module in MODULES {
        let said = Cmd::new(machine::which("modprobe").context("modprobe is not installed")?)
            .arg("-d")
            .arg(&kernel.root)
            .args(["-S", &kernel.release, "--show-depends", module])
            .probe()
            .with_context(|| format!("Linux {} has no module {module}", kernel.release))?;
        for file in insmods(&said) {
            if !files.contains(&file) {
                files.push(file);
            }
        }
    }
    Ok(files)
}

/// Files of `modprobe --show-depends`; what is built in has none.
fn insmods(said: &str) -> impl Iterator<Item = PathBuf> {
    said.lines().filter_map(|line| line.strip_prefix("insmod ")).map(|file| PathBuf::from(file.trim()))
}

/// Copies a module, unpacked; its name there.
fn install(module: &Path, to: &Path) -> Result<String> {
    let name = module.file_name().context("a module has a name")?.to_string_lossy().into_owned();
    let Some(plain) = name.strip_suffix(".xz") else {
        fs::copy(module, to.join(&name)).with_context(|| format!("cannot copy {}", module.display()))?;
        return Ok(name);
    };
    let out = fs::File::create(to.join(plain))?;
    let status = Command::new("xz").arg("-dc").arg(module).stdout(out).status().context("xz")?;
    ensure!(status.success(), "xz cannot unpack {}", module.display());
    Ok(plain.to_owned())
}

fn pack(busybox: &Path, tree: &Path, archive: &Path) -> Result<PathBuf> {
    let find = Command::new(busybox)
        .args(["find", "."])
        .current_dir(tree)
        .stdout(Stdio::piped())
        .spawn()
        .context("busybox find")?;
    let names = find.stdout.context("its output was not piped")?;
    let status = Command::new(busybox)
        .args(["cpio", "-o", "-H", "newc"])
        .current_dir(tree)
        .stdin(names)
        .stdout(fs::File::create(archive)?)
        .stderr(Stdio::null())
        .status()
        .context("busybox cpio")?;
    ensure!(status.success(), "busybox cannot pack {}", tree.display());
    Ok(archive.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn built_in_modules_have_no_file() {
        let said = "insmod /k/virtio.ko \nbuiltin overlay\ninsmod /k/9p.ko.xz \n";
        let files: Vec<_> = insmods(said).collect();
        assert_eq!(files, [PathBuf::from("/k/virtio.ko"), PathBuf::from("/k/9p.ko.xz")]);
    }
}
