//! What cannot be served is refused: a reset for TCP, else "port unreachable", byte for byte.

use std::net::SocketAddr;

use fairlead_tests::packet::world::{self, POD1, UPLINK};
use fairlead_tests::packet::{ACK, FIN, Node, PSH, Packet, RST, SYN, Settings, Wire};
use proxy_agent::model::{IpFamily, Protocol};
use proxy_common::Outcome;

use crate::cases::{PORT, TARGET, Talk, at, reset_for, to_remote, unreachable_for, web};

families! {
    rule_54_a_syn_without_any_endpoint_is_reset,
    rule_54_a_datagram_without_any_endpoint_is_unreachable,
    pitfall_p1_13_a_segment_in_mid_stream_without_a_flow_is_reset,
    a_reset_without_a_flow_is_not_answered,
    rule_66_an_unknown_port_of_a_cluster_ip_is_refused,
    a_reset_to_an_unknown_port_is_not_answered,
    rule_66_a_ping_of_a_cluster_ip_is_refused,
    rule_66_any_other_protocol_to_a_cluster_ip_is_refused,
    an_icmp_error_to_a_cluster_ip_is_not_answered,
    nobody_is_answered_at_an_address_that_is_nobodys,
    the_nodes_own_process_is_refused_where_it_listens,
    rule_64_the_nodes_own_process_is_refused_at_an_external_address,
    pitfall_p1_13_a_connection_that_began_under_kube_proxy_is_left_to_its_rules,
    answers_are_limited,
}

const fn tcp(family: IpFamily) -> Wire {
    Wire { family, protocol: Protocol::Tcp }
}

const fn udp(family: IpFamily) -> Wire {
    Wire { family, protocol: Protocol::Udp }
}

/// A conversation with a Service that has no endpoint.
fn deserted(wire: Wire) -> (Node, Talk) {
    (Node::serving(&[&web(wire)]), Talk::to(wire, wire.at(world::remote, TARGET)))
}

/// Bytes of the IP header without options, and eight of layer 4.
const fn quote(family: IpFamily) -> usize {
    match family {
        IpFamily::V4 => 28,
        IpFamily::V6 => 48,
    }
}

pub(crate) fn rule_54_a_syn_without_any_endpoint_is_reset(family: IpFamily) {
    let (node, talk) = deserted(tcp(family));
    let syn = talk.opening();
    node.arrives(POD1, &syn).is_answered(Outcome::RejectNoEndpoint, &reset_for(&syn, ACK, 0, 0x1000_0001));
    // Data in a SYN is counted as well (RFC 9293 §3.10.7.1), and so is a FIN.
    let fast_open = syn.carrying(b"GET /");
    node.arrives(POD1, &fast_open).is_answered(Outcome::RejectNoEndpoint, &reset_for(&fast_open, ACK, 0, 0x1000_0006));
    let christmas = talk.segment(SYN | FIN).carrying(b"abc");
    node.arrives(POD1, &christmas).is_answered(Outcome::RejectNoEndpoint, &reset_for(&christmas, ACK, 0, 0x1000_0005));
}

fn rule_54_a_datagram_without_any_endpoint_is_unreachable(family: IpFamily) {
    let (node, talk) = deserted(udp(family));
    let long = [7; 900];
    for payload in [b"".as_slice(), b"x", b"what is your name?", &long] {
        let datagram = talk.opening().carrying(payload);
        node.arrives(POD1, &datagram)
            .is_answered(Outcome::RejectNoEndpoint, &unreachable_for(&datagram, quote(family)));
    }
}

pub(crate) fn pitfall_p1_13_a_segment_in_mid_stream_without_a_flow_is_reset(family: IpFamily) {
    let (node, talk) = to_remote(tcp(family));
    for (flags, payload) in [(ACK, b"".as_slice()), (ACK | PSH, b"data"), (ACK | FIN, b""), (SYN | ACK, b"")] {
        let segment = talk.segment(flags).carrying(payload).numbered(7, 0xdead_beef);
        node.arrives(POD1, &segment).is_answered(Outcome::RejectNoFlow, &reset_for(&segment, 0, 0xdead_beef, 0));
    }
    // Without an ACK, the answer acknowledges what came.
    for (flags, payload, acknowledged) in [(0, b"".as_slice(), 0), (PSH, b"four", 4), (FIN, b"12", 3)] {
        let segment = talk.segment(flags).carrying(payload).numbered(0xffff_ffff, 0);
        let ack = 0xffff_ffffu32.wrapping_add(acknowledged);
        node.arrives(POD1, &segment).is_answered(Outcome::RejectNoFlow, &reset_for(&segment, ACK, 0, ack));
    }
}

pub(crate) fn a_reset_without_a_flow_is_not_answered(family: IpFamily) {
    let (node, talk) = to_remote(tcp(family));
    node.arrives(POD1, &talk.segment(RST)).is_dropped(Outcome::DropUnanswerable);
    node.arrives(POD1, &talk.segment(RST | ACK)).is_dropped(Outcome::DropUnanswerable);
}

pub(crate) fn rule_66_an_unknown_port_of_a_cluster_ip_is_refused(family: IpFamily) {
    let wire = tcp(family);
    let (node, talk) = to_remote(wire);
    let elsewhere = SocketAddr::new(talk.vip.ip(), PORT + 1);
    let syn = talk.opening().to(elsewhere);
    node.arrives(POD1, &syn).is_answered(Outcome::RejectUnknownPort, &reset_for(&syn, ACK, 0, 0x1000_0001));
    let data = talk.segment(ACK | PSH).to(elsewhere).carrying(b"hello");
    node.arrives(POD1, &data).is_answered(Outcome::RejectUnknownPort, &reset_for(&data, 0, 0x5000_0001, 0));
    // The same number in another protocol is another port.
    let datagram = at(POD1, Packet::udp(talk.client, talk.vip, b"hello"));
    node.arrives(POD1, &datagram).is_answered(Outcome::RejectUnknownPort, &unreachable_for(&datagram, quote(family)));
}

