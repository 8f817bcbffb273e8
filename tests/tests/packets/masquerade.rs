//! Masquerade: whose source becomes the node's on the way out, and the way back of its replies (rules 68–76).

use std::collections::BTreeSet;
use std::net::{SocketAddr, TcpListener, UdpSocket};

use fairlead_tests::not_run;
use fairlead_tests::packet::world::{self, BRIDGE, Device, POD1, POD2, PORT1, PORT2, UPLINK};
use fairlead_tests::packet::{ACK, FIN, Node, Packet, Settings, Table, Wire};
use proxy_agent::model::{IpFamily, Protocol};
use proxy_common::Outcome;
use proxy_common::abi::{Config, tc_index};

use crate::cases::{PORT, TARGET, Talk, at, by_now, out_of, web};

wires! {
    rule_68_a_node_port_masquerades_a_client_outside,
    rule_68_a_node_port_masquerades_a_pod,
    rule_68_an_endpoint_here_is_masqueraded_to_as_well,
    rule_68_a_cluster_ip_masquerades_who_is_no_pod,
    rule_68_a_cluster_ip_keeps_a_pod,
    rule_68_masquerade_all_masquerades_pods,
    rule_71_pods_are_told_by_their_address,
    rule_71_without_detection_a_cluster_ip_masquerades_nobody,
    rule_69_without_detection_a_pod_has_no_short_way,
    rule_72_the_source_is_the_address_of_the_device,
    rule_73_an_internal_local_policy_masquerades_who_is_no_pod_as_well,
    rule_74_a_pod_reaches_itself_through_a_node_port,
    rule_74_a_pod_reaches_itself_through_a_cluster_ip,
    pitfall_p1_17_a_pod_reaches_itself_from_the_port_that_it_serves,
    a_pod_reaches_itself_by_the_stack_where_others_stand_at_its_device,
    rule_75b_a_process_of_the_node_sees_the_client,
    neighbours_on_a_bridge_meet_by_mac_both_ways,
    what_netfilter_has_masqueraded_is_left_alone,
    a_further_packet_keeps_its_port,
    two_clients_with_one_port_get_two,
    rule_72_of_several_addresses_it_is_the_one_that_the_kernel_would_choose,
    rule_74_of_several_addresses_a_pod_that_serves_itself_sees_the_kernels_choice,
    pitfall_p1_4_a_port_that_a_socket_of_the_node_has_is_not_taken,
    when_every_port_is_taken_the_packet_is_dropped_and_others_live,
    a_device_without_an_address_cannot_masquerade,
    a_datagram_to_somebody_else_keeps_its_tuple,
    what_an_overlay_puts_around_a_request_is_left_alone,
}

families! {
    a_syn_after_the_end_gets_another_port,
}

pub(crate) const NODE_PORT: u16 = 30_080;

/// A client that came in by a device, one of the node's addresses, and an endpoint that is reached by another.
#[derive(Clone, Copy)]
pub(crate) struct Way {
    pub(crate) wire: Wire,
    pub(crate) client: SocketAddr,
    pub(crate) came_by: Device,
    pub(crate) vip: SocketAddr,
    pub(crate) endpoint: SocketAddr,
    pub(crate) leaves_by: Device,
    /// The address that the endpoint sees.
    pub(crate) seen: SocketAddr,
    /// What arrives goes back at once by its device.
    pub(crate) turned: bool,
}

impl Way {
    /// From outside, by a NodePort, to the other node.
    fn through(wire: Wire) -> Self {
        Self {
            wire,
            client: wire.at(world::client, 51_234),
            came_by: UPLINK,
            vip: wire.at(world::node, NODE_PORT),
            endpoint: wire.at(world::remote, TARGET),
            leaves_by: UPLINK,
            seen: wire.at(world::node, 0),
            turned: false,
        }
    }

    pub(crate) fn opening(&self) -> Packet {
        at(self.came_by, self.wire.opening(self.client, self.vip))
    }

    pub(crate) fn talk(&self) -> Packet {
        at(self.came_by, self.wire.talk(self.client, self.vip))
    }

