//! `fairlead run`: loads, starts every part as a named task, and ends with the first that fails or with a signal.
//!
//! Ending takes nothing down: programs, maps and links stay pinned, and the next start takes over.

use std::borrow::Cow;
use std::collections::HashSet;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::affinity::AffinityMaps;
use crate::args::RunArgs;
use crate::config::{self, Config, Invalid, LocalPods, NodePortAddresses};
use crate::dataplane::attach::Attacher;
use crate::dataplane::bpf::{Access, BpfDataplane};
use crate::dataplane::probe::{self, kube_proxy};
use crate::dataplane::settings::{SettingsMap, Wanted};
use crate::dataplane::{load, sys};
use crate::devices::desired::Wishes;
use crate::devices::{Devices, NodeAddresses};
use crate::events::{About, Events, Notice, Severity};
use crate::flows::FlowMaps;
use crate::gc::FlowUse;
use crate::health::node_ports::{self, HealthChecks};
use crate::health::{self, Health};
use crate::http::Place;
use crate::index::Event;
use crate::k8s::watch::KubeApi;
use crate::metrics::gather::{Sources, Stats};
use crate::metrics::{self, Metrics};
use crate::plan::node_ports::NodePorts;
use crate::source::Source;
use crate::source::folder::Folder;
use crate::startup::{self, Found};
use crate::status;
use crate::sync::{self, Input, Listeners};
use crate::sysctl::Sysctls;
use crate::{gc, settings, telemetry};

/// Wrong usage.
const USAGE: u8 = 2;
/// Events that may wait for the control plane. The first lists of a large cluster fit in, so that they are read while
/// the programs are being loaded.
const INPUTS: usize = 16_384;
/// How long an agent that fails waits for its last Event to be written.
const LAST_EVENT: std::time::Duration = std::time::Duration::from_secs(2);

/// Runs until a signal or a failure; the exit code says which.
pub fn main(args: RunArgs) -> ExitCode {
    let config = match Config::try_from(args) {
        Ok(config) => config,
        Err(error) => return usage(&error),
    };
    if let Err(error) = telemetry::init(config.log.clone(), config.log_format) {
        crate::cli::complain(&error.to_string());
        return ExitCode::FAILURE;
    }
    // Two threads: one may be in a system call that waits for the kernel's readers while the other answers events.
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build();
    let result = runtime.context("cannot start the threads").and_then(|runtime| {
        let result = runtime.block_on(run(config));
        // A sweep under way must not hold the end up.
        runtime.shutdown_background();
        result
    });
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            crate::cli::complain(&crate::cli::chain(&error));
            ExitCode::FAILURE
        }
    }
}

fn usage(error: &Invalid) -> ExitCode {
    crate::cli::complain(&error.to_string());
    ExitCode::from(USAGE)
}