fn a_reset_to_an_unknown_port_is_not_answered(family: IpFamily) {
    let (node, talk) = to_remote(tcp(family));
    let elsewhere = SocketAddr::new(talk.vip.ip(), PORT + 1);
    node.arrives(POD1, &talk.segment(RST).to(elsewhere)).is_dropped(Outcome::DropUnanswerable);
    node.arrives(POD1, &talk.segment(RST | ACK).to(elsewhere)).is_dropped(Outcome::DropUnanswerable);
}

fn rule_66_a_ping_of_a_cluster_ip_is_refused(family: IpFamily) {
    let (node, talk) = to_remote(tcp(family));
    let ping = at(POD1, Packet::echo(talk.client.ip(), talk.vip.ip()));
    node.arrives(POD1, &ping).is_answered(Outcome::RejectUnknownPort, &unreachable_for(&ping, quote(family)));
}

fn rule_66_any_other_protocol_to_a_cluster_ip_is_refused(family: IpFamily) {
    const GRE: u8 = 47;
    let (node, talk) = to_remote(tcp(family));
    let tunnel = at(POD1, Packet::other(talk.client.ip(), talk.vip.ip(), GRE).carrying(&[0, 0, 8, 0, 1, 2, 3, 4, 5]));
    node.arrives(POD1, &tunnel).is_answered(Outcome::RejectUnknownPort, &unreachable_for(&tunnel, quote(family)));
}

fn an_icmp_error_to_a_cluster_ip_is_not_answered(family: IpFamily) {
    let (node, talk) = to_remote(tcp(family));
    let errors: &[u8] = match family {
        IpFamily::V4 => &[3, 4, 5, 11, 12],
        IpFamily::V6 => &[1, 2, 3, 4],
    };
    for kind in errors {
        let error = Packet::icmp(talk.client.ip(), talk.vip.ip(), *kind, 0, [0; 4]).carrying(&[0x45; 28]);
        node.arrives(POD1, &at(POD1, error)).is_dropped(Outcome::DropUnanswerable);
    }
}

fn nobody_is_answered_at_an_address_that_is_nobodys(family: IpFamily) {
    let (node, talk) = deserted(udp(family));
    let nobody = match family {
        IpFamily::V4 => ["224.0.0.1", "255.255.255.255", "0.0.0.0"].as_slice(),
        IpFamily::V6 => &["ff02::1", "::"],
    };
    for addr in nobody {
        let from = SocketAddr::new(addr.parse().unwrap(), 4000);
        node.arrives(POD1, &talk.opening().from(from)).is_dropped(Outcome::DropUnanswerable);
    }
}

fn the_nodes_own_process_is_refused_where_it_listens(family: IpFamily) {
    let wire = tcp(family);
    let (node, talk) = deserted(wire);
    let syn = wire.opening(wire.at(world::node, 50_000), talk.vip).on_wire(UPLINK.mac, UPLINK.peer);
    node.sends(UPLINK, &syn).is_answered(Outcome::RejectNoEndpoint, &reset_for(&syn, ACK, 0, 0x1000_0001));
}

pub(crate) fn pitfall_p1_13_a_connection_that_began_under_kube_proxy_is_left_to_its_rules(family: IpFamily) {
    let wire = tcp(family);
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let mut node = Node::start_with(Settings { kube_proxy: true, ..Settings::default() });
    node.apply(&web(wire).elsewhere(talk.endpoint.ip()));
    node.arrives(POD1, &talk.segment(ACK | PSH).carrying(b"data")).passes(Outcome::ForeignConnection);
    node.arrives(POD1, &talk.segment(RST)).passes(Outcome::ForeignConnection);
    talk.is_opened(&node);
    talk.goes_on(&node);
}

pub(crate) fn answers_are_limited(family: IpFamily) {
    let wire = udp(family);
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let mut node = Node::start_with(Settings { rejects_per_sec: 1, ..Settings::default() });
    node.apply(&web(wire));
    let datagram = talk.opening();
    let answer = unreachable_for(&datagram, quote(family));
    node.arrives(POD1, &datagram).is_answered(Outcome::RejectNoEndpoint, &answer);
    // Another token comes with the next second: of a few packets at once, most get none.
    let limited = (0..20).filter(|_| node.arrives(POD1, &datagram).counted() == [Outcome::DropRejectLimit]).count();
    assert!(limited >= 10, "only {limited} of 20 datagrams at once were left without an answer");
    node.maps.configure(|config| config.reject_per_sec = 0);
    // One token may be left.
    while node.arrives(POD1, &datagram).counted() == [Outcome::RejectNoEndpoint] {}
    node.arrives(POD1, &datagram).is_dropped(Outcome::DropRejectLimit);
}

fn rule_64_the_nodes_own_process_is_refused_at_an_external_address(family: IpFamily) {
    let wire = tcp(family);
    let external = world::nowhere(family);
    let node = Node::serving(&[&web(wire).external_ip(external)]);
    let to = SocketAddr::new(external, PORT);
    let syn = wire.opening(wire.at(world::node, 50_000), to).on_wire(UPLINK.mac, UPLINK.peer);
    node.sends(UPLINK, &syn).is_answered(Outcome::RejectNoEndpoint, &reset_for(&syn, ACK, 0, 0x1000_0001));
}
