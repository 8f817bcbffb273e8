//! What most cases begin with: a Service, its conversation, and the packets of both.

use std::net::SocketAddr;

use fairlead_tests::packet::world::{self, Device, POD1, UPLINK};
use fairlead_tests::packet::{Node, Packet, Service, Wire};
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

/// The first pod's conversation with the Service, whose only endpoint is on the other node.
pub(crate) fn to_remote(wire: Wire) -> (Node, Talk) {
    let endpoint = wire.at(world::remote, TARGET);
    let node = Node::serving(&[&web(wire).elsewhere(endpoint.ip())]);
    (node, Talk { wire, client: wire.at(world::pod1, CLIENT_PORT), vip: wire.at(world::vip, PORT), endpoint })
}

/// A client, a Service and an endpoint: the client is the first pod, the endpoint beyond the uplink.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Talk {
    pub(crate) wire: Wire,
    pub(crate) client: SocketAddr,
    pub(crate) vip: SocketAddr,
    pub(crate) endpoint: SocketAddr,
}

impl Talk {
    /// As the client's device sees it come.
    pub(crate) fn on_client_side(packet: Packet) -> Packet {
        packet.on_wire(POD1.peer, POD1.mac)
    }

    /// As it leaves by the client's device.
    pub(crate) fn back_to_client(packet: Packet) -> Packet {
        packet.on_wire(POD1.mac, POD1.peer).with_ttl(62)
    }

    /// What the client begins with.
    pub(crate) fn opening(&self) -> Packet {
        Self::on_client_side(self.wire.opening(self.client, self.vip))
    }

    /// A later packet of the client.
    pub(crate) fn talk(&self) -> Packet {
        Self::on_client_side(self.wire.talk(self.client, self.vip))
    }

    /// The endpoint's first answer, on its way out by the client's device.
    pub(crate) fn answer(&self) -> Packet {
        Self::back_to_client(self.wire.answer(self.endpoint, self.client))
    }

    /// A later packet of the endpoint.
    pub(crate) fn reply(&self) -> Packet {
        Self::back_to_client(self.wire.talk(self.endpoint, self.client))
    }

    /// The client begins, and the endpoint answers.
    pub(crate) fn is_opened(&self, node: &Node) {
        let opening = self.opening();
        node.arrives(POD1, &opening).becomes(Outcome::RequestNew, &opening.clone().to(self.endpoint));
        let answer = self.answer();
        node.leaves(POD1, &answer).becomes(Outcome::ReplyFirst, &answer.clone().from(self.vip));
    }
}

/// Where a device's peer sends its packets.
pub(crate) fn at(device: Device, packet: Packet) -> Packet {
    packet.on_wire(device.peer, device.mac)
}

/// As it leaves by a device.
pub(crate) fn out_of(device: Device, packet: Packet) -> Packet {
    packet.on_wire(device.mac, device.peer)
}

/// From beyond the uplink.
pub(crate) fn from_outside(packet: Packet) -> Packet {
    at(UPLINK, packet)
}
