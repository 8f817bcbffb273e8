//! Which endpoints a Service offers to whom: ClusterIPs and NodePorts under both policies.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use fairlead_tests::packet::world::{self, POD1, UPLINK};
use fairlead_tests::packet::{Node, Service, Wire};
use proxy_agent::model::IpFamily;
use proxy_common::Outcome;

use crate::cases::{CLIENT_PORT, PORT, TARGET, Talk, at, by_now, out_of, web};

wires! {
    a_cluster_ip_offers_every_endpoint,
    rule_24_an_internal_local_policy_offers_the_endpoints_of_this_node,
    rule_54_a_local_policy_without_an_endpoint_here_drops,
    rule_51_an_endpoint_that_shuts_down_serves_while_there_is_no_other,
    rule_52_a_ready_endpoint_beats_one_that_shuts_down,
    a_local_node_port_keeps_the_client,
    rule_54_a_local_node_port_without_an_endpoint_here_drops,
    rule_69_a_pod_uses_any_endpoint_of_a_local_node_port,
    rule_85_a_node_port_answers_only_on_its_addresses,
    rule_93_a_node_port_of_another_node_is_left_alone,
    another_port_of_the_node_is_left_alone,
    every_port_leads_to_its_own_target,
    a_service_that_is_deleted_is_left_alone,
}

const NODE_PORT: u16 = 30_080;

/// Where 64 clients are sent.
fn chosen(node: &Node, wire: Wire) -> BTreeSet<SocketAddr> {
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    (CLIENT_PORT..CLIENT_PORT + 64)
        .map(|port| node.arrives(POD1, &talk.on_port(port).opening()).destination())
        .collect()
}

fn endpoints<const N: usize>(wire: Wire, addrs: [fn(IpFamily) -> std::net::IpAddr; N]) -> BTreeSet<SocketAddr> {
    addrs.map(|addr| wire.at(addr, TARGET)).into()
}

fn three(wire: Wire) -> Service {
    let family = wire.family;
    web(wire).elsewhere(world::remote(family)).elsewhere(world::remote2(family)).here(world::pod2(family))
}

fn a_cluster_ip_offers_every_endpoint(wire: Wire) {
    let node = Node::serving(&[&three(wire)]);
    assert_eq!(chosen(&node, wire), endpoints(wire, [world::remote, world::remote2, world::pod2]));
}

pub(crate) fn rule_24_an_internal_local_policy_offers_the_endpoints_of_this_node(wire: Wire) {
    let node = Node::serving(&[&three(wire).internal_local()]);
    assert_eq!(chosen(&node, wire), endpoints(wire, [world::pod2]));
}

pub(crate) fn rule_54_a_local_policy_without_an_endpoint_here_drops(wire: Wire) {
    let node = Node::serving(&[&web(wire).elsewhere(world::remote(wire.family)).internal_local()]);
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    node.arrives(POD1, &talk.opening()).is_dropped(Outcome::DropNoLocalEndpoint);
}

fn rule_51_an_endpoint_that_shuts_down_serves_while_there_is_no_other(wire: Wire) {
    let node = Node::serving(&[&web(wire).shutting_down(world::pod2(wire.family))]);
    assert_eq!(chosen(&node, wire), endpoints(wire, [world::pod2]));
}

fn rule_52_a_ready_endpoint_beats_one_that_shuts_down(wire: Wire) {
    let family = wire.family;
    let node = Node::serving(&[&web(wire).shutting_down(world::pod2(family)).elsewhere(world::remote(family))]);
    assert_eq!(chosen(&node, wire), endpoints(wire, [world::remote]));
}

/// The Service on a NodePort with a local external policy.
fn on_node_port(wire: Wire) -> Service {
    web(wire).node_port(NODE_PORT).external_local()
}

