//! The cells of the matrix, the cluster that the cases of a cell share, and what every case needs of it.

use std::{
    cell::Cell as Counter,
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicU16, Ordering},
    },
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, bail, ensure};
use fairlead_lab::{
    Agent, AgentOptions, Answer, Ask, Attempt, Capture, Flat, Lab, LabConfig, Manifests, Namespace, Netfilter, Proto,
    Server, ServiceSpec, Shape, capture, manifest::EndpointSpec, server::wait_until, topology::UPLINK,
};
use fairlead_tests::{
    counters::{self, Outcomes},
    listed,
};

/// Every pod, and the external host's remote pods, answer here.
pub(crate) use fairlead_tests::nodes::TARGET;
/// How long a change may take until it is an error, not the slowness of a busy machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
/// A refusal must be heard within this, at the best of some attempts: the others may have waited for the processor.
const PROMPT: Duration = Duration::from_millis(100);
/// Attempts to be refused.
const REFUSALS: usize = 3;

/// A CNI shape and what netfilter does in the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Cell {
    pub(crate) name: &'static str,
    pub(crate) shape: Shape,
    pub(crate) netfilter: Netfilter,
    pub(crate) flat: Option<Flat>,
}

const fn cell(name: &'static str, shape: Shape, netfilter: Netfilter) -> Cell {
    Cell { name, shape, netfilter, flat: None }
}

const fn flat(name: &'static str, flat: Flat, netfilter: Netfilter) -> Cell {
    Cell { name, shape: Shape::Routed, netfilter, flat: Some(flat) }
}

const BRIDGE: Shape = Shape::Bridge { br_netfilter: false };
const BRIDGE_NF: Shape = Shape::Bridge { br_netfilter: true };

const CELLS: [Cell; 13] = [
    cell("routed_plain", Shape::Routed, Netfilter::None),
    cell("routed_conntrack", Shape::Routed, Netfilter::Conntrack),
    cell("routed_invalid_drop", Shape::Routed, Netfilter::InvalidDrop),
    cell("bridge_plain", BRIDGE, Netfilter::None),
    cell("bridge_conntrack", BRIDGE, Netfilter::Conntrack),
    cell("bridge_invalid_drop", BRIDGE, Netfilter::InvalidDrop),
    cell("bridge_nf_plain", BRIDGE_NF, Netfilter::None),
    cell("bridge_nf_conntrack", BRIDGE_NF, Netfilter::Conntrack),
    cell("bridge_nf_invalid_drop", BRIDGE_NF, Netfilter::InvalidDrop),
    flat("tun_uplink_plain", Flat::Uplink, Netfilter::None),
    flat("tun_uplink_invalid_drop", Flat::Uplink, Netfilter::InvalidDrop),
    flat("tun_overlay_conntrack", Flat::Overlay, Netfilter::Conntrack),
    flat("tun_overlay_invalid_drop", Flat::Overlay, Netfilter::InvalidDrop),
];

/// The shared clusters, one a cell, made when first needed. A case that panics leaves its cluster to the next one.
static SHARED: [Mutex<Option<Cluster>>; CELLS.len()] = [const { Mutex::new(None) }; CELLS.len()];

/// The combination that a case runs for.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Combo {
    pub(crate) v6: bool,
    pub(crate) proto: Proto,
}

impl Combo {
    /// Both families, both transports.
    pub(crate) const ALL: [Self; 4] = [
        Self { v6: false, proto: Proto::Tcp },
        Self { v6: false, proto: Proto::Udp },
        Self { v6: true, proto: Proto::Tcp },
        Self { v6: true, proto: Proto::Udp },
    ];
}

impl Cell {
    /// The cell of this name.
    pub(crate) fn named(name: &str) -> Self {
        CELLS.into_iter().find(|cell| cell.name == name).unwrap_or_else(|| panic!("no cell is called {name}"))
    }

