//! The first packet of a flow: which Service, which endpoint, which tuple.

use proxy_common::Outcome;
use proxy_common::abi::{Config, Direction, Flow, FlowKey, Role, Service, filter};
use proxy_common::algo::{hash, timeout};

use super::service::{self, Choice};
use super::{Argument, attempt::Attempt, confirm::HalfOpen, direct::Direct, flow, reject::Answer, rewrite::Rewrite};
use crate::config;
use crate::ctx::PacketCtx;
use crate::ctx::tc::Skb;
use crate::maps::{self, Maps};
use crate::packet::{ACK, RST, SYN};

/// What the fast path saw of the packet, as one word: a subprogram's argument is a scalar or a pointer.
#[derive(Clone, Copy)]
pub(crate) struct Seen(u32);

impl Argument for Seen {
    #[inline(always)]
    fn number(self) -> u32 {
        self.0
    }

    #[inline(always)]
    fn from_number(number: u32) -> Self {
        Self(number)
    }
}

impl Seen {
    #[inline(always)]
    pub(crate) const fn new(tcp_flags: u8, filter: u8, offset: u32) -> Self {
        Self(tcp_flags as u32 | (filter as u32) << 8 | offset << 16)
    }

    #[inline(always)]
    pub(crate) const fn tcp_flags(self) -> u8 {
        self.0 as u8
    }

    #[inline(always)]
    pub(crate) const fn bits_of_filter(self) -> u8 {
        (self.0 >> 8) as u8
    }

    /// Where layer 4 begins.
    #[inline(always)]
    pub(crate) const fn offset(self) -> u32 {
        self.0 >> 16
    }
}

/// Attempts at a free tuple: the plain choice and three other endpoints …
const ENDPOINT_ATTEMPTS: u32 = 4;
/// … then other source ports.
pub(crate) const SPARE_ATTEMPTS: u32 = 4;
/// Where source ports that had to be exchanged come from: above the default `ip_local_port_range`.
const SPARE_PORTS: u32 = 61_000;
const SPARE_PORT_COUNT: u32 = 4_536;

/// The source port of an attempt that exchanges it.
#[inline(always)]
pub(crate) const fn spare_port(hash: u32, attempt: u32) -> u16 {
    (SPARE_PORTS + (hash >> 4).wrapping_add(attempt * 797) % SPARE_PORT_COUNT) as u16
}

#[inline(always)]
fn resolve<F: Resolve>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, seen: Seen) -> Outcome {
    let bits = seen.bits_of_filter();
    if key.dir == Direction::Out as u8 && bits & (filter::SERVICE | filter::DIRECT) == 0 {
        return Outcome::NotOurs;
    }
    let Some(service) = service::find(key, seen) else { return no_service(skb, key, found, seen) };
    if !entered_for_us(skb, key, found) {
        return Outcome::LayerTwoTransit;
    }
    if key.proto == timeout::TCP && seen.tcp_flags() & (SYN | ACK | RST) != SYN {
        return mid_stream(seen);
    }
    let Some(choice) = service::choice(skb, &service, key.dir == Direction::Out as u8) else {
        return Outcome::RejectNoEndpoint;
    };
    let outcome =
        if choice.run.is_empty() { service::refuse(choice.run) } else { choose(skb, key, found, &service, &choice) };
    match outcome {
        Outcome::RequestNew => maps::count_port(service.port_id, false),
        Outcome::RequestHalfOpen => {}
        _ => maps::count_port(service.port_id, true),
    }
    outcome
}

/// The destination is no Service port. A ClusterIP refuses; an endpoint's own address is guarded against a clash.
#[inline(always)]
fn no_service<F: Resolve>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, seen: Seen) -> Outcome {
    let bits = seen.bits_of_filter();
    if bits & filter::SERVICE != 0 && service::is_cluster_ip::<F>(&key.dst) {
        return match entered_for_us(skb, key, found) {
            // A reset is never answered by one (RFC 9293 §3.10.7.1).
            true if key.proto == timeout::TCP && seen.tcp_flags() & RST != 0 => Outcome::DropUnanswerable,
            true => Outcome::RejectUnknownPort,
            false => Outcome::LayerTwoTransit,
        };
    }
    if bits & flow::direct(key.direction()) != 0 && !cfg!(feature = "mutant-no-guard") {
        return F::direct(key, found, seen);
    }
    Outcome::NotOurs
}

