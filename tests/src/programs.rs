//! The test programs, as cargo builds them: where they are, and which tests they have.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, ensure};

/// Name in the parity table, cargo's name of the target, and the tier that runs it.
const PROGRAMS: [(&str, &str, &str); 7] = [
    ("agent", "proxy_agent", "unit"),
    ("common", "proxy_common", "unit"),
    ("packets", "packets", "packet"),
    ("object", "object", "packet"),
    ("scenarios", "scenarios", "scenario"),
    ("netns", "netns", "netns"),
    ("cluster", "cluster", "cluster"),
];

/// A test program.
#[derive(Clone, Debug)]
pub struct Program {
    /// The tier that runs it.
    pub tier: &'static str,
    /// Its file.
    pub file: PathBuf,
    /// Full names of its tests.
    pub tests: Vec<String>,
}

impl Program {
    /// The tests of this name, or those of a module of this name: the variants of one case.
    pub fn named<'a>(&'a self, name: &'a str) -> impl Iterator<Item = &'a String> {
        self.tests.iter().filter(move |test| is_of(test, name))
    }
}

/// True for the test of this name, and for a variant of the case of this name.
pub fn is_of(test: &str, name: &str) -> bool {
    test.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
}

/// Builds these programs of the table, or all of them, and asks each for its tests. `more` goes to cargo.
pub fn build(wanted: &[&str], more: &[&str]) -> Result<BTreeMap<&'static str, Program>> {
    let wanted = |name: &str| wanted.is_empty() || wanted.contains(&name);
    let cargo = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut build = Command::new(cargo);
    build.args(["test", "--locked", "--workspace", "--exclude", "proxy-ebpf", "--no-run", "--message-format=json"]);
    build.args(["--lib"]).args(more);
    for (_, target, tier) in PROGRAMS.into_iter().filter(|(name, _, _)| wanted(name)) {
        if tier != "unit" {
            build.args(["--test", target]);
        }
    }
    // What cargo tells this test about its own package would make build scripts of others run anew.
    let own = ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_EXE_"];
    for (name, _) in std::env::vars_os().filter(|(name, _)| own.iter().any(|o| name.to_string_lossy().starts_with(o))) {
        build.env_remove(name);
    }
    let output = build
        .current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
        .stderr(Stdio::inherit())
        .output()
        .context("cargo")?;
    ensure!(output.status.success(), "the test programs do not compile");
    let messages = String::from_utf8_lossy(&output.stdout);
    let built: Vec<serde_json::Value> = messages.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
    let mut programs = BTreeMap::new();
    for (name, target, tier) in PROGRAMS.into_iter().filter(|(name, _, _)| wanted(name)) {
        let file = built
            .iter()
            .filter(|message| message["target"]["name"] == target && message["profile"]["test"] == true)
            .find_map(|message| message["executable"].as_str().map(PathBuf::from))
            .with_context(|| format!("cargo names no program {target}"))?;
        let listed = Command::new(&file).arg("--list").output().with_context(|| file.display().to_string())?;
        let listed = String::from_utf8_lossy(&listed.stdout).into_owned();
        let tests = listed.lines().filter_map(|line| line.strip_suffix(": test")).map(str::to_owned).collect();
        programs.insert(name, Program { tier, file, tests });
    }
    Ok(programs)
}
