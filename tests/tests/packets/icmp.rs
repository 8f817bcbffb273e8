//! ICMP errors about translated packets: whoever sent the packet finds its own addresses quoted (rule 102).

use std::net::{IpAddr, SocketAddr};

use fairlead_tests::packet::world::{self, BRIDGE, POD1, PORT1, PORT2, UPLINK};
use fairlead_tests::packet::{Node, Packet, Wire, verify_checksums};
use proxy_agent::model::{IpFamily, Protocol};
use proxy_common::Outcome;
use proxy_common::abi::tc_index;

use crate::cases::{CLIENT_PORT, PORT, TARGET, at, out_of, to_remote, web};

wires! {
    an_error_from_beyond_the_endpoint_quotes_the_service_to_the_client,
    an_error_of_the_endpoint_comes_from_the_service,
    an_error_about_a_reply_quotes_the_endpoints_own_packet,
    an_error_of_the_node_itself_quotes_the_service,
    an_error_about_a_masqueraded_request_reaches_the_client,
    an_error_about_a_masqueraded_reply_reaches_the_endpoint,
    an_error_about_a_request_of_the_node_itself_arrives_where_it_was_sent,
    an_error_of_a_neighbour_on_the_bridge_goes_by_mac,
    an_error_that_quotes_the_whole_packet_is_right_throughout,
    an_error_about_anybody_elses_packet_is_left_alone,
    an_error_that_quotes_somebody_elses_source_is_left_alone,
    an_error_that_is_cut_off_is_left_alone,
}

families! {
    a_ping_through_the_node_is_left_alone,
    a_ping_of_a_cluster_ip_is_refused_as_ever,
}

const NODE_PORT: u16 = 30_080;

/// "Packet too big" for 1,280 bytes, from this sender, about a packet of which this many bytes behind its IP header are
/// quoted.
fn too_big(from: IpAddr, about: &Packet, quoted: usize) -> Packet {
    let (kind, code, rest) = if about.is_v4() { (3, 4, [0, 0, 5, 0]) } else { (2, 0, [0, 0, 5, 0]) };
    let header = if about.is_v4() { 20 } else { 40 };
    let bytes = about.bytes();
    let whole = bytes.len() - 14;
    Packet::icmp(from, about.src.ip(), kind, code, rest).carrying(&bytes[14..14 + whole.min(header + quoted)])
}

/// A router that no route of the node names.
fn router(wire: Wire) -> IpAddr {
    world::nowhere(wire.family)
}

/// The packet as its sender's own: as it was before it was forwarded.
fn quoted(wire: Wire, from: SocketAddr, to: SocketAddr) -> Packet {
    wire.talk(from, to).with_ttl(61)
}

/// What each of the two quotes; both have been forwarded as often.
fn pair(wire: Wire, known: (SocketAddr, SocketAddr), met: (SocketAddr, SocketAddr)) -> (Packet, Packet) {
    (quoted(wire, known.0, known.1), quoted(wire, met.0, met.1))
}

pub(crate) fn an_error_from_beyond_the_endpoint_quotes_the_service_to_the_client(wire: Wire) {
    let (node, talk) = to_remote(wire);
    for confirmed in [false, true] {
        if confirmed {
            talk.is_opened(&node);
        } else {
            talk.goes(&node, Outcome::RequestNew, &talk.opening());
            node.maps.let_last(talk.client.port());
        }
        let (known, met) = pair(wire, (talk.client, talk.vip), (talk.client, talk.endpoint));
        let arriving = at(UPLINK, too_big(router(wire), &met, 8));
        node.arrives(UPLINK, &arriving).is_left_alone();
        let leaving = out_of(POD1, too_big(router(wire), &met, 8));
        let expected = out_of(POD1, too_big(router(wire), &known, 8));
        node.leaves(POD1, &leaving).becomes_reply(Outcome::IcmpError, &expected);
        if !confirmed {
            break;
        }
    }
}

fn an_error_of_the_endpoint_comes_from_the_service(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    let (known, met) = pair(wire, (talk.client, talk.vip), (talk.client, talk.endpoint));
    let leaving = out_of(POD1, too_big(talk.endpoint.ip(), &met, 8));
    let expected = out_of(POD1, too_big(talk.vip.ip(), &known, 8));
    node.leaves(POD1, &leaving).becomes_reply(Outcome::IcmpError, &expected);
}

fn an_error_about_a_reply_quotes_the_endpoints_own_packet(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.is_opened(&node);
    // The client refuses what came from the Service.
    let (known, met) = pair(wire, (talk.endpoint, talk.client), (talk.vip, talk.client));
    let arriving = at(POD1, too_big(talk.client.ip(), &met, 8));
    let expected = at(POD1, too_big(talk.client.ip(), &known, 8));
    node.arrives(POD1, &arriving).becomes(Outcome::IcmpError, &expected);
}

fn an_error_of_the_node_itself_quotes_the_service(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    let (known, met) = pair(wire, (talk.client, talk.vip), (talk.client, talk.endpoint));
    let own = world::node(wire.family);
    let leaving = out_of(POD1, too_big(own, &met, 8));
    node.sends(POD1, &leaving).becomes_reply(Outcome::IcmpError, &out_of(POD1, too_big(own, &known, 8)));
}

