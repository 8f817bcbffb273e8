//! A flow's life: begun, half open, confirmed, ended, begun anew.

use fairlead_tests::packet::world::{self, POD1, POD2};
use fairlead_tests::packet::{ACK, FIN, Node, RST, SYN, Service, Table, Wire};
use proxy_agent::model::IpFamily;
use proxy_common::abi::Flow;
use proxy_common::{Outcome, V4};

use crate::cases::{CLIENT_PORT, PORT, TARGET, Talk, at, other, reset_for, to_remote, unreachable_for, web};

wires! {
    the_first_packet_goes_to_an_endpoint_and_the_reply_comes_from_the_service,
    a_second_packet_before_the_reply_goes_to_the_same_endpoint,
    pitfall_p1_1_the_reply_of_an_endpoint_here_is_translated_where_it_leaves_not_where_it_arrives,
    a_half_open_flow_keeps_its_endpoint_when_the_run_changes,
    a_flow_that_began_after_a_change_keeps_its_endpoint_when_the_change_settles,
    a_half_open_flow_gives_up_its_tuple_after_a_while,
    a_clock_that_is_a_second_behind_ends_no_flow,
    a_flow_knows_when_it_was_last_used,
    rule_65_a_confirmed_flow_survives_that_the_service_loses_its_endpoints,
    an_evicted_half_open_flow_is_made_anew_with_the_same_endpoint,
}

families! {
    a_reset_from_the_endpoint_does_not_confirm_a_flow,
    a_syn_ack_alone_does_not_confirm_a_connection,
    datagrams_that_do_not_last_stay_half_open,
    datagrams_in_three_seconds_of_the_clock_last,
    a_half_open_flow_in_use_does_not_grow_stale,
    a_syn_on_a_live_connection_follows_it,
    a_syn_after_one_fin_follows_the_connection,
    a_syn_after_the_fins_of_both_sides_begins_anew,
    a_syn_after_a_reset_begins_anew,
    rule_105_datagrams_move_when_their_endpoint_is_gone,
    rule_105_half_open_datagrams_move_when_their_endpoint_is_gone,
    rule_105_datagrams_stay_while_their_endpoint_serves,
    rule_107_datagrams_follow_a_target_port_that_changes,
    rule_108_datagrams_are_refused_when_the_last_endpoint_goes,
    rule_109_datagrams_end_with_their_service,
    rule_110_datagrams_that_were_refused_are_served_with_the_first_endpoint,
    rule_36_a_port_that_goes_takes_no_connection_with_it,
}

