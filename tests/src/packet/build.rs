//! Packets as values: built by saying what is special, turned into bytes with every checksum computed from scratch.

use std::net::{IpAddr, SocketAddr};

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

const TCP: u8 = 6;
const UDP: u8 = 17;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const FRAGMENT_HEADER: u8 = 44;

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

    /// True for IPv4.
    pub const fn is_v4(&self) -> bool {
        self.src.is_ipv4()
    }

    /// The protocol number.
    pub const fn protocol(&self) -> u8 {
        match (&self.l4, self.is_v4()) {
            (L4::Tcp { .. }, _) => TCP,
            (L4::Udp { .. }, _) => UDP,
            (L4::Icmp { .. }, true) => ICMP,
            (L4::Icmp { .. }, false) => ICMPV6,
            (L4::Other(number), _) => *number,
        }
    }

    /// The frame.
    pub fn bytes(&self) -> Vec<u8> {
        let mut frame = [self.eth_dst, self.eth_src].concat();
        let body = match self.fragment {
            Some((offset, _)) if offset != 0 => self.payload.clone(),
            _ => self.layer_4(),
        };
        if self.is_v4() {
            frame.extend([0x08, 0x00]);
            frame.extend(self.ipv4_header(body.len()));
        } else {
            frame.extend([0x86, 0xdd]);
            frame.extend(self.ipv6_headers(body.len()));
        }
        let behind_ip = frame.len();
        frame.extend(body);
        if let Some(kept) = self.cut {
            frame.truncate(behind_ip + kept);
        }
        frame
    }

    fn ipv4_header(&self, body: usize) -> Vec<u8> {
        let words = 5 + self.ip_options.len() / 4;
        let total = (words * 4 + body) as u16;
        let (offset, more) = self.fragment.unwrap_or((0, false));
        let flags = offset | u16::from(more) << 13 | u16::from(self.dont_fragment) << 14;
        let mut header = vec![self.version.unwrap_or(4) << 4 | self.header_words.unwrap_or(words as u8), self.tos];
        header.extend(total.to_be_bytes());
        header.extend(self.id.to_be_bytes());
        header.extend(flags.to_be_bytes());
        header.extend([self.ttl, self.protocol(), 0, 0]);
        header.extend(octets(self.src.ip()));
        header.extend(octets(self.dst.ip()));
        header.extend(&self.ip_options);
        let sum = internet_checksum(&[&header]);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    }

    fn ipv6_headers(&self, body: usize) -> Vec<u8> {
        let mut chain = self.extensions.clone();
        if let Some((offset, more)) = self.fragment {
            let word = (offset << 3 | u16::from(more)).to_be_bytes();
            chain.push((FRAGMENT_HEADER, vec![0, word[0], word[1], 0, 0, 0x12, 0x34]));
        }
        let length: usize = chain.iter().map(|(_, bytes)| bytes.len() + 1).sum();
        let first = chain.first().map_or(self.protocol(), |(number, _)| *number);
        let mut header = vec![self.version.unwrap_or(6) << 4 | self.tos >> 4, self.tos << 4, 0, 0];
        header.extend(((length + body) as u16).to_be_bytes());
        header.extend([first, self.ttl]);
        header.extend(octets(self.src.ip()));
        header.extend(octets(self.dst.ip()));
        for (i, (_, bytes)) in chain.iter().enumerate() {
            header.push(chain.get(i + 1).map_or(self.protocol(), |(number, _)| *number));
            header.extend(bytes);
        }
        header
    }

    fn layer_4(&self) -> Vec<u8> {
        let mut bytes = Vec::new();
        let ports = [self.src.port().to_be_bytes(), self.dst.port().to_be_bytes()].concat();
        let checksum_at = match &self.l4 {
            L4::Tcp { seq, ack, flags, window, options } => {
                bytes.extend(ports);
                bytes.extend(seq.to_be_bytes());
                bytes.extend(ack.to_be_bytes());
                bytes.extend([((5 + options.len() / 4) as u8) << 4, *flags]);
                bytes.extend(window.to_be_bytes());
                bytes.extend([0; 4]);
                bytes.extend(options);
                16
            }
            L4::Udp { .. } => {
                bytes.extend(ports);
                bytes.extend(((8 + self.payload.len()) as u16).to_be_bytes());
                bytes.extend([0; 2]);
                6
            }
            L4::Icmp { kind, code, rest } => {
                bytes.extend([*kind, *code, 0, 0]);
                bytes.extend(rest);
                2
            }
            L4::Other(_) => return self.payload.clone(),
        };
        bytes.extend(&self.payload);
        let sum = self.layer_4_checksum(&bytes);
        bytes[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// The checksum over layer 4's bytes, whose own field is zero.
    fn layer_4_checksum(&self, bytes: &[u8]) -> u16 {
        let pseudo = pseudo_header(self.src.ip(), self.dst.ip(), self.protocol(), bytes.len());
        match &self.l4 {
            L4::Udp { checksum: Checksum::Fixed(value) } => *value,
            // RFC 768: a sum of zero is sent as all ones.
            L4::Udp { .. } => match internet_checksum(&[&pseudo, bytes]) {
                0 => 0xffff,
                sum => sum,
            },
            L4::Icmp { .. } if self.is_v4() => internet_checksum(&[bytes]),
            _ => internet_checksum(&[&pseudo, bytes]),
        }
    }
}

/// The pseudo header of layer 4's checksum (RFC 9293 §3.1, RFC 8200 §8.1).
pub(super) fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
    let mut header = [octets(src), octets(dst)].concat();
    if src.is_ipv4() {
        header.extend([0, protocol]);
        header.extend((length as u16).to_be_bytes());
    } else {
        header.extend((length as u32).to_be_bytes());
        header.extend([0, 0, 0, protocol]);
    }
    header
}

fn octets(addr: IpAddr) -> Vec<u8> {
    match addr {
        IpAddr::V4(addr) => addr.octets().to_vec(),
        IpAddr::V6(addr) => addr.octets().to_vec(),
    }
}

/// The Internet checksum (RFC 1071) of the parts put together; all but the last have an even length.
pub fn internet_checksum(parts: &[&[u8]]) -> u16 {
    let mut sum: u64 = 0;
    for part in parts {
        for pair in part.chunks(2) {
            sum += u64::from(pair[0]) << 8 | u64::from(pair.get(1).copied().unwrap_or(0));
        }
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example that textbooks use for the IPv4 header.
    #[test]
    fn a_known_header_has_its_known_checksum() {
        let header = [
            0x45, 0x00, 0x00, 0x73, 0x00, 0x00, 0x40, 0x00, 0x40, 0x11, 0x00, 0x00, 0xc0, 0xa8, 0x00, 0x01, 0xc0, 0xa8,
            0x00, 0xc7,
        ];
        assert_eq!(internet_checksum(&[&header]), 0xb861);
    }

    #[test]
    fn a_finished_packet_sums_to_zero() {
        for (src, dst) in [("10.0.0.1:5000", "10.96.0.10:80"), ("[fd00::1]:5000", "[fd00:96::10]:80")] {
            let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
            let packet = Packet::tcp(src, dst, SYN).carrying(b"odd");
            let l4 = packet.layer_4();
            let pseudo = pseudo_header(packet.src.ip(), packet.dst.ip(), TCP, l4.len());
            assert_eq!(internet_checksum(&[&pseudo, &l4]), 0);
        }
    }
}
