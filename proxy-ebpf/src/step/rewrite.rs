//! The only writer of addresses and ports.

use aya_ebpf::bindings::__sk_buff;
use proxy_common::abi::{Flow, FlowKey};
use proxy_common::{Address, Family, Outcome, V4, V6, algo::timeout};

use super::checksum::{self, Change, fold, fold16};
use super::flow::read;
use super::forward::is_unknown;
use super::route::LOOPBACK;
use crate::ctx::PacketCtx;
use crate::ctx::tc::{FLAT, HelperError, Skb};
use crate::packet::{ETHERNET, has_ports};

/// Offset of the destination MAC.
const ETH_DST: u32 = 0;
/// Offset of the IPv4 header's checksum (RFC 791 §3.1).
const IPV4_CHECKSUM: u32 = ETHERNET + 10;
/// Offset of the TCP checksum within its header (RFC 9293 §3.1).
pub(crate) const TCP_CHECKSUM: u32 = 16;
/// Offset of the UDP checksum within its header (RFC 768).
pub(crate) const UDP_CHECKSUM: u32 = 6;

/// Makes the packet, whose addresses and ports are the key's, what the flow says. `flow` may lie in a map: each of its
/// fields is read once.
///
/// # Safety
///
/// `flow` is a map's element, or working memory.
#[inline(always)]
pub(crate) unsafe fn apply<F: Rewrite>(
    skb: &Skb,
    key: &FlowKey<F>,
    l4: u32,
    flow: *const Flow<F>,
) -> Result<(), HelperError> {
    // SAFETY: readable, as the caller says.
    let (src, dst, sport, dport) =
        unsafe { ((*flow).src.copied(), (*flow).dst.copied(), (*flow).sport, (*flow).dport) };
    let addresses = fold(difference(&key.src, &src) + difference(&key.dst, &dst));
    let (from, to) = (pair(key.sport, key.dport), pair(sport, dport));
    let change = Change { addresses, ports: fold(u64::from(!from) + u64::from(to)) };
    match key.proto {
        timeout::TCP => {
            let checksum = checksum::settle::<F>(skb, l4 + TCP_CHECKSUM, false, change)?;
            skb.write(l4 + TCP_CHECKSUM, checksum)?;
        }
        timeout::UDP => {
            let checksum = checksum::settle::<F>(skb, l4 + UDP_CHECKSUM, true, change)?;
            skb.write(l4 + UDP_CHECKSUM, checksum)?;
        }
        _ => {}
    }
    if has_ports(key.proto) {
        skb.write(l4, to)?;
    }
    F::write(skb, &src, &dst, addresses)
}

/// The same where a packet begins a flow.
#[inline(always)]
fn rewritten<F: Rewrite>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, l4: u32) -> Outcome {
    // SAFETY: a map's element or working memory.
    match unsafe { apply(skb, key, l4, found) } {
        Ok(()) => Outcome::Request,
        Err(HelperError) => Outcome::DropHelper,
    }
}

subprograms! {
    /// [`rewritten`] of a family, as a global subprogram.
    Rewritten: Rewrite => rewritten(skb; l4: u32) as rewritten_v4, rewritten_v6
}

/// The same for a later fragment, which has no layer 4 header: its addresses alone.
///
/// # Safety
///
/// `flow` is a map's element, or working memory.
#[inline(always)]
pub(crate) unsafe fn apply_addresses<F: Rewrite>(
    skb: &Skb,
    key: &FlowKey<F>,
    flow: *const Flow<F>,
) -> Result<(), HelperError> {
    // SAFETY: readable, as the caller says.
    let (src, dst) = unsafe { ((*flow).src.copied(), (*flow).dst.copied()) };
    let addresses = fold(difference(&key.src, &src) + difference(&key.dst, &dst));
    F::write(skb, &src, &dst, addresses)
}

/// Two ports as they stand in the packet.
#[inline(always)]
pub(crate) const fn pair(source: u16, dest: u16) -> u32 {
    ((source as u32) << 16 | dest as u32).to_be()
}

