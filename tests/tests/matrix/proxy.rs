//! Who serves the Services: an agent in each node, or kube-proxy.

use std::{
    net::IpAddr,
    sync::{Mutex, OnceLock, PoisonError, mpsc},
};

use anyhow::{Result, bail, ensure};
use fairlead_lab::{Agent, Manifests, Namespace, ServiceSpec, janitor, manifest::EndpointSpec};
use fairlead_tests::{
    controlplane::{ControlPlane, KubeProxy, node},
    nodes::Nodes,
};
use k8s_openapi::api::{core::v1::Service, discovery::v1::EndpointSlice};
use serde_json::json;

use crate::{cells::services, shape::Topology};

/// Names the one that runs in the agents' place.
const VARIABLE: &str = "FAIRLEAD_MATRIX_WITH";

/// Which one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Kind {
    Fairlead,
    KubeProxy,
}

impl Kind {
    /// The one that this run is about.
    pub(crate) fn of_this_run() -> Result<Self> {
        match std::env::var(VARIABLE).as_deref() {
            Err(_) | Ok("fairlead") => Ok(Self::Fairlead),
            Ok("kube-proxy") => Ok(Self::KubeProxy),
            Ok(other) => bail!("{VARIABLE} is {other:?}: neither fairlead nor kube-proxy"),
        }
    }

    pub(crate) const fn name(self) -> &'static str {
        match self {
            Self::Fairlead => "Fairlead",
            Self::KubeProxy => "kube-proxy",
        }
    }
}

/// Both nodes' proxies. Dropping it ends them.
pub(crate) enum Proxies {
    Fairlead(Vec<Agent>),
    KubeProxy { _running: Vec<KubeProxy> },
}

impl Proxies {
    /// Starts them, and returns once they serve every Service.
    pub(crate) fn start(kind: Kind, topology: &Topology, nodes: &Nodes) -> Result<Self> {
        match kind {
            Kind::Fairlead => agents(topology, nodes).map(Self::Fairlead),
            Kind::KubeProxy => kube_proxies(nodes).map(|running| Self::KubeProxy { _running: running }),
        }
    }

    /// The ends of the agents' logs.
    pub(crate) fn last_words(&self) -> String {
        let Self::Fairlead(agents) = self else { return String::new() };
        agents.iter().map(Agent::last_words).collect()
    }
}

fn agents(topology: &Topology, nodes: &Nodes) -> Result<Vec<Agent>> {
    let manifests = Manifests::new(&nodes.labs[0].dir().join("manifests"))?;
    for (service, endpoint) in services() {
        manifests.apply(&service, &nodes.slices(&[endpoint]))?;
    }
    nodes.start_agents(topology.agent_args(), &manifests)
}

/// The API server that all topologies share: their nodes, Services and endpoints have the same addresses.
struct Plane {
    plane: ControlPlane,
    addresses: Vec<IpAddr>,
}

static PLANE: OnceLock<Mutex<Plane>> = OnceLock::new();

fn kube_proxies(nodes: &Nodes) -> Result<Vec<KubeProxy>> {
    let plane = PLANE.get_or_init(|| {
        let addresses = addresses(nodes);
        let objects: Vec<_> =
            services().into_iter().map(|(service, endpoint)| (service, nodes.slices(&[endpoint]))).collect();
        let labs = nodes.labs.each_ref().map(|lab| (lab.node_name(), [lab.node.ip(false), lab.node.ip(true)]));
        // What a control plane runs ends with the thread that started it: here one that never ends.
        let (made, hear) = mpsc::channel();
        std::thread::spawn(move || {
            // Who waits takes it, or has panicked.
            made.send(control_plane(&labs, &objects)).ok();
            loop {
                std::thread::park();
            }
        });
        let plane = hear.recv().map_err(anyhow::Error::from).flatten();
        Mutex::new(Plane { plane: plane.unwrap_or_else(|error| panic!("no control plane: {error:#}")), addresses })
    });
    let plane = plane.lock().unwrap_or_else(PoisonError::into_inner);
    ensure!(plane.addresses == addresses(nodes), "the nodes have other addresses than those of the objects");
    // The networks of the node's own pods: then pods of the other node are not taken for local ones.
    let start = |n: usize| {
        let lab = &nodes.labs[n];
        let local = format!("--cluster-cidr={}", lab.pod_cidrs().join(","));
        KubeProxy::start(&plane.plane, &lab.node.ns, lab.node_name(), &[&local])
    };
    // They end with the thread that starts them, too.
    (0..nodes.labs.len()).map(start).collect()
}

fn addresses(nodes: &Nodes) -> Vec<IpAddr> {
    let endpoints = services().into_iter().flat_map(|(_, endpoint)| nodes.slices(&[endpoint]));
    endpoints.map(|endpoint| endpoint.ip).collect()
}

fn control_plane(nodes: &[(&str, [IpAddr; 2])], objects: &[(ServiceSpec, Vec<EndpointSpec>)]) -> Result<ControlPlane> {
    janitor::arm()?;
    let alone = Namespace::create(&format!("{}matrix-plane", janitor::own_prefix()))?;
    alone.ip_batch("link set lo up\n")?;
    let plane = ControlPlane::start(&alone)?;
    let api = plane.api()?;
    for (name, addresses) in nodes {
        node::create(&api, name)?;
        node::set_addresses(&api, name, addresses)?;
    }
    for (spec, endpoints) in objects {
        for v6 in [false, true] {
            let slice: EndpointSlice = serde_saphyr::from_str(&spec.slice_yaml(v6, endpoints))?;
            api.create(&slice)?;
        }
        let mut service: Service = serde_saphyr::from_str(&spec.yaml())?;
        let dual = service.spec.get_or_insert_default();
        dual.ip_family_policy = Some("RequireDualStack".to_owned());
        api.create(&service)?;
        // The balancer's addresses.
        api.patch_status::<Service>("default", &spec.name, json!({"status": service.status}))?;
    }
    Ok(plane)
}