pub(crate) fn the_first_packet_goes_to_an_endpoint_and_the_reply_comes_from_the_service(wire: Wire) {
    let (node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    assert_eq!((node.maps.count(Table::HalfOpen), node.maps.count(Table::Confirmed)), (1, 0));
    talk.is_confirmed(&node);
    assert_eq!((node.maps.count(Table::HalfOpen), node.maps.count(Table::Confirmed)), (0, 2));
    talk.goes(&node, Outcome::Request, &talk.talk());
    talk.comes(&node, Outcome::Reply, &talk.reply());
    assert_eq!((node.maps.count(Table::HalfOpen), node.maps.count(Table::Confirmed)), (0, 2));
}

/// The Service with three endpoints on the other node.
fn with_three(wire: Wire) -> Service {
    let [first, second] = [world::remote, world::remote2].map(|addr| addr(wire.family));
    web(wire).elsewhere(first).elsewhere(second).here(world::pod2(wire.family))
}

/// A conversation with whichever endpoint was chosen for its first packet.
fn begin(node: &Node, wire: Wire, client_port: u16) -> Talk {
    let mut talk = Talk::to(wire, wire.at(world::remote, TARGET)).on_port(client_port);
    talk.endpoint = node.arrives(POD1, &talk.opening()).destination();
    talk
}

pub(crate) fn a_second_packet_before_the_reply_goes_to_the_same_endpoint(wire: Wire) {
    let node = Node::serving(&[&with_three(wire)]);
    for port in CLIENT_PORT..CLIENT_PORT + 8 {
        let talk = begin(&node, wire, port);
        talk.goes(&node, Outcome::RequestHalfOpen, &talk.opening());
        talk.is_confirmed(&node);
        talk.goes_on(&node);
    }
}

fn pitfall_p1_1_the_reply_of_an_endpoint_here_is_translated_where_it_leaves_not_where_it_arrives(wire: Wire) {
    let talk = Talk::to(wire, wire.at(world::pod2, TARGET));
    let mut node = Node::serving(&[&web(wire).here(talk.endpoint.ip())]);
    // The client is an endpoint itself, and direct packets are looked up: the reply is, where it arrives.
    node.apply(&other(wire).here(talk.client.ip()));
    node.maps.configure(|config| config.direct_rewrites = 1);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    node.arrives(POD2, &at(POD2, wire.answer(talk.endpoint, talk.client))).is_left_alone();
    talk.is_confirmed(&node);
    node.arrives(POD2, &at(POD2, wire.talk(talk.endpoint, talk.client))).is_left_alone();
    talk.goes_on(&node);
}

fn a_half_open_flow_keeps_its_endpoint_when_the_run_changes(wire: Wire) {
    let mut node = Node::serving(&[&with_three(wire)]);
    let talks: Vec<_> = (CLIENT_PORT..CLIENT_PORT + 8).map(|port| begin(&node, wire, port)).collect();
    let many = (50..60).map(|last| match wire.family {
        IpFamily::V4 => format!("10.244.2.{last}"),
        IpFamily::V6 => format!("fd00:10:244:2::{last}"),
    });
    node.apply(&many.fold(with_three(wire), |service, addr| service.elsewhere(addr.parse().expect("an address"))));
    for talk in &talks {
        talk.goes(&node, Outcome::RequestHalfOpen, &talk.opening());
        talk.goes(&node, Outcome::RequestHalfOpen, &talk.opening());
        talk.is_confirmed(&node);
        talk.goes_on(&node);
    }
}

fn a_flow_that_began_after_a_change_keeps_its_endpoint_when_the_change_settles(wire: Wire) {
    let service = with_three(wire);
    let mut node = Node::serving(&[&service.clone().deserted().elsewhere(world::remote(wire.family))]);
    node.apply(&service);
    let talks: Vec<_> = (CLIENT_PORT..CLIENT_PORT + 8).map(|port| begin(&node, wire, port)).collect();
    node.come_to_rest();
    for talk in &talks {
        talk.goes(&node, Outcome::RequestHalfOpen, &talk.opening());
        talk.is_confirmed(&node);
        talk.goes_on(&node);
    }
    assert_eq!(node.maps.count(Table::HalfOpen), 0, "both halves are promoted:\n{}", node.maps.describe());
}

fn a_half_open_flow_gives_up_its_tuple_after_a_while(wire: Wire) {
    let (mut node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    node.maps.age(31);
    node.leaves(POD1, &talk.answer()).is_left_alone();
    // The client asks again, and is served again.
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.opening());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
}

/// Two builds side by side, or two CPUs, may read the clock a tick apart.
fn a_clock_that_is_a_second_behind_ends_no_flow(wire: Wire) {
    const AHEAD: u32 = 1_u32.wrapping_neg();
    let (mut node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    node.maps.age(AHEAD);
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
    node.maps.age(AHEAD);
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.opening());
    let lasting = |flags: u16| flags & Flow::<V4>::LASTING != 0;
    assert!(!node.maps.flows::<V4>(Table::HalfOpen).iter().any(|(_, flow)| lasting(flow.flags)));
    assert!(!node.maps.flows::<proxy_common::V6>(Table::HalfOpen).iter().any(|(_, flow)| lasting(flow.flags)));
    talk.is_confirmed(&node);
    talk.goes_on(&node);
}

fn a_flow_knows_when_it_was_last_used(wire: Wire) {
    let (mut node, talk) = to_remote(wire);
    talk.is_opened(&node);
    let idle = |node: &Node| {
        let now = proxy_agent::dataplane::sys::monotonic_secs();
        let v4 = node.maps.flows::<V4>(Table::Confirmed).into_iter().map(|(_, f)| (f.flags, f.last_seen_secs));
        let v6 = node.maps.flows::<proxy_common::V6>(Table::Confirmed).into_iter();
        let all = v4.chain(v6.map(|(_, f)| (f.flags, f.last_seen_secs)));
        let mut pair = (0, 0);
        for (flags, seen) in all {
            let secs = now.wrapping_sub(seen);
            if flags & Flow::<V4>::REPLY == 0 { pair.0 = secs } else { pair.1 = secs }
        }
        pair
    };
    node.maps.age(50);
    let (owner, reply) = idle(&node);
    assert!(owner >= 50 && reply >= 50, "idle for {owner} and {reply} s");
    talk.goes(&node, Outcome::Request, &talk.talk());
    let (owner, reply) = idle(&node);
    assert!(owner < 10 && reply >= 50, "idle for {owner} and {reply} s");
    talk.comes(&node, Outcome::Reply, &talk.reply());
    let (owner, reply) = idle(&node);
    assert!(owner < 10 && reply < 10, "idle for {owner} and {reply} s");
}

fn rule_65_a_confirmed_flow_survives_that_the_service_loses_its_endpoints(wire: Wire) {
    // Datagrams have no connection: theirs move with the endpoint (rule 105). Here it still serves, shutting down.
    let talk = Talk::to(wire, wire.at(world::pod2, TARGET));
    let mut node = Node::serving(&[&web(wire).here(talk.endpoint.ip())]);
    talk.is_opened(&node);
    let elsewhere = web(wire).shutting_down(talk.endpoint.ip()).elsewhere(world::remote(wire.family));
    node.apply(&elsewhere);
    talk.goes_on(&node);
    if wire.protocol == proxy_agent::model::Protocol::Tcp {
        node.apply(&web(wire));
        talk.goes_on(&node);
    }
}

fn an_evicted_half_open_flow_is_made_anew_with_the_same_endpoint(wire: Wire) {
    let mut node = Node::serving(&[&with_three(wire)]);
    let talk = begin(&node, wire, CLIENT_PORT);
    node.maps.clear(Table::HalfOpen);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
}

const fn tcp(family: IpFamily) -> Wire {
    Wire { family, protocol: proxy_agent::model::Protocol::Tcp }
}

const fn udp(family: IpFamily) -> Wire {
    Wire { family, protocol: proxy_agent::model::Protocol::Udp }
}

pub(crate) fn a_reset_from_the_endpoint_does_not_confirm_a_flow(family: IpFamily) {
    let (node, talk) = to_remote(tcp(family));
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    talk.comes(&node, Outcome::ReplyReset, &talk.segment_back(RST | ACK));
    assert_eq!((node.maps.count(Table::HalfOpen), node.maps.count(Table::Confirmed)), (1, 0));
}

/// Whoever sends SYNs from forged addresses gets SYN-ACKs for them, and no entry that stays.
fn a_syn_ack_alone_does_not_confirm_a_connection(family: IpFamily) {
    let (node, talk) = to_remote(tcp(family));
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
    // Repeated, because the answer was lost on its way.
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.opening());
    assert_eq!((node.maps.count(Table::HalfOpen), node.maps.count(Table::Confirmed)), (2, 0));
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.segment(RST));
    assert_eq!((node.maps.count(Table::HalfOpen), node.maps.count(Table::Confirmed)), (2, 0));
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.segment(ACK));
    assert_eq!((node.maps.count(Table::HalfOpen), node.maps.count(Table::Confirmed)), (0, 2));
    talk.goes_on(&node);
}

