//! Layer 2: pods on a bridge, frames in transit, and clients that are their own endpoint.

use fairlead_tests::packet::world::{self, BRIDGE, POD1, PORT1, PORT2, STRANGER_MAC};
use fairlead_tests::packet::{Node, Packet, Wire};
use proxy_agent::model::Protocol;
use proxy_common::Outcome;

use crate::cases::{CLIENT_PORT, PORT, TARGET, Talk, at, by_now, out_of, web};

wires! {
    a_pod_on_the_bridge_reaches_its_neighbour_by_mac,
    a_neighbour_that_is_not_known_yet_is_reached_by_the_router,
    a_pod_on_the_bridge_reaches_an_endpoint_elsewhere_by_the_router,
    a_frame_in_transit_is_left_alone,
    a_frame_in_transit_does_not_follow_a_flow,
    a_fragment_in_transit_does_not_follow_a_flow,
    an_error_in_transit_does_not_follow_a_flow,
    a_frame_to_another_mac_on_a_routed_device_is_left_alone,
    a_direct_frame_between_neighbours_gets_another_port_where_it_must,
    rule_74_a_pod_reaches_itself_through_its_service,
    a_device_without_an_address_cannot_turn_a_packet_round,
}

/// From the first bridged pod, by the router's MAC.
fn by_router(packet: Packet) -> Packet {
    packet.on_wire(PORT1.peer, BRIDGE.mac)
}

fn client(wire: Wire) -> std::net::SocketAddr {
    wire.at(world::port1, CLIENT_PORT)
}

fn a_pod_on_the_bridge_reaches_its_neighbour_by_mac(wire: Wire) {
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

pub(crate) fn a_frame_in_transit_is_left_alone(wire: Wire) {
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
fn opened(wire: Wire) -> (Node, std::net::SocketAddr) {
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
    let talk = Talk::to(wire, wire.at(world::pod1, TARGET));
    let node = Node::serving(&[&web(wire).here(talk.endpoint.ip())]);
    // The pod would take a packet from itself for a forgery: it comes from the node, out of the pod's own device.
    let as_node = wire.at(world::node, CLIENT_PORT);
    let turned = |packet: &Packet| packet.clone().from(as_node).to(talk.endpoint).turned_round();
    let opening = talk.opening();
    node.arrives(POD1, &opening).is_redirected(Outcome::RequestNew, &turned(&opening));
    node.arrives(POD1, &opening).is_redirected(Outcome::RequestHalfOpen, &turned(&opening));
    let back = |packet: &Packet| packet.clone().from(talk.vip).to(talk.client).turned_round();
    let answer = at(POD1, wire.answer(talk.endpoint, as_node));
    node.arrives(POD1, &answer).is_redirected(Outcome::ReplyHalfOpen, &back(&answer));
    let further = talk.talk();
    node.arrives(POD1, &further).is_redirected(Outcome::RequestHalfOpen, &turned(&further));
    let reply = at(POD1, wire.talk(talk.endpoint, as_node));
    node.arrives(POD1, &reply).is_redirected(by_now(wire, Outcome::Reply), &back(&reply));
    // At egress nothing is left to do.
    node.leaves(POD1, &out_of(POD1, wire.talk(talk.endpoint, as_node))).is_left_alone();
}

fn a_device_without_an_address_cannot_turn_a_packet_round(wire: Wire) {
    let talk = Talk::to(wire, wire.at(world::pod1, TARGET));
    let mut node = Node::serving(&[&web(wire).here(talk.endpoint.ip())]);
    node.without_sources(POD1);
    node.arrives(POD1, &talk.opening()).is_dropped(Outcome::DropNoRoute);
}
