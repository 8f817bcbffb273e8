//! Other kernels than this machine's: Debian's own packages, cached, and booted in qemu with this machine's files as
//! their root.

use std::path::{Path, PathBuf};

use anyhow::Result;

use crate::machine;
use crate::setup::{Item, State, apt};

mod initramfs;
mod package;
pub(crate) mod qemu;

/// A kernel that the tests are run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Kernel {
    /// Its series, which the release must belong to.
    pub(crate) series: &'static str,
    /// Debian's package that depends on the newest one of the series.
    meta: &'static str,
}

/// The oldest that the README promises, whose only hooks are clsact's, and a later one with tcx. One suite has both.
pub(crate) const KERNELS: [Kernel; 2] =
    [Kernel { series: "6.1", meta: "linux-image-amd64" }, Kernel { series: "6.12", meta: "linux-image-6.12-amd64" }];

/// A kernel that is here, unpacked.
#[derive(Clone, Debug)]
pub(crate) struct Unpacked {
    /// As `uname -r` says there.
    pub(crate) release: String,
    /// Holds `boot` and `lib/modules`.
    root: PathBuf,
}

impl Unpacked {
    pub(crate) fn image(&self) -> PathBuf {
        self.root.join(format!("boot/vmlinuz-{}", self.release))
    }

    pub(crate) fn modules(&self) -> PathBuf {
        self.root.join("lib/modules")
    }
}

impl Kernel {
    /// Where it is kept.
    pub(crate) fn folder(self) -> PathBuf {
        folder().join(self.series)
    }

    /// It, if it has been fetched.
    pub(crate) fn unpacked(self) -> Option<Unpacked> {
        package::unpacked(&self.folder())
    }
}

/// Everything of other kernels.
fn folder() -> PathBuf {
    machine::target_dir().join("kernels")
}

/// A program, its package, and what it does here.
const TOOLS: [(&str, &str, &str); 4] = [
    ("qemu-system-x86_64", "qemu-system-x86", "boots the kernels tier's kernels"),
    ("busybox", "busybox-static", "is their first process"),
    ("modprobe", "kmod", "loads their modules"),
    ("xz", "xz-utils", "unpacks their modules"),
];

/// What holds Debian's signatures, also on Ubuntu.
const KEYRING: &str = "/usr/share/keyrings/debian-archive-keyring.gpg";

/// What the kernels tier needs; a machine without it is complete, unless it is `wanted`.
pub(crate) fn items(wanted: bool) -> Vec<Item> {
    if !cfg!(target_arch = "x86_64") {
        return Vec::new();
    }
    let state = |found: Option<String>, absence: &str| match found {
        Some(found) => State::Here(found),
        None if wanted => State::Missing(absence.to_owned()),
        None => State::Optional(format!("{absence} (`./x setup --kernels`)")),
    };
    let path = |program| machine::which(program).map(|path| path.display().to_string());
    let mut items: Vec<Item> = TOOLS
        .iter()
        .map(|&(program, package, why)| Item {
            name: program.into(),
            why,
            state: state(path(program), &format!("package {package}")),
            install: install_tools,
        })
        .collect();
    items.push(Item {
        name: "Debian's keys".into(),
        why: "the kernels are Debian's, and signed",
        state: state(Path::new(KEYRING).is_file().then(|| KEYRING.to_owned()), "package debian-archive-keyring"),
        install: install_tools,
    });
    for kernel in KERNELS {
        items.push(Item {
            name: format!("Linux {}", kernel.series),
            why: "the kernels tier runs on it",
            state: state(kernel.unpacked().map(|found| found.release), "not fetched"),
            install: fetch,
        });
    }
    items
}

/// Why other kernels cannot be booted here; `None` where they can.
pub(crate) fn obstacle() -> Option<String> {
    if !cfg!(target_arch = "x86_64") {
        return Some("its kernels are those of 64-bit x86".to_owned());
    }
    let missing: Vec<String> = items(true)
        .into_iter()
        .filter_map(|item| match item.state {
            State::Missing(absence) => Some(format!("{} ({absence})", item.name)),
            _ => None,
        })
        .collect();
    let list = missing.join(", ");
    (!missing.is_empty()).then(|| format!("missing: {list}; `./x setup --kernels` as root, with a network, brings it"))
}

fn install_tools() -> Result<()> {
    let tools = TOOLS.iter().filter(|(program, ..)| machine::which(program).is_none()).map(|&(_, package, _)| package);
    let keys = (!Path::new(KEYRING).is_file()).then_some("debian-archive-keyring");
    apt::install(&tools.chain(keys).collect::<Vec<_>>())
}

fn fetch() -> Result<()> {
    package::fetch(&folder(), &KERNELS.into_iter().filter(|kernel| kernel.unpacked().is_none()).collect::<Vec<_>>())
}
