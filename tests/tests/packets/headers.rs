//! Headers as the world sends them: options, extension headers, fragments, tags, odd checksums, what is cut off.

use std::net::SocketAddr;

use fairlead_tests::packet::world::{self, POD1, UPLINK};
use fairlead_tests::packet::{Checksum, Node, Packet, Wire, internet_checksum};
use proxy_agent::model::{IpFamily, Protocol};
use proxy_common::Outcome;

use crate::cases::{PORT, TARGET, Talk, at, out_of, to_remote, unreachable_for, web};

wires! {
    a_first_fragment_is_translated,
    a_later_fragment_to_a_cluster_ip_is_dropped,
    a_later_fragment_to_anybody_else_is_left_alone,
    later_fragments_follow_the_first,
    later_fragments_of_a_masqueraded_datagram_follow_it,
    fragments_of_another_datagram_are_another_matter,
    a_tagged_frame_is_left_alone,
    a_packet_to_a_cluster_ip_that_is_cut_off_is_dropped,
    a_packet_to_anybody_else_that_is_cut_off_is_left_alone,
    everything_else_in_the_header_stays,
    a_packet_that_stands_for_several_segments_stays_whole,
}

families! {
    rule_16_sctp_keeps_its_checksum_right,
    a_header_that_makes_no_sense_is_left_to_the_kernel,
    a_checksum_that_becomes_zero_is_sent_as_all_ones,
    a_packet_that_cannot_be_rewritten_is_dropped,
}

const fn wire(family: IpFamily, protocol: Protocol) -> Wire {
    Wire { family, protocol }
}

#[test]
fn ipv4_options_stay_and_are_quoted() {
    const RECORD_ROUTE: [u8; 12] = [7, 11, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    const LONGEST: [u8; 40] = [1; 40];
    for options in [RECORD_ROUTE.as_slice(), &LONGEST] {
        for wire in [Wire::TCP_V4, Wire::UDP_V4] {
            let (node, talk) = to_remote(wire);
            talk.goes(&node, Outcome::RequestNew, &talk.opening().with_ip_options(options));
            talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer().with_ip_options(options));
            talk.goes(&node, Outcome::RequestHalfOpen, &talk.talk().with_ip_options(options));
        }
        let talk = Talk::to(Wire::UDP_V4, Wire::UDP_V4.at(world::remote, TARGET));
        let node = Node::serving(&[&web(Wire::UDP_V4)]);
        let datagram = talk.opening().with_ip_options(options);
        let answer = unreachable_for(&datagram, 20 + options.len() + 8);
        node.arrives(POD1, &datagram).is_answered(Outcome::RejectNoEndpoint, &answer);
    }
}

#[test]
fn ipv6_extension_headers_stay_and_are_quoted() {
    const HOP_BY_HOP: u8 = 0;
    const DESTINATION: u8 = 60;
    let extend = |packet: Packet| {
        let padding = [1, 1, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        packet.with_extension(HOP_BY_HOP, &[0, 1, 4, 0, 0, 0, 0]).with_extension(DESTINATION, &padding)
    };
    for wire in [Wire::TCP_V6, Wire::UDP_V6] {
        let (node, talk) = to_remote(wire);
        talk.goes(&node, Outcome::RequestNew, &extend(talk.opening()));
        talk.comes(&node, Outcome::ReplyHalfOpen, &extend(talk.answer()));
        talk.goes(&node, Outcome::RequestHalfOpen, &extend(talk.talk()));
    }
    let talk = Talk::to(Wire::UDP_V6, Wire::UDP_V6.at(world::remote, TARGET));
    let node = Node::serving(&[&web(Wire::UDP_V6)]);
    let datagram = extend(talk.opening());
    let answer = unreachable_for(&datagram, 40 + 8 + 16 + 8);
    node.arrives(POD1, &datagram).is_answered(Outcome::RejectNoEndpoint, &answer);
}

#[test]
fn no_udp_checksum_stays_no_checksum() {
    let (node, talk) = to_remote(Wire::UDP_V4);
    let none = Checksum::Fixed(0);
    talk.goes(&node, Outcome::RequestNew, &talk.opening().with_udp_checksum(none));
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer().with_udp_checksum(none));
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.talk().with_udp_checksum(none));
}

fn a_checksum_that_becomes_zero_is_sent_as_all_ones(family: IpFamily) {
    let (node, talk) = to_remote(wire(family, Protocol::Udp));
    // The checksum that the translated packet would have, as its payload: then their sum is all ones.
    let blank = talk.opening().carrying(&[0, 0]).to(talk.endpoint).bytes();
    let at = blank.len() - 4;
    let crafted = talk.opening().carrying(&blank[at..at + 2]);
    let expected = crafted.clone().to(talk.endpoint).bytes();
    assert_eq!(expected[at..at + 2], [0xff, 0xff], "the payload was to make the checksum zero");
    talk.goes(&node, Outcome::RequestNew, &crafted);
}

