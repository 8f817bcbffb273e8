//! kube-proxy in nftables mode: the oracle of the parity cases and the peer of the benchmarks.

use std::{
    net::{IpAddr, Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail};
use fairlead_lab::{Namespace, http, topology::POD_CIDRS};

use super::{
    ControlPlane, Passage,
    process::{Log, Process},
};

/// It waits for its Node's addresses up to half a minute by itself.
const SYNCED_WITHIN: Duration = Duration::from_secs(120);
/// The metric that names the time of a family's last successful sync.
const LAST_SYNC: &str = "kubeproxy_sync_proxy_rules_last_timestamp_seconds{ip_family=";

/// A running kube-proxy. Dropping it ends it; its rules stay in the namespace, as in every cluster.
#[derive(Debug)]
pub struct KubeProxy {
    process: Process,
    netns: Namespace,
    log: Log,
    _passage: Option<Passage>,
}

impl KubeProxy {
    /// Where it says whether it is healthy: as by default, but on the namespace's own loopback.
    pub const HEALTH: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10256);
    /// Where it shows its metrics.
    pub const METRICS: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 10249);

    /// Starts it in `netns` for the Node of this name and returns once both families have been synced. `options` are
    /// added to its command line; unless they say who is a pod of the node, the lab's pods are. Where the namespace is not
    /// the API server's own, a [`Passage`] leads there.
    pub fn start(plane: &ControlPlane, netns: &Namespace, node: &str, options: &[&str]) -> Result<Self> {
        let mut proxy = Self::launch(plane, netns, node, options)?;
        proxy.wait_synced().with_context(|| format!("kube-proxy is of no use{}", proxy.log.tail()))?;
        Ok(proxy)
    }

    /// The same without waiting.
    pub fn launch(plane: &ControlPlane, netns: &Namespace, node: &str, options: &[&str]) -> Result<Self> {
        let passage = (netns.name() != plane.netns.name()).then(|| Passage::open(netns, plane)).transpose()?;
        let log = Log::new(plane.dir(), "kube-proxy");
        let mut command = netns.command(plane.programs.path("kube-proxy"));
        command
            .arg(format!("--kubeconfig={}", plane.proxy_kubeconfig().display()))
            .arg(format!("--hostname-override={node}"))
            .arg(format!("--healthz-bind-address={}", Self::HEALTH))
            .arg(format!("--metrics-bind-address={}", Self::METRICS))
            .args([
                "--proxy-mode=nftables",
                "--bind-address-hard-fail=true",
                // The machine's own settings, which a namespace cannot set: 0 leaves them alone.
                "--conntrack-max-per-core=0",
                "--conntrack-min=0",
                "--conntrack-tcp-timeout-established=0s",
                "--conntrack-tcp-timeout-close-wait=0s",
            ])
            .args(options);
        let says_who_is_local =
            |option: &&str| option.starts_with("--cluster-cidr") || option.starts_with("--detect-local");
        if !options.iter().any(says_who_is_local) {
            command.arg(format!("--cluster-cidr={}", POD_CIDRS.join(",")));
        }
        let process = Process::start(&mut command, &log, None)?;
        Ok(Self { process, netns: netns.clone(), log, _passage: passage })
    }

    /// Waits until both families have been synced and its health says so.
    pub fn wait_synced(&mut self) -> Result<()> {
        let deadline = Instant::now() + SYNCED_WITHIN;
        loop {
            self.process.check()?;
            if self.has_synced()? {
                return Ok(());
            }
            if Instant::now() > deadline {
                bail!("it was not synced within {SYNCED_WITHIN:?}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// Its health is asked first, which tells also that it has begun; but it is healthy before its first sync.
    fn has_synced(&self) -> Result<bool> {
        let healthy = http::ask(&self.netns, Self::HEALTH, "GET", "/healthz")?.is_ok_and(|answer| answer.status == 200);
        if !healthy {
            return Ok(false);
        }
        let Ok(metrics) = http::ask(&self.netns, Self::METRICS, "GET", "/metrics")? else { return Ok(false) };
        let synced = metrics.body.lines().filter(|line| {
            let value = line.strip_prefix(LAST_SYNC).and_then(|rest| rest.split(' ').nth(1)?.parse::<f64>().ok());
            value.is_some_and(|time| time > 0.0)
        });
        Ok(synced.count() == 2)
    }

    /// Its process id, for what the kernel says of it.
    pub fn pid(&self) -> i32 {
        self.process.pid().as_raw()
    }
}
