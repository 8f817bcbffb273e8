//! A real Kubernetes API server, with its etcd, inside a network namespace, for as long as a [`ControlPlane`] lives.
//!
//! A [`ControllerManager`] and a [`KubeProxy`] can be started beside it: they are Kubernetes' own as well.
//!
//! All of it is the Go module in `tests/controlplane`, built once per state of its sources; where `KUBEBUILDER_ASSETS`
//! names a folder (the convention of envtest), the programs found there run instead and Go is not needed.
//! RBAC is on. Three identities exist: the administrator, for the test itself; `system:kube-proxy`, for the proxy under
//! test, which may do what the bootstrap role `system:node-proxier` allows and no more; and
//! `system:kube-controller-manager`.

use std::{
    io::{BufRead as _, BufReader},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::Stdio,
    sync::mpsc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, anyhow};
use fairlead_lab::Namespace;

mod api;
mod assets;
pub(crate) mod build;
mod controllers;
mod kube_proxy;
pub mod node;
mod passage;
mod process;
mod programs;

pub use api::Api;
pub use controllers::ControllerManager;
pub use kube_proxy::KubeProxy;
pub use passage::Passage;
use process::{Log, Process, spend_memory};
use programs::Programs;

/// Where the API server listens: a namespace has its loopback to itself, and a restart must find the same port.
pub const SERVER: SocketAddr = SocketAddr::new(std::net::IpAddr::V4(Ipv4Addr::LOCALHOST), 6443);
/// The port of etcd, beside it.
const ETCD_PORT: u16 = 2379;
/// Ranges that ClusterIPs come from.
pub const SERVICE_CIDRS: &str = "10.96.0.0/16,fd00:10:96::/108";
/// A cold start takes three seconds on an idle machine; this bounds it on a busy one.
const READY_WITHIN: Duration = Duration::from_secs(180);
/// A running API server and etcd. Dropping it ends them and removes their data.
///
/// The processes end with the thread that started them; start them on a thread that lives as long as they must.
#[derive(Debug)]
pub struct ControlPlane {
    netns: Namespace,
    programs: Programs,
    // In the order of their start.
    processes: Vec<Process>,
    audited: bool,
    dir: tempfile::TempDir,
}

/// Why the control plane cannot run here, or nothing where it can: for a tier that says in one line why it was skipped.
pub fn unavailable() -> Option<String> {
    Programs::find().err().map(|error| format!("{error:#}"))
}

impl ControlPlane {
    /// Builds the program if need be, starts it in `netns` and returns once it is ready and ClusterIPs can be allocated.
    pub fn start(netns: &Namespace) -> Result<Self> {
        Self::begin(netns, false)
    }

    /// The same, with a log of who asks for what: see [`Self::audit`].
    pub fn start_audited(netns: &Namespace) -> Result<Self> {
        Self::begin(netns, true)
    }

    fn begin(netns: &Namespace, audited: bool) -> Result<Self> {
        fairlead_lab::janitor::arm()?;
        let dir = tempfile::Builder::new()
            // Goes with the process, however that ends: the laboratory removes what carries this name.
            .prefix(&format!("{}controlplane-", fairlead_lab::janitor::own_prefix()))
            .tempdir()
            .context("cannot make a folder for the control plane's data")?;
        let mut plane = Self { netns: netns.clone(), programs: Programs::find()?, processes: Vec::new(), audited, dir };
        plane.resume()?;
        Ok(plane)
    }

    /// The kubeconfig of the administrator.
    pub fn kubeconfig(&self) -> PathBuf {
        self.dir.path().join("admin.kubeconfig")
    }

    /// The kubeconfig of user `system:kube-proxy`.
    pub fn proxy_kubeconfig(&self) -> PathBuf {
        self.dir.path().join("proxy.kubeconfig")
    }

    /// The kubeconfig of user `system:kube-controller-manager`.
    fn manager_kubeconfig(&self) -> PathBuf {
        self.dir.path().join("controller-manager.kubeconfig")
    }

    /// A folder that lives as long as the control plane.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A client of the administrator's, inside the namespace.
    pub fn api(&self) -> Result<Api> {
        Api::connect(&self.netns, &self.kubeconfig())
    }

    /// Ends API server and etcd as an operator would, by SIGTERM, and says how long that took.
    pub fn stop(&mut self) -> Result<Duration> {
        let began = Instant::now();
        while let Some(process) = self.processes.pop() {
            process.stop()?;
        }
        Ok(began.elapsed())
    }