/// Tasks by name: the first that ends, ends the process.
struct Tasks(JoinSet<(&'static str, anyhow::Result<()>)>);

impl Tasks {
    fn spawn<E>(&mut self, name: &'static str, task: impl Future<Output = Result<(), E>> + Send + 'static)
    where
        E: Into<anyhow::Error>,
    {
        self.0.spawn(async move { (name, task.await.map_err(Into::into)) });
    }

    /// A task that has no way to fail.
    fn serve(&mut self, name: &'static str, task: impl Future<Output = ()> + Send + 'static) {
        self.spawn(name, async move {
            task.await;
            Ok::<_, anyhow::Error>(())
        });
    }

    async fn first_end(&mut self) -> anyhow::Result<()> {
        match self.0.join_next().await {
            Some(Ok((name, Ok(())))) => anyhow::bail!("{name} ended unexpectedly"),
            Some(Ok((name, Err(error)))) => Err(error.context(format!("{name} failed"))),
            Some(Err(error)) => Err(error).context("a task panicked"),
            None => Ok(()),
        }
    }
}

async fn run(config: Config) -> anyhow::Result<()> {
    // Before anything is touched, so that a signal during the start ends the process in order too.
    let mut terminate = signal(SignalKind::terminate()).context("cannot listen for SIGTERM")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("cannot listen for SIGINT")?;
    // A task of its own: the start makes system calls that may wait for the kernel, and a signal is heard meanwhile.
    let work = tokio::spawn(async {
        let mut tasks = start(config).await?;
        tasks.first_end().await
    });
    tokio::select! {
        result = work => result.context("the agent panicked")?,
        _ = terminate.recv() => stop("SIGTERM"),
        _ = interrupt.recv() => stop("SIGINT"),
    }
}

fn stop(signal: &'static str) -> anyhow::Result<()> {
    tracing::info!(signal, "stopping; programs and maps stay in the kernel");
    Ok(())
}

async fn start(config: Config) -> anyhow::Result<Tasks> {
    let node = match &config.node_name {
        Some(name) => name.clone(),
        None => sys::host_name().context("cannot find the host's name; give --node-name")?,
    };
    let mut tasks = Tasks(JoinSet::new());
    let health = Arc::new(Health::default());
    let metrics = Arc::new(Metrics::new());
    // First, because a folder or kubeconfig that is not there should be said before anything is touched.
    let (source, events) = source(&config, &node, &health, &metrics, &mut tasks).await?;
    let healthz = place("health", config.healthz, config.hard_fail, "FailedToStartProxierHealthcheck", &events).await?;
    let metrics_place =
        place("metrics", config.metrics, config.hard_fail, "FailedToStartMetricServer", &events).await?;
    // Nothing that follows may keep the kubelet without an answer.
    if let Some(place) = healthz {
        tasks.serve("the health server", health::server::run(place, Arc::clone(&health), metrics.answers.clone()));
    }
    let rules = settings::Rules {
        masquerade_all: config.masquerade_all,
        local_pods: config.local_pods.clone(),
        node_ports: config.node_port_range.clone(),
        manage_sysctls: config.manage_sysctls,
    };
    let sysctls = Sysctls::of(&config.pins).context("cannot identify the network namespace")?;
    let mut settled = settings::Node::new(rules, sysctls);
    let kube_proxy = kube_proxy::stands().context("cannot look for kube-proxy's rules")?;
    let first = settled.first(kube_proxy);
    let described = source.describe();
    let (inputs, control_plane) = mpsc::channel(INPUTS);
    tasks.spawn("the source of Services", source.run(inputs.clone()));
    let (attacher, found) = load(&config, &first)?;
    let pods = match &config.local_pods {
        LocalPods::Devices(devices) => Some(devices.clone()),
        LocalPods::Networks(_) | LocalPods::OfNode | LocalPods::Unknown => None,
    };
    let nodeport_addresses = config.nodeport_addresses.clone();
    let wishes = Wishes { selection: config.devices.clone(), nodeport_addresses, pods, replies: config.reply_mark };
    let (devices, addresses) = Devices::start(attacher, &config.pins, wishes).await?;
    let dataplane = BpfDataplane::open(&config.pins, Access::Write)?;
    let flows = FlowMaps::open(&config.pins)?;
    let clients = AffinityMaps::open(&config.pins)?;
    let settings = SettingsMap::open(&config.pins)?;
    let (own_pods, pod_cidrs) = watch::channel(None);
    let (cluster_ips, service_networks) = watch::channel(None);
    let stats = Stats::open(&config.pins).context("cannot use map STATS")?;

    let answering = match (&config.nodeport_addresses, &config.source) {
        (NodePortAddresses::Primary, config::Source::Manifests(_)) => NodePorts::OfNodeOrGiven,
        (NodePortAddresses::Primary, _) => NodePorts::OfNode,
        (_, config::Source::Manifests(_)) => NodePorts::Given,
        _ => NodePorts::GivenBesideNode,
    };
    let (live, live_addresses) = mpsc::channel(1);
    let (checks, health_checks) = watch::channel(HealthChecks::new());
    let (own, node_addresses) = watch::channel(NodeAddresses::new());
    let (used, flow_use) = watch::channel(FlowUse::default());
    let (news, status) = mpsc::unbounded_channel();
    let of_node = settings::Inputs { pod_cidrs, service_networks, news: news.clone() };
    let listeners = Listeners {
        news,
        checks,
        addresses: own,
        pod_cidrs: own_pods,
        service_networks: cluster_ips,
        health: Arc::clone(&health),
        syncs: metrics.syncs.clone(),
    };
    let sources = Sources { stats, control_plane: inputs.clone(), flows: flow_use, devices: devices.census() };
    let node_ports = node_ports::Inputs {
        checks: health_checks,
        addresses: node_addresses,
        policy: config.nodeport_addresses,
        health: Arc::clone(&health),
        events: events.clone(),
        node: node.clone(),
    };
    startup::report(found, config.attach, &devices, &node, &described);
    tasks.spawn("the control plane", sync::run(dataplane, answering, control_plane, listeners));
    tokio::spawn(status::file::follow(status::file::of(&config.pins), status));
    tasks.spawn("the devices' task", devices.run());
    tasks.spawn("the relay of addresses", relay(addresses, live_addresses, inputs));
    tasks.spawn("the sweep over flows", gc::run(flows, clients, config.timeouts, config.sweep_interval, live, used));
    tasks.spawn("the health checks of Services", node_ports::run(node_ports));
    if let Some(place) = metrics_place {
        tasks.serve("the metrics server", metrics::server::run(place, metrics, sources));
    }
    tasks.spawn("the settings' task", settings::run(settings, settled, first, of_node));
    events.tell(Notice {
        about: About::Node,
        severity: Severity::Normal,
        reason: "Starting",
        action: "StartFairlead",
        note: format!("fairlead {} serves this node", env!("CARGO_PKG_VERSION")),
    });
    Ok(tasks)
}

/// The source of Services, and where Events are told.
async fn source(
    config: &Config,
    node: &str,
    health: &Health,
    metrics: &Metrics,
    tasks: &mut Tasks,
) -> anyhow::Result<(Box<dyn Source>, Events)> {
    let api = match &config.source {
        config::Source::Manifests(dir) => {
            std::fs::read_dir(dir)
                .with_context(|| format!("cannot read {}; --manifests wants a folder of YAML files", dir.display()))?;
            // Without a cluster nobody is about to remove the node.
            health.node(false);
            return Ok((Box::new(Folder::new(dir, node)), Events::nobody()));
        }
        config::Source::Kubeconfig(file) => {
            KubeApi::from_kubeconfig(file, config.api_server.as_deref(), node, metrics.api.clone()).await?
        }
        config::Source::InCluster => KubeApi::in_cluster(config.api_server.as_deref(), node, metrics.api.clone())
            .await
            .context("outside a pod, give --kubeconfig FILE or --manifests DIR")?,
    };
    let (events, notices) = Events::new();
    tasks.serve("the writer of Events", api.publish(notices));
    Ok((Box::new(api), events))
}

/// Where a server is to listen. With `--bind-address-hard-fail`, that it cannot ends the agent, and the Node says why.
async fn place(
    what: &'static str,
    addr: Option<SocketAddr>,
    hard_fail: bool,
    reason: &'static str,
    events: &Events,
) -> anyhow::Result<Option<Place>> {
    let Some(addr) = addr else { return Ok(None) };
    if !hard_fail {
        return Ok(Some(Place::wanted(what, addr)));
    }
    match Place::open(what, addr) {
        Ok(place) => Ok(Some(place)),
        Err(error) => {
            let (about, severity) = (About::Node, Severity::Warning);
            events.tell(Notice { about, severity, reason, action: "StartFairlead", note: error.to_string() });
            events.finish(LAST_EVENT).await;
            Err(anyhow::Error::from(error).context("--bind-address-hard-fail"))
        }
    }
}

/// Loads the programs and makes ready to attach them.
fn load(config: &Config, settings: &Wanted) -> anyhow::Result<(Attacher, Found)> {
    let lock = config.pins.lock()?;
    let features = probe::features()
        .context("cannot load a program to try out the kernel; `fairlead check` says what is missing")?;
    let ipv6 = probe::has_ipv6();
    let found = Found { features, ipv6, kube_proxy: settings.kube_proxy };
    tracing::debug!(?found, "kernel features");
    let object = match &config.ebpf_object {
        Some(file) => {
            let bytes = std::fs::read(file).with_context(|| format!("cannot read --ebpf-object {}", file.display()))?;
            tracing::warn!(file = %file.display(), "loading another eBPF object than the built-in one");
            Cow::Owned(bytes)
        }
        None => Cow::Borrowed(load::OBJECT),
    };
    let began = std::time::Instant::now();
    let programs = load::load(&load::Options {
        object: &object,
        pins: &config.pins,
        sizes: &config.sizes,
        ipv6,
        features,
        settings,
        half_open_secs: config.half_open_secs,
        rejects_per_sec: config.rejects_per_sec,
        reply_mark: config.reply_mark.map_or(0, |wish| wish.mask),
    })?;
    let (pins, took_ms) = (config.pins.versioned(), began.elapsed().as_millis() as u64);
    tracing::info!(pins = %pins.display(), took_ms, "programs loaded");
    let attacher = Attacher::new(programs, &config.pins, lock, config.attach, features.tcx)
        .context("cannot identify the network namespace")?;
    Ok((attacher, found))
}

/// Hands the node's addresses and those of live flows to the control plane.
async fn relay(
    mut addresses: watch::Receiver<Option<NodeAddresses>>,
    mut live: mpsc::Receiver<HashSet<IpAddr>>,
    inputs: mpsc::Sender<Input>,
) -> anyhow::Result<()> {
    loop {
        let input = tokio::select! {
            changed = addresses.changed() => {
                changed.context("the devices' task ended")?;
                let Some(newest) = addresses.borrow_and_update().clone() else { continue };
                Input::Event(Event::NodeAddrs(newest))
            }
            live = live.recv() => {
                Input::LiveAddresses(live.context("the sweep over flows ended")?.into_iter().collect())
            }
        };
        inputs.send(input).await.context("the control plane ended")?;
    }
}