/// A query and its answer cost one entry, of a table that forgets its oldest.
fn datagrams_that_do_not_last_stay_half_open(family: IpFamily) {
    let (node, talk) = to_remote(udp(family));
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    for _ in 0..3 {
        talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
        talk.goes(&node, Outcome::RequestHalfOpen, &talk.talk());
    }
    // A second has passed, but not two.
    assert_eq!((node.maps.count(Table::HalfOpen), node.maps.count(Table::Confirmed)), (1, 0));
}

fn datagrams_in_three_seconds_of_the_clock_last(family: IpFamily) {
    let (mut node, talk) = to_remote(udp(family));
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
    for confirmed in [0, 2] {
        node.maps.age(1);
        talk.comes(&node, Outcome::ReplyHalfOpen, &talk.reply());
        assert_eq!(node.maps.count(Table::Confirmed), confirmed, "{}", node.maps.describe());
    }
    talk.goes_on(&node);
}

/// Both halves: one that only the other direction refreshed would be given up under traffic.
fn a_half_open_flow_in_use_does_not_grow_stale(family: IpFamily) {
    let wire = udp(family);
    let talk = Talk::to(wire, wire.at(world::pod2, TARGET));
    let mut node = Node::serving(&[&web(wire).here(world::remote(family))]);
    // The run moves, so that both halves are stored.
    node.apply(&web(wire).here(talk.endpoint.ip()));
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    assert_eq!(node.maps.count(Table::HalfOpen), 2, "{}", node.maps.describe());
    for _ in 0..3 {
        node.maps.age(20);
        talk.goes(&node, Outcome::RequestHalfOpen, &talk.talk());
    }
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.reply());
    assert_eq!(node.maps.count(Table::Confirmed), 2, "{}", node.maps.describe());
}