    /// Runs a case on the cell's shared cluster for every combination; failures are collected and named.
    pub(crate) fn run(self, case: fn(&Cluster, Combo) -> Result<()>) {
        let place = CELLS.iter().position(|cell| *cell == self).expect("every cell is in the table");
        let mut shared = SHARED[place].lock().unwrap_or_else(PoisonError::into_inner);
        // An agent that died in an earlier case fails that case; the others get a new one.
        if shared
            .as_ref()
            .is_some_and(|cluster| !cluster.agent.lock().unwrap_or_else(PoisonError::into_inner).is_running())
        {
            *shared = None;
        }
        if shared.is_none() {
            *shared = Some(Cluster::own(self, AgentOptions::default()));
        }
        self.run_on(shared.as_ref().expect("it was made above"), case);
    }

    /// The same on a cluster of its own, whose agent has further arguments.
    pub(crate) fn run_with(self, args: &[&str], case: fn(&Cluster, Combo) -> Result<()>) {
        let args = args.iter().map(Into::into).collect();
        self.run_on(&Cluster::own(self, AgentOptions { args, ..AgentOptions::default() }), case);
    }

    fn run_on(self, cluster: &Cluster, case: fn(&Cluster, Combo) -> Result<()>) {
        let mut failures = Vec::new();
        for combo in Combo::ALL {
            let before = cluster.outcomes();
            if let Err(error) = case(cluster, combo) {
                let family = if combo.v6 { "IPv6" } else { "IPv4" };
                let outcomes = cluster.outcomes_since(&before);
                failures.push(format!("[{} {family} {}] {error:#}\n    outcomes: {outcomes}", self.name, combo.proto));
            }
        }
        assert!(failures.is_empty(), "\n{}\n{}", failures.join("\n"), cluster.agent_log_tail());
    }
}

/// A lab with an agent and servers: every server pod, and two "pods of another node" behind the external host.
pub(crate) struct Cluster {
    pub(crate) cell: Cell,
    /// Dropped before the lab, so that it can still clean up in its namespace.
    pub(crate) agent: Mutex<Agent>,
    pub(crate) manifests: Manifests,
    _servers: Vec<Server>,
    pub(crate) lab: Lab,
    next: Counter<u16>,
}

// Behind a mutex a cluster has one user at a time; the counter is its only part that is not Sync.
impl Cluster {
    /// A cluster of the caller's own. Panics when it cannot be built: then there is nothing to test.
    pub(crate) fn own(cell: Cell, options: AgentOptions) -> Self {
        let built = Self::build(LabConfig::new(cell.shape, cell.netfilter), cell, options, |_| Ok(()));
        built.unwrap_or_else(|error| panic!("[{}] {error:#}", cell.name))
    }

    /// The same with one server pod, where something of the lab is wired otherwise before anybody listens.
    pub(crate) fn rewired(cell: Cell, options: AgentOptions, wire: impl FnOnce(&Lab) -> Result<()>) -> Self {
        let config = LabConfig { pods: 1, ..LabConfig::new(cell.shape, cell.netfilter) };
        Self::build(config, cell, options, wire).unwrap_or_else(|error| panic!("[{}] {error:#}", cell.name))
    }

    fn build(
        config: LabConfig,
        cell: Cell,
        options: AgentOptions,
        wire: impl FnOnce(&Lab) -> Result<()>,
    ) -> Result<Self> {
        let lab = Lab::new(LabConfig { flat: cell.flat, ..config })?;
        wire(&lab)?;
        let mut servers = Vec::new();
        for pod in &lab.pods {
            servers.push(Server::both(
                &pod.ns,
                &pod.name,
                &[false, true].map(|v6| SocketAddr::new(pod.ip(v6), TARGET)),
            )?);
        }
        for (n, name) in ["remote-0", "remote-1"].into_iter().enumerate() {
            let addrs = [false, true].map(|v6| SocketAddr::new(Lab::remote_pods(v6)[n], TARGET));
            servers.push(Server::both(&lab.ext.ns, name, &addrs)?);
        }
        let agent = Agent::start(&lab, options)?;
        // An emulated processor verifies programs for longer than the agent waits for its devices.
        let served = || {
            let waits = |row: &serde_json::Value| {
                !matches!(row["role"].as_str(), Some("none" | "bridge")) && row["egress"] == "none"
            };
            listed::rows(&agent, "devices").is_ok_and(|rows| !rows.is_empty() && !rows.iter().any(waits))
        };
        ensure!(wait_until(PATIENCE, served), "devices are not served:\n{}", agent.log_text());
        let manifests = agent.manifests.clone();
        Ok(Self { cell, agent: Mutex::new(agent), manifests, _servers: servers, lab, next: Counter::new(0) })
    }

