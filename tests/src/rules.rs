//! What kube-proxy's rules say of the first packet of a connection between two nodes, and of its way back. Written from the
//! rules, whose numbers stand beside each line; nothing here knows of the programs.

use fairlead_lab::manifest::{NODE_NAME, OTHER_NODE};

/// One of the two nodes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Node {
    /// The first one.
    A = 0,
    /// The one that joined.
    B = 1,
}

impl Node {
    /// Its name in manifests.
    pub const fn name(self) -> &'static str {
        match self {
            Self::A => NODE_NAME,
            Self::B => OTHER_NODE,
        }
    }
}

/// Who asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Client {
    /// A pod that serves nothing.
    Pod(Node),
    /// The pod that is an endpoint itself.
    Server(Node),
    /// A process of the node.
    Process(Node),
    /// The external host, by a route through this node.
    Outside(Node),
}

impl Client {
    /// Every kind at both nodes.
    pub const ALL: [Self; 8] = [
        Self::Pod(Node::A),
        Self::Pod(Node::B),
        Self::Server(Node::A),
        Self::Server(Node::B),
        Self::Process(Node::A),
        Self::Process(Node::B),
        Self::Outside(Node::A),
        Self::Outside(Node::B),
    ];

    /// Where it runs, or by which node it comes in.
    pub const fn node(self) -> Node {
        match self {
            Self::Pod(node) | Self::Server(node) | Self::Process(node) | Self::Outside(node) => node,
        }
    }

    /// Do replies to its own address reach it by this node?
    fn is_behind(self, node: Node) -> bool {
        self.node() == node && !matches!(self, Self::Outside(_))
    }
}

/// Who may answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Endpoint {
    /// The pod that serves.
    Pod(Node),
    /// A process of the node: a pod with `hostNetwork`.
    Process(Node),
}

impl Endpoint {
    /// Both kinds at both nodes.
    pub const ALL: [Self; 4] = [Self::Pod(Node::A), Self::Process(Node::A), Self::Pod(Node::B), Self::Process(Node::B)];

    /// Where it runs.
    pub const fn node(self) -> Node {
        match self {
            Self::Pod(node) | Self::Process(node) => node,
        }
    }

    /// What its server calls itself.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Pod(Node::A) => "pod-on-a",
            Self::Pod(Node::B) => "pod-on-b",
            Self::Process(Node::A) => "process-on-a",
            Self::Process(Node::B) => "process-on-b",
        }
    }
}

/// What is asked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Address {
    /// The cluster IP.
    ClusterIp,
    /// At the address of this node.
    NodePort(Node),
    /// An external IP.
    ExternalIp,
    /// The load balancer's IP.
    Balancer,
}

impl Address {
    /// Every kind, at both nodes where that matters.
    pub const ALL: [Self; 5] =
        [Self::ClusterIp, Self::NodePort(Node::A), Self::NodePort(Node::B), Self::ExternalIp, Self::Balancer];
}

/// The Service's traffic policies: one of them `Local`, or none.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// Both are `Cluster`.
    Cluster,
    /// `externalTrafficPolicy: Local`.
    ExternalLocal,
    /// `internalTrafficPolicy: Local`.
    InternalLocal,
}

impl Policy {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Cluster, Self::ExternalLocal, Self::InternalLocal];
}

/// How the agents tell pods of their node (rule 71).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detect {
    /// By the device that the packet comes from: not a way of kube-proxy's, with the same answers as the network of the
    /// node's pods.
    PodDevice,
    /// By the network of all pods of the cluster: the other node's count.
    ClusterCidr,
    /// Not at all.
    Nobody,
}

/// The agents' settings.
#[derive(Clone, Copy, Debug)]
pub struct Mode {
    /// How they tell pods of their node.
    pub detect: Detect,
    /// `--masquerade-all`.
    pub masquerade_all: bool,
}

/// The source that an endpoint sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    /// The client's own, with its port.
    Client,
    /// The primary address of the device by which this node sends to the endpoint.
    Egress(Node),
    /// The address that was asked. Never by kube-proxy: see [`DIFFERENCES`].
    Service,
}

/// What becomes of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Refused at once.
    Refused,
    /// Nothing comes back.
    Silent,
    /// One of these answers. The request reaches those that are lost too, but they answer the client past the node that
    /// has translated, from an address that the client did not ask: no connection comes of it with kube-proxy either.
    Served {
        /// Who may answer, and the source that each sees.
        by: Vec<(Endpoint, Source)>,
        /// Whose answers do not come back.
        lost: Vec<Endpoint>,
    },
}

