//! How a request reaches its endpoint: by the stack, over the client's own bridge, back to the client itself, or from
//! a process of the node past the route that the Service's address has.

use proxy_common::Outcome;
use proxy_common::abi::{Config, Device, Direction, Flow, FlowKey, Role};
use proxy_common::{Family, V4, V6};

use super::choose::spare_port;
use crate::config;
use crate::ctx::tc::{Fib, Skb};
use crate::maps::{self, Maps};

/// The loopback device's index in every network namespace.
pub(crate) const LOOPBACK: u32 = 1;

/// Completes the owner entry: flags, device, MAC, and the source where it changes.
#[inline(always)]
pub(crate) fn request<F: Source>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>) -> Result<(), Outcome> {
    let outward = key.dir == Direction::Out as u8;
    if !outward && found.dst == key.src && !mutant!("rule-74") {
        return to_itself(found);
    }
    if mutant!("rule-75b") && !outward && F::node_addrs().get_ptr(&{ found.dst }).is_some() {
        found.src = maps::device(skb.ifindex()).map_or(found.src, F::source);
    }
    let (mut entry, mut flags) = (LOOPBACK, 0);
    if outward {
        flags = source_wanted();
    } else {
        match maps::device(skb.ifindex()) {
            Some(device) if device.role == Role::BridgePort as u8 => entry = device.master,
            _ => return Ok(()),
        }
    }
    // One question for all: it is 64 bytes of stack.
    let source = if outward { F::UNSPECIFIED } else { found.src };
    let mut fib = Fib::new::<F>(entry, &source, &found.dst);
    let result = skb.route(&mut fib, flags);
    if outward {
        return from_node(skb, key, found, &fib, result);
    }
    over_bridge(found, entry, &fib, result);
    Ok(())
}

/// What the kernel is asked for beside the way, where it can tell (6.7): the source that it would choose itself.
#[inline(always)]
pub(crate) fn source_wanted() -> u32 {
    if config::get().is_some_and(|c| c.flags & Config::FIB_SOURCE != 0) { Fib::SOURCE } else { 0 }
}

/// The node's address on a device towards where the kernel was asked for the way: what it says, if the way is by that
/// device or the bridge of which it is a port; else the one that the agent found first.
#[inline(always)]
pub(crate) fn node_source<F: Source>(ifindex: u32, fib: &Fib, result: i64) -> Option<F::Addr> {
    let mut source = F::UNSPECIFIED;
    if leads_on(result) && (fib.ifindex == ifindex || is_port_of(ifindex, fib.ifindex)) && !mutant!("rule-72-nearest") {
        // Before 6.7 the kernel leaves the source as it was asked: unspecified.
        source = fib.source::<F>();
    }
    if source == F::UNSPECIFIED {
        source = F::source(maps::device(ifindex)?);
    }
    (source != F::UNSPECIFIED).then_some(source)
}

/// True if the kernel would forward the packet.
#[inline(always)]
const fn leads_on(result: i64) -> bool {
    matches!(result, Fib::SUCCESS | Fib::NO_NEIGHBOUR | Fib::TOO_LONG)
}

#[inline(always)]
fn is_port_of(ifindex: u32, bridge: u32) -> bool {
    maps::device(ifindex).is_some_and(|device| device.master != 0 && device.master == bridge)
}

/// The endpoint is the client, which drops what comes from its own address: masqueraded, whatever the policy says (rule
/// 74).
#[inline(always)]
fn to_itself<F: Family>(found: &mut Flow<F>) -> Result<(), Outcome> {
    if found.sport == found.dport && !mutant!("rule-74-port") {
        // Both halves would have one key.
        return Err(Outcome::NotOurs);
    }
    found.flags |= Flow::<F>::MASQUERADE | Flow::<F>::HAIRPIN;
    Ok(())
}

/// If the endpoint is on the client's own bridge, the packet takes the way of a direct one: by MAC, not through the
/// router.
#[inline(always)]
pub(crate) fn over_bridge<F: Source>(found: &mut Flow<F>, bridge: u32, fib: &Fib, result: i64) {
    if fib.ifindex != bridge || !matches!(result, Fib::SUCCESS | Fib::NO_NEIGHBOUR) {
        return;
    }
    // With the neighbour unknown the stack routes this packet and asks for it; a later one finds it.
    found.next_mac = if result == Fib::SUCCESS { fib.dmac } else { [0; 6] };
    if mutant!("routed-bridge") {
        return;
    }
    found.flags |= Flow::<F>::BRIDGED;
    found.ifindex = bridge;
}

/// A process of the node: the stack has routed the packet to the Service's address; the kernel knows a better way to
/// the endpoint.
#[inline(always)]
fn from_node<F: Source>(
    skb: &Skb,
    key: &FlowKey<F>,
    found: &mut Flow<F>,
    fib: &Fib,
    result: i64,
) -> Result<(), Outcome> {
    match result {
        _ if leads_on(result) => {}
        Fib::NOT_FORWARDED if !mutant!("rule-74-node") => return to_node(skb, key, found),
        _ => return Err(Outcome::DropNoRoute),
    }
    if let Some(source) = node_source::<F>(fib.ifindex, fib, result) {
        found.src = source;
    }
    // Both entries are stored: the reply alone does not tell by which device the request left.
    found.flags |= Flow::<F>::REDIRECT | Flow::<F>::PINNED;
    found.ifindex = fib.ifindex;
    Ok(())
}

/// The endpoint is a process of the node as well. Over loopback its reply would never meet us; so the request arrives
/// from the Service's address at the device whose route leads there, and the reply leaves by it.
#[inline(always)]
fn to_node<F: Source>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>) -> Result<(), Outcome> {
    // The kernel says the same of an address that no route leads to.
    let dst = found.dst;
    if F::node_addrs().get_ptr(&dst).is_none() {
        return Err(Outcome::DropNoRoute);
    }
    let device = maps::device(skb.ifindex()).ok_or(Outcome::DropNoRoute)?;
    found.src = key.dst;
    found.flags |= Flow::<F>::REINJECT | Flow::<F>::HAIRPIN;
    found.ifindex = skb.ifindex();
    found.entry_mac = device.mac;
    if skb.ifindex() == LOOPBACK && found.sport == key.sport {
        // The Service's address is the node's own: a connection without a Service may have this very tuple.
        found.sport = spare_port(u32::from(key.sport) << 4, 0);
        found.flags |= Flow::<F>::PINNED;
    }
    Ok(())
}

/// A device's preferred source address.
pub(crate) trait Source: Maps {
    fn source(device: &Device) -> Self::Addr;
}

impl Source for V4 {
    #[inline(always)]
    fn source(device: &Device) -> Self::Addr {
        device.source_v4
    }
}

impl Source for V6 {
    #[inline(always)]
    fn source(device: &Device) -> Self::Addr {
        device.source_v6
    }
}
