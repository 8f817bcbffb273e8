//! A frame's headers, parsed once. Offsets come out typed; what is cut off or malformed is told apart.

pub mod ipv4;
pub mod ipv6;

use proxy_common::{Family, abi::Direction, abi::FlowKey, algo::timeout};

use crate::ctx::PacketCtx;

/// Length of an Ethernet header without tags, bytes: where the IP header begins.
pub const ETHERNET: u32 = 14;
/// Where layer 4 begins behind an IPv4 header without options; read without a helper call.
const COMMON_L4_V4: u32 = ETHERNET + 20;
/// Where layer 4 begins behind an IPv6 header without extension headers.
const COMMON_L4_V6: u32 = ETHERNET + 40;

/// Layer 4 begins here at the latest: packets are written within 4 KB, and nobody sends more of extension headers.
const FARTHEST_L4: u32 = 0xf00;

/// What fragmentation leaves of a packet.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// Not a fragment.
    Whole = 1,
    /// The first fragment: it has the ports.
    First,
    /// A later one: no ports.
    Later,
}

/// What follows a fixed IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip {
    /// Protocol; an extension header's number on IPv6.
    pub next: u8,
    /// Offset of what follows the header (options included on IPv4).
    pub next_offset: u32,
    /// Fragmentation, as far as the fixed header tells.
    pub fragment: Fragment,
}

/// How a family's headers are read.
pub trait Parse: Family {
    /// Reads the fixed header (and the length of IPv4 options); the addresses go into the key. `None`: too short or
    /// inconsistent.
    fn ip<C: PacketCtx + ?Sized>(ctx: &C, key: &mut FlowKey<Self>) -> Option<Ip>;

    /// ICMP's protocol number.
    const ICMP: u8;

    /// The protocol behind the fixed header; `None`: too short.
    fn next<C: PacketCtx + ?Sized>(ctx: &C) -> Option<u8>;

    /// What all fragments of a datagram share. `upper` is that of a fragment.
    fn fragment_id<C: PacketCtx + ?Sized>(ctx: &C, upper: Upper) -> Option<u32>;

    /// Source and destination, of whatever packet; `None`: too short.
    fn addresses<C: PacketCtx + ?Sized>(ctx: &C) -> Option<(Self::Addr, Self::Addr)>;

    /// The destination address, of whatever packet; `None`: too short.
    fn destination<C: PacketCtx + ?Sized>(ctx: &C) -> Option<Self::Addr>;

    /// Follows extension headers to layer 4.
    fn upper<C: PacketCtx + ?Sized>(ctx: &C, ip: &Ip) -> Upper;
}

/// Where layer 4 is, in one register however it was found: bits 0–31 its offset, 32–39 the protocol, 40–47 a
/// [`Fragment`], zero if there is no layer 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upper(u64);

impl Upper {
    /// Cut off, or behind more extension headers than anybody sends.
    pub const NONE: Self = Self(0);

    /// A layer 4 header.
    #[inline(always)]
    pub const fn new(proto: u8, offset: u32, fragment: Fragment) -> Self {
        Self(offset as u64 | (proto as u64) << 32 | (fragment as u64) << 40)
    }

    /// IP protocol number.
    #[inline(always)]
    pub const fn proto(self) -> u8 {
        (self.0 >> 32) as u8
    }

    /// Offset of the header.
    #[inline(always)]
    pub const fn offset(self) -> u32 {
        self.0 as u32
    }

    /// Fragmentation; `None`: there is no layer 4.
    #[inline(always)]
    pub const fn fragment(self) -> Option<Fragment> {
        match self.0 >> 40 {
            1 => Some(Fragment::Whole),
            2 => Some(Fragment::First),
            3 => Some(Fragment::Later),
            _ => None,
        }
    }
}

/// The layer 4 header, as far as we care.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct L4 {
    /// IP protocol number.
    pub proto: u8,
    /// TCP flags; 0 for other protocols.
    pub tcp_flags: u8,
    /// Source port, host order; 0 without ports.
    pub sport: u16,
    /// Destination port, host order; 0 without ports.
    pub dport: u16,
    /// Offset of the header.
    pub offset: u32,
    /// The first fragment: others follow.
    pub first: bool,
}

