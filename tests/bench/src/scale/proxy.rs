//! The two that are measured: started on an empty node, and taken away again without a trace.

use std::{
    fs::{self, File},
    path::PathBuf,
    process::{Child, Stdio},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fairlead_lab::{
    agent::{find_binary, mount_bpf_fs},
    janitor,
    manifest::NODE_NAME,
    netns,
    server::wait_until,
};
use fairlead_tests::controlplane::KubeProxy;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde::Serialize;

use super::cluster::Cluster;

/// How long an end may take.
const ENDED: Duration = Duration::from_secs(30);

/// Which proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Proxy {
    /// Ours.
    Fairlead,
    /// Kubernetes' own, in nftables mode.
    KubeProxy,
}

impl std::fmt::Display for Proxy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.pad(match self {
            Self::Fairlead => "fairlead",
            Self::KubeProxy => "kube-proxy",
        })
    }
}

/// A proxy that runs on the cluster's node.
pub(super) struct Running {
    process: Process,
    log: PathBuf,
    /// When it was executed.
    pub(super) since: Instant,
}

enum Process {
    Fairlead(Child),
    KubeProxy(KubeProxy),
}

impl Running {
    /// Starts it. The node holds nothing of an earlier one.
    pub(super) fn start(proxy: Proxy, cluster: &Cluster) -> Result<Self> {
        match proxy {
            Proxy::Fairlead => Self::fairlead(cluster),
            Proxy::KubeProxy => {
                let since = Instant::now();
                let process = KubeProxy::launch(&cluster.plane, &cluster.lab.node.ns, NODE_NAME, &[])?;
                let log = cluster.plane.dir().join("kube-proxy.log");
                Ok(Self { process: Process::KubeProxy(process), log, since })
            }
        }
    }

    fn fairlead(cluster: &Cluster) -> Result<Self> {
        mount_bpf_fs()?;
        let log = cluster.lab.dir().join("fairlead.log");
        let file = File::create(&log).with_context(|| format!("cannot make {}", log.display()))?;
        let mut command = cluster.lab.node.ns.command(find_binary()?);
        command.arg("run").arg("--kubeconfig").arg(cluster.plane.proxy_kubeconfig());
        command.args(["--node-name", NODE_NAME, "--pin-path"]).arg(cluster.lab.pin_path());
        command.stdin(Stdio::null()).stdout(file.try_clone()?).stderr(file);
        let since = Instant::now();
        let child = janitor::spawn(&mut command).context("cannot start fairlead")?;
        Ok(Self { process: Process::Fairlead(child), log, since })
    }

    pub(super) fn pid(&self) -> u32 {
        match &self.process {
            Process::Fairlead(child) => child.id(),
            Process::KubeProxy(proxy) => proxy.pid().cast_unsigned(),
        }
    }

    /// True while its process lives.
    pub(super) fn is_alive(&self) -> bool {
        // One that has ended and is not waited for yet has no memory.
        fs::read(format!("/proc/{}/cmdline", self.pid())).is_ok_and(|line| !line.is_empty())
    }

    /// The end of its log, for an error.
    pub(super) fn log_tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(15)..].join("\n")
    }

    /// Ends it and removes what it left in the kernel.
    pub(super) fn end(self, cluster: &Cluster) -> Result<()> {
        let node = &cluster.lab.node.ns;
        match self.process {
            Process::Fairlead(child) => {
                end(child)?;
                let mut cleanup = node.command(find_binary()?);
                netns::run(cleanup.arg("cleanup").arg("--pin-path").arg(cluster.lab.pin_path()))?;
            }
            Process::KubeProxy(proxy) => {
                drop(proxy);
                node.nft("delete table ip kube-proxy\ndelete table ip6 kube-proxy\n")?;
                // What its rules decided would outlive them there.
                node.output("conntrack", &["-F"])?;
            }
        }
        let left = node.output("nft", &["list", "tables"])?;
        ensure!(left.is_empty(), "the node still has rules: {left}");
        Ok(())
    }
}

fn end(mut child: Child) -> Result<()> {
    janitor::release(child.id());
    // One that is gone needs no signal.
    kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).ok();
    if wait_until(ENDED, || !matches!(child.try_wait(), Ok(None))) {
        return Ok(());
    }
    child.kill().ok();
    child.wait().ok();
    bail!("fairlead did not end within {ENDED:?} of SIGTERM")
}
