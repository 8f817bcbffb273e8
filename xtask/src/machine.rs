//! What this machine is and allows: found out by asking it, never by assuming.

use std::fs;
use std::path::{Path, PathBuf};

use crate::process::Cmd;

/// Numbers of <linux/capability.h>.
const CAP_NET_ADMIN: u32 = 12;
const CAP_SYS_ADMIN: u32 = 21;
const CAP_PERFMON: u32 = 38;
const CAP_BPF: u32 = 39;

/// Folders that hold administrators' tools; an ordinary user's `PATH` lacks them.
const SBIN: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// The repository's root.
pub(crate) fn root() -> PathBuf {
    // Cargo says where the sources are now; the compiled-in path is where they were, for a binary run by hand.
    let manifest = std::env::var_os("CARGO_MANIFEST_DIR").unwrap_or_else(|| env!("CARGO_MANIFEST_DIR").into());
    Path::new(&manifest).parent().map_or_else(|| PathBuf::from("."), Path::to_path_buf)
}

/// A path of the command line, meant from where the caller stands; `./x` changes to the root and says where that was.
pub(crate) fn as_given(path: &Path) -> PathBuf {
    std::env::var_os("FAIRLEAD_INVOKED_FROM").map_or_else(|| path.to_path_buf(), |from| Path::new(&from).join(path))
}

/// Where cargo puts what it builds.
pub(crate) fn target_dir() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| root().join("target"), PathBuf::from)
}

/// A program's file, if it is installed.
pub(crate) fn which(program: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SBIN.iter().map(PathBuf::from))
        .map(|dir| dir.join(program))
        .find(|file| file.is_file())
}

/// Is our effective user root?
pub(crate) fn is_root() -> bool {
    status_field("Uid:").is_some_and(|ids| ids.split_whitespace().nth(1) == Some("0"))
}

/// Is this CI? Then every tier that CI can run must run.
pub(crate) fn is_ci() -> bool {
    std::env::var_os("CI").is_some_and(|value| !value.is_empty() && value != "false" && value != "0")
}

/// Why BPF programs cannot be loaded here; `None` where they can.
pub(crate) fn bpf_denied() -> Option<String> {
    let missing = missing_bpf_capability(effective_capabilities());
    if let Some(name) = missing {
        return Some(format!("loading BPF programs needs root, or {name}"));
    }
    // Capabilities are not all: a container's seccomp filter or a locked-down kernel refuses the system call itself.
    let bpftool = which("bpftool")?;
    match Cmd::new(bpftool).args(["prog", "show"]).try_quietly() {
        Err(said) if said.contains("not permitted") || said.contains("not implemented") => {
            Some(format!("this kernel or container refuses bpf(2): {said}"))
        }
        _ => None,
    }
}

/// Why network namespaces cannot be made here; `None` where they can.
pub(crate) fn namespaces_denied() -> Option<String> {
    if !is_root() {
        return Some("making network namespaces needs root".to_owned());
    }
    Cmd::new("unshare").args(["--net", "true"]).try_quietly().err().map(|said| format!("no network namespaces: {said}"))
}

/// Is a BPF file system mounted where pins go?
pub(crate) fn bpffs_mounted() -> bool {
    fs::read_to_string("/proc/mounts").is_ok_and(|mounts| is_bpffs(&mounts))
}

fn is_bpffs(mounts: &str) -> bool {
    mounts.lines().any(|line| {
        let mut fields = line.split(' ').skip(1);
        fields.next() == Some("/sys/fs/bpf") && fields.next() == Some("bpf")
    })
}

fn effective_capabilities() -> u64 {
    status_field("CapEff:").and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok()).unwrap_or(0)
}

fn missing_bpf_capability(effective: u64) -> Option<&'static str> {
    let has = |capability: u32| effective & (1 << capability) != 0;
    if has(CAP_SYS_ADMIN) && has(CAP_NET_ADMIN) {
        return None;
    }
    [(CAP_BPF, "CAP_BPF"), (CAP_PERFMON, "CAP_PERFMON"), (CAP_NET_ADMIN, "CAP_NET_ADMIN")]
        .into_iter()
        .find(|(capability, _)| !has(*capability))
        .map(|(_, name)| name)
}

fn status_field(name: &str) -> Option<String> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    status.lines().find_map(|line| line.strip_prefix(name)).map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn capabilities_that_bpf_needs_are_named() {
        assert_eq!(missing_bpf_capability(0), Some("CAP_BPF"));
        assert_eq!(missing_bpf_capability(1 << CAP_BPF | 1 << CAP_PERFMON), Some("CAP_NET_ADMIN"));
        assert_eq!(missing_bpf_capability(1 << CAP_BPF | 1 << CAP_PERFMON | 1 << CAP_NET_ADMIN), None);
        assert_eq!(missing_bpf_capability(1 << CAP_SYS_ADMIN | 1 << CAP_NET_ADMIN), None);
    }

    #[test]
    fn a_bpf_file_system_is_found_in_the_mount_table() {
        assert!(is_bpffs("proc /proc proc rw 0 0\nbpf /sys/fs/bpf bpf rw,nosuid 0 0\n"));
        assert!(!is_bpffs("sysfs /sys sysfs rw 0 0\ntmpfs /sys/fs/bpf tmpfs rw 0 0\n"));
    }

    #[test]
    fn a_program_is_found_as_a_file_in_path() {
        assert!(which("sh").is_some_and(|path| path.ends_with("sh")));
        assert_eq!(which("no-such-program-here"), None);
    }

    #[test]
    fn the_root_holds_the_workspace() {
        assert!(root().join("Cargo.toml").is_file());
    }
}