    /// A Service of the test's own, dual stack, TCP and UDP port 80. It is deleted when the handle is dropped.
    pub(crate) fn service(&self, what: &str) -> Service<'_> {
        self.service_on(what, |spec| spec)
    }

    /// The same with a NodePort and `externalTrafficPolicy: Local`.
    pub(crate) fn node_port_service(&self, what: &str) -> Service<'_> {
        let port = 30_000 + self.next.get();
        self.service_on(what, |spec| spec.node_port_local(port))
    }

    /// The same with `externalTrafficPolicy: Cluster`.
    pub(crate) fn masqueraded_service(&self, what: &str) -> Service<'_> {
        let port = 30_000 + self.next.get();
        self.service_on(what, |spec| spec.node_port(port))
    }

    fn service_on(&self, what: &str, with: impl FnOnce(ServiceSpec) -> ServiceSpec) -> Service<'_> {
        let n = self.next.get() + 1;
        self.next.set(n);
        let [high, low] = (256 + n).to_be_bytes();
        let vips: [IpAddr; 2] =
            [Ipv4Addr::new(10, 96, high, low).into(), Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, 256 + n).into()];
        let spec = with(ServiceSpec::both(&format!("{what}-{n}"), &vips, 80, TARGET));
        Service { cluster: self, spec }
    }

    /// The address of a server pod.
    pub(crate) fn pod_ip(&self, n: usize, v6: bool) -> IpAddr {
        self.lab.pods[n].ip(v6)
    }

    /// Waits until the agent offers just these pods as endpoints of a Service.
    pub(crate) fn wait_for_endpoints(&self, service: &ServiceSpec, pods: &[usize]) -> Result<()> {
        let wanted: BTreeSet<IpAddr> = pods.iter().flat_map(|&n| [false, true].map(|v6| self.pod_ip(n, v6))).collect();
        let start = Instant::now();
        loop {
            let rows = listed::rows(&self.agent.lock().unwrap_or_else(PoisonError::into_inner), "endpoints")?;
            let own = rows.iter().filter(|row| row["service"] == *service.name);
            let found: BTreeSet<IpAddr> = own.filter_map(|row| row["address"].as_str()?.parse().ok()).collect();
            if found == wanted {
                return Ok(());
            }
            ensure!(start.elapsed() < PATIENCE, "the agent still offers {found:?} for {}", service.name);
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// How many packets ended in each way so far; for messages, nothing where it cannot be read.
    pub(crate) fn outcomes(&self) -> Outcomes {
        counters::of(&self.lab)
    }

    pub(crate) fn outcomes_since(&self, before: &Outcomes) -> String {
        counters::told_since(before, &self.lab)
    }

    /// The last lines of the agent's log.
    pub(crate) fn agent_log_tail(&self) -> String {
        self.agent.lock().unwrap_or_else(PoisonError::into_inner).last_words()
    }

    /// What passes the external host's device while `f` runs must hold no packet to a Service address from the node:
    /// a VIP never leaks to the wire.
    pub(crate) fn without_leak<T>(&self, f: impl FnOnce() -> Result<T>) -> Result<T> {
        let wire = Capture::start(&self.lab.ext.ns, UPLINK)?;
        let result = f()?;
        let leaked: Vec<_> =
            wire.stop().into_iter().filter(|packet| !packet.outgoing && is_service_ip(packet.dst)).collect();
        ensure!(leaked.is_empty(), "a Service address left the node by its uplink:\n{}", capture::show(&leaked));
        Ok(result)
    }
}

fn is_service_ip(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[..2] == [10, 96],
        IpAddr::V6(ip) => ip.segments()[..3] == [0xfd00, 0x10, 0x96],
    }
}

/// A Service of one test.
pub(crate) struct Service<'a> {
    cluster: &'a Cluster,
    pub(crate) spec: ServiceSpec,
}

