//! How first packets are sent: as frames by pods and by the external host, through the IP layer by processes of the node.

use std::{
    net::{SocketAddr, SocketAddrV4, SocketAddrV6},
    os::fd::{AsFd as _, AsRawFd as _},
};

use fairlead_lab::{packet::Mac, sys};
use nix::{
    errno::Errno,
    sys::socket::{MsgFlags, SockaddrIn, SockaddrIn6, sendto},
};

use super::{
    probe::Shot,
    world::{Client, Side},
};

/// `IPPROTO_RAW`.
const RAW: u8 = 255;
/// So many frames go out at a time: fewer than a CPU keeps for the next device.
const AT_A_TIME: usize = 64;
/// The sender's own MAC; nobody answers to it.
const SENDER: Mac = Mac([2; 6]);

/// Sends all of them, each from its client's place.
pub(super) fn send(side: &Side, shots: &[Shot]) {
    for client in Client::ALL {
        let of_client: Vec<&Shot> = shots.iter().filter(|shot| shot.client == client).collect();
        match client {
            Client::Node => from_the_node(side, &of_client),
            _ => frames(side, client, &of_client),
        }
    }
}

fn frames(side: &Side, client: Client, shots: &[&Shot]) {
    let gateway = match client {
        Client::Pod | Client::Endpoint => "ee:ee:ee:ee:ee:ee".parse().expect("a constant MAC"),
        _ => side.uplink_mac,
    };
    let socket = side.home(client).ns.run(|| sys::packet_socket("eth0", false)).expect("inside").expect("a socket");
    for some in shots.chunks(AT_A_TIME) {
        let frames: Vec<_> = some.iter().map(|shot| shot.packet().on_wire(SENDER.0, gateway.0).bytes()).collect();
        sys::send_frames(socket.as_fd(), &frames).expect("frames are sent");
    }
}

fn from_the_node(side: &Side, shots: &[&Shot]) {
    let open = || [false, true].map(|v6| sys::raw_socket(v6, RAW).expect("a raw socket"));
    let sockets = side.lab.node.ns.run(open).expect("inside");
    for shot in shots {
        let packet = &shot.packet().bytes()[14..];
        let fd = sockets[usize::from(shot.dst.is_ipv6())].as_raw_fd();
        let sent = match shot.dst {
            SocketAddr::V4(to) => {
                sendto(fd, packet, &SockaddrIn::from(SocketAddrV4::new(*to.ip(), 0)), MsgFlags::empty())
            }
            // The port of a raw socket's address would be a protocol.
            SocketAddr::V6(to) => {
                sendto(fd, packet, &SockaddrIn6::from(SocketAddrV6::new(*to.ip(), 0, 0, 0)), MsgFlags::empty())
            }
        };
        match sent {
            // Dropped on its way out: that is a verdict.
            Ok(_) | Err(Errno::EPERM) => {}
            Err(error) => panic!("{shot:?} cannot be sent: {error}"),
        }
    }
}
