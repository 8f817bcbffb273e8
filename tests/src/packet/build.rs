//! Packets as values: built by saying what is special, turned into bytes by [`render`].

use std::net::{IpAddr, SocketAddr};

mod render;

pub(super) use render::pseudo_header;
pub use render::{crc32c, internet_checksum};

/// A MAC address.
pub type Mac = [u8; 6];

/// FIN (RFC 9293 §3.1).
pub const FIN: u8 = 0x01;
/// SYN.
pub const SYN: u8 = 0x02;
/// RST.
pub const RST: u8 = 0x04;
/// PSH.
pub const PSH: u8 = 0x08;
/// ACK.
pub const ACK: u8 = 0x10;

/// What stands in a checksum field.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// The right one.
    Right,
    /// This value, right or not: zero says "none" in UDP over IPv4.
    Fixed(u16),
}

/// Layer 4.
#[derive(Clone, Debug, PartialEq, Eq)]
#[expect(missing_docs, reason = "the fields are the header's")]
pub enum L4 {
    Tcp {
        seq: u32,
        ack: u32,
        flags: u8,
        window: u16,
        options: Vec<u8>,
    },
    Udp {
        checksum: Checksum,
    },
    Icmp {
        kind: u8,
        code: u8,
        rest: [u8; 4],
    },
    Sctp {
        tag: u32,
    },
    /// Any other protocol: the payload is all there is.
    Other(u8),
}

/// A frame in the making. The ports of `src` and `dst` count only where layer 4 has ports.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Ethernet destination.
    pub eth_dst: Mac,
    /// Ethernet source.
    pub eth_src: Mac,
    /// Source.
    pub src: SocketAddr,
    /// Destination.
    pub dst: SocketAddr,
    /// Layer 4.
    pub l4: L4,
    /// What follows layer 4's header.
    pub payload: Vec<u8>,
    tos: u8,
    id: u16,
    dont_fragment: bool,
    ttl: u8,
    version: Option<u8>,
    header_words: Option<u8>,
    ip_options: Vec<u8>,
    extensions: Vec<(u8, Vec<u8>)>,
    fragment: Option<(u16, bool)>,
    cut: Option<usize>,
}

impl Packet {
    fn new(src: SocketAddr, dst: SocketAddr, l4: L4) -> Self {
        assert_eq!(src.is_ipv4(), dst.is_ipv4(), "a packet has one family: {src} to {dst}");
        Self {
            eth_dst: [0; 6],
            eth_src: [0; 6],
            src,
            dst,
            l4,
            payload: Vec::new(),
            tos: 0,
            id: 0x1234,
            dont_fragment: true,
            ttl: 64,
            version: None,
            header_words: None,
            ip_options: Vec::new(),
            extensions: Vec::new(),
            fragment: None,
            cut: None,
        }
    }

    /// A TCP segment with these flags; sequence numbers that are easy to tell apart.
    pub fn tcp(src: SocketAddr, dst: SocketAddr, flags: u8) -> Self {
        let ack = if flags & ACK != 0 { 0x5000_0001 } else { 0 };
        Self::new(src, dst, L4::Tcp { seq: 0x1000_0000, ack, flags, window: 64_240, options: Vec::new() })
    }

    /// A UDP datagram.
    pub fn udp(src: SocketAddr, dst: SocketAddr, payload: &[u8]) -> Self {
        Self::new(src, dst, L4::Udp { checksum: Checksum::Right }).carrying(payload)
    }

    /// An SCTP packet with these chunks.
    pub fn sctp(src: SocketAddr, dst: SocketAddr, chunks: &[u8]) -> Self {
        Self::new(src, dst, L4::Sctp { tag: 0x0102_0304 }).carrying(chunks)
    }

    /// An ICMP or ICMPv6 message; the payload follows its first eight bytes.
    pub fn icmp(src: IpAddr, dst: IpAddr, kind: u8, code: u8, rest: [u8; 4]) -> Self {
        Self::new(SocketAddr::new(src, 0), SocketAddr::new(dst, 0), L4::Icmp { kind, code, rest })
    }

    /// An echo request.
    pub fn echo(src: IpAddr, dst: IpAddr) -> Self {
        let kind = if src.is_ipv4() { 8 } else { 128 };
        Self::icmp(src, dst, kind, 0, [0, 7, 0, 1]).carrying(b"are you there?")
    }

