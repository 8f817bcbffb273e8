//! The Services that are loaded: those under test, and as many more as asked for, each with ten endpoints.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    sync::Arc,
};

use proxy_agent::{
    index::{Event, Index, Kind, Object},
    model::{
        Endpoint, EndpointSlice, Hint, IpFamily, ObjectName, Protocol, Service, ServicePort, ServiceType, SlicePort,
        Trigger,
    },
};
use proxy_common::abi::NodeAddr;

/// Endpoints of each Service.
pub const ENDPOINTS: u8 = 10;
/// The port of the Services under test.
pub const PORT: u16 = 80;
/// The NodePort of the Service under test, with `externalTrafficPolicy: Local`.
pub const NODE_PORT: u16 = 30_080;
/// The NodePort of another one with the same endpoints, with `externalTrafficPolicy: Cluster`.
pub const MASQUERADED: u16 = 30_081;
/// The port on which its endpoints listen.
pub const TARGET: u16 = 8_080;

/// The ClusterIP of the Service under test.
pub fn vip(v6: bool) -> IpAddr {
    service_ip(v6, 10)
}

/// The ClusterIP of a Service without endpoints.
pub fn empty_vip(v6: bool) -> IpAddr {
    service_ip(v6, 11)
}

fn service_ip(v6: bool, n: u16) -> IpAddr {
    if v6 {
        Ipv6Addr::new(0xfd00, 0x10, 0x96, 0, 0, 0, 0, n).into()
    } else {
        Ipv4Addr::from(0x0a60_0000 + u32::from(n)).into()
    }
}

/// What is to be served.
#[derive(Clone, Debug)]
pub struct Plan {
    /// Number of Services, those under test included.
    pub services: u32,
    /// Addresses of the endpoints under test, both families.
    pub endpoints: Vec<IpAddr>,
    /// The node's own addresses.
    pub node: Vec<IpAddr>,
}

/// The index as the agent has it after its first full lists.
pub fn index(plan: &Plan) -> Index {
    let mut index = Index::default();
    let mut masqueraded = under_test("masqueraded", 12, MASQUERADED);
    masqueraded.external_local_asked = false;
    let mut services = vec![
        (under_test("target", 10, NODE_PORT), plan.endpoints.clone()),
        (under_test("nobody", 11, 0), Vec::new()),
        (masqueraded, plan.endpoints.clone()),
    ];
    services.extend((3..plan.services).map(filler));
    index.apply(Event::Init(Kind::Service));
    index.apply(Event::Init(Kind::EndpointSlice));
    for (service, endpoints) in services {
        for family in IpFamily::ALL {
            let slice = slice(&service, family, &endpoints);
            index.apply(Event::InitApply(Object::Slice(slice)));
        }
        index.apply(Event::InitApply(Object::Service(service)));
    }
    let node = plan.node.iter().map(|addr| (*addr, NodeAddr::LOCAL | NodeAddr::NODE_PORTS));
    index.apply(Event::InitDone(Kind::Service));
    index.apply(Event::InitDone(Kind::EndpointSlice));
    index.apply(Event::NodeAddrs(node.collect::<BTreeMap<_, _>>()));
    index
}

fn under_test(name: &str, ip: u16, node_port: u16) -> Service {
    let port = |protocol: Protocol| ServicePort {
        name: Arc::from(protocol.to_string().to_lowercase()),
        protocol,
        port: PORT,
        node_port,
    };
    let (v4, v6) = (service_ip(false, ip), service_ip(true, ip));
    service(name, v4, v6, vec![port(Protocol::Tcp), port(Protocol::Udp)], node_port != 0)
}

/// One of the many: its own addresses, one port, ten endpoints elsewhere.
fn filler(n: u32) -> (Service, Vec<IpAddr>) {
    let v4 = Ipv4Addr::from(0x0a61_0000 + n);
    let v6 = Ipv6Addr::new(0xfd00, 0x10, 0x97, 0, 0, 0, (n >> 16) as u16, n as u16);
    let protocol = if n.is_multiple_of(2) { Protocol::Udp } else { Protocol::Tcp };
    let port = ServicePort { name: Arc::from("main"), protocol, port: PORT, node_port: 0 };
    let endpoints = (0..u32::from(ENDPOINTS)).flat_map(|m| {
        let at = n * u32::from(ENDPOINTS) + m;
        let v4 = Ipv4Addr::from(0x0a80_0000 + at);
        [IpAddr::from(v4), Ipv6Addr::new(0xfd00, 0x10, 0x128, 0, 0, 0, (at >> 16) as u16, at as u16).into()]
    });
    (service(&format!("filler-{n}"), v4.into(), v6.into(), vec![port], false), endpoints.collect())
}

fn service(name: &str, v4: IpAddr, v6: IpAddr, ports: Vec<ServicePort>, external_local: bool) -> Service {
    let (IpAddr::V4(v4), IpAddr::V6(v6)) = (v4, v6) else { unreachable!("one address of each family") };
    Service {
        name: ObjectName::new("bench", name),
        created_secs: 0,
        kind: if external_local { ServiceType::NodePort } else { ServiceType::ClusterIp },
        cluster_ip_v4: Some(v4),
        cluster_ip_v6: Some(v6),
        ports,
        internal_local: false,
        external_local_asked: external_local,
        affinity_secs: None,
        external_ips: Vec::new(),
        load_balancer_ips: Vec::new(),
        source_ranges_asked: Vec::new(),
        health_check_node_port: 0,
    }
}

fn slice(service: &Service, family: IpFamily, endpoints: &[IpAddr]) -> EndpointSlice {
    let ports =
        service.ports.iter().map(|p| SlicePort { name: Arc::clone(&p.name), protocol: p.protocol, port: TARGET });
    let endpoints = endpoints.iter().filter(|addr| IpFamily::of(addr) == family).map(|addr| Endpoint {
        addr: *addr,
        ready: true,
        serving: true,
        terminating: false,
        local: service.external_local(),
        for_node: Hint::None,
        zones: 0,
    });
    EndpointSlice {
        name: ObjectName::new("bench", &format!("{}-{}", service.name.name(), family.number())),
        service: service.name.clone(),
        family,
        legacy: false,
        ports: ports.collect(),
        endpoints: endpoints.collect(),
        zone_hints: Vec::new(),
        trigger: Trigger::default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_thousand_services_are_ten_thousand_with_ten_endpoints_each() {
        let endpoints = vec!["10.0.0.1".parse().unwrap(), "fd00::1".parse().unwrap()];
        let index = index(&Plan { services: 10_000, endpoints, node: Vec::new() });
        assert!(index.is_synced());
        assert_eq!(index.counts(), (10_000, 20_000));
        let some = ObjectName::new("bench", "filler-4711");
        for family in IpFamily::ALL {
            assert_eq!(index.slices(&some, family)[0].endpoints.len(), usize::from(ENDPOINTS));
        }
    }
}
