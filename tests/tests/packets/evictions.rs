//! `NEW` forgets its oldest: either half of a half-open flow may go at any time, and the flow must not notice.

use fairlead_tests::packet::world::{self, POD1, UPLINK};
use fairlead_tests::packet::{ACK, FIN, Node, Table, Wire};
use proxy_agent::model::{IpFamily, Protocol};
use proxy_common::abi::Flow;
use proxy_common::{Family, Outcome, V4, V6};

use crate::cases::{CLIENT_PORT, PORT, TARGET, Talk, at, to_remote, web};

families! {
    a_handshake_whose_reply_entry_was_evicted_is_completed,
    a_repeated_syn_makes_the_reply_entry_again,
    datagrams_make_the_reply_entry_again,
    a_handshake_whose_owner_entry_was_evicted_is_completed_by_another_syn,
    a_process_of_the_node_completes_its_handshake_after_the_owner_entry_was_evicted,
    a_late_answer_after_the_owner_entry_was_evicted_does_not_confirm_two_endpoints,
    a_late_answer_of_a_lasting_flow_that_moved_is_dropped,
    datagrams_keep_their_endpoint_when_the_run_settles,
    a_fin_that_confirms_is_noted,
}

const fn wire(family: IpFamily, protocol: Protocol) -> Wire {
    Wire { family, protocol }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Half {
    Owner,
    Reply,
}

fn evict(node: &mut Node, family: IpFamily, half: Half) {
    match family {
        IpFamily::V4 => evict_in::<V4>(node, half),
        IpFamily::V6 => evict_in::<V6>(node, half),
    }
}

fn evict_in<F: Family>(node: &mut Node, half: Half) {
    let wanted = |(_, flow): &(_, Flow<F>)| (flow.flags & Flow::<F>::REPLY != 0) == (half == Half::Reply);
    let found = node.maps.flows::<F>(Table::HalfOpen).into_iter().find(wanted);
    let (key, _) = found.expect("the half that is to be evicted is there");
    node.maps.remove_flow(Table::HalfOpen, &key);
}

fn a_handshake_whose_reply_entry_was_evicted_is_completed(family: IpFamily) {
    let (mut node, talk) = to_remote(wire(family, Protocol::Tcp));
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
    evict(&mut node, family, Half::Reply);
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.segment(ACK));
    talk.goes_on(&node);
}

fn a_repeated_syn_makes_the_reply_entry_again(family: IpFamily) {
    let (mut node, talk) = to_remote(wire(family, Protocol::Tcp));
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
    evict(&mut node, family, Half::Reply);
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.opening());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.segment(ACK));
    talk.goes_on(&node);
}

fn datagrams_make_the_reply_entry_again(family: IpFamily) {
    let wire = wire(family, Protocol::Udp);
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let mut node = Node::serving(&[&web(wire).elsewhere(world::remote2(family))]);
    // The run moves, so that both halves are stored.
    node.apply(&web(wire).elsewhere(talk.endpoint.ip()));
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    evict(&mut node, family, Half::Reply);
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.talk());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.reply());
}

fn a_handshake_whose_owner_entry_was_evicted_is_completed_by_another_syn(family: IpFamily) {
    let (mut node, talk) = to_remote(wire(family, Protocol::Tcp));
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
    evict(&mut node, family, Half::Owner);
    // Nothing tells any more that the endpoint was heard.
    assert_eq!(node.arrives(POD1, &talk.segment(ACK)).counted(), [Outcome::RejectNoFlow]);
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.opening());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.segment(ACK));
    talk.goes_on(&node);
}

