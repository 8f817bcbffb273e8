//! From a packet to its bytes, with every length and checksum computed from scratch.

use std::net::IpAddr;

use super::{Checksum, L4, Packet};

const TCP: u8 = 6;
const UDP: u8 = 17;
const SCTP: u8 = 132;
const ICMP: u8 = 1;
const ICMPV6: u8 = 58;
const FRAGMENT_HEADER: u8 = 44;

impl Packet {
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
            (L4::Sctp { .. }, _) => SCTP,
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
            let id = self.id.to_be_bytes();
            chain.push((FRAGMENT_HEADER, vec![0, word[0], word[1], 0, 0, id[0], id[1]]));
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
            L4::Sctp { tag } => {
                bytes.extend(ports);
                bytes.extend(tag.to_be_bytes());
                bytes.extend([0; 4]);
                bytes.extend(&self.payload);
                let sum = crc32c(&bytes);
                bytes[8..12].copy_from_slice(&sum.to_le_bytes());
                return bytes;
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

/// SCTP's checksum (RFC 9260 appendix A), bit by bit.
pub fn crc32c(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, byte| {
        (0..8).fold(crc ^ u32::from(*byte), |crc, _| if crc & 1 != 0 { crc >> 1 ^ 0x82f6_3b78 } else { crc >> 1 })
    })
}

/// The pseudo header of layer 4's checksum (RFC 9293 §3.1, RFC 8200 §8.1).
pub(in crate::packet) fn pseudo_header(src: IpAddr, dst: IpAddr, protocol: u8, length: usize) -> Vec<u8> {
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
    use crate::packet::SYN;

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
