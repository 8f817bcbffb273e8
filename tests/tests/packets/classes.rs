//! The other addresses of a Service: external IPs, load balancers' IPs and their source ranges, and addresses of a
//! ServiceCIDR that no Service has.

use std::net::SocketAddr;

use fairlead_tests::packet::world::{self, POD1, UPLINK};
use fairlead_tests::packet::{Node, Packet, Service, Wire};
use proxy_agent::model::IpFamily;
use proxy_common::{Addr4, Addr6, Outcome, V4, V6};

use crate::cases::{PORT, TARGET, at, other, out_of, web};

wires! {
    rule_18_an_external_ip_leads_to_an_endpoint,
    rule_19_a_load_balancers_ip_leads_to_an_endpoint,
    rule_68_both_are_masqueraded_under_the_cluster_policy,
    rule_69_both_keep_a_pod_under_the_local_policy,
    rule_90_an_exact_address_beats_a_node_port,
    an_unknown_port_of_an_external_ip_is_left_alone,
    rule_21_a_client_in_a_source_range_is_served,
    rule_21_a_client_in_no_source_range_is_dropped,
    rule_21_dropping_beats_refusing,
    rule_21_ranges_do_not_concern_other_addresses,
    rule_21_a_flow_that_began_lives,
    rule_21_a_pod_is_held_to_the_ranges_as_well,
    rule_21_ranges_of_one_service_are_not_anothers,
}

families! {
    an_address_of_a_service_cidr_that_nobody_has_is_dropped,
    without_service_cidrs_such_an_address_is_left_alone,
}

fn external(wire: Wire, port: u16) -> SocketAddr {
    let addr = if wire.family == IpFamily::V4 { "203.0.113.250" } else { "2001:db8::cb00:71fa" };
    SocketAddr::new(addr.parse().expect("an address"), port)
}

fn with_balancer(wire: Wire) -> Service {
    web(wire).balancer_ip(external(wire, 0).ip()).elsewhere(world::remote(wire.family))
}

fn opening(wire: Wire, to: SocketAddr) -> Packet {
    at(UPLINK, wire.opening(wire.at(world::client, 51_234), to))
}

fn leads_to_an_endpoint(wire: Wire, service: &Service) {
    let node = Node::serving(&[service]);
    let opening = opening(wire, external(wire, PORT));
    let endpoint = wire.at(world::remote, TARGET);
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &opening.clone().to(endpoint));
    let answer = out_of(UPLINK, wire.answer(endpoint, wire.at(world::client, 51_234)));
    node.leaves(UPLINK, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(external(wire, PORT)));
}

fn rule_18_an_external_ip_leads_to_an_endpoint(wire: Wire) {
    leads_to_an_endpoint(wire, &web(wire).external_ip(external(wire, 0).ip()).elsewhere(world::remote(wire.family)));
}

fn rule_19_a_load_balancers_ip_leads_to_an_endpoint(wire: Wire) {
    leads_to_an_endpoint(wire, &with_balancer(wire));
}

fn rule_68_both_are_masqueraded_under_the_cluster_policy(wire: Wire) {
    let node = Node::serving(&[&with_balancer(wire)]);
    let opening = at(POD1, wire.opening(wire.at(world::pod1, 51_234), external(wire, PORT)));
    let expected = opening.clone().to(wire.at(world::remote, TARGET));
    node.arrives(POD1, &opening).becomes_due(Outcome::RequestNew, &expected);
}

fn rule_69_both_keep_a_pod_under_the_local_policy(wire: Wire) {
    let node = Node::serving(&[&with_balancer(wire).external_local()]);
    let opening = at(POD1, wire.opening(wire.at(world::pod1, 51_234), external(wire, PORT)));
    let expected = opening.clone().to(wire.at(world::remote, TARGET));
    node.arrives(POD1, &opening).becomes(Outcome::RequestNew, &expected);
    let outside = self::opening(wire, external(wire, PORT));
    node.arrives(UPLINK, &outside).is_dropped(Outcome::DropNoLocalEndpoint);
}

