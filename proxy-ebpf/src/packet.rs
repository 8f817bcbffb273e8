//! A frame's headers, parsed once. Offsets come out typed; what is cut off or malformed is told apart.

pub mod ipv4;
pub mod ipv6;

use proxy_common::{Family, abi::Direction, abi::FlowKey, algo::timeout};

use crate::ctx::{PacketCtx, Plain};

/// Length of an Ethernet header without tags, bytes: where the IP header begins.
pub const ETHERNET: u32 = 14;
/// Where layer 4 begins behind an IPv4 header without options; read without a helper call.
const COMMON_L4_V4: u32 = ETHERNET + 20;
/// Where layer 4 begins behind an IPv6 header without extension headers.
const COMMON_L4_V6: u32 = ETHERNET + 40;

/// What fragmentation leaves of a packet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fragment {
    /// Not a fragment.
    Whole,
    /// The first fragment: it has the ports.
    First,
    /// A later one: no ports.
    Later,
}

/// An IP header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ip<F: Family> {
    /// Source address.
    pub src: F::Addr,
    /// Destination address.
    pub dst: F::Addr,
    /// Protocol of what follows the fixed header; an extension header's number on IPv6.
    pub next: u8,
    /// Offset of what follows the header (options included on IPv4).
    pub next_offset: u32,
    /// Fragmentation, as far as the fixed header tells.
    pub fragment: Fragment,
}

/// How a family's headers are read.
pub trait Parse: Family {
    /// Reads the fixed header (and the length of IPv4 options). `None`: too short or inconsistent.
    fn ip<C: PacketCtx + ?Sized>(ctx: &C) -> Option<Ip<Self>>;

    /// Follows extension headers to layer 4: protocol, offset, fragmentation. `None`: cut off, or more of them than
    /// anybody sends.
    fn upper<C: PacketCtx + ?Sized>(ctx: &C, ip: &Ip<Self>) -> Option<Upper>;
}

/// Where layer 4 is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Upper {
    /// IP protocol number.
    pub proto: u8,
    /// Offset of the layer 4 header.
    pub offset: u32,
    /// Fragmentation.
    pub fragment: Fragment,
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
}

/// TCP's FIN flag (RFC 9293 §3.1).
pub const FIN: u8 = 0x01;
/// TCP's SYN flag.
pub const SYN: u8 = 0x02;
/// TCP's RST flag.
pub const RST: u8 = 0x04;
/// TCP's ACK flag.
pub const ACK: u8 = 0x10;

/// Why there is no layer 4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoL4 {
    /// A later fragment.
    Fragment,
    /// Cut off.
    Truncated,
}

/// The two ports that TCP, UDP and SCTP begin with, network order.
#[repr(C)]
#[derive(Clone, Copy)]
struct Ports {
    source_be: u16,
    dest_be: u16,
}

// SAFETY: two integers, no padding.
unsafe impl Plain for Ports {}

impl L4 {
    /// Reads layer 4 behind an IP header.
    #[inline(always)]
    pub fn parse<F: Parse, C: PacketCtx + ?Sized>(ctx: &C, ip: &Ip<F>) -> Result<Self, NoL4> {
        let upper = F::upper(ctx, ip).ok_or(NoL4::Truncated)?;
        if upper.fragment == Fragment::Later {
            return Err(NoL4::Fragment);
        }
        let (offset, proto) = (upper.offset, upper.proto);
        if !has_ports(proto) {
            return Ok(Self { proto, tcp_flags: 0, sport: 0, dport: 0, offset });
        }
        let tcp = proto == timeout::TCP;
        let (ports, tcp_flags) = match (F::IS_V6, offset) {
            (false, COMMON_L4_V4) => read_at::<C, COMMON_L4_V4, { COMMON_L4_V4 + 13 }>(ctx, tcp),
            (true, COMMON_L4_V6) => read_at::<C, COMMON_L4_V6, { COMMON_L4_V6 + 13 }>(ctx, tcp),
            _ => ctx.load::<Ports>(offset).zip(if tcp { ctx.load(offset + 13) } else { Some(0) }),
        }
        .ok_or(NoL4::Truncated)?;
        let (sport, dport) = (u16::from_be(ports.source_be), u16::from_be(ports.dest_be));
        Ok(Self { proto, tcp_flags, sport, dport, offset })
    }

    /// True for the segment that opens a TCP connection.
    #[inline(always)]
    pub const fn opens(&self) -> bool {
        self.tcp_flags & (SYN | ACK | RST) == SYN
    }
}

#[inline(always)]
fn read_at<C: PacketCtx + ?Sized, const PORTS: u32, const FLAGS: u32>(ctx: &C, tcp: bool) -> Option<(Ports, u8)> {
    let ports = ctx.load_at::<Ports, PORTS>()?;
    Some((ports, if tcp { ctx.load_at::<u8, FLAGS>()? } else { 0 }))
}

/// True for protocols that begin with two ports.
#[inline(always)]
pub const fn has_ports(proto: u8) -> bool {
    matches!(proto, timeout::TCP | timeout::UDP | timeout::SCTP)
}

/// The flow key of a packet.
#[inline(always)]
pub fn key<F: Family>(ip: &Ip<F>, l4: &L4, dir: Direction) -> FlowKey<F> {
    FlowKey::new(ip.src, l4.sport, ip.dst, l4.dport, l4.proto, dir)
}
