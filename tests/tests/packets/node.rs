//! The node's own processes, whose requests meet us at egress and whose replies are brought back to them.

use fairlead_tests::packet::world::{self, BRIDGE, LOOPBACK, POD2, PORT1, UPLINK};
use fairlead_tests::packet::{Node, Packet, Table, Wire};
use proxy_common::Outcome;

use crate::cases::{PORT, TARGET, Talk, at, by_now, other, out_of, web};

wires! {
    pitfall_p1_3_a_process_of_the_node_reaches_an_endpoint_elsewhere,
    a_process_of_the_node_reaches_an_endpoint_by_both_its_addresses,
    a_process_of_the_node_reaches_a_pod_of_the_node,
    a_process_of_the_node_takes_the_address_of_the_way_to_the_endpoint,
    rule_74_a_process_of_the_node_reaches_an_endpoint_that_is_the_node,
    rule_92_a_process_of_the_node_reaches_a_node_port_of_its_own_node,
    rule_92_a_process_of_the_node_reaches_itself_by_a_node_port,
    rule_89_a_node_port_is_none_on_loopbacks_own_address,
    what_a_process_of_the_node_says_to_itself_is_left_alone,
    rule_70_a_process_of_the_node_uses_any_endpoint_under_a_local_policy,
    an_endpoint_that_no_route_leads_to_is_dropped,
    an_endpoint_that_a_route_forbids_is_dropped,
    a_forwarded_packet_to_a_service_is_not_taken_for_the_nodes_own,
    the_nodes_own_packets_to_anybody_else_are_left_alone,
}

const PROCESS: u16 = 50_000;

fn sent(wire: Wire, vip: std::net::SocketAddr) -> Packet {
    wire.opening(wire.at(world::node, PROCESS), vip).on_wire(UPLINK.mac, UPLINK.peer)
}

fn pitfall_p1_3_a_process_of_the_node_reaches_an_endpoint_elsewhere(wire: Wire) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::remote, TARGET));
    let process = wire.at(world::node, PROCESS);
    let node = Node::serving(&[&web(wire).elsewhere(endpoint.ip())]);
    let opening = sent(wire, vip);
    node.sends(UPLINK, &opening).is_redirected(Outcome::RequestNew, &opening.clone().to(endpoint));
    node.sends(UPLINK, &opening).is_redirected(Outcome::RequestHalfOpen, &opening.clone().to(endpoint));
    // The reply arrives once more, from the Service, at the device that the request would have left by.
    let answer = at(UPLINK, wire.answer(endpoint, process));
    node.arrives(UPLINK, &answer).is_redirected(Outcome::ReplyHalfOpen, &answer.clone().from(vip));
    let further = wire.talk(process, vip).on_wire(UPLINK.mac, UPLINK.peer);
    node.sends(UPLINK, &further).is_redirected(Outcome::RequestHalfOpen, &further.clone().to(endpoint));
    let reply = at(UPLINK, wire.talk(endpoint, process));
    node.arrives(UPLINK, &reply).is_redirected(by_now(wire, Outcome::Reply), &reply.clone().from(vip));
}

fn a_process_of_the_node_reaches_an_endpoint_by_both_its_addresses(wire: Wire) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::remote, TARGET));
    let process = wire.at(world::node, PROCESS);
    let node = Node::serving(&[&web(wire).elsewhere(endpoint.ip())]);
    let direct = wire.opening(process, endpoint).on_wire(UPLINK.mac, UPLINK.peer);
    node.sends(UPLINK, &direct).is_left_alone();
    let opening = sent(wire, vip);
    node.sends(UPLINK, &opening).is_redirected(Outcome::RequestNew, &opening.clone().to(endpoint));
    // From now on the answer to the direct packet would be the Service's.
    let ran = node.sends(UPLINK, &direct);
    let port = ran.source().port();
    assert_ne!(port, PROCESS);
    ran.becomes(Outcome::DirectRewritten, &direct.clone().from_port(port));
    let mut elsewhere = process;
    elsewhere.set_port(port);
    let answer = at(UPLINK, wire.answer(endpoint, elsewhere));
    node.arrives(UPLINK, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().to(process));
    let further = wire.talk(process, endpoint).on_wire(UPLINK.mac, UPLINK.peer);
    node.sends(UPLINK, &further).becomes(Outcome::DirectRewritten, &further.clone().from_port(port));
    let reply = at(UPLINK, wire.talk(endpoint, elsewhere));
    node.arrives(UPLINK, &reply).becomes(by_now(wire, Outcome::Reply), &reply.clone().to(process));
    let answer = at(UPLINK, wire.answer(endpoint, process));
    node.arrives(UPLINK, &answer).is_redirected(Outcome::ReplyHalfOpen, &answer.clone().from(vip));
}