fn a_first_fragment_is_translated(wire: Wire) {
    let (node, talk) = to_remote(wire);
    // Its checksum is the whole packet's, which nobody can check here: it must change by the same difference.
    talk.goes(&node, Outcome::RequestNew, &talk.opening().as_fragment(0, true));
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer().as_fragment(0, true));
}

pub(crate) fn a_later_fragment_to_a_cluster_ip_is_dropped(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.is_opened(&node);
    for more in [true, false] {
        let fragment = talk.talk().as_fragment(3, more).carrying(b"the middle of something, 24");
        node.arrives(POD1, &fragment).is_dropped(Outcome::DropFragment);
    }
}

fn a_later_fragment_to_anybody_else_is_left_alone(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.is_opened(&node);
    let fragment = at(POD1, wire.talk(talk.client, talk.endpoint)).as_fragment(3, false);
    node.arrives(POD1, &fragment).is_left_alone();
    let fragment = at(UPLINK, wire.talk(wire.at(world::client, 4000), wire.at(world::node, 22))).as_fragment(3, false);
    node.arrives(UPLINK, &fragment).is_left_alone();
    // A reply's later fragments need what the first one got: they leave as they are.
    node.leaves(POD1, &talk.reply().as_fragment(3, false)).is_left_alone();
}

const MIDDLE: &[u8] = b"the middle of something, 24";

pub(crate) fn later_fragments_follow_the_first(wire: Wire) {
    let (node, talk) = to_remote(wire);
    // While the flow begins, while it is half open, and when it is confirmed; out and back.
    talk.goes(&node, Outcome::RequestNew, &talk.opening().as_fragment(0, true));
    talk.goes(&node, Outcome::Fragment, &talk.opening().as_fragment(3, true).carrying(MIDDLE));
    talk.goes(&node, Outcome::Fragment, &talk.opening().as_fragment(6, false).carrying(MIDDLE));
    let reply = talk.answer().as_fragment(3, false).carrying(MIDDLE);
    node.leaves(POD1, &reply).is_left_alone();
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer().as_fragment(0, true));
    node.leaves(POD1, &reply).becomes_reply(Outcome::Fragment, &reply.clone().from(talk.vip));
}

fn later_fragments_of_a_masqueraded_datagram_follow_it(wire: Wire) {
    let (client, vip) = (wire.at(world::client, 51_234), wire.at(world::node, 30_080));
    let endpoint = wire.at(world::remote, TARGET);
    let node = Node::serving(&[&web(wire).node_port(30_080).elsewhere(endpoint.ip())]);
    let opening = at(UPLINK, wire.opening(client, vip)).as_fragment(0, true);
    let later = at(UPLINK, wire.opening(client, vip)).as_fragment(3, false).carrying(MIDDLE);
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &opening.clone().to(endpoint));
    node.arrives(UPLINK, &later).becomes_due(Outcome::Fragment, &later.clone().to(endpoint));
    let due = proxy_common::abi::tc_index::REQUEST_SNAT;
    let (opening, later) = (opening.to(endpoint), later.to(endpoint));
    let ran = node.leaves_marked(UPLINK, due, &opening);
    let seen = ran.source();
    ran.becomes(Outcome::Masqueraded, &opening.clone().from(seen));
    node.leaves_marked(UPLINK, due, &later).becomes(Outcome::Fragment, &later.clone().from(seen));
    let answer = at(UPLINK, wire.answer(endpoint, seen)).as_fragment(0, true);
    let rest = answer.clone().as_fragment(3, false).carrying(MIDDLE);
    node.arrives(UPLINK, &answer).becomes(Outcome::Unmasqueraded, &answer.clone().to(client));
    node.arrives(UPLINK, &rest).becomes_between(Outcome::Fragment, &rest.clone().to(client));
}

fn fragments_of_another_datagram_are_another_matter(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening().as_fragment(0, true));
    let other = talk.opening().as_fragment(3, false).carrying(MIDDLE).with_id(0x4321);
    node.arrives(POD1, &other).is_dropped(Outcome::DropFragment);
    let mut from_another = talk.opening().as_fragment(3, false).carrying(MIDDLE);
    from_another.src.set_ip(world::pod2(wire.family));
    node.arrives(POD1, &from_another).is_dropped(Outcome::DropFragment);
}

fn rule_16_sctp_keeps_its_checksum_right(family: IpFamily) {
    let wire = wire(family, Protocol::Sctp);
    let (client, vip) = (wire.at(world::pod1, 40_000), wire.at(world::vip, PORT));
    let endpoint = wire.at(world::remote, TARGET);
    let node = Node::serving(&[&web(wire).elsewhere(endpoint.ip())]);
    for length in [4, 16, 300, 1400] {
        let init: Vec<u8> = (0..length).map(|i| (i * 7) as u8).collect();
        let mut from = client;
        from.set_port(40_000 + length as u16);
        let opening = at(POD1, Packet::sctp(from, vip, &init));
        node.arrives(POD1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(endpoint));
        let answer = out_of(POD1, Packet::sctp(endpoint, from, &init));
        node.leaves(POD1, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(vip));
    }
    // What the frame is padded with is none of the packet.
    let short = at(POD1, Packet::sctp(client, vip, &[1; 4]));
    let mut padded = short.bytes();
    padded.extend([0xaa; 9]);
    let mut expected = short.to(endpoint).bytes();
    expected.extend([0xaa; 9]);
    assert_eq!(node.arrives_as(POD1, &padded).bytes(), expected);
}

