//! The two nodes, their agents on one folder of manifests, and a server in a pod and in a process of each.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Mutex, PoisonError},
};

use anyhow::{Context as _, Result, ensure};
use fairlead_lab::{
    Agent, AgentOptions, Ask, Lab, LabConfig, Manifests, Namespace, Proto, Server, ServiceSpec, manifest::EndpointSpec,
    server::wait_until,
};

use super::rules::{Address, Client, Endpoint, Node};
use crate::cell::{Cell, PATIENCE, TARGET, answered};

/// The pairs that tests share, made when first needed. A test that panics leaves its pair to the next one.
static SHARED: [Mutex<Option<Pair>>; 2] = [const { Mutex::new(None) }; 2];

/// How the pods of a shared pair are wired.
#[derive(Clone, Copy, Debug)]
pub(super) enum Shared {
    Routed = 0,
    Bridged = 1,
}

impl Shared {
    fn cell(self) -> Cell {
        Cell::named(match self {
            Self::Routed => "routed_invalid_drop",
            Self::Bridged => "bridge_nf_invalid_drop",
        })
    }
}

/// Two nodes. Its parts are dropped in this order: an agent cleans up in its node.
pub(super) struct Pair {
    pub(super) cell: Cell,
    pub(super) agents: Vec<Agent>,
    pub(super) manifests: Manifests,
    _servers: Vec<Server>,
    pub(super) nodes: [Lab; 2],
}

