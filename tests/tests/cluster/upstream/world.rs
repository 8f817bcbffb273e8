//! The cluster of these cases: two nodes behind one switch, an agent on each, controllers, and servers everywhere.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
    time::{Duration, Instant},
};

use fairlead_lab::{
    Host, Lab, LabConfig, Namespace, Netfilter, Outcome, Proto, Server, Shape, client::SILENCE, http, load::tally,
    manifest::OTHER_NODE, server::wait_until,
};
use fairlead_tests::controlplane::{ControllerManager, Passage, node};
use k8s_openapi::api::core::v1::{Service, ServicePort};
use serde_json::{Value, json};

use super::{SOON, TARGETS, Vips, create};
use crate::{
    agent::Agent,
    client::Client,
    fixture::{Cluster, create_node, kept},
    pods::PodSpec,
};

/// A node without an agent: its only Pod is a process of the external host.
pub(super) const THIRD_NODE: &str = "node-c";

/// The networks of another ServiceCIDR than the one that the cluster has from its start: as large, so that an address which one
/// case gives back is hardly ever given to another at once.
pub(super) const FURTHER: [&str; 2] = ["10.97.0.0/16", "fd00:10:97::/108"];

/// A cluster with controllers, and servers on the nodes as well as in their pods.
pub(crate) struct World {
    // Dropped first, while the API server still answers.
    _controllers: ControllerManager,
    _servers: Vec<Server>,
    pub(super) other: Other,
    pub(super) cluster: Cluster,
}

/// The other node. Fields are dropped in their order: its agent while it still has an API server.
pub(super) struct Other {
    _agent: Agent,
    _passage: Passage,
    pub(super) lab: Lab,
}

impl std::ops::Deref for World {
    type Target = Cluster;

    fn deref(&self) -> &Cluster {
        &self.cluster
    }
}

impl World {
    pub(super) fn build() -> Self {
        kept(|| {
            let config = LabConfig { switch: true, ..LabConfig::new(Shape::Routed, Netfilter::Conntrack) };
            let lab = Lab::new(config.clone()).expect("a lab");
            let second = lab.join(LabConfig { pods: 2, ..config }).expect("another node");
            for (v6, further) in [false, true].into_iter().zip(FURTHER) {
                // A case adds this network, and then any Service may have an address of it.
                lab.ext.ns.ip_batch(&format!("route add {further} via {}\n", lab.node.ip(v6))).expect("a route");
            }
            let cluster = Cluster::of(lab);
            create_node(&cluster.api, &second);
            node::create(&cluster.api, THIRD_NODE).expect("a node");
            for name in [OTHER_NODE, THIRD_NODE] {
                node::set_zone(&cluster.api, name, "zone-b").expect("another zone");
            }
            for name in [cluster.lab.node_name(), OTHER_NODE, THIRD_NODE] {
                // What the controllers ask of a node that endpoints are divided among.
                let ready = json!([{"type": "Ready", "status": "True"}]);
                let status = json!({"allocatable": {"cpu": "4"}, "conditions": ready});
                node::set_status(&cluster.api, name, &status).expect("a status");
            }
            let controllers = ControllerManager::start(&cluster.plane).expect("the controllers");
            let passage = Passage::open(&second.node.ns, &cluster.plane).expect("a way to the API server");
            let agent = Agent::start(&second, &cluster.plane.proxy_kubeconfig());
            let other = Other { _agent: agent, _passage: passage, lab: second };
            let mut world = Self { _controllers: controllers, _servers: Vec::new(), other, cluster };
            world._servers = world.serve();
            world.acquaint();
            world
        })
    }

    /// The servers, each of the name that [`Self::ips`] knows.
    fn serve(&self) -> Vec<Server> {
        let (here, there) = (&self.lab, &self.other.lab);
        let serve = |ns: &Namespace, name: &str, ports: &[u16]| {
            let listen: Vec<_> =
                ports.iter().flat_map(|&port| self.ips(name).map(|ip| SocketAddr::new(ip, port))).collect();
            Server::both(ns, name, &listen).expect("a server")
        };
        // The cluster serves the first port of its pods itself.
        let mut servers: Vec<_> = here.pods.iter().map(|pod| serve(&pod.ns, &pod.name, &TARGETS[1..])).collect();
        servers
            .extend(there.pods.iter().zip(["remote-a", "remote-b"]).map(|(pod, name)| serve(&pod.ns, name, &TARGETS)));
        for (host, name) in [(&here.node, "node"), (&there.node, "other-node"), (&here.ext, "third")] {
            servers.push(serve(&host.ns, name, &TARGETS));
        }
        servers
    }

