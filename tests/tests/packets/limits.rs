//! Full tables, late readers, and the counters of a port.

use fairlead_tests::packet::world::{self, POD1};
use fairlead_tests::packet::{Node, Settings, Table, Wire};
use proxy_agent::dataplane::load;
use proxy_agent::model::{IpFamily, Protocol};
use proxy_common::{Outcome, V4, V6};

use crate::cases::{PORT, TARGET, Talk, to_remote, web};

wires! {
    when_flows_is_full_new_flows_work_half_open,
    a_pair_that_fits_only_by_half_is_not_kept,
    pitfall_p1_7_a_slot_that_changed_hands_is_not_used,
    a_port_counts_its_new_flows_and_refused_packets,
    a_node_on_used_programs_is_as_a_new_one,
}

/// A flow that would be confirmed if there were room.
fn is_not_kept(node: &Node, talk: &Talk) {
    talk.goes(node, Outcome::RequestNew, &talk.opening());
    talk.comes(node, Outcome::ReplyHalfOpen, &talk.answer());
    if talk.wire.protocol == Protocol::Tcp {
        talk.goes(node, Outcome::FlowsFull, &talk.talk());
        talk.comes(node, Outcome::ReplyHalfOpen, &talk.reply());
        talk.goes(node, Outcome::FlowsFull, &talk.talk());
    } else {
        node.maps.let_last(talk.client.port());
        talk.goes(node, Outcome::RequestHalfOpen, &talk.talk());
        talk.comes(node, Outcome::FlowsFull, &talk.reply());
        talk.goes(node, Outcome::RequestHalfOpen, &talk.talk());
    }
}

pub(crate) fn when_flows_is_full_new_flows_work_half_open(wire: Wire) {
    let first = Talk::to(wire, wire.at(world::remote, TARGET));
    let mut node = Node::start_with(Settings { flows: 2, ..Settings::default() });
    node.apply(&web(wire).elsewhere(first.endpoint.ip()));
    first.is_opened(&node);
    is_not_kept(&node, &first.on_port(40_001));
    first.goes_on(&node);
}

fn a_pair_that_fits_only_by_half_is_not_kept(wire: Wire) {
    let first = Talk::to(wire, wire.at(world::remote, TARGET));
    let mut node = Node::start_with(Settings { flows: 3, ..Settings::default() });
    node.apply(&web(wire).elsewhere(first.endpoint.ip()));
    first.is_opened(&node);
    is_not_kept(&node, &first.on_port(40_001));
    assert_eq!(node.maps.count(Table::Confirmed), 2, "half a pair is left:\n{}", node.maps.describe());
}

pub(crate) fn pitfall_p1_7_a_slot_that_changed_hands_is_not_used(wire: Wire) {
    const SOMEBODY_ELSE: u32 = 200;
    let (mut node, talk) = to_remote(wire);
    match wire.family {
        IpFamily::V4 => node.maps.change_slots::<V4>(|slot| slot.owner = SOMEBODY_ELSE),
        IpFamily::V6 => node.maps.change_slots::<V6>(|slot| slot.owner = SOMEBODY_ELSE),
    }
    node.arrives(POD1, &talk.opening()).is_dropped(Outcome::DropSlotRace);
    assert_eq!(node.maps.count(Table::HalfOpen), 0);
}

fn a_port_counts_its_new_flows_and_refused_packets(wire: Wire) {
    let (mut node, talk) = to_remote(wire);
    let port_id = node.port_id("web", wire.protocol, PORT, wire.family);
    assert_eq!(node.maps.port_stats(port_id), (0, 0));
    talk.goes(&node, Outcome::RequestNew, &talk.opening());
    // A repeated packet is no new flow.
    talk.goes(&node, Outcome::RequestHalfOpen, &talk.opening());
    talk.is_confirmed(&node);
    talk.goes_on(&node);
    assert_eq!(node.maps.port_stats(port_id), (1, 0));
    node.apply(&web(wire));
    let refused = talk.on_port(40_001);
    assert_eq!(node.arrives(POD1, &refused.opening()).counted(), [Outcome::RejectNoEndpoint]);
    assert_eq!(node.maps.port_stats(port_id), (1, 1));
}

fn a_node_on_used_programs_is_as_a_new_one(wire: Wire) {
    // Sizes of its own: nobody has used this one.
    let new = Node::start_with(Settings { flows: 1025, ..Settings::default() }).contents();
    let (mut used, talk) = to_remote(wire);
    talk.is_opened(&used);
    used.apply(&web(wire));
    assert_eq!(used.arrives(POD1, &talk.on_port(40_001).opening()).counted(), [Outcome::RejectNoEndpoint]);
    assert_ne!(used.contents(), new);
    assert!(used.start_again().contents() == new, "something is left");
}

#[test]
fn every_program_passes_the_verifier() {
    Node::start().load_all();
}

/// Packets of flat devices cannot be made here: a test run always brings an Ethernet header.
#[test]
fn every_program_of_flat_devices_passes_the_verifier() {
    load::verify(load::FLAT_OBJECT).unwrap_or_else(|error| panic!("{error}"));
}
