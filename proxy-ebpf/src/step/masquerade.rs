//! A request on its way out whose source becomes the node's, so that the reply comes back here (rules 68–76).
//!
//! The client's pair says that it is due; the exchange itself is a pair of its own, made by the first packet that really
//! leaves. What netfilter has masqueraded already has another source by then, is in no pair, and is left alone.

use proxy_common::Outcome;
use proxy_common::abi::{Config, Direction, Flow, FlowKey, Role};
use proxy_common::algo::hash;

use super::attempt::{reply_entry, store_owner};
use super::reserve::{self, Reservation};
use super::route::{self, LOOPBACK, Source};
use crate::clock::now_secs;
use crate::config;
use crate::ctx::tc::{Fib, Skb};
use crate::maps::{self, Entry};

/// Source ports that are tried for one flow.
const ATTEMPTS: u32 = 32;

/// Completes the client's first packet: source address and port, and the entry that leads replies back.
#[inline(always)]
pub(crate) fn begin<F: Masquerade>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>) -> Outcome {
    let outcome = F::prepare(skb, key, found);
    if outcome != Outcome::Masqueraded {
        return outcome;
    }
    for _ in 0..ATTEMPTS {
        let outcome = F::take_port(skb, key, found);
        if outcome != Outcome::NotOurs {
            return outcome;
        }
    }
    Outcome::DropNoSourcePort
}

/// Whose packet it is, and which address it gets: the one that the node prefers on this very device.
#[inline(always)]
fn prepare<F: Source>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>) -> Outcome {
    let Some(Entry { partner, .. }) = F::reply() else { return Outcome::DropHelper };
    *partner = key.reversed(Direction::Out);
    let held = F::flows().get_ptr(&*partner).or_else(|| F::new_flows().get_ptr(&*partner));
    let Some(held) = held else { return Outcome::NotOurs };
    // SAFETY: the map's element; each field is read once.
    let held = unsafe { &*held };
    if held.flags & (Flow::<F>::REPLY | Flow::<F>::MASQUERADE) != Flow::<F>::REPLY | Flow::<F>::MASQUERADE {
        return Outcome::NotOurs;
    }
    *found = Flow { dst: key.dst, dport: key.dport, ..Flow::EMPTY };
    found.port_id = held.port_id;
    found.endpoint_id = held.endpoint_id;
    found.endpoint_gen = held.endpoint_gen;
    found.flags = Flow::<F>::MASQUERADED | Flow::<F>::PINNED;
    found.last_seen_secs = now_secs();
    let Some(device) = maps::device(skb.ifindex()) else { return Outcome::DropNoRoute };
    let Some(source) = source_towards::<F>(skb, &key.dst) else { return Outcome::DropNoRoute };
    found.src = if mutant!("rule-72") { key.src } else { source };
    if held.flags & Flow::<F>::HAIRPIN != 0 {
        found.flags |= Flow::<F>::HAIRPIN;
    } else if device.role == Role::BridgePort as u8 {
        back_over_bridge(skb, key, found, device.master);
    }
    Outcome::Masqueraded
}

/// The node's address on this device that is nearest to the endpoint.
#[inline(always)]
fn source_towards<F: Source>(skb: &Skb, endpoint: &F::Addr) -> Option<F::Addr> {
    let mut fib = Fib::new::<F>(LOOPBACK, &F::UNSPECIFIED, endpoint);
    // Where a mark or a source leads the packet another way than its address alone, the answer is not about this device.
    let result = skb.route(&mut fib, route::source_wanted());
    route::node_source::<F>(skb.ifindex(), &fib, result)
}

/// A client on the endpoint's own bridge gets the reply as it sent the request: by MAC, not through the router.
#[inline(always)]
fn back_over_bridge<F: Source>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, bridge: u32) {
    let mut fib = Fib::new::<F>(bridge, &key.dst, &key.src);
    let result = skb.route(&mut fib, 0);
    route::over_bridge(found, bridge, &fib, result);
}

/// One attempt at a source port. `NotOurs`: another flow has it, or a socket of the node.
#[inline(always)]
fn take_port<F: Source>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>) -> Outcome {
    let Some(config) = config::get() else { return Outcome::DropHelper };
    let Some(sport) = next_port(config, hash::endpoint(&key.dst, key.dport, key.proto)) else {
        return Outcome::DropNoSourcePort;
    };
    found.sport = if mutant!("rule-72-port") { key.sport } else { sport };
    if skb.has_socket::<F>(key.proto, &found.dst, found.dport, &found.src, sport) && !mutant!("masquerade-sockets") {
        return Outcome::NotOurs;
    }
    let Some(reply) = F::reply() else { return Outcome::DropHelper };
    reply_entry(key, found, reply);
    match reserve::reply(reply) {
        Reservation::Fresh | Reservation::Ours => {}
        Reservation::Taken => return Outcome::NotOurs,
        Reservation::Full => return Outcome::DropHelper,
    }
    match store_owner(key, found, reply) {
        Ok(()) => Outcome::Masqueraded,
        Err(_) => Outcome::DropHelper,
    }
}

/// The next port of the pool for this endpoint: one after the other, so that the one used last is used again last.
#[inline(always)]
fn next_port(config: &Config, endpoint: u32) -> Option<u16> {
    let (low, high) = (u32::from(config.snat_low_count), u32::from(config.snat_high_count));
    let pool = low + high;
    if pool == 0 {
        return None;
    }
    let at = maps::next_of(endpoint) % pool;
    let port =
        if at < low { u32::from(config.snat_low_first) + at } else { u32::from(config.snat_high_first) + at - low };
    Some(port as u16)
}

subprograms! {
    /// [`prepare`] of a family, as a global subprogram.
    Prepare: Source => prepare(skb;) as prepare_v4, prepare_v6
}

subprograms! {
    /// [`take_port`] of a family, as a global subprogram.
    TakePort: Source => take_port(skb;) as take_port_v4, take_port_v6
}

/// What [`begin`] needs of a family.
pub(crate) trait Masquerade: Prepare + TakePort {}

impl<F: Prepare + TakePort> Masquerade for F {}
