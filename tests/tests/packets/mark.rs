//! Replies that are to leave by the uplink of their requests are marked where they arrive (`--reply-mark`), before the
//! routes are asked.

use std::net::SocketAddr;

use fairlead_tests::packet::world::{self, POD1, POD2, UPLINK};
use fairlead_tests::packet::{Node, Packet, Service, Settings, Wire};
use proxy_common::Outcome;
use proxy_common::abi::tc_index;

use crate::cases::{PORT, TARGET, at, by_now, out_of, web};

wires! {
    a_reply_is_marked_from_its_first_packet_on,
    a_masqueraded_flows_reply_is_marked,
    later_fragments_of_a_reply_are_marked,
    a_reply_between_pods_is_not_marked,
    requests_and_strangers_are_not_marked,
    without_the_option_nothing_is_marked,
}

const NODE_PORT: u16 = 30_080;
/// Ours, and what the uplink has of it.
const MASK: u32 = 0x3000;
const BY_UPLINK: u32 = 0x2000;
/// Somebody else's bits.
const OTHERS: u32 = 0x000a_4001;

fn on_node_port(wire: Wire) -> Service {
    web(wire).node_port(NODE_PORT)
}

fn marking(service: &Service) -> Node {
    let mut node = Node::start_with(Settings { reply_mark: MASK, ..Settings::default() });
    node.mark_replies_by(UPLINK, BY_UPLINK);
    node.apply(service);
    node
}

/// The NodePort's first packet from outside has gone on to the endpoint: client, NodePort, endpoint.
#[track_caller]
fn opened(node: &Node, wire: Wire) -> [SocketAddr; 3] {
    let (client, here) = (wire.at(world::client, 51_234), wire.at(world::node, NODE_PORT));
    let endpoint = wire.at(world::pod1, TARGET);
    let opening = at(UPLINK, wire.opening(client, here));
    node.arrives(UPLINK, &opening).becomes(Outcome::RequestNew, &opening.clone().to(endpoint));
    [client, here, endpoint]
}

/// What arrives goes on as it came, with this mark.
#[track_caller]
fn is_marked(node: &Node, packet: &Packet, mark: u32) {
    for before in [0, OTHERS, OTHERS | MASK] {
        let ran = node.arrives_with_mark(POD1, before, packet);
        let expected = if mark == 0 { before } else { before & !MASK | mark };
        assert_eq!(ran.mark(), expected, "of {before:#x}");
        ran.is_left_alone();
    }
}

fn a_reply_is_marked_from_its_first_packet_on(wire: Wire) {
    let node = marking(&on_node_port(wire).external_local().here(world::pod1(wire.family)));
    let [client, here, endpoint] = opened(&node, wire);
    is_marked(&node, &at(POD1, wire.answer(endpoint, client)), BY_UPLINK);
    let answer = out_of(UPLINK, wire.answer(endpoint, client));
    node.leaves(UPLINK, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(here));
    let further = at(UPLINK, wire.talk(client, here));
    node.arrives(UPLINK, &further).becomes(Outcome::RequestHalfOpen, &further.clone().to(endpoint));
    let reply = out_of(UPLINK, wire.talk(endpoint, client));
    node.leaves(UPLINK, &reply).becomes(by_now(wire, Outcome::Reply), &reply.clone().from(here));
    is_marked(&node, &at(POD1, wire.talk(endpoint, client)), BY_UPLINK);
}

fn a_masqueraded_flows_reply_is_marked(wire: Wire) {
    let node = marking(&on_node_port(wire).here(world::pod1(wire.family)));
    let (client, here) = (wire.at(world::client, 51_234), wire.at(world::node, NODE_PORT));
    let endpoint = wire.at(world::pod1, TARGET);
    let opening = at(UPLINK, wire.opening(client, here));
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &opening.clone().to(endpoint));
    let leaving = out_of(POD1, opening.to(endpoint));
    let ran = node.leaves_marked(POD1, tc_index::REQUEST_SNAT, &leaving);
    let seen = ran.source();
    ran.becomes(Outcome::Masqueraded, &leaving.from(seen));
    let answer = at(POD1, wire.answer(endpoint, seen));
    let ran = node.arrives_with_mark(POD1, OTHERS, &answer);
    assert_eq!(ran.mark(), OTHERS & !MASK | BY_UPLINK);
    ran.becomes(Outcome::Unmasqueraded, &answer.clone().to(client));
}

fn later_fragments_of_a_reply_are_marked(wire: Wire) {
    let node = marking(&on_node_port(wire).external_local().here(world::pod1(wire.family)));
    let [client, here, endpoint] = opened(&node, wire);
    let first = wire.answer(endpoint, client).as_fragment(0, true);
    let later = wire.answer(endpoint, client).as_fragment(3, false).carrying(b"the rest of it");
    // Nothing is known of its datagram yet.
    is_marked(&node, &at(POD1, later.clone()), 0);
    is_marked(&node, &at(POD1, first.clone()), BY_UPLINK);
    let leaving = out_of(UPLINK, first);
    node.leaves(UPLINK, &leaving).becomes(Outcome::ReplyHalfOpen, &leaving.clone().from(here));
    is_marked(&node, &at(POD1, later), BY_UPLINK);
}

fn a_reply_between_pods_is_not_marked(wire: Wire) {
    let node = marking(&web(wire).here(world::pod1(wire.family)));
    let (client, vip) = (wire.at(world::pod2, 40_000), wire.at(world::vip, PORT));
    let endpoint = wire.at(world::pod1, TARGET);
    let opening = at(POD2, wire.opening(client, vip));
    node.arrives(POD2, &opening).becomes(Outcome::RequestNew, &opening.clone().to(endpoint));
    is_marked(&node, &at(POD1, wire.answer(endpoint, client)), 0);
}

fn requests_and_strangers_are_not_marked(wire: Wire) {
    let node = marking(&on_node_port(wire).external_local().here(world::pod1(wire.family)));
    let (client, here) = (wire.at(world::client, 51_234), wire.at(world::node, NODE_PORT));
    let endpoint = wire.at(world::pod1, TARGET);
    let opening = at(UPLINK, wire.opening(client, here));
    let ran = node.arrives_with_mark(UPLINK, OTHERS, &opening);
    assert_eq!(ran.mark(), OTHERS);
    ran.becomes(Outcome::RequestNew, &opening.clone().to(endpoint));
    is_marked(&node, &at(POD1, wire.answer(endpoint, wire.at(world::client, 51_235))), 0);
    is_marked(&node, &at(POD1, Packet::echo(endpoint.ip(), client.ip())), 0);
}

fn without_the_option_nothing_is_marked(wire: Wire) {
    let mut node = Node::serving(&[&on_node_port(wire).external_local().here(world::pod1(wire.family))]);
    node.mark_replies_by(UPLINK, BY_UPLINK);
    let [client, _, endpoint] = opened(&node, wire);
    is_marked(&node, &at(POD1, wire.answer(endpoint, client)), 0);
}
