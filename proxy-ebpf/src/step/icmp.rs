//! An ICMP error about a translated packet. Whoever sent that packet must find its own addresses in the quotation, or it
//! learns neither the path's MTU nor that nobody listens (rule 102).
//!
//! The error goes the way of the flow's other direction: turned round, what it quotes is a key of that direction, and the
//! entry tells what the addresses were. Written here: the quoted addresses, ports and checksums, and the error's own.

use proxy_common::abi::{Direction, Flow, FlowKey};
use proxy_common::{Address, Family, Outcome, V4, V6, algo::timeout};

use super::checksum::{fold, fold16};
use super::flow;
use super::rewrite::{self, Rewrite, TCP_CHECKSUM, UDP_CHECKSUM, pair};
use crate::ctx::tc::{HelperError, Skb};
use crate::maps::{Entry, Maps};
use crate::packet::has_ports;

/// ICMP's own header (RFC 792, RFC 4443 §2.1); the quotation follows.
const HEADER: u32 = 8;
/// ICMP's checksum within its header.
const CHECKSUM: u32 = 2;

/// Finds the flow of which the message speaks: `IcmpError` with a copy of it in `found`, and the quoted tuple, turned round,
/// in the working memory's `partner`.
#[inline(always)]
fn concerns<F: Quote>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, l4: u32) -> Outcome {
    let Some(kind) = byte(skb, l4) else { return Outcome::NotOurs };
    if F::leads_to_itself(skb, key, l4, kind) {
        return Outcome::DropRedirect;
    }
    let redirect = F::is_redirect(kind);
    if !F::is_error(kind) && !redirect {
        return Outcome::NotOurs;
    }
    let Some(Entry { partner, .. }) = F::reply() else { return Outcome::DropHelper };
    partner.dir = key.dir;
    partner._pad = 0;
    if F::quoted(skb, l4 + HEADER, partner).is_none() || partner.dst != key.dst {
        return Outcome::NotOurs;
    }
    let held = F::flows().get_ptr(&*partner).or_else(|| F::new_flows().get_ptr(&*partner));
    let Some(held) = held else { return Outcome::NotOurs };
    // SAFETY: the map's element, copied out once.
    *found = unsafe { *held };
    if redirect {
        // It names the endpoint as a shorter way to the Service's address.
        return if key.dir == Direction::Out as u8 { Outcome::DropRedirect } else { Outcome::NotOurs };
    }
    if found.flags & Flow::<F>::REPLY == 0 && !flow::is_for_us(skb, key, held) {
        return Outcome::LayerTwoTransit;
    }
    if Flow::<F>::is_of_node(found.flags) || mutant!("rule-102-icmp") { Outcome::NotOurs } else { Outcome::IcmpError }
}

/// Writes what the sender of the quoted packet knows.
#[inline(always)]
fn requote<F: Quote>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, l4: u32) -> Outcome {
    let Some(Entry { partner, .. }) = F::reply() else { return Outcome::DropHelper };
    match write(skb, key, partner, found, l4) {
        Ok(()) => Outcome::IcmpError,
        Err(HelperError) => Outcome::DropHelper,
    }
}

/// `quoted` is turned round: its source is the quoted packet's destination.
#[inline(always)]
fn write<F: Quote>(
    skb: &Skb,
    key: &FlowKey<F>,
    quoted: &FlowKey<F>,
    found: &Flow<F>,
    l4: u32,
) -> Result<(), HelperError> {
    let inner = l4 + HEADER;
    let behind = F::behind(skb, inner).ok_or(HelperError)?;
    let addresses = fold(rewrite::difference(&quoted.dst, &found.dst) + rewrite::difference(&quoted.src, &found.src));
    let (from, to) = (pair(quoted.dport, quoted.sport), pair(found.dport, found.sport));
    let ports = fold(u64::from(!from) + u64::from(to));
    let mut change = u64::from(ports) + layer_4(skb, quoted.proto, behind, addresses, ports);
    skb.at::<u32>(behind).ok_or(HelperError)?;
    skb.write(behind, to)?;
    let (src, dst) = (found.dst.copied(), found.src.copied());
    change += u64::from(F::write_quoted(skb, inner, [&src, &dst], addresses)?);
    // An error of the endpoint itself comes from the Service; one of a router on the way keeps its sender.
    let sender = if key.src == quoted.src { found.src.copied() } else { key.src.copied() };
    let outer = fold(rewrite::difference(&key.src, &sender) + rewrite::difference(&key.dst, &found.dst));
    if F::IS_V6 {
        // The pseudo header (RFC 4443 §2.3).
        change += u64::from(outer);
    }
    let held: u16 = skb.at(l4 + CHECKSUM).ok_or(HelperError)?;
    skb.write(l4 + CHECKSUM, !fold16(u64::from(!held) + u64::from(fold(change))))?;
    F::write(skb, &sender, &src, outer)
}