impl Pair {
    /// Builds the nodes, and starts their agents with further arguments.
    pub(super) fn new(cell: Cell, args: &[&str]) -> Result<Self> {
        let config = LabConfig { pods: 1, switch: true, ..LabConfig::new(cell.shape, cell.netfilter) };
        let first = Lab::new(config.clone())?;
        let second = first.join(config)?;
        let manifests = Manifests::new(&first.dir().join("manifests"))?;
        let mut pair = Self { cell, agents: Vec::new(), manifests, _servers: Vec::new(), nodes: [first, second] };
        for endpoint in Endpoint::ALL {
            let addrs = [false, true].map(|v6| SocketAddr::new(pair.endpoint(endpoint, v6), TARGET));
            pair._servers.push(Server::both(pair.host_of(endpoint), endpoint.name(), &addrs)?);
        }
        pair.everybody_reaches_every_server()?;
        // As many refusals at once as these tests ask for are no attack.
        let args = [args, &["--rejects-per-second=100000"]].concat();
        let options = AgentOptions {
            args: args.iter().map(Into::into).collect(),
            manifests: Some(pair.manifests.clone()),
            ..AgentOptions::default()
        };
        pair.agents = std::thread::scope(|scope| {
            let starts = pair.nodes.each_ref().map(|lab| scope.spawn(|| Agent::start(lab, options.clone())));
            let joined = starts.map(|start| start.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            joined.into_iter().collect::<Result<Vec<_>>>()
        })?;
        Ok(pair)
    }

    /// Runs a test on the pair of this kind that is shared, with agents as they are without further arguments.
    pub(super) fn shared(cell: Shared, test: impl FnOnce(&Self) -> Result<()>) {
        let mut shared = SHARED[cell as usize].lock().unwrap_or_else(PoisonError::into_inner);
        let pair = match &mut *shared {
            Some(pair) => pair,
            none => none.insert(Self::new(cell.cell(), &[]).unwrap_or_else(|error| panic!("{cell:?}: {error:#}"))),
        };
        test(pair).unwrap_or_else(|error| panic!("[{}] {error:#}\n{}", pair.cell.name, pair.last_words()));
    }

    /// Writes Services, and waits until both agents serve them with just these endpoints.
    pub(super) fn serve(&self, services: &[(ServiceSpec, &[Endpoint])]) -> Result<()> {
        for (service, endpoints) in services {
            self.manifests.apply(service, &self.slices(endpoints))?;
        }
        self.until_offered(services)
    }

    /// Rewrites the endpoints of a Service, and waits until both agents offer just these.
    pub(super) fn offer(&self, service: &ServiceSpec, endpoints: &[Endpoint]) -> Result<()> {
        self.manifests.endpoints(service, &self.slices(endpoints))?;
        self.until_offered(&[(service.clone(), endpoints)])
    }

    fn until_offered(&self, services: &[(ServiceSpec, &[Endpoint])]) -> Result<()> {
        let addresses = |e: &Endpoint| [false, true].map(|v6| self.endpoint(*e, v6).to_string());
        let wanted: BTreeMap<_, BTreeSet<_>> = services
            .iter()
            .map(|(service, endpoints)| (service.name.clone(), endpoints.iter().flat_map(addresses).collect()))
            .collect();
        for agent in &self.agents {
            // One without endpoints stands in the list of Services alone.
            let offered = || -> Result<BTreeMap<String, BTreeSet<String>>> {
                let mut found: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
                for what in ["services", "endpoints"] {
                    let rows: serde_json::Value = serde_json::from_str(&agent.fairlead(&[what, "-o", "json"])?)?;
                    for row in rows.as_array().into_iter().flatten() {
                        let Some(name) = row["service"].as_str().filter(|name| wanted.contains_key(*name)) else {
                            continue;
                        };
                        let addresses = found.entry(name.to_owned()).or_default();
                        if let (Some(address), "endpoints") = (row["address"].as_str(), what) {
                            addresses.insert(address.to_owned());
                        }
                    }
                }
                Ok(found)
            };
            let seen = wait_until(PATIENCE, || offered().is_ok_and(|found| found == wanted));
            ensure!(seen, "an agent still offers {:?}, not {wanted:?}", offered()?);
        }
        Ok(())
    }

    /// Without Services: the routes lead everywhere, and neighbours know each other from here on.
    fn everybody_reaches_every_server(&self) -> Result<()> {
        for client in Client::ALL {
            for endpoint in Endpoint::ALL {
                for v6 in [false, true] {
                    let to = SocketAddr::new(self.endpoint(endpoint, v6), TARGET);
                    let ask = self.ask(client, Proto::Udp, to, 0);
                    answered(self.namespace(client), ask).with_context(|| format!("{client:?} → {endpoint:?}"))?;
                }
            }
        }
        Ok(())
    }

    pub(super) fn lab(&self, node: Node) -> &Lab {
        &self.nodes[node as usize]
    }

    pub(super) fn host_of(&self, endpoint: Endpoint) -> &Namespace {
        match endpoint {
            Endpoint::Pod(node) => &self.lab(node).pods[0].ns,
            Endpoint::Process(node) => &self.lab(node).node.ns,
        }
    }

    /// An endpoint's address.
    pub(super) fn endpoint(&self, endpoint: Endpoint, v6: bool) -> IpAddr {
        match endpoint {
            Endpoint::Pod(node) => self.lab(node).pods[0].ip(v6),
            Endpoint::Process(node) => self.lab(node).node.ip(v6),
        }
    }

    /// Endpoints of both families, as slices have them.
    fn slices(&self, endpoints: &[Endpoint]) -> Vec<EndpointSpec> {
        let both = |e: &Endpoint| [false, true].map(|v6| EndpointSpec::on(e.node().name(), self.endpoint(*e, v6)));
        endpoints.iter().flat_map(both).collect()
    }

    /// Where a client asks from.
    pub(super) fn namespace(&self, client: Client) -> &Namespace {
        match client {
            Client::Pod(node) => &self.lab(node).client.ns,
            Client::Server(node) => &self.lab(node).pods[0].ns,
            Client::Process(node) => &self.lab(node).node.ns,
            Client::Outside(node) => &self.lab(node).ext.ns,
        }
    }

    /// A client's own address. A process of a node has the one that its default route starts from.
    pub(super) fn client(&self, client: Client, v6: bool) -> IpAddr {
        match client {
            Client::Pod(node) => self.lab(node).client.ip(v6),
            Client::Server(node) => self.lab(node).pods[0].ip(v6),
            Client::Process(node) => self.lab(node).node.ip(v6),
            Client::Outside(node) => Lab::external_clients(v6)[node as usize],
        }
    }

    /// A question of this client, from this port if it is not 0.
    pub(super) fn ask(&self, client: Client, proto: Proto, to: SocketAddr, port: u16) -> Ask {
        let ask = Ask::new(proto, to);
        match client {
            Client::Outside(_) => ask.from(SocketAddr::new(self.client(client, to.is_ipv6()), port)),
            _ if port != 0 => ask.port(port),
            _ => ask,
        }
    }

    /// Where a Service answers.
    pub(super) fn address(&self, service: &ServiceSpec, address: Address, v6: bool) -> SocketAddr {
        let of = |ips: &[IpAddr]| ips.iter().copied().find(|ip| ip.is_ipv6() == v6).expect("both families");
        let port = &service.ports[0];
        match address {
            Address::ClusterIp => SocketAddr::new(of(&service.cluster_ips), port.port),
            Address::ExternalIp => SocketAddr::new(of(&service.external_ips), port.port),
            Address::Balancer => SocketAddr::new(of(&service.balancer_ips), port.port),
            Address::NodePort(node) => {
                SocketAddr::new(self.lab(node).node.ip(v6), port.node_port.expect("a NodePort Service"))
            }
        }
    }

    /// Nobody knows any more what it was told of routes.
    pub(super) fn forget_routes(&self) -> Result<()> {
        for lab in &self.nodes {
            for host in lab.all_pods().map(|pod| &pod.host).chain([&lab.node, &lab.ext]) {
                for family in ["-4", "-6"] {
                    host.ns.output("ip", &[family, "route", "flush", "cache"])?;
                }
            }
        }
        Ok(())
    }

    /// Packets of state INVALID that the nodes' netfilter saw.
    pub(super) fn invalid_packets(&self) -> Result<u64> {
        self.nodes.iter().map(Lab::invalid_packets).sum()
    }

    /// The last lines of both agents' logs.
    pub(super) fn last_words(&self) -> String {
        let tail = |agent: &Agent| {
            let log = agent.log_text();
            let lines: Vec<_> = log.lines().collect();
            lines[lines.len().saturating_sub(12)..].join("\n")
        };
        self.agents.iter().map(|agent| format!("an agent's last words:\n{}\n", tail(agent))).collect()
    }
}

/// A Service with every kind of address; `n` tells it from the others, up to 99.
pub(super) fn spec(what: &str, n: u8) -> ServiceSpec {
    let v6 = |net: [u16; 3], n: u8| Ipv6Addr::new(net[0], net[1], net[2], 0, 0, 0, 0, u16::from(n));
    let both = |v4: Ipv4Addr, v6: Ipv6Addr| [IpAddr::from(v4), IpAddr::from(v6)];
    let vips = both(Ipv4Addr::new(10, 96, 1, n), v6([0xfd00, 0x10, 0x96], n));
    let mut spec = ServiceSpec::both(&format!("{what}-{n}"), &vips, 80, TARGET).node_port(30_000 + u16::from(n));
    spec.external_ips = both(Ipv4Addr::new(198, 51, 100, n), v6([0x2001, 0xdb8, 0x198], n)).to_vec();
    spec.balancer_ips = both(Ipv4Addr::new(198, 51, 100, 100 + n), v6([0x2001, 0xdb8, 0x198], 100 + n)).to_vec();
    spec
}