fn a_process_of_the_node_completes_its_handshake_after_the_owner_entry_was_evicted(family: IpFamily) {
    let wire = wire(family, Protocol::Tcp);
    let (vip, endpoint) = (wire.at(world::vip, PORT), wire.at(world::remote, TARGET));
    let process = wire.at(world::node, 50_000);
    let mut node = Node::serving(&[&web(wire).elsewhere(endpoint.ip())]);
    let opening = wire.opening(process, vip).on_wire(UPLINK.mac, UPLINK.peer);
    let answer = at(UPLINK, wire.answer(endpoint, process));
    node.sends(UPLINK, &opening).is_redirected(Outcome::RequestNew, &opening.clone().to(endpoint));
    node.arrives(UPLINK, &answer).is_redirected(Outcome::ReplyHalfOpen, &answer.clone().from(vip));
    evict(&mut node, family, Half::Owner);
    node.sends(UPLINK, &opening).is_redirected(Outcome::RequestHalfOpen, &opening.clone().to(endpoint));
    let further = wire.talk(process, vip).on_wire(UPLINK.mac, UPLINK.peer);
    for outcome in [Outcome::RequestHalfOpen, Outcome::Request] {
        node.sends(UPLINK, &further).is_redirected(outcome, &further.clone().to(endpoint));
    }
    // The other half, with the way back to the process in it.
    let answer = at(UPLINK, wire.talk(endpoint, process));
    node.arrives(UPLINK, &answer).is_redirected(Outcome::Reply, &answer.clone().from(vip));
}

fn a_late_answer_after_the_owner_entry_was_evicted_does_not_confirm_two_endpoints(family: IpFamily) {
    let wire = wire(family, Protocol::Udp);
    let first = Talk::to(wire, wire.at(world::remote, TARGET));
    let second = Talk::to(wire, wire.at(world::remote2, TARGET));
    let mut node = Node::serving(&[&web(wire).here(world::pod2(family))]);
    node.apply(&web(wire).elsewhere(first.endpoint.ip()));
    first.goes(&node, Outcome::RequestNew, &first.opening());
    evict(&mut node, family, Half::Owner);
    node.apply(&web(wire).elsewhere(second.endpoint.ip()));
    second.goes(&node, Outcome::RequestNew, &second.opening());
    node.maps.let_last(CLIENT_PORT);
    node.leaves(POD1, &first.answer()).is_dropped(Outcome::DropTupleClash);
    second.comes(&node, Outcome::ReplyHalfOpen, &second.reply());
    second.goes_on(&node);
}

fn a_late_answer_of_a_lasting_flow_that_moved_is_dropped(family: IpFamily) {
    let wire = wire(family, Protocol::Udp);
    let (mut node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    let next = Talk::to(wire, wire.at(world::remote2, TARGET));
    node.apply(&web(wire).elsewhere(next.endpoint.ip()));
    next.goes(&node, Outcome::RequestNew, &next.opening());
    node.maps.let_last(CLIENT_PORT);
    node.leaves(POD1, &talk.answer()).is_dropped(Outcome::DropTupleClash);
}

fn datagrams_keep_their_endpoint_when_the_run_settles(family: IpFamily) {
    let wire = wire(family, Protocol::Udp);
    let few = web(wire).elsewhere(world::remote(family)).elsewhere(world::remote2(family));
    let mut node = Node::serving(&[&few]);
    let talks: Vec<_> = (CLIENT_PORT..CLIENT_PORT + 24)
        .map(|port| {
            let mut talk = Talk::to(wire, wire.at(world::remote, TARGET)).on_port(port);
            talk.endpoint = node.arrives(POD1, &talk.opening()).destination();
            talk
        })
        .collect();
    let more = (50..60).map(|last| match family {
        IpFamily::V4 => format!("10.244.2.{last}"),
        IpFamily::V6 => format!("fd00:10:244:2::{last}"),
    });
    node.apply(&more.fold(few, |service, addr| service.elsewhere(addr.parse().expect("an address"))));
    for talk in &talks {
        talk.goes(&node, Outcome::RequestHalfOpen, &talk.talk());
    }
    node.come_to_rest();
    for talk in &talks {
        talk.goes(&node, Outcome::RequestHalfOpen, &talk.talk());
    }
}

fn a_fin_that_confirms_is_noted(family: IpFamily) {
    let wire = wire(family, Protocol::Tcp);
    let (mut node, talk) = to_remote(wire);
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.segment(FIN | ACK));
    talk.comes(&node, Outcome::Reply, &talk.segment_back(FIN | ACK));
    // Both sides have ended: a SYN begins anew, with whom serves now.
    let next = Talk::to(wire, wire.at(world::remote2, TARGET));
    node.apply(&web(wire).elsewhere(next.endpoint.ip()));
    next.is_opened(&node);
}