/// The quoted checksum, as far as it is quoted; returns what the message's sum changes by.
#[inline(always)]
fn layer_4(skb: &Skb, proto: u8, behind: u32, addresses: u32, ports: u32) -> u64 {
    let at = match proto {
        timeout::TCP => behind + TCP_CHECKSUM,
        timeout::UDP => behind + UDP_CHECKSUM,
        _ => return 0,
    };
    let Some(held) = skb.at::<u16>(at) else { return 0 };
    if held == 0 && proto == timeout::UDP {
        return 0;
    }
    let new = !fold16(u64::from(!held) + u64::from(addresses) + u64::from(ports));
    if skb.write(at, new).is_err() {
        return 0;
    }
    u64::from(!held) + u64::from(new)
}

/// What differs between the families' messages.
pub(crate) trait Quote: Rewrite + Maps {
    /// A destination unreachable, a packet too big, a time exceeded, a parameter problem.
    fn is_error(kind: u8) -> bool;
    /// A shorter way for what is quoted.
    fn is_redirect(kind: u8) -> bool;
    /// A redirect that tells a host the way to its own address: it was its own endpoint, and the packet left by the device
    /// that it came in by.
    fn leads_to_itself(skb: &Skb, key: &FlowKey<Self>, l4: u32, kind: u8) -> bool;
    /// Reads the quoted tuple, turned round. `None`: cut off, without ports, or not to be read.
    fn quoted(skb: &Skb, inner: u32, key: &mut FlowKey<Self>) -> Option<()>;
    /// Where the quoted layer 4 begins.
    fn behind(skb: &Skb, inner: u32) -> Option<u32>;
    /// Writes the quoted addresses, and what their header sums over them; returns what the message's sum changes by.
    fn write_quoted(skb: &Skb, inner: u32, addrs: [&Self::Addr; 2], addresses: u32) -> Result<u32, HelperError>;
}

/// A byte, and room for one more: the compiler turns the check of a single one into a form that the verifier does not
/// know.
#[inline(always)]
fn byte(skb: &Skb, at: u32) -> Option<u8> {
    Some(skb.at::<u16>(at)?.to_ne_bytes()[0])
}

/// The quoted ports, turned round.
#[inline(always)]
fn quoted_ports<F: Family>(skb: &Skb, behind: u32, key: &mut FlowKey<F>) -> Option<()> {
    let ports = u32::from_be(skb.at::<u32>(behind)?);
    (key.dport, key.sport) = ((ports >> 16) as u16, ports as u16);
    Some(())
}

