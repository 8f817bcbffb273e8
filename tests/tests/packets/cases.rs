//! What most cases begin with: a Service, its conversation, and the packets of both.

use std::net::SocketAddr;

use fairlead_tests::packet::world::{self, Device, POD1};
use fairlead_tests::packet::{Node, Packet, RST, Service, Wire};
use proxy_agent::model::Protocol;
use proxy_common::Outcome;

/// The Service's port.
pub(crate) const PORT: u16 = 80;
/// The port its endpoints listen on.
pub(crate) const TARGET: u16 = 8080;
/// The client's port.
pub(crate) const CLIENT_PORT: u16 = 40_000;

/// A Service of one port, without endpoints.
pub(crate) fn web(wire: Wire) -> Service {
    Service::new("web", &[world::vip(wire.family)]).port(wire.protocol, PORT, TARGET)
}

/// Another one, on another ClusterIP.
pub(crate) fn other(wire: Wire) -> Service {
    Service::new("other", &[world::other_vip(wire.family)]).port(wire.protocol, PORT, TARGET)
}

/// The first pod's conversation with the Service, whose only endpoint is on the other node.
pub(crate) fn to_remote(wire: Wire) -> (Node, Talk) {
    let talk = Talk::to(wire, wire.at(world::remote, TARGET));
    (Node::serving(&[&web(wire).elsewhere(talk.endpoint.ip())]), talk)
}

/// A client, a Service and an endpoint; the client is the first pod.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Talk {
    pub(crate) wire: Wire,
    pub(crate) client: SocketAddr,
    pub(crate) vip: SocketAddr,
    pub(crate) endpoint: SocketAddr,
}

impl Talk {
    /// With the Service, and this endpoint of it.
    pub(crate) fn to(wire: Wire, endpoint: SocketAddr) -> Self {
        Self { wire, client: wire.at(world::pod1, CLIENT_PORT), vip: wire.at(world::vip, PORT), endpoint }
    }

    /// The same from another port of the client.
    pub(crate) fn on_port(mut self, port: u16) -> Self {
        self.client.set_port(port);
        self
    }

    /// What the client begins with.
    pub(crate) fn opening(&self) -> Packet {
        at(POD1, self.wire.opening(self.client, self.vip))
    }

    /// A later packet of the client.
    pub(crate) fn talk(&self) -> Packet {
        at(POD1, self.wire.talk(self.client, self.vip))
    }

    /// The endpoint's first answer, on its way out by the client's device.
    pub(crate) fn answer(&self) -> Packet {
        out_of(POD1, self.wire.answer(self.endpoint, self.client))
    }

    /// A later packet of the endpoint.
    pub(crate) fn reply(&self) -> Packet {
        out_of(POD1, self.wire.talk(self.endpoint, self.client))
    }

    /// A TCP segment of the client.
    pub(crate) fn segment(&self, flags: u8) -> Packet {
        at(POD1, Packet::tcp(self.client, self.vip, flags))
    }

    /// A TCP segment of the endpoint.
    pub(crate) fn segment_back(&self, flags: u8) -> Packet {
        out_of(POD1, Packet::tcp(self.endpoint, self.client, flags))
    }

    /// A packet of the client goes to the endpoint.
    #[track_caller]
    pub(crate) fn goes(&self, node: &Node, outcome: Outcome, packet: &Packet) {
        node.arrives(POD1, packet).becomes(outcome, &packet.clone().to(self.endpoint));
    }

    /// A packet of the endpoint comes to the client from the Service.
    #[track_caller]
    pub(crate) fn comes(&self, node: &Node, outcome: Outcome, packet: &Packet) {
        node.leaves(POD1, packet).becomes(outcome, &packet.clone().from(self.vip));
    }

    /// The client begins, the endpoint answers, and the flow is confirmed.
    #[track_caller]
    pub(crate) fn is_opened(&self, node: &Node) {
        self.goes(node, Outcome::RequestNew, &self.opening());
        self.is_confirmed(node);
    }

    /// The endpoint answers a flow that has begun, until it is confirmed.
    #[track_caller]
    pub(crate) fn is_confirmed(&self, node: &Node) {
        self.comes(node, Outcome::ReplyHalfOpen, &self.answer());
        if self.wire.protocol == Protocol::Udp {
            node.maps.let_last(self.client.port());
        }
        self.goes(node, Outcome::RequestHalfOpen, &self.talk());
        if self.wire.protocol == Protocol::Udp {
            self.comes(node, Outcome::ReplyHalfOpen, &self.reply());
        }
    }

    /// Both say something more.
    #[track_caller]
    pub(crate) fn goes_on(&self, node: &Node) {
        self.goes(node, Outcome::Request, &self.talk());
        self.comes(node, Outcome::Reply, &self.reply());
    }
}

/// What a later packet is when TCP's flow is confirmed by now, and UDP's is not: it has not lasted.
pub(crate) const fn by_now(wire: Wire, outcome: Outcome) -> Outcome {
    match (wire.protocol, outcome) {
        (Protocol::Udp, Outcome::Request) => Outcome::RequestHalfOpen,
        (Protocol::Udp, Outcome::Reply) => Outcome::ReplyHalfOpen,
        _ => outcome,
    }
}

/// As a device's peer sends it to the device.
pub(crate) fn at(device: Device, packet: Packet) -> Packet {
    packet.on_wire(device.peer, device.mac)
}

/// As it leaves by a device, having been forwarded twice.
pub(crate) fn out_of(device: Device, packet: Packet) -> Packet {
    packet.on_wire(device.mac, device.peer).with_ttl(62)
}

/// The reset that answers a TCP segment.
pub(crate) fn reset_for(segment: &Packet, flags: u8, seq: u32, ack: u32) -> Packet {
    Packet::tcp(segment.dst, segment.src, RST | flags)
        .numbered(seq, ack)
        .with_window(0)
        .with_id(0)
        .on_wire(segment.eth_dst, segment.eth_src)
}

/// The "port unreachable" that answers a packet, quoting this many bytes from its IP header on.
pub(crate) fn unreachable_for(packet: &Packet, quoted: usize) -> Packet {
    let (kind, code) = if packet.is_v4() { (3, 3) } else { (1, 4) };
    Packet::icmp(packet.dst.ip(), packet.src.ip(), kind, code, [0; 4])
        .carrying(&packet.bytes()[14..14 + quoted])
        .with_id(0)
        .on_wire(packet.eth_dst, packet.eth_src)
}