fn a_process_of_the_node_reaches_a_pod_of_the_node(wire: Wire) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::pod2, TARGET));
    let process = wire.at(world::node, PROCESS);
    let node = Node::serving(&[&web(wire).here(endpoint.ip())]);
    let opening = sent(wire, vip);
    node.sends(UPLINK, &opening).is_redirected(Outcome::RequestNew, &opening.clone().to(endpoint));
    // It comes in by the pod's device, and must carry the uplink's MAC to be taken in there.
    let answer = at(POD2, wire.answer(endpoint, process));
    let expected = answer.clone().from(vip).on_wire(POD2.peer, UPLINK.mac);
    node.arrives(POD2, &answer).is_redirected(Outcome::ReplyHalfOpen, &expected);
}

fn a_process_of_the_node_takes_the_address_of_the_way_to_the_endpoint(wire: Wire) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::port1, TARGET));
    let (process, on_bridge) = (wire.at(world::node, PROCESS), wire.at(world::bridge, PROCESS));
    let node = Node::serving(&[&web(wire).here(endpoint.ip())]);
    let opening = sent(wire, vip);
    let expected = opening.clone().from(on_bridge).to(endpoint);
    node.sends(UPLINK, &opening).is_redirected(Outcome::RequestNew, &expected);
    let answer = wire.answer(endpoint, on_bridge).on_wire(PORT1.peer, BRIDGE.mac);
    let expected = answer.clone().from(vip).to(process).on_wire(PORT1.peer, UPLINK.mac);
    node.arrives(PORT1, &answer).is_redirected(Outcome::ReplyHalfOpen, &expected);
    let further = wire.talk(process, vip).on_wire(UPLINK.mac, UPLINK.peer);
    node.sends(UPLINK, &further).is_redirected(Outcome::RequestHalfOpen, &further.clone().from(on_bridge).to(endpoint));
}

fn rule_74_a_process_of_the_node_reaches_an_endpoint_that_is_the_node(wire: Wire) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::node, TARGET));
    let process = wire.at(world::node, PROCESS);
    let node = Node::serving(&[&web(wire).here(endpoint.ip())]);
    let opening = sent(wire, vip);
    // It arrives from the Service, so that the reply leaves by a device and meets us.
    let as_service = wire.at(world::vip, PROCESS);
    let expected = opening.clone().from(as_service).to(endpoint).on_wire(UPLINK.mac, UPLINK.mac);
    node.sends(UPLINK, &opening).is_redirected(Outcome::RequestNew, &expected);
    let answer = wire.answer(endpoint, as_service).on_wire(UPLINK.mac, UPLINK.peer);
    let expected = answer.clone().from(vip).to(process).on_wire(UPLINK.mac, UPLINK.mac);
    node.sends(UPLINK, &answer).is_redirected(Outcome::ReplyHalfOpen, &expected);
    let further = wire.talk(process, vip).on_wire(UPLINK.mac, UPLINK.peer);
    let expected = further.clone().from(as_service).to(endpoint).on_wire(UPLINK.mac, UPLINK.mac);
    node.sends(UPLINK, &further).is_redirected(Outcome::RequestHalfOpen, &expected);
}

const NODE_PORT: u16 = 30_080;

/// As the packets on `lo` are.
fn on_loopback(packet: Packet) -> Packet {
    at(LOOPBACK, packet)
}

fn rule_92_a_process_of_the_node_reaches_a_node_port_of_its_own_node(wire: Wire) {
    let (to, endpoint) = (wire.at(world::node, NODE_PORT), wire.at(world::remote, TARGET));
    let process = wire.at(world::node, PROCESS);
    // Whatever the policy: the node itself may use any endpoint (rule 69).
    for service in [web(wire).node_port(NODE_PORT), web(wire).external_local().node_port(NODE_PORT)] {
        let node = Node::serving(&[&service.elsewhere(endpoint.ip())]);
        let opening = on_loopback(wire.opening(process, to));
        node.sends(LOOPBACK, &opening).is_redirected(Outcome::RequestNew, &opening.clone().to(endpoint));
        let answer = at(UPLINK, wire.answer(endpoint, process));
        let expected = answer.clone().from(to).on_wire(UPLINK.peer, LOOPBACK.mac);
        node.arrives(UPLINK, &answer).is_redirected(Outcome::ReplyHalfOpen, &expected);
        // There it is a packet like any other.
        node.arrives(LOOPBACK, &on_loopback(wire.answer(to, process))).is_left_alone();
        let further = on_loopback(wire.talk(process, to));
        node.sends(LOOPBACK, &further).is_redirected(Outcome::RequestHalfOpen, &further.clone().to(endpoint));
    }
}