fn a_tagged_frame_is_left_alone(wire: Wire) {
    let (node, talk) = to_remote(wire);
    node.arrives_tagged(POD1, 42, &talk.opening()).is_left_alone();
    let mut inside = talk.opening().bytes();
    inside.splice(12..12, [0x81, 0x00, 0x00, 42]);
    node.arrives_as(POD1, &inside).is_left_alone();
    talk.is_opened(&node);
}

pub(crate) fn a_packet_to_a_cluster_ip_that_is_cut_off_is_dropped(wire: Wire) {
    let (node, talk) = to_remote(wire);
    let enough = if wire.protocol == Protocol::Tcp { 14 } else { 4 };
    for kept in [0, 1, 3, enough - 1] {
        node.arrives(POD1, &talk.opening().cut_behind_ip(kept)).is_dropped(Outcome::DropTruncated);
    }
}

pub(crate) fn a_packet_to_anybody_else_that_is_cut_off_is_left_alone(wire: Wire) {
    let (node, talk) = to_remote(wire);
    node.arrives(POD1, &at(POD1, wire.opening(talk.client, talk.endpoint)).cut_behind_ip(3)).is_left_alone();
}

fn everything_else_in_the_header_stays(wire: Wire) {
    let (node, talk) = to_remote(wire);
    let dress = |packet: Packet| packet.with_tos(0xb8 | 0x02).with_ttl(3).with_id(0xffff);
    talk.goes(&node, Outcome::RequestNew, &dress(talk.opening()));
    talk.comes(&node, Outcome::ReplyHalfOpen, &dress(talk.answer()));
    talk.goes(&node, Outcome::RequestHalfOpen, &dress(talk.talk()));
}

fn a_packet_that_stands_for_several_segments_stays_whole(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.is_opened(&node);
    let large = talk.talk().carrying(&[0x5a; 2800]);
    node.arrives_large(POD1, 1400, &large).becomes(Outcome::Request, &large.clone().to(talk.endpoint));
}

pub(crate) fn a_header_that_makes_no_sense_is_left_to_the_kernel(family: IpFamily) {
    let (node, talk) = to_remote(wire(family, Protocol::Tcp));
    node.arrives(POD1, &talk.opening().claiming_version(5)).passes(Outcome::Malformed);
    node.leaves(POD1, &talk.answer().claiming_version(5)).passes(Outcome::Malformed);
    if family == IpFamily::V4 {
        for words in [0, 4] {
            node.arrives(POD1, &talk.opening().claiming_header_words(words)).passes(Outcome::Malformed);
        }
    }
}

pub(crate) fn a_packet_that_cannot_be_rewritten_is_dropped(family: IpFamily) {
    // The flags are there, the checksum is not.
    let (node, talk) = to_remote(wire(family, Protocol::Tcp));
    node.arrives(POD1, &talk.opening().cut_behind_ip(14)).is_dropped(Outcome::DropHelper);
    let node = Node::serving(&[&web(talk.wire)]);
    node.arrives(POD1, &talk.opening().cut_behind_ip(14)).is_dropped(Outcome::DropHelper);
}

#[test]
fn what_is_not_ip_is_left_alone() {
    const ARP: [u8; 2] = [0x08, 0x06];
    let node = Node::start();
    let mut frame = [POD1.mac, POD1.peer].concat();
    frame.extend(ARP);
    frame.extend([0, 1, 8, 0, 6, 4, 0, 1]);
    frame.resize(60, 0);
    node.arrives_as(POD1, &frame).is_left_alone();
}

#[test]
fn what_is_nobodys_service_is_left_alone() {
    for wire in [Wire::TCP_V4, Wire::TCP_V6, Wire::UDP_V4, Wire::UDP_V6] {
        let (node, talk) = to_remote(wire);
        let world = SocketAddr::new(world::client(wire.family), 443);
        node.arrives(POD1, &at(POD1, wire.opening(talk.client, world))).is_left_alone();
        node.leaves(POD1, &out_of(POD1, wire.answer(world, talk.client))).is_left_alone();
        node.arrives(POD1, &at(POD1, wire.opening(talk.client, talk.endpoint))).is_left_alone();
        node.arrives(UPLINK, &at(UPLINK, wire.opening(world, wire.at(world::node, 22)))).is_left_alone();
    }
}

#[test]
fn the_expected_checksums_are_those_of_the_standard() {
    // RFC 1071 §3's own example.
    assert_eq!(internet_checksum(&[&[0x00, 0x01, 0xf2, 0x03, 0xf4, 0xf5, 0xf6, 0xf7]]), !0xddf2);
}
