//! The first packet of a flow: which Service, and what its policy offers to this client.

use proxy_common::Outcome;
use proxy_common::abi::{Config, Direction, Flow, FlowKey, Role, Service, filter};
use proxy_common::algo::timeout;

use super::service::{self, Cidrs};
use super::{Argument, flow};
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

/// The offset is what the shift leaves, 12 bits: a bound that every verifier sees, whatever it has forgotten of the word.
const OFFSET_SHIFT: u32 = 20;

impl Seen {
    #[inline(always)]
    pub(crate) const fn new(tcp_flags: u8, filter: u8, offset: u32, first_fragment: bool) -> Self {
        Self(tcp_flags as u32 | (filter as u32) << 8 | (first_fragment as u32) << 15 | offset << OFFSET_SHIFT)
    }

    /// The first fragment of a datagram.
    #[inline(always)]
    pub(crate) const fn is_first_fragment(self) -> bool {
        self.0 & 1 << 15 != 0
    }

    #[inline(always)]
    pub(crate) const fn tcp_flags(self) -> u8 {
        self.0 as u8
    }

    #[inline(always)]
    pub(crate) const fn bits_of_filter(self) -> u8 {
        (self.0 >> 8) as u8 & 0x7f
    }

    /// Where layer 4 begins.
    #[inline(always)]
    pub(crate) const fn offset(self) -> u32 {
        self.0 >> OFFSET_SHIFT
    }
}

/// What is to be done: `RequestNew`, an endpoint is to be chosen; `DirectRewritten`, the tuple may be a Service flow's.
#[inline(always)]
fn resolve<F: Cidrs>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, seen: Seen) -> Outcome {
    let bits = seen.bits_of_filter();
    let node = if mutant!("rule-92") { 0 } else { filter::NODE };
    if key.dir == Direction::Out as u8 && bits & (filter::SERVICE | node | filter::DIRECT) == 0 {
        return Outcome::NotOurs;
    }
    let Some(service) = service::find(key, seen) else { return no_service(skb, key, found, seen) };
    if !entered_for_us(skb, key, found) {
        return Outcome::LayerTwoTransit;
    }
    if service.flags & Service::SOURCE_RANGES != 0 && !mutant!("rule-21") && !service::is_allowed(key, service.port_id)
    {
        maps::count_port(service.port_id, true);
        return if mutant!("rule-21-silent") { Outcome::RejectNoEndpoint } else { Outcome::DropSourceRange };
    }
    if key.proto == timeout::TCP && seen.tcp_flags() & (SYN | ACK | RST) != SYN {
        return mid_stream(seen);
    }
    let Some(room) = maps::choice() else { return Outcome::DropHelper };
    let Some(choice) = service::choice(skb, key, &service) else { return Outcome::RejectNoEndpoint };
    if choice.run.is_empty() {
        maps::count_port(service.port_id, true);
        return service::refuse(choice.run);
    }
    found.port_id = service.port_id;
    *room = choice;
    Outcome::RequestNew
}

/// The destination is no Service port. A ClusterIP refuses; an endpoint's own address is guarded against a clash.
#[inline(always)]
fn no_service<F: Cidrs>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>, seen: Seen) -> Outcome {
    let bits = seen.bits_of_filter();
    let cluster_ip = bits & filter::SERVICE != 0 && service::is_cluster_ip::<F>(&key.dst) && !mutant!("rule-66");
    if cluster_ip || mutant!("rule-66-others") {
        return match entered_for_us(skb, key, found) {
            // A reset is never answered by one (RFC 9293 §3.10.7.1).
            true if key.proto == timeout::TCP && seen.tcp_flags() & RST != 0 => Outcome::DropUnanswerable,
            true => Outcome::RejectUnknownPort,
            false => Outcome::LayerTwoTransit,
        };
    }
    if bits & flow::direct(key.direction()) != 0 && !mutant!("no-guard") {
        found.ifindex = skb.ifindex();
        return Outcome::DirectRewritten;
    }
    Outcome::NotOurs
}

/// False for a bridged frame that is not addressed to the device or its bridge. Remembers the MAC that it carries.
#[inline(always)]
pub(crate) fn entered_for_us<F: Maps>(skb: &Skb, key: &FlowKey<F>, found: &mut Flow<F>) -> bool {
    found.entry_mac = [0; 6];
    if key.dir == Direction::Out as u8 || skb.is_for_device() || mutant!("no-transit") {
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

subprograms! {
    /// [`resolve`] of a family, as a global subprogram.
    Resolve: Cidrs => resolve(skb; seen: Seen) as resolve_v4, resolve_v6
}
