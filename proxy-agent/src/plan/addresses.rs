//! Which addresses lead to a Service port: kube-proxy's rules 11, 13 and 16–19.

use std::net::IpAddr;

use proxy_common::abi::Class;

use crate::dataplane::Tuple;
use crate::index::Claim;
use crate::model::{IpFamily, Service, ServicePort};

/// The addresses of one port in one family, each once. Without a ClusterIP of the family there is none (rule 13);
/// `spec.type` does not matter (rule 11).
///
/// An address may stand in several fields. It then is what kube-proxy writes last: a load balancer's, for which source
/// ranges count; else an external IP; only else the ClusterIP.
pub fn of(service: &Service, port: &ServicePort, family: IpFamily) -> Vec<(Tuple, Class)> {
    let cluster_ip = service.cluster_ip(family);
    if cluster_ip.is_none() && !mutant!("rule-13-external") {
        return Vec::new();
    }
    let of_family = |addrs: &[IpAddr], class: Class| {
        let addrs = addrs.iter().filter(|addr| IpFamily::of(addr) == family);
        addrs.map(|addr| (*addr, class)).collect::<Vec<_>>()
    };
    let internal = mutant!("rule-11") && service.kind == crate::model::ServiceType::ClusterIp;
    let mut addrs = Vec::new();
    if !internal && !mutant!("rule-19") {
        addrs.extend(of_family(&service.load_balancer_ips, Class::LoadBalancer));
    }
    if !internal && !mutant!("rule-18") {
        let class = if mutant!("rule-21-classes") { Class::LoadBalancer } else { Class::ExternalIp };
        addrs.extend(of_family(&service.external_ips, class));
    }
    if let Some(addr) = cluster_ip {
        addrs.push((addr, if mutant!("rule-21-classes") { Class::LoadBalancer } else { Class::ClusterIp }));
    }
    let mut found: Vec<(Tuple, Class)> = Vec::with_capacity(addrs.len() + 1);
    for (addr, class) in addrs {
        if !found.iter().any(|(tuple, _)| tuple.addr == addr) {
            found.push((Tuple { addr, port: port.port, protocol: port.protocol }, class));
        }
    }
    let only_tcp = mutant!("rule-95") && port.protocol != crate::model::Protocol::Tcp;
    if (port.node_port != 0 || mutant!("rule-17")) && !only_tcp {
        found.push((Tuple::node_port(family, port.node_port, port.protocol), Class::NodePort));
    }
    found
}

/// Everything of which a Service must be the only owner.
pub fn claims(service: &Service) -> impl Iterator<Item = Claim> {
    IpFamily::ALL.into_iter().flat_map(move |family| {
        let cluster_ip = service.cluster_ip(family).map(Claim::ClusterIp);
        let tuples = service.ports.iter().flat_map(move |port| of(service, port, family));
        cluster_ip.into_iter().chain(tuples.map(|(tuple, _)| Claim::Tuple(tuple)))
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{ObjectName, Protocol, ServiceType};

    fn port(protocol: Protocol, node_port: u16) -> ServicePort {
        ServicePort { name: "".into(), protocol, port: 80, node_port }
    }

    fn service(external: &[&str], balancer: &[&str]) -> Service {
        let addrs = |list: &[&str]| list.iter().map(|addr| addr.parse().unwrap()).collect();
        Service {
            name: ObjectName::new("ns", "web"),
            created_secs: 0,
            kind: ServiceType::ClusterIp,
            cluster_ip_v4: Some([10, 96, 0, 1].into()),
            cluster_ip_v6: None,
            ports: Vec::new(),
            internal_local: false,
            external_local_asked: false,
            affinity_secs: None,
            external_ips: addrs(external),
            load_balancer_ips: addrs(balancer),
            source_ranges_asked: Vec::new(),
            health_check_node_port: 0,
        }
    }

    fn found(service: &Service, port: &ServicePort, family: IpFamily) -> Vec<String> {
        let mut found: Vec<_> =
            of(service, port, family).into_iter().map(|(tuple, class)| format!("{tuple} {class:?}")).collect();
        found.sort();
        found
    }

    #[test]
    fn rule_11_every_address_is_served_whatever_the_type_says() {
        let made = service(&["203.0.113.7", "2001:db8::7"], &["198.51.100.1"]);
        assert_eq!(
            found(&made, &port(Protocol::Tcp, 30_080), IpFamily::V4),
            [
                "10.96.0.1:80/TCP ClusterIp",
                "198.51.100.1:80/TCP LoadBalancer",
                "203.0.113.7:80/TCP ExternalIp",
                "IPv4 NodePort 30080/TCP NodePort"
            ]
        );
    }

    #[test]
    fn rule_13_a_family_without_a_clusterip_has_no_address_at_all() {
        let made = service(&["203.0.113.7", "2001:db8::7"], &["2001:db8::8"]);
        assert!(found(&made, &port(Protocol::Tcp, 30_080), IpFamily::V6).is_empty());
    }

    #[test]
    fn rule_16_protocols_are_alike() {
        for protocol in [Protocol::Tcp, Protocol::Udp, Protocol::Sctp] {
            assert_eq!(of(&service(&["203.0.113.7"], &[]), &port(protocol, 30_080), IpFamily::V4).len(), 3);
        }
    }

    #[test]
    fn rule_17_a_nodeport_of_0_is_none() {
        assert_eq!(found(&service(&[], &[]), &port(Protocol::Udp, 0), IpFamily::V4), ["10.96.0.1:80/UDP ClusterIp"]);
    }

    #[test]
    fn an_address_in_several_fields_is_what_kube_proxy_writes_last() {
        let of = |external, balancer| found(&service(external, balancer), &port(Protocol::Tcp, 0), IpFamily::V4);
        assert_eq!(of(&["203.0.113.7"], &["203.0.113.7"])[1], "203.0.113.7:80/TCP LoadBalancer");
        assert_eq!(of(&["10.96.0.1"], &[]), ["10.96.0.1:80/TCP ExternalIp"]);
        assert_eq!(of(&["10.96.0.1"], &["10.96.0.1"]), ["10.96.0.1:80/TCP LoadBalancer"]);
        assert_eq!(of(&["203.0.113.7", "203.0.113.7"], &[]).len(), 2);
    }
}