/// A client outside, a NodePort, the endpoint on the other node, and what it sees as its client.
fn masqueraded(wire: Wire) -> (Node, SocketAddr, SocketAddr, SocketAddr, SocketAddr) {
    let (client, vip) = (wire.at(world::client, 51_234), wire.at(world::node, NODE_PORT));
    let endpoint = wire.at(world::remote, TARGET);
    let node = Node::serving(&[&web(wire).node_port(NODE_PORT).elsewhere(endpoint.ip())]);
    let opening = at(UPLINK, wire.opening(client, vip));
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &opening.clone().to(endpoint));
    let leaving = out_of(UPLINK, opening.to(endpoint));
    let seen = node.leaves_marked(UPLINK, tc_index::REQUEST_SNAT, &leaving).source();
    let answer = at(UPLINK, wire.answer(endpoint, seen));
    node.arrives(UPLINK, &answer).becomes(Outcome::Unmasqueraded, &answer.clone().to(client));
    let back = out_of(UPLINK, answer.to(client));
    node.leaves(UPLINK, &back).becomes(Outcome::ReplyHalfOpen, &back.clone().from(vip));
    node.maps.let_last(51_234);
    let talk = at(UPLINK, wire.talk(client, vip));
    node.arrives(UPLINK, &talk).becomes_due(Outcome::RequestHalfOpen, &talk.clone().to(endpoint));
    if wire.protocol == Protocol::Udp {
        let reply = out_of(UPLINK, wire.talk(endpoint, client));
        node.leaves(UPLINK, &reply).becomes(Outcome::ReplyHalfOpen, &reply.clone().from(vip));
    }
    (node, client, vip, endpoint, seen)
}

fn an_error_about_a_masqueraded_request_reaches_the_client(wire: Wire) {
    let (node, client, vip, endpoint, seen) = masqueraded(wire);
    let met = quoted(wire, seen, endpoint);
    let arriving = at(UPLINK, too_big(router(wire), &met, 8));
    let between = too_big(router(wire), &quoted(wire, client, endpoint), 8);
    node.arrives(UPLINK, &arriving).becomes_between(Outcome::IcmpError, &at(UPLINK, between.clone()));
    let leaving = out_of(UPLINK, between);
    let expected = out_of(UPLINK, too_big(router(wire), &quoted(wire, client, vip), 8));
    node.leaves(UPLINK, &leaving).becomes_reply(Outcome::IcmpError, &expected);
}

fn an_error_about_a_masqueraded_reply_reaches_the_endpoint(wire: Wire) {
    let (node, client, vip, endpoint, seen) = masqueraded(wire);
    let arriving = at(UPLINK, too_big(router(wire), &quoted(wire, vip, client), 8));
    let between = too_big(router(wire), &quoted(wire, endpoint, client), 8);
    let ran = node.arrives(UPLINK, &arriving);
    ran.becomes_due(Outcome::IcmpError, &at(UPLINK, between.clone()));
    let leaving = out_of(UPLINK, between);
    let expected = out_of(UPLINK, too_big(router(wire), &quoted(wire, endpoint, seen), 8));
    node.leaves_marked(UPLINK, tc_index::REQUEST_SNAT, &leaving).becomes(Outcome::IcmpError, &expected);
}

fn an_error_about_a_request_of_the_node_itself_arrives_where_it_was_sent(wire: Wire) {
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::remote, TARGET));
    let process = wire.at(world::node, 50_000);
    let node = Node::serving(&[&web(wire).elsewhere(endpoint.ip())]);
    let opening = wire.opening(process, vip).on_wire(UPLINK.mac, UPLINK.peer);
    node.sends(UPLINK, &opening).is_redirected(Outcome::RequestNew, &opening.clone().to(endpoint));
    let (known, met) = pair(wire, (process, vip), (process, endpoint));
    let arriving = at(UPLINK, too_big(router(wire), &met, 8));
    let expected = at(UPLINK, too_big(router(wire), &known, 8));
    node.arrives(UPLINK, &arriving).is_redirected_as_reply(Outcome::IcmpError, &expected);
}

fn an_error_of_a_neighbour_on_the_bridge_goes_by_mac(wire: Wire) {
    let (client, vip) = (wire.at(world::port1, CLIENT_PORT), wire.at(world::vip, PORT));
    let endpoint = wire.at(world::port2, TARGET);
    let node = Node::serving(&[&web(wire).node_port(NODE_PORT).here(endpoint.ip())]);
    let opening = wire.opening(client, vip).on_wire(PORT1.peer, BRIDGE.mac);
    let direct = opening.clone().to(endpoint).on_wire(PORT1.peer, PORT2.peer);
    node.arrives(PORT1, &opening).becomes(Outcome::RequestNew, &direct);
    let (known, met) = pair(wire, (client, vip), (client, endpoint));
    let error = too_big(endpoint.ip(), &met, 8).on_wire(PORT2.peer, PORT1.peer);
    node.arrives(PORT2, &error).is_left_alone();
    let expected = too_big(vip.ip(), &known, 8).on_wire(PORT2.peer, PORT1.peer);
    node.leaves(PORT1, &error).becomes_reply(Outcome::IcmpError, &expected);
}

