//! `FLOWS_V4/6` and `NEW_V4/6`: one entry per direction of a connection, each with the complete rewrite.
//!
//! A client C that reaches endpoint E through Service address V has a pair:
//!
//! | entry | key | rewritten to |
//! |---|---|---|
//! | owner | `C → V`, the direction in which requests meet us | `C' → E` |
//! | reply | `E → C'`, the direction in which replies meet us | `V → C` |
//!
//! C' is C unless the source is exchanged too. Each entry's partner follows from the entry alone: reverse the
//! rewritten tuple and take [`Flow::partner_direction`]. A masqueraded flow is two such pairs, the second one
//! `C → E` out and `E → N:p` in. The owner entry holds the flow's state, and its value never moves.

use crate::{Family, abi_struct};

/// Which side of the stack a packet is on when it meets us.
///
/// Part of the key: the reply of an endpoint on this node meets the endpoint's own device (in) before it meets the
/// client's (out), and only the latter may rewrite it.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Direction {
    /// Arrived on a device.
    In = 0,
    /// Leaves by a device.
    Out = 1,
}

impl Direction {
    /// The other one.
    #[inline(always)]
    #[must_use]
    pub const fn flip(self) -> Self {
        match self {
            Self::In => Self::Out,
            Self::Out => Self::In,
        }
    }
}

abi_struct! {
    /// Key of `FLOWS_V4/6` and `NEW_V4/6`: the packet as it meets us.
    pub struct FlowKey<F>: V4 = 16, V6 = 40 {
        /// Source address.
        src: F::Addr,
        /// Destination address.
        dst: F::Addr,
        /// Source port, host order.
        sport: u16,
        /// Destination port, host order.
        dport: u16,
        /// IP protocol number.
        proto: u8,
        /// A [`Direction`].
        dir: u8,
        /// Zero.
        _pad: u16,
    }
}

impl<F: Family> FlowKey<F> {
    /// The key of a packet.
    #[inline(always)]
    pub const fn new(src: F::Addr, sport: u16, dst: F::Addr, dport: u16, proto: u8, dir: Direction) -> Self {
        Self { src, dst, sport, dport, proto, dir: dir as u8, _pad: 0 }
    }

    /// The same tuple read backwards, in the given direction.
    #[inline(always)]
    #[must_use]
    pub const fn reversed(&self, dir: Direction) -> Self {
        Self::new(self.dst, self.dport, self.src, self.sport, self.proto, dir)
    }

    /// The direction.
    #[inline(always)]
    pub const fn direction(&self) -> Direction {
        if self.dir == Direction::Out as u8 { Direction::Out } else { Direction::In }
    }
}

abi_struct! {
    /// Value of `FLOWS_V4/6` and `NEW_V4/6`: the complete rewrite of one direction.
    pub struct Flow<F>: V4 = 48, V6 = 72 {
        /// Source after the rewrite.
        src: F::Addr,
        /// Destination after the rewrite.
        dst: F::Addr,
        /// Source port after the rewrite, host order.
        sport: u16,
        /// Destination port after the rewrite, host order.
        dport: u16,
        /// Bits of this type.
        flags: u16,
        /// TCP flags that the client has sent, [`Flow::FIN`] and [`Flow::RST`]; kept in the owner entry.
        seen_client: u8,
        /// TCP flags that the endpoint has sent; kept in the owner entry.
        seen_server: u8,
        /// The Service port.
        port_id: u32,
        /// The endpoint, index into `LIVE`.
        endpoint_id: u32,
        /// `LIVE`'s generation when the endpoint was chosen.
        endpoint_gen: u32,
        /// Where [`Flow::REDIRECT`] and [`Flow::REINJECT`] send the packet; the bridge of [`Flow::BRIDGED`]; of any other
        /// Service flow, the device on which its requests arrive.
        ifindex: u32,
        /// Destination MAC that a bridged request carries (the gateway's); of [`Flow::REINJECT`], the device's own.
        entry_mac: [u8; 6],
        /// Next hop's MAC for [`Flow::BRIDGED`].
        next_mac: [u8; 6],
        /// Last packet in this direction, seconds.
        last_seen_secs: u32,
    }
}

