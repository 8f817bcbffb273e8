//! Frames for people, and a second opinion on their checksums.

use std::fmt::Write as _;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use super::build::{internet_checksum, pseudo_header};

/// The headers of a frame that could be read: where layer 4 begins and ends.
struct Layout {
    src: IpAddr,
    dst: IpAddr,
    /// IPv4 header's bytes, options included.
    ip: std::ops::Range<usize>,
    protocol: u8,
    l4: std::ops::Range<usize>,
    /// A fragment: layer 4's checksum covers more than these bytes.
    fragment: bool,
    /// Only what differs from packet to packet.
    facts: String,
}

fn layout(frame: &[u8]) -> Option<Layout> {
    match frame.get(12..14)? {
        [0x08, 0x00] => ipv4(frame),
        [0x86, 0xdd] => ipv6(frame),
        _ => None,
    }
}

fn u16_at(frame: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_be_bytes(frame.get(at..at + 2)?.try_into().ok()?))
}

fn ipv4(frame: &[u8]) -> Option<Layout> {
    let ip = frame.get(14..)?;
    let header = usize::from(*ip.first()? & 0xf) * 4;
    let addr = |at: usize| Some(Ipv4Addr::from(<[u8; 4]>::try_from(ip.get(at..at + 4)?).ok()?));
    let (total, flags) = (usize::from(u16_at(ip, 2)?), u16_at(ip, 6)?);
    let facts = format!(
        "IPv4 ttl {} tos {:#04x} id {:#06x} flags {flags:#06x} length {total} header {header} sum {:#06x}",
        ip.get(8)?,
        ip[1],
        u16_at(ip, 4)?,
        u16_at(ip, 10)?,
    );
    (header >= 20 && total >= header && frame.len() >= 14 + total).then_some(Layout {
        src: addr(12)?.into(),
        dst: addr(16)?.into(),
        ip: 14..14 + header,
        protocol: *ip.get(9)?,
        l4: 14 + header..14 + total,
        fragment: flags & 0x3fff != 0,
        facts,
    })
}

fn ipv6(frame: &[u8]) -> Option<Layout> {
    let ip = frame.get(14..)?;
    let addr = |at: usize| Some(Ipv6Addr::from(<[u8; 16]>::try_from(ip.get(at..at + 16)?).ok()?));
    let payload = usize::from(u16_at(ip, 4)?);
    let mut facts = format!("IPv6 hops {} class {:#04x} payload {payload}", ip.get(7)?, (ip[0] << 4) | (ip[1] >> 4));
    let (mut protocol, mut at, mut fragment) = (*ip.get(6)?, 54, false);
    loop {
        let length = match protocol {
            0 | 43 | 60 | 135 => (usize::from(*frame.get(at + 1)?) + 1) * 8,
            51 => (usize::from(*frame.get(at + 1)?) + 2) * 4,
            44 => {
                // An atomic fragment (RFC 6946) is whole.
                fragment = u16_at(frame, at + 2)? & 0xfff9 != 0;
                8
            }
            _ => break,
        };
        write!(facts, " [{protocol}: {length} bytes]").ok()?;
        protocol = *frame.get(at)?;
        at += length;
    }
    let end = 54 + payload;
    (at <= end && frame.len() >= end).then_some(Layout {
        src: addr(8)?.into(),
        dst: addr(24)?.into(),
        ip: 14..54,
        protocol,
        l4: at..end,
        fragment,
        facts,
    })
}

impl Layout {
    fn l4_sum_is_right(&self, frame: &[u8]) -> bool {
        let l4 = &frame[self.l4.clone()];
        let pseudo = pseudo_header(self.src, self.dst, self.protocol, l4.len());
        match self.protocol {
            _ if self.fragment => true,
            17 if self.src.is_ipv4() && l4.get(6..8) == Some(&[0, 0]) => true,
            17 | 6 | 58 => internet_checksum(&[&pseudo, l4]) == 0,
            1 => internet_checksum(&[l4]) == 0,
            _ => true,
        }
    }
}

/// Source and destination of a frame whose layer 4 begins with ports.
pub(super) fn sockets(frame: &[u8]) -> Option<(SocketAddr, SocketAddr)> {
    let layout = layout(frame)?;
    let port = |at| u16_at(frame, layout.l4.start + at);
    Some((SocketAddr::new(layout.src, port(0)?), SocketAddr::new(layout.dst, port(2)?)))
}