/// TCP's FIN flag (RFC 9293 §3.1).
pub const FIN: u8 = 0x01;
/// TCP's SYN flag.
pub const SYN: u8 = 0x02;
/// TCP's RST flag.
pub const RST: u8 = 0x04;
/// TCP's ACK flag.
pub const ACK: u8 = 0x10;

/// Why a packet has no tuple.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unread {
    /// No consistent IP header.
    Malformed,
    /// A later fragment; its protocol stands in the key.
    Fragment,
    /// Cut off.
    Truncated,
}

impl L4 {
    /// Reads layer 4.
    #[inline(always)]
    fn parse<F: Parse, C: PacketCtx + ?Sized>(ctx: &C, upper: Upper) -> Result<Self, Unread> {
        let first = match upper.fragment() {
            None => return Err(Unread::Truncated),
            Some(Fragment::Later) => return Err(Unread::Fragment),
            Some(fragment) => fragment as u8 == Fragment::First as u8,
        };
        let (proto, offset) = (upper.proto(), upper.offset());
        if offset > FARTHEST_L4 {
            return Err(Unread::Truncated);
        }
        if !has_ports(proto) {
            return Ok(Self { proto, tcp_flags: 0, sport: 0, dport: 0, offset, first });
        }
        let tcp = proto == timeout::TCP;
        let (ports_be, tcp_flags) = match (F::IS_V6, offset) {
            (false, COMMON_L4_V4) => read_at::<C, COMMON_L4_V4, { COMMON_L4_V4 + 13 }>(ctx, tcp),
            (true, COMMON_L4_V6) => read_at::<C, COMMON_L4_V6, { COMMON_L4_V6 + 13 }>(ctx, tcp),
            _ => ctx.load::<u32>(offset).zip(if tcp { ctx.load(offset + 13) } else { Some(0) }),
        }
        .ok_or(Unread::Truncated)?;
        let ports = u32::from_be(ports_be);
        Ok(Self { proto, tcp_flags, sport: (ports >> 16) as u16, dport: ports as u16, offset, first })
    }

    /// True for the segment that opens a TCP connection.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.tcp_flags & (SYN | ACK | RST) == SYN
    }
}

/// Source and destination port as one word in network order, and TCP's flags.
#[inline(always)]
fn read_at<C: PacketCtx + ?Sized, const PORTS: u32, const FLAGS: u32>(ctx: &C, tcp: bool) -> Option<(u32, u8)> {
    let ports_be = ctx.load_at::<u32, PORTS>()?;
    Some((ports_be, if tcp { ctx.load_at::<u8, FLAGS>()? } else { 0 }))
}

/// True for protocols that begin with two ports.
#[inline(always)]
pub const fn has_ports(proto: u8) -> bool {
    matches!(proto, timeout::TCP | timeout::UDP | timeout::SCTP)
}

/// Reads a packet into its flow key, in place.
#[inline(always)]
pub fn read<F: Parse, C: PacketCtx + ?Sized>(ctx: &C, dir: Direction, key: &mut FlowKey<F>) -> Result<L4, Unread> {
    let ip = F::ip(ctx, key).ok_or(Unread::Malformed)?;
    let upper = F::upper(ctx, &ip);
    key.proto = upper.proto();
    key.dir = dir as u8;
    key._pad = 0;
    let l4 = L4::parse::<F, C>(ctx, upper)?;
    key.sport = l4.sport;
    key.dport = l4.dport;
    Ok(l4)
}

/// The identification of a fragment's datagram.
#[inline(always)]
pub fn fragment_id<F: Parse, C: PacketCtx + ?Sized>(ctx: &C, room: &mut FlowKey<F>) -> Option<u32> {
    let ip = F::ip(ctx, room)?;
    F::fragment_id(ctx, F::upper(ctx, &ip))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn empty<F: Parse>() -> FlowKey<F> {
        FlowKey::new(F::UNSPECIFIED, 0, F::UNSPECIFIED, 0, 0, Direction::In)
    }

    /// The fixed header of a frame.
    pub(super) fn ip<F: Parse>(frame: &[u8]) -> Option<Ip> {
        F::ip(frame, &mut empty())
    }

    /// A frame's key and layer 4.
    pub(super) fn read<F: Parse>(frame: &[u8]) -> Result<(FlowKey<F>, L4), Unread> {
        let mut key = empty();
        super::read(frame, Direction::In, &mut key).map(|l4| (key, l4))
    }
}
