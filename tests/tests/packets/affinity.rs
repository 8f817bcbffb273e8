//! `sessionAffinity: ClientIP`: who keeps which endpoint, and for how long (rules 78–84).

use std::collections::BTreeSet;
use std::net::SocketAddr;

use fairlead_tests::packet::world::{self, POD1, POD2, UPLINK};
use fairlead_tests::packet::{Node, Service, Wire};
use proxy_common::Outcome;

use crate::cases::{CLIENT_PORT, PORT, TARGET, Talk, at, web};

wires! {
    rule_78_a_client_keeps_its_endpoint_whatever_its_port,
    rule_78_other_clients_have_others,
    rule_78_every_address_of_the_port_shares_it,
    rule_78_other_ports_of_the_service_have_their_own,
    rule_79_it_ends_some_time_after_the_last_new_connection,
    rule_79_packets_of_a_connection_do_not_make_it_longer,
    rule_80_a_policy_that_does_not_offer_the_endpoint_gives_another,
    rule_81_an_endpoint_that_goes_takes_its_clients_along,
    rule_84_without_affinity_connections_are_balanced_one_by_one,
    an_endpoint_is_found_where_it_moved_to,
    a_clash_is_settled_by_another_port_not_another_endpoint,
}

const NODE_PORT: u16 = 30_080;
const SECS: u32 = 60;

fn many(wire: Wire) -> Service {
    let family = wire.family;
    web(wire).elsewhere(world::remote(family)).elsewhere(world::remote2(family)).here(world::pod2(family))
}

/// Where the first pod is sent from so many ports of its own.
fn chosen(node: &Node, wire: Wire, vip: SocketAddr) -> BTreeSet<SocketAddr> {
    let open = |port| at(POD1, wire.opening(wire.at(world::pod1, port), vip));
    (CLIENT_PORT..CLIENT_PORT + 32).map(|port| node.arrives(POD1, &open(port)).destination()).collect()
}

fn only(chosen: &BTreeSet<SocketAddr>) -> SocketAddr {
    assert_eq!(chosen.len(), 1, "one client has one endpoint, and not {chosen:?}");
    *chosen.first().expect("not empty")
}

pub(crate) fn rule_78_a_client_keeps_its_endpoint_whatever_its_port(wire: Wire) {
    let node = Node::serving(&[&many(wire).affine(SECS)]);
    only(&chosen(&node, wire, wire.at(world::vip, PORT)));
}

fn rule_78_other_clients_have_others(wire: Wire) {
    let node = Node::serving(&[&many(wire).affine(SECS)]);
    let vip = wire.at(world::vip, PORT);
    let all: BTreeSet<_> = [
        (world::pod1 as fn(_) -> _, POD1),
        (world::pod2, POD2),
        (world::client, UPLINK),
        (world::remote2, UPLINK),
        (world::port1, UPLINK),
        (world::port2, UPLINK),
        (world::silent, UPLINK),
    ]
    .into_iter()
    .map(|(client, device)| node.arrives(device, &at(device, wire.opening(wire.at(client, 41_000), vip))).destination())
    .collect();
    assert!(all.len() > 1, "seven clients have one endpoint: {all:?}");
}

fn rule_78_every_address_of_the_port_shares_it(wire: Wire) {
    let node = Node::serving(&[&many(wire).node_port(NODE_PORT).affine(SECS)]);
    let by_cluster_ip = only(&chosen(&node, wire, wire.at(world::vip, PORT)));
    let opening = at(POD1, wire.opening(wire.at(world::pod1, 42_000), wire.at(world::node, NODE_PORT)));
    node.arrives(POD1, &opening).becomes_due(Outcome::RequestNew, &opening.clone().to(by_cluster_ip));
}

