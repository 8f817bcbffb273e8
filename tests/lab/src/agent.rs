//! The agent under test: `fairlead run` in the node's namespace.

use std::{
    collections::BTreeMap,
    ffi::OsString,
    fs::{self, File},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
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
    manifest::Manifests,
    netns::{self, Namespace},
    server::wait_until,
    topology::Lab,
};

/// The agent's word that every Service of its first full list is served.
pub const READY_LINE: &str = "first sync complete";
/// How long a start, and an end, may take on a busy machine.
const STARTED: Duration = Duration::from_secs(60);
const ENDED: Duration = Duration::from_secs(20);
/// Type of the bpf file system.
const BPF_FS_MAGIC: libc::c_long = 0xcafe_4a11;

/// How to start the agent.
#[derive(Clone, Debug, Default)]
pub struct AgentOptions {
    /// Further arguments of `fairlead run`.
    pub args: Vec<OsString>,
    /// The program, if not the one that [`find_binary`] finds.
    pub binary: Option<PathBuf>,
    /// The folder that it reads, if not the lab's own: two nodes may share one.
    pub manifests: Option<Manifests>,
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
    /// What its next start is given.
    pub options: AgentOptions,
    binary: PathBuf,
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
    /// Starts the agent, on the lab's own folder of manifests where no other is named, and waits for its first full sync.
    pub fn start(lab: &Lab, options: AgentOptions) -> Result<Self> {
        mount_bpf_fs()?;
        let binary = options.binary.clone().map_or_else(find_binary, Ok)?;
        let mut agent = Self {
            manifests: options.manifests.clone().map_or_else(|| Manifests::new(&lab.dir().join("manifests")), Ok)?,
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
        command.args(["--node-name", lab.node_name()]).arg("--pin-path").arg(&self.pin_path).args(&self.options.args);
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
        // A group of its own: a Ctrl-C on the terminal is for the lab, which then stops the agent in order.
        std::os::unix::process::CommandExt::process_group(&mut command, 0);
        let mut child =
            janitor::spawn(&mut command).with_context(|| format!("cannot start {}", self.binary.display()))?;
        let mut ended = None;
        let ready = wait_until(STARTED, || {
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
                bail!(
                    "no {READY_LINE:?} from {} within {STARTED:?}; its log:\n{}",
                    self.binary.display(),
                    self.log_text()
                )
            }
            None => Ok(()),
        }
    }

    /// What it has logged since its last start.
    pub fn log_text(&self) -> String {
        fs::read(&self.log).map(|bytes| String::from_utf8_lossy(&bytes).into_owned()).unwrap_or_default()
    }

    /// The end of its log, for messages.
    pub fn last_words(&self) -> String {
        let log = self.log_text();
        let lines: Vec<_> = log.lines().collect();
        format!("the agent's last words:\n{}\n", lines[lines.len().saturating_sub(12)..].join("\n"))
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
        if wait_until(ENDED, || !matches!(child.try_wait(), Ok(None))) {
            return Ok(());
        }
        child.kill().ok();
        child.wait().ok();
        bail!("the agent did not end within {ENDED:?} of SIGTERM; its log:\n{}", self.log_text())
    }

    /// Ends it as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            janitor::release(child.id());
            child.kill().ok();
            child.wait().ok();
        }
    }

    /// The pin of this name, however the pins are arranged.
    pub fn pin(&self, name: &str) -> Option<PathBuf> {
        find(&self.pin_path, name)
    }

    /// Tags of the programs that packets meet now, by their slot: the kernel's sum over a program's instructions.
    pub fn program_tags(&self) -> Result<BTreeMap<u32, String>> {
        let pin = self.pin("PROGRAMS").context("no PROGRAMS among the pins")?;
        let dump = netns::run(Command::new("bpftool").args(["map", "dump", "pinned"]).arg(pin))?;
        let field = |name: &str| -> Vec<u32> {
            let lines = dump.lines().filter_map(|line| line.trim().strip_prefix(name));
            lines.filter_map(|number| number.trim_end_matches(',').trim().parse().ok()).collect()
        };
        let mut tags = BTreeMap::new();
        for (slot, id) in field("\"key\":").into_iter().zip(field("\"value\":")) {
            let shown = netns::run(Command::new("bpftool").args(["prog", "show", "id", &id.to_string()]))?;
            let tag = shown.split_ascii_whitespace().skip_while(|word| *word != "tag").nth(1);
            tags.insert(slot, tag.with_context(|| format!("no tag in {shown:?}"))?.to_owned());
        }
        anyhow::ensure!(!tags.is_empty(), "PROGRAMS is empty: {dump}");
        Ok(tags)
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

/// A pin of this name below a directory.
fn find(dir: &Path, name: &str) -> Option<PathBuf> {
    let entries: Vec<_> = fs::read_dir(dir).ok()?.flatten().map(|entry| entry.path()).collect();
    let here = entries.iter().find(|path| path.file_name().is_some_and(|file| file == name)).cloned();
    here.or_else(|| entries.iter().filter(|path| path.is_dir()).find_map(|path| find(path, name)))
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