    /// The packet, as it leaves towards the endpoint.
    pub(crate) fn leaving(&self, packet: &Packet) -> Packet {
        out_of(self.leaves_by, packet.clone().to(self.endpoint))
    }

    /// The request goes through the node; returns what the endpoint sees as its client.
    #[track_caller]
    pub(crate) fn goes(&self, node: &Node, outcome: Outcome, packet: &Packet) -> SocketAddr {
        let (ran, expected) = (node.arrives(self.came_by, packet), packet.clone().to(self.endpoint));
        if self.turned {
            ran.goes_back(outcome, tc_index::REQUEST_SNAT, &expected.turned_round());
        } else {
            ran.becomes_due(outcome, &expected);
        }
        self.goes_out(node, packet)
    }

    #[track_caller]
    fn goes_out(&self, node: &Node, packet: &Packet) -> SocketAddr {
        let leaving = self.leaving(packet);
        let ran = node.leaves_marked(self.leaves_by, tc_index::REQUEST_SNAT, &leaving);
        let seen = ran.source();
        assert_eq!(seen.ip(), self.seen.ip(), "the endpoint sees an address of the node");
        ran.becomes(Outcome::Masqueraded, &leaving.from(seen));
        seen
    }

    /// The endpoint's packet comes back to the client.
    #[track_caller]
    pub(crate) fn comes(
        &self,
        node: &Node,
        seen: SocketAddr,
        outcome: Outcome,
        back: fn(Wire, SocketAddr, SocketAddr) -> Packet,
    ) {
        let packet = at(self.leaves_by, back(self.wire, self.endpoint, seen));
        let (ran, expected) = (node.arrives(self.leaves_by, &packet), packet.clone().to(self.client));
        if self.turned {
            ran.goes_back(Outcome::Unmasqueraded, tc_index::NOT_OURS, &expected.turned_round());
        } else {
            ran.becomes(Outcome::Unmasqueraded, &expected);
        }
        let leaving = out_of(self.came_by, packet.to(self.client));
        node.leaves(self.came_by, &leaving).becomes(outcome, &leaving.clone().from(self.vip));
    }

    /// A whole conversation until it is confirmed, and a packet each way then.
    #[track_caller]
    pub(crate) fn works(&self, node: &Node) -> SocketAddr {
        let seen = self.goes(node, Outcome::RequestNew, &self.opening());
        self.comes(node, seen, Outcome::ReplyHalfOpen, Wire::answer);
        if self.wire.protocol == Protocol::Udp {
            node.maps.let_last(self.client.port());
        }
        assert_eq!(self.goes(node, Outcome::RequestHalfOpen, &self.talk()), seen);
        if self.wire.protocol == Protocol::Udp {
            self.comes(node, seen, Outcome::ReplyHalfOpen, Wire::talk);
        }
        assert_eq!(self.goes(node, Outcome::Request, &self.talk()), seen);
        self.comes(node, seen, Outcome::Reply, Wire::talk);
        assert_eq!(node.maps.count(Table::Confirmed), 4, "two pairs are confirmed");
        assert_eq!(node.maps.count(Table::HalfOpen), 0, "none is left half open");
        seen
    }
}

/// A node with the Service on a NodePort, under the Cluster policy.
pub(crate) fn serving(way: &Way, settings: Settings) -> Node {
    let mut node = Node::start_with(settings);
    node.apply(&web(way.wire).node_port(NODE_PORT).elsewhere(way.endpoint.ip()));
    node
}

pub(crate) fn rule_68_a_node_port_masquerades_a_client_outside(wire: Wire) {
    let way = Way::through(wire);
    let seen = way.works(&serving(&way, Settings::default()));
    assert!((1024..30_000).contains(&seen.port()) || seen.port() >= 61_000, "{seen} is none of the pool");
}

fn rule_68_a_node_port_masquerades_a_pod(wire: Wire) {
    let way = Way { client: wire.at(world::pod1, 51_234), came_by: POD1, ..Way::through(wire) };
    way.works(&serving(&way, Settings::default()));
}

