//! Two nodes with pods, a server in a pod and in a process of each, and the external host: who is where in the words of
//! [`rules`](crate::rules), and how they ask each other.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use anyhow::{Context as _, Result};
use fairlead_lab::{
    Agent, AgentOptions, Ask, Lab, LabConfig, Manifests, Namespace, Proto, Server, ServiceSpec, manifest::EndpointSpec,
};

use crate::rules::{Address, Client, Endpoint, Node};

/// The port that every server listens on.
pub const TARGET: u16 = 8080;

/// Two nodes on one switch.
#[derive(Debug)]
pub struct Nodes {
    servers: Vec<Server>,
    /// The labs, as [`Node`] numbers them.
    pub labs: [Lab; 2],
}

impl Nodes {
    /// Builds both, alike. Nobody serves yet.
    pub fn new(config: LabConfig) -> Result<Self> {
        let first = Lab::new(config.clone())?;
        let second = first.join(config)?;
        Ok(Self { servers: Vec::new(), labs: [first, second] })
    }

    /// Starts the servers, which say their endpoint's name.
    pub fn serve(&mut self) -> Result<()> {
        for endpoint in Endpoint::ALL {
            let addrs = [false, true].map(|v6| SocketAddr::new(self.endpoint(endpoint, v6), TARGET));
            self.servers.push(Server::both(self.host_of(endpoint), endpoint.name(), &addrs)?);
        }
        Ok(())
    }

    /// Starts an agent on each, with further arguments, on one folder of manifests.
    pub fn start_agents(&self, args: &[&str], manifests: &Manifests) -> Result<Vec<Agent>> {
        let options = AgentOptions {
            args: args.iter().map(Into::into).collect(),
            manifests: Some(manifests.clone()),
            ..AgentOptions::default()
        };
        std::thread::scope(|scope| {
            let starts = self.labs.each_ref().map(|lab| scope.spawn(|| Agent::start(lab, options.clone())));
            let joined = starts.map(|start| start.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
            joined.into_iter().collect()
        })
    }

    /// The lab of a node.
    pub fn lab(&self, node: Node) -> &Lab {
        &self.labs[node as usize]
    }

    /// Where an endpoint runs.
    pub fn host_of(&self, endpoint: Endpoint) -> &Namespace {
        match endpoint {
            Endpoint::Pod(node) => &self.lab(node).pods[0].ns,
            Endpoint::Process(node) => &self.lab(node).node.ns,
        }
    }

    /// An endpoint's address.
    pub fn endpoint(&self, endpoint: Endpoint, v6: bool) -> IpAddr {
        match endpoint {
            Endpoint::Pod(node) => self.lab(node).pods[0].ip(v6),
            Endpoint::Process(node) => self.lab(node).node.ip(v6),
        }
    }

    /// Endpoints of both families, as slices have them.
    pub fn slices(&self, endpoints: &[Endpoint]) -> Vec<EndpointSpec> {
        let both = |e: &Endpoint| [false, true].map(|v6| EndpointSpec::on(e.node().name(), self.endpoint(*e, v6)));
        endpoints.iter().flat_map(both).collect()
    }

    /// Where a client asks from.
    pub fn namespace(&self, client: Client) -> &Namespace {
        match client {
            Client::Pod(node) => &self.lab(node).client.ns,
            Client::Server(node) => &self.lab(node).pods[0].ns,
            Client::Process(node) => &self.lab(node).node.ns,
            Client::Outside(node) => &self.lab(node).ext.ns,
        }
    }

    /// A client's own address. A process of a node has the one that its default route starts from.
    pub fn client(&self, client: Client, v6: bool) -> IpAddr {
        match client {
            Client::Pod(node) => self.lab(node).client.ip(v6),
            Client::Server(node) => self.lab(node).pods[0].ip(v6),
            Client::Process(node) => self.lab(node).node.ip(v6),
            Client::Outside(node) => Lab::external_clients(v6)[node as usize],
        }
    }

    /// A question of this client, from this port if it is not 0.
    pub fn ask(&self, client: Client, proto: Proto, to: SocketAddr, port: u16) -> Ask {
        let ask = Ask::new(proto, to);
        match client {
            Client::Outside(_) => ask.from(SocketAddr::new(self.client(client, to.is_ipv6()), port)),
            _ if port != 0 => ask.port(port),
            _ => ask,
        }
    }

    /// Where a Service answers.
    pub fn address(&self, service: &ServiceSpec, address: Address, v6: bool) -> SocketAddr {
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

    /// Without Services: the routes lead everywhere, and neighbours know each other from here on.
    pub fn everybody_reaches_every_server(&self) -> Result<()> {
        for client in Client::ALL {
            for endpoint in Endpoint::ALL {
                for v6 in [false, true] {
                    let to = SocketAddr::new(self.endpoint(endpoint, v6), TARGET);
                    let attempt = self.ask(client, Proto::Udp, to, 0).once(self.namespace(client))?;
                    let answered = attempt.outcome.answer();
                    answered.with_context(|| format!("{client:?} → {endpoint:?} at {to}: {attempt}"))?;
                }
            }
        }
        Ok(())
    }

    /// Packets of state INVALID that the nodes' netfilter saw.
    pub fn invalid_packets(&self) -> Result<u64> {
        self.labs.iter().map(Lab::invalid_packets).sum()
    }
}

/// A Service with every kind of address; `n` tells it from the others, up to 99.
pub fn spec(what: &str, n: u8) -> ServiceSpec {
    let v6 = |net: [u16; 3], n: u8| Ipv6Addr::new(net[0], net[1], net[2], 0, 0, 0, 0, u16::from(n));
    let both = |v4: Ipv4Addr, v6: Ipv6Addr| [IpAddr::from(v4), IpAddr::from(v6)];
    let vips = both(Ipv4Addr::new(10, 96, 1, n), v6([0xfd00, 0x10, 0x96], n));
    let mut spec = ServiceSpec::both(&format!("{what}-{n}"), &vips, 80, TARGET).node_port(30_000 + u16::from(n));
    spec.external_ips = both(Ipv4Addr::new(198, 51, 100, n), v6([0x2001, 0xdb8, 0x198], n)).to_vec();
    spec.balancer_ips = both(Ipv4Addr::new(198, 51, 100, 100 + n), v6([0x2001, 0xdb8, 0x198], 100 + n)).to_vec();
    spec
}

/// True for addresses that no host has.
pub fn is_service_address(ip: IpAddr) -> bool {
    match ip {
        IpAddr::V4(ip) => ip.octets()[..2] == [10, 96] || ip.octets()[..3] == [198, 51, 100],
        IpAddr::V6(ip) => ip.segments()[..3] == [0xfd00, 0x10, 0x96] || ip.segments()[..3] == [0x2001, 0xdb8, 0x198],
    }
}