fn rule_78_other_ports_of_the_service_have_their_own(wire: Wire) {
    let node =
        Node::serving(&[&(1..=16).fold(many(wire).affine(SECS), |s, n| s.port(wire.protocol, 9000 + n, TARGET + n))]);
    let all: BTreeSet<_> = (1..=16).map(|n| only(&chosen(&node, wire, wire.at(world::vip, 9000 + n))).ip()).collect();
    assert!(all.len() > 1, "sixteen ports lead to one endpoint: {all:?}");
}

fn rule_79_it_ends_some_time_after_the_last_new_connection(wire: Wire) {
    let mut node = Node::serving(&[&many(wire).affine(SECS)]);
    let vip = wire.at(world::vip, PORT);
    let first = only(&chosen(&node, wire, vip));
    node.maps.age_affinities(SECS - 2);
    let opening = at(POD1, wire.opening(wire.at(world::pod1, 42_000), vip));
    node.arrives(POD1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(first));
    // That one began the time anew.
    node.maps.age_affinities(SECS - 2);
    let opening = at(POD1, wire.opening(wire.at(world::pod1, 42_001), vip));
    node.arrives(POD1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(first));
    let mut later = BTreeSet::new();
    for round in 0..32 {
        node.maps.age_affinities(SECS + 1);
        let opening = at(POD1, wire.opening(wire.at(world::pod1, 43_000 + round), vip));
        later.insert(node.arrives(POD1, &opening).destination());
    }
    assert!(later.len() > 1, "after its time the client has always got {later:?}");
}

fn rule_79_packets_of_a_connection_do_not_make_it_longer(wire: Wire) {
    let mut node = Node::serving(&[&many(wire).affine(SECS)]);
    let mut talk = Talk::to(wire, wire.at(world::remote, TARGET));
    talk.endpoint = node.arrives(POD1, &talk.opening()).destination();
    let mut later = BTreeSet::new();
    for round in 0..32 {
        node.maps.age_affinities(SECS + 1);
        talk.goes(&node, Outcome::RequestHalfOpen, &talk.opening());
        later.insert(node.arrives(POD1, &talk.on_port(43_000 + round).opening()).destination());
    }
    assert!(later.len() > 1, "a connection kept its client's endpoint for ever: {later:?}");
}

fn rule_80_a_policy_that_does_not_offer_the_endpoint_gives_another(wire: Wire) {
    let family = wire.family;
    // Outside, only the endpoint here is offered; the ClusterIP offers both.
    let service = web(wire).node_port(NODE_PORT).external_local().affine(SECS);
    let node = Node::serving(&[&service.elsewhere(world::remote(family)).here(world::pod2(family))]);
    let (vip, node_port) = (wire.at(world::vip, PORT), wire.at(world::node, NODE_PORT));
    let mut elsewhere = 0;
    for last in 1..40u8 {
        let mut client = wire.at(world::client, 51_000);
        client.set_ip(match client.ip() {
            std::net::IpAddr::V4(ip) => std::net::Ipv4Addr::from_bits(ip.to_bits() ^ u32::from(last) << 3).into(),
            std::net::IpAddr::V6(ip) => std::net::Ipv6Addr::from_bits(ip.to_bits() ^ u128::from(last) << 3).into(),
        });
        let inside = node.arrives(UPLINK, &at(UPLINK, wire.opening(client, vip))).destination();
        elsewhere += u32::from(inside.ip() == world::remote(family));
        client.set_port(51_001);
        let outside = node.arrives(UPLINK, &at(UPLINK, wire.opening(client, node_port))).destination();
        assert_eq!(outside, wire.at(world::pod2, TARGET));
    }
    assert!(elsewhere > 0, "no client had the endpoint that the NodePort does not offer");
}

