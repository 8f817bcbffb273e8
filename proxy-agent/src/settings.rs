//! What programs read in `CONFIG`, kept in step while they run: with kube-proxy's rules, with the ports that the kernel
//! gives to the node's sockets, with the networks of the node's pods and
//! of ClusterIPs.

use std::io;
use std::time::Duration;

use anyhow::Context as _;
use ipnet::IpNet;
use tokio::sync::{mpsc, watch};
use tokio::time::MissedTickBehavior;

use crate::config::{LocalPods, first_of_each_family};
use crate::dataplane::Subject;
use crate::dataplane::probe::kube_proxy;
use crate::dataplane::settings::{Local, SettingsMap, Wanted};
use crate::source_ports::{ENOUGH, SourcePorts, Span};
use crate::status::{Entry, News};
use crate::sysctl::{Set, Sysctls};

/// How often kube-proxy's rules and /proc/sys are looked at: nobody tells when they change.
const INTERVAL: Duration = Duration::from_secs(10);

/// What the flags say of it.
#[derive(Clone, Debug)]
pub struct Rules {
    /// `--masquerade-all`.
    pub masquerade_all: bool,
    /// `--detect-local-mode` and its kin.
    pub local_pods: LocalPods,
    /// `--service-node-port-range`.
    pub node_ports: Span,
    /// `--manage-sysctls`.
    pub manage_sysctls: bool,
}

/// What is found on the node.
#[derive(Debug)]
pub struct Node {
    rules: Rules,
    sysctls: Sysctls,
    /// What was said of the source ports last.
    said: Option<String>,
    /// Whether the lack of `accept_local` was logged.
    told_of_loopback: bool,
}

impl Node {
    /// Nothing looked at yet.
    pub const fn new(rules: Rules, sysctls: Sysctls) -> Self {
        Self { rules, sysctls, said: None, told_of_loopback: false }
    }

    /// What should be said before the own Node is known.
    pub fn first(&mut self, kube_proxy: bool) -> Wanted {
        let local = match &self.rules.local_pods {
            LocalPods::Devices(_) => Local::Devices,
            LocalPods::Networks(networks) => Local::Networks(networks.clone()),
            LocalPods::OfNode => Local::Later,
            LocalPods::Unknown => Local::Unknown,
        };
        let masquerade_all = self.rules.masquerade_all;
        self.accept_local();
        Wanted { kube_proxy, masquerade_all, local, source_ports: self.source_ports().0, service_cidrs: None }
    }

    /// The own Node has told of its pods' networks.
    fn told(&self, wanted: &mut Wanted, pod_cidrs: Option<&Vec<IpNet>>) {
        if let (LocalPods::OfNode, Some(networks)) = (&self.rules.local_pods, pod_cidrs) {
            wanted.local = Local::Networks(first_of_each_family(networks));
        }
    }

    /// Lets the answers of the node's own addresses in on `lo`.
    fn accept_local(&mut self) {
        if self.sysctls.accepts_local() {
            return;
        }
        let set = self.rules.manage_sysctls.then(|| self.sysctls.accept_local());
        if let Some(Ok(set)) = &set {
            let (entry, change, file) = (set.name(), set.change(), self.sysctls.record().display());
            tracing::info!(entry, change, %file, "answers of the node's own addresses come in on lo; `fairlead cleanup` restores it");
        } else if !std::mem::replace(&mut self.told_of_loopback, true) {
            let why = set.and_then(Result::err).map(|error| format!(" cannot be set ({error})"));
            tracing::warn!(
                "net.ipv4.conf.lo.accept_local is 0{}: processes of this node get no answer from NodePorts of its own IPv4 \
                 addresses, nor from other Services at these (sysctl -w net.ipv4.conf.lo.accept_local=1)",
                why.map_or_else(String::new, |why| format!(" and{why}"))
            );
        }
    }

    /// The ports that masquerade may use now, and what is wrong with them. Both are logged once.
    fn source_ports(&mut self) -> (SourcePorts, Option<String>) {
        let (ports, set) = self.sysctls.source_ports(&self.rules.node_ports, self.rules.manage_sysctls);
        let problem = (ports.count() < ENOUGH).then(|| too_few(ports, set.as_ref()));
        if let Some(Ok(Set { entry, before, added })) = &set {
            let file = self.sysctls.record().display();
            tracing::info!(entry, before, added, %file, "ports reserved for masquerade; `fairlead cleanup` gives them back");
        }
        let said = problem.clone().unwrap_or_else(|| ports.to_string());
        if self.said.as_ref() != Some(&said) {
            match &problem {
                Some(problem) => tracing::error!("{problem}"),
                None => tracing::info!(%ports, "source ports of masquerade"),
            }
            self.said = Some(said);
        }
        (ports, problem)
    }
}

fn too_few(ports: SourcePorts, set: Option<&io::Result<Set>>) -> String {
    let count = ports.count();
    let failed = match set {
        Some(Err(error)) => format!(" net.ipv4.ip_local_reserved_ports cannot be set ({error});"),
        _ => String::new(),
    };
    format!(
        "masquerade has {count} source ports ({ports}), {ENOUGH} are needed: the kernel gives the rest to the node's own \
         sockets;{failed} reserve some (sysctl -w net.ipv4.ip_local_reserved_ports=61000-65535) or narrow \
         net.ipv4.ip_local_port_range"
    )
}

/// What the control plane tells.
pub struct Inputs {
    /// The networks of the own Node's pods.
    pub pod_cidrs: watch::Receiver<Option<Vec<IpNet>>>,
    /// The networks around ClusterIPs.
    pub service_networks: watch::Receiver<Option<Vec<IpNet>>>,
    /// Who shows what is wrong.
    pub news: mpsc::UnboundedSender<News>,
}

/// Keeps `CONFIG` in step for ever. `wanted` is what it says already.
pub async fn run(mut map: SettingsMap, mut node: Node, mut wanted: Wanted, mut inputs: Inputs) -> anyhow::Result<()> {
    let mut ticks = tokio::time::interval(INTERVAL);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut wrong = None;
    loop {
        let before = wanted.clone();
        tokio::select! {
            _ = ticks.tick() => {
                wanted.kube_proxy = kube_proxy::stands().context("cannot look for kube-proxy's rules")?;
                node.accept_local();
                let (ports, problem) = node.source_ports();
                wanted.source_ports = ports;
                if problem != wrong {
                    // Whoever shows it may end first.
                    _ = inputs.news.send(News(vec![(Subject::SourcePorts, problem.clone().map(entry))]));
                    wrong = problem;
                }
            }
            changed = inputs.pod_cidrs.changed() => {
                changed.context("the control plane ended")?;
                node.told(&mut wanted, inputs.pod_cidrs.borrow_and_update().as_ref());
            }
            changed = inputs.service_networks.changed() => {
                changed.context("the control plane ended")?;
                wanted.service_cidrs.clone_from(&inputs.service_networks.borrow_and_update());
            }
        }
        if before.kube_proxy != wanted.kube_proxy {
            tracing::info!(stands = wanted.kube_proxy, "kube-proxy's rules came or went");
        }
        if let Local::Networks(networks) = &wanted.local
            && before.local != wanted.local
        {
            tracing::info!(?networks, "the Node says which addresses its pods have");
        }
        map.apply(&wanted)?;
    }
}

fn entry(problem: String) -> Entry {
    Entry { subject: Subject::SourcePorts.to_string(), service: None, error: None, unserved: vec![problem] }
}