fn an_error_that_quotes_the_whole_packet_is_right_throughout(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    let (known, met) = pair(wire, (talk.client, talk.vip), (talk.client, talk.endpoint));
    let leaving = out_of(POD1, too_big(router(wire), &met, 1000));
    let expected = out_of(POD1, too_big(router(wire), &known, 1000));
    let ran = node.leaves(POD1, &leaving);
    verify_checksums(ran.bytes()).expect("the error's own checksum");
    ran.becomes_reply(Outcome::IcmpError, &expected);
}

fn an_error_about_anybody_elses_packet_is_left_alone(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    let mut other = talk.client;
    other.set_port(CLIENT_PORT + 1);
    let leaving = out_of(POD1, too_big(router(wire), &quoted(wire, other, talk.endpoint), 8));
    node.leaves(POD1, &leaving).is_left_alone();
}

fn an_error_that_quotes_somebody_elses_source_is_left_alone(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    // Sent to another than the one whose packet it quotes.
    let mut error = too_big(router(wire), &quoted(wire, talk.client, talk.endpoint), 8);
    error.dst.set_ip(world::pod2(wire.family));
    node.leaves(POD1, &out_of(POD1, error)).is_left_alone();
}

fn an_error_that_is_cut_off_is_left_alone(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    let error = too_big(router(wire), &quoted(wire, talk.client, talk.endpoint), 3);
    node.leaves(POD1, &out_of(POD1, error)).is_left_alone();
}

fn a_ping_through_the_node_is_left_alone(family: IpFamily) {
    let wire = if family == IpFamily::V4 { Wire::UDP_V4 } else { Wire::UDP_V6 };
    let (node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    let ping = Packet::echo(world::client(family), talk.client.ip());
    node.arrives(UPLINK, &at(UPLINK, ping.clone())).is_left_alone();
    node.leaves(POD1, &out_of(POD1, ping)).is_left_alone();
}

fn a_ping_of_a_cluster_ip_is_refused_as_ever(family: IpFamily) {
    let wire = if family == IpFamily::V4 { Wire::UDP_V4 } else { Wire::UDP_V6 };
    let (node, talk) = to_remote(wire);
    let ping = at(POD1, Packet::echo(talk.client.ip(), talk.vip.ip()));
    let ran = node.arrives(POD1, &ping);
    assert_eq!(ran.counted(), [Outcome::RejectUnknownPort]);
}

pub(crate) fn a_redirect_that_names_the_endpoint_is_dropped() {
    let wire = Wire::UDP_V4;
    let (client, vip) = (wire.at(world::port1, CLIENT_PORT), wire.at(world::vip, PORT));
    let endpoint = wire.at(world::silent, TARGET);
    let node = Node::serving(&[&web(wire).here(endpoint.ip())]);
    let opening = wire.opening(client, vip).on_wire(PORT1.peer, BRIDGE.mac);
    node.arrives(PORT1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(endpoint));
    let about = quoted(wire, client, endpoint);
    let IpAddr::V4(gateway) = endpoint.ip() else { panic!("an IPv4 case") };
    let redirect = Packet::icmp(world::bridge(wire.family), client.ip(), 5, 1, gateway.octets())
        .carrying(&about.bytes()[14..42])
        .on_wire(BRIDGE.mac, PORT1.peer);
    node.sends(PORT1, &redirect).is_dropped(Outcome::DropRedirect);
    // One about another packet is the kernel's affair.
    let other = quoted(wire, client, wire.at(world::port2, TARGET));
    let redirect = redirect.carrying(&other.bytes()[14..42]);
    node.sends(PORT1, &redirect).is_left_alone();
}

/// To the kernel a pod that is its own endpoint takes a way about. RFC 4861 §4.5: target, destination.
#[test]
fn a_redirect_that_tells_a_pod_the_way_to_itself_is_dropped() {
    let node = Node::serving(&[]);
    let pod = |addr: IpAddr| match addr {
        IpAddr::V6(addr) => addr.octets(),
        IpAddr::V4(addr) => panic!("{addr} in an IPv6 case"),
    };
    let (pod1, pod2) = (world::pod1(IpFamily::V6), world::pod2(IpFamily::V6));
    let redirect = |destination: IpAddr| {
        Packet::icmp(world::node(IpFamily::V6), pod1, 137, 0, [0; 4])
            .carrying(&[pod(destination), pod(destination)].concat())
            .on_wire(POD1.mac, POD1.peer)
    };
    node.sends(POD1, &redirect(pod1)).is_dropped(Outcome::DropRedirect);
    // The way to somebody else is the kernel's affair.
    node.sends(POD1, &redirect(pod2)).is_left_alone();
}

#[test]
fn pitfall_p1_6_a_redirect_that_names_the_endpoint_is_dropped() {
    a_redirect_that_names_the_endpoint_is_dropped();
}