fn rule_81_an_endpoint_that_goes_takes_its_clients_along(wire: Wire) {
    let mut node = Node::serving(&[&many(wire).affine(SECS)]);
    let vip = wire.at(world::vip, PORT);
    let first = only(&chosen(&node, wire, vip));
    let family = wire.family;
    let all = [world::remote(family), world::remote2(family), world::pod2(family)];
    let without =
        all.iter().filter(|addr| **addr != first.ip()).fold(web(wire).affine(SECS), |s, addr| s.elsewhere(*addr));
    node.apply(&without);
    let second = only(&chosen_later(&node, wire, vip));
    assert_ne!(second, first);
    node.apply(&many(wire).affine(SECS));
    // It comes back, and the client stays where it is.
    node.come_to_rest();
    let opening = at(POD1, wire.opening(wire.at(world::pod1, 44_000), vip));
    node.arrives(POD1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(second));
}

fn rule_84_without_affinity_connections_are_balanced_one_by_one(wire: Wire) {
    let mut node = Node::serving(&[&many(wire).affine(SECS)]);
    let vip = wire.at(world::vip, PORT);
    let kept = only(&chosen(&node, wire, vip));
    node.apply(&many(wire));
    let ports = 45_000..45_032;
    let open = |port| at(POD1, wire.opening(wire.at(world::pod1, port), vip));
    let all: BTreeSet<_> = ports.map(|port| node.arrives(POD1, &open(port)).destination()).collect();
    assert_eq!(all.len(), 3, "without affinity every endpoint is used");
    node.apply(&many(wire).affine(SECS));
    let again: BTreeSet<_> = (46_000..46_032).map(|port| node.arrives(POD1, &open(port)).destination()).collect();
    assert_eq!(only(&again), kept, "the time has not run out meanwhile");
}

fn an_endpoint_is_found_where_it_moved_to(wire: Wire) {
    let family = wire.family;
    let service = web(wire).affine(SECS).here(world::pod2(family));
    let mut node = Node::serving(&[&service]);
    let vip = wire.at(world::vip, PORT);
    let first = only(&chosen(&node, wire, vip));
    // Endpoints stand in order of their addresses: this one comes before it, and both after it.
    node.apply(&service.clone().elsewhere(world::pod1(family)).elsewhere(world::remote(family)));
    for port in 47_000..47_016 {
        let opening = at(POD2, wire.opening(wire.at(world::pod1, port), vip));
        node.arrives(POD2, &opening).becomes(Outcome::RequestNew, &opening.clone().to(first));
    }
}

fn a_clash_is_settled_by_another_port_not_another_endpoint(wire: Wire) {
    let affine =
        |name, vip: fn(_) -> _| Service::new(name, &[vip(wire.family)]).port(wire.protocol, PORT, TARGET).affine(SECS);
    let family = wire.family;
    let both = [affine("web", world::vip), affine("other", world::other_vip)]
        .map(|s| s.elsewhere(world::remote(family)).elsewhere(world::remote2(family)));
    let node = Node::serving(&[&both[0], &both[1]]);
    // From some port on, both Services gave this client the same endpoint, or never did.
    for port in 0..64 {
        let client = wire.at(world::pod1, 48_000 + port);
        let first = node.arrives(POD1, &at(POD1, wire.opening(client, wire.at(world::vip, PORT))));
        let (first, kept) = (first.destination(), first.source());
        assert_eq!(kept, client);
        let second = node.arrives(POD1, &at(POD1, wire.opening(client, wire.at(world::other_vip, PORT))));
        if second.destination() == first {
            assert_ne!(second.source(), client, "the tuple was taken");
        } else {
            assert_eq!(second.source(), client, "the tuple was free");
        }
    }
    let [of_web, of_other] =
        [world::vip, world::other_vip].map(|vip| only(&chosen_later(&node, wire, wire.at(vip, PORT))));
    assert!([of_web, of_other].iter().all(|e| e.port() == TARGET));
}

/// The same as [`chosen`] from ports that no case has used.
fn chosen_later(node: &Node, wire: Wire, vip: SocketAddr) -> BTreeSet<SocketAddr> {
    let open = |port| at(POD1, wire.opening(wire.at(world::pod1, port), vip));
    (49_000..49_032).map(|port| node.arrives(POD1, &open(port)).destination()).collect()
}