fn rule_90_an_exact_address_beats_a_node_port(wire: Wire) {
    // The load balancer's address is the node's own, and its port another Service's NodePort.
    let balanced = Service::new("web", &[world::vip(wire.family)])
        .port(wire.protocol, 30_080, TARGET)
        .balancer_ip(world::node(wire.family))
        .elsewhere(world::remote(wire.family));
    let on_node_port = other(wire).node_port(30_080).elsewhere(world::remote2(wire.family));
    let node = Node::serving(&[&on_node_port, &balanced]);
    let opening = opening(wire, wire.at(world::node, 30_080));
    let expected = opening.clone().to(wire.at(world::remote, TARGET));
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &expected);
}

fn an_unknown_port_of_an_external_ip_is_left_alone(wire: Wire) {
    let node = Node::serving(&[&with_balancer(wire)]);
    node.arrives(UPLINK, &opening(wire, external(wire, PORT + 1))).is_left_alone();
}

fn ranges(service: Service, wire: Wire) -> Service {
    let (near, client) = match wire.family {
        IpFamily::V4 => ("192.0.2.128/25", "198.51.100.0/29"),
        IpFamily::V6 => ("2001:db8:1::/48", "2001:db8:51::/125"),
    };
    service.source_range(near).source_range(client)
}

fn rule_21_a_client_in_a_source_range_is_served(wire: Wire) {
    let node = Node::serving(&[&ranges(with_balancer(wire), wire)]);
    let opening = opening(wire, external(wire, PORT));
    let expected = opening.clone().to(wire.at(world::remote, TARGET));
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &expected);
}

fn stranger(wire: Wire, to: SocketAddr) -> Packet {
    at(UPLINK, wire.opening(wire.at(world::nowhere, 51_234), to))
}

pub(crate) fn rule_21_a_client_in_no_source_range_is_dropped(wire: Wire) {
    let node = Node::serving(&[&ranges(with_balancer(wire), wire)]);
    node.arrives(UPLINK, &stranger(wire, external(wire, PORT))).is_dropped(Outcome::DropSourceRange);
}

fn rule_21_dropping_beats_refusing(wire: Wire) {
    let node = Node::serving(&[&ranges(with_balancer(wire).deserted(), wire)]);
    node.arrives(UPLINK, &stranger(wire, external(wire, PORT))).is_dropped(Outcome::DropSourceRange);
}

fn rule_21_ranges_do_not_concern_other_addresses(wire: Wire) {
    let node = Node::serving(&[&ranges(with_balancer(wire).node_port(30_080), wire)]);
    for (client_port, to) in [(51_234, wire.at(world::vip, PORT)), (51_235, wire.at(world::node, 30_080))] {
        let opening = stranger(wire, to).from_port(client_port);
        let expected = opening.clone().to(wire.at(world::remote, TARGET));
        node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &expected);
    }
}

fn rule_21_a_flow_that_began_lives(wire: Wire) {
    let mut node = Node::serving(&[&with_balancer(wire).external_local().here(world::pod1(wire.family))]);
    let (client, vip) = (wire.at(world::nowhere, 51_234), external(wire, PORT));
    let endpoint = wire.at(world::pod1, TARGET);
    let opening = stranger(wire, vip);
    node.arrives(UPLINK, &opening).becomes(Outcome::RequestNew, &opening.clone().to(endpoint));
    let answer = out_of(UPLINK, wire.answer(endpoint, client));
    node.leaves(UPLINK, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(vip));
    node.maps.let_last(51_234);
    let talk = at(UPLINK, wire.talk(client, vip));
    node.arrives(UPLINK, &talk).becomes(Outcome::RequestHalfOpen, &talk.clone().to(endpoint));
    let reply = out_of(UPLINK, wire.talk(endpoint, client));
    let ran = node.leaves(UPLINK, &reply);
    assert!(matches!(ran.counted()[..], [Outcome::Reply | Outcome::ReplyHalfOpen]));
    node.apply(&ranges(with_balancer(wire).external_local().here(world::pod1(wire.family)), wire));
    node.arrives(UPLINK, &talk).becomes(Outcome::Request, &talk.clone().to(endpoint));
    let mut another = stranger(wire, vip);
    another.src.set_port(51_235);
    node.arrives(UPLINK, &another).is_dropped(Outcome::DropSourceRange);
}

