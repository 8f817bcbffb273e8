//! Tuples are reserved, never shared: what happens when two conversations would look the same to the endpoint.

use fairlead_tests::packet::world::{self, POD1, UPLINK};
use fairlead_tests::packet::{ACK, FIN, Node, PSH, RST, Table, Wire};
use proxy_agent::model::{IpFamily, Protocol};
use proxy_common::abi::{Direction, Flow, FlowKey, tc_index};
use proxy_common::{Family, Outcome, V4, V6};

use crate::cases::{PORT, TARGET, Talk, at, by_now, other, out_of, to_remote, web};

wires! {
    a_translated_request_that_comes_in_again_is_left_alone,
    pitfall_p1_2_one_client_port_to_two_services_with_the_same_endpoint_gets_two_ports,
    one_client_port_to_two_services_gets_two_endpoints_where_there_are_two,
    pitfall_p1_2_a_direct_packet_on_a_services_tuple_gets_another_port,
    a_direct_packet_on_a_tuple_of_its_own_is_left_alone,
    when_every_tuple_is_taken_the_packet_is_dropped,
}

families! {
    the_nodes_own_packet_keeps_off_the_tuple_of_a_pod_that_serves_itself,
    a_connection_that_the_endpoint_has_with_the_client_already_is_left_alone,
    pitfall_p1_2_the_tuple_of_a_closed_connection_is_free,
    a_segment_in_mid_stream_to_an_endpoint_itself_is_left_alone,
}

/// The first Service's conversation, and a second Service's from the same client port.
fn two(wire: Wire) -> (Talk, Talk) {
    let first = Talk::to(wire, wire.at(world::remote, TARGET));
    let second = Talk { vip: wire.at(world::other_vip, PORT), ..first };
    (first, second)
}

fn pitfall_p1_2_one_client_port_to_two_services_with_the_same_endpoint_gets_two_ports(wire: Wire) {
    let (first, second) = two(wire);
    let endpoint = first.endpoint;
    let node = Node::serving(&[&web(wire).elsewhere(endpoint.ip()), &other(wire).elsewhere(endpoint.ip())]);
    first.is_opened(&node);
    let opening = second.opening();
    let ran = node.arrives(POD1, &opening);
    let port = ran.source().port();
    assert!((61_000..=65_535).contains(&port), "port {port} could be a process' own");
    ran.becomes(Outcome::RequestNew, &opening.clone().from_port(port).to(endpoint));
    let back = |packet: fairlead_tests::packet::Packet| {
        let mut to = second.client;
        to.set_port(port);
        packet.to(to)
    };
    let answer = back(second.answer());
    node.leaves(POD1, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(second.vip).to(second.client));
    let further = second.talk();
    node.arrives(POD1, &further).becomes(Outcome::RequestHalfOpen, &further.clone().from_port(port).to(endpoint));
    let reply = back(second.reply());
    node.leaves(POD1, &reply).becomes(by_now(wire, Outcome::Reply), &reply.clone().from(second.vip).to(second.client));
    first.goes_on(&node);
}

fn one_client_port_to_two_services_gets_two_endpoints_where_there_are_two(wire: Wire) {
    let (first, mut second) = two(wire);
    let (taken, spare) = (first.endpoint, wire.at(world::remote2, TARGET));
    let both = other(wire).elsewhere(taken.ip()).elsewhere(spare.ip());
    let node = Node::serving(&[&web(wire).elsewhere(taken.ip()), &both]);
    second.endpoint = spare;
    for port in 40_000..40_016 {
        let (first, second) = (first.on_port(port), second.on_port(port));
        first.is_opened(&node);
        second.is_opened(&node);
        second.goes_on(&node);
        first.goes_on(&node);
    }
}

