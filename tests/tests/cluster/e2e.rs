//! What Kubernetes' own end-to-end tests of Services ask of a proxy, asked of the agent.
//!
//! Pods are objects whose status the cases set; their endpoints are written by kube-controller-manager. The cases share
//! one cluster at the same time, so each has Services and Pods of its own. In comments and names `e2e N` is the place in the list of upstream's
//! cases that this project keeps. Another node's pods live on the external host: what upstream shows by a client on another
//! node shows here by an endpoint there.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    sync::{
        PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

use fairlead_lab::{Ask, Host, Lab, Namespace, Outcome, Proto, Server, load::tally, manifest::OTHER_NODE};
use fairlead_tests::controlplane::{Api, ControllerManager};
use k8s_openapi::api::core::v1::Service;
use serde_json::{Value, json};

use crate::{
    fixture::{Cluster, SOON, TARGET, Turn, Vips, create_node_object, kept},
    objects,
    pods::PodSpec,
};

mod conntrack;
mod edits;
mod follow;
mod lifecycle;
mod local;
mod ports;
mod slices;
mod traffic;
mod unready;

/// Ports that every server listens on.
const TARGETS: [u16; 3] = [TARGET, 8081, 8082];
/// A packet that is dropped in silence is not answered within this; one that is served is, in a hundredth of it.
const SILENCE: Duration = Duration::from_millis(300);

/// The cluster of all these cases, and of others that need none to themselves; made when first needed.
static SHARED: RwLock<Option<World>> = RwLock::new(None);
/// A case has failed in it: it is not lent again.
static SPOILT: AtomicBool = AtomicBool::new(false);

/// A cluster with controllers, and servers on the node and on another one as well as in the pods.
pub(crate) struct World {
    // Dropped first, while the API server still answers.
    _controllers: ControllerManager,
    _servers: Vec<Server>,
    cluster: Cluster,
}

impl std::ops::Deref for World {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

/// The shared cluster, for as long as a case has its turn: beside others, or as its only user.
pub(crate) struct Lent<G> {
    shared: G,
    _turn: Turn,
}

type Beside = RwLockReadGuard<'static, Option<World>>;
type Only = RwLockWriteGuard<'static, Option<World>>;

impl<G: std::ops::Deref<Target = Option<World>>> std::ops::Deref for Lent<G> {
    type Target = World;

    fn deref(&self) -> &World {
        self.shared.as_ref().expect("it was made before it was lent")
    }
}

impl std::ops::DerefMut for Lent<Only> {
    fn deref_mut(&mut self) -> &mut World {
        self.shared.as_mut().expect("it was made before it was lent")
    }
}

impl<G> Drop for Lent<G> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            SPOILT.store(true, Ordering::Relaxed);
        }
    }
}

/// Waits for the turn of this case and for the cluster.
pub(crate) fn world() -> Lent<Beside> {
    lend(Turn::beside())
}

/// The same for a case that measures.
pub(crate) fn world_alone() -> Lent<Beside> {
    lend(Turn::alone())
}

fn lend(turn: Turn) -> Lent<Beside> {
    loop {
        let shared = SHARED.read().unwrap_or_else(PoisonError::into_inner);
        if shared.is_some() && !SPOILT.load(Ordering::Relaxed) {
            return Lent { shared, _turn: turn };
        }
        drop(shared);
        drop(only());
    }
}

/// The same for a case that changes what others rely on, and restores it.
pub(crate) fn world_for_one() -> Lent<Only> {
    let turn = Turn::beside();
    Lent { shared: only(), _turn: turn }
}

/// The cluster without any other user, made if there is none that is sound.
fn only() -> Only {
    let mut shared = SHARED.write().unwrap_or_else(PoisonError::into_inner);
    if SPOILT.swap(false, Ordering::Relaxed) {
        *shared = None;
    }
    shared.get_or_insert_with(World::build);
    shared
}

impl World {
    fn build() -> Self {
        kept(|| {
            let cluster = Cluster::without_turn();
            let controllers = ControllerManager::start(&cluster.plane).expect("the controllers");
            create_node_object(&cluster.api, OTHER_NODE);
            let lab = &cluster.lab;
            let serve = |ns: &Namespace, name: &str, ips: [IpAddr; 2], ports: &[u16]| {
                let listen: Vec<_> = ports.iter().flat_map(|&port| ips.map(|ip| SocketAddr::new(ip, port))).collect();
                Server::both(ns, name, &listen).expect("a server")
            };
            // The cluster serves the first port itself.
            let mut servers: Vec<_> = lab
                .pods
                .iter()
                .map(|pod| serve(&pod.ns, &pod.name, [pod.ip(false), pod.ip(true)], &TARGETS[1..]))
                .collect();
            servers.push(serve(&lab.node.ns, "node", [lab.node.ip(false), lab.node.ip(true)], &TARGETS));
            for (n, name) in ["remote-a", "remote-b"].into_iter().enumerate() {
                let ips = [false, true].map(|v6| Lab::remote_pods(v6)[n]);
                servers.push(serve(&lab.ext.ns, name, ips, &TARGETS));
            }
            Self { _controllers: controllers, _servers: servers, cluster }
        })
    }

    /// The addresses of a server: `pod-a` … `pod-c`, `node`, `remote-a`, `remote-b`.
    fn ips(&self, server: &str) -> [IpAddr; 2] {
        [false, true].map(|v6| match server {
            "node" => self.lab.node.ip(v6),
            "remote-a" => Lab::remote_pods(v6)[0],
            "remote-b" => Lab::remote_pods(v6)[1],
            name => self.lab.pod(name).unwrap_or_else(|| panic!("no server is called {name}")).ip(v6),
        })
    }

