//! What a capture shows: frames taken apart as far as comparisons need it.

use std::{
    fmt,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
};

/// A MAC address.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Mac(pub [u8; 6]);

impl fmt::Debug for Mac {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl std::str::FromStr for Mac {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let bytes: Result<Vec<u8>, _> = text.trim().split(':').map(|part| u8::from_str_radix(part, 16)).collect();
        match bytes.ok().and_then(|bytes| <[u8; 6]>::try_from(bytes).ok()) {
            Some(bytes) => Ok(Self(bytes)),
            None => anyhow::bail!("{text:?} is no MAC address"),
        }
    }
}

/// The transport header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum L4 {
    /// TCP: ports, flags, options of the header in their raw form.
    Tcp {
        /// Source port.
        sport: u16,
        /// Destination port.
        dport: u16,
        /// The flags byte.
        flags: u8,
    },
    /// UDP.
    Udp {
        /// Source port.
        sport: u16,
        /// Destination port.
        dport: u16,
    },
    /// ICMP or ICMPv6: type and code.
    Icmp {
        /// Type.
        kind: u8,
        /// Code.
        code: u8,
    },
    /// Anything else.
    Other(u8),
}

/// SYN, as in the flags byte of a TCP header.
pub const SYN: u8 = 0x02;
/// RST.
pub const RST: u8 = 0x04;
/// ACK.
pub const ACK: u8 = 0x10;

/// One captured IP packet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// It left by the device that was listened on.
    pub outgoing: bool,
    /// Ethernet source.
    pub eth_src: Mac,
    /// Ethernet destination.
    pub eth_dst: Mac,
    /// IP source.
    pub src: IpAddr,
    /// IP destination.
    pub dst: IpAddr,
    /// TTL or hop limit.
    pub ttl: u8,
    /// TOS or traffic class.
    pub tos: u8,
    /// The transport header.
    pub l4: L4,
    /// Bytes behind the transport header.
    pub payload: usize,
    /// The frame as it was.
    pub frame: Vec<u8>,
}

impl Packet {
    /// Takes a frame apart; `None` for what is not IP, or too short.
    pub fn parse(frame: &[u8], outgoing: bool) -> Option<Self> {
        let eth_dst = Mac(frame.get(0..6)?.try_into().ok()?);
        let eth_src = Mac(frame.get(6..12)?.try_into().ok()?);
        let ip = frame.get(14..)?;
        let (src, dst, ttl, tos, proto, l4): (IpAddr, IpAddr, u8, u8, u8, &[u8]) = match frame.get(12..14)? {
            [0x08, 0x00] => {
                let header = usize::from(ip.first()? & 0xf) * 4;
                let total = usize::from(u16::from_be_bytes(ip.get(2..4)?.try_into().ok()?));
                let addr = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
                (addr(12)?.into(), addr(16)?.into(), *ip.get(8)?, ip[1], *ip.get(9)?, ip.get(header..total)?)
            }
            [0x86, 0xdd] => {
                let total = 40 + usize::from(u16::from_be_bytes(ip.get(4..6)?.try_into().ok()?));
                let addr = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?));
                let tos = (ip[0] << 4) | (ip.get(1)? >> 4);
                (addr(8)?.into(), addr(24)?.into(), *ip.get(7)?, tos, *ip.get(6)?, ip.get(40..total)?)
            }
            _ => return None,
        };
        let port = |at: usize| Some(u16::from_be_bytes(l4.get(at..at + 2)?.try_into().ok()?));
        let (l4_header, parsed) = match proto {
            6 => {
                let header = usize::from(l4.get(12)? >> 4) * 4;
                (header, L4::Tcp { sport: port(0)?, dport: port(2)?, flags: *l4.get(13)? })
            }
            17 => (8, L4::Udp { sport: port(0)?, dport: port(2)? }),
            1 | 58 => (8, L4::Icmp { kind: *l4.first()?, code: *l4.get(1)? }),
            other => (0, L4::Other(other)),
        };
        let payload = l4.len().saturating_sub(l4_header);
        Some(Self { outgoing, eth_src, eth_dst, src, dst, ttl, tos, l4: parsed, payload, frame: frame.to_vec() })
    }

    /// Source and destination with their ports, of TCP and UDP.
    pub fn sockets(&self) -> Option<(SocketAddr, SocketAddr)> {
        match self.l4 {
            L4::Tcp { sport, dport, .. } | L4::Udp { sport, dport } => {
                Some((SocketAddr::new(self.src, sport), SocketAddr::new(self.dst, dport)))
            }
            L4::Icmp { .. } | L4::Other(_) => None,
        }
    }

    /// True for a TCP or UDP packet between these addresses, in either direction.
    pub fn concerns(&self, addr: SocketAddr) -> bool {
        self.sockets().is_some_and(|(src, dst)| src == addr || dst == addr)
    }

    /// True for an ICMP or ICMPv6 redirect.
    pub fn is_redirect(&self) -> bool {
        matches!((&self.l4, self.src), (L4::Icmp { kind: 5, .. }, IpAddr::V4(_)) | (L4::Icmp { kind: 137, .. }, _))
    }
}

impl fmt::Display for Packet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let arrow = if self.outgoing { "out" } else { "in " };
        write!(f, "{arrow} {:?}>{:?} ttl {} ", self.eth_src, self.eth_dst, self.ttl)?;
        match &self.l4 {
            L4::Tcp { sport, dport, flags } => {
                let names = [(SYN, 'S'), (0x01, 'F'), (RST, 'R'), (0x08, 'P'), (ACK, '.')];
                let shown: String = names.iter().filter(|(bit, _)| flags & bit != 0).map(|(_, name)| name).collect();
                write!(f, "{}:{sport} > {}:{dport} TCP [{shown}] {} bytes", self.src, self.dst, self.payload)
            }
            L4::Udp { sport, dport } => {
                write!(f, "{}:{sport} > {}:{dport} UDP {} bytes", self.src, self.dst, self.payload)
            }
            L4::Icmp { kind, code } => write!(f, "{} > {} ICMP {kind}/{code}", self.src, self.dst),
            L4::Other(proto) => write!(f, "{} > {} protocol {proto}", self.src, self.dst),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::frame;

    #[test]
    fn what_is_built_is_what_is_read() {
        for (src, dst) in [("10.0.0.1:7", "10.0.0.2:9"), ("[fd00::1]:7", "[fd00::2]:9")] {
            let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
            let macs = (Mac([2; 6]), Mac([4; 6]));
            let udp = Packet::parse(&frame::udp(macs, src, dst, b"abc"), false).unwrap();
            assert_eq!((udp.sockets(), udp.payload, udp.ttl), (Some((src, dst)), 3, 64));
            assert_eq!((udp.eth_src, udp.eth_dst), macs);
            let syn = Packet::parse(&frame::tcp(macs, src, dst, SYN, 1, 0), true).unwrap();
            assert_eq!(syn.l4, L4::Tcp { sport: 7, dport: 9, flags: SYN });
            assert!(syn.outgoing);
        }
    }

    #[test]
    fn short_frames_are_no_packets() {
        assert_eq!(Packet::parse(&[0; 13], false), None);
        assert_eq!(Packet::parse(&[&[0u8; 12][..], &[8, 0, 0x45]].concat(), false), None);
    }
}