pub(crate) fn pitfall_p1_2_a_direct_packet_on_a_services_tuple_gets_another_port(wire: Wire) {
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let node = Node::serving(&[&web(wire).elsewhere(talk.endpoint.ip())]);
    talk.is_opened(&node);
    let direct = at(POD1, wire.opening(talk.client, talk.endpoint));
    let ran = node.arrives(POD1, &direct);
    let port = ran.source().port();
    assert_ne!(port, talk.client.port(), "the endpoint would take it for the Service's");
    ran.becomes(Outcome::DirectRewritten, &direct.clone().from_port(port));
    node.arrives(POD1, &direct).becomes(Outcome::DirectRewritten, &direct.clone().from_port(port));
    let mut elsewhere = talk.client;
    elsewhere.set_port(port);
    let answer = out_of(POD1, wire.answer(talk.endpoint, elsewhere));
    node.leaves(POD1, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().to(talk.client));
    let further = at(POD1, wire.talk(talk.client, talk.endpoint));
    node.arrives(POD1, &further).becomes(Outcome::DirectRewritten, &further.clone().from_port(port));
    let reply = out_of(POD1, wire.talk(talk.endpoint, elsewhere));
    node.leaves(POD1, &reply).becomes(by_now(wire, Outcome::Reply), &reply.clone().to(talk.client));
    talk.goes_on(&node);
}

fn a_direct_packet_on_a_tuple_of_its_own_is_left_alone(wire: Wire) {
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let node = Node::serving(&[&web(wire).elsewhere(talk.endpoint.ip())]);
    talk.is_opened(&node);
    let alone = talk.on_port(40_001);
    node.arrives(POD1, &at(POD1, wire.opening(alone.client, alone.endpoint))).is_left_alone();
    node.leaves(POD1, &out_of(POD1, wire.answer(alone.endpoint, alone.client))).is_left_alone();
    assert_eq!((node.maps.count(Table::HalfOpen), node.maps.count(Table::Confirmed)), (0, 2));
}

fn a_segment_in_mid_stream_to_an_endpoint_itself_is_left_alone(family: IpFamily) {
    let wire = Wire { family, protocol: Protocol::Tcp };
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let node = Node::serving(&[&web(wire).elsewhere(talk.endpoint.ip())]);
    talk.is_opened(&node);
    for flags in [ACK | PSH, RST, FIN | ACK] {
        node.arrives(POD1, &talk.segment(flags).to(talk.endpoint)).is_left_alone();
    }
}

/// The direct connection is older than the Service's, so nobody has seen it begin.
fn a_connection_that_the_endpoint_has_with_the_client_already_is_left_alone(family: IpFamily) {
    let wire = Wire { family, protocol: Protocol::Tcp };
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let node = Node::serving(&[&web(wire).elsewhere(talk.endpoint.ip())]);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    // The endpoint takes the SYN for one of its connection, and acknowledges what it has (RFC 5961 §4).
    node.leaves(POD1, &talk.segment_back(ACK)).is_left_alone();
    node.leaves(POD1, &talk.segment_back(ACK | PSH)).is_left_alone();
    // Whatever it says is not for the Service's client.
    node.leaves(POD1, &talk.segment_back(RST)).is_left_alone();
    // The client sends its SYN again, which gets a tuple of its own and keeps it.
    let opening = talk.opening();
    let ran = node.arrives(POD1, &opening);
    let port = ran.source().port();
    assert_ne!(port, talk.client.port(), "the endpoint would challenge it again");
    ran.becomes(Outcome::RequestNew, &opening.clone().from_port(port).to(talk.endpoint));
    node.arrives(POD1, &opening).becomes(Outcome::RequestHalfOpen, &opening.clone().from_port(port).to(talk.endpoint));
    let mut elsewhere = talk.client;
    elsewhere.set_port(port);
    let answer = out_of(POD1, wire.answer(talk.endpoint, elsewhere));
    let back = answer.clone().from(talk.vip).to(talk.client);
    node.leaves(POD1, &answer).becomes(Outcome::ReplyHalfOpen, &back);
    let further = talk.talk();
    for outcome in [Outcome::RequestHalfOpen, Outcome::Request] {
        node.arrives(POD1, &further).becomes(outcome, &further.clone().from_port(port).to(talk.endpoint));
    }
    // All along, the older connection is nobody's but theirs.
    node.arrives(POD1, &talk.segment(ACK | PSH).to(talk.endpoint)).is_left_alone();
    node.leaves(POD1, &talk.segment_back(ACK | PSH)).is_left_alone();
}

