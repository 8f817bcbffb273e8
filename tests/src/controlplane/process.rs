//! A program of the control plane that runs: it ends with the thread that started it, and what it says stands in a file.

use std::{
    fs::{self, File},
    os::unix::process::{CommandExt as _, ExitStatusExt as _},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::{
        prctl::set_pdeathsig,
        signal::{Signal, kill},
    },
    unistd::Pid,
};

/// How long a polite stop may take before it becomes a hard one.
const STOP_WITHIN: Duration = Duration::from_secs(20);

/// What a Go program of the control plane may keep in memory, so that it collects garbage less often: a fifth of the
/// processor time of a start went there.
const MEMORY: [(&str, &str); 2] = [("GOGC", "400"), ("GOMEMLIMIT", "1GiB")];

/// Gives a program of the control plane more memory for less processor time. Not kube-proxy, which is measured.
pub(super) fn spend_memory(command: &mut Command) {
    command.envs(MEMORY);
}

/// A running program. Dropping it kills it.
#[derive(Debug)]
pub(super) struct Process {
    child: Child,
    log: Log,
}

impl Process {
    /// Starts it; what it says goes to the log, but for its standard output where `command` has taken that.
    pub(super) fn start(command: &mut Command, log: &Log, output: Option<Stdio>) -> Result<Self> {
        let output = output.map_or_else(|| log.open().map(Stdio::from), Ok)?;
        command.stdin(Stdio::null()).stdout(output).stderr(log.open()?);
        // SAFETY: between fork and exec only prctl(2) is called, which is async-signal-safe.
        unsafe { command.pre_exec(|| set_pdeathsig(Signal::SIGTERM).map_err(Into::into)) };
        let child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        Ok(Self { child, log: log.clone() })
    }

    pub(super) fn child(&mut self) -> &mut Child {
        &mut self.child
    }

    /// Fails once it has ended.
    pub(super) fn check(&mut self) -> Result<()> {
        match self.child.try_wait().context("cannot wait for a process of the control plane")? {
            Some(status) => bail!("a process of it ended with {status}"),
            None => Ok(()),
        }
    }

    /// Ends it as an operator would, by SIGTERM.
    pub(super) fn stop(mut self) -> Result<()> {
        kill(self.pid(), Signal::SIGTERM).context("cannot send SIGTERM to the control plane")?;
        let deadline = Instant::now() + STOP_WITHIN;
        let status = loop {
            if let Some(status) = self.child.try_wait().context("cannot wait for the control plane")? {
                break status;
            }
            if Instant::now() > deadline {
                bail!("the control plane did not end within {STOP_WITHIN:?} of SIGTERM{}", self.log.tail());
            }
            std::thread::sleep(Duration::from_millis(10));
        };
        // etcd's own main ends itself by the signal that it was sent.
        if !status.success() && status.signal() != Some(Signal::SIGTERM as i32) {
            bail!("the control plane ended with {status} after SIGTERM{}", self.log.tail());
        }
        Ok(())
    }

    /// Its process id.
    pub(super) fn pid(&self) -> Pid {
        // Process ids are positive and fit: the kernel's own type is i32.
        Pid::from_raw(self.child.id().cast_signed())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // Both fail only for a process that is gone, which is what is wanted.
        self.child.kill().ok();
        self.child.wait().ok();
    }
}

/// A file that programs write what they say to.
#[derive(Clone, Debug)]
pub(super) struct Log(PathBuf);

impl Log {
    pub(super) fn new(folder: &Path, name: &str) -> Self {
        Self(folder.join(format!("{name}.log")))
    }

    fn open(&self) -> Result<File> {
        let file = File::options().create(true).append(true).open(&self.0);
        file.with_context(|| format!("cannot write the log {}", self.0.display()))
    }

    /// Its end, as an addition to an error: the folder is gone when the error is read.
    pub(super) fn tail(&self) -> String {
        let text = fs::read_to_string(&self.0).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        let tail = lines[lines.len().saturating_sub(15)..].join("\n");
        if tail.is_empty() { String::new() } else { format!("; its log ends with:\n{tail}\n") }
    }
}