    /// A Pod of this app where that server is; its object carries both names.
    fn pod(&self, app: &str, server: &str) -> PodSpec {
        let pod = PodSpec::new(&format!("{app}-{server}"), app, &self.ips(server));
        match server {
            "node" => pod.host_network(),
            "remote-a" | "remote-b" => pod.on(OTHER_NODE),
            _ => pod,
        }
    }

    /// The same, running and ready.
    pub(crate) fn run_pod(&self, app: &str, server: &str) -> PodSpec {
        let pod = self.pod(app, server);
        pod.run(&self.api);
        pod
    }

    /// Creates a dual-stack Service of ports `tcp` and `udp` that selects the Pods of the app of its name. `spec` is
    /// merged into its own.
    fn service(&self, name: &str, spec: Value) -> Service {
        create(&self.api, name, spec)
    }

    /// The same, by its addresses.
    pub(crate) fn vips(&self, name: &str, spec: Value) -> Vips {
        Vips::of(&self.service(name, spec))
    }

    /// Patches the Service's spec.
    fn edit(&self, name: &str, spec: &Value) -> Service {
        self.api.patch::<Service>("default", name, json!({"spec": spec})).expect("the edit")
    }

    /// The client pod and a process of the node.
    fn inside(&self) -> [&Host; 2] {
        [&self.lab.client.host, &self.lab.node]
    }

    /// These and a host behind the uplink. It has the addresses of the remote Pods, too, and hears from those directly, so
    /// it cannot ask for them.
    fn hosts(&self) -> [&Host; 3] {
        [&self.lab.client.host, &self.lab.node, &self.lab.ext]
    }

    /// Waits until exactly these servers answer at every address and transport of the Service, from the client pod.
    fn answered(&self, vips: &Vips, servers: &[&str]) {
        self.answered_from(&self.lab.client.ns, &vips.all(), servers);
    }

    /// The same from elsewhere, at these addresses; or nobody, and the question is refused.
    fn answered_from(&self, from: &Namespace, at: &[(Proto, SocketAddr)], servers: &[&str]) {
        for &(proto, to) in at {
            if servers.is_empty() {
                self.ask_from_until(from, SOON, proto, to, "refused", |outcome| *outcome == Outcome::Refused);
            } else {
                self.exactly(from, proto, to, servers);
            }
        }
    }

    /// Asks so often in a row that a server which is never asked is out of balance: one in thousands by chance.
    fn exactly(&self, from: &Namespace, proto: Proto, to: SocketAddr, servers: &[&str]) {
        let wanted: BTreeSet<_> = servers.iter().copied().collect();
        let began = Instant::now();
        loop {
            let ask = Ask::new(proto, to).timeout(Duration::from_secs(1));
            let asked = from.run(|| (0..12 * servers.len()).map(|_| ask.here().outcome).collect::<Vec<_>>());
            let outcomes = asked.expect("the namespace");
            let heard: BTreeSet<_> = outcomes.iter().filter_map(Outcome::server).collect();
            if heard == wanted && outcomes.iter().all(|outcome| outcome.answer().is_some()) {
                return;
            }
            assert!(
                began.elapsed() < SOON,
                "{to}/{proto} is not answered by {servers:?} within {SOON:?} when {} asks: {}; the agent's log:\n{}",
                from.name(),
                tally(&outcomes),
                self.agent.log_tail()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until packets to these addresses are dropped without a word.
    fn silent_from(&self, from: &Namespace, at: &[(Proto, SocketAddr)]) {
        for &(proto, to) in at {
            let ask = Ask::new(proto, to).timeout(SILENCE);
            let began = Instant::now();
            loop {
                let outcome = ask.once(from).expect("the namespace").outcome;
                if outcome == Outcome::Timeout {
                    break;
                }
                assert!(
                    began.elapsed() < SOON,
                    "{to}/{proto} is not silent within {SOON:?} for {}: {outcome}",
                    from.name()
                );
            }
        }
    }

    /// The Service's NodePorts at the node's addresses.
    fn node_ports(&self, service: &Service) -> Vec<(Proto, SocketAddr)> {
        let ports = service.spec.as_ref().and_then(|spec| spec.ports.clone()).expect("ports");
        let at = |proto: Proto, ip: IpAddr| {
            let port = ports.iter().find(|port| port.protocol.as_deref() == Some(proto.name())).expect("a port");
            SocketAddr::new(ip, u16::try_from(port.node_port.expect("a NodePort")).expect("a port number"))
        };
        let ips = self.ips("node");
        Proto::ALL.into_iter().flat_map(|proto| ips.map(|ip| (proto, at(proto, ip)))).collect()
    }
}

/// See [`World::service`].
fn create(api: &Api, name: &str, spec: Value) -> Service {
    let mut service = serde_json::to_value(objects::service(name)).expect("a Service");
    service["spec"]["selector"] = json!({"app": name});
    if let Value::Object(fields) = spec {
        for (field, value) in fields {
            service["spec"][field] = value;
        }
    }
    api.create(&serde_json::from_value::<Service>(service).expect("a Service")).expect("the API server takes it")
}

/// A port of a Service, for `spec`.
fn port(name: &str, number: u16, proto: Proto, target: impl Into<Value>) -> Value {
    json!({"name": name, "port": number, "protocol": proto.name(), "targetPort": target.into()})
}