    /// Ends API server and etcd by SIGKILL: connections break without a word.
    pub fn crash(&mut self) {
        while self.processes.pop().is_some() {}
    }

    /// Starts again after [`stop`](Self::stop) or [`crash`](Self::crash), with the same objects, port, keys and tokens.
    /// The watch cache is new: a watch from a version before the restart is answered with 410 once anything changed.
    pub fn resume(&mut self) -> Result<()> {
        match self.programs.clone() {
            Programs::Built(folder) => self.start_built(&folder.join("controlplane")),
            Programs::Assets(folder) => {
                let audit = self.audited.then(|| self.audit_log());
                self.processes = assets::start(&folder, &self.netns, self.dir.path(), audit.as_deref(), &self.log())?;
                Ok(())
            }
        }
        .and_then(|()| self.wait_usable())
        .with_context(|| {
            format!("cannot start the control plane in namespace {}{}", self.netns.name(), self.log().tail())
        })
    }

    fn start_built(&mut self, program: &Path) -> Result<()> {
        let mut command = self.netns.command(program);
        command
            .arg(format!("--data-dir={}", self.dir.path().display()))
            .arg(format!("--port={}", SERVER.port()))
            .arg(format!("--etcd-port={ETCD_PORT}"))
            .arg(format!("--service-cluster-ip-range={SERVICE_CIDRS}"))
            .args(self.audited.then(|| format!("--audit-log={}", self.audit_log().display())));
        spend_memory(&mut command);
        let mut process = Process::start(&mut command, &self.log(), Some(Stdio::piped()))?;
        let stdout = process.child().stdout.take().context("the control plane has no standard output")?;
        self.processes.push(process);
        let (said, hear) = mpsc::channel();
        std::thread::spawn(move || {
            // Reads on after the ready line, so that nothing the program prints later can block it.
            for line in BufReader::new(stdout).lines().map_while(Result::ok) {
                if line.starts_with("ready ") && said.send(()).is_err() {
                    break;
                }
            }
        });
        hear.recv_timeout(READY_WITHIN).map_err(|error| match error {
            mpsc::RecvTimeoutError::Timeout => anyhow!("it was not ready within {READY_WITHIN:?}"),
            mpsc::RecvTimeoutError::Disconnected => anyhow!("it ended before it was ready"),
        })
    }

    /// Waits until a Service can be created: its own Service, `default/kubernetes`, is the first to get a ClusterIP.
    fn wait_usable(&mut self) -> Result<()> {
        let deadline = Instant::now() + READY_WITHIN;
        let api = self.api()?;
        loop {
            let error = match api.get::<k8s_openapi::api::core::v1::Service>("default", "kubernetes") {
                Ok(_) => return Ok(()),
                Err(error) => error,
            };
            self.processes.iter_mut().try_for_each(Process::check)?;
            if Instant::now() > deadline {
                return Err(error.context(format!("no Service default/kubernetes within {READY_WITHIN:?}")));
            }
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// What this user has asked for and how it was answered: one entry for each request that is over.
    pub fn audit(&self, user: &str) -> Result<Vec<Asked>> {
        let path = self.audit_log();
        let text = std::fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let events = text.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
        let of = |event: &serde_json::Value, pointer: &str| {
            event.pointer(pointer).and_then(serde_json::Value::as_str).unwrap_or_default().to_owned()
        };
        let asked = |event: serde_json::Value| Asked {
            verb: of(&event, "/verb"),
            group: of(&event, "/objectRef/apiGroup"),
            resource: of(&event, "/objectRef/resource"),
            code: event.pointer("/responseStatus/code").and_then(serde_json::Value::as_u64).unwrap_or(0),
        };
        Ok(events.filter(|event| of(event, "/user/username") == user).map(asked).collect())
    }

    fn audit_log(&self) -> PathBuf {
        self.dir.path().join("audit.log")
    }

    fn log(&self) -> Log {
        Log::new(self.dir.path(), "controlplane")
    }
}

/// One request, as the API server's audit log has it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Asked {
    /// `list`, `watch`, …
    pub verb: String,
    /// API group; empty for the first one.
    pub group: String,
    /// `services`, …
    pub resource: String,
    /// Status of the answer.
    pub code: u64,
}

impl Drop for ControlPlane {
    fn drop(&mut self) {
        self.crash();
    }
}