fn rule_68_an_endpoint_here_is_masqueraded_to_as_well(wire: Wire) {
    let way = Way { endpoint: wire.at(world::pod2, TARGET), leaves_by: POD2, ..Way::through(wire) };
    way.works(&serving(&way, Settings::default()));
}

fn rule_68_a_cluster_ip_masquerades_who_is_no_pod(wire: Wire) {
    let way = Way { vip: wire.at(world::vip, PORT), ..Way::through(wire) };
    way.works(&serving(&way, Settings::default()));
}

fn rule_68_a_cluster_ip_keeps_a_pod(wire: Wire) {
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    let node = Node::serving(&[&web(wire).elsewhere(talk.endpoint.ip())]);
    talk.is_opened(&node);
}

fn with_flags(node: &mut Node, flags: u32) {
    node.maps.configure(|config| config.flags = config.flags & !Config::LOCAL_DEVICES | flags);
}

fn rule_68_masquerade_all_masquerades_pods(wire: Wire) {
    let pod = Way { client: wire.at(world::pod1, 51_234), came_by: POD1, ..Way::through(wire) };
    let way = Way { vip: wire.at(world::vip, PORT), ..pod };
    let mut node = serving(&way, Settings::default());
    with_flags(&mut node, Config::LOCAL_DEVICES | Config::MASQUERADE_ALL);
    way.works(&node);
}

fn rule_71_pods_are_told_by_their_address(wire: Wire) {
    let mut node = serving(&Way::through(wire), Settings::default());
    node.maps.configure(|config| {
        config.flags &= !Config::LOCAL_DEVICES;
        config.flags |= Config::LOCAL_CIDR_V4 | Config::LOCAL_CIDR_V6;
        (config.local_v4.octets, config.local_mask_v4.octets) = ([10, 244, 0, 0], [255, 255, 0, 0]);
        config.local_v6.octets[..6].copy_from_slice(&[0xfd, 0, 0, 0x10, 0x02, 0x44]);
        config.local_mask_v6.octets[..6].fill(255);
    });
    // A pod of another node counts as well, although it came in by the uplink.
    let vip = wire.at(world::vip, PORT);
    for (client, due) in [(world::pod1 as fn(_) -> _, false), (world::remote2, false), (world::client, true)] {
        let opening = at(UPLINK, wire.opening(wire.at(client, 51_234), vip));
        let expected = opening.clone().to(wire.at(world::remote, TARGET));
        let ran = node.arrives(UPLINK, &opening);
        if due {
            ran.becomes_due(Outcome::RequestNew, &expected);
        } else {
            ran.becomes(Outcome::RequestNew, &expected);
        }
    }
}

fn rule_71_without_detection_a_cluster_ip_masquerades_nobody(wire: Wire) {
    let way = Way::through(wire);
    let mut node = serving(&way, Settings::default());
    with_flags(&mut node, 0);
    let opening = at(UPLINK, wire.opening(way.client, wire.at(world::vip, PORT)));
    node.arrives(UPLINK, &opening).becomes(Outcome::RequestNew, &opening.clone().to(way.endpoint));
}

fn rule_69_without_detection_a_pod_has_no_short_way(wire: Wire) {
    let mut node =
        Node::serving(&[&web(wire).node_port(NODE_PORT).external_local().elsewhere(world::remote(wire.family))]);
    let opening = at(POD1, wire.opening(wire.at(world::pod1, 51_234), wire.at(world::node, NODE_PORT)));
    with_flags(&mut node, 0);
    node.arrives(POD1, &opening).is_dropped(Outcome::DropNoLocalEndpoint);
}

fn rule_72_the_source_is_the_address_of_the_device(wire: Wire) {
    let way = Way {
        endpoint: wire.at(world::port2, TARGET),
        leaves_by: PORT2,
        seen: wire.at(world::bridge, 0),
        ..Way::through(wire)
    };
    way.works(&serving(&way, Settings::default()));
}

