//! Layer 2: pods on a bridge, frames in transit, and clients that are their own endpoint.

use std::net::SocketAddr;

use fairlead_tests::packet::world::{self, BRIDGE, POD1, PORT1, PORT2, STRANGER_MAC};
use fairlead_tests::packet::{Node, Packet, Wire};
use proxy_agent::model::Protocol;
use proxy_common::Outcome;
use proxy_common::abi::tc_index;

use crate::cases::{CLIENT_PORT, PORT, TARGET, Talk, by_now, web};

wires! {
    pitfall_p1_6_a_pod_on_the_bridge_reaches_its_neighbour_by_mac,
    a_neighbour_that_is_not_known_yet_is_reached_by_the_router,
    a_pod_on_the_bridge_reaches_an_endpoint_elsewhere_by_the_router,
    pitfall_p1_10_a_frame_in_transit_is_left_alone,
    a_frame_in_transit_does_not_follow_a_flow,
    a_fragment_in_transit_does_not_follow_a_flow,
    an_error_in_transit_does_not_follow_a_flow,
    a_frame_to_another_mac_on_a_routed_device_is_left_alone,
    a_direct_frame_between_neighbours_gets_another_port_where_it_must,
    rule_74_a_pod_reaches_itself_through_its_service,
    a_pod_reaches_itself_by_the_router_where_others_stand_at_its_device,
}

/// From the first bridged pod, by the router's MAC.
fn by_router(packet: Packet) -> Packet {
    packet.on_wire(PORT1.peer, BRIDGE.mac)
}

fn client(wire: Wire) -> SocketAddr {
    wire.at(world::port1, CLIENT_PORT)
}

fn pitfall_p1_6_a_pod_on_the_bridge_reaches_its_neighbour_by_mac(wire: Wire) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::port2, TARGET));
    let node = Node::serving(&[&web(wire).here(endpoint.ip())]);
    let direct = |packet: &Packet| packet.clone().to(endpoint).on_wire(PORT1.peer, PORT2.peer);
    let opening = by_router(wire.opening(client(wire), vip));
    node.arrives(PORT1, &opening).becomes(Outcome::RequestNew, &direct(&opening));
    node.arrives(PORT1, &opening).becomes(Outcome::RequestHalfOpen, &direct(&opening));
    // The bridge hands the reply over, pod to pod.
    let answer = wire.answer(endpoint, client(wire)).on_wire(PORT2.peer, PORT1.peer);
    node.arrives(PORT2, &answer).is_left_alone();
    node.leaves(PORT1, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(vip));
    let further = by_router(wire.talk(client(wire), vip));
    node.arrives(PORT1, &further).becomes(Outcome::RequestHalfOpen, &direct(&further));
}

fn a_neighbour_that_is_not_known_yet_is_reached_by_the_router(wire: Wire) {
    const FOUND: [u8; 6] = [2, 0, 0, 0, 0, 0x99];
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::silent, TARGET));
    let node = Node::serving(&[&web(wire).here(endpoint.ip())]);
    let opening = by_router(wire.opening(client(wire), vip));
    node.arrives(PORT1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(endpoint));
    let answer = wire.answer(endpoint, client(wire)).on_wire(FOUND, PORT1.peer);
    node.leaves(PORT1, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(vip));
    let further = by_router(wire.talk(client(wire), vip));
    node.arrives(PORT1, &further).becomes(Outcome::RequestHalfOpen, &further.clone().to(endpoint));
    node.ip(&format!("neigh add {} lladdr 02:00:00:00:00:99 dev {} nud permanent", endpoint.ip(), BRIDGE.name));
    let direct = further.clone().to(endpoint).on_wire(PORT1.peer, FOUND);
    node.arrives(PORT1, &further).becomes(by_now(wire, Outcome::Request), &direct);
}

fn a_pod_on_the_bridge_reaches_an_endpoint_elsewhere_by_the_router(wire: Wire) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::remote, TARGET));
    let node = Node::serving(&[&web(wire).elsewhere(endpoint.ip())]);
    let opening = by_router(wire.opening(client(wire), vip));
    node.arrives(PORT1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(endpoint));
    let answer = wire.answer(endpoint, client(wire)).on_wire(BRIDGE.mac, PORT1.peer);
    node.leaves(PORT1, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(vip));
    let further = by_router(wire.talk(client(wire), vip));
    node.arrives(PORT1, &further).becomes(Outcome::RequestHalfOpen, &further.clone().to(endpoint));
}