fn a_syn_on_a_live_connection_follows_it(family: IpFamily) {
    let (node, talk) = to_remote(tcp(family));
    talk.is_opened(&node);
    talk.goes(&node, Outcome::Request, &talk.opening());
    talk.goes_on(&node);
}

fn a_syn_after_one_fin_follows_the_connection(family: IpFamily) {
    for by_client in [true, false] {
        let (node, talk) = to_remote(tcp(family));
        talk.is_opened(&node);
        if by_client {
            talk.goes(&node, Outcome::Request, &talk.segment(FIN | ACK));
        } else {
            talk.comes(&node, Outcome::Reply, &talk.segment_back(FIN | ACK));
        }
        talk.goes(&node, Outcome::Request, &talk.opening());
    }
}

fn a_syn_after_the_fins_of_both_sides_begins_anew(family: IpFamily) {
    let wire = tcp(family);
    let (mut node, talk) = to_remote(wire);
    talk.is_opened(&node);
    talk.goes(&node, Outcome::Request, &talk.segment(FIN | ACK));
    talk.comes(&node, Outcome::Reply, &talk.segment_back(FIN | ACK));
    // What is still under way is delivered.
    talk.goes(&node, Outcome::Request, &talk.segment(ACK));
    talk.comes(&node, Outcome::Reply, &talk.segment_back(ACK));
    // Another endpoint has taken over meanwhile: only a new choice finds it.
    let next = Talk::to(wire, wire.at(world::remote2, TARGET));
    node.apply(&web(wire).elsewhere(next.endpoint.ip()));
    next.is_opened(&node);
    next.goes_on(&node);
}

fn a_syn_after_a_reset_begins_anew(family: IpFamily) {
    for by_client in [true, false] {
        let wire = tcp(family);
        let (mut node, talk) = to_remote(wire);
        talk.is_opened(&node);
        if by_client {
            talk.goes(&node, Outcome::Request, &talk.segment(RST));
        } else {
            talk.comes(&node, Outcome::Reply, &talk.segment_back(RST | ACK));
        }
        let next = Talk::to(wire, wire.at(world::remote2, TARGET));
        node.apply(&web(wire).elsewhere(next.endpoint.ip()));
        // A SYN with an ACK opens nothing.
        talk.goes(&node, Outcome::Request, &talk.segment(SYN | ACK));
        next.is_opened(&node);
    }
}

fn rule_105_datagrams_move_when_their_endpoint_is_gone(family: IpFamily) {
    let wire = udp(family);
    let (mut node, talk) = to_remote(wire);
    talk.is_opened(&node);
    let next = Talk::to(wire, wire.at(world::remote2, TARGET));
    node.apply(&web(wire).elsewhere(next.endpoint.ip()));
    next.goes(&node, Outcome::RequestNew, &next.talk());
    next.is_confirmed(&node);
    next.goes_on(&node);
}