/// A pod that is its own endpoint.
pub(crate) fn to_itself(wire: Wire, vip: SocketAddr) -> Way {
    Way {
        client: wire.at(world::pod1, 51_234),
        came_by: POD1,
        vip,
        endpoint: wire.at(world::pod1, TARGET),
        leaves_by: POD1,
        turned: true,
        ..Way::through(wire)
    }
}

fn rule_74_a_pod_reaches_itself_through_a_node_port(wire: Wire) {
    let way = to_itself(wire, wire.at(world::node, NODE_PORT));
    way.works(&serving(&way, Settings::default()));
}

fn rule_74_a_pod_reaches_itself_through_a_cluster_ip(wire: Wire) {
    let way = to_itself(wire, wire.at(world::vip, PORT));
    way.works(&serving(&way, Settings::default()));
}

/// A policy's programs know a conversation by both directions of it.
fn a_pod_reaches_itself_by_the_stack_where_others_stand_at_its_device(wire: Wire) {
    let way = Way { turned: false, ..to_itself(wire, wire.at(world::vip, PORT)) };
    let mut node = serving(&way, Settings::default());
    node.foreign(POD1);
    way.works(&node);
}

/// As a server does that sends by the socket it is asked at: both halves would have one key.
fn pitfall_p1_17_a_pod_reaches_itself_from_the_port_that_it_serves(wire: Wire) {
    let way = to_itself(wire, wire.at(world::vip, PORT));
    let way = Way { client: wire.at(world::pod1, TARGET), ..way };
    let node = serving(&way, Settings::default());
    let opening = way.opening();
    let arrived = node.arrives(POD1, &opening);
    let between = arrived.source();
    assert_eq!(between.ip(), way.client.ip());
    assert_ne!(between.port(), TARGET);
    let routed = opening.clone().from(between).to(way.endpoint);
    arrived.goes_back(Outcome::RequestNew, tc_index::REQUEST_SNAT, &routed.clone().turned_round());
    let leaving = out_of(POD1, routed);
    let ran = node.leaves_marked(POD1, tc_index::REQUEST_SNAT, &leaving);
    let seen = ran.source();
    ran.becomes(Outcome::Masqueraded, &leaving.from(seen));
    let answer = at(POD1, wire.answer(way.endpoint, seen));
    let routed = answer.clone().to(between);
    let turned = routed.clone().turned_round();
    node.arrives(POD1, &answer).goes_back(Outcome::Unmasqueraded, tc_index::NOT_OURS, &turned);
    let leaving = out_of(POD1, routed);
    let home = leaving.clone().from(way.vip).to(way.client);
    node.leaves(POD1, &leaving).becomes(Outcome::ReplyHalfOpen, &home);
}

fn rule_75b_a_process_of_the_node_sees_the_client(wire: Wire) {
    let way = Way { endpoint: wire.at(world::node, TARGET), ..Way::through(wire) };
    let node = Node::serving(&[&web(wire).node_port(NODE_PORT).here(way.endpoint.ip())]);
    let opening = way.opening();
    // It is delivered here: no egress hook sees it.
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &opening.clone().to(way.endpoint));
    let answer = out_of(UPLINK, wire.answer(way.endpoint, way.client));
    node.sends(UPLINK, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(way.vip));
}

fn neighbours_on_a_bridge_meet_by_mac_both_ways(wire: Wire) {
    let (client, vip) = (wire.at(world::port1, 51_234), wire.at(world::node, NODE_PORT));
    let endpoint = wire.at(world::port2, TARGET);
    let node = Node::serving(&[&web(wire).node_port(NODE_PORT).here(endpoint.ip())]);
    let opening = wire.opening(client, vip).on_wire(PORT1.peer, BRIDGE.mac);
    let direct = opening.clone().to(endpoint).on_wire(PORT1.peer, PORT2.peer);
    node.arrives(PORT1, &opening).becomes_due(Outcome::RequestNew, &direct);
    let ran = node.leaves_marked(PORT2, tc_index::REQUEST_SNAT, &direct);
    let seen = ran.source();
    assert_eq!(seen.ip(), world::bridge(wire.family));
    ran.becomes(Outcome::Masqueraded, &direct.clone().from(seen));
    // The endpoint answers the bridge, and the answer goes to its neighbour: no router, no redirect.
    let answer = wire.answer(endpoint, seen).on_wire(PORT2.peer, BRIDGE.mac);
    let back = answer.clone().to(client).on_wire(PORT2.peer, PORT1.peer);
    node.arrives(PORT2, &answer).becomes(Outcome::Unmasqueraded, &back);
    node.leaves(PORT1, &back).becomes(Outcome::ReplyHalfOpen, &back.clone().from(vip));
}