/// One's complement difference of two addresses, not folded.
#[inline(always)]
pub(crate) fn difference<A: Address>(from: &A, to: &A) -> u64 {
    let (from, to) = (from.words(), to.words());
    let (mut sum, mut n) = (0, 0);
    while n < size_of::<A>() / 4 {
        sum += u64::from(!from[n]) + u64::from(to[n]);
        n += 1;
    }
    sum
}

/// What differs between the families' headers.
pub(crate) trait Rewrite: Family {
    /// Length of the packet from the fixed IP header's end on, as that header has it; padding of the frame is none of it.
    fn payload_len(skb: &Skb) -> Option<u32>;
    /// Writes both addresses and what the header sums over them; `addresses` is their difference.
    fn write(skb: &Skb, src: &Self::Addr, dst: &Self::Addr, addresses: u32) -> Result<(), HelperError>;
}

impl Rewrite for V4 {
    #[inline(always)]
    fn payload_len(skb: &Skb) -> Option<u32> {
        let total = u16::from_be(skb.at::<u16>(ETHERNET + 2)?);
        Some(u32::from(total).wrapping_sub(Self::HEADER_LEN))
    }

    #[inline(always)]
    fn write(skb: &Skb, src: &Self::Addr, dst: &Self::Addr, addresses: u32) -> Result<(), HelperError> {
        let held: u16 = skb.at(IPV4_CHECKSUM).ok_or(HelperError)?;
        // RFC 1624, equation 3.
        skb.write(IPV4_CHECKSUM, !fold16(u64::from(!held) + u64::from(addresses)))?;
        skb.write(ETHERNET + 12, src.words()[0])?;
        skb.write(ETHERNET + 16, dst.words()[0])
    }
}

impl Rewrite for V6 {
    #[inline(always)]
    fn payload_len(skb: &Skb) -> Option<u32> {
        Some(u32::from(u16::from_be(skb.at::<u16>(ETHERNET + 4)?)))
    }

    #[inline(always)]
    fn write(skb: &Skb, src: &Self::Addr, dst: &Self::Addr, _: u32) -> Result<(), HelperError> {
        skb.write_words(ETHERNET + 8, src.words())?;
        skb.write_words(ETHERNET + 24, dst.words())
    }
}

/// Gives the frame another destination.
#[inline(always)]
pub(crate) fn next_hop(skb: &Skb, mac: &[u8; 6]) -> Result<(), HelperError> {
    if FLAT {
        return Ok(());
    }
    skb.store(ETH_DST, mac, false)
}

/// Gives a packet without an Ethernet header the one that it is to arrive with, if the device of its flow has such: lo's
/// packets have one without a MAC. From a device with Ethernet to a flat one the kernel takes it off by itself.
///
/// A function of its own: where packets are forwarded there is no room on the stack.
#[inline(never)]
pub(crate) fn dress<F: Family>(skb: *mut __sk_buff, flow: *const Flow<F>) -> i32 {
    let (skb, mac, [high, low]) = (&Skb::new(skb), read!(flow, entry_mac), F::ETHERTYPE.to_be_bytes());
    if is_unknown(&mac) && read!(flow, ifindex) != LOOPBACK {
        return 0;
    }
    let header = [mac[0], mac[1], mac[2], mac[3], mac[4], mac[5], 0, 0, 0, 0, 0, 0, high, low];
    if skb.push_ethernet().and_then(|()| skb.store_first(&header)).is_ok() { 0 } else { 1 }
}

/// Turns the frame round: it is to leave by the device that it came in by.
#[inline(always)]
pub(crate) fn turn_round(skb: &Skb) -> Result<(), HelperError> {
    if FLAT {
        return skb.push_ethernet();
    }
    let m: [u8; 12] = skb.load(ETH_DST).ok_or(HelperError)?;
    skb.store(ETH_DST, &[m[6], m[7], m[8], m[9], m[10], m[11], m[0], m[1], m[2], m[3], m[4], m[5]], false)
}