impl<F: Family> Flow<F> {
    /// The reply direction of a pair; without it the entry is the owner.
    pub const REPLY: u16 = 1;
    /// The endpoint is on the client's own bridge: write `next_mac` and let the bridge forward it.
    pub const BRIDGED: u16 = 2;
    /// A request of the node's own process: send it out of `ifindex`, resolving the neighbour.
    pub const REDIRECT: u16 = 4;
    /// A reply to the node's own process: let it arrive at `ifindex`, by which the request left.
    pub const REINJECT: u16 = 8;
    /// Client and endpoint are one: what arrives goes back by its device. With [`Flow::REINJECT`] they are processes of
    /// the node, and both entries meet us outwards.
    pub const HAIRPIN: u16 = 16;
    /// The choice was not the plain hash: both entries are stored even while the flow is half open.
    pub const PINNED: u16 = 32;
    /// A direct flow to an endpoint whose source port was exchanged; no Service is involved.
    pub const DIRECT: u16 = 64;
    /// Half open: used in a second of the clock after the one it began in.
    pub const AGED: u16 = 128;
    /// Half open: used for two seconds and more. Only then does an answer confirm a UDP flow.
    pub const LASTING: u16 = 256;
    /// Half open: the endpoint has answered with a SYN-ACK. The client's next segment confirms the flow.
    pub const ANSWERED: u16 = 512;
    /// Half open: a segment of another connection came in the reply's tuple, so the endpoint holds it already.
    pub const CONTESTED: u16 = 1024;
    /// An owner entry: the request's source is exchanged on its way out, by a pair of its own (rule 68).
    pub const MASQUERADE: u16 = 2048;
    /// The pair that exchanges the source: `C → E` leaving becomes `N → E`, `E → N` arriving becomes `E → C`.
    pub const MASQUERADED: u16 = 4096;
    /// Bits that end with a flow's being half open.
    pub const HALF_OPEN: u16 = Self::AGED | Self::LASTING | Self::ANSWERED | Self::CONTESTED;

    /// A FIN was seen.
    pub const FIN: u8 = 1;
    /// A RST was seen.
    pub const RST: u8 = 2;

    /// Nothing yet.
    pub const EMPTY: Self = Self {
        src: F::UNSPECIFIED,
        dst: F::UNSPECIFIED,
        sport: 0,
        dport: 0,
        flags: 0,
        seen_client: 0,
        seen_server: 0,
        port_id: 0,
        endpoint_id: 0,
        endpoint_gen: 0,
        ifindex: 0,
        entry_mac: [0; 6],
        next_mac: [0; 6],
        last_seen_secs: 0,
    };

    /// The direction in which the partner of an entry with this key direction meets us.
    #[inline(always)]
    pub const fn partner_direction(&self, own: Direction) -> Direction {
        if Self::is_of_node(self.flags) { own } else { own.flip() }
    }

    /// True if client and endpoint are processes of the node.
    #[inline(always)]
    pub const fn is_of_node(flags: u16) -> bool {
        flags & (Self::HAIRPIN | Self::REINJECT) == Self::HAIRPIN | Self::REINJECT
    }

    /// The key under which the other half stands.
    #[inline(always)]
    pub const fn partner_key(&self, own: &FlowKey<F>) -> FlowKey<F> {
        FlowKey::new(self.dst, self.dport, self.src, self.sport, own.proto, self.partner_direction(own.direction()))
    }

    /// The same, written in place: a key is 40 bytes of a program's 512 bytes of stack.
    #[inline(always)]
    pub const fn partner_into(&self, own: &FlowKey<F>, out: &mut FlowKey<F>) {
        out.src = self.dst;
        out.dst = self.src;
        out.sport = self.dport;
        out.dport = self.sport;
        out.proto = own.proto;
        out.dir = self.partner_direction(own.direction()) as u8;
        out._pad = 0;
    }

    /// True if the TCP connection has ended: a reset, or a FIN of both sides. Judged on the owner entry.
    #[inline(always)]
    pub const fn is_closed(&self) -> bool {
        (self.seen_client | self.seen_server) & Self::RST != 0 || self.seen_client & self.seen_server & Self::FIN != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Addr4, V4};

    fn addr(last: u8) -> Addr4 {
        Addr4 { octets: [10, 0, 0, last] }
    }

    #[test]
    fn the_partner_of_the_partner_is_the_entry_itself() {
        for flags in [0, Flow::<V4>::HAIRPIN, Flow::<V4>::HAIRPIN | Flow::<V4>::REINJECT] {
            let owner = FlowKey::<V4>::new(addr(1), 40_000, addr(9), 80, 6, Direction::In);
            let request = flow(addr(1), 40_000, addr(2), 8080, flags);
            let reply_key = request.partner_key(&owner);
            let reply = flow(addr(9), 80, addr(1), 40_000, flags);
            assert_eq!(reply.partner_key(&reply_key), owner);
        }
    }

    #[test]
    fn a_connection_is_closed_by_one_reset_or_two_fins() {
        let mut f = flow(addr(1), 1, addr(2), 2, 0);
        f.seen_client = Flow::<V4>::FIN;
        assert!(!f.is_closed());
        f.seen_server = Flow::<V4>::FIN;
        assert!(f.is_closed());
        f.seen_client = 0;
        assert!(!f.is_closed());
        f.seen_server = Flow::<V4>::RST;
        assert!(f.is_closed());
    }

    fn flow(src: Addr4, sport: u16, dst: Addr4, dport: u16, flags: u16) -> Flow<V4> {
        Flow { src, dst, sport, dport, flags, ..Flow::EMPTY }
    }
}
