//! The agent under test: `fairlead run` in the node's namespace.

use std::{
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Stdio},
    sync::atomic::{AtomicU32, Ordering},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    janitor,
    manifest::{Manifests, NODE_NAME},
    netns::{self, Namespace},
    server::wait_until,
    topology::Lab,
};

/// The agent's word that every Service of its first full list is served.
pub const READY_LINE: &str = "first sync complete";
/// Type of the bpf file system.
const BPF_FS_MAGIC: libc::c_long = 0xcafe_4a11;

/// How to start the agent.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// Further arguments of `fairlead run`.
    pub args: Vec<OsString>,
    /// The program, if not the one that [`find_binary`] finds.
    pub binary: Option<PathBuf>,
}

/// A running agent. Dropping it stops it and removes its pins.
#[derive(Debug)]
pub struct Agent {
    /// The folder it reads.
    pub manifests: Manifests,
    /// Where it pins.
    pub pin_path: PathBuf,
    /// Its standard error and output.
    pub log: PathBuf,
    /// From its start to its first full sync.
    pub ready_after: Duration,
    binary: PathBuf,
    options: AgentOptions,
    node: Namespace,
    child: Option<Child>,
    keep: bool,
}

/// Finds `fairlead`: `$FAIRLEAD_BIN`, else beside this program, else where cargo puts it.
pub fn find_binary() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("FAIRLEAD_BIN").map(PathBuf::from) {
        anyhow::ensure!(path.is_file(), "FAIRLEAD_BIN names {}, which is no file", path.display());
        return Ok(path);
    }
    let mut places = Vec::new();
    if let Ok(exe) = std::env::current_exe() {
        places.extend(exe.ancestors().skip(1).take(2).map(|dir| dir.join("fairlead")));
    }
    places.push(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/debug/fairlead"));
    match places.iter().find(|place| place.is_file()) {
        Some(place) => Ok(place.clone()),
        None => {
            bail!("the agent is not built: looked at {places:?}; run `cargo build -p proxy-agent` or set FAIRLEAD_BIN")
        }
    }
}

impl Agent {
    /// Starts the agent on the lab's own folder of manifests and waits for its first full sync.
    pub fn start(lab: &Lab, options: AgentOptions) -> Result<Self> {
        mount_bpf_fs()?;
        let binary = options.binary.clone().map_or_else(find_binary, Ok)?;
        let mut agent = Self {
            manifests: Manifests::new(&lab.dir().join("manifests"))?,
            pin_path: lab.pin_path(),
            log: PathBuf::new(),
            ready_after: Duration::ZERO,
            binary,
            options,
            node: lab.node.ns.clone(),
            child: None,
            keep: false,
        };
        agent.restart(lab)?;
        Ok(agent)
    }

    /// Starts it again (after [`Agent::stop`], or after its death).
    pub fn restart(&mut self, lab: &Lab) -> Result<()> {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        self.log = lab.dir().join(format!("agent-{}.log", COUNT.fetch_add(1, Ordering::Relaxed)));
        let log = File::create(&self.log).with_context(|| format!("cannot make {}", self.log.display()))?;
        let start = Instant::now();
        let mut command = self.node.command(&self.binary);
        command.arg("run").arg("--manifests").arg(self.manifests.dir());
        command.args(["--node-name", NODE_NAME]).arg("--pin-path").arg(&self.pin_path).args(&self.options.args);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // A group of its own: a Ctrl-C on the terminal is for the lab, which then stops the agent in order.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child =
            janitor::spawn(&mut command).with_context(|| format!("cannot start {}", self.binary.display()))?;
        let mut ended = None;
        let ready = wait_until(Duration::from_secs(30), || {
            ended = child.try_wait().ok().flatten();
            ended.is_some() || self.log_text().contains(READY_LINE)
        });
        self.child = Some(child);
        self.ready_after = start.elapsed();
        match ended {
            Some(status) => {
                bail!("{} ended before its first sync ({status}); its log:\n{}", self.binary.display(), self.log_text())
            }
            None if !ready => {
                bail!("no {READY_LINE:?} from {} within 30 s; its log:\n{}", self.binary.display(), self.log_text())
            }
            None => Ok(()),
        }
    }

    /// What it has logged since its last start.
    pub fn log_text(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// Its process id, while it runs.
    pub fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// True while its process lives.
    pub fn is_running(&mut self) -> bool {
        self.child.as_mut().is_some_and(|child| matches!(child.try_wait(), Ok(None)))
    }

    /// Asks it to end, as systemd and the kubelet do, and waits for it.
    pub fn stop(&mut self) -> Result<()> {
        let Some(mut child) = self.child.take() else { return Ok(()) };
        janitor::release(child.id());
        let pid = Pid::from_raw(i32::try_from(child.id()).context("process id")?);
        kill(pid, Signal::SIGTERM).ok();
        if wait_until(Duration::from_secs(5), || !matches!(child.try_wait(), Ok(None))) {
            return Ok(());
        }
        child.kill().ok();
        child.wait().ok();
        bail!("the agent did not end within 5 s of SIGTERM; its log:\n{}", self.log_text())
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            janitor::release(child.id());
            child.kill().ok();
            child.wait().ok();
        }
    }

    /// Runs a `fairlead` subcommand on this agent's pins and returns its output.
    pub fn fairlead(&self, args: &[&str]) -> Result<String> {
        netns::run(self.node.command(&self.binary).args(args).arg("--pin-path").arg(&self.pin_path))
    }

    /// Leaves it running when dropped.
    pub fn keep(&mut self) {
        self.keep = true;
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if self.keep {
            return;
        }
        if let Err(error) = self.stop() {
            eprintln!("{error:#}");
        }
        if self.pin_path.exists()
            && let Err(error) = self.fairlead(&["cleanup"])
        {
            eprintln!("{error:#}");
            fs::remove_dir_all(&self.pin_path).ok();
        }
    }
}

/// Mounts the bpf file system where everyone expects it, if nobody has yet.
pub fn mount_bpf_fs() -> Result<()> {
    let path = Path::new(janitor::BPF_FS);
    // Several labs may begin at the same time; only one of them mounts.
    let lock =
        File::create(Path::new("/run").join("fairlead-lab.lock")).context("cannot make /run/fairlead-lab.lock")?;
    let _lock = nix::fcntl::Flock::lock(lock, nix::fcntl::FlockArg::LockExclusive)
        .map_err(|(_, error)| error)
        .context("cannot lock /run/fairlead-lab.lock")?;
    let kind = nix::sys::statfs::statfs(path).with_context(|| format!("cannot look at {}", path.display()))?;
    if kind.filesystem_type().0 == BPF_FS_MAGIC {
        return Ok(());
    }
    nix::mount::mount(Some("bpf"), path, Some("bpf"), nix::mount::MsFlags::empty(), None::<&str>)
        .with_context(|| format!("cannot mount the bpf file system at {}", path.display()))
}