/// A deliberate difference: its name, whom it is about (mode, client, address, endpoint, the source by the rules), and
/// what the endpoint sees instead.
pub type Difference = (&'static str, fn(Mode, Client, Address, Endpoint, Source) -> bool, fn(Node) -> Source);

/// Where the endpoint sees another source than kube-proxy shows it. Each stands in docs/packet-path.md, section 9.
pub const DIFFERENCES: [Difference; 3] = [
    (
        "a process that is served by a process of its own node is seen with the Service's address",
        |_, client, address, endpoint, _| {
            let at = translated_at(client, address);
            client == Client::Process(at) && endpoint == Endpoint::Process(at)
        },
        |_| Source::Service,
    ),
    (
        "an unmasqueraded process is seen with its address towards the endpoint, not with that towards the Service",
        |_, client, address, endpoint, source| {
            let at = translated_at(client, address);
            client == Client::Process(at) && endpoint == Endpoint::Pod(at) && source == Source::Client
        },
        Source::Egress,
    ),
    (
        "a pod that another node leads back to itself is masqueraded there (rule 74 does so for endpoints of the node alone)",
        |_, client, address, endpoint, source| {
            let at = translated_at(client, address);
            endpoint.node() != at && is_itself(client, endpoint) && source == Source::Client
        },
        Source::Egress,
    ),
];

/// Does the client ask, and answer itself?
fn is_itself(client: Client, endpoint: Endpoint) -> bool {
    matches!((client, endpoint), (Client::Server(a), Endpoint::Pod(b)) if a == b)
}

/// The node that translates. Rule 93: a NodePort is one of its own node alone; on the way there nobody translates. The
/// other addresses are served by the first node that they pass.
pub const fn translated_at(client: Client, address: Address) -> Node {
    match address {
        Address::NodePort(node) => node,
        Address::ClusterIp | Address::ExternalIp | Address::Balancer => client.node(),
    }
}

/// Rule 71: does this node take the client for one of its pods?
fn is_local_pod(detect: Detect, client: Client, at: Node) -> bool {
    match (detect, client) {
        (Detect::PodDevice, Client::Pod(node) | Client::Server(node)) => node == at,
        (Detect::ClusterCidr, Client::Pod(_) | Client::Server(_)) => true,
        _ => false,
    }
}

/// What becomes of a client that asks this address of a Service with these endpoints, all of them ready: what the rules
/// say, but for our [`DIFFERENCES`].
pub fn verdict(mode: Mode, policy: Policy, endpoints: &[Endpoint], client: Client, address: Address) -> Verdict {
    differing(&DIFFERENCES, mode, policy, endpoints, client, address)
}

/// What the rules themselves say.
pub fn kube_proxys_verdict(
    mode: Mode,
    policy: Policy,
    endpoints: &[Endpoint],
    client: Client,
    address: Address,
) -> Verdict {
    differing(&[], mode, policy, endpoints, client, address)
}

fn differing(
    differences: &[Difference],
    mode: Mode,
    policy: Policy,
    endpoints: &[Endpoint],
    client: Client,
    address: Address,
) -> Verdict {
    let at = translated_at(client, address);
    let pod = is_local_pod(mode.detect, client, at);
    let node = client == Client::Process(at); // Rule 70.
    let local_only = match address {
        Address::ClusterIp => policy == Policy::InternalLocal, // Rule 24.
        _ => policy == Policy::ExternalLocal && !pod && !node, // Rules 23, 69: short-circuit.
    };
    let run: Vec<_> = endpoints.iter().copied().filter(|endpoint| !local_only || endpoint.node() == at).collect();
    if run.is_empty() {
        // Rule 54.
        return if endpoints.is_empty() { Verdict::Refused } else { Verdict::Silent };
    }
    // Rule 68, and 73: the policy of the other kind says nothing.
    let masquerade = match address {
        Address::ClusterIp => mode.masquerade_all || (mode.detect != Detect::Nobody && !pod),
        _ => policy != Policy::ExternalLocal || node,
    };
    let (mut by, mut lost) = (Vec::new(), Vec::new());
    for endpoint in run {
        let itself = is_itself(client, endpoint) && endpoint.node() == at;
        // Rules 74 and 75b.
        let masqueraded = (masquerade || itself) && endpoint != Endpoint::Process(at);
        let source = if masqueraded { Source::Egress(at) } else { Source::Client };
        let other = differences.iter().find(|(_, about, _)| about(mode, client, address, endpoint, source));
        let source = other.map_or(source, |(_, _, instead)| instead(at));
        // Rule 76: the reply has to come back to where the request was translated.
        if source == Source::Client && endpoint.node() != at && !client.is_behind(at) {
            lost.push(endpoint);
        } else {
            by.push((endpoint, source));
        }
    }
    Verdict::Served { by, lost }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: Mode = Mode { detect: Detect::ClusterCidr, masquerade_all: false };

    /// kube-proxy's own table, TestInternalExternalMasquerade, read off its lines: one endpoint here, one there.
    #[test]
    fn the_rules_give_the_table_of_kube_proxys_own_test() {
        use Policy::{Cluster, ExternalLocal, InternalLocal};
        let (pod, node, outside) = (Client::Pod(Node::A), Client::Process(Node::A), Client::Outside(Node::A));
        let (cluster_ip, node_port, balancer) = (Address::ClusterIp, Address::NodePort(Node::A), Address::Balancer);
        // Policy, client, address; both endpoints or the local one; masqueraded? In the base, without detector, and
        // with everything masqueraded.
        let both = |masquerade| (true, masquerade);
        let here = |masquerade| (false, masquerade);
        let rows = [
            (Cluster, pod, cluster_ip, [both(false), both(false), both(true)]),
            (Cluster, pod, node_port, [both(true); 3]),
            (Cluster, pod, balancer, [both(true); 3]),
            (Cluster, node, cluster_ip, [both(true), both(false), both(true)]),
            (Cluster, node, node_port, [both(true); 3]),
            (Cluster, node, balancer, [both(true); 3]),
            (Cluster, outside, cluster_ip, [both(true), both(false), both(true)]),
            (Cluster, outside, node_port, [both(true); 3]),
            (Cluster, outside, balancer, [both(true); 3]),
            (ExternalLocal, pod, cluster_ip, [both(false), both(false), both(true)]),
            (ExternalLocal, pod, node_port, [both(false), here(false), both(false)]),
            (ExternalLocal, pod, balancer, [both(false), here(false), both(false)]),
            (ExternalLocal, node, cluster_ip, [both(true), both(false), both(true)]),
            (ExternalLocal, node, node_port, [both(true); 3]),
            (ExternalLocal, node, balancer, [both(true); 3]),
            (ExternalLocal, outside, cluster_ip, [both(true), both(false), both(true)]),
            (ExternalLocal, outside, node_port, [here(false); 3]),
            (ExternalLocal, outside, balancer, [here(false); 3]),
            (InternalLocal, pod, cluster_ip, [here(false), here(false), here(true)]),
            (InternalLocal, pod, node_port, [both(true); 3]),
            (InternalLocal, pod, balancer, [both(true); 3]),
            (InternalLocal, node, cluster_ip, [here(true), here(false), here(true)]),
            (InternalLocal, node, node_port, [both(true); 3]),
            (InternalLocal, node, balancer, [both(true); 3]),
            (InternalLocal, outside, cluster_ip, [here(true), here(false), here(true)]),
            (InternalLocal, outside, node_port, [both(true); 3]),
            (InternalLocal, outside, balancer, [both(true); 3]),
        ];
        let endpoints = [Endpoint::Pod(Node::A), Endpoint::Pod(Node::B)];
        let modes = [BASE, Mode { detect: Detect::Nobody, ..BASE }, Mode { masquerade_all: true, ..BASE }];
        for (policy, client, address, expected) in rows {
            for (mode, (all, masquerade)) in modes.into_iter().zip(expected) {
                let shown = format!("{mode:?} {policy:?} {client:?} {address:?}");
                let Verdict::Served { by, lost } = verdict(mode, policy, &endpoints, client, address) else {
                    panic!("{shown}: not served");
                };
                assert_eq!(by.len() + lost.len(), if all { 2 } else { 1 }, "{shown}: {by:?}");
                // What the list of differences changes for an unmasqueraded process is not upstream's.
                if client != node || masquerade {
                    let seen = |source: Source| source == Source::Egress(Node::A);
                    assert!(by.iter().all(|(_, source)| seen(*source) == masquerade), "{shown}: {by:?}");
                }
            }
        }
    }
}
