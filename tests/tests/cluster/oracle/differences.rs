//! Where Fairlead does other than kube-proxy, and nowhere else: each entry says what becomes of kube-proxy's verdict.

use std::net::{IpAddr, SocketAddr};

use super::{
    probe::{Probe, Proto},
    sight::{Fate, SeenAs},
    world::{Client, is_the_nodes, place, second},
};

/// A difference.
pub(super) struct Difference {
    /// The rule that it belongs to.
    pub(super) rule: &'static str,
    pub(super) what: &'static str,
    pub(super) why: &'static str,
    /// Fairlead's verdict where kube-proxy's is this one.
    ours: fn(&Probe, Fate) -> Fate,
}

/// All of them. Each turns up in the rounds of the fixed seeds.
pub(super) const DIFFERENCES: &[Difference] = &[
    Difference {
        rule: "62",
        what: "a refused TCP connection gets a reset, where kube-proxy answers with ICMP",
        why: "an ICMPv6 error that arrives while connect(2) holds the socket is not heard; a reset is",
        ours: |probe, fate| match fate {
            Fate::Unreachable if probe.proto == Proto::Tcp => Fate::Reset,
            other => other,
        },
    },
    Difference {
        rule: "68",
        what: "a process of the node is seen by the address that the way to its endpoint prefers, masqueraded or not",
        why: "it chose its own for the way to the Service's address, which is another one",
        ours: |probe, fate| match fate {
            Fate::Reached { at, endpoint, as_from: SeenAs::Client }
                if probe.client == Client::Node
                    && at != "node"
                    && preferred(endpoint) != place("node", endpoint.is_ipv6()) =>
            {
                Fate::Reached { at, endpoint, as_from: SeenAs::Address(preferred(endpoint)) }
            }
            other => other,
        },
    },
    Difference {
        rule: "72, 75",
        what: "a process of the node keeps its source port, for which kube-proxy draws another one",
        why: "nobody else has that port: it is the socket's",
        ours: |probe, fate| match fate {
            Fate::Reached { at, endpoint, as_from: SeenAs::OtherPort } if probe.client == Client::Node => {
                Fate::Reached { at, endpoint, as_from: SeenAs::Client }
            }
            other => other,
        },
    },
    Difference {
        rule: "75b",
        what: "a process of the node that is served by the node itself is seen by the Service's address",
        why: "the reply has to leave by a device to be translated",
        ours: |probe, fate| match fate {
            Fate::Reached { at: "node", endpoint, as_from: SeenAs::Client } if probe.client == Client::Node => {
                let as_from = match probe.to.ip() {
                    // The same address again, with a port that tells this connection from one without a Service.
                    ip if ip == place("node", ip.is_ipv6()) => SeenAs::OtherPort,
                    ip if is_the_nodes(ip) => SeenAs::Address(ip),
                    _ => SeenAs::Service,
                };
                Fate::Reached { at: "node", endpoint, as_from }
            }
            other => other,
        },
    },
    Difference {
        rule: "74",
        what: "a pod that is its own endpoint is masqueraded wherever it runs, also where no nodeName says that it runs here",
        why: "it would drop a packet from itself; slices written by hand often name no node",
        ours: |probe, fate| match fate {
            Fate::Reached { at, endpoint, as_from: SeenAs::Client }
                if matches!(probe.client, Client::Endpoint | Client::RemotePod)
                    && endpoint.ip() == probe.client.address(endpoint.is_ipv6(), 0, 0) =>
            {
                Fate::Reached { at, endpoint, as_from: SeenAs::Address(preferred(endpoint)) }
            }
            other => other,
        },
    },
];

/// The address of the node's that the kernel prefers on the way there. Of several of IPv6 it takes the one whose network the
/// endpoint shares, else the one that came last (RFC 6724 §5, rule 8).
fn preferred(endpoint: SocketAddr) -> IpAddr {
    let neighbour = endpoint.ip() == place("other node", true);
    if endpoint.is_ipv6() && !neighbour { second(true) } else { place("node", endpoint.is_ipv6()) }
}

/// What Fairlead is to do where kube-proxy did this, and which differences that takes.
pub(super) fn ours(probe: &Probe, theirs: Fate) -> (Fate, Vec<usize>) {
    let (mut fate, mut used) = (theirs, Vec::new());
    for (at, difference) in DIFFERENCES.iter().enumerate() {
        let next = (difference.ours)(probe, fate);
        if next != fate {
            used.push(at);
        }
        fate = next;
    }
    (fate, used)
}