/// False for a bridged frame that is not addressed to the device or its bridge. Remembers the MAC that it carries.
#[inline(always)]
fn entered_for_us<F: Maps>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>) -> bool {
    found.entry_mac = [0; 6];
    if key.dir == Direction::Out as u8 || skb.is_for_device() || cfg!(feature = "mutant-no-transit") {
        return true;
    }
    let (Some(device), Some(mac)) = (maps::device(skb.ifindex()), skb.load_at::<[u8; 6], 0>()) else { return false };
    found.entry_mac = mac;
    device.role == Role::BridgePort as u8 && flow::same_mac(&mac, &device.master_mac)
}

/// A TCP segment that opens nothing and belongs to no flow we know.
#[inline(always)]
fn mid_stream(seen: Seen) -> Outcome {
    if config::get().is_some_and(|c| c.flags & Config::KUBE_PROXY != 0) {
        return Outcome::ForeignConnection;
    }
    if seen.tcp_flags() & RST != 0 { Outcome::DropUnanswerable } else { Outcome::RejectNoFlow }
}

/// Chooses an endpoint and reserves the reply's tuple.
#[inline(always)]
fn choose<F: Resolve>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, service: &Service, choice: &Choice) -> Outcome {
    let seed = config::get().map_or(0, |c| c.seed);
    let hash = tuple_hash(key, seed);
    found.port_id = service.port_id;
    if choice.moved && !choice.settled.is_empty() && !cfg!(feature = "mutant-unsettled") {
        // The run moved while this flow may be half open under the earlier one: it keeps the endpoint it had.
        let settled = choice.settled;
        (found.sport, found.flags) = (key.sport, 0);
        let index = settled.base().wrapping_add(hash::index(hash, settled.len()));
        if F::attempt(skb, key, found, index, true) == Outcome::RequestHalfOpen {
            return Outcome::RequestHalfOpen;
        }
    }
    let run = choice.run;
    let first = hash::index(hash, run.len());
    for attempt in 0..ENDPOINT_ATTEMPTS + SPARE_ATTEMPTS {
        let (index, sport) = candidate(attempt, first, run.len(), hash, key.sport);
        if attempt != 0 && attempt < ENDPOINT_ATTEMPTS && index == first {
            continue;
        }
        found.sport = sport;
        found.flags = if attempt != 0 || choice.moved { Flow::<F>::PINNED } else { 0 };
        let outcome = F::attempt(skb, key, found, run.base().wrapping_add(index), false);
        if outcome != Outcome::NotOurs {
            return outcome;
        }
    }
    Outcome::DropTupleClash
}

/// The hash of a tuple, in a frame of its own: inlined, it keeps both addresses on the caller's stack.
#[inline(never)]
pub(crate) fn tuple_hash<F: Maps>(key: &FlowKey<F>, seed: u64) -> u32 {
    hash::tuple(key, seed)
}

/// Index and source port of an attempt.
#[inline(always)]
const fn candidate(attempt: u32, first: u32, len: u32, hash: u32, sport: u16) -> (u32, u16) {
    if attempt >= ENDPOINT_ATTEMPTS {
        return (first, spare_port(hash, attempt));
    }
    let index = first + attempt;
    // The index is below len, so one subtraction folds it; more attempts than endpoints come round to the first.
    if index < len {
        (index, sport)
    } else if index - len < len {
        (index - len, sport)
    } else {
        (first, sport)
    }
}

subprograms! {
    /// Everything that the pipeline needs of a family; [`resolve`] as a global subprogram.
    Resolve: Needs => resolve(skb; seen: Seen) as resolve_v4, resolve_v6
}

/// What [`resolve`] needs of a family.
pub(crate) trait Needs: HalfOpen + Attempt + Direct + Rewrite + Answer {}

impl<F: HalfOpen + Attempt + Direct + Rewrite + Answer> Needs for F {}