    /// A packet of another protocol.
    pub fn other(src: IpAddr, dst: IpAddr, protocol: u8) -> Self {
        Self::new(SocketAddr::new(src, 0), SocketAddr::new(dst, 0), L4::Other(protocol))
    }

    /// On the wire from one MAC to another.
    #[must_use]
    pub const fn on_wire(mut self, from: Mac, to: Mac) -> Self {
        self.eth_src = from;
        self.eth_dst = to;
        self
    }

    /// The MACs change places.
    #[must_use]
    pub const fn turned_round(self) -> Self {
        let (from, to) = (self.eth_src, self.eth_dst);
        self.on_wire(to, from)
    }

    /// With this payload.
    #[must_use]
    pub fn carrying(mut self, payload: &[u8]) -> Self {
        self.payload = payload.to_vec();
        self
    }

    /// From somebody else.
    #[must_use]
    pub const fn from(mut self, src: SocketAddr) -> Self {
        self.src = src;
        self
    }

    /// To somebody else.
    #[must_use]
    pub const fn to(mut self, dst: SocketAddr) -> Self {
        self.dst = dst;
        self
    }

    /// From another port.
    #[must_use]
    pub fn from_port(mut self, port: u16) -> Self {
        self.src.set_port(port);
        self
    }

    /// With these TCP sequence and acknowledgement numbers.
    #[must_use]
    pub fn numbered(mut self, new_seq: u32, new_ack: u32) -> Self {
        if let L4::Tcp { seq, ack, .. } = &mut self.l4 {
            (*seq, *ack) = (new_seq, new_ack);
        }
        self
    }

    /// With these TCP options; a multiple of four bytes.
    #[must_use]
    pub fn with_tcp_options(mut self, bytes: &[u8]) -> Self {
        assert_eq!(bytes.len() % 4, 0, "TCP options fill words");
        if let L4::Tcp { options, .. } = &mut self.l4 {
            *options = bytes.to_vec();
        }
        self
    }

    /// With this receive window.
    #[must_use]
    pub fn with_window(mut self, new: u16) -> Self {
        if let L4::Tcp { window, .. } = &mut self.l4 {
            *window = new;
        }
        self
    }

    /// With this in the UDP checksum field.
    #[must_use]
    pub fn with_udp_checksum(mut self, value: Checksum) -> Self {
        if let L4::Udp { checksum } = &mut self.l4 {
            *checksum = value;
        }
        self
    }

    /// With this TTL or hop limit.
    #[must_use]
    pub const fn with_ttl(mut self, ttl: u8) -> Self {
        self.ttl = ttl;
        self
    }

    /// With this TOS or traffic class.
    #[must_use]
    pub const fn with_tos(mut self, tos: u8) -> Self {
        self.tos = tos;
        self
    }

    /// With this IPv4 identification.
    #[must_use]
    pub const fn with_id(mut self, id: u16) -> Self {
        self.id = id;
        self
    }

    /// With these IPv4 options; a multiple of four bytes.
    #[must_use]
    pub fn with_ip_options(mut self, bytes: &[u8]) -> Self {
        assert_eq!(bytes.len() % 4, 0, "IPv4 options fill words");
        self.ip_options = bytes.to_vec();
        self
    }

    /// With one more IPv6 extension header: its number, and its bytes behind the "next header" field.
    #[must_use]
    pub fn with_extension(mut self, number: u8, bytes: &[u8]) -> Self {
        assert_eq!(bytes.len() % 8, 7, "extension headers fill eight bytes");
        self.extensions.push((number, bytes.to_vec()));
        self
    }

    /// A fragment at this offset (in units of eight bytes), and whether more follow. A later one carries only its
    /// payload, no layer 4 header.
    #[must_use]
    pub const fn as_fragment(mut self, offset: u16, more: bool) -> Self {
        self.fragment = Some((offset, more));
        self.dont_fragment = false;
        self
    }

    /// With a version number that is not the family's.
    #[must_use]
    pub const fn claiming_version(mut self, version: u8) -> Self {
        self.version = Some(version);
        self
    }

    /// With an IPv4 header length that is not so.
    #[must_use]
    pub const fn claiming_header_words(mut self, words: u8) -> Self {
        self.header_words = Some(words);
        self
    }

    /// Cut off this many bytes behind the IP header (with its options and extension headers); lengths and checksums
    /// stay those of the whole packet.
    #[must_use]
    pub const fn cut_behind_ip(mut self, bytes: usize) -> Self {
        self.cut = Some(bytes);
        self
    }
}
