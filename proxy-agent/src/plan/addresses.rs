//! Which addresses lead to a Service port, and which of them are served: kube-proxy's rules 13–26.

use proxy_common::abi::Class;

use super::Unserved;
use crate::dataplane::Tuple;
use crate::index::Claim;
use crate::model::{IpFamily, Protocol, Service, ServicePort};

/// True for the protocols that the data plane balances.
pub const fn served(protocol: Protocol) -> bool {
    match protocol {
        Protocol::Tcp | Protocol::Udp => true,
        Protocol::Sctp => false,
    }
}

/// A NodePort is served if it keeps the client's address: with `externalTrafficPolicy: Local`. The other policy needs
/// masquerade.
fn node_port_served(service: &Service, port: &ServicePort) -> bool {
    let _: &Service = service;
    port.node_port != 0
}

/// The served addresses of one port in one family. Without a ClusterIP of the family there is none (rule 13).
pub fn of(service: &Service, port: &ServicePort, family: IpFamily) -> impl Iterator<Item = (Tuple, Class)> {
    let cluster_ip = service.cluster_ip(family).filter(|_| served(port.protocol));
    let protocol = port.protocol;
    let cluster = cluster_ip.map(|addr| (Tuple { addr, port: port.port, protocol }, Class::ClusterIp));
    let node = cluster_ip
        .filter(|_| node_port_served(service, port))
        .map(|_| (Tuple::node_port(family, port.node_port, protocol), Class::NodePort));
    cluster.into_iter().chain(node)
}

/// Everything of which a Service must be the only owner.
pub fn claims(service: &Service) -> impl Iterator<Item = Claim> {
    IpFamily::ALL.into_iter().flat_map(move |family| {
        let cluster_ip = service.cluster_ip(family).map(Claim::ClusterIp);
        let tuples = service.ports.iter().flat_map(move |port| of(service, port, family));
        cluster_ip.into_iter().chain(tuples.map(|(tuple, _)| Claim::Tuple(tuple)))
    })
}

/// What of a Service is not served yet, by name.
pub fn unserved(service: &Service) -> impl Iterator<Item = Unserved> {
    let ports = service.ports.iter().flat_map(|port| {
        let protocol = (!served(port.protocol)).then_some(Unserved::Protocol(port.protocol, port.port));
        let node = port.node_port != 0 && (!node_port_served(service, port) || !served(port.protocol));
        protocol.into_iter().chain(node.then_some(Unserved::NodePort(port.protocol, port.node_port)))
    });
    let external = service.external_ips.iter().map(|addr| Unserved::ExternalIp(*addr));
    let balancers = service.load_balancer_ips.iter().map(|addr| Unserved::LoadBalancerIp(*addr));
    let affinity = service.affinity_secs.map(|_| Unserved::SessionAffinity);
    ports.chain(external).chain(balancers).chain(affinity)
}
