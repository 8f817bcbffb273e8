//! Child processes: started with their command line in view, and named when they fail.

use std::ffi::{OsStr, OsString};
use std::fmt;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context as _, Result, bail};

/// A command under construction; it prints as the line that a person would type.
#[derive(Debug)]
pub(crate) struct Cmd {
    inner: Command,
    shown_env: Vec<(String, String)>,
}

impl Cmd {
    pub(crate) fn new(program: impl AsRef<OsStr>) -> Self {
        let mut inner = Command::new(program);
        // `cargo run` describes xtask itself in these; a cargo below it would take them for changes and compile again.
        for (name, _) in std::env::vars_os() {
            if describes_xtask(&name) {
                inner.env_remove(name);
            }
        }
        Self { inner, shown_env: Vec::new() }
    }

    /// The cargo that runs us.
    pub(crate) fn cargo(subcommand: &str) -> Self {
        Self::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())).arg(subcommand)
    }

    pub(crate) fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.inner.arg(arg);
        self
    }

    pub(crate) fn args(mut self, args: impl IntoIterator<Item = impl AsRef<OsStr>>) -> Self {
        self.inner.args(args);
        self
    }

    pub(crate) fn env(mut self, name: &str, value: &str) -> Self {
        self.inner.env(name, value);
        self.shown_env.push((name.to_owned(), value.to_owned()));
        self
    }

    pub(crate) fn current_dir(mut self, dir: &Path) -> Self {
        self.inner.current_dir(dir);
        self
    }

    /// Runs it with our own output, after printing it; an exit status other than 0 is an error.
    pub(crate) fn run(mut self) -> Result<()> {
        let line = self.to_string();
        eprintln!("+ {line}");
        let status = self.inner.status().with_context(|| format!("could not start `{line}`"))?;
        if !status.success() {
            bail!("`{line}` failed: {status}; its own messages stand above");
        }
        Ok(())
    }

    /// Its standard output if it runs and succeeds; for probes, so nothing is printed.
    pub(crate) fn probe(mut self) -> Option<String> {
        let output = self.inner.stdin(Stdio::null()).stderr(Stdio::null()).output().ok()?;
        output.status.success().then(|| String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Whether it runs and succeeds, and if not, the last line it said.
    pub(crate) fn try_quietly(mut self) -> Result<(), String> {
        let line = self.to_string();
        match self.inner.stdin(Stdio::null()).output() {
            Err(error) => Err(format!("`{line}`: {error}")),
            Ok(output) if output.status.success() => Ok(()),
            Ok(output) => {
                let said = String::from_utf8_lossy(&output.stderr);
                let last = said.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or("no message").trim();
                Err(format!("`{line}`: {last}"))
            }
        }
    }

    /// Becomes the command; returns only where that is not possible.
    pub(crate) fn exec(mut self) -> anyhow::Error {
        let line = self.to_string();
        eprintln!("+ {line}");
        anyhow::Error::new(self.inner.exec()).context(format!("could not start `{line}`"))
    }

    /// The command itself, for callers that read its output as it comes.
    pub(crate) fn into_inner(self) -> Command {
        self.inner
    }
}

impl fmt::Display for Cmd {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (name, value) in &self.shown_env {
            write!(f, "{name}={} ", quoted(OsStr::new(value)))?;
        }
        let program = Path::new(self.inner.get_program());
        // Cargo is reached by its path; people type its name.
        let program = if program.ends_with("bin/cargo") { OsStr::new("cargo") } else { program.as_os_str() };
        f.write_str(&quoted(program))?;
        self.inner.get_args().try_for_each(|arg| write!(f, " {}", quoted(arg)))
    }
}

fn quoted(word: &OsStr) -> String {
    let word = word.to_string_lossy();
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=,:@+%".contains(c);
    if !word.is_empty() && word.chars().all(plain) { word.into_owned() } else { format!("'{word}'") }
}

fn describes_xtask(name: &OsString) -> bool {
    let name = name.to_string_lossy();
    ["CARGO_PKG_", "CARGO_MANIFEST_", "CARGO_BIN_", "CARGO_CRATE_"].iter().any(|prefix| name.starts_with(prefix))
        || name == "CARGO_PRIMARY_PACKAGE"
        || name == "OUT_DIR"
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_prints_as_it_would_be_typed() {
        let cmd = Cmd::new("echo").args(["a b", "c", ""]).env("RUSTDOCFLAGS", "-D warnings");
        assert_eq!(cmd.to_string(), "RUSTDOCFLAGS='-D warnings' echo 'a b' c ''");
    }

    #[test]
    fn a_failing_command_is_named_with_its_status() {
        let error = Cmd::new("sh").args(["-c", "exit 3"]).run().unwrap_err().to_string();
        assert!(error.contains("`sh -c 'exit 3'` failed: exit status: 3"), "{error}");
    }

    #[test]
    fn a_command_that_does_not_exist_is_named() {
        let error = Cmd::new("no-such-program-here").run().unwrap_err().to_string();
        assert!(error.contains("could not start `no-such-program-here`"), "{error}");
    }

    #[test]
    fn a_probe_tells_the_last_line_of_what_failed() {
        let said = Cmd::new("sh").args(["-c", "echo first >&2; echo last >&2; exit 1"]).try_quietly().unwrap_err();
        assert!(said.ends_with(": last"), "{said}");
        assert_eq!(Cmd::new("sh").args(["-c", "echo out"]).probe().as_deref(), Some("out\n"));
        assert_eq!(Cmd::new("sh").args(["-c", "exit 1"]).probe(), None);
    }
}
