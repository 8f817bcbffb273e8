//! `fairlead cleanup`: removes what any version made under the pin path, and says what it was.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use super::print;
use crate::args::PinArgs;
use crate::dataplane::attach;
use crate::dataplane::pin::{self, PinError, PinRoot};
use crate::dataplane::sys;
use crate::devices::{netlink, rules, told};
use crate::status;
use crate::sysctl::{Set, Sysctls};

/// The directories of a version, in the order in which they go: programs stop before their maps do.
const KINDS: [(&str, &str); 3] = [("links", "link"), ("programs", "program"), ("maps", "map")];

pub(super) fn main(args: PinArgs) -> anyhow::Result<ExitCode> {
    let pins = PinRoot::new(args.pin_path)?;
    // Netlink would refuse an ordinary user filter by filter; one sentence is clearer.
    if !sys::is_root() {
        anyhow::bail!("cannot detach programs as an ordinary user; run as root (CAP_BPF, CAP_NET_ADMIN)");
    }
    let _lock = match fs::symlink_metadata(pins.path()) {
        Ok(_) => Some(pins.lock_existing()?),
        Err(e) if e.kind() == io::ErrorKind::NotFound => None,
        Err(source) => return Err(PinError::Io { op: "look at", path: pins.path().to_owned(), source }.into()),
    };
    let mut report = Vec::new();
    let mut problems = Vec::new();
    remove_filters(&mut report, &mut problems)?;
    remove_rules(&mut report, &mut problems)?;
    for version in pin::names(pins.path())?.iter().filter(|name| is_version(name)) {
        remove_version(&pins.path().join(version), &mut report, &mut problems);
    }
    let sysctls = Sysctls::of(&pins)?;
    match sysctls.restore() {
        Ok(restored) => {
            report.extend(restored.iter().map(Set::undone));
        }
        Err(error) => problems.push(format!("cannot restore what {} says: {error}", sysctls.record().display())),
    }
    match told::file(&pins).remove() {
        Ok(_) => {}
        Err(error) => problems.push(format!("cannot remove what was told of devices: {error}")),
    }
    let status = status::file::of(&pins);
    match status.remove() {
        Ok(true) => report.push(format!("removed {}", status.path().display())),
        Ok(false) => {}
        Err(error) => problems.push(format!("cannot remove {}: {error}", status.path().display())),
    }
    // Only if nothing else lies there.
    if problems.is_empty() && fs::remove_dir(pins.path()).is_ok() {
        report.push(format!("removed {}", pins.path().display()));
    }
    if report.is_empty() && problems.is_empty() {
        report.push(format!("nothing of Fairlead's under {} and on the devices here", pins.path().display()));
    }
    print(&format!("{}\n", report.join("\n")))?;
    // Every problem is told: each leaves something behind.
    for problem in &problems {
        super::complain(problem);
    }
    Ok(if problems.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn is_version(name: &str) -> bool {
    name.strip_prefix('v').is_some_and(|n| !n.is_empty() && n.bytes().all(|b| b.is_ascii_digit()))
}

/// Removes our clsact filters from every device of this network namespace. The clsact qdisc stays: others may use it.
fn remove_filters(report: &mut Vec<String>, problems: &mut Vec<String>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let links = runtime.block_on(async {
        let handle = netlink::questions()?;
        netlink::links(&handle).await
    })?;
    for link in links.values() {
        match attach::remove_filters(&link.name) {
            Ok(true) => report.push(format!("detached the clsact filters of {}", link.name)),
            Ok(false) => {}
            Err(error) => problems.push(error.to_string()),
        }
    }
    Ok(())
}

/// Removes our rules for replies.
fn remove_rules(report: &mut Vec<String>, problems: &mut Vec<String>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let removed = runtime.block_on(async {
        let handle = netlink::questions()?;
        Ok::<_, netlink::NetlinkError>(rules::set(&handle, &BTreeSet::new()).await)
    })?;
    match removed {
        Ok(changed) => {
            report.extend(changed.changes.into_iter().map(|change| format!("rule for replies: {change}")));
            problems.extend(changed.failed.iter().map(ToString::to_string));
        }
        Err(error) => problems.push(error.to_string()),
    }
    Ok(())
}

fn remove_version(dir: &Path, report: &mut Vec<String>, problems: &mut Vec<String>) {
    for (kind, what) in KINDS {
        let dir = dir.join(kind);
        match remove_all(&dir) {
            Ok(names) if names.is_empty() => {}
            Ok(names) => report.push(format!("removed {} {what}s: {}", names.len(), names.join(" "))),
            Err((path, error)) => problems.push(format!("cannot remove {}: {error}", path.display())),
        }
    }
    if let Err(error) = fs::remove_dir(dir) {
        problems.push(format!("cannot remove {}: {error}", dir.display()));
    }
}

/// Unpins everything in a directory and removes it; returns the names.
fn remove_all(dir: &Path) -> Result<Vec<String>, (PathBuf, io::Error)> {
    let names = pin::names(dir).map_err(|e| (dir.to_owned(), e))?;
    for name in &names {
        let path = dir.join(name);
        fs::remove_file(&path).map_err(|e| (path, e))?;
    }
    match fs::remove_dir(dir) {
        Err(e) if e.kind() != io::ErrorKind::NotFound => Err((dir.to_owned(), e)),
        _ => Ok(names),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_versions_are_ours() {
        assert!(is_version("v1") && is_version("v12"));
        for other in ["v", "v1a", "1", "tc", "version"] {
            assert!(!is_version(other), "{other}");
        }
    }

    #[test]
    fn everything_in_a_directory_goes_and_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let version = dir.path().join("v1");
        for (kind, _) in KINDS {
            fs::create_dir_all(version.join(kind)).unwrap();
            fs::write(version.join(kind).join("one"), "").unwrap();
        }
        let (mut report, mut problems) = (Vec::new(), Vec::new());
        remove_version(&version, &mut report, &mut problems);
        assert_eq!(problems, [""; 0]);
        assert_eq!(report, ["removed 1 links: one", "removed 1 programs: one", "removed 1 maps: one"]);
        assert!(!version.exists());
    }
}
