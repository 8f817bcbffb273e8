//! A pod that is its own endpoint: what is not the beginning of a conversation, or its end. The conversations themselves
//! stand in `masquerade`.

use fairlead_tests::packet::world::{self, POD1, POD2};
use fairlead_tests::packet::{Packet, Settings, Wire};
use proxy_agent::model::IpFamily;
use proxy_common::Outcome;
use proxy_common::abi::tc_index;

use crate::cases::{PORT, TARGET, at, out_of, unreachable_for, web};
use crate::masquerade::{NODE_PORT, Way, serving, to_itself};

wires! {
    what_a_pod_refuses_of_itself_is_told_to_it_about_its_own_packet,
    fragments_of_what_a_pod_sends_to_itself_follow_the_first,
}

families! {
    datagrams_of_a_pod_to_itself_move_when_it_is_no_endpoint_any_more,
    datagrams_of_a_pod_move_to_itself_when_it_is_the_endpoint,
}

/// No process of the pod listens: the kernel in it says so, of the packet as it came.
fn what_a_pod_refuses_of_itself_is_told_to_it_about_its_own_packet(wire: Wire) {
    let way = to_itself(wire, wire.at(world::vip, PORT));
    for whole in [false, true] {
        let node = serving(&way, Settings::default());
        let seen = way.goes(&node, Outcome::RequestNew, &way.opening());
        let met = way.leaving(&way.opening()).from(seen);
        let header = if met.is_v4() { 20 } else { 40 };
        let quoted = if whole { met.bytes().len() - 14 } else { header + 8 };
        let about = |packet: Packet| unreachable_for(&packet, quoted);
        let between = about(met.clone().from(way.client));
        node.arrives(POD1, &about(met)).goes_back(
            Outcome::IcmpError,
            tc_index::NOT_OURS,
            &between.clone().turned_round(),
        );
        let home = about(way.leaving(&way.opening()).to(way.vip));
        let leaving = out_of(POD1, between);
        node.leaves(POD1, &leaving).becomes_reply(Outcome::IcmpError, &out_of(POD1, home));
    }
}

fn fragments_of_what_a_pod_sends_to_itself_follow_the_first(wire: Wire) {
    let way = to_itself(wire, wire.at(world::vip, PORT));
    let node = serving(&way, Settings::default());
    let later = |packet: &Packet| packet.clone().as_fragment(3, false).carrying(b"the rest of something");
    let first = way.opening().as_fragment(0, true);
    let seen = way.goes(&node, Outcome::RequestNew, &first);
    let rest = later(&first);
    let expected = rest.clone().to(way.endpoint).turned_round();
    node.arrives(POD1, &rest).goes_back(Outcome::Fragment, tc_index::REQUEST_SNAT, &expected);
    let leaving = way.leaving(&rest);
    let ran = node.leaves_marked(POD1, tc_index::REQUEST_SNAT, &leaving);
    ran.becomes(Outcome::Fragment, &leaving.clone().from(seen));
    // And back.
    let answer = at(POD1, wire.answer(way.endpoint, seen)).as_fragment(0, true);
    for (packet, outcomes) in [
        (answer.clone(), [Outcome::Unmasqueraded, Outcome::ReplyHalfOpen]),
        (later(&answer), [Outcome::Fragment, Outcome::Fragment]),
    ] {
        let back = packet.clone().to(way.client);
        node.arrives(POD1, &packet).goes_back(outcomes[0], tc_index::NOT_OURS, &back.clone().turned_round());
        let leaving = out_of(POD1, back);
        node.leaves(POD1, &leaving).becomes_reply(outcomes[1], &leaving.clone().from(way.vip));
    }
}

/// A pod's datagrams by a NodePort: to itself, and to its neighbour.
fn itself_and_its_neighbour(family: IpFamily) -> [Way; 2] {
    let wire = if family == IpFamily::V4 { Wire::UDP_V4 } else { Wire::UDP_V6 };
    let itself = to_itself(wire, wire.at(world::node, NODE_PORT));
    [itself, Way { endpoint: wire.at(world::pod2, TARGET), leaves_by: POD2, turned: false, ..itself }]
}

/// The endpoint of one way is replaced by that of the other while datagrams are exchanged, and comes back.
#[track_caller]
fn datagrams_move(first: Way, next: Way) {
    let mut node = serving(&first, Settings::default());
    let mut seen = first.works(&node);
    for [old, new] in [[first, next], [next, first]] {
        node.apply(&web(new.wire).node_port(NODE_PORT).elsewhere(new.endpoint.ip()));
        let before = seen;
        seen = new.goes(&node, Outcome::RequestNew, &new.talk());
        new.comes(&node, seen, Outcome::ReplyHalfOpen, Wire::answer);
        node.maps.let_last(new.client.port());
        assert_eq!(new.goes(&node, Outcome::RequestHalfOpen, &new.talk()), seen);
        new.comes(&node, seen, Outcome::ReplyHalfOpen, Wire::talk);
        assert_eq!(new.goes(&node, Outcome::Request, &new.talk()), seen);
        new.comes(&node, seen, Outcome::Reply, Wire::talk);
        // Whoever has gone has something to say after all: it must not come from the Service.
        let late = at(old.leaves_by, old.wire.talk(old.endpoint, before));
        let routed = late.clone().to(old.client);
        let ran = node.arrives(old.leaves_by, &late);
        if old.turned {
            ran.goes_back(Outcome::Unmasqueraded, tc_index::NOT_OURS, &routed.clone().turned_round());
        } else {
            ran.becomes(Outcome::Unmasqueraded, &routed);
        }
        node.leaves(old.came_by, &out_of(old.came_by, routed)).is_left_alone();
        assert_eq!(new.goes(&node, Outcome::Request, &new.talk()), seen);
    }
}

fn datagrams_of_a_pod_to_itself_move_when_it_is_no_endpoint_any_more(family: IpFamily) {
    let [itself, neighbour] = itself_and_its_neighbour(family);
    datagrams_move(itself, neighbour);
}

fn datagrams_of_a_pod_move_to_itself_when_it_is_the_endpoint(family: IpFamily) {
    let [itself, neighbour] = itself_and_its_neighbour(family);
    datagrams_move(neighbour, itself);
}