/// Checks every checksum of a frame.
///
/// # Errors
/// Says which one is wrong, or that the frame cannot be read.
pub fn verify_checksums(frame: &[u8]) -> Result<(), String> {
    let layout = layout(frame).ok_or("not an IP packet, or cut off")?;
    if layout.src.is_ipv4() && internet_checksum(&[&frame[layout.ip.clone()]]) != 0 {
        return Err("the IPv4 header's checksum is wrong".into());
    }
    if layout.protocol == 17
        && layout.src.is_ipv6()
        && frame.get(layout.l4.start + 6..layout.l4.start + 8) == Some(&[0; 2])
    {
        return Err("a UDP checksum of zero is not allowed over IPv6".into());
    }
    if layout.l4_sum_is_right(frame) { Ok(()) } else { Err("layer 4's checksum is wrong".into()) }
}

/// A frame as text: one line a layer, then its bytes.
pub fn show(frame: &[u8]) -> String {
    let mut out = String::new();
    let mac =
        |at: usize| frame.get(at..at + 6).map(|m| m.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(":"));
    let none = || "cut off".to_owned();
    line(&mut out, &format!("{} > {}", mac(6).unwrap_or_else(none), mac(0).unwrap_or_else(none)));
    match layout(frame) {
        Some(layout) => {
            line(&mut out, &layout.facts);
            line(&mut out, &layer_4(frame, &layout));
            if let Err(problem) = verify_checksums(frame) {
                line(&mut out, &format!("WRONG: {problem}"));
            }
        }
        None => line(&mut out, "no readable IP packet"),
    }
    for (i, row) in frame.chunks(16).enumerate() {
        let hex: Vec<_> = row.iter().map(|b| format!("{b:02x}")).collect();
        line(&mut out, &format!("{:04x}  {}", i * 16, hex.join(" ")));
    }
    out
}

fn line(out: &mut String, text: &str) {
    out.push_str("    ");
    out.push_str(text);
    out.push('\n');
}

fn layer_4(frame: &[u8], layout: &Layout) -> String {
    let l4 = &frame[layout.l4.clone()];
    let port = |at| u16_at(l4, at).unwrap_or(0);
    let number = |at: usize| l4.get(at..at + 4).map_or(0, |b| u32::from_be_bytes([b[0], b[1], b[2], b[3]]));
    let (src, dst) = (layout.src, layout.dst);
    match layout.protocol {
        6 if l4.len() >= 20 => {
            let names = [(0x02, 'S'), (0x01, 'F'), (0x04, 'R'), (0x08, 'P'), (0x10, '.')];
            let flags: String = names.iter().filter(|(bit, _)| l4[13] & bit != 0).map(|(_, name)| name).collect();
            format!(
                "TCP {src}.{} > {dst}.{} [{flags}] seq {:#x} ack {:#x} window {} sum {:#06x}, {} bytes",
                port(0),
                port(2),
                number(4),
                number(8),
                port(14),
                port(16),
                l4.len() - 20,
            )
        }
        17 => format!("UDP {src}.{} > {dst}.{} length {} sum {:#06x}", port(0), port(2), port(4), port(6)),
        1 | 58 => format!("ICMP {src} > {dst} type {} code {} sum {:#06x}", port(0) >> 8, port(0) & 0xff, port(2)),
        other => format!("protocol {other} {src} > {dst}, {} bytes", l4.len()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::packet::{Packet, SYN};

    #[test]
    fn a_flipped_bit_is_found_in_every_checksum() {
        for (src, dst) in [("10.0.0.1:5000", "10.96.0.10:80"), ("[fd00::1]:5000", "[fd00:96::10]:80")] {
            let (src, dst) = (src.parse().unwrap(), dst.parse().unwrap());
            for packet in
                [Packet::tcp(src, dst, SYN), Packet::udp(src, dst, b"hello"), Packet::echo(src.ip(), dst.ip())]
            {
                let frame = packet.bytes();
                assert_eq!(verify_checksums(&frame), Ok(()), "\n{}", show(&frame));
                let last = frame.len() - 1;
                let mut broken = frame.clone();
                broken[last] ^= 1;
                assert!(verify_checksums(&broken).is_err(), "\n{}", show(&broken));
            }
        }
    }
}
