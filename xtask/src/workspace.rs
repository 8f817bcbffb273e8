//! One choice of packages, features and profile for every cargo call, so that dependencies are compiled once.
//!
//! Cargo unifies features over the packages that a call selects: `-p one` and `-p other` may compile a shared dependency
//! twice. Every call selects the whole workspace instead and says by target kind what it wants.

use crate::machine;
use crate::process::Cmd;

/// `proxy-ebpf` is a program of another target: on the host only its library is built, for its unit tests.
pub(crate) const EBPF: &str = "proxy-ebpf";

/// A cargo call over all packages of the host.
pub(crate) fn cargo(subcommand: &str) -> Cmd {
    Cmd::cargo(subcommand).args(["--locked", "--workspace", "--exclude", EBPF]).current_dir(&machine::root())
}