pub(crate) fn pitfall_p1_10_a_frame_in_transit_is_left_alone(wire: Wire) {
    let vip = wire.at(world::vip, PORT);
    let node = Node::serving(&[&web(wire).here(world::port2(wire.family))]);
    let transit = wire.opening(client(wire), vip).on_wire(PORT1.peer, STRANGER_MAC);
    node.arrives(PORT1, &transit).passes(Outcome::LayerTwoTransit);
    // The same for what would be refused.
    let mut unknown = vip;
    unknown.set_port(PORT + 1);
    node.arrives(PORT1, &transit.clone().to(unknown)).passes(Outcome::LayerTwoTransit);
    // And for a later fragment whose first one went another way.
    node.arrives(PORT1, &transit.as_fragment(3, false)).passes(Outcome::LayerTwoTransit);
}

fn a_frame_in_transit_does_not_follow_a_flow(wire: Wire) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::remote, TARGET));
    let node = Node::serving(&[&web(wire).elsewhere(endpoint.ip())]);
    let opening = by_router(wire.opening(client(wire), vip));
    node.arrives(PORT1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(endpoint));
    let answer = wire.answer(endpoint, client(wire)).on_wire(BRIDGE.mac, PORT1.peer);
    node.leaves(PORT1, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(vip));
    let transit = wire.talk(client(wire), vip).on_wire(PORT1.peer, STRANGER_MAC);
    node.arrives(PORT1, &transit).passes(Outcome::LayerTwoTransit);
}

/// The first bridged pod has a confirmed flow with an endpoint elsewhere.
fn opened(wire: Wire) -> (Node, SocketAddr) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::remote, TARGET));
    let node = Node::serving(&[&web(wire).elsewhere(endpoint.ip())]);
    let opening = by_router(wire.opening(client(wire), vip));
    node.arrives(PORT1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(endpoint));
    let answer = wire.answer(endpoint, client(wire)).on_wire(BRIDGE.mac, PORT1.peer);
    node.leaves(PORT1, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(vip));
    let is_udp = wire.protocol == Protocol::Udp;
    if is_udp {
        node.maps.let_last(CLIENT_PORT);
    }
    let further = by_router(wire.talk(client(wire), vip));
    node.arrives(PORT1, &further).becomes(Outcome::RequestHalfOpen, &further.clone().to(endpoint));
    if is_udp {
        let reply = wire.talk(endpoint, client(wire)).on_wire(BRIDGE.mac, PORT1.peer);
        node.leaves(PORT1, &reply).becomes(Outcome::ReplyHalfOpen, &reply.clone().from(vip));
    }
    node.arrives(PORT1, &further).becomes(Outcome::Request, &further.clone().to(endpoint));
    (node, vip)
}

fn a_fragment_in_transit_does_not_follow_a_flow(wire: Wire) {
    const MIDDLE: &[u8] = b"the middle of something, 24";
    let (node, vip) = opened(wire);
    let first = by_router(wire.talk(client(wire), vip)).as_fragment(0, true);
    let later = by_router(wire.talk(client(wire), vip)).as_fragment(3, false).carrying(MIDDLE);
    let transit = |packet: &Packet| packet.clone().on_wire(PORT1.peer, STRANGER_MAC);
    node.arrives(PORT1, &transit(&first)).passes(Outcome::LayerTwoTransit);
    let endpoint = wire.at(world::remote, TARGET);
    node.arrives(PORT1, &first).becomes(Outcome::Request, &first.clone().to(endpoint));
    node.arrives(PORT1, &transit(&later)).passes(Outcome::LayerTwoTransit);
    node.arrives(PORT1, &later).becomes(Outcome::Fragment, &later.clone().to(endpoint));
}

fn an_error_in_transit_does_not_follow_a_flow(wire: Wire) {
    let (node, vip) = opened(wire);
    // The client refuses what the Service sent.
    let about = wire.talk(vip, client(wire)).with_ttl(61);
    let (kind, code) = if about.is_v4() { (3, 3) } else { (1, 4) };
    let error = Packet::icmp(client(wire).ip(), vip.ip(), kind, code, [0; 4]).carrying(&about.bytes()[14..]);
    node.arrives(PORT1, &error.on_wire(PORT1.peer, STRANGER_MAC)).passes(Outcome::LayerTwoTransit);
}

