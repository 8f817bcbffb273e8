//! `skb->tc_index`: what ingress tells egress, so that nothing is translated twice.

use fairlead_tests::packet::Wire;
use fairlead_tests::packet::world::{POD1, UPLINK};
use proxy_common::Outcome;
use proxy_common::abi::tc_index;

use crate::cases::{out_of, to_remote};

wires! {
    what_ingress_translated_egress_leaves_alone,
    ingress_overwrites_what_somebody_else_left,
}

fn what_ingress_translated_egress_leaves_alone(wire: Wire) {
    let (node, talk) = to_remote(wire);
    let opening = talk.opening();
    let ran = node.arrives(POD1, &opening);
    let told = ran.tc_index();
    ran.becomes(Outcome::RequestNew, &opening.clone().to(talk.endpoint));
    assert_eq!(told, tc_index::REQUEST);
    let forwarded = out_of(UPLINK, wire.opening(talk.client, talk.endpoint));
    node.leaves_marked(UPLINK, told, &forwarded).is_left_alone();
    // Whatever egress would find otherwise.
    for told in [tc_index::REQUEST, tc_index::REPLY] {
        node.leaves_marked(POD1, told, &talk.answer()).is_left_alone();
    }
    talk.comes(&node, Outcome::ReplyHalfOpen, &talk.answer());
}

fn ingress_overwrites_what_somebody_else_left(wire: Wire) {
    let (node, talk) = to_remote(wire);
    let direct = talk.opening().to(wire.at(fairlead_tests::packet::world::client, 443));
    // Left alone means that egress is told so.
    node.arrives_marked(POD1, 77, &direct).is_left_alone();
    let opening = talk.opening();
    node.arrives_marked(POD1, tc_index::REPLY, &opening)
        .becomes(Outcome::RequestNew, &opening.clone().to(talk.endpoint));
}
