//! A family and a transport: what most cases run for four times.

use std::net::{IpAddr, SocketAddr};

use proxy_agent::model::{IpFamily, Protocol};

use super::build::{ACK, PSH, Packet, SYN};

/// IPv4 or IPv6, TCP or UDP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wire {
    /// The family.
    pub family: IpFamily,
    /// The transport.
    pub protocol: Protocol,
}

impl Wire {
    /// TCP over IPv4.
    pub const TCP_V4: Self = Self { family: IpFamily::V4, protocol: Protocol::Tcp };
    /// TCP over IPv6.
    pub const TCP_V6: Self = Self { family: IpFamily::V6, protocol: Protocol::Tcp };
    /// UDP over IPv4.
    pub const UDP_V4: Self = Self { family: IpFamily::V4, protocol: Protocol::Udp };
    /// UDP over IPv6.
    pub const UDP_V6: Self = Self { family: IpFamily::V6, protocol: Protocol::Udp };

    /// One of the test world's addresses, with a port.
    pub fn at(self, addr: fn(IpFamily) -> IpAddr, port: u16) -> SocketAddr {
        SocketAddr::new(addr(self.family), port)
    }

    /// The packet that begins a conversation: a SYN with the options that Linux sends, or a datagram.
    pub fn opening(self, src: SocketAddr, dst: SocketAddr) -> Packet {
        match self.protocol {
            Protocol::Tcp => Packet::tcp(src, dst, SYN)
                .with_tcp_options(&[2, 4, 5, 0xb4, 4, 2, 8, 10, 0, 0, 0x12, 0x34, 0, 0, 0, 0, 1, 3, 3, 7]),
            _ => Packet::udp(src, dst, b"what is your name?"),
        }
    }

    /// The first answer: SYN and ACK, or a datagram.
    pub fn answer(self, src: SocketAddr, dst: SocketAddr) -> Packet {
        match self.protocol {
            Protocol::Tcp => Packet::tcp(src, dst, SYN | ACK).with_tcp_options(&[2, 4, 5, 0xb4]),
            _ => Packet::udp(src, dst, b"my name is endpoint"),
        }
    }

    /// What follows in an open conversation.
    pub fn talk(self, src: SocketAddr, dst: SocketAddr) -> Packet {
        match self.protocol {
            Protocol::Tcp => Packet::tcp(src, dst, ACK | PSH).carrying(b"GET / HTTP/1.1\r\n\r\n"),
            _ => Packet::udp(src, dst, b"and what do you want"),
        }
    }
}