fn a_frame_to_another_mac_on_a_routed_device_is_left_alone(wire: Wire) {
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let node = Node::serving(&[&web(wire).elsewhere(talk.endpoint.ip())]);
    let stray = talk.opening().on_wire(POD1.peer, STRANGER_MAC);
    node.arrives(POD1, &stray).passes(Outcome::LayerTwoTransit);
}

fn a_direct_frame_between_neighbours_gets_another_port_where_it_must(wire: Wire) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::port2, TARGET));
    let node = Node::serving(&[&web(wire).here(endpoint.ip())]);
    let opening = by_router(wire.opening(client(wire), vip));
    let direct = wire.opening(client(wire), endpoint).on_wire(PORT1.peer, PORT2.peer);
    node.arrives(PORT1, &opening).becomes(Outcome::RequestNew, &direct);
    let ran = node.arrives(PORT1, &direct);
    let port = ran.source().port();
    assert_ne!(port, CLIENT_PORT);
    ran.becomes(Outcome::DirectRewritten, &direct.clone().from_port(port));
    node.arrives(PORT1, &direct).becomes(Outcome::DirectRewritten, &direct.clone().from_port(port));
    let mut elsewhere = client(wire);
    elsewhere.set_port(port);
    let answer = wire.answer(endpoint, elsewhere).on_wire(PORT2.peer, PORT1.peer);
    node.leaves(PORT1, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().to(client(wire)));
    let further = wire.talk(client(wire), endpoint).on_wire(PORT1.peer, PORT2.peer);
    node.arrives(PORT1, &further).becomes(Outcome::DirectRewritten, &further.clone().from_port(port));
}

fn rule_74_a_pod_reaches_itself_through_its_service(wire: Wire) {
    reaches_itself(wire, &Node::serving(&[&web(wire).here(world::port1(wire.family))]), Packet::turned_round);
}

/// No bridge sends a frame back by the port that it came in by: the router does.
fn a_pod_reaches_itself_by_the_router_where_others_stand_at_its_device(wire: Wire) {
    let mut node = Node::serving(&[&web(wire).here(world::port1(wire.family))]);
    node.foreign(PORT1);
    reaches_itself(wire, &node, |packet| packet);
}

/// `sent_on`: where its bridge port's program sends what arrives.
fn reaches_itself(wire: Wire, node: &Node, sent_on: fn(Packet) -> Packet) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::port1, TARGET));
    let arrives = |outcome, told, packet: Packet, to: SocketAddr| {
        let packet = by_router(packet);
        let expected = sent_on(packet.clone().to(to));
        let ran = node.arrives(PORT1, &packet);
        match (ran.goes_on(), told) {
            (false, _) => ran.goes_back(outcome, told, &expected),
            (true, tc_index::REQUEST_SNAT) => ran.becomes_due(outcome, &expected),
            (true, _) => ran.becomes(outcome, &expected),
        }
        packet.to(to).on_wire(BRIDGE.mac, PORT1.peer)
    };
    let goes = |outcome, packet: Packet| {
        let leaving = arrives(outcome, tc_index::REQUEST_SNAT, packet, endpoint);
        let ran = node.leaves_marked(PORT1, tc_index::REQUEST_SNAT, &leaving);
        // The pod would take a packet from itself for a forgery: it comes from the node.
        let seen = ran.source();
        assert_eq!(seen.ip(), world::bridge(wire.family));
        ran.becomes(Outcome::Masqueraded, &leaving.from(seen));
        seen
    };
    let comes = |outcome, packet: Packet| {
        let leaving = arrives(Outcome::Unmasqueraded, tc_index::NOT_OURS, packet, client(wire));
        node.leaves(PORT1, &leaving).becomes(outcome, &leaving.clone().from(vip));
    };
    let seen = goes(Outcome::RequestNew, wire.opening(client(wire), vip));
    assert_eq!(goes(Outcome::RequestHalfOpen, wire.opening(client(wire), vip)), seen);
    comes(Outcome::ReplyHalfOpen, wire.answer(endpoint, seen));
    assert_eq!(goes(Outcome::RequestHalfOpen, wire.talk(client(wire), vip)), seen);
    comes(by_now(wire, Outcome::Reply), wire.talk(endpoint, seen));
}
