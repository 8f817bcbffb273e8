//! Properties of any packet: checksums stay right, nothing unexpected is counted, the client sees only the Service.

use std::net::SocketAddr;

use fairlead_tests::packet::world::{self, BRIDGE, POD1, PORT1, STRANGER_MAC, UPLINK};
use fairlead_tests::packet::{Checksum, Node, Packet, Wire, show, verify_checksums};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use proxy_agent::model::{IpFamily, Protocol};
use proxy_common::Outcome;

use crate::cases::{PORT, TARGET, at, out_of};

const NODE_PORT: u16 = 30_080;

/// A node with something of everything.
fn busy_node() -> Node {
    let families = IpFamily::ALL;
    let mut node = Node::start();
    let both = |addr: fn(IpFamily) -> std::net::IpAddr| families.map(addr);
    for protocol in [Protocol::Tcp, Protocol::Udp] {
        let name = if protocol == Protocol::Tcp { "tcp" } else { "udp" };
        let addr = if protocol == Protocol::Tcp { world::vip } else { world::other_vip };
        let mut service = fairlead_tests::packet::Service::new(name, &both(addr))
            .port(protocol, PORT, TARGET)
            .node_port(NODE_PORT)
            .external_local();
        for family in families {
            service = service
                .elsewhere(world::remote(family))
                .here(world::pod1(family))
                .here(world::port2(family))
                .here(world::node(family));
        }
        node.apply(&service);
    }
    node
}

fn address(family: IpFamily) -> impl Strategy<Value = SocketAddr> {
    let addr = prop::sample::select(vec![
        world::vip(family),
        world::other_vip(family),
        world::client(family),
        world::node(family),
        world::pod1(family),
        world::remote(family),
        world::port1(family),
        world::port2(family),
        world::bridge(family),
    ]);
    let port = prop_oneof![Just(PORT), Just(TARGET), Just(NODE_PORT), Just(40_000), any::<u16>()];
    (addr, port).prop_map(|(addr, port)| SocketAddr::new(addr, port))
}

fn dressed(packet: Packet, dress: u8) -> Packet {
    let packet = if dress & 1 != 0 { packet.with_ttl(1).with_tos(0x2e) } else { packet };
    match (dress >> 1 & 3, packet.is_v4()) {
        (1, true) => packet.with_ip_options(&[7, 7, 4, 0, 0, 0, 0, 0]),
        (1, false) => packet.with_extension(0, &[0, 1, 4, 0, 0, 0, 0]),
        (2, _) => packet.as_fragment(0, true),
        (3, _) if dress & 8 != 0 => packet.as_fragment(5, false),
        _ => packet,
    }
}

fn packet() -> impl Strategy<Value = Packet> {
    let family = prop::sample::select(vec![IpFamily::V4, IpFamily::V6]);
    let inner = family.prop_flat_map(|family| (address(family), address(family)));
    (inner, 0u8..4, any::<u8>(), prop::collection::vec(any::<u8>(), 0..64), any::<u8>(), 0u8..3).prop_map(
        |((src, dst), kind, flags, payload, dress, mac)| {
            let packet = match kind {
                0 => Packet::tcp(src, dst, flags & 0x3f),
                1 => Packet::udp(src, dst, b""),
                2 if src.is_ipv4() => Packet::udp(src, dst, b"").with_udp_checksum(Checksum::Fixed(0)),
                2 => Packet::icmp(src.ip(), dst.ip(), flags, 0, [0; 4]),
                _ => Packet::echo(src.ip(), dst.ip()),
            };
            let to = [POD1.mac, BRIDGE.mac, STRANGER_MAC][usize::from(mac)];
            dressed(packet.carrying(&payload), dress).on_wire(POD1.peer, to)
        },
    )
}