impl Quote for V4 {
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 3 | 4 | 11 | 12)
    }

    #[inline(always)]
    fn is_redirect(kind: u8) -> bool {
        kind == 5
    }

    // It is found by what it quotes.
    #[inline(always)]
    fn leads_to_itself(_: &Skb, _: &FlowKey<Self>, _: u32, _: u8) -> bool {
        false
    }

    #[inline(always)]
    fn quoted(skb: &Skb, inner: u32, key: &mut FlowKey<Self>) -> Option<()> {
        let behind = Self::behind(skb, inner)?;
        // A later fragment has no ports to quote.
        if u16::from_be(skb.at(inner + 6)?) & 0x1fff != 0 {
            return None;
        }
        key.proto = byte(skb, inner + 9)?;
        if !has_ports(key.proto) {
            return None;
        }
        key.dst = Address::of_words([skb.at(inner + 12)?, 0, 0, 0]);
        key.src = Address::of_words([skb.at(inner + 16)?, 0, 0, 0]);
        quoted_ports(skb, behind, key)
    }

    #[inline(always)]
    fn behind(skb: &Skb, inner: u32) -> Option<u32> {
        let version_ihl = byte(skb, inner)?;
        (version_ihl >> 4 == 4 && version_ihl & 15 >= 5).then_some(inner + u32::from(version_ihl & 15) * 4)
    }

    #[inline(always)]
    fn write_quoted(skb: &Skb, inner: u32, [src, dst]: [&Self::Addr; 2], addresses: u32) -> Result<u32, HelperError> {
        let held: u16 = skb.at(inner + 10).ok_or(HelperError)?;
        let new = !fold16(u64::from(!held) + u64::from(addresses));
        skb.at::<u32>(inner + 16).ok_or(HelperError)?;
        skb.write(inner + 10, new)?;
        skb.write(inner + 12, src.words()[0])?;
        skb.write(inner + 16, dst.words()[0])?;
        Ok(fold(u64::from(addresses) + u64::from(!held) + u64::from(new)))
    }
}

/// Length of IPv6's fixed header.
const V6_HEADER: u32 = 40;

impl Quote for V6 {
    #[inline(always)]
    fn is_error(kind: u8) -> bool {
        matches!(kind, 1..=4)
    }

    // A redirect of IPv6 quotes in an option (RFC 4861 §4.5), and is sent only for the node's own neighbours.
    #[inline(always)]
    fn is_redirect(_: u8) -> bool {
        false
    }

    #[inline(always)]
    fn leads_to_itself(skb: &Skb, key: &FlowKey<Self>, l4: u32, kind: u8) -> bool {
        // RFC 4861 §4.5: the target, and behind it the destination.
        let at = l4 + HEADER + 16;
        kind == 137
            && key.dir == Direction::Out as u8
            && skb.at::<[u32; 4]>(at).is_some_and(|words| <Self as Family>::Addr::of_words(words) == key.dst)
    }

    #[inline(always)]
    fn quoted(skb: &Skb, inner: u32, key: &mut FlowKey<Self>) -> Option<()> {
        let behind = Self::behind(skb, inner)?;
        key.proto = byte(skb, inner + 6)?;
        if !has_ports(key.proto) {
            return None;
        }
        key.dst =
            Address::of_words([skb.at(inner + 8)?, skb.at(inner + 12)?, skb.at(inner + 16)?, skb.at(inner + 20)?]);
        key.src =
            Address::of_words([skb.at(inner + 24)?, skb.at(inner + 28)?, skb.at(inner + 32)?, skb.at(inner + 36)?]);
        quoted_ports(skb, behind, key)
    }

    #[inline(always)]
    fn behind(skb: &Skb, inner: u32) -> Option<u32> {
        let version = byte(skb, inner)?;
        (version >> 4 == 6).then_some(inner + V6_HEADER)
    }

    #[inline(always)]
    fn write_quoted(skb: &Skb, inner: u32, [src, dst]: [&Self::Addr; 2], addresses: u32) -> Result<u32, HelperError> {
        skb.at::<u32>(inner + 36).ok_or(HelperError)?;
        skb.write_words(inner + 8, src.words())?;
        skb.write_words(inner + 24, dst.words())?;
        Ok(addresses)
    }
}

subprograms! {
    /// [`concerns`] of a family, as a global subprogram.
    Concerns: Quote => concerns(skb; l4: u32) as concerns_v4, concerns_v6
}

subprograms! {
    /// [`requote`] of a family, as a global subprogram.
    Requote: Quote => requote(skb; l4: u32) as requote_v4, requote_v6
}

/// What the pipeline needs of a family.
pub(crate) trait Icmp: Concerns + Requote {}

impl<F: Concerns + Requote> Icmp for F {}
