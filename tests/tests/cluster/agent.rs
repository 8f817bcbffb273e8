//! The agent under test, fed by the API server.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use fairlead_lab::{
    Lab, Namespace,
    agent::{READY_LINE, find_binary, mount_bpf_fs},
    netns,
    server::wait_until,
};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

/// How long an end may take on a busy machine.
const ENDED: Duration = Duration::from_secs(20);

/// A running `fairlead run --kubeconfig …`. Dropping it ends it and removes its pins.
pub(crate) struct Agent {
    binary: PathBuf,
    kubeconfig: PathBuf,
    node: Namespace,
    name: &'static str,
    pins: PathBuf,
    log: PathBuf,
    args: Vec<String>,
    child: Option<Child>,
}

impl Agent {
    /// Starts it in the node and waits for its first full sync.
    pub(crate) fn start(lab: &Lab, kubeconfig: &Path) -> Self {
        Self::start_with(lab, kubeconfig, "agent", &[])
    }

    /// The same with more arguments, and with pins of its own unless its name is `agent`.
    pub(crate) fn start_with(lab: &Lab, kubeconfig: &Path, name: &str, args: &[&str]) -> Self {
        mount_bpf_fs().unwrap();
        let pins = match name {
            "agent" => lab.pin_path(),
            _ => lab
                .pin_path()
                .with_file_name(format!("{}-{name}", lab.pin_path().file_name().unwrap_or_default().to_string_lossy())),
        };
        let mut agent = Self {
            binary: find_binary().unwrap(),
            kubeconfig: kubeconfig.to_owned(),
            node: lab.node.ns.clone(),
            name: lab.node_name(),
            pins,
            log: lab.dir().join(format!("{name}.log")),
            args: args.iter().map(|arg| (*arg).to_owned()).collect(),
            child: None,
        };
        agent.launch();
        agent.wait_synced(Duration::from_secs(60));
        agent
    }

    /// Starts it (again), with an empty log, and does not wait.
    pub(crate) fn launch(&mut self) {
        assert!(self.child.is_none(), "the agent runs already");
        let log = File::create(&self.log).unwrap();
        let mut command = self.node.command(&self.binary);
        command.arg("run").arg("--kubeconfig").arg(&self.kubeconfig);
        command.args(["--node-name", self.name, "--pin-path"]).arg(&self.pins).args(&self.args);
        command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let child = command.spawn().unwrap_or_else(|error| panic!("cannot start {}: {error}", self.binary.display()));
        self.child = Some(child);
    }

    /// Ends it as the kubelet does. False where it had to be killed.
    pub(crate) fn stop(&mut self) -> bool {
        let Some(mut child) = self.child.take() else { return true };
        // A process that is gone needs no signal.
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).ok();
        let ended = wait_until(ENDED, || !matches!(child.try_wait(), Ok(None)));
        if !ended {
            child.kill().ok();
            child.wait().ok();
        }
        ended
    }

    /// Ends it as a crash does.
    pub(crate) fn crash(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    /// Waits for its first full sync.
    pub(crate) fn wait_synced(&mut self, limit: Duration) {
        let mut alive = true;
        let synced = wait_until(limit, || {
            alive = self.is_running();
            !alive || self.has_synced()
        });
        assert!(alive, "the agent ended before its first sync; its log:\n{}", self.log_tail());
        assert!(synced, "no {READY_LINE:?} from the agent within {limit:?}; its log:\n{}", self.log_tail());
    }

    /// What `fairlead services` or `fairlead endpoints` says of its maps.
    pub(crate) fn shown(&self, what: &str) -> serde_json::Value {
        let mut command = self.node.command(&self.binary);
        let text = netns::run(command.args([what, "-o", "json", "--pin-path"]).arg(&self.pins)).unwrap();
        serde_json::from_str(&text).unwrap()
    }

    /// True once it has logged its first full sync.
    pub(crate) fn has_synced(&self) -> bool {
        self.log_text().contains(READY_LINE)
    }

    /// True while its process lives.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// The id of its process, while it runs.
    pub(crate) fn pid(&self) -> u32 {
        self.child.as_ref().expect("the agent runs").id()
    }

    /// The end of its log, for failure messages.
    pub(crate) fn log_tail(&self) -> String {
        let text = self.log_text();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(25)..].join("\n")
    }

    pub(crate) fn log_text(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if !self.stop() {
            eprintln!("the agent did not end within {ENDED:?} of SIGTERM; its log ends with:\n{}", self.log_tail());
        }
        let mut cleanup = self.node.command(&self.binary);
        if let Err(error) = netns::run(cleanup.arg("cleanup").arg("--pin-path").arg(&self.pins)) {
            eprintln!("{error:#}");
        }
    }
}

/// A duration in milliseconds, for the record of a run.
pub(crate) fn ms(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}

/// Calls `check` again and again for a while: what must not happen has to be watched for.
pub(crate) fn throughout(duration: Duration, mut check: impl FnMut()) {
    let began = Instant::now();
    while began.elapsed() < duration {
        check();
        std::thread::sleep(Duration::from_millis(20));
    }
}