fn rule_105_half_open_datagrams_move_when_their_endpoint_is_gone(family: IpFamily) {
    let wire = udp(family);
    let (mut node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    let next = Talk::to(wire, wire.at(world::remote2, TARGET));
    node.apply(&web(wire).elsewhere(next.endpoint.ip()));
    // Pinned, because the run has just changed; then that one goes as well.
    next.goes(&node, Outcome::RequestNew, &next.opening());
    let last = Talk::to(wire, wire.at(world::pod2, TARGET));
    node.apply(&web(wire).here(last.endpoint.ip()));
    last.goes(&node, Outcome::RequestNew, &last.opening());
    last.comes(&node, Outcome::ReplyHalfOpen, &last.answer());
    // The first one answers after all: the client must not hear two endpoints in one conversation.
    node.leaves(POD1, &talk.answer()).is_dropped(Outcome::DropTupleClash);
    last.is_confirmed(&node);
    last.goes_on(&node);
    node.leaves(POD1, &talk.answer()).is_dropped(Outcome::DropTupleClash);
    last.goes_on(&node);
}

fn rule_105_datagrams_stay_while_their_endpoint_serves(family: IpFamily) {
    let wire = udp(family);
    let talk = Talk::to(wire, wire.at(world::pod2, TARGET));
    let mut node = Node::serving(&[&web(wire).here(talk.endpoint.ip())]);
    talk.is_opened(&node);
    node.apply(&web(wire).shutting_down(talk.endpoint.ip()).elsewhere(world::remote(family)));
    talk.goes_on(&node);
}

fn rule_107_datagrams_follow_a_target_port_that_changes(family: IpFamily) {
    let wire = udp(family);
    let (mut node, talk) = to_remote(wire);
    talk.is_opened(&node);
    let next = Talk::to(wire, wire.at(world::remote, TARGET + 1));
    let moved = Service::new("web", &[world::vip(family)]).port(wire.protocol, PORT, TARGET + 1);
    node.apply(&moved.elsewhere(next.endpoint.ip()));
    next.goes(&node, Outcome::RequestNew, &next.talk());
    next.is_confirmed(&node);
    next.goes_on(&node);
}

fn rule_108_datagrams_are_refused_when_the_last_endpoint_goes(family: IpFamily) {
    let wire = udp(family);
    let (mut node, talk) = to_remote(wire);
    talk.is_opened(&node);
    node.apply(&web(wire));
    let quoted = if family == IpFamily::V4 { 28 } else { 48 };
    let datagram = talk.talk();
    node.arrives(POD1, &datagram).is_answered(Outcome::RejectNoEndpoint, &unreachable_for(&datagram, quoted));
    // The same socket finds the next one.
    let next = Talk::to(wire, wire.at(world::remote2, TARGET));
    node.apply(&web(wire).elsewhere(next.endpoint.ip()));
    next.goes(&node, Outcome::RequestNew, &next.talk());
}

fn rule_109_datagrams_end_with_their_service(family: IpFamily) {
    let wire = udp(family);
    let (mut node, talk) = to_remote(wire);
    talk.is_opened(&node);
    node.delete(&web(wire).elsewhere(talk.endpoint.ip()));
    node.arrives(POD1, &talk.talk()).is_left_alone();
}

fn rule_110_datagrams_that_were_refused_are_served_with_the_first_endpoint(family: IpFamily) {
    let wire = udp(family);
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let mut node = Node::serving(&[&web(wire)]);
    let quoted = if family == IpFamily::V4 { 28 } else { 48 };
    let datagram = talk.opening();
    node.arrives(POD1, &datagram).is_answered(Outcome::RejectNoEndpoint, &unreachable_for(&datagram, quoted));
    node.apply(&web(wire).elsewhere(talk.endpoint.ip()));
    talk.is_opened(&node);
    talk.goes_on(&node);
}

fn rule_36_a_port_that_goes_takes_no_connection_with_it(family: IpFamily) {
    let wire = tcp(family);
    let (mut node, talk) = to_remote(wire);
    talk.is_opened(&node);
    let on_another_port = Service::new("web", &[world::vip(family)]).port(wire.protocol, PORT + 1, TARGET);
    node.apply(&on_another_port.elsewhere(talk.endpoint.ip()));
    talk.goes_on(&node);
    let late = talk.on_port(talk.client.port() + 1).opening();
    node.arrives(POD1, &late).is_answered(Outcome::RejectUnknownPort, &reset_for(&late, ACK, 0, 0x1000_0001));
}
