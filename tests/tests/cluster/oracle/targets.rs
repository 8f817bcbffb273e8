//! Whom to ask: every address that a Service may have, some that it has not, and some that are nobody's.

use std::{
    collections::BTreeSet,
    net::{IpAddr, SocketAddr},
};

use k8s_openapi::api::core::v1::Service;

use super::{
    generate::Generated,
    probe::{Kind, Probe, Proto},
    world::{Client, is_the_nodes, place, second},
    write::cluster_ips,
};

/// A port that no Service has.
const NO_PORT: u16 = 9;

/// The probes of a Service.
pub(super) fn of(made: &Generated, created: &Service) -> Vec<Probe> {
    let endpoints = [false, true].map(|v6| endpoints(made, v6));
    let probe = |kind, to: SocketAddr, proto, client| {
        let served = !matches!(kind, Kind::Unknown | Kind::Nobodys);
        Probe {
            service: made.name.clone(),
            kind,
            client,
            from: None,
            proto,
            to,
            endpoints: if served { endpoints[usize::from(to.is_ipv6())] } else { 0 },
            sticky: made.sticky && served,
        }
    };
    let mut probes = Vec::new();
    for (kind, to, proto) in served(made, created) {
        probes.extend(Client::ALL.map(|client| probe(kind, to, proto, client)));
    }
    for (from, to, proto) in from_balancers(made) {
        probes.push(Probe { from: Some(from), ..probe(Kind::Balancer, to, proto, Client::Outside) });
    }
    for (to, proto) in unserved(made, created) {
        let clients = [Client::Pod, Client::Outside, Client::Node];
        probes.extend(clients.map(|client| probe(Kind::Unknown, to, proto, client)));
    }
    probes
}

fn served(made: &Generated, created: &Service) -> Vec<(Kind, SocketAddr, Proto)> {
    let kinds = [
        (Kind::ClusterIp, cluster_ips(created)),
        (Kind::External, made.external.clone()),
        (Kind::Balancer, made.balanced.clone()),
    ];
    let mut found = Vec::new();
    for port in &made.ports {
        for (kind, ips) in &kinds {
            found.extend(ips.iter().map(|ip| (*kind, SocketAddr::new(*ip, port.number), port.proto)));
        }
        let node = [false, true].map(|v6| [place("node", v6), second(v6)]).concat();
        let at = |node_port, ip: &IpAddr| (Kind::NodePort, SocketAddr::new(*ip, node_port), port.proto);
        let at_node = |node_port| node.iter().map(move |ip| at(node_port, ip));
        found.extend(port.node_port.into_iter().flat_map(at_node));
    }
    found
}

/// A load balancer's address may be a client as well: rule 21 has an exception for it.
fn from_balancers(made: &Generated) -> Vec<(IpAddr, SocketAddr, Proto)> {
    if made.service["spec"]["loadBalancerSourceRanges"].is_null() {
        return Vec::new();
    }
    let mut found = Vec::new();
    for to in &made.balanced {
        // One of the node's own would be a martian.
        let from = made.balanced.iter().find(|from| from.is_ipv6() == to.is_ipv6() && !is_the_nodes(**from));
        let port = &made.ports[0];
        found.extend(from.map(|from| (*from, SocketAddr::new(*to, port.number), port.proto)));
    }
    found
}

/// A wrong port, a wrong protocol.
fn unserved(made: &Generated, created: &Service) -> Vec<(SocketAddr, Proto)> {
    let mut found = Vec::new();
    let first = &made.ports[0];
    let has = |proto: &Proto| made.ports.iter().any(|port| port.number == first.number && port.proto == *proto);
    let missing = Proto::ALL.into_iter().find(|proto| !has(proto));
    for ip in cluster_ips(created).iter().chain(&made.external).chain(&made.balanced) {
        found.push((SocketAddr::new(*ip, NO_PORT), first.proto));
        found.extend(missing.map(|proto| (SocketAddr::new(*ip, first.number), proto)));
    }
    found
}

/// How many endpoints of a family the Service has, usable or not.
fn endpoints(made: &Generated, v6: bool) -> usize {
    let family = if v6 { "IPv6" } else { "IPv4" };
    let slices = made.slices.iter().filter(|slice| slice["addressType"] == family);
    let endpoints = slices.flat_map(|slice| slice["endpoints"].as_array().into_iter().flatten());
    endpoints.map(|endpoint| endpoint["addresses"][0].to_string()).collect::<BTreeSet<_>>().len()
}

/// Addresses of the ServiceCIDRs that no Service has, and endpoints' own (rule 101).
pub(super) fn nobodys() -> Vec<Probe> {
    let unallocated = ["10.96.255.77", "fd00:10:96::fff7"].map(|ip| ip.parse::<IpAddr>().expect("a constant address"));
    let own = ["pod-b", "node", "remote-b"].into_iter().flat_map(|at| [place(at, false), place(at, true)]);
    let mut probes = Vec::new();
    for ip in unallocated.into_iter().chain(own) {
        for client in Client::ALL {
            probes.extend(Proto::ALL.map(|proto| Probe {
                service: "nobody".to_owned(),
                kind: Kind::Nobodys,
                client,
                from: None,
                proto,
                to: SocketAddr::new(ip, 8080),
                endpoints: 0,
                sticky: false,
            }));
        }
    }
    probes
}
