//! What load balancers are told of a Service on its `healthCheckNodePort`: kube-proxy's rules 26 and 126.

use std::collections::BTreeSet;

use super::endpoints::gather;
use crate::index::Index;
use crate::model::{EndpointSlice, IpFamily, ObjectName, Service, ServiceType};

/// The health check of one Service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct HealthCheck {
    /// Where it is answered.
    pub port: u16,
    /// How many endpoints this node has, per family; `None` where the Service has no address of the family.
    pub local: [Option<usize>; 2],
}

/// The health check that a Service asks for: only a load balancer's, and only one that keeps clients on this node.
pub fn health_check(index: &Index, name: &ObjectName, ipv6: bool) -> Option<HealthCheck> {
    let service = index.service(name).filter(|service| asks(service))?;
    let local = |family| {
        let served = service.cluster_ip(family).is_some() && (ipv6 || family == IpFamily::V4);
        served.then(|| local_ready(&index.slices(name, family))).filter(|count| *count != 0 || !mutant!("rule-129"))
    };
    Some(HealthCheck { port: service.health_check_node_port, local: IpFamily::ALL.map(local) })
}

fn asks(service: &Service) -> bool {
    service.health_check_node_port != 0
        && (service.kind == ServiceType::LoadBalancer || mutant!("rule-26"))
        && service.external_local_asked
}

/// Distinct addresses of ready endpoints on this node, over all ports of the slices. One that terminates is served and
/// does not count: load balancers are to leave it.
fn local_ready(slices: &[&EndpointSlice]) -> usize {
    let ports: BTreeSet<_> =
        slices.iter().flat_map(|slice| &slice.ports).map(|port| (&*port.name, port.protocol)).collect();
    let candidates = ports.into_iter().flat_map(|(name, protocol)| gather(slices, name, protocol, None));
    candidates.filter(|c| (c.ready || mutant!("rule-126")) && c.local).map(|c| c.addr).collect::<BTreeSet<_>>().len()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::index::{Event, Object};
    use crate::model::{Endpoint, Hint, Protocol, ServicePort, SlicePort, Trigger};

    fn name() -> ObjectName {
        ObjectName::new("ns", "web")
    }

    fn balanced() -> Service {
        let port = ServicePort { name: "http".into(), protocol: Protocol::Tcp, port: 80, node_port: 30_080 };
        Service {
            name: name(),
            created_secs: 0,
            kind: ServiceType::LoadBalancer,
            cluster_ip_v4: Some([10, 96, 0, 1].into()),
            cluster_ip_v6: None,
            ports: vec![port],
            internal_local: false,
            external_local_asked: true,
            affinity_secs: None,
            external_ips: Vec::new(),
            load_balancer_ips: Vec::new(),
            source_ranges_asked: Vec::new(),
            health_check_node_port: 31_000,
        }
    }

    /// Endpoints by one letter each, capitals are on this node: `r` ready, `n` not ready, `t` serving and terminating,
    /// `b` ready although terminating.
    fn slice(of: &str, ports: &[(&str, u16)], letters: &[(u8, char)]) -> EndpointSlice {
        let endpoint = |(last, letter): &(u8, char)| {
            let kind = letter.to_ascii_lowercase();
            Endpoint {
                addr: [10, 244, 0, *last].into(),
                ready: matches!(kind, 'r' | 'b'),
                serving: kind != 'n',
                terminating: matches!(kind, 't' | 'b'),
                local: letter.is_ascii_uppercase(),
                for_node: Hint::None,
                zones: 0,
            }
        };
        let port =
            |(name, port): &(&str, u16)| SlicePort { name: (*name).into(), protocol: Protocol::Tcp, port: *port };
        EndpointSlice {
            name: ObjectName::new("ns", of),
            service: name(),
            family: IpFamily::V4,
            legacy: false,
            ports: ports.iter().map(port).collect(),
            endpoints: letters.iter().map(endpoint).collect(),
            zone_hints: Vec::new(),
            trigger: Trigger::default(),
        }
    }

    fn local(service: Service, slices: Vec<EndpointSlice>) -> Option<[Option<usize>; 2]> {
        let mut index = Index::default();
        index.apply(Event::Apply(Object::Service(service)));
        for slice in slices {
            index.apply(Event::Apply(Object::Slice(slice)));
        }
        health_check(&index, &name(), true).map(|check| check.local)
    }

    #[test]
    fn rule_26_only_a_load_balancer_that_keeps_clients_on_the_node_has_one() {
        assert_eq!(local(balanced(), Vec::new()), Some([Some(0), None]), "rule 129: without an endpoint, too");
        assert_eq!(local(Service { kind: ServiceType::NodePort, ..balanced() }, Vec::new()), None);
        assert_eq!(local(Service { external_local_asked: false, ..balanced() }, Vec::new()), None);
        assert_eq!(local(Service { health_check_node_port: 0, ..balanced() }, Vec::new()), None);
        let dual = Service { cluster_ip_v6: Some("fd00::1".parse().unwrap()), ..balanced() };
        assert_eq!(local(dual, Vec::new()), Some([Some(0), Some(0)]));
    }

    #[test]
    fn rule_126_ready_endpoints_of_this_node_count_once_each() {
        let http = [("http", 8080)];
        let count = |slices| local(balanced(), slices).and_then(|local| local[0]);
        assert_eq!(count(vec![slice("a", &http, &[(1, 'R'), (2, 'R'), (3, 'r')])]), Some(2));
        assert_eq!(count(vec![slice("a", &http, &[(1, 'T'), (2, 'N'), (3, 'r')])]), Some(0), "terminating only");
        assert_eq!(count(vec![slice("a", &http, &[(1, 'B')])]), Some(1), "rule 27: published although not ready");
        let two = [("http", 8080), ("https", 8443)];
        assert_eq!(count(vec![slice("a", &two, &[(1, 'R'), (2, 'R')])]), Some(2), "two ports, two endpoints");
        let apart = vec![slice("a", &http, &[(1, 'R')]), slice("b", &http, &[(1, 'R'), (2, 'R')])];
        assert_eq!(count(apart), Some(2), "one endpoint in two slices");
        assert_eq!(count(vec![slice("a", &[], &[(1, 'R')])]), Some(0), "rule 39: a slice without ports");
        let both = vec![slice("a", &http, &[(1, 'T')]), slice("b", &http, &[(1, 'R')])];
        assert_eq!(count(both), Some(1), "rule 45: one that does not terminate counts");
    }
}
