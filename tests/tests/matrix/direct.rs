//! Direct traffic, without any Service: whom an endpoint sees when a client asks it by its own address. Where no source
//! change is due, a Service must show it the same; where one is due, what it sees of that node's own processes.

use std::{
    collections::HashMap,
    net::{IpAddr, SocketAddr},
};

use anyhow::{Context as _, Result};
use fairlead_lab::Proto;
use fairlead_tests::{
    nodes::{Nodes, TARGET},
    rules::{Client, Endpoint, Node},
};

use crate::{
    shape::{Filter, Topology, Wiring, second},
    tracked::{self, Tracked},
};

/// Everyone whose own source matters.
const CLIENTS: [Client; 5] = [
    Client::Pod(Node::A),
    Client::Server(Node::A),
    Client::Process(Node::A),
    Client::Process(Node::B),
    Client::Outside(Node::A),
];
/// The first port of direct questions.
const FIRST_PORT: u16 = 9_000;

/// What was seen.
pub(crate) struct Direct {
    /// Where pods have an uplink of their own, its address on each node.
    uplinks: Option<[[IpAddr; 2]; 2]>,
    sources: HashMap<(Client, Endpoint, bool), IpAddr>,
    tracked: HashMap<(Client, Endpoint, bool, Proto), [Tracked; 2]>,
}

impl Direct {
    /// Asks every endpoint from everywhere.
    pub(crate) fn observe(topology: &Topology, nodes: &Nodes) -> Result<Self> {
        let (mut sources, mut asked) = (HashMap::new(), Vec::new());
        let mut port = FIRST_PORT;
        for client in CLIENTS {
            for endpoint in Endpoint::ALL {
                for v6 in [false, true] {
                    for proto in Proto::ALL {
                        port += 1;
                        let to = SocketAddr::new(nodes.endpoint(endpoint, v6), TARGET);
                        let attempt = nodes.ask(client, proto, to, port).once(nodes.namespace(client))?;
                        let answer = attempt.outcome.answer();
                        let answer = answer.with_context(|| format!("{client:?} → {endpoint:?} at {to}: {attempt}"))?;
                        sources.insert((client, endpoint, v6), answer.peer.ip());
                        asked.push(((client, endpoint, v6, proto), port));
                    }
                }
            }
        }
        let mut tracked = HashMap::new();
        if topology.filter != Filter::None {
            let listed = tracked::settled(nodes, |own| (FIRST_PORT..=port).contains(&own))?;
            for ((client, endpoint, v6, proto), port) in asked {
                let from = SocketAddr::new(nodes.client(client, v6), port);
                tracked.insert((client, endpoint, v6, proto), listed.each_ref().map(|list| list.of(proto, from)));
            }
        }
        let uplinks = (topology.wiring == Wiring::TwoUplinks)
            .then(|| nodes.labs.each_ref().map(|lab| [false, true].map(|v6| second(lab, v6))));
        Ok(Self { uplinks, sources, tracked })
    }

    /// The address that the endpoint sees of this client.
    pub(crate) fn source(&self, client: Client, endpoint: Endpoint, v6: bool) -> IpAddr {
        self.sources[&(client, endpoint, v6)]
    }

    /// The address that the endpoint sees of a client whom this node masquerades: that of the device by which the packet
    /// leaves, as of what a process of the node sends there.
    pub(crate) fn masquerade(&self, node: Node, client: Client, endpoint: Endpoint, v6: bool) -> IpAddr {
        let by_another =
            matches!(client, Client::Pod(at) | Client::Server(at) if at == node) && endpoint.node() != node;
        match self.uplinks.filter(|_| by_another) {
            Some(uplinks) => uplinks[node as usize][usize::from(v6)],
            None => self.source(Client::Process(node), endpoint, v6),
        }
    }

    /// What both nodes track of it.
    pub(crate) fn tracked(&self, client: Client, endpoint: Endpoint, v6: bool, proto: Proto) -> &[Tracked; 2] {
        &self.tracked[&(client, endpoint, v6, proto)]
    }
}
