//! What passed in this run, tier by tier, for the conformance tier to hold its table against.

use std::fs;
use std::io;
use std::path::PathBuf;

use super::tier::Tier;
use crate::machine;

/// Names the folder; `tests/tests/conformance.rs` reads it.
pub(super) const VARIABLE: &str = "FAIRLEAD_RAN";

/// A file for each tier that ran completely: one line for each test that passed.
pub(super) fn folder() -> PathBuf {
    machine::target_dir().join("ran")
}

/// An earlier run says nothing about this one.
pub(super) fn forget() -> io::Result<()> {
    match fs::remove_dir_all(folder()) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => fs::create_dir_all(folder()),
    }
}

/// Everything in a tier has run, and these have passed.
pub(super) fn note(tier: Tier, passed: &[&str]) -> io::Result<()> {
    fs::write(folder().join(tier.name()), passed.join("\n"))
}