fn rule_92_a_process_of_the_node_reaches_itself_by_a_node_port(wire: Wire) {
    let (to, endpoint) = (wire.at(world::node, NODE_PORT), wire.at(world::node, TARGET));
    let process = wire.at(world::node, PROCESS);
    let node = Node::serving(&[&web(wire).node_port(NODE_PORT).here(endpoint.ip())]);
    let opening = on_loopback(wire.opening(process, to));
    let ran = node.sends(LOOPBACK, &opening);
    // The endpoint sees the node either way; its connections without a Service have ports of their own.
    let seen = ran.source();
    assert_ne!(seen.port(), PROCESS);
    ran.is_redirected(Outcome::RequestNew, &opening.clone().from(seen).to(endpoint));
    let direct = on_loopback(wire.opening(process, endpoint));
    node.sends(LOOPBACK, &direct).is_left_alone();
    let arriving = on_loopback(wire.opening(seen, endpoint));
    node.arrives(LOOPBACK, &arriving).is_left_alone();
    let answer = on_loopback(wire.answer(endpoint, seen));
    let expected = answer.clone().from(to).to(process);
    node.sends(LOOPBACK, &answer).is_redirected(Outcome::ReplyHalfOpen, &expected);
    node.sends(LOOPBACK, &on_loopback(wire.answer(endpoint, process))).is_left_alone();
    let further = on_loopback(wire.talk(process, to));
    node.sends(LOOPBACK, &further).is_redirected(Outcome::RequestHalfOpen, &further.clone().from(seen).to(endpoint));
}

fn rule_89_a_node_port_is_none_on_loopbacks_own_address(wire: Wire) {
    let node = Node::serving(&[&web(wire).node_port(NODE_PORT).elsewhere(world::remote(wire.family))]);
    let own = if wire.at(world::node, 1).is_ipv4() { "127.0.0.1" } else { "::1" };
    let own = own.parse().expect("an address");
    let packet = wire.opening(std::net::SocketAddr::new(own, PROCESS), std::net::SocketAddr::new(own, NODE_PORT));
    node.sends(LOOPBACK, &on_loopback(packet)).is_left_alone();
}

fn what_a_process_of_the_node_says_to_itself_is_left_alone(wire: Wire) {
    let node = Node::serving(&[&web(wire).node_port(NODE_PORT).elsewhere(world::remote(wire.family))]);
    let (process, other) = (wire.at(world::node, PROCESS), wire.at(world::node, 22));
    for packet in [wire.opening(process, other), wire.talk(process, other), wire.talk(other, process)] {
        node.sends(LOOPBACK, &on_loopback(packet.clone())).is_left_alone();
        node.arrives(LOOPBACK, &on_loopback(packet)).is_left_alone();
    }
}

pub(crate) fn an_endpoint_that_no_route_leads_to_is_dropped(wire: Wire) {
    let node = Node::serving(&[&web(wire).elsewhere(world::nowhere(wire.family))]);
    node.sends(UPLINK, &sent(wire, wire.at(world::vip, PORT))).is_dropped(Outcome::DropNoRoute);
    assert_eq!(node.maps.count(Table::HalfOpen), 0, "nothing is kept:\n{}", node.maps.describe());
}

fn an_endpoint_that_a_route_forbids_is_dropped(wire: Wire) {
    let nowhere = world::nowhere(wire.family);
    for kind in ["unreachable", "prohibit", "blackhole"] {
        let node = Node::serving(&[&web(wire).elsewhere(nowhere)]);
        node.ip(&format!("route add {kind} {nowhere}"));
        node.sends(UPLINK, &sent(wire, wire.at(world::vip, PORT))).is_dropped(Outcome::DropNoRoute);
    }
}

fn a_forwarded_packet_to_a_service_is_not_taken_for_the_nodes_own(wire: Wire) {
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let node = Node::serving(&[&web(wire).elsewhere(talk.endpoint.ip())]);
    node.leaves(UPLINK, &out_of(UPLINK, wire.opening(talk.client, talk.vip))).is_left_alone();
}

fn the_nodes_own_packets_to_anybody_else_are_left_alone(wire: Wire) {
    let endpoint = wire.at(world::remote, TARGET);
    let node = Node::serving(&[&web(wire).elsewhere(endpoint.ip()), &other(wire)]);
    for to in [endpoint, wire.at(world::client, 443)] {
        node.sends(UPLINK, &sent(wire, to)).is_left_alone();
    }
}

fn rule_70_a_process_of_the_node_uses_any_endpoint_under_a_local_policy(wire: Wire) {
    let endpoint = wire.at(world::remote, TARGET);
    let external = world::nowhere(wire.family);
    let balanced = web(wire).balancer_ip(external).external_local().elsewhere(endpoint.ip());
    let node = Node::serving(&[&balanced]);
    let opening = sent(wire, std::net::SocketAddr::new(external, PORT));
    node.sends(UPLINK, &opening).is_redirected(Outcome::RequestNew, &opening.clone().to(endpoint));
}
