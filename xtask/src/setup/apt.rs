//! Debian's and Ubuntu's packages.

use std::cell::Cell;

use anyhow::{Result, bail};

use crate::machine;
use crate::process::Cmd;

thread_local! {
    /// The lists are fetched once a run: it takes seconds.
    static UPDATED: Cell<bool> = const { Cell::new(false) };
}

/// Can packages be installed here? If not, why.
pub(crate) fn usable() -> Result<(), &'static str> {
    if machine::which("apt-get").is_none() {
        return Err("there is no apt-get here");
    }
    if !machine::is_root() {
        return Err("apt-get needs root");
    }
    Ok(())
}

/// The version that apt would install, as upstream counts ("1:22.1.8-1~deb12u1" is "22.1.8-1~deb12u1").
pub(crate) fn candidate(package: &str) -> Option<String> {
    let policy = Cmd::new("apt-cache").args(["policy", package]).probe()?;
    parse_candidate(&policy)
}

fn parse_candidate(policy: &str) -> Option<String> {
    let version = policy.lines().find_map(|line| line.trim().strip_prefix("Candidate: "))?;
    (version != "(none)").then(|| version.split_once(':').map_or(version, |(_, rest)| rest).to_owned())
}

/// Fetches the package lists, once a run.
pub(crate) fn update() {
    if UPDATED.replace(true) {
        return;
    }
    println!("setup: fetching the package lists");
    if let Err(error) = Cmd::new("apt-get").args(["update", "-qq"]).run() {
        println!("setup: {error:#}; going on with the lists that are here");
    }
}

/// Installs packages; the caller has said why.
pub(crate) fn install(packages: &[&str]) -> Result<()> {
    if let Err(reason) = usable() {
        bail!("{reason}; on Debian or Ubuntu, as root: apt-get install {}", packages.join(" "));
    }
    if packages.iter().any(|package| candidate(package).is_none()) {
        update();
    }
    let attempt = || {
        // --no-remove: nothing that is installed may have to go for this.
        Cmd::new("apt-get")
            .args(["install", "-y", "-qq", "--no-install-recommends", "--no-remove", "-o", "Dpkg::Use-Pty=0"])
            .args(packages)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .run()
    };
    // Old lists name files that the mirror has dropped.
    let updated_before = UPDATED.get();
    attempt().or_else(|error| {
        if updated_before {
            return Err(error);
        }
        update();
        attempt()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_candidate_is_read_without_its_epoch() {
        let policy = "libllvm22:\n  Installed: (none)\n  Candidate: 1:22.1.8-1~deb12u1\n  Version table:\n";
        assert_eq!(parse_candidate(policy).as_deref(), Some("22.1.8-1~deb12u1"));
    }

    #[test]
    fn a_package_without_a_candidate_has_none() {
        assert_eq!(parse_candidate("rustc:\n  Installed: (none)\n  Candidate: (none)\n"), None);
        assert_eq!(parse_candidate(""), None);
    }
}
