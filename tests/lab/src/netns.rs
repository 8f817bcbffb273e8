//! Network namespaces: made by name, entered with `setns` on a thread or in a child process.
//!
//! `ip netns exec` is not used to run things: it also changes the mount namespace, which hides the bpf and cgroup mounts.

use std::{
    fs::{self, File},
    io::Write as _,
    os::{fd::AsFd as _, unix::process::CommandExt as _},
    path::{Path, PathBuf},
    process::{Command, Stdio},
    sync::Arc,
};

use anyhow::{Context as _, Result, bail};
use nix::{
    mount::{MntFlags, umount2},
    sched::{CloneFlags, setns},
    sys::signal::SigSet,
    unistd::Pid,
};

/// Where `ip netns` keeps its names.
pub const RUN_DIR: &str = "/run/netns";

/// A handle on a network namespace. Clones share it; [`Namespace::delete`] takes its name away.
#[derive(Clone, Debug)]
pub struct Namespace {
    name: Arc<str>,
    file: Arc<File>,
}

impl Namespace {
    /// Makes a namespace of this name, with `lo` up and without duplicate address detection, so that IPv6 addresses
    /// are usable at once.
    pub fn create(name: &str) -> Result<Self> {
        run(Command::new("ip").args(["netns", "add", name]))?;
        let ns = Self::open(name)?;
        ns.sysctl("net.ipv6.conf.default.accept_dad", "0")?;
        ns.sysctl("net.ipv6.conf.all.accept_dad", "0")?;
        ns.sysctl("net.ipv6.conf.default.accept_ra", "0")?;
        Ok(ns)
    }

    /// Opens the namespace of this name.
    pub fn open(name: &str) -> Result<Self> {
        let path = Path::new(RUN_DIR).join(name);
        let file = File::open(&path).with_context(|| format!("cannot open network namespace {}", path.display()))?;
        Ok(Self { name: name.into(), file: Arc::new(file) })
    }

    /// The namespace that the calling process runs in.
    pub fn current() -> Result<Self> {
        let file = File::open("/proc/self/ns/net").context("cannot open /proc/self/ns/net")?;
        Ok(Self { name: "self".into(), file: Arc::new(file) })
    }

    /// Its name, as `ip netns` lists it.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Its path, for `nsenter --net=`.
    pub fn path(&self) -> PathBuf {
        Path::new(RUN_DIR).join(&*self.name)
    }

    /// The processes inside.
    pub fn pids(&self) -> Result<Vec<Pid>> {
        let listed = run(Command::new("ip").args(["netns", "pids", &*self.name]))?;
        listed.split_ascii_whitespace().map(|pid| Ok(Pid::from_raw(pid.parse()?))).collect()
    }

    /// Takes the name away; the namespace goes with its last socket and process.
    pub fn delete(&self) {
        let path = self.path();
        // A name that is gone already is what was asked for.
        umount2(&path, MntFlags::MNT_DETACH).ok();
        fs::remove_file(&path).ok();
    }

    /// Moves the calling thread into the namespace, for good.
    pub fn enter(&self) -> Result<()> {
        setns(self.file.as_fd(), CloneFlags::CLONE_NEWNET)
            .with_context(|| format!("cannot enter network namespace {} (root is needed)", self.name))
    }

    /// Runs `f` on a thread of its own inside the namespace. What it opens there stays there.
    pub fn run<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        std::thread::scope(|scope| {
            let thread = scope.spawn(|| {
                self.enter()?;
                Ok(f())
            });
            thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
        })
    }

    /// A command that will run inside the namespace, with no signal blocked: a lab may keep them for one of its threads,
    /// and a child inherits that.
    pub fn command(&self, program: impl AsRef<std::ffi::OsStr>) -> Command {
        let file = Arc::clone(&self.file);
        let mut command = Command::new(program);
        let prepare = move || {
            SigSet::empty().thread_set_mask()?;
            setns(file.as_fd(), CloneFlags::CLONE_NEWNET).map_err(Into::into)
        };
        // SAFETY: between fork and exec only sigprocmask(2) and setns(2) are called, which are async-signal-safe;
        // `file` lives in the closure.
        unsafe { command.pre_exec(prepare) };
        command
    }

    /// Runs `ip -batch` inside, one command a line.
    pub fn ip_batch(&self, lines: &str) -> Result<()> {
        feed(self.command("ip").args(["-batch", "-"]), lines).with_context(|| format!("in namespace {}", self.name))
    }

    /// Loads nftables rules inside.
    pub fn nft(&self, rules: &str) -> Result<()> {
        feed(self.command("nft").args(["-f", "-"]), rules).with_context(|| format!("in namespace {}", self.name))
    }

    /// Packets that a named counter of an `inet` table has counted.
    pub fn nft_counter(&self, table: &str, name: &str) -> Result<u64> {
        let listing = self.output("nft", &["list", "counter", "inet", table, name])?;
        let count = listing.split_ascii_whitespace().skip_while(|word| *word != "packets").nth(1);
        count.and_then(|count| count.parse().ok()).with_context(|| format!("no packets in {listing}"))
    }

    /// Runs a command inside and returns what it wrote.
    pub fn output(&self, program: &str, args: &[&str]) -> Result<String> {
        run(self.command(program).args(args)).with_context(|| format!("in namespace {}", self.name))
    }

    /// TCP segments that the sockets of the namespace have sent more than once.
    pub fn segments_resent(&self) -> Result<u64> {
        let text = self.run(|| fs::read_to_string("/proc/thread-self/net/snmp"))?.context("cannot read net/snmp")?;
        let mut lines = text.lines().filter_map(|line| line.strip_prefix("Tcp: ")).map(str::split_ascii_whitespace);
        let at = lines.next().and_then(|mut names| names.position(|name| name == "RetransSegs"));
        let value = at.and_then(|at| lines.next()?.nth(at));
        value.and_then(|value| value.parse().ok()).with_context(|| format!("no RetransSegs in net/snmp:\n{text}"))
    }

    /// Sets a sysctl of the namespace, named with dots; a slash within a name stands for itself (`eth0/5`).
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.run(|| fs::write(&path, value))?
            .with_context(|| format!("cannot write {value} to {path} in namespace {}", self.name))
    }
}

/// Runs a command to its end and returns its standard output; failure carries what it complained of.
pub fn run(command: &mut Command) -> Result<String> {
    let shown = format!("{command:?}");
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("cannot run {shown}: is {:?} installed?", command.get_program()))?;
    if !output.status.success() {
        // Some complain on one, some on the other.
        let complaint = [output.stderr, output.stdout].concat();
        bail!("{shown} failed ({}): {}", output.status, String::from_utf8_lossy(&complaint).trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command that reads `input`.
pub fn feed(command: &mut Command, input: &str) -> Result<()> {
    let shown = format!("{command:?}");
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot run {shown}: is {:?} installed?", command.get_program()))?;
    let mut stdin = child.stdin.take().context("the child has no standard input")?;
    // A child that exits early breaks the pipe; its own complaint below says more.
    stdin.write_all(input.as_bytes()).ok();
    drop(stdin);
    let output = child.wait_with_output().with_context(|| format!("waiting for {shown}"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("{shown} failed ({}): {}\nits input was:\n{input}", output.status, complaint.trim());
    }
    Ok(())
}