fn what_netfilter_has_masqueraded_is_left_alone(wire: Wire) {
    let way = Way::through(wire);
    let node = serving(&way, Settings::default());
    let opening = way.opening();
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &opening.clone().to(way.endpoint));
    let leaving = way.leaving(&opening).from(wire.at(world::node, 45_678));
    node.leaves_marked(UPLINK, tc_index::REQUEST_SNAT, &leaving).is_left_to_others();
    // And its reply has been given back by netfilter before it leaves.
    let answer = out_of(UPLINK, wire.answer(way.endpoint, way.client));
    node.leaves(UPLINK, &answer).becomes(Outcome::ReplyHalfOpen, &answer.clone().from(way.vip));
}

fn a_further_packet_keeps_its_port(wire: Wire) {
    let way = Way::through(wire);
    let node = serving(&way, Settings::default());
    let seen = way.goes(&node, Outcome::RequestNew, &way.opening());
    assert_eq!(way.goes(&node, Outcome::RequestHalfOpen, &way.opening()), seen);
}

fn two_clients_with_one_port_get_two(wire: Wire) {
    let way = Way::through(wire);
    let node = serving(&way, Settings::default());
    let other = Way { client: wire.at(world::pod1, way.client.port()), came_by: POD1, ..way };
    let first = way.goes(&node, Outcome::RequestNew, &way.opening());
    let second = other.goes(&node, Outcome::RequestNew, &other.opening());
    assert_ne!(first, second);
    way.comes(&node, first, Outcome::ReplyHalfOpen, Wire::answer);
    other.comes(&node, second, Outcome::ReplyHalfOpen, Wire::answer);
}

pub(crate) fn pitfall_p1_4_a_port_that_a_socket_of_the_node_has_is_not_taken(wire: Wire) {
    let way = Way::through(wire);
    let node = serving(&way, Settings { source_ports: 2, ..Settings::default() });
    let own = wire.at(world::node, 61_000);
    let (_tcp, _udp) = match wire.protocol {
        Protocol::Tcp => (Some(TcpListener::bind(own).expect("the port is free")), None),
        _ => (None, Some(UdpSocket::bind(own).expect("the port is free"))),
    };
    assert_eq!(way.goes(&node, Outcome::RequestNew, &way.opening()).port(), 61_001);
}

pub(crate) fn when_every_port_is_taken_the_packet_is_dropped_and_others_live(wire: Wire) {
    let way = Way::through(wire);
    let node = serving(&way, Settings { source_ports: 3, ..Settings::default() });
    let ways = [51_001, 51_002, 51_003].map(|port| Way { client: wire.at(world::client, port), ..way });
    let seen = ways.map(|way| way.goes(&node, Outcome::RequestNew, &way.opening()));
    assert_eq!(seen.map(|s| s.port()).into_iter().collect::<BTreeSet<_>>(), [61_000, 61_001, 61_002].into());
    let opening = way.opening();
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &opening.clone().to(way.endpoint));
    node.leaves_marked(UPLINK, tc_index::REQUEST_SNAT, &way.leaving(&opening)).is_dropped(Outcome::DropNoSourcePort);
    for (way, seen) in ways.iter().zip(seen) {
        way.comes(&node, seen, Outcome::ReplyHalfOpen, Wire::answer);
    }
}

