//! Who may use a load balancer's addresses: kube-proxy's rule 21.

use std::net::IpAddr;

use ipnet::IpNet;

use crate::index::Index;
use crate::model::{IpFamily, Service};

/// The networks of a family whose clients may use the Service's load balancer's addresses; none for everybody.
///
/// Where a range holds this node's own IP, the load balancer's addresses themselves are clients too: a node that has one
/// of them on a device asks from it.
pub fn of(index: &Index, service: &Service, family: IpFamily) -> Vec<IpNet> {
    let mut ranges = service.source_ranges(family);
    if own_ips(index).any(|ip| ranges.iter().any(|range| range.contains(&ip))) && !mutant!("rule-21-node") {
        let balancers = service.load_balancer_ips.iter().filter(|addr| IpFamily::of(addr) == family);
        ranges.extend(balancers.map(|addr| IpNet::from(*addr)));
    }
    ranges.sort_unstable();
    ranges.dedup();
    ranges
}

/// The node's IPs, as its Node object has them; where there is no Node, as manifests need not have one, all addresses of
/// this machine.
fn own_ips(index: &Index) -> impl Iterator<Item = IpAddr> {
    let listed = index.node().map(|node| node.addresses.as_slice());
    let found = index.node_addrs().filter(|_| listed.is_none());
    listed.into_iter().flatten().copied().chain(found.into_iter().flat_map(|addrs| addrs.keys().copied()))
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;
    use crate::index::{Event, Object};
    use crate::model::{Node, ObjectName, ServiceType};

    fn service(ranges: &[&str]) -> Service {
        Service {
            name: ObjectName::new("ns", "web"),
            created_secs: 0,
            kind: ServiceType::LoadBalancer,
            cluster_ip_v4: Some([10, 96, 0, 1].into()),
            cluster_ip_v6: Some("fd00::1".parse().unwrap()),
            ports: Vec::new(),
            internal_local: false,
            external_local_asked: false,
            affinity_secs: None,
            external_ips: vec![[203, 0, 113, 7].into()],
            load_balancer_ips: vec![[5, 6, 7, 8].into(), "2001:db8::8".parse().unwrap()],
            source_ranges_asked: ranges.iter().map(|range| range.parse().unwrap()).collect(),
            health_check_node_port: 0,
        }
    }

    fn node(ip: &str) -> Event {
        let (name, addresses) = (ObjectName::new("", "node-a"), vec![ip.parse().unwrap()]);
        Event::Apply(Object::Node(Node { name, addresses, zone: None, pod_cidrs: Vec::new(), leaving: false }))
    }

    fn planned(index: &Index, ranges: &[&str], family: IpFamily) -> Vec<String> {
        of(index, &service(ranges), family).iter().map(ToString::to_string).collect()
    }

    #[test]
    fn rule_21_a_range_with_the_nodes_ip_lets_the_balancers_addresses_in() {
        let mut index = Index::default();
        index.apply(Event::NodeAddrs(BTreeMap::from([([192, 168, 0, 3].into(), 0)])));
        index.apply(node("192.168.0.2"));
        let ranges = ["203.0.113.0/25", "192.168.0.2/32", "fd00::/8"];
        assert_eq!(planned(&index, &ranges, IpFamily::V4), ["5.6.7.8/32", "192.168.0.2/32", "203.0.113.0/25"]);
        assert_eq!(planned(&index, &ranges, IpFamily::V6), ["fd00::/8"], "the node's IP is of the other family");
        index.apply(node("192.168.0.4"));
        assert_eq!(planned(&index, &ranges, IpFamily::V4), ["192.168.0.2/32", "203.0.113.0/25"]);
    }

    #[test]
    fn without_a_node_the_machines_addresses_are_its_ips() {
        let mut index = Index::default();
        assert_eq!(planned(&index, &["192.168.0.0/24"], IpFamily::V4), ["192.168.0.0/24"]);
        index.apply(Event::NodeAddrs(BTreeMap::from([([192, 168, 0, 3].into(), 0)])));
        assert_eq!(planned(&index, &["192.168.0.0/24"], IpFamily::V4), ["5.6.7.8/32", "192.168.0.0/24"]);
    }

    #[test]
    fn without_ranges_everybody_may() {
        let mut index = Index::default();
        index.apply(node("192.168.0.2"));
        assert!(planned(&index, &[], IpFamily::V4).is_empty());
        assert!(planned(&index, &["0.0.0.0/0", "192.168.0.2/32"], IpFamily::V4).is_empty(), "not the balancers alone");
    }
}