fn check(node: &Node, packet: &Packet, ran: fairlead_tests::packet::Ran<'_>) -> Result<(), TestCaseError> {
    let sent = packet.bytes();
    let counted = ran.counted();
    if counted.len() > 1 {
        return Err(TestCaseError::fail(format!("counted {counted:?}\n{}", show(&sent))));
    }
    if ran.bytes() == sent || counted.iter().any(|o| o.kind() == proxy_common::Kind::Drop) {
        return Ok(());
    }
    if counted.is_empty() {
        return Err(TestCaseError::fail(format!("changed without a word\n{}\n{}", show(&sent), show(ran.bytes()))));
    }
    verify_checksums(ran.bytes()).map_err(|problem| {
        let state = node.maps.describe();
        TestCaseError::fail(format!("{problem} after {counted:?}\n{}\n{}\n{state}", show(&sent), show(ran.bytes())))
    })
}

#[test]
fn pitfall_p1_14_any_packet_leaves_with_right_checksums_or_as_it_came() {
    let node = busy_node();
    let mut runner = TestRunner::new(Config { cases: 2048, failure_persistence: None, ..Config::default() });
    let hooks = 0usize..5;
    runner
        .run(&(packet(), hooks), |(packet, hook)| {
            let ran = match hook {
                0 => node.arrives(POD1, &packet),
                1 => node.arrives(PORT1, &packet),
                2 => node.arrives(UPLINK, &packet),
                3 => node.leaves(POD1, &packet),
                _ => node.sends(UPLINK, &packet),
            };
            check(&node, &packet, ran)
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn any_bytes_are_survived() {
    let node = busy_node();
    let mut runner = TestRunner::new(Config { cases: 1024, failure_persistence: None, ..Config::default() });
    // A packet with some bytes changed and the end cut off: past the checks of the first look, wrong behind it.
    let strategy = (packet(), prop::collection::vec((14usize..80, any::<u8>()), 0..4), 0usize..80);
    runner
        .run(&strategy, |(packet, changes, cut)| {
            let mut frame = packet.bytes();
            for (at, byte) in changes {
                if let Some(place) = frame.get_mut(at) {
                    *place = byte;
                }
            }
            // The kernel refuses to run on less than an IP header.
            let least = if packet.is_v4() { 34 } else { 54 };
            frame.truncate(frame.len().saturating_sub(cut).max(least));
            let ran = node.arrives_as(POD1, &frame);
            let counted = ran.counted();
            prop_assert!(counted.len() <= 1, "counted {counted:?}\n{}", show(&frame));
            prop_assert!(ran.goes_on() || !counted.is_empty(), "vanished without a word\n{}", show(&frame));
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}

#[test]
fn a_reply_restores_the_clients_view_exactly() {
    let node = busy_node();
    let mut runner = TestRunner::new(Config { cases: 512, failure_persistence: None, ..Config::default() });
    let strategy = (
        prop::sample::select(vec![Wire::TCP_V4, Wire::TCP_V6, Wire::UDP_V4, Wire::UDP_V6]),
        1u16..=u16::MAX,
        prop::collection::vec(any::<u8>(), 0..600),
        prop::collection::vec(any::<u8>(), 0..600),
        any::<u8>(),
    );
    runner
        .run(&strategy, |(wire, port, question, reply, tos)| {
            let vip = if wire.protocol == Protocol::Tcp { world::vip } else { world::other_vip };
            let (client, vip) = (wire.at(world::pod2, port), wire.at(vip, PORT));
            let opening = at(world::POD2, wire.opening(client, vip)).carrying(&question).with_tos(tos);
            let ran = node.arrives(world::POD2, &opening);
            let (from, endpoint) = (ran.source(), ran.destination());
            prop_assert!(ran.bytes() == opening.clone().from(from).to(endpoint).bytes());
            let answer = out_of(world::POD2, wire.answer(endpoint, from)).carrying(&reply).with_tos(tos);
            let ran = node.leaves(world::POD2, &answer);
            let counted = ran.counted();
            let expected = answer.clone().from(vip).to(client).bytes();
            prop_assert!(ran.bytes() == expected, "{counted:?}\n{}\n{}", show(ran.bytes()), show(&expected));
            prop_assert!(matches!(counted[..], [Outcome::ReplyHalfOpen | Outcome::Reply]), "{counted:?}");
            Ok(())
        })
        .unwrap_or_else(|error| panic!("{error}"));
}
