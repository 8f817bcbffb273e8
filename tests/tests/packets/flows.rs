//! A flow's life: begun, half open, confirmed, ended, begun anew.

use fairlead_tests::packet::world::POD1;
use fairlead_tests::packet::{Table, Wire};
use proxy_common::Outcome;

use crate::cases::to_remote;

wires! {
    the_first_packet_goes_to_an_endpoint_and_the_reply_comes_from_the_service,
}

fn the_first_packet_goes_to_an_endpoint_and_the_reply_comes_from_the_service(wire: Wire) {
    let (node, talk) = to_remote(wire);
    let opening = talk.opening();
    node.arrives(POD1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(talk.endpoint));
    assert_eq!((node.maps.count(Table::HalfOpen), node.maps.count(Table::Confirmed)), (1, 0));
    let answer = talk.answer();
    node.leaves(POD1, &answer).becomes(Outcome::ReplyFirst, &answer.clone().from(talk.vip));
    assert_eq!((node.maps.count(Table::HalfOpen), node.maps.count(Table::Confirmed)), (0, 2));
    let further = talk.talk();
    node.arrives(POD1, &further).becomes(Outcome::Request, &further.clone().to(talk.endpoint));
    let reply = talk.reply();
    node.leaves(POD1, &reply).becomes(Outcome::Reply, &reply.clone().from(talk.vip));
}