fn a_device_without_an_address_cannot_masquerade(wire: Wire) {
    let way = Way::through(wire);
    let mut node = serving(&way, Settings::default());
    node.without_sources(UPLINK);
    let opening = way.opening();
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &opening.clone().to(way.endpoint));
    node.leaves_marked(UPLINK, tc_index::REQUEST_SNAT, &way.leaving(&opening)).is_dropped(Outcome::DropNoRoute);
}

fn a_datagram_to_somebody_else_keeps_its_tuple(wire: Wire) {
    let way = Way::through(wire);
    let node = serving(&way, Settings::default());
    // Somebody else wrote the mark, or the flow has gone: nobody says that it is due.
    node.leaves_marked(UPLINK, tc_index::REQUEST_SNAT, &way.leaving(&way.opening())).is_left_to_others();
}

fn what_an_overlay_puts_around_a_request_is_left_alone(wire: Wire) {
    let way = Way::through(wire);
    let node = serving(&way, Settings::default());
    way.goes(&node, Outcome::RequestNew, &way.opening());
    let outer = Packet::udp(wire.at(world::node, 8472), wire.at(world::remote, 8472), b"inner")
        .on_wire(UPLINK.mac, UPLINK.peer);
    node.leaves_marked(UPLINK, tc_index::REQUEST, &outer).is_left_to_others();
}

fn a_syn_after_the_end_gets_another_port(family: IpFamily) {
    let wire = if family == IpFamily::V4 { Wire::TCP_V4 } else { Wire::TCP_V6 };
    let way = Way::through(wire);
    let node = serving(&way, Settings::default());
    let seen = way.works(&node);
    let fin = at(UPLINK, Packet::tcp(way.client, way.vip, FIN | ACK));
    assert_eq!(way.goes(&node, Outcome::Request, &fin), seen);
    way.comes(&node, seen, Outcome::Reply, |_, from, to| Packet::tcp(from, to, FIN | ACK));
    let again = way.goes(&node, Outcome::RequestNew, &way.opening());
    assert_ne!(again, seen, "the port used last is used again last");
    way.comes(&node, again, by_now(wire, Outcome::ReplyHalfOpen), Wire::answer);
}

fn rule_73_an_internal_local_policy_masquerades_who_is_no_pod_as_well(wire: Wire) {
    let (client, vip) = (wire.at(world::client, 51_234), wire.at(world::vip, PORT));
    let endpoint = wire.at(world::pod2, TARGET);
    let service = web(wire).internal_local().here(endpoint.ip()).elsewhere(world::remote(wire.family));
    let node = Node::serving(&[&service]);
    let opening = at(UPLINK, wire.opening(client, vip));
    node.arrives(UPLINK, &opening).becomes_due(Outcome::RequestNew, &opening.clone().to(endpoint));
    let from_pod = at(POD1, wire.opening(wire.at(world::pod1, 51_234), vip));
    node.arrives(POD1, &from_pod).becomes(Outcome::RequestNew, &from_pod.clone().to(endpoint));
}

fn rule_72_of_several_addresses_it_is_the_one_that_the_kernel_would_choose(wire: Wire) {
    if !kernel_tells_sources() {
        return;
    }
    let way = Way::through(wire);
    let mut node = serving(&way, Settings::default());
    node.first_source(UPLINK, world::bridge);
    way.works(&node);
}

fn rule_74_of_several_addresses_a_pod_that_serves_itself_sees_the_kernels_choice(wire: Wire) {
    if !kernel_tells_sources() {
        return;
    }
    let way = to_itself(wire, wire.at(world::vip, PORT));
    let mut node = serving(&way, Settings::default());
    node.first_source(POD1, world::bridge);
    way.works(&node);
}

/// `BPF_FIB_LOOKUP_SRC` came with 6.7; before, it is the first address, and the test is not run.
fn kernel_tells_sources() -> bool {
    let tells = proxy_agent::dataplane::probe::features().expect("the kernel says what it can do").fib_source;
    if !tells {
        not_run::because("this kernel's look-up of routes tells no source");
    }
    tells
}