/// A pod that reaches itself does so as the node.
fn the_nodes_own_packet_keeps_off_the_tuple_of_a_pod_that_serves_itself(family: IpFamily) {
    let wire = Wire { family, protocol: Protocol::Tcp };
    let endpoint = wire.at(world::pod1, TARGET);
    let node = Node::serving(&[&web(wire).here(endpoint.ip())]);
    let opening = at(POD1, wire.opening(wire.at(world::pod1, 50_000), wire.at(world::vip, PORT)));
    let routed = out_of(POD1, opening.clone().to(endpoint));
    let turned = opening.clone().to(endpoint).turned_round();
    node.arrives(POD1, &opening).goes_back(Outcome::RequestNew, tc_index::REQUEST_SNAT, &turned);
    let as_node = node.leaves_marked(POD1, tc_index::REQUEST_SNAT, &routed).source();
    let direct = wire.opening(as_node, endpoint).on_wire(POD1.mac, POD1.peer);
    let ran = node.sends(POD1, &direct);
    let port = ran.source().port();
    assert_ne!(port, as_node.port(), "the answer would be taken for the pod's");
    ran.becomes(Outcome::DirectRewritten, &direct.clone().from_port(port));
}

fn pitfall_p1_2_the_tuple_of_a_closed_connection_is_free(family: IpFamily) {
    let wire = Wire { family, protocol: Protocol::Tcp };
    let (first, second) = two(wire);
    let endpoint = first.endpoint.ip();
    let node = Node::serving(&[&web(wire).elsewhere(endpoint), &other(wire).elsewhere(endpoint)]);
    first.is_opened(&node);
    first.goes(&node, Outcome::Request, &first.segment(FIN | ACK));
    first.comes(&node, Outcome::Reply, &first.segment_back(FIN | ACK));
    second.is_opened(&node);
    second.goes_on(&node);
    assert_eq!(node.maps.count(Table::Confirmed), 2, "the closed pair is gone:\n{}", node.maps.describe());
}

/// Every port that could replace the client's is a live flow's.
fn take_every_spare_port<F: Family>(node: &mut Node, talk: &Talk) {
    let (key, flow) = node.maps.flows::<F>(Table::HalfOpen).remove(0);
    let mut held = flow;
    held.sport = PORT + 1;
    for dport in 61_000..=65_535 {
        assert_ne!(dport, talk.client.port());
        node.maps.put_flow(Table::HalfOpen, &FlowKey { dport, ..key }, &Flow { dport, ..held });
    }
    // The tuple itself as well.
    node.maps.put_flow(Table::HalfOpen, &key, &held);
    assert_eq!(key.dir, Direction::Out as u8);
}

pub(crate) fn when_every_tuple_is_taken_the_packet_is_dropped(wire: Wire) {
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let settings = fairlead_tests::packet::Settings { half_open: 16_384, ..Default::default() };
    let mut node = Node::start_with(settings);
    node.apply(&web(wire).elsewhere(talk.endpoint.ip()));
    node.come_to_rest();
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    match wire.family {
        IpFamily::V4 => take_every_spare_port::<V4>(&mut node, &talk),
        IpFamily::V6 => take_every_spare_port::<V6>(&mut node, &talk),
    }
    node.arrives(POD1, &talk.opening()).is_dropped(Outcome::DropTupleClash);
}

/// A gateway of the CNI's sends what it gets round: the request leaves translated, and arrives by another device.
fn a_translated_request_that_comes_in_again_is_left_alone(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    node.arrives(UPLINK, &at(UPLINK, wire.opening(talk.client, talk.endpoint))).is_left_alone();
    talk.is_confirmed(&node);
    node.arrives(UPLINK, &at(UPLINK, wire.opening(talk.client, talk.endpoint))).is_left_alone();
    node.arrives(UPLINK, &at(UPLINK, wire.talk(talk.client, talk.endpoint))).is_left_alone();
    talk.goes_on(&node);
}
