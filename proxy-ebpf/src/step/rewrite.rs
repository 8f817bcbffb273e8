//! The only writer of addresses and ports. Helpers only: they keep partial, complete and GSO checksums right.

use proxy_common::abi::Flow;
use proxy_common::{Addr4, Addr6, Address, Family, V4, V6, algo::timeout};

use crate::ctx::tc::{self, HelperError, Skb};
use crate::packet::{ETHERNET, Ip, L4, has_ports};

/// Offset of the destination MAC.
const ETH_DST: u32 = 0;
/// Offset of the TCP checksum within its header (RFC 9293 §3.1).
const TCP_CHECKSUM: u32 = 16;
/// Offset of the UDP checksum within its header (RFC 768).
const UDP_CHECKSUM: u32 = 6;

/// Makes the packet what the flow says.
#[inline(always)]
pub(crate) fn apply<F: Rewrite>(skb: &Skb, ip: &Ip<F>, l4: &L4, flow: &Flow<F>) -> Result<(), HelperError> {
    if ip.src != flow.src {
        address::<F>(skb, l4, F::SRC, &ip.src, &flow.src)?;
    }
    if ip.dst != flow.dst {
        address::<F>(skb, l4, F::DST, &ip.dst, &flow.dst)?;
    }
    if !has_ports(l4.proto) {
        return Ok(());
    }
    if l4.sport != flow.sport {
        port(skb, l4, 0, l4.sport, flow.sport)?;
    }
    if l4.dport != flow.dport {
        port(skb, l4, 2, l4.dport, flow.dport)?;
    }
    Ok(())
}

/// What differs between the families' headers.
pub(crate) trait Rewrite: Family {
    /// Offset of the source address in the frame.
    const SRC: u32;
    /// Offset of the destination address in the frame.
    const DST: u32;

    /// Replaces an address and what the IP header sums over it.
    fn replace(skb: &Skb, offset: u32, from: &Self::Addr, to: &Self::Addr) -> Result<(), HelperError>;
}

impl Rewrite for V4 {
    const SRC: u32 = ETHERNET + 12;
    const DST: u32 = ETHERNET + 16;

    #[inline(always)]
    fn replace(skb: &Skb, offset: u32, from: &Addr4, to: &Addr4) -> Result<(), HelperError> {
        skb.ip_checksum(ETHERNET + 10, from.words()[0], to.words()[0])?;
        skb.store(offset, to, false)
    }
}

impl Rewrite for V6 {
    const SRC: u32 = ETHERNET + 8;
    const DST: u32 = ETHERNET + 24;

    // IPv6 has no header checksum to cancel the address, which the pseudo-header helper assumes for a
    // CHECKSUM_COMPLETE packet (net/core/utils.c, inet_proto_csum_replace_by_diff). Storing with
    // BPF_F_RECOMPUTE_CSUM adds exactly what that assumption took away, on every kernel.
    #[inline(always)]
    fn replace(skb: &Skb, offset: u32, _: &Addr6, to: &Addr6) -> Result<(), HelperError> {
        skb.store(offset, to, true)
    }
}

#[inline(always)]
fn address<F: Rewrite>(skb: &Skb, l4: &L4, offset: u32, from: &F::Addr, to: &F::Addr) -> Result<(), HelperError> {
    if !cfg!(feature = "mutant-no-checksum")
        && let Some(checksum) = checksum_offset(l4)
    {
        let diff = tc::checksum_diff(from, to);
        skb.pseudo_checksum(checksum, diff, l4.proto == timeout::UDP)?;
    }
    F::replace(skb, offset, from, to)
}

#[inline(always)]
fn port(skb: &Skb, l4: &L4, field: u32, from: u16, to: u16) -> Result<(), HelperError> {
    if let Some(checksum) = checksum_offset(l4) {
        skb.port_checksum(checksum, from.to_be(), to.to_be(), l4.proto == timeout::UDP)?;
    }
    skb.store(l4.offset + field, &to.to_be(), false)
}

/// Where layer 4 keeps a checksum over the addresses.
#[inline(always)]
fn checksum_offset(l4: &L4) -> Option<u32> {
    match l4.proto {
        timeout::TCP => Some(l4.offset + TCP_CHECKSUM),
        timeout::UDP => Some(l4.offset + UDP_CHECKSUM),
        _ => None,
    }
}

/// Gives the frame another destination.
#[inline(always)]
pub(crate) fn next_hop(skb: &Skb, mac: &[u8; 6]) -> Result<(), HelperError> {
    skb.store(ETH_DST, mac, false)
}

/// Turns the frame round.
#[inline(always)]
pub(crate) fn swap_macs(skb: &Skb) -> Result<(), HelperError> {
    use crate::ctx::PacketCtx;
    let m: [u8; 12] = skb.load(ETH_DST).ok_or(HelperError)?;
    skb.store(ETH_DST, &[m[6], m[7], m[8], m[9], m[10], m[11], m[0], m[1], m[2], m[3], m[4], m[5]], false)
}