impl Service<'_> {
    /// Where it answers.
    pub(crate) fn vip(&self, v6: bool) -> SocketAddr {
        self.spec.vip(v6).expect("Services of this tier have both families")
    }

    /// Its NodePort on the node's uplink address.
    pub(crate) fn node_port(&self, v6: bool) -> SocketAddr {
        let port = self.spec.ports[0].node_port.expect("a NodePort Service");
        SocketAddr::new(self.cluster.lab.node.ip(v6), port)
    }

    /// Server pods as endpoints of this node.
    pub(crate) fn pods(&self, pods: &[usize]) -> Vec<EndpointSpec> {
        let both = |n: &usize| [false, true].map(|v6| EndpointSpec::here(self.cluster.pod_ip(*n, v6)));
        pods.iter().flat_map(both).collect()
    }

    /// Endpoints on another node.
    pub(crate) fn remotes(&self) -> Vec<EndpointSpec> {
        [false, true].into_iter().flat_map(|v6| Lab::remote_pods(v6).map(EndpointSpec::elsewhere)).collect()
    }

    /// Writes the Service with these endpoints, and waits until `ask` from `ns` is answered.
    pub(crate) fn serve(&self, endpoints: &[EndpointSpec], ns: &Namespace, ask: Ask) -> Result<Answer> {
        self.cluster.manifests.apply(&self.spec, endpoints)?;
        let what = format!("an answer from {}/{} after the Service was written", ask.to, ask.proto);
        let attempt = eventually(&what, ns, ask, |attempt| attempt.outcome.answer().is_some())?;
        attempt.outcome.answer().cloned().context("an answer")
    }

    /// Rewrites its endpoints.
    pub(crate) fn endpoints(&self, endpoints: &[EndpointSpec]) -> Result<()> {
        self.cluster.manifests.endpoints(&self.spec, endpoints)
    }

    /// Deletes it now.
    pub(crate) fn delete(&self) -> Result<()> {
        self.cluster.manifests.delete(&self.spec)
    }
}

impl Drop for Service<'_> {
    fn drop(&mut self) {
        // Already deleted by the test, or never written.
        self.delete().ok();
    }
}

/// A client port that no other case uses: below the ephemeral ones, so that nobody else takes it either. Direct questions
/// of the node need one: on a port of a Service connection of the node to the same endpoint they are lost today.
pub(crate) fn own_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(20_000);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Asks with fresh ports until the attempt is as wanted. Attempts are short at first, and longer while nothing comes.
pub(crate) fn eventually(what: &str, ns: &Namespace, ask: Ask, wanted: impl Fn(&Attempt) -> bool) -> Result<Attempt> {
    let (start, mut timeout) = (Instant::now(), Duration::from_millis(100));
    loop {
        let attempt = ask.timeout(timeout).once(ns)?;
        if wanted(&attempt) {
            return Ok(attempt);
        }
        if start.elapsed() > PATIENCE {
            bail!("{what}: not within {PATIENCE:?}; the last attempt: {attempt}");
        }
        if attempt.outcome == fairlead_lab::Outcome::Timeout {
            timeout = (timeout * 2).min(Duration::from_secs(2));
        }
        std::thread::sleep(Duration::from_millis(2));
    }
}

/// One question that must be answered without a lost packet in between.
pub(crate) fn answered(ns: &Namespace, ask: Ask) -> Result<Answer> {
    let attempt = ask.once(ns)?;
    let answer = attempt.outcome.answer().cloned();
    answer.with_context(|| format!("{} → {}/{}: {attempt}", ns.name(), ask.to, ask.proto))
}

/// Questions that must all be refused, promptly.
pub(crate) fn refused(ns: &Namespace, ask: Ask) -> Result<()> {
    let mut fastest = Duration::MAX;
    for _ in 0..REFUSALS {
        let attempt = ask.once(ns)?;
        let fits = attempt.outcome == fairlead_lab::Outcome::Refused;
        ensure!(fits, "{} → {}/{}: expected a refusal, got {attempt}", ns.name(), ask.to, ask.proto);
        fastest = fastest.min(attempt.elapsed);
    }
    let route = format!("{} → {}/{}", ns.name(), ask.to, ask.proto);
    ensure!(fastest < PROMPT, "{route}: the fastest of {REFUSALS} refusals took {fastest:?}");
    Ok(())
}