    /// Everybody asks every server once: no case waits for a node to find its neighbours.
    fn acquaint(&self) {
        for client in self.everywhere() {
            for server in ["pod-a", "pod-b", "pod-c", "node", "remote-a", "remote-b", "other-node"] {
                for ip in self.ips(server) {
                    let to = SocketAddr::new(ip, TARGETS[0]);
                    self.ask_from_until(client, SOON, Proto::Udp, to, "answered", |outcome| {
                        outcome.server() == Some(server)
                    });
                }
            }
        }
    }

    /// The addresses of a server: `pod-a` … `pod-c` and `node` here, `remote-a`, `remote-b` and `other-node` there, and
    /// `third` on a node that is neither.
    pub(super) fn ips(&self, server: &str) -> [IpAddr; 2] {
        let (here, there) = (&self.lab, &self.other.lab);
        [false, true].map(|v6| match server {
            "node" => here.node.ip(v6),
            "other-node" => there.node.ip(v6),
            "third" => here.ext.ip(v6),
            "remote-a" => there.pods[0].ip(v6),
            "remote-b" => there.pods[1].ip(v6),
            name => here.pod(name).unwrap_or_else(|| panic!("no server is called {name}")).ip(v6),
        })
    }

    /// A Pod of this app where that server is; its object carries both names.
    pub(super) fn pod(&self, app: &str, server: &str) -> PodSpec {
        let pod = PodSpec::new(&format!("{app}-{server}"), app, &self.ips(server));
        match server {
            "node" => pod.host_network(),
            "other-node" => pod.on(OTHER_NODE).host_network(),
            "third" => pod.on(THIRD_NODE).host_network(),
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
    pub(super) fn service(&self, name: &str, spec: Value) -> Service {
        create(&self.api, name, spec)
    }

    /// The same, by its addresses.
    pub(crate) fn vips(&self, name: &str, spec: Value) -> Vips {
        Vips::of(&self.service(name, spec))
    }

    /// Patches the Service's spec.
    pub(super) fn edit(&self, name: &str, spec: &Value) -> Service {
        self.api.patch::<Service>("default", name, json!({"spec": spec})).expect("the edit")
    }

    /// Says that a load balancer has given the Service its `n`th addresses, and which they are with its ports. They are routed
    /// to the nodes from outside; see [`Self::outside`].
    pub(super) fn balance(&self, service: &Service, n: u8) -> Vec<(Proto, SocketAddr)> {
        let name = service.metadata.name.as_deref().expect("a name");
        let ips = balancer_ips(n);
        let ingress = ips.map(|ip| json!({"ip": ip}));
        let status = json!({"status": {"loadBalancer": {"ingress": ingress}}});
        self.api.patch_status::<Service>("default", name, status).expect("the status");
        at_ports(service, &ips)
    }

    /// The client pod and a process of the node.
    pub(super) fn inside(&self) -> [&Host; 2] {
        [&self.lab.client.host, &self.lab.node]
    }

    /// These and a host behind the uplink.
    pub(super) fn hosts(&self) -> [&Host; 3] {
        [&self.lab.client.host, &self.lab.node, &self.lab.ext]
    }

    /// A pod and a process of either node, and the host outside.
    pub(super) fn everywhere(&self) -> [&Host; 5] {
        let there = &self.other.lab;
        [&self.lab.client.host, &self.lab.node, &there.client.host, &there.node, &self.lab.ext]
    }

    /// Clients outside whose packets to any address of a Service come in by this node, and by the other one.
    pub(super) fn outside(&self) -> [Client<'_>; 2] {
        [0, 1].map(|n| Client { ns: &self.lab.ext.ns, at: Some([false, true].map(|v6| Lab::external_clients(v6)[n])) })
    }

    /// Waits until exactly these servers answer at every address and transport of the Service, from the client pod.
    pub(super) fn answered(&self, vips: &Vips, servers: &[&str]) {
        self.answered_from(&self.lab.client.ns, &vips.all(), servers);
    }

    /// The same from elsewhere, at these addresses; or nobody, and the question is refused.
    pub(super) fn answered_from<'a>(&self, from: impl Into<Client<'a>>, at: &[(Proto, SocketAddr)], servers: &[&str]) {
        let from = from.into();
        for &(proto, to) in at {
            if servers.is_empty() {
                self.ask_from_until(from, SOON, proto, to, "refused", |outcome| *outcome == Outcome::Refused);
            } else {
                self.exactly(from, proto, to, servers);
            }
        }
    }

    /// Asks so often in a row that a server which is never asked is out of balance: one in thousands by chance.
    fn exactly(&self, from: Client<'_>, proto: Proto, to: SocketAddr, servers: &[&str]) {
        let wanted: BTreeSet<_> = servers.iter().copied().collect();
        let began = Instant::now();
        loop {
            let ask = from.ask(proto, to).timeout(Duration::from_secs(1));
            let asked = from.ns.run(|| (0..12 * servers.len()).map(|_| ask.here().outcome).collect::<Vec<_>>());
            let outcomes = asked.expect("the namespace");
            let heard: BTreeSet<_> = outcomes.iter().filter_map(Outcome::server).collect();
            if heard == wanted && outcomes.iter().all(|outcome| outcome.answer().is_some()) {
                return;
            }
            assert!(
                began.elapsed() < SOON,
                "{to}/{proto} is not answered by {servers:?} within {SOON:?} when {from} asks: {}; the agent's log:\n{}",
                tally(&outcomes),
                self.agent.log_tail()
            );
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    /// Waits until this server answers at each of these addresses and sees the client with that one of the same family.
    pub(super) fn sees<'a>(
        &self,
        from: impl Into<Client<'a>>,
        at: &[(Proto, SocketAddr)],
        server: &str,
        as_whom: [IpAddr; 2],
    ) {
        let from = from.into();
        for &(proto, to) in at {
            let whom = as_whom[usize::from(to.is_ipv6())];
            self.ask_from_until(from, SOON, proto, to, &format!("answered by {server}, as {whom}"), |outcome| {
                outcome.answer().is_some_and(|answer| answer.server == server && answer.peer.ip() == whom)
            });
        }
    }

    /// Waits until packets to these addresses are dropped without a word.
    pub(super) fn silent_from<'a>(&self, from: impl Into<Client<'a>>, at: &[(Proto, SocketAddr)]) {
        let from = from.into();
        for &(proto, to) in at {
            let ask = from.ask(proto, to).timeout(SILENCE);
            let began = Instant::now();
            loop {
                let outcome = ask.once(from.ns).expect("the namespace").outcome;
                if outcome == Outcome::Timeout {
                    break;
                }
                assert!(began.elapsed() < SOON, "{to}/{proto} is not silent within {SOON:?} for {from}: {outcome}");
            }
        }
    }

    /// The Service's NodePorts at the node's addresses.
    pub(super) fn node_ports(&self, service: &Service) -> Vec<(Proto, SocketAddr)> {
        self.node_ports_at(service, "node")
    }

    /// The same at those of `node` or `other-node`.
    pub(super) fn node_ports_at(&self, service: &Service, node: &str) -> Vec<(Proto, SocketAddr)> {
        at_node_ports(service, &self.ips(node))
    }

    /// The same at both nodes.
    pub(super) fn every_node_port(&self, service: &Service) -> Vec<(Proto, SocketAddr)> {
        at_node_ports(service, &[self.ips("node"), self.ips("other-node")].concat())
    }

    /// Waits until the Service's `healthCheckNodePort` at `node` or `other-node` has this status; 0 where nobody answers.
    pub(super) fn health(&self, service: &Service, node: &str, wanted: u16) {
        let port = service.spec.as_ref().and_then(|spec| spec.health_check_node_port).expect("a port");
        let to = SocketAddr::new(self.ips(node)[0], u16::try_from(port).expect("a port number"));
        let mut last = None;
        let told = wait_until(SOON, || {
            let answer = http::ask(&self.lab.ext.ns, to, "GET", "/").expect("the namespace");
            *last.insert(answer.map_or(0, |answer| answer.status)) == wanted
        });
        assert!(told, "the health check of {node} says {last:?}, not {wanted}");
    }
}

/// The `n`th addresses that a load balancer gives.
pub(super) fn balancer_ips(n: u8) -> [IpAddr; 2] {
    [IpAddr::from([198, 51, 100, n]), IpAddr::from([0x2001, 0xdb8, 0x198, 0, 0, 0, 0, u16::from(n)])]
}

/// The ports of a Service at these addresses.
pub(super) fn at_ports(service: &Service, ips: &[IpAddr]) -> Vec<(Proto, SocketAddr)> {
    at(service, ips, |port| Some(port.port))
}

/// Its NodePorts there.
pub(super) fn at_node_ports(service: &Service, ips: &[IpAddr]) -> Vec<(Proto, SocketAddr)> {
    at(service, ips, |port| port.node_port)
}

fn at(service: &Service, ips: &[IpAddr], number: impl Fn(&ServicePort) -> Option<i32>) -> Vec<(Proto, SocketAddr)> {
    let ports = service.spec.as_ref().and_then(|spec| spec.ports.as_deref()).expect("ports");
    let of = |proto: Proto| {
        let of_it = ports.iter().filter(move |port| port.protocol.as_deref() == Some(proto.name()));
        of_it.map(move |port| (proto, port))
    };
    let all = Proto::ALL.into_iter().flat_map(of).flat_map(|(proto, port)| {
        let number = u16::try_from(number(port).expect("a number")).expect("a port number");
        ips.iter().map(move |ip| (proto, SocketAddr::new(*ip, number)))
    });
    all.collect()
}