fn rule_21_a_pod_is_held_to_the_ranges_as_well(wire: Wire) {
    let node = Node::serving(&[&ranges(with_balancer(wire), wire)]);
    let opening = at(POD1, wire.opening(wire.at(world::pod1, 51_234), external(wire, PORT)));
    node.arrives(POD1, &opening).is_dropped(Outcome::DropSourceRange);
}

fn rule_21_ranges_of_one_service_are_not_anothers(wire: Wire) {
    let addr = if wire.family == IpFamily::V4 { "203.0.113.251" } else { "2001:db8::cb00:71fb" };
    let open = other(wire).balancer_ip(addr.parse().expect("an address")).elsewhere(world::remote2(wire.family));
    let node = Node::serving(&[&ranges(with_balancer(wire), wire), &open]);
    let opening = stranger(wire, SocketAddr::new(addr.parse().expect("an address"), PORT));
    let expected = opening.clone().to(wire.at(world::remote2, TARGET));
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &expected);
}

fn with_cidrs(node: &mut Node) {
    let prefix = Addr6 { octets: [0xfd, 0, 0, 0x10, 0, 0x96, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0] };
    let mask = Addr6 { octets: [255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 255, 0, 0] };
    node.maps.put_service_cidr::<V4>(Addr4 { octets: [10, 96, 0, 0] }, 16, Addr4 { octets: [255, 255, 0, 0] });
    node.maps.put_service_cidr::<V6>(prefix, 112, mask);
}

fn unallocated(family: IpFamily, port: u16) -> SocketAddr {
    let addr = if family == IpFamily::V4 { "10.96.200.200" } else { "fd00:10:96::c8c8" };
    SocketAddr::new(addr.parse().expect("an address"), port)
}

pub(crate) fn an_address_of_a_service_cidr_that_nobody_has_is_dropped(family: IpFamily) {
    let wire = if family == IpFamily::V4 { Wire::TCP_V4 } else { Wire::TCP_V6 };
    let mut node = Node::serving(&[&web(wire).elsewhere(world::remote(family))]);
    with_cidrs(&mut node);
    let to = unallocated(family, 80);
    let pod = wire.at(world::pod1, 51_234);
    // Another proxy may know it and translate it: it is dropped where it leaves as it came.
    node.arrives(POD1, &at(POD1, wire.opening(pod, to))).is_left_alone();
    node.leaves(UPLINK, &out_of(UPLINK, wire.opening(pod, to))).is_dropped(Outcome::DropUnallocated);
    node.leaves(UPLINK, &out_of(UPLINK, Packet::udp(pod, to, b"?"))).is_dropped(Outcome::DropUnallocated);
    node.leaves(UPLINK, &out_of(UPLINK, Packet::echo(pod.ip(), to.ip()))).is_dropped(Outcome::DropUnallocated);
    let process = wire.opening(wire.at(world::node, 50_000), to).on_wire(UPLINK.mac, UPLINK.peer);
    node.sends(UPLINK, &process).is_dropped(Outcome::DropUnallocated);
    // An endpoint is a client like any other.
    let endpoint = wire.at(world::remote, TARGET);
    node.leaves(UPLINK, &out_of(UPLINK, wire.opening(endpoint, to))).is_dropped(Outcome::DropUnallocated);
    // What has an address of its own, or lies beside the range, is nobody's business.
    node.leaves(UPLINK, &out_of(UPLINK, wire.opening(pod, wire.at(world::vip, PORT)))).is_left_alone();
    node.leaves(UPLINK, &out_of(UPLINK, wire.opening(pod, wire.at(world::nowhere, 80)))).is_left_alone();
    // A Service's own address is served as ever, and what lies beside the range is nobody's business.
    let opening = at(POD1, wire.opening(pod, wire.at(world::vip, PORT)));
    node.arrives(POD1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(wire.at(world::remote, TARGET)));
    node.arrives(POD1, &at(POD1, wire.opening(pod, wire.at(world::nowhere, 80)))).is_left_alone();
}

fn without_service_cidrs_such_an_address_is_left_alone(family: IpFamily) {
    let wire = if family == IpFamily::V4 { Wire::TCP_V4 } else { Wire::TCP_V6 };
    let node = Node::serving(&[&web(wire).elsewhere(world::remote(family))]);
    let opening = at(POD1, wire.opening(wire.at(world::pod1, 51_234), unallocated(family, 80)));
    node.arrives(POD1, &opening).is_left_alone();
}
