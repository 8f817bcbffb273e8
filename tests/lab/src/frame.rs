//! Frames built by hand, for floods and for what a bridge sees: Ethernet, IP, TCP or UDP, with checksums.

use std::net::{IpAddr, SocketAddr};

use crate::packet::Mac;

/// A UDP datagram; `macs` are source and destination.
pub fn udp(macs: (Mac, Mac), src: SocketAddr, dst: SocketAddr, payload: &[u8]) -> Vec<u8> {
    let mut l4 = Vec::with_capacity(8 + payload.len());
    l4.extend(src.port().to_be_bytes());
    l4.extend(dst.port().to_be_bytes());
    l4.extend((8 + payload.len() as u16).to_be_bytes());
    l4.extend([0, 0]);
    l4.extend(payload);
    assemble(macs, src.ip(), dst.ip(), 17, l4, 6)
}

/// A TCP segment without payload and options.
pub fn tcp(macs: (Mac, Mac), src: SocketAddr, dst: SocketAddr, flags: u8, seq: u32, ack: u32) -> Vec<u8> {
    let mut l4 = Vec::with_capacity(20);
    l4.extend(src.port().to_be_bytes());
    l4.extend(dst.port().to_be_bytes());
    l4.extend(seq.to_be_bytes());
    l4.extend(ack.to_be_bytes());
    l4.extend([5 << 4, flags]);
    l4.extend(64240u16.to_be_bytes());
    l4.extend([0; 4]);
    assemble(macs, src.ip(), dst.ip(), 6, l4, 16)
}

/// Puts the headers around `l4` and fills in its checksum at `checksum_at`.
fn assemble(macs: (Mac, Mac), src: IpAddr, dst: IpAddr, proto: u8, mut l4: Vec<u8>, checksum_at: usize) -> Vec<u8> {
    let mut pseudo = Vec::with_capacity(40);
    let mut ip = Vec::with_capacity(40);
    let ethertype: [u8; 2] = match (src, dst) {
        (IpAddr::V4(src), IpAddr::V4(dst)) => {
            ip.extend([0x45, 0]);
            ip.extend((20 + l4.len() as u16).to_be_bytes());
            ip.extend([0, 0, 0x40, 0, 64, proto, 0, 0]);
            ip.extend(src.octets());
            ip.extend(dst.octets());
            let sum = checksum(&[&ip]);
            ip[10..12].copy_from_slice(&sum.to_be_bytes());
            pseudo.extend(src.octets());
            pseudo.extend(dst.octets());
            [0x08, 0x00]
        }
        (src, dst) => {
            let octets = |addr: IpAddr| match addr {
                IpAddr::V4(addr) => addr.to_ipv6_mapped().octets(),
                IpAddr::V6(addr) => addr.octets(),
            };
            ip.extend([0x60, 0, 0, 0]);
            ip.extend((l4.len() as u16).to_be_bytes());
            ip.extend([proto, 64]);
            ip.extend(octets(src));
            ip.extend(octets(dst));
            pseudo.extend(octets(src));
            pseudo.extend(octets(dst));
            [0x86, 0xdd]
        }
    };
    pseudo.extend([0, proto]);
    pseudo.extend((l4.len() as u16).to_be_bytes());
    // A computed zero is sent as all ones: zero would say "no checksum".
    let sum = match checksum(&[&pseudo, &l4]) {
        0 => 0xffff,
        sum => sum,
    };
    l4[checksum_at..checksum_at + 2].copy_from_slice(&sum.to_be_bytes());
    [&macs.1.0[..], &macs.0.0, &ethertype, &ip, &l4].concat()
}

/// The Internet checksum over parts, each of which but the last has an even length.
fn checksum(parts: &[&[u8]]) -> u16 {
    let mut sum = 0u32;
    for pair in parts.iter().flat_map(|part| part.chunks(2)) {
        sum += u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |&low| u32::from(low));
    }
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_sum_over_the_finished_header_is_zero() {
        let frame =
            udp((Mac([2; 6]), Mac([4; 6])), "1.2.3.4:5".parse().unwrap(), "6.7.8.9:10".parse().unwrap(), b"xyz");
        assert_eq!(checksum(&[&frame[14..34]]), 0);
        assert_eq!(
            checksum(&[&[
                0x45, 0, 0, 0x3c, 0x1c, 0x46, 0x40, 0, 0x40, 6, 0, 0, 0xac, 0x10, 0x0a, 0x63, 0xac, 0x10, 0x0a, 0x0c
            ]]),
            0xb1e6
        );
    }
}