fn a_local_node_port_keeps_the_client(wire: Wire) {
    let family = wire.family;
    let node = Node::serving(&[&on_node_port(wire).here(world::pod1(family)).elsewhere(world::remote(family))]);
    let (client, here) = (wire.at(world::client, 51_234), wire.at(world::node, NODE_PORT));
    let endpoint = wire.at(world::pod1, TARGET);
    let opening = at(UPLINK, wire.opening(client, here));
    node.arrives(UPLINK, &opening).becomes(Outcome::RequestNew, &opening.clone().to(endpoint));
    let answer = out_of(UPLINK, wire.answer(endpoint, client));
    node.leaves(UPLINK, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(here));
    let further = at(UPLINK, wire.talk(client, here));
    node.arrives(UPLINK, &further).becomes(Outcome::RequestHalfOpen, &further.clone().to(endpoint));
    let reply = out_of(UPLINK, wire.talk(endpoint, client));
    node.leaves(UPLINK, &reply).becomes(by_now(wire, Outcome::Reply), &reply.clone().from(here));
}

fn rule_54_a_local_node_port_without_an_endpoint_here_drops(wire: Wire) {
    let node = Node::serving(&[&on_node_port(wire).elsewhere(world::remote(wire.family))]);
    let opening = at(UPLINK, wire.opening(wire.at(world::client, 51_234), wire.at(world::node, NODE_PORT)));
    node.arrives(UPLINK, &opening).is_dropped(Outcome::DropNoLocalEndpoint);
}

fn rule_69_a_pod_uses_any_endpoint_of_a_local_node_port(wire: Wire) {
    let node = Node::serving(&[&on_node_port(wire).elsewhere(world::remote(wire.family))]);
    let mut talk = Talk::to(wire, wire.at(world::remote, TARGET));
    talk.vip = wire.at(world::node, NODE_PORT);
    talk.is_opened(&node);
    talk.goes_on(&node);
}

fn rule_85_a_node_port_answers_only_on_its_addresses(wire: Wire) {
    let node = Node::serving(&[&on_node_port(wire).here(world::pod1(wire.family))]);
    let opening = at(UPLINK, wire.opening(wire.at(world::client, 51_234), wire.at(world::bridge, NODE_PORT)));
    node.arrives(UPLINK, &opening).is_left_alone();
}

fn another_port_of_the_node_is_left_alone(wire: Wire) {
    let node = Node::serving(&[&on_node_port(wire).here(world::pod1(wire.family))]);
    for port in [22, NODE_PORT - 1, NODE_PORT + 1, NODE_PORT ^ 64] {
        let opening = at(UPLINK, wire.opening(wire.at(world::client, 51_234), wire.at(world::node, port)));
        node.arrives(UPLINK, &opening).is_left_alone();
    }
}

fn every_port_leads_to_its_own_target(wire: Wire) {
    let service = web(wire).port(wire.protocol, PORT + 1, TARGET + 1).elsewhere(world::remote(wire.family));
    let node = Node::serving(&[&service]);
    let first = Talk::to(wire, wire.at(world::remote, TARGET));
    let mut second = Talk::to(wire, wire.at(world::remote, TARGET + 1));
    second.vip.set_port(PORT + 1);
    for talk in [first, second] {
        talk.is_opened(&node);
        talk.goes_on(&node);
    }
}

fn a_service_that_is_deleted_is_left_alone(wire: Wire) {
    let service = three(wire);
    let mut node = Node::serving(&[&service]);
    node.delete(&service);
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    node.arrives(POD1, &talk.opening()).is_left_alone();
}

fn rule_93_a_node_port_of_another_node_is_left_alone(wire: Wire) {
    // The other node is an endpoint as well, so that its address is one of those that are looked at.
    let other_node = if wire.family == IpFamily::V4 { "192.0.2.2" } else { "2001:db8::2" };
    let other_node = other_node.parse().expect("an address");
    let node = Node::serving(&[&web(wire).node_port(NODE_PORT).elsewhere(other_node)]);
    let there = SocketAddr::new(other_node, NODE_PORT);
    node.arrives(POD1, &at(POD1, wire.opening(wire.at(world::pod1, 51_234), there))).is_left_alone();
}
